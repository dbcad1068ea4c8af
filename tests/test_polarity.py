"""Which end of the grey scale is ink: of a set, of each image, and in what a unit makes of both."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from denoise_batch.digits import draw_digits
from denoise_batch.errors import ColumnError
from denoise_batch.evaluation.clean_images import load_clean_images
from denoise_batch.images import (
    Polarity,
    dark_on_light,
    decode,
    find_polarity,
    from_model_output,
    to_model_input,
    turned,
)
from denoise_batch.inference.report import InferReport
from denoise_batch.noise import NoiseRecipe
from denoise_batch.training.data import load_rows, open_parquet
from denoise_batch.training.recipes import TrainSettings

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import DenoiseFile

MARGIN = 6
NUMBERS = ("files", "quarantined", "rows_done", "seconds", "rate", "resumed_units", "failed_attempts", "skipped_files")


def blocks(count: int, seed: int = 0) -> np.ndarray:
    """(count, 784) uint8: dark, with something light in the middle."""
    images = np.zeros((count, 28, 28), np.uint8)
    images[:, 8:20, 8:20] = np.random.default_rng(seed).integers(0, 256, (count, 12, 12))
    return images.reshape(count, 784)


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(20, 60),
    noise=st.floats(0, 2),
    flipped=st.booleans(),
    clipped=st.booleans(),
    seed=st.integers(0, 99),
)
def test_polarity_is_found_through_noise(count: int, noise: float, flipped: bool, clipped: bool, seed: int) -> None:
    clean = to_model_input(blocks(count, seed), Polarity.LIGHT_ON_DARK)
    polarity = Polarity.DARK_ON_LIGHT if flipped else Polarity.LIGHT_ON_DARK
    pixels = to_model_input(clean, polarity)
    pixels = pixels + np.random.default_rng(seed).uniform(-noise, noise, pixels.shape).astype(np.float32)
    if clipped:
        pixels = np.rint(pixels.clip(0, 1) * 255).astype(np.uint8)
    assert find_polarity(pixels) is polarity


def test_polarity_that_is_not_clear_cut() -> None:
    light = blocks(20)
    grey = np.full((20, 784), 128, np.uint8)
    standardised = (light / 255).astype(np.float32) * 2 - 1
    for pixels, said in (
        (np.concatenate([light, 255 - light[:10]]), "mixed: 33% of the images looked at are dark-on-light"),
        (grey, "not clear-cut"),
        (standardised, "not clear-cut"),
    ):
        with pytest.raises(ColumnError, match=f"polarity is {said}") as caught:
            find_polarity(pixels)
        assert "--polarity each" in caught.value.hint


def test_polarity_of_blank_images_and_of_none() -> None:
    assert find_polarity(np.zeros((3, 784), np.uint8)) is Polarity.LIGHT_ON_DARK
    assert find_polarity(np.full((3, 784), 255, np.uint8)) is Polarity.DARK_ON_LIGHT
    assert find_polarity(np.zeros((0, 784), np.float32)) is Polarity.LIGHT_ON_DARK


def test_model_input_and_back() -> None:
    images = blocks(3)
    light = to_model_input(images, Polarity.LIGHT_ON_DARK)
    dark = to_model_input(255 - images, Polarity.DARK_ON_LIGHT)
    assert light.dtype == dark.dtype == np.float32
    assert np.abs(light - dark).max() < 1e-6
    assert to_model_input(light, Polarity.LIGHT_ON_DARK) is light
    kept = light.copy()
    back = to_model_input(light, Polarity.DARK_ON_LIGHT)
    assert np.array_equal(light, kept)
    assert np.array_equal(from_model_output(light, Polarity.DARK_ON_LIGHT, "uint8"), 255 - images)
    assert np.abs(back - (1 - light)).max() < 1e-6
    with pytest.raises(ValueError, match="not found yet"):
        to_model_input(images, Polarity.AUTO)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(0, 5),
    level=st.floats(-0.5, 1.5),
    number=st.sampled_from(["uint8", "float32"]),
    seed=st.integers(0, 9),
)
def test_the_margins_majority_tells(count: int, level: float, number: str, seed: int) -> None:
    pixels = np.random.default_rng(seed).normal(level, 0.3, (count, 784)).astype(np.float32)
    if number == "uint8":
        pixels = np.rint(pixels.clip(0, 1) * 255).astype(np.uint8)
    light = pixels.reshape(-1, 28, 28) > (127 if number == "uint8" else 0.5)
    inner = light[:, MARGIN:-MARGIN, MARGIN:-MARGIN].sum(axis=(1, 2))
    expected = light.sum(axis=(1, 2)) - inner > (784 - (28 - 2 * MARGIN) ** 2) / 2
    assert np.array_equal(dark_on_light(pixels), expected)
    apart = np.asfortranarray(pixels)
    assert np.array_equal(dark_on_light(apart), expected)


@pytest.mark.parametrize("kind", [{}, {"gaussian": 1.0}, {"impulse": 1.0}, {"noiseless": 1.0}, {"clean": 1.0}])
@pytest.mark.parametrize("clipped", [0.0, 1.0])
def test_the_heaviest_noise_leaves_each_image_its_polarity(kind: dict[str, float], clipped: float) -> None:
    clean = torch.from_numpy(draw_digits(4000, 3)[0]).float() / 255
    levels = (1.2, 1.4) if "impulse" in kind else (1.5, 2.0)  # salt and pepper in two fifths of the pixels
    recipe = NoiseRecipe(sigma=(0.0, 2.5), half_range=levels, clipped=clipped, **kind)
    generator = torch.Generator().manual_seed(5)
    for given_, light in ((clean, False), (1 - clean, True)):
        noisy = recipe.apply(given_, generator)[0].numpy().reshape(-1, 784)
        if clipped:
            noisy = np.rint(noisy * 255).astype(np.uint8)
        assert (dark_on_light(noisy) == light).all()


def test_turning_some_images() -> None:
    images, rows = blocks(4), np.array([False, True, False, True])
    for pixels, most in ((images, 255), (images.astype(np.float32) / 255, 1)):
        kept = pixels.copy()
        made = turned(pixels, rows)
        assert made.dtype == pixels.dtype
        assert np.array_equal(made[~rows], pixels[~rows])
        assert np.array_equal(made[rows], most - pixels[rows])
        assert np.array_equal(pixels, kept)
        assert turned(pixels, np.zeros(4, bool)) is pixels
        assert np.allclose(to_model_input(turned(pixels, rows), Polarity.EACH), images / np.float32(255), atol=1e-6)
    with pytest.raises(ValueError, match="turned back"):
        from_model_output(images / np.float32(255), Polarity.EACH, "uint8")


def _mixed(count: int) -> tuple[np.ndarray, np.ndarray]:
    """(count, 28, 28) uint8 of which every third is dark on light, and which."""
    light = np.arange(count) % 3 == 1
    return turned(draw_digits(count, 1)[0].reshape(count, 784), light).reshape(count, 28, 28), light


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_a_unit_goes_by_each_image(tmp_path: Path, write_images: Any, denoise_file: DenoiseFile, dtype: str) -> None:
    images, light = _mixed(300)
    bad = np.arange(300) == 7  # one of those that are dark on light: a bad row is neither
    path = write_images(tmp_path / "in.parquet", images, "list of uint8", bad=bad)

    def ink(pixels: np.ndarray) -> np.ndarray:
        assert not dark_on_light(pixels).any()
        return pixels * np.float32(0.75)

    made = denoise_file(path, tmp_path, ink, polarity=Polarity.EACH, dtype=dtype, chunk_rows=64)
    assert sum(receipt.dark_on_light for receipt in made.receipts) == 99
    table = pq.read_table(made.files[0])
    found = decode(table["denoised"].combine_chunks(), made.options.output)
    shown = to_model_input(images.reshape(300, 784), Polarity.EACH) * np.float32(0.75)
    expected = from_model_output(shown, Polarity.LIGHT_ON_DARK, dtype)
    assert np.array_equal(np.flatnonzero(found.bad), [7])
    assert np.allclose(found.pixels[~bad], turned(expected, light)[~bad], atol=1e-6)


def test_images_that_look_the_other_way_round_are_counted(
    tmp_path: Path, write_images: Any, denoise_file: DenoiseFile
) -> None:
    path = write_images(tmp_path / "in.parquet", _mixed(300)[0])
    made = denoise_file(path, tmp_path, lambda pixels: pixels.clip(0, 1), polarity=Polarity.LIGHT_ON_DARK)
    assert sum(receipt.dark_on_light for receipt in made.receipts) == 100


def _summary(polarity: Polarity, light: int, **changes: Any) -> str:
    numbers = dict.fromkeys(field.name for field in fields(InferReport)) | dict.fromkeys(NUMBERS, 0)
    told = {"rows_in": 1000, "rows_out": 1000, "bad_rows": {"null": 10}, "types_changed": [], "tone": [], "skipped": []}
    report = InferReport(**numbers | told | {"polarity": polarity.value, "dark_on_light": light} | changes)  # type: ignore[arg-type]
    return "\n".join(report.summary_lines())


def test_the_summary_names_what_was_taken_the_other_way_round() -> None:
    assert "look" not in _summary(Polarity.LIGHT_ON_DARK, 0) + _summary(Polarity.DARK_ON_LIGHT, 990)
    light, dark = _summary(Polarity.LIGHT_ON_DARK, 3), _summary(Polarity.DARK_ON_LIGHT, 989)
    assert "note: 3 of 990 rows look dark-on-light, but are taken for light-on-dark" in light
    assert "note: 1 of 990 rows looks light-on-dark, but is taken for dark-on-light" in dark
    each = _summary(Polarity.EACH, 400)
    assert "each image's own polarity: 400 dark-on-light" in each
    assert "note" not in each


def test_a_finished_run_says_the_same_of_its_output() -> None:
    again = _summary(Polarity.LIGHT_ON_DARK, 3, already_complete=True)
    for said in ("note: 3 of 990 rows look dark-on-light", "10 bad rows (10 null)", "it is complete already"):
        assert said in again
    assert "images/s" not in again


@pytest.mark.usefixtures("footers_read_here")
def test_an_evaluation_says_what_it_takes_the_other_way(tmp_path: Path, write_images: Any) -> None:
    light = np.arange(200) % 40 == 1
    images = turned(draw_digits(200, 1)[0].reshape(200, 784), light).reshape(200, 28, 28)
    path = str(write_images(tmp_path / "in.parquet", images))
    (note,) = load_clean_images(path).notes
    assert note.startswith("note: 5 of 200 sampled rows of column 'image' look dark-on-light")
    each = load_clean_images(path, polarity=Polarity.EACH)
    assert not each.notes
    assert each.description.endswith("each image's own polarity")
    assert not dark_on_light(each.images.reshape(200, 784)).any()


@pytest.mark.usefixtures("footers_read_here")
def test_training_goes_by_each_image(tmp_path: Path, write_images: Any) -> None:
    images, light = _mixed(60)
    noisy = images.astype(np.float32) / 255 + np.random.default_rng(0).uniform(-2, 2, images.shape).astype(np.float32)
    path = write_images(tmp_path / "in.parquet", noisy, "list of float32")
    table = pq.read_table(path)
    clean = pq.read_table(write_images(tmp_path / "clean.parquet", images))
    pq.write_table(table.append_column("clean", clean["image"]), path)
    given_ = TrainSettings(
        output=tmp_path / "model", data=str(path), column="clean", noisy_column="image", polarity="each"
    )
    data = open_parquet(given_)
    upright, other = load_rows(data, data.pieces)
    assert np.array_equal(upright, turned(images.reshape(60, 784), light).reshape(60, 28, 28))
    assert other is not None
    assert np.allclose(other, np.where(light[:, None, None], 1 - noisy, noisy), atol=1e-6)
