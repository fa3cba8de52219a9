"""A request goes through the graph by callbacks, on any thread; its end is told once, and ends what still runs."""

import gc
import threading
import weakref
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from penstock.errors import Kind, ServingError, WorkerLostError
from penstock.messages import InferResponse, JobContext, Phases, Sequence
from penstock.runtime import PLENTY, Cancelled, Credit
from penstock.tensor import FP32, Tensor
from penstock_runtimes.ensemble.graph import Graph
from penstock_runtimes.ensemble.instance import EnsembleInstance

from .ensembles import LIMIT_S, FakeMember, Sent, opened, request, signature, start
from .test_ensemble_graph import graphs

X = 'input { name: "X" data_type: TYPE_FP32 dims: -1 }'
Y = 'output { name: "Y" data_type: TYPE_FP32 dims: -1 }'
Z = 'output { name: "Z" data_type: TYPE_FP32 dims: -1 }'
DECOUPLED = "model_transaction_policy { decoupled: true }"


def step(model: str, reads: str = "X", writes: str = "Y", takes: str = "X", gives: str = "Y") -> str:
    inputs = "".join(
        f'input_map {{ key: "{name}" value: "{tensor}" }}'
        for name, tensor in zip(takes.split(), reads.split(), strict=True)
    )
    outputs = "".join(
        f'output_map {{ key: "{name}" value: "{tensor}" }}'
        for name, tensor in zip(gives.split(), writes.split(), strict=True)
    )
    return f'step {{ model_name: "{model}" model_version: -1 {inputs} {outputs} }}'


def scheduling(*steps: str, more: str = "") -> str:
    return f"{X} {Y} ensemble_scheduling {{ {' '.join(steps)} }} {more}"


CHAIN = scheduling(step("a", "X", "T"), step("b", "T", "Y"))


def double(sent: Sent) -> None:
    sent.answer(2 * sent.inputs["X"][0])


def test_a_chain_passes_the_very_arrays_on() -> None:
    a, b = FakeMember("a"), FakeMember("b")
    asked = request({"X": 3})
    answers, _ = start(opened(CHAIN, a, b), asked)
    assert a.sent[0].arrays["X"] is asked.inputs["X"].array
    assert (b.sent, answers.given) == ([], [])
    given = np.array([5], np.float32)
    a.sent[0].reply(InferResponse("a", "1", "", [Tensor("Y", FP32, given)]))
    assert b.sent[0].arrays["X"] is given
    last = np.array([7], np.float32)
    b.sent[0].reply(InferResponse("b", "1", "", [Tensor("Y", FP32, last)]))
    [(answer, _)] = answers.given
    assert isinstance(answer, InferResponse)
    assert answer.outputs[0].array is last


def test_an_answer_has_the_names_version_and_id_of_the_ensemble() -> None:
    answers, _ = start(opened(CHAIN, FakeMember("a", script=double), FakeMember("b", script=double)), request({"X": 3}))
    [(answer, final)] = answers.given
    assert isinstance(answer, InferResponse)
    assert (answer.model, answer.version, answer.id, final) == ("e", "1", "r", True)
    assert answers.values() == [{"Y": [12]}]


def test_steps_inherit_all_that_the_request_says_beside_its_tensors() -> None:
    a = FakeMember("a")
    asked = replace(
        request({"X": 1}), parameters={"p": 1}, priority=2, deadline_ns=3, timeout_us=4,
        sequence=Sequence(5, start=True), job=JobContext("j", b"{}"),
    )  # fmt: skip
    start(opened(CHAIN, a, FakeMember("b")), asked)
    assert a.sent[0].asked is asked


def test_independent_steps_run_side_by_side() -> None:
    a, b, c = FakeMember("a"), FakeMember("b"), FakeMember("c", signature("P: FP32 -1, Q: FP32 -1", "Y: FP32 -1"))
    text = scheduling(step("a", "X", "S"), step("b", "X", "T"), step("c", "S T", "Y", takes="P Q"))
    answers, _ = start(opened(text, a, b, c))
    assert (len(a.sent), len(b.sent), len(c.sent)) == (1, 1, 0)
    b.sent[0].answer(20)
    assert c.sent == []
    a.sent[0].answer(10)
    assert c.sent[0].inputs == {"P": [10], "Q": [20]}
    c.sent[0].answer(30)
    assert answers.values() == [{"Y": [30]}]


