"""Puts the finished output together from committed files, and describes it; the run's last step before it is shown."""

from __future__ import annotations

import datetime
import json
import os
import shutil
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from denoise_batch import __version__, storage
from denoise_batch.errors import DataChanged, DenoiseBatchError, MissingFileError
from denoise_batch.extra_columns import ExtraColumns
from denoise_batch.inference.ledger import DIGEST
from denoise_batch.inference.manifest import BAD_ROWS, FOLDER, MANIFEST, QUARANTINE, REPORT, SUCCESS, to_text, vouching
from denoise_batch.inference.merging import first_schema, first_units, joined_index
from denoise_batch.inference.output_schema import output_schema
from denoise_batch.inference.run_folder import DATA, part_name
from denoise_batch.parquet.output_file import OutputFile, Written, file_digest
from denoise_batch.parquet.range_index import NOT_IN_LINE, NOT_OF_ALL, expected_fate, of_some_rows
from denoise_batch.storage import publishing
from denoise_batch.storage.listing import stat_input
from denoise_batch.storage.object_store import in_parallel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from denoise_batch.images.layouts import ImageColumn
    from denoise_batch.inference.plan import PlannedFile
    from denoise_batch.inference.run_folder import Run, RunFolder

_BAD_ROWS = pa.schema([("file", pa.string()), ("row", pa.int64()), ("reason", pa.string())])
_BAD_ROWS_GROUP = 65_536
"""The most rows of a row group: the driver holds as many paths at a time."""
_BAD_ROWS_TABLES = 4096
"""The most units that a row group is of: to the driver each is some kilobytes, however few its rows."""

_PANDAS = b"pandas"


def reconcile(run: Run) -> None:
    """Asserts that every planned row is accounted for, per unit and in total, and that no input changed meanwhile.

    Raises:
        DenoiseBatchError: rows in ≠ rows out + rows set aside.
        DataChanged: an input file is not what it was in planning.
    """
    plan, receipts = run.plan, run.ledger.receipts
    quarantine = run.identity["on_bad_row"] == "quarantine"
    for unit in range(len(plan)):
        receipt = receipts.get(unit)
        planned = int(plan.units["rows"][unit])
        set_aside = sum(receipt.bad.values()) if receipt and quarantine else 0
        if receipt is None or receipt.rows_in != planned or receipt.rows_out + set_aside != planned:
            raise DenoiseBatchError(f"unit {unit}: {planned} rows planned, receipt says {receipt}", hint="report a bug")
    if run.ledger.rows_in != plan.rows:
        raise DenoiseBatchError(
            f"footers say {plan.rows} rows, receipts {run.ledger.rows_in}", hint="nothing was published; report a bug"
        )
    for file in plan.files:
        if not storage.is_uri(file.path):
            _check_unchanged(file)
    in_parallel(_check_unchanged, [file for file in plan.files if storage.is_uri(file.path)])


def _check_unchanged(file: PlannedFile) -> None:
    try:
        now = stat_input(file.path)
    except MissingFileError:
        now = (-1, -1)
    if now != (file.size, file.mtime_ns):
        raise DataChanged(
            f"{storage.redact(file.path)} changed while the run worked",
            hint="nothing was published; run again with --overwrite to start afresh",
        )


def build_folder(run: RunFolder, column: ImageColumn, compression: str, report: dict[str, Any]) -> Path:
    """Moves the committed files to their final names under `run.built`; may be repeated after a crash."""
    _check_beside(run)
    built = run.built
    (built / FOLDER).mkdir(parents=True, exist_ok=True)
    files = []
    for staged, entry in parts(run):
        _move(run, staged, built / entry["path"])
        files.append(entry)
    if not files:
        files.append(write_empty_part(run, column, built, compression))
    aside = _link_quarantine(run, built / FOLDER)
    describe(run, built / FOLDER, files, aside, report, success=built / SUCCESS)
    return built


def _check_beside(run: RunFolder) -> None:
    """Compares what is staged beside the data with the receipts, before it is shown.

    Raises:
        DenoiseBatchError: a file is damaged; the receipt is taken back.
    """
    damaged = [
        (unit, run.staging / name)
        for unit, receipt in run.ledger.receipts.items()
        for name, (_, digest) in receipt.beside.items()
        if file_digest(run.staging / name) != digest
    ]
    for unit in dict.fromkeys(unit for unit, _ in damaged):
        run.ledger.withdraw(unit, "a finished file of it is damaged")
    if damaged:
        raise damaged_file(damaged[0][1])


def damaged_file(place: object) -> DenoiseBatchError:
    """The error of a staged file whose receipt was taken back."""
    return DenoiseBatchError(
        f"{place} is damaged: its digest is not the receipt's", hint="run the same command again to make it anew"
    )


