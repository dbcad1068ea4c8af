"""Planning and resuming very large inputs: many files, many row groups, many finished units.

    python benchmarks/planning.py                                   # 10,000 files of 100 row groups each
    python benchmarks/planning.py --files 1000 --groups 1000

Times what a driver does before its first unit is given out: listing, reading footers, cutting units, writing the plan
down; then, with nine tenths of the units finished (by receipts that are made up), the same command again. Peak resident
sets are of the driver, and of it with its footer readers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from driver_alone import driver_alone

ROWS = 4
"""Of a row group."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--groups", type=int, default=100, help="row groups of each file")
    parser.add_argument("--session", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.session:
        source, out, units = arguments.session
        _session(source, out, int(units))
        return
    files, groups = arguments.files, arguments.groups
    print(f"{time.strftime('%Y-%m-%d')}: {os.cpu_count()} × {platform.processor() or platform.machine()}")
    print(f"{files:,} files of {groups:,} row groups: {files * groups:,} row groups, a unit a file\n")
    print("| session | to the first unit, s | driver, MB | with footer readers, MB |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "in"), Path(folder, "out")
        write_files(source, files, groups)
        done = files * 9 // 10
        for name, units in (("planning", done), (f"going on, {done:,} units done", 0)):
            found = _measure(source, out, units)
            print(f"| {name} | {found['seconds']:.1f} | {found['driver']:.0f} | {found['all']:.0f} |", flush=True)


def write_files(folder: Path, files: int, groups: int) -> None:
    """One file under many names: links, since a million row groups' footers would fill a small disk."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from denoise_batch.digits import draw_digits

    images = draw_digits(ROWS, seed=0)[0].reshape(ROWS, -1)
    image = pa.array([row.tobytes() for row in images], pa.binary(784))
    table = pa.table({"image": image, "id": pa.array(np.arange(ROWS)), "label": pa.array(["seven"] * ROWS)})
    folder.mkdir()
    first = folder / "0000000.parquet"
    with pq.ParquetWriter(first, table.schema, compression="snappy") as writer:
        for _ in range(groups):
            writer.write_table(table)
    for number in range(1, files):
        (folder / f"{number:07d}.parquet").hardlink_to(first)


def _measure(source: Path, out: Path, units: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--session", str(source), str(out), str(units)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    peaks, done = {"driver": 0.0, "all": 0.0}, threading.Event()
    watcher = threading.Thread(target=_watch, args=(process.pid, peaks, done))
    watcher.start()
    answer, _ = process.communicate()
    done.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"the session failed with exit code {process.returncode}")
    return {**json.loads(answer), **peaks}


def _watch(driver: int, peaks: dict[str, float], done: threading.Event) -> None:
    while not done.wait(0.1):
        sizes = {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and os.getsid(int(entry.name)) == driver:
                    pages = int((entry / "statm").read_text().split()[1])
                    sizes[int(entry.name)] = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
        peaks["driver"] = max(peaks["driver"], sizes.get(driver, 0.0))
        peaks["all"] = max(peaks["all"], sum(sizes.values()))


def _session(source: str, out: str, units: int) -> None:
    """A driver that finishes `units` units and is interrupted; prints when the first was asked for."""
    from denoise_batch.inference.infer import infer
    from denoise_batch.inference.request import InferSettings

    begun = time.monotonic()
    first: list[float] = []
    with driver_alone(units, lambda: first.append(time.monotonic() - begun)):
        infer(InferSettings((source,), out))
    print(json.dumps({"seconds": first[0]}))


if __name__ == "__main__":
    main()
