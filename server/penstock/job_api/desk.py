"""What both dialects do with jobs, in the words of neither: accept, wait, cancel."""

import asyncio
import os
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any, Literal, TypeAlias, TypeVar

import orjson
from msgspec import Struct

from penstock import oip_json
from penstock.engine import Engine
from penstock.errors import Kind, ServingError
from penstock.job_api.endpoints import is_endpoint
from penstock.job_api.inputs import INPUT, VALIDATION_ERROR, FieldError, Prepared, prepare
from penstock.job_api.journal import Journal
from penstock.job_api.store import Chunks, Job, JobStore, Request, State
from penstock.job_api.webhooks import check_url
from penstock.job_api.worker import Sizes, Worker, capacity
from penstock.messages import JobContext

EXECUTION_MS = (5_000, 604_800_000)  # bounds of policy.executionTimeout (1.2)
TTL_MS = (10_000, 604_800_000)  # and of policy.ttl
WAIT_MS = (1_000, 300_000)  # bounds of `wait`, which is clamped
Found = TypeVar("Found")
Gone: TypeAlias = Callable[[], "asyncio.Future[None]"]  # gives what is done once the client has gone away
NUMBER = re.compile(r"[+-]?[0-9]{1,18}")


class Terms(Struct, frozen=True):
    """On which terms jobs are accepted: server options."""

    execution_ms: int
    ttl_ms: int
    retention_ms: int
    sync_retention_ms: int
    out_of_bounds: Literal["reject", "clamp"]
    queue_limit: int  # jobs of an endpoint that may wait; 0: any number
    allow_private: bool  # webhooks to private and loopback addresses


class Order(Struct, frozen=True):
    """A job as a client asks for it, checked but for its input."""

    endpoint: str
    input: Any
    execution_ms: int
    ttl_ms: int
    low_priority: bool = False
    webhook: str = ""
    webhook_form: str = "runpod"
    passed: bytes = b"{}"
    tags: bytes = b"{}"
    batch: str = ""
    request_id: str = ""  # of the request that hands it in


