"""What every network has in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor


class Outputs(NamedTuple):
    """All that a network gives of n images.

    Attributes:
        logits: (n, 1, 28, 28), what it has made, before the sigmoid; its weights are trained through these alone.
        clean: (n, 1, 28, 28) float32, in 0..1: what `forward` gives.
        quality: (n, 2) float32, the PSNR in dB that it expects of `clean`, and the noisy image's noise level, in units
            of full ink, as `NoiseDraw.degrade` defines it (an estimate, which may lie below 0); None where it does not
            say.
        trust: (n,) float32, by which the noisy image is joined with what was made of it, before it is `decided`
            (`input_gate`); None where nothing of it is kept.
    """

    logits: Tensor
    clean: Tensor
    quality: Tensor | None = None
    trust: Tensor | None = None


class Known(Protocol):
    """What a network knows of n images, from which it can say later how good they are: several batches at a time."""

    def rows(self, which: Tensor) -> Known:
        """The same of some of them, by their numbers."""

    def joined(self, others: list[Any]) -> Known:
        """The same of these and of others of the same network, one behind the other."""

    def quality(self) -> Tensor:
        """`Outputs.quality`."""


class Said(NamedTuple):
    """What it has said already, (n, 2); it is `Known`."""

    said: Tensor

    def rows(self, which: Tensor) -> Said:
        return Said(self.said.index_select(0, which))

    def joined(self, others: list[Said]) -> Said:
        return Said(torch.cat([self.said, *(other.said for other in others)]))

    def quality(self) -> Tensor:
        return self.said


class DenoisingNetwork(nn.Module):
    """A denoiser of 28×28 images.

    Attributes:
        parameters_json: the constructor's arguments, as they stand in a model folder.
        has_quality: whether it says of each image how good its output is: `outputs` have it.
        float32_parts: the layers that stay float32 where the rest computes in bfloat16 (`to_bfloat16`); None where
            nothing may.
        code_size: numbers in its bottleneck, which `code` and `decode` lead to and from; 0 without.
    """

    parameters_json: dict[str, Any]
    has_quality: bool = False
    code_size: int = 0
    float32_parts: tuple[str, ...] | None = None

    def to_bfloat16(self) -> None:
        """Turns the weights to bfloat16 where the network is made for it, which `float32_parts` says.

        It still takes float32 and gives float32 from `forward`; `logits` are bfloat16 then.
        """
        if self.float32_parts is not None:
            for name, part in self.named_modules():
                if name not in self.float32_parts and next(part.children(), None) is None:
                    part.to(torch.bfloat16)

    def to_int8(self) -> None:
        """Computes in 8-bit integers from now on, where the network is made for it; before any `to_bfloat16`."""

    @property
    def computes_in_integers(self) -> bool:
        """Whether it does (`to_int8`)."""
        return False

    @property
    def computes_in_own_kernels(self) -> bool:
        """Whether it computes in a pass of its own on a GPU, whose last bits differ from its layers'."""
        return False

    def prepare_int8(self, noisy: Tensor) -> None:
        """Chooses what `to_int8` needs and keeps it with the weights, where the network is made for it.

        Args:
            noisy: (n, 1, 28, 28) float32, images of all kinds that it is for, in random order, on its device; it is in
                float32 itself, and not in inference mode.

        Raises:
            RuntimeError: there is too little memory, or a value is not finite.
        """

    def logits(self, noisy: Tensor) -> Tensor:
        """(n, 1, 28, 28) float32 noisy → (n, 1, 28, 28) float32, the clean image before the sigmoid."""
        raise NotImplementedError

    def forward(self, noisy: Tensor) -> Tensor:
        """(n, 1, 28, 28) float32 noisy → (n, 1, 28, 28) float32 clean, in 0..1."""
        return torch.sigmoid(self.logits(noisy).float())

    def outputs(self, noisy: Tensor) -> Outputs:
        """All that it gives of (n, 1, 28, 28) float32 noisy images, in one pass."""
        logits = self.logits(noisy)
        return Outputs(logits, torch.sigmoid(logits.float()))

    def clean_and_known(self, noisy: Tensor) -> tuple[Tensor, Known]:
        """What `forward` gives of (n, 1, 28, 28) float32 noisy images, and the way to their `quality`: only of networks
        that say how good they are."""
        outputs = self.outputs(noisy)
        assert outputs.quality is not None
        return outputs.clean, Said(outputs.quality)

    def code(self, noisy: Tensor) -> Tensor:
        """(n, 1, 28, 28) float32 noisy → float32, `code_size` numbers an image in any shape (n, …)."""
        raise NotImplementedError

    def decode(self, code: Tensor) -> Tensor:
        """What `code` gave → `logits`."""
        raise NotImplementedError

    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())
