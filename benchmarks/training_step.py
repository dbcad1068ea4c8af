"""Where a step of training the default recipe spends its time, and what a second worker is worth.

    python benchmarks/training_step.py [--mnist FOLDER] [--device cuda] [--minutes 1]

The first table is of one process with one thread (or one GPU): milliseconds of drawing the noise, of the forward pass
with its losses, of the backward pass, of the optimiser, of the moving average; and of averaging the gradient of two
processes on this machine by gloo, which a training on several workers does besides. On a GPU Python asks for these
parts one by one, which takes longer than computing them, so a second table has whole steps as they are trained,
recorded as CUDA graphs, and the noise's part of them. The last is of whole trainings of so many minutes: images/s as
their `history.csv` has them, once the first epoch is over.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from denoise_batch import models
from denoise_batch.bundle.history import read_history
from denoise_batch.digits import Split, find_mnist, load_mnist
from denoise_batch.models.cuda_pass import undisturbed
from denoise_batch.noise import NoiseRecipe
from denoise_batch.process.freed_memory import keep_freed_memory
from denoise_batch.training.batches import Batch, draw_noise
from denoise_batch.training.objective import cross_entropy, heads_loss, weight_of
from denoise_batch.training.optimisation import make_optimiser
from denoise_batch.training.recipes import RECIPES
from denoise_batch.training.step import TrainingStep, noised

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

RECIPE = RECIPES["default"]
STEPS, WARM_UP = 60, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", type=Path, metavar="FOLDER", help="MNIST's IDX files; else found or downloaded")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--minutes", type=float, default=1.5, help="of each whole training")
    parser.add_argument("--workers", nargs="*", type=int, default=[1, 2], help="of the whole trainings")
    options = parser.parse_args()
    folder = find_mnist(options.mnist)
    torch.set_num_threads(1)
    keep_freed_memory()
    print(f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} × {platform.processor() or platform.machine()}\n")
    pixels = torch.from_numpy(load_mnist(folder, Split.TRAIN)[0].copy()).to(options.device)
    # As a training has it, and before the first convolution: cuDNN keeps what it chose.
    torch.backends.cudnn.benchmark = torch.backends.cudnn.allow_tf32 = True
    parts = split(pixels, torch.device(options.device))
    total = sum(parts.values())
    print("| part of a step | ms | share |")
    print("|---|---|---|")
    for name, milliseconds in parts.items():
        print(f"| {name} | {milliseconds:.1f} | {100 * milliseconds / total:.0f}% |")
    print(f"| all, of {RECIPE.batch} images | {total:.1f} | {1e3 * RECIPE.batch / total:,.0f} images/s |")
    if options.device == "cpu":
        print(f"| averaging over two workers, besides | {averaging(models.build(RECIPE.architecture)):.1f} | |")
    else:
        print("\n| recorded step of | ms | images/s | its noise alone, ms | share |\n|---|---|---|---|---|")
        for batch in (RECIPE.batch, 1024, 2048, 4096):
            step, noise = recorded(pixels, batch)
            print(f"| {batch:,} images | {step:.2f} | {1e3 * batch / step:,.0f} | {noise:.2f} | {noise / step:.1%} |")
    if not options.workers:
        return
    print("\n| workers | images/s | against the first |\n|---|---|---|")
    first = 0.0
    for workers in options.workers:
        rate = whole_training(folder, options.device, options.minutes, workers)
        first = first or rate
        print(f"| {workers} | {rate:,.0f} | {rate / first:.2f} × |", flush=True)


def split(pixels: Tensor, device: torch.device) -> dict[str, float]:
    """Milliseconds of each part of a step, medians."""
    torch.manual_seed(0)
    network = models.build(RECIPE.architecture).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    average, optimiser = copy.deepcopy(network), make_optimiser(RECIPE, network)
    noise, random = NoiseRecipe.from_json(RECIPE.noise_json()), torch.Generator(device).manual_seed(0)
    bfloat16 = RECIPE.precision.bfloat16(device)
    took: dict[str, list[float]] = {}
    for _ in range(WARM_UP + STEPS):
        clock = _Clock(device)
        rows = torch.randint(0, len(pixels), (RECIPE.batch,), generator=random, device=device)
        taken = Batch(pixels[rows].float() / 255, None, slice(0, RECIPE.batch), RECIPE.batch)
        clock.note("taking images")
        batch, noisy, level = noised(taken, RECIPE, noise, random)
        clock.note("noise, and what is no digit")
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            outputs = network.outputs(noisy[:, None])
        assert batch.counts is not None
        clean = batch.clean[:, None]
        losses = cross_entropy(outputs.logits.float(), clean) * batch.counts
        loss = (losses * weight_of(outputs.quality, RECIPE.balance)).mean()
        loss = loss + heads_loss(outputs, noisy[:, None], clean, level, batch.counts)
        clock.note("forward pass and losses")
        loss.backward()
        clock.note("backward pass")
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        clock.note("optimiser")
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1.0 - RECIPE.average)
        clock.note("moving average")
        for name, seconds in clock.parts.items():
            took.setdefault(name, []).append(seconds)
    return {name: 1e3 * statistics.median(seconds[WARM_UP:]) for name, seconds in took.items()}


def recorded(pixels: Tensor, batch: int) -> tuple[float, float]:
    """Milliseconds of a step as a training takes it on a GPU, and of a graph that draws and adds its noise alone."""
    torch.manual_seed(0)
    recipe, device = replace(RECIPE, batch=batch), pixels.device
    network = models.build(recipe.architecture).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    step = TrainingStep(network, copy.deepcopy(network), make_optimiser(recipe, network), recipe, seed=0, workers=1)
    whole = Batch(pixels[:batch].float() / 255, None, slice(0, batch), batch)
    noise, random = NoiseRecipe.from_json(recipe.noise_json()), torch.Generator(device)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    graph.register_generator_state(random)
    with torch.cuda.stream(stream):
        for _ in range(2):
            draw_noise(noise, whole, random)
        with undisturbed(), torch.cuda.graph(graph, stream=stream):
            kept = draw_noise(noise, whole, random)
        took = _milliseconds(lambda number: step(whole, recipe.learning_rate, number))
        alone = _milliseconds(lambda _: graph.replay())
    del kept
    return took, alone


def _milliseconds(run: Callable[[int], Any]) -> float:
    """Of one run, the median of ten times twenty, after warming up."""
    took: list[float] = []
    for turn in range(12):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for number in range(20):
            run(20 * turn + number)
        torch.cuda.synchronize()
        took.append((time.perf_counter() - begun) / 20)
    return 1e3 * statistics.median(took[2:])


class _Clock:
    """Seconds between one note and the next."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._since = device, time.perf_counter()
        self.parts: dict[str, float] = {}

    def note(self, name: str) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.parts[name], self._since = now - self._since, now


