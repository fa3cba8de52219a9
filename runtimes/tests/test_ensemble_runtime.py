"""A graph must fit the models that it names: the texts say which tensor, which model and what each says of it."""

from pathlib import Path
from typing import Any

import pytest
from penstock import runtime
from penstock.errors import Kind, ServingError
from penstock.model_config import Signature, TensorSpec
from penstock.runtime import ModelFiles, Placement
from penstock.tensor import FP32
from penstock_runtimes.ensemble import EnsembleRuntime
from penstock_runtimes.ensemble.instance import EnsembleInstance

from .ensembles import FakeHost, FakeMember, opened, parsed, signature

CONFIG = """
    %s
    input { name: "X" data_type: TYPE_FP32 dims: [ -1, 3 ] }
    output { name: "Y" data_type: TYPE_FP32 dims: [ -1, 3 ] }
    ensemble_scheduling {
        step { model_name: "a" input_map { key: "%s" value: "X" } output_map { key: "%s" value: "T" } }
        step { model_name: "b" input_map { key: "IN" value: "T" } output_map { key: "OUT" value: "Y" } }
    }
"""
PLAIN = signature("IN: FP32 -1 3", "OUT: FP32 -1 3")


def refusal(
    first: Signature = PLAIN, second: Signature = PLAIN, more: str = "", into: str = "IN", out: str = "OUT"
) -> str:
    """Why an ensemble of two models does not load; "" where it does."""
    config = CONFIG % (more, into, out)
    if "max_batch_size: 4" in more:
        config = config.replace("dims: [ -1, 3 ]", "dims: 3")
    try:
        opened(config, FakeMember("a", first), FakeMember("b", second))
    except ServingError as error:
        return f"{'' if error.kind is Kind.INVALID else error.kind}{error.message}"
    return ""


def test_the_server_finds_it_by_the_platform() -> None:
    assert isinstance(runtime.find("ensemble", {}), EnsembleRuntime)


def test_it_has_no_settings() -> None:
    with pytest.raises(ServingError, match="the ensemble runtime has no setting 'speed'"):
        EnsembleRuntime({"speed": "high"})


def test_it_changes_nothing_of_a_configuration() -> None:
    config = parsed(f'name: "e" {CONFIG % ("", "IN", "OUT")}')
    assert EnsembleRuntime({}).complete(ModelFiles("e", 1, Path(), Path()), config, Placement("cpu")) == config


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, ""),
        ({"into": "LEFT"}, "ensemble tensor X is mapping to non-existing input LEFT in model a"),
        ({"out": "LEFT"}, "ensemble tensor T is mapped from non-existing output LEFT in model a"),
        (
            {"first": signature("IN: FP32 -1 3, BIAS: FP32 1", "OUT: FP32 -1 3")},
            "input BIAS in model a is not mapped to any ensemble tensors",
        ),
        ({"first": signature("IN: FP32 -1 3, BIAS?: FP32 1", "OUT: FP32 -1 3")}, ""),
        (
            {"first": signature("IN: FP32 -1 3", "OUT: INT32 -1 3")},
            "ensemble tensor T: inconsistent data type: TYPE_INT32 is inferred from model a while TYPE_FP32 is "
            "inferred from model b",
        ),
        (
            {"second": signature("IN: FP32 -1 3", "OUT: FP64 -1 3")},
            "ensemble tensor Y: inconsistent data type: TYPE_FP32 is inferred from model e while TYPE_FP64 is "
            "inferred from model b",
        ),
        (
            {"first": signature("IN: FP32 -1 3", "OUT: FP32 -1 4")},
            "ensemble tensor T: inconsistent shape: [-1,4] is inferred from model a while [-1,3] is inferred from "
            "model b",
        ),
        (
            {"first": signature("IN: FP32 -1 3 3", "OUT: FP32 -1 3")},
            "ensemble tensor X: inconsistent shape: [-1,3] is inferred from model e while [-1,3,3] is inferred from "
            "model a",
        ),
        (
            {
                "first": signature("IN: FP32 8 3", "OUT: FP32 4 3"),
                "second": signature("IN: FP32 -1 -1", "OUT: FP32 -1 3"),
            },
            "",
        ),
        (
            {"first": signature("IN: FP32 -1 3", "OUT: FP32"), "second": signature("IN: FP32 1", "OUT: FP32 -1 3")},
            "",  # a scalar fits one element
        ),
    ],
)
def test_steps_and_members_must_agree(changed: dict[str, Any], message: str) -> None:
    assert refusal(**changed) == (f"in ensemble e, {message}" if message else "")


LIMITS = "ensemble e allows maximum batch size 4, but it contains model a which only allows maximum batch size to be "


