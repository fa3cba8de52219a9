"""Closed and open loops: when requests are sent, and what came of them."""

import asyncio
import itertools
import random
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from penstock.bench.latencies import Latencies

SEED = 20  # the same arrivals in every run
LOOKS = 4  # how often within a request's time limit it is looked for requests that are over it

Done: TypeAlias = Callable[[str], None]  # takes "" for a good answer, else what was wrong


class Carrier(Protocol):
    """Carries one request at a time, always the same one. Used on one event loop."""

    def send(self, done: Done) -> None:
        """Send the request. `done` is called once, later, never from within `send`."""

    def abort(self, reason: str) -> None:
        """Give the request up that is under way: `done` gets `reason`. The carrier can be used again."""

    async def close(self) -> None:
        """Release the connection."""


@dataclass(frozen=True, slots=True)
class Load:
    """How much to send. A run ends after `duration_s` or `requests`, whichever is first and not 0."""

    concurrency: int  # carriers: in a closed loop each sends its next request as soon as it has an answer
    rate: float = 0.0  # requests per second, sent whether or not answers come: an open loop. 0 is a closed one
    even: bool = False  # open loop: equal distances between arrivals, instead of a Poisson process
    duration_s: float = 0.0
    requests: int = 0
    timeout_s: float = 30.0  # a request that takes longer is given up and counts as an error


@dataclass(slots=True)
class Outcome:
    """What came of a run. Times are of the monotonic clock; latencies are of good answers only."""

    latencies: Latencies = field(default_factory=Latencies)
    lateness: Latencies = field(default_factory=Latencies)  # open loop: from an arrival's moment until it was looked at
    errors: int = 0
    first_error: str = ""
    waited: int = 0  # open loop: requests for which no carrier was free at their moment
    started_ns: int = 0
    ended_ns: int = 0  # of the last answer

    @property
    def answered(self) -> int:
        return len(self.latencies) + self.errors

    def add(self, latency_ns: int, error: str) -> None:
        if error:
            self.errors += 1
            self.first_error = self.first_error or error
        else:
            self.latencies.add(latency_ns)


def arrivals_ns(load: Load) -> Iterator[int]:
    """The moments of an open loop in nanoseconds from its start, up to the load's end."""
    step_ns = 1e9 / load.rate
    end_ns = load.duration_s * 1e9 or float("inf")
    moments: Iterator[float]
    if load.even:
        moments = (number * step_ns for number in itertools.count())
    else:
        dice = random.Random(SEED)
        moments = itertools.accumulate(dice.expovariate(1.0) * step_ns for _ in itertools.count())
    bounded = itertools.takewhile(lambda moment: moment < end_ns, moments)
    return map(int, itertools.islice(bounded, load.requests or None))


async def drive(carriers: Sequence[Carrier], load: Load, outcome: Outcome) -> None:
    """Put a load on carriers that are connected. `outcome` grows meanwhile; all is answered or given up at the end."""
    assert load.duration_s or load.requests
    run = _Open(carriers, load, outcome) if load.rate else _Closed(carriers, load, outcome)
    watch = asyncio.create_task(run.watch())
    outcome.started_ns = outcome.ended_ns = time.monotonic_ns()
    try:
        run.start()
        await asyncio.wait((watch, run.finished), return_when=asyncio.FIRST_COMPLETED)
        if watch.done():
            watch.result()
    finally:
        watch.cancel()
        run.stop()


class _Lane:
    """One carrier in a run, and the request on it."""

    __slots__ = ("_carrier", "_ended", "_outcome", "due_ns", "sent_ns")

    def __init__(self, carrier: Carrier, outcome: Outcome, ended: "Callable[[_Lane, int], None]") -> None:
        self._carrier = carrier
        self._outcome = outcome
        self._ended = ended
        self.due_ns = 0  # the moment that the latency counts from
        self.sent_ns = 0  # 0: nothing is under way

    def send(self, due_ns: int, now_ns: int) -> None:
        self.due_ns = due_ns
        self.sent_ns = now_ns
        self._carrier.send(self._done)

    def abort(self, reason: str) -> None:
        self._carrier.abort(reason)

    def _done(self, error: str) -> None:
        now_ns = time.monotonic_ns()
        self._outcome.add(now_ns - self.due_ns, error)
        self._outcome.ended_ns = now_ns
        self.sent_ns = 0
        self._ended(self, now_ns)


