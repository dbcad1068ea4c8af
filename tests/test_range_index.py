"""Pandas' index where it stands in the footer alone, as a range: kept wherever rows follow each other, else named."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from folder_store import FolderStore, locator

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from fault_steps import without_ray

from denoise_batch import storage
from denoise_batch.corrupt import CorruptSettings, corrupt
from denoise_batch.digits import draw_digits
from denoise_batch.inference import infer as infer_module
from denoise_batch.inference import manifest, merging, plan
from denoise_batch.inference.denoise_unit import OnBadRow
from denoise_batch.inference.dry_run import dry_run
from denoise_batch.inference.infer import InferReport, InferSettings, OutputShape, infer
from denoise_batch.parquet.range_index import RangeIndex, joined_range, of_some_rows, range_index, with_range

pytestmark = pytest.mark.usefixtures("footers_read_here")

ROWS = 60
NAMED = "pandas' index 'scan_id' stands in the files' footers alone, as a range, and "


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two units of 40 and 20 rows a file."""
    monkeypatch.setattr(plan, "UNIT_ROWS", 40)
    monkeypatch.setattr(plan, "_SMALLEST_UNIT_ROWS", 40)


def write(path: Path, index: pd.Index, *bad: int) -> str:
    path.parent.mkdir(exist_ok=True)
    images = [image.tobytes() for image in draw_digits(len(index), seed=1)[0]]
    frame = pd.DataFrame({"image": [None if row in bad else image for row, image in enumerate(images)]}, index=index)
    frame.to_parquet(path, row_group_size=20)
    return str(path)


def ids(start: int, *, step: int = 1, name: str | None = "scan_id", rows: int = ROWS) -> pd.RangeIndex:
    return pd.RangeIndex(start, start + rows * step, step, name=name)


def run(out: Path | str, *inputs: str, **changes: Any) -> InferReport:
    with without_ray():
        return infer(InferSettings(inputs, str(out), max_bad=1.0, **changes))


def parts(out: Path) -> list[pd.DataFrame]:
    return [pd.read_parquet(path) for path in sorted(out.glob("*.parquet"))]


