"""Bodies become requests with the protocol's checks, and responses become bodies."""

import math
import struct
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import orjson
import pytest
from penstock import oip_json
from penstock.errors import Kind, ServingError
from penstock.messages import InferRequest, InferResponse, RequestedOutput, Sequence
from penstock.model_config import Signature, TensorSpec
from penstock.oip_json import Decoded, Forms, Limits
from penstock.tensor import BYTES, DATATYPES, Tensor, objects

LIMITS = Limits(input_bytes=4096, tensors=4, rank=3)
SHAPE_TEXT = "Unable to parse 'data': Shape does not match true shape of 'data' field"
ONE_SOURCE = (
    "Input must set only one of the following fields: 'data', 'binary_data_size' in 'parameters', "
    "'shared_memory_region' in 'parameters'. But"
)


def signature(
    datatype: str = "INT32", inputs: tuple[str, ...] = ("A",), dims: tuple[int, ...] = (-1,), max_batch_size: int = 0
) -> Signature:
    shape = (-1, *dims) if max_batch_size else dims
    specs = {name: TensorSpec(name, DATATYPES[datatype], dims, shape) for name in (*inputs, "Y", "Z")}
    return Signature(
        "m",
        {name: specs[name] for name in inputs},
        {name: specs[name] for name in ("Y", "Z")},
        frozenset(inputs),
        max_batch_size,
        max_batch_size,
    )


def tensor(data: Any, shape: list[Any] | None = None, datatype: str = "INT32", name: str = "A") -> dict[str, Any]:
    return {"name": name, "shape": shape or [len(data)], "datatype": datatype, "data": data}


def binary(size: Any, shape: list[int], datatype: str = "INT32", name: str = "A") -> dict[str, Any]:
    return {"name": name, "shape": shape, "datatype": datatype, "parameters": {"binary_data_size": size}}


def decode(body: Any, to: Signature | None = None, blob: bytes = b"", limits: Limits = LIMITS) -> Decoded:
    head = body if isinstance(body, bytes) else orjson.dumps(body)
    return oip_json.decode(to or signature(), head + blob, len(head) if blob else None, limits)


def request(body: Any, to: Signature | None = None, blob: bytes = b"") -> InferRequest:
    to = to or signature()
    return decode(body, to, blob).admitted(to, "1")


def read(data: Any, datatype: str, shape: list[Any] | None = None) -> npt.NDArray[Any]:
    dims = tuple([-1] * len(shape)) if shape else (-1,)
    body = {"inputs": [tensor(data, shape, datatype)]}
    return request(body, signature(datatype, dims=dims)).inputs["A"].array


def refusal(body: Any, to: Signature | None = None, blob: bytes = b"", limits: Limits = LIMITS) -> str:
    with pytest.raises(ServingError) as caught:
        decode(body, to, blob, limits).admitted(to or signature(), "1")
    assert caught.value.kind is Kind.INVALID
    return caught.value.message


def mistyped(field: str, wanted: str) -> str:
    return f"Unable to parse '{field}': attempt to access JSON non-{wanted} as {wanted}"


def answer(*tensors: Tensor, id: str = "", **parameters: Any) -> InferResponse:
    return InferResponse("m", "1", id, list(tensors), parameters)


def written(datatype: str, values: Any) -> bytes:
    array = np.array(values, DATATYPES[datatype].dtype)
    _, [body] = oip_json.encode(answer(Tensor("Y", DATATYPES[datatype], array)), Forms(), "string")
    return bytes(body).partition(b'"data":')[2].removesuffix(b"}]}")


# -- data in JSON, coming in


@pytest.mark.parametrize(
    ("datatype", "data"),
    [
        ("BOOL", [True, False, True]),
        ("UINT8", [0, 255]),
        ("UINT16", [0, 65535]),
        ("UINT32", [0, 2**32 - 1]),
        ("UINT64", [0, 2**64 - 1]),
        ("INT8", [-128, 127]),
        ("INT16", [-32768, 32767]),
        ("INT32", [-(2**31), 2**31 - 1]),
        ("INT64", [-(2**63), 2**63 - 1]),
        ("FP16", [1.5, -2, 65504]),
        ("BF16", [1.5, -2, 256]),
        ("FP32", [1.5, -2, 0]),
        ("FP64", [1.5, -2, 0.1]),
    ],
)
def test_every_datatype_is_read(datatype: str, data: list[Any]) -> None:
    array = read(data, datatype)
    assert array.dtype == DATATYPES[datatype].dtype
    assert array.tolist() == data


