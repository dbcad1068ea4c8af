"""What a Ray that is started for one run alone consists of, and that it is gone afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys

DRIVER = """
import contextlib, json, os, time
from pathlib import Path

from denoise_batch.cluster import connect


def commands():
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_bytes().decode(errors="replace").replace("\\0", " ")
                parent = (entry / "stat").read_text().rpartition(") ")[2].split()[1]
                found[int(entry.name)] = (int(parent), command)
    family, size = {os.getpid()}, 0
    while len(family) > size:
        size = len(family)
        family |= {process for process, (parent, _) in found.items() if parent in family}
    return [found[process][1] for process in family - {os.getpid()} if found[process][1]]  # zombies have none


class Double:
    def __call__(self, batch):
        here = {"heaps": os.environ.get("MALLOC_ARENA_MAX"), "niceness": os.nice(0)}
        return {"id": batch["id"] * 2, **{name: [value] * len(batch["id"]) for name, value in here.items()}}


with connect(cpus=2, data_workers=1):
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    pool = ray.data.ActorPoolStrategy(size=1)
    doubled = ray.data.range(10, override_num_blocks=2).map_batches(Double, compute=pool, num_cpus=0.9)
    rows = iter(doubled.iter_rows())
    first, during = next(rows), commands()
    rest = list(rows)
    ids = sorted(row["id"] for row in [first, *rest])
print(json.dumps([ids, first["heaps"], int(first["niceness"]), during, commands()]))
"""


def test_one_run_starts_only_what_it_uses_and_leaves_nothing() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_worker_niceness"}
    command = ["nice", "-n", "1", sys.executable, "-c", DRIVER]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True, env=environment)
    ids, heaps, niceness, during, after = json.loads(done.stdout.splitlines()[-1])
    assert ids == list(range(0, 20, 2))
    assert heaps == "1"
    assert niceness == os.nice(0) + 1  # the command's, not Ray's 15
    kinds = ("gcs_server", "raylet", "agent_stand_in", "ray::")
    counted = [next((kind for kind in kinds if kind in command.partition(" --")[0]), command) for command in during]
    assert {kind: counted.count(kind) for kind in counted if kind != "ray::"} == {
        "gcs_server": 1,
        "raylet": 1,
        "agent_stand_in": 2,
    }
    # The worker, and one that runs the source's tasks.
    assert 1 <= counted.count("ray::") <= 3, during
    assert after == []
