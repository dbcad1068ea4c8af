"""Whether a digit can still be read: a small classifier that was trained on MNIST's clean training images.

    reader = load_reader()
    labels = reader.read(images)        # (n, 28, 28) float32 → (n,) uint8

Its weights ship with the package, so that an evaluation says the same everywhere. They come from
`python benchmarks/readers.py --save-reader denoise_batch/pretrained/reader`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

READER_FILE = Path(__file__).parent.parent / "pretrained" / "reader" / "model.safetensors"


class DigitReader(nn.Sequential):
    """A convolutional classifier: (n, 1, 28, 28) float32 in 0..1 → (n, 10) logits; 106 thousand weights."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
            *(nn.Linear(32 * 49, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10)),
        )
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def __call__(self, images: Tensor) -> Tensor:
        made: Tensor = super().__call__(images)
        return made

    def read(self, images: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
        """(n, 28, 28) float32, 0 = background → (n,) uint8.

        One that was trained on clean digits reads noisy ones better when they are clipped to 0..1.
        """
        with torch.inference_mode():
            shown = torch.from_numpy(np.ascontiguousarray(images))[:, None]
            read: npt.NDArray[Any] = self(shown).argmax(dim=1).to(torch.uint8).numpy()
        return read


def load_reader() -> DigitReader:
    """The classifier that ships."""
    from safetensors.torch import load_file

    reader = DigitReader().eval()
    reader.load_state_dict(load_file(READER_FILE))
    return reader
