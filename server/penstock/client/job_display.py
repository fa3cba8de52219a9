"""A job as it is shown to people, once or while it runs."""

import shutil
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any, Protocol, TextIO

import orjson

from penstock.client.jobs import FINAL, Look, Status

BAR = 24  # characters
CLEAR = "\r\033[K"


class Display(Protocol):
    """Where the looks at one job go, in their order."""

    def show(self, look: Look) -> None: ...


class JsonLines:
    """One JSON object for each thing that happens: a new state, progress, a chunk, and at the end the whole job."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._news = News()

    def show(self, look: Look) -> None:
        for kind, value in self._news.of(look):
            document = value if kind == "ended" else {kind: value}
            print(dumped(document), file=self._out, flush=True)


class Lines:
    """Results on `out`, and what is to be said about them line by line on `log`."""

    def __init__(self, out: TextIO, log: TextIO, unsaid: Collection[str] = ()) -> None:
        """`unsaid` are kinds of news that somebody else shows."""
        self._out = out
        self._log = log
        self._unsaid = unsaid
        self._news = News()
        self._streamed = False

    def show(self, look: Look) -> None:
        for kind, value in self._news.of(look):
            if kind in self._unsaid:
                continue
            match kind:
                case "chunk":
                    self._streamed = True
                    print(dumped(value), file=self._out, flush=True)
                case "status":
                    print(value, file=self._log, flush=True)
                case "ended":
                    print(ending(value), file=self._log, flush=True)
                    if "output" in value and not self._streamed:  # what was streamed is not said again
                        print(dumped(value["output"]), file=self._out, flush=True)
                case _:
                    self._streamed = self._streamed and kind != "restarted"
                    print(f"{kind}: {text(value)}", file=self._log, flush=True)


class Live:
    """As `Lines`, but on a terminal: state and progress are one line that replaces itself."""

    def __init__(self, out: TextIO, log: TextIO, now_s: Callable[[], float] = time.monotonic) -> None:
        self._lines = Lines(out, log, ("status", "progress", "away"))
        self._log = log
        self._now_s = now_s
        self._since_s = now_s()

    def show(self, look: Look) -> None:
        self._log.write(CLEAR)
        self._log.flush()
        self._lines.show(look)
        state = look.job.get("status", "")
        if state not in FINAL:
            line = f"{state}  {self._now_s() - self._since_s:.0f} s  {look.away or gauge(look.job.get('output'))}"
            self._log.write(line[: shutil.get_terminal_size().columns - 1])
            self._log.flush()


class News:
    """Tells what is new in a look. Holds what was seen last."""

    def __init__(self) -> None:
        self._state = self._away = ""
        self._progress: Any = None

    def of(self, look: Look) -> Iterator[tuple[str, Any]]:
        """(what, its value): "away", "restarted", "chunk", "status", "progress" or "ended", each when it changes."""
        if look.away:
            if not self._away:
                yield "away", look.away
            self._away = look.away
            return
        self._away = ""
        state, progress = look.job["status"], look.job.get("output")
        if look.restarted:
            yield "restarted", "what was streamed so far counts for nothing"
        ended = state in FINAL
        if state != self._state and not ended:
            yield "status", state
        for chunk in look.chunks:
            yield "chunk", chunk
        if ended:
            yield "ended", look.job
        elif progress not in (None, self._progress):
            yield "progress", progress
        self._state, self._progress = state, progress


def gauge(progress: Any) -> str:
    """Progress on one line: a bar where it is, or holds, a percentage."""
    if progress is None:
        return ""
    named = progress if isinstance(progress, dict) else {"progress": progress}
    percent = named.get("progress")
    if isinstance(percent, bool) or not isinstance(percent, int | float) or not 0 <= percent <= 100:
        return " ".join(text(progress).split())
    filled = round(BAR * percent / 100)
    others = {key: value for key, value in named.items() if key != "progress"}
    beside = " ".join(f"{key} {text(value)}" for key, value in others.items())
    return f"[{'#' * filled}{'-' * (BAR - filled)}] {percent:g} %  {beside}".rstrip()


def ending(job: Status) -> str:
    """How a job ended, with its error where it has one."""
    ran = f" after {seconds(job['executionTime'])}" if "executionTime" in job else ""
    error = f": {error_of(job)}" if "error" in job else ""
    return f"{job['status']}{ran}{error}"


def error_of(job: Status) -> str:
    """A job's error. What a handler raised comes as a JSON text, of which the traceback says all."""
    error: str = job.get("error", "").rstrip()
    try:
        facts = orjson.loads(error)
    except orjson.JSONDecodeError:
        return error
    if not isinstance(facts, dict) or "error_message" not in facts:
        return error
    return str(facts.get("error_traceback") or facts["error_message"]).rstrip()


def seconds(milliseconds: Any) -> str:
    return f"{milliseconds / 1000:.3f} s" if isinstance(milliseconds, int | float) else ""


def text(value: Any) -> str:
    """A string as it is, anything else as JSON."""
    return value if isinstance(value, str) else dumped(value)


def dumped(value: Any) -> str:
    return orjson.dumps(value).decode()
