"""What is special to jobs in PostgreSQL: its connections, its counters, and who else is there."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import uuid4

import pytest
from penstock.errors import ServingError
from penstock.job_api.store import Counts, Request, State

asyncpg = pytest.importorskip("asyncpg")

from penstock.job_api.store_postgres import FOLD_AT, VERSION, PostgresJobStore  # noqa: E402 (the package may be missing)

T0 = 1_700_000_000_000
LEASE = 15_000
LIMIT_S = 10


def request(id: str, **fields: Any) -> Request:
    return Request(id, "m", b"{}", T0, 600_000, 300_000, 60_000, **fields)


def run(url: str, scenario: Callable[[PostgresJobStore, PostgresJobStore, Any], Awaitable[None]]) -> None:
    """With a store, opened twice, and a connection of the test's own to its schema."""
    schema = uuid4().hex
    address = f"{url}&prefix={schema}"

    async def main() -> None:
        here, there = await PostgresJobStore.open(address), await PostgresJobStore.open(address)
        own = await asyncpg.connect(url, server_settings={"search_path": schema})
        try:
            await scenario(here, there, own)
        finally:
            await own.close()
            await here.close()
            await there.close()

    asyncio.run(main())


def test_news_are_heard_again_after_the_connection_was_lost(
    postgres_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(here: PostgresJobStore, there: PostgresJobStore, own: Any) -> None:
        tick = there.tick
        ended = await own.fetch(
            "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'"
            " AND objid = (hashtextextended(current_schema(), 0) & x'ffffffff'::bigint)::bigint::oid"
        )
        assert len(ended) == 2
        await asyncio.wait_for(there.wait_work(["m"], 60, tick), LIMIT_S)
        for id in ("b", "c"):
            tick = there.tick
            waiting = asyncio.create_task(there.watch([id], 60, tick))
            await here.add(request(id))
            await asyncio.wait_for(waiting, LIMIT_S)

    with caplog.at_level(logging.WARNING):
        run(postgres_url, scenario)
    assert "lost the connection that listens, trying again" in caplog.text


def test_a_process_hears_no_echo_of_its_own_changes(postgres_url: str) -> None:
    async def scenario(here: PostgresJobStore, there: PostgresJobStore, own: Any) -> None:
        tick = there.tick
        waiting = asyncio.create_task(there.wait_work(["m"], 60, tick))
        await here.add(request("a"))
        own_tick = here.tick
        await asyncio.wait_for(waiting, LIMIT_S)
        assert here.tick == own_tick

    run(postgres_url, scenario)


def test_only_a_process_that_is_alone_recovers_at_once(postgres_url: str) -> None:
    async def scenario(here: PostgresJobStore, there: PostgresJobStore, own: Any) -> None:
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

    run(postgres_url, scenario)


def test_the_counters_are_added_up_now_and_then(postgres_url: str) -> None:
    async def scenario(here: PostgresJobStore, there: PostgresJobStore, own: Any) -> None:
        await asyncio.gather(*(here.add(request(f"j{n}")) for n in range(FOLD_AT)))
        await here.claim({"m": 5}, "w", T0, LEASE)
        before = await here.counts("m")
        assert before == Counts(in_queue=FOLD_AT - 5, in_progress=5, accepted=FOLD_AT)
        assert await own.fetchval("SELECT count(*) FROM deltas") == 2 * FOLD_AT + 10
        await asyncio.gather(here.next_ms(), there.next_ms())
        assert await own.fetchval("SELECT count(*) FROM deltas") == 0
        assert await here.counts("m") == before
        await asyncio.gather(*(here.add(request(f"k{n}")) for n in range(FOLD_AT)))
        await here.next_ms()
        assert await here.counts("m") == Counts(in_queue=2 * FOLD_AT - 5, in_progress=5, accepted=2 * FOLD_AT)

    run(postgres_url, scenario)


def test_an_error_may_hold_what_the_server_cannot(postgres_url: str) -> None:
    async def scenario(here: PostgresJobStore, there: PostgresJobStore, own: Any) -> None:
        await here.add(request("a"))
        await here.claim({"m": 1}, "w", T0, LEASE)
        assert await here.finish("a", 1, State.FAILED, T0, error="one\0two")
        job = await here.get("a", "m", T0)
        assert job is not None
        assert job.error == "one\ufffdtwo"

    run(postgres_url, scenario)


def test_a_newer_store_is_refused(postgres_url: str) -> None:
    async def scenario(here: PostgresJobStore, there: PostgresJobStore, own: Any) -> None:
        await own.execute("UPDATE version SET version = $1", VERSION + 1)
        schema = await own.fetchval("SELECT current_schema()")
        with pytest.raises(ServingError, match="written by a newer Penstock, as version 3; this one knows version 2"):
            await PostgresJobStore.open(f"{postgres_url}&prefix={schema}")

    run(postgres_url, scenario)


def test_a_store_of_version_1_is_brought_up_to_date(postgres_url: str) -> None:
    async def scenario(here: PostgresJobStore, there: PostgresJobStore, own: Any) -> None:
        await here.add(request("a"))
        await own.execute("ALTER TABLE jobs DROP COLUMN request_id; UPDATE version SET version = 1")
        schema = await own.fetchval("SELECT current_schema()")
        newer = await PostgresJobStore.open(f"{postgres_url}&prefix={schema}")
        await newer.add(request("b", request_id="r"))
        claimed = await newer.claim({"m": 9}, "w", T0, LEASE)
        assert [(job.request.id, job.request.request_id) for job in claimed] == [("a", ""), ("b", "r")]
        assert await own.fetchval("SELECT version FROM version") == VERSION
        await newer.close()

    run(postgres_url, scenario)


def test_a_job_leaves_nothing_behind(postgres_url: str) -> None:
    async def scenario(here: PostgresJobStore, there: PostgresJobStore, own: Any) -> None:
        await here.add(request("a", webhook="http://x", batch="b"))
        await here.claim({"m": 1}, "w", T0, LEASE)
        await here.append("a", 1, [b"1"])
        await here.finish("a", 1, State.COMPLETED, T0, b"1")
        await here.due_webhooks(T0, 1, LEASE)
        await here.webhook_sent("a", 1, True, T0)
        await here.sweep(T0 + 60_000)
        for table in ("jobs", "chunks", "outbox"):
            assert await own.fetchval(f"SELECT count(*) FROM {table}") == 0

    run(postgres_url, scenario)