@pytest.mark.parametrize(
    ("index", "second"),
    [
        (ids(1_000_000), ids(1_000_040, rows=20)),
        (ids(7, step=-3), ids(7 - 120, step=-3, rows=20)),
        (ids(1000, name=None), ids(1040, name=None, rows=20)),
        (ids(0, name=None), ids(0, name=None, rows=20)),  # rows without ids are counted anew in each file
    ],
    ids=["named", "step", "unnamed", "none"],
)
@pytest.mark.parametrize("shape", ["file", "copied", "folder", "store"])
def test_each_file_has_the_range_of_its_rows(
    shape: str, index: pd.RangeIndex, second: pd.RangeIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shape == "copied":
        monkeypatch.setattr(merging, "_SMALL_ROWS", 0)
    out: Path | str = tmp_path / "out"
    if shape == "store":
        out = "gs://bucket/out"
        monkeypatch.setattr(storage, "locate", locator(FolderStore(tmp_path / "store")))
    folder = shape in {"folder", "store"}
    asked = OutputShape.DIRECTORY if folder else OutputShape.AUTO
    report = run(out, write(tmp_path / "a.parquet", index), shape=asked)
    assert report.units == 2
    if not folder:
        assert pd.read_parquet(out).index.equals(index)
        assert pd.read_parquet(out).index.name == index.name
        assert manifest.verify(tmp_path / "out") == []
        assert report.range_index == ""
        return
    found = parts(tmp_path / "out" if shape == "folder" else next(tmp_path.rglob("part-00000.parquet")).parent)
    assert found[0].index.equals(index[:40])
    assert found[1].index.equals(second)
    assert [part.index.name for part in found] == [index.name] * 2
    assert bool(report.range_index) == (index[0] != 0)
    if index.name:
        drops = "each part has its own, which pandas drops where it reads several at once: reset_index() first"
        assert f"note: {NAMED}{drops}" in report.summary_lines()


@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize(("start", "kept"), [(1060, True), (2000, False)])
def test_ranges_that_follow_each_other_are_joined(
    start: int, kept: bool, copied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if copied:
        monkeypatch.setattr(merging, "_SMALL_ROWS", 0)
    write(tmp_path / "in" / "a.parquet", ids(1000))
    write(tmp_path / "in" / "b.parquet", ids(start))
    report = run(tmp_path / "out", str(tmp_path / "in"), shape=OutputShape.SINGLE_FILE)
    table = pq.read_table(tmp_path / "out")
    assert table.schema.pandas_metadata["index_columns"] == (
        [{"kind": "range", "name": "scan_id", "start": 1000, "stop": 1120, "step": 1}] if kept else []
    )
    assert table.to_pandas().index.equals(ids(1000, rows=120) if kept else pd.RangeIndex(120))
    lost = f"{NAMED}is not kept, since the files' ranges do not follow each other: reset_index() first"
    assert report.range_index == ("" if kept else lost)
    assert json.loads((tmp_path / "_out.manifest" / "report.json").read_text())["range_index"] == report.range_index
    assert manifest.verify(tmp_path / "out") == []


@pytest.mark.parametrize("bad", [[45], range(40, 60)], ids=["one", "all of a unit"])
@pytest.mark.parametrize("shape", [OutputShape.DIRECTORY, OutputShape.SINGLE_FILE])
def test_rows_that_are_set_aside_take_the_range_along(shape: OutputShape, bad: Any, tmp_path: Path) -> None:
    source, out = write(tmp_path / "a.parquet", ids(1000), *bad), tmp_path / "out"
    report = run(out, source, shape=shape, on_bad_row=OnBadRow.QUARANTINE)
    assert report.quarantined == len(bad)
    assert report.range_index == f"{NAMED}is not kept where rows are set aside: reset_index() first"
    assert manifest.verify(out) == []
    files = [out] if shape is OutputShape.SINGLE_FILE else sorted(out.glob("*.parquet"))
    schemas = [pq.read_schema(file) for file in files]
    assert schemas[-1].pandas_metadata["index_columns"] == []
    if shape is OutputShape.DIRECTORY:  # the other part is whole
        assert parts(out)[0].index.equals(ids(1000, rows=40))
    assert sum(len(pd.read_parquet(file)) for file in files) == ROWS - len(bad)
    (aside,) = tmp_path.rglob("quarantine/*.parquet")
    assert pq.read_schema(aside).pandas_metadata["index_columns"] == []


def test_a_run_that_goes_on_joins_the_same_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = write(tmp_path / "a.parquet", ids(1000)), tmp_path / "out"

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(infer_module.assembly, "build_file", stop)
        with pytest.raises(KeyboardInterrupt):
            run(out, source)
    assert run(out, source).resumed_units == 2
    assert pd.read_parquet(out).index.equals(ids(1000))


def test_the_dry_run_says_what_would_be_lost(tmp_path: Path, model_folder: Path) -> None:
    first = write(tmp_path / "in" / "a.parquet", ids(1000))
    asked = InferSettings((first,), str(tmp_path / "out"), model=model_folder)
    assert dry_run(asked).range_index == ""
    parted = dry_run(replace(asked, shape=OutputShape.DIRECTORY))
    assert f"note: {parted.range_index}" in parted.lines()
    assert parted.to_json()["range_index"].startswith(f"{NAMED}each part has its own")
    assert "rows are set aside" in dry_run(replace(asked, on_bad_row=OnBadRow.QUARANTINE)).range_index
    write(tmp_path / "in" / "b.parquet", ids(1060))
    joined = replace(asked, inputs=(str(tmp_path / "in"),), shape=OutputShape.SINGLE_FILE)
    assert "only if the files' ranges follow each other" in dry_run(joined).range_index


def test_corrupt_keeps_the_range_of_one_file(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.parquet", ids(1000))
    report = corrupt(CorruptSettings((str(tmp_path / "in"),), tmp_path / "one.parquet"))
    assert pd.read_parquet(tmp_path / "one.parquet").index.equals(ids(1000))
    assert report.range_index == ""
    write(tmp_path / "in" / "b.parquet", ids(1060))
    report = corrupt(CorruptSettings((str(tmp_path / "in"),), tmp_path / "two.parquet"))
    assert pq.read_schema(tmp_path / "two.parquet").pandas_metadata["index_columns"] == []
    assert report.range_index == f"{NAMED}is not kept where files are joined: reset_index() first"


def _schema(*index: Any) -> pa.Schema:
    return pa.schema([("x", pa.int8())], {"pandas": json.dumps({"index_columns": index, "columns": []})})


def test_a_range_of_other_rows_is_no_index() -> None:
    """As PyArrow leaves it of a table of pandas' that was filtered: none is to be made of it."""
    entry = {"kind": "range", "name": "n", "start": 10, "stop": 20, "step": 1}
    assert range_index(_schema(entry), 10) == RangeIndex("n", 10, 1)
    assert range_index(_schema(entry), 9) is None
    cut = of_some_rows(_schema(entry), 3, 4, 9)
    assert cut.pandas_metadata["index_columns"] == []
    assert of_some_rows(_schema(entry), 3, 4, 10).pandas_metadata["index_columns"] == [
        entry | {"start": 13, "stop": 17}
    ]
    whole = _schema(entry)
    assert of_some_rows(whole, 0, 10, 10) is whole


@pytest.mark.parametrize(
    "index",
    [
        [],
        ["key"],
        [{"kind": "range", "name": "n", "start": 0.5, "stop": 2, "step": 1}],
        [{"kind": "range", "name": "n", "start": 0, "stop": 2, "step": 0}],
        [{"kind": "range"}],
        [{"kind": "other"}],
        [7],
        None,
    ],
)
def test_notes_of_another_kind_are_no_range(index: Any) -> None:
    schema = pa.schema([("x", pa.int8())], {"pandas": json.dumps({"index_columns": index})})
    assert range_index(schema, 2) is None
    for other in (schema, pa.schema([("x", pa.int8())]), schema.with_metadata({"pandas": "[1"})):
        assert "range" not in str(with_range(other, None, 2).metadata)


def test_which_ranges_are_joined() -> None:
    first, none = RangeIndex("n", 5, 2), RangeIndex(None, 0, 1)
    assert joined_range([]) is None
    assert joined_range([(first, 3)]) == first
    assert joined_range([(first, 3), (RangeIndex("n", 11, 2), 1), (RangeIndex("n", 13, 2), 8)]) == first
    for other in (RangeIndex("n", 12, 2), RangeIndex("n", 11, 1), RangeIndex("m", 11, 2), None):
        assert joined_range([(first, 3), (other, 1)]) is None
    assert joined_range([(none, 3), (none, 4)]) == none
    assert joined_range([(none, 3), (RangeIndex(None, 3, 1), 4)]) == none
    assert joined_range([(none, 3), (RangeIndex(None, 9, 1), 4)]) is None
    assert joined_range([(None, 3), (none, 4)]) is None
