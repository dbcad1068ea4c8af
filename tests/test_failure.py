"""What ends a training for good reaches the driver, even from a disk that is full."""

from __future__ import annotations

import errno
import re
from typing import TYPE_CHECKING, Any

import pytest

from denoise_batch import publishing
from denoise_batch.errors import JobFailed, ResourceExhausted
from denoise_batch.training.failure import has_failed, leave_failure, left_failure, make_room
from denoise_batch.training.place import Place
from denoise_batch.training.train import _not_started

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("full", [False, True])
def test_an_error_is_left_and_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: bool) -> None:
    make_room(tmp_path)
    assert (has_failed(tmp_path), left_failure(tmp_path)) == (False, None)

    def fails(path: Path, *_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        if full:
            patch.setattr(publishing, "write_file", fails)
        leave_failure(tmp_path, ResourceExhausted("the disk is full", hint="make room"))
    assert has_failed(tmp_path)
    found = left_failure(tmp_path)
    assert isinstance(found, ResourceExhausted)
    assert (found.message, found.hint) == ("the disk is full", "make room")
    leave_failure(tmp_path, JobFailed("again", hint=""))
    make_room(tmp_path)
    assert left_failure(tmp_path) is None


@pytest.mark.parametrize(
    ("said", "message", "hint"),
    [
        (
            "Training failed:\nValueError: no room",
            "Ray cannot start 2 workers of .*: ValueError: no room",
            "lower --workers",
        ),
        (
            "in the worker\nModuleNotFoundError: No module named 'x'",
            "cannot import .*: ModuleNotFoundError.*'x'",
            "same versions",
        ),
        ("", "Ray cannot start 2 workers of .*: RuntimeError", "lower --workers"),
    ],
)
def test_workers_that_cannot_start_say_why(said: str, message: str, hint: str) -> None:
    error = _not_started(RuntimeError(said), Place((2, 2), False, 0.875, 1, 2))
    assert re.search(message, error.message)
    assert hint in error.hint
