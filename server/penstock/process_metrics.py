"""What the system says of this process and its machine, as Prometheus text: read from /proc when it is scraped."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic_ns
from typing import TypeAlias

PROC = Path("/proc")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
# Fields of /proc/PID/stat behind the name, which may hold anything: the first there is the process's state.
USER_TICKS, SYSTEM_TICKS, THREADS, START_TICKS, VIRTUAL_BYTES, RESIDENT_PAGES = 11, 12, 17, 19, 20, 21
IDLE = slice(3, 5)  # of the first line of /proc/stat: doing nothing, and waiting for a disk

Rows: TypeAlias = Iterator[tuple[str, str, str, float]]  # name, type, help, value


class ProcessMetrics:
    """Used by one thread. Figures of the machine are sampled anew once they are older than an interval."""

    def __init__(
        self, machine: bool, interval_ms: int, proc: Path = PROC, now: Callable[[], int] = monotonic_ns
    ) -> None:
        """`machine`: also the CPU and memory of the machine, under Triton's names."""
        self._machine = machine
        self._interval_ns = interval_ms * 1_000_000
        self._proc = proc
        self._now = now
        self._sampled_ns = 0
        self._busy = self._total = 0  # ticks of all cores, when they were sampled
        self._utilization = 0.0
        if machine:
            self._sample()

    def render(self) -> str:
        rows = (*self._process(), *(self._of_machine() if self._machine else ()))
        return "".join(
            f"# HELP {name} {help}\n# TYPE {name} {type}\n{name} {value:.15g}\n" for name, type, help, value in rows
        )

    def _process(self) -> Rows:
        """The names that Prometheus' own client libraries give."""
        stat = (self._proc / "self/stat").read_text().rpartition(")")[2].split()
        ticks = int(stat[USER_TICKS]) + int(stat[SYSTEM_TICKS])
        yield "process_cpu_seconds_total", "counter", "User and system CPU time, in seconds", ticks * TICK_S
        resident = int(stat[RESIDENT_PAGES]) * PAGE_BYTES
        yield "process_resident_memory_bytes", "gauge", "Memory that is resident, in bytes", resident
        yield "process_virtual_memory_bytes", "gauge", "Memory that is mapped, in bytes", int(stat[VIRTUAL_BYTES])
        started_s = self._boot_s() + int(stat[START_TICKS]) * TICK_S
        yield "process_start_time_seconds", "gauge", "When it started, in seconds since the Unix epoch", started_s
        yield "process_open_fds", "gauge", "Open file descriptors", len(os.listdir(self._proc / "self/fd"))
        yield "process_max_fds", "gauge", "Limit on open file descriptors", self._most_files()
        yield "process_threads", "gauge", "Threads", int(stat[THREADS])

    def _of_machine(self) -> Rows:
        if self._now() - self._sampled_ns >= self._interval_ns:
            self._sample()
        facts = dict(line.split(":") for line in (self._proc / "meminfo").read_text().splitlines())
        total, available = (int(facts[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
        yield "nv_cpu_utilization", "gauge", "CPU utilization rate [0.0 - 1.0]", self._utilization
        yield "nv_cpu_memory_total_bytes", "gauge", "CPU total memory (RAM), in bytes", total
        yield "nv_cpu_memory_used_bytes", "gauge", "CPU used memory (RAM), in bytes", total - available

    def _sample(self) -> None:
        """How busy all cores were since the last sample; since the machine started, for the first."""
        ticks = [int(number) for number in (self._proc / "stat").read_text().splitlines()[0].split()[1:9]]
        total = sum(ticks)
        busy = total - sum(ticks[IDLE])
        if total > self._total:
            self._utilization = (busy - self._busy) / (total - self._total)
        self._busy, self._total, self._sampled_ns = busy, total, self._now()

    def _boot_s(self) -> int:
        lines = (self._proc / "stat").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("btime"))

    def _most_files(self) -> int:
        lines = (self._proc / "self/limits").read_text().splitlines()
        limit = next(line for line in lines if line.startswith("Max open files")).split()[3]
        return -1 if limit == "unlimited" else int(limit)
