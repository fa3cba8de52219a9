"""Claims jobs, runs them on the engine, and records how they ended."""

import asyncio
import contextlib
import functools
import logging
import os
import platform
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import orjson
from msgspec import Struct
from msgspec.structs import replace

from penstock import oip_json
from penstock.access import Visit, plain
from penstock.engine import Engine
from penstock.errors import Kind, ServingError, WorkerLostError
from penstock.job_api.endpoints import is_endpoint
from penstock.job_api.inputs import Prepared, is_handler, prepare
from penstock.job_api.journal import Journal
from penstock.job_api.store import Claim, Job, JobStore, Request, State, Sweep
from penstock.messages import JobContext
from penstock.model import Model

logger = logging.getLogger(__name__)

T = TypeVar("T")

LEASE_MS = 15_000  # how long after its process was killed a job is known to be lost
RENEW_S = LEASE_MS / 3000
TICK_S = 1.0  # how late what time brings may be done
LOOK_S = 10.0  # how late a job is found that nobody told of
REPLACED_S = 0.1  # how late it is found that a process that runs jobs was replaced
PAUSE_S = 1.0  # before what failed for a while is tried again
SAVE_PAUSES_S = (0.1, 0.5, 2.0, 5.0)  # between attempts to record a result while the store cannot be reached
PENDING_CHUNKS = 32  # that may wait to be recorded before their producer does
SEQUENCES_AT_HAND = 64  # jobs of sequences that may wait here for a slot of their model

# What becomes of a job whose run failed; of any other kind, it is FAILED.
ENDS = {
    Kind.TIMED_OUT: State.TIMED_OUT,
    Kind.DEADLINE: State.TIMED_OUT,
    Kind.CANCELLED: State.CANCELLED,
}


class Sizes(Struct, frozen=True):
    """Limits in bytes on a job's input and its result."""

    run: int
    runsync: int  # of a job that somebody waits for
    chunk: int = 1_000_000

    def of(self, id: str) -> int:
        return self.runsync if id.startswith("sync-") else self.run


class Running(Struct):
    """A job under way here."""

    job: Job
    task: "asyncio.Task[Job | None]"


class _SupersededError(Exception):
    """The job is final, or somebody else's: what is still to be said about it counts for nothing."""


