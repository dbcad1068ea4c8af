"""What ink that is not full costs, and what is left of that once it is shown as full to the model, as `infer` does.

    python benchmarks/faint_ink.py --images 2000

MNIST's test images whose ink is so much of full ink, at last each another, blurred or not, in 8 bits with Gaussian
noise; the default model. Prints the pooled PSNR in dB of what comes out, as pale as the ink was, beside what is
expected, and what the set's ink is found to be.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from denoise_batch.bundle import SHIPPED_FOLDER, read_bundle
from denoise_batch.denoiser import Denoiser
from denoise_batch.digits.mnist import Split, find_mnist, load_mnist
from denoise_batch.extra_columns import Denoised, ExtraColumns
from denoise_batch.images import WHITE_AND_BLACK, Polarity, Tone, find_tone
from denoise_batch.noise import blur

INKS = (1.0, 0.95, 0.9, 0.8, 0.7, 0.5, 0.35)
VARIED = (0.4, 1.0)
CONDITIONS = ((0.0, 0.06), (1.0, 0.06), (0.0, 0.2), (1.0, 0.2))
LIGHT = Polarity.LIGHT_ON_DARK


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument(
        "--mnist", type=Path, default=None, help="the folder of its files; else as denoise-batch finds it"
    )
    options = parser.parse_args()
    digits = load_mnist(find_mnist(options.mnist), Split.TEST)[0][: options.images].reshape(-1, 784)
    full = (digits / 255).astype(np.float32)
    denoiser = Denoiser(read_bundle(SHIPPED_FOLDER), device="cpu")
    varied = np.random.default_rng(7).uniform(*VARIED, (len(full), 1)).astype(np.float32)
    print(
        "| blur | noise | ink | as it is, dB | expected | shown as full, dB | expected | found |\n" + "|---" * 8 + "|"
    )
    for sigma, noise in CONDITIONS:
        blurred = blur(torch.from_numpy(full.reshape(-1, 28, 28)), torch.full((len(full),), sigma)).numpy()
        for shown, ink in [*((f"{ink:g}", np.float32(ink)) for ink in INKS), ("0.4 to 1", varied)]:
            drawn = np.random.default_rng(2019).normal(0.0, noise, full.shape)
            scans = np.rint(255 * (ink * blurred.reshape(-1, 784) + drawn).clip(0, 1)).astype(np.uint8)
            tone = find_tone(scans, LIGHT)
            cells = [cell(denoised(denoiser, scans, each), ink * full) for each in (WHITE_AND_BLACK, tone)]
            print(
                f"| {sigma:g} | {noise:g} | {shown} | {cells[0]} | {cells[1]} | {tone.facts().get('ink', 1):g} |",
                flush=True,
            )


def denoised(denoiser: Denoiser, pixels: np.ndarray, tone: Tone) -> Denoised:
    even, ink = tone.even(pixels, LIGHT)
    made = denoiser.run(even, ExtraColumns(quality=True))
    return made if ink is None else made.in_ink(ink, LIGHT)


def cell(made: Denoised, clean: np.ndarray) -> str:
    assert made.psnr is not None
    return f"{-10 * np.log10(np.mean((made.pixels - clean) ** 2)):.1f} | {made.psnr.mean():.1f}"


if __name__ == "__main__":
    main()
