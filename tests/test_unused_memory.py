"""Freed memory leaves the process, and nothing happens where the C library cannot do that."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest

from denoise_batch.inference.unused_memory import return_unused_memory


def _resident_mb() -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no VmRSS")


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc"
)
def test_what_was_freed_between_two_living_blocks_goes_back() -> None:
    return_unused_memory()  # what earlier tests freed would be filled first, and hide the growth
    before = _resident_mb()
    blocks = [bytearray(16_384) for _ in range(12_800)]  # 200 MB, too small each for a mapping of its own
    held = blocks[::1000]  # what keeps the heap from shrinking by itself
    assert _resident_mb() - before > 150
    del blocks
    return_unused_memory()
    assert _resident_mb() - before < 50
    assert len(held) == 13


def test_a_c_library_without_it_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    return_unused_memory()
