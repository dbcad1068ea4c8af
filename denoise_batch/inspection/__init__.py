"""What is this path: Parquet with images, a model folder, or a finished output of `infer`.

    found = inspect("in.parquet")
    print("\\n".join(found.lines()))

With `verify` everything is read again: pages against their checksums, images against what an image must be, an output
against its manifest.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from denoise_batch import storage
from denoise_batch.bundle import read_bundle, shipped_folder
from denoise_batch.errors import ModelError, RequestError
from denoise_batch.extra_columns import ExtraColumns
from denoise_batch.inspection.parquet import inspect_parquet
from denoise_batch.inspection.result import Inspection, Kind, shortened
from denoise_batch.storage.listing import list_inputs, unfinished

if TYPE_CHECKING:
    from collections.abc import Callable

    from denoise_batch.storage.store_prefix import StorePrefix

_RANGED_FILES = 1000


def inspect(path: str, *, verify: bool = False, progress: Callable[[int, int], None] | None = None) -> Inspection:
    """Says what a path is.

    Args:
        path: a Parquet file, a folder of them or a glob, a model folder, the name of a model that ships, or an output
            of `infer`; or a URI of one. A local folder of a manifest stands for the output that it is about.
        verify: read everything and check it.
        progress: told (rows read, rows in all) now and then while verifying Parquet.

    Raises:
        MissingFileError: nothing is there, or nothing that can be inspected.
        ParquetError: the file, or each file of the folder, is not Parquet.
        ModelError: the model folder is damaged.
    """
    from denoise_batch.inference.manifest import described_output

    if storage.is_remote(path):
        found = _store_output(path, verify=verify)
        return inspect_parquet(path, verify=verify, progress=progress) if found is None else found
    if storage.is_uri(path):
        path = storage.locate(path)[1]
    local = Path(path)
    model = local if local.is_dir() and (local / "model.json").exists() else shipped_folder(local)
    if model is not None:
        return _model(model)
    described = described_output(local)
    if described is not None:
        local, path = described, str(described)
    output = _local_output(local, verify=verify)
    if output is not None:
        return output
    if local.is_dir() and (local / "model.safetensors").exists():
        raise ModelError(f"{path} has model.safetensors but no model.json", hint="copy the whole model folder again")
    return inspect_parquet(path, verify=verify, progress=progress)


# --- model folders ----------------------------------------------------------------------------------------------------


def _model(folder: Path) -> Inspection:
    # Reading checks the format version, the weights' SHA-256 and their shapes, and raises ModelError with the reason.
    bundle = read_bundle(folder)
    facts: dict[str, Any] = {
        "architecture": bundle.architecture,
        "parameters": bundle.parameters,
        "sha256": bundle.sha256,
        "noise": bundle.noise,
        "metrics": bundle.metrics,
    }
    return Inspection(str(folder), Kind.MODEL, facts, verified=True)


# --- outputs of infer -------------------------------------------------------------------------------------------------


def _local_output(path: Path, *, verify: bool) -> Inspection | None:
    """An output in a file or folder; None where the path leads to something else."""
    from denoise_batch.inference.manifest import (
        MANIFEST,
        SUCCESS,
        VOUCHING,
        DamagedManifestError,
        read_manifest,
        sidecar,
    )

    if not path.exists():
        return None
    try:
        content = read_manifest(path)
    except DamagedManifestError as error:
        return _faulty(path, f"the manifest is damaged: {error}")
    if content is not None:
        return _output(path, content, verify=verify)
    # Without this, what is left of an output would pass for a sound folder of Parquet files.
    success = path / SUCCESS
    described = os.path.isdir(sidecar(path))  # noqa: PTH112 (no error of a name that is too long)
    if described or (success.is_file() and success.read_bytes().startswith(VOUCHING)):
        return _faulty(path, f"{sidecar(path) / MANIFEST} is missing")
    return None


def _faulty(out: Path | StorePrefix, problem: str) -> Inspection:
    return Inspection(str(out), Kind.OUTPUT, {}, (problem,))


def _store_output(uri: str, *, verify: bool) -> Inspection | None:
    """An output in an object store; None where the URI leads to something else.

    Raises:
        MissingFileError: its run is not finished.
    """
    from denoise_batch.inference.manifest import (
        FOLDER,
        IDENTITY,
        MANIFEST,
        SUCCESS,
        VOUCHING,
        DamagedManifestError,
        read_manifest,
    )
    from denoise_batch.storage.store_prefix import StorePrefix

    filesystem, root = storage.locate(uri)
    store = StorePrefix(uri, filesystem, root.rstrip("/"))
    success = store.read(SUCCESS)
    if success is None and store.read(IDENTITY) is not None:
        raise unfinished(str(store))
    try:
        content = read_manifest(store)
    except DamagedManifestError as error:
        return _faulty(store, f"the manifest is damaged: {error}")
    if content is None:
        vouched = success is not None and success.startswith(VOUCHING)
        return _faulty(store, f"{store}/{FOLDER}/{MANIFEST} is missing") if vouched else None
    if success is None:
        return _faulty(store, f"{store}/{SUCCESS} is missing")
    return _output(store, content, verify=verify)


def _output(out: Path | StorePrefix, content: dict[str, Any], *, verify: bool) -> Inspection:
    from denoise_batch.inference import manifest

    problems = manifest.verify(out) if verify else []
    # Lists of every file are for machines, which read the manifest itself.
    facts = {name: len(value) if isinstance(value, list) else value for name, value in content.items()}
    column = content.get("output_column")
    # Of files that are damaged, foreign or gone they would say nothing.
    if content.get("quality") is True and isinstance(column, str) and isinstance(out, Path) and not problems:
        facts["ranges"] = _ranges(out, [field.name for field in ExtraColumns(quality=True).fields(column)])
    facts["manifest"] = manifest.manifest_of(out)
    return Inspection(str(out), Kind.OUTPUT, facts, shortened(problems), verify)


def _ranges(path: Path, names: list[str]) -> dict[str, str]:
    """Lowest and highest value of each of some columns, out of the footers' statistics.

    None of very many files, nor where some cannot be read: what is wrong with them is for `verify` to say.
    """
    import pyarrow.parquet as pq

    from denoise_batch.parquet import footers

    try:
        files = [file.path for file in list_inputs((str(path),)).files]
    except RequestError:
        return {}
    if len(files) > _RANGED_FILES or any(isinstance(f, footers.Unreadable) for f in footers.read_footers(files)):
        return {}
    ends: dict[str, list[float]] = {}
    for file in files:
        metadata = pq.read_metadata(file)
        for group in range(metadata.num_row_groups):
            columns = [metadata.row_group(group).column(index) for index in range(metadata.num_columns)]
            for column in columns:
                found = column.statistics if column.path_in_schema in names else None
                if found is not None and found.has_min_max:
                    ends.setdefault(column.path_in_schema, []).extend((found.min, found.max))
    # Parquet writes a least value of 0 as -0.
    return {name: f"{min(values) + 0.0:.3g} to {max(values) + 0.0:.3g}" for name, values in ends.items()}
