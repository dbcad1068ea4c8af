"""Columns of every type come back bit by bit, through chunks, units, rows that are set aside, and merging."""

from __future__ import annotations

import base64
import contextlib
import datetime
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from arbitrary_columns import TYPES, arbitrary, differs
from hypothesis import given, settings
from hypothesis import strategies as st

from denoise_batch.errors import DenoiseBatchError
from denoise_batch.inference.denoise_unit import OnBadRow
from denoise_batch.inference.merging import join
from denoise_batch.inference.output_schema import output_schema
from denoise_batch.inference.plan import Unit
from denoise_batch.inference.unit_rows import read_unit
from denoise_batch.parquet.input_file import check_int96, has_nested_dictionary, open_parquet
from denoise_batch.parquet.output_file import file_digest
from denoise_batch.parquet.row_groups import Part, join_row_groups

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import DenoiseFile

NAMES = ["a", "a.b", "ünï", "", " ", "image.x", "x`y", "A", "a\nb", "denoised.x", "list", "image.list.element"]


def identity(pixels: Any) -> Any:
    return pixels


def image_column(rows: int, bad: Any) -> pa.Array:
    rng = np.random.default_rng(rows)
    return pa.array([None if b else rng.bytes(784) for b in bad], pa.binary(784))


def _without_pandas_note(schema: pa.Schema) -> pa.Schema:
    """It names the columns, the new one too; all other metadata stay."""
    return schema.with_metadata({key: value for key, value in (schema.metadata or {}).items() if key != b"pandas"})


def check(path: Path, denoise_file: DenoiseFile, **options: Any) -> pa.Table:
    """Denoises the file in units and merges these; every column of the input must be in the result."""
    source = pq.read_table(path, coerce_int96_timestamp_unit="us")
    with tempfile.TemporaryDirectory() as folder:
        done = denoise_file(path, Path(folder), identity, column="image", **options)
        if not done.files:
            return source
        target = Path(folder, "merged.parquet")
        written = [Part(file, file_digest(file)) for file in done.files]
        join(written, target, done.plan.column, done.options.output, "zstd")
        parts = pa.concat_tables([pq.read_table(file) for file in done.files])
        merged = [pq.read_table(target)]
        if not has_nested_dictionary(parts.schema):
            target.unlink()
            join_row_groups(written, target)
            merged.append(pq.read_table(target))
        aside = [pq.read_table(Path(folder, r.quarantine_file)) for r in done.receipts if r.quarantine_file]
    kept = np.ones(len(source), np.bool_)
    if options.get("on_bad_row") is OnBadRow.QUARANTINE:
        kept = source["image"].is_valid().to_numpy()
    for table in (parts, *merged):
        assert table.schema.names == [*source.schema.names, "denoised"]
        kept_schema = table.schema.remove(len(source.schema))
        assert _without_pandas_note(kept_schema).equals(_without_pandas_note(source.schema), check_metadata=True)
        _same(source, kept, table)
    if not kept.all():
        _same(source, ~kept, pa.concat_tables(aside))
    return merged[0]


def _same(source: pa.Table, kept: Any, table: pa.Table) -> None:
    for place, name in enumerate(source.schema.names):
        column = source.column(place).combine_chunks()
        rows = [column.slice(row, 1) for row in np.flatnonzero(kept)]  # there is no filter for some types
        expected = column if kept.all() else pa.concat_arrays([column.slice(0, 0), *rows])
        assert not differs(expected, table.column(place), name)


@pytest.mark.slow
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
            data_page_size=data.draw(st.sampled_from([1000, 1 << 20]), "page"),  # below, pyarrow loses rows of lists
            data_page_version=data.draw(st.sampled_from(["1.0", "2.0"]), "version"),
            use_dictionary=data.draw(st.booleans(), "dictionary"),
            store_schema=data.draw(st.booleans(), "store_schema"),
        )
        check(
            path,
            denoise_file,
            unit_rows=data.draw(st.sampled_from([None, 3, 10]), "unit"),
            chunk_rows=data.draw(st.sampled_from([None, 2, 5]), "chunk"),
            on_bad_row=data.draw(st.sampled_from([OnBadRow.NULL, OnBadRow.QUARANTINE]), "on_bad_row"),
            compression=data.draw(st.sampled_from(["zstd", "none"]), "compression"),
        )


