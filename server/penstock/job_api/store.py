"""The door for job stores: what a job is, and the calls that every store answers alike.

A store holds everything that must outlive a restart: jobs in every state, their order, results and chunks, the
webhooks that are still due, and the counters. Time enters as epoch milliseconds, because downtime counts towards time
to live and retention. An accepted job is durable when `add` returns.

A claim is a lease with a number: the job's `attempt`. Reports carry it, and a report of an older attempt, or on a job
that is final or has expired, changes nothing. Nothing leaves a final state but by `retry`.

A job is forgotten at `expires_ms`: from then on every call that takes the time treats it as unknown. The next `sweep`
removes it, or keeps what its webhook carries until that is delivered or given up.
"""

from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import Any, Protocol

from msgspec import Struct

from penstock.access import names
from penstock.errors import Kind, ServingError

WEBHOOK_ATTEMPTS = 3
WEBHOOK_INTERVAL_MS = 10_000
MAX_RETRIES = 1  # a job whose worker is lost goes back to the queue this often
WORKER_LOST = "worker lost"  # the error of a job whose claim lapsed once too often


class State(Enum):
    """Of a job, in RunPod's words."""

    IN_QUEUE = "IN_QUEUE"
    IN_PROGRESS = "IN_PROGRESS"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    TIMED_OUT = "TIMED_OUT"

    @property
    def is_final(self) -> bool:
        return self not in (State.IN_QUEUE, State.IN_PROGRESS)


class Request(Struct, frozen=True):
    """A job as it was accepted; never changes.

    `input` comes with claims, with deliveries and with a `whole` job, `passed` with claims only. Everywhere else both
    are empty, because they may be megabytes, and a client that asks for its job every second did not ask for those.
    """

    id: str
    endpoint: str  # the model's name
    input: bytes  # JSON
    created_ms: int
    ttl_ms: int  # from created_ms, over queue and execution
    execution_timeout_ms: int  # from pick-up
    retention_ms: int  # how long the result is kept, from the end
    low_priority: bool = False
    webhook: str = ""
    webhook_form: str = "runpod"  # the dialect whose status object the webhook carries
    passed: bytes = b"{}"  # JSON of what the worker gets besides: s3Config and the like; never shown to anyone else
    tags: bytes = b"{}"  # JSON; TensorOne's tags, priority word and the like, shown in its status
    batch: str = ""  # id of the batch it came with; "" for most
    request_id: str = ""  # of the request that handed it in, under which the log speaks of it; "" where that had none

    @property
    def names(self) -> dict[str, str]:
        """What a line of the log about the job can be found by: `extra` of its record."""
        return names(self.request_id, self.id)


class Job(Struct, frozen=True):
    """A job as it stands."""

    request: Request
    state: State
    attempt: int = 0  # number of the current or last claim; 0 before the first
    retries: int = 0  # how often it went back to the queue because its worker was lost
    worker: str = ""
    started_ms: int = 0  # of the current or last attempt; 0 before the first
    finished_ms: int = 0
    queued_ms: int = 0  # when it last entered the queue: its creation, or a retry
    lease_ms: int = 0  # when the claim lapses, while IN_PROGRESS
    expires_ms: int = 0  # when it is forgotten: ttl until it is final, retention from then on
    progress: bytes | None = None  # JSON, the newest value reported while IN_PROGRESS
    output: bytes | None = None  # JSON
    error: str | None = None
    webhook_note: str = ""  # why the last attempt at its webhook failed


class Counts(Struct, frozen=True):
    """Of one endpoint: exact for what waits and runs, since the store began for the rest.

    `retried` counts every return to the queue that is a new attempt: by `retry`, or because a worker was lost.
    """

    in_queue: int = 0
    in_progress: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    timed_out: int = 0
    retried: int = 0
    accepted: int = 0  # by `add`


class Claim(Struct, frozen=True):
    """Who takes a job with the same commit that adds it, and for how long: a caller that waits and has a free slot."""

    worker: str
    lease_ms: int
    spare: int = 0  # free slots besides: so many waiting jobs of the endpoint have one too, and none is overtaken


class Page(Struct, frozen=True):
    """Some jobs of an endpoint, newest first (a retried one is new again), and how many there are."""

    jobs: Sequence[Job]
    total: int


class Chunks(Struct, frozen=True):
    """What a generator has yielded: JSON values from index `start` on, and the state they were read in.

    Read in one step with the state: when `state` is final, no further chunk can appear.
    """

    state: State
    start: int
    values: Sequence[bytes]


class Delivery(Struct, frozen=True):
    """A webhook that is due: the job as it ended, and which of WEBHOOK_ATTEMPTS this will be, from 1 on."""

    job: Job
    attempt: int


class Sweep(Struct, frozen=True):
    """What a sweep changed: ids of jobs whose waiters should look again, and of running ones that must be stopped."""

    changed: Sequence[str] = ()
    stop: Sequence[str] = ()


