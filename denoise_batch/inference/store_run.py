"""A run whose output is in an object store: its truth lies there too, so that any machine can go on with it.

OUT/_denoise_batch/run/
    identity.json   which run this is; written last, so where it stands the plan is complete
    plan.json, units.parquet
    ledger/         numbered objects with receipts and failures, in a folder for each session
    staging/        files of attempts; only those that a receipt names count
    replacing, cleared   how far publishing is: an old output is being deleted; there is none any more
    owner.json, beat-*   who writes it (`store_owner`)

Objects appear whole, one by one, and there are no renames: `_SUCCESS`, written last, is what makes OUT an output.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import threading
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from denoise_batch import storage
from denoise_batch.errors import FlagError, OutputError, RequestError, ResumeError, StoreError
from denoise_batch.inference.ledger import Ledger
from denoise_batch.inference.manifest import FOLDER, IDENTITY, MANIFEST, RUN, foreign_name, is_shown_in_store
from denoise_batch.inference.run_folder import FORMAT, Run, check_names, id_of, plan_of
from denoise_batch.inference.store_owner import Owner, nobody_owns
from denoise_batch.storage import publishing
from denoise_batch.storage.object_store import in_parallel
from denoise_batch.storage.redaction import has_secrets
from denoise_batch.storage.store_prefix import StorePrefix

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from types import TracebackType

    from denoise_batch.inference.plan import Plan
    from denoise_batch.storage.listing import InputFile, Listing

STAGING = f"{RUN}/staging"
REPLACING, CLEARED = f"{RUN}/replacing", f"{RUN}/cleared"
_LEDGER = f"{RUN}/ledger"
_PLAN = ("plan.json", "units.parquet")


class StoreLedger(Ledger):
    """The ledger as objects: lines that come while one is written go together into the next.

    So a receipt is in the store a moment after `commit`, or once `flush` has returned. A unit whose receipt a crash
    takes along is done again.

    Args:
        run: its id. What an orphan of another run still writes is never taken for this one's.
        owner: of the output; None to read only.
    """

    def __init__(self, store: StorePrefix, run: str, owner: Owner | None) -> None:
        self._store, self._owner = store, owner
        folder = f"{_LEDGER}/{run}"
        names = sorted(store.sizes(folder))
        contents = in_parallel(store.read, names)
        self._replay((f"{store}/{name}", content or b"") for name, content in zip(names, contents, strict=True))
        self.session = 1 + max((int(name[len(folder) + 1 :][:6]) for name in names), default=0)
        # Without locks two sessions may have one number: the token tells them apart.
        self._folder = f"{folder}/{self.session:06d}-{owner.token if owner else ''}"
        self._objects = 0
        self._lines: list[bytes] = []
        self._busy = False
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    @property
    def session_name(self) -> str:
        return f"{super().session_name}-{self._owner.token if self._owner else ''}"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None or not issubclass(kind, OutputError | StoreError):
                self.flush()
        finally:
            self._pool.shutdown()

    def flush(self) -> None:
        """Waits until all is in the store.

        Raises:
            StoreError: it cannot be written.
        """
        if self._writing is not None:
            self._writing.result()

    def _append(self, line: bytes) -> None:
        assert self._owner is not None, "the ledger was opened to be read only"
        self._owner.check()
        if self._writing is not None and self._writing.done():
            self._writing.result()  # what stopped it stops the run
        with self._lock:
            self._lines.append(line)
            idle, self._busy = not self._busy, True
        if idle:
            self._writing = self._pool.submit(self._write)

    def _write(self) -> None:
        while True:
            with self._lock:
                lines, self._lines = self._lines, []
                self._busy = bool(lines)
            if not lines:
                return
            self._objects += 1
            self._store.put(f"{self._folder}/{self._objects:08d}.jsonl", b"".join(lines))


@dataclass(frozen=True)
class StoreRun(Run):
    """A run whose output is in an object store; `folder` is a temporary one of this machine's."""

    ledger: StoreLedger
    out: StorePrefix
    owner: Owner

    def discard(self) -> None:
        """Deletes the run's objects, once OUT is shown or nothing is worth keeping."""
        _delete_run(self.out)


