"""An evaluation as plain text: a block for each figure, methods down, conditions across.

print(format_table(evaluation))
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from denoise_batch.evaluation import bootstrap, metrics
from denoise_batch.evaluation.baselines import Filter
from denoise_batch.evaluation.evaluate import LINEAR
from denoise_batch.evaluation.protocol import CONDITIONS, FILTER_SETTINGS, Condition

if TYPE_CHECKING:
    from collections.abc import Sequence

    from denoise_batch.evaluation.evaluate import Evaluation

_WINDOW: Final = f"{metrics.SSIM_WINDOW}×{metrics.SSIM_WINDOW}"
_BLOCKS: Final = (
    ("pooled_psnr", "pooled PSNR, dB (higher is better)", 2),
    ("mean_psnr", "mean PSNR, dB (higher is better)", 2),
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


def format_table(evaluation: Evaluation) -> str:
    """The evaluation as aligned plain text: a block for each metric, methods down, conditions across."""
    titles = [_METHOD_TITLES.get(method, method) for method in evaluation.methods]
    first = max(16, *map(len, titles))
    lines = [
        f"{evaluation.images:,} images: {evaluation.description or 'not described'}; noise seed {evaluation.seed}",
        *_section(evaluation, [condition for condition in CONDITIONS if not condition.other], titles, first),
        "",
        "Other kinds of noise",
        *_section(evaluation, [condition for condition in CONDITIONS if condition.other], titles, first),
        "",
        "mixture: σ and r drawn for each image, noise not clipped. uint8: the same images clipped to 0..1 and rounded",
        "to 8 bits. * beyond the original article's range: extrapolation. Each filter has, under each condition, the",
        "setting with the best pooled PSNR on 1,000 MNIST training images, and its output is clipped to 0..1.",
        "kinds: half of it the seed's noise as it is, the rest clipped, Gaussian, salt and pepper, blur alone, clean.",
        "gaussian: of deviation r / √3, gaussian8: the same clipped to 8 bits. impulse: r / 3 of the pixels 0 or 1.",
        _reader_note(evaluation),
        f"Cross-entropy is counted from the clean images' own entropy, {evaluation.target_entropy:.4f}.",
        f"Intervals: {bootstrap.RESAMPLES:,} resamples of the images, the wider half; JSON has those of all figures.",
    ]
    return "\n".join(lines)


def _reader_note(evaluation: Evaluation) -> str:
    if evaluation.clean_accuracy is None:
        return "The images have no labels: right is what the classifier reads in the clean image."
    return f"The classifier reads {evaluation.clean_accuracy:.4f} of the clean images right."


def _margin(evaluation: Evaluation, condition: str, method: str) -> str:
    """The wider half of the interval of the pooled PSNR."""
    middle = evaluation.score(condition, method, "pooled_psnr")
    if not math.isfinite(middle):
        return "–"
    low, high = evaluation.row(condition, method).scores.intervals["pooled_psnr"]
    return f"{max(high - middle, middle - low):.2f}"


def _section(evaluation: Evaluation, conditions: Sequence[Condition], titles: Sequence[str], first: int) -> list[str]:
    """The lines of some conditions side by side."""
    keys = [condition.key + ("*" if condition.beyond_training else "") for condition in conditions]
    lines = [
        "",
        _line("", first, keys),
        _line("  blur σ, pixels", first, [_range(condition.recipe.sigma) for condition in conditions]),
        _line("  noise ± r", first, [_range(condition.recipe.half_range) for condition in conditions]),
    ]
    for name, heading, digits in _BLOCKS:
        lines += ["", heading]
        for method, title in zip(evaluation.methods, titles, strict=True):
            scores = [evaluation.score(condition.key, method, name) for condition in conditions]
            lines.append(_line(title, first, [_number(score, digits) for score in scores]))
    lines += ["", "95% interval of the pooled PSNR, ± dB"]
    for method, title in zip(evaluation.methods, titles, strict=True):
        lines.append(_line(title, first, [_margin(evaluation, condition.key, method) for condition in conditions]))
    told = {(row.condition, row.method): row.scores for row in evaluation.quality}
    for name, heading, digits in _QUALITY_BLOCKS if told else ():
        lines += ["", heading]
        for method in dict.fromkeys(row.method for row in evaluation.quality):
            scores = [getattr(told[condition.key, method], name) for condition in conditions]
            lines.append(_line(method, first, [_number(score, digits) for score in scores]))
    lines += ["", "setting of each filter (window's side in pixels; the Gaussian's σ)"]
    for kind in Filter:
        settings = [f"{FILTER_SETTINGS[condition.key][kind]:g}" for condition in conditions]
        lines.append(_line(_METHOD_TITLES[kind.value], first, settings))
    return lines


def _line(title: str, width: int, cells: Sequence[str]) -> str:
    return (title.ljust(width) + "".join(cell.rjust(10) for cell in cells)).rstrip()


def _range(ends: tuple[float, float]) -> str:
    return f"{ends[0]:g}" if ends[0] == ends[1] else f"{ends[0]:g}-{ends[1]:g}"


def _number(value: float, digits: int) -> str:
    if math.isnan(value):
        return "–"
    return f"{value:.{digits}f}" if math.isfinite(value) else "∞"
