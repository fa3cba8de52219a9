"""Many cases of each kind, and what came of them."""

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TypeAlias

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky

from conformance_tests.fuzz.cases import Case, HttpCase, write
from conformance_tests.fuzz.envelopes import binary_requests, json_requests
from conformance_tests.fuzz.http2 import http2_bytes
from conformance_tests.fuzz.messages import infer_messages
from conformance_tests.fuzz.mutation import binary_bytes, control_bytes, http_bytes, json_bytes, message_bytes
from conformance_tests.fuzz.senders import Fault, Sender

THREADS = 4  # that send the cases of one unit at the same time
UNIT = 500  # cases
FAULTS_LIMIT = 20  # of one thread in one unit: a server that answers nothing more would take for ever to say so

Make: TypeAlias = Callable[[Random], Case]


@dataclass(frozen=True, slots=True)
class Kind:
    """One sort of case: drawn by Hypothesis, which also shrinks what fails, or made from random numbers."""

    name: str
    protocol: str  # "http" or "grpc"
    share: int  # of a hundred cases
    drawn: st.SearchStrategy[HttpCase] | None = None
    made: Make | None = None


KINDS = {
    kind.name: kind
    for kind in (
        Kind("json", "http", 18, drawn=json_requests()),
        Kind("binary", "http", 12, drawn=binary_requests()),
        Kind("json-bytes", "http", 15, made=json_bytes),
        Kind("binary-bytes", "http", 15, made=binary_bytes),
        Kind("http-bytes", "http", 10, made=http_bytes),
        Kind("message", "grpc", 12, made=infer_messages),
        Kind("message-bytes", "grpc", 10, made=message_bytes),
        Kind("control-bytes", "grpc", 3, made=control_bytes),
        Kind("http2-bytes", "grpc", 5, made=http2_bytes),
    )
}


@dataclass(frozen=True, slots=True)
class Unit:
    """So many cases of a kind. The seed decides all of them."""

    kind: str
    seed: int
    count: int


@dataclass(frozen=True, slots=True)
class Failure:
    """A fault, and the file that holds the case; `key` is the same for faults that are much alike."""

    kind: str
    key: str
    text: str
    file: Path


@dataclass(slots=True)
class Tally:
    """What came of some units."""

    statuses: Counter[tuple[str, str]] = field(default_factory=Counter)  # by kind and status; "fault" for a fault
    slowest_s: dict[str, float] = field(default_factory=dict)  # by kind
    failures: list[Failure] = field(default_factory=list)

    def add(self, other: "Tally") -> None:
        self.statuses.update(other.statuses)
        for kind, took_s in other.slowest_s.items():
            self.slowest_s[kind] = max(took_s, self.slowest_s.get(kind, 0.0))
        known = {failure.key for failure in self.failures}
        self.failures += [failure for failure in other.failures if failure.key not in known]

    def cases(self, kind: str = "") -> int:
        return sum(number for (name, _), number in self.statuses.items() if kind in ("", name))

    def report(self) -> list[str]:
        """A line per kind, a line per sort of failure."""
        lines = []
        for kind in self.slowest_s:
            seen = {status: number for (name, status), number in sorted(self.statuses.items()) if name == kind}
            shown = ", ".join(f"{status} {number:,}" for status, number in seen.items())
            lines.append(f"{kind:<14}{self.cases(kind):>9,} cases  slowest {self.slowest_s[kind]:6.3f} s  {shown}")
        lines.append(f"{'all':<14}{self.cases():>9,} cases")
        lines += [f"FAULT in {failure.kind}: {failure.text}\n    {failure.file}" for failure in self.failures]
        return lines


