"""The output's schema: the input's and the new columns, with the notes that other programs left brought up to date.

Spark, pandas and Hugging Face `datasets` each note a file's columns in its metadata, and go by that note when they
read. A note that is not understood stays as it is; but Spark's is left out, which then reads the schema itself: it
has no word for some types.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from denoise_batch.images.plain import is_list

if TYPE_CHECKING:
    from collections.abc import Mapping

_SPARK = b"org.apache.spark.sql.parquet.row.metadata"
_PANDAS = b"pandas"
_HUGGING_FACE = b"huggingface"

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
_PANDAS_NUMBERS = {
    pa.uint8(): "uint8",
    pa.float16(): "float16",
    pa.float32(): "float32",
    pa.float64(): "float64",
}


def output_schema(schema: pa.Schema, *columns: pa.Field, image: str | None = None) -> pa.Schema:
    """The schema with more columns at its end.

    Args:
        image: the column that the first new one is made of.
    """
    wider = schema
    for column in columns:
        wider = wider.append(column)
    return with_notes(wider, {name: name for name in schema.names}, image)


def with_notes(schema: pa.Schema, origins: Mapping[str, str], image: str | None = None) -> pa.Schema:
    """The schema, whose metadata are those of another, with the notes in them telling of its own columns.

    Args:
        origins: the columns that the metadata's own schema had, each with its name there.
        image: the column whose images the first new one has, denoised; None where none has.
    """
    metadata = dict(schema.metadata or {})
    for key, update in ((_SPARK, _spark), (_PANDAS, _pandas), (_HUGGING_FACE, _hugging_face)):
        if key not in metadata:
            continue
        try:
            note = json.loads(metadata[key])
            update(note, schema, origins, image)
            metadata[key] = json.dumps(note, separators=(",", ":")).encode()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            if key == _SPARK:
                del metadata[key]
    return schema.with_metadata(metadata or None)


def _spark(note: Any, schema: pa.Schema, origins: Mapping[str, str], _: str | None) -> None:
    before = {entry["name"]: entry for entry in note["fields"]}
    note["fields"] = []
    for field in schema:
        if field.name not in origins:
            entry = {"name": field.name, "type": _spark_type(field.type), "nullable": True, "metadata": {}}
            note["fields"].append(entry)
        elif origins[field.name] in before:
            note["fields"].append(before[origins[field.name]] | {"name": field.name})


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
    if is_list(type_):
        return {"type": "array", "elementType": _spark_type(type_.value_type), "containsNull": True}
    return _SPARK_TYPES[type_]


def _pandas(note: Any, schema: pa.Schema, origins: Mapping[str, str], _: str | None) -> None:
    index = [name for name in note["index_columns"] if isinstance(name, str)]
    before = {entry.get("field_name") or entry["name"]: entry for entry in note["columns"]}
    levels = note["column_indexes"]
    kinds = [level["pandas_type"] for level in levels]
    tuples = len(levels) > 1 and set(kinds) == {"unicode"}
    text = len(levels) < 2 and all(kind in ("unicode", "string", "empty") or "mixed" in kind for kind in kinds)
    if not (tuples or text):
        # pandas turns all names back into what they were, numbers or times: the new one cannot be, so none is.
        name = levels[0]["name"] if len(levels) == 1 else None
        kind = {"pandas_type": "unicode", "numpy_type": "object", "metadata": {"encoding": "UTF-8"}}
        note["column_indexes"] = [{"name": name, "field_name": name, **kind}]
    found = []
    for field in schema:
        # Of several levels of names the new one has the first, as with pandas' own `frame["denoised"] = …`.
        name = str((field.name, *[""] * (len(levels) - 1))) if tuples else field.name
        origin = origins.get(field.name)
        if origin is None:
            found.append({"name": name, "field_name": field.name, **_pandas_type(field.type)})
        elif origin in before and origin not in index:
            renamed = {} if origin == field.name else {"name": name, "field_name": field.name}
            found.append(before[origin] | renamed)
    note["columns"] = found + [before[name] for name in index]  # as pandas has them: the index comes last


def _pandas_type(type_: pa.DataType) -> dict[str, Any]:
    return {"pandas_type": _pandas_kind(type_), "numpy_type": _PANDAS_NUMBERS.get(type_, "object"), "metadata": None}


def _pandas_kind(type_: pa.DataType) -> str:
    if pa.types.is_list(type_):
        return f"list[{_pandas_kind(type_.value_type)}]"
    if pa.types.is_binary(type_) or pa.types.is_fixed_size_binary(type_):
        return "bytes"
    return _PANDAS_NUMBERS.get(type_, "object")


def _hugging_face(note: Any, schema: pa.Schema, origins: Mapping[str, str], image: str | None) -> None:
    before = note.get("info", {}).get("features")
    if before is None:
        return
    found = {}
    for field in schema:
        origin = origins.get(field.name)
        if origin is not None:
            feature = before.get(origin)
        elif field.type == pa.float32():
            feature = {"dtype": "float32", "_type": "Value"}
        else:
            # PNG in a struct, as the image it is made of; what other types are `datasets` sees by itself.
            same = before.get(image) if pa.types.is_struct(field.type) else None
            feature = same if same and same.get("_type") == "Image" else None
        if feature is not None:
            found[field.name] = feature
    note["info"]["features"] = found
