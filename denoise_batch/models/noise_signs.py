"""What a noisy image tells of its noise before any network looks at it.

The seed's noise is uniform in [-r, r] and most of a digit's image is background (0 before the noise), so the lowest
pixel gives the half range away: r̂ = -min(noisy) is within about 1% of r. Images whose noise was clipped away (uint8
files) have no pixel below 0: then r̂ is unknown, which is not the same as "no noise".

Other noise looks otherwise at both ends of the range: clipped images have pixels at exactly 0 and 1, Gaussian noise has
longer tails below 0 than uniform noise of the same power, clean images have none at all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from denoise_batch.models.fused_layers import is_recorded

if TYPE_CHECKING:
    from torch import Tensor

RANGE_ENDS = 8
"""What `range_ends` gives of an image."""


def range_ends(noisy: Tensor) -> Tensor:
    """What an image's values do at both ends of 0..1: (n, 1, 28, 28) → (n, 8) float32.

    r̂ and whether it is known; the shares of pixels at exactly 0 and 1; mean and root mean square of what lies below 0
    and of what lies above 1.
    """
    pixels = noisy.flatten(1)
    if pixels.device.type == "cpu" and not is_recorded() and _none_beyond(pixels):
        ends = pixels.new_zeros(pixels.shape[0], RANGE_ENDS)
        ends[:, 2], ends[:, 3] = _share(pixels, 0.0), _share(pixels, 1.0)
        return ends
    below, above = pixels.neg().clamp_min_(0.0), (pixels - 1.0).clamp_min_(0.0)
    half_range, count = below.amax(dim=1), pixels.shape[1]
    columns = [
        half_range,
        (half_range > 0.0).to(pixels.dtype),
        _share(pixels, 0.0),
        _share(pixels, 1.0),
    ]
    for beyond in (below, above):
        columns += [beyond.mean(dim=1), torch.linalg.vector_norm(beyond, dim=1) / count**0.5]
    return torch.stack(columns, dim=1)


def _none_beyond(pixels: Tensor) -> bool:
    """Whether all lie in 0..1, as those of uint8 columns do; False where one is not a number, or there is none."""
    if not pixels.numel():
        return False
    lowest, highest = torch.aminmax(pixels)
    return bool(lowest >= 0.0) and bool(highest <= 1.0)


def not_a_number(ends: Tensor) -> Tensor:
    """(n, 8) → (n,): 0, or NaN for images with a pixel that is not a number, or too large to be squared."""
    return ends.sum(dim=1) * 0.0


def _share(pixels: Tensor, value: float) -> Tensor:
    """(n, pixels) → (n,): the share of an image's pixels with this value."""
    if is_recorded():
        return (pixels == value).to(pixels.dtype).mean(dim=1)
    # Written as numbers at once: to turn truth values into numbers takes longer than all the rest.
    return torch.eq(pixels, value, out=torch.empty_like(pixels)).mean(dim=1)
