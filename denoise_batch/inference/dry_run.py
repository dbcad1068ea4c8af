"""What a run would do, without doing it: the plan, how the images are read, and a guess of the time from a sample.

    print("\\n".join(dry_run(settings).lines()))

Nothing is written but a sample in the system's temporary folder, and Ray is not started.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from denoise_batch import storage
from denoise_batch.errors import DenoiseBatchError, FlagError, ResumeError
from denoise_batch.extra_columns import poor_lines
from denoise_batch.images import Polarity, Tone, levels_lines, taken_the_other_way
from denoise_batch.inference import run_folder, store_run
from denoise_batch.inference.denoise_unit import Assignment, OnBadRow, UnitOptions, denoise_unit
from denoise_batch.inference.ledger import Receipt
from denoise_batch.inference.request import InferSettings, Request, look_at
from denoise_batch.parquet.range_index import expected_fate
from denoise_batch.progress import duration
from denoise_batch.storage.listing import skipped_lines
from denoise_batch.storage.store_prefix import StorePrefix

if TYPE_CHECKING:
    from pathlib import Path

    from denoise_batch.extra_columns import Denoised
    from denoise_batch.images.layouts import ImageColumn
    from denoise_batch.inference.plan import Plan

_WARM_UP_ROWS = 2048  # two passes in integers: only the second one's memory is there already
_SAMPLE_ROWS = 8192
_START_SECONDS = 6.0
"""From the command to the first unit's begin, on two cores (docs/benchmarks.md): Ray, the actors, torch, the model."""


@dataclass(frozen=True)
class Estimate:
    """A guess, from a sample of one unit.

    Attributes:
        sampled_rows: rows that were denoised for it.
        bad_rows: of the sample, by reason.
        dark_on_light: good rows of the sample that look so.
        poor: good rows of the sample whose expected PSNR is below `POOR_PSNR`; None where the model was not asked.
        device: the sample ran on it.
        workers: actors that this machine would run.
        rate: images a second of all of them.
        seconds: of the whole run, its start included.
        output_bytes: of the data files.
    """

    sampled_rows: int
    bad_rows: dict[str, int]
    dark_on_light: int
    poor: int | None
    device: str
    workers: int
    rate: float
    seconds: float
    output_bytes: int


