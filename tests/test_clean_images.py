"""When the images of an evaluation are called a sample; what else is said of them, test_evaluate.py says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from denoise_batch.errors import FlagError
from denoise_batch.evaluation.clean_images import load_clean_images
from denoise_batch.images import ImageColumn, Layout, Polarity, encode, find_tone

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

pytestmark = pytest.mark.usefixtures("footers_read_here")


@pytest.mark.parametrize(
    ("rows", "bad", "limit", "taken", "sample"),
    [
        (100, 0, 100, 100, False),
        (101, 0, 100, 100, True),
        (101, 1, 100, 99, True),
        (300, 0, 100, 100, True),
        (300, 0, None, 300, False),
    ],
)
def test_what_leaves_images_out_is_a_sample(
    tmp_path: Path, digits: Any, write_images: Any, rows: int, bad: int, limit: int | None, taken: int, sample: bool
) -> None:
    path = write_images(tmp_path / "in.parquet", digits[0][:rows], bad=np.arange(rows) < bad)
    loaded = load_clean_images(str(path), limit=limit)
    assert len(loaded.images) == taken
    assert loaded.description == f"column 'image' of {path}" + ", a sample" * sample


@pytest.mark.parametrize("limit", [None, 500, 33])
def test_of_rows_in_some_order_every_kind_is_met_as_often(tmp_path: Path, limit: int | None) -> None:
    """In one row group, sorted: a run of neighbours would be of one digit or two."""
    labels = np.repeat(np.arange(10), 1200)
    images = np.zeros((len(labels), 784), np.uint8)
    images[:, 300:400] = 200
    table = pa.table({"image": pa.array([image.tobytes() for image in images], pa.binary(784)), "label": labels})
    pq.write_table(table, tmp_path / "in.parquet")
    loaded = load_clean_images(str(tmp_path / "in.parquet"), limit=limit)
    assert loaded.labels is not None
    assert len(loaded.images) == (limit or 10_000)
    shares = np.bincount(loaded.labels, minlength=10) / len(loaded.labels)
    np.testing.assert_allclose(shares, 0.1, atol=0.035)


@pytest.mark.parametrize(
    ("data", "given", "message"),
    [
        (None, {"column": "image"}, "--column image, but no --data"),
        (None, {"polarity": Polarity.EACH}, "--polarity each, but no --data"),
        ("in.parquet", {"mnist_folder": "digits"}, "both --mnist and --data are given"),
    ],
)
def test_flags_that_would_say_nothing_are_refused(data: str | None, given: Any, message: str) -> None:
    with pytest.raises(FlagError) as caught:
        load_clean_images(data, **given)
    assert caught.value.message == message


def _write_pairs(path: Path, clean: NDArray[Any], noisy: NDArray[np.float32], dtype: str, dark: bool) -> str:
    """Both columns in 8 bits, or the noisy one in floats; dark on light if need be."""
    columns = {}
    for name, images, kind in (("clean", clean, "uint8"), ("image", noisy, dtype)):
        layout, type_ = (
            (Layout.BINARY, pa.binary(784)) if kind == "uint8" else (Layout.LIST, pa.list_(pa.float32(), 784))
        )
        shown = (1 - images if dark else images).astype(np.float32)
        columns[name] = encode(shown, None, ImageColumn(name, layout, kind, type_))
    pq.write_table(pa.table(columns), path)
    return str(path)


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("polarity", ["light-on-dark", "dark-on-light", "each"])
def test_noisy_images_are_shown_as_infer_shows_them(tmp_path: Path, digits: Any, dtype: str, polarity: str) -> None:
    """White paper, full ink: of bytes cut off at the paper, of floats not."""
    clean = 0.6 * digits[0].reshape(-1, 784) / np.float32(255)
    noise = np.random.default_rng(0).normal(0.0, 0.06, clean.shape)
    noisy = (0.2 + 0.8 * clean + noise).astype(np.float32)
    given = np.rint(255 * noisy.clip(0, 1)).astype(np.uint8) if dtype == "uint8" else noisy
    if dtype == "uint8":
        noisy = given / np.float32(255)  # which has no half steps that dark on light are rounded the other way
    path = _write_pairs(tmp_path / "a.parquet", clean, noisy, dtype, polarity != "light-on-dark")
    loaded = load_clean_images(path, noisy_column="image", polarity=Polarity(polarity))
    tone = find_tone(given, Polarity.LIGHT_ON_DARK)
    assert tone.background == pytest.approx(0.2, abs=0.01)
    even, ink = tone.even(given, Polarity.LIGHT_ON_DARK)
    assert loaded.evened is not None
    assert loaded.evened.ink is not None
    assert ink is not None
    scale = 255 if dtype == "uint8" else 1
    np.testing.assert_allclose(loaded.evened.images.reshape(-1, 784), even / np.float32(scale), atol=1e-4)
    np.testing.assert_allclose(loaded.evened.ink, ink, rtol=1e-3)
    assert loaded.evened.images.min() == 0.0 if dtype == "uint8" else loaded.evened.images.min() < -0.2
    assert loaded.noisy is not None
    np.testing.assert_allclose(loaded.noisy.reshape(-1, 784), given / np.float32(scale), atol=1e-6)  # as they are
    assert [note.split(",")[0] for note in loaded.notes] == [
        "note: in column 'image' the background is grey",
        "note: in column 'image' the ink is pale",
    ]
    for_pairs = load_clean_images(path, noisy_column="image", own_noise=True, polarity=Polarity(polarity))
    assert (for_pairs.evened, for_pairs.notes) == (None, ())


def test_noisy_images_that_are_white_and_black_stay_as_they_are(tmp_path: Path, digits: Any) -> None:
    clean = digits[0].reshape(-1, 784) / np.float32(255)
    noisy = clean + np.random.default_rng(0).normal(0.0, 0.06, clean.shape).astype(np.float32)
    loaded = load_clean_images(_write_pairs(tmp_path / "a.parquet", clean, noisy, "uint8", False), noisy_column="image")
    assert (loaded.evened, loaded.notes) == (None, ())
