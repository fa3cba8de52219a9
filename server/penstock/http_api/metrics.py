"""The metrics port: one page of Prometheus text."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

from penstock import gpu_metrics, metrics
from penstock.auth import Keys
from penstock.engine import Engine
from penstock.errors import ServingError
from penstock.http_api.answers import METHOD_NOT_ALLOWED, NOT_FOUND, Answer, answer, failure
from penstock.process_metrics import ProcessMetrics

Event: TypeAlias = MutableMapping[str, Any]
More: TypeAlias = Callable[[], Awaitable[bytes]]


class MetricsApp:
    """An ASGI application: `GET /metrics`."""

    def __init__(self, engine: Engine, keys: Keys | None = None, more: More | None = None) -> None:
        """`more` gives text that others have to add: the job API."""
        self._engine = engine
        self._keys = keys
        settings = engine.settings
        self._process = ProcessMetrics(settings.allow_cpu_metrics, settings.metrics_interval_ms)
        self._gpus = gpu_metrics.find() if settings.allow_gpu_metrics else None
        self._more = more

    async def __call__(
        self, scope: Event, _receive: Callable[[], Awaitable[Event]], send: Callable[[Event], Awaitable[None]]
    ) -> None:
        status, headers, body = await self._answer(scope)
        content = b"" if scope["method"] == "HEAD" else b"".join(body)
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    async def _answer(self, scope: Event) -> Answer:
        if self._keys is not None:
            try:
                self._keys.check(dict(scope["headers"]).get(b"authorization", b"").decode("latin-1"), "metrics")
            except ServingError as error:
                return failure(error)
        if scope["path"].rstrip("/") != "/metrics":
            return NOT_FOUND
        if scope["method"] not in ("GET", "HEAD"):
            return METHOD_NOT_ALLOWED
        text = [metrics.render(self._engine, self._process, self._gpus)]
        if self._more is not None:
            text.append(await self._more())
        return answer(200, text, content_type=metrics.CONTENT_TYPE.encode())
