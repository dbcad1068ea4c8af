"""The output's schema: the input's, the new columns, and Spark's own note of the columns brought up to date."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

_SPARK = b"org.apache.spark.sql.parquet.row.metadata"
_SPARK_TYPES = {
    pa.uint8(): "short",
    pa.float32(): "float",
    pa.float64(): "double",
    pa.string(): "string",
    pa.large_string(): "string",
    pa.binary(): "binary",
    pa.large_binary(): "binary",
    pa.binary(784): "binary",
}


def output_schema(schema: pa.Schema, *columns: pa.Field) -> pa.Schema:
    """The schema with more columns at its end.

    Spark takes a file's columns from the note that it left in the metadata, and would not see the new ones; where a
    column has no type in Spark, or the note is not understood, it is left out, and Spark reads the schema itself.
    """
    wider = schema
    for column in columns:
        wider = wider.append(column)
    if _SPARK not in (schema.metadata or {}):
        return wider
    metadata = dict(schema.metadata)
    try:
        note = json.loads(metadata[_SPARK])
        for column in columns:
            field = {"name": column.name, "type": _spark_type(column.type), "nullable": True, "metadata": {}}
            note["fields"].append(field)
        metadata[_SPARK] = json.dumps(note, separators=(",", ":")).encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        del metadata[_SPARK]
    return wider.with_metadata(metadata)


def _spark_type(type_: pa.DataType) -> Any:
    """A type as Spark's JSON has it; KeyError where there is none (float16)."""
    if isinstance(type_, pa.BaseExtensionType):
        return _spark_type(type_.storage_type)
    if pa.types.is_struct(type_):
        fields = [
            {"name": field.name, "type": _spark_type(field.type), "nullable": field.nullable, "metadata": {}}
            for field in type_
        ]
        return {"type": "struct", "fields": fields}
    if pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_):
        return {"type": "array", "elementType": _spark_type(type_.value_type), "containsNull": True}
    return _SPARK_TYPES[type_]
