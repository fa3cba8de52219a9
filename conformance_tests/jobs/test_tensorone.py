"""The second dialect: its paths, words, units and errors."""

import datetime
from typing import Any

import pytest

from conformance_tests.clause_table import clause
from conformance_tests.http_wire import Answer, HttpClient
from conformance_tests.jobs.client import Document, Endpoint, Receiver, until
from conformance_tests.server import Running

pytestmark = [pytest.mark.over("http"), clause("jobs.second_dialect")]
LONG = {"seconds": 60}


@pytest.fixture
def http(server: Running) -> HttpClient:
    return HttpClient(server.http)


def run(http: HttpClient, name: str, given: object, **fields: object) -> str:
    answer = http.post(f"/v2/endpoints/{name}/runasync", {"input": given, **fields})
    assert answer.status == 202
    assert answer.json() == {"jobId": answer.json()["jobId"], "status": "queued"}
    return str(answer.json()["jobId"])


def status(http: HttpClient, id: str, query: str = "") -> Document:
    answer = http.get(f"/v2/jobs/{id}/status{query}")
    assert answer.status == 200, answer
    return dict(answer.json())


def reach(http: HttpClient, id: str, word: str) -> Document:
    return dict(until(lambda: (job := status(http, id))["status"] == word and job, f"job {id} is {word}"))


def error(answer: Answer, status: int, code: str) -> Document:
    """The document of an error, after a look at what all of them have."""
    assert answer.status == status, answer
    found: Document = answer.json()
    assert [*found] == ["error", "message", "code", "details", "request_id", "timestamp"]
    assert (found["error"], found["code"]) == (code, status)
    assert found["request_id"].startswith("req_")
    datetime.datetime.fromisoformat(found["timestamp"])
    return found


def test_runsync_answers_with_the_output_and_seconds(http: HttpClient) -> None:
    answer = http.post("/v2/endpoints/job_async/runsync", {"input": {"seconds": 0.5}})
    assert answer.status == 200
    found = answer.json()
    assert [*found] == ["output", "executionTime", "status", "metadata"]
    assert (found["output"], found["status"]) == ({"seconds": 0.5}, "completed")
    assert 0.4 < found["executionTime"] < 30
    assert {"model", "modelVersion", "jobId", "delayTime"} <= {*found["metadata"]}
    assert status(http, found["metadata"]["jobId"])["result"] == {"seconds": 0.5}


def test_a_job_tells_its_progress_and_its_result(http: HttpClient) -> None:
    id = run(http, "job_progress", {"seconds": 1}, priority="high", tags={"team": "water"})
    during = until(lambda: (job := status(http, id)).get("currentStep") and job, "a step")
    assert (during["status"], during["currentStep"]) == ("running", "step 1/2")
    job = reach(http, id, "completed")
    assert (job["result"], job["progress"], job["endpointId"]) == ("done", 100, "job_progress")
    assert (job["priority"], job["tags"]) == ("high", {"team": "water"})
    created, started, completed = (
        datetime.datetime.fromisoformat(job[name]) for name in ("createdAt", "startedAt", "completedAt")
    )
    assert created <= started <= completed
    assert [*status(http, id, "?format=summary")] == ["jobId", "status", "progress", "result"]
    more = status(http, id, "?include=logs,metrics,resources")
    assert any("COMPLETED" in line for line in more["logs"])
    assert more["metrics"]["executionTime"] >= 1
    assert "workerId" in more["resources"]


def test_a_job_is_cancelled_once(http: HttpClient) -> None:
    id = run(http, "job_slow", LONG)
    reach(http, id, "running")
    cancelled = http.post(f"/v2/jobs/{id}/cancel")
    assert (cancelled.status, cancelled.json()) == (200, {"jobId": id, "status": "cancelled"})
    details = error(http.post(f"/v2/jobs/{id}/cancel"), 409, "STATE_CONFLICT")["details"]
    assert details["current_state"] == "cancelled"
    assert status(http, id)["status"] == "cancelled"


def test_a_failure_is_a_500_and_the_job_says_why(http: HttpClient) -> None:
    answer = http.post("/v2/endpoints/job_failing/runsync", {"input": {"how": "raise"}})
    details = error(answer, 500, "EXECUTION_FAILED")["details"]
    assert "no water" in details["reason"]
    job = status(http, details["jobId"])
    assert job["status"] == "failed"
    assert "no water" in job["error"]