@dataclass(frozen=True)
class DryRun:
    """What a run would do.

    Attributes:
        columns: the input's, with their types.
        partition_keys: of the input's hive folders (`year` of `year=2024`), which are made again in the output.
        skipped_files: files in the input's folders that are left out because of their names.
        skipped: the first of them.
        types_changed: columns whose Parquet type Arrow cannot carry, and what they become.
        range_index: what is said of pandas' index where it stands in the files' footers alone, and may not be kept.
        image_column, output_column: name, layout, dtype and Arrow type.
        extra_columns: those beside it, with their types.
        complete: whether the output is there, the finished result of this very request.
        done_rows: rows that a run of this request has done already.
        replaces: whether what stands at OUT would be replaced (`--overwrite`).
        discarded_rows: rows that an unfinished run has done which would be thrown away (`--overwrite`), since it is of
            another request or damaged; None where there is none.
        would_stop: why a run would stop, if all rows are like the sample's; or an empty string.
        estimate: None where there are no rows, or the sample could not be read.
        sample_failed: why it could not.
    """

    inputs: tuple[str, ...]
    output: str
    single_file: bool
    model: str
    architecture: str
    files: int
    input_bytes: int
    skipped_files: int
    skipped: tuple[str, ...]
    rows: int
    units: int
    columns: dict[str, str]
    partition_keys: tuple[str, ...]
    types_changed: tuple[str, ...]
    range_index: str
    image_column: dict[str, str]
    polarity: str
    tone: Tone
    output_column: dict[str, str]
    extra_columns: dict[str, str]
    complete: bool
    done_rows: int
    replaces: bool
    discarded_rows: int | None
    would_stop: str
    estimate: Estimate | None
    sample_failed: str

    def to_json(self) -> dict[str, Any]:
        fields = asdict(self)
        del fields["tone"]
        return fields | {"background": None, "ink": None, "levels": None} | self.tone.facts()

    def lines(self) -> list[str]:
        image, added = self.image_column, self.output_column
        keys = [f"{_one_line_name(key)}=…" for key in self.partition_keys]
        shown = [
            f"would write {self.output}: one file" if self.single_file else f"would write {self.output}: a folder",
            f"model {self.model} ({self.architecture})",
            f"input: {self.rows:,} rows in {self.files:,} file{'s' if self.files != 1 else ''}, "
            f"{self.input_bytes / 1e6:,.1f} MB; {self.units:,} unit{'s' if self.units != 1 else ''}",
        ]
        shown += skipped_lines(self.skipped_files, self.skipped)
        shown += [
            "columns:",
            *(f"  {_one_line_name(name)}: {_one_line_kind(kind)}" for name, kind in self.columns.items()),
            *([f"partition folders, made again: {', '.join(keys)}"] if keys else []),
            *(f"note: {change}, as PyArrow carries it" for change in self.types_changed),
            *([f"note: {self.range_index}"] if self.range_index else []),
            f"images: column {image['name']!r}, {image['layout']}, {image['dtype']}, "
            + ("each image's own polarity" if self.polarity == Polarity.EACH else self.polarity),
            *self.tone.lines(),
            *levels_lines(self.tone.level_count),
            f"new column: {added['name']!r}, {added['layout']}, {added['dtype']} ({added['type']})",
            *(f"new column: {name!r} ({kind})" for name, kind in self.extra_columns.items()),
        ]
        if self.complete:
            shown.append("it is complete already: nothing would be done")
        elif self.done_rows:
            shown.append(
                f"an unfinished run of this request has done {self.done_rows:,} rows; it would be gone on with"
            )
        if self.replaces:
            shown.append("it exists, and would be replaced")
        if self.discarded_rows is not None:
            shown.append(f"an unfinished run of another request ({self.discarded_rows:,} rows done) would be discarded")
        if self.sample_failed:
            shown.append(f"the sample could not be denoised: {self.sample_failed}")
        if self.estimate is not None:
            guess = self.estimate
            bad = sum(guess.bad_rows.values())
            reasons = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in guess.bad_rows.items())
            shown += [
                f"sample: {guess.sampled_rows:,} rows, {bad:,} of them bad{f' ({reasons})' if bad else ''}",
                *([f"note: {self.would_stop}"] if self.would_stop else []),
                *taken_the_other_way(self.polarity, guess.dark_on_light, guess.sampled_rows - bad),
                *poor_lines(guess.poor, guess.sampled_rows - bad),
                f"about {duration(guess.seconds)} with {guess.workers} worker{'s' if guess.workers != 1 else ''} on "
                f"this machine ({guess.device}): {guess.rate:,.0f} images/s once started",
                f"about {guess.output_bytes / 1e6:,.1f} MB of output",
            ]
        return shown


def _one_line_name(name: str) -> str:
    """The name as it is, or as Python writes it where it holds line ends or the like, which would forge lines."""
    return name if name.isprintable() else repr(name)


def _one_line_kind(kind: str) -> str:
    """A type, in whose text names of fields stand as they are."""
    plain = " ".join(kind.split())
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in plain)


def dry_run(settings: InferSettings) -> DryRun:
    """Looks at a request as `infer` would, and tries the model on a sample.

    Raises:
        RequestError: what `infer` would refuse, all bad files named; a device that is not there.
    """
    request = look_at(settings)
    plan = request.plan()
    bundle = request.bundle_for(plan)
    added = request.output_column(plan)
    done, discarded = (plan.rows, None) if request.finished is not None else _unfinished(request)
    estimate, failed = None, ""
    if len(plan) and request.finished is None:
        try:
            estimate = _estimate(request, plan, plan.rows - done)
        except FlagError:
            raise  # the run would refuse it as well
        except DenoiseBatchError as error:
            failed = error.message
    return DryRun(
        inputs=tuple(storage.redact(given) for given in settings.inputs),
        output=str(request.out),
        single_file=request.single,
        model=str(bundle.folder),
        architecture=bundle.architecture,
        files=len(plan.files),
        input_bytes=sum(file.size for file in plan.files),
        skipped_files=len(request.listing.skipped),
        skipped=request.listing.skipped_shown,
        rows=plan.rows,
        units=len(plan),
        columns={field.name: str(field.type) for field in plan.schema},
        partition_keys=tuple(request.listing.keys),  # one file cannot keep them, and is refused
        types_changed=plan.changes,
        range_index=expected_fate(plan, single=request.single, whole=settings.on_bad_row is not OnBadRow.QUARANTINE),
        image_column=_described(plan.column),
        polarity=plan.polarity.value,
        tone=plan.tone,
        output_column=_described(added),
        extra_columns={field.name: str(field.type) for field in settings.extras.fields(added.name)},
        complete=request.finished is not None,
        done_rows=done,
        replaces=settings.overwrite and _stands_there(request.out),
        discarded_rows=discarded,
        would_stop="" if estimate is None else _would_stop(settings, estimate),
        estimate=estimate,
        sample_failed=failed,
    )


