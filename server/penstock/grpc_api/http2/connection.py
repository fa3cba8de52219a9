"""One HTTP/2 connection: frames of many streams in from one read, frames of many streams out in one write. RFC 9113.

This is its receiving half; `outgoing` is the sending one, and `lifetime` knows when it ends.
"""

import asyncio
import logging
import struct
import time
from collections.abc import Callable, Mapping
from typing import cast

from penstock.errors import Kind, ServingError
from penstock.grpc_api.calls import Door, Unary
from penstock.grpc_api.http2 import frames
from penstock.grpc_api.http2.fields import Field, FieldReader
from penstock.grpc_api.http2.flow import CONNECTION_WINDOW, WINDOW, Allowance, PingGuard
from penstock.grpc_api.http2.frames import Code, Fault
from penstock.grpc_api.http2.heads import (
    Head,
    Heads,
    MalformedError,
    check_trailers,
    trailers_only,
)
from penstock.grpc_api.http2.lifetime import DRAIN_PING, Lifetime
from penstock.grpc_api.http2.outgoing import BULK_BYTES, JOIN_BYTES
from penstock.grpc_api.http2.streams import AnyCall, StreamCall, UnaryCall
from penstock.grpc_api.methods import Row
from penstock.settings import Settings

logger = logging.getLogger(__name__)

MAX_STREAMS = 1024  # open at a time on one connection
MAX_FRAME = 1 << 20  # bytes; grpcio's clients send no larger ones
MAX_FIELDS = 64 << 10  # bytes of a request's header fields, before and after HPACK, as `--http-max-header-size`
MAX_CONTINUATIONS = 16  # frames that one header block may be spread over
MAX_KNOWN_HEADS = 64
READ_BYTES = 64 << 10  # at a time, where it is not into a message's own memory; these are copied there
IDLE_PING_S = 7200.0  # between the PINGs of a client without calls that may not send them more often; as in grpcio

OPENING = frames.settings(
    MAX_CONCURRENT_STREAMS=MAX_STREAMS,
    INITIAL_WINDOW_SIZE=WINDOW,
    MAX_FRAME_SIZE=MAX_FRAME,
    MAX_HEADER_LIST_SIZE=MAX_FIELDS,
) + frames.window_update(0, CONNECTION_WINDOW - frames.DEFAULT_WINDOW)


