"""What NVML tells of GPUs is shown under Triton's names, and what it does not tell is left out."""

import importlib
import os
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from penstock import gpu_metrics
from penstock.gpu_metrics import GpuMetrics


class FakeNvmlError(Exception):
    """As `pynvml.NVMLError`."""


@dataclass
class FakeNvml:
    """The module pynvml: two GPUs, the second of which tells neither power nor energy."""

    starts: bool = True
    energy_mj: int = 5_000_000
    processes: list[Any] = field(default_factory=list)

    NVMLError = FakeNvmlError
    NVML_ERROR_NOT_FOUND = 6

    def nvmlInit(self) -> None:  # noqa: N802 - the real one's names
        if not self.starts:
            raise FakeNvmlError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, number: int) -> int:  # noqa: N802
        return number

    def nvmlDeviceGetUUID(self, device: int) -> str | bytes:  # noqa: N802
        return "GPU-a" if device == 0 else b"GPU-b"

    def nvmlDeviceGetUtilizationRates(self, device: int) -> Any:  # noqa: N802
        return SimpleNamespace(gpu=42 + device)

    def nvmlDeviceGetMemoryInfo(self, device: int) -> Any:  # noqa: N802
        return SimpleNamespace(total=1000, used=10 + device)

    def nvmlDeviceGetComputeRunningProcesses(self, device: int) -> list[Any]:  # noqa: N802
        return self.processes if device == 0 else []

    def nvmlDeviceGetPowerUsage(self, device: int) -> int:  # noqa: N802
        return self._of_the_first(device, 70_500)

    def nvmlDeviceGetPowerManagementLimit(self, device: int) -> int:  # noqa: N802
        return self._of_the_first(device, 700_000)

    def nvmlDeviceGetTotalEnergyConsumption(self, device: int) -> int:  # noqa: N802
        return self._of_the_first(device, self.energy_mj)

    def _of_the_first(self, device: int, value: int) -> int:
        if device:
            raise FakeNvmlError("Not Supported")
        return value


def series(made: GpuMetrics) -> dict[str, float]:
    lines = [line.rsplit(" ", 1) for line in made.render().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


def test_every_gpu_has_its_series_in_tritons_units() -> None:
    nvml = FakeNvml()
    made = GpuMetrics(nvml)
    nvml.energy_mj += 2_500
    assert series(made) == {
        'nv_gpu_utilization{gpu_uuid="GPU-a"}': 0.42,
        'nv_gpu_utilization{gpu_uuid="GPU-b"}': 0.43,
        'nv_gpu_memory_total_bytes{gpu_uuid="GPU-a"}': 1000,
        'nv_gpu_memory_total_bytes{gpu_uuid="GPU-b"}': 1000,
        'nv_gpu_memory_used_bytes{gpu_uuid="GPU-a"}': 10,
        'nv_gpu_memory_used_bytes{gpu_uuid="GPU-b"}': 11,
        'nv_gpu_power_usage{gpu_uuid="GPU-a"}': 70.5,
        'nv_gpu_power_limit{gpu_uuid="GPU-a"}': 700,
        'nv_energy_consumption{gpu_uuid="GPU-a"}': 2.5,
    }


def test_each_metric_has_its_head_once() -> None:
    lines = GpuMetrics(FakeNvml()).render().splitlines()
    assert lines[:4] == [
        "# HELP nv_gpu_utilization GPU utilization rate [0.0 - 1.0)",
        "# TYPE nv_gpu_utilization gauge",
        'nv_gpu_utilization{gpu_uuid="GPU-a"} 0.42',
        'nv_gpu_utilization{gpu_uuid="GPU-b"} 0.43',
    ]
    assert "# TYPE nv_energy_consumption counter" in lines


@pytest.mark.parametrize(
    ("pid", "used", "shown"), [(os.getpid(), 77, True), (os.getpid(), None, False), (1 << 30, 77, False)]
)
def test_the_servers_own_memory_is_told_where_it_can_be_known(pid: int, used: int | None, shown: bool) -> None:
    found = series(GpuMetrics(FakeNvml(processes=[SimpleNamespace(pid=pid, usedGpuMemory=used)])))
    assert found.get('penstock_gpu_memory_bytes{gpu_uuid="GPU-a"}') == (77 if shown else None)


def test_without_the_package_or_the_driver_there_are_none() -> None:
    def missing(name: str) -> Any:
        assert name == "pynvml"
        return importlib.import_module("a_module_that_is_not_there")

    assert gpu_metrics.find(missing) is None
    assert gpu_metrics.find(lambda name: FakeNvml(starts=False)) is None
    assert gpu_metrics.find(lambda name: FakeNvml()) is not None
