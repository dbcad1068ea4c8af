"""What every network has in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor


class DenoisingNetwork(nn.Module):
    """A denoiser of 28×28 images.

    Attributes:
        parameters_json: the constructor's arguments, as they stand in a model folder.
    """

    parameters_json: dict[str, Any]

    def logits(self, noisy: Tensor) -> Tensor:
        """(n, 1, 28, 28) float32 noisy → (n, 1, 28, 28) float32, the clean image before the sigmoid."""
        raise NotImplementedError

    def forward(self, noisy: Tensor) -> Tensor:
        """(n, 1, 28, 28) float32 noisy → (n, 1, 28, 28) float32 clean, in 0..1."""
        return torch.sigmoid(self.logits(noisy).float())

    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())
