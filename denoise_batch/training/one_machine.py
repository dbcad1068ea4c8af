"""Ray Train on a Ray that was started here, without actors that have no use there (`lean_ray` has the rest).

Four are left out, each a process that takes two seconds of a core to start:

- one hands out shares of datasets of Ray Data, of which there are none;
- one asks an autoscaler for room; it stays where the number of workers may change, since it also tells how many find
  room;
- one watches for nodes that are about to be taken away, which this machine is not;
- one removes what a dead controller leaves. It asks the dashboard whether the controller lives, and without a dashboard
  each question waits ten seconds for an answer, the controller's end for the last one. A Ray that was started for the
  training ends with it, so there is nothing to remove.

All of this is beneath Ray's public interface: with other versions than those that it was tried with, or where this
module cannot be imported, Ray Train starts as it comes.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from ray._private import worker
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy, create_scaling_policy
from ray.train.v2.api import data_parallel_trainer as trainer

from denoise_batch.cluster.lean_ray import is_tried, replaced
from denoise_batch.process.environment import environment

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ray.train import ScalingConfig


@contextlib.contextmanager
def only_what_is_used() -> Iterator[None]:
    """While it lasts, Ray Train starts none of these actors, if this process started Ray, without a dashboard.

    A cluster's is left as it is, but that nothing asks a dashboard that is not there.
    """
    node = worker._global_node
    with contextlib.ExitStack() as stack:
        if is_tried() and node is not None and not node.webui_url:
            stack.enter_context(replaced(trainer, "PlacementGroupCleanerCallback", ControllerCallback))
            if node.is_head():
                stack.enter_context(environment({"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}))
                stack.enter_context(replaced(trainer, "DatasetsCallback", _no_datasets))
                stack.enter_context(replaced(trainer, "create_scaling_policy", _scaling_policy))
        yield


class AskingNobody(FixedScalingPolicy):  # type: ignore[misc]
    """Ray Train's policy for a fixed number of workers, without the actor that asks an autoscaler for room.

    It travels to Ray Train's controller, a process of its own.
    """

    def after_controller_start(self, *_args: Any, **_kwargs: Any) -> None:
        """Ray's own starts that actor here, and waits for it."""

    def _maybe_send_resource_request(self) -> None:
        """Nobody would answer."""


def _scaling_policy(scaling_config: ScalingConfig) -> Any:
    if scaling_config.elasticity_enabled:
        return create_scaling_policy(scaling_config)
    return AskingNobody(scaling_config=scaling_config)


def _no_datasets(**_: Any) -> Any:
    return ControllerCallback()
