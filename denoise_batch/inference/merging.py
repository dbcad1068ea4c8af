"""Joins the parts of a run into the one file that was asked for.

Row groups are copied as they are. Small ones, of small input files, are rewritten into larger ones first, in a process
of its own: so its memory goes back to the system, and a crash is an error with a name.
"""

from __future__ import annotations

import contextlib
import itertools
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
from denoise_batch.inference.row_groups import Part, join_row_groups
from denoise_batch.inference.run_folder import DATA
from denoise_batch.input_file import has_nested_dictionary, read_batches
from denoise_batch.output_file import OutputFile, Written

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from denoise_batch.images.layouts import ImageColumn
    from denoise_batch.inference.run_folder import RunFolder

_MERGE_ROWS = 4096
_SMALL_ROWS, _SMALL_BYTES = 16_384, 4 << 20
"""A part with less than both is small: a file of many such row groups would be slow to read."""


def merge(run: RunFolder, output: ImageColumn, compression: str) -> Written:
    """Joins all units' files to `run.built / DATA`.

    Raises:
        JobFailed: the process that rewrites small parts died.
        DenoiseBatchError: a part is not what its worker wrote, or the joined file, read back, is not what was written.
    """
    receipts = (run.ledger.receipts[unit] for unit in range(len(run.plan)))
    parts = [Part(run.staging / receipt.file, receipt.digest) for receipt in receipts]
    run.built.mkdir(exist_ok=True)
    target = run.built / DATA
    publishing.remove(target)
    pieces: list[list[Part]] = list(_pieces(parts))
    if len(pieces) == 1:
        return _rewrite(run, [(pieces[0], target)], output, compression)[0]
    several = [(piece, target.with_name(f"{DATA}.{number}")) for number, piece in enumerate(pieces) if len(piece) > 1]
    rewritten = iter(
        Part(path, written.digest)
        for (_, path), written in zip(several, _rewrite(run, several, output, compression), strict=True)
    )
    written = join_row_groups([next(rewritten) if len(piece) > 1 else piece[0] for piece in pieces], target)
    for _, path in several:
        publishing.remove(path)
    return written


def _pieces(parts: list[Part]) -> Iterator[list[Part]]:
    """In their order: a part that is copied as it is, or several that are rewritten."""
    with pq.ParquetFile(parts[0].path) as first:
        # pyarrow reads no nested column that has several dictionaries in one file.
        together = has_nested_dictionary(first.schema_arrow)
    if together or any(part.schema != parts[0].schema for part in parts):
        yield parts
        return
    for small, group in itertools.groupby(parts, lambda part: part.rows < _SMALL_ROWS and part.body < _SMALL_BYTES):
        if small:
            yield list(group)
        else:
            yield from ([part] for part in group)


def _rewrite(
    run: RunFolder, jobs: list[tuple[list[Part], Path]], output: ImageColumn, compression: str
) -> list[Written]:
    """Joins the parts of each job to a file of its own."""
    if not jobs:
        return []
    context = multiprocessing.get_context("spawn")
    with _safe_path(), ProcessPoolExecutor(1, mp_context=context, initializer=end_with_parent) as pool:
        try:
            return [
                pool.submit(join, [part.path for part in parts], target, run.plan.column, output, compression).result()
                for parts, target in jobs
            ]
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
