"""TensorOne's dialect, told by the path alone. Protocol page jobs, section 2."""

import asyncio
import csv
import functools
import io
import logging
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from penstock.access import names
from penstock.errors import Kind, ServingError
from penstock.job_api.journal import JOBS, LINES, Journal, JournalHandler

from .fakes import EchoInstance
from .fakes_job_door import House, Say, Says, X, echo, handler, never, run, settled


def moment(text: str) -> datetime:
    made = datetime.fromisoformat(text)
    assert made.tzinfo is not None
    return made


async def refused(made: House, verb: str, path: str, body: Any = b"") -> tuple[int, str, Any]:
    """Status, code and details of an error."""
    got = await made.call(verb, path, body)
    error = got.json
    assert error.keys() == {"error", "message", "code", "details", "request_id", "timestamp"}
    assert error["code"] == got.status
    assert error["request_id"].startswith("req_")
    moment(error["timestamp"])
    return got.status, error["error"], error["details"]


def script(value: Any, say: Say) -> None:
    if value == "fail":
        say.fail(ServingError(Kind.INTERNAL, "as told"))
    elif value == "run":
        never(value, say)
    else:
        say(value)


# -- jobs


def test_runsync_answers_with_the_output_and_seconds(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        answer = await made.post("/v2/endpoints/m/runsync", X)
        assert (answer["output"], answer["status"]) == ({"Y": [1.0, 2.0]}, "completed")
        assert type(answer["executionTime"]) is float
        metadata = answer["metadata"]
        assert (metadata["model"], metadata["modelVersion"]) == ("m", "1")
        assert (await made.get(f"/v2/jobs/{metadata['jobId']}/status"))["status"] == "completed"

    run(tmp_path, test)


def test_runasync_is_accepted_with_202_and_its_status_tells_the_rest(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        request = X | {"priority": "high", "tags": {"team": "a"}, "async": True}
        got = await made.call("POST", "/v2/endpoints/m/runasync", request)
        assert (got.status, got.json) == (202, {"jobId": got.json["jobId"], "status": "queued"})
        path = f"/v2/jobs/{got.json['jobId']}/status"
        status = await made.until(path, lambda status: status["status"] == "completed")
        assert (status["progress"], status["result"]) == (100, {"Y": [1.0, 2.0]})
        assert (status["endpointId"], status["priority"], status["tags"]) == ("m", "high", {"team": "a"})
        assert moment(status["createdAt"]) <= moment(status["startedAt"]) <= moment(status["completedAt"])
        assert "logs" not in status
        full = await made.get(f"{path}?include=logs,metrics,resources")
        assert f"{got.json['jobId']}: COMPLETED after " in full["logs"][0]
        assert full["metrics"].keys() == {"delayTime", "executionTime"}
        assert full["resources"]["devices"] == ["cpu"]
        summary = await made.get(f"{path}?format=summary")
        assert summary.keys() == {"jobId", "status", "progress", "result"}

    run(tmp_path, test)


def test_runasync_that_is_not_to_be_async_waits(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        answer = await made.post("/v2/endpoints/m/runasync", X | {"async": False})
        assert answer["output"] == {"Y": [1.0, 2.0]}

    run(tmp_path, test)


def test_a_job_of_low_priority_says_so(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        got = await made.call("POST", "/v2/endpoints/m/runasync", X | {"priority": "low"})
        stored = await made.store.get(got.json["jobId"], "m", 0)
        assert stored is not None
        assert stored.request.low_priority

    run(tmp_path, test)


def test_a_failure_is_told_with_its_reason(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        status, code, details = await refused(made, "POST", "/v2/endpoints/h/runsync", {"input": "fail"})
        assert (status, code, details["reason"]) == (500, "EXECUTION_FAILED", "as told")
        job = await made.get(f"/v2/jobs/{details['jobId']}/status")
        assert (job["status"], job["error"]) == ("failed", "as told")
        assert "result" not in job

    run(tmp_path, test, {"h": handler(script)})


def test_a_job_that_ran_too_long_is_a_timeout_that_names_it(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        status, code, details = await refused(made, "POST", "/v2/endpoints/h/runsync", {"input": "run"})
        assert (status, code) == (504, "ENDPOINT_TIMEOUT")
        assert (await made.get(f"/v2/jobs/{details['jobId']}/status"))["status"] == "timed_out"

    run(tmp_path, test, {"h": handler(script)}, job_execution_timeout_secs=1)


@pytest.mark.parametrize(
    ("body", "code", "field"),
    [
        ({}, "INVALID_INPUT", "input"),
        ({"input": {"X": ["a"]}}, "INVALID_INPUT", "input.X"),
        ([], "VALIDATION_ERROR", "body"),
        (X | {"priority": "urgent"}, "VALIDATION_ERROR", "priority"),
        (X | {"tags": {"a": 1}}, "VALIDATION_ERROR", "tags"),
        (X | {"tags": []}, "VALIDATION_ERROR", "tags"),
        (X | {"async": "yes"}, "VALIDATION_ERROR", "async"),
        (X | {"callbackUrl": "x"}, "VALIDATION_ERROR", "callbackUrl"),
    ],
)
def test_a_wrong_request_is_refused_naming_its_field(tmp_path: Path, body: Any, code: str, field: str) -> None:
    async def test(made: House) -> None:
        for operation in ("runsync", "runasync"):
            status, got, details = await refused(made, "POST", f"/v2/endpoints/m/{operation}", body)
            assert (status, got, details["field"]) == (400, code, field)
            assert details["reason"]

    run(tmp_path, test)


def at(percent: float, step: str | None, status: Any) -> bool:
    return (status["progress"], status.get("currentStep")) == (percent, step)


def test_progress_is_shown_in_percent_and_steps(tmp_path: Path) -> None:
    says = Says()

    async def test(made: House) -> None:
        id = (await made.call("POST", "/v2/endpoints/h/runasync", {"input": 1})).json["jobId"]
        say = await says.first()
        path = f"/v2/jobs/{id}/status"
        for value, percent, step in (
            (40, 40, None),
            (140.5, 100, None),
            ("loading", 0, "loading"),
            ({"progress": 70, "step": "third"}, 70, "third"),
            (True, 0, None),
        ):
            say(value, final=False, partial=True)
            status = await made.until(path, functools.partial(at, percent, step))
            assert status["status"] == "running"
        say("done")
        assert (await made.until(path, lambda status: status["status"] == "completed"))["progress"] == 100

    run(tmp_path, test, {"h": handler(says.take)})


def test_many_statuses_come_at_once(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        ids = [(await made.post("/v2/endpoints/m/runsync", X))["metadata"]["jobId"] for _ in range(2)]
        answer = await made.post("/v2/jobs/status/batch", {"jobIds": [ids[1], "nope", ids[0]], "include": ["metrics"]})
        assert [job["jobId"] for job in answer["jobs"]] == [ids[1], ids[0]]
        assert "metrics" in answer["jobs"][0]
        assert answer["notFound"] == ["nope"]
        status, code, details = await refused(made, "POST", "/v2/jobs/status/batch", {"jobIds": "x"})
        assert (status, code, details["field"]) == (400, "VALIDATION_ERROR", "jobIds")

    run(tmp_path, test)


def test_cancelling(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        id = (await made.call("POST", "/v2/endpoints/h/runasync", {"input": "run"})).json["jobId"]
        assert await made.post(f"/v2/jobs/{id}/cancel") == {"jobId": id, "status": "cancelled"}
        status, code, details = await refused(made, "POST", f"/v2/jobs/{id}/cancel")
        assert (status, code) == (409, "STATE_CONFLICT")
        assert details == {"current_state": "cancelled", "required_state": "queued or running"}

    run(tmp_path, test, {"h": handler(script)})


def test_a_job_that_is_cancelled_while_its_sender_waits_is_a_conflict(tmp_path: Path) -> None:
    says = Says()

    async def test(made: House) -> None:
        waiting = asyncio.create_task(refused(made, "POST", "/v2/endpoints/h/runsync", {"input": 1}))
        await says.first()
        [job] = (await made.get("/v2/h/requests"))["requests"]
        await made.post(f"/v2/jobs/{job['id']}/cancel")
        status, code, details = await waiting
        assert (status, code, details["jobId"]) == (409, "STATE_CONFLICT", job["id"])

    run(tmp_path, test, {"h": handler(says.take)})


def test_what_is_unknown(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        for path in ("/v2/jobs/nope/status", "/v2/jobs/nope/cancel"):
            verb = "GET" if path.endswith("status") else "POST"
            assert await refused(made, verb, path) == (404, "JOB_NOT_FOUND", {"resource": "job", "id": "nope"})
        for path in ("", "/health", "/logs", "/metrics"):
            got = await made.call("GET", f"/v2/endpoints/nope{path}")
            assert (got.json["error"], "'nope'" in got.json["message"]) == ("ENDPOINT_NOT_FOUND", True)
        assert (await refused(made, "GET", "/v2/jobs"))[:2] == (404, "RESOURCE_NOT_FOUND")
        assert (await refused(made, "GET", "/v2/endpoints/m/nope"))[:2] == (404, "RESOURCE_NOT_FOUND")
        assert (await refused(made, "GET", "/v2/endpoints/m/runsync"))[:2] == (405, "METHOD_NOT_ALLOWED")

    run(tmp_path, test)


def test_refusals_of_keys_have_their_codes(tmp_path: Path) -> None:
    kinds = iter((Kind.UNAUTHENTICATED, Kind.FORBIDDEN))

    def check(authorization: str | None, scope: str) -> None:
        raise ServingError(next(kinds), "no")

    async def test(made: House) -> None:
        assert await refused(made, "GET", "/v2/endpoints/m") == (401, "UNAUTHORIZED", {})
        assert await refused(made, "GET", "/v2/endpoints/m") == (403, "FORBIDDEN", {"required_permission": "jobs"})

    run(tmp_path, test, check=check)


def test_what_is_kept_of_a_batch_is_no_job(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        batch = (await made.post("/v2/m/batch", [X]))["id"]
        unknown = (404, "JOB_NOT_FOUND", {"resource": "job", "id": batch})
        assert await refused(made, "GET", f"/v2/jobs/{batch}/status") == unknown
        assert await refused(made, "POST", f"/v2/jobs/{batch}/cancel") == unknown
        assert await made.post("/v2/jobs/status/batch", {"jobIds": [batch]}) == {"jobs": [], "notFound": [batch]}
        assert (await made.get(f"/v2/m/batch/{batch}"))["status"] == "DRAFT"

    run(tmp_path, test)


# -- endpoints


@pytest.mark.parametrize(
    ("check", "checks"),
    [
        ("basic", None),
        ("detailed", {"api": "healthy", "model": "healthy", "store": "healthy"}),
        ("deep", {"api": "healthy", "model": "healthy", "store": "healthy", "inference": "healthy"}),
    ],
)
def test_health_looks_as_deep_as_it_is_asked_to(tmp_path: Path, check: str, checks: Any) -> None:
    instance = EchoInstance()

    async def test(made: House) -> None:
        ran = len(instance.batches)
        answer = await made.get(f"/v2/endpoints/m/health?check={check}&timeout=5")
        assert answer["status"] == "healthy"
        moment(answer["lastCheck"])
        assert (len(instance.batches) > ran) is (check == "deep")
        if checks is None:
            assert answer.keys() == {"status", "lastCheck"}
        else:
            assert answer["checks"] == checks
            assert (answer["endpointId"], answer["readiness"]) == ("m", True)
            assert answer["responseTime"] >= 0
            assert answer["uptime"] >= 0
        assert (await refused(made, "GET", "/v2/endpoints/m/health?check=quick"))[2]["field"] == "check"
        assert (await refused(made, "GET", "/v2/endpoints/m/health?timeout=x"))[2]["field"] == "timeout"

    run(tmp_path, test, {"m": lambda: instance})


def test_a_deep_look_at_a_handler_asks_it_nothing(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        answer = await made.get("/v2/endpoints/h/health?check=deep")
        assert (answer["status"], answer["checks"]["inference"]) == ("healthy", "skipped")

    run(tmp_path, test, {"h": handler(echo)})


def test_a_deep_look_at_a_model_of_sequences_asks_it_nothing(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        answer = await made.get("/v2/endpoints/m/health?check=deep")
        assert (answer["status"], answer["checks"]["inference"]) == ("healthy", "skipped")

    run(tmp_path, test, configs={"m": "max_batch_size: 1 sequence_batching { }"})


def test_a_model_that_is_not_served_is_unhealthy(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        await asyncio.to_thread(made.engine.lifecycle.unload, "m")
        assert (await made.get("/v2/endpoints/m/health"))["status"] == "unhealthy"
        answer = await made.post("/v2/endpoints/health/batch", {"endpointIds": ["m", "n", "nope"], "check": "detailed"})
        states = [(one["endpointId"], one["status"]) for one in answer["endpoints"]]
        assert states == [("m", "unhealthy"), ("n", "healthy"), ("nope", "unhealthy")]
        assert answer["endpoints"][2]["error"] == "ENDPOINT_NOT_FOUND"
        assert (await made.get("/v2/endpoints/m"))["status"] == "inactive"

    run(tmp_path, test, {"m": EchoInstance, "n": EchoInstance})


def test_details(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        details = await made.get("/v2/endpoints/h")
        assert (details["id"], details["name"], details["status"]) == ("h", "h", "active")
        assert (details["url"], details["templateId"], details["gpuType"]) == ("/v2/h/runsync", "handler", "cpu")
        assert details["configuration"] == {"workerCount": 1, "maxConcurrency": 3, "timeoutSeconds": 600.0}
        moment(details["createdAt"])
        assert details["metrics"]["requestCount"] == 0

    run(tmp_path, test, {"h": handler(echo, 3)})


def test_metrics_in_three_formats(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        for _ in range(3):
            await made.post("/v2/endpoints/m/runsync", X)
        numbers = await made.get("/v2/endpoints/m/metrics?timeframe=1h")
        assert (numbers["requestCount"], numbers["errorRate"], numbers["activeWorkers"]) == (3, 0.0, 0)
        assert numbers["averageResponseTime"] > 0
        assert await made.get("/v2/endpoints/m/metrics?metrics=requestCount") == {"requestCount": 3}
        got = await made.call("GET", "/v2/endpoints/m/metrics?format=csv")
        assert got.headers[b"content-type"].startswith(b"text/csv")
        head, row = csv.reader(io.StringIO(got.body.decode()))
        assert dict(zip(head, row, strict=True))["requestCount"] == "3"
        text = (await made.call("GET", "/v2/endpoints/m/metrics?format=prometheus")).body.decode()
        assert 'tensorone_requestCount{endpoint="m"} 3\n' in text
        for query in ("format=xml", "metrics=speed"):
            assert (await made.call("GET", f"/v2/endpoints/m/metrics?{query}")).status == 400

    run(tmp_path, test)


def test_logs_are_filtered(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        done = (await made.post("/v2/h/runsync", {"input": 1}))["id"]
        failed = (await made.post("/v2/h/runsync", {"input": "fail"}))["id"]
        logging.getLogger("penstock.model.h").info("loading weights", extra={"job": done})
        logging.getLogger("penstock.model.other").info("not this one")

        async def lines(query: str = "") -> list[str]:
            logs: list[str] = (await made.get(f"/v2/endpoints/h/logs{query}"))["logs"]
            return [line.partition(" ")[2] for line in logs]

        everything = await lines()
        assert everything[0].startswith(f"INFO {done}: COMPLETED after ")
        assert everything[1].startswith(f"ERROR {failed}: FAILED after ")
        assert everything[2] == f"INFO {done}: loading weights"
        assert await lines("?level=error") == everything[1:2]
        assert await lines(f"?jobId={done}") == [everything[0], everything[2]]
        assert await lines("?search=told") == everything[1:2]
        assert await lines("?offset=1&limit=1") == everything[1:2]
        assert await lines("?startTime=2999-01-01") == []
        assert await lines("?endTime=2001-01-01T00:00:00Z") == []
        text = await made.call("GET", "/v2/endpoints/h/logs?format=text")
        assert text.body.count(b"\n") == 3
        logging.getLogger("penstock.model.h").info("asked over HTTP", extra=names("r7"))
        assert await lines("?jobId=r7") == ["INFO r7: asked over HTTP"]
        for query in ("level=loud", "stream=true", "startTime=noon", "format=xml", "limit=x"):
            assert (await made.call("GET", f"/v2/endpoints/h/logs?{query}")).status == 400

    logger = logging.getLogger("penstock.model")
    before = logger.level
    logger.setLevel(logging.INFO)
    try:
        run(tmp_path, test, {"h": handler(script)})
    finally:
        logger.setLevel(before)


def test_the_journal_keeps_the_last_lines_of_each_job() -> None:
    journal = Journal()
    journal.note("m", 0, "info", "quiet", "before")
    for number in range(LINES + 5):
        journal.note("m", number, "info", "loud", str(number))
    journal.note("m", 0, "info", "quiet", "after")
    lines = journal.lines("m", job="loud")
    assert (len(lines), str(lines[0])) == (LINES, "1970-01-01T00:00:00.005Z INFO loud: 5")
    assert [line.text for line in journal.lines("m", job="quiet")] == ["before", "after"]
    assert [line.text for line in journal.lines("m")] == ["before", *(line.text for line in lines), "after"]
    assert journal.lines("other") == []


def test_the_journal_forgets_the_job_that_came_first() -> None:
    journal = Journal()
    for number in range(JOBS + 1):
        journal.note("m", 0, "info", f"j{number}", "begun")
    journal.note("m", 0, "info", "j1", "ended")
    assert [line.job for line in journal.lines("m")] == [*(f"j{number}" for number in range(1, JOBS + 1)), "j1"]


def test_the_journal_takes_what_models_log() -> None:
    journal = Journal()
    handler = JournalHandler(journal)
    for name, level in (("penstock.model.m", logging.CRITICAL), ("penstock.model.m", 5), ("penstock.engine", 20)):
        handler.handle(logging.LogRecord(name, level, "", 0, "text %d", (level,), None))
    assert [(line.level, line.job, line.text) for line in journal.lines("m")] == [
        ("error", "", "text 50"),
        ("debug", "", "text 5"),
    ]


# -- rates


def test_rate_headers_stand_on_every_answer_where_a_rate_is_set(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        first, second, third = [await made.call("GET", "/v2/endpoints/m/health") for _ in range(3)]
        assert [got.status for got in (first, second, third)] == [200, 200, 429]
        assert [got.headers[b"x-ratelimit-remaining"] for got in (first, second, third)] == [b"1", b"0", b"0"]
        assert (first.headers[b"x-ratelimit-limit"], first.headers[b"x-ratelimit-window"]) == (b"2", b"60")
        assert int(first.headers[b"x-ratelimit-reset"]) > 1_700_000_000
        assert third.json["error"] == "RATE_LIMIT_EXCEEDED"
        assert 0 < int(third.headers[b"retry-after"]) <= 60
        assert b"x-ratelimit-limit" not in (await made.call("GET", "/v2/endpoints/m")).headers
        await settled()

    run(tmp_path, test, job_rate_limit=("health=2/60",))
