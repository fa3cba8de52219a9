"""A whole job API in process: a real engine, worker, outbox and door, on a test's store and model instances."""

import asyncio
import contextlib
import functools
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from penstock import pb
from penstock.engine import Engine
from penstock.errors import Kind, ServingError
from penstock.http_api import HttpApp
from penstock.job_api.app import Check
from penstock.job_api.service import JobService
from penstock.job_api.store import JobStore
from penstock.messages import InferRequest, InferResponse
from penstock.runtime import Cancelled, Host, Instance, ModelFiles, Placement, Reply, Runtime
from penstock.settings import Settings
from penstock.tensor import BYTES, Tensor, objects

from .fakes import LIMIT_S, EchoInstance, StreamingInstance
from .fakes_jobs import MemoryJobStore

ECHO = """
    backend: "fake"
    input { name: "X" data_type: TYPE_FP32 dims: -1 } output { name: "Y" data_type: TYPE_FP32 dims: -1 }
"""
HANDLER = """
    backend: "handler"
    input { name: "input" data_type: TYPE_STRING dims: 1 } output { name: "output" data_type: TYPE_STRING dims: 1 }
"""


X = {"input": {"X": [1, 2]}}  # a job request for such a model that is no handler


class Shelf:
    """A runtime whose instances are made by the test, by the model's name. `gate` holds loads up while it is closed."""

    def __init__(self, makers: Mapping[str, Callable[[], Instance]]) -> None:
        self.makers = dict(makers)
        self.opened: list[Instance] = []
        self.gate = threading.Event()
        self.gate.set()

    def find(self, name: str, settings: Mapping[str, str]) -> Runtime:
        return self

    def complete(self, files: ModelFiles, config: pb.ModelConfig, place: Placement) -> pb.ModelConfig:
        return config

    def open(self, files: ModelFiles, config: pb.ModelConfig, place: Placement, host: Host | None) -> Instance:
        assert self.gate.wait(LIMIT_S)
        self.opened.append(self.makers[files.model]())
        return self.opened[-1]


class Handler(StreamingInstance):
    """A handler model: `script(value, say)` is run on a thread of its own for each job, and `say` replies."""

    def __init__(self, script: "Callable[[Any, Say], None]", max_in_flight: int = 1) -> None:
        super().__init__(max_in_flight)
        self._handle = script
        self.seen: list[InferRequest] = []

    def start(self, sent: InferRequest, reply: Reply, cancelled: Cancelled) -> None:
        super().start(sent, reply, cancelled)
        self.seen.append(sent)
        value = orjson.loads(sent.inputs["input"].array[0])
        threading.Thread(target=self._handle, args=(value, Say(sent, reply, cancelled)), daemon=True).start()


@dataclass(slots=True)
class Say:
    """What a handler can reply."""

    sent: InferRequest
    reply: Reply
    cancelled: Cancelled

    def __call__(self, value: Any, final: bool = True, partial: bool = False) -> None:
        text = orjson.dumps(value)
        response = InferResponse(self.sent.model, "1", self.sent.id, [Tensor("output", BYTES, objects([text], [1]))])
        self.reply(response, final, partial)

    def fail(self, error: Any) -> None:
        self.reply(error)


class Says:
    """A handler's script that leaves the replying to the test."""

    def __init__(self) -> None:
        self.says: list[Say] = []

    def take(self, _: Any, say: Say) -> None:
        self.says.append(say)

    async def first(self) -> Say:
        """Of the first job, once that has begun."""
        return await self.number(0)

    async def number(self, index: int) -> Say:
        await eventually(lambda: len(self.says) > index)
        return self.says[index]


@dataclass(slots=True)
class Got:
    """An answer."""

    status: int
    headers: dict[bytes, bytes]
    body: bytes

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)


