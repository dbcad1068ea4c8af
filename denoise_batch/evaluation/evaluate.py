"""How good is a model: the protocol's noise, and what the metrics say of the model and of classical filters.

    clean = load_clean_images(None)  # clean_images
    evaluation = evaluate([find_bundle(None)], clean.images, labels=clean.labels, description=clean.description)
    print(format_table(evaluation))  # table

Two runs print the same table: see `protocol`.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from denoise_batch.bundle.card import of_pairs
from denoise_batch.denoiser import Denoiser
from denoise_batch.errors import FlagError, RequestError
from denoise_batch.evaluation import bootstrap, metrics
from denoise_batch.evaluation.baselines import Filter, classical_filter
from denoise_batch.evaluation.digit_reader import load_reader
from denoise_batch.evaluation.linear_mmse import LinearMmse
from denoise_batch.evaluation.protocol import (
    BLOCK,
    CONDITIONS,
    FILTER_SETTINGS,
    MIXTURE,
    NOISE_SEED,
    PAIRS,
    SETTINGS_IMAGES,
    Condition,
    best_filter_settings,
    degrade_with_levels,
    drawn_levels,
)
from denoise_batch.evaluation.quality import QualityRow, quality_scores
from denoise_batch.evaluation.result import LINEAR, Evaluation, ImageErrors, Row, Scores
from denoise_batch.extra_columns import ExtraColumns
from denoise_batch.models.quality_head import MOST_PSNR
from denoise_batch.precision import Precision
from denoise_batch.process.cores import cores_here

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from denoise_batch.bundle import Bundle
    from denoise_batch.evaluation.clean_images import Evened

    Images = npt.NDArray[np.float32]
    """(n, 28, 28)."""
    Degrade = Callable[[Images, int], tuple[Images, npt.NDArray[np.float32]]]
    """Clean images, and the number of the first of them → noisy ones, and their noise levels (n,)."""


def evaluate(
    bundles: Sequence[Bundle],
    images: npt.NDArray[np.uint8],
    *,
    noisy: npt.NDArray[np.float32] | None = None,
    evened: Evened | None = None,
    labels: npt.NDArray[np.uint8] | None = None,
    description: str = "",
    prior: npt.NDArray[np.uint8] | None = None,
    seed: int = NOISE_SEED,
    device: str = "cpu",
    progress: Callable[[str, float], None] | None = None,
) -> Evaluation:
    """Runs the protocol.

    Args:
        bundles: the models to compare; none gives the baselines alone.
        images: (n, 28, 28) uint8, clean, 0 = background.
        noisy: (n, 28, 28) float32, the same images with noise, not clipped: they take the place of the protocol's
            noise, and each filter has the setting that suits the first `SETTINGS_IMAGES` of them best.
        evened: the noisy images as `infer` shows them to models that did not learn from pairs, if not as they are.
        labels: (n,) uint8, which digits they are; None takes what the classifier reads in the clean images.
        description: what the images are, for the table.
        prior: (n, 28, 28) uint8, clean images of the same kind, not those evaluated on: the linear MMSE estimate is
            made from them. None leaves it out.
        seed: of the noise.
        device: where the models run (`auto`, `cpu`, `cuda`); noise, filters and metrics stay on the CPU.
        progress: told what is done, and the share of it.

    Raises:
        RequestError: there are no images.
        FlagError: the device is not there.
        ModelError: a model's weights do not fit.
    """
    if len(images) == 0:
        raise RequestError("there are no images to evaluate on", hint="give a dataset with rows, and --limit above 0")
    names = _model_names(bundles)
    # Float32, so that the table does not depend on what the machine is fastest at.
    denoisers = [Denoiser(bundle, device=device, precision=Precision.FLOAT32) for bundle in bundles]
    if noisy is None:
        conditions, settings = _drawn(seed), FILTER_SETTINGS
    else:
        first = images[:SETTINGS_IMAGES].astype(np.float32) / np.float32(255)
        conditions, settings = _given(noisy), {PAIRS: best_filter_settings([(first, noisy[: len(first)])])}
    linear = {} if prior is None else _linear_estimates(prior)
    reader = load_reader()
    clean_read: list[npt.NDArray[np.uint8]] = []
    extras = [ExtraColumns(quality=bundle.has_quality) for bundle in bundles]
    shown = [None if evened is None or of_pairs(bundle.model) else evened for bundle in bundles]
    tallies: dict[tuple[str, str], list[npt.NDArray[np.float64]]] = {}
    told: dict[tuple[str, str], list[npt.NDArray[np.float64]]] = {}
    entropy: list[npt.NDArray[np.float64]] = []
    starts = range(0, len(images), BLOCK)
    # Filters and metrics are numpy's: they run beside the models, which take torch's own threads.
    with ThreadPoolExecutor(max_workers=min(4, cores_here())) as pool:
        for block, start in enumerate(starts):
            clean = images[start : start + BLOCK].astype(np.float32) / np.float32(255)
            entropy.append(metrics.target_entropy(clean))
            clean_read.append(reader.read(clean))
            truth = clean_read[-1] if labels is None else labels[start : start + BLOCK]
            for place, (key, degrade) in enumerate(conditions.items()):
                given, levels = degrade(clean, start)
                filtered = {kind: pool.submit(classical_filter, kind, given, settings[key][kind]) for kind in Filter}
                flat = given.reshape(len(given), -1)
                rows = slice(start, start + len(clean))
                found = [
                    denoiser.run(flat, extra)
                    if even is None
                    else even.denoised(rows, partial(denoiser.run, extras=extra))
                    for denoiser, extra, even in zip(denoisers, extras, shown, strict=True)
                ]
                denoised = [model.pixels.reshape(given.shape) for model in found]
                outputs = {"noisy": given, **{kind.value: future.result() for kind, future in filtered.items()}}
                if key in linear:
                    outputs[LINEAR] = linear[key](given)
                outputs |= dict(zip(names, denoised, strict=True))
                scored = pool.map(_per_image, repeat(clean), outputs.values(), repeat(entropy[-1]))
                for name, scores in zip(outputs, scored, strict=True):
                    right = reader.read(np.clip(outputs[name], 0.0, 1.0)) == truth
                    tallies.setdefault((key, name), []).append(np.concatenate([scores, right[None]]))
                for name, model in zip(names, found, strict=True):
                    if model.psnr is not None and model.noise_level is not None:
                        true = metrics.psnr_from_mse(metrics.mse(clean, model.pixels.reshape(given.shape)))
                        part = np.stack([model.psnr, np.minimum(true, MOST_PSNR), model.noise_level, levels])
                        told.setdefault((key, name), []).append(part)
                if progress is not None:
                    done = (block * len(conditions) + place + 1) / (len(starts) * len(conditions))
                    progress(f"evaluate: {start + len(clean):,} of {len(images):,} images, {key}", done)
    return Evaluation(
        len(images),
        description,
        seed if noisy is None else None,
        float(np.concatenate(entropy).mean()),
        None if labels is None else float((np.concatenate(clean_read) == labels).mean()),
        tuple(
            {
                "method": name,
                "architecture": bundle.architecture,
                "sha256": bundle.sha256,
                "folder": str(bundle.folder),
            }
            for name, bundle in zip(names, bundles, strict=True)
        ),
        tuple(
            Row(
                key,
                method,
                settings[key][Filter(method)] if method in set(Filter) else None,
                _scores(np.concatenate(parts, axis=1)),
            )
            for key in conditions
            for (there, method), parts in tallies.items()
            if there == key
        ),
        tuple(
            QualityRow(condition, method, quality_scores(*np.concatenate(parts, axis=1)))
            for (condition, method), parts in told.items()
        ),
        _image_errors(tallies, len(images), None if noisy is not None else seed),
    )


def _image_errors(
    tallies: dict[tuple[str, str], list[npt.NDArray[np.float64]]], count: int, seed: int | None
) -> ImageErrors:
    """Of the seed's mixture; of pairs where `seed` is None."""
    shown = PAIRS if seed is None else MIXTURE.key
    errors = {
        method: np.concatenate([part[0] for part in parts])
        for (condition, method), parts in tallies.items()
        if condition == shown
    }
    return ImageErrors(errors, None if seed is None else drawn_levels(MIXTURE, count, seed=seed))


