"""Inputs → checked work units. Everything a request can be refused for is found here, before torch or Ray load.

A unit is a run of rows of one input file: a 16th of all rows or an eighth of those still to come, whichever is less,
but no fewer than 16,384 and no more than 131,072, as far as row groups allow. Small ones are joined, and large ones are
split: lists and tensors in four at most, since it takes longer to read past their rows. The plan follows from the input
and the result options alone, never from cores or workers; it is written down once and read again on resume.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from denoise_batch import storage
from denoise_batch.errors import ColumnError, ParquetError
from denoise_batch.images import (
    WHITE_AND_BLACK,
    Polarity,
    Tone,
    check_float_range,
    decode,
    find_image_column,
    find_polarity,
    find_tone,
    image_candidates,
    joined,
)
from denoise_batch.images.layouts import ImageColumn, Layout, image_column
from denoise_batch.parquet import footers
from denoise_batch.parquet.type_changes import common_schema, difference, has_lists_of_size_0, widen, widened
from denoise_batch.storage import publishing

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from denoise_batch.parquet.footers import Footer, Sample
    from denoise_batch.storage.listing import InputFile

UNIT_ROWS = 131_072
"""The most that are joined; larger ones cost a run that dies more."""

_FEWEST_UNITS = 16
_SHARE_OF_REST = 8
_SMALLEST_UNIT_ROWS = 16_384
"""Units are small in a small input, so that every worker has some, and become smaller towards the end of any, so that
no worker is left with a long one when the others are done. This takes a core a second or two; smaller ones cost more
than they save."""

_MOST_PIECES = 16  # of one row group: to read past rows takes 1% of the time that it takes to denoise them,
_FEW_PIECES = 4  # of one of lists or tensors: 4%
_SAMPLES = 16  # row groups looked at for layout, float range, polarity and tone
_SAMPLE_ROWS = 1024  # of all together
_UNIT_FIELDS = ("file", "first_group", "last_group", "skip", "rows", "start")
_NAMED_AT_MOST = 20  # files in one error message


@dataclass(frozen=True, slots=True)
class Unit:
    """A run of rows of one file.

    Attributes:
        index: its place in the output.
        file: index of its file in `Plan.files`.
        first_group, last_group: its row groups, the last one included.
        skip: rows of the first row group that belong to the unit before.
        rows: its number of rows.
        start: its first row's number within the file.
    """

    index: int
    file: int
    first_group: int
    last_group: int
    skip: int
    rows: int
    start: int


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """An input file as it was when the plan was made.

    Attributes:
        row_bytes: the most bytes that a row takes, by the footer and the first rows.
        schema: what its rows are widened to, serialised, in base64 (`Plan.schema`); "" where they are so already.
    """

    path: str
    folder: str
    size: int
    mtime_ns: int
    rows: int
    row_bytes: int
    schema: str = ""

    def widened(self, schema: pa.Schema) -> pa.Schema:
        """The file's schema as its rows are read in."""
        return widened(schema, _parsed(self.schema)) if self.schema else schema


