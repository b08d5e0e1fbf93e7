"""Memory that the C library keeps for the next step instead of giving it back. loop.py asks for it on the CPU."""

from __future__ import annotations

import ctypes

# Of mallopt (malloc.h): from which size on a block is a mapping of its own, which the kernel gets back with the block,
# and how much may be free at the end of the heap before the kernel gets it back.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
LARGEST = 32 << 20  # glibc takes no larger threshold for mappings


def keep_memory() -> bool:
    """Has glibc's malloc keep what this process frees, up to 2 GB; False where the C library has no such settings.

    A step frees and asks again for the same activations. By default much of that goes back to the kernel each time,
    which then hands out empty pages, one fault for every 4 kB: 10 to 30 % of a step of the MNIST CNN. What a process
    needs at most stays about the same, but is not given back before the process ends.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc; Windows cannot even be asked
        return False
    return bool(mallopt(MMAP_THRESHOLD, LARGEST)) and bool(mallopt(TRIM_THRESHOLD, 2**31 - 1))
