"""Percentiles of many times in bounded memory: exact until there are too many to keep."""

import math
from array import array
from collections import Counter

import numpy as np

KEPT = 1 << 20  # times that are kept one by one, 8 bytes each
DROPPED_BITS = 42  # of a double's 52 bits of fraction: 1024 buckets per doubling, each 0.1 % wide


class Latencies:
    """Times in nanoseconds, at least 0.

    Past `kept` of them they are counted in buckets instead, and a percentile is then off by 0.05 % at the most.
    """

    def __init__(self, kept: int = KEPT) -> None:
        self._kept = kept
        self._times = array("q")
        self._buckets: Counter[int] = Counter()
        self._highest = 0

    def add(self, time_ns: int) -> None:
        self._times.append(time_ns)
        if len(self._times) >= self._kept:
            self._fold()

    def __len__(self) -> int:
        return len(self._times) + self._buckets.total()

    def percentiles(self, *percents: float) -> list[int]:
        """For each, the smallest time that so many percent of all times do not exceed; 100 is the highest time.

        Zeros where there are no times.
        """
        if not len(self):
            return [0 for _ in percents]
        ranks = [max(1, math.ceil(percent * len(self) / 100)) for percent in percents]
        if not self._buckets:
            ordered = np.sort(np.array(self._times))
            return [int(ordered[rank - 1]) for rank in ranks]
        self._fold()
        keys = np.array(sorted(self._buckets), np.int64)
        reached = np.cumsum([self._buckets[int(key)] for key in keys])
        middles = (keys << DROPPED_BITS | 1 << DROPPED_BITS - 1).view(np.float64)
        found = [min(round(middles[np.searchsorted(reached, rank)]), self._highest) for rank in ranks]
        return [self._highest if rank == len(self) else time for rank, time in zip(ranks, found, strict=True)]

    def _fold(self) -> None:
        """Count the kept times in buckets: the sign, exponent and first bits of the fraction of each as a double."""
        if not self._times:
            return
        times = np.array(self._times, np.float64)
        keys, counts = np.unique(times.view(np.int64) >> DROPPED_BITS, return_counts=True)
        self._buckets.update(dict(zip(keys.tolist(), counts.tolist(), strict=True)))
        self._highest = max(self._highest, int(times.max()))
        self._times = array("q")
