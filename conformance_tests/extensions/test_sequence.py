"""Sequences of stateful models: what the model is told, which state it gets, and who waits for whom."""

import contextlib
import itertools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest

from conformance_tests.carriers import (
    Call,
    Carrier,
    HttpBinary,
    Input,
    Refusal,
    Reply,
    infer,
    infer_message,
    infer_path,
    refusal,
)
from conformance_tests.clause_table import clause
from conformance_tests.doors import Door, HttpDoor, known
from conformance_tests.grpc_wire import GrpcClient, status
from conformance_tests.http_wire import HttpClient, encode
from conformance_tests.tensors import DATATYPES

needs = pytest.mark.needs
both = pytest.mark.parametrize("carrier", ["http-binary", "grpc-raw"], indirect=True)
LIMIT_S = 10.0
FOREVER = 3_600_000.0  # steps of a request that keeps the instance busy: an hour, if nobody ended it
IDS = itertools.count(1)  # a server that runs may have been asked before, but not by this process
FIRST_ID = time.time_ns() % 2**40 * 1000

Id = int | str
Answer = Reply | Refusal


def fresh() -> int:
    """An id that no sequence has."""
    return FIRST_ID + next(IDS)


def call(model: str, id: Id, number: float, flags: str = "", datatype: str = "INT32", **parameters: int) -> Call:
    """One request of a sequence; `flags` are S for its first, E for its last."""
    placed = {"sequence_id": id, "sequence_start": "S" in flags, "sequence_end": "E" in flags, **parameters}
    array = np.array([[number]], DATATYPES[datatype].dtype)
    return Call(model, [Input("INPUT", datatype, array)], parameters=placed)


class Flow:
    """One sequence, which has an end however its test ends."""

    def __init__(self, carrier: Carrier, model: str, id: Id | None = None, datatype: str = "INT32") -> None:
        self.id = fresh() if id is None else id
        self._carrier = carrier
        self._model = model
        self._datatype = datatype
        self._lives = False

    def __enter__(self) -> "Flow":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._lives:
            self.send(0, "E")

    def send(self, number: float, flags: str = "") -> Reply:
        answer = infer(self._carrier, call(self._model, self.id, number, flags, self._datatype))
        self._lives = "E" not in flags
        return answer

    def sum(self, number: int, flags: str = "") -> int:
        return int(self.send(number, flags)["OUTPUT"].item())


def not_started(model: str, id: Id) -> Refusal:
    return Refusal(
        "INVALID_ARGUMENT",
        f"inference request for sequence {id} to model '{model}' must specify the START flag on the first request of "
        "the sequence",
    )


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


@pytest.fixture
def gauge(http_metrics: HttpClient) -> Callable[[str, str], float]:
    def gauge(name: str, model: str) -> float:
        text = http_metrics.get("/metrics").body.decode()
        found = re.search(rf'^{name}{{model="{model}",version="1"}} (\S+)$', text, re.MULTILINE)
        assert found, f"{name} of {model} is not in the metrics"
        return float(found[1])

    return gauge


def until(condition: Callable[[], bool], what: str) -> None:
    limit_s = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < limit_s, f"{what} did not come to pass"


# -- what the model is told

TOLD: list[tuple[str, float, float, str, Id]] = [
    ("sequence_controls_int32", 0, 1, "INT64", 7),
    ("sequence_controls_fp32", -0.5, 2, "INT32", 7),
    ("sequence_controls_bool", False, True, "BYTES", "seven"),
    ("sequence_controls_uint64", True, False, "UINT64", 2**63 - 1),
    ("sequence_controls_alone", 7, 8, "UINT32", 2**32 - 1),
]


@pytest.mark.parametrize(("model", "no", "yes", "datatype", "id"), TOLD, ids=[model for model, *_ in TOLD])
@both
@clause("sequence.controls")
@needs(*(model for model, *_ in TOLD))
def test_start_end_ready_and_id_reach_the_model(
    carrier: Carrier, model: str, no: float, yes: float, datatype: str, id: Id
) -> None:
    shape = [1] if model == "sequence_controls_alone" else [1, 1]
    for flags in ("S", "", "E"):
        placed: dict[str, bool | int | str] = {"sequence_id": id, "sequence_start": "S" in flags}
        placed["sequence_end"] = "E" in flags
        reply = infer(carrier, Call(model, [Input("INPUT", "FP32", np.ones(shape, np.float32))], parameters=placed))
        told = {name: reply[name].item() for name in ("STARTED", "ENDED", "BEING", "ID")}
        assert told == {
            "STARTED": yes if flags == "S" else no,
            "ENDED": yes if flags == "E" else no,
            "BEING": yes,
            "ID": id.encode() if isinstance(id, str) else id,
        }
        (kind,) = (output.datatype for output in reply.outputs if output.name == "ID")
        assert kind == datatype


