"""MLServer's codecs and data types over plain HTTP, and its gRPC stubs and converters."""

import http.client
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import grpc
import numpy as np
import pandas as pd
import pytest
from mlserver.codecs import Base64Codec, NumpyCodec, NumpyRequestCodec, PandasCodec, StringCodec, StringRequestCodec
from mlserver.grpc import converters, dataplane_pb2, dataplane_pb2_grpc
from mlserver.types import (
    InferenceErrorResponse,
    InferenceRequest,
    InferenceResponse,
    MetadataModelResponse,
    MetadataServerResponse,
    Parameters,
    RequestOutput,
)

LIMIT_S = 30.0
pb: Any = dataplane_pb2

LEFT = np.arange(16, dtype=np.int32).reshape(1, 16)
RIGHT = np.full((1, 16), 3, np.int32)
TEXTS = ["", "water", "wässer", "水", '\n"']
ARRAYS = {
    "bool": np.array([[True, False]]),
    "uint8": np.array([[0, 255]], np.uint8),
    "uint16": np.array([[0, 65535]], np.uint16),
    "uint32": np.array([[0, 2**32 - 1]], np.uint32),
    "uint64": np.array([[0, 2**64 - 1]], np.uint64),
    "int8": np.array([[-128, 127]], np.int8),
    "int16": np.array([[-(2**15), 2**15 - 1]], np.int16),
    "int32": np.array([[-(2**31), 2**31 - 1]], np.int32),
    "int64": np.array([[-(2**63), 2**63 - 1]], np.int64),
    "fp16": np.array([[0.5, -65504]], np.float16),
    "fp32": np.array([[0.1, -3.4e38]], np.float32),
    "fp64": np.array([[0.1, -1.7e308]], np.float64),
}
DESCRIBED = [(name, "INT32", [-1, 16]) for name in ("INPUT0", "INPUT1", "OUTPUT0", "OUTPUT1")]
UNKNOWN = "Request for unknown model: 'nope' is not found"


class Http:
    """MLServer's types as JSON over HTTP, which is what its own server and clients speak."""

    def __init__(self, url: str) -> None:
        self._host = urlsplit(url).netloc

    def get(self, path: str) -> bytes:
        status, body = self._ask("GET", path, None)
        assert status == 200, body
        return body

    def infer(self, model: str, request: Any) -> Any:
        status, body = self.post(model, request)
        assert status == 200, body
        return InferenceResponse.model_validate_json(body)

    def post(self, model: str, request: Any) -> tuple[int, bytes]:
        return self._ask("POST", f"/v2/models/{model}/infer", request.model_dump_json().encode())

    def _ask(self, method: str, path: str, body: bytes | None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self._host, timeout=LIMIT_S)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


class Grpc:
    """MLServer's types as its protobuf messages; `raw` moves tensors to the raw contents."""

    def __init__(self, stub: Any, raw: bool) -> None:
        self._stub, self._raw = stub, raw

    def infer(self, model: str, request: Any) -> Any:
        message = converters.ModelInferRequestConverter.from_types(request, model_name=model, use_raw=self._raw)
        return converters.ModelInferResponseConverter.to_types(self._stub.ModelInfer(message, timeout=LIMIT_S))


@pytest.fixture
def http_client(url: str) -> Http:
    return Http(url)


@pytest.fixture
def stub(grpc_address: str) -> Iterator[Any]:
    with grpc.insecure_channel(grpc_address) as channel:
        yield dataplane_pb2_grpc.GRPCInferenceServiceStub(channel)


@pytest.fixture(params=["http", "grpc-typed", "grpc-raw"])
def client(request: pytest.FixtureRequest, http_client: Http, stub: Any) -> Http | Grpc:
    return http_client if request.param == "http" else Grpc(stub, raw=request.param == "grpc-raw")


def simple(**options: Any) -> Any:
    return InferenceRequest(
        inputs=[NumpyCodec.encode_input("INPUT0", LEFT), NumpyCodec.encode_input("INPUT1", RIGHT)], **options
    )


def test_health_is_said(http_client: Http, stub: Any) -> None:
    assert json.loads(http_client.get("/v2/health/live")) == {"live": True}
    assert json.loads(http_client.get("/v2/health/ready")) == {"ready": True}
    assert stub.ServerLive(pb.ServerLiveRequest(), timeout=LIMIT_S).live is True
    assert stub.ServerReady(pb.ServerReadyRequest(), timeout=LIMIT_S).ready is True


