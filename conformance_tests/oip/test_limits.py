"""Requests that ask for too much. Each must be refused quickly, and the server must serve on."""

import gzip
import re
import zlib
from typing import Any

import numpy as np
import pytest

from conformance_tests.carriers import Call, Carrier, Input, infer, infer_message, refusal, simple
from conformance_tests.clause_table import clause
from conformance_tests.grpc_wire import GrpcClient
from conformance_tests.http_wire import Answer, HttpClient, NoAnswerError, encode
from conformance_tests.server import SAMPLES, StartServer
from conformance_tests.tensors import texts

needs = pytest.mark.needs
INFER = "/v2/models/simple/infer"
REFUSED = {"INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"}
BLOCK = bytes(1 << 20)
OVER_64_MIB = 80  # blocks


def serves(http: HttpClient) -> bool:
    return http.get("/v2/health/ready").status == 200


@clause("limits.tensors")
@needs("simple")
@pytest.mark.parametrize("count", [1025, 20_000])
def test_too_many_inputs_are_refused(carrier: Carrier, count: int) -> None:
    row = np.zeros((1, 1), np.int32)
    refused = refusal(carrier, Call("simple", [Input(f"I{i}", "INT32", row) for i in range(count)]))
    assert refused.status in REFUSED
    assert len(refused.text) < 1_000_000
    assert infer(carrier, simple())["OUTPUT0"].shape == (1, 16)


@clause("limits.rank")
@needs("identity_fp32")
@pytest.mark.parametrize("rank", [33, 65, 5000])
def test_an_absurd_rank_is_refused(carrier: Carrier, rank: int) -> None:
    one = Input("INPUT0", "FP32", np.zeros(1, np.float32), [1] * rank)
    assert refusal(carrier, Call("identity_fp32", [one])).status in REFUSED


@clause("limits.lying_sizes")
@needs("identity_fp32")
@pytest.mark.parametrize("shape", [(1 << 31, 1 << 31), (1, 1 << 61), (1 << 20, 1 << 20), (1 << 62, 1)])
def test_a_shape_beyond_its_data_allocates_nothing(carrier: Carrier, shape: tuple[int, int]) -> None:
    one = Input("INPUT0", "FP32", np.zeros(4, np.float32), shape)
    assert refusal(carrier, Call("identity_fp32", [one])).status in REFUSED


@clause("limits.lying_sizes")
@needs("identity_bytes")
@pytest.mark.parametrize("shape", [(1, 1 << 40), (1 << 31, 1 << 31)])
def test_a_shape_beyond_its_strings_allocates_nothing(carrier: Carrier, shape: tuple[int, int]) -> None:
    one = Input("INPUT0", "BYTES", texts(["a"]), shape)
    assert refusal(carrier, Call("identity_bytes", [one])).status in REFUSED


@clause("limits.string_lengths")
@needs("identity_bytes")
@pytest.mark.parametrize("length", [5, 1 << 20, 0x7FFFFFFF, 0xFFFFFFFF])
def test_a_string_cannot_be_longer_than_its_data_over_http(http: HttpClient, length: int) -> None:
    data = length.to_bytes(4, "little") + b"ab"
    head = encode(
        {
            "inputs": [
                {"name": "INPUT0", "shape": [1, 1], "datatype": "BYTES", "parameters": {"binary_data_size": len(data)}}
            ]
        }
    )
    headers = {"Inference-Header-Content-Length": str(len(head))}
    answer = http.request("POST", "/v2/models/identity_bytes/infer", head + data, headers)
    assert answer.status == 400
    assert "INPUT0" in answer.error


@clause("limits.string_lengths")
@needs("identity_bytes")
@pytest.mark.parametrize("length", [5, 1 << 20, 0x7FFFFFFF, 0xFFFFFFFF])
def test_a_string_cannot_be_longer_than_its_data_over_grpc(grpc: GrpcClient, length: int) -> None:
    message = infer_message(Call("identity_bytes", [Input("INPUT0", "BYTES", texts(["a"], (1, 1)))]))
    message.raw_input_contents.append(length.to_bytes(4, "little") + b"ab")
    status, text = grpc.refusal("ModelInfer", message)
    assert status == "INVALID_ARGUMENT"
    assert "INPUT0" in text


@clause("limits.depth")
@needs("simple")
@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"parameters":{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}}",
        b'{"inputs":[{"name":"INPUT0","shape":[1,16],"datatype":"INT32","data":'
        + b"[" * 100_000
        + b"]" * 100_000
        + b"}]}",
    ],
    ids=["open", "open objects", "closed", "parameter", "data"],
)
def test_depth_beyond_reason_is_refused(http: HttpClient, body: bytes) -> None:
    answer = http.request("POST", INFER, body)
    assert answer.status == 400
    assert answer.error
    assert serves(http)


