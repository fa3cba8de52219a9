"""Jobs in PostgreSQL, for several servers. Most calls are one statement; claims pass over rows that others are taking.

The driver is asyncpg: its pool and its cache of prepared statements are part of it, and its licence is ours. Everything
lies in one schema (`?prefix=`, "penstock" if none). What must agree with a job's state (the counters, the outbox, what
it leaves behind) is kept by triggers.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from itertools import groupby
from operator import itemgetter
from typing import Any, TypeAlias
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

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

try:
    import asyncpg
except ModuleNotFoundError as missing:
    text = "a job store in PostgreSQL needs the package asyncpg: pip install 'penstock[postgres]'"
    raise ServingError(Kind.UNSUPPORTED, text) from missing

logger = logging.getLogger(__name__)

Row: TypeAlias = Sequence[Any]

VERSION = 2
CONNECTIONS = 16
TIMEOUT_S = 10.0
RECONNECT_S = 0.5
SWEPT_AT_ONCE = 500  # jobs in one transaction of a sweep
FOLD_AT = 256  # rows of `deltas` that are worth adding up
PAYLOAD_BYTES = 7000  # of one notification; the server takes less than 8000

CANCELLED, FAILED, TIMED_OUT = CODES[State.CANCELLED], CODES[State.FAILED], CODES[State.TIMED_OUT]

# State 0 waits, 1 runs, from 2 on it is final. `n` is the order of submission, `value` the newest progress, then the
# output; `wake_ms` is when a sweep has to look at a job: NULL once it has expired and is kept for its webhook alone.
# Counters are added up from `deltas` now and then: if every job changed a row of its endpoint's, each would wait for
# the commit of the one before.
SCHEMA = f"""
CREATE TABLE jobs (
    id text PRIMARY KEY, n bigserial NOT NULL, endpoint text NOT NULL, low_priority boolean NOT NULL,
    created_ms bigint NOT NULL, ttl_ms bigint NOT NULL, execution_timeout_ms bigint NOT NULL,
    retention_ms bigint NOT NULL, webhook text NOT NULL, webhook_form text NOT NULL, tags bytea NOT NULL,
    batch text NOT NULL, request_id text NOT NULL DEFAULT '', input bytea NOT NULL, passed bytea NOT NULL,
    queued_ms bigint NOT NULL, expires_ms bigint NOT NULL, wake_ms bigint, state smallint NOT NULL,
    attempt bigint NOT NULL, retries bigint NOT NULL DEFAULT 0, worker text NOT NULL, started_ms bigint NOT NULL,
    finished_ms bigint NOT NULL DEFAULT 0, lease_ms bigint NOT NULL, value bytea, error text,
    webhook_note text NOT NULL DEFAULT '', yielded bigint NOT NULL DEFAULT 0, drained bigint NOT NULL DEFAULT 0
);
CREATE INDEX listed ON jobs (endpoint, n);
CREATE INDEX listed_by_state ON jobs (endpoint, state, n);
CREATE INDEX waiting ON jobs (endpoint, low_priority, n) WHERE state = 0;
CREATE INDEX batched ON jobs (batch, endpoint, n) WHERE batch <> '';
CREATE INDEX waking ON jobs (wake_ms) WHERE wake_ms IS NOT NULL;
CREATE TABLE chunks (id text, i bigint, value bytea NOT NULL, PRIMARY KEY (id, i));
CREATE TABLE outbox (
    id text PRIMARY KEY, due_ms bigint NOT NULL, failed bigint NOT NULL DEFAULT 0, taken boolean NOT NULL DEFAULT false
);
CREATE INDEX due ON outbox (due_ms);
CREATE TABLE tally (endpoint text, state smallint, here bigint, ever bigint, PRIMARY KEY (endpoint, state));
CREATE TABLE deltas (endpoint text, state smallint, here bigint, ever bigint);
CREATE VIEW numbers AS
    SELECT endpoint, state, sum(here)::bigint AS here, sum(ever)::bigint AS ever
    FROM (SELECT * FROM tally UNION ALL SELECT * FROM deltas) AS parts GROUP BY endpoint, state;

