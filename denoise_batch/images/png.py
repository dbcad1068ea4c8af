"""PNGs of many 28×28 grey digits at once. What is not of the plainest kind is left to `encoded`."""

from __future__ import annotations

import contextlib
import struct
import zlib
from typing import TYPE_CHECKING, Final

import numpy as np

from denoise_batch.images.layouts import PIXELS, SIDE

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pyarrow as pa
    from numpy.typing import NDArray


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_HEAD: Final = SIGNATURE + _chunk(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, 8, 0, 0, 0, 0))  # 8 bits, grey
_KIND: Final = b"IDAT"
_TAIL: Final = _chunk(b"IEND", b"")
_AROUND: Final = len(_HEAD) + 4 + len(_KIND) + 4 + len(_TAIL)
"""Bytes beside those of IDAT: the other chunks, its length, its kind, its checksum."""

_LINE: Final = 1 + SIDE  # each begins with its filter
_LINES: Final = SIDE * _LINE
_STORED: Final = b"\x78\x01\x01" + struct.pack("<HH", _LINES, _LINES ^ 0xFFFF)
"""How a zlib stream begins (RFC 1950, 1951) of which the only block is not compressed."""

_CHANNELS: Final = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""By the colour type of PNG's head."""
_ADAM7: Final = (
    (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)
)  # fmt: skip
"""Of an interlaced image's seven passes: the first pixel's column and line, and the steps to the next."""

_LONGEST: Final = 1024
"""Longer ones are left to pillow: even pixels that are not compressed take no more."""
_BLOCK: Final = 4096
"""Images worked on together: 14 MB of memory, and steps of the filters that are long enough for NumPy."""


