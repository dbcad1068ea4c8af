"""The clean digits that a training learns from: MNIST in memory, or any number of them in Parquet, read by row groups.

    images = open_parquet(settings)          # footers and a few first rows only
    train, validation = split(images.pieces, images.rows, held_out)
    for clean, noisy in read_rows(images, train): ...

No torch and no Ray here: the driver checks the data with this before either is loaded, and the workers read with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from denoise_batch import storage
from denoise_batch.errors import DataChanged, MissingFileError, ParquetError, first_line
from denoise_batch.images import (
    PAIRED,
    WHITE_AND_BLACK,
    Polarity,
    Tone,
    check_float_range,
    decode,
    find_clean_columns,
    find_tone,
    joined,
    look_at_sample,
    pairs_belong_together,
    unpaired,
    upright,
)
from denoise_batch.parquet import input_file
from denoise_batch.parquet.footers import Footer, Unreadable, check_type, read_footers, read_samples, spread_over
from denoise_batch.parquet.type_changes import as_type
from denoise_batch.storage.listing import list_inputs, skipped_lines, stat_input

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from denoise_batch.images import ImageColumn
    from denoise_batch.training.recipes import TrainSettings

    Images = NDArray[Any]
    """(n, 28, 28) uint8, 0..255, or float32; 0 is background."""

SIDE = 28
PIXELS = SIDE * SIDE
CHUNK_ROWS = 4096
_SAMPLED_GROUPS = 16
_SAMPLED_ROWS = 256
_HELD_OUT_RUNS, _FEW_HELD_OUT = 16, 100
_LOOK = "`denoise-batch inspect` shows what the columns hold"


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows `start` to `stop` of a row group of a file (numbers, from 0)."""

    file: int
    row_group: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


def rows_of(pieces: Sequence[Piece]) -> int:
    return sum(piece.rows for piece in pieces)


def cut(pieces: Sequence[Piece], start: int, stop: int) -> list[Piece]:
    """The rows `start` to `stop` of the pieces laid end to end."""
    found: list[Piece] = []
    position = 0
    for piece in pieces:
        first, last = max(start, position), min(stop, position + piece.rows)
        if first < last:
            offset = piece.start - position
            found.append(Piece(piece.file, piece.row_group, first + offset, last + offset))
        position += piece.rows
        if position >= stop:
            break
    return found


