"""Whether the number of workers changes what is trained: the same training on 1, 2 and 4, and on a group that shrinks.

    python benchmarks/worker_counts.py [--images 6000] [--epochs 6]

For scale, one worker also trains from another seed. The group that shrinks begins with two workers on two nodes on this
machine, of which one is killed after the second epoch. All train the default recipe on MNIST's first images (the
environment variable DENOISE_BATCH_MNIST names their folder), and validate on held-out ones. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from kill_runs import Nodes, wait_for

from denoise_batch.bundle.history import EpochRow, read_history

WAIT_S = 1800.0


def command(out: Path, options: argparse.Namespace, *more: str) -> list[str]:
    train = [sys.executable, "-m", "denoise_batch.cli", "train", "--out", str(out), "--json"]
    return [*train, "--max-images", str(options.images), "--epochs", str(options.epochs), *more]


def figures(name: str, out: Path, seconds: float) -> str:
    rows: list[EpochRow] = read_history(out / "history.csv")
    metrics = json.loads((out / "model.json").read_text())["metrics"]
    last = rows[-1]
    return (
        f"| {name} | {metrics['workers']} | {last.val_psnr_noisy:.3f} | {last.val_psnr_clean:.3f} | "
        f"{last.val_loss:.5f} | {seconds:.0f} |"
    )


def undisturbed(base: Path, options: argparse.Namespace, workers: int, seed: int) -> str:
    out, begun = base / f"{workers}-{seed}", time.monotonic()
    ours = command(out, options, "--workers", str(workers), "--seed", str(seed))
    subprocess.run(ours, check=True, stdout=subprocess.DEVNULL)
    return figures(f"{workers} worker{'s' if workers > 1 else ''}, seed {seed}", out, time.monotonic() - begun)


def shrinking(base: Path, options: argparse.Namespace) -> str:
    nodes, out, begun = Nodes(1, base / "log"), base / "shrinking", time.monotonic()
    history = base / ".shrinking.training" / "history.csv"
    try:
        ours = command(out, options, "--workers", "1:2", "--address", nodes.address)
        process = subprocess.Popen(ours, stdout=subprocess.DEVNULL)

        def two_epochs() -> bool:
            if process.poll() is not None:
                raise RuntimeError("the training ended before its node was killed")
            return history.exists() and len(history.read_text().splitlines()) > 2

        wait_for(two_epochs, WAIT_S, "two epochs", 0.1)
        before = json.loads((history.parent / "progress.json").read_text())["workers"]
        nodes.tell(f"kill {nodes.raylets[0]}")
        if process.wait(WAIT_S) != 0:
            raise RuntimeError("the training that lost its node failed")
    finally:
        nodes.clean()
    return figures(f"{before}, then fewer (a node killed after two epochs), seed 0", out, time.monotonic() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=6000, help="of MNIST, a twelfth of them held out")
    parser.add_argument("--epochs", type=int, default=6)
    options = parser.parse_args()
    os.environ.pop("RAY_ADDRESS", None)
    print(f"{date.today()}, {os.cpu_count()} cores: {options.images} images, {options.epochs} epochs\n")
    columns = ("run", "workers at the end", "PSNR, noisy, dB", "PSNR, clean, dB", "validation loss", "s")
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    with tempfile.TemporaryDirectory(prefix="worker-counts-") as folder:
        for workers, seed in ((1, 0), (2, 0), (4, 0), (1, 1)):
            print(undisturbed(Path(folder), options, workers, seed), flush=True)
        print(shrinking(Path(folder), options), flush=True)


if __name__ == "__main__":
    main()
