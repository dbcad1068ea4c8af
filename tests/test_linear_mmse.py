"""The linear estimate against other filters, against measured figures, and against a case with a known answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from denoise_batch.digits import Split, draw_digits, load_mnist
from denoise_batch.evaluation import metrics
from denoise_batch.evaluation.baselines import GRIDS, Filter, classical_filter
from denoise_batch.evaluation.linear_mmse import LinearMmse
from denoise_batch.noise import SEED_LEVELS, degrade

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def digits() -> np.ndarray:
    return draw_digits(4000, seed=3)[0]


def noisy(clean: np.ndarray, sigma: float, half_range: float) -> np.ndarray:
    count = len(clean)
    images = torch.from_numpy(clean.astype(np.float32) / 255)
    levels = torch.full((count,), sigma), torch.full((count,), half_range)
    return degrade(images, *levels, torch.Generator().manual_seed(1)).numpy()


def pooled_psnr(clean: np.ndarray, other: np.ndarray) -> float:
    return float(metrics.psnr_from_mse(metrics.mse(clean, other).mean()))


@pytest.mark.parametrize(("sigma", "half_range"), [(0.5, 0.4), (1.5, 1.2)])
def test_it_does_better_than_the_best_local_linear_filter(digits: np.ndarray, sigma: float, half_range: float) -> None:
    unseen = digits[3000:]
    clean = unseen.astype(np.float32) / 255
    degraded = noisy(unseen, sigma, half_range)
    level = pooled_psnr(clean, LinearMmse(digits[:3000]).restorer(sigma, half_range)(degraded))
    smoothed = [classical_filter(Filter.GAUSSIAN, degraded, setting) for setting in GRIDS[Filter.GAUSSIAN]]
    assert level > max(pooled_psnr(clean, image) for image in smoothed) + 0.5


@pytest.mark.slow
@pytest.mark.parametrize(("level", "decibels"), [(1, 20.21), (3, 14.10), (5, 12.60)])
def test_on_mnist_it_gives_what_others_have_measured(mnist_folder: Path, level: int, decibels: float) -> None:
    training, test = (load_mnist(mnist_folder, split)[0] for split in (Split.TRAIN, Split.TEST))
    sigma, half_range = SEED_LEVELS[level]
    found = LinearMmse(training).restorer(sigma, half_range)(noisy(test, sigma, half_range))
    assert pooled_psnr(test.astype(np.float32) / 255, found) == pytest.approx(decibels, abs=0.1)


def test_independent_pixels_are_shrunk_by_the_textbook_factor() -> None:
    images = np.random.default_rng(0).integers(0, 256, (20_000, 28, 28), np.uint8)
    variance = images.std() ** 2 / 255**2
    noise = 0.5**2 / 3
    observed = np.full((1, 28, 28), 0.8, np.float32)
    mean = images.mean() / 255
    expected = mean + variance / (variance + noise) * (0.8 - mean)
    found = LinearMmse(images).restorer(0.0, 0.5)(observed)
    assert abs(found.mean() - expected) < 0.01


def test_blur_without_noise_is_refused(digits: np.ndarray) -> None:
    with pytest.raises(ValueError, match="inverse of the blur"):
        LinearMmse(digits).restorer(1.0, 0.0)
