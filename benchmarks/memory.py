"""Memory of `infer`'s driver and workers: it must not grow with the input, nor with its row groups or units.

    python benchmarks/memory.py                     # 100k, 1M, 4M rows; 4M rows in one row group; 100,000 units
    python benchmarks/memory.py --rows 100000 1000000 --units 0

Each run is `denoise-batch infer` as a user would start it, with one worker. Its processes' peak resident set (VmHWM) is
read from /proc until it ends. The last case is the driver alone with synthetic receipts, because 100,000 real units
take longer than anyone waits; a real run of 2,000 units stands beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from driver_alone import driver_alone

DISTINCT = 20_000  # digits that are drawn; longer inputs repeat them
ROW_GROUP = 65_536


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[100_000, 1_000_000, 4_000_000])
    parser.add_argument("--one-group", type=int, default=4_000_000, help="rows of the file with one row group; 0: none")
    parser.add_argument("--units", type=int, default=100_000, help="units of the driver's case; 0: none")
    parser.add_argument("--model", type=Path, default=Path("denoise_batch/pretrained/seed"))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--driver-case", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.driver_case:
        _many_units(arguments.driver_case)
        return
    print(
        f"{time.strftime('%Y-%m-%d')}: {os.cpu_count()} × {platform.processor() or platform.machine()}; model "
        f"{arguments.model}; {arguments.workers} worker(s); peak resident set\n"
    )
    print("| input | driver, MB | largest worker, MB | seconds |")
    print("|---|---|---|---|")
    cases = [(rows, ROW_GROUP) for rows in arguments.rows]
    if arguments.one_group:
        cases.append((arguments.one_group, arguments.one_group))
    peaks = []
    for rows, group in cases:
        with tempfile.TemporaryDirectory() as folder:
            write_digits(Path(folder, "in"), rows, group)
            name = f"{rows:,} rows" + (", one row group" if group == rows else f", row groups of {group:,}")
            peaks.append(_infer(name, Path(folder), arguments.model, arguments.workers))
    if arguments.units:
        with tempfile.TemporaryDirectory() as folder:
            write_tiny_files(Path(folder, "in"), 2000)
            _infer("2,000 files of 4 rows, a unit each", Path(folder), arguments.model, arguments.workers)
        command = [sys.executable, __file__, "--driver-case", str(arguments.units)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"| {arguments.units:,} units, receipts alone | {found['peak']:.0f} | – | {found['seconds']:.0f} |")
    if len(peaks) > 1:
        for place, who in enumerate(("driver", "worker")):
            values = [peak[place] for peak in peaks]
            print(f"\n{who}: {min(values):.0f} to {max(values):.0f} MB, {max(values) / min(values) - 1:.1%} apart")


def write_digits(folder: Path, rows: int, group: int) -> None:
    """Drawn digits in the `binary` layout: a file for each 8 row groups, at most."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from denoise_batch.digits import draw_digits

    images, labels = draw_digits(min(rows, DISTINCT), seed=0)
    pixels = pa.array(list(images.reshape(len(images), -1).view("V784").ravel().tolist()), pa.binary(784))
    labels = pa.array(labels)
    folder.mkdir()
    start = 0
    while start < rows:
        stop = min(rows, start + max(group, 8 * ROW_GROUP))
        with pq.ParquetWriter(
            folder / f"{start:010d}.parquet",
            pa.schema({"image": pixels.type, "label": labels.type}),
            compression="snappy",
            use_dictionary=["label"],
        ) as writer:
            for low in range(start, stop, group):
                places = np.arange(low, min(low + group, stop)) % len(labels)
                table = pa.table({"image": pixels.take(pa.array(places)), "label": labels.take(pa.array(places))})
                writer.write_table(table, row_group_size=group)
        start = stop


def write_tiny_files(folder: Path, files: int) -> None:
    """Files of four digits: each is a unit."""
    write_digits(folder, 4, 4)
    first = next(folder.iterdir())
    for number in range(1, files):
        (folder / f"{number:010d}.parquet").write_bytes(first.read_bytes())


def _infer(name: str, folder: Path, model: Path, workers: int) -> tuple[float, float]:
    command = [sys.executable, "-m", "denoise_batch.cli", "infer", str(folder / "in"), str(folder / "out")]
    command += ["--model", str(model), "--workers", str(workers), "--json"]
    begun = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
    peaks: dict[int, float] = {}
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(process.pid, peaks, done))
    watcher.start()
    process.communicate()
    done.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{name}: infer failed with exit code {process.returncode}")
    worker = max((peak for pid, peak in peaks.items() if pid != process.pid), default=0.0)
    print(f"| {name} | {peaks[process.pid]:.0f} | {worker:.0f} | {time.monotonic() - begun:.0f} |", flush=True)
    return peaks[process.pid], worker


def _watch(driver: int, peaks: dict[int, float], done: threading.Event) -> None:
    """Keeps the newest VmHWM of the driver and of its session's actors."""
    while not done.wait(0.3):
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                pid = int(entry.name)
                actor = (entry / "cmdline").read_bytes().startswith(b"ray::MapWorker")
                if pid == driver or (actor and os.getsid(pid) == driver):
                    peaks[pid] = max(peaks.get(pid, 0.0), _peak(pid))  # of one that has just ended it is 0
            except OSError:
                continue  # it has ended meanwhile


def _peak(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return 0.0


def _many_units(units: int) -> None:
    """Runs the driver over a plan of many units whose receipts are made up, and prints its peak."""
    from unittest import mock

    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from denoise_batch.images import Polarity
    from denoise_batch.inference import plan as planning
    from denoise_batch.inference.infer import infer
    from denoise_batch.inference.request import InferSettings, OutputShape

    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        image = pa.array([bytes(784)] * min(units, 10_000), pa.binary(784))
        with pq.ParquetWriter(folder / "in.parquet", pa.schema({"image": image.type})) as writer:
            for start in range(0, units, len(image)):
                writer.write_table(pa.table({"image": image[: units - start]}))

        def cut(*_: Any, **__: Any) -> dict[str, Any]:
            rows = np.arange(units)
            zero = np.zeros(units, np.int64)
            return {
                "file": zero,
                "first_group": zero,
                "last_group": zero,
                "skip": rows,
                "rows": zero + 1,
                "start": rows,
            }

        settings = InferSettings(
            (str(folder / "in.parquet"),),
            str(folder / "out"),
            polarity=Polarity.LIGHT_ON_DARK,
            shape=OutputShape.DIRECTORY,
        )
        with mock.patch.object(planning, "_cut", cut), driver_alone():
            infer(settings)
    print(json.dumps({"peak": _peak(os.getpid()), "seconds": time.monotonic() - begun}))


if __name__ == "__main__":
    main()
