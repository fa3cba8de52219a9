"""What a process holds, as Linux tells it."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SETTLE_S = 10.0
# By default the server keeps what it frees, tens of MB of it, and touches more of that whenever long bodies meet. Told
# to give it back, it holds what it uses: a campaign of 120,000 cases adds 3 to 4 MiB, of tables that fill up to their
# bounds, and a leak of 130 bytes in each case is too much.
RETURNING = ("--malloc-threshold", str(128 << 10))
GROWTH_LIMIT_BYTES = 16 << 20  # of resident memory, measured from a server that is warm
# Of pools that had not yet filled when the first measure was taken, and of models whose first run in place, or whose
# first deadline, came after it: either starts a thread. In tens of thousands of cases, a leak would be many times more.
LATE_THREADS = 16


@dataclass(frozen=True, slots=True)
class Footprint:
    resident_bytes: int
    descriptors: int
    threads: int

    def __str__(self) -> str:
        mebibytes = self.resident_bytes / 2**20
        return f"{mebibytes:.1f} MiB resident, {self.descriptors} descriptors, {self.threads} threads"


def measure(pid: int) -> Footprint:
    at = Path(f"/proc/{pid}")
    pages = int((at / "statm").read_text().split()[1])
    return Footprint(pages * os.sysconf("SC_PAGE_SIZE"), len([*(at / "fd").iterdir()]), len([*(at / "task").iterdir()]))


def growth(before: Footprint, after: Footprint) -> list[str]:
    """What has grown beyond its bound, in words."""
    grown = []
    if (more := after.resident_bytes - before.resident_bytes) > GROWTH_LIMIT_BYTES:
        grown.append(f"resident memory grew by {more / 2**20:.1f} MiB, allowed are {GROWTH_LIMIT_BYTES >> 20}")
    if after.descriptors > before.descriptors:
        grown.append(f"{after.descriptors - before.descriptors} descriptors more than before")
    if after.threads > before.threads + LATE_THREADS:
        grown.append(f"{after.threads - before.threads} threads more than before, allowed are {LATE_THREADS}")
    return grown


def settled(pid: int, wanted: Footprint, serve: Callable[[], object]) -> Footprint:
    """The footprint once it has no more descriptors than wanted, or after SETTLE_S. `serve` keeps the server going."""
    end_s = time.monotonic() + SETTLE_S
    while (found := measure(pid)).descriptors > wanted.descriptors and time.monotonic() < end_s:
        serve()
    return found
