"""`make bench-jobs`: what jobs cost beside inference, bare SQLite and an empty queue, into BENCHMARKS.md and a record.

Each figure has its reference in the same round, one right after the other, and what counts is the median of their
ratios: two rounds may differ by half on a machine that does something else besides.
"""

import argparse
import asyncio
import contextlib
import json
import sqlite3
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Awaitable, Callable, Sequence
from datetime import date
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, TypeAlias

import numpy as np
import orjson
from penstock.bench import cpu
from penstock.bench.load import Load, Outcome, drive
from penstock.bench.over_http import HttpCarrier
from penstock.job_api.desk import new_id
from penstock.job_api.store import Claim, JobStore, Request, State, open_store

from conformance_tests.benchmarks import page, standard
from conformance_tests.server import HANDLERS, SAMPLES, Running, penstock

Row: TypeAlias = dict[str, Any]

ROUNDS = 5
DURATION_S = 1.5
WARMUP_S = 0.3
GOAL_TIMES, GOAL_US = 2, 150  # a runsync may cost so many times the CPU of the same inference, and so much besides
GOAL_SHARE = 0.5  # of what bare SQLite commits, as accepted jobs
CONCURRENCY = 16  # of calls
SUBMITTERS = 64  # of jobs that are only accepted
DEPTHS = (0, 1_000, 10_000, 100_000)  # jobs that wait
SAMPLES_PER_ROUND = 100  # of each call on a store with so many
LEASE_MS = 15_000
INPUT = b'{"inputs":[[0.25,0.5,0.75,1.0]]}' * 4
BARE = "CREATE TABLE jobs (id TEXT PRIMARY KEY, endpoint TEXT, input BLOB, created_ms INTEGER)"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="make bench-jobs", description="Measure what jobs cost.")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help="how often (default: %(default)s)")
    parser.add_argument("--folder", help="where the files of the stores lie meanwhile; on the disk that is meant")
    parser.add_argument("--no-record", action="store_true", help="print the figures and write nothing")
    options = parser.parse_args(arguments)

    record: Row = {"date": date.today().isoformat(), "kind": "jobs", "rounds": options.rounds}
    record["machine"] = standard.machine()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folder = Path(scratch)
        record["calls"] = calls(folder, options.rounds)
        record["accepted"] = asyncio.run(accepted(folder, options.rounds))
        record["depths"] = asyncio.run(depths(folder, options.rounds))
        record["server"] = long_queue(folder)
    text = sections(record)
    print(text)
    if not options.no_record:
        path = standard.RECORDS / f"jobs-{record['date']}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
        page.put(
            standard.ROOT / "BENCHMARKS.md", "jobs", f"## Jobs, {record['date']}\n\n{page.setting(record)}\n\n{text}"
        )
        print(f"\nwritten to {path.relative_to(standard.ROOT)} and BENCHMARKS.md")