def test_steps_that_lead_to_no_requested_output_do_not_run() -> None:
    a, b = FakeMember("a", script=double), FakeMember("b", script=double)
    text = f"{X} {Y} {Z} ensemble_scheduling {{ {step('a')} {step('b', 'X', 'Z')} }}"
    answers, _ = start(opened(text, a, b), request({"X": 1}, "Z"))
    assert (a.sent, answers.values()) == ([], [{"Z": [2]}])


def test_outputs_come_in_the_order_that_was_asked_for() -> None:
    text = f"{X} {Y} {Z} ensemble_scheduling {{ {step('a')} {step('b', 'X', 'Z')} }}"
    instance = opened(text, FakeMember("a", script=double), FakeMember("b", script=double))
    for asked, order in ((["Z", "Y"], ["Z", "Y"]), (["Y", "Z"], ["Y", "Z"]), ([], ["Y", "Z"])):
        [answer] = start(instance, request({"X": 1}, *asked))[0].values()
        assert list(answer) == order


def test_a_long_chain_of_models_that_answer_at_once_needs_no_deep_stack() -> None:
    length = 400
    names = ["X", *(f"T{number}" for number in range(length - 1)), "Y"]
    text = scheduling(*(step("a", names[number], names[number + 1]) for number in range(length)))
    answers, _ = start(opened(text, FakeMember("a", script=lambda sent: sent.answer(sent.inputs["X"][0] + 1))))
    assert answers.values() == [{"Y": [length + 1]}]


def test_a_request_that_is_answered_is_let_go_of_without_a_collection() -> None:
    class Final:
        """As the server's own: it leads to the one that may cancel."""

        def __init__(self, cancelled: Cancelled) -> None:
            self.cancelled = cancelled

        def __call__(self, result: object, final: bool = True, partial: bool = False) -> Credit:
            return PLENTY

    instance = opened(CHAIN, FakeMember("a", script=double), FakeMember("b", script=double))
    gc.disable()
    try:
        cancelled = Cancelled()
        reply, asked = Final(cancelled), request({"X": 1})
        instance.start(asked, reply, cancelled)
        gone = weakref.ref(reply)
        del cancelled, reply
        assert gone() is None
    finally:
        gc.enable()


# -- failing and cancelling


def test_the_first_error_of_a_step_is_the_ensembles_and_ends_the_others() -> None:
    a, b, c = FakeMember("a"), FakeMember("b"), FakeMember("c", signature("P: FP32 -1, Q: FP32 -1", "Y: FP32 -1"))
    text = scheduling(step("a", "X", "S"), step("b", "X", "T"), step("c", "S T", "Y", takes="P Q"))
    answers, _ = start(opened(text, a, b, c))
    a.sent[0].fail(ServingError(Kind.TIMED_OUT, "Request timeout expired"))
    assert (answers.error().kind, answers.error().message) == (
        Kind.TIMED_OUT, "in ensemble 'e', Request timeout expired",
    )  # fmt: skip
    assert [(reason.kind, reason.message) for reason in b.sent[0].cancelled] == [
        (Kind.CANCELLED, "ensemble 'e' needs no more answers")
    ]
    b.sent[0].fail(b.sent[0].cancelled[0])  # and nobody is told of it
    assert (len(answers.given), c.sent) == (1, [])


def test_a_step_that_is_refused_ends_the_request() -> None:
    def refuse(sent: Sent) -> None:
        raise ServingError(Kind.UNAVAILABLE, "Exceeds maximum queue size")

    answers, _ = start(opened(CHAIN, FakeMember("a", script=double), FakeMember("b", script=refuse)))
    assert answers.error().message == "in ensemble 'e', Exceeds maximum queue size"


