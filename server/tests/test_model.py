"""A version runs requests, counts them, and finds out whether it is short enough to run inline."""

import threading
import time
from collections.abc import Sequence

import numpy as np
import pytest
from msgspec.structs import replace
from penstock import messages
from penstock.cache import ResponseCache
from penstock.errors import Kind, ServingError
from penstock.instances import INLINE_LIMIT_NS
from penstock.members import Called
from penstock.messages import InferRequest, InferResponse, Phases, RequestedOutput
from penstock.model import INLINE_CALLS, PROBE_BYTES, Model
from penstock.rate import RateLimiter, parse
from penstock.runtime import Cancelled, Credit, Reply
from penstock.statistics import Duration, Padded
from penstock.tensor import BYTES, FP32, Tensor, objects

from .fakes import (
    LIMIT_S,
    PLAIN,
    Answers,
    CallingInstance,
    EchoInstance,
    GatedInstance,
    Result,
    ScriptedInstance,
    StreamingInstance,
    calling,
    configuration,
    loaded,
    model,
    pending,
    request,
)

GONE = ServingError(Kind.CANCELLED, "gone")
TEXT = """
    name: "m" backend: "fake" max_batch_size: 4
    input { name: "X" data_type: TYPE_STRING dims: -1 }
    output { name: "Y" data_type: TYPE_FP32 dims: -1 }
"""


def close(made: Model) -> None:
    assert made.drain(LIMIT_S)
    made.close()


def ask(made: Model, sent: InferRequest) -> Answers:
    answers = Answers()
    made.submit(pending(sent, answers))
    return answers


def test_a_request_is_answered_and_counted() -> None:
    made = model(EchoInstance(3))
    assert ask(made, request(1, 2)).values() == [3, 6]
    close(made)
    counts = made.statistics
    assert (counts.success.count, counts.inference_count, counts.execution_count) == (1, 1, 1)
    assert counts.success.ns >= counts.compute_infer.ns + counts.queue.ns > 0


def test_the_answer_names_the_version_that_ran() -> None:
    made = model()
    answer = ask(made, request()).one()
    close(made)
    assert isinstance(answer, InferResponse)
    assert answer.version == "1"


def test_rows_are_what_is_counted_as_inferences() -> None:
    made = model()
    sent = request(1)
    sent.rows = 5
    ask(made, sent).one()
    close(made)
    assert (made.statistics.inference_count, list(made.statistics.batches)) == (5, [5])


def test_a_failure_is_counted_as_the_backends() -> None:
    def script(batch: Sequence[InferRequest]) -> Sequence[Result]:
        raise RuntimeError("no luck")

    made = model(ScriptedInstance(script))
    assert ask(made, request()).error().kind is Kind.INTERNAL
    close(made)
    assert (made.statistics.fail.count, made.statistics.failures["BACKEND"]) == (1, 1)
    assert made.statistics.fail.ns > 0
    assert made.statistics.success == Duration()


def test_what_is_cancelled_while_it_runs_is_counted_as_that_and_not_as_the_backends() -> None:
    def script(_sent: InferRequest, reply: Reply, cancelled: Cancelled) -> None:
        def give_up() -> None:
            reply(GONE)

        cancelled.watch(give_up)

    instance = StreamingInstance(script=script)
    made = model(instance)
    one = pending(request(), answers := Answers())
    made.submit(one)
    instance.wait_started(1)
    one.cancel(GONE)
    assert answers.error() is GONE
    close(made)
    assert made.statistics.failures == {"REJECTED": 0, "CANCELED": 1, "BACKEND": 0, "OTHER": 0}
    assert made.statistics.fail.count == 1


@pytest.mark.parametrize(
    ("reason", "counted_as"),
    [
        (GONE, "CANCELED"),
        (ServingError(Kind.DEADLINE, "too late"), "CANCELED"),
        (ServingError(Kind.TIMED_OUT, "too long in the queue"), "REJECTED"),
        (ServingError(Kind.UNAVAILABLE, "no more"), "OTHER"),
    ],
)
def test_what_does_not_run_is_counted_by_its_reason(reason: ServingError, counted_as: str) -> None:
    instance = GatedInstance()
    made = model(instance)
    running = ask(made, request())
    instance.wait_begun()
    one = pending(request(), answers := Answers())
    made.submit(one)
    assert made.waiting == 1
    one.cancel(reason)
    assert answers.error() is reason
    instance.gate.set()
    running.one()
    close(made)
    assert (made.statistics.fail.count, made.statistics.failures[counted_as]) == (1, 1)


