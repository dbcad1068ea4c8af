"""The seed's degradation in torch, Gaussian blur, then uniform white noise, and other kinds of noise beside it.

    noisy, sigma, half_range = NoiseRecipe().apply(clean, generator)
    draw = NoiseRecipe(gaussian=0.5).draw(len(clean), generator)
    noisy, noise_level = draw.degrade(clean)

Everything is batched, runs on any device and is drawn from the generator that is passed in, so it can be fresh for
every image and step of a training at the cost of three small matrix products.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from dataclasses import fields as dataclass_fields
from enum import IntEnum
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from denoise_batch.errors import FlagError

if TYPE_CHECKING:
    from torch import Tensor

SIDE = 28
TRUNCATE = 4.0  # scipy's default: the kernel ends at 4 sigma

SEED_LEVELS: tuple[tuple[float, float], ...] = tuple((0.5 * i, 0.4 * i) for i in range(6))
"""(sigma, half range) of the six images in the seed's first figure; the last two lie beyond its training range."""


@cache  # for as long as the program runs: a CUDA graph may hold the place in memory
@torch.inference_mode(False)
def _reflection_on_gpu(radius: int, device: torch.device) -> Tensor:
    return _reflection(radius).to(device)


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # it may be wanted for gradients, too
def _reflection(radius: int) -> Tensor:
    """S[d, i, j] = 1 where pixel i + d of a row, reflected at the edges, is pixel j; d = -radius..radius.

    `reflect` in scipy repeats the edge pixel (d c b a | a b c d | d c b a), a pattern of period 2 * SIDE.
    """
    offsets = np.arange(-radius, radius + 1)[:, None]
    folded = (np.arange(SIDE)[None, :] + offsets) % (2 * SIDE)
    folded = np.where(folded < SIDE, folded, 2 * SIDE - 1 - folded)
    planes: np.ndarray[Any, np.dtype[np.float32]] = (folded[:, :, None] == np.arange(SIDE)).astype(np.float32)
    return torch.from_numpy(planes.reshape(2 * radius + 1, SIDE * SIDE))


def blur_matrices(sigma: Tensor, largest: float | None = None) -> Tensor:
    """The matrix of `scipy.ndimage.gaussian_filter1d` (mode `reflect`, truncate 4) over 28 pixels, for each sigma.

    Args:
        sigma: (n,) float, in pixels, each at least 0; 0 gives the identity.
        largest: none of them is larger; None looks, for which a GPU has to be waited for.

    Returns:
        (n, 28, 28) float32 on sigma's device; row i holds the weights that make output pixel i.
    """
    sigma = sigma.to(torch.float32)
    if sigma.numel() == 0:
        return sigma.new_zeros((0, SIDE, SIDE))
    radius = int(TRUNCATE * (float(sigma.max()) if largest is None else largest) + 0.5)
    offsets = torch.arange(-radius, radius + 1, device=sigma.device, dtype=torch.float32)
    # scipy cuts at int(4 sigma + 0.5). |d| <= 4 sigma + 0.5 says the same, and 4 sigma >= |d| - 0.5 is exact in
    # float32 where 4 sigma + 0.5 is rounded, so that the radius jumps at exactly scipy's sigmas.
    inside = TRUNCATE * sigma[:, None] >= offsets.abs() - 0.5
    exponent = -0.5 * (offsets / sigma[:, None].clamp_min(1e-6)) ** 2
    weights = torch.where(inside, exponent.exp(), torch.zeros_like(exponent))
    weights = weights / weights.sum(dim=1, keepdim=True)
    reflection = _reflection_on_gpu(radius, sigma.device) if sigma.is_cuda else _reflection(radius)
    return (weights @ reflection).view(-1, SIDE, SIDE)


def blur(images: Tensor, sigma: Tensor, largest: float | None = None) -> Tensor:
    """`scipy.ndimage.gaussian_filter(image, sigma)` for each image with its own sigma, to float32 rounding.

    Args:
        images: (n, 28, 28) float32.
        sigma: (n,) float, in pixels.
        largest: as `blur_matrices` has it.

    Returns:
        (n, 28, 28) float32.
    """
    matrices = blur_matrices(sigma, largest)
    return matrices @ images.to(torch.float32) @ matrices.transpose(1, 2)


