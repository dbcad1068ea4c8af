"""What Parquet is: its rows, its image column, how it was written; with `verify`, whether all of it can be read."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from denoise_batch import storage
from denoise_batch.errors import ColumnError, MissingFileError, ParquetError
from denoise_batch.inspection.result import Inspection, Kind, shortened
from denoise_batch.storage.listing import list_inputs, unfinished

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pyarrow as pa

    from denoise_batch.images import ImageColumn
    from denoise_batch.storage.listing import InputFile

_SAMPLED_GROUPS = 16
_SAMPLED_ROWS = 64


def inspect_parquet(path: str, *, verify: bool, progress: Callable[[int, int], None] | None) -> Inspection:
    """Says what a file, a folder or a glob of Parquet is; arguments and errors as in `inspect`."""
    import pyarrow as pa

    from denoise_batch.bundle import is_in_training
    from denoise_batch.inference.run_folder import work_folder
    from denoise_batch.parquet import footers
    from denoise_batch.parquet.type_changes import common_schema, difference

    try:
        listing = list_inputs((path,))
    except MissingFileError as error:
        if not storage.is_uri(path) and Path(path).is_dir():
            raise MissingFileError(
                f"{path} is neither a model folder nor a folder of Parquet files",
                hint="a model folder has model.json, Parquet files end in .parquet",
            ) from error
        if not storage.is_uri(path) and work_folder(Path(path)).is_dir():
            raise unfinished(path) from error
        if not storage.is_uri(path) and is_in_training(Path(path)):
            raise unfinished(path, "train") from error
        raise
    found = footers.read_footers([file.path for file in listing.files])
    problems = [
        f"{storage.redact(file.path)}: {footer.reason}"
        for file, footer in zip(listing.files, found, strict=True)
        if isinstance(footer, footers.Unreadable)
    ]
    readable = [
        (file, footer) for file, footer in zip(listing.files, found, strict=True) if isinstance(footer, footers.Footer)
    ]
    if not readable:
        if footers.UNSUPPORTED in problems[0]:
            raise ParquetError(problems[0], hint=footers.OTHER_TYPE)
        raise ParquetError(f"not Parquet: {problems[0]}", hint="give a Parquet file, or a folder of them")
    first_file, first_footer = readable[0]
    schema = pa.ipc.read_schema(pa.py_buffer(first_footer.schema))
    for file, footer in readable:
        own = pa.ipc.read_schema(pa.py_buffer(footer.schema))
        common = common_schema(schema, own)
        schema = common or schema
        if common is None:
            like = storage.redact(first_file.path)
            problems.append(
                f"{storage.redact(file.path)}: differs in the columns from {like} ({difference(schema, own)})"
            )
        if len(set(own.names)) < len(own.names):
            named = ", ".join(name for name, times in Counter(own.names).items() if times > 1)
            problems.append(f"{storage.redact(file.path)}: column names stand more than once: {named}")
    groups = [rows for _, footer in readable for rows in footer.row_groups]
    rows = sum(groups)
    facts: dict[str, Any] = {
        "files": len(listing.files),
        "bytes": sum(file.size for file in listing.files),
        "rows": rows,
        "row_groups": {"count": len(groups), "smallest": min(groups, default=0), "largest": max(groups, default=0)},
    }
    unsampled: dict[str, str] = {}
    image = _find_image(readable, schema, facts, unsampled)
    facts |= _storage_facts(first_file, image)
    facts["columns"] = {field.name: str(field.type) for field in schema}
    facts |= _origin(schema)
    if listing.keys:
        facts["partition_keys"] = listing.keys
    if listing.skipped:
        facts |= {"skipped_files": len(listing.skipped), "skipped": list(listing.skipped_shown)}
    if verify:
        bad: Counter[str] = Counter()
        read = 0
        for file, footer in readable:
            before, faults = read, len(problems)
            for done in _read_all(file, footer.rows, image, bad, problems):
                read = before + done
                if progress is not None:
                    progress(read, rows)
            if len(problems) > faults:
                unsampled.pop(file.path, None)  # the same fault
        if image is not None:
            facts["bad_rows"] = dict(bad)
    problems += [f"{storage.redact(path)}: {reason}" for path, reason in unsampled.items()]
    return Inspection(storage.redact(path), Kind.PARQUET, facts, shortened(problems), verify)


def _find_image(
    readable: list[tuple[InputFile, Any]], schema: pa.Schema, facts: dict[str, Any], unsampled: dict[str, str]
) -> ImageColumn | None:
    """The image column, from samples over the whole input; adds what is known of it to the facts.

    And to `unsampled` each file of which a sample could not be read, with the reason.
    """
    import numpy as np
    import pyarrow as pa

    from denoise_batch.images import (
        PIXELS,
        WHITE_AND_BLACK,
        Polarity,
        dark_on_light,
        decode,
        find_image_column,
        find_polarity,
        find_tone,
        joined,
    )
    from denoise_batch.parquet import footers
    from denoise_batch.parquet.type_changes import common_schema, widen, widened

    times = Counter(schema.names)  # of columns that share a name none can be asked for by it
    schema = pa.schema([field for field in schema if times[field.name] == 1], schema.metadata)
    places = [
        (file.path, group, tuple(schema.names))
        for file, footer in readable
        for group, rows in enumerate(footer.row_groups)
        if rows
    ]
    chosen = footers.spread_over(len(places), _SAMPLED_GROUPS)
    samples = []
    for index, sample in zip(
        chosen, footers.read_samples([places[index] for index in chosen], _SAMPLED_ROWS), strict=True
    ):
        if isinstance(sample, footers.Unreadable):
            unsampled.setdefault(places[index][0], sample.reason)
        elif len(sample.table) and common_schema(schema, sample.table.schema) is not None:
            samples.append(widen(sample.table, widened(sample.table.schema, schema)))
    try:
        image = find_image_column(schema, None, joined(samples))
    except ColumnError as error:
        facts["image_column"] = f"none: {error.message}"
        return None
    decoded = [decode(table.column(image.name), image) for table in samples]
    found = [part.good_pixels for part in decoded]
    pixels = np.concatenate(found) if found else np.zeros((0, PIXELS), np.uint8)
    tone = WHITE_AND_BLACK
    try:
        nothing = "no images to tell it from" if not unsampled else "no images that could be read"
        polarity = find_polarity(pixels).value if len(pixels) else nothing
        tone = find_tone(pixels, Polarity(polarity)) if len(pixels) else tone
    except ColumnError as error:
        polarity = f"{error.message.removeprefix('polarity is ')}; {error.hint}"
    facts["image_column"] = {
        "name": image.name,
        "layout": image.layout.value,
        "dtype": image.dtype,
        "polarity": polarity,
        **tone.facts(),
        "sampled": {
            "rows": sum(len(part.bad) for part in decoded),
            "bad": sum(int(np.count_nonzero(part.bad)) for part in decoded),
            "dark_on_light": int(dark_on_light(pixels).sum()),
        },
    }
    return image


def _storage_facts(file: InputFile, image: ImageColumn | None) -> dict[str, Any]:
    """How the first file was written: by what, compressed how, with checksums or not."""
    import pyarrow.parquet as pq

    from denoise_batch.parquet.pages import has_checksum

    filesystem, inner = storage.locate(file.path)
    # The footer has been parsed in a child process already, so it does not crash this one.
    metadata = pq.read_metadata(inner, filesystem=filesystem)
    facts: dict[str, Any] = {"created_by": metadata.created_by}
    if metadata.num_row_groups == 0:
        return facts
    group = metadata.row_group(0)
    columns = [group.column(index) for index in range(group.num_columns)]
    if image is not None:
        # A name may have dots in it: the path that is the name is that column's, whatever other paths begin with it.
        whole = [column for column in columns if column.path_in_schema == image.name]
        columns = whole or [column for column in columns if column.path_in_schema.startswith(f"{image.name}.")]
    facts["compression"] = ", ".join(sorted({column.compression.lower() for column in columns}))
    if columns:
        offset = columns[0].dictionary_page_offset or columns[0].data_page_offset
        with filesystem.open_input_file(inner) as source:
            facts["page_checksums"] = has_checksum(source, offset)
    return facts


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
    from denoise_batch.parquet.input_file import open_parquet, read_batches
    from denoise_batch.parquet.pages import check_pages
    from denoise_batch.parquet.type_changes import as_type

    read = 0
    try:
        with open_parquet(file.path) as parquet:
            check_pages(file.path, parquet.metadata, range(parquet.num_row_groups))
            for batch in read_batches(parquet, 8192):
                read += len(batch)
                if image is not None:
                    decoded = decode(as_type(batch.column(image.name), image.type), image)
                    bad.update({reason.value: count for reason, count in decoded.counts().items()})
                yield read
    except Exception as error:  # a damaged file can raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        problems.append(f"{storage.redact(file.path)}: after {read:,} rows: {reason}")
        return
    if read != rows:
        problems.append(f"{storage.redact(file.path)}: {read:,} rows, but its footer says {rows:,}")
