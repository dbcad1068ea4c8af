"""Whether an output is the finished result of the very request that is made now: then there is nothing to do."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from denoise_batch import storage
from denoise_batch.errors import RequestError, StoreError
from denoise_batch.extra_columns import ExtraColumns
from denoise_batch.inference.manifest import FOLDER, REPORT, SUCCESS, read_manifest, sidecar
from denoise_batch.inference.report import InferReport
from denoise_batch.inference.run_folder import output_path, said
from denoise_batch.storage.store_prefix import StorePrefix

FEW_LEVELS_MODEL: Final = "few_levels_model_sha256"
"""Of an identity: the model that would take scans of few levels of grey; None where one was named for all."""
_OF_THE_MODEL = ("model_sha256", FEW_LEVELS_MODEL, "architecture")

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from denoise_batch.storage.listing import InputFile


def finished_report(
    out: Path | StorePrefix, identity: dict[str, Any], files: Sequence[InputFile], max_bad: float
) -> InferReport | str:
    """The report of the run that made `out`, where this request asks for the same; else why it does not, for people.

    It does not either where a file is missing or has another size than the manifest says, or more rows are bad than
    this request allows. "" where `out` is no output of `infer`, or another version's.

    Args:
        identity: what the result depends on beside the input files: model and result options.
        files: the input's, whose paths, sizes and times must be those that the output was made of.
    """
    try:
        manifest = read_manifest(out)
        if manifest is None:
            return ""
        differs = _other_request(manifest, identity) or _other_files(manifest, files)
        if differs:
            return differs
        if not _has_its_files(out, manifest):
            return "but a file of it is missing or has another size than its manifest says"
        if sum(manifest["bad_rows"].values()) > max_bad * manifest["rows_in"]:
            return f"with more bad rows than --max-bad {max_bad:g} allows"
        report = InferReport(**json.loads(_read_report(out)))
    except (OSError, StoreError, ValueError, KeyError, TypeError, AttributeError):  # another version's, or damaged
        return ""
    return replace(
        report, output=str(out), already_complete=True, rows_done=0, seconds=0.0, denoising_seconds=0.0, rate=0.0
    )


def columns_of_output(path: str) -> tuple[str | None, str | None]:
    """The columns that a finished output at a path or URI was made of, and that were made; None where nothing says it.

    Of images alone: the names may be those of no column by now.
    """
    try:
        manifest = read_manifest(StorePrefix.at(path) if storage.is_remote(path) else output_path(path)) or {}
    except (OSError, RequestError, StoreError, ValueError):  # `inspect --verify` says so
        manifest = {}
    noisy, denoised = manifest.get("image_column"), manifest.get("output_column")
    return noisy if isinstance(noisy, str) else None, denoised if isinstance(denoised, str) else None


def _other_request(manifest: dict[str, Any], identity: dict[str, Any]) -> str:
    """The first thing in which the request that is made now is another; "" where it is none."""
    for name in (*identity, *ExtraColumns.from_json(manifest).to_json()):  # which name what is asked for alone
        then, now = manifest.get(name), identity.get(name)
        idle = name == FEW_LEVELS_MODEL and "levels_found" not in manifest  # whichever it was, it made nothing
        if then != now and not idle:
            return "made by another model" if name in _OF_THE_MODEL else f"it differs in {name} ({said(then, now)})"
    return ""


def _other_files(manifest: dict[str, Any], files: Sequence[InputFile]) -> str:
    """How the input files differ from those that the output was made of; "" where they do not."""
    then = [(entry["path"], (entry["size"], entry["mtime_ns"])) for entry in manifest["inputs"]]
    now = [(storage.redact(file.path), (file.size, file.mtime_ns)) for file in files]
    if then == now:
        return ""
    if len(then) != len(now):
        return f"made from other input files: {len(now):,} now, {len(then):,} then"
    known = dict(then)
    new = next((path for path, _ in now if path not in known), None)
    if new is not None:
        return f"made from other input files: {new} was none of them"
    changed = next((path for path, about in now if known[path] != about), None)
    return "made from the input files in another order" if changed is None else f"and {changed} has changed since"


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
