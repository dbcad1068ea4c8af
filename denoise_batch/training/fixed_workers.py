"""Ray Train's policy for a fixed number of workers, on a machine whose Ray has no autoscaler.

A module of its own, since Ray Train's controller imports it, in a process of its own. It is beneath Ray's public
interface: only `lean_ray` uses it, where this can be imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy, create_scaling_policy

if TYPE_CHECKING:
    from ray.train import ScalingConfig


class AskingNobody(FixedScalingPolicy):  # type: ignore[misc]
    """As Ray's own, but no actor is started to ask an autoscaler for room."""

    def after_controller_start(self, *_args: Any, **_kwargs: Any) -> None:
        """Ray's own starts that actor here, and waits for it."""

    def _maybe_send_resource_request(self) -> None:
        """Nobody would answer."""


def scaling_policy(scaling_config: ScalingConfig) -> Any:
    """In place of Ray Train's `create_scaling_policy`; a number that may change is left to that."""
    if scaling_config.elasticity_enabled:
        return create_scaling_policy(scaling_config)
    return AskingNobody(scaling_config=scaling_config)