def check_store_output(uri: str, inputs: Sequence[str], listing: Listing, *, overwrite: bool) -> StorePrefix:
    """The output's prefix, once nothing speaks against writing it.

    Raises:
        FlagError: the URI is no prefix of a store, or an input's URI holds secrets, which the plan would repeat.
        OutputExists: it does.
        OutputError: it lies inside an input, holds one, or the store does not let us in.
    """
    store = StorePrefix.at(uri)
    for file in listing.files:
        if has_secrets(file.path):
            raise FlagError(
                f"{storage.redact(file.path)} holds credentials, which would lie in the store with the run's plan",
                hint="give credentials by the usual chain (environment, profile, role) rather than in a URI",
            )
    _check_apart(store, inputs, listing)
    with _as_output_error():
        if not store.bucket_exists():
            raise OutputError(f"{store}: there is no bucket {store.bucket!r}", hint="make it, or check its name")
        _check_free(store, overwrite=overwrite)
    return store


def _check_free(store: StorePrefix, *, overwrite: bool) -> None:
    if store.is_object():
        raise OutputError(
            f"{store} is an object, which readers would find in place of what lies below it",
            hint="name another prefix, or delete it yourself",
        )
    names = store.sizes()
    check_ours(store, names)
    others = [name for name in names if not name.startswith(f"{RUN}/")]
    # Where a run is unfinished, what stands there may be its own result.
    if not others or IDENTITY in names:
        return
    if f"{FOLDER}/{MANIFEST}" not in names:
        raise OutputError(
            f"{store} holds objects, but no output of infer ({others[0]}): --overwrite would delete them",
            hint="name a new prefix, or remove them yourself",
        )
    if not overwrite:
        if len(others) < len(names) and nobody_owns(store, RUN):
            store.delete_below(RUN)  # left by a run that died while it deleted them
        raise publishing.output_exists(store)


def check_ours(store: StorePrefix, names: Iterable[str]) -> None:
    """Refuses a prefix with objects that `infer` did not write: publishing there would delete them.

    Raises:
        OutputError: there is one.
    """
    foreign = foreign_name(names)
    if foreign is not None:
        raise OutputError(
            f"{store} holds an object that infer did not write: {foreign}",
            hint="move it elsewhere, then run the same command again, or name a new prefix",
        )


def _check_apart(store: StorePrefix, inputs: Sequence[str], listing: Listing) -> None:
    endpoint, place = storage.place_of(store.uri)
    out = f"{place}/"

    def place_in_store(uri: str) -> str | None:
        """None in another store. An endpoint that is named on one side alone may be the other's all the same."""
        other, inner = storage.place_of(uri) if storage.is_remote(uri) else (endpoint, "")
        return inner if other == endpoint or not (other and endpoint) else None

    for given in inputs:
        inner = place_in_store(given)
        if inner and out.startswith(f"{inner.rstrip('/')}/"):
            raise OutputError(
                f"output {store} is, or lies inside, the input {storage.redact(given)}",
                hint="give an output outside the input",
            )
    for file in listing.files:
        inner = place_in_store(file.path)
        if inner and inner.startswith(out):
            raise OutputError(f"output {store} holds the input {storage.redact(file.path)}", hint="give another output")


