"""What is fitted to its scan, how, and what is left alone; with digits that are drawn, so that no data is needed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from denoise_batch import denoiser as module
from denoise_batch.bundle import SHIPPED_FOLDER, read_bundle
from denoise_batch.denoiser import Denoiser
from denoise_batch.digits.drawn_digits import draw_digits
from denoise_batch.extra_columns import ExtraColumns
from denoise_batch.images import Polarity
from denoise_batch.models.data_consistency import _second_derivative, fitted
from denoise_batch.models.fitted_quality import expected_of
from denoise_batch.models.fitting import AT_A_TIME, Candidates
from denoise_batch.models.scans import look_at
from denoise_batch.noise import NoiseRecipe, blur, blur_matrices, clip_to_uint8
from denoise_batch.precision import Precision

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

QUALITY = ExtraColumns(quality=True)


@pytest.fixture(scope="module")
def clean() -> Tensor:
    return torch.from_numpy(draw_digits(160, seed=5)[0].reshape(-1, 28, 28).astype(np.float32) / np.float32(255))


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    return Denoiser(read_bundle(SHIPPED_FOLDER), device="cpu", precision=Precision.FLOAT32)


@pytest.fixture(scope="module")
def network_alone() -> Denoiser:
    """What the network makes, and nothing fitted."""
    return Denoiser(read_bundle(SHIPPED_FOLDER), device="cpu", precision=Precision.FLOAT32, fit=False)


def degraded(clean: Tensor, recipe: NoiseRecipe) -> Tensor:
    return recipe.draw(len(clean), torch.Generator().manual_seed(3)).degrade(clean)[0]


def psnr(made: np.ndarray, clean: Tensor) -> float:
    return float(-10 * np.log10(np.square(made.reshape(-1, 784) - clean.reshape(-1, 784).numpy()).mean()))


def network_made(network_alone: Denoiser, noisy: Tensor) -> Tensor:
    return torch.from_numpy(network_alone(flat(noisy)).copy()).view(-1, 28, 28)


def flat(images: Tensor) -> np.ndarray:
    return images.reshape(len(images), 784).numpy()


@pytest.mark.parametrize(
    ("recipe", "gain"),
    [
        (NoiseRecipe((1.0, 1.0), (0.0, 0.0)), 5.0),
        (NoiseRecipe((0.5, 2.0), (0.0, 0.0), clipped=1.0), 2.0),
        (NoiseRecipe((0.6, 0.6), (0.02, 0.02), clipped=1.0), 2.0),
        (NoiseRecipe((1.0, 1.0), (0.05, 0.05)), 0.3),
        (NoiseRecipe((0.0, 2.0), (0.0, 1.5), impulse=1.0), 1.5),
        (NoiseRecipe((0.0, 2.0), (0.0, 1.5), impulse=1.0, clipped=1.0), 1.5),
    ],
)
def test_what_little_noise_hides_comes_back(
    denoiser: Denoiser, network_alone: Denoiser, clean: Tensor, recipe: NoiseRecipe, gain: float
) -> None:
    """By so many dB more than the network sees, and it is expected."""
    noisy = flat(degraded(clean, recipe))
    made = denoiser.run(noisy, QUALITY)
    assert psnr(made.pixels, clean) > psnr(network_alone(noisy), clean) + gain
    assert made.psnr is not None
    true = -10 * np.log10(np.square(made.pixels - flat(clean)).mean(axis=1).clip(1e-9))
    # Drawn digits are other ones than those that this was learnt from.
    assert abs(np.mean(made.psnr - true.clip(max=45))) < 2.5


@pytest.mark.parametrize(
    "recipe",
    [
        NoiseRecipe((0.0, 2.0), (0.2, 1.5)),
        NoiseRecipe((0.0, 2.0), (0.25, 1.5), gaussian=1.0, clipped=1.0),
        NoiseRecipe((0.0, 0.0), (0.05, 0.05)),
        NoiseRecipe((0.0, 0.0), (0.0, 0.0)),
    ],
)
def test_heavy_noise_and_what_is_sharp_are_left_to_the_network(
    denoiser: Denoiser, network_alone: Denoiser, clean: Tensor, recipe: NoiseRecipe
) -> None:
    """To the last bit, and with what it expects, but for a rare image."""
    noisy = flat(degraded(clean, recipe))
    one, other = denoiser.run(noisy, QUALITY), network_alone.run(noisy, QUALITY)
    alike = (one.pixels == other.pixels).all(axis=1)
    assert alike.mean() > 0.97
    assert one.psnr is not None
    assert other.psnr is not None
    np.testing.assert_array_equal(one.psnr[alike], other.psnr[alike])
    assert psnr(one.pixels, clean) > psnr(other.pixels, clean) - 0.02


def out_of_focus(clean: Tensor) -> Tensor:
    return functional.avg_pool2d(clean[:, None], 3, 1, 1)[:, 0]


def across_alone(clean: Tensor) -> Tensor:
    return clean @ blur_matrices(torch.tensor([1.2])).transpose(1, 2)


def on_a_slope(clean: Tensor) -> Tensor:
    return blur(clean, torch.full((len(clean),), 0.7)) + 0.05 * torch.linspace(-1.0, 1.0, 28)[:, None]


def with_speckle(clean: Tensor) -> Tensor:
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    return blur(clean, torch.full((len(clean),), 0.7)) * (1.0 + 0.05 * noise)


def enlarged(clean: Tensor) -> Tensor:
    return functional.interpolate(functional.avg_pool2d(clean[:, None], 2), size=28, mode="bilinear")[:, 0]


def two_blurs(clean: Tensor) -> Tensor:
    upper, lower = (blur(clean, torch.full((len(clean),), sigma)) for sigma in (0.8, 1.2))
    return torch.cat([upper[:, :14], lower[:, 14:]], dim=1)


def blurred_beyond_what_was_learnt(clean: Tensor) -> Tensor:
    return blur(clean, torch.full((len(clean),), 3.0))


def with_dust(clean: Tensor) -> Tensor:
    places = torch.rand((len(clean), 784), generator=torch.Generator().manual_seed(0)).topk(6, dim=1).indices
    return clean.flatten(1).scatter(1, places, 1.0).view(clean.shape)


def enlarged_with_dust(clean: Tensor) -> Tensor:
    return with_dust(enlarged(clean))


def two_blurs_with_dust(clean: Tensor) -> Tensor:
    return with_dust(two_blurs(clean))


def in_a_printed_box(clean: Tensor) -> Tensor:
    scans = blur(clean, torch.full((len(clean),), 0.8))
    scans[:, 1] = scans[:, -2] = scans[:, :, 1] = scans[:, :, -2] = 1.0
    return scans


@pytest.mark.parametrize(
    ("scanned", "gain"),
    [
        (out_of_focus, 0.0),
        (across_alone, 0.0),
        (on_a_slope, 0.0),
        (with_speckle, -0.1),
        (enlarged, -0.6),
        (two_blurs, -1.6),
        (enlarged_with_dust, -2.0),
        (two_blurs_with_dust, -1.6),
        (blurred_beyond_what_was_learnt, -0.6),
        (in_a_printed_box, -0.2),
    ],
)
def test_scans_that_are_otherwise_blurred_do_not_get_much_worse(
    denoiser: Denoiser,
    network_alone: Denoiser,
    clean: Tensor,
    scanned: Callable[[Tensor], Tensor],
    gain: float,
) -> None:
    noisy = flat(clip_to_uint8(scanned(clean)))
    assert psnr(denoiser(noisy), clean) > psnr(network_alone(noisy), clean) + gain


def test_an_image_comes_out_alike_whatever_stands_beside_it(denoiser: Denoiser, clean: Tensor) -> None:
    """Whether all of a batch are fitted, or few, and whether it is asked how good they are."""
    faint = flat(degraded(clean, NoiseRecipe((1.0, 1.0), (0.02, 0.02))))
    heavy = flat(degraded(clean, NoiseRecipe((1.0, 1.0), (0.9, 0.9))))
    mixed = heavy.copy()
    mixed[::20] = faint[::20]
    alone, beside, told = denoiser(faint), denoiser(mixed), denoiser.run(mixed, QUALITY).pixels
    np.testing.assert_allclose(beside[::20], alone[::20], atol=2e-4)
    np.testing.assert_allclose(told, beside, atol=2e-4)
    np.testing.assert_allclose(
        np.delete(beside, np.s_[::20], axis=0), denoiser(np.delete(mixed, np.s_[::20], axis=0)), atol=1e-5
    )


def test_what_waits_to_be_fitted_takes_no_more_memory_for_more_images(
    clean: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches are fitted together, but not all there are."""
    sizes, fits = [], module.fits

    def counted(waiting: list[Candidates], most_blur: float) -> Any:
        sizes.append(sum(len(part.rows) for part in waiting))
        return fits(waiting, most_blur)

    monkeypatch.setattr(module, "fits", counted)
    noisy = np.tile(flat(degraded(clean, NoiseRecipe((1.0, 1.0), (0.02, 0.02)))), (9, 1))
    small = Denoiser(read_bundle(SHIPPED_FOLDER), device="cpu", precision=Precision.FLOAT32, batch=100)
    made = small(noisy)
    assert max(sizes) < AT_A_TIME + 100
    assert sum(sizes) > 0.9 * len(noisy)
    np.testing.assert_allclose(made[-160:], made[:160], atol=1e-3)