def test_a_bug_is_told_as_one_and_logged_under_the_job_and_its_request(caplog: pytest.LogCaptureFixture) -> None:
    def crash(sent: Sent) -> None:
        raise KeyError("bug")

    asked = replace(request({"X": 1}), job=JobContext("j", b"{}", "order-17"))
    answers, _ = start(opened(CHAIN, FakeMember("a", script=crash), FakeMember("b")), asked)
    assert (answers.error().kind, answers.error().message) == (Kind.INTERNAL, "in ensemble 'e', KeyError: 'bug'")
    [record] = caplog.records
    assert record.getMessage() == "ensemble 'e' failed on request r"
    assert (record.__dict__["job"], record.__dict__["request_id"]) == ("j", "order-17")


def test_a_lost_worker_stays_one_so_that_a_job_is_tried_again() -> None:
    a = FakeMember("a")
    answers, _ = start(opened(CHAIN, a, FakeMember("b")))
    a.sent[0].fail(WorkerLostError("gone", blamed=True))
    lost = answers.error()
    assert isinstance(lost, WorkerLostError)
    assert (lost.message, lost.blamed) == ("in ensemble 'e', gone", True)


def test_a_cancelled_request_starts_no_further_step_and_ends_those_that_run() -> None:
    a, b = FakeMember("a"), FakeMember("b")
    answers, cancelled = start(opened(CHAIN, a, b))
    reason = ServingError(Kind.CANCELLED, "the client went away")
    cancelled.set(reason)
    assert (answers.error(), len(a.sent[0].cancelled)) == (reason, 1)
    a.sent[0].answer(1)
    assert (b.sent, len(answers.given)) == ([], 1)


def test_a_request_that_was_cancelled_before_is_answered_too() -> None:
    a = FakeMember("a")
    instance = opened(CHAIN, a, FakeMember("b"))
    answers, cancelled = start(instance)
    cancelled.set(ServingError(Kind.CANCELLED, "gone"))
    instance.start(request({"X": 1}), answers := type(answers)(), cancelled)
    assert answers.error().message == "gone"


def test_an_answer_that_lacks_an_output_is_a_deadlock() -> None:
    a = FakeMember("a")
    answers, _ = start(opened(CHAIN, a, FakeMember("b")))
    a.sent[0].end()
    assert (answers.error().kind, answers.error().message) == (
        Kind.INVALID,
        "in ensemble 'e', [request id: r] unexpected deadlock, at least one output is not set while no more ensemble "
        "steps can be made",
    )


def test_answers_may_come_from_many_threads_at_once() -> None:
    width, rounds = 8, 50
    takes = " ".join(f"P{number}" for number in range(width))
    middle = [FakeMember(f"m{number}") for number in range(width)]
    join = FakeMember("join", signature(", ".join(f"{name}: FP32 -1" for name in takes.split()), "Y: FP32 -1"),
                      script=lambda sent: sent.answer(sum(value for [value] in sent.inputs.values())))  # fmt: skip
    tensors = " ".join(f"T{number}" for number in range(width))
    steps = [step(f"m{number}", "X", f"T{number}") for number in range(width)]
    instance = opened(scheduling(*steps, step("join", tensors, "Y", takes=takes)), *middle, join)
    for _ in range(rounds):
        answers, _ = start(instance)
        barrier = threading.Barrier(width)

        def answer(member: FakeMember, barrier: threading.Barrier = barrier) -> None:
            barrier.wait(LIMIT_S)
            member.sent[-1].answer(1)

        threads = [threading.Thread(target=answer, args=[member]) for member in middle]
        for thread in threads:
            thread.start()
        answers.until_last()
        for thread in threads:
            thread.join()
        assert answers.values() == [{"Y": [width]}]


def value(number: int, output: str, inputs: Iterable[float]) -> float:
    """What step `number` makes of its inputs: small enough to be exact."""
    return float((sum(inputs) * 3 + number + (5 if output == "o1" else 0)) % 1009)


