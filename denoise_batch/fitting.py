"""A network's pass, and the images with little noise that come of it fitted to their scans, however many there are.

made, found = seen(model, images, may, extras, most_blur)     # of a batch
for rows, values in fits([found, ...]):                        # of several batches together: few are slow
    ...
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import torch

from denoise_batch.models.data_consistency import fitted
from denoise_batch.models.fitted_quality import expected_of
from denoise_batch.models.quality_head import MOST_PSNR
from denoise_batch.models.scans import Scans, look_at

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from torch import Tensor

    from denoise_batch.extra_columns import ExtraColumns
    from denoise_batch.models.network import DenoisingNetwork

MOST_FITTED: Final = 512
"""Images that are fitted at a time: near a core, and some 100 MB beside a GPU's graphs."""


class Found(NamedTuple):
    """What is known of images that are to be fitted.

    Attributes:
        rows: (n,), their numbers.
        scans: their scans.
        expected: (n,), the PSNR in dB that the network expects.
    """

    rows: NDArray[np.int64]
    scans: Scans
    expected: Tensor


def seen(
    model: DenoisingNetwork, images: Tensor, may: Tensor, extras: ExtraColumns, most_blur: float
) -> tuple[dict[str, Tensor], Found]:
    """What a network gives, and what is known of the images that are to be fitted to their scans.

    Args:
        model: one that says how good its images are.
        images: (n, 1, 28, 28).
        may: the numbers of those that may have little noise.
        most_blur: `Bundle.most_blur`.

    Returns:
        `Denoised`'s fields, and what `fits` takes.
    """
    assert not extras.code  # of no network that says how good its images are
    clean, quality_of = model.clean_and_quality(images)
    made = {"pixels": clean.reshape(-1, 784)}
    if extras.quality:
        made |= told(quality_of(None))
    scans = look_at(images[may, 0], clean[may, 0], most_blur)
    fit = scans.fits
    rows, scans = may[fit], scans.rows(fit)
    if not len(rows):
        return made, Found(rows.cpu().numpy(), scans, scans.noise)
    expected = made["psnr"][rows] if extras.quality else told(quality_of(rows))["psnr"]
    return made, Found(rows.cpu().numpy(), scans, expected)


def fits(found: list[Found]) -> Iterator[tuple[NDArray[np.int64], dict[str, Tensor]]]:
    """Fits images to their scans: the numbers of those that were, and their `pixels` and `psnr`."""
    found = [part for part in found if len(part.rows)]
    if not found:
        return
    every = np.concatenate([part.rows for part in found])
    scans, expected = Scans.joined([part.scans for part in found]), torch.cat([part.expected for part in found])
    for start in range(0, len(every), MOST_FITTED):
        chosen = slice(start, start + MOST_FITTED)
        some = scans.rows(chosen)
        fit = fitted(some, expected[chosen])
        psnr = expected_of(some.mean, fit, expected[chosen])
        values = {"pixels": fit.clean.reshape(-1, 784)[fit.done], "psnr": psnr[fit.done]}
        yield every[chosen][fit.done.cpu().numpy()], values


def told(quality: Tensor) -> dict[str, Tensor]:
    """`Outputs.quality` → what `Denoised` has of it."""
    return {"psnr": quality[:, 0].clamp(0.0, MOST_PSNR), "noise_level": quality[:, 1].clamp_min(0.0)}
