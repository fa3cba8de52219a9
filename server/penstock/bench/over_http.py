"""HTTP/1.1 as a load needs it: one prebuilt request per connection, and of an answer only what tells good from bad."""

import asyncio
import json
from collections.abc import Callable
from contextlib import closing
from urllib.parse import quote, urlsplit

import httptools

from penstock.bench import cpu, payload
from penstock.bench.load import Done
from penstock.client.access import Headers
from penstock.client.over_http import HEADER_LENGTH, Http, encode
from penstock.client.transport import Metadata
from penstock.errors import Kind, ServingError
from penstock.messages import InferRequest

BUFFER_BYTES = 256 << 10
HEAD_BYTES = 8 << 10  # of an answer's beginning that stays readable until its end: for the text of an error
RECONNECT_WAIT_S = 0.05  # after a connection was refused, so that a server that is down is not hammered


class HttpTarget:
    """A server at a URL. Raises ServingError(INVALID) for one that is not http://HOST:PORT, with or without a path."""

    def __init__(self, url: str, binary: bool, headers: Headers = ()) -> None:
        self.address = url if "://" in url else f"http://{url}"
        parts = urlsplit(self.address)
        try:
            self._host, self._port = parts.hostname or "", parts.port or 80
        except ValueError:
            self._host = ""
        if parts.scheme != "http" or not self._host:
            raise ServingError(Kind.INVALID, f"--url expects http://HOST:PORT, got '{url}'")
        self._netloc, self._prefix = parts.netloc, parts.path.rstrip("/")
        self._binary = binary
        self._headers = headers

    def metadata(self, model: str, version: str) -> Metadata:
        with closing(Http(self.address, self._headers)) as client:
            return client.metadata(model, version)

    async def connect(self, request: InferRequest, count: int) -> list["HttpCarrier"]:
        data = self.written(request)
        carriers = [HttpCarrier(self._host, self._port, data) for _ in range(count)]
        try:
            for carrier in carriers:
                await carrier.open()
        except OSError as error:
            for carrier in carriers:
                await carrier.close()
            raise ServingError(Kind.UNAVAILABLE, f"cannot connect to {self.address}: {error}") from error
        return carriers

    def written(self, request: InferRequest) -> bytes:
        """All bytes of a request. Raises ServingError(INVALID) for data that the protocol cannot carry."""
        if self._binary:
            head, buffers = encode(request)
            kind = f"application/octet-stream\r\n{HEADER_LENGTH}: {len(head)}"
            body = b"".join([head, *buffers])
        else:
            kind = "application/json"
            body = payload.json_body(request)
        path = f"{self._prefix}/v2/models/{quote(request.model, safe='')}"
        if request.version:
            path += f"/versions/{quote(request.version, safe='')}"
        lines = (
            f"POST {path}/infer HTTP/1.1",
            f"Host: {self._netloc}",
            f"Content-Type: {kind}",
            f"Content-Length: {len(body)}",
            *(f"{name}: {value}" for name, value in self._headers),
        )
        return "\r\n".join((*lines, "", "")).encode() + body

    def server_pids(self) -> tuple[int, ...]:
        return cpu.listeners(self._host, self._port)

    async def close(self) -> None:
        """There is nothing but connections, which their carriers close."""


class HttpCarrier:
    """One connection, opened again when it is lost."""

    def __init__(self, host: str, port: int, request: bytes) -> None:
        self._host, self._port = host, port
        self._request = request
        self._wire: Wire | None = None
        self._opening: asyncio.Task[None] | None = None
        self._done: Done | None = None

    async def open(self) -> None:
        """Raises OSError."""
        loop = asyncio.get_running_loop()
        _, self._wire = await loop.create_connection(lambda: Wire(self._answered), self._host, self._port)

    def send(self, done: Done) -> None:
        self._done = done
        if self._wire is not None:
            self._wire.transport.write(self._request)
        else:
            self._opening = asyncio.create_task(self._reopen())

    async def _reopen(self) -> None:
        try:
            await self.open()
        except OSError as error:
            await asyncio.sleep(RECONNECT_WAIT_S)
            self._finish(f"cannot connect: {error}")
            return
        assert self._wire is not None
        self._wire.transport.write(self._request)

    def _answered(self, wire: "Wire", error: str, usable: bool) -> None:
        if wire is self._wire:
            if not usable:
                self._wire = None
            self._finish(error)

    def abort(self, reason: str) -> None:
        self._disconnect()
        self._finish(reason)

    async def close(self) -> None:
        self._done = None
        self._disconnect()

    def _disconnect(self) -> None:
        if self._opening is not None:
            self._opening.cancel()
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.transport.abort()

    def _finish(self, error: str) -> None:
        done, self._done = self._done, None
        if done is not None:
            done(error)


class Wire(asyncio.BufferedProtocol):
    """The answers on one connection: `answered(wire, error, usable)` once for each, and once when it is lost.

    `error` is "" for status 200. A connection that is not `usable` takes no further request. Nothing is copied but the
    text of an error: the beginning of an answer stays in the buffer, what follows is read over and over into its rest.
    """

    def __init__(self, answered: "Callable[[Wire, str, bool], None]") -> None:
        self._answered = answered
        self._parser = httptools.HttpResponseParser(self)
        self._buffer = memoryview(bytearray(BUFFER_BYTES))
        self._filled = 0  # bytes of the current answer that are still there
        self._complete = self._keeps = False
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport

    def get_buffer(self, _hint: int) -> memoryview:
        return self._buffer[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        end = self._filled + nbytes
        try:
            self._parser.feed_data(self._buffer[self._filled : end])
        except httptools.HttpParserError as error:
            self.transport.abort()
            self._answered(self, f"no HTTP answer: {error}", False)
            return
        self._filled = min(end, HEAD_BYTES)
        if self._complete:
            status = self._parser.get_status_code()
            error_text = "" if status == 200 else describe(status, body_of(bytes(self._buffer[: self._filled])))
            self._filled = 0
            self._complete = False
            if not self._keeps:
                self.transport.close()
            self._answered(self, error_text, self._keeps)

    def on_message_complete(self) -> None:
        """Called by the parser."""
        self._complete = True
        self._keeps = self._parser.should_keep_alive()

    def eof_received(self) -> None:
        """The transport closes itself."""

    def connection_lost(self, exc: Exception | None) -> None:
        self._answered(self, f"connection lost: {exc or 'the server closed it'}", False)


class _Body:
    """Collects a body for the parser that calls it."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []

    def on_body(self, body: bytes) -> None:
        self.parts.append(body)


def body_of(answer: bytes) -> bytes:
    """The body, or what there is of it, in the bytes of an answer."""
    body = _Body()
    httptools.HttpResponseParser(body).feed_data(answer)
    return b"".join(body.parts)


def describe(status: int, body: bytes) -> str:
    """An error on one line: its status and the protocol's text, or else the beginning of the body."""
    try:
        text = str(json.loads(body)["error"])
    except (ValueError, LookupError, TypeError):
        text = body[:200].decode(errors="replace")
    return f"{status} {' '.join(text.split())}".strip()
