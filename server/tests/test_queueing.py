"""Requests leave in the order of their arrival, unless nobody wants them any more."""

from penstock.errors import Kind, ServingError
from penstock.queueing import Fifo, Pending

from .fakes import pending

GONE = ServingError(Kind.CANCELLED, "gone")


class Shelf:
    """A holder that remembers what it was told to drop."""

    def __init__(self) -> None:
        self.dropped: list[Pending] = []

    def drop(self, pending: Pending) -> bool:
        self.dropped.append(pending)
        return True


def test_first_come_is_first_served_one_at_a_time() -> None:
    fifo = Fifo()
    first, second = pending(), pending()
    fifo.add(first, now_ns=0)
    fifo.add(second, now_ns=1)
    assert len(fifo) == 2
    assert (fifo.take(2), fifo.take(2), fifo.take(2)) == ([first], [second], [])
    assert len(fifo) == 0


def test_a_fifo_never_waits_for_time_to_pass() -> None:
    fifo = Fifo()
    fifo.add(pending(), now_ns=0)
    assert fifo.wake_at(0) is None


def test_a_dropped_request_does_not_leave() -> None:
    fifo = Fifo()
    first, second = pending(), pending()
    fifo.add(first, now_ns=0)
    fifo.add(second, now_ns=0)
    assert fifo.drop(first)
    assert fifo.take(0) == [second]


def test_what_has_left_cannot_be_dropped() -> None:
    fifo = Fifo()
    one = pending()
    fifo.add(one, now_ns=0)
    fifo.take(0)
    assert not fifo.drop(one)


def test_cancelling_drops_a_request_once() -> None:
    shelf, one = Shelf(), pending()
    one.holder = shelf
    one.cancel(GONE)
    one.cancel(ServingError(Kind.DEADLINE, "late"))
    assert shelf.dropped == [one]
    assert one.cancelled.reason is GONE


def test_a_request_that_waits_nowhere_can_be_cancelled() -> None:
    one = pending()
    one.cancel(GONE)
    assert one.cancelled


def test_a_watcher_is_called_once_also_when_it_comes_late() -> None:
    calls: list[str] = []
    one = pending()
    one.cancelled.watch(lambda: calls.append("early"))
    one.cancel(GONE)
    one.cancel(GONE)
    one.cancelled.watch(lambda: calls.append("late"))
    assert calls == ["early", "late"]
