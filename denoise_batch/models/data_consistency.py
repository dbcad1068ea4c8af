"""Makes an image agree with its scan where hardly any noise hides it: blurred again, it must give what was scanned.

    fit = fitted(scans, expected_psnr)     # `scans.Scans` of images with little noise → `Fit`: images, and how it went

A network has one set of weights for all noise, and is far from exact where a scan says nearly everything: of a digit
that is only blurred, has the little noise of a scanner, or some of whose pixels were struck out. There the way from the
scan to the digit is no matter of learning. A scan is

    y = K x + n

with K a Gaussian blur of unknown deviations down and across, and n white noise of unknown variance s; in salt and
pepper what lies at either end of the range says nothing. The network's image m is taken for the mean of what x may be,
and c m (1 - m) for its pixels' variances: a pixel that was trained on cross-entropy is unsure by a share of that, and c
makes the mean of all the squared error that the network expects. The mean of x given y is then x = m + e with

    e = argmin |y - K (m + e)|² / s + Σ e² / (c m (1 - m))

(linear Gaussian inverse theory: Tarantola, Inverse Problem Theory, SIAM 2005, section 3.2.2), by conjugate gradients in
units of each pixel's deviation. Blur, noise and what is lost are read off the same image, in turns with e: the blur by
Gauss-Newton steps (by the heat equation, the derivative of K by its variance is half a second derivative), s off what e
leaves. From the third round on what has become of the image is m. Pixels of which the network is sure stay as they are,
paper among them.

Not every scan is a digit, blurred by a Gaussian, with white noise. The network's image stays where it shows that this
one is none: where the blur would be as strong as may be; where what is left over lies around the strokes, or more had
to be changed than the network is wrong; and where there is so much noise that the network knows all this could add.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from denoise_batch.models.scans import (
    FAR,
    INK,
    Struck,
    blurred,
    cosine_transform,
    matrices_of,
    noise_of,
    numbers,
    struck_pixels,
)
from denoise_batch.noise import SIDE, blur_matrices

if TYPE_CHECKING:
    from torch import Tensor

    from denoise_batch.models.scans import Scans

MOST_NOISE: Final = 0.06
"""Root mean square of noise from which on the network's image stays, in units of full ink, unless pixels were lost."""
_LITTLE_NOISE: Final = 0.006  # with less than that, far more can be had, for far more steps

_STEPS = (4, 3, 6, 6, 6, 8)  # of conjugate gradients, in each round
_ANEW = 2  # from which round on the last one's image stands for the network's
_MORE_WHERE_LOST = 8.0  # noise at first: what is lost makes m worse
_FALLS = 0.9
_TAKEN = 1.3  # e takes a quarter of the noise for signal: so much more than what it leaves there is
_STEEPEST = 0.4  # the most that a blur's variance changes at a time, in square pixels
_MOST_LEFT, _LEFT_FROM = 1.12, 0.03  # around the strokes, by what is left everywhere; from so much noise on it is sure
_MOST_CHANGED, _CHANGED_FROM = 1.6, 0.006  # mean square, by the network's error
_ONE_SIDED = 0.4  # of blurs whose deviations are so far apart the network expects too much of its own image
_TINY = 1e-12


class Fit(NamedTuple):
    """What came of n images.

    Attributes:
        clean: (n, 28, 28) float32, in 0..1.
        trusted: (n,) bool; where it is not, the scan is not what it was taken for, and `clean` may be anything.
        noise: (n,) float32, root mean square of the noise that was found, in units of full ink.
        blur: (n, 2) float32, deviations of the blur that was found, down and across, in pixels.
        lost: (n,) float32, share of the pixels that say nothing.
        left: (n,) float32, root mean square of what is left over around the strokes, by that everywhere.
        scale: (n,) float32, by how much the scan is darker around the strokes than it should be.
        alike: (n, 2) float32, the correlation of what is left over there with its neighbours down and across: of noise
            there is none.
    """

    clean: Tensor
    trusted: Tensor
    noise: Tensor
    blur: Tensor
    lost: Tensor
    left: Tensor
    scale: Tensor
    alike: Tensor


