"""Times parts of a handler."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


class Checkpoints:
    """Named spans of time; all instances share them."""

    _spans: ClassVar[dict[str, list[float]]] = {}  # name → [start, end], in seconds

    def add(self, name: str) -> None:
        self._spans[name] = []

    def start(self, name: str) -> None:
        if name not in self._spans:
            raise KeyError(f"checkpoint {name!r} was not added")
        self._spans[name] = [time.perf_counter()]

    def stop(self, name: str) -> None:
        if not self._spans.get(name):
            raise KeyError(f"checkpoint {name!r} was not started")
        self._spans[name] = [self._spans[name][0], time.perf_counter()]

    def get_checkpoints(self) -> list[dict[str, Any]]:
        """The spans that have ended: name and `duration_ms`."""
        ended = ((name, span) for name, span in self._spans.items() if len(span) == 2)
        return [{"name": name, "duration_ms": (span[1] - span[0]) * 1000} for name, span in ended]

    def clear(self) -> None:
        self._spans.clear()


class LineTimer:
    """Times a `with` block."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        Checkpoints().add(self._name)
        Checkpoints().start(self._name)

    def __exit__(self, *_: object) -> None:
        Checkpoints().stop(self._name)


def FunctionTimer(function: Function) -> Function:  # noqa: N802 - the package's name for it
    """A decorator: times each call."""

    @functools.wraps(function)
    def timed(*given: Any, **named: Any) -> Any:
        with LineTimer(function.__name__):
            return function(*given, **named)

    return timed  # type: ignore[return-value]


def get_debugger_output() -> dict[str, Any]:
    """What was timed since the last call."""
    found = {"timestamps": Checkpoints().get_checkpoints()}
    Checkpoints().clear()
    return found


def clear_debugger_output() -> None:
    Checkpoints().clear()
