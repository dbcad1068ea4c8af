"""Makes a model as the default one is made, by one command: three trainings, and the last layers of its quality head.

    python benchmarks/default_model.py --out default-model --device cuda

8 minutes of one GPU and some 40 of two cores. Each training goes on from the one before (docs/quality.md has what came
of each), and is kept beside `--out`, so that the same command goes on where it was stopped. At the end the card has
what `evaluate` finds. `--share 0.02` takes so much of all times and images, to try it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

CPU = ("--device", "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the model folder")
    parser.add_argument("--device", default="cuda", help="of the first two trainings")
    parser.add_argument("--share", type=float, default=1.0, help="of the times and the images")
    parser.add_argument("--mnist", type=Path, metavar="FOLDER", help="MNIST's IDX files; else found or downloaded")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"--out {options.out} exists")
    if options.mnist is not None:
        os.environ["DENOISE_BATCH_MNIST"] = str(options.mnist.resolve())
    first, second, third = (options.out.with_name(f"{options.out.name}-{number}") for number in (1, 2, 3))
    device = ("--device", options.device)
    train(first, 4.7 * options.share, "--batch", "2048", *device)
    train(second, 3.0 * options.share, "--init", str(first), "--lr", "0.002", "--batch", "2048", *device)
    train(third, 5.0 * options.share, "--init", str(second), "--lr", "0.0003", "--batch", "512", "--workers", "2", *CPU)
    images = str(max(4096, round(1_500_000 * options.share)))
    head = Path(__file__).with_name("quality_head.py")
    run(str(head), str(third), "--seed", "5", "--images", images, "--out", str(options.out))
    limit = () if options.share == 1.0 else ("--limit", "500")
    run("-m", "denoise_batch.cli", "evaluate", *CPU, "--model", str(options.out), "--card", *limit)


def train(out: Path, minutes: float, *arguments: str) -> None:
    """A training, or what is left of it."""
    run("-m", "denoise_batch.cli", "train", "--minutes", f"{minutes:g}", "--out", str(out), *arguments)


def run(*arguments: str) -> None:
    print("+ python", *arguments, flush=True)
    done = subprocess.run([sys.executable, *arguments], check=False)
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
