"""Where training's workers run."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from denoise_batch.cluster.capacity import Node, room
from denoise_batch.errors import FlagError
from denoise_batch.process import control_groups
from denoise_batch.training.place import Place, choose_place, quarter_of_memory
from denoise_batch.training.recipes import Device, TrainSettings

if TYPE_CHECKING:
    from denoise_batch.cluster.worker_count import WorkerCount

SETTINGS = TrainSettings(Path("model"))
LAPTOP, GPU_NODE = Node(2, 0), Node(16, 4)


@pytest.mark.parametrize(
    ("nodes", "workers", "place"),
    [
        ([LAPTOP], None, Place((2, 2), False, 0.875, 1, 2)),
        ([LAPTOP], 1, Place((1, 1), False, 1.0, 2, 1)),
        ([LAPTOP], 3, Place((3, 3), False, 37 / 64, 1, 3)),  # three share two cores, and all find room
        ([Node(64, 0)], None, Place((4, 4), False, 15.0, 16, 4)),
        ([Node(1, 0), Node(1, 0)], 2, Place((2, 2), False, 0.875, 1, 1)),
        ([LAPTOP], (2, 8), Place((2, 8), False, 0.875, 1, 2)),
        ([Node(1, 0)], (2, 8), Place((2, 8), False, 28 / 64, 1, 2)),
        ([LAPTOP, GPU_NODE], None, Place((4, 4), True, 0.875, 4, 4)),
        ([LAPTOP, GPU_NODE], (2, 8), Place((2, 8), True, 0.875, 2, 4)),
        # A head that has a GPU, and no CPUs to give.
        ([Node(0, 1), *[Node(16, 1)] * 4], None, Place((4, 4), True, 0.875, 16, 1)),
        ([Node(0, 1), LAPTOP], None, Place((2, 2), False, 0.875, 1, 2)),
        ([Node(1, 2), Node(15, 2)], None, Place((4, 4), True, 28 / 64, 3, 2)),  # all find room
    ],
)
def test_places(nodes: list[Node], workers: WorkerCount | None, place: Place) -> None:
    assert choose_place(replace(SETTINGS, workers=workers), nodes, []) == place


@pytest.mark.parametrize(
    ("cores", "workers"), [([1, 1], 3), ([2, 2], 5), ([2, 2], 7), ([4, 4], 11), ([2, 1], 4), ([1.5, 1.5], 3)]
)
def test_more_workers_than_cores_find_room_though_each_lives_on_one_node(cores: list[float], workers: int) -> None:
    nodes = [Node(each, 0) for each in cores]
    place = choose_place(replace(SETTINGS, workers=workers, device=Device.CPU), nodes, [])
    assert room(nodes, place.cpus, 0) >= workers
    assert place.cpus * workers < sum(cores)  # Ray's own tasks find room too


def test_gpus_that_an_autoscaler_may_bring_are_waited_for() -> None:
    assert choose_place(replace(SETTINGS, workers=8), [LAPTOP], [GPU_NODE]).gpu


def test_gpus_that_are_not_there_are_refused() -> None:
    for settings in (replace(SETTINGS, device=Device.CUDA), replace(SETTINGS, device=Device.CUDA, workers=(1, 2))):
        with pytest.raises(FlagError, match=r"^--device cuda: Ray finds no GPU$"):
            choose_place(settings, [LAPTOP], [])
    with pytest.raises(FlagError, match="--workers 5 on GPUs, but Ray sees 4"):
        choose_place(replace(SETTINGS, workers=5), [GPU_NODE], [])


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Control groups of a machine with 64 GiB, so far without a limit."""
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 16 << 20}.__getitem__)
    monkeypatch.setattr(control_groups, "_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(control_groups, "_OWN_GROUPS", tmp_path / "own")
    return tmp_path


@pytest.mark.parametrize(
    ("own", "limits", "memory"),
    [
        ("0::/\n", {}, 64 << 30),
        ("0::/\n", {"memory.max": "max"}, 64 << 30),
        ("0::/\n", {"memory.max": str(8 << 30)}, 8 << 30),  # a container's
        ("0::/\n", {"memory.max": str(1 << 40)}, 64 << 30),
        ("0::/slurm/job/step\n", {"slurm/job/step/memory.max": "max", "slurm/job/memory.max": str(4 << 30)}, 4 << 30),
        ("0::/a.slice/b\n", {"a.slice/b/memory.max": str(6 << 30), "a.slice/memory.max": str(7 << 30)}, 6 << 30),
        ("0::/a.slice\n", {"b.slice/memory.max": str(1 << 30)}, 64 << 30),  # others'
        ("5:memory:/docker/1f\n", {"memory/memory.limit_in_bytes": str(2 << 30)}, 2 << 30),
        ("5:cpu:/1\n4:memory:/1\n0::/\n", {"memory/1/memory.limit_in_bytes": str(3 << 30)}, 3 << 30),
        ("5:memory:/docker/1f\n", {"memory/memory.limit_in_bytes": "9223372036854771712"}, 64 << 30),  # none
    ],
)
def test_the_smallest_limit_of_memory_around_the_process_counts(
    groups: Path, own: str, limits: dict[str, str], memory: int
) -> None:
    (groups / "own").write_text(own)
    for name, content in limits.items():
        path = groups / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    assert quarter_of_memory(torch.device("cpu")) == memory // 4


def test_without_control_groups_the_machines_memory_counts(groups: Path) -> None:
    assert not (groups / "own").exists()
    assert quarter_of_memory(torch.device("cpu")) == 16 << 30


@pytest.mark.parametrize(("gpu", "held"), [(24, 6), (80, 8)])
def test_a_gpus_images_are_built_on_the_machine_first(
    groups: Path, monkeypatch: pytest.MonkeyPatch, gpu: int, held: int
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, gpu << 30))
    assert quarter_of_memory(torch.device("cuda")) == held << 30
    (groups / "own").write_text("0::/\n")
    (groups / "cgroup").mkdir()
    (groups / "cgroup" / "memory.max").write_text(f"{16 << 30}\n")
    assert quarter_of_memory(torch.device("cuda")) == 2 << 30
