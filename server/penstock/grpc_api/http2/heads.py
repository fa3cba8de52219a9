"""How gRPC says what it means in header fields: requests read, answers' blocks written. PROTOCOL-HTTP2 of gRPC."""

import base64
import binascii
import re
from collections.abc import Mapping, Sequence

from msgspec import Struct

from penstock.errors import Kind, ServingError
from penstock.grpc_api.calls import STATUS, details
from penstock.grpc_api.http2.fields import Field, literal
from penstock.grpc_api.http2.messages import ENCODINGS, IDENTITY
from penstock.grpc_api.methods import Row

OK = 0
# `:status 200` of the static table, and `content-type` as a literal that enters no table, its name from the static one.
HEADERS_BLOCK = b"\x88" + b"\x0f\x10\x10application/grpc"
NOT_POST = literal(b":status", b"405") + literal(b"allow", b"POST")
NOT_GRPC = literal(b":status", b"415")

UNIT_NS = {"H": 3_600_000_000_000, "M": 60_000_000_000, "S": 1_000_000_000, "m": 1_000_000, "u": 1_000, "n": 1}
PLAIN = re.compile(r"[\x20-\x24\x26-\x7E]*")  # what needs no percent-encoding
ESCAPED = [bytes((byte,)) if PLAIN.fullmatch(chr(byte)) else b"%%%02X" % byte for byte in range(256)]

PSEUDO = (":method", ":scheme", ":path", ":authority")
# Of HTTP/1 alone. RFC 9113, §8.2.2
OF_A_CONNECTION = frozenset({"connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade"})
# What is read here, and is no metadata of the call.
READ = frozenset({"te", "content-type", "content-length", "grpc-encoding", "grpc-accept-encoding"})


# What differs from call to call by its nature.
VARYING = frozenset({"grpc-timeout", "x-request-id", "traceparent", "tracestate"})
MAX_KNOWN = 16


class MalformedError(Exception):
    """A request that HTTP/2 itself forbids: its stream is reset. RFC 9113, §8.1.1"""


# and never changed: to freeze it costs a microsecond
class Head(Struct):
    """A request's header fields, understood. `refusal` is the block that answers a call which cannot be served."""

    row: Row | None = None
    metadata: tuple[tuple[str, str | bytes], ...] = ()
    timeout_ns: int = 0  # 0 means: none
    encoding: str = IDENTITY  # of compressed messages
    length: int = -1  # bytes of the body, where the client says so
    refusal: bytes = b""
    pseudo: int = 0  # how many fields of HTTP/2's own came first


class Heads:
    """Reads header fields. What most of a client's calls have in common is read once."""

    def __init__(self, methods: Mapping[str, Row]) -> None:
        self._methods = methods
        self._known: dict[tuple[Field, ...], Head] = {}  # by the fields that do not vary

    def read(self, fields: Sequence[Field]) -> Head:
        """Raises MalformedError."""
        fixed: list[Field] = []
        varying: list[Field] = []
        for field in fields:
            (varying if field[0] in VARYING else fixed).append(field)
        key = tuple(fixed)
        known = self._known.get(key)
        if known is None:
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            known = self._known[key] = _fixed_head(fixed, self._methods)
        if not varying:
            return known
        if fields.index(varying[0]) < known.pseudo:
            raise MalformedError("a pseudo-header out of place")
        if known.row is None:
            return known
        timeout = None
        for name, value in varying:
            if name == "grpc-timeout":
                timeout = value
        try:
            metadata = known.metadata + tuple([field for field in varying if field[0] != "grpc-timeout"])
            return Head(known.row, metadata, _timeout_ns(timeout), known.encoding, known.length, b"", known.pseudo)
        except ServingError as error:
            return Head(refusal=trailers_only(error))


