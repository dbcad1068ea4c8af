"""Ink that is not full: found in a set through noise and blur, shown as full, and given back as pale as it was."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from denoise_batch.digits import draw_digits
from denoise_batch.evaluation.protocol import CONDITIONS, Condition, degrade_images
from denoise_batch.extra_columns import Denoised
from denoise_batch.images import WHITE_AND_BLACK, Polarity, Tone, find_tone, from_model_output, to_model_input
from denoise_batch.images.ink import LEVELS, Ink, find_ink, ink_lines, likelihoods, with_ink
from denoise_batch.noise import blur

LIGHT, DARK = Polarity.LIGHT_ON_DARK, Polarity.DARK_ON_LIGHT
DIGITS = draw_digits(256, seed=4)[0].reshape(-1, 784).astype(np.float32) / np.float32(255)


def scans(ink: float | np.ndarray, noise: float = 0.06, sigma: float = 0.0) -> np.ndarray:
    """(256, 784) float32, 1 is full ink."""
    images = torch.from_numpy(DIGITS).reshape(-1, 28, 28)
    blurred = blur(images, torch.full((len(images),), sigma)).reshape(-1, 784).numpy()
    return (ink * blurred + np.random.default_rng(0).normal(0, noise, DIGITS.shape)).astype(np.float32)


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("polarity", [LIGHT, DARK])
@pytest.mark.parametrize("sigma", [0.0, 1.0])
@pytest.mark.parametrize("level", [0.8, 0.6, 0.4])
def test_pale_ink_is_found_and_shown_as_full(level: float, sigma: float, polarity: Polarity, dtype: str) -> None:
    pixels = from_model_output(scans(level, sigma=sigma), polarity, dtype)
    ink = find_ink(pixels, polarity)
    assert ink is not None
    assert ink.level == pytest.approx(level, rel=0.08 if sigma else 0.04)
    assert np.median(ink.of(pixels, polarity)) == pytest.approx(level, rel=0.08 if sigma else 0.05)
    assert find_ink(with_ink(pixels, polarity, 1 / ink.of(pixels, polarity)), polarity) is None


def test_each_image_may_have_its_own_ink() -> None:
    generator = np.random.default_rng(1)
    levels = np.where(generator.random(len(DIGITS)) < 0.5, 1.0, generator.uniform(0.3, 0.8, len(DIGITS)))
    pixels = scans(levels[:, None])
    ink = find_ink(pixels, LIGHT)
    assert ink is not None
    assert not ink.is_one
    found = ink.of(pixels, LIGHT)
    assert np.mean(np.abs(np.log(found / levels)) < 0.1) > 0.9
    assert (found[levels == 1.0] == 1.0).mean() > 0.95  # to the last bit: a clean digit stays one


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("condition", CONDITIONS, ids=lambda condition: condition.key)
def test_full_ink_is_left_through_every_noise(condition: Condition, dtype: str) -> None:
    """What `evaluate` measures, its levels beyond the training's range among it."""
    noisy = degrade_images(DIGITS.reshape(-1, 28, 28), condition, seed=3).reshape(-1, 784)
    assert find_tone(from_model_output(noisy, LIGHT, dtype), LIGHT) == WHITE_AND_BLACK


def test_what_says_nothing_of_ink_finds_none() -> None:
    assert find_ink(np.zeros((0, 784), np.uint8), LIGHT) is None
    assert find_ink(np.zeros((64, 784), np.uint8), LIGHT) is None
    for noise in (0.02, 0.1, 0.5):
        assert find_ink(np.random.default_rng(0).normal(0, noise, (64, 784)).astype(np.float32), LIGHT) is None
    assert find_ink(np.full((64, 784), np.float32(3e38)), LIGHT) is None


