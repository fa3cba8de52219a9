"""A few cases of each kind, always the same; `python -m conformance_tests.fuzz` sends many."""

from pathlib import Path

import pytest

from conformance_tests.carriers import Carrier, infer, simple
from conformance_tests.clause_table import clause
from conformance_tests.fuzz import footprint
from conformance_tests.fuzz.calls import MODELS
from conformance_tests.fuzz.campaign import KINDS, Unit, run
from conformance_tests.grpc_wire import GrpcClient
from conformance_tests.http_wire import HttpClient
from conformance_tests.server import Target

needs = pytest.mark.needs(*MODELS)
CASES = {"http-bytes": 200, "http2-bytes": 200, "json": 250, "binary": 250}  # the others are quick
SEED = 2

HTTP = [
    pytest.param("json", marks=clause("fuzz.json")),
    pytest.param("json-bytes", marks=clause("fuzz.json")),
    pytest.param("binary", marks=clause("fuzz.binary")),
    pytest.param("binary-bytes", marks=clause("fuzz.binary")),
    pytest.param("http-bytes", marks=clause("fuzz.http")),
]
GRPC = [
    pytest.param("message", marks=clause("fuzz.message")),
    pytest.param("message-bytes", marks=clause("fuzz.message")),
    pytest.param("control-bytes", marks=clause("fuzz.control")),
    pytest.param("http2-bytes", marks=clause("fuzz.http2")),
]


def fuzz(kind: str, target: Target, directory: Path, cases: int = 0) -> None:
    tally = run(Unit(kind, SEED, cases or CASES.get(kind, 500)), target.http, target.grpc, directory)
    assert tally.failures == [], "\n".join(tally.report())
    assert len(tally.statuses) > 1, "all cases were answered alike"


@needs
@pytest.mark.parametrize("kind", HTTP)
def test_no_request_over_http_is_answered_amiss(http: HttpClient, target: Target, tmp_path: Path, kind: str) -> None:
    fuzz(kind, target, tmp_path)


@needs
@pytest.mark.parametrize("kind", GRPC)
def test_no_message_over_grpc_is_answered_amiss(grpc: GrpcClient, target: Target, tmp_path: Path, kind: str) -> None:
    fuzz(kind, target, tmp_path)


@clause("fuzz.footprint")
@needs
@pytest.mark.over("http", "grpc")
def test_the_server_gives_back_what_bad_requests_took(target: Target, tmp_path: Path) -> None:
    if target.running is None or not target.grpc:
        pytest.skip("only of a server started here")
    pid = target.running.process.pid
    for kind in KINDS:  # the first time, so that pools are full and lazy parts are loaded
        fuzz(kind, target, tmp_path, 40)
    before = footprint.measure(pid)
    for kind in KINDS:
        fuzz(kind, target, tmp_path, 40)
    after = footprint.settled(pid, before, lambda: HttpClient(target.http).get("/v2"))
    assert footprint.growth(before, after) == []


@clause("fuzz.serves")
@needs
def test_a_good_request_is_answered_after_bad_ones(carrier: Carrier, target: Target, tmp_path: Path) -> None:
    for kind in ("json-bytes", *(["message"] if target.grpc else [])):
        fuzz(kind, target, tmp_path, 40)
    assert infer(carrier, simple())["OUTPUT0"][0].tolist() == [*range(1, 17)]
