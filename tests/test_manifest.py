"""A finished output can be checked again: nothing flipped, missing or foreign goes unseen."""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from fault_steps import without_ray, write_source

from denoise_batch.errors import DataChanged, DenoiseBatchError, OutputError
from denoise_batch.forward import in_float32
from denoise_batch.images import Polarity, encode
from denoise_batch.images.layouts import Layout, output_column
from denoise_batch.inference import assembly, manifest, merging, run_folder
from denoise_batch.inference.denoise_unit import Assignment, OnBadRow, UnitOptions, denoise_unit
from denoise_batch.inference.infer import InferSettings, OutputShape, infer
from denoise_batch.inference.ledger import Receipt
from denoise_batch.inference.plan import make_plan
from denoise_batch.storage import publishing
from denoise_batch.storage.listing import list_inputs

if TYPE_CHECKING:
    from collections.abc import Callable

    from denoise_batch.inference.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("footers_read_here")

IMAGE = output_column(None, "image", Layout.BINARY, "uint8")


def build(
    root: Path, files: int = 3, rows: int = 20, *, bad: bool = True, then: Callable[[RunFolder], Any] | None = None
) -> Path:
    """Runs everything but Ray: plan, units, ledger, output."""
    source = root / "in"
    source.mkdir(exist_ok=True)
    pixels = np.zeros((rows, 784), np.uint8)
    pixels[:, 300:500] = 200
    marks = np.zeros(rows, np.uint8)
    marks[3] = int(bad)
    for number in range(files):
        table = pa.table({"id": list(range(number * rows, (number + 1) * rows)), "image": encode(pixels, marks, IMAGE)})
        if not (source / f"{number}.parquet").exists():
            pq.write_table(table, source / f"{number}.parquet")
    listing = list_inputs([str(source)])
    out = run_folder.check_output(str(root / "out"), listing, overwrite=False)
    identity = {"on_bad_row": "null", "model_sha256": "0" * 64}
    with run_folder.open_run(
        out,
        listing.files,
        identity,
        lambda: make_plan(listing.files, None, Polarity.AUTO, "denoised"),
        overwrite=False,
    ) as run:
        column = output_column(run.plan.column, "denoised")
        options = UnitOptions(str(run.staging), run.plan.column, column, run.plan.polarity, OnBadRow.NULL, "zstd")
        for index in range(len(run.plan)):
            if index in run.ledger.receipts:
                continue
            unit = run.plan.unit(index)
            name = f"unit-{index}.s{run.ledger.session}.parquet"
            receipt = denoise_unit(
                Assignment(unit, run.plan.files[unit.file], 1, name), options, in_float32(lambda x: np.clip(x, 0, 1))
            )
            assert isinstance(receipt, Receipt), receipt
            run.ledger.commit(receipt)
        if then is not None:
            then(run)
        assembly.reconcile(run)
        publishing.publish(assembly.build_folder(run, column, "zstd", {"rate": 1.0}), out, overwrite=False)
        run.discard()
    return out


def test_a_finished_output_is_sound_and_says_what_it_is(tmp_path: Path) -> None:
    out = build(tmp_path)
    assert manifest.verify(out) == []
    described = manifest.read_manifest(out)
    assert described is not None
    assert (described["rows_in"], described["rows_out"], described["bad_rows"]) == (60, 60, {"null": 3})
    bad = pq.read_table(out / "_denoise_batch" / "bad_rows.parquet").to_pylist()
    assert [(row["file"].rsplit("/", 1)[1], row["row"], row["reason"]) for row in bad] == [
        (f"{n}.parquet", 3, "null") for n in range(3)
    ]
    assert pq.read_table(out)["id"].to_pylist() == list(range(60))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.slow
