"""Whether the nodes of a cluster see the files that a run is about."""

from __future__ import annotations

import contextlib
import os
import uuid
from typing import TYPE_CHECKING

from denoise_batch.cluster import capacity
from denoise_batch.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

_LOOK_SECONDS = 60.0
"""For a worker to start on a node and look for files."""


def check_seen_by_nodes(folder: Path | None, paths: Sequence[Path], cpus: float, gpus: float) -> None:
    """Refuses a cluster whose nodes do not share the files that a run is about; before the run's work begins.

    A small task looks for them on each node that has room for one of the run's workers. A node that does not answer in
    time is no reason: it may be lost again before it is given any work. Ray must be connected.

    Args:
        folder: the run's own, existing folder: the nodes look for a new file in it, since another folder of the same
            name may be on their own disks. None where the output is in an object store.
        paths: what else they must see: inputs, a model.
        cpus, gpus: what a worker of the run takes.

    Raises:
        RequestError: naming the path and the node.
    """
    import ray

    here = ray.get_runtime_context().get_node_id()
    others = {
        node["NodeID"]: node["NodeManagerAddress"]
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] != here and capacity.room(capacity.nodes_of([node]), cpus, gpus)
    }
    if not others:
        return
    # A name that no node has looked for before: network file systems remember what was not there.
    probe = folder / f"probe-{uuid.uuid4().hex}" if folder else None
    if probe:
        probe.touch()
    try:
        unseen = unseen_on_nodes(others, [probe, *paths] if probe else paths)
    finally:
        if probe:
            probe.unlink(missing_ok=True)
    for node, path in unseen.items():
        raise not_seen(str(folder) if probe and path == str(probe) else path, others[node])


def not_seen(path: Path | str, machine: str) -> RequestError:
    return RequestError(
        f"{path} is not seen by the cluster's machine {machine}",
        hint="put inputs, model and output on a file system that all machines mount at the same place; inputs and "
        "output may also be URIs such as s3://bucket/folder",
    )


def unseen_on_nodes(nodes: Iterable[str], paths: Sequence[Path]) -> dict[str, str]:
    """The first of the paths that is not there on a node, by the node's id; nodes that see all of them are left out."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look = ray.remote(num_cpus=0, max_retries=0)(first_unseen)
    wanted = [str(path) for path in paths]
    asked = {
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(wanted): node
        for node in nodes
    }
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_LOOK_SECONDS)
    found: dict[str, str] = {}
    for answer in answered:
        with contextlib.suppress(ray.exceptions.RayError):  # a node that went meanwhile
            path = ray.get(answer)
            if path is not None:
                found[asked[answer]] = path
    return found


def first_unseen(paths: Sequence[str]) -> str | None:
    """The first of the paths that this machine does not see."""
    return next((path for path in paths if not os.path.lexists(path)), None)
