"""RunPod's Python SDK, synchronous and asyncio: its base URL is another, as its own variable says, and nothing else."""

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Any

# Read when the package is imported.
os.environ["RUNPOD_ENDPOINT_BASE_URL"] = f"{os.environ['SERVER_URL']}/v2"

import pytest
import requests  # type: ignore[import-untyped]
import runpod
from runpod import AsyncioEndpoint
from runpod.http_client import AsyncClientSession

KEY = "a-key"
LIMIT_S = 60
LOOK_S = 0.05
LONG = {"seconds": 60}
COUNTS = {"jobs": {"completed", "failed", "inProgress", "inQueue", "retried"}, "workers": {"idle", "running"}}


def endpoint(name: str) -> Any:
    return runpod.Endpoint(name, api_key=KEY)


async def leaves(job: Any, *states: str) -> str:
    """The first state of a job of either client that is none of these."""
    async with asyncio.timeout(LIMIT_S):
        while (state := await told(job.status())) in states:  # noqa: ASYNC110 - nothing but asking tells
            await asyncio.sleep(LOOK_S)
    return str(state)


async def ends(job: Any) -> str:
    return await leaves(job, "IN_QUEUE", "IN_PROGRESS")


async def runs(job: Any) -> None:
    await leaves(job, "IN_QUEUE")


async def told(answer: Any) -> Any:
    return await answer if asyncio.iscoroutine(answer) else answer


# -- the synchronous client


@pytest.mark.needs("job_echo")
def test_run_gives_a_job_whose_output_can_be_waited_for() -> None:
    job = endpoint("job_echo").run({"text": "wässer"})
    assert job.output(timeout=LIMIT_S) == {"text": "wässer"}
    assert job.status() == "COMPLETED"
    assert job.output() == {"text": "wässer"}


@pytest.mark.needs("job_echo")
def test_run_wraps_an_input_once() -> None:
    assert endpoint("job_echo").run_sync({"input": {"text": "a"}}) == {"text": "a"}
    assert endpoint("job_echo").run_sync({"text": "a"}) == {"text": "a"}


@pytest.mark.needs("simple")
def test_run_sync_of_a_model_with_a_signature() -> None:
    output = endpoint("simple").run_sync({"INPUT0": [[*range(16)]], "INPUT1": [[1] * 16]})
    assert output["OUTPUT0"] == [[*range(1, 17)]]


@pytest.mark.needs("job_async")
def test_run_sync_polls_where_the_answer_is_not_final_yet() -> None:
    assert endpoint("job_async").run_sync({"seconds": 1.5}) == {"seconds": 1.5}


@pytest.mark.needs("job_failing")
def test_a_failed_job_has_no_output_and_says_so() -> None:
    assert endpoint("job_failing").run_sync({"how": "raise"}) is None
    job = endpoint("job_failing").run({"how": "raise"})
    job.output(timeout=LIMIT_S)
    assert job.status() == "FAILED"


@pytest.mark.needs("job_async")
def test_output_is_not_waited_for_longer_than_asked() -> None:
    job = endpoint("job_async").run(LONG)
    assert job.output() is None
    with pytest.raises(TimeoutError, match=r"Job timed out\."):
        job.output(timeout=1)
    assert job.cancel()["status"] == "CANCELLED"


@pytest.mark.needs("job_async")
def test_run_sync_ends_with_its_timeout() -> None:
    with pytest.raises(requests.exceptions.ReadTimeout):
        endpoint("job_async").run_sync({"seconds": 2}, timeout=1)


@pytest.mark.needs("job_stream")
@pytest.mark.parametrize("seconds", [0, 0.1])
def test_a_stream_gives_every_value_once_and_ends(seconds: float) -> None:
    job = endpoint("job_stream").run({"count": 25, "seconds": seconds})
    assert [*job.stream()] == [*range(25)]
    assert job.output() == [*range(25)]


@pytest.mark.needs("job_echo")
def test_a_stream_of_no_generator_is_empty() -> None:
    assert [*endpoint("job_echo").run({"text": "a"}).stream()] == []


@pytest.mark.needs("job_slow")
def test_cancel_ends_a_running_job() -> None:
    job = endpoint("job_slow").run(LONG)
    asyncio.run(runs(job))
    cancelled = job.cancel()
    assert (cancelled["id"], cancelled["status"]) == (job.job_id, "CANCELLED")
    assert job.status() == "CANCELLED"
    assert job.output(timeout=LIMIT_S) is None


@pytest.mark.needs("job_slow")
def test_purge_queue_removes_what_waits() -> None:
    slow = endpoint("job_slow")
    running = slow.run(LONG)
    asyncio.run(runs(running))
    waiting = [slow.run(LONG) for _ in range(3)]
    assert slow.purge_queue() == {"removed": 3, "status": "completed"}
    assert [job.status() for job in waiting] == ["CANCELLED"] * 3
    assert running.cancel()["status"] == "CANCELLED"


