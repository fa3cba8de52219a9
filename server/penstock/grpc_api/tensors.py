"""Inference messages ↔ requests and responses of the core. Protocol page gRPC, "ModelInfer"."""

from collections.abc import Iterator, Mapping
from functools import lru_cache

import numpy as np

from penstock import pb
from penstock.admission import Given, admit, check_count, check_rank, check_sequence_id
from penstock.errors import Kind, ServingError
from penstock.grpc_api.bodies import Body, Encoded
from penstock.messages import InferRequest, InferResponse, Parameter, RequestedOutput, Sequence
from penstock.model_config import Signature
from penstock.tensor import BYTES, DATATYPES, Array, objects, pack

PIECES_BYTES = 64 << 10  # from here on an answer's tensors are written from where they lie

# The typed lists of InferTensorContents in the order they are looked at, with the datatypes that each carries. The
# last one is named where a tensor's datatype is none of them.
CONTENTS: dict[str, tuple[str, ...]] = {
    "bool_contents": ("BOOL",),
    "int_contents": ("INT8", "INT16", "INT32"),
    "int64_contents": ("INT64",),
    "uint_contents": ("UINT8", "UINT16", "UINT32"),
    "uint64_contents": ("UINT64",),
    "fp32_contents": ("FP32",),
    "fp64_contents": ("FP64",),
    "bytes_contents": ("BYTES",),
}

# What the parameters with a meaning of their own may hold: members of InferParameter's oneof.
PARAMETERS: dict[str, tuple[str, ...]] = {
    "sequence_id": ("int64_param", "string_param"),
    "sequence_start": ("bool_param",),
    "sequence_end": ("bool_param",),
    "priority": ("int64_param", "uint64_param"),
    "timeout": ("int64_param",),  # microseconds in the queue
    "triton_enable_empty_final_response": ("bool_param",),  # of a stream
}
PLAIN = ("int64_param", "bool_param", "string_param", "double_param")


def decode(message: pb.ModelInferRequest, signature: Signature, max_tensors: int, max_rank: int) -> InferRequest:
    """The request in a message. Raw contents stay the bytes that protobuf gives; typed contents become arrays.

    Raises ServingError(INVALID) with Triton's texts, and UNSUPPORTED for a tensor in shared memory.
    """
    values = {key: _value(key, parameter) for key, parameter in message.parameters.items()}
    given = list(_given(message, max_tensors, max_rank))
    outputs = [_requested(output) for output in message.outputs]
    admitted = admit(signature, message.id, given, [output.name for output in outputs])
    return InferRequest(
        message.model_name,
        message.model_version,
        message.id,
        admitted.inputs,
        {output.name: output for output in outputs},
        parameters={key: value for key, value in values.items() if key not in PARAMETERS},
        priority=int(values.get("priority", 0)),
        timeout_us=int(values.get("timeout", 0)),
        sequence=_sequence(values) if "sequence_id" in values else None,
        rows=admitted.rows,
        empty_final=bool(values.get("triton_enable_empty_final_response")),
    )


def encode(response: InferResponse) -> Encoded:
    """The response as a serialised ModelInferResponse: one raw entry per output, in the same order, and no other data.

    Its fields are written by protobuf but for the raw contents, which follow as their tensors lie in memory: that is
    no copy instead of three, or one where they are short, and a message may exceed protobuf's 2 GiB until its size is
    checked.
    """
    if response.parameters:
        head = pb.ModelInferResponse(model_name=response.model, model_version=response.version, id=response.id)
        for key, value in response.parameters.items():
            _set(head.parameters[key], value)
        parts: list[Body] = [head.SerializeToString()]
    else:
        parts = [_plain_head(response.model, response.version)]
        if response.id:
            id = response.id.encode()
            parts += (ID_TAG, varint(len(id)), id)
    parts += [_output(tensor.name, tensor.datatype.name, tensor.array.shape) for tensor in response.outputs]
    size = 0
    for tensor in response.outputs:
        array = tensor.array
        if array.nbytes <= 1024 and tensor.datatype is not BYTES and array.dtype == tensor.datatype.dtype:
            raw: bytes | memoryview = array.tobytes()  # for so little, a copy costs less than a view
        else:
            raw = pack(array, tensor.datatype)
        length = len(raw)
        parts += (_raw_head(length), raw)
        size += length
    return parts if size >= PIECES_BYTES else b"".join(parts)


