"""Requests that share an execution though more than their rows differ, and why each batch left."""

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from conformance_tests.carriers import Call, Carrier, Input, Refusal, Reply
from conformance_tests.clause_table import clause
from conformance_tests.doors import HttpDoor, known
from conformance_tests.http_wire import HttpClient

needs = pytest.mark.needs
both = pytest.mark.parametrize("carrier", ["http-binary", "grpc-raw"], indirect=True)
LIMIT_S = 30.0
REASONS = ("preferred", "full", "shape", "idle", "delay", "deadline")


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as made:
        yield made


def floats(**inputs: list[Any]) -> list[Input]:
    return [Input(name, "FP32", np.array(values, np.float32)) for name, values in inputs.items()]


def picks(model: str, *indices: int, **parameters: int) -> Call:
    return Call(model, [Input("INPUT0", "INT64", np.array([indices], np.int64))], parameters=parameters)


def together(carrier: Carrier, http: HttpClient, pool: ThreadPoolExecutor, *calls: Call) -> list[Reply | Refusal]:
    """The answers to calls that are sent at once, and that must have shared one execution."""
    before = executions(http, calls[0].model)
    answers = list(pool.map(carrier.send, calls, timeout=LIMIT_S))
    assert executions(http, calls[0].model) == before + 1
    return answers


def executions(http: HttpClient, model: str) -> int:
    (found,) = known(HttpDoor(http).statistics(model))["model_stats"]
    return int(found["execution_count"])


def outputs(answers: list[Reply | Refusal]) -> list[dict[str, Any]]:
    got = []
    for answer in answers:
        assert isinstance(answer, Reply), answer
        got.append({output.name: output.array.tolist() for output in answer.outputs})
    return got


def series(gauges: HttpClient, name: str, model: str, label: str) -> dict[str, float]:
    text = gauges.get("/metrics").body.decode()
    pattern = rf'^{name}{{(?=[^}}]*model="{model}")[^}}]*\b{label}="(\w+)"[^}}]*}} (\S+)$'
    return {value: float(number) for value, number in re.findall(pattern, text, re.MULTILINE)}


@both
@clause("batches.ragged", "batches.batch_input", "batches.batch_output")
@needs("ragged_sums")
def test_ragged_requests_run_as_one_and_each_gets_its_own(
    carrier: Carrier, http: HttpClient, pool: ThreadPoolExecutor
) -> None:
    calls = [Call("ragged_sums", floats(INPUT0=[values])) for values in ([1, 2, 3], [4])]
    assert outputs(together(carrier, http, pool, *calls)) == [
        {"OUTPUT0": [[2, 4, 6]], "SUM": [[6]]},
        {"OUTPUT0": [[8]], "SUM": [[4]]},
    ]


@both
@clause("batches.padding")
@needs("padded_rows")
def test_padded_requests_run_as_one_and_outputs_have_their_own_length(
    carrier: Carrier, http: HttpClient, pool: ThreadPoolExecutor
) -> None:
    calls = [
        Call("padded_rows", floats(INPUT0=[values], MASK=[[1] * len(values)])) for values in ([1, 2, 3], [4], [5, 6])
    ]
    assert outputs(together(carrier, http, pool, *calls[:2])) == [
        {"OUTPUT0": [[2, 4, 6]], "SUM": [[6]]},
        {"OUTPUT0": [[8]], "SUM": [[4]]},
    ]
    assert outputs([carrier.send(calls[2])]) == [{"OUTPUT0": [[10, 12]], "SUM": [[11]]}]


@both
@clause("batches.padded_share")
@needs("padded_rows")
def test_the_share_of_padding_is_counted(
    carrier: Carrier, http: HttpClient, http_metrics: HttpClient, pool: ThreadPoolExecutor
) -> None:
    before = series(http_metrics, "penstock_padded_elements_total", "padded_rows", "of")
    calls = [Call("padded_rows", floats(INPUT0=[values], MASK=[[1] * len(values)])) for values in ([1, 2, 3], [4])]
    together(carrier, http, pool, *calls)
    after = series(http_metrics, "penstock_padded_elements_total", "padded_rows", "of")
    assert {what: after[what] - before[what] for what in after} == {"data": 8, "padding": 4}


