"""Row groups that are copied from file to file: every byte where the new footer says it is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from denoise_batch.errors import DenoiseBatchError
from denoise_batch.images import encode
from denoise_batch.images.layouts import Layout, output_column
from denoise_batch.inference import merging
from denoise_batch.inference.run_folder import DATA
from denoise_batch.parquet import row_groups
from denoise_batch.parquet.output_file import OutputFile, file_digest
from denoise_batch.parquet.row_groups import Part, SchemasDifferError, join_row_groups
from denoise_batch.parquet.thrift import I16, I64, DamagedError, TooShortError, read_fields, written_fields

if TYPE_CHECKING:
    from pathlib import Path

    from denoise_batch.inference.run_folder import RunFolder

IMAGE, DENOISED = (output_column(None, name, Layout.BINARY, "uint8") for name in ("image", "denoised"))
WORDS = ["a", "b", "déjà vu"]

# Writers of all kinds: what stands in a footer, and between row groups and footer, differs.
WRITERS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "no statistics": {"write_statistics": False, "use_dictionary": False},
    "page index": {"write_page_index": True, "write_page_checksum": True},
    "version 2": {"data_page_version": "2.0", "version": "1.0", "compression": "gzip"},
    "sorted": {"sorting_columns": [pq.SortingColumn(0, descending=True)], "compression": "none"},
}


def _table(rows: int, start: int = 0) -> pa.Table:
    rng = np.random.default_rng(start)
    columns: dict[str, Any] = {
        "id": pa.array(range(start, start + rows), pa.int64()),
        "image": encode(rng.integers(0, 256, (rows, 784)).astype(np.uint8), None, IMAGE),
        "word": pa.array([WORDS[(start + row) % 3] if row % 5 else None for row in range(rows)], pa.string()),
        "tags": pa.array([[float(row)] * (row % 3) for row in range(rows)], pa.list_(pa.float64())),
    }
    columns |= {f"more {number}": pa.array([number] * rows, pa.int64()) for number in range(20)}
    return pa.table(columns).replace_schema_metadata({"from": str(start)})


def _part(path: Path) -> Part:
    return Part(path, file_digest(path))


def _written(folder: Path, sizes: list[int], **options: Any) -> tuple[list[Part], pa.Table]:
    tables, parts, start = [], [], 0
    for number, rows in enumerate(sizes):
        tables.append(_table(rows, start))
        start += rows
        path = folder / f"{number}.parquet"
        pq.write_table(tables[-1], path, row_group_size=100, **options)
        parts.append(_part(path))
    return parts, pa.concat_tables([table.replace_schema_metadata(tables[0].schema.metadata) for table in tables])


def _bytes_of_footer(path: Path) -> bytes:
    content = path.read_bytes()
    length = int.from_bytes(content[-8:-4], "little")
    return content[-8 - length : -8]


@pytest.mark.parametrize("options", WRITERS.values(), ids=WRITERS)
def test_a_footer_that_is_read_and_written_is_the_same(tmp_path: Path, options: Any) -> None:
    pq.write_table(_table(230), tmp_path / "a.parquet", row_group_size=10, **options)
    content = _bytes_of_footer(tmp_path / "a.parquet")
    fields, end = read_fields(content, lists=True)
    assert end == len(content)
    assert written_fields(fields) == content
    with pytest.raises(DamagedError):  # page headers have no lists
        read_fields(content)
    for length in (0, 1, 2, 7, 20, len(content) // 2, len(content) - 1):
        with pytest.raises(TooShortError):
            read_fields(content[:length], lists=True)


@pytest.mark.parametrize("options", WRITERS.values(), ids=WRITERS)
def test_row_groups_are_read_as_before(tmp_path: Path, options: Any) -> None:
    parts, table = _written(tmp_path, [250, 100, 0, 1], **options)
    target = tmp_path / "joined"
    written = join_row_groups(parts, target)
    assert (written.rows, written.bytes, written.digest) == (351, target.stat().st_size, file_digest(target))
    read = pq.read_table(target, page_checksum_verification=True)
    assert read.equals(table)
    assert read.schema.equals(pq.read_schema(parts[0].path), check_metadata=True)
    metadata, others = pq.read_metadata(target), [pq.read_metadata(part.path) for part in parts]
    groups = [other.row_group(index) for other in others for index in range(other.num_row_groups)]
    assert [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)] == [100, 100, 50, 100, 0, 1]
    assert [metadata.row_group(i).sorting_columns for i in range(6)] == [group.sorting_columns for group in groups]
    for index, group in enumerate(groups):
        for column in range(group.num_columns):
            ours, theirs = metadata.row_group(index).column(column), group.column(column)
            assert ours.statistics == theirs.statistics


def test_every_number_of_a_place_is_moved(tmp_path: Path) -> None:
    parts, _ = _written(tmp_path, [150, 150], write_page_index=True)
    before = [_places(part.path) for part in parts]
    contents = [part.path.read_bytes() for part in parts]
    join_row_groups(parts, tmp_path / "joined")
    after, content = _places(tmp_path / "joined"), (tmp_path / "joined").read_bytes()
    assert len(after) == sum(map(len, before)) > 100
    origins = [(number, place) for number, places in enumerate(before) for place in places]
    for (number, origin), place in zip(origins, after, strict=True):
        assert content[place : place + 16] == contents[number][origin : origin + 16]


def _groups(path: Path) -> list[Any]:
    groups: list[Any] = read_fields(_bytes_of_footer(path), lists=True)[0][4][1][1]
    return groups


def _places(path: Path) -> list[int]:
    found = []
    for group in _groups(path):
        found.append(group[5][1])
        for chunk in group[1][1][1]:
            found += [chunk[3][1][number][1] for number in (9, 11) if number in chunk[3][1]]
    return found


def test_what_would_be_wrong_in_another_file_goes(tmp_path: Path) -> None:
    """Numbers of row groups, and page indexes: they say where in the file pages are, in bytes that are copied."""
    parts, _ = _written(tmp_path, [150], write_page_index=True)
    (group, _) = _groups(parts[0].path)
    group[7] = (I16, 0)
    assert {4, 5, 6, 7} <= group[1][1][1][0].keys()
    row_groups._move(group, 1000)
    assert 7 not in group
    assert all(not {4, 5, 6, 7} & chunk.keys() for chunk in group[1][1][1])


def test_a_part_that_is_not_what_was_committed(tmp_path: Path) -> None:
    parts, _ = _written(tmp_path, [100, 100])
    content = parts[1].path.read_bytes()
    rng = np.random.default_rng(0)
    flipped = [*rng.integers(0, len(content), 40).tolist(), *range(len(content) - 40, len(content))]
    damaged = [content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :] for at in flipped]
    for number, wrong in enumerate([b"", b"PAR1", content[:-1], content + b"\0", *damaged]):
        parts[1].path.write_bytes(wrong)
        with pytest.raises(DenoiseBatchError, match=r"1\.parquet: the file is no longer the one that a worker wrote"):
            join_row_groups(parts, tmp_path / f"joined {number}")
        with pytest.raises(DenoiseBatchError, match=r"1\.parquet: the file is no longer the one that a worker wrote"):
            merging.join(parts, tmp_path / "rewritten", IMAGE, DENOISED, "zstd")
        for left in (tmp_path / f"joined {number}", tmp_path / "rewritten"):
            with pytest.raises(pa.ArrowInvalid):  # no Parquet file
                pq.read_metadata(left)


def test_other_schemas_are_refused(tmp_path: Path) -> None:
    parts, table = _written(tmp_path, [100])
    for number, (other, fits) in enumerate(
        [
            (table.replace_schema_metadata({"another": "one"}), True),
            (table.cast(pa.schema([f.with_metadata({"PARQUET:field_id": "7"}) for f in table.schema])), True),
            (table.cast(pa.schema([f.with_nullable(f.name != "id") for f in table.schema])), False),
            (table.rename_columns([f"{name}." for name in table.column_names]), False),
        ]
    ):
        pq.write_table(other, tmp_path / "other.parquet")
        both, target = [*parts, _part(tmp_path / "other.parquet")], tmp_path / f"joined {number}"
        if fits:
            assert join_row_groups(both, target).rows == 200
        else:
            with pytest.raises(SchemasDifferError):
                join_row_groups(both, target)


@pytest.mark.parametrize("content", [b"\x19\xf3\xff\xff\xff\xff\x7f", b"\x19" * 5000 + b"\0", b"\x18\xff\x01a\0"])
def test_lists_without_end_are_refused(content: bytes) -> None:
    with pytest.raises((DamagedError, TooShortError)):
        read_fields(content, lists=True)


def test_numbers_below_zero_and_far_apart() -> None:
    fields = {1: (I64, -1), 200: (I64, -(1 << 63)), 201: (I64, (1 << 63) - 1), 7: (I64, 0)}
    assert read_fields(written_fields(fields)) == (fields, len(written_fields(fields)))


# --- which are copied, and which rewritten -------------------------------------------------------------------------


def _run(folder: Path, tables: list[pa.Table]) -> RunFolder:
    """What a run's merging looks at, of units that were written as workers do it."""
    staging, receipts = folder / "staging", {}
    staging.mkdir()
    for number, table in enumerate(tables):
        path = staging / f"{number}.1"
        with OutputFile(path, table.schema, (IMAGE, DENOISED), compression="zstd") as file:
            file.write(table.to_batches()[0])
            done = file.finish()
        receipts[number] = SimpleNamespace(file=path.name, digest=done.digest, bytes=done.bytes, rows_out=done.rows)
    plan_of: dict[str, Any] = {"__len__": lambda _: len(tables), "column": IMAGE, "schema": tables[0].schema}
    plan = type("Plan", (), {**plan_of, "files": ()})()
    ledger = SimpleNamespace(receipts=receipts, rows_out=sum(map(len, tables)))
    run = SimpleNamespace(plan=plan, ledger=ledger, staging=staging, built=folder / "built", out=folder / "out")
    return cast("RunFolder", run)


