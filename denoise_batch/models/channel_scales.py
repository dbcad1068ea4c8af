"""Scales of the default network's channels: they change nothing but how finely 8-bit integers can follow."""

from __future__ import annotations

import contextlib
import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from denoise_batch.models.int8 import LARGEST_WEIGHT, LEVELS
from denoise_batch.models.watched_layers import by_channel, gradients, on_input, some_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from denoise_batch.models.bounds_unet import BoundsUNet

_TRIED = 320  # images, about, on which costs are measured
_PER_OCTAVE, _REACH = 4, (-40, 64)  # largest values from 2^-10 to 2^16 that are weighed
_OCTAVES = 6  # channels are multiplied by 2^-6 to 2^6
_FALLS = 1.0 - 1e-5  # a cost that falls by less does not


def balance_channels(network: BoundsUNet, noisy: Tensor) -> None:
    """Scales the channels of each chain by powers of two, so that one step suits all channels of a layer.

    All channels of a layer are rounded to multiples of one step, which is as coarse as the one with the largest values
    makes it. A channel that is multiplied by a factor, and divided by it where it is read, is rounded by so much finer.
    So are the weights that read the others, where the largest of an output's weights was one that read this channel.
    With the gradient of the images towards each channel it is known what all this costs, and what cutting a value off
    does; factors and largest values are chosen together, one channel after the other, until the sum falls no more.

    Args:
        network: in float32.
        noisy: (n, 1, 28, 28) float32 images, on its device.
    """
    few = some_of(noisy, _TRIED)
    network.scale_channels(*(factors(chain).to(noisy.device) for chain in _measured(network, few)))


@dataclass(frozen=True)
class Reader:
    """A layer whose rounded weights read a chain's channels; all on the CPU.

    Attributes:
        largest: of the absolute weights of each output that read each channel, (outputs, channels).
        taps: weights of each output that read one channel.
        read: mean square of each channel, (channels,).
        sensitive: sum of the squared gradients of the images towards each output before its ReLU, (outputs,).
    """

    largest: Tensor
    taps: int
    read: Tensor
    sensitive: Tensor

    def cost(self, scales: Tensor) -> float:
        """What rounding the weights to the nearest costs once the channels are multiplied by `scales`."""
        steps = (self.largest / scales).amax(dim=1) / LARGEST_WEIGHT
        noise = steps.square() / 12.0 * self.taps * float((scales.square() * self.read).sum())
        return float((self.sensitive * noise).sum())


@dataclass(frozen=True)
class Chain:
    """What it costs to round a chain's channels, in units of the squared error of all images, to first order.

    Attributes:
        ends: of having a layer's channel end at 2^(k / _PER_OCTAVE), for k in `_REACH`: (layers, channels, k).
        readers: what reads the channels.
    """

    ends: Tensor
    readers: list[Reader]

    def cost(self, powers: Tensor) -> float:
        """Of multiplying the channels by 2^powers, (channels,) int64, with the best largest value for each layer."""
        ended = self.ends.gather(2, self._places(powers).expand(len(self.ends), -1, -1)).sum(dim=1)
        return float(ended.amin(dim=1).sum()) + sum(reader.cost(torch.exp2(powers.float())) for reader in self.readers)

    def _places(self, powers: Tensor) -> Tensor:
        """Where channels end whose layer ends at each k: (channels, k). One that is multiplied ends so much earlier."""
        limits = self.ends.shape[2]
        return (torch.arange(limits) - _PER_OCTAVE * powers[:, None]).clamp(0, limits - 1)

    def as_values_would_have_it(self, powers: Tensor) -> Tensor:
        """The powers that are best for rounding values alone, given the largest values that are best for `powers`."""
        layers, channels, limits = self.ends.shape
        best = self.ends.gather(2, self._places(powers).expand(layers, -1, -1)).sum(dim=1).argmin(dim=1)
        tried = torch.arange(-_OCTAVES, _OCTAVES + 1)
        places = (best[:, None] - _PER_OCTAVE * tried).clamp(0, limits - 1)
        return tried[self.ends.gather(2, places[:, None].expand(-1, channels, -1)).sum(dim=0).argmin(dim=1)]