def test_a_reply_that_fails_costs_nobody_else_an_answer(caplog: pytest.LogCaptureFixture) -> None:
    def broken(result: Result, final: bool = True, partial: bool = False) -> Credit:
        raise RuntimeError("the door is broken")

    for instance in (EchoInstance(), EchoInstance(device="cuda:0")):  # on this thread, and on the worker's
        made = model(instance)
        made.submit(pending(request(id="lost"), broken))
        assert ask(made, request(8)).values() == [8]
        close(made)
    told = [record for record in caplog.records if record.getMessage() == "model m: the reply to request lost failed"]
    assert [record.__dict__["request_id"] for record in told] == ["lost", "lost"]


def test_every_answer_of_many_names_the_version_and_has_the_classes_that_were_asked_for() -> None:
    def script(sent: InferRequest, reply: Reply, _cancelled: Cancelled) -> None:
        reply(EchoInstance().answer(sent), final=False)
        reply(EchoInstance(2).answer(sent))

    made = model(StreamingInstance(script=script))
    answers = ask(made, request(3, 4, Y=1))
    close(made)
    given = [answer for answer in answers.given if isinstance(answer, InferResponse)]
    assert [answer.version for answer in given] == ["1", "1"]
    assert [answer.outputs[0].array.tolist() for answer in given] == [[b"4.000000:1"], [b"8.000000:1"]]


# -- classification


def test_a_request_may_want_classes_instead_of_the_tensor() -> None:
    config = configuration()
    made = Model(loaded(config, {"Y": ("zero", "one")}), [EchoInstance()])
    answer = ask(made, request(0.5, 2, Y=1)).one()
    close(made)
    assert isinstance(answer, InferResponse)
    [output] = answer.outputs
    assert (output.datatype, output.array.tolist()) == (BYTES, [b"2.000000:1:one"])


def test_a_named_output_without_classes_stays_a_tensor() -> None:
    made = model()
    assert ask(made, request(0.5, 2, Y=0)).values() == [0.5, 2]
    close(made)


def test_classes_that_cannot_be_made_fail_the_request() -> None:
    strings = [Tensor("Y", BYTES, objects([b"a"], [1]))]
    made = model(ScriptedInstance(lambda batch: [InferResponse("m", "", "", list(strings)) for _ in batch]))
    error = ask(made, request(1, Y=1)).error()
    close(made)
    assert (error.kind, error.message) == (
        Kind.INVALID,
        "class result not available for output due to unsupported type 'BYTES'",
    )
    assert (made.statistics.fail.count, made.statistics.success.count) == (1, 0)
    assert made.statistics.failures["OTHER"] == 1  # the backend did its part


# -- inline


class Timed(EchoInstance):
    """Takes `ns` for a request of up to `elements`, and far too long for a larger one."""

    def __init__(self, ns: int, elements: int = 10**9) -> None:
        super().__init__()
        self._ns = ns
        self._elements = elements
        self.shapes: list[tuple[int, ...]] = []

    def answers(self, batch: Sequence[InferRequest]) -> Sequence[Result]:
        array = batch[0].inputs["X"].array
        self.shapes.append(array.shape)
        until = time.perf_counter_ns() + (self._ns if array.size <= self._elements else 3 * INLINE_LIMIT_NS)
        while time.perf_counter_ns() < until:
            pass
        return [InferResponse("m", "", "", []) for _ in batch]


def test_a_short_model_runs_inline_up_to_the_largest_request_that_was_measured() -> None:
    instance = Timed(0)
    made = model(instance)
    assert made.inline_bytes == PROBE_BYTES
    size = PROBE_BYTES // 4
    for length in (size, size + 1):
        array = np.zeros(length, np.float32)
        ask(made, InferRequest("m", "", "", {"X": Tensor("X", FP32, array)}, {})).one()
    close(made)
    assert instance.threads[-2] == threading.get_ident() != instance.threads[-1]


def test_only_sizes_that_are_short_enough_run_inline() -> None:
    made = model(Timed(0, elements=1))
    close(made)
    assert made.inline_bytes == 4


