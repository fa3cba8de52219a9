"""Steps run when their tensors are there, in whatever order answers come, and give what direct evaluation gives."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from penstock_runtimes.ensemble.graph import SINK, Call, Flow, ForkError, Graph, Step

Values = dict[str, str]


def step(number: int, reads: str, writes: str, optional: str = "", decoupled: bool = False) -> Step:
    """Inputs i0, i1, ... read tensors, outputs o0, o1, ... write them."""
    inputs = {f"i{index}": tensor for index, tensor in enumerate(reads.split())}
    outputs = {f"o{index}": tensor for index, tensor in enumerate(writes.split())}
    return Step(number, inputs, outputs, frozenset(optional.split()), decoupled)


def numbers(calls: Sequence[Call[str]]) -> list[int]:
    return [call.step.number for call in calls]


def answer(flow: Flow[str], call: Call[str], **outputs: str) -> None:
    flow.answered(call, outputs)
    flow.finished(call)


def test_a_chain_runs_step_by_step() -> None:
    flow = Flow(Graph([step(0, "X", "T"), step(1, "T", "Y")], ["X"], ["Y"]), {"X": "x"})
    [first] = flow.take()
    assert (first.step.number, first.inputs) == (0, {"i0": "x"})
    assert (flow.take(), flow.ended) == ([], False)
    answer(flow, first, o0="t")
    [second] = flow.take()
    assert (second.step.number, second.inputs, flow.results()) == (1, {"i0": "t"}, [])
    answer(flow, second, o0="y")
    assert (flow.results(), flow.take(), flow.ended, flow.stuck) == ([{"Y": "y"}], [], True, False)


def test_independent_steps_run_at_the_same_time_and_a_join_waits_for_all() -> None:
    graph = Graph([step(0, "X", "T"), step(1, "T", "A"), step(2, "T", "B"), step(3, "A B", "Y")], ["X"], ["Y"])
    flow = Flow(graph, {"X": "x"})
    [first] = flow.take()
    answer(flow, first, o0="t")
    left, right = flow.take()
    assert numbers([left, right]) == [1, 2]
    answer(flow, right, o0="b")
    assert flow.take() == []
    answer(flow, left, o0="a")
    [last] = flow.take()
    assert last.inputs == {"i0": "a", "i1": "b"}


@pytest.mark.parametrize(
    ("outputs", "steps"),
    [(["Y"], [0, 1]), (["Z"], [2]), (["Y", "Z"], [0, 1, 2]), (["T"], [0]), (["X"], [])],
)
def test_only_the_steps_that_lead_to_the_outputs_run(outputs: list[str], steps: list[int]) -> None:
    whole = Graph([step(0, "X", "T"), step(1, "T", "Y"), step(2, "X", "Z")], ["X"], ["Y", "Z", "T", "X"])
    assert list(whole.only(outputs).steps) == steps


def test_a_step_is_asked_for_the_outputs_that_lead_somewhere() -> None:
    graph = Graph([step(0, "X", "A B"), step(1, "A", "Y")], ["X"], ["Y"])
    assert graph.steps[0].outputs == {"o0": "A"}


def test_an_input_may_be_an_output() -> None:
    flow = Flow(Graph([], ["X"], ["X"]), {"X": "x"})
    assert (flow.results(), flow.take(), flow.ended, flow.stuck) == ([{"X": "x"}], [], True, False)


def test_a_tensor_may_feed_two_inputs_of_one_step() -> None:
    [call] = Flow(Graph([step(0, "X X", "Y")], ["X"], ["Y"]), {"X": "x"}).take()
    assert call.inputs == {"i0": "x", "i1": "x"}


@pytest.mark.parametrize(
    ("optional", "given", "called", "stuck"),
    [("i1", {"X": "x"}, [{"i0": "x"}], False), ("", {"X": "x"}, [], True), ("i0 i1", {}, [{}], False)],
)
def test_a_step_runs_without_what_it_can_do_without(
    optional: str, given: Values, called: list[Values], stuck: bool
) -> None:
    flow = Flow(Graph([step(0, "X Z", "Y", optional)], ["X", "Z"], ["Y"]), given)
    calls = flow.take()
    assert [call.inputs for call in calls] == called
    for call in calls:
        answer(flow, call, o0="y")
    assert (flow.ended, flow.stuck) == (True, stuck)


def test_an_answer_without_an_output_leaves_the_flow_stuck() -> None:
    flow = Flow(Graph([step(0, "X", "A B"), step(1, "B", "Y")], ["X"], ["A", "Y"]), {"X": "x"})
    [call] = flow.take()
    answer(flow, call, o0="a")
    assert (flow.take(), flow.results(), flow.ended, flow.stuck) == ([], [], True, True)


# -- decoupled steps


def test_what_follows_a_decoupled_step_runs_for_each_of_its_answers() -> None:
    graph = Graph([step(0, "X", "T", decoupled=True), step(1, "T X", "Y")], ["X"], ["Y"])
    flow = Flow(graph, {"X": "x"})
    [source] = flow.take()
    flow.answered(source, {"o0": "t1"})
    flow.answered(source, {"o0": "t2"})
    one, two = flow.take()
    assert [one.inputs, two.inputs] == [{"i0": "t1", "i1": "x"}, {"i0": "t2", "i1": "x"}]
    answer(flow, two, o0="y2")
    assert (flow.results(), flow.ended) == ([{"Y": "y2"}], False)
    flow.finished(source)
    answer(flow, one, o0="y1")
    assert (flow.results(), flow.ended, flow.stuck) == ([{"Y": "y1"}], True, False)


def test_answers_wait_for_a_tensor_that_is_the_same_for_all() -> None:
    graph = Graph([step(0, "X", "T", decoupled=True), step(1, "X", "C"), step(2, "T C", "Y")], ["X"], ["Y", "C"])
    flow = Flow(graph, {"X": "x"})
    source, same = flow.take()
    flow.answered(source, {"o0": "t1"})
    assert flow.take() == []
    answer(flow, same, o0="c")
    flow.answered(source, {"o0": "t2"})
    for call in (calls := flow.take()):
        answer(flow, call, o0=f"{call.inputs['i0']}+{call.inputs['i1']}")
    assert (len(calls), flow.results()) == (2, [{"Y": "t1+c", "C": "c"}, {"Y": "t2+c", "C": "c"}])


def test_a_decoupled_step_without_answers_gives_no_results() -> None:
    flow = Flow(Graph([step(0, "X", "T", decoupled=True), step(1, "T", "Y")], ["X"], ["Y"]), {"X": "x"})
    [source] = flow.take()
    flow.finished(source)
    assert (flow.results(), flow.ended, flow.stuck) == ([], True, False)


def test_a_limit_holds_back_calls_of_the_same_step() -> None:
    graph = Graph([step(0, "X", "T", decoupled=True), step(1, "T", "Y")], ["X"], ["Y"])
    flow = Flow(graph, {"X": "x"}, limit=1)
    [source] = flow.take()
    for number in range(3):
        flow.answered(source, {"o0": f"t{number}"})
    [first] = flow.take()
    assert (first.inputs, flow.held, flow.take()) == ({"i0": "t0"}, 2, [])
    answer(flow, first, o0="y0")
    [second] = flow.take()
    assert (second.inputs, flow.held) == ({"i0": "t1"}, 1)


@pytest.mark.parametrize(
    ("steps", "outputs", "reader"),
    [
        ([step(0, "X", "A", decoupled=True), step(1, "X", "B", decoupled=True), step(2, "A B", "Y")], ["Y"], 2),
        ([step(0, "X", "A", decoupled=True), step(1, "X", "B", decoupled=True)], ["A", "B"], SINK),
    ],
)
def test_answers_of_unrelated_decoupled_steps_cannot_meet(steps: list[Step], outputs: list[str], reader: int) -> None:
    with pytest.raises(ForkError) as caught:
        Graph(steps, ["X"], outputs)
    assert (caught.value.reader, caught.value.steps) == (reader, (0, 1))


def test_what_is_done_is_forgotten() -> None:
    graph = Graph([step(0, "X", "T", decoupled=True), step(1, "T", "Y")], ["X"], ["Y"])
    flow = Flow(graph, {"X": "x"})
    [source] = flow.take()
    for _ in range(5):
        flow.answered(source, {"o0": "t"})
        [call] = flow.take()
        answer(flow, call, o0="y")
        assert flow._root.above == []


# -- any graph, in any order of answers


@st.composite
def graphs(draw: st.DrawFn, decoupled: bool) -> Graph:
    """Steps that read tensors of the inputs and of steps before them; every tensor that nobody reads is an output."""
    inputs = [f"x{number}" for number in range(draw(st.integers(1, 3)))]
    tensors = list(inputs)
    steps = []
    for number in range(draw(st.integers(1, 7))):
        reads = draw(st.lists(st.sampled_from(tensors), min_size=1, max_size=3))
        writes = [f"t{number}_{index}" for index in range(draw(st.integers(1, 2)))]
        many = decoupled and draw(st.booleans())
        steps.append(step(number, " ".join(reads), " ".join(writes), decoupled=many))
        tensors += writes
    read = {tensor for made in steps for tensor in made.inputs.values()}
    outputs = [tensor for tensor in tensors if tensor not in read and tensor not in inputs]
    return Graph(draw(st.permutations(steps)), inputs, outputs)


def computed(made: Step, given: Mapping[str, str], answer: int) -> Values:
    """What a step gives: values that tell the whole way that led to them."""
    inside = ",".join(f"{name}={given[name]}" for name in sorted(given))
    return {output: f"{output}@{made.number}#{answer}({inside})" for output in made.outputs}


def evaluated(graph: Graph, answers: Callable[[int], int]) -> list[Values]:
    """All results by recursion: each decoupled step multiplies what follows it."""

    def go_on(known: Values, left: list[Step]) -> list[Values]:
        if not left:
            return [{tensor: known[tensor] for tensor in graph.outputs}]
        made = next(made for made in left if set(made.inputs.values()) <= known.keys())
        rest = [other for other in left if other is not made]
        inputs = {name: known[tensor] for name, tensor in made.inputs.items()}
        results: list[Values] = []
        for number in range(answers(made.number) if made.decoupled else 1):
            outputs = computed(made, inputs, number)
            results += go_on(known | {made.outputs[name]: value for name, value in outputs.items()}, rest)
        return results

    return go_on({name: name for name in graph.inputs}, list(graph.steps.values()))


@given(st.data(), st.booleans(), st.integers(0, 2))
def test_results_are_those_of_direct_evaluation(data: Any, decoupled: bool, limit: int) -> None:
    try:
        graph = data.draw(graphs(decoupled))
    except ForkError:
        return
    counts = {made.number: data.draw(st.integers(0, 3)) for made in graph.steps.values() if made.decoupled}
    flow = Flow(graph, {name: name for name in graph.inputs}, limit)
    running: list[Call[str]] = []
    results: list[Values] = []
    while True:
        running += flow.take()
        by_step = [call.step.number for call in running]
        assert not limit or all(by_step.count(number) <= limit for number in by_step)
        results += flow.results()
        if not running:
            break
        call = running[data.draw(st.integers(0, len(running) - 1))]
        if call.answers < (counts[call.step.number] if call.step.decoupled else 1):
            flow.answered(call, computed(call.step, call.inputs, call.answers))
        else:
            flow.finished(call)
            running.remove(call)
    assert (flow.ended, flow.stuck) == (True, False)
    expected = evaluated(graph, lambda number: counts[number])
    assert sorted(map(str, map(sorted, map(dict.items, results)))) == sorted(
        map(str, map(sorted, map(dict.items, expected)))
    )
