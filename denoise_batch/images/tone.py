"""How grey a set's paper and ink are, how many greys it has, and how its images are brought to the white and black
that the models know.

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

FEW_LEVELS: Final = 16
"""The most levels of grey that are few: scans of up to four bits. What lies between two of them is lost."""
_LEAST_IMAGES = 8  # with anything on them, or it is a drawing
_NEARLY_ALL = 0.999  # of the pixels have one of the levels
_FULL = 0.9  # of few levels, ink is the largest, which is not to be read off single images


@dataclass(frozen=True)
class Tone:
    """What is not white and black about a set.

    Attributes:
        background: as `find_background` gives it.
        ink: as `find_ink` does.
        levels: as `find_few_levels` does.
    """

    background: float | None = None
    ink: Ink | None = None
    levels: int | None = None

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
        """What is said of paper and ink: a line for each thing that was found."""
        return background_lines(self.background) + ink_lines(self.ink)

    def facts(self) -> dict[str, float]:
        """For reports and manifests: `background` and `ink`, of full ink, and `levels`, where they were found."""
        ink = None if self.ink is None else round(self.ink.level, 4)
        found = {"background": self.background, "ink": ink, "levels": self.levels}
        return {name: value for name, value in found.items() if value is not None}

    def to_json(self) -> dict[str, Any]:
        ink = None if self.ink is None else self.ink.shares
        return {"background": self.background, "ink": ink, "levels": self.levels}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Tone:
        ink = fields.get("ink")
        return cls(fields.get("background"), None if ink is None else Ink(tuple(ink)), fields.get("levels"))


WHITE_AND_BLACK: Final = Tone()


def find_tone(pixels: Pixels, polarity: Polarity) -> Tone:
    """How grey a set's paper and ink are, and how many greys it has.

    Args:
        pixels: (n, 784) uint8 or float, of good rows.
        polarity: of the pixels; never AUTO.
    """
    pixels = upright(pixels[:: max(1, -(-len(pixels) // _LOOKED_AT))], polarity)
    background = find_background(pixels, Polarity.LIGHT_ON_DARK)
    even = without_background(pixels, Polarity.LIGHT_ON_DARK, background)
    levels = find_few_levels(pixels)
    known = levels is not None and even.max() >= _FULL * (255 if even.dtype == np.uint8 else 1)
    return Tone(background, None if known else find_ink(even, Polarity.LIGHT_ON_DARK), levels)


def find_few_levels(pixels: Pixels) -> int | None:
    """How many levels of grey the images of a set have in all, where these are few; None where they are many.

    Scans of one bit have two, and their strokes end in steps. What a model of scans of all greys makes of these is what
    it makes of clean digits: nothing.

    Args:
        pixels: (n, 784) uint8 or float, of good rows.
    """
    if pixels.dtype != np.uint8:
        scaled = 255 * pixels.astype(np.float32)
        away = max(np.abs(scaled - scaled.round()).max(initial=0.0), np.abs(scaled - 127.5).max(initial=0.0) - 127.5)
        if not away < 0.02:  # no 8 bits, or no number
            return None
        pixels = scaled.round().astype(np.uint8)
    drawn = pixels[pixels.min(axis=1) != pixels.max(axis=1)]
    if len(drawn) < _LEAST_IMAGES:
        return None
    counts = np.sort(np.bincount(drawn.ravel(), minlength=256))[::-1]
    levels = int(np.searchsorted(counts.cumsum(), _NEARLY_ALL * drawn.size)) + 1
    return levels if levels <= FEW_LEVELS else None


def levels_lines(levels: int | None) -> list[str]:
    """What is said of scans of few levels of grey: a line, none where there are many."""
    if levels is None:
        return []
    what = f"the images have {levels} level{'s' if levels != 1 else ''} of grey, and what lay between is lost"
    return [f"note: {what}: the model `few-levels` is for such, and the default then"]
