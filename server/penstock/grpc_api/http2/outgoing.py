"""The sending half of an HTTP/2 connection: what calls answer, within the peer's windows. RFC 9113, §5.2 and §6.9."""

import asyncio
import logging
import struct

from penstock.errors import ServingError
from penstock.grpc_api import bodies
from penstock.grpc_api.bodies import Body, Encoded
from penstock.grpc_api.calls import Door
from penstock.grpc_api.http2 import frames
from penstock.grpc_api.http2.frames import Code, Fault
from penstock.grpc_api.http2.heads import HEADERS_BLOCK, OK, error_block, status_block
from penstock.grpc_api.http2.messages import PREFIX_BYTES
from penstock.grpc_api.http2.streams import AnyCall, UnaryCall

logger = logging.getLogger(__name__)

MAX_GIVEN_UP = 256  # streams that we ended first, on which frames may still come
MAX_UNSENT_CHORES = 1000  # answers to PING and SETTINGS, while the client does not read
TURN_BYTES = 256 << 10  # that one stream may send before it is another's turn
BULK_BYTES = 1 << 20  # that gather before they are written, and that the transport may hold
JOIN_BYTES = 4 << 10  # a shorter message is copied between its frame's header and its trailers, a longer one is not

# An answer's constant parts around what changes: HEADERS, the head of the DATA frame with the message's prefix in it;
# then trailers. A frame's length and type together are four bytes, of which DATA's type is 0.
TRAILERS_OK = status_block(OK)
HEAD = struct.Struct(f">5sI{len(HEADERS_BLOCK)}sIBIBI")
HEADERS_START = frames.frame(frames.HEADERS, frames.END_HEADERS, 0, HEADERS_BLOCK)[:5]
DATA_HEAD = struct.Struct(">IBI")
TAIL = struct.Struct(f">5sI{len(TRAILERS_OK)}s")
TRAILERS_START = frames.frame(frames.HEADERS, frames.END_HEADERS | frames.END_STREAM, 0, TRAILERS_OK)[:5]


