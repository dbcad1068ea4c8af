"""Of what type the numbers of a network's products are, and where bfloat16 pays."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class Precision(StrEnum):
    """FLOAT32 throughout, or bfloat16 matrix products where the device has units for them."""

    FLOAT32 = "float32"
    AUTO = "auto"

    def bfloat16(self, device: torch.device) -> bool:
        """Whether products are to be made in bfloat16 there: it multiplies such matrices faster than float32 ones."""
        import torch

        if self is Precision.FLOAT32:
            return False
        if device.type == "cuda":
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch < 2.13 has none
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
