"""The default network's pass in 8-bit integers, for CPUs that multiply these faster than any other numbers.

Every layer of `BoundsUNet` ends in a ReLU, so what it gives lies between 0 and a largest value, which a training
chooses at its end and keeps with the weights (`BoundsUNet.largest`). 255 stands for it, and for what is larger. A
weight is one of 255 multiples of a step that its output channel has; which one a training chooses as well (`rounding`).
oneDNN multiplies such numbers, sums them up, and makes the next 8 bits on the way out of the product. No two weights
are so large that a processor without units for this would not sum up exactly (`LARGEST_PAIR`). What costs next to
nothing stays as it is: the inner layers of the bottleneck, and the logits, which are float32.

These are the operations that PyTorch's own quantization for x86 leads to; called by name, they need no compiler on the
user's machine.
"""

from __future__ import annotations

import functools
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from denoise_batch.models.fused_layers import FUSED
from denoise_batch.models.noise_signs import not_a_number, range_ends
from denoise_batch.models.pixel_groups import grouped, side_by_side
from denoise_batch.models.two_scales import Passed

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from denoise_batch.models.bounds_unet import BoundsUNet

_OPERATIONS = ("qconv_prepack", "qconv2d_pointwise", "qlinear_prepack", "qlinear_pointwise")
INT8 = FUSED and all(hasattr(torch.ops.onednn, name) for name in _OPERATIONS)
"""Whether this PyTorch has the operations at all."""

LEVELS = 255
"""The largest of an activation's integers."""
LARGEST_WEIGHT = 127
"""The largest of a weight's."""
LARGEST_PAIR = 128
"""The largest sum of two neighbouring channels' weights, of those above 0 and of those below.

Processors of before VNNI add their products up in 16 bits, and what is more than 32,767 they cut off without a word:
255 times 128 is not. So all processors make the same of the same integers, whatever the values are.
"""

# The first layer's input: pixels and r̂ in fiftieths, -2 to 3.1; what lies in 0 to 1, or mostly does, in finer steps:
# the bounds, and what else the range's ends say.
_ZERO, _PER_UNIT, _FINE_PER_UNIT = 100, 50.0, 150.0
_SIGNS_PER_UNIT = (_PER_UNIT, _FINE_PER_UNIT, _FINE_PER_UNIT, _FINE_PER_UNIT)

_NEAR = 0.1
"""Of a layer's weights: how far its integers may be from them. Chosen ones are within a twentieth."""


def plane_steps(device: torch.device | None = None) -> Tensor:
    """What 1 stands for in each of the first layer's planes, (1, 16, 1, 1)."""
    per_unit = [_PER_UNIT] * 4 + [_FINE_PER_UNIT] * 8 + [*_SIGNS_PER_UNIT]
    return (1.0 / torch.tensor(per_unit, dtype=torch.float32, device=device)).view(1, -1, 1, 1)


def stands_for(layer: nn.Module, scale: Tensor | float = 1.0) -> bool:
    """Whether a layer's integers can have been chosen for the weights that it has, with the steps that these have now.

    Those of another version's steps, or of weights that were trained on for long, are far away; it is no checksum.

    Args:
        layer: with `integers`, which may be of the first so many inputs alone.
        scale: of the weights, as `_Conv` has it.
    """
    integers, weight = layer.get_buffer("integers"), layer.get_parameter("weight").detach()
    weight = weight[:, : integers.shape[1]] * scale
    away = integers * weight_steps(weight).view(-1, *[1] * (weight.ndim - 1)) - weight
    return pairs_fit(integers) and bool(torch.linalg.vector_norm(away) <= _NEAR * torch.linalg.vector_norm(weight))


def pairs_fit(integers: Tensor) -> bool:
    """Whether no two of a layer's integers, (outputs, channels, …), are more than `LARGEST_PAIR` together."""
    return float(_pair_sums(integers.float()).max()) <= LARGEST_PAIR


