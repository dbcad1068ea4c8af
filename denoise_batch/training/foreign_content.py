"""Images that are no digits, drawn anew at every step: a network learns from them when not to believe itself.

    foreign = draw_foreign_content(images, generator, total=len(images), first=0)

What a denoiser of digits makes of something else looks like digits, sharp and sure, however wrong it is. What it says
of its own images it learns from its own errors, and of digits alone it never learns how large these can be. So some
images of a training are of other things, of five kinds: clouds and patches, lines, flat shapes, what is printed or
struck across a cell, and the training's own images as they do not belong into one. How good the network's answer to
each is follows from the image itself, as it does for all others: nothing is declared to be wrong.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from denoise_batch.noise import SIDE

if TYPE_CHECKING:
    from torch import Tensor

_NUMBERS = 21  # drawn for each image, beside a field of white noise
_EDGES = 5  # of a shape, at most


def draw_foreign_content(images: Tensor, generator: torch.Generator, *, total: int, first: int) -> Tensor:
    """Draws as many images of other things as there are images.

    Image i is made of its own numbers and of `images[i]` alone, so that it is the same however many workers share the
    images of a step out.

    Args:
        images: (n, 28, 28) float32 in 0..1, a worker's.
        generator: on their device. It moves on by what `total` images take.
        total, first: of how many images of all workers these are the ones from `first` on.

    Returns:
        (n, 28, 28) float32 in 0..1.
    """
    mine, device = slice(first, first + len(images)), images.device
    numbers = torch.rand((_NUMBERS, total), generator=generator, device=device)[:, mine, None, None]
    white = torch.randn((total, SIDE, SIDE), generator=generator, device=device)[mine]
    smooth = _smoothed(white, numbers[0], numbers[1])
    kinds = [
        _patches(smooth, numbers[2:4]),
        _lines(smooth, numbers[2:4]),
        _shapes(smooth, numbers[2:]),
        _ruled(images, numbers[2:]),
        _out_of_place(images, numbers[2:]),
    ]
    return _chosen(kinds, numbers[-1])


def _chosen(kinds: list[Tensor], number: Tensor) -> Tensor:
    """One of several for each image, by its number in 0..1: (n, 28, 28) each, (n, 1, 1) → (n, 28, 28)."""
    made = kinds[0]
    for index, kind in enumerate(kinds[1:], start=1):
        made = torch.where(number * len(kinds) >= index, kind, made)
    return made


def _between(low: float, high: float, number: Tensor) -> Tensor:
    """0..1 → low..high, each factor as likely as any other."""
    return low * torch.exp(number * math.log(high / low))


def _third_whole(number: Tensor) -> Tensor:
    """Numbers spread evenly → the same, but that a third of them, those nearest to whole numbers, become whole."""
    whole = number.round()
    return whole + 1.5 * functional.softshrink(number - whole, 1.0 / 6.0)


def _coordinates(like: Tensor) -> Tensor:
    """The middles of the pixels of a side, (28,), from -1 to 1."""
    return (torch.arange(SIDE, device=like.device, dtype=like.dtype) + 0.5) * (2.0 / SIDE) - 1.0


def _smoothed(white: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """White noise blurred by 0.8 to 6.4 pixels each way, of deviation 1: clouds, bands and everything between."""
    pixels = torch.arange(SIDE, device=white.device, dtype=white.dtype)
    squares = (pixels[:, None] - pixels[None, :]).square()
    kernels = [torch.exp(-squares / (2.0 * _between(0.8, 6.4, number).square())) for number in (down, across)]
    first, second = (kernel / kernel.square().sum(dim=-1, keepdim=True).sqrt() for kernel in kernels)
    return first @ white @ second.transpose(1, 2)


def _patches(smooth: Tensor, numbers: Tensor) -> Tensor:
    """From grey clouds to patches with sharp edges, of a few specks to nearly all ink."""
    return torch.sigmoid(_between(2.0, 80.0, numbers[0]) * (smooth - 3.0 * (numbers[1] - 0.5)))


def _lines(smooth: Tensor, numbers: Tensor) -> Tensor:
    """Where a cloud is of one height: strokes, thin or thick, that are no writing."""
    return torch.sigmoid(12.0 * (0.1 + 0.5 * numbers[0] - (smooth - numbers[1]).abs()))


def _shapes(smooth: Tensor, numbers: Tensor) -> Tensor:
    """A flat shape of three to five edges, its grey changing to one side and like cloth."""
    x = _coordinates(smooth)
    y = x[:, None]
    middle_x, middle_y = 0.6 * (numbers[0] - 0.5), 0.6 * (numbers[1] - 0.5)
    angle, far = 2.0 * math.pi * numbers[2 : 2 + _EDGES], 0.1 + 0.9 * numbers[2 + _EDGES : 2 + 2 * _EDGES]
    # Beyond three, half of the shapes have each.
    far = torch.cat([far[:3], torch.where(numbers[12:14] < 0.5, 9.0, far[3:])])
    along = (x - middle_x) * angle.cos() + (y - middle_y) * angle.sin()
    inside = torch.sigmoid(SIDE * (far - along).amin(dim=0))
    grey = (0.2 + 0.8 * numbers[14]) * (1.0 + (numbers[15] - 0.5) * x + (numbers[16] - 0.5) * y)
    return (inside * grey * (1.0 + 0.2 * numbers[17] * smooth)).clamp(0.0, 1.0)


def _ruled(images: Tensor, numbers: Tensor) -> Tensor:
    """A frame of a form, whole or of the sides that fall into the image, hardly askew; or one or two straight strokes
    of any direction. On its own, or across the image of the training. A third runs exactly along rows and columns, as
    on forms that were drawn, not scanned. A quarter has no grey, as scans of one bit have none, whose lone lines are
    taken for salt and pepper."""
    x = _coordinates(images)
    y = x[:, None]
    frame, across = numbers[0] < 0.5, numbers[1] < 0.6
    first = torch.where(frame, 0.15 * _third_whole(numbers[2] - 0.5), 0.5 * math.pi * _third_whole(2.0 * numbers[2]))
    second = first + 0.5 * math.pi + torch.where(frame, 0.0, 2.0 * (numbers[3] - 0.5))
    # How far from two lines through a point near the middle: of a frame, to which two sides are parallel each.
    right, down = x - 0.6 * (numbers[4] - 0.5), y - 0.6 * (numbers[5] - 0.5)
    u, v = ((right * angle.cos() + down * angle.sin()).abs() for angle in (first, second))
    sides = torch.maximum(u - (0.5 + 0.7 * numbers[6]), v - (0.5 + 0.7 * numbers[7])).abs()
    strokes = torch.minimum(u, torch.where(numbers[6] < 0.5, v, 9.0))
    half_width = (0.25 + numbers[8]) * (2.0 / SIDE)
    line = torch.sigmoid(3.0 * SIDE * (half_width - torch.where(frame, sides, strokes)))
    made = torch.maximum(torch.where(across, images, 0.0), (0.25 + 0.75 * numbers[9]) * line)
    of_one_bit = torch.maximum(torch.where(across, images, 0.0), line).round()
    return torch.where(numbers[10] < 0.25, of_one_bit, made)


def _out_of_place(images: Tensor, numbers: Tensor) -> Tensor:
    """Images of the training as they do not belong into a cell: cut off beside a neighbour, one over another, light and
    dark exchanged, swollen, four of half the size, or the middle alone at twice the size.

    The other one is the same, turned: no image is made of any but its own (`draw_foreign_content`).
    """
    planes = images[:, None]
    other = images.flip(1).transpose(1, 2)
    sign = torch.where(numbers[0] < 0.5, -1.0, 1.0)
    across = ((8.0 + 12.0 * numbers[1]) * sign).round()
    down = (16.0 * (numbers[2] - 0.5)).round()
    half, other_half = (functional.avg_pool2d(part[:, None], 2)[:, 0] for part in (images, other))
    kinds = [
        torch.maximum(_moved(images, down, across), _moved(other, down, across - SIDE * sign)),
        torch.maximum(images, other),
        1.0 - images,
        functional.max_pool2d(planes, 5, 1, 2)[:, 0],
        torch.cat([torch.cat([half, other_half], dim=2), torch.cat([other_half, half.flip(2)], dim=2)], dim=1),
        functional.interpolate(planes[..., 7:21, 7:21], scale_factor=2.0, mode="bilinear")[:, 0],
    ]
    return _chosen(kinds, numbers[3])


def _moved(images: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """Moved by whole pixels, (n, 1, 1) each, empty where they come from."""
    pixels = torch.arange(SIDE, device=images.device, dtype=images.dtype)
    way = pixels[:, None] - pixels[None, :]
    rows, columns = ((way == number).to(images.dtype) for number in (down, across))
    return rows @ images @ columns.transpose(1, 2)
