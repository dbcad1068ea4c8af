"""The same command again once its output is there: nothing is done, and nothing is called finished that is not."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq
import pytest
from folder_store import FolderStore, locator

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from fault_steps import without_ray, write_source

from denoise_batch import storage
from denoise_batch.bundle import SHIPPED_FOLDER, read_bundle
from denoise_batch.errors import OutputError, OutputExists
from denoise_batch.extra_columns import ExtraColumns
from denoise_batch.inference import infer as module
from denoise_batch.inference.denoise_unit import OnBadRow
from denoise_batch.inference.dry_run import dry_run
from denoise_batch.inference.infer import InferReport, InferSettings, OutputShape, infer
from denoise_batch.inference.manifest import vouching

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Pixels, WriteImages

ROWS = 30
KINDS = ["folder", "file", "store"]


@pytest.fixture
def settings(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    footers_read_here: None,  # noqa: ARG001
) -> InferSettings:
    """A request that has been met, with its output in each of the forms there are."""
    source = write_source(tmp_path / "in", 3, ROWS, 0, bad=True)
    out = str(tmp_path / "out")
    if request.param == "store":
        out = "gs://bucket/out"
        monkeypatch.setattr(storage, "locate", locator(FolderStore(tmp_path / "store")))
    shape = OutputShape.SINGLE_FILE if request.param == "file" else OutputShape.AUTO
    settings = InferSettings((str(source),), out, max_bad=0.5, shape=shape)
    with without_ray():
        assert not infer(settings).already_complete
    return settings


def again(settings: InferSettings) -> InferReport:
    """The report; fails where anything is denoised."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "process_units", None)
        patch.setattr(module, "connect", None)
        return infer(settings)


@pytest.mark.parametrize("settings", KINDS, indirect=True)
def test_the_same_command_again_has_nothing_to_do(settings: InferSettings) -> None:
    report = again(replace(settings, workers=7, batch_size=3))  # how it runs may differ
    assert report.already_complete
    assert (report.rows_in, report.rows_out, report.rows_done) == (3 * ROWS, 3 * ROWS, 0)
    assert sum(report.bad_rows.values()) == ROWS
    assert "complete already" in report.summary_lines()[-1]
    looked = dry_run(settings)
    assert (looked.complete, looked.done_rows, looked.estimate) == (True, 3 * ROWS, None)
    assert "complete already" in looked.lines()[-1]


@pytest.mark.parametrize("settings", KINDS, indirect=True)
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"on_bad_row": OnBadRow.QUARANTINE}, r"it differs in on_bad_row \('null' then, 'quarantine' now\)"),
        ({"dtype": "float32"}, r"it differs in dtype \(not given then, 'float32' now\)"),
        ({"extras": ExtraColumns(quality=True)}, r"it differs in quality \(not given then, yes now\)"),
        ({"model": Path("seed")}, "made by another model"),
        ({"max_bad": 0.1}, "with more bad rows than --max-bad 0.1 allows"),
    ],
    ids=["on_bad_row", "dtype", "extras", "model", "max_bad"],
)
def test_another_request_is_refused(settings: InferSettings, changes: dict[str, object], reason: str) -> None:
    with pytest.raises(OutputExists, match=f"out exists, {reason}$") as caught:
        again(replace(settings, **changes))  # type: ignore[arg-type]
    assert caught.value.hint == "give --overwrite to replace it, or another output"


@pytest.mark.usefixtures("footers_read_here")
@pytest.mark.parametrize("levels", [2, 256])
def test_the_model_for_few_levels_counts_where_there_are_few(
    tmp_path: Path, digits: tuple[Pixels, Pixels], write_images: WriteImages, levels: int
) -> None:
    pixels = np.where(digits[0] > 127, 255, 0).astype(np.uint8) if levels == 2 else digits[0]
    settings = InferSettings((str(write_images(tmp_path / "in.parquet", pixels)),), str(tmp_path / "out.parquet"))
    with without_ray():
        made = infer(settings)
    few = SHIPPED_FOLDER.with_name("few-levels")
    assert (Path(made.model), made.levels) == ((few, 2) if levels == 2 else (SHIPPED_FOLDER, None))
    assert ("2 levels of grey" in "".join(made.summary_lines())) == (levels == 2)
    manifest = json.loads((tmp_path / "_out.parquet.manifest" / "manifest.json").read_bytes())
    assert manifest.get("levels_found") == (2 if levels == 2 else None)
    assert manifest["few_levels_model_sha256"] == read_bundle(few).sha256
    assert again(settings).already_complete
    named = replace(settings, model=Path("bounds-unet"))
    if levels == 2:
        with pytest.raises(OutputExists, match="made by another model"):
            again(named)
    else:
        assert again(named).already_complete