def bomb(window: int) -> bytes:
    """OVER_64_MIB of zeros in some 80 KB."""
    packer = zlib.compressobj(9, zlib.DEFLATED, window)
    return b"".join(packer.compress(BLOCK) for _ in range(OVER_64_MIB)) + packer.flush()


@clause("limits.bombs")
@needs("simple")
@pytest.mark.parametrize(("encoding", "window"), [("gzip", 31), ("deflate", 15)])
def test_a_body_that_swells_beyond_the_limit_is_refused(http: HttpClient, encoding: str, window: int) -> None:
    answer = http.request("POST", INFER, bomb(window), {"Content-Encoding": encoding})
    assert answer.status == 413
    assert re.fullmatch(
        r"Decompressed data size exceeds the maximum allowed value of \d+ bytes\. Use --http-max-input-size to "
        r"increase the limit\.",
        answer.error,
    )
    assert serves(http)


@clause("limits.bombs")
@needs("simple")
def test_a_compressed_bomb_inside_a_bomb_is_no_json(http: HttpClient) -> None:
    answer = http.request("POST", INFER, gzip.compress(bomb(31)), {"Content-Encoding": "gzip"})
    assert answer.status == 400
    assert answer.error


def announced(http: HttpClient, headers: dict[str, str]) -> Answer:
    """The answer to a head whose body is never sent."""
    with http.connect() as connection:
        connection.send(connection.head("POST", INFER, headers))
        return connection.receive()


@clause("limits.body")
@needs("simple")
@pytest.mark.parametrize("extra", [{}, {"Expect": "100-continue"}, {"Inference-Header-Content-Length": "100"}])
def test_a_body_beyond_the_limit_is_refused_before_it_is_sent(http: HttpClient, extra: dict[str, str]) -> None:
    answer = announced(http, {"Content-Length": str(1 << 40), **extra})
    assert answer.status == 413
    assert answer.error
    assert serves(http)


@clause("limits.body")
@needs("simple")
def test_json_beyond_the_limit_is_refused(http: HttpClient) -> None:
    body = b'{"inputs":[' + b" " * (65 << 20) + b"]}"
    answer = http.request("POST", INFER, body)
    assert answer.status == 413
    assert re.fullmatch(
        rf"request JSON size of {len(body)} bytes exceeds the maximum allowed input size of \d+ bytes\. "
        r"Use --http-max-input-size to increase the limit\.",
        answer.error,
    ), answer.error
    assert serves(http)


@clause("limits.json_tensor")
@needs("identity_fp32")
def test_a_json_tensor_beyond_the_limit_is_refused(http: HttpClient) -> None:
    document: dict[str, Any] = {
        "inputs": [{"name": "INPUT0", "shape": [1, 1 << 30], "datatype": "FP32", "data": [1.0]}]
    }
    answer = http.post("/v2/models/identity_fp32/infer", document)
    assert answer.status == 413
    assert re.fullmatch(
        r"JSON input 'INPUT0' has a byte_size \(4294967296 bytes\) that exceeds the maximum allowed value of \d+ "
        r"bytes\. Use --http-max-input-size to increase the limit\.",
        answer.error,
    ), answer.error


@clause("limits.headers")
@pytest.mark.parametrize(
    "headers",
    [{"X-Long": "x" * (1 << 20)}, {f"X-{i}": "x" * 100 for i in range(2000)}],
    ids=["one long", "many"],
)
def test_headers_beyond_the_limit_are_refused(http: HttpClient, headers: dict[str, str]) -> None:
    with http.connect() as connection:
        connection.send(connection.head("GET", "/v2/health/live", headers))
        answer = connection.receive()
    assert answer.status == 431
    assert answer.error
    assert serves(http)


@clause("limits.headers")
def test_a_path_beyond_the_limit_is_refused(http: HttpClient) -> None:
    with http.connect() as connection:
        connection.send(connection.head("GET", "/v2/models/" + "x" * (1 << 20), {}))
        assert connection.receive().status in (414, 431)
    assert serves(http)


@clause("limits.slow_client")
@pytest.mark.over("http")
def test_a_client_that_stalls_in_its_headers_is_cut_off(process: StartServer) -> None:
    running = process([SAMPLES], "--http-header-timeout-secs", "1")
    with HttpClient(running.http).connect() as connection:
        connection.send(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\nX-")
        try:
            assert connection.receive().status == 408
        except NoAnswerError:
            pass
        else:
            assert connection.at_end()


@clause("limits.chunks")
@needs("simple")
def test_too_many_chunks_are_refused_and_the_connection_closes(http: HttpClient) -> None:
    with http.connect() as connection:
        head = connection.head("POST", INFER, {"Transfer-Encoding": "chunked"})
        connection.send(head + b"1\r\n \r\n" * 65537 + b"0\r\n\r\n")
        answer = connection.receive()
        text = "Chunked request body exceeds maximum of 65536 non-empty chunks. Send fewer or larger HTTP chunks."
        assert (answer.status, answer.error) == (400, text)
        assert connection.at_end()
    assert serves(http)
