"""The server under test and a client for each protocol.

Without options a server is started for the whole run, on the sample models and on fixtures made on the spot. With
`--url` and `--grpc` a server that runs is tested as it is: tests of models that it does not have are skipped, and
their clauses remain not yet tested.
"""

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path

import pytest

from conformance_tests.carriers import Carrier, GrpcRaw, GrpcTyped, HttpBinary, HttpJson
from conformance_tests.doors import Door, GrpcDoor, HttpDoor
from conformance_tests.grpc_wire import GrpcClient
from conformance_tests.http_wire import HttpClient
from conformance_tests.models.fixtures import make_broken_fixtures, make_fixtures
from conformance_tests.server import SAMPLES, Running, StartServer, Target, penstock

pytest_plugins = ("conformance_tests.clause_table",)

LOG_LIMIT_BYTES = 20_000
LOG = pytest.StashKey[Path]()
LOG_START = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("conformance")
    group.addoption("--url", help="test the server that answers HTTP here, such as http://localhost:8000")
    group.addoption("--grpc", help="where that server answers gRPC, such as localhost:8001")
    group.addoption("--serve", action="append", default=[], metavar="OPTION", help="start the server with this option")
    group.addoption("--metrics", help="where that server tells its metrics, such as http://localhost:8002")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(*models): the models that the test calls")
    if config.getoption("--url") and config.getoption("--serve"):
        raise pytest.UsageError("--serve is for a server started here, and --url names one that runs")
    if (config.getoption("--grpc") or config.getoption("--metrics")) and not config.getoption("--url"):
        raise pytest.UsageError("--grpc and --metrics need --url")


@pytest.fixture(scope="session")
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    if url := request.config.getoption("--url"):
        grpc, metrics = (request.config.getoption(name) or "" for name in ("--grpc", "--metrics"))
        yield Target(url.rstrip("/"), grpc, metrics.rstrip("/"))
        return
    fixtures = tmp_path_factory.mktemp("fixtures")
    make_fixtures(fixtures)
    log = tmp_path_factory.mktemp("log") / "server.log"
    request.config.stash[LOG] = log
    with contextlib.ExitStack() as server:
        try:
            options = ("--exit-on-error", "false", "--cache-config", "local,size=1000000")
            chosen = request.config.getoption("--serve")
            running = server.enter_context(penstock([SAMPLES, fixtures], log, *options, *chosen))
        except RuntimeError as error:
            pytest.exit(str(error), 1)  # once, and not once for each test
        yield Target(running.http, running.grpc, running.metrics, running)


@pytest.fixture
def process(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StartServer]:
    """Starts a server for one test alone: repositories, then options. Ended with the test where it still runs."""
    if request.config.getoption("--url"):
        pytest.skip("only of a server started here")
    with contextlib.ExitStack() as servers:

        def start(repositories: Sequence[Path], *options: str) -> Running:
            chosen = request.config.getoption("--serve")
            return servers.enter_context(penstock(repositories, tmp_path / "server.log", *chosen, *options))

        yield start


@pytest.fixture(scope="session")
def broken(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A second server of ours: beside the samples it has been given models that do not load."""
    if request.config.getoption("--url"):
        pytest.skip("only of a server started here")
    models = tmp_path_factory.mktemp("broken")
    make_broken_fixtures(models)
    log = tmp_path_factory.mktemp("log") / "broken.log"
    with penstock([SAMPLES, models], log, "--exit-on-error", "false", *request.config.getoption("--serve")) as running:
        yield running


@pytest.fixture(autouse=True)
def _needs(request: pytest.FixtureRequest) -> None:
    if "target" in request.fixturenames:
        target: Target = request.getfixturevalue("target")
        for marker in request.node.iter_markers("needs"):
            for model in marker.args:
                target.require(model)


@pytest.fixture
def http(target: Target) -> HttpClient:
    return HttpClient(target.http)


@pytest.fixture
def http_metrics(target: Target) -> HttpClient:
    """A client of the metrics port."""
    if not target.metrics:
        pytest.skip("no --metrics was given")
    return HttpClient(target.metrics)


@pytest.fixture(scope="session")
def grpc(target: Target) -> Iterator[GrpcClient]:
    if not target.grpc:
        pytest.skip("no --grpc was given")
    client = GrpcClient(target.grpc)
    yield client
    client.close()


@pytest.fixture(params=["http", "grpc"])
def door(request: pytest.FixtureRequest, target: Target) -> Door:
    """Each protocol in turn, for what both can be asked."""
    client = request.getfixturevalue(request.param)
    return HttpDoor(client) if request.param == "http" else GrpcDoor(client)


@pytest.fixture(params=["http", "grpc"])
def broken_door(request: pytest.FixtureRequest, broken: Running) -> Iterator[Door]:
    if request.param == "http":
        yield HttpDoor(HttpClient(broken.http))
    else:
        with contextlib.closing(GrpcClient(broken.grpc)) as client:
            yield GrpcDoor(client)


CARRIERS: dict[str, Callable[[pytest.FixtureRequest], Carrier]] = {
    "http-json": lambda request: HttpJson(request.getfixturevalue("http")),
    "http-binary": lambda request: HttpBinary(request.getfixturevalue("http")),
    "grpc-raw": lambda request: GrpcRaw(request.getfixturevalue("grpc")),
    "grpc-typed": lambda request: GrpcTyped(request.getfixturevalue("grpc")),
}


@pytest.fixture(params=[*CARRIERS])
def carrier(request: pytest.FixtureRequest, target: Target) -> Carrier:
    """Each way to carry an inference, in turn."""
    return CARRIERS[request.param](request)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    log = item.config.stash.get(LOG, None)
    item.stash[LOG_START] = log.stat().st_size if log is not None else 0
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What the server logged during a test is shown where it fails."""
    report = yield
    log = item.config.stash.get(LOG, None)
    if report.failed and log is not None:
        with log.open("rb") as file:
            file.seek(max(item.stash[LOG_START], log.stat().st_size - LOG_LIMIT_BYTES))
            if text := file.read().decode(errors="replace"):
                report.sections.append(("server log", text))
    return report
