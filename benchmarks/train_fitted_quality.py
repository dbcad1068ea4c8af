"""Trains what says how good images are that were fitted to their scans (`models/fitted_quality.py`).

    python benchmarks/train_fitted_quality.py --images 1000000 --out denoise_batch/pretrained/fit/model.safetensors

The default model denoises MNIST's training images, drawn digits and other things (one in eight), scanned with little
noise, none, or salt and pepper: a third just as it has learnt; of the others two thirds blurred as it has learnt, or
otherwise down than across, the rest as no Gaussian blurs, some paler, darker, on grey, cut off, sharpened or through
JPEG; half of all in 8 bits, half in integers where this machine has them. Each is fitted, and learnt is what became of
it, and how good the network's own image was. Writes the weights, and prints bias and error on digits that it has not
seen, before and after, and what comes of the choice between the two. A million images take 12 minutes of two cores.
"""

from __future__ import annotations

import argparse
import io
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from denoise_batch.bundle import SHIPPED_FOLDER, read_bundle
from denoise_batch.denoiser import Denoiser
from denoise_batch.digits.drawn_digits import draw_digits
from denoise_batch.digits.mnist import Split, find_mnist, load_mnist
from denoise_batch.models.data_consistency import MOST_NOISE, fitted
from denoise_batch.models.fitted_quality import FEATURES, features_of
from denoise_batch.models.quality_head import MOST_PSNR
from denoise_batch.models.scans import look_at, may_have_little_noise
from denoise_batch.noise import blur_matrices, clip_to_uint8
from denoise_batch.precision import Precision
from denoise_batch.training.foreign_content import draw_foreign_content

BATCH, HELD_OUT, SIDE = 1024, 5000, 28
MOST_BLUR = 2.25
FAINTEST = 0.0005


class Told(NamedTuple):
    """Of n images: the features, what was expected, in dB, the true PSNR of the network's image and of the fitted one,
    (n, 2), and whether that is trusted."""

    features: Tensor
    expected: Tensor
    true: Tensor
    trusted: Tensor