def averaging(network: torch.nn.Module) -> float:
    """Milliseconds in which two processes average a gradient of the network's size."""
    count = sum(parameter.numel() for parameter in network.parameters())
    with tempfile.TemporaryDirectory() as folder:
        process = torch.multiprocessing.get_context("spawn").Process(target=_member, args=(1, count, folder))
        process.start()
        milliseconds = _member(0, count, folder)
        process.join()
    return milliseconds


def _member(rank: int, count: int, folder: str) -> float:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    gradient, took = torch.zeros(count), []
    for _ in range(30):
        begun = time.perf_counter()
        distributed.all_reduce(gradient)
        took.append(time.perf_counter() - begun)
    distributed.destroy_process_group()
    return 1e3 * statistics.median(took)


def whole_training(folder: Path, device: str, minutes: float, workers: int) -> float:
    """Images/s of all epochs but the first, which has the start-up of PyTorch's kernels in it."""
    with tempfile.TemporaryDirectory() as base:
        out = Path(base, "model")
        command = [sys.executable, "-m", "denoise_batch.cli", "train", "--out", str(out), "--mnist", str(folder)]
        command += ["--device", device, "--minutes", f"{minutes:g}", "--workers", str(workers)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        rows = read_history(out / "history.csv")
        return statistics.median(row.images_per_second for row in rows[1:] or rows)


if __name__ == "__main__":
    main()