def _unit(rows: int, start: int, **columns: Any) -> pa.Table:
    table = _table(rows, start).select(["id", "image", "word"])
    for name, column in columns.items():
        table = table.append_column(name, column)
    return table.append_column("denoised", table["image"])


@pytest.mark.slow
def test_only_small_parts_are_rewritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "_SMALL_ROWS", 50)
    sizes = [10, 20, 60, 30, 70, 80, 20, 10, 5]
    starts = np.cumsum([0, *sizes]).tolist()
    tables = [_unit(rows, start) for rows, start in zip(sizes, starts, strict=False)]
    for number, (small_bytes, groups) in enumerate([(4 << 20, [30, 60, 30, 70, 80, 35]), (0, sizes)]):
        monkeypatch.setattr(merging, "_SMALL_BYTES", small_bytes)
        folder = tmp_path / str(number)
        folder.mkdir()
        run = _run(folder, tables)
        for _ in range(2):  # a run that was killed right behind it does it again
            written = merging.merge(run, DENOISED, "zstd")
        assert [path.name for path in run.built.iterdir()] == [DATA]
        file = pq.ParquetFile(run.built / DATA)
        assert [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)] == groups
        assert file.read().equals(pa.concat_tables([t.replace_schema_metadata() for t in tables]))
        assert file.schema_arrow.metadata == {b"from": b"0"}
        assert (written.rows, written.digest) == (sum(sizes), file_digest(run.built / DATA))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["all small", "nested dictionaries", "other schemas"])
