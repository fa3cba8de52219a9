"""The client over HTTP: tensors in binary both ways. Protocol: binary tensor data extension."""

import itertools
from typing import Any
from urllib.parse import quote

import orjson

from penstock.client.access import Headers
from penstock.client.connection import Connection
from penstock.client.transport import Metadata, datatype, from_elements, member, tensors, unpack
from penstock.errors import Kind, ServingError
from penstock.messages import InferRequest, InferResponse, RequestedOutput
from penstock.tensor import Array, Tensor, pack

HEADER_LENGTH = "Inference-Header-Content-Length"


class Http:
    """The protocol over one connection. Raises ServingError(INVALID) for a URL that is none."""

    def __init__(self, url: str, headers: Headers = ()) -> None:
        self._connection = Connection(url, headers)

    def metadata(self, model: str, version: str) -> Metadata:
        _, body = self._connection.ask("GET", _path(model, version), {})
        document = _parse(body)
        return Metadata(
            *(
                tensors(
                    (member(entry, "name", str), member(entry, "datatype", str), member(entry, "shape", list))
                    for entry in member(document, side, list)
                )
                for side in ("inputs", "outputs")
            )
        )

    def infer(self, request: InferRequest) -> InferResponse:
        head, buffers = encode(request)
        headers = {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(head))}
        path = f"{_path(request.model, request.version)}/infer"
        answered, body = self._connection.ask("POST", path, headers, [head, *buffers])
        length = answered.get(HEADER_LENGTH)
        if length is None:
            return decode(body, None)
        if not (length.isdecimal() and int(length) <= len(body)):
            raise ServingError(Kind.INTERNAL, f"the server's answer has {len(body)} bytes, {HEADER_LENGTH} {length}")
        return decode(body, int(length))

    def close(self) -> None:
        self._connection.close()


def encode(request: InferRequest) -> tuple[bytes, list[bytes | memoryview]]:
    """The JSON of a request, and the tensors that follow it."""
    inputs, buffers = [], []
    for tensor in request.inputs.values():
        data = pack(tensor.array, tensor.datatype)
        inputs.append(_tensor(tensor, len(data)))
        if len(data):
            buffers.append(data)
    parameters: dict[str, Any] = {"binary_data_output": True}
    if flow := request.sequence:
        parameters |= {"sequence_id": flow.id, "sequence_start": flow.start, "sequence_end": flow.end}
    document: dict[str, Any] = {"inputs": inputs, "parameters": parameters}
    if request.id:
        document["id"] = request.id
    if request.outputs:
        document["outputs"] = [_output(output) for output in request.outputs.values()]
    return orjson.dumps(document), buffers


def decode(body: bytes, length: int | None) -> InferResponse:
    """The response in a body whose first `length` bytes are JSON (None: all), whichever form each output has."""
    view = memoryview(body)
    offset = len(view) if length is None else length
    document = _parse(view[:offset])
    outputs = []
    for entry in member(document, "outputs", list):
        name, of = member(entry, "name", str), datatype(member(entry, "datatype", str))
        shape = member(entry, "shape", list)
        array: Array
        if "data" in entry:
            array = from_elements(name, of, shape, _flat(member(entry, "data", list)))
        else:
            size = member(member(entry, "parameters", dict), "binary_data_size", int)
            array = unpack(name, of, shape, view[offset : offset + size])
            offset += size
        outputs.append(Tensor(name, of, array))
    model, version = member(document, "model_name", str), document.get("model_version") or ""
    return InferResponse(model, version, document.get("id") or "", outputs)


def _tensor(tensor: Tensor, size: int) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "datatype": tensor.datatype.name,
        "shape": tensor.array.shape,
        "parameters": {"binary_data_size": size},
    }


def _output(output: RequestedOutput) -> dict[str, Any]:
    classes = {"classification": output.classification} if output.classification else {}
    return {"name": output.name, "parameters": {"binary_data": True, **classes}}


def _path(model: str, version: str) -> str:
    path = f"/v2/models/{quote(model, safe='')}"
    return f"{path}/versions/{quote(version, safe='')}" if version else path


def _parse(body: bytes | memoryview) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ServingError(Kind.INTERNAL, f"the server's answer is no JSON: {error}") from error


def _flat(nested: list[Any]) -> list[Any]:
    while any(isinstance(item, list) for item in nested):
        nested = list(itertools.chain.from_iterable(nested))
    return nested
