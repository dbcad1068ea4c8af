"""What a network says of an image beside its pixels, and the columns that `infer` makes of it.

    extras = ExtraColumns(quality=True)
    extras.check(bundle)                       # before torch loads
    denoised = denoiser.run(noisy, extras)     # `Denoised`: pixels, psnr, noise_level
    arrays = extras.arrays(denoised, bad)      # one for each of extras.fields("denoised")

With `quality`: `denoised_psnr`, the PSNR in dB that the model expects of its own output, and `denoised_noise_level`,
the noise that it finds in the input. With `code`: `denoised_code`, the bottleneck. The new image column's name is in
front, so that two models' outputs can stand in one file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa

from denoise_batch.errors import DenoiseBatchError, FlagError
from denoise_batch.images.ink import with_ink

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from denoise_batch.bundle import Bundle
    from denoise_batch.images import Polarity

_HIGHEST_PSNR: Final = 45.0


POOR_PSNR: Final = 10.0
"""Below so many dB an image is counted as poor: next to nothing of it is right. Of digits under the seed's noise the
model that ships never expects so little, of cells full of ink always."""


def psnr_column(output: str) -> str:
    """The column that says what PSNR is expected of the images in column `output`."""
    return f"{output}_psnr"


@dataclass(frozen=True)
class Denoised:
    """What a model makes of n images.

    Attributes:
        pixels: (n, 784) float32 in 0..1, or as a column has them (`forward.Forward`).
        psnr: (n,) float32, 0 to 45, the denoised image's expected PSNR in dB; None unless asked for, as the following.
        noise_level: (n,) float32, at least 0: root mean square of the noise that was added to the input, blur and
            clipping not counted, in units of full ink. For uniform noise in [-r, r] this is r / √3.
        code: (n, k) float32, the bottleneck, row-major.
    """

    pixels: NDArray[Any]
    psnr: NDArray[np.float32] | None = None
    noise_level: NDArray[np.float32] | None = None
    code: NDArray[np.float32] | None = None

    def in_ink(self, levels: NDArray[np.float32], polarity: Polarity) -> Denoised:
        """The same of images whose ink was brought to full before: as pale as it had been.

        Args:
            levels: (n,) of full ink; errors and noise shrink with it.
            polarity: of the pixels.
        """
        psnr = None if self.psnr is None else np.minimum(self.psnr - 20 * np.log10(levels), _HIGHEST_PSNR)
        noise_level = None if self.noise_level is None else self.noise_level * levels
        return Denoised(with_ink(self.pixels, polarity, levels), psnr, noise_level, self.code)


@dataclass(frozen=True)
class ExtraColumns:
    """Which columns are asked for beside the image.

    Attributes:
        quality: expected PSNR and noise level, both float32.
        code: the bottleneck, `list<float32>`: pyarrow before 26 cannot read null rows of a fixed_size_list.
    """

    quality: bool = False
    code: bool = False

    def fields(self, output: str) -> list[pa.Field]:
        """The columns' fields, all nullable, where the new image column is called `output`."""
        fields = []
        if self.quality:
            fields += [(psnr_column(output), pa.float32()), (f"{output}_noise_level", pa.float32())]
        if self.code:
            fields.append((f"{output}_code", pa.list_(pa.float32())))
        return [pa.field(name, kind) for name, kind in fields]

    def arrays(self, denoised: Denoised, bad: NDArray[Any]) -> list[pa.Array]:
        """The columns' values, null where `bad`, (n,), is not 0.

        Raises:
            DenoiseBatchError: the model gave a number that is not finite.
        """
        return [_column(values, bad != 0) for values in self._values(denoised)]

    def _values(self, denoised: Denoised) -> Iterator[NDArray[np.float32] | None]:
        if self.quality:
            yield from (denoised.psnr, denoised.noise_level)
        if self.code:
            yield denoised.code

    def poor(self, denoised: Denoised, bad: NDArray[Any]) -> int:
        """Of how many good images the model expects less than `POOR_PSNR`; 0 where it is not asked."""
        if not self.quality or denoised.psnr is None:
            return 0
        return int(((denoised.psnr < POOR_PSNR) & (bad == 0)).sum())

    def check(self, bundle: Bundle) -> None:
        """Refuses a model that cannot tell what is asked for.

        Raises:
            FlagError: naming the flag and the model.
        """
        if self.quality and not bundle.has_quality:
            raise FlagError(
                f"--quality: the model {bundle.folder} (network {bundle.architecture!r}) does not say how good its "
                "images are",
                hint="give --model bounds-unet, which ships with us, or train one with `denoise-batch train`",
            )
        if self.code and not bundle.code_size:
            raise FlagError(
                f"--code: the model {bundle.folder} (network {bundle.architecture!r}) has no bottleneck that stands "
                "for the whole image",
                hint="give --model seed, which ships with us, or train one with `denoise-batch train --recipe seed`",
            )

    def to_json(self) -> dict[str, bool]:
        """What is asked for, and nothing else: a run that asks for nothing is the run it was before there were any."""
        return {name: True for name in ("quality", "code") if getattr(self, name)}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> ExtraColumns:
        return cls(quality=fields.get("quality") is True, code=fields.get("code") is True)


def poor_lines(poor: int | None, rows: int) -> list[str]:
    """The note of images that the model expects next to nothing of; none where there are none, or it was not asked.

    Args:
        poor: how many (`ExtraColumns.poor`).
        rows: of so many good ones.
    """
    if not poor:
        return []
    return [
        f"note: {poor:,} of {rows:,} rows {'have' if poor != 1 else 'has'} an expected PSNR below {POOR_PSNR:g} dB, as "
        "images have that are no digits, or of the other polarity; `denoise-batch preview OUT sheet.png --worst 20` "
        "shows the lowest"
    ]


NO_EXTRAS: Final = ExtraColumns()


def _column(values: NDArray[np.float32] | None, missing: NDArray[np.bool_]) -> pa.Array:
    if values is None or not np.isfinite(values).all():
        raise DenoiseBatchError("the model gave a number about an image that is not finite", hint="")
    if values.ndim == 1:
        return pa.array(values, pa.float32(), mask=missing)
    # Null rows take no values, so that the list's offsets alone say where each row's are.
    kept = values[~missing]
    ends = np.concatenate([[0], np.cumsum(np.where(missing, 0, values.shape[1]))]).astype(np.int32)
    offsets = pa.array(ends, pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.array(kept.ravel()), mask=pa.array(missing))
