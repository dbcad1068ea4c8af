"""Layers with their ReLU in one operation, where nothing is trained and oneDNN can do so.

As PyTorch runs a small network, a third of the time goes to what lies between the products: an addition and a ReLU each
read and write the whole tensor. oneDNN computes both on the way out of a product. These are the operations that
`torch.compile` turns such layers into on a CPU; called by name, they need no compiler on the user's machine. Where they
are missing, or a gradient is wanted, under autocast, on a GPU, or for export, the layers are computed one after the
other, with the same result to rounding. One thing differs: oneDNN's ReLU makes 0 of what is not a number.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import Tensor

_OPERATIONS = ("_convolution_pointwise", "_linear_pointwise", "_is_mkldnn_bf16_supported")
FUSED = torch._C._has_mkldnn and all(hasattr(torch.ops.mkldnn, name) for name in _OPERATIONS)
"""Whether this PyTorch has the operations at all."""
FUSED_BFLOAT16 = FUSED and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
"""Whether this processor has them for bfloat16."""


FUSED_CUDNN = hasattr(torch, "cudnn_convolution_relu") and hasattr(torch, "cudnn_convolution_add_relu")
"""Whether this PyTorch has cuDNN's operations of the same kind, by name."""


def is_recorded() -> bool:
    """Whether the network is not run but written down, for a compiler or another runtime: plain operations alone."""
    return bool(torch.jit.is_tracing()) or torch.compiler.is_compiling()  # type: ignore[attr-defined,no-untyped-call]


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """For what is not to be in bfloat16 on x's device. What is written down is not anyway."""
    return contextlib.nullcontext() if is_recorded() else torch.autocast(x.device.type, enabled=False)


def _by_cudnn(x: Tensor, layer: nn.Conv2d) -> bool:
    return (
        FUSED_CUDNN
        and x.is_cuda
        # Not `is_acceptable`: it knows no bfloat16.
        and torch.backends.cudnn.enabled
        and torch.backends.cudnn.is_available()  # type: ignore[no-untyped-call]
        and x.dtype == layer.weight.dtype
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cuda")
        and not is_recorded()
    )


def _fused(x: Tensor, layer: nn.Conv2d | nn.Linear) -> bool:
    return (
        (FUSED_BFLOAT16 if x.dtype == torch.bfloat16 else FUSED)
        and x.dtype == layer.weight.dtype
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not is_recorded()
    )


class ConvRelu(nn.Conv2d):
    """relu(conv(x))."""

    def forward(self, x: Tensor) -> Tensor:
        if _by_cudnn(x, self):
            shape = (self.stride, self.padding, self.dilation, self.groups)
            return torch.cudnn_convolution_relu(x, self.weight, self.bias, *shape)  # type: ignore[arg-type]
        if not _fused(x, self):
            return torch.relu(super().forward(x))
        made: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, self.weight, self.bias, self.padding, self.stride, self.dilation, self.groups, "relu", [], ""
        )
        return made


def add_conv_relu(conv: nn.Conv2d, x: Tensor, other: Tensor) -> Tensor:
    """relu(other + conv(x))."""
    shape = {name: getattr(conv, name) for name in ("padding", "stride", "dilation", "groups")}
    if _by_cudnn(x, conv):
        order = (shape["stride"], shape["padding"], shape["dilation"], shape["groups"])
        return torch.cudnn_convolution_add_relu(x, conv.weight, other, 1.0, conv.bias, *order)
    if not _fused(x, conv):
        return torch.relu(other + functional.conv2d(x, conv.weight, conv.bias, **shape))
    made: Tensor = torch.ops.mkldnn._convolution_pointwise.binary(
        x, other, conv.weight, conv.bias, *shape.values(), "add", 1.0, "relu", [], ""
    )
    return made


class ResidualConv(nn.Conv2d):
    """relu(other + conv(x)), 3×3, as many channels out as in; `other` is x itself if it is not given."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        return add_conv_relu(self, x, x if other is None else other)


class LinearRelu(nn.Linear):
    """relu(linear(x)); fused in bfloat16 alone, the only type that oneDNN is given for linear layers."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.bfloat16 or not _fused(x, self):
            return torch.relu(super().forward(x))
        made: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "relu", [], "")
        return made


class ResidualLinear(nn.Linear):
    """relu(other + linear(x)), where `other` is x itself if it is not given."""

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        other = x if other is None else other
        if x.dtype != torch.bfloat16 or not _fused(x, self):
            return torch.relu(other + super().forward(x))
        made: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, "add")
        return made.relu_()
