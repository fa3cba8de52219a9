"""The load generator from end to end, against servers on the loopback: the constant answer, gRPC, an engine."""

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
import uvloop
from penstock.bench.load import Load
from penstock.bench.local import LocalTarget
from penstock.bench.measure import Result, Target, measure
from penstock.bench.over_grpc import GrpcTarget
from penstock.bench.report import table
from penstock.cli import main
from penstock.engine import Engine
from penstock.errors import Kind, ServingError
from penstock.messages import InferRequest
from penstock.model import Model
from penstock.settings import Settings

from . import fakes

LIMIT_S = 30.0  # of a whole test: nothing in it takes long, but a lost answer must not hang it


def run(test: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(test, LIMIT_S))


@pytest.fixture(scope="module")
def reference() -> Iterator[tuple[str, int]]:
    """URL and process of a server with a constant answer."""
    command = [sys.executable, "-m", "penstock.bench.reference"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["http"], process.pid
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_S) == 0


def test_a_closed_loop_is_measured_over_http(reference: tuple[str, int], capsys: pytest.CaptureFixture[str]) -> None:
    url, pid = reference
    status = main(
        ["bench", "simple", "--url", url, "--protocol", "http-binary,http-json", "--concurrency", "1,3",
         "--requests", "60", "--warmup", "0", "--json"]
    )  # fmt: skip
    assert status == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["model"], document["client"]) == ("simple", "penstock bench")
    results = document["results"]
    assert [(result["protocol"], result["concurrency"]) for result in results] == [
        ("http-binary", 1), ("http-binary", 3), ("http-json", 1), ("http-json", 3),
    ]  # fmt: skip
    for result in results:
        assert (result["requests"], result["errors"], result["rate"]) == (60, 0, 0)
        assert 0 < result["p50_us"] <= result["p90_us"] <= result["p99_us"] <= result["max_us"]
        assert result["server"].endswith(f" {pid}")
        assert result["server_cpu_us"] > 0
        assert result["client_cpu_share"] > 0