def add_uniform_noise(images: Tensor, half_range: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Adds white noise, uniform in [-half_range, half_range) for each image; nothing is clipped.

    Args:
        images: (n, 28, 28) float32.
        half_range: (n,) float, at least 0, in units of full ink.
    """
    noise = torch.rand(images.shape, generator=generator, device=images.device, dtype=torch.float32)
    return images + (2.0 * noise - 1.0) * half_range.to(torch.float32)[:, None, None]


def degrade(images: Tensor, sigma: Tensor, half_range: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The seed's degradation: `blur`, then `add_uniform_noise`. Shapes as there."""
    return add_uniform_noise(blur(images, sigma), half_range, generator)


def clip_to_uint8(images: Tensor) -> Tensor:
    """What a file of 8-bit pixels keeps of the images: clipped to 0..1 and rounded to 255 steps, still float32."""
    return (images.clamp(0.0, 1.0) * 255.0).round() / 255.0


MOST_FEW_LEVELS = 16
"""Scans of so few levels of grey have lost what lies between them: those of one bit, and of up to four."""
_SHARE_OF_ONE_BIT, _SHARE_ORDERED = 0.6, 0.15
_LEAST_GRAIN, MOST_GRAIN = 0.3, 1.2
"""How far the noise of `NoiseKind.GRAIN` is blurred, in pixels: neighbours have a correlation of 0.01 to 0.8."""


@cache  # as above
@torch.inference_mode(False)
def _ordered_dithers(device: torch.device) -> Tensor:
    """Thresholds of Bayer's dither of 4×4 pixels, wherever in it an image begins: (16, 28, 28)."""
    matrix = torch.tensor([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]])
    begun = [matrix.roll((down, across), (0, 1)).tile((7, 7)) for down in range(4) for across in range(4)]
    return ((torch.stack(begun) + 0.5) / 16.0).to(device)


def to_few_levels(images: Tensor, levels: Tensor, threshold: Tensor | float = 0.5) -> Tensor:
    """What a scan of few levels of grey keeps of images: of two levels it is ink or paper, with nothing between.

    Args:
        images: (n, 28, 28) float32; what lies outside of 0..1 counts as these.
        levels: (n,), how many, evenly spaced from 0 to 1, at least 2.
        threshold: from which part of a step on a pixel is of the level above it; for all, or as images are.
    """
    steps = (levels - 1)[:, None, None].to(images.dtype)
    return (images.clamp(0.0, 1.0) * steps + (1.0 - threshold)).floor() / steps


class NoiseKind(IntEnum):
    """What is done to an image; the numbers stand in `NoiseDraw.kind`.

    UNIFORM: blur, then white noise, uniform in [-r, r): the seed's.
    BLUR: blur alone.
    CLEAN: neither blur nor noise.
    GAUSSIAN: blur, then white Gaussian noise of the same deviation, r / √3.
    IMPULSE: blur, then salt and pepper: a share r / 3 of the pixels (half of them at r = 1.5) turns to 0 or to 1.
    GRAIN: blur, then Gaussian noise of the same deviation that is alike in neighbouring pixels, as that of paper is,
        and of scans that were enlarged or made smooth: white noise, blurred by `NoiseDraw.grain` pixels.
    """

    UNIFORM = 0
    BLUR = 1
    CLEAN = 2
    GAUSSIAN = 3
    IMPULSE = 4
    GRAIN = 5


