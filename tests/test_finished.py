"""The same command again once its output is there: nothing is done, and nothing is called finished that is not."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet as pq
import pytest
from folder_store import FolderStore, locator

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from fault_steps import without_ray, write_source

from denoise_batch import storage
from denoise_batch.errors import OutputExists
from denoise_batch.inference import infer as module
from denoise_batch.inference.denoise_unit import OnBadRow
from denoise_batch.inference.dry_run import dry_run
from denoise_batch.inference.infer import InferReport, InferSettings, OutputShape, infer
from denoise_batch.inference.manifest import vouching

if TYPE_CHECKING:
    from collections.abc import Callable

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
    "changes",
    [{"on_bad_row": OnBadRow.QUARANTINE}, {"compression": "lz4"}, {"max_bad": 0.1}],
    ids=lambda c: next(iter(c)),
)
def test_another_request_is_refused(settings: InferSettings, changes: dict[str, object]) -> None:
    with pytest.raises(OutputExists, match="out exists"):
        again(replace(settings, **changes))  # type: ignore[arg-type]


def _touch(source: Path) -> None:
    os.utime(source / "001.parquet", ns=(1, 1))


def _add(source: Path) -> None:
    shutil.copy(source / "001.parquet", source / "003.parquet")


def _remove(source: Path) -> None:
    (source / "002.parquet").unlink()


@pytest.mark.parametrize("settings", KINDS, indirect=True)
@pytest.mark.parametrize("change", [_touch, _add, _remove])
def test_another_input_is_another_request(settings: InferSettings, change: Callable[[Path], None]) -> None:
    change(Path(settings.inputs[0]))
    with pytest.raises(OutputExists, match="out exists"):
        again(settings)


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
            with pytest.raises(OutputExists):
                again(settings)
