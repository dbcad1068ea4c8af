"""Our network: a small U-Net that is told how far each pixel can lie from its clean value.

The seed's noise is uniform in [-r, r], and r̂ = -min(noisy) is within about 1% of r (`noise_signs`). So every blurred
pixel lies between max(0, noisy - r̂) and min(1, noisy + r̂). Both bounds are inputs beside the pixels; at heavy noise
they are worth about 1 dB. What both ends of the range say of the noise is an input as well, so that the network can
tell the kinds of noise apart, and does not take an r̂ that was clipped away for "no noise".

It has two scales, 14×14 (the pixels unshuffled 2×2) and 7×7, and a fully connected bottleneck that sees the whole digit
at once. It costs a CPU no more than the seed's network of 4,385 weights does, since every layer was chosen by its time
on a core and by what it is worth (docs/experiments.md), measured one by one:

- 32 channels at 14×14 and 64 at 7×7, which fill the vector units;
- residual blocks have one convolution, so that addition and ReLU come out of the product (`fused_layers`);
- a linear layer stands in place of a transposed convolution, and a 1×1 convolution at the end;
- pixels are moved in groups as one integer, in a third of the time of moving them one by one (`pixel_groups`);
- it computes in 8-bit integers where the device multiplies these faster (`int8`), else in bfloat16 where it does that
  (`DenoisingNetwork.to_bfloat16`), on a GPU in a pass of its own (`gpu_pass`).

What has hardly any noise it leaves as it is (`input_gate`). Beside the image it says how good it takes the image to be
(`quality_head`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from denoise_batch.models.channel_scales import balance_channels
from denoise_batch.models.fused_layers import ConvRelu, LinearRelu, ResidualConv, ResidualLinear, is_recorded
from denoise_batch.models.gpu_pass import GpuPass, gpu_pass_of, works
from denoise_batch.models.input_gate import InputGate
from denoise_batch.models.int8 import INT8, IntegerPass, plane_steps, stands_for, sums_exactly
from denoise_batch.models.noise_signs import RANGE_ENDS, not_a_number
from denoise_batch.models.quality_head import QualityHead
from denoise_batch.models.rounding import choose_cutoffs, choose_integers
from denoise_batch.models.two_scales import PLANES, Passed, TwoScales

if TYPE_CHECKING:
    from types import ModuleType

    from torch import Tensor


class BoundsUNet(TwoScales):
    """A U-Net of two scales and one global bottleneck, fed with bounds.

    Args:
        width: channels at 14×14.
        deep: channels at 7×7.
        bottleneck: units of the global fully connected layers.
        blocks_in, blocks_out: residual convolutions at 7×7 before and after the bottleneck.

    Raises:
        ValueError: one of them is below 1, of the last two below 0.
    """

    float32_parts = ("gate.hidden", "gate.out", "quality.hidden", "quality.out")

    def __init__(
        self, width: int = 32, deep: int = 64, bottleneck: int = 256, blocks_in: int = 1, blocks_out: int = 1
    ) -> None:
        super().__init__()
        if min(width, deep, bottleneck) < 1 or min(blocks_in, blocks_out) < 0:
            raise ValueError("a size is too small")
        self.parameters_json = {
            "width": width,
            "deep": deep,
            "bottleneck": bottleneck,
            "blocks_in": blocks_in,
            "blocks_out": blocks_out,
        }
        self.inlet = ConvRelu(PLANES, width, 3, padding=1)
        self.fine_in = ResidualConv(width)
        self.down = ConvRelu(width, deep, 2, stride=2)
        self.coarse_in = nn.Sequential(*(ResidualConv(deep) for _ in range(blocks_in)))
        self.squeeze = LinearRelu(49 * deep + RANGE_ENDS, bottleneck)
        self.whole = nn.Sequential(*(ResidualLinear(bottleneck, bottleneck) for _ in range(2)))
        self.expand = ResidualLinear(bottleneck, 49 * deep)
        self.coarse_out = nn.Sequential(*(ResidualConv(deep) for _ in range(blocks_out)))
        self.up = LinearRelu(deep, 4 * width)
        self.join = ResidualConv(width)
        self.fine_out = ResidualConv(width)
        self.outlet = nn.Conv2d(width, 4, 1)
        self.gate = InputGate()
        self.quality = QualityHead(width, bottleneck + deep + width + RANGE_ENDS)
        self._integers: IntegerPass | None = None
        self._on_gpu: GpuPass | None = None
        self.largest: Tensor
        self.register_buffer("largest", torch.zeros(len(self.measured_layers())))
        for layer in self.rounded_layers():
            weight = layer.weight[:, : 49 * deep] if layer is self.squeeze else layer.weight
            # Not `zeros_like`: without storage (`bundle.load`) it imports sympy, which takes a core up to a second.
            layer.register_buffer("integers", torch.zeros(weight.shape, dtype=torch.int8))

    def measured_layers(self) -> list[nn.Module]:
        """The layers whose largest values `largest` holds, in its order; zeros until they are measured."""
        before = [self.inlet, self.fine_in, self.down, *self.coarse_in]
        return [*before, self.whole, self.expand, *self.coarse_out, self.up, self.join, self.fine_out]

    def rounded_layers(self) -> list[Any]:
        """The layers whose weights have `integers`, in the order of the pass; zeros until they are chosen.

        Of `squeeze` they are those of the pixels' features: the range's ends behind them stay float32.
        """
        coarse = [*self.coarse_in, self.squeeze, self.expand, *self.coarse_out]
        return [self.inlet, self.fine_in, self.down, *coarse, self.up, self.join, self.fine_out]

    def chains(self) -> list[list[Any]]:
        """Layers that add to each other's channels, so that a channel has one scale in all of them: 14×14 and 7×7."""
        fine = [self.inlet, self.fine_in, self.join, self.fine_out]
        return [fine, [self.down, *self.coarse_in, self.expand, *self.coarse_out]]

    def readers(self) -> list[list[Any]]:
        """Layers whose rounded weights read the channels of each chain. `squeeze` does as well, but has so many inputs
        that it hardly matters how finely they are rounded."""
        return [[self.fine_in, self.down, self.fine_out], [*self.coarse_in, *self.coarse_out, self.up]]

    @torch.no_grad()
    def scale_channels(self, fine: Tensor, coarse: Tensor) -> None:
        """Multiplies what `chains` give, channel by channel, by factors above 0, and divides all weights that read it.

        What the network makes stays the same, to the last bit where the factors are powers of two.

        Args:
            fine: (width,), at 14×14.
            coarse: (deep,), at 7×7.
        """
        for chain, factors in zip(self.chains(), (fine, coarse), strict=True):
            for layer in chain:
                outputs = factors.repeat(len(layer.bias) // len(factors))  # `expand` has one for each place
                layer.weight.mul_(outputs.view(-1, *[1] * (layer.weight.ndim - 1)))
                layer.bias.mul_(outputs)
        of_fine, of_coarse = self.readers()
        for factors, layers in ((fine, [*of_fine, self.outlet, self.quality.feature]), (coarse, of_coarse)):
            for layer in layers:
                layer.weight.div_(factors.view(1, -1, *[1] * (layer.weight.ndim - 2)))
        self.squeeze.weight[:, : 49 * len(coarse)].div_(coarse.repeat(49))
        # Its last inputs: means of the features at 7×7 and at 14×14, and the range's ends.
        means = self.quality.hidden.weight[:, -(len(coarse) + len(fine) + RANGE_ENDS) : -RANGE_ENDS]
        means.div_(torch.cat([coarse, fine]))

    def prepare_int8(self, noisy: Tensor) -> None:
        self._integers = self._on_gpu = None
        for layer in self.rounded_layers():  # until all of them are chosen, there are none
            layer.integers.zero_()
        balance_channels(self, noisy)
        choose_cutoffs(self, noisy)
        choose_integers(self, noisy)

    def to_int8(self) -> None:
        if INT8 and sums_exactly() and self._integers_are_chosen():
            self._integers = IntegerPass(self)

    def _integers_are_chosen(self) -> bool:
        """Whether all are, and not for plainly other weights or other steps: they would make other pictures."""
        first, *others = self.rounded_layers()
        return (
            bool((self.largest > 0).all())
            and all(bool(layer.integers.any()) for layer in (first, *others))
            and stands_for(first, plane_steps(first.weight.device))
            and all(map(stands_for, others))
        )

    @property
    def computes_in_integers(self) -> bool:
        return self._integers is not None

    def to_bfloat16(self) -> None:
        made = gpu_pass_of(self) if self.inlet.weight.is_cuda else None
        super().to_bfloat16()
        self._on_gpu = made if made is not None and works(made, self) else None

    @property
    def computes_in_own_kernels(self) -> bool:
        return self._on_gpu is not None

    @property
    def _kernels(self) -> ModuleType | None:
        return None if self._on_gpu is None else self._on_gpu.kernels

    def _pass(self, noisy: Tensor) -> Passed:
        if self._integers is not None:
            return self._integers(noisy)
        if self._on_gpu is not None and not is_recorded():
            return self._on_gpu(self, noisy)
        ends = self._ends(noisy)
        pixels, planes = self._planes(noisy, ends)
        count = noisy.shape[0]  # len() would make it a constant for compilers
        fine = self.fine_in(self.inlet(planes))
        coarse = self.coarse_in(self.down(fine))
        flat = coarse.permute(0, 2, 3, 1).reshape(count, -1)
        whole = self.whole(self.squeeze(torch.cat([flat, ends.to(flat.dtype)], dim=1)))
        coarse = self.coarse_out(self.expand(whole, flat).view(count, 7, 7, -1).permute(0, 3, 1, 2))
        # (n, 7, 7, (2, 2, width)) → (n, 14, 14, width)
        up = self.up(coarse.permute(0, 2, 3, 1)).view(count, 7, 7, 2, -1).transpose(2, 3).reshape(count, 14, 14, -1)
        fine = self.fine_out(self.join(up.permute(0, 3, 1, 2), fine))
        # Fused ReLUs make 0 of what is not a number, and digits must not come of it.
        logits = self.outlet(fine).permute(0, 2, 3, 1) + not_a_number(ends)[:, None, None, None]
        return Passed(logits, whole, coarse, fine, pixels, ends)
