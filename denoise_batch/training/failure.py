"""What ends a training for good, told by a worker to the driver in a file.

Ray Train starts workers again whatever an exception says, which helps against dead machines alone. So an error that
would only come again is left here; it ends the next start at once, and the driver raises it.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from denoise_batch import errors
from denoise_batch.storage import publishing

if TYPE_CHECKING:
    from pathlib import Path

    from denoise_batch.bundle.history import EpochRow

ABSURD_LOSS = 100.0
"""Nats a pixel; a network that says 0.5 of every pixel has 0.7."""
_FILE = "failure.json"
_ROOM_FILE, _ROOM = "failure.room", 4096  # a block, which a disk has that is full by then


def make_room(folder: Path) -> None:
    """Forgets the last run's failure, and sees to it that one can be left even once the disk is full."""
    (folder / _FILE).unlink(missing_ok=True)
    publishing.write_file(folder / _ROOM_FILE, bytes(_ROOM))


def final_failure(error: Exception, folder: Path) -> errors.DenoiseBatchError | None:
    """An error of a worker as one that would only come again; None where it need not.

    Args:
        folder: the training's, whose disk may be the one that is full.
    """
    from denoise_batch.denoiser import gpu_is_full

    if isinstance(error, errors.DenoiseBatchError):
        return error
    if isinstance(error, OSError):
        return errors.ran_out(error, folder)
    if isinstance(error, RuntimeError) and gpu_is_full(error):
        return errors.ResourceExhausted(
            f"the GPU is too full to train in: {errors.first_line(error)}",
            hint="stop what else uses the GPU, or give a smaller --batch, then run the same command again",
        )
    return None


def leave_failure(folder: Path, error: errors.DenoiseBatchError) -> None:
    """Leaves an error for the driver."""
    fields = {"kind": type(error).__name__, "message": error.message, "hint": error.hint}
    content = json.dumps(fields).encode()
    try:
        publishing.write_file(folder / _FILE, content)
    except OSError:
        with (folder / _ROOM_FILE).open("r+b") as file:
            file.write(content)
            file.truncate()
            os.fsync(file.fileno())
        (folder / _ROOM_FILE).replace(folder / _FILE)


def has_failed(folder: Path) -> bool:
    """Whether an error was left."""
    return (folder / _FILE).exists()


def left_failure(folder: Path) -> errors.DenoiseBatchError | None:
    """The error that was left."""
    try:
        fields = json.loads((folder / _FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    kind: type[errors.DenoiseBatchError] = getattr(errors, fields["kind"], errors.JobFailed)
    return kind(fields["message"], hint=fields["hint"])


def check_loss(row: EpochRow) -> None:
    """Refuses an epoch after which nothing sensible can come any more.

    Raises:
        JobFailed: a loss is not finite, or absurd.
    """
    if not all(loss < ABSURD_LOSS for loss in (row.loss, row.val_loss)):
        raise errors.JobFailed(
            f"the training diverged in epoch {row.epoch}: its loss is {row.loss:.3g}, on validation images "
            f"{row.val_loss:.3g}",
            hint="lower --lr" if row.epoch == 1 else "lower --lr and give --overwrite: the epochs before are then lost",
        )
