"""Output files and folders in pandas, Polars, DuckDB and Hugging Face `datasets`, without any plug-in."""

from __future__ import annotations

import io
import json
import os
import shutil
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from denoise_batch.parquet.output_file import file_digest
from denoise_batch.parquet.row_groups import Part, join_row_groups

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import DenoiseFile

ROWS = 25
FEATURES = {"image": {"_type": "Image"}, "label": {"names": ["even", "odd"], "_type": "ClassLabel"}}


def _png(image: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


def _column(kind: str) -> pa.Array:
    images = np.zeros((ROWS, 28, 28), np.uint8)
    images[:, 8:20, 10:18] = np.random.default_rng(0).integers(100, 256, (ROWS, 12, 8))
    if kind == "binary":
        return pa.array([image.tobytes() for image in images], pa.binary(784))
    if kind == "list of uint8":
        return pa.array(images.reshape(ROWS, 784).tolist(), pa.list_(pa.uint8()))
    if kind == "nested list of float32":
        return pa.array((images / np.float32(255)).tolist(), pa.list_(pa.list_(pa.float32())))
    if kind == "fixed list of float32":
        return pa.array((images / np.float32(255)).reshape(ROWS, 784).tolist(), pa.list_(pa.float32(), 784))
    if kind == "tensor":
        return pa.FixedShapeTensorArray.from_numpy_ndarray(images)
    return pa.array(
        [{"bytes": _png(image), "path": None} for image in images],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )


KINDS = ["binary", "list of uint8", "nested list of float32", "fixed list of float32", "tensor", "encoded"]
KINDS_AND_SHAPES = [*((kind, "folder") for kind in KINDS), ("binary", "file"), ("encoded", "file")]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, denoise_file: DenoiseFile) -> Callable[[str], tuple[Path, Path]]:
    """`output(kind)` gives a folder as `infer` leaves it, with a bad row and three parts, and a single file of it."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(kind: str) -> tuple[Path, Path]:
        if kind in made:
            return made[kind]
        root = tmp_path_factory.mktemp("readers")
        images = _column(kind)
        images = pa.concat_arrays([images.slice(0, 3), pa.nulls(1, images.type), images.slice(4)])
        frame = pd.DataFrame({"label": np.arange(ROWS) % 2}, index=pd.Index([f"k{i}" for i in range(ROWS)], name="key"))
        table = pa.Table.from_pandas(frame).append_column("image", images)
        metadata = {**table.schema.metadata, b"huggingface": json.dumps({"info": {"features": FEATURES}}).encode()}
        if kind != "encoded":
            metadata.pop(b"huggingface")
        pq.write_table(table.replace_schema_metadata(metadata), root / "in.parquet", row_group_size=10)
        folder, work = root / "OUT", root / "work"
        (folder / "_denoise_batch" / "quarantine").mkdir(parents=True)
        work.mkdir()
        done = denoise_file(root / "in.parquet", work, lambda pixels: 1 - pixels, unit_rows=10)
        join_row_groups([Part(file, file_digest(file)) for file in done.files], root / "out.parquet")
        for number, file in enumerate(done.files):
            file.rename(folder / f"part-{number:05}.parquet")
        pq.write_table(
            pa.table({"file": ["in"], "row": [3], "reason": ["null"]}), folder / "_denoise_batch/bad_rows.parquet"
        )
        pq.write_table(
            pq.read_table(root / "in.parquet").slice(3, 1), folder / "_denoise_batch/quarantine/part-00000.parquet"
        )
        (folder / "_denoise_batch/manifest.json").write_text("{}")
        (folder / "_denoise_batch/report.json").write_text("{}")
        (folder / "_SUCCESS").write_text("x\n")
        made[kind] = folder, root / "out.parquet"
        return made[kind]

    return make


def _expected(file: Path) -> dict[str, list[Any]]:
    """Every column as Python lists, through PyArrow."""
    table = pq.read_table(file)
    assert len(table) == ROWS
    return {name: _storage(table[name]) for name in table.schema.names}


def _storage(column: pa.ChunkedArray) -> list[Any]:
    array = column.combine_chunks()
    return (array.storage if isinstance(array, pa.ExtensionArray) else array).to_pylist()


def _lists(value: Any) -> Any:
    """Arrays, tuples and the like as lists; a missing value of any kind as None."""
    if isinstance(value, np.ndarray | list | tuple):
        return [_lists(item) for item in value]
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    return value.item() if isinstance(value, np.generic) else None if value is pd.NA else value


def _check(found: dict[str, list[Any]], expected: dict[str, list[Any]]) -> None:
    assert list(found) == list(expected)
    for name, values in expected.items():
        assert [_lists(value) for value in found[name]] == values, name


@pytest.mark.parametrize(("kind", "shape"), KINDS_AND_SHAPES)
def test_pandas(kind: str, shape: str, output: Any) -> None:
    folder, file = output(kind)
    frame = pd.read_parquet(folder if shape == "folder" else file)
    expected = _expected(file)
    assert frame.index.name == "key"
    assert frame.index.tolist() == expected.pop("key")
    _check({name: frame[name].tolist() for name in frame.columns}, expected)


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (pd.Index([0, 1], name="n"), ["0", "1", "denoised"]),
        (pd.MultiIndex.from_tuples([("a", "image"), ("b", "x")]), [("a", "image"), ("b", "x"), ("denoised", "")]),
        (pd.MultiIndex.from_tuples([("a", 1), ("b", 2)]), ["('a', '1')", "('b', '2')", "denoised"]),
        (pd.to_datetime(["2020-01-01", "2021-01-01"]), ["2020-01-01 00:00:00", "2021-01-01 00:00:00", "denoised"]),
    ],
)
def test_pandas_with_names_of_columns_that_are_no_text(
    names: Any, read: list[Any], tmp_path: Path, denoise_file: DenoiseFile
) -> None:
    index = pd.Index([f"k{i}" for i in range(ROWS)], name="key")
    frame = pd.DataFrame({"image": _column("binary").to_pylist(), "x": range(ROWS)}, index=index)
    frame.columns = names
    frame.to_parquet(tmp_path / "in.parquet")
    (file,) = denoise_file(tmp_path / "in.parquet", tmp_path, lambda pixels: 1 - pixels).files
    found = pd.read_parquet(file)
    assert found.columns.tolist() == read
    assert found.columns.names == (names.names if isinstance(read[0], tuple) else names.names[:1])
    pd.testing.assert_index_equal(found.index, index)
    assert found[read[1]].tolist() == list(range(ROWS))


@pytest.mark.parametrize(("kind", "shape"), KINDS_AND_SHAPES)
def test_polars(kind: str, shape: str, output: Any) -> None:
    folder, file = output(kind)
    path = folder / "*.parquet" if shape == "folder" else file
    expected = _expected(file)
    for frame in (pl.read_parquet(path), pl.scan_parquet(path).collect()):
        _check({name: frame[name].to_list() for name in frame.columns}, expected)


@pytest.mark.parametrize(("kind", "shape"), KINDS_AND_SHAPES)
def test_duckdb(kind: str, shape: str, output: Any) -> None:
    folder, file = output(kind)
    path = folder / "*.parquet" if shape == "folder" else file
    with duckdb.connect() as connection:
        result = connection.execute("select * from read_parquet(?)", [str(path)])
        names = [column[0] for column in result.description]
        columns = list(zip(*result.fetchall(), strict=True))
    _check(dict(zip(names, columns, strict=True)), _expected(file))


@pytest.mark.parametrize("folders", ["k=1", "k=1/m=2"])
def test_a_glob_that_takes_partition_folders_alone(folders: str, output: Any, tmp_path: Path) -> None:
    shutil.copytree(output("binary")[0], tmp_path / "OUT")
    (tmp_path / "OUT" / folders).mkdir(parents=True)
    for part in (tmp_path / "OUT").glob("*.parquet"):
        part.rename(tmp_path / "OUT" / folders / part.name)
    path = str(tmp_path / "OUT" / "*=*" / "**" / "*.parquet")
    keys = [folder.partition("=")[0] for folder in folders.split("/")]
    frame = pl.read_parquet(path, hive_partitioning=True)
    assert (len(frame), frame.columns[-len(keys) :]) == (ROWS, keys)
    with duckdb.connect() as connection:
        result = connection.execute("select * from read_parquet(?)", [path])
        assert [column[0] for column in result.description][-len(keys) :] == keys
        assert len(result.fetchall()) == ROWS


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Hugging Face's `datasets`, without its network and the home folder's caches."""
    home = tmp_path_factory.mktemp("huggingface")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(home)}.items():
            patch.setitem(os.environ, name, value)
        import datasets as module

        module.disable_progress_bars()
        yield module


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "shape"), [(kind, shape) for kind, shape in KINDS_AND_SHAPES if kind != "tensor"])
@pytest.mark.parametrize("streaming", [False, True])
def test_hugging_face_datasets(
    kind: str, shape: str, streaming: bool, output: Any, datasets: Any, tmp_path: Path
) -> None:
    folder, file = output(kind)
    path = folder / "*.parquet" if shape == "folder" else file
    data = datasets.load_dataset(
        "parquet", data_files=str(path), split="train", streaming=streaming, cache_dir=str(tmp_path)
    )
    expected = _expected(file)
    if kind == "encoded":
        assert isinstance(data.features["image"], datasets.Image)
        assert data.features["label"].names == ["even", "odd"]
        assert isinstance(data.features["denoised"], datasets.Image)
        for name in ("image", "denoised"):
            data = data.cast_column(name, datasets.Image(decode=False))
    rows = list(data)
    _check({name: [row[name] for row in rows] for name in data.column_names}, expected)
