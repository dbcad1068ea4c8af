"""The degradation over Parquet: what is kept, what a seed fixes, and that the output is whole or not there."""

from __future__ import annotations

import json
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from bad_files import lying, parquet
from bad_files import table as foreign_table

from denoise_batch.corrupt import BLOCK, CorruptSettings, corrupt, degrade_rows
from denoise_batch.digits import draw_digits
from denoise_batch.errors import (
    ColumnError,
    DataChanged,
    DenoiseBatchError,
    FlagError,
    MissingFileError,
    OutputError,
    ParquetError,
    ResourceExhausted,
    Terminated,
)
from denoise_batch.images import Layout, decode, find_image_column
from denoise_batch.noise import NoiseRecipe, blur
from denoise_batch.parquet import output_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("footers_read_here")

KINDS = (
    "binary",
    "variable binary",
    "list of uint8",
    "list of float32",
    "fixed list of float32",
    "tensor",
    "encoded",
)
"""The fixture `write_images` knows these."""


def run(source: Path | str, out: Path, **options: Any) -> pa.Table:
    corrupt(CorruptSettings((str(source),), out, **options))
    return pq.read_table(out, page_checksum_verification=True)


def pixels(table: pa.Table, name: str = "image") -> np.ndarray:
    return decode(table.column(name), find_image_column(table.schema, name, table)).pixels


@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_is_read_and_its_column_kept(tmp_path: Path, digits: Any, write_images: Any, kind: str) -> None:
    images, labels = digits
    source = write_images(tmp_path / "in.parquet", images, kind, column="digit", label=pa.array(labels))
    before = pq.read_table(source)
    table = run(source, tmp_path / "out.parquet")
    assert table.column_names == ["image", "clean", "label", "sigma", "noise"]
    assert table["clean"].equals(before["digit"])
    assert table.schema.field("clean").type == before.schema.field("digit").type
    assert table["label"].equals(before["label"])
    assert table.schema.field("image").type == pa.list_(pa.float32(), 784)
    np.testing.assert_array_equal(pixels(table), pixels(run(source, tmp_path / "again.parquet")))


def test_the_noise_is_the_seeds(tmp_path: Path, digits: Any, write_images: Any) -> None:
    images, _ = digits
    table = run(write_images(tmp_path / "in.parquet", images), tmp_path / "out.parquet")
    sigma, half_range = table["sigma"].to_numpy(), table["noise"].to_numpy()
    assert sigma.dtype == half_range.dtype == np.float32
    assert 0 <= sigma.min() < 0.1
    assert 1.9 < sigma.max() <= 2
    assert 0.01 <= half_range.min() < 0.1
    assert 1.4 < half_range.max() <= 1.5
    clean = torch.from_numpy(images.astype(np.float32) / np.float32(255))
    added = pixels(table) - blur(clean, torch.from_numpy(sigma.copy())).view(-1, 784).numpy()
    assert (np.abs(added) <= half_range[:, None] + 1e-5).all()
    # 784 uniform values in [-r, r): mean 0, standard deviation r / sqrt(3).
    assert np.abs(added.std(axis=1) / half_range - 3**-0.5).max() < 0.06


def test_rows_do_not_depend_on_files_row_groups_or_rows_after_them(tmp_path: Path, write_images: Any) -> None:
    images, _ = draw_digits(2 * BLOCK + 77, seed=1)
    whole = pixels(run(write_images(tmp_path / "whole.parquet", images), tmp_path / "a.parquet"))
    small_groups = write_images(tmp_path / "groups.parquet", images, row_group_size=190)
    np.testing.assert_array_equal(whole, pixels(run(small_groups, tmp_path / "b.parquet")))
    folder = tmp_path / "folder"
    folder.mkdir()
    for index, start in enumerate(range(0, len(images), 333)):
        write_images(folder / f"{index:03d}.parquet", images[start : start + 333])
    np.testing.assert_array_equal(whole, pixels(run(folder, tmp_path / "c.parquet")))
    short = write_images(tmp_path / "short.parquet", images[: BLOCK + 5])
    np.testing.assert_array_equal(whole[: BLOCK + 5], pixels(run(short, tmp_path / "d.parquet")))


