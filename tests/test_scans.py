"""How a scan is blurred, how noisy it is, and which of its pixels say nothing; with digits that are drawn."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from denoise_batch.digits.drawn_digits import draw_digits
from denoise_batch.models.scans import cosine_transform, look_at, may_have_little_noise
from denoise_batch.noise import NoiseRecipe, blur, blur_matrices, clip_to_uint8

MOST = 2.25


@pytest.fixture(scope="module")
def clean() -> torch.Tensor:
    return torch.from_numpy(draw_digits(160, seed=5)[0].reshape(-1, 28, 28).astype(np.float32) / np.float32(255))


@pytest.fixture(scope="module")
def made(clean: torch.Tensor) -> torch.Tensor:
    """As sure as a network is at most."""
    return clean.clamp(0.01, 0.99)


@pytest.mark.parametrize(("down", "across"), [(0.7, 0.7), (1.5, 1.5), (1.8, 0.5), (0.6, 1.2)])
def test_the_blur_is_found_down_and_across(clean: torch.Tensor, made: torch.Tensor, down: float, across: float) -> None:
    matrices = blur_matrices(torch.tensor([down, across]))
    scans = look_at(matrices[0] @ clean @ matrices[1].T, made, MOST)
    found = scans.blur.sqrt().median(dim=0).values.tolist()
    assert found == pytest.approx([down, across], abs=0.15)
    assert scans.fits.float().mean() > 0.95


def test_the_noise_is_found_where_it_was_not_cut_off(clean: torch.Tensor, made: torch.Tensor) -> None:
    noise = 0.03 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    for scan in (
        blur(clean, torch.ones(len(clean))) + noise,
        clip_to_uint8(blur(clean, torch.ones(len(clean))) + noise),
    ):
        assert look_at(scan, made, MOST).noise.sqrt().median() == pytest.approx(0.03, rel=0.15)


@pytest.mark.parametrize("value", ["both", 0.0, 1.0])
def test_salt_pepper_and_dust_are_lost(clean: torch.Tensor, made: torch.Tensor, value: str | float) -> None:
    blurred = blur(clean, torch.full((len(clean),), 0.8))
    struck = torch.rand(clean.shape, generator=torch.Generator().manual_seed(0)) < (0.1 if value == "both" else 0.04)
    of = (torch.arange(28) % 2).float() if value == "both" else torch.full((28,), float(value))
    scans = look_at(torch.where(struck, of, blurred), made, MOST)
    share = 0.5 if value == 0.0 else 0.9  # on paper black on black is not seen
    assert scans.struck.float().mean() > share
    assert bool(scans.lost[scans.struck].flatten(1).any(dim=1).all())
    assert not scans.lost[~scans.struck].any()
    seen = scans.lost[scans.struck] * struck[scans.struck]
    assert seen.sum() > 0.8 * scans.lost.sum()
    assert not look_at(blurred, made, MOST).lost.any()


def test_the_lines_of_a_form_are_not_lost(clean: torch.Tensor, made: torch.Tensor) -> None:
    """Which the network takes away."""
    scans = blur(clean, torch.full((len(clean),), 0.8))
    scans[:, 1] = scans[:, :, 1] = 1.0
    assert not look_at(scans, made, MOST).lost.any()


def test_what_cannot_be_fitted_is_left_out(clean: torch.Tensor, made: torch.Tensor) -> None:
    ones = torch.ones(len(clean))
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    for scan in (
        clean,  # sharp
        blur(clean, 0.3 * ones),
        blur(clean, ones) + 0.15 * noise,  # noisy
        (blur(clean, 0.8 * ones) + 0.2 * noise > 0.5).float(),  # nothing but ends
    ):
        assert look_at(scan, made, MOST).fits.float().mean() < 0.05
    assert not look_at(0.01 * noise, 0.0 * clean, MOST).fits.any()  # nothing to be seen
    for most in (0.0, 2.25):
        assert look_at(clean[:0], made[:0], most).fits.shape == (0,)


@pytest.mark.parametrize("clipped", [0.0, 1.0])
def test_a_quick_look_lets_all_through_that_can_be_fitted_and_hardly_any_with_much_noise(
    clean: torch.Tensor, clipped: float
) -> None:
    for low, high, share in ((0.0, 0.1, 1.0), (0.4, 1.5, 0.0)):
        recipe = NoiseRecipe((0.3, 2.0), (low, high), clipped=clipped)
        quick = may_have_little_noise(recipe.apply(clean, torch.Generator().manual_seed(1))[0])
        assert quick.float().mean() == pytest.approx(share, abs=0.05)
    assert not may_have_little_noise(torch.zeros(3, 28, 28)).any()
    assert not may_have_little_noise(torch.full((3, 28, 28), torch.nan)).any()


def test_what_is_kept_for_later_can_be_used_outside_of_inference(clean: torch.Tensor, made: torch.Tensor) -> None:
    with torch.inference_mode():
        look_at(blur(clean, torch.ones(len(clean))), made, 1.37)
    sigma = torch.ones(3, requires_grad=True)
    blur_matrices(sigma, 1.37 * 1.2).square().sum().backward()
    assert sigma.grad is not None
    assert not cosine_transform().is_inference()
    torch.testing.assert_close(cosine_transform() @ cosine_transform().T, torch.eye(28), atol=1e-5, rtol=0.0)
