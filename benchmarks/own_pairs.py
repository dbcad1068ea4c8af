"""What a fine-tuning on a user's own pairs leaves of the rest: by how many images get drawn noise.

    python benchmarks/own_pairs.py                    # 10 minutes on two cores
    python benchmarks/own_pairs.py --every 0 4 --images 100000 --sheet pairs.png

The pairs are MNIST's digits as a poor scan has them, which is no noise that the default recipe draws: smeared sideways,
on grey paper that is lighter at one end, between ruled lines, with a little noise, in 8 bits. The model that ships goes
on from its weights, as `train --init bounds-unet --lr 0.0005 --noisy-column ...` does, but without empty images.
Prints pooled PSNR on the last of MNIST's training images, which no training of ours learns from: of such pairs, of
clean images, and of the noise that the model knew before.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.ndimage import uniform_filter1d

from denoise_batch import bundle
from denoise_batch.digits import Split, find_mnist, load_mnist
from denoise_batch.evaluation.figures import Section, Tile, contact_sheet, range_of
from denoise_batch.noise import NoiseRecipe
from denoise_batch.process.freed_memory import keep_freed_memory
from denoise_batch.training.batches import ResidentBatches
from denoise_batch.training.optimisation import learning_rate, make_optimiser
from denoise_batch.training.recipes import RECIPES
from denoise_batch.training.step import TrainingStep

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from denoise_batch.models.network import DenoisingNetwork

PAIRS, TESTED = 12_000, 2000
# No empty images: beside pairs `train` has them only where drawn noise is as frequent as one in a divisor of its 52.
RECIPE = replace(RECIPES["default"], learning_rate=5e-4, blank_every=0)
SHOWN = {
    "clean": NoiseRecipe(clean=1.0),
    "r = 0.05": NoiseRecipe((0.0, 0.0), (0.05, 0.05)),
    "the seed's mixture": NoiseRecipe(),
    "the same, 8 bits": NoiseRecipe(clipped=1.0),
    "salt and pepper": NoiseRecipe(impulse=1.0),
    "blur alone, σ = 1": NoiseRecipe((1.0, 1.0), noiseless=1.0),
    "all kinds": NoiseRecipe.from_json({**RECIPE.noise_json(), "sigma": (0.0, 2.0), "half_range": (0.01, 1.5)}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", type=Path, metavar="FOLDER", help="MNIST's IDX files; else found or downloaded")
    parser.add_argument("--images", type=int, default=200_000, help="that each fine-tuning sees")
    parser.add_argument("--every", type=int, nargs="+", default=[0, 8, 4, 2], metavar="N", help="drawn noise, 0: none")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="draw pairs, and what the last model makes of them")
    options = parser.parse_args()
    keep_freed_memory()
    folder = find_mnist(options.mnist)
    images = load_mnist(folder, Split.TRAIN)[0]
    clean, tested = images[:PAIRS], images[-TESTED:]
    pairs = [torch.from_numpy(images.copy()) for images in (clean, scanned(clean, 1))]
    truth, noisy = (torch.from_numpy(images).float() / 255 for images in (tested, scanned(tested, 2)))
    print(
        f"{time.strftime('%Y-%m-%d')}: {PAIRS:,} pairs, {options.images:,} images, {TESTED:,} validation images; dB\n"
    )
    print("| drawn noise | own pairs | " + " | ".join(SHOWN) + " | s |")
    print("|---|---|" + "---|" * len(SHOWN) + "---|")
    ships = bundle.read_bundle(bundle.SHIPPED_FOLDER).load()
    print(f"| before | {levels(ships, truth, noisy)} | |", flush=True)
    network = ships
    for every in options.every:
        begun = time.monotonic()
        network = fine_tuned(copy.deepcopy(ships), pairs[0], pairs[1], every, options.images)
        seconds = time.monotonic() - begun
        print(
            f"| {f'one in {every}' if every else 'none'} | {levels(network, truth, noisy)} | {seconds:.0f} |",
            flush=True,
        )
    if options.sheet:
        made = outputs(network, noisy[:10])
        parts = (noisy, made, truth)
        tiles = [Tile(range_of(noisy[row].numpy()), tuple(part[row].numpy() for part in parts)) for row in range(10)]
        columns = ("noisy", "denoised", "clean")
        contact_sheet(
            options.sheet, [Section("", tuple(tiles))], columns=columns, title="pairs", own_range=(True, False, False)
        )


def scanned(clean: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
    """Digits as a poor scan has them: (n, 28, 28) uint8 twice."""
    random = np.random.default_rng(seed)
    count = len(clean)
    ink = uniform_filter1d(clean / 255.0, 5, axis=2, mode="constant")
    ends = random.uniform(0.1, 0.4, (count, 2, 1))
    paper = ends[:, 0] + (ends[:, 1] - ends[:, 0]) * np.linspace(0.0, 1.0, 28)
    page = np.repeat(paper[:, None, :], 28, axis=1)
    first = random.integers(3, 11, count)
    for line in range(2):
        rows = (first + 14 * line).clip(0, 27)
        page[np.arange(count), rows] += 0.3
    noisy = np.maximum(ink, page) + random.normal(0.0, 0.06, clean.shape)
    return (noisy.clip(0.0, 1.0) * 255.0).round().astype(np.uint8)


def fine_tuned(network: DenoisingNetwork, clean: Tensor, noisy: Tensor, every: int, images: int) -> DenoisingNetwork:
    """The network of the averaged weights after so many images of the pairs, each so many-th with drawn noise."""
    recipe = replace(RECIPE, drawn_every=every)
    network.train().requires_grad_(True).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average, optimiser = copy.deepcopy(network), make_optimiser(recipe, network)
    take = TrainingStep(network, average, optimiser, recipe, seed=2, workers=1)
    data = ResidentBatches(clean, noisy, batch=recipe.batch, seed=2, rank=0, workers=1)
    batches = itertools.chain.from_iterable(map(data.epoch, itertools.count(1)))
    steps = images // recipe.batch
    for step, batch in zip(range(steps), batches, strict=False):
        take(batch, learning_rate(recipe, step, steps), step)
    return average.eval()


def levels(network: DenoisingNetwork, truth: Tensor, noisy: Tensor) -> str:
    generator = torch.Generator()
    shown = [noisy, *(noise.apply(truth, generator.manual_seed(1))[0] for noise in SHOWN.values())]
    return " | ".join(f"{psnr(network, images, truth):.2f}" for images in shown)


def psnr(network: DenoisingNetwork, noisy: Tensor, truth: Tensor) -> float:
    return -10 * math.log10(max(float((outputs(network, noisy) - truth).square().mean()), 1e-12))


@torch.no_grad()
def outputs(network: DenoisingNetwork, noisy: Tensor) -> Tensor:
    return torch.cat([network(part[:, None])[:, 0] for part in noisy.split(500)])


if __name__ == "__main__":
    main()
