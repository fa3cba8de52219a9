"""What a server counts."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from conformance_tests.carriers import Call, HttpBinary, Input, Refusal, infer, refusal, simple
from conformance_tests.clause_table import clause
from conformance_tests.doors import Document, Door, known
from conformance_tests.grpc_wire import GrpcClient, pb
from conformance_tests.http_wire import HttpClient
from conformance_tests.server import Target
from conformance_tests.tensors import pack

needs = pytest.mark.needs
LIMIT_S = 10.0
DURATIONS = (
    "success",
    "fail",
    "queue",
    "compute_input",
    "compute_infer",
    "compute_output",
    "cache_hit",
    "cache_miss",
)
ENTRY = {
    "name",
    "version",
    "last_inference",
    "inference_count",
    "execution_count",
    "inference_stats",
    "response_stats",
    "batch_stats",
    "memory_usage",
}


def entry(door: Door, model: str) -> Document:
    (found,) = known(door.statistics(model))["model_stats"]
    document: Document = found
    return document


def count(document: Document, name: str) -> int:
    number: int = document["inference_stats"][name]["count"]
    return number


def settled(read: Callable[[], Document], done: Callable[[Document], bool]) -> Document:
    """What `read` gives once `done` accepts it: a server may count after it has answered."""
    limit = time.monotonic() + LIMIT_S
    while not done(document := read()):
        assert time.monotonic() < limit, document
    return document


def batches(document: Document) -> dict[int, int]:
    return {int(batch["batch_size"]): int(batch["compute_infer"]["count"]) for batch in document["batch_stats"]}


@clause("statistics.fields")
@needs("simple")
def test_statistics_have_the_protocols_members(door: Door) -> None:
    document = entry(door, "simple")
    assert {*document} == ENTRY
    assert [*document["inference_stats"]] == [*DURATIONS]
    for duration in document["inference_stats"].values():
        assert [*duration] == ["count", "ns"]
    for batch in document["batch_stats"]:
        assert [*batch] == ["batch_size", "compute_input", "compute_infer", "compute_output"]


@clause("statistics.success", "statistics.batches")
@needs("simple")
def test_requests_rows_and_executions_are_counted(door: Door, target: Target) -> None:
    carrier = HttpBinary(HttpClient(target.http))
    before = entry(door, "simple")
    earliest_ms = int(time.time() * 1000) - 1000
    for rows in (1, 1, 2):
        infer(carrier, simple(rows=rows))
    want = count(before, "success") + 3
    after = settled(lambda: entry(door, "simple"), lambda now: count(now, "success") >= want)
    assert after["inference_count"] - before["inference_count"] == 4
    assert after["execution_count"] - before["execution_count"] == 3
    for name in ("success", "queue", "compute_input", "compute_infer", "compute_output"):
        assert count(after, name) - count(before, name) == 3, name
    for name in ("fail", "cache_hit", "cache_miss"):
        assert count(after, name) == count(before, name), name
    assert after["inference_stats"]["success"]["ns"] > before["inference_stats"]["success"]["ns"]
    assert after["last_inference"] >= earliest_ms
    old, new = batches(before), batches(after)
    assert [*new] == sorted(new)
    assert {size: new[size] - old.get(size, 0) for size in (1, 2)} == {1: 2, 2: 1}


@clause("statistics.durations")
@needs("simple")
def test_the_time_of_a_request_is_that_of_the_queue_and_of_the_phases(door: Door, target: Target) -> None:
    carrier = HttpBinary(HttpClient(target.http))
    before = entry(door, "simple")
    want = count(before, "success") + 2
    for _ in range(2):
        infer(carrier, simple(rows=3))
    after = settled(lambda: entry(door, "simple"), lambda now: count(now, "success") >= want)
    phases = ("compute_input", "compute_infer", "compute_output")
    spent = {
        name: int(after["inference_stats"][name]["ns"] - before["inference_stats"][name]["ns"])
        for name in ("success", "queue", *phases)
    }
    assert all(ns > 0 for ns in spent.values()), spent
    assert spent["success"] >= spent["queue"] + sum(spent[phase] for phase in phases)

    def of_three_rows(document: Document, phase: str) -> int:
        return sum(int(batch[phase]["ns"]) for batch in document["batch_stats"] if batch["batch_size"] == 3)

    for phase in phases:  # each was an execution of its own
        assert of_three_rows(after, phase) - of_three_rows(before, phase) == spent[phase], phase


@clause("statistics.failure")
@needs("failing")
def test_a_failure_touches_nothing_but_the_failures(door: Door, target: Target) -> None:
    carrier = HttpBinary(HttpClient(target.http))
    before = entry(door, "failing")
    refusal(carrier, Call("failing", [Input("INPUT0", "INT64", np.array([9], np.int64))]))
    want = count(before, "fail") + 1
    after = settled(lambda: entry(door, "failing"), lambda now: count(now, "fail") >= want)
    assert after["inference_stats"].pop("fail")["ns"] > before["inference_stats"].pop("fail")["ns"]
    for name in ("inference_stats", "inference_count", "batch_stats"):
        assert after[name] == before[name]


@clause("statistics.refused")
@needs("fixed_shape")
def test_what_never_reached_the_model_is_not_counted(door: Door, target: Target) -> None:
    carrier = HttpBinary(HttpClient(target.http))
    before = entry(door, "fixed_shape")
    refusal(carrier, Call("fixed_shape", [Input("INPUT0", "FP32", np.zeros((9, 9), np.float32))]))
    refusal(carrier, Call("fixed_shape", [Input("NOPE", "FP32", np.zeros((2, 3), np.float32))]))
    assert entry(door, "fixed_shape") == before


@clause("statistics.selection")
@needs("times_version", "simple")
def test_one_version_one_model_or_all_are_asked_for(door: Door) -> None:
    def names(*which: str) -> list[Any]:
        return [(found["name"], found["version"]) for found in known(door.statistics(*which))["model_stats"]]

    assert names("times_version", "1") == [("times_version", "1")]
    assert names("times_version") == [("times_version", "1"), ("times_version", "2")]
    assert {("simple", "1"), ("times_version", "1"), ("times_version", "2")} <= {*names()}


@clause("statistics.unknown_model")
@needs("simple")
@pytest.mark.parametrize(
    ("model", "version", "text"),
    [
        ("nope", "", "requested model 'nope' is not available"),
        ("nope", "1", "requested model 'nope' is not available"),
        ("simple", "9", "requested model version is not available for model 'simple'"),
    ],
)
def test_statistics_of_what_is_not_there_are_refused(door: Door, model: str, version: str, text: str) -> None:
    assert door.statistics(model, version) == Refusal("INVALID_ARGUMENT", text)


RESPONSE = ("compute_infer", "compute_output", "success", "fail", "empty_response", "cancel")


@clause("statistics.responses")
@needs("stream_count")
def test_responses_of_decoupled_models_are_counted_by_their_place(door: Door, grpc: GrpcClient) -> None:
    def responses() -> dict[int, dict[str, int]]:
        told = entry(door, "stream_count")["response_stats"]
        for place in told.values():
            assert [*place] == [*RESPONSE]
        return {int(at): {name: int(place[name]["count"]) for name in RESPONSE} for at, place in told.items()}

    before = responses()
    given = np.array([b'{"count": 2}'], np.object_)
    tensor = pb.ModelInferRequest.InferInputTensor(name="input", datatype="BYTES", shape=[1])
    asked = pb.ModelInferRequest(model_name="stream_count", inputs=[tensor], raw_input_contents=[pack("BYTES", given)])
    assert len(list(grpc.stub.ModelStreamInfer(iter([asked])))) == 2
    after = responses()
    more = {
        at: {name: number - before.get(at, {}).get(name, 0) for name, number in after[at].items() if number}
        for at in after
    }
    assert (more[0]["success"], more[1]["success"], more[2]["empty_response"]) == (1, 1, 1)


@clause("statistics.memory")
@needs("stream_count", "simple")
def test_memory_is_told_of_models_that_know_theirs(door: Door) -> None:
    (memory,) = entry(door, "stream_count")["memory_usage"]
    assert (memory["type"], int(memory["id"])) == ("CPU", 0)
    assert int(memory["byte_size"]) > 1 << 20
    assert entry(door, "simple")["memory_usage"] == []
