"""A Parquet file that counts only once it was closed, synced, read back and found to be what was written.

Page checksums are always on. Image columns are written without dictionary and statistics, which cost time and give
nothing there (uint8 lists excepted: Parquet stores them as 32-bit numbers, which a dictionary shrinks to a quarter).
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from denoise_batch.errors import DenoiseBatchError
from denoise_batch.images.layouts import Layout
from denoise_batch.input_file import has_dictionary

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from types import TracebackType

    from denoise_batch.images.layouts import ImageColumn

_ROW_GROUP_ROWS = 65_536
_ROW_GROUP_BYTES = 96 << 20  # of Arrow memory; bounds what a writer holds
_READ_BLOCK = 256 << 10
_SLACK = 64 << 10


@dataclass(frozen=True, slots=True)
class Written:
    """A closed and verified file."""

    rows: int
    bytes: int
    digest: str


class DigestSink:
    """A new file that knows the digest of what was written to it. pyarrow writes in order and never seeks."""

    def __init__(self, path: Path) -> None:
        # Fails where the file exists: staged names are never used twice.
        self._path = path
        self._file = path.open("xb", buffering=0)
        self.digest = xxhash.xxh3_128()
        self.size = 0
        self.abandoned = False

    closed = False

    def write(self, data: Any) -> int:
        view = memoryview(data)
        total = len(view)
        if self.abandoned:
            return total  # pyarrow writes a footer whatever happened; nobody may take this file for a valid one
        self.digest.update(view)
        while view:
            view = view[self._file.write(view) :]
        self.size += total
        return total

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        pass

    def close(self) -> None:
        """pyarrow closes its end here; the file itself is closed by `finish`, after the sync."""

    def finish(self, rows: int) -> Written:
        """Syncs the Parquet file of so many rows, reads it back, compares.

        Raises:
            DenoiseBatchError: what stands on the disk is not what was written.
        """
        os.fsync(self._file.fileno())
        self._file.close()
        digest = self.digest.hexdigest()
        with pq.ParquetFile(self._path) as file:
            found = file.metadata.num_rows
        size = self._path.stat().st_size
        if found != rows or size != self.size or file_digest(self._path) != digest:
            raise DenoiseBatchError(
                f"{self._path}: the file that was read back is not the one that was written",
                hint="the disk or its controller is failing",
            )
        return Written(rows, size, digest)

    def abandon(self) -> None:
        self.abandoned = True
        self._file.close()


class OutputFile:
    """Writes record batches, in row groups of bounded size.

        with OutputFile(path, schema, images, compression="zstd") as file:
            file.write(batch)
            written = file.finish()

    Leaving the block without `finish` leaves a file behind that nobody may count.

    Args:
        path: must not exist.
        schema: of the batches.
        images: the image columns among them.
        compression: `none`, `snappy`, `lz4` or `zstd`.
        uncompressed: a column that is not compressed, whatever the others are.
    """

    def __init__(
        self,
        path: Path,
        schema: pa.Schema,
        images: Sequence[ImageColumn],
        *,
        compression: str,
        uncompressed: str | None = None,
    ) -> None:
        self._schema = schema
        self._rows = 0
        self._held: list[pa.RecordBatch] = []
        self._held_rows = 0
        self._held_bytes = 0
        plain = _leaves_without(schema, {c.name for c in images if not _dictionary_pays(c)})
        codecs: str | dict[str, str] = compression
        if uncompressed is not None:  # pyarrow compresses the leaves that are named, and no other
            codecs = dict.fromkeys(_leaves_without(schema, {uncompressed}), compression)
        self._sink = DigestSink(path)
        try:
            self._writer = pq.ParquetWriter(
                self._sink,
                schema,
                compression=codecs,
                use_dictionary=plain,
                write_statistics=_leaves_without(schema, {c.name for c in images}),
                write_page_checksum=True,
            )
        except BaseException:
            self._sink.abandon()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._sink.abandon()
        with contextlib.suppress(OSError, pa.ArrowException):
            self._writer.close()  # or its destructor would, and complain

    def write(self, batch: pa.RecordBatch) -> None:
        # A short slice would keep all that it was cut from in memory until its row group is full.
        if batch.get_total_buffer_size() > 4 * batch.nbytes + _SLACK:
            batch = _compacted(batch)
        self._held.append(batch)
        self._held_rows += batch.num_rows
        self._held_bytes += batch.nbytes
        if self._held_rows >= _ROW_GROUP_ROWS or self._held_bytes >= _ROW_GROUP_BYTES:
            self._flush()

    def finish(self) -> Written:
        """Closes, syncs, reads back, compares.

        Raises:
            DenoiseBatchError: what stands on the disk is not what was written.
        """
        self._flush()
        self._writer.close()
        return self._sink.finish(self._rows)

    def _flush(self) -> None:
        if self._held_rows:
            for table in _row_groups(pa.Table.from_batches(self._held, self._schema)):
                self._writer.write_table(table, row_group_size=table.num_rows)
            self._rows += self._held_rows
        self._held, self._held_rows, self._held_bytes = [], 0, 0


def _compacted(batch: pa.RecordBatch) -> pa.RecordBatch:
    """A copy that holds its own rows alone: Arrow's stream format cuts buffers to what is used."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return pa.ipc.open_stream(sink.getvalue()).read_next_batch()


def _row_groups(table: pa.Table) -> list[pa.Table]:
    """The table with one dictionary a column, or its chunks where the indices' type cannot number all values of one.

    A dictionary column that changes its dictionary within a row group loses it there, the order of its categories with
    it, and if it is nested pyarrow cannot read it.
    """
    if not any(has_dictionary(field.type) for field in table.schema):
        return [table]
    try:
        return [table.unify_dictionaries()]
    except pa.ArrowException:
        return [pa.Table.from_batches([batch], table.schema) for batch in table.to_batches()]


def file_digest(path: Path) -> str:
    """The xxh3-128 of a file's bytes, hexadecimal."""
    digest = xxhash.xxh3_128()
    block = memoryview(bytearray(_READ_BLOCK))  # one for all of the file: a cache holds it, and its memory is there
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


def _dictionary_pays(column: ImageColumn) -> bool:
    if pa.types.is_dictionary(column.type):  # the writer before us found it so
        return True
    return column.layout in {Layout.LIST, Layout.TENSOR} and column.dtype == "uint8"


def _leaves_without(schema: pa.Schema, columns: set[str]) -> list[str]:
    """Paths of the Parquet leaves of all other columns, as the writer's options name them."""
    # A path does not say whose it is: `image.x` may be a leaf of `image`, or a column's own name.
    others = pa.schema([field for field in schema if field.name not in columns])
    buffer = pa.BufferOutputStream()
    pq.ParquetWriter(buffer, others).close()
    with pq.ParquetFile(pa.BufferReader(buffer.getvalue())) as file:
        return [file.schema.column(index).path for index in range(len(file.schema))]
