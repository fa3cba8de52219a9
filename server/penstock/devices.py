"""Which processors and GPUs there are, asked of the operating system and the NVIDIA driver; no CUDA library needed."""

import ctypes
import os
import uuid
from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

from msgspec import Struct

DRIVER = "libcuda.so.1"  # comes with NVIDIA's driver, never with CUDA
NVML = "libnvidia-ml.so.1"  # likewise; it alone tells the driver's own version

Load: TypeAlias = Callable[[str], Any]  # loads a shared library, or raises OSError

_COMPUTE_CAPABILITY = (75, 76)  # CUdevice_attribute: major, minor
_TEXT_BYTES = 96


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


class Gpu(Struct, frozen=True):
    """A CUDA device, by the number that this process knows it by."""

    number: int
    name: str
    capability: str  # of computing, such as "9.0"
    memory_bytes: int
    uuid: str = ""  # such as "GPU-a763c375-aefc-7f0c-76da-1c5554011402", as NVML has it; "" where the driver tells none


class Driver(Struct, frozen=True):
    """NVIDIA's driver, as it shows itself to this process."""

    version: str = ""  # such as "580.159.03"; "" where nothing tells it
    cuda: tuple[int, int] = (0, 0)  # the newest CUDA whose programs it runs; (0, 0) where there is no driver
    gpus: tuple[Gpu, ...] = ()
    fault: str = ""  # why it shows no GPU


def driver(load: Load = ctypes.CDLL) -> Driver:
    """Ask the driver. Never raises: what is wrong with it is its `fault`."""
    try:
        library = load(DRIVER)
    except OSError as error:
        return Driver(fault=f"the NVIDIA driver is not there ({error})")
    number = ctypes.c_int(0)
    library.cuDriverGetVersion(ctypes.byref(number))
    cuda = (number.value // 1000, number.value % 1000 // 10)
    version = _version(load)
    if status := library.cuInit(0) or library.cuDeviceGetCount(ctypes.byref(number)):
        return Driver(version, cuda, fault=f"the NVIDIA driver shows no GPU ({_error_name(library, status)})")
    gpus = tuple(_gpu(library, index) for index in range(number.value))
    return Driver(version, cuda, gpus, "" if gpus else "the NVIDIA driver shows no GPU")


def _version(load: Load) -> str:
    try:
        nvml = load(NVML)
    except OSError:
        return ""
    text = ctypes.create_string_buffer(_TEXT_BYTES)
    if nvml.nvmlInit_v2() or nvml.nvmlSystemGetDriverVersion(text, _TEXT_BYTES):
        return ""
    return text.value.decode()


def _error_name(library: Any, status: int) -> str:
    text = ctypes.c_char_p()
    if library.cuGetErrorName(status, ctypes.byref(text)) or text.value is None:
        return f"CUDA error {status}"
    return text.value.decode()


def _gpu(library: Any, index: int) -> Gpu:
    device, size, part = ctypes.c_int(), ctypes.c_size_t(), ctypes.c_int()
    name = ctypes.create_string_buffer(_TEXT_BYTES)
    library.cuDeviceGet(ctypes.byref(device), index)
    library.cuDeviceGetName(name, _TEXT_BYTES, device)
    library.cuDeviceTotalMem_v2(ctypes.byref(size), device)
    capability = []
    for attribute in _COMPUTE_CAPABILITY:
        library.cuDeviceGetAttribute(ctypes.byref(part), attribute, device)
        capability.append(str(part.value))
    octets = ctypes.create_string_buffer(16)
    unknown = library.cuDeviceGetUuid(octets, device)
    known_as = "" if unknown else f"GPU-{uuid.UUID(bytes=octets.raw)}"
    return Gpu(index, name.value.decode(), ".".join(capability), size.value, known_as)


def gpu_count() -> int:
    """CUDA devices that the NVIDIA driver shows to this process; 0 where there is no driver."""
    return len(_gpus())


def gpu_uuid(number: int) -> str:
    """Of the GPU that this process knows by `number`, whatever NVML calls that; "" where the driver does not tell."""
    return next((gpu.uuid for gpu in _gpus() if gpu.number == number), "")


@cache
def _gpus() -> tuple[Gpu, ...]:
    return driver().gpus