def write(path: Path, table: pa.Table, **options: Any) -> Path:
    image = image_column(len(table), [False] * len(table))
    pq.write_table(table.append_column("image", image), path, **options)
    return path


def test_categories_keep_their_order(tmp_path: Path, denoise_file: DenoiseFile) -> None:
    sizes = pa.array(["small", "medium", "large", "unused"])
    array = pa.DictionaryArray.from_arrays(pa.array([2, 0, None, 1] * 10, pa.int8()), sizes, ordered=True)
    path = write(tmp_path / "a.parquet", pa.table({"size": array, "image.size": array}), row_group_size=7)
    merged = check(path, denoise_file, unit_rows=10, chunk_rows=3)
    for name in ("size", "image.size"):
        assert all(chunk.dictionary.equals(sizes) for chunk in merged[name].chunks)


@pytest.mark.parametrize("kind", ["plain", "list", "struct"])
def test_more_categories_than_the_index_type_can_number(
    kind: str, tmp_path: Path, denoise_file: DenoiseFile, categories: Callable[[str, int], pa.Array]
) -> None:
    groups = []
    for start in (0, 100, 200):
        groups.append(pa.table({"word": categories(kind, start), "image": image_column(100, [False] * 100)}))
    with pq.ParquetWriter(tmp_path / "a.parquet", groups[0].schema) as writer:
        for group in groups:
            writer.write_table(group)
    source = pq.read_table(tmp_path / "a.parquet")["word"]
    done = denoise_file(tmp_path / "a.parquet", tmp_path, identity, chunk_rows=30)
    written = [Part(file, file_digest(file)) for file in done.files]
    join(written, tmp_path / "merged.parquet", done.plan.column, done.options.output, "zstd")
    for path in (done.files[0], tmp_path / "merged.parquet"):
        words = pq.read_table(path)["word"]
        assert words.type == source.type
        assert words.to_pylist() == source.to_pylist()


@pytest.mark.parametrize("year", [1, 1970, 2024, 9999])
def test_timestamps_of_spark(year: int, tmp_path: Path, denoise_file: DenoiseFile) -> None:
    when = pa.array([datetime.datetime(year, 6, 7, 8, 9, 10, 11), None], pa.timestamp("us"))
    path = write(tmp_path / "a.parquet", pa.table({"when": when}), use_deprecated_int96_timestamps=True)
    assert check(path, denoise_file)["when"].combine_chunks().equals(when)


def test_times_of_96_bits_that_are_finer_than_microseconds_are_refused(tmp_path: Path) -> None:
    when = pa.array([1_600_000_000_123_456_789, None, 1_600_000_000_123_456_000], pa.timestamp("ns"))
    nested = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), when.fill_null(0))
    for name, column in (("when", when), ("nested", nested)):
        table = pa.table({name: column, "image": image_column(3, [False] * 3)})
        path = tmp_path / f"{name}.parquet"
        pq.write_table(table, path, use_deprecated_int96_timestamps=True)
        with open_parquet(str(path)) as file, pytest.raises(DenoiseBatchError, match=f"{name}.*finer than a micro"):
            check_int96(str(path), file, [0])
        pq.write_table(table.slice(1, 2), path, use_deprecated_int96_timestamps=True)
        with open_parquet(str(path)) as file:
            check_int96(str(path), file, [0])


def test_times_of_96_bits_are_found_by_place_not_by_name(tmp_path: Path) -> None:
    """A name may have dots in it, as Spark allows, and a struct may have numbers that are none beside its times."""
    fine, whole = (pa.array([1_577_836_800_000_000_000 + more], pa.timestamp("ns")) for more in (1, 1000))
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": [1], "a.b": fine}), path, use_deprecated_int96_timestamps=True)
    with open_parquet(str(path)) as file, pytest.raises(DenoiseBatchError, match=r"'a\.b'.*finer than a micro"):
        check_int96(str(path), file, [0])
    event = pa.StructArray.from_arrays([whole, pa.array([float("nan")])], ["time", "value"])
    pq.write_table(pa.table({"event": event, "event.time": whole}), path, use_deprecated_int96_timestamps=True)
    with open_parquet(str(path)) as file:
        check_int96(str(path), file, [0])


