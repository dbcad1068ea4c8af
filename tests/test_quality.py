"""Whether a model knows how good its images are: the figures themselves, and where an evaluation has them."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from denoise_batch import models
from denoise_batch.bundle import SHIPPED_FOLDER, read_bundle
from denoise_batch.bundle.saving import BundleCard, save_bundle
from denoise_batch.denoiser import Denoiser
from denoise_batch.evaluation import metrics
from denoise_batch.evaluation.evaluate import evaluate
from denoise_batch.evaluation.protocol import CONDITIONS, degrade_with_levels
from denoise_batch.evaluation.quality import quality_scores, rank_correlation
from denoise_batch.evaluation.table import format_table
from denoise_batch.extra_columns import ExtraColumns
from denoise_batch.models.pixel_groups import grouped
from denoise_batch.models.quality_head import MOST_PSNR, _lost, _together
from denoise_batch.noise import NoiseRecipe
from denoise_batch.precision import Precision

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("footers_read_here")


def test_figures_of_known_errors() -> None:
    true = np.array([10.0, 20.0, 30.0, 40.0])
    scores = quality_scores(
        true + np.array([1.0, 1.0, 1.0, 3.0]), true, np.array([0.1, 0.2, 0.3, 0.5]), np.array([0.1, 0.1, 0.3, 0.2])
    )
    assert (scores.bias, scores.error) == pytest.approx((1.5, math.sqrt(3.0)))
    assert scores.rank == pytest.approx(1.0)
    assert scores.level_error == pytest.approx(0.1)


def test_rank_correlation_is_spearmans() -> None:
    generator = np.random.default_rng(3)
    one = generator.integers(0, 40, 500).astype(np.float64)  # with ties
    other = one + generator.normal(0, 10, 500)
    assert rank_correlation(one, other) == pytest.approx(spearmanr(one, other).statistic)
    assert rank_correlation(one, -(one**3)) == pytest.approx(-1.0)
    assert math.isnan(rank_correlation(one, np.ones(500)))


def test_an_evaluation_has_them_for_models_that_tell(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = models.build("bounds-unet", {"width": 8, "deep": 8, "bottleneck": 16})
    save_bundle(tmp_path / "tells", network, BundleCard("bounds-unet", network.parameters_json))
    save_bundle(tmp_path / "seed", models.build("seed"), BundleCard("seed"))
    bundles = [read_bundle(tmp_path / "tells"), read_bundle(tmp_path / "seed")]
    images = np.zeros((12, 28, 28), np.uint8)
    images[:, 5:22, 10:14] = np.arange(100, 220, 10)[:, None, None]
    evaluation = evaluate(bundles, images)
    assert [row.condition for row in evaluation.quality] == [condition.key for condition in CONDITIONS]
    assert {row.method for row in evaluation.quality} == {"tells"}

    clean = images.astype(np.float32) / np.float32(255)
    noisy, levels = degrade_with_levels(clean, CONDITIONS[0])
    denoiser = Denoiser(bundles[0], device="cpu", precision=Precision.FLOAT32)
    told = denoiser.run(noisy.reshape(12, -1), ExtraColumns(quality=True))
    true = metrics.psnr_from_mse(metrics.mse(clean, told.pixels.reshape(clean.shape)))
    assert told.psnr is not None
    assert told.noise_level is not None
    scores = evaluation.quality[0].scores
    assert scores.bias == pytest.approx((told.psnr - true).mean(), abs=1e-4)
    assert scores.level_error == pytest.approx(np.abs(told.noise_level - levels).mean(), abs=1e-6)

    text = format_table(evaluation)
    assert text.count("rank correlation of expected and true PSNR") == 2
    assert max(map(len, text.splitlines())) <= 120
    content = json.loads(json.dumps(evaluation.to_json(), allow_nan=False))
    assert content["conditions"][0]["quality"][0]["bias"] == pytest.approx(scores.bias)


def test_what_was_taken_away_shows_in_rows_and_columns() -> None:
    """Lines that no pixel shows: half as strong again as the noise, and a thirteenth of the image."""
    random = np.random.default_rng(0)
    apart = random.normal(0.2, 0.5, (200, 28, 28)).astype(np.float32)
    lines = apart.copy()
    lines[:, 9] += 0.75
    lines[:, 3:25, 20] += 0.75
    found = {}
    for name, images in (("noise", apart), ("lines", lines), ("faint", lines / 10.0)):
        groups = grouped(torch.from_numpy(images)[:, None])
        lost = torch.stack(_lost(groups, groups.square().mean(dim=(1, 2)).sqrt()), dim=1).numpy()
        mean, deviation = images.mean(axis=(1, 2), keepdims=True), images.std(axis=(1, 2)) + 0.02
        for axis, column in ((2, 0), (1, 1)):
            means = (images - mean).mean(axis=axis) * np.sqrt(28) / deviation[:, None]
            pairs = (means[:, 1:] + means[:, :-1]).max(axis=1) / np.sqrt(8)
            np.testing.assert_allclose(lost[:, column], pairs, rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(lost[:, column + 2], np.sqrt((means**2).mean(axis=1)), rtol=1e-3)
        found[name] = lost
    for column in range(4):
        assert (found["lines"][:, column] > np.quantile(found["noise"][:, column], 0.98)).mean() > 0.8
    share = found["faint"] / found["lines"]  # nearly as clear at a tenth of the strength, noise and all
    assert share.min() > 0.7
    assert share.max() < 0.8
    nothing = torch.stack(_lost(torch.zeros((3, 196, 4)), torch.zeros(3)), dim=1)
    assert torch.equal(nothing, torch.zeros((3, 4)))


def test_what_was_taken_away_shows_along_its_own_direction() -> None:
    random = np.random.default_rng(0)
    noise = random.normal(0.2, 0.5, (500, 28, 28)).astype(np.float32)
    stroke = np.zeros((28, 28), np.float32)
    np.fill_diagonal(stroke, 1.0)
    across = np.zeros((28, 28), np.float32)
    across[11] = 1.0
    kinds = {"noise": noise, "faint": noise / 100.0, "none": 0.0 * noise[:2]}
    kinds |= {"across": across[None], "down": across.T[None], "diagonal": stroke[None], "other": stroke[None, ::-1]}
    found = {}
    for name, images in kinds.items():
        groups = grouped(torch.from_numpy(images.copy())[:, None])
        found[name] = torch.stack(_together(groups, groups.square().mean(dim=(1, 2)).sqrt()), dim=1).numpy()
    assert np.abs(found["noise"].mean(axis=0)).max() < 0.15
    assert np.abs(found["noise"].std(axis=0) - 1.0).max() < 0.1
    assert np.abs(found["faint"]).max() < 0.5
    assert not found["none"].any()
    for place, name in enumerate(("across", "down", "diagonal", "other")):
        assert found[name][0, place] > 15.0
        assert np.abs(np.delete(found[name][0], place)).max() < 1.0


def test_what_is_expected_lies_where_a_psnr_can_be() -> None:
    """Of images that no training has, the head alone would say -25 or 48 dB."""
    denoiser = Denoiser(read_bundle(SHIPPED_FOLDER), device="cpu", precision=Precision.FLOAT32)
    odd = np.repeat(np.array([-0.3, 0.0, 1.0, 15.9, -15.9], np.float32)[:, None], 784, axis=1)
    told = denoiser.run(odd, ExtraColumns(quality=True)).psnr
    assert told is not None
    assert told.min() >= 0.0
    assert told.max() <= 45.0


def test_the_shipped_model_knows_when_it_is_out_of_its_depth() -> None:
    """What it expects of images that are no digits is about what they have, of empty ones that they are right."""
    denoiser = Denoiser(read_bundle(SHIPPED_FOLDER), device="cpu")
    y, x = np.mgrid[:28, :28]
    stripes = np.stack([x // width % 2 + 0 * y for width in range(2, 8)] * 8)
    checks = np.stack([(x // width + y // width) % 2 for width in range(2, 8)] * 8)
    for content, most in ((stripes, 3.0), (checks, 3.0), (np.ones((48, 28, 28)), 5.0)):
        clean = torch.from_numpy(content.astype(np.float32))
        told, true = expected_and_true(denoiser, clean)
        assert true < 10.0
        assert abs(told - true) < most
    told, true = expected_and_true(denoiser, torch.zeros((48, 28, 28)))
    assert told > 35.0
    assert true > 44.0
    # Of a printed frame it makes an empty image, too.
    frame = torch.zeros((48, 28, 28))
    frame[:, 2:26, 2:26] = 1.0
    frame[:, 3:25, 3:25] = 0.0
    told, true = expected_and_true(denoiser, frame)
    assert true < 11.0
    assert told < 18.0
    # Nor does anything else say so of one of pure black and white.
    told, true = expected_and_true(denoiser, frame, NoiseRecipe(clean=1.0, clipped=1.0))
    assert true < 11.0
    assert told < 16.0


def expected_and_true(denoiser: Denoiser, clean: torch.Tensor, noise: NoiseRecipe | None = None) -> tuple[float, float]:
    """Mean PSNR in dB of images, under the seed's mixture of noise or another."""
    noisy = (noise or NoiseRecipe()).apply(clean, torch.Generator().manual_seed(2))[0]
    told = denoiser.run(noisy.reshape(-1, 784).numpy(), ExtraColumns(quality=True))
    true = metrics.psnr_from_mse(metrics.mse(clean.numpy(), told.pixels.reshape(clean.shape)))
    assert told.psnr is not None
    return float(told.psnr.mean()), float(np.minimum(true, MOST_PSNR).mean())
