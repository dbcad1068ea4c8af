"""The hidden folder beside OUT in which a run lives until it is complete.

.OUT.denoise-batch/
    lock            held while a run works here
    identity.json   which run this is; written last, so where it stands the plan is complete
    plan.json, units.parquet
    ledger/         receipts and failures
    staging/        files of attempts; only those that a receipt names count
    workers/        marks of the workers that have started
    output/         the result, put together just before OUT is shown
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from denoise_batch import storage
from denoise_batch.errors import OutputError, RequestError, ResumeError, first_line
from denoise_batch.inference.ledger import Ledger, Receipt
from denoise_batch.inference.manifest import foreign_name, is_shown, is_sidecar
from denoise_batch.inference.plan import Plan
from denoise_batch.parquet.output_file import file_digest
from denoise_batch.storage import publishing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from denoise_batch.storage.listing import InputFile, Listing

FORMAT = 2
DATA = "data.parquet"
"""A single-file output's name while it is put together."""
_NAMED_AT_MOST = 5


@dataclass(frozen=True)
class Run:
    """A run's plan, ledger and folders on this machine.

    Attributes:
        identity: what the result depends on beside the input files: model and result options.
        id: of this run alone; the manifest repeats it, so that a run knows its own output again.
        resumed: whether an earlier run is gone on with.
        shown: whether OUT is this run's result already; there is nothing left to do but to discard the run.
    """

    folder: Path
    plan: Plan
    ledger: Ledger
    identity: dict[str, Any]
    id: str
    resumed: bool
    shown: bool

    @property
    def staging(self) -> Path:
        return self.folder / "staging"

    @property
    def built(self) -> Path:
        return self.folder / "output"


@dataclass(frozen=True)
class RunFolder(Run):
    """A run whose output is on a file system, and which lives in a folder beside it."""

    out: Path

    def discard(self) -> None:
        """Deletes the folder, once OUT is shown; what cannot be deleted is no reason to fail."""
        done = _discarded(self.out)
        # Moved away in one step, so that nobody finds the plan of a run that is being deleted.
        shutil.rmtree(done, ignore_errors=True)
        try:
            self.folder.rename(done)
        except OSError:
            done = self.folder
        shutil.rmtree(done, ignore_errors=True)


def work_folder(out: Path) -> Path:
    return out.with_name(f".{out.name}.denoise-batch")


def _discarded(out: Path) -> Path:
    return out.with_name(f"{work_folder(out).name}.done")


def output_path(out: str) -> Path:
    """The absolute path of a local path, or of a URI of one (`file://`).

    Raises:
        FlagError: it is empty.
    """
    storage.refuse_empty(out)
    if storage.is_uri(out):
        out = storage.locate(out)[1]
    return Path(os.path.abspath(out))  # noqa: PTH100 (keeps a link's own name, which resolve() would lose)


def check_output(out: str, listing: Listing, *, overwrite: bool) -> Path:
    """The output's absolute path, once nothing speaks against writing it.

    Args:
        out: a local path, or a URI of one (`file://`).

    Raises:
        OutputExists: it does.
        OutputError: its path is not UTF-8; its name is too long; it lies inside an input or another output; it, or what
            goes along with it, holds an input; its folder cannot be written.
    """
    path = output_path(out)
    # Where a run is unfinished, OUT may be its own result, shown just before it died: `open_run` looks, under the lock.
    exists = os.path.lexists(path) and not overwrite and not (work_folder(path) / "identity.json").exists()
    sidecar = publishing.file_sidecar(path)
    # Rows that were set aside are an input like any other, and the only copy of them may lie in one of these.
    beside = [sidecar, work_folder(path), _discarded(path), publishing.replaced(path), publishing.replaced(sidecar)]
    former = publishing.former_sidecar(path)
    beside += [former] if former is not None else []
    publishing.check_utf8(path)
    publishing.check_name(path, beside)
    if path.is_symlink():
        raise OutputError(f"{path} is a link", hint="name the folder or file that it leads to")
    publishing.check_apart(path, listing, beside=beside)
    if not exists:  # it may be the finished result of this request in a folder that is closed by now
        publishing.check_parent(path)
    publishing.check_outside_outputs(path)
    if os.path.lexists(sidecar) and not is_sidecar(sidecar):
        raise OutputError(
            f"{sidecar}, where the manifest of a single file goes, is not what infer wrote", hint="remove or rename it"
        )
    # Left by a run that died while it deleted them; where OUT is gone, the replaced one is the only copy of it.
    for left in [_discarded(path)] + ([publishing.replaced(path)] if os.path.lexists(path) else []):
        shutil.rmtree(left, ignore_errors=True)
    if exists:
        raise publishing.output_exists(path)
    if path.is_dir() and any(path.iterdir()) and not (path / "_denoise_batch" / "manifest.json").is_file():
        raise OutputError(
            f"{path} is a folder that infer did not write: --overwrite would delete all that is in it",
            hint="name a file or a new folder, or remove it yourself",
        )
    check_ours(path)
    return path


