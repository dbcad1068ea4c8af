"""A network of two scales, 14×14 and 7×7, apart from its layers: what it sees; image and quality out of one pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from denoise_batch.models.network import DenoisingNetwork
from denoise_batch.models.noise_signs import range_ends
from denoise_batch.models.pixel_groups import grouped, side_by_side, ungrouped

if TYPE_CHECKING:
    from torch import Tensor, nn

    from denoise_batch.models.quality_head import QualityHead


PLANES = 16
"""Four pixels, their lower and upper bounds, and the first four of the range's ends."""


class Passed(NamedTuple):
    """What a pass gives.

    Attributes:
        logits: (n, 14, 14, 4).
        whole: the bottleneck (n, units).
        coarse, fine: the last features at 7×7 and 14×14, (n, channels, height, width).
        pixels: the noisy pixels (n, 196, 4).
        ends: their `range_ends`, (n, 8).
        coarse_step, fine_step: what 1 stands for in these features.
    """

    logits: Tensor
    whole: Tensor
    coarse: Tensor
    fine: Tensor
    pixels: Tensor
    ends: Tensor
    coarse_step: float = 1.0
    fine_step: float = 1.0


class TwoScales(DenoisingNetwork):
    """A network whose first layer is `inlet`, whose pass is `_pass` and whose head is `quality`."""

    has_quality = True
    inlet: nn.Conv2d
    quality: QualityHead

    def logits(self, noisy: Tensor) -> Tensor:
        return ungrouped(self._pass(noisy).logits)

    def logits_and_quality(self, noisy: Tensor) -> tuple[Tensor, Tensor]:
        passed = self._pass(noisy)
        fine = passed.fine
        if not fine.is_floating_point():
            fine = fine.float().mul_(passed.fine_step)
        means = [
            passed.coarse.mean(dim=(2, 3), dtype=torch.float32) * passed.coarse_step,
            fine.mean(dim=(2, 3), dtype=torch.float32),
        ]
        summary = torch.cat([passed.whole.float(), *means, passed.ends], dim=1)
        quality = self.quality(passed.pixels, passed.logits.flatten(1, 2), fine, summary)
        return ungrouped(passed.logits), quality

    def _pass(self, noisy: Tensor) -> Passed:
        """The whole network but for its quality head, of (n, 1, 28, 28)."""
        raise NotImplementedError

    def _ends(self, noisy: Tensor) -> Tensor:
        """(n, 1, 28, 28) → (n, 8)."""
        return range_ends(noisy)

    @torch.no_grad()
    def _planes(self, noisy: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        """(n, 1, 28, 28), (n, 8) → the pixels (n, 196, 4) and all planes (n, 16, 14, 14), of the weights' type."""
        dtype = self.inlet.weight.dtype
        pixels, signs = grouped(noisy.to(dtype)), ends[:, None].to(dtype)
        half_range = signs[..., :1]
        bounds = ((pixels - half_range).clamp_min_(0.0), (pixels + half_range).clamp_max_(1.0))
        return pixels, side_by_side(pixels, *bounds, signs[..., :4])
