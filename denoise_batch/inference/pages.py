"""Looks at Parquet page headers before anything is decompressed: what a page claims, and whether the footer agrees.

pyarrow allocates whatever size a page header claims, and stops reading where the footer says that the rows end. So a
page may take all memory, and rows that a wrong footer leaves out would be lost without a word.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from denoise_batch import storage
from denoise_batch.errors import DenoiseBatchError

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pyarrow.parquet as pq

PAGE_BYTES = 512 << 20
"""The largest page that is read, uncompressed. Writers make pages of 1 MB; the largest known ones are of 100 MB."""

PAGE_VALUES = 1 << 27
"""The most values of one page: a run of equal ones takes a few bytes in the file and eight each in memory."""

_HEADER_BYTES = 256  # read at first; statistics may make a header longer
_LONGEST_HEADER = 16 << 20
_DATA, _DICTIONARY, _DATA_V2 = 0, 2, 3
_DATA_HEADERS = {_DATA: 5, _DICTIONARY: 7, _DATA_V2: 8}  # fields of a page header that describe each type
_UNCOMPRESSED, _COMPRESSED = 2, 3  # its other fields
_VALUES, _ROWS = 1, 3  # fields of those descriptions; rows only in version 2
_BAD = "a page header is damaged"


class _Source(Protocol):
    def read_at(self, nbytes: int, offset: int) -> bytes: ...


class _Short(Exception):
    """The bytes end within the header."""


def check_pages(path: str, metadata: pq.FileMetaData, groups: Iterable[int]) -> int:
    """Walks through the page headers of row groups.

    Over a network each page would cost a request; there, only columns whose footer claims that much are looked at.

    Args:
        path: a local path or URI.
        groups: the numbers of the row groups.

    Returns:
        The bytes that dictionary entries add to a row, on average, where they are longest.

    Raises:
        DenoiseBatchError: a page is too large to be read, a header is damaged, or pages and footer disagree.
    """
    filesystem, inner = storage.locate(path)
    with filesystem.open_input_file(inner) as source:
        entries = 0
        for group in groups:
            row_group = metadata.row_group(group)
            chunks = [row_group.column(index) for index in range(row_group.num_columns)]
            if storage.is_uri(path):
                chunks = [chunk for chunk in chunks if chunk.total_uncompressed_size > PAGE_BYTES]
            try:
                entries = max(entries, sum(_check_chunk(source, chunk, row_group.num_rows) for chunk in chunks))
            except DenoiseBatchError as error:
                raise DenoiseBatchError(f"row group {group}: {error.message}", hint="") from error
        return entries


def _check_chunk(source: _Source, chunk: Any, rows: int) -> int:
    """One column of one row group; the average bytes of its dictionary's entries."""
    name, values, entry = chunk.path_in_schema, 0, 0
    rows_v2: int | None = 0
    offsets = [offset for offset in (chunk.dictionary_page_offset, chunk.data_page_offset) if offset]
    position = min(offsets, default=0)
    end = position + chunk.total_compressed_size
    # Some old writers leave the dictionary's header out of the size: there, the number of values decides.
    while chunk.num_values and (position < end or values < chunk.num_values):
        try:
            kind, uncompressed, compressed, header, length = _page_header(source, position)
        except DenoiseBatchError as error:
            raise DenoiseBatchError(f"column {name!r}: {error.message}", hint="") from error
        count = header.get(_VALUES, 0)
        if uncompressed > PAGE_BYTES:
            raise DenoiseBatchError(
                f"column {name!r}: a page of {uncompressed:,} bytes is more than a worker holds ({PAGE_BYTES:,})", hint=""
            )
        if count > PAGE_VALUES:
            raise DenoiseBatchError(
                f"column {name!r}: a page of {count:,} values is more than a worker holds ({PAGE_VALUES:,})", hint=""
            )
        if kind == _DICTIONARY:
            entry = uncompressed // max(count, 1)
        elif kind in _DATA_HEADERS:
            values += count
            rows_v2 = rows_v2 + header.get(_ROWS, 0) if kind == _DATA_V2 and rows_v2 is not None else None
        position += length + compressed
    if values != chunk.num_values:
        raise DenoiseBatchError(
            f"column {name!r}: its pages hold {values:,} values, its footer claims {chunk.num_values:,}", hint=""
        )
    if rows_v2 is not None and rows_v2 != rows:
        raise DenoiseBatchError(f"column {name!r}: its pages hold {rows_v2:,} rows, its footer claims {rows:,}", hint="")
    return entry


def _page_header(source: _Source, position: int) -> tuple[int, int, int, dict[int, Any], int]:
    """(type, uncompressed bytes, compressed bytes, fields of its description, length of the header)."""
    size = _HEADER_BYTES
    while True:
        content = source.read_at(size, position)
        try:
            fields, length = _struct(content, 0)
            break
        except _Short:
            if len(content) < size or size >= _LONGEST_HEADER:
                raise DenoiseBatchError(_BAD, hint="") from None
            size *= 16
    kind, uncompressed, compressed = (fields.get(field) for field in (1, _UNCOMPRESSED, _COMPRESSED))
    header = fields.get(_DATA_HEADERS.get(kind, 0), {}) if isinstance(kind, int) else None
    sizes_are_sound = all(isinstance(value, int) and value >= 0 for value in (kind, uncompressed, compressed))
    if not sizes_are_sound or not isinstance(header, dict):
        raise DenoiseBatchError(_BAD, hint="")
    if any(not isinstance(header.get(field, 0), int) or header.get(field, 0) < 0 for field in (_VALUES,)):
        raise DenoiseBatchError(_BAD, hint="")
    return kind, uncompressed, compressed, header, length  # type: ignore[return-value]


# --- Thrift's compact protocol, as far as page headers need it --------------------------------------------------------

_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)
_DEEPEST = 8


def _struct(content: bytes, at: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """A structure's fields by number, numbers and structures only, and where it ends."""
    fields: dict[int, Any] = {}
    number = 0
    if depth > _DEEPEST:
        raise DenoiseBatchError(_BAD, hint="")
    while True:
        if at >= len(content):
            raise _Short
        delta, kind = content[at] >> 4, content[at] & 15
        at += 1
        if kind == 0:
            return fields, at
        if delta:
            number += delta
        else:
            number, at = _integer(content, at)
        fields[number], at = _value(content, at, kind, depth)


def _value(content: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in {_TRUE, _FALSE}:
        return kind == _TRUE, at
    if kind in {_I16, _I32, _I64}:
        return _integer(content, at)
    if kind == _STRUCT:
        return _struct(content, at, depth + 1)
    if kind == _BYTE:
        return None, at + 1
    if kind == _DOUBLE:
        return None, at + 8
    if kind == _BINARY:
        length, at = _varint(content, at)
        return None, at + length
    raise DenoiseBatchError(_BAD, hint="")  # no page header has a list, a set or a map


def _integer(content: bytes, at: int) -> tuple[int, int]:
    coded, at = _varint(content, at)
    return (coded >> 1) ^ -(coded & 1), at


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(content):
            raise _Short
        byte = content[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise DenoiseBatchError(_BAD, hint="")
