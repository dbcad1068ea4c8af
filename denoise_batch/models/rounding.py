"""What the default network's 8-bit integers stand for: chosen once its weights are trained, kept beside them.

    choose_cutoffs(network, noisy)      # network.largest: of each layer's values
    choose_integers(network, noisy)     # integers of each layer in network.rounded_layers(): of its weights

`int8` computes with them, `channel_scales` comes before. Nothing is trained for it, and what the float32 weights make
stays the same to the last bit.

A weight rounded to the nearest integer errs by up to half a step, whatever the weights beside it err by. What counts
is their error together, on the values that the layer is given: neighbouring pixels and channels go together, so one
weight's error can be made good for by others'. So a layer's weights are rounded one after the other, and what the error
of those done would add to the output is taken off the next one before it is rounded (Frantar et al., "GPTQ", 2022,
arXiv 2210.17323; in the order and the form of Babai's nearest plane, to which it is the same: Chen et al., 2025, arXiv
2507.18553). Over the seed's mixture that halves what integers lose. Errors of a layer's outputs go together as well in
what the image makes of them, so that where outputs are few each is rounded to make good for those done before it, too.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from denoise_batch.models.int8 import (
    LARGEST_PAIR,
    LARGEST_WEIGHT,
    LEVELS,
    plane_steps,
    rounded_planes,
    weight_steps,
)
from denoise_batch.models.watched_layers import Reached, by_channel, gradients, on_input, on_output, some_of

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from denoise_batch.models.bounds_unet import BoundsUNet

_SHARES = tuple(0.9**power for power in range(48))  # of the largest value, tried; empty images have large ones
_TRIED = 320  # images they are tried on
_SEEN = 3072  # images whose values weights are rounded for
_BATCH = 256
_PLACES = 16_384  # of a batch's values, about, that a layer's weights are rounded for
_STRIDES = (1, 3, 5, 9, 11, 13)  # between them; every column is met, whether there are 7 or 14
_FEW_OUTPUTS = 128  # of a layer whose outputs are rounded one after the other
_DAMPING_TOGETHER = 0.05
_DAMPING = 0.01  # added to the mean square of every input, in units of all inputs' mean: some are always 0
_BLOCK = 128  # weights whose errors are carried on one by one; those of whole blocks go by one product


@torch.no_grad()
def choose_cutoffs(network: BoundsUNet, noisy: Tensor) -> None:
    """Chooses, layer by layer, what the largest of 8-bit values is to stand for: `network.largest`.

    A value as large as any layer gives is rare, mostly stands for a pixel that is beyond doubt, and makes the steps of
    all others coarse. So that share of it is taken with which the image comes out best if this layer alone is rounded:
    the larger values are cut off. What the gate then does to images (`input_gate`) is left out: it would hide what is
    made of clean ones, off which it reads what to do.

    Args:
        network: in float32.
        noisy: (n, 1, 28, 28) float32 images, on its device.
    """
    layers = network.measured_layers()
    found: list[Tensor] = []
    with contextlib.ExitStack() as hooked:
        for layer in layers:
            hooked.enter_context(on_output(layer, lambda made: found.append(made.amax())))
        for part in torch.split(noisy, _BATCH):
            network(part)
    network.largest.copy_(torch.stack(found).view(-1, len(layers)).amax(dim=0))
    few = some_of(noisy, _TRIED)
    exact = torch.sigmoid(network.logits(few))
    for place, layer in enumerate(layers):
        errors: list[float] = []
        for share in _SHARES:
            step = (share * network.largest[place] / LEVELS).clamp_min(1e-9)
            with on_output(layer, lambda made, step=step: after_rounding(made, step)):
                errors.append(float((torch.sigmoid(network.logits(few)) - exact).square_().mean()))
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
    few = some_of(noisy, _SEEN)
    layers = network.rounded_layers()
    together = _outputs_together(network, some_of(noisy, _TRIED))
    exact = [layer.weight.clone() for layer in layers]
    with contextlib.ExitStack() as hooked:
        for layer, largest in zip(network.measured_layers(), network.largest, strict=True):
            step = (largest / LEVELS).clamp_min(1e-9)
            hooked.enter_context(on_output(layer, lambda made, step=step: after_rounding(made, step)))
        hooked.enter_context(on_input(network.inlet, rounded_planes))
        try:
            for layer in layers:
                gram = _gram(network, layer, few)
                steps_in = plane_steps(noisy.device) if layer is network.inlet else None
                _round(layer, gram, together.get(layer), steps_in)
        finally:
            for layer, weights in zip(layers, exact, strict=True):
                layer.weight.copy_(weights)


def _round(layer: Any, gram: Tensor, together: Tensor | None, steps_in: Tensor | None) -> None:
    """Chooses a layer's integers, and makes its weights what these stand for; `steps_in` is as `plane_steps` has it."""
    integers = layer.get_buffer("integers")
    count = integers[0].numel()  # the first so many of an output's weights are rounded
    weight, gram = layer.weight[:, : integers.shape[1]], gram[:count, :count]
    scale: Tensor | float = 1.0
    if steps_in is not None:
        weight, scale = weight * steps_in, steps_in.expand_as(layer.weight[:1]).flatten()
        gram = gram / torch.outer(scale, scale)
    weight, steps = weight.flatten(1), weight_steps(weight)[:, None]
    together = None if together is None else together * steps * steps.T
    chosen = nearest_integers(weight / steps, gram, together, _pairs(integers))
    integers.copy_(chosen.view_as(integers))
    made = torch.cat([chosen * steps / scale, layer.weight.flatten(1)[:, count:]], dim=1)
    layer.weight.copy_(made.view_as(layer.weight))


