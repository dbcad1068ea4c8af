"""What a training records: one row an epoch, as history.csv and curves.png."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

HISTORY_FILE = "history.csv"


@dataclass(frozen=True)
class EpochRow:
    """One epoch.

    Attributes:
        epoch: 1 for the first.
        images: images trained on since the start.
        loss: mean binary cross-entropy of the epoch's training images, in nats a pixel.
        val_loss: the same on the noisy validation images.
        val_psnr_noisy: pooled PSNR in dB of the noisy validation images, denoised.
        val_psnr_clean: pooled PSNR in dB of the clean validation images, passed through the network.
        learning_rate: of the epoch's last step.
        images_per_second: trained, over the epoch without its validation.
        seconds: since the start, of all attempts together.
        val_quality_error: root mean square, in dB, of predicted less true PSNR on the noisy validation images; None
            for networks that predict none.
        val_mean_psnr: mean over the noisy validation images of each one's PSNR in dB, at most 45. By it epochs are
            compared: all kinds of noise count alike, where heavy noise decides a pooled PSNR.
    """

    epoch: int
    images: int
    loss: float
    val_loss: float
    val_psnr_noisy: float
    val_psnr_clean: float
    learning_rate: float
    images_per_second: float
    seconds: float
    val_quality_error: float | None
    val_mean_psnr: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def history_csv(rows: Sequence[EpochRow]) -> str:
    """The rows as CSV with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(EpochRow)], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _short(value) for key, value in asdict(row).items()})
    return text.getvalue()


def read_history(path: Path) -> list[EpochRow]:
    """The rows of a history.csv.

    Raises:
        ValueError: it is not one.
    """
    with path.open(newline="", encoding="utf-8") as file:
        try:
            return [_row(fields) for fields in csv.DictReader(file)]
        except TypeError as error:
            raise ValueError(f"{path} is no history: {error}") from error


def _row(text: dict[str, str]) -> EpochRow:
    values: dict[str, Any] = {
        key: int(value) if key in ("epoch", "images") else float(value) if value else None
        for key, value in text.items()
    }
    return EpochRow(**values)


def _short(value: float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.7g}"


def draw_curves(rows: Sequence[EpochRow], path: Path, title: str = "") -> None:
    """Draws loss (log scale, where it changes much) and validation PSNR over the epochs as a PNG."""
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

    # Not in the user's own style, of which a part may be missing: TeX, say.
    with matplotlib.style.context(["default", {"text.parse_math": False}]):
        epochs = [row.epoch for row in rows]
        marker = "o" if len(rows) <= 40 else None
        figure = Figure(figsize=(10, 4.2), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        loss, psnr = figure.subplots(1, 2)
        style = {"marker": marker, "markersize": 3.5, "linewidth": 1.6}
        loss.plot(epochs, [row.loss for row in rows], label="training", color="#4477aa", **style)
        loss.plot(epochs, [row.val_loss for row in rows], label="validation, noisy", color="#cc6677", **style)
        loss.set(title="Binary cross-entropy", xlabel="epoch", ylabel="nats a pixel")
        losses = [value for row in rows for value in (row.loss, row.val_loss)]
        if rows and max(losses) > 1.5 * min(losses):  # less has no room for ticks of a log scale
            loss.set_yscale("log")
            loss.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 7.0)))
            loss.yaxis.set_major_formatter(ScalarFormatter())
            loss.yaxis.set_minor_formatter(NullFormatter())
        best = max(rows, key=lambda row: row.val_mean_psnr, default=None)
        label = f"noisy images; best epoch {best.epoch}: {best.val_psnr_noisy:.2f} dB" if best else "noisy images"
        psnr.plot(epochs, [row.val_psnr_noisy for row in rows], label=label, color="#cc6677", **style)
        psnr.plot(epochs, [row.val_psnr_clean for row in rows], label="clean images", color="#117733", **style)
        psnr.set(title="Validation PSNR after denoising", xlabel="epoch", ylabel="dB")
        for axes in (loss, psnr):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(alpha=0.3, which="both")
            axes.legend(frameon=False)
        if title:
            figure.suptitle(title, fontsize=10)
        figure.savefig(path)