def test_strings_are_read_as_utf_8_with_their_nul() -> None:
    assert read(["ä", "", "a\0b"], "BYTES").tolist() == ["ä".encode(), b"", b"a\0b"]


@pytest.mark.parametrize(
    "data", [[1, 2, 3, 4, 5, 6], [[1, 2], [3, 4], [5, 6]], [[1, [2]], 3, [[4, 5, 6]]], [[[[1, 2, 3, 4, 5, 6]]]]]
)
def test_only_the_number_of_leaves_counts(data: list[Any]) -> None:
    assert read(data, "INT32", [2, 3]).tolist() == [[1, 2, 3], [4, 5, 6]]


def test_a_scalar_is_read() -> None:
    body = {"inputs": [{"name": "A", "shape": [], "datatype": "INT32", "data": [7]}]}
    assert request(body, signature(dims=())).inputs["A"].array.tolist() == 7


def test_data_of_a_shape_without_elements_are_not_read() -> None:
    assert read(["anything"], "INT32", [0, 2]).shape == (0, 2)


@pytest.mark.parametrize("datatype", ["INT8", "UINT64"])
def test_an_integer_may_be_written_with_a_point(datatype: str) -> None:
    assert read([3.0, 4], datatype).tolist() == [3, 4]


@pytest.mark.parametrize(
    ("datatype", "data", "index", "shown", "least", "most"),
    [
        ("UINT8", [1, 256], 1, "256", 0, 255),
        ("UINT8", [-1], 0, "-1", 0, 255),
        ("INT8", [-129], 0, "-129", -128, 127),
        ("INT16", [0, 0, 32768], 2, "32768", -32768, 32767),
        ("UINT32", [2**32], 0, str(2**32), 0, 2**32 - 1),
        ("UINT64", [2**64 - 1, -1], 1, "-1", 0, 2**64 - 1),
        ("INT64", [2**63], 0, str(2**63), -(2**63), 2**63 - 1),
        ("INT32", [1, 1.5], 1, "1.5", -(2**31), 2**31 - 1),
    ],
)
def test_an_integer_that_does_not_fit_is_refused_with_its_index(
    datatype: str, data: list[Any], index: int, shown: str, least: int, most: int
) -> None:
    assert refusal({"inputs": [tensor(data, None, datatype)]}, signature(datatype)) == (
        f"Unable to parse 'data': element {index} of input 'A' is {shown}, but {datatype} expects an integer "
        f"from {least} to {most}"
    )


@pytest.mark.parametrize("number", ["1e400", "18446744073709551616", "NaN", "Infinity"])
def test_no_integer_is_made_of_what_is_none(number: str) -> None:
    body = b'{"inputs":[{"name":"A","shape":[1],"datatype":"UINT64","data":[' + number.encode() + b"]}]}"
    assert refusal(body, signature("UINT64"))


def test_bf16_is_rounded_once_to_nearest_even() -> None:
    above_tie = 1 + 2**-8 + 2**-40  # by way of FP32 this would become the tie itself, and then 1
    values = [1 + 2**-8, 1 + 3 * 2**-8, above_tie, -above_tie, 0.1, 3.3895313892515355e38]
    expected = [1.0, 1 + 2**-6, 1 + 2**-7, -(1 + 2**-7), 0.10009765625, 3.3895313892515355e38]
    assert read(values, "BF16").astype(np.float64).tolist() == expected


def test_fp16_is_rounded_to_nearest_even() -> None:
    values = [1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-11 + 2**-40, 65519.0, 2.0**-24, 2.0**-25]
    assert read(values, "FP16").tolist() == [1.0, 1 + 2**-9, 1 + 2**-10, 65504.0, 2.0**-24, 0.0]


@pytest.mark.parametrize(
    ("datatype", "value", "largest"),
    [
        ("FP16", 65520.0, "65504.0"),
        ("BF16", 3.4e38, "3.3895313892515355e+38"),
        ("FP32", 1e39, "3.4028234663852886e+38"),
    ],
)
def test_a_float_over_range_is_refused_with_its_index(datatype: str, value: float, largest: str) -> None:
    assert refusal({"inputs": [tensor([0, -value], None, datatype)]}, signature(datatype)) == (
        f"Unable to parse 'data': element 1 of input 'A' is {-value}, but {datatype} reaches only to {largest}"
    )


