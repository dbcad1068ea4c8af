"""Joins the parts of a run into the one file that was asked for, in a process of its own.

So its memory goes back to the system, and a crash is an error with a name.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from denoise_batch import publishing
from denoise_batch.errors import JobFailed
from denoise_batch.inference.run_folder import DATA
from denoise_batch.input_file import read_batches
from denoise_batch.output_file import OutputFile, Written

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from denoise_batch.images.layouts import ImageColumn
    from denoise_batch.inference.run_folder import RunFolder

_MERGE_ROWS = 4096


def merge(run: RunFolder, output: ImageColumn, compression: str) -> Written:
    """Joins all units' files to `run.built / DATA`.

    Raises:
        JobFailed: the process that did it died.
    """
    parts = [run.staging / run.ledger.receipts[unit].file for unit in range(len(run.plan))]
    run.built.mkdir(exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with _safe_path(), ProcessPoolExecutor(1, mp_context=context, initializer=end_with_parent) as pool:
        try:
            return pool.submit(join, parts, run.built / DATA, run.plan.column, output, compression).result()
        except (KeyboardInterrupt, Exception) as error:
            for child in list(pool._processes.values()):
                child.kill()  # else leaving the block waits for the whole of it
            if not isinstance(error, BrokenProcessPool):
                raise
            raise JobFailed(
                f"{run.out}: the process that joins the parts into one file died",
                hint="run the same command again, or give --directory, which needs no joining",
            ) from error


def join(parts: list[Path], target: Path, column: ImageColumn, output: ImageColumn, compression: str) -> Written:
    """Rewrites parts into one file, in their order, a row group at a time."""
    publishing.remove(target)
    with pq.ParquetFile(parts[0]) as first:
        schema = first.schema_arrow
    with OutputFile(target, schema, (column, output), compression=compression) as file:
        for part in parts:
            with pq.ParquetFile(part, pre_buffer=False, page_checksum_verification=True) as source:
                for batch in read_batches(source, _MERGE_ROWS):
                    # Files keep metadata of their own; the merged file takes the first one's.
                    file.write(pa.RecordBatch.from_arrays(batch.columns, schema=schema))
        return file.finish()


def end_with_parent() -> None:
    """Lets this process end as soon as the one that started it does; else it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()


@contextlib.contextmanager
def _safe_path() -> Iterator[None]:
    """Python processes started meanwhile import nothing that lies beside the data, in the current folder."""
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before