def test_dark_on_light_is_fitted_alike(denoiser: Denoiser, clean: Tensor) -> None:
    noisy = (degraded(clean, NoiseRecipe((1.0, 1.0), (0.0, 0.0), clipped=1.0)) * 255).round().to(torch.uint8)
    one = denoiser.denoise(flat(noisy), Polarity.LIGHT_ON_DARK, "uint8").pixels
    other = denoiser.denoise(255 - flat(noisy), Polarity.DARK_ON_LIGHT, "uint8").pixels
    assert np.abs(one.astype(int) - (255 - other.astype(int))).max() <= 1


def test_the_blur_and_the_noise_are_found(network_alone: Denoiser, clean: Tensor) -> None:
    sigma = torch.linspace(0.5, 2.0, len(clean))
    noise = 0.01 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    noisy = blur(clean, sigma) + noise
    made = network_made(network_alone, noisy)
    error = (made - clean).square().mean(dim=(1, 2))
    scans = look_at(noisy, made, 2.25)
    assert (scans.blur.sqrt() - sigma[:, None]).abs().mean() < 0.2
    assert scans.fits.float().mean() > 0.95
    fit = fitted(scans, -10.0 * error.log10())
    assert fit.trusted.float().mean() > 0.95
    assert (fit.blur - sigma[:, None]).abs().mean() < 0.05
    assert fit.noise.median() == pytest.approx(0.01, rel=0.3)
    assert not fit.lost.any()
    assert (fit.clean - clean).square().mean() < 0.8 * error.mean()
    assert fit.alike.abs().mean() < 0.2  # noise is left over


