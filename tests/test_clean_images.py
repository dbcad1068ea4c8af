"""When the images of an evaluation are called a sample; what else is said of them, test_evaluate.py says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from denoise_batch.evaluation.clean_images import load_clean_images

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("footers_read_here")


@pytest.mark.parametrize(
    ("rows", "bad", "limit", "taken", "sample"),
    [
        (100, 0, 100, 100, False),
        (101, 0, 100, 100, True),  # all of them are read: more than is asked for, in runs of neighbours
        (101, 1, 100, 100, False),
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