@pytest.mark.parametrize("length", [1, 1000])
def test_looking_for_fine_times_takes_no_more_memory_for_more_rows(length: int, tmp_path: Path) -> None:
    when = pa.array(np.arange(1_000_000) * 1000, pa.timestamp("ns"))
    if length > 1:
        when = pa.ListArray.from_arrays(pa.array(range(0, len(when) + 1, length), pa.int32()), when)
    path = str(tmp_path / "a.parquet")
    # Without dictionaries, whose pages would be held as a whole.
    pq.write_table(pa.table({"when": when}), path, use_deprecated_int96_timestamps=True, use_dictionary=False)
    usual = pa.default_memory_pool()
    counting = pa.proxy_memory_pool(usual)
    pa.set_memory_pool(counting)
    try:
        with open_parquet(path) as file:
            check_int96(path, file, [0])
    finally:
        pa.set_memory_pool(usual)
    assert 0 < counting.max_memory() < 24 << 20  # read as a whole, 36 MB at least


@pytest.mark.parametrize("kind", ["plain", "list", "struct", "map"])
def test_fine_times_of_other_units_rows_are_none_of_a_units(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("denoise_batch.parquet.input_file._INT96_ROWS", 4)
    fine = 13
    times = pa.array([1000 * row + (row == fine) for row in range(20)], pa.timestamp("ns"))
    offsets = pa.array(range(21), pa.int32())
    column = {
        "plain": times,
        "list": pa.ListArray.from_arrays(offsets, times),
        "struct": pa.StructArray.from_arrays([times], ["time"]),
        "map": pa.MapArray.from_arrays(offsets, pa.array(["k"] * 20), times),
    }[kind]
    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.table({"when": column}), path, use_deprecated_int96_timestamps=True, row_group_size=10)
    for first, last in ((0, 1), (1, 1)):
        rows_before, rows = 10 * first, 10 * (last - first + 1)
        for skip in range(rows):
            for count in range(1, rows - skip + 1):
                with open_parquet(path) as file:
                    wrong = rows_before + skip <= fine < rows_before + skip + count
                    with pytest.raises(DenoiseBatchError) if wrong else contextlib.nullcontext():
                        check_int96(path, file, range(first, last + 1), skip, count)


def test_a_unit_is_refused_for_its_own_times_alone(tmp_path: Path) -> None:
    when = pa.array([1000, 2000, 3001, 4000], pa.timestamp("ns"))
    path = write(tmp_path / "a.parquet", pa.table({"when": when}), use_deprecated_int96_timestamps=True)
    with open_parquet(str(path)) as file:
        assert sum(len(batch) for batch in read_unit(file, Unit(0, 0, 0, 0, 0, 2, 0), 10, str(path))) == 2
        with pytest.raises(DenoiseBatchError, match="finer than a micro"):
            list(read_unit(file, Unit(1, 0, 0, 0, 2, 2, 2), 10, str(path)))


def _spark_array(element: Any) -> dict[str, Any]:
    return {"type": "array", "elementType": element, "containsNull": True}


SPARK = "org.apache.spark.sql.parquet.row.metadata"


