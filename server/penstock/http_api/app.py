"""The ASGI application: inference past the router, every other path a row of `control.METHODS`."""

import asyncio
import functools
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

from starlette.convertors import Convertor, register_url_convertor
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from penstock import oip_json
from penstock.access import ID_LIMIT, Visit, new_id
from penstock.auth import Category, Guard
from penstock.control import METHODS, Method
from penstock.engine import Engine
from penstock.errors import Kind, ServingError
from penstock.http_api.answers import METHOD_NOT_ALLOWED, NOT_FOUND, Answer, Body, Headers, dumped, failure
from penstock.http_api.infer import REQUEST_ID, Door, Exchange, infer_target, serve_infer
from penstock.settings import Settings

# A disconnect is watched only from then on: a task per request costs more than most requests.
WATCH_AFTER_S = 0.020


# What the protocol and its extensions call things right below /v2, served here or not: no job endpoint is called so.
WORDS = frozenset({"health", "models", "repository", "systemsharedmemory", "cudasharedmemory", "trace", "logging"})


class HttpApp:
    """Serves one engine. Holds no state of a request."""

    def __init__(
        self, engine: Engine, settings: Settings, guard: Guard | None = None, jobs: ASGIApp | None = None
    ) -> None:
        """`jobs` serves all below /v2 but WORDS. Raises ServingError(INVALID) for a setting that cannot be met."""
        self.door = Door(engine, settings, guard)
        self._jobs = jobs
        self._limit_bytes = settings.http_max_body_size
        paths: dict[str, dict[str, Method]] = {}
        for method in METHODS:
            for verb, path in method.http:
                paths.setdefault(path, {})[verb] = method
        self._router = Router(
            [
                Route(path.replace("{version}", "{version:version}"), _Endpoint(self.door, settings, paths[path]))
                for path in sorted(paths, key=lambda path: path.count("{"))  # `/v2/models/stats` is no model
            ],
            redirect_slashes=False,
            default=self._not_found,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._router(scope, receive, send)
            return
        path: bytes = scope["raw_path"]
        target = infer_target(path)
        if target is None:
            scope = _named(self.door, scope)
            send = _noted(self.door, scope, send)
        if target is None and self._jobs is not None and _is_job(path):
            await self._jobs(scope, receive, send)
        elif target is None:
            # Matched as it came and decoded afterwards, so that an encoded slash cannot end a segment.
            await self._router({**scope, "path": path.decode("latin-1"), "root_path": ""}, receive, send)
        else:
            await self._infer(scope, receive, send, *target)

    async def _infer(self, scope: Scope, receive: Receive, send: Send, model: str, version: str) -> None:
        try:
            head = self.door.head(model, version, dict(scope["headers"]))
            if scope["method"] != "POST":
                await _send(
                    scope, _noted(self.door, _named(self.door, scope), send), *_early(scope, METHOD_NOT_ALLOWED)
                )
                return
            body = await _read(head.headers, receive, self._limit_bytes)
        except ServingError as error:
            await refused(self.door, error)(scope, receive, send)
            return
        if body is None:
            return
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        exchange = serve_infer(self.door, head, body, functools.partial(_settle, future))
        if exchange is not None:
            await _wait(future, exchange, receive)
        await _send(scope, send, *future.result())

    async def _not_found(self, scope: Scope, _receive: Receive, send: Send) -> None:
        refusal = _refusal(self.door, scope, None)
        await _send(scope, send, *(refusal or _early(scope, NOT_FOUND)))


def _is_job(path: bytes) -> bool:
    """Whether a path below /v2 is the job API's. Clients may have doubled the slash before its first word."""
    if not path.startswith(b"/v2/"):
        return False
    word = path[4:].lstrip(b"/").partition(b"/")[0]
    return bool(word) and unquote_to_bytes(word).decode(errors="replace") not in WORDS


async def _read(headers: Mapping[bytes, bytes], receive: Receive, limit_bytes: int) -> bytes | None:
    """The request's body; None if the client went away. Raises ServingError(TOO_LARGE) as soon as it is known."""
    declared = headers.get(b"content-length", b"")
    if len(declared) > len(str(limit_bytes)) or (declared.isdigit() and int(declared) > limit_bytes):
        raise _body_too_large(declared.decode("latin-1"), limit_bytes)
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        part: bytes = message.get("body", b"")
        size += len(part)
        if size > limit_bytes:
            raise _body_too_large(f"at least {size}", limit_bytes)
        if not message.get("more_body", False):
            return b"".join([*parts, part]) if parts else part
        parts.append(part)


def _body_too_large(size: str, limit_bytes: int) -> ServingError:
    return ServingError(
        Kind.TOO_LARGE,
        f"request body of {size} bytes exceeds the maximum allowed body size of {limit_bytes} bytes. "
        "Use --http-max-body-size to increase the limit.",
    )


def _settle(future: "asyncio.Future[Answer]", status: int, headers: Headers, body: Body) -> None:
    if not future.done():  # cancelled, where the server stops before the answer comes
        future.set_result((status, headers, body))


async def _wait(future: "asyncio.Future[Answer]", exchange: Exchange, receive: Receive) -> None:
    """Wait for the answer, and after a while also for the client to go away."""
    loop = asyncio.get_running_loop()
    watchers: list[asyncio.Task[None]] = []
    timer = loop.call_later(WATCH_AFTER_S, lambda: watchers.append(loop.create_task(_watch(exchange, receive))))
    try:
        await future
    except asyncio.CancelledError:
        exchange.cancel(ServingError(Kind.CANCELLED, "the server stopped waiting"))
        raise
    finally:
        timer.cancel()
        for watcher in watchers:
            watcher.cancel()


async def _watch(exchange: Exchange, receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    exchange.cancel(ServingError(Kind.CANCELLED, "the client went away"))


class _Endpoint:
    """One path: the control methods of one category that answer there, by verb. An ASGI callable."""

    def __init__(self, door: Door, settings: Settings, methods: Mapping[str, Method]) -> None:
        self._door = door
        self._settings = settings
        self._methods = methods
        (self._category,) = {method.category for method in methods.values()}
        self._keyless = all(method.keyless for method in methods.values())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if refusal := _refusal(self._door, scope, self._category, self._keyless):
            await _send(scope, send, *refusal)
            return
        verb = "GET" if scope["method"] == "HEAD" else scope["method"]
        method = self._methods.get(verb)
        if method is None:
            await _send(scope, send, *_early(scope, METHOD_NOT_ALLOWED))
            return
        try:
            fields = await self._body_fields(scope, receive) if verb == "POST" else {}
            if fields is None:
                return
            for key, value in scope["path_params"].items():
                fields[key] = unquote(value)
            answer = _answer(method, await self._call(method, fields))
        except Exception as error:  # noqa: BLE001 - the client must be told of whatever it was
            answer = failure(error)
        await _send(scope, send, *answer)

    async def _body_fields(self, scope: Scope, receive: Receive) -> dict[str, Any] | None:
        """The members of the body; none for an empty body. None if the client went away."""
        body = await _read(dict(scope["headers"]), receive, self._settings.http_max_body_size)
        if body is None:
            return None
        fields = oip_json.parse(body, self._settings.http_max_input_size) if body else {}
        if not isinstance(fields, dict):
            raise ServingError(Kind.INVALID, "attempt to get members for non-object")
        return fields

    async def _call(self, method: Method, fields: dict[str, Any]) -> Any:
        if method.blocking:
            return await asyncio.to_thread(method.call, self._door.engine, fields)
        return method.call(self._door.engine, fields)


def _answer(method: Method, value: Any) -> Answer:
    return dumped(*(method.http_shape(value) if method.http_shape else (200, value)))


def _refusal(door: Door, scope: Scope, category: Category | None, keyless: bool = False) -> Answer | None:
    """What a caller is told who may not ask for this, before anything else; None for one who may."""
    if door.guard is None:
        return None
    try:
        door.admit(category, dict(scope["headers"]), keyless)
    except ServingError as error:
        return _early(scope, failure(error))
    return None


def refused(door: Door, error: ServingError) -> ASGIApp:
    """Answers one request whose body is not wanted."""

    async def refuse(scope: Scope, _receive: Receive, send: Send) -> None:
        await _send(scope, _noted(door, _named(door, scope), send), *_early(scope, failure(error)))

    return refuse


def _early(scope: Scope, answer: Answer) -> Answer:
    """`answer`, given before the body was read: a client that still waits for `100 Continue` will not send it now."""
    status, headers, body = answer
    waits = any(name == b"expect" for name, _ in scope["headers"])
    return (status, [*headers, (b"connection", b"close")], body) if waits else answer


def _named(door: Door, scope: Scope) -> Scope:
    """A request that the access log will speak of has an id: without one of its client's it is given one, and bears it
    where a client's would be.
    """
    headers = scope["headers"]
    if not door.access_log or dict(headers).get(REQUEST_ID):
        return scope
    return {**scope, "headers": [*headers, (REQUEST_ID, new_id().encode())]}


def _noted(door: Door, scope: Scope, send: Send) -> Send:
    """How to answer what is no inference: with the request's id, and a line in the access log where that is on."""
    fields = dict(scope["headers"])
    id: bytes = fields.get(REQUEST_ID, b"")
    visit = None
    if door.access_log:
        path = scope["raw_path"].decode("latin-1")
        visit = Visit("http", scope["method"], path, id.decode("latin-1")[:ID_LIMIT])
        length = fields.get(b"content-length", b"")
        visit.request_bytes = int(length) if length.isdigit() else 0
    elif not id:
        return send
    status = sent = 0

    async def noted(message: Message) -> None:
        nonlocal status, sent
        if message["type"] == "http.response.start":
            status = message["status"]
            message["headers"] = [*message["headers"], (REQUEST_ID, id)]
        else:
            sent += len(message["body"])
        await send(message)
        if visit is not None and message["type"] == "http.response.body" and not message.get("more_body"):
            visit.end(status, sent)

    return noted


async def _send(scope: Scope, send: Send, status: int, headers: Headers, body: Body) -> None:
    content = b"" if scope["method"] == "HEAD" else b"".join(body)
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


class _Version(Convertor[str]):
    """A version in a path: decimal digits. Anything else matches no path."""

    regex = "[0-9]+"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("version", _Version())
