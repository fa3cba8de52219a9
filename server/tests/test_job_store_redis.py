"""What is special to jobs in Redis: how durable the server is, its channel, and who else is there."""

import asyncio
import logging
import os
import signal
import tempfile
from pathlib import Path
from uuid import uuid4

import pytest
from penstock.errors import Kind, ServingError
from penstock.job_api.store import Counts, Request, State

from .conftest import MEMORY, redis_server

redis = pytest.importorskip("redis")

from penstock.job_api.store_redis import VERSION, RedisJobStore  # noqa: E402 (the package may be missing)

T0 = 1_700_000_000_000
LEASE = 15_000
LIMIT_S = 10


def request(id: str) -> Request:
    return Request(id, "m", b"{}", T0, 600_000, 300_000, 60_000)


def test_a_server_that_may_forget_is_warned_about(redis_url: str, caplog: pytest.LogCaptureFixture) -> None:
    async def open_and_close() -> None:
        await (await RedisJobStore.open(f"{redis_url}?prefix={uuid4().hex}")).close()

    asyncio.run(open_and_close())
    assert caplog.records == []
    with redis.Redis.from_url(redis_url) as server:
        server.config_set("appendfsync", "everysec")
        try:
            with caplog.at_level(logging.WARNING):
                asyncio.run(open_and_close())
        finally:
            server.config_set("appendfsync", "always")
    (warning,) = caplog.records
    assert warning.message == (
        f"job store {redis_url}: appendfsync is everysec, not always: a job may be lost after it was accepted"
    )


def test_what_was_accepted_survives_a_kill_of_the_server() -> None:
    async def submit(url: str) -> None:
        store = await RedisJobStore.open(url)
        try:
            await asyncio.gather(*(store.add(request(f"j{n}")) for n in range(20)))
            assert len(await store.claim({"m": 5}, "w", T0, LEASE)) == 5
        finally:
            os.kill(pid, signal.SIGKILL)
            await store.close()

    async def look(url: str) -> None:
        store = await RedisJobStore.open(url)
        assert await store.counts("m") == Counts(in_queue=15, in_progress=5, accepted=20)
        assert len((await store.recover(T0)).changed) == 5
        claimed = await store.claim({"m": 99}, "w", T0, LEASE)
        assert sorted(job.request.id for job in claimed) == sorted(f"j{n}" for n in range(20))
        await store.close()

    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        with redis_server(folder) as (url, server):
            pid = server.pid
            asyncio.run(submit(url))
            server.wait(LIMIT_S)
        Path(f"{folder}/redis.sock").unlink()
        with redis_server(folder) as (url, _):
            asyncio.run(look(url))


def test_a_server_that_went_away_is_unavailable() -> None:
    async def main() -> None:
        store = await RedisJobStore.open(url)
        server.kill()
        server.wait(LIMIT_S)
        with pytest.raises(ServingError, match=f"job store {url}: ") as refused:
            await store.add(request("a"))
        assert refused.value.kind is Kind.UNAVAILABLE
        await store.close()

    with tempfile.TemporaryDirectory(dir=MEMORY) as folder, redis_server(folder) as (url, server):
        asyncio.run(main())


def test_news_are_heard_again_after_the_channel_was_lost(redis_url: str) -> None:
    url = f"{redis_url}?prefix={uuid4().hex}"

    async def main() -> None:
        here, there = await RedisJobStore.open(url), await RedisJobStore.open(url)
        with redis.Redis.from_url(redis_url) as server:
            assert server.client_kill_filter(_type="pubsub") == 2
        tick = there.tick
        await here.add(request("a"))
        await asyncio.wait_for(there.wait_work(["m"], 60, tick), LIMIT_S)
        # Heard anew, one change at a time: each of these wakes its own waiter.
        for id in ("b", "c"):
            tick = there.tick
            waiting = asyncio.create_task(there.watch([id], 60, tick))
            await here.add(request(id))
            await asyncio.wait_for(waiting, LIMIT_S)
        await here.close()
        await there.close()

    asyncio.run(main())


def test_only_a_process_that_is_alone_recovers_at_once(redis_url: str) -> None:
    url = f"{redis_url}?prefix={uuid4().hex}"

    async def main() -> None:
        here, there = await RedisJobStore.open(url), await RedisJobStore.open(url)
        await here.add(request("a"))
        await here.claim({"m": 1}, "w", T0, LEASE)
        assert list((await there.recover(T0 + 1)).changed) == []
        assert list((await there.recover(T0 + LEASE)).changed) == ["a"], "its lease has lapsed"
        await here.claim({"m": 1}, "w", T0, LEASE)
        await here.close()
        assert list((await there.recover(T0 + 1)).changed) == ["a"]
        job = await there.get("a", "m", T0)
        assert job is not None
        assert job.state is State.FAILED
        await there.close()

    asyncio.run(main())


def test_a_newer_store_is_refused(redis_url: str) -> None:
    prefix = uuid4().hex
    with redis.Redis.from_url(redis_url) as server:
        server.set(f"{prefix}:version", VERSION + 1)
    with pytest.raises(ServingError, match="written by a newer Penstock, as version 2; this one knows version 1"):
        asyncio.run(RedisJobStore.open(f"{redis_url}?prefix={prefix}"))


def test_a_job_that_was_accepted_before_request_ids_were_kept_has_none(redis_url: str) -> None:
    prefix = uuid4().hex

    async def main() -> None:
        store = await RedisJobStore.open(f"{redis_url}?prefix={prefix}")
        await store.add(request("a"))
        with redis.Redis.from_url(redis_url) as server:
            assert server.hdel(f"{prefix}:job:a", "request") == 1
        [job] = await store.claim({"m": 1}, "w", T0, LEASE)
        assert (job.request.id, job.request.request_id) == ("a", "")
        await store.close()

    asyncio.run(main())


def test_a_job_leaves_nothing_behind(redis_url: str) -> None:
    prefix = uuid4().hex

    async def main() -> None:
        store = await RedisJobStore.open(f"{redis_url}?prefix={prefix}")
        await store.add(Request("a", "m", b"{}", T0, 600_000, 300_000, 60_000, webhook="http://x", batch="b"))
        await store.claim({"m": 1}, "w", T0, LEASE)
        await store.append("a", 1, [b"1"])
        await store.finish("a", 1, State.COMPLETED, T0, b"1")
        await store.due_webhooks(T0, 1, LEASE)
        await store.webhook_sent("a", 1, True, T0)
        await store.sweep(T0 + 60_000)
        await store.close()

    asyncio.run(main())
    with redis.Redis.from_url(redis_url) as server:
        left = {key.decode().partition(":")[2] for key in server.keys(f"{prefix}:*")}
    assert left == {"version", "n", "endpoints", "ever:m"}
