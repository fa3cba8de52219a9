"""One measurement: connect, one request that must succeed, warm up, then the load with CPU time beside it."""

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from penstock.bench import cpu
from penstock.bench.load import Carrier, Load, Outcome, drive
from penstock.client.transport import Metadata
from penstock.errors import Kind, ServingError
from penstock.messages import InferRequest

BUSY = 0.85  # of one core: from there on a client on one event loop may be what limits the figures
LATE_US = 1000.0  # sends that are later than this, for every hundredth request, make latencies doubtful
PROGRESS_S = 0.2


class Target(Protocol):
    """A way to reach a server. Its methods raise ServingError."""

    address: str

    def metadata(self, model: str, version: str) -> Metadata:
        """What a model takes and gives. Blocks."""

    async def connect(self, request: InferRequest, count: int) -> Sequence[Carrier]:
        """Carriers of one request, connected."""

    def server_pids(self) -> tuple[int, ...]:
        """The server's processes; none where it is on another machine, or is this process."""

    async def close(self) -> None:
        """Release what is shared by its carriers, which are closed before."""


@dataclass(frozen=True, slots=True)
class Result:
    """Figures of one measurement. Latencies are of good answers only, in microseconds.

    In an open loop they count from the moment at which a request was due, so a server that stalls is not flattered.
    """

    protocol: str
    address: str
    concurrency: int
    rate: float  # 0: closed loop
    seconds: float
    requests: int  # answered well
    errors: int
    first_error: str
    requests_per_s: float
    p50_us: float
    p90_us: float
    p99_us: float
    max_us: float
    server: str  # whose CPU time it is: "name PID"; "" where it could not be seen
    server_cpu_us: float | None  # per request, threads and children included
    client_cpu_share: float | None  # of one core; None in process, where client and server are one
    lateness_p99_us: float  # open loop: how much later than due the client came to send
    waited: int  # open loop: requests that found every connection busy

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"doubts": self.doubts}

    @property
    def doubts(self) -> list[str]:
        """What a reader must know before believing the figures."""
        found = []
        if self.client_cpu_share is not None and self.client_cpu_share >= BUSY:
            found.append(
                f"the client used {self.client_cpu_share:.0%} of a core: rate and latencies may be its own, "
                "not the server's"
            )
        if self.lateness_p99_us > LATE_US:
            found.append(f"every hundredth request was due {self.lateness_p99_us:.0f} us before the client came to it")
        if self.waited:
            found.append(f"{self.waited} requests had to wait for a connection; --concurrency allows more of them")
        if self.errors:
            found.append(f"{self.errors} requests failed, the first: {self.first_error}")
        return found


def server_pids(target: Target, given: int | None) -> tuple[int, ...]:
    """The processes whose CPU time counts. Raises ServingError(INVALID) for a given one that does not exist."""
    if given is None:
        return target.server_pids()
    if cpu.used_ns([given]) is None:
        raise ServingError(Kind.INVALID, f"there is no process {given}")
    return (given,)


async def measure(
    target: Target,
    protocol: str,
    request: InferRequest,
    load: Load,
    warmup_s: float,
    pids: Sequence[int],
    progress: Callable[[str], None] | None = None,
) -> Result:
    """Raises ServingError if the target cannot be reached or the first request is answered with an error."""
    carriers = await target.connect(request, load.concurrency)
    try:
        await _probe(carriers[0], load.timeout_s)
        if warmup_s:
            await _shown(carriers, replace(load, duration_s=warmup_s, requests=0), Outcome(), "warming up", progress)
        outcome = Outcome()
        server_ns, client_ns, wall_ns = cpu.used_ns(pids), time.process_time_ns(), time.monotonic_ns()
        await _shown(carriers, load, outcome, _label(protocol, load), progress)
        client_share = (time.process_time_ns() - client_ns) / (time.monotonic_ns() - wall_ns)
        server_end_ns = cpu.used_ns(pids)
    finally:
        await asyncio.gather(*(carrier.close() for carrier in carriers))
    seconds = (outcome.ended_ns - outcome.started_ns) / 1e9
    p50, p90, p99, highest = outcome.latencies.percentiles(50, 90, 99, 100)
    [lateness] = outcome.lateness.percentiles(99)
    seen = pids and server_ns is not None and server_end_ns is not None and outcome.answered
    return Result(
        protocol=protocol,
        address=target.address,
        concurrency=load.concurrency,
        rate=load.rate,
        seconds=seconds,
        requests=len(outcome.latencies),
        errors=outcome.errors,
        first_error=outcome.first_error,
        requests_per_s=len(outcome.latencies) / seconds if seconds else 0.0,
        p50_us=p50 / 1e3,
        p90_us=p90 / 1e3,
        p99_us=p99 / 1e3,
        max_us=highest / 1e3,
        server=", ".join(f"{cpu.name(pid)} {pid}" for pid in pids) if seen else "",
        server_cpu_us=((server_end_ns or 0) - (server_ns or 0)) / 1e3 / outcome.answered if seen else None,
        client_cpu_share=None if os.getpid() in pids else client_share,
        lateness_p99_us=lateness / 1e3,
        waited=outcome.waited,
    )


async def _probe(carrier: Carrier, limit_s: float) -> None:
    """One request. What is wrong with it is wrong with all of them."""
    answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    carrier.send(answer.set_result)
    try:
        error = await asyncio.wait_for(asyncio.shield(answer), limit_s)
    except TimeoutError:
        carrier.abort(f"no answer within {limit_s:g} s")
        error = await answer
    if error:
        raise ServingError(Kind.UNAVAILABLE, f"the first request failed: {error}")


async def _shown(
    carriers: Sequence[Carrier], load: Load, outcome: Outcome, label: str, progress: Callable[[str], None] | None
) -> None:
    if progress is None:
        await drive(carriers, load, outcome)
        return

    async def show() -> None:
        while True:
            progress(f"{label}: {outcome.answered} requests, {outcome.errors} errors")
            await asyncio.sleep(PROGRESS_S)

    showing = asyncio.create_task(show())
    try:
        await drive(carriers, load, outcome)
    finally:
        showing.cancel()
        progress("")


def _label(protocol: str, load: Load) -> str:
    return f"{protocol} at {load.rate:g}/s" if load.rate else f"{protocol}, concurrency {load.concurrency}"
