"""What a sample of clean images, and of noisy ones beside them, says before anything is learnt from them or measured.

Which way round they are, which rows are unusable, and whether they are what they are taken for: images that show
something, and pairs of the same digit.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from denoise_batch.errors import ColumnError
from denoise_batch.images.polarity import (
    Polarity,
    dark_on_light,
    find_polarity,
    taken_the_other_way,
    turned,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from denoise_batch.images.buffers import Bools, Pixels

_FEWEST_PAIRS = 200
PAIRED = 4.0
"""Standard errors: of pairs in different orders one sample in 16,000 is as sure."""


def look_at_sample(
    images: Mapping[str, Pixels], bad: Mapping[str, Bools], polarity: Polarity
) -> tuple[Polarity, list[str]]:
    """Finds the polarity of sampled columns where it is AUTO, and says what is odd about them.

    Args:
        images: by column, (n, 784) uint8 or float32 of rows whose images are good: clean ones, and noisy ones beside
            them if there are such.
        bad: by column, (m,): which rows of the sample hold no usable image.
        polarity: as it was asked for.

    Returns:
        The polarity, and lines for the user.

    Raises:
        ColumnError: it is to be found and is not clear-cut, most noisy images look the other way round, or noisy images
            are no more like the clean ones beside them than like any others.
    """
    (clean, pixels), *others = images.items()
    rows, found = len(pixels), find_polarity(pixels) if polarity is Polarity.AUTO else polarity
    for noisy, beside in others if polarity is Polarity.AUTO and rows else ():
        seen = Polarity.DARK_ON_LIGHT if dark_on_light(beside).mean() > 0.5 else Polarity.LIGHT_ON_DARK
        if seen is not found:
            raise ColumnError(
                f"column {clean!r} is {found}, but column {noisy!r} is {seen}",
                hint="--polarity each looks at every image by itself, of a pair at both",
            )
    notes = []
    unusable = {name: int(np.count_nonzero(part)) for name, part in bad.items() if part.any()}
    if unusable:
        count = len(next(iter(bad.values()))) - rows
        several = len(unusable) > 1
        where = " or ".join(f"{name!r}" + (f" ({number:,})" if several else "") for name, number in unusable.items())
        notes.append(
            f"note: {count:,} of {count + rows:,} sampled rows hold no usable image in {where}: such are left out"
        )
    for name, part in images.items():
        light = int(dark_on_light(part).sum())
        notes += taken_the_other_way(found, light, rows, f"sampled rows of column {name!r}")
        blank = int(np.count_nonzero(np.ptp(part, axis=1) == 0))
        if 2 * blank > rows:
            notes.append(
                f"note: {blank:,} of {rows:,} sampled images of column {name!r} are of a single grey and show nothing"
            )
    for noisy, beside in others:
        if pairs_belong_together(beside, pixels) < PAIRED:
            raise unpaired(f"the images of column {noisy!r}", clean, rows)
    return found, notes


def pairs_belong_together(noisy: Pixels, clean: Pixels) -> float:
    """How sure it is that noisy images are of the digits beside them, in standard errors; below 4 it is not.

    Each noisy image's correlation with its own clean one is set against that with the mean of all, which is what two
    columns in different orders have in common. Each image is taken light on dark, as it has it by itself, and images
    of a single grey, which are like none, do not count. Of 256 pairs with noise of the seed's level 5, all of them
    ones, it is 6 or more, of all digits 14 or more (`tests/test_clean_columns.py`).

    Args:
        noisy: (n, 784) uint8 or float32.
        clean: likewise, those beside them.

    Returns:
        Infinite for fewer than 200 pairs, which may be too few, and where all clean ones are the same.
    """
    ours, theirs = _unit_length(noisy), _unit_length(clean)
    shown = ours.any(axis=1) & theirs.any(axis=1)
    if np.count_nonzero(shown) < _FEWEST_PAIRS:
        return math.inf
    ours, theirs = ours[shown], theirs[shown]
    theirs -= theirs.mean(axis=0)
    if float(np.square(theirs).sum()) < 1e-6 * len(theirs):
        return math.inf
    likeness = np.einsum("ij,ij->i", ours, theirs)
    error = float(likeness.std()) / math.sqrt(len(likeness))
    return float(likeness.mean()) / error if error > 0 else math.inf


def unpaired(what: str, column: str, rows: int) -> ColumnError:
    """The error of noisy images, named by `what`, that are not of the digits beside them in the clean column."""
    return ColumnError(
        f"{what} are no more like those of {column!r} beside them than like those of other rows ({rows:,} looked at)",
        hint="a pair is one row: is one of the columns in another order? Join them by a key first",
    )


def _unit_length(pixels: Pixels) -> NDArray[np.float32]:
    """(n, 784): each image, light on dark, less its mean, of length 1, or all zero."""
    pixels = turned(pixels, dark_on_light(pixels))
    images = pixels - pixels.mean(axis=1, keepdims=True, dtype=np.float32)
    length = np.sqrt(np.einsum("ij,ij->i", images, images))[:, np.newaxis]
    out: NDArray[np.float32] = np.divide(images, length, out=np.zeros_like(images), where=length > 0)
    return out
