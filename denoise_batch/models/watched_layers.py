"""Looks into a network while it runs: what its layers are given and give, and the image's gradients towards that."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from denoise_batch.models.network import DenoisingNetwork


def some_of(images: Tensor, count: int) -> Tensor:
    """So many of (n, …), spread over all; not each so many-th, for each so many-th image of a training is empty."""
    if len(images) <= count:
        return images
    return images[torch.linspace(0, len(images) - 1, count).round().long().to(images.device)]


def gradients(
    network: DenoisingNetwork, layers: list[Any], noisy: Tensor
) -> Iterator[tuple[list[Tensor], tuple[Tensor, ...]]]:
    """What layers give, and the gradients towards it of the images that are made, a few images at a time.

    The gradients are those of a sum of the pixels with random signs: their products are, on average, what they are
    summed up over the pixels, one by one.
    """
    kept: dict[Any, Tensor] = {}
    generator = torch.Generator().manual_seed(0)

    def keep(layer: Any, made: Tensor) -> None:
        if made.is_leaf:
            made.requires_grad_()
        kept[layer] = made

    with contextlib.ExitStack() as hooked:
        for layer in layers:
            hooked.enter_context(on_output(layer, functools.partial(keep, layer)))
        for part in torch.split(noisy, 32):
            with torch.enable_grad():
                made = torch.sigmoid(network.logits(part))  # what the gate does to it comes after all layers
                signs = torch.randint(0, 2, made.shape, generator=generator).to(made.device) * 2.0 - 1.0
                towards = torch.autograd.grad((made * signs).sum(), [kept[layer] for layer in layers])
            yield [kept[layer].detach() for layer in layers], towards


def by_channel(layer: nn.Module, values: Tensor, count: int) -> Tensor:
    """(places, channels): convolutions have (n, channels, height, width), others (…, channels)."""
    values = values.detach()
    return (values.permute(0, 2, 3, 1) if isinstance(layer, nn.Conv2d) else values).reshape(-1, count)


class Reached(Exception):
    """The pass has come as far as it is wanted."""


@contextlib.contextmanager
def on_output(layer: nn.Module, see: Any) -> Iterator[None]:
    """Has `see` see what the layer gives, or replace it: by what it returns, unless that is None."""
    handle = layer.register_forward_hook(lambda _, __, made: see(made))
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def on_input(layer: nn.Module, see: Any, *, stop: bool = False) -> Iterator[None]:
    """Has `see` see what the layer is given, or replace it; the pass ends there with `Reached` if it is to stop."""

    def hook(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        made = see(given[0])
        if stop:
            raise Reached
        return None if made is None else (made, *given[1:])

    handle = layer.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
