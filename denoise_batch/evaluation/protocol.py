"""The evaluation protocol: which noise, from which seeds, and the classical filters' settings. `evaluate` runs it.

The seed's conditions are eight: its training mixture; the same noisy images clipped to 8 bits, as scanners write them;
and the six levels of its first figure. Eight more are of other kinds. The noise comes from published seeds and is
drawn on the CPU in blocks, so that image i is degraded alike however many images are taken, whatever runs the models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from denoise_batch.evaluation import metrics
from denoise_batch.evaluation.baselines import GRIDS, Filter, classical_filter
from denoise_batch.noise import SEED_LEVELS, NoiseRecipe

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy.typing as npt

    from denoise_batch.noise import NoiseDraw

NOISE_SEED: Final = 2019
"""Seeds the noise of every published table."""
SETTINGS_SEED: Final = 1936
"""Seeds the noise under which the filters' settings were chosen."""
SETTINGS_IMAGES: Final = 1000
"""The settings were chosen on that many first images of MNIST's training set."""

BLOCK: Final = 500
"""Images a step. Part of the protocol: each block's noise has a generator of its own."""


@dataclass(frozen=True)
class Condition:
    """One way to degrade the images.

    Attributes:
        key: its name in tables and JSON.
        recipe: the ranges its levels are drawn from.
        stream: which stream of random numbers it uses; two conditions of one stream see the same noise.
        other: whether it is of another kind than the seed's noise; such conditions stand in a table of their own.
        beyond_training: whether it lies outside the seed's training range, so that models trained there extrapolate.
    """

    key: str
    recipe: NoiseRecipe
    stream: int
    beyond_training: bool = False
    other: bool = False

    @property
    def fixed(self) -> bool:
        """Whether all images have the same σ and r."""
        sigma, half_range = self.recipe.sigma, self.recipe.half_range
        return sigma[0] == sigma[1] and half_range[0] == half_range[1]


def _seed_conditions() -> tuple[Condition, ...]:
    mixture = NoiseRecipe()
    levels = (
        Condition(
            f"i={i}",
            NoiseRecipe((sigma, sigma), (half_range, half_range)),
            stream=1 + i,
            beyond_training=sigma > mixture.sigma[1] or half_range > mixture.half_range[1],
        )
        for i, (sigma, half_range) in enumerate(SEED_LEVELS)
    )
    return (Condition("mixture", mixture, 0), Condition("uint8", NoiseRecipe(clipped=1.0), 0), *levels)


def _other_conditions() -> tuple[Condition, ...]:
    """All kinds mixed, Gaussian noise as it is and clipped to 8 bits, salt and pepper; blur alone; noise that is faint;
    scans of few levels of grey; noise that is alike in neighbouring pixels, in 8 bits.

    Levels of noise are drawn as in the seed's mixture, but for the last four.
    """
    kinds = NoiseRecipe(clipped=0.25, noiseless=0.06, clean=0.05, gaussian=0.15, impulse=0.07)
    few = {"noiseless": 0.25, "clean": 0.15, "gaussian": 0.2, "impulse": 0.15, "few_levels": 1.0}
    recipes = (
        ("kinds", kinds, 7),
        ("gaussian", NoiseRecipe(gaussian=1.0), 8),
        ("gaussian8", NoiseRecipe(gaussian=1.0, clipped=1.0), 8),
        ("impulse", NoiseRecipe(impulse=1.0), 9),
        ("blur", NoiseRecipe((1.0, 1.0), (0.0, 0.0)), 10),
        ("faint", NoiseRecipe((0.0, 0.0), (0.05, 0.05)), 11),
        ("levels", NoiseRecipe((0.0, 1.5), (0.01, 0.8), clipped=1.0, **few), 12),
        ("grain", NoiseRecipe((0.0, 1.5), (0.01, 0.8), clipped=1.0, grain=1.0), 13),
    )
    return tuple(Condition(key, recipe, stream, other=True) for key, recipe, stream in recipes)


CONDITIONS: Final = (*_seed_conditions(), *_other_conditions())
MIXTURE: Final = CONDITIONS[0]
"""The seed's noise, with levels drawn for each image."""
PAIRS: Final = "pairs"
"""The key of the one condition where noisy images are given, and none are drawn."""