@torch.no_grad()
def fitted(scans: Scans, expected_psnr: Tensor) -> Fit:
    """Fits images to their scans.

    Args:
        scans: of images that all fit.
        expected_psnr: (n,) float32, which the network expects of each, in dB.
    """
    error = torch.pow(10.0, -expected_psnr / 10.0)
    variance = scans.mean * (1.0 - scans.mean)
    smooth = _smoothing(variance.device)
    near = numbers(torch.gt, smooth @ variance @ smooth.T, INK)
    noise = torch.where(scans.struck, _MORE_WHERE_LOST, 1.0) * scans.noise
    none = torch.zeros_like(variance)
    state = _State(
        scans.given,
        near,
        error,
        scans.limit,
        *_prior(scans.mean, error),
        none,
        scans.shown,
        scans.blur,
        noise,
        scans.lost,
        scans.struck,
        torch.ones_like(noise),
        scans.most_blur,
    )
    went_on, whole = torch.arange(len(noise), device=noise.device), None
    for turn, steps in enumerate(_STEPS):
        before = state.noise
        state = _improved(state.anew() if turn >= _ANEW else state, steps, first=turn == 0)
        # It pays while the noise turns out to be less and less, and where there is hardly any.
        pays = ((state.noise < _FALLS * before) | (state.noise < _LITTLE_NOISE**2)) & (state.noise < state.limit)
        whole = _Outcome.of(state) if whole is None else whole.with_rows(went_on, _Outcome.of(state))
        rows = pays.nonzero()[:, 0]
        if not len(rows):
            break
        if len(rows) < len(pays):
            state, went_on = state.rows(rows), went_on[rows]
    assert whole is not None
    changed = (whole.made - scans.mean).square_().mean(dim=(1, 2)) / error  # not a number where a pixel is none
    counted = near.sub_(whole.lost).clamp_min_(0.0)
    shown = whole.shown * counted
    return Fit(
        whole.made,
        _trusted(scans, whole, changed) & torch.isfinite(changed),
        whole.noise.sqrt(),
        whole.blur.sqrt(),
        whole.lost.mean(dim=(1, 2)),
        whole.left,
        scale=_product(scans.given, shown) / _product(whole.shown, shown).clamp_min(_TINY),
        alike=_alike((scans.given - whole.shown).mul_(counted)),
    )


def _trusted(scans: Scans, whole: _Outcome, changed: Tensor) -> Tensor:
    """(n,) bool: which images are what they are taken for, by what became of them.

    Args:
        changed: (n,), mean square of what was changed, by the error that the network expects.
    """
    noise, blur = whole.noise.sqrt(), whole.blur.sqrt()
    possible = blur.amax(dim=1) < scans.believed
    one_sided = (blur[:, 0] - blur[:, 1]).abs() >= _ONE_SIDED
    around = (whole.left > _MOST_LEFT) & (noise > _LEFT_FROM)
    too_much = (changed > _MOST_CHANGED) & (noise > _CHANGED_FROM)
    plain = (noise < MOST_NOISE) & (one_sided | ~(around | too_much))
    return possible & torch.where(scans.struck, whole.noise < scans.limit, plain)


def _alike(left: Tensor) -> Tensor:
    """(n, 28, 28), what is left over, 0 where it does not count → `Fit.alike`."""
    down, across = _product(left[:, 1:], left[:, :-1]), _product(left[:, :, 1:], left[:, :, :-1])
    return torch.stack([down, across], dim=1) / _product(left, left).clamp_min(_TINY)[:, None]


