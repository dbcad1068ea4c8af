"""Handwriting-like digits, drawn: clean 28×28 images in any number, from a seed, without a network.

A digit is written in one of its `hands`, somewhere between that hand's two extremes. Its points are shaken, and the
plane they lie in is stretched, bent, slanted and turned; a smooth curve through them is sampled, and the pen's ink is
dropped along it. As in MNIST, the ink fills a box of about 20×20 pixels, its centre of mass in the middle of the image.

Every step is an elementwise IEEE operation on numbers made of Philox's raw bits. Nothing goes through BLAS or through
a transcendental function, which round differently from one processor to the next: a seed means the same bytes anywhere.
`benchmarks/drawn_digits.py` measures how fast this is and how well classifiers read across from and to MNIST.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from denoise_batch.digits.hands import HANDS
from denoise_batch.errors import FlagError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

SIDE = 28
BLOCK = 256  # images drawn together: large enough to hide numpy's call overhead, small enough to stay in the L2 cache
SAMPLES = 80  # ink drops a digit: at most 0.9 pixels apart in the longest, which the narrowest pen still joins
REACH = 3  # pixels that the pen's tip reaches around its centre
PITCH = SIDE + REACH + 1  # of a canvas row: the zeros after each row are the border of both its neighbours
CANVAS = (SIDE + 2 * REACH) * PITCH


@dataclass(frozen=True)
class _Tables:
    """All hands as arrays: h hands, p points, `SAMPLES` ink drops."""

    cumulative: Floats  # (10, most hands of a digit): the hand is the first whose entry exceeds a uniform number
    offset: NDArray[np.int64]  # (10,) the digit's first hand
    first: Floats  # (h, 2, p)
    change: Floats  # (h, 2, p) from the first extreme to the second
    points: NDArray[np.int64]  # (h, SAMPLES, 4) the control points around each drop
    place: Floats  # (h, SAMPLES, 4) their weights in its place
    speed: Floats  # (h, SAMPLES, 4) and in the length of curve it stands for
    tips: Floats  # (steps, REACH + 1) the pen's weights at each distance from its centre, from fine to broad


def _catmull_rom(u: float) -> tuple[list[float], list[float]]:
    """Uniform Catmull-Rom: weights of four control points at u in 0..1 between the middle two; their derivatives."""
    u2, u3 = u * u, u * u * u
    place = [0.5 * w for w in (-u + 2 * u2 - u3, 2 - 5 * u2 + 3 * u3, u + 4 * u2 - 3 * u3, u3 - u2)]
    speed = [0.5 * w for w in (-1 + 4 * u - 3 * u2, -10 * u + 9 * u2, 1 + 8 * u - 9 * u2, 3 * u2 - 2 * u)]
    return place, speed


@functools.cache
def _tables() -> _Tables:
    most_points = max(len(hand.first) for hand in HANDS)
    extremes = np.zeros((2, len(HANDS), 2, most_points))
    points = np.zeros((len(HANDS), SAMPLES, 4), np.int64)
    place = np.zeros((len(HANDS), SAMPLES, 4))
    speed = np.zeros((len(HANDS), SAMPLES, 4))
    for h, hand in enumerate(HANDS):
        for extreme, xy in enumerate((hand.first, hand.second)):
            extremes[extreme, h, :, : len(xy)] = np.array(xy).T / 100 - 0.5
        pieces = [
            (stroke[max(i - 1, 0)], stroke[i], stroke[i + 1], stroke[min(i + 2, len(stroke) - 1)])
            for stroke in hand.strokes
            for i in range(len(stroke) - 1)
        ]
        lengths = np.array([math.dist(hand.first[b], hand.first[c]) for _, b, c, _ in pieces])
        # Not 0.5: where a piece ends on a half, the last bit of a root would decide, and that may differ.
        ends = np.floor(np.cumsum(lengths) / lengths.sum() * SAMPLES + 0.499).astype(int)
        begin = 0
        for piece, end in zip(pieces, ends, strict=True):
            for k in range(begin, end):
                points[h, k] = piece
                place[h, k], derivative = _catmull_rom((k - begin + 0.5) / (end - begin))
                speed[h, k] = np.array(derivative) / (end - begin)
            begin = end
    labels = [hand.label for hand in HANDS]
    cumulative = np.full((10, max(labels.count(d) for d in range(10))), 2.0)
    for d in range(10):
        shares = np.array([hand.share for hand in HANDS if hand.label == d])
        cumulative[d, : len(shares) - 1] = np.cumsum(shares)[:-1] / shares.sum()
    tips = np.exp(-0.5 * (np.arange(REACH + 1) / np.linspace(0.55, 1.25, 64)[:, None]) ** 2)
    return _Tables(
        cumulative.astype(np.float32),
        np.array([labels.index(d) for d in range(10)]),
        extremes[0].astype(np.float32),
        (extremes[1] - extremes[0]).astype(np.float32),
        points,
        place.astype(np.float32),
        speed.astype(np.float32),
        np.round(tips, 5).astype(np.float32),  # without the last bits of exp, which differ between processors
    )


class _Dice:
    """Uniform numbers of one block.

    NumPy promises the raw bits of its bit generators for ever, but not the numbers that its `Generator` makes of them.
    """

    def __init__(self, seed: int, block: int) -> None:
        self._bits = np.random.Philox(key=np.array([seed, block], np.uint64))

    def _raw(self, count: int) -> NDArray[np.uint32]:
        return self._bits.random_raw((count + 1) // 2).astype("<u8", copy=False).view("<u4")[:count]

    def labels(self) -> NDArray[np.int64]:
        """(BLOCK,) whole numbers, uniform over 0..9."""
        return (self._raw(BLOCK).astype(np.uint64) * np.uint64(10) >> np.uint64(32)).astype(np.int64)

    def uniform(self, low: float, high: float, *shape: int) -> Floats:
        """(BLOCK, *shape) float32 between low and high; one number a row unless told."""
        shape = shape or (1,)
        unit = (self._raw(BLOCK * math.prod(shape)) >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)
        return (unit * np.float32(high - low) + np.float32(low)).reshape(BLOCK, *shape)

    def bell(self, reach: float, *shape: int) -> Floats:
        """(BLOCK, *shape) float32 between -reach and reach, mostly near 0 (the sum of two uniform numbers)."""
        return self.uniform(-reach / 2, reach / 2, *shape) + self.uniform(-reach / 2, reach / 2, *shape)


def _draw_block(seed: int, block: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Rows block·BLOCK … of a seed's digits."""
    tables = _tables()
    dice = _Dice(seed, block)
    labels = dice.labels()
    hand = tables.offset[labels] + (dice.uniform(0, 1) >= tables.cumulative[labels]).sum(1)

    x, y = _control_points(dice, tables, hand)
    x, y, ink = _ink_drops(tables, hand, x, y)
    breadth = dice.uniform(0.06, 1) * dice.uniform(0.4, 0.9)
    x, y, ink = _into_box(dice, x, y, ink, breadth)
    return _stroke(x, y, ink, breadth), labels.astype(np.uint8)


