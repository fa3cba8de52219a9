"""Refusals of requests that only HTTP can express: each row of the protocol's tables, as a change to a good request."""

import copy
import gzip
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from conformance_tests.clause_table import clause
from conformance_tests.http_wire import Answer, Connection, HttpClient, encode
from conformance_tests.server import Target

Document = dict[str, Any]
Body = bytes | Document | Callable[[Document], object]
NUMBERS = list(range(16))
GOOD: Document = {
    "inputs": [
        {"name": "INPUT0", "shape": [1, 16], "datatype": "INT32", "data": NUMBERS},
        {"name": "INPUT1", "shape": [1, 16], "datatype": "INT32", "data": [1] * 16},
    ]
}
UNKNOWN_ID = "[request id: <id_unknown>] "
ONE_SOURCE = (
    "Input must set only one of the following fields: 'data', 'binary_data_size' in 'parameters', "
    "'shared_memory_region' in 'parameters'. But "
)
HEADER_LENGTH = "Inference-Header-Content-Length"
MAX_INT64 = 9223372036854775807

NON = "attempt to access JSON non-"
NOT_STRING = f"{NON}string as string"
NOT_ARRAY = f"{NON}array as array"
NOT_BOOL = f"{NON}boolean as boolean"
NOT_UNSIGNED = f"{NON}unsigned-integer as unsigned-integer"
NOT_SIGNED = f"{NON}signed-integer as signed-integer"


@dataclass(frozen=True, slots=True)
class Case:
    """A POST to infer and its refusal; `text` is exact, or a pattern where the protocol leaves a choice."""

    name: str
    clause: str
    body: Body  # a callable changes a copy of GOOD in place
    text: str | re.Pattern[str]
    status: int = 400
    headers: Mapping[str, str] = field(default_factory=dict)
    model: str = "simple"

    def encoded(self) -> bytes:
        if isinstance(self.body, bytes):
            return self.body
        if isinstance(self.body, dict):
            return encode(self.body)
        document = copy.deepcopy(GOOD)
        self.body(document)
        return encode(document)


def top(**members: object) -> Callable[[Document], object]:
    """The good request with other members at its top."""
    return lambda document: document.update(members)


def first(**members: object) -> Callable[[Document], object]:
    """The good request with other members in INPUT0; those that are ... are taken away."""

    def change(document: Document) -> None:
        for name, value in members.items():
            if value is ...:
                del document["inputs"][0][name]
            else:
                document["inputs"][0][name] = value

    return change


def only(datatype: str, data: object, shape: list[int] | None = None) -> Document:
    """A request to identity_<datatype>."""
    return {"inputs": [{"name": "INPUT0", "datatype": datatype, "shape": shape or [1, 1], "data": data}]}


def nested(depth: int) -> list[object]:
    inner: list[object] = [1]
    for _ in range(depth - 1):
        inner = [inner]
    return inner


def missing(name: str, owner: str | None = None) -> str:
    return f"Unable to parse '{owner or name}': attempt to access non-existing object member '{name}'"


# Reason and offset as RapidJSON gives them.
SYNTAX = [
    (b"{", "Missing a name for object member. at 1"),
    (b"{}x", "The document root must not be followed by other values. at 2"),
    (b"nul", "Invalid value. at 3"),
    (b'{"inputs":', "Invalid value. at 10"),
    (b'{"inputs":[1,]}', "Invalid value. at 13"),
    (b"{1:2}", "Missing a name for object member. at 1"),
    (b'{"a" 1}', "Missing a colon after a name of object member. at 5"),
    (b'{"a":1 "b":2}', "Missing a comma or '}' after an object member. at 7"),
    (b'{"a":1]', "Missing a comma or '}' after an object member. at 6"),
    (b"[1 2]", "Missing a comma or ']' after an array element. at 3"),
    (b'{"a":"\\u12g4"}', "Incorrect hex digit after \\u escape in string. at 6"),
    (b'{"a":"\\ud800x"}', "The surrogate pair in string is invalid. at 6"),
    (b'{"a":"\\q"}', "Invalid escape character in string. at 6"),
    (b'{"a":"b', "Missing a closing quotation mark in string. at 7"),
    (b'{"a":"\n"}', "Invalid encoding in string. at 6"),
    (b'{"a":1e999}', "Number too big to be stored in double. at 5"),
    (b'{"a":1.}', "Miss fraction part in number. at 7"),
    (b'{"a":1e}', "Miss exponent in number. at 7"),
    (b'{"a":01}', "Missing a comma or '}' after an object member. at 6"),
    (b'{"a":+1}', "Invalid value. at 5"),
]

