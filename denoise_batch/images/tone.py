"""How grey a set's paper and ink are, and how its images are brought to the white and black that the models know.

tone = find_tone(pixels, polarity)                 # of a sample of the set
even, ink = tone.even(pixels, polarity)            # what a model takes, and how dark the ink was
shown = with_ink(made, polarity, ink)              # on white paper, and as pale as it was
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from denoise_batch.images.background import background_lines, find_background, without_background
from denoise_batch.images.ink import Ink, find_ink, ink_lines, with_ink
from denoise_batch.images.polarity import Polarity, upright

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from denoise_batch.images.buffers import Pixels

_LOOKED_AT = 4096


@dataclass(frozen=True)
class Tone:
    """What is not white and black about a set.

    Attributes:
        background: as `find_background` gives it.
        ink: as `find_ink` does.
    """

    background: float | None = None
    ink: Ink | None = None

    def even(self, pixels: Pixels, polarity: Polarity) -> tuple[Pixels, NDArray[np.float32] | None]:
        """Pixels on white paper, in full ink, and the level that each image's ink had; None where all are full.

        Args:
            pixels: (n, 784) uint8 or float32.
            polarity: LIGHT_ON_DARK or DARK_ON_LIGHT.
        """
        pixels = without_background(pixels, polarity, self.background)
        if self.ink is None:
            return pixels, None
        ink = self.ink.of(pixels, polarity)
        return with_ink(pixels, polarity, np.float32(1) / ink), ink

    def lines(self) -> list[str]:
        """What is said of it: a line for each thing that was found."""
        return background_lines(self.background) + ink_lines(self.ink)

    def facts(self) -> dict[str, float]:
        """For reports and manifests: `background` and `ink`, of full ink, where they were found."""
        found = {"background": self.background, "ink": None if self.ink is None else round(self.ink.level, 4)}
        return {name: value for name, value in found.items() if value is not None}

    def to_json(self) -> dict[str, Any]:
        return {"background": self.background, "ink": None if self.ink is None else self.ink.shares}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Tone:
        ink = fields.get("ink")
        return cls(fields.get("background"), None if ink is None else Ink(tuple(ink)))


WHITE_AND_BLACK: Final = Tone()


def find_tone(pixels: Pixels, polarity: Polarity) -> Tone:
    """How grey a set's paper and ink are.

    Args:
        pixels: (n, 784) uint8 or float, of good rows.
        polarity: of the pixels; never AUTO.
    """
    pixels = upright(pixels[:: max(1, -(-len(pixels) // _LOOKED_AT))], polarity)
    background = find_background(pixels, Polarity.LIGHT_ON_DARK)
    even = without_background(pixels, Polarity.LIGHT_ON_DARK, background)
    return Tone(background, find_ink(even, Polarity.LIGHT_ON_DARK))
