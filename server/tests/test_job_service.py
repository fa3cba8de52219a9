"""Where jobs are kept when nobody says so, and what becomes of the job API where they cannot be."""

import asyncio
from pathlib import Path

import pytest
from penstock.engine import Engine
from penstock.errors import Kind, ServingError
from penstock.job_api.service import default_path, open_service
from penstock.settings import Settings


def test_jobs_lie_in_one_file_for_each_set_of_repositories_and_port() -> None:
    here = Settings(model_repository=("/models", "/more"))
    there = default_path(here, {"XDG_STATE_HOME": "/state"})
    assert there.parent == Path("/state/penstock")
    assert there == default_path(Settings(model_repository=("/more", "/models")), {"XDG_STATE_HOME": "/state"})
    assert there.name == default_path(here, {"HOME": "/home/me"}).name
    assert default_path(here, {"HOME": "/home/me"}).parent == Path("/home/me/.local/state/penstock")
    others = (Settings(model_repository=("/models",)), Settings(model_repository=("/models", "/more"), http_port=1))
    assert there not in [default_path(other, {"XDG_STATE_HOME": "/state"}) for other in others]


def test_the_job_api_can_be_switched_off() -> None:
    async def test() -> None:
        settings = Settings(job_store="none")
        assert await open_service(Engine(settings), settings) is None

    asyncio.run(test())


def test_without_a_place_for_jobs_the_server_does_without_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()

    async def test() -> None:
        settings = Settings()
        environment = {"XDG_STATE_HOME": str(tmp_path / "file")}
        assert await open_service(Engine(settings), settings, environment=environment) is None

    asyncio.run(test())
    [record] = caplog.records
    assert record.getMessage().startswith("no job API: cannot keep jobs in ")


def test_a_store_that_was_named_must_open(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    async def test(url: str, kind: Kind) -> None:
        settings = Settings(job_store=url)
        with pytest.raises(ServingError) as caught:
            await open_service(Engine(settings), settings)
        assert caught.value.kind is kind

    asyncio.run(test(f"sqlite:{tmp_path}/file/jobs.db", Kind.UNAVAILABLE))
    asyncio.run(test("nosuch:thing", Kind.INVALID))


def test_a_setting_that_is_wrong_is_refused(tmp_path: Path) -> None:
    async def test() -> None:
        settings = Settings(job_store=f"sqlite:{tmp_path}/jobs.db", job_rate_limit=("walk=1/2",))
        with pytest.raises(ServingError, match="--job-rate-limit"):
            await open_service(Engine(settings), settings)

    asyncio.run(test())