class _Run(ABC):
    """What both loops share. Owned by the event loop."""

    def __init__(self, carriers: Sequence[Carrier], load: Load, outcome: Outcome) -> None:
        self.load = load
        self.outcome = outcome
        self.lanes = [_Lane(carrier, outcome, self.ended) for carrier in carriers]
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @abstractmethod
    def start(self) -> None:
        """Send the first requests."""

    @abstractmethod
    def ended(self, lane: _Lane, now_ns: int) -> None:
        """A lane has had its answer: give it the next request, if there is one."""

    @abstractmethod
    def stop(self) -> None:
        """Send nothing more."""

    async def watch(self) -> None:
        """Give up what takes too long."""
        limit_s = self.load.timeout_s
        while True:
            await asyncio.sleep(limit_s / LOOKS)
            oldest_ns = time.monotonic_ns() - int(limit_s * 1e9)
            for lane in self.lanes:
                if 0 < lane.sent_ns < oldest_ns:
                    lane.abort(f"no answer within {limit_s:g} s")


class _Closed(_Run):
    """Each lane sends its next request when it has the answer to the last."""

    def start(self) -> None:
        self._end_ns = self.outcome.started_ns + int(self.load.duration_s * 1e9 or 2**62)
        self._left = self.load.requests or 2**62
        self._busy = len(self.lanes)
        for lane in self.lanes:
            self.ended(lane, time.monotonic_ns())

    def ended(self, lane: _Lane, now_ns: int) -> None:
        if self._left and now_ns < self._end_ns:
            self._left -= 1
            lane.send(now_ns, now_ns)
            return
        self._busy -= 1
        if not self._busy:
            self.finished.set_result(None)

    def stop(self) -> None:
        self._left = 0


class _Open(_Run):
    """Requests are due at moments of their own. One that finds no free lane waits for it, and its latency grows."""

    def start(self) -> None:
        self._free = list(self.lanes)
        self._waiting: deque[int] = deque()
        self._all_due = False
        self._stopped = threading.Event()
        # A thread, because the event loop's own timers have a resolution of a millisecond.
        self._pacer = threading.Thread(target=self._pace, args=[asyncio.get_running_loop()], name="pacer")
        self._pacer.start()

    def stop(self) -> None:
        self._waiting.clear()
        self._stopped.set()
        self._pacer.join()

    def _pace(self, loop: asyncio.AbstractEventLoop) -> None:
        for moment_ns in arrivals_ns(self.load):
            due_ns = self.outcome.started_ns + moment_ns
            wait_ns = due_ns - time.monotonic_ns()
            if self._stopped.wait(wait_ns / 1e9) if wait_ns > 0 else self._stopped.is_set():
                return
            loop.call_soon_threadsafe(self._due, due_ns)
        loop.call_soon_threadsafe(self._last)

    def _due(self, due_ns: int) -> None:
        now_ns = time.monotonic_ns()
        self.outcome.lateness.add(now_ns - due_ns)
        if self._free:
            self._free.pop().send(due_ns, now_ns)
        else:
            self.outcome.waited += 1
            self._waiting.append(due_ns)

    def _last(self) -> None:
        self._all_due = True
        self._look_for_end()

    def ended(self, lane: _Lane, now_ns: int) -> None:
        limit_s = self.load.timeout_s
        while self._waiting:
            due_ns = self._waiting.popleft()
            if now_ns - due_ns < limit_s * 1e9:
                lane.send(due_ns, now_ns)
                return
            self.outcome.add(now_ns - due_ns, f"not sent: no connection was free within {limit_s:g} s")
        self._free.append(lane)
        self._look_for_end()

    def _look_for_end(self) -> None:
        if self._all_due and len(self._free) == len(self.lanes):
            self.finished.set_result(None)
