"""The default network's pass in bfloat16 on a GPU, where moving numbers takes longer than multiplying them.

As PyTorch runs the network there, half of the time goes to what lies between the products (docs/benchmarks.md). Here

- cuDNN adds the bias and makes the ReLU on the way out of a convolution (`fused_layers`);
- what a residual convolution adds is its own input, so one more in the middle of its weights says the same, and cuDNN
  has much faster kernels without an addition;
- all else is a few kernels of our own (`gpu_kernels`), each of which reads and writes its tensors once.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

from denoise_batch.models.fused_layers import ConvRelu
from denoise_batch.models.two_scales import Passed

try:
    from denoise_batch.models import gpu_kernels
except ImportError:
    gpu_kernels = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from torch import Tensor, nn

    from denoise_batch.models.bounds_unet import BoundsUNet


def gpu_pass_of(network: BoundsUNet) -> GpuPass | None:
    """The pass of a network whose weights are on a GPU and still float32; None where there are no kernels for it."""
    width, deep = network.outlet.in_channels, network.up.in_features
    sizes_fit = all(size >= 16 and size & (size - 1) == 0 for size in (width, deep))
    if gpu_kernels is None or not sizes_fit or network.expand.in_features % 64:
        return None
    return GpuPass(network)


def works(gpu_pass: GpuPass, network: BoundsUNet) -> bool:
    """Whether this machine can run it; warns where it cannot.

    Triton calls the machine's C compiler, which need not be there, and a kernel may want more than a GPU has.

    Args:
        network: whose pass it is, in bfloat16 by now.
    """
    try:
        with torch.inference_mode():
            noisy = torch.zeros((1, 1, 28, 28), device=network.outlet.weight.device)
            network.gate(noisy, noisy, gpu_pass(network, noisy).ends, gpu_kernels)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(f"the GPU's fast pass does not run here: {reason}", RuntimeWarning, stacklevel=2)
        return False
    return True


class GpuPass:
    """The pass of a network that is about to become bfloat16, from its weights as they are when this is made."""

    kernels = gpu_kernels

    def __init__(self, network: BoundsUNet) -> None:
        self._fine_in = _absorbing(network.fine_in)
        self._coarse_in, self._coarse_out = map(_all_absorbing, (network.coarse_in, network.coarse_out))
        self._fine_out = _absorbing(network.fine_out)
        flat = 49 * network.down.out_channels  # what comes behind these are the range's ends
        self._squeeze = network.squeeze.weight.detach()[:, :flat].to(torch.bfloat16).contiguous()
        self._squeeze_ends = network.squeeze.weight.detach()[:, flat:].to(torch.bfloat16).contiguous()

    def __call__(self, network: BoundsUNet, noisy: Tensor) -> Passed:
        """(n, 1, 28, 28) float32 → what the network gives."""
        count = noisy.shape[0]
        planes, ends = gpu_kernels.planes_and_ends(noisy.contiguous())
        fine = self._fine_in(network.inlet(planes))
        coarse = network.down(fine)
        for layer in self._coarse_in:
            coarse = layer(coarse)
        flat = coarse.permute(0, 2, 3, 1).reshape(count, -1)
        whole = torch.addmm(network.squeeze.bias, flat, self._squeeze.T)
        whole = torch.addmm(whole, ends.to(whole.dtype), self._squeeze_ends.T).relu_()
        for linear in network.whole:
            whole = gpu_kernels.linear_add_relu(whole, linear, whole)
        wide = gpu_kernels.linear_add_relu(whole, network.expand, flat)
        coarse = wide.view(count, 7, 7, -1).permute(0, 3, 1, 2)
        for layer in self._coarse_out:
            coarse = layer(coarse)
        up = gpu_kernels.up(coarse.contiguous(memory_format=torch.channels_last), network.up)
        fine = self._fine_out(network.join(up, fine)).contiguous(memory_format=torch.channels_last)
        logits = gpu_kernels.outlet(fine, network.outlet, ends)
        pixels = planes.permute(0, 2, 3, 1).view(count, 196, -1)[..., :4]
        return Passed(logits, whole, coarse, fine, pixels, ends)


def _all_absorbing(layers: nn.Sequential) -> list[ConvRelu]:
    return [_absorbing(layer) for layer in layers]  # type: ignore[arg-type]


def _absorbing(layer: nn.Conv2d) -> ConvRelu:
    """relu(conv(x)) in bfloat16 that is relu(x + layer(x))."""
    made = ConvRelu(layer.in_channels, layer.out_channels, 3, padding=1, device=layer.weight.device)
    weight = layer.weight.detach().clone()
    channels = torch.arange(layer.out_channels, device=weight.device)
    weight[channels, channels, 1, 1] += 1.0
    with torch.no_grad():
        made.weight.copy_(weight)
        made.bias.copy_(layer.bias)  # type: ignore[arg-type,union-attr]
    return made.to(torch.bfloat16, memory_format=torch.channels_last).requires_grad_(False)  # type: ignore[call-overload,no-any-return]
