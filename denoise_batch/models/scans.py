"""What a scan looks like beside what a network made of it: how it is blurred, how noisy it is, which pixels are lost.

    rows = may_have_little_noise(noisy).nonzero()[:, 0]      # at next to no cost
    scans = look_at(noisy[rows], clean[rows], most_blur)     # `Scans`; those that `fits` can be fitted

What the network makes is right in its lowest frequencies, so that the blur can be read off it there. Pixels at the very
ends of the range may be cut off, or struck out by salt and pepper or dust, and say nothing then.

Which pixels are meant is said in numbers, 1 or 0: PyTorch takes up to thirty times as long over truth values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from denoise_batch.noise import SIDE, blur_matrices

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

INK: Final = 0.02
FAR: Final = 0.3
"""So far from what is expected, a pixel at an end of the range was struck out."""

_MOST_AT_FIRST = 0.07  # root mean square of noise; before anything is fitted, all that is wrong counts as noise
_MOST_WHERE_LOST = 0.2  # and more is where pixels were lost
_FAR_AT_FIRST, _STRUCK = 0.5, 3
_ALONE = 0.5
_FEW = 60.0
_LEAST = 1.0 / (12.0 * 255.0**2)  # the variance of rounding to 8 bits
_NEXT_TO_NONE, _MORE_BY_NOISE = 0.1, 2.0  # of a blur's variance: where none is to be undone, nothing is to be gained
_EVEN, _EVEN_SHARE, _EVEN_SHARE_CUT_OFF, _DARK = 0.07, 0.42, 0.45, 0.3
_BEYOND = 1.2
_TINY = 1e-12


@dataclass(frozen=True)
class Scans:
    """What n scans are taken for before anything is fitted.

    Attributes:
        given: (n, 28, 28), the scans.
        mean: (n, 28, 28), what the network has made of them.
        shown: (n, 28, 28), the same blurred.
        blur: (n, 2), the blur's variances, down and across, in square pixels.
        noise: (n,), the noise's variance.
        lost: (n, 28, 28), 1 for pixels that say nothing, 0 for the others.
        struck: (n,) bool, which have salt and pepper.
        inner: (n,), how many pixels do not lie at an end of the range.
        most_blur: the largest deviation that a blur may have, a little more than is believed.
    """

    given: Tensor
    mean: Tensor
    shown: Tensor
    blur: Tensor
    noise: Tensor
    lost: Tensor
    struck: Tensor
    inner: Tensor
    most_blur: float

    @property
    def limit(self) -> Tensor:
        """(n,), a variance of noise from which on nothing is fitted."""
        return torch.where(self.struck, _MOST_WHERE_LOST, _MOST_AT_FIRST) ** 2

    @property
    def fits(self) -> Tensor:
        """(n,) bool: where something is to be seen, with a blur to undo or salt and pepper, and little other noise."""
        seen = self.mean.flatten(1).amax(dim=1) > 0.5
        is_blurred = self.blur.amax(dim=1) > _NEXT_TO_NONE + _MORE_BY_NOISE * self.noise.sqrt()
        return seen & (self.noise < self.limit) & torch.where(self.struck, self.inner > _FEW / 2.0, is_blurred)

    @property
    def believed(self) -> float:
        """Deviation of the strongest blur that is believed: what lies at the limit may be beyond it, or none at all."""
        return 0.99 * self.most_blur

    def rows(self, which: Tensor) -> Scans:
        """Some of them, by their numbers."""
        tensors = {name: value for name, value in vars(self).items() if name != "most_blur"}
        some: dict[str, Any] = {name: value.index_select(0, which) for name, value in tensors.items()}
        return replace(self, **some)


class Struck(NamedTuple):
    """What was struck out of n images.

    Attributes:
        lost, struck: as in `Scans`.
        any, every: whether any of the images has salt and pepper, and whether all have.
    """

    lost: Tensor
    struck: Tensor
    any: bool
    every: bool


def may_have_little_noise(noisy: Tensor) -> Tensor:
    """Whether images may have little noise, and something to see: they are even in many places, and dark in some.

    Args:
        noisy: (n, 28, 28) float32.

    Returns:
        (n,) bool.
    """
    rows = noisy[:, ::2].flatten(1)  # a copy: over what lies apart PyTorch takes ten times as long
    even = numbers(torch.lt, (rows[:, 1:] - rows[:, :-1]).abs_(), _EVEN)
    # Paper is more even where half of its noise was cut off.
    share = torch.where(rows.amin(dim=1) < 0.0, _EVEN_SHARE, _EVEN_SHARE_CUT_OFF)
    return (even.mean(dim=1) > share) & (rows.amax(dim=1) > _DARK)


@torch.no_grad()
def look_at(noisy: Tensor, clean: Tensor, most_blur: float) -> Scans:
    """Blur, noise and what is lost, as the network's image alone has them.

    Args:
        noisy: (n, 28, 28) float32, 0 = background, 1 = ink, not clipped.
        clean: (n, 28, 28) float32, in 0..1, what a network has made of them.
        most_blur: deviation of the strongest blur that the network has learnt to undo, in pixels.
    """
    most_blur = _BEYOND * most_blur
    variances, shown = _blur_and_shown(noisy, clean, most_blur, apart=True)
    lost = struck_pixels(noisy, noisy - clean, _FAR_AT_FIRST, all_ends=False)
    if lost.any:
        rows = lost.struck.nonzero()[:, 0]
        here, made, unknown = (images.index_select(0, rows) for images in (noisy, clean, lost.lost))
        model = made
        for _ in range(2):
            # All that is known of what is lost is what the blur so far makes of it.
            found, model = _blur_and_shown(torch.lerp(here, model, unknown), made, most_blur, apart=False)
        variances[rows], shown[rows] = found, model
    # What lies at an end may be cut off there, or lost; of images in black and white nothing else is left.
    ends = at_an_end(noisy)
    inner = float(SIDE**2) - ends.sum(dim=(1, 2))
    ends.mul_((inner > _FEW).float()[:, None, None])
    noise, _ = noise_of(noisy, shown, None, torch.maximum(ends, lost.lost, out=ends))
    return Scans(noisy, clean, shown, variances, noise, lost.lost, lost.struck, inner, most_blur)


def numbers(compare: Callable[..., Tensor], values: Tensor, other: Tensor | float) -> Tensor:
    """1 where float32 values compare so with others (`torch.gt`, …), 0 elsewhere, float32."""
    return compare(values, other, out=torch.empty_like(values))


def matrices_of(variances: Tensor, most_blur: float) -> tuple[Tensor, Tensor]:
    """(n, 2) → the blurs down and across, (n, 28, 28) each."""
    matrices = blur_matrices(variances.sqrt().flatten(), most_blur).view(len(variances), 2, SIDE, SIDE)
    return matrices[:, 0], matrices[:, 1]


def blurred(down: Tensor, images: Tensor, across: Tensor) -> Tensor:
    """(n, 28, 28) images, blurred down and across by (n, 28, 28) matrices each."""
    return down @ images @ across.transpose(1, 2)


def noise_of(given: Tensor, shown: Tensor, near: Tensor | None, lost: Tensor | None) -> tuple[Tensor, Tensor]:
    """The noise of images.

    Args:
        given, shown: (n, 28, 28), the scans, and what they should be without noise.
        near: (n, 28, 28), 1 around the strokes; None where that is not known.
        lost: (n, 28, 28), 1 for those that do not count, as paper does not that was cut off at 0; None for none.

    Returns:
        Its variance, (n,), the larger of everywhere and around the strokes; and how much the latter's root is larger.
    """
    square = (given - shown).square_()
    counted = numbers(torch.gt, shown, INK)
    torch.maximum(counted, numbers(torch.ne, given, 0.0), out=counted)
    if lost is not None:
        counted.sub_(lost).clamp_min_(0.0)
    everywhere = _mean_square(square, counted)
    if near is None:
        return everywhere, torch.ones_like(everywhere)
    around = _mean_square(square, counted.mul_(near))
    return torch.maximum(everywhere, around), (around / everywhere).sqrt()


def _mean_square(square: Tensor, counted: Tensor) -> Tensor:
    count = counted.sum(dim=(1, 2)).clamp_min(_FEW / 2.0)
    return ((square * counted).sum(dim=(1, 2)) / count).clamp_min(_LEAST)


def struck_pixels(given: Tensor, off: Tensor, far: float, *, all_ends: bool) -> Struck:
    """Which pixels are lost to salt and pepper, or dust: at an end of the range, and far from what is expected.

    Not so the lines of a form, which are all ink, and none of whose pixels stands alone.

    Args:
        given: (n, 28, 28), the scans.
        off: (n, 28, 28), by how much they differ from what is expected.
        far: from so much on it is far.
        all_ends: whether, where some are, all pixels at an end are lost: salt on ink is not far from what is expected.
    """
    lost = numbers(torch.gt, off.abs(), far)
    struck = lost.sum(dim=(1, 2)) >= _STRUCK
    rows = struck.nonzero()[:, 0]
    given = given.index_select(0, rows)
    ends = at_an_end(given)
    lost_there = lost.index_select(0, rows).mul_(ends)
    are = _are_struck(given, lost_there)
    struck[rows] = are
    lost_there = ends if all_ends else lost_there
    lost.zero_().index_copy_(0, rows, lost_there.mul_(are[:, None, None].float()))
    count = int(are.sum())
    return Struck(lost, struck, count > 0, count == len(lost))


def _are_struck(given: Tensor, far: Tensor) -> Tensor:
    """(n,) bool: which images have salt and pepper, or dust, in pixels that are `far` off, and at an end."""
    many, salt = far.sum(dim=(1, 2)), (far * given).sum(dim=(1, 2))  # far ones are 0 or 1
    beside = torch.zeros_like(far)
    for one, other in ((beside[:, 1:], far[:, :-1]), (beside[:, :-1], far[:, 1:])):
        torch.maximum(one, other, out=one)
    for one, other in ((beside[:, :, 1:], far[:, :, :-1]), (beside[:, :, :-1], far[:, :, 1:])):
        torch.maximum(one, other, out=one)
    alone = (far - beside).clamp_min_(0.0).sum(dim=(1, 2))
    both = (salt > 0.0) & (salt < many)
    return (many >= _STRUCK) & (both | (alone >= _ALONE * many))


def at_an_end(given: Tensor) -> Tensor:
    """1 for pixels at exactly 0 or 1, as those are that were cut off or struck out, 0 for the others."""
    ends = numbers(torch.eq, given, 0.0)
    return torch.maximum(ends, numbers(torch.eq, given, 1.0), out=ends)


def _blur_and_shown(given: Tensor, clean: Tensor, most_blur: float, *, apart: bool) -> tuple[Tensor, Tensor]:
    """The blur's variances, as `_coarse_blur` finds them, and `clean` blurred so."""
    variances = _coarse_blur(given, clean, most_blur, apart=apart)
    down, across = matrices_of(variances, most_blur)
    return variances, blurred(down, clean, across)