class JobStore(Protocol):
    """Every call is atomic, and durable when it returns. Used on one event loop; several processes may share a store.

    Raises ServingError(UNAVAILABLE) where the store cannot be reached, is full, or has been closed.
    """

    async def add(self, request: Request, limit: int = 0, claim: Claim | None = None) -> Job | None:
        """Queue a job; None. `limit` > 0: raises ServingError(LIMITED) if as many of its endpoint wait already.

        With `claim` it is IN_PROGRESS from the start (attempt 1, picked up at `created_ms`) and returned, in one
        commit; unless more jobs of its endpoint wait, that would be taken first, than `spare`: then it is queued too.
        Raises ServingError(EXISTS) for an id that is in the store.
        """

    async def claim(self, slots: Mapping[str, int], worker: str, now_ms: int, lease_ms: int) -> Sequence[Job]:
        """Take up to `slots[endpoint]` waiting jobs of each endpoint: first come first served, low priority last.

        They become IN_PROGRESS with the next attempt number and a lease of `lease_ms`. Expired jobs are never taken.
        """

    async def extend(self, held: Mapping[str, int], now_ms: int, lease_ms: int) -> Sequence[str]:
        """Renew the leases of running jobs {id: attempt}. Returns the ids that are not the caller's now: stop those."""

    async def release(self, held: Mapping[str, int], now_ms: int) -> None:
        """Put running jobs {id: attempt} back to the head of their queue without counting a retry (orderly stop)."""

    async def lose(self, held: Mapping[str, int], error: str, now_ms: int) -> Sequence[Job]:
        """The worker process of these running jobs {id: attempt} is gone: each goes back to the head of its queue and
        counts a retry, or is FAILED with `error` once MAX_RETRIES are spent. Returns them as they stand.
        """

    async def append(self, id: str, attempt: int, values: Sequence[bytes]) -> bool:
        """Add chunks to a running job. False: the job is final, or runs as another attempt; nothing was added.

        Chunks belong to their attempt: when a job goes back to the queue, they and what was drained are forgotten.
        """

    async def progress(self, id: str, attempt: int, value: bytes) -> bool:
        """Set a running job's newest progress. False as for `append`."""

    async def finish(
        self, id: str, attempt: int, state: State, now_ms: int, output: bytes | None = None, error: str | None = None
    ) -> bool:
        """End a running job, make its webhook due, count it. False as for `append`, or because it has expired."""

    async def cancel(self, id: str, endpoint: str, now_ms: int) -> Job | None:
        """End a job that is not final as CANCELLED. Returns it as it stands; None for an unknown one."""

    async def retry(self, id: str, endpoint: str, now_ms: int) -> Job | None:
        """Queue a FAILED or TIMED_OUT job anew: its chunks, output, error and retries removed, its time to live begun
        again, a webhook of its earlier end dropped if that is still due.

        None for an unknown one. Raises ServingError(INVALID) for one in any other state.
        """

    async def get(self, id: str, endpoint: str, now_ms: int, whole: bool = False) -> Job | None:
        """A job of this endpoint ("" for any), its input only if `whole`; None if there is none, or it has expired."""

    async def keep(self, id: str, until_ms: int) -> None:
        """Forget a final job at `until_ms` instead of at the end of its retention."""

    async def chunks(self, id: str, start: int) -> Chunks | None:
        """The chunks from index `start` on, and the state, read together. None for an unknown job."""

    async def drain(self, id: str) -> Chunks | None:
        """The chunks that no drain has returned before, which from now on have been; None for an unknown job."""

    async def list(self, endpoint: str, state: State | None, offset: int, limit: int, batch: str = "") -> Page:
        """Jobs of an endpoint, newest first; with `batch`, those of one batch. A limit of 0 asks for the total only."""

    async def purge(self, endpoint: str, now_ms: int) -> Sequence[str]:
        """End all waiting jobs of an endpoint as CANCELLED. Returns their ids."""

    async def counts(self, endpoint: str) -> Counts:
        """How many jobs of an endpoint there are and were."""

    async def totals(self) -> Mapping[str, Counts]:
        """The counts of every endpoint that ever had a job."""

    async def due_webhooks(self, now_ms: int, limit: int, lease_ms: int) -> Sequence[Delivery]:
        """Take up to `limit` webhooks that are due, the longest due first. One that is neither delivered nor failed in
        `lease_ms` is due again, without counting an attempt.
        """

    async def webhook_sent(self, id: str, attempt: int, delivered: bool, now_ms: int, note: str = "") -> None:
        """Record an attempt: delivered, or failed because of `note` and to be tried again WEBHOOK_INTERVAL_MS later,
        until WEBHOOK_ATTEMPTS are spent. A report on any other attempt than the one taken changes nothing.
        """

    async def sweep(self, now_ms: int) -> Sweep:
        """Do what time brings: end expired jobs as TIMED_OUT (webhook due, then forgotten), return lapsed claims to the
        queue or fail them as WORKER_LOST, forget jobs whose retention is over.
        """

    async def recover(self, now_ms: int) -> Sweep:
        """Called once, before the first claim: what an earlier process left running loses its worker now, and what
        webhooks it was posting are due again as the same attempt, without waiting for leases to lapse, where this
        process is the only one that uses the store. Then as `sweep`.
        """

    async def next_ms(self) -> int | None:
        """When the next sweep or webhook is due; None if nothing is."""

    @property
    def tick(self) -> int:
        """Grows with every change that this process learns of. Take it, then read a job, then `watch` from there."""

    async def watch(self, ids: Sequence[str], timeout_s: float, since: int) -> None:
        """Return when one of the jobs may have changed after `tick` was `since`, or the time is over.

        May return early, never late: `tick`, then `get`, then `watch` misses nothing that `get` did not show.
        """

    async def wait_work(self, endpoints: Sequence[str], timeout_s: float, since: int) -> None:
        """Return when a job of these endpoints may wait to be claimed that did not when `tick` was `since`, or the time
        is over. Misses nothing if `since` was read before the last `claim`.
        """

    async def close(self) -> None:
        """Finish what was called, then let go of the store. Every later call fails."""