class House:
    """The job API behind the HTTP door, as `penstock serve` puts them together."""

    def __init__(self, engine: Engine, store: JobStore, service: JobService, shelf: Shelf, app: HttpApp) -> None:
        self.engine = engine
        self.store = store
        self.service = service
        self.shelf = shelf
        self.app = app

    async def call(
        self,
        verb: str,
        path: str,
        body: Any = b"",
        headers: Mapping[bytes, bytes] | None = None,
        leaves: asyncio.Event | None = None,
    ) -> Got:
        """The answer to one request; `body` is sent as it is, or as JSON. The client leaves when the event is set."""
        data = body if isinstance(body, bytes) else orjson.dumps(body)
        messages = [{"type": "http.request", "body": data, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await (leaves or asyncio.Event()).wait()
            return {"type": "http.disconnect"}

        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        raw, _, query = path.partition("?")
        scope = {
            "type": "http",
            "method": verb,
            "path": raw,
            "raw_path": raw.encode(),
            "query_string": query.encode(),
            "headers": list((headers or {}).items()),
        }
        await asyncio.wait_for(self.app(scope, receive, send), LIMIT_S)
        start, content = sent
        return Got(start["status"], dict(start["headers"]), content["body"])

    async def post(self, path: str, body: Any = b"") -> Any:
        got = await self.call("POST", path, body)
        assert got.status == 200, got
        return got.json

    async def get(self, path: str) -> Any:
        got = await self.call("GET", path)
        assert got.status == 200, got
        return got.json

    async def until(self, path: str, wanted: Callable[[Any], bool]) -> Any:
        """What a path answers, once it is what is wanted."""
        async with asyncio.timeout(LIMIT_S):
            while not wanted(answer := await self.get(path)):  # noqa: ASYNC110 - a client is told of no change
                await asyncio.sleep(0.005)
        return answer


@contextlib.asynccontextmanager
async def house(
    folder: Path,
    models: Mapping[str, Callable[[], Instance]] | None = None,
    store: JobStore | None = None,
    check: Check | None = None,
    load: bool = True,
    configs: Mapping[str, str] | None = None,
    **options: Any,
) -> AsyncIterator[House]:
    """A house that runs. Models whose instance is a Handler are handler models, the others give Y for X.

    `configs` has what else the configuration of some says.
    """
    makers = models or {"m": EchoInstance}
    for name, make in makers.items():
        (folder / name / "1").mkdir(parents=True, exist_ok=True)
        (folder / name / "1" / "model.txt").touch()
        config = HANDLER if getattr(make, "func", make) is Handler else ECHO
        config = f'name: "{name}" default_model_filename: "model.txt" {config} {(configs or {}).get(name, "")}'
        (folder / name / "config.pbtxt").write_text(config)
    settings = Settings(model_repository=(str(folder),), **{"webhook_allow_private": True, **options})
    shelf = Shelf(makers)
    engine = Engine(settings, shelf.find)
    engine.mailbox()
    if load:
        await asyncio.to_thread(engine.lifecycle.start)
    kept = store or MemoryJobStore()
    service = JobService(engine, settings, kept, "memory", check)
    await service.start()
    try:
        yield House(engine, kept, service, shelf, HttpApp(engine, settings, jobs=service.app))
    finally:
        await service.stop(0)
        await service.close()
        await asyncio.to_thread(engine.lifecycle.stop, 1.0)


async def eventually(holds: Callable[[], object]) -> None:
    """Wait until something holds that nobody tells of."""
    async with asyncio.timeout(LIMIT_S):
        while not holds():  # noqa: ASYNC110 - other threads change it
            await asyncio.sleep(0.001)


Test = Callable[[House], Coroutine[Any, Any, None]]


def run(folder: Path, test: Test, models: Mapping[str, Any] | None = None, **options: Any) -> None:
    async def inside() -> None:
        async with house(folder, models, **options) as made:
            await asyncio.wait_for(test(made), LIMIT_S)

    asyncio.run(inside())


def handler(script: Callable[[Any, Say], None], max_in_flight: int = 1) -> Callable[[], Handler]:
    return functools.partial(Handler, script, max_in_flight)


def echo(value: Any, say: Say) -> None:
    say(value)


def never(value: Any, say: Say) -> None:
    """Runs until it is cancelled."""
    say.cancelled.watch(lambda: say.fail(ServingError(Kind.CANCELLED, "told so")))


def count_to(value: Any, say: Say) -> None:
    for number in range(value["n"]):
        say(number, final=False)
    say([])


async def final(made: House, endpoint: str, id: str) -> Any:
    return await made.until(f"/v2/{endpoint}/status/{id}", lambda job: job["status"] not in ("IN_QUEUE", "IN_PROGRESS"))


async def running(made: House, endpoint: str, id: str) -> Any:
    return await made.until(f"/v2/{endpoint}/status/{id}", lambda job: job["status"] == "IN_PROGRESS")


async def settled() -> None:
    """Let everything run that can without waiting."""
    for _ in range(50):
        await asyncio.sleep(0)
