"""History as CSV, and the curves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib
import numpy as np
import pytest
from PIL import Image

from denoise_batch.bundle.history import EpochRow, draw_curves, history_csv, read_history

if TYPE_CHECKING:
    from pathlib import Path


def _rows(count: int) -> list[EpochRow]:
    return [
        EpochRow(e, 60 * e, 0.5 / e, 0.4 / e, 10 + e / 10, 11 + e / 10, 1e-3, 1000.5, 2.0 * e, 1.5 / e, 12 + e / 10)
        for e in range(1, count + 1)
    ]


def test_csv_and_back(tmp_path: Path) -> None:
    (tmp_path / "h.csv").write_text(history_csv(_rows(3)))
    back = read_history(tmp_path / "h.csv")
    assert [row.epoch for row in back] == [1, 2, 3]
    for row, original in zip(back, _rows(3), strict=True):
        assert list(row.to_json().values()) == pytest.approx(list(original.to_json().values()), rel=1e-6)
    assert history_csv([]).startswith("epoch,images,loss,")


def test_networks_that_predict_no_quality_leave_it_empty(tmp_path: Path) -> None:
    row = EpochRow(1, 60, 0.5, 0.4, 10.0, 11.0, 1e-3, 1000.5, 2.0, None, 14.0)
    (tmp_path / "h.csv").write_text(history_csv([row]))
    assert read_history(tmp_path / "h.csv") == [row]


def test_another_csv_is_refused(tmp_path: Path) -> None:
    (tmp_path / "h.csv").write_text("epoch,colour\n1,2\n")
    with pytest.raises(ValueError, match="no history"):
        read_history(tmp_path / "h.csv")


@pytest.mark.parametrize("count", [0, 1, 500])
def test_curves_are_drawn_for_any_number_of_epochs(tmp_path: Path, count: int) -> None:
    draw_curves(_rows(count), tmp_path / "c.png", title="seed · MNIST")
    with Image.open(tmp_path / "c.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    assert pixels.shape[1] > 1000
    assert (pixels < 200).mean() > 0.005


def test_curves_are_not_drawn_in_the_users_own_style(tmp_path: Path) -> None:
    """A finished training is not to end with an error because TeX is missing."""
    draw_curves(_rows(3), tmp_path / "plain.png", title="50% of a_b")
    with matplotlib.rc_context({"text.usetex": True, "axes.facecolor": "black", "lines.linewidth": 9}):
        draw_curves(_rows(3), tmp_path / "own.png", title="50% of a_b")
    assert (tmp_path / "own.png").read_bytes() == (tmp_path / "plain.png").read_bytes()
