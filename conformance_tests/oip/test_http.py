"""HTTP itself: methods, connections, framing, names in paths."""

import json

import pytest

from conformance_tests.clause_table import clause
from conformance_tests.http_wire import Connection, HttpClient, NoAnswerError, encode
from conformance_tests.server import Target

needs = pytest.mark.needs
NUMBERS = list(range(16))
GOOD = encode(
    {
        "inputs": [
            {"name": "INPUT0", "shape": [1, 16], "datatype": "INT32", "data": NUMBERS},
            {"name": "INPUT1", "shape": [1, 16], "datatype": "INT32", "data": [1] * 16},
        ]
    }
)
INFER = "/v2/models/simple/infer"
PATHS = ("/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/simple", "/v2/models/simple/ready",
         "/v2/models/simple/config")  # fmt: skip


def post(connection: Connection, body: bytes = GOOD, **headers: str) -> bytes:
    fields = {"Content-Length": str(len(body))} | {name.replace("_", "-"): value for name, value in headers.items()}
    return connection.head("POST", INFER, fields) + body


def chunked(*chunks: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in (*chunks, b""))


@clause("http.head")
@needs("simple")
@pytest.mark.parametrize("path", PATHS)
def test_head_is_get_without_its_body(http: HttpClient, path: str) -> None:
    got = http.get(path)
    with http.connect() as connection:
        connection.send(connection.head("HEAD", path, {}))
        head = connection.receive(bodiless=True)
        connection.send(connection.head("GET", path, {}))  # what followed the head would be read as this answer
        assert connection.receive().body == got.body
    assert head.status == got.status == 200
    for name in ("content-type", "content-length"):
        assert head.headers[name] == got.headers[name]


@clause("http.options")
@pytest.mark.parametrize("path", ["/v2", INFER])
def test_options_is_no_method_while_cors_is_off(http: HttpClient, path: str) -> None:
    answer = http.request("OPTIONS", path)
    assert (answer.status, answer.error) == (405, "Method Not Allowed")


@clause("http.content_length")
@needs("simple")
@pytest.mark.parametrize("path", [*PATHS, "/nope"])
def test_an_answer_says_its_length(http: HttpClient, path: str) -> None:
    answer = http.get(path)
    assert answer.headers["content-length"] == str(len(answer.body))


@clause("http.expect")
@needs("simple")
def test_a_client_that_asks_first_is_told_to_go_on(http: HttpClient) -> None:
    with http.connect() as connection:
        fields = {"Content-Length": str(len(GOOD)), "Expect": "100-continue"}
        connection.send(connection.head("POST", INFER, fields))
        assert connection.receive().status == 100
        connection.send(GOOD)
        assert connection.receive().status == 200


@clause("http.chunked")
@needs("simple")
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_body_may_come_in_chunks(http: HttpClient, size: int) -> None:
    chunks = [GOOD[at : at + size] for at in range(0, len(GOOD), size)]
    answer = http.request("POST", INFER, chunked(*chunks), {"Transfer-Encoding": "chunked"})
    assert answer.status == 200, answer.body
    assert answer.json()["outputs"][0]["data"] == [*range(1, 17)]


@clause("http.chunked")
@needs("simple")
def test_a_chunked_body_may_be_binary(http: HttpClient) -> None:
    document = json.loads(GOOD)
    document["inputs"][0] = {"name": "INPUT0", "shape": [1, 16], "datatype": "INT32",
                             "parameters": {"binary_data_size": 64}}  # fmt: skip
    head = encode(document)
    body = chunked(head[:50], head[50:] + bytes(10), bytes(54))
    headers = {"Transfer-Encoding": "chunked", "Inference-Header-Content-Length": str(len(head))}
    answer = http.request("POST", INFER, body, headers)
    assert answer.status == 200, answer.body
    assert answer.json()["outputs"][0]["data"] == [1] * 16


@clause("http.keep_alive")
@needs("simple")
def test_a_connection_carries_request_after_request(http: HttpClient) -> None:
    with http.connect() as connection:
        for i in range(50):
            connection.send(post(connection) if i % 3 else connection.head("GET", PATHS[i % 6], {}))
            assert connection.receive().status == 200


@clause("http.keep_alive")
@needs("simple")
def test_a_refusal_keeps_the_connection_and_its_framing(http: HttpClient) -> None:
    """The bodies of refused requests must be read to their end, or they are taken for the next request."""
    with http.connect() as connection:
        for path in ("/nope", "/v2/models/nope/infer", "/v2/health/live", "/v2/models/simple"):
            connection.send(connection.head("POST", path, {"Content-Length": str(len(GOOD))}) + GOOD)
            assert connection.receive().status in (404, 405)
        connection.send(post(connection))
        assert connection.receive().status == 200


