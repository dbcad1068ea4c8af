"""Kills `infer` at every step that it takes on the disk, and looks at what readers and the next run then find.

    python benchmarks/commit_steps.py [--sample 10] [--seed 0] [--scenarios folder-new,file-overwrite] [--jobs 2]

A step is what changes the disk under the output's parent: opening for writing, writing to the ledger (before, half way,
after), syncing, renaming, deleting, making folders. An undisturbed run counts them; then, for each, a run is killed
there by SIGKILL, OUT is looked at (the old output or the new one, whole, and never neither), and the same command is
run again to its end. Chains kill the next runs too, at random steps. Ray is left out: units are made in the process
itself, by a forward pass that does nothing. Prints a table; exits 1 if anything is not as promised. Kills of real runs:
`kill_sweep.py`.
"""

from __future__ import annotations

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # children are forked: this process must stay without threads

import argparse
import contextlib
import errno
import json
import random
import shutil
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from fault_steps import Steps, digests, forked, source_of, without_ray, write_source

from denoise_batch.errors import OutputError
from denoise_batch.inference import manifest, merging, plan, request
from denoise_batch.inference.denoise_unit import OnBadRow
from denoise_batch.inference.infer import InferSettings, OutputShape, infer
from denoise_batch.storage import publishing

# --- scenarios --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenario:
    """A request, and what stands at OUT before it.

    Attributes:
        files: of the input, each a unit; 1 makes it a single file's request.
        old: what is overwritten: an output of as many files (0: nothing stands there); `old_shape` is its shape.
        unfinished: an unfinished run of another request lies there too.
        copied: row groups are joined as they are, small as these are.
    """

    name: str
    files: int
    shape: OutputShape = OutputShape.AUTO
    old: int = 0
    old_shape: OutputShape = OutputShape.AUTO
    on_bad_row: OnBadRow = OnBadRow.NULL
    unfinished: bool = False
    copied: bool = False

    @property
    def single(self) -> bool:
        return self.shape is OutputShape.SINGLE_FILE or (self.shape is OutputShape.AUTO and self.files == 1)


SCENARIOS = (
    Scenario("folder-new", 3),
    Scenario("folder-overwrite", 3, old=2),
    Scenario("folder-quarantine", 2, on_bad_row=OnBadRow.QUARANTINE, old=2),
    Scenario("folder-over-file", 2, old=1),
    Scenario("folder-over-unfinished", 2, old=2, unfinished=True),
    Scenario("file-new", 1),
    Scenario("file-overwrite", 1, old=1),
    Scenario("file-over-folder", 1, old=2),
    Scenario("joined-new", 3, OutputShape.SINGLE_FILE),
    Scenario("joined-copied", 3, OutputShape.SINGLE_FILE, copied=True),
    Scenario("joined-overwrite", 3, OutputShape.SINGLE_FILE, old=2, old_shape=OutputShape.SINGLE_FILE),
)


# --- kill, look, run again --------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What a scenario's kills came to; every fault is a line in `faults`."""

    name: str
    steps: int = 0
    kills: int = 0
    runs: int = 0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)


