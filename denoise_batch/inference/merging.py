"""Joins the parts of a run into the one file that was asked for.

Row groups are copied as they are. Small ones, of small input files, are rewritten into larger ones first, in a process
of its own: so its memory goes back to the system, and a crash is an error with a name.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import operator
import os
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from denoise_batch.errors import DenoiseBatchError, JobFailed
from denoise_batch.inference.run_folder import DATA
from denoise_batch.inference.unit_rows import chunk_rows
from denoise_batch.parquet.input_file import has_nested_dictionary, read_batches
from denoise_batch.parquet.output_file import OutputFile, Written
from denoise_batch.parquet.range_index import RangeIndex, joined_range, range_index, with_range
from denoise_batch.parquet.row_groups import Part, SchemasDifferError, join_row_groups
from denoise_batch.storage import publishing

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from denoise_batch.images.layouts import ImageColumn
    from denoise_batch.inference.run_folder import Run, RunFolder

_MERGE_ROWS = 4096
_SMALL_ROWS, _SMALL_BYTES = 16_384, 4 << 20
"""A part with less than both is small: a file of many such row groups would be slow to read."""


def merge(run: RunFolder, output: ImageColumn, compression: str) -> Written:
    """Joins all units' files to `run.built / DATA`.

    Raises:
        JobFailed: the process that rewrites small parts died.
        DenoiseBatchError: a part is not what its worker wrote, or the joined file, read back, not what was written.
    """
    receipts = [run.ledger.receipts[unit] for unit in range(len(run.plan))]
    run.built.mkdir(exist_ok=True)
    target = run.built / DATA
    parts = [Part(run.staging / receipt.file, receipt.digest) for receipt in receipts]
    small = [receipt.rows_out < _SMALL_ROWS and receipt.bytes < _SMALL_BYTES for receipt in receipts]
    schema = _joined_schema(run)
    # pyarrow reads no nested column that has several dictionaries in one file.
    nested = has_nested_dictionary(run.plan.schema)
    written = None if nested else _copied(run, parts, small, output, compression, schema)
    if written is None:
        (written,) = _rewritten(run, [(parts, target)], output, compression, schema)
    if written.rows != run.ledger.rows_out:
        raise DenoiseBatchError(
            f"receipts say {run.ledger.rows_out} rows, the joined file has {written.rows}",
            hint="nothing was published; report a bug",
        )
    return written


def first_units(run: Run) -> list[int]:
    """The first unit of each input file that has rows."""
    return sorted({run.plan.unit(unit).file: unit for unit in reversed(range(len(run.plan)))}.values())


def first_schema(run: Run, unit: int) -> pa.Schema:
    """The schema of a unit's staged file.

    Raises:
        DenoiseBatchError: it is damaged.
    """
    receipt = run.ledger.receipts[unit]
    path = run.staging / receipt.file
    try:
        return pq.read_schema(path)
    except (OSError, pa.ArrowException):
        Part(path, receipt.digest).check()
        raise


def joined_index(run: Run) -> tuple[RangeIndex | None, RangeIndex | None]:
    """Pandas' index as a range, of the units' files joined into one, and one that is lost there, if there are any."""
    files = []
    for unit in first_units(run):
        rows = run.ledger.receipts[unit].rows_out
        files.append((range_index(first_schema(run, unit), rows), run.plan.files[run.plan.unit(unit).file].rows))
    if run.ledger.rows_out == run.plan.rows and (joined := joined_range(files)) is not None:
        return joined, None
    planned = range_index(run.plan.schema, run.plan.files[0].rows)
    lost = (index for index in (planned, *(index for index, _ in files)) if index is not None and not index.is_default)
    return None, next(lost, None)


def _joined_schema(run: Run) -> pa.Schema | None:
    """The first unit's, with a range of all rows in pandas' note; None where there is no range."""
    first = first_schema(run, 0)
    if with_range(first, None, 0) is first:
        return None
    return with_range(first, joined_index(run)[0], run.ledger.rows_out)


def _copied(
    run: RunFolder,
    parts: list[Part],
    small: list[bool],
    output: ImageColumn,
    compression: str,
    schema: pa.Schema | None,
) -> Written | None:
    """Joins all units' files, small ones that stand side by side after they were rewritten; None: they do not fit."""
    target = run.built / DATA
    publishing.remove(target)
    pieces: list[list[Part]] = []
    for is_small, alike in itertools.groupby(zip(small, parts, strict=True), operator.itemgetter(0)):
        side_by_side = [part for _, part in alike]
        pieces += [side_by_side] if is_small else [[part] for part in side_by_side]
    if len(pieces) == 1:
        return None
    larger = {number: target.with_name(f"{DATA}.{number}") for number, piece in enumerate(pieces) if len(piece) > 1}
    made = _rewritten(run, [(pieces[number], path) for number, path in larger.items()], output, compression)
    for (number, path), file in zip(larger.items(), made, strict=True):
        pieces[number] = [Part(path, file.digest)]
    try:
        return join_row_groups([part for (part,) in pieces], target, schema)
    except SchemasDifferError:
        return None
    finally:
        for path in larger.values():
            publishing.remove(path)


def _rewritten(
    run: RunFolder,
    jobs: list[tuple[list[Part], Path]],
    output: ImageColumn,
    compression: str,
    schema: pa.Schema | None = None,
) -> list[Written]:
    """Joins the parts of each job to a file of its own."""
    if not jobs:
        return []
    rows = min(_MERGE_ROWS, chunk_rows(max((file.row_bytes for file in run.plan.files), default=0)))
    context = multiprocessing.get_context("spawn")
    with _safe_path(), ProcessPoolExecutor(1, mp_context=context, initializer=end_with_parent) as pool:
        try:
            return [
                pool.submit(join, parts, target, run.plan.column, output, compression, rows, schema).result()
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


def join(
    parts: list[Part],
    target: Path,
    column: ImageColumn,
    output: ImageColumn,
    compression: str,
    rows: int = _MERGE_ROWS,
    schema: pa.Schema | None = None,
) -> Written:
    """Rewrites parts into one file, in their order, a row group at a time.

    Args:
        rows: read at a time; few where rows are large.
        schema: whose metadata the new file has; None: the first one's.

    Raises:
        DenoiseBatchError: a part is not what is expected; the new file, read back, is not what was written.
    """
    publishing.remove(target)
    parts[0].check()
    if schema is None:
        with pq.ParquetFile(parts[0].path) as first:
            schema = first.schema_arrow
    with OutputFile(target, schema, (column, output), compression=compression) as file:
        for part in parts:
            part.check()
            with pq.ParquetFile(part.path, pre_buffer=False, page_checksum_verification=True) as source:
                for batch in read_batches(source, rows):
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
