"""What an HTTP/2 connection does with time: deadlines, keepalive, an end that loses no call. RFC 9113, §6.7, §6.8."""

import asyncio
import logging
import time
from collections.abc import Callable

from penstock.errors import Kind, ServingError
from penstock.grpc_api.calls import STOPPING, Door
from penstock.grpc_api.http2 import frames
from penstock.grpc_api.http2.frames import Code
from penstock.grpc_api.http2.outgoing import Outgoing
from penstock.grpc_api.http2.streams import AnyCall, StreamCall
from penstock.settings import Settings

logger = logging.getLogger(__name__)

OPENING_S = 20.0  # until the client has sent its preface and SETTINGS
LAST_PING_S = 1.0  # for the answer to the PING between the two GOAWAYs of an orderly end

DRAIN_PING, KEEPALIVE_PING = b"penstock", b"are you?"


class Lifetime(Outgoing):
    """Keeps the timers."""

    def __init__(self, door: Door, settings: Settings) -> None:
        super().__init__(door)
        self._settings = settings
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._heard = False  # anything has come since the last look
        self._new_deadlines: list[AnyCall] = []  # of calls that came with this read
        self._draining = False  # the first GOAWAY has gone

    def _begin_life(self) -> None:
        self._after("opening", OPENING_S, self._close)
        self._after("keepalive", self._settings.grpc_keepalive_time / 1000, self._keep_alive)
        if self._settings.grpc_max_connection_age:
            self._after("age", self._settings.grpc_max_connection_age / 1000, self._grow_old)

    def drain(self) -> None:
        """Ask the client to open no more streams, and close once those that are open have been answered.

        First a GOAWAY that still allows all, then, when the client must have seen it, one that names the last stream:
        so none is lost on the way. RFC 9113, §6.8
        """
        if self._draining or self._over:
            return
        self._draining = True
        self._out += (
            frames.goaway(frames.LARGEST_ID, Code.NO_ERROR),
            frames.frame(frames.PING, 0, 0, DRAIN_PING),
        )
        self._flush()
        self._after("drain", LAST_PING_S, self._refuse_more)
        for stream in list(self._streams.values()):
            if isinstance(stream, StreamCall) and not stream.drains:
                stream.end(ServingError(Kind.UNAVAILABLE, STOPPING))

    def stop(self) -> None:
        """Answer what still runs with an error, and close."""
        for stream in list(self._streams.values()):
            stream.end(ServingError(Kind.UNAVAILABLE, STOPPING))
        self._refuse_more()

    def abort(self) -> None:
        """Close at once, whatever is unsent."""
        self._over = self._closed = True
        if self._transport is not None:
            self._transport.abort()

    def _after(self, name: str, delay_s: float, call: Callable[[], None]) -> None:
        self._timers[name] = self.loop.call_later(delay_s, call)

    def _arm(self) -> None:
        """Watch the deadlines of the calls that came with this read, but for those that were answered at once."""
        for stream in self._new_deadlines:
            if stream.id in self._streams:
                delay_s = (stream.call.deadline_ns - time.monotonic_ns()) / 1e9
                stream.timer = self.loop.call_later(delay_s, self._expire, stream)
        self._new_deadlines.clear()

    def _expire(self, stream: AnyCall) -> None:
        stream.timer = None
        stream.end(ServingError(Kind.DEADLINE, "the deadline passed before the request was answered"))

    def _keep_alive(self) -> None:
        """Ask a silent client whether it is there."""
        time_s = self._settings.grpc_keepalive_time / 1000
        may = self._streams or self._settings.grpc_keepalive_permit_without_calls
        most = self._settings.grpc_http2_max_pings_without_data
        if self._heard or not may or (most and self._pings_unanswered >= most):
            self._heard = False
            self._after("keepalive", time_s, self._keep_alive)
            return
        self._pings_unanswered += 1
        self._out.append(frames.frame(frames.PING, 0, 0, KEEPALIVE_PING))
        self._flush()
        self._after("keepalive", self._settings.grpc_keepalive_timeout / 1000, self._still_there)

    def _still_there(self) -> None:
        if self._heard:
            self._keep_alive()
        else:
            logger.debug("gRPC connection ends: the client has not answered a PING")
            self.abort()

    def _grow_old(self) -> None:
        self.drain()
        if self._settings.grpc_max_connection_age_grace:
            self._after("grace", self._settings.grpc_max_connection_age_grace / 1000, self.abort)

    def _refuse_more(self) -> None:
        if self._refusing:
            return
        self._refusing = True
        self._out.append(frames.goaway(self._last_id, Code.NO_ERROR))
        self._flush()
        if not self._streams:
            self._close()
