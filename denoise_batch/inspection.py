"""What is this path: Parquet with images, a model folder, or a finished output of `infer`.

    found = inspect("in.parquet")
    print("\\n".join(found.lines()))

With `verify` everything is read again: pages against their checksums, images against what an image must be, an output
against its manifest.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from denoise_batch import storage
from denoise_batch.errors import ColumnError, MissingFileError, ModelError, OutputError, ParquetError
from denoise_batch.extra_columns import ExtraColumns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pyarrow as pa

    from denoise_batch.images import ImageColumn
    from denoise_batch.storage import InputFile
    from denoise_batch.store_prefix import StorePrefix

_SAMPLED_GROUPS = 16
_SAMPLED_ROWS = 64
_NAMED_AT_MOST = 10
_RANGED_FILES = 1000


class Kind(StrEnum):
    """What a path can be."""

    PARQUET = "parquet"
    MODEL = "model"
    OUTPUT = "output"


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
        kind: what the path is.
        facts: JSON-like; the keys are the reference of `inspect --json`.
        problems: each a line; without `verify` only what is seen at a glance.
        verified: whether everything was read.
    """

    path: str
    kind: Kind
    facts: dict[str, Any]
    problems: tuple[str, ...] = ()
    verified: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "kind": self.kind.value,
            **self.facts,
            "verified": self.verified,
            "problems": list(self.problems),
        }

    def lines(self) -> list[str]:
        """The same for people."""
        titles = {
            Kind.PARQUET: "Parquet",
            Kind.MODEL: "a model folder",
            Kind.OUTPUT: "a finished output of `denoise-batch infer`",
        }
        shown = [f"{self.path}: {titles[self.kind]}"]
        for name, value in self.facts.items():
            shown += _fact_lines(name.replace("_", " "), value)
        if self.problems:
            shown += ["problems:", *(f"  {problem}" for problem in self.problems)]
        elif self.verified:
            shown.append("verified: no problems")
        return shown


def inspect(path: str, *, verify: bool = False, progress: Callable[[int, int], None] | None = None) -> Inspection:
    """Says what a path is.

    Args:
        path: a Parquet file, a folder of them or a glob, a model folder, or an output of `infer`.
        verify: read everything and check it.
        progress: told (rows read, rows in all) now and then while verifying Parquet.

    Raises:
        MissingFileError: nothing is there, or nothing that can be inspected.
        ParquetError: the file, or each file of the folder, is not Parquet.
        ModelError: the model folder is damaged.
    """
    local = Path(path)
    if not storage.is_uri(path) and local.is_dir() and (local / "model.json").exists():
        return _model(local)
    if storage.is_remote(path):
        found = _store_output(path, verify=verify)
        if found is not None:
            return found
    content = None if storage.is_uri(path) else _manifest_of(local)
    if content is not None:
        return _output(local, content, verify=verify)
    if not storage.is_uri(path) and local.is_dir() and (local / "model.safetensors").exists():
        raise ModelError(f"{path} has model.safetensors but no model.json", hint="copy the whole model folder again")
    return _parquet(path, verify=verify, progress=progress)


# --- model folders ----------------------------------------------------------------------------------------------------


def _model(folder: Path) -> Inspection:
    from denoise_batch.bundle import read_bundle

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


def _manifest_of(path: Path) -> dict[str, Any] | None:
    from denoise_batch.inference.manifest import MANIFEST, SUCCESS, read_manifest, sidecar

    if not path.exists():
        return None
    try:
        content = read_manifest(path)
    except ValueError as error:
        raise OutputError(f"{path} has a damaged manifest: {error}", hint="make the output again") from error
    # Without this, what is left of an output would pass for a sound folder of Parquet files.
    success = path / SUCCESS
    if content is None and (sidecar(path).is_dir() or (success.is_file() and success.read_bytes().startswith(b"xxh3"))):
        raise OutputError(f"{path}: {sidecar(path) / MANIFEST} is missing", hint="make the output again")
    return content


def _store_output(uri: str, *, verify: bool) -> Inspection | None:
    """An output in an object store; None where the URI leads to something else.

    Raises:
        MissingFileError: its run is not finished.
    """
    from denoise_batch.inference.manifest import IDENTITY, SUCCESS, read_manifest
    from denoise_batch.store_prefix import StorePrefix

    filesystem, root = storage.locate(uri)
    store = StorePrefix(uri, filesystem, root.rstrip("/"))
    content = read_manifest(store)
    if content is not None and store.read(SUCCESS) is not None:
        return _output(store, content, verify=verify)
    if store.read(IDENTITY) is not None:
        raise storage.unfinished(str(store))
    return None


