"""The dynamic batcher: which waiting requests run together now, or when to look again."""

from penstock.messages import InferRequest
from penstock.model_config import BatchPolicy, Padding
from penstock.queueing import Pending, PriorityQueue

# Why a batch left, in the order in which the reasons are looked for.
DEPARTURES = ("preferred", "full", "shape", "idle", "delay", "deadline")
LEAD_NS = 1_000_000  # a batch leaves so long before its first request expires: a worker must wake and take it


class Batcher:
    """Requests leave together while their rows fit into a batch, in the order of the queue, which is never changed.

    A batch leaves

    - `preferred`: it has a preferred number of rows, and its oldest request has waited less than the delay,
    - `full`: it has all the rows it may have, or what comes next does not fit,
    - `shape`: what comes next has other shapes, or other optional inputs, or the request can share with none,
    - `idle`: an instance is free and no delay is set,
    - `delay`: its oldest request has waited for as long as it shall,
    - `deadline`: waiting longer would cost a request its time.

    `departures` counts them; whoever reads it needs no lock.
    """

    def __init__(self, policy: BatchPolicy, departures: dict[str, int]) -> None:
        self._policy = policy
        self._queue = PriorityQueue(policy.levels, policy.default_level)
        self._departures = departures
        paddings: dict[str, Padding | None] = {padding.input: padding for padding in policy.paddings}
        lenient = paddings | dict.fromkeys(policy.ragged)
        # Where an input stands among those that vary, if not all of its shape must be equal.
        self._lenient = [(place, lenient[name]) for place, name in enumerate(policy.varying) if name in lenient]
        self._largest_preferred = max(policy.preferred_rows, default=policy.max_rows)

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, pending: Pending, now_ns: int) -> None:
        """Raises ServingError(UNAVAILABLE) where the queue is full."""
        pending.shape = self._shape(pending.request)
        self._queue.add(pending, now_ns)

    def take(self, now_ns: int) -> list[Pending]:
        batch, reason, _ = self._form(now_ns)
        if not reason:
            return []
        for pending in batch:
            self._queue.drop(pending)
        self._departures[reason] += 1
        return batch

    def wake_at(self, now_ns: int) -> int | None:
        _, _, due_ns = self._form(now_ns)
        return due_ns

    def drop(self, pending: Pending) -> list[Pending]:
        return [pending] if self._queue.drop(pending) else []

    def _shape(self, request: InferRequest) -> object:
        """What requests of one batch have equal; None for one that shares with no other, because it is empty."""
        if not request.rows:
            return None
        inputs = request.inputs
        shapes: list[tuple[int, ...] | None] = [
            inputs[name].array.shape[1:] if name in inputs else None for name in self._policy.varying
        ]  # a list is faster to make than a generator is to run
        if any(shape and 0 in shape for shape in shapes):
            return None
        for place, padding in self._lenient:
            if shape := shapes[place]:
                shapes[place] = padding.kind(shape) if padding else ()
        return tuple(shapes)

    def _form(self, now_ns: int) -> tuple[list[Pending], str, int | None]:
        """What leaves next, why ("": not yet), and when; None: not before something changes."""
        policy = self._policy
        batch: list[Pending] = []
        rows = preferred = preferred_rows = oldest_ns = expires_ns = 0
        reason = ""
        shape: object = None
        for pending in self._queue.ordered(now_ns):
            if pending.expires_ns and pending.expires_ns <= now_ns:
                continue
            if not batch:
                shape, oldest_ns = pending.shape, pending.arrived_ns
            elif rows + (pending.request.rows or 1) > policy.max_rows:
                reason = "full"
                break
            elif pending.shape != shape:
                reason = "shape"
                break
            batch.append(pending)
            rows += pending.request.rows or 1
            oldest_ns = min(oldest_ns, pending.arrived_ns)
            if pending.expires_ns and (not expires_ns or pending.expires_ns < expires_ns):
                expires_ns = pending.expires_ns
            if rows in policy.preferred_rows:
                preferred, preferred_rows = len(batch), rows
            if rows >= policy.max_rows or shape is None:
                reason = "shape" if shape is None else "full"
                break
        if not batch:
            return batch, "", None
        delay_ns = policy.delay_ns
        waited = bool(delay_ns) and now_ns - oldest_ns >= delay_ns
        if preferred and preferred_rows < policy.max_rows and not waited:
            return batch[:preferred], "preferred", now_ns
        if not reason:
            if rows >= self._largest_preferred:
                reason = "preferred"
            elif not delay_ns:
                reason = "idle"
            elif waited:
                reason = "delay"
            elif expires_ns and now_ns >= expires_ns - LEAD_NS:
                reason = "deadline"
        due_ns = now_ns if reason else oldest_ns + delay_ns
        return batch, reason, min(due_ns, expires_ns - LEAD_NS) if expires_ns and not reason else due_ns
