"""Refusals of messages that only gRPC can express: each row of the protocol's tables, as a change to a good request."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from conformance_tests.carriers import Call, Input, infer_message, simple
from conformance_tests.clause_table import clause
from conformance_tests.grpc_wire import GrpcClient, pb
from conformance_tests.server import Target
from conformance_tests.tensors import pack, texts

UNKNOWN_ID = "[request id: <id_unknown>] "
Message = Any  # a ModelInferRequest
Change = Callable[[Message], object]


def raw(call: Call) -> Message:
    message = infer_message(call)
    message.raw_input_contents.extend(pack(tensor.datatype, tensor.array) for tensor in call.inputs)
    return message


def typed() -> Message:
    """`simple` with typed contents."""
    message = infer_message(simple())
    for entry in message.inputs:
        entry.contents.int_contents.extend(range(16))
    return message


@dataclass(frozen=True, slots=True)
class Case:
    """A ModelInfer and its refusal."""

    name: str
    clause: str
    change: Change
    text: str
    status: str = "INVALID_ARGUMENT"
    base: Callable[[], Message] = lambda: raw(simple())


def version(value: str) -> Change:
    return lambda message: setattr(message, "model_version", value)


def parameter(key: str, kind: str, value: object) -> Change:
    return lambda message: setattr(message.parameters[key], kind, value)


def input_parameters(**values: tuple[str, object]) -> Change:
    """Parameters of INPUT0, which then takes no raw entry."""

    def change(message: Message) -> None:
        for key, (kind, value) in values.items():
            setattr(message.inputs[0].parameters[key], kind, value)
        del message.raw_input_contents[0]

    return change


def output_parameters(**values: tuple[str, object]) -> Change:
    def change(message: Message) -> None:
        output = message.outputs.add(name="OUTPUT0")
        for key, (kind, value) in values.items():
            setattr(output.parameters[key], kind, value)

    return change


def first(**values: object) -> Change:
    """Fields of INPUT0; `shape` is replaced."""

    def change(message: Message) -> None:
        for key, value in values.items():
            if key == "shape":
                message.inputs[0].shape[:] = value
            else:
                setattr(message.inputs[0], key, value)

    return change


def contents(*lists: str, keep_raw: bool = False) -> Change:
    """INPUT0 with 16 ones in each of the lists."""

    def change(message: Message) -> None:
        for name in lists:
            one = {"bool_contents": True, "bytes_contents": b"1"}.get(name, 1)
            getattr(message.inputs[0].contents, name).extend([one] * 16)
        if not keep_raw:
            del message.raw_input_contents[:]

    return change


def wrong_type(key: str, expected: str) -> str:
    return f"invalid value type for '{key}' parameter, expected {expected}."


def no_data(name: str) -> str:
    return f"unable to find data for input tensor '{name}' for model 'simple' in request."


def unexpected(tail: str) -> str:
    return f"unexpected explicit tensor data for input tensor 'INPUT0' for model 'simple'{tail}"


NUMBER_ABOVE_0 = "version should be an integral value > 0"
RESERVED = (
    "parameter keys starting with 'triton_' are reserved for Triton usage. Only the following keys starting with "
    "'triton_' are allowed: triton_enable_empty_final_response"
)
ANY_TYPE = "int64_param, bool_param, or string_param"

CASES = (
    *(
        Case(
            f"version {value}",
            "grpc.version_errors",
            version(value),
            f"failed to get model version from specified version string '{value}' (details: stol), {NUMBER_ABOVE_0}",
        )
        for value in ("abc", "v1")
    ),
    Case(
        "version -1",
        "grpc.version_errors",
        version("-1"),
        f"invalid model version specified '-1' , {NUMBER_ABOVE_0}",
    ),
    Case("no contents", "grpc.contents_errors", lambda m: m.ClearField("raw_input_contents"), no_data("INPUT0")),
    Case("one raw entry short", "grpc.contents_errors", lambda m: m.raw_input_contents.pop(), no_data("INPUT1")),
    Case(
        "raw and typed contents",
        "grpc.contents_errors",
        contents("int_contents", keep_raw=True),
        "contents field must not be specified when using raw_input_contents for 'INPUT0' for model 'simple'",
    ),
    Case(
        "two typed lists",
        "grpc.contents_errors",
        contents("int_contents", "int64_contents"),
        unexpected(", binary data was already supplied."),
        base=typed,
    ),
    *(
        Case(
            f"{name} for INT32",
            "grpc.contents_errors",
            contents(name),
            unexpected(f" of type '{of}', expected datatype 'INT32'"),
        )
        for name, of in (
            ("bool_contents", "BOOL"),
            ("int64_contents", "INT64"),
            ("uint_contents", "UINT32"),
            ("uint64_contents", "UINT64"),
            ("fp32_contents", "FP32"),
            ("fp64_contents", "FP64"),
            ("bytes_contents", "BYTES"),
        )
    ),
    Case(
        "one raw entry short of bytes",
        "error_texts.byte_size",
        lambda m: m.raw_input_contents.__setitem__(1, bytes(60)),
        f"{UNKNOWN_ID}input byte size mismatch for input 'INPUT1' for model 'simple'. Expected 64, got 60",
    ),
    Case(
        "too few typed elements",
        "error_texts.byte_size",
        lambda m: m.inputs[1].contents.int_contents.pop(),
        f"{UNKNOWN_ID}input byte size mismatch for input 'INPUT1' for model 'simple'. Expected 64, got 60",
        base=typed,
    ),
    *(
        Case(
            f"datatype {name!r}",
            "datatypes.case_sensitive",
            first(datatype=name),
            f"{UNKNOWN_ID}inference input 'INPUT0' data-type is '<invalid>', but model 'simple' expects 'INT32'",
        )
        for name in ("XX", "int32", "TYPE_INT32", "")
    ),
    Case(
        "wildcard dimension",
        "errors.wildcard",
        first(shape=[1, -1]),
        f"{UNKNOWN_ID}All input dimensions should be specified for input 'INPUT0' for model 'simple', got [1,-1]",
    ),
    Case("negative priority", "grpc.parameter_errors", parameter("priority", "int64_param", -1),
         "invalid value for 'priority', expected value >= 0."),
    Case("priority is text", "grpc.parameter_errors", parameter("priority", "string_param", "1"),
         wrong_type("priority", "int64_param or uint64_param")),
    Case("timeout is text", "grpc.parameter_errors", parameter("timeout", "string_param", "1"),
         wrong_type("timeout", "int64_param")),
    Case("timeout is unsigned", "grpc.parameter_errors", parameter("timeout", "uint64_param", 1),
         wrong_type("timeout", "int64_param")),
    Case("sequence_id is bool", "grpc.parameter_errors", parameter("sequence_id", "bool_param", True),
         wrong_type("sequence_id", "int64_param or string_param")),
    Case("sequence_start is a number", "grpc.parameter_errors", parameter("sequence_start", "int64_param", 1),
         wrong_type("sequence_start", "bool_param")),
    Case("sequence_end is text", "grpc.parameter_errors", parameter("sequence_end", "string_param", "true"),
         wrong_type("sequence_end", "bool_param")),
    Case("empty final response is a number", "grpc.parameter_errors",
         parameter("triton_enable_empty_final_response", "int64_param", 1),
         wrong_type("triton_enable_empty_final_response", "bool_param")),
    Case("an unsigned parameter", "grpc.parameter_errors", parameter("foo", "uint64_param", 1),
         wrong_type("foo", ANY_TYPE)),
    Case("a parameter without a value", "grpc.parameter_errors", lambda m: m.parameters["foo"].SetInParent(),
         wrong_type("foo", ANY_TYPE)),
    Case("triton_x", "grpc.reserved_parameters", parameter("triton_x", "bool_param", True), RESERVED),
    Case("classification 0", "classification.zero", output_parameters(classification=("int64_param", 0)),
         "invalid value for 'classification' parameter, expected >= 0"),
    Case("classification -1", "classification.type", output_parameters(classification=("int64_param", -1)),
         "invalid value for 'classification' parameter, expected >= 0"),
    Case("classification is text", "classification.type", output_parameters(classification=("string_param", "2")),
         "invalid value type for 'classification' parameter, expected int64_param"),
    Case(
        "region without a size",
        "grpc.shared_memory_parameters",
        input_parameters(shared_memory_region=("string_param", "r")),
        "'shared_memory_byte_size' must be specified along with 'shared_memory_region' parameter for tensor 'INPUT0'",
    ),
    Case(
        "size without a region",
        "grpc.shared_memory_parameters",
        input_parameters(shared_memory_byte_size=("int64_param", 64)),
        "'shared_memory_byte_size' can not be specified without 'shared_memory_region' parameter for tensor 'INPUT0'",
    ),
    Case(
        "offset without a region",
        "grpc.shared_memory_parameters",
        input_parameters(shared_memory_offset=("int64_param", 0)),
        "'shared_memory_offset' can not be specified without 'shared_memory_region' parameter for tensor 'INPUT0'",
    ),
    Case(
        "region is a number",
        "grpc.shared_memory_parameters",
        input_parameters(shared_memory_region=("int64_param", 1), shared_memory_byte_size=("int64_param", 64)),
        "invalid value type for 'shared_memory_region' parameter for tensor 'INPUT0', expected string_param.",
    ),
)  # fmt: skip


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name, marks=clause(case.clause)) for case in CASES])
@clause("errors.survives")
@pytest.mark.needs("simple")
def test_a_bad_message_is_refused_and_the_channel_serves_on(grpc: GrpcClient, case: Case) -> None:
    message = case.base()
    case.change(message)
    assert grpc.refusal("ModelInfer", message) == (case.status, case.text)
    assert grpc.call("ModelReady", pb.ModelReadyRequest(name="simple")).ready


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (
            b"\1\0\0\0a\1\0",
            f"{UNKNOWN_ID}incomplete string length indicator for inference input 'INPUT0' for model 'identity_bytes', "
            "expecting 4 bytes but only 2 bytes available. Please make sure the string length indicator is in one "
            "buffer.",
        ),
        (
            b"\1\0\0\0a\5\0\0\0bc",
            "incomplete string data for inference input 'INPUT0', expecting string of length 5 but only 2 bytes "
            "available",
        ),
    ],
)
@clause("errors.string_elements")
@pytest.mark.needs("identity_bytes")
def test_strings_must_be_whole(grpc: GrpcClient, data: bytes, text: str) -> None:
    message = infer_message(Call("identity_bytes", [Input("INPUT0", "BYTES", texts(["a", "b"], (1, 2)))]))
    message.raw_input_contents.append(data)
    assert grpc.refusal("ModelInfer", message) == ("INVALID_ARGUMENT", text)


@clause("grpc.version_errors")
@pytest.mark.needs("simple")
def test_a_version_beyond_64_bits_is_refused(grpc: GrpcClient) -> None:
    status, text = grpc.refusal("ModelInfer", raw(simple(version="9223372036854775808")))
    assert status == "INVALID_ARGUMENT"
    assert text.startswith("failed to get model version from specified version string '9223372036854775808' (details: ")
    assert text.endswith(NUMBER_ABOVE_0)


@clause("grpc.version_errors")
@pytest.mark.needs("simple")
def test_leading_digits_make_a_version(grpc: GrpcClient) -> None:
    assert grpc.call("ModelInfer", raw(simple(version="1x"))).model_version == "1"


LOOKUPS = {
    "ModelReady": pb.ModelReadyRequest,
    "ModelMetadata": pb.ModelMetadataRequest,
    "ModelConfig": pb.ModelConfigRequest,
}


@clause("grpc.version_errors")
@pytest.mark.needs("simple")
@pytest.mark.parametrize("method", [*LOOKUPS])
def test_a_version_is_a_number_to_every_method(grpc: GrpcClient, method: str) -> None:
    text = f"failed to get model version from specified version string 'abc' (details: stol), {NUMBER_ABOVE_0}"
    assert grpc.refusal(method, LOOKUPS[method](name="simple", version="abc")) == ("INVALID_ARGUMENT", text)


@clause("grpc.contents_errors")
@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_half_floats_have_no_typed_contents(grpc: GrpcClient, target: Target, datatype: str) -> None:
    model = f"identity_{datatype.lower()}"
    target.require(model)
    message = infer_message(Call(model, [Input("INPUT0", datatype, np.zeros((1, 2), np.float32))]))
    message.inputs[0].contents.fp32_contents.extend([1, 2])
    text = (
        f"unexpected explicit tensor data for input tensor 'INPUT0' for model '{model}' of type 'FP32', expected "
        f"datatype '{datatype}'"
    )
    assert grpc.refusal("ModelInfer", message) == ("INVALID_ARGUMENT", text)
