"""Which end of the grey scale is ink: of a whole set, or of each image by itself; images turned light on dark and back.

The models take light ink on dark. A set of scans is mostly one or the other, and what is found of a sample holds for
all of it (`find_polarity`). Where both occur, as on the wheels of a meter, an image's own margin tells
(`dark_on_light`).
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

from denoise_batch.errors import ColumnError
from denoise_batch.images.buffers import as_float, as_numbers
from denoise_batch.images.layouts import PIXELS, SIDE

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from denoise_batch.images.buffers import Bools, Pixels

_MARGIN = 6
"""Pixels on all sides that digits hardly fill: 528 of 784, so that their majority stands through heavy noise."""


class Polarity(StrEnum):
    """Which end of the grey scale is ink."""

    AUTO = "auto"
    """As a sample of the set has it."""
    LIGHT_ON_DARK = "light-on-dark"
    DARK_ON_LIGHT = "dark-on-light"
    EACH = "each"
    """As each image has it by itself."""


def find_polarity(pixels: Pixels) -> Polarity:
    """Tell light digits on dark from dark digits on light by the outermost ring of pixels, which centred digits leave.

    The median of an image's ring is its background's level, through noise as well. Nine images in ten must agree, their
    common level must be near 0 or 1, and the inner pixels must not say the opposite. No images at all: LIGHT_ON_DARK.

    Args:
        pixels: (n, 784) uint8 or float, of good rows.

    Raises:
        ColumnError: both occur, or it is not clear-cut.
    """
    if not len(pixels):
        return Polarity.LIGHT_ON_DARK
    images = to_model_input(pixels, Polarity.LIGHT_ON_DARK).reshape(-1, SIDE, SIDE)
    ring = np.ones((SIDE, SIDE), dtype=np.bool_)
    ring[1:-1, 1:-1] = False
    levels = np.median(images[:, ring], axis=1)
    level, light = float(np.median(levels)), float(np.mean(levels > 0.5))
    contrast = float(images[:, 8:-8, 8:-8].mean(dtype=np.float64) - images[:, ring].mean(dtype=np.float64))
    if light <= 0.1 and abs(level) < 0.4 and contrast > -0.05:
        return Polarity.LIGHT_ON_DARK
    if light >= 0.9 and abs(level - 1) < 0.4 and contrast < 0.05:
        return Polarity.DARK_ON_LIGHT
    if min(light, 1 - light) > 0.1 and float(np.mean(np.abs(levels - 0.5) > 0.1)) >= 0.9:
        raise ColumnError(
            f"polarity is mixed: {dark_on_light(pixels).mean():.0%} of the images looked at are dark-on-light, the "
            "others light-on-dark",
            hint="--polarity each looks at every image by itself; light-on-dark or dark-on-light takes all for that",
        )
    raise ColumnError(
        f"polarity is not clear-cut: borders are at {level:.2f} (0 black, 1 white), {light:.0%} of them light",
        hint="say it with --polarity light-on-dark or dark-on-light; where both occur, with --polarity each",
    )


def dark_on_light(pixels: Pixels) -> Bools:
    """Of which images most of the margin is light.

    Noise that has no side leaves a majority as it was, however heavy: of 80,000 drawn digits with the heaviest noise of
    each kind none is taken for the other (`tests/test_polarity.py`).

    Args:
        pixels: (n, 784) uint8 0..255 or float32 0..1.

    Returns:
        (n,).
    """
    # Eight pixels at a time: the highest bit of a byte says whether a uint8 is light, the lowest of a bool.
    whole = pixels.dtype == np.uint8
    bits, mask = (pixels, _LIGHT_BYTES) if whole else (pixels > 0.5, _LIGHT_BOOLS)
    light = np.bitwise_count(np.ascontiguousarray(bits).view(np.uint64) & mask).sum(axis=1, dtype=np.uint16)
    found: Bools = 2 * light > _MARGIN_PIXELS
    return found


def turned(pixels: Pixels, rows: Bools) -> Pixels:
    """Pixels of which some rows have light and dark exchanged; `pixels` itself where none have.

    Args:
        pixels: (n, 784) uint8 0..255 or float32 0..1.
        rows: (n,), which.
    """
    if not rows.any():
        return pixels
    out = pixels.copy()
    out[rows] = (255 if pixels.dtype == np.uint8 else np.float32(1)) - pixels[rows]
    return out


def upright(pixels: Pixels, polarity: Polarity) -> Pixels:
    """Pixels of any polarity but AUTO as light on dark, of the type they have; themselves where nothing is to do."""
    if polarity is Polarity.EACH:
        return turned(pixels, dark_on_light(pixels))
    return turned(pixels, np.full(len(pixels), polarity is Polarity.DARK_ON_LIGHT))


def taken_the_other_way(polarity: str, light: int, rows: int, what: str = "rows") -> list[str]:
    """The note of images that look the other way round than they are taken; none where there are none.

    Args:
        polarity: what all are taken for, or `each`.
        light: how many are `dark_on_light`.
        rows: of so many.
        what: these are.
    """
    if polarity == Polarity.EACH:
        return []
    dark = polarity == Polarity.DARK_ON_LIGHT
    others, seen = (rows - light, Polarity.LIGHT_ON_DARK) if dark else (light, Polarity.DARK_ON_LIGHT)
    if not others:
        return []
    look, are = ("look", "are") if others != 1 else ("looks", "is")
    return [
        f"note: {others:,} of {rows:,} {what} {look} {seen}, but {are} taken for {polarity}; "
        "--polarity each tells images apart"
    ]


def to_model_input(pixels: Pixels, polarity: Polarity) -> NDArray[np.float32]:
    """Pixels as the models take them: 0 = background, 1 = ink.

    Args:
        pixels: (n, 784) uint8 0..255 or float32 0..1.
        polarity: of the pixels.

    Returns:
        (n, 784) float32, not clipped; `pixels` itself where nothing is to do.

    Raises:
        ValueError: the polarity is still AUTO.
    """
    if polarity is Polarity.AUTO:
        raise ValueError("the polarity is not found yet: find_polarity")
    if polarity is Polarity.EACH:
        pixels = turned(pixels, dark_on_light(pixels))
    out = as_float(pixels) if pixels.dtype == np.uint8 else pixels.astype(np.float32, copy=False)
    if polarity is Polarity.DARK_ON_LIGHT:
        out = np.subtract(np.float32(1), out, out=None if out is pixels else out)
    return out


def from_model_output(clean: NDArray[np.float32], polarity: Polarity, dtype: str) -> Pixels:
    """What a model gave as a column's pixels: the way back from `to_model_input`, of one polarity.

    Args:
        clean: (n, 784) float32, 0 = background, 1 = ink; finite.
        polarity: of the pixels that are wanted.
        dtype: `uint8`: rint(255 x), clipped; `float32`: as they are.

    Returns:
        (n, 784) of that type; `clean` itself where nothing is to do.

    Raises:
        ValueError: the polarity is AUTO or EACH.
    """
    if polarity is Polarity.EACH:
        raise ValueError("which images are to be turned back is not known: turned")
    # The same flip that makes a scan light on dark makes the result dark on light again.
    return as_numbers(to_model_input(clean, polarity), dtype)


def _mask(bits: int) -> NDArray[np.uint64]:
    """(98,): these bits of each pixel in the margin, none of those within."""
    mask = np.full((SIDE, SIDE), bits, np.uint8)
    mask[_MARGIN:-_MARGIN, _MARGIN:-_MARGIN] = 0
    return mask.reshape(PIXELS).view(np.uint64)


_LIGHT_BYTES, _LIGHT_BOOLS = _mask(0x80), _mask(0x01)
_MARGIN_PIXELS = PIXELS - (SIDE - 2 * _MARGIN) ** 2