@pytest.mark.parametrize("operation", ["runsync", "runasync"])
@pytest.mark.parametrize(
    ("document", "field"),
    [({}, "input"), ({"input": {"INPUT0": [[1.5] * 16], "INPUT1": [[1] * 16]}}, "input.INPUT0")],
)
def test_a_wrong_input_is_named(http: HttpClient, operation: str, document: object, field: str) -> None:
    details = error(http.post(f"/v2/endpoints/simple/{operation}", document), 400, "INVALID_INPUT")["details"]
    assert details["field"] == field
    assert details["reason"]


@pytest.mark.parametrize(
    ("fields", "field"),
    [({"callbackUrl": "nowhere"}, "callbackUrl"), ({"priority": "urgent"}, "priority"), ({"tags": {"a": 1}}, "tags")],
)
def test_other_fields_are_validated(http: HttpClient, fields: dict[str, object], field: str) -> None:
    answer = http.post("/v2/endpoints/job_echo/runasync", {"input": 1, **fields})
    assert error(answer, 400, "VALIDATION_ERROR")["details"]["field"] == field


def test_what_is_not_there(http: HttpClient) -> None:
    assert "nope" in error(http.post("/v2/endpoints/nope/runsync", {"input": 1}), 404, "ENDPOINT_NOT_FOUND")["message"]
    error(http.get("/v2/endpoints/nope/health"), 404, "ENDPOINT_NOT_FOUND")
    assert error(http.get("/v2/jobs/nope/status"), 404, "JOB_NOT_FOUND")["details"]["id"] == "nope"
    error(http.post("/v2/jobs/nope/cancel"), 404, "JOB_NOT_FOUND")
    error(http.get("/v2/endpoints/job_echo/nope"), 404, "RESOURCE_NOT_FOUND")
    error(http.get("/v2/endpoints/job_echo/runsync"), 405, "METHOD_NOT_ALLOWED")


def test_many_statuses_at_once(http: HttpClient) -> None:
    ids = [run(http, "job_echo", number) for number in range(3)]
    for id in ids:
        reach(http, id, "completed")
    found = http.post("/v2/jobs/status/batch", {"jobIds": [*ids, "nope"]}).json()
    assert [(job["jobId"], job["result"]) for job in found["jobs"]] == [*zip(ids, range(3), strict=True)]
    assert found["notFound"] == ["nope"]


def test_health_in_three_depths_and_of_many(http: HttpClient) -> None:
    basic = http.get("/v2/endpoints/simple/health").json()
    assert [*basic] == ["status", "lastCheck"]
    assert basic["status"] == "healthy"
    deep: dict[str, Any] = http.get("/v2/endpoints/simple/health?check=deep&timeout=5").json()
    assert (deep["endpointId"], deep["readiness"]) == ("simple", True)
    assert {*deep["checks"].values()} == {"healthy"}
    many = http.post("/v2/endpoints/health/batch", {"endpointIds": ["simple", "nope"]}).json()["endpoints"]
    assert [(health["endpointId"], health["status"]) for health in many] == [
        ("simple", "healthy"),
        ("nope", "unhealthy"),
    ]
    error(http.get("/v2/endpoints/simple/health?check=other"), 400, "VALIDATION_ERROR")


def test_details_logs_and_metrics(http: HttpClient) -> None:
    assert http.post("/v2/endpoints/job_echo/runsync", {"input": 1}).status == 200
    details = http.get("/v2/endpoints/job_echo").json()
    assert (details["id"], details["status"], details["url"]) == ("job_echo", "active", "/v2/job_echo/runsync")
    assert details["configuration"]["workerCount"] == 1
    assert any("COMPLETED" in line for line in http.get("/v2/endpoints/job_echo/logs?limit=1000").json()["logs"])
    metrics = http.get("/v2/endpoints/job_echo/metrics").json()
    assert [*metrics] == ["requestCount", "averageResponseTime", "errorRate", "activeWorkers"]
    assert metrics["requestCount"] > 0
    assert b'requestCount{endpoint="job_echo"}' in http.get("/v2/endpoints/job_echo/metrics?format=prometheus").body


def test_a_callback_carries_the_status(http: HttpClient, receiver: Receiver) -> None:
    id = run(http, "job_echo", {"a": 1}, callbackUrl=f"{receiver.url}/callback")
    [post] = receiver.wait("/callback")
    assert post.json() == status(http, id)
    assert post.json()["result"] == {"a": 1}


def test_a_job_is_one_in_both_dialects(http: HttpClient, server: Running) -> None:
    echo = Endpoint(server.http, "job_echo")
    id = run(http, "job_echo", {"a": 1})
    assert echo.ended(id)["output"] == {"a": 1}
    assert status(http, echo.run(2))["endpointId"] == "job_echo"
