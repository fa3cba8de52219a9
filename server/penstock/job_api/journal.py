"""What happened to the jobs of each endpoint, in a few words: a bounded ring of lines in memory."""

import logging
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

LINES = 1000  # of each endpoint
MODELS = "penstock.model."  # loggers of what models print
LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, slots=True)
class Line:
    """One thing that happened."""

    at_ms: int  # since the epoch
    level: str
    job: str
    text: str

    def __str__(self) -> str:
        of = f" {self.job}:" if self.job else ""
        return f"{iso(self.at_ms)} {self.level.upper()}{of} {self.text}"


class Journal:
    """The last lines of each endpoint. Used on the event loop; forgotten with the process."""

    def __init__(self) -> None:
        self._rings: dict[str, deque[Line]] = defaultdict(lambda: deque(maxlen=LINES))

    def note(self, endpoint: str, at_ms: int, level: str, job: str, text: str) -> None:
        self._rings[endpoint].append(Line(at_ms, level, job, text))

    def lines(
        self, endpoint: str, level: str = "debug", job: str = "", search: str = "", since_ms: int = 0, until_ms: int = 0
    ) -> Iterator[Line]:
        """Oldest first: those of at least `level`, of one job, that contain `search`, between two moments (0: any)."""
        least = LEVELS.index(level)
        for line in self._rings.get(endpoint, ()):
            if (
                LEVELS.index(line.level) >= least
                and job in ("", line.job)
                and search in line.text
                and line.at_ms >= since_ms
                and (not until_ms or line.at_ms <= until_ms)
            ):
                yield line


def iso(at_ms: int) -> str:
    """Epoch milliseconds as ISO 8601 in UTC."""
    return datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class JournalHandler(logging.Handler):
    """Takes what models log: records of the loggers `penstock.model.NAME`, their `job` a job's id. Any thread."""

    def __init__(self, journal: Journal) -> None:
        super().__init__()
        self._journal = journal

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith(MODELS):
            level = LEVELS[min(max(record.levelno // 10, 1), len(LEVELS)) - 1]
            text, job = record.getMessage(), getattr(record, "job", "")
            self._journal.note(record.name.removeprefix(MODELS), round(record.created * 1000), level, job, text)
