"""Some rows of a Parquet dataset of any size, without reading all of it. No torch, no Ray.

dataset = open_dataset("in.parquet")
sample = sample_rows(dataset, [find_image_column(dataset.schema, None, dataset.first_rows)], 20_000, seed=0)
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import pyarrow as pa

from denoise_batch import storage
from denoise_batch.errors import ParquetError
from denoise_batch.images import PIXELS, ImageColumn, Polarity, decode, joined, to_model_input
from denoise_batch.images.buffers import storage_of
from denoise_batch.parquet import footers
from denoise_batch.parquet.input_file import open_parquet
from denoise_batch.parquet.type_changes import as_type
from denoise_batch.storage.listing import list_inputs, skipped_lines

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

_RUNS: Final = 32
"""A sample is that many runs of neighbouring rows, spread evenly over the dataset."""
_FEW_GROUPS, _RUNS_OF_FEW = 8, 256
"""So few row groups are decoded nearly whole for 32 runs as well: more of them cost nothing, and tell more."""
_FIRST_ROWS: Final = 1 << 17
"""Of each of many row groups: what lies before a run has to be decoded, too."""
_BATCH: Final = 4096
_LOOKED_GROUPS: Final = 16
_LOOKED_ROWS: Final = 64


@dataclass(frozen=True)
class Dataset:
    """A Parquet file or dataset whose footers have been read.

    Attributes:
        path: as it was given.
        files: paths in input order.
        footers: of each file.
        schema: that of the first file with rows.
        first_rows: some of row groups spread over it, of files of that schema; None where there are no rows.
        notes: a line where files were left out.
    """

    path: str
    files: tuple[str, ...]
    footers: tuple[footers.Footer, ...]
    schema: pa.Schema
    first_rows: pa.Table | None
    notes: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        return sum(footer.rows for footer in self.footers)

    def has_numbers(self, name: str) -> bool:
        """Whether every file with rows has a column of that name that holds numbers."""
        for schema in {footer.schema for footer in self.footers if footer.rows}:
            types = [each.type for each in pa.ipc.read_schema(pa.py_buffer(schema)) if each.name == name]
            if len(types) != 1 or not (pa.types.is_integer(types[0]) or pa.types.is_floating(types[0])):
                return False
        return True


class _Runs(NamedTuple):
    """What of a row group is read, or of a whole file, the row group None.

    Attributes:
        start: number in the file of its first row.
        runs: rows before each run, and rows in it; in order.
    """

    file: int
    group: int | None
    start: int
    runs: list[tuple[int, int]]


@dataclass(frozen=True)
class Sample:
    """Rows of a dataset, in input order.

    Attributes:
        file: (n,) int64, index of each row's file.
        row: (n,) int64, each row's number within its file.
        pixels: one (n, 784) float32 array a column, 0..1 with noise beyond, as the file has it.
        good: one (n,) bool array a column: whether the row holds an image there.
        numbers: (n,) float64 of each column of numbers that was asked for, NaN for null.
    """

    file: npt.NDArray[np.int64]
    row: npt.NDArray[np.int64]
    pixels: tuple[npt.NDArray[np.float32], ...]
    good: tuple[npt.NDArray[np.bool_], ...]
    numbers: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.row)


def open_dataset(path: str) -> Dataset:
    """Lists a dataset's files and reads their footers.

    Raises:
        MissingFileError: the path does not exist or holds no Parquet file.
        ParquetError: a file is not Parquet or is damaged.
    """
    listing = list_inputs([path])
    files = [file.path for file in listing.files]
    found: list[footers.Footer] = []
    for file, footer in zip(files, footers.read_footers(files), strict=True):
        if isinstance(footer, footers.Unreadable):
            raise _unreadable(file, footer.reason)
        found.append(footer)
    # An empty file may have other types: pandas knows none of columns without values.
    first = next((footer for footer in found if footer.rows), found[0])
    schema = pa.ipc.read_schema(pa.py_buffer(first.schema))
    names = tuple(dict.fromkeys(schema.names))
    places = [
        (file, group, names)
        for file, footer in zip(files, found, strict=True)
        if footer.schema == first.schema
        for group, rows in enumerate(footer.row_groups)
        if rows
    ]
    looked = [places[index] for index in footers.spread_over(len(places), _LOOKED_GROUPS)]
    samples: list[pa.Table] = []
    for (file, _, _), read in zip(looked, footers.read_samples(looked, _LOOKED_ROWS), strict=True):
        if isinstance(read, footers.Unreadable):
            raise _unreadable(file, read.reason)
        samples.append(read.table)
    notes = skipped_lines(len(listing.skipped), listing.skipped_shown)
    return Dataset(path, tuple(files), tuple(found), schema, joined(samples), tuple(notes))


def sample_rows(
    dataset: Dataset, columns: Sequence[ImageColumn], count: int, *, seed: int, numbers: Sequence[str] = ()
) -> Sample:
    """`count` rows from all over the dataset; every row where it has no more than that.

    The dataset is cut into 32 equal stretches, or into 256 where it has no more than 8 row groups; of each a run of
    neighbouring rows is read, at a random place: data often come in some order, and many of them in one row group.

    What lies before a run in its row group is decoded as well, in batches, and of a file in an object store read. So
    where there are more than 8 row groups, none of a row group's rows beyond its first 131,072 are taken; eight of a
    million rows take some 7 s where images are bytes, and a minute where they are lists (one core).

    Args:
        columns: image columns to decode.
        count: rows, at least 1.
        seed: which rows; the same dataset and seed give the same rows.
        numbers: columns of numbers to read as well (`Dataset.has_numbers`).

    Raises:
        ParquetError: a file's pages are damaged.
        ColumnError: a file lacks a column, or has another type in it.
    """
    _check_types(dataset, columns)
    names = [*(column.name for column in columns), *numbers]
    parts: list[Sample] = []
    for file, group, start, runs in _runs(dataset, count, np.random.default_rng(seed)):
        for row, batch in _read(dataset.files[file], group, runs, names):
            decoded = [decode(as_type(batch.column(i), column.type), column) for i, column in enumerate(columns)]
            rows = np.arange(start + row, start + row + batch.num_rows)
            parts.append(
                Sample(
                    np.full(len(rows), file),
                    rows,
                    tuple(to_model_input(part.pixels, Polarity.LIGHT_ON_DARK) for part in decoded),
                    tuple(part.bad == 0 for part in decoded),
                    {name: _floats(batch.column(len(columns) + i)) for i, name in enumerate(numbers)},
                )
            )
    if not parts:
        none = np.zeros(0, np.int64)
        return Sample(
            none,
            none,
            (np.zeros((0, PIXELS), np.float32),) * len(columns),
            (np.zeros(0, np.bool_),) * len(columns),
            dict.fromkeys(numbers, np.zeros(0)),
        )
    return Sample(
        np.concatenate([part.file for part in parts]),
        np.concatenate([part.row for part in parts]),
        tuple(np.concatenate([part.pixels[i] for part in parts]) for i in range(len(columns))),
        tuple(np.concatenate([part.good[i] for part in parts]) for i in range(len(columns))),
        {name: np.concatenate([part.numbers[name] for part in parts]) for name in numbers},
    )


def _floats(column: pa.Array) -> npt.NDArray[np.float64]:
    """Numbers as float64, null as NaN."""
    floats: npt.NDArray[np.float64] = column.to_numpy(zero_copy_only=False).astype(np.float64)
    return floats


def lowest_rows(
    dataset: Dataset, name: str, count: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The rows with the lowest numbers in a column, of the whole dataset: only that column is read.

    Returns:
        (n,) each, lowest first: index of the file, number of the row within it, and the number. Nulls do not count.

    Raises:
        ParquetError: a file's pages are damaged, or it lacks the column.
    """
    none = np.zeros(0, np.int64)
    file, row, value = none, none, np.zeros(0)
    for index, path in enumerate(dataset.files):
        start = 0
        if not dataset.footers[index].rows:
            continue  # an empty file may lack the column
        for batch in _batches(path, None, [name]):
            numbers = _floats(batch.column(name))
            there = np.flatnonzero(np.isfinite(numbers))
            file = np.concatenate([file, np.full(len(there), index)])
            row = np.concatenate([row, start + there])
            value = np.concatenate([value, numbers[there]])
            kept = np.argsort(value, kind="stable")[:count]
            file, row, value = file[kept], row[kept], value[kept]
            start += batch.num_rows
    return file, row, value


