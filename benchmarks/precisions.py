"""What `infer --precision` costs in quality: pooled PSNR on MNIST's test images for each type of numbers.

    python benchmarks/precisions.py [--mnist FOLDER] [--model FOLDER]

The noise is `evaluate`'s, under all of its conditions. Prints the PSNR in dB with float32, and what the others lose
against it; and of the expected PSNR that `infer --quality` writes, how far the others are from float32's on average.
What this machine has no units for is left out: a dash.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from denoise_batch import bundle
from denoise_batch.denoiser import Denoiser
from denoise_batch.digits import Split, find_mnist, load_mnist
from denoise_batch.evaluation.protocol import BLOCK, CONDITIONS, degrade_images
from denoise_batch.extra_columns import ExtraColumns
from denoise_batch.precision import Precision


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", type=Path, metavar="FOLDER", help="MNIST's IDX files; else found or downloaded")
    parser.add_argument("--model", type=Path, default=bundle.SHIPPED_FOLDER, help="model folder; default: ours")
    parser.add_argument("--images", type=int, default=10_000, help="test images")
    options = parser.parse_args()
    clean = load_mnist(find_mnist(options.mnist), Split.TEST)[0][: options.images].astype(np.float32) / np.float32(255)
    model = bundle.read_bundle(options.model)
    extras = ExtraColumns(quality=model.has_quality)
    cpu, others = torch.device("cpu"), (Precision.BFLOAT16, Precision.AUTO)
    # Without units a Denoiser takes float32 in silence, and would lose nothing.
    there = [one for one in others if one.bfloat16(cpu) or one.int8(cpu)]
    denoisers = {one: Denoiser(model, device="cpu", precision=one) for one in (Precision.FLOAT32, *there)}
    print(f"{time.strftime('%Y-%m-%d')}; {len(clean):,} images")
    print(*(f"{name}: {denoiser.fingerprint}" for name, denoiser in denoisers.items()), sep="\n")
    print("\n| condition | float32, dB | bfloat16 loses | auto loses | expected PSNR: bfloat16 | auto |")
    print("|---|---|---|---|---|---|")
    for condition in CONDITIONS:
        error, apart = dict.fromkeys(denoisers, 0.0), dict.fromkeys(denoisers, 0.0)
        for block, start in enumerate(range(0, len(clean), BLOCK)):
            part = clean[start : start + BLOCK]
            noisy = degrade_images(part, condition, block=block).reshape(-1, 784)
            expected = None
            for name, denoiser in denoisers.items():
                told = denoiser.run(noisy, extras)
                error[name] += float(((told.pixels.reshape(part.shape) - part) ** 2).sum(dtype=np.float64))
                if told.psnr is not None:
                    expected = told.psnr if expected is None else expected
                    apart[name] += float(np.abs(told.psnr - expected).sum(dtype=np.float64))
        psnr = {one: -10 * np.log10(value / clean.size) for one, value in error.items()}
        exact = psnr[Precision.FLOAT32]
        lost = [f"{exact - psnr[one]:.3f}" if one in there else "–" for one in others]
        distances = [f"{apart[one] / len(clean):.3f}" if one in there else "–" for one in others]
        print(f"| {condition.key} | {exact:.2f} | {' | '.join(lost + distances)} |", flush=True)


if __name__ == "__main__":
    main()
