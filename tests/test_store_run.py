"""Runs that write to an object store, which is a folder here: resume, overwriting, refusals, two runs on one output."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import pytest
from folder_store import FolderStore, locator

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from fault_steps import without_ray, write_source

from denoise_batch import storage
from denoise_batch.errors import DenoiseBatchError, FlagError, MissingFileError, OutputError, ParquetError, ResumeError
from denoise_batch.forward import in_float32
from denoise_batch.inference import infer as module
from denoise_batch.inference import manifest, store_owner, store_run
from denoise_batch.inference.denoise_unit import OnBadRow, denoise_unit
from denoise_batch.inference.dry_run import dry_run
from denoise_batch.inference.infer import InferReport, InferSettings, OutputShape, infer
from denoise_batch.inference.store_owner import Owner
from denoise_batch.inspection import inspect
from denoise_batch.inspection.result import Kind
from denoise_batch.storage import object_store
from denoise_batch.storage.listing import Listing, list_inputs
from denoise_batch.storage.store_prefix import StorePrefix

if TYPE_CHECKING:
    from collections.abc import Iterator

OUT = "gs://bucket/some/denoised"
ROWS = 20


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, footers_read_here: None) -> FolderStore:  # noqa: ARG001
    found = FolderStore(tmp_path / "store")
    monkeypatch.setattr(storage, "locate", locator(found))
    monkeypatch.setattr(object_store.time, "sleep", lambda _: None)
    return found


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "in", 4, ROWS, 0)


def run(source: object, out: str = OUT, **changes: Any) -> InferReport:
    with without_ray():
        return infer(InferSettings((str(source),), out, max_bad=1.0, **changes))


def ids(out: str = OUT) -> list[int]:
    """As a reader finds them that goes by the manifest."""
    prefix = StorePrefix.at(out)
    content = manifest.read_manifest(prefix)
    assert content is not None
    found: list[int] = []
    for entry in content["files"]:
        with prefix.filesystem.open_input_file(f"{prefix.root}/{entry['path']}") as file:
            found += pq.read_table(file)["id"].to_pylist()
    return found


def run_keys(store: FolderStore) -> list[str]:
    return [key for key in store.objects() if manifest.RUN in key]


def test_a_folder_of_parts_a_manifest_and_a_mark(store: FolderStore, source: Path) -> None:
    report = run(source)
    assert (report.output, report.rows_out, report.units) == (OUT, 4 * ROWS, 4)
    assert ids() == list(range(4 * ROWS))
    assert store.objects("bucket/some") == [
        "bucket/some/denoised/_SUCCESS",
        "bucket/some/denoised/_denoise_batch/manifest.json",
        "bucket/some/denoised/_denoise_batch/report.json",
        *[f"bucket/some/denoised/part-0000{n}.parquet" for n in range(4)],
    ]
    found = inspect(OUT, verify=True)
    assert (found.kind, found.problems, found.path) == (Kind.OUTPUT, (), OUT)
    with pytest.raises(OutputError, match=f"{OUT} exists"):
        run(source, compression="lz4")


@pytest.mark.parametrize("verify", [False, True])
def test_what_describes_an_output_is_missed(store: FolderStore, source: Path, verify: bool) -> None:
    run(source)
    folder = store.root / "bucket" / "some" / "denoised"
    described, success = folder / "_denoise_batch" / "manifest.json", folder / "_SUCCESS"
    content = described.read_bytes()
    described.write_bytes(content[:-10])
    assert "manifest" in inspect(OUT, verify=verify).problems[0]
    described.unlink()
    assert inspect(OUT, verify=verify).problems == (f"{OUT}/_denoise_batch/manifest.json is missing",)
    described.write_bytes(content)
    success.unlink()
    assert inspect(OUT, verify=verify).problems == (f"{OUT}/_SUCCESS is missing",)


@pytest.mark.usefixtures("store")
def test_one_file_or_none_in_is_a_folder_too(source: Path, tmp_path: Path) -> None:
    run(source / "000.parquet")
    assert ids() == list(range(ROWS))
    empty = tmp_path / "empty.parquet"
    pq.write_table(pq.read_table(source / "000.parquet").slice(0, 0), empty)
    run(empty, f"{OUT}-none")
    assert ids(f"{OUT}-none") == []
    assert inspect(f"{OUT}-none", verify=True).problems == ()
    with pytest.raises(FlagError, match="--single-file"):
        run(source, f"{OUT}-single", shape=OutputShape.SINGLE_FILE)


@pytest.mark.usefixtures("store")
def test_bad_rows_are_listed_and_kept_whole(tmp_path: Path) -> None:
    run(write_source(tmp_path / "bad", 2, 9, 0, bad=True), on_bad_row=OnBadRow.QUARANTINE)
    assert ids() == [n for n in range(18) if n % 9 % 3 != 1]
    with storage.locate(OUT)[0].open_input_file("bucket/some/denoised/_denoise_batch/bad_rows.parquet") as file:
        assert pq.read_table(file)["row"].to_pylist() == [1, 4, 7, 1, 4, 7]
    aside = list_inputs([f"{OUT}/_denoise_batch/quarantine"]).files
    assert [file.path.rpartition("/")[2] for file in aside] == ["part-00000.parquet", "part-00001.parquet"]
    assert inspect(OUT, verify=True).problems == ()


@pytest.mark.usefixtures("store")
def test_overwriting_leaves_nothing_of_the_old_output(source: Path, tmp_path: Path) -> None:
    run(source)
    run(write_source(tmp_path / "other", 2, ROWS, 1000), overwrite=True)
    assert ids() == list(range(1000, 1000 + 2 * ROWS))
    assert inspect(OUT, verify=True).problems == ()


@pytest.mark.usefixtures("store")
def test_another_server_is_another_store() -> None:
    store_run._check_apart(
        StorePrefix.at("gs://bucket/in/out?endpoint_override=a"),
        ["gs://bucket/in?endpoint_override=b", "/local"],
        Listing((), single_file=False, skipped=(), folders=()),
    )


def test_what_somebody_puts_into_an_output_is_not_deleted(store: FolderStore, source: Path) -> None:
    """While a run works, and beside a finished output: no run goes on before it is somewhere else."""
    other = store.root / "bucket/some/denoised/thesis.docx"

    def step(when: str, what: str, key: str) -> None:
        if (when, what) == ("after", "put") and key.endswith(manifest.IDENTITY):
            other.write_bytes(b"years of work")

    store.step = step
    with pytest.raises(OutputError, match=f"{OUT} holds an object that infer did not write: thesis.docx"):
        run(source)
    assert other.read_bytes() == b"years of work"
    other.unlink()
    assert run(source).resumed_units == 4
    store.step = lambda *_: None
    notes = other.with_name("notes") / "part-00000.parquet"
    notes.parent.mkdir()
    notes.write_bytes(b"x")
    before = store.objects()
    with pytest.raises(OutputError, match=r"notes/part-00000\.parquet"):
        run(source, compression="lz4", overwrite=True)
    assert store.objects() == before


def test_tables_in_a_store_are_no_folders_of_files(store: FolderStore) -> None:
    for name in (
        "delta/_delta_log/0.json",
        "delta/k=1/0.parquet",
        "ice/data/0.parquet",
        "ice/metadata/1.metadata.json",
    ):
        path = store.root / "bucket/lake" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    for given, kind in (
        ("lake/delta", "lake/delta is a table of Delta Lake"),
        ("lake/delta/k=1", "lake/delta is a table of Delta Lake"),
        ("lake/delta/k=1/0.parquet", "lake/delta is a table of Delta Lake"),
        ("lake/ice", "lake/ice is a table of Iceberg"),
        ("lake/ice/data", "lake/ice is a table of Iceberg"),
    ):
        with pytest.raises(ParquetError, match=kind):
            list_inputs([f"gs://bucket/{given}"])


@pytest.mark.parametrize("what", ["put", "copy", "delete"])
def test_a_store_that_fails_for_a_while_costs_a_start_and_nothing_else(
    store: FolderStore, source: Path, what: str
) -> None:
    run(source)
    made: list[int] = []
    for at in (1, 3, 4):
        counts = {"all": 0}

        def step(when: str, kind: str, _key: str, counts: dict[str, int] = counts, at: int = at) -> None:
            counts["all"] += (when, kind) == ("before", what)
            if counts["all"] >= at and kind == what:
                raise OSError("AWS Error SLOW_DOWN: Please reduce your request rate.")

        store.step = step
        with pytest.raises(DenoiseBatchError):
            run(source, overwrite=True)
        store.step = lambda *_: None
        made.append(run(source, overwrite=True).resumed_units)
        assert ids() == list(range(4 * ROWS))
        assert inspect(OUT, verify=True).problems == ()
    if what == "copy":
        assert made == [4, 4, 4]  # all was committed: nothing is denoised twice


def test_a_resume_takes_what_is_committed_and_only_that(store: FolderStore, source: Path) -> None:
    interrupt(source)
    staged = [key for key in run_keys(store) if "/staging/" in key]
    assert len(staged) == 2
    assert run(source).resumed_units == 2
    assert ids() == list(range(4 * ROWS))
    assert run_keys(store) == []


def interrupt(source: Path, after: int = 2, **changes: Any) -> None:
    """A run that ends after so many units, as if it had been stopped then."""

    def process_units(assignments: Any, options: Any, *_: Any, **__: Any) -> Iterator[Any]:
        for count, assignment in enumerate(assignments):
            if count == after:
                raise KeyboardInterrupt
            yield denoise_unit(assignment, options, in_float32(lambda pixels: pixels))

    with without_ray(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "process_units", process_units)
        with pytest.raises(KeyboardInterrupt):
            infer(InferSettings((str(source),), OUT, max_bad=1.0, **changes))


def test_staged_objects_that_are_lost_or_foreign_are_made_anew_or_deleted(store: FolderStore, source: Path) -> None:
    interrupt(source)
    staging = store.root / "bucket/some/denoised" / store_run.STAGING
    first, second = sorted(staging.iterdir())
    first.unlink()
    (staging / "unit-0000003.s0001-orphan.a1.parquet").write_bytes(second.read_bytes())
    assert run(source).resumed_units == 1
    assert ids() == list(range(4 * ROWS))
    assert inspect(OUT, verify=True).problems == ()


@pytest.mark.parametrize("kind", ["quarantine", "bad"])
def test_a_staged_object_that_was_cut_off_is_made_anew(store: FolderStore, tmp_path: Path, kind: str) -> None:
    bad = write_source(tmp_path / "bad", 3, 9, 0, bad=True)
    interrupt(bad, on_bad_row=OnBadRow.QUARANTINE)
    staging = store.root / "bucket/some/denoised" / store_run.STAGING
    path = next(staging.glob(f"*.{kind}.parquet"))
    path.write_bytes(path.read_bytes()[:10])
    assert run(bad, on_bad_row=OnBadRow.QUARANTINE).resumed_units == 1
    assert inspect(OUT, verify=True).problems == ()


def test_a_list_of_bad_rows_that_was_damaged_is_not_shown_and_made_anew(store: FolderStore, tmp_path: Path) -> None:
    bad = write_source(tmp_path / "bad", 3, 9, 0, bad=True)
    interrupt(bad)
    path = min((store.root / "bucket/some/denoised" / store_run.STAGING).glob("*.bad.parquet"))
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(DenoiseBatchError, match=r"bad\.parquet is damaged: its digest"):
        run(bad)
    assert f"{prefix().root}/{manifest.SUCCESS}" not in store.objects()
    assert run(bad).resumed_units == 2
    assert inspect(OUT, verify=True).problems == ()


@pytest.mark.usefixtures("store")
def test_an_unfinished_output_is_no_input_and_no_output(source: Path) -> None:
    interrupt(source)
    for look in (lambda: inspect(OUT), lambda: list_inputs(["gs://bucket/some"])):
        with pytest.raises(MissingFileError, match=f"{OUT} is not finished"):
            look()
    assert dry_run(InferSettings((str(source),), OUT)).done_rows == 2 * ROWS
    StorePrefix.at(OUT).put("year=2024/part-00000.parquet", source / "000.parquet")  # as if it were being published
    for given in (f"{OUT}/year=2024", f"{OUT}/year=2024/part-00000.parquet"):
        with pytest.raises(MissingFileError, match=f"bucket/some/denoised, in which {given} lies, is not finished"):
            list_inputs([given])


@pytest.mark.usefixtures("store")
def test_another_request_is_refused_where_a_run_is_unfinished(source: Path) -> None:
    interrupt(source)
    with pytest.raises(ResumeError, match=rf"{OUT}: an unfinished run .* compression \('zstd' then, 'lz4' now\)"):
        run(source, compression="lz4")
    assert run(source, compression="lz4", overwrite=True).resumed_units == 0
    assert inspect(OUT, verify=True).problems == ()


def test_a_flipped_bit_and_foreign_objects_are_found(store: FolderStore, source: Path) -> None:
    run(source)
    part = store.root / "bucket/some/denoised/part-00002.parquet"
    content = bytearray(part.read_bytes())
    content[100] ^= 1
    part.write_bytes(content)
    (part.parent / "more.parquet").write_bytes(b"x")
    assert inspect(OUT, verify=True).problems == (
        f"{OUT}/part-00002.parquet is damaged: its digest is not the manifest's",
        f"{OUT}/more.parquet is not part of the output",
    )


@pytest.mark.parametrize(
    ("inputs", "out", "message"),
    [
        ("gs://bucket/in", "gs://bucket/in/out", "lies inside, the input"),
        ("gs://bucket/in", "gs://bucket/in", "is, or lies inside, the input"),
        ("gs://bucket/in/a", "gs://bucket/in", "holds the input"),
        ("gs://bucket/in", "gs://bucket", "whole bucket"),
        ("gs://bucket/in", "gs://none/out", "no bucket 'none'"),
        ("gs://bucket/in", "gs://bucket/a//b", "empty part"),
        ("gs://bucket/in", "gs://bucket/home", r"did not write: thesis.tex"),
        ("gs://bucket/in", "gs://bucket/home/thesis.tex", "is an object"),
        ("gcs://bucket/in", "gs://bucket/in/out", "lies inside, the input"),
        ("gs://bucket/in?endpoint_override=a", "gs://bucket/in/out", "lies inside, the input"),
        ("gs://me:secret@bucket/in", "gs://bucket/out", "holds credentials"),
    ],
)
def test_what_cannot_be_written_is_refused(
    store: FolderStore, source: Path, inputs: str, out: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("in/a", "home"):
        (store.root / "bucket" / folder).mkdir(parents=True)
    (store.root / "bucket/home/thesis.tex").write_text("x")
    (store.root / "bucket/in/a/0.parquet").write_bytes((source / "000.parquet").read_bytes())
    plain = storage.locate
    monkeypatch.setattr(storage, "locate", lambda uri: plain(uri.replace("me:secret@", "")))
    before = store.objects()
    with pytest.raises(DenoiseBatchError, match=message) as caught:
        run(inputs, out, overwrite=True)
    assert caught.value.exit_code == 2
    assert "secret" not in str(caught.value)
    assert store.objects() == before


def test_a_store_that_lets_nobody_write_is_said_before_any_work(store: FolderStore, source: Path) -> None:
    def step(_when: str, what: str, key: str) -> None:
        if what == "put":
            raise OSError(
                f"When putting key '{key}': AWS Error ACCESS_DENIED during PutObject operation: Access Denied"
            )

    store.step = step
    with pytest.raises(OutputError, match="ACCESS_DENIED"):
        run(source)


# --- two runs on one output -------------------------------------------------------------------------------------------


def prefix() -> StorePrefix:
    return StorePrefix.at(OUT)


@pytest.mark.usefixtures("store")
def test_a_run_that_still_beats_refuses_another(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_owner, "BEAT_S", 0.01)
    with Owner(prefix(), manifest.RUN) as first, pytest.raises(OutputError, match="another run is writing"):
        run(source)
    first.check()


def test_a_silent_owner_elsewhere_is_waited_for_then_replaced(
    store: FolderStore, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(source)
    mark = {"token": "gone", "host": "elsewhere", "machine": "another", "pid": 1, "started": "1"}
    (store.root / "bucket/some/denoised" / manifest.RUN / "owner.json").write_text(json.dumps(mark))
    (store.root / "bucket/some/denoised" / manifest.RUN / "beat-gone").write_text("7")
    monkeypatch.setattr(store_owner, "SILENCE_S", 0.05)
    assert run(source).resumed_units == 2
    assert run_keys(store) == []


def test_an_owner_that_died_on_this_machine_is_not_waited_for(
    store: FolderStore, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(source)
    mark = {"token": "gone", **store_owner._this_process(), "started": "1"}
    (store.root / "bucket/some/denoised" / manifest.RUN / "owner.json").write_text(json.dumps(mark))
    monkeypatch.setattr(store_owner, "SILENCE_S", float("inf"))
    assert run(source).resumed_units == 2


def test_who_lost_the_output_stops_and_shows_nothing(store: FolderStore, source: Path) -> None:
    def step(when: str, what: str, key: str) -> None:
        if (when, what) == ("after", "copy") and key.endswith("part-00003.parquet"):
            owner = store.root / "bucket/some/denoised" / manifest.RUN / "owner.json"
            owner.write_text(json.dumps({"token": "another"}))

    store.step = step
    with pytest.raises(OutputError, match="another run has taken over"):
        run(source)
    assert f"{prefix().root}/{manifest.SUCCESS}" not in store.objects()