@pytest.mark.parametrize("datatype", ["FP16", "BF16", "FP32", "FP64"])
@pytest.mark.parametrize("data", [b'["NaN","Infinity","-Infinity",2]', b"[NaN,Infinity,-Infinity,2]"])
def test_non_finite_floats_come_in_both_forms(datatype: str, data: bytes) -> None:
    body = b'{"inputs":[{"name":"A","shape":[4],"datatype":"%s","data":%s}]}' % (datatype.encode(), data)
    values = request(body, signature(datatype)).inputs["A"].array.astype(np.float64).tolist()
    assert math.isnan(values[0])
    assert values[1:] == [math.inf, -math.inf, 2.0]


@pytest.mark.parametrize(
    ("datatype", "data", "text"),
    [
        ("INT32", ["1"], mistyped("data", "signed-integer")),
        ("INT32", [True], mistyped("data", "signed-integer")),
        ("UINT8", [None], mistyped("data", "unsigned-integer")),
        ("BOOL", [1], mistyped("data", "boolean")),
        ("FP32", ["one"], "Unable to parse 'data': attempt to access JSON non-number as double"),
        ("FP16", [False], "Unable to parse 'data': attempt to access JSON non-number as double"),
        ("BYTES", [1], "Unable to parse JSON bytes array: attempt to access JSON non-string as string"),
        ("BYTES", [{}], "Unable to parse JSON bytes array: attempt to access JSON non-string as string"),
        ("INT32", [1, 2], SHAPE_TEXT),
        ("INT32", [], "Failed to parse 'data' field: shape does not match true shape"),
        (
            "BYTES",
            ["a", "b"],
            "[request id: <id_unknown>] unexpected number of string elements 2 for inference input 'A' "
            "for model 'm', expecting 1",
        ),
        (
            "BYTES",
            [],
            "[request id: <id_unknown>] expected 1 string elements for inference input 'A' for model 'm', got 0",
        ),
        ("int32", [1], "invalid datatype for input A"),
        ("INT32", 1, mistyped("data", "array")),
        ("INT32", None, mistyped("data", "array")),
    ],
)
def test_data_that_cannot_be_read_are_refused(datatype: str, data: Any, text: str) -> None:
    expected = datatype if datatype in DATATYPES else "INT32"
    assert refusal({"inputs": [tensor(data, [1], datatype)]}, signature(expected)) == text


@pytest.mark.parametrize(
    ("levels", "datatype", "text"),
    [
        (101, "INT32", "Unable to parse 'data': JSON nesting depth exceeds maximum allowed limit (100)"),
        (101, "BYTES", "JSON nesting depth exceeds maximum allowed limit (100)"),
    ],
)
def test_data_are_nested_a_hundred_deep_at_the_most(levels: int, datatype: str, text: str) -> None:
    leaf: Any = 5 if datatype == "INT32" else "5"
    for _ in range(levels - 1):
        leaf = [leaf]
    assert read(leaf, datatype, [1]).size == 1
    assert refusal({"inputs": [tensor([leaf], [1], datatype)]}, signature(datatype)) == text


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ([-1], mistyped("shape", "unsigned-integer")),
        ([1.0], mistyped("shape", "unsigned-integer")),
        ([True], mistyped("shape", "unsigned-integer")),
        (
            [1, 2**63],
            "invalid shape for input 'A': shape [1,-9223372036854775808] contains one or more invalid dimensions",
        ),
        (
            [2**32, 2**31],
            "invalid shape for input 'A': shape [4294967296,2147483648] causes total element count to "
            "exceed maximum size of 9223372036854775807",
        ),
        (
            [2**62],
            "byte size overflow for input 'A': element count (4611686018427387904) * data type size "
            "(4) exceeds maximum allowed size (9223372036854775807)",
        ),
        (
            [1, 1, 1, 1],
            "invalid shape for input 'A': it has 4 dimensions, the limit is 3. Use --max-rank to increase it.",
        ),
    ],
)
def test_shapes_that_cannot_be_are_refused(shape: list[Any], text: str) -> None:
    assert refusal({"inputs": [tensor([1], shape)]}) == text


