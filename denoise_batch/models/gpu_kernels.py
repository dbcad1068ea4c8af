"""What `gpu_pass` has between cuDNN's convolutions, as Triton kernels: each reads and writes its tensors once.

PyTorch's CUDA builds bring Triton. Where it is missing, importing this module fails with ImportError.

All tensors are contiguous, on one GPU; images and features lie with their channels last.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from denoise_batch.models.noise_signs import RANGE_ENDS

if TYPE_CHECKING:
    from torch import Tensor

PIXELS, GROUPS, PLANES = tl.constexpr(784), tl.constexpr(196), tl.constexpr(16)
ENDS = tl.constexpr(RANGE_ENDS)


def planes_and_ends(noisy: Tensor) -> tuple[Tensor, Tensor]:
    """(n, 1, 28, 28) float32 → the planes that `TwoScales` has, (n, 16, 14, 14) bfloat16 channels last, and its
    `range_ends` (n, 8) float32, of which the last is no number where a pixel is none, or too large to be squared."""
    count = noisy.shape[0]
    planes = torch.empty((count, 14, 14, 16), dtype=torch.bfloat16, device=noisy.device)
    ends = torch.empty((count, RANGE_ENDS), dtype=torch.float32, device=noisy.device)
    _planes_and_ends[(count,)](noisy, planes, ends, num_warps=4)
    return planes.permute(0, 3, 1, 2), ends


def linear_add_relu(x: Tensor, layer: Any, other: Tensor) -> Tensor:
    """relu(other + layer(x)) of a linear layer: (n, k), (n, m) → (n, m); k a multiple of 64."""
    rows, columns = other.shape
    made = torch.empty_like(other)
    grid = (triton.cdiv(columns, 128), triton.cdiv(rows, 128))
    _linear_add_relu[grid](
        x, layer.weight, layer.bias, other, made, rows, columns, x.shape[1], 128, 128, 64, num_warps=8
    )
    return made


def up(coarse: Tensor, layer: Any) -> Tensor:
    """relu(layer) of each position, a linear layer whose features are laid out as 2×2 positions.

    Args:
        coarse: (n, deep, 7, 7), channels last.
        layer: deep → 4 width, which are (dy, dx, channel); deep and width powers of two from 16.

    Returns:
        (n, width, 14, 14), channels last.
    """
    count, deep = coarse.shape[:2]
    width = layer.out_features // 4
    made = torch.empty((count, 14, 14, width), dtype=coarse.dtype, device=coarse.device)
    grid = (triton.cdiv(count * 49, 128),)
    _up[grid](coarse, layer.weight, layer.bias, made, count * 49, deep, width, 128, num_warps=8)
    return made.permute(0, 3, 1, 2)


def outlet(fine: Tensor, layer: Any, ends: Tensor) -> Tensor:
    """A 1×1 convolution to four channels, NaN where `ends` say so.

    Args:
        fine: (n, width, 14, 14), channels last; width a power of two from 16.
        ends: (n, 8).

    Returns:
        (n, 14, 14, 4) float32.
    """
    count, width = fine.shape[:2]
    made = torch.empty((count, 14, 14, 4), dtype=torch.float32, device=fine.device)
    grid = (triton.cdiv(count * 196, 256),)
    _outlet[grid](fine, layer.weight, layer.bias, ends, made, count * 196, width, 256, num_warps=4)
    return made


def apart(noisy: Tensor, made: Tensor) -> Tensor:
    """How far images are from what was made of them: (n, 1, 28, 28) float32 twice → (n, 4) float32.

    Mean square and maximum of |noisy, clipped to 0..1, less made|; mean of made (1 - made); and the mean square of
    noisy less made in every fourth line, not clipped.
    """
    found = torch.empty((noisy.shape[0], 4), dtype=torch.float32, device=noisy.device)
    _apart[(noisy.shape[0],)](noisy, made, found, num_warps=4)
    return found


def join(noisy: Tensor, made: Tensor, trust: Tensor, whole: float) -> Tensor:
    """`input_gate.joined` of what `noisy` is when it is clipped to 0..1: (n, 1, 28, 28) float32 twice, (n,) float32."""
    out = torch.empty_like(made)
    _join[(noisy.shape[0],)](noisy, made, trust, out, whole, num_warps=4)
    return out


@triton.jit
def _planes_and_ends(noisy, planes, ends):
    image = tl.program_id(0).to(tl.int64)
    pixels = noisy + image * PIXELS
    place = tl.arange(0, 1024)
    x = tl.load(pixels + place, mask=place < PIXELS, other=0.5)  # 0.5 is at neither end
    below, above = tl.maximum(-x, 0.0), tl.maximum(x - 1.0, 0.0)
    half_range = tl.max(below)
    known = tl.where(half_range > 0.0, 1.0, 0.0)
    zeros = tl.sum(tl.where(x == 0.0, 1.0, 0.0)) / PIXELS
    ones = tl.sum(tl.where(x == 1.0, 1.0, 0.0)) / PIXELS
    not_a_number = tl.sum(x * x * 0.0)  # a GPU's maximum would lose it
    row = ends + image * ENDS
    tl.store(row, half_range)
    tl.store(row + 1, known)
    tl.store(row + 2, zeros)
    tl.store(row + 3, ones)
    tl.store(row + 4, tl.sum(below) / PIXELS)
    tl.store(row + 5, tl.sqrt(tl.sum(below * below) / PIXELS))
    tl.store(row + 6, tl.sum(above) / PIXELS)
    tl.store(row + 7, tl.sqrt(tl.sum(above * above) / PIXELS) + not_a_number)

    group, plane = tl.arange(0, 256)[:, None], tl.arange(0, 16)[None, :]
    corner, kind = plane % 4, plane // 4  # kind: the pixels, their lower bounds, their upper bounds, the signs
    place = (2 * (group // 14) + corner // 2) * 28 + 2 * (group % 14) + corner % 2
    x = tl.load(pixels + place, mask=(group < GROUPS) & (kind < 3), other=0.0)
    sign = tl.where(corner == 0, half_range, tl.where(corner == 1, known, tl.where(corner == 2, zeros, ones)))
    bound = tl.where(kind == 1, tl.maximum(x - half_range, 0.0), tl.minimum(x + half_range, 1.0))
    made = tl.where(kind == 0, x, tl.where(kind == 3, sign, bound))
    tl.store(planes + (image * GROUPS + group) * PLANES + plane, made.to(tl.bfloat16), mask=group < GROUPS)


@triton.jit
def _linear_add_relu(
    x,
    weight,
    bias,
    other,
    made,
    rows,
    columns,
    DEPTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    depth = tl.arange(0, BLOCK_DEPTH)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for start in range(0, DEPTH, BLOCK_DEPTH):
        a = tl.load(x + row[:, None] * DEPTH + (start + depth)[None, :], mask=(row < rows)[:, None], other=0.0)
        b = tl.load(
            weight + column[None, :] * DEPTH + (start + depth)[:, None], mask=(column < columns)[None, :], other=0.0
        )
        total = tl.dot(a, b, total)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    place = row[:, None] * columns + column[None, :]
    total += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    total += tl.load(other + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(made + place, tl.maximum(total, 0.0).to(made.dtype.element_ty), mask=inside)


@triton.jit
def _up(coarse, weight, bias, made, positions, DEEP: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column, depth = tl.arange(0, 4 * WIDTH), tl.arange(0, DEEP)
    inside = (position < positions)[:, None]
    a = tl.load(coarse + position[:, None].to(tl.int64) * DEEP + depth[None, :], mask=inside, other=0.0)
    b = tl.load(weight + column[None, :] * DEEP + depth[:, None])
    total = tl.dot(a, b) + tl.load(bias + column).to(tl.float32)[None, :]
    image, y, x = position // 49, position % 49 // 7, position % 7
    corner, channel = column // WIDTH, column % WIDTH
    line = (image * 14 + 2 * y)[:, None] + (corner // 2)[None, :]
    place = (line.to(tl.int64) * 14 + (2 * x)[:, None] + (corner % 2)[None, :]) * WIDTH + channel[None, :]
    tl.store(made + place, tl.maximum(total, 0.0).to(made.dtype.element_ty), mask=inside)


@triton.jit
def _outlet(fine, weight, bias, ends, made, positions, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    corner, depth = tl.arange(0, 16), tl.arange(0, WIDTH)  # a product has 16 columns at least; four are used
    inside = position < positions
    a = tl.load(fine + position[:, None] * WIDTH + depth[None, :], mask=inside[:, None], other=0.0)
    b = tl.load(weight + corner[None, :] * WIDTH + depth[:, None], mask=(corner < 4)[None, :], other=0.0)
    total = tl.dot(a, b) + tl.load(bias + corner, mask=corner < 4, other=0.0).to(tl.float32)[None, :]
    last = tl.load(ends + position // GROUPS * ENDS + (ENDS - 1), mask=inside, other=0.0)
    total += (last * 0.0)[:, None]
    tl.store(made + position[:, None] * 4 + corner[None, :], total, mask=inside[:, None] & (corner < 4)[None, :])


@triton.jit
def _apart(noisy, made, found):
    image, place = tl.program_id(0).to(tl.int64), tl.arange(0, 1024)
    inside = place < PIXELS
    x = tl.load(noisy + image * PIXELS + place, mask=inside, other=0.0)
    p = tl.load(made + image * PIXELS + place, mask=inside, other=0.0)
    far = tl.abs(tl.minimum(tl.maximum(x, 0.0), 1.0) - p)
    row = found + image * 4
    tl.store(row, tl.sum(far * far) / PIXELS)
    tl.store(row + 1, tl.max(far))
    tl.store(row + 2, tl.sum(p * (1.0 - p)) / PIXELS)
    line = tl.where((place // 28) % 4 == 1, x - p, 0.0)
    tl.store(row + 3, tl.sum(line * line) / (7 * 28))


@triton.jit
def _join(noisy, made, trust, out, whole):
    image, place = tl.program_id(0).to(tl.int64), tl.arange(0, 1024)
    inside = place < PIXELS
    x = tl.load(noisy + image * PIXELS + place, mask=inside, other=0.0)
    p = tl.load(made + image * PIXELS + place, mask=inside, other=0.0)
    trusted = tl.load(trust + image)
    weight = p * (1.0 - p) * trusted
    given = tl.minimum(tl.maximum(x, 0.0), 1.0)
    joined = p + (given - p) * (weight / (1.0 + weight))
    joined = tl.where(trusted >= whole, given, tl.where(trusted == 0.0, p, joined))
    tl.store(out + image * PIXELS + place, joined, mask=inside)
