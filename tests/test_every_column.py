"""Columns of every type that Parquet can hold come back bit by bit, through chunks, units, set-aside rows and merging."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from arbitrary_columns import BYTES, LEAVES, TYPES, arbitrary, differs
from hypothesis import given, settings
from hypothesis import strategies as st

from denoise_batch.inference.assembly import merge
from denoise_batch.inference.denoise_unit import OnBadRow

if TYPE_CHECKING:
    from conftest import DenoiseFile


def identity(pixels: Any) -> Any:
    return pixels


def image_column(rows: int, bad: Any) -> pa.Array:
    rng = np.random.default_rng(rows)
    return pa.array([None if b else rng.bytes(784) for b in bad], pa.binary(784))


def check(path: Path, denoise_file: DenoiseFile, **options: Any) -> pa.Table:
    """Denoises the file in units and merges these; every column of the input must be in the result."""
    source = pq.read_table(path, coerce_int96_timestamp_unit="us")
    with tempfile.TemporaryDirectory() as folder:
        done = denoise_file(path, Path(folder), identity, column="image", **options)
        if not done.files:
            return source
        target = Path(folder, "merged.parquet")
        merge(done.files, target, done.plan.column, done.options.output, "zstd")
        parts = pa.concat_tables([pq.read_table(file) for file in done.files])
        merged = pq.read_table(target)
        aside = [pq.read_table(Path(folder, r.quarantine_file)) for r in done.receipts if r.quarantine_file]
    kept = np.ones(len(source), np.bool_)
    if options.get("on_bad_row") is OnBadRow.QUARANTINE:
        kept = source["image"].is_valid().to_numpy()
    for table in (parts, merged):
        assert table.schema.names == [*source.schema.names, "denoised"]
        assert table.schema.remove(len(source.schema)).equals(source.schema, check_metadata=True)
        _same(source, kept, table)
    if not kept.all():
        _same(source, ~kept, pa.concat_tables(aside))
    return merged


def _same(source: pa.Table, kept: Any, table: pa.Table) -> None:
    for place, name in enumerate(source.schema.names):
        column = source.column(place).combine_chunks()
        pieces = [column.slice(row, 1) for row in np.flatnonzero(kept)] if not kept.all() else [column]
        expected = pa.concat_arrays(pieces) if len(pieces) != 1 else pieces[0]
        assert not differs(expected, table.column(place), name)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_columns_of_any_type(data: st.DataObject, denoise_file: DenoiseFile) -> None:
    rows = data.draw(st.integers(0, 40), "rows")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), "seed"))
    types = data.draw(st.lists(TYPES, min_size=1, max_size=4), "types")
    nulls = data.draw(st.sampled_from([0.0, 0.3, 1.0]), "nulls")
    bad = rng.random(rows) < data.draw(st.sampled_from([0.0, 0.3, 1.0]), "bad")
    names = data.draw(st.lists(st.sampled_from(NAMES), min_size=len(types), max_size=len(types), unique=True), "names")
    fields = [pa.field(name, type_, metadata={"of": name}) for name, type_ in zip(names, types, strict=True)]
    fields.insert(data.draw(st.integers(0, len(fields)), "place"), pa.field("image", pa.binary(784)))
    arrays = [image_column(rows, bad) if f.name == "image" else arbitrary(f.type, rows, rng, nulls) for f in fields]
    table = pa.table(arrays, schema=pa.schema(fields, metadata={"who": "me", "bytes": b"\xff\x00"}))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.parquet")
        pq.write_table(
            table,
            path,
            row_group_size=data.draw(st.sampled_from([1, 7, 100]), "group"),
            data_page_size=data.draw(st.sampled_from([64, 1 << 20]), "page"),
            use_dictionary=data.draw(st.booleans(), "dictionary"),
            store_schema=data.draw(st.booleans(), "store_schema"),
            data_page_version=data.draw(st.sampled_from(["1.0", "2.0"]), "version"),
        )
        check(
            path,
            denoise_file,
            unit_rows=data.draw(st.sampled_from([None, 3, 10]), "unit"),
            chunk_rows=data.draw(st.sampled_from([None, 2, 5]), "chunk"),
            on_bad_row=data.draw(st.sampled_from([OnBadRow.NULL, OnBadRow.QUARANTINE]), "on_bad_row"),
            compression=data.draw(st.sampled_from(["zstd", "none"]), "compression"),
        )


NAMES = ["a", "a.b", "ünï", "", " ", "image.x", "x`y", "A", "a\nb", "denoised.x", "list", "image.list.element"]
