"""Workers run batches, answer every request exactly once, and stop when they are told."""

import contextlib
import gc
import re
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import monotonic_ns

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from penstock import messages
from penstock.batching import DEPARTURES
from penstock.errors import Kind, ServingError
from penstock.instances import INLINE_ENDS_NS, INLINE_RESTS_NS, INLINE_SLOW_RUNS, Crew
from penstock.messages import InferRequest, InferResponse, Phases
from penstock.model_config import RateLimit, Resource, SequencePolicy
from penstock.queueing import Fifo, Pending, Scheduler, Seating
from penstock.rate import RateLimiter
from penstock.runtime import Cancelled, Instance, Reply
from penstock.sequencing import Sequencer
from penstock.statistics import NO_GPU, Execution

from .fakes import (
    LIMIT_S,
    Answers,
    EchoInstance,
    GatedInstance,
    Result,
    ScriptedInstance,
    StreamingInstance,
    pending,
    request,
)

GONE = ServingError(Kind.CANCELLED, "gone")


class Ledger:
    """What a crew told its model."""

    def __init__(self) -> None:
        self.times: list[Execution] = []
        self.withdrawn: list[ServingError] = []

    def finish(self, batch: Sequence[Pending], results: Sequence[Result], times: Execution) -> None:
        self.times.append(times)
        for one, result in zip(batch, results, strict=True):
            one.reply(result)

    def withdraw(self, one: Pending, reason: ServingError) -> None:
        self.withdrawn.append(reason)
        one.reply(reason)


@contextmanager
def crew(
    *instances: Instance,
    scheduler: Scheduler | Seating | None = None,
    ledger: Ledger | None = None,
    inline_rests_ns: int = INLINE_RESTS_NS,
) -> Iterator[Crew]:
    ledger = Ledger() if ledger is None else ledger
    made = Crew(
        "m",
        Fifo() if scheduler is None else scheduler,
        instances,
        ledger.finish,
        ledger.withdraw,
        inline_rests_ns=inline_rests_ns,
    )
    try:
        yield made
        assert made.drain(LIMIT_S)
    finally:
        made.close()


def submit(to: Crew, *values: float, id: str = "", size: int = 4, deadline_ns: int = 0) -> tuple[Pending, Answers]:
    answers = Answers()
    sent = request(*values, id=id)
    sent.deadline_ns = deadline_ns
    one = pending(sent, answers)
    to.submit(one, size)
    return one, answers


def test_a_request_runs_on_the_workers_thread_and_is_answered() -> None:
    instance, ledger = EchoInstance(2), Ledger()
    with crew(instance, ledger=ledger) as made:
        _, answers = submit(made, 3)
        assert answers.values() == [6]
    assert instance.threads != [threading.get_ident()]
    [times] = ledger.times
    assert times.input_ns == instance.inputs_ready_ns - times.started_ns >= 0
    assert times.infer_ns == instance.outputs_came_ns - instance.inputs_ready_ns >= 0
    assert times.output_ns == times.ended_ns - instance.outputs_came_ns >= 0


def test_a_short_request_to_an_idle_instance_runs_on_the_calling_thread() -> None:
    instance = EchoInstance()
    with crew(instance) as made:
        made.allow_inline(4)
        _, answers = submit(made, size=4)
        assert answers.ended == 1
    assert instance.threads == [threading.get_ident()]


def test_a_longer_request_than_was_measured_goes_to_the_worker() -> None:
    instance = EchoInstance()
    with crew(instance) as made:
        made.allow_inline(4)
        submit(made, size=5)[1].one()
    assert instance.threads != [threading.get_ident()]


def test_an_instance_that_can_run_nothing_just_now_is_given_one_that_it_answers_for() -> None:
    instance = StreamingInstance(max_in_flight=0)
    with crew(instance) as made:
        _, first = submit(made, id="first")
        instance.wait_started(1)
        _, second = submit(made, id="second")
        assert made.waiting == 1
        instance.max_in_flight = 2
        instance.wait_started(2)
        for sent, reply, _ in instance.started:
            reply(instance.answer(sent))
        first.one()
        second.one()


def test_nothing_runs_inline_while_the_instance_is_busy() -> None:
    instance = GatedInstance()
    with crew(instance) as made:
        submit(made, id="first")
        instance.wait_begun()
        made.allow_inline(4)
        submit(made, id="second")
        assert made.waiting == 1
        instance.gate.set()
    assert instance.batches == [["first"], ["second"]]
    assert threading.get_ident() not in instance.threads


def slow(batch: Sequence[InferRequest]) -> Sequence[Result]:
    """What computes for longer than is allowed inline."""
    until = time.thread_time_ns() + 2 * INLINE_ENDS_NS
    while time.thread_time_ns() < until:
        pass
    return [EchoInstance().answer(sent) for sent in batch]


def test_slow_inline_runs_in_a_row_are_the_last_ones_for_a_while() -> None:
    instance = ScriptedInstance(slow)
    with crew(instance, inline_rests_ns=0) as made:
        made.allow_inline(4)
        for _ in range(INLINE_SLOW_RUNS):
            submit(made)
        assert made.inline_bytes == -1
        submit(made)[1].one()  # on the worker, which then looks whether the time is over, before it takes another
        submit(made)[1].one()
        assert made.inline_bytes == 4
    assert instance.threads[INLINE_SLOW_RUNS] != threading.get_ident()


def test_slow_inline_runs_in_a_row_are_the_last_ones() -> None:
    instance = ScriptedInstance(slow)
    with crew(instance) as made:
        made.allow_inline(4)
        for _ in range(INLINE_SLOW_RUNS):
            assert made.inline_bytes == 4
            submit(made)
        assert made.inline_bytes == -1
        submit(made)[1].one()
    assert [thread == threading.get_ident() for thread in instance.threads] == [True] * INLINE_SLOW_RUNS + [False]


def test_what_was_cancelled_before_it_came_does_not_run_inline() -> None:
    instance, answers = EchoInstance(3), Answers()
    with crew(instance) as made:
        made.allow_inline(4)
        given = pending(request(1), answers)
        given.cancelled.set(GONE)
        made.submit(given, 4)
        assert made.drain(LIMIT_S)
    assert instance.batches == []


