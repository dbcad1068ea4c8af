"""Where types of Parquet and of Arrow are not one to one.

Parquet types that Arrow does not carry: which of a file's columns come out as another type (`type_changes`). And Arrow
types that Parquet does not tell apart, which writers choose among as they like: pandas 2 `string`, pandas 3 and Polars
`large_string`, pandas' categories indices as wide as their number needs. Files that differ in no more than these have a
`common_schema`, which holds the rows of all.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

# A line of a schema's text, as `  optional group field_id=-1 name (Variant(1)) {`; a name may have any characters.
_GROUP = re.compile(
    r"^( *)(?:required|optional|repeated) group field_id=-?\d+ (.*?)(?: \((\w+)(?:\([^\n]*\))?\))? \{$",
    re.DOTALL | re.MULTILINE,
)


def type_changes(file: pq.ParquetFile) -> list[str]:
    """A line for each column whose Parquet type pyarrow reads as one that it writes as another."""
    sink = pa.BufferOutputStream()
    try:
        pq.ParquetWriter(sink, file.schema_arrow).close()
        with pq.ParquetFile(pa.BufferReader(sink.getvalue())) as written:
            leaves = [[parquet.schema.column(i) for i in range(len(parquet.schema))] for parquet in (file, written)]
            groups = [_annotated_groups(str(parquet.schema)) for parquet in (file, written)]
    except pa.ArrowException:
        return []  # what cannot be written is said when it is
    found = [
        f"column {first.path!r}: {_logical(first)} becomes {_logical(other)}"
        for first, other in zip(*leaves, strict=False)
        if _logical(first) != _logical(other)
    ]
    # By kind alone: the lists around a group may have other names once they are written.
    kept = [kind for _, kind in groups[1]]
    found += [f"column {path!r}: {kind} becomes a struct" for path, kind in groups[0] if kind not in kept]
    return list(dict.fromkeys(found))


_ALIKE = (
    (pa.large_string(), pa.string(), pa.string_view()),
    (pa.large_binary(), pa.binary(), pa.binary_view()),
)
"""Types of the same values, first the one that has room for any number of bytes."""


def common_schema(first: pa.Schema, other: pa.Schema) -> pa.Schema | None:
    """The schema that has the rows of both unchanged, `first` itself where it does; None: they differ in more.

    The types are those with the larger offsets and indices; nullable wins. Metadata are those of `first`.
    """
    if first.equals(other):
        return first
    if first.names != other.names:
        return None
    fields: list[pa.Field] = []
    for ours, theirs in zip(first, other, strict=True):
        field = _common_field(ours, theirs)
        if field is None:
            return None
        fields.append(field)
    return pa.schema(fields, first.metadata)


def widened(schema: pa.Schema, common: pa.Schema) -> pa.Schema:
    """A file's schema, or some columns of it, with the types of a `common_schema` and with metadata of its own."""
    fields = []
    for field in schema:
        target = common.field(field.name)
        kept = field if field.type.equals(target.type) else field.with_type(target.type)
        fields.append(kept.with_nullable(target.nullable))
    return pa.schema(fields, schema.metadata)


def widen(rows: pa.RecordBatch | pa.Table, schema: pa.Schema) -> pa.RecordBatch | pa.Table:
    """The same rows in a schema that `widened` made; columns whose type it has already are not copied."""
    arrays = [as_type(column, field.type) for column, field in zip(rows.columns, schema, strict=True)]
    return type(rows).from_arrays(arrays, schema=schema)


def as_type(array: pa.Array | pa.ChunkedArray, type_: pa.DataType) -> pa.Array | pa.ChunkedArray:
    """The same values as a type that has a `common_type` with their own; not copied where it is that type.

    Of a dictionary wider indices stay: narrower ones may not reach all of its values.
    """
    if array.type.equals(type_):
        return array
    if pa.types.is_dictionary(type_):
        type_ = pa.dictionary(_wider_index(array.type, type_), type_.value_type, type_.ordered)
    return array.cast(type_)


def _common_field(ours: pa.Field, theirs: pa.Field) -> pa.Field | None:
    type_ = common_type(ours.type, theirs.type)
    if type_ is None:
        return None
    kept = ours if type_.equals(ours.type) else ours.with_type(type_)
    return kept.with_nullable(ours.nullable or theirs.nullable)


