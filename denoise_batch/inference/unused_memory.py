"""Memory that a worker has freed goes back to the machine between units.

Each unit reads, computes and writes in threads of its own, and the C library keeps what each of them freed in a heap of
its own. Over many units these heaps fill with holes, and a worker grows although it holds no more than at its first.
"""

from __future__ import annotations

import ctypes

import pyarrow as pa


def return_unused_memory() -> None:
    """Gives freed memory of Arrow's pool and of the C library back, where these can (glibc)."""
    pa.default_memory_pool().release_unused()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
