"""Requests whose time runs out, and the thread that ends them then, whatever else is busy."""

import heapq
import threading
from collections.abc import Callable
from time import monotonic_ns

from penstock.queueing import Pending

Expired = Callable[[Pending, int], None]  # is told the time; called without a lock held


class Deadlines:
    """Calls `expired` for each request once its time has come, unless it was forgotten before.

    One thread, which sleeps until the nearest time and starts with the first request that has one. Safe on any thread;
    all fields are owned by one lock, under which no other is taken.
    """

    def __init__(self, name: str, expired: Expired) -> None:
        self._name = name
        self._expired = expired
        self._changed = threading.Condition()
        self._times: dict[Pending, int] = {}  # what is waited for; the heap may hold more, which was forgotten
        self._heap: list[tuple[int, int, Pending]] = []
        self._number = 0  # breaks ties: requests have no order of their own
        self._thread: threading.Thread | None = None
        self._closed = False

    def __len__(self) -> int:
        return len(self._times)

    def add(self, pending: Pending, at_ns: int) -> None:
        """Let `expired` be called for the request at a monotonic time."""
        with self._changed:
            self._times[pending] = at_ns
            self._number += 1
            heapq.heappush(self._heap, (at_ns, self._number, pending))
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name=self._name, daemon=True)
                self._thread.start()
            elif self._heap[0][2] is pending:
                self._changed.notify()

    def forget(self, pending: Pending) -> None:
        """The request has ended. Its memory is let go of soon, however far away its time is."""
        with self._changed:
            self._times.pop(pending, None)
            if len(self._heap) > 2 * len(self._times) + 64:
                self._heap = [entry for entry in self._heap if self._times.get(entry[2]) == entry[0]]
                heapq.heapify(self._heap)

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        while (due := self._wait()) is not None:
            now_ns = monotonic_ns()
            for pending in due:
                self._expired(pending, now_ns)

    def _wait(self) -> list[Pending] | None:
        """The requests whose time has come, once there are any; None when this was closed."""
        with self._changed:
            while not self._closed:
                now_ns, due = monotonic_ns(), []
                while self._heap and self._heap[0][0] <= now_ns:
                    at_ns, _, pending = heapq.heappop(self._heap)
                    if self._times.get(pending) == at_ns:
                        del self._times[pending]
                        due.append(pending)
                if due:
                    return due
                self._changed.wait((self._heap[0][0] - now_ns) / 1e9 if self._heap else None)
        return None
