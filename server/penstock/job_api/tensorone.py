"""TensorOne's dialect: `/v2/endpoints/…` and `/v2/jobs/…`. Protocol page jobs, section 2."""

import asyncio
import csv
import io
import time
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import orjson

import penstock
from penstock.errors import Kind, ServingError
from penstock.http_api.answers import BESIDES, STATUS, Answer, answer
from penstock.job_api.app import Call, MethodError, Operation, bound, dumped, members
from penstock.job_api.desk import Desk, Order, clamped, now_ms, whole_number
from penstock.job_api.endpoints import is_endpoint
from penstock.job_api.inputs import INPUT, INVALID_INPUT, VALIDATION_ERROR, FieldError, is_handler
from penstock.job_api.journal import LEVELS, iso
from penstock.job_api.rates import Window
from penstock.job_api.store import Job, State
from penstock.lifecycle import State as ModelState
from penstock.model import Model, zeros

WAIT_MS = 300_000  # of runsync: the clients' advised timeout
PRIORITIES = ("low", "normal", "high")
CHECKS = ("basic", "detailed", "deep")
LOG_LINES = "1000"  # that are shown if not said
MOST_IDS = 1000  # in a request for many
WORDS = {
    State.IN_QUEUE: "queued",
    State.IN_PROGRESS: "running",
    State.COMPLETED: "completed",
    State.FAILED: "failed",
    State.CANCELLED: "cancelled",
    State.TIMED_OUT: "timed_out",
}
CODES = {
    400: VALIDATION_ERROR,
    401: "UNAUTHORIZED",
    403: "FORBIDDEN",
    404: "RESOURCE_NOT_FOUND",
    405: "METHOD_NOT_ALLOWED",
    413: "PAYLOAD_TOO_LARGE",
    429: "RATE_LIMIT_EXCEEDED",
    503: "SERVICE_UNAVAILABLE",
}


class TensorOneError(ServingError):
    """A failure with this dialect's own code and details."""

    def __init__(self, kind: Kind, status: int, code: str, message: str, **details: str) -> None:
        super().__init__(kind, message)
        self.status = status
        self.code = code
        self.details = details


