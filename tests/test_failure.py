"""What ends a training for good reaches the driver, even from a disk that is full."""

from __future__ import annotations

import errno
import math
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from denoise_batch.bundle.history import EpochRow
from denoise_batch.errors import JobFailed, ResourceExhausted
from denoise_batch.storage import publishing
from denoise_batch.training.failure import (
    check_loss,
    final_failure,
    has_failed,
    leave_failure,
    left_failure,
    make_room,
)
from denoise_batch.training.place import Place
from denoise_batch.training.train import _failed, _not_started

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


PLACE = Place((2, 2), False, 0.875, 1, 2)
NO_MODULE = "in the worker\nModuleNotFoundError: No module named 'x'\n\nSee the log."


@pytest.mark.parametrize(
    ("shown", "message", "hint"),
    [
        (_not_started(RuntimeError("so:\nno room"), PLACE), "Ray cannot start 2 workers of .*: no room", "lower"),
        (_not_started(RuntimeError(NO_MODULE), PLACE), "cannot import .*: ModuleNotFoundError.* 'x'$", "same versions"),
        (_not_started(RuntimeError(), PLACE), "Ray cannot start 2 workers of .*: RuntimeError", "lower"),
        (_not_started(RuntimeError("so:\nno NCCL built in"), PLACE), "PyTorch cannot use it: no NCCL", "--device cpu"),
        (_failed(RuntimeError("so:\nit died")), "workers failed 6 times: it died", "same command again"),
        (_failed(RuntimeError(NO_MODULE)), "cannot import .*: ModuleNotFoundError.* 'x'$", "same versions"),
    ],
)
def test_workers_that_cannot_start_or_go_on_say_why(shown: JobFailed, message: str, hint: str) -> None:
    assert re.search(message, shown.message)
    assert hint in shown.hint


@pytest.mark.parametrize(("loss", "val_loss"), [(math.nan, 0.1), (0.1, math.inf), (1.4e11, 4.1e10), (0.5, 101.0)])
def test_a_training_whose_loss_is_absurd_has_diverged(loss: float, val_loss: float) -> None:
    row = EpochRow(7, 60, 0.7, 0.6, 10.0, 11.0, 1e-3, 1000.0, 2.0, None, 12.0)
    check_loss(row)
    with pytest.raises(JobFailed, match="diverged in epoch 7") as failed:
        check_loss(replace(row, loss=loss, val_loss=val_loss))
    assert failed.value.hint.startswith("lower --lr and give --overwrite")  # another --lr alone would be refused
    with pytest.raises(JobFailed, match="diverged in epoch 1:") as failed:
        check_loss(replace(row, epoch=1, loss=loss, val_loss=val_loss))
    assert failed.value.hint == "lower --lr"


def test_what_would_only_come_again_is_final(tmp_path: Path) -> None:
    final = JobFailed("no", hint="")
    assert final_failure(final, tmp_path) is final
    assert isinstance(final_failure(OSError(errno.ENOSPC, "No space left on device"), tmp_path), ResourceExhausted)
    full = final_failure(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), tmp_path)
    assert isinstance(full, ResourceExhausted)
    assert "--batch" in full.hint
    for other in (RuntimeError("a worker is gone"), OSError(errno.EIO, "Input/output error"), ValueError("x")):
        assert final_failure(other, tmp_path) is None
