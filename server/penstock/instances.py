"""One worker thread per instance: take a batch, execute, reply; or execute on the thread that brought the request."""

import logging
import resource
import threading
from collections.abc import Callable, Sequence
from time import monotonic_ns

from penstock.errors import Kind, ServingError
from penstock.messages import InferResponse
from penstock.queueing import Pending, Scheduler
from penstock.runtime import PLENTY, Credit, Instance
from penstock.statistics import Execution

logger = logging.getLogger(__name__)

INLINE_LIMIT_NS = 100_000  # a hand-off to a worker and back was measured at 29 to 128 us per request
INLINE_ENDS_NS = 200_000  # INLINE_SLOW_RUNS longer than this, and the model goes to its workers from then on
INLINE_SLOW_RUNS = 3  # in a row: a single one is as likely a thread that lost its core as a model that became slow

# Both answer every request that they are given, and raise nothing.
Finish = Callable[[Sequence[Pending], Sequence[InferResponse | ServingError], Execution], None]
Withdrawn = Callable[[Pending, ServingError], None]


class Worker:
    """An instance, its thread and its place in the crew. All fields are owned by the crew's lock."""

    __slots__ = ("in_flight", "inline", "instance", "thread", "wake")

    def __init__(self, instance: Instance, lock: threading.Lock) -> None:
        self.instance = instance
        self.inline = False  # claimed by a thread that runs a request on it
        self.in_flight = 0  # requests that were started and have not had their final reply
        self.wake = threading.Condition(lock)
        self.thread: threading.Thread | None = None


class Crew:
    """The workers of one version, pulling from one scheduler.

    Owns the scheduler and who is idle, under one lock held for arithmetic only. An idle worker waits on its own
    condition, so that waking one can never wake another that has nothing to run with.

    Short models run *inline*: `submit` claims an idle worker's instance and executes on the calling thread, where
    `allow_inline` said that a hand-off would cost more than the run.
    """

    def __init__(
        self, name: str, scheduler: Scheduler, instances: Sequence[Instance], finish: Finish, withdrawn: Withdrawn
    ) -> None:
        self._name = name
        self._scheduler = scheduler
        self._finish = finish  # counts and replies for a batch that ran
        self._withdrawn = withdrawn  # counts and replies for a request that will not run
        self._lock = threading.Lock()
        self._done = threading.Condition(self._lock)
        self._unfinished = 0  # accepted, and not yet replied to for the last time
        self._draining = False
        self._closed = False
        self._slow_runs = 0  # inline, in a row
        self._inline_bytes = -1  # the largest request that may run inline; -1: none
        self._workers = [Worker(instance, self._lock) for instance in instances]
        self._idle = list(self._workers)
        for number, worker in enumerate(self._workers):
            worker.thread = threading.Thread(target=self._work, args=(worker,), name=f"{name}#{number}", daemon=True)
            worker.thread.start()

    @property
    def waiting(self) -> int:
        """How many requests are queued."""
        return len(self._scheduler)

    @property
    def draining(self) -> bool:
        """Whether nothing more is accepted."""
        return self._draining

    @property
    def inline_bytes(self) -> int:
        """The largest request, in bytes of its inputs, that runs on the submitting thread; -1 when none does."""
        return self._inline_bytes

    def allow_inline(self, request_bytes: int) -> None:
        """Run requests of at most `request_bytes` on the thread that submits them, while nobody waits."""
        self._inline_bytes = request_bytes

    def submit(self, pending: Pending, request_bytes: int) -> None:
        """Queue the request, or run it here and now. Raises ServingError if it cannot be accepted."""
        pending.holder = self
        claimed = None
        with self._lock:
            if self._draining:
                raise ServingError(
                    Kind.UNAVAILABLE,
                    f"[request id: {pending.request.id or '<id_unknown>'}] Server is stopping, "
                    "scheduler for model has stopped accepting new inference requests",
                )
            worker = self._idle.pop() if self._idle else None
            if worker and request_bytes <= self._inline_bytes and not len(self._scheduler):
                worker.inline = True
                claimed = worker
            else:
                try:
                    self._scheduler.add(pending, monotonic_ns())
                except ServingError:
                    if worker:
                        self._idle.append(worker)
                    raise
                if worker:
                    worker.wake.notify()
            self._unfinished += 1
        if claimed:
            self._run_inline(claimed, pending)

    def drop(self, pending: Pending) -> bool:
        """Forget a request that waits. False if it runs already, or ran."""
        with self._lock:
            dropped = self._scheduler.drop(pending)
        if dropped:
            assert pending.cancelled.reason is not None
            self._withdrawn(pending, pending.cancelled.reason)
            self._ended(1)
        return dropped

    def finished(self, worker: Worker, pending: Pending, result: InferResponse | ServingError, started_ns: int) -> None:
        """A request that the worker started has its final reply: count and send it, and free its place."""
        ended_ns = monotonic_ns()
        try:
            self._finish([pending], [result], Execution(started_ns, started_ns, ended_ns, ended_ns))
        finally:
            with self._lock:
                worker.in_flight -= 1
                worker.wake.notify()
            self._ended(1)

    def drain(self, timeout_s: float | None = None) -> bool:
        """Accept nothing more and wait until all that was accepted is answered. False when time ran out."""
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
            worker.instance.close()

    def _work(self, worker: Worker) -> None:
        while batch := self._next(worker):
            if worker.instance.streams:
                self._start(worker, batch)
            else:
                self._run(worker.instance, batch)
            del batch  # else its tensors would live until the next one comes

    def _next(self, worker: Worker) -> list[Pending]:
        """Wait for a batch; [] when the crew has closed. While it waits, the worker is idle or claimed."""
        with self._lock:
            while worker.inline or not self._closed:
                timeout_s = None
                if not worker.inline and worker.in_flight < worker.instance.max_in_flight:
                    now_ns = monotonic_ns()
                    batch = self._scheduler.take(now_ns)
                    if batch:
                        if worker in self._idle:
                            self._idle.remove(worker)
                        worker.in_flight += len(batch) if worker.instance.streams else 0
                        if self._idle and len(self._scheduler):
                            self._idle[-1].wake.notify()  # more may be due, and this worker is busy now
                        return batch
                    if worker not in self._idle:
                        self._idle.append(worker)
                    wake_ns = self._scheduler.wake_at(now_ns)
                    timeout_s = None if wake_ns is None else max(wake_ns - now_ns, 0) / 1e9
                worker.wake.wait(timeout_s)
            return []

    def _run_inline(self, worker: Worker, pending: Pending) -> None:
        elapsed_ns = 0
        before = _usage() if self._slow_runs else None
        try:
            elapsed_ns = self._run(worker.instance, [pending])
        finally:
            with self._lock:
                worker.inline = False
                if elapsed_ns <= INLINE_ENDS_NS:
                    self._slow_runs = 0
                elif before is None or _was_slow(before, _usage()):
                    self._slow_runs += 1
                if self._slow_runs == INLINE_SLOW_RUNS:
                    self._inline_bytes = -1
                    logger.info("model %s runs too long for the threads that bring its requests", self._name)
                if self._closed or len(self._scheduler):
                    worker.wake.notify()  # its own thread ends, or takes what has come meanwhile
                else:
                    self._idle.append(worker)

    def _run(self, instance: Instance, batch: list[Pending]) -> int:
        """Execute and reply; returns the nanoseconds that took."""
        started_ns = monotonic_ns()
        wanted = self._still_wanted(batch, started_ns)
        if not wanted:
            return 0
        try:
            results = instance.execute([pending.request for pending in wanted])
            if len(results) != len(wanted):
                raise ValueError(f"{len(results)} answers to {len(wanted)} requests")
        except Exception as error:  # noqa: BLE001 - whatever a runtime or user code raises fails this batch alone
            results = [_failure(error, wanted[0])] * len(wanted)
        ended_ns = monotonic_ns()
        if any(isinstance(result, ServingError) for result in results):
            times = Execution(started_ns, started_ns, ended_ns, ended_ns)
        else:
            times = Execution(started_ns, instance.inputs_ready_ns, instance.outputs_came_ns, ended_ns)
        try:
            self._finish(wanted, results, times)
        finally:
            self._ended(len(wanted))
        return ended_ns - started_ns

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
        wanted = []
        for pending in batch:
            deadline_ns = pending.request.deadline_ns
            if deadline_ns and now_ns > deadline_ns:
                late_ms = (now_ns - deadline_ns) / 1e6
                pending.cancelled.set(
                    ServingError(Kind.DEADLINE, f"the deadline passed {late_ms:.1f} ms before the request could run")
                )
            if pending.cancelled.reason is None:
                wanted.append(pending)
            else:
                self._withdrawn(pending, pending.cancelled.reason)
        if len(wanted) < len(batch):
            self._ended(len(batch) - len(wanted))
        return wanted

    def _ended(self, number: int) -> None:
        with self._lock:
            self._unfinished -= number
            if not self._unfinished:
                self._done.notify_all()


