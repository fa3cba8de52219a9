"""Memory that idle instances give back to their device: ONNX Runtime does that at the end of a run, and only then."""

import threading
import weakref
from collections.abc import Mapping, Sequence
from time import monotonic_ns
from typing import Protocol

import numpy as np
from penstock.tensor import Array

from penstock_runtimes.onnx.parameters import Parameters

AFTER = "arena_shrink_idle_ms"
LEAST_MS = 100
SHRINKAGE = "memory.enable_memory_arena_shrinkage"  # run option: the arenas to shrink, such as "gpu:0"


def after_ns(parameters: Parameters) -> int:
    """How long an instance idles before it gives memory back; 0 for never. Raises ServingError(INVALID)."""
    given_ms = parameters.integer(AFTER)
    if given_ms is not None and given_ms < LEAST_MS:
        raise parameters.refusal(AFTER, f"milliseconds from {LEAST_MS} up")
    return (given_ms or 0) * 1_000_000


class Rest:
    """The smallest run that an instance was asked for, to be run again while it idles. Owned by `busy`'s holder."""

    def __init__(self, after_ns: int, device: str) -> None:
        self.after_ns = after_ns
        self.arena = "cpu:0" if device == "cpu" else f"gpu:{device.partition(':')[2]}"
        self.busy = threading.Lock()
        self.names: Sequence[str] = ()
        self.feed: dict[str, Array] = {}  # copies
        self.size_bytes = -1  # of it; -1 for none
        self.shrunk_ns = 0  # when memory was last given back

    def saw(self, names: Sequence[str], feed: Mapping[str, Array]) -> None:
        """A run is about to begin."""
        if not all(isinstance(array, np.ndarray) for array in feed.values()):
            return  # values of ONNX Runtime's own, in which BF16 goes to a session that is not bound
        size_bytes = sum(array.nbytes for array in feed.values())
        if self.size_bytes < 0 or size_bytes < self.size_bytes:
            self.names, self.size_bytes = list(names), size_bytes
            self.feed = {name: array.copy() for name, array in feed.items()}

    def is_due(self, ended_ns: int, now_ns: int) -> bool:
        """Whether the instance, whose last run ended then, has idled long enough and not given memory back since."""
        return self.size_bytes >= 0 and ended_ns > self.shrunk_ns and now_ns - ended_ns >= self.after_ns


class Idler(Protocol):
    """An instance with a Rest."""

    rest_ns: int  # after which it may be asked

    def shrink(self, now_ns: int) -> None:
        """Give memory back, if it has idled long enough. May be called on any thread."""


class Shrinker:
    """One thread that asks the instances of a runtime in turn, while there are any."""

    def __init__(self) -> None:
        self._instances: weakref.WeakSet[Idler] = weakref.WeakSet()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def add(self, instance: Idler) -> None:
        with self._changed:
            self._instances.add(instance)
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="shrink-arenas", daemon=True)
                self._thread.start()
            self._changed.notify()

    def _watch(self) -> None:
        while instances := self._next():
            for instance in instances:
                instance.shrink(monotonic_ns())
            del instances, instance  # else they would live while this waits

    def _next(self) -> list[Idler]:
        """All instances, after the shortest of their times; [] when there are none, and the thread ends."""
        with self._changed:
            shortest_ns = min((instance.rest_ns for instance in self._instances), default=0)
            self._changed.wait(shortest_ns / 1e9 / 2)  # so that none waits for more than half its time longer
            instances = list(self._instances)
            if not instances:
                self._thread = None
            return instances
