"""Trains a model's heads anew, what to keep of an image and how good it is; all other weights stay as they are.

    python benchmarks/heads.py denoise-model --out new-model --minutes 20

For models whose heads have changed since they were trained: tensors that the folder lacks start afresh, inputs that are
new start at 0. Images (MNIST) are the training's, the optimiser is AdamW. Every other batch has the training's noise,
the others the same kinds at faint levels, of which the training's has few. What says how good an image is then gets the
last of its training on half a million images. Then chooses integers anew. Prints what validation says before and after.
The card's figures are `evaluate --card`'s to write.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch.nn import functional

from denoise_batch.bundle import MODEL_FILE, WEIGHTS_FILE, BundleCard, as_json, save_bundle
from denoise_batch.bundle.history import read_history
from denoise_batch.digits import Split, find_mnist, load_mnist
from denoise_batch.freed_memory import keep_freed_memory
from denoise_batch.models.bounds_unet import BoundsUNet, Passed
from denoise_batch.models.watched_layers import on_input
from denoise_batch.noise import NoiseRecipe
from denoise_batch.training.batches import ResidentBatches, draw_noise, noise_generator
from denoise_batch.training.objective import heads_loss, loss_about, psnr_of
from denoise_batch.training.validation import Validation

if TYPE_CHECKING:
    from torch import Tensor

SETTLED, EPOCHS = 500_000, 6
EXPECTED = 2  # which of the numbers about an image is the expected PSNR
HELD_OUT, BATCH, RATE, AVERAGE = 5000, 512, 2e-3, 0.999
HEADS = ("gate", "quality")


class HeadsAlone(BoundsUNet):
    """No gradient goes through the network's pass."""

    def _pass(self, noisy: Tensor) -> Passed:
        with torch.no_grad():
            return super()._pass(noisy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="model folder")
    parser.add_argument("--out", type=Path, required=True, help="where the changed one goes")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--mnist", type=Path, metavar="FOLDER", help="MNIST's IDX files; else found or downloaded")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"--out {options.out} exists")
    keep_freed_memory()
    torch.manual_seed(0)
    model = json.loads((options.folder / MODEL_FILE).read_text(encoding="utf-8"))
    network = HeadsAlone(**model["parameters"]).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    take_weights(network, options.folder / WEIGHTS_FILE)
    pixels = load_mnist(find_mnist(options.mnist), Split.TRAIN)[0]
    noise = NoiseRecipe.from_json(model["noise"])
    held = Validation(pixels[-HELD_OUT:], None, noise=noise, device=torch.device("cpu"), rank=0, workers=1)
    print_validation("before", network, held)
    faint = replace(noise, sigma=(0.0, 1.0), half_range=(0.0, 0.3), noiseless=0.12, clean=0.08)
    clean = torch.from_numpy(pixels[:-HELD_OUT].copy())
    images = train(network, noise, faint, clean, options.minutes)
    settle(network, noise, faint, clean)
    images += SETTLED
    metrics = print_validation(f"after {images:,} images", network, held)
    whole = BoundsUNet(**model["parameters"])
    whole.load_state_dict(network.state_dict())
    whole.prepare_int8(held.all_shown[:, None])
    fields = {name: model[name] for name in ("architecture", "parameters", "noise", "recipe", "command", "data")}
    fields["data"] |= {"heads": {"script": "benchmarks/heads.py", "images": images}}
    history = tuple(read_history(options.folder / "history.csv"))
    save_bundle(options.out, whole, BundleCard(**fields, metrics=model["metrics"] | metrics, history=history))
    saved = json.loads((options.out / MODEL_FILE).read_text(encoding="utf-8"))
    saved |= {name: model[name] for name in ("versions", "created")}  # of the training
    (options.out / MODEL_FILE).write_bytes(as_json(saved))