def rows_at(
    dataset: Dataset, columns: Sequence[ImageColumn], file: npt.NDArray[np.int64], row: npt.NDArray[np.int64]
) -> Sample:
    """Given rows, in the order in which they are given; each of their row groups is read once.

    Args:
        file, row: (n,) each, as in `Sample`.

    Raises:
        ParquetError: a file's pages are damaged.
        ColumnError: a file lacks a column, or has another type in it.
    """
    _check_types(dataset, columns)
    pixels = [np.zeros((len(row), PIXELS), np.float32) for _ in columns]
    good = [np.zeros(len(row), np.bool_) for _ in columns]
    names = [column.name for column in columns]
    for index in np.unique(file):
        for group, (rows, start) in enumerate(_with_starts(dataset.footers[index].row_groups)):
            wanted = np.flatnonzero((file == index) & (row >= start) & (row < start + rows))
            if len(wanted):
                within = row[wanted] - start
                low, high = int(within.min()), int(within.max())
                for begin, batch in _read(dataset.files[index], group, [(low, high - low + 1)], names):
                    here = np.flatnonzero((within >= begin) & (within < begin + batch.num_rows))
                    for place, column in enumerate(columns):
                        # pyarrow cannot take from views: of what they stand for it can.
                        taken = storage_of(as_type(batch.column(place), column.type)).take(
                            pa.array(within[here] - begin)
                        )
                        decoded = decode(taken, column)
                        pixels[place][wanted[here]] = to_model_input(decoded.pixels, Polarity.LIGHT_ON_DARK)
                        good[place][wanted[here]] = decoded.bad == 0
    return Sample(file, row, tuple(pixels), tuple(good))


