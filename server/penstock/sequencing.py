"""The sequence batcher: which instance and slot each sequence of a stateful model has, and what runs there next.

Protocol page "scheduling", section 3.
"""

import heapq
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Protocol

from penstock import messages
from penstock.batching import LEAD_NS, Batcher
from penstock.errors import Kind, ServingError
from penstock.messages import InferRequest
from penstock.model_config import BatchPolicy, SequencePolicy
from penstock.queueing import Pending


class Sequencer:
    """Gives each sequence a slot of one instance, from its first request to its last, and its requests their order.

    A sequence without a slot waits in a backlog, first come, first served. It is over

    - when its last request, which says so, is taken,
    - when nothing of it has waited or run for the policy's idle time,
    - when one of its requests is dropped, whether that waits or runs: what comes after would be computed from a state
      that its client does not expect,
    - when another with its id begins, which goes on in the same slot once all that came before has run.

    `departures` counts batches by the reason why they left, as the dynamic batcher does.
    """

    def __init__(self, policy: SequencePolicy, workers: int, departures: dict[str, int]) -> None:
        self.policy = policy
        self.departures = departures
        self.places: Sequence[_Place] = [
            _Place(self, _Rows(policy, departures) if policy.direct else _Candidates(policy, departures))
            for _ in range(workers)
        ]
        self._open: dict[int | str, _Line] = {}  # that may get further requests, by correlation id
        self._backlog: OrderedDict[_Line, None] = OrderedDict()
        self.size = 0  # requests that wait

    def __len__(self) -> int:
        return self.size

    @property
    def live(self) -> int:
        """How many sequences have a slot."""
        return sum(len(place.seated) for place in self.places)

    @property
    def backlogged(self) -> bool:
        """Whether a sequence waits for a slot."""
        return bool(self._backlog)

    def add(self, pending: Pending, now_ns: int) -> None:
        """Raises ServingError(INVALID) for a request that can be in no sequence, or in none that there is.

        One whose sequence has no slot yet expires after its `timeout`, and the sequence with it.
        """
        given = self._check(pending.request)
        self.settle(now_ns)
        line = self._open.get(given.id)
        if line is None:
            if not given.start:
                raise ServingError(
                    Kind.INVALID,
                    f"inference request for sequence {given.id} to model '{self.policy.model}' must specify the START "
                    "flag on the first request of the sequence",
                )
            line = self._open[given.id] = _Line(given.id)
            self._backlog[line] = None
        elif given.start:
            line.latest = _Flow(line)
            pending.warning = (
                f"model {self.policy.model}: sequence {given.id} starts again without having ended; the one before it "
                "ends here"
            )
        if given.end:
            self._close(line)
        pending.sequence = line.latest
        pending.shape = _shape(pending.request, self.policy.varying)
        line.waiting.append(pending)
        self.size += 1
        if line.place is not None:
            line.place.expect(line)
            return
        self._seat(now_ns)
        if line.place is None and pending.request.timeout_us:
            timeout_ns = now_ns + pending.request.timeout_us * 1000
            pending.expires_ns = min(timeout_ns, pending.expires_ns or timeout_ns)

    def _check(self, request: InferRequest) -> messages.Sequence:
        model, given, control = self.policy.model, request.sequence, self.policy.correlation
        if given is not None and control is not None and control.holds(given.id) is None:
            said = "BYTES" if isinstance(given.id, str) else "UINT64"
            wanted = control.datatype.name
            if (said == "BYTES") is (wanted == "BYTES"):
                raise ServingError(
                    Kind.INVALID,
                    f"correlation ID {given.id} is out of the range of {wanted}, which model '{model}' takes",
                )
            raise ServingError(
                Kind.INVALID,
                f"[request id: {request.id or '<id_unknown>'}] sequence batching control '{control.name}' data-type is "
                f"'{said}', but model '{model}' expects '{wanted}'",
            )
        if request.rows != 1:
            raise ServingError(
                Kind.INVALID,
                f"inference request to model '{model}' must specify batch-size 1 due to requirements of sequence "
                "batcher",
            )
        if given is None:
            raise ServingError(
                Kind.INVALID,
                f"inference request to model '{model}' must specify a non-zero or non-empty correlation ID",
            )
        return given

    def drop(self, pending: Pending) -> list[Pending]:
        """End the sequence of a request that is no longer wanted, whether it waits or runs; gives all that waited."""
        flow = pending.sequence
        if not isinstance(flow, _Flow) or flow.line.over:
            return []
        line = flow.line
        if line.latest is flow:
            self._close(line)
        dropped = [other for other in line.waiting if other.sequence is flow]
        self.size -= len(dropped)
        if line.place is not None:
            line.place.forsake(line)
        line.waiting = deque(other for other in line.waiting if other.sequence is not flow)
        if line.closed and not line.waiting:
            self.end(line)
        elif line.place is not None and not line.runs:
            line.place.settle_down(line, pending.arrived_ns)
        return dropped

    def settle(self, now_ns: int) -> None:
        """End what has been idle for too long, and give its slots to those that wait for one."""
        for place in self.places:
            place.expire(now_ns)
        self._seat(now_ns)

    def _seat(self, now_ns: int) -> None:
        while self._backlog:
            place = min(self.places, key=_first_slot)
            if not place.free:
                return
            line, _ = self._backlog.popitem(last=False)
            place.seat(line, now_ns)

    def end(self, line: "_Line") -> None:
        """Nothing more comes of it: its slot is free, and its id unknown."""
        line.over = True
        self._close(line)
        self._backlog.pop(line, None)
        if line.place is not None:
            line.place.leave(line)

    def _close(self, line: "_Line") -> None:
        """Take no further requests of it."""
        if self._open.get(line.id) is line:
            del self._open[line.id]
        line.closed = True