def check_ours(out: Path) -> None:
    """Refuses an output folder with files that `infer` did not write: replacing it would delete them.

    What file managers and file systems leave (`.DS_Store`, `.nfs…`) counts for nothing.

    Raises:
        OutputError: there is one.
    """
    paths = (Path(folder, name).relative_to(out) for folder, _, names in os.walk(out) for name in names)
    foreign = foreign_name(path.as_posix() for path in paths if not path.name.startswith("."))
    if foreign is not None:
        raise OutputError(
            f"{out} holds a file that infer did not write, and --overwrite would delete it: {foreign}",
            hint="move it elsewhere, then run the same command again, or give another output",
        )


@contextlib.contextmanager
def open_run(
    out: Path,
    files: Sequence[InputFile],
    identity: dict[str, Any],
    make_plan: Callable[[], Plan],
    *,
    overwrite: bool,
) -> Iterator[RunFolder]:
    """Goes on with the unfinished run at `out`, or plans a new one; locks it until the block is left.

    Args:
        identity: JSON of what the result depends on beside the files.
        overwrite: an unfinished run of another identity is discarded rather than refused.

    Raises:
        ResumeError: the unfinished run differs, or its ledger is damaged.
        OutputError: another run holds the lock, or OUT appeared meanwhile.
    """
    folder = work_folder(out)
    identity = {"format": FORMAT, **identity}
    with publishing.exclusive(folder):
        run_id = id_of(folder)
        shown = run_id is not None and is_shown(out, run_id)
        if os.path.lexists(out) and not overwrite and not shown:
            if run_id is None:
                publishing.remove(folder)
            raise publishing.output_exists(out)
        try:
            plan = plan_of(folder, out, files, identity, overwrite=overwrite)
        except ResumeError as error:
            if not shown:
                raise
            publishing.remove(folder)  # of a run that had come to its end; this is another request
            raise publishing.output_exists(out) from error
        if plan is not None and run_id is not None and shown:
            with Ledger(folder / "ledger") as ledger:
                yield RunFolder(folder, plan, ledger, identity, run_id, resumed=True, shown=True, out=out)
            return
        resumed = plan is not None and run_id is not None
        if plan is None or run_id is None:
            try:
                plan = make_plan()
            except RequestError:
                if not (folder / "identity.json").exists():  # else it is another request's unfinished run
                    publishing.remove(folder)
                raise
            _clear(folder)
            (folder / "staging").mkdir()
            plan.save(folder)
            run_id = uuid.uuid4().hex
            publishing.write_file(folder / "identity.json", json.dumps({"run": run_id, **identity}).encode())
        with _open_ledger(folder, overwrite=overwrite) as ledger:
            run = RunFolder(folder, plan, ledger, identity, run_id, resumed, shown=False, out=out)
            _drop_strays(run)
            yield run


def rows_done(
    out: Path, files: Sequence[InputFile], identity: dict[str, Any], *, overwrite: bool
) -> tuple[int, bool] | None:
    """Of an unfinished run, the rows that it has done, and whether it is of this very request; None: there is none.

    Raises:
        ResumeError: it is another one, or damaged, and `overwrite` is off; or its ledger is damaged.
    """
    folder = work_folder(out)
    plan = plan_of(folder, out, files, {"format": FORMAT, **identity}, overwrite=overwrite)
    if not (folder / "identity.json").exists():
        return None
    return Ledger(folder / "ledger", read_only=True).rows_in, plan is not None


def _open_ledger(folder: Path, *, overwrite: bool) -> Ledger:
    try:
        ledger = Ledger(folder / "ledger")
        check_names(ledger, folder / "ledger")
        return ledger
    except ResumeError:
        if not overwrite:
            raise
        publishing.remove(folder / "ledger")  # without receipts every unit is done again
        return Ledger(folder / "ledger")


def check_names(ledger: Ledger, where: object) -> None:
    """Refuses receipts that somebody wrote to have other files deleted or shown.

    Raises:
        ResumeError: one names a file outside of the run's own.
    """
    for receipt in ledger.receipts.values():
        if not all(storage.stays_inside(name) for name in receipt.staged):
            raise ResumeError(
                f"{where}: the receipt of unit {receipt.unit} names a file outside of the run's folder",
                hint="give --overwrite to start afresh",
            )


