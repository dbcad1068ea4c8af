"""Pictures: right size, complete, the same bytes twice, and made of what was handed in."""

from __future__ import annotations

import io
import math
import os
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from denoise_batch.evaluation.figures import (
    Section,
    Tile,
    contact_sheet,
    metric_curves,
    seed_figure_digits,
    seed_figure_levels,
)
from denoise_batch.evaluation.protocol import CONDITIONS
from denoise_batch.evaluation.result import LINEAR, Evaluation, ImageErrors, Row, Scores

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def digits() -> np.ndarray:
    drawn = np.zeros((4, 28, 28), np.uint8)
    for index, image in enumerate(drawn):
        image[4:24, 6 + 4 * index : 10 + 4 * index] = 255
    return drawn


def _clip(noisy: np.ndarray) -> np.ndarray:
    return noisy.clip(0.0, 1.0)


def _size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        image.load()
        return image.size


def test_the_seeds_first_figure_has_its_size_and_six_rising_levels(tmp_path: Path, digits: np.ndarray) -> None:
    seen: list[np.ndarray] = []

    def denoise(noisy: np.ndarray) -> np.ndarray:
        seen.append(noisy)
        return noisy.clip(0.0, 1.0)

    seed_figure_levels(denoise, digits[0], tmp_path / "new" / "levels.png")
    assert _size(tmp_path / "new" / "levels.png") == (1200, 400)
    assert seen[0].shape == (6, 784)
    assert seen[0].dtype == np.float32
    np.testing.assert_allclose(-seen[0].min(axis=1), [0.0, 0.4, 0.8, 1.2, 1.6, 2.0], atol=0.05)


def test_pictures_are_the_same_bytes_twice_and_nothing_else_is_left(tmp_path: Path, digits: np.ndarray) -> None:
    for name in ("a.png", "b.png"):
        seed_figure_digits(_clip, digits, tmp_path / name)
    content = (tmp_path / "a.png").read_bytes()
    assert content == (tmp_path / "b.png").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]
    with Image.open(io.BytesIO(content)) as image:
        assert "Software" not in image.info
        assert image.size == (800, 600)


