"""Jobs in one SQLite file: no server, nothing to install, and every answer waits for the disk.

One thread has the connection. Whatever was called while it wrote becomes one transaction, so that many jobs share the
cost of one fsync. What must agree with a change of a job's state (the counters, the outbox, what it leaves behind) is
kept by triggers, in the same transaction and the same step; what enters together is counted together.
"""

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import queue
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import chain, groupby
from operator import itemgetter
from typing import Any, TypeAlias, TypeVar

from msgspec import Struct

from penstock.errors import Kind, ServingError
from penstock.job_api.changes import Changes, work
from penstock.job_api.store import (
    ACCEPTED,
    CODES,
    COLUMNS,
    MAX_RETRIES,
    RETRIED,
    STATES,
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
    counts_of,
    exists,
    full,
    job_of,
    not_failed,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")
Row: TypeAlias = tuple[Any, ...]

VERSION = 3  # of the schema, in user_version
APPLICATION_ID = 0x50454E53  # "PENS": whose file it is
GROUP = 256  # from so many calls on a transaction waits for no more
SWEPT_AT_ONCE = 500  # jobs in one transaction of a sweep, so that other calls come between
BUSY_S = 5.0  # how long another process may hold the write lock
POLL_S = 0.1  # how often to look whether another process has written, while somebody waits

CANCELLED, FAILED, TIMED_OUT = CODES[State.CANCELLED], CODES[State.FAILED], CODES[State.TIMED_OUT]

# State 0 waits, 1 runs, from 2 on it is final. `n` is the order of submission. Inputs, and values (the newest progress,
# then the output), have tables of their own: a change of state writes a job's row anew, and they may be megabytes.
# `wake_ms` is when a sweep has to look at a job: NULL once it has expired and is kept for its webhook alone.
SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS jobs (
    n INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, endpoint TEXT NOT NULL, low_priority INTEGER NOT NULL,
    created_ms INTEGER NOT NULL, ttl_ms INTEGER NOT NULL, execution_timeout_ms INTEGER NOT NULL,
    retention_ms INTEGER NOT NULL, webhook TEXT NOT NULL, webhook_form TEXT NOT NULL, tags BLOB NOT NULL,
    batch TEXT NOT NULL, request_id TEXT NOT NULL DEFAULT '',
    queued_ms INTEGER NOT NULL, expires_ms INTEGER NOT NULL, wake_ms INTEGER, state INTEGER NOT NULL DEFAULT 0,
    attempt INTEGER NOT NULL DEFAULT 0, retries INTEGER NOT NULL DEFAULT 0, worker TEXT NOT NULL DEFAULT '',
    started_ms INTEGER NOT NULL DEFAULT 0, finished_ms INTEGER NOT NULL DEFAULT 0, lease_ms INTEGER NOT NULL DEFAULT 0,
    error TEXT, webhook_note TEXT NOT NULL DEFAULT '',
    yielded INTEGER NOT NULL DEFAULT 0, drained INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX IF NOT EXISTS ordered ON jobs (endpoint, state, low_priority, n);
CREATE INDEX IF NOT EXISTS batched ON jobs (batch, endpoint, state, n) WHERE batch <> '';
CREATE INDEX IF NOT EXISTS waking ON jobs (wake_ms) WHERE wake_ms IS NOT NULL;
CREATE TABLE IF NOT EXISTS inputs (n INTEGER PRIMARY KEY, input BLOB NOT NULL, passed BLOB NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS vals (n INTEGER PRIMARY KEY, value BLOB NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS chunks (n INTEGER, i INTEGER, value BLOB NOT NULL, PRIMARY KEY (n, i)) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS outbox (
    n INTEGER PRIMARY KEY, due_ms INTEGER NOT NULL, failed INTEGER NOT NULL DEFAULT 0, taken INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX IF NOT EXISTS due ON outbox (due_ms);
CREATE TABLE IF NOT EXISTS tally (
    endpoint TEXT, state INTEGER, here INTEGER NOT NULL, ever INTEGER NOT NULL, PRIMARY KEY (endpoint, state)
) STRICT, WITHOUT ROWID;

DROP TRIGGER IF EXISTS entered; -- of version 1: a group of submissions is counted by who enters it, in one step
CREATE TRIGGER IF NOT EXISTS moved AFTER UPDATE OF state ON jobs BEGIN
    UPDATE tally SET here = here - 1 WHERE endpoint = old.endpoint AND state = old.state;
    INSERT INTO tally VALUES (new.endpoint, new.state, 1, 1)
        ON CONFLICT DO UPDATE SET here = here + 1, ever = ever + 1;
    DELETE FROM vals WHERE n = new.n;
END;
CREATE TRIGGER IF NOT EXISTS ended AFTER UPDATE OF state ON jobs WHEN new.state > 1 AND new.webhook <> '' BEGIN
    INSERT INTO outbox (n, due_ms) VALUES (new.n, new.finished_ms);
END;
CREATE TRIGGER IF NOT EXISTS requeued AFTER UPDATE OF state ON jobs WHEN new.state = 0 BEGIN
    DELETE FROM chunks WHERE n = new.n;
    DELETE FROM outbox WHERE n = new.n;
    UPDATE jobs SET yielded = 0, drained = 0 WHERE n = new.n AND yielded > 0;
END;
CREATE TRIGGER IF NOT EXISTS retried AFTER UPDATE OF state ON jobs
    WHEN new.state = 0 AND (old.state > 1 OR new.retries > old.retries) BEGIN
    INSERT INTO tally VALUES (new.endpoint, {RETRIED}, 0, 1) ON CONFLICT DO UPDATE SET ever = ever + 1;
END;
CREATE TRIGGER IF NOT EXISTS renumbered AFTER UPDATE OF n ON jobs BEGIN
    UPDATE inputs SET n = new.n WHERE n = old.n;
END;
CREATE TRIGGER IF NOT EXISTS left AFTER DELETE ON jobs BEGIN
    UPDATE tally SET here = here - 1 WHERE endpoint = old.endpoint AND state = old.state;
    DELETE FROM inputs WHERE n = old.n;
    DELETE FROM vals WHERE n = old.n;
    DELETE FROM chunks WHERE n = old.n;
    DELETE FROM outbox WHERE n = old.n;
END;
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {VERSION};
COMMIT;
"""

VALUE = "(SELECT value FROM vals WHERE vals.n = jobs.n)"
INPUT = "(SELECT input FROM inputs WHERE inputs.n = jobs.n)"
PASSED = "(SELECT passed FROM inputs WHERE inputs.n = jobs.n)"

# All in one statement each: between two, the interpreter may be lost to the event loop's thread for milliseconds.
ENTER_SIZES = (64, 16, 4, 1)
ENTER_COLUMNS = """n, id, endpoint, low_priority, created_ms, ttl_ms, execution_timeout_ms, retention_ms, webhook,
    webhook_form, tags, batch, request_id, queued_ms, expires_ms, wake_ms, state, attempt, worker, started_ms,
    lease_ms"""
ENTER = {
    k: f"INSERT INTO jobs ({ENTER_COLUMNS}) VALUES " + ", ".join([f"({', '.join('?' * 21)})"] * k) for k in ENTER_SIZES
}
ENTER_INPUTS = {k: "INSERT INTO inputs VALUES " + ", ".join(["(?, ?, ?)"] * k) for k in ENTER_SIZES}

COUNT = """
    INSERT INTO tally VALUES (?, ?, ?, ?)
    ON CONFLICT DO UPDATE SET here = here + excluded.here, ever = ever + excluded.ever"""
CLAIM = f"""
    UPDATE jobs SET state = 1, attempt = attempt + 1, worker = :worker, started_ms = :now, lease_ms = :lease,
        wake_ms = min(expires_ms, :lease)
    WHERE n IN (SELECT n FROM jobs WHERE endpoint = :endpoint AND state = 0 AND expires_ms > :now
        ORDER BY low_priority, n LIMIT :free)
    RETURNING {COLUMNS}, NULL, {INPUT}, {PASSED}, n"""
# The running jobs of a JSON object {id: attempt}.
HELD = """FROM json_each(:held) AS held
    WHERE jobs.id = held.key AND attempt = held.value AND state = 1 AND expires_ms > :now"""
EXTEND = f"UPDATE jobs SET lease_ms = :lease, wake_ms = min(expires_ms, :lease) {HELD} RETURNING id"
RELEASE = f"UPDATE jobs SET state = 0, lease_ms = 0, wake_ms = expires_ms {HELD} RETURNING id, endpoint"
FIND_HELD = f"SELECT jobs.n {HELD.replace('FROM', 'FROM jobs,')}"
RUNNING = """
    SELECT n FROM jobs
    WHERE endpoint IN (SELECT endpoint FROM tally WHERE state = 1 AND here > 0) AND state = 1 AND expires_ms > ?"""
UNTAKE = "UPDATE outbox SET taken = 0, due_ms = ? WHERE taken"
KEEP = "UPDATE jobs SET expires_ms = :until, wake_ms = :until WHERE id = :id AND state > 1 AND wake_ms NOT NULL"
# The jobs of a JSON array of `n`.
THESE = "n IN (SELECT value FROM json_each(:these))"
RETRY_LOST = f"""
    UPDATE jobs SET state = 0, retries = retries + 1, lease_ms = 0, wake_ms = expires_ms
    WHERE {THESE} AND retries < {MAX_RETRIES} RETURNING n, id, endpoint"""
END = "finished_ms = :now, lease_ms = 0, expires_ms = :now + retention_ms, wake_ms = :now + retention_ms"
FAIL_LOST = f"UPDATE jobs SET state = {FAILED}, error = :error, {END} WHERE {THESE} RETURNING id"
FINISH = f"""
    UPDATE jobs SET state = :state, error = :error, {END}
    WHERE id = :id AND attempt = :attempt AND state = 1 AND expires_ms > :now RETURNING n"""
CANCEL = f"""
    UPDATE jobs SET state = {CANCELLED}, {END}
    WHERE id = :id AND state < 2 AND expires_ms > :now AND (:endpoint = '' OR endpoint = :endpoint) RETURNING id"""
PURGE = f"""
    UPDATE jobs SET state = {CANCELLED}, {END}
    WHERE endpoint = :endpoint AND state = 0 AND expires_ms > :now RETURNING id"""
REQUEUE = """
    UPDATE jobs SET state = 0, queued_ms = :now, expires_ms = :now + ttl_ms, wake_ms = :now + ttl_ms, finished_ms = 0,
        retries = 0, error = NULL, webhook_note = '' WHERE id = :id"""
EXPIRE = f"""
    UPDATE jobs SET state = {TIMED_OUT}, error = 'ttl of ' || ttl_ms || ' ms expired', finished_ms = :now, lease_ms = 0
    WHERE {THESE}"""
GET = f"SELECT {COLUMNS}, {VALUE} FROM jobs WHERE id = ? AND expires_ms > ? AND ? IN ('', endpoint)"
GET_WHOLE = GET.replace(" FROM jobs", f", {INPUT} FROM jobs")
AHEAD = "SELECT 1 FROM jobs WHERE endpoint = ? AND state = 0 AND low_priority <= ? AND expires_ms > ? LIMIT 1"
# Of each state and priority as many as the page could need, straight from the index, then their order.
LIST = (
    f"""
    SELECT {COLUMNS}, {VALUE} FROM jobs WHERE n IN ("""
    + " UNION ALL ".join(
        f"""SELECT n FROM (SELECT n FROM jobs WHERE endpoint = :endpoint AND state = {code} AND low_priority = {low}
        AND :state IN ({code}, -1) ORDER BY n DESC LIMIT :offset + :limit)"""
        for code in range(len(STATES))
        for low in (0, 1)
    )
    + ") ORDER BY n DESC LIMIT :limit OFFSET :offset"
)


TOTAL = "SELECT ifnull(sum(here), 0) FROM tally WHERE endpoint = :endpoint AND :state IN (state, -1)"
OF_BATCH = "FROM jobs WHERE batch = :batch AND batch <> '' AND endpoint = :endpoint AND :state IN (state, -1)"
LIST_BATCH = f"SELECT {COLUMNS}, {VALUE} {OF_BATCH} ORDER BY n DESC LIMIT :limit OFFSET :offset"
TOTAL_OF_BATCH = f"SELECT count(*) {OF_BATCH}"


class _Read(Struct):
    run: Callable[[sqlite3.Connection], Any]
    future: "asyncio.Future[Any]"


class _Write(Struct):
    """`run` raises ServingError before it has written anything, or not at all. It notes the keys that change."""

    run: "Callable[[sqlite3.Connection, _Keys], Any]"
    future: "asyncio.Future[Any]"


class _Add(Struct):
    request: Request
    limit: int
    claim: Claim | None
    future: "asyncio.Future[Any]"


_Call: TypeAlias = _Read | _Write | _Add
_Calls: TypeAlias = list[_Call]
_Outcome: TypeAlias = "tuple[asyncio.Future[Any], Any, Exception | None]"
_Outcomes: TypeAlias = "list[_Outcome]"
_Keys: TypeAlias = list[str]  # that change; inside the store, `list` is the call


class SqliteJobStore:
    """Several processes of a machine may share a file: claims are leases, and each sees others' writes in POLL_S."""

    def __init__(self, path: str, owners: int) -> None:
        self._path = path
        self._owners = owners  # descriptor of a file that every process with this store open holds a shared lock on
        self._loop = asyncio.get_running_loop()
        self._changes = Changes()
        self._called: _Calls = []  # in this turn of the loop
        self._groups: queue.SimpleQueue[_Calls | None] = queue.SimpleQueue()
        self._closed = False
        self._looking = False
        self._data_version = 0  # of the connection: another process has written if it differs
        self._ended = self._loop.create_future()
        self._thread = threading.Thread(target=self._serve, name="penstock-jobs", daemon=True)

    @classmethod
    async def open(cls, path: str) -> "SqliteJobStore":
        """Raises ServingError(UNAVAILABLE) for a file that cannot be opened, is no job store, or is a newer one."""
        path = os.path.abspath(path)  # noqa: ASYNC240 (reads no disk)
        try:
            # Not the database file itself: closing a second descriptor of that would end SQLite's own locks on it.
            owners = await asyncio.to_thread(_hold, f"{path}-owners")
        except OSError as error:
            raise ServingError(Kind.UNAVAILABLE, f"job store {path}: {error.strerror}") from error
        store = cls(path, owners)
        store._thread.start()
        try:
            store._data_version = await store._read(_data_version)
        except ServingError:
            await store.close()
            raise
        return store

    async def add(self, request: Request, limit: int = 0, claim: Claim | None = None) -> Job | None:
        future = self._future()
        self._call(_Add(request, limit, claim, future))
        job: Job | None = await future
        return job

    async def claim(self, slots: Mapping[str, int], worker: str, now_ms: int, lease_ms: int) -> Sequence[Job]:
        def run(db: sqlite3.Connection, changed: _Keys) -> list[Job]:
            claimed: list[Row] = []
            endpoints: Collection[str] = slots
            if len(slots) > 1:
                endpoints = {row[0] for row in db.execute("SELECT endpoint FROM tally WHERE state = 0 AND here > 0")}
            for endpoint, free in slots.items():
                if free > 0 and endpoint in endpoints:
                    rows = db.execute(
                        CLAIM,
                        {
                            "endpoint": endpoint,
                            "worker": worker,
                            "now": now_ms,
                            "lease": now_ms + lease_ms,
                            "free": free,
                        },
                    ).fetchall()
                    rows.sort(key=lambda row: (row[6], row[-1]))  # low_priority, n
                    claimed += rows
            changed += [row[0] for row in claimed]
            return [job_of(row, input=row[-3], passed=row[-2]) for row in claimed]

        return await self._write(run)

    async def extend(self, held: Mapping[str, int], now_ms: int, lease_ms: int) -> Sequence[str]:
        def run(db: sqlite3.Connection, _: _Keys) -> _Keys:
            given = {"held": json.dumps(dict(held)), "now": now_ms, "lease": now_ms + lease_ms}
            kept = {row[0] for row in db.execute(EXTEND, given)}
            return [id for id in held if id not in kept]

        return await self._write(run)

    async def release(self, held: Mapping[str, int], now_ms: int) -> None:
        def run(db: sqlite3.Connection, changed: _Keys) -> None:
            for id, endpoint in db.execute(RELEASE, {"held": json.dumps(dict(held)), "now": now_ms}):
                changed += (id, work(endpoint))

        await self._write(run)

    async def lose(self, held: Mapping[str, int], error: str, now_ms: int) -> Sequence[Job]:
        def run(db: sqlite3.Connection, changed: _Keys) -> list[Job]:
            found = [row[0] for row in db.execute(FIND_HELD, {"held": json.dumps(dict(held)), "now": now_ms})]
            _lose(db, found, error, now_ms, changed)
            lost = db.execute(f"SELECT {COLUMNS}, NULL FROM jobs WHERE {THESE}", {"these": json.dumps(found)})
            jobs = {row[0]: job_of(row) for row in lost}
            return [jobs[id] for id in held if id in jobs]

        return await self._write(run)

    async def append(self, id: str, attempt: int, values: Sequence[bytes]) -> bool:
        def run(db: sqlite3.Connection, changed: _Keys) -> bool:
            row = db.execute(
                "UPDATE jobs SET yielded = yielded + ? WHERE id = ? AND attempt = ? AND state = 1 RETURNING n, yielded",
                (len(values), id, attempt),
            ).fetchall()
            if not row:
                return False
            n, yielded = row[0]
            first = yielded - len(values)
            db.executemany("INSERT INTO chunks VALUES (?, ?, ?)", [(n, first + i, v) for i, v in enumerate(values)])
            changed.append(id)
            return True

        return await self._write(run)

    async def progress(self, id: str, attempt: int, value: bytes) -> bool:
        def run(db: sqlite3.Connection, changed: _Keys) -> bool:
            set_ = "INSERT OR REPLACE INTO vals SELECT n, ? FROM jobs WHERE id = ? AND attempt = ? AND state = 1"
            if not db.execute(set_, (value, id, attempt)).rowcount:
                return False
            changed.append(id)
            return True

        return await self._write(run)

    async def finish(
        self, id: str, attempt: int, state: State, now_ms: int, output: bytes | None = None, error: str | None = None
    ) -> bool:
        assert state.is_final

        def run(db: sqlite3.Connection, changed: _Keys) -> bool:
            given = {"id": id, "attempt": attempt, "state": CODES[state], "error": error, "now": now_ms}
            row = db.execute(FINISH, given).fetchall()
            if not row:
                return False
            if output is not None:
                db.execute("INSERT INTO vals VALUES (?, ?)", (row[0][0], output))
            changed.append(id)
            return True

        return await self._write(run)

    async def cancel(self, id: str, endpoint: str, now_ms: int) -> Job | None:
        def run(db: sqlite3.Connection, changed: _Keys) -> Job | None:
            if db.execute(CANCEL, {"id": id, "endpoint": endpoint, "now": now_ms}).fetchall():
                changed.append(id)
            return _get(db, id, endpoint, now_ms)

        return await self._write(run)

    async def retry(self, id: str, endpoint: str, now_ms: int) -> Job | None:
        def run(db: sqlite3.Connection, changed: _Keys) -> Job | None:
            job = _get(db, id, endpoint, now_ms)
            if job is None:
                return None
            if job.state not in (State.FAILED, State.TIMED_OUT):
                raise not_failed(id, job.state)
            db.execute(REQUEUE, {"id": id, "now": now_ms})
            db.execute("UPDATE jobs SET n = (SELECT max(n) + 1 FROM jobs) WHERE id = ?", (id,))
            changed += (id, work(job.request.endpoint))
            return _get(db, id, endpoint, now_ms)

        return await self._write(run)

    async def get(self, id: str, endpoint: str, now_ms: int, whole: bool = False) -> Job | None:
        return await self._read(lambda db: _get(db, id, endpoint, now_ms, whole))

    async def keep(self, id: str, until_ms: int) -> None:
        def run(db: sqlite3.Connection, _: _Keys) -> None:
            db.execute(KEEP, {"id": id, "until": until_ms})

        await self._write(run)

    async def chunks(self, id: str, start: int) -> Chunks | None:
        def run(db: sqlite3.Connection) -> Chunks | None:
            row = db.execute("SELECT n, state FROM jobs WHERE id = ?", (id,)).fetchall()
            return Chunks(STATES[row[0][1]], start, _chunks(db, row[0][0], start)) if row else None

        return await self._read(run)

    async def drain(self, id: str) -> Chunks | None:
        def run(db: sqlite3.Connection, _: _Keys) -> Chunks | None:
            row = db.execute("SELECT n, state, drained, yielded FROM jobs WHERE id = ?", (id,)).fetchall()
            if not row:
                return None
            n, state, drained, yielded = row[0]
            if drained == yielded:
                return Chunks(STATES[state], drained, ())
            db.execute("UPDATE jobs SET drained = yielded WHERE n = ?", (n,))
            return Chunks(STATES[state], drained, _chunks(db, n, drained))

        return await self._write(run)

    async def list(self, endpoint: str, state: State | None, offset: int, limit: int, batch: str = "") -> Page:
        def run(db: sqlite3.Connection) -> Page:
            code = -1 if state is None else CODES[state]
            given = {"endpoint": endpoint, "state": code, "offset": offset, "limit": limit, "batch": batch}
            (total,) = db.execute(TOTAL_OF_BATCH if batch else TOTAL, given).fetchone()
            rows = db.execute(LIST_BATCH if batch else LIST, given).fetchall() if limit else ()
            return Page([job_of(row) for row in rows], total)

        return await self._read(run)

    async def purge(self, endpoint: str, now_ms: int) -> Sequence[str]:
        def run(db: sqlite3.Connection, changed: _Keys) -> Sequence[str]:
            purged = [row[0] for row in db.execute(PURGE, {"endpoint": endpoint, "now": now_ms})]
            changed += purged
            return purged

        return await self._write(run)

    async def counts(self, endpoint: str) -> Counts:
        def run(db: sqlite3.Connection) -> Counts:
            return counts_of(db.execute("SELECT state, here, ever FROM tally WHERE endpoint = ?", (endpoint,)))

        return await self._read(run)

    async def totals(self) -> Mapping[str, Counts]:
        def run(db: sqlite3.Connection) -> Mapping[str, Counts]:
            rows = db.execute("SELECT endpoint, state, here, ever FROM tally ORDER BY endpoint")
            return {endpoint: counts_of(row[1:] for row in of) for endpoint, of in groupby(rows, itemgetter(0))}

        return await self._read(run)

    async def due_webhooks(self, now_ms: int, limit: int, lease_ms: int) -> Sequence[Delivery]:
        def run(db: sqlite3.Connection, _: _Keys) -> list[Delivery]:
            due = db.execute(
                "SELECT n, failed FROM outbox WHERE due_ms <= ? ORDER BY due_ms, n LIMIT ?", (now_ms, limit)
            ).fetchall()
            taken = []
            for n, failed in due:
                db.execute("UPDATE outbox SET taken = 1, due_ms = ? WHERE n = ?", (now_ms + lease_ms, n))
                row = db.execute(f"SELECT {COLUMNS}, {VALUE}, {INPUT} FROM jobs WHERE n = ?", (n,)).fetchone()
                taken.append(Delivery(job_of(row, input=row[-1]), failed + 1))
            return taken

        return await self._write(run)

    async def webhook_sent(self, id: str, attempt: int, delivered: bool, now_ms: int, note: str = "") -> None:
        def run(db: sqlite3.Connection, _: _Keys) -> None:
            row = db.execute(
                "SELECT n, wake_ms FROM outbox JOIN jobs USING (n) WHERE id = ? AND taken AND failed = ?",
                (id, attempt - 1),
            ).fetchall()
            if not row:
                return
            n, wake_ms = row[0]
            if not delivered:
                db.execute("UPDATE jobs SET webhook_note = ? WHERE n = ?", (note, n))
            if not delivered and attempt < WEBHOOK_ATTEMPTS:
                again = "UPDATE outbox SET failed = ?, taken = 0, due_ms = ? WHERE n = ?"
                db.execute(again, (attempt, now_ms + WEBHOOK_INTERVAL_MS, n))
            else:
                db.execute(f"DELETE FROM {'jobs' if wake_ms is None else 'outbox'} WHERE n = ?", (n,))

        await self._write(run)

    async def sweep(self, now_ms: int) -> Sweep:
        changed: _Keys = []
        stop: _Keys = []
        more = True
        while more:
            swept, more = await self._write(lambda db, noted: _sweep(db, now_ms, noted))
            changed += swept.changed
            stop += swept.stop
        return Sweep(changed, stop)

    async def recover(self, now_ms: int) -> Sweep:
        lost: _Keys = []

        def run(db: sqlite3.Connection, noted: _Keys) -> None:
            if not self._is_alone():
                logger.info("job store %s: another server has it open too; they share its jobs", self._path)
                return
            db.execute(UNTAKE, (now_ms,))
            lost[:] = _lose(db, [row[0] for row in db.execute(RUNNING, (now_ms,))], WORKER_LOST, now_ms, noted)

        await self._write(run)
        swept = await self.sweep(now_ms)
        return Sweep([*lost, *swept.changed], swept.stop)

    async def next_ms(self) -> int | None:
        def run(db: sqlite3.Connection) -> int | None:
            (wake_ms,) = db.execute("SELECT min(wake_ms) FROM jobs WHERE wake_ms NOT NULL").fetchone()
            (due_ms,) = db.execute("SELECT min(due_ms) FROM outbox").fetchone()
            return min((ms for ms in (wake_ms, due_ms) if ms is not None), default=None)

        return await self._read(run)

    @property
    def tick(self) -> int:
        return self._changes.tick

    async def watch(self, ids: Sequence[str], timeout_s: float, since: int) -> None:
        await self._wait(ids, timeout_s, since)

    async def wait_work(self, endpoints: Sequence[str], timeout_s: float, since: int) -> None:
        await self._wait([work(endpoint) for endpoint in endpoints], timeout_s, since)

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._hand_over()
            self._groups.put(None)
        await asyncio.shield(self._ended)

    async def pragma(self, name: str) -> int | str:
        """A setting of the store's own connection."""
        value: int | str = await self._read(lambda db: db.execute(f"PRAGMA {name}").fetchone()[0])
        return value

    def _future(self) -> "asyncio.Future[Any]":
        if self._closed:
            raise ServingError(Kind.UNAVAILABLE, f"job store {self._path} is closed")
        return self._loop.create_future()

    def _call(self, call: _Call) -> None:
        # One turn of the loop is one group: a thread that is woken by the first of 64 calls would commit it alone.
        if not self._called:
            self._loop.call_soon(self._hand_over)
        self._called.append(call)

    def _hand_over(self) -> None:
        if self._called:
            self._groups.put(self._called)
            self._called = []

    async def _read(self, run: Callable[[sqlite3.Connection], T]) -> T:
        future = self._future()
        self._call(_Read(run, future))
        result: T = await future
        return result

    async def _write(self, run: Callable[[sqlite3.Connection, _Keys], T]) -> T:
        future = self._future()
        self._call(_Write(run, future))
        result: T = await future
        return result

    async def _wait(self, keys: Sequence[str], timeout_s: float, since: int) -> None:
        if not self._looking:
            self._looking = True
            self._loop.call_later(POLL_S, self._look)
        await self._changes.wait(keys, timeout_s, since)

    def _look(self) -> None:
        """Has another process written? While somebody waits, and only then, this is asked every POLL_S."""
        self._looking = self._changes.awaited and not self._closed
        if self._looking:
            future = self._loop.create_future()
            future.add_done_callback(self._looked)
            self._call(_Read(_data_version, future))
            self._loop.call_later(POLL_S, self._look)

    def _looked(self, future: "asyncio.Future[int]") -> None:
        # A failure is no news of a change; whoever calls next is told.
        if future.exception() is None and future.result() != self._data_version:
            self._data_version = future.result()
            self._changes.note_all()

    def _settle(self, outcomes: Sequence[_Outcome], changed: Collection[str]) -> None:
        self._changes.note(changed)
        for future, result, error in outcomes:
            if not future.done():  # its caller may have been cancelled
                if error is None:
                    future.set_result(result)
                else:
                    future.set_exception(error)

    def _is_alone(self) -> bool:
        """Whether no other process has this store open. Called in the thread, inside a write transaction."""
        try:
            fcntl.flock(self._owners, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            fcntl.flock(self._owners, fcntl.LOCK_SH)
        return True

    def _serve(self) -> None:
        """The thread: open, do what is called until the store is closed, close."""
        try:
            db = _connect(self._path)
        except (sqlite3.Error, OSError, ServingError) as error:
            first = self._groups.get()
            assert first is not None
            self._answer([(call.future, None, self._told(error)) for call in first])
            self._leave()
            return
        more = True
        while more:
            group: _Calls = []
            while not group or (len(group) < GROUP and not self._groups.empty()):
                calls = self._groups.get()
                more = calls is not None
                if calls is None:
                    break
                group += calls
            if reads := [call for call in group if isinstance(call, _Read)]:
                self._read_all(db, reads)
            if writes := [call for call in group if not isinstance(call, _Read)]:
                self._write_all(db, writes)
        db.close()
        self._leave()

    def _leave(self) -> None:
        os.close(self._owners)
        self._answer([(self._ended, None, None)])

    def _answer(self, outcomes: Sequence[_Outcome], changed: Collection[str] = ()) -> None:
        self._loop.call_soon_threadsafe(self._settle, outcomes, changed)

    def _told(self, error: Exception) -> Exception:
        """What the caller is told: SQLite's error and the disk's as ServingError(UNAVAILABLE), any other as it is."""
        if not isinstance(error, sqlite3.Error | OSError):
            return error
        told = ServingError(Kind.UNAVAILABLE, f"job store {self._path}: {error}")
        told.__cause__ = error
        return told

    def _read_all(self, db: sqlite3.Connection, reads: Sequence[_Read]) -> None:
        outcomes: _Outcomes = []
        db.execute("BEGIN")  # one state for all, and no look at the file between two statements
        for read in reads:
            try:
                outcomes.append((read.future, read.run(db), None))
            except Exception as error:  # noqa: BLE001 (it is its caller's)
                outcomes.append((read.future, None, self._told(error)))
        if db.in_transaction:  # a failure of the disk ends it
            db.execute("COMMIT")
        self._answer(outcomes)

    def _write_all(self, db: sqlite3.Connection, writes: Sequence[_Write | _Add]) -> None:
        """One transaction. If it fails for what one of them wrote, each has one of its own."""
        changed: _Keys = []
        outcomes: _Outcomes = []
        try:
            db.execute("BEGIN IMMEDIATE")
            if adds := [write for write in writes if isinstance(write, _Add)]:
                outcomes += _enter(db, adds, changed)
            for write in writes:
                if isinstance(write, _Write):
                    try:
                        outcomes.append((write.future, write.run(db, changed), None))
                    except ServingError as error:
                        outcomes.append((write.future, None, error))
            db.execute("COMMIT")
        except Exception as error:  # noqa: BLE001 (it is its caller's)
            if db.in_transaction:
                db.execute("ROLLBACK")
            if len(writes) == 1 and isinstance(writes[0], _Add) and isinstance(error, sqlite3.IntegrityError):
                error = exists(writes[0].request.id)
            elif len(writes) > 1 and not isinstance(error, sqlite3.OperationalError):
                for write in writes:
                    self._write_all(db, [write])
                return
            changed = []
            outcomes = [(write.future, None, self._told(error)) for write in writes]
        self._answer(outcomes, changed)


def _hold(path: str) -> int:
    """A descriptor of this file with a shared lock, which ends with the process."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(file, fcntl.LOCK_SH)
    return file


def _connect(path: str) -> sqlite3.Connection:
    with contextlib.suppress(FileExistsError):  # its owner's alone, for jobs may hold secrets; the log takes that over
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, cached_statements=256)
    try:
        _prepare(db, path)
    except BaseException:
        db.close()
        raise
    return db


def _prepare(db: sqlite3.Connection, path: str) -> None:
    """Settings, and the schema of a new file. Raises ServingError(UNAVAILABLE) for a file that is not ours to write."""
    (application,) = db.execute("PRAGMA application_id").fetchone()
    (version,) = db.execute("PRAGMA user_version").fetchone()
    (things,) = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if things and application != APPLICATION_ID:
        raise ServingError(Kind.UNAVAILABLE, f"job store {path}: this is a database of another program")
    if version > VERSION:
        text = f"job store {path}: written by a newer Penstock, as version {version}; this one knows version {VERSION}"
        raise ServingError(Kind.UNAVAILABLE, text)
    (mode,) = db.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise ServingError(Kind.UNAVAILABLE, f"job store {path}: its file system does not allow a write-ahead log")
    db.execute("PRAGMA synchronous = FULL")  # an answer means that the job survives a power cut
    db.execute("PRAGMA cache_size = -8192")  # KiB
    db.execute("PRAGMA wal_autocheckpoint = 4000")  # pages
    db.execute(f"PRAGMA journal_size_limit = {64 << 20}")  # bytes that the log keeps after a checkpoint
    if version < VERSION:
        _add_column(db)
        db.executescript(SCHEMA)


def _add_column(db: sqlite3.Connection) -> None:
    """What jobs of versions before 3 lack. A process of such a version, which has the file open, goes on."""
    db.execute("BEGIN IMMEDIATE")  # another process may be at it
    columns = [row[1] for row in db.execute("PRAGMA table_info(jobs)")]
    if columns and "request_id" not in columns:
        db.execute("ALTER TABLE jobs ADD COLUMN request_id TEXT NOT NULL DEFAULT ''")
    db.execute("COMMIT")


def _data_version(db: sqlite3.Connection) -> int:
    version: int = db.execute("PRAGMA data_version").fetchone()[0]
    return version


def _enter(db: sqlite3.Connection, adds: Sequence[_Add], changed: _Keys) -> _Outcomes:
    """Queue what was submitted, or claim it, in as few statements as there may be."""
    outcomes: _Outcomes = []
    waiting: dict[str, int] = {}  # by endpoint, these submissions included
    ahead: dict[tuple[str, bool], bool] = {}  # whether a job of this endpoint waits that is taken before this priority
    entered: Counter[tuple[str, int]] = Counter()  # by endpoint and state
    accepted: list[tuple[Any, ...]] = []
    inputs: list[tuple[Any, ...]] = []
    (n,) = db.execute("SELECT ifnull(max(n), 0) + 1 FROM jobs").fetchone()
    for add in adds:
        request, claim = add.request, add.claim
        endpoint, low_priority, now_ms = request.endpoint, request.low_priority, request.created_ms
        if endpoint not in waiting:
            row = db.execute("SELECT here FROM tally WHERE endpoint = ? AND state = 0", (endpoint,)).fetchall()
            waiting[endpoint] = row[0][0] if row else 0
        if add.limit and waiting[endpoint] >= add.limit:
            outcomes.append((add.future, None, full(endpoint, waiting[endpoint], add.limit)))
            continue
        if claim and waiting[endpoint] > claim.spare:
            if (endpoint, low_priority) not in ahead:
                row = db.execute(AHEAD, (endpoint, low_priority, now_ms)).fetchall()
                ahead[endpoint, low_priority] = bool(row)
            if ahead[endpoint, low_priority]:
                claim = None
        expires_ms = now_ms + request.ttl_ms
        claimed = (0, 0, "", 0, 0)  # state, attempt, worker, started_ms, lease_ms
        wake_ms = expires_ms
        if claim:
            lease_ms = now_ms + claim.lease_ms
            claimed = (1, 1, claim.worker, now_ms, lease_ms)
            wake_ms = min(expires_ms, lease_ms)
        else:
            waiting[endpoint] += 1
            ahead[endpoint, True] = True
            ahead[endpoint, False] = ahead.get((endpoint, False), False) or not low_priority
        accepted.append(
            (
                n,
                request.id,
                endpoint,
                low_priority,
                now_ms,
                request.ttl_ms,
                request.execution_timeout_ms,
                request.retention_ms,
                request.webhook,
                request.webhook_form,
                request.tags,
                request.batch,
                request.request_id,
                now_ms,
                expires_ms,
                wake_ms,
                *claimed,
            )
        )
        entered[endpoint, claimed[0]] += 1
        inputs.append((n, request.input, request.passed))
        n += 1
        outcomes.append((add.future, added(request, claim) if claim else None, None))
        if not claim:
            changed.append(work(endpoint))
    start = 0
    for size in ENTER_SIZES:
        while len(accepted) - start >= size:
            end = start + size
            db.execute(ENTER[size], list(chain.from_iterable(accepted[start:end])))
            db.execute(ENTER_INPUTS[size], list(chain.from_iterable(inputs[start:end])))
            start = end
    for (endpoint, code), number in entered.items():
        db.execute(COUNT, (endpoint, code, number, number))
        db.execute(COUNT, (endpoint, ACCEPTED, 0, number))
    return outcomes


def _get(db: sqlite3.Connection, id: str, endpoint: str, now_ms: int, whole: bool = False) -> Job | None:
    row = db.execute(GET_WHOLE if whole else GET, (id, now_ms, endpoint)).fetchall()
    return job_of(row[0], input=row[0][-1] if whole else b"") if row else None


def _chunks(db: sqlite3.Connection, n: int, start: int) -> Sequence[bytes]:
    rows = db.execute("SELECT value FROM chunks WHERE n = ? AND i >= ? ORDER BY i", (n, start)).fetchall()
    return tuple(row[0] for row in rows)


def _lose(db: sqlite3.Connection, these: Sequence[int], error: str, now_ms: int, changed: _Keys) -> _Keys:
    """The workers of these running jobs are gone. Returns the jobs' ids."""
    given = {"these": json.dumps(these), "error": error, "now": now_ms}
    again = db.execute(RETRY_LOST, given).fetchall()
    changed += (work(endpoint) for _, _, endpoint in again)
    given["these"] = json.dumps(sorted(set(these) - {row[0] for row in again}))
    ids = [row[1] for row in again] + [row[0] for row in db.execute(FAIL_LOST, given)]
    changed += ids
    return ids


def _sweep(db: sqlite3.Connection, now_ms: int, noted: _Keys) -> tuple[Sweep, bool]:
    """Look at the jobs whose time has come longest ago. True if there may be more of them."""
    rows = db.execute(
        "SELECT n, id, state, expires_ms FROM jobs WHERE wake_ms <= ? ORDER BY wake_ms LIMIT ?", (now_ms, SWEPT_AT_ONCE)
    ).fetchall()
    lapsed = [n for n, _, state, expires_ms in rows if state == 1 and expires_ms > now_ms]
    late = [(n, id) for n, id, state, expires_ms in rows if state < 2 and expires_ms <= now_ms]
    stop = [id for _, id, state, expires_ms in rows if state == 1 and expires_ms <= now_ms]
    over = [n for n, _, _, expires_ms in rows if expires_ms <= now_ms]
    lost = _lose(db, lapsed, WORKER_LOST, now_ms, noted) if lapsed else []
    if late:
        db.execute(EXPIRE, {"these": json.dumps([n for n, _ in late]), "now": now_ms})
    if over:
        given = {"these": json.dumps(over)}
        db.execute(f"DELETE FROM jobs WHERE {THESE} AND n NOT IN (SELECT n FROM outbox)", given)
        db.execute(f"UPDATE jobs SET wake_ms = NULL WHERE {THESE}", given)
    changed = [*lost, *(id for _, id in late)]
    noted += changed
    return Sweep(changed, stop), len(rows) == SWEPT_AT_ONCE
