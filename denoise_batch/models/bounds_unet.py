"""Our network: a small U-Net on 2×2-unshuffled pixels, told how far each pixel can lie from its clean value.

The seed's noise is uniform in [-r, r] and most of a digit's image is background (0 before the noise), so the lowest
pixel gives the half range away: r̂ = -min(noisy) is within about 1% of r. Then every blurred pixel lies between
max(0, noisy - r̂) and min(1, noisy + r̂). Both bounds and r̂ are inputs beside the pixels; at heavy noise they are
worth about 1 dB. Images whose noise was clipped away (uint8 files) have no pixel below 0: then r̂ is unknown, which
a flag plane says, so that the network does not take 0 for "no noise".

Working on 14×14×4 pixels rather than 28×28 makes every convolution wide enough for matrix units, and one fully
connected layer over the 7×7 stage sees the whole digit at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from denoise_batch.models.network import DenoisingNetwork

if TYPE_CHECKING:
    from torch import Tensor

_PLANES = 4 * 3 + 2  # unshuffled pixels, lower bounds, upper bounds; r̂ and its flag


def noise_half_range(noisy: Tensor) -> Tensor:
    """r̂ = -min(noisy), at least 0: (n, 1, 28, 28) → (n, 1, 1, 1). 0 where no pixel is below 0."""
    return (-noisy.amin(dim=(1, 2, 3), keepdim=True)).clamp_min(0.0)


class _Residual(nn.Module):
    """x + conv(relu(conv(x))), then relu."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.second(torch.relu(self.first(x))))


class BoundsUNet(DenoisingNetwork):
    """A U-Net with two scales (14×14 and 7×7) and one global bottleneck, fed with bounds.

    Args:
        width: channels at 14×14.
        deep: channels at 7×7.
        bottleneck: units of the global fully connected layer.
        blocks: residual blocks before and after the bottleneck at 7×7.
    """

    def __init__(self, width: int = 32, deep: int = 64, bottleneck: int = 256, blocks: int = 1) -> None:
        super().__init__()
        self.parameters_json = {"width": width, "deep": deep, "bottleneck": bottleneck, "blocks": blocks}
        self.inlet = nn.Conv2d(_PLANES, width, 3, padding=1)
        self.fine_in = _Residual(width)
        self.down = nn.Conv2d(width, deep, 2, stride=2)
        self.coarse_in = nn.Sequential(*(_Residual(deep) for _ in range(blocks)))
        self.squeeze = nn.Linear(deep * 49, bottleneck)
        self.expand = nn.Linear(bottleneck, deep * 49)
        self.coarse_out = nn.Sequential(*(_Residual(deep) for _ in range(blocks)))
        self.up = nn.ConvTranspose2d(deep, width, 2, stride=2)
        self.fine_out = _Residual(width)
        self.outlet = nn.Conv2d(width, 4, 3, padding=1)

    def logits(self, noisy: Tensor) -> Tensor:
        half_range = noise_half_range(noisy)
        planes = torch.cat(
            [
                functional.pixel_unshuffle(noisy, 2),
                functional.pixel_unshuffle((noisy - half_range).clamp_min(0.0), 2),
                functional.pixel_unshuffle((noisy + half_range).clamp_max(1.0), 2),
                half_range.expand(-1, 1, 14, 14),
                (half_range > 0.0).to(noisy.dtype).expand(-1, 1, 14, 14),
            ],
            dim=1,
        ).contiguous(memory_format=torch.channels_last)
        fine = self.fine_in(torch.relu(self.inlet(planes)))
        coarse = self.coarse_in(torch.relu(self.down(fine)))
        whole = self.expand(torch.relu(self.squeeze(coarse.flatten(1))))
        coarse = self.coarse_out(torch.relu(coarse + whole.view_as(coarse)))
        fine = self.fine_out(torch.relu(self.up(coarse) + fine))
        return functional.pixel_shuffle(self.outlet(fine), 2)