ACCESS: list[tuple[str, Body, str]] = [
    ("no inputs", {}, missing("inputs")),
    ("root is an array", b"[1]", missing("inputs")),
    ("root is a number", b"5", missing("inputs")),
    ("inputs is an object", top(inputs={}), f"Unable to parse 'inputs': {NOT_ARRAY}"),
    ("id is a number", top(id=5), f"Unable to parse 'id': {NOT_STRING}"),
    ("no name", first(name=...), missing("name")),
    ("name is a number", first(name=5), f"Unable to parse 'name': {NOT_STRING}"),
    ("no datatype", first(datatype=...), missing("datatype")),
    ("datatype is a number", first(datatype=5), f"Unable to parse 'datatype': {NOT_STRING}"),
    ("no shape", first(shape=...), missing("shape")),
    ("shape is a number", first(shape=16), f"Unable to parse 'shape': {NOT_ARRAY}"),
    ("dimension is text", first(shape=[1, "16"]), f"Unable to parse 'shape': {NOT_UNSIGNED}"),
    ("negative dimension", first(shape=[-1, 16]), f"Unable to parse 'shape': {NOT_UNSIGNED}"),
    ("dimension is a fraction", first(shape=[1, 16.5]), f"Unable to parse 'shape': {NOT_UNSIGNED}"),
    ("data is a number", first(data=5), f"Unable to parse 'data': {NOT_ARRAY}"),
    (
        "binary_data_size is text",
        first(data=..., parameters={"binary_data_size": "64"}),
        f"Unable to parse 'binary_data_size': {NOT_UNSIGNED}",
    ),
    (
        "binary_data_size is negative",
        first(data=..., parameters={"binary_data_size": -1}),
        f"Unable to parse 'binary_data_size': {NOT_UNSIGNED}",
    ),
    ("outputs is an object", top(outputs={}), f"Unable to parse 'outputs': {NOT_ARRAY}"),
    ("output without a name", top(outputs=[{}]), missing("name")),
    (
        "binary_data is a number",
        top(outputs=[{"name": "OUTPUT0", "parameters": {"binary_data": 1}}]),
        f"Unable to parse 'binary_data': {NOT_BOOL}",
    ),
    (
        "classification is text",
        top(outputs=[{"name": "OUTPUT0", "parameters": {"classification": "3"}}]),
        f"Unable to set 'classification': {NOT_UNSIGNED}",
    ),
    (
        "classification is negative",
        top(outputs=[{"name": "OUTPUT0", "parameters": {"classification": -1}}]),
        f"Unable to set 'classification': {NOT_UNSIGNED}",
    ),
    (
        "parameters is an array",
        top(parameters=[]),
        "failed to get request params.: attempt to get members for non-object",
    ),
]

SOURCE = [
    ("no source", first(data=...), "no field is set"),
    ("empty entry", top(inputs=[{}]), "no field is set"),
    ("entry is no object", top(inputs=[5]), "no field is set"),
    ("two sources", first(parameters={"binary_data_size": 64}), "set 'data' 'binary_data_size'"),
    ("a null is set", first(data=None, parameters={"binary_data_size": 64}), "set 'data' 'binary_data_size'"),
    (
        "three sources",
        first(parameters={"binary_data_size": 64, "shared_memory_region": "r"}),
        "set 'data' 'binary_data_size' 'shared_memory_region'",
    ),
]

