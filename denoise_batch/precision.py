"""Of what type the numbers of a network's products are, and where which of them pays."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class Precision(StrEnum):
    """FLOAT32 throughout; BFLOAT16 for products where the device has units for them; AUTO takes 8-bit integers as well.

    Integers are for trained networks that are made for them, on CPUs.
    """

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    AUTO = "auto"

    def bfloat16(self, device: torch.device) -> bool:
        """Whether products are to be made in bfloat16 there: it multiplies such matrices faster than float32 ones."""
        import torch

        if self is Precision.FLOAT32:
            return False
        if device.type == "cuda":
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
        return bool(_units("amx_bf16") or _units("avx512_bf16"))

    def int8(self, device: torch.device) -> bool:
        """Whether products are to be made in 8-bit integers there: it multiplies these faster than other numbers.

        x86 from AVX2 on does, twice as fast as float32, and several times with units of its own for it (VNNI, AMX).
        """
        return self is Precision.AUTO and device.type == "cpu" and _units("avx2")


def _units(name: str) -> bool:
    """Whether the CPU has what PyTorch knows by this name."""
    import torch

    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch < 2.13 has none
    return bool(capabilities.get(name))
