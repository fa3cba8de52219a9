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
    first, second = overruns.begin(overruns.track(), began_ns), overruns.begin(overruns.track(), began_ns + 1)
    overruns.look(began_ns + LIMIT_NS)
    assert not first
    overruns.look(began_ns + LIMIT_NS + 1)
    assert first
    assert not second


def test_a_run_that_has_ended_is_not_told(overruns: Overruns) -> None:
    began_ns = monotonic_ns() + 10**12
    track = overruns.track()
    guard = overruns.begin(track, began_ns)
    track.since_ns = 0
    overruns.look(began_ns + 2 * LIMIT_NS)
    assert not guard


def test_one_guard_serves_the_runs_of_a_track_until_it_ends_one(overruns: Overruns) -> None:
    began_ns = monotonic_ns() + 10**12
    track = overruns.track()
    guard = overruns.begin(track, began_ns)
    track.since_ns = 0
    assert overruns.begin(track, began_ns) is guard
    overruns.look(began_ns + LIMIT_NS + 1)
    assert guard
    track.since_ns = 0
    assert not overruns.begin(track, began_ns)


def test_a_guard_does_not_gather_what_runs_leave_on_it(overruns: Overruns) -> None:
    track = overruns.track()
    guards = []
    for _ in range(8):
        guards.append(overruns.begin(track, monotonic_ns()))
        guards[-1].watch(lambda: None)
        track.since_ns = 0
    assert max(map(guards.count, guards)) == 2


@pytest.mark.parametrize("round", range(2))
def test_somebody_looks(overruns: Overruns, round: int) -> None:
    for _ in range(round):
        track = overruns.track()
        overruns.begin(track, monotonic_ns())
        track.since_ns = 0
    told = threading.Event()
    overruns.begin(overruns.track(), monotonic_ns()).watch(told.set)
    assert told.wait(LIMIT_S)


def test_one_that_never_looked_can_be_closed() -> None:
    Overruns("unused").close()
