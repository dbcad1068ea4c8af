"""PNG and JPEG bytes → 28×28 grey pixels, one image at a time. Damaged and hostile bytes are expected here."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np

from denoise_batch.images.layouts import PIXELS, SIDE
from denoise_batch.images.png import SIGNATURE, has_all_lines

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

_JPEG = b"\xff\xd8\xff"
_JPEG_END = b"\xff\xd9"
_ORIENTATION = 0x0112


class UndecodableImage(Exception):
    """The bytes are no PNG or JPEG image, or a damaged one."""


class WrongImageSize(Exception):
    """The image is not 28×28; its message is the size found."""


def looks_encoded(data: bytes) -> bool:
    """Whether the bytes begin as a PNG or a JPEG does."""
    # 784 raw pixels may begin as a JPEG does (white, slightly less, white); they do not also end as one.
    raw = len(data) == PIXELS and not data.endswith(_JPEG_END)
    return data.startswith(SIGNATURE) or (data.startswith(_JPEG) and not raw)


def decode_image(data: pa.Buffer | bytes) -> NDArray[np.uint8]:
    """Unpack one image.

    Colours become grey (ITU-R 601), 16 bits become 8, what is transparent becomes white, and an image lies as its EXIF
    orientation says: as viewers and Hugging Face's `datasets` show it.

    Returns:
        (28, 28) uint8.

    Raises:
        WrongImageSize: another size; noticed before any pixel is unpacked, so a decompression bomb costs nothing.
        UndecodableImage: neither PNG nor JPEG, or damaged. A PNG's checksums say so, a JPEG has none.
    """
    from PIL import Image, ImageOps

    try:
        # Two formats only: pillow reads dozens, some with parsers that fewer people have attacked.
        image: Any = Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))
        width, height = image.size
        if (width, height) == (SIDE, SIDE):
            if image.format == "PNG":
                image.verify()  # of pixels pillow does not look at the checksums; it opens a file for this alone
                image = Image.open(io.BytesIO(data), formats=("PNG",))
                if not has_all_lines(data):
                    raise UndecodableImage("pixels are missing")
            image.load()  # here: a damaged stream of pixels is said once, and `getexif` would be the first to meet it
            if _orientation(image) != 1:
                image = ImageOps.exif_transpose(image)
            clear = image.info.get("transparency")  # of grey images: the one grey that is
            if image.mode.startswith("I"):  # 16 bits; pillow's own conversion cuts off at 255
                grey = np.asarray(image)
                shown = np.rint(grey / 257.0).clip(0, 255).astype(np.uint8)
                return np.where(grey == clear, np.uint8(255), shown) if isinstance(clear, int) else shown
            if image.mode == "L" and isinstance(clear, int):  # pillow scales the pixels of 2 and 4 bits, and not this
                return np.where(np.asarray(image) == clear * _greys(data), np.uint8(255), np.asarray(image))
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            return np.asarray(image.convert("L"))
    except Exception as error:  # pillow raises SyntaxError, struct.error, ValueError and more on damaged data
        raise UndecodableImage(str(error)) from error
    raise WrongImageSize(f"{width}×{height}")


def _orientation(image: Any) -> int:
    """EXIF's: 1 where the image lies as its pixels do, or nothing can be read of it."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # as above; the pixels themselves have been read
        return 1


def _greys(data: pa.Buffer | bytes) -> int:
    """What a step of a grey PNG's own levels is in 8 bits."""
    return {1: 255, 2: 85, 4: 17}.get(bytes(data[24:25])[0], 1)
