"""Runs on threads that others wait for are told when they last too long."""

import threading
from collections.abc import Iterator
from time import monotonic_ns

import pytest
from penstock.overruns import LIMIT_NS, Overruns

from .fakes import LIMIT_S


@pytest.fixture
def overruns() -> Iterator[Overruns]:
    made = Overruns("test")
    yield made
    made.close()


def test_a_run_is_told_once_it_has_lasted_too_long(overruns: Overruns) -> None:
    began_ns = monotonic_ns() + 10**12  # later than the thread that looks by the clock could see
    first, second = overruns.begin(began_ns), overruns.begin(began_ns + 1)
    overruns.look(began_ns + LIMIT_NS)
    assert not first
    overruns.look(began_ns + LIMIT_NS + 1)
    assert first
    assert not second


def test_a_run_that_has_ended_is_not_told(overruns: Overruns) -> None:
    began_ns = monotonic_ns() + 10**12
    guard = overruns.begin(began_ns)
    overruns.end(guard)
    overruns.look(began_ns + 2 * LIMIT_NS)
    assert not guard


@pytest.mark.parametrize("round", range(2))
def test_somebody_looks(overruns: Overruns, round: int) -> None:
    for _ in range(round):
        overruns.end(overruns.begin(monotonic_ns()))
    told = threading.Event()
    overruns.begin(monotonic_ns()).watch(told.set)
    assert told.wait(LIMIT_S)


def test_one_that_never_looked_can_be_closed() -> None:
    Overruns("unused").close()