@clause("sequence.hidden")
@needs("sequence_sum", "sequence_controls_bool")
def test_controls_and_state_are_no_tensors_of_a_client(door: Door) -> None:
    shown = known(door.metadata("sequence_sum"))
    assert [tensor["name"] for tensor in (*shown["inputs"], *shown["outputs"])] == ["INPUT", "OUTPUT"]
    shown = known(door.metadata("sequence_controls_bool"))
    assert [tensor["name"] for tensor in shown["inputs"]] == ["INPUT"]


# -- what is refused


@both
@clause("sequence.start_required")
@needs("sequence_sum")
def test_a_sequence_begins_with_a_start_and_is_unknown_after_its_end(carrier: Carrier) -> None:
    with Flow(carrier, "sequence_sum") as flow:
        assert refusal(carrier, call("sequence_sum", flow.id, 1)) == not_started("sequence_sum", flow.id)
        flow.sum(1, "S")
        flow.sum(1, "E")
        for flags in ("", "E"):
            assert refusal(carrier, call("sequence_sum", flow.id, 1, flags)) == not_started("sequence_sum", flow.id)


@pytest.mark.parametrize("parameters", [{}, {"sequence_id": 0, "sequence_start": True}, {"sequence_id": ""}])
@both
@clause("sequence.id_required")
@needs("sequence_sum")
def test_a_request_without_an_id_is_refused(carrier: Carrier, parameters: dict[str, int | str]) -> None:
    array = np.ones((1, 1), np.int32)
    refused = refusal(carrier, Call("sequence_sum", [Input("INPUT", "INT32", array)], parameters=parameters))
    text = "inference request to model 'sequence_sum' must specify a non-zero or non-empty correlation ID"
    assert refused == Refusal("INVALID_ARGUMENT", text)


@both
@clause("sequence.batch_one")
@needs("sequence_sum")
def test_a_request_of_two_rows_is_refused(carrier: Carrier) -> None:
    placed = {"sequence_id": fresh(), "sequence_start": True, "sequence_end": True}
    tensor = Input("INPUT", "INT32", np.ones((2, 1), np.int32))
    refused = refusal(carrier, Call("sequence_sum", [tensor], parameters=placed))
    text = "inference request to model 'sequence_sum' must specify batch-size 1 due to requirements of sequence batcher"
    assert refused == Refusal("INVALID_ARGUMENT", text)


@both
@clause("sequence.id_type")
@needs("sequence_controls_bool", "sequence_controls_int32")
def test_an_id_of_another_type_than_the_control_is_refused(carrier: Carrier) -> None:
    text = (
        "[request id: <id_unknown>] sequence batching control 'CORRID' data-type is '{}', but model '{}' expects '{}'"
    )
    number = refusal(carrier, call("sequence_controls_bool", fresh(), 1, "SE", "FP32"))
    assert number == Refusal("INVALID_ARGUMENT", text.format("UINT64", "sequence_controls_bool", "BYTES"))
    word = refusal(carrier, call("sequence_controls_int32", "word", 1, "SE", "FP32"))
    assert word == Refusal("INVALID_ARGUMENT", text.format("BYTES", "sequence_controls_int32", "INT64"))


# -- state


@pytest.mark.parametrize("model", ["sequence_sum", "sequence_sum_oldest"])
@both
@clause("sequence.state")
@needs("sequence_sum", "sequence_sum_oldest")
def test_two_interleaved_sequences_have_each_its_own_sum(carrier: Carrier, model: str) -> None:
    with Flow(carrier, model) as up, Flow(carrier, model) as down:
        sums = [(up.sum(number, flags), down.sum(-number, flags)) for number, flags in ((1, "S"), (2, ""), (3, "E"))]
    assert sums == [(1, -1), (3, -3), (6, -6)]


