"""What the default network's 8-bit integers stand for: chosen once its weights are trained, kept beside them.

    balance_channels(network, noisy)    # scales channels, which changes nothing but how finely they can be rounded
    choose_cutoffs(network, noisy)      # network.largest: of each layer's values
    choose_integers(network, noisy)     # integers of each layer in network.rounded_layers(): of its weights

`int8` computes with them. Nothing is trained for it, and what the float32 weights make stays the same to the last bit.

A weight rounded to the nearest integer errs by up to half a step, whatever the weights beside it err by. What counts
is their error together, on the values that the layer is given: neighbouring pixels and channels go together, so one
weight's error can be made good for by others'. So a layer's weights are rounded one after the other, and what the error
of those done would add to the output is taken off the next one before it is rounded (Frantar et al., "GPTQ", 2022,
arXiv 2210.17323; in the order and the form of Babai's nearest plane, to which it is the same: Chen et al., 2025, arXiv
2507.18553). Over the seed's mixture that halves what integers lose.
"""

from __future__ import annotations

import contextlib
import functools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from denoise_batch.models.int8 import LARGEST_WEIGHT, LEVELS, plane_steps, rounded_planes, weight_steps

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from denoise_batch.models.bounds_unet import BoundsUNet

_SHARES = tuple(0.9**power for power in range(16))  # of the largest value, that are tried
_TRIED = 320  # images they are tried on
_SEEN = 1536  # images whose values weights are rounded for
_BATCH = 256
_PER_OCTAVE, _REACH = 4, (-40, 64)  # largest values from 2^-10 to 2^16 that are weighed
_OCTAVES = 6  # channels are multiplied by 2^-6 to 2^6
_PLACES = 16_384  # of a batch's values, about, that a layer's weights are rounded for
_STRIDES = (1, 3, 5, 9, 11, 13)  # between them; every column is met, whether there are 7 or 14
_DAMPING = 0.01  # added to the mean square of every input, in units of all inputs' mean: some are always 0
_BLOCK = 128  # weights whose errors are carried on one by one; those of whole blocks go by one product