def test_another_seed_gives_other_noise(tmp_path: Path, digits: Any, write_images: Any) -> None:
    source = write_images(tmp_path / "in.parquet", digits[0])
    first, second = (pixels(run(source, tmp_path / f"{seed}.parquet", seed=seed)) for seed in (0, 1))
    assert not np.array_equal(first, second)
    # Nothing of one seed's stream appears in the other's.
    assert abs(np.corrcoef((first - first.mean()).ravel(), (second - second.mean()).ravel())[0, 1]) < 0.5


def test_fixed_levels(tmp_path: Path, digits: Any, write_images: Any) -> None:
    source = write_images(tmp_path / "in.parquet", digits[0])
    table = run(source, tmp_path / "out.parquet", sigma=(0.0, 0.0), half_range=(0.0, 0.0))
    np.testing.assert_allclose(pixels(table), digits[0].reshape(-1, 784) / np.float32(255), atol=1e-6)


def test_uint8_is_clipped_and_binary(tmp_path: Path, digits: Any, write_images: Any) -> None:
    source = write_images(tmp_path / "in.parquet", digits[0])
    table = run(source, tmp_path / "out.parquet", dtype="uint8")
    assert table.schema.field("image").type == pa.binary(784)
    assert find_image_column(table.schema, None, table).layout is Layout.BINARY
    floats = pixels(run(source, tmp_path / "floats.parquet"))
    assert floats.min() < -0.5
    assert floats.max() > 1.5
    np.testing.assert_array_equal(pixels(table), np.rint(floats.clip(0, 1) * 255).astype(np.uint8))


def test_bad_rows_stay_as_nulls(tmp_path: Path, digits: Any, write_images: Any) -> None:
    bad = np.zeros(300, np.bool_)
    bad[[0, 7, 299]] = True
    source = write_images(tmp_path / "in.parquet", digits[0], bad=bad)
    report = corrupt(CorruptSettings((str(source),), tmp_path / "out.parquet"))
    assert (report.rows, report.bad_rows) == (300, 3)
    table = pq.read_table(tmp_path / "out.parquet")
    for name in ("image", "clean", "sigma", "noise"):
        np.testing.assert_array_equal(table[name].is_null().to_numpy(), bad)


def test_what_was_done_stands_in_the_metadata(tmp_path: Path, digits: Any, write_images: Any) -> None:
    source = write_images(tmp_path / "in.parquet", digits[0])
    metadata = run(source, tmp_path / "out.parquet", seed=9, sigma=(1.0, 1.5)).schema.metadata
    note = json.loads(metadata[b"denoise_batch"])
    assert note == {"command": "corrupt", "seed": 9, "sigma": [1.0, 1.5], "noise": [0.01, 1.5]}


def test_other_metadata_and_nested_columns_survive(tmp_path: Path, digits: Any, write_images: Any) -> None:
    extra = pa.array([{"a.b": [index, None], "c": None} for index in range(300)])
    source = write_images(tmp_path / "in.parquet", digits[0], nested=extra)
    before = pq.read_table(source).replace_schema_metadata({"mine": "kept"})
    pq.write_table(before, source)
    table = run(source, tmp_path / "out.parquet")
    assert table["nested"].equals(before["nested"])
    assert table.schema.metadata[b"mine"] == b"kept"


@pytest.mark.parametrize("column", ["image", "scan"])
def test_notes_of_the_columns_follow_them(column: str, tmp_path: Path, digits: Any, write_images: Any) -> None:
    source = write_images(tmp_path / "in.parquet", digits[0], column=column, label=pa.array(digits[1]))
    label, image = {"names": ["no", "yes"], "_type": "ClassLabel"}, {"mode": "L", "_type": "Image"}
    features = {column: image, "label": label, "gone": {"dtype": "int8", "_type": "Value"}}
    spark = [{"name": name, "type": kind} for name, kind in ((column, "binary"), ("label", "short"))]
    entries = [{"name": name, "field_name": name, "pandas_type": "x"} for name in (column, "label")]
    notes = {
        "huggingface": {"info": {"features": features}},
        "pandas": {"index_columns": [], "column_indexes": [], "columns": entries},
        "org.apache.spark.sql.parquet.row.metadata": {"type": "struct", "fields": spark},
    }
    before = pq.read_table(source)
    pq.write_table(before.replace_schema_metadata({key: json.dumps(note) for key, note in notes.items()}), source)
    table = run(source, tmp_path / "out.parquet")
    found = {key: json.loads(table.schema.metadata[key.encode()]) for key in notes}
    number = {"dtype": "float32", "_type": "Value"}
    kept = {"clean": image, "label": label, "sigma": number, "noise": number}
    assert found["huggingface"] == {"info": {"features": kept}}
    listed = (found["pandas"]["columns"], found["org.apache.spark.sql.parquet.row.metadata"]["fields"])
    for columns in listed:
        assert [entry["name"] for entry in columns] == table.column_names
    assert listed[0][1] == {"name": "clean", "field_name": "clean", "pandas_type": "x"}
    assert listed[1][1] == {"name": "clean", "type": "binary"}