@dataclass(frozen=True)
class Plan:
    """The checked request.

    Attributes:
        units: structured array of `Unit`'s fields but the index, int64.
        schema: the files' common Arrow schema (`type_changes.common_schema`); each file keeps metadata of its own.
        changes: columns whose Parquet type Arrow cannot carry, and what they become.
        column: the image column.
        polarity: what was asked for or found; never `auto`.
        tone: how grey paper and ink are (`find_tone`).
    """

    files: tuple[PlannedFile, ...]
    units: dict[str, np.ndarray[Any, np.dtype[np.int64]]]
    schema: pa.Schema
    column: ImageColumn
    polarity: Polarity
    changes: tuple[str, ...] = ()
    tone: Tone = WHITE_AND_BLACK

    @cached_property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)

    def __len__(self) -> int:
        return len(self.units["rows"])

    def unit(self, index: int) -> Unit:
        return Unit(index, **{field: int(self.units[field][index]) for field in _UNIT_FIELDS})

    def save(self, folder: Path) -> None:
        """Writes `plan.json` and `units.parquet`."""
        table = pa.table({field: self.units[field] for field in _UNIT_FIELDS})
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        publishing.write_file(folder / "units.parquet", sink.getvalue().to_pybytes())
        *own, _ = PlannedFile.__slots__
        content = {
            "files": [[getattr(file, name) for name in own] for file in self.files],
            "widened": [index for index, file in enumerate(self.files) if file.schema],
            "schema": _text(self.schema),
            "column": self.column.name,
            "layout": self.column.layout.value,
            "polarity": self.polarity.value,
            "changes": self.changes,
            "tone": self.tone.to_json(),
        }
        publishing.write_file(folder / "plan.json", json.dumps(content).encode(), private=True)  # URIs may hold secrets

    @classmethod
    def load(cls, folder: Path) -> Plan:
        content = json.loads((folder / "plan.json").read_bytes())
        files = [PlannedFile(*fields) for fields in content["files"]]
        for index in content.get("widened", ()):
            files[index] = replace(files[index], schema=content["schema"])
        for file in files:
            if not storage.stays_inside(file.folder, folders=True):
                raise ValueError(f"plan.json names the folder {file.folder!r}")
        table = pq.read_table(folder / "units.parquet")
        schema = _parsed(content["schema"])
        return cls(
            tuple(files),
            {field: table[field].to_numpy() for field in _UNIT_FIELDS},
            schema,
            image_column(schema.field(content["column"]), Layout(content["layout"])),
            Polarity(content["polarity"]),
            tuple(content["changes"]),
            Tone.from_json(content["tone"]),
        )


def _text(schema: pa.Schema) -> str:
    return base64.b64encode(schema.serialize().to_pybytes()).decode()


def _footer_schema(footer: Footer) -> pa.Schema:
    return pa.ipc.read_schema(pa.py_buffer(footer.schema))


def _parsed(schema: str) -> pa.Schema:
    return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(schema)))


def make_plan(
    files: Sequence[InputFile], column: str | None, polarity: Polarity, *added: str, own_noise: bool = False
) -> Plan:
    """Reads every footer, checks that the files fit each other and the request, and cuts them into units.

    Args:
        added: names of the columns that the output will have beside the input's.
        own_noise: as in `check_float_range`; nor is the tone looked at.

    Raises:
        ParquetError: files are damaged, not Parquet, or differ in their schema; all are named.
        ColumnError: no image column, two candidates, a wrong size or type; polarity or number range not clear.
    """
    found = footers.read_footers([file.path for file in files])
    read, schema = _check_files(files, found)
    _check_columns(schema, files, column, added)
    found_samples = _sample(files, read, image_candidates(schema, column))
    samples = [widen(sample.table, widened(sample.table.schema, schema)) for sample in found_samples]
    image = find_image_column(schema, column, joined(samples))
    # Footers count bytes as they are encoded: a long text that many rows share weighs next to nothing there.
    measured = max((sample.row_bytes for sample in found_samples), default=0)
    kinds = {footer.schema: footer for footer in read}
    wide = {kind: _text(schema) for kind, footer in kinds.items() if not _footer_schema(footer).equals(schema)}
    planned = tuple(
        PlannedFile(f.path, f.folder, f.size, f.mtime_ns, r.rows, max(r.row_bytes, measured), wide.get(r.schema, ""))
        for f, r in zip(files, read, strict=True)
    )
    found_polarity, tone = _look(samples, image, polarity, sum(f.rows for f in read), own_noise=own_noise)
    return Plan(
        planned,
        _cut(read, _MOST_PIECES if image.layout in (Layout.BINARY, Layout.ENCODED) else _FEW_PIECES),
        schema,
        image,
        found_polarity,
        tuple(dict.fromkeys(change for footer in read for change in footer.changes)),
        tone,
    )