@pytest.mark.needs("job_echo")
def test_health_counts_jobs_and_workers() -> None:
    health = endpoint("job_echo").health()
    for part, names in COUNTS.items():
        assert names <= {*health[part]}
        assert all(type(number) is int for number in health[part].values())


@pytest.mark.needs("job_echo")
@pytest.mark.parametrize(
    ("name", "request_", "status"),
    [("nope", {"a": 1}, 404), ("job_echo", {"input": {"a": 1}, "policy": {"ttl": 1}}, 400)],
)
def test_a_refusal_is_an_http_error(name: str, request_: dict[str, Any], status: int) -> None:
    for ask in (endpoint(name).run, endpoint(name).run_sync):
        with pytest.raises(requests.HTTPError) as caught:
            ask(request_)
        assert caught.value.response.status_code == status


@pytest.mark.needs("job_slow")
def test_a_policy_times_a_job_out() -> None:
    job = endpoint("job_slow").run({"input": LONG, "policy": {"executionTimeout": 5000}})
    assert job.output(timeout=LIMIT_S) is None
    assert job.status() == "TIMED_OUT"


# -- the asyncio client


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def session() -> AsyncIterator[Any]:
    async with AsyncClientSession() as session:
        yield session


@pytest.mark.anyio
@pytest.mark.needs("job_echo")
async def test_asyncio_run_and_output(session: Any) -> None:
    job = await AsyncioEndpoint("job_echo", session, api_key=KEY).run({"text": "a"})
    assert await job.output(timeout=LIMIT_S) == {"text": "a"}
    assert await job.status() == "COMPLETED"


@pytest.mark.anyio
@pytest.mark.needs("job_echo", "simple")
async def test_asyncio_run_wraps_an_input_always(session: Any) -> None:
    job = await AsyncioEndpoint("job_echo", session, api_key=KEY).run({"input": {"text": "a"}})
    assert await job.output(timeout=LIMIT_S) == {"input": {"text": "a"}}
    given = {"input": {"INPUT0": [[*range(16)]], "INPUT1": [[1] * 16]}}
    job = await AsyncioEndpoint("simple", session, api_key=KEY).run(given)
    assert (await job.output(timeout=LIMIT_S))["OUTPUT0"] == [[*range(1, 17)]]


@pytest.mark.anyio
@pytest.mark.needs("job_echo")
async def test_asyncio_takes_an_empty_input(session: Any) -> None:
    job = await AsyncioEndpoint("job_echo", session, api_key=KEY).run({})
    assert await ends(job) == "COMPLETED"


@pytest.mark.anyio
@pytest.mark.needs("job_stream")
async def test_asyncio_streams(session: Any) -> None:
    job = await AsyncioEndpoint("job_stream", session, api_key=KEY).run({"count": 25, "seconds": 0.1})
    assert [value async for value in job.stream()] == [*range(25)]


@pytest.mark.anyio
@pytest.mark.needs("job_async")
async def test_asyncio_output_times_out_and_the_job_can_be_cancelled(session: Any) -> None:
    job = await AsyncioEndpoint("job_async", session, api_key=KEY).run(LONG)
    await runs(job)
    with pytest.raises(TimeoutError):
        await job.output(timeout=1)
    assert (await job.cancel())["status"] == "CANCELLED"
    assert await job.status() == "CANCELLED"


@pytest.mark.anyio
@pytest.mark.needs("job_slow")
async def test_asyncio_purges_and_tells_health(session: Any) -> None:
    slow = AsyncioEndpoint("job_slow", session, api_key=KEY)
    running = await slow.run(LONG)
    await runs(running)
    waiting = [await slow.run(LONG) for _ in range(2)]
    assert (await slow.health())["jobs"]["inQueue"] == 2
    assert await slow.purge_queue() == {"removed": 2, "status": "completed"}
    assert [await job.status() for job in waiting] == ["CANCELLED"] * 2
    await running.cancel()


@pytest.mark.anyio
async def test_asyncio_takes_no_refusal_for_a_job(session: Any) -> None:
    with pytest.raises(KeyError):
        await AsyncioEndpoint("nope", session, api_key=KEY).run({"a": 1})
    assert "status" not in await AsyncioEndpoint("nope", session, api_key=KEY).health()


@pytest.mark.anyio
@pytest.mark.needs("job_async")
async def test_asyncio_runs_many_jobs_at_once(session: Any) -> None:
    waits = AsyncioEndpoint("job_async", session, api_key=KEY)
    jobs = await asyncio.gather(*(waits.run({"seconds": 0, "number": number}) for number in range(50)))
    outputs = await asyncio.gather(*(job.output(timeout=LIMIT_S) for job in jobs))
    assert [output["number"] for output in outputs] == [*range(50)]
