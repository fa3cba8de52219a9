"""An ensemble that serves: each request is a flow through the graph, driven by whoever has the next answer."""

import functools
import logging
import threading
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, TypeAlias

from penstock.access import plain
from penstock.errors import Kind, ServingError, WorkerLostError
from penstock.messages import InferRequest, InferResponse, Phases, RequestedOutput
from penstock.runtime import PLENTY, Cancelled, Credit, Member, Reply, Running
from penstock.tensor import Tensor

from penstock_runtimes.ensemble.graph import Call, Flow, Graph

logger = logging.getLogger(__name__)

MOST_GRAPHS = 64  # that are kept, of those that lead to some outputs only

Result: TypeAlias = InferResponse | ServingError
Asked: TypeAlias = Call[Tensor]


class EnsembleInstance:
    """A graph, and the models that run its steps. It computes nothing, so any number of requests are under way."""

    streams = True
    max_in_flight = 2**31
    device = "cpu"
    inputs_ready_ns = 0
    outputs_came_ns = 0

    def __init__(self, model: str, version: int, graph: Graph, members: Sequence[Member], limit: int = 0) -> None:
        """`members` by the number of the step; `limit` calls of a step at a time for one request, 0 is no limit."""
        self.model = model
        self.version = str(version)
        self.members = members
        self.limit = limit
        self._whole = graph
        self._part = functools.lru_cache(MOST_GRAPHS)(graph.only)

    def graph(self, request: InferRequest) -> Graph:
        """The steps that lead to the outputs that a request asks for: the others need not run."""
        return self._part(tuple(request.outputs)) if request.outputs else self._whole

    def execute(
        self,
        batch: Sequence[InferRequest],  # noqa: ARG002
        unwanted: Cancelled | None = None,  # noqa: ARG002
    ) -> Sequence[Result]:
        """Never called: see `streams`."""
        raise ServingError(Kind.UNSUPPORTED, f"ensemble '{self.model}' answers later; use start")

    def start(self, request: InferRequest, reply: Reply, cancelled: Cancelled) -> None:
        passage = Passage(self, request, reply)
        passage.begin()
        cancelled.watch(lambda: passage.cancel(cancelled))

    def close(self) -> None:
        """There is nothing to release; its models are the server's."""


def _nobody(result: Result, final: bool = True, partial: bool = False) -> Credit:  # noqa: ARG001
    """In the place of a reply that has ended."""
    return PLENTY