def test_blurs_down_and_across_are_told_apart(clean: Tensor) -> None:
    down, across = blur_matrices(torch.tensor([1.5, 0.6]))
    noisy = down @ clean @ across.T
    fit = fitted(look_at(noisy, clean.clamp(0.01, 0.99), 2.25), torch.full((len(clean),), 30.0))
    assert fit.blur[:, 0].median() == pytest.approx(1.5, abs=0.15)
    assert fit.blur[:, 1].median() == pytest.approx(0.6, abs=0.15)


def test_what_another_blur_leaves_over_is_alike_in_neighbours(network_alone: Denoiser, clean: Tensor) -> None:
    noise = 0.02 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    means = []
    for noisy in (blur(clean, torch.full((len(clean),), 0.8)) + noise, enlarged(clean)):
        scans = look_at(noisy, network_made(network_alone, noisy), 2.25)
        scans = scans.rows(scans.fits.nonzero()[:, 0])
        fit = fitted(scans, torch.full((len(scans.noise),), 24.0))
        assert fit.alike.abs().max() <= 1.0
        means.append(float(fit.alike.mean()))
    assert means[1] > means[0] + 0.2


def test_a_fit_that_came_to_no_number_changes_nothing(clean: Tensor) -> None:
    mean = clean.clamp(0.01, 0.99)
    expected = torch.full((len(clean),), 31.0)
    fit = fitted(look_at(blur(clean, torch.full((len(clean),), 0.8)), mean, 2.25), expected)
    assert not torch.equal(expected_of(mean, fit, expected).alone, expected)
    for value in (torch.nan, torch.inf):
        psnr = expected_of(mean, fit._replace(noise=torch.full_like(fit.noise, value)), expected)
        assert torch.isfinite(psnr.alone).all()
        assert torch.isfinite(psnr.fitted).all()
    nothing = fit._replace(left=torch.full_like(fit.left, torch.nan))
    torch.testing.assert_close(expected_of(mean, nothing, expected).alone, expected)


