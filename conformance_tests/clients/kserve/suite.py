"""KServe's Python SDK: its inference clients over REST and gRPC."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest
from kserve.inference_client import RESTConfig
from kserve.protocol.grpc import grpc_predict_v2_pb2, grpc_predict_v2_pb2_grpc
from kserve.protocol.infer_type import RequestedOutput
from kserve.protocol.rest.v2_datamodels import ModelMetadataResponse, ServerMetadataResponse

pytestmark = pytest.mark.anyio

LEFT = np.arange(16, dtype=np.int32).reshape(1, 16)
RIGHT = np.full((1, 16), 3, np.int32)
TEXTS = np.array([["", "water", "wässer"], ["水", '\u0000\n"', "💧"]], object)
ARRAYS = {
    "BOOL": np.array([[True, False]]),
    "UINT8": np.array([[0, 255]], np.uint8),
    "UINT16": np.array([[0, 65535]], np.uint16),
    "UINT32": np.array([[0, 2**32 - 1]], np.uint32),
    "UINT64": np.array([[0, 2**64 - 1]], np.uint64),
    "INT8": np.array([[-128, 127]], np.int8),
    "INT16": np.array([[-(2**15), 2**15 - 1]], np.int16),
    "INT32": np.array([[-(2**31), 2**31 - 1]], np.int32),
    "INT64": np.array([[-(2**63), 2**63 - 1]], np.int64),
    "FP16": np.array([[0.5, -65504]], np.float16),
    "FP32": np.array([[0.1, -3.4e38]], np.float32),
    "FP64": np.array([[0.1, -1.7e308]], np.float64),
}
UNKNOWN = "Request for unknown model: 'nope' is not found"


class Rest:
    """The REST client, with the address that it wants in every call."""

    def __init__(self, client: Any, url: str) -> None:
        self._client, self._url = client, url

    async def live(self) -> bool:
        return bool(await self._client.is_server_live(self._url))

    async def ready(self) -> bool:
        return bool(await self._client.is_server_ready(self._url))

    async def model_ready(self, model: str) -> bool:
        return bool(await self._client.is_model_ready(self._url, model))

    async def infer(self, request: Any) -> Any:
        return await self._client.infer(self._url, request, model_name=request.model_name)


class Grpc:
    """The gRPC client under the same names."""

    def __init__(self, client: Any) -> None:
        self._client = client

    async def live(self) -> bool:
        return bool(await self._client.is_server_live())

    async def ready(self) -> bool:
        return bool(await self._client.is_server_ready())

    async def model_ready(self, model: str) -> bool:
        return bool(await self._client.is_model_ready(model))

    async def infer(self, request: Any, **options: Any) -> Any:
        return await self._client.infer(request, **options)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def rest(url: str) -> AsyncIterator[Rest]:
    async with InferenceRESTClient(RESTConfig(protocol="v2")) as client:
        yield Rest(client, url)


@pytest.fixture
async def over_grpc(grpc_address: str) -> AsyncIterator[Grpc]:
    async with InferenceGRPCClient(grpc_address) as client:
        yield Grpc(client)


@pytest.fixture(params=["rest", "grpc"])
def client(request: pytest.FixtureRequest, rest: Rest, over_grpc: Grpc) -> Rest | Grpc:
    return rest if request.param == "rest" else over_grpc


def tensor(name: str, datatype: str, array: "np.ndarray[Any, Any]", binary: bool) -> Any:
    result = InferInput(name, list(array.shape), datatype)
    result.set_data_from_numpy(array, binary_data=binary)
    return result


def simple(binary: bool, rows: int = 1, **options: Any) -> Any:
    inputs = [
        tensor(name, "INT32", np.repeat(array, rows, axis=0), binary)
        for name, array in (("INPUT0", LEFT), ("INPUT1", RIGHT))
    ]
    return InferRequest("simple", inputs, **options)


def values(response: Any, datatypes: Sequence[str]) -> dict[str, "np.ndarray[Any, Any]"]:
    """The outputs by name, after a look at the datatype of each."""
    assert [output.datatype for output in response.outputs] == list(datatypes)
    return {output.name: output.as_numpy() for output in response.outputs}


async def test_the_server_lives_and_is_ready(client: Rest | Grpc) -> None:
    assert await client.live() is True
    assert await client.ready() is True


@pytest.mark.needs("simple")
async def test_a_model_is_ready(client: Rest | Grpc) -> None:
    assert await client.model_ready("simple") is True


async def test_an_unknown_model_is_not_ready(rest: Rest, over_grpc: Grpc) -> None:
    assert await rest.model_ready("nope") is False
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await over_grpc.model_ready("nope")
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.NOT_FOUND, UNKNOWN)


@pytest.mark.needs("simple")
@pytest.mark.parametrize("binary", [False, True], ids=["typed", "binary"])
async def test_sums_and_differences_come_back(client: Rest | Grpc, binary: bool) -> None:
    response = await client.infer(simple(binary, request_id="nr. 7"))
    # The REST client keeps no version of what it was answered.
    version = "1" if isinstance(client, Grpc) else None
    assert (response.model_name, response.model_version, response.id) == ("simple", version, "nr. 7")
    outputs = values(response, ["INT32", "INT32"])
    assert list(outputs) == ["OUTPUT0", "OUTPUT1"]
    np.testing.assert_array_equal(outputs["OUTPUT0"], LEFT + RIGHT)
    np.testing.assert_array_equal(outputs["OUTPUT1"], LEFT - RIGHT)


@pytest.mark.needs("simple")
async def test_rest_gives_binary_outputs_when_asked(rest: Rest) -> None:
    response = await rest.infer(simple(True, parameters={"binary_data_output": True}))
    assert [output.shape for output in response.outputs] == [[1, 16], [1, 16]]
    np.testing.assert_array_equal(values(response, ["INT32", "INT32"])["OUTPUT1"], LEFT - RIGHT)


@pytest.mark.needs("simple")
async def test_only_the_outputs_asked_for_come_back(client: Rest | Grpc) -> None:
    response = await client.infer(simple(True, request_outputs=[RequestedOutput("OUTPUT1")]))
    outputs = values(response, ["INT32"])
    assert list(outputs) == ["OUTPUT1"]
    np.testing.assert_array_equal(outputs["OUTPUT1"], LEFT - RIGHT)


@pytest.mark.needs("simple")
async def test_one_output_may_be_binary_and_the_other_json(rest: Rest) -> None:
    asked = [RequestedOutput("OUTPUT1", {"binary_data": True}), RequestedOutput("OUTPUT0", {"binary_data": False})]
    response = await rest.infer(simple(True, request_outputs=asked))
    outputs = values(response, ["INT32", "INT32"])
    assert list(outputs) == ["OUTPUT1", "OUTPUT0"]
    np.testing.assert_array_equal(outputs["OUTPUT0"], LEFT + RIGHT)
    np.testing.assert_array_equal(outputs["OUTPUT1"], LEFT - RIGHT)


@pytest.mark.needs("simple")
async def test_a_batch_comes_back_as_a_batch(client: Rest | Grpc) -> None:
    outputs = values(await client.infer(simple(True, rows=8)), ["INT32", "INT32"])
    np.testing.assert_array_equal(outputs["OUTPUT0"], np.repeat(LEFT + RIGHT, 8, axis=0))


@pytest.mark.parametrize("binary", [False, True], ids=["typed", "binary"])
@pytest.mark.parametrize(
    "datatype",
    [pytest.param(datatype, marks=pytest.mark.needs(f"identity_{datatype.lower()}")) for datatype in ARRAYS],
)
async def test_every_datatype_comes_back_as_it_went(client: Rest | Grpc, datatype: str, binary: bool) -> None:
    if datatype == "FP16" and not binary:
        pytest.skip("KServe's client sends FP16 in binary form only")
    sent = tensor("INPUT0", datatype, ARRAYS[datatype], binary)
    parameters = {"binary_data_output": True} if datatype == "FP16" else None
    response = await client.infer(InferRequest(f"identity_{datatype.lower()}", [sent], parameters=parameters))
    returned = values(response, [datatype])["OUTPUT0"]
    assert returned.dtype == ARRAYS[datatype].dtype
    np.testing.assert_array_equal(returned, ARRAYS[datatype])


@pytest.mark.needs("identity_bytes")
@pytest.mark.parametrize("binary", [False, True], ids=["typed", "binary"])
async def test_texts_come_back_as_they_went(client: Rest | Grpc, binary: bool) -> None:
    response = await client.infer(InferRequest("identity_bytes", [tensor("INPUT0", "BYTES", TEXTS, binary)]))
    returned = values(response, ["BYTES"])["OUTPUT0"]
    assert returned.shape == TEXTS.shape
    assert [text.decode() if isinstance(text, bytes) else text for text in returned.flat] == list(TEXTS.flat)


@pytest.mark.needs("simple_string")
async def test_numbers_written_as_text_are_added(client: Rest | Grpc) -> None:
    inputs = [
        tensor(name, "BYTES", array.astype(str).astype(object), binary=True)
        for name, array in (("INPUT0", LEFT), ("INPUT1", RIGHT))
    ]
    outputs = values(await client.infer(InferRequest("simple_string", inputs)), ["BYTES", "BYTES"])
    assert [int(text) for text in outputs["OUTPUT0"].flat] == list((LEFT + RIGHT).flat)
    assert [int(text) for text in outputs["OUTPUT1"].flat] == list((LEFT - RIGHT).flat)


@pytest.mark.needs("two_inputs_mixed")
async def test_one_input_may_be_binary_and_the_other_json(rest: Rest) -> None:
    numbers, texts = np.array([1.5, -2], np.float32), np.array(["one", "two", "three"], object)
    for number_form, text_form in ((True, False), (False, True)):
        inputs = [tensor("INPUT0", "FP32", numbers, number_form), tensor("INPUT1", "BYTES", texts, text_form)]
        outputs = values(await rest.infer(InferRequest("two_inputs_mixed", inputs)), ["FP32", "BYTES"])
        np.testing.assert_array_equal(outputs["OUTPUT0"], numbers)
        assert list(outputs["OUTPUT1"]) == list(texts)


@pytest.mark.needs("times_version")
@pytest.mark.parametrize(("version", "factor"), [("1", 1), ("2", 2), (None, 2)])
async def test_the_version_asked_for_runs(over_grpc: Grpc, version: str | None, factor: int) -> None:
    x = np.array([1, 2.5], np.float32)
    request = InferRequest("times_version", [tensor("x", "FP32", x, True)], model_version=version)
    response = await over_grpc.infer(request)
    assert response.model_version == str(factor)
    np.testing.assert_array_equal(values(response, ["FP32"])["y"], factor * x)


@pytest.mark.needs("simple")
async def test_metadata_fits_the_models_of_the_sdk(url: str) -> None:
    async with httpx.AsyncClient(base_url=url) as http:
        server = ServerMetadataResponse.model_validate_json((await http.get("/v2")).content, strict=True)
        model = ModelMetadataResponse.model_validate_json((await http.get("/v2/models/simple")).content, strict=True)
    assert server.name
    assert server.version
    assert (model.name, model.versions, model.platform) == ("simple", ["1"], "onnxruntime_onnx")
    described = [(tensor.name, tensor.datatype, tensor.shape) for tensor in (*model.inputs, *model.outputs)]
    assert described == [(name, "INT32", [-1, 16]) for name in ("INPUT0", "INPUT1", "OUTPUT0", "OUTPUT1")]


@pytest.mark.needs("simple")
async def test_metadata_fits_the_messages_of_the_sdk(grpc_address: str) -> None:
    messages: Any = grpc_predict_v2_pb2
    async with grpc.aio.insecure_channel(grpc_address) as channel:
        stub = grpc_predict_v2_pb2_grpc.GRPCInferenceServiceStub(channel)
        server = await stub.ServerMetadata(messages.ServerMetadataRequest())
        model = await stub.ModelMetadata(messages.ModelMetadataRequest(name="simple"))
    assert server.name
    assert server.version
    assert (model.name, list(model.versions), model.platform) == ("simple", ["1"], "onnxruntime_onnx")
    described = [(tensor.name, tensor.datatype, list(tensor.shape)) for tensor in (*model.inputs, *model.outputs)]
    assert described == [(name, "INT32", [-1, 16]) for name in ("INPUT0", "INPUT1", "OUTPUT0", "OUTPUT1")]


async def refused(rest: Rest, over_grpc: Grpc, request: Any) -> tuple[int, str, grpc.StatusCode, str]:
    """How both clients report that the request was refused: HTTP's status and message, gRPC's code and details."""
    with pytest.raises(httpx.HTTPStatusError) as http:
        await rest.infer(request)
    with pytest.raises(grpc.aio.AioRpcError) as called:
        await over_grpc.infer(request)
    message = str(http.value).partition(f", '{http.value.response.status_code} ")[0]
    return http.value.response.status_code, message, called.value.code(), called.value.details() or ""


async def test_an_unknown_model_is_not_found(rest: Rest, over_grpc: Grpc) -> None:
    request = InferRequest("nope", [tensor("INPUT0", "INT32", LEFT, True)])
    assert await refused(rest, over_grpc, request) == (404, UNKNOWN, grpc.StatusCode.NOT_FOUND, UNKNOWN)


@pytest.mark.needs("simple")
async def test_a_wrong_datatype_is_the_clients_mistake(rest: Rest, over_grpc: Grpc) -> None:
    inputs = [tensor("INPUT0", "FP32", LEFT.astype(np.float32), True), tensor("INPUT1", "INT32", RIGHT, True)]
    text = "[request id: a] inference input 'INPUT0' data-type is 'FP32', but model 'simple' expects 'INT32'"
    refusal = await refused(rest, over_grpc, InferRequest("simple", inputs, request_id="a"))
    assert refusal == (400, text, grpc.StatusCode.INVALID_ARGUMENT, text)


@pytest.mark.needs("simple")
async def test_a_batch_too_large_is_the_clients_mistake(rest: Rest, over_grpc: Grpc) -> None:
    text = "[request id: b] inference request batch-size must be <= 8 for 'simple'"
    refusal = await refused(rest, over_grpc, simple(True, rows=9, request_id="b"))
    assert refusal == (400, text, grpc.StatusCode.INVALID_ARGUMENT, text)


@pytest.mark.needs("failing")
async def test_values_that_a_model_cannot_take_are_told_with_the_runtimes_words(rest: Rest, over_grpc: Grpc) -> None:
    request = InferRequest("failing", [tensor("INPUT0", "INT64", np.array([9]), True)])
    http_status, message, code, details = await refused(rest, over_grpc, request)
    assert (http_status, code) == (400, grpc.StatusCode.INVALID_ARGUMENT)
    assert message == details
    assert "indices element out of data bounds, idx=9" in message


@pytest.mark.needs("slow_loop")
async def test_a_deadline_that_passes_ends_the_call(over_grpc: Grpc) -> None:
    inputs = [
        tensor("INPUT0", "FP32", np.ones((1, 1), np.float32), True),
        tensor("STEPS", "INT64", np.array([300]), True),
    ]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await over_grpc.infer(InferRequest("slow_loop", inputs), timeout=0.05)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert await over_grpc.ready() is True
