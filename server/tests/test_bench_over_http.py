"""The load's HTTP client: what it sends, and what it makes of answers, of all there was and of pieces of them."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
import uvloop
from penstock.bench.over_http import BUFFER_BYTES, HEAD_BYTES, HttpCarrier, HttpTarget, Wire, body_of, describe
from penstock.errors import ServingError
from penstock.messages import InferRequest
from penstock.tensor import FP32, Tensor

LIMIT_S = 20.0  # of a whole test: nothing in it takes long, but a lost answer must not hang it
REQUEST = b"POST / HTTP/1.1\r\nContent-Length: 2\r\n\r\nok"
GOOD = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbody"


def run(test: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(test, LIMIT_S))


class FakeTransport(asyncio.Transport):
    """Keeps what happened to it."""

    def __init__(self) -> None:
        super().__init__()
        self.ended = ""

    def close(self) -> None:
        self.ended = self.ended or "closed"

    def abort(self) -> None:
        self.ended = "aborted"


class Reader:
    """A wire that is fed bytes as a loop would feed it."""

    def __init__(self) -> None:
        self.answers: list[tuple[str, bool]] = []
        self.transport = FakeTransport()
        self.wire = Wire(lambda wire, error, usable: self.answers.append((error, usable)))
        self.wire.connection_made(self.transport)

    def feed(self, data: bytes) -> None:
        while data:
            buffer = self.wire.get_buffer(-1)
            size = min(len(buffer), len(data))
            buffer[:size] = data[:size]
            self.wire.buffer_updated(size)
            data = data[size:]


@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_answers_are_told_apart_however_they_are_cut(piece: int) -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n"
    refused = b'HTTP/1.1 400 Bad Request\r\nContent-Length: 20\r\n\r\n{"error": "wrong\\n"}'
    reader = Reader()
    for answer in (GOOD, chunked, refused, GOOD):
        for start in range(0, len(answer), piece):
            reader.feed(answer[start : start + piece])
    assert reader.answers == [("", True), ("", True), ("400 wrong", True), ("", True)]
    assert reader.transport.ended == ""


def test_an_answer_may_be_larger_than_the_buffer() -> None:
    body = bytes(3 * BUFFER_BYTES)
    reader = Reader()
    for _ in range(2):
        reader.feed(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    assert reader.answers == [("", True), ("", True)]
    reader.feed(b"HTTP/1.1 500 No\r\nContent-Length: %d\r\n\r\nBroken " % len(body) + body[7:])
    assert reader.answers[2][0].startswith("500 Broken")
    assert reader.answers[2][1]
    assert HEAD_BYTES < BUFFER_BYTES


def test_a_connection_that_the_server_ends_takes_no_further_request() -> None:
    reader = Reader()
    reader.feed(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
    assert reader.answers == [("", False)]
    assert reader.transport.ended == "closed"


def test_what_is_no_http_is_an_error() -> None:
    reader = Reader()
    reader.feed(b"SSH-2.0-OpenSSH_9.6\r\n")
    [(error, usable)] = reader.answers
    assert error.startswith("no HTTP answer: ")
    assert not usable
    assert reader.transport.ended == "aborted"


@pytest.mark.parametrize(
    ("status", "body", "text"),
    [
        (400, b'{"error": "two\\nlines"}', "400 two lines"),
        (502, b"<html>Bad Gateway</html>", "502 <html>Bad Gateway</html>"),
        (500, b'["no object"]', '500 ["no object"]'),
        (503, b"", "503"),
        (500, b"x" * 500, "500 " + "x" * 200),
    ],
)
def test_an_error_is_one_line_with_the_protocols_text(status: int, body: bytes, text: str) -> None:
    assert describe(status, body) == text


def test_the_body_of_an_answer_that_was_cut_short_is_what_there_is() -> None:
    assert body_of(b"HTTP/1.1 500 No\r\nContent-Length: 100\r\n\r\nBegins") == b"Begins"


X = Tensor("X", FP32, np.array([[1.0, 2.0]], np.float32))


def test_a_request_in_binary_is_head_json_and_tensor() -> None:
    target = HttpTarget("http://127.0.0.1:9000/prefix/", binary=True)
    head, _, body = target.written(InferRequest("a model", "2", "", {"X": X}, {})).partition(b"\r\n\r\n")
    json_length = len(body) - 8
    assert head.decode().split("\r\n") == [
        "POST /prefix/v2/models/a%20model/versions/2/infer HTTP/1.1",
        "Host: 127.0.0.1:9000",
        "Content-Type: application/octet-stream",
        f"Inference-Header-Content-Length: {json_length}",
        f"Content-Length: {len(body)}",
    ]
    assert body[json_length:] == X.array.tobytes()


def test_a_request_in_json_has_no_binary_part() -> None:
    written = HttpTarget("127.0.0.1:9000", binary=False).written(InferRequest("m", "", "", {"X": X}, {}))
    head, _, body = written.partition(b"\r\n\r\n")
    assert head.decode().split("\r\n") == [
        "POST /v2/models/m/infer HTTP/1.1",
        "Host: 127.0.0.1:9000",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    ]
    assert body == b'{"inputs":[{"name":"X","datatype":"FP32","shape":[1,2],"data":[1.0,2.0]}]}'


@pytest.mark.parametrize("url", ["https://host:8000", "ftp://host", "http://", "http://host:port"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ServingError) as refusal:
        HttpTarget(url, binary=True)
    assert refusal.value.message == f"--url expects http://HOST:PORT, got '{url}'"


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def carrier_to(handler: Handler) -> AsyncIterator[HttpCarrier]:
    """An open carrier to a server on the loopback that runs `handler` for each connection."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await handler(reader, writer)
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    carrier = HttpCarrier("127.0.0.1", server.sockets[0].getsockname()[1], REQUEST)
    async with server:
        await carrier.open()
        yield carrier
        await carrier.close()


async def exchange(carrier: HttpCarrier) -> str:
    answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    carrier.send(answer.set_result)
    return await answer


def test_requests_follow_one_another_on_one_connection() -> None:
    connections = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        for _ in range(3):
            assert await reader.readexactly(len(REQUEST)) == REQUEST
            writer.write(GOOD)

    async def test() -> None:
        async with carrier_to(handler) as carrier:
            assert [await exchange(carrier) for _ in range(3)] == ["", "", ""]
        assert len(connections) == 1

    run(test())


def test_a_lost_connection_is_an_error_and_the_next_request_opens_another() -> None:
    connections = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        await reader.readexactly(len(REQUEST))
        if len(connections) > 1:
            writer.write(GOOD)

    async def test() -> None:
        async with carrier_to(handler) as carrier:
            assert await exchange(carrier) == "connection lost: the server closed it"
            assert await exchange(carrier) == ""
        assert len(connections) == 2

    run(test())


def test_an_aborted_request_leaves_a_carrier_that_can_be_used() -> None:
    silent = True

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(len(REQUEST))
        if silent:
            await reader.read()
        else:
            writer.write(GOOD)

    async def test() -> None:
        nonlocal silent
        async with carrier_to(handler) as carrier:
            answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
            carrier.send(answer.set_result)
            carrier.abort("too slow")
            assert await answer == "too slow"
            silent = False
            assert await exchange(carrier) == ""

    run(test())


def test_a_server_that_is_gone_is_an_error() -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(len(REQUEST))

    async def test() -> None:
        async with carrier_to(handler) as carrier:
            assert await exchange(carrier) == "connection lost: the server closed it"
        assert (await exchange(carrier)).startswith("cannot connect: ")

    run(test())
