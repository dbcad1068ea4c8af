"""What is seen in a sample of clean images and noisy ones beside them: unusable, blank, or not of the same digits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from denoise_batch.digits import draw_digits
from denoise_batch.errors import ColumnError
from denoise_batch.images import PAIRED, Polarity, look_at_sample, pairs_belong_together
from denoise_batch.noise import SEED_LEVELS, degrade

Images = np.ndarray[Any, np.dtype[Any]]


def pairs(count: int, level: int, digit: int | None = None, seed: int = 0) -> tuple[Images, Images]:
    """Noisy (n, 784) float32 at a level of the seed's and clean (n, 784) uint8 drawn digits, of one kind or of all."""
    clean, labels = draw_digits(count if digit is None else 14 * count, seed=seed)
    if digit is not None:
        clean = clean[labels == digit][:count]
    assert len(clean) == count
    sigma, half_range = (torch.full((count,), value) for value in SEED_LEVELS[level])
    generator = torch.Generator().manual_seed(seed)
    noisy = degrade(torch.from_numpy(clean / np.float32(255)), sigma, half_range, generator)
    return noisy.numpy().reshape(count, 784), clean.reshape(count, 784)


def bad(*rows: int, of: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return np.isin(np.arange(of), rows)


@pytest.mark.parametrize("level", range(6))
@pytest.mark.parametrize("digit", [None, 1])
def test_pairs_of_any_noise_are_known_from_shuffled_ones(level: int, digit: int | None) -> None:
    for seed in range(3):
        noisy, clean = pairs(256, level, digit, seed)
        assert pairs_belong_together(noisy, clean) > PAIRED + 2
        assert pairs_belong_together(1 - noisy, clean) > PAIRED + 2
        assert pairs_belong_together(np.roll(noisy, 1, axis=0), clean) < PAIRED


def test_too_few_pairs_or_all_the_same_cannot_tell() -> None:
    noisy, clean = pairs(199, 0)
    assert pairs_belong_together(np.roll(noisy, 1, axis=0), clean) == np.inf
    one = np.tile(clean[:1], (300, 1))
    assert pairs_belong_together(one + np.random.default_rng(0).normal(size=one.shape), one) == np.inf
    blank = np.zeros((300, 784), np.uint8)
    assert pairs_belong_together(blank, blank) == np.inf


def test_cells_that_are_empty_do_not_count() -> None:
    noisy, clean = pairs(400, 3)
    clean[:100] = noisy[100:190] = 0
    assert pairs_belong_together(noisy, clean) > PAIRED
    clean[:220] = 0
    assert pairs_belong_together(noisy, clean) == np.inf


@pytest.mark.parametrize("polarity", [Polarity.AUTO, Polarity.EACH])
def test_shuffled_pairs_are_refused(polarity: Polarity) -> None:
    noisy, clean = pairs(300, 1)
    noisy = (noisy.clip(0, 1) * 255).astype(np.uint8)
    none = {"clean": bad(of=300), "scan": bad(of=300)}
    if polarity is Polarity.EACH:
        noisy[::2] = 255 - noisy[::2]
    found, notes = look_at_sample({"clean": clean, "scan": noisy}, none, polarity)
    assert (found, notes) == (Polarity.EACH if polarity is Polarity.EACH else Polarity.LIGHT_ON_DARK, [])
    with pytest.raises(ColumnError, match="'scan' are no more like those of 'clean' beside them") as caught:
        look_at_sample({"clean": clean, "scan": noisy[::-1]}, none, polarity)
    assert "300 looked at" in caught.value.message
    assert "another order" in caught.value.hint


def test_columns_with_unusable_rows_are_named() -> None:
    noisy, clean = pairs(8, 1)
    rows = {"clean": bad(2, of=10), "scan": bad(2, 7, of=10)}
    _, notes = look_at_sample({"clean": clean, "scan": noisy}, rows, Polarity.LIGHT_ON_DARK)
    assert notes[0] == (
        "note: 2 of 10 sampled rows hold no usable image in 'clean' (1) or 'scan' (2): such are left out"
    )


def test_images_that_show_nothing_are_told_from_half_of_them_on() -> None:
    _, clean = pairs(20, 0)
    clean[:10] = 0
    assert look_at_sample({"image": clean}, {"image": bad(of=20)}, Polarity.AUTO)[1] == []
    clean[10] = 0
    assert look_at_sample({"image": clean}, {"image": bad(of=20)}, Polarity.AUTO)[1] == [
        "note: 11 of 20 sampled images of column 'image' are of a single grey and show nothing"
    ]
