"""One HTTP/1.1 connection: uvicorn's, with the limits that it lacks and JSON where it would answer in plain text."""

import asyncio
import http
from collections import deque
from typing import Any

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from penstock.http_api.answers import failed
from penstock.settings import Settings

MAX_CHUNKS = 65536  # of one body that are not empty; each costs more than its bytes


class LimitedProtocol(HttpToolsProtocol):
    """One connection.

    Adds to uvicorn's: limits on the size of a head and on the time it takes, on idle time from the first moment on,
    and on chunks; JSON for what cannot be read, after the answers to what could; and bodies of requests that offer an
    upgrade, which stays declined.
    """

    def __init__(
        self,
        settings: Settings,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._head_limit = settings.http_max_header_size
        self._head_timeout_s = settings.http_header_timeout_secs
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0  # read since the last head was complete, while in no body
        self._in_head = False
        self._in_body = False
        self._chunks = 0
        self._unanswered: deque[RequestResponseCycle] = deque()  # the first is being served
        self._refused = False  # nothing more is read
        self._parting = False  # the next answer is the last
        self._last_words = b""  # to be sent before the connection closes

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._rest()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._unset_keepalive_if_required()
        self._disconnect()
        super().connection_lost(exc)

    def eof_received(self) -> None:
        """The client's side has ended. The transport closes now and says so later; until then a write would fail."""
        self._disconnect()

    def _disconnect(self) -> None:
        """Nobody will hear an answer. uvicorn tells the latest request only, not those before it in the pipeline."""
        for cycle in self._unanswered:
            cycle.disconnected = True
            cycle.message_event.set()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._unset_keepalive_if_required()
        view = memoryview(data)
        try:
            while view and not self._refused:
                view = self._feed(view)
        except httptools.HttpParserError as error:
            if not self._refused:
                self._refuse(400, f"malformed HTTP request: {error.__context__ or error}")
            return
        if self._in_head and self._head_timer is None:
            self._head_timer = self.loop.call_later(self._head_timeout_s, self._head_timed_out)
        self._rest()

    def _feed(self, view: memoryview) -> memoryview:
        """Parse some of `view`; returns what is left.

        No more of a head is taken in than its limit, and what had been read already where it followed another message.
        """
        part = view
        if not self._in_body:
            part = view[: self._head_limit - self._head_bytes + 1]
            self._head_bytes += len(part)
        try:
            self.parser.feed_data(part)
        except httptools.HttpParserUpgrade as upgrade:
            return self._decline_upgrade(view[upgrade.args[0] :])
        if self._head_bytes > self._head_limit and not self._in_body:
            self._head_too_large()
        return view[len(part) :]

    def _decline_upgrade(self, rest: memoryview) -> memoryview:
        """Read the request again without its Upgrade header: the parser takes what follows for another protocol."""
        if self.parser.get_method() == b"CONNECT":
            self._refuse(405, "Method Not Allowed")
            return rest
        kept = [(name, value) for name, value in self.headers if name not in (b"upgrade", b"http2-settings")]
        lines = [b"%s %s HTTP/1.1" % (self.parser.get_method(), self.url), *(b"%s: %s" % pair for pair in kept)]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's own
        self.parser.feed_data(b"\r\n".join([*lines, b"", b""]))
        return rest

    # -- what the parser finds

    def on_message_begin(self) -> None:
        self._in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._stop_head_timer()
        self._head_bytes = self._chunks = 0
        # Counted again, for a head that began in the middle of what was fed.
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > self._head_limit:
            self._head_too_large()
            raise RefusedError
        self._start()
        self._in_head, self._in_body = False, True

    def _start(self) -> None:
        """Give a request to the application as soon as its head has come."""
        if self._refused:
            raise RefusedError  # an answer has ended the connection meanwhile
        super().on_headers_complete()
        if self._parting:
            self.cycle.keep_alive = False
        self._unanswered.append(self.cycle)

    def on_chunk_header(self) -> None:
        self._chunks += 1

    def on_body(self, body: bytes) -> None:
        if self._chunks > MAX_CHUNKS:
            self._refuse(
                400,
                f"Chunked request body exceeds maximum of {MAX_CHUNKS} non-empty chunks. "
                "Send fewer or larger HTTP chunks.",
            )
            raise RefusedError
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._in_body = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        self._unanswered.popleft()
        last = not self.pipeline
        super().on_response_complete()
        if self._refused and last and not self.transport.is_closing():
            self._leave()

    # -- what cannot be served

    def _head_too_large(self) -> None:
        self._refuse(
            431,
            f"request line and headers exceed the maximum allowed size of {self._head_limit} bytes. "
            "Use --http-max-header-size to increase the limit.",
        )

    def _head_timed_out(self) -> None:
        self._refuse(
            408,
            f"request line and headers did not arrive within {self._head_timeout_s} seconds. "
            "Use --http-header-timeout-secs to increase the limit.",
        )

    def _refuse(self, status: int, message: str) -> None:
        """Read no more, answer what was read before, then say why and close."""
        self._refused = True
        self._stop_head_timer()
        self._last_words = _written(status, message)
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            if self._in_body:
                self._last_words = b""  # this request has had its answer already
            self._leave()
        elif self._in_body:
            if self.pipeline and self.pipeline[0][0] is cycle:
                self.pipeline.popleft()  # it waits behind others, and will not be served
            elif cycle.response_started:
                self._last_words = b""
            else:
                cycle.disconnected = True
                cycle.message_event.set()
                self._leave()

    def _leave(self) -> None:
        if self._last_words:
            self.transport.write(self._last_words)
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    # -- time

    def part(self) -> None:
        """The server stops: say so with the next answer, after which the connection closes."""
        self._parting = True
        if self.cycle is not None:
            self.cycle.keep_alive = False

    @property
    def _resting(self) -> bool:
        """Whether nothing is under way."""
        return (self.cycle is None or self.cycle.response_complete) and not self.pipeline and not self._in_head

    def _rest(self) -> None:
        """Close the connection after a while in which nothing comes."""
        if self._resting and self.timeout_keep_alive_task is None and not self.transport.is_closing():
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


class RefusedError(Exception):
    """Stops the parser, which reports it as a failed callback."""


def _written(status: int, message: str) -> bytes:
    _, headers, body = failed(status, message, (b"connection", b"close"))
    lines = [b"HTTP/1.1 %d %s" % (status, http.HTTPStatus(status).phrase.encode())]
    lines.extend(b"%s: %s" % header for header in headers)
    return b"\r\n".join([*lines, b"", *body])
