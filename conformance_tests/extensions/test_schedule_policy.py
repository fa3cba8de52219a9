"""What runs together, in which order, and what is refused meanwhile: dynamic batching and queue policies."""

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from conformance_tests.carriers import (
    Call,
    Carrier,
    GrpcRaw,
    HttpBinary,
    Input,
    Refusal,
    Reply,
    infer,
    infer_message,
    infer_path,
)
from conformance_tests.clause_table import clause
from conformance_tests.doors import Document, HttpDoor, known
from conformance_tests.grpc_wire import GrpcClient, status
from conformance_tests.http_wire import HttpClient, encode
from conformance_tests.models.fixtures import make_batching_fixtures
from conformance_tests.server import StartServer

needs = pytest.mark.needs
both = pytest.mark.parametrize("carrier", ["http-binary", "grpc-raw"], indirect=True)
LIMIT_S = 10.0
FOREVER = 3_600_000.0  # steps of a request that keeps an instance busy: an hour, if nobody ended it
APART = 100.0  # steps of requests whose answers come one after the other
Answer = Reply | Refusal


def rows(model: str, *numbers: float, columns: int = 1, **parameters: int) -> Call:
    """A row of each number, which the model gives back once it has taken as many steps as the largest says."""
    array = np.repeat(np.array(numbers, np.float32)[:, None], columns, axis=1)
    return Call(model, [Input("INPUT0", "FP32", array)], parameters=parameters)


class Crowd:
    """Clients of one model, each waiting for its answer on a thread of its own."""

    def __init__(
        self, carrier: Carrier, model: str, http: HttpClient, gauges: HttpClient, pool: ThreadPoolExecutor
    ) -> None:
        self.carrier = carrier
        self.model = model
        self.answered: list[str] = []  # names, in the order in which answers came
        self._http = http
        self._gauges = gauges
        self._pool = pool
        self._waiting = 0

    def send(self, name: str, call: Call) -> "Future[Answer]":
        def wait() -> Answer:
            answer = self.carrier.send(call)
            self.answered.append(name)
            return answer

        return self._pool.submit(wait)

    @contextlib.contextmanager
    def visitor(self, steps: float) -> Iterator[None]:
        """A client that sends a request, and goes away at the end of the block."""
        tensor = {"name": "INPUT0", "datatype": "FP32", "shape": [1, 1], "data": [steps]}
        body = encode({"inputs": [tensor]})
        with self._http.connect() as connection:
            head = connection.head("POST", infer_path(self.model), {"Content-Length": str(len(body))})
            connection.send(head + body)
            yield

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """A request keeps an instance busy for as long as the block lasts: then its client goes away, which ends it."""
        with self.visitor(FOREVER):
            self.until("penstock_running_requests", 1)
            yield

    def queue(self, name: str, call: Call) -> "Future[Answer]":
        """A request that waits behind all that wait already."""
        future = self.send(name, call)
        self._waiting += 1
        self.until("nv_inference_pending_request_count", self._waiting)
        return future

    def until(self, gauge: str, value: float) -> None:
        limit_s = time.monotonic() + LIMIT_S
        while self.gauge(gauge) != value:
            assert time.monotonic() < limit_s, f"{gauge} is {self.gauge(gauge)}, not {value}"

    def gauge(self, name: str, labels: str = "") -> float:
        text = self._gauges.get("/metrics").body.decode()
        found = re.search(rf'^{name}{{model="{self.model}"{labels},version="1"}} (\S+)$', text, re.MULTILINE)
        assert found, f"{name} of {self.model} is not in the metrics"
        return float(found[1])


@pytest.fixture
def crowd(carrier: Carrier, http: HttpClient, http_metrics: HttpClient) -> Iterator[Callable[[str], Crowd]]:
    with ThreadPoolExecutor(16) as pool:
        yield lambda model: Crowd(carrier, model, http, http_metrics, pool)


