"""One inference, four ways to carry it: JSON and binary over HTTP, raw and typed contents over gRPC.

A test states what it asks and what must come back; a carrier says both in its protocol. Each reads every answer that
the Open Inference Protocol allows and checks on the way what that says of all of them. What Triton asks beyond it, such
as answers that are always raw, has tests of its own. Binary over HTTP is Triton's: `clause_table.BEYOND_OIP`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import quote

import grpc
import numpy as np

from conformance_tests.grpc_wire import GrpcClient, details, pb, status
from conformance_tests.http_wire import Answer, HttpClient, encode
from conformance_tests.tensors import DATATYPES, Array, from_json, pack, texts, to_json, unpack

# By gRPC's names. 400 stands for several of them over HTTP.
HTTP_STATUS = {
    "OK": 200,
    "INVALID_ARGUMENT": 400,
    "ALREADY_EXISTS": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "RESOURCE_EXHAUSTED": 413,
    "CANCELLED": 499,
    "INTERNAL": 500,
    "UNIMPLEMENTED": 501,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
GRPC_STATUS = {number: name for name, number in reversed(HTTP_STATUS.items())}
JSON = "application/json"
Value = bool | int | float | str


@dataclass(frozen=True, slots=True)
class Input:
    """A tensor to send. `shape` where the request is to claim another than the array's."""

    name: str
    datatype: str
    array: Array
    shape: Sequence[int] | None = None

    @property
    def claimed(self) -> list[int]:
        return list(self.array.shape if self.shape is None else self.shape)


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor to ask for."""

    name: str
    classification: int = 0


@dataclass(frozen=True, slots=True)
class Call:
    """One inference, in no protocol yet."""

    model: str
    inputs: Sequence[Input]
    outputs: Sequence[Output] = ()
    version: str = ""
    id: str = ""
    parameters: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor that came back."""

    name: str
    datatype: str
    array: Array


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back, in the order in which it came."""

    model: str
    version: str
    id: str
    outputs: Sequence[Tensor]

    def __getitem__(self, name: str) -> Array:
        return {output.name: output.array for output in self.outputs}[name]


@dataclass(frozen=True, slots=True)
class Refusal:
    """How a call failed: the name of gRPC's status, and the text.

    Over HTTP the name follows from the number; one that stands for none, such as 422, remains a number.
    """

    status: str
    text: str


class Carrier(Protocol):
    """One way to carry an inference."""

    def send(self, call: Call) -> Reply | Refusal: ...


def refused(answer: Answer) -> Refusal:
    """An answer over HTTP that is an error, in the form that the Open Inference Protocol gives every error."""
    assert answer.status >= 400, answer
    return Refusal(GRPC_STATUS.get(answer.status, str(answer.status)), answer.error)


def infer(carrier: Carrier, call: Call) -> Reply:
    """The answer to a call that must succeed."""
    reply = carrier.send(call)
    assert isinstance(reply, Reply), reply
    return reply


def refusal(carrier: Carrier, call: Call) -> Refusal:
    """The refusal of a call that must fail."""
    reply = carrier.send(call)
    assert isinstance(reply, Refusal), reply
    return reply


class HttpJson:
    """Inputs and outputs as JSON."""

    def __init__(self, client: HttpClient) -> None:
        self._client = client

    def send(self, call: Call) -> Reply | Refusal:
        document = _document(call, [{"data": to_json(tensor.datatype, tensor.array)} for tensor in call.inputs])
        answer = self._client.post(infer_path(call.model, call.version), document)
        if answer.status != 200:
            return refused(answer)
        assert answer.headers["content-type"].partition(";")[0] == JSON
        assert "inference-header-content-length" not in answer.headers
        return read_reply(answer)


class HttpBinary:
    """Inputs and outputs as bytes behind the JSON."""

    def __init__(self, client: HttpClient) -> None:
        self._client = client

    def send(self, call: Call) -> Reply | Refusal:
        blobs = [pack(tensor.datatype, tensor.array) for tensor in call.inputs]
        document = _document(call, [{"parameters": {"binary_data_size": len(blob)}} for blob in blobs])
        for output in document.get("outputs", ()):
            output.setdefault("parameters", {})["binary_data"] = True
        if not call.outputs:
            document.setdefault("parameters", {})["binary_data_output"] = True
        answer = self._client.request("POST", infer_path(call.model, call.version), *with_binary(document, *blobs))
        if answer.status != 200:
            return refused(answer)
        return read_reply(answer)


class GrpcRaw:
    """Inputs as raw_input_contents."""

    def __init__(self, client: GrpcClient) -> None:
        self._client = client

    def send(self, call: Call) -> Reply | Refusal:
        message = infer_message(call)
        message.raw_input_contents.extend(pack(tensor.datatype, tensor.array) for tensor in call.inputs)
        return _over_grpc(self._client, message)


class GrpcTyped:
    """Inputs as typed contents, which FP16 and BF16 have none of."""

    def __init__(self, client: GrpcClient) -> None:
        self._client = client

    def send(self, call: Call) -> Reply | Refusal:
        message = infer_message(call)
        for entry, tensor in zip(message.inputs, call.inputs, strict=True):
            entry.contents.SetInParent()  # an empty tensor has contents as well
            getattr(entry.contents, DATATYPES[tensor.datatype].typed).extend(tensor.array.ravel().tolist())
        return _over_grpc(self._client, message)


def infer_path(model: str, version: str = "") -> str:
    return f"/v2/models/{quote(model)}{f'/versions/{version}' if version else ''}/infer"


def with_binary(document: object, *blobs: bytes) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a request in the binary form."""
    head = encode(document)
    return head + b"".join(blobs), {"Inference-Header-Content-Length": str(len(head))}


