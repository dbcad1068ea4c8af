"""An evaluation as plain text: a block for each figure, methods down, conditions across.

print(format_table(evaluation))
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from denoise_batch.errors import LINE_CONTROLS
from denoise_batch.evaluation import bootstrap, metrics
from denoise_batch.evaluation.baselines import Filter
from denoise_batch.evaluation.protocol import CONDITIONS, PAIRS, SETTINGS_IMAGES, Condition
from denoise_batch.evaluation.result import LINEAR
from denoise_batch.models.quality_head import MOST_PSNR

if TYPE_CHECKING:
    from collections.abc import Sequence

    from denoise_batch.evaluation.result import Evaluation

_WINDOW: Final = f"{metrics.SSIM_WINDOW}×{metrics.SSIM_WINDOW}"
_BLOCKS: Final = (
    ("pooled_psnr", "pooled PSNR, dB (higher is better)", 2),
    ("mean_psnr", f"mean PSNR, dB, each image's at most {MOST_PSNR:g} (higher is better)", 2),
    ("ssim", f"SSIM, {_WINDOW} Gaussian window of σ={metrics.SSIM_SIGMA} (higher is better)", 4),
    ("foreground_rmse", "RMSE where there is ink, of full ink (lower is better)", 4),
    ("excess_cross_entropy", "excess cross-entropy, nats a pixel (lower is better)", 4),
    ("accuracy", "read right by a classifier of clean digits, share (higher is better)", 4),
)
_QUALITY_BLOCKS: Final = (
    ("bias", "expected less true PSNR, mean, dB (0 is best)", 2),
    ("error", "expected less true PSNR, root mean square, dB (lower is better)", 2),
    ("rank", "rank correlation of expected and true PSNR (Spearman; 1 is best)", 3),
    ("level_error", "noise level, mean absolute error, parts of full ink (lower is better)", 4),
)
_METHOD_TITLES: Final = {
    "noisy": "noisy input",
    **{kind.value: f"{kind.value.capitalize()} filter" for kind in Filter},
    LINEAR: f"{LINEAR}, told σ and r",
}

_NOTES: Final = (
    "",
    "mixture: σ and r drawn for each image, noise not clipped. uint8: the same images clipped to 0..1 and rounded",
    "to 8 bits. * beyond the original article's range: extrapolation. Each filter has, under each condition, the",
    "setting with the best pooled PSNR on 1,000 MNIST training images, and its output is clipped to 0..1.",
    "kinds: half of it the seed's noise as it is, the rest clipped, Gaussian, salt and pepper, blur alone, clean.",
    "gaussian: of deviation r / √3, gaussian8: the same clipped to 8 bits. impulse: r / 3 of the pixels 0 or 1.",
    "levels: 2 to 16 levels of grey, three fifths of the images 2, as faxes have; of all kinds. grain: Gaussian noise",
    "that is alike in neighbouring pixels, in 8 bits.",
)
_PAIRS_NOTES: Final = (
    f"PSNR: pooled, with its 95% interval. SSIM: {_WINDOW} Gaussian window of σ={metrics.SSIM_SIGMA}. ink RMSE: where",
    "there is ink, of full ink. excess CE: cross-entropy, nats a pixel. read: share read right by a classifier of",
    "clean digits. setting: of a filter, its window's side in pixels or the Gaussian's σ.",
)


def format_table(evaluation: Evaluation) -> str:
    """The evaluation as aligned plain text: a block for each metric, methods down, conditions across.

    Names' control characters and ends of lines are escaped: the text has no lines but its own.
    """
    images = "1 image" if evaluation.images == 1 else f"{evaluation.images:,} images"
    described = f"{images}: {evaluation.description or 'not described'}"
    if evaluation.seed is None:
        lines = [described, *_pairs_section(evaluation)]
    else:
        usual = [condition for condition in CONDITIONS if not condition.other]
        others = [condition for condition in CONDITIONS if condition.other]
        lines = [
            f"{described}; noise seed {evaluation.seed}",
            *_section(evaluation, usual),
            "",
            "Other kinds of noise",
            *_section(evaluation, others),
            *_NOTES,
        ]
    lines += [
        _reader_note(evaluation),
        f"Cross-entropy is counted from the clean images' own entropy, {evaluation.target_entropy:.4f}.",
        f"Intervals: {bootstrap.RESAMPLES:,} resamples of the images, the wider half; JSON has those of all figures.",
    ]
    return "\n".join(line.translate(LINE_CONTROLS) for line in lines)


def _reader_note(evaluation: Evaluation) -> str:
    if evaluation.clean_accuracy is None:
        return "Without labels, right is what the classifier reads in the clean image."
    text = f"The classifier reads {evaluation.clean_accuracy:.4f} of the clean images right."
    if evaluation.clean_accuracy < 0.5:
        text += " So few: are the labels the digits that the images show?"
    return text


def _margin(evaluation: Evaluation, condition: str, method: str) -> str:
    """The wider half of the interval of the pooled PSNR."""
    middle = evaluation.score(condition, method, "pooled_psnr")
    if not math.isfinite(middle):
        return "–"
    low, high = evaluation.row(condition, method).scores.intervals["pooled_psnr"]
    return _number(max(high - middle, middle - low), 2)


def _pairs_section(evaluation: Evaluation) -> list[str]:
    """The lines of the one condition `PAIRS`: methods down, figures across."""
    first, heads = _width(evaluation), ("PSNR, dB", "±", "mean, dB", "SSIM", "ink RMSE", "excess CE", "read", "setting")
    lines = ["", _line("", first, heads)]
    for method in evaluation.methods:
        cells = [_number(evaluation.score(PAIRS, method, name), digits) for name, _, digits in _BLOCKS]
        setting = evaluation.row(PAIRS, method).setting
        cells.insert(1, _margin(evaluation, PAIRS, method))
        lines.append(_line(_title(method), first, [*cells, "" if setting is None else f"{setting:g}"]))
    for row in evaluation.quality:
        scores = row.scores
        lines += [
            "",
            f"PSNR that {row.method} expects, less the true one: mean {scores.bias:+.2f} dB, root mean square "
            f"{scores.error:.2f} dB; their rank correlation {_number(scores.rank, 3)}",
        ]
    images = min(SETTINGS_IMAGES, evaluation.images)
    own = "The noisy images are the dataset's own. Each filter has the setting with the best pooled PSNR on"
    favoured = f"{images:,} of these very images, which favours it, and its output is clipped to 0..1."
    return [*lines, "", *_PAIRS_NOTES, own, favoured]


def _section(evaluation: Evaluation, conditions: Sequence[Condition]) -> list[str]:
    """The lines of some conditions side by side."""
    first, keys = _width(evaluation), [condition.key for condition in conditions]
    levels = {
        "": [condition.key + ("*" if condition.beyond_training else "") for condition in conditions],
        "  blur σ, pixels": [_range(condition.recipe.sigma) for condition in conditions],
        "  noise ± r": [_range(condition.recipe.half_range) for condition in conditions],
    }
    lines = ["", *(_line(title, first, cells) for title, cells in levels.items())]
    for name, heading, digits in _BLOCKS:
        lines += ["", heading]
        for method in evaluation.methods:
            scores = [evaluation.score(key, method, name) for key in keys]
            lines.append(_line(_title(method), first, [_number(score, digits) for score in scores]))
    lines += ["", "95% interval of the pooled PSNR, ± dB"]
    for method in evaluation.methods:
        lines.append(_line(_title(method), first, [_margin(evaluation, key, method) for key in keys]))
    told = {(row.condition, row.method): row.scores for row in evaluation.quality}
    for name, heading, digits in _QUALITY_BLOCKS if told else ():
        lines += ["", heading]
        for method in dict.fromkeys(row.method for row in evaluation.quality):
            scores = [getattr(told[key, method], name) for key in keys]
            lines.append(_line(method, first, [_number(score, digits) for score in scores]))
    lines += ["", "setting of each filter (window's side in pixels; the Gaussian's σ)"]
    for kind in Filter:
        settings = [f"{evaluation.row(key, kind).setting:g}" for key in keys]
        lines.append(_line(_title(kind), first, settings))
    return lines


def _title(method: str) -> str:
    return _METHOD_TITLES.get(method, method)


def _width(evaluation: Evaluation) -> int:
    return max(16, *(len(_title(method)) for method in evaluation.methods))


def _line(title: str, width: int, cells: Sequence[str]) -> str:
    return (title.ljust(width) + "".join(cell.rjust(10) for cell in cells)).rstrip()


def _range(ends: tuple[float, float]) -> str:
    return f"{ends[0]:g}" if ends[0] == ends[1] else f"{ends[0]:g}-{ends[1]:g}"


def _number(value: float, digits: int) -> str:
    if math.isnan(value):
        return "–"
    return f"{value:.{digits}f}" if math.isfinite(value) else "∞"
