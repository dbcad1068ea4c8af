"""Sweeps faults over runs that write to an object store, and looks at what readers and the next run find.

    python benchmarks/store_faults.py [--wire 20] [--kills 0] [--chains 20] [--seed 0] [--scenarios new,overwrite]

`wire`: runs against an S3-compatible server (moto) behind a proxy that answers 500 and 503 SlowDown, lets requests time
out, cuts connections in the middle of an upload or an answer, and loses answers, in bursts that outlast the client's
own retries. A run that gives up is started again.

`kills`: each change that a run makes in a store (an object put, copied, deleted), before and after it: the run is
killed there by SIGKILL, OUT is looked at as a reader does that goes by `_SUCCESS` (the old output whole, the new one,
or none), and the same command is run again to its end. `--kills N` takes a sample. Chains kill the next runs too.

Ray is left out: units are made in the process itself. Prints tables; exits 1 if anything is not as promised.
"""

from __future__ import annotations

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # children are forked: this process must stay without threads

import argparse
import contextlib
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
from fault_steps import forked, without_ray, write_source

from denoise_batch import storage
from denoise_batch.errors import DenoiseBatchError
from denoise_batch.inference import manifest
from denoise_batch.inference.denoise_unit import OnBadRow
from denoise_batch.inference.infer import InferSettings, infer
from denoise_batch.parquet import footers
from denoise_batch.storage.store_prefix import StorePrefix

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from folder_store import FolderStore, locator

if TYPE_CHECKING:
    from collections.abc import Iterator

FILES, ROWS = 6, 30
OLD_FILES = 8
OUT = "s3://bucket/denoised"
SETTINGS = {"max_bad": 1.0, "on_bad_row": OnBadRow.QUARANTINE}


@dataclass(frozen=True)
class Scenario:
    """A request, and what lies at OUT before it."""

    name: str
    old: bool = False
    bad: bool = False


COUNTED = ("changes", "kills", "sights", "absent", "incomplete", "lost", "doubled")
SCENARIOS = (Scenario("new"), Scenario("overwrite", old=True), Scenario("quarantine", old=True, bad=True))


class Faults(list[str]):
    """What is not as promised, one line each."""


@contextlib.contextmanager
def footers_here() -> Iterator[None]:
    """Reads footers in this process: one of its own for each run would take most of the time."""
    before = footers._ask
    footers._ask = lambda requests, _: [
        footers._read_sample(**request) if "group" in request else footers._read_footer(request["path"])
        for request in requests
    ]
    try:
        yield
    finally:
        footers._ask = before


def run_infer(source: Path | str, *, overwrite: bool, order: int) -> Any:
    with without_ray(order), footers_here():
        return infer(InferSettings((str(source),), OUT, overwrite=overwrite, **SETTINGS))


def rows_of(store: StorePrefix) -> list[int]:
    """The ids in what the manifest names, in its order."""
    content = json.loads(store.read(f"{manifest.FOLDER}/{manifest.MANIFEST}") or b"{}")
    found: list[int] = []
    for entry in content["files"]:
        with store.filesystem.open_input_file(f"{store.root}/{entry['path']}") as file:
            found += pq.read_table(file)["id"].to_pylist()
    return found


def sight(store: StorePrefix) -> list[int] | None:
    """The ids that a reader finds that goes by `_SUCCESS`; None where there is no output."""
    if store.read(manifest.SUCCESS) is None:
        return None
    return rows_of(store)


def ids(first: int, files: int, *, bad: bool) -> list[int]:
    return [first + n for n in range(files * ROWS) if not (bad and n % ROWS % 3 == 1)]


def check_end(store: StorePrefix, expected: list[int], faults: Faults, where: str) -> Counter[str]:
    """What a finished output is compared with."""
    found = rows_of(store)
    tally = Counter(lost=len(set(expected) - set(found)), doubled=len(found) - len(set(found)))
    faults += [f"{where}: {line}" for line in manifest.verify(store)]
    if found != expected:
        faults.append(f"{where}: {len(found)} rows, not the {len(expected)} expected, or not in their order")
    return tally


# --- faults on the wire -----------------------------------------------------------------------------------------------


def sweep_wire(runs: int, seed: int, folder: Path, faults: Faults) -> dict[str, Any]:
    from s3_server import ENVIRONMENT, FAULTS, FaultProxy, make_bucket, s3_server

    os.environ.update(ENVIRONMENT)
    old = write_source(folder / "old", OLD_FILES, ROWS, 10_000)
    source = write_source(folder / "in", FILES, ROWS, 0, bad=True)
    total: Counter[str] = Counter()
    gave_up: Counter[str] = Counter()
    started = time.monotonic()
    with s3_server() as server, FaultProxy(server, seed=seed, burst=6) as proxy:
        os.environ["AWS_ENDPOINT_URL"] = proxy.url
        make_bucket(server, "bucket")
        store, stored = StorePrefix.at(OUT), StorePrefix.at("s3://bucket/in")
        for file in source.iterdir():
            stored.put(file.name, file)
        rng = random.Random(seed)
        for number in range(runs):
            proxy.faults = {}
            if number % 2:
                run_infer(old, overwrite=True, order=number)
            else:
                store.delete_below("")
            # Timeouts cost seconds each, so they are the rarest.
            proxy.faults = {kind: rng.uniform(0, 0.004 if kind == "timeout" else 0.03) for kind in FAULTS}
            for _ in range(20):
                try:
                    run_infer(stored.uri, overwrite=bool(number % 2), order=number)
                    break
                except DenoiseBatchError as error:
                    gave_up[type(error).__name__] += 1
                    if "exists" in error.message:
                        break  # it was complete, and what failed was telling so
            else:
                faults.append(f"wire run {number}: not through after 20 starts")
            proxy.faults = {}
            total += check_end(store, ids(0, FILES, bad=True), faults, f"wire run {number}")
        return {
            "runs": runs,
            "requests": sum(proxy.seen.values()),
            "injected": dict(proxy.injected),
            "runs_started_again": dict(gave_up),
            "rows_lost": total["lost"],
            "rows_doubled": total["doubled"],
            "seconds": round(time.monotonic() - started, 1),
        }