def test_a_long_model_never_runs_inline() -> None:
    made = model(Timed(3 * INLINE_LIMIT_NS))
    close(made)
    assert made.inline_bytes == -1


def test_open_dimensions_and_rows_are_probed_within_the_models_limit() -> None:
    config = configuration(
        'name: "m" backend: "fake" max_batch_size: 2 input { name: "X" data_type: TYPE_FP32 dims: [ -1, 3 ] }'
        'output { name: "Y" data_type: TYPE_FP32 dims: 1 }'
    )
    instance = Timed(0, elements=2 * 32 * 3)
    made = model(instance, config=config)
    close(made)
    assert list(dict.fromkeys(instance.shapes)) == [(1, 1, 3), (2, 1, 3), (2, 16, 3), (2, 32, 3), (2, 64, 3)]


def test_strings_are_probed_with_strings() -> None:
    seen: list[object] = []

    def script(batch: Sequence[InferRequest]) -> Sequence[Result]:
        if batch[0].inputs["X"].array.size > 4 * 16:
            raise ValueError("too many")
        seen.append(batch[0].inputs["X"].array.tolist())
        return [InferResponse("m", "", "", []) for _ in batch]

    made = model(ScriptedInstance(script, device="cpu"), config=configuration(TEXT))
    close(made)
    assert seen[0] == [[b"0"]]
    assert made.inline_bytes == 4 * 16 * (8 + 1)  # a reference and one byte each


def test_the_bytes_of_strings_count_towards_the_limit() -> None:
    made = model(
        ScriptedInstance(lambda batch: [InferResponse("m", "", "", []) for _ in batch], device="cpu"),
        config=configuration(TEXT),
    )
    instance_threads = []
    for length in (1, made.inline_bytes):
        sent = InferRequest("m", "", "", {"X": Tensor("X", BYTES, objects([b"x" * length], [1, 1]))}, {})
        answers = ask(made, sent)
        answers.one()
        instance_threads.append(answers.thread == threading.get_ident())
    close(made)
    assert instance_threads == [True, False]


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_a_model_on_a_gpu_is_not_probed(device: str) -> None:
    instance = EchoInstance(device=device)
    made = model(instance)
    close(made)
    assert (made.inline_bytes, instance.batches, made.devices) == (-1, [], (device,))


def test_a_streaming_model_is_not_probed() -> None:
    made = model(StreamingInstance())
    close(made)
    assert made.inline_bytes == -1


def test_a_model_that_cannot_run_on_zeros_loads_and_does_not_run_inline() -> None:
    def script(batch: Sequence[InferRequest]) -> Sequence[Result]:
        if not batch[0].inputs["X"].array.any():
            raise ValueError("zeros make no sense")
        return [EchoInstance().answer(sent) for sent in batch]

    made = model(ScriptedInstance(script, device="cpu"))
    assert made.inline_bytes == -1
    assert ask(made, request(1)).values() == [1]
    close(made)


def test_probing_is_not_counted() -> None:
    instance = EchoInstance()
    made = model(instance)
    close(made)
    assert len(instance.batches) > 0
    assert made.statistics.execution_count == 0


def test_an_optional_input_is_left_out_of_the_probe() -> None:
    config = configuration()
    config.input.add(name="Z", data_type=config.input[0].data_type, dims=[-1], optional=True)
    seen: list[set[str]] = []

    def script(batch: Sequence[InferRequest]) -> Sequence[Result]:
        seen.append(set(batch[0].inputs))
        return [InferResponse("m", "", "", [Tensor("Y", FP32, np.zeros(1, np.float32))]) for _ in batch]

    made = model(ScriptedInstance(script, device="cpu"), config=config)
    close(made)
    assert seen[0] == {"X"}


def test_draining_refuses_new_requests() -> None:
    made = model()
    before = made.draining
    assert made.drain(LIMIT_S)
    assert (before, made.draining) == (False, True)
    with pytest.raises(ServingError, match="Server is stopping"):
        ask(made, request())
    made.close()


def test_devices_are_named_once_each() -> None:
    made = model(*(EchoInstance(device=device) for device in ("cuda:0", "cpu", "cuda:0")))
    close(made)
    assert made.devices == ("cuda:0", "cpu")


