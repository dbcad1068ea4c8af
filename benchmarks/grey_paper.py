"""What paper that is not white costs, and what is left of that once its grey is taken off, as `infer` does.

    python benchmarks/grey_paper.py --images 2000

MNIST's test images in 8 bits, with Gaussian noise of 0.06, on paper that has so much of full ink, at last each image on
another; the default model.
Prints the pooled PSNR in dB, and beside it the mean of what the model expects.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from denoise_batch.bundle import SHIPPED_FOLDER, read_bundle
from denoise_batch.denoiser import Denoiser
from denoise_batch.digits.mnist import Split, find_mnist, load_mnist
from denoise_batch.extra_columns import ExtraColumns
from denoise_batch.images import Polarity
from denoise_batch.images.background import find_background, without_background

PAPERS = (0.0, 0.02, 0.04, 0.08, 0.12, 0.2, 0.3)
VARIED = (0.0, 0.3)
NOISE = 0.06


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument(
        "--mnist", type=Path, default=None, help="the folder of its files; else as denoise-batch finds it"
    )
    options = parser.parse_args()
    clean = load_mnist(find_mnist(options.mnist), Split.TEST)[0][: options.images].reshape(-1, 784) / 255
    denoiser = Denoiser(read_bundle(SHIPPED_FOLDER), device="cpu")
    light = Polarity.LIGHT_ON_DARK
    print("| paper | as it is, dB | expected | its grey taken off, dB | expected | found |\n|---|---|---|---|---|---|")
    varied = np.random.default_rng(7).uniform(*VARIED, (len(clean), 1))
    for shown, paper in [*((f"{paper:g}", paper) for paper in PAPERS), ("0 to 0.3", varied)]:
        noise = np.random.default_rng(2019).normal(0.0, NOISE, clean.shape)
        scans = np.rint(255 * (paper + (1 - paper) * clean + noise).clip(0, 1)).astype(np.uint8)
        found = find_background(scans, light)
        cells = []
        for pixels in (scans, without_background(scans, light, found)):
            made = denoiser.run(pixels, ExtraColumns(quality=True))
            assert made.psnr is not None
            cells.append(f"{-10 * np.log10(np.mean((made.pixels - clean) ** 2)):.1f} | {made.psnr.mean():.1f}")
        print(f"| {shown} | {cells[0]} | {cells[1]} | {0 if found is None else found:g} |", flush=True)


if __name__ == "__main__":
    main()