def value(future: "Future[Answer]") -> float:
    answer = future.result(LIMIT_S)
    assert isinstance(answer, Reply), answer
    return float(answer["OUTPUT0"].flat[0])


def batches(http: HttpClient, model: str) -> dict[int, int]:
    """How many executions of each size there were."""
    (found,) = known(HttpDoor(http).statistics(model))["model_stats"]
    document: Document = found
    return {int(batch["batch_size"]): int(batch["compute_infer"]["count"]) for batch in document["batch_stats"]}


def more(before: dict[int, int], after: dict[int, int]) -> dict[int, int]:
    return {size: number - before.get(size, 0) for size, number in after.items() if number != before.get(size, 0)}


@both
@clause("schedule_policy.dynamic_batching")
@needs("slow_rows")
def test_what_waits_for_an_instance_runs_together(crowd: Callable[[str], Crowd], http: HttpClient) -> None:
    group = crowd("slow_rows")
    before = batches(http, "slow_rows")
    with group.busy():
        waiting = [group.queue(str(number), rows("slow_rows", number)) for number in range(4)]
    assert [value(future) for future in waiting] == [0, 1, 2, 3]
    assert more(before, batches(http, "slow_rows")) == {4: 1}


@both
@clause("schedule_policy.shapes_apart")
@needs("slow_rows")
def test_requests_of_different_shapes_run_apart_and_none_fails(crowd: Callable[[str], Crowd], http: HttpClient) -> None:
    group = crowd("slow_rows")
    before = batches(http, "slow_rows")
    with group.busy():
        waiting = [
            group.queue(str(number), rows("slow_rows", number, columns=columns))
            for number, columns in enumerate((2, 2, 3, 3, 3))
        ]
    assert [value(future) for future in waiting] == [0, 1, 2, 3, 4]
    assert more(before, batches(http, "slow_rows")) == {2: 1, 3: 1}


@both
@clause("schedule_policy.queue_delay")
@needs("slow_rows_delayed")
def test_a_lone_request_waits_for_the_delay_and_a_full_batch_does_not(carrier: Carrier) -> None:
    delay_s = 1.5
    began_s = time.monotonic()
    infer(carrier, rows("slow_rows_delayed", 0))
    assert delay_s <= time.monotonic() - began_s < LIMIT_S
    began_s = time.monotonic()
    infer(carrier, rows("slow_rows_delayed", *[0] * 8))
    assert time.monotonic() - began_s < delay_s


@both
@clause("schedule_policy.max_queue_size", "statistics.refused")
@needs("slow_rows_limited")
def test_a_full_queue_refuses_at_once_and_counts_nothing(crowd: Callable[[str], Crowd]) -> None:
    group = crowd("slow_rows_limited")

    def failures() -> list[float]:
        family = "nv_inference_request_failure"
        return [group.gauge(family, f',reason="{reason}"') for reason in ("REJECTED", "BACKEND", "OTHER")]

    before = failures()
    with group.busy():
        waiting = [group.queue(str(number), rows(group.model, number)) for number in range(2)]
        assert group.carrier.send(rows(group.model, 2)) == Refusal(
            "UNAVAILABLE", "[request id: <id_unknown>] Exceeds maximum queue size"
        )
        assert group.gauge("nv_inference_pending_request_count") == 2
    assert [value(future) for future in waiting] == [0, 1]
    assert failures() == before


@clause("schedule_policy.retry_after")
@needs("slow_rows_limited")
def test_a_full_queue_says_when_to_try_again(http: HttpClient, http_metrics: HttpClient) -> None:
    model = "slow_rows_limited"
    body = {"inputs": [{"name": "INPUT0", "datatype": "FP32", "shape": [1, 1], "data": [1]}]}
    with ThreadPoolExecutor(4) as pool:
        group = Crowd(HttpBinary(http), model, http, http_metrics, pool)
        with group.busy():
            waiting = [group.queue(str(number), rows(model, number)) for number in range(2)]
            answer = http.post(infer_path(model), body)
        for future in waiting:
            value(future)
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")


