"""What describes a finished output, and whether the output is still what it says; read and checked at any time.

A folder OUT holds `part-*.parquet` (below hive folders, if the input had any), `_SUCCESS` and `_denoise_batch/` with
`manifest.json`, `report.json` and, where rows were bad, `bad_rows.parquet`. For a single file OUT the latter stand in
`_OUT.manifest/` beside it. PyArrow skips both names. `_SUCCESS` holds the manifest's digest. Made by `assembly`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from denoise_batch.inference.ledger import DIGEST
from denoise_batch.output_file import file_digest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SUCCESS = "_SUCCESS"
FOLDER = "_denoise_batch"
MANIFEST = "manifest.json"
REPORT = "report.json"
BAD_ROWS = "bad_rows.parquet"
QUARANTINE = "quarantine"
"""A folder of the rows that were set aside, as they were: Parquet files that `infer` takes like any other input."""


def sidecar(out: Path) -> Path:
    """The folder that holds the manifest: inside of a folder OUT, beside a file OUT."""
    return out / FOLDER if out.is_dir() else file_sidecar(out)


def file_sidecar(out: Path) -> Path:
    """The folder beside a single file OUT."""
    return out.with_name(f"_{out.name}.manifest")


def is_sidecar(folder: Path) -> bool:
    """Whether a folder holds nothing but what describes an output, whole or half deleted."""
    ours = {MANIFEST, REPORT, BAD_ROWS, QUARANTINE, SUCCESS}
    return folder.is_dir() and not folder.is_symlink() and {path.name for path in folder.iterdir()} <= ours


def to_text(manifest: dict[str, Any]) -> bytes:
    """JSON with a line for each member, and for each entry of a list: there may be millions of files."""

    def member(value: Any) -> str:
        if not isinstance(value, list) or not value:
            return json.dumps(value)
        return "[\n" + ",\n".join(f"  {json.dumps(entry)}" for entry in value) + "\n ]"

    members = (f" {json.dumps(name)}: {member(value)}" for name, value in manifest.items())
    return ("{\n" + ",\n".join(members) + "\n}\n").encode()


def read_manifest(out: Path) -> dict[str, Any] | None:
    """The manifest of a finished output of `infer`, or None where `out` is something else."""
    path = sidecar(out) / MANIFEST
    if not path.is_file():
        return None
    manifest: dict[str, Any] = json.loads(path.read_bytes())
    return manifest


def is_shown(out: Path, run: str) -> bool:
    """Whether `out` is the complete result of the run with this id."""
    try:
        content = read_manifest(out)
    except (OSError, ValueError):
        return False
    if content is None or content.get("run") != run:
        return False
    if out.is_dir():
        return True  # the manifest came with the rename that showed all of it
    entry = content["files"][0]  # of a single file, the description is shown first
    return out.is_file() and out.stat().st_size == entry["bytes"] and file_digest(out) == entry["digest"]


def verify(out: Path) -> list[str]:
    """Reads a finished output again and gives every fault found, one line each; an empty list is a sound output.

    Finds flipped bits in any file, missing files, foreign files and a manifest that was changed.
    """
    folder = sidecar(out)
    success = (out if out.is_dir() else folder) / SUCCESS
    return list(_faults(out, folder, success))


def _stays_below(name: str) -> bool:
    return not name.startswith("/") and all(part not in {"", ".", ".."} for part in name.split("/"))


def _faults(out: Path, folder: Path, success: Path) -> Iterator[str]:
    path = folder / MANIFEST
    for file in (success, path):
        if not file.is_file():
            yield f"{file} is missing"
            return
        if file.is_symlink():
            yield f"{file} is a link, not the file that was written"
    if success.read_bytes() != f"{DIGEST} {file_digest(path)}\n".encode():
        yield f"{path} is not the manifest that {SUCCESS} vouches for"
        return
    manifest = json.loads(path.read_bytes())
    root = out if out.is_dir() else out.parent
    known = {success, path}
    for entry, base in [(e, root) for e in manifest["files"]] + [(e, folder) for e in manifest["sidecar"]]:
        if not _stays_below(entry["path"]):
            yield f"{path} names {entry['path']}, which is no file of the output"
            continue
        file = base / entry["path"]
        known.add(file)
        if file.is_symlink():
            yield f"{file} is a link, not the file that was written"
        elif not file.is_file():
            yield f"{file} is missing"
        elif file.stat().st_size != entry["bytes"]:
            yield f"{file} has {file.stat().st_size} bytes, not {entry['bytes']}"
        elif file_digest(file) != entry["digest"]:
            yield f"{file} is damaged: its digest is not the manifest's"
    folders = {parent for file in known for parent in file.parents}
    for file in sorted((out if out.is_dir() else folder).rglob("*")):
        if file in known or (file in folders and not file.is_symlink()):
            continue
        yield f"{file} is not part of the output"
