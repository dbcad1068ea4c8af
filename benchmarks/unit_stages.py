"""What a unit costs beside its forward pass, by stage: how many rows a second a machine's cores could give at most.

    python benchmarks/unit_stages.py [--rows 131072] [--layout binary] [--compression none zstd] [--chunk 4096 16384]

A unit of drawn digits with the seed's noise goes through `denoise_unit` in one process, with a model that
costs nothing: it gives back what a model made of these very digits before. Prints µs a row: processor time in all, wall
time in all and by stage (stages overlap), the best of a few. One core's rows/s are those of processor time, and so many
cores give so many times that, at most.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pipelines import column_of, noisy_digits

from denoise_batch import bundle
from denoise_batch.denoiser import Denoiser
from denoise_batch.extra_columns import Denoised
from denoise_batch.images import Polarity, output_column
from denoise_batch.inference import denoise_unit as module
from denoise_batch.inference.denoise_unit import Assignment, OnBadRow, UnitOptions, denoise_unit
from denoise_batch.inference.ledger import Receipt
from denoise_batch.inference.plan import Unit, make_plan
from denoise_batch.storage.listing import list_inputs

DISTINCT = 16_384  # digits that are drawn; longer units repeat them
CORES = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=131_072)
    parser.add_argument("--layout", default="binary", choices=("binary", "list", "encoded"))
    parser.add_argument("--compression", nargs="*", default=["none", "zstd"], choices=("none", "snappy", "lz4", "zstd"))
    parser.add_argument(
        "--chunk", type=int, nargs="*", default=[None], help="rows at a time; default: what is built in"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="for the files; best a RAM disk")
    options = parser.parse_args()
    pa.set_cpu_count(1)
    torch.set_num_threads(1)
    noisy, denoised = digits()
    machine = platform.processor() or platform.machine()
    print(f"{time.strftime('%Y-%m-%d')}, {machine}; {options.rows:,} rows, {options.layout}\n")
    stages = ("read", "decode", "forward", "encode", "write", "verify")
    print(f"| compression | chunk | processor | wall | {' | '.join(stages)} | {CORES} cores, rows/s |")
    print("|---|---|---|---|" + "---|" * len(stages) + "---|")
    for compression in options.compression:
        for chunk in options.chunk:
            found = [measured(noisy, denoised, options, compression, chunk) for _ in range(options.repeats)]
            best = {name: min(times[name] for times in found) for name in found[0]}
            numbers = " | ".join(f"{best[name]:.2f}" for name in ("processor", "wall", *stages))
            print(f"| {compression} | {chunk or ''} | {numbers} | {1e6 * CORES / best['processor']:,.0f} |", flush=True)


def digits() -> tuple[np.ndarray, np.ndarray]:
    """(n, 784) uint8 noisy digits, and what the model that ships makes of them."""
    noisy = noisy_digits(DISTINCT, 0)[0]
    denoiser = Denoiser(bundle.read_bundle(bundle.SHIPPED_FOLDER), device="cpu", threads=1)
    return noisy, np.rint(denoiser(noisy / np.float32(255)) * 255).astype(np.uint8)


def measured(
    noisy: np.ndarray, denoised: np.ndarray, options: argparse.Namespace, compression: str, chunk: int | None
) -> dict[str, float]:
    """µs a row of one unit."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder, "in.parquet")
        images = column_of(noisy, options.layout)
        image = pa.concat_arrays([images] * -(-options.rows // len(images)))[: options.rows]
        table = pa.table({"label": np.arange(options.rows), "image": image})
        pq.write_table(table, path, compression=compression, use_dictionary=["label"], row_group_size=65_536)
        plan = make_plan(list_inputs([str(path)]).files, None, Polarity.LIGHT_ON_DARK, "denoised")
        output = output_column(plan.column, "denoised")
        whole = Unit(0, 0, 0, pq.read_metadata(path).num_row_groups - 1, 0, options.rows, 0)
        unit = UnitOptions(folder, plan.column, output, plan.polarity, OnBadRow.NULL, compression)
        clean, done = np.resize(denoised, (options.rows, 784)), 0

        def forward(given: np.ndarray, _: Polarity, __: str) -> Denoised:
            nonlocal done
            done += len(given)
            return Denoised(clean[done - len(given) : done].copy())

        if chunk:
            module.chunk_rows = lambda *_: chunk  # type: ignore[assignment]
        cpu, wall = time.process_time(), time.monotonic()
        receipt = denoise_unit(Assignment(whole, plan.files[0], 1, "out.parquet"), unit, forward)
        cpu, wall = time.process_time() - cpu, time.monotonic() - wall
        assert isinstance(receipt, Receipt), receipt
        return {
            name: 1e6 * s / receipt.rows_out for name, s in ({"processor": cpu, "wall": wall} | receipt.seconds).items()
        }


if __name__ == "__main__":
    main()
