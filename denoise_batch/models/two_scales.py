"""A network of two scales, 14×14 and 7×7, apart from its layers: what it sees; image and quality out of one pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from denoise_batch.models.fused_layers import is_recorded
from denoise_batch.models.network import DenoisingNetwork, Outputs
from denoise_batch.models.noise_signs import range_ends
from denoise_batch.models.pixel_groups import grouped, side_by_side, ungrouped

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from torch import Tensor, nn

    from denoise_batch.models.input_gate import InputGate
    from denoise_batch.models.network import Known
    from denoise_batch.models.quality_head import QualityHead


PLANES = 16
"""Four pixels, their lower and upper bounds, and the first four of the range's ends."""


class Passed(NamedTuple):
    """What a pass gives.

    Attributes:
        logits: (n, 14, 14, 4).
        whole: the bottleneck (n, units).
        coarse, fine: the last features at 7×7 and 14×14, (n, channels, height, width).
        pixels: the noisy pixels (n, 196, 4).
        ends: their `range_ends`, (n, 8).
        coarse_step, fine_step: what 1 stands for in these features.
        read_fine: `fine` → what the quality head's `feature` makes of it; None where that takes it as it is.
    """

    logits: Tensor
    whole: Tensor
    coarse: Tensor
    fine: Tensor
    pixels: Tensor
    ends: Tensor
    coarse_step: float = 1.0
    fine_step: float = 1.0
    read_fine: Callable[[Tensor], Tensor] | None = None

    def rows(self, which: Tensor) -> Passed:
        """Some of the images, by their numbers."""
        some: dict[str, Any] = {name: _rows(value, which) for name, value in self._tensors().items()}
        return self._replace(**some)

    def joined(self, others: list[Passed]) -> Passed:
        """These, and others of the same network, one behind the other."""
        whole: dict[str, Any] = {
            name: torch.cat([value, *(getattr(other, name) for other in others)])
            for name, value in self._tensors().items()
        }
        return self._replace(**whole)

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in self._asdict().items() if isinstance(value, torch.Tensor)}


def _rows(images: Tensor, which: Tensor) -> Tensor:
    """Some of n, by their numbers. Of (n, channels, height, width) the channels stay the innermost, and whole images
    are copied: elsewise PyTorch takes them number by number."""
    if images.ndim < 4:
        return images.index_select(0, which)
    return images.permute(0, 2, 3, 1).index_select(0, which).permute(0, 3, 1, 2)


class Judged(NamedTuple):
    """What a pass knows of its images: it is `network.Known`."""

    network: TwoScales
    passed: Passed
    trust: Tensor

    def rows(self, which: Tensor) -> Judged:
        return Judged(self.network, self.passed.rows(which), self.trust.index_select(0, which))

    def joined(self, others: list[Judged]) -> Judged:
        passed = self.passed.joined([other.passed for other in others])
        return Judged(self.network, passed, torch.cat([self.trust, *(other.trust for other in others)]))

    def quality(self) -> Tensor:
        return self.network.quality_of(self.passed, self.trust)


class TwoScales(DenoisingNetwork):
    """A network whose first layer is `inlet`, whose pass is `_pass`, and whose heads are `gate` and `quality`."""

    has_quality = True
    inlet: nn.Conv2d
    gate: InputGate
    quality: QualityHead

    def logits(self, noisy: Tensor) -> Tensor:
        return ungrouped(self._pass(noisy).logits)

    def forward(self, noisy: Tensor) -> Tensor:
        passed = self._pass(noisy)
        return self._joined(noisy, ungrouped(passed.logits), passed.ends)[0]

    def outputs(self, noisy: Tensor) -> Outputs:
        passed = self._pass(noisy)
        logits = ungrouped(passed.logits)
        clean, trust = self._joined(noisy, logits, passed.ends)
        return Outputs(logits, clean, self.quality_of(passed, trust), trust)

    def clean_and_known(self, noisy: Tensor) -> tuple[Tensor, Known]:
        passed = self._pass(noisy)
        clean, trust = self._joined(noisy, ungrouped(passed.logits), passed.ends)
        return clean, Judged(self, passed, trust)

    def quality_of(self, passed: Passed, trust: Tensor) -> Tensor:
        """(n, 2), `Outputs.quality`, of what a pass has given and `Outputs.trust`."""
        means = [_means(passed.coarse, passed.coarse_step), _means(passed.fine, passed.fine_step)]
        summary = torch.cat([passed.whole.float(), *means, passed.ends], dim=1)
        read = None if passed.read_fine is None else passed.read_fine(passed.fine)
        said: Tensor = self.quality(passed.pixels, passed.logits.flatten(1, 2), passed.fine, summary, trust, read)
        return said

    def _joined(self, noisy: Tensor, logits: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        """What the gate gives."""
        kernels = None if is_recorded() else self._kernels
        made = torch.sigmoid(logits.float())
        if kernels is not None:
            noisy, made = noisy.contiguous(), made.contiguous()
        joined: tuple[Tensor, Tensor] = self.gate(noisy, made, ends, kernels)
        return joined

    @property
    def _kernels(self) -> ModuleType | None:
        """`gpu_kernels`, where they are to be used."""
        return None

    def _pass(self, noisy: Tensor) -> Passed:
        """The whole network but for its heads, of (n, 1, 28, 28)."""
        raise NotImplementedError

    def _ends(self, noisy: Tensor) -> Tensor:
        """(n, 1, 28, 28) → (n, 8)."""
        return range_ends(noisy)

    @torch.no_grad()
    def _planes(self, noisy: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        """(n, 1, 28, 28), (n, 8) → the pixels (n, 196, 4) and all planes (n, 16, 14, 14), of the weights' type."""
        dtype = self.inlet.weight.dtype
        pixels, signs = grouped(noisy.to(dtype)), ends[:, None].to(dtype)
        half_range = signs[..., :1]
        bounds = ((pixels - half_range).clamp_min_(0.0), (pixels + half_range).clamp_max_(1.0))
        return pixels, side_by_side(pixels, *bounds, signs[..., :4])


def _means(features: Tensor, step: float) -> Tensor:
    """(n, channels, height, width) → (n, channels) float32; of integers, in which `step` stands for 1."""
    if features.is_floating_point():
        return features.mean(dim=(2, 3), dtype=torch.float32)
    # PyTorch turns integers into numbers of four bytes first; a few images' stay near the core.
    return torch.cat([part.mean(dim=(2, 3), dtype=torch.float32) for part in torch.split(features, 128)]).mul_(step)
