"""The fast lane: an inference goes from body to answer past ASGI's scope, queue and task.

It adds no rule of its own. What it recognises it hands to `serve_infer`, as the ASGI application does; everything else,
and whatever waits for an answer before it, passes by on uvicorn's way.
"""

import asyncio
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import httptools
import numpy as np
import uvicorn
from msgspec import Struct
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle
from uvicorn.server import ServerState

from penstock.auth import Category
from penstock.errors import Kind, ServingError
from penstock.http_api.answers import Body, Headers
from penstock.http_api.app import refused
from penstock.http_api.connection import LimitedProtocol, RefusedError
from penstock.http_api.infer import Door, Exchange, Head, infer_target, serve_infer
from penstock.settings import Settings

LARGEST_BODY = 64 << 20  # bytes: its memory is taken when its length is known, and a client may only claim one
FEW = 4  # connections, whose answers leave at once
UNSENT_BYTES = 64 << 10  # of answers that wait to be sent together
LANDING_BYTES = 64 << 10  # of a body that are still to come: from here on the socket is read right into its memory
JOIN_BYTES = 16 << 10  # a shorter answer is joined, a longer one leaves from where its tensors lie
HEADS_BYTES = 8 << 10  # read at a time between such bodies
ALIGNMENT = 64  # of a long body's first binary tensor, bytes
KNOWN_HEADS = 256
KNOWN_HEAD_BYTES = 2048
HEAD_END = b"\r\n\r\n"
POST = b"POST "

Part: TypeAlias = bytes | memoryview


class Bound(Struct, frozen=True):
    """The head of a request that may take the lane."""

    head: Head
    length: int  # of the body
    keep_alive: bool


class Lane:
    """What a server's connections share. Used on one event loop.

    A client's requests repeat their heads byte by byte, so heads are remembered: the parser sees only the first.
    """

    def __init__(self, door: Door, settings: Settings) -> None:
        self.door = door
        self._limit_bytes = min(settings.http_max_body_size, LARGEST_BODY)
        self._due: list[LaneProtocol] = []  # connections with something to send
        self._digits = len(str(settings.http_max_body_size))
        self.known: dict[bytes, Bound] = {}

    def recognise(self, parser: Any, url: bytes, headers: Headers) -> Bound | None:
        """What the parser has read, as far as it is an inference of the ordinary kind; None for anything else."""
        if b"/infer" not in url or parser.get_method() != b"POST" or parser.get_http_version() != "1.1":
            return None
        fields = dict(headers)
        declared = fields.get(b"content-length", b"")
        if not declared or len(declared) > self._digits or int(declared) > self._limit_bytes:
            return None
        if b"expect" in fields or b"transfer-encoding" in fields:
            return None
        path = httptools.parse_url(url).path or b""
        target = infer_target(path) if path.isascii() else None
        if target is None:
            return None
        return Bound(Head(*target, fields), int(declared), parser.should_keep_alive())

    def learn(self, head: bytes, bound: Bound) -> None:
        """Remember a head by its bytes: those of one request line and its headers, as the parser sees them too."""
        # A line that ends otherwise might mean that the parser has seen the head's end elsewhere.
        if not bound.keep_alive or not head.startswith(POST) or head.count(b"\n") != head.count(b"\r\n"):
            return
        if len(self.known) >= KNOWN_HEADS:
            self.known.clear()
        self.known[head] = bound

    def flush_soon(self, connection: "LaneProtocol") -> None:
        """Let a connection send once all that has come with this turn of the loop has been served.

        Where cores are few, a client that is woken takes ours: of 16 requests at a time, each cost 14 us more when its
        answer left at once.
        """
        if not self._due:
            connection.loop.call_soon(self._flush)
        self._due.append(connection)

    def _flush(self) -> None:
        due, self._due = self._due, []
        for connection in due:
            connection.flush()


