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
from denoise_batch.images.ink import Ink, find_ink, ink_lines, with_ink
from denoise_batch.images.polarity import Polarity, upright

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from denoise_batch.images.buffers import Pixels

_LOOKED_AT = 4096

MOST_LEVELS: Final = 16
"""The most levels of grey that are few: scans of up to four bits. What lies between two of them is lost."""
_LEAST_IMAGES = 8  # with anything on them, or it is a drawing
_NEARLY_ALL = 0.999  # of the pixels have one of the levels
_TRIED = 64  # images; so many of all greys have thousands of different floats
_APART = 1e-4  # floats that are nearer count as one


@dataclass(frozen=True)
class FewLevels:
    """The levels of grey of a set that has few.

    Attributes:
        count: how many.
        paper, ink: the least and the most ink, light on dark; 0 and 1 but for grey paper and pale ink.
    """

    count: int
    paper: float = 0.0
    ink: float = 1.0

    def even(self, pixels: Pixels, polarity: Polarity) -> Pixels:
        """Pixels whose least ink is none, and whose most is full, exactly: by these the model knows such scans."""
        dark = polarity is Polarity.DARK_ON_LIGHT
        paper, span = np.float32(self.paper), np.float32(self.ink) - np.float32(self.paper)
        if pixels.dtype == np.uint8:
            table = np.rint(255 * ((np.arange(256, dtype=np.float32) / 255 - paper) / span).clip(0, 1)).astype(np.uint8)
            bytes_: NDArray[np.uint8] = ~table[~pixels] if dark else table[pixels]
            return bytes_
        even: NDArray[np.float32] = (((1 - pixels if dark else pixels) - paper) / span).clip(0, 1).astype(np.float32)
        return 1 - even if dark else even

    @property
    def is_white_and_black(self) -> bool:
        return (self.paper, self.ink) == (0.0, 1.0)

    @property
    def darkness(self) -> float:
        """How dark the ink is on white paper, of full ink."""
        return (self.ink - self.paper) / (1.0 - self.paper)


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
            if self.levels.is_white_and_black:
                return pixels, None
            return self.levels.even(pixels, polarity), np.full(len(pixels), self.levels.darkness, np.float32)
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
            pale = [f"note: the ink is pale, {self.levels.darkness:.0%} of full ink: it comes back as pale as it was"]
            paper = background_lines(round(self.levels.paper, 4) or None)
            return paper + (pale if self.levels.darkness < 1.0 else [])
        return background_lines(self.background) + ink_lines(self.ink)

    def facts(self) -> dict[str, float]:
        """For reports and manifests: `background` and `ink`, of full ink, and `levels`, where they were found."""
        ink = None if self.ink is None else round(self.ink.level, 4)
        found: dict[str, float | None] = {"background": self.background, "ink": ink}
        if self.levels is not None:
            darkness = round(self.levels.darkness, 4)
            paper, pale = round(self.levels.paper, 4) or None, darkness if darkness < 1.0 else None
            found = {"background": paper, "ink": pale, "levels": self.levels.count}
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


def find_few_levels(pixels: Pixels) -> FewLevels | None:
    """The levels of grey that the images of a set have in all, where these are few; None where they are many.

    Scans of one bit have two, and their strokes end in steps. What a model of scans of all greys makes of these is what
    it makes of clean digits: nothing.

    Args:
        pixels: (n, 784) uint8 or float, light on dark, of good rows.
    """
    drawn = pixels[pixels.min(axis=1) != pixels.max(axis=1)]
    if len(drawn) < _LEAST_IMAGES:
        return None
    values, counts = _different(drawn[:_TRIED])
    if len(drawn) > _TRIED and len(values) <= 256:
        values, counts = _different(drawn)
    order = counts.argsort()[::-1]
    count = int(np.searchsorted(counts[order].cumsum(), _NEARLY_ALL * drawn.size)) + 1
    if count > MOST_LEVELS or not np.isfinite(values).all():
        return None
    among = np.sort(values[order[:count]])
    if pixels.dtype == np.uint8:
        return FewLevels(count, float(among[0]) / 255, float(among[-1]) / 255)
    # Floats that count as one may differ: the whole of the lowest level is to be none, and that of the highest full.
    paper = float(drawn[drawn < among[0] + _APART].max())
    ink = float(drawn[drawn > among[-1] - _APART].min())
    return FewLevels(count, paper, ink) if 0.0 <= paper < ink <= 1.0 else None


def _different(pixels: Pixels) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The values that pixels have, as numbers of theirs, and how many have each."""
    if pixels.dtype == np.uint8:
        counts = np.bincount(pixels.ravel(), minlength=256)
        values = counts.nonzero()[0]
        return values, counts[values]
    values, counts = np.unique(np.rint(pixels.astype(np.float32) / _APART), return_counts=True)
    return values * _APART, counts


def levels_lines(levels: int | None) -> list[str]:
    """What is said of scans of few levels of grey: a line, none where there are many."""
    if levels is None:
        return []
    what = f"the images have {levels} level{'s' if levels != 1 else ''} of grey, and what lay between is lost"
    return [f"note: {what}: the model `few-levels` is for such, and the default then"]
