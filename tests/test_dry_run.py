"""`infer --dry-run`: what would be done, without doing it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from folder_store import FolderStore, locator

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from fault_steps import without_ray

from denoise_batch import storage
from denoise_batch.bundle import SHIPPED_FOLDER
from denoise_batch.errors import FlagError, OutputError, ParquetError, ResumeError
from denoise_batch.images import Polarity
from denoise_batch.inference import infer as infer_module
from denoise_batch.inference import plan
from denoise_batch.inference.denoise_unit import OnBadRow
from denoise_batch.inference.dry_run import dry_run
from denoise_batch.inference.infer import infer
from denoise_batch.inference.request import InferSettings, OutputShape, look_at
from denoise_batch.inference.run_folder import open_run

if TYPE_CHECKING:
    from conftest import Pixels, WriteImages


@pytest.fixture
def source(tmp_path: Path, digits: tuple[Pixels, Pixels], write_images: WriteImages) -> Path:
    """Two files of 300 drawn digits, one of them with three nulls; a third file that is no Parquet by its name."""
    folder = tmp_path / "in"
    folder.mkdir()
    images, labels = digits
    nulls = np.zeros(300, bool)
    nulls[[5, 6, 7]] = True
    for name, bad in (("a", None), ("b", nulls)):
        write_images(folder / f"{name}.parquet", images, bad=bad, label=pa.array(labels))
    (folder / "notes.txt").write_text("no Parquet")
    return folder


@pytest.mark.usefixtures("footers_read_here")
def test_it_says_what_would_be_done_and_writes_nothing(tmp_path: Path, source: Path, model_folder: Path) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    found = dry_run(InferSettings((str(source),), str(tmp_path / "out"), model=model_folder))
    assert (found.files, found.rows, found.units, found.skipped_files) == (2, 600, 2, 1)
    assert found.columns == {"image": "fixed_size_binary[784]", "label": "uint8"}
    assert (found.image_column["layout"], found.polarity, found.single_file) == ("binary", "light-on-dark", False)
    assert found.output_column == {
        "name": "denoised",
        "layout": "binary",
        "dtype": "uint8",
        "type": "fixed_size_binary[784]",
    }
    assert found.estimate is not None
    assert (found.estimate.sampled_rows, found.estimate.bad_rows) == (300, {"null": 3})
    assert found.estimate.seconds == pytest.approx(6 + 600 / found.estimate.rate, rel=0.01)
    assert found.estimate.output_bytes > 1000
    assert found.estimate.poor is None
    text = "\n".join(found.lines())
    assert "600 rows in 2 files" in text
    assert "3 of them bad (3 null)" in text
    assert "note: 1 file left out because of its name: 'notes.txt'" in text
    json.dumps(found.to_json())
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.usefixtures("footers_read_here")
def test_partition_folders_are_named(tmp_path: Path, source: Path, model_folder: Path) -> None:
    settings = InferSettings((str(source),), str(tmp_path / "out"), model=model_folder)
    whole = dry_run(settings)
    assert whole.partition_keys == ()
    assert not any(line.startswith("partition") for line in whole.lines())
    for name in ("a", "b"):
        (source / "year=2024" / f"m={name}").mkdir(parents=True)
        (source / f"{name}.parquet").rename(source / "year=2024" / f"m={name}" / "0.parquet")
    found = dry_run(settings)
    assert found.to_json()["partition_keys"] == ("year", "m")
    assert "partition folders, made again: year=…, m=…" in found.lines()


@pytest.mark.usefixtures("footers_read_here")
def test_names_of_columns_and_folders_forge_no_lines(tmp_path: Path, source: Path, model_folder: Path) -> None:
    inner = "q\n  fake: int64\x1b"
    for name in ("a", "b"):
        (source / "y\nabout 1 s=1").mkdir(exist_ok=True)
        table = pq.read_table(source / f"{name}.parquet").append_column("größe in cm", pa.nulls(300, pa.int8()))
        table = table.append_column("x\nabout 1 s", pa.array([{inner: 1}] * 300))
        pq.write_table(table, source / "y\nabout 1 s=1" / f"{name}.parquet")
        (source / f"{name}.parquet").unlink()
    lines = dry_run(InferSettings((str(source),), str(tmp_path / "out"), model=model_folder)).lines()
    assert r"partition folders, made again: 'y\nabout 1 s'=…" in lines
    assert "  größe in cm: int8" in lines
    assert r"  'x\nabout 1 s': struct<q fake: int64\x1b: int64>" in lines
    assert all(line.isprintable() for line in lines)


@pytest.mark.usefixtures("footers_read_here")
def test_an_unfinished_run_is_seen_and_left_as_it_is(tmp_path: Path, source: Path, model_folder: Path) -> None:
    settings = InferSettings((str(source),), str(tmp_path / "out"), model=model_folder)
    request = look_at(settings)
    with open_run(request.out, request.listing.files, request.identity, request.plan, overwrite=False) as run:
        folder = run.folder
    listed = sorted(str(path) for path in folder.rglob("*"))
    assert dry_run(settings).done_rows == 0
    assert sorted(str(path) for path in folder.rglob("*")) == listed
    with pytest.raises(ResumeError, match="on_bad_row"):
        dry_run(InferSettings((str(source),), str(tmp_path / "out"), model=model_folder, on_bad_row=OnBadRow.FAIL))


@pytest.mark.usefixtures("footers_read_here")
def test_what_would_be_replaced_and_thrown_away_is_said(
    tmp_path: Path, source: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a file, a folder and a prefix of a store; rows that are done are those of receipts."""
    monkeypatch.setattr(storage, "locate", locator(FolderStore(tmp_path / "store")))
    for out, inputs in (("out", source), ("out.parquet", source / "a.parquet"), ("gs://bucket/out", source)):
        named = out if "://" in out else str(tmp_path / out)
        settings = InferSettings((str(inputs),), named, model=model_folder)
        rows = pq.read_metadata(source / "a.parquet").num_rows
        with without_ray():
            infer(settings)
            asked = replace(settings, overwrite=True)
            found = dry_run(asked)
            assert (found.replaces, found.discarded_rows, found.complete) == (True, None, False)
            assert "it exists, and would be replaced" in found.lines()
            with monkeypatch.context() as patch:
                patch.setattr(infer_module._Job, "publish", lambda _: None)  # stopped just before it
                infer(replace(asked, compression="lz4"))
            found = dry_run(asked)
            text = f"an unfinished run of another request ({found.rows:,} rows done) would be discarded"
            assert text in found.lines()
            assert found.rows in {rows, 2 * rows}
            assert (found.to_json()["replaces"], found.to_json()["discarded_rows"]) == (True, found.rows)
            assert found.done_rows == 0
            own = dry_run(replace(asked, compression="lz4"))
            assert (own.done_rows, own.discarded_rows) == (own.rows, None)
    new = dry_run(replace(asked, output=str(tmp_path / "new")))
    assert (new.replaces, new.discarded_rows) == (False, None)
    assert not any(line.endswith((" replaced", " discarded")) for line in new.lines())


