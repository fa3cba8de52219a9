"""What every job store answers alike. The facts first, then any sequence of calls against the model."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from penstock.errors import Kind, ServingError
from penstock.job_api.store import (
    WEBHOOK_INTERVAL_MS,
    WORKER_LOST,
    Chunks,
    Claim,
    Counts,
    Job,
    JobStore,
    Request,
    State,
    open_store,
)

from .fakes_jobs import MemoryJobStore

Fresh = Callable[[], str]
Scenario = Callable[[JobStore], Awaitable[None]]

LEASE = 15_000
TTL = 600_000
RETENTION = 60_000
T0 = 1_700_000_000_000  # any moment


def request(id: str, endpoint: str = "m", created_ms: int = T0, **fields: Any) -> Request:
    given = {"ttl_ms": TTL, "execution_timeout_ms": 300_000, "retention_ms": RETENTION, **fields}
    return Request(id, endpoint, b'{"n":1}', created_ms, **given)


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[JobStore]:
    store = MemoryJobStore() if url == "memory" else await open_store(url)
    try:
        yield store
    finally:
        await store.close()


def run(fresh: Fresh, scenario: Scenario) -> None:
    async def main() -> None:
        async with opened(fresh()) as store:
            await scenario(store)

    asyncio.run(main())


async def claim(store: JobStore, free: int = 1, now_ms: int = T0, endpoint: str = "m") -> list[str]:
    return [job.request.id for job in await store.claim({endpoint: free}, "w", now_ms, LEASE)]


async def state(store: JobStore, id: str, now_ms: int = T0) -> State | None:
    job = await store.get(id, "", now_ms)
    return None if job is None else job.state


async def sweep(store: JobStore, now_ms: int) -> tuple[list[str], list[str]]:
    swept = await store.sweep(now_ms)
    return sorted(swept.changed), sorted(swept.stop)


async def deliveries(store: JobStore, now_ms: int, lease_ms: int = LEASE) -> list[tuple[str, State, int]]:
    due = await store.due_webhooks(now_ms, 10, lease_ms)
    return [(one.job.request.id, one.job.state, one.attempt) for one in due]


def test_a_claimed_job_has_all_that_was_submitted_and_a_polled_one_no_input(fresh: Fresh) -> None:
    async def scenario(store: JobStore) -> None:
        submitted = request(
            "a",
            webhook="https://x/y",
            webhook_form="tensorone",
            passed=b'{"s3Config":{}}',
            tags=b'{"k":"v"}',
            batch="b",
            request_id="order-17 \u00e9",
        )
        await store.add(submitted)
        queued = Job(submitted, State.IN_QUEUE, queued_ms=T0, expires_ms=T0 + TTL)
        polled = replace(submitted, input=b"", passed=b"")
        assert await store.get("a", "m", T0) == replace(queued, request=polled)
        assert await store.get("a", "m", T0, whole=True) == replace(queued, request=replace(submitted, passed=b""))
        running = replace(
            queued, state=State.IN_PROGRESS, attempt=1, worker="w", started_ms=T0 + 5, lease_ms=T0 + 5 + LEASE
        )
        assert list(await store.claim({"m": 1}, "w", T0 + 5, LEASE)) == [running]
        assert await store.finish("a", 1, State.COMPLETED, T0 + 9, b"[1]")
        ended = replace(
            running,
            request=polled,
            state=State.COMPLETED,
            lease_ms=0,
            finished_ms=T0 + 9,
            expires_ms=T0 + 9 + RETENTION,
            output=b"[1]",
        )
        assert await store.get("a", "m", T0 + 9) == ended
        (delivery,) = await store.due_webhooks(T0 + 9, 1, LEASE)
        assert delivery.job == replace(ended, request=replace(submitted, passed=b""))

    run(fresh, scenario)


def test_bytes_go_through_untouched(fresh: Fresh) -> None:
    values = (b"\x00\xff", "\u20ac".encode(), b'"' * 300_000)

    async def scenario(store: JobStore) -> None:
        for n, value in enumerate(values):
            await store.add(replace(request(f"j{n}"), input=value, passed=value, tags=value))
            (job,) = await store.claim({"m": 1}, "w", T0, LEASE)
            assert (job.request.input, job.request.passed, job.request.tags) == (value, value, value)
            assert await store.progress(f"j{n}", 1, value)
            polled = await store.get(f"j{n}", "m", T0)
            assert polled is not None
            assert polled.progress == value
            assert await store.append(f"j{n}", 1, [value, b""])
            assert await store.finish(f"j{n}", 1, State.FAILED, T0, value, "caf\u00e9\n")
            polled = await store.get(f"j{n}", "m", T0)
            assert polled is not None
            assert (polled.progress, polled.output, polled.error) == (None, value, "caf\u00e9\n")
            assert await store.drain(f"j{n}") == Chunks(State.FAILED, 0, (value, b""))

    run(fresh, scenario)


def test_first_come_first_served_low_priority_last(fresh: Fresh) -> None:
    async def scenario(store: JobStore) -> None:
        for n in range(6):
            await store.add(request(f"j{n}", low_priority=n in (0, 3)))
        await store.add(request("other", endpoint="n"))
        assert await claim(store, 2) == ["j1", "j2"]
        jobs = await store.claim({"n": 5, "m": 3, "unknown": 1}, "w", T0, LEASE)
        assert [job.request.id for job in jobs] == ["other", "j4", "j5", "j0"]
        assert await claim(store, 0) == []
        assert await claim(store, 9) == ["j3"]

    run(fresh, scenario)


def test_a_full_queue_takes_no_more(fresh: Fresh) -> None:
    async def scenario(store: JobStore) -> None:
        await store.add(request("a"), limit=1)
        with pytest.raises(ServingError, match="1 jobs wait, at most 1 may") as refused:
            await store.add(request("b"), limit=1)
        assert refused.value.kind is Kind.LIMITED
        await store.add(request("c", endpoint="n"), limit=1)
        assert await claim(store) == ["a"]
        await store.add(request("b"), limit=1)
        assert await state(store, "b") is State.IN_QUEUE

    run(fresh, scenario)


def test_an_id_is_taken_once(fresh: Fresh) -> None:
    async def scenario(store: JobStore) -> None:
        outcomes = await asyncio.gather(
            *(store.add(request(id)) for id in ("a", "b", "a", "c")), return_exceptions=True
        )
        failed = [outcome for outcome in outcomes if isinstance(outcome, ServingError)]
        assert [(one.kind, one.message) for one in failed] == [(Kind.EXISTS, "job 'a' exists already")]
        assert await store.counts("m") == Counts(in_queue=3, accepted=3)
        assert sorted(await claim(store, 9)) == ["a", "b", "c"]

    run(fresh, scenario)


def test_a_job_may_be_claimed_as_it_is_added(fresh: Fresh) -> None:
    async def scenario(store: JobStore) -> None:
        job = await store.add(request("a"), claim=Claim("w", LEASE))
        assert job == Job(
            request("a"), State.IN_PROGRESS, 1, 0, "w", T0, 0, queued_ms=T0, lease_ms=T0 + LEASE, expires_ms=T0 + TTL
        )
        assert await store.counts("m") == Counts(in_progress=1, accepted=1)
        await store.add(request("low", low_priority=True))
        assert await store.add(request("b"), claim=Claim("w", LEASE)) is not None
        assert await store.add(request("low2", low_priority=True), claim=Claim("w", LEASE)) is None
        await store.add(request("c"))
        assert await store.add(request("d"), claim=Claim("w", LEASE)) is None
        assert await store.add(request("e", endpoint="n"), claim=Claim("w", LEASE)) is not None
        assert await store.finish("a", 1, State.COMPLETED, T0, b"1")
        assert await claim(store, 9) == ["c", "d", "low", "low2"]

    run(fresh, scenario)


def test_a_stale_attempt_changes_nothing(fresh: Fresh) -> None:
    async def scenario(store: JobStore) -> None:
        await store.add(request("a"))
        assert await claim(store) == ["a"]
        assert [job.retries for job in await store.lose({"a": 1}, "gone", T0)] == [1]
        for attempt in (0, 1, 2):
            assert not await store.finish("a", attempt, State.COMPLETED, T0, b"1")
        assert await claim(store) == ["a"]
        before = await store.get("a", "m", T0)
        assert not await store.append("a", 1, [b"1"])
        assert not await store.progress("a", 1, b"1")
        assert not await store.finish("a", 1, State.COMPLETED, T0, b"1")
        assert list(await store.extend({"a": 1, "b": 1}, T0 + 9, LEASE)) == ["a", "b"]
        assert list(await store.lose({"a": 1}, "gone", T0)) == []
        await store.release({"a": 1}, T0)
        assert await store.get("a", "m", T0) == before
        assert list(await store.extend({"a": 2}, T0 + 9, LEASE)) == []
        assert await store.finish("a", 2, State.COMPLETED, T0 + 9, b"2")
        assert not await store.finish("a", 2, State.FAILED, T0 + 9, error="late")
        assert not await store.append("a", 2, [b"1"])
        assert not await store.progress("a", 2, b"1")
        assert await store.counts("m") == Counts(completed=1, retried=1, accepted=1)

    run(fresh, scenario)


def test_a_lost_worker_costs_one_retry_then_the_job(fresh: Fresh) -> None:
    async def scenario(store: JobStore) -> None:
        for id in ("a", "b"):
            await store.add(request(id))
        assert await claim(store) == ["a"]
        await store.append("a", 1, [b"1"])
        await store.progress("a", 1, b"1")
        (job,) = await store.lose({"a": 1}, "gone", T0)
        assert (job.state, job.retries, job.progress) == (State.IN_QUEUE, 1, None)
        assert await store.chunks("a", 0) == Chunks(State.IN_QUEUE, 0, ())
        assert await claim(store) == ["a"], "it keeps its place"
        (job,) = await store.lose({"a": 2}, "gone", T0 + 7)
        assert (job.state, job.retries, job.error, job.finished_ms) == (State.FAILED, 1, "gone", T0 + 7)

    run(fresh, scenario)


def test_an_orderly_stop_costs_no_retry(fresh: Fresh) -> None:
    async def scenario(store: JobStore) -> None:
        for id in ("a", "b"):
            await store.add(request(id))
        assert await claim(store) == ["a"]
        await store.append("a", 1, [b"1"])
        await store.release({"a": 1}, T0)
        (job,) = await store.claim({"m": 1}, "w", T0, LEASE)
        assert (job.request.id, job.attempt, job.retries) == ("a", 2, 0)
        assert await store.chunks("a", 0) == Chunks(State.IN_PROGRESS, 0, ())

    run(fresh, scenario)


def test_a_lapsed_claim_returns_to_the_queue_once(fresh: Fresh) -> None:
    async def scenario(store: JobStore) -> None:
        await store.add(request("a"))
        await claim(store)
        assert await store.next_ms() == T0 + LEASE
        assert await sweep(store, T0 + LEASE - 1) == ([], [])
        assert list(await store.extend({"a": 1}, T0 + 10_000, LEASE)) == []
        assert await sweep(store, T0 + LEASE) == ([], [])
        assert await sweep(store, T0 + 10_000 + LEASE) == (["a"], [])
        assert await state(store, "a") is State.IN_QUEUE
        assert await claim(store, now_ms=T0 + 30_000) == ["a"]
        assert await sweep(store, T0 + 30_000 + LEASE) == (["a"], [])
        job = await store.get("a", "m", T0 + 30_000 + LEASE)
        assert job is not None
        assert (job.state, job.error) == (State.FAILED, WORKER_LOST)

    run(fresh, scenario)


def test_a_time_to_live_ends_a_job_wherever_it_is(fresh: Fresh) -> None:
    async def scenario(store: JobStore) -> None:
        for id in ("waits", "runs", "told"):
            await store.add(request(id, ttl_ms=10_000, webhook="http://x" if id == "told" else ""))
        assert await claim(store, 1) == ["waits"]
        await store.release({"waits": 1}, T0)
        late = T0 + 10_000
        assert await store.next_ms() == late
        assert await store.get("runs", "m", late - 1) is not None
        assert await store.get("runs", "m", late) is None
        assert await store.claim({"m": 9}, "w", late, LEASE) == []
        claimed = await store.claim({"m": 2}, "w", late - 1, LEASE)
        assert [job.request.id for job in claimed] == ["waits", "runs"]
        await store.release({"waits": 2}, late - 1)
        assert not await store.finish("runs", 1, State.COMPLETED, late, b"1")
        assert list(await store.extend({"runs": 1}, late, LEASE)) == ["runs"]
        assert await sweep(store, late) == (["runs", "told", "waits"], ["runs"])
        assert await store.counts("m") == Counts(timed_out=3, accepted=3)
        assert await store.retry("told", "m", late) is None
        assert await store.cancel("told", "m", late) is None
        (delivery,) = await store.due_webhooks(late, 9, LEASE)
        assert (delivery.job.request.id, delivery.job.state) == ("told", State.TIMED_OUT)
        assert (delivery.job.error, delivery.job.finished_ms) == ("ttl of 10000 ms expired", late)
        assert (await store.list("m", None, 0, 9)).total == 1
        await store.webhook_sent("told", 1, True, late)
        assert (await store.list("m", None, 0, 9)).total == 0
        assert await store.next_ms() is None

    run(fresh, scenario)


def test_a_result_is_kept_for_its_retention(fresh: Fresh) -> None:
    async def scenario(store: JobStore) -> None:
        for id in ("a", "b", "c"):
            await store.add(request(id, retention_ms=5000 if id == "a" else RETENTION))
        await claim(store, 2)
        for id in ("a", "b"):
            assert await store.finish(id, 1, State.COMPLETED, T0 + 100, b"1")
        assert await store.next_ms() == T0 + 5100
        assert await state(store, "a", T0 + 5099) is State.COMPLETED
        assert await state(store, "a", T0 + 5100) is None
        await store.keep("b", T0 + 300)
        await store.keep("c", T0 + 300)
        await store.keep("unknown", T0)
        assert await state(store, "b", T0 + 300) is None
        assert await state(store, "c", T0 + 300) is State.IN_QUEUE, "only a final job is kept shorter"
        assert await sweep(store, T0 + 5100) == ([], [])
        assert await store.chunks("a", 0) is None
        assert (await store.list("m", None, 0, 9)).total == 1
        assert await store.counts("m") == Counts(in_queue=1, completed=2, accepted=3)

    run(fresh, scenario)


def test_chunks_are_drained_once_and_read_at_will(fresh: Fresh) -> None:
    async def scenario(store: JobStore) -> None:
        await store.add(request("a"))
        assert await store.drain("a") == Chunks(State.IN_QUEUE, 0, ())
        await claim(store)
        assert await store.append("a", 1, [b"0", b"1"])
        assert await store.append("a", 1, [])
        assert await store.drain("a") == Chunks(State.IN_PROGRESS, 0, (b"0", b"1"))
        assert await store.drain("a") == Chunks(State.IN_PROGRESS, 2, ())
        assert await store.append("a", 1, [b"2"])
        assert await store.finish("a", 1, State.COMPLETED, T0, b"[]")
        assert await store.chunks("a", 1) == Chunks(State.COMPLETED, 1, (b"1", b"2"))
        assert await store.chunks("a", 7) == Chunks(State.COMPLETED, 7, ())
        assert await store.drain("a") == Chunks(State.COMPLETED, 2, (b"2",))
        assert await store.drain("a") == Chunks(State.COMPLETED, 3, ())
        assert await store.drain("b") is None
        assert await store.chunks("b", 0) is None

    run(fresh, scenario)


def test_cancel_ends_what_is_not_final(fresh: Fresh) -> None:
    async def scenario(store: JobStore) -> None:
        for id in ("a", "b", "c"):
            await store.add(request(id))
        await claim(store, 2)
        await store.finish("a", 1, State.COMPLETED, T0, b"1")
        for id, ends in (("a", State.COMPLETED), ("b", State.CANCELLED), ("c", State.CANCELLED)):
            job = await store.cancel(id, "m", T0 + 1)
            assert job is not None
            assert job.state is ends
        assert await store.cancel("a", "n", T0) is None
        assert await store.cancel("z", "m", T0) is None
        assert list(await store.extend({"b": 1}, T0 + 1, LEASE)) == ["b"]
        assert not await store.finish("b", 1, State.COMPLETED, T0 + 1, b"1")
        assert await store.counts("m") == Counts(completed=1, cancelled=2, accepted=3)

    run(fresh, scenario)


def test_retry_queues_a_failed_job_anew(fresh: Fresh) -> None:
    async def scenario(store: JobStore) -> None:
        for id in ("a", "b"):
            await store.add(request(id, webhook="http://x"))
        await claim(store)
        await store.append("a", 1, [b"1"])
        await store.drain("a")
        await store.finish("a", 1, State.FAILED, T0 + 1, b"half", "no")
        assert await deliveries(store, T0 + 1) == [("a", State.FAILED, 1)]
        job = await store.retry("a", "m", T0 + 9)
        polled = replace(request("a", webhook="http://x"), input=b"", passed=b"")
        assert job == Job(
            polled, State.IN_QUEUE, 1, worker="w", started_ms=T0, queued_ms=T0 + 9, expires_ms=T0 + 9 + TTL
        )
        assert await store.drain("a") == Chunks(State.IN_QUEUE, 0, ())
        assert await deliveries(store, T0 + 99_999) == []
        assert [job.request.id for job in (await store.list("m", None, 0, 9)).jobs] == ["a", "b"]
        claimed = await store.claim({"m": 2}, "w", T0 + 9, LEASE)
        assert [(job.request.id, job.attempt, job.request.input) for job in claimed] == [
            ("b", 1, b'{"n":1}'),
            ("a", 2, b'{"n":1}'),
        ]
        with pytest.raises(ServingError, match="job 'a' is IN_PROGRESS") as refused:
            await store.retry("a", "m", T0 + 9)
        assert refused.value.kind is Kind.INVALID
        assert await store.retry("z", "m", T0) is None
        assert await store.retry("a", "n", T0) is None
        await store.finish("a", 2, State.COMPLETED, T0 + 10, b"1")
        assert await deliveries(store, T0 + 10) == [("a", State.COMPLETED, 1)]
        assert await store.counts("m") == Counts(in_progress=1, completed=1, failed=1, retried=1, accepted=2)

    run(fresh, scenario)


def test_a_purge_ends_what_waits_and_no_more(fresh: Fresh) -> None:
    async def scenario(store: JobStore) -> None:
        for id in ("a", "b", "c"):
            await store.add(request(id))
        await store.add(request("other", endpoint="n"))
        await claim(store)
        assert sorted(await store.purge("m", T0 + 1)) == ["b", "c"]
        assert await state(store, "a") is State.IN_PROGRESS
        assert await state(store, "b") is State.CANCELLED
        assert await state(store, "other") is State.IN_QUEUE
        assert list(await store.purge("m", T0 + 1)) == []
        assert await store.counts("m") == Counts(in_progress=1, cancelled=2, accepted=3)

    run(fresh, scenario)


def test_a_webhook_has_three_attempts_ten_seconds_apart(fresh: Fresh) -> None:
    async def scenario(store: JobStore) -> None:
        await store.add(request("a", webhook="http://x"))
        await store.add(request("b"))
        await claim(store, 2)
        assert await deliveries(store, T0 + 99) == []
        for id in ("a", "b"):
            await store.finish(id, 1, State.COMPLETED, T0 + 100, b"1")
        assert await store.next_ms() == T0 + 100
        assert await deliveries(store, T0 + 99) == []
        now_ms = T0 + 100
        for attempt in (1, 2, 3):
            assert await deliveries(store, now_ms) == [("a", State.COMPLETED, attempt)]
            assert await deliveries(store, now_ms + 1) == [], "it is taken"
            await store.webhook_sent("a", attempt + 1, False, now_ms + 1, "not this one")
            await store.webhook_sent("a", attempt, False, now_ms + 1, f"HTTP 50{attempt}")
            job = await store.get("a", "m", now_ms)
            assert job is not None
            assert job.webhook_note == f"HTTP 50{attempt}"
            now_ms += 1 + WEBHOOK_INTERVAL_MS
            assert await deliveries(store, now_ms - 1) == []
        assert await deliveries(store, now_ms + 99_999) == []

    run(fresh, scenario)


def test_a_webhook_whose_sender_died_is_due_again_as_the_same_attempt(fresh: Fresh) -> None:
    async def scenario(store: JobStore) -> None:
        await store.add(request("a", webhook="http://x"))
        await store.cancel("a", "m", T0)
        assert await deliveries(store, T0, lease_ms=500) == [("a", State.CANCELLED, 1)]
        assert await store.next_ms() == T0 + 500
        assert await deliveries(store, T0 + 499) == []
        assert await deliveries(store, T0 + 500) == [("a", State.CANCELLED, 1)]
        await store.webhook_sent("a", 1, True, T0 + 501)
        assert await deliveries(store, T0 + 99_999) == []

    run(fresh, scenario)


def test_a_webhook_outlives_the_retention_of_its_job(fresh: Fresh) -> None:
    async def scenario(store: JobStore) -> None:
        await store.add(request("a", webhook="http://x", retention_ms=1000))
        await store.cancel("a", "m", T0)
        assert await sweep(store, T0 + 1000) == ([], [])
        assert await store.get("a", "m", T0 + 1000) is None
        assert await store.next_ms() == T0
        assert await deliveries(store, T0 + 1000) == [("a", State.CANCELLED, 1)]
        await store.webhook_sent("a", 1, True, T0 + 1001)
        assert await store.drain("a") is None
        assert await store.next_ms() is None

    run(fresh, scenario)


def test_a_list_is_newest_first_and_in_pages(fresh: Fresh) -> None:
    async def scenario(store: JobStore) -> None:
        for n in range(7):
            await store.add(request(f"j{n}", low_priority=n == 5, batch="b" if n % 2 else ""))
        await store.add(request("other", endpoint="n", batch="b"))
        await claim(store, 2)

        async def page(state: State | None, offset: int, limit: int, batch: str = "") -> tuple[list[str], int]:
            found = await store.list("m", state, offset, limit, batch)
            return [job.request.id for job in found.jobs], found.total

        assert await page(None, 0, 3) == (["j6", "j5", "j4"], 7)
        assert await page(None, 5, 3) == (["j1", "j0"], 7)
        assert await page(State.IN_QUEUE, 1, 2) == (["j5", "j4"], 5)
        assert await page(State.IN_PROGRESS, 0, 9) == (["j1", "j0"], 2)
        assert await page(State.FAILED, 0, 9) == ([], 0)
        assert await page(None, 0, 0) == ([], 7)
        assert await page(None, 1, 9, "b") == (["j3", "j1"], 3)
        assert await page(State.IN_QUEUE, 0, 9, "b") == (["j5", "j3"], 2)
        assert await page(State.IN_PROGRESS, 0, 0, "b") == ([], 1)
        assert await page(None, 0, 9, "unknown") == ([], 0)

    run(fresh, scenario)


def test_a_store_that_is_alone_recovers_what_ran_at_once(fresh: Fresh) -> None:
    async def scenario(store: JobStore) -> None:
        for id in ("a", "b"):
            await store.add(request(id))
        await claim(store)
        swept = await store.recover(T0 + 1)
        assert list(swept.changed) == ["a"]
        assert await claim(store) == ["a"]
        assert list((await store.recover(T0 + 2)).changed) == ["a"]
        job = await store.get("a", "m", T0 + 2)
        assert job is not None
        assert (job.state, job.error) == (State.FAILED, WORKER_LOST)
        assert await state(store, "b") is State.IN_QUEUE

    run(fresh, scenario)


def test_a_webhook_that_was_being_posted_is_due_at_once_where_its_store_is_alone(fresh: Fresh) -> None:
    async def scenario(store: JobStore) -> None:
        await store.add(request("a", webhook="http://x"))
        await store.cancel("a", "m", T0)
        assert await deliveries(store, T0) == [("a", State.CANCELLED, 1)]
        await store.webhook_sent("a", 1, False, T0 + 1, "status 500")
        again_ms = T0 + 1 + WEBHOOK_INTERVAL_MS
        await store.recover(T0 + 2)
        assert await store.next_ms() == again_ms, "one that nobody was posting waits its interval out"
        assert await deliveries(store, again_ms, lease_ms=30_000) == [("a", State.CANCELLED, 2)]
        await store.recover(again_ms + 1)
        assert await deliveries(store, again_ms + 1) == [("a", State.CANCELLED, 2)]

    run(fresh, scenario)


async def woken(waiting: "asyncio.Task[None]") -> bool:
    """Whether a wait of a minute ends in a few seconds."""
    done, _ = await asyncio.wait([waiting], timeout=5)
    waiting.cancel()
    return bool(done)


async def a_turn() -> None:
    """Until every task that could run has."""
    for _ in range(3):
        await asyncio.sleep(0)


CHANGES: dict[str, Callable[[JobStore], Awaitable[object]]] = {
    "progress": lambda store: store.progress("a", 1, b"1"),
    "append": lambda store: store.append("a", 1, [b"1"]),
    "finish": lambda store: store.finish("a", 1, State.COMPLETED, T0, b"1"),
    "cancel": lambda store: store.cancel("a", "m", T0),
    "lose": lambda store: store.lose({"a": 1}, "gone", T0),
    "release": lambda store: store.release({"a": 1}, T0),
    "lapse": lambda store: store.sweep(T0 + LEASE),
    "expiry": lambda store: store.sweep(T0 + TTL),
}


@pytest.mark.parametrize("change", CHANGES)
def test_who_watches_a_job_wakes_when_it_changes(fresh: Fresh, change: str) -> None:
    async def scenario(store: JobStore) -> None:
        await store.add(request("a"))
        await claim(store)
        tick = store.tick
        waiting = asyncio.create_task(store.watch(["x", "a"], 60, tick))
        await a_turn()
        await CHANGES[change](store)
        assert await woken(waiting)
        late = asyncio.create_task(store.watch(["a"], 60, tick))
        assert await woken(late), "what changed before the wait, but after the tick, is not missed"

    run(fresh, scenario)


ARRIVALS: dict[str, Callable[[JobStore], Awaitable[object]]] = {
    "add": lambda store: store.add(request("b")),
    "retry": lambda store: store.retry("failed", "m", T0),
    "lose": lambda store: store.lose({"a": 1}, "gone", T0),
    "release": lambda store: store.release({"a": 1}, T0),
    "lapse": lambda store: store.sweep(T0 + LEASE),
    "recovery": lambda store: store.recover(T0 + 1),
}


@pytest.mark.parametrize("arrival", ARRIVALS)
def test_who_waits_for_work_wakes_when_some_arrives(fresh: Fresh, arrival: str) -> None:
    async def scenario(store: JobStore) -> None:
        for id in ("a", "failed"):
            await store.add(request(id))
        await claim(store, 2)
        await store.finish("failed", 1, State.FAILED, T0, error="no")
        tick = store.tick
        waiting = asyncio.create_task(store.wait_work(["x", "m"], 60, tick))
        await a_turn()
        await ARRIVALS[arrival](store)
        assert await woken(waiting)
        assert await woken(asyncio.create_task(store.wait_work(["m"], 60, tick)))

    run(fresh, scenario)


def test_a_wait_ends_with_its_time(fresh: Fresh) -> None:
    async def scenario(store: JobStore) -> None:
        began = monotonic()
        await store.watch(["a"], 0.05, store.tick)
        await store.wait_work(["m"], 0.05, store.tick)
        assert 0.09 < monotonic() - began < 5

    run(fresh, scenario)


def test_a_closed_store_says_so(fresh: Fresh) -> None:
    async def scenario(store: JobStore) -> None:
        await store.add(request("a"))
        await store.close()
        with pytest.raises(ServingError, match="closed") as refused:
            await store.get("a", "m", T0)
        assert refused.value.kind is Kind.UNAVAILABLE

    run(fresh, scenario)


def shared(fresh: Fresh) -> str:
    url = fresh()
    if url == "memory":
        pytest.skip("memory is not shared")
    return url


def test_a_job_survives_the_store_that_took_it(fresh: Fresh) -> None:
    url = shared(fresh)

    async def main() -> None:
        async with opened(url) as store:
            await store.add(request("a", webhook="http://x"))
            await store.add(request("b"))
            await claim(store)
            await store.append("a", 1, [b"1", b"2"])
            await store.drain("a")
            await store.finish("a", 1, State.COMPLETED, T0, b"1")
            before = [await store.get(id, "m", T0) for id in ("a", "b")]
        async with opened(url) as store:
            assert [await store.get(id, "m", T0) for id in ("a", "b")] == before
            assert await store.counts("m") == Counts(in_queue=1, completed=1, accepted=2)
            assert await store.drain("a") == Chunks(State.COMPLETED, 2, ())
            assert await deliveries(store, T0) == [("a", State.COMPLETED, 1)]
            assert await claim(store) == ["b"]

    asyncio.run(main())


def test_news_reach_another_process(fresh: Fresh) -> None:
    url = shared(fresh)

    async def main() -> None:
        async with opened(url) as here, opened(url) as there:
            await there.get("a", "m", T0)
            tick = there.tick
            waiting = asyncio.create_task(there.wait_work(["m"], 60, tick))
            await a_turn()
            await here.add(request("a"))
            assert await woken(waiting)
            tick = there.tick
            assert await claim(here) == ["a"]
            watching = asyncio.create_task(there.watch(["a"], 60, tick))
            await here.finish("a", 1, State.COMPLETED, T0, b"1")
            deadline = monotonic() + 5
            while await state(there, "a") is not State.COMPLETED:
                assert monotonic() < deadline
            assert await woken(watching)

    asyncio.run(main())


@pytest.mark.parametrize("stores", [1, 2])
def test_many_workers_lose_no_job_and_end_none_twice(fresh: Fresh, stores: int) -> None:
    url = fresh() if stores == 1 else shared(fresh)
    jobs = [f"j{n:03}" for n in range(200)]

    async def main() -> None:
        async with opened(url) as here, opened(url) as there:
            sides = (here, there)[:stores]
            started: list[str] = []
            ended: list[str] = []

            async def submit(part: Sequence[str]) -> None:
                for id in part:
                    await here.add(request(id))

            async def work(store: JobStore, name: str) -> None:
                while len(ended) < len(jobs):
                    tick = store.tick
                    for job in await store.claim({"m": 3}, name, T0, LEASE):
                        id = job.request.id
                        started.append(id)
                        reports = [
                            side.finish(id, job.attempt, State.COMPLETED, T0, name.encode()) for side in (store, *sides)
                        ]
                        outcomes = await asyncio.gather(*reports)
                        assert sum(outcomes) == 1
                        ended.append(id)
                    await store.wait_work(["m"], 0.01, tick)

            workers = [work(store, f"w{n}") for n, store in enumerate(sides * 4)]
            await asyncio.gather(*(submit(jobs[n::10]) for n in range(10)), *workers)
            assert sorted(started) == jobs
            assert sorted(ended) == jobs
            assert await here.counts("m") == Counts(completed=len(jobs), accepted=len(jobs))

    asyncio.run(asyncio.wait_for(main(), 60))


IDS = ("a", "b", "c", "d")
ENDPOINTS = ("m", "n")
ids, endpoints, attempts = st.sampled_from(IDS), st.sampled_from(ENDPOINTS), st.integers(0, 3)
held = st.dictionaries(ids, attempts, max_size=3)
finals = st.sampled_from([state for state in State if state.is_final])
values = st.sampled_from([b"1", b"", b'"x"'])
any_state = st.none() | st.sampled_from(list(State))
ADD = st.tuples(
    st.just("add"),
    ids,
    endpoints,
    st.booleans(),
    st.sampled_from(["", "http://x"]),
    st.sampled_from([10_000, TTL]),
    st.sampled_from(["", "g"]),
    st.sampled_from([0, 2]),
    st.booleans(),
)
CALLS = st.one_of(
    ADD,
    ADD,
    st.tuples(st.just("claim"), st.dictionaries(endpoints, st.integers(0, 2), max_size=2)),
    st.tuples(st.just("claim"), st.just({"m": 2, "n": 2})),
    st.tuples(st.just("extend"), held),
    st.tuples(st.just("release"), held),
    st.tuples(st.just("lose"), held),
    st.tuples(st.just("append"), ids, attempts, st.lists(values, max_size=2)),
    st.tuples(st.just("progress"), ids, attempts, values),
    st.tuples(st.just("finish"), ids, attempts, finals, st.none() | values, st.sampled_from([None, "no"])),
    st.tuples(st.just("cancel"), ids, st.sampled_from(("", *ENDPOINTS))),
    st.tuples(st.just("retry"), ids, st.sampled_from(("", *ENDPOINTS))),
    st.tuples(st.just("keep"), ids, st.integers(-5000, 5000)),
    st.tuples(st.just("drain"), ids),
    st.tuples(st.just("purge"), endpoints),
    st.tuples(st.just("list"), endpoints, any_state, st.integers(0, 2), st.integers(0, 3), st.sampled_from(["", "g"])),
    st.tuples(st.just("due"), st.integers(1, 3), st.sampled_from([500, LEASE])),
    st.tuples(st.just("sent"), ids, st.integers(1, 3), st.booleans()),
    st.tuples(st.just("sweep")),
    st.tuples(st.just("recover")),
    st.tuples(st.just("pass"), st.sampled_from([1, 500, WEBHOOK_INTERVAL_MS, LEASE, RETENTION, TTL])),
)


async def call(store: JobStore, now_ms: int, name: str, *given: Any) -> object:
    """One call's answer as something that compares."""
    try:
        match name:
            case "add":
                id, endpoint, low, webhook, ttl_ms, batch, limit, claimed = given
                fields = {"low_priority": low, "webhook": webhook, "ttl_ms": ttl_ms, "batch": batch}
                who = Claim("v", LEASE) if claimed else None
                return await store.add(request(id, endpoint, now_ms, **fields), limit, who)
            case "claim":
                return list(await store.claim(given[0], "w", now_ms, LEASE))
            case "extend":
                return list(await store.extend(given[0], now_ms, LEASE))
            case "release":
                await store.release(given[0], now_ms)
            case "lose":
                return list(await store.lose(given[0], "gone", now_ms))
            case "append":
                return await store.append(*given)
            case "progress":
                return await store.progress(*given)
            case "finish":
                id, attempt, state, output, error = given
                return await store.finish(id, attempt, state, now_ms, output, error)
            case "cancel":
                return await store.cancel(given[0], given[1], now_ms)
            case "retry":
                return await store.retry(given[0], given[1], now_ms)
            case "keep":
                await store.keep(given[0], now_ms + given[1])
            case "drain":
                drained = await store.drain(given[0])
                return drained and replace(drained, values=list(drained.values))
            case "purge":
                return sorted(await store.purge(given[0], now_ms))
            case "list":
                page = await store.list(*given)
                return list(page.jobs), page.total
            case "due":
                return list(await store.due_webhooks(now_ms, *given))
            case "sent":
                id, attempt, delivered = given
                await store.webhook_sent(id, attempt, delivered, now_ms, "refused")
            case "sweep":
                return await sweep(store, now_ms)
            case "recover":
                swept = await store.recover(now_ms)
                return sorted(swept.changed), sorted(swept.stop)
    except ServingError as error:
        return error.kind, error.message
    return None


