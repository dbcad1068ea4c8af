"""What each part of the default network and of its training is worth: trainings that differ in one thing.

    python benchmarks/ablation.py                    # every variant, one after the other: 50 minutes on one core
    python benchmarks/ablation.py --images 1000000 --only "as it is" "AdamW, 0.005"
    python benchmarks/ablation.py --kinds            # one network for each kind of noise, beside one for all
    python benchmarks/ablation.py --kinds "blur alone" --init bounds-unet

Every variant sees as many images of MNIST's training set, with the seed's noise drawn afresh, its learning rate falling
to 0 as a cosine, all from one seed. Prints the pooled PSNR of the averaged weights on the last 5,000 training images,
the same noise for all: over the seed's mixture, and at its six levels; and images/s of training. The model that ships
comes first. Differences of less than 0.05 dB are not to be trusted. `--kinds` prints for each kind of noise what a
network reaches that saw nothing else, and what one reaches that saw all kinds in the default recipe's shares. With
`--init` all of them go on from that model's weights, at a tenth of the learning rate.
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

import torch

from denoise_batch import bundle
from denoise_batch.digits import Split, find_mnist, load_mnist
from denoise_batch.models.bounds_unet import BoundsUNet, Passed
from denoise_batch.noise import NoiseRecipe
from denoise_batch.process.freed_memory import keep_freed_memory
from denoise_batch.training.batches import ResidentBatches
from denoise_batch.training.optimisation import learning_rate, make_optimiser
from denoise_batch.training.recipes import RECIPES, Optimiser, Recipe
from denoise_batch.training.step import TrainingStep

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from denoise_batch.models.network import DenoisingNetwork

HELD_OUT = 5000
RECIPE = RECIPES["default"]
ALL = "trained on all kinds of noise"


class WithoutBounds(BoundsUNet):
    def _planes(self, noisy: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        pixels, planes = super()._planes(noisy, ends)
        planes[:, 4:12] = 0.0
        return pixels, planes


class WithoutSigns(WithoutBounds):
    """Neither bounds nor anything else about the noise: the pixels alone."""

    def _ends(self, noisy: Tensor) -> Tensor:
        return torch.zeros_like(super()._ends(noisy))


class WithoutSkip(BoundsUNet):
    """Nothing at 14×14 but what comes up from 7×7."""

    def _pass(self, noisy: Tensor) -> Passed:
        hook = self.join.register_forward_pre_hook(lambda _, given: (given[0], torch.zeros_like(given[1])))
        try:
            return super()._pass(noisy)
        finally:
            hook.remove()


class WithoutBottleneck(BoundsUNet):
    """Convolutions alone: no pixel hears of one that is far away."""

    def _pass(self, noisy: Tensor) -> Passed:
        hook = self.expand.register_forward_hook(lambda _, given, __: given[1])
        try:
            return super()._pass(noisy)
        finally:
            hook.remove()


def _adamw(rate: float) -> Recipe:
    return replace(RECIPE, optimiser=Optimiser.ADAMW, learning_rate=rate)


VARIANTS: dict[str, tuple[Callable[[], BoundsUNet], Recipe]] = {
    "as it is": (BoundsUNet, RECIPE),
    "AdamW, 0.002": (BoundsUNet, _adamw(2e-3)),
    "AdamW, 0.005": (BoundsUNet, _adamw(5e-3)),
    "without bounds": (WithoutBounds, RECIPE),
    "the pixels alone": (WithoutSigns, RECIPE),
    "without skip path": (WithoutSkip, RECIPE),
    "without bottleneck": (WithoutBottleneck, RECIPE),
    "half the channels at 7×7": (lambda: BoundsUNet(deep=32), RECIPE),
    "half the channels at 14×14": (lambda: BoundsUNet(width=16), RECIPE),
    "one more convolution at 7×7": (lambda: BoundsUNet(blocks_in=2), RECIPE),
    "all images count alike": (BoundsUNet, replace(RECIPE, balance=0.0)),
    ALL: (BoundsUNet, RECIPE),
}

KINDS = {
    "uniform": NoiseRecipe(),
    "uniform, 8 bits": NoiseRecipe(clipped=1.0),
    "Gaussian": NoiseRecipe(gaussian=1.0),
    "Gaussian, 8 bits": NoiseRecipe(gaussian=1.0, clipped=1.0),
    "salt and pepper": NoiseRecipe(impulse=1.0),
    "blur alone": NoiseRecipe(noiseless=1.0),
    "clean": NoiseRecipe(clean=1.0),
}
SHOWN = {
    "mixture": NoiseRecipe(),
    **{f"i={i}": NoiseRecipe((0.5 * i, 0.5 * i), (0.4 * i, 0.4 * i)) for i in range(6)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", type=Path, metavar="FOLDER", help="MNIST's IDX files; else found or downloaded")
    parser.add_argument("--images", type=int, default=400_000, help="that each network is trained on")
    parser.add_argument("--only", nargs="*", choices=VARIANTS, help="of the variants")
    parser.add_argument("--batch", type=int, default=RECIPE.batch)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--kinds", nargs="*", choices=KINDS, help="one network for each of these kinds, and one for all"
    )
    parser.add_argument("--init", type=Path, metavar="MODEL", help="with --kinds: begin with this model's weights")
    options = parser.parse_args()
    if options.kinds is None and options.init is not None:
        parser.error("--init is for --kinds")
    if options.kinds is not None and options.only is not None:
        parser.error("--only is of the variants, --kinds compares others")
    torch.set_num_threads(1)
    keep_freed_memory()
    pixels = torch.from_numpy(load_mnist(find_mnist(options.mnist), Split.TRAIN)[0].copy()).to(options.device)
    held_out = pixels[-HELD_OUT:].float() / 255
    where = torch.cuda.get_device_name() if options.device == "cuda" else "one thread"
    print(
        f"{time.strftime('%Y-%m-%d')}: {options.images:,} images each, in batches of {options.batch}, {where}, "
        "one seed\n"
    )
    if options.device == "cuda":
        torch.backends.cudnn.benchmark = True
    all_kinds = NoiseRecipe.from_json(RECIPE.noise_json())
    usual = replace(RECIPE, batch=options.batch)
    if options.kinds is not None:
        compare_kinds(options, usual, all_kinds, pixels)
        return
    print("| variant | weights | " + " | ".join(f"{name}, dB" for name in SHOWN) + " | images/s |")
    print("|---|---|" + "---|" * len(SHOWN) + "---|")
    ships = bundle.read_bundle(bundle.SHIPPED_FOLDER).load(options.device)
    print(f"| that ships | {ships.parameter_count():,} | {_levels(ships, held_out)} | |", flush=True)
    for name, (make, recipe) in VARIANTS.items():
        if options.only is None or name in options.only:
            network, rate = train(
                _fresh(make),
                replace(recipe, batch=options.batch),
                all_kinds if name == ALL else NoiseRecipe(),
                pixels,
                options.images,
            )
            print(
                f"| {name} | {network.parameter_count():,} | {_levels(network, held_out)} | {rate:,.0f} |", flush=True
            )


def compare_kinds(options: argparse.Namespace, recipe: Recipe, all_kinds: NoiseRecipe, pixels: Tensor) -> None:
    """Prints a line for each kind of noise."""

    def begun() -> BoundsUNet:
        return _fresh(BoundsUNet) if options.init is None else _model(options.init)

    if options.init is not None:
        recipe = replace(recipe, learning_rate=recipe.learning_rate / 10.0)
    general, _ = train(begun(), recipe, all_kinds, pixels, options.images)
    before = "" if options.init is None else " before |"
    print(f"| noise |{before} trained on it alone | trained on all kinds | difference, dB |")
    print("|---|---|---|---|" + ("---|" if before else ""))
    held_out = pixels[-HELD_OUT:].float() / 255
    for name in options.kinds or KINDS:
        alone, _ = train(begun(), recipe, KINDS[name], pixels, options.images)
        networks = [alone, general] if options.init is None else [begun().to(pixels.device), alone, general]
        found = [psnr(network, held_out, KINDS[name]) for network in networks]
        print(f"| {name} | {' | '.join(f'{each:.2f}' for each in found)} | {found[-1] - found[-2]:+.2f} |", flush=True)


def _model(folder: Path) -> BoundsUNet:
    network = bundle.read_bundle(bundle.shipped_folder(folder) or folder).load()
    if not isinstance(network, BoundsUNet):
        raise SystemExit(f"--init {folder}: its network is no bounds-unet")
    return network.requires_grad_(True).train()


def _fresh(make: Callable[[], BoundsUNet]) -> BoundsUNet:
    torch.manual_seed(0)
    return make()


def train(
    network: BoundsUNet, recipe: Recipe, noise: NoiseRecipe, pixels: Tensor, images: int
) -> tuple[BoundsUNet, float]:
    """Trains a network where the pixels are; the one of the averaged weights, and its training's images/s."""
    recipe = replace(recipe, **noise.to_json())
    network.to(pixels.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    average, optimiser = copy.deepcopy(network), make_optimiser(recipe, network)
    take = TrainingStep(network, average, optimiser, recipe, seed=2, workers=1)
    data = ResidentBatches(pixels[:-HELD_OUT], None, batch=recipe.batch, seed=2, rank=0, workers=1)
    batches = itertools.chain.from_iterable(map(data.epoch, itertools.count(1)))
    steps, begun = images // recipe.batch, time.monotonic()
    for step, batch in zip(range(steps), batches, strict=False):
        take(batch, learning_rate(recipe, step, steps), step)
    if pixels.is_cuda:
        torch.cuda.synchronize()
    return average, steps * recipe.batch / (time.monotonic() - begun)


def _levels(network: DenoisingNetwork, clean: Tensor) -> str:
    return " | ".join(f"{psnr(network, clean, noise):.2f}" for noise in SHOWN.values())


@torch.no_grad()
def psnr(network: DenoisingNetwork, clean: Tensor, noise: NoiseRecipe) -> float:
    noisy = noise.apply(clean.cpu(), torch.Generator().manual_seed(1))[0].to(clean.device)
    error = sum(
        float((network(part[:, None])[:, 0] - truth).square().sum())
        for part, truth in zip(noisy.split(500), clean.split(500), strict=True)
    )
    return -10 * math.log10(max(error / clean.numel(), 1e-12))


if __name__ == "__main__":
    main()