class Endless(EchoInstance):
    """Computes on, wherever it is asked first, until it is told that nobody wants it."""

    told = False

    def execute(self, batch: Sequence[InferRequest], unwanted: Cancelled | None = None) -> Sequence[Result]:
        if not self.batches:
            assert unwanted is not None
            told = threading.Event()
            unwanted.watch(told.set)
            super().execute(batch)
            self.told = told.wait(LIMIT_S)
            raise RuntimeError("terminated")
        return super().execute(batch)


@pytest.mark.parametrize("pinned", [False, True])
def test_an_inline_run_that_lasts_too_long_goes_to_its_worker_and_is_the_last_one(pinned: bool) -> None:
    instance, ledger = Endless(3), Ledger()
    with crew(instance, scheduler=flows() if pinned else Fifo(), ledger=ledger) as made:
        made.allow_inline(4)
        given = [follow(made, "a", flags)[1] if pinned else submit(made)[1] for flags in ("S", "E")]
        assert [answers.values() for answers in given] == [[3], [3]]
        assert (made.inline_bytes, made.drain(LIMIT_S)) == (-1, True)
    assert (instance.told, len(instance.batches)) == (True, 3)
    assert instance.threads[0] == threading.get_ident()
    assert threading.get_ident() not in instance.threads[1:]
    assert len(ledger.times) == 2


def test_a_model_whose_inline_run_lasted_too_long_may_try_again_after_a_while() -> None:
    with crew(Endless(3), inline_rests_ns=0) as made:
        made.allow_inline(4)
        submit(made)[1].one()  # on the worker, which then looks whether the time is over, before it takes another
        submit(made)[1].one()
        assert made.inline_bytes == 4


class Hopeless(EchoInstance):
    """Computes on each time, until it is told that nobody wants it."""

    def execute(self, batch: Sequence[InferRequest], unwanted: Cancelled | None = None) -> Sequence[Result]:
        assert unwanted is not None
        told = threading.Event()
        unwanted.watch(told.set)
        super().execute(batch)
        assert told.wait(LIMIT_S)
        raise RuntimeError("terminated")


def test_a_run_that_goes_from_a_thread_to_its_worker_keeps_its_deadline() -> None:
    instance, ledger = Hopeless(), Ledger()
    with crew(instance, ledger=ledger) as made:
        made.allow_inline(4)
        _, answers = submit(made, deadline_ns=time.monotonic_ns() + 200_000_000)
        assert answers.error().kind is Kind.DEADLINE
    assert instance.threads[0] == threading.get_ident() != instance.threads[1]


def test_what_comes_during_an_inline_run_goes_to_the_worker_of_that_instance() -> None:
    instance = GatedInstance()
    with crew(instance) as made:
        made.allow_inline(4)
        inline = threading.Thread(target=submit, args=(made, 1.0), kwargs={"id": "inline"})
        inline.start()
        instance.wait_begun()
        _, answers = submit(made, id="waits")
        assert made.waiting == 1
        instance.gate.set()
        answers.one()
        inline.join(LIMIT_S)
    assert instance.batches == [["inline"], ["waits"]]
    assert instance.threads[0] == inline.ident != instance.threads[1]


def test_closing_waits_for_a_run_on_another_thread() -> None:
    instance = GatedInstance()
    made = Crew("m", Fifo(), [instance], Ledger().finish, Ledger().withdraw)
    made.allow_inline(4)
    inline = threading.Thread(target=submit, args=(made,))
    inline.start()
    instance.wait_begun()
    closing = threading.Thread(target=made.close)
    closing.start()
    closing.join(0.02)
    assert (closing.is_alive(), instance.closed) == (True, 0)
    instance.gate.set()
    closing.join(LIMIT_S)
    inline.join(LIMIT_S)
    assert instance.closed == 1


def test_every_instance_has_its_worker() -> None:
    instances = [GatedInstance() for _ in range(3)]
    with crew(*instances) as made:
        answers = [submit(made)[1] for _ in range(3)]
        for instance in instances:
            instance.wait_begun()  # all run at the same time, or this would never come
        for instance in instances:
            instance.gate.set()
        for answer in answers:
            answer.one()
    assert len({instance.threads[0] for instance in instances}) == 3


def test_a_free_instance_takes_what_a_busy_one_cannot() -> None:
    first, second = GatedInstance(), GatedInstance()
    second.begun = first.begun
    with crew(first, second) as made:
        submit(made, id="long")
        first.wait_begun()  # one of the two
        busy, free = (first, second) if first.batches else (second, first)
        free.gate.set()
        for number in range(20):
            submit(made, id=str(number))[1].one()
        busy.gate.set()
    assert (busy.batches, len(free.batches)) == ([["long"]], 20)


