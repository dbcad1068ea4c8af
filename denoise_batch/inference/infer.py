"""The main job: every input row is in the output exactly once, unchanged but for the added column, or is set aside.

    report = infer(InferSettings(inputs=("in.parquet",), output="out.parquet"))

Plan (`plan`) → units → Ray Data feeds them in waves to actors (`unit_pool`), which write staged files and give back
receipts → the driver commits each receipt to the ledger → when all are there, the result is put together and shown
by one rename. Run it again after any crash: what is committed is not done again.
"""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from denoise_batch import errors, storage
from denoise_batch.bundle import Bundle, find_bundle
from denoise_batch.cluster import connect, refuse_unsafe_switches
from denoise_batch.errors import FlagError, JobFailed, ResourceExhausted
from denoise_batch.images import Polarity
from denoise_batch.images.layouts import ImageColumn, Layout, output_column
from denoise_batch.inference import manifest
from denoise_batch.inference.denoise_unit import Assignment, OnBadRow, UnitOptions
from denoise_batch.inference.ledger import Failure, Receipt
from denoise_batch.inference.plan import make_plan
from denoise_batch.inference.run_folder import DATA, RunFolder, check_output, open_run, work_folder
from denoise_batch.inference.unit_pool import ModelToLoad, cores_of_a_node, living_nodes, pool_size, process_units

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from denoise_batch.inference.plan import Plan

WAVE = 10_000
"""Units given to Ray Data at a time: each costs the driver an object, so Ray never holds more than a wave."""

ATTEMPTS = 3
ASSIGNMENTS = 10
"""Most times a unit is given out in one session: one that takes its whole node along would come back for ever."""

COMPRESSIONS = ("zstd", "lz4", "snappy", "none")
_NAMED_AT_MOST = 10


class OutputShape(StrEnum):
    """What OUT is."""

    AUTO = "auto"
    """As the input: one file in, one file out; anything else, a folder."""
    DIRECTORY = "directory"
    SINGLE_FILE = "single-file"


@dataclass(frozen=True)
class InferSettings:
    """A request. Result options change the output and belong to the run's identity; run options may change on resume.

    Attributes:
        inputs: files, folders, globs or URIs.
        output: the file or folder to make.
        model: a model folder; None takes ./denoise-model, else the one that ships.
        column, output_column, layout, dtype, polarity, on_bad_row, shape, compression: result options.
        max_bad: share of all rows, 0..1, that may be bad.
        overwrite: replace OUT, and discard an unfinished run of another request.
        workers: actors; None is one for each GPU, else one for each CPU core.
        device: `auto`, `cpu` or `cuda`.
        batch_size: images a forward pass; None suits the device.
        address: a Ray cluster.
    """

    inputs: tuple[str, ...]
    output: str
    model: Path | None = None
    column: str | None = None
    output_column: str = "denoised"
    layout: Layout | None = None
    dtype: str | None = None
    polarity: Polarity = Polarity.AUTO
    on_bad_row: OnBadRow = OnBadRow.NULL
    shape: OutputShape = OutputShape.AUTO
    compression: str = "zstd"
    max_bad: float = 0.01
    overwrite: bool = False
    workers: int | None = None
    device: str = "auto"
    batch_size: int | None = None
    address: str | None = None


@dataclass(frozen=True)
class InferProgress:
    """How far a run is.

    Attributes:
        phase: `starting`, `denoising` or `publishing`.
        rows: rows done, those of earlier sessions included.
        rate: rows a second of this session, since its first receipt was under way.
        seconds_left: None while unknown.
    """

    phase: str
    units: int
    total_units: int
    rows: int
    total_rows: int
    bad_rows: int
    rate: float = 0.0
    seconds_left: float | None = None


