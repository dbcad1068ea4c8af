"""Scans of few levels of grey, as faxes are: what a sample says of a set, and how they are brought to white and black.

few = find_few_levels(pixels)              # None where there are many levels
even, ink = few.even(pixels, polarity)     # as `Tone.even`
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from denoise_batch.images.background import background_lines
from denoise_batch.images.polarity import Polarity

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from denoise_batch.images.buffers import Pixels

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

    def even(self, pixels: Pixels, polarity: Polarity) -> tuple[Pixels, NDArray[np.float32] | None]:
        """As `Tone.even`: the least ink becomes none, the most full, exactly; by these the model knows such scans."""
        if (self.paper, self.ink) == (0.0, 1.0):
            return pixels, None
        return self._stretched(pixels, polarity), np.full(len(pixels), self._darkness, np.float32)

    def lines(self) -> list[str]:
        """What is said of paper and ink: a line for each that is not white or black."""
        paper = background_lines(self.facts().get("background"))
        if self._darkness == 1.0:
            return paper
        return [*paper, f"note: the ink is pale, {self._darkness:.0%} of full ink: it comes back as pale as it was"]

    def facts(self) -> dict[str, float]:
        """As `Tone.facts`."""
        paper, darkness = round(self.paper, 4), round(self._darkness, 4)
        return {
            **({"background": paper} if paper > 0.0 else {}),
            **({"ink": darkness} if darkness < 1.0 else {}),
            "levels": self.count,
        }

    def _stretched(self, pixels: Pixels, polarity: Polarity) -> Pixels:
        dark = polarity is Polarity.DARK_ON_LIGHT
        paper, span = np.float32(self.paper), np.float32(self.ink) - np.float32(self.paper)
        if pixels.dtype == np.uint8:
            table = np.rint(255 * ((np.arange(256, dtype=np.float32) / 255 - paper) / span).clip(0, 1)).astype(np.uint8)
            bytes_: NDArray[np.uint8] = ~table[~pixels] if dark else table[pixels]
            return bytes_
        even: NDArray[np.float32] = (((1 - pixels if dark else pixels) - paper) / span).clip(0, 1).astype(np.float32)
        return 1 - even if dark else even

    @property
    def _darkness(self) -> float:
        """How dark the ink is on white paper, of full ink."""
        return (self.ink - self.paper) / (1.0 - self.paper)


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
