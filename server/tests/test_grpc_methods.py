"""The table of methods, through a real client, on either transport on a free loopback port."""

import asyncio
import functools
import gc
import logging
import socket
import struct
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import grpc
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.grpc.aio
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.message import Message
from penstock import control, pb
from penstock.auth import Category, Guard
from penstock.engine import Engine
from penstock.errors import Kind, ServingError
from penstock.grpc_api import METHODS, STATUS, Call, Door, Status, Stream, Unary
from penstock.grpc_api.bodies import Encoded
from penstock.grpc_api.calls import STOPPING
from penstock.grpc_api.grpcio_transport import CODES, GrpcioServer
from penstock.grpc_api.http2 import NativeServer
from penstock.grpc_api.methods import SERVICE, control_row, fields
from penstock.lifecycle import Lifecycle
from penstock.messages import InferRequest, InferResponse
from penstock.model import Loaded, Model
from penstock.model_config import signature
from penstock.queueing import Pending
from penstock.runtime import Cancelled, ModelFiles, Reply
from penstock.settings import Settings
from penstock.tensor import Tensor

HEALTH, REFLECTION = pb.health, pb.reflection_v1
LIMIT_S = 20.0  # of a whole test: nothing in it takes long, but a lost answer must not hang it


class Doubler:
    """A model instance: Y = 2 A, and the request's parameters as the response's."""

    max_in_flight = 1
    device = "cpu"
    inputs_ready_ns = 0
    outputs_came_ns = 0
    streams = False

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.seen: list[InferRequest] = []

    def execute(
        self, batch: Sequence[InferRequest], unwanted: Cancelled | None = None
    ) -> list[InferResponse | ServingError]:
        self.inputs_ready_ns = self.outputs_came_ns = time.monotonic_ns()
        self.seen.extend(batch)
        return [self.answer(request) for request in batch]

    def answer(self, request: InferRequest) -> InferResponse | ServingError:
        given = request.inputs["A"]
        outputs = [Tensor("Y", given.datatype, given.array * 2)]
        return InferResponse(request.model, "1", request.id, outputs, dict(request.parameters))

    def start(self, request: InferRequest, reply: Reply, cancelled: Cancelled) -> None:
        raise AssertionError("not a streaming model")

    def close(self) -> None:
        """There is nothing to release."""


class Gated(Doubler):
    """Runs only while its gate is open, on its worker's thread."""

    def __init__(self) -> None:
        super().__init__(device="cuda:0")  # such an instance never runs inline
        self.entered = threading.Semaphore(0)
        self.gate = threading.Event()

    def execute(
        self, batch: Sequence[InferRequest], unwanted: Cancelled | None = None
    ) -> list[InferResponse | ServingError]:
        self.entered.release()
        assert self.gate.wait(LIMIT_S)
        return super().execute(batch)


class Failing(Doubler):
    """Fails with what it is given."""

    def __init__(self, error: Exception) -> None:
        super().__init__(device="cuda:0")
        self.error = error

    def execute(
        self, batch: Sequence[InferRequest], unwanted: Cancelled | None = None
    ) -> list[InferResponse | ServingError]:
        raise self.error


class Long(Doubler):
    """Answers every request with 1000 numbers."""

    def answer(self, request: InferRequest) -> InferResponse:
        outputs = [Tensor("Y", request.inputs["A"].datatype, np.zeros(1000, np.int32))]
        return InferResponse(request.model, "1", request.id, outputs)


def model(name: str, instance: Doubler, decoupled: bool = False) -> Model:
    config = pb.ModelConfig(
        name=name,
        backend="double",
        input=[pb.ModelInput(name="A", data_type=pb.TYPE_INT32, dims=[-1])],
        output=[pb.ModelOutput(name="Y", data_type=pb.TYPE_INT32, dims=[-1])],
        model_transaction_policy=pb.ModelTransactionPolicy(decoupled=decoupled),
    )
    files = ModelFiles(name, 1, Path("/"), Path("/1"))
    loaded = Model(Loaded(files, config, signature(config), 0.0), [instance])
    instance.seen.clear()  # of what it was probed with
    return loaded


