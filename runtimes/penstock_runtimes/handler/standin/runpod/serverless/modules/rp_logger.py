"""The logger of handler files: lines such as `INFO   | job-id | text` on standard output."""

from __future__ import annotations

import os
from typing import Any

LEVELS = ("NOTSET", "TRACE", "DEBUG", "INFO", "WARN", "ERROR")


class RunPodLogger:
    """All share one level: that of RUNPOD_LOG_LEVEL, else RUNPOD_DEBUG_LEVEL, else DEBUG; by name or number."""

    level = os.environ.get("RUNPOD_LOG_LEVEL") or os.environ.get("RUNPOD_DEBUG_LEVEL") or "DEBUG"

    def set_level(self, new_level: str | int) -> None:
        type(self).level = _name(new_level)

    def log(self, message: Any, message_level: str = "INFO", job_id: str | None = None) -> None:
        """Print the message unless its level is below the logger's, or that is NOTSET."""
        wanted = LEVELS.index(_name(self.level))
        if wanted and _rank(message_level) >= wanted:
            where = f"{job_id} | " if job_id else ""
            print(f"{message_level:<7}| {where}{message}", flush=True)

    def secret(self, secret_name: str, secret: Any) -> None:
        """Log that a secret is there, by its first and last character."""
        text = str(secret)
        self.info(f"{secret_name}: {text[:1]}{'*' * max(0, len(text) - 2)}{text[-1:] if len(text) > 1 else ''}")

    def trace(self, message: Any, request_id: str | None = None) -> None:
        self.log(message, "TRACE", request_id)

    def debug(self, message: Any, request_id: str | None = None) -> None:
        self.log(message, "DEBUG", request_id)

    def info(self, message: Any, request_id: str | None = None) -> None:
        self.log(message, "INFO", request_id)

    def warn(self, message: Any, request_id: str | None = None) -> None:
        self.log(message, "WARN", request_id)

    def error(self, message: Any, request_id: str | None = None) -> None:
        self.log(message, "ERROR", request_id)

    def tip(self, message: Any) -> None:
        self.log(message, "TIP")


def _rank(level: str) -> int:
    return LEVELS.index(level) if level in LEVELS else LEVELS.index("INFO")


def _name(level: str | int) -> str:
    """Raises ValueError for what is no level."""
    if isinstance(level, int) or level.isdecimal():
        if int(level) < len(LEVELS):
            return LEVELS[int(level)]
    elif level.upper() in LEVELS:
        return level.upper()
    raise ValueError(f"{level!r} is no log level; there are: {', '.join(LEVELS)}")
