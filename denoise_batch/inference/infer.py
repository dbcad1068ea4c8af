"""The main job: every input row is in the output exactly once, unchanged but for the added column, or is set aside.

    report = infer(InferSettings(inputs=("in.parquet",), output="out.parquet"))

Request (`request`) → plan (`plan`) → units → Ray Data feeds them in waves to actors (`unit_pool`), which write staged
files and give back receipts → the driver commits each receipt to the ledger → when all are there, the result is put
together (`assembly`) and shown by one rename. Run it again after any crash: what is committed is not done again.
"""

from __future__ import annotations

import contextlib
import errno
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from denoise_batch import errors, storage
from denoise_batch.cluster import capacity, connect, full_ray_disk, ray_disk_is_full
from denoise_batch.cluster.shared_files import check_seen_by_nodes
from denoise_batch.errors import JobFailed, RequestError, ResourceExhausted
from denoise_batch.inference import assembly, store_publishing
from denoise_batch.inference.denoise_unit import Assignment, UnitOptions
from denoise_batch.inference.ledger import Failure, Receipt
from denoise_batch.inference.manifest import remove_former_sidecar
from denoise_batch.inference.merging import merge
from denoise_batch.inference.pool_size import PoolSize, pool_size
from denoise_batch.inference.report import InferProgress, InferReport
from denoise_batch.inference.request import InferSettings, OutputShape, Request, look_at
from denoise_batch.inference.run_folder import RunFolder, check_ours, open_run
from denoise_batch.inference.store_run import STAGING, StoreRun, open_store_run
from denoise_batch.inference.unit_pool import ModelToLoad, process_units
from denoise_batch.inference.worker_watch import Working
from denoise_batch.storage import publishing
from denoise_batch.storage.store_prefix import StorePrefix

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["InferProgress", "InferReport", "InferSettings", "OutputShape", "infer"]

WAVE = 10_000
"""Units given to Ray Data at a time: each costs the driver an object, so Ray never holds more than a wave."""

ATTEMPTS = 3
ASSIGNMENTS = 10
"""Most times a unit is given out in one session: one that takes its whole node along would come back for ever."""

NODE_LOSS_SECONDS = 20.0
"""How long Ray may take to notice that one of several nodes is gone, before a unit without an answer is charged."""

OUT_OF_MEMORY = 6
"""Attempts that run out of memory before the session's first receipt, before it is the machine that is at fault."""

_NAMED_AT_MOST = 10
_LOOKED_AT = 100  # input folders whose files every node is asked for


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
    request = look_at(settings)
    if request.finished is not None:
        return request.finished
    with _named_resources(request.out), _open(request) as run:
        job = _Job(run, request, progress, started, verbose)
        if run.shown:
            job.tidy()
            return job.report(already_complete=True)
        if len(run.ledger.receipts) < len(run.plan):
            try:
                job.run_units()
            except RequestError:
                if not run.resumed and not run.ledger.receipts:
                    run.discard()  # or the request, put right, would be another one than the unfinished run's
                raise
        return job.publish()


def _open(request: Request) -> contextlib.AbstractContextManager[RunFolder | StoreRun]:
    files, identity, overwrite = request.listing.files, request.identity, request.settings.overwrite
    if isinstance(request.out, StorePrefix):
        return open_store_run(request.out, files, identity, request.plan, overwrite=overwrite)
    return open_run(request.out, files, identity, request.plan, overwrite=overwrite)