@dataclass(frozen=True)
class InferReport:
    """What was done.

    Attributes:
        rows_in, rows_out, bad_rows: of the whole output, earlier sessions included.
        seconds: wall time of this session; `denoising` runs from the first unit's start to the last receipt.
        rows_done: rows denoised in this session.
        stages: seconds of worker time by stage, over all units.
    """

    output: str
    model: str
    model_sha256: str
    column: str
    polarity: str
    files: int
    units: int
    rows_in: int
    rows_out: int
    bad_rows: dict[str, int]
    resumed_units: int
    failed_attempts: int
    rows_done: int
    seconds: float
    denoising_seconds: float
    rate: float
    stages: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def summary_lines(self) -> list[str]:
        bad = sum(self.bad_rows.values())
        reasons = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in self.bad_rows.items())
        lines = [
            f"{self.output}: {self.rows_out:,} rows from {self.files:,} file{'s' if self.files != 1 else ''}",
            f"model {self.model}",
            f"column {self.column!r}, {self.polarity}",
            f"{self.rows_done:,} rows in {self.seconds:.1f} s, {self.rate:,.0f} images/s once started",
        ]
        if bad:
            lines.append(f"{bad:,} bad rows ({reasons}), listed in {manifest.BAD_ROWS} beside the manifest")
        if self.resumed_units:
            lines.append(f"{self.resumed_units:,} of {self.units:,} units were done by an earlier run")
        return lines


def infer(
    settings: InferSettings,
    progress: Callable[[InferProgress], None] = lambda _: None,
    *,
    verbose: bool = False,
) -> InferReport:
    """Denoises a Parquet file or dataset.

    Everything that the request can be refused for is found before torch or Ray load.

    Raises:
        RequestError: the request cannot be met.
        JobFailed: units failed three times each, or too many rows are bad; what is done is kept for the next run.
        DataChanged, ResourceExhausted, Interrupted: as they say; what is done is kept.
    """
    started = time.monotonic()
    _check(settings)
    refuse_unsafe_switches()
    bundle = find_bundle(settings.model)
    listing = storage.list_inputs(settings.inputs)
    out = check_output(settings.output, listing, overwrite=settings.overwrite)
    single = settings.shape is OutputShape.SINGLE_FILE or (settings.shape is OutputShape.AUTO and listing.single_file)
    identity = {
        "model_sha256": bundle.sha256,
        "architecture": bundle.architecture,
        "column": settings.column,
        "output_column": settings.output_column,
        "layout": settings.layout.value if settings.layout else None,
        "dtype": settings.dtype,
        "polarity": settings.polarity.value,
        "on_bad_row": settings.on_bad_row.value,
        "single_file": single,
        "compression": settings.compression,
    }

    def plan_it() -> Plan:
        plan = make_plan(listing.files, settings.column, settings.polarity, settings.output_column)
        output_column(plan.column, settings.output_column, settings.layout, settings.dtype)  # refuses what does not fit
        return plan

    with open_run(out, listing.files, identity, plan_it, overwrite=settings.overwrite) as run:
        output = output_column(run.plan.column, settings.output_column, settings.layout, settings.dtype)
        job = _Job(run, settings, bundle, output, progress, verbose)
        if len(run.ledger.receipts) < len(run.plan):
            job.run_units()
        return job.publish(started, single=single)


def resume_hint(output: str) -> str | None:
    """How far the unfinished run at `output` is, for the line printed after an interruption; None if there is none."""
    from pathlib import Path

    folder = work_folder(Path(output).absolute())
    return str(folder) if (folder / "identity.json").exists() else None


def _check(settings: InferSettings) -> None:
    for flag, value, low in (("--workers", settings.workers, 1), ("--batch-size", settings.batch_size, 1)):
        if value is not None and value < low:
            raise FlagError(f"{flag} {value} is impossible", hint=f"give {low} or more")
    if not 0.0 <= settings.max_bad <= 1.0:
        raise FlagError(f"--max-bad {settings.max_bad:g} is not a share of the rows", hint="give a number from 0 to 1")
    if settings.compression not in COMPRESSIONS:
        raise FlagError(
            f"--compression {settings.compression!r} is unknown", hint=f"there are: {', '.join(COMPRESSIONS)}"
        )
    if settings.device not in {"auto", "cpu", "cuda"}:
        raise FlagError(f"--device {settings.device!r} is unknown", hint="there are: auto, cpu, cuda")
    if not settings.output_column:
        raise FlagError("--output-column is empty", hint="give the new column a name")
    if not settings.inputs:
        raise FlagError("no input was given", hint="name a Parquet file, a folder or a glob")


