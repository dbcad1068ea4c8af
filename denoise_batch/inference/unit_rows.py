"""Reads one unit's rows, and no more of them at a time than memory is planned for; by a thread that runs ahead."""

from __future__ import annotations

import queue
import threading
import time
from typing import TYPE_CHECKING, Any, TypeVar

from denoise_batch.errors import DenoiseBatchError
from denoise_batch.forward import MOST_ROWS
from denoise_batch.images import PIXELS
from denoise_batch.parquet.input_file import check_int96, read_batches
from denoise_batch.parquet.pages import check_pages

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pyarrow as pa
    import pyarrow.parquet as pq

    from denoise_batch.inference.plan import Unit

_Item = TypeVar("_Item")


_CHUNK_BYTES = 16 << 20
"""Of rows worked on at a time: of decoded Parquet and the model's pixels."""
_PIXEL_BYTES = 4 * PIXELS  # float32 at most
_WHOLE_PASSES = 1024  # rows; a model takes the rest in a smaller pass, which costs more a row


def chunk_rows(row_bytes: int) -> int:
    """Rows worked on at a time, so that one chunk stays within a fixed number of bytes."""
    rows = max(1, min(MOST_ROWS, _CHUNK_BYTES // (row_bytes + _PIXEL_BYTES)))
    return rows - rows % _WHOLE_PASSES if rows > _WHOLE_PASSES else rows


def read_unit(source: pq.ParquetFile, unit: Unit, rows: int, path: str = "") -> Iterator[pa.RecordBatch]:
    """A unit's rows in order, in batches of at most `rows`.

    Args:
        rows: fewer are read where dictionary entries would make a batch larger.
        path: of the file, whose page headers are checked before anything is decompressed.

    Raises:
        DenoiseBatchError: the row groups hold fewer or more rows than the footer claims, or a page is too large.
    """
    groups = list(range(unit.first_group, unit.last_group + 1))
    if path:
        rows = min(rows, chunk_rows(check_pages(path, source.metadata, groups)))
        check_int96(path, source, groups, unit.skip, unit.rows)
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
