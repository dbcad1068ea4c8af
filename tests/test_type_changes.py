"""Parquet types that Arrow does not carry, and Arrow types that Parquet does not tell apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from denoise_batch.errors import ParquetError
from denoise_batch.images import Polarity
from denoise_batch.inference.denoise_unit import OnBadRow
from denoise_batch.inference.plan import Plan, make_plan
from denoise_batch.parquet.output_file import file_digest
from denoise_batch.parquet.row_groups import Part, join_row_groups
from denoise_batch.parquet.thrift import BYTE, STRUCT, read_fields, written_fields
from denoise_batch.parquet.type_changes import (
    as_type,
    common_schema,
    common_type,
    difference,
    type_changes,
    widen,
    widened,
)
from denoise_batch.storage.listing import list_inputs

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import DenoiseFile

_VARIANT = pa.struct([pa.field("metadata", pa.binary(), nullable=False), pa.field("value", pa.binary())])


def _annotate(path: Path, names: set[str]) -> None:
    """Makes groups of these names variants: pyarrow writes none."""
    content = path.read_bytes()
    begin = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    fields, _ = read_fields(content[begin:-8], lists=True)
    for element in fields[2][1][1]:
        if element[4][1].decode() in names:
            element[10] = STRUCT, {16: (STRUCT, {1: (BYTE, b"\x01")})}
    footer = written_fields(fields)
    path.write_bytes(content[:begin] + footer + len(footer).to_bytes(4, "little") + content[-4:])


def _changes(path: Path) -> list[str]:
    with pq.ParquetFile(path) as file:
        return type_changes(file)


@pytest.mark.usefixtures("footers_read_here")
def test_a_plan_names_variants_of_duckdb(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    with duckdb.connect() as connection:
        connection.execute(f"copy (select repeat('x', 784)::blob as image, 7::variant as any) to '{path}'")
    made = make_plan(list_inputs([str(path)]).files, None, Polarity.LIGHT_ON_DARK, "denoised")
    assert made.changes == ("column 'any': Variant becomes a struct",)


def test_groups_are_named_by_their_paths(tmp_path: Path) -> None:
    one = pa.array([{"metadata": b"m", "value": b"v"}], _VARIANT)
    table = pa.table(
        {
            "plain": one,
            "a\nb (c)": one,
            "many": pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), one),
            "map": pa.array([[("k", b"v")]], pa.map_(pa.string(), pa.binary())),
            "last": one,
        }
    )
    path = tmp_path / "a.parquet"
    # Arrow's old name of a list's elements, which is another once they are written again.
    pq.write_table(table, path, use_compliant_nested_type=False)
    assert _changes(path) == []
    _annotate(path, {"a\nb (c)", "item", "last"})
    assert _changes(path) == [
        f"column {name!r}: Variant becomes a struct" for name in ("a\nb (c)", "many.list.item", "last")
    ]


def test_a_structs_name_is_no_kind(tmp_path: Path) -> None:
    inner = pa.array([{"x (Variant)": {"y": 1}}])
    pq.write_table(pa.table({"x (Odd(1))": inner}), tmp_path / "a.parquet")
    assert _changes(tmp_path / "a.parquet") == []


_HF_SMALL = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_HF_LARGE = pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())])


@pytest.mark.parametrize(
    ("ours", "theirs", "common"),
    [
        (pa.string(), pa.large_string(), pa.large_string()),
        (pa.string_view(), pa.string(), pa.large_string()),
        (pa.string_view(), pa.string_view(), pa.string_view()),
        (pa.binary_view(), pa.large_binary(), pa.large_binary()),
        (_HF_SMALL, _HF_LARGE, _HF_LARGE),
        (pa.list_(pa.int8()), pa.large_list(pa.int8()), pa.large_list(pa.int8())),
        (pa.list_(pa.string()), pa.list_(pa.large_string()), pa.list_(pa.large_string())),
        (pa.list_(pa.field("x", pa.int8(), nullable=False)), pa.list_(pa.int8()), pa.list_(pa.int8())),
        (
            pa.dictionary(pa.int8(), pa.string(), True),
            pa.dictionary(pa.int8(), pa.large_string(), True),
            pa.dictionary(pa.int8(), pa.large_string(), True),
        ),
        *(
            (pa.dictionary(small, pa.string()), pa.dictionary(wide, large), pa.dictionary(wide, large))
            for small, wide in ((pa.int8(), pa.int16()), (pa.int8(), pa.uint8()), (pa.uint8(), pa.int16()))
            for large in (pa.string(), pa.large_string())
        ),
        (pa.dictionary(pa.int8(), pa.string()), pa.dictionary(pa.int16(), pa.string(), True), None),
        (pa.dictionary(pa.int8(), pa.string()), pa.dictionary(pa.int16(), pa.binary()), None),
        (pa.dictionary(pa.int8(), pa.string()), pa.string(), None),
        (pa.string(), pa.binary(), None),
        (pa.int32(), pa.int64(), None),
        (pa.struct([("a", pa.string())]), pa.struct([("b", pa.string())]), None),
        (pa.timestamp("us"), pa.timestamp("us", "UTC"), None),
    ],
)
def test_types_that_parquet_does_not_tell_apart(
    ours: pa.DataType, theirs: pa.DataType, common: pa.DataType | None
) -> None:
    assert common_type(ours, theirs) == common
    assert common_type(theirs, ours) == common


def test_nullable_wins_and_metadata_stay_each_files_own() -> None:
    first = pa.schema([pa.field("a", pa.int8(), False, {"x": "1"}), pa.field("b", pa.int8(), False)], {"of": "first"})
    other = pa.schema([pa.field("a", pa.int8(), True, {"x": "2"}), pa.field("b", pa.int8(), False)], {"of": "other"})
    common = common_schema(first, other)
    assert common is not None
    assert [field.nullable for field in common] == [True, False]
    assert common.metadata == {b"of": b"first"}
    assert widened(other, common).equals(other, check_metadata=True)
    assert widened(first, common).equals(common, check_metadata=True)
    assert common_schema(first, first) is first


def _array(type_: pa.DataType) -> pa.Array:
    values: list[Any] = ["", None, "é", "x" * 40, "y"]
    if pa.types.is_dictionary(type_):
        return pa.array(values, type_.value_type).dictionary_encode().cast(type_)
    if pa.types.is_struct(type_):
        return pa.array([None, *({"a": value} for value in values)], type_)
    if pa.types.is_list(type_):
        return pa.array([None, values, [], values[2:], values[1:2]], type_)
    return pa.array(values, type_)


@pytest.mark.parametrize(
    "small",
    [
        pa.string(),
        pa.string_view(),
        pa.struct([("a", pa.string())]),
        pa.list_(pa.string()),
        pa.list_(pa.struct([("a", pa.string_view())])),
        pa.dictionary(pa.int8(), pa.string()),
        pa.struct([("a", pa.dictionary(pa.int8(), pa.string()))]),
    ],
)
def test_slices_are_widened_without_loss(small: pa.DataType) -> None:
    def large(type_: pa.DataType) -> pa.DataType:
        if pa.types.is_dictionary(type_):
            return pa.dictionary(pa.int16(), pa.large_string())
        if pa.types.is_struct(type_):
            return pa.struct([("a", large(type_.field("a").type))])
        return pa.large_list(large(type_.value_type)) if pa.types.is_list(type_) else pa.large_string()

    values = pa.array([[{"a": "z"}, None], None, [{"a": "y"}]], small) if "view>" in str(small) else _array(small)
    common = common_schema(pa.schema([("c", small)]), pa.schema([("c", large(small))]))
    assert common is not None
    assert common.field("c").type == large(small)
    for start in range(len(values)):
        rows = pa.RecordBatch.from_arrays([values.slice(start, 2)], ["c"])
        wide = widen(rows, widened(rows.schema, common))
        wide.validate(full=True)
        assert wide.schema == common
        assert wide.to_pylist() == rows.to_pylist()


def test_units_of_files_that_differ_in_arrows_types_alone(tmp_path: Path, denoise_file: DenoiseFile) -> None:
    """As pandas 2, pandas 3 or Polars, and DuckDB write them: one schema, all values, and one file if it is joined."""
    rng = np.random.default_rng(0)
    images = [rng.bytes(784) for _ in range(5)] + [b"short"]
    words = ["a", "b", "é", "", "x", "y"]
    kinds = {
        "a": [pa.field("image", pa.binary()), pa.field("word", pa.string())],
        "b": [pa.field("image", pa.large_binary()), pa.field("word", pa.large_string())],
        "c": [pa.field("image", pa.binary(), nullable=False), pa.field("word", pa.string(), nullable=False)],
    }
    (tmp_path / "in").mkdir()
    for name, fields in kinds.items():
        table = pa.table([pa.array(images, fields[0].type), pa.array(words, fields[1].type)], schema=pa.schema(fields))
        pq.write_table(table, tmp_path / "in" / f"{name}.parquet")
    done = denoise_file(tmp_path / "in", tmp_path, lambda pixels: pixels, on_bad_row=OnBadRow.QUARANTINE)
    wide = pa.schema([("image", pa.large_binary()), ("word", pa.large_string()), ("denoised", pa.large_binary())])
    aside = [tmp_path / receipt.quarantine_file for receipt in done.receipts]
    for file, rest in zip(done.files, aside, strict=True):
        found = pq.read_table(file)
        assert found.schema.equals(wide)
        assert found["image"].to_pylist() == images[:5]
        assert found["word"].to_pylist() == words[:5]
        assert pq.read_table(rest).equals(pa.table([images[5:], words[5:]], schema=pa.schema(list(wide)[:2])))
    join_row_groups([Part(file, file_digest(file)) for file in done.files], tmp_path / "joined.parquet")
    assert pq.read_table(tmp_path / "joined.parquet").schema.equals(wide)

    done.plan.save(tmp_path)
    assert Plan.load(tmp_path).files == done.plan.files
    assert [bool(file.schema) for file in done.plan.files] == [True, False, True]


def test_pandas_categories_of_any_number_are_one_input(tmp_path: Path, denoise_file: DenoiseFile) -> None:
    """pandas' indices are as wide as the number of categories needs."""
    words = {"a": [f"w{row % 100}" for row in range(300)], "b": [f"w{row % 200}" for row in range(300)]}
    (tmp_path / "in").mkdir()
    for name, column in words.items():
        frame = pd.DataFrame({"image": [b"x" * 784] * 300, "word": pd.Categorical(column)})
        frame.to_parquet(tmp_path / "in" / f"{name}.parquet")
    done = denoise_file(tmp_path / "in", tmp_path, lambda pixels: pixels)
    for file, column in zip(done.files, words.values(), strict=True):
        found = pq.read_table(file)
        assert found.schema.field("word").type.index_type == pa.int16()
        assert found["word"].to_pylist() == column
    join_row_groups([Part(file, file_digest(file)) for file in done.files], tmp_path / "joined.parquet")
    assert pq.read_table(tmp_path / "joined.parquet")["word"].to_pylist() == [*words["a"], *words["b"]]


