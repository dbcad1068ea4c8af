"""Inputs → checked units: what is refused, and that units cover every row once."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from denoise_batch.errors import ColumnError, ParquetError
from denoise_batch.images import Polarity, Tone, encode
from denoise_batch.images.ink import Ink
from denoise_batch.images.layouts import Layout, output_column
from denoise_batch.inference import plan
from denoise_batch.inference.plan import Plan, make_plan
from denoise_batch.inference.unit_rows import read_unit
from denoise_batch.parquet import footers
from denoise_batch.parquet.footers import Footer
from denoise_batch.parquet.input_file import open_parquet
from denoise_batch.parquet.type_changes import difference
from denoise_batch.storage.listing import InputFile, list_inputs

if TYPE_CHECKING:
    from pathlib import Path


def digits(rows: int, layout: Layout = Layout.BINARY, dtype: str = "uint8", seed: int = 0) -> pa.Array:
    """Light strokes on a dark ground, as images of `rows` rows."""
    pixels = np.zeros((rows, 28, 28), np.uint8)
    pixels[:, 8:20, 10:18] = np.random.default_rng(seed).integers(100, 256, (rows, 12, 8))
    return encode(pixels.reshape(rows, 784), None, output_column(None, "image", layout, dtype))


def write(path: Path, rows: int, row_group: int = 1000, **columns: Any) -> Path:
    table = pa.table({"id": pa.array(range(rows)), "image": digits(rows), **columns})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=row_group)
    return path


def planned(*inputs: Path, column: str | None = None, polarity: Polarity = Polarity.AUTO) -> Plan:
    files = list_inputs([str(path) for path in inputs]).files
    return make_plan(files, column, polarity, "denoised")


@pytest.mark.usefixtures("footers_read_here")
@pytest.mark.parametrize("first", [None, b""])
def test_images_that_begin_late_are_found(first: bytes | None, tmp_path: Path) -> None:
    """The first rows, and the first file, hold none: the others say what the column has."""
    images = digits(500, Layout.ENCODED).cast(pa.binary())
    none = pa.array([first] * 100, pa.binary())
    for name, column in (("a", none), ("b", pa.concat_arrays([none, images])), ("c", images)):
        pq.write_table(pa.table({"image": column}), tmp_path / f"{name}.parquet", row_group_size=100)
    made = planned(tmp_path)
    assert made.column.layout is Layout.ENCODED
    assert made.polarity is Polarity.LIGHT_ON_DARK


@pytest.mark.usefixtures("footers_read_here")
def test_a_plan_says_what_was_found_and_survives_its_file(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.parquet", 300, 100)
    write(tmp_path / "in" / "k=v" / "b.parquet", 50)
    made = planned(tmp_path / "in")
    assert (made.rows, len(made), made.column.layout, made.polarity) == (350, 2, Layout.BINARY, Polarity.LIGHT_ON_DARK)
    made = replace(made, tone=Tone(0.1, Ink(tuple(np.full(25, 1 / 25)))))
    made.save(tmp_path)
    again = Plan.load(tmp_path)
    assert (again.files, again.column, again.polarity) == (made.files, made.column, made.polarity)
    assert again.tone == made.tone
    assert again.schema.equals(made.schema, check_metadata=True)
    assert [again.unit(i) for i in range(2)] == [made.unit(i) for i in range(2)]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 40), max_size=12), min_size=1, max_size=4),
    st.integers(1, 16),
)
def test_units_cover_every_row_once_in_order(groups: list[list[int]], most_pieces: int) -> None:
    plan_rows, plan.UNIT_ROWS = plan.UNIT_ROWS, 10
    try:
        units = plan._cut([Footer(b"", tuple(rows), 784) for rows in groups], most_pieces)
    finally:
        plan.UNIT_ROWS = plan_rows
    covered = []
    for file, first, last, skip, rows, start in zip(*(units[field] for field in plan._UNIT_FIELDS), strict=True):
        before_group = sum(groups[file][:first])
        assert start == before_group + skip
        assert skip + rows <= sum(groups[file][first : last + 1])
        assert rows <= 10 or (first == last and (most_pieces < 4 or groups[file][first] < 20))
        covered += [(file, row) for row in range(start, start + rows)]
    assert covered == [(file, row) for file, rows in enumerate(groups) for row in range(sum(rows))]


@pytest.mark.parametrize(
    ("groups", "rows"),
    [
        ([1000], [1000]),
        ([60_000], [15_000] * 4),  # MNIST: work for four workers
        ([65_536] * 4, [16_384] * 16),
        ([8_000] * 12, [16_000] * 6),
        ([1_048_576], [131_072] * 8),
        ([65_536] * 64, [131_072] * 25 + [65_536] * 10 + [32_768] * 2 + [21_846] * 2 + [21_844] + [16_384] * 8),
    ],
)
def test_units_are_small_in_a_small_input_and_towards_the_end(groups: list[int], rows: list[int]) -> None:
    assert plan._cut([Footer(b"", tuple(groups), 784)], plan._MOST_PIECES)["rows"].tolist() == rows


@pytest.mark.usefixtures("footers_read_here")
@pytest.mark.parametrize(
    ("layout", "pieces"), [(Layout.BINARY, 6), (Layout.ENCODED, 6), (Layout.LIST, 4), (Layout.TENSOR, 4)]
)
def test_one_row_group_is_work_for_several_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Layout, pieces: int
) -> None:
    monkeypatch.setattr(plan, "UNIT_ROWS", 50)
    monkeypatch.setattr(plan, "_SMALLEST_UNIT_ROWS", 50)
    pixels = np.frombuffer(digits(300).buffers()[1], np.uint8).reshape(300, 784)
    table = pa.table({"image": encode(pixels, None, output_column(None, "image", layout, "uint8"))})
    pq.write_table(table, tmp_path / "a.parquet")
    assert planned(tmp_path / "a.parquet").units["rows"].tolist() == [300 // pieces] * pieces


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(row_group=st.integers(1, 70), batch=st.integers(1, 50), unit_rows=st.integers(1, 40))
def test_reading_all_units_gives_the_file(
    tmp_path_factory: pytest.TempPathFactory, row_group: int, batch: int, unit_rows: int
) -> None:
    path = tmp_path_factory.mktemp("read") / "a.parquet"
    pq.write_table(pa.table({"id": pa.array(range(100))}), path, row_group_size=row_group)
    with pq.ParquetFile(path) as file:
        groups = tuple(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))
        plan_rows, plan.UNIT_ROWS = plan.UNIT_ROWS, unit_rows
        try:
            units = plan._cut([Footer(b"", groups, 784)], plan._MOST_PIECES)
        finally:
            plan.UNIT_ROWS = plan_rows
        ids = []
        for index in range(len(units["rows"])):
            unit = plan.Unit(index, **{field: int(units[field][index]) for field in plan._UNIT_FIELDS})
            for part in read_unit(file, unit, batch):
                assert part.num_rows <= batch
                ids += part["id"].to_pylist()
    assert ids == list(range(100))


def test_all_bad_files_are_named_at_once(tmp_path: Path) -> None:
    good = write(tmp_path / "in" / "good.parquet", 100)
    whole = good.read_bytes()
    (tmp_path / "in" / "empty.parquet").write_bytes(b"")
    (tmp_path / "in" / "text.parquet").write_bytes(b"not parquet at all, only text " * 9)
    (tmp_path / "in" / "truncated.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "in" / "footer.parquet").write_bytes(whole[:-60] + os.urandom(30) + whole[-30:])
    with pytest.raises(ParquetError) as error:
        planned(tmp_path / "in")
    for name in ("empty", "text", "truncated", "footer"):
        assert f"{name}.parquet" in error.value.message
    assert "good.parquet" not in error.value.message
    assert "\n" not in error.value.message


@pytest.mark.usefixtures("footers_read_here")
@pytest.mark.slow
def test_a_partition_named_like_the_new_column_is_refused(tmp_path: Path) -> None:
    (tmp_path / "denoised=1").mkdir()
    write(tmp_path / "denoised=1" / "a.parquet", 10)
    files = list_inputs([str(tmp_path)]).files
    for name in ("denoised", "Denoised"):  # DuckDB does not tell them apart
        with pytest.raises(ColumnError, match=r"partition folders denoised=…"):
            make_plan(files, None, Polarity.LIGHT_ON_DARK, name)
    assert make_plan(files, None, Polarity.LIGHT_ON_DARK, "clean").rows == 10


def test_samples_of_large_rows_are_small(tmp_path: Path) -> None:
    scans = pa.array([bytes(1 << 20)] * 200, pa.large_binary())
    write(tmp_path / "a.parquet", 200, scan=scans)
    (sample,) = footers.read_samples([(str(tmp_path / "a.parquet"), 0, ("image", "scan"))], 64)
    assert isinstance(sample, footers.Sample)
    assert sample.row_bytes > 1 << 20
    assert sample.table.num_rows < 10
    (sample,) = footers.read_samples([(str(tmp_path / "a.parquet"), 0, ("image",))], 64)
    assert isinstance(sample, footers.Sample)
    assert sample.table.column_names == ["image"]
    assert sample.row_bytes > 1 << 20


def test_files_that_differ_in_metadata_alone_share_a_schema(tmp_path: Path) -> None:
    for number in range(3):
        table = pq.read_table(write(tmp_path / f"{number}.parquet", 5))
        pq.write_table(table.replace_schema_metadata({"number": str(number)}), tmp_path / f"{number}.parquet")
    first, second, third = footers.read_footers([str(tmp_path / f"{n}.parquet") for n in range(3)], 1)
    assert isinstance(first, Footer)
    assert isinstance(second, Footer)
    assert isinstance(third, Footer)
    assert first.schema is second.schema is third.schema
    assert pa.ipc.read_schema(pa.py_buffer(third.schema)).metadata == {b"number": b"0"}


def test_types_that_arrow_does_not_carry_are_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", 2)
    with duckdb.connect() as connection:
        connection.execute(
            f"copy (select image, interval 3 days as pause, time with time zone '10:00:00+02' as shift, uuid() as id, "
            f"1.5::decimal(5, 1) as price, true as yes, [1, 2] as many from '{path}') to '{tmp_path}/b.parquet'"
        )
    made = make_plan(list_inputs([f"{tmp_path}/b.parquet"]).files, None, Polarity.LIGHT_ON_DARK, "denoised")
    assert [change.split()[1] for change in made.changes] == ["'pause':", "'shift':"]
    made.save(tmp_path)
    assert Plan.load(tmp_path).changes == made.changes


@pytest.mark.slow
def test_a_parser_that_crashes_or_hangs_names_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = write(tmp_path / "a.parquet", 10)
    # A child that dies at one file stands in for a footer that crashes its parser; the others are still read.
    script = tmp_path / "child.py"
    script.write_text(
        "import os, time\nimport denoise_batch.parquet.footers as f\nreal = f._read_footer\n"
        "def read(path):\n"
        "    if path.endswith('crash.parquet'): os.kill(os.getpid(), 11)\n"
        "    if path.endswith('hang.parquet'): time.sleep(60)\n"
        "    return real(path)\n"
        "f._read_footer = read\nf._main()\n"
    )
    real_popen = footers.subprocess.Popen
    monkeypatch.setattr(
        footers.subprocess, "Popen", lambda command, **options: real_popen([command[0], str(script)], **options)
    )
    monkeypatch.setattr(footers, "TIMEOUT_S", 6.0)
    paths = [str(good), str(tmp_path / "crash.parquet"), str(good), str(tmp_path / "hang.parquet"), str(good)]
    first, crashed, second, hung, third = footers.read_footers(paths, 1)
    assert isinstance(first, Footer)
    assert first == second == third
    assert isinstance(crashed, footers.Unreadable)
    assert "crashed (signal 11)" in crashed.reason
    assert isinstance(hung, footers.Unreadable)
    assert "did not answer" in hung.reason


def test_many_files_are_read_by_several_processes_in_order(tmp_path: Path) -> None:
    paths = []
    for number in range(30):
        path = tmp_path / f"{number:02d}.parquet"
        pq.write_table(pa.table({"id": list(range(number))}), path)
        paths.append(str(path))
    found = footers.read_footers(paths, 3)
    assert [footer.rows for footer in found if isinstance(footer, Footer)] == list(range(30))


@pytest.mark.usefixtures("footers_read_here")
def test_files_that_differ_are_named_with_their_difference(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", 10)
    write(tmp_path / "b.parquet", 10, extra=pa.array(range(10)))
    pq.write_table(pa.table({"image": digits(10)}), tmp_path / "c.parquet")
    pq.write_table(pa.table({"id": pa.array([1.5] * 10), "image": digits(10)}), tmp_path / "d.parquet")
    with pytest.raises(ParquetError) as error:
        planned(tmp_path)
    assert "b.parquet (column 'extra' is extra)" in error.value.message
    assert "c.parquet (column 'id' is missing)" in error.value.message
    assert "d.parquet (column 'id' is double, not int64)" in error.value.message


@pytest.mark.usefixtures("footers_read_here")
def test_metadata_may_differ_between_files(tmp_path: Path) -> None:
    table = pa.table({"image": digits(10)})
    pq.write_table(table.replace_schema_metadata({"pandas": "a"}), tmp_path / "a.parquet")
    pq.write_table(table.replace_schema_metadata({"pandas": "b"}), tmp_path / "b.parquet")
    assert planned(tmp_path).rows == 20


@pytest.mark.usefixtures("footers_read_here")
def test_columns_that_are_missing_taken_or_unclear_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", 10)
    with pytest.raises(ColumnError, match="no column 'scan'") as missing:
        planned(path, column="scan")
    assert "id, image" in missing.value.hint
    two = tmp_path / "two.parquet"
    pq.write_table(pa.table({"left": digits(10), "right": digits(10)}), two)
    with pytest.raises(ColumnError, match=r"left.*right|right.*left"):
        planned(two)
    assert planned(two, column="right").column.name == "right"
    taken = write(tmp_path / "taken.parquet", 10, denoised=pa.array(range(10)))
    with pytest.raises(ColumnError, match=r"has a column 'denoised' already$"):
        planned(taken)
    alike = write(tmp_path / "alike.parquet", 10, Denoised=pa.array(range(10)))
    with pytest.raises(ColumnError, match=r"has a column 'Denoised' already, .* from 'denoised'") as case:
        planned(alike)
    assert "--output-column" in case.value.hint


@pytest.mark.usefixtures("footers_read_here")
@pytest.mark.parametrize(
    "type_",
    [
        pa.list_(pa.int8(), 0),
        pa.struct([("a", pa.int8()), ("b", pa.large_list(pa.list_(pa.string(), 0)))]),
        pa.map_(pa.string(), pa.list_(pa.int8(), 0)),
        pa.fixed_shape_tensor(pa.int8(), (3, 0)),
    ],
)
def test_lists_of_the_fixed_size_0_are_refused(type_: pa.DataType, tmp_path: Path) -> None:
    storage = type_.storage_type if isinstance(type_, pa.BaseExtensionType) else type_
    empty = pa.array([None] * 10, storage)
    path = write(tmp_path / "a.parquet", 10, none=empty if storage is type_ else type_.wrap_array(empty))
    with pytest.raises(ColumnError, match=r"^column 'none' is .* lists of the fixed size 0: ") as caught:
        planned(path)
    assert "drop the column" in caught.value.hint


@pytest.mark.usefixtures("footers_read_here")
def test_floats_that_look_like_bytes_are_refused(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (10, 784)).astype(np.float32)
    image = encode(pixels, None, output_column(None, "image", Layout.LIST, "float32"))
    pq.write_table(pa.table({"image": image}), tmp_path / "a.parquet")
    with pytest.raises(ColumnError, match="values up to 255"):
        planned(tmp_path / "a.parquet")


@pytest.mark.usefixtures("footers_read_here")
@pytest.mark.parametrize("layout", [Layout.BINARY, Layout.LIST])
def test_bytes_of_a_mask_are_refused(tmp_path: Path, layout: Layout) -> None:
    """0 and 1 of 255 would come out as good as black, and be expected to be right."""
    drawn = np.frombuffer(digits(100).buffers()[1], np.uint8).reshape(100, 784) > 127
    column = output_column(None, "image", layout, "uint8")
    pq.write_table(pa.table({"image": encode(drawn.astype(np.uint8), None, column)}), tmp_path / "a.parquet")
    with pytest.raises(ColumnError, match=r"no value above 1, but uint8 is taken as 0\.\.255"):
        planned(tmp_path / "a.parquet", polarity=Polarity.LIGHT_ON_DARK)
    pq.write_table(pa.table({"image": encode(np.zeros_like(drawn, np.uint8), None, column)}), tmp_path / "a.parquet")
    assert planned(tmp_path / "a.parquet", polarity=Polarity.LIGHT_ON_DARK).rows == 100


@pytest.mark.usefixtures("footers_read_here")
def test_dark_digits_on_light_are_found(tmp_path: Path) -> None:
    pixels = 255 - np.frombuffer(digits(100).buffers()[1], np.uint8).reshape(100, 784)
    image = encode(pixels, None, output_column(None, "image", Layout.BINARY, "uint8"))
    pq.write_table(pa.table({"image": image}), tmp_path / "a.parquet")
    assert planned(tmp_path / "a.parquet").polarity is Polarity.DARK_ON_LIGHT
    assert planned(tmp_path / "a.parquet", polarity=Polarity.LIGHT_ON_DARK).polarity is Polarity.LIGHT_ON_DARK


@pytest.mark.usefixtures("footers_read_here")
def test_polarity_is_not_guessed_where_no_image_was_seen(tmp_path: Path) -> None:
    image = pa.concat_arrays([pa.nulls(1024, pa.binary(784)), digits(1000)])
    pq.write_table(pa.table({"image": image}), tmp_path / "a.parquet")
    with pytest.raises(ColumnError, match="polarity is not known"):
        planned(tmp_path / "a.parquet")
    assert planned(tmp_path / "a.parquet", polarity=Polarity.DARK_ON_LIGHT).polarity is Polarity.DARK_ON_LIGHT


@pytest.mark.usefixtures("footers_read_here")
def test_a_row_weighs_what_it_takes_in_memory(tmp_path: Path) -> None:
    text = pa.array(["x" * 100_000] * 100)  # one entry of a dictionary in the file
    assert planned(write(tmp_path / "a.parquet", 100, text=text)).files[0].row_bytes > 100_000


def test_times_beyond_nanoseconds_are_kept(tmp_path: Path) -> None:
    far = pa.array([253402214400000000] * 10, pa.timestamp("us"))  # 9999-12-31, Spark's endless
    table = pa.table({"image": digits(10), "until": far})
    pq.write_table(table, tmp_path / "a.parquet", use_deprecated_int96_timestamps=True)
    made = planned(tmp_path / "a.parquet")
    assert made.schema.field("until").type == pa.timestamp("us")
    with open_parquet(str(tmp_path / "a.parquet")) as file:
        assert file.read()["until"].equals(pa.chunked_array([far]))


@pytest.mark.usefixtures("footers_read_here")
def test_zero_rows_plan_no_units(tmp_path: Path) -> None:
    made = planned(write(tmp_path / "a.parquet", 0))
    assert (len(made), made.rows) == (0, 0)


def test_very_many_columns_are_checked_in_a_moment() -> None:
    schema = pa.schema([pa.field(f"column {index}", pa.int8()) for index in range(10_000)])
    begun = time.process_time()
    plan._check_columns(schema, [InputFile("a.parquet", "", 1, 1)], "column 7", ["denoised"])
    assert "is missing" in difference(schema, schema.remove(9_999))
    assert time.process_time() - begun < 3.0  # not a look at all of them for each
