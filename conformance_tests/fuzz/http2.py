"""HTTP/2 as a gRPC client writes it, frame by frame, with changed bytes. Frames: RFC 9113; header fields: RFC 7541."""

import gzip
from collections.abc import Iterator
from functools import cache
from random import Random

from conformance_tests.carriers import simple
from conformance_tests.fuzz.calls import message
from conformance_tests.fuzz.cases import Http2Case
from conformance_tests.fuzz.mutation import INFER, mutate

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 2, 3, 4, 6, 7, 8, 9
END_STREAM, END_HEADERS, PADDED = 1, 4, 8
POST, HTTP = b"\x83", b"\x86"  # of the static table


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def frames(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and payload of each whole frame."""
    while len(data) >= 9 + (size := int.from_bytes(data[:3], "big")) and len(data) >= 9:
        yield data[3], data[9 : 9 + size]
        data = data[9 + size :]


def _fields(path: str, *more: tuple[str, str]) -> bytes:
    """A block of header fields, none of them indexed or in Huffman's code but the first two."""
    pairs = (":path", path), (":authority", "fuzz"), ("content-type", "application/grpc"), ("te", "trailers"), *more
    return POST + HTTP + b"".join(b"\0" + _string(name) + _string(value) for name, value in pairs)


def _string(text: str) -> bytes:
    assert len(text) < 127, "one byte of length"
    return bytes([len(text)]) + text.encode()


def _body(content: bytes, compressed: bool = False) -> bytes:
    return bytes([compressed]) + len(content).to_bytes(4, "big") + content


@cache
def _connections() -> tuple[bytes, ...]:
    """What good clients send after the preface."""
    infer = message(simple("h2")).SerializeToString(deterministic=True)
    settings = frame(SETTINGS, 0, 0, b"\0\3\0\0\0\x64" + b"\0\4\0\1\0\0")
    head = frame(HEADERS, END_HEADERS, 1, _fields(INFER, ("grpc-timeout", "20S"), ("x-bin", "AAEC")))
    live = frame(HEADERS, END_HEADERS, 3, _fields("/inference.GRPCInferenceService/ServerLive"))
    packed = frame(HEADERS, END_HEADERS, 1, _fields(INFER, ("grpc-encoding", "gzip"), ("grpc-accept-encoding", "gzip")))
    block = _fields(INFER)
    split = frame(HEADERS, 0, 1, block[:20]) + frame(CONTINUATION, END_HEADERS, 1, block[20:])
    whole = frame(DATA, END_STREAM, 1, _body(infer))
    return (
        settings + head + whole,
        settings + packed + frame(DATA, END_STREAM, 1, _body(gzip.compress(infer, mtime=0), True)),
        settings + split + frame(DATA, 0, 1, _body(infer)[:30]) + frame(DATA, END_STREAM, 1, _body(infer)[30:]),
        settings + head + frame(DATA, END_STREAM | PADDED, 1, b"\4" + _body(infer) + bytes(4)),
        settings + head + live + frame(DATA, END_STREAM, 3, _body(b"")) + whole,
        settings + frame(PING, 0, 0, b"12345678") + frame(WINDOW_UPDATE, 0, 0, b"\0\x10\0\0") + head + whole,
        settings + head + frame(WINDOW_UPDATE, 0, 1, b"\0\0\0\1") + frame(RST_STREAM, 0, 1, b"\0\0\0\x08"),
        settings + frame(PRIORITY, 0, 1, bytes(5)) + head + whole + frame(GOAWAY, 0, 0, bytes(8)),
        settings + frame(SETTINGS, 1, 0, b"") + head + frame(DATA, END_STREAM, 1, _body(infer) + _body(infer)),
    )


def http2_bytes(random: Random) -> Http2Case:
    """A connection with changed bytes, seldom those of the preface."""
    good = random.choice(_connections())
    if random.randrange(20):
        return Http2Case(PREFACE + mutate(random, good, _connections()))
    return Http2Case(mutate(random, PREFACE + good, _connections()))
