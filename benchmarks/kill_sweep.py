"""Kills real runs at random moments, goes on with the same command, and compares what comes out with undisturbed runs.

    python benchmarks/kill_sweep.py --kills 100 --seed 0 [--kinds driver,group,actor,midwrite,node,step] [--out JSON]
    python benchmarks/kill_sweep.py --kills 0 --races 20
    python benchmarks/kill_sweep.py --kills 0 --resume-cost

driver    SIGKILL to the driver alone; half of the times an actor is stopped before and wakes up in the next run
group     SIGKILL to everything that the driver started
actor     SIGKILL to an actor that works
midwrite  SIGKILL to an actor that has a staged file open
node      a cluster of three nodes on this machine loses one with an actor on it, and gets a new one
step      the driver dies at a random step that it takes on the disk (all steps, without Ray: `commit_steps.py`)

Half of the runs replace another output, a quarter joins all units into one file. All the while a reader looks at OUT.
Prints a table: rows lost and doubled, files whose bytes differ, sights of an output that was neither the old nor the
new one as a whole, files where none should be. Exits 1 where any of these is not 0. About ten seconds a kill.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from kill_runs import Driver, Nodes, actors, kill, kill_session, open_files
from kill_world import UNITS, Run, Tally, World

KINDS = ("driver", "group", "actor", "midwrite", "node", "step")
SHARE = {"driver": 20, "group": 15, "actor": 20, "midwrite": 15, "node": 10, "step": 20}
MOST_IN_A_RUN = 7  # kills of actors; of three attempts at a unit not all may be killed


class Sweep:
    """The kills of one kind, over as many runs as they take."""

    def __init__(self, world: World, kind: str, wanted: int, seed: int) -> None:
        self.world, self.kind, self.wanted = world, kind, wanted
        self.random = random.Random(f"{seed} {kind}")
        self.tally = Tally(kind)
        self.nodes: Nodes | None = None

    def sweep(self) -> Tally:
        begun = time.monotonic()
        if self.kind == "node":
            self.nodes = Nodes(2, self.world.log)
        try:
            while self.tally.kills < self.wanted:
                self._one_run()
        finally:
            if self.nodes:
                self.nodes.clean()
        self.tally.seconds = round(time.monotonic() - begun, 1)
        return self.tally

    def _one_run(self) -> None:
        chained = self.kind in {"driver", "group", "step"}
        single = chained and self.random.random() < 0.25
        run = Run(self.world, overwrite=self.random.random() < 0.5, single=single, workers=1 if chained else 2)
        before = self.tally.kills
        with run.watched():
            try:
                driver = self._start(run)
                while self.tally.kills < self.wanted and self._strike(run, driver):
                    driver = self._start(run)
                code = driver.finish()
                run.judge(code, self.tally)
            except TimeoutError as error:
                self.tally.faults.append(f"{self.kind}, after kill {self.tally.kills}: {error}")
        if self.tally.kills == before:
            self.tally.empty_runs += 1
            if self.tally.empty_runs > 5:
                raise RuntimeError(f"{self.kind}: kills do not reach their targets")

    def _start(self, run: Run) -> Driver:
        kill_at = None
        if self.kind == "step" and self.tally.kills < self.wanted:
            # A resumed run takes fewer steps: some come to their end.
            kill_at = self.random.randint(1, self.world.steps(single=run.single))
        return run.start(kill_at, self.nodes.address if self.nodes else None)

    def _strike(self, run: Run, driver: Driver) -> bool:
        """Kills; whether the driver died of it, so that the next is to go on."""
        if self.kind == "step":
            dead = driver.finish() == -signal.SIGKILL
            self.tally.kills += dead
            return dead
        if self.kind in {"driver", "group"}:
            return self._kill_driver(run, driver)
        attack = {"actor": self._kill_actor, "midwrite": self._kill_writer, "node": self._kill_node}[self.kind]
        in_this_run = 0
        while (
            self.tally.kills < self.wanted
            and in_this_run < MOST_IN_A_RUN
            and driver.until(lambda: driver.units > 0, "a receipt")
            and driver.units < UNITS * 0.6
        ):
            if attack(run, driver):
                self.tally.kills += 1
                in_this_run += 1
                units = driver.units
                if not driver.until(lambda seen=units: driver.units > seen, "a receipt after the kill"):
                    break
        return False

    def _kill_driver(self, run: Run, driver: Driver) -> bool:
        chance, random_ = self.random.random(), self.random
        if chance < 0.25:
            time.sleep(random_.uniform(0.2, 6.0))
        elif chance < 0.8:
            wanted = random_.randint(1, 4)
            driver.until(lambda begun=driver.units: driver.units >= begun + wanted, "receipts")
            time.sleep(random_.uniform(0.0, 0.3))
        else:
            driver.until(lambda: driver.phase == "publishing", "the end of the units", 0.001)
            time.sleep(random_.uniform(0.0, 0.03 if not run.single else 2.0))
        sleepers = actors(driver.session)
        if self.kind == "driver" and sleepers and random_.random() < 0.5:
            for sleeper in sleepers:
                kill(sleeper, signal.SIGSTOP)
                run.wake(sleeper, random_.uniform(1.0, 14.0))
        if not driver.running:
            return False
        kill(driver.process.pid)
        if self.kind == "group":
            kill_session(driver.session)
        dead = driver.finish() == -signal.SIGKILL
        self.tally.kills += dead
        return dead

    def _kill_actor(self, _: Run, driver: Driver) -> bool:
        time.sleep(self.random.uniform(0.0, 1.0))
        found = actors(driver.session)
        return bool(found) and kill(self.random.choice(found))

    def _kill_writer(self, run: Run, driver: Driver) -> bool:
        """Waits for a staged file that is open, and half of the times for its first page."""
        least = self.random.choice([0, 5])
        found: list[int] = []

        def look() -> bool:
            for pid in actors(driver.session):
                for name in open_files(pid, run.staging):
                    try:
                        grown = os.path.getsize(name) >= least  # noqa: PTH202
                    except OSError:
                        continue
                    if grown and name.endswith(".parquet"):
                        found.append(pid)
                        return kill(pid)
            return False

        return driver.until(look, "a staged file", 0.0) and bool(found)

    def _kill_node(self, *_: object) -> bool:
        assert self.nodes
        time.sleep(self.random.uniform(0.0, 2.0))
        victims = self.nodes.victims()
        if not victims:
            time.sleep(0.2)
            return False
        self.nodes.tell(f"kill {self.random.choice(victims)}")
        self.nodes.tell("add")
        return True


# --- races and costs --------------------------------------------------------------------------------------------------


@dataclass
class Races:
    """Two runs on one output, started at the same moment."""

    races: int = 0
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0


def race(world: World, count: int, seed: int) -> Races:
    """One must win with an output that verifies, the other must say in one line why it does not go on."""
    random_, found, begun = random.Random(f"{seed} races"), Races(), time.monotonic()
    for number in range(count):
        run = Run(world, overwrite=number % 2 == 1, single=False, workers=1, files=2)
        command = [sys.executable, "-m", "denoise_batch.cli", "infer", run.settings["inputs"][0], str(run.out)]
        command += ["--model", str(world.model), "--workers", "1", *(["--overwrite"] if run.overwrite else [])]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        with run.watched():
            first = subprocess.Popen(command, **pipes)
            time.sleep(random_.choice([0.0, 0.0, random_.uniform(0.0, 0.5)]))
            second = subprocess.Popen(command, **pipes)
            ended = []
            for process in (first, second):
                try:
                    _, errors = process.communicate(timeout=120)
                except subprocess.TimeoutExpired:
                    errors = "it hangs"
                kill_session(process.pid)
                ended.append((process.wait(), errors))
            codes = sorted(code for code, _ in ended)
            lost = next((text for code, text in ended if code), "")
            if codes != [0, 2] or sum(line.startswith("error: ") for line in lost.splitlines()) != 1:
                found.faults.append(f"race {number}: exit codes {codes}, {lost!r}")
            tally = Tally("races")
            run.judge(0, tally)
            found.faults += [f"race {number}: {line}" for line in tally.lines()]
        found.races += 1
    found.seconds = round(time.monotonic() - begun, 1)
    return found


def resume_cost(world: World, units: int) -> dict[str, float]:
    """What a kill at half-way costs: seconds until the kill and of the next run, against an undisturbed run's."""
    whole = Run(world, overwrite=False, single=False, workers=1, files=units)
    driver = whole.start()
    assert driver.finish() == 0
    undisturbed = time.monotonic() - driver.begun
    assert driver.first_receipt is not None
    start_up = driver.first_receipt - driver.begun
    driver.clean()
    run = Run(world, overwrite=False, single=False, workers=1, files=units)
    driver = run.start()
    driver.until(lambda: driver.units >= units // 2, "half of the units")
    kill(driver.process.pid)
    kill_session(driver.session)
    before = time.monotonic() - driver.begun
    again = run.start()
    assert again.finish() == 0
    resumed = time.monotonic() - again.begun
    tally = Tally("resume cost")
    run.judge(0, tally)
    limit = 1.05 * undisturbed + start_up
    figures = {
        "units": units,
        "undisturbed_s": undisturbed,
        "start_up_s": start_up,
        "until_kill_s": before,
        "resumed_s": resumed,
        "both_s": before + resumed,
        "limit_s": limit,
        "faults": len(tally.lines()),
    }
    return {name: round(value, 2) for name, value in figures.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=100, help="in all, shared out over the kinds")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--races", type=int, default=0)
    parser.add_argument("--resume-cost", action="store_true")
    parser.add_argument("--out", type=Path, metavar="JSON", help="write the figures there")
    options = parser.parse_args()
    kinds = [kind for kind in options.kinds.split(",") if kind]
    if set(kinds) - set(KINDS):
        parser.error(f"there are the kinds {', '.join(KINDS)}")
    report: dict[str, object] = {}
    bad = False
    with tempfile.TemporaryDirectory(prefix="kill-sweep-") as base:
        world = World(Path(base))
        if options.kills:
            tallies = []
            weights = sum(SHARE[kind] for kind in kinds)
            print(Tally.heading(), flush=True)
            for kind in kinds:
                wanted = max(1, round(options.kills * SHARE[kind] / weights))
                tallies.append(Sweep(world, kind, wanted, options.seed).sweep())
                print(tallies[-1].row(), flush=True)
            print(Tally.total(tallies).row(), flush=True)
            for tally in tallies:
                for fault in tally.lines():
                    print(f"fault: {fault}", file=sys.stderr, flush=True)
                    bad = True
            report["kills"] = [asdict(tally) for tally in tallies]
        if options.races:
            races = race(world, options.races, options.seed)
            print(f"races: {races.races}, faults {len(races.faults)}, {races.seconds:.0f} s", flush=True)
            for fault in races.faults:
                print(f"fault: {fault}", file=sys.stderr, flush=True)
            report["races"], bad = asdict(races), bad or bool(races.faults)
        if options.resume_cost:
            cost = resume_cost(world, 60)
            print("resume cost: " + ", ".join(f"{name} {value:g}" for name, value in cost.items()), flush=True)
            report["resume_cost"] = cost
            bad = bad or cost["both_s"] > cost["limit_s"] or bool(cost["faults"])
    if options.out:
        options.out.write_text(json.dumps(report, indent=1))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
