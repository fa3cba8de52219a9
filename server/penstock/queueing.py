"""Requests that wait, and the order in which they leave: priorities, limits, and timeouts."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

from msgspec import Struct

from penstock.errors import Kind, ServingError
from penstock.messages import InferRequest, InferResponse
from penstock.model_config import QueuePolicy
from penstock.runtime import Cancelled, Reply
from penstock.statistics import Execution


class Holder(Protocol):
    """Where a request waits."""

    def drop(self, pending: "Pending") -> bool:
        """Take it out and give it its last reply. False if it does not wait here any more."""


class Whole(Protocol):
    """A request that was cut into parts."""

    pending: "Pending"

    def put(
        self, part: "Pending", answer: InferResponse | ServingError, times: Execution | None = None
    ) -> InferResponse | ServingError | None:
        """Take a part's answer, and how it was computed where it was; gives the answer of the whole once."""

    @property
    def times(self) -> Execution:
        """From the first part's start to the end of the last, with the phases of all. Once all are computed."""


class Missed(Struct, frozen=True):
    """What was looked up in the cache in vain."""

    key: bytes  # under which the answer shall be kept
    lookup_ns: int  # how long that took


class Pending(Struct, eq=False):
    """A request that waits for an instance, or runs on one."""

    request: InferRequest
    reply: Reply
    cancelled: Cancelled
    arrived_ns: int  # monotonic
    expires_ns: int  # when it is refused instead of run, monotonic; 0: never. Its client's deadline, or before that
    holder: Holder | None = None
    whole: Whole | None = None  # of which this is a part
    missed: Missed | None = None  # None: the answer shall not be kept
    # Written by the scheduler that holds it, and read by no one else.
    level: int = 0  # of its queue
    moves_ns: int = 0  # when it goes behind the others of its level; 0: never
    shape: object = None  # what those that it may share a batch with have equal
    sequence: object = None  # that it is part of, until it has run
    warning: str = ""  # to be logged by whoever added it

    def cancel(self, reason: ServingError) -> None:
        """Nobody waits for this any more: drop it if it is queued; what runs already is told. Any thread."""
        if self.cancelled.set(reason) and self.holder is not None:
            self.holder.drop(self)

    def lateness(self, now_ns: int) -> ServingError:
        """What a request is refused with that could not run by `expires_ns`."""
        deadline_ns = self.request.deadline_ns
        if deadline_ns and now_ns >= deadline_ns:
            late_ms = (now_ns - deadline_ns) / 1e6
            return ServingError(Kind.DEADLINE, f"the deadline passed {late_ms:.1f} ms before the request could run")
        if self.sequence is not None:
            return ServingError(Kind.TIMED_OUT, "timeout of the corresponding sequence has been expired")
        return ServingError(Kind.TIMED_OUT, "Request timeout expired")

    def desertion(self, reason: ServingError) -> ServingError:
        """What those are refused with that cannot run without this one, which was dropped for a `reason`."""
        if reason.kind is Kind.TIMED_OUT or self.request.sequence is None:
            return reason
        text = f"a request of sequence {self.request.sequence.id} was dropped, which ends the sequence"
        return ServingError(Kind.CANCELLED, text)


class Queue(Protocol):
    """Where requests wait, in whatever order they leave."""

    def __len__(self) -> int:
        """How many wait."""

    def add(self, pending: Pending, now_ns: int) -> None:
        """Raises ServingError, for example for a full queue. May set when the request expires."""

    def drop(self, pending: Pending) -> list[Pending]:
        """Forget one that is no longer wanted, and all that cannot run without it. [] if none of them waits here."""


class Source(Protocol):
    """What a worker takes its work from."""

    def take(self, now_ns: int) -> list[Pending]:
        """What shall run together now; [] means: not yet. Never what has expired: the caller drops that."""

    def wake_at(self, now_ns: int) -> int | None:
        """From when on `take` gives something, if nothing changes; None: not before something does."""


class Scheduler(Queue, Source, Protocol):
    """Decides what runs next. A state machine without threads or clock: the caller locks and tells the time."""