def _unfinished(request: Request) -> tuple[int, int | None]:
    """Rows that an unfinished run has done which would be gone on with, and which would be discarded.

    Raises:
        ResumeError: the unfinished run is of another request, and there is no `--overwrite`.
    """
    files, identity, overwrite = request.listing.files, request.identity, request.settings.overwrite
    try:
        if isinstance(request.out, StorePrefix):
            found = store_run.rows_done(request.out, files, identity, overwrite=overwrite)
        else:
            found = run_folder.rows_done(request.out, files, identity, overwrite=overwrite)
    except ResumeError:
        if not overwrite:
            raise
        found = 0, False  # its ledger is damaged
    if found is None:
        return 0, None
    done, ours = found
    return (done, None) if ours else (0, done)


def _stands_there(out: Path | StorePrefix) -> bool:
    return store_run.stands_there(out) if isinstance(out, StorePrefix) else os.path.lexists(out)


def _would_stop(settings: InferSettings, sample: Estimate) -> str:
    bad, rows = sum(sample.bad_rows.values()), sample.sampled_rows
    if bad and settings.on_bad_row is OnBadRow.FAIL:
        return "the run would stop at the first bad row: --on-bad-row fail"
    if bad > settings.max_bad * rows:
        return (
            f"the run would stop: {bad / rows:.2%} of the sample are bad, --max-bad {settings.max_bad:g} allows fewer"
        )
    return ""


def _described(column: ImageColumn) -> dict[str, str]:
    return {
        "name": column.name,
        "layout": column.layout.value,
        "dtype": column.dtype,
        "type": str(column.type),
    }


def _estimate(request: Request, plan: Plan, rows: int) -> Estimate:
    """Denoises the first rows of the middle unit's row group as one actor would, and scales up.

    Raises:
        DenoiseBatchError: the sample cannot be denoised.
    """
    import torch

    from denoise_batch.cluster.capacity import Node
    from denoise_batch.denoiser import Denoiser
    from denoise_batch.inference.pool_size import pool_size
    from denoise_batch.process.cores import cores_here

    settings = request.settings
    cores = cores_here()
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpu_gib = torch.cuda.get_device_properties(0).total_memory / 2**30 if gpus else 0.0
    here, share = Node(cores, gpus, gpu_gib), settings.gpus_per_worker
    size = pool_size([here], settings.workers, settings.device, len(plan), gpu_share=share)
    device = settings.device if size.gpus else "cpu"
    denoiser = Denoiser(
        request.bundle_for(plan),
        device=device,
        threads=size.threads,
        batch=settings.batch_size,
        precision=settings.precision,
    )
    unit = plan.unit(len(plan) // 2)
    on_bad_row = OnBadRow.NULL if settings.on_bad_row is OnBadRow.FAIL else settings.on_bad_row
    with tempfile.TemporaryDirectory(prefix="denoise-batch-") as folder:
        options = UnitOptions(
            folder,
            plan.column,
            request.output_column(plan),
            plan.polarity,
            on_bad_row,
            settings.compression,
            settings.extras,
            plan.tone,
        )

        def forward(pixels: Any, polarity: Polarity, dtype: str) -> Denoised:
            return denoiser.denoise(pixels, polarity, dtype, settings.extras)

        def denoise(name: str, most: int) -> Receipt:
            # From its row group's first row on: a few rows would bear what a whole unit takes to read past others.
            part = replace(unit, skip=0, start=unit.start - unit.skip, rows=min(unit.rows, most))
            result = denoise_unit(Assignment(part, plan.files[unit.file], 1, name), options, forward)
            if isinstance(result, Receipt):
                return result
            raise DenoiseBatchError(f"{storage.redact(plan.files[unit.file].path)}: {result.reason}", hint="")

        denoise("warm-up.parquet", _WARM_UP_ROWS)
        receipt = denoise("sample.parquet", _SAMPLE_ROWS)
    rate = receipt.rows_in / max(receipt.seconds["total"], 1e-3) * size.actors
    return Estimate(
        sampled_rows=receipt.rows_in,
        bad_rows=receipt.bad,
        dark_on_light=receipt.dark_on_light,
        poor=receipt.poor if settings.extras.quality else None,
        device=str(denoiser.device),
        workers=size.actors,
        rate=round(rate, 1),
        seconds=round(_START_SECONDS + rows / rate, 1),
        output_bytes=round(receipt.bytes / receipt.rows_in * plan.rows),
    )
