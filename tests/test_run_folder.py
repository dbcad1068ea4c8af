"""Where an output may stand, and which unfinished run is gone on with."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from fault_steps import without_ray, write_source

from denoise_batch.bundle import SHIPPED_FOLDER
from denoise_batch.errors import ColumnError, DenoiseBatchError, FlagError, JobFailed, OutputError, ResumeError
from denoise_batch.images import Polarity
from denoise_batch.inference import assembly
from denoise_batch.inference.denoise_unit import OnBadRow
from denoise_batch.inference.dry_run import dry_run
from denoise_batch.inference.infer import InferSettings, OutputShape, infer
from denoise_batch.inference.manifest import verify
from denoise_batch.inference.plan import Plan, make_plan
from denoise_batch.inference.request import look_at
from denoise_batch.inference.run_folder import check_output, open_run, work_folder
from denoise_batch.storage.listing import list_inputs

pytestmark = pytest.mark.usefixtures("footers_read_here")

IDENTITY = {"model_sha256": "a" * 64, "on_bad_row": "null"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    image = pa.array([bytes(784)] * 10, pa.binary(784))
    for name in "ab":
        pq.write_table(pa.table({"image": image}), folder / f"{name}.parquet")
    return folder


def start(source: Path, out: Path, *, overwrite: bool = False, **changes: Any) -> tuple[bool, int]:
    listing = list_inputs([str(source)])

    def plan() -> Plan:
        return make_plan(listing.files, None, Polarity.LIGHT_ON_DARK, "denoised")

    with open_run(out, listing.files, IDENTITY | changes, plan, overwrite=overwrite) as run:
        return run.resumed, run.ledger.session


def test_the_same_request_goes_on_and_another_is_refused(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    assert start(source, out) == (False, 1)
    assert start(source, out) == (True, 2)
    with pytest.raises(ResumeError, match=r"on_bad_row \('null' then, 'quarantine' now\)"):
        start(source, out, on_bad_row="quarantine")
    assert start(source, out, overwrite=True) == (True, 3)
    assert start(source, out, overwrite=True, on_bad_row="quarantine") == (False, 1)


@pytest.mark.parametrize("change", ["changed", "new", "missing"])
def test_any_change_of_the_input_is_named(tmp_path: Path, source: Path, change: str) -> None:
    start(source, tmp_path / "out")
    if change == "changed":
        os.utime(source / "a.parquet", ns=(0, 1))
    elif change == "new":
        (source / "c.parquet").write_bytes((source / "a.parquet").read_bytes())
    else:
        (source / "a.parquet").unlink()
    name = "c" if change == "new" else "a"
    with pytest.raises(ResumeError, match=rf"{name}\.parquet \({change}\)"):
        start(source, tmp_path / "out")


def test_a_request_that_cannot_be_planned_leaves_nothing_behind(tmp_path: Path, source: Path) -> None:
    listing = list_inputs([str(source)])

    def refuse() -> Plan:
        raise ColumnError("no", hint="no")

    with pytest.raises(ColumnError), open_run(tmp_path / "out", listing.files, IDENTITY, refuse, overwrite=False):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_damaged_run_is_refused_or_started_afresh(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    start(source, out)
    (work_folder(out) / "plan.json").write_text("{")
    with pytest.raises(ResumeError, match="damaged run"):
        start(source, out)
    assert start(source, out, overwrite=True) == (False, 1)


def test_a_crash_in_planning_is_planned_again(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    start(source, out)
    (work_folder(out) / "identity.json").unlink()  # it is written last
    assert start(source, out) == (False, 1)


def test_a_damaged_ledger_can_be_started_afresh(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    start(source, out)
    (work_folder(out) / "ledger" / "000001.jsonl").write_bytes(b"no digest here\n")
    with pytest.raises(ResumeError, match="line 1 is damaged"):
        start(source, out)
    assert start(source, out, overwrite=True) == (True, 1)


def test_a_refused_request_does_not_cost_another_ones_progress(tmp_path: Path, source: Path) -> None:
    listing = list_inputs([str(source)])
    out = tmp_path / "out"
    start(source, out)

    def refuse() -> Plan:
        raise ColumnError("no", hint="no")

    with pytest.raises(ColumnError), open_run(out, listing.files, {"model_sha256": "b"}, refuse, overwrite=True):
        pass
    assert start(source, out) == (True, 2)


def test_overwrite_never_deletes_a_folder_of_something_else(tmp_path: Path, source: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match="infer did not write"):
        check(source, tmp_path / "home", overwrite=True)


def test_overwrite_never_deletes_what_somebody_put_into_an_output(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    for name in ("_SUCCESS", "_denoise_batch/manifest.json", "k=1/part-00000.parquet", ".DS_Store"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(b"{}")
    assert check(source, out, overwrite=True) == out
    (out / "k=1" / "labels.csv").write_text("x")
    with pytest.raises(OutputError, match=r"infer did not write, and --overwrite would delete it: k=1/labels\.csv"):
        check(source, out, overwrite=True)


def test_what_a_plan_file_says_is_private(tmp_path: Path, source: Path) -> None:
    start(source, tmp_path / "out")  # URIs of inputs may hold credentials
    assert (work_folder(tmp_path / "out") / "plan.json").stat().st_mode & 0o077 == 0


def check(source: Path, out: Path, *, overwrite: bool = False) -> Path:
    return check_output(str(out), list_inputs([str(source)]), overwrite=overwrite)


def test_an_output_that_touches_the_input_is_refused(tmp_path: Path, source: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    for out in (source / "out", source / "x" / "out", tmp_path / "link" / "out"):
        with pytest.raises(OutputError, match="inside the input"):
            check(source, out)
    for out in (source, source / "a.parquet", tmp_path):
        with pytest.raises(OutputError, match="is, or holds, the input"):
            check(source, out, overwrite=True)
    with pytest.raises(OutputError, match="is a link"):
        check(source, tmp_path / "link", overwrite=True)


@pytest.mark.parametrize("name", ["_out.parquet.manifest", ".out.parquet.denoise-batch", ".out.parquet.replaced"])
@pytest.mark.parametrize("given", ["quarantine", "quarantine/part-00000.parquet"])
def test_an_input_that_would_be_deleted_along_with_the_old_output_is_refused(
    tmp_path: Path, source: Path, name: str, given: str
) -> None:
    """Rows that were set aside, denoised over the very output that they belong to."""
    aside = tmp_path / name / "quarantine"
    aside.mkdir(parents=True)
    (aside / "part-00000.parquet").write_bytes((source / "a.parquet").read_bytes())
    (tmp_path / "out.parquet").write_bytes(b"")
    (tmp_path / "link").symlink_to(tmp_path)
    for folder in (tmp_path, tmp_path / "link"):
        with pytest.raises(OutputError, match=f"replaces .*{name}, which is, or holds, the input"):
            check(folder / name / given, tmp_path / "out.parquet", overwrite=True)
    assert (aside / "part-00000.parquet").exists()
    check(tmp_path / name / given, tmp_path / "other.parquet", overwrite=True)


def test_a_folder_of_somebody_elses_in_the_manifests_place_is_refused(tmp_path: Path, source: Path) -> None:
    listing = list_inputs([str(source)])
    aside = tmp_path / "_out.parquet.manifest"
    aside.mkdir()
    assert check_output(str(tmp_path / "out.parquet"), listing, overwrite=False)
    (aside / "manifest.json").write_text("{}")  # ours, or what is left of ours
    assert check_output(str(tmp_path / "out.parquet"), listing, overwrite=False)
    (aside / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not what infer wrote"):
        check_output(str(tmp_path / "out.parquet"), listing, overwrite=True)


def test_an_output_that_exists_or_has_no_place_is_refused(tmp_path: Path, source: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists"):
        check(source, tmp_path / "out")
    assert check(source, tmp_path / "out", overwrite=True) == tmp_path / "out"
    assert check(source, tmp_path / "made" / "on" / "demand") == tmp_path / "made" / "on" / "demand"
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="not a writable folder"):
        check(source, tmp_path / "file" / "out")
    for out in ("/proc/out", "/sys/new/out"):  # where root may write
        with pytest.raises(OutputError, match=f"^{out} cannot be written: /[a-z]+ is not a writable folder"):
            check(source, Path(out))


def test_a_single_file_is_not_named_as_another_format(tmp_path: Path, source: Path) -> None:
    settings = InferSettings((str(source),), str(tmp_path / "out.csv"), shape=OutputShape.SINGLE_FILE)
    with pytest.raises(OutputError, match=r"out\.csv: what is written is Parquet") as caught:
        look_at(settings)
    assert caught.value.hint == "name it out.parquet"
    assert look_at(replace(settings, shape=OutputShape.DIRECTORY)).out == tmp_path / "out.csv"
    assert look_at(replace(settings, output=str(tmp_path / "v1.5"))).single


def _interrupted(tmp_path: Path, shape: OutputShape = OutputShape.AUTO) -> tuple[InferSettings, Path]:
    """A run that died before its result was put together, and the folder of its finished files."""
    settings = InferSettings(
        (str(write_source(tmp_path / "bad", 2, 9, 0, bad=True)),),
        str(tmp_path / "out"),
        max_bad=1.0,
        on_bad_row=OnBadRow.QUARANTINE,
        shape=shape,
    )
    with without_ray(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(assembly, "reconcile", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            infer(settings)
    return settings, work_folder(tmp_path / "out") / "staging"


@pytest.mark.parametrize("kind", ["quarantine", "bad"])
def test_a_file_that_was_cut_off_is_made_anew(tmp_path: Path, kind: str) -> None:
    settings, staging = _interrupted(tmp_path)
    os.truncate(next(staging.glob(f"*.{kind}.parquet")), 10)
    with without_ray():
        assert infer(settings).resumed_units == 1
    assert verify(tmp_path / "out") == []


@pytest.mark.parametrize("shape", [OutputShape.AUTO, OutputShape.SINGLE_FILE])
@pytest.mark.parametrize("kind", ["quarantine", "bad"])
def test_a_file_that_was_damaged_is_not_shown_and_made_anew(tmp_path: Path, kind: str, shape: OutputShape) -> None:
    settings, staging = _interrupted(tmp_path, shape)
    path = min(staging.glob(f"*.{kind}.parquet"))
    path.write_bytes(bytes(path.stat().st_size))
    with without_ray():
        with pytest.raises(DenoiseBatchError, match=rf"{kind}\.parquet is damaged: its digest"):
            infer(settings)
        assert not (tmp_path / "out").exists()
        assert infer(settings).resumed_units == 1
    assert verify(tmp_path / "out") == []


def test_a_damaged_list_of_bad_rows_does_not_hide_that_there_are_too_many(tmp_path: Path) -> None:
    settings, staging = _interrupted(tmp_path)
    for path in staging.glob("*.bad.parquet"):
        path.write_bytes(bytes(path.stat().st_size))
    with without_ray(), pytest.raises(JobFailed, match=r"6 of 18 rows are bad so far \(6 null\), more than"):
        infer(replace(settings, max_bad=0.1))


@pytest.mark.parametrize("most", [235, 236])
def test_a_name_that_leaves_no_room_for_those_beside_it_is_refused(tmp_path: Path, source: Path, most: int) -> None:
    settings = InferSettings((str(source),), str(tmp_path / ("ü" * 100 + "x" * (most - 200))), max_bad=1.0)
    if most == 235:
        with without_ray():
            assert infer(settings).rows_out == 20
            assert infer(replace(settings, overwrite=True, compression="lz4")).rows_out == 20
        assert len(list(tmp_path.iterdir())) == 2
        return
    for look in (infer, dry_run):
        with pytest.raises(OutputError, match="is too long: 236 bytes") as caught:
            look(settings)
        assert "at most 235:" in caught.value.hint
        assert caught.value.exit_code == 2


def test_names_that_are_not_utf8_are_refused_before_anything_is_made(tmp_path: Path, source: Path) -> None:
    odd = tmp_path / os.fsdecode(b"bad\xff")
    for look in (infer, dry_run):
        with pytest.raises(OutputError, match="its path is not UTF-8"):
            look(InferSettings((str(source),), str(odd)))
    shutil.copytree(SHIPPED_FOLDER, odd)
    for look in (infer, dry_run):
        with pytest.raises(FlagError, match=r"model folder .* is not UTF-8") as caught:
            look(InferSettings((str(source),), str(tmp_path / "out"), model=odd))
        assert "--model" in caught.value.hint
    assert {path.name for path in tmp_path.iterdir()} == {"in", odd.name}


def test_an_output_within_another_is_refused(tmp_path: Path, source: Path) -> None:
    (tmp_path / "out" / "_denoise_batch").mkdir(parents=True)
    (tmp_path / "out" / "_denoise_batch" / "manifest.json").touch()
    with pytest.raises(OutputError, match=f"lies in {tmp_path / 'out'}, an output of infer"):
        check(source, tmp_path / "out" / "more" / "a.parquet")
    assert check(source, tmp_path / "out", overwrite=True) == tmp_path / "out"
