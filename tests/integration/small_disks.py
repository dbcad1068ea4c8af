"""Runs `infer` and `train` on disks that are full, too small or read-only, and looks at how they end and go on.

    unshare --mount python tests/integration/small_disks.py FOLDER

FOLDER must exist; small file systems in memory are mounted below it, which is why this wants a mount namespace of its
own (and `--map-root-user --user` for whoever is not root). Wanted of a run that cannot go on: exit code 1 (2 where it
is refused before it begins) within a minute, one `error:` line that names the disk and what is wrong with it, one
`hint:` line, no traceback, no OUT, no process left; and once the disk is mended the same command goes on to a complete
output. Prints a line for each run; exits 1 at the first that is not as wanted, 77 where nothing can be mounted.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from denoise_batch.digits import draw_digits
from denoise_batch.images import encode
from denoise_batch.images.layouts import Layout, output_column
from denoise_batch.inference import manifest

FILES, ROWS = 6, 400  # a unit is 630 kB of output without compression
LIMIT_S = 60.0
CANNOT_MOUNT = 77
_MARK = "DENOISE_BATCH_SMALL_DISKS"  # in the environment of a run's processes, whatever session they are in


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    seconds: float
    out: str
    errors: str
    left: list[str]


def mount(folder: Path, options: str) -> Path:
    """Mounts a file system in memory at `folder`, or changes the one that is there (`remount,…`)."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True, text=True)
    if done.returncode:
        print(f"cannot mount -o {options}: {done.stderr.strip()}")
        sys.exit(CANNOT_MOUNT)
    return folder


def fill(disk: Path) -> Path:
    """Leaves not a byte on a disk; the file that does so, to be deleted again."""
    ballast = disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("ab", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    return ballast


def command(name: str, *arguments: str | Path, **environment: str) -> Ended:
    """Runs a command of denoise-batch to its end."""
    mark, begun = uuid.uuid4().hex, time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "denoise_batch.cli", name, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=LIMIT_S + 30,
        env=os.environ | environment | {_MARK: mark},
    )
    seconds = time.monotonic() - begun
    while (left := processes(mark)) and time.monotonic() - begun < seconds + 10:
        time.sleep(0.2)
    return Ended(done.returncode, seconds, done.stdout, done.stderr, left)


