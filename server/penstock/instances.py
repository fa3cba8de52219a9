"""One worker thread per instance: take a batch, execute, reply; or execute on the thread that brought the request."""

import logging
import resource
import threading
from collections.abc import Callable, Sequence, Sized
from time import monotonic_ns

from penstock.access import plain
from penstock.deadlines import Deadlines
from penstock.errors import Kind, ServingError
from penstock.messages import InferRequest, InferResponse
from penstock.model_config import RateLimit
from penstock.overruns import Overruns, Track
from penstock.queueing import Fifo, Pending, Place, Queue, Scheduler, Seating, Source
from penstock.rate import RateLimiter, Turn
from penstock.runtime import PLENTY, Cancelled, Credit, Instance, gpu_number
from penstock.statistics import Execution

logger = logging.getLogger(__name__)

INLINE_LIMIT_NS = 100_000  # a hand-off to a worker and back was measured at 29 to 128 us per request
INLINE_ENDS_NS = 200_000  # INLINE_SLOW_RUNS longer than this, and the model goes to its workers for a while
NEVER_NS = 2**63  # later than any time
LOOK_S = 0.1  # how late it is found that an instance which could run nothing can again: it tells nobody
INLINE_STALLS_NS = (
    20_000_000  # for another thread to let go of the interpreter, a run may wait 5 ms, or a few times that
)
INLINE_SLOW_RUNS = 3  # in a row: a single one is as likely a thread that lost its core as a model that became slow
INLINE_RESTS_NS = 10_000_000_000  # until a model may try again, twice as long each time: the machine was busy, perhaps
INLINE_RESTS_MOST_NS = 640_000_000_000

# Both answer every request that they are given, and raise nothing.
Finish = Callable[[Sequence[Pending], Sequence[InferResponse | ServingError], Execution], None]
Withdrawn = Callable[[Pending, ServingError], None]
Shaped = Callable[[InferRequest, InferResponse], InferResponse | ServingError]
# Is told of each response to a request: its place, what it is, nanoseconds since the one before or the start, and since
# the request arrived.
Responded = Callable[[int, InferResponse | ServingError, int, int], None]


class Worker:
    """An instance, its thread and its place in the crew. All fields are owned by the crew's lock."""

    __slots__ = (
        "gathered_ns", "gpu", "handed", "idle_ns", "in_flight", "inline", "instance", "place", "source", "thread",
        "track", "turn", "wake", "wakes_ns",
    )  # fmt: skip

    def __init__(
        self, instance: Instance, source: Source, place: Place | None, lock: threading.Lock, track: Track
    ) -> None:
        self.instance = instance
        self.gpu = gpu_number(instance.device)
        self.track = track  # of the runs that threads make on it which others wait for
        self.source = source  # which it takes its work from
        self.place = place  # the same, where it is this worker's alone
        self.inline = False  # claimed by a thread that runs a request on it
        self.handed: list[Pending] = []  # what ran too long there, to be run on this worker's own
        self.in_flight = 0  # requests that were started and have not had their final reply
        self.wake = threading.Condition(lock)
        self.wakes_ns = NEVER_NS  # when it wakes by itself, while it is idle
        self.idle_ns = 0  # since when it is; 0: it is not
        self.gathered_ns = 0  # how long its batch could have run before it did
        self.thread: threading.Thread | None = None
        self.turn: Turn | None = None  # which it needs for each batch, where rates are limited

    def rouse(self) -> None:
        """Let it look again at what there is to do."""
        with self.wake:
            self.wake.notify()


