"""The only counters: per version of a model, in nanoseconds and counts. Everything that shows numbers reads these."""

import math
import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Container, Sequence
from typing import Literal, TypeAlias

import numpy as np
from msgspec import Struct, field

from penstock.messages import Phases


class Duration(Struct):
    """How often something happened, and how long it took in all."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int, count: int = 1) -> None:
        self.count += count
        self.ns += ns


class BatchStatistics(Struct):
    """Executions of one batch size."""

    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)


class ResponseStatistics(Struct):
    """The responses of one place in the order in which a decoupled model gives them. Times are nanoseconds."""

    compute_infer: Duration = field(default_factory=Duration)  # since the response before, or since the start
    compute_output: Duration = field(default_factory=Duration)
    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    empty_response: Duration = field(default_factory=Duration)  # ends of requests that were no answer
    cancel: Duration = field(default_factory=Duration)


Outcome: TypeAlias = Literal["success", "fail", "empty_response", "cancel"]


NO_GPU = -1


class Execution(Phases):
    """How one batch went through its instance, and when; monotonic nanoseconds.

    The phases of a request that was computed in several runs are the sums of theirs, and may be longer than it took.
    """

    started_ns: int
    ended_ns: int
    gathered_ns: int = 0  # how long before that an instance was free and a request was there: what a fuller batch cost
    gpu: int = NO_GPU  # that it ran on, by CUDA's number


MS = 1_000_000
# Bounds of the histograms of time: from what an inline model takes to what a client waits for.
TIMES_NS = tuple(int(ms * MS) for ms in (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10000))
FIRST_RESPONSE_MS = (100, 500, 2000, 5000)  # Triton's
RECENT_NS = 60_000 * MS
MOST_RECENT = 8192
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
FOLDED = 256  # executions that are counted together: one by one, each took as long as a short run of a model
NO_RUN = -1  # rows of a request that ran in parts, which have been counted
NOTED = 9  # numbers of each run

Values: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.int64]]"
Table: TypeAlias = "np.ndarray[tuple[int, int], np.dtype[np.int64]]"


class Histogram:
    """How many values lay between bounds; each belongs to the first bound that it does not exceed."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)  # ascending
        self.counts = [0] * (len(bounds) + 1)  # the last is of values beyond all bounds
        self.total = 0  # the sum of all values

    def add(self, value: int) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def add_all(self, values: Values) -> None:
        """A one-dimensional array of them."""
        places = np.searchsorted(self.bounds, values)
        for place, number in enumerate(np.bincount(places).tolist()):
            self.counts[place] += number
        self.total += int(values.sum())


class Recent:
    """The newest values, of which quantiles are told: of the last minute, and not more than a number of them."""

    __slots__ = ("_values",)

    def __init__(self) -> None:
        self._values: deque[tuple[int, int, int]] = deque(maxlen=MOST_RECENT)

    def add(self, value: int, now_ns: int) -> None:
        """One that no GPU had a part in."""
        self._values.append((now_ns, value, NO_GPU))

    def add_all(self, values: Values, then_ns: Values, gpus: Values) -> None:
        self._values.extend(zip(then_ns.tolist(), values.tolist(), gpus.tolist(), strict=True))

    def at(self, quantiles: Sequence[float], now_ns: int, gpus: Container[int] = (NO_GPU,)) -> list[float]:
        """The value at each quantile, of those on `gpus`; NaN where there is none."""
        ordered = sorted(value for then_ns, value, gpu in self._values if now_ns - then_ns <= RECENT_NS and gpu in gpus)
        if not ordered:
            return [math.nan] * len(quantiles)
        return [ordered[min(len(ordered) - 1, int(quantile * len(ordered)))] for quantile in quantiles]


class Summaries(Struct):
    """Of single requests, in nanoseconds. Kept only where they are asked for."""

    quantiles: tuple[float, ...]
    request: Recent = field(default_factory=Recent)
    queue: Recent = field(default_factory=Recent)
    compute_input: Recent = field(default_factory=Recent)
    compute_infer: Recent = field(default_factory=Recent)
    compute_output: Recent = field(default_factory=Recent)
    cache_hit: Recent = field(default_factory=Recent)
    cache_miss: Recent = field(default_factory=Recent)


