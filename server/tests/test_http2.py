"""The HTTP/2 connection: frames in, frames out."""

import asyncio
import gzip
import struct
import zlib
from collections.abc import Awaitable, Callable

import hpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from penstock.errors import Kind, ServingError
from penstock.grpc_api.http2 import frames
from penstock.grpc_api.http2.connection import MAX_CONTINUATIONS, MAX_FIELDS, MAX_FRAME, MAX_STREAMS, OPENING
from penstock.grpc_api.http2.flow import CONNECTION_WINDOW, WINDOW
from penstock.grpc_api.http2.frames import Code

from .http2_wire import (
    CHAT,
    ECHO,
    FAIL,
    LATER,
    LIMIT_S,
    OPEN,
    TALK,
    Client,
    Frame,
    block,
    call,
    code,
    data,
    headers,
    message,
    request_fields,
    split,
)


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), LIMIT_S))


def on_loop(test: Callable[[Client], None]) -> None:
    """A test that waits for nothing."""

    async def inner() -> None:
        test(Client())

    run(inner)


# -- opening


def test_the_server_says_its_settings_first() -> None:
    first, second = split(OPENING)
    assert dict(struct.iter_unpack(">HI", first.payload)) == {
        frames.MAX_CONCURRENT_STREAMS: MAX_STREAMS, frames.INITIAL_WINDOW_SIZE: WINDOW,
        frames.MAX_FRAME_SIZE: MAX_FRAME, frames.MAX_HEADER_LIST_SIZE: MAX_FIELDS,
    }  # fmt: skip
    assert second == Frame("WINDOW_UPDATE", 0, 0, (CONNECTION_WINDOW - frames.DEFAULT_WINDOW).to_bytes(4, "big"))


def test_a_unary_call_is_answered_in_one_write() -> None:
    def test(client: Client) -> None:
        client.open()
        writes = client.wire.writes
        got = client.send(call(1, ECHO, b"hello"))
        assert client.wire.writes == writes + 1
        assert [(frame.kind, frame.flags) for frame in got] == [
            ("HEADERS", frames.END_HEADERS), ("DATA", 0), ("HEADERS", frames.END_HEADERS | frames.END_STREAM),
        ]  # fmt: skip
        assert client.fields(got[0]) == {":status": "200", "content-type": "application/grpc"}
        assert got[1].payload == message(b"hello")
        assert client.fields(got[2]) == {"grpc-status": "0"}

    on_loop(test)


def test_calls_that_arrive_together_leave_together() -> None:
    def test(client: Client) -> None:
        client.open()
        writes = client.wire.writes
        got = client.send(b"".join(call(id, ECHO, b"%d" % id) for id in range(1, 41, 2)))
        assert client.wire.writes == writes + 1
        for id in range(1, 41, 2):
            assert client.answer(got, id)[0] == message(b"%d" % id)

    on_loop(test)


@pytest.mark.parametrize("size", [1, 2, 3, 8, 9, 10, 24, 33])
def test_bytes_may_arrive_in_any_pieces(size: int) -> None:
    def test(client: Client) -> None:
        sent = OPEN + call(1, ECHO, b"hello" * 30) + frames.frame(frames.PING, 0, 0, b"12345678")
        got: list[Frame] = []
        for at in range(0, len(sent), size):
            got += client.send(sent[at : at + size])
        assert client.answer(got, 1)[0] == message(b"hello" * 30)
        assert got[-1] == Frame("PING", 0, frames.ACK, b"12345678")

    on_loop(test)


def read_in(client: Client, sent: bytes, most: int) -> list[Frame]:
    """Let the connection read `sent` as a transport does, up to `most` bytes at a time, where it wants them."""
    at = 0
    while at < len(sent):
        room = client.connection.get_buffer(-1)
        part = sent[at : at + min(most, len(room))]
        room[: len(part)] = part
        client.connection.buffer_updated(len(part))
        at += len(part)
    return client.frames()


@pytest.mark.parametrize("most", [1000, 65_536, 10**9])
@pytest.mark.parametrize("cut", [100_000, 150_000, MAX_FRAME])
def test_a_long_message_is_read_into_its_own_memory_however_it_comes(cut: int, most: int) -> None:
    body = bytes(range(256)) * 2000
    whole = message(body)

    def test(client: Client) -> None:
        client.open(INITIAL_WINDOW_SIZE=2**24, MAX_FRAME_SIZE=2**24 - 1)
        client.send(frames.window_update(0, 2**24))
        sent = headers(1, ECHO)
        for at in range(0, len(whole), cut):
            sent += frame(frames.DATA, 1, b"\3" + whole[at : at + cut] + bytes(3), frames.PADDED)
        got = read_in(client, sent + data(1, b"") + call(3, ECHO, b"behind"), most)
        assert client.answer(got, 1)[0] == whole
        assert client.answer(got, 3)[0] == message(b"behind")

    on_loop(test)


def test_a_stream_s_long_messages_are_read_alike() -> None:
    async def test() -> None:
        client = Client().open(INITIAL_WINDOW_SIZE=2**24)
        client.send(frames.window_update(0, 2**24))
        one = message(bytes(range(256)) * 1000)
        read_in(client, headers(1, CHAT) + data(1, one, end=False) + data(1, one), 10**9)
        await client.until(lambda: not client.connection._streams)
        doubled = message(bytes(range(256)) * 1000 + bytes(range(256)) * 1000)
        assert client.answer(client.frames(), 1)[0] == doubled + doubled

    run(test)


def test_a_call_that_is_over_takes_no_more_of_its_message() -> None:
    def test(client: Client) -> None:
        client.open()
        begun = headers(1, ECHO) + data(1, message(bytes(300_000)))
        read_in(client, begun[:100_000], 10**9)
        client.connection._streams[1].end(ServingError(Kind.DEADLINE, "over"))
        got = read_in(client, begun[100_000:] + call(3, ECHO, b"on"), 10**9)
        assert client.answer(got, 1)[1]["grpc-status"] == "4"
        assert client.answer(got, 3)[0] == message(b"on")

    on_loop(test)


