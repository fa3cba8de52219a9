"""Ensembles: graphs of models that answer as one."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from conformance_tests.carriers import (
    Call,
    Carrier,
    GrpcRaw,
    HttpBinary,
    Input,
    Output,
    Refusal,
    Reply,
    infer,
    infer_message,
    infer_path,
    refusal,
)
from conformance_tests.clause_table import clause
from conformance_tests.doors import Document, Door, known
from conformance_tests.extensions.test_schedule_policy import FOREVER, LIMIT_S, Crowd
from conformance_tests.grpc_wire import GrpcClient, status
from conformance_tests.http_wire import HttpClient, encode
from conformance_tests.jobs.client import Endpoint
from conformance_tests.models.ensembles import make_handler_ensembles
from conformance_tests.server import HANDLERS, Running, StartServer, Target
from conformance_tests.tensors import Array

needs = pytest.mark.needs
both = pytest.mark.parametrize("carrier", ["http-binary", "grpc-raw"], indirect=True)

LEFT = np.arange(32, dtype=np.int32).reshape(2, 16)
RIGHT = np.full((2, 16), 3, np.int32)
SLOW = ("slow_rows_sharing", "slow_rows_sharing_too")


def ints(model: str, *outputs: str, left: Array = LEFT, id: str = "") -> Call:
    inputs = [Input("LEFT", "INT32", left), Input("RIGHT", "INT32", RIGHT)]
    return Call(model, inputs, [Output(name) for name in outputs], id=id)


def given(reply: Reply) -> dict[str, list[object]]:
    return {output.name: output.array.tolist() for output in reply.outputs}


@clause("ensemble.steps", "ensemble.dependencies")
@needs("ensemble_chain", "simple")
def test_a_chain_of_two_gives_what_both_give(carrier: Carrier) -> None:
    reply = infer(carrier, ints("ensemble_chain", id="r"))
    assert (reply.model, reply.version, reply.id) == ("ensemble_chain", "1", "r")
    assert given(reply) == {"TWICE_LEFT": (2 * LEFT).tolist(), "TWICE_RIGHT": (2 * RIGHT).tolist()}


@both
@clause("ensemble.nested")
@needs("ensemble_nested", "ensemble_chain", "simple")
def test_an_ensemble_calls_an_ensemble(carrier: Carrier) -> None:
    total, difference = (2 * (LEFT + RIGHT)).tolist(), (2 * (LEFT - RIGHT)).tolist()
    assert given(infer(carrier, ints("ensemble_nested"))) == {"SUM": total, "DIFFERENCE": difference}


@both
@clause("ensemble.outputs")
@needs("ensemble_failing")
def test_a_step_that_leads_to_no_requested_output_does_not_run(carrier: Carrier) -> None:
    wrong = [Input("INDEX", "INT64", np.array([9], np.int64))]
    assert refusal(carrier, Call("ensemble_failing", wrong)).status == "INVALID_ARGUMENT"
    assert infer(carrier, Call("ensemble_failing", wrong, [Output("COPY")]))["COPY"].tolist() == [9]


@both
@clause("ensemble.errors")
@needs("ensemble_failing", "failing")
def test_the_error_of_a_step_is_the_ensembles(carrier: Carrier) -> None:
    wrong = Input("INDEX", "INT64", np.array([9], np.int64))
    alone = refusal(carrier, Call("failing", [Input("INPUT0", "INT64", wrong.array)]))
    assert refusal(carrier, Call("ensemble_failing", [wrong])) == Refusal(
        alone.status, f"in ensemble 'ensemble_failing', {alone.text}"
    )
    right = Input("INDEX", "INT64", np.array([1, 2], np.int64))
    assert infer(carrier, Call("ensemble_failing", [right]))["VALUE"].tolist() == [20, 30]


def rows(number: float, count: int = 1) -> Call:
    return Call("ensemble_diamond", [Input("INPUT0", "FP32", np.full((count, 3), number, np.float32))])


@both
@clause("ensemble.batch_axis", "ensemble.steps")
@needs("ensemble_diamond", *SLOW)
def test_members_that_batch_get_the_axis_in_the_shapes(carrier: Carrier) -> None:
    assert infer(carrier, rows(5))["OUTPUT0"].tolist() == [[10, 10, 10]]
    # The ensemble has no limit of its own; its members have.
    refused = refusal(carrier, rows(5, count=2))
    assert refused.status == "INVALID_ARGUMENT"
    assert refused.text.startswith(
        "in ensemble 'ensemble_diamond', [request id: <id_unknown>] inference request batch-size must be <= 1 for "
    )


def running(carrier: Carrier, http: HttpClient, gauges: HttpClient, pool: ThreadPoolExecutor) -> Callable[[int], None]:
    """Waits until each of the slow members runs so many requests."""
    crowds = [Crowd(carrier, model, http, gauges, pool) for model in (*SLOW, "ensemble_diamond")]

    def wait(number: int) -> None:
        for crowd in crowds:
            crowd.until("penstock_running_requests", number)

    return wait


@clause("ensemble.steps", "ensemble.cancel")
@pytest.mark.over("http")
@needs("ensemble_diamond", *SLOW)
def test_independent_steps_run_side_by_side_and_end_with_their_client(
    http: HttpClient, http_metrics: HttpClient
) -> None:
    tensor = {"name": "INPUT0", "datatype": "FP32", "shape": [1, 1], "data": [FOREVER]}
    body = encode({"inputs": [tensor]})
    with ThreadPoolExecutor(1) as pool:
        wait = running(HttpBinary(http), http, http_metrics, pool)
        with http.connect() as connection:
            head = connection.head("POST", infer_path("ensemble_diamond"), {"Content-Length": str(len(body))})
            connection.send(head + body)
            wait(1)  # of both members at the same time
        wait(0)
    assert infer(HttpBinary(http), rows(1))["OUTPUT0"].tolist() == [[2, 2, 2]]


@clause("ensemble.cancel")
@pytest.mark.over("grpc")
@needs("ensemble_diamond", *SLOW)
def test_the_steps_of_a_request_end_with_its_deadline(
    grpc: GrpcClient, http: HttpClient, http_metrics: HttpClient
) -> None:
    message = infer_message(Call("ensemble_diamond", []))
    message.inputs.add(name="INPUT0", datatype="FP32", shape=[1, 1])
    message.raw_input_contents.append(np.array([[FOREVER]], np.float32).tobytes())
    with ThreadPoolExecutor(1) as pool:
        wait = running(GrpcRaw(grpc), http, http_metrics, pool)
        call = pool.submit(grpc.stub.ModelInfer, message, timeout=2.0)
        wait(1)
        assert status(call.exception(LIMIT_S)) == "DEADLINE_EXCEEDED"
        wait(0)


@both
@clause("ensemble.labels")
@needs("ensemble_digits", "digits")
def test_classes_bear_the_labels_of_the_member(carrier: Carrier) -> None:
    picture = np.zeros((1, 1, 8, 8), np.float32)
    alone = Call("digits", [Input("image", "FP32", picture)], [Output("probabilities", classification=3)])
    through = Call("ensemble_digits", [Input("PICTURE", "FP32", picture)], [Output("DIGIT", classification=3)])
    classes = infer(carrier, through)["DIGIT"].tolist()
    assert classes == infer(carrier, alone)["probabilities"].tolist()
    assert all(len(text.split(b":")) == 3 for text in np.array(classes).ravel())


def counted(door: Door, model: str) -> Document:
    (found,) = known(door.statistics(model))["model_stats"]
    document: Document = found
    return document


def moved(door: Door, models: tuple[str, ...], act: Callable[[], object]) -> dict[str, tuple[int, int, int]]:
    """Requests that succeeded, rows and executions, by model, while `act` runs."""

    def now(model: str) -> tuple[int, int, int]:
        found = counted(door, model)
        counts = found["inference_stats"]["success"]["count"], found["inference_count"], found["execution_count"]
        return int(counts[0]), int(counts[1]), int(counts[2])

    before = {model: now(model) for model in models}
    act()
    return {model: tuple(b - a for a, b in zip(before[model], now(model), strict=True)) for model in models}  # type: ignore[misc]


@clause("ensemble.statistics")
@needs("ensemble_nested", "ensemble_chain", "simple")
def test_each_step_counts_on_its_model_and_the_ensemble_on_its_own(door: Door, http: HttpClient) -> None:
    models = ("ensemble_nested", "ensemble_chain", "simple")
    counts = moved(door, models, lambda: infer(HttpBinary(http), ints("ensemble_nested")))
    assert counts == {"ensemble_nested": (1, 2, 1), "ensemble_chain": (1, 2, 1), "simple": (3, 6, 3)}


PHASES = ("compute_input", "compute_infer", "compute_output")


def computed(door: Door, models: tuple[str, ...], act: Callable[[], object]) -> dict[str, list[tuple[int, int]]]:
    """How often and for how many nanoseconds each phase was counted, by model, while `act` runs."""

    def now(model: str) -> list[tuple[int, int]]:
        told = counted(door, model)["inference_stats"]
        return [(int(told[phase]["count"]), int(told[phase]["ns"])) for phase in PHASES]

    before = {model: now(model) for model in models}
    act()
    return {
        model: [(n - m, t - s) for (m, s), (n, t) in zip(before[model], now(model), strict=True)] for model in models
    }


def total(*models: list[tuple[int, int]]) -> list[int]:
    """Nanoseconds of each phase of these models together."""
    return [sum(ns for _, ns in phase) for phase in zip(*models, strict=True)]


@clause("ensemble.compute")
@needs("ensemble_nested", "ensemble_chain", "simple")
def test_an_ensemble_computes_what_its_steps_compute(door: Door, http: HttpClient) -> None:
    models = ("ensemble_chain", "simple", "ensemble_nested")
    chain, simple, nested = computed(door, models, lambda: infer(HttpBinary(http), ints("ensemble_chain"))).values()
    assert (total(chain), total(nested)) == (total(simple), [0, 0, 0])
    assert [count for count, _ in chain] == [1, 1, 1]
    assert min(total(chain)) > 0
    chain, simple, nested = computed(door, models, lambda: infer(HttpBinary(http), ints("ensemble_nested"))).values()
    assert total(nested) == total(simple)
    assert 0 < total(chain)[1] < total(nested)[1]
    assert [count for count, _ in nested] == [1, 1, 1]


@clause("ensemble.compute")
@needs("ensemble_diamond", "sum_of_two", *SLOW)
def test_steps_side_by_side_are_added_up(door: Door, http: HttpClient) -> None:
    models = ("ensemble_diamond", "sum_of_two", *SLOW)
    diamond, *steps = computed(door, models, lambda: infer(HttpBinary(http), rows(5))).values()
    assert total(diamond) == total(*steps)
    assert all(ns > 0 for step in steps for _, ns in step)


@clause("ensemble.compute")
@needs("ensemble_of_cached", "cached")
def test_a_step_that_the_cache_answers_computes_nothing(door: Door, http: HttpClient) -> None:
    sent = Input("INPUT0", "FP32", np.full((2, 2), time.time_ns() % 2**20 + 0.5, np.float32))  # sent by nobody before
    call = Call("ensemble_of_cached", [sent])
    first, second = (
        computed(door, ("ensemble_of_cached", "cached"), lambda: infer(HttpBinary(http), call)) for _ in range(2)
    )
    assert total(first["ensemble_of_cached"]) == total(first["cached"])
    assert total(first["cached"])[1] > 0
    assert second["cached"] == [(0, 0)] * 3
    assert second["ensemble_of_cached"] == [(1, 0)] * 3


@both
@clause("ensemble.cached")
@needs("ensemble_cached", "simple")
def test_an_ensemble_is_cached_as_a_whole(carrier: Carrier, door: Door) -> None:
    left = np.full((2, 16), time.time_ns() % 2**30, np.int32)  # which nobody has sent before

    def ask() -> list[object]:
        return [infer(carrier, ints("ensemble_cached", left=left))["SUM"].tolist() for _ in range(3)]

    answers: list[list[object]] = []
    counts = moved(door, ("ensemble_cached", "simple"), lambda: answers.extend(ask()))  # type: ignore[arg-type]
    assert answers == [(left + RIGHT).tolist()] * 3
    assert counts == {"ensemble_cached": (3, 2, 1), "simple": (1, 2, 1)}


@clause("ensemble.steps")
@pytest.mark.over("http")
@needs("ensemble_chain", "simple")
def test_a_job_runs_on_an_ensemble_as_on_any_model(target: Target) -> None:
    job = Endpoint(target.http, "ensemble_chain").runsync({"LEFT": [1] * 16, "RIGHT": [2] * 16})
    assert (job["status"], job["output"]) == ("COMPLETED", {"TWICE_LEFT": [2] * 16, "TWICE_RIGHT": [4] * 16})


@clause("ensemble.decoupled")
@pytest.mark.over("http")
def test_each_answer_of_a_decoupled_member_goes_through_the_rest(process: StartServer, tmp_path: Path) -> None:
    make_handler_ensembles(tmp_path / "models")
    server = process([HANDLERS, tmp_path / "models"])
    endpoint = Endpoint(server.http, "ensemble_stream")
    job = endpoint.ended(endpoint.run({"COUNT": ['{"count": 5}']}))
    assert (job["status"], job["output"]) == ("COMPLETED", [{"NUMBER": [str(number)]} for number in range(5)])
    failed = endpoint.ended(endpoint.run({"COUNT": ['{"count": 5, "fail_at": 2}']}))
    assert (failed["status"], "in ensemble 'ensemble_stream', " in failed["error"]) == ("FAILED", True), failed


WHY = {
    "ensemble_missing": "ensemble ensemble_missing contains models that are not available or ambiguous: nowhere, "
    "elsewhere",
    "ensemble_of_broken": "ensemble 'ensemble_of_broken' depends on 'broken' which has no loaded version. "
    "Model 'broken' loading failed with error: ",
    "ensemble_of_that": "ensemble 'ensemble_of_that' depends on 'ensemble_of_broken' which has no loaded version. "
    "Model 'ensemble_of_broken' loading failed with error: ",
    "ensemble_circle_a": "circular dependency between ensembles: ensemble_circle_a -> ensemble_circle_b -> "
    "ensemble_circle_a",
    "ensemble_circle_b": "circular dependency between ensembles: ensemble_circle_b -> ensemble_circle_a -> "
    "ensemble_circle_b",
    "ensemble_version": "ensemble 'ensemble_version' depends on 'simple' whose required version 9 is not loaded.",
    "ensemble_batch": "ensemble ensemble_batch allows maximum batch size 9, but it contains model simple which only "
    "allows maximum batch size to be 8",
    "ensemble_input": "in ensemble ensemble_input, ensemble tensor INPUT0 is mapping to non-existing input INPUT9 in "
    "model simple",
    "ensemble_unmapped": "in ensemble ensemble_unmapped, input INPUT1 in model simple is not mapped to any ensemble "
    "tensors",
    "ensemble_datatype": "in ensemble ensemble_datatype, ensemble tensor INPUT0: inconsistent data type: TYPE_FP32 is "
    "inferred from model ensemble_datatype while TYPE_INT32 is inferred from model simple",
    "ensemble_unwritten": "ensemble output 'OUTPUT9' for ensemble ensemble_unwritten' is not used",
}


@clause("ensemble.refused")
@pytest.mark.parametrize("model", WHY)
def test_an_ensemble_that_cannot_run_is_unavailable_and_says_why(
    broken_door: Door, broken: Running, model: str
) -> None:
    ready = broken_door.model_ready(model)
    assert isinstance(ready, Refusal)
    assert ready.status in ("NOT_FOUND", "UNAVAILABLE")
    assert WHY[model] in broken.log.read_text()
