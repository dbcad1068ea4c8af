"""`infer` through Ray: every row once, whatever dies."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from denoise_batch import models
from denoise_batch.bundle import read_bundle
from denoise_batch.bundle.saving import BundleCard, save_bundle
from denoise_batch.denoiser import Denoiser
from denoise_batch.digits import draw_digits
from denoise_batch.errors import JobFailed, OutputError, ResumeError
from denoise_batch.extra_columns import ExtraColumns
from denoise_batch.images import decode, encode
from denoise_batch.images.layouts import Layout, output_column
from denoise_batch.inference import manifest
from denoise_batch.inference.denoise_unit import OnBadRow
from denoise_batch.inference.infer import InferProgress, InferSettings, OutputShape, infer
from denoise_batch.inference.ledger import Ledger
from denoise_batch.inference.run_folder import work_folder
from denoise_batch.inspection import inspect

if TYPE_CHECKING:
    from pathlib import Path

IMAGE = output_column(None, "image", Layout.BINARY, "uint8")
FILES, ROWS = 12, 1500


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "seed"
    save_bundle(folder, models.build("seed"), BundleCard("seed"))
    return folder


def _table(start: int, rows: int) -> pa.Table:
    pixels = draw_digits(rows, seed=0, start=start)[0]
    ids = pa.array(range(start, start + rows))
    return pa.table({"id": ids, "image": encode(pixels.reshape(rows, 784), None, IMAGE)})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 12 files, each a unit."""
    folder = tmp_path_factory.mktemp("source")
    for number in range(FILES):
        path = folder / f"{number:02d}.parquet"
        pq.write_table(_table(number * ROWS, ROWS), path, row_group_size=400, write_page_checksum=True)
    return folder


def _check(out: Path, source: Path, model: Path) -> pa.Table:
    """Every input row is there once, in order, unchanged, with what the model makes of it."""
    assert manifest.verify(out) == []
    table, expected = pq.read_table(out), pq.read_table(source)
    assert table.drop_columns("denoised").equals(expected)
    noisy = decode(table["image"], IMAGE).pixels[::100]
    clean = Denoiser(read_bundle(model), device="cpu")(noisy.astype(np.float32) / np.float32(255))
    found = decode(table["denoised"], output_column(IMAGE, "denoised")).pixels[::100]
    assert np.abs(found - clean * 255).max() <= 1.0
    return table


@pytest.mark.usefixtures("ray_session")
def test_a_folder_becomes_a_folder(tmp_path: Path, source: Path, model: Path) -> None:
    seen: list[InferProgress] = []
    report = infer(InferSettings((str(source),), str(tmp_path / "out"), model=model), seen.append)
    assert (report.rows_in, report.rows_out, report.units, report.failed_attempts) == (
        FILES * ROWS,
        FILES * ROWS,
        FILES,
        0,
    )
    _check(tmp_path / "out", source, model)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.parquet")) == [
        f"part-{n:05d}.parquet" for n in range(FILES)
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [p.rows for p in seen] == sorted(p.rows for p in seen)
    assert (seen[0].phase, seen[-1].phase, seen[-1].rows) == ("starting", "publishing", FILES * ROWS)


