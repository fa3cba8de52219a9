"""The table of datatypes, bytes on the wire, and the batch axis."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from penstock.errors import Kind, ServingError
from penstock.tensor import (
    BF16,
    BOOL,
    BYTES,
    DATATYPES,
    FP32,
    Array,
    count,
    count_bytes,
    join,
    objects,
    pack,
    pack_bytes,
    show,
    split,
    unpack_bytes,
)

TABLE = {  # wire name: (name in a configuration, bytes per element, dtype, list of gRPC)
    "BOOL": ("TYPE_BOOL", 1, "bool", "bool_contents"),
    "UINT8": ("TYPE_UINT8", 1, "uint8", "uint_contents"),
    "UINT16": ("TYPE_UINT16", 2, "uint16", "uint_contents"),
    "UINT32": ("TYPE_UINT32", 4, "uint32", "uint_contents"),
    "UINT64": ("TYPE_UINT64", 8, "uint64", "uint64_contents"),
    "INT8": ("TYPE_INT8", 1, "int8", "int_contents"),
    "INT16": ("TYPE_INT16", 2, "int16", "int_contents"),
    "INT32": ("TYPE_INT32", 4, "int32", "int_contents"),
    "INT64": ("TYPE_INT64", 8, "int64", "int64_contents"),
    "FP16": ("TYPE_FP16", 2, "float16", None),
    "BF16": ("TYPE_BF16", 2, ml_dtypes.bfloat16, None),
    "FP32": ("TYPE_FP32", 4, "float32", "fp32_contents"),
    "FP64": ("TYPE_FP64", 8, "float64", "fp64_contents"),
    "BYTES": ("TYPE_STRING", 0, "object", "bytes_contents"),
}


def test_the_table_is_the_protocols() -> None:
    assert {name: (row.config_name, row.itemsize, row.dtype, row.contents) for name, row in DATATYPES.items()} == {
        name: (config, size, np.dtype(dtype), contents) for name, (config, size, dtype, contents) in TABLE.items()
    }


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("UINT8", 0, 255), ("INT8", -128, 127), ("UINT64", 0, 2**64 - 1), ("INT64", -(2**63), 2**63 - 1)],
)
def test_integers_know_their_range(name: str, low: int, high: int) -> None:
    assert (DATATYPES[name].low, DATATYPES[name].high, DATATYPES[name].is_integer) == (low, high, True)


def test_floats_bool_and_bytes_are_no_integers() -> None:
    assert [name for name, row in DATATYPES.items() if not row.is_integer and not row.is_float] == ["BOOL", "BYTES"]


@pytest.mark.parametrize("name", [name for name in TABLE if name != "BYTES"])
def test_packed_bytes_read_back_as_the_same_array(name: str) -> None:
    row = DATATYPES[name]
    array = np.array([[0, 1, 1], [1, 0, 1]]).astype(row.dtype)
    packed = pack(array, row)
    assert len(packed) == 6 * row.itemsize
    np.testing.assert_array_equal(np.frombuffer(packed, row.dtype).reshape(2, 3), array)


@pytest.mark.parametrize(
    ("array", "packed"),
    [
        (np.array([1, 2], "<i4"), "0100000002000000"),
        (np.array([1, 2], ">i4"), "0100000002000000"),
        (np.array([[1, 2], [3, 4]], "<i4").T, "01000000030000000200000004000000"),
        (np.array([1, 2, 3, 4], "<i4")[::2], "0100000003000000"),
        (np.array(7, "<i4"), "07000000"),
        (np.empty((0, 3), "<i4"), ""),
    ],
    ids=["plain", "big-endian", "transposed", "strided", "scalar", "empty"],
)
def test_the_wire_is_little_endian_and_row_major(array: Array, packed: str) -> None:
    assert bytes(pack(array, DATATYPES["INT32"])).hex() == packed


def test_a_contiguous_array_is_packed_without_a_copy() -> None:
    array = np.zeros(4, np.float32)
    packed = pack(array, FP32)
    array[0] = 1.0
    assert bytes(packed[:4]) == b"\x00\x00\x80\x3f"


def test_bfloat16_is_the_upper_half_of_float32() -> None:
    assert bytes(pack(np.array([1.0, -2.0], ml_dtypes.bfloat16), BF16)).hex() == "803f00c0"


def test_bool_is_one_byte() -> None:
    assert bytes(pack(np.array([True, False]), BOOL)) == b"\x01\x00"


def test_elements_of_bytes_carry_their_length() -> None:
    array = objects([b"a", b"", b"\x00\xff"], [3, 1])
    assert bytes(pack(array, BYTES)) == b"\x01\x00\x00\x00a\x00\x00\x00\x00\x02\x00\x00\x00\x00\xff"


@given(st.lists(st.binary(max_size=20)))
def test_bytes_elements_survive_packing(elements: list[bytes]) -> None:
    packed = pack_bytes(elements)
    assert unpack_bytes(memoryview(packed), len(elements)) == (elements, len(packed))


@pytest.mark.parametrize(
    ("data", "most", "elements", "offset"),
    [
        ("", 5, [], 0),
        ("0100", 5, [], 0),
        ("0100000061 0200000062", 5, [b"a"], 5),
        ("0100000061 0100000062", 1, [b"a"], 5),
        ("0100000061 010000", 5, [b"a"], 5),
        ("ffffffff61", 5, [], 0),
    ],
    ids=["nothing", "cut length", "cut data", "more than wanted", "cut second length", "huge length"],
)
def test_unpacking_stops_before_what_is_cut_short(data: str, most: int, elements: list[bytes], offset: int) -> None:
    assert unpack_bytes(bytes.fromhex(data), most) == (elements, offset)


@pytest.mark.parametrize(
    ("shape", "size", "text"), [((), 1, "[]"), ((1, 16), 16, "[1,16]"), ((3, 0, -1), 0, "[3,0,-1]")]
)
def test_shapes_count_and_print(shape: tuple[int, ...], size: int, text: str) -> None:
    assert (count(shape), show(shape)) == (size, text)


def test_one_array_joins_as_the_view_it_is() -> None:
    array = np.zeros((2, 3))
    assert join([array]) is array


@given(st.lists(st.integers(0, 4), min_size=1, max_size=5))
def test_split_is_the_inverse_of_join(rows: list[int]) -> None:
    parts = [np.full((number, 2), index) for index, number in enumerate(rows)]
    for part, found in zip(parts, split(join(parts), rows), strict=True):
        np.testing.assert_array_equal(part, found)


def test_join_writes_where_it_is_told() -> None:
    out = np.empty((3, 1))
    assert join([np.ones((1, 1)), np.zeros((2, 1))], out) is out
    assert out.ravel().tolist() == [1, 0, 0]


def test_arrays_of_different_tails_cannot_join() -> None:
    with pytest.raises(ServingError, match=r"shapes \[1,2\] and \[1,3\] cannot share a batch") as caught:
        join([np.zeros((1, 2)), np.zeros((1, 3))])
    assert caught.value.kind is Kind.INVALID


@pytest.mark.parametrize("array", [np.zeros((3, 2)), np.array(1.0)], ids=["rows do not add up", "no batch axis"])
def test_what_does_not_add_up_cannot_be_split(array: Array) -> None:
    with pytest.raises(ServingError, match=r"cannot be split into batches of \[1, 1\] rows") as caught:
        split(array, [1, 1])
    assert caught.value.kind is Kind.INTERNAL


@pytest.mark.parametrize(
    ("data", "most", "found"),
    [
        (b"", 9, (0, 0)),
        (pack_bytes([b"ab", b"", b"c"]), 9, (3, 15)),
        (pack_bytes([b"ab", b"", b"c"]), 2, (2, 10)),
        (pack_bytes([b"ab"]) + b"\x05\0\0\0xy", 9, (1, 6)),
        (pack_bytes([b"ab"]) + b"\x05\0", 9, (1, 6)),
    ],
)
def test_elements_are_counted_as_they_would_be_read(data: bytes, most: int, found: tuple[int, int]) -> None:
    assert count_bytes(data, most) == found
    elements, end = unpack_bytes(data, most)
    assert (len(elements), end) == found
