"""Counts and durations are the statistics extension's."""

import math

from penstock.statistics import Duration, Execution, Histogram, Recent, Statistics

TIMES = Execution(started_ns=1000, inputs_ready_ns=1010, outputs_came_ns=1110, ended_ns=1150)


def test_a_new_version_has_counted_nothing() -> None:
    counts = Statistics()
    assert (counts.success, counts.fail, counts.last_inference_ms) == (Duration(), Duration(), 0)
    assert counts.failures == {"REJECTED": 0, "CANCELED": 0, "BACKEND": 0, "OTHER": 0}


def test_an_execution_is_split_into_its_phases() -> None:
    counts = Statistics()
    counts.executed([900], 3, TIMES)
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
    counts.executed([900, 950], 3, TIMES)
    assert (counts.inference_count, counts.execution_count) == (3, 1)
    assert (counts.success, counts.queue) == (Duration(2, 250 + 200), Duration(2, 100 + 50))
    assert counts.compute_infer == Duration(2, 200)
    assert counts.batches[3].compute_infer == Duration(1, 100)


def test_batch_sizes_are_counted_apart() -> None:
    counts = Statistics()
    for rows in (1, 1, 2):
        counts.executed([900], rows, TIMES)
    assert {size: batch.compute_output for size, batch in counts.batches.items()} == {
        1: Duration(2, 80),
        2: Duration(1, 40),
    }
    assert (counts.inference_count, counts.execution_count, counts.success.count) == (4, 3, 3)


def test_a_part_of_a_request_has_rows_and_the_request_ends_with_its_last() -> None:
    counts = Statistics()
    counts.executed([], 8, TIMES)
    counts.executed([900], 3, TIMES)
    assert (counts.inference_count, counts.execution_count, counts.success) == (11, 2, Duration(1, 250))
    assert list(counts.batches) == [8, 3]


def test_a_value_belongs_to_the_first_bound_that_it_does_not_exceed() -> None:
    histogram = Histogram([10, 20])
    for value in (0, 10, 11, 20, 21):
        histogram.add(value)
    histogram.add(15, times=2)
    assert (histogram.counts, histogram.total) == ([2, 4, 1], 62 + 30)


def test_every_request_is_seen_in_each_histogram_and_an_execution_in_that_of_rows() -> None:
    counts = Statistics()
    counts.executed([900, 950], 3, TIMES)
    seen = counts.histograms
    assert (seen.request.total, seen.queue.total) == (250 + 200, 100 + 50)
    assert (seen.compute_input.total, seen.compute_infer.total, seen.compute_output.total) == (20, 200, 80)
    assert (seen.rows.total, sum(seen.rows.counts)) == (3, 1)


def test_a_request_that_never_ran_is_counted_by_its_reason() -> None:
    counts = Statistics()
    counts.failed("CANCELED", 70)
    counts.failed("REJECTED", 30)
    assert counts.fail == Duration(2, 100)
    assert counts.failures == {"REJECTED": 1, "CANCELED": 1, "BACKEND": 0, "OTHER": 0}


def test_the_wait_for_a_fuller_batch_is_counted_once_for_each_execution() -> None:
    counts = Statistics()
    for gathered_ns in (0, 3_000_000):
        counts.executed([900, 950], 2, Execution(1000, 1010, 1110, 1150, gathered_ns))
    assert (sum(counts.histograms.gathered.counts), counts.histograms.gathered.total) == (2, 3_000_000)


def test_responses_are_counted_by_their_place() -> None:
    counts = Statistics()
    for _ in range(2):
        counts.responded(0, 10, "success")
    counts.responded(1, 5, "fail")
    counts.responded(1, 7, "empty_response")
    counts.responded(2, 9, "cancel")
    first, second, third = (counts.responses[place] for place in range(3))
    assert (first.compute_infer, first.compute_output, first.success) == (
        Duration(2, 20),
        Duration(2, 0),
        Duration(2, 20),
    )
    assert (second.compute_infer, second.fail, second.empty_response) == (
        Duration(2, 12),
        Duration(1, 5),
        Duration(1, 7),
    )
    assert (third.compute_infer, third.cancel) == (Duration(), Duration(1, 9))


def test_quantiles_are_of_the_last_minute() -> None:
    recent = Recent()
    minute_ns = 60 * 10**9
    recent.add(1000, now_ns=0)
    for value in range(10):
        recent.add(value, now_ns=minute_ns)
    assert recent.at([0, 0.5, 0.99, 1], now_ns=minute_ns) == [0, 5, 1000, 1000]
    assert recent.at([0, 0.5, 0.99, 1], now_ns=minute_ns + 1) == [0, 5, 9, 9]
    assert all(map(math.isnan, recent.at([0.5], now_ns=3 * minute_ns)))
