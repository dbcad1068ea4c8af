"""How good a network takes its own image to be: a small head on what it has computed anyway.

It is trained on the error that the image then has, and no gradient goes back from it. In a training it says what each
image counts (`objective.weight_of`); of a finished model it changes no pixel.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from denoise_batch.models.fused_layers import add_conv_relu, no_autocast
from denoise_batch.models.input_gate import WHOLE, WHOLE_FROM, not_joined
from denoise_batch.models.pixel_groups import side_by_side

if TYPE_CHECKING:
    from torch import Tensor


MOST_PSNR = 45.0
"""What an image of a better PSNR, in dB, counts as: it is off by less than one and a half of 255 grey levels, so that
nobody sees it, and whether by a half or by none at all is a matter of luck."""
_LARGEST = math.log(WHOLE)


class QualityHead(nn.Module):
    """What the network has made → the image's PSNR in dB and its noise level, (n, 2) float32.

    Trained on cross-entropy, a pixel p is the mean of what may be there, so its variance is a share of p (1 - p). That
    share is read off the features at each pixel, and less is left where what was given is joined in; the mean over the
    image is the squared error that is expected. What the whole image says then corrects it, and whether lines were
    taken away: of a printed frame the network makes an empty image, as sure as of an empty cell.

    Args:
        width: channels of the features at 14×14.
        features: numbers about the whole image.
    """

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.feature = nn.Conv2d(width, 8, 1)
        self.pixel = nn.Conv2d(8, 8, 1, bias=False)
        self.share = nn.Conv2d(8, 4, 1)
        self.hidden = nn.Linear(features + 13, 64)
        self.out = nn.Linear(64, 2)

    def forward(
        self, noisy: Tensor, logits: Tensor, fine: Tensor, whole: Tensor, trust: Tensor, read: Tensor | None = None
    ) -> Tensor:
        """What it says of images.

        Args:
            noisy, logits: (n, 196, 4), grouped.
            fine: (n, width, 14, 14), the last features there.
            whole: (n, features).
            trust: (n,), by which what was made is joined with what was given, before it is `decided` (`input_gate`).
            read: (n, 8, 14, 14), what `feature` makes of `fine`, where that was computed otherwise; `fine` may then be
                of any type.
        """
        # It is not for autocast: a decibel in bfloat16 has steps of an eighth.
        with no_autocast(noisy):
            dtype = self.feature.weight.dtype
            noisy, logits, fine, whole, trust = (part.detach() for part in (noisy, logits, fine, whole, trust))
            clean = torch.sigmoid(logits.float())
            shown = side_by_side(clean.to(dtype), noisy.to(dtype))
            if read is None:
                hidden = add_conv_relu(self.feature, fine.to(dtype), self.pixel(shown))
            else:
                hidden = add_conv_relu(self.pixel, shown, read.to(dtype))
            share = self.share(hidden)
            share = torch.sigmoid(share.permute(0, 2, 3, 1).reshape(clean.shape).float())
            # Numbers of about one inside, decibels outside.
            left = share * not_joined(clean, trust[:, None, None])
            left = torch.where(trust < WHOLE_FROM, left.mean(dim=(1, 2)), 1.0 / trust.clamp_min(1.0))
            expected = -left.clamp_min(10.0 ** (-MOST_PSNR / 10.0)).log10()
            apart = noisy.float() - clean
            residual, most = apart.square().mean(dim=(1, 2)).sqrt(), apart.abs().amax(dim=(1, 2))
            image = [most, trust.log1p() / _LARGEST, expected, clean.mean(dim=(1, 2)), residual]
            taken = [*_lost(apart, residual), *_together(apart, residual)]
            features = torch.cat([torch.stack([*image, *taken], dim=1), whole], dim=1)
            correction, level = self.out(torch.relu(self.hidden(features))).unbind(dim=1)
            return torch.stack([10.0 * (expected + correction), level], dim=1)


def _lost(apart: Tensor, residual: Tensor) -> list[Tensor]:
    """How much more was taken away from some rows and columns than noise explains, which has the same mean in all.

    The mean over n pixels of noise of deviation s lies within a few s / √n of the whole image's; a printed line's does
    not, however faint.

    Args:
        apart: (n, 196, 4), grouped, what was given less what was made of it.
        residual: (n,), its root mean square.

    Returns:
        (n,) each, counted in s / √n: half the largest mean of two neighbouring rows, and of two columns; the root mean
        square of all rows' means, and of all columns', which is about 1 of noise.
    """
    groups = apart.reshape(-1, 14, 14, 4)
    # First over what lies far apart: sums of two numbers each are slow.
    rows = groups.sum(dim=2).reshape(-1, 14, 2, 2).sum(dim=3).flatten(1) / 28.0
    columns = groups.sum(dim=1).reshape(-1, 14, 2, 2).sum(dim=2).flatten(1) / 28.0
    mean = rows.mean(dim=1, keepdim=True)
    deviation = (residual.square() - mean[:, 0].square()).clamp_min(0.0).sqrt() + 0.02
    unit = (math.sqrt(28.0) / deviation)[:, None]
    rows, columns = (rows - mean) * unit, (columns - mean) * unit
    pairs = [(lines[:, 1:] + lines[:, :-1]).amax(dim=1) / math.sqrt(8.0) for lines in (rows, columns)]
    return [*pairs, *(lines.square().mean(dim=1).sqrt() for lines in (rows, columns))]


def _together(apart: Tensor, residual: Tensor) -> list[Tensor]:
    """How much more alike neighbouring pixels of what was taken away are than those of white noise.

    Of n pairs of such, the mean product lies within a few s² / √n of 0; a line of any direction leaves many times that
    along its own.

    Args:
        apart, residual: as in `_lost`.

    Returns:
        (n,) each, counted in s² / √n: of pairs across, down, and along both diagonals. Pairs of one group of 2×2 stand
        for all others.
    """
    products = apart.transpose(1, 2) @ apart
    mean = apart.mean(dim=(1, 2)).square()
    variance = (residual.square() - mean).clamp_min(0.0) + 0.02**2
    pairs = [(products[:, 0, 1] + products[:, 2, 3]) / 2.0, (products[:, 0, 2] + products[:, 1, 3]) / 2.0]
    pairs = [*pairs, products[:, 0, 3], products[:, 1, 2]]
    places = apart.shape[1]
    roots = [math.sqrt(2.0 * places)] * 2 + [math.sqrt(places)] * 2
    return [(pair / places - mean) / variance * root for pair, root in zip(pairs, roots, strict=True)]