class Shelf(Lifecycle):
    """A lifecycle whose models were made by hand."""

    def __init__(self, settings: Settings, models: Sequence[Model]) -> None:
        super().__init__(settings)
        self.shelf = {model.name: model for model in models}
        self.known = set(self.shelf)
        self.ready = True
        self.fault: Exception | None = None

    def get(self, name: str, version: str = "") -> Model:
        if self.fault is not None:
            raise self.fault
        found = self.shelf.get(name)
        return found if found is not None and version in ("", found.version) else super().get(name, version)

    def ready_versions(self, name: str) -> list[str]:
        return [self.shelf[name].version] if name in self.shelf else []

    def models(self) -> list[Model]:
        return list(self.shelf.values())

    def knows(self, name: str) -> bool:
        return name in self.known

    def is_live(self) -> bool:
        return not self.exiting

    def is_ready(self) -> bool:
        return self.ready and not self.exiting

    def changed(self) -> None:
        """Tell the watchers, from another thread."""
        thread = threading.Thread(target=self._notify)
        thread.start()
        thread.join()


def same(body: bytes) -> bytes:
    """The codec of a client that sends and receives bytes."""
    return body


Transport: TypeAlias = type[GrpcioServer] | type[NativeServer]


class Served:
    """A server on a loopback port, and a channel to it."""

    def __init__(
        self, shelf: Shelf, door: Door, server: GrpcioServer | NativeServer, port: int, channel: grpc.aio.Channel
    ) -> None:
        self.shelf = shelf
        self.door = door
        self.server = server
        self.url = f"127.0.0.1:{port}"
        self.channel = channel

    def unary(self, rpc: str, message: Message, **options: Any) -> "grpc.aio.UnaryUnaryCall[bytes, bytes]":
        path = rpc if rpc.startswith("/") else f"/{SERVICE}/{rpc}"
        return self.channel.unary_unary(path, same, same)(message.SerializeToString(), **options)

    async def infer(self, message: pb.ModelInferRequest, **options: Any) -> pb.ModelInferResponse:
        return pb.ModelInferResponse.FromString(await self.unary("ModelInfer", message, **options))

    async def check(self, service: str) -> int:
        body = await self.unary("/grpc.health.v1.Health/Check", HEALTH.HealthCheckRequest(service=service))
        return HEALTH.HealthCheckResponse.FromString(body).status

    def watch(self, service: str) -> "grpc.aio.UnaryStreamCall[bytes, bytes]":
        request = HEALTH.HealthCheckRequest(service=service)
        return self.channel.unary_stream("/grpc.health.v1.Health/Watch", same, same)(request.SerializeToString())


class Serve(Protocol):
    """Starts a server of some models with some options."""

    def __call__(self, *models: Model, **options: Any) -> AbstractAsyncContextManager[Served]: ...


@pytest.fixture(params=[GrpcioServer, NativeServer])
def serve(request: pytest.FixtureRequest) -> Serve:
    return functools.partial(serve_on, request.param)


@asynccontextmanager
async def serve_on(
    transport: Transport, *models: Model, guard: Guard | None = None, **options: Any
) -> AsyncIterator[Served]:
    settings = Settings(**options)
    engine = Engine(settings)
    engine.lifecycle = shelf = Shelf(settings, models)
    door = Door(engine, guard)
    server = transport(door, settings)
    port = await server.start(("127.0.0.1", 0))
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Served(shelf, door, server, port, channel)
    finally:
        await server.stop(0)
        shelf.stop(0)
        for one in models:
            one.close()


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), LIMIT_S))


def request(name: str = "m", *values: int, id: str = "") -> pb.ModelInferRequest:
    return pb.ModelInferRequest(
        model_name=name,
        id=id,
        inputs=[pb.ModelInferRequest.InferInputTensor(name="A", datatype="INT32", shape=[len(values)])],
        raw_input_contents=[struct.pack(f"<{len(values)}i", *values)],
    )


async def refusal(call: Awaitable[Any]) -> tuple[grpc.StatusCode, str | None]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details()


def requests_alive() -> int:
    return sum(isinstance(one, Pending) for one in gc.get_objects())