def split(pieces: Sequence[Piece], images: int, held_out: int) -> tuple[list[Piece], list[Piece]]:
    """Of the first `images` rows those to train on, and those to validate on.

    The latter are runs of neighbours, spread over all: data often come in some order, and the end of it is no sample.
    """
    train: list[Piece] = []
    validation: list[Piece] = []
    runs = min(_HELD_OUT_RUNS, held_out)
    for run in range(runs):
        stop = images * (run + 1) // runs
        kept_from = stop - (held_out * (run + 1) // runs - held_out * run // runs)
        train += cut(pieces, images * run // runs, kept_from)
        validation += cut(pieces, kept_from, stop)
    return train, validation


@dataclass(frozen=True)
class ParquetImages:
    """A Parquet dataset of clean digits, with the user's noisy ones beside them or without.

    Attributes:
        files: path or URI, size in bytes and mtime in ns of each.
        pieces: its row groups, in file order.
        clean: the column of clean images.
        noisy: the column of noisy images of the same digits, or None.
        polarity: of both columns, never `auto`.
        tone: of the clean images without noisy ones, which are brought to white paper and full ink.
        notes: lines that say what is odd about them, as far as a sample shows it.
    """

    files: tuple[tuple[str, int, int], ...]
    pieces: tuple[Piece, ...]
    clean: ImageColumn
    noisy: ImageColumn | None
    polarity: Polarity
    notes: tuple[str, ...] = ()
    tone: Tone = WHITE_AND_BLACK

    @property
    def rows(self) -> int:
        return rows_of(self.pieces)

    @property
    def bytes_per_row(self) -> int:
        """What one row takes in memory after decoding."""
        columns = [self.clean] if self.noisy is None else [self.clean, self.noisy]
        return sum(PIXELS * (1 if column.dtype == "uint8" else 4) for column in columns)

    def identity(self) -> dict[str, Any]:
        """What tells this data from other data, as JSON."""
        return {
            "source": "Parquet",
            "files": [[storage.redact(path), size, mtime_ns] for path, size, mtime_ns in self.files],
            "rows": self.rows,
            "column": self.clean.name,
            "noisy_column": self.noisy.name if self.noisy else None,
            "polarity": self.polarity.value,
            **self.tone.facts(),
        }


def open_parquet(settings: TrainSettings) -> ParquetImages:
    """Finds the data that `settings.data` names, and checks it, reading footers and a few first rows.

    Raises:
        MissingFileError, ParquetError, ColumnError: it cannot be used; the message names the file or the column.
    """
    shown = str(settings.data)
    listing = list_inputs([shown])
    paths = [file.path for file in listing.files]
    footers = _readable(paths, read_footers(paths))
    pieces = tuple(
        Piece(file, group, 0, rows)
        for file, footer in enumerate(footers)
        for group, rows in enumerate(footer.row_groups)
        if rows
    )
    if (rows := rows_of(pieces)) < 2:
        raise ParquetError(
            f"{shown} holds {rows} row{'s' if rows != 1 else ''}", hint="a training needs at least two images"
        )
    schema = pa.ipc.read_schema(pa.py_buffer(footers[pieces[0].file].schema))
    chosen = [pieces[index] for index in spread_over(len(pieces), _SAMPLED_GROUPS)]
    samples = _samples(paths, chosen, schema.names)
    columns = find_clean_columns(samples[0].schema, settings.column, settings.noisy_column, joined(samples))
    for place, column in enumerate(columns):
        check_type(paths, footers, column.name, column.type)
        for sample in samples:
            check_float_range(sample.column(column.name), column, own_noise=place > 0)
    sources = [storage.redact(paths[piece.file]) for piece in chosen]
    polarity, tone, notes = _look(samples, sources, columns, Polarity(settings.polarity))
    notes = [*skipped_lines(len(listing.skipped), listing.skipped_shown), *notes]
    files = tuple((file.path, file.size, file.mtime_ns) for file in listing.files)
    held_out = held_out_count(min(rows_of(pieces), settings.max_images or rows_of(pieces)), settings.resolve().held_out)
    if held_out < _FEW_HELD_OUT:
        images = "image is" if held_out == 1 else "images are"
        notes.append(f"note: {held_out:,} {images} held out for validation, too few to choose the best epoch by")
    noisy = columns[1] if len(columns) > 1 else None
    return ParquetImages(files, pieces, columns[0], noisy, polarity, tuple(notes), tone)


def _look(
    samples: Sequence[pa.Table], sources: Sequence[str], columns: Sequence[ImageColumn], polarity: Polarity
) -> tuple[Polarity, Tone, list[str]]:
    """The polarity, the tone and what is odd, of samples of the columns.

    Args:
        samples: a table for each of the `sources`, files by name.
    """
    names = [column.name for column in columns]
    parts = [
        {column.name: decode(as_type(sample.column(column.name), column.type), column) for column in columns}
        for sample in samples
    ]
    bad_in = {name: np.concatenate([part[name].bad != 0 for part in parts]) for name in names}
    bad = np.logical_or.reduce(list(bad_in.values()))
    if bad.all():
        without = [repr(name) for name, rows in bad_in.items() if rows.all()]
        which = (
            f"an image in {' and '.join(without)}" if without else f"images in both {' and '.join(map(repr, names))}"
        )
        raise ParquetError(f"none of {len(bad):,} sampled rows holds {which} that can be used", hint=_LOOK)
    pixels = {name: np.concatenate([part[name].pixels for part in parts])[~bad] for name in names}
    found, notes = look_at_sample(pixels, bad_in, polarity)
    if not np.ptp(pixels[names[0]], axis=1).any():
        raise ParquetError(
            f"each of {len(pixels[names[0]]):,} sampled images of column {names[0]!r} is of a single grey: there is "
            "nothing to learn",
            hint=_LOOK,
        )
    if len(names) == 2:  # all together belong together; those of one file may not
        clean, noisy = names
        sure = pairs_belong_together(pixels[noisy], pixels[clean]) / len(parts) ** 0.5  # of one like the others
        for source, part in zip(sources, parts, strict=True):
            good = (part[clean].bad == 0) & (part[noisy].bad == 0)
            if sure > 2 * PAIRED > PAIRED > pairs_belong_together(part[noisy].pixels[good], part[clean].pixels[good]):
                raise unpaired(f"{source}: the images of column {noisy!r}", clean, int(np.count_nonzero(good)))
    tone = find_tone(pixels[names[0]], found) if len(names) == 1 else WHITE_AND_BLACK
    return found, tone, [*notes, *tone.lines()]


def _readable(paths: Sequence[str], found: Sequence[Footer | Unreadable]) -> list[Footer]:
    bad = [
        f"{storage.redact(path)} ({footer.reason})"
        for path, footer in zip(paths, found, strict=True)
        if isinstance(footer, Unreadable)
    ]
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise ParquetError(
            f"not readable as Parquet: {'; '.join(bad[:5])}{more}", hint="leave these files out, or write them again"
        )
    return [footer for footer in found if isinstance(footer, Footer)]


def _samples(paths: Sequence[str], chosen: Sequence[Piece], names: Sequence[str]) -> list[pa.Table]:
    """First rows of these row groups."""
    requests = [(paths[piece.file], piece.row_group, tuple(names)) for piece in chosen]
    samples: list[pa.Table] = []
    for request, sample in zip(requests, read_samples(requests, _SAMPLED_ROWS), strict=True):
        if isinstance(sample, Unreadable):
            raise ParquetError(
                f"{storage.redact(request[0])} cannot be read: {sample.reason}", hint="write the file again"
            )
        samples.append(sample.table)
    return samples


def read_rows(
    images: ParquetImages, pieces: Sequence[Piece], chunk: int = CHUNK_ROWS
) -> Iterator[tuple[Images, Images | None]]:
    """Reads pieces in their order, `chunk` rows at most at a time, leaving out rows whose image is bad.

    Memory is bounded by the chunk and by one page of each column, whatever the size of the row groups.

    Yields:
        clean (n, 28, 28) uint8, or float32 within 0..1, light on dark; noisy the same but not clipped, or None.

    Raises:
        MissingFileError, ParquetError: a file is gone or damaged, or holds fewer rows than its footer says.
        DataChanged: it is not the file that was planned with.
    """
    columns = [images.clean.name] if images.noisy is None else [images.clean.name, images.noisy.name]
    opened: tuple[int, Any] | None = None
    try:
        for piece in pieces:
            path, *planned = images.files[piece.file]
            try:
                if opened is None or opened[0] != piece.file:
                    if opened is not None:
                        opened[1].close()
                    if list(stat_input(path)) != planned:  # its layout, too, may be another by now
                        raise DataChanged(
                            f"{storage.redact(path)} changed since the training was planned",
                            hint="run again with --overwrite to train on what it holds now",
                        )
                    opened = (piece.file, input_file.open_parquet(path))
                position = 0
                batches = opened[1].iter_batches(
                    chunk, row_groups=[piece.row_group], columns=columns, use_threads=False
                )
                for batch in batches:
                    first, last = max(piece.start, position), min(piece.stop, position + batch.num_rows)
                    if first < last:
                        yield _decoded(images, batch.slice(first - position, last - first))
                    position += batch.num_rows
                    if position >= piece.stop:
                        break
            except FileNotFoundError as error:
                raise MissingFileError(
                    f"{storage.redact(path)} is gone", hint="put the file back; every worker must see it at this path"
                ) from error
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                raise ParquetError(
                    f"{storage.redact(path)}, row group {piece.row_group}, is damaged: {first_line(error)}",
                    hint="leave this file out, or write it again",
                ) from error
            if position < piece.stop:
                raise ParquetError(
                    f"{storage.redact(path)}, row group {piece.row_group}: {position} rows could be read, "
                    f"fewer than its footer says",
                    hint="leave this file out, or write it again",
                )
    finally:
        if opened is not None:
            opened[1].close()


def _decoded(images: ParquetImages, batch: pa.RecordBatch) -> tuple[Images, Images | None]:
    clean = decode(as_type(batch.column(0), images.clean.type), images.clean)
    noisy = None if images.noisy is None else decode(as_type(batch.column(1), images.noisy.type), images.noisy)
    good = clean.bad == 0 if noisy is None else (clean.bad == 0) & (noisy.bad == 0)
    even, _ = images.tone.even(upright(clean.pixels[good], images.polarity), Polarity.LIGHT_ON_DARK)
    if even.dtype != np.uint8:
        even = even.clip(0.0, 1.0)
    other = None if noisy is None else upright(noisy.pixels[good], images.polarity).reshape(-1, SIDE, SIDE)
    return even.reshape(-1, SIDE, SIDE), other


def load_rows(images: ParquetImages, pieces: Sequence[Piece]) -> tuple[Images, Images | None]:
    """All rows of the pieces in memory; as `read_rows` gives them.

    Raises:
        ParquetError: no row is good; and as `read_rows`.
    """
    chunks = [chunk for chunk in read_rows(images, pieces) if len(chunk[0])]
    if not chunks:
        raise ParquetError(
            f"none of {rows_of(pieces)} rows holds a usable image in "
            + " and ".join(repr(column.name) for column in (images.clean, images.noisy) if column),
            hint=_LOOK,
        )
    clean = np.concatenate([chunk[0] for chunk in chunks])
    noisy = None if images.noisy is None else np.concatenate([chunk[1] for chunk in chunks if chunk[1] is not None])
    return clean, noisy


def held_out_count(images: int, held_out: int) -> int:
    """How many of `images` are kept for validation: `held_out` (5,000 for 0), at most a twelfth, at least one."""
    return max(1, min(held_out or 5000, images // 12))
