"""The metrics port: one page of Prometheus text."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

from penstock import metrics
from penstock.engine import Engine

Event: TypeAlias = MutableMapping[str, Any]


class MetricsApp:
    """An ASGI application: `GET /metrics`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def __call__(
        self, scope: Event, _receive: Callable[[], Awaitable[Event]], send: Callable[[Event], Awaitable[None]]
    ) -> None:
        status, content_type = 200, "application/json"
        if scope["path"].rstrip("/") != "/metrics":
            status, body = 404, b'{"error":"Not Found"}'
        elif scope["method"] not in ("GET", "HEAD"):
            status, body = 405, b'{"error":"Method Not Allowed"}'
        else:
            content_type, body = metrics.CONTENT_TYPE, metrics.render(self._engine)
        headers = [(b"content-type", content_type.encode()), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})