@pytest.mark.parametrize("device", ["cpu", "cuda:0"], ids=["inline", "on a thread"])
def test_an_answered_call_is_forgotten_without_a_collection(serve: Serve, device: str) -> None:
    """As over HTTP: else the messages of all calls would lie in memory until Python's cyclic collector comes round."""

    async def test() -> None:
        async with serve(model("m", Doubler(device))) as served:
            gc.collect()
            gc.disable()
            before = requests_alive()
            for number in range(3):
                await served.infer(request("m", number))
            deadline_s = time.monotonic() + LIMIT_S
            while requests_alive() > before and time.monotonic() < deadline_s:
                pass  # the worker's thread is about to let go of its last batch
            assert requests_alive() <= before

    try:
        run(test)
    finally:
        gc.enable()


# -- the table


def test_every_kind_of_error_has_a_status_that_grpc_knows() -> None:
    assert set(STATUS) == set(Kind)
    assert {status: CODES[status].name for status in Status} == {status: status.name for status in Status}


def test_every_row_is_a_method_of_the_contract_and_streams_as_it_says() -> None:
    for path, row in METHODS.items():
        service, _, name = path.removeprefix("/").partition("/")
        method = pb.POOL.FindServiceByName(service).methods_by_name[name]
        assert row.path == path
        assert isinstance(row, Unary) is not (method.client_streaming or method.server_streaming)


def test_every_control_method_has_a_row() -> None:
    assert {f"/{SERVICE}/{method.rpc}" for method in control.METHODS} <= set(METHODS)


def test_fields_are_plain_values_with_their_defaults() -> None:
    load = pb.RepositoryModelLoadRequest(model_name="m")
    load.parameters["config"].string_param = "{}"
    load.parameters["file:1/model.onnx"].bytes_param = b"\0"
    load.parameters["none"].SetInParent()
    assert fields(load) == {
        "repository_name": "",
        "model_name": "m",
        "parameters": {"config": "{}", "file:1/model.onnx": b"\0", "none": None},
    }
    trace = pb.TraceSettingRequest()
    trace.settings["trace_rate"].value.extend(["1", "2"])
    assert fields(trace) == {"settings": {"trace_rate": {"value": ["1", "2"]}}, "model_name": ""}
    register = pb.CudaSharedMemoryRegisterRequest(raw_handle=b"h", byte_size=2**63)
    assert fields(register) == {"name": "", "raw_handle": b"h", "device_id": 0, "byte_size": 2**63}


def test_a_call_that_is_gone_says_whether_its_deadline_has_passed() -> None:
    assert Call(()).gone().kind is Kind.CANCELLED
    assert Call((), deadline_ns=time.monotonic_ns() + 10**12).gone().kind is Kind.CANCELLED
    assert Call((), deadline_ns=1).gone().kind is Kind.DEADLINE


def test_a_blocking_control_method_runs_beside_the_event_loop() -> None:
    threads: list[threading.Thread] = []

    def slow(engine: Engine, given: dict[str, Any]) -> dict[str, Any]:
        threads.append(threading.current_thread())
        if given["model_name"] == "bad":
            raise ServingError(Kind.NOT_FOUND, "no such model")
        return {}

    row = control_row(control.Method("RepositoryModelLoad", (), slow, Category.MODEL_REPOSITORY, blocking=True))

    async def test() -> None:
        loop = asyncio.get_running_loop()
        door = Door(Engine(Settings()))
        for name in ("good", "bad"):
            future: asyncio.Future[Encoded | ServingError] = loop.create_future()
            body = pb.RepositoryModelLoadRequest(model_name=name).SerializeToString()
            row.answer(door, body, Call(()), future.set_result)
            assert not future.done()
            answer = await future
            if name == "good":
                assert answer == b""
            else:
                assert isinstance(answer, ServingError)
                assert (answer.kind, answer.message) == (Kind.NOT_FOUND, "no such model")

    run(test)
    assert threading.main_thread() not in threads
    assert len(threads) == 2


def test_an_answer_that_cannot_be_encoded_is_internal_and_told_once() -> None:
    def encode(answer: str) -> bytes:
        raise ValueError(answer)

    answers: list[Encoded | ServingError] = []
    row: Unary[bytes, str] = Unary(
        "/p", bytes, encode, lambda door, message, call, reply: reply("no"), Category.METADATA
    )
    row.answer(Door(Engine(Settings())), b"", Call(()), answers.append)
    [answer] = answers
    assert isinstance(answer, ServingError)
    assert (answer.kind, answer.message) == (Kind.INTERNAL, "/p failed: ValueError: no")