def test_a_users_own_style_changes_nothing(tmp_path: Path, digits: np.ndarray) -> None:
    import matplotlib as mpl

    seed_figure_digits(_clip, digits, tmp_path / "a.png")
    with mpl.rc_context({"font.size": 30, "figure.facecolor": "red"}):
        seed_figure_digits(_clip, digits, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def _evaluation(*models: str) -> Evaluation:
    rows = [
        Row(
            condition.key,
            method,
            None,
            Scores(math.inf if condition.key == "i=0" else 20.0 - level, 20.0, 0.5, 0.2, 0.1, 0.9),
        )
        for level, condition in enumerate(CONDITIONS)
        for method in ("noisy", "median", "gaussian", "wiener", LINEAR, *models)
        if method != LINEAR or condition.key not in {"mixture", "uint8", "i=0"}
    ]
    described = tuple({"method": model, "architecture": model, "sha256": ""} for model in models)
    return Evaluation(10, "bars", 0, 0.05, None, described, tuple(rows))


@pytest.mark.parametrize("models", [(), ("bounds-unet",), ("bounds-unet", "seed")])
def test_curves_are_drawn_with_infinities_and_without_models(tmp_path: Path, models: tuple[str, ...]) -> None:
    found = _evaluation(*models)
    metric_curves(found, tmp_path / "curves.png")
    assert _size(tmp_path / "curves.png") == (1100, 460)
    generator = np.random.default_rng(0)
    squared = {method: generator.random(10) for method in found.methods if method != LINEAR}
    levels = generator.random(10, np.float32), np.full(10, 0.5, np.float32)  # seven of eight groups are empty
    metric_curves(replace(found, single=ImageErrors(squared, levels)), tmp_path / "more.png")
    assert _size(tmp_path / "more.png") == (1100, 840)


@pytest.mark.parametrize("name", ["denoise-model", "a-long-name-" * 10])
def test_a_legend_of_many_models_is_wrapped(tmp_path: Path, name: str) -> None:
    metric_curves(_evaluation(*(f"{name}-{number}" for number in range(7))), tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        pixels = np.asarray(image.convert("L"))
    height, width = pixels.shape
    assert width == 1100
    assert height > 460
    below = pixels[height - (100 + height - 460) + 40 :]  # what lies under the axes' own names of the levels
    assert (below[:, :8] == 255).all()
    assert (below[:, -8:] == 255).all()
    lines = np.flatnonzero(np.diff((below < 255).any(axis=1).astype(int)) == 1)  # where one begins
    assert len(lines) == 1 + round((height - 460) / 19)


def test_a_model_whose_psnr_is_infinite_is_marked(tmp_path: Path) -> None:
    """There is nothing else of its colour above the first level: the curve has no point there."""
    metric_curves(_evaluation("bounds-unet"), tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    corner = pixels[41:70, 70:110]
    assert (np.abs(corner - (31, 119, 180)).sum(axis=2) < 60).any()


def test_a_contact_sheet_shows_each_picture_over_its_range(tmp_path: Path) -> None:
    grey = np.full((28, 28), 0.5, np.float32)
    wide = np.full((28, 28), -2.0, np.float32)
    wide[:, 14:] = 3.0
    tiles = (Tile("row 0", (wide, grey)), Tile("row 1", (wide, grey)))
    sections = [Section("random rows", tiles), Section("worst rows", tiles[:1])]
    contact_sheet(tmp_path / "a.png", sections, columns=("noisy", "denoised"), title="t", own_range=(True, False))
    with Image.open(tmp_path / "a.png") as image:
        pixels = np.asarray(image.convert("L"))
    # The first tile begins at x = 0.3 + 1.3, y = 0.95 inches, at 100 dots an inch; the second picture is 1.07 further.
    assert pixels[145, 170] == 0
    assert pixels[145, 250] == 255
    assert pixels[145, 320] == pytest.approx(128, abs=2)


def test_a_picture_that_is_the_same_all_over_is_shown_as_bright_as_it_is(tmp_path: Path) -> None:
    """Over its own range, which is none, matplotlib would show white paper black."""
    tiles = tuple(Tile("row", (np.full((28, 28), value, np.float32),)) for value in (0.0, 0.5, 1.0))
    contact_sheet(tmp_path / "a.png", [Section("rows", tiles)], columns=("image",), title="t", own_range=(True,))
    with Image.open(tmp_path / "a.png") as image:
        pixels = np.asarray(image.convert("L"))
    found = [int(pixels[145, 30 + 237 * place + 180]) for place in range(3)]
    assert found == pytest.approx([0, 128, 255], abs=2)


def test_a_picture_that_is_not_there_leaves_its_place_empty(tmp_path: Path) -> None:
    tile = Tile("row", (np.zeros((28, 28), np.float32), None))
    contact_sheet(
        tmp_path / "a.png", [Section("rows", (tile,))], columns=("a", "b"), title="t", own_range=(False, False)
    )
    with Image.open(tmp_path / "a.png") as image:
        pixels = np.asarray(image.convert("L"))
    assert (pixels[145, 200], pixels[145, 300]) == (0, 255)
    assert (pixels[145, 265:270] < 255).any()  # its frame


def test_single_pictures_stand_three_abreast(tmp_path: Path) -> None:
    tiles = tuple(Tile("row", (np.zeros((28, 28), np.float32),)) for _ in range(7))
    contact_sheet(tmp_path / "a.png", [Section("rows", tiles)], columns=("image",), title="x" * 500, own_range=(True,))
    width, height = _size(tmp_path / "a.png")
    assert width == pytest.approx(771, abs=2)
    assert height == pytest.approx((0.95 + 3 * 1.07 + 0.4) * 100, abs=2)


def test_names_of_any_bytes_are_drawn(tmp_path: Path) -> None:
    name = os.fsdecode(b"model-\xff")
    metric_curves(_evaluation(name), tmp_path / "curves.png")
    tile = Tile("row", (np.zeros((28, 28), np.float32),))
    contact_sheet(tmp_path / "a.png", [Section("rows", (tile,))], columns=("image",), title=name, own_range=(True,))
    metric_curves(_evaluation(r"model-\udcff"), tmp_path / "escaped.png")
    assert (tmp_path / "curves.png").read_bytes() == (tmp_path / "escaped.png").read_bytes()