def _fixed_head(fields: Sequence[Field], methods: Mapping[str, Row]) -> Head:
    """Of the fields that do not vary. Raises MalformedError."""
    pseudo, others = _split(fields)
    if pseudo[":method"] != "POST":
        return Head(refusal=NOT_POST)
    values = {name: value for name, value in others if name in READ}
    kind = values.get("content-type", "")
    if kind != "application/grpc" and not kind.startswith(("application/grpc+", "application/grpc;")):
        return Head(refusal=NOT_GRPC)
    if (length := values.get("content-length", "")) and not (length.isascii() and length.isdigit()):
        raise MalformedError(f"content-length {length!r}")
    row = methods.get(pseudo[":path"])
    encoding = values.get("grpc-encoding", IDENTITY)
    try:
        if row is None:
            return Head(refusal=HEADERS_BLOCK + status_block(STATUS[Kind.UNSUPPORTED]))
        if encoding not in ENCODINGS:
            known = ", ".join(ENCODINGS)
            error = ServingError(Kind.UNSUPPORTED, f"messages encoded with '{encoding}': expected one of {known}")
            return Head(refusal=trailers_only(error) + literal(b"grpc-accept-encoding", ",".join(ENCODINGS).encode()))
        return Head(row, _metadata(others), 0, encoding, int(length) if length else -1, pseudo=len(pseudo))
    except ServingError as error:
        return Head(refusal=trailers_only(error))


def check_trailers(fields: Sequence[Field]) -> None:
    """What a client sends behind its body means nothing to gRPC. Raises MalformedError."""
    if any(name.startswith(":") for name, _ in fields):
        raise MalformedError("a pseudo-header in trailers")


def trailers_only(error: ServingError) -> bytes:
    """The block that is an answer by itself: no message, only why."""
    return HEADERS_BLOCK + error_block(error)


def error_block(error: ServingError) -> bytes:
    """The block of trailers that tell of an error."""
    return status_block(STATUS[error.kind], details(error))


def status_block(status: int, message: str = "") -> bytes:
    block = literal(b"grpc-status", b"%d" % status)
    return block + literal(b"grpc-message", _percent_encoded(message)) if message else block


def _percent_encoded(message: str) -> bytes:
    if PLAIN.fullmatch(message):
        return message.encode("ascii")
    return b"".join([ESCAPED[byte] for byte in message.encode()])


def _split(fields: Sequence[Field]) -> tuple[dict[str, str], list[Field]]:
    """Pseudo-headers and the others, both as they must be. Raises MalformedError. RFC 9113, §8.2 and §8.3"""
    pseudo: dict[str, str] = {}
    others: list[Field] = []
    for field in fields:
        name, value = field
        if name[0] == ":":
            if name not in PSEUDO or name in pseudo or others:
                raise MalformedError(f"pseudo-header {name} is unknown, doubled or out of place")
            pseudo[name] = value
        elif name in OF_A_CONNECTION or (name == "te" and value != "trailers"):
            raise MalformedError(f"{name}: {value}")
        else:
            others.append(field)
    if not (pseudo.get(":method") and pseudo.get(":scheme") and pseudo.get(":path")):
        raise MalformedError("a request without method, scheme or path")
    return pseudo, others


def _timeout_ns(text: str | None) -> int:
    """Raises ServingError(INVALID)."""
    if text is None:
        return 0
    digits, unit_ns = text[:-1], UNIT_NS.get(text[-1:])
    if unit_ns is None or not 1 <= len(digits) <= 8 or not (digits.isascii() and digits.isdigit()):
        raise ServingError(Kind.INVALID, f"grpc-timeout expects up to 8 digits and one of HMSmun, got '{text}'")
    return int(digits) * unit_ns or 1


def _metadata(others: Sequence[Field]) -> tuple[tuple[str, str | bytes], ...]:
    """Raises ServingError(INVALID) where the value of a `-bin` key is not base64."""
    found: list[tuple[str, str | bytes]] = []
    for name, value in others:
        if name.endswith("-bin"):
            try:
                # Padding may be left out, and one field may hold several values.
                found += [(name, base64.b64decode(one + "=" * (-len(one) % 4), validate=True))
                          for one in map(str.strip, value.split(","))]  # fmt: skip
            except (binascii.Error, ValueError) as error:
                raise ServingError(Kind.INVALID, f"metadata '{name}' is not base64: {error}") from error
        elif name not in READ:
            found.append((name, value))
    return tuple(found)
