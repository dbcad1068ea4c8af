"""The ink of scans: pencil, worn-out pens and pale print are not as dark as the ink that the models have learnt.

    ink = find_ink(pixels, polarity)                  # of a sample of the set; None: it is full
    levels = ink.of(pixels, polarity)                 # (n,) of each image, 1 = full
    full = with_ink(pixels, polarity, 1 / levels)     # what a model takes
    shown = with_ink(made, polarity, levels)          # as dark as it was

A blurred stroke is as pale as a faint one, so that an image's darkest pixels do not say how dark its ink is, and heavy
noise hides it. A small network tells how likely an image is under each level of ink (`benchmarks/train_ink_reader.py`
trains it on every blur and noise), and what many images say together settles it: the shares of levels in the set that
make its images likeliest (the nonparametric maximum likelihood estimate of a prior, by expectation-maximisation; Laird,
J. Am. Stat. Assoc. 73, 1978) are each image's prior then (empirical Bayes).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from denoise_batch.images.layouts import SIDE
from denoise_batch.images.polarity import Polarity, to_model_input

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from denoise_batch.images.buffers import Pixels

    Numbers = NDArray[np.float32]
    Doubles = NDArray[np.float64]

READER_FILE: Final = Path(__file__).parent.parent / "pretrained" / "ink" / "model.safetensors"

LEVELS: Final = np.geomspace(1.0, 0.25, 25)
"""Of full ink, what is told apart: 6% each."""

FULL_SHARE: Final = 1 / 3
"""Of the images that the network has learnt from, whose ink was full; the others' logarithm was drawn evenly."""

_LOOKED_AT = 2048
_SURE_OF_ALL, _SURE_OF_ONE = 0.7, 6.0
"""From which logarithm of a likelihood ratio on, the mean of all images and that of one, some ink is surely faint."""
_SOME, _SOME_FEW = 0.03, 2
_UNSEEN = 3  # of the faintest levels
_ONE_LEVEL = 0.97
_STEPS = 200
_BLOCK = 256
_WINDOW, _STEP = 8, 4


@dataclass(frozen=True)
class Ink:
    """How dark the ink of a set's images is.

    Attributes:
        shares: (25,), of the images, by `LEVELS`; they sum to 1.
    """

    shares: tuple[float, ...]

    @property
    def level(self) -> float:
        """The geometric mean, of full ink."""
        return float(np.exp(np.log(LEVELS) @ self.shares))

    @property
    def is_one(self) -> bool:
        """Whether all images have about the same, which needs no look at each then."""
        most = int(np.argmax(self.shares))
        return sum(self.shares[max(most - 1, 0) : most + 2]) >= _ONE_LEVEL

    def of(self, pixels: Pixels, polarity: Polarity) -> Numbers:
        """The ink of each image, (n,) from 0.25 to 1: the mean logarithm under what the image and the set say.

        Args:
            pixels: (n, 784) uint8 or float32, on a background of none.
            polarity: of the pixels; never AUTO.
        """
        if self.is_one or not len(pixels):
            return np.full(len(pixels), self.level, np.float32)
        likely = likelihoods(pixels, polarity) * np.array(self.shares)
        likely /= likely.sum(axis=1, keepdims=True)
        # What is full more likely than not is left as it is: the network has clean digits back unchanged then.
        found = np.where(likely[:, 0] > 0.5, 0.0, likely @ np.log(LEVELS))
        return np.exp(found).astype(np.float32)


