"""Looks at Parquet page headers before anything is decompressed: what a page claims, and whether the footer agrees.

pyarrow allocates whatever size a page header claims, and stops reading where the footer says that the rows end. So a
page may take all memory, and rows that a wrong footer leaves out would be lost without a word. Nor does a page's
checksum cover its header: one flipped bit in a header's number of values gives other rows.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from denoise_batch import storage
from denoise_batch.errors import DenoiseBatchError
from denoise_batch.parquet.thrift import I32, STRUCT, DamagedError, Fields, TooShortError, read_fields, read_varint

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import pyarrow.parquet as pq

PAGE_BYTES = max(512 << 20, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 8)
"""The largest page that is read, uncompressed. Most writers make pages of 1 MB, but pyarrow looks at their size only
after each thousand values, and these may be large; an eighth of the machine's memory holds what it makes of them."""

_WORTH_REQUESTS = 512 << 20
"""Over a network each page header costs a request: only larger column chunks are looked at there."""

_BEYOND_THE_FOOTER = 64 << 20
"""A page may be larger than its column chunk by the footer, which some writers get wrong, but not by far."""

PAGE_VALUES = 1 << 27
"""The most values of one page: a run of equal ones takes a few bytes in the file and eight each in memory."""

_HEADER_BYTES = 256  # read at first; statistics may make a header longer
_LONGEST_HEADER = 16 << 20
_OLD_HEADER = 100  # bytes at most, as pyarrow has it
_DATA, _DICTIONARY, _DATA_V2 = 0, 2, 3
_DATA_HEADERS = {_DATA: 5, _DICTIONARY: 7, _DATA_V2: 8}  # fields of a page header that describe each type
_TYPE, _UNCOMPRESSED, _COMPRESSED, _CHECKSUM = 1, 2, 3, 4  # its other fields
_VALUES, _ROWS, _DEFINITIONS, _REPETITIONS = 1, 3, 5, 6  # fields of those descriptions; but the first, of version 2
_NONE = (I32, -1)
_BAD = "a page header is damaged"


class _Source(Protocol):
    def read_at(self, nbytes: int, offset: int) -> bytes: ...


@dataclass(slots=True)
class _Page:
    """What a page header says. `rows` and the bytes of levels, `definitions` and `repetitions`, are of version 2."""

    kind: int
    uncompressed: int
    compressed: int
    values: int
    rows: int
    definitions: int
    repetitions: int
    length: int


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
        leaves = [metadata.schema.column(index) for index in range(metadata.num_columns)]
        found = (_check_group(source, path, metadata.row_group(group), leaves, group) for group in groups)
        return max(found, default=0)


def _check_group(source: _Source, path: str, row_group: Any, leaves: Sequence[Any], number: int) -> int:
    entries = 0
    for index in range(row_group.num_columns):
        chunk = row_group.column(index)
        if storage.is_uri(path) and chunk.total_uncompressed_size <= _WORTH_REQUESTS:
            continue
        try:
            entries += _check_chunk(source, chunk, leaves[index], row_group.num_rows)
        except DenoiseBatchError as error:
            raise _fault(f"row group {number}, column {chunk.path_in_schema!r}: {error.message}") from error
    return entries


