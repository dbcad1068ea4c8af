"""What describes a finished output, and whether the output is still what it says; read and checked at any time.

A folder OUT holds `part-*.parquet` (below hive folders, if the input had any), `_SUCCESS` and `_denoise_batch/` with
`manifest.json`, `report.json` and, where rows were bad, `bad_rows.parquet`. For a single file OUT the latter stand in
`_OUT.manifest/` beside it, `%3D` for every `=`. Readers skip both names. `_SUCCESS` holds the manifest's digest. Made
by `assembly`.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import xxhash

from denoise_batch.errors import first_line
from denoise_batch.inference.ledger import DIGEST
from denoise_batch.parquet.output_file import file_digest
from denoise_batch.storage import safe_partition
from denoise_batch.storage.publishing import described_by, file_sidecar, former_sidecar, remove
from denoise_batch.storage.store_prefix import StorePrefix

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

SUCCESS = "_SUCCESS"
VOUCHING = b"xxh3"
"""How a `_SUCCESS` of ours begins; those of others are empty."""
FOLDER = "_denoise_batch"
MANIFEST = "manifest.json"
REPORT = "report.json"
BAD_ROWS = "bad_rows.parquet"
QUARANTINE = "quarantine"
"""A folder of the rows that were set aside, as they were: Parquet files that `infer` takes like any other input."""
_PART = re.compile(r"part-\d{5,}\.parquet")

RUN = f"{FOLDER}/run"
"""Below an output in an object store: what its unfinished run consists of."""
IDENTITY = f"{RUN}/identity.json"
"""Written once the run is planned, deleted once its output is complete."""


def sidecar(out: Path) -> Path:
    """The folder that holds the manifest: inside of a folder OUT, beside a file OUT."""
    if out.is_dir():
        return out / FOLDER
    beside, former = file_sidecar(out), former_sidecar(out)
    # (No error of a name that is too long: beside such a file nothing stands.)
    stands_there = former is not None and os.path.isdir(former) and not os.path.isdir(beside)  # noqa: PTH112
    return former if former is not None and stands_there else beside


def manifest_of(out: Path | StorePrefix) -> str:
    """Where the manifest lies, to be shown."""
    return f"{out}/{FOLDER}/{MANIFEST}" if isinstance(out, StorePrefix) else str(sidecar(out) / MANIFEST)


def is_sidecar(folder: Path) -> bool:
    """Whether a folder holds nothing but what describes an output, whole or half deleted."""
    ours = {MANIFEST, REPORT, BAD_ROWS, QUARANTINE, SUCCESS}
    return folder.is_dir() and not folder.is_symlink() and {path.name for path in folder.iterdir()} <= ours


def remove_former_sidecar(out: Path) -> None:
    """Deletes what described a single file OUT under the name that its sidecar had before, if it is ours."""
    former = former_sidecar(out)
    if former is not None and is_sidecar(former):
        remove(former)


def described_output(folder: Path) -> Path | None:
    """The output that a `sidecar` is about, whether or not it is there; None where the folder is something else."""
    described = folder.parent if folder.name == FOLDER else described_by(folder)
    return described if described is not None and is_sidecar(folder) else None


def foreign_name(names: Iterable[str]) -> str | None:
    """The first name of a file in a folder OUT that no run of `infer` writes there, None where all are ours.

    Args:
        names: relative to OUT, with slashes.
    """
    for name in names:
        *folders, file = name.split("/")
        part = _PART.fullmatch(file) and all(map(safe_partition, folders))
        if not (part or name == SUCCESS or folders[:1] == [FOLDER]):
            return name
    return None


def to_text(manifest: dict[str, Any]) -> bytes:
    """JSON with a line for each member, and for each entry of a list: there may be millions of files."""

    def member(value: Any) -> str:
        if not isinstance(value, list) or not value:
            return json.dumps(value)
        return "[\n" + ",\n".join(f"  {json.dumps(entry)}" for entry in value) + "\n ]"

    members = (f" {json.dumps(name)}: {member(value)}" for name, value in manifest.items())
    return ("{\n" + ",\n".join(members) + "\n}\n").encode()


class DamagedManifestError(ValueError):
    """A manifest is not what `infer` writes."""


def read_manifest(out: Path | StorePrefix) -> dict[str, Any] | None:
    """The manifest of a finished output of `infer`, or None where `out` is something else.

    Raises:
        DamagedManifestError: it is not what `infer` writes.
    """
    if isinstance(out, StorePrefix):
        content = out.read(f"{FOLDER}/{MANIFEST}")
    else:
        path = sidecar(out) / MANIFEST
        content = path.read_bytes() if os.path.isfile(path) else None  # noqa: PTH113 (as in `sidecar`)
    return None if content is None else _parsed(content)


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DamagedManifestError(f"it is no JSON: {error}") from error
    if not isinstance(manifest, dict):
        raise DamagedManifestError("it is no JSON object")
    for name in ("files", "sidecar"):
        entries = manifest.get(name)
        if not isinstance(entries, list) or not all(
            isinstance(entry, dict)
            and isinstance(entry.get("path"), str)
            and isinstance(entry.get("bytes"), int)
            and isinstance(entry.get("digest"), str)
            and isinstance(entry.get("rows", 0), int)
            for entry in entries
        ):
            raise DamagedManifestError(f"what it says under {name!r} is no list of files")
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


def is_shown_in_store(store: StorePrefix, run: str) -> bool:
    """Whether `_SUCCESS` vouches for the manifest of the run with this id."""
    content, success = store.read(f"{FOLDER}/{MANIFEST}"), store.read(SUCCESS)
    if content is None or success != vouching(content):
        return False
    return bool(json.loads(content).get("run") == run)


def vouching(manifest: bytes) -> bytes:
    """What `_SUCCESS` holds."""
    return f"{DIGEST} {xxhash.xxh3_128_hexdigest(manifest)}\n".encode()


def verify(out: Path | StorePrefix) -> list[str]:
    """Reads a finished output again and gives every fault found, one line each; an empty list is a sound output.

    Finds flipped bits in any file, missing files, foreign files and a manifest that was changed.

    Raises:
        StoreError: the store does not answer.
    """
    if isinstance(out, StorePrefix):
        return list(_faults(_StoreFiles(out), f"{FOLDER}/", SUCCESS))
    if out.is_dir():
        return list(_faults(_LocalFiles(out, out), f"{FOLDER}/", SUCCESS))
    folder = sidecar(out)
    return list(
        _faults(_LocalFiles(out.parent, folder), f"{folder.name}/", f"{folder.name}/{SUCCESS}", single=out.name)
    )


def _stays_below(name: str) -> bool:
    return not name.startswith("/") and all(part not in {"", ".", ".."} for part in name.split("/"))


class _Files(Protocol):
    """What an output consists of, by names relative to a root."""

    def shown(self, name: str) -> str: ...
    def is_link(self, name: str) -> bool: ...
    def size(self, name: str) -> int | None: ...
    def read(self, name: str) -> bytes: ...
    def digest(self, name: str) -> str: ...
    def others(self, known: set[str]) -> Iterator[str]: ...


@dataclass(frozen=True)
class _LocalFiles:
    root: Path
    owned: Path  # all that is below it must be known

    def shown(self, name: str) -> str:
        return str(self.root / name)

    def is_link(self, name: str) -> bool:
        return (self.root / name).is_symlink()

    def size(self, name: str) -> int | None:
        path = self.root / name
        return path.stat().st_size if path.is_file() else None

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def digest(self, name: str) -> str:
        return file_digest(self.root / name)

    def others(self, known: set[str]) -> Iterator[str]:
        files = {self.root / name for name in known}
        folders = {parent for file in files for parent in file.parents}
        for path in sorted(self.owned.rglob("*")):
            if path not in files and not (path in folders and not path.is_symlink()):
                yield str(path)


@dataclass(frozen=True)
class _StoreFiles:
    store: StorePrefix

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return self.store.sizes()

    def shown(self, name: str) -> str:
        return f"{self.store}/{name}"

    def is_link(self, name: str) -> bool:  # noqa: ARG002 (a store has none)
        return False

    def size(self, name: str) -> int | None:
        return self._sizes.get(name)

    def read(self, name: str) -> bytes:
        return self.store.read(name) or b""

    def digest(self, name: str) -> str:
        digest = xxhash.xxh3_128()
        for block in self.store.blocks(name):
            digest.update(block)
        return digest.hexdigest()

    def others(self, known: set[str]) -> Iterator[str]:
        yield from (self.shown(name) for name in sorted(self._sizes.keys() - known))


def _faults(files: _Files, beside: str, success: str, single: str | None = None) -> Iterator[str]:
    """What is wrong with an output.

    Args:
        beside: the prefix of the names of what describes the data files.
        single: the name of an output of one file. It may have another in its manifest, if both were copied or moved:
            what is checked is what was asked for, not what lies where it once was.
    """
    path = f"{beside}{MANIFEST}"
    read: list[bytes] = []
    for name in (success, path):
        try:
            if files.size(name) is None:
                yield f"{files.shown(name)} is missing"
                return
            if files.is_link(name):
                yield f"{files.shown(name)} is a link, not the file that was written"
            read.append(files.read(name))
        except OSError as error:
            yield f"{files.shown(name)} {_unread(error)}"
            return
    vouched, content = read
    if vouched != vouching(content):
        yield f"{files.shown(path)} is not the manifest that {SUCCESS} vouches for"
        return
    try:
        manifest = _parsed(content)
    except DamagedManifestError as error:
        yield f"{files.shown(path)} is damaged: {error}"
        return
    rows = sum(entry.get("rows", 0) for entry in manifest["files"])
    if rows != manifest.get("rows_out"):
        yield f"{files.shown(path)} says that {manifest.get('rows_out')} rows were written, and {rows} of its files"
    known = {success, path}
    data = manifest["files"]
    if single is not None:
        if len(data) != 1:
            yield f"{files.shown(path)} is of {len(data)} files, not of one"
            return
        data = [{**data[0], "path": single}]
    for prefix, entry in [("", e) for e in data] + [(beside, e) for e in manifest["sidecar"]]:
        if not _stays_below(entry["path"]):
            yield f"{files.shown(path)} names {entry['path']}, which is no file of the output"
            continue
        name = f"{prefix}{entry['path']}"
        known.add(name)
        try:
            fault = _fault(files, name, entry)
        except OSError as error:
            fault = _unread(error)
        if fault:
            yield f"{files.shown(name)} {fault}"
    for name in files.others(known):
        yield f"{name} is not part of the output"


def _fault(files: _Files, name: str, entry: dict[str, Any]) -> str | None:
    """What is wrong with a file that the manifest names."""
    size = files.size(name)
    if files.is_link(name):
        return "is a link, not the file that was written"
    if size is None:
        return "is missing"
    if size != entry["bytes"]:
        return f"has {size} bytes, not {entry['bytes']}"
    return None if files.digest(name) == entry["digest"] else "is damaged: its digest is not the manifest's"


def _unread(error: OSError) -> str:
    return f"cannot be read: {error.strerror or first_line(error)}"