@pytest.mark.usefixtures("footers_read_here")
def test_a_damaged_ledger_is_thrown_away(tmp_path: Path, source: Path, model_folder: Path) -> None:
    settings = InferSettings((str(source),), str(tmp_path / "out"), model=model_folder)
    request = look_at(settings)
    with open_run(request.out, request.listing.files, request.identity, request.plan, overwrite=False) as run:
        pass
    (run.folder / "ledger" / "000001.jsonl").write_bytes(b"no JSON\n" * 2)
    with pytest.raises(ResumeError):
        dry_run(settings)
    assert dry_run(replace(settings, overwrite=True)).discarded_rows == 0


def test_a_run_that_would_stop_is_told_so(tmp_path: Path, source: Path, model_folder: Path) -> None:
    allowed = InferSettings((str(source),), str(tmp_path / "out"), model=model_folder, max_bad=0.5)
    assert dry_run(allowed).would_stop == ""
    few = dry_run(replace(allowed, max_bad=0.0001))
    assert "of the sample are bad, --max-bad 0.0001 allows fewer" in few.would_stop
    assert f"note: {few.would_stop}" in few.lines()
    assert "--on-bad-row fail" in dry_run(replace(allowed, on_bad_row=OnBadRow.FAIL)).would_stop


def test_what_infer_would_refuse_is_refused(tmp_path: Path, source: Path, model_folder: Path) -> None:
    (source / "c.parquet").write_bytes(b"not Parquet at all, though it is named so")
    with pytest.raises(ParquetError, match=r"1 file is not readable as Parquet: .*c\.parquet"):
        dry_run(InferSettings((str(source),), str(tmp_path / "out"), model=model_folder))
    for given in (str(source), f"file://{source}", f"{source.parent}/{source.name[:-1]}*"):
        with pytest.raises(OutputError, match="lies inside"):
            dry_run(InferSettings((given,), str(source / "out"), model=model_folder))
    (source / "c.parquet").unlink()
    (source / "year=2024").mkdir()
    (source / "a.parquet").rename(source / "year=2024" / "a.parquet")
    whole = InferSettings((str(source),), str(tmp_path / "out"), model=model_folder, shape=OutputShape.SINGLE_FILE)
    with pytest.raises(FlagError, match=r"--single-file: .* the keys year, which one file cannot keep"):
        dry_run(whole)