@functools.cache
def sums_exactly() -> bool:
    """Whether this processor, with this PyTorch, sums up whatever such integers and values give: it is tried."""
    generator = torch.Generator().manual_seed(0)
    pairs = torch.tensor([[127, 1], [1, 127], [64, 64], [-127, -1], [-1, -127], [-64, -64], [127, -127], [100, 28]])
    drawn = pairs[torch.randint(len(pairs), (32, 9, 16), generator=generator)].to(torch.int8)
    drawn[:6] = pairs[:6, None, None]  # (outputs, taps, pairs, 2)
    x = torch.randint(256, (32, 14, 14), generator=generator).to(torch.uint8)
    x[:, :7] = LEVELS
    images, rows = x[None].contiguous(memory_format=torch.channels_last), x.view(-1, 32)
    conv, linear = nn.Conv2d(32, 32, 3, padding=1, bias=False).float(), nn.Linear(32, 32, bias=False).float()
    with torch.no_grad():
        for layer, integers in ((conv, drawn.view(32, 3, 3, 32).permute(0, 3, 1, 2)), (linear, drawn[:, 0].flatten(1))):
            layer.weight.copy_(integers)  # so that a step is 1
            layer.register_buffer("integers", integers.contiguous())
        multiply = _Linear(linear, 1.0, None)
        made = _Conv(conv, 1.0, None)(images), multiply(rows), multiply(rows[:1])  # one row alone goes another way
        exact = conv.double()(images.double()), linear.double()(rows.double())
    return all(torch.equal(one.double(), other) for one, other in zip(made, (*exact, exact[1][:1]), strict=True))


def rounded_planes(planes: Tensor) -> Tensor:
    """What is left of the first layer's input."""
    steps = plane_steps(planes.device)
    return planes.div(steps).add_(_ZERO).round_().clamp_(0, LEVELS).sub_(_ZERO).mul_(steps)


_FLOAT32: tuple[Any, ...] = (1.0, 0, torch.float32, "none", [], "")  # as an output: no step, no ReLU


class IntegerPass:
    """The pass of a network, from its weights as they are when this is made: float32, integers and cut-offs chosen."""

    def __init__(self, network: BoundsUNet) -> None:
        inlet, fine_in, down, *steps = (network.largest / LEVELS).clamp_min(1e-9).tolist()
        coarse_in, steps = [down, *steps[: len(network.coarse_in)]], steps[len(network.coarse_in) :]
        whole, expand, *steps = steps
        coarse_out, (up, join, fine_out) = [expand, *steps[:-3]], steps[-3:]
        self._coarse_step, self._fine_step, self._whole_step = coarse_out[-1], fine_out, whole
        self._inlet = _Conv(network.inlet, 1.0, inlet, zero=_ZERO, scale=plane_steps())
        self._signs_per_unit = torch.tensor(_SIGNS_PER_UNIT, dtype=torch.float32)
        self._fine_in = _Conv(network.fine_in, inlet, fine_in)
        self._down = _Conv(network.down, fine_in, down)
        self._coarse_in = _chain(network.coarse_in, coarse_in)
        self._squeeze = _Linear(network.squeeze, coarse_in[-1], None)
        flat = network.squeeze.get_buffer("integers").shape[1]  # what comes behind these are the range's ends
        self._squeeze_ends = network.squeeze.weight[:, flat:].T.contiguous()
        self._whole = network.whole
        self._expand = _Linear(network.expand, whole, expand, coarse_in[-1])
        self._coarse_out = _chain(network.coarse_out, coarse_out)
        self._up = _Linear(network.up, coarse_out[-1], up)
        self._join = _Conv(network.join, up, join, fine_in)
        self._fine_out = _Conv(network.fine_out, join, fine_out)
        self._outlet = _Conv(_twofold(network.outlet), fine_out, None)
        self._feature = _Conv(_twofold(network.quality.feature), fine_out, None)

    def __call__(self, noisy: Tensor) -> Passed:
        """(n, 1, 28, 28) float32 → what the network gives."""
        count, pixels, ends = noisy.shape[0], grouped(noisy), range_ends(noisy)
        none_beyond = not bool(ends[:, 4:].any())
        read = self._inlet(self._planes(pixels, ends[:, None, :4], none_beyond=none_beyond))
        fine_in = self._fine_in(read, _copy(read))
        coarse = self._down(fine_in)
        for layer in self._coarse_in:
            coarse = layer(coarse, _copy(coarse))
        flat = coarse.permute(0, 2, 3, 1).reshape(count, -1)
        whole = torch.addmm(self._squeeze(flat), ends, self._squeeze_ends).relu_()
        whole = self._whole(whole.to(next(self._whole.parameters()).dtype))
        wide = self._expand(_as_integers(whole / self._whole_step), flat)
        coarse = wide.view(count, 7, 7, -1).permute(0, 3, 1, 2)
        for layer in self._coarse_out:
            coarse = layer(coarse, _copy(coarse))
        up = self._up(coarse.permute(0, 2, 3, 1).reshape(count * 49, -1))
        # (n, 7, 7, (2, 2, width)) → (n, 14, 14, width)
        up = up.view(count, 7, 7, 2, -1).transpose(2, 3).reshape(count, 14, 14, -1)
        joined = self._join(up.permute(0, 3, 1, 2), fine_in)
        fine = self._fine_out(joined, _another(joined, fine_in))
        logits = _joined(self._outlet(fine)).permute(0, 2, 3, 1).add_(not_a_number(ends)[:, None, None, None])
        steps = (self._coarse_step, self._fine_step)
        return Passed(logits, whole, coarse, fine, pixels, ends, *steps, lambda fine: _joined(self._feature(fine)))

    def _planes(self, pixels: Tensor, signs: Tensor, *, none_beyond: bool) -> Tensor:
        """(n, 196, 4), (n, 1, 4) → the planes that `TwoScales` has, (n, 16, 14, 14) uint8."""
        if none_beyond:  # then there is no half range, and both bounds are the pixel
            lower = upper = _as_integers((pixels * _FINE_PER_UNIT).add_(_ZERO))
        else:
            half_range = signs[..., :1]
            lower = _as_integers((pixels - half_range).clamp_min_(0.0).mul_(_FINE_PER_UNIT).add_(_ZERO))
            upper = _as_integers((pixels + half_range).clamp_max_(1.0).mul_(_FINE_PER_UNIT).add_(_ZERO))
        read = _as_integers((pixels * _PER_UNIT).add_(_ZERO))
        told = _as_integers((signs * self._signs_per_unit).add_(_ZERO))
        return side_by_side(read, lower, upper, told)


