"""Percentiles: exact while times are kept, within a bucket's width after that."""

import numpy as np
import pytest
from penstock.bench.latencies import Latencies


def latencies(*times_ns: int, kept: int = 1000) -> Latencies:
    made = Latencies(kept)
    for time_ns in times_ns:
        made.add(time_ns)
    return made


def test_a_percentile_is_the_smallest_time_that_so_many_do_not_exceed() -> None:
    hundred = latencies(*range(100, 0, -1))
    assert hundred.percentiles(1, 50, 90, 99, 99.5, 100) == [1, 50, 90, 99, 100, 100]


def test_percentiles_of_few_times_are_times_that_were_taken() -> None:
    assert latencies(7).percentiles(50, 99, 100) == [7, 7, 7]
    assert latencies(30, 10, 20).percentiles(0, 33, 34, 50, 67, 100) == [10, 10, 20, 20, 30, 30]


def test_without_times_percentiles_are_zero() -> None:
    assert latencies().percentiles(50, 100) == [0, 0]


def test_too_many_times_are_counted_in_buckets_a_thousandth_wide() -> None:
    times_ns = np.random.default_rng(1).lognormal(13, 2, 20_000).astype(np.int64)
    counted = latencies(*times_ns.tolist(), kept=1024)
    assert len(counted) == len(times_ns)
    for percent in (1, 50, 90, 99, 99.9):
        [exact] = latencies(*times_ns.tolist(), kept=100_000).percentiles(percent)
        assert counted.percentiles(percent) == [pytest.approx(exact, rel=0.0006)]


def test_the_highest_time_stays_exact() -> None:
    assert latencies(5, 123_456_789, 6, 7, kept=2).percentiles(100) == [123_456_789]
    assert latencies(0, 0, 0, kept=2).percentiles(50, 100) == [0, 0]


def test_times_may_come_after_percentiles_were_asked_for() -> None:
    growing = latencies(*range(1, 101), kept=50)
    assert growing.percentiles(100) == [100]
    growing.add(500)
    assert len(growing) == 101
    assert growing.percentiles(100) == [500]
