"""The operations of RunPod's dialect, each against a server that runs handler files."""

import pytest

from conformance_tests.clause_table import clause
from conformance_tests.http_wire import HttpClient
from conformance_tests.jobs.client import Endpoint, until
from conformance_tests.jobs.conftest import Open
from conformance_tests.server import Running

pytestmark = pytest.mark.over("http")
LONG = {"seconds": 60}  # a job that ends only because somebody ends it


@clause("jobs.run", "jobs.status")
def test_a_job_is_accepted_and_ends_with_the_handlers_output(endpoint: Open) -> None:
    echo = endpoint("job_echo")
    id = echo.run({"text": "wässer"})
    job = echo.ended(id)
    assert job["status"] == "COMPLETED"
    assert job["output"] == {"text": "wässer"}
    assert echo.status(id) == job
    assert checked_by_post(echo, id) == job


def checked_by_post(endpoint: Endpoint, id: str) -> object:
    """Older documents and the Go client ask with POST, with a body or without."""
    assert endpoint.told("POST", f"status/{id}", {}) == endpoint.told("POST", f"status-sync/{id}")
    return endpoint.told("POST", f"status/{id}")


@clause("jobs.run")
def test_ids_are_words_and_those_of_waiting_senders_say_so(endpoint: Open) -> None:
    echo = endpoint("job_echo")
    alphabet = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")
    queued, waited = echo.run(1), echo.runsync(1)["id"]
    assert waited.startswith("sync-")
    assert {*queued, *waited} <= alphabet
    assert queued != waited


@clause("jobs.run")
@pytest.mark.parametrize("text", ['{"input": 1}', ' {"input": 1, "else": {"x": []}, "webhookV2": "y"}\n'])
def test_a_body_is_json_whatever_its_type_says(endpoint: Open, text: str) -> None:
    echo = endpoint("job_echo")
    answer = echo.post_text("run?unknown=1", text, "application/x-www-form-urlencoded")
    assert answer.status == 200
    assert echo.ended(answer.json()["id"])["output"] == 1


@clause("jobs.run")
def test_a_slash_too_many_is_tolerated(endpoint: Open) -> None:
    echo = endpoint("/job_echo")
    assert echo.runsync("x")["output"] == "x"


@clause("jobs.runsync", "jobs.handlers")
@pytest.mark.parametrize("value", [0, False, "", [], "text", {"a": [1, None, 2.5]}, [1, 2]])
def test_runsync_answers_with_what_the_handler_returned(endpoint: Open, value: object) -> None:
    job = endpoint("job_echo").runsync(value)
    assert (job["status"], job["output"]) == ("COMPLETED", value)


@clause("jobs.runsync", "jobs.handlers")
def test_an_empty_input_is_valid_and_an_empty_output_is_not_shown(endpoint: Open) -> None:
    job = endpoint("job_echo").runsync({})
    assert job["status"] == "COMPLETED"
    assert "output" not in job


@clause("jobs.runsync", "jobs.status_sync")
def test_a_wait_that_runs_out_answers_200_and_the_job_goes_on(endpoint: Open) -> None:
    waits = endpoint("job_async")
    job = waits.runsync({"seconds": 2.5}, wait_ms=1)  # clamped to 1000
    assert job["status"] == "IN_PROGRESS"
    assert "output" not in job
    ended = waits.ended(job["id"])
    assert ended["output"] == {"seconds": 2.5}
    assert ended["executionTime"] >= 2500


@clause("jobs.runsync", "jobs.status_sync")
@pytest.mark.parametrize("wait", ["x", "1.5"])
def test_a_wait_that_is_no_number_is_refused(endpoint: Open, wait: str) -> None:
    echo = endpoint("job_echo")
    assert "wait" in echo.refused(400, "POST", "runsync", {"input": 1}, wait=wait)["error"]
    id = echo.run(1)
    assert "wait" in echo.refused(400, "GET", f"status-sync/{id}", wait=wait)["error"]


@clause("jobs.status")
def test_a_job_shows_its_newest_progress_until_it_has_ended(endpoint: Open) -> None:
    steps = endpoint("job_progress")
    id = steps.run({"seconds": 1})
    seen = until(lambda: (job := steps.status(id)).get("output") and job, "progress")
    assert (seen["status"], seen["output"]) == ("IN_PROGRESS", "step 1/2")
    job = steps.ended(id)
    assert (job["status"], job["output"]) == ("COMPLETED", "done")
    assert steps.status(id) == job  # the report that comes with the end changes nothing


