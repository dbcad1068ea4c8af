"""Pandas' index where it stands in a file's footer alone, as a range: `index_columns: [{"kind": "range", …}]`.

Readers give a table that index where the range has as many numbers as the table rows, and drop it without a word where
it has not. So a file with other rows than the one it is made of needs a range of its own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pyarrow as pa

    from denoise_batch.inference.plan import Plan

_PANDAS = b"pandas"

NOT_OF_ALL = "is not kept where rows are set aside"
NOT_IN_LINE = "is not kept, since the files' ranges do not follow each other"
NOT_OF_SEVERAL = "is not kept where files are joined"
_IF_IN_LINE = "is kept only if the files' ranges follow each other"
_PART_BY_PART = "each part has its own, which pandas drops where it reads several at once"


@dataclass(frozen=True)
class RangeIndex:
    """The numbers `start`, `start + step`, … of a file's rows; the name is None where the index has none."""

    name: Any
    start: int
    step: int

    @property
    def is_default(self) -> bool:
        """Whether it is the one that every table has without a note as well."""
        return (self.name, self.start, self.step) == (None, 0, 1)

    def after(self, rows: int) -> RangeIndex:
        """That of the rows after so many. The default one begins anew: it counts a file's own rows."""
        return self if self.is_default else replace(self, start=self.start + rows * self.step)

    def said(self, fate: str) -> str:
        """What becomes of it, for people."""
        named = f"pandas' index {self.name!r}" if self.name is not None else f"pandas' index from {self.start}"
        return f"{named} stands in the files' footers alone, as a range, and {fate}: reset_index() first"


def range_index(schema: pa.Schema, rows: int) -> RangeIndex | None:
    """The range that is the index of a file of so many rows; None: it has another index, or a range of other rows."""
    try:
        (entry,) = json.loads((schema.metadata or {})[_PANDAS])["index_columns"]
        if not _is_range(entry):
            return None
        name, start, step = entry["name"], entry["start"], entry["step"]
        # Whoever filters a table of pandas' and writes it with PyArrow leaves a range of other rows.
        if range(start, entry["stop"], step) != range(start, start + rows * step, step):
            return None
        return RangeIndex(name, start, step)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def with_range(schema: pa.Schema, index: RangeIndex | None, rows: int) -> pa.Schema:
    """The schema with this range in pandas' note, for so many rows, in place of one that is there.

    Args:
        index: None takes the range out, and readers give the rows their numbers.
    """
    try:
        note = json.loads((schema.metadata or {})[_PANDAS])
        before = note["index_columns"]
        kept: list[Any] = [entry for entry in before if not _is_range(entry)]
        if len(kept) == len(before):
            return schema
        if index is not None:
            stop = index.start + rows * index.step
            kept.append({"kind": "range", "name": index.name, "start": index.start, "stop": stop, "step": index.step})
        if kept == before:
            return schema
        content = json.dumps(note | {"index_columns": kept}, separators=(",", ":")).encode()
    except (ValueError, KeyError, TypeError, RecursionError):
        return schema
    return schema.with_metadata(schema.metadata | {_PANDAS: content})


def of_some_rows(schema: pa.Schema, first: int, rows: int, of: int) -> pa.Schema:
    """A file's schema for one of some of its rows, which follow each other, without one of other rows.

    Args:
        first: how many rows of the file come before them.
        rows: how many they are.
        of: how many the file has.
    """
    index = range_index(schema, of)
    return with_range(schema, None if index is None else index.after(first), rows)


def joined_range(files: Sequence[tuple[RangeIndex | None, int]]) -> RangeIndex | None:
    """The range of files that are joined into one, in their order; None: theirs do not follow each other.

    Args:
        files: each one's range, and how many rows it has.
    """
    first = files[0][0] if files else None
    if first is None or all(index == first and first.is_default for index, _ in files):
        return first
    before = 0
    for index, rows in files:
        if index != replace(first, start=first.start + before * first.step):
            return None
        before += rows
    return first


def expected_fate(plan: Plan, *, single: bool, whole: bool) -> str:
    """What is said of an index that is not kept everywhere, as far as the first file tells; "" where it is.

    Args:
        single: whether the output is one file.
        whole: whether no rows are set aside.
    """
    index = range_index(plan.schema, plan.files[0].rows)
    files = len(np.unique(plan.units["file"]))
    if index is None or index.is_default:
        return ""
    if single and files > 1:
        return index.said(_IF_IN_LINE)
    if not whole:
        return index.said(NOT_OF_ALL)
    return index.said(_PART_BY_PART) if not single and len(plan) > files else ""


def _is_range(entry: Any) -> bool:
    return isinstance(entry, dict) and entry.get("kind") == "range"
