"""RunPod's dialect: `/v2/{endpoint}/{operation}[/{id}]`. Protocol page jobs, section 1."""

from collections.abc import Awaitable, Callable
from typing import Any

import orjson

from penstock.errors import Kind, ServingError
from penstock.http_api.answers import BESIDES, STATUS, Answer, answer
from penstock.job_api.app import Call, MethodError, Operation, bound, dumped, members, page
from penstock.job_api.batches import Batches
from penstock.job_api.desk import EXECUTION_MS, TTL_MS, WAIT_MS, Desk, Order, clamped, now_ms, whole_number
from penstock.job_api.inputs import INPUT, VALIDATION_ERROR, FieldError
from penstock.job_api.rates import Window
from penstock.job_api.store import Chunks, Job, State
from penstock.lifecycle import State as ModelState

WAIT_DEFAULT_MS = 90_000
STREAM_WAIT_MS = 3_000  # without `wait`: well under the 10 s after which the Python client gives up
PASSED = ("webhook", "s3Config", "policy")  # what a handler finds in its job besides `id` and `input`


class RunPod:
    """The operations, and the shapes of their answers."""

    def __init__(self, desk: Desk, batches: Batches, echo_input: bool = False, gpu: str = "") -> None:
        """The older form (section 3): `echo_input` shows a job's input with its status, `gpu` a class of memory."""
        self._desk = desk
        self._batches = batches
        self._echo_input = echo_input
        self._gpu = gpu

    def find(self, path: tuple[str, ...]) -> Operation | None:
        if len(path) < 2:
            return None
        endpoint, name = path[0], path[1]
        if name == "batch":
            return self._batch(endpoint, path[2:])
        row = OPERATIONS.get(name)
        if row is None or len(path) != 2 + row[1]:
            return None
        verbs, _, run = row
        return Operation(name, verbs, bound(self._run, run, endpoint, *path[2:]), endpoint)

    def _batch(self, endpoint: str, rest: tuple[str, ...]) -> Operation | None:
        table: dict[tuple[int, str], dict[str, Callable[..., Awaitable[Answer]]]] = {
            (0, ""): {"POST": RunPod.new_batch},
            (1, ""): {"GET": RunPod.batch_status, "DELETE": RunPod.cancel_batch},
            (2, "requests"): {"GET": RunPod.batch_requests, "POST": RunPod.add_requests, "PUT": RunPod.add_requests},
            (2, "finalize"): {"POST": RunPod.finalize_batch, "PUT": RunPod.finalize_batch},
            (2, "cancel"): {"POST": RunPod.cancel_batch, "PUT": RunPod.cancel_batch},
        }
        runs = table.get((len(rest), rest[1] if len(rest) == 2 else ""))
        if runs is None:
            return None

        async def run(call: Call) -> Answer:
            return await self._run(runs["GET" if call.verb == "HEAD" else call.verb], endpoint, *rest[:1], call)

        return Operation("batch", tuple(runs), run, endpoint)

    async def _run(self, run: Callable[..., Awaitable[Answer]], endpoint: str, *arguments: Any) -> Answer:
        self._desk.check_endpoint(endpoint)
        return await run(self, endpoint, *arguments)

    # -- answers

    def failure(self, error: ServingError, id: str) -> Answer:  # noqa: ARG002 - which its header tells
        """`{"error"}` and never `id` or `status`: the asyncio client would take that for a job (1.2)."""
        status = 405 if isinstance(error, MethodError) else STATUS[error.kind]
        body: dict[str, Any] = {"error": error.message}
        if isinstance(error, FieldError):
            body |= {"code": error.code, "details": {"field": error.field, "reason": error.reason}}
        return answer(status, [orjson.dumps(body)], *([BESIDES[status]] if status in BESIDES else []))

    def rated(self, given: Answer, window: Window) -> Answer:
        status, headers, body = given
        if not window.spent:
            return given
        others = [header for header in headers if header[0] != b"retry-after"]
        return status, [*others, (b"retry-after", b"%d" % window.reset_s)], body

    async def _shown(self, job: Job) -> Answer:
        fields = shown(job)
        if self._gpu:
            fields["gpu"] = self._gpu
        if self._echo_input:
            whole = await self._desk.store.get(job.request.id, job.request.endpoint, now_ms(), whole=True)
            if whole is not None:
                fields["input"] = orjson.Fragment(whole.request.input)
        return dumped(fields)

    def webhook(self, job: Job) -> bytes:
        """What a webhook carries: the status object, with `input` and `webhook` (1.7)."""
        fields = shown(job)
        fields["input"] = orjson.Fragment(job.request.input)
        fields["webhook"] = job.request.webhook
        return orjson.dumps(fields)

    # -- handing in

    def order(self, endpoint: str, document: Any, request_id: str = "", batch: str = "") -> Order:
        """A job request as it came, with the request of this id. Raises FieldError (1.2)."""
        desk, given = self._desk, members(document)
        policy = given.get("policy")
        policy = {} if policy is None else policy
        if type(policy) is not dict:
            raise FieldError("policy", "expected an object", VALIDATION_ERROR)
        low_priority = policy.get("lowPriority")
        if low_priority is not None and type(low_priority) is not bool:
            raise FieldError("policy.lowPriority", "expected true or false", VALIDATION_ERROR)
        storage = given.get("s3Config")
        if storage is not None and type(storage) is not dict:
            raise FieldError("s3Config", "expected an object", VALIDATION_ERROR)
        passed = {name: given[name] for name in PASSED if given.get(name) is not None}
        return Order(
            endpoint,
            given.get(INPUT),
            desk.bounded(
                policy.get("executionTimeout"), "policy.executionTimeout", EXECUTION_MS, desk.terms.execution_ms
            ),
            desk.bounded(policy.get("ttl"), "policy.ttl", TTL_MS, desk.terms.ttl_ms),
            bool(low_priority),
            desk.webhook(given.get("webhook"), "webhook"),
            passed=orjson.dumps(passed) if passed else b"{}",
            batch=batch,
            request_id=request_id,
        )

    async def run(self, endpoint: str, call: Call) -> Answer:
        order = self.order(endpoint, await call.document(self._desk.sizes.run), call.id)
        request = await self._desk.submit(order)
        return dumped({"id": request.id, "status": State.IN_QUEUE.value})

    async def runsync(self, endpoint: str, call: Call) -> Answer:
        wait_ms = clamped(call.query.get("wait"), "wait", WAIT_MS, WAIT_DEFAULT_MS)
        order = self.order(endpoint, await call.document(self._desk.sizes.runsync), call.id)
        return await self._shown(await self._desk.run(order, wait_ms, call.gone))

    # -- asking

    async def status(self, endpoint: str, id: str, call: Call) -> Answer:
        ttl = call.query.get("ttl")
        left_ms = None if ttl is None else max(0, whole_number(ttl, "ttl"))
        job = await self._desk.find(id, endpoint)
        if left_ms is not None:
            until_ms = now_ms() + left_ms
            if job.state.is_final and until_ms < job.expires_ms:
                await self._desk.store.keep(id, until_ms)
        return await self._shown(job)

    async def status_sync(self, endpoint: str, id: str, call: Call) -> Answer:
        wait_ms = clamped(call.query.get("wait"), "wait", WAIT_MS, WAIT_DEFAULT_MS)
        job = await self._desk.wait(id, endpoint, wait_ms, call.gone)
        return await self._shown(job if job is not None else await self._desk.find(id, endpoint))

    async def stream(self, endpoint: str, id: str, call: Call) -> Answer:
        """Chunks that nobody has had; with `from`, those from an index on, which others may have had (1.8)."""
        wait_ms = clamped(call.query.get("wait"), "wait", (0, WAIT_MS[1]), STREAM_WAIT_MS)
        start = call.query.get("from")
        first = None if start is None else whole_number(start, "from")
        if first is not None and first < 0:
            raise FieldError("from", "expected an index from 0 on", VALIDATION_ERROR)
        await self._desk.find(id, endpoint)
        found: Chunks | None
        if first is None:
            found = await self._desk.drained(id, wait_ms, call.gone)
        else:
            found = await self._desk.chunks(id, first, wait_ms, call.gone)
        if found is None:
            raise ServingError(Kind.NOT_FOUND, f"job '{id}' is not found")
        stream = [{"output": orjson.Fragment(value)} for value in found.values]
        return dumped({"status": found.state.value, "stream": stream})

    async def health(self, endpoint: str, _: Call) -> Answer:
        counts = await self._desk.store.counts(endpoint)
        jobs = {
            "completed": counts.completed,
            "failed": counts.failed,
            "inProgress": counts.in_progress,
            "inQueue": counts.in_queue,
            "retried": counts.retried,
        }
        return dumped({"jobs": jobs, "workers": workers(self._desk, endpoint)})

    async def requests(self, endpoint: str, call: Call) -> Answer:
        offset, limit = page(call.query, whole_number)
        state = None
        if text := call.query.get("status", ""):
            if text not in STATES:
                raise FieldError("status", f"expected one of {', '.join(STATES)}, got '{text}'", VALIDATION_ERROR)
            state = STATES[text]
        return await self._page(endpoint, state, offset, limit, "")

    async def _page(self, endpoint: str, state: State | None, offset: int, limit: int, batch: str) -> Answer:
        found = await self._desk.store.list(endpoint, state, offset, limit, batch)
        return dumped(
            {
                "requests": [shown(job) for job in found.jobs],
                "total": found.total,
                "offset": offset,
                "limit": limit,
                "hasMore": offset + len(found.jobs) < found.total,
            }
        )

    # -- changing

    async def cancel(self, endpoint: str, id: str, _: Call) -> Answer:
        return await self._shown(await self._desk.cancel(id, endpoint))

    async def retry(self, endpoint: str, id: str, _: Call) -> Answer:
        job = await self._desk.retry(id, endpoint)
        return dumped({"id": job.request.id, "status": job.state.value})

    async def purge_queue(self, endpoint: str, _: Call) -> Answer:
        return dumped({"removed": await self._desk.purge(endpoint), "status": "completed"})

    # -- batches (1.9)

    async def new_batch(self, endpoint: str, call: Call) -> Answer:
        documents = await call.document(self._desk.sizes.run)
        id = await self._batches.new(endpoint, self._orders(endpoint, documents, "body"), call.id)
        return dumped({"id": id, "status": "DRAFT"})

    async def add_requests(self, endpoint: str, id: str, call: Call) -> Answer:
        documents = members(await call.document(self._desk.sizes.run)).get("requests")
        await self._batches.extend(endpoint, id, self._orders(endpoint, documents, "requests"), call.id)
        return dumped(await self._batches.status(endpoint, id))

    def _orders(self, endpoint: str, documents: Any, field: str) -> list[Any]:
        """Job requests that have been looked at, still as they came. Raises FieldError."""
        if type(documents) is not list:
            raise FieldError(field, "expected a list of job requests", VALIDATION_ERROR)
        for index, document in enumerate(documents):
            try:
                self._desk.accept(self.order(endpoint, document), "", 0)
            except FieldError as error:
                raise FieldError(f"{field}[{index}].{error.field}", error.reason, error.code) from None
        return documents

    async def batch_status(self, endpoint: str, id: str, _: Call) -> Answer:
        return dumped(await self._batches.status(endpoint, id))

    async def batch_requests(self, endpoint: str, id: str, call: Call) -> Answer:
        await self._batches.status(endpoint, id)
        return await self._page(endpoint, None, *page(call.query, whole_number), id)

    async def finalize_batch(self, endpoint: str, id: str, _: Call) -> Answer:
        await self._batches.finalize(endpoint, id, lambda document, by: self.order(endpoint, document, by, id))
        return dumped(await self._batches.status(endpoint, id))

    async def cancel_batch(self, endpoint: str, id: str, _: Call) -> Answer:
        await self._batches.cancel(endpoint, id)
        return dumped(await self._batches.status(endpoint, id))