def balance_channels(network: BoundsUNet, noisy: Tensor) -> None:
    """Scales the channels of each chain by powers of two, so that one step suits all channels of a layer.

    All channels of a layer are rounded to multiples of one step, which is as coarse as the one with the largest values
    makes it. A channel that is multiplied by a factor, and divided by it where it is read, is rounded by so much finer.
    With the gradient of the images towards each channel it is known what rounding it by a step costs, and what cutting
    it off does; factors and largest values are chosen in turn until their sum falls no more.

    Args:
        network: in float32.
        noisy: (n, 1, 28, 28) float32 images, on its device.
    """
    few = noisy[:: -(-len(noisy) // _TRIED)]
    chains = network.chains()
    factors = [_factors(costs) for costs in _costs(network, chains, few)]
    network.scale_channels(*factors)


def _costs(network: BoundsUNet, chains: list[list[nn.Module]], noisy: Tensor) -> list[Tensor]:
    """What it costs to have a channel end at 2^(k / _PER_OCTAVE), for k in `_REACH`: (layers, channels, k) a chain.

    In units of the squared error of all images, to first order.
    """
    kept: dict[nn.Module, Tensor] = {}
    limits = 2.0 ** (torch.arange(*_REACH, device=noisy.device) / _PER_OCTAVE)
    layers = [layer for chain in chains for layer in chain]
    channels = {layer: len(chain[0].bias) for chain in chains for layer in chain}  # type: ignore[arg-type]
    sensitive = {layer: torch.zeros(channels[layer], device=noisy.device) for layer in layers}
    beyond = {layer: torch.zeros(channels[layer], len(limits), device=noisy.device) for layer in layers}
    alive = {layer: torch.zeros(channels[layer], device=noisy.device) for layer in layers}
    places = dict.fromkeys(layers, 0)
    generator = torch.Generator().manual_seed(0)

    def keep(layer: nn.Module, made: Tensor) -> None:
        if made.is_leaf:
            made.requires_grad_()
        kept[layer] = made

    def by_channel(layer: nn.Module, values: Tensor) -> Tensor:
        """(places, channels), whether the layer gives (n, channels, height, width) or (n, places · channels)."""
        values = values.permute(0, 2, 3, 1) if values.ndim == 4 else values
        return values.reshape(-1, channels[layer])

    with torch.enable_grad(), contextlib.ExitStack() as hooked:
        for layer in layers:
            hooked.enter_context(_given(layer, functools.partial(keep, layer)))
        for part in torch.split(noisy, 32):
            made = network(part)
            # Squared gradients of a sum with random signs are, on average, the sum of the squared gradients.
            signs = torch.randint(0, 2, made.shape, generator=generator).to(made.device) * 2.0 - 1.0
            gradients = torch.autograd.grad((made * signs).sum(), [kept[layer] for layer in layers])
            for layer, gradient in zip(layers, gradients, strict=True):
                values = by_channel(layer, kept[layer].detach())
                sensitive[layer] += by_channel(layer, gradient).square().sum(dim=0)
                alive[layer] += (values > 0).sum(dim=0)
                for place, limit in enumerate(limits):
                    beyond[layer][:, place] += (values - limit).clamp_min_(0.0).square_().sum(dim=0)
                places[layer] += len(values)

    def cost(layer: nn.Module) -> Tensor:
        rounded = (limits / LEVELS).square() / 12.0  # of an error that is uniform over a step; 0 has none
        return sensitive[layer][:, None] * (beyond[layer] + alive[layer][:, None] * rounded) / places[layer]

    return [torch.stack([cost(layer) for layer in chain]) for chain in chains]


def _factors(costs: Tensor) -> Tensor:
    """A chain's costs (layers, channels, limits) → its channels' factors (channels,), powers of two."""
    layers, channels, limits = costs.shape
    tried = torch.arange(-_OCTAVES, _OCTAVES + 1, device=costs.device)
    powers = torch.zeros(channels, dtype=torch.long, device=costs.device)
    every, before = torch.arange(limits, device=costs.device), math.inf
    alike = 1e-12 * costs.amax(dim=2).mean() * tried.abs()
    while True:
        # A channel that is multiplied by 2^k ends where its layer's largest value, divided by 2^k, is.
        ends = (every - _PER_OCTAVE * powers[:, None]).clamp(0, limits - 1)
        largest = costs.gather(2, ends.expand(layers, -1, -1)).sum(dim=1).argmin(dim=1)
        ends = (largest[:, None] - _PER_OCTAVE * tried).clamp(0, limits - 1)
        # Where all are alike, as in a channel that is always 0, it stays as it is.
        total, chosen = (costs.gather(2, ends[:, None].expand(-1, channels, -1)).sum(dim=0) + alike).min(dim=1)
        now = float(total.sum())
        if not now < before * (1.0 - 1e-6):
            return torch.exp2(powers.float())
        before, powers = now, tried[chosen]


@torch.no_grad()
def choose_cutoffs(network: BoundsUNet, noisy: Tensor) -> None:
    """Chooses, layer by layer, what the largest of 8-bit values is to stand for: `network.largest`.

    A value as large as any layer gives is rare, mostly stands for a pixel that is beyond doubt, and makes the steps of
    all others coarse. So that share of it is taken with which the image comes out best if this layer alone is rounded:
    the larger values are cut off.

    Args:
        network: in float32.
        noisy: (n, 1, 28, 28) float32 images, on its device.
    """
    layers = network.measured_layers()
    found: list[Tensor] = []
    with contextlib.ExitStack() as hooked:
        for layer in layers:
            hooked.enter_context(_given(layer, lambda made: found.append(made.amax())))
        for part in torch.split(noisy, _BATCH):
            network(part)
    network.largest.copy_(torch.stack(found).view(-1, len(layers)).amax(dim=0))
    few = noisy[:: -(-len(noisy) // _TRIED)]
    exact = network(few)
    for place, layer in enumerate(layers):
        errors: list[float] = []
        for share in _SHARES:
            step = (share * network.largest[place] / LEVELS).clamp_min(1e-9)
            with _given(layer, lambda made, step=step: after_rounding(made, step)):
                errors.append(float((network(few) - exact).square_().mean()))
            if len(errors) > 2 and min(errors[-2:]) > min(errors):  # finer steps gain less than is cut off
                break
        network.largest[place] *= _SHARES[errors.index(min(errors))]


@torch.no_grad()
def choose_integers(network: BoundsUNet, noisy: Tensor) -> None:
    """Rounds the weights of `network.rounded_layers()` to their `integers`, in the order of the pass.

    Each layer is given what the rounded layers before it make of the images, with their values rounded too.

    Args:
        network: in float32, its cut-offs chosen.
        noisy: (n, 1, 28, 28) float32 images, on its device.
    """
    few = noisy[:: -(-len(noisy) // _SEEN)]
    layers = network.rounded_layers()
    exact = [layer.weight.clone() for layer in layers]
    with contextlib.ExitStack() as hooked:
        for layer, largest in zip(network.measured_layers(), network.largest, strict=True):
            step = (largest / LEVELS).clamp_min(1e-9)
            hooked.enter_context(_given(layer, lambda made, step=step: after_rounding(made, step)))
        hooked.enter_context(_taken(network.inlet, rounded_planes))
        try:
            for layer in layers:
                gram = _gram(network, layer, few)
                _round(layer, gram, plane_steps(noisy.device) if layer is network.inlet else None)
        finally:
            for layer, weights in zip(layers, exact, strict=True):
                layer.weight.copy_(weights)


def _round(layer: Any, gram: Tensor, steps_in: Tensor | None) -> None:
    """Chooses a layer's integers, and makes its weights what these stand for; `steps_in` is as `plane_steps` has it."""
    integers = layer.get_buffer("integers")
    count = integers[0].numel()  # the first so many of an output's weights are rounded
    weight, gram = layer.weight.flatten(1)[:, :count], gram[:count, :count]
    scale: Tensor | float = 1.0
    if steps_in is not None:
        scale = steps_in.expand_as(layer.weight[:1]).flatten()
        weight, gram = weight * scale, gram / torch.outer(scale, scale)
    steps = weight_steps(weight)[:, None]
    chosen = nearest_integers(weight / steps, gram)
    integers.copy_(chosen.view_as(integers))
    made = torch.cat([chosen * steps / scale, layer.weight.flatten(1)[:, count:]], dim=1)
    layer.weight.copy_(made.view_as(layer.weight))


def nearest_integers(weight: Tensor, gram: Tensor) -> Tensor:
    """Integers whose products with the inputs are nearest to the weights', one input after the other.

    Args:
        weight: (outputs, inputs), in steps.
        gram: (inputs, inputs), the mean of x xᵀ over inputs x.

    Returns:
        (outputs, inputs) float32, whole numbers from -127 to 127.
    """
    count = len(gram)
    # ‖(w - q) L‖², with L lower triangular, is the error: from the last input to the first each is chosen so that it
    # makes good for those behind it. The strongest go first, while there are many that can.
    order = gram.diagonal().argsort()
    damped = gram[order[:, None], order].double()
    damped.diagonal().add_(_DAMPING * damped.diagonal().mean().clamp_min(1e-12))
    lower = torch.linalg.cholesky(damped)
    wanted = weight.double()[:, order]
    chosen, error = torch.zeros_like(wanted), torch.zeros_like(wanted)
    for stop in range(count, 0, -_BLOCK):
        start = max(0, stop - _BLOCK)
        carried = error[:, stop:] @ lower[stop:, start:stop]
        for place in range(stop - 1, start - 1, -1):
            behind = error[:, place + 1 : stop] @ lower[place + 1 : stop, place]
            aim = wanted[:, place] + (carried[:, place - start] + behind) / lower[place, place]
            chosen[:, place] = aim.round_().clamp_(-LARGEST_WEIGHT, LARGEST_WEIGHT)
            error[:, place] = wanted[:, place] - chosen[:, place]
    return chosen[:, order.argsort()].float()


def after_rounding(values: Tensor, step: Tensor) -> Tensor:
    """What is left of a layer's values where a step stands for 1."""
    return values.div(step).round_().clamp_(0, LEVELS).mul_(step)


def _gram(network: BoundsUNet, layer: nn.Module, noisy: Tensor) -> Tensor:
    """(inputs, inputs) float64: the mean of x xᵀ over what one output of the layer is given."""
    total, count = torch.zeros((), dtype=torch.float64, device=noisy.device), 0
    for part in torch.split(noisy, _BATCH):
        found: list[Tensor] = []
        with contextlib.suppress(_Reached), _taken(layer, found.append, stop=True):
            network(part)
        rows = _rows(layer, found[0])
        rows = rows[:: max(step for step in _STRIDES if step <= max(1, len(rows) / _PLACES))]
        total, count = total + (rows.T @ rows).double(), count + len(rows)
    return total.div_(count)


def _rows(layer: nn.Module, given: Tensor) -> Tensor:
    """What the layer is given → (outputs' places, inputs)."""
    if not isinstance(layer, nn.Conv2d):
        return given.reshape(-1, given.shape[-1])
    assert not isinstance(layer.padding, str)
    patches = functional.unfold(given, layer.kernel_size, padding=layer.padding, stride=layer.stride)
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


class _Reached(Exception):
    """The pass has come as far as it is wanted."""


@contextlib.contextmanager
def _given(layer: nn.Module, see: Any) -> Iterator[None]:
    """Has `see` see what the layer gives, or replace it: by what it returns, unless that is None."""
    handle = layer.register_forward_hook(lambda _, __, made: see(made))
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _taken(layer: nn.Module, see: Any, *, stop: bool = False) -> Iterator[None]:
    """Has `see` see what the layer is given, or replace it; the pass ends there with `_Reached` if it is to stop."""

    def hook(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        made = see(given[0])
        if stop:
            raise _Reached
        return None if made is None else (made, *given[1:])

    handle = layer.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
