"""Joins Parquet files by copying their row groups as they are: no page is decompressed, only footers are made anew.

A footer says where in the file each column of each row group begins. A file whose bytes stand so much further on has
all these numbers that much larger (https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import xxhash

from denoise_batch.errors import DenoiseBatchError
from denoise_batch.inference.thrift import (
    I32,
    I64,
    LIST,
    STRUCT,
    DamagedError,
    Fields,
    TooShortError,
    read_fields,
    written_fields,
)
from denoise_batch.output_file import DigestSink, Written

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_MAGIC = b"PAR1"
_TAIL = 8  # bytes: the footer's length, and the magic number once more
_BLOCK = 1 << 20  # bytes, read at a time

# Fields by number: of FileMetaData, of its schema's elements, of a RowGroup, of a ColumnChunk.
_SCHEMA, _ROWS, _ROW_GROUPS = 2, 3, 4
_FIELD_ID = 9
_COLUMNS, _GROUP_OFFSET, _ORDINAL = 1, 5, 7
_CHUNK_OFFSETS = (2, 4, 6)  # file_offset, offset_index_offset, column_index_offset
_DESCRIBED = 3
_PAGE_OFFSETS = (9, 10, 11, 14)  # of what describes the pages: data, index, dictionary, bloom filter


class Part:
    """A Parquet file that this program wrote.

    Args:
        digest: the xxh3-128 of what is expected in it.

    Attributes:
        footer: FileMetaData.
        body: bytes before the footer, the magic number among them.

    Raises:
        DenoiseBatchError: it has no footer.
    """

    def __init__(self, path: Path, digest: str) -> None:
        self.path, self.digest = path, digest
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - _TAIL, 0))
            tail = file.read(_TAIL)
            length = int.from_bytes(tail[:4], "little")
            self.body = size - _TAIL - length
            if tail[4:] != _MAGIC or self.body < len(_MAGIC):
                raise _changed(path)
            file.seek(self.body)
            content = file.read(length)
        try:
            self.footer, _ = read_fields(content, lists=True)
        except (DamagedError, TooShortError) as error:
            raise _changed(path) from error

    @property
    def rows(self) -> int:
        return int(self.footer[_ROWS][1])

    @property
    def row_groups(self) -> list[Fields]:
        groups: list[Fields] = self.footer[_ROW_GROUPS][1][1]
        return groups

    @property
    def schema(self) -> list[Fields]:
        """Its elements without their field ids, which data does not depend on."""
        elements: list[Fields] = self.footer[_SCHEMA][1][1]
        return [{number: field for number, field in each.items() if number != _FIELD_ID} for each in elements]


def join_row_groups(parts: Sequence[Part], target: Path) -> Written:
    """One file of the row groups of several files of one schema; all else in its footer is the first one's.

    Args:
        parts: their footers are changed.
        target: must not exist.

    Raises:
        DenoiseBatchError: a part is not what is expected; the new file, read back, is not what was written.
    """
    sink = DigestSink(target)
    try:
        sink.write(_MAGIC)
        groups: list[Fields] = []
        for part in parts:
            further = sink.size - len(_MAGIC)
            _copy_body(part, sink)
            for group in part.row_groups:
                _move(group, further, ordinal=len(groups))
                groups.append(group)
        rows = sum(part.rows for part in parts)
        footer = parts[0].footer | {_ROWS: (I64, rows), _ROW_GROUPS: (LIST, (STRUCT, groups))}
        content = written_fields(footer)
        sink.write(content + len(content).to_bytes(4, "little") + _MAGIC)
    except BaseException:
        sink.abandon()
        raise
    return sink.finish(rows)


def _copy_body(part: Part, sink: DigestSink) -> None:
    """Writes what stands between a part's first magic number and its footer; all of the part must be as expected."""
    digest, at = xxhash.xxh3_128(), 0
    block = memoryview(bytearray(_BLOCK))
    with part.path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
            sink.write(block[max(len(_MAGIC) - at, 0) : max(min(count, part.body - at), 0)])
            at += count
    if digest.hexdigest() != part.digest:
        raise _changed(part.path)


def _move(group: Fields, further: int, *, ordinal: int) -> None:
    """Changes a row group's description to what it is so many bytes further on."""
    _add(group, (_GROUP_OFFSET,), further)
    if _ORDINAL in group:
        group[_ORDINAL] = group[_ORDINAL][0], ordinal
    if ordinal >= 1 << 15:  # 16 bits; readers go without
        group.pop(_ORDINAL, None)
    for chunk in group[_COLUMNS][1][1]:
        _add(chunk, _CHUNK_OFFSETS, further)
        if _DESCRIBED in chunk:
            _add(chunk[_DESCRIBED][1], _PAGE_OFFSETS, further)


def _add(fields: Fields, numbers: tuple[int, ...], further: int) -> None:
    for number in numbers:
        kind, offset = fields.get(number, (I32, 0))
        if offset:  # 0 is how pyarrow says nothing
            fields[number] = kind, offset + further


def _changed(path: Path) -> DenoiseBatchError:
    return DenoiseBatchError(
        f"{path}: the file is no longer the one that a worker wrote",
        hint="nothing was published; the disk may be failing. Run again with --overwrite to start afresh",
    )
