"""Jobs in Redis or Valkey, for several servers. Every call is one script, which the server runs as one step.

Durable as far as the server is told to be: with `appendonly yes` and `appendfsync always` an answer waits for its disk;
anything less is warned about when the store is opened. All keys begin with the prefix (`?prefix=`, "penstock" if none):

    P:job:ID            hash: the job, its input and its newest value
    P:chunks:ID         list: what it has yielded
    P:waiting:ENDPOINT  sorted set: ids in the order of claims
    P:in:STATE:ENDPOINT sorted set: ids by submission
    P:batch:BATCH       sorted set: ids by submission
    P:wake              sorted set: ids by when a sweep must look; without those that are kept for their webhook alone
    P:due               sorted set: webhooks by when they are due
    P:ever:ENDPOINT     hash: how many jobs were accepted, and ended in which way
    P:endpoints         set: of every endpoint that had a job
    P:n, P:version      the last submission's number; the version of all this
    P:changes           channel: what changed, line by line, or * for anything
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from penstock.errors import Kind, ServingError
from penstock.job_api.changes import Changes, work
from penstock.job_api.store import (
    CODES,
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
    full,
    job_of,
    not_failed,
)

try:
    from redis.asyncio import BlockingConnectionPool, Redis
    from redis.asyncio.client import PubSub
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff
    from redis.exceptions import RedisError
except ModuleNotFoundError as missing:
    text = "a job store in Redis needs the package redis: pip install 'penstock[redis]'"
    raise ServingError(Kind.UNSUPPORTED, text) from missing

logger = logging.getLogger(__name__)

Row: TypeAlias = Sequence[Any]

VERSION = 1
CONNECTIONS = 16
TIMEOUT_S = 10.0
RECONNECT_S = 0.5
SWEPT_AT_ONCE = 500  # jobs in one script, for the server does nothing else meanwhile

FIELDS = """id endpoint created ttl execution retention low webhook form tags batch
    state attempt retries worker started finished queued lease expires error note request value"""

SCRIPT = f"""
local P, op = KEYS[1], ARGV[1]
local FIELDS = {{{", ".join(f"'{name}'" for name in FIELDS.split())}}}
local LOW = 2 ^ 51  -- of a place in the queue: low priority comes after any number of submissions
local FINAL = {{COMPLETED = 1, FAILED = 1, CANCELLED = 1, TIMED_OUT = 1}}
local changed = {{}}

local function int(x) return string.format('%.0f', x) end
local function key(id) return P .. ':job:' .. id end
local function chunks(id) return P .. ':chunks:' .. id end
local function waiting(endpoint) return P .. ':waiting:' .. endpoint end
local function within(state, endpoint) return P .. ':in:' .. state .. ':' .. endpoint end
local function ever(endpoint) return P .. ':ever:' .. endpoint end
local function due(n, id) return string.format('%016.0f:%s', n, id) end
local WAKE, DUE = P .. ':wake', P .. ':due'