def _linear_estimates(prior: npt.NDArray[np.uint8]) -> dict[str, Callable[[npt.NDArray[np.float32]], Any]]:
    """The linear MMSE estimate for each condition of fixed σ and r > 0."""
    moments = LinearMmse(prior)
    return {
        condition.key: moments.restorer(condition.recipe.sigma[0], condition.recipe.half_range[0])
        for condition in CONDITIONS
        if condition.fixed and condition.recipe.half_range[0] > 0.0
    }


def _model_names(bundles: Sequence[Bundle]) -> list[str]:
    """Each model's folder, with the first digits of its hash where two would be called alike."""
    given = [Path(bundle.folder) for bundle in bundles]
    folders = [path.name if path.name not in ("", "..") else path.resolve().name or "model" for path in given]
    taken = [*folders, "noisy", LINEAR, *(kind.value for kind in Filter)]
    names = [
        folder if taken.count(folder) == 1 else f"{folder} {bundle.sha256[:8]}"
        for folder, bundle in zip(folders, bundles, strict=True)
    ]
    for bundle in bundles:
        alike = [str(other.folder) for other in bundles if other.sha256 == bundle.sha256]
        if len(alike) > 1:
            raise FlagError(f"--model: {' and '.join(alike)} hold the same weights", hint="name each model once")
    if len(set(names)) < len(names):  # one is called as another is with its hash
        return [bundle.sha256[:16] for bundle in bundles]
    return names