@both
@clause("sequence.string_ids")
@needs("sequence_sum")
def test_texts_and_numbers_are_different_ids(carrier: Carrier) -> None:
    number = fresh()
    with Flow(carrier, "sequence_sum", number) as one, Flow(carrier, "sequence_sum", str(number)) as other:
        assert (one.sum(1, "S"), other.sum(10, "S"), one.sum(1, "E"), other.sum(10, "E")) == (1, 10, 2, 20)


@both
@clause("sequence.restart")
@needs("sequence_sum")
def test_a_start_on_a_live_id_begins_anew(carrier: Carrier) -> None:
    with Flow(carrier, "sequence_sum") as flow:
        assert [flow.sum(5, flags) for flags in ("S", "", "S", "E")] == [5, 10, 5, 10]


@both
@clause("sequence.initial_state")
@needs("sequence_sum_from_100")
def test_the_first_state_comes_from_its_file_and_is_an_output_where_it_is_listed(carrier: Carrier) -> None:
    with Flow(carrier, "sequence_sum_from_100") as flow:
        for number, flags, total in ((1, "S", 101), (2, "", 103), (3, "S", 103), (1, "E", 104)):
            reply = flow.send(number, flags)
            assert (reply["OUTPUT"].item(), reply["NEXT_SUM"].item()) == (total, total)


# -- slots


@both
@clause("sequence.direct")
@needs("sequence_controls_int32")
def test_directly_a_sequence_keeps_its_row(carrier: Carrier) -> None:
    model = "sequence_controls_int32"

    def place(flow: Flow, flags: str = "") -> tuple[int, int]:
        reply = flow.send(1, flags)
        return int(reply["ROW"].item()), int(reply["ROWS"].item())

    with contextlib.ExitStack() as flows:
        first, second, third, fourth = (flows.enter_context(Flow(carrier, model, datatype="FP32")) for _ in range(4))
        assert [place(flow, "S") for flow in (first, second, third)] == [(0, 1), (1, 2), (2, 3)]
        assert place(second, "E") == (1, 2)
        assert [place(flow) for flow in (third, first)] == [(2, 3), (0, 1)]
        assert place(fourth, "S") == (1, 2)


class Busy:
    """The instance of `sequence_slow`, kept busy by a sequence of its own."""

    def __init__(self, http: HttpClient, gauge: Callable[[str, str], float]) -> None:
        self.id = fresh()
        self._http = http
        self._gauge = gauge
        self._waiting = 0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """For as long as the block lasts: then its client goes away, which ends the run and the sequence."""
        tensor = {"name": "INPUT", "datatype": "FP32", "shape": [1, 1], "data": [FOREVER]}
        body = encode({"inputs": [tensor], "parameters": {"sequence_id": self.id, "sequence_start": True}})
        with self._http.connect() as connection:
            head = connection.head("POST", infer_path("sequence_slow"), {"Content-Length": str(len(body))})
            connection.send(head + body)
            self.until("penstock_running_requests", 1)
            yield

    def queue(self, pool: ThreadPoolExecutor, carrier: Carrier, sent: Call) -> "Future[Answer]":
        """A request that waits behind all that wait already."""
        future = pool.submit(carrier.send, sent)
        self._waiting += 1
        self.until("nv_inference_pending_request_count", self._waiting)
        return future

    def until(self, name: str, value: float) -> None:
        until(lambda: self._gauge(name, "sequence_slow") == value, f"{name} {value}")


@pytest.fixture
def busy(http: HttpClient, gauge: Callable[[str, str], float]) -> Busy:
    return Busy(http, gauge)


def slow(id: Id, number: float, flags: str = "") -> Call:
    return call("sequence_slow", id, number, flags, "FP32")


def sums(futures: Sequence["Future[Answer]"]) -> list[float]:
    found = []
    for future in futures:
        answer = future.result(LIMIT_S)
        assert isinstance(answer, Reply), answer
        found.append(float(answer["OUTPUT"].item()))
    return found


def batches(http: HttpClient) -> dict[int, int]:
    """How many executions of each size there were."""
    (found,) = known(HttpDoor(http).statistics("sequence_slow"))["model_stats"]
    return {int(batch["batch_size"]): int(batch["compute_infer"]["count"]) for batch in found["batch_stats"]}