STATES = {state.value: state for state in State} | {"RUNNING": State.IN_PROGRESS}  # the second is read, never written
READ = ("GET", "POST")
# By the word in the path: methods, how many segments follow it, and what answers.
OPERATIONS: dict[str, tuple[tuple[str, ...], int, Callable[..., Awaitable[Answer]]]] = {
    "run": (("POST",), 0, RunPod.run),
    "runsync": (("POST",), 0, RunPod.runsync),
    "status": (READ, 1, RunPod.status),
    "status-sync": (READ, 1, RunPod.status_sync),
    "stream": (READ, 1, RunPod.stream),
    "cancel": (("POST",), 1, RunPod.cancel),
    "retry": (("POST",), 1, RunPod.retry),
    "purge-queue": (("POST",), 0, RunPod.purge_queue),
    "health": (("GET",), 0, RunPod.health),
    "requests": (("GET",), 0, RunPod.requests),
}
NOTHING = (None, b"null", b"{}")  # outputs that are not shown


def shown(job: Job) -> dict[str, Any]:
    """The status object (1.5)."""
    state = job.state
    fields: dict[str, Any] = {"id": job.request.id, "status": state.value}
    if state is State.IN_QUEUE:
        return fields
    if job.started_ms:
        fields["delayTime"] = max(0, job.started_ms - job.queued_ms)
    if state.is_final and (job.started_ms or state is State.TIMED_OUT):
        fields["executionTime"] = max(0, job.finished_ms - job.started_ms) if job.started_ms else 0
    output = job.progress if state is State.IN_PROGRESS else job.output
    if output not in NOTHING:
        fields["output"] = orjson.Fragment(output)
    if job.error is not None and state in (State.FAILED, State.TIMED_OUT):
        fields["error"] = job.error
    if job.started_ms:
        fields["workerId"] = job.worker
    if job.retries:
        fields["retries"] = job.retries
    return fields


def workers(desk: Desk, endpoint: str) -> dict[str, int]:
    """Instances of an endpoint's model in this process: loaded ones, those whose process is being replaced, and whether
    there is a version that is not loaded.
    """
    lifecycle = desk.engine.lifecycle
    ready = replaced = 0
    if lifecycle.ready_versions(endpoint):
        model = desk.engine.model(endpoint)
        ready = model.ready_workers
        replaced = model.workers - ready
    running = min(ready, desk.worker.running(endpoint))
    states = lifecycle.states(endpoint)
    return {
        "idle": ready - running,
        "initializing": states.count(ModelState.LOADING) + replaced,
        "ready": ready,
        "running": running,
        "throttled": 0,
        "unhealthy": 0 if ready or replaced else states.count(ModelState.UNAVAILABLE),
    }
