"""Checks that a handler file wants made before its first job."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Check = TypeVar("Check", bound=Callable[[], Any])

_fitness_checks: list[Callable[[], Any]] = []  # in the order of their registration, plain or async


def register_fitness_check(func: Check) -> Check:
    """A decorator: `func` is called when the worker starts, and what it raises fails the load."""
    _fitness_checks.append(func)
    return func