def infer_message(call: Call) -> Any:
    """A ModelInferRequest without the tensors' data."""
    message = pb.ModelInferRequest(model_name=call.model, model_version=call.version, id=call.id)
    for name, value in call.parameters.items():
        _set_parameter(message.parameters[name], value)
    for tensor in call.inputs:
        message.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.claimed)
    for output in call.outputs:
        asked = message.outputs.add(name=output.name)
        if output.classification:
            asked.parameters["classification"].int64_param = output.classification
    return message


def read_reply(answer: Answer) -> Reply:
    """An answer of status 200, JSON or binary. Every byte must belong to some output."""
    size = int(answer.headers.get("inference-header-content-length", len(answer.body)))
    head = Answer(answer.status, answer.headers, answer.body[:size]).json()
    rest = answer.body[size:]
    outputs = []
    for output in head["outputs"]:
        shape, datatype = output["shape"], output["datatype"]
        if "data" in output:
            array = from_json(datatype, output["data"], shape)
        else:
            length = output["parameters"]["binary_data_size"]
            array, rest = unpack(datatype, rest[:length], shape), rest[length:]
        outputs.append(Tensor(output["name"], datatype, array))
    assert rest == b"", f"{len(rest)} bytes belong to no output"
    return Reply(head["model_name"], head.get("model_version", ""), head.get("id", ""), outputs)


def _document(call: Call, data: Sequence[Mapping[str, object]]) -> dict[str, Any]:
    inputs = [
        {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.claimed, **payload}
        for tensor, payload in zip(call.inputs, data, strict=True)
    ]
    document: dict[str, Any] = {"inputs": inputs}
    if call.id:
        document["id"] = call.id
    if call.parameters:
        document["parameters"] = dict(call.parameters)
    if call.outputs:
        document["outputs"] = [
            {"name": output.name}
            | ({"parameters": {"classification": output.classification}} if output.classification else {})
            for output in call.outputs
        ]
    return document


def _over_grpc(client: GrpcClient, message: Any) -> Reply | Refusal:
    try:
        answer = client.call("ModelInfer", message)
    except grpc.RpcError as error:
        return Refusal(status(error), details(error))
    return Reply(answer.model_name, answer.model_version, answer.id, read_outputs(answer))


def read_outputs(answer: Any) -> list[Tensor]:
    """The outputs of a ModelInferResponse, which are raw all of them or typed all of them."""
    if answer.raw_output_contents:
        assert len(answer.raw_output_contents) == len(answer.outputs), "one raw entry per output"
        assert not any(output.contents.ListFields() for output in answer.outputs), "raw and typed in one answer"
        return [
            Tensor(output.name, output.datatype, unpack(output.datatype, raw, list(output.shape)))
            for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True)
        ]
    return [Tensor(output.name, output.datatype, _typed(output)) for output in answer.outputs]


def _typed(output: Any) -> Array:
    filled = {entry.name for entry, _ in output.contents.ListFields()}
    typed = DATATYPES[output.datatype].typed
    assert filled <= {typed}, f"{output.datatype} in {filled}"
    elements = getattr(output.contents, typed) if filled else []
    if output.datatype == "BYTES":
        return texts(elements, list(output.shape))
    return np.array(elements, DATATYPES[output.datatype].dtype).reshape(list(output.shape))


def _set_parameter(parameter: Any, value: Value) -> None:
    kind = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}[type(value)]
    setattr(parameter, kind, value)


def simple(call_id: str = "", rows: int = 1, outputs: Sequence[Output] = (), version: str = "") -> Call:
    """The model `simple`: OUTPUT0 = INPUT0 + INPUT1, OUTPUT1 = INPUT0 - INPUT1, INT32 [rows,16]."""
    left = np.arange(rows * 16, dtype=np.int32).reshape(rows, 16)
    right = np.ones((rows, 16), np.int32)
    inputs = [Input("INPUT0", "INT32", left), Input("INPUT1", "INT32", right)]
    return Call("simple", inputs, outputs, version, call_id)
