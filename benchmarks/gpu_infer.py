"""Whole runs of `denoise-batch infer` on one GPU, by how many workers share it: Parquet on a RAM disk, `binary`, uint8.

    python benchmarks/gpu_infer.py                                     # 20M rows, about 16 GB in and 31 GB out
    python benchmarks/gpu_infer.py --shares 0.125 --compression none --batch-size 2048 8192
    python benchmarks/gpu_infer.py --device cpu --rows 20000 --shares 1     # does it work at all

Rows are drawn digits with the seed's noise, clipped to 8 bits: 65,536 of them, repeated; every file is a copy of the
first. Prints a table with a line a run: rows/s of the whole command, from the first unit's start to the last receipt,
and while the middle half of the files was made (all workers at work); µs a row of each stage, summed over the workers
(stages overlap within a worker); the share of the cores' and of the GPU's time in use, as it was exceeded in a fifth of
the half seconds of the run: what is near 1 binds. Outputs are deleted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import noisy_digits

if TYPE_CHECKING:
    from collections.abc import Iterator

CORES = os.cpu_count() or 1
DISTINCT, PIECE = 65_536, 4096
STAGES = ("read", "decode", "forward", "encode", "write", "verify")
LIMIT_SECONDS = 300.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--file-rows", type=int, default=524_288, help="rows of a file, in row groups of 65,536")
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[1.0, 0.25, 0.125, 0.0625], help="of a GPU, a worker"
    )
    parser.add_argument("--compression", nargs="+", default=["none", "zstd"], choices=("none", "snappy", "lz4", "zstd"))
    parser.add_argument("--batch-size", type=int, nargs="+", default=[None], help="default: what suits the device")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--model", type=Path, help="model folder; default: the one that ships")
    parser.add_argument("--quality", action="store_true", help="with the columns of `infer --quality`")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="a RAM disk")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gpu-infer-", dir=options.folder) as folder:
        needed = options.rows * 784 * (len(set(options.compression)) + 2) * 1.05
        if needed > shutil.disk_usage(folder).free:
            print(f"{options.folder} has no room for {needed / 1e9:.0f} GB", file=sys.stderr)
            return 2
        inputs, rows = {}, 0
        pixels, begun = drawn(min(DISTINCT, options.rows)), time.monotonic()
        for compression in options.compression:
            inputs[compression] = Path(folder, compression)
            rows = write_files(inputs[compression], pixels, options, compression)
        print(f"{time.strftime('%Y-%m-%d')}: {CORES} cores; {gpu()}; {rows:,} rows; ", end="")
        print(f"files written in {time.monotonic() - begun:.1f} s; µs a row by stage, over all workers\n")
        print(
            "| compression | GPU share | batch | seconds | rows/s, whole | rows/s, started | rows/s, middle | ", end=""
        )
        print(f"{' | '.join(STAGES)} | cores busy | GPU busy | GPU MB |")
        print("|---" * (7 + len(STAGES) + 3) + "|", flush=True)
        for compression in options.compression:
            for share in options.shares:
                for batch in options.batch_size:
                    line = infer(inputs[compression], Path(folder, "out"), options, compression, share, batch)
                    print(f"| {compression} | {share:g} | {batch or ''} | {line} |", flush=True)
                    shutil.rmtree(Path(folder, "out"), ignore_errors=True)
                    shutil.rmtree(Path(folder, ".out.denoise-batch"), ignore_errors=True)
    return 0


# --- the input -------------------------------------------------------------------------------------------------------


def drawn(rows: int) -> Any:
    """(n, 784) uint8, drawn by all cores."""
    import numpy as np

    with ProcessPoolExecutor(min(CORES, -(-rows // PIECE))) as pool:
        return np.concatenate(list(pool.map(piece, range(0, rows, PIECE))))[:rows]


def piece(start: int) -> Any:
    import torch

    torch.set_num_threads(1)
    return noisy_digits(PIECE, start)[0]


def write_files(folder: Path, pixels: Any, options: argparse.Namespace, compression: str) -> int:
    """Whole files, as many as hold the rows; how many rows they have."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    count = min(options.file_rows, options.rows)
    files = -(-options.rows // count)
    first = folder / "00000.parquet"
    schema = pa.schema([("label", pa.uint8()), ("image", pa.binary(784))])
    with pq.ParquetWriter(first, schema, compression=compression, use_dictionary=["label"]) as writer:
        for start in range(0, count, len(pixels)):
            part = pixels[: count - start]
            image = pa.Array.from_buffers(pa.binary(784), len(part), [None, pa.py_buffer(part)])
            label = pa.array(np.arange(len(part)) % 10, pa.uint8())
            writer.write_table(pa.table([label, image], schema=schema), row_group_size=len(part))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: shutil.copyfile(first, folder / f"{number:05}.parquet"), range(1, files)))
    return files * count