# --- kills at each change ---------------------------------------------------------------------------------------------


class Killer:
    """Counts the changes that are made in the store, before and after each, and dies at number `at`, from 1."""

    def __init__(self, at: int | None) -> None:
        self.at, self.count = at, 0

    def __call__(self, _when: str, what: str, _key: str) -> None:
        if what in {"put", "copy", "delete"}:
            self.count += 1
            if self.count == self.at:
                os.kill(os.getpid(), signal.SIGKILL)


class World:
    """A store in a folder, as a scenario finds it, and runs in children of this process."""

    def __init__(self, folder: Path, scenario: Scenario) -> None:
        self.scenario, self.folder = scenario, folder
        self.source = write_source(folder / "in", FILES, ROWS, 0, bad=scenario.bad)
        self.old_source = write_source(folder / "old", OLD_FILES, ROWS, 10_000)
        self.old = ids(10_000, OLD_FILES, bad=False) if scenario.old else None
        self.new = ids(0, FILES, bad=scenario.bad)
        self.reset_from = folder / "before"
        if scenario.old:
            answer = self._run(self.old_source, None, 0)
            assert "changes" in answer, answer
        FolderStore(folder / "store")
        (folder / "store").rename(self.reset_from)

    def reset(self) -> None:
        shutil.rmtree(self.folder / "store", ignore_errors=True)
        shutil.copytree(self.reset_from, self.folder / "store")

    def run(self, at: int | None, order: int) -> dict[str, Any]:
        return self._run(self.source, at, order)

    def look(self) -> list[int] | None:
        with self._located(None):
            return sight(StorePrefix.at(OUT))

    def check(self, faults: Faults, where: str) -> Counter[str]:
        with self._located(None):
            return check_end(StorePrefix.at(OUT), self.new, faults, where)

    def _run(self, source: Path, at: int | None, order: int) -> dict[str, Any]:
        def work() -> dict[str, Any]:
            with self._located(at) as killer:
                run_infer(source, overwrite=self.scenario.old, order=order)
            return {"changes": killer.count}

        return forked(work)

    @contextlib.contextmanager
    def _located(self, at: int | None) -> Iterator[Killer]:
        killer, before = Killer(at), storage.locate
        storage.locate = locator(FolderStore(self.folder / "store", killer))
        try:
            yield killer
        finally:
            storage.locate = before


def sweep_kills(scenario: Scenario, sample: int, chains: int, seed: int, folder: Path, faults: Faults) -> Counter[str]:
    world = World(folder, scenario)
    rng = random.Random(seed)
    world.reset()
    changes = world.run(None, 0)["changes"]
    tally = Counter(changes=changes) + world.check(faults, f"{scenario.name}: undisturbed")
    steps = range(1, changes + 1) if not sample else sorted(rng.sample(range(1, changes + 1), min(sample, changes)))
    plans = [[step] for step in steps] + [[rng.randint(1, changes) for _ in range(4)] for _ in range(chains)]
    for number, plan in enumerate(plans):
        where = f"{scenario.name}: kills at {plan}"
        world.reset()
        for at in [*plan, None]:
            answer = world.run(at, number)
            seen = world.look()
            tally["sights"] += 1
            tally["absent"] += seen is None
            if seen not in (None, world.new, world.old):
                faults.append(f"{where}: a reader saw {len(seen or [])} rows, neither the old output nor the new one")
                tally["incomplete"] += 1
            tally["kills"] += "killed" in answer
            # A kill at the very last changes leaves a complete output, which is refused without --overwrite.
            if "error" in answer and not ("exists" in answer["error"] and seen == world.new):
                faults.append(f"{where}: {answer['error']}")
            if "killed" not in answer:
                break
        tally += world.check(faults, where)
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wire", type=int, default=20, help="runs with faults on the wire")
    parser.add_argument("--kills", type=int, default=0, help="kills of each scenario; 0: at every change")
    parser.add_argument("--chains", type=int, default=20, help="runs of each scenario that are killed up to four times")
    parser.add_argument("--scenarios", default=",".join(scenario.name for scenario in SCENARIOS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    faults = Faults()
    with tempfile.TemporaryDirectory() as scratch:
        wanted = [scenario for scenario in SCENARIOS if scenario.name in arguments.scenarios.split(",")]
        print(f"{'scenario':<12}" + "".join(f"{name:>{len(name) + 2}}" for name in COUNTED))
        for scenario in wanted:
            tally = sweep_kills(
                scenario, arguments.kills, arguments.chains, arguments.seed, Path(scratch, scenario.name), faults
            )
            print(f"{scenario.name:<12}" + "".join(f"{tally[name]:>{len(name) + 2}}" for name in COUNTED), flush=True)
        # After the children: the S3 client's threads would not survive a fork.
        if arguments.wire:
            print(json.dumps(sweep_wire(arguments.wire, arguments.seed, Path(scratch, "wire"), faults)))
    for line in faults[:50]:
        print(line)
    print(f"faults: {len(faults)}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
