"""Lets through what is good about an image already: a network makes a clean digit a little worse, itself never.

    clean, trust = gate(noisy, made, ends)

Two estimates of each pixel are joined, what the network has made and what it was given, as one joins two measurements:
each counts by the inverse of its variance. The network's is about a share of p (1 - p), since a pixel p that was
trained on cross-entropy is the mean of what may be there. The noisy image's is one number for all its pixels, and its
inverse is called trust here. It is read off how far the two are apart, how sure the network is, and what both ends of
the range say (`noise_signs`): a blurred image is changed more than a clean one. So faint noise is still taken off the
background, of which the network is sure, while strokes stay as they were.

Little trust becomes none, and the network's image comes out as it is; so it is with heavy noise always. Very much
trust becomes whole, and the noisy image comes out as it is. Where a single pixel would be changed a lot there is none,
however clean the rest is. The gate is trained on what the network then makes of the training's images; no gradient goes
back from it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from denoise_batch.models.fused_layers import is_recorded, no_autocast
from denoise_batch.models.noise_signs import RANGE_ENDS

if TYPE_CHECKING:
    from types import ModuleType

    from torch import Tensor

_MOST_RMS = 0.15
"""An image that is changed by more, in every fourth line, is not trusted: nothing would be gained."""
_MOST_CHANGE = 0.4
"""Nor is one of which a single pixel is changed by more: those of clean digits hardly ever are."""
NONE_BELOW, WHOLE_FROM, WHOLE = 0.3, 1e4, 1e6
"""The least trust; that from which on it is whole, deviations below 1 / 100; and what stands for that, which no image
reaches before it is `decided`."""
_LEAST = 1e-4  # of a root mean square, before its logarithm


class InputGate(nn.Module):
    """How much each image is trusted, and what comes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(RANGE_ENDS + 3, 32)
        self.out = nn.Linear(32, 1)
        nn.init.constant_(self.out.bias, math.log(NONE_BELOW) - 1.0)  # until it has learnt better it trusts none

    def forward(
        self, noisy: Tensor, made: Tensor, ends: Tensor, kernels: ModuleType | None = None
    ) -> tuple[Tensor, Tensor]:
        """Joins what came in with what was made of it.

        Args:
            noisy: (n, 1, 28, 28) float32, what the network was given.
            made: (n, 1, 28, 28) float32, in 0..1, what it has made, which may be overwritten.
            ends: (n, 8), `range_ends` of the noisy images.
            kernels: `gpu_kernels`, where they are to be used; both images are contiguous then.

        Returns:
            What comes out, (n, 1, 28, 28), and the trust before it is `decided`, (n,). Images of NaN stay such.
        """
        if kernels is not None:
            found = kernels.apart(noisy, made)
            trust = torch.where(
                found[:, 3] < _MOST_RMS**2, self._trust(found[:, 0], found[:, 1], found[:, 2], ends), 0.0
            )
            return kernels.join(noisy, made, decided(trust), WHOLE), trust
        may = may_be_trusted(noisy, made)
        if noisy.device.type != "cpu" or torch.is_grad_enabled() or is_recorded():
            given = noisy.clamp(0.0, 1.0)
            trust = torch.where(may, self._trust(*_features(given, made), ends), 0.0)
            return joined(made, given, decided(trust)), trust
        trust, rows = made.new_zeros(len(made)), may.nonzero()[:, 0]
        if len(rows):  # few images of most sets
            given, some = noisy[rows].clamp_(0.0, 1.0), made[rows]
            trust[rows] = few = self._trust(*_features(given, some), ends[rows])
            made[rows] = joined(some, given, decided(few))
        return made, trust

    def _trust(self, square: Tensor, most: Tensor, unsure: Tensor, ends: Tensor) -> Tensor:
        """What `_features` gives, and (n, 8) → (n,), from 0 to `WHOLE`."""
        with no_autocast(ends):
            told = [
                square.clamp_min(_LEAST**2).log10() / 2.0,
                most.clamp_min(_LEAST).log10(),
                unsure.clamp_min(_LEAST**2).log10() / 2.0,
            ]
            hidden = torch.relu(self.hidden(torch.cat([ends, torch.stack(told, dim=1)], dim=1)))
            limit = math.log(WHOLE)
            trust = (limit - functional.softplus(limit - self.out(hidden)[:, 0])).exp()
            return torch.where(most < _MOST_CHANGE, trust, 0.0)


def _features(given: Tensor, made: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(n, 1, 28, 28) twice, in 0..1 → mean square and maximum of their difference, mean of made (1 - made): (n,)."""
    given, made = given.flatten(1), made.detach().flatten(1)
    apart = given - made
    return apart.square().mean(dim=1), apart.abs().amax(dim=1), (made * (1.0 - made)).mean(dim=1)


def may_be_trusted(noisy: Tensor, made: Tensor) -> Tensor:
    """(n, 1, 28, 28) twice → (n,) bool: whether so little was changed that something of an image may be kept."""
    apart = (noisy[:, 0, 1::4] - made[:, 0, 1::4]).flatten(1)
    near: Tensor = torch.linalg.vector_norm(apart, dim=1) < _MOST_RMS * apart.shape[1] ** 0.5
    return near


def decided(trust: Tensor) -> Tensor:
    """(n,) → (n,): too little trust becomes 0, as much as is whole `WHOLE`."""
    return torch.where(trust < NONE_BELOW, 0.0, torch.where(trust >= WHOLE_FROM, WHOLE, trust))


def joined(made: Tensor, given: Tensor, trust: Tensor) -> Tensor:
    """(n, 1, 28, 28) twice, (n,) → (n, 1, 28, 28): `made` where there is no trust, `given` where it is whole."""
    trust = trust[:, None, None, None]
    return torch.lerp(made, given, torch.where(trust >= WHOLE, 1.0, input_weight(made.detach(), trust)))


def input_weight(made: Tensor, trust: Tensor) -> Tensor:
    """How much of a pixel that was given is in what comes out, where the network made `made` of it: 0 to 1.

    That is v / (v + 1 / trust) for a variance of v = made (1 - made).
    """
    weight = made * (1.0 - made) * trust
    return weight / (1.0 + weight)


def not_joined(made: Tensor, trust: Tensor) -> Tensor:
    """made (1 - made) (1 - input_weight(made, trust)): the variance that is left of what the network made.

    That is v / (1 + v trust), in as few operations as may be: it is wanted of every image's every pixel.
    """
    variance = torch.addcmul(made, made, made, value=-1.0)
    return variance / (variance * trust).add_(1.0)
