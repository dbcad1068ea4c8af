"""Each metric against a slow, literal form of its definition."""

from __future__ import annotations

import math

import numpy as np
import pytest

from denoise_batch.evaluation import metrics


def _images(count: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    clean = np.clip(generator.normal(0.2, 0.4, (count, 28, 28)), 0, 1)
    noisy = clean + generator.uniform(-0.7, 0.7, clean.shape)
    return clean.astype(np.float32), noisy.astype(np.float32)


def _literal_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """Wang et al. 2004, equations 13-17, one window after the other."""
    offsets = range(-5, 6)
    window = np.array([[math.exp(-(i * i + j * j) / (2 * 1.5**2)) for j in offsets] for i in offsets])
    window /= window.sum()
    c1, c2 = (0.01 * 1) ** 2, (0.03 * 1) ** 2
    values = []
    for row in range(28 - 10):
        for column in range(28 - 10):
            px = x[row : row + 11, column : column + 11].astype(np.float64)
            py = y[row : row + 11, column : column + 11].astype(np.float64)
            mx, my = (window * px).sum(), (window * py).sum()
            vx, vy = (window * (px - mx) ** 2).sum(), (window * (py - my) ** 2).sum()
            cov = (window * (px - mx) * (py - my)).sum()
            values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return float(np.mean(values))


def test_ssim_equals_the_literal_form() -> None:
    clean, noisy = _images()
    expected = [_literal_ssim(x, y) for x, y in zip(clean, noisy, strict=True)]
    np.testing.assert_allclose(metrics.ssim(clean, noisy), expected, atol=1e-12)


def test_ssim_of_a_copy_is_one_and_empty_images_count_as_equal() -> None:
    clean, _ = _images()
    np.testing.assert_allclose(metrics.ssim(clean, clean), 1.0, atol=1e-12)
    empty = np.zeros((2, 28, 28), np.float32)
    np.testing.assert_allclose(metrics.ssim(empty, empty), 1.0)


def test_flat_and_square_images_score_alike() -> None:
    clean, noisy = _images()
    for metric in (metrics.mse, metrics.ssim, metrics.binary_cross_entropy):
        np.testing.assert_array_equal(
            metric(clean, noisy), metric(clean.reshape(-1, 784), noisy.reshape(-1, 784)), metric.__name__
        )


def test_psnr_is_that_of_the_error() -> None:
    clean = np.zeros((2, 28, 28), np.float32)
    other = np.stack([np.full((28, 28), 0.1), np.full((28, 28), 0.01)]).astype(np.float32)
    assert metrics.mse(clean, other) == pytest.approx([1e-2, 1e-4])
    assert metrics.psnr_from_mse(metrics.mse(clean, other)) == pytest.approx([20.0, 40.0], abs=1e-5)


def test_an_exact_copy_has_infinite_psnr_without_a_warning() -> None:
    clean, _ = _images()
    assert metrics.psnr_from_mse(metrics.mse(clean, clean).mean()) == math.inf


def test_sums_are_taken_in_float64() -> None:
    # 0.1² in float32, summed in float32 over 784 pixels, is off in the sixth digit; in float64 it is not.
    clean = np.zeros((1, 28, 28), np.float32)
    other = np.full((1, 28, 28), 0.1, np.float32)
    assert metrics.mse(clean, other)[0] == float(np.float32(0.1)) ** 2
    assert metrics.mse(clean, other).dtype == np.float64


def test_cross_entropy_equals_the_textbook_form() -> None:
    clean, noisy = _images()
    x, p = clean.astype(np.float64), np.clip(noisy.astype(np.float64), 1e-7, 1 - 1e-7)
    expected = -(x * np.log(p) + (1 - x) * np.log1p(-p)).mean(axis=(1, 2))
    np.testing.assert_allclose(metrics.binary_cross_entropy(x, noisy.astype(np.float64)), expected, rtol=1e-12)
    # float32's neighbour of 1 - 1e-7 is 1 - 1.2e-7: its log differs by 1%.
    np.testing.assert_allclose(metrics.binary_cross_entropy(clean, noisy), expected, rtol=0.02)


def test_excess_is_zero_at_the_floor_and_positive_above() -> None:
    clean, noisy = _images()
    floor = metrics.target_entropy(clean)
    np.testing.assert_allclose(metrics.binary_cross_entropy(clean, clean), floor, atol=1e-6)
    assert (metrics.binary_cross_entropy(clean, noisy) > floor + 0.1).all()


def test_entropy_of_black_and_white_targets_is_zero() -> None:
    clean = np.zeros((3, 28, 28), np.float32)
    clean[:, 5:9] = 1.0
    np.testing.assert_array_equal(metrics.target_entropy(clean), 0.0)
    np.testing.assert_allclose(metrics.target_entropy(np.full((1, 28, 28), 0.5)), math.log(2))


def test_no_images_score_as_empty_arrays() -> None:
    none = np.zeros((0, 28, 28), np.float32)
    for metric in (metrics.mse, metrics.ssim, metrics.binary_cross_entropy):
        assert metric(none, none).shape == (0,)


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        metrics.mse(np.zeros((2, 28, 28)), np.zeros((2, 784)))
