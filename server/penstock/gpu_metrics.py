"""What NVIDIA's management library (NVML) tells of GPUs, as Prometheus text; names, units and labels are Triton's."""

import contextlib
import importlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

from msgspec import Struct

logger = logging.getLogger(__name__)

LIBRARY = "pynvml"  # the module of the package nvidia-ml-py, which penstock[gpu] brings


class Gauge(Struct, frozen=True):
    """One metric of every GPU. `read` takes NVML and a device's handle, and raises NVMLError where it is not told."""

    name: str
    type: str
    help: str
    read: Callable[[Any, Any], float]


def _own_memory(nvml: Any, device: Any) -> float:
    """Bytes of this process; NVML may know it by another number than it knows itself, in a container."""
    for process in nvml.nvmlDeviceGetComputeRunningProcesses(device):
        if process.pid == os.getpid() and process.usedGpuMemory is not None:
            return float(process.usedGpuMemory)
    raise nvml.NVMLError(nvml.NVML_ERROR_NOT_FOUND)


GAUGES = (
    Gauge(
        "nv_gpu_utilization", "gauge", "GPU utilization rate [0.0 - 1.0)",
        lambda nvml, device: nvml.nvmlDeviceGetUtilizationRates(device).gpu / 100,
    ),
    Gauge(
        "nv_gpu_memory_total_bytes", "gauge", "GPU total memory, in bytes",
        lambda nvml, device: nvml.nvmlDeviceGetMemoryInfo(device).total,
    ),
    Gauge(
        "nv_gpu_memory_used_bytes", "gauge", "GPU used memory, in bytes",
        lambda nvml, device: nvml.nvmlDeviceGetMemoryInfo(device).used,
    ),
    Gauge("penstock_gpu_memory_bytes", "gauge", "GPU memory that this server uses, in bytes", _own_memory),
    Gauge(
        "nv_gpu_power_usage", "gauge", "GPU power usage in watts",
        lambda nvml, device: nvml.nvmlDeviceGetPowerUsage(device) / 1000,
    ),
    Gauge(
        "nv_gpu_power_limit", "gauge", "GPU power management limit in watts",
        lambda nvml, device: nvml.nvmlDeviceGetPowerManagementLimit(device) / 1000,
    ),
)  # fmt: skip
ENERGY = Gauge(
    "nv_energy_consumption", "counter", "GPU energy consumption in joules since the server started",
    lambda nvml, device: nvml.nvmlDeviceGetTotalEnergyConsumption(device) / 1000,
)  # fmt: skip


class GpuMetrics:
    """The GPUs of this machine, from the server's start on."""

    def __init__(self, nvml: Any) -> None:
        """`nvml` is the module, or one like it, and initialised. Raises its NVMLError."""
        self._nvml = nvml
        self._devices: dict[str, Any] = {}  # handles by UUID
        for number in range(nvml.nvmlDeviceGetCount()):
            device = nvml.nvmlDeviceGetHandleByIndex(number)
            uuid = nvml.nvmlDeviceGetUUID(device)
            self._devices[uuid.decode() if isinstance(uuid, bytes) else uuid] = device
        self._energy_at_start = dict(self._read(ENERGY))

    def render(self) -> str:
        """Every metric that some GPU tells."""
        return "".join(self._lines())

    def _lines(self) -> Iterator[str]:
        for gauge in (*GAUGES, ENERGY):
            head = f"# HELP {gauge.name} {gauge.help}\n# TYPE {gauge.name} {gauge.type}\n"
            for uuid, value in self._read(gauge):
                shown = value - self._energy_at_start.get(uuid, 0) if gauge is ENERGY else value
                yield f'{head}{gauge.name}{{gpu_uuid="{uuid}"}} {shown}\n'
                head = ""

    def _read(self, gauge: Gauge) -> Iterator[tuple[str, float]]:
        for uuid, device in self._devices.items():
            with contextlib.suppress(self._nvml.NVMLError):  # not every GPU tells everything
                yield uuid, gauge.read(self._nvml, device)


def find(load: Callable[[str], Any] = importlib.import_module) -> GpuMetrics | None:
    """The GPUs of this machine; None where NVML or its driver is not there. `load` imports a module."""
    try:
        nvml = load(LIBRARY)
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
        return GpuMetrics(nvml)
    except nvml.NVMLError as error:
        logger.debug("NVML tells nothing of GPUs: %s", error)
        return None