class _Job:
    """One session of a run: feeds units to Ray, commits receipts, keeps the accounts."""

    def __init__(
        self,
        run: RunFolder | StoreRun,
        request: Request,
        progress: Callable[[InferProgress], None],
        started: float,
        verbose: bool,
    ) -> None:
        self.run, self.request, self.settings = run, request, request.settings
        self.output, self.bundle = request.output_column(run.plan), request.bundle_for(run.plan)
        self.progress, self.started, self.verbose = progress, started, verbose
        self.resumed = len(run.ledger.receipts)
        self.rows_done = self.rows_before = run.ledger.rows_in
        self.bad = sum(run.ledger.bad_rows().values())
        self.attempts: dict[int, int] = {}
        self.out_of_memory = 0
        self.assigned: dict[int, int] = {}
        self.under_way: dict[int, int] = {}
        self.first_start: float | None = None
        self.last_receipt = 0.0

    def run_units(self) -> None:
        """Works on what is not committed, until all is or each of the rest has failed three times.

        Raises:
            JobFailed: naming the units that failed.
        """
        self._report("starting")
        self._check_bad()
        most = self.settings.workers[1] if isinstance(self.settings.workers, tuple) else self.settings.workers
        useful = min(len(self._pending()), most or WAVE)
        with connect(address=self.settings.address, data_workers=useful, verbose=self.verbose):
            folder = None if isinstance(self.run, StoreRun) else self.run.staging
            size = self._pool_size()
            check_seen_by_nodes(folder, self._local_paths(), size.cpus, size.gpus)
            while pending := self._pending():
                fresh = [unit for unit in pending if unit not in self.assigned]
                self._run_wave((fresh or pending)[:WAVE], ahead=bool(fresh))
        failed = sorted(set(range(len(self.run.plan))) - self.run.ledger.receipts.keys())
        if failed:
            named = "; ".join(self._name_failure(unit) for unit in failed[:_NAMED_AT_MOST])
            more = f"; and {len(failed) - _NAMED_AT_MOST} more" if len(failed) > _NAMED_AT_MOST else ""
            raise JobFailed(
                f"{len(failed)} of {len(self.run.plan)} units failed: {named}{more}",
                hint="the others are done and kept; run the same command again to try only these",
            )

    def _local_paths(self) -> list[Path]:
        """What every node must see: the model, and of the inputs the first and the last of each folder."""
        ends: dict[Path, tuple[Path, Path]] = {}
        for file in self.run.plan.files:
            if not storage.is_uri(file.path):
                path = Path(file.path)
                ends[path.parent] = (ends.get(path.parent, (path, path))[0], path)
        inputs = dict.fromkeys(path for pair in list(ends.values())[:_LOOKED_AT] for path in pair)
        return [self.bundle.folder.absolute(), *inputs]

    def publish(self) -> InferReport:
        """Reconciles rows, puts the result together and shows it."""
        self._report("publishing")
        self._check_bad()
        run, compression = self.run, self.settings.compression
        assembly.reconcile(run)
        report = replace(self.report(), range_index=assembly.fate_of_index(run))
        if isinstance(run, StoreRun):
            store_publishing.publish(run, self.output, compression, report.to_json())
            return report
        check_ours(run.out)  # others may have come since the run began
        if self.request.single:
            merged = merge(run, self.output, compression) if len(run.plan) > 1 else None
            report = replace(report, metadata_of_first=assembly.metadata_of_first(run))
            data, described = assembly.build_file(run, self.output, compression, report.to_json(), merged)
            sidecar = publishing.file_sidecar(run.out)
            publishing.publish_described(data, run.out, described, sidecar, overwrite=self.settings.overwrite)
        else:
            built = assembly.build_folder(run, self.output, compression, report.to_json())
            publishing.publish(built, run.out, overwrite=self.settings.overwrite)
        self.tidy()
        return report

    def tidy(self) -> None:
        """Deletes what is no longer needed once OUT is shown."""
        if isinstance(self.run, RunFolder):
            sidecar = publishing.file_sidecar(self.run.out)
            if not self.request.single:
                publishing.remove(sidecar)  # of a single file that stood here before
            remove_former_sidecar(self.run.out)
            for path in (self.run.out, sidecar):
                publishing.remove(publishing.replaced(path))
        self.run.discard()

    def _pending(self) -> list[int]:
        committed = self.run.ledger.receipts
        return [
            unit
            for unit in range(len(self.run.plan))
            if unit not in committed
            and self.attempts.get(unit, 0) < ATTEMPTS
            and self.assigned.get(unit, 0) < ASSIGNMENTS
        ]

    def _run_wave(self, wave: list[int], *, ahead: bool) -> None:
        """Has units worked on once; `ahead`: workers are given their next unit before they have done the last."""
        settings, run = self.settings, self.run
        lost = capacity.lost_nodes()
        answered: set[int] = set()
        options = UnitOptions(
            run.out.uri_of(STAGING) if isinstance(run, StoreRun) else str(run.staging),
            run.plan.column,
            self.output,
            run.plan.polarity,
            settings.on_bad_row,
            settings.compression,
            settings.extras,
            run.plan.tone,
        )
        size = self._pool_size()
        device = settings.device if size.gpus else "cpu"
        folder, batch = str(self.bundle.folder.absolute()), settings.batch_size
        model = ModelToLoad(folder, self.bundle.sha256, batch, device, settings.precision)
        assignments = [self._assign(unit) for unit in wave]
        for answer in process_units(
            assignments, options, model, size, ahead=ahead, verbose=self.verbose, waiting=self._note_waiting
        ):
            if isinstance(answer, Working):
                self._note_progress(answer)
                continue
            answered.add(answer.unit)
            self.under_way.pop(answer.unit, None)
            if isinstance(answer, Receipt):
                self._commit(answer)
            else:
                self._fail(answer)
        # A unit without an answer took its worker down with it, or waited behind one that did, or was sent to one that
        # was gone. Those known to have been begun are charged; where none is, those that waited behind no other: a unit
        # may kill its worker before its word arrives. Where a node went, no unit was to blame.
        unanswered = [unit for unit in wave if unit not in answered]
        charged = [unit for unit in unanswered if unit in self.under_way] or ([] if ahead else unanswered)
        self.under_way.clear()
        if charged and not _lost_a_node(lost):
            for unit in charged:
                reason = "its worker died without a word (killed, or out of memory)"
                self._fail(Failure(unit, self.attempts.get(unit, 0) + 1, reason))

    def _pool_size(self) -> PoolSize:
        settings, units = self.settings, len(self.run.plan)
        living, to_come, share = capacity.living_nodes(), capacity.nodes_to_come(), settings.gpus_per_worker
        return pool_size(living, settings.workers, settings.device, units, gpu_share=share, to_come=to_come)

    def _assign(self, index: int) -> Assignment:
        plan, unit = self.run.plan, self.run.plan.unit(index)
        attempt = self.attempts.get(index, 0) + 1
        # Session and assignment (attempts that a lost node took along count too) keep this file apart from what any
        # orphan may still write.
        self.assigned[index] = self.assigned.get(index, 0) + 1
        name = f"unit-{index:07d}.{self.run.ledger.session_name}.a{self.assigned[index]}.parquet"
        return Assignment(unit, plan.files[unit.file], attempt, name)

    def _commit(self, receipt: Receipt) -> None:
        if receipt.unit in self.run.ledger.receipts:
            return  # a second answer for a unit can only be a stray; its file is never named
        self.run.ledger.commit(receipt)
        self.rows_done += receipt.rows_in
        self.bad += sum(receipt.bad.values())
        self.last_receipt = time.monotonic()
        self._check_bad()
        self._report("denoising")

    def _fail(self, failure: Failure) -> None:
        self.run.ledger.fail(failure)
        self.attempts[failure.unit] = self.attempts.get(failure.unit, 0) + 1
        if failure.final:
            raise getattr(errors, failure.kind)(failure.reason, hint=failure.hint)
        self.out_of_memory += failure.kind == ResourceExhausted.__name__
        if self.out_of_memory >= OUT_OF_MEMORY and not self.last_receipt:
            raise ResourceExhausted(
                f"memory ran out in {self.out_of_memory} attempts and no unit was finished: "
                + self._name_failure(failure.unit),
                hint="give fewer --workers or a smaller --batch-size, then run the same command again to go on",
            )

    def _note_progress(self, answer: Working) -> None:
        if self.first_start is None:
            self.first_start = time.monotonic()
        if answer.unit not in self.run.ledger.receipts:
            self.under_way[answer.unit] = answer.rows
            self._report("denoising")

    def _note_waiting(self, missing: str) -> None:
        self._report("denoising" if self.first_start else "starting", waiting=missing)

    def _check_bad(self) -> None:
        allowed = self.settings.max_bad * self.run.plan.rows
        if self.bad > allowed:
            reasons = ", ".join(f"{count:,} {r.replace('_', ' ')}" for r, count in self.run.ledger.bad_rows().items())
            first = assembly.first_bad_row(self.run, self._read_staged)
            named = f"; the first is {first}" if first else ""
            raise JobFailed(
                f"{self.bad:,} of {self.run.plan.rows:,} rows are bad so far ({reasons}), "
                f"more than --max-bad {self.settings.max_bad:g} allows{named}",
                hint="look at the input, or run again with a larger --max-bad: what is done is kept",
            )

    def _read_staged(self, name: str) -> bytes | None:
        if isinstance(self.run, StoreRun):
            return self.run.out.read(f"{STAGING}/{name}")
        return (self.run.staging / name).read_bytes()

    def _name_failure(self, index: int) -> str:
        unit = self.run.plan.unit(index)
        path = storage.redact(self.run.plan.files[unit.file].path)
        failures = self.run.ledger.failures.get(index)
        reason = failures[-1].reason if failures else f"it was given out {ASSIGNMENTS} times and had no answer"
        return f"unit {index} ({path}, rows {unit.start}–{unit.start + unit.rows - 1}): {reason}"

    def _report(self, phase: str, *, waiting: str = "") -> None:
        rows = self.rows_done + sum(self.under_way.values())
        elapsed = time.monotonic() - self.first_start if self.first_start is not None else 0.0
        rate = (rows - self.rows_before) / elapsed if rows > self.rows_before and elapsed > 0 else 0.0
        left = (self.run.plan.rows - rows) / rate if rate and rows < self.run.plan.rows else None
        units = len(self.run.ledger.receipts)
        plan = self.run.plan
        self.progress(InferProgress(phase, units, len(plan), rows, plan.rows, self.bad, rate, left, waiting))

    def report(self, *, already_complete: bool = False) -> InferReport:
        """What was done until now, in this session and before."""
        run, ledger = self.run, self.run.ledger
        denoising = max(0.0, self.last_receipt - self.first_start) if self.first_start is not None else 0.0
        done = self.rows_done - self.rows_before
        return InferReport(
            output=str(run.out),
            model=str(self.bundle.folder),
            model_sha256=self.bundle.sha256,
            column=run.plan.column.name,
            polarity=run.plan.polarity.value,
            tone=run.plan.tone.lines(),
            background=run.plan.tone.background,
            ink=run.plan.tone.facts().get("ink"),
            levels=run.plan.tone.level_count,
            files=len(run.plan.files),
            units=len(run.plan),
            rows_in=run.plan.rows,
            rows_out=ledger.rows_out,
            bad_rows=ledger.bad_rows(),
            quarantined=ledger.rows_in - ledger.rows_out,
            resumed_units=self.resumed,
            sessions=ledger.session,
            attempts=len(ledger.receipts) + ledger.failed_attempts,
            failed_attempts=ledger.failed_attempts,
            rows_done=done,
            seconds=round(time.monotonic() - self.started, 3),
            denoising_seconds=round(denoising, 3),
            rate=round(done / denoising, 1) if denoising > 0 else 0.0,
            output_bytes=ledger.bytes,
            stages={stage: round(seconds, 3) for stage, seconds in ledger.seconds.items()},
            types_changed=list(run.plan.changes),
            dark_on_light=ledger.dark_on_light,
            poor=ledger.poor if self.settings.extras.quality else None,
            skipped_files=len(self.request.listing.skipped),
            skipped=list(self.request.listing.skipped_shown),
            already_complete=already_complete,
        )