@dataclass(frozen=True)
class NoiseDraw:
    """Everything random about the degradation of n images, drawn before they are seen.

    Attributes:
        sigma: (n,) float32, of the blur, in pixels.
        half_range: (n,) float32, r, in units of full ink; 0 where an image gets no noise.
        kind: (n,) int64, a `NoiseKind` each; None where all are UNIFORM or BLUR, which r = 0 says.
        uniform: (n, 28, 28) float32 in [0, 1): the one random number of each pixel.
        clipped: (n,) bool, which images are clipped to 8 bits; None for none.
        levels: (n,) float32, how many levels of grey an image has, 0 for all of them; None for all of all.
        threshold: (n, 28, 28) float32, as `to_few_levels` has it; None without `levels`.
        grain: (n,) float32, how far the noise of GRAIN is blurred, in pixels; None where none is of this kind.
        largest_sigma: none of `sigma` is larger.
    """

    sigma: Tensor
    half_range: Tensor
    kind: Tensor | None
    uniform: Tensor
    clipped: Tensor | None
    levels: Tensor | None
    threshold: Tensor | None
    grain: Tensor | None
    largest_sigma: float

    def __getitem__(self, rows: slice) -> NoiseDraw:
        """The draws of some of the images."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        mine: dict[str, Any] = {name: value[rows] for name, value in tensors.items()}
        return replace(self, **mine)

    def without(self, still: Tensor) -> NoiseDraw:
        """The same, but for images, (n,) bool, that get neither blur nor noise; some may still be clipped to 8 bits, or
        have few levels of grey."""
        zeros = torch.zeros_like(self.sigma)
        sigma, half_range = (torch.where(still, zeros, levels) for levels in (self.sigma, self.half_range))
        return replace(self, sigma=sigma, half_range=half_range)

    def degrade(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Degrades n images.

        Args:
            images: (n, 28, 28) float32, clean.

        Returns:
            noisy (n, 28, 28) float32, and each image's noise level: (n,) float32, the root of the mean square of what
            the noise (not the blur, not the clipping, not the loss of levels) changed in its pixels, in units of full
            ink.
        """
        # A CPU has less to do for the kernels that are there; a GPU must not be waited for, least in a CUDA graph.
        blurred = blur(images, self.sigma, self.largest_sigma if images.is_cuda else None)
        noisy = blurred + self._noise()
        if self.kind is not None:
            rate = (self.half_range / 3.0).clamp_max(1.0)[:, None, None]
            struck = (self.kind == NoiseKind.IMPULSE)[:, None, None] & (self.uniform < rate)
            noisy = torch.where(struck, (self.uniform < 0.5 * rate).to(noisy.dtype), noisy)
        level = noise_level(noisy, blurred)
        if self.levels is not None and self.threshold is not None:
            few = to_few_levels(noisy, self.levels.clamp_min(2.0), self.threshold)
            noisy = torch.where(self.levels[:, None, None] > 0, few, noisy)
        if self.clipped is not None:
            noisy = torch.where(self.clipped[:, None, None], clip_to_uint8(noisy), noisy)
        return noisy, level

    def _noise(self) -> Tensor:
        """The additive noise, (n, 28, 28)."""
        spread = 2.0 * self.uniform - 1.0
        scale = self.half_range
        if self.kind is not None:
            gaussian, grain = self.kind == NoiseKind.GAUSSIAN, self.kind == NoiseKind.GRAIN
            if spread.is_cuda:  # which are Gaussian, only the GPU knows
                spread = torch.where((gaussian | grain)[:, None, None], _normal(spread), spread)
                if self.grain is not None:
                    alike = _alike(spread, self.grain)
                    spread = torch.where(grain[:, None, None], alike, spread)
            else:
                spread[gaussian] = _normal(spread[gaussian])
                if self.grain is not None:
                    spread[grain] = _alike(_normal(spread[grain]), self.grain[grain])
            scale = torch.where(self.kind == NoiseKind.IMPULSE, torch.zeros_like(scale), scale)
        return spread * scale[:, None, None]


def _normal(spread: Tensor) -> Tensor:
    """Numbers uniform in [-1, 1) → Gaussian ones of the same deviation, 1 / √3."""
    # The inverse of the normal distribution; the lowest of the 2^24 numbers that are drawn would give -inf.
    normal: Tensor = (2.0 / 3.0) ** 0.5 * torch.erfinv(spread.clamp_min(2.0**-24 - 1.0))
    return normal


def _alike(white: Tensor, sigma: Tensor) -> Tensor:
    """White noise, (n, 28, 28), blurred by sigma pixels, (n,), each pixel with the deviation that it had."""
    matrices = blur_matrices(sigma, MOST_GRAIN)
    # Of independent pixels, variances add up with the squares of their weights, down and across apart.
    matrices = matrices / matrices.square().sum(dim=2, keepdim=True).sqrt()
    return matrices @ white @ matrices.transpose(1, 2)


def noise_level(noisy: Tensor, clean: Tensor) -> Tensor:
    """The root of the mean squared difference of each image: (n, 28, 28) twice → (n,), in units of full ink."""
    return (noisy - clean).square().mean(dim=(1, 2)).sqrt()


