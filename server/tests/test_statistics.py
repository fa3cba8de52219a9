"""Counts and durations are the statistics extension's."""

import math
import time
from collections import Counter

import numpy as np
from penstock.statistics import FOLDED, MS, NO_GPU, Duration, Execution, Histogram, Ran, Recent, Statistics, Summaries

TIMES = Execution(input_ns=10, infer_ns=100, output_ns=40, started_ns=1000, ended_ns=1150)


def test_a_new_version_has_counted_nothing() -> None:
    counts = Statistics()
    assert (counts.success, counts.fail, counts.last_inference_ms) == (Duration(), Duration(), 0)
    assert counts.failures == {"REJECTED": 0, "CANCELED": 0, "BACKEND": 0, "OTHER": 0}


def test_an_execution_is_split_into_its_phases() -> None:
    counts = Statistics()
    counts.executed([900], 3, TIMES)
    counts.fold()
    assert (counts.inference_count, counts.execution_count) == (3, 1)
    assert (counts.success, counts.queue) == (Duration(1, 250), Duration(1, 100))
    assert (counts.compute_input, counts.compute_infer, counts.compute_output) == (
        Duration(1, 10),
        Duration(1, 100),
        Duration(1, 40),
    )
    executions = counts.batches[3]
    assert (executions.compute_input, executions.compute_infer, executions.compute_output) == (
        Duration(1, 10),
        Duration(1, 100),
        Duration(1, 40),
    )


def test_the_last_inference_was_when_it_ended_and_not_when_it_was_counted() -> None:
    counts = Statistics()
    ended_ns = time.monotonic_ns() - 10_000 * MS
    for ago_ms in (0, 50):
        counts.executed([0], 1, Execution(1, 1, 1, 0, ended_ns - ago_ms * MS))
    counts.fold()
    assert abs(time.time() - 10 - counts.last_inference_ms / 1000) < 5


def test_every_request_of_a_batch_adds_the_whole_computation() -> None:
    counts = Statistics()
    counts.executed([900, 950], 3, TIMES)
    counts.fold()
    assert (counts.inference_count, counts.execution_count) == (3, 1)
    assert (counts.success, counts.queue) == (Duration(2, 250 + 200), Duration(2, 100 + 50))
    assert counts.compute_infer == Duration(2, 200)
    assert counts.batches[3].compute_infer == Duration(1, 100)


def test_batch_sizes_are_counted_apart() -> None:
    counts = Statistics()
    for rows in (1, 1, 2):
        counts.executed([900], rows, TIMES)
    counts.fold()
    assert {size: batch.compute_output for size, batch in counts.batches.items()} == {
        1: Duration(2, 80),
        2: Duration(1, 40),
    }
    assert (counts.inference_count, counts.execution_count, counts.success.count) == (4, 3, 3)


def test_a_part_of_a_request_has_rows_and_the_request_the_phases_of_all() -> None:
    counts = Statistics()
    counts.executed([], 8, TIMES)
    counts.executed([], 3, Execution(5, 50, 20, 1200, 1275))
    counts.fold()
    assert (counts.inference_count, counts.execution_count, counts.success) == (11, 2, Duration())
    counts.joined(900, Execution(15, 150, 60, 1000, 1275))
    counts.fold()
    assert (counts.inference_count, counts.execution_count) == (11, 2)
    assert (counts.success, counts.queue) == (Duration(1, 375), Duration(1, 100))
    assert [counts.compute_input, counts.compute_infer, counts.compute_output] == [
        Duration(1, 15),
        Duration(1, 150),
        Duration(1, 60),
    ]
    assert {size: batch.compute_infer for size, batch in counts.batches.items()} == {
        8: Duration(1, 100),
        3: Duration(1, 50),
    }


def on(gpu: int, input_ns: int = 10) -> Execution:
    """As TIMES, on that GPU."""
    return Execution(input_ns, 100, 40, 1000, 1150, gpu=gpu)


def test_what_ran_on_a_gpu_is_counted_there_and_in_the_whole() -> None:
    counts = Statistics(gpus={0: Ran(), 3: Ran()})
    counts.executed([900, 950], 3, on(0))
    counts.executed([800], 1, on(3, input_ns=20))
    counts.executed([900], 5, TIMES)
    counts.executed([900], 2, on(0))
    counts.fold()
    durations = [Duration(3, 700), Duration(3, 250), Duration(3, 30), Duration(3, 300), Duration(3, 120)]
    assert counts.gpus[0] == Ran(5, 2, *durations)
    durations = [Duration(1, 350), Duration(1, 200), Duration(1, 20), Duration(1, 100), Duration(1, 40)]
    assert counts.gpus[3] == Ran(1, 1, *durations)
    assert (counts.inference_count, counts.execution_count, counts.success) == (11, 4, Duration(5, 700 + 350 + 250))
    assert (counts.queue, counts.compute_input) == (Duration(5, 250 + 200 + 100), Duration(5, 30 + 20 + 10))