FILTER_SETTINGS: Final[dict[str, dict[Filter, float]]] = {
    "mixture": {Filter.MEDIAN: 5, Filter.GAUSSIAN: 1.25, Filter.WIENER: 5},
    "uint8": {Filter.MEDIAN: 5, Filter.GAUSSIAN: 1.0, Filter.WIENER: 5},
    "i=0": {Filter.MEDIAN: 3, Filter.GAUSSIAN: 0.25, Filter.WIENER: 3},
    "i=1": {Filter.MEDIAN: 3, Filter.GAUSSIAN: 0.75, Filter.WIENER: 3},
    "i=2": {Filter.MEDIAN: 5, Filter.GAUSSIAN: 1.0, Filter.WIENER: 5},
    "i=3": {Filter.MEDIAN: 7, Filter.GAUSSIAN: 1.5, Filter.WIENER: 5},
    "i=4": {Filter.MEDIAN: 9, Filter.GAUSSIAN: 2.5, Filter.WIENER: 7},
    "i=5": {Filter.MEDIAN: 9, Filter.GAUSSIAN: 3.0, Filter.WIENER: 9},
    "kinds": {Filter.MEDIAN: 5, Filter.GAUSSIAN: 1.0, Filter.WIENER: 5},
    "gaussian": {Filter.MEDIAN: 5, Filter.GAUSSIAN: 1.25, Filter.WIENER: 5},
    "gaussian8": {Filter.MEDIAN: 5, Filter.GAUSSIAN: 1.0, Filter.WIENER: 5},
    "impulse": {Filter.MEDIAN: 5, Filter.GAUSSIAN: 1.0, Filter.WIENER: 5},
    "blur": {Filter.MEDIAN: 3, Filter.GAUSSIAN: 0.25, Filter.WIENER: 3},
    "faint": {Filter.MEDIAN: 3, Filter.GAUSSIAN: 0.25, Filter.WIENER: 3},
    "levels": {Filter.MEDIAN: 3, Filter.GAUSSIAN: 0.75, Filter.WIENER: 5},
    "grain": {Filter.MEDIAN: 3, Filter.GAUSSIAN: 0.75, Filter.WIENER: 5},
}
"""Side of the window in pixels (median, Wiener) or σ (Gaussian) for each condition: what `choose_filter_settings` gives
on the first `SETTINGS_IMAGES` images of MNIST's training set."""


def degrade_images(
    clean: npt.NDArray[np.float32], condition: Condition, *, seed: int = NOISE_SEED, block: int = 0
) -> npt.NDArray[np.float32]:
    """The noisy images of one block.

    Args:
        clean: (n, 28, 28) float32, n at most 500: images 500 × `block` and on.

    Returns:
        (n, 28, 28) float32.
    """
    return degrade_with_levels(clean, condition, seed=seed, block=block)[0]


def degrade_with_levels(
    clean: npt.NDArray[np.float32], condition: Condition, *, seed: int = NOISE_SEED, block: int = 0
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """As `degrade_images`; and the noise level of each image, (n,), as `NoiseDraw.degrade` defines it."""
    padded = torch.zeros((BLOCK, *clean.shape[1:]))
    padded[: len(clean)] = torch.from_numpy(clean)
    noisy, levels = _draw(condition, seed, block).degrade(padded)
    return noisy[: len(clean)].numpy(), levels[: len(clean)].numpy()


def drawn_levels(
    condition: Condition, count: int, *, seed: int = NOISE_SEED
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """σ in pixels and r in units of full ink, (count,) float32 each, of the first so many images."""
    draws = [_draw(condition, seed, block) for block in range(-(-count // BLOCK))]
    sigma = torch.cat([draw.sigma for draw in draws])[:count]
    half_range = torch.cat([draw.half_range for draw in draws])[:count]
    return sigma.numpy(), half_range.numpy()


def _draw(condition: Condition, seed: int, block: int) -> NoiseDraw:
    """What is random about a block's noise.

    A full block is drawn even where fewer images are left: image i then gets the same noise whatever comes after it.
    """
    state = np.random.SeedSequence([seed, condition.stream, block]).generate_state(1, np.uint64)
    return condition.recipe.draw(BLOCK, torch.Generator().manual_seed(int(state[0] >> np.uint64(1))))


def choose_filter_settings(
    images: npt.NDArray[np.uint8], *, seed: int = SETTINGS_SEED
) -> dict[str, dict[Filter, float]]:
    """For each condition and filter, the setting of `baselines.GRIDS` with the highest pooled PSNR.

    Args:
        images: (n, 28, 28) uint8, clean; other ones than those evaluated on.

    Returns:
        settings by condition, as in `FILTER_SETTINGS`.
    """
    chosen: dict[str, dict[Filter, float]] = {}
    for condition in CONDITIONS:
        blocks = []
        for block, start in enumerate(range(0, len(images), BLOCK)):
            clean = images[start : start + BLOCK].astype(np.float32) / np.float32(255)
            blocks.append((clean, degrade_images(clean, condition, seed=seed, block=block)))
        chosen[condition.key] = best_filter_settings(blocks)
    return chosen


def best_filter_settings(
    blocks: Iterable[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]],
) -> dict[Filter, float]:
    """For each filter, the setting of `baselines.GRIDS` with the highest pooled PSNR.

    Args:
        blocks: clean and noisy images, (n, 28, 28) float32 each.
    """
    errors: dict[tuple[Filter, float], list[npt.NDArray[np.float64]]] = {}
    for clean, noisy in blocks:
        for kind, grid in GRIDS.items():
            for setting in grid:
                error = metrics.mse(clean, classical_filter(kind, noisy, setting))
                errors.setdefault((kind, setting), []).append(error)
    means = {place: float(np.concatenate(parts).mean()) for place, parts in errors.items()}
    return {kind: min((means[kind, setting], setting) for setting in grid)[1] for kind, grid in GRIDS.items()}