@dataclass(frozen=True)
class NoiseRecipe:
    """How images are degraded: the ranges from which each image's levels are drawn, uniformly, and how often what.

    The shares of kinds are of all images; what they leave gets the seed's uniform noise.

    Attributes:
        sigma: range of the blur's standard deviation, in pixels.
        half_range: range of the white noise's half range, in units of full ink.
        clipped: share of the images, 0..1, of any kind, that are clipped to 0..1 and rounded to 8 bits after the
            noise, as a file of uint8 pixels holds them.
        noiseless: share of the images that are blurred only.
        clean: share of the images that are neither blurred nor noised.
        gaussian: share of the images with Gaussian noise of the same deviation, r / √3, instead of uniform noise.
        impulse: share of the images with salt and pepper in r / 3 of their pixels instead of uniform noise.
        grain: share of the images with Gaussian noise that is alike in neighbouring pixels instead of uniform noise:
            blurred by 0.3 to 1.2 pixels.
        few_levels: share of the images, of any kind, that have few levels of grey after the noise: three fifths of them
            2, as scans of one bit have, the others up to 16, each factor as likely. The first threshold lies between
            0.3 and 0.7 of a step; 15% of them have Bayer's dither.
    """

    sigma: tuple[float, float] = (0.0, 2.0)
    half_range: tuple[float, float] = (0.01, 1.5)
    clipped: float = 0.0
    noiseless: float = 0.0
    clean: float = 0.0
    gaussian: float = 0.0
    impulse: float = 0.0
    few_levels: float = 0.0
    grain: float = 0.0

    def __post_init__(self) -> None:
        for flag, (low, high) in (("--sigma", self.sigma), ("--noise", self.half_range)):
            if not 0.0 <= low <= high <= 1000.0:
                raise FlagError(
                    f"{flag} {low:g}:{high:g} is not a range of levels",
                    hint="give LOW:HIGH with 0 <= LOW <= HIGH <= 1000, or one number for a fixed level",
                )
        for share, which in ((self.clipped, "clipped images"), (self.few_levels, "images of few levels")):
            if not 0.0 <= share <= 1.0:
                raise FlagError(f"a share of {share:g} {which} is impossible", hint="give a share from 0 to 1")
        shares = self._shares()
        # Shares that add up to one in decimals may miss it by a rounding.
        if not (min(shares.values()) >= 0.0 and sum(shares.values()) <= 1.0 + 1e-9):
            given = ", ".join(f"{kind.name.lower()} {share:g}" for kind, share in shares.items())
            raise FlagError(
                f"the shares of kinds are impossible: {given}", hint="give shares from 0, at most 1 together"
            )

    def _shares(self) -> dict[NoiseKind, float]:
        return {
            NoiseKind.BLUR: self.noiseless,
            NoiseKind.CLEAN: self.clean,
            NoiseKind.GAUSSIAN: self.gaussian,
            NoiseKind.IMPULSE: self.impulse,
            NoiseKind.GRAIN: self.grain,
        }

    def draw(
        self, count: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> NoiseDraw:
        """Draws the degradation of `count` images, on the device.

        What a recipe has no use for is not drawn: the noise of evaluations and of earlier trainings follows from the
        order of the draws.
        """
        lots = torch.rand((2, count), generator=generator, device=device, dtype=torch.float32)
        sigma = self.sigma[0] + (self.sigma[1] - self.sigma[0]) * lots[0]
        half_range = self.half_range[0] + (self.half_range[1] - self.half_range[0]) * lots[1]
        kind = None
        if any(self._shares().values()):
            kind = self._draw_kinds(torch.rand(count, generator=generator, device=device))
            still = (kind == NoiseKind.BLUR) | (kind == NoiseKind.CLEAN)
            half_range = torch.where(still, torch.zeros_like(half_range), half_range)
            sigma = torch.where(kind == NoiseKind.CLEAN, torch.zeros_like(sigma), sigma)
        uniform = torch.rand((count, SIDE, SIDE), generator=generator, device=device, dtype=torch.float32)
        clipped = None
        if self.clipped > 0.0:
            clipped = torch.rand(count, generator=generator, device=device) < self.clipped
        levels, threshold, grain = None, None, None
        if self.few_levels > 0.0:
            levels, threshold = self._draw_levels(torch.rand((5, count), generator=generator, device=device))
        if self.grain > 0.0:
            grain = _LEAST_GRAIN + (MOST_GRAIN - _LEAST_GRAIN) * torch.rand(count, generator=generator, device=device)
        return NoiseDraw(sigma, half_range, kind, uniform, clipped, levels, threshold, grain, self.sigma[1])

    def _draw_levels(self, lots: Tensor) -> tuple[Tensor, Tensor]:
        """`NoiseDraw.levels` and its `threshold`, from five numbers in 0..1 for each image, (5, n)."""
        several = (3.0 * ((MOST_FEW_LEVELS + 1) / 3.0) ** lots[1]).floor()
        levels = torch.where(lots[2] < _SHARE_OF_ONE_BIT, 2.0, several)
        dithers = _ordered_dithers(lots.device)
        dither = dithers.index_select(0, (lots[4] * len(dithers)).long().clamp_max(len(dithers) - 1))
        alike = (0.3 + 0.4 * lots[4])[:, None, None]
        threshold = torch.where((lots[3] < _SHARE_ORDERED)[:, None, None], dither, alike)
        return torch.where(lots[0] < self.few_levels, levels, 0.0), threshold

    def _draw_kinds(self, lots: Tensor) -> Tensor:
        kinds = torch.full(lots.shape, int(NoiseKind.UNIFORM), device=lots.device)
        start = 0.0
        for kind, share in self._shares().items():
            kinds.masked_fill_((lots >= start) & (lots < start + share), int(kind))
            start += share
        return kinds

    def apply(self, images: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Degrades images with levels drawn for each.

        Args:
            images: (n, 28, 28) float32, clean.

        Returns:
            noisy (n, 28, 28) float32, sigma (n,), half_range (n,).
        """
        draw = self.draw(len(images), generator, images.device)
        return draw.degrade(images)[0], draw.sigma, draw.half_range

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> NoiseRecipe:
        given: dict[str, Any] = {name: tuple(fields[name]) for name in ("sigma", "half_range")}
        shares = [field.name for field in dataclass_fields(cls) if field.name not in given]
        given |= {name: float(fields.get(name, 0.0)) for name in shares}
        return cls(**given)
