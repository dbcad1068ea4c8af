"""How good an image is that was fitted to its scan, or the network's own: by what the fit came to.

    psnr = expected_of(clean, fit, expected)     # what the network expected → `alone` and `fitted`, (n,) each, in dB

A small network, two layers of 64, corrects what the network expected by how much the fit changed, what it left over,
the blur and the noise that it found. Of a scan that is otherwise blurred than by a Gaussian it knows that the fit is
worse, and of the network's image that it is not as good as the network thinks. `benchmarks/train_fitted_quality.py`
trains it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from denoise_batch.models.quality_head import MOST_PSNR

if TYPE_CHECKING:
    from torch import Tensor

    from denoise_batch.models.data_consistency import Fit

WEIGHTS_FILE: Final = Path(__file__).parent.parent / "pretrained" / "fit" / "model.safetensors"

FEATURES: Final = 13
_LEAST_BLUR = 0.3  # below it a deviation says little: its square hardly changes


class Expected(NamedTuple):
    """The PSNR in dB, 0 to 45, that is expected of n images: (n,) float32 each.

    Attributes:
        alone: of what the network made.
        fitted: of `Fit.clean`.
    """

    alone: Tensor
    fitted: Tensor


def expected_of(clean: Tensor, fit: Fit, expected: Tensor) -> Expected:
    """What is expected of images after they were fitted.

    Args:
        clean: (n, 28, 28) float32, the images before.
        fit: what came of them.
        expected: (n,) float32, the PSNR that was expected of them.
    """
    weights = _weights(clean.device)
    hidden = features_of(clean, fit, expected)
    for layer in ("first", "second"):
        hidden = torch.relu(torch.nn.functional.linear(hidden, weights[f"{layer}.weight"], weights[f"{layer}.bias"]))
    corrections = torch.nn.functional.linear(hidden, weights["last.weight"], weights["last.bias"])
    corrections = corrections.nan_to_num(0.0, 0.0, 0.0)  # of a fit that came to no number nothing is learnt
    return Expected(*(expected[:, None] + 10.0 * corrections).clamp(0.0, MOST_PSNR).unbind(dim=1))


def features_of(clean: Tensor, fit: Fit, expected: Tensor) -> Tensor:
    """What the network is told: (n, 13) float32 of about one. Arguments as in `expected_of`."""

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
        *fit.alike.unbind(dim=1),
    ]
    return torch.stack(told, dim=1)


@cache
@torch.inference_mode(False)
def _weights(device: torch.device) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {name: value.to(device) for name, value in load_file(WEIGHTS_FILE).items()}
