"""What our networks of two scales, 14×14 and 7×7, have in common: the image and its quality out of one pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from denoise_batch.models.network import DenoisingNetwork
from denoise_batch.models.noise_signs import range_ends
from denoise_batch.models.pixel_groups import grouped, side_by_side, ungrouped

if TYPE_CHECKING:
    from torch import Tensor, nn

    from denoise_batch.models.quality_head import QualityHead


PLANES = 16
"""Four pixels, their lower and upper bounds, and the first four of the range's ends."""


class TwoScales(DenoisingNetwork):
    """A network whose first layer is `inlet`, whose pass is `_pass` and whose head is `quality`."""

    has_quality = True
    inlet: nn.Conv2d
    quality: QualityHead

    def logits(self, noisy: Tensor) -> Tensor:
        return ungrouped(self._pass(noisy, range_ends(noisy))[0])

    def logits_and_quality(self, noisy: Tensor) -> tuple[Tensor, Tensor]:
        ends = range_ends(noisy)
        groups, whole, coarse, fine, pixels = self._pass(noisy, ends)
        means = [part.mean(dim=(2, 3), dtype=torch.float32) for part in (coarse, fine)]
        summary = torch.cat([whole.float(), *means, ends], dim=1)
        return ungrouped(groups), self.quality(pixels, groups.flatten(1, 2), fine, summary)

    def _pass(self, noisy: Tensor, ends: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Logits (n, 14, 14, 4), the bottleneck, the last features at 7×7 and 14×14, the noisy pixels (n, 196, 4).

        Args:
            noisy: (n, 1, 28, 28).
            ends: (n, 8), `range_ends` of them.
        """
        raise NotImplementedError

    @torch.no_grad()
    def _planes(self, noisy: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        """(n, 1, 28, 28), (n, 8) → the pixels (n, 196, 4) and all planes (n, 16, 14, 14), of the weights' type."""
        dtype = self.inlet.weight.dtype
        pixels, signs = grouped(noisy.to(dtype)), ends[:, None].to(dtype)
        half_range = signs[..., :1]
        bounds = ((pixels - half_range).clamp_min_(0.0), (pixels + half_range).clamp_max_(1.0))
        return pixels, side_by_side(pixels, *bounds, signs[..., :4])