EXPIRED = Refusal("UNAVAILABLE", "Request timeout expired")


@both
@clause("schedule_policy.timeout", "schedule_policy.timeout_override")
@needs("slow_rows_hurried")
def test_what_has_waited_too_long_is_refused_while_the_instance_is_busy(crowd: Callable[[str], Crowd]) -> None:
    group = crowd("slow_rows_hurried")
    before = group.gauge("nv_inference_request_failure", ',reason="REJECTED"')
    with group.busy():
        for call in (rows(group.model, 0), rows(group.model, 0, timeout=60_000_000)):  # which does not lengthen it
            assert group.carrier.send(call) == EXPIRED
    assert group.gauge("nv_inference_request_failure", ',reason="REJECTED"') == before + 2


@both
@clause("schedule_policy.timeout_override")
@needs("slow_rows_shortened", "slow_rows")
def test_a_request_may_shorten_its_timeout_where_there_is_one(crowd: Callable[[str], Crowd]) -> None:
    group = crowd("slow_rows_shortened")
    with group.busy():
        assert group.carrier.send(rows(group.model, 0, timeout=1)) == EXPIRED
    plain = crowd("slow_rows")
    with plain.busy():
        waits = plain.queue("waits", rows("slow_rows", 3, timeout=1))
    assert value(waits) == 3


@both
@clause("schedule_policy.timeout", "schedule_policy.timeout_override")
@needs("slow_rows_patient")
def test_what_has_waited_too_long_goes_behind_the_others_where_the_policy_says_so(
    crowd: Callable[[str], Crowd],
) -> None:
    group = crowd("slow_rows_patient")
    with group.busy():
        late = group.queue("late", rows(group.model, APART, timeout=1))
        timely = group.queue("timely", rows(group.model, APART))
    assert [value(late), value(timely)] == [APART, APART]
    assert group.answered == ["timely", "late"]


@both
@clause("schedule_policy.priority")
@needs("slow_rows_by_priority")
def test_higher_priorities_go_first(crowd: Callable[[str], Crowd]) -> None:
    group = crowd("slow_rows_by_priority")
    priorities: dict[str, dict[str, int]] = {
        "low": {"priority": 2},
        "default": {},
        "unknown": {"priority": 9},
        "high": {"priority": 1},
    }
    with group.busy():
        waiting = [group.queue(name, rows(group.model, APART, **parameters)) for name, parameters in priorities.items()]
    for future in waiting:
        value(future)
    assert group.answered == ["high", "low", "default", "unknown"]


@both
@clause("schedule_policy.preserve_ordering")
@needs("slow_rows_in_order")
def test_answers_leave_in_the_order_of_their_requests(crowd: Callable[[str], Crowd], http: HttpClient) -> None:
    group = crowd("slow_rows_in_order")
    before = batches(http, group.model)
    with group.busy():
        quick = group.send("quick", rows(group.model, 0))
        limit_s = time.monotonic() + LIMIT_S
        while batches(http, group.model) == before:  # until the other instance, which is free, has run it
            assert time.monotonic() < limit_s
        group.until("penstock_running_requests", 1)
        assert not quick.done()
    assert value(quick) == 0


@both
@clause("schedule_policy.split_oversized")
@needs("slow_rows_split", "slow_rows")
def test_a_request_larger_than_a_batch_is_split_where_the_model_says_so(carrier: Carrier, http: HttpClient) -> None:
    before = batches(http, "slow_rows_split")
    reply = infer(carrier, rows("slow_rows_split", *range(10), columns=2))
    assert reply["OUTPUT0"].tolist() == [[number, number] for number in range(10)]
    assert more(before, batches(http, "slow_rows_split")) == {4: 2, 2: 1}
    refused = carrier.send(rows("slow_rows", *range(10)))
    assert refused == Refusal(
        "INVALID_ARGUMENT",
        "[request id: <id_unknown>] inference request batch-size must be <= 8 for 'slow_rows'",
    )


