"""When requests are sent and what is counted, with carriers that answer as a test tells them to."""

import asyncio
import itertools
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field

import pytest
from penstock.bench.latencies import Latencies
from penstock.bench.load import Done, Load, Outcome, arrivals_ns, drive

LIMIT_S = 20.0  # of a whole test: nothing in it takes long, but a lost answer must not hang it


def run(test: Coroutine[object, object, None]) -> None:
    asyncio.run(asyncio.wait_for(test, LIMIT_S))


@dataclass
class Server:
    """Answers each request in the next turn of the loop with the next of `errors`, "" from then on."""

    errors: list[str] = field(default_factory=list)
    sent: int = 0
    under_way: int = 0
    most_under_way: int = 0

    def begin(self) -> None:
        self.sent += 1
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)

    def end(self) -> str:
        self.under_way -= 1
        return self.errors.pop(0) if self.errors else ""


class QuickCarrier:
    def __init__(self, server: Server) -> None:
        self._server = server

    def send(self, done: Done) -> None:
        self._server.begin()
        asyncio.get_running_loop().call_soon(lambda: done(self._server.end()))

    def abort(self, reason: str) -> None:
        raise AssertionError("every request is answered")

    async def close(self) -> None:
        """There is nothing to release."""


class HeldCarrier:
    """Answers only when it is told to, or aborted."""

    def __init__(self, sent: Callable[["HeldCarrier"], None] = lambda carrier: None) -> None:
        self.done: Done | None = None
        self._sent = sent

    def send(self, done: Done) -> None:
        assert self.done is None, "one request at a time"
        self.done = done
        self._sent(self)

    def abort(self, reason: str) -> None:
        self.answer(reason)

    def answer(self, error: str = "") -> None:
        done, self.done = self.done, None
        assert done is not None
        done(error)

    async def close(self) -> None:
        """There is nothing to release."""


class Counted(Latencies):
    """Says when so many times have come."""

    def __init__(self, wanted: int) -> None:
        super().__init__()
        self.reached = asyncio.Event()
        self._wanted = wanted

    def add(self, time_ns: int) -> None:
        super().add(time_ns)
        if len(self) == self._wanted:
            self.reached.set()


def driven(load: Load, server: Server) -> Outcome:
    outcome = Outcome()
    run(drive([QuickCarrier(server) for _ in range(load.concurrency)], load, outcome))
    return outcome


@pytest.mark.parametrize(
    ("load", "moments"),
    [
        (Load(1, rate=1000, even=True, requests=4), [0, 1_000_000, 2_000_000, 3_000_000]),
        (Load(1, rate=4, even=True, duration_s=1), [0, 250_000_000, 500_000_000, 750_000_000]),
        (Load(1, rate=4, even=True, duration_s=1, requests=2), [0, 250_000_000]),
        (Load(1, rate=0.5, even=True, duration_s=1), [0]),
    ],
)
def test_even_arrivals_are_equally_far_apart_until_time_or_number_is_reached(load: Load, moments: list[int]) -> None:
    assert list(arrivals_ns(load)) == moments


def test_poisson_arrivals_have_the_rate_and_the_spread_of_their_distances() -> None:
    moments = list(arrivals_ns(Load(1, rate=1000, requests=20_000)))
    distances = [later - earlier for earlier, later in itertools.pairwise([0, *moments])]
    mean = sum(distances) / len(distances)
    variance = sum((distance - mean) ** 2 for distance in distances) / len(distances)
    assert min(distances) >= 0
    assert mean == pytest.approx(1e6, rel=0.03)
    assert variance**0.5 == pytest.approx(1e6, rel=0.05)  # an exponential distribution's deviation is its mean


def test_arrivals_are_the_same_in_every_run() -> None:
    load = Load(1, rate=100, duration_s=1)
    assert list(arrivals_ns(load)) == list(arrivals_ns(load))


@pytest.mark.parametrize("concurrency", [1, 3, 8])
def test_a_closed_loop_keeps_every_carrier_busy_until_the_number_is_sent(concurrency: int) -> None:
    server = Server()
    outcome = driven(Load(concurrency, requests=50), server)
    assert (server.sent, server.most_under_way) == (50, concurrency)
    assert (len(outcome.latencies), outcome.errors, outcome.answered) == (50, 0, 50)
    assert outcome.ended_ns > outcome.started_ns


def test_a_closed_loop_with_fewer_requests_than_carriers_ends() -> None:
    server = Server()
    assert driven(Load(8, requests=3), server).answered == 3
    assert server.sent == 3


def test_a_closed_loop_ends_with_its_time() -> None:
    outcome = driven(Load(2, duration_s=0.02), Server())
    assert outcome.answered > 2


@pytest.mark.parametrize("rate", [0, 5000])
def test_errors_are_counted_apart_and_have_no_latency(rate: float) -> None:
    outcome = driven(Load(1, rate=rate, requests=10), Server(["", "503 full", "400 wrong"]))
    assert (len(outcome.latencies), outcome.errors, outcome.first_error) == (8, 2, "503 full")


def test_an_open_loop_sends_every_request_that_is_due() -> None:
    server = Server()
    outcome = driven(Load(4, rate=20_000, duration_s=0.02, even=True), server)
    assert server.sent == len(outcome.latencies) == len(outcome.lateness) == 400


def test_in_an_open_loop_latency_counts_from_the_moment_a_request_was_due() -> None:
    async def test() -> None:
        carrier = HeldCarrier()
        due = Counted(5)
        outcome = Outcome(lateness=due)
        load = Load(1, rate=1000, even=True, requests=5)
        driving = asyncio.create_task(drive([carrier], load, outcome))
        await due.reached.wait()  # the first is under way, the others are due: the server has stalled
        for _ in range(5):
            carrier.answer()
        await driving
        assert outcome.waited == 4
        # They were due 1 ms apart and all are answered together, so each has waited a millisecond less than the one
        # before. A client that counted from sending would show one long latency and four of nothing.
        latencies = outcome.latencies.percentiles(20, 40, 60, 80, 100)
        for shorter, longer in itertools.pairwise(latencies):
            assert longer - shorter >= 500_000

    run(test())


def test_a_request_without_an_answer_is_given_up() -> None:
    carriers = [HeldCarrier(), HeldCarrier()]
    outcome = Outcome()
    run(drive(carriers, Load(2, requests=2, timeout_s=0.01), outcome))
    assert (outcome.errors, outcome.first_error) == (2, "no answer within 0.01 s")


def test_a_request_that_waits_too_long_for_a_carrier_is_not_sent() -> None:
    outcome = Outcome()
    run(drive([HeldCarrier()], Load(1, rate=1000, even=True, requests=3, timeout_s=0.05), outcome))
    assert outcome.errors == 3
    assert outcome.first_error == "no answer within 0.05 s"


def test_cancelling_a_run_stops_it() -> None:
    async def test() -> None:
        sent: list[HeldCarrier] = []
        carriers: Sequence[HeldCarrier] = [HeldCarrier(sent.append) for _ in range(3)]
        driving = asyncio.create_task(drive(carriers, Load(3, duration_s=LIMIT_S), Outcome()))
        await asyncio.sleep(0)
        assert len(sent) == 3
        driving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await driving
        for carrier in carriers:
            carrier.answer()
        assert len(sent) == 3

    run(test())
