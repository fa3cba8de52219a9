"""The allocator's thresholds, set in a process of its own."""

import subprocess
import sys

MEASURE = """
import resource, sys
from penstock import allocator
if int(sys.argv[1]):
    assert allocator.keep_blocks(32 << 20)
for times in (3, 50):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        blocks = [bytearray(b"x") * (4 << 20) for _ in range(4)]
        del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(threshold: int) -> int:
    """Page faults of 50 times 4 blocks of 4 MiB, after a few others."""
    done = subprocess.run([sys.executable, "-c", MEASURE, str(threshold)], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_blocks_that_are_kept_cost_no_page_faults_again() -> None:
    pages = 4 * (4 << 20) // 4096
    assert faults(1) < pages
    assert faults(0) > 25 * pages