# -- what breaks the connection


def frame(kind: int, stream: int, payload: bytes = b"", flags: int = 0) -> bytes:
    return frames.frame(kind, flags, stream, payload)


UPDATE = frames.window_update
FAULTS: dict[str, tuple[bytes, Code]] = {
    "HTTP/1": (b"GET / HTTP/1.1\r\n\r\n", Code.PROTOCOL_ERROR),
    "no SETTINGS first": (frames.PREFACE + frame(frames.PING, 0, bytes(8)), Code.PROTOCOL_ERROR),
    "DATA on stream 0": (OPEN + data(0, b"x"), Code.PROTOCOL_ERROR),
    "DATA on an idle stream": (OPEN + data(1, b"x"), Code.PROTOCOL_ERROR),
    "padding that fills its frame": (
        OPEN + headers(1, LATER) + frame(frames.DATA, 1, b"\5abcd", frames.PADDED), Code.PROTOCOL_ERROR
    ),
    "padding without its length": (OPEN + headers(1, LATER) + frame(frames.DATA, 1, b"", 8), Code.PROTOCOL_ERROR),
    "HEADERS on stream 0": (OPEN + headers(0, ECHO), Code.PROTOCOL_ERROR),
    "HEADERS on an even stream": (OPEN + headers(2, ECHO), Code.PROTOCOL_ERROR),
    "HEADERS on a stream that is over": (OPEN + call(1, ECHO, b"") + headers(1, ECHO), Code.STREAM_CLOSED),
    "HEADERS on a stream that was passed over": (OPEN + call(3, ECHO, b"") + headers(1, ECHO), Code.STREAM_CLOSED),
    "HEADERS with too much padding": (OPEN + frame(frames.HEADERS, 1, b"\xffx", 0xC), Code.PROTOCOL_ERROR),
    "HEADERS too short for a priority": (OPEN + frame(frames.HEADERS, 1, b"x", 0x24), Code.PROTOCOL_ERROR),
    "an interrupted header block": (
        OPEN + headers(1, ECHO, flags=0) + frame(frames.PING, 0, bytes(8)), Code.PROTOCOL_ERROR
    ),
    "another stream's CONTINUATION": (
        OPEN + headers(1, ECHO, flags=0) + frame(frames.CONTINUATION, 3, b""), Code.PROTOCOL_ERROR
    ),
    "CONTINUATION of nothing": (OPEN + frame(frames.CONTINUATION, 1, b"", 4), Code.PROTOCOL_ERROR),
    "empty CONTINUATION without an end": (
        OPEN + headers(1, ECHO, flags=0) + MAX_CONTINUATIONS * frame(frames.CONTINUATION, 1), Code.ENHANCE_YOUR_CALM
    ),
    "CONTINUATION over the limit": (
        OPEN + headers(1, ECHO, flags=0) + 5 * frame(frames.CONTINUATION, 1, bytes(MAX_FIELDS // 4)),
        Code.ENHANCE_YOUR_CALM,
    ),
    "HEADERS over the limit": (OPEN + frame(frames.HEADERS, 1, bytes(MAX_FIELDS + 1)), Code.ENHANCE_YOUR_CALM),
    "a frame over the limit": (
        OPEN + headers(1, LATER) + frame(frames.DATA, 1, bytes(MAX_FRAME + 1)), Code.FRAME_SIZE_ERROR
    ),
    "no HPACK": (OPEN + frame(frames.HEADERS, 1, b"\xff\xff\xff\xff\xff\xff", 4), Code.COMPRESSION_ERROR),
    "a capital letter": (
        OPEN + frame(frames.HEADERS, 1, block(*request_fields(ECHO, ("X-A", "1"))), 4), Code.PROTOCOL_ERROR
    ),
    "a line break in a value": (OPEN + headers(1, ECHO, ("x-a", "1\r\nb: 2")), Code.PROTOCOL_ERROR),
    "PRIORITY on stream 0": (OPEN + frame(frames.PRIORITY, 0, bytes(5)), Code.PROTOCOL_ERROR),
    "PRIORITY of 4 bytes": (OPEN + frame(frames.PRIORITY, 1, bytes(4)), Code.FRAME_SIZE_ERROR),
    "RST_STREAM on stream 0": (OPEN + frame(frames.RST_STREAM, 0, bytes(4)), Code.PROTOCOL_ERROR),
    "RST_STREAM on an idle stream": (OPEN + frame(frames.RST_STREAM, 1, bytes(4)), Code.PROTOCOL_ERROR),
    "RST_STREAM of 5 bytes": (OPEN + headers(1, LATER) + frame(frames.RST_STREAM, 1, bytes(5)), Code.FRAME_SIZE_ERROR),
    "SETTINGS on a stream": (frames.PREFACE + frame(frames.SETTINGS, 1), Code.PROTOCOL_ERROR),
    "SETTINGS of 5 bytes": (frames.PREFACE + frame(frames.SETTINGS, 0, bytes(5)), Code.FRAME_SIZE_ERROR),
    "SETTINGS with ACK and more": (OPEN + frame(frames.SETTINGS, 0, bytes(6), frames.ACK), Code.FRAME_SIZE_ERROR),
    "ENABLE_PUSH 2": (frames.PREFACE + frames.settings(ENABLE_PUSH=2), Code.PROTOCOL_ERROR),
    "an initial window of 2^31": (
        frames.PREFACE + frames.settings(INITIAL_WINDOW_SIZE=2**31), Code.FLOW_CONTROL_ERROR
    ),
    "an initial window that lifts a stream's over 2^31": (
        OPEN + headers(1, LATER) + UPDATE(1, 2**31 - 65536) + frames.settings(INITIAL_WINDOW_SIZE=65536),
        Code.FLOW_CONTROL_ERROR,
    ),
    "a frame limit of 16383": (frames.PREFACE + frames.settings(MAX_FRAME_SIZE=2**14 - 1), Code.PROTOCOL_ERROR),
    "a frame limit of 2^24": (frames.PREFACE + frames.settings(MAX_FRAME_SIZE=2**24), Code.PROTOCOL_ERROR),
    "PUSH_PROMISE": (OPEN + frame(frames.PUSH_PROMISE, 1, bytes(4)), Code.PROTOCOL_ERROR),
    "PING of 7 bytes": (OPEN + frame(frames.PING, 0, bytes(7)), Code.FRAME_SIZE_ERROR),
    "PING on a stream": (OPEN + frame(frames.PING, 1, bytes(8)), Code.PROTOCOL_ERROR),
    "GOAWAY on a stream": (OPEN + frame(frames.GOAWAY, 1, bytes(8)), Code.PROTOCOL_ERROR),
    "GOAWAY of 7 bytes": (OPEN + frame(frames.GOAWAY, 0, bytes(7)), Code.FRAME_SIZE_ERROR),
    "WINDOW_UPDATE of 3 bytes": (OPEN + frame(frames.WINDOW_UPDATE, 0, bytes(3)), Code.FRAME_SIZE_ERROR),
    "WINDOW_UPDATE by 0": (OPEN + UPDATE(0, 0), Code.PROTOCOL_ERROR),
    "WINDOW_UPDATE over 2^31": (OPEN + UPDATE(0, 2**31 - 1), Code.FLOW_CONTROL_ERROR),
    "WINDOW_UPDATE on an idle stream": (OPEN + UPDATE(1, 1), Code.PROTOCOL_ERROR),
    "a flood of resets": (
        OPEN + b"".join(headers(id, LATER) + frames.rst_stream(id, Code.CANCEL) for id in range(1, 4501, 2)),
        Code.ENHANCE_YOUR_CALM,
    ),
    "a flood of SETTINGS": (OPEN + 1100 * frames.settings(), Code.ENHANCE_YOUR_CALM),
    "a flood of empty DATA": (OPEN + headers(1, LATER) + 1100 * data(1, b"", end=False), Code.ENHANCE_YOUR_CALM),
    "a flood of PRIORITY": (OPEN + 1100 * frame(frames.PRIORITY, 1, bytes(5)), Code.ENHANCE_YOUR_CALM),
    "a flood of unknown frames": (OPEN + 1100 * frame(99, 0), Code.ENHANCE_YOUR_CALM),
    "a flood of PING": (OPEN + 4 * frame(frames.PING, 0, bytes(8)), Code.ENHANCE_YOUR_CALM),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_ends_the_connection_with_its_code(name: str) -> None:
    def test(client: Client) -> None:
        sent, wanted = FAULTS[name]
        last = client.send(sent)[-1]
        assert (last.kind, code(last)) == ("GOAWAY", wanted)
        assert client.wire.closed
        assert client.send(call(1001, ECHO, b"")) == []

    on_loop(test)


def test_the_goaway_names_the_last_stream_and_says_why() -> None:
    def test(client: Client) -> None:
        last = client.send(OPEN + call(7, ECHO, b"") + frame(frames.PING, 0, b"x"))[-1]
        assert last.payload == struct.pack(">II", 7, Code.FRAME_SIZE_ERROR) + b"PING that is not 8 bytes long"

    on_loop(test)


def test_calls_are_cancelled_when_the_connection_is_lost() -> None:
    def test(client: Client) -> None:
        client.open().send(call(1, LATER, b"a"))
        client.lose()
        [waiting] = client.waiting
        assert [reason.kind for reason in waiting.cancelled] == [Kind.CANCELLED]
        assert client.gone
        waiting.reply(b"late")

    on_loop(test)


# -- what resets a stream, and leaves the connection alone

RESETS: dict[str, tuple[bytes, Code]] = {
    "no path": (frame(frames.HEADERS, 1, block((":method", "POST"), (":scheme", "http")), 4), Code.PROTOCOL_ERROR),
    "an empty path": (headers(1, ""), Code.PROTOCOL_ERROR),
    "an unknown pseudo-header": (frame(frames.HEADERS, 1, block((":a", "b"), *request_fields(ECHO)), 4),
                                 Code.PROTOCOL_ERROR),
    "a pseudo-header twice": (frame(frames.HEADERS, 1, block((":path", "/"), *request_fields(ECHO)), 4),
                              Code.PROTOCOL_ERROR),
    "a late pseudo-header": (
        frame(frames.HEADERS, 1, block(*request_fields(ECHO)[:3], ("te", "trailers"), (":authority", "t")), 4),
        Code.PROTOCOL_ERROR,
    ),
    "connection": (headers(1, ECHO, ("connection", "close")), Code.PROTOCOL_ERROR),
    "transfer-encoding": (headers(1, ECHO, ("transfer-encoding", "chunked")), Code.PROTOCOL_ERROR),
    "te: gzip": (headers(1, ECHO, ("te", "gzip")), Code.PROTOCOL_ERROR),
    "a content-length of letters": (headers(1, ECHO, ("content-length", "x")), Code.PROTOCOL_ERROR),
    "more than content-length": (call(1, ECHO, b"abc", ("content-length", "7")), Code.PROTOCOL_ERROR),
    "less than content-length": (call(1, ECHO, b"abc", ("content-length", "9")), Code.PROTOCOL_ERROR),
    "a second request": (headers(1, LATER) + headers(1, LATER), Code.PROTOCOL_ERROR),
    "a pseudo-header in trailers": (headers(1, LATER) + headers(1, LATER, flags=5), Code.PROTOCOL_ERROR),
    "DATA behind the end": (call(1, LATER, b"") + data(1, b"x"), Code.STREAM_CLOSED),
    "HEADERS behind the end": (call(1, LATER, b"") + headers(1, LATER, flags=5), Code.STREAM_CLOSED),
    "DATA behind the answer": (call(1, ECHO, b"") + data(1, b"x"), Code.STREAM_CLOSED),
    "WINDOW_UPDATE by 0": (headers(1, LATER) + UPDATE(1, 0), Code.PROTOCOL_ERROR),
    "WINDOW_UPDATE over 2^31": (headers(1, LATER) + UPDATE(1, 2**31 - 1), Code.FLOW_CONTROL_ERROR),
    "more than the window": (
        headers(1, LATER) + data(1, message(bytes(WINDOW - 5)), end=False) + data(1, b"x"), Code.FLOW_CONTROL_ERROR
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RESETS)
def test_a_stream_is_reset_and_others_are_served(name: str) -> None:
    def test(client: Client) -> None:
        sent, wanted = RESETS[name]
        got = client.open().send(sent + call(9, ECHO, b"still"))
        assert [code(frame) for frame in got if frame.kind == "RST_STREAM"] == [wanted]
        assert client.answer(got, 9)[0] == message(b"still")

    on_loop(test)


def test_streams_beyond_the_limit_are_refused() -> None:
    def test(client: Client) -> None:
        client.open().send(b"".join(headers(id, LATER) for id in range(1, 2 * MAX_STREAMS, 2)))
        [refused] = client.send(call(2 * MAX_STREAMS + 1, ECHO, b""))
        assert (refused.kind, code(refused)) == ("RST_STREAM", Code.REFUSED_STREAM)
        client.send(frames.rst_stream(1, Code.CANCEL))
        assert client.answer(client.send(call(2 * MAX_STREAMS + 3, ECHO, b"")), 2 * MAX_STREAMS + 3)

    on_loop(test)


def test_a_reset_cancels_the_call_and_its_answer_goes_nowhere() -> None:
    def test(client: Client) -> None:
        client.open().send(call(1, LATER, b""))
        assert client.send(frames.rst_stream(1, Code.CANCEL)) == []
        [waiting] = client.waiting
        assert [reason.kind for reason in waiting.cancelled] == [Kind.CANCELLED]
        waiting.reply(b"late")
        assert client.frames() == []

    on_loop(test)


# -- frames that mean little


def test_what_http_2_allows_and_grpc_does_not_need_is_passed_over() -> None:
    def test(client: Client) -> None:
        fields = block(*request_fields(ECHO))
        got = client.open().send(
            frame(frames.PRIORITY, 5, bytes(5))
            + frame(77, 3, b"unknown" * 100)
            + frame(frames.HEADERS, 1, b"\3" + bytes(5) + fields[:20] + bytes(3), 0x28)  # padded, with a priority
            + frame(frames.CONTINUATION, 1, fields[20:40])
            + frame(frames.CONTINUATION, 1, fields[40:], frames.END_HEADERS)
            + frame(frames.DATA, 1, b"\2" + message(b"hello")[:4] + bytes(2), frames.PADDED)
            + frame(frames.DATA, 1, b"\0" + message(b"hello")[4:], frames.PADDED)
            + frame(frames.HEADERS, 1, block(("x-checksum", "1")), 5)
        )
        assert client.answer(got, 1)[0] == message(b"hello")

    on_loop(test)


def test_a_reserved_bit_is_passed_over() -> None:
    def test(client: Client) -> None:
        sent = bytearray(call(1, ECHO, b"x"))
        sent[5] |= 0x80
        assert client.answer(client.open().send(bytes(sent)), 1)[0] == message(b"x")

    on_loop(test)


def test_frames_on_a_stream_that_the_server_ended_first_are_passed_over() -> None:
    def test(client: Client) -> None:
        got = client.open().send(headers(1, "/t/None"))
        assert [frame.kind for frame in got] == ["HEADERS", "RST_STREAM"]
        assert code(got[1]) is Code.NO_ERROR
        assert client.send(data(1, b"x", end=False) + frame(frames.HEADERS, 1, block(("a", "b")), 5)) == []

    on_loop(test)


# -- what gRPC makes of a request

REFUSALS: dict[str, tuple[bytes, dict[str, str]]] = {
    "an unknown method": (call(1, "/t/None", b""), {":status": "200", "grpc-status": "12"}),
    "GET": (frame(frames.HEADERS, 1, block((":method", "GET"), *request_fields(ECHO)[1:]), 5), {":status": "405"}),
    "no content-type": (frame(frames.HEADERS, 1, block(*request_fields(ECHO)[:5]), 5), {":status": "415"}),
    "another content-type": (
        frame(frames.HEADERS, 1, block(*request_fields(ECHO)[:5], ("content-type", "application/grpcx")), 5),
        {":status": "415"},
    ),
    "an unknown encoding": (
        call(1, ECHO, b"", ("grpc-encoding", "br")),
        {"grpc-status": "12", "grpc-accept-encoding": "identity,deflate,gzip",
         "grpc-message": "messages encoded with 'br': expected one of identity, deflate, gzip"},
    ),
    "a timeout of letters": (
        call(1, ECHO, b"", ("grpc-timeout", "soon")),
        {"grpc-status": "3", "grpc-message": "grpc-timeout expects up to 8 digits and one of HMSmun, got 'soon'"},
    ),
    "a timeout of 9 digits": (call(1, ECHO, b"", ("grpc-timeout", "123456789S")), {"grpc-status": "3"}),
    "a -bin key that is not base64": (call(1, ECHO, b"", ("x-bin", "=!")), {"grpc-status": "3"}),
    "no message": (headers(1, ECHO, flags=5), {
        "grpc-status": "12", "grpc-message": "this method takes one whole message, got none"}),
    "two messages": (headers(1, ECHO) + data(1, message(b"a") + message(b"b")), {
        "grpc-status": "12", "grpc-message": "this method takes one whole message, got 2"}),
    "a message and a half": (headers(1, ECHO) + data(1, message(b"a") + b"\0"), {
        "grpc-status": "12", "grpc-message": "this method takes one whole message, got 1"}),
    "half a message": (headers(1, ECHO) + data(1, message(b"abc")[:6]), {"grpc-status": "12"}),
    "a compressed message without an encoding": (headers(1, ECHO) + data(1, message(b"abc", True)), {
        "grpc-status": "3", "grpc-message": "a compressed message without grpc-encoding"}),
    "a message that is not gzip": (
        headers(1, ECHO, ("grpc-encoding", "gzip")) + data(1, message(b"abc", True)), {"grpc-status": "3"}),
    "gzip that ends too early": (
        headers(1, ECHO, ("grpc-encoding", "gzip")) + data(1, message(gzip.compress(b"abc")[:-1], True)), {
            "grpc-status": "3", "grpc-message": "a message that is not gzip: it ends too early or too late"}),
    "an error of the method": (call(1, FAIL, "100 % déjà\nvu".encode()), {
        "grpc-status": "3", "grpc-message": "100 %25 d%C3%A9j%C3%A0%0Avu"}),
    "too many header fields": (
        headers(1, ECHO, *((f"x-{n}", "y" * 90) for n in range(550))), {
            "grpc-status": "8", "grpc-message": f"a request's header fields may have {MAX_FIELDS} bytes"}),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_is_headers_alone(name: str) -> None:
    def test(client: Client) -> None:
        sent, wanted = REFUSALS[name]
        got = client.open().send(sent)
        assert [frame.kind for frame in got if frame.kind != "RST_STREAM"] == ["HEADERS"]
        body, fields = client.answer(got, 1)
        assert body == b""
        assert fields.items() >= wanted.items()
        assert client.answer(client.send(call(3, ECHO, b"on")), 3)[0] == message(b"on")

    on_loop(test)


def test_messages_over_the_limit_are_refused_as_soon_as_they_begin() -> None:
    async def test() -> None:
        client = Client(grpc_max_message_size=100).open()
        got = client.send(headers(1, ECHO) + data(1, message(bytes(101))[:5], end=False))
        assert client.answer(got, 1)[1]["grpc-message"] == "SERVER: Received message larger than max (101 vs. 100)"
        bomb = message(gzip.compress(bytes(101)), True)
        got = client.send(headers(3, ECHO, ("grpc-encoding", "gzip")) + data(3, bomb))
        assert client.answer(got, 3)[1]["grpc-message"] == "Decompressed message larger than max"
        assert client.answer(client.send(call(5, ECHO, bytes(100))), 5)[0] == message(bytes(100))

    run(test)


@pytest.mark.parametrize(("encoding", "packed"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
@pytest.mark.parametrize("size", [10, 1_000_000])
def test_compressed_messages_are_read(encoding: str, packed: Callable[[bytes], bytes], size: int) -> None:
    body = bytes(range(256)) * (size // 256) if size > 256 else b"x" * size
    noise = hpack.huffman_table.__doc__ or ""

    async def test() -> None:
        client = Client().open(INITIAL_WINDOW_SIZE=2**24)
        client.send(UPDATE(0, 2**24))
        whole = packed(body + noise.encode())
        got = client.send(headers(1, ECHO, ("grpc-encoding", encoding)) + data(1, message(whole, True)))
        if not got:
            got = await client.written()
        assert client.answer(got, 1)[0] == message(body + noise.encode())

    run(test)


def test_metadata_reach_the_call_in_order_and_bin_keys_as_bytes() -> None:
    def test(client: Client) -> None:
        more = (("x-a", "1"), ("x-b-bin", "AQI"), ("x-a", "2"), ("x-b-bin", "AQI=,Aw=="), ("user-agent", "t"))
        client.open().send(call(1, LATER, b"", *more))
        assert client.waiting[0].call.metadata == (
            ("x-a", "1"), ("x-b-bin", b"\1\2"), ("x-a", "2"), ("x-b-bin", b"\1\2"), ("x-b-bin", b"\3"),
            ("user-agent", "t"),
        )  # fmt: skip

    on_loop(test)


# -- deadlines


def test_a_deadline_answers_and_cancels() -> None:
    async def test() -> None:
        client = Client().open()
        client.send(call(1, LATER, b"", ("grpc-timeout", "5m")) + call(3, LATER, b"", ("grpc-timeout", "1H")))
        got = await client.written()
        assert client.answer(got, 1)[1]["grpc-status"] == "4"
        first, second = client.waiting
        assert [reason.kind for reason in first.cancelled] == [Kind.DEADLINE]
        assert second.cancelled == []
        assert second.call.deadline_ns > first.call.deadline_ns > 0
        second.reply(b"in time")
        assert client.answer(client.frames(), 3)[0] == message(b"in time")
        first.reply(b"late")
        assert client.frames() == []

    run(test)


def test_a_deadline_passes_while_the_request_is_still_coming() -> None:
    async def test() -> None:
        client = Client().open()
        client.send(headers(1, LATER, ("grpc-timeout", "5m")) + data(1, message(bytes(100))[:50], end=False))
        got = await client.written()
        assert client.answer(got, 1)[1]["grpc-status"] == "4"
        assert code(got[-1]) is Code.NO_ERROR

    run(test)


# -- flow control, what we send


def test_an_answer_keeps_to_the_windows_and_goes_on_as_they_grow() -> None:
    def test(client: Client) -> None:
        client.open(INITIAL_WINDOW_SIZE=10)
        body = bytes(range(100))
        got = client.send(call(1, ECHO, body))
        assert [(frame.kind, len(frame.payload)) for frame in got[1:]] == [("DATA", 10)]
        assert client.send(UPDATE(0, 1000)) == []
        got += client.send(UPDATE(1, 20))
        got += client.send(frames.settings(INITIAL_WINDOW_SIZE=40))
        got += client.send(frames.settings(INITIAL_WINDOW_SIZE=5))  # which takes 35 back
        assert client.send(UPDATE(1, 30)) == []
        got += client.send(UPDATE(1, 1000))
        sizes = [len(frame.payload) for frame in got if frame.kind == "DATA"]
        assert sizes == [10, 20, 30, 45]
        assert client.answer(got, 1) == (message(body), {
            ":status": "200", "content-type": "application/grpc", "grpc-status": "0"})  # fmt: skip

    on_loop(test)


def test_streams_share_the_connection_s_window_in_turn() -> None:
    def test(client: Client) -> None:
        client.open(INITIAL_WINDOW_SIZE=2**20)
        body = bytes(frames.DEFAULT_WINDOW)
        got = client.send(call(1, ECHO, body) + call(3, ECHO, body) + call(5, ECHO, b"small"))
        assert {frame.stream for frame in got if frame.kind == "DATA"} == {1}
        more = []
        for _ in range(40):
            more += client.send(UPDATE(0, 4000))
        assert {frame.stream for frame in more[:6] if frame.kind == "DATA"} == {1, 3, 5}
        got += more
        assert client.answer(got, 1)[0] == client.answer(got, 3)[0] == message(body)
        assert client.answer(got, 5)[0] == message(b"small")

    on_loop(test)


def test_frames_are_no_longer_than_the_client_allows() -> None:
    def test(client: Client) -> None:
        client.open(INITIAL_WINDOW_SIZE=2**20)
        got = client.send(UPDATE(0, 2**20) + call(1, ECHO, bytes(40000)))
        assert [len(frame.payload) for frame in got if frame.kind == "DATA"] == [16384, 16384, 7237]
        got = client.send(frames.settings(MAX_FRAME_SIZE=40000) + call(3, ECHO, bytes(39995)))
        assert [len(frame.payload) for frame in got if frame.kind == "DATA"] == [40000]

    on_loop(test)


def test_a_reset_takes_what_waits_out_of_the_way() -> None:
    def test(client: Client) -> None:
        client.open(INITIAL_WINDOW_SIZE=2**20)
        client.send(call(1, ECHO, bytes(100_000)))
        client.send(call(3, ECHO, b"behind"))
        got = client.send(frames.rst_stream(1, Code.CANCEL) + UPDATE(0, 11))
        assert client.answer(got, 3)[0] == message(b"behind")

    on_loop(test)


def test_nothing_is_written_while_the_transport_is_full_but_what_it_was_asked() -> None:
    def test(client: Client) -> None:
        client.open()
        client.connection.pause_writing()
        got = client.send(call(1, ECHO, b"later") + frame(frames.PING, 0, bytes(8)))
        assert [frame.kind for frame in got] == ["HEADERS", "PING"]
        client.connection.resume_writing()
        assert client.answer([*got, *client.frames()], 1)[0] == message(b"later")

    on_loop(test)


def test_a_client_that_asks_and_never_reads_is_dropped() -> None:
    async def test() -> None:
        client = Client(grpc_http2_max_ping_strikes=0).open()
        client.connection.pause_writing()
        got = client.send(1001 * frame(frames.PING, 0, bytes(8)))
        assert (got[-1].kind, code(got[-1])) == ("GOAWAY", Code.ENHANCE_YOUR_CALM)

    run(test)


# -- flow control, what we receive


def granted(got: list[Frame], stream: int) -> int:
    return sum(
        int.from_bytes(frame.payload, "big")
        for frame in got
        if frame.kind == "WINDOW_UPDATE" and frame.stream == stream
    )


def test_what_a_frame_has_announced_is_not_granted_again() -> None:
    def test(client: Client) -> None:
        whole = data(1, message(bytes(WINDOW * 3 // 4)), end=False)
        got = client.open().send(headers(1, ECHO) + whole[:1000])
        got += client.send(whole[1000:])
        assert granted(got, 1) == 0
        # Of a second frame more than the window holds, only what is beyond both.
        begun = data(3, message(bytes(2 * WINDOW))[: WINDOW // 2], end=False)
        assert granted(client.send(headers(3, ECHO) + begun[:1000]), 3) == WINDOW + 5

    on_loop(test)


def test_a_long_message_is_granted_its_length_at_once_and_no_more() -> None:
    def test(client: Client) -> None:
        client.open()
        size = 5 * WINDOW
        begun = message(bytes(size))[:1000]
        got = client.send(headers(1, ECHO) + data(1, begun, end=False))
        assert granted(got, 1) == size + 5 - WINDOW
        assert granted(got, 0) == 0

    on_loop(test)


def test_a_connection_s_window_is_returned_as_bytes_come() -> None:
    def test(client: Client) -> None:
        client.open()
        sent = received = 0
        for number in range(40):
            sent += MAX_FRAME
            part = data(1 + 2 * number, message(bytes(MAX_FRAME - 5)))
            received += granted(client.send(headers(1 + 2 * number, LATER) + part), 0)
            assert 0 <= sent - received <= CONNECTION_WINDOW
        assert received >= 40 * MAX_FRAME - CONNECTION_WINDOW // 2 - MAX_FRAME

    on_loop(test)


def test_padding_takes_nothing_from_a_message_s_window() -> None:
    def test(client: Client) -> None:
        whole = message(bytes(2 * WINDOW))
        got = client.open().send(headers(1, LATER))
        sent = 0
        for at in range(2000):
            sent += 257
            got += client.send(frame(frames.DATA, 1, b"\xff" + whole[at : at + 1] + bytes(255), frames.PADDED))
            assert WINDOW + granted(got, 1) - sent >= (len(whole) if at > 4 else 5) - at - 1

    on_loop(test)


# -- streams both ways


def test_a_stream_answers_as_messages_come_and_ends_after_the_half_close() -> None:
    async def test() -> None:
        client = Client().open()
        client.send(headers(1, CHAT) + headers(3, CHAT))
        client.send(data(1, message(b"a") + message(b"b")[:3], end=False) + data(3, message(b"x"), end=False))
        got = await client.written(2 * (9 + 20) + 2 * (9 + 7))
        assert client.fields(got[0])[":status"] == "200"
        assert {frame.stream: frame.payload for frame in got if frame.kind == "DATA"} == {
            1: message(b"aa"), 3: message(b"xx")}  # fmt: skip
        client.send(data(1, message(b"b")[3:]) + data(3, b""))
        await client.until(lambda: not client.connection._streams)
        got += client.frames()
        assert client.answer(got, 1)[0] == message(b"aa") + message(b"bb")
        assert client.answer(got, 3)[0] == message(b"xx")

    run(test)


def test_a_stream_waits_for_its_window_without_holding_up_others() -> None:
    async def test() -> None:
        client = Client().open(INITIAL_WINDOW_SIZE=1500)
        client.send(headers(1, TALK))
        await client.written(1500)
        for _ in range(20):
            await asyncio.sleep(0)
        assert client.frames() == []
        assert client.answer(client.send(call(3, ECHO, b"now")), 3)[0] == message(b"now")
        got = client.send(UPDATE(1, 1005))
        got += await client.written()
        assert sum(len(frame.payload) for frame in got if frame.kind == "DATA") == 1005
        client.send(frames.rst_stream(1, Code.CANCEL))
        await client.until(lambda: not client.connection._streams)

    run(test)


def test_a_client_may_send_as_much_as_the_stream_has_taken() -> None:
    async def test() -> None:
        client = Client().open(INITIAL_WINDOW_SIZE=2**31 - 1)
        client.send(UPDATE(0, 2**30) + headers(1, CHAT))
        one = message(bytes(100_000))
        sent, window, got = 0, WINDOW, list[Frame]()
        for _ in range(50):
            await client.until(lambda: _grow(client, got) + window - sent >= len(one))  # noqa: B023
            client.send(data(1, one, end=False))
            sent += len(one)
            _grow(client, got)
        client.send(data(1, b""))
        await client.until(lambda: not client.connection._streams)
        _grow(client, got)
        assert len(client.answer(got, 1)[0]) == 50 * 200_005

    def _grow(client: Client, got: list[Frame]) -> int:
        got += client.frames()
        return granted(got, 1)

    run(test)


def test_a_stream_that_takes_nothing_stops_its_client_at_the_window() -> None:
    async def test() -> None:
        client = Client().open(INITIAL_WINDOW_SIZE=0)
        client.send(headers(1, CHAT))
        got: list[Frame] = []
        one = message(bytes(1000))
        sent = 0
        while sent + len(one) <= WINDOW + granted(got, 1):
            got += client.send(data(1, one, end=False))
            sent += len(one)
            await asyncio.sleep(0)
        assert sent <= 2 * WINDOW
        assert code(client.send(data(1, one + one, end=False))[-1]) is Code.FLOW_CONTROL_ERROR

    run(test)


def test_a_stream_that_takes_nothing_stops_its_client_also_between_messages_longer_than_the_window() -> None:
    async def test() -> None:
        client = Client().open(INITIAL_WINDOW_SIZE=0)
        client.send(UPDATE(0, 2**30) + headers(1, CHAT))
        got: list[Frame] = []
        endless = message(bytes(2 * WINDOW)) * 8
        sent = before = 0
        while sent < len(endless):
            before, sent = sent, min(len(endless), WINDOW + granted(got, 1), sent + MAX_FRAME)
            if sent == before:
                break
            got += client.send(data(1, endless[before:sent], end=False))
            await asyncio.sleep(0)
        assert sent <= 3 * (2 * WINDOW + 5), "the one that was taken, one that waits, and one on its way"

    run(test)


def test_a_stream_s_faults_are_its_own() -> None:
    async def test() -> None:
        client = Client(grpc_max_message_size=100).open()
        client.send(headers(1, CHAT) + data(1, message(b"abc")[:6]))
        assert client.answer(await client.written(), 1)[1]["grpc-message"] == "the last message is not whole"
        client.send(headers(3, CHAT) + data(3, message(bytes(101))[:6], end=False))
        assert client.answer(await client.written(), 3)[1]["grpc-status"] == "8"
        client.send(headers(5, CHAT, ("grpc-encoding", "gzip")) + data(5, message(gzip.compress(b"z"), True)))
        await client.until(lambda: not client.connection._streams)
        assert client.answer(client.frames(), 5)[0] == message(b"zz")

    run(test)


def test_a_stream_s_deadline_ends_it() -> None:
    async def test() -> None:
        client = Client().open()
        client.send(headers(1, CHAT, ("grpc-timeout", "5m")))
        got = await client.written()
        assert client.answer(got, 1)[1]["grpc-status"] == "4"

    run(test)


# -- keeping and ending connections


def test_a_client_that_says_nothing_is_dropped() -> None:
    async def test() -> None:
        client = Client()
        opening = client.connection._timers["opening"]
        assert 0 < opening.when() - asyncio.get_running_loop().time() <= 20
        client.open()
        assert opening.cancelled()

    run(test)


def test_a_silent_client_is_pinged_and_dropped_unless_it_answers() -> None:
    async def test() -> None:
        client = Client(grpc_keepalive_time=5, grpc_keepalive_timeout=5).open()
        client.send(call(1, LATER, b""))
        [ping] = await client.written()
        assert (ping.kind, ping.flags) == ("PING", 0)
        client.send(frame(frames.PING, 0, ping.payload, frames.ACK))
        assert not client.wire.closed
        await client.written()
        await client.until(lambda: client.wire.aborted)

    run(test)


def test_a_silent_client_without_calls_is_pinged_only_where_that_is_asked_for() -> None:
    async def test() -> None:
        quiet = Client(grpc_keepalive_time=2, grpc_keepalive_timeout=2).open()
        asked = Client(grpc_keepalive_time=2, grpc_keepalive_timeout=2, grpc_keepalive_permit_without_calls=True).open()
        await asked.until(lambda: asked.wire.aborted)
        assert not quiet.wire.written

    run(test)


def test_answers_forgive_pings() -> None:
    def test(client: Client) -> None:
        client.open()
        for id in range(1, 40, 2):
            got = client.send(frame(frames.PING, 0, bytes(8)) + frame(frames.PING, 0, bytes(8)) + call(id, ECHO, b""))
            assert "GOAWAY" not in {frame.kind for frame in got}

    on_loop(test)


def test_draining_answers_what_runs_and_what_is_on_its_way_and_refuses_the_rest() -> None:
    async def test() -> None:
        client = Client().open()
        client.send(call(1, LATER, b"") + headers(3, TALK))
        client.connection.drain()
        await client.until(lambda: 3 not in client.connection._streams)
        got = client.frames()
        first = next(frame for frame in got if frame.kind == "GOAWAY")
        ping = next(frame for frame in got if frame.kind == "PING")
        assert struct.unpack(">II", first.payload) == (2**31 - 1, Code.NO_ERROR)
        assert client.answer(got, 3)[1]["grpc-status"] == "14"
        assert client.answer(client.send(call(5, ECHO, b"on its way")), 5)[0] == message(b"on its way")
        [last] = client.send(frame(frames.PING, 0, ping.payload, frames.ACK))
        assert struct.unpack(">II", last.payload) == (5, Code.NO_ERROR)
        [refused] = client.send(call(7, ECHO, b""))
        assert code(refused) is Code.REFUSED_STREAM
        assert not client.wire.closed
        client.waiting[0].reply(b"done")
        assert client.answer(client.frames(), 1)[0] == message(b"done")
        assert client.wire.closed

    run(test)


def test_a_drain_ends_without_an_answer_to_its_ping() -> None:
    async def test() -> None:
        client = Client().open()
        client.connection.drain()
        await client.until(lambda: client.wire.closed)
        assert [frame.kind for frame in client.frames()] == ["GOAWAY", "PING", "GOAWAY"]

    run(test)


def test_an_old_connection_is_drained_and_in_the_end_closed() -> None:
    async def test() -> None:
        client = Client(grpc_max_connection_age=5, grpc_max_connection_age_grace=5).open()
        client.send(call(1, LATER, b""))
        await client.until(lambda: client.wire.aborted)
        assert [frame.kind for frame in client.frames()] == ["GOAWAY", "PING"]

    run(test)


def test_stopping_answers_what_still_runs() -> None:
    async def test() -> None:
        client = Client().open()
        client.send(call(1, LATER, b"") + headers(3, CHAT))
        client.connection.drain()
        client.connection.stop()
        await client.until(lambda: client.wire.closed)
        got = client.frames()
        assert client.answer(got, 1)[1]["grpc-status"] == client.answer(got, 3)[1]["grpc-status"] == "14"

    run(test)


def test_nothing_is_written_once_the_connection_has_ended() -> None:
    async def test() -> None:
        client = Client().open()
        client.send(call(1, LATER, b"") + headers(3, CHAT) + frame(frames.PING, 1, bytes(8)))
        client.waiting[0].reply(b"late")
        client.connection.resume_writing()
        client.lose()
        assert client.frames() == []
        await client.until(lambda: len(asyncio.all_tasks()) == 2)  # this test and its limit

    run(test)


# -- header blocks that are known by their bytes


def test_a_known_block_means_what_it_meant_until_the_table_moves() -> None:
    def test(client: Client) -> None:
        client.open()
        encoder = hpack.Encoder()
        for id in range(1, 60, 2):
            path, number = (ECHO, "1") if id % 6 < 3 else (FAIL, "2")
            more = (("x-n", number), ("x-id", str(id // 10)))
            sent = encoder.encode(request_fields(path, *more))
            got = client.send(frame(frames.HEADERS, id, sent, 4) + data(id, message(b"%d" % id)))
            body, fields = client.answer(got, id)
            wanted = (message(b"%d" % id), "0") if path == ECHO else (b"", "3")
            assert (body, fields["grpc-status"]) == wanted

    on_loop(test)


# -- any frames at all


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 10), st.integers(0, 255), st.sampled_from([0, 1, 1, 3, 3, 5, 7, 2, 2**31 - 1]),
            st.one_of(
                st.binary(max_size=40),
                st.sampled_from([block(*request_fields(path)) for path in (ECHO, LATER, CHAT, "/x")]),
                st.sampled_from([message(b"hello"), message(b"z", True), bytes(4), bytes(8), b"\0\4\0\0\0\1"]),
            ),
        ),
        max_size=12,
    ),
    st.integers(1, 400),
)  # fmt: skip
def test_any_frames_are_answered_with_whole_frames_and_no_exception(
    sent: list[tuple[int, int, int, bytes]], piece: int
) -> None:
    async def test() -> None:
        client = Client()
        stream = OPEN + b"".join(frames.frame(kind, flags, id, payload) for kind, flags, id, payload in sent)
        for at in range(0, len(stream), piece):
            client.send(stream[at : at + piece])
            await asyncio.sleep(0)
        for waiting in client.waiting:
            waiting.reply(ServingError(Kind.INTERNAL, "over"))
        for _ in range(5):
            await asyncio.sleep(0)
        client.frames()
        client.lose()
        assert not client.connection._streams or client.connection._over
        await asyncio.sleep(0)

    run(test)
