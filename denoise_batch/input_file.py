"""Parquet files that are read: in a stream, wherever they lie, page checksums verified where there are any.

with open_parquet("s3://bucket/a.parquet") as file:
    for batch in read_batches(file, 4096):
        ...
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from denoise_batch import storage

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


def open_parquet(path: str, buffer: int = 8 << 20) -> pq.ParquetFile:
    """Opens a local path or URI.

    Args:
        buffer: bytes read at a time of each column; a row group may be larger than the memory.
    """
    filesystem, inner = storage.locate(path)
    return pq.ParquetFile(
        # A local path is opened by pyarrow itself: a file object would be read through a lock.
        inner,
        filesystem=filesystem if storage.is_uri(path) else None,
        pre_buffer=False,
        buffer_size=buffer,
        page_checksum_verification=True,
        coerce_int96_timestamp_unit="us",  # nanoseconds cannot hold Spark's year 9999: it would wrap
    )


def read_batches(file: pq.ParquetFile, rows: int, groups: Sequence[int] | None = None) -> Iterator[pa.RecordBatch]:
    """Record batches of at most `rows` rows, of all row groups or of these; none spans two row groups where that fails.

    pyarrow joins what two row groups have of a nested column, but not if there are dictionaries in it.
    """
    wanted = list(range(file.num_row_groups) if groups is None else groups)
    alone = any(has_dictionary(field.type) for field in file.schema_arrow if pa.types.is_nested(field.type))
    for span in ([group] for group in wanted) if alone else (wanted,):
        yield from file.iter_batches(batch_size=rows, row_groups=span)


def has_dictionary(type_: pa.DataType) -> bool:
    """Whether the type is a dictionary, or holds one at any depth."""
    if pa.types.is_nested(type_):
        return any(has_dictionary(type_.field(index).type) for index in range(type_.num_fields))
    return bool(pa.types.is_dictionary(type_))
