"""What a training is validated on: held-out images, noised once, and what a network makes of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional

from denoise_batch.training.batches import share, to_unit
from denoise_batch.training.objective import AllOutputs, cross_entropy, psnr_of

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from denoise_batch.models.network import DenoisingNetwork
    from denoise_batch.noise import NoiseRecipe

_BATCH, _GPU_BATCH = 500, 5000
_SEED = 20_190_403  # fixed: every training is validated on the same noise


class Validation:
    """One worker's share of the validation images.

    Noise is drawn on the CPU for all images, so that it is the same on every device and for any workers.

    Args:
        clean: (n, 28, 28) uint8 or float32, of all workers.
        noisy: the same images with noise of their own, or None: the recipe's is drawn.
        noise: the recipe's.
        drawn_beside: where there are noisy ones, drawn noise was trained on as well.
        blank_every: where noise is drawn, each so many-th image is empty before it, as in training; 0 for none.
        device: where the share goes.
        rank, workers: whose share.

    Attributes:
        clean, noisy: (m, 28, 28) float32, this worker's, on the device.
        total: n.
        all_shown: (2 n, 28, 28) float32, on the CPU: the noisy and the clean images of all workers; (3 n, 28, 28) with
            those of drawn noise beside the noisy ones.
    """

    def __init__(
        self,
        clean: NDArray[Any],
        noisy: NDArray[Any] | None,
        *,
        noise: NoiseRecipe,
        drawn_beside: bool = False,
        blank_every: int = 0,
        device: torch.device,
        rank: int,
        workers: int,
    ) -> None:
        whole = to_unit(torch.from_numpy(np.require(clean, requirements="W")))
        if noisy is None and blank_every:
            whole = whole.clone()  # the caller's may be the same memory
            whole[blank_every - 1 :: blank_every] = 0.0
        shown = [] if noisy is None else [to_unit(torch.from_numpy(noisy))]
        if noisy is None or drawn_beside:
            generator = torch.Generator().manual_seed(_SEED)
            shown.append(torch.cat([noise.apply(part, generator)[0] for part in torch.split(whole, 1000)]))
        noised = shown[0]
        rows = share(len(whole), rank, workers)
        self.clean, self.noisy = whole[rows].to(device), noised[rows].to(device)
        self.total = len(whole)
        self.all_shown = torch.cat([*shown, whole])

    @torch.no_grad()
    def errors(self, network: DenoisingNetwork, bfloat16: bool) -> Tensor:
        """Sums over this worker's images, (5,) float64: loss, squared error on noisy ones, squared error on clean ones,
        squared error in dB of the PSNR predicted of noisy ones, and their true PSNR."""
        outputs_of, device = AllOutputs(network), self.clean.device
        sums = torch.zeros(5, dtype=torch.float64, device=device)
        batch = _GPU_BATCH if device.type == "cuda" else _BATCH
        for start in range(0, len(self.clean), batch):
            clean = self.clean[start : start + batch, None]
            for place, shown in ((1, self.noisy[start : start + batch, None]), (2, clean)):
                with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                    outputs = outputs_of(shown)
                if place == 1:
                    psnr = psnr_of(outputs.clean, clean)
                    sums[0] += cross_entropy(outputs.logits.float(), clean).sum()
                    sums[4] += psnr.sum()
                    if outputs.quality is not None:
                        sums[3] += (outputs.quality[:, 0] - psnr).square().sum()
                sums[place] += functional.mse_loss(outputs.clean, clean) * len(clean)
        return sums
