"""What the machine has."""

import os

import pytest
from penstock.devices import cpu_count, gpu_count, within_quota


@pytest.mark.parametrize(
    ("cpu_max", "cores"),
    [
        ("max 100000\n", 8),
        ("200000 100000\n", 2),
        ("150000 100000\n", 2),
        ("50000 100000\n", 1),
        ("1600000 100000\n", 8),
    ],
)
def test_a_control_groups_quota_cuts_the_cores_down(cpu_max: str, cores: int) -> None:
    assert within_quota(8, cpu_max) == cores


def test_this_process_has_a_core_and_no_more_than_its_affinity_allows() -> None:
    assert 1 <= cpu_count() <= len(os.sched_getaffinity(0))


def test_gpus_are_counted_with_or_without_a_driver() -> None:
    assert gpu_count() >= 0
