"""Long arrays of numbers are read from JSON as they would be one by one."""

import json
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from penstock import json_numbers, oip_json
from penstock.errors import ServingError
from penstock.json_numbers import FROM_BYTES, UnusualError
from penstock.model_config import Signature, TensorSpec
from penstock.oip_json import Decoded, Limits
from penstock.tensor import DATATYPES

pytest.importorskip("simdjson")  # without which nothing is taken out

LIMITS = Limits(input_bytes=1 << 20, tensors=4, rank=3)
SPEC = TensorSpec("A", DATATYPES["FP32"], (-1,), (-1,))
SIGNATURE = Signature("m", {"A": SPEC}, {"A": SPEC}, frozenset({"A"}), 0, 0)
FILLER = FROM_BYTES // 2 + 1  # times "1," are long enough to be taken out

NUMBERS = (
    "0", "-0", "-0.0", "7", "3.0", "-1", "255", "256", "127", "-129", "1E5", "1e+2", "0.1", "2.5", "65504", "65520",
    "16777217", "9007199254740993", "-9007199254740993.0", "9223372036854775807", "9223372036854775808",
    "18446744073709551615", "18446744073709551616", "-9223372036854775808", "-9223372036854775809", "1e22", "5e-324",
    "2.2250738585072011e-308", "1e-999", "3.4028235e38", "3.4028236e38", "-1e39", "1.7976931348623157e308", "1e309",
    "1e999", "123456789012345678901234567890", f"0.{'3' * 400}",
)  # fmt: skip
OTHERS = (
    "true", "false", "null", "NaN", "Infinity", "-Infinity", '"NaN"', '"x"', "[]", "{}", '{"data":[1]}', "[1]",
    "[[2],3]", "01", "1.", ".5", "+1", "1e", "--1", "", "1 2", "[1][2]", "[,1]", "[1,]", "]", "[", "\x01", "é",
)  # fmt: skip


def outcome(body: bytes, whole: bool) -> Any:
    """What a body is decoded to, comparable; `whole`: in the way that takes nothing out."""
    try:
        if whole:
            document = oip_json.parse(body, LIMITS.input_bytes)
            decoded = oip_json.read("m", document, LIMITS, memoryview(body), len(body))
        else:
            decoded = oip_json.decode(SIGNATURE, body, None, LIMITS)
    except ServingError as error:
        return error.kind, error.message
    return comparable(decoded)


def comparable(decoded: Decoded) -> Any:
    arrays = []
    for tensor in decoded.given:
        array = tensor.data
        assert isinstance(array, np.ndarray)
        content = array.tolist() if array.dtype == object else array.tobytes()
        arrays.append((tensor.name, tensor.datatype, tensor.shape, array.dtype, array.shape, content))
    return decoded.id, decoded.parameters, arrays


def taken_out(body: bytes) -> bool:
    """Whether decoding reads what was taken out of the body, and does not turn back."""
    lifted = json_numbers.lift(body)
    if lifted is None:
        return False
    try:
        oip_json.read("m", orjson.loads(lifted.text), LIMITS, memoryview(body), len(body), lifted.arrays)
    except (UnusualError, ServingError, ValueError):
        return False
    return True


def body(data: str, datatype: str = "FP32", size: int | None = None, more: str = "") -> bytes:
    size = data.count(",") + 1 if size is None else size
    return f'{{"inputs":[{{"name":"A","datatype":"{datatype}","shape":[{size}],"data":{data}{more}}}]}}'.encode()


@pytest.mark.parametrize("datatype", [name for name, row in DATATYPES.items() if row.is_float or row.is_integer])
@pytest.mark.parametrize("form", ["flat", "nested", "spaced", "lines"])
def test_long_arrays_are_read_from_their_text(datatype: str, form: str) -> None:
    values = np.arange(9000) % 120
    numbers = values.reshape(30, 3, 100).tolist() if form != "flat" else values.tolist()
    data = json.dumps(
        numbers, separators=(", ", ": ") if form == "spaced" else (",", ":"), indent=2 if form == "lines" else None
    )
    document = body(data, datatype, 9000)
    assert taken_out(document)
    decoded = oip_json.decode(SIGNATURE, document, None, LIMITS)
    array = decoded.given[0].data
    assert isinstance(array, np.ndarray)
    assert array.dtype == DATATYPES[datatype].dtype
    assert array.tolist() == values.tolist()