def parts(run: Run) -> list[tuple[str, dict[str, Any]]]:
    """Each unit's staged file, and the entry of its part in the manifest."""
    found = []
    for unit in range(len(run.plan)):
        receipt = run.ledger.receipts[unit]
        entry = {"rows": receipt.rows_out, "bytes": receipt.bytes, "digest": receipt.digest}
        found.append((receipt.file, {"path": part_name(run.plan, unit), **entry}))
    return found


def set_aside(run: Run) -> list[tuple[str, dict[str, Any]]]:
    """The staged files of rows that were set aside, a file a unit, and their entries: named as the unit's part is."""
    found = []
    for unit in range(len(run.plan)):
        receipt = run.ledger.receipts[unit]
        if receipt.quarantine_file:
            name = f"{QUARANTINE}/{part_name(run.plan, unit)}"
            entry = {"path": name, "bytes": receipt.quarantine_bytes, "digest": receipt.quarantine_digest}
            found.append((receipt.quarantine_file, entry))
    return found


def write_empty_part(run: Run, column: ImageColumn, folder: Path, compression: str) -> dict[str, Any]:
    """Zero rows in: one valid file without rows, so that readers find the schema; its entry in the manifest."""
    name = "part-00000.parquet"
    written = _write_empty(run, column, folder / name, compression)
    return {"path": name, "rows": 0, "bytes": written.bytes, "digest": written.digest}


def build_file(
    run: RunFolder, column: ImageColumn, compression: str, report: dict[str, Any], merged: Written | None
) -> tuple[Path, Path]:
    """The single output file and its sidecar folder under `run.built`.

    Args:
        merged: what `merging` wrote to `run.built / DATA`, where there are several units.
    """
    _check_beside(run)
    built, out_name = run.built, run.out.name
    described = built / "sidecar"
    described.mkdir(parents=True, exist_ok=True)
    data = built / DATA
    if merged is None and len(run.plan) == 1:
        receipt = run.ledger.receipts[0]
        _move(run, receipt.file, data)
        merged = Written(receipt.rows_out, receipt.bytes, receipt.digest)
    elif merged is None:
        publishing.remove(data)
        merged = _write_empty(run, column, data, compression)
    files = [{"path": out_name, "rows": merged.rows, "bytes": merged.bytes, "digest": merged.digest}]
    describe(run, described, files, _link_quarantine(run, described), report, success=described / SUCCESS)
    return data, described


def _move(run: RunFolder, name: str, target: Path) -> None:
    staged = run.staging / name
    target.parent.mkdir(parents=True, exist_ok=True)
    if staged.exists():
        staged.replace(target)
    elif not target.exists():
        raise DenoiseBatchError(f"{staged} is gone", hint="run the same command again to make it anew")


def _write_empty(run: Run, column: ImageColumn, path: Path, compression: str) -> Written:
    publishing.remove(path)
    extras = ExtraColumns.from_json(run.identity).fields(column.name)
    schema = output_schema(run.plan.schema, column.field, *extras, image=run.plan.column.name)
    schema = of_some_rows(schema, 0, 0, run.plan.files[0].rows)
    with OutputFile(path, schema, (run.plan.column, column), compression=compression) as file:
        return file.finish()


def describe(
    run: Run,
    folder: Path,
    files: list[dict[str, Any]],
    aside: list[dict[str, Any]],
    report: dict[str, Any],
    *,
    success: Path,
) -> None:
    """Writes the manifest and what it names beside the data to `folder`, and the mark of success to `success`.

    Args:
        files, aside: entries of the data files, and of the files of rows that were set aside.
    """
    extra = list(aside)
    path = folder / BAD_ROWS
    if _write_bad_rows(run, path):
        publishing.sync(path)
        extra.append({"path": BAD_ROWS, "bytes": path.stat().st_size, "digest": file_digest(path)})
    path = folder / REPORT
    publishing.write_file(path, json.dumps(report, indent=1).encode())
    extra.append({"path": REPORT, "bytes": path.stat().st_size, "digest": file_digest(path)})
    receipts = run.ledger.receipts.values()
    manifest = {
        "format": 1,
        "denoise_batch": __version__,
        "run": run.id,
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "digest": DIGEST,
        **{key: value for key, value in run.identity.items() if key != "format"},
        "polarity_found": run.plan.polarity.value,
        **{f"{name}_found": value for name, value in run.plan.tone.facts().items()},
        "rows_dark_on_light": run.ledger.dark_on_light,
        **({"rows_poor": run.ledger.poor} if run.identity.get("quality") else {}),
        "image_column": run.plan.column.name,
        "image_layout": run.plan.column.layout.value,
        "types_changed": list(run.plan.changes),
        "rows_in": run.plan.rows,
        "rows_out": run.ledger.rows_out,
        "rows_set_aside": run.plan.rows - run.ledger.rows_out,
        "bad_rows": run.ledger.bad_rows(),
        "fingerprints": sorted({receipt.fingerprint for receipt in receipts}),
        "inputs": [
            {"path": storage.redact(file.path), "size": file.size, "mtime_ns": file.mtime_ns, "rows": file.rows}
            for file in run.plan.files
        ],
        "files": files,
        "sidecar": extra,
    }
    content = to_text(manifest)
    publishing.write_file(folder / MANIFEST, content)
    publishing.write_file(success, vouching(content))