class TensorOne:
    """The operations, and the shapes of their answers."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def find(self, path: tuple[str, ...]) -> Operation | None:
        match path:
            case ("endpoints", "health", "batch"):
                return Operation("health", ("POST",), self.health_batch)
            case ("jobs", "status", "batch"):
                return Operation("status", ("POST",), self.status_batch)
            case ("endpoints", endpoint):
                return Operation("details", ("GET",), bound(self._of, self.details, endpoint), endpoint)
            case ("endpoints", endpoint, word) if word in self.ENDPOINT:
                name, verb, run = self.ENDPOINT[word]
                return Operation(name, (verb,), bound(self._of, bound(run, self), endpoint), endpoint)
            case ("jobs", id, "status"):
                return Operation("status", ("GET",), bound(self.status, id))
            case ("jobs", id, "cancel"):
                return Operation("cancel", ("POST",), bound(self.cancel, id))
        return None

    async def _of(self, run: Callable[..., Awaitable[Answer]], endpoint: str, call: Call) -> Answer:
        self._check_endpoint(endpoint)
        return await run(endpoint, call)

    def _check_endpoint(self, endpoint: str) -> None:
        try:
            self._desk.check_endpoint(endpoint)
        except ServingError as error:
            raise TensorOneError(error.kind, 404, "ENDPOINT_NOT_FOUND", error.message) from None

    # -- answers

    def failure(self, error: ServingError, id: str) -> Answer:
        status = 405 if isinstance(error, MethodError) else STATUS[error.kind]
        code, details = CODES.get(status, "INTERNAL_ERROR"), {}
        if isinstance(error, FieldError):
            code, details = error.code, {"field": error.field, "reason": error.reason}
        elif isinstance(error, TensorOneError):
            status, code, details = error.status, error.code, error.details
        elif status == 403:
            details = {"required_permission": "jobs"}
        body = {
            "error": code,
            "message": error.message,
            "code": status,
            "details": details,
            "request_id": id or f"req_{uuid.uuid4().hex[:16]}",
            "timestamp": iso(now_ms()),
        }
        return answer(status, [orjson.dumps(body)], *([BESIDES[status]] if status in BESIDES else []))

    def rated(self, given: Answer, window: Window) -> Answer:
        status, headers, body = given
        shown = [
            (b"x-ratelimit-limit", window.limit),
            (b"x-ratelimit-remaining", window.remaining),
            (b"x-ratelimit-reset", round(window.ends_s)),
            (b"x-ratelimit-window", window.seconds),
        ]
        if window.spent:
            headers = [header for header in headers if header[0] != b"retry-after"]
            shown.append((b"retry-after", window.reset_s))
        return status, [*headers, *((name, b"%d" % value) for name, value in shown)], body

    def webhook(self, job: Job) -> bytes:
        """What a callback carries: the job's status."""
        return orjson.dumps(self._status(job))

    # -- handing in

    def _order(self, endpoint: str, given: dict[str, Any], call: Call) -> Order:
        """Raises FieldError."""
        priority, tags = given.get("priority", "normal"), given.get("tags", {})
        if priority not in PRIORITIES:
            raise FieldError("priority", f"expected one of {', '.join(PRIORITIES)}", VALIDATION_ERROR)
        if type(tags) is not dict or not all(type(tag) is str for tag in tags.values()):
            raise FieldError("tags", "expected an object of strings", VALIDATION_ERROR)
        if type(given.get("async", True)) is not bool:
            raise FieldError("async", "expected true or false", VALIDATION_ERROR)
        terms = self._desk.terms
        return Order(
            endpoint,
            given.get(INPUT),
            terms.execution_ms,
            terms.ttl_ms,
            priority == "low",
            self._desk.webhook(given.get("callbackUrl"), "callbackUrl"),
            "tensorone",
            tags=orjson.dumps({"priority": priority, "tags": tags}),
            request_id=call.id,
        )

    async def runsync(self, endpoint: str, call: Call) -> Answer:
        given = members(await call.document(self._desk.sizes.runsync))
        return await self._run(self._order(endpoint, given, call), call)

    async def runasync(self, endpoint: str, call: Call) -> Answer:
        given = members(await call.document(self._desk.sizes.run))
        order = self._order(endpoint, given, call)
        if given.get("async") is False:
            return await self._run(order, call)
        request = await self._desk.submit(order)
        return dumped({"jobId": request.id, "status": WORDS[State.IN_QUEUE]}, 202)

    async def _run(self, order: Order, call: Call) -> Answer:
        job = await self._desk.run(order, WAIT_MS, call.gone)
        id = job.request.id
        match job.state:
            case State.COMPLETED:
                return dumped(
                    {
                        "output": orjson.Fragment(job.output or b"null"),
                        "executionTime": (job.finished_ms - job.started_ms) / 1000,
                        "status": WORDS[job.state],
                        "metadata": self._metadata(job),
                    }
                )
            case State.FAILED:
                reason = job.error or ""
                if reason.startswith(f"{INVALID_INPUT}: "):  # the model was not loaded yet when the job came
                    field, _, reason = reason.removeprefix(f"{INVALID_INPUT}: ").partition(": ")
                    raise FieldError(field, reason)
                raise TensorOneError(
                    Kind.INTERNAL, 500, "EXECUTION_FAILED", f"job '{id}' failed", reason=reason, jobId=id
                )
            case State.CANCELLED:
                raise TensorOneError(
                    Kind.CANCELLED, 409, "STATE_CONFLICT", f"job '{id}' was cancelled", current_state="cancelled",
                    required_state="completed", jobId=id,
                )  # fmt: skip
        reason = job.error or f"the job has not ended within {WAIT_MS // 1000} s"
        raise TensorOneError(Kind.DEADLINE, 504, "ENDPOINT_TIMEOUT", reason, jobId=id)

    def _metadata(self, job: Job) -> dict[str, Any]:
        endpoint = job.request.endpoint
        versions = self._desk.engine.lifecycle.ready_versions(endpoint)
        return {
            "model": endpoint,
            "modelVersion": versions[-1] if versions else "",
            "jobId": job.request.id,
            "delayTime": max(0, job.started_ms - job.queued_ms) / 1000,
        }

    # -- jobs

    async def status(self, id: str, call: Call) -> Answer:
        form = call.query.get("format", "json")
        if form not in ("json", "summary"):
            raise FieldError("format", "expected json or summary", VALIDATION_ERROR)
        job = await self._find(id)
        return dumped(self._status(job, _list(call.query.get("include")), form == "summary"))

    async def status_batch(self, call: Call) -> Answer:
        given = members(await call.document(self._desk.sizes.run))
        include = _names(given.get("include", []), "include")
        ids = _names(given.get("jobIds"), "jobIds")
        jobs = await asyncio.gather(*map(self._get, ids))
        known = [self._status(job, include) for job in jobs if job is not None]
        missing = [id for id, job in zip(ids, jobs, strict=True) if job is None]
        return dumped({"jobs": known, "notFound": missing})

    async def cancel(self, id: str, _: Call) -> Answer:
        job = await self._find(id)
        if not job.state.is_final:
            ended = await self._desk.cancel(id)
            if ended.state is State.CANCELLED:
                return dumped({"jobId": id, "status": WORDS[ended.state]})
            job = ended
        raise TensorOneError(
            Kind.EXISTS, 409, "STATE_CONFLICT", f"job '{id}' has ended", current_state=WORDS[job.state],
            required_state="queued or running",
        )  # fmt: skip

    async def _find(self, id: str) -> Job:
        job = await self._get(id)
        if job is None:
            message = f"job '{id}' is not found"
            raise TensorOneError(Kind.NOT_FOUND, 404, "JOB_NOT_FOUND", message, resource="job", id=id)
        return job

    async def _get(self, id: str) -> Job | None:
        """A job of any endpoint. What the store keeps of a batch is none: it has no endpoint's name."""
        job = await self._desk.store.get(id, "", now_ms())
        return job if job is not None and is_endpoint(job.request.endpoint) else None

    def _status(self, job: Job, include: tuple[str, ...] = (), summary: bool = False) -> dict[str, Any]:
        request, state = job.request, job.state
        percent, step = _progress(job)
        fields: dict[str, Any] = {"jobId": request.id, "status": WORDS[state], "progress": percent}
        if state is State.COMPLETED:
            fields["result"] = orjson.Fragment(job.output or b"null")
        if job.error is not None:
            fields["error"] = job.error
        if summary:
            return fields
        given = orjson.loads(request.tags)
        fields |= {
            "endpointId": request.endpoint,
            "priority": given.get("priority", "low" if request.low_priority else "normal"),
            "tags": given.get("tags", {}),
            "createdAt": iso(request.created_ms),
        }
        if step is not None:
            fields["currentStep"] = step
        if job.started_ms:
            fields["startedAt"] = iso(job.started_ms)
            fields["metadata"] = self._metadata(job)
            ran_ms = (job.finished_ms if state.is_final else now_ms()) - job.started_ms
            fields["execution"] = {
                "attempt": job.attempt,
                "retries": job.retries,
                "timeoutSeconds": request.execution_timeout_ms / 1000,
                "executionTime": max(0, ran_ms) / 1000,
            }
        if state.is_final:
            fields["completedAt"] = iso(job.finished_ms)
        elif state is State.IN_PROGRESS and (mean_ms := self._mean_ms(request.endpoint)) is not None:
            fields["estimatedCompletion"] = iso(max(now_ms(), job.started_ms + round(mean_ms)))
        if "logs" in include:
            fields["logs"] = list(map(str, self._desk.journal.lines(request.endpoint, job=request.id)))
        if "metrics" in include and job.started_ms:
            fields["metrics"] = {
                "delayTime": max(0, job.started_ms - job.queued_ms) / 1000,
                "executionTime": fields["execution"]["executionTime"],
            }
        if "resources" in include and job.worker:
            ready = self._model(request.endpoint)
            fields["resources"] = {"workerId": job.worker, "devices": list(ready.devices) if ready else []}
        return fields

    # -- endpoints

    def _model(self, endpoint: str) -> Model | None:
        ready = bool(self._desk.engine.lifecycle.ready_versions(endpoint))
        return self._desk.engine.model(endpoint) if ready else None

    def _mean_ms(self, endpoint: str) -> float | None:
        """How long a request to this model takes on average; None before the first."""
        model = self._model(endpoint)
        if model is None:
            return None
        with model.statistics.lock:
            success = model.statistics.success
            return success.ns / success.count / 1e6 if success.count else None

    async def health(self, endpoint: str, call: Call) -> Answer:
        check = call.query.get("check", "basic")
        timeout_s = clamped(call.query.get("timeout"), "timeout", (1, 30), 10)
        return dumped(await self._health(endpoint, _check_word(check), timeout_s))

    async def health_batch(self, call: Call) -> Answer:
        given = members(await call.document(self._desk.sizes.run))
        check = _check_word(given.get("check", "basic"))
        endpoints = _names(given.get("endpointIds"), "endpointIds")
        return dumped({"endpoints": await asyncio.gather(*(self._listed(name, check) for name in endpoints))})

    async def _listed(self, endpoint: str, check: str) -> dict[str, Any]:
        try:
            self._check_endpoint(endpoint)
        except TensorOneError as error:
            return {"endpointId": endpoint, "status": "unhealthy", "error": error.code}
        return {"endpointId": endpoint, **await self._health(endpoint, check, 10)}

    async def _health(self, endpoint: str, check: str, timeout_s: int) -> dict[str, Any]:
        """`basic` looks at the model's state, `detailed` at the job store too, and `deep` runs the model."""
        started_s = time.monotonic()
        model = self._model(endpoint)
        checks = {"model": "healthy" if model is not None and model.ready_workers else "unhealthy"}
        if check != "basic":
            checks = {"api": "healthy", **checks, "store": await self._store_health(endpoint)}
        if check == "deep" and model is not None:
            checks["inference"] = await _probed(self._desk, model, timeout_s)
        status = "unhealthy" if "unhealthy" in checks.values() else "healthy"
        moment = iso(now_ms())
        if check == "basic":
            return {"status": status, "lastCheck": moment}
        return {
            "endpointId": endpoint,
            "status": status,
            "readiness": model is not None,
            "lastCheck": moment,
            "lastChecked": moment,
            "responseTime": round((time.monotonic() - started_s) * 1000, 3),
            "uptime": round(time.time() - self._desk.engine.started_s, 3),
            "version": penstock.__version__,
            "checks": checks,
        }

    async def _store_health(self, endpoint: str) -> str:
        try:
            await self._desk.store.counts(endpoint)
        except ServingError:
            return "unhealthy"
        return "healthy"

    async def details(self, endpoint: str, _: Call) -> Answer:
        model = self._model(endpoint)
        states = self._desk.engine.lifecycle.states(endpoint)
        started = iso(round(self._desk.engine.started_s * 1000))
        status = "inactive"
        if model is not None:
            status = "active"
        elif ModelState.LOADING in states:
            status = "pending"
        elif self._desk.engine.lifecycle.failures().get(endpoint):
            status = "error"
        return dumped(
            {
                "id": endpoint,
                "name": endpoint,
                "status": status,
                "url": f"/v2/{endpoint}/runsync",
                "templateId": model.config.backend if model else "",
                "gpuType": ",".join(model.devices) if model else "",
                "createdAt": started,
                "updatedAt": started,
                "metrics": self._numbers(endpoint),
                "configuration": {
                    "workerCount": model.workers if model else 0,
                    "maxConcurrency": model.concurrency if model else 0,
                    "timeoutSeconds": self._desk.terms.execution_ms / 1000,
                },
            }
        )

    async def logs(self, endpoint: str, call: Call) -> Answer:
        query = call.query
        level = query.get("level", LEVELS[0]).lower()
        if level not in LEVELS:
            raise FieldError("level", f"expected one of {', '.join(LEVELS)}", VALIDATION_ERROR)
        if query.get("stream", "false").lower() not in ("false", "0"):
            raise FieldError("stream", "logs are not streamed; ask again with startTime", VALIDATION_ERROR)
        form = query.get("format", "json")
        if form not in ("json", "text"):
            raise FieldError("format", "expected json or text", VALIDATION_ERROR)
        offset = max(0, whole_number(query.get("offset", "0"), "offset"))
        limit = max(0, whole_number(query.get("limit", LOG_LINES), "limit"))
        since_ms, until_ms = _moment(query.get("startTime"), "startTime"), _moment(query.get("endTime"), "endTime")
        found = self._desk.journal.lines(
            endpoint, level, query.get("jobId", ""), query.get("search", ""), since_ms, until_ms
        )
        lines = list(map(str, found))[offset : offset + limit]
        if form == "text":
            text = "".join(f"{line}\n" for line in lines).encode()
            return answer(200, [text], content_type=b"text/plain; charset=utf-8")
        return dumped({"logs": lines})

    async def metrics(self, endpoint: str, call: Call) -> Answer:
        """Since the model was loaded; a time frame would need a history, which a scraper of /metrics keeps."""
        numbers = self._numbers(endpoint)
        wanted = _list(call.query.get("metrics"))
        if unknown := [name for name in wanted if name not in numbers]:
            raise FieldError("metrics", f"unknown '{unknown[0]}'; there are {', '.join(numbers)}", VALIDATION_ERROR)
        numbers = {name: value for name, value in numbers.items() if not wanted or name in wanted}
        match call.query.get("format", "json"):
            case "json":
                return dumped(numbers)
            case "csv":
                text = io.StringIO()
                csv.writer(text).writerows([numbers.keys(), numbers.values()])
                return answer(200, [text.getvalue().encode()], content_type=b"text/csv; charset=utf-8")
            case "prometheus":
                lines = [f'tensorone_{name}{{endpoint="{endpoint}"}} {value}\n' for name, value in numbers.items()]
                return answer(200, ["".join(lines).encode()], content_type=b"text/plain; charset=utf-8")
        raise FieldError("format", "expected json, csv or prometheus", VALIDATION_ERROR)

    def _numbers(self, endpoint: str) -> dict[str, float]:
        model = self._model(endpoint)
        succeeded = failed = 0
        ns = 0
        if model is not None:
            with model.statistics.lock:
                succeeded, failed = model.statistics.success.count, model.statistics.fail.count
                ns = model.statistics.success.ns
        return {
            "requestCount": succeeded + failed,
            "averageResponseTime": round(ns / succeeded / 1e6, 3) if succeeded else 0.0,  # milliseconds
            "errorRate": round(failed / (succeeded + failed), 6) if succeeded + failed else 0.0,
            "activeWorkers": min(model.workers, self._desk.worker.running(endpoint)) if model else 0,
        }

    # By the last word of the path: the operation whose rate counts, the method, and what answers.
    ENDPOINT: dict[str, tuple[str, str, Callable[..., Awaitable[Answer]]]] = {  # noqa: RUF012 - never written to
        "runsync": ("runsync", "POST", runsync),
        "runasync": ("run", "POST", runasync),
        "health": ("health", "GET", health),
        "logs": ("logs", "GET", logs),
        "metrics": ("metrics", "GET", metrics),
    }


