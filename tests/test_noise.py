"""The seed's degradation against scipy, and how levels and noise are drawn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from denoise_batch.errors import FlagError
from denoise_batch.noise import (
    MOST_GRAIN,
    SEED_LEVELS,
    NoiseKind,
    NoiseRecipe,
    add_uniform_noise,
    blur,
    blur_matrices,
    clip_to_uint8,
    degrade,
    to_few_levels,
)


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


def _levels(recipe: NoiseRecipe, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = recipe.draw(count, torch.Generator().manual_seed(3))
    return draw.sigma, draw.half_range


def test_levels_lie_in_their_ranges() -> None:
    sigma, half_range = _levels(NoiseRecipe(), 5000)
    assert 0.0 <= sigma.min() < 0.01
    assert 1.99 < sigma.max() <= 2.0
    assert 0.01 <= half_range.min() < 0.02
    assert 1.49 < half_range.max() <= 1.5
    fixed = _levels(NoiseRecipe(sigma=(1.0, 1.0), half_range=(0.4, 0.4)), 3)
    assert torch.equal(fixed[0], torch.ones(3))
    assert torch.equal(fixed[1], torch.full((3,), 0.4))


def test_the_share_of_clipped_images() -> None:
    noisy, _, _ = NoiseRecipe(half_range=(1.0, 1.0), clipped=0.25).apply(torch.from_numpy(_images(2000)))
    clipped = [bool((image.min() >= 0) and (image.max() <= 1)) for image in noisy]
    assert np.mean(clipped) == pytest.approx(0.25, abs=0.05)
    some = noisy[clipped.index(True)]
    assert torch.equal(clip_to_uint8(some), some)


@pytest.mark.parametrize(("noiseless", "clipped"), [(0.0, 0.0), (0.0, 1.0), (0.05, 0.25)])
def test_what_is_drawn_stays_what_it_was(noiseless: float, clipped: float) -> None:
    """Published tables follow from these draws, in this order and no others between them."""
    images, generator = torch.from_numpy(_images(200)), torch.Generator().manual_seed(11)
    levels = torch.rand((2, 200), generator=generator)
    sigma, half_range = 2.0 * levels[0], 0.01 + 1.49 * levels[1]
    if noiseless:
        half_range = torch.where(torch.rand(200, generator=generator) < noiseless, torch.zeros(200), half_range)
    uniform = torch.rand((200, 28, 28), generator=generator)
    noisy = blur(images, sigma) + (2.0 * uniform - 1.0) * half_range[:, None, None]
    if clipped:
        chosen = torch.rand(200, generator=generator) < clipped
        noisy = torch.where(chosen[:, None, None], clip_to_uint8(noisy), noisy)
    recipe = NoiseRecipe(noiseless=noiseless, clipped=clipped)
    found = recipe.apply(images, torch.Generator().manual_seed(11))
    assert all(torch.equal(one, other) for one, other in zip(found, (noisy, sigma, half_range), strict=True))


def _of_kind(kind: NoiseKind, share: str, **fields: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Clean, noisy and level of 300 images of one kind, r = 1.2."""
    clean = torch.from_numpy(_images(300))
    recipe = NoiseRecipe(sigma=(1.0, 1.0), half_range=(1.2, 1.2), **{share: 1.0}, **fields)  # type: ignore[arg-type]
    draw = recipe.draw(300, torch.Generator().manual_seed(4))
    assert draw.kind is not None
    assert set(draw.kind.tolist()) == {int(kind)}
    return clean, *draw.degrade(clean)


def test_gaussian_noise_has_the_uniform_ones_deviation() -> None:
    clean, noisy, level = _of_kind(NoiseKind.GAUSSIAN, "gaussian")
    noise = (noisy - blur(clean, torch.ones(300))).flatten()
    assert float(noise.mean()) == pytest.approx(0.0, abs=0.01)
    assert float(noise.std()) == pytest.approx(1.2 / 3**0.5, rel=0.01)
    assert float((noise / noise.std()).pow(4).mean()) == pytest.approx(3.0, abs=0.1)  # uniform: 1.8
    assert torch.allclose(level, torch.full((300,), 1.2 / 3**0.5), rtol=0.15)
    lowest = NoiseRecipe(gaussian=1.0).draw(1, torch.Generator().manual_seed(0))
    lowest.uniform.zero_()
    assert torch.isfinite(lowest.degrade(clean[:1])[0]).all()


