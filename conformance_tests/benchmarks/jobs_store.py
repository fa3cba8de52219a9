"""How fast a job store takes jobs, beside bare SQLite on the same disk; and whether a long queue slows it down.

python -m conformance_tests.benchmarks.jobs_store [--store URL] [--folder FOLDER]
"""

import argparse
import asyncio
import itertools
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from time import perf_counter, process_time

from penstock.job_api.store import Claim, JobStore, Request, State, open_store

CONCURRENCY = 64
ROUNDS = 7
SECONDS = 1.0
QUEUED = 100_000
SAMPLES = 300
INPUT = b'{"inputs":[[0.25,0.5,0.75,1.0]]}' * 4
LEASE_MS = 15_000
SCHEMA = "CREATE TABLE jobs (id TEXT PRIMARY KEY, endpoint TEXT, input BLOB, created_ms INTEGER)"

numbers = itertools.count()


def request(endpoint: str = "m") -> Request:
    now_ms = time.time_ns() // 1_000_000
    return Request(f"{next(numbers):032x}-u1", endpoint, INPUT, now_ms, 86_400_000, 600_000, 1_800_000)


def bare(path: Path, group: int, seconds: float) -> float:
    """Jobs per second that SQLite commits as one row each, `group` of them in a durable transaction."""
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.execute(SCHEMA)
    began, done = perf_counter(), 0
    while perf_counter() - began < seconds:
        db.execute("BEGIN IMMEDIATE")
        for _ in range(group):
            job = request()
            row = (job.id, job.endpoint, job.input, job.created_ms)
            db.execute("INSERT INTO jobs VALUES (?, ?, ?, ?)", row)
        db.execute("COMMIT")
        done += group
    db.close()
    return done / (perf_counter() - began)


async def accepted(store: JobStore, concurrency: int, seconds: float) -> float:
    """Jobs per second that so many callers have accepted, each submitting its next when the last one is."""
    began, done = perf_counter(), 0

    async def submit() -> None:
        nonlocal done
        while perf_counter() - began < seconds:
            await store.add(request("accepted"))
            done += 1

    await asyncio.gather(*(submit() for _ in range(concurrency)))
    return done / (perf_counter() - began)


async def cycled(store: JobStore, concurrency: int, seconds: float) -> tuple[float, float]:
    """Jobs per second, and CPU microseconds of each, that are added with a claim and finished: what a runsync asks."""
    began, cpu_began, done = perf_counter(), process_time(), 0

    async def submit() -> None:
        nonlocal done
        while perf_counter() - began < seconds:
            job = await store.add(request("cycled"), claim=Claim("w", LEASE_MS))
            assert job is not None
            await store.finish(job.request.id, 1, State.COMPLETED, job.started_ms, INPUT)
            done += 1

    await asyncio.gather(*(submit() for _ in range(concurrency)))
    return done / (perf_counter() - began), (process_time() - cpu_began) / done * 1e6


async def latency_ms(call: Callable[[], Awaitable[object]]) -> tuple[float, float]:
    """The median and the 99th percentile of a call, one at a time."""
    times = []
    for _ in range(SAMPLES):
        began = perf_counter()
        await call()
        times.append((perf_counter() - began) * 1e3)
    return statistics.median(times), statistics.quantiles(times, n=100)[-1]


async def latencies(store: JobStore, queued: int) -> None:
    for name, call in (
        ("add", lambda: store.add(request("deep"))),
        ("claim", lambda: store.claim({"deep": 1}, "w", time.time_ns() // 1_000_000, LEASE_MS)),
        ("counts", lambda: store.counts("deep")),
    ):
        median, late = await latency_ms(call)
        print(f"  {name:7} {queued:7,} queued   median {median:6.2f} ms   99 % {late:6.2f} ms")


async def measure(url: str, folder: Path) -> None:
    store = await open_store(url)
    ours, theirs = [], []
    for round in range(ROUNDS):  # in turn, for both feel what else the machine does
        theirs.append(bare(folder / f"bare{round}.db", CONCURRENCY, SECONDS))
        ours.append(await accepted(store, CONCURRENCY, SECONDS))
    rate, reference = statistics.median(ours), statistics.median(theirs)
    print(f"accepted at concurrency {CONCURRENCY}: {rate:,.0f} jobs/s")
    print(f"  bare SQLite in groups of {CONCURRENCY}: {reference:,.0f} jobs/s; share: {rate / reference:.2f}")
    await store.purge("accepted", time.time_ns() // 1_000_000)
    for concurrency in (1, 16):
        rate, cpu_us = await cycled(store, concurrency, SECONDS)
        print(f"added, claimed and finished at concurrency {concurrency}: {rate:,.0f} jobs/s, {cpu_us:.0f} µs CPU each")
    await latencies(store, 0)
    left = QUEUED
    while left > 0:
        await asyncio.gather(*(store.add(request("deep")) for _ in range(min(left, 2000))))
        left -= 2000
    await latencies(store, QUEUED)
    await store.close()
    began = perf_counter()
    store = await open_store(url)
    await store.recover(time.time_ns() // 1_000_000)
    claimed = await store.claim({"deep": 1}, "w", time.time_ns() // 1_000_000, LEASE_MS)
    assert claimed
    print(f"opened, recovered and claimed from {QUEUED:,} queued in {perf_counter() - began:.3f} s")
    began = perf_counter()
    purged = await store.purge("deep", time.time_ns() // 1_000_000)
    print(f"purged {len(purged):,} in {perf_counter() - began:.2f} s")
    await store.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default="", help="URL of an empty job store; an SQLite file in the folder if none")
    parser.add_argument("--folder", default=".", help="where the SQLite files lie while this runs")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        asyncio.run(measure(given.store or f"sqlite:{folder}/jobs.db", Path(folder)))


if __name__ == "__main__":
    main()
