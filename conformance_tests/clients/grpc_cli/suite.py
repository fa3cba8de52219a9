"""Clients that have no messages compiled in and learn them from server reflection.

`buf curl` is a command line like curl; `grpc_requests` a Python library that takes and gives dictionaries.
"""

import base64
import json
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool
from grpc_requests import Client

LIMIT_S = 30.0
BUF = Path(__file__).with_name("node_modules") / ".bin" / "buf"
SERVICE = "inference.GRPCInferenceService"
SERVICES = {SERVICE, "grpc.health.v1.Health"}
METHODS = {
    "ServerLive",
    "ServerReady",
    "ModelReady",
    "ServerMetadata",
    "ModelMetadata",
    "ModelInfer",
    "ModelStreamInfer",
    "ModelConfig",
    "ModelStatistics",
    "RepositoryIndex",
    "RepositoryModelLoad",
    "RepositoryModelUnload",
    "SystemSharedMemoryStatus",
    "SystemSharedMemoryRegister",
    "SystemSharedMemoryUnregister",
    "CudaSharedMemoryStatus",
    "CudaSharedMemoryRegister",
    "CudaSharedMemoryUnregister",
    "TraceSetting",
    "LogSettings",
}
LEFT, RIGHT = list(range(16)), [3] * 16
SUM = struct.pack("<16i", *(a + b for a, b in zip(LEFT, RIGHT, strict=True)))
DIFFERENCE = struct.pack("<16i", *(a - b for a, b in zip(LEFT, RIGHT, strict=True)))
UNIMPLEMENTED = 12
UNKNOWN = "Request for unknown model: 'nope' is not found"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run of `buf curl` printed, and its exit status: eight times the gRPC code of a call that failed."""

    status: int
    out: str
    err: str

    def documents(self) -> list[Any]:
        assert self.status == 0, self
        decoder, rest, found = json.JSONDecoder(), self.out.strip(), []
        while rest:
            document, end = decoder.raw_decode(rest)
            found.append(document)
            rest = rest[end:].lstrip()
        return found

    def refusal(self) -> tuple[int, str, str]:
        """gRPC's code as a number and by name, and the details."""
        assert self.status % 8 == 0, self
        refused = json.loads(self.err)
        return self.status // 8, refused["code"], refused["message"]


@dataclass(frozen=True, slots=True)
class Buf:
    """`buf curl` against one address."""

    address: str

    def __call__(self, *arguments: str, method: str = "") -> Outcome:
        url = f"http://{self.address}{f'/{method}' if method else ''}"
        run = subprocess.run(
            [BUF, "curl", "--protocol", "grpc", *arguments, url], capture_output=True, text=True, timeout=LIMIT_S
        )
        return Outcome(run.returncode, run.stdout, run.stderr)

    def call(self, method: str, *messages: Any, service: str = SERVICE) -> Outcome:
        data = "\n".join(json.dumps(message) for message in messages)
        return self("--data", data, method=f"{service}/{method}")


@pytest.fixture
def buf(grpc_address: str) -> Buf:
    return Buf(grpc_address)


@pytest.fixture
def reflected(grpc_address: str) -> Iterator[Any]:
    client: Any = Client(grpc_address, descriptor_pool=descriptor_pool.DescriptorPool())
    yield client
    client.channel.close()


def typed(**options: Any) -> dict[str, Any]:
    inputs = [
        {"name": name, "datatype": "INT32", "shape": [1, 16], "contents": {"int_contents": numbers}}
        for name, numbers in (("INPUT0", LEFT), ("INPUT1", RIGHT))
    ]
    return {"model_name": "simple", "inputs": inputs, **options}


def raw(answer: Any, key: str = "rawOutputContents") -> list[bytes]:
    return [base64.b64decode(entry) for entry in answer[key]]


@pytest.mark.parametrize("protocol", ["grpc-v1", "grpc-v1alpha"])
def test_services_and_methods_are_listed(buf: Buf, protocol: str) -> None:
    services = buf("--reflect-protocol", protocol, "--list-services")
    assert services.status == 0, services
    assert set(services.out.split()) >= SERVICES
    methods = buf("--reflect-protocol", protocol, "--list-methods")
    assert methods.status == 0, methods
    assert set(methods.out.split()) >= {f"{SERVICE}/{method}" for method in METHODS}


@pytest.mark.parametrize("protocol", ["grpc-v1", "grpc-v1alpha"])
def test_a_call_is_made_from_reflection_alone(buf: Buf, protocol: str) -> None:
    answer = buf("--reflect-protocol", protocol, "--data", "{}", method=f"{SERVICE}/ServerLive")
    assert answer.documents() == [{"live": True}]


def test_the_standard_health_service_answers(buf: Buf) -> None:
    answer = buf.call("Check", {"service": SERVICE}, service="grpc.health.v1.Health")
    assert answer.documents() == [{"status": "SERVING"}]


@pytest.mark.needs("simple")
def test_metadata_comes_back(buf: Buf) -> None:
    (metadata,) = buf.call("ModelMetadata", {"name": "simple"}).documents()
    described = [
        {"name": name, "datatype": "INT32", "shape": ["-1", "16"]}
        for name in ("INPUT0", "INPUT1", "OUTPUT0", "OUTPUT1")
    ]
    assert metadata == {
        "name": "simple",
        "versions": ["1"],
        "platform": "onnxruntime_onnx",
        "inputs": described[:2],
        "outputs": described[2:],
    }