async def picture(store: JobStore, now_ms: int) -> object:
    """All that can be seen of a store."""
    read = [await store.chunks(id, 0) for id in IDS]
    return (
        [await store.get(id, "", now_ms, whole=True) for id in IDS],
        [chunks and (chunks.state, list(chunks.values)) for chunks in read],
        [await store.counts(endpoint) for endpoint in ENDPOINTS],
        await store.totals(),
        await store.next_ms(),
    )


async def compare(store: JobStore, calls: Sequence[tuple[Any, ...]]) -> None:
    """The same calls on the store and on the model; and by no call but a retry does a final job change its end."""
    model, now_ms = MemoryJobStore(), T0
    ended: dict[str, Job] = {}
    for name, *details in calls:
        if name == "pass":
            now_ms += details[0]
        else:
            assert await call(store, now_ms, name, *details) == await call(model, now_ms, name, *details), name
        assert await picture(store, now_ms) == await picture(model, now_ms), name
        for id in IDS:
            job = await store.get(id, "", now_ms)
            if job and id in ended and name not in ("add", "retry"):
                was = ended[id]
                assert (job.state, job.output, job.error) == (was.state, was.output, was.error), name
            if job and job.state.is_final:
                ended[id] = job
            else:
                ended.pop(id, None)


EXAMPLES = {"memory": 20, "sqlite": 150, "unix": 100, "postgresql": 30}  # by scheme; a fresh store takes its time


def test_any_sequence_of_calls_is_answered_as_the_model_does(fresh: Fresh) -> None:
    @settings(max_examples=EXAMPLES[fresh().partition(":")[0]], deadline=None, suppress_health_check=list(HealthCheck))
    @given(calls=st.lists(CALLS, min_size=5, max_size=40))
    def check(calls: list[tuple[Any, ...]]) -> None:
        run(fresh, lambda store: compare(store, calls))

    check()