@contextlib.contextmanager
def open_store_run(
    store: StorePrefix,
    files: Sequence[InputFile],
    identity: dict[str, Any],
    make_plan: Callable[[], Plan],
    *,
    overwrite: bool,
) -> Iterator[StoreRun]:
    """Goes on with the unfinished run at `store`, or plans a new one. The arguments are those of `open_run`.

    Raises:
        ResumeError: the unfinished run differs, or its ledger is damaged.
        OutputError: another run writes there, OUT appeared meanwhile, or the store does not let us write.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="denoise-batch-")))
        with _as_output_error():
            owner = stack.enter_context(Owner(store, RUN))
            run = _open(store, owner, folder, files, {"format": FORMAT, **identity}, make_plan, overwrite=overwrite)
            stack.enter_context(run.ledger)
            if not run.shown:
                _withdraw_lost(run)
        yield run


def _open(
    store: StorePrefix,
    owner: Owner,
    folder: Path,
    files: Sequence[InputFile],
    identity: dict[str, Any],
    make_plan: Callable[[], Plan],
    *,
    overwrite: bool,
) -> StoreRun:
    (folder / "staging").mkdir()
    run_id = _fetch(store, folder)
    names = store.sizes()
    shown = run_id is not None and is_shown_in_store(store, run_id)
    begun = CLEARED in names or REPLACING in names  # what else stands there is ours, or was given up
    if not (overwrite or shown or begun) and any(not name.startswith(f"{RUN}/") for name in names):
        raise publishing.output_exists(store)
    try:
        plan = plan_of(folder, store, files, identity, overwrite=overwrite)
    except ResumeError as error:
        if not shown:
            raise
        _delete_run(store)  # of a run that had come to its end; this is another request
        raise publishing.output_exists(store) from error
    resumed = plan is not None and run_id is not None
    if plan is None or run_id is None:
        try:
            plan = make_plan()
        except RequestError:
            if run_id is None:
                _delete_run(store)
            raise
        shown = False
        _delete_run(store, keep=(IDENTITY,))
        plan.save(folder)
        for name in _PLAN:
            store.put(f"{RUN}/{name}", folder / name)
        run_id = uuid.uuid4().hex
        store.put(IDENTITY, json.dumps({"run": run_id, **identity}).encode())
    ledger = _open_ledger(store, run_id, owner, overwrite=overwrite)
    return StoreRun(folder, plan, ledger, identity, run_id, resumed, shown, out=store, owner=owner)


def rows_done(
    store: StorePrefix, files: Sequence[InputFile], identity: dict[str, Any], *, overwrite: bool
) -> tuple[int, bool] | None:
    """As `run_folder.rows_done`, of a run in a store."""
    with tempfile.TemporaryDirectory(prefix="denoise-batch-") as scratch, _as_output_error():
        folder = Path(scratch)
        run_id = _fetch(store, folder)
        plan = plan_of(folder, store, files, {"format": FORMAT, **identity}, overwrite=overwrite)
        return None if run_id is None else (StoreLedger(store, run_id, None).rows_in, plan is not None)


def stands_there(store: StorePrefix) -> bool:
    """Whether there is an output, or some of one, beside a run that is not finished."""
    return any(not name.startswith(f"{RUN}/") for name in store.sizes())


def _fetch(store: StorePrefix, folder: Path) -> str | None:
    """Brings identity and plan to this machine; the run's id, or None where there is no run, or it is damaged."""
    for name in ("identity.json", *_PLAN):
        content = store.read(f"{RUN}/{name}")
        if content is not None:
            publishing.write_file(folder / name, content, private=True)
    return id_of(folder)


def _open_ledger(store: StorePrefix, run: str, owner: Owner, *, overwrite: bool) -> StoreLedger:
    try:
        ledger = StoreLedger(store, run, owner)
        check_names(ledger, f"{store}/{_LEDGER}")
        return ledger
    except ResumeError:
        if not overwrite:
            raise
        store.delete_below(_LEDGER)  # without receipts every unit is done again
        return StoreLedger(store, run, owner)


def _withdraw_lost(run: StoreRun) -> None:
    """Takes back receipts of which an object is gone or another, and deletes staged objects that no receipt names."""
    staged = {name[len(STAGING) + 1 :]: size for name, size in run.out.sizes(STAGING).items()}
    named: set[str] = set()
    lost = []
    for receipt in run.ledger.receipts.values():
        names = receipt.staged
        sizes = {receipt.file: receipt.bytes} | {name: size for name, (size, _) in receipt.beside.items()}
        if staged.keys() >= set(names) and all(staged[name] == size for name, size in sizes.items()):
            named.update(names)
        else:
            lost.append(receipt.unit)
    withdraw(run, lost, "a finished file of it is gone or another")
    run.out.delete(f"{STAGING}/{name}" for name in staged.keys() - named)


def withdraw(run: StoreRun, units: Sequence[int], reason: str) -> None:
    """Makes committed units open again."""
    if units:
        # A copy of what is made anew may stand there already: begin with deleting again.
        run.out.put(REPLACING, run.id.encode())
        run.out.delete([CLEARED])
    for unit in units:
        run.ledger.withdraw(unit, reason)


def _delete_run(store: StorePrefix, keep: tuple[str, ...] = ()) -> None:
    """Deletes all of a run but its owner's marks; its plan after its identity, so that nobody finds one without."""
    store.delete_below(STAGING)
    if IDENTITY not in keep:
        store.delete([IDENTITY])
    store.delete_below(_LEDGER)
    store.delete(name for name in store.sizes(RUN) if name not in keep and not _is_owners(name))


def _is_owners(name: str) -> bool:
    return name == f"{RUN}/owner.json" or name.startswith(f"{RUN}/beat-")


@contextlib.contextmanager
def _as_output_error() -> Iterator[None]:
    """Before the run begins, a store that refuses is a request that cannot be met."""
    try:
        yield
    except StoreError as error:
        raise OutputError(error.message, hint=error.hint) from None