def test_an_open_loop_is_measured_over_http(reference: tuple[str, int], capsys: pytest.CaptureFixture[str]) -> None:
    url, pid = reference
    status = main(
        ["bench", "simple", "--url", url, "--rate", "2000", "--duration", "0.05", "--arrivals", "even",
         "--warmup", "0.01", "--rows", "4", "--server-pid", str(pid)]
    )  # fmt: skip
    assert status == 0
    head, row, *notes = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["protocol", "load", "req/s"]
    assert row.split()[:2] == ["http-binary", "2000/s"]
    assert notes[0].startswith("server CPU per request is that of process ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shape", "INPUT7:1"], "model 'simple' has no input 'INPUT7'; its inputs are: INPUT0, INPUT1"),
        (["--protocol", "local"], "--protocol local needs --local PATH"),
        (["--data", "x.npz", "--rows", "2"], "--data brings its own shapes: it excludes --rows and --shape"),
        (["--server-pid", "99999999"], "there is no process 99999999"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    reference: tuple[str, int], capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["bench", "simple", "--url", reference[0], *options]) == 1
    assert capsys.readouterr().err == f"penstock: {message}\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--concurrency", "1,0"], "expected a positive whole number, got '0'"),
        (["--duration", "inf"], "expected a positive number, got 'inf'"),
        (["--warmup", "-1"], "expected a number from 0, got '-1'"),
        (["--protocol", "http"], "expected one of http-binary, http-json, grpc, local, got 'http'"),
        (["--shape", "INPUT0"], "expected NAME:DIM,DIM,... such as INPUT0:1,16, got 'INPUT0'"),
    ],
)
def test_options_are_checked_before_anything_is_sent(
    capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as refusal:
        main(["bench", "simple", *options])
    assert refusal.value.code == 2
    assert message in capsys.readouterr().err


class Generic(grpc.GenericRpcHandler):
    """Answers the calls of any method, all of them with the function."""

    def __init__(self, answer: Callable[[bytes, Any], Any]) -> None:
        self._answer = answer

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[bytes, bytes]":
        return grpc.unary_unary_rpc_method_handler(self._answer)


@asynccontextmanager
async def grpc_target(answer: Callable[[bytes, Any], Any]) -> AsyncIterator[GrpcTarget]:
    server = grpc.aio.server(handlers=(Generic(answer),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    target = GrpcTarget(f"127.0.0.1:{port}")
    try:
        yield target
    finally:
        await target.close()
        await server.stop(None)


async def measured(target: Target, load: Load) -> Result:
    return await measure(target, "grpc", fakes.request(1.0, 2.0), load, 0.0, target.server_pids())


def test_grpc_sends_the_same_bytes_over_and_over() -> None:
    bodies = []

    async def answer(body: bytes, context: "grpc.aio.ServicerContext[bytes, bytes]") -> bytes:
        bodies.append(body)
        return b"not read by the client"

    async def test() -> None:
        async with grpc_target(answer) as target:
            result = await measured(target, Load(4, requests=40))
        assert (result.requests, result.errors) == (40, 0)
        assert len(bodies) == 41  # one goes before, to see that it is answered
        assert len(set(bodies)) == 1

    run(test())


def test_errors_are_counted_and_the_first_is_shown() -> None:
    calls = 0

    async def answer(body: bytes, context: "grpc.aio.ServicerContext[bytes, bytes]") -> bytes:
        nonlocal calls
        calls += 1
        if calls % 4 == 0:
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"queue\nfull at {calls}")
        return b""

    async def test() -> None:
        async with grpc_target(answer) as target:
            result = await measured(target, Load(1, requests=9))
        assert (result.requests, result.errors, result.first_error) == (7, 2, "UNAVAILABLE queue full at 4")
        assert "2 requests failed, the first: UNAVAILABLE queue full at 4" in table([result])

    run(test())


def test_nothing_is_measured_where_the_first_request_fails() -> None:
    async def answer(body: bytes, context: "grpc.aio.ServicerContext[bytes, bytes]") -> bytes:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "wrong shape")

    async def test() -> None:
        async with grpc_target(answer) as target:
            with pytest.raises(ServingError) as failure:
                await measured(target, Load(1, requests=9))
        assert failure.value.message == "the first request failed: INVALID_ARGUMENT wrong shape"

    run(test())


def test_a_server_that_never_answers_does_not_hold_the_client() -> None:
    async def answer(body: bytes, context: "grpc.aio.ServicerContext[bytes, bytes]") -> bytes:
        await asyncio.Event().wait()
        return b""

    async def test() -> None:
        async with grpc_target(answer) as target:
            with pytest.raises(ServingError) as failure:
                await measured(target, Load(1, requests=9, timeout_s=0.1))
        assert failure.value.message == "the first request failed: no answer within 0.1 s"

    run(test())


class OneModel(Engine):
    """An engine whose only model it is given."""

    def __init__(self, only: Model) -> None:
        super().__init__(Settings())
        self._only = only

    def model(self, name: str, version: str = "") -> Model:
        return self._only


def test_an_engine_is_measured_in_process() -> None:
    async def test() -> None:
        model = fakes.model()
        target = LocalTarget(OneModel(model), "here")
        assert [*target.metadata("m", "").inputs] == ["X"]
        result = await measured(target, Load(4, requests=50))
        assert (result.requests, result.errors) == (50, 0)
        assert result.client_cpu_share is None
        assert result.doubts == []
        assert model.statistics.success.count == 51
        model.close()

    run(test())


def test_an_engines_errors_are_counted() -> None:
    errors = [None, None, ServingError(Kind.INTERNAL, "broken"), None, None, None]

    def script(batch: Sequence[InferRequest]) -> list[fakes.Result]:
        return [errors.pop(0) or fakes.EchoInstance().answer(sent) for sent in batch]

    async def test() -> None:
        model = fakes.model(fakes.ScriptedInstance(script))
        result = await measured(LocalTarget(OneModel(model), "here"), Load(1, requests=5))
        assert (result.requests, result.errors, result.first_error) == (4, 1, "broken")
        model.close()

    run(test())


def test_figures_that_may_be_the_clients_own_are_doubted() -> None:
    result = Result(
        protocol="http-binary", address="", concurrency=16, rate=100.0, seconds=1.0, requests=100, errors=0,
        first_error="", requests_per_s=100.0, p50_us=1.0, p90_us=2.0, p99_us=3.0, max_us=4.0, server="",
        server_cpu_us=None, client_cpu_share=0.97, lateness_p99_us=2500.0, waited=7,
    )  # fmt: skip
    assert result.doubts == [
        "the client used 97% of a core: rate and latencies may be its own, not the server's",
        "every hundredth request was due 2500 us before the client came to it",
        "7 requests had to wait for a connection; --concurrency allows more of them",
    ]
    _, row, *notes = table([result]).splitlines()
    assert row.split() == ["http-binary", "100/s", "100.0", "1", "2", "3", "4", "0", "-", "97%"]
    assert notes == [f"note, http-binary 100/s: {doubt}" for doubt in result.doubts]