@pytest.mark.usefixtures("ray_session")
def test_rows_that_were_set_aside_can_be_mended_and_denoised_alone(tmp_path: Path, source: Path, model: Path) -> None:
    table = pq.read_table(source / "03.parquet")
    marks = np.zeros(ROWS, np.uint8)
    marks[[3, 500, 501]] = 1
    image = encode(decode(table["image"], IMAGE).pixels, marks, IMAGE)
    pq.write_table(table.set_column(1, IMAGE.field, image), tmp_path / "in.parquet")
    out, retried = tmp_path / "out", tmp_path / "retried"
    settings = InferSettings((str(tmp_path / "in.parquet"),), str(out), model=model, on_bad_row=OnBadRow.QUARANTINE)
    report = infer(replace(settings, shape=OutputShape.DIRECTORY))
    assert (report.rows_in, report.rows_out, report.quarantined) == (ROWS, ROWS - 3, 3)
    assert manifest.verify(out) == []
    aside = out / manifest.FOLDER / manifest.QUARANTINE
    kept = pq.read_table(aside)
    assert kept["id"].to_pylist() == [3 * ROWS + row for row in (3, 500, 501)]
    assert pq.read_table(out / manifest.FOLDER / manifest.BAD_ROWS)["row"].to_pylist() == [3, 500, 501]
    saved = json.loads((out / manifest.FOLDER / manifest.REPORT).read_text())
    assert (saved["attempts"], saved["failed_attempts"], saved["sessions"]) == (1, 0, 1)
    assert saved["stages"]["forward"] > 0

    mended = kept.set_column(1, IMAGE.field, table["image"].take(pa.array([3, 500, 501])))
    pq.write_table(mended, tmp_path / "mended.parquet")
    assert infer(replace(settings, inputs=(str(tmp_path / "mended.parquet"),), output=str(retried))).rows_out == 3
    both = pa.concat_tables([pq.read_table(out), pq.read_table(retried)])
    assert sorted(both["id"].to_pylist()) == list(range(3 * ROWS, 4 * ROWS))
    assert both["denoised"].null_count == 0


@pytest.mark.usefixtures("ray_session")
def test_what_the_model_says_of_its_images_goes_along(tmp_path: Path, source: Path) -> None:
    network = models.build("bounds-unet", {"width": 8, "deep": 8, "bottleneck": 16})
    save_bundle(tmp_path / "model", network, BundleCard("bounds-unet", network.parameters_json))
    inputs = tuple(str(source / f"{number:02d}.parquet") for number in range(2))
    settings = InferSettings(inputs, str(tmp_path / "out.parquet"), model=tmp_path / "model", workers=1)
    quality = ExtraColumns(quality=True)
    report = infer(replace(settings, shape=OutputShape.SINGLE_FILE, extras=quality))  # two parts, joined
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.schema.names == ["id", "image", "denoised", "denoised_psnr", "denoised_noise_level"]
    assert table["id"].to_pylist() == list(range(2 * ROWS))
    noisy = decode(table["image"], IMAGE).pixels.astype(np.float32) / np.float32(255)
    told = Denoiser(read_bundle(tmp_path / "model"), device="cpu").run(noisy, quality)
    np.testing.assert_allclose(table["denoised_psnr"].to_numpy(), told.psnr, atol=1e-3)
    np.testing.assert_allclose(table["denoised_noise_level"].to_numpy(), told.noise_level, atol=1e-4)
    content = manifest.read_manifest(tmp_path / "out.parquet")
    assert content is not None
    assert content["quality"] is True
    assert content["rows_poor"] == report.poor == (told.psnr < 10.0).sum()
    assert any("below 10 dB" in line for line in report.summary_lines()) == (report.poor > 0)
    assert manifest.verify(tmp_path / "out.parquet") == []
    lowest, highest = inspect(str(tmp_path / "out.parquet")).facts["ranges"]["denoised_psnr"].split(" to ")
    assert (float(lowest), float(highest)) == pytest.approx((told.psnr.min(), told.psnr.max()), rel=0.01)


@pytest.mark.usefixtures("ray_session")
def test_a_file_becomes_a_file_and_a_folder_can(tmp_path: Path, source: Path, model: Path) -> None:
    one = source / "03.parquet"
    infer(InferSettings((str(one),), str(tmp_path / "one.parquet"), model=model))
    assert (tmp_path / "one.parquet").is_file()
    _check(tmp_path / "one.parquet", one, model)
    shape = OutputShape.SINGLE_FILE
    many = InferSettings((str(source),), str(tmp_path / "many.parquet"), model=model, shape=shape, workers=1)
    infer(many)
    _check(tmp_path / "many.parquet", source, model)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "_many.parquet.manifest",
        "_one.parquet.manifest",
        "many.parquet",
        "one.parquet",
    ]
    assert infer(many).already_complete
    with pytest.raises(OutputError, match="exists"):
        infer(replace(many, dtype="float32"))
    infer(replace(many, overwrite=True, shape=OutputShape.DIRECTORY))
    _check(tmp_path / "many.parquet", source, model)
    assert not (tmp_path / "_many.parquet.manifest").exists()