def _touch(source: Path) -> None:
    os.utime(source / "001.parquet", ns=(1, 1))


def _add(source: Path) -> None:
    shutil.copy(source / "001.parquet", source / "003.parquet")


def _remove(source: Path) -> None:
    (source / "002.parquet").unlink()


def _rename(source: Path) -> None:
    (source / "002.parquet").rename(source / "003.parquet")


@pytest.mark.parametrize("settings", KINDS, indirect=True)
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_touch, r"and .*001\.parquet has changed since"),
        (_add, "made from other input files: 4 now, 3 then"),
        (_remove, "made from other input files: 2 now, 3 then"),
        (_rename, r"made from other input files: .*003\.parquet was none of them"),
    ],
)
def test_another_input_is_another_request(settings: InferSettings, change: Callable[[Path], None], reason: str) -> None:
    change(Path(settings.inputs[0]))
    with pytest.raises(OutputExists, match=f"out exists, {reason}$"):
        again(settings)


@pytest.mark.parametrize("settings", ["folder", "file"], indirect=True)
def test_a_finished_output_needs_no_folder_to_write_to(
    settings: InferSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    assert again(settings).already_complete
    with pytest.raises(OutputError, match="not a writable folder"):
        again(replace(settings, overwrite=True))
    with pytest.raises(OutputError, match="not a writable folder"):
        again(replace(settings, output=f"{settings.output}.new"))


@pytest.mark.parametrize("settings", ["folder"], indirect=True)
def test_files_in_another_order_are_another_request(settings: InferSettings) -> None:
    names = [str(path) for path in sorted(Path(settings.inputs[0]).iterdir())]
    with without_ray():
        infer(replace(settings, inputs=tuple(names), overwrite=True))
    with pytest.raises(OutputExists, match=r"out exists, made from the input files in another order$"):
        again(replace(settings, inputs=tuple(names[::-1])))


@pytest.mark.parametrize("settings", KINDS, indirect=True)
def test_an_output_that_lost_a_part_of_itself_is_not_finished(settings: InferSettings, tmp_path: Path) -> None:
    out = Path(settings.output)
    part = out if out.is_file() else next(tmp_path.rglob("part-00001.parquet"))
    content = part.read_bytes()
    part.write_bytes(content[:-1])
    with pytest.raises(OutputExists):
        again(settings)
    part.write_bytes(content)
    assert again(settings).already_complete
    bad = next(tmp_path.rglob("bad_rows.parquet"))
    content = bad.read_bytes()
    bad.write_bytes(content[:-1])
    with pytest.raises(OutputExists):
        again(settings)
    bad.write_bytes(content)
    assert again(settings).already_complete
    report = next(tmp_path.rglob("report.json"))
    report.write_text("{}")
    with pytest.raises(OutputExists):
        again(settings)
    with without_ray():
        assert not infer(replace(settings, overwrite=True)).already_complete
    assert again(settings).already_complete
    assert pq.read_metadata(part).num_rows in {ROWS, 3 * ROWS}


@pytest.mark.parametrize("settings", ["folder"], indirect=True)
def test_columns_that_are_no_longer_asked_for_make_it_another_request(settings: InferSettings) -> None:
    manifest = Path(settings.output, "_denoise_batch", "manifest.json")
    content = manifest.read_bytes()
    assert b'"quality"' not in content
    changed = content.replace(b"{\n", b'{\n "quality": true,\n', 1)
    for written in (changed, content):
        manifest.write_bytes(written)
        Path(settings.output, "_SUCCESS").write_bytes(vouching(written))
        if written == content:
            assert again(settings).already_complete
        else:
            with pytest.raises(OutputExists, match=r"it differs in quality \(yes then, not given now\)"):
                again(settings)