def _check_files(
    files: Sequence[InputFile], found: Sequence[Footer | footers.Unreadable]
) -> tuple[list[Footer], pa.Schema]:
    """The footers and the schema that all of them have, metadata aside."""
    bad = [
        f"{storage.redact(file.path)}: {footer.reason}"
        for file, footer in zip(files, found, strict=True)
        if isinstance(footer, footers.Unreadable)
    ]
    readable = [(file, footer) for file, footer in zip(files, found, strict=True) if isinstance(footer, footers.Footer)]
    schema, like, odd = _common_schema(readable)
    faults = []
    if bad:
        count = "1 file is" if len(bad) == 1 else f"{len(bad)} of {len(files)} files are"
        faults.append(f"{count} not readable as Parquet: {_named(bad)}")
    if odd:
        # Of all files, not of the readable ones: the same number as above.
        count = f"{len(odd)} of {len(files)} files {'differs' if len(odd) == 1 else 'differ'}"
        faults.append(f"{count} in the columns from {like}: {_named(odd)}")
    if faults:
        misnamed = [fault.endswith(footers.NOT_UTF8) for fault in bad]
        hints = [] if all(misnamed) else ["repair them, or take them out of the input"]
        hints += [footers.RENAME] if any(misnamed) else []
        hints += [footers.OTHER_TYPE] if any(footers.UNSUPPORTED in fault for fault in bad) else []
        hints += ["run files of one schema at a time, or rewrite the others"] if odd else []
        raise ParquetError(". ".join(faults), hint="; ".join(hints))
    assert schema is not None
    return [footer for _, footer in readable], schema


def _named(faults: Sequence[str]) -> str:
    more = f"; and {len(faults) - _NAMED_AT_MOST} more" if len(faults) > _NAMED_AT_MOST else ""
    return "; ".join(faults[:_NAMED_AT_MOST]) + more


def _common_schema(readable: Sequence[tuple[InputFile, Footer]]) -> tuple[pa.Schema | None, str, list[str]]:
    """The schema that has the rows of most files, the first of these, and the files that differ from it, each how."""
    known: dict[bytes, int] = {}  # index of the schema in `kinds`
    kinds: list[pa.Schema] = []
    for _, footer in readable:
        if footer.schema in known:
            continue
        schema = _footer_schema(footer)
        for place, kind in enumerate(kinds):
            common = common_schema(kind, schema)
            if common is not None:
                kinds[place] = common
                break
        else:
            place = len(kinds)
            kinds.append(schema)
        known[footer.schema] = place
    if not kinds:
        return None, "", []
    most = Counter(known[footer.schema] for _, footer in readable).most_common(1)[0][0]
    like = next(storage.redact(file.path) for file, footer in readable if known[footer.schema] == most)
    found = {footer.schema: footer for _, footer in readable if known[footer.schema] != most}
    said = {kind: difference(kinds[most], _footer_schema(footer)) for kind, footer in found.items()}
    odd = [f"{storage.redact(file.path)} ({said[footer.schema]})" for file, footer in readable if footer.schema in said]
    return kinds[most], like, odd


def _check_columns(schema: pa.Schema, files: Sequence[InputFile], column: str | None, added: Sequence[str]) -> None:
    file = files[0]
    duplicates = {name for name, times in Counter(schema.names).items() if times > 1}
    if duplicates:
        raise ColumnError(
            f"{storage.redact(file.path)}: column names stand more than once: {', '.join(sorted(duplicates))}",
            hint="rename them",
        )
    for field in schema:
        if has_lists_of_size_0(field.type):
            raise ColumnError(
                f"column {field.name!r} is {field.type}, with lists of the fixed size 0: PyArrow cannot read what it "
                "writes of these",
                hint="drop the column, or write it as lists of any length",
            )
    if column is not None and column not in schema.names:
        raise ColumnError(f"no column {column!r} in the input", hint=f"there are: {', '.join(schema.names)}")
    partitions = {part.partition("=")[0] for folder in {file.folder for file in files} for part in folder.split("/")}
    for name in added:
        # Readers such as DuckDB do not tell names apart by case.
        if (partition := _like(name, partitions)) is not None:
            raise ColumnError(
                f"the input has partition folders {partition}=…, which readers take for a column",
                hint="give the new column another name (infer: --output-column)",
            )
        if (present := _like(name, schema.names)) is not None:
            case = "" if present == name else f", which many readers do not tell from {name!r}"
            raise ColumnError(
                f"the input has a column {present!r} already{case}",
                hint="give the new one another name (infer: --output-column), or rename or drop that of the input",
            )


