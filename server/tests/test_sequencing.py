"""Which requests of which sequences run where and when: arithmetic on times, slots and ids."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from penstock import messages
from penstock.batching import DEPARTURES, LEAD_NS
from penstock.errors import Kind, ServingError
from penstock.messages import InferRequest
from penstock.model_config import Control, SequencePolicy
from penstock.queueing import Pending
from penstock.runtime import Cancelled
from penstock.sequencing import Sequencer
from penstock.tensor import DATATYPES, FP32, Datatype, Tensor

from .fakes import Answers

MS = 1_000_000


def sent(
    flow: int | str | None,
    flags: str = "",
    at_ns: int = 0,
    *,
    columns: int = 1,
    rows: int = 1,
    deadline_ns: int = 0,
    timeout_us: int = 0,
    id: str = "",
) -> Pending:
    """A request of sequence `flow`, named after both; `flags` are S for its first, E for its last."""
    place = None if flow is None else messages.Sequence(flow, "S" in flags, "E" in flags)
    x = Tensor("X", FP32, np.zeros((rows, columns), np.float32))
    request = InferRequest("m", "", id, {"X": x}, {}, {}, 0, deadline_ns, timeout_us, place, rows)
    return Pending(request, Answers(), Cancelled(), at_ns, request.deadline_ns)


class Bench:
    """A sequencer, and what it counted."""

    def __init__(self, policy: SequencePolicy, workers: int = 1) -> None:
        self.counted = dict.fromkeys(DEPARTURES, 0)
        self.sequencer = Sequencer(policy, workers, self.counted)

    def add(self, *waiting: Pending) -> None:
        for pending in waiting:
            self.sequencer.add(pending, pending.arrived_ns)

    def take(self, now_ns: int = 0, worker: int = 0) -> list[tuple[int | str, int]]:
        """Takes and runs a batch at once: the sequences and slots of its requests."""
        place = self.sequencer.places[worker]
        batch = place.take(now_ns)
        place.done(now_ns)
        return [(told(pending).id, told(pending).slot) for pending in batch]

    def wake_at(self, now_ns: int = 0, worker: int = 0) -> int | None:
        return self.sequencer.places[worker].wake_at(now_ns)

    def refusal(self, pending: Pending) -> str:
        before = len(self.sequencer)
        with pytest.raises(ServingError) as caught:
            self.add(pending)
        assert caught.value.kind is Kind.INVALID
        assert len(self.sequencer) == before
        return caught.value.message

    def reasons(self) -> dict[str, int]:
        return {reason: number for reason, number in self.counted.items() if number}


def told(pending: Pending) -> messages.Sequence:
    assert pending.request.sequence is not None
    return pending.request.sequence


def bench(
    slots: int = 4,
    *,
    workers: int = 1,
    oldest: bool = False,
    idle_ns: int = 1000 * MS,
    delay_ns: int = 0,
    utilization: float = 0,
    preferred: tuple[int, ...] = (),
    max_rows: int = 4,
    correlation: Datatype | None = None,
) -> Bench:
    control = Control("ID", "CORRID", correlation) if correlation else None
    policy = SequencePolicy(
        "m", slots, max_rows, not oldest, idle_ns, delay_ns, utilization, preferred, varying=("X",), correlation=control
    )
    return Bench(policy, workers)


WRONG_TYPE = "[request id: <id_unknown>] sequence batching control 'ID' data-type is '{}', but model 'm' expects '{}'"
either = pytest.mark.parametrize("oldest", [False, True], ids=["direct", "oldest"])
NO_START = (
    "inference request for sequence {} to model 'm' must specify the START flag on the first request of the sequence"
)


# -- what is accepted


@pytest.mark.parametrize(
    ("pending", "message"),
    [
        (sent(None), "inference request to model 'm' must specify a non-zero or non-empty correlation ID"),
        (
            sent(1, "S", rows=2),
            "inference request to model 'm' must specify batch-size 1 due to requirements of sequence batcher",
        ),
        (
            sent(None, rows=2),
            "inference request to model 'm' must specify batch-size 1 due to requirements of sequence batcher",
        ),
        (sent(1), NO_START.format(1)),
        (sent("one", "E"), NO_START.format("one")),
    ],
)
def test_a_request_that_is_in_no_sequence_is_refused(pending: Pending, message: str) -> None:
    assert bench().refusal(pending) == message


@pytest.mark.parametrize(
    ("datatype", "flow", "message"),
    [
        ("BYTES", 1, WRONG_TYPE.format("UINT64", "BYTES")),
        ("INT64", "a", WRONG_TYPE.format("BYTES", "INT64")),
        ("INT32", 2**31, "correlation ID 2147483648 is out of the range of INT32, which model 'm' takes"),
        ("UINT32", 2**32, "correlation ID 4294967296 is out of the range of UINT32, which model 'm' takes"),
    ],
)
def test_an_id_that_the_control_cannot_hold_is_refused(datatype: str, flow: int | str, message: str) -> None:
    assert bench(correlation=DATATYPES[datatype]).refusal(sent(flow, "S")) == message


@pytest.mark.parametrize(
    ("datatype", "flow", "element"),
    [
        ("UINT64", 2**64 - 1, 2**64 - 1),
        ("INT64", 2**64 - 1, -1),
        ("INT32", 2**64 - 2**31, -(2**31)),
        ("UINT32", 2**32 - 1, 2**32 - 1),
        ("BYTES", "é", "é"),
    ],
)
def test_an_id_that_fits_reaches_the_model_as_its_client_meant_it(
    datatype: str, flow: int | str, element: int | str
) -> None:
    assert Control("ID", "CORRID", DATATYPES[datatype]).holds(flow) == element
    made = bench(correlation=DATATYPES[datatype])
    made.add(sent(flow, "SE"))
    assert made.take() == [(flow, 0)]


@either
def test_after_its_end_a_sequence_is_unknown_even_while_its_last_request_waits(oldest: bool) -> None:
    made = bench(oldest=oldest)
    made.add(sent(1, "S"), sent(1, "E"))
    assert made.refusal(sent(1)) == NO_START.format(1)
    assert (made.take(), made.take(), made.take()) == ([(1, 0)], [(1, 0)], [])
    assert made.sequencer.live == 0


def test_numbers_and_texts_are_different_ids() -> None:
    made = bench()
    made.add(sent(1, "S"), sent("1", "S"))
    assert made.take() == [(1, 0), ("1", 1)]


@either
def test_a_start_on_a_live_id_starts_anew_in_the_same_slot_and_is_told(oldest: bool) -> None:
    made = bench(oldest=oldest)
    made.add(sent(1, "S"), sent(2, "S"))
    again = sent(2, "S")
    made.add(again)
    assert again.warning == ("model m: sequence 2 starts again without having ended; the one before it ends here")
    assert (made.take(), made.take()) == ([(1, 0), (2, 1)], [(2, 1)])
    assert made.sequencer.live == 2


# -- slots


@either
def test_a_sequence_keeps_its_slot_and_has_one_request_in_a_batch(oldest: bool) -> None:
    made = bench(oldest=oldest)
    made.add(sent("a", "S"), sent("a"), sent("b", "S"), sent("a", "E"), sent("b", "E"))
    assert made.take() == [("a", 0), ("b", 1)]
    assert made.take() == [("a", 0), ("b", 1)]
    assert made.take() == [("a", 0)]


@either
def test_a_free_slot_is_given_again_the_lowest_first(oldest: bool) -> None:
    made = bench(oldest=oldest)
    made.add(sent("a", "SE"), sent("b", "S"), sent("c", "SE"))
    made.take()
    made.add(sent("d", "S"), sent("e", "S"), sent("f", "S"))
    assert made.take() == [("d", 0), ("e", 2), ("f", 3)]


@either
def test_a_sequence_stays_on_its_instance_and_new_ones_go_where_there_is_room(oldest: bool) -> None:
    made = bench(2, workers=2, oldest=oldest)
    made.add(sent("a", "S"), sent("b", "S"), sent("c", "S"))
    assert made.take(worker=0) == [("a", 0), ("c", 1)]
    assert made.take(worker=0) == []
    assert made.take(worker=1) == [("b", 0)]
    made.add(sent("b"), sent("d", "S"))
    assert made.take(worker=0) == []
    assert made.take(worker=1) == [("b", 0), ("d", 1)]


@either
def test_nothing_of_a_batch_that_runs_is_given_again(oldest: bool) -> None:
    made = bench(oldest=oldest)
    made.add(sent("a", "S"), sent("a"))
    [place] = made.sequencer.places
    assert len(place.take(0)) == 1
    made.add(sent("b", "S"))
    assert (place.take(0), place.wake_at(0)) == ([], None)
    place.done(0)
    assert place.wake_at(0) == 0
    assert made.take() == [("b", 1), ("a", 0)]


@either
def test_without_a_free_slot_sequences_wait_in_the_order_in_which_they_began(oldest: bool) -> None:
    made = bench(1, oldest=oldest)
    made.add(sent("a", "S"), sent("b", "S"), sent("c", "SE"), sent("b", "E"), sent("a", "E"))
    assert [made.take() for _ in range(6)] == [[("a", 0)], [("a", 0)], [("b", 0)], [("b", 0)], [("c", 0)], []]
    assert len(made.sequencer) == 0


# -- idle


@either
def test_an_idle_sequence_is_over_when_its_time_is(oldest: bool) -> None:
    made = bench(oldest=oldest, idle_ns=MS)
    made.add(sent(1, "S", at_ns=10))
    made.take(20)
    made.add(sent(1, at_ns=MS + 19))  # one nanosecond before
    made.take(MS + 30)
    assert made.refusal(sent(1, at_ns=2 * MS + 30)) == NO_START.format(1)
    assert made.sequencer.live == 0


@either
def test_a_sequence_is_not_idle_while_a_request_of_it_waits_or_runs(oldest: bool) -> None:
    made = bench(oldest=oldest, idle_ns=MS)
    made.add(sent(1, "S"), sent(1))
    [place] = made.sequencer.places
    place.take(5 * MS)
    made.add(sent(2, "S", 9 * MS))
    place.done(9 * MS)
    assert place.take(9 * MS)
    made.add(sent(1, at_ns=20 * MS))  # while it runs
    place.done(20 * MS)
    assert made.take(20 * MS) == [(1, 0)]
    assert made.refusal(sent(2, at_ns=21 * MS)) == NO_START.format(2)


@either
def test_what_waits_for_a_slot_gets_that_of_an_idle_sequence(oldest: bool) -> None:
    made = bench(1, oldest=oldest, idle_ns=MS)
    made.add(sent("a", "S"))
    made.take(5)
    assert made.wake_at(5) is None  # nobody is in want of its slot
    made.add(sent("b", "S", 6))
    assert made.wake_at(6) == MS + 5
    assert made.take(MS + 4) == []
    assert made.take(MS + 5) == [("b", 0)]
    assert made.refusal(sent("a", at_ns=MS + 6)) == NO_START.format("a")


@either
def test_a_sequence_in_the_backlog_is_never_idle(oldest: bool) -> None:
    made = bench(1, oldest=oldest, idle_ns=MS)
    made.add(sent("a", "S"), sent("b", "S"))
    made.add(*(sent("a", at_ns=at * MS) for at in range(1, 9)))
    for at in range(9):
        assert made.take(at * MS) == [("a", 0)]
    made.add(sent("a", "E", 8 * MS))
    assert (made.take(8 * MS), made.take(8 * MS)) == ([("a", 0)], [("b", 0)])


@either
def test_where_no_more_requests_can_come_idle_sequences_hold_up_none(oldest: bool) -> None:
    made = bench(1, oldest=oldest)
    made.add(sent("a", "S"), sent("b", "S"), sent("c", "S"))
    made.take()
    for place in made.sequencer.places:
        place.seal()
    assert made.wake_at(1) == 1
    assert (made.take(1), made.take(1), made.take(1)) == ([("b", 0)], [("c", 0)], [])


# -- times of requests


@either
def test_a_timeout_bounds_the_wait_for_a_slot_and_nothing_else(oldest: bool) -> None:
    made = bench(1, oldest=oldest)
    made.add(sent("a", "S", timeout_us=5))
    late, hopeful = sent("b", "S", 1000, timeout_us=5), sent("c", "S", 1000, timeout_us=5, deadline_ns=MS)
    made.add(late, sent("b", at_ns=1000), hopeful)
    assert [pending.expires_ns for pending in (late, hopeful)] == [6000, 6000]
    assert (late.lateness(6000).kind, late.lateness(6000).message) == (
        Kind.TIMED_OUT,
        "timeout of the corresponding sequence has been expired",
    )
    assert [told(pending).id for pending in made.sequencer.drop(late)] == ["b", "b"]
    made.add(sent("a", "E", 2000))
    assert (made.take(6001), made.take(6001)) == ([("a", 0)], [("a", 0)])
    assert hopeful.expires_ns == MS  # its client's: it has a slot now
    assert made.take(6001) == [("c", 0)]


@either
def test_what_has_expired_is_left_for_the_one_who_answers_it(oldest: bool) -> None:
    made = bench(oldest=oldest)
    late = sent("a", "S", deadline_ns=MS)
    made.add(late, sent("b", "S"))
    assert made.take(MS) == [("b", 1)]
    assert (made.take(MS), made.wake_at(MS), len(made.sequencer)) == ([], None, 1)
    assert made.sequencer.drop(late) == [late]
    assert len(made.sequencer) == 0


# -- dropping


@either
def test_with_one_request_goes_all_that_waits_of_its_sequence(oldest: bool) -> None:
    made = bench(1, oldest=oldest)
    waiting = [sent("a", "S"), sent("a"), sent("a")]
    made.add(*waiting, sent("b", "S"))
    assert made.sequencer.drop(waiting[1]) == waiting
    assert made.sequencer.drop(waiting[0]) == []
    assert made.refusal(sent("a")) == NO_START.format("a")
    assert made.wake_at() == 0
    assert made.take() == [("b", 0)]


@either
def test_a_request_that_is_dropped_while_it_runs_ends_its_sequence(oldest: bool) -> None:
    made = bench(1, oldest=oldest)
    runs, waits = sent("a", "S"), sent("a")
    made.add(runs, waits, sent("b", "S"))
    [place] = made.sequencer.places
    assert place.take(0) == [runs]
    assert made.sequencer.drop(runs) == [waits]
    assert place.take(0) == []
    place.done(0)
    assert made.take() == [("b", 0)]


@either
def test_a_request_that_has_run_can_be_dropped_no_more(oldest: bool) -> None:
    made = bench(oldest=oldest)
    ran = sent("a", "S")
    made.add(ran)
    made.take()
    assert made.sequencer.drop(ran) == []
    made.add(sent("a"))
    assert made.take() == [("a", 0)]


@either
@pytest.mark.parametrize("runs", [False, True])
def test_a_sequence_that_began_anew_outlives_the_one_before_it(oldest: bool, runs: bool) -> None:
    made = bench(oldest=oldest)
    old, again = [sent("a", "S"), sent("a")], [sent("a", "S"), sent("a", "E")]
    made.add(*old, again[0])
    [place] = made.sequencer.places
    if runs:
        assert place.take(0) == [old[0]]
    assert made.sequencer.drop(old[0]) == (old[1:] if runs else old)
    made.add(again[1])
    place.done(0)
    assert place.take(0) == [again[0]]
    place.done(0)
    assert place.take(0) == [again[1]]
    place.done(0)
    assert (made.sequencer.live, len(made.sequencer)) == (0, 0)


@either
def test_a_sequence_that_was_to_begin_anew_may_be_dropped_and_the_one_before_it_runs(oldest: bool) -> None:
    made = bench(oldest=oldest)
    old, again = [sent("a", "S"), sent("a")], [sent("a", "S"), sent("a")]
    made.add(*old, *again)
    assert made.sequencer.drop(again[1]) == again
    assert made.refusal(sent("a")) == NO_START.format("a")
    assert (made.take(), made.take(), made.take()) == ([("a", 0)], [("a", 0)], [])
    assert made.sequencer.live == 0


@either
def test_a_sequence_in_the_backlog_can_be_dropped(oldest: bool) -> None:
    made = bench(1, oldest=oldest)
    waits = sent("b", "S")
    made.add(sent("a", "SE"), waits, sent("b"))
    assert len(made.sequencer.drop(waits)) == 2
    assert (made.take(), made.take(), len(made.sequencer)) == ([("a", 0)], [], 0)


# -- when a batch leaves, and why


def test_a_batch_of_all_slots_is_full() -> None:
    made = bench(2, delay_ns=MS, utilization=1)
    made.add(sent("a", "S"), sent("b", "S"))
    assert made.take() == [("a", 0), ("b", 1)]
    assert made.reasons() == {"full": 1}


@pytest.mark.parametrize(("delay_ns", "utilization"), [(0, 0.0), (MS, 0.0), (0, 0.5)])
def test_a_direct_batch_waits_only_where_delay_and_utilization_are_both_set(delay_ns: int, utilization: float) -> None:
    made = bench(delay_ns=delay_ns, utilization=utilization)
    made.add(sent("a", "S"))
    assert (made.wake_at(3), made.take(3)) == (3, [("a", 0)])
    assert made.reasons() == {"idle": 1}


def test_a_direct_batch_waits_for_its_utilization_or_the_delay() -> None:
    made = bench(delay_ns=MS, utilization=0.5)
    made.add(sent("a", "S", at_ns=10))
    assert (made.wake_at(10), made.take(MS + 9)) == (MS + 10, [])
    assert made.take(MS + 10) == [("a", 0)]
    made.add(sent("b", "S", at_ns=MS + 10), sent("a", at_ns=MS + 11))
    assert made.take(MS + 12) == [("b", 1), ("a", 0)]
    assert made.reasons() == {"delay": 1, "preferred": 1}


def test_a_direct_batch_leaves_before_waiting_costs_a_request_its_time() -> None:
    made = bench(delay_ns=10 * MS, utilization=1)
    made.add(sent("a", "S", deadline_ns=5 * MS))
    assert made.wake_at() == 5 * MS - LEAD_NS
    assert made.take(5 * MS - LEAD_NS) == [("a", 0)]
    assert made.reasons() == {"deadline": 1}


@either
def test_requests_of_different_shapes_never_share_a_batch(oldest: bool) -> None:
    made = bench(oldest=oldest, delay_ns=MS, utilization=1)
    made.add(sent("a", "S", columns=2), sent("b", "S", columns=3), sent("c", "S", columns=2 if not oldest else 3))
    first, second = made.take(), made.take(MS)
    assert first == ([("a", 0)] if oldest else [("a", 0), ("c", 2)])
    assert second == ([("b", 1), ("c", 2)] if oldest else [("b", 1)])
    assert made.reasons()["shape"] == 1


def test_by_the_oldest_batches_leave_at_preferred_sizes_and_after_the_delay() -> None:
    made = bench(6, oldest=True, delay_ns=MS, preferred=(2,))
    made.add(sent("a", "S"))
    assert (made.wake_at(), made.take()) == (MS, [])
    made.add(sent("b", "S"))
    assert made.take() == [("a", 0), ("b", 1)]
    made.add(sent("a"))
    assert made.take(MS) == [("a", 0)]
    assert made.reasons() == {"preferred": 1, "delay": 1}


def test_by_the_oldest_more_sequences_live_than_a_batch_has_rows() -> None:
    made = bench(6, oldest=True, max_rows=4)
    made.add(*(sent(flow, "S") for flow in "abcdef"))
    assert (made.take(), made.take()) == (
        [("a", 0), ("b", 1), ("c", 2), ("d", 3)],
        [("e", 4), ("f", 5)],
    )
    assert made.reasons() == {"full": 1, "idle": 1}


# -- any interleaving

POLICIES = st.builds(
    lambda slots, direct, delay_ns, utilization: SequencePolicy(
        "m", slots, min(slots, 3), direct, 40, delay_ns, utilization, varying=("X",)
    ),
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from([0, 20]),
    st.sampled_from([0, 0.5]),
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 5), st.sampled_from(["", "S", "E", "SE"]), st.integers(1, 2)),
        st.tuples(st.just("take"), st.integers(0, 1), st.just(""), st.just(0)),
        st.tuples(st.just("done"), st.integers(0, 1), st.just(""), st.just(0)),
        st.tuples(st.just("drop"), st.integers(0, 30), st.just(""), st.just(0)),
        st.tuples(st.just("rest"), st.integers(1, 60), st.just(""), st.just(0)),
    ),
    max_size=60,
)


class Ledger:
    """What happened to the requests that were accepted, in order."""

    def __init__(self, made: Bench, workers: int) -> None:
        self.made = made
        self.accepted: list[Pending] = []
        self.dropped: list[Pending] = []
        self.left: list[tuple[Pending, int]] = []  # with the worker
        self.running: list[list[Pending]] = [[] for _ in range(workers)]

    def take(self, worker: int, now_ns: int) -> bool:
        place = self.made.sequencer.places[worker]
        due_ns = place.wake_at(now_ns)
        batch = place.take(now_ns)
        assert bool(batch) == (due_ns is not None and due_ns <= now_ns)
        if batch:
            assert not self.running[worker]
            self.running[worker] = batch
            self.left += [(pending, worker) for pending in batch]
            slots = [told(pending).slot for pending in batch]
            assert len(set(slots)) == len(slots)
            assert len({pending.request.inputs["X"].array.shape for pending in batch}) == 1
        return bool(batch)

    def done(self, worker: int, now_ns: int) -> None:
        self.made.sequencer.places[worker].done(now_ns)
        self.running[worker] = []

    def waits(self, pending: Pending) -> bool:
        return pending not in self.dropped and all(pending is not other for other, _ in self.left)


@given(policy=POLICIES, steps=STEPS)
def test_no_interleaving_loses_repeats_or_reorders_a_request_of_a_sequence(
    policy: SequencePolicy, steps: Sequence[tuple[str, int, str, int]]
) -> None:
    workers = 2
    made = Bench(policy, workers)
    book = Ledger(made, workers)
    flows: dict[int, object] = {}  # of each accepted request, the sequence it was put into
    now_ns = 0
    for step, number, flags, columns in steps:
        now_ns += 3
        if step == "add":
            pending = sent(number, flags, now_ns, columns=columns)
            try:
                made.sequencer.add(pending, now_ns)
            except ServingError:
                assert "S" not in flags
                continue
            book.accepted.append(pending)
            flows[id(pending)] = pending.sequence
        elif step == "take" and not book.running[number]:
            book.take(number, now_ns)
        elif step == "done":
            book.done(number, now_ns)
        elif step == "drop" and book.accepted:
            pending = book.accepted[number % len(book.accepted)]
            expected = book.waits(pending)
            gone = made.sequencer.drop(pending)
            assert (pending in gone) == expected
            assert all(book.waits(other) and flows[id(other)] is flows[id(pending)] for other in gone)
            book.dropped += gone
        elif step == "rest":
            now_ns += number
        assert len(made.sequencer) == len(book.accepted) - len(book.left) - len(book.dropped)
        assert all(len(place.seated) + len(place.free) == policy.slots for place in made.sequencer.places)

    for _ in range(3 * len(book.accepted) + 3):
        now_ns += 50
        for worker in range(workers):
            book.done(worker, now_ns)
            book.take(worker, now_ns)
    assert len(made.sequencer) == 0
    assert len({*(pending for pending, _ in book.left), *book.dropped}) == len(book.accepted)
    assert len(book.left) + len(book.dropped) == len(book.accepted)
    for flow in {id(flow): flow for flow in flows.values()}.values():
        mine = [(pending, worker) for pending, worker in book.left if flows[id(pending)] is flow]
        assert [pending for pending, _ in mine] == sorted((pending for pending, _ in mine), key=book.accepted.index)
        assert len({(worker, told(pending).slot) for pending, worker in mine}) <= 1
    assert sum(made.counted.values()) <= len(book.left)
