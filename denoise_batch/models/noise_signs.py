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