class _Conv:
    """relu(conv(x)) of uint8, or relu(other + conv(x)), which `other` is turned into, too.

    Args:
        layer: in float32, with `integers`.
        step_in, step_out: what 1 stands for; without `step_out` conv(x) comes as float32.
        step_other: of what is added; None where it is x's.
        zero: what stands for 0 in x.
        scale: of the weights, where x's channels have steps of their own; `step_in` is 1 then.
    """

    def __init__(
        self,
        layer: nn.Conv2d,
        step_in: float,
        step_out: float | None,
        step_other: float | None = None,
        *,
        zero: int = 0,
        scale: Tensor | float = 1.0,
    ) -> None:
        integers, self._steps = layer.get_buffer("integers"), weight_steps(layer.weight * scale)
        self._zero = zero
        self._bias, self._step_in, self._step_out = layer.bias, step_in, step_out
        self._step_other = step_in if step_other is None else step_other
        self._zeros = torch.zeros(len(self._steps), dtype=torch.int32)
        self._shape = [list(layer.stride), list(layer.padding), list(layer.dilation), layer.groups]
        self._weight = torch.ops.onednn.qconv_prepack(integers, self._steps, step_in, zero, *self._shape)

    def __call__(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        given = (x, self._step_in, self._zero, self._weight, self._steps, self._zeros)
        out: tuple[Any, ...] = _FLOAT32 if self._step_out is None else (self._step_out, 0, torch.uint8, "relu", [], "")
        made: Tensor
        if other is None:
            made = torch.ops.onednn.qconv2d_pointwise(*given, self._bias, *self._shape, *out)
        else:
            out = (*out[:3], self._step_other, 0, "sum", 1.0, *out[3:])
            made = torch.ops.onednn.qconv2d_pointwise.binary(*given, other, self._bias, *self._shape, *out)
        return made


class _Linear:
    """relu(linear(x)) of uint8, or relu(other + linear(x)), which takes other's place.

    Args:
        layer: in float32, with `integers`, which may be of the first so many inputs alone.
        step_in, step_out: as `_Conv` has it.
        step_other: of what is added.
    """

    def __init__(self, layer: nn.Linear, step_in: float, step_out: float | None, step_other: float = 1.0) -> None:
        integers = layer.get_buffer("integers")
        self._steps = weight_steps(layer.weight[:, : integers.shape[1]])
        self._bias, self._step_in, self._step_out, self._step_other = layer.bias, step_in, step_out, step_other
        self._zeros = torch.zeros(len(self._steps), dtype=torch.int32)
        self._weight = torch.ops.onednn.qlinear_prepack(integers, None)

    def __call__(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        given = (x, self._step_in, 0, self._weight, self._steps, self._zeros)
        out: tuple[Any, ...] = _FLOAT32 if self._step_out is None else (self._step_out, 0, torch.uint8, "relu", [], "")
        made: Tensor
        if other is None:
            made = torch.ops.onednn.qlinear_pointwise(*given, self._bias, *out)
        else:
            out = (*out[:3], self._step_other, 0, "sum", 1.0, *out[3:])
            made = torch.ops.onednn.qlinear_pointwise.binary(*given, other, self._bias, *out)
        return made


def _chain(layers: Iterable[Any], steps: Sequence[float]) -> list[_Conv]:
    """Convolutions one after the other; `steps` has one more: the first one's input's."""
    return [_Conv(layer, *pair) for layer, pair in zip(layers, pairwise(steps), strict=True)]


def _twofold(layer: nn.Conv2d) -> nn.Conv2d:
    """A layer of twice the outputs, whose second half is what the first half's rounding has left (`_joined`).

    The last layer has four outputs, which take no less time than eight; its rounding would go straight into pixels.
    Weights of the quality head cut off to one integer would be 0.2 dB in what it says; two take 2 µs an image longer.
    Both halves are rounded towards 0, so that no pair becomes too large.
    """
    steps = weight_steps(layer.weight).view(-1, 1, 1, 1)
    coarsely = (layer.weight / steps).trunc()
    left = layer.weight - coarsely * steps
    finely = (left / weight_steps(left).view(-1, 1, 1, 1)).trunc()
    twofold = nn.Conv2d(layer.in_channels, 2 * layer.out_channels, 1, bias=False)
    twofold.weight = nn.Parameter(torch.cat([layer.weight, left]), requires_grad=False)
    if layer.bias is not None:
        twofold.bias = nn.Parameter(torch.cat([layer.bias, torch.zeros_like(layer.bias)]), requires_grad=False)
    twofold.register_buffer("integers", torch.cat([coarsely, finely]).to(torch.int8))
    return twofold


def _joined(twofold: Tensor) -> Tensor:
    """What such a layer gives, (n, 2 × outputs, height, width) → (n, outputs, height, width)."""
    coarsely, finely = twofold.chunk(2, dim=1)
    return coarsely + finely


def weight_steps(weight: Tensor) -> Tensor:
    """(outputs, channels, …) float32 → what 1 stands for in each output's weights, (outputs,)."""
    pairs, single = (values.flatten(1).amax(dim=1) for values in (_pair_sums(weight), weight.abs()))
    return torch.maximum(pairs / LARGEST_PAIR, single / LARGEST_WEIGHT).clamp_min(1e-12)


def _pair_sums(weight: Tensor) -> Tensor:
    """(outputs, channels, …) → (outputs, pairs, …), a pair's sum above 0 or that below it, whichever is larger."""
    if weight.shape[1] % 2:
        weight = torch.cat([weight, torch.zeros_like(weight[:, :1])], dim=1)
    first, second = weight[:, 0::2], weight[:, 1::2]
    above = first.clamp_min(0.0) + second.clamp_min(0.0)
    return torch.maximum(above, above - first - second)


def _another(made: Tensor, other: Tensor) -> Tensor:
    """A tensor of its own that holds what `made` does, which came of an addition to `other`.

    That is `other` itself: the operation writes its result there, as its declaration says, and returns a copy.
    """
    return _copy(made) if made.data_ptr() == other.data_ptr() else other


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.channels_last)


def _as_integers(x: Tensor) -> Tensor:
    """The nearest of 0 to 255, uint8; x is lost. By way of int16, which PyTorch is faster at."""
    return x.round_().clamp_(0, LEVELS).to(torch.int16).to(torch.uint8)
