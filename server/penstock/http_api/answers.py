"""An answer over HTTP: status, headers and body; and the one table from kinds of failure to statuses."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import orjson

from penstock.access import names, plain
from penstock.errors import Kind, ServingError

logger = logging.getLogger(__name__)

Headers: TypeAlias = list[tuple[bytes, bytes]]
Body: TypeAlias = Sequence[bytes | memoryview]
Answer: TypeAlias = tuple[int, Headers, Body]
Reply: TypeAlias = Callable[[int, Headers, Body], None]

STATUS: dict[Kind, int] = {
    Kind.INVALID: 400,
    Kind.UNAUTHENTICATED: 401,
    Kind.FORBIDDEN: 403,
    Kind.NOT_FOUND: 404,
    Kind.EXISTS: 400,
    Kind.TOO_LARGE: 413,
    Kind.LIMITED: 429,
    Kind.UNAVAILABLE: 503,
    Kind.TIMED_OUT: 503,
    Kind.DEADLINE: 504,
    Kind.CANCELLED: 499,
    Kind.UNSUPPORTED: 501,
    Kind.INTERNAL: 500,
}

# What an answer of some status says besides. Whatever is to be tried again may be so after a second.
BESIDES: dict[int, tuple[bytes, bytes]] = {
    401: (b"www-authenticate", b"Bearer"),  # RFC 9110, 11.6.1
    429: (b"retry-after", b"1"),
    503: (b"retry-after", b"1"),
}


def answer(status: int, body: Body, *besides: tuple[bytes, bytes], content_type: bytes = b"application/json") -> Answer:
    return status, headers(sum(map(len, body)), *besides, content_type=content_type), body


def headers(length: int, *besides: tuple[bytes, bytes], content_type: bytes = b"application/json") -> Headers:
    """Of an answer whose body has so many bytes."""
    return [(b"content-type", content_type), (b"content-length", b"%d" % length), *besides]


def dumped(status: int, value: Any) -> Answer:
    """`value` as JSON; bytes as they are."""
    return answer(status, [value if isinstance(value, bytes) else orjson.dumps(value)])


def failed(status: int, message: str, *headers: tuple[bytes, bytes]) -> Answer:
    return answer(status, [orjson.dumps({"error": message})], *headers)


def failure(error: Exception, id: str = "") -> Answer:
    """What a client is told of an exception. One that is no ServingError is logged in full under the request's id."""
    if not isinstance(error, ServingError):
        name = id or "<id_unknown>"
        logger.error("request %s failed", plain(name), exc_info=error, extra=names(id))
        return failed(500, f"[request id: {name}] internal error: {type(error).__name__}; the server's log says more")
    status = STATUS[error.kind]
    return failed(status, error.message, *([BESIDES[status]] if status in BESIDES else []))


NOT_FOUND = failed(404, "Not Found")
METHOD_NOT_ALLOWED = failed(405, "Method Not Allowed")
