"""A Parquet file that counts only once it was closed, synced, read back and found to be what was written.

Page checksums are always on. Image columns are written without dictionary and statistics, which cost time and give
nothing there (uint8 lists excepted: Parquet stores them as 32-bit numbers, which a dictionary shrinks to a quarter).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from denoise_batch.errors import DenoiseBatchError, OutputError
from denoise_batch.images.layouts import Layout
from denoise_batch.parquet.input_file import has_dictionary

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from types import TracebackType

    from denoise_batch.images.layouts import ImageColumn

_ROW_GROUP_ROWS = 65_536
_ROW_GROUP_BYTES = 96 << 20  # of Arrow memory; bounds what a writer holds
_READ_BLOCK = 256 << 10
_SLACK = 64 << 10
_ARRAY_BYTES = 1 << 10
"""What Arrow itself takes for each array of a batch that is held, however few its rows are (measured)."""


_OTHER_FORMATS = re.compile(
    r"\.(csv|tsv|txt|jsonl?|ndjson|xlsx|npy|npz|pkl|pt|safetensors|feather|arrow|ipc|orc|avro|h5|hdf5|db|sqlite|duckdb"
    r"|png|jpe?g|tiff?|pdf|zip|tar|gz|zst)",
    re.IGNORECASE,
)


def check_parquet_name(path: Path) -> None:
    """Refuses a name for a new Parquet file that says another format.

    Raises:
        OutputError: it does.
    """
    if _OTHER_FORMATS.fullmatch(path.suffix):
        raise OutputError(
            f"{path}: what is written is Parquet, whatever the name says",
            hint=f"name it {path.with_suffix('.parquet').name}",
        )


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
        with pq.ParquetFile(self._path.absolute()) as file:  # or PyArrow takes a folder ~ for the home
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
        self._held: list[_Run] = []
        self._held_rows = 0
        self._held_bytes = 0
        self._batch_bytes = _ARRAY_BYTES * sum(_arrays(field.type) for field in schema)  # that a batch takes at least
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

    def write(self, batch: pa.RecordBatch, numbers: Any = None) -> None:
        """Takes a batch, or these of its rows.

        Args:
            numbers: of rows, ascending.
        """
        if numbers is not None and not len(numbers):
            return
        # pyarrow gives each batch a copy of its dictionaries, which may be larger than all rows of the batch.
        rows, dictionaries = without_dictionaries(batch)
        if numbers is not None and len(numbers) < batch.num_rows:
            rows = pa.RecordBatch.from_arrays([_taken(column, numbers) for column in rows.columns], schema=rows.schema)
        # A short slice would keep all that it was cut from in memory until its row group is full.
        if rows.get_total_buffer_size() > 4 * rows.nbytes + _SLACK:
            rows = _compacted(rows)
        run = self._run_with(dictionaries)
        run.batches.append(rows)
        self._held_rows += rows.num_rows
        # A buffer that many views were joined of counts once.
        self._held_bytes += max(min(rows.nbytes, rows.get_total_buffer_size()), self._batch_bytes)
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

    def _run_with(self, dictionaries: list[pa.Array]) -> _Run:
        """The last run if these are its dictionaries, else a new one."""
        if not self._held:  # these do not count: a smaller row group would have them, too
            self._held.append(_Run(dictionaries, []))
            return self._held[0]
        last = self._held[-1].dictionaries
        shared = [old if _is_copy(new, old) else new for new, old in zip(dictionaries, last, strict=True)]
        changed = [new for new, old in zip(shared, last, strict=True) if new is not old]
        if changed:
            self._held_bytes += sum(values.nbytes for values in changed)
            self._held.append(_Run(shared, []))
        return self._held[-1]

    def _flush(self) -> None:
        if self._held_rows:
            for table in self._row_groups():
                self._writer.write_table(table, row_group_size=table.num_rows)
            self._rows += self._held_rows
        self._held, self._held_rows, self._held_bytes = [], 0, 0

    def _row_groups(self) -> list[pa.Table]:
        """What is held, with one dictionary a column; a table a run where the indices' type cannot number all values.

        A dictionary column that changes its dictionary within a row group loses it there, the order of its categories
        with it, and if it is nested pyarrow cannot read it.
        """
        tables = [run.table(self._schema) for run in self._held]
        if len(tables) == 1:
            return tables
        try:
            return [pa.concat_tables(tables).unify_dictionaries()]
        except pa.ArrowException:
            return tables


@dataclass(frozen=True, slots=True)
class _Run:
    """Batches without their dictionaries, which are the same for all of them."""

    dictionaries: list[pa.Array]
    batches: list[pa.RecordBatch]

    def table(self, schema: pa.Schema) -> pa.Table:
        """Has one chunk of each dictionary column: to unify or to write many takes the whole dictionary's time each."""
        plain = pa.Table.from_batches(self.batches, _undressed_schema(schema))
        dictionaries = iter(self.dictionaries)
        columns = plain.columns
        for index, field in enumerate(schema):
            if has_dictionary(field.type):
                columns[index] = _dressed(pa.concat_arrays(columns[index].chunks), field.type, dictionaries)
        return pa.Table.from_arrays(columns, schema=schema)


