"""The seed's degradation against scipy, and how levels and noise are drawn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from denoise_batch.errors import FlagError
from denoise_batch.noise import SEED_LEVELS, NoiseRecipe, add_uniform_noise, blur, blur_matrices, clip_to_uint8, degrade


def _images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, 28, 28), dtype=np.float32)


def _against_scipy(sigmas: list[float]) -> None:
    images = _images(len(sigmas))
    ours = blur(torch.from_numpy(images), torch.tensor(sigmas, dtype=torch.float64)).numpy()
    for image, result, sigma in zip(images, ours, sigmas, strict=True):
        # scipy itself sees the float32 value of sigma: float32 is what the levels are drawn in
        expected = ndimage.gaussian_filter(image.astype(np.float64), float(np.float32(sigma)))
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6, err_msg=f"sigma {sigma!r}")


def test_blur_equals_scipy_over_sigma_0_to_3() -> None:
    _against_scipy(np.linspace(0.0, 3.0, 301).tolist())


def test_blur_equals_scipy_at_every_radius_jump() -> None:
    """int(4 sigma + 0.5) jumps at sigma = (k - 0.5) / 4: exactly there, and one float32 step to either side."""
    sigmas: list[float] = []
    for k in range(1, 13):
        jump = np.float32((k - 0.5) / 4)
        sigmas += [float(np.nextafter(jump, np.float32(0))), float(jump), float(np.nextafter(jump, np.float32(9)))]
    _against_scipy(sigmas)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.0, 3.0, width=32), min_size=1, max_size=8))
def test_blur_equals_scipy_for_any_mixture(sigmas: list[float]) -> None:
    _against_scipy(sigmas)


def test_blur_of_wide_kernels_reflects_more_than_once() -> None:
    _against_scipy([6.9, 7.5, 20.0])


def test_sigma_0_is_the_identity() -> None:
    images = torch.from_numpy(_images(3))
    assert torch.equal(blur(images, torch.zeros(3)), images)
    assert torch.equal(blur_matrices(torch.zeros(2)), torch.eye(28).expand(2, 28, 28))


def test_nothing_in_nothing_out() -> None:
    assert blur(torch.zeros((0, 28, 28)), torch.zeros(0)).shape == (0, 28, 28)


def test_uniform_noise_fills_its_range_and_no_more() -> None:
    half_range = torch.tensor([0.0, 0.4, 1.5])
    noise = add_uniform_noise(torch.zeros((3, 28, 28)), half_range, torch.Generator().manual_seed(1))
    assert torch.equal(noise[0], torch.zeros((28, 28)))
    for image, limit in zip(noise[1:], (0.4, 1.5), strict=True):
        assert -limit <= image.min() < -0.98 * limit
        assert 0.98 * limit < image.max() <= limit
        assert abs(image.mean()) < 0.1 * limit
        assert image.std() == pytest.approx(limit / 3**0.5, rel=0.05)


def test_degrade_blurs_first() -> None:
    image = torch.zeros((1, 28, 28))
    image[0, 14, 14] = 1.0
    noisy = degrade(image, torch.tensor([2.0]), torch.tensor([0.5]), torch.Generator().manual_seed(2))
    expected = add_uniform_noise(
        blur(image, torch.tensor([2.0])), torch.tensor([0.5]), torch.Generator().manual_seed(2)
    )
    assert torch.equal(noisy, expected)
    assert noisy.min() < -0.45  # not clipped


def test_the_same_seed_gives_the_same_noise() -> None:
    images, recipe = torch.from_numpy(_images(16)), NoiseRecipe(clipped=0.5)
    first, again = (recipe.apply(images, torch.Generator().manual_seed(7)) for _ in range(2))
    other = recipe.apply(images, torch.Generator().manual_seed(8))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_levels_lie_in_their_ranges() -> None:
    sigma, half_range = NoiseRecipe().draw_levels(5000, torch.Generator().manual_seed(3))
    assert 0.0 <= sigma.min() < 0.01
    assert 1.99 < sigma.max() <= 2.0
    assert 0.01 <= half_range.min() < 0.02
    assert 1.49 < half_range.max() <= 1.5
    fixed = NoiseRecipe(sigma=(1.0, 1.0), half_range=(0.4, 0.4)).draw_levels(3)
    assert torch.equal(fixed[0], torch.ones(3))
    assert torch.equal(fixed[1], torch.full((3,), 0.4))


def test_the_share_of_clipped_images() -> None:
    noisy, _, _ = NoiseRecipe(half_range=(1.0, 1.0), clipped=0.25).apply(torch.from_numpy(_images(2000)))
    clipped = [bool((image.min() >= 0) and (image.max() <= 1)) for image in noisy]
    assert np.mean(clipped) == pytest.approx(0.25, abs=0.05)
    some = noisy[clipped.index(True)]
    assert torch.equal(clip_to_uint8(some), some)


def test_the_seed_levels() -> None:
    assert np.allclose(SEED_LEVELS, [(0, 0), (0.5, 0.4), (1, 0.8), (1.5, 1.2), (2, 1.6), (2.5, 2)])


def test_recipe_survives_json() -> None:
    recipe = NoiseRecipe((0.5, 1.0), (0.1, 0.2), 0.3)
    assert NoiseRecipe.from_json(recipe.to_json()) == recipe
    assert NoiseRecipe.from_json({"sigma": [0, 1], "half_range": [0, 1]}).clipped == 0.0


@pytest.mark.parametrize(
    "fields",
    [{"sigma": (2.0, 1.0)}, {"sigma": (-1.0, 1.0)}, {"half_range": (0.0, float("nan"))}, {"clipped": 1.5}],
)
def test_impossible_levels_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(FlagError):
        NoiseRecipe(**fields)  # type: ignore[arg-type]