def test_a_stream_that_breaks_is_internal() -> None:
    async def broken(door: Door, messages: AsyncIterator[bytes], call: Call) -> AsyncGenerator[bytes, None]:
        async for message in messages:
            yield message
            raise ValueError("no")

    async def bodies() -> AsyncGenerator[bytes, None]:
        yield b"1"

    async def test() -> None:
        row = Stream("/p", bytes, bytes, broken, Category.METADATA, drains=True)
        stream = row.answers(Door(Engine(Settings())), bodies(), Call(()))
        assert await anext(stream) == b"1"
        with pytest.raises(ServingError, match="/p failed: ValueError: no") as caught:
            await anext(stream)
        assert caught.value.kind is Kind.INTERNAL

    run(test)


# -- inference


def test_an_inference_comes_back(serve: Serve) -> None:
    async def test() -> None:
        async with serve(model("m", Doubler())) as served:
            answer = await served.infer(request("m", 1, 2, 3, id="7"))
        assert (answer.model_name, answer.model_version, answer.id) == ("m", "1", "7")
        [output] = answer.outputs
        assert (output.name, output.datatype, list(output.shape)) == ("Y", "INT32", [3])
        assert not output.HasField("contents")
        assert list(answer.raw_output_contents) == [struct.pack("<3i", 2, 4, 6)]

    run(test)


def test_an_inference_on_a_worker_s_thread_comes_back(serve: Serve) -> None:
    async def test() -> None:
        gated = Gated()
        async with serve(model("m", gated)) as served:
            calls = [asyncio.ensure_future(served.infer(request("m", number))) for number in range(3)]
            await asyncio.to_thread(gated.entered.acquire)
            gated.gate.set()
            answers = await asyncio.gather(*calls)
        assert [answer.raw_output_contents[0] for answer in answers] == [struct.pack("<i", 2 * n) for n in range(3)]

    run(test)


@pytest.mark.parametrize(
    ("message", "status", "text"),
    [
        (request("nope"), "NOT_FOUND", "Request for unknown model: 'nope' is not found"),
        (
            pb.ModelInferRequest(model_name="m", model_version="abc"),
            "INVALID_ARGUMENT",
            "failed to get model version from specified version string 'abc' (details: stol), "
            "version should be an integral value > 0",
        ),
        (
            pb.ModelInferRequest(model_name="d"),
            "UNIMPLEMENTED",
            "ModelInfer RPC doesn't support models with decoupled transaction policy",
        ),
        (
            pb.ModelInferRequest(
                model_name="m", inputs=[pb.ModelInferRequest.InferInputTensor(name="A", datatype="INT32", shape=[1])]
            ),
            "INVALID_ARGUMENT",
            "unable to find data for input tensor 'A' for model 'm' in request.",
        ),
    ],
)
def test_a_refused_inference_has_the_protocol_s_status_and_text(
    serve: Serve, message: pb.ModelInferRequest, status: str, text: str
) -> None:
    async def test() -> None:
        async with serve(model("m", Doubler()), model("d", Doubler(), decoupled=True)) as served:
            assert await refusal(served.unary("ModelInfer", message)) == (grpc.StatusCode[status], text)

    run(test)


@pytest.mark.parametrize("kind", Kind)
def test_a_model_s_error_keeps_its_kind_and_text(serve: Serve, kind: Kind) -> None:
    async def test() -> None:
        async with serve(model("m", Failing(ServingError(kind, "no, déjà vu")))) as served:
            status = grpc.StatusCode[STATUS[kind].name]
            assert await refusal(served.unary("ModelInfer", request("m", 1))) == (status, "no, déjà vu")

    run(test)


