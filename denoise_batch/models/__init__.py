"""The networks, by name.

Each takes noisy images (n, 1, 28, 28) float32 and gives clean ones, the same shape, in 0..1. `logits` is the same
before the last sigmoid. Networks with a bottleneck have `code`, those that know how good they are `has_quality`.

    model = build("bounds-unet")

A newcomer's own network: a module in this folder, and its line in `ARCHITECTURES`.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from denoise_batch.errors import ModelError
from denoise_batch.models.bounds_unet import BoundsUNet
from denoise_batch.models.seed import SeedAutoencoder, TransposedSeedAutoencoder

if TYPE_CHECKING:
    from denoise_batch.models.network import DenoisingNetwork

ARCHITECTURES: dict[str, type[DenoisingNetwork]] = {
    "bounds-unet": BoundsUNet,
    "seed": SeedAutoencoder,
    "seed-transposed": TransposedSeedAutoencoder,
}


def build(architecture: str, parameters: dict[str, Any] | None = None) -> DenoisingNetwork:
    """Makes a network with fresh weights.

    Args:
        architecture: a name in `ARCHITECTURES`.
        parameters: its constructor's arguments; what is left out takes its default.

    Raises:
        ModelError: the name or a parameter is unknown.
    """
    if architecture not in ARCHITECTURES:
        raise ModelError(f"no network is called {architecture!r}", hint=f"there are: {', '.join(ARCHITECTURES)}")
    parameters = parameters or {}
    unknown = sorted(parameters.keys() - inspect.signature(ARCHITECTURES[architecture]).parameters.keys())
    if unknown:
        raise ModelError(
            f"network {architecture!r} has no {', '.join(unknown)}: another version of denoise-batch made it",
            hint="see the network's docstring",
        )
    try:
        return ARCHITECTURES[architecture](**parameters)
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"network {architecture!r} cannot be made from {parameters}: {error}", hint="see the network's docstring"
        ) from error
