"""The seed's degradation in torch: Gaussian blur, then uniform white noise, with levels of their own for every image.

    noisy, sigma, half_range = NoiseRecipe().apply(clean, generator)

Everything is batched, runs on any device and is drawn from the generator that is passed in, so it can be fresh for
every image and step of a training at the cost of three small matrix products.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
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


@lru_cache(maxsize=8)
def _reflection(radius: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """S[d, i, j] = 1 where pixel i + d of a row, reflected at the edges, is pixel j; d = -radius..radius.

    `reflect` in scipy repeats the edge pixel (d c b a | a b c d | d c b a), a pattern of period 2 * SIDE.
    """
    offsets = np.arange(-radius, radius + 1)[:, None]
    folded = (np.arange(SIDE)[None, :] + offsets) % (2 * SIDE)
    folded = np.where(folded < SIDE, folded, 2 * SIDE - 1 - folded)
    planes: np.ndarray[Any, np.dtype[np.float32]] = (folded[:, :, None] == np.arange(SIDE)).astype(np.float32)
    return planes.reshape(2 * radius + 1, SIDE * SIDE)


def blur_matrices(sigma: Tensor) -> Tensor:
    """The matrix of `scipy.ndimage.gaussian_filter1d` (mode `reflect`, truncate 4) over 28 pixels, for each sigma.

    Args:
        sigma: (n,) float, in pixels, each at least 0; 0 gives the identity.

    Returns:
        (n, 28, 28) float32 on sigma's device; row i holds the weights that make output pixel i.
    """
    sigma = sigma.to(torch.float32)
    if sigma.numel() == 0:
        return sigma.new_zeros((0, SIDE, SIDE))
    radius = int(TRUNCATE * float(sigma.max()) + 0.5)
    offsets = torch.arange(-radius, radius + 1, device=sigma.device, dtype=torch.float32)
    # scipy cuts at int(4 sigma + 0.5). |d| <= 4 sigma + 0.5 says the same, and 4 sigma >= |d| - 0.5 is exact in
    # float32 where 4 sigma + 0.5 is rounded, so that the radius jumps at exactly scipy's sigmas.
    inside = TRUNCATE * sigma[:, None] >= offsets.abs() - 0.5
    exponent = -0.5 * (offsets / sigma[:, None].clamp_min(1e-6)) ** 2
    weights = torch.where(inside, exponent.exp(), torch.zeros_like(exponent))
    weights = weights / weights.sum(dim=1, keepdim=True)
    reflection = torch.from_numpy(_reflection(radius)).to(sigma.device)
    return (weights @ reflection).view(-1, SIDE, SIDE)


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """`scipy.ndimage.gaussian_filter(image, sigma)` for each image with its own sigma, to float32 rounding.

    Args:
        images: (n, 28, 28) float32.
        sigma: (n,) float, in pixels.

    Returns:
        (n, 28, 28) float32.
    """
    matrices = blur_matrices(sigma)
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


@dataclass(frozen=True)
class NoiseRecipe:
    """How images are degraded: the ranges from which each image's levels are drawn, uniformly.

    Attributes:
        sigma: range of the blur's standard deviation, in pixels.
        half_range: range of the white noise's half range, in units of full ink.
        clipped: share of the images, 0..1, that are clipped to 0..1 and rounded to 8 bits after the noise, as a
            file of uint8 pixels holds them.
        noiseless: share of the images that are blurred only.
    """

    sigma: tuple[float, float] = (0.0, 2.0)
    half_range: tuple[float, float] = (0.01, 1.5)
    clipped: float = 0.0
    noiseless: float = 0.0

    def __post_init__(self) -> None:
        for flag, (low, high) in (("--sigma", self.sigma), ("--noise", self.half_range)):
            if not 0.0 <= low <= high <= 1000.0:
                raise FlagError(
                    f"{flag} {low:g}:{high:g} is not a range of levels",
                    hint="give LOW:HIGH with 0 <= LOW <= HIGH, or one number for a fixed level",
                )
        if not 0.0 <= self.clipped <= 1.0:
            raise FlagError(
                f"a share of {self.clipped:g} clipped images is impossible", hint="give a share from 0 to 1"
            )

    def draw_levels(
        self, count: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """Draws (sigma, half_range) for `count` images: two (count,) float32 tensors on the device."""
        uniform = torch.rand((2, count), generator=generator, device=device, dtype=torch.float32)
        sigma = self.sigma[0] + (self.sigma[1] - self.sigma[0]) * uniform[0]
        half_range = self.half_range[0] + (self.half_range[1] - self.half_range[0]) * uniform[1]
        # What a recipe has no use for is not drawn: the noise of evaluations follows from the order of the draws.
        if self.noiseless > 0.0:
            spared = torch.rand(count, generator=generator, device=device) < self.noiseless
            half_range = torch.where(spared, torch.zeros_like(half_range), half_range)
        return sigma, half_range

    def apply(self, images: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Degrades images with levels drawn for each.

        Args:
            images: (n, 28, 28) float32, clean.

        Returns:
            noisy (n, 28, 28) float32, sigma (n,), half_range (n,).
        """
        sigma, half_range = self.draw_levels(len(images), generator, images.device)
        noisy = degrade(images, sigma, half_range, generator)
        if self.clipped > 0.0:
            chosen = torch.rand(len(images), generator=generator, device=images.device) < self.clipped
            noisy = torch.where(chosen[:, None, None], clip_to_uint8(noisy), noisy)
        return noisy, sigma, half_range

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> NoiseRecipe:
        shares = (float(fields.get(name, 0.0)) for name in ("clipped", "noiseless"))
        return cls(tuple(fields["sigma"]), tuple(fields["half_range"]), *shares)
