"""How many actors denoise, and what each takes of the cluster: a single-threaded one a core, or several on each GPU.

A GPU computes faster than one actor reads and writes Parquet, so cores decide there as well (docs/benchmarks.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from denoise_batch.cluster.capacity import Node, gpu_nodes, no_gpu, room, threads_for
from denoise_batch.errors import FlagError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from denoise_batch.cluster.worker_count import WorkerCount


_MOST_ON_A_GPU = 16
"""More were not faster (docs/benchmarks.md)."""
_ACTOR_GIB = 1.75
"""Of a GPU's memory for each: it takes some 1.3, and a little room must be left."""
_GPU_GIB = 14.0
"""The smallest GPUs of today's clouds, which an unknown one is taken for."""


@dataclass(frozen=True, slots=True)
class PoolSize:
    """How many actors, and what each takes.

    Attributes:
        least: so many are asked for, room or not: an autoscaler makes it.
        actors: that find room now; the run begins with them.
        most: the pool grows to so many as machines join.
        threads: of torch, in each.
        cpus, gpus: what each asks of Ray.
    """

    least: int
    actors: int
    most: int
    threads: int
    cpus: float
    gpus: float


def pool_size(
    nodes: Sequence[Node],
    workers: WorkerCount | None,
    device: str,
    units: int,
    *,
    gpu_share: float | None = None,
    to_come: Sequence[Node] = (),
) -> PoolSize:
    """Sizes the pool for the cluster as it is; whatever joins later is used by more actors of the same size.

    Args:
        nodes: the living ones.
        workers: the most actors, or the fewest and the most, or None: as many as the units can use.
        device: `auto`, `cpu` or `cuda`.
        units: of the whole run, so that a resumed or retried part of it computes with the same threads.
        gpu_share: of a GPU, for each actor; None: an actor for each core that a GPU has beside it, on the node
            where these are fewest; at most 16, as many as fit in its memory (eight where that is not known), and no
            more than are needed.
        to_come: a node of each kind that the autoscaler may add.

    Raises:
        FlagError: `cuda` or a share of a GPU was asked for, and no node has a GPU beside CPUs or may get one.
    """
    low, high = (1, workers or units) if not isinstance(workers, tuple) else workers
    most = max(1, min(high, units))
    with_gpus = gpu_nodes(nodes) or gpu_nodes(to_come)
    if device == "cuda" and not with_gpus:
        raise no_gpu(nodes)
    if gpu_share is not None and (device == "cpu" or not with_gpus):
        raise FlagError("--gpus-per-worker: there is no GPU to share", hint="leave it out")
    if device != "cpu" and with_gpus:
        if gpu_share is None:
            cores_each = int(min(node.cpus / node.gpus for node in with_gpus))
            # Ray fills one GPU before it takes the next: few actors must not all sit on the first.
            needed = math.ceil(most / sum(node.gpus for node in with_gpus))
            fitting = int(min(node.gpu_gib or _GPU_GIB for node in with_gpus) / _ACTOR_GIB)
            beside = max(1, min(cores_each, needed, fitting, _MOST_ON_A_GPU))
            gpu_share = math.floor(1e4 / beside) / 1e4  # Ray counts ten-thousandths
        cores = min(node.cpus / max(1, node.room(0, gpu_share)) for node in with_gpus)  # of an actor
        # Less than the whole: a pool that takes every CPU leaves none for Ray Data's other operators, and hangs.
        threads, cpus, gpus = max(1, int(cores)), round(0.9 * min(1.0, cores), 3), gpu_share
    else:
        threads = threads_for(nodes or to_come or [Node(1, 0)], most)
        cpus, gpus = threads - 0.1, 0.0
    now = max(1, min(room(nodes, cpus, gpus), most))
    least = min(low, most)
    return PoolSize(least, max(least, now), most, threads, cpus, gpus)