def test_files_that_differ_in_arrows_types_alone(tmp_path: Path, digits: Any, write_images: Any) -> None:
    words = ["a", None, "b"] * 100
    (tmp_path / "in").mkdir()
    for name, kind in (("a", pa.string()), ("b", pa.large_string())):
        write_images(tmp_path / "in" / f"{name}.parquet", digits[0], word=pa.array(words, kind))
    table = run(tmp_path / "in", tmp_path / "out.parquet")
    assert table.schema.field("word").type == pa.large_string()
    assert table["word"].to_pylist() == words * 2


@pytest.mark.parametrize("name", ["out.csv", "out.PNG"])
def test_a_name_of_another_format_is_refused(name: str, tmp_path: Path, digits: Any, write_images: Any) -> None:
    with pytest.raises(OutputError, match="what is written is Parquet, whatever the name says"):
        run(write_images(tmp_path / "in.parquet", digits[0]), tmp_path / name)


def test_no_rows(tmp_path: Path, digits: Any, write_images: Any) -> None:
    table = run(write_images(tmp_path / "in.parquet", digits[0][:0]), tmp_path / "out.parquet")
    assert len(table) == 0
    assert table.column_names == ["image", "clean", "sigma", "noise"]


def test_progress_reaches_the_end(tmp_path: Path, digits: Any, write_images: Any) -> None:
    told: list[tuple[int, int]] = []
    source = write_images(tmp_path / "in.parquet", digits[0])
    corrupt(CorruptSettings((str(source),), tmp_path / "out.parquet"), lambda done, total: told.append((done, total)))
    assert told[-1] == (300, 300)


def test_an_existing_output_is_refused_and_replaced_on_request(tmp_path: Path, digits: Any, write_images: Any) -> None:
    source, out = write_images(tmp_path / "in.parquet", digits[0]), tmp_path / "out.parquet"
    out.write_text("precious")
    with pytest.raises(OutputError, match="exists"):
        run(source, out)
    assert out.read_text() == "precious"
    assert len(run(source, out, overwrite=True)) == 300
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.parquet", "out.parquet"]


