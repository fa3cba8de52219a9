"""Log format and levels."""

import logging
import sys
from datetime import UTC, datetime

from penstock.errors import Kind, ServingError
from penstock.settings import Settings

LETTERS = {logging.DEBUG: "V", logging.INFO: "I", logging.WARNING: "W", logging.ERROR: "E", logging.CRITICAL: "E"}


class Formatter(logging.Formatter):
    """`I1121 13:05:07.123456 lifecycle] text`, or with the whole date in ISO 8601."""

    def __init__(self, iso8601: bool) -> None:
        super().__init__()
        self._iso8601 = iso8601

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC)
        letter = LETTERS.get(record.levelno, "I")
        if self._iso8601:
            head = f"{moment.isoformat(timespec='microseconds').replace('+00:00', 'Z')} {letter}"
        else:
            head = f"{letter}{moment:%m%d %H:%M:%S.%f}"
        line = f"{head} {record.name.removeprefix('penstock.')}] {record.getMessage()}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


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
    handler.setFormatter(Formatter(settings.log_format == "ISO8601"))
    shown = {
        logging.DEBUG: settings.log_verbose > 0,
        logging.INFO: settings.log_info,
        logging.WARNING: settings.log_warning,
        logging.ERROR: settings.log_error,
        logging.CRITICAL: settings.log_error,
    }
    handler.addFilter(lambda record: shown.get(record.levelno, True))
    return handler