class Place(Source, Protocol):
    """What one worker alone takes from."""

    def done(self, now_ns: int) -> None:
        """What the worker took has run."""

    def seal(self) -> None:
        """Nothing more will be added."""


@runtime_checkable
class Seating(Queue, Protocol):
    """A scheduler whose requests are each for a certain worker. What is said of `Scheduler` holds for it, too."""

    @property
    def places(self) -> Sequence[Place]:
        """One for each worker."""


class Fifo:
    """First come, first served, one at a time: models that are not batched."""

    def __init__(self) -> None:
        self.waiting: OrderedDict[Pending, None] = OrderedDict()  # from which any can be dropped in no time

    def __len__(self) -> int:
        return len(self.waiting)

    def add(self, pending: Pending, now_ns: int) -> None:  # noqa: ARG002
        self.waiting[pending] = None

    def take(self, now_ns: int) -> list[Pending]:  # noqa: ARG002
        return [self.waiting.popitem(last=False)[0]] if self.waiting else []

    def wake_at(self, now_ns: int) -> int | None:
        return now_ns if self.waiting else None

    def drop(self, pending: Pending) -> list[Pending]:
        if pending not in self.waiting:
            return []
        del self.waiting[pending]
        return [pending]


class _Level:
    """The requests of one priority."""

    __slots__ = ("late", "moves_ns", "policy", "waiting")

    def __init__(self, policy: QueuePolicy) -> None:
        self.policy = policy
        self.waiting: OrderedDict[Pending, None] = OrderedDict()
        self.late: OrderedDict[Pending, None] = OrderedDict()  # timed out, and to go behind the others
        self.moves_ns = 0  # when the first of `waiting` may be late; 0: never


class PriorityQueue:
    """Requests by priority, 1 the most urgent, those of a level in the order of their arrival.

    A policy per level says how many may wait, for how long, and whether what has waited too long is refused or goes
    behind the others of its level (message `ModelQueuePolicy`).
    """

    def __init__(self, policies: Sequence[QueuePolicy], default_level: int = 0) -> None:
        self._levels = [_Level(policy) for policy in policies]
        self._default = default_level  # index, of requests without a priority or with one that there is not
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, pending: Pending, now_ns: int) -> None:
        """Raises ServingError(UNAVAILABLE) where the level is full. Sets when the request expires or moves."""
        request = pending.request
        number = request.priority - 1
        pending.level = number if 0 <= number < len(self._levels) else self._default
        level = self._levels[pending.level]
        policy = level.policy
        if policy.max_size and len(level.waiting) + len(level.late) >= policy.max_size:
            raise ServingError(
                Kind.UNAVAILABLE, f"[request id: {request.id or '<id_unknown>'}] Exceeds maximum queue size"
            )
        timeout_ns = policy.timeout_ns
        if policy.may_shorten and 0 < request.timeout_us * 1000 < timeout_ns:
            timeout_ns = request.timeout_us * 1000
        if timeout_ns:
            until_ns = now_ns + timeout_ns
            if policy.delays:
                pending.moves_ns = until_ns
                level.moves_ns = min(level.moves_ns or until_ns, until_ns)
            else:
                pending.expires_ns = min(request.deadline_ns or until_ns, until_ns)
        level.waiting[pending] = None
        self._size += 1

    def drop(self, pending: Pending) -> bool:
        """Take one out, wherever it stands. False if it does not wait here."""
        if pending.level >= len(self._levels):
            return False
        level = self._levels[pending.level]
        for queue in (level.waiting, level.late):
            if pending in queue:
                del queue[pending]
                self._size -= 1
                return True
        return False

    def ordered(self, now_ns: int) -> Iterator[Pending]:
        """All that wait, as they shall leave. Nothing may be added or dropped while this is iterated."""
        for level in self._levels:
            if level.moves_ns and now_ns >= level.moves_ns:
                _move_late(level, now_ns)
            yield from level.waiting
            yield from level.late


def _move_late(level: _Level, now_ns: int) -> None:
    for pending in [pending for pending in level.waiting if now_ns >= pending.moves_ns > 0]:
        del level.waiting[pending]
        level.late[pending] = None
    level.moves_ns = min((pending.moves_ns for pending in level.waiting if pending.moves_ns), default=0)
