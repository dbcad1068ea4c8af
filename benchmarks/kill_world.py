"""The inputs of `kill_sweep.py`, a run among them, the reader that watches its output, and the judgement at its end."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fault_steps import IMAGE, digests, forked, source_of, without_ray, write_source
from kill_runs import Driver, kill, kill_session, name_of, orphans, wait_for

import denoise_batch
from denoise_batch.images import decode
from denoise_batch.images.layouts import output_column
from denoise_batch.inference import manifest
from denoise_batch.inference.infer import InferSettings, OutputShape, infer
from denoise_batch.inference.run_folder import work_folder
from denoise_batch.storage import publishing

if TYPE_CHECKING:
    from collections.abc import Iterator

UNITS, ROWS = 24, 1500
OLD_UNITS, OLD_ID = 5, 1_000_000
ORPHAN_S = 90.0
"""Ray gives a service that is gone a minute to come back, in the calls that know no other limit."""


@dataclass
class Tally:
    """What the kills of one kind came to. All but the first three and the seconds must be 0."""

    kind: str
    kills: int = 0
    runs: int = 0
    rows_lost: int = 0
    rows_doubled: int = 0
    byte_differences: int = 0
    incomplete_sights: int = 0
    strays: int = 0
    failed_runs: int = 0
    sights: int = 0
    same_fingerprint: int = 0
    empty_runs: int = 0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)

    _COLUMNS = ("kills", "runs", "rows_lost", "rows_doubled", "byte_differences", "incomplete_sights", "strays")

    @classmethod
    def heading(cls) -> str:
        return f"{'kind':10}" + "".join(f"{name.replace('_', ' '):>19}" for name in (*cls._COLUMNS, "seconds"))

    def row(self) -> str:
        return f"{self.kind:10}" + "".join(f"{getattr(self, name):19}" for name in (*self._COLUMNS, "seconds"))

    @classmethod
    def total(cls, tallies: list[Tally]) -> Tally:
        found = cls("all")
        for tally in tallies:
            for name, value in asdict(tally).items():
                if name != "kind":
                    setattr(found, name, getattr(found, name) + value)
        found.seconds = round(found.seconds, 1)
        return found

    def lines(self) -> list[str]:
        return [f"{self.kind}: {fault}" for fault in self.faults]


class World:
    """Inputs, the outputs to be replaced, and what undisturbed runs make, each made once."""

    def __init__(self, base: Path) -> None:
        self.base, self.log = base, base / "errors.log"
        self.model = Path(denoise_batch.__file__).parent / "pretrained" / "seed"
        self.number = 0
        self._steps: dict[bool, int] = {}
        self._references: dict[tuple[bool, int, tuple[str, ...]], dict[str, str]] = {}
        self._sources: dict[int, Path] = {}
        for single in (False, True):
            self._make_old(single)

    def _make_old(self, single: bool) -> None:
        folder = self.base / f"old-{single}"

        def work() -> None:
            source = write_source(self.base / f"old-{single}-in", OLD_UNITS, 40, OLD_ID)
            folder.mkdir()
            shape = OutputShape.SINGLE_FILE if single else OutputShape.DIRECTORY
            with without_ray():
                infer(InferSettings((source_of(source),), str(folder / "out"), shape=shape))

        found = forked(work)
        if found:
            raise RuntimeError(f"the old output: {found}")

    def source(self, files: int) -> Path:
        if files not in self._sources:
            self._sources[files] = write_source(self.base / f"in-{files}", files, ROWS, 0)
        return self._sources[files]

    def steps(self, *, single: bool) -> int:
        """How many steps on the disk an undisturbed driver takes."""
        if single not in self._steps:
            run = Run(self, overwrite=True, single=single, workers=1)
            driver = run.start()
            if driver.finish() != 0:
                raise RuntimeError(f"undisturbed: {self.log.read_text()}")
            self._steps[single] = driver.steps
            self._references[run.key()] = digests(run.out, data=True)
            driver.clean()
        return self._steps[single]

    def reference(self, run: Run) -> dict[str, str] | None:
        """The digests of an undisturbed run's files of the same execution fingerprint, where there is one."""
        if run.key() not in self._references:
            other = Run(self, overwrite=False, single=run.single, workers=run.workers, files=run.files)
            driver = other.start()
            if driver.finish() != 0:
                raise RuntimeError(f"undisturbed: {self.log.read_text()}")
            driver.clean()
            self._references[other.key()] = digests(other.out, data=True)
        return self._references.get(run.key())


