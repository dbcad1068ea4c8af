"""Our network: a small U-Net on 2×2-unshuffled pixels, told how far each pixel can lie from its clean value.

The seed's noise is uniform in [-r, r] and most of a digit's image is background (0 before the noise), so the lowest
pixel gives the half range away: r̂ = -min(noisy) is within about 1% of r. Then every blurred pixel lies between
max(0, noisy - r̂) and min(1, noisy + r̂). Both bounds and r̂ are inputs beside the pixels; at heavy noise they are
worth about 1 dB. Images whose noise was clipped away (uint8 files) have no pixel below 0: then r̂ is unknown, which
a flag plane says, so that the network does not take 0 for "no noise".

Other noise looks otherwise at both ends of the range: clipped images have pixels at exactly 0 and 1, Gaussian noise has
longer tails below 0 than uniform noise of the same power, clean images have none at all. A summary of both ends, eight
numbers an image, shifts the first layer's channels, so that the network can tell the kinds apart.

Beside the image it says how good it takes the image to be. A small head reads what the network has made anyway, and is
trained on the error that the image then has; no gradient goes back from it, so that it changes no pixel.

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
_ENDS = 8  # what `range_ends` gives


def noise_half_range(noisy: Tensor) -> Tensor:
    """r̂ = -min(noisy), at least 0: (n, 1, 28, 28) → (n, 1, 1, 1). 0 where no pixel is below 0."""
    return (-noisy.amin(dim=(1, 2, 3), keepdim=True)).clamp_min(0.0)


def range_ends(noisy: Tensor) -> Tensor:
    """What an image's values do at both ends of 0..1: (n, 1, 28, 28) → (n, 8) float32.

    r̂ and whether it is known; the shares of pixels at exactly 0 and 1; mean and root mean square of what lies below 0
    and of what lies above 1.
    """
    pixels = noisy.flatten(1)
    below, above = (-pixels).clamp_min(0.0), (pixels - 1.0).clamp_min(0.0)
    half_range = below.amax(dim=1)
    columns = [
        half_range,
        (half_range > 0.0).to(pixels.dtype),
        (pixels == 0.0).to(pixels.dtype).mean(dim=1),
        (pixels == 1.0).to(pixels.dtype).mean(dim=1),
    ]
    for beyond in (below, above):
        columns += [beyond.mean(dim=1), beyond.square().mean(dim=1).sqrt()]
    return torch.stack(columns, dim=1)


class _Quality(nn.Module):
    """What the network has made → the image's PSNR in dB and its noise level, (n, 2).

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
        shown = functional.pixel_unshuffle(torch.cat([torch.sigmoid(logits), noisy], dim=1), 2)
        shown = shown.contiguous(memory_format=torch.channels_last)
        clean, given = shown[:, :4], shown[:, 4:]
        share = torch.sigmoid(self.share(torch.relu(self.feature(fine) + self.pixel(shown))))
        # Numbers of about one inside, decibels outside.
        expected = -(share * clean * (1.0 - clean)).mean(dim=(1, 2, 3)).clamp_min(1e-6).log10()
        ink = clean.mean(dim=(1, 2, 3))
        residual = (given - clean).square().mean(dim=(1, 2, 3)).sqrt()
        features = torch.cat([torch.stack([expected, ink, residual], dim=1), whole], dim=1)
        correction, level = self.out(torch.relu(self.hidden(features))).unbind(dim=1)
        return torch.stack([10.0 * (expected + correction), level], dim=1)


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
        version: 2 sees both ends of the range and has `logits_and_quality`; 1 is the network before that.

    Raises:
        ValueError: there is no such version.
    """

    def __init__(
        self, width: int = 32, deep: int = 64, bottleneck: int = 256, blocks: int = 1, version: int = 2
    ) -> None:
        super().__init__()
        if version not in (1, 2):
            raise ValueError(f"version {version} is unknown")
        sizes = {"width": width, "deep": deep, "bottleneck": bottleneck, "blocks": blocks}
        self.parameters_json = sizes | {"version": version}
        self.has_quality = version == 2
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

        if self.has_quality:
            shift = nn.Linear(32, width)
            # It starts as the network without: weights of version 1 go on from where they were.
            nn.init.zeros_(shift.weight)
            nn.init.zeros_(shift.bias)
            self.ends = nn.Sequential(nn.Linear(_ENDS, 32), nn.ReLU(), shift)
            self.quality = _Quality(width, bottleneck + deep + width + _ENDS)

    def logits(self, noisy: Tensor) -> Tensor:
        return self._pass(noisy, range_ends(noisy) if self.has_quality else None)[0]

    def logits_and_quality(self, noisy: Tensor) -> tuple[Tensor, Tensor]:
        ends = range_ends(noisy)
        # No gradient goes back, and the head is not for bfloat16: a decibel in it has steps of an eighth.
        logits, whole, coarse, fine = self._pass(noisy, ends)
        with torch.autocast(noisy.device.type, enabled=False):
            read = [part.detach().float() for part in (logits, whole, coarse, fine)]
            summary = torch.cat([read[1], read[2].mean(dim=(2, 3)), read[3].mean(dim=(2, 3)), ends], dim=1)
            return logits, self.quality(noisy, read[0], read[3], summary)

    def _pass(self, noisy: Tensor, ends: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits, the bottleneck (n, bottleneck), and the last features at 7×7 and at 14×14."""
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
        first = self.inlet(planes)
        if ends is not None:
            first = first + self.ends(ends)[:, :, None, None]
        fine = self.fine_in(torch.relu(first))
        coarse = self.coarse_in(torch.relu(self.down(fine)))
        bottleneck = torch.relu(self.squeeze(coarse.flatten(1)))
        coarse = self.coarse_out(torch.relu(coarse + self.expand(bottleneck).view_as(coarse)))
        fine = self.fine_out(torch.relu(self.up(coarse) + fine))
        return functional.pixel_shuffle(self.outlet(fine), 2), bottleneck, coarse, fine
