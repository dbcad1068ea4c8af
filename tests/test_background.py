"""Paper that is not white: found in a set, made white, and never found where there is none."""

from __future__ import annotations

import numpy as np
import pytest

from denoise_batch.digits import draw_digits
from denoise_batch.evaluation.protocol import CONDITIONS, degrade_images
from denoise_batch.images import Polarity, from_model_output, to_model_input
from denoise_batch.images.background import background_lines, find_background, without_background

INK = draw_digits(64, seed=4)[0].reshape(-1, 784).astype(np.float32) / np.float32(255)


def scans(background: float, noise: float = 0.06, seed: int = 0) -> np.ndarray:
    """(64, 784) float32, 1 is ink: digits on paper that has so much of it."""
    drawn = np.random.default_rng(seed).normal(0, noise, INK.shape)
    return (background + (1 - background) * INK + drawn).astype(np.float32)


@pytest.mark.parametrize("background", [0.05, 0.12, 0.3])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("polarity", [Polarity.LIGHT_ON_DARK, Polarity.DARK_ON_LIGHT])
def test_the_background_is_found_and_taken_off(background: float, dtype: str, polarity: Polarity) -> None:
    pixels = from_model_output(scans(background), polarity, dtype)
    found = find_background(pixels, polarity)
    assert found == pytest.approx(background, abs=0.01)
    stretched = without_background(pixels, polarity, found)
    assert stretched.dtype == pixels.dtype
    again = from_model_output(scans(0.0, 0.06 / (1 - background)), polarity, dtype)
    error = np.abs(stretched.astype(float) - again.astype(float)).mean()
    assert error < (2.0 if dtype == "uint8" else 0.01)
    assert find_background(stretched, polarity) is None
    # Full ink stays what it is, and what is as light as the paper becomes white.
    middle = np.full((1, 28, 28), found, np.float32)
    middle[:, 8:20, 8:20] = 1.0
    kept = without_background(from_model_output(middle.reshape(1, 784), polarity, dtype), polarity, found)
    expected = from_model_output((middle > 0.9).astype(np.float32).reshape(1, 784), polarity, dtype)
    np.testing.assert_allclose(kept, expected, atol=1 if dtype == "uint8" else 1e-3)


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("grey", [1.0, 0.3])
def test_each_image_may_have_another_background(dtype: str, grey: float) -> None:
    """Nearly as good as if each image's were known; what has none stays as it was, but for what noise hides."""
    generator = np.random.default_rng(5)
    papers = np.where(generator.random(len(INK)) < grey, generator.uniform(0.05, 0.3, len(INK)), 0.0)[:, None]
    drawn = generator.normal(0, 0.04, INK.shape)
    pixels = from_model_output((papers + (1 - papers) * INK + drawn).astype(np.float32), Polarity.DARK_ON_LIGHT, dtype)
    found = find_background(pixels, Polarity.DARK_ON_LIGHT)
    assert found == (0.0 if grey < 0.5 else pytest.approx(np.median(papers), abs=0.02))
    made = to_model_input(without_background(pixels, Polarity.DARK_ON_LIGHT, found), Polarity.DARK_ON_LIGHT)
    edges = made.reshape(-1, 28, 28)[:, 0]
    assert np.abs(np.median(edges, axis=1)).max() < 0.05
    assert np.abs(made - INK).mean() < 0.06


def test_images_of_both_polarities_have_one_background() -> None:
    pixels = from_model_output(scans(0.15), Polarity.LIGHT_ON_DARK, "uint8")
    pixels[::2] = 255 - pixels[::2]
    assert find_background(pixels, Polarity.EACH) == pytest.approx(0.15, abs=0.01)


@pytest.mark.parametrize("key", [condition.key for condition in CONDITIONS])
@pytest.mark.parametrize("count", [1, 64])
def test_noise_is_no_background(key: str, count: int) -> None:
    """Nor in a single image: what is not sure is none."""
    condition = next(condition for condition in CONDITIONS if condition.key == key)
    for seed in range(4):
        noisy = degrade_images(INK.reshape(-1, 28, 28), condition, seed=seed).reshape(-1, 784)[:count]
        assert find_background(noisy, Polarity.LIGHT_ON_DARK) is None


def test_what_is_hardly_grey_or_no_background_at_all_is_left() -> None:
    assert find_background(scans(0.004), Polarity.LIGHT_ON_DARK) is None
    assert find_background(1 - scans(0.0), Polarity.LIGHT_ON_DARK) is None  # it says so, but they are dark on light
    assert find_background(np.zeros((0, 784), np.uint8), Polarity.LIGHT_ON_DARK) is None
    pixels = scans(0.2)
    assert without_background(pixels, Polarity.LIGHT_ON_DARK, None) is pixels
    assert background_lines(None) == []
    assert "12% of full ink" in background_lines(0.1234)[0]
    assert "some images" in background_lines(0.0)[0]