def _link_quarantine(run: RunFolder, folder: Path) -> list[dict[str, Any]]:
    """Puts the rows that were set aside under `folder`."""
    entries = []
    for staged, entry in set_aside(run):
        target = folder / entry["path"]
        target.parent.mkdir(parents=True, exist_ok=True)
        publishing.remove(target)
        # The staged file stays until the run is discarded: a run that dies here finds it again.
        try:
            os.link(run.staging / staged, target)
        except OSError:  # a file system without links
            shutil.copyfile(run.staging / staged, target)
            publishing.sync(target)
        entries.append(entry)
    return entries


def first_bad_row(run: Run, read: Callable[[str], bytes | None]) -> str:
    """File, row and reason of the first row that is known to be bad, for people; "" where it cannot be read.

    Args:
        read: gives the content of a staged file.
    """
    unit = min((unit for unit, receipt in run.ledger.receipts.items() if receipt.bad_file), default=None)
    content = None if unit is None else read(run.ledger.receipts[unit].bad_file)
    if unit is None or content is None:
        return ""
    try:
        row = pq.read_table(pa.BufferReader(content)).slice(0, 1).to_pylist()[0]
    except (OSError, pa.ArrowException):
        return ""
    path = storage.redact(run.plan.files[run.plan.unit(unit).file].path)
    return f"{path}, row {row['row']}: {row['reason'].replace('_', ' ')}"


def _write_bad_rows(run: Run, path: Path) -> bool:
    """Writes file, row (its number in that file, from 0), reason: of all bad rows, in input order; False: of none."""
    if not any(receipt.bad_file for receipt in run.ledger.receipts.values()):
        return False
    with pq.ParquetWriter(path, _BAD_ROWS, compression="zstd", write_page_checksum=True) as writer:
        for joined in _together(_bad_rows(run)):
            for start in range(0, joined.num_rows, _BAD_ROWS_GROUP):
                writer.write_table(joined.slice(start, _BAD_ROWS_GROUP).cast(_BAD_ROWS))
    return True


def _together(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Joins small tables: 100,000 units may have a bad row each, and a file of so many row groups is slow to read."""
    held: list[pa.Table] = []
    rows = 0
    for table in tables:
        held.append(table)
        rows += table.num_rows
        if rows >= _BAD_ROWS_GROUP or len(held) >= _BAD_ROWS_TABLES:
            yield pa.concat_tables(held)
            held, rows = [], 0
    if held:
        yield pa.concat_tables(held)


def _bad_rows(run: Run) -> Iterator[pa.Table]:
    """Each unit's bad rows, with its file's path once for all of them."""
    for unit in range(len(run.plan)):
        receipt = run.ledger.receipts[unit]
        if receipt.bad_file:
            with pq.ParquetFile(run.staging / receipt.bad_file) as file:
                table = file.read()
            path = storage.redact(run.plan.files[run.plan.unit(unit).file].path)
            places = pa.repeat(pa.scalar(0, pa.int32()), table.num_rows)
            files = pa.DictionaryArray.from_arrays(places, pa.array([path], pa.string()))
            yield table.add_column(0, "file", files)


def metadata_of_first(run: RunFolder) -> list[str]:
    """In what the metadata of files that were joined into one differs from the first one's, which that one has.

    Pandas' note is left out: it holds each file's number of rows. `fate_of_index` says what is lost of it.
    """
    units = first_units(run)
    if len(units) < 2:
        return []
    schemas = (first_schema(run, unit) for unit in units)
    first = next(schemas)
    columns, keys = set[int](), set[bytes]()
    for schema in schemas:
        if schema.equals(first, check_metadata=True):
            continue
        columns |= {i for i in range(len(first)) if not first.field(i).equals(schema.field(i), check_metadata=True)}
        here, there = first.metadata or {}, schema.metadata or {}
        keys |= {key for key in here.keys() | there.keys() if key != _PANDAS and here.get(key) != there.get(key)}
    named = [f"column {first.names[i]!r}" for i in sorted(columns)]
    return named + [f"the schema's {key.decode(errors='replace')!r}" for key in sorted(keys)]


def fate_of_index(run: Run) -> str:
    """What is said of pandas' index where it stands in the files' footers alone, and is not kept; "" where it is."""
    single, whole = bool(run.identity["single_file"]), run.ledger.rows_out == run.plan.rows
    if not single or len(first_units(run)) < 2:
        return expected_fate(run.plan, single=single, whole=whole)
    _, lost = joined_index(run)
    return "" if lost is None else lost.said(NOT_IN_LINE if whole else NOT_OF_ALL)
