"""What each part of the default network and of its training is worth: trainings that differ in one thing.

    python benchmarks/ablation.py                    # every variant, one after the other: 40 minutes on one core
    python benchmarks/ablation.py --images 1000000 --only "as it is" "AdamW, 0.005"

Every variant sees as many images of MNIST's training set, with the seed's noise drawn afresh (the last line: with the
default recipe's kinds of noise), its learning rate falling to 0 as a cosine, all from one seed. Prints the pooled PSNR
of the averaged weights over the seed's mixture on the last 5,000 training images, the same noise for all, and images/s
of training. Differences of less than 0.05 dB are not to be trusted.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from denoise_batch.digits import Split, find_mnist, load_mnist
from denoise_batch.freed_memory import keep_freed_memory
from denoise_batch.models.bounds_unet import BoundsUNet
from denoise_batch.noise import NoiseRecipe
from denoise_batch.training.loop import learning_rate, make_optimiser
from denoise_batch.training.recipes import RECIPES, Optimiser, Recipe

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

HELD_OUT = 5000
RECIPE = RECIPES["default"]
KINDS = "trained on all kinds of noise"


class WithoutBounds(BoundsUNet):
    def _planes(self, noisy: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        pixels, planes = super()._planes(noisy, ends)
        planes[:, 4:12] = 0.0
        return pixels, planes


class WithoutSigns(WithoutBounds):
    """Neither bounds nor anything else about the noise: the pixels alone."""

    def _pass(self, noisy: Tensor, ends: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return super()._pass(noisy, torch.zeros_like(ends))


class WithoutSkip(BoundsUNet):
    """Nothing but what went through 7×7: what comes up from there is taken in place of the sum."""

    def _pass(self, noisy: Tensor, ends: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        found: list[Tensor] = []
        hooks = [
            self.up.register_forward_hook(lambda _, __, made: found.append(made)),
            self.fine_out.register_forward_pre_hook(lambda _, given: _spread(found[-1]).to(given[0].dtype)),
        ]
        try:
            return super()._pass(noisy, ends)
        finally:
            for hook in hooks:
                hook.remove()


def _spread(up: Tensor) -> Tensor:
    """(n, 7, 7, (2, 2, width)) → (n, width, 14, 14), as the network itself does."""
    return up.view(len(up), 7, 7, 2, -1).transpose(2, 3).reshape(len(up), 14, 14, -1).permute(0, 3, 1, 2)


class WithoutBottleneck(BoundsUNet):
    """Convolutions alone: no pixel hears of one that is far away."""

    def _pass(self, noisy: Tensor, ends: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        hook = self.expand.register_forward_hook(lambda _, __, made: torch.zeros_like(made))
        try:
            return super()._pass(noisy, ends)
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
    "half the channels at 7×7": (lambda: BoundsUNet(deep=24), RECIPE),
    "twice the channels at 14×14": (lambda: BoundsUNet(width=32), RECIPE),
    "one more convolution at 7×7": (lambda: BoundsUNet(blocks_in=2), RECIPE),
    KINDS: (BoundsUNet, RECIPE),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", type=Path, metavar="FOLDER", help="MNIST's IDX files; else found or downloaded")
    parser.add_argument("--images", type=int, default=400_000, help="that each variant is trained on")
    parser.add_argument("--only", nargs="*", choices=VARIANTS, help="of the variants")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    pixels = torch.from_numpy(load_mnist(find_mnist(options.mnist), Split.TRAIN)[0].copy())
    print(f"{time.strftime('%Y-%m-%d')}: {options.images:,} images each, one thread, one seed\n")
    print("| variant | weights | dB over the seed's mixture | images/s |")
    print("|---|---|---|---|")
    for name, (make, recipe) in VARIANTS.items():
        if options.only is None or name in options.only:
            torch.manual_seed(0)
            noise = NoiseRecipe.from_json(recipe.noise_json()) if name == KINDS else NoiseRecipe()
            network = make()
            found, rate = train(network, recipe, noise, pixels, options.images)
            print(f"| {name} | {network.parameter_count():,} | {found:.2f} | {rate:,.0f} |", flush=True)


def train(network: BoundsUNet, recipe: Recipe, noise: NoiseRecipe, pixels: Tensor, images: int) -> tuple[float, float]:
    """Trains a network; its PSNR in dB, and the images/s that it was trained at."""
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average, optimiser = copy.deepcopy(network), make_optimiser(recipe, network)
    random, steps, begun = torch.Generator().manual_seed(2), images // recipe.batch, time.monotonic()
    for step in range(steps):
        rows = torch.randint(0, len(pixels) - HELD_OUT, (recipe.batch,), generator=random)
        clean = pixels[rows].float() / 255
        noisy = noise.apply(clean, random)[0]
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision.bfloat16(torch.device("cpu"))):
            logits = network.logits(noisy[:, None])
        functional.binary_cross_entropy_with_logits(logits.float(), clean[:, None]).backward()
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(recipe, step, steps)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        decay = min(recipe.average, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1.0 - decay)
    rate = steps * recipe.batch / (time.monotonic() - begun)
    return psnr(average, pixels[-HELD_OUT:].float() / 255), rate


@torch.no_grad()
def psnr(network: BoundsUNet, clean: Tensor) -> float:
    noisy = NoiseRecipe().apply(clean, torch.Generator().manual_seed(1))[0]
    error = sum(
        float((network(part[:, None])[:, 0] - truth).square().sum())
        for part, truth in zip(noisy.split(500), clean.split(500), strict=True)
    )
    return -10 * math.log10(error / clean.numel())


if __name__ == "__main__":
    main()