class Crew:
    """The workers of one version, pulling from one scheduler, or each from its place in one.

    Owns the scheduler and who is idle, under one lock held for arithmetic only. An idle worker waits on its own
    condition, so that waking one can never wake another that has nothing to run with.

    Short models run *inline*: `submit` claims an idle worker's instance and executes on the calling thread, where
    `allow_inline` said that a hand-off would cost more than the run.
    """

    def __init__(
        self,
        name: str,
        scheduler: Scheduler | Seating,
        instances: Sequence[Instance],
        finish: Finish,
        withdrawn: Withdrawn,
        limiter: RateLimiter | None = None,
        limits: Sequence[RateLimit] = (),
        shaped: Shaped = lambda _, response: response,
        responded: Responded | None = None,
        inline_rests_ns: int = INLINE_RESTS_NS,
    ) -> None:
        """With a `limiter`, each instance has one of the `limits`. Raises ServingError if it could never run."""
        self._name = name
        self._scheduler: Queue = scheduler
        self._finish = finish  # counts and replies for a batch that ran
        self.responded = responded
        self._withdrawn = withdrawn  # counts and replies for a request that will not run
        self.shaped = shaped  # an answer before the final one, as it leaves
        self._lock = threading.Lock()
        self._done = threading.Condition(self._lock)
        self._unfinished = 0  # accepted, and not yet replied to for the last time
        self._draining = False
        self._closed = False
        self._slow_runs = 0  # inline, in a row
        self._inline_bytes = -1  # the largest request that may run inline; -1: none
        self._resting_bytes = -1  # the same, while it is -1 for a time
        self._rests_until_ns = NEVER_NS
        self._rests_ns = inline_rests_ns  # the next time
        self._starts_inline = False
        self._deadlines = Deadlines(f"{name}-deadlines", self._expired)
        self._overruns = Overruns(f"{name}-overruns")
        self._pinned = isinstance(scheduler, Seating)  # each request has its worker
        self._in_turn = type(scheduler) is Fifo  # each leaves alone, and the first to come first
        self._waiting: Sized = scheduler.waiting if isinstance(scheduler, Fifo) else scheduler
        if isinstance(scheduler, Seating):
            self._workers = [
                Worker(instance, place, place, self._lock, self._overruns.track())
                for instance, place in zip(instances, scheduler.places, strict=True)
            ]
        else:
            self._workers = [
                Worker(instance, scheduler, None, self._lock, self._overruns.track()) for instance in instances
            ]
        self._limiter = limiter
        if limiter is not None:
            try:
                for worker, limit in zip(self._workers, limits, strict=True):
                    worker.turn = limiter.enter(worker.instance.device, limit, worker.rouse)
            except ServingError:
                for worker in self._workers:
                    if worker.turn is not None:
                        limiter.leave(worker.turn)
                raise
        self._idle = list(self._workers)
        for number, worker in enumerate(self._workers):
            worker.thread = threading.Thread(target=self._work, args=(worker,), name=f"{name}#{number}", daemon=True)
            worker.thread.start()

    @property
    def waiting(self) -> int:
        """How many requests are queued."""
        return len(self._scheduler)

    @property
    def running(self) -> int:
        """How many requests left the queue and have not been answered for the last time."""
        with self._lock:
            return self._unfinished - len(self._scheduler)

    @property
    def draining(self) -> bool:
        """Whether nothing more is accepted."""
        return self._draining

    @property
    def inline_bytes(self) -> int:
        """The largest request, in bytes of its inputs, that runs on the submitting thread; -1 when none does."""
        return self._inline_bytes

    def allow_inline(self, request_bytes: int) -> None:
        """Run requests of at most `request_bytes` on the thread that submits them, while nobody waits.

        Never where rates are limited: that thread cannot wait for its turn.
        """
        self._inline_bytes = request_bytes if self._limiter is None else -1

    def start_inline(self) -> None:
        """Start every request on the thread that submits it: for one instance that takes any number of them."""
        self._starts_inline = True

    def submit(self, pending: Pending, request_bytes: int) -> None:
        """Queue the request, or run it here and now. Raises ServingError if it cannot be accepted."""
        pending.holder = self
        if self._starts_inline:
            self._submit_started(pending)
            return
        claimed = None
        now_ns = pending.arrived_ns
        with self._lock:
            if self._draining:
                raise _stopping(pending)
            is_short = (
                request_bytes <= self._inline_bytes
                and pending.cancelled.reason is None
                and (not pending.expires_ns or now_ns < pending.expires_ns)
            )
            if is_short and self._in_turn and self._idle and not len(self._waiting):
                claimed = self._idle.pop()  # it would be added and taken at once
                claimed.inline = True
            else:
                self._scheduler.add(pending, now_ns)
                if is_short and len(self._scheduler) == 1:
                    claimed = self._claim(now_ns)
                if claimed is None:
                    self._queued(pending, now_ns)
            self._unfinished += 1
        if pending.warning:
            logger.warning("%s", pending.warning)
        if claimed:
            self._run_inline(claimed, pending)

    def _submit_started(self, pending: Pending) -> None:
        [worker] = self._workers
        with self._lock:
            if self._draining:
                raise _stopping(pending)
            self._unfinished += 1
            worker.in_flight += 1
            if pending.expires_ns:
                self._deadlines.add(pending, pending.expires_ns)
        self._start(worker, [pending])

    def _claim(self, now_ns: int) -> Worker | None:
        """An idle worker that may run the only request there is, which leaves the queue for it. Holds the lock."""
        for place in range(len(self._idle) - 1, -1, -1):
            worker = self._idle[place]
            if worker.source.take(now_ns):
                del self._idle[place]
                worker.inline = True
                return worker
            if not self._pinned:
                break
        return None

    def submit_all(self, parts: Sequence[Pending]) -> None:
        """Queue all of these, or none. Raises ServingError if one of them cannot be accepted."""
        with self._lock:
            if self._draining:
                raise _stopping(parts[0])
            for number, part in enumerate(parts):
                part.holder = self
                try:
                    self._scheduler.add(part, part.arrived_ns)
                except ServingError:
                    for queued in parts[:number]:
                        self._scheduler.drop(queued)
                    raise
            self._unfinished += len(parts)
            for part in parts:
                self._queued(part, part.arrived_ns)

    def _queued(self, pending: Pending, now_ns: int) -> None:
        """A request was added: see that it is looked at in time. Holds the lock."""
        if pending.expires_ns:
            self._deadlines.add(pending, pending.expires_ns)
        self._call_worker(now_ns)

    def _call_worker(self, now_ns: int) -> None:
        """Wake an idle worker if something is due now, or before one wakes by itself. Holds the lock."""
        if not self._idle:
            return
        if self._pinned:
            for worker in list(self._idle):
                due_ns = worker.source.wake_at(now_ns)
                if due_ns is not None and (due_ns <= now_ns or due_ns < worker.wakes_ns):
                    self._idle.remove(worker)
                    worker.wake.notify()
            return
        due_ns = self._idle[-1].source.wake_at(now_ns)
        if due_ns is not None and (due_ns <= now_ns or all(due_ns < worker.wakes_ns for worker in self._idle)):
            self._idle.pop().wake.notify()

    def drop(self, pending: Pending) -> bool:
        """Forget a request that waits, and what cannot run without it. False if it runs already, or ran."""
        with self._lock:
            dropped = self._take_out(pending)
        self._withdraw(dropped, pending)
        return pending in dropped

    def _take_out(self, pending: Pending) -> list[Pending]:
        """Drop it from the queue, and wake who can run what waited for its room. Holds the lock."""
        dropped = self._scheduler.drop(pending)
        if self._pinned:
            self._call_worker(monotonic_ns())
        return dropped

    def _withdraw(self, dropped: Sequence[Pending], cause: Pending) -> None:
        """Give what was dropped with `cause`, which was cancelled, its last reply."""
        assert cause.cancelled.reason is not None
        for pending in dropped:
            pending.cancelled.set(cause.desertion(cause.cancelled.reason))
            assert pending.cancelled.reason is not None  # this one, or its own client's, who has come first
            self._withdrawn(pending, pending.cancelled.reason)
        if dropped:
            self._ended(dropped)

    def finished(self, worker: Worker, pending: Pending, result: InferResponse | ServingError, started_ns: int) -> None:
        """A request that the worker started has its final reply: count and send it, and free its place."""
        ended_ns = monotonic_ns()
        told = result.computed if isinstance(result, InferResponse) else None
        if told is None:
            times = Execution(0, ended_ns - started_ns, 0, started_ns, ended_ns, 0, worker.gpu)
        else:
            times = Execution(told.input_ns, told.infer_ns, told.output_ns, started_ns, ended_ns, 0, worker.gpu)
        try:
            self._finish([pending], [result], times)
        finally:
            with self._lock:
                worker.in_flight -= 1
                if not self._starts_inline:
                    worker.wake.notify()
            self._ended([pending])

    def _expired(self, pending: Pending, now_ns: int) -> None:
        """The time of a request has run out: that in the queue, or the client's, which ends what runs as well."""
        reason = pending.lateness(now_ns)
        is_over = reason.kind is Kind.DEADLINE
        with self._lock:
            # What had a time in the queue may wait on without one, once it has come further.
            dropped = self._take_out(pending) if is_over or 0 < pending.expires_ns <= now_ns else []
        if dropped or is_over:
            pending.cancelled.set(reason)
            self._withdraw(dropped, pending)
        elif pending.request.deadline_ns:
            self._deadlines.add(pending, pending.request.deadline_ns)

    def seal(self) -> None:
        """The end is near: sequences that are idle give their slots to those that wait for one."""
        with self._lock:
            for worker in self._workers:
                if worker.place is not None:
                    worker.place.seal()
            if self._pinned:
                self._call_worker(monotonic_ns())

    def drain(self, timeout_s: float | None = None) -> bool:
        """Accept nothing more and wait until all that was accepted is answered. False when time ran out."""
        self.seal()
        with self._lock:
            self._draining = True
            return self._done.wait_for(lambda: self._unfinished == 0, timeout_s)

    def close(self) -> None:
        """End the threads and close the instances, each once it has finished what it runs. Call `drain` first."""
        with self._lock:
            self._draining = self._closed = True
            for worker in self._workers:
                worker.wake.notify()
        for worker in self._workers:
            assert worker.thread is not None
            worker.thread.join()
            if worker.turn is not None and self._limiter is not None:
                self._limiter.leave(worker.turn)
            worker.instance.close()
        self._deadlines.close()
        self._overruns.close()

    def _work(self, worker: Worker) -> None:
        while batch := self._next(worker):
            if worker.instance.streams:
                self._start(worker, batch)
            else:
                self._run(worker, batch)
            del batch  # else its tensors would live until the next one comes
            if self._rests_until_ns < NEVER_NS:
                self._rest_no_more()
            if worker.place is not None:
                with self._lock:
                    worker.place.done(monotonic_ns())
            if worker.turn is not None and self._limiter is not None:
                with self._lock:
                    now_ns = monotonic_ns()
                    due_ns = worker.source.wake_at(now_ns)
                self._limiter.give_back(worker.turn, ran=True, again=due_ns is not None and due_ns <= now_ns)

    def _next(self, worker: Worker) -> list[Pending]:
        """Wait for a batch; [] when the crew has closed."""
        while (batch := self._wait(worker)) is None:
            assert worker.turn is not None
            assert self._limiter is not None
            self._limiter.give_back(worker.turn, ran=False)  # without the lock: it wakes workers of other crews
        return batch

    def _wait(self, worker: Worker) -> list[Pending] | None:
        """As `_next`; None where it has a turn and nothing to run. While it waits, the worker is idle or claimed."""
        with self._lock:
            while worker.inline or not self._closed:
                timeout_s = None
                if worker.handed:
                    batch, worker.handed, worker.gathered_ns = worker.handed, [], 0
                    return batch
                # One that can run nothing just now still takes one, and answers it if that does not change soon.
                if not worker.inline and worker.in_flight < max(1, worker.instance.max_in_flight):
                    now_ns = monotonic_ns()
                    if worker.turn is None:
                        batch = worker.source.take(now_ns)
                    else:
                        batch = self._take_in_turn(worker.source, worker.turn, now_ns)
                        if not batch and worker.turn.granted:
                            return None
                    if batch:
                        worker.gathered_ns = 0
                        if worker.idle_ns:
                            since_ns = max(worker.idle_ns, min(pending.arrived_ns for pending in batch))
                            worker.gathered_ns = max(0, now_ns - since_ns)
                            worker.idle_ns = 0
                        if worker in self._idle:
                            self._idle.remove(worker)
                        worker.in_flight += len(batch) if worker.instance.streams else 0
                        self._call_worker(now_ns)  # more may be due, and this worker is busy now
                        return batch
                    if worker not in self._idle:
                        self._idle.append(worker)
                    worker.idle_ns = worker.idle_ns or now_ns
                    wake_ns = worker.source.wake_at(now_ns)
                    if worker.turn is not None and wake_ns is not None and wake_ns <= now_ns:
                        wake_ns = None  # its turn has not come: the limiter wakes it
                    worker.wakes_ns = NEVER_NS if wake_ns is None else wake_ns
                    timeout_s = None if wake_ns is None else max(wake_ns - now_ns, 0) / 1e9
                elif not worker.instance.max_in_flight:
                    timeout_s = LOOK_S
                worker.wake.wait(timeout_s)
            return []

    def _take_in_turn(self, source: Source, turn: Turn, now_ns: int) -> list[Pending]:
        """What is due, if the limiter lets the instance run. Holds the lock."""
        assert self._limiter is not None
        due_ns = source.wake_at(now_ns)
        if due_ns is None or due_ns > now_ns or not self._limiter.take(turn):
            return []
        return source.take(now_ns)

    def _run_inline(self, worker: Worker, pending: Pending) -> None:
        """Execute and reply, here and now; but hand to the worker what is ended because others wait for this thread."""
        handed = False
        before = _usage() if self._slow_runs else None
        instance, track = worker.instance, worker.track
        started_ns = ended_ns = monotonic_ns()
        guard = self._overruns.begin(track, started_ns)
        try:
            try:
                [result] = instance.execute([pending.request], guard)
            except Exception as error:  # noqa: BLE001 - as in `_run`
                if guard:
                    handed = True
                else:
                    result = _failure(error, pending)
            ended_ns = monotonic_ns()
            if not handed:
                ready_ns, came_ns = instance.inputs_ready_ns, instance.outputs_came_ns
                if isinstance(result, ServingError):
                    ready_ns, came_ns = started_ns, ended_ns
                times = Execution(
                    ready_ns - started_ns, came_ns - ready_ns, ended_ns - came_ns, started_ns, ended_ns, 0, worker.gpu
                )
                self._finish((pending,), (result,), times)
        finally:
            track.since_ns = 0
            elapsed_ns = ended_ns - started_ns
            with self._lock:
                worker.inline = False
                if handed:
                    worker.handed = [pending]
                    if pending.expires_ns:
                        self._deadlines.add(pending, pending.expires_ns)
                    self._stop_inline(ended_ns)
                else:
                    self._unfinished -= 1
                    if self._draining and not self._unfinished:
                        self._done.notify_all()
                    if worker.place is not None:
                        worker.place.done(monotonic_ns())
                    if elapsed_ns <= INLINE_ENDS_NS:
                        self._slow_runs = 0
                    elif before is None or _was_slow(before, _usage(), elapsed_ns):
                        self._slow_runs += 1
                        if self._slow_runs == INLINE_SLOW_RUNS:
                            self._stop_inline(ended_ns)
                if self._closed or handed or len(self._waiting):
                    worker.wake.notify()  # its own thread ends, or looks at what there is to do
                else:
                    self._idle.append(worker)
                    worker.idle_ns = monotonic_ns()

    def _stop_inline(self, now_ns: int) -> None:
        """Run nothing inline for a while, each time for longer. Holds the lock."""
        self._slow_runs = 0
        if self._inline_bytes < 0:
            return  # another thread's run has said so
        logger.info(
            "model %s ran too long for the threads that bring its requests: only its workers run it for %.0f s",
            self._name,
            self._rests_ns / 1e9,
        )
        self._resting_bytes, self._inline_bytes = self._inline_bytes, -1
        self._rests_until_ns = now_ns + self._rests_ns
        self._rests_ns = min(2 * self._rests_ns, INLINE_RESTS_MOST_NS)

    def _rest_no_more(self) -> None:
        with self._lock:
            if monotonic_ns() >= self._rests_until_ns:
                self._inline_bytes, self._rests_until_ns = self._resting_bytes, NEVER_NS

    def _run(self, worker: Worker, batch: list[Pending]) -> None:
        """Execute and reply."""
        started_ns = monotonic_ns()
        first = batch[0]
        if len(batch) == 1 and first.cancelled.reason is None and started_ns < (first.expires_ns or NEVER_NS):
            wanted, requests = batch, [first.request]
        elif wanted := self._still_wanted(batch, started_ns):
            requests = [pending.request for pending in wanted]
        else:
            return
        instance = worker.instance
        try:
            results = instance.execute(requests, _unwanted(wanted))
            if len(results) != len(wanted):
                raise ValueError(f"{len(results)} answers to {len(wanted)} requests")
        except Exception as error:  # noqa: BLE001 - whatever a runtime or user code raises fails this batch alone
            if all(pending.cancelled for pending in wanted):  # then it ended as it was told to
                results = [pending.cancelled.reason or _failure(error, pending) for pending in wanted]
            else:
                results = [_failure(error, *wanted)] * len(wanted)
        ended_ns = monotonic_ns()
        ready_ns, came_ns = instance.inputs_ready_ns, instance.outputs_came_ns
        if isinstance(results[0], ServingError) or (
            len(results) > 1 and any(isinstance(result, ServingError) for result in results)
        ):
            ready_ns, came_ns = started_ns, ended_ns
        times = Execution(
            ready_ns - started_ns, came_ns - ready_ns, ended_ns - came_ns, started_ns, ended_ns, worker.gathered_ns,
            worker.gpu,
        )  # fmt: skip
        try:
            self._finish(wanted, results, times)
        finally:
            self._ended(wanted)

    def _start(self, worker: Worker, batch: list[Pending]) -> None:
        wanted = self._still_wanted(batch, monotonic_ns())
        with self._lock:
            worker.in_flight -= len(batch) - len(wanted)
        for pending in wanted:
            reply = _FinalReply(self, worker, pending)
            try:
                worker.instance.start(pending.request, reply, pending.cancelled)
            except Exception as error:  # noqa: BLE001 - as above
                failure = _failure(error, pending)
                if not reply.ended:
                    reply(failure)

    def _still_wanted(self, batch: list[Pending], now_ns: int) -> list[Pending]:
        """Those of the batch that somebody waits for; the others get their last reply here."""
        wanted, unwanted = [], []
        for pending in batch:
            if pending.expires_ns and now_ns >= pending.expires_ns:
                pending.cancelled.set(pending.lateness(now_ns))
            if pending.cancelled.reason is None:
                wanted.append(pending)
            else:
                self._withdrawn(pending, pending.cancelled.reason)
                unwanted.append(pending)
        if unwanted:
            self._ended(unwanted)
        if self._pinned:
            for pending in unwanted:
                with self._lock:
                    dropped = self._take_out(pending)
                self._withdraw(dropped, pending)
        return wanted

    def _ended(self, answered: Sequence[Pending]) -> None:
        for pending in answered:
            if pending.expires_ns or pending.request.timeout_us:
                self._deadlines.forget(pending)
        with self._lock:
            self._unfinished -= len(answered)
            if self._draining and not self._unfinished:
                self._done.notify_all()


