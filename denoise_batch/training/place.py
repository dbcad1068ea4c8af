"""Where the training's workers run: how many, on what, with how many threads and how much memory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from denoise_batch.capacity import Node, threads_for
from denoise_batch.errors import FlagError
from denoise_batch.training.recipes import Device

if TYPE_CHECKING:
    from collections.abc import Sequence

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
    gpus, coming = int(sum(node.gpus for node in nodes)), any(node.gpus for node in to_come)
    gpu = settings.device is Device.CUDA or (settings.device is Device.AUTO and (gpus > 0 or coming))
    nodes = [node for node in nodes if node.gpus or not gpu] or list(to_come) or [Node(1, 0)]
    cores = max(1, int(sum(node.cpus for node in nodes)))
    # A core each: processes of one thread stand a busy machine better than threads that wait for each other.
    given = settings.workers or (max(1, gpus) if gpu else min(cores, _MOST_CPU_WORKERS))
    fewest, most = (given, given) if isinstance(given, int) else given
    if gpu and not gpus and not coming:
        raise FlagError("--device cuda: Ray finds no GPU", hint="give --device cpu or auto")
    if gpu and fewest > gpus and not coming:
        raise FlagError(
            f"--workers {fewest} on GPUs, but Ray sees {gpus}", hint="lower --workers, or give --device cpu"
        )
    threads = threads_for(nodes, most)
    # Whole requests that fill the machine would leave nothing to schedule anything else with, and Ray would wait
    # for ever: each worker asks for a little less than it uses. In sixty-fourths, which add up without rounding: Ray
    # Train divides by it to count how many find room.
    cpus = 0.875 * min(1.0, cores / fewest) if threads == 1 or gpu else float(threads - 1)
    cpus = max(1, int(cpus * 64)) / 64
    beside = max(node.room(cpus, 1.0 if gpu else 0.0) for node in nodes)
    return Place((fewest, most), gpu, cpus, threads, max(1, min(beside, most)))


def quarter_of_memory(device: torch.device) -> int:
    """Bytes: a quarter of the GPU's memory, or of what this machine or container has."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[1]) // 4
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text(encoding="ascii").strip()).isdigit():
        memory = min(memory, int(text))
    return memory // 4