def test_an_unexpected_exception_is_internal_and_its_traceback_stays_here(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with serve(model("m", Doubler())) as served:
            served.shelf.fault = ZeroDivisionError("oh")
            code, text = await refusal(served.unary("ModelInfer", request("m", 1)))
        assert code is grpc.StatusCode.INTERNAL
        assert text == f"/{SERVICE}/ModelInfer failed: ZeroDivisionError: oh"

    with caplog.at_level(logging.ERROR):
        run(test)
    [record] = [record for record in caplog.records if record.name.startswith("penstock")]
    assert record.exc_info is not None
    assert record.exc_info[0] is ZeroDivisionError


def test_a_text_too_long_for_a_trailer_is_cut_and_keeps_its_status(serve: Serve) -> None:
    async def test() -> None:
        async with serve(model("m", Failing(ServingError(Kind.INVALID, "é" * 9000)))) as served:
            code, text = await refusal(served.unary("ModelInfer", request("m", 1)))
        assert (code, text) == (grpc.StatusCode.INVALID_ARGUMENT, "é" * 1250)

    run(test)


def test_bytes_that_are_no_message_are_the_client_s_mistake(serve: Serve) -> None:
    async def test() -> None:
        async with serve() as served:
            for path in (f"/{SERVICE}/ModelInfer", f"/{SERVICE}/ServerLive", "/grpc.health.v1.Health/Check"):
                code, text = await refusal(served.channel.unary_unary(path, same, same)(b"\x0a\x7f"))
                assert code is grpc.StatusCode.INVALID_ARGUMENT
                assert text is not None
                assert text.startswith("malformed request message: ")
            stream = served.channel.unary_stream("/grpc.health.v1.Health/Watch", same, same)(b"\x0a\x7f")
            assert (await refusal(stream.read()))[0] is grpc.StatusCode.INVALID_ARGUMENT

    run(test)


def test_messages_over_the_limit_are_refused_either_way(serve: Serve) -> None:
    async def test() -> None:
        async with serve(model("m", Long()), grpc_max_message_size=2000) as served:
            code, _ = await refusal(served.unary("ModelInfer", request("m", *range(600))))
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            code, text = await refusal(served.unary("ModelInfer", request("m", 1)))
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert text == "Response has byte size 4025 which exceeds gRPC's byte size limit 2000."

    run(test)


@pytest.mark.parametrize("path", [f"/{SERVICE}/Nope", "/inference.Nope/ModelInfer"])
def test_an_unknown_method_is_unimplemented(serve: Serve, path: str) -> None:
    async def test() -> None:
        async with serve() as served:
            code, _ = await refusal(served.unary(path, pb.ServerLiveRequest()))
        assert code is grpc.StatusCode.UNIMPLEMENTED

    run(test)


# -- clients that go away


def test_a_cancelled_call_is_dropped_before_it_runs(serve: Serve) -> None:
    async def test() -> None:
        gated = Gated()
        held = model("m", gated)
        async with serve(held) as served:
            first = asyncio.ensure_future(served.infer(request("m", 1)))
            await asyncio.to_thread(gated.entered.acquire)
            second = served.unary("ModelInfer", request("m", 2))
            await until(lambda: held.waiting == 1)
            second.cancel()
            await until(lambda: held.waiting == 0)
            gated.gate.set()
            await first
            assert [given.inputs["A"].array.tolist() for given in gated.seen] == [[1]]
            with pytest.raises(asyncio.CancelledError):
                await second

    run(test)


def test_a_deadline_ends_the_wait_and_reaches_the_model(serve: Serve) -> None:
    async def test() -> None:
        gated = Gated()
        held = model("m", gated)
        async with serve(held) as served:
            first = asyncio.ensure_future(served.infer(request("m", 1), timeout=LIMIT_S))
            await asyncio.to_thread(gated.entered.acquire)
            code, _ = await refusal(served.unary("ModelInfer", request("m", 2), timeout=0.05))
            assert code is grpc.StatusCode.DEADLINE_EXCEEDED
            await until(lambda: held.waiting == 0)
            gated.gate.set()
            await first
        [ran] = gated.seen
        assert 0 < ran.deadline_ns - time.monotonic_ns() < (LIMIT_S + 1) * 1e9  # gRPC rounds timeouts up

    run(test)


async def until(holds: Callable[[], bool]) -> None:
    """Give the loop its turns until something on it has come about."""
    while not holds():  # noqa: ASYNC110 - what is waited for has no event, and the test as a whole has a limit
        await asyncio.sleep(0)


# -- the port


def test_grpcio_s_server_tries_again_where_its_port_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        settings = Settings()
        made = GrpcioServer(Door(Engine(settings)), settings)
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            again = asyncio.create_task(made._keep_serving(None, "127.0.0.1", port))
            await until(lambda: "gRPC is not served: cannot listen for gRPC on" in caplog.text)
        await until(lambda: made._server is not None)
        assert made._server is not None
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                live = channel.unary_unary(f"/{SERVICE}/ServerLive", same, same)
                assert pb.ServerLiveResponse.FromString(await live(b"")) == pb.ServerLiveResponse(live=False)
        finally:
            again.cancel()
            await made._server.stop(None)

    run(test)


# -- metadata


def test_matching_metadata_become_parameters(serve: Serve) -> None:
    async def test() -> None:
        doubler = Doubler()
        metadata = (("x-user", "ann"), ("my-x-tag", "1"), ("other", "2"), ("x-raw-bin", b"\xe9"))
        async with serve(model("m", doubler), grpc_header_forward_pattern="X-") as served:
            answer = await served.infer(request("m", 1), metadata=metadata)
        wanted = {"x-user": "ann", "my-x-tag": "1", "x-raw-bin": "é"}
        assert doubler.seen[0].parameters == wanted
        assert {key: value.string_param for key, value in answer.parameters.items()} == wanted

    run(test)


@pytest.mark.parametrize("key", ["timeout", "sequence_id", "triton_x"])
def test_a_reserved_name_cannot_be_forwarded(serve: Serve, key: str) -> None:
    async def test() -> None:
        async with serve(model("m", Doubler()), grpc_header_forward_pattern="^(timeout|sequence|triton)") as served:
            assert await refusal(served.unary("ModelInfer", request("m", 1), metadata=((key, "1"),))) == (
                grpc.StatusCode.INVALID_ARGUMENT,
                f"Header '{key}' is reserved for Triton usage and cannot be forwarded.",
            )

    run(test)


@pytest.mark.parametrize(
    ("pattern", "forwarded"), [("", {}), ("X-", {"x-a": "1"}), ("(?-i)X-", {}), ("(?-i)x-", {"x-a": "1"})]
)
def test_case_counts_only_where_the_pattern_says_so(pattern: str, forwarded: dict[str, str]) -> None:
    door = Door(Engine(Settings(grpc_header_forward_pattern=pattern)))
    assert door.forward.chosen([("x-a", "1")]) == forwarded


def test_a_pattern_that_is_none_is_refused_at_the_start() -> None:
    with pytest.raises(ServingError, match="--grpc-header-forward-pattern is no regular expression"):
        Door(Engine(Settings(grpc_header_forward_pattern="(")))


# -- control methods and health


def test_control_methods_answer_in_their_messages(serve: Serve) -> None:
    async def test() -> None:
        async with serve(model("m", Doubler())) as served:
            assert pb.ServerLiveResponse.FromString(await served.unary("ServerLive", pb.ServerLiveRequest())).live
            await served.infer(request("m", 1))
            metadata = pb.ModelMetadataResponse.FromString(
                await served.unary("ModelMetadata", pb.ModelMetadataRequest(name="m"))
            )
            assert (metadata.name, list(metadata.versions), metadata.platform) == ("m", ["1"], "double")
            assert [(spec.name, spec.datatype, list(spec.shape)) for spec in metadata.inputs] == [("A", "INT32", [-1])]
            config = pb.ModelConfigResponse.FromString(
                await served.unary("ModelConfig", pb.ModelConfigRequest(name="m"))
            ).config
            assert config.input[0].data_type == pb.TYPE_INT32
            statistics = pb.ModelStatisticsResponse.FromString(
                await served.unary("ModelStatistics", pb.ModelStatisticsRequest(name="m"))
            )
            assert statistics.model_stats[0].inference_stats.success.count == 1
            assert await refusal(served.unary("ModelReady", pb.ModelReadyRequest(name="nope"))) == (
                grpc.StatusCode.NOT_FOUND,
                "Request for unknown model: 'nope' is not found",
            )

    run(test)


def test_health_knows_the_server_its_service_and_its_models(serve: Serve) -> None:
    async def test() -> None:
        async with serve(model("m", Doubler())) as served:
            served.shelf.known.add("failed")
            answers = {name: await served.check(name) for name in ("", SERVICE, "m", "failed")}
            assert answers == {"": 1, SERVICE: 1, "m": 1, "failed": 2}
            assert (await refusal(served.check("nope")))[0] is grpc.StatusCode.NOT_FOUND
            served.shelf.ready = False
            assert [await served.check(name) for name in ("", SERVICE, "m")] == [2, 2, 1]
            served.shelf.stop(LIMIT_S)
            assert await refusal(served.check("")) == (grpc.StatusCode.UNAVAILABLE, "Server exiting")

    run(test)


def test_a_watch_tells_the_status_at_once_and_each_change_once(serve: Serve) -> None:
    async def test() -> None:
        async with serve(model("m", Doubler())) as served:
            server, late = served.watch(""), served.watch("late")
            assert [await status(server), await status(late)] == [1, 3]
            served.shelf.ready = False
            served.shelf.changed()
            assert await status(server) == 2
            served.shelf.known.add("late")
            served.shelf.changed()
            assert await status(late) == 2
            served.shelf.shelf["late"] = served.shelf.shelf["m"]
            served.shelf.ready = True
            served.shelf.changed()
            assert [await status(server), await status(late)] == [1, 1]

    run(test)


async def status(stream: "grpc.aio.UnaryStreamCall[bytes, bytes]") -> int:
    body = await stream.read()
    assert isinstance(body, bytes)
    return HEALTH.HealthCheckResponse.FromString(body).status


# -- reflection


@pytest.mark.parametrize("package", ["grpc.reflection.v1", "grpc.reflection.v1alpha"])
def test_reflection_describes_services_files_and_symbols(serve: Serve, package: str) -> None:
    questions = [
        REFLECTION.ServerReflectionRequest(list_services="*", host="h"),
        REFLECTION.ServerReflectionRequest(file_by_filename="grpc_service.proto"),
        REFLECTION.ServerReflectionRequest(file_containing_symbol="inference.GRPCInferenceService.ModelInfer"),
        REFLECTION.ServerReflectionRequest(file_by_filename="nope.proto"),
        REFLECTION.ServerReflectionRequest(file_containing_symbol="no.Symbol"),
        REFLECTION.ServerReflectionRequest(all_extension_numbers_of_type="inference.ModelConfig"),
        REFLECTION.ServerReflectionRequest(
            file_containing_extension=REFLECTION.ExtensionRequest(
                containing_type="inference.ModelConfig", extension_number=1
            )
        ),
        REFLECTION.ServerReflectionRequest(),
    ]

    async def test() -> None:
        async with serve() as served:
            stream = served.channel.stream_stream(f"/{package}.ServerReflection/ServerReflectionInfo", same, same)
            bodies = stream(question.SerializeToString() for question in questions)
            answers = [REFLECTION.ServerReflectionResponse.FromString(body) async for body in bodies]
        assert [answer.original_request for answer in answers] == questions
        assert answers[0].valid_host == "h"
        assert [service.name for service in answers[0].list_services_response.service] == sorted(pb.SERVICES)
        for answer in answers[1:3]:
            files = [
                FileDescriptorProto.FromString(content)
                for content in answer.file_descriptor_response.file_descriptor_proto
            ]
            assert [file.name for file in files] == ["model_config.proto", "grpc_service.proto"]
        assert [answer.error_response.error_code for answer in answers[3:]] == [5, 5, 5, 5, 3]
        assert all(answer.error_response.error_message for answer in answers[3:])

    run(test)


# -- the transport


def test_a_port_in_use_is_refused_in_so_many_words(serve: Serve) -> None:
    async def test() -> None:
        async with serve() as served:
            port = int(served.url.rpartition(":")[2])
            second = type(served.server)(Door(Engine(Settings())), Settings())
            with pytest.raises(ServingError, match=f"cannot listen for gRPC on 127.0.0.1:{port}") as caught:
                await second.start(("127.0.0.1", port))
            assert caught.value.kind is Kind.UNAVAILABLE
            await second.stop(0)

    run(test)


def test_a_stop_waits_for_inferences_and_not_for_watches(serve: Serve) -> None:
    async def test() -> None:
        gated = Gated()
        async with serve(model("m", gated)) as served:
            watch = served.watch("")
            assert await status(watch) == 1
            infer = asyncio.ensure_future(served.infer(request("m", 4)))
            await asyncio.to_thread(gated.entered.acquire)
            stop = asyncio.ensure_future(served.server.stop(LIMIT_S))
            assert await refusal(watch.read()) == (grpc.StatusCode.UNAVAILABLE, STOPPING)
            assert not stop.done()
            gated.gate.set()
            await stop
            assert (await infer).raw_output_contents[0] == struct.pack("<i", 8)

    run(test)


def test_calls_that_come_while_the_server_stops_may_be_tried_elsewhere(serve: Serve) -> None:
    async def test() -> None:
        async with serve(model("m", Doubler())) as served:
            ended: list[grpc.StatusCode] = []

            async def call_until_refused() -> None:
                alone = (("grpc.use_local_subchannel_pool", 1),)
                async with grpc.aio.insecure_channel(served.url, options=alone) as channel:
                    infer: Any = channel.unary_unary(f"/{SERVICE}/ModelInfer")
                    try:
                        while True:
                            await infer(request("m", 4).SerializeToString(), timeout=LIMIT_S)
                    except grpc.aio.AioRpcError as error:
                        ended.append(error.code())

            callers = [asyncio.ensure_future(call_until_refused()) for _ in range(8)]
            await until(lambda: served.shelf.shelf["m"].statistics.success.count > 100)
            await served.server.stop(LIMIT_S)
            await asyncio.wait_for(asyncio.gather(*callers), LIMIT_S)
            assert ended == [grpc.StatusCode.UNAVAILABLE] * 8

    run(test)


def test_a_path_that_is_no_utf_8_ends_no_more_than_its_call(serve: Serve) -> None:
    def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload

    fields = ((b":path", b"/a/\x80"), (b":authority", b"a"), (b"content-type", b"application/grpc"))
    # POST and http of the static table, then literals.
    block = b"\x83\x86" + b"".join(bytes([0, len(name)]) + name + bytes([len(value)]) + value for name, value in fields)
    call = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"") + frame(1, 5, 1, block)

    async def test() -> None:
        async with serve(model("m", Doubler())) as served:
            host, _, port = served.url.rpartition(":")
            for _ in range(2):
                reader, writer = await asyncio.open_connection(host, int(port))
                writer.write(call)
                writer.write_eof()
                await reader.read()
                writer.close()
                answer = await served.infer(request("m", 4), wait_for_ready=True)
                assert answer.raw_output_contents[0] == struct.pack("<i", 8)

    run(test)