def _usage() -> resource.struct_rusage:
    """Of this thread."""
    return resource.getrusage(resource.RUSAGE_THREAD)


def _was_slow(before: resource.struct_rusage, after: resource.struct_rusage, elapsed_ns: int) -> bool:
    """Whether a long run was the model's doing: it computed long, or it waited so long as nothing here lets it wait."""
    computed_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    waited = elapsed_ns > INLINE_STALLS_NS and after.ru_nivcsw == before.ru_nivcsw
    return computed_s * 1e9 > INLINE_ENDS_NS or waited


def _stopping(pending: Pending) -> ServingError:
    return ServingError(
        Kind.UNAVAILABLE,
        f"[request id: {pending.request.id or '<id_unknown>'}] Server is stopping, "
        "scheduler for model has stopped accepting new inference requests",
    )


def _unwanted(batch: Sequence[Pending]) -> Cancelled:
    """Set once no request of the batch is wanted any more. Watches one of those that are, and then the next."""
    if len(batch) == 1:
        return batch[0].cancelled
    unwanted = Cancelled()
    waiting = iter(batch)

    def watch_next() -> None:
        for pending in waiting:
            if not pending.cancelled:
                pending.cancelled.watch(watch_next)
                return
        unwanted.set(ServingError(Kind.CANCELLED, "no request of the batch is wanted any more"))

    watch_next()
    return unwanted


