"""Which nodes are asked whether they see a run's files."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from denoise_batch.cluster import shared_files

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


@pytest.mark.parametrize(
    ("cpus", "gpus", "asked"),
    [(0.9, 0.0, {"small", "large", "gpu"}), (3.9, 0.0, {"large"}), (0.9, 0.25, {"gpu"})],
)
def test_only_nodes_that_have_room_for_a_worker_are_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpus: float, gpus: float, asked: set[str]
) -> None:
    resources = {
        "here": {"CPU": 4.0, "GPU": 1.0},
        "head": {"GPU": 1.0},
        "small": {"CPU": 1.0},
        "large": {"CPU": 4.0},
        "gpu": {"CPU": 2.0, "GPU": 1.0},
    }
    nodes = [
        {"NodeID": name, "NodeManagerAddress": name, "Alive": True, "Resources": each}
        for name, each in resources.items()
    ]
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "here"))
    found: set[str] = set()

    def look(nodes: Sequence[str], _: object) -> dict[str, str]:
        found.update(nodes)
        return {}

    monkeypatch.setattr(shared_files, "unseen_on_nodes", look)
    shared_files.check_seen_by_nodes(tmp_path, [], cpus, gpus)
    assert found == asked
