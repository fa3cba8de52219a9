"""What remains of jobs after the server was killed, and after it was stopped."""

from pathlib import Path

import pytest

from conformance_tests.clause_table import clause
from conformance_tests.http_wire import HttpClient
from conformance_tests.jobs.client import Document, Endpoint, Receiver, until
from conformance_tests.server import HANDLERS, Running, StartServer

pytestmark = [pytest.mark.over("http"), clause("jobs.recovery")]
LONG = {"seconds": 60}
MODELS = [HANDLERS / name for name in ("job_echo", "job_slow", "job_stream")]


def start(process: StartServer, folder: Path, *options: str) -> Running:
    store = ["--job-store", f"sqlite:{folder / 'jobs.db'}"]
    return process(MODELS, *store, "--webhook-allow-private", *options)


def journal(running: Running, id: str) -> bytes:
    return HttpClient(running.http).get(f"/v2/endpoints/job_echo/logs?jobId={id}&format=text").body


def counted(endpoint: Endpoint) -> Document:
    return dict(endpoint.health()["jobs"])


def test_a_kill_loses_nothing_that_was_accepted(process: StartServer, tmp_path: Path) -> None:
    with Receiver() as receiver:
        first = start(process, tmp_path)
        echo, slow, counts = (Endpoint(first.http, name) for name in ("job_echo", "job_slow", "job_stream"))
        done = echo.runsync({"a": 1})
        streamed = counts.runsync({"count": 4})
        assert len(counts.told("GET", f"stream/{streamed['id']}")["stream"]) == 4
        running = slow.run(LONG)
        slow.running(running)
        low = slow.run({"seconds": 0, "n": 9}, policy={"lowPriority": True})
        waiting = [slow.run({"seconds": 0, "n": number}, webhook=f"{receiver.url}/{number}") for number in range(3)]
        first.process.kill()
        first.process.wait()

        second = start(process, tmp_path)
        echo, slow, counts = (Endpoint(second.http, name) for name in ("job_echo", "job_slow", "job_stream"))
        assert echo.status(done["id"]) == done
        assert counted(echo)["completed"] == 1
        assert counts.status(streamed["id"]) == streamed
        assert counts.told("GET", f"stream/{streamed['id']}") == {"status": "COMPLETED", "stream": []}
        again = slow.running(running)
        assert (again["status"], again["retries"]) == ("IN_PROGRESS", 1)
        assert counted(slow)["inQueue"] == 4
        slow.cancel(running)
        ended = [slow.ended(id) for id in (*waiting, low)]
        assert [job["output"]["n"] for job in ended] == [0, 1, 2, 9]
        assert all("retries" not in job for job in ended)
        listed = slow.told("GET", "requests")["requests"]
        assert {job["id"] for job in listed} == {running, low, *waiting}
        order = sorted(waiting, key=lambda id: receiver.wait(f"/{waiting.index(id)}")[0].at_s)
        assert order == waiting


def test_a_job_whose_server_is_killed_twice_is_given_up(process: StartServer, tmp_path: Path) -> None:
    with Receiver() as receiver:
        id = ""
        for retries in (0, 1):
            running = start(process, tmp_path)
            slow = Endpoint(running.http, "job_slow")
            id = id or slow.run(LONG, webhook=f"{receiver.url}/lost")
            assert slow.running(id).get("retries", 0) == retries
            running.process.kill()
            running.process.wait()
        slow = Endpoint(start(process, tmp_path).http, "job_slow")
        job = slow.status(id)
        assert (job["status"], job["error"], job["retries"]) == ("FAILED", "worker lost", 1)
        assert receiver.wait("/lost")[0].json()["status"] == "FAILED"
        assert slow.runsync({"seconds": 0})["status"] == "COMPLETED"


def test_a_server_takes_up_what_another_one_was_running_when_it_was_killed(
    process: StartServer, tmp_path: Path
) -> None:
    first, second = (start(process, tmp_path) for _ in range(2))
    ids = [Endpoint(first.http, "job_slow").run(LONG) for _ in range(2)]
    slow = Endpoint(second.http, "job_slow")
    workers = [slow.running(id)["workerId"] for id in ids]
    assert len({*workers}) == 2, "each of them runs one"
    first.process.kill()
    first.process.wait()
    lost, kept = ids if f"-{first.process.pid}-" in workers[0] else ids[::-1]
    slow.cancel(kept)  # or the other would have to wait for its place
    again = until(lambda: (job := slow.status(lost)).get("retries") and "workerId" in job and job, "its lease lapses")
    assert (again["status"], f"-{second.process.pid}-" in again["workerId"]) == ("IN_PROGRESS", True)
    slow.cancel(lost)


def test_a_webhook_that_is_due_is_sent_by_the_next_server(process: StartServer, tmp_path: Path) -> None:
    statuses = iter([503])
    with Receiver(lambda post: next(statuses, 200)) as receiver:
        first = start(process, tmp_path)
        echo = Endpoint(first.http, "job_echo")
        job = echo.runsync("x", webhook=f"{receiver.url}/due")
        until(lambda: b"webhook attempt 1 of 3" in journal(first, job["id"]), "the first attempt has failed")
        echo.runsync("y")  # by then it is recorded; one that is not is due again when its lease is over
        first.process.kill()
        first.process.wait()
        start(process, tmp_path)
        refused, delivered = receiver.wait("/due", 2)
        assert delivered.body == refused.body
        assert delivered.json()["id"] == job["id"]


def test_a_stop_puts_back_what_does_not_end_in_time(process: StartServer, tmp_path: Path) -> None:
    first = start(process, tmp_path, "--exit-timeout-secs", "2")
    slow = Endpoint(first.http, "job_slow")
    running, waiting = slow.run(LONG), slow.run({"seconds": 0})
    slow.running(running)
    first.stop()
    slow = Endpoint(start(process, tmp_path).http, "job_slow")
    again = slow.running(running)
    assert again["status"] == "IN_PROGRESS"
    assert "retries" not in again
    assert slow.status(waiting)["status"] == "IN_QUEUE"
    slow.cancel(running)
    assert slow.ended(waiting)["status"] == "COMPLETED"


def test_a_stop_lets_a_running_job_end(process: StartServer, tmp_path: Path) -> None:
    first = start(process, tmp_path)
    slow = Endpoint(first.http, "job_slow")
    id = slow.run({"seconds": 1.5})
    slow.running(id)
    assert first.stop() == 0
    job = Endpoint(start(process, tmp_path).http, "job_slow").status(id)
    assert (job["status"], job.get("retries")) == ("COMPLETED", None)
