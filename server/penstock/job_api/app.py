"""The ASGI application for every path under `/v2` that is not OIP's: keys, rates, and which dialect answers."""

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol, TypeAlias
from urllib.parse import parse_qsl, unquote

import orjson
from msgspec import Struct
from starlette.types import Receive, Scope, Send

from penstock import json_text
from penstock.access import ID_LIMIT, names, plain
from penstock.errors import Kind, ServingError
from penstock.http_api.answers import Answer, answer
from penstock.http_api.infer import REQUEST_ID
from penstock.job_api.inputs import VALIDATION_ERROR, FieldError
from penstock.job_api.rates import Rates, Window

logger = logging.getLogger(__name__)

NO_JSON = 'the literals NaN and Infinity are no JSON; where a tensor wants them, write "NaN" or "Infinity"'

Check: TypeAlias = Callable[[str | None, str], None]  # of an Authorization header and a scope; raises ServingError


class GoneError(Exception):
    """The client went away before its request was complete."""


class Call(Struct):
    """One request to the job API."""

    verb: str
    path: tuple[str, ...]  # decoded segments after /v2
    query: Mapping[str, str]
    scope: Scope
    receive: Receive
    window: Window | None = None  # what is left of the rate it counts against
    _gone: "asyncio.Task[None] | None" = None

    @property
    def id(self) -> str:
        """The id of the request: its client's or, with the access log on, one that it was given; else ""."""
        id: bytes = dict(self.scope["headers"]).get(REQUEST_ID, b"")
        return id.decode("latin-1")[:ID_LIMIT]

    async def document(self, limit_bytes: int) -> Any:
        """The body's JSON, whatever content type it claims; None for an empty body. Raises ServingError."""
        body = await self._body(limit_bytes)
        if not body.strip():
            return None
        try:
            return orjson.loads(body)
        except orjson.JSONDecodeError:
            json_text.loads(body)  # raises, saying what is wrong and where
            raise ServingError(Kind.INVALID, NO_JSON) from None

    async def _body(self, limit_bytes: int) -> bytes:
        parts: list[bytes] = []
        size = 0
        while True:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise GoneError
            part: bytes = message.get("body", b"")
            size += len(part)
            if size > limit_bytes:
                raise ServingError(Kind.TOO_LARGE, f"the body exceeds the limit of {limit_bytes} bytes")
            if not message.get("more_body", False):
                return b"".join([*parts, part]) if parts else part
            parts.append(part)

    def gone(self) -> "asyncio.Task[None]":
        """Is done once the client has gone away. Ask only after the body was read, or where there is none to read."""
        if self._gone is None:
            self._gone = asyncio.create_task(self._watch())
        return self._gone

    async def _watch(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass

    def close(self) -> None:
        if self._gone is not None:
            self._gone.cancel()


class Operation(Struct, frozen=True):
    """What a path asks for."""

    name: str  # under which its rate is limited
    verbs: tuple[str, ...]
    run: Callable[[Call], Awaitable[Answer]]
    endpoint: str = ""  # whose rate is counted


class Dialect(Protocol):
    """A way to speak of jobs."""

    def find(self, path: tuple[str, ...]) -> Operation | None:
        """What a path below /v2 asks for; None if nothing does."""

    def failure(self, error: ServingError, id: str) -> Answer:
        """What a client is told, whose request had this id, or "" for none."""

    def rated(self, answer: Answer, window: Window) -> Answer:
        """The answer with what is said about a rate."""


class JobApp:
    """Serves the job API: an ASGI application. Holds no state of a request."""

    def __init__(self, runpod: Dialect, tensorone: Dialect, rates: Rates, check: Check | None = None) -> None:
        """`check` lets an Authorization header pass or raises; without it everybody may call."""
        self._dialects = {"endpoints": tensorone, "jobs": tensorone}
        self._runpod = runpod
        self._rates = rates
        self._check = check

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Users leave a slash at the end of the base URL, and clients add one (1).
        segments = [unquote(part) for part in scope["raw_path"].decode("latin-1").split("/") if part]
        path = tuple(segments[1:])
        dialect = self._dialects.get(path[0], self._runpod) if path else self._runpod
        query = scope["query_string"]
        call = Call(scope["method"], path, dict(parse_qsl(query.decode("latin-1"))) if query else {}, scope, receive)
        try:
            given = await self._answer(call, dialect)
        except GoneError:
            return
        except ServingError as error:
            given = dialect.failure(error, call.id)
        except Exception as bug:
            about = (scope["method"], scope["path"], plain(call.id or "<id_unknown>"))
            logger.error("%s %s failed on request %s", *about, exc_info=bug, extra=names(call.id))
            text = f"internal error: {type(bug).__name__}; the server's log says more"
            given = dialect.failure(ServingError(Kind.INTERNAL, text), call.id)
        finally:
            call.close()
        status, headers, body = dialect.rated(given, call.window) if call.window is not None else given
        if status >= 400 and any(name == b"expect" for name, _ in scope["headers"]):
            headers = [*headers, (b"connection", b"close")]  # a client that waits for `100 Continue` sends no body now
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if call.verb == "HEAD" else b"".join(body)})

    async def _answer(self, call: Call, dialect: Dialect) -> Answer:
        who = next((value for name, value in call.scope["headers"] if name == b"authorization"), b"")
        if self._check is not None:
            self._check(who.decode("latin-1") if who else None, "jobs")
        operation = dialect.find(call.path)
        if operation is None:
            raise ServingError(Kind.NOT_FOUND, "Not Found")
        if ("GET" if call.verb == "HEAD" else call.verb) not in operation.verbs:
            status, headers, body = dialect.failure(MethodError(), call.id)
            return status, [*headers, (b"allow", ", ".join(operation.verbs).encode())], body
        call.window = self._rates.take(operation.name, operation.endpoint, who)
        if call.window is not None and call.window.spent:
            raise ServingError(
                Kind.LIMITED,
                f"{operation.name} is limited to {call.window.limit} requests in {call.window.seconds} s; try again in "
                f"{call.window.reset_s} s",
            )
        return await operation.run(call)


class MethodError(ServingError):
    """The path is served, but not with this method: 405."""

    def __init__(self) -> None:
        super().__init__(Kind.INVALID, "Method Not Allowed")


def members(document: Any) -> dict[str, Any]:
    """A body that must be an object. Raises FieldError."""
    if type(document) is not dict:
        raise FieldError("body", "expected a JSON object", VALIDATION_ERROR)
    return document


def page(query: Mapping[str, str], number: Callable[[str, str], int]) -> tuple[int, int]:
    """`offset` and `limit` of a query."""
    offset, limit = (number(query.get(name, default), name) for name, default in (("offset", "0"), ("limit", "50")))
    if offset < 0 or not 0 < limit <= 1000:
        raise FieldError("limit", "expected an offset from 0 on and a limit from 1 to 1000", VALIDATION_ERROR)
    return offset, limit


def dumped(value: Any, status: int = 200) -> Answer:
    return answer(status, [orjson.dumps(value)])


def bound(function: Callable[..., Awaitable[Answer]], *arguments: Any) -> Callable[[Call], Awaitable[Answer]]:
    """An operation of which all but the call is known."""
    return functools.partial(function, *arguments)