class Histograms(Struct):
    """The phases of successful requests in nanoseconds, and the rows of executions."""

    request: Histogram = field(default_factory=lambda: Histogram(TIMES_NS))
    queue: Histogram = field(default_factory=lambda: Histogram(TIMES_NS))
    compute_input: Histogram = field(default_factory=lambda: Histogram(TIMES_NS))
    compute_infer: Histogram = field(default_factory=lambda: Histogram(TIMES_NS))
    compute_output: Histogram = field(default_factory=lambda: Histogram(TIMES_NS))
    gathered: Histogram = field(default_factory=lambda: Histogram(TIMES_NS))  # of executions
    rows: Histogram = field(default_factory=lambda: Histogram(ROWS))
    first_response: Histogram = field(default_factory=lambda: Histogram(FIRST_RESPONSE_MS))  # whole milliseconds


class Padded(Struct):
    """Elements of the inputs that an instance pads. Written by the thread that it runs on."""

    data: int = 0  # that requests sent
    padding: int = 0  # that they were filled up with


class Ran(Struct):
    """What executions came to, and the requests that they ended well."""

    inference_count: int = 0  # rows of those requests
    execution_count: int = 0
    success: Duration = field(default_factory=Duration)  # counts of requests, here and below
    queue: Duration = field(default_factory=Duration)
    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)

    def add(self, rows: Values, phases: Table) -> None:
        """Count executions by their rows, and requests: [5, requests] nanoseconds in the order of the fields."""
        self.execution_count += len(rows)
        self.inference_count += int(rows.sum())
        durations = (self.success, self.queue, self.compute_input, self.compute_infer, self.compute_output)
        for duration, ns in zip(durations, phases.sum(axis=1).tolist(), strict=True):
            duration.add(ns, phases.shape[1])


