"""Values as they stand on a command line, and the tensors that they become."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from penstock.client.transport import TensorInfo
from penstock.client.values import convert, read
from penstock.errors import Kind, ServingError
from penstock.tensor import DATATYPES, Array


def info(datatype: str, *shape: int) -> TensorInfo:
    return TensorInfo("x", DATATYPES[datatype], shape)


def no_input() -> str:
    raise AssertionError("standard input is not asked for")


def value(of: TensorInfo, text: str) -> Any:
    tensor = read(of, text, no_input)
    assert (tensor.name, tensor.datatype, tensor.array.dtype) == ("x", of.datatype, of.datatype.dtype)
    return tensor.array.tolist()


def refused(of: TensorInfo, text: str) -> str:
    with pytest.raises(ServingError) as caught:
        read(of, text, no_input)
    assert caught.value.kind is Kind.INVALID
    prefix = f"input 'x' ({of.datatype}): "
    assert caught.value.message.startswith(prefix)
    return caught.value.message.removeprefix(prefix)


@pytest.mark.parametrize(
    ("of", "text", "expected"),
    [
        (info("FP32", -1, 2), "[[1,2],[3,4.5]]", [[1, 2], [3, 4.5]]),
        (info("FP32", 2), '["NaN", "-Infinity"]', [pytest.approx(np.nan, nan_ok=True), -np.inf]),
        (info("FP64", 2), "[NaN, Infinity]", [pytest.approx(np.nan, nan_ok=True), np.inf]),
        (info("FP16", 1), "[0.1]", [0.0999755859375]),
        (info("BF16", 1), "[3]", [3]),
        (info("INT64", 2), "[-9223372036854775808, 9223372036854775807]", [-(2**63), 2**63 - 1]),
        (info("UINT64", 1), "[18446744073709551615]", [2**64 - 1]),
        (info("INT8", 2), "[3.0, -128]", [3, -128]),
        (info("BOOL", 2), "[true, false]", [True, False]),
        (info("FP32", -1, 0), "[[], []]", [[], []]),
        (info("BYTES", 2), '["a", "é"]', [b"a", "é".encode()]),
    ],
)
def test_json_becomes_the_datatype_of_the_input(of: TensorInfo, text: str, expected: Any) -> None:
    assert value(of, text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hello", b"hello"),
        ("5", b"5"),
        ("true", b"true"),
        ("", b""),
        ("{x}", b"{x}"),
        ('"[a]"', b"[a]"),
        ("a=b", b"a=b"),
    ],
)
def test_text_is_one_string_bare_or_as_json(text: str, expected: bytes) -> None:
    assert value(info("BYTES", -1, 1), text) == [[expected]]


@pytest.mark.parametrize(
    ("shape", "text", "expected"),
    [
        ([-1, 2], "[1,2]", [[1, 2]]),  # the batch axis
        ([1, 2], "[1,2]", [[1, 2]]),
        ([-1, 2], "[[1,2]]", [[1, 2]]),
        ([-1], "7", [7]),
        ([], "7", 7),
        ([], "[7]", 7),
        ([1], "7", [7]),
        ([-1, 1, 1], "7", [[[7]]]),
        ([-1, -1], "[]", [[]]),
    ],
)
def test_the_batch_axis_may_be_left_out(shape: list[int], text: str, expected: Any) -> None:
    assert value(info("FP32", *shape), text) == expected


@pytest.mark.parametrize(
    ("of", "text", "message"),
    [
        (info("FP32", -1, 16), "[[1,2]]", "expects shape [-1,16], got [1,2]"),
        (info("FP32", 2, 2), "[1,2]", "expects shape [2,2], got [2]"),
        (info("FP32", 2), "7", "expects shape [2], got []"),
        (info("FP32", -1), "[[1],[2,3]]", "its lists have different lengths on level 2"),
        (info("FP32", -1), "[1,[2]]", "its lists have different lengths on level 2"),
        (info("FP32", -1), "[1,", "'[1,' is no JSON: Expecting value: line 1 column 4 (char 3)"),
        (info("FP32", -1), "hello", "'hello' is no JSON: Expecting value: line 1 column 1 (char 0)"),
        (info("FP32", -1), '["x"]', 'expects numbers, got "x" at [0]'),
        (info("FP32", -1), "[null]", "expects numbers, got null at [0]"),
        (info("FP32", -1), "[true]", "expects numbers, got true at [0]"),
        (info("FP32", -1), "[0, 1e39]", "expects values within its range, got 1e+39 at [1]"),
        (info("FP16", -1), "70000", "expects values within its range, got 70000 as the only value"),
        (info("FP64", -1), f"[{10**400}]", f"expects values within its range, got {10**400} at [0]"),
        (info("UINT8", -1, 2), "[[0,1],[2,256]]", "expects integers from 0 to 255, got 256 at [1,1]"),
        (info("UINT8", -1), "[-1]", "expects integers from 0 to 255, got -1 at [0]"),
        (info("INT32", -1), "[1.5]", "expects integers from -2147483648 to 2147483647, got 1.5 at [0]"),
        (info("INT32", -1), "[NaN]", "expects integers from -2147483648 to 2147483647, got nan at [0]"),
        (info("BOOL", -1), "[1]", "expects true or false, got 1 at [0]"),
        (info("BYTES", -1), '["a", 5]', "expects strings, got 5 at [1]"),
        (
            info("BYTES", -1), "[INST] hi",
            "'[INST] hi' is no JSON: Expecting value: line 1 column 2 (char 1); "
            'plain text must not begin with [ or ": write it as a JSON string',
        ),
        (info("BYTES", -1), '"\\ud800"', "a string is not Unicode text: 'utf-8' codec can't encode character "
         "'\\ud800' in position 0: surrogates not allowed"),
    ],
)  # fmt: skip
def test_a_value_that_does_not_fit_is_refused_by_input_and_position(of: TensorInfo, text: str, message: str) -> None:
    assert refused(of, text) == message


def test_standard_input_is_json() -> None:
    assert read(info("INT32", -1, 2), "@-", lambda: " [1, 2]\n").array.tolist() == [[1, 2]]


def test_a_json_file_holds_a_value(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('["a", "b"]')
    assert value(info("BYTES", -1), f"@{path}") == [b"a", b"b"]


@pytest.mark.parametrize("name", ["letter.txt", "photo.jpg", "noending"])
def test_any_other_file_is_one_element_of_bytes(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"\xff\x00line\n")
    assert value(info("BYTES", -1, 1), f"@{path}") == [[b"\xff\x00line\n"]]


def test_an_array_file_keeps_its_shape(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.arange(6, dtype=np.float64).reshape(2, 3))
    assert value(info("FP32", -1, 3), f"@{path}") == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.npy", None, "cannot read '{path}': [Errno 2] No such file or directory: '{path}'"),
        ("short.npy", b"\x93NUMPY", "cannot read '{path}': "),
        ("empty.npy", b"", "cannot read '{path}': "),
        ("odd.csv", b"1,2", "'{path}' is none of .npy, .json, .png, .jpg, .jpeg"),
        ("bad.json", b"[1", "{path} is no JSON: "),
        ("latin.json", b"\xe9", "cannot read '{path}': "),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert refused(info("FP32", -1), f"@{path}").startswith(message.format(path=path))


def test_objects_are_not_read_from_files(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert "allow_pickle=False" in refused(info("BYTES", -1), f"@{path}")


@pytest.mark.parametrize(
    ("datatype", "array", "expected"),
    [
        ("FP32", np.array([0.5, np.nan, np.inf]), [0.5, pytest.approx(np.nan, nan_ok=True), np.inf]),
        ("FP32", np.array([2**24], np.int64), [2**24]),
        ("FP16", np.array([4096], np.uint16), [4096]),
        ("FP64", np.array([2**53], np.uint64), [2**53]),
        ("FP32", np.array([1, 2], ">f4"), [1, 2]),
        ("INT8", np.array([-128, 127], np.int64), [-128, 127]),
        ("INT64", np.array([3.0, -4.0]), [3, -4]),
        ("UINT8", np.array([255], np.float16), [255]),
        ("UINT64", np.array([5], np.int8), [5]),
        ("BF16", np.array([1.5], np.float32), [1.5]),
        ("BOOL", np.array([True]), [True]),
        ("BYTES", np.array(["a", "é"]), [b"a", "é".encode()]),
        ("BYTES", np.array([b"ab"]), [b"ab"]),
        ("INT8", np.array([], np.float64), []),
    ],
)
def test_arrays_are_converted_where_no_value_changes(datatype: str, array: Array, expected: Any) -> None:
    converted = convert(info(datatype, -1), array, "x.npy")
    assert converted.dtype == DATATYPES[datatype].dtype
    assert converted.tolist() == expected


@pytest.mark.parametrize(
    ("datatype", "array", "reason"),
    [
        ("FP32", np.array([1.0, 0.1]), "float64, and not every value of it is a FP32: 0.1 at [1]"),
        ("FP32", np.array([1e39]), "float64, and not every value of it is a FP32: 1e+39 at [0]"),
        ("FP32", np.array([[2**24 + 1]], np.int64), "int64, and not every value of it is a FP32: 16777217 at [0,0]"),
        ("FP64", np.array([2**63 - 1], np.int64), "int64, and not every value of it is a FP64: "),
        ("FP16", np.array([65536], np.int32), "int32, and not every value of it is a FP16: 65536 at [0]"),
        ("BF16", np.array([1.01], np.float32), "float32, and not every value of it is a BF16: 1.0"),
        ("INT8", np.array([1, 128], np.int16), "int16, and not every value of it is a INT8: 128 at [1]"),
        ("UINT64", np.array([-1], np.int64), "int64, and not every value of it is a UINT64: -1 at [0]"),
        ("INT64", np.array([2**63], np.uint64), "uint64, and not every value of it is a INT64: 9223372036854775808"),
        ("INT64", np.array([2.0**63]), "float64, and not every value of it is a INT64: 9.223372036854776e+18"),
        ("INT32", np.array([1.5]), "float64, and not every value of it is a INT32: 1.5 at [0]"),
        ("INT32", np.array([np.nan]), "float64, and not every value of it is a INT32: nan at [0]"),
        ("INT32", np.array([True]), "bool, which is no INT32"),
        ("BOOL", np.array([1], np.uint8), "uint8, which is no BOOL"),
        ("BYTES", np.array([1]), "int64, which is no BYTES"),
        ("FP32", np.array(["1"]), "<U1, which is no FP32"),
        ("FP64", np.array([1j]), "complex128, which is no FP64"),
    ],
)
def test_an_array_is_refused_where_a_value_would_change(datatype: str, array: Array, reason: str) -> None:
    with pytest.raises(ServingError, match=re.escape(f"'x.npy' holds {reason}")):
        convert(info(datatype, -1), array, "x.npy")


def test_the_longest_messages_stay_short() -> None:
    text = json.dumps([1] * 1000)[:-1]
    assert refused(info("FP32", -1), text).startswith(f"'{text[:37]}...' is no JSON")
