"""How good a network takes its own image to be: a small head on what it has computed anyway.

It is trained on the error that the image then has. No gradient goes back from it, so that it changes no pixel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from denoise_batch.models.fused_layers import add_conv_relu
from denoise_batch.models.pixel_groups import side_by_side

if TYPE_CHECKING:
    from torch import Tensor


class QualityHead(nn.Module):
    """What the network has made → the image's PSNR in dB and its noise level, (n, 2) float32.

    Trained on cross-entropy, a pixel p is the mean of what may be there, so its variance is a share of p (1 - p). That
    share is read off the features at each pixel; the mean over the image is the squared error that is expected. What
    the whole image says then corrects it.

    Args:
        width: channels of the features at 14×14.
        features: numbers about the whole image.
    """

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.feature = nn.Conv2d(width, 8, 1)
        self.pixel = nn.Conv2d(8, 8, 1, bias=False)
        self.share = nn.Conv2d(8, 4, 1)
        self.hidden = nn.Linear(features + 3, 64)
        self.out = nn.Linear(64, 2)

    def forward(self, noisy: Tensor, logits: Tensor, fine: Tensor, whole: Tensor) -> Tensor:
        """What it says of images.

        Args:
            noisy, logits: (n, 196, 4), grouped.
            fine: (n, width, 14, 14), the last features there.
            whole: (n, features).
        """
        # It is not for autocast: a decibel in bfloat16 has steps of an eighth.
        with torch.autocast(noisy.device.type, enabled=False):
            dtype = self.feature.weight.dtype
            noisy, logits, fine, whole = (part.detach() for part in (noisy, logits, fine, whole))
            clean = torch.sigmoid(logits.float())
            shown = side_by_side(clean.to(dtype), noisy.to(dtype))
            share = self.share(add_conv_relu(self.feature, fine.to(dtype), self.pixel(shown)))
            share = torch.sigmoid(share.permute(0, 2, 3, 1).reshape(clean.shape).float())
            # Numbers of about one inside, decibels outside.
            expected = -(share * clean * (1.0 - clean)).mean(dim=(1, 2)).clamp_min(1e-6).log10()
            residual = (noisy.float() - clean).square().mean(dim=(1, 2)).sqrt()
            features = torch.cat([torch.stack([expected, clean.mean(dim=(1, 2)), residual], dim=1), whole], dim=1)
            correction, level = self.out(torch.relu(self.hidden(features))).unbind(dim=1)
            return torch.stack([10.0 * (expected + correction), level], dim=1)