def _prior(mean: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """(n, 28, 28), (n,) its mean squared error → it, and each pixel's deviation."""
    variance = mean * (1.0 - mean)
    scale = error / variance.mean(dim=(1, 2)).clamp_min(_TINY)
    return mean, variance.mul_(scale[:, None, None]).clamp_max_(0.25).sqrt_()


@dataclass(frozen=True)
class _State:
    """How far the fit of n images has come.

    Attributes:
        given: (n, 28, 28), the scans.
        near: (n, 28, 28), 1 where strokes' edges are near.
        error: (n,), mean squared error of the network's images.
        limit: as in `Scans`.
        mean, deviation: (n, 28, 28), of what each pixel may be.
        units: (n, 28, 28), e, in units of the deviation.
        shown, blur, noise, lost, struck: as in `Scans`, by now.
        left: (n,), as in `Fit`.
        most_blur: as in `Scans`.
    """

    given: Tensor
    near: Tensor
    error: Tensor
    limit: Tensor
    mean: Tensor
    deviation: Tensor
    units: Tensor
    shown: Tensor
    blur: Tensor
    noise: Tensor
    lost: Tensor
    struck: Tensor
    left: Tensor
    most_blur: float

    @property
    def guess(self) -> Tensor:
        """(n, 28, 28), what the images have become."""
        return torch.addcmul(self.mean, self.deviation, self.units)

    def rows(self, which: Tensor) -> _State:
        """Some of them, by their numbers."""
        tensors = {name: value for name, value in vars(self).items() if name != "most_blur"}
        some: dict[str, Any] = {name: value.index_select(0, which) for name, value in tensors.items()}
        return replace(self, **some)

    def anew(self) -> _State:
        """The same with what the images have become as what they may be: surer than before, of black and of white."""
        mean, deviation = _prior(self.guess.clamp_(0.0, 1.0), self.error)
        return replace(self, mean=mean, deviation=deviation, units=torch.zeros_like(mean))


class _Outcome(NamedTuple):
    """What n images have come to: `made`, (n, 28, 28) in 0..1, and the rest as in `_State`."""

    made: Tensor
    shown: Tensor
    blur: Tensor
    noise: Tensor
    lost: Tensor
    left: Tensor

    @classmethod
    def of(cls, state: _State) -> _Outcome:
        return cls(state.guess.clamp_(0.0, 1.0), state.shown, state.blur, state.noise, state.lost, state.left)

    def with_rows(self, which: Tensor, rows: _Outcome) -> _Outcome:
        """The same with some of them exchanged, by their numbers; the rest of it is no more to be used."""
        return _Outcome(*(value.index_copy_(0, which, some) for value, some in zip(self, rows, strict=True)))


def _improved(state: _State, steps: int, *, first: bool) -> _State:
    """A round: a better blur, what is lost, a better e, and the noise that is left."""
    given = state.given
    blur = _steeper(state)
    if first:  # where much is lost, the network's image says less of the blur than what comes of it
        blur = torch.where(state.struck[:, None], state.blur, blur)
    down, across = matrices_of(blur, state.most_blur)
    off = given - blurred(down, state.guess, across)
    lost = struck_pixels(given, off, FAR, all_ends=True)
    units = _solved(state, off, down, across, lost, steps)
    shown = blurred(down, torch.addcmul(state.mean, state.deviation, units), across)
    noise, left = noise_of(given, shown, state.near, lost.lost if lost.any else None)
    return replace(
        state,
        blur=blur,
        lost=lost.lost,
        struck=lost.struck,
        units=units,
        shown=shown,
        noise=_TAKEN * noise,
        left=left,
    )


def _steeper(state: _State) -> Tensor:
    """A Gauss-Newton step of the blur's variances: (n, 2)."""
    second = _second_derivative(state.shown.device)
    by_down, by_across = second @ state.shown, state.shown @ second
    off = state.given - state.shown
    if bool(state.struck.any()):
        known = 1.0 - state.lost
        by_down, by_across, off = by_down * known, by_across * known, off * known
    dd, da, aa = _product(by_down, by_down), _product(by_down, by_across), _product(by_across, by_across)
    damped = 0.01 * (dd + aa) + 1e-9
    dd, aa = dd + damped, aa + damped
    d, a = _product(by_down, off), _product(by_across, off)
    step = torch.stack([aa * d - da * a, dd * a - da * d], dim=1) / (dd * aa - da * da)[:, None]
    return (state.blur + step.clamp_(-_STEEPEST, _STEEPEST)).clamp_(0.0, state.most_blur**2)


def _solved(state: _State, off: Tensor, down: Tensor, across: Tensor, lost: Struck, steps: int) -> Tensor:
    """e in units of the deviation, by so many steps of conjugate gradients from the one before, which leaves `off`."""
    if lost.any and not lost.every:  # where nothing is lost it takes half the time
        units = torch.empty_like(off)
        for which, every in ((lost.struck, True), (~lost.struck, False)):
            rows = which.nonzero()[:, 0]
            some = Struck(lost.lost.index_select(0, rows), which[rows], every, every)
            here, one, other = (part.index_select(0, rows) for part in (off, down, across))
            units.index_copy_(0, rows, _solved(state.rows(rows), here, one, other, some, steps))
        return units
    weight = 1.0 / state.noise[:, None, None]
    deviation, units = state.deviation, state.units.clone()
    back_down, back_across = down.transpose(1, 2), across.transpose(1, 2)
    # Buffers: memory takes longer than arithmetic here.
    half, whole, inner = (torch.empty_like(off) for _ in range(3))
    if lost.any:
        weight = weight * (1.0 - lost.lost)
    else:
        squared_down, squared_across = (back_down @ down).mul_(weight), back_across @ across
    torch.bmm(torch.bmm(back_down, torch.mul(weight, off, out=inner), out=half), across, out=whole)
    rest = whole.mul(deviation).sub_(units)
    direction, square = rest.clone(), _square(rest)
    for step in range(steps):
        torch.mul(deviation, direction, out=inner)
        if lost.any:
            torch.bmm(torch.bmm(down, inner, out=half), back_across, out=whole)
            whole.mul_(weight)
            torch.bmm(torch.bmm(back_down, whole, out=half), across, out=whole)
        else:
            torch.bmm(torch.bmm(squared_down, inner, out=half), squared_across, out=whole)
        ahead = torch.addcmul(direction, deviation, whole, out=inner)
        length = square / (torch.mul(direction, ahead, out=half).sum(dim=(1, 2), keepdim=True) + 1e-30)
        units.addcmul_(length, direction)
        if step + 1 < steps:
            rest.addcmul_(length, ahead, value=-1.0)
            before, square = square, _square(rest)
            direction.mul_(square / (before + 1e-30)).add_(rest)
    return units


def _product(one: Tensor, other: Tensor) -> Tensor:
    """(n, 28, 28) each → (n,), the sums of their products."""
    return (one * other).sum(dim=(1, 2))


def _square(values: Tensor) -> Tensor:
    square: Tensor = torch.linalg.vector_norm(values, dim=(1, 2), keepdim=True).square()
    return square


@cache
@torch.inference_mode(False)
def _smoothing(device: torch.device) -> Tensor:
    """(28, 28), a blur by one pixel along a line."""
    return blur_matrices(torch.ones(1), 1.0)[0].to(device)


@cache
@torch.inference_mode(False)
def _second_derivative(device: torch.device) -> Tensor:
    """(28, 28), half the second derivative along a line of pixels: what a blur changes by its variance."""
    cosines = cosine_transform()
    frequencies = math.pi * torch.arange(SIDE) / SIDE
    return (-0.5 * (cosines.T * frequencies.square()) @ cosines).to(device)