@lru_cache(1024)  # most answers begin like an earlier one: building this from fields takes 12 us for two outputs
def _plain_head(model: str, version: str) -> bytes:
    return pb.ModelInferResponse(model_name=model, model_version=version).SerializeToString()


@lru_cache(1024)
def _output(name: str, datatype: str, shape: tuple[int, ...]) -> bytes:
    """An entry of `outputs`. In bytes, messages put behind one another are one message."""
    entry = pb.ModelInferResponse.InferOutputTensor(name=name, datatype=datatype, shape=shape)
    return pb.ModelInferResponse(outputs=[entry]).SerializeToString()


# Length-delimited fields of ModelInferResponse: the third, behind those of the plain head, and the last, so that all
# bytes stand where protobuf puts them.
ID_TAG = bytes([pb.ModelInferResponse.ID_FIELD_NUMBER << 3 | 2])
RAW_OUTPUT_TAG = bytes([pb.ModelInferResponse.RAW_OUTPUT_CONTENTS_FIELD_NUMBER << 3 | 2])


@lru_cache(1024)
def _raw_head(length: int) -> bytes:
    return RAW_OUTPUT_TAG + varint(length)


def varint(number: int) -> bytes:
    """A number as protobuf writes it."""
    if number < 0x80:
        return bytes((number,))
    digits = bytearray()
    while number > 0x7F:
        digits.append(number & 0x7F | 0x80)
        number >>= 7
    digits.append(number)
    return bytes(digits)


def _set(parameter: pb.InferParameter, value: Parameter) -> None:
    if isinstance(value, bool):
        parameter.bool_param = value
    elif isinstance(value, int):
        parameter.int64_param = value
    elif isinstance(value, float):
        parameter.double_param = value
    else:
        parameter.string_param = value


def _value(key: str, parameter: pb.InferParameter) -> Parameter:
    """A parameter's value. Raises ServingError(INVALID) where its type, or its key, is not allowed."""
    if key.startswith("triton_") and key not in PARAMETERS:
        raise ServingError(
            Kind.INVALID,
            "parameter keys starting with 'triton_' are reserved for Triton usage. Only the following keys starting "
            "with 'triton_' are allowed: triton_enable_empty_final_response",
        )
    choice = parameter.WhichOneof("parameter_choice")
    if choice is None or choice not in PARAMETERS.get(key, PLAIN):
        # Triton's text for its plain parameters leaves out the double, which it accepts as well.
        wanted = " or ".join(PARAMETERS[key]) if key in PARAMETERS else "int64_param, bool_param, or string_param"
        raise ServingError(Kind.INVALID, f"invalid value type for '{key}' parameter, expected {wanted}.")
    value: Parameter = getattr(parameter, choice)
    if key == "priority" and int(value) < 0:
        raise ServingError(Kind.INVALID, "invalid value for 'priority', expected value >= 0.")
    return value


def _sequence(values: Mapping[str, Parameter]) -> Sequence | None:
    """The request's place in a sequence; None for the ids 0 and "", which mean that it is in none."""
    id = values["sequence_id"]
    if isinstance(id, str):
        check_sequence_id(id)
    else:
        id = int(id) % 2**64  # the core's ids are unsigned, as a model's control tensor is
    return Sequence(id, bool(values.get("sequence_start")), bool(values.get("sequence_end"))) if id else None


