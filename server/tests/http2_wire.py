"""A client of HTTP/2 made of bytes: frames written out and taken apart, and a connection without a socket."""

import asyncio
import functools
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import hpack
from penstock.auth import Category
from penstock.engine import Engine
from penstock.errors import Kind, ServingError
from penstock.grpc_api import Call, Door, Stream, Unary
from penstock.grpc_api.http2 import frames
from penstock.grpc_api.http2.connection import OPENING, Connection
from penstock.grpc_api.methods import Row
from penstock.settings import Settings

LIMIT_S = 20.0
NAMES = ("DATA", "HEADERS", "PRIORITY", "RST_STREAM", "SETTINGS", "PUSH_PROMISE", "PING", "GOAWAY", "WINDOW_UPDATE",
         "CONTINUATION")  # fmt: skip
ECHO, LATER, CHAT, FAIL, TALK = "/t/Echo", "/t/Later", "/t/Chat", "/t/Fail", "/t/Talk"


@dataclass(frozen=True, slots=True)
class Frame:
    kind: str
    stream: int
    flags: int = 0
    payload: bytes = b""

    @property
    def ends(self) -> bool:
        return self.kind in ("DATA", "HEADERS") and bool(self.flags & frames.END_STREAM)


def split(data: bytes) -> list[Frame]:
    """Whole frames only."""
    found, at = [], 0
    while at < len(data):
        high, low, kind, flags, stream = frames.HEADER.unpack_from(data, at)
        end = at + 9 + (high << 8 | low)
        assert end <= len(data), "half a frame was written"
        found.append(Frame(NAMES[kind], stream, flags, data[at + 9 : end]))
        at = end
    return found


def message(body: bytes, compressed: bool = False) -> bytes:
    return bytes((compressed,)) + len(body).to_bytes(4, "big") + body