class PaddingInstance(EchoInstance):
    """Says that it filled up each request's inputs with one element."""

    def __init__(self, padded: Padded | None) -> None:
        super().__init__()
        self.padded = padded

    def answers(self, batch: Sequence[InferRequest]) -> Sequence[Result]:
        if self.padded is not None:
            self.padded.data += sum(request.inputs["X"].array.size for request in batch)
            self.padded.padding += len(batch)
        return super().answers(batch)


def test_instances_that_pad_count_it_among_the_models_numbers() -> None:
    padding, plain = PaddingInstance(Padded()), PaddingInstance(None)
    made = model(padding, plain, EchoInstance())
    close(made)
    assert made.statistics.padded == (padding.padded,)


def test_what_was_padded_before_a_model_serves_is_not_counted() -> None:
    made = model(PaddingInstance(Padded(data=3, padding=1)))
    before = made.statistics.padded[0]
    assert (before.data, before.padding) == (0, 0)
    ask(made, request(1, 2, 3)).one()
    assert (before.data, before.padding) == (3, 1)
    close(made)


# -- batching

BATCHED = """
    name: "m" backend: "fake" max_batch_size: 4 %s
    input { name: "X" data_type: TYPE_FP32 dims: -1 }
    output { name: "Y" data_type: TYPE_FP32 dims: -1 }
"""
BATCHES = BATCHED % "dynamic_batching { %s }"


def matrix(rows: int, *tail: int, id: str = "") -> InferRequest:
    """X of the numbers from 0 on, [rows, *tail]."""
    sent = request(id=id)
    sent.rows = rows
    shape = (rows, *(tail or (1,)))
    sent.inputs["X"].array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    return sent


def test_what_waits_while_an_instance_is_busy_runs_together() -> None:
    instance = GatedInstance()
    made = model(instance, config=configuration(BATCHES % ""))
    first = ask(made, matrix(1, id="first"))
    instance.wait_begun()
    waiting = [ask(made, matrix(1, id=str(number))) for number in range(6)]
    instance.gate.set()
    for answers in (first, *waiting):
        answers.one()
    close(made)
    assert instance.batches == [["first"], ["0", "1", "2", "3"], ["4", "5"]]
    counts = made.statistics
    assert (counts.execution_count, counts.success.count, sorted(counts.batches)) == (3, 7, [1, 2, 4])
    assert {reason: number for reason, number in counts.departures.items() if number} == {"idle": 2, "full": 1}


def test_a_model_that_does_not_ask_for_batching_runs_one_by_one_and_has_no_departures() -> None:
    instance = GatedInstance()
    made = model(instance, config=configuration(BATCHED % ""))
    ask(made, matrix(1, id="first"))
    instance.wait_begun()
    waiting = [ask(made, matrix(1, id=str(number))) for number in range(2)]
    instance.gate.set()
    for answers in waiting:
        answers.one()
    close(made)
    assert (instance.batches, made.statistics.departures) == ([["first"], ["0"], ["1"]], {})


def test_a_lone_request_to_a_short_model_that_batches_runs_inline_and_is_counted() -> None:
    instance = EchoInstance()
    made = model(instance, config=configuration(BATCHES % ""))
    ask(made, matrix(1)).one()
    close(made)
    assert instance.threads[-1] == threading.get_ident()
    assert made.statistics.departures["idle"] == 1


def test_with_a_delay_a_lone_request_waits_as_it_was_told() -> None:
    made = model(config=configuration(BATCHES % "max_queue_delay_microseconds: 20000"))
    began_ns = time.monotonic_ns()
    answers = ask(made, matrix(1))
    assert made.waiting == 1
    answers.one()
    assert time.monotonic_ns() - began_ns >= 20_000_000
    close(made)
    assert made.statistics.departures["delay"] == 1


def test_a_batch_that_fills_does_not_wait_for_the_delay() -> None:
    made = model(config=configuration(BATCHES % "max_queue_delay_microseconds: 3600000000"))
    for answers in [ask(made, matrix(1)) for _ in range(4)]:
        answers.one()
    close(made)
    assert made.statistics.departures["full"] == 1