def test_few_pale_images_are_found_only_where_they_are_sure() -> None:
    levels = np.ones(len(DIGITS))
    levels[:32] = 0.5
    ink = find_ink(scans(levels[:, None]), LIGHT)
    assert ink is not None
    assert ink.shares[0] == pytest.approx(7 / 8, abs=0.03)
    levels[1:] = 1.0
    assert find_ink(scans(levels[:, None]), LIGHT) is None  # one of 256 may be anything


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("polarity", [LIGHT, DARK])
def test_ink_is_scaled_from_the_background(polarity: Polarity, dtype: str) -> None:
    light = np.array([[0.0] * 392 + [0.5] * 392, [0.0] * 392 + [1.0] * 392], np.float32)
    pixels = from_model_output(light, polarity, dtype)
    scaled = with_ink(pixels, polarity, np.array([1.5, 0.5], np.float32))
    assert scaled.dtype == pixels.dtype
    expected = light * np.array([[1.5], [0.5]], np.float32)
    np.testing.assert_allclose(to_model_input(scaled, polarity), expected, atol=0.006)
    again = with_ink(pixels, polarity, np.array([3.0, 1.0], np.float32))
    if dtype == "uint8":  # cut off, not gone round
        np.testing.assert_array_equal(
            again[0], from_model_output((light[:1] > 0).astype(np.float32), polarity, dtype)[0]
        )
    np.testing.assert_array_equal(again[1], pixels[1])


def test_what_is_expected_is_of_the_pale_image() -> None:
    """Errors are as much smaller as the ink is paler: 6 dB less for half of it."""
    levels = np.array([1.0, 0.5], np.float32)
    made = Denoised(np.ones((2, 784), np.float32), np.array([20.0, 43.0], np.float32), np.array([0.2, 0.2], np.float32))
    pale = made.in_ink(levels, LIGHT)
    np.testing.assert_allclose(pale.pixels[:, 0], levels)
    assert pale.psnr == pytest.approx([20.0, 45.0])
    assert pale.noise_level == pytest.approx([0.2, 0.1])
    assert Denoised(made.pixels).in_ink(levels, LIGHT).psnr is None


def test_grey_paper_and_pale_ink_are_found_together() -> None:
    pixels = from_model_output(0.15 + 0.85 * scans(0.6, noise=0.03), DARK, "uint8")
    tone = find_tone(pixels, DARK)
    assert tone.facts() == {"background": pytest.approx(0.15, abs=0.01), "ink": pytest.approx(0.6, rel=0.04)}
    even, ink = tone.even(pixels, DARK)
    assert ink is not None
    assert np.abs(to_model_input(even, DARK) - DIGITS).mean() < 0.04
    assert [("grey" in line, "pale" in line) for line in tone.lines()] == [(True, False), (False, True)]
    assert Tone.from_json(json.loads(json.dumps(tone.to_json()))) == tone
    assert find_tone(np.concatenate([pixels, ~pixels]), Polarity.EACH).facts() == pytest.approx(tone.facts(), abs=0.02)


def test_white_and_black_is_left_alone() -> None:
    pixels = from_model_output(scans(1.0), DARK, "uint8")
    assert WHITE_AND_BLACK.even(pixels, DARK)[0] is pixels
    assert WHITE_AND_BLACK.even(pixels, DARK)[1] is None
    assert (WHITE_AND_BLACK.lines(), WHITE_AND_BLACK.facts()) == ([], {})
    assert Tone.from_json(WHITE_AND_BLACK.to_json()) == WHITE_AND_BLACK


def test_what_is_said_of_ink() -> None:
    share = np.eye(len(LEVELS))
    assert "71% of full ink" in ink_lines(Ink(tuple(share[6])))[0]
    assert "25% of the images" in ink_lines(Ink(tuple(0.75 * share[0] + 0.25 * share[6])))[0]
    assert ink_lines(None) == []


def test_likelihoods_do_not_depend_on_the_images_beside() -> None:
    pixels = scans(0.7)
    alone = np.concatenate([likelihoods(pixels[i : i + 1], LIGHT) for i in range(3)])
    np.testing.assert_allclose(likelihoods(pixels, LIGHT)[:3], alone, rtol=1e-3, atol=1e-9)
