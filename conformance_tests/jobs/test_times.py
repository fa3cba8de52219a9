"""Execution timeouts, times to live, and webhooks with their attempts: all that takes seconds, begun together."""

import hashlib
import hmac
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import pytest

from conformance_tests.clause_table import clause
from conformance_tests.http_wire import HttpClient
from conformance_tests.jobs.client import FINAL, Endpoint, Receiver, until
from conformance_tests.jobs.conftest import Open
from conformance_tests.server import HANDLERS, SAMPLES, Running, penstock

pytestmark = pytest.mark.over("http")
LONG = {"seconds": 60}


@dataclass(frozen=True, slots=True)
class Begun:
    """Jobs whose fate takes its time."""

    never: str  # waits behind the others until its time to live is over
    times_out: str  # its execution takes too long
    expires: str  # its time to live is over while it runs
    refused: str  # its webhook is refused each time
    moved: str  # its webhook is answered with a redirect


@pytest.fixture(scope="module")
def begun(server: Running, receiver: Receiver) -> Begun:
    slow, echo = Endpoint(server.http, "job_slow"), Endpoint(server.http, "job_echo")
    refused = echo.run("x", webhook=f"{receiver.url}/503/refused")
    moved = echo.run("x", webhook=f"{receiver.url}/307/moved")
    blocker = slow.run(LONG)
    slow.running(blocker)
    never = slow.run(LONG, policy={"ttl": 10_000, "lowPriority": True}, webhook=f"{receiver.url}/never")
    times_out = slow.run(LONG, policy={"executionTimeout": 5000}, webhook=f"{receiver.url}/times_out")
    expires = slow.run(LONG, policy={"ttl": 10_000}, webhook=f"{receiver.url}/expires")
    slow.cancel(blocker)
    return Begun(never, times_out, expires, refused, moved)


@clause("jobs.timeouts", "jobs.retry")
def test_an_execution_timeout_ends_a_job_that_nothing_interrupts(
    begun: Begun, endpoint: Open, receiver: Receiver
) -> None:
    slow = endpoint("job_slow")
    job = slow.ended(begun.times_out)
    assert job["status"] == "TIMED_OUT"
    assert job["error"] == "execution exceeded 5000 ms"
    assert 5000 <= job["executionTime"] < 20_000
    assert receiver.wait("/times_out")[0].json()["status"] == "TIMED_OUT"
    assert slow.told("POST", f"retry/{begun.times_out}")["status"] == "IN_QUEUE"
    assert slow.cancel(begun.times_out)["status"] == "CANCELLED"


@clause("jobs.timeouts")
def test_a_time_to_live_ends_a_running_job_and_forgets_it(begun: Begun, endpoint: Open, receiver: Receiver) -> None:
    told = receiver.wait("/expires")[0].json()
    assert (told["status"], told["error"]) == ("TIMED_OUT", "ttl of 10000 ms expired")
    assert "workerId" in told
    endpoint("job_slow").refused(404, "GET", f"status/{begun.expires}")


@clause("jobs.timeouts")
def test_a_job_whose_time_is_over_never_starts(begun: Begun, endpoint: Open, receiver: Receiver) -> None:
    told = receiver.wait("/never")[0].json()
    assert (told["status"], told["error"]) == ("TIMED_OUT", "ttl of 10000 ms expired")
    assert "workerId" not in told
    slow = endpoint("job_slow")
    slow.refused(404, "GET", f"status/{begun.never}")
    assert slow.runsync({"seconds": 0})["status"] == "COMPLETED"


@clause("jobs.timeouts")
def test_an_async_job_is_cancelled_by_its_timeout_and_its_place_is_free(endpoint: Open) -> None:
    waits = endpoint("job_async")
    ids = [waits.run(LONG, policy={"executionTimeout": 5000}) for _ in range(4)]
    assert {waits.ended(id)["status"] for id in ids} == {"TIMED_OUT"}
    assert waits.runsync({})["status"] == "COMPLETED"


