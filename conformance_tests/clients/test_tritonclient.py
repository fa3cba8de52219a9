"""tritonclient's four clients, unmodified, on the sample models."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio
from tritonclient.utils import InferenceServerException

from conformance_tests.clause_table import clause
from conformance_tests.server import Target

# They ship no types.
http_api: Any = tritonclient.http
http_aio: Any = tritonclient.http.aio
grpc_api: Any = tritonclient.grpc
grpc_aio: Any = tritonclient.grpc.aio

LEFT = np.arange(16, dtype=np.int32).reshape(1, 16)
RIGHT = np.ones((1, 16), np.int32)
SHAPES = [("INPUT0", [-1, 16]), ("INPUT1", [-1, 16])]


@pytest.fixture
def http_address(target: Target) -> str:
    return target.http.removeprefix("http://")


@pytest.fixture
def grpc_address(target: Target) -> str:
    if not target.grpc:
        pytest.skip("no --grpc was given")
    return target.grpc


@pytest.fixture
def http(http_address: str) -> Iterator[Any]:
    with http_api.InferenceServerClient(http_address) as client:
        yield client


@pytest.fixture
def grpc(grpc_address: str) -> Iterator[Any]:
    with grpc_api.InferenceServerClient(grpc_address) as client:
        yield client


def run_http(address: str, steps: Callable[[Any], Awaitable[None]]) -> None:
    async def session() -> None:
        async with http_aio.InferenceServerClient(address) as client:
            await steps(client)

    asyncio.run(session())


def run_grpc(address: str, steps: Callable[[Any], Awaitable[None]]) -> None:
    async def session() -> None:
        async with grpc_aio.InferenceServerClient(address) as client:
            await steps(client)

    asyncio.run(session())


def tensor(api: Any, name: str, array: "np.ndarray[Any, np.dtype[Any]]", datatype: str, **options: object) -> Any:
    entry = api.InferInput(name, list(array.shape), datatype)
    entry.set_data_from_numpy(array, **options)
    return entry


def simple_inputs(api: Any, **options: object) -> list[Any]:
    return [tensor(api, "INPUT0", LEFT, "INT32", **options), tensor(api, "INPUT1", RIGHT, "INT32", **options)]


def check_simple(result: Any) -> None:
    assert result.as_numpy("OUTPUT0").tolist() == (LEFT + RIGHT).tolist()
    assert result.as_numpy("OUTPUT1").tolist() == (LEFT - RIGHT).tolist()


http_sync = clause("clients.tritonclient_http")
http_async = clause("clients.tritonclient_http_aio")
grpc_sync = clause("clients.tritonclient_grpc")
grpc_async = clause("clients.tritonclient_grpc_aio")
needs = pytest.mark.needs


@http_sync
@needs("simple")
def test_http_asks_about_server_and_model(http: Any) -> None:
    assert http.is_server_live()
    assert http.is_server_ready()
    assert http.is_model_ready("simple")
    assert http.is_model_ready("simple", "1")
    assert not http.is_model_ready("nope")
    assert http.get_server_metadata()["name"]
    metadata = http.get_model_metadata("simple")
    assert [(entry["name"], entry["shape"]) for entry in metadata["inputs"]] == SHAPES
    assert http.get_model_config("simple")["max_batch_size"] == 8


@http_sync
@needs("simple")
@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False, None])
def test_http_infers(http: Any, binary_in: bool, binary_out: bool | None) -> None:
    """None lists no outputs, for which the client asks in its own way."""
    outputs = None
    if binary_out is not None:
        outputs = [http_api.InferRequestedOutput(name, binary_data=binary_out) for name in ("OUTPUT0", "OUTPUT1")]
    result = http.infer("simple", simple_inputs(http_api, binary_data=binary_in), outputs=outputs, request_id="7")
    check_simple(result)
    assert result.get_response()["id"] == "7"


@http_sync
@needs("simple")
@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_http_infers_compressed(http: Any, algorithm: str) -> None:
    options = {"request_compression_algorithm": algorithm, "response_compression_algorithm": algorithm}
    check_simple(http.infer("simple", simple_inputs(http_api), **options))


@http_sync
@needs("simple")
def test_http_infers_later(http: Any) -> None:
    pending = [http.async_infer("simple", simple_inputs(http_api)) for _ in range(8)]
    for one in pending:
        check_simple(one.get_result())


@http_sync
@needs("simple")
def test_http_sends_parameters(http: Any) -> None:
    check_simple(
        http.infer("simple", simple_inputs(http_api), parameters={"a": "b", "n": 1}, priority=1, timeout=10_000_000)
    )


@http_sync
@needs("sentiment", "digits")
def test_http_carries_text_and_classes(http: Any) -> None:
    text = np.array([["I love it, wonderful."]], np.object_)
    assert http.infer("sentiment", [tensor(http_api, "text", text, "BYTES")]).as_numpy("label").tolist() == [[1]]
    image = tensor(http_api, "image", np.zeros((1, 1, 8, 8), np.float32), "FP32")
    output = http_api.InferRequestedOutput("probabilities", class_count=3)
    assert http.infer("digits", [image], outputs=[output]).as_numpy("probabilities").shape == (1, 3)


@http_sync
@needs("simple")
def test_http_raises_the_servers_text(http: Any) -> None:
    with pytest.raises(InferenceServerException) as caught:
        http.infer("simple", simple_inputs(http_api)[:1])
    assert caught.value.status() == "400"
    assert "expected 2 inputs but got 1 inputs for model 'simple'" in caught.value.message()


@http_async
@needs("simple", "times_version")
def test_http_aio_asks_and_infers(http_address: str, target: Target) -> None:
    async def steps(client: Any) -> None:
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready("simple")
        assert (await client.get_server_metadata())["name"]
        assert (await client.get_model_metadata("simple"))["platform"] == "onnxruntime_onnx"
        assert (await client.get_model_config("simple"))["max_batch_size"] == 8
        for binary in (True, False):
            check_simple(await client.infer("simple", simple_inputs(http_api, binary_data=binary)))
        x = np.array([1.5, 2], np.float32)
        result = await client.infer("times_version", [tensor(http_api, "x", x, "FP32")], model_version="2")
        assert result.as_numpy("y").tolist() == [3, 4]
        results = await asyncio.gather(*(client.infer("simple", simple_inputs(http_api)) for _ in range(16)))
        for one in results:
            check_simple(one)

    run_http(http_address, steps)


@grpc_sync
@needs("simple")
def test_grpc_asks_about_server_and_model(grpc: Any) -> None:
    assert grpc.is_server_live()
    assert grpc.is_server_ready()
    assert grpc.is_model_ready("simple")
    assert grpc.get_server_metadata().name
    metadata = grpc.get_model_metadata("simple")
    assert [(entry.name, list(entry.shape)) for entry in metadata.inputs] == SHAPES
    assert grpc.get_model_metadata("simple", as_json=True)["platform"] == "onnxruntime_onnx"
    assert grpc.get_model_config("simple").config.max_batch_size == 8


@grpc_sync
@needs("simple")
def test_grpc_infers(grpc: Any) -> None:
    outputs = [grpc_api.InferRequestedOutput(name) for name in ("OUTPUT0", "OUTPUT1")]
    result = grpc.infer("simple", simple_inputs(grpc_api), outputs=outputs, request_id="7")
    check_simple(result)
    assert result.get_response().id == "7"
    check_simple(grpc.infer("simple", simple_inputs(grpc_api), compression_algorithm="gzip"))
    check_simple(
        grpc.infer("simple", simple_inputs(grpc_api), parameters={"a": "b", "n": 1}, priority=1, timeout=10_000_000)
    )


@grpc_sync
@needs("sentiment", "digits")
def test_grpc_carries_text_and_classes(grpc: Any) -> None:
    text = np.array([["I love it, wonderful."]], np.object_)
    assert grpc.infer("sentiment", [tensor(grpc_api, "text", text, "BYTES")]).as_numpy("label").tolist() == [[1]]
    image = tensor(grpc_api, "image", np.zeros((1, 1, 8, 8), np.float32), "FP32")
    output = grpc_api.InferRequestedOutput("probabilities", class_count=3)
    assert grpc.infer("digits", [image], outputs=[output]).as_numpy("probabilities").shape == (1, 3)


@grpc_sync
@needs("simple")
def test_grpc_raises_the_servers_text(grpc: Any) -> None:
    with pytest.raises(InferenceServerException) as caught:
        grpc.infer("simple", simple_inputs(grpc_api)[:1])
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert "expected 2 inputs but got 1 inputs for model 'simple'" in caught.value.message()


@grpc_async
@needs("simple", "times_version")
def test_grpc_aio_asks_and_infers(grpc_address: str, target: Target) -> None:
    async def steps(client: Any) -> None:
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready("simple")
        assert (await client.get_server_metadata()).name
        assert (await client.get_model_metadata("simple")).platform == "onnxruntime_onnx"
        assert (await client.get_model_config("simple")).config.max_batch_size == 8
        check_simple(await client.infer("simple", simple_inputs(grpc_api)))
        x = np.array([1.5, 2], np.float32)
        result = await client.infer("times_version", [tensor(grpc_api, "x", x, "FP32")], model_version="2")
        assert result.as_numpy("y").tolist() == [3, 4]
        results = await asyncio.gather(*(client.infer("simple", simple_inputs(grpc_api)) for _ in range(16)))
        for one in results:
            check_simple(one)

    run_grpc(grpc_address, steps)
