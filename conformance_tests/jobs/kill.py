"""Kills the server with SIGKILL again and again while jobs are handed in, run, streamed, cancelled and announced.

    python -m conformance_tests.jobs.kill --kills 200 --seed 7

After the last kill a server takes up what is there, and then every job that was ever accepted must have ended, with
one result and no other, its chunks whole and its webhook delivered. What clients do, and when a kill comes, follows
from the seed; where in its work that hits the server does not, so a failure is shown with what was seen of the job.
"""

import argparse
import contextlib
import http.client
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conformance_tests.http_wire import NoAnswerError
from conformance_tests.jobs.client import FINAL, Document, Endpoint, Post, Receiver, checked, until
from conformance_tests.server import HANDLERS, SAMPLES, Running, penstock, serve, spawn

CLIENTS = 6
EARLY = 0.15  # the share of kills that come while the server starts
LIFE_S = (0.05, 1.5)  # after the announcement
START_S = (0.1, 3.0)  # and where it does not come that far, after the start
PAUSES_S = (0, 0.002, 0.02)  # between chunks
REFUSED = 0.02  # the share of webhooks whose first attempt the receiver refuses
END_LIMIT_S = 300.0  # for all that is left over once nobody kills any more
TRACE, PLAIN = "job_trace", "simple"  # a generator in processes of its own, and a model in the server's
KEPT = ["--job-retention-secs", "86400", "--job-sync-retention-secs", "86400"]
GONE = (OSError, NoAnswerError, http.client.HTTPException, ValueError)  # what a client sees of a kill


@dataclass(slots=True)
class Seen:
    """All that clients know of one job."""

    endpoint: str
    name: str = ""
    webhook: bool = False
    cancelled: bool = False  # a client was told so
    ends: list[Document] = field(default_factory=list)  # answers with a final state, in the order they came
    drained: list[Document] = field(default_factory=list)  # chunks, likewise; of one reader


@dataclass(slots=True)
class Ledger:
    """What every client was told. Written by many threads, each under the lock."""

    jobs: dict[str, Seen] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def accepted(self, id: str, seen: Seen) -> None:
        with self.lock:
            self.jobs[id] = seen
            self.counts["accepted"] += 1

    def told(self, job: Document) -> None:
        """An answer with a job's state."""
        checked(job)
        if job["status"] in FINAL:
            with self.lock:
                self.jobs[job["id"]].ends.append(job)

    def counted(self, what: str) -> None:
        with self.lock:
            self.counts[what] += 1

    def some(self, rng: random.Random, endpoint: str = "") -> tuple[str, Seen] | None:
        """One of the jobs that were accepted lately."""
        with self.lock:
            known = [*self.jobs.items()][-200:]
        known = [(id, seen) for id, seen in known if endpoint in ("", seen.endpoint)]
        return rng.choice(known) if known else None