@pytest.mark.parametrize(
    ("type_", "spark"),
    [
        (pa.binary(784), "binary"),
        (pa.list_(pa.uint8()), _spark_array("short")),
        (pa.list_(pa.list_(pa.float64(), 28)), _spark_array(_spark_array("double"))),
        (pa.fixed_shape_tensor(pa.float32(), [28, 28]), _spark_array("float")),
        (pa.list_(pa.float16()), None),
    ],
)
def test_sparks_note_of_the_columns_has_the_new_one(type_: pa.DataType, spark: Any) -> None:
    note = {"type": "struct", "fields": [{"name": "id", "type": "long", "nullable": True, "metadata": {}}]}
    before = pa.schema([pa.field("id", pa.int64())], {SPARK: json.dumps(note), "other": "x"})
    after = output_schema(before, pa.field("denoised", type_))
    assert after.metadata[b"other"] == b"x"
    if spark is None:  # Spark has no such type: it reads the file's own schema
        assert SPARK.encode() not in after.metadata
        return
    fields = json.loads(after.metadata[SPARK.encode()])["fields"]
    assert fields[0] == note["fields"][0]
    assert fields[1] == {"name": "denoised", "type": spark, "nullable": True, "metadata": {}}
    damaged = output_schema(before.with_metadata({SPARK: "[1"}), pa.field("denoised", type_))
    assert damaged.metadata is None or SPARK.encode() not in damaged.metadata


PANDAS_TEXT = {"name": None, "field_name": None, "pandas_type": "unicode", "metadata": {"encoding": "UTF-8"}}


def _pandas_note(*levels: dict[str, Any]) -> dict[str, Any]:
    entries = [
        {"name": name, "field_name": field, "pandas_type": kind, "numpy_type": kind, "metadata": None}
        for name, field, kind in (("0", "0", "int64"), ("key", "key", "object"))
    ]
    return {"index_columns": ["key"], "column_indexes": list(levels), "columns": entries, "attributes": {"a": 1}}


def _with_pandas_note(note: Any) -> Any:
    before = pa.schema([("0", pa.int64()), ("key", pa.string())], {"pandas": json.dumps(note)})
    added = [pa.field("denoised", pa.list_(pa.uint8())), pa.field("p", pa.float32()), pa.field("b", pa.binary(784))]
    after = output_schema(before, *added)
    return json.loads(after.metadata[b"pandas"])


def test_pandas_note_of_the_columns_has_the_new_ones() -> None:
    before = _pandas_note(PANDAS_TEXT | {"numpy_type": "str"})
    after = _with_pandas_note(before)
    assert {key: value for key, value in after.items() if key != "columns"} == {
        key: value for key, value in before.items() if key != "columns"
    }
    assert [after["columns"][0], after["columns"][-1]] == before["columns"]  # the index stays the last
    kinds = [("denoised", "list[uint8]", "object"), ("p", "float32", "float32"), ("b", "bytes", "object")]
    assert after["columns"][1:-1] == [
        {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy, "metadata": None}
        for name, kind, numpy in kinds
    ]


def test_pandas_is_not_told_that_a_new_name_is_a_number() -> None:
    numbers = {"name": "n", "field_name": "n", "pandas_type": "int64", "numpy_type": "int64", "metadata": None}
    after = _with_pandas_note(_pandas_note(numbers))
    assert after["column_indexes"] == [PANDAS_TEXT | {"name": "n", "field_name": "n", "numpy_type": "object"}]
    text = PANDAS_TEXT | {"numpy_type": "str"}
    after = _with_pandas_note(_pandas_note(text, text))
    assert after["column_indexes"] == [text, text]
    assert after["columns"][1]["name"] == "('denoised', '')"
    after = _with_pandas_note(_pandas_note(text, numbers))
    assert after["column_indexes"] == [PANDAS_TEXT | {"numpy_type": "object"}]
    assert after["columns"][1]["name"] == "denoised"
    assert _with_pandas_note([1]) == [1]  # no note of pandas' own: let be


def test_hugging_faces_note_has_the_new_image() -> None:
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features = {"image": {"mode": "L", "_type": "Image"}, "label": {"names": ["a"], "_type": "ClassLabel"}}
    note = {"info": {"features": features, "license": "x"}}
    before = pa.schema([("image", image), ("label", pa.int64())], {"huggingface": json.dumps(note)})

    def after(*added: tuple[str, pa.DataType], image: str) -> Any:
        wider = output_schema(before, *(pa.field(*field) for field in added), image=image)
        return json.loads(wider.metadata[b"huggingface"])

    number = {"dtype": "float32", "_type": "Value"}
    assert after(("denoised", image), ("psnr", pa.float32()), image="image") == {
        "info": {"features": features | {"denoised": features["image"], "psnr": number}, "license": "x"}
    }
    for type_, made_of in ((pa.binary(784), "image"), (image, "label")):
        assert after(("denoised", type_), image=made_of) == note