def plan(cases: int, start: int, kinds: Iterable[str] = KINDS) -> list[Unit]:
    """Units that make up at least `cases` cases in the kinds' shares, in turns. Unit n has the seed `start` + n."""
    chosen = [KINDS[name] for name in kinds]
    total = sum(kind.share for kind in chosen)
    left = {kind.name: -(-cases * kind.share // total) for kind in chosen}
    units: list[Unit] = []
    while left:
        for name in [*left]:
            count = min(UNIT, left[name])
            units.append(Unit(name, start + len(units), count))
            left[name] -= count
            if not left[name]:
                del left[name]
    return units


def run(unit: Unit, http: str, grpc: str, directory: Path) -> Tally:
    """Send the cases of a unit. Each sort of fault is written to a file once."""
    kind = KINDS[unit.kind]
    if kind.drawn is not None:
        return run_drawn(unit, kind.drawn, http, grpc, directory)
    assert kind.made is not None
    return run_made(unit, kind.made, http, grpc, directory)


def run_made(unit: Unit, make: Make, http: str, grpc: str, directory: Path) -> Tally:
    """Cases made from random numbers, by several threads at the same time."""
    tally = Tally()
    shares = [range(thread, unit.count, THREADS) for thread in range(THREADS)]
    with ThreadPoolExecutor(THREADS) as threads:
        for part in threads.map(lambda numbers: _run_share(unit, numbers, make, http, grpc, directory), shares):
            tally.add(part)
    return tally


def _run_share(unit: Unit, numbers: Iterable[int], make: Make, http: str, grpc: str, directory: Path) -> Tally:
    tally = Tally()
    known: set[str] = set()
    with Sender(http, grpc) as sender:
        for number in numbers:
            case = make(Random(f"{unit.kind}/{unit.seed}/{number}"))
            try:
                tally.statuses[unit.kind, sender.send(case)] += 1
            except Fault as fault:
                tally.statuses[unit.kind, "fault"] += 1
                if fault.key not in known:
                    known.add(fault.key)
                    tally.failures.append(_failure(unit, fault, case, directory))
                if tally.statuses[unit.kind, "fault"] == FAULTS_LIMIT:
                    break
    tally.slowest_s[unit.kind] = sender.slowest_s
    return tally


def run_drawn(unit: Unit, strategy: st.SearchStrategy[HttpCase], http: str, grpc: str, directory: Path) -> Tally:
    """Cases drawn by Hypothesis. The smallest case that it finds for a fault is the one written down."""
    tally = Tally()
    known: set[str] = set()
    last: list[tuple[HttpCase, Fault]] = []  # the latest that failed

    repeated = 0  # faults of a sort that was known

    def send(case: HttpCase) -> None:
        nonlocal repeated
        if repeated >= FAULTS_LIMIT:
            return
        try:
            tally.statuses[unit.kind, sender.send(case)] += 1
        except Fault as fault:
            tally.statuses[unit.kind, "fault"] += 1
            if fault.key not in known:
                last[:] = [(case, fault)]
                raise
            repeated += 1

    with Sender(http, grpc) as sender:
        round_ = 0
        while (left := unit.count - tally.cases()) > 0 and repeated < FAULTS_LIMIT:
            # Each round ends at its first fault, which the next one does not count as news.
            decided = settings(
                max_examples=left,
                database=None,
                deadline=None,
                phases=[Phase.generate, Phase.shrink],
                suppress_health_check=[*HealthCheck],
                report_multiple_bugs=False,
            )
            try:
                seed(f"{unit.seed}/{round_}")(decided(given(strategy)(send)))()
            except (Fault, Flaky):
                case, fault = last.pop()
                known.add(fault.key)
                tally.failures.append(_failure(unit, fault, case, directory))
            round_ += 1
    tally.slowest_s[unit.kind] = sender.slowest_s
    return tally


def _failure(unit: Unit, fault: Fault, case: Case, directory: Path) -> Failure:
    name = re.sub(r"\W+", "-", fault.key)[:60].strip("-")
    with tempfile.NamedTemporaryFile(
        dir=directory, prefix=f"{unit.kind}-{unit.seed}-{name}-", suffix=".case", delete=False
    ) as file:
        path = Path(file.name)
    write(case, path)
    return Failure(unit.kind, fault.key, str(fault), path)