class Connection(Lifetime, asyncio.BufferedProtocol):
    """A client's connection and its calls. Used on one event loop; reads and writes only through the transport."""

    def __init__(
        self, door: Door, settings: Settings, methods: Mapping[str, Row], closed: Callable[["Connection"], None]
    ) -> None:
        super().__init__(door, settings)
        self._on_closed = closed

        # reading
        self._buffer = memoryview(bytearray(READ_BYTES))
        self._landing: memoryview | None = None  # a message's memory that the socket is being read into
        self._rest = b""  # the beginning of a frame whose end has not come
        self._opened = False  # the preface has come
        self._settled = False  # the client's first SETTINGS have come
        self._credit = CONNECTION_WINDOW  # bytes that the client may send on all streams together
        self._body: AnyCall | None = None  # whose DATA frame is being read
        self._body_left = 0  # bytes of that frame
        self._body_end = False  # its END_STREAM
        self._skip = 0  # bytes to pass over: padding, unknown frames, DATA of streams that are over
        self._block: list[bytes] | None = None  # fragments of a header block that goes on
        self._block_id = 0
        self._block_end = False

        # header fields
        self._reader = FieldReader(MAX_FIELDS)
        self._known: dict[bytes, Head] = {}  # by their blocks, valid while the dynamic table stands still
        self._heads = Heads(methods)

        # the client's manners
        self._resets = Allowance(2000, 500)  # a busy client's deadlines may well pass so often
        self._idle_frames = Allowance(1000, 100)
        self._pings = PingGuard(
            settings.grpc_http2_min_recv_ping_interval_without_data / 1000,
            settings.grpc_http2_min_recv_ping_interval_without_data / 1000
            if settings.grpc_keepalive_permit_without_calls else IDLE_PING_S,
            settings.grpc_http2_max_ping_strikes,
        )  # fmt: skip

    # -- the transport's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class
        transport.set_write_buffer_limits(BULK_BYTES)
        transport.write(OPENING)
        self._begin_life()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._over = True
        for timer in self._timers.values():
            timer.cancel()
        streams, self._streams = self._streams, {}
        self._ready.clear()
        for stream in streams.values():
            stream.cancel()
        self._on_closed(self)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002
        """Where the socket is read into: a long message's own memory while its frame goes on, else a buffer."""
        self._landing = self._body.landing(self._body_left) if self._body is not None and self._body_left else None
        return self._landing or self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._landing is None:
            self.data_received(bytes(self._buffer[:nbytes]))
            return
        self._heard = True
        self._landing = None
        stream = self._body
        assert stream is not None
        self._body_left -= nbytes
        last = self._body_end and not self._body_left
        if stream.id in self._streams and not self._over:
            stream.ended = last
            if not stream.landed(nbytes, last):
                self._reset(stream.id, Code.PROTOCOL_ERROR)
        self._flush()

    def data_received(self, data: bytes) -> None:
        """Act on bytes, and answer."""
        self._heard = True
        if self._over:
            return
        if self._rest:
            data = self._rest + data
            self._rest = b""
        self._reading = True
        try:
            at = self._parse(data)
            if at < len(data):
                self._rest = data[at:]
            if self._credit < CONNECTION_WINDOW // 2:
                self._out.append(frames.window_update(0, CONNECTION_WINDOW - self._credit))
                self._credit = CONNECTION_WINDOW
        except Fault as fault:
            self._fail(fault)
        finally:
            self._reading = False
        if self._new_deadlines:
            self._arm()
        self._flush()

    # -- frames in

    def _parse(self, data: bytes) -> int:
        """Act on every whole frame, and on DATA as far as it came; returns where the rest begins. Raises Fault."""
        at, size = 0, len(data)
        if not self._opened:
            start = data[: len(frames.PREFACE)]
            if not frames.PREFACE.startswith(start):
                raise Fault(Code.PROTOCOL_ERROR, "this port speaks gRPC: HTTP/2 with prior knowledge")
            if len(start) < len(frames.PREFACE):
                return 0
            at, self._opened = len(start), True
        while not self._over:
            if self._body_left:
                at = self._read_body(data, at, size)
            if self._skip:
                passed = min(self._skip, size - at)
                self._skip -= passed
                at += passed
            if size - at < frames.HEADER_BYTES:
                break
            high, low, kind, flags, id = frames.HEADER.unpack_from(data, at)
            length = high << 8 | low
            id &= frames.LARGEST_ID
            if self._block is not None and (kind != frames.CONTINUATION or id != self._block_id):
                raise Fault(Code.PROTOCOL_ERROR, "a header block that another frame interrupts")
            if not self._settled and kind != frames.SETTINGS:
                raise Fault(Code.PROTOCOL_ERROR, "SETTINGS must come first")
            begin = at + frames.HEADER_BYTES
            if kind == frames.DATA:
                if flags & frames.PADDED and begin == size and length:
                    break  # how long the padding is must have come as well
                at = self._data(data, begin, length, flags, id)
                continue
            if kind > frames.CONTINUATION:  # unknown ones are passed over: RFC 9113, §5.5
                self._count_idle()
                at, self._skip = begin, self._checked(length)
                continue
            if length > MAX_FIELDS:
                self._checked(length)
                raise Fault(Code.ENHANCE_YOUR_CALM, f"a frame of {length} bytes beside DATA, {MAX_FIELDS} are allowed")
            end = begin + length
            if end > size:
                break
            if kind == frames.HEADERS:
                self._headers(id, flags, data[begin:end])
            else:
                FRAMES[kind](self, id, flags, data[begin:end])
            at = end
        return at

    def _checked(self, length: int) -> int:
        if length > MAX_FRAME:
            raise Fault(Code.FRAME_SIZE_ERROR, f"a frame of {length} bytes, {MAX_FRAME} are allowed")
        return length

    def _data(self, data: bytes, at: int, length: int, flags: int, id: int) -> int:
        """Begin a DATA frame whose payload starts at `at`; returns where reading goes on."""
        if length > MAX_FRAME:
            self._checked(length)
        padding = 0
        end = bool(flags & frames.END_STREAM)
        self._credit -= length
        if self._credit < 0:
            raise Fault(Code.FLOW_CONTROL_ERROR, "more bytes than the connection's window")
        size = length
        if flags & frames.PADDED:
            padding = data[at] if length else 0
            if padding >= length:
                raise Fault(Code.PROTOCOL_ERROR, "padding that fills its frame")
            size = length - 1 - padding
            at += 1
        if not size and not end:
            self._count_idle()
        stream = self._streams.get(id)
        if stream is None or stream.ended:
            self._late_data(id, end)
            self._skip = size + padding
            return at
        stream.credit -= length
        if stream.credit < 0:
            self._reset(id, Code.FLOW_CONTROL_ERROR)
            self._skip = size + padding
            return at
        self._skip = padding
        self._body, self._body_left, self._body_end = stream, size, end
        return at if size else self._read_body(data, at, at)

    def _read_body(self, data: bytes, at: int, size: int) -> int:
        """Hand on what has come of a DATA frame's content."""
        stream = self._body
        assert stream is not None
        end = min(at + self._body_left, size)
        self._body_left -= end - at
        last = self._body_end and not self._body_left
        if stream.id in self._streams:  # else it ended in the middle of the frame
            stream.ended = last
            # What is long stays where it is until the message is put together.
            part = data[at:end] if end - at < JOIN_BYTES else memoryview(data)[at:end]
            if not stream.data(part, last):
                self._reset(stream.id, Code.PROTOCOL_ERROR)
        return end

    def coming(self, call: AnyCall) -> int:
        """Bytes of this call's DATA frame that has begun: they are on their way, and taken off its window already."""
        return self._body_left if self._body is call else 0

    def _late_data(self, id: int, end: bool) -> None:
        """DATA on a stream that takes none."""
        if not id or id > self._last_id:
            raise Fault(Code.PROTOCOL_ERROR, f"DATA on stream {id}, which is not open")
        if id in self._given_up:
            if end:
                del self._given_up[id]
        else:
            self._count_idle()
            self._reset(id, Code.STREAM_CLOSED)

    def _headers(self, id: int, flags: int, payload: bytes) -> None:
        if not id & 1:
            raise Fault(Code.PROTOCOL_ERROR, f"HEADERS on stream {id}")
        begin, end = 0, len(payload)
        if flags & frames.PADDED:
            begin, end = 1, end - (payload[0] if payload else 0)
        if flags & frames.PRIORITIZED:
            begin += 5
        if begin > end:
            raise Fault(Code.PROTOCOL_ERROR, "HEADERS shorter than what they announce")
        block = payload[begin:end]
        if flags & frames.END_HEADERS:
            self._request(id, block, bool(flags & frames.END_STREAM))
        else:
            self._block, self._block_id, self._block_end = [block], id, bool(flags & frames.END_STREAM)

    def _continuation(self, id: int, flags: int, payload: bytes) -> None:
        if self._block is None:
            raise Fault(Code.PROTOCOL_ERROR, "CONTINUATION of nothing")
        self._block.append(payload)
        if len(self._block) > MAX_CONTINUATIONS or sum(map(len, self._block)) > MAX_FIELDS:
            raise Fault(Code.ENHANCE_YOUR_CALM, f"a header block over {MAX_FIELDS} bytes or {MAX_CONTINUATIONS} frames")
        if flags & frames.END_HEADERS:
            block, self._block = b"".join(self._block), None
            self._request(id, block, self._block_end)

    def _request(self, id: int, block: bytes, end: bool) -> None:
        """A whole header block: a request, or a request's trailers."""
        stream = self._streams.get(id)
        if stream is not None or id <= self._last_id:
            self._trailers(id, stream, block, end)
            return
        self._last_id = id
        head = self._known.get(block)
        if head is None:
            try:
                head = self._read_head(block)
            except MalformedError as error:
                logger.debug("stream %d is malformed: %s", id, error)
                self._reset(id, Code.PROTOCOL_ERROR)
                return
        row = head.row
        if self._refusing or len(self._streams) >= MAX_STREAMS:
            self._count_reset()
            self._reset(id, Code.REFUSED_STREAM)
        elif row is None:
            self._refuse(id, head.refusal, end)
        else:
            if isinstance(row, Unary):
                stream = UnaryCall(self, id, head, self._stream_window, row)
            else:
                stream = StreamCall(self, id, head, self._stream_window, row)
            self._streams[id] = stream
            if head.timeout_ns:
                stream.call.deadline_ns = time.monotonic_ns() + head.timeout_ns
                self._new_deadlines.append(stream)
            if end:
                stream.ended = True
                if not stream.data(b"", True):
                    self._reset(id, Code.PROTOCOL_ERROR)

    def _read_head(self, block: bytes) -> Head:
        """Raises MalformedError, and Fault."""
        before = self._reader.changes
        fields = self._fields(block)
        if fields is None:
            error = ServingError(Kind.TOO_LARGE, f"a request's header fields may have {MAX_FIELDS} bytes")
            return Head(refusal=trailers_only(error))
        head = self._heads.read(fields)
        if self._reader.changes == before:
            if len(self._known) >= MAX_KNOWN_HEADS:
                self._known.clear()
            self._known[block] = head
        return head

    def _fields(self, block: bytes) -> list[Field] | None:
        """None where there are too many. Raises Fault."""
        before = self._reader.changes
        fields = self._reader.read(block)
        if self._reader.changes != before:
            self._known.clear()  # by another table, the blocks may mean something else
        return fields

    def _trailers(self, id: int, stream: AnyCall | None, block: bytes, end: bool) -> None:
        fields = self._fields(block)  # in any case, for the table's sake
        if stream is None:
            if id not in self._given_up:
                raise Fault(Code.STREAM_CLOSED, f"HEADERS on stream {id}, which is over")
            if end:
                del self._given_up[id]
            return
        if stream.ended:
            self._reset(id, Code.STREAM_CLOSED)
            return
        try:
            if not end:
                raise MalformedError("a second request")
            check_trailers(fields or ())
        except MalformedError as error:
            logger.debug("stream %d is malformed: %s", id, error)
            self._reset(id, Code.PROTOCOL_ERROR)
            return
        stream.ended = True
        if not stream.data(b"", True):
            self._reset(id, Code.PROTOCOL_ERROR)

    def _priority(self, id: int, flags: int, payload: bytes) -> None:  # noqa: ARG002
        """Means nothing any more: RFC 9113, §5.3.2"""
        self._count_idle()
        if not id:
            raise Fault(Code.PROTOCOL_ERROR, "PRIORITY on stream 0")
        if len(payload) != 5:
            raise Fault(Code.FRAME_SIZE_ERROR, "PRIORITY that is not 5 bytes long")

    def _rst_stream(self, id: int, flags: int, payload: bytes) -> None:  # noqa: ARG002
        _sized("RST_STREAM", payload, 4)
        if not id or id > self._last_id:
            raise Fault(Code.PROTOCOL_ERROR, f"RST_STREAM on stream {id}, which is not open")
        self._given_up.pop(id, None)
        self._count_reset()
        stream = self._streams.get(id)
        if stream is not None:
            self._forget(stream)
            stream.cancel()

    def _settings_frame(self, id: int, flags: int, payload: bytes) -> None:
        if id:
            raise Fault(Code.PROTOCOL_ERROR, f"SETTINGS on stream {id}")
        if flags & frames.ACK:
            _sized("SETTINGS with ACK", payload, 0)
            return
        if len(payload) % 6:
            raise Fault(Code.FRAME_SIZE_ERROR, "SETTINGS that are no multiple of 6 bytes long")
        self._count_idle()
        for key, value in struct.iter_unpack(">HI", payload):
            self._set(key, value)
        if not self._settled:
            self._settled = True
            self._timers.pop("opening").cancel()
        self._chore(frames.SETTINGS_ACK)
        self._pump()

    def _set(self, key: int, value: int) -> None:
        if key == frames.INITIAL_WINDOW_SIZE:
            if value > frames.LARGEST_WINDOW:
                raise Fault(Code.FLOW_CONTROL_ERROR, f"an initial window of {value} bytes")
            more = value - self._stream_window
            self._stream_window = value
            for stream in self._streams.values():  # of those that are open too, which may fall below 0
                stream.window += more
                if stream.window > frames.LARGEST_WINDOW:
                    raise Fault(Code.FLOW_CONTROL_ERROR, "an initial window that makes a stream's too large")
                self._queue(stream)
        elif key == frames.MAX_FRAME_SIZE:
            if not frames.SMALLEST_FRAME_LIMIT <= value <= frames.LARGEST_FRAME_LIMIT:
                raise Fault(Code.PROTOCOL_ERROR, f"a frame limit of {value} bytes")
            self._frame_limit = value
        elif key == frames.ENABLE_PUSH and value > 1:
            raise Fault(Code.PROTOCOL_ERROR, f"ENABLE_PUSH {value}")
        # We push nothing, open no streams, use no dynamic table and send few header fields: the others bind us to
        # nothing, and unknown ones are passed over.

    def _push_promise(self, id: int, flags: int, payload: bytes) -> None:  # noqa: ARG002
        raise Fault(Code.PROTOCOL_ERROR, "PUSH_PROMISE from a client")

    def _ping(self, id: int, flags: int, payload: bytes) -> None:
        _sized("PING", payload, 8)
        if id:
            raise Fault(Code.PROTOCOL_ERROR, f"PING on stream {id}")
        if flags & frames.ACK:
            if self._draining and payload == DRAIN_PING:
                self._refuse_more()
            return
        if self._spoke:
            self._spoke = False
            self._pings.forgive()
        if self._pings.too_many(self.loop.time(), not self._streams):
            raise Fault(Code.ENHANCE_YOUR_CALM, "too_many_pings")
        self._chore(frames.frame(frames.PING, frames.ACK, 0, payload))

    def _goaway(self, id: int, flags: int, payload: bytes) -> None:  # noqa: ARG002
        if id:
            raise Fault(Code.PROTOCOL_ERROR, f"GOAWAY on stream {id}")
        if len(payload) < 8:
            raise Fault(Code.FRAME_SIZE_ERROR, "GOAWAY of less than 8 bytes")
        # The client opens no more streams; those that are open are answered, and the client closes.

    def _window_update(self, id: int, flags: int, payload: bytes) -> None:  # noqa: ARG002
        if len(payload) != 4:
            _sized("WINDOW_UPDATE", payload, 4)
        more = int.from_bytes(payload, "big") & frames.LARGEST_WINDOW
        if not id:
            self._window += more
            if not more or self._window > frames.LARGEST_WINDOW:
                raise Fault(
                    Code.FLOW_CONTROL_ERROR if more else Code.PROTOCOL_ERROR, f"a connection's window grown by {more}"
                )
            if self._ready:
                self._pump()
            return
        if id > self._last_id:
            raise Fault(Code.PROTOCOL_ERROR, f"WINDOW_UPDATE on stream {id}, which is not open")
        stream = self._streams.get(id)
        if stream is None:
            return  # over meanwhile
        stream.window += more
        if not more or stream.window > frames.LARGEST_WINDOW:
            self._reset(id, Code.FLOW_CONTROL_ERROR if more else Code.PROTOCOL_ERROR)
            return
        if stream.out:
            self._queue(stream)
            self._pump()

    def _count_reset(self) -> None:
        """Streams that are opened and thrown away cost the client less than us."""
        if not self._resets.take(self.loop.time()):
            raise Fault(Code.ENHANCE_YOUR_CALM, "too many streams were reset")

    def _count_idle(self) -> None:
        if not self._idle_frames.take(self.loop.time()):
            raise Fault(Code.ENHANCE_YOUR_CALM, "too many frames that carry nothing")


def _sized(name: str, payload: bytes, size: int) -> None:
    if len(payload) != size:
        raise Fault(Code.FRAME_SIZE_ERROR, f"{name} that is not {size} bytes long")


FRAMES: dict[int, Callable[[Connection, int, int, bytes], None]] = {
    frames.PRIORITY: Connection._priority,
    frames.RST_STREAM: Connection._rst_stream,
    frames.SETTINGS: Connection._settings_frame,
    frames.PUSH_PROMISE: Connection._push_promise,
    frames.PING: Connection._ping,
    frames.GOAWAY: Connection._goaway,
    frames.WINDOW_UPDATE: Connection._window_update,
    frames.CONTINUATION: Connection._continuation,
}