def scanned(clean: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(n, 28, 28) → as they are scanned with little noise, and what they are: some have paler ink, or are cut off."""
    count = len(clean)

    def lots() -> Tensor:
        return torch.rand(count, generator=generator)[:, None, None]

    def some(share: float, changed: Tensor, images: Tensor) -> Tensor:
        return torch.where(lots() < share, changed, images)

    steps = (16.0 * torch.rand((count, 2), generator=generator) - 8.0).round().long().tolist()
    moved = [image.roll(tuple(step), (0, 1)) for image, step in zip(clean, steps, strict=True)]
    clean = some(0.1, torch.stack(moved), clean)  # with what leaves on one side coming in on the other, as a neighbour
    plain = lots() < 0.3  # as the model has learnt: Gaussian blur of full ink, and nothing else
    as_learnt = gaussian(clean, MOST_BLUR * lots().flatten())
    pale = some(0.15, (0.8 + 0.2 * lots()) * clean, clean)
    scan = spread(pale, generator)
    scan = some(0.15, scan.clamp_min(0.0) ** (0.7 * 2.0 ** lots()), scan)
    scan = some(0.03, torch.sigmoid((4.0 + 8.0 * lots()) * (scan - 0.5)), scan)
    scan = some(0.04, scan + (0.5 + lots()) * (scan - gaussian(scan, 0.5 + lots().flatten())), scan)
    scan = some(0.1, scan + 0.1 * lots() - 0.05, scan)
    slope = torch.linspace(0.0, 1.0, SIDE)
    scan = some(0.05, scan + 0.15 * lots() * torch.where(lots() < 0.5, slope, slope[:, None]), scan)
    scan = some(0.04, (1.0 + 0.5 * lots()) * scan, scan)
    scan, clean = torch.where(plain, as_learnt, scan), torch.where(plain, clean, pale)
    noise = torch.randn(clean.shape, generator=generator)
    smooth = gaussian(noise, 0.4 + lots().flatten())
    noise = some(0.1, smooth / smooth.square().mean(dim=(1, 2), keepdim=True).sqrt(), noise)
    level = FAINTEST * (1.2 * MOST_NOISE / FAINTEST) ** lots()
    noisy = scan + some(0.25, torch.zeros(()), level) * noise
    struck, rate = torch.rand(clean.shape, generator=generator), some(0.2, 0.5 * lots(), torch.zeros(()))
    noisy = torch.where(rate > 0.0, scan, noisy)
    noisy = torch.where(struck < rate, (struck < 0.5 * rate).float(), noisy)
    rate = some(0.12, 0.02 * lots(), torch.zeros(()))
    noisy = torch.where(struck > 1.0 - rate, 1.0, noisy)
    eight = clip_to_uint8(noisy)
    eight[:: count // 50] = compressed(eight[:: count // 50], generator)
    return some(0.5, eight, noisy), clean


def gaussian(images: Tensor, sigma: Tensor, across: Tensor | None = None) -> Tensor:
    """Each image blurred by its deviation, (n,), or by one down and another across."""
    down, across = (blur_matrices(one, MOST_BLUR) for one in (sigma, sigma if across is None else across))
    return down @ images @ across.transpose(1, 2)


def spread(clean: Tensor, generator: torch.Generator) -> Tensor:
    """Blurred in one of many ways."""
    count = len(clean)
    lots = torch.rand((8, count), generator=generator)
    sigma = MOST_BLUR * lots[:2]
    blurred = gaussian(clean, sigma[0], torch.where(lots[2] < 0.5, *sigma))
    near = gaussian(clean, 0.3 * lots[0])
    lower = blurred.clone()
    lower[:, 14:] = gaussian(clean, (sigma[0] + 1.6 * lots[7] - 0.8).abs().clamp_max(MOST_BLUR))[:, 14:]
    y, x = torch.meshgrid(torch.arange(-6.0, 7.0), torch.arange(-6.0, 7.0), indexing="ij")
    angle = math.pi * lots[3][:, None, None]
    along, aside = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    one, other = 0.4 + 1.6 * lots[4:6, :, None, None]
    edge = (5.0 * one).sqrt()  # 1.4 to 3.2 pixels
    kernels = {
        0.05: (edge - torch.hypot(x, y)).clamp(0.0, 1.0),  # out of focus
        0.04: (one + 0.5 - x.abs()).clamp(0.0, 1.0) * (other + 0.5 - y.abs()).clamp(0.0, 1.0),  # large pixels
        0.06: (1.5 * one + 0.5 - along.abs()).clamp(0.0, 1.0) * (1.0 - aside.abs()).clamp_min(0.0),  # moved
        0.045: torch.exp(-0.5 * ((along / one).square() + (aside / other).square())),  # askew
        0.035: (1.0 + (x.square() + y.square()) / one.square()) ** -2.0,  # far-reaching
    }
    ways = {share: convolved(near, kernel) for share, kernel in kernels.items()}
    for share, way in (ways | {0.09: enlarged(clean, generator), 0.03: lower}).items():
        lots[6] -= share
        blurred = torch.where(((lots[6] < 0.0) & (lots[6] >= -share))[:, None, None], way, blurred)
    return blurred


def convolved(images: Tensor, kernels: Tensor) -> Tensor:
    """Each image with its kernel, (n, 13, 13), of any sum."""
    kernels = kernels / kernels.sum(dim=(1, 2), keepdim=True)
    padded = functional.pad(images[None], (6, 6, 6, 6), mode="reflect")
    return functional.conv2d(padded, kernels[:, None], groups=len(images))[0]


def enlarged(clean: Tensor, generator: torch.Generator) -> Tensor:
    """From fewer pixels, a part of the images from each number of them."""
    order, whole = torch.randperm(len(clean), generator=generator), clean.clone()
    for size, rows in zip((10, 12, 14, 14, 16, 18, 20, 24), order.chunk(8), strict=True):
        small = functional.interpolate(clean[rows, None], size=size, mode="bilinear", antialias=True)
        half = len(rows) // 2
        whole[rows[:half]] = functional.interpolate(small[:half], size=SIDE, mode="bilinear")[:, 0]
        whole[rows[half:]] = functional.interpolate(small[half:], size=SIDE, mode="bicubic")[:, 0]
    return whole


def compressed(images: Tensor, generator: torch.Generator) -> Tensor:
    """Through JPEG, ink dark."""
    out = images.clone()
    for place, image in enumerate(np.rint(255 * (1 - images.numpy())).astype(np.uint8)):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=int(torch.randint(50, 96, (), generator=generator)))
        out[place] = 1 - torch.from_numpy(np.array(Image.open(file))) / 255
    return out


def seen(model: nn.Module, clean: Tensor, generator: torch.Generator) -> Told:
    """Of the images that were fitted: how it went."""
    noisy, clean = scanned(clean, generator)
    rows = may_have_little_noise(noisy)
    noisy, clean = noisy[rows], clean[rows]
    outputs = model.outputs(noisy[:, None])
    scans = look_at(noisy, outputs.clean[:, 0], MOST_BLUR)
    which = scans.fits.nonzero()[:, 0]
    scans, clean = scans.rows(which), clean[which]
    expected = outputs.quality[which, 0].clamp(0.0, MOST_PSNR)
    fit = fitted(scans, expected)
    errors = torch.stack([(made - clean).square().mean(dim=(1, 2)) for made in (scans.mean, fit.clean)], dim=1)
    true = (-10.0 * errors.clamp_min(1e-9).log10()).clamp_max(MOST_PSNR)
    return Told(features_of(scans.mean, fit, expected), expected, true, fit.trusted)


def collect(images: Tensor, count: int, foreign: float, seed: int) -> Told:
    models = [Denoiser(read_bundle(SHIPPED_FOLDER), device="cpu", precision=p).model for p in Precision]
    models = [models[0], models[-1]] if len(models) > 1 else models
    generator = torch.Generator().manual_seed(seed)
    parts = []
    with torch.inference_mode():
        for batch in range(math.ceil(count / BATCH)):
            clean = images[torch.randint(len(images), (BATCH,), generator=generator)].float() / 255.0
            other = draw_foreign_content(clean, generator, total=BATCH, first=0)
            clean[: int(foreign * BATCH)] = other[: int(foreign * BATCH)]
            parts.append(seen(models[batch % len(models)], clean, generator))
    return Told(*(torch.cat(column).clone() for column in zip(*parts, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--mnist", type=Path, default=None, help="the folder of its files; else as denoise-batch finds it"
    )
    options = parser.parse_args()
    mnist = torch.from_numpy(load_mnist(find_mnist(options.mnist), Split.TRAIN)[0].reshape(-1, 28, 28))
    drawn = torch.from_numpy(draw_digits(15_000, 5)[0].reshape(-1, 28, 28))
    told = collect(torch.cat([mnist[:-HELD_OUT], drawn]), options.images, 0.125, 1)
    torch.manual_seed(1)
    names = {"first": nn.Linear(FEATURES, 64), "second": nn.Linear(64, 64), "last": nn.Linear(64, 2)}
    network = nn.Sequential(names["first"], nn.ReLU(), names["second"], nn.ReLU(), names["last"])
    optimiser = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-4)
    features, expected, true, trusted = told
    counts = torch.stack([torch.ones(len(trusted)), trusted.float()], dim=1)  # what is not trusted is not used
    steps, step = options.epochs * (len(features) // BATCH), 0
    for _ in range(options.epochs):
        for rows in torch.randperm(len(features)).split(BATCH)[: len(features) // BATCH]:
            optimiser.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
            optimiser.zero_grad()
            off = (expected[rows, None] - true[rows]) / 10.0 + network(features[rows])
            (off.square() * counts[rows]).mean().backward()
            optimiser.step()
            step += 1
    others = mnist[-HELD_OUT:], torch.from_numpy(draw_digits(5_000, 6)[0].reshape(-1, 28, 28))
    for what, digits, foreign in (("digits", 0, 0.0), ("drawn digits", 1, 0.0), ("other things", 0, 1.0)):
        features, expected, true, trusted = collect(others[digits], 20_000, foreign, 2)
        with torch.inference_mode():
            after = (expected[:, None] + 10.0 * network(features)).clamp(0.0, MOST_PSNR)
        print(f"{what}: {len(trusted)}, of which {trusted.float().mean():.1%} are trusted")
        show("the network's, as it expects", expected, true[:, 0])
        show("the network's, after fitting", after[:, 0], true[:, 0])
        show("fitted", after[trusted, 1], true[trusted, 1])
        for doubt in (-1.0, 0.0, 0.5, 1.0, math.inf):
            better = trusted & (after[:, 1] > after[:, 0] - doubt)
            chosen = torch.where(better, true[:, 1], true[:, 0])
            worse = (chosen < true[:, 0] - 1.0).float().mean()
            print(f"  with a doubt of {doubt} dB: {chosen.mean():.3f} dB, {worse:.2%} are worse by a decibel")
        print(f"  the better one of each: {torch.where(trusted, true.amax(dim=1), true[:, 0]).mean():.3f} dB")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {
            f"{name}.{key}": value.contiguous()
            for name, layer in names.items()
            for key, value in layer.state_dict().items()
        },
        options.out,
    )
    options.out.chmod(0o644)


def show(what: str, told: Tensor, true: Tensor) -> None:
    off = told - true
    rank = torch.corrcoef(torch.stack([told.argsort().argsort(), true.argsort().argsort()]).float())[0, 1]
    print(f"  {what}: bias {off.mean():.2f} dB, error {off.square().mean().sqrt():.2f}, rank {rank:.3f}")


if __name__ == "__main__":
    main()
