"""The finished output: put together from staged files, described by a manifest, checked again at any time.

A folder OUT holds `part-*.parquet` (below hive folders, if the input had any), `_SUCCESS` and `_denoise_batch/` with
`manifest.json`, `report.json` and, where rows were bad, `bad_rows.parquet`. For a single file OUT the latter stand in
`_OUT.manifest/` beside it. PyArrow skips both names. `_SUCCESS` holds the manifest's digest.
"""

from __future__ import annotations

import datetime
import json
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from denoise_batch import __version__, storage
from denoise_batch.errors import DataChanged, DenoiseBatchError, MissingFileError
from denoise_batch.inference.ledger import DIGEST, Receipt
from denoise_batch.inference.run_folder import DATA, part_name
from denoise_batch.output_file import OutputFile, Written, file_digest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from denoise_batch.images.layouts import ImageColumn
    from denoise_batch.inference.plan import Plan
    from denoise_batch.inference.run_folder import RunFolder

SUCCESS = "_SUCCESS"
FOLDER = "_denoise_batch"
MANIFEST = "manifest.json"
REPORT = "report.json"
BAD_ROWS = "bad_rows.parquet"
_MERGE_ROWS = 4096


def sidecar(out: Path) -> Path:
    """The folder that holds the manifest: inside of a folder OUT, beside a file OUT."""
    return out / FOLDER if out.is_dir() else file_sidecar(out)


def file_sidecar(out: Path) -> Path:
    """The folder beside a single file OUT."""
    return out.with_name(f"_{out.name}.manifest")


def reconcile(run: RunFolder) -> None:
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
        try:
            now = storage.stat_input(file.path)
        except MissingFileError:
            now = (-1, -1)
        if now != (file.size, file.mtime_ns):
            raise DataChanged(
                f"{storage.redact(file.path)} changed while the run worked",
                hint="nothing was published; run again with --overwrite to start afresh",
            )


def build_folder(run: RunFolder, column: ImageColumn, compression: str, report: dict[str, Any]) -> Path:
    """Moves the committed files to their final names under `run.built`; may be repeated after a crash."""
    built = run.built
    (built / FOLDER).mkdir(parents=True, exist_ok=True)
    files = []
    for unit in range(len(run.plan)):
        receipt = run.ledger.receipts[unit]
        name = part_name(run.plan, unit)
        _move(run, receipt, built / name)
        files.append({"path": name, "rows": receipt.rows_out, "bytes": receipt.bytes, "digest": receipt.digest})
    if not files:
        # Zero rows in: one valid file without rows, so that readers find the schema.
        written = _write_empty(run.plan, column, built / "part-00000.parquet", compression)
        files.append({"path": "part-00000.parquet", "rows": 0, "bytes": written.bytes, "digest": written.digest})
    _describe(run, built / FOLDER, files, report, success=built / SUCCESS)
    return built


def build_file(
    run: RunFolder, column: ImageColumn, compression: str, report: dict[str, Any], merged: Written | None
) -> tuple[Path, Path]:
    """The single output file and its sidecar folder under `run.built`.

    Args:
        merged: what `merge` wrote to `run.built / DATA`, where there are several units.
    """
    built, out_name = run.built, run.out.name
    described = built / "sidecar"
    described.mkdir(parents=True, exist_ok=True)
    data = built / DATA
    if merged is None and len(run.plan) == 1:
        receipt = run.ledger.receipts[0]
        _move(run, receipt, data)
        merged = Written(receipt.rows_out, receipt.bytes, receipt.digest)
    elif merged is None:
        storage.remove(data)
        merged = _write_empty(run.plan, column, data, compression)
    files = [{"path": out_name, "rows": merged.rows, "bytes": merged.bytes, "digest": merged.digest}]
    _describe(run, described, files, report, success=described / SUCCESS)
    return data, described


def merge(parts: list[Path], target: Path, column: ImageColumn, output: ImageColumn, compression: str) -> Written:
    """Rewrites parts into one file, in their order, a row group at a time."""
    storage.remove(target)
    with pq.ParquetFile(parts[0]) as first:
        schema = first.schema_arrow
    with OutputFile(target, schema, (column, output), compression=compression) as file:
        for part in parts:
            with pq.ParquetFile(part, pre_buffer=False, page_checksum_verification=True) as source:
                for batch in source.iter_batches(_MERGE_ROWS):
                    # Files keep metadata of their own; the merged file takes the first one's.
                    file.write(pa.RecordBatch.from_arrays(batch.columns, schema=schema))
        return file.finish()