def test_metadata_of_fields_and_schema(tmp_path: Path, denoise_file: DenoiseFile) -> None:
    unknown = {"ARROW:extension:name": "some.body", "ARROW:extension:metadata": '{"unit": "m"}'}
    fields = [
        pa.field("unknown", pa.int32(), metadata=unknown),
        pa.field("numbered", pa.list_(pa.field("x", pa.int8(), metadata={"PARQUET:field_id": "8"})), nullable=False),
        pa.field("renumbered", pa.int64(), metadata={"PARQUET:field_id": "3", "other": "ü"}),
    ]
    arrays = [pa.array([1, None]), pa.array([[1], []]), pa.array([1, 2])]
    schema = pa.schema(fields, metadata={"spark.version": "4.0.0", "bytes": b"\x00\xff"})
    path = write(
        tmp_path / "a.parquet",
        pa.Table.from_arrays([a.cast(f.type) for a, f in zip(arrays, fields, strict=True)], schema=schema),
    )
    merged = check(path, denoise_file)
    assert merged.schema.field("renumbered").metadata[b"PARQUET:field_id"] == b"3"
    assert merged.schema.field("unknown").metadata[b"ARROW:extension:name"] == b"some.body"


def test_the_arrow_schema_is_the_inputs_and_one_more(tmp_path: Path, denoise_file: DenoiseFile) -> None:
    table = pa.table({"a": pa.array([1], pa.duration("s")), "b": pa.array(["x"], pa.large_string())})
    path = write(tmp_path / "a.parquet", table)
    done = denoise_file(path, tmp_path, identity, column="image")
    stored = [
        pa.ipc.read_schema(pa.py_buffer(base64.b64decode(pq.read_metadata(file).metadata[b"ARROW:schema"])))
        for file in (path, done.files[0])
    ]
    assert stored[1].remove(len(stored[0])).equals(stored[0], check_metadata=True)
    assert stored[1].names[-1] == "denoised"


INDEXES = {
    "default": None,
    "range": pd.RangeIndex(10, 40, 3, name="step"),
    "named": pd.Index([f"k{i}" for i in range(10)], name="key"),
    "unnamed": pd.Index(np.arange(10)[::-1] * 1.5),
    "several": pd.MultiIndex.from_product([["a", "b"], range(5)], names=["letter", None]),
    "times": pd.date_range("2024-03-30", periods=10, tz="Europe/Rome", name="when"),
    "categories": pd.CategoricalIndex(list("babababaab"), categories=["b", "a", "c"], ordered=True, name="kind"),
}


@pytest.mark.parametrize("index", INDEXES)
def test_pandas_frames(index: str, tmp_path: Path, denoise_file: DenoiseFile) -> None:
    frame = pd.DataFrame(
        {
            "small": pd.array([1, None] * 5, "Int8"),
            "flag": pd.array([True, None] * 5, "boolean"),
            "word": pd.Categorical(list("abcabcabca"), categories=["c", "unused", "b", "a"], ordered=True),
            "text": pd.array(["a", None] * 5, "string"),
            "when": pd.date_range("2024-10-26", periods=10, tz="Europe/Rome", unit="ns"),
            7: range(10),
            "image": [np.full(784, i, np.uint8) for i in range(10)],
        },
        index=INDEXES[index],
    )
    frame.columns = frame.columns.map(str)
    frame.to_parquet(tmp_path / "a.parquet", row_group_size=4)
    check(tmp_path / "a.parquet", denoise_file)
    done = denoise_file(tmp_path / "a.parquet", tmp_path, identity)
    out = pd.read_parquet(done.files[0])
    assert out.columns.tolist() == [*frame.columns, "denoised"]
    expected = pd.read_parquet(tmp_path / "a.parquet")
    pd.testing.assert_frame_equal(out.drop(columns="denoised"), expected)
    assert out.index.equals(frame.index)
    assert out.index.names == frame.index.names
    assert np.array_equal(np.stack(out["denoised"]), np.stack(frame["image"]))