def test_struck_pixels_say_nothing(network_alone: Denoiser, clean: Tensor) -> None:
    blurred = blur(clean, torch.full((len(clean),), 0.8))
    struck = torch.rand(clean.shape, generator=torch.Generator().manual_seed(0)) < 0.1
    noisy = torch.where(struck, (torch.arange(28) % 2).float(), blurred)
    made = network_made(network_alone, noisy)
    scans = look_at(noisy, made, 2.25)
    assert scans.struck.float().mean() > 0.95
    scans, truth, made = scans.rows(scans.struck.nonzero()[:, 0]), clean[scans.struck], made[scans.struck]
    error = (made - truth).square().mean(dim=(1, 2))
    fit = fitted(scans, -10.0 * error.log10())
    assert bool((fit.lost > 0.05).all())
    assert (fit.clean - truth).square().mean() < 0.8 * error.mean()
    assert not look_at(blurred, clean.clamp(0.01, 0.99), 2.25).lost.any()


def test_odd_images_come_back_as_numbers(denoiser: Denoiser) -> None:
    odd = np.zeros((6, 784), np.float32)
    odd[1], odd[2], odd[3, 390], odd[4] = 1.0, 0.5, 1.0, -0.2
    odd[5] = np.tile(np.eye(28, dtype=np.float32).ravel(), 1)
    made = denoiser.run(odd, QUALITY)
    assert np.isfinite(made.pixels).all()
    assert made.pixels.min() >= 0.0
    assert made.pixels.max() <= 1.0
    assert made.psnr is not None
    assert np.isfinite(made.psnr).all()


def test_half_the_second_derivative_is_what_a_blur_changes_by_its_variance(clean: Tensor) -> None:
    one, other = (blur_matrices(torch.tensor([variance**0.5]), 3.0)[0] for variance in (1.45, 1.55))
    numeric = (other @ clean - one @ clean) / 0.1
    middle = blur_matrices(torch.tensor([1.5**0.5]), 3.0)[0] @ clean
    torch.testing.assert_close(_second_derivative(clean.device) @ middle, numeric, atol=0.01, rtol=0.05)


def test_models_of_pairs_and_of_other_makes_are_left_alone(tmp_path: Path) -> None:
    """Their scans may be anything; what is not to be undone stays."""
    shipped = read_bundle(SHIPPED_FOLDER)
    assert shipped.most_blur == 2.25
    assert read_bundle(SHIPPED_FOLDER.parent / "seed").most_blur is None
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes((SHIPPED_FOLDER / "model.safetensors").read_bytes())
    content = json.loads((SHIPPED_FOLDER / "model.json").read_text())
    for noise, expected in (
        ({"source": "noisy column"}, None),
        ({"sigma": [0.0, 0.0]}, 0.0),
        ({"sigma": [0.0, 900.0]}, 3.0),
        ({"sigma": [0.0, "2"]}, None),
        ({"sigma": [0.0, True]}, None),
        ({"sigma": [0, 10**400]}, 3.0),
        ({"sigma": [0.0, -1]}, None),
        ({"sigma": 2}, None),
        ({}, None),
    ):
        (folder / "model.json").write_text(json.dumps(content | {"noise": noise}))
        assert read_bundle(folder).most_blur == expected