@both
@clause("sequence.oldest")
@needs("sequence_slow")
def test_by_the_oldest_requests_of_different_sequences_share_a_batch(
    carrier: Carrier, http: HttpClient, busy: Busy, pool: ThreadPoolExecutor
) -> None:
    before = batches(http)
    with busy.running():
        waiting = [busy.queue(pool, carrier, slow(fresh(), number, "SE")) for number in (1, 2, 3)]
    assert sums(waiting) == [1, 2, 3]
    assert batches(http) == before | {3: before.get(3, 0) + 1}


@both
@clause("sequence.order")
@needs("sequence_slow")
def test_requests_of_a_sequence_run_one_by_one_in_their_order(
    carrier: Carrier, http: HttpClient, busy: Busy, pool: ThreadPoolExecutor
) -> None:
    id, before = fresh(), batches(http)
    with busy.running():
        placed = ((1, "S"), (20, ""), (3, ""), (4, "E"))
        waiting = [busy.queue(pool, carrier, slow(id, number, flags)) for number, flags in placed]
    assert sums(waiting) == [1, 21, 24, 28]
    assert batches(http) == before | {1: before.get(1, 0) + 4}


@both
@clause("sequence.backlog", "sequence.backlog_timeout")
@needs("sequence_sum_one_slot")
def test_without_a_free_slot_a_sequence_waits_until_there_is_one_or_its_timeout_is_over(
    carrier: Carrier, pool: ThreadPoolExecutor, gauge: Callable[[str, str], float]
) -> None:
    model = "sequence_sum_one_slot"
    with Flow(carrier, model) as flow:
        flow.sum(1, "S")
        next_id, late_id = fresh(), fresh()
        waits = [pool.submit(carrier.send, call(model, next_id, 10, "S"))]
        until(lambda: gauge("nv_inference_pending_request_count", model) == 1, "a sequence that waits")
        waits.append(pool.submit(carrier.send, call(model, next_id, 10, "E")))
        until(lambda: gauge("nv_inference_pending_request_count", model) == 2, "its second request")
        late = refusal(carrier, call(model, late_id, 1, "S", timeout=1000))
        assert late == Refusal("UNAVAILABLE", "timeout of the corresponding sequence has been expired")
        assert [future.done() for future in waits] == [False, False]
        assert flow.sum(1, "E") == 2
    assert sums(waits) == [10, 20]


@both
@clause("sequence.idle")
@needs("sequence_sum_brief")
def test_an_idle_sequence_loses_its_slot_to_one_that_waits(carrier: Carrier) -> None:
    with Flow(carrier, "sequence_sum_brief") as flow:
        gone = fresh()
        infer(carrier, call("sequence_sum_brief", gone, 1, "S"))
        began_s = time.monotonic()
        assert flow.sum(5, "SE") == 5
        assert 0.2 < time.monotonic() - began_s < LIMIT_S
        assert refusal(carrier, call("sequence_sum_brief", gone, 1)) == not_started("sequence_sum_brief", gone)


# -- cancelling


@clause("sequence.cancel")
@pytest.mark.over("http")
@needs("sequence_slow")
def test_a_client_that_goes_away_ends_its_sequence(http: HttpClient, busy: Busy, pool: ThreadPoolExecutor) -> None:
    carrier = HttpBinary(http)
    with busy.running():
        waits = busy.queue(pool, carrier, slow(busy.id, 1))
    assert waits.result(LIMIT_S) == Refusal(
        "CANCELLED", f"a request of sequence {busy.id} was dropped, which ends the sequence"
    )
    assert refusal(carrier, slow(busy.id, 1)) == not_started("sequence_slow", busy.id)


@clause("sequence.cancel")
@pytest.mark.over("grpc")
@needs("sequence_slow")
def test_a_cancelled_call_ends_its_sequence(grpc: GrpcClient, busy: Busy) -> None:
    id = fresh()

    def message(flags: str) -> object:
        sent = slow(id, 1, flags)
        made = infer_message(sent)
        made.raw_input_contents.append(np.array([[1]], np.float32).tobytes())
        return made

    with busy.running():
        calls = []
        for number, flags in enumerate(("S", "", "E")):
            calls.append(grpc.stub.ModelInfer.future(message(flags), timeout=LIMIT_S))
            busy.until("nv_inference_pending_request_count", number + 1)
        calls[1].cancel()
        assert {status(waits.exception()) for waits in (calls[0], calls[2])} == {"CANCELLED"}
        busy.until("nv_inference_pending_request_count", 0)
