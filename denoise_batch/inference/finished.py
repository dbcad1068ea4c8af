"""Whether an output is the finished result of the very request that is made now: then there is nothing to do."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from denoise_batch import storage
from denoise_batch.errors import StoreError
from denoise_batch.extra_columns import ExtraColumns
from denoise_batch.inference.manifest import FOLDER, REPORT, SUCCESS, read_manifest, sidecar
from denoise_batch.inference.report import InferReport
from denoise_batch.store_prefix import StorePrefix

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from denoise_batch.listing import InputFile


def finished_report(
    out: Path | StorePrefix, identity: dict[str, Any], files: Sequence[InputFile], max_bad: float
) -> InferReport | None:
    """The report of the run that made `out`, where this request asks for the same; None where it asks for another.

    None as well where a file is missing or has another size than the manifest says, or more rows are bad than this
    request allows.

    Args:
        identity: what the result depends on beside the input files: model and result options.
        files: the input's, whose paths, sizes and times must be those that the output was made of.
    """
    try:
        manifest = read_manifest(out)
        if manifest is None:
            return None
        inputs = [(entry["path"], entry["size"], entry["mtime_ns"]) for entry in manifest["inputs"]]
        if any(manifest.get(name) != value for name, value in identity.items()):
            return None
        if ExtraColumns.from_json(manifest) != ExtraColumns.from_json(identity):  # which name what is asked for alone
            return None
        if inputs != [(storage.redact(file.path), file.size, file.mtime_ns) for file in files]:
            return None
        if not _has_its_files(out, manifest) or sum(manifest["bad_rows"].values()) > max_bad * manifest["rows_in"]:
            return None
        report = InferReport(**json.loads(_read_report(out)))
    except (OSError, StoreError, ValueError, KeyError, TypeError):  # another version's, or damaged
        return None
    return replace(
        report, output=str(out), already_complete=True, rows_done=0, seconds=0.0, denoising_seconds=0.0, rate=0.0
    )


def _has_its_files(out: Path | StorePrefix, manifest: dict[str, Any]) -> bool:
    sizes = {entry["path"]: entry["bytes"] for entry in manifest["files"]}
    beside = {entry["path"]: entry["bytes"] for entry in manifest["sidecar"]}
    if isinstance(out, StorePrefix):
        there = out.sizes()
        sizes |= {f"{FOLDER}/{path}": size for path, size in beside.items()}
        return SUCCESS in there and all(there.get(path) == size for path, size in sizes.items())
    if not all((sidecar(out) / path).stat().st_size == size for path, size in beside.items()):
        return False
    if out.is_dir():
        return (out / SUCCESS).is_file() and all((out / path).stat().st_size == size for path, size in sizes.items())
    return [out.stat().st_size] == list(sizes.values())


def _read_report(out: Path | StorePrefix) -> bytes:
    if not isinstance(out, StorePrefix):
        return (sidecar(out) / REPORT).read_bytes()
    content = out.read(f"{FOLDER}/{REPORT}")
    if content is None:
        raise FileNotFoundError(REPORT)
    return content
