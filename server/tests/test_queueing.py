"""Requests leave in the order of their arrival, unless nobody wants them any more."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from penstock.errors import Kind, ServingError
from penstock.model_config import QueuePolicy
from penstock.queueing import Fifo, Pending, PriorityQueue

from .fakes import pending, request

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
    assert fifo.wake_at(5) is None
    fifo.add(pending(), now_ns=0)
    assert fifo.wake_at(5) == 5


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


# -- priorities and queue policies


def sent(id: str = "", priority: int = 0, timeout_us: int = 0, deadline_ns: int = 0) -> Pending:
    asked = request(id=id)
    asked.priority, asked.timeout_us, asked.deadline_ns = priority, timeout_us, deadline_ns
    return pending(asked)


def filled(queue: PriorityQueue, *waiting: Pending) -> PriorityQueue:
    for one in waiting:
        queue.add(one, now_ns=0)
    return queue


def order(queue: PriorityQueue, now_ns: int = 0) -> list[str]:
    return [one.request.id for one in queue.ordered(now_ns)]


def test_higher_priorities_go_first_and_equal_ones_in_order() -> None:
    queue = PriorityQueue([QueuePolicy()] * 3, default_level=1)
    filled(queue, sent("a", 3), sent("b", 1), sent("c"), sent("d", 1), sent("e", 4), sent("f", 2))
    assert order(queue) == ["b", "d", "c", "e", "f", "a"]  # 0, and 4 of three, mean the default
    assert len(queue) == 6


def test_a_full_level_refuses_at_once_and_others_take_more() -> None:
    queue = PriorityQueue([QueuePolicy(max_size=2), QueuePolicy()])
    filled(queue, first := sent("a", 1), sent("b", 1), sent("c", 2))
    with pytest.raises(ServingError) as caught:
        queue.add(sent("x", 1), now_ns=0)
    assert caught.value.kind is Kind.UNAVAILABLE
    assert caught.value.message == "[request id: x] Exceeds maximum queue size"
    queue.drop(first)
    filled(queue, sent("d", 1))
    assert order(queue) == ["b", "d", "c"]


@pytest.mark.parametrize(
    ("policy", "timeout_us", "deadline_ns", "expires_ns"),
    [
        (QueuePolicy(), 5, 0, 0),
        (QueuePolicy(timeout_ns=9000), 0, 0, 9100),
        (QueuePolicy(timeout_ns=9000), 5, 0, 9100),
        (QueuePolicy(timeout_ns=9000, may_shorten=True), 5, 0, 5100),
        (QueuePolicy(timeout_ns=9000, may_shorten=True), 10, 0, 9100),
        (QueuePolicy(timeout_ns=9000, may_shorten=True), 0, 0, 9100),
        (QueuePolicy(may_shorten=True), 5, 0, 0),
        (QueuePolicy(timeout_ns=9000), 0, 8000, 8000),
        (QueuePolicy(timeout_ns=9000), 0, 9999, 9100),
        (QueuePolicy(), 0, 8000, 8000),
        (QueuePolicy(timeout_ns=9000, delays=True), 0, 0, 0),
        (QueuePolicy(timeout_ns=9000, delays=True), 0, 8000, 8000),
    ],
)
def test_a_request_expires_by_the_first_of_policy_timeout_and_deadline(
    policy: QueuePolicy, timeout_us: int, deadline_ns: int, expires_ns: int
) -> None:
    one = sent(timeout_us=timeout_us, deadline_ns=deadline_ns)
    PriorityQueue([policy]).add(one, now_ns=100)
    assert one.expires_ns == expires_ns


def test_what_is_refused_is_told_whose_time_ran_out() -> None:
    late, slow = sent(deadline_ns=1_000_000).lateness(3_500_000), sent(deadline_ns=9_000_000).lateness(3_500_000)
    assert (late.kind, late.message) == (
        Kind.DEADLINE,
        "the deadline passed 2.5 ms before the request could run",
    )
    assert (slow.kind, slow.message) == (Kind.TIMED_OUT, "Request timeout expired")


def test_what_is_delayed_goes_behind_the_others_of_its_level_and_keeps_its_place_in_the_limit() -> None:
    policy = QueuePolicy(timeout_ns=9000, delays=True, may_shorten=True, max_size=3)
    queue = PriorityQueue([policy, QueuePolicy()])
    filled(queue, sent("a", 1), sent("b", 1, timeout_us=5), last := sent("c", 1, timeout_us=5), sent("d", 2))
    assert order(queue, 4999) == ["a", "b", "c", "d"]
    assert order(queue, 5000) == ["a", "b", "c", "d"]  # both that are late stand behind the one that is not
    with pytest.raises(ServingError, match="Exceeds maximum queue size"):
        queue.add(sent("x", 1), now_ns=6000)
    assert queue.drop(last)
    queue.add(sent("e", 1), now_ns=6000)
    assert order(queue, 6000) == ["a", "e", "b", "d"]
    assert order(queue, 9000) == ["e", "b", "a", "d"]


def test_what_does_not_wait_cannot_be_dropped() -> None:
    queue = PriorityQueue([QueuePolicy()])
    filled(queue, one := sent())
    assert (queue.drop(one), queue.drop(one), queue.drop(sent()), len(queue)) == (True, False, False, 0)


POLICIES = st.lists(
    st.builds(QueuePolicy, timeout_ns=st.sampled_from([0, 10]), delays=st.booleans(), max_size=st.integers(0, 3)),
    min_size=1,
    max_size=3,
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 4)),  # a priority
        st.tuples(st.just("look"), st.just(0)),
        st.tuples(st.just("drop"), st.integers(0, 30)),  # one of those that were ever added
    ),
    max_size=50,
)


@given(policies=POLICIES, default=st.integers(0, 2), steps=STEPS)
def test_no_interleaving_loses_repeats_or_reorders_what_waits(
    policies: list[QueuePolicy], default: int, steps: list[tuple[str, int]]
) -> None:
    """Held against lists: by level those in time, in the order of their arrival, then those that were found late."""
    default %= len(policies)
    queue = PriorityQueue(policies, default)
    levels: list[tuple[list[Pending], list[Pending]]] = [([], []) for _ in policies]
    added: list[Pending] = []
    for now_ns, (step, number) in enumerate(steps):
        waiting = [one for level in levels for one in (*level[0], *level[1])]
        if step == "add":
            place = number - 1 if 0 < number <= len(policies) else default
            room = policies[place].max_size
            one = sent(priority=number)
            if room and sum(map(len, levels[place])) >= room:
                with pytest.raises(ServingError):
                    queue.add(one, now_ns)
            else:
                queue.add(one, now_ns)
                levels[place][0].append(one)
                added.append(one)
        elif step == "drop" and added:
            one = added[number % len(added)]
            assert queue.drop(one) == (one in waiting)
            for part in (part for level in levels for part in level if one in part):
                part.remove(one)
        else:
            for timely, late in levels:
                moving = [one for one in timely if 0 < one.moves_ns <= now_ns]
                timely[:] = [one for one in timely if one not in moving]
                late += moving
            expected = [one for level in levels for one in (*level[0], *level[1])]
            assert list(queue.ordered(now_ns)) == expected
        assert len(queue) == sum(len(part) for level in levels for part in level)
