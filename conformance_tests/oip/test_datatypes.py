"""Every datatype, in every way that can carry it, there and back through an identity model."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from conformance_tests.carriers import Call, Carrier, Input, infer, refusal
from conformance_tests.clause_table import clause
from conformance_tests.server import Target
from conformance_tests.tensors import DATATYPES, Array, pack, same, texts, unpack

NAN, INF = math.nan, math.inf


def integers(dtype: type[np.integer[Any]]) -> list[int]:
    limits = np.iinfo(dtype)
    return sorted({int(limits.min), int(limits.min) + 1, -1 if limits.min else 0, 0, 1, 44, int(limits.max)})


def floats(dtype: Any) -> list[float]:
    """Both zeros, extremes, the least normal and subnormal numbers."""
    limits: Any = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    finite = [limits.max, limits.min, limits.tiny, limits.smallest_subnormal, -limits.smallest_subnormal, limits.eps]
    return [0.0, -0.0, 1.0, -1.5, 0.1, *map(float, finite)]


VALUES: dict[str, Sequence[Any]] = {
    "BOOL": [True, False, True],
    "UINT8": integers(np.uint8),
    "UINT16": integers(np.uint16),
    "UINT32": integers(np.uint32),
    "UINT64": [*integers(np.uint64), 2**53 + 1, 2**63],
    "INT8": integers(np.int8),
    "INT16": integers(np.int16),
    "INT32": integers(np.int32),
    "INT64": [*integers(np.int64), 2**53 + 1, -(2**53) - 1],
    "FP16": floats(np.float16),
    "BF16": floats(ml_dtypes.bfloat16),
    "FP32": [*floats(np.float32), 16777216.0, 1e30, 1e-30],
    "FP64": [*floats(np.float64), 5e-324, 0.1 + 0.2, 2.0**53 + 2],
    "BYTES": ["plain", "", "two words", '"quoted" \\ / \b\f\n\r\t\x01\x7f', "ä€語😀\u2028\ufeff", "1"],
}


def array(datatype: str, values: Sequence[Any]) -> Array:
    return texts(values) if datatype == "BYTES" else np.array(values, DATATYPES[datatype].dtype)


def returned(carrier: Carrier, target: Target, datatype: str, sent: Array) -> Array:
    """The array after its way through identity_<datatype>."""
    model = f"identity_{datatype.lower()}"
    target.require(model)
    reply = infer(carrier, Call(model, [Input("INPUT0", datatype, sent)]))
    assert [(output.name, output.datatype) for output in reply.outputs] == [("OUTPUT0", datatype)]
    return reply["OUTPUT0"]


def ways(datatypes: Iterable[str], proves: Callable[[str, str], str]) -> list[Any]:
    """Each datatype in each way that carries it, as parameters, with the clause that this proves.

    JSON has no half floats and the typed lists have none, as far as the protocol goes: in JSON they are Penstock's.
    """
    return [
        pytest.param(carrier, datatype, marks=clause(proves(carrier, datatype)))
        for datatype in datatypes
        for carrier in ("http-json", "http-binary", "grpc-raw", "grpc-typed")
        if carrier != "grpc-typed" or DATATYPES[datatype].typed
    ]


def of_its_own(carrier: str, datatype: str) -> str:
    half = datatype in ("FP16", "BF16")
    return "json.half_floats" if half and carrier == "http-json" else f"datatypes.{datatype.lower()}"


EVERY_WAY = pytest.mark.parametrize(("carrier", "datatype"), ways(DATATYPES, of_its_own), indirect=["carrier"])


@EVERY_WAY
def test_every_value_comes_back_bit_for_bit(carrier: Carrier, target: Target, datatype: str) -> None:
    sent = array(datatype, VALUES[datatype]).reshape(1, -1)
    got = returned(carrier, target, datatype, sent)
    assert same(datatype, got, sent), (got, sent)


@EVERY_WAY
def test_rows_and_columns_keep_their_order(carrier: Carrier, target: Target, datatype: str) -> None:
    values = [VALUES[datatype][i % len(VALUES[datatype])] for i in range(35)]
    sent = array(datatype, values).reshape(7, 5)
    assert same(datatype, returned(carrier, target, datatype, sent), sent)


@pytest.mark.parametrize(
    ("carrier", "datatype"),
    ways(
        ("FP16", "BF16", "FP32", "FP64"),
        lambda carrier, datatype: (
            "json.non_finite"
            if carrier == "http-json"
            else "datatypes.bf16"
            if datatype == "BF16"
            else "datatypes.non_finite"
        ),
    ),
    indirect=["carrier"],
)
def test_what_is_no_number_comes_back(carrier: Carrier, target: Target, datatype: str) -> None:
    sent = array(datatype, [NAN, INF, 1.0, -INF]).reshape(2, 2)
    assert same(datatype, returned(carrier, target, datatype, sent), sent)


@pytest.mark.parametrize(
    ("carrier", "datatype"), ways(DATATYPES, lambda carrier, datatype: "datatypes.zero_size"), indirect=["carrier"]
)
@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_no_elements_come_back_as_none(carrier: Carrier, target: Target, datatype: str, shape: tuple[int, int]) -> None:
    sent = array(datatype, []).reshape(shape)
    assert returned(carrier, target, datatype, sent).shape == shape


# Sign, quietness and payload of a NaN: bits that only bytes carry.
NAN_BITS = {
    "FP16": (np.uint16, [0x7E01, 0xFE00, 0x7FFF]),
    "BF16": (np.uint16, [0x7FC1, 0xFFC0, 0x7FFF]),
    "FP32": (np.uint32, [0x7FC00001, 0xFFC00000, 0x7FFFFFFF, 0x7F800001]),
    "FP64": (np.uint64, [0x7FF8000000000001, 0xFFF8000000000000, 0x7FF0000000000001]),
}


@clause("datatypes.nan_payload")
@pytest.mark.parametrize("datatype", [*NAN_BITS])
@pytest.mark.parametrize("carrier", ["http-binary", "grpc-raw"], indirect=True)
def test_bytes_carry_every_bit_of_a_nan(carrier: Carrier, target: Target, datatype: str) -> None:
    unsigned, bits = NAN_BITS[datatype]
    sent = np.array([bits], unsigned).view(DATATYPES[datatype].dtype)
    assert same(datatype, returned(carrier, target, datatype, sent), sent)


@pytest.mark.parametrize(
    "elements",
    [
        pytest.param(["a\0b", "\0", "\0\0c"], id="nul", marks=clause("datatypes.bytes_nul")),
        pytest.param(["", "", ""], id="empty", marks=clause("datatypes.bytes_empty")),
        pytest.param(["ß", "日本語", "𝄞😀", "e\u0301"], id="non-ascii", marks=clause("datatypes.bytes_non_ascii")),
        pytest.param(["x" * (1 << 20), "", "é" * 70_000], id="long", marks=clause("datatypes.bytes_long")),
    ],
)
def test_text_comes_back_as_it_went(carrier: Carrier, target: Target, elements: list[str]) -> None:
    sent = texts(elements, (1, -1))
    assert same("BYTES", returned(carrier, target, "BYTES", sent), sent)


@clause("json.bytes_not_text")
@pytest.mark.parametrize("element", [b"\xff", b"\xc3", b"\xed\xa0\x80", b"ok \xfe"])
@pytest.mark.parametrize("carrier", ["http-binary", "grpc-raw", "grpc-typed"], indirect=True)
@pytest.mark.needs("identity_bytes")
def test_an_element_that_is_no_text_is_named_by_its_index(carrier: Carrier, element: bytes) -> None:
    call = Call("identity_bytes", [Input("INPUT0", "BYTES", texts([b"fine", element], (1, 2)))])
    refused = refusal(carrier, call)
    assert refused.status == "INVALID_ARGUMENT"
    assert "1" in refused.text
    assert "INPUT0" in refused.text


def test_packing_is_the_protocols() -> None:
    assert pack("BYTES", texts(["ab", ""])) == b"\2\0\0\0ab\0\0\0\0"
    assert pack("BF16", np.array([1.0, -2.0], ml_dtypes.bfloat16)) == b"\x80\x3f\x00\xc0"
    assert pack("INT32", np.arange(4, dtype=np.int32).reshape(2, 2).T) == b"\0\0\0\0\2\0\0\0\1\0\0\0\3\0\0\0"
    assert unpack("BYTES", b"\2\0\0\0ab\0\0\0\0", (2, 1)).tolist() == [[b"ab"], [b""]]
