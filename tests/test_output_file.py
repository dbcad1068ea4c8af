"""Files count only when what stands on the disk is what was written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from denoise_batch.errors import DenoiseBatchError
from denoise_batch.images import encode
from denoise_batch.images.layouts import Layout, output_column
from denoise_batch.parquet import output_file
from denoise_batch.parquet.output_file import OutputFile, file_digest, without_dictionaries

if TYPE_CHECKING:
    from collections.abc import Callable

COLUMN = output_column(None, "image", Layout.BINARY, "uint8")


def _batch(rows: int, seed: int = 0) -> pa.RecordBatch:
    pixels = np.random.default_rng(seed).integers(0, 256, (rows, 784)).astype(np.uint8)
    names = pa.array([f"row {i}" for i in range(rows)])
    return pa.RecordBatch.from_arrays([names, encode(pixels, None, COLUMN)], names=["a.b", "image"])


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    batch, path = _batch(1000), tmp_path / "a.parquet"
    with OutputFile(path, batch.schema, [COLUMN], compression="zstd") as file:
        file.write(batch.slice(0, 400))
        file.write(batch.slice(400))
        written = file.finish()
    assert (written.rows, written.bytes) == (1000, path.stat().st_size)
    assert written.digest == file_digest(path)
    assert pq.read_table(path).equals(pa.Table.from_batches([batch]))


def test_short_slices_do_not_hold_what_they_were_cut_from(tmp_path: Path) -> None:
    """One good row in each chunk, all others set aside: the row group must not pin every chunk until it is full."""
    words = pa.array(["a", "b", "a"] * 1000).dictionary_encode()
    before = pa.total_allocated_bytes()
    schema, expected = None, []
    with OutputFile(
        tmp_path / "a.parquet", _batch(1).schema.append(pa.field("word", words.type)), [COLUMN], compression="zstd"
    ) as file:
        for number in range(20):
            batch = _batch(3000, seed=number)
            batch = pa.RecordBatch.from_arrays([*batch.columns, words], names=["a.b", "image", "word"])
            schema = batch.schema
            expected.append(batch.slice(7, 1).to_pylist()[0])
            file.write(batch.slice(7, 1))
            del batch
        assert pa.total_allocated_bytes() - before < 3000 * 784
        file.finish()
    assert schema is not None
    assert pq.read_table(tmp_path / "a.parquet").to_pylist() == expected


def _words(indices: list[int | None], words: list[str]) -> pa.Array:
    """Has a dictionary of its own, as each batch has that pyarrow reads."""
    return pa.DictionaryArray.from_arrays(pa.array(indices, pa.int16()), pa.array(words), ordered=True)


_OFFSETS = pa.array([0, 2, 2, None, 4], pa.int32())
NESTED: dict[str, Callable[[pa.Array], pa.Array]] = {
    "plain": lambda words: words,
    "struct": lambda words: pa.StructArray.from_arrays(
        [words, pa.array(range(4))], ["word", "other"], mask=pa.array([False, True, False, False])
    ),
    "list": lambda words: pa.ListArray.from_arrays(_OFFSETS, words),
    "large list": lambda words: pa.LargeListArray.from_arrays(_OFFSETS.cast(pa.int64()), words),
    "map": lambda words: pa.MapArray.from_arrays(_OFFSETS, pa.array(["a", "b", "c", "d"]), words),
    "fixed-size list": lambda words: pa.FixedSizeListArray.from_arrays(pa.concat_arrays([words, words]), 2),
    "list view": lambda words: pa.ListViewArray.from_arrays(
        pa.array([2, 0, 0, 1], pa.int32()), pa.array([2, 2, 0, 1], pa.int32()), words
    ),
    "list of structs": lambda words: pa.ListArray.from_arrays(_OFFSETS, NESTED["struct"](words)),
}


@pytest.mark.parametrize("kind", NESTED)
def test_a_shared_dictionary_makes_no_row_groups(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each batch has a copy of it, which may be larger than all of the batch's rows."""
    monkeypatch.setattr(output_file, "_ARRAY_BYTES", 0)
    monkeypatch.setattr(output_file, "_ROW_GROUP_BYTES", 20 << 10)  # less than the dictionary has
    words, path = [f"category {number:08}" for number in range(2000)], tmp_path / "a.parquet"
    columns = [NESTED[kind](_words([number, None, 1999, 0], words)) for number in range(50)]
    schema = pa.schema([("column", columns[0].type)], {"of": "me"})
    with OutputFile(path, schema, [], compression="zstd") as file:
        for column in columns:
            for batch in (column.slice(0, 1), column.slice(1)):
                file.write(pa.RecordBatch.from_arrays([batch], schema=schema))
        file.finish()
    with pq.ParquetFile(path) as written:
        assert written.num_row_groups == 1
        table = written.read()
    assert table.schema.metadata == {b"of": b"me"}
    assert table["column"].to_pylist() == [row for column in columns for row in column.to_pylist()]
    (_, found) = without_dictionaries(table.combine_chunks().to_batches()[0])
    assert [values.to_pylist() for values in found] == [words]