@pytest.mark.needs("simple")
def test_readiness_of_a_model_is_said(http_client: Http, stub: Any) -> None:
    assert json.loads(http_client.get("/v2/models/simple/ready")) == {"name": "simple", "ready": True}
    assert stub.ModelReady(pb.ModelReadyRequest(name="simple"), timeout=LIMIT_S).ready is True


def test_server_metadata_fits_and_is_the_same_over_both(http_client: Http, stub: Any) -> None:
    over_http = MetadataServerResponse.model_validate_json(http_client.get("/v2"))
    over_grpc = converters.ServerMetadataResponseConverter.to_types(
        stub.ServerMetadata(pb.ServerMetadataRequest(), timeout=LIMIT_S)
    )
    assert over_http.name
    assert over_http.version
    assert over_http == over_grpc


@pytest.mark.needs("simple")
def test_model_metadata_fits_and_is_the_same_over_both(http_client: Http, stub: Any) -> None:
    over_http = MetadataModelResponse.model_validate_json(http_client.get("/v2/models/simple"))
    over_grpc = converters.ModelMetadataResponseConverter.to_types(
        stub.ModelMetadata(pb.ModelMetadataRequest(name="simple"), timeout=LIMIT_S)
    )
    for model in (over_http, over_grpc):
        assert (model.name, model.versions, model.platform) == ("simple", ["1"], "onnxruntime_onnx")
        assert [(tensor.name, tensor.datatype, tensor.shape) for tensor in model.inputs + model.outputs] == DESCRIBED


@pytest.mark.needs("simple")
def test_numpy_codec_sums_and_differences_come_back(client: Http | Grpc) -> None:
    response = client.infer("simple", simple(id="nr. 7"))
    assert (response.model_name, response.model_version, response.id) == ("simple", "1", "nr. 7")
    assert [(output.name, output.datatype, output.shape) for output in response.outputs] == [
        ("OUTPUT0", "INT32", [1, 16]),
        ("OUTPUT1", "INT32", [1, 16]),
    ]
    first, second = (NumpyCodec.decode_output(output) for output in response.outputs)
    np.testing.assert_array_equal(first, LEFT + RIGHT)
    np.testing.assert_array_equal(second, LEFT - RIGHT)


@pytest.mark.needs("simple")
def test_only_the_outputs_asked_for_come_back(client: Http | Grpc) -> None:
    response = client.infer("simple", simple(outputs=[RequestOutput(name="OUTPUT1")]))
    (output,) = response.outputs
    assert output.name == "OUTPUT1"
    np.testing.assert_array_equal(NumpyCodec.decode_output(output), LEFT - RIGHT)


@pytest.mark.needs("simple")
def test_hints_for_mlservers_own_codecs_do_no_harm(client: Http | Grpc) -> None:
    hinted = simple(
        parameters=Parameters(content_type="np", colour="blue", depth=3, flowing=True),
        outputs=[RequestOutput(name="OUTPUT0", parameters=Parameters(content_type="np"))],
    )
    (output,) = client.infer("simple", hinted).outputs
    np.testing.assert_array_equal(NumpyCodec.decode_output(output), LEFT + RIGHT)


@pytest.mark.parametrize(
    "datatype", [pytest.param(datatype, marks=pytest.mark.needs(f"identity_{datatype}")) for datatype in ARRAYS]
)
def test_numpy_codec_every_datatype_comes_back_as_it_went(
    request: pytest.FixtureRequest, client: Http | Grpc, datatype: str
) -> None:
    if datatype == "fp16" and request.node.callspec.params["client"] == "grpc-typed":
        pytest.skip("the protocol has no typed contents for FP16")
    sent = ARRAYS[datatype]
    response = client.infer(f"identity_{datatype}", InferenceRequest(inputs=[NumpyCodec.encode_input("INPUT0", sent)]))
    returned = NumpyCodec.decode_output(response.outputs[0])
    assert returned.dtype == sent.dtype
    np.testing.assert_array_equal(returned, sent)


@pytest.mark.needs("digits", "identity_fp32")
def test_numpy_request_codec_reads_the_whole_response(client: Http | Grpc) -> None:
    sent = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
    request = NumpyRequestCodec.encode_request(sent)
    request.inputs[0].name = "INPUT0"
    np.testing.assert_array_equal(NumpyRequestCodec.decode_response(client.infer("identity_fp32", request)), sent)
    request = NumpyRequestCodec.encode_request(np.zeros((2, 1, 8, 8), np.float32))
    request.inputs[0].name = "image"
    probabilities = NumpyRequestCodec.decode_response(client.infer("digits", request))
    assert probabilities.shape == (2, 10)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)


