"""When the images of an evaluation are called a sample; what else is said of them, test_evaluate.py says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from denoise_batch.errors import FlagError
from denoise_batch.evaluation.clean_images import load_clean_images
from denoise_batch.images import Polarity

if TYPE_CHECKING:
    from pathlib import Path

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