@clause("http.pipelining")
@needs("simple")
def test_requests_sent_at_once_are_answered_in_order(http: HttpClient) -> None:
    with http.connect() as connection:
        ids = [f"nr{i}" for i in range(20)]
        sent = []
        for name in ids:
            sent.append(post(connection, b'{"id":"%b",' % name.encode() + GOOD[1:]))
            sent.append(connection.head("GET", "/v2/models/simple/ready", {}))
        connection.send(b"".join(sent))
        answers = [connection.receive() for _ in sent]
        assert [answer.status for answer in answers] == [200] * len(sent)
        assert [answer.json()["id"] for answer in answers[::2]] == ids
        assert {answer.body for answer in answers[1::2]} == {answers[1].body}


@clause("http.close")
@needs("simple")
def test_a_client_may_ask_to_close(http: HttpClient) -> None:
    with http.connect() as connection:
        connection.send(post(connection, Connection="close"))
        answer = connection.receive()
        assert (answer.status, answer.headers["connection"].lower()) == (200, "close")
        assert connection.at_end()


@clause("http.percent_encoding")
@needs("simple")
@pytest.mark.parametrize("path", ["/v2/models/sim%70le", "/v2/models/%73%69%6d%70%6C%65"])
def test_names_in_paths_are_decoded(http: HttpClient, path: str) -> None:
    assert http.get(path).json()["name"] == "simple"
    assert http.request("POST", f"{path}/infer", GOOD).status == 200


@clause("http.percent_encoding")
def test_a_decoded_name_is_told_back(http: HttpClient) -> None:
    answer = http.get("/v2/models/no%20pe%C3%A4")
    assert (answer.status, answer.error) == (404, "Request for unknown model: 'no peä' is not found")


@clause("http.query_ignored")
@needs("simple")
@pytest.mark.parametrize("query", ["?", "?a=b&c", "?/v2/models/nope"])
def test_the_query_means_nothing(http: HttpClient, query: str) -> None:
    assert http.get(f"/v2/models/simple{query}").json()["name"] == "simple"
    assert http.request("POST", INFER + query, GOOD).status == 200


POST = b"POST /v2/models/simple/infer HTTP/1.1\r\nHost: x\r\n"
MALFORMED = {
    "no HTTP": b"hello\r\n\r\n",
    "bytes": bytes(range(128, 256)) + b"\r\n\r\n",
    "length is no number": POST + b"Content-Length: abc\r\n\r\n",
    "length is negative": POST + b"Content-Length: -5\r\n\r\n",
    "two lengths": POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
    "length and chunks": POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunk size is no number": POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nhello\r\n0\r\n\r\n",
    "header without a colon": b"GET /v2 HTTP/1.1\r\nHost: x\r\nnonsense\r\n\r\n",
    "NUL in a header": b"GET /v2 HTTP/1.1\r\nHost: x\r\nX-A: a\0b\r\n\r\n",
}


@clause("http.malformed")
@pytest.mark.parametrize("name", [*MALFORMED])
def test_what_is_no_http_is_refused_or_cut_off(http: HttpClient, name: str) -> None:
    with http.connect() as connection:
        connection.send(MALFORMED[name])
        try:
            assert connection.receive().status == 400
        except NoAnswerError:
            pass
        else:
            assert connection.at_end()
    assert http.get("/v2/health/live").status == 200


@clause("http.byte_by_byte")
@needs("simple")
def test_a_request_may_come_byte_by_byte(http: HttpClient) -> None:
    with http.connect() as connection:
        request = post(connection)
        for at in range(len(request)):
            connection.send(request[at : at + 1])
        assert connection.receive().status == 200


@clause("http.half_sent")
@needs("simple")
@pytest.mark.parametrize("part", [10, 60, 200])
def test_a_client_that_leaves_in_the_middle_harms_nobody(http: HttpClient, target: Target, part: int) -> None:
    for _ in range(20):
        with http.connect() as connection:
            connection.send(post(connection)[:part])
    assert http.request("POST", INFER, GOOD).status == 200


@clause("http.half_sent")
@needs("simple")
def test_a_client_that_leaves_before_its_answer_harms_nobody(http: HttpClient) -> None:
    for _ in range(20):
        with http.connect() as connection:
            connection.send(post(connection))
    assert http.request("POST", INFER, GOOD).status == 200
