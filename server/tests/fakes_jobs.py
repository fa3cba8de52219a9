"""A job store in plain Python: for tests of what uses a store, and the model that the real ones are compared with."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import TypeAlias

from msgspec.structs import replace
from penstock.errors import Kind, ServingError
from penstock.job_api.changes import Changes, work
from penstock.job_api.store import (
    MAX_RETRIES,
    WEBHOOK_ATTEMPTS,
    WEBHOOK_INTERVAL_MS,
    WORKER_LOST,
    Chunks,
    Claim,
    Counts,
    Delivery,
    Job,
    Page,
    Request,
    State,
    Sweep,
    added,
    exists,
    expired,
    full,
    not_failed,
)

RETRIED, ACCEPTED = "RETRIED", "ACCEPTED"


@dataclass(slots=True)
class Outgoing:
    """A webhook that is due."""

    due_ms: int
    failed: int = 0
    taken: bool = False


@dataclass(slots=True)
class Entry:
    """A job with what belongs to it."""

    job: Job
    place: int  # in the order of submission
    chunks: list[bytes] = field(default_factory=list)
    drained: int = 0
    webhook: Outgoing | None = None
    gone: bool = False  # expired, and swept; kept for its webhook alone


Entries: TypeAlias = list[Entry]  # inside the store, `list` is the call


class MemoryJobStore:
    """Forgets everything when it is closed; otherwise what every store is."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self._changes = Changes()
        self._places = count(1)
        self._ever: dict[str, Counter[str]] = {}
        self._closed = False

    async def add(self, request: Request, limit: int = 0, claim: Claim | None = None) -> Job | None:
        self._open()
        waiting = self._of(request.endpoint, State.IN_QUEUE)
        if limit and len(waiting) >= limit:
            raise full(request.endpoint, len(waiting), limit)
        if request.id in self.entries:
            raise exists(request.id)
        self.entries[request.id] = Entry(added(request), next(self._places))
        self._count(self.entries[request.id], ACCEPTED)
        now_ms = request.created_ms
        ahead = sum(
            entry.job.expires_ms > now_ms and entry.job.request.low_priority <= request.low_priority
            for entry in waiting
        )
        if claim and ahead <= claim.spare:
            return self._take(self.entries[request.id], claim.worker, now_ms, claim.lease_ms)
        self._changes.note([work(request.endpoint)])
        return None

    async def claim(self, slots: Mapping[str, int], worker: str, now_ms: int, lease_ms: int) -> Sequence[Job]:
        self._open()
        claimed: list[Job] = []
        for endpoint, free in slots.items():
            waiting = self._of(endpoint, State.IN_QUEUE, lambda entry: entry.job.expires_ms > now_ms)
            waiting.sort(key=lambda entry: (entry.job.request.low_priority, entry.place))
            claimed += [self._take(entry, worker, now_ms, lease_ms) for entry in waiting[: max(0, free)]]
        self._changes.note([job.request.id for job in claimed])
        return claimed

    async def extend(self, held: Mapping[str, int], now_ms: int, lease_ms: int) -> Sequence[str]:
        self._open()
        lost = []
        for id, attempt in held.items():
            if entry := self._running(id, attempt, now_ms):
                entry.job = replace(entry.job, lease_ms=now_ms + lease_ms)
            else:
                lost.append(id)
        return lost

    async def release(self, held: Mapping[str, int], now_ms: int) -> None:
        self._open()
        for id, attempt in held.items():
            if entry := self._running(id, attempt, now_ms):
                self._queue(entry)

    async def lose(self, held: Mapping[str, int], error: str, now_ms: int) -> Sequence[Job]:
        self._open()
        found = [entry for id, attempt in held.items() if (entry := self._running(id, attempt, now_ms))]
        for entry in found:
            self._lose(entry, error, now_ms)
        return [_shown(entry.job) for entry in found]

    async def append(self, id: str, attempt: int, values: Sequence[bytes]) -> bool:
        self._open()
        if not (entry := self._running(id, attempt)):
            return False
        entry.chunks += values
        self._changes.note([id])
        return True

    async def progress(self, id: str, attempt: int, value: bytes) -> bool:
        self._open()
        if not (entry := self._running(id, attempt)):
            return False
        entry.job = replace(entry.job, progress=value)
        self._changes.note([id])
        return True

    async def finish(
        self, id: str, attempt: int, state: State, now_ms: int, output: bytes | None = None, error: str | None = None
    ) -> bool:
        self._open()
        assert state.is_final
        if not (entry := self._running(id, attempt, now_ms)):
            return False
        self._end(entry, state, now_ms, output, error)
        return True

    async def cancel(self, id: str, endpoint: str, now_ms: int) -> Job | None:
        self._open()
        if not (entry := self._known(id, endpoint, now_ms)):
            return None
        if not entry.job.state.is_final:
            self._end(entry, State.CANCELLED, now_ms)
        return _shown(entry.job)

    async def retry(self, id: str, endpoint: str, now_ms: int) -> Job | None:
        self._open()
        if not (entry := self._known(id, endpoint, now_ms)):
            return None
        if entry.job.state not in (State.FAILED, State.TIMED_OUT):
            raise not_failed(id, entry.job.state)
        entry.place = next(self._places)
        entry.webhook = None
        self._count(entry, RETRIED)
        expires_ms = now_ms + entry.job.request.ttl_ms
        self._queue(entry, finished_ms=0, queued_ms=now_ms, retries=0, expires_ms=expires_ms, webhook_note="")
        return _shown(entry.job)

    async def get(self, id: str, endpoint: str, now_ms: int, whole: bool = False) -> Job | None:
        self._open()
        return _shown(entry.job, whole) if (entry := self._known(id, endpoint, now_ms)) else None

    async def keep(self, id: str, until_ms: int) -> None:
        self._open()
        if (entry := self.entries.get(id)) and entry.job.state.is_final and not entry.gone:
            entry.job = replace(entry.job, expires_ms=until_ms)

    async def chunks(self, id: str, start: int) -> Chunks | None:
        self._open()
        entry = self.entries.get(id)
        return None if entry is None else Chunks(entry.job.state, start, tuple(entry.chunks[start:]))

    async def drain(self, id: str) -> Chunks | None:
        self._open()
        if not (entry := self.entries.get(id)):
            return None
        start, entry.drained = entry.drained, len(entry.chunks)
        return Chunks(entry.job.state, start, tuple(entry.chunks[start:]))

    async def list(self, endpoint: str, state: State | None, offset: int, limit: int, batch: str = "") -> Page:
        self._open()
        found = self._of(endpoint, state, lambda entry: batch in ("", entry.job.request.batch))
        found.sort(key=lambda entry: -entry.place)
        return Page([_shown(entry.job) for entry in found[offset : offset + limit]], len(found))

    async def purge(self, endpoint: str, now_ms: int) -> Sequence[str]:
        self._open()
        waiting = self._of(endpoint, State.IN_QUEUE, lambda entry: entry.job.expires_ms > now_ms)
        for entry in waiting:
            self._end(entry, State.CANCELLED, now_ms)
        return [entry.job.request.id for entry in waiting]

    async def counts(self, endpoint: str) -> Counts:
        self._open()
        ever = self._ever.get(endpoint, Counter())
        return Counts(
            len(self._of(endpoint, State.IN_QUEUE)),
            len(self._of(endpoint, State.IN_PROGRESS)),
            ever[State.COMPLETED.value],
            ever[State.FAILED.value],
            ever[State.CANCELLED.value],
            ever[State.TIMED_OUT.value],
            ever[RETRIED],
            ever[ACCEPTED],
        )

    async def totals(self) -> Mapping[str, Counts]:
        return {endpoint: await self.counts(endpoint) for endpoint in self._ever}

    async def due_webhooks(self, now_ms: int, limit: int, lease_ms: int) -> Sequence[Delivery]:
        self._open()
        due = [(out.due_ms, entry.place, out, entry) for entry in self.entries.values() if (out := entry.webhook)]
        taken = sorted((one for one in due if one[0] <= now_ms), key=lambda one: one[:2])[:limit]
        for _, _, out, _ in taken:
            out.due_ms, out.taken = now_ms + lease_ms, True
        return [Delivery(_shown(entry.job, whole=True), out.failed + 1) for _, _, out, entry in taken]

    async def webhook_sent(self, id: str, attempt: int, delivered: bool, now_ms: int, note: str = "") -> None:
        self._open()
        entry = self.entries.get(id)
        out = entry and entry.webhook
        if not entry or not out or not out.taken or attempt != out.failed + 1:
            return
        if not delivered:
            out.failed, out.taken, out.due_ms = attempt, False, now_ms + WEBHOOK_INTERVAL_MS
            entry.job = replace(entry.job, webhook_note=note)
        if delivered or attempt == WEBHOOK_ATTEMPTS:
            entry.webhook = None
            if entry.gone:
                del self.entries[id]

    async def sweep(self, now_ms: int) -> Sweep:
        self._open()
        changed, stop = [], []
        for id, entry in list(self.entries.items()):
            job = entry.job
            if entry.gone:
                continue
            if job.expires_ms <= now_ms:
                if not job.state.is_final:
                    changed.append(id)
                    if job.state is State.IN_PROGRESS:
                        stop.append(id)
                    self._end(
                        entry, State.TIMED_OUT, now_ms, error=expired(job.request.ttl_ms), expires_ms=job.expires_ms
                    )
                if entry.webhook:
                    entry.gone = True
                else:
                    del self.entries[id]
            elif job.state is State.IN_PROGRESS and job.lease_ms <= now_ms:
                changed.append(id)
                self._lose(entry, WORKER_LOST, now_ms)
        return Sweep(changed, stop)

    async def recover(self, now_ms: int) -> Sweep:
        swept = await self.sweep(now_ms)
        running = [entry for entry in self.entries.values() if entry.job.state is State.IN_PROGRESS]
        for entry in running:
            self._lose(entry, WORKER_LOST, now_ms)
        for entry in self.entries.values():
            if entry.webhook and entry.webhook.taken:
                entry.webhook.taken, entry.webhook.due_ms = False, now_ms
        return Sweep([*swept.changed, *(entry.job.request.id for entry in running)], swept.stop)

    async def next_ms(self) -> int | None:
        self._open()
        times = []
        for entry in self.entries.values():
            if not entry.gone:
                times.append(entry.job.expires_ms)
            if entry.job.state is State.IN_PROGRESS:
                times.append(entry.job.lease_ms)
            if entry.webhook:
                times.append(entry.webhook.due_ms)
        return min(times, default=None)

    @property
    def tick(self) -> int:
        return self._changes.tick

    async def watch(self, ids: Sequence[str], timeout_s: float, since: int) -> None:
        await self._changes.wait(ids, timeout_s, since)

    async def wait_work(self, endpoints: Sequence[str], timeout_s: float, since: int) -> None:
        await self._changes.wait([work(endpoint) for endpoint in endpoints], timeout_s, since)

    async def close(self) -> None:
        self._closed = True

    def _open(self) -> None:
        if self._closed:
            raise ServingError(Kind.UNAVAILABLE, "the job store is closed")

    def _of(self, endpoint: str, state: State | None, which: Callable[[Entry], bool] = lambda _: True) -> Entries:
        return [
            entry
            for entry in self.entries.values()
            if entry.job.request.endpoint == endpoint and state in (None, entry.job.state) and which(entry)
        ]

    def _known(self, id: str, endpoint: str, now_ms: int) -> Entry | None:
        entry = self.entries.get(id)
        if not entry or entry.job.expires_ms <= now_ms or endpoint not in ("", entry.job.request.endpoint):
            return None
        return entry

    def _running(self, id: str, attempt: int, now_ms: int = 0) -> Entry | None:
        entry = self._known(id, "", now_ms)
        return entry if entry and entry.job.state is State.IN_PROGRESS and entry.job.attempt == attempt else None

    def _count(self, entry: Entry, what: str) -> None:
        self._ever.setdefault(entry.job.request.endpoint, Counter())[what] += 1

    def _take(self, entry: Entry, worker: str, now_ms: int, lease_ms: int) -> Job:
        entry.job = replace(
            entry.job,
            state=State.IN_PROGRESS,
            attempt=entry.job.attempt + 1,
            worker=worker,
            started_ms=now_ms,
            lease_ms=now_ms + lease_ms,
        )
        return entry.job

    def _queue(
        self,
        entry: Entry,
        finished_ms: int | None = None,
        queued_ms: int | None = None,
        retries: int | None = None,
        expires_ms: int | None = None,
        webhook_note: str | None = None,
    ) -> None:
        """Back to the queue; None leaves a field as it is."""
        job = entry.job
        entry.chunks, entry.drained = [], 0
        entry.job = replace(
            job,
            state=State.IN_QUEUE,
            lease_ms=0,
            finished_ms=job.finished_ms if finished_ms is None else finished_ms,
            queued_ms=job.queued_ms if queued_ms is None else queued_ms,
            retries=job.retries if retries is None else retries,
            expires_ms=job.expires_ms if expires_ms is None else expires_ms,
            webhook_note=job.webhook_note if webhook_note is None else webhook_note,
            progress=None,
            output=None,
            error=None,
        )
        self._changes.note([job.request.id, work(job.request.endpoint)])

    def _lose(self, entry: Entry, error: str, now_ms: int) -> None:
        if entry.job.retries < MAX_RETRIES:
            self._count(entry, RETRIED)
            self._queue(entry, retries=entry.job.retries + 1)
        else:
            self._end(entry, State.FAILED, now_ms, error=error)

    def _end(
        self,
        entry: Entry,
        state: State,
        now_ms: int,
        output: bytes | None = None,
        error: str | None = None,
        expires_ms: int | None = None,
    ) -> None:
        request = entry.job.request
        self._count(entry, state.value)
        entry.job = replace(
            entry.job,
            state=state,
            finished_ms=now_ms,
            lease_ms=0,
            expires_ms=now_ms + request.retention_ms if expires_ms is None else expires_ms,
            progress=None,
            output=output,
            error=error,
        )
        if request.webhook:
            entry.webhook = Outgoing(now_ms)
        self._changes.note([request.id])


def _shown(job: Job, whole: bool = False) -> Job:
    return replace(job, request=replace(job.request, input=job.request.input if whole else b"", passed=b""))
