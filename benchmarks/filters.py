"""Filters of well-kept libraries beside the default model: total variation, non-local means and BM3D.

    pip install scikit-image bm3d                    # for this alone; BM3D's licence is for research without profit
    python benchmarks/filters.py

They are too slow, or too restricted in what they may be used for, to stand in `evaluate`. The noise is `evaluate`'s,
under the seed's eight conditions: total variation on all of the test images that are asked for, non-local means and
BM3D on the first so many, and the default model on the same ones. Non-local means and BM3D are told each image's true
noise level, which no user knows; their other setting, and total variation's only one, is the best of a few on the first
images of the training set, for each condition. Output is clipped to 0..1. Prints pooled PSNR in dB, and what a filter
or the model takes an image, without the drawing of noise.
"""

from __future__ import annotations

import argparse
import functools
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from denoise_batch import bundle
from denoise_batch.denoiser import Denoiser
from denoise_batch.digits import Split, find_mnist, load_mnist
from denoise_batch.evaluation.protocol import BLOCK, CONDITIONS, NOISE_SEED, SETTINGS_SEED, degrade_with_levels
from denoise_batch.precision import Precision

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from denoise_batch.evaluation.protocol import Condition

    Images = NDArray[np.float32]
    Filter = Callable[[Images, float, float], NDArray[np.float64]]  # one image, its noise level, the setting
    Denoise = Callable[[Images, Images, float], Images]  # many

LEAST_LEVEL = 1e-3  # noise that is told to a filter where there is none


def total_variation(noisy: Images, _: float, setting: float) -> NDArray[np.float64]:
    """Chambolle's, 2004; the setting is the weight of the variation."""
    from skimage.restoration import denoise_tv_chambolle

    made: NDArray[np.float64] = denoise_tv_chambolle(noisy, weight=setting)
    return made


def non_local_means(noisy: Images, level: float, setting: float) -> NDArray[np.float64]:
    """Buades, Coll and Morel's, 2005; the setting is its strength in units of the noise."""
    from skimage.restoration import denoise_nl_means

    made: NDArray[np.float64] = denoise_nl_means(
        noisy, patch_size=5, patch_distance=9, h=setting * level, sigma=level, fast_mode=True
    )
    return made


def block_matching(noisy: Images, level: float, setting: float) -> NDArray[np.float64]:
    """BM3D: Dabov, Foi, Katkovnik and Egiazarian's, 2007; the setting is a factor on the noise that it is told."""
    from bm3d import bm3d

    made: NDArray[np.float64] = bm3d(noisy.astype(np.float64), setting * level)
    return made


FILTERS: dict[str, tuple[Filter, tuple[float, ...]]] = {
    "total variation": (total_variation, (0.02, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0, 1.4)),
    "non-local means": (non_local_means, (0.6, 0.9, 1.2, 1.6)),
    "BM3D": (block_matching, (0.8, 1.0, 1.3)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", type=Path, metavar="FOLDER", help="MNIST's IDX files; else found or downloaded")
    parser.add_argument(
        "--images", type=int, nargs=3, default=[10_000, 500, 500], help="for each filter, in turn; 0: none"
    )
    parser.add_argument("--chosen-on", type=int, nargs=3, default=[200, 50, 10], help="training images, likewise")
    options = parser.parse_args()
    folder = find_mnist(options.mnist)
    train, test = (load_mnist(folder, split)[0] / np.float32(255) for split in (Split.TRAIN, Split.TEST))
    model = Denoiser(bundle.read_bundle(bundle.SHIPPED_FOLDER), device="cpu", precision=Precision.FLOAT32)

    def of_model(noisy: Images, _: Images, __: float) -> Images:
        return model(noisy.reshape(-1, 784)).reshape(-1, 28, 28)

    conditions = [condition for condition in CONDITIONS if not condition.other]
    print(time.strftime("%Y-%m-%d"), "\n")
    print("| filter | images | " + " | ".join(condition.key for condition in conditions) + " | ms an image |")
    print("|---|---|" + "---|" * (len(conditions) + 1))
    for (name, (one, grid)), count, tried in zip(FILTERS.items(), options.images, options.chosen_on, strict=True):
        if not count:
            continue
        line, ours = [], []
        denoise: Denoise = functools.partial(one_by_one, one)
        timed = [Timed(denoise), Timed(of_model)]
        for condition in conditions:
            scores = {setting: psnr(denoise, train[:tried], condition, setting, SETTINGS_SEED) for setting in grid}
            best = max(scores, key=scores.__getitem__)
            line.append(psnr(timed[0], test[:count], condition, best))
            ours.append(psnr(timed[1], test[:count], condition, 0))
        for what, found, taken in zip((name, "the default model"), (line, ours), timed, strict=True):
            cells = " | ".join(f"{value:.2f}" for value in found)
            print(f"| {what} | {count:,} | {cells} | {1e3 * taken.seconds / count / len(conditions):.2g} |", flush=True)


class Timed:
    """A `Denoise`, and the seconds that it has taken."""

    def __init__(self, denoise: Denoise) -> None:
        self._denoise = denoise
        self.seconds = 0.0

    def __call__(self, noisy: Images, levels: Images, setting: float) -> Images:
        begun = time.monotonic()
        made = self._denoise(noisy, levels, setting)
        self.seconds += time.monotonic() - begun
        return made


def one_by_one(denoise: Filter, noisy: Images, levels: Images, setting: float) -> Images:
    told = np.maximum(levels, LEAST_LEVEL)
    made = [denoise(image, float(level), setting) for image, level in zip(noisy, told, strict=True)]
    return np.clip(np.stack(made), 0.0, 1.0).astype(np.float32)


def psnr(denoise: Denoise, clean: Images, condition: Condition, setting: float, seed: int = NOISE_SEED) -> float:
    """Pooled PSNR in dB over the images."""
    error = 0.0
    for block, start in enumerate(range(0, len(clean), BLOCK)):
        part = clean[start : start + BLOCK]
        noisy, levels = degrade_with_levels(part, condition, seed=seed, block=block)
        error += float(((denoise(noisy, levels, setting) - part) ** 2).sum(dtype=np.float64))
    return -10 * float(np.log10(max(error / clean.size, 1e-12)))


if __name__ == "__main__":
    main()
