"""What is left of scans whose noise is alike in neighbouring pixels, and what a model makes of them.

    python benchmarks/grain.py --images 4000 [--sheet docs/figures/grain.png]

MNIST's test images, blurred by 0.7 pixels, with Gaussian noise of so much of full ink that was itself blurred by so
many pixels, in 8 bits; at last digits scanned in 20 × 20 pixels, with white noise, and enlarged. Prints the pooled PSNR
in dB of the scans and of what the model makes of them, and the mean of the true one and of what is expected. The sheet
shows digits of some of them: clean, scanned, and what the model makes of that.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.nn import functional

from denoise_batch.bundle import SHIPPED_FOLDER, read_bundle
from denoise_batch.denoiser import Denoiser
from denoise_batch.digits.mnist import Split, find_mnist, load_mnist
from denoise_batch.extra_columns import ExtraColumns
from denoise_batch.models.quality_head import MOST_PSNR
from denoise_batch.noise import NoiseRecipe, clip_to_uint8

BLUR: Final = 0.7
SIDE_BEFORE: Final = 20
ENLARGED: Final = f"{SIDE_BEFORE} × {SIDE_BEFORE} pixels, enlarged"
GRAINS: Final = {"nothing (white)": 0.0, "0.6 pixels": 0.6, "one pixel": 1.0, ENLARGED: None}
LEVELS: Final = (0.05, 0.1, 0.2, 0.3)
SHOWN: Final = 0.2
DIGITS: Final = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--model", type=Path, default=SHIPPED_FOLDER, help="a model folder")
    parser.add_argument("--mnist", type=Path, help="the folder of its files; else as denoise-batch finds it")
    parser.add_argument("--sheet", type=Path, help="a PNG file")
    options = parser.parse_args()
    digits = load_mnist(find_mnist(options.mnist), Split.TEST)[0][: options.images].reshape(-1, 28, 28)
    clean = torch.from_numpy((digits / 255).astype(np.float32))
    denoiser = Denoiser(read_bundle(options.model), device="cpu")
    print("| noise is alike over | noise | scan, dB | model, dB | mean | expected |")
    print("|---" * 6 + "|")
    shown = []
    for name, grain in GRAINS.items():
        for level in LEVELS:
            scans = scanned(clean, grain, level)
            made = denoiser.run((255.0 * scans).round().to(torch.uint8).flatten(1).numpy(), ExtraColumns(quality=True))
            assert made.psnr is not None
            pixels = torch.from_numpy(made.pixels).view_as(clean)
            true = decibels((pixels - clean).square().mean(dim=(1, 2))).clamp_max(MOST_PSNR)
            pooled = [float(decibels((image - clean).square().mean())) for image in (scans, pixels)]
            cells = [*pooled, float(true.mean()), float(made.psnr.clip(max=MOST_PSNR).mean())]
            print(f"| {name} | {level:g} | {' | '.join(f'{cell:.1f}' for cell in cells)} |", flush=True)
            if level == SHOWN:
                shown.append((name, (clean, scans, pixels)))
    if options.sheet is not None:
        draw(shown, options.sheet)


def scanned(clean: torch.Tensor, grain: float | None, level: float) -> torch.Tensor:
    """Clean images as such a scan has them, the same each time: (n, 28, 28) float32 in 256 steps.

    Args:
        grain: over how many pixels noise is alike; None enlarges what was scanned with white noise.
    """
    generator = torch.Generator().manual_seed(20261129)
    if grain is None:
        small = functional.interpolate(clean[:, None], size=SIDE_BEFORE, mode="bilinear", antialias=True)
        small = (small + level * torch.randn(small.shape, generator=generator)).clamp(0.0, 1.0)
        return clip_to_uint8(functional.interpolate(small, size=28, mode="bicubic")[:, 0])
    levels = (BLUR, BLUR), (level * 3**0.5, level * 3**0.5)
    recipe = NoiseRecipe(*levels, clipped=1.0, gaussian=float(grain == 0.0), grain=float(grain > 0.0))
    draw = recipe.draw(len(clean), generator)
    if draw.grain is not None:
        draw = replace(draw, grain=torch.full_like(draw.grain, grain))
    return draw.degrade(clean)[0]


def decibels(error: torch.Tensor) -> torch.Tensor:
    return -10.0 * error.clamp_min(1e-9).log10()


def draw(shown: list[tuple[str, tuple[torch.Tensor, ...]]], path: Path) -> None:
    """Columns: a kind of scan each; rows: each digit clean, scanned, and what is made of it."""
    figure = Figure(figsize=(2.4 * len(shown), 0.82 * DIGITS + 0.4), layout="constrained")
    grid = figure.subplots(DIGITS, len(shown), squeeze=False)
    for column, (name, images) in enumerate(shown):
        for row in range(DIGITS):
            axes = grid[row][column]
            axes.imshow(torch.cat([image[row] for image in images], dim=1), cmap="gray_r", vmin=0, vmax=1)
            axes.set_axis_off()
        grid[0][column].set_title(name, fontsize=8)
    figure.supxlabel("each: clean, scanned, denoised", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
