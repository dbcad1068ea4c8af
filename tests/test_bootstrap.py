"""Intervals: their width is what statistics says it must be, and they are the same every time."""

from __future__ import annotations

import numpy as np
import pytest

from denoise_batch.evaluation.bootstrap import RESAMPLES, interval, resampled_means


def test_the_interval_of_a_mean_is_as_wide_as_its_standard_error_says() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, (1, 4000))
    low, high = interval(resampled_means(values)[0])
    expected = 2 * 1.96 * values.std() / np.sqrt(values.size)
    assert high - low == pytest.approx(expected, rel=0.1)
    assert low < values.mean() < high


def test_all_quantities_see_the_same_images() -> None:
    values = np.random.default_rng(1).normal(size=(1, 50))
    means = resampled_means(np.concatenate([values, 2.0 * values + 1.0]))
    assert means.shape == (2, RESAMPLES)
    np.testing.assert_allclose(means[1], 2.0 * means[0] + 1.0)
    np.testing.assert_array_equal(means, resampled_means(np.concatenate([values, 2.0 * values + 1.0])))


def test_what_is_infinite_in_some_resamples_bounds_one_end_alone() -> None:
    """Of 30 images three differ: one resample in 24 has none of them, and an infinite PSNR."""
    errors = np.zeros((1, 30))
    errors[0, :3] = 1e-4
    with np.errstate(divide="ignore"):
        decibels = -10.0 * np.log10(resampled_means(errors)[0])
    assert 0 < np.isinf(decibels).sum() < 100
    low, high = interval(decibels)
    assert low == pytest.approx(46.3, abs=0.3)
    assert high == np.inf
    assert interval(decibels[np.isfinite(decibels)])[0] == pytest.approx(low, abs=0.1)


def test_what_is_undefined_in_some_resamples_is_left_out() -> None:
    values = np.array([np.nan, *np.linspace(0.0, 1.0, 1001)])
    assert interval(values) == pytest.approx((0.025, 0.975))
    assert np.isnan(interval(values[:1])).all()


def test_an_infinite_value_makes_its_own_quantity_infinite() -> None:
    values = np.ones((2, 10))
    values[0, 3] = np.inf
    means = resampled_means(values)
    assert interval(means[0]) == (np.inf, np.inf)
    assert interval(means[1]) == pytest.approx((1.0, 1.0))