class _Line:
    """What has one slot, or waits for one: a sequence, and those of the same id that began before it had ended."""

    __slots__ = ("closed", "id", "idle_since_ns", "latest", "over", "place", "runs", "slot", "waiting")

    def __init__(self, id: int | str) -> None:
        self.id = id
        self.latest = _Flow(self)
        self.waiting: deque[Pending] = deque()
        self.place: _Place | None = None  # None: in the backlog
        self.slot = 0
        self.runs = False  # a request of it
        self.closed = False  # what waits is all that there will be
        self.idle_since_ns = 0  # when nothing of it waits or runs
        self.over = False


class _Flow:
    """One sequence, to those of its requests that have not run."""

    __slots__ = ("line",)

    def __init__(self, line: _Line) -> None:
        self.line = line


class _Strategy(Protocol):
    """Which of the first requests of an instance's sequences run together."""

    def ready(self, pending: Pending) -> None:
        """The next of its sequence, and none before it runs."""

    def unready(self, pending: Pending) -> None:
        """It is dropped."""

    def take(self, now_ns: int) -> list[Pending]: ...
    def wake_at(self, now_ns: int) -> int | None: ...


class _Place:
    """The slots of one instance."""

    def __init__(self, sequencer: Sequencer, strategy: _Strategy) -> None:
        self._all = sequencer
        self._strategy = strategy
        self.free = list(range(sequencer.policy.slots))  # a heap
        self.seated: set[_Line] = set()
        self._idle: OrderedDict[_Line, None] = OrderedDict()  # the one that has been longest, first
        self._idle_limit_ns = sequencer.policy.idle_ns
        self._running: list[Pending] = []

    def take(self, now_ns: int) -> list[Pending]:
        self._all.settle(now_ns)
        if self._running:
            return []
        batch = self._strategy.take(now_ns)
        for pending in batch:
            line, given = _line(pending), pending.request.sequence
            assert given is not None
            line.waiting.popleft()
            line.runs = True
            given.slot = line.slot
            if line.closed and not line.waiting:
                self._all.end(line)
        self._all.size -= len(batch)
        self._running = batch
        if batch and self._all.backlogged:
            self._all.settle(now_ns)
        return list(batch)

    def wake_at(self, now_ns: int) -> int | None:
        self._all.settle(now_ns)
        if self._running:
            return None
        due_ns = self._strategy.wake_at(now_ns)
        if self._all.backlogged and self._idle:
            free_ns = next(iter(self._idle)).idle_since_ns + self._idle_limit_ns
            due_ns = free_ns if due_ns is None else min(due_ns, free_ns)
        return due_ns

    def done(self, now_ns: int) -> None:
        for pending in self._running:
            line = _line(pending)
            pending.sequence = None
            line.runs = False
            if not line.over:
                self.settle_down(line, now_ns)
        self._running = []

    def seal(self) -> None:
        self._idle_limit_ns = 0

    def seat(self, line: _Line, now_ns: int) -> None:
        """Give it the lowest slot that is free. What of it waits has no time of its own any more but its client's."""
        line.place, line.slot = self, heapq.heappop(self.free)
        self.seated.add(line)
        for pending in line.waiting:
            pending.expires_ns = pending.request.deadline_ns
        self.settle_down(line, now_ns)

    def expect(self, line: _Line) -> None:
        """A request of it has come."""
        self._idle.pop(line, None)
        if len(line.waiting) == 1 and not line.runs:
            self._strategy.ready(line.waiting[0])

    def forsake(self, line: _Line) -> None:
        """Nothing of it shall run for now."""
        if line.waiting and not line.runs:
            self._strategy.unready(line.waiting[0])

    def settle_down(self, line: _Line, now_ns: int) -> None:
        """Nothing of it runs: its next request may, or it is idle."""
        if line.waiting:
            self._strategy.ready(line.waiting[0])
        else:
            line.idle_since_ns = now_ns
            self._idle[line] = None

    def leave(self, line: _Line) -> None:
        """Free its slot. Nothing of it waits."""
        self._idle.pop(line, None)
        self.seated.remove(line)
        heapq.heappush(self.free, line.slot)

    def expire(self, now_ns: int) -> None:
        """End what has been idle for too long."""
        while self._idle and (first := next(iter(self._idle))).idle_since_ns + self._idle_limit_ns <= now_ns:
            self._all.end(first)


