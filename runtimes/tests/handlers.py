"""Handler models made of a few lines, and receivers for their answers."""

import os
import select
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
from penstock import model_config, pb
from penstock.errors import Kind, ServingError
from penstock.messages import InferRequest, InferResponse, JobContext
from penstock.runtime import PLENTY, Cancelled, Credit, ModelFiles, Placement
from penstock.tensor import BYTES, Tensor, objects
from penstock_runtimes.handler import HandlerRuntime
from penstock_runtimes.handler.instance import HandlerInstance

LIMIT_S = 20.0  # no wait takes this long, but a lost answer must not hang a test
CPU = Placement("cpu")
NOBODY = ServingError(Kind.CANCELLED, "nobody waits")

NOTHING = "no answer of its own"


def _value(response: InferResponse) -> Any:
    return orjson.loads(response.outputs[0].array[0]) if response.outputs else NOTHING


class Replies:
    """A reply that keeps what it is given: ("progress" | "chunk" | "final", value or ServingError).

    A final response without outputs is `NOTHING`.
    """

    def __init__(self, credit: Credit = PLENTY) -> None:
        self.given: list[tuple[str, Any]] = []
        self._credit = credit
        self._changed = threading.Condition()

    def __call__(self, result: InferResponse | ServingError, final: bool = True, partial: bool = False) -> Credit:
        kind = "progress" if partial else "final" if final else "chunk"
        value = result if isinstance(result, ServingError) else _value(result)
        with self._changed:
            self.given.append((kind, value))
            self._changed.notify_all()
        return self._credit

    def of(self, kind: str) -> list[Any]:
        return [value for given, value in self.given if given == kind]

    def wait(self, kind: str, number: int = 1) -> list[Any]:
        """The first `number` of a kind, once they have come."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.of(kind)) >= number, LIMIT_S), f"got only {self.given}"
            return self.of(kind)[:number]

    def result(self) -> Any:
        [found] = self.wait("final")
        assert not isinstance(found, ServingError), found
        return found

    def error(self) -> ServingError:
        [found] = self.wait("final")
        assert isinstance(found, ServingError), found
        return found


class Sent(Replies):
    """A request on its way, and its answers."""

    def __init__(
        self,
        instance: HandlerInstance,
        value: Any,
        id: str,
        passed: dict[str, Any] | None,
        credit: Credit,
        request_id: str = "",
    ) -> None:
        super().__init__(credit)
        self.cancelled = Cancelled()
        text = value if isinstance(value, bytes) else orjson.dumps(value)
        request = InferRequest("m", "", id, {"input": Tensor("input", BYTES, objects([text], (1,)))}, {})
        if passed is not None:
            request.job = JobContext(id, orjson.dumps(passed), request_id)
        instance.start(request, self, self.cancelled)


def send(
    instance: HandlerInstance,
    value: Any = None,
    id: str = "j",
    passed: dict[str, Any] | None = None,
    credit: Credit = PLENTY,
    request_id: str = "",
) -> Sent:
    return Sent(instance, value, id, passed, credit, request_id)


def printed(caplog: pytest.LogCaptureFixture, job: str) -> list[str]:
    """What was logged as the output of a job or another request, or of none ("")."""
    records = [record for record in caplog.records if record.name == "penstock.model.m"]
    return [
        record.getMessage() for record in records if (record.__dict__["job"] or record.__dict__["request_id"]) == job
    ]


def write(directory: Path, code: str, name: str = "handler.py") -> ModelFiles:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(textwrap.dedent(code))
    return ModelFiles("m", 1, directory, directory)


def configuration(parameters: dict[str, str], name: str = "handler.py") -> pb.ModelConfig:
    config = pb.ModelConfig(parameters={key: pb.ModelParameter(string_value=text) for key, text in parameters.items()})
    return model_config.identify(config, "m", [name])


@contextmanager
def opened(directory: Path, code: str, **parameters: str) -> Iterator[HandlerInstance]:
    """An instance of the model whose handler file has this code."""
    files, runtime = write(directory, code), HandlerRuntime({})
    done = runtime.complete(files, configuration(parameters), CPU)
    instance = runtime.open(files, done, CPU, None)
    assert isinstance(instance, HandlerInstance)
    try:
        yield instance
    finally:
        instance.close()


def failure(directory: Path, code: str, **parameters: str) -> str:
    """Why the model cannot be loaded."""
    try:
        with opened(directory, code, **parameters):
            raise AssertionError("it was loaded")
    except ServingError as error:
        return error.message


def ends(pid: int) -> bool:
    """Whether a process ends, or has ended."""
    try:
        watched = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([watched], [], [], LIMIT_S)[0])
    finally:
        os.close(watched)


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that nothing tells of."""
    waiting = threading.Event()
    for _ in range(int(LIMIT_S * 100)):
        if condition():
            return
        waiting.wait(0.01)
    raise AssertionError("it did not come to be")