@both
@clause("batches.optional")
@needs("optional_rows")
def test_an_optional_input_may_be_left_out_of_a_batch(
    carrier: Carrier, http: HttpClient, pool: ThreadPoolExecutor
) -> None:
    without = [Call("optional_rows", floats(INPUT0=[[number, number]])) for number in (1, 2)]
    assert outputs(together(carrier, http, pool, *without)) == [{"OUTPUT0": [[11, 21]]}, {"OUTPUT0": [[12, 22]]}]
    having = [Call("optional_rows", floats(INPUT0=[[number, number]], BIAS=[[5, 6]])) for number in (1, 2)]
    assert outputs(together(carrier, http, pool, *having)) == [{"OUTPUT0": [[6, 7]]}, {"OUTPUT0": [[7, 8]]}]


@both
@clause("batches.optional")
@needs("optional_rows")
def test_requests_with_and_without_an_optional_input_run_apart(
    carrier: Carrier, http: HttpClient, pool: ThreadPoolExecutor
) -> None:
    before = executions(http, "optional_rows")
    mixed = [floats(INPUT0=[[1, 1]]), floats(INPUT0=[[2, 2]], BIAS=[[5, 6]])]
    answers = list(pool.map(carrier.send, [Call("optional_rows", inputs) for inputs in mixed], timeout=LIMIT_S))
    assert outputs(answers) == [{"OUTPUT0": [[11, 21]]}, {"OUTPUT0": [[7, 8]]}]
    assert executions(http, "optional_rows") == before + 2


@both
@clause("batches.reshape")
@needs("reshaped_rows")
def test_a_batch_is_reshaped_row_by_row(carrier: Carrier, http: HttpClient, pool: ThreadPoolExecutor) -> None:
    values = ([[[1, 2], [3, 4]]], [[[5, 6], [7, 8]]])
    calls = [Call("reshaped_rows", floats(INPUT0=value)) for value in values]
    assert outputs(together(carrier, http, pool, *calls)) == [{"OUTPUT0": value} for value in values]


@both
@clause("batches.fails_alone")
@needs("picking_rows")
def test_a_request_that_fails_in_a_batch_fails_alone(
    carrier: Carrier, http_metrics: HttpClient, pool: ThreadPoolExecutor
) -> None:
    before = series(http_metrics, "penstock_batches_total", "picking_rows", "reason")
    calls = [picks("picking_rows", 3), picks("picking_rows", 99)]
    good, bad = pool.map(carrier.send, calls, timeout=LIMIT_S)
    after = series(http_metrics, "penstock_batches_total", "picking_rows", "reason")
    assert after == before | {"preferred": before["preferred"] + 1}  # they were one batch
    assert outputs([good]) == [{"OUTPUT0": [[40]]}]
    assert isinstance(bad, Refusal)
    assert (bad.status, "indices element out of data bounds" in bad.text) == ("INVALID_ARGUMENT", True)


def two_rows(model: str) -> Call:
    return Call(model, [Input("INPUT0", "INT64", np.array([[1], [2]], np.int64))])


def four_rows(model: str) -> Call:
    return Call(model, [Input("INPUT0", "INT64", np.array([[0], [1], [2], [3]], np.int64))])


@both
@pytest.mark.parametrize(
    ("reason", "calls"),
    [
        ("preferred", [two_rows("picking_rows")]),
        ("full", [four_rows("picking_rows")]),
        ("shape", [picks("picking_rows", 1), picks("picking_rows", 1, 2)]),
        ("delay", [picks("picking_rows", 1)]),
        ("deadline", [picks("hurried_rows", 1, timeout=200_000)]),
        ("idle", [Call("slow_rows", floats(INPUT0=[[0]]))]),
    ],
)
@clause("batches.departures")
@needs("picking_rows", "hurried_rows", "slow_rows")
def test_why_a_batch_left_is_counted(
    carrier: Carrier, http_metrics: HttpClient, pool: ThreadPoolExecutor, reason: str, calls: list[Call]
) -> None:
    before = series(http_metrics, "penstock_batches_total", calls[0].model, "reason")
    assert set(before) == set(REASONS)
    limit_s = time.monotonic() + LIMIT_S
    while True:
        list(pool.map(carrier.send, calls, timeout=LIMIT_S))
        after = series(http_metrics, "penstock_batches_total", calls[0].model, "reason")
        if after[reason] > before[reason]:
            return
        # A machine so busy that a worker wakes after a deadline refuses the request instead of running it.
        assert reason == "deadline", after
        assert time.monotonic() < limit_s, after