def test_zero_rows_give_a_valid_empty_output_without_ray(tmp_path: Path, model: Path) -> None:
    pq.write_table(_table(0, 0), tmp_path / "none.parquet")
    for shape in (OutputShape.AUTO, OutputShape.DIRECTORY):
        out = tmp_path / shape.value
        report = infer(InferSettings((str(tmp_path / "none.parquet"),), str(out), model=model, shape=shape))
        assert (report.rows_out, pq.read_table(out).schema.names) == (0, ["id", "image", "denoised"])
        assert manifest.verify(out) == []


def test_files_that_are_left_out_are_said(tmp_path: Path, model: Path) -> None:
    """Their rows are not in OUT: nobody is to take it for the whole folder."""
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    pq.write_table(_table(0, 0), folder / "a.parquet")
    pq.write_table(_table(0, 5), folder / "b.snappy")
    settings = InferSettings((str(folder),), str(out), model=model)
    note = "note: 1 file left out because of its name: 'b.snappy'"
    assert note in infer(settings).summary_lines()
    assert note in infer(settings).summary_lines()  # complete already
    saved = json.loads((out / manifest.FOLDER / manifest.REPORT).read_text())
    assert (saved["skipped_files"], saved["skipped"]) == (1, [str(folder / "b.snappy")])
    assert not any(line.endswith(": None") for line in inspect(str(out)).lines())


