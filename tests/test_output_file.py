"""Files count only when what stands on the disk is what was written."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from denoise_batch import output_file
from denoise_batch.errors import DenoiseBatchError
from denoise_batch.images import encode
from denoise_batch.images.layouts import Layout, output_column
from denoise_batch.output_file import OutputFile, file_digest

if TYPE_CHECKING:
    from pathlib import Path

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