def _lost_a_node(before: set[str]) -> bool:
    """Whether a node has gone that was not lost before. Ray notices it some seconds after the end of what ran there."""
    until = time.monotonic() + (NODE_LOSS_SECONDS if len(capacity.living_nodes()) > 1 else 0.0)
    while capacity.lost_nodes() <= before:
        if time.monotonic() > until:
            return False
        time.sleep(0.5)
    return True


@contextlib.contextmanager
def _named_resources(out: Path | StorePrefix) -> Iterator[None]:
    """Turns what a full or read-only disk raises in the driver into an error that says so."""
    if isinstance(out, StorePrefix):
        out = Path(tempfile.gettempdir(), "run")  # the driver's own files
    try:
        yield
    except OSError as error:
        exhausted = _ray_ran_out(error, out) or errors.ran_out(error, out)
        if exhausted is None:
            raise
        raise exhausted from error


def _ray_ran_out(error: OSError, out: Path) -> ResourceExhausted | None:
    """The error of a disk that only Ray's logs are on: Ray says neither which file it was about nor that it was its."""
    if error.errno != errno.ENOSPC or error.filename is not None:
        return None
    folder = full_ray_disk()
    if folder is None or Path(folder).stat().st_dev == out.parent.stat().st_dev:
        return None
    return ray_disk_is_full(folder)