def test_a_failure_leaves_nothing(tmp_path: Path, digits: Any, write_images: Any) -> None:
    source, out = write_images(tmp_path / "in.parquet", digits[0]), tmp_path / "out.parquet"

    def stop(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        corrupt(CorruptSettings((str(source),), out), stop)
    assert [path.name for path in tmp_path.iterdir()] == ["in.parquet"]


def test_requests_that_cannot_be_met(tmp_path: Path, digits: Any, write_images: Any) -> None:
    source = write_images(tmp_path / "in.parquet", digits[0])
    with pytest.raises(MissingFileError, match="absent"):
        run(tmp_path / "absent.parquet", tmp_path / "out.parquet")
    with pytest.raises(OutputError, match="is, or holds, the input"):
        run(source, source, overwrite=True)
    with pytest.raises(OutputError, match="is a folder"):
        run(source, tmp_path, overwrite=True)
    with pytest.raises(OutputError, match="not a writable folder"):
        run(source, source / "out.parquet")
    with pytest.raises(OutputError, match="not a local path"):
        corrupt(CorruptSettings((str(source),), "s3://bucket/out.parquet"))  # type: ignore[arg-type]
    with pytest.raises(ColumnError, match="absent"):
        run(source, tmp_path / "out.parquet", column="absent")
    with pytest.raises(FlagError, match="--seed -1"):
        run(source, tmp_path / "out.parquet", seed=-1)
    (tmp_path / "text.parquet").write_text("not Parquet")
    with pytest.raises(ParquetError, match=r"text\.parquet"):
        run(tmp_path / "text.parquet", tmp_path / "out.parquet")
    taken = write_images(tmp_path / "taken.parquet", digits[0], sigma=pa.nulls(300, pa.float32()))
    with pytest.raises(ColumnError, match="'sigma'"):
        run(taken, tmp_path / "out.parquet")
    taken = write_images(tmp_path / "taken.parquet", digits[0], clean=pa.nulls(300))
    with pytest.raises(ColumnError, match="'clean'"):
        run(taken, tmp_path / "out.parquet")
    for name in ("Clean", "SIGMA", "Noise"):
        taken = write_images(tmp_path / "taken.parquet", digits[0], **{name: pa.nulls(300, pa.float32())})
        with pytest.raises(ColumnError, match=f"column '{name}', which .* as '{name.lower()}'") as caught:
            run(taken, tmp_path / "out.parquet")
        assert caught.value.hint == f"rename or drop the column '{name}'"
    assert not (tmp_path / "out.parquet").exists()


def test_what_one_file_has_not_is_said(tmp_path: Path, digits: Any, write_images: Any) -> None:
    for year in (1, 2):
        (tmp_path / "in" / f"year={year}").mkdir(parents=True)
        write_images(tmp_path / "in" / f"year={year}" / "a.parquet", digits[0][:10])
    (tmp_path / "in" / "part-0.snappy").write_bytes(b"PAR1")
    whole = corrupt(CorruptSettings((str(tmp_path / "in"),), tmp_path / "out.parquet"))
    assert whole.keys_left_out == ["year"]
    assert (whole.skipped_files, whole.skipped) == (1, [str(tmp_path / "in" / "part-0.snappy")])
    one = corrupt(CorruptSettings((str(tmp_path / "in" / "year=1" / "a.parquet"),), tmp_path / "one.parquet"))
    assert (one.keys_left_out, one.skipped_files, one.skipped) == ([], 0, [])


def test_a_full_disk_is_named(tmp_path: Path, digits: Any, write_images: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("denoise_batch.corrupt._write", full)
    with pytest.raises(ResourceExhausted, match=r"out\.parquet: the disk is full"):
        run(write_images(tmp_path / "in.parquet", digits[0][:10]), tmp_path / "out.parquet")


def test_a_file_that_gives_fewer_rows_than_it_promises(
    tmp_path: Path, digits: Any, write_images: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_images(tmp_path / "in.parquet", digits[0])
    whole = pq.ParquetFile.iter_batches
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda self, *_, **__: islice(whole(self, batch_size=100), 2))
    with pytest.raises(DataChanged, match="200 rows where its footer says 300"):
        run(source, tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()


@pytest.mark.parametrize("kind", ["plain", "list", "struct"])
@pytest.mark.parametrize("cut", ["files", "row groups"])
def test_more_categories_than_the_index_type_can_number(
    tmp_path: Path, digits: Any, categories: Callable[[str, int], pa.Array], cut: str, kind: str
) -> None:
    parts = []
    for start in (0, 100, 200):
        images = pa.array([image.tobytes() for image in digits[0][start : start + 100]], pa.binary(784))
        parts.append(pa.table({"image": images, "word": categories(kind, start)}))
    (tmp_path / "in").mkdir()
    if cut == "files":
        for place, part in enumerate(parts):
            pq.write_table(part, tmp_path / "in" / f"{place}.parquet")
    else:
        with pq.ParquetWriter(tmp_path / "in" / "a.parquet", parts[0].schema) as writer:
            for part in parts:
                writer.write_table(part)
    table = run(tmp_path / "in", tmp_path / "out.parquet")
    assert table.schema.field("word").type == parts[0].schema.field("word").type
    assert table["word"].to_pylist() == [word for part in parts for word in part["word"].to_pylist()]
    assert table["clean"].to_pylist() == [image.tobytes() for image in digits[0]]


def test_categories_keep_their_order_where_files_differ_in_them(tmp_path: Path, digits: Any, write_images: Any) -> None:
    (tmp_path / "in").mkdir()
    sizes = ["small", "medium", "large", "huge"]
    for name, count in (("a", 3), ("b", 4)):
        codes = pa.array([count - 1, 0, None, 1] * 10, pa.int8())
        size = pa.DictionaryArray.from_arrays(codes, pa.array(sizes[:count]), ordered=True)
        write_images(tmp_path / "in" / f"{name}.parquet", digits[0][:40], size=size)
    column = run(tmp_path / "in", tmp_path / "out.parquet")["size"]
    assert all(chunk.dictionary.to_pylist() == sizes for chunk in column.chunks)
    assert column.to_pylist() == ["large", "small", None, "medium"] * 10 + ["huge", "small", None, "medium"] * 10


def test_only_the_noise_is_not_compressed(tmp_path: Path, digits: Any, write_images: Any) -> None:
    source = write_images(tmp_path / "in.parquet", digits[0], "list of uint8", label=pa.array(digits[1]))
    codecs = {}
    for dtype in ("float32", "uint8"):
        run(source, tmp_path / f"{dtype}.parquet", dtype=dtype)
        group = pq.read_metadata(tmp_path / f"{dtype}.parquet").row_group(0)
        columns = [group.column(index) for index in range(group.num_columns)]
        codecs[dtype] = {column.path_in_schema.split(".")[0]: column.compression for column in columns}
    packed = dict.fromkeys(("image", "clean", "label", "sigma", "noise"), "ZSTD")
    assert codecs == {"float32": {**packed, "image": "UNCOMPRESSED"}, "uint8": packed}


def test_times_that_would_lose_nanoseconds_are_refused(tmp_path: Path, digits: Any, write_images: Any) -> None:
    when = pa.array(np.arange(300) + 1_600_000_000_123_456_789, pa.timestamp("ns"))
    source = write_images(tmp_path / "in.parquet", digits[0], when=when)
    pq.write_table(pq.read_table(source), source, use_deprecated_int96_timestamps=True)
    with pytest.raises(ParquetError, match=r"in\.parquet: column 'when' has INT96 times finer") as caught:
        run(source, tmp_path / "out.parquet")
    assert "nanoseconds" in caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["in.parquet"]


def test_a_damaged_page_is_named(tmp_path: Path, digits: Any, write_images: Any) -> None:
    source = write_images(tmp_path / "in.parquet", digits[0], x=pa.array(range(300)))
    options = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    pq.write_table(pq.read_table(source), source, row_group_size=100, **options)
    content = bytearray(source.read_bytes())
    content[pq.read_metadata(source).row_group(2).column(1).data_page_offset + 200] ^= 1
    source.write_bytes(content)
    with pytest.raises(ParquetError, match=r"in\.parquet is not readable as Parquet: .*CRC") as caught:
        run(source, tmp_path / "out.parquet")
    assert caught.value.hint
    assert "\n" not in caught.value.message
    assert [path.name for path in tmp_path.iterdir()] == ["in.parquet"]


def test_rows_that_a_footer_leaves_out_are_missed(tmp_path: Path) -> None:
    content = foreign_table(1911).drop_columns("tags")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.parquet").write_bytes(parquet(content))
    (tmp_path / "in" / "b.parquet").write_bytes(lying(content, 1800, slice(None)))
    with pytest.raises(ParquetError, match=r"b\.parquet: row group 0, column 'id': its pages hold 1,911 values"):
        run(tmp_path / "in", tmp_path / "out.parquet")


def test_what_runs_out_while_reading_is_named(
    tmp_path: Path, digits: Any, write_images: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_images(tmp_path / "in.parquet", digits[0][:10])

    def no_more(*_: Any) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("denoise_batch.corrupt.open_parquet", no_more)
    with pytest.raises(ResourceExhausted, match=r"in\.parquet: too many files are open"):
        run(source, tmp_path / "out.parquet")


def test_a_signal_while_pages_are_looked_at_stays_one(
    tmp_path: Path, digits: Any, write_images: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_images(tmp_path / "in.parquet", digits[0][:10])

    def ended(*_: Any) -> None:
        raise Terminated("ended by SIGTERM", hint="")

    monkeypatch.setattr("denoise_batch.corrupt.check_pages", ended)
    with pytest.raises(Terminated):
        run(source, tmp_path / "out.parquet")


def test_a_disk_that_lies_is_found_out(
    tmp_path: Path, digits: Any, write_images: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_images(tmp_path / "in.parquet", digits[0][:10])
    monkeypatch.setattr(output_file, "file_digest", lambda _path: "another")
    with pytest.raises(DenoiseBatchError, match="not the one that was written"):
        run(source, tmp_path / "out.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["in.parquet"]


def test_rows_start_at_a_block() -> None:
    clean = np.zeros((BLOCK + 3, 784), np.float32)
    recipe = NoiseRecipe()
    whole = degrade_rows(clean, BLOCK, 4, recipe)
    tail = degrade_rows(clean[BLOCK:], 2 * BLOCK, 4, recipe)
    for one, other in zip(whole, tail, strict=True):
        np.testing.assert_array_equal(one[BLOCK:], other)
    with pytest.raises(ValueError, match="multiple of 1024"):
        degrade_rows(clean, 5, 4, recipe)
