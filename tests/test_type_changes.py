"""Parquet types that Arrow does not carry, of groups as of leaves: which columns are named."""

from __future__ import annotations

from typing import TYPE_CHECKING

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from denoise_batch.images import Polarity
from denoise_batch.inference.plan import make_plan
from denoise_batch.inference.thrift import BYTE, STRUCT, read_fields, written_fields
from denoise_batch.inference.type_changes import type_changes
from denoise_batch.listing import list_inputs

if TYPE_CHECKING:
    from pathlib import Path

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
