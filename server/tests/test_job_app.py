"""RunPod's dialect and the door of the job API, through HTTP's application. Protocol page jobs, sections 1, 3 and 7."""

import asyncio
import re
from pathlib import Path
from typing import Any
from uuid import RFC_4122, UUID

import pytest
from penstock.errors import Kind, ServingError
from penstock.job_api.desk import new_id, now_ms
from penstock.job_api.endpoints import RESERVED, is_endpoint, why_not
from penstock.job_api.rates import Rates
from penstock.job_api.store import State, open_store

from .fakes import EchoInstance, GatedInstance
from .fakes_job_door import (
    Handler,
    House,
    Say,
    Says,
    X,
    count_to,
    echo,
    final,
    handler,
    house,
    never,
    run,
    running,
    settled,
)

SEVEN_DAYS_MS = 7 * 86_400_000

# -- run, runsync, status


def test_run_answers_with_an_id_and_status_tells_the_result(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        accepted = await made.post("/v2/m/run", X)
        assert accepted.keys() == {"id", "status"}
        assert accepted["status"] == "IN_QUEUE"
        assert re.fullmatch(r"[0-9a-f-]{36}-u1", accepted["id"])
        job = await final(made, "m", accepted["id"])
        assert job.pop("workerId")
        assert (type(job.pop("delayTime")), type(job.pop("executionTime"))) == (int, int)
        assert job == {"id": accepted["id"], "status": "COMPLETED", "output": {"Y": [1.0, 2.0]}}
        assert await made.post(f"/v2/m/status/{accepted['id']}") == await made.get(f"/v2/m/status/{accepted['id']}")

    run(tmp_path, test)


def test_ids_are_uuids_in_the_order_of_time() -> None:
    ids = [new_id() for _ in range(1000)]
    parsed = [UUID(id.removesuffix("-u1")) for id in ids]
    assert len({*ids}) == len(ids)
    assert {(one.version, one.variant) for one in parsed} == {(7, RFC_4122)}
    times_ms = [one.int >> 80 for one in parsed]
    assert times_ms == sorted(times_ms)
    assert 0 <= now_ms() - times_ms[-1] < 60_000
    assert new_id("sync-").startswith("sync-")


def test_an_accepted_job_is_in_the_store_before_the_answer(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        accepted = await made.post("/v2/h/run", {"input": 1})
        assert await made.store.get(accepted["id"], "h", 0) is not None

    run(tmp_path, test, {"h": handler(never)})


def test_runsync_answers_with_the_whole_job(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        job = await made.post("/v2/m/runsync", X)
        assert job["id"].startswith("sync-")
        assert (job["status"], job["output"]) == ("COMPLETED", {"Y": [1.0, 2.0]})
        stored = await made.get(f"/v2/m/status/{job['id']}")
        assert stored == job

    run(tmp_path, test)


def test_runsync_answers_when_its_wait_is_over_and_the_job_goes_on(tmp_path: Path) -> None:
    gated = GatedInstance()

    async def test(made: House) -> None:
        job = await made.post("/v2/m/runsync?wait=1", X)  # clamped to a second
        assert job["status"] == "IN_PROGRESS"
        gated.gate.set()
        assert (await made.get(f"/v2/m/status-sync/{job['id']}"))["output"] == {"Y": [1.0, 2.0]}

    run(tmp_path, test, {"m": lambda: gated})


def test_a_sender_that_goes_away_cancels_nothing(tmp_path: Path) -> None:
    says = Says()

    async def test(made: House) -> None:
        leaves = asyncio.Event()
        calls = [made.call("POST", "/v2/h/runsync", {"input": number}, leaves=leaves) for number in range(2)]
        waiting = [asyncio.create_task(call) for call in calls]
        first = await says.first()
        await made.until("/v2/h/health", lambda health: health["jobs"]["inQueue"] == 1)
        leaves.set()
        first("one")
        (await says.number(1))("two")
        await made.until("/v2/h/health", lambda health: health["jobs"]["completed"] == 2)
        await asyncio.gather(*waiting)

    run(tmp_path, test, {"h": handler(says.take)})


def test_runsync_waits_its_turn_in_the_queue(tmp_path: Path) -> None:
    """With one slot, and that taken, a second job is queued and runs as soon as the first has ended."""
    order: list[Any] = []

    def script(value: Any, say: Say) -> None:
        order.append(value)
        say(value)

    async def test(made: House) -> None:
        jobs = await asyncio.gather(*(made.post("/v2/h/runsync", {"input": number}) for number in range(20)))
        assert [job["output"] for job in jobs] == list(range(20))
        assert order == sorted(order)

    run(tmp_path, test, {"h": handler(script)})


def test_status_sync_holds_until_the_job_is_final(tmp_path: Path) -> None:
    says = Says()

    async def test(made: House) -> None:
        id = (await made.post("/v2/h/run", {"input": 1}))["id"]
        await running(made, "h", id)
        waiting = asyncio.create_task(made.call("POST", f"/v2/h/status-sync/{id}?wait=90000"))
        await settled()
        assert not waiting.done()
        (await says.first())("done")
        assert (await waiting).json["output"] == "done"

    run(tmp_path, test, {"h": handler(says.take)})


def test_status_sync_ends_with_its_wait(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        id = (await made.post("/v2/h/run", {"input": 1}))["id"]
        assert (await made.get(f"/v2/h/status-sync/{id}?wait=1000"))["status"] in ("IN_QUEUE", "IN_PROGRESS")

    run(tmp_path, test, {"h": handler(never)})


@pytest.mark.parametrize(
    ("output", "shown"),
    [(0, True), (False, True), ("", True), ([], True), ({"a": 1}, True), (None, False), ({}, False)],
)
def test_outputs_of_a_handler_are_shown_but_for_nothing(tmp_path: Path, output: Any, shown: bool) -> None:
    async def test(made: House) -> None:
        job = await made.post("/v2/h/runsync", {"input": output if output is not None else "none"})
        assert job["status"] == "COMPLETED"
        assert ("output" in job) is shown
        assert "error" not in job
        if shown:
            assert job["output"] == output

    def script(value: Any, say: Say) -> None:
        say(None if value == "none" else value)

    run(tmp_path, test, {"h": handler(script)})


def test_a_failed_job_is_an_answer_of_200_with_its_error(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        job = await made.post("/v2/h/runsync", {"input": 1})
        assert (job["status"], job["error"]) == ("FAILED", "the text")
        assert "output" not in job
        assert type(job["executionTime"]) is int

    run(tmp_path, test, {"h": handler(lambda _, say: say.fail(ServingError(Kind.INTERNAL, "the text")))})


def test_progress_is_the_output_of_a_running_job_and_gone_afterwards(tmp_path: Path) -> None:
    says = Says()

    async def test(made: House) -> None:
        id = (await made.post("/v2/h/run", {"input": 1}))["id"]
        await running(made, "h", id)
        (await says.first())("step 1", final=False, partial=True)
        (await says.first())("step 2", final=False, partial=True)
        job = await made.until(f"/v2/h/status/{id}", lambda job: job.get("output") == "step 2")
        assert job["status"] == "IN_PROGRESS"
        (await says.first())("done")
        assert (await final(made, "h", id))["output"] == "done"
        assert (await made.get(f"/v2/h/stream/{id}"))["stream"] == []

    run(tmp_path, test, {"h": handler(says.take)})


def test_what_a_handler_is_given_besides(tmp_path: Path) -> None:
    handlers: list[Handler] = []

    def make() -> Handler:
        handlers.append(Handler(echo))
        return handlers[-1]

    async def test(made: House) -> None:
        request = {"input": 1, "s3Config": {"accessId": "k"}, "policy": {"ttl": 10000}, "other": 1, "webhookV2": "x"}
        job = await made.post("/v2/h/runsync", request)
        [seen] = handlers[0].seen
        assert seen.job is not None
        assert seen.job.id == job["id"]
        assert seen.job.passed == b'{"s3Config":{"accessId":"k"},"policy":{"ttl":10000}}'
        for path in ("status", "stream"):
            assert b"accessId" not in (await made.call("GET", f"/v2/h/{path}/{job['id']}")).body

    make.func = Handler  # type: ignore[attr-defined]
    run(tmp_path, test, {"h": make})


def test_the_older_form_shows_input_and_gpu(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        job = await made.post("/v2/m/runsync", X)
        assert (job["input"], job["gpu"]) == ({"X": [1, 2]}, "24")
        assert await made.get(f"/v2/m/status/{job['id']}") == job

    run(tmp_path, test, job_echo_input=True, job_gpu="24")


def test_a_status_may_shorten_how_long_a_result_is_kept(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        job = await made.post("/v2/m/runsync", X)
        path = f"/v2/m/status/{job['id']}"
        await made.get(f"{path}?ttl=99999999")
        stored = await made.store.get(job["id"], "m", 0)
        assert stored is not None
        assert stored.expires_ms - stored.finished_ms == 60_000
        await made.get(f"{path}?ttl=0")
        assert (await made.call("GET", path)).status == 404
        assert (await made.call("GET", f"{path}?ttl=x")).json["details"]["field"] == "ttl"

    run(tmp_path, test)


def test_results_are_kept_as_long_as_the_options_say(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        for operation, kept_ms in (("run", 7000), ("runsync", 5000)):
            id = (await made.post(f"/v2/m/{operation}", X))["id"]
            await final(made, "m", id)
            stored = await made.store.get(id, "m", 0)
            assert stored is not None
            assert stored.expires_ms - stored.finished_ms == kept_ms

    run(tmp_path, test, job_retention_secs=7, job_sync_retention_secs=5)


# -- what is refused


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "input"),
        ({"Input": {"X": [1]}}, "input"),
        ({"input": None}, "input"),
        ([], "body"),
        (b"", "body"),
        (X | {"policy": 1}, "policy"),
        (X | {"policy": {"ttl": "20000"}}, "policy.ttl"),
        (X | {"policy": {"ttl": True}}, "policy.ttl"),
        (X | {"policy": {"ttl": 9999}}, "policy.ttl"),
        (X | {"policy": {"ttl": SEVEN_DAYS_MS + 1}}, "policy.ttl"),
        (X | {"policy": {"executionTimeout": 0}}, "policy.executionTimeout"),
        (X | {"policy": {"executionTimeout": 4999}}, "policy.executionTimeout"),
        (X | {"policy": {"executionTimeout": 6000.5}}, "policy.executionTimeout"),
        (X | {"policy": {"lowPriority": 1}}, "policy.lowPriority"),
        (X | {"webhook": 1}, "webhook"),
        (X | {"webhook": "ftp://example.com"}, "webhook"),
        (X | {"webhook": "/callback"}, "webhook"),
        (X | {"s3Config": "x"}, "s3Config"),
        ({"input": {"X": ["a"]}}, "input.X"),
        ({"input": {"Z": [1]}}, "input.Z"),
    ],
)
def test_a_wrong_request_is_refused_naming_its_field(tmp_path: Path, body: Any, field: str) -> None:
    async def test(made: House) -> None:
        for operation in ("run", "runsync"):
            got = await made.call("POST", f"/v2/m/{operation}", body)
            assert got.status == 400
            assert got.headers[b"content-type"] == b"application/json"
            assert got.json["details"]["field"] == field
            assert field in got.json["error"]
            assert got.json.keys() == {"error", "code", "details"}  # never `id` or `status`
        assert (await made.get("/v2/m/requests"))["total"] == 0

    run(tmp_path, test)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"{", "failed to parse the request JSON buffer: Missing a name for object member. at 1"),
        (
            b'{"input": {"X": [NaN]}}',
            'the literals NaN and Infinity are no JSON; where a tensor wants them, write "NaN" or "Infinity"',
        ),
    ],
)
def test_what_is_no_json_is_refused(tmp_path: Path, body: bytes, text: str) -> None:
    async def test(made: House) -> None:
        got = await made.call("POST", "/v2/m/run", body)
        assert (got.status, got.json) == (400, {"error": text})

    run(tmp_path, test)


def test_policies_within_the_bounds_are_taken_as_they_are(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        for policy, expected in (
            ({"executionTimeout": 5000, "ttl": 10000}, (5000, 10000, False)),
            (
                {"executionTimeout": SEVEN_DAYS_MS, "ttl": SEVEN_DAYS_MS, "lowPriority": True},
                (SEVEN_DAYS_MS,) * 2 + (True,),
            ),
            (None, (600_000, 86_400_000, False)),
            ({"ttl": None}, (600_000, 86_400_000, False)),
        ):
            id = (await made.post("/v2/m/run", X | {"policy": policy}))["id"]
            stored = await made.store.get(id, "m", 0)
            assert stored is not None
            request = stored.request
            assert (request.execution_timeout_ms, request.ttl_ms, request.low_priority) == expected

    run(tmp_path, test)


def test_policies_out_of_bounds_may_be_clamped(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        id = (await made.post("/v2/m/run", X | {"policy": {"executionTimeout": 3000, "ttl": 10**15}}))["id"]
        stored = await made.store.get(id, "m", 0)
        assert stored is not None
        assert (stored.request.execution_timeout_ms, stored.request.ttl_ms) == (5000, SEVEN_DAYS_MS)
        assert (await made.call("POST", "/v2/m/run", X | {"policy": {"ttl": -1}})).status == 400

    run(tmp_path, test, job_policy_bounds="clamp")


def test_bodies_are_limited_by_operation(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        body = b'{"input": 1, "x": "' + b"x" * 1000 + b'"}'
        got = await made.call("POST", "/v2/h/run", body)
        assert (got.status, got.json) == (413, {"error": "the body exceeds the limit of 500 bytes"})
        assert (await made.post("/v2/h/runsync", body))["output"] == 1

    run(tmp_path, test, {"h": handler(echo)}, job_max_run_size=500, job_max_runsync_size=2000)


def test_a_result_that_is_too_large_fails_with_its_size(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        job = await made.post("/v2/h/runsync", {"input": 300})
        assert (job["status"], job["error"]) == ("FAILED", "the result has 302 bytes, the limit is 200")
        assert (await made.post("/v2/h/runsync", {"input": 198}))["status"] == "COMPLETED"

    run(tmp_path, test, {"h": handler(lambda n, say: say("x" * n))}, job_max_runsync_size=200)


@pytest.mark.parametrize("query", ["wait=soon", "wait=1.5", "wait="])
def test_a_wait_that_is_no_number_is_refused(tmp_path: Path, query: str) -> None:
    async def test(made: House) -> None:
        for path in ("runsync", "status-sync/x", "stream/x"):
            got = await made.call("POST", f"/v2/m/{path}?{query}", X)
            if query != "wait=":  # an empty value is no value
                assert (got.status, got.json["details"]["field"]) == (400, "wait")

    run(tmp_path, test)


def test_unknown_jobs_and_endpoints_are_not_found(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        id = (await made.post("/v2/m/runsync", X))["id"]
        for path in ("status", "status-sync", "stream", "cancel", "retry"):
            for endpoint, job in (("m", "nope"), ("other", id)):
                got = await made.call("POST", f"/v2/{endpoint}/{path}/{job}")
                assert (got.status, got.json.keys()) == (404, {"error"})
            assert (await made.call("POST", f"/v2/nope/{path}/{id}")).json == {"error": "endpoint 'nope' is not found"}

    run(tmp_path, test, {"m": EchoInstance, "other": EchoInstance})


@pytest.mark.parametrize(
    ("verb", "path", "allowed"),
    [
        ("GET", "/v2/m/run", b"POST"),
        ("PUT", "/v2/m/status/x", b"GET, POST"),
        ("GET", "/v2/m/cancel/x", b"POST"),
        ("POST", "/v2/m/health", b"GET"),
        ("DELETE", "/v2/m/purge-queue", b"POST"),
        ("PATCH", "/v2/m/batch/x", b"GET, DELETE"),
    ],
)
def test_wrong_methods_are_told_the_right_ones(tmp_path: Path, verb: str, path: str, allowed: bytes) -> None:
    async def test(made: House) -> None:
        got = await made.call(verb, path)
        assert (got.status, got.headers[b"allow"]) == (405, allowed)

    run(tmp_path, test)


# -- cancel, retry, purge


def test_cancelling_stops_a_running_job_and_frees_its_slot(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        first, second = [(await made.post("/v2/h/run", {"input": n}))["id"] for n in (1, 2)]
        await running(made, "h", first)
        job = await made.post(f"/v2/h/cancel/{first}", {})
        assert job["status"] == "CANCELLED"
        assert "workerId" in job
        assert "output" not in job
        await running(made, "h", second)
        assert await made.get(f"/v2/h/status/{first}") == job
        assert await made.post(f"/v2/h/cancel/{first}") == job
        await made.post(f"/v2/h/cancel/{second}")

    run(tmp_path, test, {"h": handler(never)})


def test_cancelling_a_waiting_job_wakes_who_waits_for_it(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        first = (await made.post("/v2/h/run", {"input": 1}))["id"]
        await running(made, "h", first)
        waiting = asyncio.create_task(made.post("/v2/h/runsync", {"input": 2}))
        page = await made.until("/v2/h/requests?status=IN_QUEUE", lambda page: page["total"] == 1)
        assert await made.post(f"/v2/h/cancel/{page['requests'][0]['id']}") == {
            "id": page["requests"][0]["id"],
            "status": "CANCELLED",
        }
        assert (await waiting)["status"] == "CANCELLED"

    run(tmp_path, test, {"h": handler(never)})


def test_cancelling_a_finished_job_changes_nothing(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        job = await made.post("/v2/m/runsync", X)
        assert await made.post(f"/v2/m/cancel/{job['id']}") == job

    run(tmp_path, test)


def test_a_failed_job_may_be_tried_again(tmp_path: Path) -> None:
    runs: list[Any] = []

    def script(value: Any, say: Say) -> None:
        runs.append(value)
        if len(runs) == 1:
            say("chunk", final=False)
            say.fail(ServingError(Kind.INTERNAL, "not yet"))
        else:
            say("now")

    async def test(made: House) -> None:
        id = (await made.post("/v2/h/run", {"input": 5}))["id"]
        assert (await final(made, "h", id))["error"] == "not yet"
        assert await made.post(f"/v2/h/retry/{id}") == {"id": id, "status": "IN_QUEUE"}
        job = await made.until(f"/v2/h/status/{id}", lambda job: job["status"] == "COMPLETED")
        assert job["output"] == "now"
        assert "error" not in job
        assert (await made.get(f"/v2/h/stream/{id}"))["stream"] == []
        assert runs == [5, 5]
        got = await made.call("POST", f"/v2/h/retry/{id}")
        assert got.status == 400
        assert (await made.get("/v2/h/health"))["jobs"]["retried"] == 1

    run(tmp_path, test, {"h": handler(script)})


def test_purging_ends_waiting_jobs_only(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        ids = [(await made.post("/v2/h/run", {"input": n}))["id"] for n in range(4)]
        await running(made, "h", ids[0])
        assert await made.post("/v2/h/purge-queue", {}) == {"removed": 3, "status": "completed"}
        assert await made.post("/v2/h/purge-queue") == {"removed": 0, "status": "completed"}
        states = [(await made.get(f"/v2/h/status/{id}"))["status"] for id in ids]
        assert states == ["IN_PROGRESS", "CANCELLED", "CANCELLED", "CANCELLED"]
        await made.post(f"/v2/h/cancel/{ids[0]}")

    run(tmp_path, test, {"h": handler(never)})


# -- stream


def test_chunks_are_streamed_once_each_and_the_final_answer_has_the_rest(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        id = (await made.post("/v2/h/run", {"input": {"n": 100}}))["id"]
        chunks: list[Any] = []
        while True:
            answer = await made.get(f"/v2/h/stream/{id}")
            chunks += answer["stream"]
            if answer["status"] == "COMPLETED":
                break
        assert chunks == [{"output": number} for number in range(100)]
        assert await made.get(f"/v2/h/stream/{id}") == {"status": "COMPLETED", "stream": []}
        again = await made.post(f"/v2/h/stream/{id}?from=98")
        assert again == {"status": "COMPLETED", "stream": [{"output": 98}, {"output": 99}]}
        assert (await made.get(f"/v2/h/status/{id}"))["output"] == []

    run(tmp_path, test, {"h": handler(count_to)})


def test_a_stream_holds_until_a_chunk_comes(tmp_path: Path) -> None:
    says = Says()

    async def test(made: House) -> None:
        id = (await made.post("/v2/h/run", {"input": 1}))["id"]
        await running(made, "h", id)
        waiting = asyncio.create_task(made.get(f"/v2/h/stream/{id}"))
        await settled()
        assert not waiting.done()
        (await says.first())({"token": "a"}, final=False)
        assert await waiting == {"status": "IN_PROGRESS", "stream": [{"output": {"token": "a"}}]}
        assert await made.get(f"/v2/h/stream/{id}?wait=0") == {"status": "IN_PROGRESS", "stream": []}
        (await says.first())([])

    run(tmp_path, test, {"h": handler(says.take)})


def test_a_client_that_goes_away_takes_no_chunk_along(tmp_path: Path) -> None:
    says = Says()

    async def test(made: House) -> None:
        id = (await made.post("/v2/h/run", {"input": 1}))["id"]
        await running(made, "h", id)
        leaves = asyncio.Event()
        waiting = asyncio.create_task(made.call("GET", f"/v2/h/stream/{id}?wait=90000", leaves=leaves))
        await settled()
        leaves.set()
        await waiting
        (await says.first())("first", final=False)
        assert (await made.get(f"/v2/h/stream/{id}"))["stream"] == [{"output": "first"}]
        (await says.first())([])

    run(tmp_path, test, {"h": handler(says.take)})


def test_a_long_string_is_streamed_in_pieces(tmp_path: Path) -> None:
    text = "é" * 1_200_000

    def script(_: Any, say: Say) -> None:
        say(text, final=False)
        say([])

    async def test(made: House) -> None:
        id = (await made.post("/v2/h/run", {"input": 1}))["id"]
        await final(made, "h", id)
        got = await made.call("GET", f"/v2/h/stream/{id}")
        pieces = [chunk["output"] for chunk in got.json["stream"]]
        assert len(pieces) > 1
        assert "".join(pieces) == text

    run(tmp_path, test, {"h": handler(script)})


def test_a_job_that_does_not_stream_has_no_chunks(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        id = (await made.post("/v2/m/runsync", X))["id"]
        assert await made.get(f"/v2/m/stream/{id}") == {"status": "COMPLETED", "stream": []}

    run(tmp_path, test)


# -- health, requests


def test_health_counts_jobs_and_workers(tmp_path: Path) -> None:
    def script(value: Any, say: Say) -> None:
        if value == "fail":
            say.fail(ServingError(Kind.INTERNAL, "as told"))
        elif value == "run":
            never(value, say)
        else:
            say(value)

    async def test(made: House) -> None:
        for value in ("done", "done", "fail"):
            await made.post("/v2/h/runsync", {"input": value})
        first = (await made.post("/v2/h/run", {"input": "run"}))["id"]
        await running(made, "h", first)
        second = (await made.post("/v2/h/run", {"input": "run"}))["id"]
        assert await made.get("/v2/h/health") == {
            "jobs": {"completed": 2, "failed": 1, "inProgress": 1, "inQueue": 1, "retried": 0},
            "workers": {
                "idle": 0, "initializing": 0, "ready": 1, "running": 1, "throttled": 0, "unhealthy": 0,
            },
        }  # fmt: skip
        for id in (first, second):
            await made.post(f"/v2/h/cancel/{id}")

    run(tmp_path, test, {"h": handler(script)})


def test_requests_are_listed_by_pages_newest_first(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        ids = [(await made.post("/v2/m/runsync", X))["id"] for _ in range(5)]
        page = await made.get("/v2/m/requests?offset=1&limit=2")
        assert [job["id"] for job in page["requests"]] == [ids[3], ids[2]]
        assert (page["total"], page["offset"], page["limit"], page["hasMore"]) == (5, 1, 2, True)
        assert (await made.get("/v2/m/requests?status=FAILED"))["requests"] == []
        assert (await made.get("/v2/m/requests?status=COMPLETED&limit=1000"))["hasMore"] is False
        for query in ("limit=0", "offset=-1", "limit=x", "status=DONE"):
            assert (await made.call("GET", f"/v2/m/requests?{query}")).status == 400

    run(tmp_path, test)


# -- batches (1.9)


def test_a_batch_is_collected_and_runs_once_it_is_finalized(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        requests = [{"input": number} for number in range(3)]
        batch = await made.post("/v2/h/batch", requests)
        assert batch["status"] == "DRAFT"
        path = f"/v2/h/batch/{batch['id']}"
        await made.post(f"{path}/requests", {"requests": [{"input": 3}, {"input": "fail"}]})
        assert (await made.get(path))["requestTotal"] == 5
        assert (await made.get("/v2/h/requests"))["total"] == 0
        assert (await made.post(f"{path}/finalize"))["status"] == "FINALIZED"
        done = await made.until(path, lambda batch: batch["requestCompleted"] == 4 and batch["requestFailed"] == 1)
        created = done.pop("createdAt")
        assert type(created) is int
        assert done == {
            "id": batch["id"], "endpointId": "h", "status": "FINALIZED", "requestTotal": 5, "requestInProgress": 0,
            "requestCompleted": 4, "requestFailed": 1,
        }  # fmt: skip
        page = await made.get(f"{path}/requests?limit=4")
        assert (page["total"], page["hasMore"]) == (5, True)
        assert all(re.fullmatch("[A-Za-z0-9_-]+", job["id"]) for job in page["requests"])  # 1.3
        assert sorted(job["output"] for job in (await made.get(f"{path}/requests"))["requests"] if "output" in job) == [
            0, 1, 2, 3,
        ]  # fmt: skip
        assert (await made.post(f"{path}/finalize"))["requestTotal"] == 5
        assert (await made.get("/v2/h/requests"))["total"] == 5
        got = await made.call("POST", f"{path}/requests", {"requests": []})
        assert (got.status, got.json["error"]) == (400, f"batch '{batch['id']}' is FINALIZED, expected DRAFT")

    def script(value: Any, say: Say) -> None:
        if value == "fail":
            say.fail(ServingError(Kind.INTERNAL, "as told"))
        else:
            say(value)

    run(tmp_path, test, {"h": handler(script)})


def test_a_finalization_that_was_cut_short_queues_no_request_twice(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        batch = (await made.post("/v2/m/batch", [X] * 20))["id"]
        first = asyncio.create_task(made.call("POST", f"/v2/m/batch/{batch}/finalize"))
        for _ in range(12):
            await asyncio.sleep(0)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await made.post(f"/v2/m/batch/{batch}/finalize")
        await made.until(f"/v2/m/batch/{batch}", lambda batch: batch["requestCompleted"] == 20)
        assert (await made.get("/v2/m/requests"))["total"] == 20

    run(tmp_path, test)


def test_a_cancelled_batch_ends_its_jobs(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        batch = (await made.post("/v2/h/batch", [{"input": 1}] * 3))["id"]
        path = f"/v2/h/batch/{batch}"
        await made.post(f"{path}/finalize")
        await made.until(path, lambda batch: batch["requestInProgress"] == 1)
        got = await made.call("DELETE", path)
        assert (got.status, got.json["status"], got.json["requestFailed"]) == (200, "CANCELLED", 3)
        draft = (await made.post("/v2/h/batch", []))["id"]
        assert (await made.post(f"/v2/h/batch/{draft}/cancel"))["status"] == "CANCELLED"
        assert (await made.call("POST", f"/v2/h/batch/{draft}/finalize")).status == 400

    run(tmp_path, test, {"h": handler(never)})


def test_batches_are_checked_and_limited(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        got = await made.call("POST", "/v2/m/batch", [X, {"input": {"Z": 1}}])
        assert (got.status, got.json["details"]["field"]) == (400, "body[1].input.Z")
        assert (await made.call("POST", "/v2/m/batch", {"requests": []})).status == 400
        assert (await made.call("GET", "/v2/m/batch/nope")).status == 404
        assert (await made.call("POST", "/v2/m/batch", [X] * 5001)).status == 400
        for _ in range(10):
            await made.post("/v2/m/batch", [])
        assert (await made.call("POST", "/v2/m/batch", [])).status == 429

    run(tmp_path, test)


def test_a_batch_outlives_a_restart(tmp_path: Path) -> None:
    url = f"sqlite:{tmp_path / 'jobs.db'}"

    async def draw_up() -> str:
        async with house(tmp_path / "models", store=await open_store(url)) as made:
            return str((await made.post("/v2/m/batch", [X, X]))["id"])

    async def finalize(batch: str) -> None:
        async with house(tmp_path / "models", store=await open_store(url)) as made:
            await made.post(f"/v2/m/batch/{batch}/finalize")
            await made.until(f"/v2/m/batch/{batch}", lambda batch: batch["requestCompleted"] == 2)

    asyncio.run(finalize(asyncio.run(draw_up())))


def test_a_refusal_of_a_body_that_was_not_read_closes_the_connection(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        got = await made.call("POST", "/v2/nope/run", b"", {b"expect": b"100-continue"})
        assert (got.status, got.headers[b"connection"]) == (404, b"close")
        assert b"connection" not in (await made.call("POST", "/v2/nope/run")).headers

    run(tmp_path, test)


# -- keys and rates


def test_a_key_is_asked_for_before_anything_else(tmp_path: Path) -> None:
    def check(authorization: str | None, scope: str) -> None:
        assert scope == "jobs"
        if authorization != "Bearer right":
            raise ServingError(Kind.UNAUTHENTICATED, "no")

    async def test(made: House) -> None:
        for path in ("/v2/m/run", "/v2/nope/run", "/v2/m/nope", "/v2/endpoints/m", "/v2/jobs/x/status"):
            assert (await made.call("POST", path, b"{")).status == 401
        assert (await made.call("GET", "/v2/health/live")).status == 200
        got = await made.call("GET", "/v2/m/health", headers={b"authorization": b"Bearer right"})
        assert got.status == 200

    run(tmp_path, test, check=check)


def test_a_full_queue_refuses_more(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        first = (await made.post("/v2/h/run", {"input": 1}))["id"]
        await running(made, "h", first)
        await made.post("/v2/h/run", {"input": 2})
        got = await made.call("POST", "/v2/h/run", {"input": 3})
        assert (got.status, got.headers[b"retry-after"]) == (429, b"1")
        await made.post("/v2/h/purge-queue")
        await made.post(f"/v2/h/cancel/{first}")

    run(tmp_path, test, {"h": handler(never)}, job_queue_limit=1)


def test_a_rate_is_counted_by_operation_endpoint_and_caller(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        for caller in (b"Bearer a", b"Bearer b"):
            for endpoint in ("m", "n"):
                headers = {b"authorization": caller}
                statuses = [
                    (await made.call("GET", f"/v2/{endpoint}/health", headers=headers)).status for _ in range(3)
                ]
                assert statuses == [200, 200, 429]
        got = await made.call("GET", "/v2/m/health", headers={b"authorization": b"Bearer a"})
        assert 0 < int(got.headers[b"retry-after"]) <= 60
        assert got.json["error"].startswith("health is limited to 2 requests in 60 s")
        await made.get("/v2/m/requests")

    run(tmp_path, test, {"m": EchoInstance, "n": EchoInstance}, job_rate_limit=("health=2/60",))


def test_a_window_ends() -> None:
    now_s = 100.0
    rates = Rates(["run=1/10"], lambda: now_s)
    assert rates.take("status", "m", b"") is None
    first = rates.take("run", "m", b"")
    assert first is not None
    assert (first.spent, first.remaining) == (False, 0)
    now_s = 109.5
    second = rates.take("run", "m", b"")
    assert second is not None
    assert (second.spent, second.reset_s) == (True, 1)
    now_s = 110.0
    third = rates.take("run", "m", b"")
    assert third is not None
    assert not third.spent


@pytest.mark.parametrize("entry", ["run", "run=", "run=1", "run=0/10", "run=1/0", "walk=1/10", "run=-1/10", "run=1/x"])
def test_a_rate_that_cannot_be_read_is_refused(entry: str) -> None:
    with pytest.raises(ServingError, match="--job-rate-limit expects OPERATION=REQUESTS/SECONDS") as caught:
        Rates([entry])
    assert caught.value.kind is Kind.INVALID


# -- coexistence (section 7)


def test_a_double_slash_after_the_base_is_tolerated(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        assert (await made.post("/v2//m/runsync", X))["status"] == "COMPLETED"

    run(tmp_path, test)


@pytest.mark.parametrize(
    ("verb", "path", "status"),
    [
        ("GET", "/v2", 200),
        ("GET", "/v2/", 200),
        ("GET", "/v2/health/ready", 200),
        ("GET", "/v2/health/live", 200),
        ("GET", "/v2/health/health", 404),
        ("GET", "/v2/models/m", 200),
        ("GET", "/v2/models/run", 404),
        ("GET", "/v2/models/run/ready", 404),
        ("POST", "/v2/models/run", 405),
        ("POST", "/v2/models/runsync", 405),
        ("POST", "/v2/repository/index/run", 404),
        ("GET", "/v2/trace/health", 404),
        ("GET", "/v2/mod%65ls/health", 404),
        ("GET", "/v2/m/health", 200),
        ("GET", "/v2/status/health", 200),
        ("GET", "/v2/models/status", 200),
        ("GET", "/v2/m/nope", 404),
        ("GET", "/v2/m", 404),
        ("GET", "/v2/m/infer", 404),
        ("GET", "/v2/load/health", 404),
        ("GET", "/v2/models%2Fm/health", 404),
        ("HEAD", "/v2/m/health", 200),
    ],
)
def test_every_path_has_one_owner(tmp_path: Path, verb: str, path: str, status: int) -> None:
    async def test(made: House) -> None:
        assert (await made.call(verb, path)).status == status
        assert (await made.get("/v2/m/requests"))["total"] == 0

    run(tmp_path, test, {"m": EchoInstance, "status": EchoInstance})


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_reserved_words_are_no_endpoints(name: str) -> None:
    assert not is_endpoint(name)
    assert why_not(name) == f"'{name}' is a reserved word of the job API"


def test_other_names_are_endpoints_unless_a_path_cannot_hold_them() -> None:
    assert all(map(is_endpoint, ("m", "run", "status", "a.b-c_D9")))
    assert not any(map(is_endpoint, ("", "a b", "ä", "a/b", "a%")))
    assert why_not("a b") == "its name has characters other than letters, digits, '_', '.' and '-'"


def test_a_model_with_a_reserved_name_serves_without_a_job_door_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(made: House) -> None:
        assert (await made.call("POST", "/v2/jobs/run", X)).status == 404
        assert (await made.call("GET", "/v2/models/jobs")).status == 200

    run(tmp_path, test, {"jobs": EchoInstance, "m": EchoInstance})
    [record] = [record for record in caplog.records if "job door" in record.getMessage()]
    assert record.getMessage() == "model 'jobs' has no job door: 'jobs' is a reserved word of the job API"


# -- stopping


def test_a_server_that_stops_lets_waiters_go_and_accepts_nothing(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        id = (await made.post("/v2/h/run", {"input": 1}))["id"]
        await running(made, "h", id)
        waiting = asyncio.create_task(made.get(f"/v2/h/status-sync/{id}"))
        await settled()
        stopping = asyncio.create_task(made.service.stop(0))
        assert (await waiting)["status"] in ("IN_PROGRESS", "IN_QUEUE")
        got = await made.call("POST", "/v2/h/run", {"input": 2})
        assert (got.status, got.headers[b"retry-after"]) == (503, b"1")
        await stopping
        stored = await made.store.get(id, "h", 0)
        assert stored is not None
        assert (stored.state, stored.retries) == (State.IN_QUEUE, 0)

    run(tmp_path, test, {"h": handler(never)})
