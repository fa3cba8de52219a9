"""gRPC's messages inside a stream's bytes: five bytes of prefix, then the message, perhaps compressed."""

import zlib
from collections import deque

import numpy as np

from penstock.errors import Kind, ServingError
from penstock.grpc_api.bodies import Body

PREFIX_BYTES = 5  # whether the message is compressed, and its length
IDENTITY = "identity"
# What a message may be encoded with, and how zlib calls its wrapping.
ENCODINGS: dict[str, int] = {IDENTITY: 0, "deflate": zlib.MAX_WBITS, "gzip": zlib.MAX_WBITS | 16}

Message = tuple[bool, Body]  # whether it is compressed, and its bytes
# A message of such a length gets its memory when it begins, so that the socket can be read right into it. What a client
# only claims must not cost much, so a longer one grows as it comes.
WHOLE_BYTES = 64 << 10, 64 << 20
LANDING_BYTES = 8 << 10  # fewer are not worth a system call of their own


class Assembler:
    """Puts together the messages of one direction of a stream."""

    __slots__ = ("_left", "_limit_bytes", "_parts", "_prefix", "_whole", "ready")

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._prefix = b""
        self._parts: list[Body] = []  # of a short message
        self._whole: memoryview | None = None  # a long one's memory
        self._left = -1  # bytes of the present message that have not come; -1 before its prefix is whole
        self.ready: deque[Message] = deque()

    @property
    def missing(self) -> int:
        """How many bytes must come before another message is whole, as far as is known."""
        return PREFIX_BYTES - len(self._prefix) if self._left < 0 else self._left

    @property
    def between(self) -> bool:
        """Whether the bytes that came end with a message."""
        return self._left < 0 and not self._prefix

    def feed(self, data: Body) -> None:
        """Take bytes; `data` must not change afterwards. Raises ServingError(TOO_LARGE) for a message over the limit"""
        at, end = 0, len(data)
        while at < end:
            if self._left < 0:
                more = PREFIX_BYTES - len(self._prefix)
                self._prefix += data[at : at + more]
                at += more
                if len(self._prefix) < PREFIX_BYTES:
                    return
                self._begin(int.from_bytes(self._prefix[1:], "big"))
            part = data[at : at + self._left]
            at += len(part)
            if self._whole is not None:
                self._room()[: len(part)] = part
            else:
                self._parts.append(part)
            self._came(len(part))

    def landing(self, most: int) -> memoryview | None:
        """Memory for up to `most` bytes that come next; None where they are better fed. Then `landed` counts them."""
        if self._whole is None or min(most, self._left) < LANDING_BYTES:
            return None
        return self._room()[:most]

    def landed(self, size: int) -> None:
        self._came(size)

    def _begin(self, size: int) -> None:
        if size > self._limit_bytes:
            raise ServingError(
                Kind.TOO_LARGE, f"SERVER: Received message larger than max ({size} vs. {self._limit_bytes})"
            )
        self._left = size
        if WHOLE_BYTES[0] < size <= WHOLE_BYTES[1]:
            self._whole = np.empty(size, np.uint8).data  # which, unlike a bytearray, is not filled with zeros

    def _room(self) -> memoryview:
        assert self._whole is not None
        return self._whole[len(self._whole) - self._left :]

    def _came(self, size: int) -> None:
        self._left -= size
        if not self._left:
            body = b"".join(self._parts) if self._whole is None else self._whole
            self.ready.append((self._prefix[0] & 1 == 1, body))
            self._prefix, self._parts, self._whole, self._left = b"", [], None, -1


def decompress(body: Body, encoding: str, limit_bytes: int) -> bytes:
    """The message. Raises ServingError: TOO_LARGE beyond the limit, INVALID where the bytes are no such encoding."""
    if encoding == IDENTITY:
        raise ServingError(Kind.INVALID, "a compressed message without grpc-encoding")
    engine = zlib.decompressobj(ENCODINGS[encoding])
    try:
        message = engine.decompress(body, limit_bytes + 1)
    except zlib.error as error:
        raise ServingError(Kind.INVALID, f"a message that is not {encoding}: {error}") from error
    if len(message) > limit_bytes:
        raise ServingError(Kind.TOO_LARGE, "Decompressed message larger than max")
    if not engine.eof or engine.unused_data:
        raise ServingError(Kind.INVALID, f"a message that is not {encoding}: it ends too early or too late")
    return message
