"""Trains the network that tells how dark an image's ink is (`images/ink.py`), and writes its weights.

    python benchmarks/train_ink_reader.py --minutes 25 --out denoise_batch/pretrained/ink/model.safetensors

Digits of MNIST's training images and drawn ones, the strokes of most thinner or thicker than they were, empty images
among them; ink from a quarter to full; blur to 3 pixels, and noise of each kind from none to r = 1.5. The blur goes
further than scans' is meant to: at the end of its range, blur could only be less, and what is pale only faint.
Prints what it makes of fresh draws: the mean of -log p, and how far its own estimate is off. A minute of two cores
draws and learns 0.8 million images.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from denoise_batch.digits.drawn_digits import draw_digits
from denoise_batch.digits.mnist import Split, find_mnist, load_mnist
from denoise_batch.images.ink import FULL_SHARE, LEVELS, seen_by_reader
from denoise_batch.noise import NoiseRecipe

BATCH, WIDTH = 1024, 64
HELD_OUT = 5000
FAINTEST_NOISE, HEAVIEST_NOISE, LARGEST_BLUR = 0.01, 1.5, 3.0
RECIPE = NoiseRecipe(clipped=0.5, gaussian=0.4, impulse=0.1)


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.window, self.stroke = nn.Linear(64, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.image, self.level = nn.Linear(3 * WIDTH + 12, 96), nn.Linear(96, len(LEVELS))

    def forward(self, noisy: Tensor) -> Tensor:
        windows, summary = (torch.from_numpy(part) for part in seen_by_reader(noisy.flatten(1).numpy()))
        strokes = torch.relu(self.stroke(torch.relu(self.window(windows))))
        pooled = [strokes.mean(dim=1), strokes.amax(dim=1), (strokes.square().mean(dim=1) + 1e-6).sqrt()]
        scores: Tensor = self.level(torch.relu(self.image(torch.cat([*pooled, summary], dim=1))))
        return scores


def draw(digits: list[Tensor], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noisy images, (n, 28, 28), and the logarithm of their ink over that of the faintest, (n,) from 0 to 1."""
    drawn = BATCH // 5
    counts = (BATCH - drawn, drawn)
    places = [torch.randint(len(d), (n,), generator=generator) for d, n in zip(digits, counts, strict=True)]
    clean = torch.cat([d[i] for d, i in zip(digits, places, strict=True)]).float() / 255
    lots = torch.rand((5, BATCH), generator=generator)
    clean = other_strokes(clean, lots[0])
    clean[lots[0] > 0.88] = 0.0  # as many cells of forms are: faint ink is not to be the reason for seeing none
    faintness = ((lots[1] - FULL_SHARE) / (1 - FULL_SHARE)).clamp_min(0.0)
    ink = float(LEVELS[-1]) ** faintness
    half_range = FAINTEST_NOISE * (HEAVIEST_NOISE / FAINTEST_NOISE) ** lots[2]
    half_range = torch.where(lots[3] < 0.15, 0.0, half_range)
    sigma = LARGEST_BLUR * ((lots[4] - 0.3) / 0.7).clamp_min(0.0)
    noise = replace(RECIPE.draw(BATCH, generator), half_range=half_range, sigma=sigma)
    return noise.degrade(clean * ink[:, None, None])[0], faintness


def other_strokes(clean: Tensor, lots: Tensor) -> Tensor:
    """Three strokes in ten up to a pixel thicker, three up to as much thinner where something is left of them."""
    padded = functional.pad(clean[:, None], (0, 1, 0, 1))
    thicker, thinner = functional.max_pool2d(padded, 2, 1)[:, 0], -functional.max_pool2d(-padded, 2, 1)[:, 0]
    weight = (lots / 0.3 % 1.0)[:, None, None]
    out = torch.where((lots < 0.3)[:, None, None], torch.lerp(clean, thicker, weight), clean)
    thin = torch.lerp(clean, thinner, weight)
    thin = torch.where((thin.amax(dim=(1, 2)) > 0.9)[:, None, None], thin, clean)
    return torch.where(((lots >= 0.3) & (lots < 0.6))[:, None, None], thin, out)


def loss(scores: Tensor, faintness: Tensor) -> Tensor:
    """Mean of -log p, where a level between two counts for both."""
    place = faintness * (len(LEVELS) - 1)
    below = place.floor().clamp_max(len(LEVELS) - 2)
    above = place - below
    log_p, index = functional.log_softmax(scores, dim=1), below.long()[:, None]
    picked = (1 - above) * log_p.gather(1, index)[:, 0] + above * log_p.gather(1, index + 1)[:, 0]
    return -picked.mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--mnist", type=Path, default=None, help="the folder of its files; else as denoise-batch finds it"
    )
    options = parser.parse_args()
    mnist = load_mnist(find_mnist(options.mnist), Split.TRAIN)[0].reshape(-1, 28, 28)
    digits = [torch.from_numpy(mnist[:-HELD_OUT]), torch.from_numpy(draw_digits(20_000, 5)[0])]
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(1)
    reader = Reader()
    optimiser = torch.optim.AdamW(reader.parameters(), lr=2e-3, weight_decay=1e-4)
    started, step = time.monotonic(), 0
    while (done := (time.monotonic() - started) / 60 / options.minutes) < 1:
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 200) * (1 - done)
        noisy, faintness = draw(digits, generator)
        optimiser.zero_grad()
        found = loss(reader(noisy), faintness)
        found.backward()
        optimiser.step()
        step += 1
        if step % 500 == 0:
            print(f"{step * BATCH:,} images, {done:.0%}: {found.item():.3f}", flush=True)
    others = [torch.from_numpy(mnist[-HELD_OUT:]), torch.from_numpy(draw_digits(5_000, 6)[0])]
    with torch.inference_mode():
        tests = [draw(others, generator) for _ in range(20)]
        scores = [reader(noisy) for noisy, _ in tests]
        off = [
            (s.softmax(dim=1) @ torch.linspace(0, 1, len(LEVELS)) - f).square().mean()
            for s, (_, f) in zip(scores, tests, strict=True)
        ]
        losses = [loss(s, f) for s, (_, f) in zip(scores, tests, strict=True)]
    rms = float(-np.log(LEVELS[-1]) * torch.stack(off).mean().sqrt())
    print(
        f"other digits: {torch.stack(losses).mean().item():.4f}; off by {rms:.3f} in the logarithm (root mean square)"
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: weight.contiguous() for name, weight in reader.state_dict().items()}, options.out)


if __name__ == "__main__":
    main()