def test_salt_and_pepper_strikes_a_share_of_the_pixels() -> None:
    clean, noisy, level = _of_kind(NoiseKind.IMPULSE, "impulse")
    blurred = blur(clean, torch.ones(300))
    struck = noisy != blurred
    assert float(struck.float().mean()) == pytest.approx(0.4, abs=0.01)
    assert set(noisy[struck].tolist()) == {0.0, 1.0}
    assert float(noisy[struck].mean()) == pytest.approx(0.5, abs=0.02)
    assert torch.allclose(level, (noisy - blurred).square().mean(dim=(1, 2)).sqrt())


def test_grain_is_alike_in_neighbouring_pixels_and_has_gaussian_noises_deviation_everywhere() -> None:
    clean = torch.zeros(4000, 28, 28)
    draw = NoiseRecipe((0.0, 0.0), (0.6, 0.6), grain=1.0).draw(4000, torch.Generator().manual_seed(4))
    assert draw.grain is not None
    assert float(draw.grain.min()) == pytest.approx(0.3, abs=0.01)
    assert float(draw.grain.max()) == pytest.approx(MOST_GRAIN, abs=0.01)
    noise, _ = draw.degrade(clean)
    deviation = 0.6 / 3**0.5
    assert float(noise.mean()) == pytest.approx(0.0, abs=0.01)
    # At the edges as well, where the blur is reflected.
    torch.testing.assert_close(noise.std(dim=0), torch.full((28, 28), deviation), rtol=0.07, atol=0.0)
    assert float((noise / deviation).pow(4).mean()) == pytest.approx(3.0, abs=0.1)
    alike = (noise[:, 5:23, 5:22] * noise[:, 5:23, 6:23]).mean(dim=(1, 2)) / deviation**2
    # Blurred by s, the correlation of white noise d pixels apart is exp(-d² / 4 s²), where pixels are fine enough.
    wide = draw.grain > 0.8
    expected = (-0.25 / draw.grain[wide].square()).exp()
    assert float((alike[wide] - expected).mean()) == pytest.approx(0.0, abs=0.02)
    assert float(alike[draw.grain < 0.35].mean()) == pytest.approx(0.0, abs=0.05)


def test_grain_changes_nothing_of_other_kinds() -> None:
    images = torch.from_numpy(_images(200))
    recipe = NoiseRecipe((0.5, 1.0), (0.1, 0.4), gaussian=0.3, impulse=0.2, grain=0.5)
    draw = recipe.draw(200, torch.Generator().manual_seed(5))
    assert draw.kind is not None
    others = draw.kind != NoiseKind.GRAIN
    with_grain, _ = draw.degrade(images)
    without, _ = replace(draw, kind=torch.where(others, draw.kind, NoiseKind.GAUSSIAN)).degrade(images)
    torch.testing.assert_close(with_grain[others], without[others])
    assert float((with_grain - without)[~others].abs().amax(dim=(1, 2)).min()) > 0.0
    part = draw[50:90]
    torch.testing.assert_close(part.degrade(images[50:90])[0], with_grain[50:90])


def test_blur_alone_and_nothing_at_all() -> None:
    clean, noisy, level = _of_kind(NoiseKind.BLUR, "noiseless")
    assert torch.allclose(noisy, blur(clean, torch.ones(300)))
    assert not level.any()
    clean, noisy, level = _of_kind(NoiseKind.CLEAN, "clean")
    assert torch.allclose(noisy, clean)
    assert not level.any()


def test_the_level_is_that_before_clipping() -> None:
    _, noisy, level = _of_kind(NoiseKind.GAUSSIAN, "gaussian", clipped=1.0)
    assert noisy.min() >= 0
    assert noisy.max() <= 1
    assert float(level.mean()) == pytest.approx(1.2 / 3**0.5, rel=0.02)


