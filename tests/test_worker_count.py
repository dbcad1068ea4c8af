"""`--workers N` and `--workers A:B`."""

from __future__ import annotations

import pytest

from denoise_batch.cluster.worker_count import WorkerCount, check_workers, parse_workers
from denoise_batch.errors import FlagError


@pytest.mark.parametrize(("text", "count"), [(None, None), ("4", 4), ("2:8", (2, 8)), ("3:3", (3, 3))])
def test_what_can_be_asked_for(text: str | None, count: WorkerCount | None) -> None:
    assert parse_workers(text) == count


@pytest.mark.parametrize("text", ["0", "-1", "many", "", "2:", ":8", "8:2", "0:4", "1:2:3", "1.5"])
def test_what_cannot(text: str) -> None:
    with pytest.raises(FlagError) as caught:
        parse_workers(text)
    assert caught.value.message == f"--workers {text} is impossible"


def test_a_range_from_python_is_checked_too() -> None:
    with pytest.raises(FlagError, match=r"^--workers 3:2 is impossible$"):
        check_workers((3, 2))
