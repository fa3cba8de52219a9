"""A job bears the id of the request that handed it in: in the store, before its model, in the log, to its webhook."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from penstock.errors import Kind, ServingError, WorkerLostError
from penstock.job_api.store import Request, open_store
from penstock.logs import Formatter, JsonFormatter
from penstock.messages import InferResponse

from .fakes import LIMIT_S, EchoInstance, ScriptedInstance
from .fakes_job_door import Handler, House, Say, Says, X, echo, eventually, final, handler, house, run
from .fakes_jobs import MemoryJobStore
from .test_job_webhooks import Impatient, receiver

ASKED = {b"x-request-id": b"order-17"}
INPUT = {"input": 5}
OIP = {"input": {"id": "own", "inputs": [{"name": "X", "datatype": "FP32", "shape": [2], "data": [1, 2]}]}}
Lines = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Lines:
    """The lines of the log as JSON that have these members."""
    caplog.set_level("DEBUG", "penstock")

    def read(**members: Any) -> list[dict[str, Any]]:
        every = [json.loads(JsonFormatter().format(record)) for record in caplog.records]
        return [line for line in every if members.items() <= line.items()]

    return read


async def posted(made: House, path: str, body: Any, headers: dict[bytes, bytes] = ASKED) -> Any:
    got = await made.call("POST", path, body, headers)
    assert got.status in (200, 202), got
    return got.json


def test_whatever_route_a_job_takes_its_run_is_found_by_the_id_of_the_request(tmp_path: Path, lines: Lines) -> None:
    def ran(job: str) -> tuple[str, str]:
        [line] = lines(door="job", job=job)
        return line["status"], line["request_id"]

    async def test(made: House) -> None:
        run, runsync = [await posted(made, f"/v2/h/{word}", INPUT) for word in ("run", "runsync")]
        later = await posted(made, "/v2/endpoints/h/runasync", INPUT)
        now = await posted(made, "/v2/endpoints/h/runsync", INPUT)
        soon = await posted(made, "/v2/endpoints/h/runasync", {**INPUT, "async": False})
        for id in (run["id"], runsync["id"], later["jobId"], now["metadata"]["jobId"], soon["metadata"]["jobId"]):
            await final(made, "h", id)
            assert ran(id) == ("COMPLETED", "order-17")
            [begun] = lines(logger="job_api.worker", message="job begins, attempt 1", job=id)
            assert begun["request_id"] == "order-17"

    run(tmp_path, test, {"h": handler(echo)}, access_log=True)


def test_a_job_of_a_batch_is_found_by_the_request_that_brought_it(tmp_path: Path, lines: Lines) -> None:
    async def test(made: House) -> None:
        batch = (await posted(made, "/v2/h/batch", [INPUT]))["id"]
        path = f"/v2/h/batch/{batch}"
        await posted(made, f"{path}/requests", {"requests": [INPUT, INPUT]}, {b"x-request-id": b"more"})
        await posted(made, f"{path}/finalize", b"", {b"x-request-id": b"last"})
        await made.until(path, lambda batch: batch["requestCompleted"] == 3)
        runs = {line["job"]: line["request_id"] for line in lines(door="job")}
        assert runs == {f"{batch}_0": "order-17", f"{batch}-1_0": "more", f"{batch}-1_1": "more"}

    run(tmp_path, test, {"h": handler(echo)}, access_log=True)


def test_a_request_without_an_id_is_given_one_for_its_answer_its_line_and_its_job(tmp_path: Path, lines: Lines) -> None:
    async def test(made: House) -> None:
        got = await made.call("POST", "/v2/m/runsync", X)
        id = got.headers[b"x-request-id"].decode()
        ran, asked = lines(request_id=id, logger="access")
        assert (ran["door"], ran["job"]) == ("job", got.json["id"])
        assert (asked["door"], asked["path"]) == ("http", "/v2/m/runsync")

    run(tmp_path, test, access_log=True)


def test_without_the_access_log_a_job_has_the_id_that_its_client_gave_or_none(tmp_path: Path, lines: Lines) -> None:
    async def test(made: House) -> None:
        assert b"x-request-id" not in (await made.call("POST", "/v2/m/runsync", X)).headers
        got = await made.call("POST", "/v2/m/runsync", X, {b"x-request-id": b"r" * 300})
        assert got.headers[b"x-request-id"] == b"r" * 300
        store = made.store
        assert isinstance(store, MemoryJobStore)
        kept = [entry.job.request.request_id for entry in store.entries.values()]
        assert kept == ["", "r" * 200]
        assert lines(logger="access") == []

    run(tmp_path, test)


def test_a_run_says_its_job_and_its_request_in_a_line_for_people_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "penstock")

    async def test(made: House) -> None:
        job = (await posted(made, "/v2/m/runsync", X))["id"]
        texts = [Formatter(iso8601=False).format(record).partition("] ")[2] for record in caplog.records]
        [ran] = [text for text in texts if text.startswith("job run - COMPLETED ")]
        assert f" model=m version=- job={job} id=order-17 in=" in ran
        assert f"job begins, attempt 1 [job={job} id=order-17]" in texts

    run(tmp_path, test, access_log=True)


def test_a_model_sees_with_a_job_which_request_handed_it_in(tmp_path: Path) -> None:
    shelf: list[Handler] = []

    def make() -> Handler:
        shelf.append(Handler(echo))
        return shelf[-1]

    async def test(made: House) -> None:
        at_once = await posted(made, "/v2/h/runsync", INPUT)
        claimed = await posted(made, "/v2/h/run", INPUT)
        await final(made, "h", claimed["id"])
        for job, sent in zip((at_once, claimed), shelf[0].seen, strict=True):
            assert sent.job is not None
            assert (sent.job.id, sent.job.request_id) == (job["id"], "order-17")
            assert sent.names == {"job": job["id"], "request_id": "order-17"}

    make.func = Handler  # type: ignore[attr-defined]
    run(tmp_path, test, {"h": make})


@pytest.mark.parametrize(("body", "named"), [(X, ""), (OIP, "own")])
def test_what_a_model_fails_with_is_logged_under_the_job_and_its_request(
    tmp_path: Path, lines: Lines, body: Any, named: str
) -> None:
    def script(batch: Any) -> Any:
        raise ZeroDivisionError("no luck")

    async def test(made: House) -> None:
        job = await posted(made, "/v2/m/runsync", body)
        assert job["status"] == "FAILED"
        [failure] = lines(level="error", job=job["id"])
        assert failure["message"] == f"model m failed on request {named or job['id']}"
        assert failure["request_id"] == "order-17"
        [ended] = lines(logger="job_api.worker", level="debug", request_id="order-17")[1:]
        assert ended["message"].startswith("job FAILED after ")

    run(tmp_path, test, {"m": lambda: ScriptedInstance(script)})


def test_a_lost_worker_and_a_job_put_back_are_logged_with_both_ids(tmp_path: Path, lines: Lines) -> None:
    fates = iter(
        [
            ServingError(Kind.UNAVAILABLE, "the queue is full"),
            *[WorkerLostError("worker lost:\nI am well", blamed=True)] * 2,
        ]
    )

    def script(_: Any, say: Say) -> None:
        say.fail(next(fates))

    async def test(made: House) -> None:
        job = await posted(made, "/v2/h/runsync", INPUT)
        assert (job["status"], job["retries"]) == ("FAILED", 1)
        said = [
            (line["level"], line["message"])
            for line in lines(job=job["id"], request_id="order-17", logger="job_api.worker")
        ]
        assert said == [
            ("debug", "job begins, attempt 1"),
            ("debug", "job put back: the queue is full"),
            ("debug", "job begins, attempt 2"),
            ("warning", "job worker lost:\\nI am well"),
            ("debug", "job begins, attempt 3"),
            ("warning", "job worker lost:\\nI am well"),
        ]
        [ran] = lines(door="job", job=job["id"])
        assert (ran["status"], ran["request_id"]) == ("FAILED", "order-17")

    run(tmp_path, test, {"h": handler(script)}, access_log=True)


def test_an_output_that_cannot_be_written_is_logged_under_the_job_and_its_request(tmp_path: Path, lines: Lines) -> None:
    def script(batch: Any) -> Any:
        return [InferResponse("m", "1", "", ["no tensor"])] * len(batch)  # type: ignore[list-item]

    async def test(made: House) -> None:
        job = await posted(made, "/v2/m/runsync", X)
        assert job["status"] == "FAILED"
        [failure] = lines(level="error", job=job["id"], request_id="order-17")
        assert failure["message"] == "job failed"
        assert "AttributeError" in failure["traceback"]

    run(tmp_path, test, {"m": lambda: ScriptedInstance(script)})


class Faltering(MemoryJobStore):
    """Cannot be reached when a job ends, and then cannot record that."""

    def __init__(self) -> None:
        super().__init__()
        self._failures = iter([ServingError(Kind.UNAVAILABLE, "away"), ServingError(Kind.INTERNAL, "broken")])

    async def finish(self, *_: Any, **__: Any) -> bool:
        raise next(self._failures)


def test_a_result_that_cannot_be_recorded_is_logged_under_the_job_and_its_request(tmp_path: Path, lines: Lines) -> None:
    async def test(made: House) -> None:
        job = (await posted(made, "/v2/m/run", X))["id"]
        await eventually(lambda: lines(level="error"))
        said = [line["message"] for line in lines(job=job, request_id="order-17")]
        assert said[1:] == ["a result could not be recorded yet: away", "how the job ended could not be recorded"]

    run(tmp_path, test, store=Faltering())


def test_a_webhook_that_is_given_up_is_logged_under_the_job_and_its_request(tmp_path: Path, lines: Lines) -> None:
    async def test(made: House) -> None:
        async with receiver(*[b"HTTP/1.1 500 No\r\n\r\n"] * 3) as to:
            job = (await posted(made, "/v2/m/run", {**X, "webhook": to.url}))["id"]
            await eventually(lambda: lines(level="warning"))
            [given_up] = lines(level="warning", job=job, request_id="order-17")
            assert given_up["message"] == "the webhook of a job was given up: status 500"

    run(tmp_path, test, store=Impatient())


def test_a_webhook_bears_the_id_and_so_does_what_is_logged_of_it(tmp_path: Path, lines: Lines) -> None:
    async def test(made: House) -> None:
        async with receiver() as to:
            job = (await posted(made, "/v2/m/run", {**X, "webhook": to.url}))["id"]
            plain = (await posted(made, "/v2/m/run", {**X, "webhook": to.url}, {}))["id"]
            bare = (await posted(made, "/v2/m/run", {**X, "webhook": to.url}, {b"x-request-id": b"\xe9\tx"}))["id"]
            posts = [await to.post() for _ in range(3)]
            told = {post.headers["x-job-id"]: post.headers.get("x-request-id") for post in posts}
            assert told == {job: "order-17", plain: None, bare: None}
            [said] = lines(logger="job_api.webhooks", job=job)
            assert (said["request_id"], said["message"]) == ("order-17", "webhook attempt 1 of 3: status 200")

    run(tmp_path, test)


def test_a_job_that_is_run_again_after_a_restart_is_still_found_by_its_first_request(
    tmp_path: Path, lines: Lines
) -> None:
    url = f"sqlite:{tmp_path / 'jobs.db'}"
    models = tmp_path / "models"

    async def first() -> str:
        says = Says()
        async with house(models, {"h": handler(says.take)}, store=await open_store(url), access_log=True) as made:
            job: str = (await posted(made, "/v2/h/run", INPUT))["id"]
            await says.first()
            return job

    async def second(job: str) -> None:
        async with house(models, {"h": handler(echo)}, store=await open_store(url), access_log=True) as made:
            await final(made, "h", job)

    job = asyncio.run(first())
    asyncio.run(asyncio.wait_for(second(job), LIMIT_S))
    [ran] = lines(door="job", job=job)
    assert (ran["status"], ran["request_id"]) == ("COMPLETED", "order-17")


def test_a_retried_job_keeps_the_id_of_the_request_that_handed_it_in(tmp_path: Path, lines: Lines) -> None:
    outcomes = iter([ServingError(Kind.INVALID, "not yet"), None])

    def script(value: Any, say: Say) -> None:
        if failure := next(outcomes):
            say.fail(failure)
        else:
            say(value)

    async def test(made: House) -> None:
        job = (await posted(made, "/v2/h/runsync", INPUT))["id"]
        await posted(made, f"/v2/h/retry/{job}", b"", {b"x-request-id": b"again"})
        await final(made, "h", job)
        assert [(line["status"], line["request_id"]) for line in lines(door="job", job=job)] == [
            ("FAILED", "order-17"),
            ("COMPLETED", "order-17"),
        ]
        [asked] = lines(request_id="again")
        assert asked["path"] == f"/v2/h/retry/{job}"

    run(tmp_path, test, {"h": handler(script)}, access_log=True)


def test_a_job_from_before_request_ids_were_kept_has_a_line_without_one(tmp_path: Path, lines: Lines) -> None:
    store = MemoryJobStore()

    async def test(made: House) -> None:
        await store.add(Request("old", "h", b"5", 1, 2**52, 10_000, 10_000))
        await final(made, "h", "old")
        [ran] = lines(door="job")
        assert ran["job"] == "old"
        assert "request_id" not in ran
        assert " job=old id=- in=1 out=1" in ran["message"]

    run(tmp_path, test, {"h": handler(echo)}, store=store, access_log=True)


class Broken(MemoryJobStore):
    """Its look-ups fail for a reason that nobody foresaw."""

    async def get(self, *_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("no luck")


def test_a_fault_of_the_server_is_logged_under_the_request(tmp_path: Path, lines: Lines) -> None:
    async def test(made: House) -> None:
        got = await made.call("GET", "/v2/m/status/j", headers=ASKED)
        assert (got.status, got.headers[b"x-request-id"]) == (500, b"order-17")
        [failure] = lines(level="error")
        assert failure["message"] == "GET /v2/m/status/j failed on request order-17"
        assert failure["request_id"] == "order-17"
        assert "ZeroDivisionError" in failure["traceback"]

    run(tmp_path, test, store=Broken())


def test_a_refusal_of_tensorone_s_names_the_request_as_the_log_does(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        got = await made.call("GET", "/v2/jobs/nope/status", headers=ASKED)
        assert (got.status, got.json["request_id"]) == (404, "order-17")

    run(tmp_path, test, {"m": EchoInstance})