def test_any_flipped_bit_is_found(tmp_path: Path) -> None:
    out = build(tmp_path)
    files = sorted(path for path in out.rglob("*") if path.is_file())
    assert len(files) == 3 + 4
    rng = np.random.default_rng(0)
    for flip in range(1000):
        path = files[flip % len(files)]
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[int(rng.integers(len(whole)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        faults = manifest.verify(out)
        assert faults, path
        path.write_bytes(whole)
    assert manifest.verify(out) == []


def test_rows_that_do_not_add_up_are_found(tmp_path: Path) -> None:
    out = build(tmp_path)
    described = json.loads((out / "_denoise_batch" / manifest.MANIFEST).read_text())
    for said, fault in [
        (19, "says that 60 rows were written, and 59 of its files"),
        ("20", "is damaged: what it says under 'files' is no list of files"),
    ]:
        described["files"][1]["rows"] = said
        content = json.dumps(described).encode()
        (out / "_denoise_batch" / manifest.MANIFEST).write_bytes(content)
        (out / manifest.SUCCESS).write_bytes(manifest.vouching(content))
        (found,) = manifest.verify(out)
        assert found.endswith(fault)


def test_all_that_is_shown_was_synced_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power cut just after OUT was shown must not take: every file's content, every folder's names."""
    synced: set[int] = set()
    fsync = os.fsync

    def note(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    out = build(tmp_path)
    paths = [out, *out.rglob("*")]
    assert len(paths) == 1 + 3 + 5
    assert [path for path in paths if path.stat().st_ino not in synced] == []


def test_missing_and_foreign_files_are_found(tmp_path: Path) -> None:
    out = build(tmp_path)
    part = out / "part-00001.parquet"
    part.rename(tmp_path / "away")
    assert manifest.verify(out) == [f"{part} is missing"]
    (tmp_path / "away").rename(part)
    (out / "part-00009.parquet").write_bytes(part.read_bytes())
    assert manifest.verify(out) == [f"{out / 'part-00009.parquet'} is not part of the output"]


def test_a_file_that_cannot_be_read_is_one_fault_of_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = build(tmp_path)
    digest, success = manifest.file_digest, out / "_SUCCESS"

    def read(path: Path) -> str:
        if path.name == "part-00000.parquet":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return digest(path)

    monkeypatch.setattr(manifest, "file_digest", read)
    (out / "part-00002.parquet").unlink()
    assert manifest.verify(out) == [
        f"{out}/part-00000.parquet cannot be read: Input/output error",
        f"{out}/part-00002.parquet is missing",
    ]
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(out / "part-00000.parquet" if path == success else path))
    assert manifest.verify(out) == [f"{success} cannot be read: Input/output error"]


def test_rows_that_do_not_add_up_are_never_published(tmp_path: Path) -> None:
    def lose(run: RunFolder) -> None:
        receipt = run.ledger.receipts[1]
        run.ledger.receipts[1] = Receipt(**(receipt.to_json() | {"rows_out": 19}))

    with pytest.raises(DenoiseBatchError, match="unit 1: 20 rows planned"):
        build(tmp_path, then=lose)
    assert not (tmp_path / "out").exists()


def test_an_input_that_changes_at_the_end_is_noticed(tmp_path: Path) -> None:
    def touch(_run: RunFolder) -> None:
        (tmp_path / "in" / "2.parquet").write_bytes((tmp_path / "in" / "1.parquet").read_bytes() + b"x")

    with pytest.raises(DataChanged, match=r"2\.parquet changed"):
        build(tmp_path, then=touch)
    assert not (tmp_path / "out").exists()


def test_a_store_is_asked_for_many_inputs_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(3, timeout=10)  # broken where one waits for another's answer

    def look(run: RunFolder) -> None:
        known = {f"s3://bucket/{number}": file for number, file in enumerate(run.plan.files)}
        remote = tuple(replace(file, path=uri) for uri, file in known.items())

        def stat(path: str) -> tuple[int, int]:
            together.wait()
            return known[path].size, known[path].mtime_ns + changed.get(path, 0)

        with monkeypatch.context() as patch:
            patch.setattr(assembly, "stat_input", stat)
            changed: dict[str, int] = {}
            assembly.reconcile(replace(run, plan=replace(run.plan, files=remote)))
            changed = {"s3://bucket/1": 1, "s3://bucket/2": 1}
            with pytest.raises(DataChanged, match="s3://bucket/1 changed"):
                assembly.reconcile(replace(run, plan=replace(run.plan, files=remote)))

    build(tmp_path, then=look)


def _bad_of(folder: Path, counts: list[int]) -> Any:
    """A run whose units have so many bad rows each, and what is to be said of them."""
    reasons = ["null", "wrong_length"]
    expected, receipts = [], {}
    for unit, count in enumerate(counts):
        rows = [{"row": row, "reason": reasons[row % 2]} for row in range(count)]
        if rows:
            pq.write_table(pa.Table.from_pylist(rows), folder / f"{unit}.bad.parquet")
            expected += [{"file": f"/in/{unit}.parquet", **row} for row in rows]
        receipts[unit] = SimpleNamespace(bad_file=f"{unit}.bad.parquet" if rows else "")
    files = [SimpleNamespace(path=f"/in/{unit}.parquet") for unit in range(len(counts))]

    class Plan(list[int]):
        unit = staticmethod(lambda index: SimpleNamespace(file=index))

    plan = Plan(range(len(counts)))
    plan.files = files  # type: ignore[attr-defined]
    return SimpleNamespace(plan=plan, staging=folder, ledger=SimpleNamespace(receipts=receipts)), expected


def test_bad_rows_are_written_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "_BAD_ROWS_GROUP", 100)
    monkeypatch.setattr(assembly, "_BAD_ROWS_TABLES", 8)
    run, expected = _bad_of(tmp_path, [3, 0, 350, 100, 20, *[1] * 40, 0])
    path = tmp_path / "bad_rows.parquet"
    assert assembly._write_bad_rows(run, path)
    with pq.ParquetFile(path) as file:
        assert file.schema_arrow.equals(pa.schema([("file", "string"), ("row", "int64"), ("reason", "string")]))
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        assert file.read().to_pylist() == expected
    assert max(sizes) == 100
    assert len(sizes) == 4 + 1 + 6  # units of few are put together
    run, _ = _bad_of(tmp_path, [0, 0])
    assert not assembly._write_bad_rows(run, tmp_path / "none.parquet")
    assert not (tmp_path / "none.parquet").exists()


@pytest.mark.parametrize("copied", [True, False])
def test_metadata_that_a_joined_file_cannot_keep_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copied: bool
) -> None:
    if copied:
        monkeypatch.setattr(merging, "_SMALL_ROWS", 0)
    (tmp_path / "in").mkdir()
    pixels = np.zeros((4, 784), np.uint8)
    pixels[:, 300:500] = 200
    for number in range(3):
        crs = {"crs": f"EPSG:{4326 + number // 2}"}
        fields = [pa.field("image", IMAGE.type), pa.field("place", pa.binary(), metadata=crs), ("id", pa.int64())]
        notes = {"source": f"scanner {number}", "pandas": f"rows {number}", "owner": "us"}
        columns = [encode(pixels, np.zeros(4, np.uint8), IMAGE), pa.array([b"x"] * 4), pa.array(range(4))]
        table = pa.table(columns, schema=pa.schema(fields, notes))
        pq.write_table(table, tmp_path / "in" / f"{number}.parquet")

    def ask(inputs: list[str], shape: OutputShape) -> Any:
        settings = InferSettings(tuple(inputs), str(tmp_path / "out"), shape=shape, overwrite=True)
        with without_ray():
            return infer(settings)

    report = ask([str(tmp_path / "in")], OutputShape.SINGLE_FILE)
    assert report.metadata_of_first == ["column 'place'", "the schema's 'source'"]
    (line,) = [line for line in report.summary_lines() if line.startswith("note: the files'")]
    assert line == (
        "note: the files' metadata differs (column 'place', the schema's 'source'): the joined file has the first one's"
    )
    schema = pq.read_schema(tmp_path / "out")
    assert (schema.field("place").metadata, schema.metadata[b"source"]) == ({b"crs": b"EPSG:4326"}, b"scanner 0")
    said = json.loads((publishing.file_sidecar(tmp_path / "out") / manifest.REPORT).read_text())
    assert said["metadata_of_first"] == report.metadata_of_first
    # Where each file is a part of its own nothing is lost, nor of one file.
    assert ask([str(tmp_path / "in")], OutputShape.DIRECTORY).metadata_of_first == []
    assert ask([str(tmp_path / "in" / "2.parquet")], OutputShape.SINGLE_FILE).metadata_of_first == []


def test_a_crash_while_the_result_is_put_together_can_be_repeated(tmp_path: Path) -> None:
    out = tmp_path / "out"

    class Crash(Exception):
        pass

    def half(run: RunFolder) -> None:
        moved = run.staging / run.ledger.receipts[0].file
        (run.built).mkdir()
        moved.rename(run.built / run_folder.part_name(run.plan, 0))
        raise Crash

    with pytest.raises(Crash):
        build(tmp_path, then=half)
    assert not out.exists()
    listing = list_inputs([str(tmp_path / "in")])
    with run_folder.open_run(
        out, listing.files, {"on_bad_row": "null", "model_sha256": "0" * 64}, _never, overwrite=False
    ) as run:
        assert run.resumed
        assert sorted(run.ledger.receipts) == [0, 1, 2]
        column = output_column(run.plan.column, "denoised")
        publishing.publish(assembly.build_folder(run, column, "zstd", {}), out, overwrite=False)
        run.discard()
    assert manifest.verify(out) == []
    assert pq.read_table(out)["id"].to_pylist() == list(range(60))


def _never() -> Any:
    raise AssertionError("an unfinished run is not planned anew")


@pytest.mark.slow
def test_the_old_output_left_by_a_swap_is_never_taken_for_the_new_one(tmp_path: Path) -> None:
    """The process dies between the swap of --overwrite and the deletion of what OUT was before."""

    class Crash(Exception):
        pass

    old = build(tmp_path)
    swapped = {path.name: path.read_bytes() for path in old.glob("*.parquet")}
    old.rename(tmp_path / "old")

    def swap(run: RunFolder) -> None:
        column = output_column(run.plan.column, "denoised")
        built = assembly.build_folder(run, column, "zstd", {})
        built.rename(tmp_path / "out")
        (tmp_path / "old").rename(built)
        # The same names and rows, other bytes: as another model would have made them.
        for path in built.glob("*.parquet"):
            path.write_bytes(swapped[path.name][::-1])
        raise Crash

    with pytest.raises(Crash):
        build(tmp_path, then=swap)
    listing = list_inputs([str(tmp_path / "in")])
    identity = {"on_bad_row": "null", "model_sha256": "0" * 64}
    with run_folder.open_run(tmp_path / "out", listing.files, identity, _never, overwrite=False) as run:
        assert run.shown  # the run knows its own output again, and has only to be discarded
    publishing.remove(tmp_path / "out")
    with run_folder.open_run(tmp_path / "out", listing.files, identity, _never, overwrite=True) as run:
        assert run.resumed
        assert not run.shown
        assert not run.ledger.receipts
        assert [path for path in run.built.rglob("*") if path.is_file()] == []


def test_a_run_that_died_after_its_output_was_shown_has_only_to_be_discarded(tmp_path: Path) -> None:
    class Crash(Exception):
        pass

    def show(run: RunFolder) -> None:
        column = output_column(run.plan.column, "denoised")
        publishing.publish(assembly.build_folder(run, column, "zstd", {}), run.out, overwrite=False)
        raise Crash

    with pytest.raises(Crash):
        build(tmp_path, then=show)
    out, listing = tmp_path / "out", list_inputs([str(tmp_path / "in")])
    identity = {"on_bad_row": "null", "model_sha256": "0" * 64}
    assert run_folder.check_output(str(out), listing, overwrite=False) == out
    with run_folder.open_run(out, listing.files, identity, _never, overwrite=False) as run:
        assert run.shown
        assert len(run.ledger.receipts) == 3
    # Another request does not go on with it: for that one the output simply exists.
    other = {**identity, "on_bad_row": "fail"}
    with (
        pytest.raises(OutputError, match="out exists"),
        run_folder.open_run(out, listing.files, other, _never, overwrite=False),
    ):
        pass
    assert not run_folder.work_folder(out).exists()
    assert manifest.verify(out) == []


def test_an_unfinished_run_is_kept_when_it_is_repeated_without_overwrite(tmp_path: Path) -> None:
    class Crash(Exception):
        pass

    def crash(_: RunFolder) -> None:
        raise Crash

    with pytest.raises(Crash):
        build(tmp_path, then=crash)
    out, listing = tmp_path / "out", list_inputs([str(tmp_path / "in")])
    out.write_bytes(b"something older, to be overwritten by the run")
    identity = {"on_bad_row": "null", "model_sha256": "0" * 64}
    with (
        pytest.raises(OutputError, match="out exists"),
        run_folder.open_run(out, listing.files, identity, _never, overwrite=False),
    ):
        pass
    with run_folder.open_run(out, listing.files, identity, _never, overwrite=True) as run:
        assert len(run.ledger.receipts) == 3


def test_files_that_no_receipt_names_are_never_picked_up(tmp_path: Path) -> None:
    def orphan(run: RunFolder) -> None:
        # What a worker of a dead driver may leave, even under a name like a unit's.
        (run.staging / "unit-0.s9.parquet").write_bytes(b"half a file")

    out = build(tmp_path, then=orphan)
    assert manifest.verify(out) == []


def test_a_committed_file_that_is_lost_is_made_again(tmp_path: Path) -> None:
    class Crash(Exception):
        pass

    def crash(run: RunFolder) -> None:
        (run.staging / run.ledger.receipts[1].file).unlink()
        raise Crash

    with pytest.raises(Crash):
        build(tmp_path, then=crash)
    listing = list_inputs([str(tmp_path / "in")])
    identity = {"on_bad_row": "null", "model_sha256": "0" * 64}
    with run_folder.open_run(tmp_path / "out", listing.files, identity, _never, overwrite=False) as run:
        assert sorted(run.ledger.receipts) == [0, 2]


def test_the_report_and_manifest_are_json(tmp_path: Path) -> None:
    out = build(tmp_path, bad=False)
    assert json.loads((out / "_denoise_batch" / "report.json").read_text()) == {"rate": 1.0}
    assert not (out / "_denoise_batch" / "bad_rows.parquet").exists()


def test_a_file_whose_name_looks_like_a_partition_leaves_its_folder_readable(tmp_path: Path) -> None:
    """Spark reads `_date=1.parquet.manifest/` as a partition, so that the folder of such an output was refused."""
    source, folder = write_source(tmp_path / "in", 1, 9, 0, bad=True), tmp_path / "days"
    folder.mkdir()
    out = folder / "date=1.parquet"
    settings = InferSettings((str(source),), str(out), max_bad=1.0, shape=OutputShape.SINGLE_FILE)
    described = folder / "_date%3D1.parquet.manifest"
    with without_ray():
        infer(settings)
    assert sorted(folder.iterdir()) == [described, out]
    assert [file.path for file in list_inputs([str(folder)]).files] == [str(out)]
    assert pq.read_table(folder).num_rows == 9
    former = described.rename(folder / "_date=1.parquet.manifest")  # as it was called before
    assert manifest.sidecar(out) == former
    assert manifest.verify(out) == []
    with without_ray():
        assert infer(settings).already_complete
        infer(replace(settings, overwrite=True))
    assert sorted(folder.iterdir()) == [described, out]
    assert manifest.sidecar(out) == described
    assert manifest.verify(out) == []