def _usage() -> resource.struct_rusage:
    """Of this thread."""
    return resource.getrusage(resource.RUSAGE_THREAD)


def _was_slow(before: resource.struct_rusage, after: resource.struct_rusage) -> bool:
    """Whether a long run was the model's doing: it computed long, or nothing else took its thread's core away."""
    computed_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return computed_s * 1e9 > INLINE_ENDS_NS or after.ru_nivcsw == before.ru_nivcsw


class _FinalReply:
    """The reply of a request that was started: passes all on, and frees the worker's place at the final one."""

    __slots__ = ("_crew", "_pending", "_started_ns", "_worker", "ended")

    def __init__(self, crew: Crew, worker: Worker, pending: Pending) -> None:
        self._crew = crew
        self._worker = worker
        self._pending = pending
        self._started_ns = monotonic_ns()
        self.ended = False  # the final reply was given

    def __call__(self, result: InferResponse | ServingError, final: bool = True, partial: bool = False) -> Credit:
        if not final:
            return self._pending.reply(result, final, partial)
        self.ended = True
        self._crew.finished(self._worker, self._pending, result, self._started_ns)
        return PLENTY


def _failure(error: Exception, pending: Pending) -> ServingError:
    """What a client is told of an exception: ServingError as it is, anything else as INTERNAL, logged in full."""
    if isinstance(error, ServingError):
        return error
    request = pending.request
    logger.error("model %s failed on request %s", request.model, request.id or "<id_unknown>", exc_info=error)
    return ServingError(Kind.INTERNAL, f"model '{request.model}' failed: {type(error).__name__}: {error}")
