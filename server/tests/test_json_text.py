"""JSON is read as RFC 8259 says, with NaN besides; what is wrong gets RapidJSON's reason and the byte where it is."""

import math
from typing import Any

import pytest
from penstock import json_text
from penstock.errors import Kind, ServingError

LONG = json_text.EXPLAINED_BYTES


def refusal(data: bytes) -> str:
    with pytest.raises(ServingError) as caught:
        json_text.loads(data)
    assert caught.value.kind is Kind.INVALID
    return caught.value.message


@pytest.mark.parametrize(
    ("text", "reason", "offset"),
    [
        ("", "The document is empty.", 0),
        (" \n", "The document is empty.", 2),
        ("{} x", "The document root must not be followed by other values.", 3),
        ("{", "Missing a name for object member.", 1),
        ('{"a":1,}', "Missing a name for object member.", 7),
        ('{"a" 1}', "Missing a colon after a name of object member.", 5),
        ('{"a":1 "b"}', "Missing a comma or '}' after an object member.", 7),
        ("[1 2]", "Missing a comma or ']' after an array element.", 3),
        ("[1", "Missing a comma or ']' after an array element.", 2),
        ("[1,]", "Invalid value.", 3),
        ("[", "Invalid value.", 1),
        ("nul", "Invalid value.", 3),
        ("[trux]", "Invalid value.", 4),
        ("-x", "Invalid value.", 1),
        ("x", "Invalid value.", 0),
        ('["ab', "Missing a closing quotation mark in string.", 4),
        ('["a\\qb"]', "Invalid escape character in string.", 3),
        ('["a\\u12g4"]', "Incorrect hex digit after \\u escape in string.", 3),
        ('["\\ud800"]', "The surrogate pair in string is invalid.", 2),
        ('["\\udc00"]', "The surrogate pair in string is invalid.", 2),
        ('["\\ud800\\u0041"]', "The surrogate pair in string is invalid.", 2),
        ('["a\x01"]', "Invalid encoding in string.", 3),
        ("[1.]", "Miss fraction part in number.", 3),
        ("[1e+]", "Miss exponent in number.", 4),
        ("[2, 1e400]", "Number too big to be stored in double.", 4),
        ("[" + "9" * 400 + "]", "Number too big to be stored in double.", 1),
        ('["äö", 1.]', "Miss fraction part in number.", 11),
        ("[NaN, 1e400]", "Number too big to be stored in double.", 6),
    ],
)
def test_a_fault_is_named_with_its_byte_offset(text: str, reason: str, offset: int) -> None:
    assert refusal(text.encode()) == f"failed to parse the request JSON buffer: {reason} at {offset}"


def test_bytes_that_are_not_utf_8_are_refused_where_they_begin() -> None:
    assert refusal(b'["ab\xff"]') == "failed to parse the request JSON buffer: Invalid encoding in string. at 4"


def test_a_long_text_is_not_searched_for_the_reason() -> None:
    text = b'["\xc3\xa4"' + b",1" * LONG
    assert refusal(text) == f"failed to parse the request JSON buffer: Unspecific syntax error. at {len(text)}"


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_bottomless_nesting_is_refused(opening: bytes) -> None:
    assert refusal(opening * 5000) == "JSON nesting depth exceeds maximum allowed limit (100)"


def test_literals_beyond_the_standard_are_read() -> None:
    values = json_text.loads(b"[NaN, Infinity, -Infinity, 1, 2.5, null, true, false, [], {}]")
    assert math.isnan(values[0])
    assert values[1:] == [math.inf, -math.inf, 1, 2.5, None, True, False, [], {}]
    assert json_text.loads(b"[Inf, -Inf]") == [math.inf, -math.inf]


@pytest.mark.parametrize("extra", ["", "NaN", "Inf"])
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18446744073709551615", 2**64 - 1),
        ("18446744073709551616", 2.0**64),
        ("-9223372036854775808", -(2**63)),
        ("-9223372036854775809", -(2.0**63)),
        ("3.0", 3.0),
        ("1E2", 100.0),
        ('"\\u00e4\\ud83d\\ude00\\n\\/"', "ä😀\n/"),
        ('{"a": [1, {"b": "c"}]}', {"a": [1, {"b": "c"}]}),
    ],
)
def test_all_three_readers_agree(text: str, value: Any, extra: str) -> None:
    read = json_text.loads(f"[{text}{',' + extra if extra else ''}]".encode())[0]
    assert read == value
    assert type(read) is type(value)


def test_a_long_text_with_escapes_and_nan_is_read() -> None:
    values = json_text.loads(b'["\\ud83d\\ude00", NaN' + b", 1" * LONG + b"]")
    assert values[0] == "😀"
    assert len(values) == LONG + 2