class Worker:
    """Runs jobs of the models that this process serves. Lives on one event loop, which owns all its state.

    A slot is a place for a job of an endpoint, as many as its model keeps busy: taken before a job is claimed, and free
    again when it has ended or went elsewhere.
    """

    def __init__(
        self,
        engine: Engine,
        store: JobStore,
        sizes: Sizes,
        limits: oip_json.Limits,
        journal: Journal,
        due: Callable[[], None],
    ) -> None:
        """`due` is called when a webhook may be due."""
        self.name = f"{platform.node() or 'worker'}-{os.getpid()}-{secrets.token_hex(3)}"
        self._engine = engine
        self._store = store
        self._sizes = sizes
        self._limits = limits
        self._journal = journal
        self._due = due
        self._running: dict[str, Running] = {}
        self._taken: Counter[str] = Counter()  # slots by endpoint
        self._full: set[str] = set()  # endpoints whose jobs may wait for want of a slot
        self._paused: set[str] = set()  # endpoints that could not be served a moment ago
        self._replacing = False  # an endpoint has fewer slots than it will have, for a process of it is being replaced
        self._changed = asyncio.Event()  # there may be slots that there were not
        self._loops: list[asyncio.Task[None]] = []
        self._unwatch: Callable[[], None] = lambda: None
        self._stopping = False

    # -- slots

    def running(self, endpoint: str) -> int:
        """How many jobs of an endpoint run here."""
        return self._taken[endpoint]

    def reserve(self, endpoint: str, capacity: int) -> Claim | None:
        """Take a slot for a job that is about to be added, and claimed with that; None if there is none."""
        if self._stopping or endpoint in self._full or endpoint in self._paused or self._taken[endpoint] >= capacity:
            return None
        self._taken[endpoint] += 1
        return Claim(self.name, LEASE_MS, capacity - self._taken[endpoint])

    def release(self, endpoint: str, slots: int = 1) -> None:
        """Give slots back."""
        self._taken[endpoint] -= slots
        if endpoint in self._full:
            self._changed.set()

    def _free(self) -> dict[str, int]:
        """Take half of the free slots of each endpoint that is served; what is not claimed with them is given back.

        The other half stays for jobs that are claimed as they are added, or they would all have to wait in the queue
        while the store is asked what waits there.
        """
        free = {}
        self._full.clear()
        self._replacing = False
        for model in {model.name: model for model in self._engine.lifecycle.models()}.values():
            if model.name not in self._paused and is_endpoint(model.name):
                slots = capacity(model) - self._taken[model.name]
                self._replacing |= model.ready_workers < model.workers
                if slots > 0:
                    free[model.name] = (slots + 1) // 2
                else:
                    self._full.add(model.name)
        self._taken.update(free)
        return free

    # -- running

    async def start(self) -> None:
        """Take up what an earlier process left, and begin to claim. Raises ServingError where the store fails."""
        loop = asyncio.get_running_loop()
        self._after(await self._store.recover(_now_ms()))

        def models_changed() -> None:
            loop.call_soon_threadsafe(self._changed.set)

        self._unwatch = self._engine.lifecycle.watch(models_changed)
        self._loops = [
            asyncio.create_task(self._forever("claiming", self._claim)),
            asyncio.create_task(self._forever("renewing leases", self._renew)),
            asyncio.create_task(self._forever("sweeping", self._tick)),
        ]

    async def stop(self, grace_s: float) -> None:
        """Claim no more, let running jobs end, put back those that have not after `grace_s`."""
        self._stopping = True
        self._unwatch()
        claiming, renewing, sweeping = self._loops
        for loop in (claiming, sweeping):
            loop.cancel()
        await asyncio.gather(claiming, sweeping, return_exceptions=True)
        if self._running:
            await asyncio.wait([running.task for running in self._running.values()], timeout=grace_s)
        renewing.cancel()
        await asyncio.gather(renewing, return_exceptions=True)
        left = list(self._running.values())
        for running in left:
            running.task.cancel()
        await asyncio.gather(*(running.task for running in left), return_exceptions=True)
        if left:
            await self._store.release({running.job.request.id: running.job.attempt for running in left}, _now_ms())

    def begin(self, job: Job, prepared: Prepared | None = None) -> "asyncio.Task[Job | None]":
        """Run a claimed job whose slot is taken. The task gives the job as it ended here; None if it did elsewhere."""
        id = job.request.id
        logger.debug("job begins, attempt %d", job.attempt, extra=job.request.names)
        task = asyncio.create_task(self._run(job, prepared))
        self._running[id] = Running(job, task)
        task.add_done_callback(functools.partial(self._ended, job))
        return task

    def drop(self, id: str) -> None:
        """Stop running a job that has ended otherwise: cancelled, expired, or claimed by another."""
        running = self._running.get(id)
        if running is not None:
            running.task.cancel()

    def _ended(self, job: Job, task: "asyncio.Task[Job | None]") -> None:
        del self._running[job.request.id]
        self.release(job.request.endpoint)
        if not task.cancelled() and (error := task.exception()) is not None:
            # Its lease lapses, and it runs again: nothing was recorded.
            logger.error("how the job ended could not be recorded", exc_info=error, extra=job.request.names)

    async def _run(self, job: Job, prepared: Prepared | None) -> Job | None:
        request = job.request
        limit_ms = request.execution_timeout_ms
        state, output, error = State.COMPLETED, None, None
        try:
            async with asyncio.timeout(limit_ms / 1000):
                output = await self._execute(job, prepared)
        except _SupersededError:
            return None
        except TimeoutError:
            state, error = State.TIMED_OUT, f"execution exceeded {limit_ms} ms"
        except WorkerLostError as lost:
            return await self._lost(job, lost)
        except ServingError as failure:
            if failure.kind is Kind.UNAVAILABLE:
                await self._unavailable(job, failure)
                return None
            state, error = ENDS.get(failure.kind, State.FAILED), failure.message
        except Exception as bug:
            logger.error("job failed", exc_info=bug, extra=request.names)
            state, error = State.FAILED, f"{type(bug).__name__}: {bug}"
        limit = self._sizes.of(request.id)
        if output is not None and len(output) > limit:
            state, error = State.FAILED, f"the result has {len(output)} bytes, the limit is {limit}"
            output = None
        return await self._finish(job, state, output, error)

    async def _execute(self, job: Job, prepared: Prepared | None) -> bytes:
        """The job's output as JSON. Raises ServingError."""
        request = job.request
        if prepared is None:
            model = self._engine.model(request.endpoint)
            context = JobContext(request.id, request.passed, request.request_id)
            prepared = prepare(model, orjson.loads(request.input), request.input, context, self._limits)
        if prepared.model.streams:
            return await self._stream(job, prepared)
        return prepared.write(await self._engine.infer(prepared.model, prepared.request))

    async def _stream(self, job: Job, prepared: Prepared) -> bytes:
        """Record progress and chunks as they come. A handler says itself what its output is; else, all chunks are."""
        recorder = Recorder(self._store, job, self._sizes.chunk)
        handler = is_handler(prepared.model)
        chunks: list[bytes] = []
        last = b"[]" if handler else b"null"
        try:
            async with contextlib.aclosing(self._engine.stream(prepared.model, prepared.request)) as replies:
                async for replied in replies:
                    text = prepared.write(replied.response) if replied.response.outputs else b""
                    if replied.partial:
                        recorder.progress(text)
                    elif replied.final and (handler or not chunks):
                        last = text or last
                    elif text:
                        if not handler:
                            chunks.append(text)
                        await recorder.chunk(text)
        finally:
            await recorder.flush()
        return b"[" + b",".join(chunks) + b"]" if chunks else last

    # -- recording

    async def _finish(self, job: Job, state: State, output: bytes | None, error: str | None) -> Job | None:
        request, finished_ms = job.request, _now_ms()
        finish = self._store.finish
        if not await _saved(request, lambda: finish(request.id, job.attempt, state, finished_ms, output, error)):
            return None
        text = f"{state.value} after {finished_ms - job.started_ms} ms" + (f": {error}" if error else "")
        self._note(request, finished_ms, "error" if error else "info", text)
        self._visited(job, state, finished_ms, len(output or b""))
        if request.webhook:
            self._due()
        return replace(job, state=state, finished_ms=finished_ms, output=output, error=error, progress=None)

    async def _lost(self, job: Job, lost: WorkerLostError) -> Job | None:
        request, now_ms, held = job.request, _now_ms(), {job.request.id: job.attempt}
        self._note(request, now_ms, "error", lost.message, logging.WARNING)
        if not lost.blamed:
            await _saved(request, lambda: self._store.release(held, now_ms))
            return None
        stands = await _saved(request, lambda: self._store.lose(held, lost.message, now_ms))
        self._due()
        if not stands or not stands[0].state.is_final:
            return None
        self._visited(job, stands[0].state, now_ms, 0)
        return stands[0]

    async def _unavailable(self, job: Job, failure: ServingError) -> None:
        """The model cannot take the job now: it waits again, at the head of the queue, and a moment passes."""
        request = job.request
        self._note(request, _now_ms(), "warning", f"put back: {failure.message}")
        if request.endpoint not in self._paused:
            self._paused.add(request.endpoint)
            asyncio.get_running_loop().call_later(PAUSE_S, self._resume, request.endpoint)
        await _saved(request, lambda: self._store.release({request.id: job.attempt}, _now_ms()))

    def _note(self, request: Request, at_ms: int, level: str, text: str, logged: int = logging.DEBUG) -> None:
        """Say what happened to a job: at this level in the journal, and at that in the log."""
        self._journal.note(request.endpoint, at_ms, level, request.id, text)
        logger.log(logged, "job %s", plain(text), extra=request.names)

    def _visited(self, job: Job, state: State, finished_ms: int, output_bytes: int) -> None:
        """Write the line of the access log about a run that ended the job, where that is on."""
        if self._engine.settings.access_log:
            request = job.request
            size = len(request.input)
            visit = Visit("job", "run", "", request.request_id, request.endpoint, request_bytes=size, job=request.id)
            visit.write(state.value, output_bytes, finished_ms - job.started_ms)

    def _resume(self, endpoint: str) -> None:
        self._paused.discard(endpoint)
        self._changed.set()

    # -- loops

    async def _forever(self, what: str, step: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await step()
            except ServingError as error:
                logger.error("jobs: %s failed: %s", what, error.message)
                await asyncio.sleep(PAUSE_S)
            except Exception as bug:
                logger.error("jobs: %s failed", what, exc_info=bug)
                await asyncio.sleep(PAUSE_S)

    async def _claim(self) -> None:
        """Claim what there are slots for; where nothing waits, wait for work or for a slot."""
        tick = self._store.tick
        self._changed.clear()
        free = self._free()
        begun: Counter[str] = Counter()
        try:
            claimed = await self._store.claim(free, self.name, _now_ms(), LEASE_MS) if free else ()
            for job in claimed:
                begun[job.request.endpoint] += 1
                self.begin(job)
        finally:
            self._taken.subtract(Counter(free) - begun)
        if claimed:
            return
        waits: list[asyncio.Future[Any]] = [asyncio.ensure_future(self._changed.wait())]
        if free:
            waits.append(asyncio.ensure_future(self._store.wait_work(list(free), LOOK_S, tick)))
        try:
            timeout_s = REPLACED_S if self._replacing else LOOK_S
            done, _ = await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            for wait in done:
                wait.result()
        finally:
            for wait in waits:
                wait.cancel()

    async def _renew(self) -> None:
        await asyncio.sleep(RENEW_S)
        held = {id: running.job.attempt for id, running in self._running.items()}
        if held:
            for id in await self._store.extend(held, _now_ms(), LEASE_MS):
                if self._is_held(id, held[id]):  # else it has ended meanwhile
                    self.drop(id)

    def _is_held(self, id: str, attempt: int) -> bool:
        running = self._running.get(id)
        return running is not None and running.job.attempt == attempt

    async def _tick(self) -> None:
        await asyncio.sleep(TICK_S)
        due_ms = await self._store.next_ms()
        if due_ms is not None and due_ms <= _now_ms():
            self._after(await self._store.sweep(_now_ms()))

    def _after(self, swept: Sweep) -> None:
        for id in swept.stop:
            self.drop(id)
        self._due()


def capacity(model: Model) -> int:
    """How many jobs of a model run at a time. One whose sequence waits for a slot of the model waits for others to end,
    so there is room beside it for what continues and ends those.
    """
    return model.concurrency + (SEQUENCES_AT_HAND if model.signature.sequences else 0)


class Recorder:
    """Writes a running job's progress and chunks to the store as they come, together where they come faster."""

    def __init__(self, store: JobStore, job: Job, chunk_bytes: int) -> None:
        self._store = store
        self._id = job.request.id
        self._attempt = job.attempt
        self._chunk_bytes = chunk_bytes
        self._chunks: list[bytes] = []
        self._progress: bytes | None = None
        self._writing: asyncio.Task[None] | None = None

    def progress(self, value: bytes) -> None:
        self._progress = value
        self._begin()

    async def chunk(self, value: bytes) -> None:
        """Raises _SupersededError once the job is no longer this attempt's."""
        self._chunks += _split(value, self._chunk_bytes)
        self._begin()
        if len(self._chunks) >= PENDING_CHUNKS or (self._writing is not None and self._writing.done()):
            await self.flush()

    async def flush(self) -> None:
        """Wait until all is written. Raises as `chunk`."""
        if self._writing is not None:
            await asyncio.wait([self._writing])  # which goes on even if this is cancelled
            self._writing.result()

    def _begin(self) -> None:
        if self._writing is None or (self._writing.done() and self._writing.exception() is None):
            self._writing = asyncio.create_task(self._write())

    async def _write(self) -> None:
        while self._chunks or self._progress is not None:
            chunks, self._chunks = self._chunks, []
            progress, self._progress = self._progress, None
            stands = True
            if chunks:
                stands = await self._store.append(self._id, self._attempt, chunks)
            if stands and progress is not None:
                stands = await self._store.progress(self._id, self._attempt, progress)
            if not stands:
                raise _SupersededError


def _split(value: bytes, most: int) -> list[bytes]:
    """A chunk that is too long as several, where it is a string; JSON of any other kind cannot be cut."""
    if len(value) <= most or not value.startswith(b'"'):
        return [value]
    text: str = orjson.loads(value)
    size = most // 6  # as many bytes as a character may take in JSON
    return [orjson.dumps(text[start : start + size]) for start in range(0, len(text), size)]


async def _saved(request: Request, call: Callable[[], Awaitable[T]]) -> T:
    """What the store answers; one that cannot be reached is asked again a few times, for the sake of this job.

    Raises ServingError.
    """
    for pause_s in SAVE_PAUSES_S:
        try:
            return await call()
        except ServingError as error:
            if error.kind is not Kind.UNAVAILABLE:
                raise
            logger.warning("a result could not be recorded yet: %s", error.message, extra=request.names)
            await asyncio.sleep(pause_s)
    return await call()


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