_LOWEST = 10  # frequencies, where noise and the network's errors are small
_BLURS = 27
_TURNS = 3


def _coarse_blur(noisy: Tensor, clean: Tensor, most_blur: float, *, apart: bool) -> Tensor:
    """The blur's variances down and across, (n, 2), that make the lowest frequencies fit best.

    First one for both ways; then, if they may be apart, in turns one given the other.
    """
    cosines, grid, factors = _blur_grid(most_blur, noisy.device)
    given, made = cosines @ noisy @ cosines.T, cosines @ clean @ cosines.T
    # |given - k made|², but for what no k changes.
    both = (factors[:, :, None] * factors[:, None, :]).flatten(1)
    square, product = made.square(), given * made
    sigma = _lowest(square.flatten(1) @ both.square().T - 2.0 * product.flatten(1) @ both.T, grid)
    sides = [sigma, sigma]
    for turn in range(_TURNS if apart else 0):
        other = _factors_at(sides[1 - turn % 2], grid, factors)
        # Its own frequencies first.
        one, two = (of if turn % 2 == 0 else of.transpose(1, 2) for of in (square, product))
        one, two = (one * other.square()[:, None]).sum(dim=2), (two * other[:, None]).sum(dim=2)
        sides[turn % 2] = _lowest(one @ factors.square().T - 2.0 * two @ factors.T, grid)
    return torch.stack(sides, dim=1).clamp_(0.0, most_blur).square_()