local function note(k) changed[#changed + 1] = k end

local function look(id)  -- a job's fields that decide what may happen to it; nil for an unknown one
    local f = redis.call('HMGET', key(id), 'endpoint', 'state', 'attempt', 'expires', 'retries', 'n', 'low', 'webhook',
        'retention', 'ttl', 'lease')
    if not f[1] then return nil end
    return {{id = id, endpoint = f[1], state = f[2], attempt = tonumber(f[3]), expires = tonumber(f[4]),
        retries = tonumber(f[5]), n = tonumber(f[6]), low = f[7] == '1', webhook = f[8], retention = tonumber(f[9]),
        ttl = tonumber(f[10]), lease = tonumber(f[11])}}
end

local function known(id, endpoint, now)
    local job = look(id)
    if job and job.expires > now and (endpoint == '' or endpoint == job.endpoint) then return job end
end

local function running(id, attempt, now)  -- as this attempt, or as any if that is nil
    local job = known(id, '', now)
    if job and job.state == 'IN_PROGRESS' and job.attempt == (attempt or job.attempt) then return job end
end

local function whole(id, ...)
    local wanted = {{unpack(FIELDS)}}
    for _, name in ipairs({{...}}) do wanted[#wanted + 1] = name end
    return redis.call('HMGET', key(id), unpack(wanted))
end

local function place(job)  -- into the sets of its state
    redis.call('ZADD', within(job.state, job.endpoint), int(job.n), job.id)
    if job.state == 'IN_QUEUE' then
        redis.call('ZADD', waiting(job.endpoint), int(job.n + (job.low and LOW or 0)), job.id)
        note('/' .. job.endpoint)
    end
end

local function displace(job)
    redis.call('ZREM', within(job.state, job.endpoint), job.id)
    if job.state == 'IN_QUEUE' then redis.call('ZREM', waiting(job.endpoint), job.id) end
end

local function move(job, state, ...)  -- with the fields that change
    displace(job)
    job.state = state
    redis.call('HDEL', key(job.id), 'value')
    redis.call('HSET', key(job.id), 'state', state, ...)
    place(job)
    note(job.id)
end

local function wake(job, at) redis.call('ZADD', WAKE, int(at), job.id) end

local function take(job, worker, now, lease)
    move(job, 'IN_PROGRESS', 'attempt', int(job.attempt + 1), 'worker', worker, 'started', int(now),
        'lease', int(now + lease))
    wake(job, math.min(job.expires, now + lease))
end

local function requeue(job, ...)
    redis.call('DEL', chunks(job.id))
    move(job, 'IN_QUEUE', 'lease', '0', 'drained', '0', ...)
    wake(job, job.expires)
end

local function finish(job, state, now, expires)
    move(job, state, 'lease', '0', 'finished', int(now), 'expires', int(expires))
    wake(job, expires)
    redis.call('HINCRBY', ever(job.endpoint), state, 1)
    if job.webhook ~= '' then
        redis.call('ZADD', DUE, int(now), due(job.n, job.id))
        redis.call('HSET', key(job.id), 'failed', '0', 'taken', '0')
    end
end

local function lose(job, error, now)
    if job.retries < {MAX_RETRIES} then
        redis.call('HINCRBY', ever(job.endpoint), 'RETRIED', 1)
        requeue(job, 'retries', int(job.retries + 1))
    else
        finish(job, 'FAILED', now, now + job.retention)
        redis.call('HSET', key(job.id), 'error', error)
    end
end

local function forget(job)
    displace(job)
    local batch = redis.call('HGET', key(job.id), 'batch')
    if batch ~= '' then redis.call('ZREM', P .. ':batch:' .. batch, job.id) end
    redis.call('ZREM', WAKE, job.id)
    redis.call('DEL', key(job.id), chunks(job.id))
end

local function ahead(endpoint, low, now)  -- whether a job waits that would be taken before a new one
    local start = 0
    while true do
        local ids = redis.call('ZRANGEBYSCORE', waiting(endpoint), '-inf', low and '+inf' or '(' .. int(LOW),
            'LIMIT', start, 100)
        for _, id in ipairs(ids) do
            if tonumber(redis.call('HGET', key(id), 'expires')) > now then return true end
        end
        if #ids < 100 then return false end
        start = start + 100
    end
end

local function held(from)  -- pairs of id and attempt among the arguments
    local i = from - 2
    return function()
        i = i + 2
        if ARGV[i] then return ARGV[i], tonumber(ARGV[i + 1]) end
    end
end

local ops = {{}}

function ops.add(id, endpoint, created, ttl, execution, retention, low, webhook, form, tags, batch, request, input,
        passed, limit, worker, lease)
    local now, limit, lease = tonumber(created), tonumber(limit), tonumber(lease)
    local count = redis.call('ZCARD', waiting(endpoint))
    if limit > 0 and count >= limit then return {{'full', count}} end
    if redis.call('EXISTS', key(id)) == 1 then return {{'exists', 0}} end
    local job = {{id = id, endpoint = endpoint, state = 'IN_QUEUE', attempt = 0, low = low == '1',
        n = redis.call('INCR', P .. ':n'), expires = now + tonumber(ttl)}}
    local first = lease >= 0 and not ahead(endpoint, job.low, now)
    redis.call('HSET', key(id), 'id', id, 'endpoint', endpoint, 'created', created, 'ttl', ttl, 'execution', execution,
        'retention', retention, 'low', low, 'webhook', webhook, 'form', form, 'tags', tags, 'batch', batch,
        'request', request, 'input', input, 'passed', passed, 'n', int(job.n), 'state', job.state, 'attempt', '0',
        'retries', '0', 'worker', '', 'started', '0', 'finished', '0', 'queued', created, 'lease', '0',
        'expires', int(job.expires), 'note', '', 'drained', '0')
    if batch ~= '' then redis.call('ZADD', P .. ':batch:' .. batch, int(job.n), id) end
    redis.call('SADD', P .. ':endpoints', endpoint)
    redis.call('HINCRBY', ever(endpoint), 'ACCEPTED', 1)
    place(job)
    wake(job, job.expires)
    note(id)
    if first then take(job, worker, now, lease) end
    return {{first and 'taken' or 'queued', 0}}
end

function ops.claim(worker, now, lease)
    local rows, now, lease = {{}}, tonumber(now), tonumber(lease)
    for endpoint, free in held(5) do
        local start, taken = 0, {{}}
        while #taken < free do
            local ids = redis.call('ZRANGE', waiting(endpoint), start, start + free - 1)
            for _, id in ipairs(ids) do
                local job = look(id)
                if job.expires > now and #taken < free then taken[#taken + 1] = job end
            end
            if #ids < free then break end
            start = start + free
        end
        for _, job in ipairs(taken) do
            take(job, worker, now, lease)
            rows[#rows + 1] = whole(job.id, 'input', 'passed')
        end
    end
    return rows
end

function ops.extend(now, lease)
    local lost, now, lapses = {{}}, tonumber(now), tonumber(now) + tonumber(lease)
    for id, attempt in held(4) do
        local job = running(id, attempt, now)
        if job then
            redis.call('HSET', key(id), 'lease', int(lapses))
            wake(job, math.min(job.expires, lapses))
        else
            lost[#lost + 1] = id
        end
    end
    return lost
end

function ops.release(now)
    for id, attempt in held(3) do
        local job = running(id, attempt, tonumber(now))
        if job then requeue(job) end
    end
end

function ops.lose(error, now)
    local rows = {{}}
    for id, attempt in held(4) do
        local job = running(id, attempt, tonumber(now))
        if job then
            lose(job, error, tonumber(now))
            rows[#rows + 1] = whole(id)
        end
    end
    return rows
end

function ops.append(id, attempt)
    if not running(id, tonumber(attempt), 0) then return 0 end
    for i = 4, #ARGV do redis.call('RPUSH', chunks(id), ARGV[i]) end
    note(id)
    return 1
end

function ops.progress(id, attempt, value)
    if not running(id, tonumber(attempt), 0) then return 0 end
    redis.call('HSET', key(id), 'value', value)
    note(id)
    return 1
end

function ops.finish(id, attempt, state, now, ...)
    local job = running(id, tonumber(attempt), tonumber(now))
    if not job then return 0 end
    finish(job, state, tonumber(now), tonumber(now) + job.retention)
    if ... then redis.call('HSET', key(id), ...) end
    return 1
end

function ops.cancel(id, endpoint, now)
    local job = known(id, endpoint, tonumber(now))
    if not job then return nil end
    if not FINAL[job.state] then finish(job, 'CANCELLED', tonumber(now), tonumber(now) + job.retention) end
    return whole(id)
end

function ops.retry(id, endpoint, now)
    local job = known(id, endpoint, tonumber(now))
    if not job then return nil end
    if job.state ~= 'FAILED' and job.state ~= 'TIMED_OUT' then return job.state end
    redis.call('ZREM', DUE, due(job.n, id))
    redis.call('HDEL', key(id), 'error')
    redis.call('HINCRBY', ever(job.endpoint), 'RETRIED', 1)
    displace(job)
    job.n, job.expires = redis.call('INCR', P .. ':n'), tonumber(now) + job.ttl
    local batch = redis.call('HGET', key(id), 'batch')
    if batch ~= '' then redis.call('ZADD', P .. ':batch:' .. batch, int(job.n), id) end
    requeue(job, 'n', int(job.n), 'finished', '0', 'queued', now, 'retries', '0', 'expires', int(job.expires),
        'note', '')
    return whole(id)
end

function ops.get(id, endpoint, now, input)
    if not known(id, endpoint, tonumber(now)) then return nil end
    if input == '1' then return whole(id, 'input') end
    return whole(id)
end

function ops.keep(id, till)
    local job = look(id)
    if job and FINAL[job.state] and redis.call('ZSCORE', WAKE, id) then
        redis.call('HSET', key(id), 'expires', till)
        wake(job, tonumber(till))
    end
end

function ops.chunks(id, start)
    local state = redis.call('HGET', key(id), 'state')
    if not state then return nil end
    return {{state, start, redis.call('LRANGE', chunks(id), start, -1)}}
end

function ops.drain(id)
    local job = redis.call('HMGET', key(id), 'state', 'drained')
    if not job[1] then return nil end
    local values = redis.call('LRANGE', chunks(id), job[2], -1)
    if #values > 0 then redis.call('HINCRBY', key(id), 'drained', #values) end
    return {{job[1], job[2], values}}
end

function ops.list(endpoint, state, offset, limit, batch)
    local found, offset, limit = {{}}, tonumber(offset), tonumber(limit)
    local total = 0
    if batch ~= '' then
        for _, id in ipairs(redis.call('ZRANGE', P .. ':batch:' .. batch, 0, -1, 'REV')) do
            local job = look(id)
            if job.endpoint == endpoint and (state == '' or state == job.state) then
                total = total + 1
                found[total] = {{id, job.n}}
            end
        end
    else
        for _, one in ipairs({{{", ".join(f"'{state.value}'" for state in State)}}}) do
            if state == '' or state == one then
                total = total + redis.call('ZCARD', within(one, endpoint))
                local top = limit > 0
                    and redis.call('ZRANGE', within(one, endpoint), 0, offset + limit - 1, 'REV', 'WITHSCORES') or {{}}
                for i = 1, #top, 2 do found[#found + 1] = {{top[i], tonumber(top[i + 1])}} end
            end
        end
        table.sort(found, function(a, b) return a[2] > b[2] end)
    end
    local rows = {{total}}
    for i = offset + 1, math.min(offset + limit, #found) do rows[#rows + 1] = whole(found[i][1]) end
    return rows
end

function ops.purge(endpoint, now)
    local purged = {{}}
    for _, id in ipairs(redis.call('ZRANGE', waiting(endpoint), 0, -1)) do
        local job = look(id)
        if job.expires > tonumber(now) then
            finish(job, 'CANCELLED', tonumber(now), tonumber(now) + job.retention)
            purged[#purged + 1] = id
        end
    end
    return purged
end

function ops.counts(endpoint)
    return {{redis.call('ZCARD', within('IN_QUEUE', endpoint)), redis.call('ZCARD', within('IN_PROGRESS', endpoint)),
        unpack(redis.call('HMGET', ever(endpoint), 'COMPLETED', 'FAILED', 'CANCELLED', 'TIMED_OUT', 'RETRIED',
            'ACCEPTED'))}}
end

function ops.totals()
    local rows = {{}}
    for _, endpoint in ipairs(redis.call('SMEMBERS', P .. ':endpoints')) do
        rows[#rows + 1] = {{endpoint, ops.counts(endpoint)}}
    end
    return rows
end

function ops.due(now, limit, lease)
    local rows = {{}}
    for _, member in ipairs(redis.call('ZRANGEBYSCORE', DUE, '-inf', now, 'LIMIT', 0, limit)) do
        local id = string.sub(member, string.find(member, ':') + 1)
        redis.call('ZADD', DUE, int(tonumber(now) + tonumber(lease)), member)
        redis.call('HSET', key(id), 'taken', '1')
        rows[#rows + 1] = whole(id, 'input', 'failed')
    end
    return rows
end

function ops.sent(id, attempt, delivered, now, text)
    local job = look(id)
    if not job or not redis.call('ZSCORE', DUE, due(job.n, id)) then return end
    local out = redis.call('HMGET', key(id), 'failed', 'taken')
    if out[2] ~= '1' or tonumber(out[1]) + 1 ~= tonumber(attempt) then return end
    if delivered == '0' then redis.call('HSET', key(id), 'note', text, 'failed', attempt, 'taken', '0') end
    if delivered == '0' and tonumber(attempt) < {WEBHOOK_ATTEMPTS} then
        redis.call('ZADD', DUE, int(tonumber(now) + {WEBHOOK_INTERVAL_MS}), due(job.n, id))
    else
        redis.call('ZREM', DUE, due(job.n, id))
        if not redis.call('ZSCORE', WAKE, id) then forget(job) end
    end
end

function ops.sweep(now_)
    local ended, stop, now = {{}}, {{}}, tonumber(now_)
    local ids = redis.call('ZRANGEBYSCORE', WAKE, '-inf', now_, 'LIMIT', 0, {SWEPT_AT_ONCE})
    for _, id in ipairs(ids) do
        local job = look(id)
        if job.expires > now then
            lose(job, '{WORKER_LOST}', now)
            ended[#ended + 1] = id
        else
            if not FINAL[job.state] then
                if job.state == 'IN_PROGRESS' then stop[#stop + 1] = id end
                ended[#ended + 1] = id
                finish(job, 'TIMED_OUT', now, job.expires)
                redis.call('HSET', key(id), 'error', 'ttl of ' .. int(job.ttl) .. ' ms expired')
            end
            if redis.call('ZSCORE', DUE, due(job.n, id)) then redis.call('ZREM', WAKE, id) else forget(job) end
        end
    end
    return {{ended, stop, #ids == {SWEPT_AT_ONCE} and 1 or 0}}
end

function ops.recover(now_)
    local lost, now = {{}}, tonumber(now_)
    -- Each process that has the store open listens, on one connection.
    if redis.call('PUBSUB', 'NUMSUB', P .. ':changes')[2] > 1 then return lost end
    for _, member in ipairs(redis.call('ZRANGE', DUE, 0, -1)) do
        local post = key(string.sub(member, string.find(member, ':') + 1))
        if redis.call('HGET', post, 'taken') == '1' then
            redis.call('HSET', post, 'taken', '0')
            redis.call('ZADD', DUE, now_, member)
        end
    end
    for _, endpoint in ipairs(redis.call('SMEMBERS', P .. ':endpoints')) do
        for _, id in ipairs(redis.call('ZRANGE', within('IN_PROGRESS', endpoint), 0, -1)) do
            local job = running(id, nil, now)
            if job then
                lose(job, '{WORKER_LOST}', now)
                lost[#lost + 1] = id
            end
        end
    end
    return lost
end

function ops.next()
    local times = redis.call('ZRANGE', WAKE, 0, 0, 'WITHSCORES')
    local outgoing = redis.call('ZRANGE', DUE, 0, 0, 'WITHSCORES')
    return {{times[2] or false, outgoing[2] or false}}  -- a nil would end the list
end

local answer = ops[op](unpack(ARGV, 2, math.min(#ARGV, 40)))
if #changed > 0 then
    redis.call('PUBLISH', P .. ':changes', #changed > 1000 and '*' or table.concat(changed, '\\n'))
end
return answer
"""


class RedisJobStore:
    """Shared by any number of processes: one script decides each claim, and a channel carries what changed."""

    def __init__(self, name: str, prefix: str, pool: BlockingConnectionPool) -> None:
        self._name = name  # without its password
        self._prefix = prefix
        self._redis = Redis(connection_pool=pool)
        self._script = self._redis.register_script(SCRIPT)
        self._changes = Changes()
        self._closed = False
        self._listener: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, url: str) -> "RedisJobStore":
        """Raises ServingError(UNAVAILABLE) if the server does not answer, or a newer Penstock wrote there."""
        parts = urlsplit(url)
        query = dict(parse_qsl(parts.query))
        prefix = query.pop("prefix", "penstock")
        name = f"{parts.scheme}://{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}{parts.path}"
        try:
            pool = BlockingConnectionPool.from_url(
                urlunsplit(parts._replace(query=urlencode(query))),
                max_connections=CONNECTIONS,
                timeout=TIMEOUT_S,
                socket_timeout=TIMEOUT_S,
                socket_connect_timeout=TIMEOUT_S,
                # A call whose answer was lost may have been done: its caller is told, and decides.
                retry=Retry(NoBackoff(), 0),
            )
        except ValueError as error:
            raise ServingError(Kind.INVALID, f"job store {name}: {error}") from error
        store = cls(name, prefix, pool)
        try:
            await store._prepare()
        except BaseException as error:
            await store.close()
            if isinstance(error, RedisError | OSError):
                raise store._told(error) from error
            raise
        return store

    async def add(self, request: Request, limit: int = 0, claim: Claim | None = None) -> Job | None:
        outcome, number = await self._call(
            "add",
            request.id,
            request.endpoint,
            request.created_ms,
            request.ttl_ms,
            request.execution_timeout_ms,
            request.retention_ms,
            int(request.low_priority),
            request.webhook,
            request.webhook_form,
            request.tags,
            request.batch,
            request.request_id,
            request.input,
            request.passed,
            limit,
            claim.worker if claim else "",
            claim.lease_ms if claim else -1,
        )
        match outcome:
            case b"exists":
                raise exists(request.id)
            case b"full":
                raise full(request.endpoint, number, limit)
            case b"taken":
                return added(request, claim)
        return None

    async def claim(self, slots: Mapping[str, int], worker: str, now_ms: int, lease_ms: int) -> Sequence[Job]:
        rows = await self._call("claim", worker, now_ms, lease_ms, *_pairs(slots))
        return [_job(row, input=row[-2], passed=row[-1]) for row in rows]

    async def extend(self, held: Mapping[str, int], now_ms: int, lease_ms: int) -> Sequence[str]:
        return _texts(await self._call("extend", now_ms, lease_ms, *_pairs(held)))

    async def release(self, held: Mapping[str, int], now_ms: int) -> None:
        await self._call("release", now_ms, *_pairs(held))

    async def lose(self, held: Mapping[str, int], error: str, now_ms: int) -> Sequence[Job]:
        return [_job(row) for row in await self._call("lose", error, now_ms, *_pairs(held))]

    async def append(self, id: str, attempt: int, values: Sequence[bytes]) -> bool:
        return bool(await self._call("append", id, attempt, *values))

    async def progress(self, id: str, attempt: int, value: bytes) -> bool:
        return bool(await self._call("progress", id, attempt, value))

    async def finish(
        self, id: str, attempt: int, state: State, now_ms: int, output: bytes | None = None, error: str | None = None
    ) -> bool:
        assert state.is_final
        fields: list[bytes | str] = []
        if output is not None:
            fields += ("value", output)
        if error is not None:
            fields += ("error", error)
        return bool(await self._call("finish", id, attempt, state.value, now_ms, *fields))

    async def cancel(self, id: str, endpoint: str, now_ms: int) -> Job | None:
        row = await self._call("cancel", id, endpoint, now_ms)
        return row and _job(row)

    async def retry(self, id: str, endpoint: str, now_ms: int) -> Job | None:
        row = await self._call("retry", id, endpoint, now_ms)
        if isinstance(row, bytes):
            raise not_failed(id, State(row.decode()))
        return row and _job(row)

    async def get(self, id: str, endpoint: str, now_ms: int, whole: bool = False) -> Job | None:
        row = await self._call("get", id, endpoint, now_ms, int(whole))
        return row and _job(row, input=row[-1] if whole else b"")

    async def keep(self, id: str, until_ms: int) -> None:
        await self._call("keep", id, until_ms)

    async def chunks(self, id: str, start: int) -> Chunks | None:
        return _chunks(await self._call("chunks", id, start))

    async def drain(self, id: str) -> Chunks | None:
        return _chunks(await self._call("drain", id))

    async def list(self, endpoint: str, state: State | None, offset: int, limit: int, batch: str = "") -> Page:
        total, *rows = await self._call("list", endpoint, state.value if state else "", offset, limit, batch)
        return Page([_job(row) for row in rows], total)

    async def purge(self, endpoint: str, now_ms: int) -> Sequence[str]:
        return _texts(await self._call("purge", endpoint, now_ms))

    async def counts(self, endpoint: str) -> Counts:
        return _counts(await self._call("counts", endpoint))

    async def totals(self) -> Mapping[str, Counts]:
        rows = await self._call("totals")
        return {endpoint.decode(): _counts(numbers) for endpoint, numbers in rows}

    async def due_webhooks(self, now_ms: int, limit: int, lease_ms: int) -> Sequence[Delivery]:
        rows = await self._call("due", now_ms, limit, lease_ms)
        return [Delivery(_job(row, input=row[-2]), int(row[-1]) + 1) for row in rows]

    async def webhook_sent(self, id: str, attempt: int, delivered: bool, now_ms: int, note: str = "") -> None:
        await self._call("sent", id, attempt, int(delivered), now_ms, note)

    async def sweep(self, now_ms: int) -> Sweep:
        changed: list[str] = []
        stop: list[str] = []
        more = 1
        while more:
            ended, stopped, more = await self._call("sweep", now_ms)
            changed += _texts(ended)
            stop += _texts(stopped)
        return Sweep(changed, stop)

    async def recover(self, now_ms: int) -> Sweep:
        lost = _texts(await self._call("recover", now_ms))
        swept = await self.sweep(now_ms)
        return Sweep([*lost, *swept.changed], swept.stop)

    async def next_ms(self) -> int | None:
        times = await self._call("next")
        return min((int(float(ms)) for ms in times if ms is not None), default=None)

    @property
    def tick(self) -> int:
        return self._changes.tick

    async def watch(self, ids: Sequence[str], timeout_s: float, since: int) -> None:
        await self._changes.wait(ids, timeout_s, since)

    async def wait_work(self, endpoints: Sequence[str], timeout_s: float, since: int) -> None:
        await self._changes.wait([work(endpoint) for endpoint in endpoints], timeout_s, since)

    async def close(self) -> None:
        self._closed = True
        if self._listener:
            self._listener.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._listener
        await self._redis.aclose()
        await self._redis.connection_pool.disconnect()

    async def _call(self, op: str, *details: bytes | str | int) -> Any:
        """One step on the server; nil comes as None."""
        if self._closed:
            raise ServingError(Kind.UNAVAILABLE, f"job store {self._name} is closed")
        try:
            return await self._script(keys=[self._prefix], args=[op, *details])
        except (RedisError, OSError) as error:
            raise self._told(error) from error

    def _told(self, error: Exception) -> ServingError:
        return ServingError(Kind.UNAVAILABLE, f"job store {self._name}: {error or type(error).__name__}")

    async def _prepare(self) -> None:
        key = f"{self._prefix}:version"
        version = await self._redis.set(key, VERSION, nx=True, get=True)
        if version is not None and int(version) > VERSION:
            text = f"written by a newer Penstock, as version {int(version)}; this one knows version {VERSION}"
            raise ServingError(Kind.UNAVAILABLE, f"job store {self._name}: {text}")
        for setting, value, wanted, why in await self._lacking():
            logger.warning("job store %s: %s is %s, not %s: %s", self._name, setting, value, wanted, why)
        listening = asyncio.get_running_loop().create_future()
        self._listener = asyncio.create_task(self._listen(listening))
        await listening

    async def _lacking(self) -> Sequence[tuple[str, str, str, str]]:
        """Settings of the server that do not keep what was accepted: name, value, what it should be, and why."""
        wanted = (
            ("appendonly", "yes", "jobs may be lost when it restarts"),
            ("appendfsync", "always", "a job may be lost after it was accepted"),
            ("maxmemory-policy", "noeviction", "jobs may be dropped when memory is short"),
        )
        try:
            settings = await self._redis.config_get(*(name for name, _, _ in wanted))
        except RedisError as error:
            return [("its durability", "unknown", "visible", str(error))]
        return [
            (name, settings.get(name) or "unset", value, why)
            for name, value, why in wanted
            if settings.get(name) != value
        ]

    async def _listen(self, listening: "asyncio.Future[None]") -> None:
        """Pass on what the channel says. Whatever was said while it was not heard may concern anyone."""
        while True:
            pubsub = self._redis.pubsub()
            try:
                await pubsub.subscribe(f"{self._prefix}:changes")
                await self._hear(pubsub, listening)
            except (RedisError, OSError) as error:
                if not listening.done():
                    listening.set_exception(error)
                    return
                logger.warning("job store %s: lost its channel, trying again: %s", self._name, error)
            finally:
                await pubsub.aclose()  # type: ignore[no-untyped-call]
            self._changes.note_all()
            await asyncio.sleep(RECONNECT_S)

    async def _hear(self, pubsub: PubSub, listening: "asyncio.Future[None]") -> None:
        while True:
            message = await pubsub.get_message(timeout=None)
            if message is None:
                continue
            if message["type"] == "subscribe":
                if not listening.done():
                    listening.set_result(None)
                self._changes.note_all()
            elif message["data"] == b"*":
                self._changes.note_all()
            else:
                self._changes.note(set(message["data"].decode().split("\n")))


def _counts(numbers: Sequence[Any]) -> Counts:
    return Counts(*(int(number or 0) for number in numbers))


def _pairs(given: Mapping[str, int]) -> Sequence[str | int]:
    return [one for pair in given.items() for one in pair]


def _texts(given: Sequence[bytes]) -> Sequence[str]:
    return [one.decode() for one in given]


def _chunks(given: tuple[bytes, bytes | int, Sequence[bytes]] | None) -> Chunks | None:
    return given and Chunks(State(given[0].decode()), int(given[1]), tuple(given[2]))


def _job(row: Row, input: bytes = b"", passed: bytes = b"") -> Job:
    """A row of FIELDS."""
    return job_of([read(field) for read, field in zip(READ, row, strict=False)], input, passed)


def _text(field: bytes) -> str:
    return field.decode()


def _error(field: bytes | None) -> str | None:
    return None if field is None else field.decode()


def _request(field: bytes | None) -> str:
    return "" if field is None else field.decode()  # of jobs that were accepted before it was kept


def _code(field: bytes) -> int:
    return CODES[State(field.decode())]


def _bytes(field: bytes | None) -> bytes | None:
    return field


# What becomes of each of FIELDS.
READ: tuple[Callable[[Any], Any], ...] = (
    _text, _text, int, int, int, int, int, _text, _text, _bytes, _text,
    _code, int, int, _text, int, int, int, int, int, _error, _text, _request, _bytes,
)  # fmt: skip
