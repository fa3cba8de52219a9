"""Counts and durations are the statistics extension's."""

from penstock.statistics import Duration, Execution, Statistics

TIMES = Execution(started_ns=1000, inputs_ready_ns=1010, outputs_came_ns=1110, ended_ns=1150)


def test_a_new_version_has_counted_nothing() -> None:
    counts = Statistics()
    assert (counts.success, counts.fail, counts.last_inference_ms) == (Duration(), Duration(), 0)
    assert counts.failures == {"REJECTED": 0, "CANCELED": 0, "BACKEND": 0, "OTHER": 0}


def test_an_execution_is_split_into_its_phases() -> None:
    counts = Statistics()
    counts.executed([900], [3], [], TIMES)
    assert (counts.inference_count, counts.execution_count) == (3, 1)
    assert (counts.success, counts.queue) == (Duration(1, 250), Duration(1, 100))
    assert (counts.compute_input, counts.compute_infer, counts.compute_output) == (
        Duration(1, 10),
        Duration(1, 100),
        Duration(1, 40),
    )
    assert counts.last_inference_ms > 1_600_000_000_000


def test_every_request_of_a_batch_adds_the_whole_computation() -> None:
    counts = Statistics()
    counts.executed([900, 950], [1, 2], [], TIMES)
    assert (counts.inference_count, counts.execution_count) == (3, 1)
    assert (counts.success, counts.queue) == (Duration(2, 250 + 200), Duration(2, 100 + 50))
    assert counts.compute_infer == Duration(2, 200)
    assert counts.batches[3].compute_infer == Duration(1, 100)


def test_batch_sizes_are_counted_apart() -> None:
    counts = Statistics()
    for rows in ([1], [1], [2]):
        counts.executed([900], rows, [], TIMES)
    assert {size: batch.compute_output for size, batch in counts.batches.items()} == {
        1: Duration(2, 80),
        2: Duration(1, 40),
    }
    assert (counts.inference_count, counts.execution_count, counts.success.count) == (4, 3, 3)


def test_a_failed_request_of_a_batch_touches_failures_only() -> None:
    counts = Statistics()
    counts.executed([900], [1], [800, 850], TIMES)
    assert (counts.success.count, counts.inference_count) == (1, 1)
    assert (counts.fail, counts.failures["BACKEND"]) == (Duration(2, 350 + 300), 2)


def test_a_batch_that_failed_is_no_execution() -> None:
    counts = Statistics()
    counts.executed([], [], [900], TIMES)
    assert (counts.execution_count, counts.batches, counts.queue) == (0, {}, Duration())
    assert counts.fail == Duration(1, 250)


def test_a_request_that_never_ran_is_counted_by_its_reason() -> None:
    counts = Statistics()
    counts.failed("CANCELED", 70)
    counts.failed("REJECTED", 30)
    assert counts.fail == Duration(2, 100)
    assert counts.failures == {"REJECTED": 1, "CANCELED": 1, "BACKEND": 0, "OTHER": 0}