class Place:
    """A scenario's inputs, its folder, and what stands in the folder before a run."""

    def __init__(self, base: Path, scenario: Scenario, *, no_swap: bool = False, rows: int = 24) -> None:
        self.scenario, self.no_swap = scenario, no_swap
        self.root = base / "root"
        self.out = self.root / "out"
        self.template = base / "template"
        bad = scenario.on_bad_row is OnBadRow.QUARANTINE
        self.ids = list(range(scenario.files * rows))
        if bad:
            self.ids = [i for i in self.ids if i % rows % 3 != 1]

        def prepare() -> None:
            new = write_source(base / "new", scenario.files, rows, 0, bad=bad)
            self.root.mkdir()
            if scenario.old:
                old = write_source(base / "old", scenario.old, rows, 10_000)
                settings = InferSettings((source_of(old),), str(self.out), shape=scenario.old_shape)
                with without_ray():
                    infer(settings)
            if scenario.unfinished:
                settings = InferSettings((str(new),), str(self.out), compression="lz4", overwrite=True)

                def stop(told: Any) -> None:
                    if told.units == 1:
                        raise KeyboardInterrupt

                with without_ray(), contextlib.suppress(KeyboardInterrupt):
                    infer(settings, stop)
            self.root.rename(self.template)

        _expect(forked(prepare))
        self.settings = InferSettings(
            (source_of(base / "new"),),
            str(self.out),
            shape=scenario.shape,
            on_bad_row=scenario.on_bad_row,
            max_bad=1.0,
            overwrite=bool(scenario.old),
        )
        # Planned once: the plan is the same each time, and its readers are processes that take half a second.
        self.plans = base / "plan"

        def plan_it() -> None:
            self.plans.mkdir()
            self.reset()
            request.look_at(self.settings).plan().save(self.plans)

        _expect(forked(plan_it))
        self.reset()
        self.old = digests(self.out, data=False) if scenario.old else None
        self.new: dict[str, str] = {}

    def reset(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self.template, self.root)

    def run(self, kill_at: int | None) -> dict[str, Any]:
        """Runs the request in a process of its own, to its end or to the step. What it says, or {"killed": True}."""

        def work() -> dict[str, Any]:
            planned = plan.Plan.load(self.plans)
            request.make_plan = lambda *_, **__: planned
            if self.no_swap:
                publishing._rename_with = _cannot
            if self.scenario.copied:
                merging._SMALL_ROWS = 0
            steps = Steps(self.root, kill_at)
            steps.watch()
            try:
                with without_ray():
                    infer(self.settings)
            except OutputError as error:
                return {"steps": steps.names, "exists": error.message}
            return {"steps": steps.names}

        return forked(work)

    def check(self) -> list[str]:
        """In a process of its own: the output verifies, and holds every row once, in order, with its pixels."""

        def work() -> dict[str, Any]:
            faults = manifest.verify(self.out)
            table = pq.read_table(self.out)
            if table["id"].to_pylist() != self.ids:
                faults.append(f"rows are lost, doubled or out of order: {table['id'].to_pylist()}")
            if not table["image"].equals(table["denoised"]):
                faults.append("the new column is not what the model makes of the image")
            return {"faults": faults}

        found = forked(work)
        return list(found["faults"]) if "faults" in found else [f"the output cannot be read: {found}"]

    def sight(self) -> str:
        """What a reader finds at OUT now: `old`, `new`, `absent`, or what else it is."""
        if not os.path.lexists(self.out):
            return "absent"
        if self.old is not None and digests(self.out, data=False) == self.old:
            return "old"
        if digests(self.out, data=True) == self.new:
            return "new"
        return f"incomplete {sorted(digests(self.out, data=False))}"

    def left_over(self) -> list[str]:
        """What stands beside a finished output, and should not."""
        mine = {self.out.name} | ({publishing.file_sidecar(self.out).name} if self.scenario.single else set())
        return sorted(path.name for path in self.root.iterdir() if path.name not in mine)


def sweep(base: Path, scenario: Scenario, options: argparse.Namespace) -> Outcome:
    """Kills at each step, or at a sample of them; then in chains of kills at random steps."""
    begun, random_ = time.monotonic(), random.Random(f"{options.seed} {scenario.name}")
    place, outcome, sample = Place(base, scenario, no_swap=options.no_swap), Outcome(scenario.name), options.sample
    first = place.run(None)
    _expect(first)
    names = first["steps"]
    outcome.steps = len(names)
    place.new = digests(place.out, data=True)
    outcome.faults += [f"undisturbed: {fault}" for fault in place.check()]
    outcome.faults += [f"undisturbed: left over {name}" for name in place.left_over()]
    every = range(1, outcome.steps + 1)
    for step in every if sample is None else sorted(random_.sample(every, min(sample, len(every)))):
        _one(place, [step], names, outcome)
    for _ in range(options.chains):
        _one(place, [random_.randint(1, outcome.steps) for _ in range(random_.randint(2, 4))], names, outcome)
    outcome.seconds = round(time.monotonic() - begun, 1)
    return outcome