def _given(message: pb.ModelInferRequest, max_tensors: int, max_rank: int) -> Iterator[Given]:
    """The input tensors. Each takes the next raw entry, unless it brings its data along."""
    check_count(len(message.inputs), max_tensors)
    raw = message.raw_input_contents
    taken = 0
    for tensor in message.inputs:
        check_rank(tensor.name, len(tensor.shape), max_rank)
        where = f"input tensor '{tensor.name}' for model '{message.model_name}'"
        data: bytes | Array
        if tensor.parameters and (region := _region(tensor.name, tensor.parameters)) is not None:
            if tensor.HasField("contents"):
                raise ServingError(Kind.INVALID, f"unexpected 'content' provided when using shared memory for {where}")
            raise _no_shared_memory(tensor.name, region)
        # An empty message beside raw contents says nothing: MLServer's converter sends one for every input.
        if tensor.HasField("contents") and (not raw or tensor.contents.ByteSize()):
            if raw:
                raise ServingError(
                    Kind.INVALID,
                    "contents field must not be specified when using raw_input_contents for "
                    f"'{tensor.name}' for model '{message.model_name}'",
                )
            data = _typed(tensor, where)
        elif taken < len(raw):
            data = raw[taken]
            taken += 1
        else:
            raise ServingError(Kind.INVALID, f"unable to find data for {where} in request.")
        yield Given(tensor.name, tensor.datatype, tensor.shape[:], data)


def _typed(tensor: pb.ModelInferRequest.InferInputTensor, where: str) -> bytes | Array:
    """The elements of the one typed list that is filled; b"" where none is.

    Of the narrow integers the low bytes count, as in Triton: 300 for UINT8 is 44.
    """
    filled = [field.name for field, _ in tensor.contents.ListFields()]
    found: bytes | Array = b""
    for name, datatypes in CONTENTS.items():
        if name not in filled:
            continue
        if not isinstance(found, bytes):
            raise ServingError(
                Kind.INVALID, f"unexpected explicit tensor data for {where}, binary data was already supplied."
            )
        if tensor.datatype not in datatypes:
            expected = tensor.datatype if tensor.datatype in DATATYPES else "<invalid>"
            raise ServingError(
                Kind.INVALID,
                f"unexpected explicit tensor data for {where} of type '{datatypes[-1]}', "
                f"expected datatype '{expected}'",
            )
        elements = getattr(tensor.contents, name)
        if tensor.datatype == BYTES.name:
            found = objects(elements, (len(elements),))
        else:
            widest = np.fromiter(elements, DATATYPES[datatypes[-1]].dtype, len(elements))
            found = widest.astype(DATATYPES[tensor.datatype].dtype, copy=False)
    return found


def _requested(output: pb.ModelInferRequest.InferRequestedOutputTensor) -> RequestedOutput:
    if not output.parameters:
        return RequestedOutput(output.name)
    region = _region(output.name, output.parameters)
    count = 0
    if "classification" in output.parameters:
        parameter = output.parameters["classification"]
        if parameter.WhichOneof("parameter_choice") != "int64_param":
            raise ServingError(Kind.INVALID, "invalid value type for 'classification' parameter, expected int64_param")
        count = parameter.int64_param
        if count <= 0:
            raise ServingError(Kind.INVALID, "invalid value for 'classification' parameter, expected >= 0")
    if region is not None:
        if count:
            raise ServingError(Kind.INVALID, "output can't set both 'shared_memory_region' and 'classification'")
        raise _no_shared_memory(output.name, region)
    return RequestedOutput(output.name, count)


def _region(name: str, parameters: Mapping[str, pb.InferParameter]) -> str | None:
    """The shared memory region that a tensor says it lies in, or None. Raises ServingError(INVALID)."""
    for key, choice in (
        ("shared_memory_region", "string_param"),
        ("shared_memory_offset", "int64_param"),
        ("shared_memory_byte_size", "int64_param"),
    ):
        if key not in parameters:
            continue
        if "shared_memory_region" not in parameters:
            raise ServingError(
                Kind.INVALID,
                f"'{key}' can not be specified without 'shared_memory_region' parameter for tensor '{name}'",
            )
        if parameters[key].WhichOneof("parameter_choice") != choice:
            raise ServingError(
                Kind.INVALID, f"invalid value type for '{key}' parameter for tensor '{name}', expected {choice}."
            )
    if "shared_memory_region" not in parameters:
        return None
    if "shared_memory_byte_size" not in parameters:
        raise ServingError(
            Kind.INVALID,
            "'shared_memory_byte_size' must be specified along with 'shared_memory_region' parameter for tensor "
            f"'{name}'",
        )
    return parameters["shared_memory_region"].string_param


def _no_shared_memory(name: str, region: str) -> ServingError:
    return ServingError(
        Kind.UNSUPPORTED,
        f"tensor '{name}' cannot lie in shared memory region '{region}': this server has no shared memory",
    )
