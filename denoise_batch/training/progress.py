"""How far a training is, as the workers tell the driver and the driver its caller."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class TrainProgress:
    """Where a training stands.

    Attributes:
        epoch: the running epoch, 1 for the first.
        epochs: of the whole training; None where the clock decides, and tells nothing yet.
        images: trained on since the start.
        total_images: of the whole training, or None as well.
        loss: mean over the running epoch so far, or None before its first step.
        psnr: the last validation PSNR on noisy images, in dB, or None before the first.
        images_per_second: of the running attempt, or 0 before its first step.
        seconds_left: estimate, or None where there is none yet.
        workers: training processes.
        device: `cpu` or the GPU's name.
        epoch_seconds: estimate for a whole epoch, or None before the speed is known.
        trained: whether all epochs are over: what 8-bit integers stand for is chosen then.
    """

    epoch: int
    epochs: int | None
    images: int
    total_images: int | None
    loss: float | None
    psnr: float | None
    images_per_second: float
    seconds_left: float | None
    workers: int
    device: str
    epoch_seconds: float | None = None
    trained: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