def _check_types(dataset: Dataset, columns: Sequence[ImageColumn]) -> None:
    for column in columns:
        footers.check_type(dataset.files, dataset.footers, column.name, column.type)


def _runs(dataset: Dataset, count: int, generator: np.random.Generator) -> list[_Runs]:
    """What is read of each row group; of each file where all rows are taken, as each of them is opened anew."""
    if dataset.rows <= count:
        return [_Runs(file, None, 0, [(0, footer.rows)]) for file, footer in enumerate(dataset.footers) if footer.rows]
    groups = [
        (file, group, rows, start)
        for file, footer in enumerate(dataset.footers)
        for group, (rows, start) in enumerate(_with_starts(footer.row_groups))
        if rows
    ]
    firsts = [(file, group, min(rows, _FIRST_ROWS), start) for file, group, rows, start in groups]
    if len(groups) > _FEW_GROUPS and sum(rows for _, _, rows, _ in firsts) > count:
        groups = firsts
    ends = np.cumsum([rows for _, _, rows, _ in groups])
    shares = np.arange(min(_RUNS_OF_FEW if len(groups) <= _FEW_GROUPS else _RUNS, count) + 1)
    # Each stretch is the rows that its run takes, and its share of the others, some of which lie before the run.
    taken, spare = (rows * shares // shares[-1] for rows in (count, int(ends[-1]) - count))
    begins = (taken + spare)[:-1] + generator.integers(0, np.diff(spare), endpoint=True)
    found: dict[int, _Runs] = {}
    for begin, end in zip(begins.tolist(), (begins + np.diff(taken)).tolist(), strict=True):
        place = int(np.searchsorted(ends, begin, side="right"))
        while begin < end:  # a run may go on in the next row group
            file, group, rows, start = groups[place]
            first, stop = int(ends[place]) - rows, min(end, int(ends[place]))
            found.setdefault(place, _Runs(file, group, start, [])).runs.append((begin - first, stop - begin))
            begin, place = stop, place + 1
    return list(found.values())


def _with_starts(row_groups: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Each row group's rows, and the number in the file of its first row."""
    return zip(row_groups, itertools.accumulate(row_groups, initial=0), strict=False)  # the sum of all is one more


def _read(
    path: str, group: int | None, runs: Sequence[tuple[int, int]], names: Sequence[str]
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Rows of runs in a row group, or in the file, in batches, each with its first row's number in that."""
    row, left = 0, list(reversed(runs))
    for batch in _batches(path, group, names):
        stop = row + batch.num_rows
        while left and left[-1][0] < stop:
            skip, take = left.pop()
            here = min(skip + take, stop) - skip
            yield skip, batch.slice(skip - row, here)
            if here < take:
                left.append((stop, take - here))
        row = stop
        if not left:
            return


def _batches(path: str, group: int | None, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Some columns of a row group, or of all of them."""
    try:
        with open_parquet(path, buffer=1 << 20) as file:
            missing = [name for name in names if name not in file.schema_arrow.names]
            if missing:
                raise ParquetError(
                    f"{storage.redact(path)}: there is no column {missing[0]!r}, which other files of it have",
                    hint="give files of one schema at a time",
                )
            groups = range(file.num_row_groups) if group is None else [group]
            for batch in file.iter_batches(batch_size=_BATCH, row_groups=groups, columns=names, use_threads=False):
                yield batch.select(names)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, str(error).partition("\n")[0]) from error


def _unreadable(path: str, reason: str) -> ParquetError:
    return ParquetError(
        f"{storage.redact(path)} is not readable as Parquet: {reason}", hint="repair it, or give another file"
    )
