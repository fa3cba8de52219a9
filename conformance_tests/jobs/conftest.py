"""The server with an endpoint for each kind of handler, and a receiver for its webhooks."""

import subprocess
from collections.abc import Callable, Iterator

import pytest

from conformance_tests.jobs.client import Endpoint, Receiver
from conformance_tests.server import HANDLERS, PENSTOCK, SAMPLES, START_LIMIT_S, Running, penstock

Open = Callable[[str], Endpoint]


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of ours with job endpoints beside models that are none of their own making."""
    if request.config.getoption("--url"):
        pytest.skip("only of a server started here")
    folder = tmp_path_factory.mktemp("jobs")
    options = ["--job-store", f"sqlite:{folder / 'jobs.db'}", "--webhook-allow-private"]
    with penstock([SAMPLES, HANDLERS], folder / "server.log", *options) as running:
        yield running


@pytest.fixture
def endpoint(server: Running) -> Open:
    """Endpoints of that server by name."""
    return lambda name: Endpoint(server.http, name)


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    """Answers 200 but where the path is a status."""
    with Receiver(lambda post: int(post.path[1:4]) if post.path[1:4].isdecimal() else 200) as receiver:
        yield receiver


@pytest.fixture(scope="session")
def keyed(server: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, str]]:
    """A server that asks for API keys, and one that opens its jobs."""
    folder = tmp_path_factory.mktemp("keyed")
    keys = ["--api-keys", str(folder / "keys.json")]
    added = subprocess.run(
        [str(PENSTOCK), "keys", "add", *keys, "--name", "jobs", "--scopes", "jobs"],
        check=True, capture_output=True, text=True, timeout=START_LIMIT_S,
    )  # fmt: skip
    with penstock([HANDLERS / "job_echo"], folder / "server.log", *keys) as running:
        yield running, added.stdout.splitlines()[-1]


@pytest.fixture(scope="session")
def limited(server: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with limits on its queues and rates, which clamps times in policies."""
    options = "--job-queue-limit 1 --job-rate-limit health=2/600 --job-policy-bounds clamp"
    models = [HANDLERS / name for name in ("job_echo", "job_slow")]
    with penstock(models, tmp_path_factory.mktemp("limited") / "server.log", *options.split()) as running:
        yield running