def _line(pending: Pending) -> _Line:
    """Of a request that has not run."""
    assert isinstance(pending.sequence, _Flow)
    return pending.sequence.line


def _first_slot(place: _Place) -> tuple[bool, int]:
    """Orders places by the slots that they would give away: low ones first, so that batches stay short."""
    return not place.free, place.free[0] if place.free else 0


class _Rows:
    """Direct: the next request of every sequence, each in the row of its slot."""

    def __init__(self, policy: SequencePolicy, departures: dict[str, int]) -> None:
        self._policy = policy
        self._departures = departures
        self._ready: OrderedDict[Pending, None] = OrderedDict()

    def ready(self, pending: Pending) -> None:
        self._ready[pending] = None

    def unready(self, pending: Pending) -> None:
        self._ready.pop(pending, None)

    def take(self, now_ns: int) -> list[Pending]:
        batch, reason, _ = self._form(now_ns)
        if not reason:
            return []
        for pending in batch:
            del self._ready[pending]
        self._departures[reason] += 1
        return batch

    def wake_at(self, now_ns: int) -> int | None:
        _, _, due_ns = self._form(now_ns)
        return due_ns

    def _form(self, now_ns: int) -> tuple[list[Pending], str, int | None]:
        """What leaves next, why ("": not yet), and when; None: not before something changes."""
        policy = self._policy
        waiting = [pending for pending in self._ready if not 0 < pending.expires_ns <= now_ns]
        if not waiting:
            return [], "", None
        oldest = min(waiting, key=_arrival)
        batch = [pending for pending in waiting if pending.shape == oldest.shape]
        delayed_ns = oldest.arrived_ns + policy.delay_ns
        due_ns = min([delayed_ns, *(pending.expires_ns - LEAD_NS for pending in batch if pending.expires_ns)])
        if len(batch) == policy.slots:
            reason = "full"
        elif len(batch) < len(waiting):
            reason = "shape"
        elif not (policy.delay_ns and policy.utilization):
            reason = "idle"
        elif len(batch) / policy.slots >= policy.utilization:
            reason = "preferred"
        elif now_ns >= delayed_ns:
            reason = "delay"
        else:
            reason = "deadline" if now_ns >= due_ns else ""
        return batch, reason, now_ns if reason else due_ns


def _arrival(pending: Pending) -> int:
    return pending.arrived_ns


class _Candidates(Batcher):
    """Oldest: the next request of every sequence, batched as requests of a model without sequences are."""

    def __init__(self, policy: SequencePolicy, departures: dict[str, int]) -> None:
        rules = BatchPolicy(policy.max_rows, policy.preferred_rows, policy.delay_ns, varying=policy.varying)
        super().__init__(rules, departures)

    def ready(self, pending: Pending) -> None:
        """As `add`: there is no limit that could refuse it, and no timeout that would begin now."""
        self.add(pending, pending.arrived_ns)

    def unready(self, pending: Pending) -> None:
        self.drop(pending)


def _shape(request: InferRequest, varying: Sequence[str]) -> object:
    """What requests of one batch have equal."""
    inputs = request.inputs
    return [inputs[name].array.shape[1:] if name in inputs else None for name in varying]
