"""Figures of the process and the machine, out of a /proc made for the test, and out of the real one."""

import os
import re
import time
from pathlib import Path

import pytest
from penstock.process_metrics import PAGE_BYTES, TICK_S, ProcessMetrics

MACHINE = ("nv_cpu_utilization", "nv_cpu_memory_total_bytes", "nv_cpu_memory_used_bytes")


def values(text: str) -> dict[str, float]:
    """Each metric once, behind its help and its type."""
    found = re.findall(r"^# HELP (\S+) \S.*\n# TYPE \1 (?:gauge|counter)\n\1 (\S+)\n", text, re.MULTILINE)
    assert len(found) * 3 == text.count("\n")
    return {name: float(value) for name, value in found}


class Proc:
    """A /proc whose machine can be made to work."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.now_ns = 10**12
        (root / "self" / "fd").mkdir(parents=True)
        for number in range(3):
            (root / "self" / "fd" / str(number)).touch()
        fields = ["S", *(str(number) for number in range(4, 53))]
        fields[11], fields[12], fields[17], fields[19], fields[20], fields[21] = "30", "20", "7", "500", "4096", "9"
        (root / "self" / "stat").write_text("1 (pen) stock) " + " ".join(fields))
        (root / "self" / "limits").write_text("Limit\nMax open files            1024         4096         files\n")
        (root / "meminfo").write_text("MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable: 400 kB\n")
        self.worked(busy=100, idle=300)

    def worked(self, busy: int, idle: int) -> None:
        """Since the machine started, in ticks."""
        (self.root / "stat").write_text(f"cpu  {busy} 0 0 {idle} 0 0 0 0 9 9\ncpu0 1 1 1 1\nbtime 1700000000\n")

    def metrics(self, machine: bool = True) -> ProcessMetrics:
        return ProcessMetrics(machine, 2000, self.root, lambda: self.now_ns)


def test_the_process_is_told_under_the_names_of_prometheus(tmp_path: Path) -> None:
    assert values(Proc(tmp_path).metrics(machine=False).render()) == {
        "process_cpu_seconds_total": pytest.approx(50 * TICK_S),
        "process_resident_memory_bytes": 9 * PAGE_BYTES,
        "process_virtual_memory_bytes": 4096,
        "process_start_time_seconds": pytest.approx(1_700_000_000 + 500 * TICK_S),
        "process_open_fds": 3,
        "process_max_fds": 1024,
        "process_threads": 7,
    }


def test_the_machine_is_sampled_anew_after_the_interval(tmp_path: Path) -> None:
    proc = Proc(tmp_path)
    metrics = proc.metrics()
    assert [values(metrics.render())[name] for name in MACHINE] == [0.25, 1000 * 1024, 600 * 1024]
    proc.worked(busy=190, idle=310)
    proc.now_ns += 1_999_000_000
    assert values(metrics.render())["nv_cpu_utilization"] == 0.25
    proc.now_ns += 1_000_000
    assert values(metrics.render())["nv_cpu_utilization"] == 0.9


def test_the_real_process_is_this_one() -> None:
    told = values(ProcessMetrics(True, 0).render())
    assert told["process_open_fds"] == pytest.approx(len(os.listdir("/proc/self/fd")), abs=2)
    assert told["process_resident_memory_bytes"] > 10 << 20
    assert told["process_threads"] >= 1
    assert 0 <= told["process_start_time_seconds"] <= time.time()
    assert 0 < told["nv_cpu_memory_used_bytes"] < told["nv_cpu_memory_total_bytes"]
    assert 0 <= told["nv_cpu_utilization"] <= 1
