"""How many levels of grey a set has."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from denoise_batch.bundle import SHIPPED_FOLDER, read_bundle
from denoise_batch.denoiser import Denoiser
from denoise_batch.extra_columns import ExtraColumns
from denoise_batch.images import Polarity, Tone, find_tone, levels_lines, to_model_input
from denoise_batch.images.few_levels import FewLevels, find_few_levels
from denoise_batch.noise import to_few_levels

if TYPE_CHECKING:
    from conftest import Pixels


def scans(digits: tuple[Pixels, Pixels], levels: int) -> Pixels:
    """300 digits of so many levels, 8 bits, light on dark."""
    images = torch.from_numpy(digits[0].reshape(-1, 28, 28) / np.float32(255))
    few = to_few_levels(images, torch.full((len(images),), levels))
    return np.rint(255 * few.numpy()).astype(np.uint8).reshape(-1, 784)


@pytest.mark.parametrize("dtype", ["uint8", "float32", "float64"])
@pytest.mark.parametrize("levels", [2, 3, 4, 16])
def test_few_levels_are_counted(digits: tuple[Pixels, Pixels], levels: int, dtype: str) -> None:
    pixels = scans(digits, levels)
    given = pixels if dtype == "uint8" else (pixels / 255).astype(dtype)
    assert find_few_levels(given) == FewLevels(levels)
    dark = 255 - given if dtype == "uint8" else 1 - given
    tone = find_tone(dark, Polarity.DARK_ON_LIGHT)
    assert tone == Tone(levels=FewLevels(levels))
    assert tone.even(dark, Polarity.DARK_ON_LIGHT)[0] is dark
    stray = pixels.copy()
    stray[:40, :5] = np.arange(5, 205).reshape(40, 5)  # a few pixels in a thousand images prove nothing
    assert find_few_levels(stray) == FewLevels(levels)


def test_many_levels_are_not_few(digits: tuple[Pixels, Pixels]) -> None:
    pixels = digits[0].reshape(-1, 784)
    assert find_few_levels(pixels) is None
    assert find_few_levels(pixels / np.float32(255)) is None
    assert find_few_levels(scans(digits, 17)) is None
    assert find_few_levels(np.concatenate([scans(digits, 2), pixels])) is None
    assert find_few_levels(np.concatenate([pixels, scans(digits, 2)]) / np.float32(255)) is None
    assert find_few_levels(scans(digits, 2) / 127.5) is None  # beyond full ink
    assert find_few_levels(np.full((300, 784), np.nan)) is None
    assert find_few_levels(scans(digits, 2)[:7]) is None  # too few to tell
    assert find_few_levels(np.full((300, 784), 255, np.uint8)) is None  # with nothing on them
    assert find_few_levels(np.zeros((0, 784), np.uint8)) is None


@pytest.mark.parametrize("polarity", [Polarity.LIGHT_ON_DARK, Polarity.DARK_ON_LIGHT])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize(("paper", "ink"), [(0, 240), (0, 178), (26, 255), (40, 200), (0, 1 / 3), (0.1, 0.7)])
@pytest.mark.parametrize("levels", [2, 4])
def test_paper_and_ink_of_few_levels_become_none_and_full_exactly(
    digits: tuple[Pixels, Pixels], levels: int, paper: float, ink: float, dtype: str, polarity: Polarity
) -> None:
    """The model knows such scans by pixels that are exactly 0 and 1."""
    if dtype == "uint8" and ink < 1:
        pytest.skip("no bytes")
    shares = scans(digits, levels).astype(np.float32) / 255
    scale = 255 if ink > 1 else 1
    given = (paper + (ink - paper) * shares) / np.float32(scale)
    if dtype == "uint8":
        given = np.rint(255 * given).astype(np.uint8)
    shown = given if polarity is Polarity.LIGHT_ON_DARK else (~given if dtype == "uint8" else 1 - given)
    tone = find_tone(shown, polarity)
    assert tone.level_count == levels
    even, pale = tone.even(shown, polarity)
    assert even.dtype == shown.dtype
    light = to_model_input(even, polarity)
    assert (light == 0).mean() == pytest.approx((shares == 0).mean())
    assert (light == 1).mean() == pytest.approx((shares == 1).mean())
    np.testing.assert_allclose(light, shares, atol=0.004)
    assert pale is not None
    np.testing.assert_allclose(pale, (ink - paper) / (scale - paper), atol=0.003)
    assert tone.facts().get("background") == (None if paper == 0 else pytest.approx(paper / scale, abs=0.001))
    assert len(tone.lines()) == (paper > 0) + (ink < scale)
    assert Tone.from_json(json.loads(json.dumps(tone.to_json()))) == tone


def test_levels_are_kept_and_said() -> None:
    tone = Tone(levels=FewLevels(2))
    assert Tone.from_json(json.loads(json.dumps(tone.to_json()))) == tone
    assert Tone.from_json({"background": None, "ink": None}) == Tone()  # a plan of before
    assert tone.facts() == {"levels": 2}
    assert tone.lines() == []
    assert "2 levels of grey" in levels_lines(2)[0]
    assert levels_lines(None) == []


@pytest.mark.parametrize("ink", [255, 240, 178])
def test_what_is_expected_of_one_bit_is_right_however_dark_its_ink_is(digits: tuple[Pixels, Pixels], ink: int) -> None:
    clean = digits[0].reshape(-1, 784) / np.float32(255)
    scan = np.where(clean > 0.5, ink, 0).astype(np.uint8)
    even, pale = find_tone(scan, Polarity.LIGHT_ON_DARK).even(scan, Polarity.LIGHT_ON_DARK)
    assert (pale is None) == (ink == 255)
    model = Denoiser(read_bundle(SHIPPED_FOLDER.with_name("few-levels")), device="cpu")
    made = model.run(even, ExtraColumns(quality=True))
    assert made.psnr is not None
    true = -10 * np.log10(np.square(made.pixels - clean).mean(axis=1))
    scanned = -10 * np.log10(np.square(even / np.float32(255) - clean).mean(axis=1))
    assert true.mean() > scanned.mean() + 0.5
    assert made.psnr.mean() == pytest.approx(true.mean(), abs=3)
