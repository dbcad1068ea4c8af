"""How many cores this process may use: a container or a batch system often gives it fewer than the machine has.

Threads that share a core spend their time waiting for each other, and where a container's share of time is used up all
of them stand still. Ray and torch count what they find in the machine, each in its own way.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

from denoise_batch.process.control_groups import groups_of

if TYPE_CHECKING:
    from collections.abc import Iterator

THREADS = "OMP_NUM_THREADS"
"""The environment variable by which torch, NumPy and Arrow choose their number of threads."""


def cores_here() -> int:
    """Whole cores, at least one: those that the process may run on, and no more than its control groups give it time.

    So `taskset`, Slurm, `docker run --cpus` and a Kubernetes limit count.
    """
    allowed = getattr(os, "sched_getaffinity", None)
    cores = len(allowed(0)) if allowed else os.cpu_count() or 1
    return max(1, int(min([cores, *_shares()])))


def threads_here(threads: int) -> int:
    """Of so many threads, as many as there are cores for."""
    return min(threads, cores_here())


def limit_threads() -> None:
    """Sets the number of threads of libraries that load later, and of processes that are started, where control groups
    give fewer cores than these libraries count; unless the environment says it already.
    """
    if min(_shares(), default=math.inf) < (os.cpu_count() or 1):
        os.environ.setdefault(THREADS, str(cores_here()))


def _shares() -> Iterator[float]:
    """The cores' worth of time of each control group with a limit that this process is in.

    Linux's cgroup v2 has it in `cpu.max`, "quota period" or "max period", v1 in two files, of which the quota is -1
    where there is none.
    """
    for group in groups_of("cpu"):
        try:
            if (group / "cpu.max").exists():
                quota, period = (group / "cpu.max").read_text(encoding="ascii").split()
            else:
                quota, period = (
                    (group / f"cpu.cfs_{name}_us").read_text(encoding="ascii").strip() for name in ("quota", "period")
                )
        except (OSError, ValueError):  # the root has none, and other systems have no groups
            continue
        if quota.isdigit() and period.isdigit() and int(period):
            yield int(quota) / int(period)