DATA = [
    ("unknown datatype", first(datatype="XX"), "invalid datatype for input INPUT0"),
    ("too many", first(data=[*NUMBERS, 16]), "Unable to parse 'data': Shape does not match true shape of 'data' field"),
    ("too few", first(data=NUMBERS[1:]), "Failed to parse 'data' field: shape does not match true shape"),
    ("none", first(data=[]), "Failed to parse 'data' field: shape does not match true shape"),
    ("text for a number", first(data=["1"] * 16), f"Unable to parse 'data': {NOT_SIGNED}"),
    ("bool for a number", first(data=[True] * 16), f"Unable to parse 'data': {NOT_SIGNED}"),
    ("null for a number", first(data=[None] * 16), f"Unable to parse 'data': {NOT_SIGNED}"),
    ("object for a number", first(data=[{}] * 16), f"Unable to parse 'data': {NOT_SIGNED}"),
]

TYPED_DATA = [
    ("FP32", "x", f"Unable to parse 'data': {NON}number as double"),
    ("FP64", True, f"Unable to parse 'data': {NON}number as double"),
    ("BOOL", 1, f"Unable to parse 'data': {NOT_BOOL}"),
    ("BOOL", 0, f"Unable to parse 'data': {NOT_BOOL}"),
    ("BOOL", "true", f"Unable to parse 'data': {NOT_BOOL}"),
    ("UINT8", "1", f"Unable to parse 'data': {NOT_UNSIGNED}"),
    ("BYTES", 5, f"Unable to parse JSON bytes array: {NOT_STRING}"),
    ("BYTES", None, f"Unable to parse JSON bytes array: {NOT_STRING}"),
]

PARAMETERS = [
    ("binary_data_output", 1, f"Unable to parse 'binary_data_output': {NOT_BOOL}"),
    ("sequence_start", 1, f"Unable to parse 'sequence_start': {NOT_BOOL}"),
    ("sequence_end", "true", f"Unable to parse 'sequence_end': {NOT_BOOL}"),
    ("priority", -1, f"Unable to parse 'priority': {NOT_UNSIGNED}"),
    ("priority", "1", f"Unable to parse 'priority': {NOT_UNSIGNED}"),
    ("timeout", 1.5, f"Unable to parse 'timeout': {NOT_UNSIGNED}"),
    ("foo", [1], "parameter 'foo' has invalid type. It should be either 'int', 'bool', or 'string'."),
    ("foo", {}, "parameter 'foo' has invalid type. It should be either 'int', 'bool', or 'string'."),
    ("foo", None, "parameter 'foo' has invalid type. It should be either 'int', 'bool', or 'string'."),
]

SEQUENCE_IDS = [
    (-1, f"Unable to parse 'sequence_id': {NOT_STRING}", 400),
    (1.5, f"Unable to parse 'sequence_id': {NOT_STRING}", 400),
    (True, f"Unable to parse 'sequence_id': {NOT_STRING}", 400),
    ("x" * 129, "string correlation ID cannot be longer than 128 characters", 501),
]

RESERVED = "parameter keys starting with 'triton_' are reserved for Triton usage and should not be specified."
GOOD_BODY = encode(GOOD)
GOOD_LENGTH = len(GOOD_BODY)

HEADER_LENGTHS = [
    ("abc", f"Unable to parse {HEADER_LENGTH}, got: abc"),
    ("", f"Unable to parse {HEADER_LENGTH}, got: "),
    (
        "99999999999",
        f"Unable to parse {HEADER_LENGTH}, value is out of range [ -2147483648, 2147483647 ], got: 99999999999",
    ),
    ("-1", f"inference header size should be in range (0, {GOOD_LENGTH}), got: -1"),
    (
        f"{GOOD_LENGTH + 1}",
        f"inference header size should be in range (0, {GOOD_LENGTH}), got: {GOOD_LENGTH + 1}",
    ),
]

BINARY: Document = {
    "inputs": [
        {"name": "INPUT0", "shape": [1, 16], "datatype": "INT32", "parameters": {"binary_data_size": 64}},
        {"name": "INPUT1", "shape": [1, 16], "datatype": "INT32", "data": [1] * 16},
    ]
}
BINARY_HEAD = encode(BINARY)
BINARY_LENGTH = {HEADER_LENGTH: str(len(BINARY_HEAD))}


def lying(size: int) -> bytes:
    document = copy.deepcopy(BINARY)
    document["inputs"][0]["parameters"]["binary_data_size"] = size
    return encode(document)