class Run:
    """One output, from nothing or from an old output to the new one, over as many sessions as it takes."""

    def __init__(self, world: World, *, overwrite: bool, single: bool, workers: int, files: int = UNITS) -> None:
        world.number += 1
        self.world, self.overwrite, self.single, self.workers, self.files = world, overwrite, single, workers, files
        self.root = world.base / f"run-{world.number}"
        self.out = self.root / "out"
        self.staging = work_folder(self.out) / "staging"
        if overwrite:
            shutil.copytree(world.base / f"old-{single}", self.root)
        else:
            self.root.mkdir()
        self.settings: dict[str, Any] = {
            "inputs": [str(world.source(files))],
            "output": str(self.out),
            "model": str(world.model),
            "workers": workers,
            "overwrite": overwrite,
            "shape": "single-file" if single else "directory",
        }
        self.drivers: list[Driver] = []
        self.timers: list[threading.Timer] = []
        self.reader: Reader | None = None

    def start(self, kill_at: int | None = None, address: str | None = None) -> Driver:
        settings = self.settings | ({"address": address} if address else {})
        self.drivers.append(Driver(settings, self.world.log, kill_at))
        return self.drivers[-1]

    def wake(self, process: int, seconds: float) -> None:
        """Lets a stopped process go on after a while."""
        timer = threading.Timer(seconds, kill, (process, signal.SIGCONT))
        timer.daemon = True
        timer.start()
        self.timers.append(timer)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """A reader looks at OUT; in the end all processes are gone, however the block is left."""
        self.reader = Reader(self)
        self.reader.start()
        try:
            yield
        finally:
            self.reader.stop.set()
            self.reader.join()
            for timer in self.timers:
                timer.cancel()
            for driver in self.drivers:
                driver.clean()
            shutil.rmtree(self.root, ignore_errors=True)

    def key(self) -> tuple[bool, int, tuple[str, ...]]:
        content = manifest.read_manifest(self.out)
        return self.single, self.files, tuple(content["fingerprints"]) if content else ()

    def judge(self, code: int, tally: Tally) -> None:
        """Adds what is wrong with the finished output to the tally, once every orphan is gone."""
        tally.runs += 1
        name = f"run {self.world.number} ({'overwrite' if self.overwrite else 'new'}, {self.settings['shape']})"

        def fault(text: str) -> None:
            tally.faults.append(f"{name}: {text}")

        log = self.world.log.read_text() if self.world.log.exists() else ""
        last = log.strip().splitlines()[-1:] or [""]
        # A run that died when all was done but its own tidying up is over: there is nothing left to go on with.
        over = code == 2 and not self.overwrite and last[0].endswith("exists")
        if code != 0 and not over:
            tally.failed_runs += 1
            fault(f"the last run ended with {code}: {last[0]}")
            return
        for timer in self.timers:
            timer.join()
        for driver in self.drivers:
            try:
                wait_for(lambda seen=driver.session: not orphans(seen), ORPHAN_S, "orphans")
                kill_session(driver.session)
            except TimeoutError:
                fault(f"orphans that do not end: {', '.join(name_of(pid) for pid in orphans(driver.session))}")
        if self.reader:
            time.sleep(0.1)
            tally.sights += self.reader.sights
            tally.incomplete_sights += len(self.reader.incomplete)
            for line in self.reader.incomplete[:3]:
                fault(f"a reader saw {line}")
        for line in manifest.verify(self.out):
            tally.strays += "not part of" in line
            fault(line)
        table, given = pq.read_table(self.out), pq.read_table(self.world.source(self.files))
        self._count_rows(table, given, tally, fault)
        reference = self.world.reference(self)
        found = digests(self.out, data=True)
        if reference is not None:
            tally.same_fingerprint += 1
            differing = [n for n in reference.keys() | found.keys() if reference.get(n) != found.get(n)]
            tally.byte_differences += len(differing)
            if differing:
                fault(f"not the bytes of an undisturbed run: {sorted(differing)}")
        mine = {self.out.name} | ({publishing.file_sidecar(self.out).name} if self.single else set())
        left = sorted(path.name for path in self.root.iterdir() if path.name not in mine)
        tally.strays += len(left)
        if left:
            fault(f"left over: {left}")

    def _count_rows(self, table: pa.Table, given: pa.Table, tally: Tally, fault: Any) -> None:
        ids, wanted = table["id"].to_numpy(), given["id"].to_numpy()
        lost, doubled = len(np.setdiff1d(wanted, ids)), len(ids) - len(np.unique(ids))
        tally.rows_lost += lost
        tally.rows_doubled += doubled
        if lost or doubled or not np.array_equal(ids, wanted):
            fault(f"{lost} rows lost, {doubled} doubled, or not in order")
        elif not table.drop_columns("denoised").equals(given):
            fault("input columns are not what they were")
        else:
            self.world.pixels = getattr(self.world, "pixels", {})
            clean = decode(table["denoised"], output_column(IMAGE, "denoised")).pixels.astype(np.int16)
            before = self.world.pixels.setdefault(self.files, clean)
            if np.abs(clean - before).max() > 1:
                fault("denoised pixels differ from another run's by more than one grey level")


