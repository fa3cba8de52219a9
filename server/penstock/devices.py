"""Which processors and GPUs there are, asked of the operating system and the NVIDIA driver; no CUDA library needed."""

import ctypes
import os
from functools import cache


def cpu_count() -> int:
    """Cores this process may use: its affinity, cut down to the control group's quota."""
    cores = len(os.sched_getaffinity(0))
    try:
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
            return within_quota(cores, file.read())
    except OSError:
        return cores  # no control group of version 2: no quota to know of


def within_quota(cores: int, cpu_max: str) -> int:
    """`cores`, or fewer where `cpu.max` of a control group ("QUOTA PERIOD" in us, or "max PERIOD") allows fewer."""
    quota, period = cpu_max.split()
    return cores if quota == "max" else max(1, min(cores, round(int(quota) / int(period))))


@cache
def gpu_count() -> int:
    """CUDA devices that the NVIDIA driver shows to this process; 0 where there is no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    number = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(number)) != 0:
        return 0
    return number.value
