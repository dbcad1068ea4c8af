"""Each batched filter against its namesake in scipy, image by image."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from scipy import ndimage, signal

from denoise_batch.evaluation import baselines
from denoise_batch.evaluation.baselines import Filter, classical_filter


@pytest.fixture(scope="module")
def noisy() -> np.ndarray:
    # More images than one block of the median holds, so that the seam is crossed.
    return np.random.default_rng(0).normal(0.3, 0.8, (70, 28, 28)).astype(np.float32)


@pytest.mark.parametrize("size", [3, 5, 7])
def test_median_equals_scipy(noisy: np.ndarray, size: int) -> None:
    expected = [ndimage.median_filter(image, size=size) for image in noisy]
    np.testing.assert_array_equal(baselines.median(noisy, size), expected)


def test_median_leaves_its_input_alone(noisy: np.ndarray) -> None:
    before = noisy.copy()
    baselines.median(noisy, 3)
    np.testing.assert_array_equal(noisy, before)


@pytest.mark.parametrize("sigma", [0.25, 1.0, 2.5])
def test_gaussian_equals_scipy(noisy: np.ndarray, sigma: float) -> None:
    expected = [ndimage.gaussian_filter(image, sigma) for image in noisy]
    np.testing.assert_allclose(baselines.gaussian(noisy, sigma), expected, atol=1e-6)


@pytest.mark.parametrize("size", [3, 5, 11])
def test_wiener_equals_scipy(noisy: np.ndarray, size: int) -> None:
    expected = [signal.wiener(image.astype(np.float64), size) for image in noisy]
    np.testing.assert_allclose(baselines.wiener(noisy, size), expected, atol=1e-6)


def test_wiener_of_flat_images_is_quiet_and_flat() -> None:
    flat = np.zeros((2, 28, 28), np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(baselines.wiener(flat, 3), flat)


@pytest.mark.parametrize("kind", list(Filter))
def test_filters_stay_within_the_range_of_ink_and_take_no_images(noisy: np.ndarray, kind: Filter) -> None:
    filtered = classical_filter(kind, noisy, baselines.GRIDS[kind][0])
    assert filtered.dtype == np.float32
    assert filtered.min() >= 0.0
    assert filtered.max() <= 1.0
    assert classical_filter(kind, noisy[:0], baselines.GRIDS[kind][0]).shape == (0, 28, 28)