def _output(out: Path | StorePrefix, content: dict[str, Any], *, verify: bool) -> Inspection:
    from denoise_batch.inference import manifest

    problems = manifest.verify(out) if verify else []
    # Lists of every file are for machines, which read the manifest itself.
    facts = {name: len(value) if isinstance(value, list) else value for name, value in content.items()}
    if content.get("quality") is True and isinstance(out, Path):
        facts["ranges"] = _ranges(
            out, [field.name for field in ExtraColumns(quality=True).fields(content["output_column"])]
        )
    facts["manifest"] = manifest.manifest_of(out)
    return Inspection(str(out), Kind.OUTPUT, facts, _shortened(problems), verify)


def _ranges(path: Path, names: list[str]) -> dict[str, str]:
    """Lowest and highest value of each of some columns, out of the footers' statistics; none of very many files."""
    import pyarrow.parquet as pq

    from denoise_batch.inference import footers

    files = [file.path for file in storage.list_inputs((str(path),)).files]
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


# --- Parquet ----------------------------------------------------------------------------------------------------------


def _parquet(path: str, *, verify: bool, progress: Callable[[int, int], None] | None) -> Inspection:
    import pyarrow as pa

    from denoise_batch.inference import footers
    from denoise_batch.inference.run_folder import work_folder

    try:
        listing = storage.list_inputs((path,))
    except MissingFileError as error:
        if not storage.is_uri(path) and Path(path).is_dir():
            raise MissingFileError(
                f"{path} is neither a model folder nor a folder of Parquet files",
                hint="a model folder has model.json, Parquet files end in .parquet",
            ) from error
        if not storage.is_uri(path) and work_folder(Path(path)).is_dir():
            raise storage.unfinished(path) from error
        raise
    found = footers.read_footers([file.path for file in listing.files])
    problems = [
        f"{storage.redact(file.path)}: {'it is empty (0 bytes)' if file.size == 0 else footer.reason}"
        for file, footer in zip(listing.files, found, strict=True)
        if isinstance(footer, footers.Unreadable)
    ]
    readable = [
        (file, footer) for file, footer in zip(listing.files, found, strict=True) if isinstance(footer, footers.Footer)
    ]
    if not readable:
        raise ParquetError(f"not Parquet: {problems[0]}", hint="give a Parquet file, or a folder of them")
    first_file, first_footer = readable[0]
    schema = pa.ipc.read_schema(pa.py_buffer(first_footer.schema))
    for file, footer in readable[1:]:
        if not pa.ipc.read_schema(pa.py_buffer(footer.schema)).equals(schema):
            problems.append(f"{storage.redact(file.path)}: its columns differ from those of the first file")
    groups = [rows for _, footer in readable for rows in footer.row_groups]
    rows = sum(groups)
    facts: dict[str, Any] = {
        "files": len(listing.files),
        "bytes": sum(file.size for file in listing.files),
        "rows": rows,
        "row_groups": {"count": len(groups), "smallest": min(groups, default=0), "largest": max(groups, default=0)},
    }
    image = _find_image(readable, schema, facts)
    facts |= _storage_facts(first_file, image)
    facts["columns"] = {field.name: str(field.type) for field in schema}
    facts |= _origin(schema)
    if listing.skipped:
        facts["skipped_files"] = len(listing.skipped)
    if verify:
        bad: Counter[str] = Counter()
        read = 0
        for file, footer in readable:
            before = read
            for done in _read_all(file, footer.rows, image, bad, problems):
                read = before + done
                if progress is not None:
                    progress(read, rows)
        if image is not None:
            facts["bad_rows"] = dict(bad)
    return Inspection(storage.redact(path), Kind.PARQUET, facts, _shortened(problems), verify)


def _find_image(readable: list[tuple[InputFile, Any]], schema: pa.Schema, facts: dict[str, Any]) -> ImageColumn | None:
    """The image column, from samples over the whole input; adds what is known of it to the facts."""
    import numpy as np

    from denoise_batch.images import decode, find_image_column, find_polarity
    from denoise_batch.inference import footers

    places = [
        (file.path, group, tuple(schema.names))
        for file, footer in readable
        for group, rows in enumerate(footer.row_groups)
        if rows
    ]
    chosen: list[int] = []
    if places:
        chosen = np.unique(np.linspace(0, len(places) - 1, _SAMPLED_GROUPS).astype(int)).tolist()
    samples = [
        sample.table
        for sample in footers.read_samples([places[index] for index in chosen], _SAMPLED_ROWS)
        if isinstance(sample, footers.Sample) and len(sample.table) and sample.table.schema.equals(schema)
    ]
    try:
        image = find_image_column(schema, None, samples[0] if samples else None)
    except ColumnError as error:
        facts["image_column"] = f"none: {error.message}"
        return None
    pixels = [decode(table.column(image.name), image).good_pixels for table in samples]
    try:
        polarity = find_polarity(np.concatenate(pixels)).value if pixels else "no images to tell it from"
    except ColumnError as error:
        polarity = error.message.removeprefix("polarity is ")
    facts["image_column"] = {
        "name": image.name,
        "layout": image.layout.value,
        "dtype": image.dtype,
        "polarity": polarity,
    }
    return image