def processes(mark: str) -> list[str]:
    """The living processes of a run, by their numbers."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and f"{_MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(entry.name)
    return found


def stopped(what: str, ended: Ended, out: Path, names: Path, says: str, code: int = 1) -> None:
    """Looks at a run that could not go on."""
    errors = [line for line in ended.errors.splitlines() if line.startswith("error: ")]
    hints = [line for line in ended.errors.splitlines() if line.startswith("hint: ")]
    faults = [
        *([f"exit code {ended.code}"] if ended.code != code else []),
        *([f"it took {ended.seconds:.0f} s"] if ended.seconds > LIMIT_S else []),
        *(["not one error line and one hint line"] if (len(errors), len(hints)) != (1, 1) else []),
        *([f"the error does not name {names}"] if not any(str(names) in line for line in errors) else []),
        *([f"the error does not say {says!r}"] if not any(says in line for line in errors) else []),
        *(["it calls itself a bug"] if "it is a bug" in ended.errors else []),
        *(["a traceback"] if "Traceback" in ended.errors else []),
        *([f"{out} exists"] if os.path.lexists(out) else []),
    ]
    report(what, ended, faults)


def completed(what: str, ended: Ended, out: Path, resumed: int | None) -> None:
    """Looks at a run that got through, and at what it made.

    Args:
        resumed: units that were done before; None where that cannot be known.
    """
    report(what, ended, [f"exit code {ended.code}"] if ended.code else [])
    found = json.loads(ended.out)
    faults = manifest.verify(out)
    if resumed not in {None, found["resumed_units"]}:
        faults.append(f"{found['resumed_units']} units were gone on with, not {resumed}")
    if pq.read_table(out)["id"].to_pylist() != list(range(FILES * ROWS)):
        faults.append("rows are missing")
    report("inspect --verify", command("inspect", out, "--verify"), faults)


def report(what: str, ended: Ended, faults: list[str]) -> None:
    faults = faults + ([f"processes left: {', '.join(ended.left)}"] if ended.left else [])
    said = next((line for line in ended.errors.splitlines() if line.startswith("error: ")), "")
    print(f"{what:<44} {ended.seconds:>5.1f} s  {ended.code}  {'; '.join(faults) or said or 'done'}", flush=True)
    if faults:
        print(ended.errors)
        sys.exit(1)


def write_input(folder: Path) -> Path:
    source = folder / "in"
    source.mkdir()
    image = output_column(None, "image", Layout.BINARY, "uint8")
    for number in range(FILES):
        pixels = draw_digits(ROWS, seed=1, start=number * ROWS)[0].reshape(ROWS, 784)
        table = pa.table({"id": range(number * ROWS, (number + 1) * ROWS), "image": encode(pixels, None, image)})
        pq.write_table(table, source / f"{number}.parquet")
    return source


def output_disk(source: Path, folder: Path) -> None:
    """One run whose disk is full twice, while units are written and while they are joined, and is then read-only."""
    disk = mount(folder / "disk", "size=2m")
    out = disk / "out.parquet"
    infer = (source, out, "--single-file", "--compression", "none", "--workers", "1", "--json")
    stopped("disk full while units are written", command("infer", *infer), out, disk, "the disk is full")
    mount(disk, "remount,size=5m")
    stopped("disk full while they are joined", command("infer", *infer), out, disk, "the disk is full")
    # Again, with every unit done: nothing is left that Ray would be needed for.
    stopped("disk full while they are joined, again", command("infer", *infer), out, disk, "the disk is full")
    mount(disk, "remount,ro,size=16m")
    stopped("disk read-only", command("infer", *infer), out, disk, "writable", code=2)
    mount(disk, "remount,rw,size=16m")
    completed("disk with room", command("infer", *infer), out, FILES)


def ray_disk(source: Path, folder: Path) -> None:
    """The disk that Ray keeps its logs on is full from the start, then becomes so while workers start."""
    disk = mount(folder / "ray", "size=8m")
    out = folder / "out"
    infer = (source, out, "--workers", "1", "--json")
    ballast = fill(disk)
    ended = command("infer", *infer, RAY_TMPDIR=str(disk))
    stopped("Ray's disk full", ended, out, disk, "the disk that Ray keeps its logs on is full")
    ballast.unlink()

    def fill_once_workers_start() -> None:
        marks = folder / ".out.denoise-batch" / "workers"
        while not any(marks.glob("worker-*")):
            time.sleep(0.02)
        fill(disk)

    threading.Thread(target=fill_once_workers_start, daemon=True).start()
    ended = command("infer", *infer, RAY_TMPDIR=str(disk))
    if ended.code:
        stopped("Ray's disk full while workers start", ended, out, disk, "the disk that Ray keeps its logs on is full")
    else:  # who has its log open already needs no more room
        completed("Ray's disk full while workers start", ended, out, 0)
    ballast.unlink()
    if ended.code:
        completed("Ray's disk with room", command("infer", *infer, RAY_TMPDIR=str(disk)), out, None)


def training_disk(source: Path, folder: Path) -> None:
    """No checkpoint fits: the first attempt says so, not the sixth."""
    disk = mount(folder / "models", "size=64k")
    out = disk / "model"
    train = ("--data", source, "--recipe", "seed", "--max-images", "400", "--epochs", "2", "--workers", "1")
    stopped("disk full while a model is trained", command("train", *train, "--out", out), out, disk, "the disk is full")


def main() -> None:
    folder = Path(sys.argv[1]).absolute()
    source = write_input(folder)
    training_disk(source, folder)
    output_disk(source, folder)
    ray_disk(source, folder)


if __name__ == "__main__":
    main()
