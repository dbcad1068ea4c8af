"""Actors by what the cluster has, what it may come to have, and what is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from denoise_batch.cluster.capacity import Node
from denoise_batch.errors import FlagError
from denoise_batch.inference.pool_size import PoolSize, pool_size

if TYPE_CHECKING:
    from denoise_batch.cluster.worker_count import WorkerCount

HEAD, LAPTOP, GPU_NODE = Node(4, 0), Node(2, 0), Node(16, 4)


@pytest.mark.parametrize(
    ("nodes", "workers", "units", "size"),
    [
        # A single-threaded actor a core, and as many more as the units can use once machines join.
        ([LAPTOP], None, 100, PoolSize(1, 2, 100, 1, 0.9, 0.0)),
        ([LAPTOP], None, 1, PoolSize(1, 1, 1, 2, 1.9, 0.0)),
        ([LAPTOP, LAPTOP], None, 100, PoolSize(1, 4, 100, 1, 0.9, 0.0)),
        ([LAPTOP], 1, 100, PoolSize(1, 1, 1, 2, 1.9, 0.0)),
        ([LAPTOP, Node(8, 0)], 2, 100, PoolSize(1, 2, 2, 4, 3.9, 0.0)),
        # A range: the fewest are asked for, room or not.
        ([LAPTOP], (1, 8), 100, PoolSize(1, 2, 8, 1, 0.9, 0.0)),
        ([LAPTOP], (4, 8), 100, PoolSize(4, 4, 8, 1, 0.9, 0.0)),
        ([LAPTOP], (4, 8), 3, PoolSize(3, 3, 3, 1, 0.9, 0.0)),
        # One for each core of the nodes that have GPUs, as far as these hold them.
        ([HEAD, GPU_NODE], None, 100, PoolSize(1, 16, 100, 1, 0.9, 0.25)),
        ([HEAD, GPU_NODE, Node(8, 1)], 3, 100, PoolSize(1, 3, 3, 4, 0.9, 1.0)),
        ([Node(6, 1)], None, 100, PoolSize(1, 6, 100, 1, 0.9, 0.1666)),
        ([Node(32, 1)], None, 100, PoolSize(1, 8, 100, 4, 0.9, 0.125)),
        # As many as fit in its memory, where that is known; the smallest GPU says how many.
        ([Node(32, 1, 79)], None, 100, PoolSize(1, 16, 100, 2, 0.9, 0.0625)),
        ([Node(32, 1, 22)], None, 100, PoolSize(1, 12, 100, 2, 0.9, 0.0833)),
        ([Node(16, 1, 79), Node(16, 1)], None, 100, PoolSize(1, 16, 100, 2, 0.9, 0.125)),
        ([Node(1, 2)], None, 100, PoolSize(1, 2, 100, 1, 0.45, 1.0)),
        # A head that has a GPU, and no CPUs to give.
        ([Node(0, 1), Node(16, 1)], None, 100, PoolSize(1, 8, 100, 2, 0.9, 0.125)),
        ([Node(0, 1), LAPTOP], None, 100, PoolSize(1, 2, 100, 1, 0.9, 0.0)),
        # Few actors have a GPU each.
        ([Node(64, 8)], 8, 1000, PoolSize(1, 8, 8, 8, 0.9, 1.0)),
        ([Node(16, 1)] * 4, None, 8, PoolSize(1, 8, 8, 8, 0.9, 0.5)),
    ],
)
def test_sizes(nodes: list[Node], workers: WorkerCount | None, units: int, size: PoolSize) -> None:
    assert pool_size(nodes, workers, "auto", units) == size


def test_a_share_of_a_gpu_puts_several_actors_on_each() -> None:
    assert pool_size([GPU_NODE], None, "cuda", 100, gpu_share=0.5) == PoolSize(1, 8, 100, 2, 0.9, 0.5)
    assert pool_size([GPU_NODE], None, "cuda", 100, gpu_share=1.0) == PoolSize(1, 4, 100, 4, 0.9, 1.0)


def test_cpu_is_cpu_where_there_are_gpus() -> None:
    assert pool_size([GPU_NODE], None, "cpu", 100).gpus == 0


@pytest.mark.parametrize(("nodes", "device"), [([HEAD], "auto"), ([GPU_NODE], "cpu")])
def test_a_share_of_no_gpu_is_refused(nodes: list[Node], device: str) -> None:
    with pytest.raises(FlagError, match="--gpus-per-worker"):
        pool_size(nodes, None, device, 100, gpu_share=0.5)


def test_gpus_that_an_autoscaler_may_bring_are_waited_for() -> None:
    for device in ("auto", "cuda"):
        assert pool_size([HEAD], None, device, 100, to_come=[GPU_NODE]) == PoolSize(1, 1, 100, 1, 0.9, 0.25)


@pytest.mark.parametrize("to_come", [[], [HEAD]])
def test_cuda_is_refused_where_no_node_has_or_may_get_a_gpu(to_come: list[Node]) -> None:
    with pytest.raises(FlagError, match=r"^--device cuda: Ray finds no GPU$") as caught:
        pool_size([HEAD], None, "cuda", 100, to_come=to_come)
    assert "min_workers: 1" in caught.value.hint  # no autoscaler of Ray's tells what it may start
    with pytest.raises(FlagError, match=r"^--device cuda: Ray finds no GPU on a machine that has CPUs to give$"):
        pool_size([Node(0, 1)], None, "cuda", 100, to_come=to_come)