def _storage_facts(file: InputFile, image: ImageColumn | None) -> dict[str, Any]:
    """How the first file was written: by what, compressed how, with checksums or not."""
    import pyarrow.parquet as pq

    filesystem, inner = storage.locate(file.path)
    # The footer has been parsed in a child process already, so it does not crash this one.
    metadata = pq.read_metadata(inner, filesystem=filesystem)
    facts: dict[str, Any] = {"created_by": metadata.created_by}
    if metadata.num_row_groups == 0:
        return facts
    group = metadata.row_group(0)
    columns = [group.column(index) for index in range(group.num_columns)]
    if image is not None:
        columns = [column for column in columns if column.path_in_schema.split(".")[0] == image.name]
    facts["compression"] = ", ".join(sorted({column.compression.lower() for column in columns}))
    if columns:
        offset = columns[0].dictionary_page_offset or columns[0].data_page_offset
        with filesystem.open_input_file(inner) as source:
            facts["page_checksums"] = has_page_checksum(source.read_at(64, offset))
    return facts


def has_page_checksum(header: bytes) -> bool:
    """Whether a Parquet page header has a checksum; `header` is its first bytes, in Thrift's compact protocol.

    The fields before it are i32: type (1), uncompressed size (2), compressed size (3); the checksum is field 4.
    pyarrow can check these checksums, but does not say whether there are any.
    """
    position = number = 0
    while position < len(header):
        delta, kind = header[position] >> 4, header[position] & 0x0F
        if delta == 0 or kind != 5:  # 5 is i32; anything else means that the fields of interest are over
            return False
        number += delta
        if number >= 4:
            return number == 4
        position += 1
        while position < len(header) and header[position] & 0x80:  # a varint goes on while the high bit is set
            position += 1
        position += 1
    return False


def _origin(schema: pa.Schema) -> dict[str, Any]:
    """What `corrupt` and `digits` note in the schema's metadata."""
    try:
        note = json.loads((schema.metadata or {}).get(b"denoise_batch", b"null"))
    except ValueError:
        return {}
    return {"made_by": note} if isinstance(note, dict) else {}


def _read_all(
    file: InputFile, rows: int, image: ImageColumn | None, bad: Counter[str], problems: list[str]
) -> Iterator[int]:
    """Reads a file to its end; adds bad rows by reason to `bad`, and what fails to `problems`. Yields rows read."""
    from denoise_batch.images import decode
    from denoise_batch.inference.pages import check_pages
    from denoise_batch.input_file import open_parquet, read_batches

    read = 0
    try:
        with open_parquet(file.path) as parquet:
            check_pages(file.path, parquet.metadata, range(parquet.num_row_groups))
            for batch in read_batches(parquet, 8192):
                read += len(batch)
                if image is not None:
                    decoded = decode(batch.column(image.name), image)
                    bad.update({reason.value: count for reason, count in decoded.counts().items()})
                yield read
    except Exception as error:  # a damaged file can raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        problems.append(f"{storage.redact(file.path)}: after {read:,} rows: {reason}")
        return
    if read != rows:
        problems.append(f"{storage.redact(file.path)}: {read:,} rows, but its footer says {rows:,}")


def _shortened(problems: list[str]) -> tuple[str, ...]:
    if len(problems) <= _NAMED_AT_MOST:
        return tuple(problems)
    return (*problems[:_NAMED_AT_MOST], f"and {len(problems) - _NAMED_AT_MOST:,} more")


def _fact_lines(name: str, value: object, indent: str = "  ") -> list[str]:
    if isinstance(value, dict):
        if not value:
            return [f"{indent}{name}: none"]
        lines = [f"{indent}{name}:"]
        for key, inner in value.items():
            lines += _fact_lines(str(key), inner, indent + "  ")
        return lines
    if isinstance(value, bool):
        shown = "yes" if value else "no"
    elif isinstance(value, int):
        shown = f"{value:,}"
    elif isinstance(value, float):
        shown = f"{value:.6g}"
    elif isinstance(value, list):
        shown = ", ".join(str(item) for item in value)
    else:
        shown = str(value)
    return [f"{indent}{name}: {shown}"]
