"""Trains what says how good images are that were fitted to their scans (`models/fitted_quality.py`).

    python benchmarks/train_fitted_quality.py --images 400000 --out denoise_batch/pretrained/fit/model.safetensors

The default model denoises MNIST's training images, drawn digits and other things (one in eight), of every blur that it
has learnt, half of them with another down than across, some spread otherwise, paler, darker, on grey or cut off, with
little noise, none, or salt and pepper, half of them in 8 bits, half of them in integers where this machine has them;
each is fitted, and what it came to is learnt.
Writes its weights, and prints bias and error on digits that it has not seen, before and after. 400,000 images take 5
minutes of two cores.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
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

BATCH, HELD_OUT = 1024, 5000
MOST_BLUR = 2.25
FAINTEST = 0.0005


def scanned(clean: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(n, 28, 28) → as they are scanned with little noise, and what they are: some have paler ink, or are cut off."""
    count = len(clean)
    lots = torch.rand((16, count), generator=generator)[:, :, None, None]
    moved = torch.stack([image.roll(tuple(step), (0, 1)) for image, step in zip(clean, moves(lots), strict=True)])
    moved = torch.where(lots[14] < 0.1, moved, clean)
    ink = torch.where(lots[8] < 0.25, 0.8 + 0.2 * lots[9], 1.0)
    clean = ink * moved
    blurred = spread(clean, lots)
    dark = blurred.clamp_min(0.0) ** (0.7 * 2.0 ** lots[10])
    blurred = torch.where(lots[11] < 0.1, dark, blurred)
    blurred = blurred + torch.where(lots[12] < 0.1, 0.1 * lots[13] - 0.05, 0.0)
    level = FAINTEST * (1.2 * MOST_NOISE / FAINTEST) ** ((lots[4] - 0.25) / 0.75)
    noisy = blurred + torch.where(lots[4] < 0.25, 0.0, level) * torch.randn(clean.shape, generator=generator)
    struck = torch.rand(clean.shape, generator=generator)
    rate = torch.where(lots[5] < 0.2, 0.5 * lots[6], 0.0)
    noisy = torch.where(rate > 0.0, blurred, noisy)
    noisy = torch.where(struck < rate, (struck < 0.5 * rate).float(), noisy)
    return torch.where(lots[7] < 0.5, clip_to_uint8(noisy), noisy), clean


def moves(lots: Tensor) -> Tensor:
    """(n, 2), by so many pixels down and across: what leaves an image on one side comes in on the other, as strokes of
    neighbours do."""
    return (16.0 * lots[9:11, :, 0, 0] - 8.0).round().long().T


def spread(clean: Tensor, lots: Tensor) -> Tensor:
    """Blurred in one of many ways."""
    sigma = MOST_BLUR * lots[:2, :, 0, 0]
    sigma[1] = torch.where(lots[2, :, 0, 0] < 0.5, sigma[0], sigma[1])
    down, across = (blur_matrices(one, MOST_BLUR) for one in sigma)
    blurred = down @ clean @ across.transpose(1, 2)
    near = blur_matrices(0.3 * lots[0, :, 0, 0], MOST_BLUR)
    lens = functional.avg_pool2d(clean[:, None], 3, 1, 1)[:, 0]
    small = functional.interpolate(functional.avg_pool2d(clean[:, None], 2), size=28, mode="bilinear")[:, 0]
    long_tailed = 0.7 * blurred + 0.3 * across @ blurred @ down.transpose(1, 2)
    lower = blurred.clone()
    lower[:, 14:] = (near @ clean @ near.transpose(1, 2))[:, 14:]
    for kind, share in ((near @ lens @ near.transpose(1, 2), 0.05), (small, 0.03), (long_tailed, 0.05), (lower, 0.03)):
        lots[3] -= share
        blurred = torch.where((lots[3] < 0.0) & (lots[3] >= -share), kind, blurred)
    return blurred


def seen(model: nn.Module, clean: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Of the images that were fitted: the features, what was expected before, and the true PSNR, in dB."""
    noisy, clean = scanned(clean, generator)
    rows = may_have_little_noise(noisy)
    noisy, clean = noisy[rows], clean[rows]
    outputs = model.outputs(noisy[:, None])
    scans = look_at(noisy, outputs.clean[:, 0], MOST_BLUR)
    which = scans.fits.nonzero()[:, 0]
    scans, clean, before = scans.rows(which), clean[which], scans.mean[which]
    expected = outputs.quality[which, 0].clamp(0.0, MOST_PSNR)
    fit = fitted(scans, expected)
    true = -10.0 * (fit.clean - clean).square().mean(dim=(1, 2)).clamp_min(1e-9).log10()
    done = fit.done
    return features_of(before, fit, expected)[done], expected[done], true.clamp_max(MOST_PSNR)[done]


def collect(images: Tensor, count: int, foreign: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
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
    features, expected, true = (torch.cat(column).clone() for column in zip(*parts, strict=True))
    return features, expected, true


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=400_000)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--mnist", type=Path, default=None, help="the folder of its files; else as denoise-batch finds it"
    )
    options = parser.parse_args()
    mnist = torch.from_numpy(load_mnist(find_mnist(options.mnist), Split.TRAIN)[0].reshape(-1, 28, 28))
    drawn = torch.from_numpy(draw_digits(15_000, 5)[0].reshape(-1, 28, 28))
    features, expected, true = collect(torch.cat([mnist[:-HELD_OUT], drawn]), options.images, 0.125, 1)
    torch.manual_seed(1)
    names = {"first": nn.Linear(FEATURES, 32), "second": nn.Linear(32, 32), "last": nn.Linear(32, 1)}
    network = nn.Sequential(names["first"], nn.ReLU(), names["second"], nn.ReLU(), names["last"])
    optimiser = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-4)
    steps, step = options.epochs * (len(features) // BATCH), 0
    for _ in range(options.epochs):
        for rows in torch.randperm(len(features)).split(BATCH)[: len(features) // BATCH]:
            optimiser.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
            optimiser.zero_grad()
            off = (expected[rows] - true[rows]) / 10.0 + network(features[rows])[:, 0]
            off.square().mean().backward()
            optimiser.step()
            step += 1
    others = mnist[-HELD_OUT:], torch.from_numpy(draw_digits(5_000, 6)[0].reshape(-1, 28, 28))
    for what, digits, foreign in (("digits", 0, 0.0), ("drawn digits", 1, 0.0), ("other things", 0, 1.0)):
        features, expected, true = collect(others[digits], 20_000, foreign, 2)
        with torch.inference_mode():
            after = (expected + 10.0 * network(features)[:, 0]).clamp(0.0, MOST_PSNR)
        for when, told in (("before", expected), ("after", after)):
            off = told - true
            rank = torch.corrcoef(torch.stack([told.argsort().argsort(), true.argsort().argsort()]).float())[0, 1]
            print(f"{what}, {when}: bias {off.mean():.2f} dB, error {off.square().mean().sqrt():.2f}, rank {rank:.3f}")
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


if __name__ == "__main__":
    main()
