"""Sends Ctrl-C and SIGTERM to `infer` at random moments of its whole life, and looks at how it ends.

    python benchmarks/signals.py [--moments 20] [--seed 0] [--first 0] [--kinds INT,TERM,…] [--keep FOLDER]

An undisturbed run tells how long each phase lasts (loading, planning, starting Ray, starting workers, denoising,
publishing). Each moment is drawn from that time, then a fresh run is stopped there: as soon as its phase is seen on the
disk, and so long after. Wanted: exit code 130 or 143 within 10 s, one `error:` and one `hint:` line, no traceback, no
process left 30 s later, no OUT; the same command then goes on to the same bytes as the undisturbed run's. Kinds: INT,
TERM, GROUP (Ctrl-C in a terminal: every process of the group gets it), INT2 and TERM2 (twice, 0.3 s apart), HUP (the
terminal is closed). Prints a table; exits 1 if anything is not as wanted.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from denoise_batch import models
from denoise_batch.bundle.saving import BundleCard, save_bundle
from denoise_batch.digits import draw_digits
from denoise_batch.images import encode
from denoise_batch.images.layouts import Layout, output_column
from denoise_batch.inference import manifest
from denoise_batch.inference.run_folder import work_folder

FILES, ROWS = 6, 400
LIMIT_S = 10.0
LEFT_S = 30.0
"""Agents of a Ray whose start was cut short end by themselves once they are up and find their parent gone."""
PHASES = ("loading", "planning", "ray", "workers", "denoising", "publishing")
KINDS = ("INT", "TERM", "GROUP", "TERM", "INT", "GROUP", "INT2", "TERM2", "INT", "TERM")
_MARK = "DENOISE_BATCH_SIGNALS"  # in the environment of a run's processes, whatever session they are in


@dataclass
class Trial:
    """One run that was stopped."""

    kind: str
    phase: str
    after: float
    seen: str = ""
    seconds: float = 0.0
    code: int = 0
    missed: bool = False
    """The run was through before the signal came."""
    left: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def write_input(folder: Path) -> tuple[Path, Path]:
    """An input of several files, each a unit, and an untrained model of the seed's."""
    source = folder / "in"
    source.mkdir(parents=True)
    image = output_column(None, "image", Layout.BINARY, "uint8")
    for number in range(FILES):
        pixels = draw_digits(ROWS, seed=1, start=number * ROWS)[0].reshape(ROWS, 784)
        table = pa.table({"id": range(number * ROWS, (number + 1) * ROWS), "image": encode(pixels, None, image)})
        pq.write_table(table, source / f"{number}.parquet")
    save_bundle(folder / "model", models.build("seed"), BundleCard("seed"))
    return source, folder / "model"


def command(source: Path, model: Path, out: Path) -> list[str]:
    infer = [sys.executable, "-m", "denoise_batch.cli", "infer", str(source), str(out), "--model", str(model)]
    return [*infer, "--single-file", "--workers", "1"]


def phase_of(out: Path) -> str:
    """What a run is doing, by what stands in its work folder."""
    folder = work_folder(out)
    if out.exists():
        return "shown"
    if not folder.is_dir():
        return "loading"
    if not (folder / "identity.json").exists():
        return "planning"
    try:
        staged = [entry.name for entry in (folder / "staging").iterdir()]
        receipts = sum(path.read_bytes().count(b'["receipt",') for path in (folder / "ledger").glob("*.jsonl"))
    except OSError:
        return "ray"
    if receipts == FILES:
        return "publishing"
    if any(name.startswith("unit-") for name in staged):
        return "denoising"
    return "workers" if staged else "ray"


def start(arguments: list[str], mark: str, errors: IO[str]) -> subprocess.Popen[str]:
    environment = os.environ | {_MARK: mark}
    return subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        env=environment,
        start_new_session=True,
        # A shell lets what it runs in the background ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def processes(mark: str) -> list[str]:
    """The living processes of a run: `PID NAME`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if f"{_MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    name = (entry / "cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
                    found.append(f"{entry.name} {Path(name).name if name.startswith('/') else name}")
    return found


def timeline(source: Path, model: Path, out: Path) -> list[tuple[str, float]]:
    """An undisturbed run's phases, each with its seconds."""
    begun, mark = time.monotonic(), uuid.uuid4().hex
    starts: dict[str, float] = {}
    with tempfile.TemporaryFile("w+") as errors:
        process = start(command(source, model, out), mark, errors)
        while process.poll() is None:
            starts.setdefault(phase_of(out), time.monotonic() - begun)
            time.sleep(0.01)
        starts["end"] = time.monotonic() - begun
        process.communicate()
        errors.seek(0)
        if process.returncode:
            raise SystemExit(f"the undisturbed run failed: {errors.read()}")
    starts.pop("shown", None)
    found = [(name, at) for name, at in starts.items() if name in PHASES]
    ends = [at for _, at in found[1:]] + [starts["end"]]
    return [(name, end - at) for (name, at), end in zip(found, ends, strict=True)]


def moment(phases: list[tuple[str, float]], share: float) -> tuple[str, float]:
    """The phase at a share of the whole time, and the seconds into it."""
    at = share * sum(seconds for _, seconds in phases)
    for name, seconds in phases:
        if at < seconds:
            return name, at
        at -= seconds
    return phases[-1]


