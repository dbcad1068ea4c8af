"""28×28 images as 14×14 groups of 2×2 pixels, the order in which a network of two scales wants them, and back.

A group's four pixels are moved as one integer where that is possible: a copy of numbers one by one, each from another
place, takes several times as long. No gradient passes; what is trained goes back through `ungrouped` alone, which then
takes the slow way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from denoise_batch.models.fused_layers import is_recorded

if TYPE_CHECKING:
    from torch import Tensor

# Types as wide as two and as four numbers. They are copied alone, never computed with.
_PAIR = {torch.bfloat16: torch.int32, torch.float32: torch.int64}
_QUAD = {torch.uint8: torch.int32, torch.bfloat16: torch.int64, torch.float32: torch.complex128}


def grouped(images: Tensor) -> Tensor:
    """(n, 1, 28, 28) → (n, 196, 4), in the order of `pixel_unshuffle`; bfloat16 or float32."""
    if is_recorded():
        return functional.pixel_unshuffle(images, 2).flatten(2).transpose(1, 2)
    images = images.contiguous()
    if images.storage_offset() % 2:
        images = images.clone()  # pairs begin at even places
    rows = images.view(-1, 14, 2, 28).view(_PAIR[images.dtype])
    return rows.transpose(2, 3).contiguous().view(images.dtype).view(images.shape[0], 196, 4)


def side_by_side(*groups: Tensor) -> Tensor:
    """Several of (n, 196, 4), or (n, 1, 4) for all groups of an image → (n, 4 × as many, 14, 14) channels last."""
    count, dtype = groups[0].shape[0], groups[0].dtype
    if is_recorded():
        joined = torch.cat([group.expand(count, 196, 4) for group in groups], dim=2)
    else:
        wide = [group.contiguous().view(_QUAD[dtype]).expand(count, 196, 1) for group in groups]
        joined = torch.cat(wide, dim=2).view(dtype)
    return joined.view(count, 14, 14, -1).permute(0, 3, 1, 2)


def ungrouped(groups: Tensor) -> Tensor:
    """(n, 14, 14, 4) → (n, 1, 28, 28)."""
    count, dtype = groups.shape[0], groups.dtype
    if torch.is_grad_enabled() or is_recorded():
        return groups.reshape(count, 14, 14, 2, 2).transpose(2, 3).reshape(count, 1, 28, 28)
    return groups.contiguous().view(_PAIR[dtype]).transpose(2, 3).contiguous().view(dtype).view(count, 1, 28, 28)
