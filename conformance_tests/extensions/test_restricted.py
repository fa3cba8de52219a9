"""Restricted groups of methods, of a server that has some: two share a header, one has its own, the others are open."""

import contextlib
import subprocess
from collections.abc import Iterator, Sequence

import grpc as grpcio
import pytest

from conformance_tests.asking import Asker, asking
from conformance_tests.clause_table import clause
from conformance_tests.grpc_wire import GrpcClient, details
from conformance_tests.http_wire import HttpClient
from conformance_tests.server import PENSTOCK, SAMPLES, START_LIMIT_S, Running, penstock

GROUPS = ("inference,statistics:Red-Key=r=1", "health:probe=p")
RED = ("statistics", "infer")
HEALTH = ("live", "ready", "model ready")


@pytest.fixture(scope="module")
def restricted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    if request.config.getoption("--url"):
        pytest.skip("only of a server started here")
    options = [part for group in GROUPS for part in ("--http-restricted-api", group)]
    options += [part for group in GROUPS for part in ("--grpc-restricted-protocol", group)]
    with penstock([SAMPLES], tmp_path_factory.mktemp("restricted") / "server.log", *options) as running:
        yield running


@pytest.fixture(params=["http", "grpc"])
def door(request: pytest.FixtureRequest, restricted: Running) -> Iterator[Asker]:
    """Over each protocol in turn."""
    with asking(restricted, request.param) as asker:
        yield asker


@clause("restricted.header")
@pytest.mark.parametrize("question", [*RED, *HEALTH])
@pytest.mark.parametrize("value", [None, "", "r", "p=1", "R=1"])
def test_a_restricted_group_is_closed_without_its_header(door: Asker, question: str, value: str | None) -> None:
    header = "Red-Key" if question in RED else "probe"
    full = header if door.http is not None else f"triton-grpc-protocol-{header}"
    what = "API" if door.http is not None else "protocol"
    assert door.ask(question, {} if value is None else {full: value}) == (
        door.either(403, "UNAVAILABLE"),
        f"This {what} is restricted, expecting header '{full}'",
    )
    assert door.ask(question, {full: "r=1" if question in RED else "p"}) == door.ok


@clause("restricted.others_open")
def test_groups_that_are_not_restricted_stay_open(door: Asker) -> None:
    for question in ("server", "metadata", "config"):
        assert door.ask(question) == door.ok


@clause("restricted.header")
@pytest.mark.over("http")
def test_the_header_is_asked_for_before_the_method_is_looked_at(restricted: Running) -> None:
    assert HttpClient(restricted.http).get("/v2/models/simple/infer").status == 403


@clause("restricted.header")
@pytest.mark.over("grpc")
def test_the_standard_health_service_is_in_the_group_health(restricted: Running) -> None:
    with contextlib.closing(GrpcClient(restricted.grpc)) as client, pytest.raises(grpcio.RpcError) as caught:
        client.health("")
    assert details(caught.value) == "This protocol is restricted, expecting header 'triton-grpc-protocol-probe'"


@clause("restricted.header")
@pytest.mark.over("http", "grpc")
@pytest.mark.parametrize(
    ("flag", "what"), [("--http-restricted-api", "api"), ("--grpc-restricted-protocol", "protocol")]
)
@pytest.mark.parametrize(
    ("groups", "text"),
    [
        (["nope:k=v"], "unknown restricted {} 'nope'"),
        (["trace:k=v", "health,trace:q=w"], "restricted {} 'trace' can not be specified in multiple config groups"),
    ],
)
def test_a_group_that_makes_no_sense_stops_the_start(
    request: pytest.FixtureRequest, flag: str, what: str, groups: Sequence[str], text: str
) -> None:
    if request.config.getoption("--url"):
        pytest.skip("only of a server started here")
    command = [str(PENSTOCK), "serve", str(SAMPLES), *(part for group in groups for part in (flag, group))]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=START_LIMIT_S)
    assert ended.returncode == 1
    assert text.format(what) in ended.stderr
