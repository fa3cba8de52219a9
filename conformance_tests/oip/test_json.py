"""The JSON form of requests and answers over HTTP."""

import copy
import json
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from conformance_tests.carriers import read_reply
from conformance_tests.clause_table import clause
from conformance_tests.http_wire import Answer, HttpClient, encode
from conformance_tests.server import Target

NUMBERS = list(range(16))
GOOD: dict[str, Any] = {
    "inputs": [
        {"name": "INPUT0", "shape": [1, 16], "datatype": "INT32", "data": NUMBERS},
        {"name": "INPUT1", "shape": [1, 16], "datatype": "INT32", "data": [1] * 16},
    ]
}
GOOD_ANSWER = (
    b'{"model_name":"simple","model_version":"1","outputs":['
    b'{"name":"OUTPUT0","datatype":"INT32","shape":[1,16],"data":[1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16]},'
    b'{"name":"OUTPUT1","datatype":"INT32","shape":[1,16],"data":[-1,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14]}]}'
)
needs = pytest.mark.needs


def identity(http: HttpClient, target: Target, datatype: str, data: str) -> Answer:
    """The answer of identity_<datatype> to a row whose `data` is the given JSON text."""
    target.require(f"identity_{datatype.lower()}")
    columns = len(json.loads(f"[{data}]"))
    body = f'{{"inputs":[{{"name":"INPUT0","datatype":"{datatype}","shape":[1,{columns}],"data":[{data}]}}]}}'
    return http.request("POST", f"/v2/models/identity_{datatype.lower()}/infer", body.encode())


def texts_of(answer: Answer) -> str:
    """The JSON text inside the brackets of the one output's data."""
    assert answer.status == 200, answer.body
    return answer.body.decode().partition('"data":[')[2].partition("]")[0]


@clause("json.layout")
@needs("simple")
def test_an_answer_is_compact_json_in_the_protocols_order(http: HttpClient) -> None:
    answer = http.post("/v2/models/simple/infer", {"id": "w1", **GOOD})
    assert answer.body == b'{"id":"w1",' + GOOD_ANSWER[1:]
    assert answer.headers["content-type"] == "application/json"


@clause("json.layout", "infer.no_id")
@needs("simple")
@pytest.mark.parametrize("extra", [{}, {"id": ""}])
def test_without_an_id_the_answer_has_none(http: HttpClient, extra: dict[str, str]) -> None:
    assert http.post("/v2/models/simple/infer", extra | GOOD).body == GOOD_ANSWER


@clause("json.layout")
@needs("simple")
def test_white_space_means_nothing(http: HttpClient) -> None:
    body = encode(GOOD).replace(b",", b" ,\r\n\t").replace(b":", b" : ").replace(b"[", b"[ ") + b"\n "
    assert http.request("POST", "/v2/models/simple/infer", b" \n" + body).body == GOOD_ANSWER


FLAT = [*range(32)]
LIKE_THE_SHAPE = [FLAT[:16], FLAT[16:]]


def sum_with_zeros(http: HttpClient, data: list[Any]) -> Answer:
    """The answer with OUTPUT0, which is `data` as [2,16]."""
    inputs = [
        {"name": "INPUT0", "shape": [2, 16], "datatype": "INT32", "data": data},
        {"name": "INPUT1", "shape": [2, 16], "datatype": "INT32", "data": [0] * 32},
    ]
    answer = http.post("/v2/models/simple/infer", {"inputs": inputs, "outputs": [{"name": "OUTPUT0"}]})
    assert answer.status == 200, answer.body
    return answer


@clause("json.nested")
@needs("simple")
@pytest.mark.parametrize("data", [FLAT, LIKE_THE_SHAPE], ids=["flat", "like the shape"])
def test_data_may_be_flat_or_nested_like_the_shape(http: HttpClient, data: list[Any]) -> None:
    assert read_reply(sum_with_zeros(http, data))["OUTPUT0"].tolist() == LIKE_THE_SHAPE


@clause("json.any_nesting")
@needs("simple")
@pytest.mark.parametrize(
    "data", [[[[i] for i in FLAT]], [[*range(4)], [[*range(4, 30)]], 30, 31]], ids=["deeper", "ragged"]
)
def test_data_may_be_nested_in_any_way(http: HttpClient, data: list[Any]) -> None:
    assert read_reply(sum_with_zeros(http, data))["OUTPUT0"].tolist() == LIKE_THE_SHAPE


@clause("json.flat")
@needs("simple")
@pytest.mark.parametrize("data", [FLAT, LIKE_THE_SHAPE], ids=["flat", "like the shape"])
def test_data_come_back_flat(http: HttpClient, data: list[Any]) -> None:
    assert sum_with_zeros(http, data).json()["outputs"][0]["data"] == FLAT


@clause("json.any_nesting")
@needs("identity_fp32", "identity_bytes")
@pytest.mark.parametrize(("datatype", "leaf"), [("FP32", "1.5"), ("BYTES", '"x"')])
def test_a_hundred_levels_are_deep_enough(http: HttpClient, target: Target, datatype: str, leaf: str) -> None:
    body = (
        f'{{"inputs":[{{"name":"INPUT0","datatype":"{datatype}","shape":[1,1],"data":{"[" * 100}{leaf}{"]" * 100}}}]}}'
    )
    answer = http.request("POST", f"/v2/models/identity_{datatype.lower()}/infer", body.encode())
    assert texts_of(answer) == leaf