def said(what: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{what}", end="", file=sys.stderr)


# -- calls: the server's CPU time of a runsync, beside that of the same inference


def calls(folder: Path, rounds: int) -> list[Row]:
    """Two servers, so that what is left of jobs (their removal) falls on the one that has them."""
    data = np.random.default_rng(20).integers(0, 2, (1, 16)).tolist()
    inputs = [{"name": name, "datatype": "INT32", "shape": [1, 16], "data": data[0]} for name in ("INPUT0", "INPUT1")]
    oip = {"inputs": inputs}
    only = ["--model-control-mode", "explicit", "--load-model=simple"]
    with contextlib.ExitStack() as stack:
        # Jobs come over ASGI, and so does what they are compared with.
        plain = stack.enter_context(penstock([SAMPLES], folder / "plain.log", *only, "--http-fast-lane", "false"))
        # Results go while it is measured: their removal is a part of what a job costs.
        options = [*only, "--job-store", f"sqlite:{folder / 'calls.db'}", "--job-sync-retention-secs", "1"]
        jobs = stack.enter_context(penstock([SAMPLES], folder / "jobs.log", *options))
        loads: dict[str, tuple[Running, str, object]] = {
            "infer, JSON over ASGI": (plain, "/v2/models/simple/infer", oip),
            "runsync, the same as input": (jobs, "/v2/simple/runsync", {"input": oip}),
            "runsync, values by name": (jobs, "/v2/simple/runsync", {"input": {"INPUT0": data, "INPUT1": data}}),
        }
        for server, path, body in loads.values():
            answer = _post(server.http + path, body)
            assert answer.get("status", "COMPLETED") == "COMPLETED", answer
        measured: dict[str, list[Row]] = {name: [] for name in loads}
        for number in range(rounds):
            for name, (server, path, body) in loads.items():
                said(f"round {number + 1} of {rounds}: {name}")
                measured[name].append(asyncio.run(_load(server, path, body, CONCURRENCY, duration_s=DURATION_S)))
    return [{"name": name, "each_round": each} for name, each in measured.items()]


async def _load(
    server: Running, path: str, body: object, concurrency: int, duration_s: float = 0.0, requests: int = 0
) -> Row:
    """One request over and over; raises RuntimeError where one was not answered with 200."""
    host, _, port = server.http.removeprefix("http://").rpartition(":")
    text = orjson.dumps(body)
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
    )
    carriers = [HttpCarrier(host, int(port), head.encode() + text) for _ in range(concurrency)]
    try:
        for carrier in carriers:
            await carrier.open()
        if duration_s:
            await drive(carriers, Load(concurrency, duration_s=WARMUP_S), Outcome())
        used_ns, outcome = cpu.used_ns([server.process.pid]) or 0, Outcome()
        await drive(carriers, Load(concurrency, duration_s=duration_s, requests=requests), outcome)
        used_ns = (cpu.used_ns([server.process.pid]) or 0) - used_ns
    finally:
        for carrier in carriers:
            await carrier.close()
    if outcome.errors:
        raise RuntimeError(f"POST {path}: {outcome.errors} errors: {outcome.first_error}")
    p50_ns, p99_ns = outcome.latencies.percentiles(50, 99)
    return {
        "cpu_us": used_ns / outcome.answered / 1e3,
        "per_s": outcome.answered / (outcome.ended_ns - outcome.started_ns) * 1e9,
        "p50_us": p50_ns / 1e3,
        "p99_us": p99_ns / 1e3,
    }