class Desk:
    """Where jobs are handed in and asked for. Lives on one event loop; keeps no state of a job."""

    def __init__(
        self,
        engine: Engine,
        store: JobStore,
        worker: Worker,
        journal: Journal,
        terms: Terms,
        sizes: Sizes,
        limits: oip_json.Limits,
        due: Callable[[], None],
    ) -> None:
        """`due` is called when a webhook may be due."""
        self.engine = engine
        self.store = store
        self.worker = worker
        self.journal = journal
        self.terms = terms
        self.sizes = sizes
        self._limits = limits
        self._due = due
        self._closing: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def close(self) -> None:
        """Accept nothing more, and let those who wait for jobs go."""
        if not self._closing.done():
            self._closing.set_result(None)

    # -- accepting

    def check_endpoint(self, name: str) -> None:
        """Raises ServingError(NOT_FOUND) for a name that is no endpoint."""
        lifecycle = self.engine.lifecycle
        if not is_endpoint(name) or not (lifecycle.ready_versions(name) or lifecycle.knows(name)):
            raise ServingError(Kind.NOT_FOUND, f"endpoint '{name}' is not found")

    def accept(self, order: Order, id: str, retention_ms: int) -> tuple[Request, Prepared | None]:
        """The job as it is stored, and ready to run if its model is. Raises FieldError for an input that is wrong."""
        if order.input is None:
            raise FieldError(INPUT, "a job needs an input")
        text = orjson.dumps(order.input)
        request = Request(
            id,
            order.endpoint,
            text,
            now_ms(),
            order.ttl_ms,
            order.execution_ms,
            retention_ms,
            order.low_priority,
            order.webhook,
            order.webhook_form,
            order.passed,
            order.tags,
            order.batch,
            order.request_id,
        )
        try:
            model = self.engine.model(order.endpoint)
        except ServingError:
            return request, None
        return request, prepare(model, order.input, text, JobContext(id, order.passed, order.request_id), self._limits)

    async def submit(self, order: Order) -> Request:
        """Queue a job; it is durable when this returns. Raises ServingError."""
        self._check_open()
        request, _ = self.accept(order, new_id(), self.terms.retention_ms)
        await self.store.add(request, self.terms.queue_limit)
        return request

    async def run(self, order: Order, wait_ms: int, gone: Gone | None = None) -> Job:
        """Run a job and wait for it: as it ended, or as it stands once the wait is over. Raises ServingError."""
        self._check_open()
        started_s = time.monotonic()
        id = new_id("sync-")
        request, prepared = self.accept(order, id, self.terms.sync_retention_ms)
        claim = None
        if prepared is not None and not order.low_priority:
            claim = self.worker.reserve(order.endpoint, capacity(prepared.model))
        job = None
        try:
            job = await self.store.add(request, self.terms.queue_limit, claim)
        finally:
            if claim is not None and job is None:
                self.worker.release(order.endpoint)
        if job is not None:
            task = self.worker.begin(job, prepared)
            await asyncio.wait((task,), timeout=wait_ms / 1000)
            if task.done() and not task.cancelled() and (ended := task.result()) is not None:
                return ended
        left_ms = max(0, wait_ms - round((time.monotonic() - started_s) * 1000))
        found = await self.wait(id, order.endpoint, left_ms, gone)
        # Its time to live is over, and with it the job is forgotten; but somebody still waits here to be told.
        return found or Job(request, State.TIMED_OUT, error=f"ttl of {order.ttl_ms} ms expired")

    def _check_open(self) -> None:
        if self._closing.done():
            raise ServingError(Kind.UNAVAILABLE, "the server is stopping and accepts no jobs")

    # -- asking

    async def find(self, id: str, endpoint: str, whole: bool = False) -> Job:
        """Raises ServingError(NOT_FOUND)."""
        return _known(await self.store.get(id, endpoint, now_ms(), whole), id)

    async def wait(self, id: str, endpoint: str, wait_ms: int, gone: Gone | None = None) -> Job | None:
        """The job once it is final, or as it stands when the wait is over; None for one that is unknown."""

        async def look() -> tuple[Job | None, bool]:
            job = await self.store.get(id, endpoint, now_ms())
            return job, job is None or job.state.is_final

        return await self._held(id, wait_ms, gone, look)

    async def drained(self, id: str, wait_ms: int, gone: Gone | None = None) -> Chunks | None:
        """The chunks that nobody has had, once there are any or the job is final, or when the wait is over."""

        async def look() -> tuple[Chunks | None, bool]:
            chunks = await self.store.drain(id)
            return chunks, chunks is None or bool(chunks.values) or chunks.state.is_final

        return await self._held(id, wait_ms, gone, look)

    async def chunks(self, id: str, start: int, wait_ms: int, gone: Gone | None = None) -> Chunks | None:
        """The chunks from an index on, waited for likewise."""

        async def look() -> tuple[Chunks | None, bool]:
            chunks = await self.store.chunks(id, start)
            return chunks, chunks is None or bool(chunks.values) or chunks.state.is_final

        return await self._held(id, wait_ms, gone, look)

    async def _held(
        self, id: str, wait_ms: int, gone: Gone | None, look: Callable[[], Awaitable[tuple[Found, bool]]]
    ) -> Found:
        """What `look` finds once it is content, the wait is over, the client has gone, or the server stops."""
        end_s = time.monotonic() + wait_ms / 1000
        leaving = [self._closing]
        while True:
            tick = self.store.tick
            found, content = await look()
            left_s = end_s - time.monotonic()
            if content or left_s <= 0 or any(reason.done() for reason in leaving):
                return found
            if gone is not None and len(leaving) == 1:
                leaving.append(gone())
            changed = asyncio.ensure_future(self.store.watch([id], left_s, tick))
            try:
                await asyncio.wait([changed, *leaving], return_when=asyncio.FIRST_COMPLETED)
                if changed.done():
                    changed.result()
            finally:
                changed.cancel()
            if any(reason.done() for reason in leaving):
                return found  # and take no chunks for nobody

    # -- changing

    async def cancel(self, id: str, endpoint: str = "") -> Job:
        """End a job unless it has ended. Raises ServingError(NOT_FOUND)."""
        job = _known(await self.store.cancel(id, endpoint, now_ms()), id)
        self.worker.drop(id)
        self._due()
        return job

    async def retry(self, id: str, endpoint: str) -> Job:
        """Raises ServingError: NOT_FOUND, INVALID for a job that neither failed nor timed out."""
        self._check_open()
        return _known(await self.store.retry(id, endpoint, now_ms()), id)

    async def purge(self, endpoint: str) -> int:
        """End all waiting jobs of an endpoint; how many there were."""
        removed = await self.store.purge(endpoint, now_ms())
        self._due()
        return len(removed)

    # -- fields that both dialects have

    def webhook(self, value: Any, field: str) -> str:
        """Raises FieldError."""
        if value is None:
            return ""
        try:
            return check_url(value, self.terms.allow_private)
        except ValueError as error:
            raise FieldError(field, str(error), VALIDATION_ERROR) from None

    def bounded(self, value: Any, field: str, bounds: tuple[int, int], default: int) -> int:
        """A time in milliseconds. Raises FieldError."""
        low, high = bounds
        if value is None:
            return default
        if type(value) is int and value > 0:
            if low <= value <= high:
                return value
            if self.terms.out_of_bounds == "clamp":
                return min(max(value, low), high)
        raise FieldError(
            field, f"expected milliseconds from {low} to {high}, got {orjson.dumps(value).decode()}", VALIDATION_ERROR
        )


def new_id(prefix: str = "") -> str:
    """A UUID of version 7 (RFC 9562, 5.7) with RunPod's tag. It begins with the time: ids that are made one after the
    other lie side by side in a store's index, where random ones would each touch a page of their own.
    """
    random = int.from_bytes(os.urandom(10))
    text = f"{now_ms() << 80 | 7 << 76 | (random & 0xFFF) << 64 | 2 << 62 | random >> 18:032x}"
    return f"{prefix}{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}-u1"


def _known(job: Job | None, id: str) -> Job:
    if job is None:
        raise ServingError(Kind.NOT_FOUND, f"job '{id}' is not found")
    return job


def whole_number(text: str, field: str) -> int:
    """A number in a query. Raises FieldError."""
    if NUMBER.fullmatch(text) is None:
        raise FieldError(field, f"expected a whole number, got '{text}'", VALIDATION_ERROR)
    return int(text)


def clamped(text: str | None, field: str, bounds: tuple[int, int], default: int) -> int:
    """A time in milliseconds in a query; outside the bounds, the nearer one. Raises FieldError."""
    low, high = bounds
    return default if text is None else min(max(whole_number(text, field), low), high)


def now_ms() -> int:
    return time.time_ns() // 1_000_000
