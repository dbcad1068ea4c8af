"""Parquet types that Arrow does not carry: which of a file's columns come out as another type."""

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