def test_dictionaries_that_differ_count_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_file, "_ROW_GROUP_BYTES", 100 << 10)
    path = tmp_path / "a.parquet"
    columns = [_words([0, 1], [f"category {number:04} {n:04}" for n in range(2000)]) for number in range(6)]
    schema = pa.schema([("column", columns[0].type)])
    with OutputFile(path, schema, [], compression="zstd") as file:
        for column in columns:
            file.write(pa.RecordBatch.from_arrays([column], schema=schema))
        file.finish()
    with pq.ParquetFile(path) as written:
        assert written.num_row_groups == 2  # of four dictionaries, the first of them free, and of two
        assert written.read()["column"].to_pylist() == [row for column in columns for row in column.to_pylist()]


@pytest.mark.parametrize("kind", NESTED)
def test_scattered_rows_are_one_batch(kind: str, tmp_path: Path) -> None:
    """Those that are set aside, and those between them."""
    words = [f"category {number:08}" for number in range(2000)]
    column = pa.concat_arrays([NESTED[kind](_words([number, None, 1999, 0], words)) for number in range(50)])
    batch = pa.RecordBatch.from_arrays([column], names=["column"])
    kept = np.flatnonzero(np.arange(200) % 3)
    path = tmp_path / "a.parquet"
    with OutputFile(path, batch.schema, [], compression="zstd") as file:
        for rows in (kept, kept[:0], np.arange(200)):
            file.write(batch, rows)
        assert [rows.num_rows for run in file._held for rows in run.batches] == [len(kept), 200]
        file.finish()
    expected = column.to_pylist()
    assert pq.read_table(path)["column"].to_pylist() == [expected[row] for row in kept] + expected


@pytest.mark.parametrize("type_", [pa.string_view(), pa.list_(pa.string_view())], ids=str)
def test_rows_of_views_hold_what_they_view_once(type_: pa.DataType, tmp_path: Path) -> None:
    """pyarrow takes no rows of them, and joins them with a copy of all buffers each."""
    words: list[Any] = [None if row % 7 == 1 else f"longer than a view, {row:06}" for row in range(3000)]
    column = pa.array(words if type_ == pa.string_view() else [word and [word] for word in words], type_)
    batch = pa.RecordBatch.from_arrays([column], names=["column"])
    with OutputFile(tmp_path / "a.parquet", batch.schema, [], compression="zstd") as file:
        file.write(batch, np.arange(0, 3000, 2))
        assert file._held_bytes < 2 * column.nbytes
        file.finish()
    assert pq.read_table(tmp_path / "a.parquet")["column"].to_pylist() == column.to_pylist()[::2]