def take_weights(network: BoundsUNet, path: Path) -> None:
    """Fills in what there is; inputs that a layer has more than the file's, the first ones, count nothing yet."""
    wanted = network.state_dict()
    for name, value in load_file(path).items():
        more = wanted[name].shape[1] - value.shape[1] if value.ndim == 2 else 0
        wanted[name] = functional.pad(value, (more, 0)) if more else value
    network.load_state_dict(wanted)


def train(network: BoundsUNet, noise: NoiseRecipe, faint: NoiseRecipe, clean: Tensor, minutes: float) -> int:
    network.requires_grad_(False)
    heads = torch.nn.ModuleList([getattr(network, name) for name in HEADS]).requires_grad_(True)
    average, optimiser = copy.deepcopy(heads), torch.optim.AdamW(heads.parameters(), RATE, weight_decay=1e-2)
    data = ResidentBatches(clean, None, batch=BATCH, seed=0, rank=0, workers=1)
    begun, images = time.monotonic(), 0
    for step, batch in enumerate(itertools.chain.from_iterable(map(data.epoch, itertools.count(1)))):
        if (share := (time.monotonic() - begun) / 60 / minutes) >= 1:
            break
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 200) * 0.5 * (1.0 + math.cos(math.pi * share))
        noisy, level = draw_noise(faint if step % 2 else noise, batch, noise_generator(0, step, clean.device))
        outputs = network.outputs(noisy[:, None])
        heads_loss(outputs, noisy[:, None], batch.clean[:, None], level).backward()
        optimiser.step()
        optimiser.zero_grad()
        with torch.no_grad():
            follow = 1.0 - min(AVERAGE, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.parameters()), list(heads.parameters()), follow)
        images += batch.total
    heads.load_state_dict(average.state_dict())
    return images


def settle(network: BoundsUNet, noise: NoiseRecipe, faint: NoiseRecipe, clean: Tensor) -> None:
    """Trains the last two layers of the quality head to the end, on what they are given of images kept in memory."""
    given: list[Tensor] = []
    truths: list[Tensor] = []
    random = torch.Generator().manual_seed(1)
    with torch.no_grad(), on_input(network.quality.hidden, lambda x: given.append(x.clone())):
        for step in range(SETTLED // BATCH):
            images = clean[torch.randint(len(clean), (BATCH,), generator=random)].float() / 255
            noisy, level = (noise if step % 2 else faint).draw(BATCH, random).degrade(images)
            psnr = psnr_of(network.outputs(noisy[:, None]).clean, images[:, None])
            truths.append(torch.stack([psnr, level], dim=1))
    features, truth = torch.cat(given), torch.cat(truths)
    layers = torch.nn.ModuleList([network.quality.hidden, network.quality.out])
    optimiser, taken = torch.optim.AdamW(layers.parameters(), weight_decay=0.0), 0
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(features)).split(4 * BATCH):
            share = taken / (EPOCHS * len(features))
            for group in optimiser.param_groups:
                group["lr"] = 1.5 * RATE * min(1.0, 50.0 * share) * 0.5 * (1.0 + math.cos(math.pi * share))
            correction, level = layers[1](torch.relu(layers[0](features[chosen]))).unbind(dim=1)
            said = torch.stack([10.0 * (features[chosen, EXPECTED] + correction), level], dim=1)
            loss_about(said, *truth[chosen].unbind(dim=1)).backward()
            optimiser.step()
            optimiser.zero_grad()
            taken += len(chosen)


def print_validation(when: str, network: BoundsUNet, held: Validation) -> dict[str, float]:
    """The same as a model folder's metrics."""
    _, noisy, clean, quality = held.errors(network, bfloat16=False).div(held.total).tolist()
    metrics = {
        "validation_psnr_noisy": -10.0 * math.log10(noisy),
        "validation_psnr_clean": -10.0 * math.log10(max(clean, 1e-12)),
        "validation_quality_error": math.sqrt(quality),
    }
    print(when, *(f"{name} {value:.3f} dB" for name, value in metrics.items()), sep=", ", flush=True)
    return metrics


if __name__ == "__main__":
    main()
