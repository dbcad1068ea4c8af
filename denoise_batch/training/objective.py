"""What a training looks at: a network's outputs in one pass, and how wrong it is about its own images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from denoise_batch.models.input_gate import input_weight
from denoise_batch.models.quality_head import MOST_PSNR

if TYPE_CHECKING:
    from torch import Tensor

    from denoise_batch.models.network import DenoisingNetwork, Outputs


class AllOutputs(nn.Module):
    """The network as DDP wants it: what is called is `forward`, which gives its `outputs`."""

    def __init__(self, network: DenoisingNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, noisy: Tensor) -> Outputs:
        return self.network.outputs(noisy)


def heads_loss(outputs: Outputs, noisy: Tensor, truth: Tensor, level: Tensor, counts: Tensor | None = None) -> Tensor:
    """How wrong a network's heads are, about what to keep and about its own images; 0 where it has none.

    Args:
        noisy, truth: (n, 1, 28, 28).
        level: (n,), the true noise levels.
        counts: (n,), what each image counts in what is kept (`Batch.counts`); None counts all alike.
    """
    loss = truth.new_zeros(())
    if outputs.trust is not None:
        loss = loss + gate_loss(outputs.trust, noisy, torch.sigmoid(outputs.logits.detach().float()), truth, counts)
    if outputs.quality is not None:
        loss = loss + quality_loss(outputs.quality, outputs.clean, truth, level)
    return loss


def cross_entropy(logits: Tensor, clean: Tensor) -> Tensor:
    """Each image's binary cross-entropy, mean over its pixels: (n, 1, 28, 28) twice → (n,)."""
    return functional.binary_cross_entropy_with_logits(logits, clean, reduction="none").mean(dim=(1, 2, 3))


def weight_of(quality: Tensor | None, exponent: float) -> Tensor | float:
    """What images count in a training, by the PSNR that the network expects of its own: 1 at 20 dB.

    The error that heavy noise leaves is a hundred times that of faint noise, so that an unweighted sum hardly looks at
    the latter; nor at salt and pepper or blur, of which little is left. At an exponent of 1 errors count roughly by how
    large they are relative to what is expected, as decibels do.

    What is expected hangs on the noisy image alone and gets no gradient, so that a weight, right or wrong, does not
    change which answer to an image is best; it says what a network is to be good at that cannot be good at everything.
    It moves with the weights, and what goes well counts more than before: its bounds end that.

    Args:
        quality: (n, 2), as `Outputs` has it; no gradient goes to it. It is about the image that comes out, after what
            is let through (`input_gate`), which differs beyond the upper bound alone. None counts all alike.

    Returns:
        (n,), from 10^-exponent (at 10 dB) to 10^exponent (at 30 dB), or 1.
    """
    if quality is None or not exponent:
        return 1.0
    weight: Tensor = 10.0 ** (exponent * (quality[:, 0].detach() / 10.0 - 2.0).clamp(-1.0, 1.0))
    return weight


def gate_loss(trust: Tensor, noisy: Tensor, made: Tensor, truth: Tensor, counts: Tensor | None = None) -> Tensor:
    """How much worse or better images become by what is kept of the noisy ones.

    Args:
        trust: (n,), in the noisy images.
        noisy, made, truth: (n, 1, 28, 28), the noisy images, what the network makes of them, and what it should.
        counts: (n,), what each image counts; None counts all alike.

    Returns:
        The mean over the images of their squared error in units of what it is if nothing is kept, so that faint noise
        and heavy noise count alike; and a little of its logarithm, without which exact images were never exact.
    """
    share = input_weight(made, trust[:, None, None, None])
    error = (made + share * (noisy.clamp(0.0, 1.0) - made) - truth).square().mean(dim=(1, 2, 3))
    ratio = (error + 1e-7) / ((made - truth).square().mean(dim=(1, 2, 3)) + 1e-5)
    loss = ratio + 0.1 * ratio.log()
    return (loss if counts is None else loss * counts).mean()


def quality_loss(quality: Tensor, clean: Tensor, truth: Tensor, level: Tensor) -> Tensor:
    """How wrong a network is about its own images.

    Args:
        quality: (n, 2), as `Outputs` has it.
        clean, truth: (n, 1, 28, 28), what it gives and what it should; no gradient goes to the former.
        level: (n,), the true noise levels.

    Returns:
        The mean over the images of the squared error of the PSNR in units of 10 dB, whose best answer is the mean and
        so free of bias, and of the absolute error of the noise level, to which small levels matter as much as large.
    """
    return loss_about(quality, psnr_of(clean.detach(), truth), level)


def loss_about(quality: Tensor, psnr: Tensor, level: Tensor) -> Tensor:
    """`quality_loss` of images whose true PSNR, (n,), is known."""
    return functional.mse_loss(quality[:, 0] / 10.0, psnr / 10.0) + functional.l1_loss(quality[:, 1], level)


def psnr_of(clean: Tensor, truth: Tensor) -> Tensor:
    """Each image's PSNR in dB, at most `MOST_PSNR`: (n, 1, 28, 28) twice → (n,)."""
    return -10.0 * (clean - truth).square().mean(dim=(1, 2, 3)).clamp_min(10.0 ** (-MOST_PSNR / 10.0)).log10()
