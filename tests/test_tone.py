"""How many levels of grey a set has."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from denoise_batch.images import Polarity, Tone, find_tone, levels_lines
from denoise_batch.images.tone import find_few_levels
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
    assert find_few_levels(given) == levels
    dark = 255 - given if dtype == "uint8" else 1 - given
    assert find_tone(dark, Polarity.DARK_ON_LIGHT).levels == levels
    stray = pixels.copy()
    stray[:40, :5] = np.arange(5, 205).reshape(40, 5)  # a few pixels in a thousand images prove nothing
    assert find_few_levels(stray) == levels


def test_many_levels_are_not_few(digits: tuple[Pixels, Pixels]) -> None:
    pixels = digits[0].reshape(-1, 784)
    assert find_few_levels(pixels) is None
    assert find_few_levels(pixels / np.float32(255)) is None
    assert find_few_levels(scans(digits, 17)) is None
    assert find_few_levels(np.concatenate([scans(digits, 2), pixels])) is None
    assert find_few_levels(scans(digits, 2) / 255 + 0.01) is None  # no 8 bits
    assert find_few_levels(np.full((300, 784), np.nan)) is None
    assert find_few_levels(scans(digits, 2)[:7]) is None  # too few to tell
    assert find_few_levels(np.full((300, 784), 255, np.uint8)) is None  # with nothing on them
    assert find_few_levels(np.zeros((0, 784), np.uint8)) is None


def test_ink_of_few_levels_is_full_unless_none_is(digits: tuple[Pixels, Pixels]) -> None:
    """Four levels of blurred strokes look pale one by one, but the darkest of the set is full ink."""
    pixels = scans(digits, 4)
    assert find_tone(pixels, Polarity.LIGHT_ON_DARK) == Tone(levels=4)
    pale = find_tone(pixels // 2, Polarity.LIGHT_ON_DARK)
    assert pale.levels == 4
    assert pale.ink is not None
    assert pale.ink.level == pytest.approx(0.5, abs=0.05)


def test_levels_are_kept_and_said() -> None:
    tone = Tone(levels=2)
    assert Tone.from_json(json.loads(json.dumps(tone.to_json()))) == tone
    assert Tone.from_json({"background": None, "ink": None}) == Tone()  # a plan of before
    assert tone.facts() == {"levels": 2}
    assert "2 levels of grey" in levels_lines(2)[0]
    assert levels_lines(None) == []