def test_a_request_whose_time_in_the_queue_is_over_is_refused_while_the_instance_is_busy() -> None:
    instance = GatedInstance()
    policy = "default_queue_policy { default_timeout_microseconds: 20000 }"
    made = model(instance, config=configuration(BATCHES % policy))
    running = ask(made, matrix(1, id="runs"))
    instance.wait_begun()
    error = ask(made, matrix(1, id="waits")).error()  # though nothing takes from the queue
    assert (error.kind, error.message) == (Kind.TIMED_OUT, "Request timeout expired")
    assert (made.waiting, running.ended) == (0, 0)
    instance.gate.set()
    running.one()
    close(made)
    assert instance.batches == [["runs"]]
    assert (made.statistics.failures["REJECTED"], made.statistics.fail.count) == (1, 1)


def test_a_deadline_ends_what_runs_though_its_time_in_the_queue_was_over_before() -> None:
    instance = GatedInstance()
    policy = "default_queue_policy { default_timeout_microseconds: 400000 }"
    made = model(instance, config=configuration(BATCHES % policy))
    sent = matrix(1)
    sent.deadline_ns = time.monotonic_ns() + 500_000_000
    one = pending(sent, answers := Answers())
    told = threading.Event()
    one.cancelled.watch(told.set)
    made.submit(one)
    instance.wait_begun()
    assert told.wait(LIMIT_S)
    assert one.cancelled.reason is not None
    assert one.cancelled.reason.kind is Kind.DEADLINE
    instance.gate.set()
    answers.one()
    close(made)


def test_answers_leave_in_order_where_that_is_asked_for() -> None:
    first, second = GatedInstance(), GatedInstance()
    second.begun = first.begun
    made = model(first, second, config=configuration(BATCHES % "preserve_ordering: true"))
    slow = ask(made, matrix(4, id="slow"))
    first.wait_begun()
    fast = ask(made, matrix(4, id="fast"))
    first.wait_begun()
    behind = first if first.batches == [["fast"]] else second
    behind.gate.set()
    limit_s = time.monotonic() + LIMIT_S
    while not made.statistics.success.count:  # it has run, and been counted
        assert time.monotonic() < limit_s
    assert (slow.ended, fast.ended) == (0, 0)
    first.gate.set()
    second.gate.set()
    slow.one()
    fast.one()
    close(made)


def test_a_refused_request_holds_up_no_other_where_answers_leave_in_order() -> None:
    instance = GatedInstance()
    policy = "preserve_ordering: true default_queue_policy { max_queue_size: 1 }"
    made = model(instance, config=configuration(BATCHES % policy))
    accepted = [ask(made, matrix(1))]
    instance.wait_begun()
    accepted.append(ask(made, matrix(1)))
    with pytest.raises(ServingError, match="Exceeds maximum queue size"):
        ask(made, matrix(1))
    instance.gate.set()
    for answers in accepted:
        answers.one()
    ask(made, matrix(1)).one()
    close(made)


# -- requests larger than a batch


@pytest.mark.parametrize("dynamic", ["", "dynamic_batching { }"])
def test_a_request_larger_than_a_batch_runs_in_parts_and_is_counted_once(dynamic: str) -> None:
    instance = EchoInstance(2, device="cuda:0")
    made = model(instance, config=configuration(BATCHED % dynamic))
    answer = ask(made, matrix(11, 2, id="large")).one()
    close(made)
    assert isinstance(answer, InferResponse)
    assert answer.outputs[0].array.tolist() == (2 * np.arange(22).reshape(11, 2)).tolist()
    counts = made.statistics
    assert (counts.inference_count, counts.execution_count, counts.success.count) == (11, 3, 1)
    assert {size: batch.compute_infer.count for size, batch in counts.batches.items()} == {4: 2, 3: 1}
    assert counts.compute_infer == Duration(1, sum(batch.compute_infer.ns for batch in counts.batches.values()))
    assert answer.computed is not None
    assert (answer.computed.input_ns, answer.computed.infer_ns) == (counts.compute_input.ns, counts.compute_infer.ns)
    assert counts.success.count == counts.queue.count == sum(counts.histograms.request.counts) == 1