def expecting(count: int) -> str:
    return f"unexpected size for input 'INPUT0', expecting {count} additional bytes for model 'simple'"


def words(head: bytes) -> tuple[bytes, dict[str, str]]:
    """A BYTES tensor [1,2] to identity_bytes whose bytes are `head`."""
    parameters = {"binary_data_size": len(head)}
    document = {"inputs": [{"name": "INPUT0", "shape": [1, 2], "datatype": "BYTES", "parameters": parameters}]}
    encoded = encode(document)
    return encoded + head, {HEADER_LENGTH: str(len(encoded))}


def string_case(name: str, data: bytes, text: str) -> Case:
    body, headers = words(data)
    return Case(name, "errors.string_elements", body, text, headers=headers, model="identity_bytes")


FITS = "shape [{}] causes total element count to exceed maximum size of {}"
CASES = (
    *(
        Case(repr(body)[2:-1], "errors.json_syntax", body, f"failed to parse the request JSON buffer: {text}")
        for body, text in SYNTAX
    ),
    *(Case(name, "errors.json_access", body, text) for name, body, text in ACCESS),
    *(Case(name, "errors.input_source", body, ONE_SOURCE + text) for name, body, text in SOURCE),
    *(Case(name, "errors.json_data", body, text) for name, body, text in DATA),
    *(
        Case(
            f"{value!r} for {datatype}",
            "json.bool_only" if datatype == "BOOL" else "errors.json_data",
            only(datatype, [value]),
            text,
            model=f"identity_{datatype.lower()}",
        )
        for datatype, value, text in TYPED_DATA
    ),
    *(
        Case(f"{key}={value!r}", "errors.request_parameters", top(parameters={key: value}), text)
        for key, value, text in PARAMETERS
    ),
    *(
        Case(
            f"sequence_id={str(value)[:9]}", "errors.sequence_id", top(parameters={"sequence_id": value}), text, status
        )
        for value, text, status in SEQUENCE_IDS
    ),
    Case("triton_x", "errors.reserved_parameters", top(parameters={"triton_x": 1}), RESERVED),
    Case(
        "empty final response",
        "errors.reserved_parameters",
        top(parameters={"triton_enable_empty_final_response": True}),
        RESERVED,
    ),
    *(
        Case(
            f"{value or 'empty'} header length", "errors.header_length", GOOD_BODY, text, headers={HEADER_LENGTH: value}
        )
        for value, text in HEADER_LENGTHS
    ),
    *(
        Case(
            f"datatype {name!r}", "datatypes.case_sensitive", first(datatype=name), "invalid datatype for input INPUT0"
        )
        for name in ("int32", "Int32", "INT32 ", "INT", "STRING", "TYPE_INT32", "")
    ),
    *(
        Case(
            f"datatype {name!r}, binary",
            "datatypes.case_sensitive",
            BINARY_HEAD.replace(b'"INT32"', encode(name), 1) + bytes(64),
            f"{UNKNOWN_ID}inference input 'INPUT0' data-type is '<invalid>', but model 'simple' expects 'INT32'",
            headers={HEADER_LENGTH: str(len(BINARY_HEAD) + len(name) - 5)},
        )
        for name in ("int32", "XX", "TYPE_INT32")
    ),
    Case("4 bytes short", "errors.binary_size", BINARY_HEAD + bytes(60), expecting(4), headers=BINARY_LENGTH),
    Case("no bytes", "errors.binary_size", BINARY_HEAD, expecting(64)),
    Case("no bytes, with a header length", "errors.binary_size", BINARY_HEAD, expecting(64), headers=BINARY_LENGTH),
    Case(
        "1 byte long",
        "errors.binary_size",
        BINARY_HEAD + bytes(65),
        "unexpected additional input data for model 'simple'",
        headers=BINARY_LENGTH,
    ),
    Case(
        "bytes without an input",
        "errors.binary_size",
        GOOD_BODY + bytes(1),
        "unexpected additional input data for model 'simple'",
        headers={HEADER_LENGTH: str(GOOD_LENGTH)},
    ),
    Case(
        "size disagrees with shape",
        "error_texts.byte_size",
        lying(60) + bytes(60),
        f"{UNKNOWN_ID}input byte size mismatch for input 'INPUT0' for model 'simple'. Expected 64, got 60",
        headers=BINARY_LENGTH,
    ),
    *(
        Case(
            f"binary_data_size {size}",
            "limits.lying_sizes",
            lying(size) + bytes(64),
            expecting(size - 64),
            headers={HEADER_LENGTH: str(len(lying(size)))},
        )
        for size in (2**31, 2**62)
    ),
    string_case(
        "half a string length",
        b"\1\0\0\0a\1\0",
        f"{UNKNOWN_ID}incomplete string length indicator for inference input 'INPUT0' for model 'identity_bytes', "
        "expecting 4 bytes but only 2 bytes available. Please make sure the string length indicator is in one buffer.",
    ),
    string_case(
        "string longer than its data",
        b"\1\0\0\0a\5\0\0\0bc",
        "incomplete string data for inference input 'INPUT0', expecting string of length 5 but only 2 bytes available",
    ),
    Case(
        "dimension beyond 63 bits",
        "errors.shape_overflow",
        first(shape=[1, 2**63]),
        re.compile(r"invalid shape for input 'INPUT0': shape \[1,[-0-9]+\] contains one or more invalid dimensions"),
    ),
    Case(
        "elements beyond 63 bits",
        "errors.shape_overflow",
        first(shape=[2**62, 4]),
        f"invalid shape for input 'INPUT0': {FITS.format(f'{2**62},4', MAX_INT64)}",
    ),
    Case(
        "bytes beyond 63 bits",
        "errors.shape_overflow",
        first(shape=[2**61, 2]),
        f"byte size overflow for input 'INPUT0': element count ({2**62}) * data type size (4) exceeds maximum allowed "
        f"size ({MAX_INT64})",
    ),
    Case(
        "numbers nested too deep",
        "errors.json_depth",
        first(data=nested(101)),
        "Unable to parse 'data': JSON nesting depth exceeds maximum allowed limit (100)",
    ),
    Case(
        "strings nested too deep",
        "errors.json_depth",
        only("BYTES", nested(101)),
        "JSON nesting depth exceeds maximum allowed limit (100)",
        model="identity_bytes",
    ),
    *(
        Case(
            f"encoding {value}",
            "errors.encoding",
            GOOD_BODY,
            "Unsupported compression type",
            501,
            {"Content-Encoding": value},
        )
        for value in ("br", "gzip, deflate", "GZIP2")
    ),
    Case(
        "corrupt gzip",
        "errors.decompression",
        gzip.compress(GOOD_BODY)[:10] + b"\xff" * 40,
        "encountered inconsistent stream state during decompression",
        headers={"Content-Encoding": "gzip"},
    ),
    Case(
        "no gzip at all",
        "errors.decompression",
        GOOD_BODY,
        "encountered inconsistent stream state during decompression",
        headers={"Content-Encoding": "gzip"},
    ),
    Case(
        "nothing to decompress",
        "errors.decompression",
        b"",
        "nothing to be decompressed",
        headers={"Content-Encoding": "gzip"},
    ),
    Case(
        "no body for two inputs",
        "raw_request.refused",
        b"",
        f"{UNKNOWN_ID}Raw request must only have 1 input (found 1) to be deduced but got 2 inputs in 'simple' model "
        "configuration",
    ),
    Case(
        "raw body for two inputs",
        "raw_request.refused",
        bytes(64),
        f"{UNKNOWN_ID}Raw request must only have 1 input (found 1) to be deduced but got 2 inputs in 'simple' model "
        "configuration",
        headers={HEADER_LENGTH: "0"},
    ),
    Case(
        "raw body for two free axes",
        "raw_request.refused",
        bytes(64),
        f"{UNKNOWN_ID}The shape of the raw input 'INPUT0' can not be deduced because there are more than one "
        "variable-sized dimension",
        headers={HEADER_LENGTH: "0"},
        model="identity_fp32",
    ),
    Case(
        "raw body with a remainder",
        "raw_request.refused",
        bytes(9),
        f"{UNKNOWN_ID}input byte size mismatch for input 'raw_input' for model 'identity_1d_int64'. Expected 8, got 9",
        headers={HEADER_LENGTH: "0"},
        model="identity_1d_int64",
    ),
)