@given(
    datatype=st.sampled_from(sorted(DATATYPES)),
    odd=st.lists(st.sampled_from(NUMBERS) | st.floats().map(repr) | st.integers(-(2**70), 2**70).map(str), max_size=4),
    other=st.sampled_from(OTHERS) | st.none(),
    surplus=st.sampled_from([0, 0, 0, -1, 1]),
    rows=st.sampled_from([1, 1, 2, 3]),
    where=st.floats(0, 1),
    data=st.data(),
)
@settings(max_examples=600, deadline=None)
def test_whatever_stands_in_an_array_it_is_read_or_refused_as_without_taking_it_out(
    datatype: str, odd: list[str], other: str | None, surplus: int, rows: int, where: float, data: st.DataObject
) -> None:
    elements = ["1"] * FILLER
    for element in [*odd, *([] if other is None else [other])]:
        elements.insert(round(where * len(elements)), element)
    size = len(elements) + surplus
    third = len(elements) // rows + 1
    text = ",".join("[" + ",".join(elements[at : at + third]) + "]" for at in range(0, len(elements), third))
    document = body(f"[{text}]", datatype, size)
    if data.draw(st.integers(0, 3)) == 0:  # a byte goes, comes or changes anywhere
        at = data.draw(st.integers(0, len(document) - 1))
        document = document[:at] + data.draw(st.binary(max_size=2)) + document[at + 1 :]
    assert outcome(document, whole=False) == outcome(document, whole=True)


LONG = "[" + "1," * FILLER + "2]"
SIZE = FILLER + 1


@pytest.mark.parametrize(
    ("document", "lifted"),
    [
        (body(LONG), True),
        (body(LONG, more=',"data":[3]', size=1), False),  # of equal names the last counts
        (body("[3]", more=f',"data":{LONG}', size=SIZE), True),
        (body(LONG, more=f',"data":{LONG}'), False),
        (body(LONG, more=',"parameters":{"data":' + LONG + "}"), False),
        (body(LONG, more=',"parameters":{"x":NaN}'), False),  # orjson refuses it; the standard library does not
        (body(LONG, more=r',"x":"\"data\":[1]"'), True),
        (body(LONG, more=r',"x":"\\\"data\":' + LONG + '"'), True),
        (body(LONG, more=r',"x":"\\"data":' + LONG), False),
        (body(LONG, more=',"x":"é"'), True),
        (body(LONG, more=',"x":"').replace(b'"x":"', b'"x":"\xff'), False),
        (body(LONG, more=',"binary_data_size":3'), True),
        (body(LONG, "BOOL"), False),
        (body(LONG, "BYTES"), False),
        (body(LONG, "FP31"), False),
        (body(LONG, size=0), False),  # such data is not read at all, but must be JSON
        (body(LONG[:-2] + ",2]", size=0), False),
        (body(LONG + "]"), False),
        (body(LONG) + b"x", False),
        (body(LONG)[:-1], False),
        (body("[" * 99 + LONG + "]" * 99), True),
        (body("[" * 100 + LONG + "]" * 100), False),
        (body(LONG[:-1] + ",[]]", size=SIZE), True),
        (body(LONG, more=',"x":' + "[" * 900 + "]" * 900), True),
        (body(LONG, more=',"x":' + "[" * 1000 + "]" * 1000), False),
        (body(LONG).replace(b'"data"', rb'"d\u0061ta"'), False),
        (f'{{"parameters":{{"a":1}},"data":{LONG},"inputs":[]}}'.encode(), False),
        (body(LONG).replace(b'"inputs"', b'"parameters":{"data":' + LONG.encode() + b'},"inputs"'), False),
    ],
)  # fmt: skip
def test_documents_are_read_the_same_whether_or_not_an_array_can_be_taken_out(document: bytes, lifted: bool) -> None:
    assert taken_out(document) == lifted
    assert outcome(document, whole=False) == outcome(document, whole=True)


TOKENS = ("[", "]", ",", ",", "[[", "],[", "]]", "1", "2", "-3", "4e1", "5.5", " ", "\n\t", "true", "00", "[]", "1,2,3")


@given(tokens=st.lists(st.sampled_from(TOKENS), max_size=30), part_bytes=st.integers(1, 12))
@settings(max_examples=3000, deadline=None)
@example(["1", ",", "[", ",", "2", "]"], 1)
@example(["[", "1", ",", "]", ",", "2"], 1)
@example(["1", ",", ",", "2"], 1)
@example(["1", "]", ",", "[", "2"], 1)
def test_an_array_cut_anywhere_is_what_it_was(tokens: list[str], part_bytes: int) -> None:
    text = "[" + "".join(tokens) + "]"
    try:
        expected = orjson.loads(text)
    except orjson.JSONDecodeError:
        expected = None
    try:
        read = np.concatenate([*json_numbers.read(text.encode(), "d", part_bytes)]).tolist()
    except UnusualError:
        assert expected is None or "[]" in text.translate({32: "", 9: "", 10: ""}) or "true" in text
    else:
        assert read == leaves(expected)


@given(values=st.lists(st.lists(st.integers(-9, 9), min_size=1), min_size=1), part_bytes=st.integers(1, 40))
@settings(deadline=None)
def test_arrays_of_numbers_are_never_unusual(values: list[list[int]], part_bytes: int) -> None:
    for text in (json.dumps(values), json.dumps(values, indent=1), json.dumps(values, separators=(",", ":"))):
        parts = [*json_numbers.read(text.encode(), "i", part_bytes)]
        assert np.concatenate(parts).tolist() == leaves(values)


def leaves(value: Any) -> list[Any]:
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, list) else [value]
