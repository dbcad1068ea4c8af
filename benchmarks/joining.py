"""What joining a run's parts into one file takes: row groups copied, as `infer` does, beside rewriting all rows.

    python benchmarks/joining.py [--rows 60000] [--unit 16384] [--layouts list binary]

Parts of drawn digits with the seed's noise and of the clean digits, in the layouts `list` (float32) and `binary`
(uint8), zstd. Both ways take turns, in this process; `copy` is a copy of the same bytes by the kernel, and a sync.
Medians of seconds.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pipelines import column_of

from denoise_batch.digits import draw_digits
from denoise_batch.images import Polarity, output_column
from denoise_batch.inference.merging import join
from denoise_batch.inference.plan import make_plan
from denoise_batch.noise import NoiseRecipe
from denoise_batch.parquet.output_file import OutputFile
from denoise_batch.parquet.row_groups import Part, join_row_groups
from denoise_batch.storage import publishing
from denoise_batch.storage.listing import list_inputs

if TYPE_CHECKING:
    from collections.abc import Callable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--unit", type=int, default=16_384, help="rows of a part")
    parser.add_argument("--layouts", nargs="*", default=["list", "binary"], choices=("list", "binary"))
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(f"{time.strftime('%Y-%m-%d')}, {platform.processor() or platform.machine()}; {options.rows:,} rows\n")
    print("| layout | MB | rewritten, s | row groups copied, s | ratio | copy, s |\n|---|---|---|---|---|---|")
    clean = torch.from_numpy(draw_digits(options.unit, seed=1)[0]).float() / 255
    noisy = NoiseRecipe().apply(clean, torch.Generator().manual_seed(1))[0]
    for layout in options.layouts:
        with tempfile.TemporaryDirectory(dir=".") as folder:
            columns = [_column(images.reshape(-1, 784).numpy(), layout) for images in (noisy, clean)]
            print(_line(layout, *columns, Path(folder), options), flush=True)


def _column(pixels: Any, layout: str) -> pa.Array:
    return column_of(pixels if layout == "list" else np.rint(255 * pixels.clip(0, 1)).astype(np.uint8), layout)


def _line(layout: str, noisy: pa.Array, denoised: pa.Array, folder: Path, options: argparse.Namespace) -> str:
    table = pa.table({"id": pa.array(range(len(noisy))), "image": noisy})
    pq.write_table(table.slice(0, 64), folder / "first.parquet")
    column = make_plan(list_inputs([str(folder / "first.parquet")]).files, None, Polarity.LIGHT_ON_DARK).column
    output = output_column(column, "denoised")
    table = table.append_column("denoised", denoised)
    parts = []
    for start in range(0, options.rows, options.unit):
        path = folder / f"{start}.parquet"
        with OutputFile(path, table.schema, (column, output), compression="zstd") as file:
            for batch in table.slice(0, options.rows - start).to_batches(2048):
                file.write(batch)
            parts.append(Part(path, file.finish().digest))
    target = folder / "joined.parquet"
    ways: dict[str, Callable[[], Any]] = {
        "rewritten": lambda: join(parts, target, column, output, "zstd"),
        "copied": lambda: join_row_groups(parts, target),
        "copy": lambda: _copy(target, folder / "copy"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.repeats):
        for name, way in ways.items():
            publishing.remove(folder / "copy" if name == "copy" else target)
            os.sync()
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    rewritten, copied, copy = (statistics.median(seconds[name]) for name in ways)
    size = target.stat().st_size / 1e6
    return f"| `{layout}` | {size:.0f} | {rewritten:.2f} | {copied:.2f} | {rewritten / copied:.1f} | {copy:.2f} |"


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    publishing.sync(target)


if __name__ == "__main__":
    main()
