"""The job API as a client: RunPod's operations, and TensorOne's way to find a job by its id alone."""

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias
from urllib.parse import quote, urlencode

import orjson

from penstock.client.connection import Connection
from penstock.errors import Kind, ServingError

Status: TypeAlias = dict[str, Any]  # a job's status object, as the server gave it

FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")
POLL_MS = 500  # how late progress may be shown; chunks and the end come at once
PATIENCE_S = 60.0  # how long a server that runs a job may be away, as one that is started again
AGAIN_S = 0.5  # between two attempts to reach it


@dataclass(frozen=True, slots=True)
class Look:
    """What a job looks like now."""

    job: Status
    chunks: list[Any] = field(default_factory=list)  # that came since the last look
    restarted: bool = False  # it runs anew: the chunks of before count for nothing
    away: str = ""  # why the server cannot be asked; the rest is as it was


class Jobs:
    """The jobs of a server. Every call may raise ServingError: what the server refused, or that it is not there."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def submit(self, model: str, document: dict[str, Any]) -> Status:
        return self._ask("POST", _path(model, "run"), document)

    def find(self, id: str) -> Status:
        """A job in TensorOne's words, among them `endpointId`: its model."""
        return self._ask("GET", f"/v2/jobs/{_quoted(id)}/status")

    def status(self, model: str, id: str) -> Status:
        return self._ask("GET", _path(model, "status", id))

    def list(self, model: str, state: str, offset: int, limit: int) -> dict[str, Any]:
        """A page of a model's jobs, newest first; `state` "" is any."""
        query = urlencode({"offset": offset, "limit": limit, **({"status": state} if state else {})})
        return self._ask("GET", f"{_path(model, 'requests')}?{query}")

    def cancel(self, model: str, id: str) -> Status:
        return self._ask("POST", _path(model, "cancel", id))

    def retry(self, model: str, id: str) -> Status:
        return self._ask("POST", _path(model, "retry", id))

    def purge(self, model: str) -> dict[str, Any]:
        return self._ask("POST", _path(model, "purge-queue"))

    def follow(self, model: str, id: str) -> Iterator[Look]:
        """Look at a job again and again until it has ended. Takes no chunks away from those who read its stream."""
        job: Status = {"id": id}
        attempt: tuple[Any, Any] | None = None
        start = wait_ms = 0
        restarted = False
        while True:
            query = urlencode({"from": start, "wait": wait_ms})
            read = yield from self._patiently(job, f"{_path(model, 'stream', id)}?{query}")
            job = yield from self._patiently(job, _path(model, "status", id))
            if _attempt(job) != attempt:  # nobody knows of which attempt the chunks are: read them again
                restarted = restarted or start > 0
                attempt, start, wait_ms = _attempt(job), 0, 0
            elif read["status"] in FINAL or job["status"] not in FINAL:  # else its last chunks came since
                start += len(read["stream"])
                wait_ms = POLL_MS
                yield Look(job, [chunk["output"] for chunk in read["stream"]], restarted)
                restarted = False
                if read["status"] in FINAL:
                    return

    def _patiently(self, job: Status, path: str) -> Generator[Look, None, dict[str, Any]]:
        """An answer, asked for again while the server is away."""
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            try:
                return self._ask("GET", path)
            except ServingError as error:
                if error.kind is not Kind.UNAVAILABLE or time.monotonic() > deadline_s:
                    raise
                yield Look(job, away=error.message)
            time.sleep(AGAIN_S)

    def close(self) -> None:
        self._connection.close()

    def _ask(self, verb: str, path: str, document: dict[str, Any] | None = None) -> dict[str, Any]:
        body = [] if document is None else [orjson.dumps(document)]
        _, text = self._connection.ask(verb, path, {"Content-Type": "application/json"}, body)
        try:
            answer = orjson.loads(text)
        except orjson.JSONDecodeError as error:
            raise ServingError(Kind.INTERNAL, f"the server's answer is no JSON: {error}") from error
        if not isinstance(answer, dict):
            raise ServingError(Kind.INTERNAL, "the server's answer is no JSON object")
        return answer


def _attempt(job: Status) -> tuple[Any, Any]:
    """What differs between two runs of a job: who runs it, and when that began."""
    return job.get("workerId"), job.get("delayTime")


def _path(model: str, operation: str, id: str = "") -> str:
    path = f"/v2/{_quoted(model)}/{operation}"
    return f"{path}/{_quoted(id)}" if id else path


def _quoted(name: str) -> str:
    return quote(name, safe="")