class Delayed(Fifo):
    """Lets nothing leave before `due_ns`, then one at a time. `looked` counts the workers that got nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.due_ns = 0
        self.looked = threading.Semaphore(0)

    def take(self, now_ns: int) -> list[Pending]:
        return super().take(now_ns) if now_ns >= self.due_ns else []

    def wake_at(self, now_ns: int) -> int | None:
        self.looked.release()
        return self.due_ns if len(self) else None


def test_what_falls_due_together_runs_together_though_one_worker_kept_the_time() -> None:
    instances = [GatedInstance(), GatedInstance()]
    scheduler = Delayed()
    with crew(*instances, scheduler=scheduler) as made:
        for _ in instances:
            assert scheduler.looked.acquire(timeout=LIMIT_S)  # each worker sleeps, with no time to wake at
        scheduler.due_ns = time.monotonic_ns() + 100_000_000
        answers = [submit(made)[1]]
        assert scheduler.looked.acquire(timeout=LIMIT_S)  # one was woken, keeps the time, and is woken again
        answers.append(submit(made)[1])
        for instance in instances:
            instance.wait_begun()
        for instance in instances:
            instance.gate.set()
        for answer in answers:
            answer.one()


class Together(Fifo):
    """Lets nothing leave before two wait, and then one at a time. `looked` counts the workers that got nothing."""

    def __init__(self) -> None:
        super().__init__()
        self._due = False
        self.looked = threading.Semaphore(0)

    def add(self, pending: Pending, now_ns: int) -> None:
        super().add(pending, now_ns)
        self._due = len(self) == 2

    def take(self, now_ns: int) -> list[Pending]:
        return super().take(now_ns) if self._due else []

    def wake_at(self, now_ns: int) -> int | None:
        if not self._due:
            self.looked.release()
        return super().wake_at(now_ns) if self._due else None


def test_no_instance_idles_while_there_is_more_to_run() -> None:
    instances = [GatedInstance(), GatedInstance()]
    with crew(*instances, scheduler=Together()) as made:
        answers = [submit(made)[1] for _ in instances]  # one worker is woken, by the second
        for instance in instances:
            instance.wait_begun()
        for instance in instances:
            instance.gate.set()
        for answer in answers:
            answer.one()


def test_a_request_that_makes_others_due_goes_with_them_to_the_worker() -> None:
    instance, scheduler = EchoInstance(), Together()
    with crew(instance, scheduler=scheduler) as made:
        made.allow_inline(4)
        assert scheduler.looked.acquire(timeout=LIMIT_S)  # the worker sleeps
        answers = [submit(made, id=id)[1] for id in "ab"]
        for answer in answers:
            answer.one()
    assert instance.batches == [["a"], ["b"]]
    assert threading.get_ident() not in instance.threads


def test_a_request_that_cannot_be_queued_leaves_the_worker_idle() -> None:
    class Full(Fifo):
        full = True

        def add(self, pending: Pending, now_ns: int) -> None:
            if self.full:
                raise ServingError(Kind.UNAVAILABLE, "the queue is full")
            super().add(pending, now_ns)

    scheduler = Full()
    with crew(EchoInstance(), scheduler=scheduler) as made:
        with pytest.raises(ServingError, match="the queue is full"):
            submit(made)
        scheduler.full = False
        submit(made)[1].one()


def test_a_batch_that_raises_fails_alone(caplog: pytest.LogCaptureFixture) -> None:
    def script(batch: Sequence[InferRequest]) -> Sequence[Result]:
        if batch[0].id == "bad":
            raise RuntimeError("no luck")
        return [EchoInstance().answer(sent) for sent in batch]

    with crew(ScriptedInstance(script)) as made:
        error = submit(made, id="bad")[1].error()
        assert submit(made, 5, id="good")[1].values() == [5]
    assert (error.kind, error.message) == (Kind.INTERNAL, "model 'm' failed: RuntimeError: no luck")
    assert "model m failed on request bad" in caplog.text
    assert "Traceback" in caplog.text


def test_an_error_that_the_model_means_reaches_the_client_as_it_is() -> None:
    def script(batch: Sequence[InferRequest]) -> Sequence[Result]:
        raise ServingError(Kind.INVALID, "the model takes no such thing")

    with crew(ScriptedInstance(script)) as made:
        error = submit(made)[1].error()
    assert (error.kind, error.message) == (Kind.INVALID, "the model takes no such thing")


class Pairs(Fifo):
    """Two together, always."""

    def take(self, now_ns: int) -> list[Pending]:
        return super().take(now_ns) + super().take(now_ns) if len(self) >= 2 else []

    def wake_at(self, now_ns: int) -> int | None:
        return now_ns if len(self) >= 2 else None


@pytest.mark.parametrize("number", [0, 1, 3])
def test_a_wrong_number_of_results_fails_the_whole_batch(number: int) -> None:
    instance = ScriptedInstance(lambda batch: [InferResponse("m", "1", "", [])] * number)
    with crew(instance, scheduler=Pairs()) as made:
        answers = [submit(made, id=str(index))[1] for index in range(2)]
        errors = [answer.error() for answer in answers]
    assert {(error.kind, error.message) for error in errors} == {
        (Kind.INTERNAL, f"model 'm' failed: ValueError: {number} answers to 2 requests")
    }


def test_when_a_batch_raises_each_of_its_requests_is_named_and_the_cause_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def script(batch: Sequence[InferRequest]) -> Sequence[Result]:
        raise RuntimeError("no luck")

    with crew(ScriptedInstance(script), scheduler=Pairs()) as made:
        for answer in [submit(made, id=id)[1] for id in ("a", "b\n")]:
            answer.error()
    assert [(record.getMessage(), bool(record.exc_info)) for record in caplog.records] == [
        ("model m failed on request a", True),
        ("model m failed on request b\\n", False),
    ]
    assert [record.__dict__["request_id"] for record in caplog.records] == ["a", "b\n"]


def test_one_request_of_a_batch_may_fail() -> None:
    def script(batch: Sequence[InferRequest]) -> Sequence[Result]:
        return [ServingError(Kind.INVALID, "odd") if sent.id == "1" else EchoInstance().answer(sent) for sent in batch]

    with crew(ScriptedInstance(script), scheduler=Pairs()) as made:
        answers = [submit(made, 7, id=str(index))[1] for index in range(2)]
        assert answers[0].values() == [7]
        assert answers[1].error().message == "odd"


def test_a_cancelled_request_that_waits_is_answered_at_once_and_never_runs() -> None:
    instance, ledger = GatedInstance(), Ledger()
    with crew(instance, ledger=ledger) as made:
        submit(made, id="runs")
        instance.wait_begun()
        one, answers = submit(made, id="cancelled")
        one.cancel(GONE)
        assert answers.error() is GONE
        assert made.waiting == 0
        instance.gate.set()
    assert instance.batches == [["runs"]]
    assert ledger.withdrawn == [GONE]


def test_cancelling_what_runs_does_not_take_its_answer() -> None:
    instance = GatedInstance()
    with crew(instance) as made:
        one, answers = submit(made, 4)
        instance.wait_begun()
        one.cancel(GONE)
        instance.gate.set()
        assert answers.values() == [4]
        assert one.cancelled.reason is GONE


@pytest.mark.parametrize("inline", [True, False])
def test_a_request_past_its_deadline_never_runs(inline: bool) -> None:
    instance = EchoInstance()
    with crew(instance) as made:
        made.allow_inline(4 if inline else -1)
        error = submit(made, deadline_ns=time.monotonic_ns() - 3_000_000)[1].error()
        submit(made, id="next", deadline_ns=time.monotonic_ns() + 10**12)[1].one()
    assert error.kind is Kind.DEADLINE
    assert re.fullmatch(r"the deadline passed \d+\.\d ms before the request could run", error.message)
    assert instance.batches == [["next"]]


def test_what_was_answered_is_let_go_of_long_before_its_deadline() -> None:
    answered = []
    with crew(EchoInstance()) as made:
        for _ in range(200):
            one, answers = submit(made, deadline_ns=time.monotonic_ns() + 10**15)
            answers.one()
            answered.append(weakref.ref(one.request.inputs["X"].array))
        del one, answers
        gc.collect()
        assert sum(array() is not None for array in answered) <= 70


def test_those_of_a_batch_that_nobody_wants_do_not_run_with_it() -> None:
    class CancelledOnTheWay(Pairs):
        def take(self, now_ns: int) -> list[Pending]:
            batch = super().take(now_ns)
            for one in batch[:1]:
                one.cancelled.set(GONE)
            return batch

    instance = EchoInstance()
    with crew(instance, scheduler=CancelledOnTheWay()) as made:
        gone = submit(made, id="gone")[1]
        wanted = submit(made, id="wanted")[1]
        assert gone.error() is GONE
        wanted.one()
    assert instance.batches == [["wanted"]]


def test_a_deadline_that_passes_while_all_instances_are_busy_ends_what_waits_and_tells_what_runs() -> None:
    instance, ledger = GatedInstance(), Ledger()
    with crew(instance, ledger=ledger) as made:
        soon_ns = time.monotonic_ns() + 50_000_000
        runs, running = submit(made, id="runs", deadline_ns=soon_ns)
        told = threading.Event()
        runs.cancelled.watch(told.set)
        instance.wait_begun()
        error = submit(made, id="waits", deadline_ns=soon_ns)[1].error()
        assert error.kind is Kind.DEADLINE
        assert told.wait(LIMIT_S)
        instance.gate.set()
        running.one()
    assert instance.batches == [["runs"]]
    assert [reason.kind for reason in ledger.withdrawn] == [Kind.DEADLINE]


class Told(GatedInstance):
    """Keeps what would tell it that nobody wants its batch any more."""

    unwanted: Cancelled | None = None

    def execute(self, batch: Sequence[InferRequest], unwanted: Cancelled | None = None) -> Sequence[Result]:
        self.unwanted = unwanted
        return super().execute(batch)


@pytest.mark.parametrize("leaves", [0, 1])
def test_a_run_is_told_once_no_request_of_its_batch_is_wanted(leaves: int) -> None:
    instance = Told()
    with crew(instance, scheduler=Pairs()) as made:
        both = [submit(made)[0], submit(made)[0]]
        instance.wait_begun()
        assert instance.unwanted is not None
        both[leaves].cancel(GONE)
        assert not instance.unwanted
        both[1 - leaves].cancel(GONE)
        assert instance.unwanted
        instance.gate.set()


def test_what_ends_early_because_nobody_wants_it_is_answered_with_the_reason() -> None:
    def script(batch: Sequence[InferRequest]) -> Sequence[Result]:
        for one in accepted:
            one.cancel(GONE)
        raise RuntimeError("ended early")

    instance = ScriptedInstance(script)
    accepted: list[Pending] = []
    with crew(instance, scheduler=(pairs := Pairs())) as made:
        answers = [Answers(), Answers()]
        accepted += [pending(request(), answer) for answer in answers]
        made.submit_all(accepted)
        assert [answer.error() for answer in answers] == [GONE, GONE]
    assert len(pairs) == 0


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_wait_for_a_fuller_batch_takes_a_free_instance_and_a_request(hours: int) -> None:
    hour_ns = 3_600 * 10**9
    ledger = Ledger()
    with crew(EchoInstance(), ledger=ledger) as made:
        one = pending(request(), answers := Answers())
        one.arrived_ns += hours * hour_ns
        made.submit(one, 4)
        answers.one()
    [times] = ledger.times
    assert times.gathered_ns < hour_ns if hours < 0 else times.gathered_ns == 0


def test_draining_refuses_what_is_new_and_finishes_what_was_accepted() -> None:
    instance = GatedInstance()
    with crew(instance) as made:
        accepted = [submit(made, id=str(number))[1] for number in range(3)]
        instance.wait_begun()
        assert not made.drain(0)
        with pytest.raises(ServingError) as caught:
            submit(made, id="x")
        with pytest.raises(ServingError, match="Server is stopping"):
            made.submit_all([pending(), pending()])
        instance.gate.set()
        assert made.drain(LIMIT_S)
        assert [answers.ended for answers in accepted] == [1, 1, 1]
    assert caught.value.kind is Kind.UNAVAILABLE
    assert caught.value.message == (
        "[request id: x] Server is stopping, scheduler for model has stopped accepting new inference requests"
    )


def test_an_idle_crew_is_drained_at_once() -> None:
    with crew(EchoInstance()) as made:
        assert made.drain(0)


def test_closing_ends_the_threads_and_closes_each_instance_once() -> None:
    before = threading.active_count()
    instances = [EchoInstance(), EchoInstance()]
    with crew(*instances) as made:
        submit(made)[1].one()
        assert threading.active_count() == before + 2
    assert threading.active_count() == before
    assert [instance.closed for instance in instances] == [1, 1]


# -- rates

SHARED = [RateLimit((Resource("R", 1, everywhere=True),))]


def test_instances_of_two_crews_that_share_a_resource_run_one_after_the_other() -> None:
    limiter = RateLimiter({})
    first, second = GatedInstance(), GatedInstance()
    crews = [
        Crew(name, Fifo(), [instance], Ledger().finish, Ledger().withdraw, limiter, SHARED)
        for name, instance in (("a", first), ("b", second))
    ]
    running = submit(crews[0])[1]
    first.wait_begun()
    waiting = submit(crews[1])[1]
    crews[1].allow_inline(4)
    inline = submit(crews[1])[1]
    assert (crews[1].waiting, crews[1].inline_bytes, second.batches) == (2, -1, [])
    second.gate.set()
    first.gate.set()
    for answers in (running, waiting, inline):
        answers.one()
    for made in crews:
        assert made.drain(LIMIT_S)
        made.close()
    assert len(second.batches) == 2


def test_an_instance_of_priority_2_runs_half_as_often_while_both_have_work() -> None:
    limiter = RateLimiter({})
    order: list[str] = []

    def noting(name: str) -> ScriptedInstance:
        def script(batch: Sequence[InferRequest]) -> Sequence[Result]:
            order.append(name)
            return [EchoInstance().answer(sent) for sent in batch]

        return ScriptedInstance(script)

    held = limiter.enter("cuda:0", SHARED[0], lambda: None)
    assert limiter.take(held)
    crews = [
        Crew(name, Fifo(), [noting(name)], Ledger().finish, Ledger().withdraw, limiter, [limit])
        for name, limit in (("a", SHARED[0]), ("b", replace(SHARED[0], priority=2)))
    ]
    given = [submit(made)[1] for made in crews for _ in range(20)]
    limit_s = time.monotonic() + LIMIT_S
    while sum(turn.waits for turn in limiter._turns) < len(crews):
        assert time.monotonic() < limit_s
    limiter.give_back(held, ran=False)
    for answers in given:
        answers.one()
    for made in crews:
        assert made.drain(LIMIT_S)
        made.close()
    assert abs(order[:24].count("a") - 16) <= 1


def test_a_crew_that_has_closed_takes_part_no_more() -> None:
    limiter = RateLimiter({})
    more = [RateLimit((Resource("R", 2),))]
    Crew("m", Fifo(), [EchoInstance()], Ledger().finish, Ledger().withdraw, limiter, more).close()
    first, second = (limiter.enter("cpu", RateLimit((Resource("R", 1),)), lambda: None) for _ in range(2))
    assert (limiter.take(first), limiter.take(second)) == (True, False)


def test_a_limited_crew_closes_while_others_have_all_there_is() -> None:
    limiter = RateLimiter({})
    held = limiter.enter("cpu", SHARED[0], lambda: None)
    assert limiter.take(held)
    made = Crew("m", Fifo(), [EchoInstance()], Ledger().finish, Ledger().withdraw, limiter, SHARED)
    one, answers = submit(made)
    one.cancel(GONE)
    assert answers.error() is GONE
    made.close()
    limiter.give_back(held, ran=True)


def test_a_turn_that_comes_when_the_work_is_gone_is_given_back() -> None:
    limiter = RateLimiter({})
    woken = threading.Event()
    held = limiter.enter("cpu", SHARED[0], woken.set)
    assert limiter.take(held)
    with contextlib.closing(
        Crew("m", Fifo(), [EchoInstance()], Ledger().finish, Ledger().withdraw, limiter, SHARED)
    ) as made:
        one, answers = submit(made)
        limit_s = time.monotonic() + LIMIT_S
        while not any(turn.waits for turn in limiter._turns):
            assert time.monotonic() < limit_s
        one.cancel(GONE)
        answers.error()
        limiter.give_back(held, ran=True)  # the crew's turn comes, and it has nothing to run
        if not limiter.take(held):
            assert woken.wait(LIMIT_S)


def test_a_crew_that_cannot_run_leaves_nothing_behind() -> None:
    limiter = RateLimiter({("", "R"): 1})
    limits = [RateLimit((Resource("R", 1),)), RateLimit((Resource("R", 2),))]
    before = threading.active_count()
    with pytest.raises(ServingError, match="minimum required count is 2"):
        Crew("m", Fifo(), [EchoInstance(), EchoInstance()], Ledger().finish, Ledger().withdraw, limiter, limits)
    assert threading.active_count() == before
    assert limiter.take(limiter.enter("cpu", limits[0], lambda: None))


# -- instances that stream


def test_a_streaming_instance_has_as_many_requests_in_flight_as_it_allows() -> None:
    instance = StreamingInstance(max_in_flight=2)
    with crew(instance) as made:
        answers = [submit(made, id=str(number))[1] for number in range(3)]
        instance.wait_started(2)
        assert made.waiting == 1
        assert len(instance.started) == 2
        sent, reply, _ = instance.started[0]
        reply(instance.answer(sent))
        instance.wait_started(3)
        for sent, reply, _ in instance.started[1:]:
            reply(instance.answer(sent))
        for answer in answers:
            answer.one()


def test_a_streamed_request_ends_with_its_final_reply() -> None:
    instance = StreamingInstance()
    with crew(instance) as made:
        _, answers = submit(made, 1)
        instance.wait_started(1)
        sent, reply, _ = instance.started[0]
        reply(instance.answer(sent), final=False)
        reply(instance.answer(sent), final=False)
        assert not made.drain(0)
        reply(instance.answer(sent))
        assert made.drain(LIMIT_S)
        assert (len(answers.given), answers.ended) == (3, 1)


def test_a_streamed_request_is_counted_with_its_final_reply() -> None:
    instance, ledger = StreamingInstance(), Ledger()
    with crew(instance, ledger=ledger) as made:
        submit(made, 1)
        instance.wait_started(1)
        sent, reply, _ = instance.started[0]
        reply(instance.answer(sent), final=False)
        assert ledger.times == []
        reply(instance.answer(sent))
        assert made.drain(LIMIT_S)
    [times] = ledger.times
    assert (times.input_ns, times.output_ns) == (0, 0)
    assert times.infer_ns == times.ended_ns - times.started_ns > 0


@pytest.mark.parametrize(("device", "gpu"), [("cpu", NO_GPU), ("cuda:0", 0), ("cuda:11", 11)])
def test_an_execution_says_which_gpu_it_ran_on(device: str, gpu: int) -> None:
    def script(sent: InferRequest, reply: Reply, _cancelled: Cancelled) -> None:
        answer = EchoInstance().answer(sent)
        answer.computed = Phases(3, 40, 500) if sent.id else None
        reply(answer)

    def fail(batch: object) -> Sequence[Result]:
        raise ServingError(Kind.INTERNAL, "broken")

    ledger = Ledger()
    streaming = StreamingInstance(script=script)
    streaming.device = device
    with crew(streaming, ledger=ledger) as made:
        submit(made, 1, id="tells")[1].one()
        submit(made, 1)[1].one()
    for instance in (EchoInstance(device=device), ScriptedInstance(fail, device)):
        with crew(instance, ledger=ledger) as made:
            submit(made, 1)[1].one()
    assert [times.gpu for times in ledger.times] == [gpu] * 4


def test_the_phases_that_a_streamed_answer_tells_are_those_that_count() -> None:
    instance, ledger = StreamingInstance(), Ledger()
    with crew(instance, ledger=ledger) as made:
        submit(made, 1)
        instance.wait_started(1)
        sent, reply, _ = instance.started[0]
        answer = instance.answer(sent)
        answer.computed = Phases(3, 40, 500)
        reply(answer)
        assert made.drain(LIMIT_S)
    [times] = ledger.times
    assert (times.input_ns, times.infer_ns, times.output_ns) == (3, 40, 500)
    assert times.started_ns <= times.ended_ns


def test_a_start_that_raises_is_a_final_reply() -> None:
    def script(sent: InferRequest, reply: Reply, cancelled: Cancelled) -> None:
        raise RuntimeError("cannot start")

    with crew(StreamingInstance(script=script)) as made:
        errors = [submit(made)[1].error() for _ in range(3)]  # each frees its place for the next
    assert {error.message for error in errors} == {"model 'm' failed: RuntimeError: cannot start"}


def test_a_start_that_raises_after_its_final_reply_is_answered_once() -> None:
    def script(sent: InferRequest, reply: Reply, cancelled: Cancelled) -> None:
        reply(EchoInstance().answer(sent))
        raise RuntimeError("too late to matter")

    with crew(StreamingInstance(script=script)) as made:
        assert submit(made, 2)[1].values() == [2]
        assert submit(made, 3)[1].values() == [3]


def test_a_cancelled_request_that_streams_is_told() -> None:
    instance = StreamingInstance()
    with crew(instance) as made:
        one, _ = submit(made)
        instance.wait_started(1)
        _, reply, cancelled = instance.started[0]
        one.cancel(GONE)
        assert cancelled.reason is GONE
        reply(GONE)


def test_a_request_past_its_deadline_is_not_started() -> None:
    instance = StreamingInstance()
    with crew(instance) as made:
        assert submit(made, deadline_ns=1)[1].error().kind is Kind.DEADLINE
        submit(made, id="next")
        instance.wait_started(1)
        sent, reply, _ = instance.started[0]
        assert sent.id == "next"
        reply(instance.answer(sent))


# -- any order of events

STEPS = st.lists(st.sampled_from(["submit", "cancel newest", "cancel oldest", "late"]), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(
    scripts=st.lists(STEPS, min_size=1, max_size=4),
    instances=st.integers(1, 3),
    inline=st.booleans(),
    pairs=st.booleans(),
)
def test_every_request_is_answered_exactly_once_whatever_threads_do(
    scripts: list[list[str]], instances: int, inline: bool, pairs: bool
) -> None:
    class PairsOrOne(Fifo):
        def take(self, now_ns: int) -> list[Pending]:
            return super().take(now_ns) + (super().take(now_ns) if pairs else [])

    ready = threading.Barrier(len(scripts))
    accepted: list[list[tuple[Pending, Answers]]] = [[] for _ in scripts]
    ledger = Ledger()

    def play(number: int) -> None:
        ready.wait(LIMIT_S)
        for position, step in enumerate(scripts[number]):
            mine = accepted[number]
            if step in ("submit", "late"):
                late = 1 if step == "late" else 0
                mine.append(submit(made, number, position, id=f"{number}.{position}", deadline_ns=late))
            elif mine:
                mine[-1 if step == "cancel newest" else 0][0].cancel(GONE)

    echoes = [EchoInstance() for _ in range(instances)]
    with crew(*echoes, scheduler=PairsOrOne(), ledger=ledger) as made:
        made.allow_inline(4 if inline else -1)
        threads = [threading.Thread(target=play, args=(number,)) for number in range(len(scripts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT_S)
        assert made.drain(LIMIT_S)

    ran = [id for echo in echoes for batch in echo.batches for id in batch]
    every = [one for mine in accepted for one in mine]
    for one, answers in every:
        result = answers.one()
        times_run = ran.count(one.request.id)
        if isinstance(result, InferResponse):
            assert times_run == 1
            assert result.outputs[0].array.tolist() == one.request.inputs["X"].array.tolist()
        else:
            assert times_run == 0
            assert result.kind in (Kind.CANCELLED, Kind.DEADLINE)
    assert len(ran) + len(ledger.withdrawn) == len(every)


# -- started on the thread that submits


def test_what_starts_inline_is_never_queued() -> None:
    instance = StreamingInstance(max_in_flight=2**31)
    with crew(instance) as made:
        made.start_inline()
        answers = [submit(made, id=str(number))[1] for number in range(3)]
        assert ([sent.id for sent, _, _ in instance.started], made.waiting, made.running) == (["0", "1", "2"], 0, 3)
        for sent, reply, _ in instance.started:
            reply(instance.answer(sent))
        assert [answer.thread for answer in answers] == [threading.get_ident()] * 3
        assert (made.running, made.drain(LIMIT_S)) == (0, True)


def test_what_starts_inline_is_told_when_its_time_is_over() -> None:
    instance = StreamingInstance(max_in_flight=2**31)
    with crew(instance) as made:
        made.start_inline()
        sent = request()
        sent.deadline_ns = monotonic_ns() + 20_000_000
        one = pending(sent, answers := Answers())
        made.submit(one, 4)
        [(_, reply, cancelled)] = instance.started
        over = threading.Event()
        cancelled.watch(over.set)
        assert over.wait(LIMIT_S)
        assert cancelled.reason is not None
        reply(cancelled.reason)
        assert answers.error().kind is Kind.DEADLINE


def test_what_starts_inline_is_refused_when_nothing_more_is_accepted() -> None:
    with crew(StreamingInstance(max_in_flight=2**31)) as made:
        made.start_inline()
        assert made.drain(LIMIT_S)
        with pytest.raises(ServingError, match="has stopped accepting"):
            made.submit(pending(), 4)


def test_what_nobody_waits_for_any_more_does_not_start() -> None:
    instance = StreamingInstance(max_in_flight=2**31)
    with crew(instance) as made:
        made.start_inline()
        one = pending(reply=(answers := Answers()))
        one.cancelled.set(GONE)
        made.submit(one, 4)
        assert (answers.error(), instance.started) == (GONE, [])


# -- sequences: every request has its worker


def flows(slots: int = 2, workers: int = 1, idle_ns: int = 10**12) -> Sequencer:
    return Sequencer(SequencePolicy("m", slots, slots, False, idle_ns), workers, dict.fromkeys(DEPARTURES, 0))


def follow(
    to: Crew, flow: str, flags: str = "", *, size: int = 4, deadline_ns: int = 0, timeout_us: int = 0
) -> tuple[Pending, Answers]:
    """A request of sequence `flow`, whose id is both; `flags` are S for its first, E for its last."""
    answers = Answers()
    one = pending(request(id=flow + flags), answers)
    one.request.sequence = messages.Sequence(flow, "S" in flags, "E" in flags)
    one.request.deadline_ns = one.expires_ns = deadline_ns
    one.request.timeout_us = timeout_us
    to.submit(one, size)
    return one, answers


def test_a_sequence_stays_on_its_instance_though_another_is_idle() -> None:
    instances = [GatedInstance(), GatedInstance()]
    with crew(*instances, scheduler=flows(workers=2)) as made:
        given = [follow(made, flow, "S")[1] for flow in "ab"]
        for instance in instances:
            instance.wait_begun()
        given += [follow(made, "a", flags)[1] for flags in ("", "E")]
        instances[1].gate.set()
        given[1].one()
        assert made.waiting == 2
        instances[0].gate.set()
        for answers in given:
            answers.one()
    assert [instance.batches for instance in instances] == [[["aS"], ["a"], ["aE"]], [["bS"]]]


def test_a_short_request_of_a_sequence_runs_on_the_calling_thread_by_its_own_instance() -> None:
    instances = [EchoInstance(), EchoInstance()]
    with crew(*instances, scheduler=flows(workers=2)) as made:
        made.allow_inline(4)
        for flow, flags in (("a", "S"), ("b", "S"), ("a", ""), ("b", "E"), ("a", "E")):
            assert follow(made, flow, flags)[1].ended == 1
    assert [instance.batches for instance in instances] == [[["aS"], ["a"], ["aE"]], [["bS"], ["bE"]]]
    assert {*instances[0].threads, *instances[1].threads} == {threading.get_ident()}


def test_a_sequence_that_waits_for_a_slot_runs_once_one_is_free() -> None:
    instance = EchoInstance()
    with crew(instance, scheduler=flows(slots=1)) as made:
        follow(made, "a", "S")[1].one()
        waits = [follow(made, "b", flags)[1] for flags in ("S", "E")]
        assert made.waiting == 2
        follow(made, "a", "E")[1].one()
        for answers in waits:
            answers.one()
    assert instance.batches == [["aS"], ["aE"], ["bS"], ["bE"]]


def test_the_slot_of_an_idle_sequence_is_free_without_anything_else_happening() -> None:
    instance = EchoInstance()
    with crew(instance, scheduler=flows(slots=1, idle_ns=50_000_000)) as made:
        follow(made, "a", "S")[1].one()
        follow(made, "b", "SE")[1].one()
        with pytest.raises(ServingError, match="must specify the START flag"):
            follow(made, "a")
    assert instance.batches == [["aS"], ["bSE"]]


def test_cancelling_a_request_cancels_what_waits_of_its_sequence_and_frees_its_slot() -> None:
    instance, ledger = GatedInstance(), Ledger()
    with crew(instance, scheduler=flows(slots=1), ledger=ledger) as made:
        runs, running = follow(made, "a", "S")
        instance.wait_begun()
        waits, waiting = follow(made, "a")
        later = follow(made, "a", "E")[1]
        other = follow(made, "b", "SE")[1]
        waits.cancel(GONE)
        assert waiting.error() is GONE
        error = later.error()
        assert (error.kind, error.message) == (
            Kind.CANCELLED,
            "a request of sequence a was dropped, which ends the sequence",
        )
        assert not runs.cancelled
        instance.gate.set()
        running.one()
        other.one()
    assert instance.batches == [["aS"], ["bSE"]]
    assert [reason.kind for reason in ledger.withdrawn] == [Kind.CANCELLED, Kind.CANCELLED]


class Watched(Sequencer):
    """Says how many requests wait when a worker looks."""

    def __init__(self, policy: SequencePolicy) -> None:
        super().__init__(policy, 1, dict.fromkeys(DEPARTURES, 0))
        self.seen = 0
        self.looked = threading.Condition()

    def settle(self, now_ns: int) -> None:
        super().settle(now_ns)
        if threading.current_thread() is not threading.main_thread():
            with self.looked:
                self.seen = len(self)
                self.looked.notify()


def test_who_gets_the_slot_of_a_cancelled_sequence_runs_though_the_instance_sleeps() -> None:
    hour_ns = 3_600 * 10**9
    instance = EchoInstance()
    watched = Watched(SequencePolicy("m", 2, 2, True, 10 * hour_ns, delay_ns=hour_ns, utilization=1))
    with crew(instance, scheduler=watched) as made:
        for answers in [follow(made, flow, "S")[1] for flow in "ab"]:
            answers.one()
        watched.seen = 0
        late = pending(request(id="cSE"), answers := Answers())
        late.request.sequence = messages.Sequence("c", True, True)
        late.arrived_ns -= hour_ns
        made.submit(late, 4)
        waits, _ = follow(made, "a")
        with watched.looked:
            assert watched.looked.wait_for(lambda: watched.seen == 2, LIMIT_S)
        waits.cancel(GONE)  # for which the instance would have slept an hour
        answers.one()
    assert instance.batches == [["aS", "bS"], ["cSE"]]


def test_a_client_that_leaves_a_running_request_leaves_its_sequence() -> None:
    instance = GatedInstance()
    with crew(instance, scheduler=flows(slots=1)) as made:
        runs, _ = follow(made, "a", "S")
        instance.wait_begun()
        waiting = follow(made, "a")[1]
        other = follow(made, "b", "SE")[1]
        runs.cancel(GONE)
        assert waiting.error().kind is Kind.CANCELLED
        with pytest.raises(ServingError, match="must specify the START flag"):
            follow(made, "a")
        instance.gate.set()
        other.one()


def test_a_timeout_ends_the_whole_sequence_while_it_waits_for_a_slot() -> None:
    with crew(EchoInstance(), scheduler=flows(slots=1)) as made:
        follow(made, "a", "S")[1].one()
        waits = [follow(made, "b", "S", timeout_us=50_000)[1], follow(made, "b", "E")[1]]
        errors = [answers.error() for answers in waits]
        assert {(error.kind, error.message) for error in errors} == {
            (Kind.TIMED_OUT, "timeout of the corresponding sequence has been expired")
        }
        follow(made, "a", "E")[1].one()


def test_a_timeout_is_of_no_account_once_the_sequence_has_a_slot() -> None:
    begun, permits = threading.Semaphore(0), threading.Semaphore(0)

    def script(batch: Sequence[InferRequest]) -> Sequence[Result]:
        begun.release()
        assert permits.acquire(timeout=LIMIT_S)
        return [EchoInstance().answer(sent) for sent in batch]

    with crew(ScriptedInstance(script), scheduler=flows(slots=1)) as made:
        given = [follow(made, "a", "S")[1], follow(made, "a", "E")[1]]
        assert begun.acquire(timeout=LIMIT_S)
        given.append(follow(made, "b", "SE", timeout_us=100_000)[1])
        permits.release()
        assert begun.acquire(timeout=LIMIT_S)  # the end of a runs, so b has its slot
        expired = follow(made, "c", "SE", timeout_us=100_000)[1]
        assert expired.error().kind is Kind.TIMED_OUT  # by then, the time of b is over, too
        assert made.waiting == 1
        permits.release(2)
        for answers in given:
            answers.one()


def test_a_deadline_that_passes_in_the_queue_ends_the_sequence() -> None:
    instance = GatedInstance()
    with crew(instance, scheduler=flows(slots=1)) as made:
        first = follow(made, "a", "S")[1]
        instance.wait_begun()
        late = follow(made, "a", deadline_ns=time.monotonic_ns() + 50_000_000)[1]
        behind = follow(made, "a", "E")[1]
        assert (late.error().kind, behind.error().kind) == (Kind.DEADLINE, Kind.CANCELLED)
        instance.gate.set()
        first.one()


def test_a_request_that_is_too_late_when_it_is_taken_ends_its_sequence() -> None:
    class Slow(Sequencer):
        """Its place gives what is wanted no more by the time it runs."""

        def add(self, one: Pending, now_ns: int) -> None:
            super().add(one, now_ns)
            if one.request.id == "a":
                one.cancelled.set(GONE)

    instance = GatedInstance()
    policy = SequencePolicy("m", 1, 1, False, 10**12)
    with crew(instance, scheduler=Slow(policy, 1, dict.fromkeys(DEPARTURES, 0))) as made:
        first = follow(made, "a", "S")[1]
        instance.wait_begun()
        gone = follow(made, "a")[1]
        behind = follow(made, "a", "E")[1]
        instance.gate.set()
        first.one()
        assert gone.error() is GONE
        assert behind.error().kind is Kind.CANCELLED
    assert instance.batches == [["aS"]]


def test_draining_finishes_what_waits_for_a_slot_of_a_sequence_that_can_have_no_end() -> None:
    instance = EchoInstance()
    with crew(instance, scheduler=flows(slots=1)) as made:
        follow(made, "a", "S")[1].one()
        waits = [follow(made, flow, "S")[1] for flow in "bc"]
        assert made.waiting == 2
        assert made.drain(LIMIT_S)
        for answers in waits:
            answers.one()
    assert instance.batches == [["aS"], ["bS"], ["cS"]]


def test_a_sequence_that_starts_again_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with crew(EchoInstance(), scheduler=flows()) as made:
        follow(made, "a", "S")[1].one()
        follow(made, "a", "SE")[1].one()
    assert "model m: sequence a starts again without having ended" in caplog.text


def test_sequences_take_turns_where_rates_are_limited() -> None:
    limiter, ledger, instance = RateLimiter({}), Ledger(), EchoInstance()
    limit = RateLimit((Resource("R", 1),))
    made = Crew("m", flows(slots=1), [instance], ledger.finish, ledger.withdraw, limiter, [limit])
    try:
        given = [follow(made, flow, flags)[1] for flow in "ab" for flags in ("S", "E")]
        for answers in given:
            answers.one()
        assert made.drain(LIMIT_S)
    finally:
        made.close()
    assert instance.batches == [["aS"], ["aE"], ["bS"], ["bE"]]


class Sums(EchoInstance):
    """Y = the sum of all X of the sequence so far, kept by slot."""

    def __init__(self) -> None:
        super().__init__()
        self._sums: dict[int, float] = {}

    def answer(self, sent: InferRequest) -> InferResponse:
        place = sent.sequence
        assert place is not None
        total = float(sent.inputs["X"].array[0]) + (0 if place.start else self._sums[place.slot])
        self._sums[place.slot] = total
        return EchoInstance(total / float(sent.inputs["X"].array[0])).answer(sent)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("inline", [False, True])
def test_many_clients_share_few_slots_and_each_gets_its_own_sums(direct: bool, inline: bool) -> None:
    policy = SequencePolicy("m", 2, 2, direct, 10**12)
    instances = [Sums(), Sums()]
    found: dict[int, list[float]] = {}

    def client(number: int, to: Crew) -> None:
        for turn in range(5):
            flow, ahead = number * 10 + turn, []
            for position in range(6):
                answers = Answers()
                one = pending(request(number + 1.0), answers)
                one.request.sequence = messages.Sequence(flow, position == 0, position == 5)
                to.submit(one, 4)
                ahead.append(answers)
                if turn % 2:
                    answers.one()  # else the next one is sent without waiting
            found[flow] = [round(answers.values()[0], 3) for answers in ahead]

    with crew(*instances, scheduler=Sequencer(policy, 2, dict.fromkeys(DEPARTURES, 0))) as made:
        made.allow_inline(4 if inline else -1)
        threads = [threading.Thread(target=client, args=(number, made)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {
        number * 10 + turn: [(number + 1.0) * count for count in range(1, 7)]
        for number in range(8)
        for turn in range(5)
    }
