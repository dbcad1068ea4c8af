"""Trains the quality head of a finished model further; no pixel that it makes changes.

    python benchmarks/quality_head.py denoise_batch/pretrained/bounds-unet --out new-model --minutes 20

`train` trains the head with the network; this is for a model whose head is to learn what the recipe of today has for
it: images (MNIST), their noise and what is no digit among them are the recipe's, the loss is the training's, the
optimiser is AdamW. Prints what validation says before and after. The figures of an evaluation stay what they are.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import itertools
import math
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from denoise_batch.bundle import MODEL_FILE, WEIGHTS_FILE, as_json, read_bundle
from denoise_batch.bundle.card import model_card
from denoise_batch.bundle.history import read_history
from denoise_batch.digits import Split, find_mnist, load_mnist
from denoise_batch.noise import NoiseRecipe
from denoise_batch.training.batches import ResidentBatches, noise_generator
from denoise_batch.training.objective import quality_loss
from denoise_batch.training.recipes import RECIPES
from denoise_batch.training.step import noised
from denoise_batch.training.validation import Validation

if TYPE_CHECKING:
    from torch import Tensor, nn

    from denoise_batch.bundle import Bundle
    from denoise_batch.models.network import DenoisingNetwork
    from denoise_batch.training.recipes import Recipe

HELD_OUT, BATCH, RATE, AVERAGE = 5000, 512, 2e-3, 0.999


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="model folder")
    parser.add_argument("--out", type=Path, required=True, help="where the changed one goes")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--mnist", type=Path, metavar="FOLDER", help="MNIST's IDX files; else found or downloaded")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"--out {options.out} exists")
    if options.threads:
        torch.set_num_threads(options.threads)
    given = read_bundle(options.folder)
    network = given.load().requires_grad_(False)
    head_of(network).requires_grad_(True)
    recipe = RECIPES["default"]
    noise = NoiseRecipe.from_json(recipe.noise_json())
    pixels = load_mnist(find_mnist(options.mnist), Split.TRAIN)[0]
    held = Validation(
        pixels[-HELD_OUT:],
        None,
        noise=noise,
        blank_every=recipe.blank_every,
        device=torch.device("cpu"),
        rank=0,
        workers=1,
    )
    print(f"before: {error_of(network, held):.3f} dB", flush=True)
    images = train(network, recipe, noise, torch.from_numpy(pixels[:-HELD_OUT].copy()), options.minutes)
    error = error_of(network, held)
    print(f"after {images:,} images: {error:.3f} dB")
    save(given, network, options.out, {"images": images, "foreign_every": recipe.foreign_every}, error)


def save(given: Bundle, network: DenoisingNetwork, out: Path, training: dict[str, int], error: float) -> None:
    """The model folder as it was, with the new head."""
    shutil.copytree(given.folder, out)
    weights = load_file(given.folder / WEIGHTS_FILE)
    weights |= {f"quality.{name}": value.contiguous() for name, value in head_of(network).state_dict().items()}
    save_file(weights, out / WEIGHTS_FILE)
    model = given.model
    model["weights"]["sha256"] = hashlib.sha256((out / WEIGHTS_FILE).read_bytes()).hexdigest()
    model["data"]["quality_head"] = training
    model["metrics"]["validation_quality_error"] = error
    (out / MODEL_FILE).write_bytes(as_json(model))
    (out / "README.md").write_text(model_card(model, tuple(read_history(out / "history.csv"))), encoding="utf-8")
    read_bundle(out).load()


def train(network: DenoisingNetwork, recipe: Recipe, noise: NoiseRecipe, clean: Tensor, minutes: float) -> int:
    """Trains the head, and leaves the average of its weights in it. How many images it saw."""
    head = head_of(network)
    average, optimiser = copy.deepcopy(head), torch.optim.AdamW(head.parameters(), RATE, weight_decay=1e-2)
    data = ResidentBatches(clean, None, batch=BATCH, seed=0, rank=0, workers=1)
    begun, images = time.monotonic(), 0
    for step, batch in enumerate(itertools.chain.from_iterable(map(data.epoch, itertools.count(1)))):
        if (share := (time.monotonic() - begun) / 60 / minutes) >= 1:
            break
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 200) * 0.5 * (1.0 + math.cos(math.pi * share))
        shown, noisy, level = noised(batch, recipe, noise, noise_generator(0, step, clean.device))
        outputs = network.outputs(noisy[:, None])
        assert outputs.quality is not None
        quality_loss(outputs.quality, outputs.clean, shown.clean[:, None], level).backward()
        optimiser.step()
        optimiser.zero_grad()
        with torch.no_grad():
            follow = 1.0 - min(AVERAGE, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.parameters()), list(head.parameters()), follow)
        images += batch.total
        if step % 500 == 0:
            print(f"{images:,} images, {100 * share:.0f}%", flush=True)
    head.load_state_dict(average.state_dict())
    return images


def head_of(network: DenoisingNetwork) -> nn.Module:
    assert network.has_quality
    head: nn.Module = network.get_submodule("quality")
    return head


def error_of(network: DenoisingNetwork, held: Validation) -> float:
    """Root mean square of expected less true PSNR on the validation images, in dB; no foreign content among them."""
    return math.sqrt(float(held.errors(network, bfloat16=False)[3]) / held.total)


if __name__ == "__main__":
    main()