@pytest.mark.usefixtures("ray_session")
def test_a_damaged_page_costs_its_unit_alone_and_the_next_run_retries_only_it(
    tmp_path: Path, source: Path, model: Path
) -> None:
    copy = tmp_path / "in"
    copy.mkdir()
    for path in source.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    bad = copy / "05.parquet"
    whole = bytearray(bad.read_bytes())
    whole[len(whole) // 2] ^= 4
    bad.write_bytes(whole)
    settings = InferSettings((str(copy),), str(tmp_path / "out"), model=model)
    for units_done in (0, FILES - 1):
        with pytest.raises(JobFailed) as error:
            infer(settings)
        assert f"1 of {FILES} units failed" in error.value.message
        assert "05.parquet, rows 0–1499" in error.value.message
        assert not (tmp_path / "out").exists()
        with Ledger(work_folder(tmp_path / "out") / "ledger") as ledger:
            assert sorted(ledger.receipts) == [n for n in range(FILES) if n != 5]
            assert len(ledger.failures[5]) == (3 if units_done == 0 else 6)


@pytest.mark.usefixtures("ray_session")
def test_too_many_bad_rows_fail_the_job_resumes_included(tmp_path: Path, source: Path, model: Path) -> None:
    copy = tmp_path / "in"
    copy.mkdir()
    for number in range(4):
        table = pq.read_table(source / f"{number:02d}.parquet")
        marks = np.zeros(ROWS, np.uint8)
        marks[: 30 * number] = 1
        image = encode(decode(table["image"], IMAGE).pixels, marks, IMAGE)
        pq.write_table(table.set_column(1, IMAGE.field, image), copy / f"{number}.parquet")
    settings = InferSettings((str(copy),), str(tmp_path / "out"), model=model, workers=1)
    for _ in range(2):
        with pytest.raises(
            JobFailed, match=r"rows are bad so far \(.* null\), more than --max-bad 0.01 allows"
        ) as error:
            infer(settings)
        assert re.search(r"; the first is \S+/[123]\.parquet, row 0: null$", error.value.message)
    # Nor may the same request be met once all units are done.
    with pytest.raises(JobFailed, match="rows are bad"):
        infer(settings)
    report = infer(replace(settings, max_bad=0.04))
    assert (report.rows_out, report.bad_rows) == (4 * ROWS, {"null": 180})
    assert report.resumed_units > 0
    assert pq.read_table(tmp_path / "out")["denoised"].null_count == 180


# --- the driver dies: a process of its own, with a Ray of its own -----------------------------------------------------

_DRIVER = """
import os, sys, time
from pathlib import Path
from denoise_batch.inference.infer import InferSettings, infer
def progress(p):
    print(p.phase, p.units, flush=True)
if __name__ == "__main__":
    infer(InferSettings((sys.argv[1],), sys.argv[2], model=Path(sys.argv[3]), workers=1), progress)
"""


@pytest.fixture
def driver(tmp_path: Path, source: Path, model: Path) -> list[str]:
    script = tmp_path / "driver.py"
    script.write_text(_DRIVER)
    return [sys.executable, str(script), str(source), str(tmp_path / "out"), str(model)]


def _run_until(command: list[str], units: int) -> subprocess.Popen[str]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.split()[0] == "denoising" and int(line.split()[1]) >= units:
            break
    return process


@pytest.mark.usefixtures("ray_session")
def test_a_killed_driver_resumes_to_the_same_bytes(
    tmp_path: Path, source: Path, model: Path, driver: list[str]
) -> None:
    process = _run_until(driver, 4)
    process.kill()  # it alone: its workers notice seconds later, while the next run begins
    process.wait()
    assert process.stdout is not None
    process.stdout.close()
    out = tmp_path / "out"
    assert not out.exists()
    with Ledger(work_folder(out) / "ledger") as ledger:
        done = {unit: receipt.file for unit, receipt in ledger.receipts.items()}
    assert len(done) >= 4
    (work_folder(out) / "staging" / "unit-0000011.s0001.a9.parquet").write_bytes(b"an orphan's late file")
    staged = {unit: (work_folder(out) / "staging" / name).stat().st_ino for unit, name in done.items()}

    with pytest.raises(ResumeError, match="on_bad_row"):
        infer(InferSettings((str(source),), str(out), model=model, on_bad_row=OnBadRow.QUARANTINE))

    resumed = subprocess.run(driver, stdout=subprocess.PIPE, text=True, timeout=150, check=True)
    assert f"starting {len(done)}" in resumed.stdout
    _check(out, source, model)
    # What was committed was not made again: the same files, moved.
    assert all((out / f"part-{unit:05d}.parquet").stat().st_ino == inode for unit, inode in staged.items())

    undisturbed = tmp_path / "undisturbed"
    infer(InferSettings((str(source),), str(undisturbed), model=model, workers=1))
    for part in sorted(undisturbed.glob("*.parquet")):
        assert part.read_bytes() == (out / part.name).read_bytes(), part.name


def test_two_runs_on_one_output_cannot_mix(tmp_path: Path, source: Path, model: Path, driver: list[str]) -> None:
    process = _run_until(driver, 1)
    with pytest.raises(OutputError, match="another run"):
        infer(InferSettings((str(source),), str(tmp_path / "out"), model=model))
    process.communicate(timeout=150)
    assert process.returncode == 0
    _check(tmp_path / "out", source, model)


def test_ctrl_c_and_sigterm_stop_within_seconds_and_the_same_command_goes_on(
    tmp_path: Path, source: Path, model: Path
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "denoise_batch.cli", "infer", str(source), str(out), "--model", str(model)]
    command += ["--workers", "1"]
    done = 0
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while _committed(out) <= done and time.monotonic() < deadline:
            time.sleep(0.05)
        begun = time.monotonic()
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == code, errors
        assert time.monotonic() - begun < 20
        assert "error: " in errors
        assert f"go on with: denoise-batch infer {source} {out}" in errors
        assert "Traceback" not in errors
        assert not out.exists()
        assert done < _committed(out) < FILES
        done = _committed(out)
    finished = subprocess.run(command, capture_output=True, text=True, timeout=150, check=True)
    assert f"{done} of {FILES} units were done by an earlier run" in finished.stdout
    _check(out, source, model)


def _committed(out: Path) -> int:
    """Receipts on disk, whole lines only."""
    ledger = work_folder(out) / "ledger"
    return sum(path.read_bytes().count(b'["receipt",') for path in ledger.glob("*.jsonl")) if ledger.is_dir() else 0
