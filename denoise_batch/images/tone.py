"""How grey a set's paper and ink are, how many greys it has, and how its images are brought to the white and black
that the models know.

tone = find_tone(pixels, polarity)                 # of a sample of the set
even, ink = tone.even(pixels, polarity)            # what a model takes, and how dark the ink was
shown = with_ink(made, polarity, ink)              # on white paper, and as pale as it was
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from denoise_batch.images.background import background_lines, find_background, without_background
from denoise_batch.images.few_levels import FewLevels, find_few_levels
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
        levels: as `find_few_levels` does; both others are None then, since it has them.
    """

    background: float | None = None
    ink: Ink | None = None
    levels: FewLevels | None = None

    def even(self, pixels: Pixels, polarity: Polarity) -> tuple[Pixels, NDArray[np.float32] | None]:
        """Pixels on white paper, in full ink, and the level that each image's ink had; None where all are full.

        Args:
            pixels: (n, 784) uint8 or float32.
            polarity: LIGHT_ON_DARK or DARK_ON_LIGHT.
        """
        if self.levels is not None:
            return self.levels.even(pixels, polarity)
        pixels = without_background(pixels, polarity, self.background)
        if self.ink is None:
            return pixels, None
        ink = self.ink.of(pixels, polarity)
        return with_ink(pixels, polarity, np.float32(1) / ink), ink

    @property
    def level_count(self) -> int | None:
        """How many levels of grey, where these are few."""
        return None if self.levels is None else self.levels.count

    def lines(self) -> list[str]:
        """What is said of paper and ink: a line for each thing that was found."""
        if self.levels is not None:
            return self.levels.lines()
        return background_lines(self.background) + ink_lines(self.ink)

    def facts(self) -> dict[str, float]:
        """For reports and manifests: `background` and `ink`, of full ink, and `levels`, where they were found."""
        if self.levels is not None:
            return self.levels.facts()
        found = {"background": self.background, "ink": None if self.ink is None else round(self.ink.level, 4)}
        return {name: value for name, value in found.items() if value is not None}

    def to_json(self) -> dict[str, Any]:
        ink = None if self.ink is None else self.ink.shares
        return {
            "background": self.background,
            "ink": ink,
            "levels": None if self.levels is None else dataclasses.astuple(self.levels),
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Tone:
        ink = fields.get("ink")
        levels = fields.get("levels")
        return cls(
            fields.get("background"),
            None if ink is None else Ink(tuple(ink)),
            None if levels is None else FewLevels(*levels),
        )


WHITE_AND_BLACK: Final = Tone()


def find_tone(pixels: Pixels, polarity: Polarity) -> Tone:
    """How grey a set's paper and ink are, and how many greys it has.

    Args:
        pixels: (n, 784) uint8 or float, of good rows.
        polarity: of the pixels; never AUTO.
    """
    pixels = upright(pixels[:: max(1, -(-len(pixels) // _LOOKED_AT))], polarity)
    levels = find_few_levels(pixels)
    if levels is not None:
        return Tone(levels=levels)
    background = find_background(pixels, Polarity.LIGHT_ON_DARK)
    even = without_background(pixels, Polarity.LIGHT_ON_DARK, background)
    return Tone(background, find_ink(even, Polarity.LIGHT_ON_DARK))
