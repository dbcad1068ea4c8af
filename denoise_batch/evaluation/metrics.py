"""How far images lie from their clean originals: PSNR, SSIM, error on the strokes, cross-entropy.

    ssim(clean, denoised)                              # one figure an image
    psnr_from_mse(mse(clean, denoised).mean())         # pooled, one for a set of images: a bad one weighs as it should

Images are (n, 28, 28) or (n, 784) floats, 0 = background, 1 = full ink; the first argument is the clean one. What is
compared may lie beyond 0..1 (noisy images do). Elementwise work follows the precision of the arguments (float32 stays
float32); every sum is taken in float64, so that figures repeat to the digit.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy.special import xlogy

from denoise_batch.images.layouts import PIXELS, SIDE

Images = npt.NDArray[np.floating[Any]]
PerImage = npt.NDArray[np.float64]

SSIM_WINDOW: Final = 11
"""Side of the SSIM window in pixels; with `SSIM_SIGMA` the window of Wang et al. 2004."""
SSIM_SIGMA: Final = 1.5
SSIM_STABILISERS: Final = (0.01**2, 0.03**2)
"""(C1, C2) = (K1 L)², (K2 L)² with K1 = 0.01, K2 = 0.03 and L = 1, the range of clean pixels."""

CROSS_ENTROPY_CLIP: Final = 1e-7
"""Predictions are kept this far from 0 and 1, as Keras does, so that a wrong certainty costs 16 nats and not ∞."""


def mse(clean: Images, other: Images) -> PerImage:
    """Mean squared difference of each image: (n,) float64, in units of (full ink)²."""
    clean, other = _pair(clean, other)
    result: PerImage = np.square(clean - other, dtype=np.float64).mean(axis=1)
    return result


def foreground(clean: Images, other: Images) -> tuple[PerImage, PerImage]:
    """Squared error where there is ink: most of a digit's image is background, which hides what happens to strokes.

    Returns:
        (n,) float64 sum of squared differences over the pixels whose clean value is above 0, in units of (full ink)²,
        and (n,) float64 how many pixels these are.
    """
    clean, other = _pair(clean, other)
    ink = clean > 0.0
    squares = np.square(clean - other, dtype=np.float64)
    return np.where(ink, squares, 0.0).sum(axis=1), ink.sum(axis=1, dtype=np.float64)


def psnr_from_mse(squared_error: PerImage | float) -> PerImage:
    """-10 log10(squared_error), in dB, for a peak of 1; ∞ where the error is 0."""
    with np.errstate(divide="ignore"):
        decibels: PerImage = -10.0 * np.log10(np.asarray(squared_error, dtype=np.float64))
    return decibels


def _window_matrix() -> PerImage:
    """(28, 18) float64: right-multiplied to rows of 28 pixels, weights them by the SSIM window at its 18 places."""
    offsets = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    weights = np.exp(-0.5 * (offsets / SSIM_SIGMA) ** 2)
    weights /= weights.sum()
    places = SIDE - SSIM_WINDOW + 1
    matrix = np.zeros((SIDE, places))
    for place in range(places):
        matrix[place : place + SSIM_WINDOW, place] = weights
    return matrix


_WINDOW: Final = _window_matrix()


def _local_means(images: PerImage) -> PerImage:
    """Window-weighted means at the 18×18 places: (n, 784) → (n, 324), transposed, which SSIM's mean does not see.

    The window is separable, so one large matrix product an axis does it for the whole batch.
    """
    places = _WINDOW.shape[1]
    rows = (images.reshape(-1, SIDE) @ _WINDOW).reshape(-1, SIDE, places)
    columns: PerImage = rows.transpose(0, 2, 1).reshape(-1, SIDE) @ _WINDOW
    return columns.reshape(-1, places * places)


def ssim(clean: Images, other: Images) -> PerImage:
    """Structural similarity of each image: (n,) float64, 1 for an exact copy.

    The index of Z. Wang, A. C. Bovik, H. R. Sheikh and E. P. Simoncelli, "Image quality assessment: from error
    visibility to structural similarity", IEEE Trans. Image Processing 13 (2004), equations 13-17, with that paper's
    window (11×11, Gaussian of σ = 1.5, sum 1), taken like their program only at the 18×18 places where the window
    lies wholly inside the image, then averaged. Nothing is clipped first.
    """
    clean, other = _pair(clean, other)
    x, y = clean.astype(np.float64), other.astype(np.float64)
    c1, c2 = SSIM_STABILISERS
    mean_x, mean_y = _local_means(x), _local_means(y)
    # E[xx] + E[yy] is all that the formula needs of the two variances: one filtering instead of two.
    both = _local_means(x * x + y * y) - mean_x**2 - mean_y**2
    covariance = _local_means(x * y) - mean_x * mean_y
    index = (2.0 * mean_x * mean_y + c1) * (2.0 * covariance + c2)
    index /= (mean_x**2 + mean_y**2 + c1) * (both + c2)
    result: PerImage = index.mean(axis=1)
    return result


def binary_cross_entropy(clean: Images, other: Images) -> PerImage:
    """Keras' `binary_crossentropy`, mean over each image's pixels: (n,) float64, in nats.

    -(x log p + (1 - x) log(1 - p)), with p = `other` kept inside [`CROSS_ENTROPY_CLIP`, 1 - `CROSS_ENTROPY_CLIP`].
    """
    clean, other = _pair(clean, other)
    p = np.clip(other, CROSS_ENTROPY_CLIP, 1.0 - CROSS_ENTROPY_CLIP)
    # log q + x (log p - log q): one array fewer than the textbook form.
    against = np.log(1.0 - p)
    result: PerImage = -(against + clean * (np.log(p) - against)).mean(axis=1, dtype=np.float64)
    return result


def target_entropy(clean: Images) -> PerImage:
    """The targets' own entropy, mean over each image's pixels: (n,) float64, in nats.

    -(x log x + (1 - x) log(1 - x)): grey targets cannot be predicted for less, so this is the floor of
    `binary_cross_entropy` (0.0581 over the MNIST test set). What is above it is the mean Kullback-Leibler divergence of
    the predicted pixel from the clean one.
    """
    x = clean.reshape(-1, PIXELS).astype(np.float64)
    result: PerImage = -(xlogy(x, x) + xlogy(1.0 - x, 1.0 - x)).mean(axis=1)
    return result


def _pair(clean: Images, other: Images) -> tuple[Images, Images]:
    """Both as (n, 784)."""
    if clean.shape != other.shape:
        raise ValueError(f"images of shapes {clean.shape} and {other.shape} cannot be compared")
    return clean.reshape(-1, PIXELS), other.reshape(-1, PIXELS)