def test_a_part_that_fails_fails_the_request_once() -> None:
    def script(batch: Sequence[InferRequest]) -> Sequence[Result]:
        if batch[0].rows < 4:
            raise RuntimeError("no luck")
        return [EchoInstance().answer(sent) for sent in batch]

    made = model(ScriptedInstance(script), config=configuration(BATCHED % ""))
    error = ask(made, matrix(11)).error()
    close(made)
    assert error.kind is Kind.INTERNAL
    counts = made.statistics
    assert (counts.success.count, counts.fail.count, counts.failures["BACKEND"]) == (0, 1, 1)


def test_cancelling_a_request_in_parts_ends_all_of_them() -> None:
    instance = GatedInstance()
    made = model(instance, config=configuration(BATCHED % ""))
    one = pending(matrix(11), answers := Answers())
    made.submit(one)
    instance.wait_begun()
    one.cancel(GONE)
    assert answers.error() is GONE
    assert made.waiting == 0
    instance.gate.set()
    close(made)
    assert len(instance.batches) == 1
    assert made.statistics.failures["CANCELED"] == 1


def test_a_queue_takes_all_parts_of_a_request_or_none() -> None:
    instance = GatedInstance()
    made = model(instance, config=configuration(BATCHES % "default_queue_policy { max_queue_size: 2 }"))
    ask(made, matrix(1, id="first"))
    instance.wait_begun()
    with pytest.raises(ServingError, match="Exceeds maximum queue size"):
        ask(made, matrix(11))
    assert made.waiting == 0
    fits = ask(made, matrix(8))
    instance.gate.set()
    fits.one()
    close(made)
    assert [len(batch) for batch in instance.batches] == [1, 1, 1]


# -- the response cache


def test_an_equal_request_is_answered_from_the_cache_and_counted_as_a_hit() -> None:
    instance, kept = EchoInstance(3), ResponseCache(10_000)
    config = configuration()
    config.response_cache.enable = True
    made = Model(loaded(config), [instance], kept)
    before = len(instance.batches)
    assert ask(made, request(1, id="first")).values() == [3]
    again = ask(made, request(1, id="again"))
    answer = again.one()
    close(made)
    assert isinstance(answer, InferResponse)
    assert (again.values(), answer.id, answer.version) == ([3], "again", "1")
    assert len(instance.batches) == before + 1
    counts = made.statistics
    assert (counts.cache_hit.count, counts.cache_miss.count, counts.success.count) == (1, 1, 2)
    assert (counts.queue.count, counts.compute_infer.count, counts.inference_count) == (2, 1, 1)
    seen = counts.histograms
    assert [sum(histogram.counts) for histogram in (seen.request, seen.queue, seen.first_response)] == [2, 2, 2]
    assert sum(seen.compute_infer.counts) == 1


def test_a_failure_is_not_kept() -> None:
    config = configuration()
    config.response_cache.enable = True
    kept = ResponseCache(10_000)
    made = Model(loaded(config), [ScriptedInstance(lambda batch: [GONE for _ in batch])], kept)
    assert [ask(made, request()).error() for _ in range(2)] == [GONE, GONE]
    close(made)
    counts = made.statistics
    assert (len(kept), counts.fail.count, kept.counts.misses) == (0, 2, 2)
    assert (counts.cache_miss, counts.success) == (Duration(), Duration())  # a failure touches nothing else


def test_a_model_that_does_not_ask_for_the_cache_has_none() -> None:
    made = Model(loaded(), [EchoInstance()], kept := ResponseCache(10_000))
    for _ in range(2):
        ask(made, request()).one()
    close(made)
    assert (made.caches, len(kept), made.statistics.execution_count) == (False, 0, 2)


def test_a_version_that_is_loaded_anew_answers_anew() -> None:
    config = configuration()
    config.response_cache.enable = True
    kept = ResponseCache(10_000)
    answers = []
    for scale in (2, 3):
        made = Model(loaded(config), [EchoInstance(scale)], kept)
        answers.append(ask(made, request(1)).values())
        assert made.drain(LIMIT_S)
        with pytest.raises(ServingError, match="Server is stopping"):  # so that it goes to the one that came instead
            ask(made, request(1))
        made.close()
    assert answers == [[2], [3]]


# -- models that call others


