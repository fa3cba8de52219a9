"""Pytest plugin of the suites written in Python: where the server under test answers.

A suite runs in an environment of its own, which knows nothing of Penstock; `run.py` tells it the addresses.
"""

import functools
import os
import urllib.error
import urllib.request

import pytest

LIMIT_S = 30.0


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(*models): the models that the test calls")


@pytest.fixture(scope="session")
def url() -> str:
    """Where HTTP is answered, such as http://127.0.0.1:8000."""
    return os.environ["SERVER_URL"]


@pytest.fixture(scope="session")
def grpc_address() -> str:
    """Where gRPC is answered, such as 127.0.0.1:8001."""
    return os.environ["SERVER_GRPC"]


@pytest.fixture(autouse=True)
def models(request: pytest.FixtureRequest, url: str) -> None:
    """Skip the test if the server lacks one of its models; the one that `run.py` starts has them all."""
    for marker in request.node.iter_markers("needs"):
        for model in marker.args:
            if not _serves(url, model):
                pytest.skip(f"this server has no model '{model}'")


@functools.cache
def _serves(url: str, model: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/v2/models/{model}/ready", timeout=LIMIT_S) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError:
        return False