@clause("json.unknown_fields")
@needs("simple")
def test_unknown_members_are_ignored(http: HttpClient) -> None:
    document = copy.deepcopy(GOOD) | {"model_name": 5, "more": {"deep": [None]}}
    document["inputs"][0] |= {"unit": "m", "parameters": {"colour": [1]}}
    document["outputs"] = [{"name": "OUTPUT0", "kind": "x", "parameters": {"colour": {}}}, {"name": "OUTPUT1"}]
    assert http.post("/v2/models/simple/infer", document).body == GOOD_ANSWER


@clause("json.empty_outputs")
@needs("simple")
def test_an_empty_list_of_outputs_means_all(http: HttpClient) -> None:
    assert http.post("/v2/models/simple/infer", GOOD | {"outputs": []}).body == GOOD_ANSWER


@clause("json.duplicate_keys")
@needs("simple")
def test_of_equal_keys_the_last_counts(http: HttpClient) -> None:
    body = b'{"id":"first","id":"second",' + encode(GOOD)[1:]
    assert http.request("POST", "/v2/models/simple/infer", body).json()["id"] == "second"


@clause("json.number_texts")
@pytest.mark.parametrize(
    ("datatype", "sent", "printed"),
    [
        ("FP32", "1,0,-2", "1.0,0.0,-2.0"),
        ("FP32", "0.1", "0.10000000149011612"),
        ("FP32", "-0.0", "-0.0"),
        ("FP64", "0.1,0.30000000000000004", "0.1,0.30000000000000004"),
        ("FP64", "-0.0,1", "-0.0,1.0"),
        ("INT64", "9007199254740993,-9223372036854775808", "9007199254740993,-9223372036854775808"),
        ("UINT64", "18446744073709551615", "18446744073709551615"),
        ("BOOL", "true,false", "true,false"),
    ],
)
def test_numbers_are_printed_so(http: HttpClient, target: Target, datatype: str, sent: str, printed: str) -> None:
    assert texts_of(identity(http, target, datatype, sent)) == printed


@clause("json.number_texts")
def test_an_exponent_means_the_same_number(http: HttpClient, target: Target) -> None:
    printed = texts_of(identity(http, target, "FP32", "1e30,1E-30,25e-1"))
    assert [float(text) for text in printed.split(",")] == [1.0000000150474662e30, 1.0000000031710769e-30, 2.5]


@clause("json.non_finite")
@pytest.mark.parametrize("datatype", ["FP16", "BF16", "FP32", "FP64"])
def test_what_is_no_number_is_written_as_text(http: HttpClient, target: Target, datatype: str) -> None:
    sent = '"NaN","Infinity","-Infinity",1.5'
    assert texts_of(identity(http, target, datatype, sent)) == sent


@clause("json.non_finite_literals")
@pytest.mark.parametrize("datatype", ["FP16", "BF16", "FP32", "FP64"])
def test_bare_literals_are_read_too(http: HttpClient, target: Target, datatype: str) -> None:
    printed = texts_of(identity(http, target, datatype, "NaN,Infinity,-Infinity"))
    assert printed == '"NaN","Infinity","-Infinity"'


@clause("json.half_floats")
@pytest.mark.parametrize(
    ("datatype", "sent"),
    [
        ("FP16", [0.1, 2049.0, 2051.0, 65504.0, 65519.9, 6e-8, 2.9e-8, -1e-9]),
        ("BF16", [0.1, 257.0, 259.0, 3.3895e38, 1e-40, 1.00390625, 1.01171875]),
    ],
)
def test_half_floats_round_to_nearest_even(http: HttpClient, target: Target, datatype: str, sent: list[float]) -> None:
    dtype = np.float16 if datatype == "FP16" else ml_dtypes.bfloat16
    want = [float(np.float64(value).astype(dtype)) for value in sent]
    answer = identity(http, target, datatype, ",".join(map(repr, sent)))
    assert answer.status == 200, answer.body
    assert answer.json()["outputs"][0]["data"] == want


@clause("json.whole_floats")
@pytest.mark.parametrize("datatype", ["INT8", "UINT8", "INT32", "INT64", "UINT64"])
def test_a_whole_float_is_an_integer(http: HttpClient, target: Target, datatype: str) -> None:
    assert texts_of(identity(http, target, datatype, "3.0,0.0,1e2,7")) == "3,0,100,7"


@clause("json.escapes")
def test_a_string_may_be_written_in_every_way(http: HttpClient, target: Target) -> None:
    sent = r'"\u0041\/\u00e9","\ud83d\ude00","\u0000\u001f\"\\\b\f\n\r\t"'
    answer = identity(http, target, "BYTES", sent)
    assert answer.json()["outputs"][0]["data"] == ["A/é", "😀", '\0\x1f"\\\b\f\n\r\t']


@clause("json.content_type_ignored")
@needs("simple")
@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "nonsense", "image/png"])
def test_the_content_type_decides_nothing(http: HttpClient, content_type: str) -> None:
    answer = http.post("/v2/models/simple/infer", GOOD, Content_Type=content_type)
    assert answer.body == GOOD_ANSWER


@clause("infer.empty")
@needs("identity_fp32")
def test_data_of_an_empty_shape_is_not_read(http: HttpClient) -> None:
    inputs = [{"name": "INPUT0", "shape": [0, 4], "datatype": "FP32", "data": []}]
    answer = http.post("/v2/models/identity_fp32/infer", {"inputs": inputs})
    assert answer.json()["outputs"] == [{"name": "OUTPUT0", "datatype": "FP32", "shape": [0, 4], "data": []}]
