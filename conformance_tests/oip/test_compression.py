"""Compressed requests and answers over HTTP."""

import gzip
import json
import zlib

import pytest

from conformance_tests.carriers import read_reply
from conformance_tests.clause_table import clause
from conformance_tests.http_wire import Answer, HttpClient, encode

needs = pytest.mark.needs
INFER = "/v2/models/simple/infer"
HEADER_LENGTH = "Inference-Header-Content-Length"
DOCUMENT = {
    "inputs": [
        {"name": "INPUT0", "shape": [1, 16], "datatype": "INT32", "parameters": {"binary_data_size": 64}},
        {"name": "INPUT1", "shape": [1, 16], "datatype": "INT32", "data": [1] * 16},
    ]
}
HEAD = encode(DOCUMENT)
BODY = HEAD + bytes(64)
LARGE = 8192  # elements of an FP32 answer well over 16 KB of JSON


def compressed(http: HttpClient, body: bytes, encoding: str) -> Answer:
    return http.request("POST", INFER, body, {HEADER_LENGTH: str(len(HEAD)), "Content-Encoding": encoding})


@pytest.mark.parametrize(
    ("body", "encoding"),
    [
        pytest.param(gzip.compress(BODY), "gzip", id="gzip", marks=clause("compression.request_gzip")),
        pytest.param(zlib.compress(BODY), "deflate", id="deflate", marks=clause("compression.request_deflate")),
        pytest.param(BODY, "identity", id="identity", marks=clause("compression.request_identity")),
        pytest.param(BODY, "", id="none", marks=clause("compression.request_identity")),
        pytest.param(gzip.compress(BODY), "deflate", id="gzip as deflate", marks=clause("compression.mislabelled")),
        pytest.param(zlib.compress(BODY), "gzip", id="deflate as gzip", marks=clause("compression.mislabelled")),
    ],
)
@needs("simple")
def test_a_compressed_body_is_read_whole(http: HttpClient, body: bytes, encoding: str) -> None:
    answer = compressed(http, body, encoding)
    assert answer.status == 200, answer.body
    assert read_reply(answer)["OUTPUT0"].tolist() == [[1] * 16]


def ask(http: HttpClient, elements: int, accept: str, binary: bool = False) -> Answer:
    body = encode(
        {
            "inputs": [
                {"name": "INPUT0", "shape": [1, elements], "datatype": "FP32", "data": [i / 7 for i in range(elements)]}
            ],
            "parameters": {"binary_data_output": binary},
        }
    )
    return http.request("POST", "/v2/models/identity_fp32/infer", body, {"Accept-Encoding": accept} if accept else {})


@clause("compression.response_large_json")
@needs("identity_fp32")
@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_large_json_answer_is_compressed_for_who_accepts_it(http: HttpClient, encoding: str) -> None:
    plain, packed = ask(http, LARGE, ""), ask(http, LARGE, encoding)
    assert "content-encoding" not in plain.headers
    assert packed.headers["content-encoding"] == encoding
    assert packed.headers["content-length"] == str(len(packed.body))
    assert len(packed.body) < len(plain.body)
    assert json.loads(packed.inflated()) == plain.json()


@clause("compression.response_small")
@needs("identity_fp32")
def test_small_and_binary_answers_are_not_compressed(http: HttpClient) -> None:
    assert "content-encoding" not in ask(http, 16, "gzip").headers
    assert "content-encoding" not in ask(http, LARGE, "gzip", binary=True).headers


@clause("compression.response_small")
def test_errors_and_metadata_are_not_compressed(http: HttpClient) -> None:
    for path in ("/v2", "/v2/models/nope"):
        assert "content-encoding" not in http.request("GET", path, headers={"Accept-Encoding": "gzip"}).headers


@clause("compression.response_choice")
@needs("identity_fp32")
@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        ("gzip, deflate", "gzip"),
        ("deflate, gzip", "deflate"),
        ("gzip;q=0.2, deflate;q=0.8", "deflate"),
        ("identity;q=0.9, gzip;q=0.5", None),
        ("gzip, identity", "gzip"),
        ("br, *", None),
        ("br, gzip;q=0.1", "gzip"),
        ("gzip;q=x, deflate", "deflate"),
    ],
)
def test_the_highest_weight_wins_and_the_first_of_equals(http: HttpClient, accept: str, chosen: str | None) -> None:
    answer = ask(http, LARGE, accept)
    assert answer.headers.get("content-encoding") == chosen
    assert len(json.loads(answer.inflated())["outputs"][0]["data"]) == LARGE
