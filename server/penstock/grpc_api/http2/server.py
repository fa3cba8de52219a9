"""The table of methods on our own HTTP/2: connections accepted, drained and closed."""

import asyncio
from collections.abc import Mapping

from penstock.errors import Kind, ServingError
from penstock.grpc_api.calls import Door
from penstock.grpc_api.http2.connection import Connection
from penstock.grpc_api.methods import METHODS, Row
from penstock.settings import Settings

FAREWELL_S = 0.5  # for clients to read the last that is said to them


class NativeServer:
    """A listening gRPC server. Used on one event loop."""

    def __init__(self, door: Door, settings: Settings, methods: Mapping[str, Row] = METHODS) -> None:
        self._door = door
        self._settings = settings
        self._methods = methods
        self._connections: set[Connection] = set()
        self._server: asyncio.Server | None = None
        self._closed = asyncio.Event()

    async def start(self, address: tuple[str, int]) -> int:
        """Listen on (host, port) and return the port, which for port 0 is a free one.

        Raises ServingError(UNAVAILABLE) where the address cannot be had.
        """
        host, port = address
        try:
            self._server = await asyncio.get_running_loop().create_server(self._connection, host, port)
        except OSError as error:
            raise ServingError(
                Kind.UNAVAILABLE, f"cannot listen for gRPC on {host}:{port}: is the port in use already?"
            ) from error
        bound: int = self._server.sockets[0].getsockname()[1]
        return bound

    async def stop(self, grace_s: float) -> None:
        """Accept nothing more; give calls `grace_s` seconds to finish, then end them. Watches end at once."""
        if self._server is None:
            return
        self._server.close()
        for connection in list(self._connections):
            connection.drain()
        if not await self._all_closed(grace_s):
            for connection in list(self._connections):
                connection.stop()
            if not await self._all_closed(FAREWELL_S):
                for connection in list(self._connections):
                    connection.abort()

    async def _all_closed(self, limit_s: float) -> bool:
        """Wait until no connection is left. False when time ran out."""
        try:
            async with asyncio.timeout(limit_s):
                while self._connections:
                    self._closed.clear()
                    await self._closed.wait()
        except TimeoutError:
            return False
        return True

    def _connection(self) -> Connection:
        connection = Connection(self._door, self._settings, self._methods, self._gone)
        self._connections.add(connection)
        return connection

    def _gone(self, connection: Connection) -> None:
        self._connections.discard(connection)
        self._closed.set()