# --- a run -----------------------------------------------------------------------------------------------------------


def infer(
    source: Path, out: Path, options: argparse.Namespace, compression: str, share: float, batch: int | None
) -> str:
    """The figures of one run, as cells of the table."""
    command = [sys.executable, "-m", "denoise_batch.cli", "infer", str(source), str(out), "--directory", "--json"]
    command += ["--compression", compression, "--polarity", "light-on-dark", "--device", options.device]
    command += ["--gpus-per-worker", str(share)] if options.device == "cuda" else []
    command += ["--batch-size", str(batch)] if batch else []
    command += ["--model", str(options.model)] if options.model else []
    command += ["--quality"] if options.quality else []
    with gpu_watched() as seen, cores_watched() as busy:
        begun = time.monotonic()
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return f"not done in {LIMIT_SECONDS:.0f} s"
        seconds = time.monotonic() - begun
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        return f"exit {done.returncode}"
    report = json.loads(done.stdout)
    assert report["rows_out"] == report["rows_done"], report
    rows, started = report["rows_done"], report["denoising_seconds"]
    stages = " | ".join(f"{1e6 * report['stages'].get(stage, 0.0) / rows:.2f}" for stage in STAGES)
    rates = " | ".join(f"{rate:,.0f}" for rate in (rows / seconds, rows / max(started, 1e-3), middle_rate(out)))
    memory = max((taken for _, taken in seen), default=0.0)
    use = f"{while_at_work(busy):.2f} | {while_at_work([share for share, _ in seen]):.2f}"
    return f"{seconds:.1f} | {rates} | {stages} | {use} | {memory:,.0f}"


def while_at_work(shares: list[float]) -> float:
    """What a fifth of them exceed."""
    return sorted(shares)[4 * len(shares) // 5] if shares else 0.0


def middle_rate(out: Path) -> float:
    """Rows/s between a quarter and three quarters of the files, by when they were last written to."""
    import pyarrow.parquet as pq

    files = sorted((path.stat().st_mtime, path) for path in out.glob("*.parquet"))
    low, high = len(files) // 4, 3 * len(files) // 4
    rows = sum(pq.read_metadata(path).num_rows for _, path in files[low + 1 : high + 1])
    seconds = files[min(high, len(files) - 1)][0] - files[low][0]
    return rows / seconds if seconds > 0 else 0.0


def core_seconds() -> float:
    """Seconds of all cores' work since the machine started: user, nice, system."""
    fields = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()
    return sum(int(field) for field in fields[1:4]) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def cores_watched() -> Iterator[list[float]]:
    """A list that grows by the cores' share of time in use, twice a second."""
    shares: list[float] = []
    stop = threading.Event()

    def watch() -> None:
        busy, since = core_seconds(), time.monotonic()
        while not stop.wait(0.5):
            now = core_seconds(), time.monotonic()
            shares.append((now[0] - busy) / (now[1] - since) / CORES)
            busy, since = now

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield shares
    finally:
        stop.set()
        thread.join()


# --- the GPU ---------------------------------------------------------------------------------------------------------


def gpu() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "no GPU"


@contextlib.contextmanager
def gpu_watched() -> Iterator[list[tuple[float, float]]]:
    """A list that, once left, has what nvidia-smi saw twice a second: share of the time in use, MB of memory taken."""
    seen: list[tuple[float, float]] = []
    command = ["nvidia-smi", "--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits", "-lms", "500"]
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    except OSError:
        yield seen
        return
    try:
        yield seen
    finally:
        process.terminate()
        lines = process.communicate()[0].splitlines()
        for line in lines:
            with contextlib.suppress(ValueError):
                use, memory = line.split(",")
                seen.append((float(use) / 100, float(memory)))


if __name__ == "__main__":
    sys.exit(main())
