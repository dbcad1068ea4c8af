"""What a unit asks of a model: a column's own pixels in, the new column's pixels out.

`Denoiser.denoise` is one, with its extra columns given; `in_float32` makes one of what takes and gives float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from denoise_batch.errors import DenoiseBatchError
from denoise_batch.extra_columns import Denoised
from denoise_batch.images import Polarity, from_model_output, to_model_input

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray


MOST_ROWS: Final = 4096
"""Of the rows that a unit gives a model at a time: more would leave the core's cache on their way."""


class Forward(Protocol):
    """Denoises pixels as they stand in a column."""

    def __call__(self, pixels: NDArray[Any], polarity: Polarity, dtype: str) -> Denoised:
        """Denoises n images.

        Args:
            pixels: (n, 784), uint8 0..255 or float32, as `decode` gives them; may be read-only.
            polarity: of the pixels, and of what comes back.
            dtype: of the pixels that come back, `uint8` (rint(255 x), clipped) or `float32`.

        Raises:
            DenoiseBatchError: the model gave a pixel that is not a number.
        """


def in_float32(forward: Callable[[NDArray[np.float32]], NDArray[np.float32] | Denoised]) -> Forward:
    """A `Forward` of what takes (n, 784) float32, 0 = background, and gives the same in 0..1 or `Denoised` of such."""

    def denoise(pixels: NDArray[Any], polarity: Polarity, dtype: str) -> Denoised:
        made = forward(to_model_input(pixels, polarity))
        denoised = made if isinstance(made, Denoised) else Denoised(made)
        if not np.isfinite(denoised.pixels).all():
            raise not_a_number()
        shown = from_model_output(denoised.pixels, polarity, dtype)
        return Denoised(shown, denoised.psnr, denoised.noise_level, denoised.code)

    return denoise


def not_a_number() -> DenoiseBatchError:
    return DenoiseBatchError("the model gave a pixel that is not a number", hint="")