@settings(deadline=None, max_examples=60)
@given(graphs(decoupled=False), st.lists(st.booleans(), min_size=7, max_size=7))
def test_any_graph_gives_what_direct_evaluation_gives(graph: Graph, inline: list[bool]) -> None:
    with ThreadPoolExecutor(3) as pool:

        def member(number: int) -> FakeMember:
            def compute(sent: Sent) -> None:
                given = [value for [value] in sent.inputs.values()]
                sent.answer(*(value(number, output, given) for output in sent.outputs))

            return FakeMember(script=compute if inline[number] else lambda sent: pool.submit(compute, sent))

        members = [member(number) for number in range(1 + max(graph.steps, default=0))]
        sent = {name: float(position + 1) for position, name in enumerate(sorted(graph.inputs))}
        answers, _ = start(EnsembleInstance("e", 1, graph, members), request(sent))
        answers.until_last()
    known, left = dict(sent), list(graph.steps.values())
    while left:
        made = next(made for made in left if set(made.inputs.values()) <= known.keys())
        left.remove(made)
        inputs = [known[tensor] for tensor in made.inputs.values()]
        known |= {tensor: value(made.number, output, inputs) for output, tensor in made.outputs.items()}
    assert answers.values() == [{tensor: [known[tensor]] for tensor in graph.outputs}]


# -- what an ensemble computes is what its steps compute


def test_the_phases_of_steps_one_after_the_other_are_added() -> None:
    a, b = FakeMember("a"), FakeMember("b")
    answers, _ = start(opened(CHAIN, a, b))
    a.sent[0].answer(1, computed=Phases(1, 20, 300))
    b.sent[0].answer(2, computed=Phases(4, 50, 600))
    assert answers.computed() == [Phases(5, 70, 900)]


def test_the_phases_of_steps_side_by_side_are_added_too() -> None:
    a, b, c = FakeMember("a"), FakeMember("b"), FakeMember("c", signature("P: FP32 -1, Q: FP32 -1", "Y: FP32 -1"))
    text = scheduling(step("a", "X", "S"), step("b", "X", "T"), step("c", "S T", "Y", takes="P Q"))
    answers, _ = start(opened(text, a, b, c))
    b.sent[0].answer(20, computed=Phases(1, 1000, 1))
    a.sent[0].answer(10, computed=Phases(1, 1000, 1))
    c.sent[0].answer(30, computed=Phases(0, 5, 0))
    assert answers.computed() == [Phases(2, 2005, 2)]


def test_a_step_that_the_cache_answered_adds_nothing() -> None:
    a, b = FakeMember("a"), FakeMember("b")
    answers, _ = start(opened(CHAIN, a, b))
    a.sent[0].answer(1)
    b.sent[0].answer(2, computed=Phases(4, 50, 600))
    assert answers.computed() == [Phases(4, 50, 600)]
    answers, _ = start(opened(CHAIN, FakeMember("a", script=double), FakeMember("b", script=double)))
    assert answers.computed() == [Phases(0, 0, 0)]


def test_requests_are_added_up_apart() -> None:
    a, b = FakeMember("a"), FakeMember("b")
    instance = opened(CHAIN, a, b)
    first, _ = start(instance)
    second, _ = start(instance)
    shared = Phases(1, 2, 3)  # two requests in one batch have the same
    for number in (0, 1):
        a.sent[number].answer(1, computed=shared)
    for number in (0, 1):
        b.sent[number].answer(1, computed=shared)
    assert (first.computed(), second.computed(), shared) == ([Phases(2, 4, 6)], [Phases(2, 4, 6)], Phases(1, 2, 3))


def test_an_ensemble_with_answers_tells_with_the_last_what_all_steps_computed() -> None:
    a, b = FakeMember("a", decoupled=True), FakeMember("b")
    answers, _ = start(opened(STREAM, a, b))
    for number in (0, 1):
        a.sent[0].answer(number, final=False)
        b.sent[number].answer(number, computed=Phases(1, 10, 100))
    a.sent[0].end(computed=Phases(0, 7000, 0))
    assert answers.computed() == [None, None, Phases(2, 7020, 200)]


# -- decoupled members

STREAM = scheduling(step("a", "X", "T"), step("b", "T", "Y"), more=DECOUPLED)


