"""One unit of work: read → decode → forward → encode → write → verify, reading and writing in threads of their own.

Runs inside a worker and knows nothing of Ray. Memory is bounded by bytes in flight: a few chunks of rows between
the stages and one row group in the writer, whatever the input's row groups are.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from denoise_batch import storage
from denoise_batch.errors import DataChanged, DenoiseBatchError, JobFailed, ResourceExhausted, first_line, ran_out
from denoise_batch.extra_columns import NO_EXTRAS, ExtraColumns
from denoise_batch.images import WHITE_AND_BLACK, BadReason, Polarity, Tone, dark_on_light, decode, encode, turned
from denoise_batch.inference.ledger import Failure, Receipt
from denoise_batch.inference.output_schema import output_schema
from denoise_batch.inference.unit_rows import chunk_rows, prefetched, read_unit
from denoise_batch.parquet.input_file import full_schema, open_parquet
from denoise_batch.parquet.output_file import OutputFile, Written, file_digest
from denoise_batch.parquet.range_index import of_some_rows, range_index, with_range
from denoise_batch.parquet.row_groups import Part, join_row_groups
from denoise_batch.parquet.type_changes import widen
from denoise_batch.storage import publishing
from denoise_batch.storage.listing import stat_input
from denoise_batch.storage.store_prefix import StorePrefix

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from denoise_batch.forward import Forward
    from denoise_batch.images.layouts import ImageColumn
    from denoise_batch.inference.plan import PlannedFile, Unit

_STAGES = ("read", "decode", "forward", "encode", "write", "verify")


class OnBadRow(StrEnum):
    """What becomes of a row whose image cannot be used."""

    NULL = "null"
    QUARANTINE = "quarantine"
    FAIL = "fail"


@dataclass(frozen=True)
class UnitOptions:
    """What every unit of a run has in common.

    Attributes:
        staging: folder for finished files, seen by driver and workers, or a URI in an object store.
        column: the input's image column.
        output: the column to add.
        compression: of the output's pages.
        extras: columns to add beside the image.
        tone: of the set: the model is shown white paper and full ink.
    """

    staging: str
    column: ImageColumn
    output: ImageColumn
    polarity: Polarity
    on_bad_row: OnBadRow
    compression: str
    extras: ExtraColumns = NO_EXTRAS
    tone: Tone = WHITE_AND_BLACK

    @property
    def pixel_dtypes(self) -> tuple[str, str]:
        """Of the pixels that the model takes and is to give; float16 and float64 become float32, and are made of it."""
        taken, given = ("uint8" if column.dtype == "uint8" else "float32" for column in (self.column, self.output))
        return taken, given

    @property
    def model_polarity(self) -> Polarity:
        """Of the pixels that the model takes and gives: images of both are turned before and after."""
        return Polarity.LIGHT_ON_DARK if self.polarity is Polarity.EACH else self.polarity


@dataclass(frozen=True)
class Assignment:
    """One attempt at one unit.

    Attributes:
        name: of the staged file, unlike that of any other attempt ever made.
    """

    unit: Unit
    file: PlannedFile
    attempt: int
    name: str


def denoise_unit(
    assignment: Assignment,
    options: UnitOptions,
    forward: Forward,
    fingerprint: str | Callable[[], str] = "",
    on_rows: Callable[[int], None] = lambda _: None,
) -> Receipt | Failure:
    """Makes one unit's output file, or says why not; never raises for what data, files or disks do.

    Args:
        forward: the model, which gives what the extra columns need as well.
        fingerprint: goes into the receipt; asked for at the end, where `forward` may change it.
        on_rows: told the rows denoised so far, now and then.
    """
    try:
        if storage.is_uri(options.staging):
            return _denoise_for_store(assignment, options, forward, fingerprint, on_rows)
        return _denoise(assignment, options, forward, fingerprint, on_rows)
    except (DataChanged, JobFailed, ResourceExhausted) as error:
        return _failure(assignment, error.message, error)
    except DenoiseBatchError as error:
        return _failure(assignment, error.message)
    except OSError as error:
        exhausted = ran_out(error, tempfile.gettempdir() if storage.is_uri(options.staging) else options.staging)
        if exhausted is None:
            return _failure(assignment, _one_line(error))
        # Nobody will count it; the driver may need the room to note the failure.
        if not storage.is_uri(options.staging):
            Path(options.staging, assignment.name).unlink(missing_ok=True)
        return _failure(assignment, exhausted.message, exhausted)
    except Exception as error:  # foreign files can raise anything; the attempt is charged and named
        failure = _failure(assignment, _one_line(error))
        return replace(failure, kind=ResourceExhausted.__name__) if _is_short_of_memory(error) else failure


def _failure(assignment: Assignment, reason: str, stops: DenoiseBatchError | None = None) -> Failure:
    return Failure(
        assignment.unit.index,
        assignment.attempt,
        storage.without_secrets(reason, assignment.file.path),
        final=stops is not None,
        kind=type(stops).__name__ if stops else "",
        hint=stops.hint if stops else "",
    )


def _one_line(error: BaseException) -> str:
    said, kind = first_line(error), type(error).__name__
    return kind if said == kind else f"{said} ({kind})"


def _is_short_of_memory(error: Exception) -> bool:
    # torch's allocator on a CPU raises no class of its own.
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))


def _denoise_for_store(
    assignment: Assignment,
    options: UnitOptions,
    forward: Forward,
    fingerprint: str | Callable[[], str],
    on_rows: Callable[[int], None],
) -> Receipt:
    """Makes and verifies the files on this machine, then uploads them: the receipt comes after they are there."""
    store = StorePrefix.at(options.staging)
    with tempfile.TemporaryDirectory(prefix="denoise-batch-") as folder:
        receipt = _denoise(assignment, replace(options, staging=folder), forward, fingerprint, on_rows)
        begun = time.monotonic()
        for name in receipt.staged:
            store.put(name, Path(folder, name))
        seconds = round(time.monotonic() - begun, 3)
    total = round(receipt.seconds["total"] + seconds, 3)
    return replace(receipt, seconds=receipt.seconds | {"upload": seconds, "total": total})


def _denoise(
    assignment: Assignment,
    options: UnitOptions,
    forward: Forward,
    fingerprint: str | Callable[[], str],
    on_rows: Callable[[int], None],
) -> Receipt:
    unit, started = assignment.unit, time.monotonic()
    clock = dict.fromkeys(_STAGES, 0.0)
    _check_unchanged(assignment.file)
    bad_rows: list[int] = []
    bad_codes: list[int] = []
    target = Path(options.staging, assignment.name)
    with open_parquet(assignment.file.path) as source:
        added = (options.output.field, *options.extras.fields(options.output.name))
        given = assignment.file.widened(full_schema(source))
        schema = output_schema(given, *added, image=options.column.name)
        schema = of_some_rows(schema, unit.start, unit.rows, assignment.file.rows)
        rows = chunk_rows(assignment.file.row_bytes)
        images = (options.column, options.output)
        with (
            OutputFile(target, schema, images, compression=options.compression) as file,
            _Quarantine(target, with_range(given, None, 0), options) as quarantine,
            ThreadPoolExecutor(1) as pool,  # left first, so that nothing writes any more when the file is given up
        ):

            def write(batch: pa.RecordBatch, numbers: Any) -> None:
                with _timed(clock, "write"):
                    file.write(batch, numbers)

            writing: deque[Future[None]] = deque()
            done = light = poor = 0
            batches = read_unit(source, unit, rows, assignment.file.path)
            if assignment.file.schema:
                batches = (widen(batch, given) for batch in batches)
            for batch in prefetched(batches, clock, "read"):
                columns, codes, light_here, poor_here = _denoise_batch(batch, options, forward, clock)
                found = np.flatnonzero(codes)
                light, poor = light + light_here, poor + poor_here
                out = pa.RecordBatch.from_arrays([*batch.columns, *columns], schema=schema)
                kept = None
                if len(found):
                    bad_rows += (unit.start + done + found).tolist()
                    bad_codes += codes[found].tolist()
                    if options.on_bad_row is OnBadRow.FAIL:
                        raise _bad_row(assignment, bad_rows[0], bad_codes[0])
                    if options.on_bad_row is OnBadRow.QUARANTINE:
                        kept = np.flatnonzero(codes == 0)
                        quarantine.write(batch, found)
                done += batch.num_rows
                on_rows(done)
                writing.append(pool.submit(write, out, kept))
                while len(writing) > 1:
                    writing.popleft().result()
            for future in writing:
                future.result()
            with _timed(clock, "verify"):
                written, aside = file.finish(), quarantine.finish()
                if aside is not None:
                    written = _without_range(target, written, schema, unit.rows)
    _check_unchanged(assignment.file)
    set_aside = aside.rows if aside else 0
    if done != unit.rows or written.rows + set_aside != unit.rows:
        raise DenoiseBatchError(
            f"{unit.rows} rows were planned, {done} read, {written.rows} written, {set_aside} set aside", hint=""
        )
    reasons, counts = np.unique(np.array(bad_codes, np.uint8), return_counts=True)
    listed = _write_bad_rows(target, bad_rows, bad_codes) if bad_rows else None
    return Receipt(
        unit=unit.index,
        attempt=assignment.attempt,
        file=assignment.name,
        rows_in=done,
        rows_out=written.rows,
        bytes=written.bytes,
        digest=written.digest,
        bad={BadReason.from_code(int(r)).value: int(c) for r, c in zip(reasons, counts, strict=True)},
        bad_file=listed.name if listed else "",
        bad_bytes=listed.stat().st_size if listed else 0,
        bad_digest=file_digest(listed) if listed else "",
        quarantine_file=quarantine.path.name if aside else "",
        quarantine_bytes=aside.bytes if aside else 0,
        quarantine_digest=aside.digest if aside else "",
        seconds={stage: round(s, 3) for stage, s in clock.items()} | {"total": round(time.monotonic() - started, 3)},
        fingerprint=fingerprint if isinstance(fingerprint, str) else fingerprint(),
        dark_on_light=light,
        poor=poor,
    )


def _without_range(path: Path, written: Written, schema: pa.Schema, rows: int) -> Written:
    """The finished file without a range of so many numbers for its index, once it is known that rows are missing."""
    index = range_index(schema, rows)
    if index is None or index.is_default:
        return written
    kept = path.with_suffix(".kept.parquet")
    written = join_row_groups([Part(path, written.digest)], kept, with_range(schema, None, 0))
    kept.replace(path)
    return written


def _denoise_batch(
    batch: pa.RecordBatch, options: UnitOptions, forward: Forward, clock: dict[str, float]
) -> tuple[list[pa.Array], Any, int, int]:
    """The batch's new columns, the code of every row's fault, how many good rows are dark on light, and how many of
    them are poor."""
    each = options.polarity is Polarity.EACH
    with _timed(clock, "decode"):
        decoded = decode(batch.column(options.column.name), options.column)
        light = dark_on_light(decoded.pixels) & (decoded.bad == 0)
        pixels = turned(decoded.pixels, light) if each else decoded.pixels
        pixels, ink = options.tone.even(pixels, options.model_polarity)
    with _timed(clock, "forward"):
        denoised = forward(pixels, options.model_polarity, options.pixel_dtypes[1])
    with _timed(clock, "encode"):
        if ink is not None:
            denoised = denoised.in_ink(ink, options.model_polarity)
        shown = turned(denoised.pixels, light) if each else denoised.pixels
        column = encode(shown, decoded.bad, options.output)
        columns = [column, *options.extras.arrays(denoised, decoded.bad)]
        return columns, decoded.bad, int(light.sum()), options.extras.poor(denoised, decoded.bad)


@contextlib.contextmanager
def _timed(clock: dict[str, float], stage: str) -> Iterator[None]:
    begun = time.monotonic()
    yield
    clock[stage] += time.monotonic() - begun


class _Quarantine:
    """The file of rows that are set aside, as they were; begun with the first of them."""

    def __init__(self, target: Path, schema: pa.Schema, options: UnitOptions) -> None:
        self.path = target.with_suffix(".quarantine.parquet")
        self._schema, self._options = schema, options
        self._file: OutputFile | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> _Quarantine:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def write(self, batch: pa.RecordBatch, rows: Any) -> None:
        if self._file is None:
            images, compression = (self._options.column,), self._options.compression
            self._file = self._stack.enter_context(OutputFile(self.path, self._schema, images, compression=compression))
        self._file.write(batch, rows)

    def finish(self) -> Written | None:
        return self._file.finish() if self._file else None


def _bad_row(assignment: Assignment, row: int, code: int) -> JobFailed:
    reason = BadReason.from_code(code).value.replace("_", " ")
    return JobFailed(
        f"{storage.redact(assignment.file.path)}: row {row} is bad: {reason}",
        hint="to keep or set aside bad rows give --on-bad-row null or quarantine, and --overwrite to begin again",
    )


def _write_bad_rows(target: Path, rows: list[int], codes: list[int]) -> Path:
    path = target.with_suffix(".bad.parquet")
    reasons = pa.array([BadReason.from_code(code).value for code in codes])
    pq.write_table(pa.table({"row": pa.array(rows, pa.int64()), "reason": reasons}), path, write_page_checksum=True)
    publishing.sync(path)
    return path


def _check_unchanged(file: PlannedFile) -> None:
    size, mtime_ns = stat_input(file.path)
    if (size, mtime_ns) != (file.size, file.mtime_ns):
        raise DataChanged(
            f"{storage.redact(file.path)} changed since the run was planned",
            hint="nothing was published; run again with --overwrite to start afresh",
        )
