"""The best linear denoiser there is: it knows the images' mean and covariance, the blur and the noise's half range.

    restore = LinearMmse(clean_training_images).restorer(sigma=1.0, half_range=0.8)
    denoised = restore(noisy)

A network that does worse than this on its own noise is undertrained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from denoise_batch.noise import SIDE, blur_matrices

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    Batch = npt.NDArray[np.float32]


class LinearMmse:
    """Linear minimum mean squared error estimates from first and second moments.

    Args:
        images: (n, 28, 28) uint8, clean, other ones than those that are to be restored; n well above 784.
    """

    def __init__(self, images: npt.NDArray[np.uint8]) -> None:
        pixels = images.reshape(len(images), -1).astype(np.float32) / np.float32(255)
        self._mean = pixels.mean(axis=0, dtype=np.float64)
        centred = pixels - self._mean.astype(np.float32)
        self._covariance = (centred.T @ centred).astype(np.float64) / len(images)

    def restorer(self, sigma: float, half_range: float) -> Callable[[Batch], Batch]:
        """What restores images that were blurred by `sigma` and then given uniform noise in ±`half_range`, unclipped.

        x̂ = m + C Bᵀ (B C Bᵀ + v I)⁻¹ (y - B m), with the mean m and covariance C of clean images, the blur B, and the
        noise's variance v = half_range² / 3 (S. M. Kay, "Fundamentals of Statistical Signal Processing: Estimation
        Theory", 1993, theorem 12.1).

        Args:
            sigma: in pixels.
            half_range: above 0, in units of full ink.

        Returns:
            A function of (n, 28, 28) float32, noisy, that gives the same shape, clipped to 0..1.
        """
        if half_range <= 0.0:
            raise ValueError("without noise the estimate is the inverse of the blur, which may have none")
        side = blur_matrices(torch.tensor([sigma]))[0].double().numpy()
        blur = np.kron(side, side)  # row-major pixels: B X Bᵀ as one matrix
        crossed = self._covariance @ blur.T
        observed = blur @ crossed
        observed[np.diag_indices_from(observed)] += half_range**2 / 3.0
        gain = np.linalg.solve(observed, crossed.T).T.astype(np.float32)
        offset = (self._mean - gain @ (blur @ self._mean)).astype(np.float32)

        def restore(noisy: Batch) -> Batch:
            estimates = noisy.reshape(len(noisy), -1) @ gain.T + offset
            clipped: Batch = estimates.clip(0.0, 1.0).reshape(-1, SIDE, SIDE)
            return clipped

        return restore