def sent(connection: Connection, case: Case) -> Answer:
    body = case.encoded()
    headers = {"Content-Length": str(len(body)), **case.headers}
    connection.send(connection.head("POST", f"/v2/models/{case.model}/infer", headers) + body)
    return connection.receive()


EVERY_CASE = pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name, marks=clause(case.clause)) for case in CASES])
@clause("errors.object_alone")
def test_a_bad_request_is_refused_in_these_words(http: HttpClient, target: Target, case: Case) -> None:
    target.require(case.model)
    with http.connect() as connection:
        answer = sent(connection, case)
    assert answer.status in (case.status, 500)  # Triton's 500 for bad JSON is what errors.client_never_500 rules out
    assert [*answer.json()] == ["error"]
    if isinstance(case.text, str):
        assert answer.error == case.text
    else:
        assert case.text.fullmatch(answer.error), answer.error
    if answer.status == 501 and "Content-Encoding" in case.headers:
        assert answer.headers["accept-encoding"] == "gzip, deflate"


@EVERY_CASE
@clause("errors.client_never_500", "errors.content_type")
def test_a_bad_request_is_the_clients_mistake(http: HttpClient, target: Target, case: Case) -> None:
    target.require(case.model)
    with http.connect() as connection:
        answer = sent(connection, case)
    assert (answer.status, answer.headers["content-type"]) == (case.status, "application/json")


