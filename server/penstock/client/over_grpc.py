"""The client over gRPC, with raw contents both ways."""

from typing import Any

import grpc

from penstock import pb
from penstock.client.access import Headers
from penstock.client.transport import Metadata, datatype, from_elements, refusal, tensors, unpack
from penstock.errors import Kind, ServingError
from penstock.messages import InferRequest, InferResponse
from penstock.tensor import Tensor, pack

SERVICE = "inference.GRPCInferenceService"
UNLIMITED = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))
OF_THE_CLIENT = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
)


class Grpc:
    """One channel to the server at `address`, HOST:PORT, without encryption."""

    def __init__(self, address: str, headers: Headers = ()) -> None:
        self._metadata = metadata(headers)
        self._channel = grpc.insecure_channel(address, UNLIMITED)

    def metadata(self, model: str, version: str) -> Metadata:
        message = self._call(
            "ModelMetadata", pb.ModelMetadataRequest(name=model, version=version), pb.ModelMetadataResponse
        )
        return Metadata(
            *(
                tensors((entry.name, entry.datatype, entry.shape) for entry in side)
                for side in (message.inputs, message.outputs)
            )
        )

    def infer(self, request: InferRequest) -> InferResponse:
        return decode(self._call("ModelInfer", encode(request), pb.ModelInferResponse))

    def close(self) -> None:
        self._channel.close()

    def _call(self, method: str, message: Any, response: Any) -> Any:
        call = self._channel.unary_unary(f"/{SERVICE}/{method}", type(message).SerializeToString, response.FromString)
        try:
            return call(message, metadata=self._metadata)
        except grpc.RpcError as error:
            status, details = error.code(), error.details() or "no reason was given"
            raise refusal(f"gRPC {status.name}", 400 if status in OF_THE_CLIENT else 500, details) from error


def metadata(headers: Headers) -> Headers:
    """Headers as gRPC has them: their names in lower case."""
    return tuple((name.lower(), value) for name, value in headers)


def encode(request: InferRequest) -> pb.ModelInferRequest:
    message = pb.ModelInferRequest(model_name=request.model, model_version=request.version, id=request.id)
    for tensor in request.inputs.values():
        message.inputs.add(name=tensor.name, datatype=tensor.datatype.name, shape=tensor.array.shape)
        message.raw_input_contents.append(bytes(pack(tensor.array, tensor.datatype)))
    if flow := request.sequence:
        id = message.parameters["sequence_id"]
        if isinstance(flow.id, str):
            id.string_param = flow.id
        else:
            id.int64_param = flow.id
        message.parameters["sequence_start"].bool_param = flow.start
        message.parameters["sequence_end"].bool_param = flow.end
    for output in request.outputs.values():
        asked = message.outputs.add(name=output.name)
        if output.classification:
            asked.parameters["classification"].int64_param = output.classification
    return message


def decode(message: pb.ModelInferResponse) -> InferResponse:
    """The response in a message of raw or typed contents. Raises ServingError(INTERNAL) where it contradicts itself."""
    raw = message.raw_output_contents
    if raw and len(raw) != len(message.outputs):
        raise ServingError(Kind.INTERNAL, f"the server sent {len(raw)} raw contents for {len(message.outputs)} outputs")
    outputs = []
    for position, entry in enumerate(message.outputs):
        of = datatype(entry.datatype)
        if raw:
            array = unpack(entry.name, of, entry.shape, raw[position])
        else:
            elements = getattr(entry.contents, of.contents) if of.contents else []
            array = from_elements(entry.name, of, entry.shape, list(elements))
        outputs.append(Tensor(entry.name, of, array))
    return InferResponse(message.model_name, message.model_version, message.id, outputs)
