"""The background of scans: paper that is not white, and how it is made white (or what is black, black).

The models know digits on a background of no ink at all. Grey paper would pass for faint ink, and where it ends, for
strokes. Whether a set has any, a sample of it says; how grey an image's is, its own edge says where it is surely
another than the set's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from denoise_batch.images.layouts import SIDE
from denoise_batch.images.polarity import Polarity, to_model_input

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from denoise_batch.images.buffers import Pixels

    Numbers = NDArray[np.float32]

_LEAST, _MOST = 0.01, 0.5
"""Less ink is what models stand; at more it is not clear which is ink."""

_SURE, _OTHER = 5.0, 2.0
"""Standard errors: that a level must be above none, and that an image's must be from the set's."""

_SEEN = 0.15
"""Of the edges' deviation: less is nothing beside that noise, and strong blur alone brings some ink to the edge."""

_SOME, _SOME_FEW, _SOME_LEAST = 0.05, 2, 0.03
"""Of more than how many images, share and number, the background must be grey, and how grey, if not of most."""

_RING = np.ones((SIDE, SIDE), np.bool_)
_RING[1:-1, 1:-1] = False
_EDGE = np.flatnonzero(_RING)
_ERROR = 1.73
_BLOCK = 4096


def find_background(pixels: Pixels, polarity: Polarity) -> float | None:
    """How much ink the background of a set seems to have, from 0 to 0.5 of full ink; None where there is none.

    The median of an image's outermost ring is its background's level, as in `find_polarity`; that of the set is their
    median. It is 0 where most images have none, but one in 20 and more surely have.

    Args:
        pixels: (n, 784) uint8 or float, of good rows.
        polarity: of the pixels; never AUTO.
    """
    if not len(pixels):
        return None
    levels, errors = _levels(to_model_input(pixels, polarity)[:, _EDGE])
    level, error = float(np.median(levels)), float(np.median(errors))
    deviation = error / _ERROR * len(_EDGE) ** 0.5
    if max(_LEAST, _SURE * error / len(levels) ** 0.5, _SEEN * deviation) < level <= _MOST:
        return round(level, 4)
    grey = (levels > np.maximum(_SOME_LEAST, _SURE * errors)) & (levels <= _MOST)
    return 0.0 if np.count_nonzero(grey) > max(_SOME_FEW, _SOME * len(grey)) else None


def _levels(edges: Numbers) -> tuple[Numbers, Numbers]:
    """(n,) the background's level of each image, and its standard error, of its (n, 108) edge.

    The error of a median of k numbers is 1.25 of their deviation divided by √k where they are normal, 1.73 of it where
    they are uniform.
    """
    return np.median(edges, axis=1), np.float32(_ERROR / edges.shape[1] ** 0.5) * edges.std(axis=1)


def without_background(pixels: Pixels, polarity: Polarity, background: float | None) -> Pixels:
    """Pixels stretched so that the background has no ink, and full ink stays what it is.

    Args:
        pixels: (n, 784) uint8 or float32.
        polarity: LIGHT_ON_DARK or DARK_ON_LIGHT.
        background: what `find_background` found of the set.

    Returns:
        The same type; uint8 is rounded, and cut off at the background. `pixels` itself where there is none.
    """
    if background is None:
        return pixels
    out = np.empty_like(pixels)
    for start in range(0, len(pixels), _BLOCK):
        block = pixels[start : start + _BLOCK]
        levels, errors = _levels(to_model_input(block[:, _EDGE], polarity))
        own = (np.abs(levels - background) > _OTHER * errors) & (levels <= _MOST)
        out[start : start + _BLOCK] = _stretched(block, polarity, np.where(own, levels.clip(0.0), background))
    return out


def _stretched(pixels: Pixels, polarity: Polarity, levels: Numbers) -> Pixels:
    dark = polarity is Polarity.DARK_ON_LIGHT
    if pixels.dtype == np.uint8:
        tables = _TABLES[:, ::-1] if dark else _TABLES
        ink: NDArray[np.uint8] = tables[np.rint(255 * levels).astype(np.intp)[:, None], pixels]
        return ~ink if dark else ink
    level = levels[:, None].astype(np.float32)
    floats: NDArray[np.float32] = (pixels if dark else pixels - level) / (1 - level)
    return floats


def _tables() -> NDArray[np.uint8]:
    """(levels, 256): by the background's level in 8 bits, what each pixel becomes, light on dark."""
    levels = np.arange(round(255 * _MOST) + 1)[:, None] / 255
    tables: NDArray[np.uint8] = np.rint(255 * ((np.arange(256) / 255 - levels) / (1 - levels)).clip(0, 1)).astype("u1")
    return tables


_TABLES = _tables()


def background_lines(background: float | None) -> list[str]:
    """What is said of a background that was found: a line, none where there is none."""
    if background is None:
        return []
    what = f"the background is grey, {background:.0%} of full ink" if background else "some images' background is grey"
    return [f"note: {what}: it is taken for none, and comes back as none"]