def test_a_request_in_parts_counts_on_one_gpu_and_each_part_where_it_ran() -> None:
    counts = Statistics(gpus={0: Ran(), 1: Ran()})
    counts.executed([], 8, on(0))
    counts.executed([], 3, on(1))
    counts.joined(900, on(0))
    counts.fold()
    first, second = counts.gpus.values()
    assert (first.inference_count, first.execution_count, first.success) == (8, 1, Duration(1, 250))
    assert (second.inference_count, second.execution_count, second.success) == (3, 1, Duration())


def test_what_the_cache_answers_is_of_no_gpu() -> None:
    counts = Statistics(gpus={0: Ran()})
    counts.executed([900], 1, on(0))
    counts.hit(lookup_ns=20, queue_ns=5)
    counts.missed(lookup_ns=30, insertion_ns=7)
    counts.fold()
    assert counts.success == Duration(2, 250 + 25 + 7)
    assert counts.gpus[0].success == Duration(1, 250)


def test_a_value_belongs_to_the_first_bound_that_it_does_not_exceed() -> None:
    histogram = Histogram([10, 20])
    for value in (0, 10, 11, 20, 21):
        histogram.add(value)
    assert (histogram.counts, histogram.total) == ([2, 2, 1], 62)
    histogram.add_all(np.array([0, 10, 11, 20, 21]))
    assert (histogram.counts, histogram.total) == ([4, 4, 2], 124)


def test_every_request_is_seen_in_each_histogram_and_an_execution_in_that_of_rows() -> None:
    counts = Statistics()
    counts.executed([900, 950], 3, TIMES)
    counts.fold()
    seen = counts.histograms
    assert (seen.request.total, seen.queue.total) == (250 + 200, 100 + 50)
    assert (seen.compute_input.total, seen.compute_infer.total, seen.compute_output.total) == (20, 200, 80)
    assert (seen.rows.total, sum(seen.rows.counts)) == (3, 1)


def test_what_is_not_read_is_counted_all_the_same() -> None:
    counts = Statistics()
    for _ in range(FOLDED):
        counts.executed([900], 3, TIMES)
    assert (counts.success, counts.execution_count) == (Duration(FOLDED, 250 * FOLDED), FOLDED)
    counts.executed([900], 3, TIMES)
    assert counts.execution_count == FOLDED
    counts.fold()
    assert counts.execution_count == FOLDED + 1


def test_every_request_of_a_batch_is_in_the_bucket_of_its_time() -> None:
    counts = Statistics()
    counts.executed([0, 2 * MS], 2, Execution(3 * MS, 30 * MS, 300 * MS, 2 * MS, 335 * MS))
    counts.fold()
    seen = counts.histograms
    buckets = {
        "request": (500, 500),
        "queue": (0.1, 2.5),
        "compute_input": (5, 5),
        "compute_infer": (50, 50),
        "compute_output": (500, 500),
    }
    for name, bounds_ms in buckets.items():
        histogram: Histogram = getattr(seen, name)
        filled = {bound / MS: number for bound, number in zip(histogram.bounds, histogram.counts, strict=False)}
        assert {bound: number for bound, number in filled.items() if number} == Counter(bounds_ms), name


def test_a_request_that_never_ran_is_counted_by_its_reason() -> None:
    counts = Statistics()
    counts.failed("CANCELED", 70)
    counts.failed("REJECTED", 30)
    assert counts.fail == Duration(2, 100)
    assert counts.failures == {"REJECTED": 1, "CANCELED": 1, "BACKEND": 0, "OTHER": 0}


def test_the_wait_for_a_fuller_batch_is_counted_once_for_each_execution() -> None:
    counts = Statistics()
    for gathered_ns in (0, 3_000_000):
        counts.executed([900, 950], 2, Execution(10, 100, 40, 1000, 1150, gathered_ns))
    counts.fold()
    assert (sum(counts.histograms.gathered.counts), counts.histograms.gathered.total) == (2, 3_000_000)


def test_responses_are_counted_by_their_place() -> None:
    counts = Statistics()
    for _ in range(2):
        counts.responded(0, 10, "success", 110)
    counts.responded(1, 5, "fail", 115)
    counts.responded(1, 7, "empty_response", 117)
    counts.responded(2, 9, "cancel", 124)
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