@clause("schedule_policy.cancel_running")
@pytest.mark.over("http")
@needs("slow_rows_limited")
def test_a_client_that_goes_away_ends_its_run_and_what_it_has_waiting(
    http: HttpClient, http_metrics: HttpClient
) -> None:
    with ThreadPoolExecutor(1) as pool:
        group = Crowd(HttpBinary(http), "slow_rows_limited", http, http_metrics, pool)
        with group.busy():
            with group.busy():  # which does not run: there is one instance
                group.until("nv_inference_pending_request_count", 1)
            group.until("nv_inference_pending_request_count", 0)
            assert group.gauge("penstock_running_requests") == 1
        group.until("penstock_running_requests", 0)
        assert value(group.send("next", rows(group.model, 1))) == 1


@clause("batches.fails_alone")
@pytest.mark.over("http")
@needs("slow_rows")
def test_a_client_that_goes_away_costs_no_other_of_its_batch_an_answer(
    http: HttpClient, http_metrics: HttpClient
) -> None:
    with ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as visit:
        group = Crowd(HttpBinary(http), "slow_rows", http, http_metrics, pool)
        before = batches(http, group.model)
        with group.busy():
            visit.enter_context(group.visitor(APART))
            group.until("nv_inference_pending_request_count", 1)
            stays = group.send("stays", rows(group.model, 3 * APART))
            group.until("nv_inference_pending_request_count", 2)
        group.until("nv_inference_pending_request_count", 0)
        visit.close()  # while both run
        assert value(stays) == 3 * APART
        assert more(before, batches(http, group.model)) == {2: 1}


@clause("schedule_policy.cancel_running")
@pytest.mark.over("grpc")
@needs("slow_rows_limited")
def test_a_deadline_ends_a_run_and_what_waits(grpc: GrpcClient, http: HttpClient, http_metrics: HttpClient) -> None:
    model = "slow_rows_limited"
    message = infer_message(Call(model, []))
    message.inputs.add(name="INPUT0", datatype="FP32", shape=[1, 1])
    message.raw_input_contents.append(np.array([[FOREVER]], np.float32).tobytes())
    with ThreadPoolExecutor(3) as pool:
        group = Crowd(GrpcRaw(grpc), model, http, http_metrics, pool)
        before = group.gauge("nv_inference_request_failure", ',reason="CANCELED"')
        calls = [pool.submit(grpc.stub.ModelInfer, message, timeout=1.0) for _ in range(2)]
        assert {status(call.exception(LIMIT_S)) for call in calls} == {"DEADLINE_EXCEEDED"}
        group.until("penstock_running_requests", 0)
        group.until("nv_inference_pending_request_count", 0)
        assert value(group.send("next", rows(model, 1))) == 1
        assert group.gauge("nv_inference_request_failure", ',reason="CANCELED"') > before


@clause("schedule_policy.rate_limiter")
@pytest.mark.over("http", "grpc")
def test_instances_that_share_a_resource_run_one_after_the_other(process: StartServer, tmp_path: Path) -> None:
    names = ("slow_rows_sharing", "slow_rows_sharing_too")
    models = tmp_path / "models"
    make_batching_fixtures(models, *names)
    running = process([models], "--rate-limit", "execution_count")
    gauges = HttpClient(running.metrics)
    grpc = GrpcClient(running.grpc)
    with contextlib.closing(grpc), ThreadPoolExecutor(2) as pool:
        http = HttpClient(running.http)
        first = Crowd(HttpBinary(http), names[0], http, gauges, pool)
        second = Crowd(GrpcRaw(grpc), names[1], http, gauges, pool)
        with first.busy():
            waits = second.queue("waits", rows(names[1], 7))
            assert second.gauge("penstock_running_requests") == 0
        assert value(waits) == 7
