"""How many workers find room, and how what is missing is named."""

from __future__ import annotations

import pytest
from ray._private.state import state

from denoise_batch.cluster.capacity import Node, describe_wait, living_nodes, room, threads_for, waiting_for


@pytest.mark.parametrize(
    ("node", "cpus", "gpus", "workers"),
    [
        (Node(8, 0), 0.9, 0.0, 8),
        (Node(8, 0), 3.9, 0.0, 2),
        (Node(0.3, 0), 0.1, 0.0, 3),
        (Node(8, 4), 0.9, 1.0, 4),
        (Node(2, 4), 0.9, 1.0, 2),
        (Node(8, 0), 0.9, 1.0, 0),
        (Node(8, 2), 0.9, 0.5, 4),
        (Node(8, 2), 0.9, 0.6, 2),  # two GPUs, of which each has room for one: not three
        (Node(8, 1.4), 0.9, 0.5, 2),
    ],
)
def test_room_on_a_node(node: Node, cpus: float, gpus: float, workers: int) -> None:
    assert node.room(cpus, gpus) == workers


def test_a_worker_lives_on_one_node() -> None:
    assert room([Node(3, 0), Node(3, 0)], 2.0, 0.0) == 2
    assert room([], 1.0, 0.0) == 0


@pytest.mark.parametrize(
    ("cores", "workers", "threads"),
    [
        ([8], 1, 8),
        ([8], 3, 2),
        ([8], 20, 1),
        ([1, 8], 2, 4),
        ([4, 4], 1, 4),
        ([4, 4], 2, 4),
        ([3, 3], 3, 1),
        ([0], 1, 1),
    ],
)
def test_threads_fill_the_cores_of_the_nodes(cores: list[int], workers: int, threads: int) -> None:
    assert threads_for([Node(count, 0) for count in cores], workers) == threads


@pytest.mark.parametrize(
    ("nodes", "free", "count", "cpus", "gpus", "words"),
    [
        ([Node(2, 0)], [], 1, 0.9, 0.0, "1 CPU: the cluster has none free"),
        ([Node(2, 0)], [Node(1, 0)], 2, 0.9, 0.0, "2 CPUs: the cluster has 1 free"),
        ([Node(8, 0)], [Node(2.1, 0)], 1, 3.9, 0.0, "4 CPUs: the cluster has 2 free"),
        ([Node(1, 0)], [Node(1, 0)], 2, 0.9, 0.0, "2 CPUs: the cluster has 1"),
        ([Node(4, 2)], [Node(4, 0)], 1, 0.9, 1.0, "1 GPU: the cluster has none free"),
        ([Node(4, 2)], [Node(0, 2)], 1, 0.9, 1.0, "1 CPU beside GPUs: the cluster has none free"),
        ([Node(4, 0)], [Node(4, 0)], 1, 0.9, 1.0, "1 GPU: the cluster has none yet"),
        ([Node(8, 2)], [Node(8, 1)], 4, 0.9, 1.0, "4 GPUs: the cluster has 2"),
        ([Node(8, 1)], [Node(8, 0.25)], 1, 0.9, 0.5, "0.5 GPU: the cluster has none free"),
        ([Node(8, 0)], [Node(3, 0)], 2, 3.0, 0.0, "2 × 3 CPUs: the cluster has 3 free"),
        ([Node(2, 0)] * 2, [Node(1, 0)] * 2, 1, 1.9, 0.0, "2 CPUs on one machine: the cluster has 2 free"),
        # A GPU without CPUs is of no use, nor are CPUs elsewhere.
        ([Node(0, 1), Node(16, 1)], [Node(16, 1)], 2, 0.9, 1.0, "2 GPUs: the cluster has 1"),
        (
            [Node(9, 0), Node(4, 1)],
            [Node(9, 0), Node(0, 1)],
            1,
            0.9,
            1.0,
            "1 CPU beside GPUs: the cluster has none free",
        ),
    ],
)
def test_what_is_missing_is_named(
    nodes: list[Node], free: list[Node], count: int, cpus: float, gpus: float, words: str
) -> None:
    assert describe_wait(nodes, free, count, cpus, gpus) == words


def test_what_is_free_on_a_head_without_cpus_is_of_no_use(monkeypatch: pytest.MonkeyPatch) -> None:
    totals = {"head": {"GPU": 1.0}, "worker": {"CPU": 16.0, "GPU": 1.0}}
    found = [{"NodeID": name, "Alive": True, "Resources": each} for name, each in totals.items()]
    monkeypatch.setattr("ray.nodes", lambda: found)
    free = {"head": {"GPU": 1.0}, "worker": {"CPU": 15.0}}
    monkeypatch.setattr(state, "available_resources_per_node", lambda: free)
    assert waiting_for(1, 0.9, 1.0) == "1 GPU: the cluster has none free"


def test_memory_of_gpus_is_told_by_their_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    resources = [
        {"CPU": 16.0, "GPU": 1.0, "accelerator_type:H100": 1.0},
        {"CPU": 8.0, "GPU": 1.0, "accelerator_type:Unheard-Of": 1.0},
        {"CPU": 4.0, "GPU": 2.0},
        {"CPU": 2.0},
    ]
    found = [{"Alive": True, "Resources": each} for each in resources] + [{"Alive": False, "Resources": {"CPU": 1.0}}]
    monkeypatch.setattr("ray.nodes", lambda: found)
    assert living_nodes() == [Node(16, 1, 79), Node(8, 1), Node(4, 2), Node(2, 0)]