def _arrays(type_: pa.DataType) -> int:
    """How many arrays one of this type consists of."""
    return 1 + sum(_arrays(type_.field(index).type) for index in range(type_.num_fields))


def _taken(array: pa.Array, numbers: Any) -> pa.Array:
    """These rows of an array without dictionaries, which pyarrow would join value by value."""
    try:
        return array.take(pa.array(numbers))
    except pa.ArrowNotImplementedError:  # views
        runs = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
        return pa.concat_arrays([array.slice(int(run[0]), len(run)) for run in runs])


def without_dictionaries(batch: pa.RecordBatch) -> tuple[pa.RecordBatch, list[pa.Array]]:
    """The batch with indices in place of its dictionary arrays, nested ones too, and the dictionaries, in order."""
    dictionaries: list[pa.Array] = []
    columns = [_undressed(column, dictionaries) for column in batch.columns]
    if not dictionaries:
        return batch, dictionaries
    return pa.RecordBatch.from_arrays(columns, schema=_undressed_schema(batch.schema)), dictionaries


def _undressed_schema(schema: pa.Schema) -> pa.Schema:
    return pa.schema([field.with_type(_undressed_type(field.type)) for field in schema])


def _undressed_type(type_: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(type_):
        return type_.index_type
    if not has_dictionary(type_):
        return type_
    fields = [type_.field(index) for index in range(type_.num_fields)]
    fields = [field.with_type(_undressed_type(field.type)) for field in fields]
    if pa.types.is_struct(type_):
        return pa.struct(fields)
    if pa.types.is_map(type_):
        return pa.map_(*fields[0].type, keys_sorted=type_.keys_sorted)
    if pa.types.is_fixed_size_list(type_):
        return pa.list_(fields[0], type_.list_size)
    return next(make for is_it, make, _ in _LISTS if is_it(type_))(fields[0])


_LISTS: tuple[tuple[Any, Any, int], ...] = (
    (pa.types.is_list, pa.list_, 2),
    (pa.types.is_large_list, pa.large_list, 2),
    (pa.types.is_list_view, pa.list_view, 3),
    (pa.types.is_large_list_view, pa.large_list_view, 3),
    (pa.types.is_map, None, 2),
    (pa.types.is_fixed_size_list, None, 1),
)
"""Parquet has no other nested types but structs: how each is known and made, and how many buffers are its own."""


def _undressed(array: pa.Array, found: list[pa.Array]) -> pa.Array:
    if pa.types.is_dictionary(array.type):
        found.append(array.dictionary)
        return array.indices
    if not has_dictionary(array.type):
        return array
    children = [_undressed(child, found) for child in _children(array)]
    return _with_children(array, _undressed_type(array.type), children)


def _dressed(array: pa.Array, type_: pa.DataType, dictionaries: Iterator[pa.Array]) -> pa.Array:
    """`_undressed` undone."""
    if pa.types.is_dictionary(type_):
        return pa.DictionaryArray.from_arrays(array, next(dictionaries), ordered=type_.ordered, safe=False)
    if not has_dictionary(type_):
        return array
    types = [type_.field(index).type for index in range(type_.num_fields)]
    children = [_dressed(child, inner, dictionaries) for child, inner in zip(_children(array), types, strict=True)]
    return _with_children(array, type_, children)


def _children(array: pa.Array) -> list[pa.Array]:
    if pa.types.is_struct(array.type):
        return [array.field(index) for index in range(array.type.num_fields)]
    return [array.values]


def _with_children(array: pa.Array, type_: pa.DataType, children: list[pa.Array]) -> pa.Array:
    """The nested array with others in place of its `_children`."""
    if pa.types.is_struct(type_):
        return pa.StructArray.from_arrays(children, type=type_, mask=array.is_null() if array.null_count else None)
    own = next(count for is_it, _, count in _LISTS if is_it(type_))
    return pa.Array.from_buffers(type_, len(array), array.buffers()[:own], offset=array.offset, children=children)


def _is_copy(array: pa.Array, other: pa.Array) -> bool:
    if (array.type, len(array), array.offset) != (other.type, len(other), other.offset):
        return False
    # Bytes, not values: they tell 0.0 from -0.0, and are compared much faster.
    pairs = itertools.zip_longest(array.buffers(), other.buffers())
    return all(one is two if one is None or two is None else one.equals(two) for one, two in pairs)


def _compacted(batch: pa.RecordBatch) -> pa.RecordBatch:
    """A copy that holds its own rows alone: Arrow's stream format cuts buffers to what is used."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return pa.ipc.open_stream(sink.getvalue()).read_next_batch()


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