def _like(name: str, others: Iterable[str]) -> str | None:
    return next((other for other in others if other.casefold() == name.casefold()), None)


def _sample(files: Sequence[InputFile], read: Sequence[Footer], names: Sequence[str]) -> list[Sample]:
    """First rows of some row groups, spread over the input. Damaged pages are left to the run, which names them."""
    places = [(i, g) for i, footer in enumerate(read) for g, rows in enumerate(footer.row_groups) if rows]
    places = [places[index] for index in footers.spread_over(len(places), _SAMPLES)]
    requests = [(files[i].path, group, tuple(names)) for i, group in places]
    answers = footers.read_samples(requests, _SAMPLE_ROWS // max(1, len(requests)))
    samples = [sample for sample in answers if isinstance(sample, footers.Sample)]
    if answers and not samples:
        # Nothing is known of the images then: not their layout, their polarity or their range.
        first = answers[0]
        raise ParquetError(
            f"none of the {len(answers)} row groups looked at can be read; {storage.redact(requests[0][0])}, row group "
            f"{requests[0][1]}: {first.reason if isinstance(first, footers.Unreadable) else ''}",
            hint="repair the files, or take them out of the input",
        )
    return samples


def _look(
    samples: Sequence[pa.Table], column: ImageColumn, polarity: Polarity, total: int, *, own_noise: bool
) -> tuple[Polarity, Tone]:
    rows = pa.chunked_array([chunk for table in samples for chunk in table[column.name].chunks], column.type)
    check_float_range(rows, column, own_noise=own_noise)
    good = decode(rows, column).good_pixels
    if polarity is Polarity.AUTO:
        if total and not len(good):
            raise ColumnError(
                f"column {column.name!r}: none of the rows looked at has a usable image, so its polarity is not known",
                hint="say it with --polarity light-on-dark, dark-on-light or each",
            )
        polarity = find_polarity(good)
    return polarity, WHITE_AND_BLACK if own_noise else find_tone(good, polarity)


def _cut(read: Sequence[Footer], most_pieces: int) -> dict[str, np.ndarray[Any, np.dtype[np.int64]]]:
    """Units over all files, in `_UNIT_FIELDS` columns; no row group is split in more pieces than so many."""
    cut: list[tuple[int, ...]] = []
    total = sum(footer.rows for footer in read)
    before = 0  # rows of the files before
    for index, footer in enumerate(read):
        start = 0
        group = 0
        groups = footer.row_groups
        while group < len(groups):
            share = min(-(-total // _FEWEST_UNITS), -(-(total - before - start) // _SHARE_OF_REST))
            most = min(UNIT_ROWS, max(_SMALLEST_UNIT_ROWS, share))
            if groups[group] >= 2 * most:
                # Each piece reads past those before it: not too many of them.
                pieces = max(-(-groups[group] // UNIT_ROWS), min(_FEW_PIECES, -(-groups[group] // most)))
                piece = -(-groups[group] // min(pieces, most_pieces))
                for skip in range(0, groups[group], piece):
                    rows = min(piece, groups[group] - skip)
                    cut.append((index, group, group, skip, rows, start + skip))
                start += groups[group]
                group += 1
                continue
            last, rows = group, groups[group]
            while last + 1 < len(groups) and rows + groups[last + 1] <= most:
                last += 1
                rows += groups[last]
            if rows:
                cut.append((index, group, last, 0, rows, start))
            start += rows
            group = last + 1
        before += footer.rows
    columns = np.array(cut, np.int64).reshape(-1, len(_UNIT_FIELDS))
    return {field: columns[:, i].copy() for i, field in enumerate(_UNIT_FIELDS)}