def test_more_than_the_limits_is_too_large() -> None:
    with pytest.raises(ServingError) as caught:
        decode({"inputs": [tensor([1], [1025])]})
    assert caught.value.kind is Kind.TOO_LARGE
    assert caught.value.message == (
        "JSON input 'A' has a byte_size (4100 bytes) that exceeds the maximum allowed value of 4096 bytes. "
        "Use --http-max-input-size to increase the limit."
    )
    with pytest.raises(ServingError) as caught:
        decode(b" " * 4097)
    assert caught.value.kind is Kind.TOO_LARGE
    assert caught.value.message == (
        "request JSON size of 4097 bytes exceeds the maximum allowed input size of 4096 bytes. "
        "Use --http-max-input-size to increase the limit."
    )
    text = "request has 5 inputs, the limit is 4. Use --max-tensors to increase it."
    assert refusal({"inputs": [tensor([1])] * 5}) == text


# -- binary data, coming in


def test_binary_tensors_are_views_of_the_body_in_the_order_of_the_inputs() -> None:
    head = orjson.dumps({"inputs": [binary(8, [2], name="B"), tensor([5]), binary(4, [1], name="C")]})
    body = bytearray(head + struct.pack("<3i", 1, 2, 3))
    to = signature(inputs=("A", "B", "C"))
    inputs = oip_json.decode(to, memoryview(body), len(head), LIMITS).admitted(to, "1").inputs
    body[len(head)] = 9
    assert {name: tensor.array.tolist() for name, tensor in inputs.items()} == {"A": [5], "B": [9, 2], "C": [3]}


def test_json_is_limited_and_binary_data_are_not() -> None:
    blob = bytes(8192)
    assert request({"inputs": [binary(8192, [2048])]}, blob=blob).inputs["A"].array.size == 2048


@pytest.mark.parametrize("datatype", sorted(DATATYPES))
def test_every_datatype_is_read_in_binary(datatype: str) -> None:
    row = DATATYPES[datatype]
    blob = (
        b"\x01\0\0\0a\0\0\0\0" if row is BYTES else bytes(range(2 * row.itemsize)) if datatype != "BOOL" else b"\0\x01"
    )
    array = request({"inputs": [binary(len(blob), [2], datatype)]}, signature(datatype), blob).inputs["A"].array
    expected = [b"a", b""] if row is BYTES else np.frombuffer(blob, row.dtype).tolist()
    assert array.tolist() == expected


@pytest.mark.parametrize(
    ("size", "blob", "text"),
    [
        (8, bytes(4), "unexpected size for input 'A', expecting 4 additional bytes for model 'm'"),
        (8, bytes(9), "unexpected additional input data for model 'm'"),
        (
            4,
            bytes(4),
            "[request id: <id_unknown>] input byte size mismatch for input 'A' for model 'm'. Expected 8, got 4",
        ),
        (-1, bytes(8), mistyped("binary_data_size", "unsigned-integer")),
        ("8", bytes(8), mistyped("binary_data_size", "unsigned-integer")),
    ],
)
def test_binary_data_of_the_wrong_size_are_refused(size: Any, blob: bytes, text: str) -> None:
    assert refusal({"inputs": [binary(size, [2])]}, blob=blob) == text


def test_without_a_header_length_there_is_no_binary_data() -> None:
    text = "unexpected size for input 'A', expecting 4 additional bytes for model 'm'"
    assert refusal({"inputs": [binary(4, [1])]}) == text


# -- raw binary requests


def raw(body: bytes, to: Signature, limits: Limits = LIMITS) -> InferRequest:
    decoded = oip_json.decode(to, body, 0, limits)
    assert decoded.forms == Forms(default=True)
    return decoded.admitted(to, "1")


def test_a_raw_body_is_the_only_input() -> None:
    assert raw(struct.pack("<4i", 1, 2, 3, 4), signature(dims=(2, -1))).inputs["A"].array.tolist() == [[1, 2], [3, 4]]
    assert raw(bytes(8), signature(dims=(2,), max_batch_size=8)).inputs["A"].array.shape == (1, 2)
    assert raw(b"", signature()).inputs["A"].array.shape == (0,)
    assert raw(b"text", signature("BYTES", dims=(1,))).inputs["A"].array.tolist() == [b"text"]


