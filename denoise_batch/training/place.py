"""Where the training's workers run: how many, on what, with how many threads and how much memory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from denoise_batch.cluster.capacity import Node, gpu_nodes, no_gpu, room, threads_for
from denoise_batch.errors import FlagError
from denoise_batch.process.control_groups import groups_of
from denoise_batch.training.recipes import Device

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from denoise_batch.training.recipes import TrainSettings

_MOST_CPU_WORKERS = 4


@dataclass(frozen=True)
class Place:
    """Where the workers run.

    Attributes:
        workers: how many: the fewest and the most.
        gpu: whether each has a GPU.
        cpus: what each asks of Ray; less than it uses, so that Ray's own tasks always find room.
        threads: of torch in each.
        workers_on_node: how many may share a machine's memory.
    """

    workers: tuple[int, int]
    gpu: bool
    cpus: float
    threads: int
    workers_on_node: int

    @property
    def resources(self) -> dict[str, float]:
        return {"CPU": self.cpus, "GPU": 1} if self.gpu else {"CPU": self.cpus}


def choose_place(settings: TrainSettings, nodes: Sequence[Node], to_come: Sequence[Node]) -> Place:
    """Chooses the workers' devices and threads from what the cluster has, and may come to have.

    Raises:
        FlagError: it has not the GPUs that are asked for, and has no autoscaler that may bring some.
    """
    gpus, coming = int(sum(node.gpus for node in gpu_nodes(nodes))), gpu_nodes(to_come)
    gpu = settings.device is Device.CUDA or (settings.device is Device.AUTO and (gpus > 0 or bool(coming)))
    if gpu and not gpus and not coming:
        raise no_gpu(nodes)
    nodes = (gpu_nodes(nodes) or coming) if gpu else list(nodes) or list(to_come) or [Node(1, 0)]
    cores = max(1, int(sum(node.cpus for node in nodes)))
    # A core each: processes of one thread stand a busy machine better than threads that wait for each other.
    given = settings.workers or (max(1, gpus) if gpu else min(cores, _MOST_CPU_WORKERS))
    fewest, most = (given, given) if isinstance(given, int) else given
    if gpu and fewest > gpus and not coming:
        raise FlagError(
            f"--workers {fewest} on GPUs, but Ray sees {gpus}", hint="lower --workers, or give --device cpu"
        )
    threads = threads_for(nodes, most)
    # Whole requests that fill the machine would leave nothing to schedule anything else with, and Ray would wait
    # for ever: each worker asks for a little less than it uses. In sixty-fourths, which add up without rounding: Ray
    # Train divides by it to count how many find room.
    share = min(node.cpus / node.gpus for node in nodes) if gpu else cores / fewest
    cpus = 0.875 * min(1.0, share) if threads == 1 or gpu else float(threads - 1)
    cpus = max(1, int(cpus * 64)) / 64
    while not gpu and cpus > 1 / 64 and room(nodes, cpus, 0) < fewest:  # a worker's share must lie on one node
        cpus -= 1 / 64
    beside = max(node.room(cpus, 1.0 if gpu else 0.0) for node in nodes)
    return Place((fewest, most), gpu, cpus, threads, max(1, min(beside, most)))


def quarter_of_memory(device: torch.device) -> int:
    """Bytes: a quarter of this machine's memory, or of what its control groups leave this process.

    With a GPU a quarter of the GPU's, and at most half of that of the machine, where what goes to the GPU is first
    built, at about twice its size.
    """
    quarter = min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_memory_limits()]) // 4
    if device.type != "cuda":
        return quarter
    import torch

    return min(int(torch.cuda.mem_get_info(device)[1]) // 4, quarter // 2)


def _memory_limits() -> Iterator[int]:
    """The bytes that each control group around this process allows: Slurm's, systemd's, a container's.

    Linux's cgroup v2 has them in `memory.max`, "max" where there is no limit, v1 in `memory.limit_in_bytes`, which is
    then more than any machine has.
    """
    for group in groups_of("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            try:
                text = (group / name).read_text(encoding="ascii").strip()
            except (OSError, ValueError):  # the root has none, nor has a group of the other kind
                continue
            if text.isdigit():
                yield int(text)
