"""What is refused, in RunPod's dialect; and which paths are whose."""

import json

import pytest

from conformance_tests.clause_table import clause
from conformance_tests.http_wire import HttpClient
from conformance_tests.jobs.client import Endpoint
from conformance_tests.jobs.conftest import Open
from conformance_tests.server import Running

pytestmark = pytest.mark.over("http")


@clause("jobs.errors")
@pytest.mark.parametrize("operation", ["run", "runsync"])
@pytest.mark.parametrize(
    ("document", "field"),
    [
        ({}, "input"),
        ({"input": None}, "input"),
        ({"Input": 1}, "input"),
        ([], "body"),
        (7, "body"),
        ({"input": 1, "webhook": "nowhere"}, "webhook"),
        ({"input": 1, "webhook": "ftp://example.com/"}, "webhook"),
        ({"input": 1, "webhook": 7}, "webhook"),
        ({"input": 1, "policy": 7}, "policy"),
        ({"input": 1, "policy": {"executionTimeout": 4999}}, "policy.executionTimeout"),
        ({"input": 1, "policy": {"executionTimeout": 604_800_001}}, "policy.executionTimeout"),
        ({"input": 1, "policy": {"executionTimeout": True}}, "policy.executionTimeout"),
        ({"input": 1, "policy": {"ttl": 9999}}, "policy.ttl"),
        ({"input": 1, "policy": {"ttl": "60000"}}, "policy.ttl"),
        ({"input": 1, "policy": {"ttl": 60_000.5}}, "policy.ttl"),
        ({"input": 1, "policy": {"ttl": -1}}, "policy.ttl"),
        ({"input": 1, "policy": {"lowPriority": 1}}, "policy.lowPriority"),
        ({"input": 1, "s3Config": "bucket"}, "s3Config"),
    ],
)
def test_a_wrong_field_is_named(endpoint: Open, operation: str, document: object, field: str) -> None:
    error = endpoint("job_echo").refused(400, "POST", operation, document)
    assert error["details"]["field"] == field
    assert field in error["error"]


@clause("jobs.errors", "jobs.run")
def test_a_policy_of_null_and_empty_ones_count_as_absent(endpoint: Open) -> None:
    echo = endpoint("job_echo")
    for policy in (None, {}, {"ttl": None, "lowPriority": None}):
        assert echo.ended(echo.run(1, policy=policy))["output"] == 1


@clause("jobs.errors")
@pytest.mark.parametrize("text", ["", "{", '{"input": NaN}', '{"input": 1} 2', "\xff"])
def test_what_is_no_json_is_refused(endpoint: Open, text: str) -> None:
    answer = endpoint("job_echo").post_text("run", text, "application/json")
    assert answer.status == 400
    assert {"id", "status"}.isdisjoint(answer.json())


@clause("jobs.errors")
def test_a_body_over_the_limit_is_413(endpoint: Open) -> None:
    echo = endpoint("job_echo")
    echo.refused(413, "POST", "run", {"input": "w" * (10 << 20)})
    assert len(echo.runsync("w" * (10 << 20))["output"]) == 10 << 20
    echo.refused(413, "POST", "runsync", {"input": "w" * (20 << 20)})