@pytest.mark.parametrize(("steps", "inline"), [(1, True), (INLINE_CALLS, True), (INLINE_CALLS + 1, False)])
def test_a_short_ensemble_starts_on_the_thread_that_brings_a_request(steps: int, inline: bool) -> None:
    member = model()
    config = configuration(calling(*["m"] * steps))
    instance = CallingInstance([Called(member)] * steps)
    made = Model(replace(loaded(config), members=(member,) * steps), [instance])
    assert ask(made, request(3)).values() == [3]
    assert (instance.threads == [threading.get_ident()]) is inline
    close(made)
    close(member)
    assert (made.statistics.execution_count, member.statistics.execution_count) == (1, steps)


def test_a_caller_learns_how_its_request_was_computed_unless_the_cache_answered() -> None:
    config = configuration()
    config.response_cache.enable = True
    member = Model(loaded(config), [EchoInstance()], ResponseCache(10_000))
    answers = [Answers(), Answers()]
    for asked in answers:
        Called(member).infer(request(3).inputs, {"Y": RequestedOutput("Y")}, request(3), asked)
    close(member)
    counts = member.statistics
    told, none = (asked.one() for asked in answers)
    assert isinstance(told, InferResponse)
    assert isinstance(none, InferResponse)
    assert told.computed is not None
    assert Duration(1, told.computed.input_ns) == counts.compute_input
    assert Duration(1, told.computed.infer_ns) == counts.compute_infer
    assert Duration(1, told.computed.output_ns) == counts.compute_output
    assert none.computed is None


def test_what_a_model_that_answers_later_tells_of_its_phases_is_counted() -> None:
    def script(sent: InferRequest, reply: Reply, _cancelled: Cancelled) -> None:
        answer = EchoInstance().answer(sent)
        answer.computed = Phases(3, 40, 500) if sent.id else None
        reply(answer)

    made = model(StreamingInstance(script=script))
    assert ask(made, request(1, id="tells")).values() == [1]
    counts = made.statistics
    told = counts.success.ns - counts.queue.ns
    phases = counts.compute_input, counts.compute_infer, counts.compute_output
    assert phases == (Duration(1, 3), Duration(1, 40), Duration(1, 500))
    assert [histogram.total for histogram in (counts.histograms.compute_infer, counts.histograms.rows)] == [40, 1]
    assert counts.batches[1].compute_output == Duration(1, 500)
    assert ask(made, request(1)).values() == [1]
    close(made)
    counts = made.statistics
    assert (counts.compute_input, counts.compute_output) == (Duration(2, 3), Duration(2, 500))
    # Of one that tells nothing, all the time until its answer was in the model.
    assert counts.compute_infer == Duration(2, 40 + counts.success.ns - counts.queue.ns - told)


def test_a_failure_of_a_step_is_no_failure_of_a_backend_of_the_ensemble() -> None:
    def script(batch: Sequence[InferRequest]) -> Sequence[Result]:
        raise RuntimeError("no luck")

    member = model(ScriptedInstance(script))
    made = Model(replace(loaded(configuration(calling("m"))), members=(member,)), [CallingInstance([Called(member)])])
    assert ask(made, request(3)).error().kind is Kind.INTERNAL
    close(made)
    close(member)
    assert [name for name, number in made.statistics.failures.items() if number] == ["OTHER"]
    assert [name for name, number in member.statistics.failures.items() if number] == ["BACKEND"]


def test_each_instance_is_limited_as_its_group_says() -> None:
    def group(kind: str, count: int) -> str:
        resource = f'rate_limiter {{ resources {{ name: "R" count: {count} }} }}'
        return f"instance_group {{ count: 1 {kind} {resource} }}"

    config = configuration(PLAIN + group("kind: KIND_CPU passive: true", 9) + group("kind: KIND_GPU gpus: [ 0, 1 ]", 2))
    devices = ("cuda:0", "cuda:1")
    limiter = RateLimiter(parse(["R:2"]))
    made = Model(loaded(config), [EchoInstance(device=device) for device in devices], None, limiter)
    close(made)
    with pytest.raises(ServingError, match="the minimum required count is 2"):
        Model(loaded(config), [EchoInstance(device=device) for device in devices], None, RateLimiter(parse(["R:1"])))


def test_an_ensemble_takes_no_part_in_limiting_rates() -> None:
    member = model()
    config = configuration(calling("m"))
    made = Model(replace(loaded(config), members=(member,)), [CallingInstance([Called(member)])], None, RateLimiter({}))
    assert ask(made, request(3)).values() == [3]
    close(made)
    close(member)