def _one(place: Place, steps: list[int], names: list[str], outcome: Outcome) -> None:
    """Runs that are killed one after the other, then one that is not."""
    place.reset()
    named = f"{place.scenario.name}, killed at {' + '.join(f'{step} ({names[step - 1]})' for step in steps)}"

    def fault(text: str) -> None:
        outcome.faults.append(f"{named}: {text}")

    allowed = {"new", "old" if place.old is not None else "absent"} | ({"absent"} if place.no_swap else set())
    finished = False
    for step in steps:
        result = place.run(step)
        outcome.runs += 1
        if not result.get("killed"):
            finished = True
            break  # a resumed run has fewer steps, and came to its end
        outcome.kills += 1
        seen = place.sight()
        if seen not in allowed:
            fault(f"a reader sees: {seen}")
        if seen == "new":
            allowed = {"new"}  # what was shown stays
            if not place.scenario.single:
                for line in place.check():
                    fault(f"shown, but {line}")
    if not finished:
        result = place.run(None)
        outcome.runs += 1
    if "exists" in result and not (place.old is None and allowed == {"new"}):
        fault(f"the next run refuses: {result['exists']}")
    elif "steps" not in result:
        fault(f"the next run fails: {result}")
        return
    if digests(place.out, data=True) != place.new:
        fault("the files differ from an undisturbed run's")
    for line in [*place.check(), *(f"left over {name}" for name in place.left_over())]:
        fault(line)


def _cannot(*_: Any) -> None:
    raise OSError(errno.ENOSYS, "no renameat2 here")


def _expect(result: dict[str, Any]) -> None:
    if "error" in result or "killed" in result:
        raise RuntimeError(f"without any kill: {result.get('error', 'killed')}")


def run_all(options: argparse.Namespace) -> list[Outcome]:
    """The scenarios, some side by side in processes of their own."""
    names = [name for name in options.scenarios.split(",") if name]
    chosen = [scenario for scenario in SCENARIOS if not names or scenario.name in names]
    with tempfile.TemporaryDirectory(prefix="fault-steps-") as base:
        waiting, running, outcomes = list(enumerate(chosen)), dict[int, Path](), []
        while waiting or running:
            while waiting and len(running) < options.jobs:
                number, scenario = waiting.pop(0)
                place = Path(base, str(number))
                child = os.fork()
                if child == 0:
                    try:
                        place.mkdir()
                        outcome = sweep(place, scenario, options)
                        place.with_suffix(".json").write_text(json.dumps(vars(outcome)))
                    except BaseException:
                        traceback.print_exc()
                    os._exit(0)
                running[child] = place.with_suffix(".json")
            child, _ = os.wait()
            answer = running.pop(child)
            if not answer.exists():
                raise RuntimeError("a scenario's process died; its error stands above")
            outcomes.append(Outcome(**json.loads(answer.read_text())))
            shutil.rmtree(answer.with_suffix(""), ignore_errors=True)
    return sorted(outcomes, key=lambda outcome: [s.name for s in SCENARIOS].index(outcome.name))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sample", type=int, help="steps of each scenario to kill at; else all")
    parser.add_argument("--chains", type=int, default=10, help="chains of 2 to 4 kills for each scenario")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenarios", default="", help=f"of {','.join(s.name for s in SCENARIOS)}; else all")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--no-swap", action="store_true", help="as if renameat2 were missing: then OUT may be absent")
    parser.add_argument("--out", type=Path, metavar="JSON", help="write the figures there")
    options = parser.parse_args()
    outcomes = run_all(options)
    print(f"{'scenario':24} {'steps':>6} {'kills':>6} {'runs':>6} {'faults':>7} {'seconds':>8}")
    total = Outcome("all")
    for outcome in outcomes:
        total = replace(
            total,
            steps=total.steps + outcome.steps,
            kills=total.kills + outcome.kills,
            runs=total.runs + outcome.runs,
            seconds=total.seconds + outcome.seconds,
            faults=total.faults + outcome.faults,
        )
    for row in [*outcomes, total]:
        print(f"{row.name:24} {row.steps:6} {row.kills:6} {row.runs:6} {len(row.faults):7} {row.seconds:8.1f}")
    for fault in total.faults:
        print(f"fault: {fault}", file=sys.stderr)
    if options.out:
        options.out.write_text(json.dumps([vars(outcome) for outcome in outcomes], indent=1))
    return 1 if total.faults else 0


if __name__ == "__main__":
    sys.exit(main())
