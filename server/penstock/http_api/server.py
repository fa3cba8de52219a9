"""The HTTP server: uvicorn, on our own connections and without its signals, logs and event loop."""

import asyncio
import contextlib
import functools
import logging
import socket
from collections.abc import Callable, Generator
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from penstock.http_api.connection import LimitedProtocol
from penstock.http_api.infer import Door
from penstock.http_api.lane import Lane, LaneProtocol
from penstock.settings import Settings

PARTING_S = 1.0  # while a client may still send a request on a connection that it kept, before the server closes it
LOOK_S = 0.02


def make_server(app: ASGIApp, settings: Settings, door: Door | None = None) -> uvicorn.Server:
    """A server that answers as the protocol asks and leaves signals, the event loop and logging to its caller.

    Inferences take the fast lane to `door`, where there is one and the settings do not switch that off.
    Run it on a uvloop with `serve(sockets=[...])`; set `should_exit` to stop it.
    """
    if door is not None and settings.http_fast_lane:
        return _Server(app, settings, functools.partial(LaneProtocol, Lane(door, settings), settings))
    return _Server(app, settings, functools.partial(LimitedProtocol, settings))


class _Server(uvicorn.Server):
    def __init__(self, app: ASGIApp, settings: Settings, protocol: Callable[..., LimitedProtocol]) -> None:
        any_protocol: Any = protocol  # uvicorn calls whatever it is given, though it asks for a class
        super().__init__(
            uvicorn.Config(
                app,
                http=any_protocol,
                ws="none",
                loop="none",
                lifespan="off",
                interface="asgi3",
                log_config=None,
                log_level=logging.WARNING,
                access_log=False,
                server_header=False,
                date_header=False,
                proxy_headers=False,
                timeout_keep_alive=settings.http_keep_alive_secs,
                timeout_graceful_shutdown=settings.exit_timeout_secs,
            )
        )
        self._parting_s = min(PARTING_S, settings.exit_timeout_secs / 2)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Signals are the caller's."""
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no new connections, part from the clients of those that are open, then stop as uvicorn does.

        A client that keeps a connection cannot know that the server stops, and its next request may be on the way. For
        a short while such a request is answered, and the answer says that it was the connection's last.
        """
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            assert isinstance(connection, LimitedProtocol)
            connection.part()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._parting_s):
                while self.server_state.connections:  # noqa: ASYNC110 - uvicorn's own set
                    await asyncio.sleep(LOOK_S)
        await super().shutdown(sockets)
