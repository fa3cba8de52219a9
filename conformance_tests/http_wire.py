"""HTTP/1.1 written out by hand on a socket: what no library would send, and answers as they came."""

import json
import socket
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

LIMIT_S = 30.0  # on every send and receive: a server that hangs fails the test


class NoAnswerError(Exception):
    """The server closed the connection before an answer was complete."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One response. Names of headers are in lower case; `body` is without its chunk framing."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """The body as strict JSON: the literals NaN and Infinity, which RFC 8259 does not know, are refused."""
        return json.loads(self.body, parse_constant=_refuse)

    @property
    def error(self) -> str:
        """The text of an error, whose body the Open Inference Protocol makes an object with the string `error`."""
        try:
            text = self.json()["error"]
        except (ValueError, LookupError, TypeError) as error:
            raise AssertionError(f"no `error` in the body of status {self.status}: {self.body[:200]!r}") from error
        assert isinstance(text, str), text
        return text

    def inflated(self) -> bytes:
        """The body without its content encoding, gzip or zlib as the header says."""
        encoding = self.headers.get("content-encoding", "identity")
        window = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS, "identity": 0}[encoding]
        return zlib.decompress(self.body, window) if window else self.body


def _refuse(literal: str) -> float:
    raise ValueError(f"{literal} is no JSON")


class Connection:
    """One connection. Owned by one test at a time."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.scheme == "http", f"expected an http:// address, got {url}"
        self.host = parts.netloc
        self._socket = socket.create_connection((parts.hostname or "", parts.port or 80), LIMIT_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._reader = self._socket.makefile("rb")

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._reader.close()
        self._socket.close()

    def send(self, data: bytes) -> None:
        """Send bytes as they are. A server that has stopped reading is no error here: its answer may lie ready."""
        try:
            self._socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            return

    def head(self, method: str, path: str, headers: Mapping[str, str]) -> bytes:
        """Request line and headers, Host included."""
        lines = [f"{method} {path} HTTP/1.1", f"Host: {self.host}", *(f"{k}: {v}" for k, v in headers.items())]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

    def receive(self, *, bodiless: bool = False) -> Answer:
        """The next response; `bodiless` where it answers HEAD. Raises NoAnswerError if the connection ends first."""
        try:
            return self._receive(bodiless)
        except ConnectionError as error:
            raise NoAnswerError(str(error)) from error

    def _receive(self, bodiless: bool) -> Answer:
        status_line = self._line()
        version, status = status_line.split(" ", 2)[:2]
        assert version == "HTTP/1.1", status_line
        headers: dict[str, str] = {}
        while line := self._line():
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        if bodiless or status.startswith("1") or status in ("204", "304"):
            return Answer(int(status), headers, b"")
        if headers.get("transfer-encoding") == "chunked":
            return Answer(int(status), headers, self._chunks())
        if "content-length" in headers:
            return Answer(int(status), headers, self._exactly(int(headers["content-length"])))
        return Answer(int(status), headers, self._reader.read())  # RFC 9112, 6.3: until the connection closes

    def at_end(self) -> bool:
        """Wait for the server to close the connection. False if it sends something instead."""
        try:
            return self._reader.read(1) == b""
        except ConnectionError:
            return True

    def _line(self) -> str:
        line = self._reader.readline(1 << 16)
        if not line.endswith(b"\r\n"):
            raise NoAnswerError(f"the connection ended in {line!r}")
        return line[:-2].decode("latin-1")

    def _exactly(self, size: int) -> bytes:
        data = self._reader.read(size)
        if len(data) != size:
            raise NoAnswerError(f"the connection ended after {len(data)} of {size} bytes")
        return data

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self._line().partition(";")[0], 16):
            parts.append(self._exactly(size))
            assert self._line() == ""
        while self._line():
            pass  # trailers
        return b"".join(parts)


class HttpClient:
    """Requests to one server, each on a connection of its own unless a test opens one."""

    def __init__(self, url: str) -> None:
        self.url = url

    def connect(self) -> Connection:
        return Connection(self.url)

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """One exchange. Content-Length follows from `body`, unless `headers` name one."""
        fields = dict(headers or {})
        if body is not None and not {"content-length", "transfer-encoding"} & {name.lower() for name in fields}:
            fields["Content-Length"] = str(len(body))
        with self.connect() as connection:
            connection.send(connection.head(method, path, fields) + (body or b""))
            return connection.receive(bodiless=method == "HEAD")

    def get(self, path: str) -> Answer:
        return self.request("GET", path)

    def post(self, path: str, document: object = None, **headers: str) -> Answer:
        """POST of a JSON document, or of an empty body; header names are written with `_` for `-`."""
        body = b"" if document is None else encode(document)
        return self.request("POST", path, body, {name.replace("_", "-"): value for name, value in headers.items()})


def encode(document: object) -> bytes:
    """Compact UTF-8 JSON without the literals that are none."""
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