def test_of_a_dictionary_wider_indices_stay() -> None:
    """A training or an evaluation reads all files as the first one's type, whose indices may be too narrow."""
    values = pa.array([f"{row}" for row in range(300)]).dictionary_encode().cast(pa.dictionary(pa.int16(), pa.string()))
    found = as_type(values, pa.dictionary(pa.int8(), pa.large_string()))
    assert found.type == pa.dictionary(pa.int16(), pa.large_string())
    assert found.to_pylist() == values.to_pylist()


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (lambda type_: type_, "extension<arrow.json> over {}"),
        (
            lambda type_: pa.struct([("a", pa.int8()), ("j", type_)]),
            "struct<a: int8, j: extension<arrow.json>> ('j': extension<arrow.json> over {})",
        ),
    ],
)
def test_types_of_the_same_text_are_told_apart(wrap: Callable[[pa.DataType], pa.DataType], said: str) -> None:
    first, other = (pa.schema([("c", wrap(pa.json_(kind)))]) for kind in (pa.string(), pa.large_string()))
    assert difference(first, other) == f"column 'c' is {said.format('large_string')}, not {said.format('string')}"


def test_the_schema_of_most_files_counts_whatever_their_types(tmp_path: Path) -> None:
    for name, kind in (("a", pa.int8()), ("b", pa.int8()), ("c", pa.string()), ("d", pa.large_string())):
        pq.write_table(pa.table({"image": [b"x" * 784], "x": pa.array([None], kind)}), tmp_path / f"{name}.parquet")
    pq.write_table(pa.table({"image": [b"x" * 784], "x": pa.array([None], pa.string_view())}), tmp_path / "e.parquet")
    with pytest.raises(ParquetError) as caught:
        make_plan(list_inputs([str(tmp_path)]).files, None, Polarity.LIGHT_ON_DARK, "denoised")
    assert caught.value.message.startswith(f"2 of 5 files differ in the columns from {tmp_path}/c.parquet: ")
    assert "a.parquet (column 'x' is int8, not large_string)" in caught.value.message