class _Job:
    """One session of a run: feeds units to Ray, commits receipts, keeps the accounts."""

    def __init__(
        self,
        run: RunFolder,
        settings: InferSettings,
        bundle: Bundle,
        output: ImageColumn,
        progress: Callable[[InferProgress], None],
        verbose: bool,
    ) -> None:
        self.run, self.settings, self.bundle, self.output = run, settings, bundle, output
        self.progress, self.verbose = progress, verbose
        self.resumed = len(run.ledger.receipts)
        self.rows_before = run.ledger.rows_in
        self.rows_done = self.rows_before
        self.bad = sum(run.ledger.bad_rows().values())
        self.attempts: dict[int, int] = {}
        self.assigned: dict[int, int] = {}
        self.failed_attempts = 0
        self.first_start: float | None = None
        self.last_receipt = 0.0

    def run_units(self) -> None:
        """Works on what is not committed, until all is or each of the rest has failed three times.

        Raises:
            JobFailed: naming the units that failed.
        """
        self._report("starting")
        self._check_bad()
        with connect(address=self.settings.address, verbose=self.verbose) as resources:
            while pending := self._pending():
                self._run_wave(pending[:WAVE], resources)
        failed = sorted(set(range(len(self.run.plan))) - self.run.ledger.receipts.keys())
        if failed:
            named = "; ".join(self._name_failure(unit) for unit in failed[:_NAMED_AT_MOST])
            more = f"; and {len(failed) - _NAMED_AT_MOST} more" if len(failed) > _NAMED_AT_MOST else ""
            raise JobFailed(
                f"{len(failed)} of {len(self.run.plan)} units failed: {named}{more}",
                hint="the others are done and kept; run the same command again to try only these",
            )

    def publish(self, started: float, *, single: bool) -> InferReport:
        """Reconciles rows, puts the result together and shows it."""
        self._report("publishing")
        self._check_bad()
        run, compression = self.run, self.settings.compression
        manifest.reconcile(run)
        report = self._make_report(started)
        with _named_resources(run.folder):
            if single:
                merged = self._merge() if len(run.plan) > 1 else None
                data, described = manifest.build_file(run, self.output, compression, report.to_json(), merged)
                # The description first: while it stands alone there is no output, and the next run replaces it.
                storage.publish(described, manifest.file_sidecar(run.out), overwrite=True)
                storage.publish(data, run.out, overwrite=self.settings.overwrite)
            else:
                built = manifest.build_folder(run, self.output, compression, report.to_json())
                storage.publish(built, run.out, overwrite=self.settings.overwrite)
                storage.remove(manifest.file_sidecar(run.out))  # of a single file that stood here before
        run.discard()
        return report

    def _merge(self) -> Any:
        """In a process of its own: its memory goes back to the system, and a crash is an error with a name."""
        run = self.run
        parts = [run.staging / run.ledger.receipts[unit].file for unit in range(len(run.plan))]
        run.built.mkdir(exist_ok=True)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            try:
                return pool.submit(
                    manifest.merge, parts, run.built / DATA, run.plan.column, self.output, self.settings.compression
                ).result()
            except (KeyboardInterrupt, Exception) as error:
                for child in list(pool._processes.values()):
                    child.kill()  # else leaving the block waits for the whole merge
                if not isinstance(error, BrokenProcessPool):
                    raise
                raise JobFailed(
                    f"{run.out}: the process that joins the parts into one file died",
                    hint="run the same command again, or give --directory, which needs no joining",
                ) from error

    def _pending(self) -> list[int]:
        committed = self.run.ledger.receipts
        return [
            unit
            for unit in range(len(self.run.plan))
            if unit not in committed
            and self.attempts.get(unit, 0) < ATTEMPTS
            and self.assigned.get(unit, 0) < ASSIGNMENTS
        ]

    def _run_wave(self, wave: list[int], resources: dict[str, Any]) -> None:
        settings, run = self.settings, self.run
        nodes = living_nodes()
        answered: set[int] = set()
        options = UnitOptions(
            str(run.staging),
            run.plan.column,
            self.output,
            run.plan.polarity,
            settings.on_bad_row,
            settings.compression,
        )
        size = pool_size(resources, settings.workers, settings.device, len(self.run.plan), cores_of_a_node())
        device = settings.device if size.gpus else "cpu"
        model = ModelToLoad(str(self.bundle.folder.absolute()), self.bundle.sha256, settings.batch_size, device)
        for answer in process_units([self._assign(unit) for unit in wave], options, model, size, verbose=self.verbose):
            answered.add(answer.unit)
            if isinstance(answer, Receipt):
                self._commit(answer)
            else:
                self._fail(answer)
        # A unit without an answer took its worker down with it. Where a node went, the units were not to blame.
        if nodes <= living_nodes():
            for unit in wave:
                if unit not in answered:
                    reason = "its worker died without a word (killed, or out of memory)"
                    self._fail(Failure(unit, self.attempts.get(unit, 0) + 1, reason))

    def _assign(self, index: int) -> Assignment:
        plan, unit = self.run.plan, self.run.plan.unit(index)
        attempt = self.attempts.get(index, 0) + 1
        # Session and assignment (attempts that a lost node took along count too) keep this file apart from what any
        # orphan may still write.
        self.assigned[index] = self.assigned.get(index, 0) + 1
        name = f"unit-{index:07d}.s{self.run.ledger.session:04d}.a{self.assigned[index]}.parquet"
        return Assignment(unit, plan.files[unit.file], attempt, name)

    def _commit(self, receipt: Receipt) -> None:
        if receipt.unit in self.run.ledger.receipts:
            return  # a second answer for a unit can only be a stray; its file is never named
        self.run.ledger.commit(receipt)
        self.rows_done += receipt.rows_in
        self.bad += sum(receipt.bad.values())
        self.last_receipt = time.monotonic()
        begun = self.last_receipt - receipt.seconds["total"]
        self.first_start = begun if self.first_start is None else min(self.first_start, begun)
        self._check_bad()
        self._report("denoising")

    def _fail(self, failure: Failure) -> None:
        self.run.ledger.fail(failure)
        self.attempts[failure.unit] = self.attempts.get(failure.unit, 0) + 1
        self.failed_attempts += 1
        if failure.final:
            raise getattr(errors, failure.kind)(failure.reason, hint=failure.hint)

    def _check_bad(self) -> None:
        allowed = self.settings.max_bad * self.run.plan.rows
        if self.bad > allowed:
            reasons = ", ".join(f"{count:,} {r.replace('_', ' ')}" for r, count in self.run.ledger.bad_rows().items())
            raise JobFailed(
                f"{self.bad:,} of {self.run.plan.rows:,} rows are bad so far ({reasons}), "
                f"more than --max-bad {self.settings.max_bad:g} allows",
                hint="look at the input, or run again with a larger --max-bad: what is done is kept",
            )

    def _name_failure(self, index: int) -> str:
        unit = self.run.plan.unit(index)
        path = storage.redact(self.run.plan.files[unit.file].path)
        failures = self.run.ledger.failures.get(index)
        reason = failures[-1].reason if failures else "every node that worked on it was lost"
        return f"unit {index} ({path}, rows {unit.start}–{unit.start + unit.rows - 1}): {reason}"

    def _report(self, phase: str) -> None:
        done = self.rows_done - self.rows_before
        elapsed = self.last_receipt - (self.first_start or 0.0)
        rate = done / elapsed if done and elapsed > 0 else 0.0
        left = (self.run.plan.rows - self.rows_done) / rate if rate else None
        self.progress(
            InferProgress(
                phase,
                len(self.run.ledger.receipts),
                len(self.run.plan),
                self.rows_done,
                self.run.plan.rows,
                self.bad,
                rate,
                left,
            )
        )

    def _make_report(self, started: float) -> InferReport:
        run, stages = self.run, dict[str, float]()
        for receipt in run.ledger.receipts.values():
            for stage, seconds in receipt.seconds.items():
                stages[stage] = round(stages.get(stage, 0.0) + seconds, 3)
        denoising = self.last_receipt - self.first_start if self.first_start is not None else 0.0
        done = self.rows_done - self.rows_before
        return InferReport(
            output=str(run.out),
            model=str(self.bundle.folder),
            model_sha256=self.bundle.sha256,
            column=run.plan.column.name,
            polarity=run.plan.polarity.value,
            files=len(run.plan.files),
            units=len(run.plan),
            rows_in=run.plan.rows,
            rows_out=run.ledger.rows_out,
            bad_rows=run.ledger.bad_rows(),
            resumed_units=self.resumed,
            failed_attempts=self.failed_attempts,
            rows_done=done,
            seconds=round(time.monotonic() - started, 3),
            denoising_seconds=round(denoising, 3),
            rate=round(done / denoising, 1) if denoising > 0 else 0.0,
            stages=stages,
        )


@contextlib.contextmanager
def _named_resources(folder: Path) -> Iterator[None]:
    """Turns what a full or read-only disk raises in the driver into an error that says so."""
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}:
            raise
        raise ResourceExhausted(
            f"{folder}: {error.strerror or error}", hint="make room, then run the same command again to go on"
        ) from error
