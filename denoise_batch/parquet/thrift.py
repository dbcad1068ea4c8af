"""Thrift's compact protocol, as Parquet's page headers and footers are written in it.

Fields are kept by number with their kinds, so that what is read and not changed is written as it was:
https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
"""

from __future__ import annotations

from typing import Any

TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(1, 13)

Fields = dict[int, tuple[int, Any]]
"""A structure: each field's kind and value by its number, in the order of the file. Values are bool, int, bytes (of
DOUBLE as well), `Fields`, or of a LIST or SET the elements' kind and a list of their values. A STRUCT that is to be
written may be bytes: what `written_fields` made of it."""

_DEEPEST = 8
_INTEGERS = {I16, I32, I64}


class DamagedError(Exception):
    """The bytes are no structure that Parquet has."""


class TooShortError(Exception):
    """The bytes end within the structure."""


def read_fields(content: bytes, at: int = 0, *, lists: bool = False, depth: int = 0) -> tuple[Fields, int]:
    """A structure that begins at `at`, and where it ends.

    Args:
        lists: it may have some; page headers have none.

    Raises:
        DamagedError: it has what Parquet's have not.
        TooShortError: it does not end.
    """
    fields: Fields = {}
    number = 0
    if depth > _DEEPEST:
        raise DamagedError
    while True:
        if at >= len(content):
            raise TooShortError
        delta, kind = content[at] >> 4, content[at] & 15
        at += 1
        if kind == 0:
            return fields, at
        if delta:
            number += delta
        else:
            number, at = _read_integer(content, at)
        if kind in {TRUE, FALSE}:
            fields[number] = kind, kind == TRUE
        else:
            value, at = _read_value(content, at, kind, lists=lists, depth=depth)
            fields[number] = kind, value


def written_fields(fields: Fields) -> bytes:
    """The structure's bytes, of which `read_fields` makes `fields` again."""
    out = bytearray()
    _write_fields(out, fields)
    return bytes(out)


def read_varint(content: bytes, at: int) -> tuple[int, int]:
    """An unsigned integer of at most 64 bits, seven of them a byte, and where it ends.

    Raises:
        DamagedError: it is longer.
        TooShortError: it does not end.
    """
    value = shift = 0
    while True:
        if at >= len(content):
            raise TooShortError
        byte = content[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise DamagedError


def _read_value(content: bytes, at: int, kind: int, *, lists: bool, depth: int) -> tuple[Any, int]:
    if kind in _INTEGERS:
        return _read_integer(content, at)
    if kind == STRUCT:
        return read_fields(content, at, lists=lists, depth=depth + 1)
    if kind == BYTE:
        return _read_bytes(content, at, 1)
    if kind == DOUBLE:
        return _read_bytes(content, at, 8)
    if kind == BINARY:
        length, at = read_varint(content, at)
        return _read_bytes(content, at, length)
    if kind in {LIST, SET} and lists:
        return _read_list(content, at, depth + 1)
    raise DamagedError


def _read_list(content: bytes, at: int, depth: int) -> tuple[tuple[int, list[Any]], int]:
    if depth > _DEEPEST:
        raise DamagedError
    if at >= len(content):
        raise TooShortError
    count, kind = content[at] >> 4, content[at] & 15
    at += 1
    if count == 15:
        count, at = read_varint(content, at)
    if count > len(content) - at:  # each takes a byte at least
        raise TooShortError
    values = []
    for _ in range(count):
        if kind in {TRUE, FALSE}:  # a byte each, unlike fields
            value, at = _read_bytes(content, at, 1)
        else:
            value, at = _read_value(content, at, kind, lists=True, depth=depth)
        values.append(value)
    return (kind, values), at


def _read_bytes(content: bytes, at: int, length: int) -> tuple[bytes, int]:
    # Nobody reads what a page header's are cut off to: what comes behind them is missing then.
    return content[at : at + length], at + length


def _read_integer(content: bytes, at: int) -> tuple[int, int]:
    coded, at = read_varint(content, at)
    return (coded >> 1) ^ -(coded & 1), at


def _write_fields(out: bytearray, fields: Fields) -> None:
    before = 0
    for number, (kind, value) in fields.items():
        delta = number - before
        if 0 < delta < 16:
            out.append(delta << 4 | kind)
        else:
            out.append(kind)
            _write_integer(out, number)
        before = number
        if kind not in {TRUE, FALSE}:
            _write_value(out, kind, value)
    out.append(0)


def _write_value(out: bytearray, kind: int, value: Any) -> None:
    if kind in _INTEGERS:
        _write_integer(out, value)
    elif kind == STRUCT and not isinstance(value, bytes):
        _write_fields(out, value)
    elif kind in {LIST, SET}:
        of, values = value
        out.append(min(len(values), 15) << 4 | of)
        if len(values) >= 15:
            _write_varint(out, len(values))
        for each in values:
            _write_value(out, of, each)
    else:
        if kind == BINARY:
            _write_varint(out, len(value))
        out += value


def _write_integer(out: bytearray, value: int) -> None:
    _write_varint(out, value << 1 if value >= 0 else (-value << 1) - 1)


def _write_varint(out: bytearray, value: int) -> None:
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
