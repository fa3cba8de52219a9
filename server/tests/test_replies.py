"""Answers wait for those before them, and for all parts of a request."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from penstock.errors import Kind, ServingError
from penstock.messages import InferRequest, InferResponse, RequestedOutput
from penstock.queueing import Pending
from penstock.replies import InOrder, Whole
from penstock.runtime import Credit
from penstock.statistics import Execution
from penstock.tensor import BYTES, FP32, Tensor, objects

from .fakes import Answers, Result, pending

BAD = ServingError(Kind.INVALID, "bad")


def answer(id: str, *values: float) -> InferResponse:
    return InferResponse("m", "1", id, [Tensor("Y", FP32, np.array(values, np.float32).reshape(-1, 1))])


# -- in order


@given(st.permutations(range(6)))
def test_answers_leave_in_the_order_of_their_slots_whenever_they_come(times: list[int]) -> None:
    order, left = InOrder(), []

    def keep(result: Result, final: bool = True, partial: bool = False) -> Credit:
        assert isinstance(result, InferResponse)
        left.append(int(result.id))
        return Answers()(result)

    slots = [order.slot(keep) for _ in times]
    for came, number in enumerate(times):
        slots[number](answer(str(number)))
        there = set(times[: came + 1])
        assert left == list(range(next((n for n in range(7) if n not in there), 7)))


def test_a_slot_waits_for_the_final_reply_before_it() -> None:
    order, first, second = InOrder(), Answers(), Answers()
    early, late = order.slot(first), order.slot(second)
    late(answer("b"))
    early(answer("a"), final=False)
    assert [len(first.given), len(second.given)] == [1, 0]
    early(BAD)
    assert [len(first.given), first.ended, second.ended] == [2, 1, 1]


def test_a_request_that_was_not_accepted_holds_up_nobody() -> None:
    order, answers = InOrder(), Answers()
    refused, accepted = order.slot(Answers()), order.slot(answers)
    accepted(answer("a"))
    assert answers.given == []
    order.withdraw(refused)
    assert len(answers.given) == 1


def test_a_reply_that_raises_holds_up_nobody() -> None:
    def broken(result: Result, final: bool = True, partial: bool = False) -> Credit:
        raise RuntimeError("the door is broken")

    order, answers = InOrder(), Answers()
    first, second = order.slot(broken), order.slot(answers)
    second(answer("b"))
    with pytest.raises(RuntimeError):
        first(answer("a"))
    assert answers.ended == 1


# -- parts


def whole(rows: int, most: int) -> tuple[Whole, Pending]:
    array = np.arange(rows * 2, dtype=np.float32).reshape(rows, 2)
    text = objects([str(number).encode() for number in range(rows)], [rows, 1])
    inputs = {"X": Tensor("X", FP32, array), "T": Tensor("T", BYTES, text)}
    one = pending(InferRequest("m", "", "7", inputs, {"Y": RequestedOutput("Y")}, {"a": 1}, 2, 99, 5, rows=rows))
    return Whole(one, most), one


def test_a_request_is_cut_into_parts_over_the_same_memory() -> None:
    made, one = whole(5, 2)
    assert [part.request.rows for part in made.parts] == [2, 2, 1]
    assert [part.request.inputs["X"].array.tolist() for part in made.parts] == [
        [[0, 1], [2, 3]],
        [[4, 5], [6, 7]],
        [[8, 9]],
    ]
    assert made.parts[2].request.inputs["T"].array.tolist() == [[b"4"]]
    assert all(np.shares_memory(part.request.inputs["X"].array, one.request.inputs["X"].array) for part in made.parts)
    for part in made.parts:
        sent = part.request
        assert (sent.id, sent.parameters, sent.priority, sent.deadline_ns, sent.timeout_us) == ("7", {"a": 1}, 2, 99, 5)
        assert sent.outputs == {"Y": RequestedOutput("Y")}


def test_the_answer_comes_with_the_last_part_and_has_the_rows_in_order() -> None:
    made, _ = whole(5, 2)
    assert made.put(made.parts[2], answer("7", 4)) is None
    assert made.put(made.parts[0], answer("7", 0, 1)) is None
    joined = made.put(made.parts[1], answer("7", 2, 3))
    assert isinstance(joined, InferResponse)
    assert joined.outputs[0].array.tolist() == [[0], [1], [2], [3], [4]]


def test_the_whole_lasts_from_the_first_start_to_the_last_end_and_has_all_phases() -> None:
    made, _ = whole(5, 2)
    for part, times in zip(
        made.parts,
        [Execution(1, 20, 300, 50, 371, 9), Execution(1, 20, 300, 40, 361), Execution(2, 30, 400, 380, 812)],
        strict=True,
    ):
        made.put(part, answer("7", 0, 1), times)
    assert made.times == Execution(4, 70, 1000, 40, 812)


def test_the_first_part_that_fails_fails_the_whole_and_cancels_the_others() -> None:
    made, _ = whole(5, 2)
    made.put(made.parts[0], answer("7", 0, 1))
    assert made.put(made.parts[1], BAD) is BAD
    assert made.parts[2].cancelled.reason is BAD
    assert made.put(made.parts[2], BAD) is None


def test_cancelling_the_whole_cancels_its_parts() -> None:
    made, one = whole(5, 2)
    one.holder = made
    one.cancel(BAD)
    assert [part.cancelled.reason for part in made.parts] == [BAD] * 3


def test_parts_whose_outputs_do_not_fit_fail_the_whole() -> None:
    made, _ = whole(3, 2)
    made.put(made.parts[0], answer("7", 0, 1))
    wide = InferResponse("m", "1", "7", [Tensor("Y", FP32, np.zeros((1, 2), np.float32))])
    error = made.put(made.parts[1], wide)
    assert isinstance(error, ServingError)
