"""One request as it goes over the wire, and its form in a file."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class HttpCase:
    """Bytes to send over a connection.

    `framed`: they are one whole request, so that exactly one answer is due. Otherwise nobody knows what they are, and
    they go over a connection of their own.
    """

    data: bytes
    framed: bool = True

    @property
    def bodiless(self) -> bool:
        """Whether the answer has no body, whatever its Content-Length says."""
        return self.data.lstrip(b"\r\n").startswith(b"HEAD ")


@dataclass(frozen=True, slots=True)
class GrpcCase:
    """One message, in bytes, for the method at `path`."""

    path: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Http2Case:
    """Bytes for the gRPC port, over a connection of their own: perhaps HTTP/2, perhaps not."""

    data: bytes


Case: TypeAlias = HttpCase | GrpcCase | Http2Case


def write(case: Case, file: Path) -> None:
    """A line of JSON that says how to send the bytes, then the bytes."""
    how: dict[str, object] = {}
    if isinstance(case, GrpcCase):
        how["path"] = case.path
    elif isinstance(case, HttpCase):
        how["framed"] = case.framed
    file.write_bytes(json.dumps(how).encode() + b"\n" + case.data)


def read(file: Path) -> Case:
    """The inverse of `write`."""
    line, _, data = file.read_bytes().partition(b"\n")
    how = json.loads(line)
    if "path" in how:
        return GrpcCase(how["path"], data)
    return HttpCase(data, how["framed"]) if "framed" in how else Http2Case(data)


def request(path: str, body: bytes, *headers: tuple[str, str], verb: str = "POST") -> HttpCase:
    """A request whose Content-Length is true."""
    return HttpCase(head(path, ("Content-Length", str(len(body))), *headers, verb=verb) + body)


def head(path: str, *headers: tuple[str, str], verb: str = "POST") -> bytes:
    """Request line and headers. Characters beyond Latin-1 go as UTF-8."""
    lines = [f"{verb} {path} HTTP/1.1", "Host: fuzz", *(f"{name}: {value}" for name, value in headers), "", ""]
    return b"\r\n".join(_octets(line) for line in lines)


def _octets(line: str) -> bytes:
    try:
        return line.encode("latin-1")
    except UnicodeEncodeError:
        return line.encode(errors="surrogatepass")
