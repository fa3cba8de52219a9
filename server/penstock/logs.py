"""Log format and levels."""

import logging
import sys
from datetime import UTC, datetime
from typing import Any

import orjson

from penstock import access
from penstock.errors import Kind, ServingError
from penstock.settings import Settings

LETTERS = {logging.DEBUG: "V", logging.INFO: "I", logging.WARNING: "W", logging.ERROR: "E", logging.CRITICAL: "E"}


class Formatter(logging.Formatter):
    """`I1121 13:05:07.123456 lifecycle] text`, or with the whole date in ISO 8601.

    A line about a job ends with ` [job=J id=R]`: its id, and that of the request which handed it in, if that had one.
    What is said of other requests names them itself.
    """

    def __init__(self, iso8601: bool) -> None:
        super().__init__()
        self._iso8601 = iso8601

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC)
        letter = LETTERS.get(record.levelno, "I")
        if self._iso8601:
            head = f"{_iso8601(moment)} {letter}"
        else:
            head = f"{letter}{moment:%m%d %H:%M:%S.%f}"
        line = f"{head} {record.name.removeprefix('penstock.')}] {record.getMessage()}"
        if job := getattr(record, "job", ""):
            id = getattr(record, "request_id", "")
            line += f" [job={job}{id and f' id={access.plain(id)}'}]"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class JsonFormatter(logging.Formatter):
    """One object per line: `time`, `level`, `logger`, `message`, what the record says besides, and a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": _iso8601(datetime.fromtimestamp(record.created, UTC)),
            "level": record.levelname.lower(),
            "logger": record.name.removeprefix("penstock."),
            "message": record.getMessage(),
        }
        entry |= getattr(record, "facts", {})
        entry |= {name: value for name in ("job", "request_id") if (value := getattr(record, name, ""))}
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        # What a model or a client has said may be no text: half of a surrogate pair has no bytes.
        return orjson.dumps({key: _text(value) for key, value in entry.items()}).decode()


def _text(value: Any) -> Any:
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def _iso8601(moment: datetime) -> str:
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def set_up(settings: Settings) -> None:
    """Send the log of this process where the settings say. Raises ServingError(INVALID) for a file that cannot be."""
    root = logging.getLogger()
    root.handlers[:] = [make_handler(settings)]
    root.setLevel(logging.DEBUG if settings.log_verbose > 1 else logging.INFO)
    for package in ("penstock", "penstock_runtimes"):
        logging.getLogger(package).setLevel(logging.DEBUG if settings.log_verbose > 0 else logging.INFO)


def make_handler(settings: Settings) -> logging.Handler:
    """Writes to the log file or standard error; each level can be switched off by itself."""
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    if settings.log_file:
        try:
            handler = logging.FileHandler(settings.log_file, encoding="utf-8")
        except OSError as error:
            raise ServingError(Kind.INVALID, f"--log-file cannot be written: {error}") from error
    json = settings.log_format == "json"
    handler.setFormatter(JsonFormatter() if json else Formatter(settings.log_format == "ISO8601"))
    shown = {
        logging.DEBUG: settings.log_verbose > 0,
        logging.INFO: settings.log_info,
        logging.WARNING: settings.log_warning,
        logging.ERROR: settings.log_error,
        logging.CRITICAL: settings.log_error,
    }
    # The access log is asked for by itself.
    handler.addFilter(lambda record: record.name == access.LOGGER or shown.get(record.levelno, True))
    return handler