def test_every_answer_of_a_decoupled_member_gives_one_of_the_ensemble() -> None:
    a, b = FakeMember("a", decoupled=True), FakeMember("b", script=double)
    answers, _ = start(opened(STREAM, a, b))
    a.sent[0].answer(1, final=False)
    a.sent[0].answer(100, final=False, partial=True)  # progress is no answer
    a.sent[0].answer(2, final=False)
    assert answers.values() == [{"Y": [2]}, {"Y": [4]}]
    a.sent[0].answer(3)
    assert answers.values() == [{"Y": [2]}, {"Y": [4]}, {"Y": [6]}, {}]
    assert [final for _, final in answers.given] == [False, False, False, True]


def test_a_last_answer_that_sums_up_is_none_of_its_own() -> None:
    a = FakeMember("a", decoupled=True, sums_up=True)
    answers, _ = start(opened(STREAM, a, FakeMember("b", script=double)))
    a.sent[0].answer(1, final=False)
    a.sent[0].answer(100)
    assert answers.values() == [{"Y": [2]}, {}]
    answers, _ = start(opened(STREAM, a, FakeMember("b", script=double)))
    a.sent[1].answer(100)
    assert answers.values() == [{"Y": [200]}, {}]


def test_an_error_after_answers_ends_the_stream() -> None:
    a = FakeMember("a", decoupled=True)
    answers, _ = start(opened(STREAM, a, FakeMember("b", script=double)))
    a.sent[0].answer(1, final=False)
    a.sent[0].fail(ServingError(Kind.INTERNAL, "broken"))
    assert [final for _, final in answers.given] == [False, True]
    assert str(answers.given[1][0]) == "in ensemble 'e', broken"


def test_a_decoupled_member_waits_while_the_ensembles_answers_lie_unread() -> None:
    a = FakeMember("a", decoupled=True)
    answers, _ = start(opened(STREAM, a, FakeMember("b", script=double)), room=2)
    assert a.sent[0].answer(1, final=False).left > 0
    credit = a.sent[0].answer(2, final=False)
    assert credit.left == 0
    waited = threading.Thread(target=credit.wait)
    waited.start()
    answers.read()
    waited.join(LIMIT_S)
    assert (waited.is_alive(), credit.left) == (False, 1)


def test_a_decoupled_member_waits_while_the_steps_behind_it_are_held_back() -> None:
    a, b = FakeMember("a", decoupled=True), FakeMember("b")
    limited = STREAM.replace("ensemble_scheduling {", "ensemble_scheduling { max_inflight_requests: 1 ")
    answers, _ = start(opened(limited, a, b))
    assert a.sent[0].answer(1, final=False).left > 0
    credit = a.sent[0].answer(2, final=False)
    assert (credit.left, len(b.sent)) == (0, 1)
    waited = threading.Thread(target=credit.wait)
    waited.start()
    b.sent[0].answer(10)
    waited.join(LIMIT_S)
    assert (waited.is_alive(), len(b.sent), b.sent[1].inputs) == (False, 2, {"X": [2]})
    b.sent[1].answer(20)
    a.sent[0].end()
    assert answers.values() == [{"Y": [10]}, {"Y": [20]}, {}]


def test_who_waits_is_let_go_when_the_request_ends() -> None:
    a, b = FakeMember("a", decoupled=True), FakeMember("b")
    limited = STREAM.replace("ensemble_scheduling {", "ensemble_scheduling { max_inflight_requests: 1 ")
    answers, cancelled = start(opened(limited, a, b))
    a.sent[0].answer(1, final=False)
    credit = a.sent[0].answer(2, final=False)
    waited = threading.Thread(target=credit.wait)
    waited.start()
    cancelled.set(ServingError(Kind.CANCELLED, "gone"))
    waited.join(LIMIT_S)
    assert (waited.is_alive(), str(answers.error())) == (False, "gone")


def test_it_answers_through_start_alone() -> None:
    instance = opened(CHAIN, FakeMember("a"), FakeMember("b"))
    with pytest.raises(ServingError, match="use start"):
        instance.execute([request({"X": 1})])
    instance.close()