@pytest.mark.needs("simple")
def test_a_configuration_comes_back_though_another_file_defines_it(buf: Buf) -> None:
    (answer,) = buf.call("ModelConfig", {"name": "simple"}).documents()
    assert (answer["config"]["name"], answer["config"]["maxBatchSize"]) == ("simple", 8)
    assert answer["config"]["input"][0] == {"name": "INPUT0", "dataType": "TYPE_INT32", "dims": ["16"]}


@pytest.mark.needs("simple")
def test_typed_contents_are_summed(buf: Buf) -> None:
    (answer,) = buf.call("ModelInfer", typed(id="nr. 7")).documents()
    assert (answer["modelName"], answer["modelVersion"], answer["id"]) == ("simple", "1", "nr. 7")
    assert answer["outputs"] == [
        {"name": "OUTPUT0", "datatype": "INT32", "shape": ["1", "16"]},
        {"name": "OUTPUT1", "datatype": "INT32", "shape": ["1", "16"]},
    ]
    assert raw(answer) == [SUM, DIFFERENCE]


@pytest.mark.needs("simple")
def test_raw_contents_are_summed(buf: Buf) -> None:
    message = typed(outputs=[{"name": "OUTPUT1"}])
    for tensor in message["inputs"]:
        del tensor["contents"]
    packed = [struct.pack("<16i", *numbers) for numbers in (LEFT, RIGHT)]
    message["raw_input_contents"] = [base64.b64encode(entry).decode() for entry in packed]
    (answer,) = buf.call("ModelInfer", message).documents()
    assert [output["name"] for output in answer["outputs"]] == ["OUTPUT1"]
    assert raw(answer) == [DIFFERENCE]


@pytest.mark.needs("identity_bytes")
def test_texts_come_back_packed(buf: Buf) -> None:
    texts = [b"water", "wässer".encode(), b""]
    contents = {"bytes_contents": [base64.b64encode(text).decode() for text in texts]}
    tensor = {"name": "INPUT0", "datatype": "BYTES", "shape": [1, 3], "contents": contents}
    (answer,) = buf.call("ModelInfer", {"model_name": "identity_bytes", "inputs": [tensor]}).documents()
    assert raw(answer) == [b"".join(struct.pack("<I", len(text)) + text for text in texts)]


@pytest.mark.needs("simple")
def test_a_stream_answers_each_message(buf: Buf) -> None:
    outcome = buf.call("ModelStreamInfer", typed(id="a"), typed(id="b", model_name="nope"), typed(id="c"))
    if outcome.status // 8 == UNIMPLEMENTED:
        pytest.skip("this server has no ModelStreamInfer")
    answers = outcome.documents()
    good = {
        answer["inferResponse"]["id"]: answer["inferResponse"] for answer in answers if "errorMessage" not in answer
    }
    assert {request_id: raw(answer) for request_id, answer in good.items()} == {
        "a": [SUM, DIFFERENCE],
        "c": [SUM, DIFFERENCE],
    }
    assert [answer["errorMessage"] for answer in answers if "errorMessage" in answer] == [UNKNOWN]


@pytest.mark.needs("simple")
def test_refusals_carry_code_and_text(buf: Buf) -> None:
    assert buf.call("ModelInfer", typed(model_name="nope")).refusal() == (5, "not_found", UNKNOWN)
    message = typed(id="a")
    message["inputs"][0]["datatype"] = "FP32"
    message["inputs"][0]["contents"] = {"fp32_contents": [0.5] * 16}
    text = "[request id: a] inference input 'INPUT0' data-type is 'FP32', but model 'simple' expects 'INT32'"
    assert buf.call("ModelInfer", message).refusal() == (3, "invalid_argument", text)


def test_reflection_describes_methods_and_messages(reflected: Any) -> None:
    assert set(reflected.service_names) >= SERVICES
    service = reflected.get_service_descriptor(SERVICE)
    assert {method.name for method in service.methods} == METHODS
    described = reflected.describe_request(SERVICE, "ModelInfer")
    for line in ("model_name: STRING", "model_version: STRING", "inputs: MESSAGE", "raw_input_contents: BYTES"):
        assert line in described
    stream = reflected.get_method_descriptor(SERVICE, "ModelStreamInfer")
    assert (stream.client_streaming, stream.server_streaming) == (True, True)
    assert stream.output_type.full_name == "inference.ModelStreamInferResponse"


@pytest.mark.needs("simple")
def test_a_dictionary_is_enough_to_infer(reflected: Any) -> None:
    answer = reflected.request(SERVICE, "ModelInfer", typed(id="nr. 7"))
    assert (answer["model_name"], answer["model_version"], answer["id"]) == ("simple", "1", "nr. 7")
    assert raw(answer, "raw_output_contents") == [SUM, DIFFERENCE]


def test_a_dictionary_that_is_refused_raises(reflected: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        reflected.request(SERVICE, "ModelMetadata", {"name": "nope"})
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.NOT_FOUND, UNKNOWN)