def _drawn(seed: int) -> dict[str, Degrade]:
    """The protocol's noise."""

    def draw(condition: Condition, clean: Images, start: int) -> tuple[Images, npt.NDArray[np.float32]]:
        return degrade_with_levels(clean, condition, seed=seed, block=start // BLOCK)

    return {condition.key: partial(draw, condition) for condition in CONDITIONS}


def _given(noisy: Images) -> dict[str, Degrade]:
    """Noisy images that are there; their noise levels are not known."""

    def take(clean: Images, start: int) -> tuple[Images, npt.NDArray[np.float32]]:
        return noisy[start : start + len(clean)], np.full(len(clean), np.nan, np.float32)

    return {PAIRS: take}


def _per_image(
    clean: npt.NDArray[np.float32], other: npt.NDArray[np.float32], entropy: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """(6, n): squared error, PSNR (at most `MOST_PSNR`), SSIM, squared error over ink and pixels of ink, excess
    cross-entropy."""
    squared_error = metrics.mse(clean, other)
    excess = metrics.binary_cross_entropy(clean, other) - entropy
    return np.stack(
        [
            squared_error,
            np.minimum(metrics.psnr_from_mse(squared_error), MOST_PSNR),
            metrics.ssim(clean, other),
            *metrics.foreground(clean, other),
            excess,
        ]
    )


def _scores(per_image: npt.NDArray[np.float64]) -> Scores:
    found = _figures(per_image.mean(axis=1, keepdims=True))
    resampled = _figures(bootstrap.resampled_means(per_image))
    if per_image.shape[1] < 2:  # how far other images lie from it, one alone does not tell
        resampled = dict.fromkeys(resampled, np.zeros(0))
    return Scores(
        **{name: float(value[0]) for name, value in found.items()},
        intervals={name: bootstrap.interval(values) for name, values in resampled.items()},
    )


def _figures(means: npt.NDArray[np.float64]) -> dict[str, npt.NDArray[np.float64]]:
    """The figures of `Scores` from (7, m) means of `_per_image` and of what is read right: (m,) each."""
    squared_error, psnr, ssim, ink_error, ink, excess, right = means
    with np.errstate(invalid="ignore"):  # images without ink have no error where there is some
        over_ink = np.sqrt(ink_error / ink)
    return {
        "pooled_psnr": metrics.psnr_from_mse(squared_error),
        "mean_psnr": psnr,
        "ssim": ssim,
        "foreground_rmse": over_ink,
        "excess_cross_entropy": excess,
        "accuracy": right,
    }
