"""The classical filters that a denoiser has to beat: median, Gaussian and Wiener, over batches of images.

    classical_filter(Filter.MEDIAN, noisy, size=5)

Each equals its namesake in scipy applied image by image (the tests hold them to it), but takes whole batches: scipy's
loops would be most of an evaluation's time. What comes out is clipped to 0..1, since every pixel is known to lie there;
it can only help.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter1d

if TYPE_CHECKING:
    from collections.abc import Callable

Batch = npt.NDArray[np.float32]

_MEDIAN_BLOCK: Final = 64
"""Images a pass: the selection's planes then stay in the processor's cache, worth a factor of three."""


class Filter(StrEnum):
    MEDIAN = "median"
    GAUSSIAN = "gaussian"
    WIENER = "wiener"


GRIDS: Final[dict[Filter, tuple[float, ...]]] = {
    Filter.MEDIAN: (3, 5, 7, 9),
    Filter.GAUSSIAN: (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5),
    Filter.WIENER: (3, 5, 7, 9, 11),
}
"""The settings tried: side of the window in pixels, or the Gaussian's σ. Beyond the training range a larger median
would still gain a little (11×11: 0.3 dB at i=5), at the cost of most of an evaluation's time."""


def classical_filter(kind: Filter, noisy: Batch, setting: float) -> Batch:
    """Filters a batch.

    Args:
        kind: which filter.
        noisy: (n, 28, 28) float32, not clipped.
        setting: the window's side in pixels (odd) for the median and Wiener filters, σ in pixels for the Gaussian.

    Returns:
        (n, 28, 28) float32, clipped to 0..1.
    """
    filtered = _FILTERS[kind](noisy, setting)
    return np.clip(filtered, 0.0, 1.0, out=filtered)


def median(noisy: Batch, size: int) -> Batch:
    """`scipy.ndimage.median_filter(image, size)` (mode `reflect`) of each image; size is odd."""
    margin = size // 2
    filtered = np.empty_like(noisy)
    for start in range(0, len(noisy), _MEDIAN_BLOCK):
        block = noisy[start : start + _MEDIAN_BLOCK]
        # scipy's `reflect` repeats the edge pixel: numpy calls that `symmetric`.
        padded = np.pad(block, ((0, 0), (margin, margin), (margin, margin)), mode="symmetric")
        height, width = block.shape[1:]
        shifted = [padded[:, i : i + height, j : j + width] for i in range(size) for j in range(size)]
        filtered[start : start + _MEDIAN_BLOCK] = _median_of(shifted)
    return filtered


def _median_of(planes: list[Batch]) -> Batch:
    """The pixel-wise median of an odd number of equal-shaped arrays, by minima and maxima of whole arrays.

    Forgetful selection: of any half + 2 of the values the least and the greatest cannot be the median, so both are
    dropped and the next value is let in, until one is left. (A. W. Paeth, "Median finding on a 3×3 grid", Graphics
    Gems, 1990.)
    """
    keep = len(planes) // 2 + 2
    pool, waiting = [plane.copy() for plane in planes[:keep]], planes[keep:]
    while len(pool) > 1:
        # Pairs first: then the least lies in the lower half and the greatest in the upper, half the comparisons.
        for i in range(len(pool) // 2):
            _sort_pair(pool, i, len(pool) - 1 - i)
        for i in range(1, (len(pool) + 1) // 2):
            _sort_pair(pool, 0, i)
        for i in range(len(pool) // 2, len(pool) - 1):
            _sort_pair(pool, i, len(pool) - 1)
        pool = pool[1:-1]
        if waiting:
            pool.append(waiting.pop().copy())
    return pool[0]


def _sort_pair(pool: list[Batch], low: int, high: int) -> None:
    """Puts the smaller of two arrays' pixels into place `low`, the greater into `high`."""
    smaller = np.minimum(pool[low], pool[high])
    np.maximum(pool[low], pool[high], out=pool[high])
    pool[low] = smaller


def gaussian(noisy: Batch, sigma: float) -> Batch:
    """`scipy.ndimage.gaussian_filter(image, sigma)` (mode `reflect`, truncate 4) of each image."""
    filtered: Batch = gaussian_filter1d(gaussian_filter1d(noisy, sigma, axis=1), sigma, axis=2)
    return filtered


def wiener(noisy: Batch, size: int) -> Batch:
    """`scipy.signal.wiener(image, size)` of each image: it estimates the noise as the mean of the local variances.

    J. S. Lim, "Two-dimensional signal and image processing", 1990, p. 536 ff., as scipy cites it; zeros lie around
    the image, as there.
    """
    side = noisy.shape[-1]
    near = np.abs(np.arange(side)[:, None] - np.arange(side)) <= size // 2
    box = near.astype(np.float64) / size

    def local_mean(images: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        # Sums over rows and columns of a separable window are two matrix products.
        means: npt.NDArray[np.float64] = box @ (images.reshape(-1, side) @ box).reshape(-1, side, side)
        return means

    pixels = noisy.astype(np.float64)
    mean = local_mean(pixels)
    variance = local_mean(pixels**2) - mean**2
    noise = variance.mean(axis=(1, 2), keepdims=True)
    # Where the local variance is below the noise only the mean is left; the floor keeps 0/0 out of flat images.
    gain = 1.0 - noise / np.maximum(variance, np.maximum(noise, np.finfo(np.float64).tiny))
    filtered: Batch = (mean + gain * (pixels - mean)).astype(np.float32)
    return filtered


_FILTERS: Final[dict[Filter, Callable[[Batch, Any], Batch]]] = {
    Filter.MEDIAN: median,
    Filter.GAUSSIAN: gaussian,
    Filter.WIENER: wiener,
}
