"""How good an image is that was fitted to its scan: what the network expected of its own says little of it any more.

    expected = expected_of(clean, fit, expected)     # before and after, (n,) in dB

A small network, two layers of 32, corrects it by what the fit came to: how much it changed, what it left over, the blur
and the noise that it found. `benchmarks/train_fitted_quality.py` trains it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from denoise_batch.models.quality_head import MOST_PSNR

if TYPE_CHECKING:
    from torch import Tensor

    from denoise_batch.models.data_consistency import Fit

WEIGHTS_FILE: Final = Path(__file__).parent.parent / "pretrained" / "fit" / "model.safetensors"

FEATURES: Final = 11
_LEAST_BLUR = 0.3  # below it a deviation says little: its square hardly changes


def expected_of(clean: Tensor, fit: Fit, expected: Tensor) -> Tensor:
    """The PSNR, in dB, that is expected of `fit.clean`: (n,) float32, 0 to 45; as it was where nothing was done.

    Args:
        clean: (n, 28, 28) float32, the images before.
        fit: what came of them.
        expected: (n,) float32, the PSNR that was expected of them.
    """
    weights = _weights(clean.device)
    hidden = features_of(clean, fit, expected)
    for layer in ("first", "second"):
        hidden = torch.relu(torch.nn.functional.linear(hidden, weights[f"{layer}.weight"], weights[f"{layer}.bias"]))
    correction = torch.nn.functional.linear(hidden, weights["last.weight"], weights["last.bias"])[:, 0]
    return torch.where(fit.done, (expected + 10.0 * correction).clamp(0.0, MOST_PSNR), expected)


def features_of(clean: Tensor, fit: Fit, expected: Tensor) -> Tensor:
    """What the network is told: (n, 11) float32 of about one. Arguments as in `expected_of`."""

    def logarithm(square: Tensor) -> Tensor:
        return 0.5 * square.clamp_min(1e-8).log10() + 2.0

    def unsure(images: Tensor) -> Tensor:
        return logarithm((images * (1.0 - images)).mean(dim=(1, 2)).square())

    blur = fit.blur.clamp_min(_LEAST_BLUR)
    told = [
        expected / 10.0 - 3.0,
        logarithm((fit.clean - clean).square().mean(dim=(1, 2))),
        logarithm(fit.noise.square()),
        fit.left.clamp_max(4.0) - 1.0,
        *(blur - 1.0).unbind(dim=1),
        (blur[:, 0] - blur[:, 1]).abs(),
        (8.0 * (fit.scale - 1.0)).clamp(-2.0, 2.0),
        4.0 * fit.lost,
        unsure(clean),
        unsure(fit.clean),
    ]
    return torch.stack(told, dim=1)


@cache
@torch.inference_mode(False)
def _weights(device: torch.device) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {name: value.to(device) for name, value in load_file(WEIGHTS_FILE).items()}