def test_what_cannot_be_copied_is_rewritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(merging, "_SMALL_ROWS", 1000 if kind == "all small" else 0)
    if kind == "nested dictionaries":
        words = [pa.array([[word] for word in WORDS[number:]]).cast(_NESTED) for number in range(2)]
        tables = [_unit(len(column), 3 * number, words=column) for number, column in enumerate(words)]
    else:
        tables = [_unit(40, 0), _unit(40, 40)]
    if kind == "other schemas":  # planning refuses such: only to be sure
        fields = [field.with_nullable(field.name != "id") for field in tables[1].schema]
        tables[1] = tables[1].cast(pa.schema(fields))
    run = _run(tmp_path, tables)
    merging.merge(run, DENOISED, "zstd")
    read = pq.read_table(run.built / DATA)
    assert read.to_pylist() == [row for table in tables for row in table.to_pylist()]
    assert pq.read_metadata(run.built / DATA).num_row_groups == 1
    assert [path.name for path in run.built.iterdir()] == [DATA]


_NESTED = pa.list_(pa.dictionary(pa.int32(), pa.string()))


@pytest.mark.slow
def test_the_joined_files_rows_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "_SMALL_ROWS", 0)
    run = _run(tmp_path, [_unit(40, 0), _unit(40, 40)])
    monkeypatch.setattr(run.ledger, "rows_out", 81)
    with pytest.raises(DenoiseBatchError, match="receipts say 81 rows, the joined file has 80"):
        merging.merge(run, DENOISED, "zstd")
