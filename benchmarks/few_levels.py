"""What is left of scans of few levels of grey, as faxes are, and what the models make of them.

    python benchmarks/few_levels.py --images 2000 [--sheet docs/figures/few-levels.png]

MNIST's test images, blurred, with noise, then of so many levels, in 8 bits. Prints pooled PSNR in dB of the scans, of
what the default model makes of them, and of what `few-levels` does, which `infer` takes for such sets where no model is
named; beside each what is expected. Error diffusion is Pillow's: no model has learnt that. The sheet shows digits of
some of them: clean, scanned, and what both models make of that.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from denoise_batch.bundle import SHIPPED_FOLDER, few_levels_bundle, read_bundle
from denoise_batch.denoiser import Denoiser
from denoise_batch.digits.mnist import Split, find_mnist, load_mnist
from denoise_batch.extra_columns import ExtraColumns
from denoise_batch.noise import blur, to_few_levels

DIFFUSED: Final = 0
"""In place of a threshold: error diffusion."""

SCANS: Final = [  # levels, threshold, blur, noise's deviation, share of pixels struck
    (2, 0.5, 0.0, 0.0, 0.0),
    (2, 0.35, 0.0, 0.0, 0.0),
    (2, 0.5, 0.5, 0.05, 0.0),
    (2, 0.5, 1.0, 0.0, 0.0),
    (2, 0.5, 0.8, 0.2, 0.0),
    (2, 0.5, 0.8, 0.3, 0.0),
    (2, 0.5, 0.8, 0.0, 0.05),
    (2, 0.5, 0.8, 0.0, 0.2),
    (2, DIFFUSED, 0.5, 0.0, 0.0),
    (4, 0.5, 0.5, 0.0, 0.0),
    (4, 0.5, 1.0, 0.1, 0.0),
    (8, 0.5, 0.5, 0.0, 0.0),
    (16, 0.5, 1.0, 0.1, 0.0),
]
SHOWN: Final = {
    0: "1 bit",
    3: "1 bit,\nblurred",
    4: "1 bit,\nnoise",
    7: "1 bit,\nstruck",
    8: "1 bit,\ndiffused",
    10: "2 bits,\nnoise",
}
DIGITS: Final = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument(
        "--mnist", type=Path, default=None, help="the folder of its files; else as denoise-batch finds it"
    )
    parser.add_argument("--sheet", type=Path, help="a PNG file")
    options = parser.parse_args()
    digits = load_mnist(find_mnist(options.mnist), Split.TEST)[0][: options.images].reshape(-1, 28, 28)
    clean = (digits / 255).astype(np.float32)
    default = read_bundle(SHIPPED_FOLDER)
    few = few_levels_bundle(default)
    assert few is not None
    denoisers = [Denoiser(bundle, device="cpu") for bundle in (default, few)]
    print("| levels | from | blur | noise | struck | scan, dB | default | expected | few-levels | expected |")
    print("|---" * 10 + "|")
    shown = []
    for place, (levels, threshold, sigma, noise, struck) in enumerate(SCANS):
        scans = scanned(clean, levels, threshold, sigma, noise, struck)
        cells = [f"{decibels(scans / np.float32(255), clean):.1f}"]
        images = [clean.reshape(-1, 784), scans / np.float32(255)]
        for denoiser in denoisers:
            made = denoiser.run(scans, ExtraColumns(quality=True))
            assert made.psnr is not None
            images.append(made.pixels)
            cells += [f"{decibels(made.pixels, clean):.1f}", f"{made.psnr.mean():.1f}"]
        begins = "diffused" if threshold == DIFFUSED else f"{threshold:g}"
        print(f"| {levels} | {begins} | {sigma:g} | {noise:g} | {struck:g} | {' | '.join(cells)} |", flush=True)
        if place in SHOWN:
            shown.append([part[:DIGITS].reshape(-1, 28, 28) for part in images])
    if options.sheet is not None:
        draw(shown, options.sheet)


def scanned(clean: np.ndarray, levels: int, threshold: float, sigma: float, noise: float, struck: float) -> np.ndarray:
    """(n, 28, 28) → (n, 784) uint8."""
    random = np.random.default_rng(2019)
    images = blur(torch.from_numpy(clean), torch.full((len(clean),), sigma))
    images += torch.from_numpy(random.normal(0.0, noise, clean.shape).astype(np.float32))
    lots = torch.from_numpy(random.random(clean.shape))
    images = torch.where(lots < struck, (lots < struck / 2).float(), images).clamp(0.0, 1.0)
    if threshold == DIFFUSED:
        grey = np.rint(255 * images.numpy()).astype(np.uint8)
        return np.stack([255 * np.asarray(Image.fromarray(image).convert("1"), np.uint8) for image in grey]).reshape(
            -1, 784
        )
    few = to_few_levels(images, torch.full((len(clean),), levels), threshold)
    return np.rint(255 * few.numpy()).astype(np.uint8).reshape(-1, 784)


def draw(rows: list[list[np.ndarray]], path: Path) -> None:
    """A row for each scan, a group of four images for each digit, ink dark."""
    titles = ("clean", "scan", "default", "few-levels")
    figure = Figure(figsize=(11, 0.8 * len(rows) + 0.4), layout="constrained")
    axes = figure.subplots(len(rows), len(titles) * DIGITS, squeeze=False)
    for line, (name, images) in zip(axes, zip(SHOWN.values(), rows, strict=True), strict=True):
        for place, axis in enumerate(line):
            axis.imshow(1 - images[place % 4][place // 4], cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
            if name == SHOWN[0]:
                axis.set_title(titles[place % 4], fontsize=8)
        line[0].set_ylabel(name, fontsize=7, rotation=0, ha="right", va="center")
    figure.savefig(path, dpi=110)


def decibels(made: np.ndarray, clean: np.ndarray) -> float:
    return float(-10 * np.log10(np.mean((made.reshape(-1, 784) - clean.reshape(-1, 784)) ** 2)))


if __name__ == "__main__":
    main()