class Statistics(Ran):
    """Counts of one loaded version, written under one lock. Statistics extension, response fields.

    What is inherited is the whole: what ran anywhere, and what the cache answered. Executions are noted one by one and
    counted many at a time: call `fold` before reading.
    """

    gpus: dict[int, Ran] = field(default_factory=dict)  # what of the whole ran on each GPU that has an instance
    elsewhere: bool = True  # whether there is more in the whole: an instance on the CPU, or the cache
    last_inference_ms: int = 0  # since the Unix epoch
    fail: Duration = field(default_factory=Duration)
    cache_hit: Duration = field(default_factory=Duration)
    cache_miss: Duration = field(default_factory=Duration)  # looking up in vain, and keeping the answer
    batches: dict[int, BatchStatistics] = field(default_factory=dict)
    responses: dict[int, ResponseStatistics] = field(default_factory=dict)  # of a decoupled model, by place
    failures: dict[str, int] = field(default_factory=lambda: {"REJECTED": 0, "CANCELED": 0, "BACKEND": 0, "OTHER": 0})
    departures: dict[str, int] = field(default_factory=dict)  # of batches, by reason; written by the scheduler
    padded: tuple[Padded, ...] = ()  # of the instances that pad, each written by its own
    histograms: Histograms = field(default_factory=Histograms)
    summaries: Summaries | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)
    # Not counted yet: of each run rows, requests, nanoseconds of the phases, start and end, gathering, GPU; and of each
    # of its requests, when it arrived.
    _runs: list[int] = field(default_factory=list)
    _arrivals_ns: list[int] = field(default_factory=list)

    def executed(self, arrivals_ns: Sequence[int], rows: int, times: Execution) -> None:
        """Count one execution: when each request that it ended well arrived, and how many rows it computed.

        Every such request of a batch adds the batch's full compute times, as Triton counts. Parts of a request are
        rows; the request itself is counted by `joined`.
        """
        with self.lock:
            self._runs += (
                rows, len(arrivals_ns), times.input_ns, times.infer_ns, times.output_ns, times.started_ns,
                times.ended_ns, times.gathered_ns, times.gpu,
            )  # fmt: skip
            self._arrivals_ns += arrivals_ns
            if len(self._runs) >= FOLDED * NOTED:
                self._fold()

    def joined(self, arrived_ns: int, times: Execution) -> None:
        """Count a request that ran in parts, whose executions have been counted: it has their phases together.

        Where they ran on several GPUs, it counts on that of the part that was done first.
        """
        self.executed((arrived_ns,), NO_RUN, times)

    def fold(self) -> None:
        """Count what has been noted."""
        with self.lock:
            if self._runs:
                self._fold()

    def _fold(self) -> None:
        """Holds the lock."""
        # fromiter takes three quarters of the time of np.array, which looks at each number twice.
        noted = np.fromiter(self._runs, np.int64, len(self._runs)).reshape(-1, NOTED)
        arrivals_ns = np.fromiter(self._arrivals_ns, np.int64, len(self._arrivals_ns))
        self._runs.clear()
        self._arrivals_ns.clear()
        since_ns = time.monotonic_ns() - int(noted[:, 6].max())
        self.last_inference_ms = (time.time_ns() - since_ns) // MS
        seen = self.histograms
        runs = noted[noted[:, 0] != NO_RUN]
        rows = runs[:, 0]
        _, _, input_ns, infer_ns, output_ns, started_ns, ended_ns, _, on = np.repeat(noted, noted[:, 1], axis=0).T
        request_ns = ended_ns - arrivals_ns
        phases = np.stack((request_ns, started_ns - arrivals_ns, input_ns, infer_ns, output_ns))
        self.add(rows, phases)
        for gpu, ran in self.gpus.items():
            ran.add(rows[runs[:, 8] == gpu], phases[:, on == gpu])
        for size in np.unique(rows).tolist():
            of_size = runs[rows == size]
            batch = self.batches.get(size)
            if batch is None:
                batch = self.batches[size] = BatchStatistics()
            for duration, column in ((batch.compute_input, 2), (batch.compute_infer, 3), (batch.compute_output, 4)):
                duration.add(int(of_size[:, column].sum()), len(of_size))
        seen.rows.add_all(rows)
        seen.gathered.add_all(runs[:, 7])
        if not len(arrivals_ns):
            return
        histograms = (seen.request, seen.queue, seen.compute_input, seen.compute_infer, seen.compute_output)
        for histogram, values in zip(histograms, phases, strict=True):
            histogram.add_all(values)
        if (kept := self.summaries) is not None:
            summaries = (kept.request, kept.queue, kept.compute_input, kept.compute_infer, kept.compute_output)
            for recent, values in zip(summaries, phases, strict=True):
                recent.add_all(values, ended_ns, on)
        if not self.responses:  # else the first of them was counted as it came
            seen.first_response.add_all(request_ns // MS)

    def hit(self, lookup_ns: int, queue_ns: int) -> None:
        """Count a request that the cache answered: how long that took, and how long it had been there before."""
        with self.lock:
            self.cache_hit.add(lookup_ns)
            self.queue.add(queue_ns)
            self.success.add(queue_ns + lookup_ns)
            self.histograms.request.add(queue_ns + lookup_ns)
            self.histograms.first_response.add((queue_ns + lookup_ns) // MS)
            self.histograms.queue.add(queue_ns)
            if self.summaries is not None:
                now_ns = time.monotonic_ns()
                self.summaries.request.add(queue_ns + lookup_ns, now_ns)
                self.summaries.queue.add(queue_ns, now_ns)
                self.summaries.cache_hit.add(lookup_ns, now_ns)

    def missed(self, lookup_ns: int, insertion_ns: int) -> None:
        """Count a successful request that the cache could not answer: looking it up, and keeping its answer.

        It was looked up before it ended, and its answer kept after, so only that makes it longer.
        """
        with self.lock:
            self.cache_miss.add(lookup_ns + insertion_ns)
            self.success.add(insertion_ns, count=0)
            self.histograms.request.total += insertion_ns
            if self.summaries is not None:
                self.summaries.cache_miss.add(lookup_ns + insertion_ns, time.monotonic_ns())

    def responded(self, place: int, infer_ns: int, outcome: Outcome, request_ns: int) -> None:
        """Count a response of a decoupled model: its place, how long after the one before, what it was.

        Its request had come `request_ns` before. Its tensors are handed over as they are, so compute_output takes no
        time.
        """
        with self.lock:
            counts = self.responses.setdefault(place, ResponseStatistics())
            if outcome != "cancel":
                counts.compute_infer.add(infer_ns)
            if outcome == "success":
                counts.compute_output.add(0)
                if not place:
                    self.histograms.first_response.add(request_ns // MS)
            duration: Duration = getattr(counts, outcome)
            duration.add(infer_ns)

    def failed(self, reason: str, ns: int) -> None:
        """Count a request that failed: why (`REJECTED`, `CANCELED`, `BACKEND`, `OTHER`), after how long."""
        with self.lock:
            self.fail.add(ns)
            self.failures[reason] += 1
