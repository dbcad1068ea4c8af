"""Trains the last two layers of a finished model's quality head on; no pixel that it makes changes.

    python benchmarks/quality_head.py denoise_batch/pretrained/bounds-unet --out new-model

`train` trains the head with the network; this is for a model whose head is to learn what the recipe of today has for
it, and as often as what is rare among it needs: images (MNIST), their noise and what is no digit among them are the
recipe's, the loss is the training's, the optimiser is AdamW. What the two layers see is computed once, half of it in
8-bit integers where this machine has them: these cut off what is large, as features of empty images are. Prints what
validation says before and after. The figures of an evaluation stay what they are.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from denoise_batch.bundle import MODEL_FILE, WEIGHTS_FILE, read_bundle
from denoise_batch.bundle.card import model_card
from denoise_batch.bundle.files import read_tensors
from denoise_batch.bundle.history import read_history
from denoise_batch.bundle.saving import as_json
from denoise_batch.digits import Split, find_mnist, load_mnist
from denoise_batch.noise import NoiseRecipe
from denoise_batch.training.batches import ResidentBatches, noise_generator
from denoise_batch.training.objective import loss_about, psnr_of
from denoise_batch.training.recipes import RECIPES
from denoise_batch.training.step import noised
from denoise_batch.training.validation import Validation

if TYPE_CHECKING:
    from torch import Tensor

    from denoise_batch.bundle import Bundle
    from denoise_batch.models.network import DenoisingNetwork
    from denoise_batch.training.recipes import Recipe

HELD_OUT, BATCH, EPOCHS, RATE, AVERAGE = 5000, 1024, 40, 1e-3, 0.999
LEARNING = ("hidden", "out")  # of the head
EXPECTED = 2  # of what the head's last layers see: what is expected before they correct it, in units of 10 dB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="model folder")
    parser.add_argument("--out", type=Path, required=True, help="where the changed one goes")
    parser.add_argument("--images", type=int, default=1_500_000)
    parser.add_argument("--seed", type=int, default=0, help="of the images' order and their noise")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--mnist", type=Path, metavar="FOLDER", help="MNIST's IDX files; else found or downloaded")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"--out {options.out} exists")
    if options.threads:
        torch.set_num_threads(options.threads)
    given = read_bundle(options.folder)
    if not given.has_quality:
        parser.error(f"{options.folder}: its network, {given.architecture}, has no quality head")
    network, in_integers = given.load(), given.load()
    in_integers.to_int8()
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
    print(f"before: {given.model['metrics']['validation_quality_error']:.3f} dB", flush=True)
    clean = torch.from_numpy(pixels[:-HELD_OUT].copy())
    seen, psnr, levels = gather((network, in_integers), recipe, noise, clean, options.images, options.seed)
    fit(head_of(network), seen, psnr, levels)
    error = error_of(network, held)
    print(f"after {EPOCHS} epochs of {len(seen):,} images: {error:.3f} dB")
    save(given, network, options.out, {"images": len(seen), "foreign_every": recipe.foreign_every}, error)


def save(given: Bundle, network: DenoisingNetwork, out: Path, training: dict[str, int], error: float) -> None:
    """The model folder as it was, with the new head."""
    shutil.copytree(given.folder, out)
    weights = load_file(given.folder / WEIGHTS_FILE)
    weights |= {f"quality.{name}": value.contiguous() for name, value in head_of(network).state_dict().items()}
    save_file(weights, out / WEIGHTS_FILE)
    model = given.model
    content = (out / WEIGHTS_FILE).read_bytes()
    tensors = read_tensors(content, out / WEIGHTS_FILE).items()
    model["weights"] |= {
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "parameters": network.parameter_count(),
        "tensors": {name: {"dtype": dtype, "shape": list(shape)} for name, (dtype, shape) in tensors},
    }
    model["data"]["quality_head"] = training
    model["request"] = ""  # `train` does not make it alone
    model["metrics"]["validation_quality_error"] = error
    (out / MODEL_FILE).write_bytes(as_json(model))
    (out / "README.md").write_text(model_card(model, tuple(read_history(out / "history.csv"))), encoding="utf-8")
    read_bundle(out).load()


@torch.no_grad()
def gather(
    networks: tuple[DenoisingNetwork, ...],
    recipe: Recipe,
    noise: NoiseRecipe,
    clean: Tensor,
    images: int,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the head's last two layers see of images as the recipe draws them, (n, features), and what they are to say:
    the PSNR in dB and the noise level, (n,) each.

    All that comes before them is as it is, so it is computed once, by the networks in turn.
    """
    seen: list[Tensor] = []
    hooks = [
        head_of(network).get_submodule("hidden").register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        for network in networks
    ]
    data, psnr, levels = ResidentBatches(clean, None, batch=BATCH, seed=seed, rank=0, workers=1), [], []
    batches = itertools.chain.from_iterable(map(data.epoch, itertools.count(1)))
    for step, batch in enumerate(itertools.islice(batches, -(-images // BATCH))):
        shown, noisy, level = noised(batch, recipe, noise, noise_generator(seed, step, clean.device))
        network = networks[step % len(networks)]
        psnr.append(psnr_of(network.outputs(noisy[:, None]).clean, shown.clean[:, None]))
        levels.append(level)
        if step % 500 == 0:
            print(f"{step * BATCH:,} images", flush=True)
    for hook in hooks:
        hook.remove()
    return torch.cat(seen), torch.cat(psnr), torch.cat(levels)


def fit(head: nn.Module, seen: Tensor, psnr: Tensor, levels: Tensor) -> None:
    """Trains the head's last two layers on what `gather` gives; the average of their weights is left in them."""
    hidden, out = (head.get_submodule(name) for name in LEARNING)
    weights = [*hidden.parameters(), *out.parameters()]
    average, optimiser = [weight.clone() for weight in weights], torch.optim.AdamW(weights, RATE, weight_decay=1e-2)
    for weight in weights:
        weight.requires_grad_(True)
    random, steps = torch.Generator().manual_seed(1), EPOCHS * (len(seen) // BATCH)
    for step in range(steps):
        if step % (len(seen) // BATCH) == 0:
            order = torch.randperm(len(seen), generator=random).split(BATCH)
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 200) * 0.5 * (1.0 + math.cos(math.pi * step / steps))
        rows = order[step % (len(seen) // BATCH)]
        given = seen[rows]
        correction, level = out(torch.relu(hidden(given))).unbind(dim=1)
        said = torch.stack([10.0 * (given[:, EXPECTED] + correction), level], dim=1)
        loss_about(said, psnr[rows], levels[rows]).backward()
        optimiser.step()
        optimiser.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(average, weights, 1.0 - min(AVERAGE, (1 + step) / (10 + step)))
    with torch.no_grad():
        torch._foreach_copy_(weights, average)


def head_of(network: DenoisingNetwork) -> nn.Module:
    assert network.has_quality
    head: nn.Module = network.get_submodule("quality")
    return head


def error_of(network: DenoisingNetwork, held: Validation) -> float:
    """Root mean square of expected less true PSNR on the validation images, in dB; no foreign content among them."""
    return math.sqrt(float(held.errors(network, bfloat16=False)[3]) / held.total)


if __name__ == "__main__":
    main()