class Client:
    """What one client does until its server is gone."""

    def __init__(self, url: str, hook: str, trace: Path, ledger: Ledger, seed: str) -> None:
        self._endpoints = {name: Endpoint(url, name) for name in (TRACE, PLAIN)}
        self._hook = hook
        self._trace = trace
        self._ledger = ledger
        self._seed = seed
        self._rng = random.Random(seed)

    def work(self, stop: threading.Event) -> None:
        """Until the server is gone. Raises AssertionError for an answer that is wrong."""
        acts = (self._run, self._runsync, self._watch, self._stream, self._cancel, self._purge)
        for number in range(1_000_000):
            if stop.wait(self._rng.expovariate(60)):
                return
            act = self._rng.choices(acts, (40, 15, 20, 15, 10, 0.3))[0]
            try:
                act(f"{self._seed}-{number}")
            except GONE:
                if stop.wait(0.2):
                    return
                raise  # nobody has killed it

    def _request(self, name: str) -> tuple[Seen, Document]:
        rng = self._rng
        seen = Seen(rng.choice((TRACE, PLAIN)), name, webhook=rng.random() < 0.3)
        given: Document = {"INPUT0": [[*range(16)]], "INPUT1": [[1] * 16]}
        if seen.endpoint == TRACE:
            chunks = rng.choice((0, 1, 3, 20))
            given = {"name": name, "trace": str(self._trace), "seconds": rng.choice(PAUSES_S), "chunks": chunks}
        request: Document = {"input": given}
        if seen.webhook:
            request["webhook"] = f"{self._hook}/{name}"
        return seen, request

    def _run(self, name: str) -> None:
        seen, request = self._request(name)
        accepted = self._endpoints[seen.endpoint].told("POST", "run", request)
        assert accepted["status"] == "IN_QUEUE", accepted
        self._ledger.accepted(accepted["id"], seen)

    def _runsync(self, name: str) -> None:
        seen, request = self._request(name)
        job = self._endpoints[seen.endpoint].told("POST", "runsync", request, wait=2000)
        self._ledger.accepted(job["id"], seen)
        self._ledger.told(job)

    def _watch(self, name: str) -> None:
        if (found := self._ledger.some(self._rng)) is not None:
            id, seen = found
            wait = self._rng.random() < 0.3
            path = f"status-sync/{id}" if wait else f"status/{id}"
            self._ledger.told(self._endpoints[seen.endpoint].told("GET", path, **({"wait": 1000} if wait else {})))

    def _stream(self, name: str) -> None:
        """Drain a job that nobody else knows of, so that what is drained comes in order."""
        chunks = 20
        given = {"name": name, "trace": str(self._trace), "seconds": 0.005, "chunks": chunks}
        seen = Seen(TRACE, name)
        endpoint = self._endpoints[TRACE]
        id = endpoint.told("POST", "run", {"input": given})["id"]
        self._ledger.accepted(id, seen)
        while True:
            answer = endpoint.told("GET", f"stream/{id}", wait=1000)
            seen.drained += [chunk["output"] for chunk in answer["stream"]]
            if answer["status"] in FINAL:
                break
        self._ledger.counted("streams read to the end")

    def _cancel(self, name: str) -> None:
        if (found := self._ledger.some(self._rng)) is not None:
            id, seen = found
            job = self._endpoints[seen.endpoint].told("POST", f"cancel/{id}")
            assert job["status"] in FINAL, job
            if job["status"] == "CANCELLED":
                self._ledger.counted("cancelled")
                with self._ledger.lock:
                    seen.cancelled = True
            self._ledger.told(job)

    def _purge(self, name: str) -> None:
        purged = self._endpoints[self._rng.choice((TRACE, PLAIN))].told("POST", "purge-queue")
        with self._ledger.lock:
            self._ledger.counts["purged"] += purged["removed"]