def decode_plain_pngs(
    data: NDArray[np.uint8], starts: NDArray[np.int64], ends: NDArray[np.int64]
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Unpack those of many images that are PNGs of the plainest kind.

    They are 28×28, 8-bit grey, whole by their checksums, and have nothing but pixels in one piece: what pillow (and so
    Hugging Face), OpenCV and `encode_pngs` write. `encoded.decode_image` makes the same of them, a third as fast, and
    says what is wrong with the others.

    Args:
        data: the bytes of all images.
        starts, ends: (n,) where each image's bytes are in it.

    Returns:
        (n, 784) pixels, (n,) whether they were unpacked; pixels of the others are 0.
    """
    pixels, done = np.zeros((len(starts), PIXELS), np.uint8), np.zeros(len(starts), np.bool_)
    for begin in range(0, len(starts), _BLOCK):
        block = slice(begin, begin + _BLOCK)
        places, filtered = _plain_ones(data, starts[block], ends[block])
        pixels[begin + places] = _unfiltered(filtered)
        done[begin + places] = True
    return pixels, done


def _plain_ones(
    data: NDArray[np.uint8], starts: NDArray[np.int64], ends: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Which of these images are plain, and their (m, 28, 29) lines."""
    places = np.flatnonzero((ends - starts > _AROUND) & (ends - starts <= _LONGEST))
    first, last = starts[places], ends[places]
    plain = _same(data, first, _HEAD)
    plain &= _numbers(data, first + len(_HEAD)) == last - first - _AROUND
    plain &= _same(data, first + len(_HEAD) + 4, _KIND)
    plain &= _same(data, last - len(_TAIL), _TAIL)
    places = places[plain]
    first, last = first[plain] + len(_HEAD) + 4, last[plain] - len(_TAIL) - 4
    unpacked = _unpacked(data.data, first.tolist(), last.tolist(), _numbers(data, last).tolist())
    places = places[[lines is not None for lines in unpacked]]
    joined = b"".join(lines for lines in unpacked if lines is not None)
    filtered = np.frombuffer(joined, np.uint8).reshape(-1, SIDE, _LINE)
    known = (filtered[:, :, 0] < len(_UNDO)).all(axis=1)
    return (places, filtered) if known.all() else (places[known], filtered[known])


def has_all_lines(data: pa.Buffer | bytes) -> bool:
    """Whether the pixels of a PNG, which is whole by its checksums, unpack to as many bytes as its head says.

    pillow takes a stream that ends early for whole, and leaves the lines that are missing black.
    """
    view = memoryview(data)
    width, height, depth, colours, _, _, interlaced = struct.unpack(">IIBBBBB", view[16:29])
    bits = depth * _CHANNELS[colours]
    passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    sizes = [(-(-(width - left) // right), -(-(height - top) // down)) for left, top, right, down in passes]
    expected: int = sum(lines * (1 + -(-across * bits // 8)) for across, lines in sizes if across > 0 and lines > 0)
    place, packed = len(SIGNATURE), []
    while place + 8 <= len(view):
        size, kind = struct.unpack(">I4s", view[place : place + 8])
        if kind == _KIND:
            packed.append(view[place + 8 : place + 8 + size])
        place += size + 12
    try:
        unpacked = zlib.decompressobj().decompress(b"".join(packed), expected)
    except zlib.error:
        return False
    return len(unpacked) == expected


def encode_pngs(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pack (n, 784) uint8 as grey PNGs, all of one length: (n, 880).

    The pixels in them are not compressed. Parquet compresses many of them together, and better than each PNG its own:
    177 bytes a digit for 209. It takes a fifth of the time as well.
    """
    head = _HEAD + struct.pack(">I", len(_STORED) + _LINES + 4) + _KIND + _STORED
    first, last = len(head), len(head) + _LINES
    packed = np.zeros((len(images), last + 8 + len(_TAIL)), np.uint8)
    packed[:, :first] = np.frombuffer(head, np.uint8)
    for line in range(SIDE):  # filter 0: none
        packed[:, first + line * _LINE + 1 : first + (line + 1) * _LINE] = images[:, line * SIDE : (line + 1) * SIDE]
    packed[:, last + 8 :] = np.frombuffer(_TAIL, np.uint8)
    adler = [zlib.adler32(image) for image in packed[:, first:last]]
    packed[:, last : last + 4] = np.array(adler, ">u4").view(np.uint8).reshape(-1, 4)
    crc = [zlib.crc32(image) for image in packed[:, len(_HEAD) + 4 : last + 4]]
    packed[:, last + 4 : last + 8] = np.array(crc, ">u4").view(np.uint8).reshape(-1, 4)
    return packed


def _same(data: NDArray[np.uint8], starts: NDArray[np.int64], expected: bytes) -> NDArray[np.bool_]:
    """(n,) whether the bytes from each of these places on are the expected ones."""
    found = data[starts[:, None] + np.arange(len(expected))]
    same: NDArray[np.bool_] = (found == np.frombuffer(expected, np.uint8)).all(axis=1)
    return same


def _numbers(data: NDArray[np.uint8], starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """(n,) the numbers of 32 bits at these places, as PNG writes them."""
    numbers: NDArray[np.int64] = data[starts[:, None] + np.arange(4)].view(">u4").reshape(-1).astype(np.int64)
    return numbers


def _unpacked(
    data: memoryview, first: Sequence[int], last: Sequence[int], checksums: Sequence[int]
) -> list[bytes | None]:
    """Each image's lines, filters at their beginnings; None where checksum, stream or length is not as it should be."""
    found: list[bytes | None] = [None] * len(first)
    for place, (start, end, checksum) in enumerate(zip(first, last, checksums, strict=True)):
        if zlib.crc32(data[start:end]) == checksum:
            with contextlib.suppress(zlib.error):
                stream = zlib.decompressobj()
                # One more: what unpacks to a megabyte is found out, and the stream's own checksum is reached.
                lines = stream.decompress(data[start + len(_KIND) : end], _LINES + 1)
                found[place] = lines if stream.eof and len(lines) == _LINES else None
    return found


# --- filters: PNG's specification, section 9 --------------------------------------------------------------------------


def _unfiltered(filtered: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(n, 784) pixels of (n, 28, 29) lines: a line's pixels are what its filter foretells of them, and a difference."""
    kinds, lines = filtered[:, :, 0], filtered[:, :, 1:]
    if not kinds.any():
        return lines.reshape(-1, PIXELS)
    planes = np.ascontiguousarray(lines.transpose(1, 2, 0))  # one pixel of all images side by side
    above = np.zeros_like(planes[0])
    for line, kind in zip(planes, kinds.T, strict=True):
        for number, undo in enumerate(_UNDO):
            images = np.flatnonzero(kind == number)
            if len(images) and undo is not None:
                line[:, images] = undo(line[:, images], above[:, images])
        above = line
    return planes.transpose(2, 0, 1).reshape(-1, PIXELS)


def _undo_sub(line: NDArray[np.uint8], _: NDArray[np.uint8]) -> NDArray[np.uint8]:
    pixels: NDArray[np.uint8] = np.add.accumulate(line, axis=0, dtype=np.uint8)
    return pixels


def _undo_up(line: NDArray[np.uint8], above: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return line + above


def _undo_average(line: NDArray[np.uint8], above: NDArray[np.uint8]) -> NDArray[np.uint8]:
    left = np.zeros_like(line[0])
    for pixel, up in zip(line, above, strict=True):
        pixel += (left & up) + ((left ^ up) >> 1)  # half of the sum, rounded down, in 8 bits
        left = pixel
    return line


def _undo_paeth(line: NDArray[np.uint8], above: NDArray[np.uint8]) -> NDArray[np.uint8]:
    left = corner = np.zeros(line.shape[1], np.int16)
    for pixel, up in zip(line, above.astype(np.int16), strict=True):
        # How far the sum of left and up, less the corner, is from each of the three; the first of the nearest is taken.
        from_left, from_up, from_corner = np.abs(up - corner), np.abs(left - corner), np.abs(left + up - 2 * corner)
        nearest = np.where(from_up <= from_corner, up, corner)
        nearest = np.where((from_left <= from_up) & (from_left <= from_corner), left, nearest)
        pixel += nearest.astype(np.uint8)
        left, corner = pixel.astype(np.int16), up
    return line


_UNDO: Final = (None, _undo_sub, _undo_up, _undo_average, _undo_paeth)
"""By the filter's number."""
