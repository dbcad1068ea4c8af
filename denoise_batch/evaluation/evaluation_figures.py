"""The pictures of an evaluation: for each model the seed's two figures, random images and bad ones; curves for all.

paths = draw_evaluation(evaluation, bundles, images, Path("figures"))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from denoise_batch.bundle.card import of_pairs
from denoise_batch.denoiser import Denoiser
from denoise_batch.evaluation.figures import (
    Section,
    Tile,
    contact_sheet,
    metric_curves,
    range_of,
    seed_figure_digits,
    seed_figure_levels,
)
from denoise_batch.evaluation.metrics import psnr_from_mse
from denoise_batch.evaluation.protocol import BLOCK, MIXTURE, degrade_images
from denoise_batch.precision import Precision

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy.typing as npt

    from denoise_batch.bundle import Bundle
    from denoise_batch.evaluation.clean_images import Evened
    from denoise_batch.evaluation.result import Evaluation, ImageErrors

    Numbers = npt.NDArray[np.int64]

_DIGITS: Final = 8
"""Columns of the seed's second figure."""
_TILES: Final = 8
"""Images in each half of a sheet."""
_LONGEST_NAME: Final = 100
"""Letters of a model's name that a file's name takes in."""
_SEED: Final = 3
"""Seeds which images are the random ones."""


def draw_evaluation(
    evaluation: Evaluation,
    bundles: Sequence[Bundle],
    images: npt.NDArray[np.uint8],
    folder: Path,
    *,
    noisy: npt.NDArray[np.float32] | None = None,
    evened: Evened | None = None,
    digit: int | None = None,
    device: str = "auto",
) -> list[Path]:
    """Draws `levels.png`, `digits.png` and `mixture.png` for each model, `metrics.png` for all; old ones are replaced.

    `mixture.png` has random images of the seed's mixture, and such of the tenth that came out worst. Of pairs there is
    the same alone, as `pairs.png`.

    Args:
        evaluation: of these bundles on these images.
        images: (n, 28, 28) uint8, clean.
        folder: is made if need be.
        noisy: (n, 28, 28) float32, where the evaluation is of pairs.
        evened: as `evaluate` takes it.
        digit: the image in `levels.png`, less than n; None takes the fourth, as the seed did of MNIST's test set, or
            the last of fewer.
        device: where the models run.

    Returns:
        The pictures, models in order; with several models their names stand in the files' names.
    """
    paths: list[Path] = []
    for bundle, model, suffix in zip(bundles, evaluation.models, _suffixes(evaluation.models), strict=True):
        denoise = Denoiser(bundle, device=device, precision=Precision.FLOAT32)
        if noisy is None:
            paths += [folder / f"levels{suffix}.png", folder / f"digits{suffix}.png"]
            seed_figure_levels(denoise, images[min(3, len(images) - 1) if digit is None else digit], paths[-2])
            seed_figure_digits(denoise, images[:_DIGITS], paths[-1])
        if evaluation.single is not None:
            paths.append(folder / f"{'mixture' if noisy is None else 'pairs'}{suffix}.png")
            shown = None if evened is None or of_pairs(bundle.model) else evened
            _sheet(evaluation, model["method"], denoise, images, noisy, shown, paths[-1])
    if noisy is None:
        paths.append(folder / "metrics.png")
        metric_curves(evaluation, paths[-1])
    return paths


def _suffixes(models: Sequence[dict[str, str]]) -> list[str]:
    """What is added to the files' names, where there are several models: their names, or their hashes' beginnings."""
    if len(models) == 1:
        return [""]
    names = [f"-{model['method'].replace(' ', '-')}" for model in models]
    if len(set(names)) == len(names) and max(map(len, names), default=0) <= _LONGEST_NAME:
        return names
    return [f"-{model['sha256'][:12]}" for model in models]


def _sheet(
    evaluation: Evaluation,
    method: str,
    denoise: Denoiser,
    images: npt.NDArray[np.uint8],
    noisy: npt.NDArray[np.float32] | None,
    evened: Evened | None,
    path: Path,
) -> None:
    """Random images beside some of the worst tenth, from its worst to its best."""
    single = evaluation.single
    assert single is not None
    squared = single.squared[method]
    count = min(_TILES, len(squared))
    random = np.sort(np.random.default_rng(_SEED).choice(len(squared), count, replace=False))
    tenth = np.argsort(-squared, kind="stable")[: max(1, len(squared) // 10)]
    worst = tenth[np.unique(np.linspace(0, len(tenth) - 1, count).round().astype(np.int64))]
    sections = []
    for heading, chosen in ((f"random, of {len(squared):,} images", random), ("of the worst tenth", worst)):
        given = _mixed(images, chosen, evaluation.seed) if noisy is None else noisy[chosen]
        flat = given.reshape(len(given), -1)
        made = (denoise(flat) if evened is None else evened.denoised(chosen, denoise.run).pixels).reshape(given.shape)
        clean = images[chosen].astype(np.float32) / np.float32(255)
        tiles = [
            Tile(_caption(single, squared, number, picture), (picture, *others))
            for number, picture, *others in zip(chosen, given, made, clean, strict=True)
        ]
        sections.append(Section(heading, tuple(tiles)))
    title = f"{method}: {'the mixture of noise' if noisy is None else evaluation.description}"
    columns = ("noisy", "denoised", "clean")
    contact_sheet(path, sections, columns=columns, title=title, own_range=(True, False, False))


def _mixed(images: npt.NDArray[np.uint8], chosen: Numbers, seed: int | None) -> npt.NDArray[np.float32]:
    """Those of the images as the evaluation had them under the seed's mixture."""
    assert seed is not None
    made = []
    for number in chosen:
        block, place = divmod(int(number), BLOCK)
        clean = images[block * BLOCK : (block + 1) * BLOCK].astype(np.float32) / np.float32(255)
        made.append(degrade_images(clean, MIXTURE, seed=seed, block=block)[place])
    return np.stack(made)


def _caption(single: ImageErrors, squared: npt.NDArray[np.float64], number: int, noisy: npt.NDArray[np.float32]) -> str:
    lines = [f"image {number:,}"]
    if single.levels is not None:
        sigma, half_range = (values[number] for values in single.levels)
        lines.append(f"s={sigma:.2f}, r={half_range:.2f}")
    decibels = psnr_from_mse(squared[number])
    lines.append(f"PSNR {decibels:.1f} dB" if np.isfinite(decibels) else "PSNR ∞")
    lines.append(range_of(noisy))
    return "\n".join(lines)