def find_ink(pixels: Pixels, polarity: Polarity) -> Ink | None:
    """How dark a set's ink is; None where it is full, or noise and blur leave that open.

    Args:
        pixels: (n, 784) uint8 or float32, of good rows, on a background of none.
        polarity: of the pixels; never AUTO.
    """
    if not len(pixels):
        return None
    likely = likelihoods(pixels[:: -(-len(pixels) // _LOOKED_AT)], polarity)
    # Through heavy noise empty images look like the faintest ink: neither shows any.
    likely = likely[likely.argmax(axis=1) < len(LEVELS) - _UNSEEN]
    if not len(likely):
        return None
    shares = _most_likely_shares(likely)
    sure = np.log(likely @ shares) - np.log(likely[:, 0])
    alone = np.log(likely.max(axis=1)) - np.log(likely[:, 0]) > _SURE_OF_ONE
    if sure.mean() < max(_SURE_OF_ALL, _SURE_OF_ONE / len(sure)) and alone.sum() <= max(_SOME_FEW, _SOME * len(alone)):
        return None
    return Ink(tuple(np.round(shares / shares.sum(), 6).tolist()))


def _most_likely_shares(likely: Doubles) -> Doubles:
    """(n, 25) → (25,): expectation-maximisation, from nearly all of them full."""
    shares = np.full(len(LEVELS), 1e-3)
    shares[0] = 1.0
    shares /= shares.sum()
    for _ in range(_STEPS):
        posterior = likely * shares
        posterior /= posterior.sum(axis=1, keepdims=True)
        shares = posterior.mean(axis=0)
    return shares


def likelihoods(pixels: Pixels, polarity: Polarity) -> Doubles:
    """How likely each image is under each of `LEVELS`, apart from a factor of its own: (n, 784) → (n, 25).

    What the network gives are probabilities among the images it has learnt from; their shares are divided out.
    """
    reader = _reader()
    out = np.empty((len(pixels), len(LEVELS)))
    for start in range(0, len(pixels), _BLOCK):
        windows, summary = seen_by_reader(to_model_input(pixels[start : start + _BLOCK], polarity))
        strokes = reader(reader(windows, "window"), "stroke")
        pooled = np.concatenate([*_pools(strokes), summary], axis=1)
        scores = reader(reader(pooled, "image"), "level", last=True).astype(np.float64)
        scores = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[start : start + _BLOCK] = scores / scores.sum(axis=1, keepdims=True)
    np.maximum(out, 1e-12, out=out)
    out /= learnt_shares()
    return out


def learnt_shares() -> Doubles:
    """(25,): of the images that the network has learnt from, by level; one between two levels counts for both."""
    shares = np.full(len(LEVELS), (1 - FULL_SHARE) / (len(LEVELS) - 1))
    shares[[0, -1]] /= 2
    shares[0] += FULL_SHARE
    return shares


def seen_by_reader(images: Numbers) -> tuple[Numbers, Numbers]:
    """What the network sees of images.

    Args:
        images: (n, 784), 0 = background, 1 = ink.

    Returns:
        (n, 36, 64), windows of 8 × 8 pixels, and (n, 12), what all pixels say together: the shares of both ends of the
        range, mean and deviation of the outermost ring, what lies below 0, the largest pixel, and high quantiles of
        pixels and of the means of 2 × 2.
    """
    flat = images.clip(-1.0, 2.0)
    square = flat.reshape(-1, SIDE, SIDE)
    places = np.lib.stride_tricks.sliding_window_view(square, (_WINDOW, _WINDOW), axis=(1, 2))[:, ::_STEP, ::_STEP]
    windows = np.ascontiguousarray(places).reshape(len(flat), -1, _WINDOW * _WINDOW)
    rows = square[:, 1:] + square[:, :-1]
    means = np.sort((rows[:, :, 1:] + rows[:, :, :-1]).reshape(len(flat), -1) / 4, axis=1)
    ordered = np.sort(flat, axis=1)
    ring = np.concatenate([square[:, 0], square[:, -1], square[:, 1:-1, 0], square[:, 1:-1, -1]], axis=1)
    columns = [
        (flat <= 0).mean(axis=1),
        (flat >= 1).mean(axis=1),
        ring.std(axis=1),
        ring.mean(axis=1),
        np.maximum(-ordered[:, 0], 0),
        *(ordered[:, -place] for place in (1, 20, 60)),
        *(means[:, -place] for place in (1, 10, 30, 90)),
    ]
    return windows, np.stack(columns, axis=1).astype(np.float32)


def _pools(strokes: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    """Mean, maximum and root mean square over an image's windows: (n, 36, k) → (n, k) each."""
    square = np.square(strokes).mean(axis=1)
    return strokes.mean(axis=1), strokes.max(axis=1), np.sqrt(square + np.float32(1e-6))


@cache
def _reader() -> _Layers:
    from safetensors.numpy import load_file

    return _Layers(load_file(READER_FILE))


class _Layers:
    """The network's linear layers, by name."""

    def __init__(self, weights: dict[str, Numbers]) -> None:
        self._weights = weights

    def __call__(self, values: Numbers, layer: str, *, last: bool = False) -> Numbers:
        out: Numbers = values @ self._weights[f"{layer}.weight"].T + self._weights[f"{layer}.bias"]
        return out if last else np.maximum(out, 0, out=out)


def with_ink(pixels: Pixels, polarity: Polarity, factors: Numbers) -> Pixels:
    """Pixels whose distance from the background is multiplied by a factor for each image.

    Args:
        pixels: (n, 784) uint8 or float32.
        polarity: LIGHT_ON_DARK or DARK_ON_LIGHT.
        factors: (n,) float32.

    Returns:
        The same type; uint8 is rounded, and cut off at full ink.
    """
    dark = polarity is Polarity.DARK_ON_LIGHT
    if pixels.dtype == np.uint8:
        tables = np.rint(np.multiply.outer(factors, np.arange(256)).clip(0, 255)).astype(np.uint8)
        ink: NDArray[np.uint8] = np.take_along_axis(tables, ~pixels if dark else pixels, axis=1)
        return ~ink if dark else ink
    scale = factors[:, None].astype(np.float32)
    floats: NDArray[np.float32] = 1 - scale * (1 - pixels) if dark else scale * pixels
    return floats


def ink_lines(ink: Ink | None) -> list[str]:
    """What is said of ink that is not full: a line, none where it is."""
    if ink is None:
        return []
    if ink.is_one:
        what = f"the ink is pale, {ink.level:.0%} of full ink"
    else:
        pale = sum(share for share, level in zip(ink.shares, LEVELS, strict=True) if level < 0.95)
        what = f"the ink of {pale:.0%} of the images is pale"
    return [f"note: {what}: models are shown full ink, and what `infer` gives is as pale as it was"]
