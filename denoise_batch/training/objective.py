"""What a training looks at: a network's outputs in one pass, and how wrong it is about its own images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from torch import Tensor

    from denoise_batch.models.network import DenoisingNetwork


class Outputs(nn.Module):
    """The network as DDP wants it: what is called is `forward`, which gives logits, and quality where there is one."""

    def __init__(self, network: DenoisingNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, noisy: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.network.has_quality:
            return self.network.logits_and_quality(noisy)
        return self.network.logits(noisy), None


def cross_entropy(logits: Tensor, clean: Tensor) -> Tensor:
    """Each image's binary cross-entropy, mean over its pixels: (n, 1, 28, 28) twice → (n,)."""
    return functional.binary_cross_entropy_with_logits(logits, clean, reduction="none").mean(dim=(1, 2, 3))


def weight_of(level: Tensor, exponent: float) -> Tensor:
    """What images count in a training: (n,) noise levels → (n,), 1 at level 0.5, more below.

    The error that heavy noise leaves is a hundred times that of faint noise, so that an unweighted sum hardly looks at
    the latter. A weight that hangs on the noise alone does not change which answer is best.
    """
    return ((level + 0.1) / 0.6) ** -exponent


def quality_loss(quality: Tensor, logits: Tensor, clean: Tensor, level: Tensor) -> Tensor:
    """How wrong a network is about its own images.

    Args:
        quality: (n, 2), as `DenoisingNetwork.logits_and_quality` gives it.
        logits, clean: (n, 1, 28, 28); no gradient goes to the logits.
        level: (n,), the true noise levels.

    Returns:
        The mean over the images of the squared error of the PSNR in units of 10 dB, whose best answer is the mean and
        so free of bias, and of the absolute error of the noise level, to which small levels matter as much as large.
    """
    psnr = psnr_of(logits.detach(), clean)
    return functional.mse_loss(quality[:, 0] / 10.0, psnr / 10.0) + functional.l1_loss(quality[:, 1], level)


def psnr_of(logits: Tensor, clean: Tensor) -> Tensor:
    """Each image's PSNR in dB, at most 60: (n, 1, 28, 28) twice → (n,)."""
    return -10.0 * (torch.sigmoid(logits) - clean).square().mean(dim=(1, 2, 3)).clamp_min(1e-6).log10()