def request_fields(path: str, *more: tuple[str, str]) -> list[tuple[str, str]]:
    return [
        (":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "t"),
        ("te", "trailers"), ("content-type", "application/grpc"), *more,
    ]  # fmt: skip


def block(*fields: tuple[str, str]) -> bytes:
    """Fields as literals that enter no table."""
    return b"".join(
        b"\0" + hpack.hpack.encode_integer(len(name), 7) + name.encode() + hpack.hpack.encode_integer(len(value), 7)
        + value.encode("latin-1") for name, value in fields
    )  # fmt: skip


def headers(stream: int, path: str, *more: tuple[str, str], flags: int = frames.END_HEADERS) -> bytes:
    return frames.frame(frames.HEADERS, flags, stream, block(*request_fields(path, *more)))


def data(stream: int, payload: bytes, end: bool = True) -> bytes:
    return frames.frame(frames.DATA, frames.END_STREAM if end else 0, stream, payload)


def call(stream: int, path: str, body: bytes, *more: tuple[str, str]) -> bytes:
    """A whole unary call."""
    return headers(stream, path, *more) + data(stream, message(body))


OPEN = frames.PREFACE + frames.settings()


class Wire(asyncio.Transport):
    """What a connection writes to. `full` makes it ask for a pause."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.writes = 0
        self.closed = False
        self.aborted = False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """It holds everything."""

    def write(self, data: Any) -> None:
        assert not self.closed
        self.written += data
        self.writes += 1

    def writelines(self, list_of_data: Any) -> None:
        self.write(b"".join(list_of_data))

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = self.aborted = True

    def is_closing(self) -> bool:
        return self.closed


@dataclass(slots=True)
class Waiting:
    """A call to LATER that has not been answered: what it can be told, and what it was."""

    body: bytes
    call: Call
    reply: Callable[[Any], None]
    cancelled: list[ServingError] = field(default_factory=list)

    def cancel(self, reason: ServingError) -> None:
        self.cancelled.append(reason)


class Client:
    """Feeds a connection and reads what it wrote. Use inside a running loop."""

    def __init__(self, **options: Any) -> None:
        self.waiting: list[Waiting] = []
        settings = Settings(grpc_transport="native", **options)
        self.door = Door(Engine(settings))
        self.wire = Wire()
        self.gone = False
        self.connection = Connection(self.door, settings, self.methods(), self._closed)
        self.connection.connection_made(self.wire)
        self.decoder = hpack.Decoder()
        assert self.take(raw=True) == OPENING

    def methods(self) -> Mapping[str, Row]:
        rows: tuple[Row, ...] = (
            Unary(ECHO, bytes, bytes, lambda door, body, call, reply: reply(body), Category.HEALTH),
            Unary(LATER, bytes, bytes, self._later, Category.HEALTH),
            Unary(FAIL, bytes, bytes, _fail, Category.HEALTH),
            Stream(CHAT, bytes, bytes, _chat, Category.HEALTH, drains=True),
            Stream(TALK, bytes, bytes, functools.partial(_talk, b"x"), Category.HEALTH, drains=False),
        )
        return {row.path: row for row in rows}

    def open(self, **settings: int) -> "Client":
        """Say the preface and settle."""
        assert self.send(frames.PREFACE + frames.settings(**settings)) == [Frame("SETTINGS", 0, frames.ACK)]
        return self

    def send(self, sent: bytes) -> list[Frame]:
        """What the connection answers to bytes, at once."""
        self.connection.data_received(sent)
        return self.frames()

    def frames(self) -> list[Frame]:
        return split(self.take())

    def take(self, raw: bool = False) -> bytes:
        taken = bytes(self.wire.written)
        self.wire.written.clear()
        return taken

    def fields(self, frame: Frame) -> dict[str, str]:
        return {str(name): str(value) for name, value in self.decoder.decode(frame.payload)}

    def answer(self, got: list[Frame], stream: int) -> tuple[bytes, dict[str, str]]:
        """A stream's messages and its trailers, out of all frames."""
        mine = [frame for frame in got if frame.stream == stream and frame.kind in ("HEADERS", "DATA")]
        assert mine[-1].ends
        body = b"".join(frame.payload for frame in mine if frame.kind == "DATA")
        fields: dict[str, str] = {}
        for frame in mine:
            if frame.kind == "HEADERS":
                fields.update(self.fields(frame))
        return body, fields

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(LIMIT_S):
            while not holds():  # noqa: ASYNC110 - what is waited for has no event, and there is a limit
                await asyncio.sleep(0)

    async def written(self, size: int = 1) -> list[Frame]:
        """Frames, once so many bytes have been written."""
        await self.until(lambda: len(self.wire.written) >= size)
        return self.frames()

    def lose(self) -> None:
        self.connection.connection_lost(None)

    def _later(self, door: Door, body: bytes, call: Call, reply: Callable[[Any], None]) -> Waiting:
        waiting = Waiting(body, call, reply)
        self.waiting.append(waiting)
        return waiting

    def _closed(self, connection: Connection) -> None:
        self.gone = True


def _fail(door: Door, body: bytes, call: Call, reply: Callable[[Any], None]) -> None:
    raise ServingError(Kind.INVALID, body.decode())


async def _chat(door: Door, messages: AsyncIterator[bytes], call: Call) -> AsyncGenerator[bytes, None]:
    """Every message back, doubled."""
    async for body in messages:
        yield body * 2


async def _talk(body: bytes, door: Door, messages: AsyncIterator[bytes], call: Call) -> AsyncGenerator[bytes, None]:
    """Without an end, as fast as it may."""
    while True:
        yield body * 1000
        await asyncio.sleep(0)


def code(frame: Frame) -> frames.Code:
    """Of a RST_STREAM or GOAWAY."""
    return frames.Code(struct.unpack(">I", frame.payload[-4:] if frame.kind == "RST_STREAM" else frame.payload[4:8])[0])