def factors(chain: Chain) -> Tensor:
    """(channels,), powers of two: none of which can be moved by two octaves at most and the cost falls."""
    channels = chain.ends.shape[1]
    powers = torch.zeros(channels, dtype=torch.long)
    before, now = math.inf, chain.cost(powers)
    while now < before * _FALLS:
        before = now
        together = chain.as_values_would_have_it(powers)
        if chain.cost(together) < now * _FALLS:
            powers, now = together, chain.cost(together)
        for channel in range(channels):
            for octaves in (-1, 1, -2, 2):
                moved = powers.clone()
                moved[channel] += octaves
                if abs(int(moved[channel])) <= _OCTAVES and chain.cost(moved) < now * _FALLS:
                    powers, now = moved, chain.cost(moved)
    return torch.exp2(powers.float())


def _measured(network: BoundsUNet, noisy: Tensor) -> list[Chain]:
    """What rounding costs in the network's chains, seen on images."""
    chains, readers = network.chains(), network.readers()
    limits = 2.0 ** (torch.arange(*_REACH, device=noisy.device) / _PER_OCTAVE)
    width = {layer: len(layer.bias) for layers in readers for layer in layers}
    width |= {layer: len(chain[0].bias) for chain in chains for layer in chain}  # `expand` has as many at each place
    zeros = functools.partial(torch.zeros, device=noisy.device)
    beyond = {layer: zeros(width[layer], len(limits)) for chain in chains for layer in chain}
    alive, sensitive = ({layer: zeros(width[layer]) for layer in beyond} for _ in range(2))
    read = {layer: zeros(layer.weight.shape[1]) for layers in readers for layer in layers}
    sensitive_before_relu = {layer: zeros(width[layer]) for layer in read}
    made_at, read_at = dict.fromkeys(width, 0), dict.fromkeys(read, 0)

    def look(layer: Any, values: Tensor) -> None:
        values = by_channel(layer, values, layer.weight.shape[1])
        read[layer] += values.square().sum(dim=0)
        read_at[layer] += len(values)

    with contextlib.ExitStack() as hooked:
        for layer in read:
            hooked.enter_context(on_input(layer, functools.partial(look, layer)))
        for made, towards in gradients(network, list(width), noisy):
            for layer, values, gradient in zip(width, made, towards, strict=True):
                values, gradient = (by_channel(layer, part, width[layer]) for part in (values, gradient))
                if layer in read:
                    sensitive_before_relu[layer] += (gradient * (values > 0)).square().sum(dim=0)
                if layer not in beyond:
                    continue
                sensitive[layer] += gradient.square().sum(dim=0)
                alive[layer] += (values > 0).sum(dim=0)
                for place, limit in enumerate(limits):
                    beyond[layer][:, place] += (values - limit).clamp_min_(0.0).square_().sum(dim=0)
                made_at[layer] += len(values)

    def ends(layer: nn.Module) -> Tensor:
        rounded = (limits / LEVELS).square() / 12.0  # of an error that is uniform over a step; 0 has none
        return sensitive[layer][:, None] * (beyond[layer] + alive[layer][:, None] * rounded) / made_at[layer]

    def reader(layer: Any) -> Reader:
        weight = layer.weight.detach().flatten(2) if layer.weight.ndim == 4 else layer.weight.detach()[:, :, None]
        measured = weight.abs().amax(dim=2), read[layer] / read_at[layer], sensitive_before_relu[layer]
        largest, squares, towards = (values.cpu() for values in measured)
        return Reader(largest, weight.shape[2], squares, towards)

    return [
        Chain(torch.stack([ends(layer) for layer in chain]).cpu(), [reader(layer) for layer in layers])
        for chain, layers in zip(chains, readers, strict=True)
    ]
