"""Servers that share a job store, each a process: one queue, whichever of them is asked."""

import json
import signal
import subprocess
import sys
import textwrap
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

LIMIT_S = 60.0  # no wait takes this long, but a lost job must not hang a test
HANDLER = """
    import time
    from pathlib import Path

    import runpod

    def handler(job):
        while not Path(job["input"]["until"]).exists():
            time.sleep(0.01)
        return job["input"]["n"]

    runpod.serverless.start({"handler": handler})
"""


@contextmanager
def serving(folder: Path, store: str) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """A server of the handler with this store: where its endpoint is, and its process."""
    command = [sys.executable, "-m", "penstock.cli", "serve", str(folder / "models"), "--announce", "json"]
    command += ["--log-info", "false", "--http-port", "0", "--allow-grpc", "false", "--allow-metrics", "false"]
    command += ["--job-store", store, "--exit-timeout-secs", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield f"{json.loads(process.stdout.readline())['http']}/v2/waits", process
        finally:
            process.kill()


def ask(url: str, document: object = None) -> Any:
    body = None if document is None else json.dumps(document).encode()
    with urllib.request.urlopen(urllib.request.Request(url, body), timeout=LIMIT_S) as answer:
        return json.load(answer)


def until(found: Callable[[], Any]) -> Any:
    """What is found, once that is true."""
    pause, end_s = threading.Event(), time.monotonic() + LIMIT_S
    while not (value := found()):
        assert time.monotonic() < end_s
        pause.wait(0.02)
    return value


@pytest.mark.parametrize("fresh", ["sqlite", "redis", "postgres"], indirect=True)
def test_two_servers_run_one_queue_and_one_that_stops_leaves_its_job_to_the_other(
    fresh: Callable[[], str], tmp_path: Path
) -> None:
    (tmp_path / "models/waits").mkdir(parents=True)
    (tmp_path / "models/waits/handler.py").write_text(textwrap.dedent(HANDLER))
    store, gate = fresh(), tmp_path / "gate"
    with ExitStack() as stack:
        here, there = (stack.enter_context(serving(tmp_path, store)) for _ in range(2))
        ids = [ask(f"{here[0]}/run", {"input": {"n": n, "until": str(gate)}})["id"] for n in range(3)]

        def jobs() -> list[Any]:
            return [ask(f"{there[0]}/status/{id}") for id in ids]

        def both_run() -> list[Any] | None:
            now = jobs()
            return now if [job["status"] for job in now] == ["IN_PROGRESS", "IN_PROGRESS", "IN_QUEUE"] else None

        running = until(both_run)[:2]
        workers = [job["workerId"] for job in running]
        assert {int(worker.split("-")[-2]) for worker in workers} == {here[1].pid, there[1].pid}

        there[1].send_signal(signal.SIGTERM)
        there[1].wait(LIMIT_S)
        mine = next(worker for worker in workers if int(worker.split("-")[-2]) == here[1].pid)
        gate.touch()
        ended = [ask(f"{here[0]}/status-sync/{id}?wait=60000") for id in ids]
        assert [(job["status"], job["output"], job["workerId"]) for job in ended] == [
            ("COMPLETED", n, mine) for n in range(3)
        ]
        assert ask(f"{here[0]}/health")["jobs"] == {
            "completed": 3, "failed": 0, "inProgress": 0, "inQueue": 0, "retried": 0,
        }  # fmt: skip
