"""Pictures: the seed's two figures, metrics by noise level, contact sheets. Arrays in, one PNG out.

Matplotlib is imported inside the functions and drawn through Agg, without a display or the user's own style. A PNG is
complete or not there, and the same arrays give the same bytes.
"""

from __future__ import annotations

import io
import math
import textwrap
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from denoise_batch.evaluation.metrics import psnr_from_mse
from denoise_batch.storage import publishing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    import numpy.typing as npt
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from denoise_batch.evaluation.result import Evaluation

    Image = npt.NDArray[np.float32]
    Denoise = Callable[[Image], Image]

_NOISE_SEED: Final = 3
_MOST_LEVELS: Final = (2.0, 1.5)
"""Blur in pixels and half range of the noise in units of full ink: the most that the seed trains with."""

_GREY: Final = "0.35"
_DPI: Final = 100
_HIGHEST_DB: Final = 45.0
_LONGEST_NAME: Final = 40  # letters
_LEGEND_ROW: Final = 0.19  # inches


@contextmanager
def _drawing(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure of that many inches; written to `path` at the end, by one rename."""
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as NewFigure

    # Names of files and folders are no formulas, whatever they hold.
    with matplotlib.style.context(["default", {"text.parse_math": False}]):
        figure = NewFigure(figsize=(width, height), dpi=_DPI)
        FigureCanvasAgg(figure)
        yield figure
        content = io.BytesIO()
        # Without the library's version in it the file depends on the pixels alone.
        figure.savefig(content, format="png", metadata={"Software": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    publishing.write_file(path, content.getvalue(), alone=False)


def seed_figure_levels(denoise: Denoise, digit: npt.NDArray[np.uint8], path: Path) -> None:
    """The seed's first figure: one digit at six rising levels of blur and noise, and below each what is made of it.

    The titles tell the noise's true half range r = 0.4 i; the seed's own titles say 0.2 i, half of what it adds.

    Args:
        denoise: (n, 784) float32 noisy → (n, 784) float32 denoised.
        digit: (28, 28) uint8, clean; the seed took image 3 of MNIST's test set.
        path: of the PNG.
    """
    from denoise_batch.noise import SEED_LEVELS

    noisy = _degraded(np.repeat(digit[None], len(SEED_LEVELS), axis=0), SEED_LEVELS)
    titles = [f"s={sigma:.1f}, r={half_range:.1f}" for sigma, half_range in SEED_LEVELS]
    _draw_rows({"noisy": noisy, "denoised": _apply(denoise, noisy)}, titles, path)


def seed_figure_digits(denoise: Denoise, digits: npt.NDArray[np.uint8], path: Path) -> None:
    """The seed's second figure: different digits at high blur and noise, what is made of them, and the clean ones.

    Args:
        denoise: (n, 784) float32 noisy → (n, 784) float32 denoised.
        digits: (n, 28, 28) uint8, clean, one a column.
        path: of the PNG.
    """
    noisy = _degraded(digits, [_MOST_LEVELS] * len(digits))
    clean = digits.astype(np.float32) / np.float32(255)
    titles = ["s={:.1f}, r={:.1f}".format(*_MOST_LEVELS)] * len(digits)
    _draw_rows({"noisy": noisy, "denoised": _apply(denoise, noisy), "clean": clean}, titles, path)


def _degraded(digits: npt.NDArray[np.uint8], levels: Sequence[tuple[float, float]]) -> Image:
    import torch

    from denoise_batch.noise import degrade

    clean = torch.from_numpy(digits.astype(np.float32) / np.float32(255))
    sigma, half_range = torch.tensor(levels, dtype=torch.float32).T
    result: Image = degrade(clean, sigma, half_range, torch.Generator().manual_seed(_NOISE_SEED)).numpy()
    return result


def _apply(denoise: Denoise, noisy: Image) -> Image:
    return denoise(noisy.reshape(len(noisy), -1)).reshape(noisy.shape)


def _draw_rows(rows: dict[str, Image], titles: Sequence[str], path: Path) -> None:
    """Rows of images under titles, 2 inches a column, as in the seed (two rows of six: 12 × 4 inches)."""
    count = len(titles)
    note = "noisy: shown over its own range, given below it; the other rows over 0 to 1"
    lines = textwrap.wrap(note, 30 * count)
    with _drawing(path, 2.0 * count, 2.0 * len(rows)) as figure:
        height, below = 2.0 * len(rows), 0.28 + 0.14 * len(lines)
        axes = figure.subplots(len(rows), count, squeeze=False)
        figure.subplots_adjust(
            left=0.3 / (2.0 * count), right=1.0 - 0.1 / (2.0 * count), top=1 - 0.3 / height, bottom=below / height,
            wspace=0.06, hspace=0.16,
        )  # fmt: skip
        for line, (name, images) in enumerate(rows.items()):
            for column, image in enumerate(images):
                axis = axes[line, column]
                axis.set_xticks([])
                axis.set_yticks([])
                low, high = _shown_over(image, own_range=name == "noisy")
                axis.imshow(image, cmap="gray", vmin=low, vmax=high)
                if name == "noisy":
                    axis.set_title(titles[column], fontsize=10, pad=4)
                    axis.set_xlabel(range_of(image), fontsize=7, color=_GREY, labelpad=2)
            axes[line, 0].set_ylabel(name, fontsize=10)
        figure.text(0.5, 0.1 / height, "\n".join(lines), ha="center", fontsize=8, color=_GREY)


def range_of(image: Image) -> str:
    """`−1.40 to 2.31`: an image's least and greatest value."""
    return f"{image.min():.2f} to {image.max():.2f}".replace("-", "−")


def metric_curves(evaluation: Evaluation, path: Path) -> None:
    """PSNR and SSIM at the seed's six levels; below, PSNR over blur and over noise. Models in colour, others in grey.

    The shaded part lies beyond the range of the seed's article. What leaves the picture above stands there as a
    number, for models, as ∞ where it is infinite; of the others an infinite PSNR (the undegraded input) is not drawn.
    The lower curves are of the seed's mixture, the images sorted by one of the two levels while the other is whatever
    it was, eight groups over its range.
    """
    from denoise_batch.evaluation.protocol import CONDITIONS

    levels = [condition for condition in CONDITIONS if condition.key.startswith("i=")]
    single = evaluation.single
    with _drawing(path, 11.0, 8.4 if single and single.levels else 4.6) as figure:
        axes = figure.subplots(2 if single and single.levels else 1, 2, squeeze=False)
        for axis, (field, title) in zip(axes[0], (("pooled_psnr", "pooled PSNR, dB"), ("ssim", "SSIM")), strict=True):
            drawn = {
                method: [evaluation.score(level.key, method, field) for level in levels]
                for method in evaluation.methods
            }
            _curves(axis, range(len(levels)), drawn, evaluation)
            _mark_levels(axis, levels)
            axis.set_title(title, fontsize=11)
            if field == "ssim":
                axis.set_ylim(0.0, 1.03)
        if single and single.levels:
            names = ("s, blur in pixels (any r)", "r, half range of the noise (any s)")
            for axis, values, name in zip(axes[1], single.levels, names, strict=True):
                middles, groups = _groups(values)
                drawn = {method: _pooled(squared, groups) for method, squared in single.squared.items()}
                _curves(axis, middles, drawn, evaluation)
                _plain(axis)
                axis.set_title("pooled PSNR over the mixture, dB", fontsize=11)
                axis.set_xlabel(name, fontsize=9)
        further = _LEGEND_ROW * (_add_legend(figure, axes[0, 0]) - 1)
        height = figure.get_figheight() + further
        figure.set_figheight(height)
        figure.subplots_adjust(
            left=0.05, right=0.985, top=1 - 0.41 / height, bottom=(1.0 + further) / height, wspace=0.12, hspace=0.42
        )


def _add_legend(figure: Figure, axis: Axes) -> int:
    """Names an axis' lines below all, as many abreast as the figure is wide enough for; gives the number of rows."""
    handles, labels = axis.get_legend_handles_labels()
    columns = len(labels)
    while True:
        legend = figure.legend(handles, labels, loc="lower center", ncols=columns, fontsize=9, frameon=False)
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return -(-len(labels) // columns)
        legend.remove()
        columns -= 1


def _drawable(name: str) -> str:
    """A name as text: those of folders may hold any bytes, which matplotlib does not draw."""
    return name.encode(errors="backslashreplace").decode()


def _curves(axis: Axes, x: Sequence[float], drawn: dict[str, list[float]], evaluation: Evaluation) -> None:
    """A line for each method. The limits are set for decibels: lines of more than `_HIGHEST_DB` leave the picture."""
    models = [model["method"] for model in evaluation.models]
    others = [method for method in evaluation.methods if method not in models]
    marks = dict(zip(others, ("", "s", "^", "v", "D"), strict=False))
    shown = [value for values in drawn.values() for value in values if value < _HIGHEST_DB]
    top = max([*shown, 10.0]) + 2.0
    axis.set_ylim(min([*shown, 0.0]) - 1.0, top)
    for method in evaluation.methods:
        if method not in drawn:
            continue
        model = method in models
        style: dict[str, Any] = (
            {"linewidth": 2.2, "marker": "o", "markersize": 5, "zorder": 3, "color": f"C{models.index(method)}"}
            if model
            else {"linewidth": 1.2, "color": "0.5", "linestyle": "--", "marker": marks[method], "markersize": 4.5}
        )
        values = [value if np.isfinite(value) else float("nan") for value in drawn[method]]
        name = _fit(_drawable(method), _LONGEST_NAME, 1.0)
        axis.plot(x, values, label=f" {name}" if name.startswith("_") else name, **style)  # else left out
        above = [(place, value) for place, value in zip(x, drawn[method], strict=True) if value > top] if model else []
        for place, value in above:
            below = (0, -4 - 12 * models.index(method))
            color = f"C{models.index(method)}"
            label = f"↑ {value:.0f}" if np.isfinite(value) else "↑ ∞"
            axis.annotate(label, (place, top), below, textcoords="offset points", va="top", fontsize=9, color=color)


def _groups(values: npt.NDArray[np.float32]) -> tuple[list[float], npt.NDArray[np.int64]]:
    """Eight groups over the values' range: their middles, and each value's group."""
    edges = np.linspace(values.min(), values.max(), 9)
    middles = (edges[1:] + edges[:-1]) / 2
    return middles.tolist(), np.clip(np.searchsorted(edges, values, side="right") - 1, 0, 7)


def _pooled(squared: npt.NDArray[np.float64], groups: npt.NDArray[np.int64]) -> list[float]:
    """The pooled PSNR of each group; NaN of an empty one."""
    parts = [squared[groups == group] for group in range(8)]
    return [float(psnr_from_mse(part.mean())) if len(part) else math.nan for part in parts]


def _mark_levels(axis: Axes, levels: Sequence[Any]) -> None:
    """Names the levels below the axis, and shades those beyond the training range."""
    axis.set_xticks(
        range(len(levels)), [f"s={level.recipe.sigma[0]:.1f}\nr={level.recipe.half_range[0]:.1f}" for level in levels]
    )
    beyond = [i for i, level in enumerate(levels) if level.beyond_training]
    if beyond:
        axis.axvspan(beyond[0] - 0.5, beyond[-1] + 0.5, color="0.93", zorder=0)
        axis.text(
            (beyond[0] + beyond[-1]) / 2, 0.97, "beyond the article's range", transform=axis.get_xaxis_transform(),
            ha="center", va="top", fontsize=8, color=_GREY,
        )  # fmt: skip
    axis.set_xlim(-0.3, len(levels) - 0.5)
    _plain(axis)


def _plain(axis: Axes) -> None:
    axis.grid(axis="y", color="0.88")
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.tick_params(labelsize=9)


@dataclass(frozen=True)
class Tile:
    """One row of a contact sheet.

    Attributes:
        caption: a few short lines.
        pictures: (28, 28) float32 each, as many as the sheet has column names; None leaves its place empty.
    """

    caption: str
    pictures: tuple[Image | None, ...]


@dataclass(frozen=True)
class Section:
    """A part of a contact sheet, with its heading."""

    heading: str
    tiles: tuple[Tile, ...]


_TILE: Final = 1.0  # inches, as all below
_GAP: Final = 0.07
_CAPTION: Final = 1.3
_MARGIN: Final = 0.3
_HEAD: Final = 0.95  # title, section headings, names of the columns
_FOOT: Final = 0.4


def contact_sheet(
    path: Path, sections: Sequence[Section], *, columns: Sequence[str], title: str, own_range: Sequence[bool]
) -> None:
    """Images in columns under their names, with captions; the sections stand side by side.

    Args:
        path: of the PNG.
        sections: at least one.
        columns: the pictures' names, such as noisy, denoised, clean.
        title: one line; cut in front where it is too long.
        own_range: for each column, whether an image is shown from its own least to its own greatest value (its caption
            should say which), or from 0 to 1.
    """
    picture_width = len(columns) * (_TILE + _GAP)
    one = _CAPTION + picture_width
    # About as wide as high; single pictures would make a thin strip, so three of them stand in a line at least.
    most = max(len(section.tiles) for section in sections)
    abreast = max(3 if len(columns) == 1 else 1, round(math.sqrt(most * (_TILE + _GAP) / (len(sections) * one))))
    block = abreast * one
    lines = max(1, -(-most // abreast))
    width = 2 * _MARGIN + len(sections) * block + (len(sections) - 1) * _MARGIN
    width = max(width, 6.0)
    height = _HEAD + lines * (_TILE + _GAP) + _FOOT
    with _drawing(path, width, height) as figure:
        axis = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        axis.axis("off")
        axis.set_xlim(0.0, width)
        axis.set_ylim(height, 0.0)  # downwards, in inches
        axis.set_autoscale_on(False)  # each imshow would move the limits to its own picture
        axis.text(
            _MARGIN, 0.28, _fit(_drawable(title), width - 2 * _MARGIN, 0.088), fontsize=11, va="center", weight="bold"
        )
        for index, section in enumerate(sections):
            left = _MARGIN + index * (block + _MARGIN)
            axis.text(left, 0.57, _fit(section.heading, block, 0.08), fontsize=10, va="center")
            for place, tile in enumerate(section.tiles):
                line, step = divmod(place, abreast)
                x = left + step * one
                y = _HEAD + line * (_TILE + _GAP)
                axis.text(x + _CAPTION - 0.1, y + _TILE / 2, tile.caption, fontsize=7.5, va="center", ha="right")
                for column, picture in enumerate(tile.pictures):
                    _place(axis, picture, x + _CAPTION + column * (_TILE + _GAP), y, own_range=own_range[column])
            for column, name in enumerate(list(columns) * min(abreast, max(1, len(section.tiles)))):
                step, position = divmod(column, len(columns))
                x = left + step * one + _CAPTION + position * (_TILE + _GAP) + _TILE / 2
                axis.text(x, _HEAD - 0.1, name, fontsize=9, va="center", ha="center", color=_GREY)
        own = [name for name, alone in zip(columns, own_range, strict=True) if alone]
        rest = [name for name in columns if name not in own]
        notes = [f"{', '.join(own)}: each image over its own range, in its caption"] if own else []
        notes += [f"{', '.join(rest)}: over 0 to 1"] if rest else []
        axis.text(_MARGIN, height - 0.17, "; ".join(notes), fontsize=8, va="center", color=_GREY)


def _place(axis: Axes, picture: Image | None, x: float, y: float, *, own_range: bool) -> None:
    if picture is not None:
        low, high = _shown_over(picture, own_range=own_range)
        box = (x, x + _TILE, y + _TILE, y)
        axis.imshow(picture, cmap="gray", extent=box, interpolation="nearest", aspect="auto", vmin=low, vmax=high)
    # An image that is white to its edge would not be told from the paper.
    axis.plot([x, x + _TILE, x + _TILE, x, x], [y, y, y + _TILE, y + _TILE, y], color=_GREY, linewidth=0.4)


def _shown_over(picture: Image, *, own_range: bool) -> tuple[float, float]:
    """Black and white: an image's least and greatest value, or 0 and 1, as for one that is the same all over."""
    low, high = float(picture.min()), float(picture.max())
    return (low, high) if own_range and high - low > 1e-6 else (0.0, 1.0)


def _fit(text: str, width: float, letter: float) -> str:
    """The text's end, where the whole would be wider than `width` inches at about `letter` inches a letter."""
    room = max(4, int(width / letter))
    return text if len(text) <= room else "…" + text[-(room - 1) :]
