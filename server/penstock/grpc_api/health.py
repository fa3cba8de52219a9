"""The standard health service: `""` and the inference service are the server as a whole, other names are models.

A probe of the server needs no API key. To ask for a model does, or else names could be found out by trying.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable

from penstock import pb
from penstock.auth import Category
from penstock.engine import Engine
from penstock.errors import Kind, ServingError
from penstock.grpc_api.calls import Call, Door, Stream, Unary

Request = pb.health.HealthCheckRequest
Response = pb.health.HealthCheckResponse

SERVER = ("", "inference.GRPCInferenceService")


def check(door: Door, message: Request, call: Call, reply: Callable[[Response | ServingError], None]) -> None:
    """Raises ServingError(NOT_FOUND) for a name that is neither the server's nor a model's."""
    _admit(door, message, call)
    lifecycle = door.engine.lifecycle
    if lifecycle.exiting:
        raise ServingError(Kind.UNAVAILABLE, "Server exiting")
    if message.service not in SERVER and not lifecycle.knows(message.service):
        raise ServingError(Kind.NOT_FOUND, f"unknown service '{message.service}'")
    reply(Response(status=status(door.engine, message.service)))


async def watch(door: Door, messages: AsyncIterator[Request], call: Call) -> AsyncGenerator[Response, None]:
    """The status now, and again whenever it has changed, without an end."""
    changed = asyncio.Event()
    mailbox = door.mailbox
    async for message in messages:
        _admit(door, message, call)
        unwatch = door.engine.lifecycle.watch(lambda: mailbox.post(changed.set))
        try:
            last = None
            while True:
                changed.clear()
                now = status(door.engine, message.service)
                if now != last:
                    yield Response(status=now)
                    last = now
                await changed.wait()
        finally:
            unwatch()


def status(engine: Engine, service: str) -> Response.ServingStatus:
    """What a name stands for now; SERVICE_UNKNOWN is a model's that may yet come."""
    if service in SERVER:
        serving = engine.lifecycle.is_ready()
    elif not engine.lifecycle.knows(service):
        return Response.SERVICE_UNKNOWN
    else:
        serving = not engine.lifecycle.exiting and bool(engine.lifecycle.ready_versions(service))
    return Response.SERVING if serving else Response.NOT_SERVING


def _admit(door: Door, message: Request, call: Call) -> None:
    if message.service not in SERVER:
        door.admit(Category.HEALTH, call)


ROWS = (
    Unary(
        "/grpc.health.v1.Health/Check",
        Request.FromString,
        Response.SerializeToString,
        check,
        Category.HEALTH,
        keyless=True,
    ),
    Stream(
        "/grpc.health.v1.Health/Watch",
        Request.FromString,
        Response.SerializeToString,
        watch,
        Category.HEALTH,
        drains=False,
        keyless=True,
    ),
)