@pytest.mark.parametrize(
    ("to", "body", "text"),
    [
        (
            signature(inputs=("A", "B")),
            b"",
            "Raw request must only have 1 input (found 1) to be deduced but got 2 inputs in 'm' model configuration",
        ),
        (
            signature(dims=(-1, -1)),
            b"",
            "The shape of the raw input 'A' can not be deduced because there are more than one "
            "variable-sized dimension",
        ),
        (signature("BYTES"), b"", "For BYTE datatype raw input 'A', the model must have input shape [1]"),
        (signature(), bytes(5), "input byte size mismatch for input 'raw_input' for model 'm'. Expected 4, got 5"),
        (
            signature(dims=(2,)),
            bytes(4),
            "input byte size mismatch for input 'raw_input' for model 'm'. Expected 8, got 4",
        ),
    ],
)
def test_raw_bodies_that_do_not_fit_are_refused(to: Signature, body: bytes, text: str) -> None:
    with pytest.raises(ServingError) as caught:
        raw(body, to)
    assert caught.value.message == f"[request id: <id_unknown>] {text}"


def test_a_raw_body_is_limited() -> None:
    with pytest.raises(ServingError) as caught:
        raw(bytes(4097), signature())
    assert caught.value.kind is Kind.TOO_LARGE
    assert caught.value.message == (
        "Raw input has a byte_size (4097 bytes) that exceeds the maximum allowed value of 4096 bytes. "
        "Use --http-max-input-size to increase the limit."
    )


# -- everything but the data


def test_a_request_has_what_its_json_says() -> None:
    body = {
        "id": "seven",
        "model_name": "ignored",
        "parameters": {
            "sequence_id": 5,
            "sequence_end": True,
            "priority": 2,
            "timeout": 1000,
            "binary_data_output": True,
            "text": "t",
            "flag": False,
            "number": -3,
            "fraction": 0.5,
            "huge": 2**63,
        },
        "inputs": [tensor([1])],
        "outputs": [
            {"name": "Y", "parameters": {"classification": 3}},
            {"name": "Z", "parameters": {"binary_data": True, "unknown": []}},
        ],
    }
    decoded = decode(body)
    assert decoded.forms == Forms(default=True, named={"Y": False, "Z": True})
    made = decoded.admitted(signature(), "4")
    assert (made.model, made.version, made.id, made.rows) == ("m", "4", "seven", 1)
    assert (made.priority, made.timeout_us) == (2, 1000)
    assert made.sequence == Sequence(5, False, True)
    assert made.outputs == {"Y": RequestedOutput("Y", 3), "Z": RequestedOutput("Z")}
    assert made.parameters == {"text": "t", "flag": False, "number": -3, "fraction": 0.5, "huge": 2.0**63}


@pytest.mark.parametrize(
    ("id", "expected"), [(0, None), ("", None), ("s", Sequence("s")), (2**64 - 1, Sequence(2**64 - 1))]
)
def test_an_empty_sequence_id_means_no_sequence(id: Any, expected: Sequence | None) -> None:
    assert request({"parameters": {"sequence_id": id}, "inputs": [tensor([1])]}).sequence == expected


def test_a_sequence_id_is_short() -> None:
    with pytest.raises(ServingError) as caught:
        decode({"parameters": {"sequence_id": "ä" * 65}, "inputs": []})
    assert caught.value.kind is Kind.UNSUPPORTED
    assert caught.value.message == "string correlation ID cannot be longer than 128 characters"