class LaneProtocol(LimitedProtocol):
    """One connection whose inferences take the lane."""

    def __init__(
        self,
        lane: Lane,
        settings: Settings,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(settings, config, server_state, app_state, _loop)
        self._lane = lane
        self._learning = b""  # the head that is about to be parsed, where it came in one piece
        self._refusal: ServingError | None = None  # of the request that is about to be parsed
        self._bound: Bound | None = None  # the request whose body is being read
        self._body: Any = None  # its memory, or all of it where that came at once
        self._came = 0  # bytes of it
        self._keep_alive = True  # after the answer that is given next
        self._held: _Held | None = None  # stands for a request that is not read, or not answered, at once
        self._exchange: Exchange | None = None
        self._unsent: list[Part] = []
        self._unsent_bytes = 0
        self._served_s = 0.0  # when the last answer was given at once
        self._landing: _Landing | None = None
        self._mailbox = lane.door.engine.mailbox()

    def data_received(self, data: bytes) -> None:
        at = 0
        if self._bound is not None:
            at = self._bound.length - self._came
            self._take(data[:at])
            if self._came < self._bound.length:
                return
            self.serve()
        size, known = len(data), self._lane.known
        # While the bytes that come begin a request, and nothing is under way before it.
        while at < size and not (
            self._in_body
            or self._in_head
            or self._head_bytes
            or self._refused
            or self.flow.write_paused
            or (self.cycle is not None and not self.cycle.response_complete)
        ):
            begin = data.find(HEAD_END, at, at + KNOWN_HEAD_BYTES) + len(HEAD_END)
            if begin < len(HEAD_END):
                break
            head = data[at:begin]
            bound = known.get(head)
            if bound is None:
                self._learning = head
                break
            if self._lane.door.guard is not None and not self._admitted(bound):
                break
            at = begin + bound.length
            if at > size:
                self._bound = bound
                self._go_on(data[begin:])
                return
            self._give(bound, data[begin:at])
            if self._landing is not None:
                self._take_off()
        if at == size or self.transport.is_closing():
            if self.timeout_keep_alive_task is None:
                self._rest()
            return
        if self._landing is not None:
            self._take_off()
        super().data_received(data[at:] if at else data)
        self._learning = b""
        if self._bound is not None:
            # The rest of the body passes the parser by, which then begins with the next request.
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's own
            self._in_body = False
            self._go_on()

    # -- what the parser finds

    def _start(self) -> None:
        if self._refused:
            raise RefusedError
        head, self._learning = self._learning, b""
        refusal, self._refusal = self._refusal, None
        under_way = self.flow.write_paused or (self.cycle is not None and not self.cycle.response_complete)
        if refusal is None and not under_way:
            bound = self._lane.recognise(self.parser, self.url, self.headers)
            if bound is not None:
                if head:
                    self._lane.learn(head, bound)
                if self._admitted(bound):
                    self._bound = bound
                    return
                refusal, self._refusal = self._refusal, None
        if refusal is not None:
            self.app = refused(self._lane.door, refusal)
        super()._start()
        self.app = self.config.loaded_app

    def _admitted(self, bound: Bound) -> bool:
        """Whether its sender may infer. Asked once: a key may be limited to so many requests per second."""
        try:
            self._lane.door.admit(Category.INFERENCE, bound.head.headers)
        except ServingError as error:
            self._refusal = error
            return False
        return True

    def on_body(self, body: bytes) -> None:
        if self._bound is None:
            super().on_body(body)
        else:
            self._take(body)

    def on_message_complete(self) -> None:
        if self._bound is None:
            super().on_message_complete()
        else:
            self._in_body = False
            self.serve()

    # -- the body

    def _take(self, part: Part) -> None:
        assert self._bound is not None
        length = self._bound.length
        if len(part) == length:
            self._body = part
        else:
            if self._body is None:
                self._body = _memory(self._bound)
            self._body[self._came : self._came + len(part)] = part
        self._came += len(part)

    def _go_on(self, part: Part = b"") -> None:
        """Read the rest of the body as it comes."""
        assert self._bound is not None
        self._take(part)
        self._hold(self._bound.keep_alive)
        if self._bound.length - self._came >= LANDING_BYTES:
            if self._landing is None:
                self._landing = _Landing(self)
                self.transport.set_protocol(self._landing)
            self._landing.room = self._body[self._came :]

    def _take_off(self) -> None:
        """Read as uvicorn does, which is better for what is short."""
        self._landing = None
        self.transport.set_protocol(self)

    # -- the answer

    def serve(self) -> None:
        """The body has come."""
        bound, body = self._bound, self._body
        assert bound is not None
        self._bound, self._body, self._came = None, None, 0
        self._give(bound, body if body is not None else b"")

    def _give(self, bound: Bound, body: Part) -> None:
        self._keep_alive = bound.keep_alive
        exchange = serve_infer(self._lane.door, bound.head, body, self._reply, self._mailbox)
        if exchange is not None:
            self._exchange = exchange
            self._hold(bound.keep_alive)

    def _hold(self, keep_alive: bool) -> None:
        """Let what comes next wait for this request's answer."""
        if self._held is None:
            self._held = _Held(keep_alive and not self._parting)
            self.cycle = self._held
            self._unanswered.append(self._held)

    def _reply(self, status: int, headers: Headers, body: Body) -> None:
        held = self._held
        self._held = self._exchange = None
        if held is None:
            self._served_s = self.loop.time()
            keep_alive = self._keep_alive and not self._parting
        elif held.disconnected:
            return
        else:
            held.response_complete = True
            keep_alive = held.keep_alive
        parts, size = (_head(status, tuple(headers), keep_alive), *body), sum(map(len, body))
        soon = keep_alive and len(self.connections) > FEW
        if soon or self._unsent:
            if not self._unsent:
                self._lane.flush_soon(self)
            self._unsent += parts
            self._unsent_bytes += size
            if not soon or self._unsent_bytes > UNSENT_BYTES:
                self.flush()  # then the transport says whether it has enough
        else:
            self._send(parts, size)
        if not keep_alive:
            self._refused = True
            self.transport.close()
        if held is not None:
            self.on_response_complete()

    def flush(self) -> None:
        """Send what there is to send. Called before anything else is written, and before the transport closes."""
        if self._unsent:
            parts, size = self._unsent, self._unsent_bytes
            self._unsent, self._unsent_bytes = [], 0
            self._send(parts, size)

    def _send(self, parts: Sequence[Part], size: int) -> None:
        if self.transport.is_closing():
            return
        if size < JOIN_BYTES:
            self.transport.write(b"".join(parts))
        else:
            self.transport.writelines(parts)

    def _leave(self) -> None:
        self.flush()
        super()._leave()

    def shutdown(self) -> None:
        self.flush()
        super().shutdown()

    def eof_received(self) -> None:
        self.flush()
        super().eof_received()

    # -- time, and the end

    def _rest(self) -> None:
        if self.timeout_keep_alive_task is None:
            super()._rest()

    def timeout_keep_alive_handler(self) -> None:
        """Close the connection if it has been idle: the timer is not set anew for each answer that is given at once."""
        self.timeout_keep_alive_task = None
        if not self._resting:
            return  # it is set again when the answer has been given
        left_s = self._served_s + self.timeout_keep_alive - self.loop.time()
        if left_s > 0:
            self.timeout_keep_alive_task = self.loop.call_later(left_s, self.timeout_keep_alive_handler)
        else:
            super().timeout_keep_alive_handler()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._bound = self._body = self._landing = None

    def _disconnect(self) -> None:
        super()._disconnect()
        if self._exchange is not None:
            self._exchange.cancel(ServingError(Kind.CANCELLED, "the client went away"))


@lru_cache(1024)
def _head(status: int, headers: tuple[tuple[bytes, bytes], ...], keep_alive: bool) -> bytes:
    """An answer's beginning."""
    parts = [STATUS_LINE[status], *(b"%b: %b\r\n" % header for header in headers)]
    return b"".join([*parts, b"\r\n" if keep_alive else b"connection: close\r\n\r\n"])


def _memory(bound: Bound) -> memoryview:
    """A body's memory, not filled with anything, so placed that its first binary tensor is aligned."""
    size = bound.length
    if size < LANDING_BYTES:
        return np.empty(size, np.uint8).data
    before = bound.head.headers.get(b"inference-header-content-length", b"")
    array = np.empty(size + ALIGNMENT, np.uint8)
    json_bytes = int(before) if before.isdigit() and len(before) < 10 else 0
    begin = -(array.ctypes.data + json_bytes) % ALIGNMENT
    return array.data[begin : begin + size]


class _Held(RequestResponseCycle):
    """In a connection's queue of cycles, the request that is in the lane."""

    def __init__(self, keep_alive: bool) -> None:
        self.keep_alive = keep_alive
        self.disconnected = self.response_started = self.response_complete = False
        self.message_event = asyncio.Event()


class _Landing(asyncio.BufferedProtocol):
    """Stands in for a connection while the socket is read right into the memory of its requests' bodies.

    Heads come into a small buffer, so that little of a body must be copied from there.
    """

    def __init__(self, connection: LaneProtocol) -> None:
        self._connection = connection
        self._heads = memoryview(bytearray(HEADS_BYTES))
        self.room: memoryview | None = None  # of the body that is being read: the bytes that are still to come

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002
        return self.room or self._heads

    def buffer_updated(self, nbytes: int) -> None:
        room = self.room
        if room is None:
            self._connection.data_received(bytes(self._heads[:nbytes]))
        elif nbytes < len(room):
            self.room = room[nbytes:]
        else:
            self.room = None
            self._connection.serve()

    def eof_received(self) -> None:
        self._connection.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._connection.connection_lost(exc)

    def pause_writing(self) -> None:
        self._connection.pause_writing()

    def resume_writing(self) -> None:
        self._connection.resume_writing()
