"""The C library's allocator: how much freed memory it keeps."""

import ctypes
import logging
import os

logger = logging.getLogger(__name__)

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h of glibc
ARENAS = 4  # that threads share; glibc makes eight for each core


def keep_blocks(threshold_bytes: int) -> bool:
    """Keep blocks of up to `threshold_bytes` for reuse when they are freed. False where that cannot be set.

    By default glibc maps every block over 128 KiB from the system and unmaps it when it is freed, or shrinks the heap
    by it: a request of 602 KB then costs hundreds of page faults.

    An arena keeps up to twice as much at its end, for good, so there are ARENAS at most; the variables MALLOC_ARENA_MAX
    and GLIBC_TUNABLES may say another number. To be called before threads are started.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        logger.info("the C library has no mallopt: freed memory is kept or returned as it sees fit")
        return False
    options = {M_MMAP_THRESHOLD: threshold_bytes, M_TRIM_THRESHOLD: 2 * threshold_bytes}
    if "MALLOC_ARENA_MAX" not in os.environ and "malloc.arena_max" not in os.environ.get("GLIBC_TUNABLES", ""):
        options[M_ARENA_MAX] = ARENAS
    return all(mallopt(key, value) for key, value in options.items())