@EVERY_CASE
@clause("errors.survives")
def test_after_a_bad_request_the_connection_serves_on(http: HttpClient, target: Target, case: Case) -> None:
    target.require(case.model)
    with http.connect() as connection:
        assert sent(connection, case).status >= 400
        connection.send(connection.head("GET", "/v2/health/live", {}))
        assert connection.receive().status == 200


# What the protocol makes an object with `error` everywhere, each by a request that any server must refuse.
BAD: dict[str, tuple[str, str, bytes | None]] = {
    "metadata of an unknown model": ("GET", "/v2/models/nope", None),
    "inference of an unknown model": ("POST", "/v2/models/nope/infer", GOOD_BODY),
    "no JSON": ("POST", "/v2/models/simple/infer", b"{"),
    "no inputs": ("POST", "/v2/models/simple/infer", b"{}"),
    "inputs that are none": ("POST", "/v2/models/simple/infer", b'{"inputs":5}'),
    "an input that is none": ("POST", "/v2/models/simple/infer", b'{"inputs":[{"name":"INPUT0"}]}'),
}


@clause("errors.form")
@pytest.mark.needs("simple")
@pytest.mark.parametrize("name", [*BAD])
def test_an_error_is_an_object_with_its_text(http: HttpClient, name: str) -> None:
    answer = http.request(*BAD[name])
    assert answer.status >= 400
    assert answer.error


ELSEWHERE = {
    "no path": ("GET", "/nope"),
    "no method": ("DELETE", "/v2"),
    "no model": ("GET", "/v2/models/nope"),
    "no configuration": ("GET", "/v2/models/nope/config"),
    "no readiness": ("GET", "/v2/models/nope/ready"),
    "no statistics": ("GET", "/v2/models/nope/stats"),
}


@clause("errors.content_type")
@pytest.mark.parametrize("name", [*ELSEWHERE])
def test_an_error_is_typed_as_json_everywhere(http: HttpClient, name: str) -> None:
    answer = http.request(*ELSEWHERE[name])
    assert answer.headers["content-type"] == "application/json"
    assert [*answer.json()] == ["error"]


# Datatype, two elements, and whether the second is refused.
INTEGER_RANGE = [
    ("INT8", [1, 128]),
    ("INT8", [1, -129]),
    ("UINT8", [1, 256]),
    ("UINT8", [1, -1]),
    ("INT16", [1, 1 << 15]),
    ("UINT16", [1, 1 << 16]),
    ("INT32", [1, 1 << 31]),
    ("UINT32", [1, 1 << 32]),
    ("INT64", [1, 1 << 63]),
    ("INT64", [1, -(1 << 63) - 1]),
    ("UINT64", [1, 1 << 64]),
]


