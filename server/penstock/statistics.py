"""The only counters: per version of a model, in nanoseconds and counts. Everything that shows numbers reads these."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Duration:
    """How often something happened, and how long it took in all."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int, count: int = 1) -> None:
        self.count += count
        self.ns += ns


@dataclass(slots=True)
class BatchStatistics:
    """Executions of one batch size."""

    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)


@dataclass(frozen=True, slots=True)
class Execution:
    """When one batch went through its instance; monotonic nanoseconds."""

    started_ns: int
    inputs_ready_ns: int
    outputs_came_ns: int
    ended_ns: int


@dataclass(slots=True)
class Statistics:
    """Counts of one loaded version, written once per batch under one lock. Statistics extension, response fields."""

    last_inference_ms: int = 0  # since the Unix epoch
    inference_count: int = 0  # rows of successful requests
    execution_count: int = 0
    success: Duration = field(default_factory=Duration)  # counts of requests, here and below
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)
    batches: dict[int, BatchStatistics] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=lambda: {"REJECTED": 0, "CANCELED": 0, "BACKEND": 0, "OTHER": 0})
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def executed(
        self, arrivals_ns: Sequence[int], rows: Sequence[int], failed_arrivals_ns: Sequence[int], times: Execution
    ) -> None:
        """Count one execution: when each successful request arrived and how many rows it had; when each failed arrived.

        Every successful request of a batch adds the batch's full compute times, as Triton counts.
        """
        number, total = len(arrivals_ns), sum(rows)
        compute_input = times.inputs_ready_ns - times.started_ns
        compute_infer = times.outputs_came_ns - times.inputs_ready_ns
        compute_output = times.ended_ns - times.outputs_came_ns
        with self.lock:
            self.last_inference_ms = time.time_ns() // 1_000_000
            if failed_arrivals_ns:
                failed = len(failed_arrivals_ns)
                self.fail.add(failed * times.ended_ns - sum(failed_arrivals_ns), failed)
                self.failures["BACKEND"] += failed
            if not number:
                return
            self.execution_count += 1
            self.inference_count += total
            arrived = sum(arrivals_ns)
            self.success.add(number * times.ended_ns - arrived, number)
            self.queue.add(number * times.started_ns - arrived, number)
            self.compute_input.add(number * compute_input, number)
            self.compute_infer.add(number * compute_infer, number)
            self.compute_output.add(number * compute_output, number)
            batch = self.batches.get(total)
            if batch is None:
                batch = self.batches[total] = BatchStatistics()
            batch.compute_input.add(compute_input)
            batch.compute_infer.add(compute_infer)
            batch.compute_output.add(compute_output)

    def failed(self, reason: str, ns: int) -> None:
        """Count a request that ended without execution: why (`REJECTED`, `CANCELED`, `OTHER`), after how long."""
        with self.lock:
            self.fail.add(ns)
            self.failures[reason] += 1