def _move(run: RunFolder, receipt: Receipt, target: Path) -> None:
    staged = run.staging / receipt.file
    target.parent.mkdir(parents=True, exist_ok=True)
    if staged.exists():
        staged.replace(target)
    elif not target.exists():
        raise DenoiseBatchError(f"{staged} is gone", hint="run the same command again to make it anew")


def _write_empty(plan: Plan, column: ImageColumn, path: Path, compression: str) -> Written:
    storage.remove(path)
    with OutputFile(path, plan.schema.append(column.field), (plan.column, column), compression=compression) as file:
        return file.finish()


def _describe(
    run: RunFolder, folder: Path, files: list[dict[str, Any]], report: dict[str, Any], *, success: Path
) -> None:
    bad = _bad_rows(run)
    extra = []
    if bad is not None:
        path = folder / BAD_ROWS
        pq.write_table(bad, path, compression="zstd", write_page_checksum=True)
        extra.append({"path": BAD_ROWS, "bytes": path.stat().st_size, "digest": file_digest(path)})
    path = folder / REPORT
    storage.write_file(path, json.dumps(report, indent=1).encode())
    extra.append({"path": REPORT, "bytes": path.stat().st_size, "digest": file_digest(path)})
    receipts = run.ledger.receipts.values()
    manifest = {
        "format": 1,
        "denoise_batch": __version__,
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "digest": DIGEST,
        **{key: value for key, value in run.identity.items() if key != "format"},
        "polarity_found": run.plan.polarity.value,
        "image_column": run.plan.column.name,
        "image_layout": run.plan.column.layout.value,
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
    storage.write_file(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    storage.write_file(success, f"{DIGEST} {file_digest(folder / MANIFEST)}\n".encode())


def _bad_rows(run: RunFolder) -> pa.Table | None:
    """file, row (its number in that file, from 0), reason: of all bad rows, in input order."""
    found = []
    for unit in range(len(run.plan)):
        receipt = run.ledger.receipts[unit]
        if receipt.bad_file:
            table = pq.read_table(run.staging / receipt.bad_file)
            path = storage.redact(run.plan.files[run.plan.unit(unit).file].path)
            found.append(table.add_column(0, "file", pa.array([path] * table.num_rows, pa.string())))
    return pa.concat_tables(found) if found else None


# --- looking at a finished output ---


def read_manifest(out: Path) -> dict[str, Any] | None:
    """The manifest of a finished output of `infer`, or None where `out` is something else."""
    path = sidecar(out) / MANIFEST
    if not path.is_file():
        return None
    manifest: dict[str, Any] = json.loads(path.read_bytes())
    return manifest


def verify(out: Path) -> list[str]:
    """Reads a finished output again and gives every fault found, one line each; an empty list is a sound output.

    Finds flipped bits in any file, missing files, foreign files and a manifest that was changed.
    """
    folder = sidecar(out)
    success = (out if out.is_dir() else folder) / SUCCESS
    return list(_faults(out, folder, success))


def _faults(out: Path, folder: Path, success: Path) -> Iterator[str]:
    path = folder / MANIFEST
    if not success.is_file():
        yield f"{success} is missing"
        return
    if not path.is_file():
        yield f"{path} is missing"
        return
    if success.read_bytes() != f"{DIGEST} {file_digest(path)}\n".encode():
        yield f"{path} is not the manifest that {SUCCESS} vouches for"
        return
    manifest = json.loads(path.read_bytes())
    root = out if out.is_dir() else out.parent
    known = {success.resolve(), path.resolve()}
    for entry, base in [(e, root) for e in manifest["files"]] + [(e, folder) for e in manifest["sidecar"]]:
        file = base / entry["path"]
        known.add(file.resolve())
        if not file.is_file():
            yield f"{file} is missing"
        elif file.stat().st_size != entry["bytes"]:
            yield f"{file} has {file.stat().st_size} bytes, not {entry['bytes']}"
        elif file_digest(file) != entry["digest"]:
            yield f"{file} is damaged: its digest is not the manifest's"
    for file in sorted((out if out.is_dir() else folder).rglob("*")):
        if file.is_file() and file.resolve() not in known:
            yield f"{file} is not part of the output"