class Passage:
    """One request on its way through the graph, and the credit of those who answer it.

    Events come from any thread, and are handled one after the other by the thread that brought the first: what it
    starts may answer before it returns, so events wait in line instead of on the stack. Only the thread that handles
    them touches the flow; `_events` and `_busy` are owned by the lock.
    """

    def __init__(self, ensemble: EnsembleInstance, request: InferRequest, reply: Reply) -> None:
        self._ensemble = ensemble
        self._request = request
        self._reply = reply
        self._graph = ensemble.graph(request)
        self._flow: Flow[Tensor] = Flow(self._graph, request.inputs, ensemble.limit)
        self._running: dict[Asked, Running] = {}
        self._computed = Phases(0, 0, 0)  # by the steps together, as statistics tell of an ensemble
        self._ended = False
        self._receiver: Credit = PLENTY  # of the ensemble's own answers
        self._lock = threading.Lock()
        self._moved = threading.Condition(self._lock)
        self._events: deque[Callable[[], None]] = deque()
        self._busy = False

    def begin(self) -> None:
        """Start the steps that need nothing but the request."""
        self._post(lambda: None)

    def cancel(self, cancelled: Cancelled) -> None:
        """Nobody wants the answer any more: no further step starts, and those that run are told. Any thread."""
        reason = cancelled.reason
        assert reason is not None
        self._post(lambda: self._end(reason))

    # -- credit: a member waits while its answers lie unread, or wait for the steps behind it

    @property
    def left(self) -> int:
        return 0 if self._is_full() else self._receiver.left

    def wait(self) -> None:
        with self._lock:
            self._moved.wait_for(lambda: not self._is_full())
        self._receiver.wait()

    def __await__(self) -> Generator[Any, None, None]:
        return self._receiver.__await__()  # what has no event loop cannot wake one: here the limit holds calls only

    def _is_full(self) -> bool:
        return not self._ended and self._ensemble.limit > 0 and self._flow.held > 0

    # -- events

    def _post(self, event: Callable[[], None]) -> None:
        with self._lock:
            self._events.append(event)
            if self._busy:
                return
            self._busy = True
        while (due := self._next()) is not None:
            if self._ended:
                continue
            try:
                due()
                self._go_on()
            except Exception as error:  # noqa: BLE001 - whatever it was, the client must have an answer
                self._end(self._failure(error))

    def _next(self) -> Callable[[], None] | None:
        with self._lock:
            self._moved.notify_all()
            if self._events:
                return self._events.popleft()
            self._busy = False
            return None

    def _answered(self, call: Asked, result: Result, final: bool = True, partial: bool = False) -> Credit:
        """A member's reply. What it says of its progress is not the ensemble's."""
        if not partial:
            self._post(functools.partial(self._take, call, result, final))
        return self

    def _take(self, call: Asked, result: Result, final: bool) -> None:
        if isinstance(result, ServingError):
            raise result
        if result.computed is not None:
            self._computed.add(result.computed)
        sums_up = final and call.answers > 0 and self._ensemble.members[call.step.number].sums_up
        if result.outputs and not sums_up:
            self._flow.answered(call, {tensor.name: tensor for tensor in result.outputs})
        if final:
            self._running.pop(call, None)
            self._flow.finished(call)

    def _go_on(self) -> None:
        """Start what can run, pass on what is complete, and end once nothing is left."""
        if self._ended:
            return
        once = not self._graph.top
        for outputs in self._flow.results():
            response = self._response(outputs)
            if once:
                self._end(response)
                return
            self._receiver = self._reply(response, final=False)
        for call in self._flow.take():
            member = self._ensemble.members[call.step.number]
            wanted = {name: RequestedOutput(name) for name in call.step.outputs}
            reply = functools.partial(self._answered, call)
            self._running[call] = member.infer(call.inputs, wanted, self._request, reply)
        if self._flow.ended:
            self._end(self._deadlock() if self._flow.stuck else self._response({}))

    def _response(self, outputs: Mapping[str, Tensor]) -> InferResponse:
        """The tensors as they came, under the ensemble's names for them, in the order that was asked for."""
        tensors = [
            Tensor(name, outputs[name].datatype, outputs[name].array) for name in self._graph.outputs if name in outputs
        ]
        return InferResponse(self._ensemble.model, self._ensemble.version, self._request.id, tensors)

    def _end(self, result: Result) -> None:
        """Answer for the last time, once; whatever still runs is not wanted any more."""
        if self._ended:
            return
        self._ended = True
        if isinstance(result, InferResponse):
            result.computed = self._computed
        running, self._running = self._running, {}
        for call in running.values():
            call.cancel(ServingError(Kind.CANCELLED, f"ensemble '{self._ensemble.model}' needs no more answers"))
        # The reply leads back here by way of who watches for its cancellation: tensors would wait for a collection.
        reply, self._reply = self._reply, _nobody
        reply(result)

    def _failure(self, error: Exception) -> ServingError:
        where = f"in ensemble '{self._ensemble.model}', "
        if isinstance(error, WorkerLostError):
            return WorkerLostError(where + error.message, error.blamed)
        if isinstance(error, ServingError):
            return ServingError(error.kind, where + error.message)
        id = plain(self._request.id or "<id_unknown>")
        logger.error(
            "ensemble '%s' failed on request %s", self._ensemble.model, id, exc_info=error, extra=self._request.names
        )
        return ServingError(Kind.INTERNAL, f"{where}{type(error).__name__}: {error}")

    def _deadlock(self) -> ServingError:
        return self._failure(
            ServingError(
                Kind.INVALID,
                f"[request id: {self._request.id or '<id_unknown>'}] unexpected deadlock, at least one output is not "
                "set while no more ensemble steps can be made",
            )
        )
