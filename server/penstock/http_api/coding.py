"""Content codings: which one an answer gets, and both directions of it."""

import zlib
from collections.abc import Sequence

from penstock.errors import Kind, ServingError

IDENTITY = b"identity"
BLANKS = b" \t"
CODINGS = {b"gzip": 31, b"deflate": 15}  # zlib's window bits; `deflate` has zlib's frame, as RFC 9110 says
ANY_FRAME = 47  # gzip or zlib, whatever the data begin with: a body with the wrong label is read all the same
MOST_STREAMS = 32  # in a row; each costs a copy of all that follows it
LEVEL = 1  # on JSON numbers, level 6 takes six times as long for 3 % fewer bytes


def choose(accepted: bytes) -> bytes:
    """The coding with the highest weight in an Accept-Encoding header, the first among equals; else identity."""
    best, highest = IDENTITY, 0.0
    for item in accepted.split(b","):
        coding, *parameters = (part.strip(BLANKS) for part in item.split(b";"))
        try:
            weight = next((float(text[2:]) for text in parameters if text[:2].lower() == b"q="), 1.0)
        except ValueError:
            continue
        if weight > highest and (coding in CODINGS or coding == IDENTITY):
            best, highest = coding, weight
    return best


def compress(buffers: Sequence[bytes | memoryview], coding: bytes) -> bytes:
    compressor = zlib.compressobj(LEVEL, zlib.DEFLATED, CODINGS[coding])
    return b"".join([*map(compressor.compress, buffers), compressor.flush()])


def decompress(data: bytes | memoryview, limit_bytes: int) -> bytes:
    """The content of a gzip or zlib stream, or of MOST_STREAMS in a row. Inflates one byte too much at the most.

    Raises ServingError: INVALID for what is no such stream, TOO_LARGE.
    """
    if not data:
        raise ServingError(Kind.INVALID, "nothing to be decompressed")
    parts: list[bytes] = []
    left = limit_bytes + 1
    while data:
        if len(parts) == MOST_STREAMS:
            raise ServingError(
                Kind.INVALID, f"a compressed body may consist of {MOST_STREAMS} streams in a row, this one has more"
            )
        decompressor = zlib.decompressobj(ANY_FRAME)
        try:
            part = decompressor.decompress(data, left)
        except zlib.error:
            raise _inconsistent() from None
        left -= len(part)
        if not left:
            raise ServingError(
                Kind.TOO_LARGE,
                f"Decompressed data size exceeds the maximum allowed value of {limit_bytes} bytes. "
                "Use --http-max-input-size to increase the limit.",
            )
        if not decompressor.eof:
            raise _inconsistent()
        parts.append(part)
        data = decompressor.unused_data
    return b"".join(parts)


def _inconsistent() -> ServingError:
    """A new one each time: an exception keeps the frames that it was raised through, and so the body in them."""
    return ServingError(Kind.INVALID, "encountered inconsistent stream state during decompression")