def _post(url: str, body: object) -> Row:
    asked = urllib.request.Request(url, orjson.dumps(body), {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=60) as answer:
        return dict(orjson.loads(answer.read()))


# -- accepted: what the store takes, beside what SQLite does with as many rows in a transaction


def request(endpoint: str) -> Request:
    now_ms = time.time_ns() // 1_000_000
    return Request(new_id(), endpoint, INPUT, now_ms, 86_400_000, 600_000, 1_800_000)


async def accepted(folder: Path, rounds: int) -> list[Row]:
    """Each begins with an empty file in each round."""
    each = []
    for number in range(rounds):
        said(f"round {number + 1} of {rounds}: accepted jobs")
        bare = _bare(folder / f"bare{number}.db", SUBMITTERS)
        store = await open_store(f"sqlite:{folder / f'accepted{number}.db'}")
        ours = await _accepted(store)
        cycles, cycle_cpu_us = await _cycled(store)
        await store.close()
        each.append({"bare_per_s": bare, "accepted_per_s": ours, "cycles_per_s": cycles, "cycle_cpu_us": cycle_cpu_us})
    return each


def _bare(path: Path, group: int) -> float:
    """Jobs per second that SQLite commits as one row each, `group` of them in a durable transaction."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute(BARE)
        began, done = perf_counter(), 0
        while perf_counter() - began < DURATION_S:
            db.execute("BEGIN IMMEDIATE")
            for _ in range(group):
                job = request("accepted")
                row = (job.id, job.endpoint, job.input, job.created_ms)
                db.execute("INSERT INTO jobs VALUES (?, ?, ?, ?)", row)
            db.execute("COMMIT")
            done += group
        return done / (perf_counter() - began)


async def _accepted(store: JobStore) -> float:
    """Jobs per second of SUBMITTERS callers, each of which submits its next when the last one is accepted."""
    began, done = perf_counter(), 0

    async def submit() -> None:
        nonlocal done
        while perf_counter() - began < DURATION_S:
            await store.add(request("accepted"))
            done += 1

    await asyncio.gather(*(submit() for _ in range(SUBMITTERS)))
    return done / (perf_counter() - began)


async def _cycled(store: JobStore) -> tuple[float, float]:
    """Jobs per second, and CPU microseconds of each, that are added with a claim and finished: what a runsync asks."""
    began, cpu_began, done = perf_counter(), process_time(), 0

    async def submit() -> None:
        nonlocal done
        while perf_counter() - began < DURATION_S:
            job = await store.add(request("cycled"), claim=Claim("w", LEASE_MS))
            assert job is not None
            await store.finish(job.request.id, 1, State.COMPLETED, job.started_ms, INPUT)
            done += 1

    await asyncio.gather(*(submit() for _ in range(CONCURRENCY)))
    return done / (perf_counter() - began), (process_time() - cpu_began) / done * 1e6


# -- depths: a submission and a claim with more and more jobs that wait


async def depths(folder: Path, rounds: int) -> list[Row]:
    """A store for each depth, which an added and a claimed job leave as it was; asked in turn."""
    stores: dict[int, JobStore] = {}
    for depth in DEPTHS:
        said(f"queueing {depth:,} jobs")
        stores[depth] = await open_store(f"sqlite:{folder / f'depth{depth}.db'}")
        for start in range(0, depth, 1000):
            await asyncio.gather(*(stores[depth].add(request("deep")) for _ in range(min(1000, depth - start))))
    measured: dict[int, list[Row]] = {depth: [] for depth in DEPTHS}
    for number in range(rounds):
        for depth, store in stores.items():
            said(f"round {number + 1} of {rounds}: {depth:,} jobs wait")
            measured[depth].append(await _paired(store))
    for depth, store in stores.items():
        assert (await store.counts("deep")).in_queue == depth
        await store.close()
    return [{"queued": depth, "each_round": each} for depth, each in measured.items()]


async def _paired(store: JobStore) -> Row:
    """Medians of a submission and a claim, one after the other: milliseconds, and CPU microseconds of the process."""
    times: dict[str, list[tuple[float, float]]] = {"add": [], "claim": []}
    for _ in range(SAMPLES_PER_ROUND):
        times["add"].append(await _timed(lambda: store.add(request("deep"))))
        times["claim"].append(
            await _timed(lambda: store.claim({"deep": 1}, "w", time.time_ns() // 1_000_000, LEASE_MS))
        )
    found = {}
    for name, each in times.items():
        found[f"{name}_ms"] = statistics.median(took for took, _ in each)
        found[f"{name}_cpu_us"] = statistics.median(used for _, used in each)
    return found


async def _timed(call: Callable[[], Awaitable[object]]) -> tuple[float, float]:
    began, cpu_began = perf_counter(), process_time()
    await call()
    return (perf_counter() - began) * 1e3, (process_time() - cpu_began) * 1e6


# -- a server: its memory while the queue grows, what it accepts, and how soon it is there again


def long_queue(folder: Path) -> Row:
    options = ["--model-control-mode", "explicit", "--load-model=job_slow"]
    kept = [*options, "--job-store", f"sqlite:{folder / 'server.db'}"]
    body = {"input": {"seconds": 3600}, "policy": {"executionTimeout": 7_200_000}}
    rows = []
    with penstock([HANDLERS], folder / "server.log", *kept) as server:
        _post(f"{server.http}/v2/job_slow/run", body)  # runs, and keeps the others waiting
        queued = 0
        asyncio.run(_load(server, "/v2/job_slow/run", body, SUBMITTERS, requests=100))  # what the first calls load
        _post(f"{server.http}/v2/job_slow/purge-queue", {})
        for depth in DEPTHS:
            said(f"a server with {depth:,} jobs that wait")
            more = depth - queued
            row = asyncio.run(_load(server, "/v2/job_slow/run", body, SUBMITTERS, requests=more)) if more else {}
            queued = depth
            rows.append({"queued": depth, "rss_mb": _rss_mb(server.process.pid), **row})
        server.process.kill()
        server.process.wait()
    said("starting again")
    again_s, empty_s = [], []
    for number in range(3):
        empty_s.append(_start_s(folder, *options, "--job-store", f"sqlite:{folder / f'empty{number}.db'}"))
        again_s.append(_start_s(folder, *kept))
    return {"depths": rows, "start_s": statistics.median(again_s), "start_empty_s": statistics.median(empty_s)}


def _start_s(folder: Path, *options: str) -> float:
    """From the start of a server's process until a job is accepted; then it is killed."""
    began = perf_counter()
    with penstock([HANDLERS], folder / "again.log", *options) as server:
        _post(f"{server.http}/v2/job_slow/run", {"input": {"seconds": 3600}})
        took_s = perf_counter() - began
        server.process.kill()
        server.process.wait()
    return took_s


def _rss_mb(pid: int) -> float:
    """Resident memory of the server's process; its handler is another."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"process {pid} has ended")


# -- the page


ABOUT_CALLS = f"""\
`make bench-jobs` measures this: each figure beside its reference in the same round, ratios as medians of the rounds'.

**Calls.** A `runsync` is an inference whose input and result are on disk before it is answered, in two commits.
*x infer*: its CPU time over that of the same inference in the same round. *of the goal*: over {GOAL_TIMES} times that
of the inference and {GOAL_US} us."""
ABOUT_STORE = f"""\
**Store.** One process, no HTTP. *share*: over what bare SQLite commits in the same round as rows of four columns, as
many in a transaction; the goal is {GOAL_SHARE}. *CPU us* of a job, all threads."""
ABOUT_QUEUE = f"""\
**A long queue.** One submission (*add*) or claim at a time, on a store where so many jobs wait. And a server that is
sent jobs over HTTP, {SUBMITTERS} at a time, until so many wait: its memory, of which up to 8 MiB are SQLite's pages,
and what accepting those jobs cost. It shares cores and disk with the client."""


def sections(record: Row) -> str:
    return "\n\n".join(
        (
            ABOUT_CALLS, _calls_text(record["calls"]), ABOUT_STORE, _accepted_text(record["accepted"]),
            ABOUT_QUEUE, _depths_text(record),
        )
    )  # fmt: skip


def _calls_text(measured: list[Row]) -> str:
    inference = measured[0]["each_round"]
    limits = [GOAL_TIMES * one["cpu_us"] + GOAL_US for one in inference]
    rows = [("call of `simple`, 16 at a time", "CPU us", "x infer", "of the goal", "req/s", "p50 us", "p99 us")]
    for row in measured:
        each = row["each_round"]
        ratio = statistics.median(one["cpu_us"] / base["cpu_us"] for one, base in zip(each, inference, strict=True))
        share = statistics.median(one["cpu_us"] / limit for one, limit in zip(each, limits, strict=True))
        middle = {key: statistics.median(one[key] for one in each) for key in each[0]}
        rows.append(
            (
                row["name"],
                f"{middle['cpu_us']:.0f}",
                f"{ratio:.2f}",
                "-" if row is measured[0] else f"{share:.0%}",
                f"{middle['per_s']:.0f}",
                f"{middle['p50_us']:.0f}",
                f"{middle['p99_us']:.0f}",
            )
        )
    return page.aligned(rows, texts=1)


def _accepted_text(each: list[Row]) -> str:
    middle = {key: statistics.median(one[key] for one in each) for key in each[0]}
    share = statistics.median(one["accepted_per_s"] / one["bare_per_s"] for one in each)
    rows = [
        ("store alone, SQLite", "jobs/s", "share", "CPU us"),
        (f"bare SQLite, {SUBMITTERS} rows in a transaction", f"{middle['bare_per_s']:.0f}", "1.00", "-"),
        (f"accepted, {SUBMITTERS} at a time", f"{middle['accepted_per_s']:.0f}", f"{share:.2f}", "-"),
        (
            f"added, claimed and finished, {CONCURRENCY} at a time",
            f"{middle['cycles_per_s']:.0f}",
            "-",
            f"{middle['cycle_cpu_us']:.0f}",
        ),
    ]
    return page.aligned(rows, texts=1)


def _depths_text(record: Row) -> str:
    rows = [
        ("jobs that wait", "add CPU us", "add ms", "claim CPU us", "claim ms", "RSS MB", "HTTP CPU us", "HTTP jobs/s")
    ]
    for row, served in zip(record["depths"], record["server"]["depths"], strict=True):
        middle = {key: statistics.median(one[key] for one in row["each_round"]) for key in row["each_round"][0]}
        rows.append(
            (
                f"{row['queued']:,}",
                f"{middle['add_cpu_us']:.0f}",
                f"{middle['add_ms']:.2f}",
                f"{middle['claim_cpu_us']:.0f}",
                f"{middle['claim_ms']:.2f}",
                f"{served['rss_mb']:.0f}",
                f"{served['cpu_us']:.0f}" if "cpu_us" in served else "-",
                f"{served['per_s']:.0f}" if "per_s" in served else "-",
            )
        )
    server = record["server"]
    return (
        f"{page.aligned(rows, texts=0)}\n\n"
        f"Killed with {DEPTHS[-1]:,} jobs that wait and started again, a server has accepted its next job after "
        f"{server['start_s']:.2f} s; one with an empty store, after {server['start_empty_s']:.2f} s."
    )


if __name__ == "__main__":
    main()
