"""What the C library does with memory that a process has freed: kept while it computes, given back now and then.

A network's layers take and free megabytes for every batch. glibc hands such blocks back to the machine at once, which
then clears and maps each page anew: for a small network that costs as much time as its products. So a process that
computes keeps what it frees.

Each unit also reads and writes in threads of its own. Heaps fill with holes over many units, and a worker grows
although it holds no more than at its first. So now and then, between units, all of it goes back.
"""

from __future__ import annotations

import ctypes
from typing import Final

ONE_HEAP: Final = {"MALLOC_ARENA_MAX": "1"}
"""The environment of a process that computes in another thread than its first, as a worker does: from its start all
threads share the first one's heap. Other heaps consist of pieces of 64 MiB, and a piece that has become empty is given
back whatever glibc is told. Where a batch takes more than what is left of one piece, that is so at every batch."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # glibc's malloc.h
_KEPT_BYTES = 64 << 20
_LARGEST_KEPT_BLOCK = 16 << 20


def keep_freed_memory() -> None:
    """Has the C library keep what is freed, for the next that is taken, where it can (glibc).

    Threads that start later share the heaps that there are: those of threads alone are given back whatever glibc is
    told. It stays so until the process ends.
    """
    option = getattr(ctypes.CDLL(None), "mallopt", None)
    if option is not None:
        option(_M_ARENA_MAX, 1)
        option(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BLOCK)
        option(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def return_freed_memory() -> None:
    """Gives freed memory of Arrow's pool and of the C library back, where these can (glibc)."""
    import pyarrow as pa  # here, because the command line knows this module before it knows what it needs

    pa.default_memory_pool().release_unused()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
