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
from denoise_batch.errors import DenoiseBatchError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


_MAGIC = (b"PAR1", b"PARE")  # at both ends of a file; the latter where the footer is encrypted
_ARROW_SCHEMA = b"ARROW:schema"  # the key under which Arrow's writers keep the schema; they write it anew
_INT96_ROWS = 8192  # a footer tells lists' mean length alone: fewer rows bound what a run of longer ones takes
_INT96_BYTES = 16 << 20
_INT96_VALUE_BYTES = 80  # read in both units, with levels and 96 bits that pyarrow holds meanwhile (measured)


def open_parquet(path: str, buffer: int = 8 << 20, *, int96: str = "us") -> pq.ParquetFile:
    """Opens a local path or URI.

    Args:
        buffer: bytes read at a time of each column; a row group may be larger than the memory.
        int96: the unit that the old timestamps of 96 bits are read in. Nanoseconds, pyarrow's default, cannot hold
            Spark's year 9999: it would wrap. `check_int96` tells where microseconds are not fine enough.
    """
    filesystem, inner = storage.locate(path)
    return pq.ParquetFile(
        # A local path is opened by pyarrow itself: a file object would be read through a lock.
        inner,
        filesystem=filesystem if storage.is_uri(path) else None,
        pre_buffer=False,
        buffer_size=buffer,
        page_checksum_verification=True,
        coerce_int96_timestamp_unit=int96,
    )


def full_schema(file: pq.ParquetFile) -> pa.Schema:
    """The file's Arrow schema, with all key-value metadata of its footer.

    Where a writer left its Arrow schema in the footer (`ARROW:schema`), `file.schema_arrow` has the metadata of that
    alone: Polars' `write_parquet(metadata=…)` and `ParquetWriter.add_key_value_metadata` put theirs beside it.
    """
    schema = file.schema_arrow
    beside = {key: value for key, value in (file.metadata.metadata or {}).items() if key != _ARROW_SCHEMA}
    return schema.with_metadata(beside | (schema.metadata or {}) or None)


def fault_of_ends(path: str) -> str | None:
    """What a file's first and last bytes say against its being whole, as `it is empty (0 bytes)`; None: nothing."""
    filesystem, inner = storage.locate(path)
    with filesystem.open_input_file(inner) as file:
        size = file.size()
        first, last = file.read_at(4, 0), file.read_at(4, max(0, size - 4))
    if not size:
        return "it is empty (0 bytes)"
    begins, ends = any(magic.startswith(first) for magic in _MAGIC), last in _MAGIC
    if begins and not (ends and size >= 12):
        return f"it is cut off after {size:,} bytes: the footer at its end is missing"
    if not begins:
        return "its beginning is missing" if ends else "it is no Parquet file, whatever its name"
    return None


def read_batches(file: pq.ParquetFile, rows: int, groups: Sequence[int] | None = None) -> Iterator[pa.RecordBatch]:
    """Record batches of at most `rows` rows, of all row groups or of these; none spans two where that fails."""
    wanted = list(range(file.num_row_groups) if groups is None else groups)
    for span in ([group] for group in wanted) if has_nested_dictionary(file.schema_arrow) else (wanted,):
        yield from file.iter_batches(batch_size=rows, row_groups=span)


def check_int96(path: str, file: pq.ParquetFile, groups: Sequence[int], skip: int = 0, rows: int | None = None) -> None:
    """Looks for old timestamps of 96 bits that are finer than the microseconds they are read in.

    Args:
        skip: how many of the row groups' first rows are none of the caller's.
        rows: how many rows after these are; None: all.

    Raises:
        DenoiseBatchError: there are some, and they would be changed.
    """
    # By number: a name may have dots in it, and a column may have other values beside its times.
    leaves = [index for index in range(len(file.schema)) if file.schema.column(index).physical_type == "INT96"]
    if not leaves:
        return
    size = _int96_rows(file.metadata, groups, leaves)
    begin = 0
    with open_parquet(path, int96="ns") as fine:
        batches = (
            source.reader.iter_batches(size, row_groups=list(groups), column_indices=leaves) for source in (file, fine)
        )
        for coarse, exact in zip(*batches, strict=True):
            first = max(skip - begin, 0)
            left = exact.num_rows if rows is None else skip + rows - begin - first
            if left <= 0:
                return
            begin += exact.num_rows
            # Most of a split row group may be other units' rows, and theirs to refuse.
            rough_columns, whole_columns = coarse.slice(first, left).columns, exact.slice(first, left).columns
            for name, rough, whole in zip(exact.schema.names, rough_columns, whole_columns, strict=True):
                # Where the year is beyond nanoseconds both wrap alike.
                if not rough.cast(whole.type, safe=False).equals(whole):
                    raise DenoiseBatchError(
                        f"column {name!r} has INT96 times finer than a microsecond, which would be lost",
                        hint="write the column as a timestamp of nanoseconds",
                    )


def _int96_rows(metadata: pq.FileMetaData, groups: Sequence[int], leaves: Sequence[int]) -> int:
    """Rows to compare at a time, so that their times stay within a fixed number of bytes; lists may have many a row."""
    found = [metadata.row_group(group) for group in groups]
    values = max(
        (sum(g.column(leaf).num_values for leaf in leaves) / g.num_rows for g in found if g.num_rows), default=1
    )
    return max(1, min(_INT96_ROWS, int(_INT96_BYTES / (_INT96_VALUE_BYTES * max(values, 1)))))


def has_nested_dictionary(schema: pa.Schema) -> bool:
    """Whether a nested column has a dictionary in it, of which pyarrow joins no two row groups' values."""
    return any(has_dictionary(field.type) for field in schema if pa.types.is_nested(field.type))


def has_dictionary(type_: pa.DataType) -> bool:
    """Whether the type is a dictionary, or holds one at any depth."""
    if pa.types.is_nested(type_):
        return any(has_dictionary(type_.field(index).type) for index in range(type_.num_fields))
    return bool(pa.types.is_dictionary(type_))