@pytest.mark.needs("identity_bytes")
def test_string_codec_texts_come_back_as_they_went(client: Http | Grpc) -> None:
    use_bytes = isinstance(client, Grpc)  # JSON carries text, protobuf bytes
    request = InferenceRequest(inputs=[StringCodec.encode_input("INPUT0", TEXTS, use_bytes=use_bytes)])
    (output,) = client.infer("identity_bytes", request).outputs
    assert (output.datatype, output.shape) == ("BYTES", [len(TEXTS), 1])
    assert StringCodec.decode_output(output) == TEXTS


@pytest.mark.needs("identity_bytes")
def test_string_request_codec_reads_the_whole_response(client: Http | Grpc) -> None:
    request = StringRequestCodec.encode_request(TEXTS, use_bytes=isinstance(client, Grpc))
    request.inputs[0].name = "INPUT0"
    assert StringRequestCodec.decode_response(client.infer("identity_bytes", request)) == TEXTS


@pytest.mark.needs("identity_bytes")
def test_base64_codec_bytes_come_back_as_they_went(client: Http | Grpc) -> None:
    payload = [b"\x00\xff\x80", b"water"]
    sent = Base64Codec.encode_input("INPUT0", payload, use_bytes=isinstance(client, Grpc))
    (output,) = client.infer("identity_bytes", InferenceRequest(inputs=[sent])).outputs
    assert Base64Codec.decode_output(output) == payload


@pytest.mark.needs("sentiment")
def test_pandas_codec_a_column_of_texts_becomes_a_column_of_labels(client: Http | Grpc) -> None:
    remarks = pd.DataFrame({"text": ["a wonderful, moving film", "dull, boring and far too long"]}, dtype=object)
    request = PandasCodec.encode_request(remarks, use_bytes=isinstance(client, Grpc))
    request.outputs = [RequestOutput(name="label")]
    labels = PandasCodec.decode_response(client.infer("sentiment", request))
    pd.testing.assert_frame_equal(labels, pd.DataFrame({"label": np.array([1, 0], np.int64)}))


@pytest.mark.needs("identity_fp32")
def test_pandas_codec_a_column_of_numbers_comes_back(client: Http | Grpc) -> None:
    numbers = np.array([1.5, -2, 3e8], np.float32)
    response = client.infer("identity_fp32", PandasCodec.encode_request(pd.DataFrame({"INPUT0": numbers})))
    pd.testing.assert_frame_equal(PandasCodec.decode_response(response), pd.DataFrame({"OUTPUT0": numbers}))


def test_an_unknown_model_is_not_found(http_client: Http, stub: Any) -> None:
    status, body = http_client.post("nope", simple())
    assert (status, InferenceErrorResponse.model_validate_json(body).error) == (404, UNKNOWN)
    with pytest.raises(grpc.RpcError) as caught:
        Grpc(stub, raw=True).infer("nope", simple())
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.NOT_FOUND, UNKNOWN)


@pytest.mark.needs("simple")
@pytest.mark.parametrize("raw", [False, True])
def test_a_wrong_shape_is_the_clients_mistake(http_client: Http, stub: Any, raw: bool) -> None:
    def request() -> Any:
        inputs = [NumpyCodec.encode_input("INPUT0", LEFT), NumpyCodec.encode_input("INPUT1", RIGHT[:, :15])]
        return InferenceRequest(id="a", inputs=inputs)

    text = "[request id: a] unexpected shape for input 'INPUT1' for model 'simple'. Expected [-1,16], got [1,15]. "
    status, body = http_client.post("simple", request())
    assert status == 400
    assert InferenceErrorResponse.model_validate_json(body).error.startswith(text)
    with pytest.raises(grpc.RpcError) as caught:
        Grpc(stub, raw).infer("simple", request())
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert str(caught.value.details()).startswith(text)


@pytest.mark.needs("identity_fp32")
def test_a_missing_number_is_refused(http_client: Http) -> None:
    """MLServer writes NaN as null, which no tensor can hold."""
    sent = NumpyCodec.encode_input("INPUT0", np.array([[1, np.nan]], np.float32))
    status, body = http_client.post("identity_fp32", InferenceRequest(inputs=[sent]))
    assert status == 400
    assert InferenceErrorResponse.model_validate_json(body).error