def test_the_first_response_is_the_first_and_not_the_last() -> None:
    counts = Statistics()
    counts.executed([0], 1, Execution(0, 700 * MS, 0, 0, 700 * MS + 999_999))
    counts.fold()
    assert (counts.histograms.first_response.total, counts.histograms.first_response.counts) == (700, [0, 0, 1, 0, 0])
    counts = Statistics()
    counts.responded(0, 40 * MS, "success", 50 * MS)
    counts.responded(1, 600 * MS, "success", 650 * MS)
    counts.responded(2, 0, "empty_response", 650 * MS)
    counts.executed([0], 1, Execution(0, 640 * MS, 0, 10 * MS, 650 * MS))
    counts.fold()
    assert (counts.histograms.first_response.total, counts.histograms.first_response.counts) == (50, [1, 0, 0, 0, 0])
    counts.responded(0, 5 * MS, "fail", 5 * MS)
    assert sum(counts.histograms.first_response.counts) == 1


def test_a_miss_is_the_look_up_and_the_keeping_of_the_answer_together() -> None:
    counts = Statistics(summaries=Summaries((0.5,)))
    counts.executed([900], 1, TIMES)
    counts.fold()
    counts.missed(lookup_ns=30, insertion_ns=7)
    assert counts.cache_miss == Duration(1, 37)
    assert counts.success == Duration(1, 250 + 7)  # the look-up lies between its arrival and its end
    assert counts.histograms.request.total == counts.success.ns
    assert counts.queue == Duration(1, 100)
    assert counts.summaries is not None
    assert counts.summaries.cache_miss.at((0.5,), time.monotonic_ns()) == [37]


def test_a_hit_computes_nothing() -> None:
    counts = Statistics()
    counts.hit(lookup_ns=20, queue_ns=5)
    assert (counts.cache_hit, counts.success, counts.queue) == (Duration(1, 20), Duration(1, 25), Duration(1, 5))
    assert (counts.inference_count, counts.execution_count, counts.last_inference_ms) == (0, 0, 0)
    assert counts.compute_input == counts.compute_infer == counts.compute_output == counts.cache_miss == Duration()


def test_summaries_have_the_times_of_single_requests() -> None:
    counts = Statistics(summaries=Summaries((0.5,)))
    counts.executed([900, 950], 3, TIMES)
    counts.fold()
    kept = counts.summaries
    assert kept is not None
    phases = (kept.compute_input, kept.compute_infer, kept.compute_output)
    assert [phase.at([0, 0.99], now_ns=1150) for phase in phases] == [[10, 10], [100, 100], [40, 40]]
    assert (kept.request.at([0, 0.99], now_ns=1150), kept.queue.at([0, 0.99], now_ns=1150)) == ([200, 250], [50, 100])
    counts = Statistics(summaries=(kept := Summaries((0.5,))))
    counts.hit(lookup_ns=3, queue_ns=2)
    now_ns = time.monotonic_ns()
    assert [values.at([0.5], now_ns) for values in (kept.request, kept.queue, kept.cache_hit)] == [[5], [2], [3]]


def test_quantiles_are_of_the_last_minute() -> None:
    recent = Recent()
    minute_ns = 60 * 10**9
    recent.add(1000, now_ns=0)
    for value in range(10):
        recent.add(value, now_ns=minute_ns)
    assert recent.at([0, 0.5, 0.99, 1], now_ns=minute_ns) == [0, 5, 1000, 1000]
    assert recent.at([0, 0.5, 0.99, 1], now_ns=minute_ns + 1) == [0, 5, 9, 9]
    assert all(map(math.isnan, recent.at([0.5], now_ns=3 * minute_ns)))


def test_quantiles_are_of_one_gpu_or_of_several_or_of_none() -> None:
    counts = Statistics(gpus={0: Ran(), 1: Ran()}, summaries=Summaries((0.5,)))
    now_ns = time.monotonic_ns()
    for gpu, infer_ns in ((0, 10), (1, 20), (1, 30), (NO_GPU, 40)):
        counts.executed([now_ns], 1, Execution(0, infer_ns, 0, now_ns, now_ns, gpu=gpu))
    counts.fold()
    assert counts.summaries is not None
    seen = counts.summaries.compute_infer
    medians = [seen.at((0.5,), now_ns, gpus) for gpus in ({0}, {1}, {NO_GPU}, {0, 1}, {2})]
    assert medians[:4] == [[10], [30], [40], [20]]
    assert math.isnan(medians[4][0])
