"""How long trainings take, and how far they get: the default recipe for so many minutes each, and the seed's epochs.

    python benchmarks/training_times.py --minutes 3                             # on CPUs
    python benchmarks/training_times.py --minutes 58 --batch 1024
    python benchmarks/training_times.py --device cuda --minutes 0.33 4.2 --batch 2048 --seed-epochs 500

Each line is one `denoise-batch train` as a user calls it, on MNIST: what the whole command took; images and images/s of
the training; when the validation images, of all kinds of noise that the recipe has, first passed 17.0 dB; and the
pooled PSNR of the finished model over the seed's mixture on the test set, as `evaluate` has it. `--keep` keeps the
model folders, with the curve of each in `curves.png`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from denoise_batch import bundle
from denoise_batch.bundle.history import read_history
from denoise_batch.denoiser import Denoiser
from denoise_batch.digits import Split, find_mnist, load_mnist
from denoise_batch.evaluation.protocol import BLOCK, CONDITIONS, degrade_images
from denoise_batch.precision import Precision

PASSED = 17.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", type=Path, metavar="FOLDER", help="MNIST's IDX files; else found or downloaded")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--minutes", nargs="*", type=float, default=[3.0], help="of the default recipe")
    parser.add_argument("--batch", type=int, help="of the default recipe's trainings; default: as `train` has it")
    parser.add_argument("--seed-epochs", type=int, default=0, help="of the seed's recipe; 0: none")
    parser.add_argument("--workers", type=int, help="default: as `train` has it")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where the models go")
    options = parser.parse_args()
    folder = find_mnist(options.mnist)
    common = ["--mnist", str(folder), "--device", options.device]
    if options.workers:
        common += ["--workers", str(options.workers)]
    batch = ["--batch", str(options.batch)] if options.batch else []
    trainings = {f"default, {minutes:g} minutes": ["--minutes", f"{minutes:g}", *batch] for minutes in options.minutes}
    if options.seed_epochs:
        seed = ["--recipe", "seed", "--epochs", str(options.seed_epochs)]
        trainings[f"seed, {options.seed_epochs} epochs"] = seed
    print(f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} × {platform.processor() or platform.machine()}\n")
    print("| training | whole command, s | images | images/s | passes 17.0 dB after, s | the seed's mixture, dB |")
    print("|---|---|---|---|---|---|")
    with contextlib.ExitStack() as stack:
        kept = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for number, (name, arguments) in enumerate(trainings.items()):
            out, begun = kept / f"training-{number}", time.monotonic()
            command = [sys.executable, "-m", "denoise_batch.cli", "train", "--out", str(out), *common, *arguments]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            print(_line(name, out, time.monotonic() - begun, folder, options.device), flush=True)


def _line(name: str, out: Path, seconds: float, mnist: Path, device: str) -> str:
    rows = read_history(out / "history.csv")
    passed = next((f"{row.seconds:.0f}" for row in rows if row.val_psnr_noisy >= PASSED), "never")
    last = rows[-1]
    found = f"{_mixture(out, mnist, device):.2f}"
    return f"| {name} | {seconds:.0f} | {last.images:,} | {last.images / last.seconds:,.0f} | {passed} | {found} |"


def _mixture(model: Path, mnist: Path, device: str) -> float:
    """Pooled PSNR in dB over the seed's mixture on MNIST's test images."""
    denoise = Denoiser(bundle.read_bundle(model), device=device, precision=Precision.FLOAT32)
    clean = load_mnist(mnist, Split.TEST)[0].astype(np.float32) / np.float32(255)
    error = 0.0
    for block, start in enumerate(range(0, len(clean), BLOCK)):
        part = clean[start : start + BLOCK]
        noisy = degrade_images(part, CONDITIONS[0], block=block)
        made = denoise(noisy.reshape(-1, 784)).reshape(part.shape)
        error += float(((made - part) ** 2).sum(dtype=np.float64))
    return -10 * float(np.log10(error / clean.size))


if __name__ == "__main__":
    main()
