"""How far the default model is from what a network can do: one of eleven times its arithmetic, trained for MINUTES.

    python benchmarks/ceiling.py --device cuda --minutes 10

It learns from the same noise as the default recipe has, its learning rate falling to 0 as a cosine of the time. Prints,
a dozen times, the pooled PSNR of the averaged weights over the seed's mixture, on the last 5,000 training images and on
as many that it learns from: a growing distance of the two says that it is images that are missing, not time. A curve
becomes flat as the learning rate goes to 0: the ceiling is reached where twice the time ends no higher. At the end the
same for all levels, beside the default model's.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from dataclasses import replace
from pathlib import Path

import torch
from ablation import HELD_OUT, RECIPE, SHOWN, psnr

from denoise_batch import bundle
from denoise_batch.digits import Split, find_mnist, load_mnist
from denoise_batch.models.bounds_unet import BoundsUNet
from denoise_batch.training.batches import ResidentBatches
from denoise_batch.training.optimisation import learning_rate, make_optimiser
from denoise_batch.training.step import TrainingStep

LINES = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", type=Path, metavar="FOLDER", help="MNIST's IDX files; else found or downloaded")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=RECIPE.learning_rate)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    options = parser.parse_args()
    pixels = torch.from_numpy(load_mnist(find_mnist(options.mnist), Split.TRAIN)[0].copy()).to(options.device)
    held_out, seen = pixels[-HELD_OUT:].float() / 255, pixels[:HELD_OUT].float() / 255
    if options.device == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False  # of what is evaluated; training is in bfloat16
    torch.manual_seed(0)
    recipe = replace(RECIPE, batch=options.batch, learning_rate=options.lr)
    network = BoundsUNet(96, 192, 512, blocks_in=2, blocks_out=2).to(options.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = copy.deepcopy(network)
    take = TrainingStep(network, average, make_optimiser(recipe, network), recipe, seed=2, workers=1)
    data = ResidentBatches(pixels[:-HELD_OUT], None, batch=recipe.batch, seed=2, rank=0, workers=1)
    where = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{time.strftime('%Y-%m-%d')}: {where}; {network.parameter_count():,} weights\n")
    print("| seconds | images | mixture, held out, dB | mixture, learnt from, dB |\n|---|---|---|---|", flush=True)
    begun, paused, share, shown, images = time.monotonic(), 0.0, 0.0, 0, 0
    for step, batch in enumerate(itertools.chain.from_iterable(map(data.epoch, itertools.count(1)))):
        expected = max(step + 1, round((step + 1) / max(share, 1e-6)))
        take(batch, learning_rate(recipe, step, expected), step)
        images += batch.total
        if step % 10 == 0:
            if options.device == "cuda":
                torch.cuda.synchronize()
            share = (time.monotonic() - begun - paused) / (60 * options.minutes)
        if share * LINES >= shown + 1 or share >= 1.0:
            shown = int(share * LINES)
            pause = time.monotonic()
            levels = [psnr(average, clean, SHOWN["mixture"]) for clean in (held_out, seen)]
            print(f"| {pause - begun - paused:.0f} | {images:,} | {levels[0]:.2f} | {levels[1]:.2f} |", flush=True)
            paused += time.monotonic() - pause
            if share >= 1.0:
                break
    ships = bundle.read_bundle(bundle.SHIPPED_FOLDER).load(options.device)
    print("\n| held-out images | " + " | ".join(SHOWN) + " |\n|---" + "|---" * len(SHOWN) + "|")
    for name, found in (("the default model", ships), ("eleven times the arithmetic", average)):
        print(f"| {name} | " + " | ".join(f"{psnr(found, held_out, noise):.2f}" for noise in SHOWN.values()) + " |")


if __name__ == "__main__":
    main()