def _check_chunk(source: _Source, chunk: Any, leaf: Any, rows: int) -> int:
    """One column of one row group; the average bytes of its dictionary's entries."""
    values = rows_v2 = entry = 0
    all_v2 = True
    offsets = [offset for offset in (chunk.dictionary_page_offset, chunk.data_page_offset) if offset]
    position = min(offsets, default=0)
    end = position + chunk.total_compressed_size
    # Some old writers leave the dictionary's header out of the size: there, the number of values decides.
    while position < end or (values < chunk.num_values and position < end + _OLD_HEADER):
        page = _page(source, position)
        if position >= end and values + page.values > chunk.num_values:
            break  # it is the next column's
        if page.uncompressed > PAGE_BYTES:
            raise _fault(f"a page of {page.uncompressed:,} bytes is more than a worker may hold ({PAGE_BYTES:,})")
        if page.uncompressed > chunk.total_uncompressed_size + _BEYOND_THE_FOOTER:
            claimed = f"{chunk.total_uncompressed_size:,} of them all"
            raise _fault(f"a page claims {page.uncompressed:,} bytes, the footer {claimed}")
        if page.values > PAGE_VALUES:
            raise _fault(f"a page of {page.values:,} values is more than a worker may hold ({PAGE_VALUES:,})")
        if page.kind == _DICTIONARY:
            entry = page.uncompressed // max(page.values, 1)
        elif page.kind in _DATA_HEADERS:
            values += page.values
            all_v2 = all_v2 and page.kind == _DATA_V2
            rows_v2 += page.rows
            if page.kind == _DATA_V2:
                _check_levels(source, position, page, leaf)
        position += page.length + page.compressed
    if values != chunk.num_values:
        raise _fault(f"its pages hold {values:,} values, the footer claims {chunk.num_values:,}")
    if all_v2 and rows_v2 != rows:
        raise _fault(f"its pages hold {rows_v2:,} rows, the footer claims {rows:,}")
    return entry


def _fault(reason: str) -> DenoiseBatchError:
    return DenoiseBatchError(reason, hint="")


def has_checksum(source: _Source, position: int) -> bool:
    """Whether the page header there has a checksum, which pyarrow can check but does not show; a damaged one: no."""
    try:
        return _CHECKSUM in _fields(source, position)[0]
    except DenoiseBatchError:
        return False


def _fields(source: _Source, position: int) -> tuple[Fields, int]:
    """A page header, and its length."""
    size = _HEADER_BYTES
    while True:
        content = source.read_at(size, position)
        try:
            return read_fields(content)
        except TooShortError:
            if len(content) < size or size >= _LONGEST_HEADER:
                raise _fault(_BAD) from None
            size *= 16
        except DamagedError:
            raise _fault(_BAD) from None


def _page(source: _Source, position: int) -> _Page:
    fields, length = _fields(source, position)
    _, kind = fields.get(_TYPE, _NONE)
    _, about = fields.get(_DATA_HEADERS.get(kind, 0), (STRUCT, {}))
    numbers: list[Any] = [kind, fields.get(_UNCOMPRESSED, _NONE)[1], fields.get(_COMPRESSED, _NONE)[1]]
    if isinstance(about, dict):
        of_version_2 = (_ROWS, _DEFINITIONS, _REPETITIONS) if kind == _DATA_V2 else ()
        numbers += [about.get(field, (I32, 0))[1] for field in (_VALUES, *of_version_2)]
        numbers += [0] * (3 - len(of_version_2))
    numbers.append(length)
    if len(numbers) != 8 or any(not isinstance(number, int) or number < 0 for number in numbers):
        raise _fault(_BAD)
    return _Page(*numbers)


def _check_levels(source: _Source, position: int, page: _Page, leaf: Any) -> None:
    """Version 2 gives the lengths of a page's levels in its header; pyarrow does not see where they are wrong."""
    if page.repetitions + page.definitions > page.compressed:
        raise _fault(_BAD)
    content = source.read_at(page.repetitions + page.definitions, position + page.length)
    for most, levels in (
        (leaf.max_repetition_level, content[: page.repetitions]),
        (leaf.max_definition_level, content[page.repetitions :]),
    ):
        try:
            # Zeros behind them would be some writer's padding.
            sound = not any(levels[_levels_end(levels, page.values if most else 0, most.bit_length()) :])
        except (TooShortError, DamagedError):
            sound = False
        if not sound:
            raise _fault(_BAD)


def _levels_end(content: bytes, count: int, width: int) -> int:
    """Where `count` levels of `width` bits end: runs of one level and runs of packed ones, one after another."""
    at = 0
    while count > 0:
        head, at = read_varint(content, at)
        if head & 1:
            packed = 8 * (head >> 1)
            needed = (min(packed, count) * width + 7) // 8
            if at + needed > len(content):
                raise TooShortError
            count -= packed
            at = min(at + width * (head >> 1), len(content))  # some writers leave out the last run's padding
        else:
            count -= head >> 1
            at += (width + 7) // 8
    if at > len(content):
        raise TooShortError
    return at