RESERVED = "parameter keys starting with 'triton_' are reserved for Triton usage and should not be specified."


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"id": 5}, mistyped("id", "string")),
        ({"id": None}, mistyped("id", "string")),
        ({"parameters": []}, "failed to get request params.: attempt to get members for non-object"),
        ({"parameters": {"triton_x": 1}}, RESERVED),
        (
            {"parameters": {"foo": [1]}},
            "parameter 'foo' has invalid type. It should be either 'int', 'bool', or 'string'.",
        ),
        ({"parameters": {"sequence_id": -1}}, mistyped("sequence_id", "string")),
        ({"parameters": {"sequence_id": True}}, mistyped("sequence_id", "string")),
        ({"parameters": {"sequence_start": 1}}, mistyped("sequence_start", "boolean")),
        ({"parameters": {"priority": -1}}, mistyped("priority", "unsigned-integer")),
        ({"parameters": {"timeout": "1"}}, mistyped("timeout", "unsigned-integer")),
        ({"parameters": {"binary_data_output": 1}}, mistyped("binary_data_output", "boolean")),
        ({"inputs": {}}, mistyped("inputs", "array")),
        ({"inputs": [3]}, f"{ONE_SOURCE} no field is set"),
        ({"inputs": [{}]}, f"{ONE_SOURCE} no field is set"),
        (
            {"inputs": [{"data": [], "parameters": {"binary_data_size": 4}}]},
            f"{ONE_SOURCE} set 'data' 'binary_data_size'",
        ),
        (
            {"inputs": [{"parameters": {"binary_data_size": 4, "shared_memory_region": "r"}}]},
            f"{ONE_SOURCE} set 'binary_data_size' 'shared_memory_region'",
        ),
        ({"inputs": [{"data": []}]}, "Unable to parse 'name': attempt to access non-existing object member 'name'"),
        ({"inputs": [{"data": [], "name": 1}]}, mistyped("name", "string")),
        (
            {"inputs": [{"data": [], "name": "A"}]},
            "Unable to parse 'datatype': attempt to access non-existing object member 'datatype'",
        ),
        (
            {"inputs": [{"data": [], "name": "A", "datatype": "INT32"}]},
            "Unable to parse 'shape': attempt to access non-existing object member 'shape'",
        ),
        ({"outputs": {}}, mistyped("outputs", "array")),
        ({"outputs": [{}]}, "Unable to parse 'name': attempt to access non-existing object member 'name'"),
        (
            {"outputs": [{"name": "Y", "parameters": {"classification": -1}}]},
            "Unable to set 'classification': attempt to access JSON non-unsigned-integer as unsigned-integer",
        ),
        ({"outputs": [{"name": "Y", "parameters": {"binary_data": 1}}]}, mistyped("binary_data", "boolean")),
        (
            {"outputs": [{"name": "Y", "parameters": {"shared_memory_region": "r", "classification": 1}}]},
            "Output can't set both 'shared_memory_region' and 'classification'",
        ),
        (
            {"outputs": [{"name": "Y", "parameters": {"shared_memory_region": "r", "binary_data": True}}]},
            "Output can't set both 'shared_memory_region' and 'binary_data'",
        ),
        (
            {"outputs": [{"name": "Y"}, {"name": "Y"}]},
            "[request id: <id_unknown>] output 'Y' already exists in request",
        ),
        ({"outputs": [{"name": "A"}]}, "unexpected inference output 'A' for model 'm'"),
        ({"inputs": [tensor([1]), tensor([1])]}, "[request id: <id_unknown>] input 'A' already exists in request"),
    ],
)
def test_json_of_the_wrong_shape_is_refused(change: dict[str, Any], text: str) -> None:
    assert refusal({"inputs": [tensor([1])], **change}) == text


@pytest.mark.parametrize("body", [b"{}", b"[]", b"3"])
def test_without_inputs_there_is_nothing_to_infer(body: bytes) -> None:
    assert refusal(body) == "Unable to parse 'inputs': attempt to access non-existing object member 'inputs'"


@pytest.mark.parametrize(
    "change",
    [
        {"inputs": [{"name": "A", "datatype": "INT32", "shape": [1], "parameters": {"shared_memory_region": "r"}}]},
        {"outputs": [{"name": "A", "parameters": {"shared_memory_region": "r", "shared_memory_byte_size": 4}}]},
    ],
)
def test_shared_memory_is_refused_by_name(change: dict[str, Any]) -> None:
    with pytest.raises(ServingError) as caught:
        decode({"inputs": [tensor([1])], **change})
    assert caught.value.kind is Kind.UNSUPPORTED
    text = "tensor 'A' cannot lie in shared memory region 'r': this server has no shared memory"
    assert caught.value.message == text


# -- answers


@pytest.mark.parametrize(
    ("datatype", "values", "text"),
    [
        ("BOOL", [True, False], b"[true,false]"),
        ("UINT8", [0, 255], b"[0,255]"),
        ("INT16", [[-1], [2]], b"[-1,2]"),
        ("UINT64", [2**64 - 1], b"[18446744073709551615]"),
        ("INT64", [-(2**63)], b"[-9223372036854775808]"),
        ("FP16", [0.1, 1.0], b"[0.0999755859375,1.0]"),
        ("BF16", [0.1, 1.0], b"[0.10009765625,1.0]"),
        ("FP32", [0.1, 1.0], b"[0.10000000149011612,1.0]"),
        ("FP64", [0.1, 1e300], b"[0.1,1e+300]"),
        ("FP32", [math.nan, math.inf, -math.inf, 0.5], b'["NaN","Infinity","-Infinity",0.5]'),
        ("BF16", [math.inf], b'["Infinity"]'),
        ("FP32", 2.5, b"[2.5]"),
        ("INT32", [], b"[]"),
    ],
)
def test_data_are_written_as_a_flat_list(datatype: str, values: Any, text: bytes) -> None:
    assert written(datatype, values) == text