def test_the_public_client_s_four_flavours_work(serve: Serve) -> None:
    values = np.arange(4, dtype=np.int32)

    def given(module: Any) -> list[Any]:
        tensor = module.InferInput("A", [4], "INT32")
        tensor.set_data_from_numpy(values)
        return [tensor]

    def blocking(url: str) -> list[Any]:
        with tritonclient.grpc.InferenceServerClient(url) as client:
            assert client.is_server_live()
            assert client.is_model_ready("m")
            assert client.get_model_config("m", as_json=True)["config"]["name"] == "m"
            plain = client.infer("m", given(tritonclient.grpc), request_id="1", client_timeout=LIMIT_S)
            done: list[Any] = []
            arrived = threading.Event()

            def callback(result: Any, error: Any) -> None:
                done.append((result, error))
                arrived.set()

            client.async_infer("m", given(tritonclient.grpc), callback)
            assert arrived.wait(LIMIT_S)
            [(result, error)] = done
            assert error is None
            return [plain, result]

    async def test() -> None:
        async with AsyncExitStack() as stack:
            served = await stack.enter_async_context(serve(model("m", Doubler())))
            results = await asyncio.to_thread(blocking, served.url)
            async with tritonclient.grpc.aio.InferenceServerClient(served.url) as client:
                results.append(await client.infer("m", given(tritonclient.grpc.aio)))
                results.append(
                    await client.infer(
                        "m",
                        given(tritonclient.grpc.aio),
                        outputs=[tritonclient.grpc.aio.InferRequestedOutput("Y")],
                        parameters={"p": 1},
                        compression_algorithm="gzip",
                    )
                )
        assert [result.as_numpy("Y").tolist() for result in results] == [[0, 2, 4, 6]] * 4

    run(test)
