"""Models that call others see a version of each, and load after them."""

import numpy as np
import pytest
from msgspec.structs import replace
from penstock.errors import Kind, ServingError
from penstock.members import Called, Members, called, circle, dependents, last_first, levels, named
from penstock.messages import JobContext, RequestedOutput, Sequence
from penstock.model import Model
from penstock.tensor import FP32, FP64, Tensor

from .fakes import Answers, EchoInstance, GatedInstance, calling, configuration, loaded, model, request

# a calls b and c, b calls d; x and y call each other, and z itself
NEEDS = {"a": ["b", "c"], "b": ["d"], "e": ["a"], "x": ["y"], "y": ["x"], "z": ["z"], "v": ["x"]}


def needs(name: str) -> list[str]:
    return NEEDS.get(name, [])


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], []),
        (["d"], [["d"]]),
        (["a"], [["d", "c"], ["b"], ["a"]]),
        (["d", "e", "c"], [["d", "c"], ["b"], ["a"], ["e"]]),
        (["f", "b"], [["f", "d"], ["b"]]),
    ],
)
def test_what_others_call_comes_first(names: list[str], expected: list[list[str]]) -> None:
    assert levels(names, needs) == expected


def test_circles_are_cut_and_nothing_is_left_out() -> None:
    assert sorted(name for group in levels(["x", "z", "v"], needs) for name in group) == ["v", "x", "y", "z"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a", None), ("x", ["x", "y", "x"]), ("y", ["y", "x", "y"]), ("z", ["z", "z"]), ("v", None)],
)
def test_a_model_that_calls_itself_in_the_end_is_found(name: str, expected: list[str] | None) -> None:
    assert circle(name, needs) == expected


@pytest.mark.parametrize(
    ("changed", "expected"), [(["d"], ["b", "a", "e"]), (["c"], ["a", "e"]), (["e"], []), (["b", "c"], ["a", "e"])]
)
def test_those_that_call_a_changed_model_follow_in_order(changed: list[str], expected: list[str]) -> None:
    assert dependents(changed, NEEDS) == expected


def test_a_configuration_names_its_members() -> None:
    config = configuration(calling("b", "a", "b", version=2))
    assert (called(config), named(config)) == ([("b", "2"), ("a", "2"), ("b", "2")], ["b", "a"])
    assert called(configuration(calling("a"))) == [("a", "")]
    assert called(configuration(calling("a", version=0))) == [("a", "")]
    assert called(configuration()) == []


def test_the_host_lends_versions_and_remembers_them() -> None:
    asked: list[tuple[str, str]] = []
    member = model()

    def lend(name: str, version: str) -> Model:
        asked.append((name, version))
        return member

    host = Members(lend)
    assert [host.member("m", version).name for version in (-1, 0, 3)] == ["m", "m", "m"]
    assert (asked, host.models) == ([("m", ""), ("m", ""), ("m", "3")], [member] * 3)


def test_a_call_takes_over_what_the_request_says_and_the_memory_of_its_tensors() -> None:
    instance = GatedInstance()
    member = Called(model(instance))
    asked = replace(
        request(1, id="r"), parameters={"p": 1}, priority=2, deadline_ns=2**62, timeout_us=4,
        sequence=Sequence(5, start=True), job=JobContext("j", b"{}"),
    )  # fmt: skip
    given = np.array([3, 4], np.float32)
    answers = Answers()
    pending = member.infer({"X": Tensor("T", FP32, given)}, {"Y": RequestedOutput("Y")}, asked, answers)
    instance.gate.set()
    assert answers.values() == [3, 4]
    sent = pending.request
    for field in ("id", "parameters", "priority", "deadline_ns", "timeout_us", "sequence", "job"):
        assert getattr(sent, field) == getattr(asked, field), field
    assert (sent.model, sent.version, list(sent.outputs), sent.rows) == ("m", "1", ["Y"], 1)
    assert sent.inputs["X"].name == "X"
    assert np.shares_memory(sent.inputs["X"].array, given)


def test_rows_of_a_call_are_its_own() -> None:
    config = configuration()
    config.max_batch_size = 4
    config.input[0].dims[:] = [2]
    member = Called(model(config=config))
    tensor = Tensor("X", FP32, np.zeros((3, 2), np.float32))
    assert member.infer({"X": tensor}, {}, request(), Answers()).request.rows == 3


def test_a_call_must_agree_with_the_signature() -> None:
    answers = Answers()
    with pytest.raises(ServingError) as caught:
        Called(model()).infer({"X": Tensor("X", FP64, np.zeros(1))}, {}, request(id="r"), answers)
    assert (caught.value.kind, answers.given) == (Kind.INVALID, [])
    assert caught.value.message == (
        "[request id: r] inference input 'X' data-type is 'FP64', but model 'm' expects 'FP32'"
    )


def test_a_handler_sums_up() -> None:
    assert not Called(model()).sums_up
    assert Called(model(config=configuration('name: "m" backend: "handler"'))).sums_up


def test_callers_stand_before_those_they_call() -> None:
    below = model()
    middle = Model(replace(loaded(), members=(below,)), [EchoInstance()])
    above = Model(replace(loaded(), members=(below, middle)), [EchoInstance()])
    assert [made.depth for made in (below, middle, above)] == [0, 1, 2]
    assert [made.calls for made in (below, middle, above)] == [1, 1, 2]
    assert last_first([below, above, middle]) == [above, middle, below]
    assert above.concurrency == 2 * below.concurrency
    assert above.devices == below.devices
