"""What our networks of two scales, 14×14 and 7×7, have in common: the image and its quality out of one pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from denoise_batch.models.network import DenoisingNetwork
from denoise_batch.models.noise_signs import range_ends
from denoise_batch.models.pixel_groups import ungrouped

if TYPE_CHECKING:
    from torch import Tensor

    from denoise_batch.models.quality_head import QualityHead


class TwoScales(DenoisingNetwork):
    """A network whose pass is `_pass` and whose head is `quality`."""

    has_quality = True
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
