"""How many workers a user asks for: a number, or a range of which the cluster's room decides."""

from __future__ import annotations

from denoise_batch.errors import FlagError

WorkerCount = int | tuple[int, int]
"""N, or (fewest, most)."""


def parse_workers(text: str | None) -> WorkerCount | None:
    """`4` → 4; `2:8` → (2, 8); None stays.

    Raises:
        FlagError: it is neither.
    """
    if text is None:
        return None
    low, colon, high = text.partition(":")
    try:
        count = (int(low), int(high)) if colon else int(low)
    except ValueError:
        raise _impossible(text) from None
    check_workers(count)
    return count


def check_workers(count: WorkerCount | None) -> None:
    """Raises FlagError where the count, or the range, is none that can be."""
    if count is None:
        return
    low, high = (1, count) if isinstance(count, int) else count
    if not 1 <= low <= high:
        raise _impossible(str(count) if isinstance(count, int) else f"{low}:{high}")


def _impossible(shown: str) -> FlagError:
    return FlagError(f"--workers {shown} is impossible", hint="give a number of at least 1, or a range such as 2:8")