class _FinalReply:
    """The reply of a request that was started: passes all on, and frees the worker's place at the final one."""

    __slots__ = ("_crew", "_last_ns", "_pending", "_place", "_started_ns", "_worker", "ended")

    def __init__(self, crew: Crew, worker: Worker, pending: Pending) -> None:
        self._crew = crew
        self._worker = worker
        self._pending = pending
        self._started_ns = self._last_ns = monotonic_ns()
        self._place = 0  # of the next response
        self.ended = False  # the final reply was given

    def __call__(self, result: InferResponse | ServingError, final: bool = True, partial: bool = False) -> Credit:
        if self._crew.responded is not None and not partial:
            came_ns = monotonic_ns()
            since_ns = came_ns - self._pending.arrived_ns
            self._crew.responded(self._place, result, came_ns - self._last_ns, since_ns)
            self._place, self._last_ns = self._place + 1, came_ns
        if not final:
            if isinstance(result, InferResponse):
                result = self._crew.shaped(self._pending.request, result)
            return self._pending.reply(result, final, partial)
        self.ended = True
        self._crew.finished(self._worker, self._pending, result, self._started_ns)
        return PLENTY


def _failure(error: Exception, *batch: Pending) -> ServingError:
    """What the clients of a batch are told of an exception: ServingError as it is, anything else as INTERNAL.

    That is logged under the id of each request, and once in full.
    """
    if isinstance(error, ServingError):
        # Its frames hold the batch and, as it is kept there among the results, itself: until a collection.
        return error.with_traceback(None)
    for pending in batch:
        request = pending.request
        id = plain(request.id or "<id_unknown>")
        cause = error if pending is batch[0] else None
        logger.error("model %s failed on request %s", request.model, id, exc_info=cause, extra=request.names)
    return ServingError(Kind.INTERNAL, f"model '{request.model}' failed: {type(error).__name__}: {error}")