CREATE FUNCTION entered() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO deltas VALUES (new.endpoint, new.state, 1, 1);
    RETURN NULL;
END $$;
CREATE FUNCTION moved() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO deltas VALUES (old.endpoint, old.state, -1, 0), (new.endpoint, new.state, 1, 1);
    IF new.state > 1 AND new.webhook <> '' THEN
        INSERT INTO outbox (id, due_ms) VALUES (new.id, new.finished_ms);
    ELSIF new.state = 0 THEN
        DELETE FROM chunks WHERE id = new.id;
        DELETE FROM outbox WHERE id = new.id;
        IF old.state > 1 OR new.retries > old.retries THEN
            INSERT INTO deltas VALUES (new.endpoint, {RETRIED}, 0, 1);
        END IF;
    END IF;
    RETURN NULL;
END $$;
CREATE FUNCTION gone() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO deltas VALUES (old.endpoint, old.state, -1, 0);
    DELETE FROM chunks WHERE id = old.id;
    DELETE FROM outbox WHERE id = old.id;
    RETURN NULL;
END $$;
CREATE TRIGGER entered AFTER INSERT ON jobs FOR EACH ROW EXECUTE FUNCTION entered();
CREATE TRIGGER moved AFTER UPDATE OF state ON jobs FOR EACH ROW EXECUTE FUNCTION moved();
CREATE TRIGGER gone AFTER DELETE ON jobs FOR EACH ROW EXECUTE FUNCTION gone();
CREATE TABLE version (version integer NOT NULL);
INSERT INTO version VALUES ({VERSION});
"""
# Of version 1. A process that knows no other, and has the store open, goes on.
UPDATE = f"""
ALTER TABLE jobs ADD COLUMN request_id text NOT NULL DEFAULT '';
UPDATE version SET version = {VERSION};
"""

JOB = f"jobs.{COLUMNS}, jobs.value"

# $1 id, $2 endpoint, $3 low_priority, $4 created_ms, ... $15 limit, $16 worker, $17 lease_ms or NULL
ADD = f"""
    WITH seen AS (
        SELECT
            $15::bigint > 0 AND $15 <= coalesce((SELECT here FROM numbers WHERE endpoint = $2 AND state = 0), 0) AS no,
            $17::bigint IS NOT NULL AND NOT EXISTS (SELECT FROM jobs
                WHERE endpoint = $2 AND state = 0 AND low_priority <= $3 AND expires_ms > $4) AS first
    ), added AS (
        INSERT INTO jobs (id, endpoint, low_priority, created_ms, ttl_ms, execution_timeout_ms, retention_ms, webhook,
            webhook_form, tags, batch, request_id, input, passed, queued_ms, expires_ms, wake_ms, state, attempt,
            worker, started_ms, lease_ms)
        SELECT $1, $2, $3, $4::bigint, $5::bigint, $6, $7, $8, $9, $10, $11, $12, $13, $14, $4, $4 + $5,
            CASE WHEN first THEN least($4 + $5, $4 + $17) ELSE $4 + $5 END, first::integer, first::integer,
            CASE WHEN first THEN $16 ELSE '' END, CASE WHEN first THEN $4 ELSE 0 END,
            CASE WHEN first THEN $4 + $17 ELSE 0 END
        FROM seen WHERE NOT no
        ON CONFLICT (id) DO NOTHING RETURNING state
    ), counted AS (INSERT INTO deltas SELECT $2, {ACCEPTED}, 0, 1 FROM added)
    SELECT no, (SELECT state FROM added) FROM seen"""
WAITING = "SELECT coalesce(sum(here), 0)::bigint FROM numbers WHERE endpoint = $1 AND state = 0"
CLAIM = f"""
    WITH taken AS (
        SELECT waiting.id, place FROM unnest($1::text[], $2::bigint[]) WITH ORDINALITY AS slots (name, free, place),
            LATERAL (SELECT id FROM jobs WHERE endpoint = name AND state = 0 AND expires_ms > $4
                ORDER BY low_priority, n LIMIT greatest(free, 0) FOR UPDATE SKIP LOCKED) AS waiting
    )
    UPDATE jobs SET state = 1, attempt = attempt + 1, worker = $3, started_ms = $4, lease_ms = $5,
        wake_ms = least(expires_ms, $5)
    FROM taken WHERE jobs.id = taken.id RETURNING {JOB}, input, passed, taken.place, n"""
# The running jobs of ids $1 and attempts $2, alive at $3: locked in one order, so that no two calls wait in a ring.
HELD = """
    WITH held AS (
        SELECT jobs.id FROM jobs JOIN unnest($1::text[], $2::bigint[]) AS given (id, attempt) USING (id)
        WHERE jobs.attempt = given.attempt AND state = 1 AND expires_ms > $3 ORDER BY jobs.id FOR UPDATE OF jobs
    )"""
BACK = "state = 0, lease_ms = 0, value = NULL, yielded = 0, drained = 0"
END = "finished_ms = $1, lease_ms = 0, expires_ms = $1 + retention_ms, wake_ms = $1 + retention_ms"
EXTEND = f"""{HELD}
    UPDATE jobs SET lease_ms = $4, wake_ms = least(expires_ms, $4)
    FROM held WHERE jobs.id = held.id RETURNING jobs.id"""
RELEASE = f"""{HELD}
    UPDATE jobs SET {BACK}, wake_ms = expires_ms FROM held WHERE jobs.id = held.id RETURNING jobs.id, endpoint"""
FIND_HELD = f"{HELD} SELECT id FROM held"
RETRY_LOST = f"""
    UPDATE jobs SET {BACK}, wake_ms = expires_ms, retries = retries + 1
    WHERE id = ANY($1) AND retries < {MAX_RETRIES} RETURNING id, endpoint"""
FAIL_LOST = f"UPDATE jobs SET state = {FAILED}, value = NULL, error = $3, {END} WHERE id = ANY($2)"
APPEND = """
    WITH grown AS (
        UPDATE jobs SET yielded = yielded + cardinality($3::bytea[]) WHERE id = $1 AND attempt = $2 AND state = 1
        RETURNING yielded - cardinality($3::bytea[]) AS first
    ), added AS (
        INSERT INTO chunks
        SELECT $1, first + i - 1, value FROM grown, unnest($3::bytea[]) WITH ORDINALITY AS given (value, i)
    )
    SELECT count(*) FROM grown"""
PROGRESS = "UPDATE jobs SET value = $3 WHERE id = $1 AND attempt = $2 AND state = 1 RETURNING id"
FINISH = f"""
    UPDATE jobs SET state = $4, value = $5, error = $6, {END}
    WHERE id = $2 AND attempt = $3 AND state = 1 AND expires_ms > $1 RETURNING id"""
KNOWN = "id = $2 AND expires_ms > $1 AND $3 IN ('', endpoint)"
CANCEL = f"UPDATE jobs SET state = {CANCELLED}, value = NULL, {END} WHERE {KNOWN} AND state < 2 RETURNING {JOB}"
RETRY = f"""
    UPDATE jobs SET {BACK}, n = nextval('jobs_n_seq'), queued_ms = $1, expires_ms = $1 + ttl_ms, wake_ms = $1 + ttl_ms,
        finished_ms = 0, retries = 0, error = NULL, webhook_note = ''
    WHERE {KNOWN} AND state IN ({FAILED}, {TIMED_OUT}) RETURNING {JOB}"""
GET = f"SELECT {JOB} FROM jobs WHERE {KNOWN}"
GET_WHOLE = f"SELECT {JOB}, input FROM jobs WHERE {KNOWN}"
KEEP = "UPDATE jobs SET expires_ms = $2, wake_ms = $2 WHERE id = $1 AND state > 1 AND wake_ms IS NOT NULL"
CHUNKS = """
    SELECT state, drained, yielded, ARRAY(SELECT value FROM chunks WHERE chunks.id = $1 AND i >= $2 ORDER BY i)
    FROM jobs WHERE id = $1"""
LIST = f"SELECT {JOB} FROM jobs WHERE endpoint = $1 {{}} ORDER BY n DESC OFFSET $2 LIMIT $3"
TOTAL = (
    "SELECT coalesce(sum(here), 0)::bigint FROM numbers WHERE endpoint = $1 AND ($2::smallint IS NULL OR state = $2)"
)
TOTAL_OF_BATCH = """
    SELECT count(*) FROM jobs
    WHERE endpoint = $1 AND ($2::smallint IS NULL OR state = $2) AND batch = $3 AND batch <> ''"""
PURGE = f"""
    WITH purged AS (
        SELECT id FROM jobs WHERE endpoint = $2 AND state = 0 AND expires_ms > $1 ORDER BY low_priority, n FOR UPDATE
    )
    UPDATE jobs SET state = {CANCELLED}, value = NULL, {END} FROM purged WHERE jobs.id = purged.id RETURNING jobs.id"""
DUE = f"""
    WITH taken AS (
        SELECT outbox.id, due_ms, n FROM outbox JOIN jobs USING (id) WHERE due_ms <= $1 ORDER BY due_ms, n LIMIT $2
        FOR UPDATE OF outbox SKIP LOCKED
    ), marked AS (
        UPDATE outbox SET taken = true, due_ms = $3 FROM taken WHERE outbox.id = taken.id RETURNING outbox.id, failed
    )
    SELECT {JOB}, input, failed FROM taken JOIN marked USING (id) JOIN jobs USING (id) ORDER BY due_ms, jobs.n"""
SENT = (
    "SELECT wake_ms FROM outbox JOIN jobs USING (id) WHERE id = $1 AND taken AND failed = $2 FOR UPDATE OF jobs, outbox"
)
SWEEP = """
    SELECT id, state, expires_ms FROM jobs WHERE wake_ms <= $1 ORDER BY wake_ms LIMIT $2 FOR UPDATE SKIP LOCKED"""
EXPIRE = f"""
    UPDATE jobs SET state = {TIMED_OUT}, error = 'ttl of ' || ttl_ms || ' ms expired', finished_ms = $1, lease_ms = 0,
        value = NULL WHERE id = ANY($2)"""
FORGET = "DELETE FROM jobs WHERE id = ANY($1) AND NOT EXISTS (SELECT FROM outbox WHERE outbox.id = jobs.id)"
RUNNING = """
    SELECT id FROM jobs WHERE endpoint IN (SELECT endpoint FROM numbers WHERE state = 1 AND here > 0) AND state = 1
        AND expires_ms > $1 ORDER BY id FOR UPDATE"""
UNTAKE = "UPDATE outbox SET taken = false, due_ms = $1 WHERE taken"
NEXT = """
    SELECT (SELECT min(wake_ms) FROM jobs WHERE wake_ms IS NOT NULL), (SELECT min(due_ms) FROM outbox),
        (SELECT count(*) FROM (SELECT FROM deltas LIMIT $1) AS few)"""
FOLD = """
    WITH these AS (SELECT ctid FROM deltas FOR UPDATE SKIP LOCKED),
        folded AS (DELETE FROM deltas WHERE ctid IN (SELECT ctid FROM these) RETURNING *)
    INSERT INTO tally SELECT endpoint, state, sum(here), sum(ever) FROM folded GROUP BY endpoint, state
        ORDER BY endpoint, state
    ON CONFLICT (endpoint, state) DO UPDATE SET here = tally.here + excluded.here, ever = tally.ever + excluded.ever"""
# The processes that have the store open share a lock each; who could have it alone is alone.
LOCK = "hashtextextended(current_schema(), 0)"


class PostgresJobStore:
    """Shared by any number of processes. What one has changed it tells the others after the commit: a notification in
    the same transaction would make every commit wait for the one before.
    """

    def __init__(self, name: str, address: str, schema: str) -> None:
        self._name = name  # without its password
        self._address = address
        self._schema = schema
        self._pool: asyncpg.Pool | None = None
        self._listener: asyncpg.Connection | None = None
        self._listening: asyncio.Task[None] | None = None
        self._changes = Changes()
        self._untold: set[str] = set()  # keys that changed here, and the others do not know
        self._telling: asyncio.Task[None] | None = None
        self._closed = False

    @classmethod
    async def open(cls, url: str) -> "PostgresJobStore":
        """Raises ServingError(UNAVAILABLE) if the server does not answer, or a newer Penstock wrote there."""
        parts = urlsplit(url)
        query = dict(parse_qsl(parts.query))
        schema = query.pop("prefix", "penstock")
        address = urlunsplit(parts._replace(query=urlencode(query)))
        host = parts.hostname or query.get("host", "")
        store = cls(f"postgresql://{host}{f':{parts.port}' if parts.port else ''}{parts.path}", address, schema)
        try:
            async with store._reached():
                await store._prepare()
        except BaseException:
            await store.close()
            raise
        return store

    async def add(self, request: Request, limit: int = 0, claim: Claim | None = None) -> Job | None:
        row = await self._row(
            ADD,
            request.id,
            request.endpoint,
            request.low_priority,
            request.created_ms,
            request.ttl_ms,
            request.execution_timeout_ms,
            request.retention_ms,
            request.webhook,
            request.webhook_form,
            request.tags,
            request.batch,
            request.request_id,
            request.input,
            request.passed,
            limit,
            claim.worker if claim else "",
            claim.lease_ms if claim else None,
        )
        refused, code = row
        if refused:
            (waiting,) = await self._row(WAITING, request.endpoint)
            raise full(request.endpoint, waiting, limit)
        if code is None:
            raise exists(request.id)
        self._note((request.id, work(request.endpoint)))
        if not claim or code == 0:
            return None
        return added(request, claim)

    async def claim(self, slots: Mapping[str, int], worker: str, now_ms: int, lease_ms: int) -> Sequence[Job]:
        rows = await self._rows(CLAIM, list(slots), list(slots.values()), worker, now_ms, now_ms + lease_ms)
        rows = sorted(rows, key=lambda row: (row["place"], row["low_priority"], row["n"]))
        self._note([row["id"] for row in rows])
        return [job_of(row, input=row["input"], passed=row["passed"]) for row in rows]

    async def extend(self, held: Mapping[str, int], now_ms: int, lease_ms: int) -> Sequence[str]:
        rows = await self._rows(EXTEND, list(held), list(held.values()), now_ms, now_ms + lease_ms)
        kept = {row["id"] for row in rows}
        return [id for id in held if id not in kept]

    async def release(self, held: Mapping[str, int], now_ms: int) -> None:
        rows = await self._rows(RELEASE, list(held), list(held.values()), now_ms)
        self._note([key for row in rows for key in (row["id"], work(row["endpoint"]))])

    async def lose(self, held: Mapping[str, int], error: str, now_ms: int) -> Sequence[Job]:
        async with self._transaction() as db:
            found = [row["id"] for row in await db.fetch(FIND_HELD, list(held), list(held.values()), now_ms)]
            changed = await _lose(db, found, _plain(error), now_ms)
            rows = await db.fetch(f"SELECT {JOB} FROM jobs WHERE id = ANY($1)", found)
        self._note(changed)
        jobs = {row["id"]: job_of(row) for row in rows}
        return [jobs[id] for id in held if id in jobs]

    async def append(self, id: str, attempt: int, values: Sequence[bytes]) -> bool:
        row = await self._row(APPEND, id, attempt, list(values))
        return self._noted(id, bool(row and row[0]))

    async def progress(self, id: str, attempt: int, value: bytes) -> bool:
        return self._noted(id, await self._row(PROGRESS, id, attempt, value) is not None)

    async def finish(
        self, id: str, attempt: int, state: State, now_ms: int, output: bytes | None = None, error: str | None = None
    ) -> bool:
        assert state.is_final
        error = None if error is None else _plain(error)
        return self._noted(id, await self._row(FINISH, now_ms, id, attempt, CODES[state], output, error) is not None)

    async def cancel(self, id: str, endpoint: str, now_ms: int) -> Job | None:
        row = await self._row(CANCEL, now_ms, id, endpoint)
        if self._noted(id, row is not None) and row:
            return job_of(row)
        return await self.get(id, endpoint, now_ms)

    async def retry(self, id: str, endpoint: str, now_ms: int) -> Job | None:
        if row := await self._row(RETRY, now_ms, id, endpoint):
            job = job_of(row)
            self._note((id, work(job.request.endpoint)))
            return job
        known = await self.get(id, endpoint, now_ms)
        if known is None:
            return None
        raise not_failed(id, known.state)

    async def get(self, id: str, endpoint: str, now_ms: int, whole: bool = False) -> Job | None:
        row = await self._row(GET_WHOLE if whole else GET, now_ms, id, endpoint)
        return row and job_of(row, input=row["input"] if whole else b"")

    async def keep(self, id: str, until_ms: int) -> None:
        await self._row(KEEP, id, until_ms)

    async def chunks(self, id: str, start: int) -> Chunks | None:
        row = await self._row(CHUNKS, id, start)
        return row and Chunks(STATES[row[0]], start, tuple(row[3]))

    async def drain(self, id: str) -> Chunks | None:
        row = await self._row(CHUNKS, id, 0x7FFFFFFF)
        if row is None or row["drained"] == row["yielded"]:
            return row and Chunks(STATES[row["state"]], row["drained"], ())
        async with self._transaction() as db:
            # The chunks are read after the lock is held: what was yielded while it was waited for is among them.
            locked = await db.fetchrow("SELECT drained FROM jobs WHERE id = $1 FOR UPDATE", id)
            row = locked and await db.fetchrow(CHUNKS, id, locked["drained"])
            if row is None:
                return None
            await db.execute("UPDATE jobs SET drained = yielded WHERE id = $1", id)
        return Chunks(STATES[row["state"]], row["drained"], tuple(row[3]))

    async def list(self, endpoint: str, state: State | None, offset: int, limit: int, batch: str = "") -> Page:
        code = None if state is None else CODES[state]
        narrowed = ("" if code is None else f"AND state = {code} ") + (
            "AND batch <> '' AND batch = $4" if batch else ""
        )
        of_batch = (batch,) if batch else ()
        async with self._transaction("repeatable_read") as db:
            total = await db.fetchval(TOTAL_OF_BATCH if batch else TOTAL, endpoint, code, *of_batch)
            rows = await db.fetch(LIST.format(narrowed), endpoint, offset, limit, *of_batch) if limit else ()
        return Page([job_of(row) for row in rows], total)

    async def purge(self, endpoint: str, now_ms: int) -> Sequence[str]:
        purged = [row["id"] for row in await self._rows(PURGE, now_ms, endpoint)]
        self._note(purged)
        return purged

    async def counts(self, endpoint: str) -> Counts:
        return counts_of(await self._rows("SELECT state, here, ever FROM numbers WHERE endpoint = $1", endpoint))

    async def totals(self) -> Mapping[str, Counts]:
        rows = await self._rows("SELECT endpoint, state, here, ever FROM numbers ORDER BY endpoint")
        return {endpoint: counts_of(row[1:] for row in of) for endpoint, of in groupby(rows, itemgetter(0))}

    async def due_webhooks(self, now_ms: int, limit: int, lease_ms: int) -> Sequence[Delivery]:
        rows = await self._rows(DUE, now_ms, limit, now_ms + lease_ms)
        return [Delivery(job_of(row, input=row["input"]), row["failed"] + 1) for row in rows]

    async def webhook_sent(self, id: str, attempt: int, delivered: bool, now_ms: int, note: str = "") -> None:
        async with self._transaction() as db:
            row = await db.fetchrow(SENT, id, attempt - 1)
            if row is None:
                return
            if not delivered:
                await db.execute("UPDATE jobs SET webhook_note = $2 WHERE id = $1", id, _plain(note))
            if not delivered and attempt < WEBHOOK_ATTEMPTS:
                again = "UPDATE outbox SET failed = $2, taken = false, due_ms = $3 WHERE id = $1"
                await db.execute(again, id, attempt, now_ms + WEBHOOK_INTERVAL_MS)
            else:
                await db.execute(f"DELETE FROM {'jobs' if row['wake_ms'] is None else 'outbox'} WHERE id = $1", id)

    async def sweep(self, now_ms: int) -> Sweep:
        changed: list[str] = []
        stop: list[str] = []
        more = True
        while more:
            async with self._transaction() as db:
                rows = await db.fetch(SWEEP, now_ms, SWEPT_AT_ONCE)
                over = [row["id"] for row in rows if row["expires_ms"] <= now_ms]
                late = [row["id"] for row in rows if row["expires_ms"] <= now_ms and row["state"] < 2]
                lapsed = [row["id"] for row in rows if row["expires_ms"] > now_ms]
                keys = [*late, *(await _lose(db, lapsed, WORKER_LOST, now_ms) if lapsed else ())]
                if late:
                    await db.execute(EXPIRE, now_ms, late)
                if over:
                    await db.execute(FORGET, over)
                    await db.execute("UPDATE jobs SET wake_ms = NULL WHERE id = ANY($1)", over)
            self._note(keys)
            changed += late + lapsed
            stop += [row["id"] for row in rows if row["expires_ms"] <= now_ms and row["state"] == 1]
            more = len(rows) == SWEPT_AT_ONCE
        return Sweep(changed, stop)

    async def recover(self, now_ms: int) -> Sweep:
        lost: list[str] = []
        listener = self._listener
        async with self._reached():
            if listener and await listener.fetchval(f"SELECT pg_try_advisory_lock({LOCK})"):
                try:
                    async with self._transaction() as db:
                        await db.execute(UNTAKE, now_ms)
                        lost = [row["id"] for row in await db.fetch(RUNNING, now_ms)]
                        changed = await _lose(db, lost, WORKER_LOST, now_ms)
                finally:
                    await listener.execute(f"SELECT pg_advisory_unlock({LOCK})")
                self._note(changed)
        swept = await self.sweep(now_ms)
        return Sweep([*lost, *swept.changed], swept.stop)

    async def next_ms(self) -> int | None:
        wake_ms, due_ms, deltas = await self._row(NEXT, FOLD_AT)
        if deltas == FOLD_AT:
            await self._row(FOLD)
        return min((ms for ms in (wake_ms, due_ms) if ms is not None), default=None)

    @property
    def tick(self) -> int:
        return self._changes.tick

    async def watch(self, ids: Sequence[str], timeout_s: float, since: int) -> None:
        await self._changes.wait(ids, timeout_s, since)

    async def wait_work(self, endpoints: Sequence[str], timeout_s: float, since: int) -> None:
        await self._changes.wait([work(endpoint) for endpoint in endpoints], timeout_s, since)

    async def close(self) -> None:
        if self._closed:
            return
        while self._telling:
            await asyncio.wait([self._telling])
        self._closed = True
        if self._listening:
            self._listening.cancel()
            await asyncio.wait([self._listening])
        if self._pool:
            await self._pool.close()

    def _note(self, keys: Collection[str]) -> None:
        """These have changed: here, and for the others. What changes while they are being told goes with the next."""
        self._changes.note(keys)
        self._untold.update(keys)
        if self._untold and self._telling is None and not self._closed:
            self._telling = asyncio.create_task(self._tell())

    def _noted(self, id: str, done: bool) -> bool:
        if done:
            self._note((id,))
        return done

    async def _tell(self) -> None:
        try:
            while self._untold:
                told = "\n".join(self._untold)
                self._untold.clear()
                assert self._pool is not None
                assert self._listener is not None
                mine = self._listener.get_server_pid()
                payload = f"{mine}\n{told if len(told.encode()) < PAYLOAD_BYTES else '*'}"
                async with self._reached():
                    await self._pool.execute("SELECT pg_notify($1, $2)", self._schema, payload)
        except ServingError as error:
            logger.warning("%s: other servers will find late what has changed here", error)
        finally:
            self._telling = None

    @asynccontextmanager
    async def _reached(self) -> AsyncIterator[None]:
        """What the driver raises becomes ServingError(UNAVAILABLE)."""
        if self._closed:
            raise ServingError(Kind.UNAVAILABLE, f"job store {self._name} is closed")
        try:
            yield
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError) as error:
            what = str(error) or type(error).__name__
            raise ServingError(Kind.UNAVAILABLE, f"job store {self._name}: {what}") from error

    @asynccontextmanager
    async def _transaction(self, isolation: Any = None) -> AsyncIterator[Any]:
        async with self._reached():
            assert self._pool is not None
            async with self._pool.acquire() as db, db.transaction(isolation=isolation):
                yield db

    async def _rows(self, statement: str, *details: object) -> Sequence[Any]:
        async with self._reached():
            assert self._pool is not None
            rows: Sequence[Any] = await self._pool.fetch(statement, *details)
            return rows

    async def _row(self, statement: str, *details: object) -> Any:
        async with self._reached():
            assert self._pool is not None
            return await self._pool.fetchrow(statement, *details)

    async def _prepare(self) -> None:
        settings = {"search_path": self._schema, "application_name": "penstock", "synchronous_commit": "on"}
        self._pool = await asyncpg.create_pool(
            self._address,
            min_size=1,
            max_size=CONNECTIONS,
            timeout=TIMEOUT_S,
            command_timeout=TIMEOUT_S,
            server_settings=settings,
        )
        async with self._pool.acquire() as db, db.transaction():
            await db.execute("SELECT pg_advisory_xact_lock(hashtextextended($1, 1))", self._schema)
            quoted = self._schema.replace('"', '""')
            if not await db.fetchval("SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = $1)", self._schema):
                await db.execute(f'CREATE SCHEMA "{quoted}"')
            if not await db.fetchval("SELECT to_regclass('version') IS NOT NULL"):
                await db.execute(SCHEMA)
            version = await db.fetchval("SELECT version FROM version")
            if version < VERSION:
                await db.execute(UPDATE)
            lax = [name for name in ("fsync", "full_page_writes") if await db.fetchval(f"SHOW {name}") != "on"]
        if version > VERSION:
            text = f"written by a newer Penstock, as version {version}; this one knows version {VERSION}"
            raise ServingError(Kind.UNAVAILABLE, f"job store {self._name}: {text}")
        for name in lax:
            logger.warning("job store %s: %s is off: jobs may be lost after they were accepted", self._name, name)
        await self._listen(settings)

    async def _listen(self, settings: Mapping[str, str]) -> None:
        """One connection that hears what the others change, and whose lock says that this process is there."""
        ended = asyncio.Event()
        listener = await asyncpg.connect(
            self._address, timeout=TIMEOUT_S, command_timeout=TIMEOUT_S, server_settings=dict(settings)
        )
        listener.add_termination_listener(lambda _: ended.set())
        await listener.execute(f"SELECT pg_advisory_lock_shared({LOCK})")
        await listener.add_listener(self._schema, self._hear)
        self._listener = listener
        self._changes.note_all()  # whatever was said before this may concern anyone
        self._listening = asyncio.create_task(self._stay(listener, ended, settings))

    async def _stay(self, listener: Any, ended: asyncio.Event, settings: Mapping[str, str]) -> None:
        """Listen until the connection ends, then anew."""
        try:
            await ended.wait()
        finally:
            if not ended.is_set():
                await listener.close()
        logger.warning("job store %s: lost the connection that listens, trying again", self._name)
        while True:
            await asyncio.sleep(RECONNECT_S)
            try:
                async with self._reached():
                    await self._listen(settings)
                return
            except ServingError as error:
                logger.warning("%s", error)

    def _hear(self, _connection: object, _pid: int, _channel: str, payload: object) -> None:
        sender, *keys = str(payload).split("\n")
        if self._listener and sender == str(self._listener.get_server_pid()):
            return
        if keys == ["*"]:
            self._changes.note_all()
        else:
            self._changes.note(keys)


async def _lose(db: Any, ids: Sequence[str], error: str, now_ms: int) -> Sequence[str]:
    """The workers of these running jobs, whose rows are locked, are gone. Returns the keys that change."""
    again = await db.fetch(RETRY_LOST, ids)
    spent = set(ids) - {row["id"] for row in again}
    if spent:
        await db.execute(FAIL_LOST, now_ms, list(spent), error)
    return [*ids, *(work(row["endpoint"]) for row in again)]


def _plain(text: str) -> str:
    """The server's text has no NUL."""
    return text.replace("\0", "\ufffd")