def nearest_integers(
    weight: Tensor, gram: Tensor, together: Tensor | None = None, pairs: Tensor | None = None
) -> Tensor:
    """Integers whose products with the inputs are nearest to the weights', one input after the other.

    Args:
        weight: (outputs, inputs), in steps.
        gram: (inputs, inputs), the mean of x xᵀ over inputs x.
        together: (outputs, outputs), what the outputs' errors e cost: eᵀ together e; None: the sum of their squares.
        pairs: (inputs,) int64, the other of each input's pair, whose integers are to go together (`int8.pairs_fit`);
            `inputs` stands for none. Without it none has one.

    Returns:
        (outputs, inputs) float32, whole numbers from -127 to 127.
    """
    count = len(gram)
    # ‖(w - q) L‖², with L lower triangular, is the error: from the last input to the first each is chosen so that it
    # makes good for those behind it. The strongest go first, while there are many that can.
    order, lower = _triangle(gram, _DAMPING)
    wanted = weight.double()[:, order]
    outputs, shares = None, None
    if together is not None:
        outputs, triangle = _triangle(together, _DAMPING_TOGETHER)
        wanted, shares = wanted[outputs], (triangle / triangle.diagonal()).cpu().numpy()
    # A last column of zeros is the other one of those that have none.
    chosen, error = torch.zeros((len(wanted), count + 1)).to(wanted), torch.zeros_like(wanted)
    others = [count] * count if pairs is None else _in_order(pairs, order).tolist()
    for stop in range(count, 0, -_BLOCK):
        start = max(0, stop - _BLOCK)
        carried = error[:, stop:] @ lower[stop:, start:stop]
        for place in range(stop - 1, start - 1, -1):
            behind = error[:, place + 1 : stop] @ lower[place + 1 : stop, place]
            aim = wanted[:, place] + (carried[:, place - start] + behind) / lower[place, place]
            other = chosen[:, others[place]]
            highest = (LARGEST_PAIR - other.clamp_min(0.0)).clamp_max_(LARGEST_WEIGHT)
            lowest = (-LARGEST_PAIR - other.clamp_max(0.0)).clamp_min_(-LARGEST_WEIGHT)
            if shares is not None:
                limits = lowest.cpu().numpy(), highest.cpu().numpy()
                aim = torch.from_numpy(_made_good(aim.cpu().numpy(), limits, shares)).to(aim.device)
            chosen[:, place] = aim.round_().clamp_(lowest, highest)
            error[:, place] = wanted[:, place] - chosen[:, place]
    chosen = chosen[:, order.argsort()]
    return (chosen if outputs is None else chosen[outputs.argsort()]).float()


def _pairs(integers: Tensor) -> Tensor:
    """Of a layer's integers (outputs, channels, …) those of each output, flattened: the other of each one's pair."""
    channels, taps = integers.shape[1], integers[0, 0].numel()
    others = torch.arange(channels, device=integers.device) ^ 1
    flat = others[:, None] * taps + torch.arange(taps, device=integers.device)
    return torch.where(others[:, None] < channels, flat, channels * taps).flatten()


def _in_order(pairs: Tensor, order: Tensor) -> Tensor:
    """The others' places where inputs stand in this order."""
    places = torch.cat([order.argsort(), order.new_tensor([len(order)])])
    return places[pairs[order]]


def _triangle(square: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """An order in which the largest of a positive matrix's diagonal are last; its Cholesky factor in it, float64."""
    order = square.diagonal().argsort()
    damped = square[order[:, None], order].double()
    damped.diagonal().add_(damping * damped.diagonal().mean().clamp_min(1e-12))
    return order, torch.linalg.cholesky(damped)


def _made_good(
    aim: NDArray[np.float64], limits: tuple[NDArray[np.float64], NDArray[np.float64]], shares: NDArray[np.float64]
) -> NDArray[np.float64]:
    """What to round for each output, so that it makes good for the rounding of those behind it.

    Args:
        aim: (outputs,), what would be rounded if each stood alone.
        limits: (outputs,) twice, the least and the most that it may be rounded to.
        shares: (outputs, outputs), lower triangular: how much of the error of one another is to make up for.
    """
    moved, left = aim.copy(), np.zeros_like(aim)
    for output in range(len(aim) - 1, -1, -1):
        moved[output] += shares[output + 1 :, output] @ left[output + 1 :]
        left[output] = aim[output] - min(max(np.rint(moved[output]), limits[0][output]), limits[1][output])
    return moved


def _outputs_together(network: BoundsUNet, noisy: Tensor) -> dict[nn.Module, Tensor]:
    """For layers of few outputs what errors of these cost together in the image, to first order: (outputs, outputs)."""
    layers = [layer for layer in network.rounded_layers() if len(layer.bias) <= _FEW_OUTPUTS]
    found = {layer: torch.zeros((), dtype=torch.float64, device=noisy.device) for layer in layers}
    for made, towards in gradients(network, layers, noisy):
        for layer, values, gradient in zip(layers, made, towards, strict=True):
            errors = by_channel(layer, gradient * (values > 0), len(layer.bias))  # ReLU lets no other pass
            found[layer] = found[layer] + (errors.T @ errors).double()
    return found


def after_rounding(values: Tensor, step: Tensor) -> Tensor:
    """What is left of a layer's values where a step stands for 1."""
    return values.div(step).round_().clamp_(0, LEVELS).mul_(step)


def _gram(network: BoundsUNet, layer: nn.Module, noisy: Tensor) -> Tensor:
    """(inputs, inputs) float64: the mean of x xᵀ over what one output of the layer is given."""
    total, count = torch.zeros((), dtype=torch.float64, device=noisy.device), 0
    for part in torch.split(noisy, _BATCH):
        found: list[Tensor] = []
        with contextlib.suppress(Reached), on_input(layer, found.append, stop=True):
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
