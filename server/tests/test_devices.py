"""What the machine has."""

import os

import pytest
from penstock.devices import DRIVER, NVML, Driver, Gpu, cpu_count, driver, gpu_count, gpu_uuid, within_quota

from .fakes_nvidia import FakeDriver, loader


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
    assert gpu_uuid(gpu_count()) == ""


UUID = "GPU-a763c375-aefc-7f0c-76da-1c5554011402"
H200 = Gpu(0, "NVIDIA H200", "9.0", 143771 << 20, UUID)


def test_the_driver_tells_its_version_and_its_gpus() -> None:
    gpus = [("NVIDIA H200", 143771 << 20, (9, 0)), ("NVIDIA A100", 40 << 30, (8, 0))]
    fake = FakeDriver(13000, gpus, uuids=[UUID])  # of the second it tells none
    shown = driver(loader({DRIVER: fake, NVML: fake}))
    assert shown == Driver("580.159.03", (13, 0), (H200, Gpu(1, "NVIDIA A100", "8.0", 40 << 30)))


def test_a_machine_without_a_driver_says_so() -> None:
    fault = "the NVIDIA driver is not there (libcuda.so.1: cannot open shared object file: No such file or directory)"
    assert driver(loader({})) == Driver(fault=fault)


@pytest.mark.parametrize(
    ("status", "named"), [(100, "CUDA_ERROR_NO_DEVICE"), (999, "CUDA error 999")], ids=["named", "unnamed"]
)
def test_a_driver_that_does_not_start_says_why_and_still_tells_its_cuda(status: int, named: str) -> None:
    shown = driver(loader({DRIVER: FakeDriver(12040, init_status=status)}))
    assert shown == Driver("", (12, 4), (), f"the NVIDIA driver shows no GPU ({named})")


def test_a_driver_without_a_gpu_says_so() -> None:
    assert driver(loader({DRIVER: FakeDriver(13000)})).fault == "the NVIDIA driver shows no GPU"