def test_what_lies_crosswise_in_memory_is_written_row_by_row() -> None:
    array = np.arange(6, dtype=np.int32).reshape(3, 2).T
    _, [body] = oip_json.encode(answer(Tensor("Y", DATATYPES["INT32"], array)), Forms(), "string")
    assert orjson.loads(body)["outputs"][0] == {
        "name": "Y", "datatype": "INT32", "shape": [2, 3], "data": [0, 2, 4, 1, 3, 5]
    }  # fmt: skip


def test_non_finite_floats_are_written_bare_where_that_is_asked_for() -> None:
    row = DATATYPES["FP32"]
    response = answer(Tensor("Y", row, np.array([np.nan, -np.inf, 1], row.dtype)), score=math.nan)
    _, [body] = oip_json.encode(response, Forms(), "literal")
    assert body == (
        b'{"model_name":"m","model_version":"1","parameters":{"score":NaN},'
        b'"outputs":[{"name":"Y","datatype":"FP32","shape":[3],"data":[NaN,-Infinity,1.0]}]}'
    )
    _, [body] = oip_json.encode(response, Forms(), "string")
    assert orjson.loads(body)["parameters"] == {"score": "NaN"}


def test_strings_are_written_as_text() -> None:
    response = answer(Tensor("Y", BYTES, objects(["ä".encode(), b'"\\\x01'], [2])))
    _, [body] = oip_json.encode(response, Forms(), "string")
    assert bytes(body).endswith('"data":["ä","\\"\\\\\\u0001"]}]}'.encode())


def test_strings_that_are_not_utf_8_are_told_to_come_in_binary() -> None:
    response = answer(Tensor("Y", BYTES, objects([b"a", b"\xff"], [2])))
    with pytest.raises(ServingError) as caught:
        oip_json.encode(response, Forms(), "string")
    assert caught.value.kind is Kind.INVALID
    assert caught.value.message == (
        "element 1 of output 'Y' is not UTF-8, so JSON cannot carry it. "
        "Please use the binary data format for output 'Y'"
    )
    _, buffers = oip_json.encode(response, Forms(named={"Y": True}), "string")
    assert bytes(buffers[1]) == b"\x01\0\0\0a\x01\0\0\0\xff"


def test_binary_data_follow_the_json_without_a_copy() -> None:
    array = np.array([[1, 2]], np.int32)
    texts = objects([b"ab"], [1])
    response = answer(
        Tensor("Y", DATATYPES["INT32"], array),
        Tensor("N", DATATYPES["INT32"], np.array([7], np.int32)),
        Tensor("Z", BYTES, texts),
        Tensor("B", DATATYPES["BF16"], np.array([1], ml_dtypes.bfloat16)),
        id="w",
        answer=42,
    )
    length, [head, *blobs] = oip_json.encode(response, Forms(default=True, named={"N": False}), "string")
    assert length == len(head)
    assert bytes(head) == (
        b'{"id":"w","model_name":"m","model_version":"1","parameters":{"answer":42},"outputs":['
        b'{"name":"Y","datatype":"INT32","shape":[1,2],"parameters":{"binary_data_size":8}},'
        b'{"name":"N","datatype":"INT32","shape":[1],"data":[7]},'
        b'{"name":"Z","datatype":"BYTES","shape":[1],"parameters":{"binary_data_size":6}},'
        b'{"name":"B","datatype":"BF16","shape":[1],"parameters":{"binary_data_size":2}}]}'
    )
    array[0, 0] = 9
    assert b"".join(blobs) == struct.pack("<2i", 9, 2) + b"\x02\0\0\0ab" + b"\x80\x3f"


def test_without_bytes_of_binary_data_the_answer_is_json() -> None:
    response = answer(Tensor("Y", DATATYPES["INT32"], np.empty((0,), np.int32)))
    length, buffers = oip_json.encode(response, Forms(default=True), "string")
    assert length is None
    assert len(buffers) == 1
    assert orjson.loads(buffers[0])["outputs"][0]["parameters"] == {"binary_data_size": 0}
