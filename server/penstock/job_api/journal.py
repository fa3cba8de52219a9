"""What happened to the jobs of each endpoint, in a few words: a bounded ring of lines for each job, in memory."""

import heapq
import itertools
import logging
import threading
from collections import OrderedDict, defaultdict, deque
from collections.abc import Sequence
from datetime import UTC, datetime
from operator import attrgetter
from typing import TypeAlias

from msgspec import Struct

LINES = 100  # of each job: one that says much drops its own first lines, and nobody else's
JOBS = 500  # of each endpoint
MODELS = "penstock.model."  # loggers of what models print
LEVELS = ("debug", "info", "warning", "error")


class Line(Struct, frozen=True):
    """One thing that happened."""

    at_ms: int  # since the epoch
    level: str
    job: str
    text: str
    number: int  # in the order in which all were noted

    def __str__(self) -> str:
        of = f" {self.job}:" if self.job else ""
        return f"{iso(self.at_ms)} {self.level.upper()}{of} {self.text}"


Rings: TypeAlias = OrderedDict[str, deque[Line]]  # by job, "" for none; the job that was noted first comes first


class Journal:
    """The last lines of the last jobs of each endpoint. Any thread; forgotten with the process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._endpoints: defaultdict[str, Rings] = defaultdict(OrderedDict)

    def note(self, endpoint: str, at_ms: int, level: str, job: str, text: str) -> None:
        with self._lock:
            rings = self._endpoints[endpoint]
            ring = rings.get(job)
            if ring is None:
                ring = rings[job] = deque(maxlen=LINES)
                if len(rings) > JOBS:
                    rings.popitem(last=False)
            ring.append(Line(at_ms, level, job, text, next(self._numbers)))

    def lines(
        self, endpoint: str, level: str = "debug", job: str = "", search: str = "", since_ms: int = 0, until_ms: int = 0
    ) -> Sequence[Line]:
        """Oldest first: those of at least `level`, of one job, that contain `search`, between two moments (0: any)."""
        least = LEVELS.index(level)
        with self._lock:
            rings = self._endpoints.get(endpoint, OrderedDict())
            kept = [[*ring] for of, ring in rings.items() if job in ("", of)]
        return [
            line
            for line in heapq.merge(*kept, key=attrgetter("number"))
            if LEVELS.index(line.level) >= least
            and search in line.text
            and line.at_ms >= since_ms
            and (not until_ms or line.at_ms <= until_ms)
        ]


def iso(at_ms: int) -> str:
    """Epoch milliseconds as ISO 8601 in UTC."""
    return datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class JournalHandler(logging.Handler):
    """Takes what models log: records of the loggers `penstock.model.NAME`, their `job` a job's id. Any thread.

    What comes of another door is kept by its `request_id` likewise.
    """

    def __init__(self, journal: Journal) -> None:
        super().__init__()
        self._journal = journal

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith(MODELS):
            level = LEVELS[min(max(record.levelno // 10, 1), len(LEVELS)) - 1]
            text, job = record.getMessage(), getattr(record, "job", "") or getattr(record, "request_id", "")
            self._journal.note(record.name.removeprefix(MODELS), round(record.created * 1000), level, job, text)
