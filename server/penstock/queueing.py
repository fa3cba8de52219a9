"""Requests that wait, and the order in which they leave."""

from collections import deque
from typing import Protocol

from penstock.errors import ServingError
from penstock.messages import InferRequest
from penstock.runtime import Cancelled, Reply


class Holder(Protocol):
    """Where a request waits."""

    def drop(self, pending: "Pending") -> bool:
        """Take it out and give it its last reply. False if it does not wait here any more."""


class Pending:
    """A request that waits for an instance, or runs on one."""

    __slots__ = ("arrived_ns", "cancelled", "holder", "reply", "request")

    def __init__(self, request: InferRequest, reply: Reply, cancelled: Cancelled, arrived_ns: int) -> None:
        self.request = request
        self.reply = reply
        self.cancelled = cancelled
        self.arrived_ns = arrived_ns  # monotonic
        self.holder: Holder | None = None

    def cancel(self, reason: ServingError) -> None:
        """Nobody waits for this any more: drop it if it is queued; what runs already is told. Any thread."""
        if self.cancelled.set(reason) and self.holder is not None:
            self.holder.drop(self)


class Scheduler(Protocol):
    """Decides what runs next. A state machine without threads or clock: the caller locks and tells the time."""

    def __len__(self) -> int:
        """How many wait."""

    def add(self, pending: Pending, now_ns: int) -> None:
        """May raise ServingError, for example for a full queue."""

    def take(self, now_ns: int) -> list[Pending]:
        """What shall run together now; [] means: not yet."""

    def wake_at(self, now_ns: int) -> int | None:
        """When to call `take` again though nothing was added; None: not before something is."""

    def drop(self, pending: Pending) -> bool:
        """Forget one that is no longer wanted. False if it does not wait here."""


class Fifo:
    """First come, first served, one at a time: models that are not batched."""

    def __init__(self) -> None:
        self._waiting: deque[Pending] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, pending: Pending, now_ns: int) -> None:  # noqa: ARG002
        self._waiting.append(pending)

    def take(self, now_ns: int) -> list[Pending]:  # noqa: ARG002
        return [self._waiting.popleft()] if self._waiting else []

    def wake_at(self, now_ns: int) -> int | None:  # noqa: ARG002
        return None

    def drop(self, pending: Pending) -> bool:
        try:
            self._waiting.remove(pending)
        except ValueError:
            return False
        return True
