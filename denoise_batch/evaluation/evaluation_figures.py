"""The pictures of an evaluation: for each model the seed's two figures, and curves over the noise levels for all.

paths = draw_evaluation(evaluation, bundles, images, Path("figures"))
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from denoise_batch.denoiser import Denoiser
from denoise_batch.evaluation.figures import metric_curves, pairs_figure, seed_figure_digits, seed_figure_levels
from denoise_batch.precision import Precision

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt

    from denoise_batch.bundle import Bundle
    from denoise_batch.evaluation.evaluate import Evaluation

_DIGITS = 8  # columns of the second figure


def draw_evaluation(
    evaluation: Evaluation,
    bundles: Sequence[Bundle],
    images: npt.NDArray[np.uint8],
    folder: Path,
    *,
    noisy: npt.NDArray[np.float32] | None = None,
    digit: int = 3,
    device: str = "auto",
) -> list[Path]:
    """Draws `levels.png` and `digits.png` for each model, `metrics.png` for all; existing ones are replaced.

    Of pairs there is `pairs.png` for each model instead: the first of them.

    Args:
        evaluation: of these bundles on these images.
        images: (n, 28, 28) uint8, clean.
        folder: is made if need be.
        noisy: (n, 28, 28) float32, where the evaluation is of pairs.
        digit: the image in `levels.png`, less than n; the seed took the fourth of MNIST's test set.
        device: where the models run.

    Returns:
        The pictures, models in order; with several models their names stand in the files' names.
    """
    paths: list[Path] = []
    for bundle, model in zip(bundles, evaluation.models, strict=True):
        suffix = f"-{model['method'].replace(' ', '-')}" if len(bundles) > 1 else ""
        denoise = Denoiser(bundle, device=device, precision=Precision.FLOAT32)
        if noisy is not None:
            paths.append(folder / f"pairs{suffix}.png")
            pairs_figure(denoise, noisy[:_DIGITS], images[:_DIGITS], paths[-1])
            continue
        paths += [folder / f"levels{suffix}.png", folder / f"digits{suffix}.png"]
        seed_figure_levels(denoise, images[digit], paths[-2])
        seed_figure_digits(denoise, images[:_DIGITS], paths[-1])
    if noisy is None:
        paths.append(folder / "metrics.png")
        metric_curves(evaluation, paths[-1])
    return paths
