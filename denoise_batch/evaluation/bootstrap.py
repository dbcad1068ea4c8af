"""How far a figure would move with other images: 95% intervals by resampling the images.

B. Efron, "Bootstrap methods: another look at the jackknife", The Annals of Statistics 7 (1979); percentile intervals.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

RESAMPLES: Final = 1000
SEED: Final = 1979
FEW_IMAGES: Final = 30
"""Intervals of fewer images than that are too narrow: resamples of few vary less than other images would."""
_AT_ONCE: Final = 50


def resampled_means(per_image: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Means over images drawn with replacement, `RESAMPLES` times, always the same draws.

    Args:
        per_image: (k, n) float64, k quantities of each of n images.

    Returns:
        (k, RESAMPLES) float64; column j is the means over one draw, the same images for all k. Where one of an
        image's quantities is infinite, so is every mean of that quantity.
    """
    finite = np.isfinite(per_image).all(axis=1, keepdims=True)
    values = np.where(finite, per_image, 0.0)
    means = np.concatenate([values @ weights for weights in _weights(per_image.shape[1])], axis=1)
    return np.where(finite, means, np.inf)


def interval(resampled: npt.NDArray[np.float64]) -> tuple[float, float]:
    """The middle 95% of (m,) values, of which some may be infinite; NaN ones are left out."""
    values = np.sort(resampled[~np.isnan(resampled)])
    if len(values) == 0:
        return math.nan, math.nan
    if np.isfinite(values).all():
        low, high = np.quantile(values, (0.025, 0.975))
    else:  # between a number and infinity there is nothing
        low, high = np.quantile(values, 0.025, method="lower"), np.quantile(values, 0.975, method="higher")
    return float(low), float(high)


def _weights(images: int) -> Iterator[npt.NDArray[np.float64]]:
    """How often each image is drawn, as a share: (n, some) float64 at a time."""
    generator = np.random.default_rng(SEED)
    for start in range(0, RESAMPLES, _AT_ONCE):
        count = min(_AT_ONCE, RESAMPLES - start)
        drawn = generator.integers(images, size=(count, images))
        yield np.stack([np.bincount(row, minlength=images) for row in drawn], axis=1) / images