def id_of(folder: Path) -> str | None:
    """The id of the unfinished run; None where there is none, or it is damaged, which `plan_of` reports."""
    try:
        found = json.loads((folder / "identity.json").read_bytes())["run"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None


def plan_of(
    folder: Path, out: object, files: Sequence[InputFile], identity: dict[str, Any], *, overwrite: bool
) -> Plan | None:
    """The unfinished run's plan, where there is one that this request may go on with.

    Raises:
        ResumeError: it is another run, or damaged, and `overwrite` is off.
    """
    path = folder / "identity.json"
    if not path.exists():
        return None
    try:
        before = json.loads(path.read_bytes())
        before.pop("run", None)
        plan = Plan.load(folder)
    except Exception as error:  # whatever a damaged file raises
        if overwrite:
            return None
        raise ResumeError(
            f"{folder if isinstance(out, Path) else out} holds a damaged run: {first_line(error)}",
            hint="give --overwrite to start afresh",
        ) from error
    differs = _differences(before, identity, plan, files)
    if not differs:
        return plan
    if overwrite:
        return None
    raise ResumeError(
        f"{out.name if isinstance(out, Path) else out}: an unfinished run of another request is there; it differs in "
        + ", ".join(differs),
        hint="repeat that request to go on with it, or give --overwrite to start afresh",
    )


def said(before: Any, now: Any) -> str:
    """What an option was and is, for people."""
    words = ((None, "not given"), (True, "yes"), (False, "no"))
    then, today = (next((word for value, word in words if each is value), repr(each)) for each in (before, now))
    return f"{then} then, {today} now"


def _differences(before: dict[str, Any], now: dict[str, Any], plan: Plan, files: Sequence[InputFile]) -> list[str]:
    keys = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    found = [f"{key} ({said(before.get(key), now.get(key))})" for key in keys]
    planned = {file.path: (file.size, file.mtime_ns) for file in plan.files}
    present = {file.path: (file.size, file.mtime_ns) for file in files}
    changed = [f"{path} (missing)" for path in planned if path not in present]
    changed += [f"{path} (new)" for path in present if path not in planned]
    changed += [f"{path} (changed)" for path in present if path in planned and planned[path] != present[path]]
    if not changed and list(planned) != list(present):
        changed = ["the order of the files"]
    if changed:
        more = f" and {len(changed) - _NAMED_AT_MOST} more" if len(changed) > _NAMED_AT_MOST else ""
        found.append("input " + ", ".join(storage.redact(name) for name in changed[:_NAMED_AT_MOST]) + more)
    return found


def _clear(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.name != "lock":
            publishing.remove(entry)


def _drop_strays(run: RunFolder) -> None:
    """Deletes staged files that no receipt names, and takes back receipts of which a file is gone or cut off.

    A worker of a driver that died may still be writing: its file then has no name any more, which does no harm.
    """
    named: set[str] = set()
    kept: set[Path] = set()
    for receipt in list(run.ledger.receipts.values()):
        staged = run.staging / receipt.file
        moved = _moved(run, receipt)
        beside = receipt.staged[1:]
        whole = all(_is_file(run.staging / name) for name in beside) and all(
            (run.staging / name).stat().st_size == size for name, (size, _) in receipt.beside.items()
        )
        if whole and (moved or (_is_file(staged) and staged.stat().st_size == receipt.bytes)):
            named |= {receipt.file, *beside}
            kept |= {moved} if moved else set()
        else:
            run.ledger.withdraw(receipt.unit, "a finished file of it is gone or cut off")
    for entry in run.staging.iterdir():
        if entry.name not in named:
            publishing.remove(entry)
    # What else stands there is half of a description, or the OLD output of a swap that was cut short.
    if run.built.is_dir():
        for path in [path for path in run.built.rglob("*") if path.is_symlink() or not path.is_dir()]:
            if path not in kept:
                publishing.remove(path)
        if (run.built / DATA).is_dir():
            publishing.remove(run.built / DATA)
    else:
        publishing.remove(run.built)


def _moved(run: RunFolder, receipt: Receipt) -> Path | None:
    """A unit's file under its final name, moved there by a run that died while putting the result together.

    The digest decides: after a swap the old output stands there, under the same names.
    """
    candidates = [run.built / part_name(run.plan, receipt.unit)]
    if len(run.plan) == 1:
        candidates.append(run.built / DATA)
    for path in candidates:
        if _is_file(path) and path.stat().st_size == receipt.bytes and file_digest(path) == receipt.digest:
            return path
    return None


def _is_file(path: Path) -> bool:
    """A file of our own: we make no links, and what one leads to may change behind our back."""
    return path.is_file() and not path.is_symlink()


def part_name(plan: Plan, unit: int) -> str:
    """A unit's file in the output, below the hive folders of its input: `year=2024/part-00007.parquet`."""
    width = max(5, len(str(len(plan) - 1)))
    folder = plan.files[int(plan.units["file"][unit])].folder
    name = f"part-{unit:0{width}d}.parquet"
    return f"{folder}/{name}" if folder else name
