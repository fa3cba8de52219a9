"""HTTP/2 frames in bytes: their numbers, their faults, and writers of those that we send. RFC 9113, §4, §6 and §7."""

import struct
from enum import IntEnum

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEADER_BYTES = 9
# A frame's header: two bytes and one of length, type, flags, stream.
HEADER = struct.Struct(">HBBBI")

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)

END_STREAM = ACK = 0x1
END_HEADERS = 0x4
PADDED = 0x8
PRIORITIZED = 0x20

HEADER_TABLE_SIZE, ENABLE_PUSH, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE, MAX_HEADER_LIST_SIZE = (
    range(1, 7)
)

DEFAULT_WINDOW = 65_535  # bytes, of a stream and of a connection, until a SETTINGS or WINDOW_UPDATE says otherwise
LARGEST_WINDOW = 2**31 - 1
SMALLEST_FRAME_LIMIT, LARGEST_FRAME_LIMIT = 2**14, 2**24 - 1
LARGEST_ID = 2**31 - 1


class Code(IntEnum):
    """Why a stream or a connection ends. RFC 9113, §7."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    ENHANCE_YOUR_CALM = 11


class Fault(Exception):  # noqa: N818
    """The peer broke the protocol so that the connection must end: the code of the GOAWAY, and what was wrong."""

    def __init__(self, code: Code, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return HEADER.pack(len(payload) >> 8, len(payload) & 0xFF, kind, flags, stream) + payload


def settings(**values: int) -> bytes:
    """A SETTINGS frame, such as `settings(MAX_FRAME_SIZE=16384)`."""
    return frame(SETTINGS, 0, 0, b"".join(struct.pack(">HI", globals()[name], value) for name, value in values.items()))


def window_update(stream: int, bytes_more: int) -> bytes:
    return frame(WINDOW_UPDATE, 0, stream, bytes_more.to_bytes(4, "big"))


def rst_stream(stream: int, code: Code) -> bytes:
    return frame(RST_STREAM, 0, stream, code.to_bytes(4, "big"))


def goaway(last_stream: int, code: Code, text: str = "") -> bytes:
    return frame(GOAWAY, 0, 0, struct.pack(">II", last_stream, code) + text.encode())


SETTINGS_ACK = frame(SETTINGS, ACK, 0)
