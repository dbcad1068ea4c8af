"""Freed memory leaves the process, and nothing happens where the C library cannot do that."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from denoise_batch.process.freed_memory import keep_freed_memory, return_freed_memory


def _resident_mb() -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no VmRSS")


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc"
)
def test_what_was_freed_between_two_living_blocks_goes_back() -> None:
    return_freed_memory()  # what earlier tests freed would be filled first, and hide the growth
    before = _resident_mb()
    blocks = [bytearray(16_384) for _ in range(12_800)]  # 200 MB, too small each for a mapping of its own
    held = blocks[::1000]  # what keeps the heap from shrinking by itself
    assert _resident_mb() - before > 150
    del blocks
    return_freed_memory()
    assert _resident_mb() - before < 50
    assert len(held) == 13


def test_a_c_library_without_it_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    keep_freed_memory()
    return_freed_memory()


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc"
)
def test_a_block_that_is_freed_and_taken_again_costs_no_new_pages() -> None:
    """In a process of its own: what is told to the C library stays so until the end."""
    code = """
import ctypes, resource, sys
from denoise_batch.process.freed_memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]
def take():
    block = library.malloc(12 << 20)
    ctypes.memset(block, 1, 12 << 20)
    return block
library.free(take())
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    pair = take(), take()
    for block in pair:
        library.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = {}
    for name in ("kept", "as it comes"):
        made = subprocess.run(
            [sys.executable, "-c", code, name], capture_output=True, text=True, check=True, timeout=60
        )
        faults[name] = int(made.stdout)
    pages = 12 * 256
    assert faults["kept"] < 3 * pages
    assert faults["as it comes"] > 10 * pages
