"""What fitting images to their scans is worth (`models/data_consistency.py`), and what it costs.

    python benchmarks/fitted.py --images 4000 [--sheet docs/figures/fitted.png]

MNIST's test images, scanned in many ways: with the blurs and noises that the model has learnt, and with such that no
Gaussian blur explains. Prints the pooled PSNR in dB of what the network makes and of what comes out, what is expected
of it, how many images were changed, how many of all became worse by a decibel, and what the whole pass takes on a core.
The sheet shows some digits of some of them: scanned, by the network alone and its error, fitted and what is left.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn import functional

from denoise_batch.bundle import SHIPPED_FOLDER, read_bundle
from denoise_batch.denoiser import Denoiser
from denoise_batch.digits.mnist import Split, find_mnist, load_mnist
from denoise_batch.extra_columns import Denoised, ExtraColumns
from denoise_batch.noise import NoiseRecipe, blur_matrices, clip_to_uint8

Scan = Callable[[Tensor, torch.Generator], Tensor]


def noisy(sigma: float | tuple[float, float], level: float = 0.0, *, eight: bool = True, impulse: float = 0.0) -> Scan:
    """Blur, and Gaussian noise of that root mean square, or salt and pepper."""
    low, high = sigma if isinstance(sigma, tuple) else (sigma, sigma)
    half_range = (0.0, 1.5) if impulse else (level * 3**0.5, level * 3**0.5)
    recipe = NoiseRecipe((low, high), half_range, clipped=float(eight), gaussian=1.0 - impulse, impulse=impulse)
    return lambda clean, generator: recipe.draw(len(clean), generator).degrade(clean)[0]


def blurred(down: float, across: float) -> Callable[[Tensor], Tensor]:
    matrices = blur_matrices(torch.tensor([down, across]))
    return lambda clean: matrices[0] @ clean @ matrices[1].T


def filtered(kernel: np.ndarray) -> Callable[[Tensor], Tensor]:
    weights = torch.from_numpy((kernel / kernel.sum()).astype(np.float32))[None, None]
    return lambda clean: functional.conv2d(clean[:, None], weights, padding=kernel.shape[0] // 2)[:, 0]


def plain(degrade: Callable[[Tensor], Tensor], level: float = 0.0) -> Scan:
    """In 8 bits, with Gaussian noise."""
    return lambda clean, generator: clip_to_uint8(
        degrade(clean) + level * torch.randn(clean.shape, generator=generator)
    )


def jpeg(quality: int) -> Callable[[Tensor], Tensor]:
    def through(clean: Tensor) -> Tensor:
        out = np.empty(clean.shape, np.float32)
        for place, image in enumerate(np.rint(255 * (1 - clean.clamp(0, 1).numpy())).astype(np.uint8)):
            file = io.BytesIO()
            Image.fromarray(image).save(file, "JPEG", quality=quality)
            out[place] = 1 - np.asarray(Image.open(file)) / np.float32(255)
        return torch.from_numpy(out)

    return through


def grainy(clean: Tensor, generator: torch.Generator) -> Tensor:
    """Noise that is alike in neighbouring pixels, of paper: 0.03."""
    noise = blurred(0.7, 0.7)(torch.randn(clean.shape, generator=generator))
    return clip_to_uint8(blurred(0.7, 0.7)(clean) + 0.03 * noise / noise.std())


def enlarged(clean: Tensor) -> Tensor:
    return functional.interpolate(functional.avg_pool2d(clean[:, None], 2), size=28, mode="bilinear")[:, 0]


def two_blurs(clean: Tensor) -> Tensor:
    return torch.cat([blurred(0.8, 0.8)(clean)[:, :14], blurred(1.2, 1.2)(clean)[:, 14:]], dim=1)


def dusty(degrade: Callable[[Tensor], Tensor]) -> Scan:
    """Ten pixels of full ink, anywhere."""

    def scan(clean: Tensor, generator: torch.Generator) -> Tensor:
        scans = clip_to_uint8(degrade(clean)).flatten(1)
        places = torch.rand(scans.shape, generator=generator).topk(10, dim=1).indices
        return scans.scatter(1, places, 1.0).view(clean.shape)

    return scan


def struck(degrade: Callable[[Tensor], Tensor]) -> Scan:
    """Every tenth pixel black or white."""

    def scan(clean: Tensor, generator: torch.Generator) -> Tensor:
        lots = torch.rand(clean.shape, generator=generator)
        return torch.where(lots < 0.1, (lots < 0.05).float(), clip_to_uint8(degrade(clean)))

    return scan


DISK = (np.hypot(*np.mgrid[-2:3, -2:3]) <= 1.6).astype(float)
SCANS: dict[str, Scan] = {
    "the seed's mixture, floats": lambda clean, generator: NoiseRecipe().apply(clean, generator)[0],
    "the seed's mixture, 8 bits": lambda clean, generator: NoiseRecipe(clipped=1.0).apply(clean, generator)[0],
    "blur of 1, nothing else, floats": noisy(1.0, eight=False),
    "blur of 1, 8 bits": noisy(1.0),
    "blur of 0 to 2, floats": noisy((0.0, 2.0), eight=False),
    "blur of 0 to 2, 8 bits": noisy((0.0, 2.0)),
    "blur of 0.5, noise 0.01": noisy(0.5, 0.01),
    "blur of 0.7, noise 0.02": noisy(0.7, 0.02),
    "blur of 1, noise 0.01": noisy(1.0, 0.01),
    "blur of 1, noise 0.03": noisy(1.0, 0.03),
    "blur of 1, noise 0.05": noisy(1.0, 0.05),
    "blur of 1, noise 0.1": noisy(1.0, 0.1),
    "no blur, noise 0.02": noisy(0.0, 0.02),
    "salt and pepper, blur of 0 to 2, floats": noisy((0.0, 2.0), eight=False, impulse=1.0),
    "salt and pepper, blur of 0 to 2, 8 bits": noisy((0.0, 2.0), impulse=1.0),
    "blur of 1.5 down, 0.5 across": plain(blurred(1.5, 0.5)),
    "out of focus, a disk of 3 pixels, noise 0.01": plain(filtered(DISK), 0.01),
    "mean of 3 × 3": plain(filtered(np.ones((3, 3)))),
    "mean of 5 × 5": plain(filtered(np.ones((5, 5)))),
    "14 × 14 pixels, enlarged": plain(enlarged),
    "blur of 0.8 above, 1.2 below": plain(two_blurs),
    "blur of 2.5": noisy(2.5),
    "blur of 3": noisy(3.0),
    "blur of 0.8, 10 pixels of dust": dusty(blurred(0.8, 0.8)),
    "14 × 14 pixels, enlarged, 10 pixels of dust": dusty(enlarged),
    "blur of 0.8 above, 1.2 below, 10% salt and pepper": struck(two_blurs),
    "moved by 5 pixels askew": plain(filtered(np.eye(5)[::-1])),
    "blur of 0.7, JPEG of quality 75": lambda clean, _: jpeg(75)(blurred(0.7, 0.7)(clean)),
    "JPEG of quality 75": lambda clean, _: jpeg(75)(clean),
    "blur of 0.7, ink of 90%, noise 0.01": plain(lambda clean: 0.9 * blurred(0.7, 0.7)(clean), 0.01),
    "blur of 0.7, darker by γ = 0.8, noise 0.01": plain(
        lambda clean: blurred(0.7, 0.7)(clean).clamp_min(0) ** 0.8, 0.01
    ),
    "blur of 0.7, a slope of ±0.05": plain(
        lambda clean: blurred(0.7, 0.7)(clean) + torch.linspace(-0.05, 0.05, 28)[:, None]
    ),
    "blur of 0.7, grain of 0.03": grainy,
}


SHOWN = (
    "blur of 0.7, noise 0.02",
    "blur of 1, noise 0.01",
    "salt and pepper, blur of 0 to 2, 8 bits",
    "blur of 1.5 down, 0.5 across",
    "blur of 0.8, 10 pixels of dust",
    "blur of 0.7, JPEG of quality 75",
)
DIGITS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument(
        "--mnist", type=Path, default=None, help="the folder of its files; else as denoise-batch finds it"
    )
    parser.add_argument("--sheet", type=Path, help="a PNG file")
    options = parser.parse_args()
    clean = load_mnist(find_mnist(options.mnist), Split.TEST)[0][: options.images].reshape(-1, 28, 28) / 255
    images = torch.from_numpy(clean.astype(np.float32))
    bundle = read_bundle(SHIPPED_FOLDER)
    rows: list[np.ndarray] = []
    alone, fitting = (Denoiser(bundle, device="cpu", threads=1, fit=fit) for fit in (False, True))
    print(
        "| scan | network, dB | fitted, dB | expected | changed | worse | µs alone | µs fitted |\n" + "|---" * 8 + "|"
    )
    for name, scan in SCANS.items():
        given = scan(images, torch.Generator().manual_seed(2019)).reshape(-1, 784).numpy()
        (before, without), (after, took) = (timed(denoiser, given) for denoiser in (alone, fitting))
        if name in SHOWN:
            truth = images.reshape(-1, 784).numpy()
            off = [3 * np.abs(made.pixels - truth) for made in (before, after)]
            shown = np.stack([given, before.pixels, off[0], after.pixels, off[1]])
            rows.append(shown[:, :DIGITS].clip(0, 1).reshape(5, DIGITS, 28, 28))
        errors = [np.square(made.pixels - images.reshape(-1, 784).numpy()).mean(axis=1) for made in (before, after)]
        changed = (before.pixels != after.pixels).any(axis=1).mean()
        worse = (errors[1] + 1e-6 > 10**0.1 * (errors[0] + 1e-6)).mean()
        pooled = [f"{-10 * np.log10(error.mean()):.1f}" for error in errors]
        assert after.psnr is not None
        print(
            f"| {name} | {pooled[0]} | {pooled[1]} | {after.psnr.mean():.1f} | {changed:.0%} | {worse:.1%} "
            f"| {without:.0f} | {took:.0f} |",
            flush=True,
        )
    if options.sheet is not None:
        draw(rows, options.sheet)


def draw(rows: list[np.ndarray], path: Path) -> None:
    """A row for each scan, a group of five images for each digit, ink dark; errors are three times as dark."""
    titles = ("scan", "network", "error × 3", "fitted", "error × 3")
    figure = Figure(figsize=(11, 1.05 * len(rows) + 0.5), layout="constrained")
    axes = figure.subplots(len(rows), 5 * DIGITS, squeeze=False)
    for line, (name, shown) in enumerate(zip(SHOWN, rows, strict=True)):
        for place in range(5 * DIGITS):
            axis = axes[line, place]
            axis.imshow(1 - shown[place % 5, place // 5], cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
            if line == 0:
                axis.set_title(titles[place % 5], fontsize=8)
        axes[line, 0].set_ylabel(name.replace(", ", ",\n"), fontsize=7, rotation=0, ha="right", va="center")
    figure.savefig(path, dpi=110)


def timed(denoiser: Denoiser, given: np.ndarray) -> tuple[Denoised, float]:
    """What is made, and µs an image of the faster of two passes without what is expected."""
    times = []
    for _ in range(2):
        started = time.perf_counter()
        denoiser(given)
        times.append(1e6 * (time.perf_counter() - started) / len(given))
    return denoiser.run(given, ExtraColumns(quality=True)), min(times)


if __name__ == "__main__":
    main()
