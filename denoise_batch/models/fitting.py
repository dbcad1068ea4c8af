"""A network's pass, and the images with little noise that come of it fitted to their scans, however many there are.

made, candidates = seen(model, images, may, extras)          # of a batch
for fitted in fits([candidates, ...], most_blur):            # of several batches together: few are slow
    ...
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import torch

from denoise_batch.models.data_consistency import fitted
from denoise_batch.models.fitted_quality import expected_of
from denoise_batch.models.network import Said
from denoise_batch.models.quality_head import MOST_PSNR
from denoise_batch.models.scans import look_at

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from torch import Tensor

    from denoise_batch.extra_columns import ExtraColumns
    from denoise_batch.models.network import DenoisingNetwork, Known

AT_A_TIME: Final = 512
"""Images that are fitted at a time: fewer are slow, and more take memory."""
AT_A_TIME_ON_GPU: Final = 8192
"""For a GPU, which is idle between few; they take about a gigabyte, and half of it is tried where that is not there."""


class Candidates(NamedTuple):
    """Images that may be fitted.

    Attributes:
        rows: (n,), their numbers.
        noisy, clean: (n, 28, 28), their scans, and what the network has made of them.
        known: from which it says how good that is.
    """

    rows: NDArray[np.int64]
    noisy: Tensor
    clean: Tensor
    known: Known


class Fitted(NamedTuple):
    """What came of some of them.

    Attributes:
        rows: (n,), the numbers of those that were fitted.
        pixels: (n, 784) float32, what they are now.
        tried: (m,), the numbers of those of which is known better than before how good they are, `rows` among them.
        psnr: (m,) float32, what is expected of these.
    """

    rows: NDArray[np.int64]
    pixels: Tensor
    tried: NDArray[np.int64]
    psnr: Tensor


def seen(
    model: DenoisingNetwork, images: Tensor, may: Tensor, extras: ExtraColumns
) -> tuple[dict[str, Tensor], Candidates]:
    """What a network gives, and what is kept of the images that may be fitted to their scans.

    Args:
        model: one that says how good its images are.
        images: (n, 1, 28, 28).
        may: the numbers of those that may have little noise.

    Returns:
        `Denoised`'s fields, and what `fits` takes.
    """
    assert not extras.code  # of no network that says how good its images are
    clean, known = model.clean_and_known(images)
    made = {"pixels": clean.reshape(-1, 784)}
    if extras.quality:
        said = known.quality()
        made |= told(said)
        known = Said(said)
    noisy, clean = (part[:, 0].index_select(0, may) for part in (images, clean))
    return made, Candidates(may.cpu().numpy(), noisy, clean, known.rows(may))


def fits(candidates: list[Candidates], most_blur: float) -> Iterator[Fitted]:
    """Fits images to their scans, where that makes them better.

    Args:
        candidates: of one batch, or more.
        most_blur: `Bundle.most_blur`.
    """
    first, *others = candidates
    every = np.concatenate([first.rows, *(part.rows for part in others)])
    noisy, clean = (torch.cat([getattr(part, name) for part in (first, *others)]) for name in ("noisy", "clean"))
    known = first.known.joined([part.known for part in others])
    most = AT_A_TIME_ON_GPU if noisy.is_cuda else AT_A_TIME
    for start in range(0, len(every), most):
        chosen = torch.arange(start, min(start + most, len(every)), device=noisy.device)
        scans = look_at(noisy.index_select(0, chosen), clean.index_select(0, chosen), most_blur)
        which = scans.fits.nonzero()[:, 0]
        if not len(which):
            continue
        scans, chosen = scans.rows(which), chosen[which]
        expected = told(known.rows(chosen).quality())["psnr"]
        fit = fitted(scans, expected)
        alone, after = expected_of(scans.mean, fit, expected)
        better = fit.trusted & (after > alone)
        rows, tried = better.nonzero()[:, 0], every[chosen.cpu().numpy()]
        pixels = fit.clean.index_select(0, rows).reshape(-1, 784)
        yield Fitted(tried[rows.cpu().numpy()], pixels, tried, torch.where(better, after, alone))


def told(quality: Tensor) -> dict[str, Tensor]:
    """`Outputs.quality` → what `Denoised` has of it."""
    return {"psnr": quality[:, 0].clamp(0.0, MOST_PSNR), "noise_level": quality[:, 1].clamp_min(0.0)}