@dataclass(slots=True)
class Trial:
    """Kills, and what is asked of what is left. Everything lies in `folder`."""

    folder: Path
    seed: int
    store: str = ""
    ledger: Ledger = field(default_factory=Ledger)

    @property
    def options(self) -> list[str]:
        store = self.store or f"sqlite:{self.folder / 'jobs.db'}"
        return ["--job-store", store, "--webhook-allow-private", "--log-info", "false", *KEPT]

    @property
    def trace(self) -> Path:
        return self.folder / "runs"

    def run(self, kills: int) -> list[str]:
        """All kills, and then what is wrong."""
        rng = random.Random(self.seed)
        self.trace.touch()
        with Receiver(self._receive) as receiver:
            for number in range(kills):
                if rng.random() < EARLY:
                    self._kill_early(rng.uniform(*START_S))
                else:
                    self._kill(receiver, number, rng.uniform(*LIFE_S))
            with self._serving() as running:
                started_s = time.monotonic()
                problems = self._left(running, receiver)
                self.ledger.counts["seconds to the end of all jobs"] = round(time.monotonic() - started_s)
        return problems + self._orphans()

    @contextlib.contextmanager
    def _serving(self) -> Iterator[Running]:
        with penstock([SAMPLES / PLAIN, HANDLERS / TRACE], self.folder / "server.log", *self.options) as running:
            yield running

    def _kill_early(self, after_s: float) -> None:
        command = serve([SAMPLES / PLAIN, HANDLERS / TRACE], *self.options)
        process = spawn(command, self.folder / "server.log")
        assert process.stdout is not None
        with process.stdout:
            try:
                process.wait(after_s)
                raise AssertionError((self.folder / "server.log").read_text())
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.ledger.counts["kills while it starts"] += 1

    def _kill(self, receiver: Receiver, number: int, after_s: float) -> None:
        stop = threading.Event()
        with self._serving() as running, ThreadPoolExecutor(CLIENTS) as pool:
            clients = [
                Client(running.http, receiver.url, self.trace, self.ledger, f"{self.seed}.{number}.{client}")
                for client in range(CLIENTS)
            ]
            working = [pool.submit(client.work, stop) for client in clients]
            stop.wait(after_s)
            stop.set()
            running.process.kill()
            running.process.wait()
            for done in working:
                done.result()
        self.ledger.counts["kills at work"] += 1

    def _receive(self, post: Post) -> int:
        """Some first attempts are refused: which, follows from the job's name."""
        refused = random.Random(post.path).random() < REFUSED and post.headers["x-attempt"] == "1"
        return 503 if refused else 200

    # -- afterwards

    def _left(self, running: Running, receiver: Receiver) -> list[str]:
        """What is wrong once the last server has had its time."""
        endpoints = {name: Endpoint(running.http, name) for name in (TRACE, PLAIN)}
        for name, endpoint in endpoints.items():
            until(lambda: _idle(endpoint.health()), f"all jobs of {name} end", END_LIMIT_S)  # noqa: B023 - called here
        problems = []
        jobs: dict[str, Document] = {}
        for name, endpoint in endpoints.items():
            listed = _listed(endpoint)
            jobs |= listed
            counts = endpoint.health()["jobs"]
            ended = Counter(job["status"] for job in listed.values())
            if (counts["completed"], counts["failed"]) != (ended["COMPLETED"], ended["FAILED"]):
                problems.append(f"{name}: counted {counts}, there are {ended}")
        runs = self._runs()
        problems += [f"lost: {id} {seen}" for id, seen in self.ledger.jobs.items() if id not in jobs]
        problems += [f"stuck: {job}" for job in jobs.values() if job["status"] not in FINAL]
        for id, job in jobs.items():
            seen = self.ledger.jobs.get(id, Seen(""))
            problems += self._twice(job, seen, runs)
            if seen.endpoint == TRACE and job["status"] == "COMPLETED":
                problems += self._torn(endpoints[TRACE], job, seen)
        problems += self._announced(jobs, receiver)
        self.ledger.counts["jobs in the store"] = len(jobs)
        self.ledger.counts.update(Counter(f"ended {job['status']}" for job in jobs.values()))
        self.ledger.counts["ended because of two lost workers"] = sum(
            job.get("error") == "worker lost" for job in jobs.values()
        )
        self.ledger.counts["run again after a kill"] = sum("retries" in job for job in jobs.values())
        return problems

    def _runs(self) -> dict[str, list[str]]:
        """The runs of each traced job by its name, in the order they began."""
        runs: dict[str, list[str]] = defaultdict(list)
        for line in self.trace.read_text().splitlines():
            name, run, _ = line.split()
            runs[name].append(run)
        return runs

    def _twice(self, job: Document, seen: Seen, runs: dict[str, list[str]]) -> Iterator[str]:
        """Jobs with more than one end, or more runs than a job may have."""
        for told in seen.ends:
            if told != job:
                yield f"ended twice: told {told}, now {job}"
        if seen.cancelled and job["status"] != "CANCELLED":
            yield f"cancelled, now {job}"
        if job["status"] not in ("COMPLETED", "FAILED", "CANCELLED"):
            yield f"ended otherwise than it can: {job}"
        if job["status"] == "FAILED" and (job["error"] != "worker lost" or job["retries"] != 1):
            yield f"failed by itself: {job}"
        ran = runs.get(seen.name, [])
        if len(ran) > 1 + job.get("retries", 0) and job["status"] != "CANCELLED":
            yield f"ran {len(ran)} times: {job}"

    def _torn(self, endpoint: Endpoint, job: Document, seen: Seen) -> Iterator[str]:
        """Results and chunks that are not those of one run from its beginning to its end."""
        result: list[Document] = job.get("output", [])
        kept = [chunk["output"] for chunk in endpoint.told("GET", f"stream/{job['id']}", **{"from": 0})["stream"]]
        if kept != result:
            yield f"chunks {kept} of {job}"
        if len({chunk["run"] for chunk in result}) > 1 or [chunk["index"] for chunk in result] != [*range(len(result))]:
            yield f"torn: {job}"
        if any(chunk["name"] != seen.name for chunk in result):
            yield f"of another job: {job}, handed in as {seen.name}"
        by_run: dict[str, list[int]] = {}
        for chunk in seen.drained:
            by_run.setdefault(chunk["run"], []).append(chunk["index"])
        if any(indices != sorted(set(indices)) for indices in by_run.values()):
            yield f"drained twice or out of order: {seen.drained}"

    def _announced(self, jobs: dict[str, Document], receiver: Receiver) -> list[str]:
        """Webhooks that do not come, or tell something else than the job."""
        named = {seen.name: id for id, seen in self.ledger.jobs.items() if seen.webhook}

        def missing() -> set[str]:
            came = {post.path[1:] for post in receiver.posts() if self._receive(post) == 200}
            return {name for name in named if name not in came}

        problems = []
        try:
            until(lambda: not missing(), "every webhook is delivered", END_LIMIT_S)
        except AssertionError:
            problems += [f"no webhook for {jobs.get(named[name])}" for name in missing()]
        bodies: dict[str, set[bytes]] = defaultdict(set)
        for post in receiver.posts():
            bodies[post.path[1:]].add(post.body)
            if not 1 <= int(post.headers["x-attempt"]) <= 3:
                problems.append(f"attempt {post.headers['x-attempt']} for {post.path}")
        for name, different in bodies.items():
            if len(different) > 1:
                problems.append(f"webhooks of {name} differ: {different}")
            told = json.loads(next(iter(different)))
            job = jobs.get(told["id"], {})
            if {key: told.get(key) for key in job} != job:
                problems.append(f"a webhook told {told}, the job is {job}")
        self.ledger.counts["webhooks due"] = len(named)
        self.ledger.counts["webhooks posted"] = len(receiver.posts())
        return problems

    def _orphans(self) -> list[str]:
        """Handler processes that outlived their server."""
        processes = {line.split()[2] for line in self.trace.read_text().splitlines()}
        alive = [pid for pid in processes if str(HANDLERS / TRACE) in _command(pid)]
        self.ledger.counts["handler processes"] = len(processes)
        return [f"process {pid} of a handler outlived its server" for pid in alive]


def _idle(health: Document) -> bool:
    return bool(health["jobs"]["inQueue"] == health["jobs"]["inProgress"] == 0)


def _listed(endpoint: Endpoint) -> dict[str, Document]:
    """Every job of an endpoint by its id."""
    jobs: dict[str, Document] = {}
    while True:
        page: dict[str, Any] = endpoint.told("GET", "requests", offset=len(jobs), limit=1000)
        jobs |= {job["id"]: checked(job) for job in page["requests"]}
        if not page["hasMore"]:
            assert len(jobs) == page["total"], (len(jobs), page["total"])
            return jobs


def _command(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m conformance_tests.jobs.kill", description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--job-store", default="", help="an empty one; by default a SQLite file")
    options = parser.parse_args(arguments)
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(Path(folder), options.seed, options.job_store)
        problems = trial.run(options.kills)
    for problem in problems:
        print(problem)
    for what, count in sorted(trial.ledger.counts.items()):
        print(f"{what:<36}{count:>8}")
    print(f"{options.kills} kills, seed {options.seed}: {len(problems)} problems, {time.monotonic() - started_s:.0f} s")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