def test_kinds_come_in_their_shares() -> None:
    recipe = NoiseRecipe(noiseless=0.1, clean=0.2, gaussian=0.3, impulse=0.15, grain=0.05)
    kind = recipe.draw(20_000, torch.Generator().manual_seed(9)).kind
    assert kind is not None
    shares = torch.bincount(kind, minlength=6) / 20_000
    assert shares.tolist() == pytest.approx([0.2, 0.1, 0.2, 0.3, 0.15, 0.05], abs=0.015)
    assert NoiseRecipe.from_json(recipe.to_json()) == recipe


@pytest.mark.parametrize("levels", [2, 3, 16])
def test_few_levels_are_evenly_spaced_and_begin_at_the_threshold(levels: int) -> None:
    images = torch.linspace(-0.5, 1.5, 784).view(1, 28, 28)
    few = to_few_levels(images, torch.tensor([levels]))
    steps = levels - 1
    assert few.unique().tolist() == pytest.approx([step / steps for step in range(levels)])
    assert float((few - images.clamp(0.0, 1.0)).abs().max()) <= 0.5 / steps + 1e-6  # to the nearest
    early = to_few_levels(images, torch.tensor([levels]), 0.25)
    assert float(images[early > 0].min()) == pytest.approx(0.25 / steps, abs=0.003)
    assert torch.equal(to_few_levels(few, torch.tensor([levels]), 0.7), few)


def test_images_of_few_levels_come_in_their_shares() -> None:
    images = torch.from_numpy(_images(500))
    recipe = NoiseRecipe((0.0, 1.0), (0.0, 0.3), few_levels=0.5)
    draw = recipe.draw(4000, torch.Generator().manual_seed(3))
    assert draw.levels is not None
    assert draw.threshold is not None
    counts = torch.bincount(draw.levels.long(), minlength=17) / 4000
    assert float(counts[0]) == pytest.approx(0.5, abs=0.03)
    assert float(counts[2]) == pytest.approx(0.3, abs=0.03)
    assert float(counts[3:].min()) > 0
    assert float(counts[1]) == 0
    noisy, level = draw[:500].degrade(images)
    found = torch.tensor([len(image.unique()) for image in noisy])
    few = draw.levels[:500] > 0
    assert bool((found[few] <= draw.levels[:500][few]).all())
    assert int(found[~few].min()) > 100
    # All that is drawn without them is the same, and the noise level is that before levels are lost.
    others = replace(recipe, few_levels=0.0).draw(4000, torch.Generator().manual_seed(3))
    plain, same_level = others[:500].degrade(images)
    torch.testing.assert_close(plain[~few], noisy[~few])
    torch.testing.assert_close(same_level, level)
    dithered = (draw.threshold.flatten(1).std(dim=1) > 0).float().mean()
    assert float(dithered) == pytest.approx(0.15, abs=0.02)
    assert float(draw.threshold.mean()) == pytest.approx(0.5, abs=0.01)


def test_the_seed_levels() -> None:
    assert np.allclose(SEED_LEVELS, [(0, 0), (0.5, 0.4), (1, 0.8), (1.5, 1.2), (2, 1.6), (2.5, 2)])


def test_recipe_survives_json() -> None:
    recipe = NoiseRecipe((0.5, 1.0), (0.1, 0.2), 0.3)
    assert NoiseRecipe.from_json(recipe.to_json()) == recipe
    assert NoiseRecipe.from_json({"sigma": [0, 1], "half_range": [0, 1]}).clipped == 0.0


@pytest.mark.parametrize(
    "fields",
    [
        {"sigma": (2.0, 1.0)},
        {"sigma": (-1.0, 1.0)},
        {"half_range": (0.0, float("nan"))},
        {"clipped": 1.5},
        {"few_levels": -0.1},
        {"grain": 1.1},
        {"gaussian": -0.1},
        {"gaussian": 0.7, "impulse": 0.4},
    ],
)
def test_impossible_levels_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(FlagError):
        NoiseRecipe(**fields)  # type: ignore[arg-type]