class Outgoing:
    """Writes frames, and knows which streams are open. What is to be sent gathers in `_out` until all that arrived
    together has been served, and leaves in one write.
    """

    def __init__(self, door: Door) -> None:
        self.door = door
        self.loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._streams: dict[int, AnyCall] = {}
        self._given_up: dict[int, None] = {}  # streams that we ended before the client did, in that order
        self._last_id = 0  # the highest stream that the client has opened
        self._reading = False  # what has come is being acted on, and what gathers will be written after that
        self._over = False  # nothing that comes is read any more
        self._closed = False  # nothing is written any more
        self._refusing = False  # the last GOAWAY has gone: with its last stream, the connection ends
        self._out: list[Body] = []
        self._bulk = 0  # bytes in `_out` that are too many to be copied once more
        self._paused = False  # the transport holds enough
        self._chores = 0  # answers to PING and SETTINGS since it paused
        self._window = frames.DEFAULT_WINDOW  # bytes that we may send on all streams together
        self._stream_window = frames.DEFAULT_WINDOW  # a new stream's
        self._frame_limit = frames.SMALLEST_FRAME_LIMIT
        self._ready: dict[int, AnyCall] = {}  # streams that have something to send and a window, in turn
        self._spoke = False  # HEADERS or DATA were sent since the last PING came
        self._pings_unanswered = 0  # keepalive PINGs since HEADERS or DATA were sent

    # -- the transport's side

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._chores = 0
        self._pump()
        self._flush()

    # -- calls' side; see streams.Link

    def answer(self, call: UnaryCall, body: Encoded) -> None:
        """Headers, the message and trailers; the stream is over."""
        length = len(body) if isinstance(body, bytes) else bodies.length(body)
        size = PREFIX_BYTES + length
        if self._ready or self._paused or not (call.window >= size <= self._window and size <= self._frame_limit):
            self.send(call, body)
            self.finish(call, None)
            return
        self._window -= size
        head = HEAD.pack(HEADERS_START, call.id, HEADERS_BLOCK, size << 8, 0, call.id, 0, length)
        tail = TAIL.pack(TRAILERS_START, call.id, TRAILERS_OK)
        if isinstance(body, bytes) and length < JOIN_BYTES:
            self._out.append(head + body + tail)
        else:
            self._out += (head, body, tail) if isinstance(body, bytes) else (head, *body, tail)
            self._bulk += length
        self._spoke = True
        self._pings_unanswered = 0
        self._forget(call)
        if not self._reading:
            self._flush()

    def send(self, call: AnyCall, body: Encoded) -> None:
        """Headers if they have not gone yet, and a message, as the windows allow; then `call.drained`."""
        if call.id not in self._streams:
            return  # the client has gone away
        if not call.headed:
            call.headed = True
            self._out.append(frames.frame(frames.HEADERS, frames.END_HEADERS, call.id, HEADERS_BLOCK))
        call.out.append(memoryview(b"\0" + bodies.length(body).to_bytes(4, "big")))
        call.out.extend(memoryview(part) for part in ([body] if isinstance(body, bytes) else body) if part)
        self._queue(call)
        self._pump()
        if not self._reading:
            self._flush()

    def finish(self, call: AnyCall, error: ServingError | None) -> None:
        """Trailers, behind what waits to be sent; the stream is over."""
        if call.id not in self._streams:
            return  # the client has gone away
        if error is None:
            call.last = TRAILERS_OK
        else:
            call.out.clear()  # nobody needs a message whose call has failed
            call.last = error_block(error)
        if not call.headed:
            call.headed = True
            call.last = HEADERS_BLOCK + call.last
        if not call.out:
            self._ready.pop(call.id, None)
            self._end(call)
        if not self._reading:
            self._flush()

    def grant(self, call: AnyCall, more: int) -> None:
        """Allow the client `more` bytes on this stream."""
        if call.id in self._streams:
            call.credit += more
            self._out.append(frames.window_update(call.id, more))
            if not self._reading:
                self._flush()

    # -- frames

    def _queue(self, stream: AnyCall) -> None:
        if stream.out and stream.window > 0:
            self._ready[stream.id] = stream

    def _pump(self) -> None:
        """Send what windows and transport allow, each stream in its turn."""
        while self._ready and self._window > 0 and not self._paused:
            id = next(iter(self._ready))
            stream = self._ready.pop(id)
            self._send_some(stream)
            if stream.out:
                self._queue(stream)  # behind the others
            elif stream.last is not None:
                self._end(stream)
            else:
                stream.drained()

    def _send_some(self, stream: AnyCall) -> None:
        """One DATA frame."""
        most = min(self._window, stream.window, self._frame_limit, TURN_BYTES)
        parts: list[memoryview] = []
        left = most
        while stream.out and left:
            part = stream.out[0]
            if len(part) <= left:
                stream.out.popleft()
            else:
                stream.out[0] = part[left:]
                part = part[:left]
            parts.append(part)
            left -= len(part)
        size = most - left
        self._window -= size
        stream.window -= size
        self._out.append(DATA_HEAD.pack(size << 8, 0, stream.id))
        self._out += parts
        self._spoke = True
        self._pings_unanswered = 0
        self._bulk += size
        if self._bulk > BULK_BYTES:
            self._flush()  # the transport says when it has enough

    def _end(self, stream: AnyCall) -> None:
        """Trailers, now."""
        assert stream.last is not None
        self._out.append(frames.frame(frames.HEADERS, frames.END_HEADERS | frames.END_STREAM, stream.id, stream.last))
        self._spoke = True
        self._pings_unanswered = 0
        if not stream.ended:
            self._give_up(stream.id)
            self._out.append(frames.rst_stream(stream.id, Code.NO_ERROR))  # the client need not send the rest
        self._forget(stream)

    def _refuse(self, id: int, block: bytes, ended: bool) -> None:
        """Answer a request that no call came of."""
        self._out.append(frames.frame(frames.HEADERS, frames.END_HEADERS | frames.END_STREAM, id, block))
        if not ended:
            self._give_up(id)
            self._out.append(frames.rst_stream(id, Code.NO_ERROR))

    def _reset(self, id: int, code: Code) -> None:
        self._give_up(id)
        self._out.append(frames.rst_stream(id, code))
        stream = self._streams.get(id)
        if stream is not None:
            self._forget(stream)
            stream.cancel()

    def _give_up(self, id: int) -> None:
        if len(self._given_up) >= MAX_GIVEN_UP:
            del self._given_up[next(iter(self._given_up))]
        self._given_up[id] = None

    def _forget(self, stream: AnyCall) -> None:
        self._streams.pop(stream.id, None)
        self._ready.pop(stream.id, None)
        if self._refusing and not self._streams:
            self._close()

    def _chore(self, answer: bytes) -> None:
        self._out.append(answer)
        if self._paused:
            self._chores += 1
            if self._chores > MAX_UNSENT_CHORES:
                raise Fault(Code.ENHANCE_YOUR_CALM, "too many frames that ask for an answer that nobody reads")

    def _flush(self) -> None:
        out = self._out
        if not out or self._transport is None or self._closed:
            return
        self._out, bulk, self._bulk = [], self._bulk, 0
        if bulk >= JOIN_BYTES:
            self._transport.writelines(out)
        else:
            self._transport.write(out[0] if len(out) == 1 else b"".join(out))

    def _fail(self, fault: Fault) -> None:
        """End the connection and say why."""
        logger.debug("gRPC connection ends: %s", fault.text)
        self._out.append(frames.goaway(self._last_id, fault.code, fault.text))
        self._close()

    def _close(self) -> None:
        """Write what there is to write, then nothing more. `connection_lost` cancels the calls that still run."""
        self._flush()
        self._over = self._closed = True
        if self._transport is not None:
            self._transport.close()