# How the stores that keep rows write what is not text: a state as its index, and behind the states what is counted
# besides; the columns of a job, without its bytes, in the order in which `job_of` takes them.
STATES = tuple(State)
CODES = {state: code for code, state in enumerate(STATES)}
RETRIED, ACCEPTED = len(STATES), len(STATES) + 1
COLUMNS = """id, endpoint, created_ms, ttl_ms, execution_timeout_ms, retention_ms, low_priority, webhook, webhook_form,
    tags, batch, state, attempt, retries, worker, started_ms, finished_ms, queued_ms, lease_ms, expires_ms, error,
    webhook_note, request_id"""


def job_of(row: Sequence[Any], input: bytes = b"", passed: bytes = b"") -> Job:
    """A job of which `row` begins with COLUMNS and its value: what it has reported last, progress or its output."""
    (id, endpoint, created_ms, ttl_ms, execution_timeout_ms, retention_ms, low_priority, webhook, form) = row[:9]
    (tags, batch, code, attempt, retries, worker, started_ms, finished_ms, queued_ms, lease_ms, expires_ms) = row[9:20]
    (error, note, request_id, value), state = row[20:24], STATES[code]
    return Job(
        Request(
            id, endpoint, input, created_ms, ttl_ms, execution_timeout_ms, retention_ms, bool(low_priority), webhook,
            form, passed, tags, batch, request_id,
        ),
        state, attempt, retries, worker, started_ms, finished_ms, queued_ms, lease_ms, expires_ms,
        None if state.is_final else value, value if state.is_final else None, error, note,
    )  # fmt: skip


def added(request: Request, claim: Claim | None = None) -> Job:
    """A job as `add` leaves it: waiting, or claimed with the same commit."""
    now_ms = request.created_ms
    expires_ms = now_ms + request.ttl_ms
    if claim is None:
        return Job(request, State.IN_QUEUE, queued_ms=now_ms, expires_ms=expires_ms)
    lease_ms = now_ms + claim.lease_ms
    return Job(request, State.IN_PROGRESS, 1, 0, claim.worker, now_ms, 0, now_ms, lease_ms, expires_ms)


def counts_of(numbers: Iterable[Sequence[int]]) -> Counts:
    """What (code, how many there are, how many there were) adds up to."""
    here, ever = [0] * (ACCEPTED + 1), [0] * (ACCEPTED + 1)
    for code, now, before in numbers:
        here[code], ever[code] = now, before
    return Counts(*here[:2], *ever[2:])


def exists(id: str) -> ServingError:
    """What `add` raises for an id that is in the store."""
    return ServingError(Kind.EXISTS, f"job {id!r} exists already")


def full(endpoint: str, waiting: int, limit: int) -> ServingError:
    """What `add` raises at the limit."""
    return ServingError(Kind.LIMITED, f"endpoint {endpoint!r}: {waiting} jobs wait, at most {limit} may")


def not_failed(id: str, state: State) -> ServingError:
    """What `retry` raises for a job that has not failed."""
    return ServingError(Kind.INVALID, f"job {id!r} is {state.value}, only a FAILED or TIMED_OUT one can be retried")


def expired(ttl_ms: int) -> str:
    """The error of a job that did not end in its time to live."""
    return f"ttl of {ttl_ms} ms expired"


async def open_store(url: str) -> JobStore:
    """The store that `url` names: `sqlite:PATH`, `redis://…` (`rediss://…`, `unix://…`) or `postgresql://…`.

    Raises ServingError(INVALID) for any other, ServingError(UNSUPPORTED) where a package is missing, and
    ServingError(UNAVAILABLE) if the store cannot be opened.
    """
    scheme, colon, rest = url.partition(":")
    match scheme:
        case "sqlite" if rest:
            from penstock.job_api.store_sqlite import SqliteJobStore

            return await SqliteJobStore.open(rest)
        case "redis" | "rediss" | "unix" if colon:
            from penstock.job_api.store_redis import RedisJobStore

            return await RedisJobStore.open(url)
        case "postgresql" if colon:
            from penstock.job_api.store_postgres import PostgresJobStore

            return await PostgresJobStore.open(url)
    raise ServingError(
        Kind.INVALID, f"job store {url!r}: expected sqlite:PATH, redis://HOST:PORT/DB or postgresql://HOST:PORT/NAME"
    )
