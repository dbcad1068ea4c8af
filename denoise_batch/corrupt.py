"""The seed's degradation over Parquet: clean digits in, noisy ones out, with each row's levels beside them.

    report = corrupt(CorruptSettings(inputs=("clean.parquet",), output=Path("noisy.parquet"), seed=1))

Row i of the input is degraded from (seed, i) alone: how the input is cut into files, row groups or batches, and
how many rows follow, changes nothing. At no time are more than some 16,384 rows in memory, and a row group to write.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from denoise_batch import storage
from denoise_batch.errors import (
    ColumnError,
    DataChanged,
    DenoiseBatchError,
    FlagError,
    Interrupted,
    ParquetError,
    first_line,
    ran_out,
)
from denoise_batch.images import ImageColumn, Layout, Polarity, decode, encode, to_model_input
from denoise_batch.inference.output_schema import with_notes
from denoise_batch.inference.plan import make_plan
from denoise_batch.parquet.input_file import check_int96, open_parquet, read_batches
from denoise_batch.parquet.output_file import OutputFile, check_parquet_name
from denoise_batch.parquet.pages import check_pages
from denoise_batch.parquet.range_index import NOT_OF_SEVERAL, RangeIndex, range_index, with_range
from denoise_batch.parquet.type_changes import widen
from denoise_batch.storage import publishing
from denoise_batch.storage.listing import list_inputs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from denoise_batch.images.buffers import Pixels
    from denoise_batch.inference.plan import Plan, PlannedFile
    from denoise_batch.noise import NoiseRecipe
    from denoise_batch.parquet.output_file import Written

BLOCK = 1024
"""Rows that share one random generator. Part of what a seed means: another number here gives other noise."""

CHUNK = 16 * BLOCK
"""Rows that are worked on together; as float32 they are 51 MB."""

IMAGE, CLEAN, SIGMA, NOISE = "image", "clean", "sigma", "noise"
"""The columns that are written beside those of the input."""

_REPAIR = "repair it, or take it out of the input"


@dataclass(frozen=True)
class CorruptSettings:
    """What to degrade, and how.

    Attributes:
        inputs: Parquet files, folders or globs with clean images.
        output: one Parquet file.
        sigma: range of the blur's standard deviation, in pixels.
        half_range: range of the white noise's half range, in units of full ink.
        seed: of levels and noise.
        dtype: `float32` keeps what the noise adds beyond 0..1; `uint8` clips to 0..1 and rounds to 255 steps.
        column: the image column; None finds it.
        overwrite: replace an existing output.
    """

    inputs: tuple[str, ...]
    output: Path
    sigma: tuple[float, float] = (0.0, 2.0)
    half_range: tuple[float, float] = (0.01, 1.5)
    seed: int = 0
    dtype: Literal["float32", "uint8"] = "float32"
    column: str | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class CorruptReport:
    """What was written.

    Attributes:
        bad_rows: rows without a readable image; they stay, with a null image and null levels.
        bytes: size of the output.
        keys_left_out: of the input's folders `key=value`: one file has none.
        skipped_files: files in the input's folders that were left out because of their names.
        skipped: the first of them.
        range_index: what is said of pandas' index where it stands in the files' footers alone, and is not kept.
    """

    output: str
    rows: int
    bad_rows: int
    bytes: int
    seconds: float
    column: str
    dtype: str
    sigma: tuple[float, float]
    half_range: tuple[float, float]
    seed: int
    keys_left_out: list[str]
    skipped_files: int
    skipped: list[str]
    range_index: str = ""

    def to_json(self) -> dict[str, Any]:
        return dict(self.__dict__)


def corrupt(settings: CorruptSettings, progress: Callable[[int, int], None] | None = None) -> CorruptReport:
    """Writes the degraded images of `settings.inputs` to `settings.output`, which exists only when it is complete.

    Columns of the output: those of the input in their order, where the image column becomes `image` (noisy; float32 in
    a fixed_size_list of 784, or uint8 in fixed_size_binary(784)) and `clean` (the original column, unchanged), then
    `sigma` and `noise` (float32): the row's blur in pixels and the half range of its white noise.

    Args:
        settings: what to do.
        progress: told (rows done, rows in all) now and then.

    Raises:
        RequestError: the request cannot be met, or a file is damaged; nothing was written.
        ResourceExhausted: the disk is full.
        DataChanged: a file gave another number of rows than its footer promised.
        DenoiseBatchError: what stands on the disk is not what was written.
    """
    started = time.monotonic()
    publishing.check_output_file(settings.output, overwrite=settings.overwrite)
    check_parquet_name(settings.output)
    if not 0 <= settings.seed < 2**63:
        raise FlagError(f"--seed {settings.seed} is impossible", hint="give a whole number from 0 to 2^63 - 1")
    listing = list_inputs(settings.inputs)
    publishing.check_apart(settings.output, listing)
    # White noise and blur are the same for dark ink on white as for light on dark, so the polarity may stay what it is.
    plan = make_plan(listing.files, settings.column, Polarity.LIGHT_ON_DARK)
    schema = _output_schema(plan, settings)

    # All that can be refused has been: only now torch, which takes seconds to load.
    from denoise_batch.noise import NoiseRecipe

    recipe = NoiseRecipe(settings.sigma, settings.half_range)
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{settings.output.name}.", dir=settings.output.parent) as folder:
            built = Path(folder) / settings.output.name
            written, bad_rows = _write(built, plan, schema, recipe, settings, progress)
            publishing.publish(built, settings.output, overwrite=settings.overwrite)
    except OSError as error:
        exhausted = ran_out(error, settings.output)
        if exhausted is None:
            raise
        raise exhausted from error
    index = range_index(plan.schema, plan.files[0].rows)
    return CorruptReport(
        str(settings.output),
        plan.rows,
        bad_rows,
        written.bytes,
        round(time.monotonic() - started, 3),
        plan.column.name,
        settings.dtype,
        settings.sigma,
        settings.half_range,
        settings.seed,
        listing.keys,
        len(listing.skipped),
        list(listing.skipped_shown),
        "" if index is None or _joined_range(plan) is not None else index.said(NOT_OF_SEVERAL),
    )


def degrade_rows(clean: Pixels, start: int, seed: int, recipe: NoiseRecipe) -> tuple[Pixels, Pixels, Pixels]:
    """Degrades rows that begin at a multiple of `BLOCK`.

    Blocks differ by one of 2^32 states of their generator (of its seed torch's on a CPU keeps the low 32 bits), so that
    in a hundred million rows a pair of blocks may get the same noise.

    Args:
        clean: (n, 784) float32.
        start: number of the first row in the whole input, a multiple of `BLOCK`.
        seed: of levels and noise.
        recipe: ranges of the levels.

    Returns:
        noisy (n, 784), sigma (n,), half range (n,), all float32; row i of them follows from (seed, start + i) alone.
    """
    import torch

    if start % BLOCK:
        raise ValueError(f"rows must start at a multiple of {BLOCK}, not at {start}")
    noisy = np.empty((len(clean), 784), np.float32)
    levels = np.empty((2, len(clean)), np.float32)
    for first in range(0, len(clean), BLOCK):
        part = clean[first : first + BLOCK]
        # Numbers for a whole block are drawn even where fewer rows are left, so that what follows a row never matters.
        block = np.zeros((BLOCK, 784), np.float32)
        block[: len(part)] = part
        entropy = np.random.SeedSequence((seed, (start + first) // BLOCK)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(entropy[0]))
        made = recipe.apply(torch.from_numpy(block).view(-1, 28, 28), generator)
        noisy[first : first + BLOCK] = made[0].view(-1, 784).numpy()[: len(part)]
        for level, drawn in zip(levels, made[1:], strict=True):
            level[first : first + BLOCK] = drawn.numpy()[: len(part)]
    return noisy, levels[0], levels[1]


def _noisy_column(settings: CorruptSettings) -> ImageColumn:
    if settings.dtype == "uint8":
        return ImageColumn(IMAGE, Layout.BINARY, "uint8", pa.binary(784))
    # The binary layout holds bytes alone. A list of fixed size has no offsets to store, and every reader knows it.
    return ImageColumn(IMAGE, Layout.LIST, "float32", pa.list_(pa.float32(), 784))


def _output_schema(plan: Plan, settings: CorruptSettings) -> pa.Schema:
    others = [name for name in plan.schema.names if name != plan.column.name]
    for name in others:
        # Readers such as DuckDB do not tell names apart by case.
        written = next((made for made in (IMAGE, CLEAN, SIGMA, NOISE) if made.casefold() == name.casefold()), None)
        if written is not None:
            case = "" if written == name else f" as {written!r}, and many readers do not tell them apart"
            raise ColumnError(
                f"the input has a column {name!r}, which `corrupt` writes{case}",
                hint=f"rename or drop the column {name!r}",
            )
    fields: list[pa.Field] = []
    for field in plan.schema:
        if field.name == plan.column.name:
            fields += [_noisy_column(settings).field, field.with_name(CLEAN)]
        else:
            fields.append(field)
    fields += [pa.field(SIGMA, pa.float32()), pa.field(NOISE, pa.float32())]
    origins = {name: name for name in others} | {CLEAN: plan.column.name}
    noted = with_notes(pa.schema(fields, plan.schema.metadata), origins)
    metadata = with_range(noted, _joined_range(plan), plan.rows).metadata or {}
    metadata[b"denoise_batch"] = json.dumps(
        {"command": "corrupt", "seed": settings.seed, "sigma": settings.sigma, "noise": settings.half_range}
    ).encode()
    return pa.schema(fields, metadata)


def _joined_range(plan: Plan) -> RangeIndex | None:
    """The first file's index of pandas' where it stands in the footer alone, if it is that of all rows."""
    index = range_index(plan.schema, plan.files[0].rows)
    return index if len(plan.files) == 1 or (index is not None and index.is_default) else None


def _tables(plan: Plan) -> Iterator[pa.Table]:
    """The input's rows in order, `CHUNK` at a time, wherever its files and row groups end."""
    waiting: list[pa.RecordBatch] = []
    rows = 0
    for file in plan.files:
        found = 0
        for batch in _batches(file):
            found += len(batch)
            waiting.append(batch)
            rows += len(batch)
            if rows >= CHUNK:
                table = pa.Table.from_batches(waiting)
                yield table.slice(0, CHUNK)
                waiting = table.slice(CHUNK).to_batches()
                rows -= CHUNK
        if found != file.rows:
            raise DataChanged(
                f"{storage.redact(file.path)} gave {found} rows where its footer says {file.rows}",
                hint="it is damaged, or changed while it was read: check it, then run again",
            )
    if rows:
        yield pa.Table.from_batches(waiting)


def _batches(file: PlannedFile) -> Iterator[pa.RecordBatch]:
    """A file's rows, once its page headers and its timestamps of 96 bits have been looked at; errors name the file."""
    path = file.path
    try:
        with open_parquet(path) as parquet:
            groups = range(parquet.num_row_groups)
            check_pages(path, parquet.metadata, groups)
            check_int96(path, parquet, groups)
            schema = file.widened(parquet.schema_arrow).remove_metadata()
            for batch in read_batches(parquet, BLOCK):
                yield widen(batch, schema)
    except Interrupted:  # a signal may come here as anywhere
        raise
    except DenoiseBatchError as error:
        raise ParquetError(f"{storage.redact(path)}: {error.message}", hint=error.hint or _REPAIR) from error
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        exhausted = ran_out(error, storage.redact(path)) if isinstance(error, OSError) else None
        reason = storage.without_secrets(first_line(error), path)
        raise exhausted or ParquetError(
            f"{storage.redact(path)} is not readable as Parquet: {reason}", hint=_REPAIR
        ) from error


def _write(
    path: Path,
    plan: Plan,
    schema: pa.Schema,
    recipe: NoiseRecipe,
    settings: CorruptSettings,
    progress: Callable[[int, int], None] | None,
) -> tuple[Written, int]:
    """Writes and verifies the output; also gives the number of bad rows."""
    noisy_column, clean_column = _noisy_column(settings), replace(plan.column, name=CLEAN)
    bad_rows = start = 0
    # Noise does not compress: zstd would spend its time for nothing on the floats.
    uncompressed = IMAGE if settings.dtype == "float32" else None
    images = (noisy_column, clean_column)
    with OutputFile(path, schema, images, compression="zstd", uncompressed=uncompressed) as file:
        for table in _tables(plan):
            decoded = decode(table.column(plan.column.name), clean_column)
            clean = to_model_input(decoded.pixels, Polarity.LIGHT_ON_DARK)
            noisy, sigma, half_range = degrade_rows(clean, start, settings.seed, recipe)
            missing = decoded.bad != 0
            made = {
                IMAGE: encode(noisy, missing, noisy_column),
                CLEAN: table.column(plan.column.name),
                SIGMA: pa.array(sigma, mask=missing),
                NOISE: pa.array(half_range, mask=missing),
            }
            arrays = [made[name] if name in made else table.column(name) for name in schema.names]
            # A batch for each one that was read: of several dictionaries of a column each keeps its own.
            for batch in pa.Table.from_arrays(arrays, schema=schema).to_batches():
                file.write(batch)
            bad_rows += int(missing.sum())
            start += len(table)
            if progress is not None:
                progress(start, plan.rows)
        return file.finish(), bad_rows