def common_type(ours: pa.DataType, theirs: pa.DataType) -> pa.DataType | None:
    """The type that has the values of both unchanged; None: there is none that Parquet does not tell apart."""
    if ours.equals(theirs):
        return ours
    for alike in _ALIKE:
        if ours in alike and theirs in alike:
            return alike[0]
    if pa.types.is_dictionary(ours) and pa.types.is_dictionary(theirs):
        values = common_type(ours.value_type, theirs.value_type)
        if values is None or ours.ordered != theirs.ordered:
            return None
        return pa.dictionary(_wider_index(ours, theirs), values, ours.ordered)
    if pa.types.is_struct(ours) and pa.types.is_struct(theirs):
        inner = common_schema(pa.schema(list(ours)), pa.schema(list(theirs)))
        return None if inner is None else pa.struct(list(inner))
    both = (ours, theirs)
    if all(pa.types.is_list(type_) or pa.types.is_large_list(type_) for type_ in both):
        child = _common_field(ours.value_field, theirs.value_field)
        make = pa.large_list if any(map(pa.types.is_large_list, both)) else pa.list_
        return None if child is None else make(child)
    return None


def _wider_index(*types: pa.DataType) -> pa.DataType:
    """Of dictionaries' index types the one that reaches most values: none is negative, so unsigned before signed."""
    indices = [type_.index_type for type_ in types]
    return max(indices, key=lambda index: (index.bit_width, pa.types.is_unsigned_integer(index)))


def difference(first: pa.Schema, other: pa.Schema) -> str:
    """Why two schemas have no `common_schema`, as `column 'id' is missing`."""
    ours, theirs = dict.fromkeys(first.names), dict.fromkeys(other.names)
    missing = [name for name in ours if name not in theirs]
    extra = [name for name in theirs if name not in ours]
    if missing:
        return f"column {missing[0]!r} is missing"
    if extra:
        return f"column {extra[0]!r} is extra"
    for name in ours:
        here, there = first.field(name).type, other.field(name).type
        if common_type(here, there) is None:
            ours_said, theirs_said = _told_apart(here, there)
            return f"column {name!r} is {theirs_said}, not {ours_said}"
    return "its columns stand in another order"


def _told_apart(ours: pa.DataType, theirs: pa.DataType) -> tuple[str, str]:
    """Both types' texts; where these are the same, with what the extension types in them are stored as."""
    said = str(ours)
    if said != str(theirs):
        return said, str(theirs)
    if all(isinstance(type_, pa.BaseExtensionType) for type_ in (ours, theirs)):
        first, other = _told_apart(ours.storage_type, theirs.storage_type)
        return f"{said} over {first}", f"{said} over {other}"
    for ours_field, theirs_field in zip(_fields(ours), _fields(theirs), strict=True):
        if common_type(ours_field.type, theirs_field.type) is None:
            first, other = _told_apart(ours_field.type, theirs_field.type)
            return f"{said} ({ours_field.name!r}: {first})", f"{said} ({theirs_field.name!r}: {other})"
    return said, said


def _fields(type_: pa.DataType) -> list[pa.Field]:
    return [type_.field(index) for index in range(type_.num_fields)] if pa.types.is_nested(type_) else []


def _annotated_groups(schema: str) -> list[tuple[str, str]]:
    """Paths and kinds of groups that are neither structs nor parts of lists and maps, as `("c", "Variant")`.

    Args:
        schema: pyarrow's text of a Parquet schema, which alone tells the kinds of groups.
    """
    found = []
    above: list[str] = []
    for indent, name, kind in _GROUP.findall(schema):
        above[len(indent) // 2 :] = [name]
        if kind and kind not in {"List", "Map"}:
            found.append((".".join(above[1:]), kind))  # without the root
    return found


def _logical(leaf: Any) -> str:
    if leaf.physical_type == "INT96":
        return "INT96"
    about = json.loads(leaf.logical_type.to_json())
    details = {key: value for key, value in about.items() if key in {"isAdjustedToUTC", "timeUnit", "bitWidth"}}
    kind = str(about.get("Type", "None"))
    plain = {"INT32": 32, "INT64": 64}.get(leaf.physical_type)
    if kind == "Int" and about.get("isSigned") and about.get("bitWidth") == plain:
        return _physical(leaf)  # said or not, it is the same
    if kind in {"None", "Undefined"}:
        kind = _physical(leaf) if leaf.converted_type == "NONE" else leaf.converted_type
    return f"{kind} ({', '.join(f'{key} {value}' for key, value in details.items())})" if details else kind


def _physical(leaf: Any) -> str:
    return f"{leaf.length} bytes" if leaf.physical_type == "FIXED_LEN_BYTE_ARRAY" else str(leaf.physical_type)


def has_lists_of_size_0(type_: pa.DataType) -> bool:
    """Whether there is a `fixed_size_list` of size 0 in it, at any depth: PyArrow writes what it cannot read of it."""
    if isinstance(type_, pa.BaseExtensionType):
        return has_lists_of_size_0(type_.storage_type)
    if not pa.types.is_nested(type_):
        return False
    if pa.types.is_fixed_size_list(type_) and not type_.list_size:
        return True
    return any(has_lists_of_size_0(type_.field(index).type) for index in range(type_.num_fields))
