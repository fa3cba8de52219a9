"""What the log calls a request, and the access log: a line for each that was answered, through whatever door."""

import logging
import uuid
from time import monotonic_ns

from msgspec import Struct, field

LOGGER = "penstock.access"
ID_LIMIT = 200  # characters of an id that came as a header

logger = logging.getLogger(LOGGER)


class Visit(Struct):
    """One request, from its arrival to its line."""

    door: str  # http, grpc or job
    method: str  # the verb, the gRPC method, or what became of it: run
    path: str  # "" for a job, which was no request when it ran
    id: str = ""  # under which its client knows it; of a job, the id of the request that handed it in
    model: str = ""
    version: str = ""
    request_bytes: int = 0
    job: str = ""  # its id
    started_ns: int = field(default_factory=monotonic_ns)  # monotonic

    def end(self, status: int | str, response_bytes: int) -> None:
        """Write the line: what it was answered with, after how long, in how many bytes."""
        self.write(status, response_bytes, (monotonic_ns() - self.started_ns) / 1e6)

    def write(self, status: int | str, response_bytes: int, ms: float) -> None:
        """As `end`, after a time that was measured otherwise."""
        facts = {
            "door": self.door,
            "method": self.method,
            "path": self.path,
            "model": self.model,
            "version": self.version,
            "status": status,
            "duration_ms": round(ms, 3),
            "job": self.job,
            "request_id": self.id,
            "request_bytes": self.request_bytes,
            "response_bytes": response_bytes,
        }
        # Ids and paths are a client's words: written so that none can end the line.
        logger.info(
            "%s %s %s %s %.3f ms, model=%s version=%s%s id=%s in=%d out=%d",
            self.door, self.method, plain(self.path or "-"), status, ms, plain(self.model or "-"),
            self.version or "-", self.job and f" job={self.job}", plain(self.id or "-"), self.request_bytes,
            response_bytes,
            extra={"facts": {key: value for key, value in facts.items() if value != ""}},
        )  # fmt: skip


def new_id() -> str:
    """For a request that its client gave none: with the access log on, every line can be found by an answer's id."""
    return uuid.uuid4().hex


def names(id: str, job: str = "") -> dict[str, str]:
    """What a line about a request, or about a job that it handed in, can be found by: `extra` of its record."""
    return {"job": job, "request_id": id}


def as_header(id: str) -> bytes:
    """An id as a header bears it; empty where none can."""
    return id.encode() if id.isascii() and id.isprintable() else b""


def plain(text: str) -> str:
    """Text of a client's in one line."""
    return text if text.isprintable() else text.encode("unicode_escape").decode()
