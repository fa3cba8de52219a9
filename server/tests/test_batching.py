"""Which requests run together, why and when: arithmetic on times and rows."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from penstock.batching import DEPARTURES, LEAD_NS, Batcher
from penstock.errors import Kind, ServingError
from penstock.messages import InferRequest
from penstock.model_config import BatchPolicy, Padding, QueuePolicy
from penstock.queueing import Pending
from penstock.runtime import Cancelled
from penstock.tensor import FP32, Tensor

from .fakes import Answers

MS = 1_000_000


def sent(
    id: str = "",
    rows: int = 1,
    *tail: int,
    at_ns: int = 0,
    priority: int = 0,
    deadline_ns: int = 0,
    without: str = "",
) -> Pending:
    """A request of `rows` rows that arrives at `at_ns`; its inputs X and Z have the shape [rows, *tail]."""
    array = np.zeros((rows, *tail), np.float32)
    inputs = {name: Tensor(name, FP32, array) for name in ("X", "Z") if name != without}
    request = InferRequest("m", "", id, inputs, {}, {}, priority, deadline_ns, rows=rows)
    return Pending(request, Answers(), Cancelled(), at_ns, request.deadline_ns)


class Bench:
    """A batcher, and what it counted."""

    def __init__(self, *waiting: Pending, policy: BatchPolicy) -> None:
        self.counted = dict.fromkeys(DEPARTURES, 0)
        self.batcher = Batcher(policy, self.counted)
        self.add(*waiting)

    def add(self, *waiting: Pending) -> None:
        for pending in waiting:
            self.batcher.add(pending, pending.arrived_ns)

    def take(self, now_ns: int = 0) -> list[str]:
        return [pending.request.id for pending in self.batcher.take(now_ns)]

    def reasons(self) -> dict[str, int]:
        return {reason: number for reason, number in self.counted.items() if number}


def bench(*waiting: Pending, rows: int = 4, preferred: tuple[int, ...] = (), delay_ns: int = 0) -> Bench:
    return Bench(*waiting, policy=BatchPolicy(rows, preferred, delay_ns, varying=("X", "Z")))


def test_without_a_delay_a_batch_is_what_waited_while_the_instance_was_busy() -> None:
    made = bench(sent("a"), sent("b"), sent("c"))
    assert made.batcher.wake_at(7) == 7
    assert made.take() == ["a", "b", "c"]
    assert made.take() == []
    assert made.batcher.wake_at(7) is None
    assert made.reasons() == {"idle": 1}


def test_a_full_batch_leaves_at_once() -> None:
    made = bench(*(sent(str(number)) for number in range(5)), delay_ns=MS)
    assert made.take() == ["0", "1", "2", "3"]
    assert made.take() == []
    assert made.reasons() == {"full": 1}


def test_rows_are_what_fills_a_batch_and_no_request_is_cut() -> None:
    made = bench(sent("a", 3), sent("b", 2), sent("c", 2), delay_ns=MS)
    assert (made.take(), made.take()) == (["a"], ["b", "c"])  # b does not fit to a; c fills b's batch
    assert made.reasons() == {"full": 2}


def test_a_lone_request_waits_out_the_delay() -> None:
    made = bench(sent("a", at_ns=100), delay_ns=MS)
    assert made.batcher.wake_at(200) == MS + 100
    assert made.take(MS + 99) == []
    assert made.take(MS + 100) == ["a"]
    assert made.reasons() == {"delay": 1}


def test_the_delay_counts_from_the_oldest_request_whatever_its_priority() -> None:
    levels = (QueuePolicy(), QueuePolicy())
    made = Bench(policy=BatchPolicy(4, delay_ns=MS, levels=levels, default_level=1))
    made.add(sent("old", at_ns=0), sent("urgent", at_ns=500, priority=1))
    assert made.batcher.wake_at(600) == MS
    assert made.take(MS) == ["urgent", "old"]


def test_a_preferred_size_leaves_at_once_and_the_largest_that_was_hit_counts() -> None:
    made = bench(*(sent(str(number)) for number in range(7)), rows=16, preferred=(2, 4), delay_ns=MS)
    assert (made.take(), made.take(), made.take()) == (["0", "1", "2", "3"], ["4", "5"], [])
    assert made.reasons() == {"preferred": 2}
    assert made.take(MS) == ["6"]


def test_once_the_delay_is_over_all_leave_whatever_size_is_preferred() -> None:
    made = bench(*(sent(str(number)) for number in range(3)), rows=16, preferred=(2,), delay_ns=MS)
    assert made.take(MS) == ["0", "1", "2"]


def test_a_batch_that_has_passed_all_preferred_sizes_does_not_wait() -> None:
    made = bench(sent("a", 3), sent("b", 3), rows=16, preferred=(4,), delay_ns=MS)
    assert made.take() == ["a", "b"]
    assert made.reasons() == {"preferred": 1}


def test_requests_of_different_shapes_never_share_a_batch() -> None:
    made = bench(sent("a", 1, 2), sent("b", 1, 3), sent("c", 1, 3), sent("d", 1, 2), delay_ns=MS)
    assert (made.take(), made.take(), made.take(), made.take(MS)) == (["a"], ["b", "c"], [], ["d"])
    assert made.reasons() == {"shape": 2, "delay": 1}


def test_requests_with_different_optional_inputs_never_share_a_batch() -> None:
    made = bench(sent("a"), sent("b", without="Z"), sent("c", without="Z"))
    assert (made.take(), made.take()) == (["a"], ["b", "c"])


def test_ragged_inputs_share_a_batch_whatever_their_shapes_but_not_when_empty() -> None:
    policy = BatchPolicy(8, varying=("X", "Z"), ragged=("X", "Z"))
    made = Bench(sent("a", 1, 2), sent("b", 1, 3), sent("empty", 1, 0), sent("c", 2, 1), policy=policy)
    assert (made.take(), made.take(), made.take()) == (["a", "b"], ["empty"], ["c"])


def test_only_the_inputs_that_are_ragged_may_differ() -> None:
    made = Bench(sent("a", 1, 2), sent("b", 1, 3), policy=BatchPolicy(8, varying=("X", "Z"), ragged=("X",)))
    assert (made.take(), made.take()) == (["a"], ["b"])


def test_padded_inputs_share_a_batch_if_nothing_but_their_length_differs() -> None:
    paddings = tuple(Padding(name, 2, 0) for name in ("X", "Z"))
    waiting = [sent("a", 1, 3, 5), sent("b", 2, 3, 9), sent("c", 1, 4, 5), sent("d", 1, 4, 6, without="Z")]
    made = Bench(*waiting, policy=BatchPolicy(8, varying=("X", "Z"), paddings=paddings))
    assert (made.take(), made.take(), made.take()) == (["a", "b"], ["c"], ["d"])


def test_with_buckets_those_of_one_bucket_share_a_batch() -> None:
    paddings = tuple(Padding(name, 1, 0, (4, 8)) for name in ("X", "Z"))
    waiting = [sent(str(length), 1, length) for length in (1, 4, 5, 8, 7, 3, 9, 9, 10)]
    made = Bench(*waiting, policy=BatchPolicy(8, varying=("X", "Z"), paddings=paddings))
    batches = []
    while batch := made.take():
        batches.append(batch)
    assert batches == [["1", "4"], ["5", "8", "7"], ["3"], ["9", "9"], ["10"]]


@pytest.mark.parametrize("empty", [sent("empty", 0), sent("empty", 1, 0), sent("empty", 2, 3, 0)])
def test_an_empty_request_shares_with_none_and_waits_for_none(empty: Pending) -> None:
    made = bench(sent("a"), empty, sent("b"), delay_ns=MS)
    assert (made.take(), made.take(), made.take()) == (["a"], ["empty"], [])
    assert made.reasons() == {"shape": 2}


def test_two_empty_requests_run_one_by_one() -> None:
    made = bench(sent("a", 0), sent("b", 0))
    assert (made.take(), made.take()) == (["a"], ["b"])


def test_a_model_without_a_batch_axis_runs_one_by_one() -> None:
    made = bench(sent("a"), sent("b"), rows=1, delay_ns=MS)
    assert (made.take(), made.take()) == (["a"], ["b"])


def test_a_batch_leaves_before_waiting_costs_a_request_its_time() -> None:
    made = bench(sent("a"), sent("b", deadline_ns=5 * MS), delay_ns=10 * MS)
    due_ns = 5 * MS - LEAD_NS
    assert made.batcher.wake_at(0) == due_ns
    assert made.take(due_ns - 1) == []
    assert made.take(due_ns) == ["a", "b"]
    assert made.reasons() == {"deadline": 1}


def test_what_has_expired_is_left_for_the_one_who_answers_it() -> None:
    made = bench(late := sent("late", deadline_ns=MS), sent("a"))
    assert made.take(MS) == ["a"]
    assert (made.take(MS), made.batcher.wake_at(MS), len(made.batcher)) == ([], None, 1)
    assert made.batcher.drop(late)


def test_a_dropped_request_makes_room() -> None:
    made = bench(sent("a"), gone := sent("b", 3), sent("c", 3))
    assert made.batcher.drop(gone)
    assert not made.batcher.drop(gone)
    assert made.take() == ["a", "c"]


def test_a_full_queue_refuses() -> None:
    made = Bench(sent("a"), policy=BatchPolicy(4, levels=(QueuePolicy(max_size=1),)))
    with pytest.raises(ServingError) as caught:
        made.add(sent("b"))
    assert caught.value.kind is Kind.UNAVAILABLE
    assert made.take() == ["a"]


POLICIES = st.builds(
    BatchPolicy,
    max_rows=st.integers(1, 6),
    preferred_rows=st.lists(st.integers(1, 6), max_size=2).map(tuple),
    delay_ns=st.sampled_from([0, 20]),
    levels=st.lists(
        st.builds(QueuePolicy, timeout_ns=st.sampled_from([0, 30]), delays=st.booleans(), max_size=st.integers(0, 4)),
        min_size=1,
        max_size=3,
    ).map(tuple),
    varying=st.just(("X",)),
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 6), st.integers(0, 2), st.integers(0, 3)),  # rows, tail, priority
        st.tuples(st.just("take"), st.just(0), st.just(0), st.just(0)),
        st.tuples(st.just("drop"), st.integers(0, 30), st.just(0), st.just(0)),
    ),
    max_size=40,
)


@given(policy=POLICIES, steps=STEPS)
def test_no_interleaving_loses_repeats_or_reorders_a_request(
    policy: BatchPolicy, steps: list[tuple[str, int, int, int]]
) -> None:
    made = Bench(policy=policy)
    accepted: list[Pending] = []
    left: list[Pending] = []
    dropped: list[Pending] = []
    batches: list[list[Pending]] = []

    def take(now_ns: int) -> None:
        due_ns = made.batcher.wake_at(now_ns)
        batch = made.batcher.take(now_ns)
        assert bool(batch) == (due_ns is not None and due_ns <= now_ns)
        if batch:
            batches.append(batch)
            left.extend(batch)

    now_ns = 0
    for step, first, tail, priority in steps:
        now_ns += 3
        if step == "add":
            pending = sent("", min(first, policy.max_rows), tail, at_ns=now_ns, priority=priority)
            try:
                made.batcher.add(pending, now_ns)
            except ServingError:
                continue
            accepted.append(pending)
        elif step == "take":
            take(now_ns)
        elif accepted:
            pending = accepted[first % len(accepted)]
            assert made.batcher.drop(pending) == [pending] * (pending not in left and pending not in dropped)
            if pending not in left and pending not in dropped:
                dropped.append(pending)
        assert len(made.batcher) == len(accepted) - len(left) - len(dropped)
    while made.batcher.wake_at(now_ns := now_ns + 20) is not None:
        take(now_ns)

    expired = [pending for pending in accepted if pending not in left and pending not in dropped]
    assert all(0 < pending.expires_ns <= now_ns for pending in expired)
    assert len(left) + len(dropped) + len(expired) == len(accepted) == len({*left, *dropped, *expired})
    for batch in batches:
        assert sum(max(pending.request.rows, 1) for pending in batch) <= policy.max_rows
        assert len({pending.request.inputs["X"].array.shape[1:] for pending in batch}) == 1
        assert len(batch) == 1 or all(pending.request.inputs["X"].array.size for pending in batch)
    for level in range(len(policy.levels)):
        mine = [pending for pending in left if pending.level == level and not pending.moves_ns]
        assert all(before.arrived_ns <= after.arrived_ns for before, after in pairwise(mine))
    assert sum(made.counted.values()) == len(batches)
