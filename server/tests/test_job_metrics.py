"""What the metrics port shows of jobs: the store's counters, and how attempts at webhooks went."""

import asyncio
from collections.abc import Mapping
from pathlib import Path

from penstock.errors import Kind, ServingError
from penstock.http_api import MetricsApp
from penstock.job_api.metrics import DELIVERED, FAILED, GIVEN_UP, render
from penstock.job_api.store import Counts

from .fakes import LIMIT_S, EchoInstance
from .fakes_job_door import House, X, echo, final, handler, house, run
from .fakes_jobs import MemoryJobStore


def series(text: bytes) -> dict[str, float]:
    """Every series by its name and labels."""
    lines = [line.rpartition(" ") for line in text.decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


def test_every_counter_has_a_series_for_each_endpoint() -> None:
    text = render({"a": Counts(1, 2, 3, 4, 5, 6, 7, 28), "b": Counts()}, {("a", DELIVERED): 8, ("a", GIVEN_UP): 9})
    found = series(text)
    assert {name: value for name, value in found.items() if 'model="a"' in name} == {
        'penstock_jobs{model="a",state="IN_QUEUE"}': 1,
        'penstock_jobs{model="a",state="IN_PROGRESS"}': 2,
        'penstock_jobs_ended_total{model="a",state="COMPLETED"}': 3,
        'penstock_jobs_ended_total{model="a",state="FAILED"}': 4,
        'penstock_jobs_ended_total{model="a",state="CANCELLED"}': 5,
        'penstock_jobs_ended_total{model="a",state="TIMED_OUT"}': 6,
        'penstock_jobs_retried_total{model="a"}': 7,
        'penstock_jobs_accepted_total{model="a"}': 28,
        'penstock_jobs_webhook_attempts_total{model="a",result="delivered"}': 8,
        'penstock_jobs_webhook_attempts_total{model="a",result="failed"}': 0,
        'penstock_jobs_webhook_attempts_total{model="a",result="given_up"}': 9,
    }
    others = {name: value for name, value in found.items() if 'model="a"' not in name}
    assert others.pop("penstock_jobs_store_up") == 1
    assert {*others} == {name.replace('"a"', '"b"') for name in found if 'model="a"' in name}
    assert not any(others.values())


def test_each_family_has_its_head_once_and_before_its_series() -> None:
    lines = render({"a": Counts(), "b": Counts()}, {}).decode().splitlines()
    names = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert names == [line.split()[2] for line in lines if line.startswith("# HELP")]
    assert len({*names}) == len(names)
    of = [line.partition("{")[0].split()[0] for line in lines if not line.startswith("#")]
    assert list(dict.fromkeys(of)) == names


def test_without_endpoints_only_the_store_is_told() -> None:
    assert [*series(render({}, {}))] == ["penstock_jobs_store_up"]


def test_the_metrics_port_shows_jobs_beside_models(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        job = await made.post("/v2/echo/run", {"input": {"x": 1}})
        assert (await final(made, "echo", job["id"]))["status"] == "COMPLETED"
        sent: list[Mapping[str, object]] = []

        async def receive() -> dict[str, object]:
            return {"type": "http.disconnect"}

        async def send(message: Mapping[str, object]) -> None:
            sent.append(message)

        app = MetricsApp(made.engine, more=made.service.metrics)
        scope = {"type": "http", "method": "GET", "path": "/metrics", "headers": []}
        await asyncio.wait_for(app(scope, receive, send), LIMIT_S)
        start, body = sent
        assert start["status"] == 200
        assert isinstance(body["body"], bytes)
        found = series(body["body"])
        assert found['penstock_jobs_accepted_total{model="echo"}'] == 1
        assert found['penstock_jobs_ended_total{model="echo",state="COMPLETED"}'] == 1
        assert found['penstock_jobs_accepted_total{model="m"}'] == 0, "it is served, and had no job"
        assert found['nv_inference_request_success{model="echo",version="1"}'] == 1

    run(tmp_path, test, {"echo": handler(echo), "m": EchoInstance})


def test_what_a_batch_is_stored_as_is_no_endpoint(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        await made.post("/v2/m/batch", [{"input": X}])
        assert not [name for name in series(await made.service.metrics()) if "/" in name]

    run(tmp_path, test)


class Unreachable(MemoryJobStore):
    """Has no counters to show."""

    async def totals(self) -> Mapping[str, Counts]:
        raise ServingError(Kind.UNAVAILABLE, "away")


def test_a_store_that_does_not_answer_is_told(tmp_path: Path) -> None:
    async def test() -> None:
        async with house(tmp_path, store=Unreachable()) as made:
            assert series(await made.service.metrics()) == {"penstock_jobs_store_up": 0}

    asyncio.run(test())


def test_attempts_are_shown_also_while_the_store_is_away() -> None:
    found = series(render(None, {("a", FAILED): 1}))
    assert found["penstock_jobs_store_up"] == 0
    assert found['penstock_jobs_webhook_attempts_total{model="a",result="failed"}'] == 1