@clause("jobs.handlers", "jobs.status")
@pytest.mark.parametrize(
    ("given", "text"), [({"how": "raise"}, "no water"), ({"how": "return"}, "no pressure"), ({"how": "die"}, "")]
)
def test_a_job_that_fails_is_answered_with_200_and_its_error(endpoint: Open, given: object, text: str) -> None:
    failing = endpoint("job_failing")
    job = failing.runsync(given)
    assert job["status"] == "FAILED"
    assert text in job["error"]
    assert failing.runsync({})["output"] == {"well": True}  # the worker is there again


@clause("jobs.handlers")
def test_the_handler_is_given_the_rest_of_the_request_and_nobody_else(endpoint: Open) -> None:
    echo = endpoint("job_echo")
    storage = {"accessId": "a", "accessSecret": "secret", "bucketName": "b", "endpointUrl": "http://s3"}
    job = echo.runsync({"show": "job"}, s3Config=storage, policy={"ttl": 60_000})
    given = job["output"]
    assert given == {"id": job["id"], "input": {"show": "job"}, "s3Config": storage, "policy": {"ttl": 60_000}}
    assert "secret" not in str(echo.ended(echo.run({}, s3Config=storage)))


@clause("jobs.handlers")
def test_a_result_over_the_limit_fails_with_its_size(endpoint: Open) -> None:
    failing = endpoint("job_failing")
    job = failing.ended(failing.run({"how": "large", "bytes": 11 << 20}))
    assert job["status"] == "FAILED"
    assert str(10 << 20) in job["error"]
    assert "output" not in job


@clause("jobs.handlers")
def test_as_many_jobs_run_at_once_as_the_handler_wants(endpoint: Open) -> None:
    waits = endpoint("job_async")
    ids = [waits.run(LONG) for _ in range(5)]
    until(lambda: waits.health()["jobs"]["inProgress"] == 4, "four jobs run")
    assert waits.health()["jobs"]["inQueue"] == 1
    for id in ids:
        assert waits.cancel(id)["status"] == "CANCELLED"


@clause("jobs.stream")
def test_each_chunk_is_delivered_once_and_the_end_carries_the_rest(endpoint: Open) -> None:
    counts = endpoint("job_stream")
    id = counts.run({"count": 30, "seconds": 0.02})
    got: list[object] = []
    answers = 0
    while True:
        answer = counts.told("GET", f"stream/{id}")
        assert [*answer] == ["status", "stream"]
        got += [chunk["output"] for chunk in answer["stream"]]
        answers += 1
        if answer["status"] == "COMPLETED":
            break
        assert answer["stream"], "an answer came back early and empty"
    assert got == [*range(30)]
    assert answers > 1
    assert counts.told("GET", f"stream/{id}") == {"status": "COMPLETED", "stream": []}
    assert counts.status(id)["output"] == [*range(30)]
    again = counts.told("GET", f"stream/{id}", **{"from": 27})
    assert again == {"status": "COMPLETED", "stream": [{"output": number} for number in (27, 28, 29)]}


@clause("jobs.stream")
def test_chunks_are_kept_until_somebody_asks(endpoint: Open) -> None:
    counts = endpoint("job_stream")
    id = counts.runsync({"count": 3})["id"]
    assert counts.told("POST", f"stream/{id}") == {
        "status": "COMPLETED",
        "stream": [{"output": number} for number in range(3)],
    }


@clause("jobs.stream")
def test_an_empty_stream_is_held_and_one_of_no_generator_is_empty(endpoint: Open) -> None:
    waits = endpoint("job_async")
    id = waits.run({"seconds": 1})
    assert waits.told("GET", f"stream/{id}", wait=20_000) == {"status": "COMPLETED", "stream": []}
    long = waits.run(LONG)
    waits.running(long)
    assert waits.told("GET", f"stream/{long}", wait=0) == {"status": "IN_PROGRESS", "stream": []}
    waits.cancel(long)
    assert waits.told("GET", f"stream/{long}") == {"status": "CANCELLED", "stream": []}


@clause("jobs.stream")
def test_what_a_generator_yielded_before_it_failed_remains(endpoint: Open) -> None:
    counts = endpoint("job_stream")
    job = counts.runsync({"count": 5, "fail_at": 2})
    assert job["status"] == "FAILED"
    assert "cannot count to 2" in job["error"]
    assert counts.told("GET", f"stream/{job['id']}")["stream"] == [{"output": 0}, {"output": 1}]


