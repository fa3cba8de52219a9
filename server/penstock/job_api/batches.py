"""Batches: job requests that are collected and then queued together. Protocol page jobs, section 1.9.

A batch lives in the job store like everything else. Its parts are jobs of `{endpoint}/batch`, an endpoint that nobody
claims, with the requests of one call each as input. The first part has the batch's id; where that is cancelled, the
batch is. A last part marks it as finalized. The ids of its jobs follow from their places, so that finalizing again
after a crash queues none twice.
"""

import asyncio
from collections.abc import Callable
from typing import Any

import orjson
from msgspec import Struct

from penstock.errors import Kind, ServingError
from penstock.job_api.desk import Desk, Order, new_id, now_ms
from penstock.job_api.inputs import VALIDATION_ERROR, FieldError
from penstock.job_api.store import Job, Request, State

MOST_DRAFTS = 10  # of an endpoint
MOST_REQUESTS = 5000  # of a batch
KEPT_MS = 7 * 86_400_000  # how long a batch is remembered, from its creation
RESULTS_MS = 86_400_000  # and its jobs, from their end
PAGE = 1000


class Batch(Struct, frozen=True):
    """What the store knows of a batch."""

    first: Job
    parts: list[Job]  # in the order of their creation, the mark left out
    finalized: bool

    @property
    def total(self) -> int:
        return sum(orjson.loads(part.request.tags)["requests"] for part in self.parts)

    @property
    def status(self) -> str:
        if self.first.state is State.CANCELLED:
            return "CANCELLED"
        return "FINALIZED" if self.finalized else "DRAFT"


class Batches:
    """Draws up batches, and queues them. Owns one lock, so that a batch changes in one step."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._store = desk.store
        self._lock = asyncio.Lock()

    async def new(self, endpoint: str, documents: list[Any], request_id: str) -> str:
        """Draw up a batch of what one request brought; its id.

        Raises ServingError(LIMITED) where too many drafts wait to be finalized.
        """
        async with self._lock:
            parts = await self._parts(endpoint)
            marked = {part.request.batch for part in parts if _is_mark(part)}
            drafts = [
                part
                for part in parts
                if part.request.id == part.request.batch
                and part.request.id not in marked
                and part.state is State.IN_QUEUE
            ]
            if len(drafts) >= MOST_DRAFTS:
                raise ServingError(Kind.LIMITED, f"endpoint '{endpoint}' has {len(drafts)} drafts of batches already")
            id = new_id("batch-")
            await self._add(endpoint, id, id, documents, 0, request_id)
        return id

    async def extend(self, endpoint: str, id: str, documents: list[Any], request_id: str) -> None:
        """Add requests to a draft. Raises ServingError."""
        async with self._lock:
            batch = await self._find(endpoint, id, "DRAFT")
            await self._add(endpoint, id, f"{id}-{len(batch.parts)}", documents, batch.total, request_id)

    async def _add(self, endpoint: str, batch: str, id: str, documents: list[Any], total: int, request_id: str) -> None:
        if total + len(documents) > MOST_REQUESTS:
            raise FieldError("requests", f"a batch has at most {MOST_REQUESTS} requests", VALIDATION_ERROR)
        tags = {"requests": len(documents)}
        await self._store.add(_part(endpoint, batch, id, orjson.dumps(documents), tags, request_id))

    async def finalize(self, endpoint: str, id: str, order: Callable[[Any, str], Order]) -> None:
        """Queue all job requests of a draft, each once however often this is called.

        `order` makes one of a document and the id of the request that brought it. The log speaks of the job under that:
        finalizing may take several requests, each with an id of its own.
        """
        async with self._lock:
            batch = await self._find(endpoint, id, "DRAFT", "FINALIZED")
            if batch.finalized:
                return
            for part in batch.parts:
                whole = await self._desk.find(part.request.id, _shelf(endpoint), whole=True)
                documents = orjson.loads(whole.request.input)
                name, by = part.request.id, part.request.request_id
                orders = (order(document, by) for document in documents)
                await asyncio.gather(*(self._queue(one, f"{name}_{number}") for number, one in enumerate(orders)))
            await self._store.add(_part(endpoint, id, f"{id}-final", b"[]", {"final": True}))

    async def _queue(self, order: Order, id: str) -> None:
        request, _ = self._desk.accept(order, id, RESULTS_MS)
        try:
            await self._store.add(request)
        except ServingError as error:
            if error.kind is not Kind.EXISTS:  # which was queued before a crash
                raise

    async def cancel(self, endpoint: str, id: str) -> None:
        """End a batch, and those of its jobs that have not ended."""
        async with self._lock:
            await self._find(endpoint, id, "DRAFT", "FINALIZED", "CANCELLED")
            await self._store.cancel(id, _shelf(endpoint), now_ms())
            for state in (State.IN_QUEUE, State.IN_PROGRESS):
                while (found := await self._store.list(endpoint, state, 0, PAGE, id)).jobs:
                    await asyncio.gather(*(self._desk.cancel(job.request.id, endpoint) for job in found.jobs))

    async def status(self, endpoint: str, id: str) -> dict[str, Any]:
        """Raises ServingError(NOT_FOUND)."""
        batch = await self._find(endpoint, id, "DRAFT", "FINALIZED", "CANCELLED")
        states = (State.IN_PROGRESS, State.COMPLETED, State.FAILED, State.TIMED_OUT, State.CANCELLED)
        pages = await asyncio.gather(*(self._store.list(endpoint, state, 0, 0, id) for state in states))
        running, completed, *failed = (page.total for page in pages)
        return {
            "id": id,
            "endpointId": endpoint,
            "status": batch.status,
            "requestTotal": batch.total,
            "requestInProgress": running,
            "requestCompleted": completed,
            "requestFailed": sum(failed),
            "createdAt": batch.first.request.created_ms,
        }

    async def _find(self, endpoint: str, id: str, *allowed: str) -> Batch:
        parts = await self._parts(endpoint, id)
        first = next((part for part in parts if part.request.id == id), None)
        if first is None:
            raise ServingError(Kind.NOT_FOUND, f"batch '{id}' is not found")
        batch = Batch(first, [part for part in parts if not _is_mark(part)], any(map(_is_mark, parts)))
        if batch.status not in allowed:
            raise ServingError(Kind.INVALID, f"batch '{id}' is {batch.status}, expected {' or '.join(allowed)}")
        return batch

    async def _parts(self, endpoint: str, id: str = "") -> list[Job]:
        """Of one batch, or of all; in the order of their creation."""
        parts: list[Job] = []
        while True:
            found = await self._store.list(_shelf(endpoint), None, len(parts), PAGE, id)
            parts += found.jobs
            if len(found.jobs) < PAGE:
                return parts[::-1]


def _shelf(endpoint: str) -> str:
    """No endpoint has a slash in its name, so nobody claims what lies here."""
    return f"{endpoint}/batch"


def _part(endpoint: str, batch: str, id: str, input: bytes, tags: dict[str, Any], request_id: str = "") -> Request:
    return Request(
        id, _shelf(endpoint), input, now_ms(), KEPT_MS, KEPT_MS, KEPT_MS, tags=orjson.dumps(tags), batch=batch,
        request_id=request_id,
    )  # fmt: skip


def _is_mark(part: Job) -> bool:
    return "final" in orjson.loads(part.request.tags)
