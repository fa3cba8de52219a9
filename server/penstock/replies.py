"""Replies that wait for others: until those before them have left, or until all parts of a request have come."""

import threading
from collections import deque
from collections.abc import Iterator

from msgspec.structs import replace

from penstock.errors import ServingError
from penstock.messages import InferRequest, InferResponse
from penstock.queueing import Pending
from penstock.runtime import PLENTY, Cancelled, Credit, Reply
from penstock.statistics import Execution
from penstock.tensor import Tensor, join

Result = InferResponse | ServingError


class InOrder:
    """Lets answers leave in the order in which `slot` was called for their requests. Safe on any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._slots: deque[_Slot] = deque()
        self._sending = False  # a thread hands answers on, and will hand on what comes meanwhile

    def slot(self, reply: Reply) -> "_Slot":
        """A reply that passes on to `reply` once everything before it has had its final one."""
        slot = _Slot(self, reply)
        with self._lock:
            self._slots.append(slot)
        return slot

    def withdraw(self, slot: "_Slot") -> None:
        """The request was not accepted: nobody shall wait for its answer."""
        with self._lock:
            slot.ended = True
        self.send()

    def send(self) -> None:
        """Hand on what is next in order, unless another thread does so already. Raises what the last to fail raised."""
        with self._lock:
            if self._sending:
                return
            self._sending = True
        failure: Exception | None = None
        while (ready := self._next()) is not None:
            reply, result, final, partial = ready
            try:
                reply(result, final, partial)
            except Exception as error:  # noqa: BLE001 - raised once those behind it have their answers
                failure = error
        if failure is not None:
            raise failure

    def _next(self) -> tuple[Reply, Result, bool, bool] | None:
        with self._lock:
            while self._slots:
                slot = self._slots[0]
                if slot.held:
                    return (slot.reply, *slot.held.popleft())
                if not slot.ended:
                    break
                self._slots.popleft()
            self._sending = False
            return None


class _Slot:
    """The reply of one request, in its place. Fields are owned by the lock of its order."""

    __slots__ = ("_order", "ended", "held", "reply")

    def __init__(self, order: InOrder, reply: Reply) -> None:
        self._order = order
        self.reply = reply
        self.held: deque[tuple[Result, bool, bool]] = deque()
        self.ended = False

    def __call__(self, result: Result, final: bool = True, partial: bool = False) -> Credit:
        with self._order._lock:
            self.held.append((result, final, partial))
            self.ended = self.ended or final
        self._order.send()
        return PLENTY


class Whole:
    """A request that is too large for one batch: its parts, each a request of its own, and the answer made of theirs.

    It is the holder of its request. Safe on any thread.
    """

    def __init__(self, pending: Pending, most_rows: int) -> None:
        self.pending = pending
        self.parts = [
            Pending(part, pending.reply, Cancelled(), pending.arrived_ns, part.deadline_ns)
            for part in _cut(pending.request, most_rows)
        ]
        for part in self.parts:
            part.whole = self
        self._answers: dict[Pending, InferResponse] = {}
        self._ran: list[Execution] = []
        self._ended = False
        self._lock = threading.Lock()

    def put(self, part: Pending, answer: Result, times: Execution | None = None) -> Result | None:
        """Take a part's answer, and how it was computed where it was.

        Gives the answer to the whole once: with the last part, or the first that failed.
        """
        with self._lock:
            if self._ended:
                return None
            if times is not None:
                self._ran.append(times)
            if isinstance(answer, InferResponse):
                self._answers[part] = answer
                if len(self._answers) < len(self.parts):
                    return None
            self._ended = True
        if isinstance(answer, InferResponse):
            return self._joined()
        for other in self.parts:
            other.cancel(answer)
        return answer

    @property
    def times(self) -> Execution:
        """From the first part's start to the end of the last, with the phases of all. Once all are computed."""
        first, *others = self._ran
        together = replace(first, gathered_ns=0)
        for times in others:
            together.add(times)
            together.started_ns = min(together.started_ns, times.started_ns)
            together.ended_ns = max(together.ended_ns, times.ended_ns)
        return together

    def drop(self, pending: Pending) -> bool:
        """Cancel the parts, as their whole was. The answer comes from them."""
        assert pending.cancelled.reason is not None
        for part in self.parts:
            part.cancel(pending.cancelled.reason)
        return True

    def _joined(self) -> Result:
        answers = [self._answers[part] for part in self.parts]
        first, outputs = answers[0], []
        try:
            for tensors in zip(*(answer.outputs for answer in answers), strict=True):
                array = join([tensor.array for tensor in tensors])
                outputs.append(Tensor(tensors[0].name, tensors[0].datatype, array))
        except ServingError as error:
            return error
        return InferResponse(first.model, first.version, first.id, outputs, first.parameters)


def _cut(request: InferRequest, most_rows: int) -> Iterator[InferRequest]:
    """Requests of at most so many rows each, over the same memory."""
    for start in range(0, request.rows, most_rows):
        end = min(start + most_rows, request.rows)
        yield InferRequest(
            request.model,
            request.version,
            request.id,
            {name: Tensor(name, tensor.datatype, tensor.array[start:end]) for name, tensor in request.inputs.items()},
            request.outputs,
            request.parameters,
            request.priority,
            request.deadline_ns,
            request.timeout_us,
            rows=end - start,
        )