def test_batches_of_one_row_count_what_arrow_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 100,000 files of one row: each takes a kilobyte a column, whatever is in it."""
    monkeypatch.setattr(output_file, "_ROW_GROUP_BYTES", 1 << 20)
    schema = pa.schema([("list", pa.list_(pa.int8())), *((f"c{number}", pa.int8()) for number in range(18))])
    batch = pa.RecordBatch.from_pylist([{}], schema)
    path = tmp_path / "a.parquet"
    with OutputFile(path, schema, [], compression="zstd") as file:
        for _ in range(150):
            file.write(batch)
        file.finish()
    with pq.ParquetFile(path) as written:
        assert [written.metadata.row_group(group).num_rows for group in range(3)] == [52, 52, 46]


def test_slices_share_a_dictionary(tmp_path: Path) -> None:
    """Those of a batch that is written in many pieces."""
    words = _words(list(range(3000)), [f"category {number:04}" for number in range(3000)])
    batch = pa.RecordBatch.from_arrays([words, _batch(3000).column(1)], names=["word", "image"])
    with OutputFile(tmp_path / "a.parquet", batch.schema, [COLUMN], compression="zstd") as file:
        before = pa.total_allocated_bytes()
        for row in range(0, 600, 2):
            file.write(batch.slice(row, 1))
        assert pa.total_allocated_bytes() - before < 1 << 20
        assert file.finish().rows == 300
    table = pq.read_table(tmp_path / "a.parquet")
    assert table["word"].to_pylist() == words.to_pylist()[:600:2]


def test_page_checksums_find_damage(tmp_path: Path) -> None:
    batch, path = _batch(100), tmp_path / "a.parquet"
    with OutputFile(path, batch.schema, [COLUMN], compression="none") as file:
        file.write(batch)
        file.finish()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(OSError, match="CRC"):
        pq.read_table(path, page_checksum_verification=True)


def test_an_image_column_has_neither_dictionary_nor_statistics(tmp_path: Path) -> None:
    batch, path = _batch(10), tmp_path / "a.parquet"
    with OutputFile(path, batch.schema, [COLUMN], compression="zstd") as file:
        file.write(batch)
        file.finish()
    with pq.ParquetFile(path) as file_:
        name, image = (file_.metadata.row_group(0).column(index) for index in range(2))
    assert (name.has_dictionary_page, name.is_stats_set) == (True, True)
    assert (image.has_dictionary_page, image.is_stats_set) == (False, False)


def test_row_groups_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_file, "_ROW_GROUP_ROWS", 100)
    batch, path = _batch(50), tmp_path / "a.parquet"
    with OutputFile(path, batch.schema, [COLUMN], compression="zstd") as file:
        for _ in range(5):
            file.write(batch)
        assert file.finish().rows == 250
    with pq.ParquetFile(path) as file_:
        assert [file_.metadata.row_group(i).num_rows for i in range(file_.num_row_groups)] == [100, 100, 50]


def test_a_disk_that_lies_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, path = _batch(10), tmp_path / "a.parquet"
    with OutputFile(path, batch.schema, [COLUMN], compression="zstd") as file:
        file.write(batch)
        monkeypatch.setattr(output_file, "file_digest", lambda _path: "another")
        with pytest.raises(DenoiseBatchError, match="not the one that was written"):
            file.finish()


def test_tensors_with_a_permutation_are_written(tmp_path: Path) -> None:
    tensor = pa.FixedShapeTensorArray.from_numpy_ndarray(np.zeros((5, 2, 2), np.float32))
    batch, path = pa.RecordBatch.from_arrays([tensor], names=["tensor"]), tmp_path / "a.parquet"
    with OutputFile(path, batch.schema, [], compression="zstd") as file:
        file.write(batch)
        assert file.finish().rows == 5


def test_a_name_is_never_used_twice(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"")
    with pytest.raises(FileExistsError):
        OutputFile(path, _batch(1).schema, [COLUMN], compression="zstd")


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    digests = set()
    for name in "ab":
        batch = _batch(500)
        with OutputFile(tmp_path / name, batch.schema, [COLUMN], compression="zstd") as file:
            file.write(batch)
            digests.add(file.finish().digest)
    assert len(digests) == 1


def test_a_folder_that_is_called_like_the_home_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~").mkdir()
    batch = _batch(10)
    with OutputFile(Path("~/out.parquet"), batch.schema, (), compression="zstd") as file:
        file.write(batch)
        assert file.finish().rows == 10