@clause("json.out_of_range")
@pytest.mark.parametrize(("datatype", "data"), INTEGER_RANGE)
def test_an_integer_out_of_range_is_named_by_its_index(
    http: HttpClient, target: Target, datatype: str, data: list[int]
) -> None:
    model = f"identity_{datatype.lower()}"
    target.require(model)
    answer = http.post(f"/v2/models/{model}/infer", only(datatype, data, [1, 2]))
    assert answer.status == 400
    assert re.search(r"\b1\b", answer.error), answer.error


@clause("json.whole_floats")
@pytest.mark.parametrize("datatype", ["INT8", "UINT8", "INT64", "UINT64"])
def test_a_fraction_is_no_integer(http: HttpClient, target: Target, datatype: str) -> None:
    model = f"identity_{datatype.lower()}"
    target.require(model)
    answer = http.post(f"/v2/models/{model}/infer", only(datatype, [1, 2.5], [1, 2]))
    assert answer.status == 400
    assert re.search(r"\b1\b", answer.error), answer.error


@clause("json.half_floats")
@pytest.mark.parametrize(("datatype", "value"), [("FP16", 65520.0), ("FP16", -1e300), ("BF16", 1e300)])
def test_a_number_over_the_range_of_a_half_float_is_refused(
    http: HttpClient, target: Target, datatype: str, value: float
) -> None:
    model = f"identity_{datatype.lower()}"
    target.require(model)
    assert http.post(f"/v2/models/{model}/infer", only(datatype, [value])).status == 400


LOOKUPS = ("", "/ready", "/config", "/infer", "/versions/1", "/versions/1/ready", "/versions/1/config")


@clause("error_texts.unknown_model")
@pytest.mark.parametrize("path", LOOKUPS)
def test_an_unknown_model_is_told_by_name(http: HttpClient, path: str) -> None:
    answer = http.post(f"/v2/models/nope{path}", GOOD) if path == "/infer" else http.get(f"/v2/models/nope{path}")
    version = " version 1" if "versions" in path else ""
    assert answer.status == 404
    assert answer.error in (
        f"Request for unknown model: 'nope'{version} is not found",
        "Request for unknown model: 'nope' is not found",
    )


@clause("errors.version_path")
@pytest.mark.parametrize("version", ["abc", "1x", "-1", "v1", "1.0", ""])
@pytest.mark.needs("simple")
def test_a_version_that_is_no_number_matches_no_path(http: HttpClient, version: str) -> None:
    answer = http.get(f"/v2/models/simple/versions/{version}")
    assert (answer.status, answer.error) == (404, "Not Found")


@clause("errors.version_path")
@pytest.mark.needs("simple")
def test_a_version_beyond_64_bits_is_refused(http: HttpClient) -> None:
    answer = http.get("/v2/models/simple/versions/9223372036854775808")
    assert answer.status == 400
    assert re.fullmatch(
        r"failed to get model version from specified version string '9223372036854775808' \(details: .+\), "
        r"version should be an integral value > 0",
        answer.error,
    ), answer.error


@clause("errors.unknown_path")
@pytest.mark.parametrize(
    "path",
    ["/nope", "/v2/health", "/v2/health/", "/v2/health/nope", "/v2/models/simple/", "/v2/models/simple/nope", "/v1"],
)
def test_a_path_that_is_none_is_not_found(http: HttpClient, path: str) -> None:
    answer = http.get(path)
    assert (answer.status, answer.error) == (404, "Not Found")


@clause("errors.method")
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v2/health/live"),
        ("POST", "/v2/health/ready"),
        ("POST", "/v2"),
        ("POST", "/v2/models/simple"),
        ("DELETE", "/v2/models/simple"),
        ("PUT", "/v2/models/simple/config"),
        ("POST", "/v2/models/simple/ready"),
        ("GET", "/v2/models/simple/infer"),
        ("PUT", "/v2/models/simple/infer"),
        ("GET", "/v2/models/nope/infer"),
    ],
)
def test_a_wrong_method_is_told_before_the_model_is_looked_up(http: HttpClient, method: str, path: str) -> None:
    answer = http.request(method, path, b"" if method != "GET" else None)
    assert (answer.status, answer.error) == (405, "Method Not Allowed")
