"""What a compression of the output costs and saves: processor time and bytes a row, beside a row's forward pass.

    python benchmarks/compressions.py [--rows 65536]

The rows are drawn digits with the seed's noise, clipped to 8 bits, and what the default model makes of them, in the
layout `binary`, written and read by one thread, as one row group with page checksums, in memory; the best of a few.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import time
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pipelines import noisy_digits

from denoise_batch import bundle
from denoise_batch.denoiser import Denoiser

if TYPE_CHECKING:
    from collections.abc import Callable

CODECS: dict[str, tuple[str, int | None]] = {
    "none": ("none", None),
    "lz4": ("lz4", None),
    "snappy": ("snappy", None),
    "zstd, level 1 (default)": ("zstd", 1),
    "zstd, level -5": ("zstd", -5),
    "zstd, level 3": ("zstd", 3),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=65_536)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    pa.set_cpu_count(1)
    noisy = noisy_digits(options.rows, 0)[0] / np.float32(255)
    denoiser = Denoiser(bundle.read_bundle(bundle.SHIPPED_FOLDER), device="cpu", threads=1)
    denoiser(noisy[:512])
    begun = time.process_time()
    denoised = denoiser(noisy)
    forward = 1e6 * (time.process_time() - begun) / options.rows
    table = pa.table({"image": _binary(noisy), "denoised": _binary(denoised)})
    print(f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} × {platform.processor() or platform.machine()}; ", end="")
    print(f"{options.rows:,} rows; a row's forward pass takes {forward:.0f} µs\n")
    print("| | write, µs a row | read, µs a row | bytes a row |")
    print("|---|---|---|---|")
    for name, (codec, level) in CODECS.items():
        file = _written(table, codec, level)
        write = _best(lambda codec=codec, level=level: _written(table, codec, level), options.repeats)
        read = _best(lambda file=file: pq.read_table(pa.BufferReader(file), use_threads=False), options.repeats)
        bytes_ = len(file) / options.rows
        print(f"| {name} | {write / options.rows:.1f} | {read / options.rows:.1f} | {bytes_:,.0f} |", flush=True)


def _binary(pixels: np.ndarray) -> pa.Array:
    rounded = np.rint(pixels * 255).astype(np.uint8)
    return pa.Array.from_buffers(pa.binary(784), len(rounded), [None, pa.py_buffer(rounded)])


def _written(table: pa.Table, codec: str, level: int | None) -> bytes:
    file = io.BytesIO()
    options = {"compression": codec, "compression_level": level, "use_dictionary": False, "write_page_checksum": True}
    pq.write_table(table, file, row_group_size=len(table), **options)
    return file.getvalue()


def _best(work: Callable[[], object], repeats: int) -> float:
    """Microseconds of processor time."""
    took = []
    for _ in range(repeats):
        begun = time.process_time()
        work()
        took.append(time.process_time() - begun)
    return 1e6 * min(took)


if __name__ == "__main__":
    main()