def _lowest(errors: Tensor, grid: Tensor) -> Tensor:
    """(n, 27) of the deviations of `grid` → (n,), the deviation where a parabola through the least has its bottom."""
    place = errors.argmin(dim=1).clamp(1, _BLURS - 2)
    left, here, right = (errors.gather(1, (place + beside)[:, None])[:, 0] for beside in (-1, 0, 1))
    bend = (left - 2.0 * here + right).clamp_min(_TINY)
    return grid[place] + (grid[1] - grid[0]) * (0.5 * (left - right) / bend).clamp(-1.0, 1.0)


def _factors_at(sigma: Tensor, grid: Tensor, factors: Tensor) -> Tensor:
    """(n,) deviations → what a blur of such does to each frequency, (n, 10), read off the grid."""
    place = (sigma / (grid[1] - grid[0])).clamp(0.0, _BLURS - 1.001)
    below = place.floor()
    return torch.lerp(factors[below.long()], factors[below.long() + 1], (place - below)[:, None])


@cache
@torch.inference_mode(False)
def _blur_grid(most_blur: float, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The lowest rows of the cosine transform, (10, 28), σ, (27,), and what each does to the frequencies, (27, 10).

    Reflection at the edges makes the cosine transform (DCT-II) diagonalise every symmetric blur.
    """
    cosines = cosine_transform()[:_LOWEST]
    grid = torch.linspace(0.0, max(most_blur, 0.1), _BLURS)
    factors = torch.diagonal(cosines @ blur_matrices(grid) @ cosines.T, dim1=1, dim2=2)
    return cosines.to(device), grid.to(device), factors.contiguous().to(device)


@cache
@torch.inference_mode(False)
def cosine_transform() -> Tensor:
    """(28, 28), the orthonormal DCT-II: a row for each frequency."""
    places, frequencies = torch.arange(SIDE, dtype=torch.float64), torch.arange(SIDE, dtype=torch.float64)
    waves = torch.cos(math.pi * (places[None, :] + 0.5) * frequencies[:, None] / SIDE)
    scale = torch.where(frequencies == 0, math.sqrt(1.0 / SIDE), math.sqrt(2.0 / SIDE))
    return (waves * scale[:, None]).float()
