"""The seed's convolutional autoencoder, layer for layer as Keras builds it: 4,385 parameters.

Three 3×3 convolutions, each followed by a 2×2 max pooling, take 28×28 to a code of 8×4×4 = 128 numbers; four
convolutions with 2× up-sampling between them lead back. Keras' `same` pooling of 7×7 gives 4×4 (torch: ceil_mode),
and the last hidden convolution has no padding, which brings 16×16 to 14×14.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from denoise_batch.models.network import DenoisingNetwork

if TYPE_CHECKING:
    from torch import Tensor


def _glorot(module: nn.Module) -> None:
    """Keras' defaults: Glorot-uniform weights, zero biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class _Encoder(DenoisingNetwork):
    """The half that both variants share."""

    code_size = 128

    def __init__(self) -> None:
        super().__init__()
        self.parameters_json = {}
        self.encode1 = nn.Conv2d(1, 16, 3, padding=1)
        self.encode2 = nn.Conv2d(16, 8, 3, padding=1)
        self.encode3 = nn.Conv2d(8, 8, 3, padding=1)

    def code(self, noisy: Tensor) -> Tensor:
        """(n, 1, 28, 28) float32 noisy → (n, 8, 4, 4) float32, the bottleneck's 128 numbers."""
        x = noisy
        for layer in (self.encode1, self.encode2, self.encode3):
            x = functional.max_pool2d(torch.relu(layer(x)), 2, ceil_mode=True)
        return x

    def logits(self, noisy: Tensor) -> Tensor:
        return self.decode(self.code(noisy))


class SeedAutoencoder(_Encoder):
    """The seed's network: up-sampling by repeating each pixel 2×2."""

    def __init__(self) -> None:
        super().__init__()
        self.decode1 = nn.Conv2d(8, 8, 3, padding=1)
        self.decode2 = nn.Conv2d(8, 8, 3, padding=1)
        self.decode3 = nn.Conv2d(8, 16, 3)
        self.output = nn.Conv2d(16, 1, 3, padding=1)
        _glorot(self)

    def decode(self, code: Tensor) -> Tensor:
        x = code
        for layer in (self.decode1, self.decode2, self.decode3):
            x = functional.interpolate(torch.relu(layer(x)), scale_factor=2.0, mode="nearest")
        out: Tensor = self.output(x)
        return out


class TransposedSeedAutoencoder(_Encoder):
    """The variant that the seed mentions: up-sampling by learnt, strided transposed convolutions.

    4 → 8 → 16 → 14 (the unpadded convolution) → 28, as in `SeedAutoencoder`, each `Conv2D + UpSampling2D` pair
    replaced by one 3×3 transposed convolution of stride 2.
    """

    def __init__(self) -> None:
        super().__init__()
        self.decode1 = nn.ConvTranspose2d(8, 8, 3, stride=2, padding=1, output_padding=1)
        self.decode2 = nn.ConvTranspose2d(8, 8, 3, stride=2, padding=1, output_padding=1)
        self.narrow = nn.Conv2d(8, 16, 3)
        self.decode3 = nn.ConvTranspose2d(16, 16, 3, stride=2, padding=1, output_padding=1)
        self.output = nn.Conv2d(16, 1, 3, padding=1)
        _glorot(self)

    def decode(self, code: Tensor) -> Tensor:
        x = code
        for layer in (self.decode1, self.decode2, self.narrow, self.decode3):
            x = torch.relu(layer(x))
        out: Tensor = self.output(x)
        return out