@clause("jobs.errors")
@pytest.mark.parametrize(
    ("verb", "path"),
    [
        ("GET", "status/nope"), ("GET", "status-sync/nope"), ("GET", "stream/nope"), ("POST", "cancel/nope"),
        ("POST", "retry/nope"), ("GET", "nope"), ("GET", "status"), ("POST", "run/more"), ("GET", "batch/nope"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_404(endpoint: Open, verb: str, path: str) -> None:
    endpoint("job_echo").refused(404, verb, path)


@clause("jobs.errors")
def test_a_job_belongs_to_its_endpoint(endpoint: Open) -> None:
    id = endpoint("job_echo").runsync(1)["id"]
    for verb, path in (("GET", "status"), ("GET", "stream"), ("POST", "cancel"), ("POST", "retry")):
        endpoint("job_async").refused(404, verb, f"{path}/{id}")


@clause("jobs.errors")
@pytest.mark.parametrize(
    ("verb", "path"), [("GET", "run"), ("DELETE", "status/x"), ("GET", "cancel/x"), ("POST", "health")]
)
def test_a_wrong_method_is_405(endpoint: Open, verb: str, path: str) -> None:
    endpoint("job_echo").refused(405, verb, path)


@clause("jobs.errors", "jobs.inputs")
@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({}, "input"),
        ({"INPUT0": [[1, 2], [3]], "INPUT1": [[1] * 16]}, "input.INPUT0"),
        ({"INPUT0": [[1.5] * 16], "INPUT1": [[1] * 16]}, "input.INPUT0"),
        ({"INPUT0": [[True] * 16], "INPUT1": [[1] * 16]}, "input.INPUT0"),
        ({"INPUT0": [[1] * 16], "INPUT1": [["1"] * 16]}, "input.INPUT1"),
        ({"INPUT0": [[1] * 16], "INPUT1": [[1] * 16], "INPUT2": 1}, "input.INPUT2"),
        ([1], "input"),
    ],
)
def test_an_input_that_the_model_cannot_take_makes_no_job(endpoint: Open, given: object, field: str) -> None:
    simple = endpoint("simple")
    before = simple.told("GET", "requests")["total"]
    error = simple.refused(400, "POST", "run", {"input": given})
    assert (error["code"], error["details"]["field"]) == ("INVALID_INPUT", field)
    assert error["error"].startswith("INVALID_INPUT")
    assert simple.told("GET", "requests")["total"] == before


@clause("jobs.coexistence")
def test_paths_of_models_and_of_jobs_do_not_hide_each_other(server: Running) -> None:
    http = HttpClient(server.http)
    for path in ("/v2", "/v2/", "/v2/health/live", "/v2/health/ready", "/v2/models/simple", "/v2/models/job_echo"):
        assert http.get(path).status == 200, path
    assert http.get("/v2/health/health").status == 404
    assert http.get("/v2/simple/ready").status == 404
    before = Endpoint(server.http, "simple").told("GET", "requests")["total"]
    assert http.post("/v2/models/run", {"input": 1}).status in (404, 405)
    assert http.post("/v2/models/simple/run", {"input": 1}).status in (404, 405)
    assert Endpoint(server.http, "simple").told("GET", "requests")["total"] == before


@clause("jobs.coexistence")
@pytest.mark.parametrize(
    "name", ["health", "repository", "trace", "logging", "systemsharedmemory", "endpoints", "jobs"]
)
def test_a_reserved_word_is_no_endpoint(server: Running, name: str) -> None:
    assert HttpClient(server.http).post(f"/v2/{name}/run", {"input": 1}).status in (404, 405)


@clause("jobs.coexistence", "jobs.handlers")
def test_a_handler_is_a_model_too(server: Running) -> None:
    tensor = {"name": "input", "datatype": "BYTES", "shape": [1], "data": ['{"a": 1}']}
    answer = HttpClient(server.http).post("/v2/models/job_echo/infer", {"inputs": [tensor]})
    assert answer.status == 200
    assert json.loads(answer.json()["outputs"][0]["data"][0]) == {"a": 1}


@clause("jobs.authentication")
@pytest.mark.parametrize("form", ["Bearer {}", "bearer {}", "{}"])
def test_a_key_opens_the_jobs(keyed: tuple[Running, str], form: str) -> None:
    running, key = keyed
    echo = Endpoint(running.http, "job_echo", {"Authorization": form.format(key)})
    assert echo.runsync("a")["output"] == "a"
    assert echo.health()["jobs"]["failed"] == 0


@clause("jobs.authentication")
@pytest.mark.parametrize("headers", [{}, {"Authorization": ""}, {"Authorization": "Bearer wrong"}])
@pytest.mark.parametrize("name", ["job_echo", "nope"])
@pytest.mark.parametrize("path", ["run", "health", "status/x", "nope"])
def test_without_a_key_no_name_is_told(
    keyed: tuple[Running, str], headers: dict[str, str], name: str, path: str
) -> None:
    endpoint = Endpoint(keyed[0].http, name, headers)
    assert "nope" not in endpoint.refused(401, "GET", path)["error"]
    assert HttpClient(keyed[0].http).get("/v2/health/ready").status == 200


@clause("jobs.errors")
def test_limits_that_the_server_was_given_are_429(limited: Running) -> None:
    slow, echo = Endpoint(limited.http, "job_slow"), Endpoint(limited.http, "job_echo")
    blocker = slow.run({"seconds": 60})
    slow.running(blocker)
    slow.run({"seconds": 60}, policy={"executionTimeout": 1})  # clamped, as the server was told
    assert "1 jobs wait" in slow.refused(429, "POST", "run", {"input": {"seconds": 60}})["error"]
    slow.told("POST", "purge-queue")
    slow.cancel(blocker)
    echo.health()
    echo.health()
    answer = echo.ask("GET", "health")
    assert answer.status == 429
    assert int(answer.headers["retry-after"]) > 0
