"""Where training's workers run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from denoise_batch.capacity import Node
from denoise_batch.errors import FlagError
from denoise_batch.training.place import Place, choose_place
from denoise_batch.training.recipes import Device, TrainSettings

if TYPE_CHECKING:
    from denoise_batch.worker_count import WorkerCount

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
    ],
)
def test_places(nodes: list[Node], workers: WorkerCount | None, place: Place) -> None:
    assert choose_place(replace(SETTINGS, workers=workers), nodes, []) == place


def test_gpus_that_an_autoscaler_may_bring_are_waited_for() -> None:
    assert choose_place(replace(SETTINGS, workers=8), [LAPTOP], [GPU_NODE]).gpu


def test_gpus_that_are_not_there_are_refused() -> None:
    for settings in (replace(SETTINGS, device=Device.CUDA), replace(SETTINGS, device=Device.CUDA, workers=(1, 2))):
        with pytest.raises(FlagError, match=r"^--device cuda: Ray finds no GPU$"):
            choose_place(settings, [LAPTOP], [])
    with pytest.raises(FlagError, match="--workers 5 on GPUs, but Ray sees 4"):
        choose_place(replace(SETTINGS, workers=5), [GPU_NODE], [])