@clause("jobs.cancel")
def test_a_running_job_that_nothing_interrupts_is_stopped_and_its_place_is_free(endpoint: Open) -> None:
    slow = endpoint("job_slow")
    id = slow.run(LONG)
    slow.running(id)
    job = slow.cancel(id)
    assert job["status"] == "CANCELLED"
    assert slow.status(id) == job == slow.cancel(id)
    assert slow.runsync({"seconds": 0})["status"] == "COMPLETED"


@clause("jobs.cancel", "jobs.status")
def test_a_waiting_job_is_removed(endpoint: Open) -> None:
    slow = endpoint("job_slow")
    running, waiting = slow.run(LONG), slow.run(LONG)
    slow.running(running)
    assert slow.status(waiting) == {"id": waiting, "status": "IN_QUEUE"}
    assert slow.cancel(waiting) == {"id": waiting, "status": "CANCELLED"}
    assert slow.health()["jobs"]["inQueue"] == 0
    slow.cancel(running)


@clause("jobs.cancel")
def test_an_ended_job_stays_as_it_ended(endpoint: Open) -> None:
    echo = endpoint("job_echo")
    job = echo.runsync(7)
    assert echo.cancel(job["id"]) == job


@clause("jobs.cancel", "jobs.status_sync", "jobs.stream")
def test_a_cancellation_wakes_who_waits(endpoint: Open) -> None:
    slow = endpoint("job_slow")
    id = slow.run(LONG)
    slow.running(id)
    with (
        slow.begun("GET", f"status-sync/{id}?wait=60000") as waiting,
        slow.begun("GET", f"stream/{id}?wait=60000") as s,
    ):
        assert slow.cancel(id)["status"] == "CANCELLED"
        assert waiting.receive().json()["status"] == "CANCELLED"
        assert s.receive().json() == {"status": "CANCELLED", "stream": []}


@clause("jobs.retry")
def test_a_failed_job_runs_anew_under_its_id(endpoint: Open) -> None:
    failing = endpoint("job_failing")
    job = failing.runsync({"how": "raise"})
    before = failing.health()["jobs"]
    assert failing.told("POST", f"retry/{job['id']}") == {"id": job["id"], "status": "IN_QUEUE"}
    again = failing.ended(job["id"])
    assert again["status"] == "FAILED"
    after = failing.health()["jobs"]
    assert {name: after[name] - before[name] for name in after} == {
        "completed": 0, "failed": 1, "inProgress": 0, "inQueue": 0, "retried": 1,
    }  # fmt: skip


@clause("jobs.retry")
@pytest.mark.parametrize("given", ["COMPLETED", "CANCELLED", "IN_PROGRESS"])
def test_only_a_failed_job_is_retried(endpoint: Open, given: str) -> None:
    slow = endpoint("job_slow")
    id = slow.run({"seconds": 0} if given == "COMPLETED" else LONG)
    slow.ended(id) if given == "COMPLETED" else slow.running(id)
    if given == "CANCELLED":
        slow.cancel(id)
    assert given in slow.refused(400, "POST", f"retry/{id}")["error"]
    assert slow.cancel(id)["status"] == ("COMPLETED" if given == "COMPLETED" else "CANCELLED")


@clause("jobs.purge_queue")
def test_only_what_waits_is_purged_and_ends_as_cancelled(endpoint: Open) -> None:
    slow = endpoint("job_slow")
    running = slow.run(LONG)
    slow.running(running)
    waiting = [slow.run(LONG) for _ in range(3)]
    assert slow.told("POST", "purge-queue") == {"removed": 3, "status": "completed"}
    assert [slow.status(id)["status"] for id in (running, *waiting)] == ["IN_PROGRESS", *["CANCELLED"] * 3]
    assert slow.told("POST", "purge-queue", {}) == {"removed": 0, "status": "completed"}
    slow.cancel(running)


@clause("jobs.health")
def test_jobs_and_workers_are_counted(endpoint: Open) -> None:
    slow = endpoint("job_slow")
    before = slow.health()
    assert [*before] == ["jobs", "workers"]
    assert {"idle", "initializing", "ready", "running", "throttled"} <= {*before["workers"]}
    running = slow.run(LONG)
    slow.running(running)
    waiting = slow.run(LONG)
    during = slow.health()
    assert (during["jobs"]["inProgress"], during["jobs"]["inQueue"]) == (1, 1)
    assert (during["workers"]["running"], during["workers"]["idle"]) == (1, 0)
    slow.cancel(waiting)
    slow.cancel(running)
    slow.runsync({"seconds": 0})
    after = slow.health()
    assert after["jobs"]["completed"] == before["jobs"]["completed"] + 1
    assert (after["jobs"]["inProgress"], after["jobs"]["inQueue"]) == (0, 0)