def test_the_responses_of_a_decoupled_model_are_counted_by_their_place() -> None:
    def script(sent: InferRequest, reply: Reply, cancelled: Cancelled) -> None:
        answer = EchoInstance().answer(sent)
        reply(answer, final=False, partial=True)
        reply(answer, final=False)
        if sent.id == "fails":
            reply(ServingError(Kind.INTERNAL, "no luck"))
        else:
            reply(InferResponse("m", "1", sent.id, []))

    config = configuration(PLAIN + "model_transaction_policy { decoupled: true }")
    made = model(StreamingInstance(script=script), config=config)
    for id in ("ends", "fails"):
        answers = Answers()
        made.submit(pending(request(id=id), answers))
        answers.wait_ended()
    made.close()
    first, second = made.statistics.responses[0], made.statistics.responses[1]
    assert (first.success.count, first.compute_infer.count, first.fail.count) == (2, 2, 0)
    assert (second.empty_response.count, second.fail.count, second.success.count) == (1, 1, 0)
    assert sorted(made.statistics.responses) == [0, 1]
    assert sum(made.statistics.histograms.first_response.counts) == 2


def test_an_instance_that_was_idle_says_how_long_it_waited_for_a_fuller_batch() -> None:
    delay_ms = 20
    batching = f"max_batch_size: 4 dynamic_batching {{ max_queue_delay_microseconds: {delay_ms * 1000} }}"
    made = model(EchoInstance(device="cuda:0"), config=configuration(PLAIN + batching))
    sent = request(1)
    sent.inputs["X"].array = sent.inputs["X"].array.reshape(1, 1)
    answers = Answers()
    made.submit(pending(sent, answers))
    answers.one()
    made.close()
    waited = made.statistics.histograms.gathered
    assert sum(waited.counts) == 1
    assert waited.total >= delay_ms * 1_000_000


STATEFUL = configuration("""
    name: "m" backend: "fake" max_batch_size: 4
    input { name: "X" data_type: TYPE_FP32 dims: -1 }
    output { name: "Y" data_type: TYPE_FP32 dims: -1 }
    parameters { key: "split_oversized" value { string_value: "true" } }
    sequence_batching { max_sequence_idle_microseconds: 60000000 oldest { preserve_ordering: true } }
""")


def part(rows: int, flags: str = "", flow: int = 1) -> InferRequest:
    array = np.full((rows, 1), 2, np.float32)
    place = messages.Sequence(flow, "S" in flags, "E" in flags)
    return InferRequest("m", "", "", {"X": Tensor("X", FP32, array)}, {}, sequence=place, rows=rows)


def test_requests_of_sequences_are_counted_like_others() -> None:
    made = model(EchoInstance(3), config=STATEFUL)
    for flags in ("S", "", "E"):
        ask(made, part(1, flags)).one()
    with pytest.raises(ServingError, match="must specify the START flag"):
        ask(made, part(1))
    close(made)
    counts = made.statistics
    assert (counts.success.count, counts.inference_count, counts.execution_count, counts.fail.count) == (3, 3, 3, 0)
    assert counts.departures["idle"] == 3


def test_a_request_of_a_sequence_is_never_split() -> None:
    made = model(EchoInstance(), config=STATEFUL)
    for rows in (2, 9):
        with pytest.raises(ServingError, match="must specify batch-size 1 due to requirements of sequence batcher"):
            ask(made, part(rows, "S"))
    close(made)


def test_answers_of_sequences_leave_in_the_order_of_their_requests_where_that_is_asked_for() -> None:
    first, second = GatedInstance(), EchoInstance()
    made = model(first, second, config=STATEFUL)
    slow = ask(made, part(1, "S", flow=1))
    first.wait_begun()
    quick = ask(made, part(1, "S", flow=2))
    while not second.batches:
        assert not quick.ended
    assert quick.ended == 0
    first.gate.set()
    slow.one()
    quick.one()
    close(made)


def test_sequences_need_an_instance_that_takes_batches() -> None:
    with pytest.raises(ServingError) as caught:
        model(StreamingInstance(), config=STATEFUL)
    assert caught.value.kind is Kind.UNSUPPORTED
    assert caught.value.message == "model 'm': sequence_batching needs a runtime that takes batches"
