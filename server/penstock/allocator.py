"""The C library's allocator: how much freed memory it keeps."""

import ctypes
import logging

logger = logging.getLogger(__name__)

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc


def keep_blocks(threshold_bytes: int) -> bool:
    """Keep blocks of up to `threshold_bytes` for reuse when they are freed. False where that cannot be set.

    By default glibc maps every block over 128 KiB from the system and unmaps it when it is freed, or shrinks the heap
    by it: a request of 602 KB then costs hundreds of page faults.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        logger.info("the C library has no mallopt: freed memory is kept or returned as it sees fit")
        return False
    return all(mallopt(key, size) for key, size in (
        (M_MMAP_THRESHOLD, threshold_bytes), (M_TRIM_THRESHOLD, 2 * threshold_bytes),
    ))  # fmt: skip