@pytest.mark.usefixtures("footers_read_here")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.usefixtures("footers_read_here")
def test_a_sample_reads_past_no_rows(
    tmp_path: Path, source: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "UNIT_ROWS", 100)
    monkeypatch.setattr(plan, "_SMALLEST_UNIT_ROWS", 100)
    found = dry_run(InferSettings((str(source / "b.parquet"),), str(tmp_path / "out"), model=model_folder))
    assert found.units == 3
    assert found.estimate is not None
    assert (found.estimate.sampled_rows, found.estimate.bad_rows) == (100, {"null": 3})  # which the first unit has


def test_a_device_that_is_not_there_is_refused(tmp_path: Path, source: Path, model_folder: Path) -> None:
    settings = InferSettings((str(source),), str(tmp_path / "out"), model=model_folder, device="cuda")
    with pytest.raises(FlagError, match="--device cuda"):
        dry_run(settings)


def test_a_sample_that_is_damaged_is_said(tmp_path: Path, source: Path, model_folder: Path) -> None:
    content = bytearray((source / "b.parquet").read_bytes())
    content[100:5000] = bytes(4900)
    (source / "b.parquet").write_bytes(content)
    settings = InferSettings((str(source),), str(tmp_path / "out"), model=model_folder)
    found = dry_run(replace(settings, polarity=Polarity.LIGHT_ON_DARK))
    assert found.estimate is None
    assert "b.parquet: " in found.sample_failed
    assert any("could not be denoised" in line for line in found.lines())


@pytest.mark.usefixtures("footers_read_here")
def test_zero_rows_need_no_estimate(
    tmp_path: Path, digits: tuple[Pixels, Pixels], write_images: WriteImages, model_folder: Path
) -> None:
    write_images(tmp_path / "none.parquet", digits[0][:0])
    found = dry_run(InferSettings((str(tmp_path / "none.parquet"),), str(tmp_path / "out"), model=model_folder))
    assert (found.rows, found.units, found.estimate, found.single_file) == (0, 0, None, True)


@pytest.mark.slow
def test_the_command_prints_it_and_starts_no_ray(tmp_path: Path, source: Path, model_folder: Path) -> None:
    script = (
        "import sys; from denoise_batch.cli import run; code = run(sys.argv[1:]); "
        "sys.exit(code or ('ray' in sys.modules and 'ray was imported'))"
    )
    command = [sys.executable, "-c", script, "infer", str(source), str(tmp_path / "out"), "--dry-run", "--json"]
    done = subprocess.run([*command, "--model", str(model_folder)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == 600


@pytest.mark.usefixtures("footers_read_here")
def test_scans_of_few_levels_are_for_the_model_that_is_made_for_them(
    tmp_path: Path, digits: tuple[Pixels, Pixels], write_images: WriteImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    grey, few = tmp_path / "grey.parquet", tmp_path / "few.parquet"
    write_images(grey, digits[0])
    write_images(few, np.where(digits[0] > 127, 255, 0).astype(np.uint8))
    asked = InferSettings((str(few),), str(tmp_path / "out"))
    found = dry_run(asked)
    assert Path(found.model) == SHIPPED_FOLDER.with_name("few-levels")
    assert any("2 levels of grey" in line for line in found.lines())
    assert found.to_json()["levels"] == 2
    assert found.estimate is not None
    of_grey = dry_run(replace(asked, inputs=(str(grey),)))
    assert (Path(of_grey.model), of_grey.to_json()["levels"]) == (SHIPPED_FOLDER, None)
    # What is named, or lies here, is what is taken.
    named = dry_run(replace(asked, model=Path("bounds-unet")))
    assert Path(named.model) == SHIPPED_FOLDER
    assert any("2 levels of grey" in line for line in named.lines())
    shutil.copytree(SHIPPED_FOLDER, "denoise-model")
    assert dry_run(asked).model == "denoise-model"
