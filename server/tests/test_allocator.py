"""What the allocator is told, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

from penstock import allocator

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


COUNT = """
import ctypes, re, sys, threading
from pathlib import Path
from penstock import allocator
if int(sys.argv[1]):
    assert allocator.keep_blocks(32 << 20)
met = threading.Barrier(33)
def hold():
    block = bytearray(100_000)
    met.wait(20)
    met.wait(20)
threads = [threading.Thread(target=hold) for _ in range(32)]
for thread in threads:
    thread.start()
met.wait(20)
libc = ctypes.CDLL(None)
libc.fopen.restype = ctypes.c_void_p
told = libc.fopen(sys.argv[2].encode(), b"w")
libc.malloc_info(0, ctypes.c_void_p(told))
libc.fclose(ctypes.c_void_p(told))
met.wait(20)
print(len(re.findall("<heap nr", Path(sys.argv[2]).read_text())))
"""


def arenas(threshold: int, file: Path, **environment: str) -> int:
    """How many there are while 32 threads hold a block each."""
    given = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"} | environment
    command = [sys.executable, "-c", COUNT, str(threshold), str(file)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, env=given).stdout)


def test_threads_share_few_arenas_for_each_keeps_blocks_of_its_own(tmp_path: Path) -> None:
    assert arenas(1, tmp_path / "kept") == allocator.ARENAS
    assert arenas(0, tmp_path / "returned") > allocator.ARENAS
    assert arenas(1, tmp_path / "asked", MALLOC_ARENA_MAX="2") == 2
    assert arenas(1, tmp_path / "tuned", GLIBC_TUNABLES="glibc.malloc.arena_max=3") == 3
