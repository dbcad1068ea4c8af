"""The background of a set of scans: paper that is not white, and how it is made white (or what is black, black).

The models know digits on a background of no ink at all. Grey paper would pass for faint ink, and where its edge is, for
strokes. How grey it is, is found of a sample of the set, and holds for all of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from denoise_batch.images.layouts import SIDE
from denoise_batch.images.polarity import Polarity, to_model_input

if TYPE_CHECKING:
    from denoise_batch.images.buffers import Pixels

_LEAST, _MOST = 0.01, 0.5
"""Less is what models stand; at more it is not clear which is ink."""

_SURE = 4.0
"""Standard errors that it must be above noise."""


def find_background(pixels: Pixels, polarity: Polarity) -> float:
    """How much ink the background of a set seems to have, from 0 to 0.5 of full ink; 0 where that is little or unsure.

    The median of an image's outermost ring is its background's level, as in `find_polarity`; that of the set is their
    median. The standard error of a median of n numbers is 1.25 of their deviation divided by √n where they are normal,
    1.73 of it where they are uniform.

    Args:
        pixels: (n, 784) uint8 or float, of good rows.
        polarity: of the pixels; never AUTO.
    """
    if not len(pixels):
        return 0.0
    ring = np.ones((SIDE, SIDE), np.bool_)
    ring[1:-1, 1:-1] = False
    edges = to_model_input(pixels, polarity).reshape(-1, SIDE, SIDE)[:, ring]
    level = float(np.median(np.median(edges, axis=1)))
    error = 1.73 * float(np.median(edges.std(axis=1))) / edges.size**0.5
    return round(level, 4) if max(_LEAST, _SURE * error) < level <= _MOST else 0.0


def without_background(pixels: Pixels, polarity: Polarity, background: float) -> Pixels:
    """Pixels stretched so that the background has no ink, and full ink stays what it is.

    Args:
        pixels: (n, 784) uint8 or float32.
        polarity: LIGHT_ON_DARK or DARK_ON_LIGHT.
        background: what `find_background` found.

    Returns:
        The same type; uint8 is rounded and cut off at the background. `pixels` itself where there is none.
    """
    if not background:
        return pixels
    dark = polarity is Polarity.DARK_ON_LIGHT
    if pixels.dtype == np.uint8:
        ink = (np.arange(256) / 255 - background) / (1 - background)
        table = np.rint(255 * ink.clip(0, 1)).astype(np.uint8)
        return np.take(255 - table[::-1] if dark else table, pixels)
    shift, scale = np.float32(0 if dark else background), np.float32(1 / (1 - background))
    return (pixels - shift) * scale


def background_lines(background: float) -> list[str]:
    """What is said of a background that was found: a line, none where it is none."""
    if not background:
        return []
    return [f"note: the background is grey, {background:.0%} of full ink: it is taken for none, and comes back as none"]