def stop(arguments: list[str], out: Path, kind: str, phase: str, after: float) -> Trial:
    """Starts a run, stops it in `phase`, `after` seconds into it, and looks at how it ends."""
    trial, mark = Trial(kind, phase, after), uuid.uuid4().hex
    with tempfile.TemporaryFile("w+") as errors:
        process = start(arguments, mark, errors)
        while process.poll() is None and _order(phase_of(out)) < _order(phase):
            time.sleep(0.005)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=after)
        trial.seen = phase_of(out)
        if process.poll() is not None:
            trial.missed = process.returncode == 0
            if not trial.missed:
                trial.faults.append(f"it ended by itself first, with exit code {process.returncode}")
        begun = time.monotonic()
        number = {"TERM": signal.SIGTERM, "TERM2": signal.SIGTERM, "HUP": signal.SIGHUP}.get(kind, signal.SIGINT)
        _send(process, number, group=kind == "GROUP")
        if kind.endswith("2"):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.3)
            _send(process, number, group=False)
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            trial.faults.append("it did not end within 60 s")
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        trial.seconds, trial.code = time.monotonic() - begun, process.returncode
        while (left := processes(mark)) and time.monotonic() - begun < trial.seconds + LEFT_S:
            time.sleep(0.2)
        trial.left = left
        for entry in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(entry.split()[0]), signal.SIGKILL)
        errors.seek(0)
        trial.faults += _faults(trial, errors.read(), out)
    return trial


def _order(phase: str) -> int:
    return PHASES.index(phase) if phase in PHASES else len(PHASES)


def _send(process: subprocess.Popen[str], number: int, *, group: bool) -> None:
    with contextlib.suppress(ProcessLookupError):
        if group:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)


def _faults(trial: Trial, errors: str, out: Path) -> list[str]:
    faults = []
    # Before our handlers stand, the system ends the process by the signal itself: what a shell calls 130 and 143 too.
    codes = {"TERM": {143, -15}, "HUP": {129, -1}}.get(trial.kind.rstrip("2"), {130, -2})
    if trial.code not in codes and not (trial.code == 0 and out.exists()):
        faults.append(f"exit code {trial.code}: {errors[-2000:]}")
    if trial.seconds > LIMIT_S:
        faults.append(f"it took {trial.seconds:.1f} s")
    if "Traceback" in errors:
        faults.append(f"a traceback: {errors[-3000:]}")
    if trial.code > 0:
        for word in ("error: ", "hint: "):
            if sum(line.startswith(word) for line in errors.splitlines()) != 1:
                faults.append(f"not one {word!r} line: {errors[-2000:]}")
        if "go on with: denoise-batch infer" not in errors:
            faults.append("the command that goes on is not printed")
    if trial.left:
        faults.append(f"processes left: {', '.join(trial.left)}")
    return faults


def go_on(arguments: list[str], out: Path, expected: bytes) -> list[str]:
    """Runs the same command to its end; what is wrong with what it gives."""
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    if done.returncode and not (out.exists() and "exists" in done.stderr):
        return [f"the next run failed: {done.stderr[-2000:]}"]
    faults = manifest.verify(out)
    if out.read_bytes() != expected:
        faults.append("the next run's output is not the undisturbed run's")
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description="Stops infer by signals at random moments of its life.")
    parser.add_argument("--moments", type=int, default=20, metavar="N", help="runs that are stopped")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="the first of them, of a sweep in parts")
    parser.add_argument("--last", type=int, metavar="N", help="the last of them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS), help="signals, in turn")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="a new folder to work in and to keep")
    options = parser.parse_args()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="signals-"))
    source, model = write_input(folder)
    whole = folder / "undisturbed.parquet"
    phases = timeline(source, model, whole)
    expected = whole.read_bytes()
    print("undisturbed: " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in phases), flush=True)
    draw = random.Random(options.seed)
    kinds = options.kinds.split(",")
    # One moment in each of as many equal parts of the time, in random order.
    shares = [(part + draw.random()) / options.moments for part in range(options.moments)]
    draw.shuffle(shares)
    good = 0
    chosen = range(options.first, (options.last if options.last is not None else options.moments - 1) + 1)
    print(f"{'':>3} {'moment':>7} {'phase':<11} {'signal':<6} {'exit after':>10} {'code':>5} {'left':>5}  faults")
    for number in chosen:
        out = folder / f"{number:03d}.parquet"
        arguments = command(source, model, out)
        kind = kinds[number % len(kinds)]
        phase, after = moment(phases, shares[number])
        while (trial := stop(arguments, out, kind, phase, after)).missed:  # faster than the undisturbed run: once more
            out, after = out.with_stem(f"{out.stem}-again"), after * 0.7
            arguments = command(source, model, out)
        trial.faults += go_on(arguments, out, expected)
        good += not trial.faults
        print(
            f"{number:>3} {shares[number]:>7.3f} {trial.phase:<11} {kind:<6} {trial.seconds:>8.1f} s {trial.code:>5} "
            f"{len(trial.left):>5}  {'; '.join(trial.faults) or 'none'}",
            flush=True,
        )
    print(f"{good} of {len(chosen)} as wanted")
    if not options.keep:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(good < len(chosen))


if __name__ == "__main__":
    main()