@pytest.mark.parametrize(
    ("own", "members", "message"),
    [(0, 0, ""), (4, 4, ""), (4, 8, ""), (4, 2, f"{LIMITS}2"), (4, 0, f"{LIMITS}0")],
)
def test_members_must_take_the_batches_of_the_ensemble(own: int, members: int, message: str) -> None:
    dims = "3" if members else "-1 3"
    inside = signature(f"IN: FP32 {dims}", f"OUT: FP32 {dims}", members)
    assert refusal(inside, inside, more=f"max_batch_size: {own}") == message


def test_members_that_batch_fit_an_ensemble_that_does_not() -> None:
    inside = signature("IN: FP32 3", "OUT: FP32 3", batch=8)
    assert refusal(inside, inside) == ""


def test_a_member_that_splits_takes_any_batch() -> None:
    spec = TensorSpec("IN", FP32, (3,), (-1, 3)), TensorSpec("OUT", FP32, (3,), (-1, 3))
    splits = Signature("a", {"IN": spec[0]}, {"OUT": spec[1]}, frozenset({"IN"}), 2, 2**31)
    config = f"max_batch_size: 4 {CONFIG % ('', 'IN', 'OUT')}".replace("dims: [ -1, 3 ]", "dims: 3")
    opened(config, FakeMember("a", splits), FakeMember("b", splits))


def test_members_are_asked_for_by_version() -> None:
    host = FakeHost(FakeMember("a", PLAIN), FakeMember("b", PLAIN))
    config = parsed(f'name: "e" platform: "ensemble" {CONFIG % ("", "IN", "OUT")}')
    config.ensemble_scheduling.step[0].model_version = 3
    config.ensemble_scheduling.step[1].model_version = -1
    EnsembleRuntime({}).open(ModelFiles("e", 1, Path(), Path()), config, Placement("cpu"), host)
    assert host.asked == [("a", 3), ("b", -1)]


def test_labels_of_a_members_output_are_those_of_the_ensembles() -> None:
    labelled = TensorSpec("OUT", FP32, (-1, 3), (-1, 3), ("no", "yes"))
    member = FakeMember("b", Signature("b", PLAIN.inputs, {"OUT": labelled}, PLAIN.required, 0, 0))
    files = ModelFiles("e", 1, Path(), Path())
    opened(CONFIG % ("", "IN", "OUT"), FakeMember("a", PLAIN), member, files=files)
    assert files.labels["Y"] == ("no", "yes")


DECOUPLED = "model_transaction_policy { decoupled: true }"


def test_an_ensemble_of_a_decoupled_member_says_that_it_is_decoupled() -> None:
    config = CONFIG % ("", "IN", "OUT")
    members = FakeMember("a", PLAIN, decoupled=True), FakeMember("b", PLAIN)
    with pytest.raises(ServingError) as caught:
        opened(config, *members)
    assert caught.value.message == (
        "in ensemble e, model a is decoupled, so model_transaction_policy.decoupled of the ensemble must be true"
    )
    assert isinstance(opened(config + DECOUPLED, *members), EnsembleInstance)


def test_answers_of_two_decoupled_members_form_no_pairs() -> None:
    two = signature("P: FP32 -1 3, Q: FP32 -1 3", "OUT: FP32 -1 3")
    text = f"""
        {DECOUPLED}
        input {{ name: "X" data_type: TYPE_FP32 dims: [ -1, 3 ] }}
        output {{ name: "Y" data_type: TYPE_FP32 dims: [ -1, 3 ] }}
        ensemble_scheduling {{
            step {{ model_name: "a" input_map {{ key: "IN" value: "X" }} output_map {{ key: "OUT" value: "S" }} }}
            step {{ model_name: "b" input_map {{ key: "IN" value: "X" }} output_map {{ key: "OUT" value: "T" }} }}
            step {{ model_name: "c" input_map [ {{ key: "P" value: "S" }}, {{ key: "Q" value: "T" }} ]
                    output_map {{ key: "OUT" value: "Y" }} }}
        }}
    """
    with pytest.raises(ServingError) as caught:
        opened(
            text, FakeMember("a", PLAIN, decoupled=True), FakeMember("b", PLAIN, decoupled=True), FakeMember("c", two)
        )
    assert caught.value.message == (
        "in ensemble e, step 2 takes tensors of two decoupled models, a and b, "
        "whose answers do not belong to each other"
    )


def test_a_decoupled_member_must_not_wait_for_itself() -> None:
    config = (CONFIG % (DECOUPLED, "IN", "OUT")).replace('"b"', '"a"')
    member = FakeMember("a", PLAIN, decoupled=True)
    assert isinstance(opened(config, member), EnsembleInstance)
    with pytest.raises(ServingError, match="with max_inflight_requests it could wait for itself"):
        opened(config.replace("ensemble_scheduling {", "ensemble_scheduling { max_inflight_requests: 2"), member)
