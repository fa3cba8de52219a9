"""What is said of a job store that cannot be opened."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from penstock.errors import Kind, ServingError
from penstock.job_api.store import open_store


@pytest.mark.parametrize("url", ["", "sqlite:", "jobs.db", "mysql://host/db", "redis", "postgresql"])
def test_an_unknown_store_is_refused(url: str) -> None:
    with pytest.raises(ServingError, match=f"job store '{url}': expected sqlite:PATH") as refused:
        asyncio.run(open_store(url))
    assert refused.value.kind is Kind.INVALID


@pytest.mark.parametrize(("url", "package"), [("redis://h:6379/0", "redis"), ("postgresql://h/jobs", "asyncpg")])
def test_a_store_whose_package_is_missing_says_how_to_get_it(url: str, package: str) -> None:
    script = f"""if True:
        import asyncio, sys
        sys.modules[{package!r}] = None
        from penstock.job_api.store import open_store
        asyncio.run(open_store({url!r}))
    """
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parent)
    extra = url.partition(":")[0].replace("postgresql", "postgres")
    assert f"needs the package {package}: pip install 'penstock[{extra}]'" in ended.stderr


@pytest.mark.parametrize("url", ["redis://:hidden@127.0.0.1:1/0", "postgresql://u:hidden@127.0.0.1:1/jobs"])
def test_a_store_that_does_not_answer_is_unavailable_and_its_password_unsaid(url: str) -> None:
    pytest.importorskip("redis")
    pytest.importorskip("asyncpg")
    with pytest.raises(ServingError, match=r"job store (redis|postgresql)://127\.0\.0\.1:1/") as refused:
        asyncio.run(open_store(url))
    assert refused.value.kind is Kind.UNAVAILABLE
    assert "hidden" not in refused.value.message
