"""Our network: a small U-Net that is told how far each pixel can lie from its clean value.

The seed's noise is uniform in [-r, r], and r̂ = -min(noisy) is within about 1% of r (`noise_signs`). So every blurred
pixel lies between max(0, noisy - r̂) and min(1, noisy + r̂). Both bounds are inputs beside the pixels; at heavy noise
they are worth about 1 dB. What both ends of the range say of the noise is an input as well, so that the network can
tell the kinds of noise apart, and does not take an r̂ that was clipped away for "no noise".

It has two scales, 14×14 (the pixels unshuffled 2×2) and 7×7, and a fully connected bottleneck that sees the whole digit
at once. It costs a CPU little more than the seed's network of 4,385 weights does, since every layer was chosen by its
time on a core, measured one by one:

- most convolutions are at 7×7, where channels are many enough to fill the vector units, few at 14×14;
- residual blocks have one convolution, so that addition and ReLU come out of the product (`fused_layers`);
- a linear layer stands in place of a transposed convolution, and a 1×1 convolution at the end;
- pixels are moved in groups as one integer, in a third of the time of moving them one by one (`pixel_groups`);
- all of it is bfloat16 where the device multiplies that faster (`DenoisingNetwork.to_bfloat16`).

Beside the image it says how good it takes the image to be (`quality_head`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from denoise_batch.models.fused_layers import ConvRelu, LinearRelu, ResidualConv
from denoise_batch.models.noise_signs import RANGE_ENDS
from denoise_batch.models.quality_head import QualityHead
from denoise_batch.models.two_scales import PLANES, TwoScales

if TYPE_CHECKING:
    from torch import Tensor


class BoundsUNet(TwoScales):
    """A U-Net of two scales and one global bottleneck, fed with bounds.

    Args:
        width: channels at 14×14.
        deep: channels at 7×7.
        bottleneck: units of the global fully connected layers.
        blocks_in, blocks_out: residual convolutions at 7×7 before and after the bottleneck.

    Raises:
        ValueError: one of them is below 1, of the last two below 0.
    """

    float32_parts = ("quality.hidden", "quality.out")

    def __init__(
        self, width: int = 16, deep: int = 48, bottleneck: int = 256, blocks_in: int = 1, blocks_out: int = 2
    ) -> None:
        super().__init__()
        if min(width, deep, bottleneck) < 1 or min(blocks_in, blocks_out) < 0:
            raise ValueError("a size is too small")
        self.parameters_json = {
            "width": width,
            "deep": deep,
            "bottleneck": bottleneck,
            "blocks_in": blocks_in,
            "blocks_out": blocks_out,
        }
        self.inlet = ConvRelu(PLANES, width, 3, padding=1)
        self.fine_in = ResidualConv(width)
        self.down = ConvRelu(width, deep, 2, stride=2)
        self.coarse_in = nn.Sequential(*(ResidualConv(deep) for _ in range(blocks_in)))
        self.squeeze = LinearRelu(49 * deep + RANGE_ENDS, bottleneck)
        self.whole = nn.ModuleList(LinearRelu(bottleneck, bottleneck) for _ in range(2))
        self.expand = LinearRelu(bottleneck, 49 * deep)
        self.coarse_out = nn.Sequential(*(ResidualConv(deep) for _ in range(blocks_out)))
        self.up = nn.Linear(deep, 4 * width)
        self.fine_out = ResidualConv(width)
        self.outlet = nn.Conv2d(width, 4, 1)
        self.quality = QualityHead(width, bottleneck + deep + width + RANGE_ENDS)

    def _pass(self, noisy: Tensor, ends: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        count = noisy.shape[0]  # len() would make it a constant for compilers
        pixels, planes = self._planes(noisy, ends)
        fine = self.fine_in(self.inlet(planes))
        coarse = self.coarse_in(self.down(fine))
        flat = coarse.permute(0, 2, 3, 1).reshape(count, -1)
        whole = self.squeeze(torch.cat([flat, ends.to(flat.dtype)], dim=1))
        for layer in self.whole:
            whole = whole + layer(whole)
        spread = self.expand(whole).view(count, 7, 7, -1).permute(0, 3, 1, 2)
        coarse = self.coarse_out(coarse + spread)
        # (n, 7, 7, (2, 2, width)) → (n, 14, 14, width)
        up = self.up(coarse.permute(0, 2, 3, 1)).view(count, 7, 7, 2, -1).transpose(2, 3).reshape(count, 14, 14, -1)
        fine = self.fine_out(up.permute(0, 3, 1, 2) + fine)
        # What is not a number, or too large to be squared, would get lost on the way (`fused_layers`).
        useless = ~torch.isfinite(ends).all(dim=1)
        logits = self.outlet(fine).permute(0, 2, 3, 1).masked_fill(useless[:, None, None, None], torch.nan)
        return logits, whole, coarse, fine, pixels
