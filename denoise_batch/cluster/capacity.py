"""What a cluster has, what of it is free, and what its autoscaler may bring.

Ray must be connected.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from denoise_batch.errors import FlagError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


_GPU_GIB = {
    "T4": 14, "V100": 15, "L4": 22, "A10": 22, "A10G": 22, "A30": 23, "A100": 39, "A40": 44, "L40": 44, "L40S": 44,
    "H100": 79, "H800": 79, "GH200": 94, "H20": 94, "RTX-PRO-6000": 94, "H200": 139, "B200": 178, "GB200": 178,
    "B300": 267, "GB300": 267,
}  # fmt: skip
"""Memory of the smallest card of a kind, in GiB, by what Ray makes of its product name. A slice of one has less."""


@dataclass(frozen=True, slots=True)
class Node:
    """The CPUs and GPUs of a machine, or what is free of them.

    Attributes:
        cpus, gpus: how many.
        gpu_gib: what each GPU has at least of memory, in GiB; 0 where that is not known.
    """

    cpus: float
    gpus: float
    gpu_gib: float = 0.0

    def room(self, cpus: float, gpus: float) -> int:
        """How many workers of this size find room on it together."""
        most = []
        if cpus > 0:
            most.append(_whole(self.cpus / cpus))
        if gpus > 0:
            # A share is of one GPU: two that are half free are none for a worker that takes more than a half.
            free = math.floor(self.gpus)
            most.append(free * _whole(1 / gpus) + _whole((self.gpus - free) / gpus) if gpus < 1 else free // int(gpus))
        return max(0, min(most, default=0))


def _whole(quotient: float) -> int:
    return math.floor(quotient + 1e-3)  # 0.3 / 0.1 is a little less than 3


def room(nodes: Iterable[Node], cpus: float, gpus: float) -> int:
    """How many workers of this size find room on the nodes: each lives on one."""
    return sum(node.room(cpus, gpus) for node in nodes)


def gpu_nodes(nodes: Iterable[Node]) -> list[Node]:
    """The nodes whose GPUs can be used: each worker takes CPUs too, of which a head often has none to give."""
    return [node for node in nodes if node.gpus and node.cpus]


def no_gpu(nodes: Iterable[Node]) -> FlagError:
    """Why `--device cuda` is refused on these nodes."""
    where = " on a machine that has CPUs to give" if any(node.gpus for node in nodes) else ""
    return FlagError(
        f"--device cuda: Ray finds no GPU{where}",
        hint="give --device cpu or auto; on a cluster that grows, keep one machine with a GPU up (min_workers: 1)",
    )


def threads_for(nodes: Sequence[Node], workers: int) -> int:
    """The most threads for each of so many workers on the nodes' cores; 1 where there are fewer cores than workers."""
    most = int(max(node.cpus for node in nodes))
    fitting = (threads for threads in range(most, 1, -1) if room(nodes, threads, 0) >= workers)
    return next(fitting, 1)


def living_nodes() -> list[Node]:
    """The cluster's living nodes; a head that has neither CPUs nor GPUs to give is none."""
    import ray

    return nodes_of(node for node in ray.nodes() if node["Alive"])


def nodes_of(described: Iterable[dict[str, Any]]) -> list[Node]:
    """Nodes as `ray.nodes()` describes them, without those that have neither CPUs nor GPUs."""
    return _nodes(node["Resources"] for node in described)


def nodes_to_come() -> list[Node]:
    """A node of each kind that the cluster's autoscaler may add, where it tells Ray: that of Ray 2.60 does not."""
    from ray._private.state import state

    config = state.get_cluster_config()
    groups = config.node_group_configs if config is not None else []
    return _nodes(dict(group.resources) for group in groups if group.max_count)


def lost_nodes() -> set[str]:
    """The ids of nodes that the cluster has lost."""
    import ray

    return {node["NodeID"] for node in ray.nodes() if not node["Alive"]}


def own_actors(class_name: str) -> list[dict[str, Any]]:
    """This driver's actors, dead ones too, of classes whose names begin so, as Ray's state gives them."""
    import ray
    from ray._private.state import state

    job = ray.JobID(bytes.fromhex(ray.get_runtime_context().get_job_id()))
    actors = state.actor_table(None, job_id=job).values()
    return [actor for actor in actors if actor["ActorClassName"].startswith(class_name)]


def waiting_for(count: int, cpus: float, gpus: float) -> str | None:
    """What `count` workers of this size wait for, as `1 GPU: the cluster has none free`; None where there is room."""
    import ray
    from ray._private.state import state

    able = {node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")}
    free = _nodes(each for node, each in state.available_resources_per_node().items() if node in able)
    if room(free, cpus, gpus) >= count:
        return None
    return describe_wait(living_nodes(), free, count, cpus, gpus)


def describe_wait(nodes: Sequence[Node], free: Sequence[Node], count: int, cpus: float, gpus: float) -> str:
    """Names the resource that is short: GPUs, where these are, else CPUs; of nodes that have CPUs."""
    nodes = [node for node in nodes if node.cpus]
    by_gpu = gpus > 0 and min(room(nodes, 0, gpus), room(free, 0, gpus)) < count
    if gpus and not by_gpu:  # what is free elsewhere is of no use
        nodes, free = [node for node in nodes if node.gpus], [node for node in free if node.room(0, gpus)]
    each, unit = (gpus, "GPU") if by_gpu else (float(math.ceil(cpus)), "CPU")
    wanted = f"{count * each:g} {unit}{'' if count * each <= 1 else 's'}"
    if count > 1 and each > 1:
        wanted = f"{count} × {each:g} {unit}s"
    if gpus and not by_gpu:
        wanted += " beside GPUs"

    def have(of: Sequence[Node]) -> int:
        return math.floor(sum(node.gpus if by_gpu else node.cpus for node in of) + 1e-3)

    never = room(nodes, 0 if by_gpu else cpus, gpus) < count
    has = have(nodes if never else free)
    if has >= count * each:  # but here and there
        wanted += " on one machine" if count == 1 else " on one machine each"
    return (
        f"{wanted}: the cluster has {has or 'none yet'}" if never else f"{wanted}: the cluster has {has or 'none'} free"
    )


def _nodes(resources: Iterable[dict[str, Any]]) -> list[Node]:
    found = (Node(float(each.get("CPU", 0)), float(each.get("GPU", 0)), _gpu_gib(each)) for each in resources)
    return [node for node in found if node.cpus or node.gpus]


def _gpu_gib(resources: dict[str, Any]) -> float:
    """Ray marks a node with `accelerator_type:H100` and the like; an unknown kind counts as 0."""
    kinds = [name.partition(":")[2] for name in resources if name.startswith("accelerator_type:")]
    return min((_GPU_GIB.get(kind, 0) for kind in kinds), default=0)