@clause("jobs.requests")
def test_the_metrics_port_counts_jobs(endpoint: Open, server: Running) -> None:
    def counted() -> dict[str, float]:
        lines = HttpClient(server.metrics).get("/metrics").body.decode().splitlines()
        found = dict(line.rsplit(" ", 1) for line in lines if line.startswith("penstock_jobs"))
        return {name: float(value) for name, value in found.items() if 'model="job_failing"' in name}

    failing, before = endpoint("job_failing"), counted()
    failing.ended(failing.run({"how": "raise"}))
    after = counted()
    changed = {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name, 0)}
    assert changed == {
        'penstock_jobs_accepted_total{model="job_failing"}': 1,
        'penstock_jobs_ended_total{model="job_failing",state="FAILED"}': 1,
    }


def test_jobs_are_listed_by_page_the_newest_first(endpoint: Open) -> None:
    echo = endpoint("job_echo")
    ids = [echo.runsync(number)["id"] for number in range(3)]
    page = echo.told("GET", "requests", limit=2)
    assert [job["id"] for job in page["requests"]] == ids[:0:-1]
    assert (page["offset"], page["limit"], page["hasMore"]) == (0, 2, True)
    last = echo.told("GET", "requests", offset=2, limit=1000)
    assert last["requests"][0] == echo.status(ids[0])
    assert last["total"] == page["total"] == len(last["requests"]) + 2
    assert not last["hasMore"]
    assert echo.told("GET", "requests", status="FAILED") == {
        "requests": [], "total": 0, "offset": 0, "limit": 50, "hasMore": False,
    }  # fmt: skip
    echo.refused(400, "GET", "requests", status="nope")


@clause("jobs.status")
def test_low_priority_waits_for_the_others(endpoint: Open) -> None:
    slow = endpoint("job_slow")
    blocker = slow.run(LONG)
    slow.running(blocker)
    low = slow.run(LONG, policy={"lowPriority": True})
    others = [slow.run({"seconds": 0}) for _ in range(2)]
    slow.cancel(blocker)
    for id in others:
        assert slow.ended(id)["status"] == "COMPLETED"
    slow.running(low)
    slow.cancel(low)


@clause("jobs.inputs")
def test_a_model_with_a_signature_takes_named_values_and_inference_bodies(endpoint: Open) -> None:
    simple = endpoint("simple")
    named = {"INPUT0": [[*range(16)]], "INPUT1": [[1] * 16]}
    total = [number + 1 for number in range(16)]
    assert simple.runsync(named)["output"]["OUTPUT0"] == [total]
    assert simple.runsync({"input": named})["output"]["OUTPUT0"] == [total]
    tensors = [{"name": name, "datatype": "INT32", "shape": [1, 16], "data": data} for name, data in named.items()]
    outputs = simple.runsync({"inputs": tensors})["output"]["outputs"]
    assert next(output["data"] for output in outputs if output["name"] == "OUTPUT0") == total
    text = endpoint("simple_string").runsync({name: [list(map(str, data[0]))] for name, data in named.items()})
    assert text["output"]["OUTPUT0"] == [list(map(str, total))]


@clause("jobs.status")
def test_a_job_is_kept_as_long_as_the_last_who_asked_wants(endpoint: Open) -> None:
    echo = endpoint("job_echo")
    id = echo.runsync(1)["id"]
    assert echo.told("GET", f"status/{id}", ttl=0)["status"] == "COMPLETED"
    echo.refused(404, "GET", f"status/{id}")


@clause("jobs.requests")
def test_a_batch_is_drafted_finalized_and_read_by_page(endpoint: Open) -> None:
    echo = endpoint("job_echo")
    id = echo.told("POST", "batch", [{"input": 1}])["id"]
    added = echo.told("POST", f"batch/{id}/requests", {"requests": [{"input": 2}, {"input": 3}]})
    assert (added["status"], added["requestTotal"]) == ("DRAFT", 3)
    echo.told("POST", f"batch/{id}/finalize")
    done = until(lambda: (b := echo.told("GET", f"batch/{id}"))["requestCompleted"] == 3 and b, "the batch is done")
    assert (done["status"], done["endpointId"], done["requestFailed"]) == ("FINALIZED", "job_echo", 0)
    page = echo.told("GET", f"batch/{id}/requests", limit=2)
    assert (len(page["requests"]), page["total"], page["hasMore"]) == (2, 3, True)
    rest = echo.told("GET", f"batch/{id}/requests", offset=2)["requests"]
    assert sorted(job["output"] for job in page["requests"] + rest) == [1, 2, 3]
