"""PNG and JPEG bytes ⇄ 28×28 grey pixels, one image at a time. Damaged and hostile bytes are expected here."""

from __future__ import annotations

import io
import struct
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

from denoise_batch.images.layouts import PIXELS, SIDE

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"
_JPEG_END = b"\xff\xd9"


class UndecodableImage(Exception):
    """The bytes are no PNG or JPEG image, or a damaged one."""


class WrongImageSize(Exception):
    """The image is not 28×28; its message is the size found."""


def looks_encoded(data: bytes) -> bool:
    """Whether the bytes begin as a PNG or a JPEG does."""
    # 784 raw pixels may begin as a JPEG does (white, slightly less, white); they do not also end as one.
    raw = len(data) == PIXELS and not data.endswith(_JPEG_END)
    return data.startswith(_PNG) or (data.startswith(_JPEG) and not raw)


def decode_image(data: pa.Buffer | bytes) -> NDArray[np.uint8]:
    """Unpack one image.

    Colours become grey (ITU-R 601), 16 bits become 8, and what is transparent becomes white, as viewers show it.

    Returns:
        (28, 28) uint8.

    Raises:
        WrongImageSize: another size; noticed before any pixel is unpacked, so a decompression bomb costs nothing.
        UndecodableImage: neither PNG nor JPEG, or damaged.
    """
    from PIL import Image

    try:
        # Two formats only: pillow reads dozens, some with parsers that fewer people have attacked.
        image: Any = Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))
        width, height = image.size
        if (width, height) == (SIDE, SIDE):
            if image.mode.startswith("I"):  # 16 bits; pillow's own conversion cuts off at 255
                return np.rint(np.asarray(image) / 257.0).clip(0, 255).astype(np.uint8)
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            return np.asarray(image.convert("L"))
    except Exception as error:  # pillow raises SyntaxError, struct.error, ValueError and more on damaged data
        raise UndecodableImage(str(error)) from error
    raise WrongImageSize(f"{width}×{height}")


def encode_png(images: NDArray[np.uint8]) -> list[bytes]:
    """Pack (n, 784) uint8 as grey PNGs: written directly, since pillow's start-up dominates for images this small."""
    head = _PNG + _chunk(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, 8, 0, 0, 0, 0))
    tail = _chunk(b"IEND", b"")
    lines = np.zeros((len(images), SIDE, 1 + SIDE), np.uint8)  # each line begins with its filter: 0, none
    lines[:, :, 1:] = images.reshape(-1, SIDE, SIDE)
    return [head + _chunk(b"IDAT", zlib.compress(image.tobytes(), 1)) + tail for image in lines]


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
