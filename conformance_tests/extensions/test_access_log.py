"""The access log, read as a program would: one JSON object per line, found by the id in an answer."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conformance_tests.carriers import infer_message, infer_path, simple
from conformance_tests.clause_table import clause
from conformance_tests.grpc_wire import GrpcClient
from conformance_tests.http_wire import HttpClient
from conformance_tests.jobs.client import Endpoint, Receiver
from conformance_tests.server import HANDLERS, SAMPLES, Running, StartServer, penstock
from conformance_tests.tensors import pack

LIMIT_S = 20.0
TENSOR = {"datatype": "INT32", "shape": [1, 16], "data": list(range(16))}
SIMPLE = {"inputs": [{"name": name, **TENSOR} for name in ("INPUT0", "INPUT1")]}


def found(log: Path, **facts: Any) -> dict[str, Any]:
    """The one line of the access log with these facts, once it is there."""
    limit_s = time.monotonic() + LIMIT_S
    while True:
        entries = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
        lines: list[dict[str, Any]] = [entry for entry in entries if entry["logger"] == "access"]
        if fitting := [line for line in lines if facts.items() <= line.items()]:
            assert len(fitting) == 1, fitting
            return fitting[0]
        assert time.monotonic() < limit_s, f"no line has {facts}: {lines}"


@pytest.fixture(scope="module")
def logging_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    if request.config.getoption("--url"):
        pytest.skip("only of a server started here")
    log = tmp_path_factory.mktemp("log") / "server.log"
    options = ("--access-log", "--log-format", "json", *request.config.getoption("--serve"))
    with penstock([SAMPLES, HANDLERS / "job_echo"], log, *options) as running:
        yield running


@clause("access_log.lines", "access_log.request_id")
@pytest.mark.over("http")
def test_an_inference_over_http_is_found_by_the_id_in_its_answer(logging_server: Running) -> None:
    client = HttpClient(logging_server.http)
    for headers in ({}, {"X-Request-Id": "mine"}):
        answer = client.post(infer_path("simple"), SIMPLE, **headers)
        id = answer.headers["x-request-id"]
        assert answer.json()["id"] == id
        line = found(logging_server.log, request_id=id)
        assert (line["door"], line["method"], line["path"]) == ("http", "POST", "/v2/models/simple/infer")
        assert (line["model"], line["status"], line["response_bytes"]) == ("simple", 200, len(answer.body))
        assert line["request_bytes"] > 0
        assert line["duration_ms"] > 0
    assert id == "mine"


@clause("access_log.lines")
@pytest.mark.over("http")
def test_what_is_refused_over_http_has_a_line_too(logging_server: Running) -> None:
    client = HttpClient(logging_server.http)
    for path, status in (("/v2/models/nope/infer", 404), ("/v2/nowhere/at/all", 404), ("/v2/models/nope", 404)):
        answer = client.post(path, {}) if path.endswith("infer") else client.get(path)
        line = found(logging_server.log, request_id=answer.headers["x-request-id"])
        assert (line["path"], line["status"]) == (path, status)


@clause("access_log.lines", "access_log.request_id")
@pytest.mark.over("grpc")
def test_an_inference_over_grpc_is_found_by_the_id_in_its_answer(logging_server: Running) -> None:
    with contextlib.closing(GrpcClient(logging_server.grpc)) as client:
        call = simple()
        message = infer_message(call)
        message.raw_input_contents.extend(pack(entry.datatype, entry.array) for entry in call.inputs)
        given = client.call("ModelInfer", message)
        known = client.call("ModelInfer", message, metadata=[("x-request-id", "yours")])
        assert known.id == "yours"
        for answer in (given, known):
            line = found(logging_server.log, request_id=answer.id, door="grpc")
            assert (line["method"], line["model"], line["status"]) == ("ModelInfer", "simple", "OK")
            assert (line["request_bytes"], line["response_bytes"]) == (message.ByteSize(), answer.ByteSize())


@clause("access_log.lines", "access_log.jobs")
@pytest.mark.over("process")
def test_a_job_has_a_line_when_it_has_run_and_the_id_of_its_request_leads_there(logging_server: Running) -> None:
    bare, named = HttpClient(logging_server.http), {"X-Request-Id": "order-17"}
    for headers in ({}, named):
        answer = bare.post("/v2/job_echo/run", {"input": {"text": "x"}}, **headers)
        id, request_id = answer.json()["id"], answer.headers["x-request-id"]
        Endpoint(logging_server.http, "job_echo").ended(id)
        line = found(logging_server.log, door="job", job=id)
        assert (line["method"], line["model"], line["status"]) == ("run", "job_echo", "COMPLETED")
        assert line["response_bytes"] == len('{"text": "x"}')
        assert line["request_id"] == request_id
        asked = found(logging_server.log, door="http", request_id=request_id)
        assert (asked["path"], asked["status"]) == ("/v2/job_echo/run", 200)
    assert request_id == "order-17"
    seen = Endpoint(logging_server.http, "job_echo", named).runsync({"show": "job"})
    assert seen["output"] == {"id": seen["id"], "input": {"show": "job"}, "requestId": "order-17"}
    assert found(logging_server.log, door="job", job=seen["id"])["request_id"] == "order-17"


@clause("access_log.jobs")
@pytest.mark.over("process")
def test_a_job_is_found_by_its_request_although_the_server_was_killed_meanwhile(
    process: StartServer, tmp_path: Path
) -> None:
    options = ("--job-store", f"sqlite:{tmp_path / 'jobs.db'}", "--webhook-allow-private", "--access-log")
    repositories = [HANDLERS / "job_slow", SAMPLES / "iris"]
    with Receiver() as receiver:
        first = process(repositories, *options, "--log-format", "json")
        slow = Endpoint(first.http, "job_slow", {"X-Request-Id": "order-18"})
        iris = Endpoint(first.http, "iris", {"X-Request-Id": "order-19"}).runsync([5.1, 3.5, 1.4, 0.2])
        assert found(first.log, door="job", job=iris["id"])["request_id"] == "order-19"
        runs, waits = slow.run({"seconds": 2}, webhook=f"{receiver.url}/told"), slow.run({"seconds": 0})
        slow.running(runs)
        first.process.kill()
        first.process.wait()

        second = process(repositories, *options, "--log-format", "default", "--log-verbose", "1")
        slow = Endpoint(second.http, "job_slow")
        assert slow.ended(runs)["retries"] == 1
        slow.ended(waits)
        assert receiver.wait("/told")[0].headers["x-request-id"] == "order-18"
    log = second.log.read_text().splitlines()
    for id, attempt in ((runs, 2), (waits, 1)):
        ends = f"job_api.worker] job begins, attempt {attempt} [job={id} id=order-18]"
        assert [line for line in log if line.endswith(ends)]
        facts = f" model=job_slow version=- job={id} id=order-18 in="
        assert [line for line in log if " access] job run - COMPLETED " in line and facts in line]


@clause("access_log.off")
@pytest.mark.over("process")
def test_by_default_nothing_is_logged_of_a_request(process: StartServer) -> None:
    running = process([SAMPLES / "simple"])
    answer = HttpClient(running.http).post(infer_path("simple"), SIMPLE)
    assert (answer.status, "x-request-id" in answer.headers) == (200, False)
    running.stop()
    assert " access] " not in running.log.read_text()
