"""How well a network of its own, as large as the denoiser, could know the PSNR of each denoised image.

    python benchmarks/quality_limit.py [--mnist FOLDER] [--minutes 15]

What the default model expects of its own image comes from a small head. Here a convolutional network of 1.4 million
weights sees the noisy image, the denoised one, where a pixel can lie and what the head says, and learns from fresh
noise of the seed's mixture on MNIST's training images what the head gets wrong. Prints, as it goes on, the rank
correlation of expected and true PSNR over the mixture on the last 5,000 training images, which it does not learn from,
and the standard deviation of the difference. What neither knows is chance: other clean images would have looked alike.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from denoise_batch import bundle
from denoise_batch.denoiser import Denoiser
from denoise_batch.digits import Split, find_mnist, load_mnist
from denoise_batch.evaluation.quality import rank_correlation
from denoise_batch.extra_columns import ExtraColumns
from denoise_batch.noise import NoiseRecipe

BATCH, HELD_OUT = 512, 5000
RATE = 1e-3


class Judge(nn.Module):
    """(n, 28, 28) noisy and denoised, (n,) what the head expects → (n,) PSNR in dB."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Conv2d(20, 48, 3, padding=1)
        self.fine = nn.Conv2d(48, 48, 3, padding=1)
        self.down = nn.Conv2d(48, 96, 3, stride=2, padding=1)
        self.coarse = nn.Conv2d(96, 96, 3, padding=1)
        self.whole = nn.Sequential(nn.Linear(96 * 51 + 3, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU())
        self.out = nn.Linear(128, 1)

    def forward(self, noisy: Tensor, denoised: Tensor, expected: Tensor) -> Tensor:
        half_range = -noisy.amin(dim=(1, 2)).clamp_max(0.0)
        lower = (noisy - half_range[:, None, None]).clamp(0.0, 1.0)
        variance = denoised * (1.0 - denoised)
        planes = torch.stack([noisy, denoised, 4.0 * variance, noisy - denoised, lower], dim=1)
        x = functional.pixel_unshuffle(planes, 2).contiguous(memory_format=torch.channels_last)
        x = self.read(x).relu()
        x = (x + self.fine(x)).relu()
        x = self.down(x).relu()
        x = (x + self.coarse(x)).relu()
        numbers = [(expected - 20.0) / 5.0, half_range, variance.mean(dim=(1, 2)).clamp_min(1e-6).log10()]
        features = [x.flatten(1), x.mean(dim=(2, 3)), x.amax(dim=(2, 3)), torch.stack(numbers, dim=1)]
        return expected + self.out(self.whole(torch.cat(features, dim=1)))[:, 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", type=Path, metavar="FOLDER", help="MNIST's IDX files; else found or downloaded")
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    options = parser.parse_args()
    torch.manual_seed(0)
    denoiser = Denoiser(bundle.read_bundle(bundle.SHIPPED_FOLDER), device="cpu", threads=options.threads)
    images = torch.from_numpy(load_mnist(find_mnist(options.mnist), Split.TRAIN)[0].copy()).float() / 255
    train, held_out = images[:-HELD_OUT], images[-HELD_OUT:]
    *shown, true = judged(denoiser, held_out, torch.Generator().manual_seed(9))
    print(f"{time.strftime('%Y-%m-%d')}; the PSNR itself varies by {true.std():.3f} dB\n")
    print("| minutes | images | rank correlation | difference, dB |")
    print("|---|---|---|---|")
    print(f"| the head | | {rank_correlation(shown[2].numpy(), true.numpy()):.4f} | {(shown[2] - true).std():.3f} |")
    judge = Judge().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.AdamW(judge.parameters(), RATE, weight_decay=0.02)
    random, begun, seen = torch.Generator().manual_seed(1), time.monotonic(), 0
    while (share := (time.monotonic() - begun) / 60 / options.minutes) < 1:
        for group in optimiser.param_groups:
            group["lr"] = RATE * max(0.02, 1 - share)
        *given, target = judged(denoiser, train[torch.randint(0, len(train), (BATCH,), generator=random)], random)
        functional.smooth_l1_loss(judge(*given), target).backward()
        optimiser.step()
        optimiser.zero_grad()
        seen += BATCH
        if seen % (200 * BATCH) == 0:
            print_line(judge, shown, true, (time.monotonic() - begun) / 60, seen)
    print_line(judge, shown, true, options.minutes, seen)


def judged(denoiser: Denoiser, clean: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(n, 28, 28) clean → noisy, denoised, (n,) the PSNR that the model expects, and the true one."""
    noisy = NoiseRecipe().apply(clean, random)[0]
    made = denoiser.run(noisy.reshape(-1, 784).numpy(), ExtraColumns(quality=True))
    assert made.psnr is not None
    denoised = torch.from_numpy(made.pixels).view(-1, 28, 28)
    true = -10.0 * (denoised - clean).square().mean(dim=(1, 2)).clamp_min(1e-9).log10()
    return noisy, denoised, torch.from_numpy(np.array(made.psnr)), true


def print_line(judge: Judge, shown: list[Tensor], true: Tensor, minutes: float, seen: int) -> None:
    with torch.inference_mode():
        parts = [judge(*(part[start : start + BATCH] for part in shown)) for start in range(0, len(true), BATCH)]
        expected = torch.cat(parts)
    rank = rank_correlation(expected.numpy(), true.numpy())
    print(f"| {minutes:.1f} | {seen:,} | {rank:.4f} | {(expected - true).std():.3f} |", flush=True)


if __name__ == "__main__":
    main()