def _control_points(dice: _Dice, tables: _Tables, hand: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """(BLOCK, p) x and y of each digit's control points: between the hand's extremes, shaken, then the plane bent."""
    xy = tables.first[hand] + tables.change[hand] * dice.uniform(-0.2, 1.2)[:, :, None]
    xy = xy + dice.bell(0.10, 2, xy.shape[2])
    x, y = xy[:, 0], xy[:, 1]
    x = x * dice.uniform(0.5, 1.3)
    bent_x = x + dice.bell(0.25) * y * y + dice.bell(0.3) * x * y + dice.bell(0.2) * x * x
    bent_y = y + dice.bell(0.25) * y * y + dice.bell(0.3) * x * y + dice.bell(0.2) * x * x
    x = bent_x - (dice.bell(0.45) + np.float32(0.15)) * bent_y  # the slant of most writers leans to the right
    y = bent_y + dice.bell(0.25) * bent_x
    return x, y


def _ink_drops(tables: _Tables, hand: NDArray[np.int64], x: Floats, y: Floats) -> tuple[Floats, Floats, Floats]:
    """(BLOCK, SAMPLES) x, y and ink of the drops along the curve; ink is the length that each stands for."""
    index = tables.points[hand] + (np.arange(BLOCK) * x.shape[1])[:, None, None]
    place, speed = tables.place[hand], tables.speed[hand]
    near_x, near_y = x.ravel()[index], y.ravel()[index]
    dx, dy = _four(near_x, speed), _four(near_y, speed)
    return _four(near_x, place), _four(near_y, place), np.sqrt(dx * dx + dy * dy)


def _four(values: Floats, weights: Floats) -> Floats:
    """Sum of four products over the last axis. (einsum fuses multiply and add on some processors: it rounds once.)"""
    products = values * weights
    return (products[..., 0] + products[..., 1]) + (products[..., 2] + products[..., 3])


def _into_box(dice: _Dice, x: Floats, y: Floats, ink: Floats, breadth: Floats) -> tuple[Floats, Floats, Floats]:
    """The drops in pixels: the longer side of the ink is 18 to 20.5 long, its centre of mass near the middle."""
    pen = np.float32(1.6) + np.float32(3) * breadth
    longest = np.maximum(x.max(1) - x.min(1), y.max(1) - y.min(1))[:, None]
    scale = (dice.uniform(18.0, 20.5) - pen) / longest
    total = ink.sum(1, keepdims=True)
    middle = np.float32((SIDE - 1) / 2)
    x = (x - (x * ink).sum(1, keepdims=True) / total) * scale + (middle + dice.bell(1.0))
    y = (y - (y * ink).sum(1, keepdims=True) / total) * scale + (middle + dice.bell(1.0))
    # An off-centre digit keeps its pen inside the image.
    return np.clip(x, 1, SIDE - 2), np.clip(y, 1, SIDE - 2), ink * scale


def _stroke(x: Floats, y: Floats, ink: Floats, breadth: Floats) -> NDArray[np.uint8]:
    """(BLOCK, 28, 28) uint8: each drop shared by the four pixels around it, spread by the pen's tip, cut at full."""
    column, row = x.astype(np.int64), y.astype(np.int64)
    right, down = x - column.astype(np.float32), y - row.astype(np.float32)
    left, up = 1 - right, 1 - down
    corner = (np.arange(BLOCK) * CANVAS)[:, None] + (row + REACH) * PITCH + column
    where = np.stack([corner, corner + 1, corner + PITCH, corner + PITCH + 1])
    share = np.stack([left * up, right * up, left * down, right * down]) * ink
    canvas = np.bincount(where.ravel(), share.ravel(), BLOCK * CANVAS).astype(np.float32).reshape(BLOCK, CANVAS)

    tips = _tables().tips
    tip = tips[(breadth[:, 0] * np.float32(len(tips) - 1)).astype(np.int64)]
    inside = slice(REACH * PITCH, (REACH + SIDE) * PITCH)
    spread = np.zeros_like(canvas)
    spread[:, inside] = _smear(canvas, tip, 1)
    grey = _smear(spread, tip, PITCH)
    # The tip's middle weight is 1, so a straight stroke is sqrt(2π)σ high. The gain takes that past full ink and the
    # floor cuts the tip's soft rim: together they give MNIST's share of inked pixels (19%) and its mean (0.13; here
    # 0.14), with edges as steep.
    grey *= np.float32(220) + np.float32(500) * breadth
    grey -= np.float32(60)
    np.clip(grey, np.float32(0), np.float32(255), out=grey)
    return np.ascontiguousarray(np.rint(grey).astype(np.uint8).reshape(BLOCK, SIDE, PITCH)[:, :, :SIDE])


def _smear(canvas: Floats, tip: Floats, step: int) -> Floats:
    """(BLOCK, SIDE·PITCH): the inner rows after a symmetric filter along columns (step 1) or rows (step PITCH)."""
    begin, end = REACH * PITCH, (REACH + SIDE) * PITCH
    result = canvas[:, begin:end].copy()
    for k in range(1, REACH + 1):
        pair = canvas[:, begin - k * step : end - k * step] + canvas[:, begin + k * step : end + k * step]
        pair *= tip[:, k, None]
        result += pair
    return result


def draw_digits(count: int, seed: int, start: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw digits; row i of the result is digit start + i of the seed, whatever the count.

    Args:
        count: how many digits.
        seed: 0 to 2**64 - 1.
        start: the number of the first digit.

    Returns:
        images uint8 (count, 28, 28), 0 = background, and labels uint8 (count,), uniform over 0..9.

    Raises:
        FlagError: count or start is negative, or the seed out of range.
    """
    if count < 0 or start < 0:
        raise FlagError(f"cannot draw {count} digits from number {start}", hint="--count is 0 or more")
    if not 0 <= seed < 2**64:
        raise FlagError(f"--seed {seed} is out of range", hint="use a whole number from 0 to 2**64 - 1")
    images = np.empty((count, SIDE, SIDE), np.uint8)
    labels = np.empty(count, np.uint8)
    done = 0
    while done < count:
        block, skip = divmod(start + done, BLOCK)
        take = min(BLOCK - skip, count - done)
        block_images, block_labels = _draw_block(seed, block)
        images[done : done + take] = block_images[skip : skip + take]
        labels[done : done + take] = block_labels[skip : skip + take]
        done += take
    return images, labels
