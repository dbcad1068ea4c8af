"""Joins Parquet files by copying their row groups as they are: no page is decompressed, only footers are made anew.

A footer says where in the file each column of each row group begins. A file whose bytes stand so much further on has
all these numbers that much larger (https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from denoise_batch.errors import DenoiseBatchError
from denoise_batch.parquet.output_file import DigestSink, Written, file_digest
from denoise_batch.parquet.thrift import I32, I64, LIST, STRUCT, Fields, read_fields, written_fields

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_MAGIC = b"PAR1"
_TAIL = 8  # bytes: the footer's length, and the magic number once more
_BLOCK = 1 << 20  # bytes, read at a time

# Fields by number: of FileMetaData, of its schema's elements, of a RowGroup, of a ColumnChunk.
_SCHEMA, _ROWS, _ROW_GROUPS, _KEY_VALUES = 2, 3, 4, 5
_FIELD_ID = 9
_COLUMNS, _GROUP_OFFSET, _ORDINAL = 1, 5, 7
_CHUNK_OFFSET, _DESCRIBED, _INDEXES = 2, 3, (4, 5, 6, 7)
_PAGE_OFFSETS = (9, 10, 11, 14)  # of what describes the pages: data, index, dictionary, bloom filter


class SchemasDifferError(Exception):
    """Row groups of several schemas cannot stand in one file."""


class Part(NamedTuple):
    """A Parquet file that this program wrote, and the xxh3-128 of what is expected in it."""

    path: Path
    digest: str

    def check(self) -> None:
        """Reads all of it.

        Raises:
            DenoiseBatchError: it is not what is expected.
        """
        if file_digest(self.path) != self.digest:
            raise _changed(self.path)


def join_row_groups(parts: Sequence[Part], target: Path, schema: pa.Schema | None = None) -> Written:
    """One file of the row groups of several files; all else in its footer is the first one's.

    Args:
        parts: at least one.
        target: must not exist.
        schema: whose metadata the new file has; None: the first one's.

    Raises:
        DenoiseBatchError: a part is not what is expected; the new file, read back, is not what was written.
        SchemasDifferError: in more than the ids of fields.
    """
    sink = DigestSink(target)
    try:
        sink.write(_MAGIC)
        first: Fields = {}
        elements: list[Fields] = []
        groups: list[bytes] = []  # written at once: read ones take ten times the memory
        rows = 0
        for part in parts:
            further = sink.size - len(_MAGIC)
            footer, _ = read_fields(_copy_body(part, sink), lists=True)
            first = first or footer
            elements = elements or _elements(footer)
            if _elements(footer) != elements:
                raise SchemasDifferError
            rows += footer[_ROWS][1]
            for group in footer[_ROW_GROUPS][1][1]:
                _move(group, further)
                groups.append(written_fields(group))
        if schema is not None:
            first[_KEY_VALUES] = _key_values(schema)
        content = written_fields(first | {_ROWS: (I64, rows), _ROW_GROUPS: (LIST, (STRUCT, groups))})
        sink.write(content + len(content).to_bytes(4, "little") + _MAGIC)
    except BaseException:
        sink.abandon()
        raise
    return sink.finish(rows)


def _copy_body(part: Part, sink: DigestSink) -> bytes:
    """Writes what stands between a part's first magic number and its footer, which is given back.

    Raises:
        DenoiseBatchError: any byte of the part is not what is expected.
    """
    digest, at, footer = xxhash.xxh3_128(), 0, bytearray()
    block = memoryview(bytearray(_BLOCK))
    with part.path.open("rb", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - _TAIL, 0))
        body = size - _TAIL - int.from_bytes(file.read(4), "little")
        if body < len(_MAGIC):
            raise _changed(part.path)
        file.seek(0)
        while count := file.readinto(block):
            digest.update(block[:count])
            end = max(min(count, body - at), 0)
            sink.write(block[max(len(_MAGIC) - at, 0) : end])
            footer += block[end:count]
            at += count
    if digest.hexdigest() != part.digest:
        raise _changed(part.path)
    return bytes(footer[:-_TAIL])


def _key_values(schema: pa.Schema) -> tuple[int, Any]:
    """What pyarrow writes of a schema, and of its metadata, beside Parquet's own of it."""
    empty = pa.BufferOutputStream()
    pq.ParquetWriter(empty, schema).close()
    content = empty.getvalue().to_pybytes()
    length = int.from_bytes(content[-_TAIL:-4], "little")
    footer, _ = read_fields(content[-_TAIL - length : -_TAIL], lists=True)
    return footer[_KEY_VALUES]


def _elements(footer: Fields) -> list[Fields]:
    """The schema's, without their ids, which data does not depend on."""
    elements: list[Fields] = footer[_SCHEMA][1][1]
    return [{number: field for number, field in each.items() if number != _FIELD_ID} for each in elements]


def _move(group: Fields, further: int) -> None:
    """Changes a row group's description to what it is so many bytes further on.

    Its number among the row groups goes, and so do page indexes, whose pages would be looked for at their old places.
    Both may be missing.
    """
    group.pop(_ORDINAL, None)
    _add(group, (_GROUP_OFFSET,), further)
    for chunk in group[_COLUMNS][1][1]:
        for number in _INDEXES:
            chunk.pop(number, None)
        _add(chunk, (_CHUNK_OFFSET,), further)
        _add(chunk[_DESCRIBED][1], _PAGE_OFFSETS, further)


def _add(fields: Fields, numbers: tuple[int, ...], further: int) -> None:
    for number in numbers:
        kind, offset = fields.get(number, (I32, 0))
        if offset:  # 0 is how pyarrow says nothing
            fields[number] = kind, offset + further


def _changed(path: Path) -> DenoiseBatchError:
    return DenoiseBatchError(
        f"{path}: the file is no longer the one that a worker wrote; nothing was published",
        hint="the disk may be failing; delete that file and run the same command again, which makes its rows anew",
    )
