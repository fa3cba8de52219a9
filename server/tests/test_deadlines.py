"""A request ends when its time is over, neither before nor twice."""

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from penstock.deadlines import Deadlines
from penstock.queueing import Pending

from .fakes import LIMIT_S, pending, request

FAR_NS = 10**15


class Heard:
    """What expired, in order."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.early = 0
        self._changed = threading.Condition()

    def __call__(self, one: Pending, now_ns: int) -> None:
        with self._changed:
            self.ids.append(one.request.id)
            self.early += now_ns < int(one.request.id)
            self._changed.notify_all()

    def wait(self, number: int) -> list[str]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.ids) >= number, LIMIT_S), self.ids
            return self.ids


@contextmanager
def deadlines(heard: Heard) -> Iterator[Deadlines]:
    made = Deadlines("m", heard)
    try:
        yield made
    finally:
        made.close()


def due(at_ns: int) -> Pending:
    return pending(request(id=str(at_ns)))


def test_requests_expire_in_the_order_of_their_times() -> None:
    heard = Heard()
    with deadlines(heard) as made:
        now_ns = time.monotonic_ns()
        times = [now_ns + ms * 1_000_000 for ms in (30, 10, 20)]
        for at_ns in (now_ns + FAR_NS, *times):
            made.add(due(at_ns), at_ns)
        assert heard.wait(3) == [str(at_ns) for at_ns in sorted(times)]
        assert (heard.early, len(made)) == (0, 1)


def test_a_nearer_time_wakes_who_sleeps_until_a_far_one() -> None:
    heard = Heard()
    with deadlines(heard) as made:
        made.add(due(0), time.monotonic_ns() + FAR_NS)
        for number in range(1, 21):  # at one of them, if not at each, the thread sleeps already
            made.add(due(0), time.monotonic_ns() + 1_000_000)
            heard.wait(number)


def test_what_is_forgotten_does_not_expire() -> None:
    heard = Heard()
    with deadlines(heard) as made:
        now_ns = time.monotonic_ns()
        forgotten, kept = due(now_ns + 20_000_000), due(now_ns + 40_000_000)
        made.add(forgotten, now_ns + 20_000_000)
        made.add(kept, now_ns + 40_000_000)
        made.forget(forgotten)
        made.forget(due(0))  # which never had a time
        assert heard.wait(1) == [kept.request.id]


def test_the_memory_of_what_ended_is_let_go_of_long_before_its_time() -> None:
    with deadlines(Heard()) as made:
        seen = []
        for _ in range(500):
            one = due(0)
            seen.append(weakref.ref(one.request.inputs["X"].array))
            made.add(one, time.monotonic_ns() + FAR_NS)
            made.forget(one)
        del one
        gc.collect()
        assert sum(ref() is not None for ref in seen) <= 70


def test_without_a_request_that_can_expire_there_is_no_thread() -> None:
    before = threading.active_count()
    with deadlines(Heard()) as made:
        assert threading.active_count() == before
        made.add(due(0), time.monotonic_ns() + FAR_NS)
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