class Reader(threading.Thread):
    """Looks at OUT all the time: it is the old output or the new one as a whole, and never gone once it was there."""

    def __init__(self, run: Run) -> None:
        super().__init__(daemon=True)
        self.run_, self.stop = run, threading.Event()
        self.sights, self.incomplete = 0, list[str]()
        old = np.arange(OLD_ID, OLD_ID + OLD_UNITS * 40)
        new = np.arange(run.files * ROWS)
        self.known = {"new": new} | ({"old": old} if run.overwrite else {})
        self.there = run.overwrite
        self.shown = False
        self.seen: dict[int, Any] = {}

    def run(self) -> None:
        while not self.stop.wait(0.01):
            self.look()

    def look(self) -> None:
        out = self.run_.out
        begun = self._inode()
        try:
            what = self._read(out, begun) if begun else "absent"
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
        if self._inode() != begun:
            return  # swapped while it was read: the next sight counts
        self.sights += 1
        if what == "absent" and not self.there:
            return
        self.there = True
        if what not in self.known or (self.shown and what == "old"):
            self.incomplete.append(what)
        self.shown = self.shown or what == "new"

    def _inode(self) -> int:
        try:
            return os.lstat(self.run_.out).st_ino
        except FileNotFoundError:
            return 0

    def _read(self, out: Path, inode: int) -> str:
        """Everything is read once for each inode; then only the names and sizes of the files."""
        stands = {path.name: path.stat().st_size for path in out.iterdir()} if out.is_dir() else out.stat().st_size
        if inode in self.seen and self.seen[inode][0] == stands:
            return str(self.seen[inode][1])
        table = pq.read_table(out, columns=["id", "denoised"])
        ids = table["id"].to_numpy()
        what = next((name for name, known in self.known.items() if np.array_equal(ids, known)), f"{len(ids)} rows")
        if table["denoised"].null_count:
            what += " without pixels"
        self.seen[inode] = (stands, what)
        return what