@clause("jobs.webhook")
def test_a_webhook_carries_the_status_and_what_was_asked(endpoint: Open, receiver: Receiver) -> None:
    echo = endpoint("job_echo")
    url = f"{receiver.url}/carries?a=b%20c"
    storage = {"accessId": "a", "accessSecret": "secret", "bucketName": "b", "endpointUrl": "http://s3"}
    id = echo.run({"a": "wässer"}, webhook=url, s3Config=storage)
    [post] = receiver.wait("/carries?a=b%20c")
    assert post.headers["content-type"] == "application/json"
    assert post.json() == {**echo.ended(id), "input": {"a": "wässer"}, "webhook": url}
    assert b"secret" not in post.body
    assert (post.headers["x-job-id"], post.headers["x-attempt"]) == (id, "1")


@clause("jobs.webhook")
def test_every_end_is_posted(endpoint: Open, receiver: Receiver) -> None:
    failing, slow = endpoint("job_failing"), endpoint("job_slow")
    failed = failing.runsync({"how": "raise"}, webhook=f"{receiver.url}/failed")
    running = slow.run(LONG, webhook=f"{receiver.url}/cancelled")
    purged = slow.run(LONG, webhook=f"{receiver.url}/purged")
    slow.running(running)
    slow.told("POST", "purge-queue")
    slow.cancel(running)
    for name, id, state in (
        ("/failed", failed["id"], "FAILED"), ("/cancelled", running, "CANCELLED"), ("/purged", purged, "CANCELLED"),
    ):  # fmt: skip
        [post] = receiver.wait(name)
        assert (post.json()["id"], post.json()["status"]) == (id, state)
    failing.told("POST", f"retry/{failed['id']}")
    first, again = receiver.wait("/failed", 2)
    assert again.json()["id"] == first.json()["id"]


@clause("jobs.webhook")
def test_three_attempts_with_the_same_bytes_ten_seconds_apart_and_no_redirect(
    begun: Begun, server: Running, receiver: Receiver
) -> None:
    for path in ("/503/refused", "/307/moved"):
        posts = receiver.wait(path, 3)
        assert [post.headers["x-attempt"] for post in posts] == ["1", "2", "3"]
        assert len({post.body for post in posts}) == 1
        apart_s = [later.at_s - earlier.at_s for earlier, later in itertools.pairwise(posts)]
        assert all(9.5 <= seconds < 20 for seconds in apart_s), apart_s
    for id in (begun.refused, begun.moved):
        until(partial(given_up, server, id), "it is recorded")
    assert receiver.posts("/elsewhere") == []


def given_up(server: Running, id: str) -> bool:
    """Whether the server tells of a job that the last attempt at its webhook failed."""
    told = HttpClient(server.http).get(f"/v2/endpoints/job_echo/logs?jobId={id}&format=text").body
    return b"webhook attempt 3 of 3" in told


@pytest.fixture(scope="module")
def strict(server: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Posts to public addresses only."""
    with penstock([HANDLERS / "job_echo"], tmp_path_factory.mktemp("strict") / "server.log") as running:
        yield running


@clause("jobs.webhook")
@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "10.0.0.1", "169.254.169.254", "[::1]", "[::ffff:10.0.0.1]"]
)
def test_private_addresses_are_posted_to_by_option_only(strict: Running, host: str) -> None:
    echo = Endpoint(strict.http, "job_echo")
    error = echo.refused(400, "POST", "run", {"input": 1, "webhook": f"http://{host}:1/"})
    assert error["details"]["field"] == "webhook"
    assert "--webhook-allow-private" in error["error"]


@clause("jobs.webhook")
def test_a_secret_signs_the_body(server: Running, receiver: Receiver, tmp_path_factory: pytest.TempPathFactory) -> None:
    options = ["--webhook-secret", "s3cret", "--webhook-allow-private"]
    with penstock([SAMPLES / "simple"], tmp_path_factory.mktemp("signed") / "server.log", *options) as running:
        given = {"INPUT0": [[0] * 16], "INPUT1": [[1] * 16]}
        job = Endpoint(running.http, "simple").runsync(given, webhook=f"{receiver.url}/signed")
        assert job["status"] in FINAL
        [post] = receiver.wait("/signed")
    digest = hmac.new(b"s3cret", post.body, hashlib.sha256).hexdigest()
    assert post.headers["x-penstock-signature"] == f"sha256={digest}"