async def _probed(desk: Desk, model: Model, timeout_s: int) -> str:
    """Whether the model answers to zeros. A handler is not asked: its input has no form that could be made up. Nor is a
    model of sequences: one that was made up could hold a slot of theirs, or wait for one.
    """
    if is_handler(model) or model.signature.sequences:
        return "skipped"
    try:
        async with asyncio.timeout(timeout_s):
            await desk.engine.infer(model, zeros(model.signature, 1, 1))
    except (TimeoutError, ServingError):
        return "unhealthy"
    return "healthy"


def _progress(job: Job) -> tuple[float, str | None]:
    """Percent done, as far as the job has said so, and the step that it names."""
    if job.state is State.COMPLETED:
        return 100, None
    value = orjson.loads(job.progress) if job.progress is not None else None
    named = value if isinstance(value, dict) else {"progress": value}
    percent = named.get("progress")
    step = named.get("step", value if isinstance(value, str) else None)
    done = percent if isinstance(percent, int | float) and not isinstance(percent, bool) else 0
    return min(max(done, 0), 100), step if isinstance(step, str) else None


def _check_word(check: Any) -> str:
    if check not in CHECKS:
        raise FieldError("check", f"expected one of {', '.join(CHECKS)}", VALIDATION_ERROR)
    return str(check)


def _list(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip()) if text else ()


def _names(value: Any, field: str) -> tuple[str, ...]:
    if type(value) is not list or len(value) > MOST_IDS or not all(type(name) is str for name in value):
        raise FieldError(field, f"expected a list of at most {MOST_IDS} strings", VALIDATION_ERROR)
    return tuple(value)


def _moment(text: str | None, field: str) -> int:
    """Epoch milliseconds of an ISO 8601 time, of UTC where it names no zone; 0 for none."""
    if not text:
        return 0
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise FieldError(field, f"expected a time in ISO 8601, got '{text}'", VALIDATION_ERROR) from None
    return round((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)
