"""The table of methods on grpcio's server: bytes in, bytes out, and no options of its own."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, NoReturn

import grpc

from penstock.errors import Kind, ServingError
from penstock.grpc_api.bodies import Encoded, whole
from penstock.grpc_api.calls import STATUS, STOPPING, Call, Door, Stream, Unary, details
from penstock.grpc_api.methods import METHODS
from penstock.settings import Settings

CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}
# grpcio from 1.84 on ends its server for good when a call's path is no UTF-8, and tells so only to who asks.
LOOK_S, QUIET_S, PARTING_S = 0.5, 0.05, 1.0

logger = logging.getLogger(__name__)


class GrpcioServer(grpc.GenericRpcHandler):
    """A listening gRPC server. Used on one event loop."""

    def __init__(self, door: Door, settings: Settings) -> None:
        self._door = door
        self._limit_bytes = settings.grpc_max_message_size
        self._handlers = {
            path: self._unary(row) if isinstance(row, Unary) else self._stream(row) for path, row in METHODS.items()
        }
        self._server: grpc.aio.Server | None = None
        self._guard: asyncio.Task[None] | None = None
        self._endless: set[asyncio.Task[Any]] = set()  # calls that a stop does not wait for
        self._stopping = False
        self._late = 0  # calls that have come since

    async def start(self, address: tuple[str, int]) -> int:
        """Listen on (host, port); gives the port, free for 0. Raises ServingError(UNAVAILABLE) where it is taken."""
        self._server, bound = await self._listen(*address)
        self._guard = asyncio.create_task(self._keep_serving(self._server, address[0], bound))
        return bound

    async def _listen(self, host: str, port: int) -> tuple[grpc.aio.Server, int]:
        sizes = [(f"grpc.max_{way}_message_length", self._limit_bytes) for way in ("receive", "send")]
        server = grpc.aio.server(handlers=(self,), options=[*sizes, ("grpc.so_reuseport", 0)])  # a port has one owner
        try:
            bound = server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        except RuntimeError as error:
            text = f"cannot listen for gRPC on {host}:{port}: is the port in use already?"
            raise ServingError(Kind.UNAVAILABLE, text) from error
        await server.start()
        return server, bound

    async def _keep_serving(self, server: grpc.aio.Server | None, host: str, port: int) -> None:
        """Serve on where grpcio has given up. Calls of the server that ended are cancelled."""
        while True:
            try:
                if server is None:
                    server, _ = await self._listen(host, port)
                    self._server = server
                await server.wait_for_termination(LOOK_S)
            except ServingError as error:  # whoever has taken the port meanwhile may leave it
                logger.error("gRPC is not served: %s", error.message)
                await asyncio.sleep(LOOK_S)
            except Exception as error:
                logger.error("grpcio's server ended, another takes its place", exc_info=error)
                await (asyncio.sleep(LOOK_S) if server is None else server.stop(None))
                server = None

    async def stop(self, grace_s: float) -> None:
        """Accept nothing more; give calls `grace_s` seconds to finish, then cancel them. Watches end at once."""
        if self._server is None or self._guard is None:
            return  # it never listened
        self._stopping = True
        self._guard.cancel()
        for task in self._endless:
            task.cancel()
        # What comes while it shuts down, grpcio ends as CANCELLED, which clients do not try again: refuse it first.
        late, end_s = -1, time.monotonic() + min(PARTING_S, grace_s / 2)
        while late < self._late and time.monotonic() < end_s:
            late = self._late
            await asyncio.sleep(QUIET_S)
        await self._server.stop(grace_s)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[bytes, bytes] | None":
        """The handler of a path; None makes the call UNIMPLEMENTED."""
        self._late += self._stopping
        if self._stopping:
            return grpc.stream_stream_rpc_method_handler(_refuse)
        return self._handlers.get(handler_call_details.method)

    def _unary(self, row: Unary[Any, Any]) -> "grpc.RpcMethodHandler[bytes, bytes]":
        async def handle(body: bytes, context: "grpc.aio.ServicerContext[bytes, bytes]") -> bytes:
            future: asyncio.Future[Encoded | ServingError] = asyncio.get_running_loop().create_future()

            def reply(answer: Encoded | ServingError) -> None:
                if not future.done():  # else the client has gone away
                    future.set_result(answer)

            call = _call(context)
            pending = row.answer(self._door, body, call, reply)
            try:
                answer = await future
            except asyncio.CancelledError:
                if pending is not None:
                    pending.cancel(call.gone())
                raise
            if isinstance(answer, ServingError):
                await _abort(context, answer)
            return whole(answer)

        return grpc.unary_unary_rpc_method_handler(handle)

    def _stream(self, row: Stream[Any, Any]) -> "grpc.RpcMethodHandler[bytes, bytes]":
        async def handle(bodies: AsyncIterator[bytes], context: "grpc.aio.ServicerContext[bytes, bytes]") -> None:
            if not row.drains and (task := asyncio.current_task()):
                self._endless.add(task)
                task.add_done_callback(self._endless.discard)
            try:
                async with aclosing(row.answers(self._door, bodies, _call(context))) as answers:
                    async for answer in answers:
                        await context.write(whole(answer))
            except ServingError as error:
                await _abort(context, error)
            except asyncio.CancelledError:
                if not self._stopping or row.drains:
                    raise
                await _abort(context, ServingError(Kind.UNAVAILABLE, STOPPING))

        # On the wire a single request is a stream that ends after it, so one kind of handler serves every stream.
        return grpc.stream_stream_rpc_method_handler(handle)


def _call(context: "grpc.aio.ServicerContext[bytes, bytes]") -> Call:
    left_s = context.time_remaining()
    deadline_ns = 0 if left_s is None else time.monotonic_ns() + int(left_s * 1e9)
    return Call(tuple(context.invocation_metadata() or ()), deadline_ns)


async def _abort(context: "grpc.aio.ServicerContext[bytes, bytes]", error: ServingError) -> NoReturn:
    await context.abort(CODES[STATUS[error.kind]], details(error))


async def _refuse(_bodies: AsyncIterator[bytes], context: "grpc.aio.ServicerContext[bytes, bytes]") -> None:
    await _abort(context, ServingError(Kind.UNAVAILABLE, STOPPING))
