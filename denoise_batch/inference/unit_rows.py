"""Reads one unit's rows, and no more of them at a time than memory is planned for; by a thread that runs ahead."""

from __future__ import annotations

import queue
import threading
import time
from typing import TYPE_CHECKING, Any, TypeVar

from denoise_batch.errors import DenoiseBatchError
from denoise_batch.forward import CPU_CHUNK, Chunk
from denoise_batch.inference.pages import check_pages
from denoise_batch.input_file import check_int96, read_batches

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pyarrow as pa
    import pyarrow.parquet as pq

    from denoise_batch.inference.plan import Unit

_Item = TypeVar("_Item")


def chunk_rows(row_bytes: int, chunk: Chunk = CPU_CHUNK) -> int:
    """Rows worked on at a time, so that one chunk stays within a fixed number of bytes."""
    return max(1, min(chunk.most_rows, chunk.most_bytes // (row_bytes + chunk.pixel_bytes)))


def read_unit(
    source: pq.ParquetFile, unit: Unit, rows: int, path: str = "", chunk: Chunk = CPU_CHUNK
) -> Iterator[pa.RecordBatch]:
    """A unit's rows in order, in batches of at most `rows`.

    Args:
        path: of the file, whose page headers are checked before anything is decompressed.
        chunk: fewer rows are read where dictionary entries would make a batch larger.

    Raises:
        DenoiseBatchError: the row groups hold fewer or more rows than the footer claims, or a page is too large.
    """
    groups = list(range(unit.first_group, unit.last_group + 1))
    if path:
        rows = min(rows, chunk_rows(check_pages(path, source.metadata, groups), chunk))
        check_int96(path, source, groups)
    skip, left = unit.skip, unit.rows
    whole = unit.skip == 0 and unit.rows == sum(source.metadata.row_group(group).num_rows for group in groups)
    for batch in read_batches(source, rows, groups):
        dropped = min(skip, batch.num_rows)
        skip -= dropped
        taken = batch.slice(dropped, left)
        extra = batch.num_rows - dropped - taken.num_rows
        left -= taken.num_rows
        if extra and whole:
            raise DenoiseBatchError("row groups hold more rows than the footer claims", hint="")
        if taken.num_rows:
            yield taken
        if left == 0 and not whole:
            break
    if left:
        raise DenoiseBatchError(f"row groups hold {left} rows fewer than the footer claims", hint="")


def prefetched(items: Iterator[_Item], clock: dict[str, float], stage: str, depth: int = 2) -> Iterator[_Item]:
    """The same items, made by a thread that runs ahead by at most `depth`; its working time goes to clock[stage]."""
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    stop = threading.Event()

    def put(kind: str, value: Any) -> bool:
        while not stop.is_set():
            try:
                ready.put((kind, value), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            while True:
                begun = time.monotonic()
                item = next(items, None)
                clock[stage] += time.monotonic() - begun
                if item is None:
                    put("end", None)
                    return
                if not put("item", item):
                    return
        except BaseException as error:
            put("error", error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stop.set()
        thread.join()
