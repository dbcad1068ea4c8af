"""PNGs of many digits at once: what pillow makes of each alone, or nothing."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from denoise_batch.digits import draw_digits
from denoise_batch.images import BadReason, Layout, decode, encode, image_column
from denoise_batch.images.encoded import UndecodableImage, WrongImageSize, decode_image
from denoise_batch.images.png import decode_plain_pngs, encode_pngs

GREY = struct.pack(">IIBBBBB", 28, 28, 8, 0, 0, 0, 0)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(lines: bytes, *, head: bytes = GREY, between: bytes = b"", level: int = 6) -> bytes:
    """A PNG of these lines, each with its filter in front."""
    packed = chunk(b"IDAT", zlib.compress(lines, level))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + between + packed + chunk(b"IEND", b"")


def filtered(image: np.ndarray, kinds: list[int]) -> bytes:
    """(28, 28) uint8 as lines, by the words of PNG's specification."""
    lines = bytearray()
    at = lambda y, x: int(image[y, x]) if x >= 0 and y >= 0 else 0  # noqa: E731
    for y, kind in enumerate(kinds):
        lines.append(kind)
        for x in range(28):
            left, up, corner = at(y, x - 1), at(y - 1, x), at(y - 1, x - 1)
            nearest = min((left, up, corner), key=lambda value: abs(left + up - corner - value))
            foretold = (0, left, up, (left + up) // 2, nearest)[kind]
            lines.append((at(y, x) - foretold) % 256)
    return bytes(lines)


def unpacked(*images: bytes) -> tuple[np.ndarray, np.ndarray]:
    ends = np.cumsum([len(image) for image in images])
    data = np.frombuffer(b"".join(images), np.uint8)
    return decode_plain_pngs(data, ends - [len(image) for image in images], ends)


def alone(image: bytes) -> Any:
    try:
        return decode_image(image).reshape(-1)
    except (UndecodableImage, WrongImageSize):
        return None


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 4), min_size=28, max_size=28)),
        min_size=1,
        max_size=5,
    )
)
def test_every_filter_is_undone(drawn: list[tuple[int, list[int]]]) -> None:
    images = [np.random.default_rng(seed).integers(0, 256, (28, 28), np.uint8) for seed, _ in drawn]
    packed = [png(filtered(image, kinds)) for image, (_, kinds) in zip(images, drawn, strict=True)]
    pixels, done = unpacked(*packed)
    assert done.all()
    assert np.array_equal(pixels, np.array(images).reshape(-1, 784))
    assert np.array_equal(alone(packed[0]), pixels[0])


def test_what_pillow_writes(digits: Any) -> None:
    noisy = np.random.default_rng(0).integers(0, 256, (40, 28, 28), np.uint8)
    images, written = [*digits[0][:200].reshape(-1, 28, 28), *noisy], list[bytes]()
    for image in images:
        for options in ({}, {"optimize": True}, {"compress_level": 0}):
            out = io.BytesIO()
            Image.fromarray(image).save(out, "PNG", **options)
            written.append(out.getvalue())
    pixels, done = unpacked(*written)
    assert done.all()
    assert np.array_equal(pixels, np.repeat(np.array(images).reshape(-1, 784), 3, axis=0))


def test_all_but_the_plainest_are_left_to_pillow() -> None:
    image = np.arange(784, dtype=np.uint8).reshape(28, 28)
    lines = filtered(image, [0] * 28)
    half = png(lines)
    two = zlib.compress(lines)
    left = {
        "two pieces": half[:33] + chunk(b"IDAT", two[:50]) + chunk(b"IDAT", two[50:]) + half[-12:],
        "a note": png(lines, between=chunk(b"tEXt", b"Title\0digit")),
        "a transparent grey": png(lines, between=chunk(b"tRNS", b"\0\7")),
        "bits": png(lines[: 28 * 5], head=struct.pack(">IIBBBBB", 28, 28, 1, 0, 0, 0, 0)),
        "colours": png(bytes(28 * 85), head=struct.pack(">IIBBBBB", 28, 28, 8, 2, 0, 0, 0)),
        "interlaced": png(bytes(900), head=struct.pack(">IIBBBBB", 28, 28, 8, 0, 0, 0, 1)),
        "wide": png(bytes(30 * 28), head=struct.pack(">IIBBBBB", 29, 28, 8, 0, 0, 0, 0)),
        "too long": png(lines + bytes(300)),
        "too short": png(lines[:-1]),
        "a filter that there is not": png(b"\5" + lines[1:]),
        "a bomb": png(bytes(800_000)),
        "another checksum": half[:-20] + bytes([half[-20] ^ 1]) + half[-19:],
        "another end": half[:-12] + chunk(b"IENd", b""),
        "something behind it": half + b"\0",
        "nothing": b"",
        "its beginning": half[:60],
    }
    pixels, done = unpacked(half, *left.values(), half)
    assert done.tolist() == [True] + [False] * len(left) + [True]
    assert np.array_equal(pixels[[0, -1]], np.array([image, image]).reshape(-1, 784))
    assert not pixels[1:-1].any()
    column = image_column(pa.field("image", pa.binary()), Layout.ENCODED)
    found = decode(pa.array(list(left.values())), column)
    for name, pixels_of, bad in zip(left, found.pixels, found.bad, strict=True):
        shown = alone(left[name])
        assert (shown is None) == bool(bad), name
        assert shown is None or np.array_equal(shown, pixels_of), name


def test_a_bomb_is_not_unpacked() -> None:
    bomb = png(bytes(900_000), level=9)
    assert len(bomb) < 1024
    unpacked(bomb)
    tracemalloc.start()
    try:
        _, done = unpacked(bomb)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert not done.any()
    assert most < 100_000


@settings(max_examples=300, deadline=None)
@given(at=st.integers(0, 900), to=st.integers(0, 255), keep=st.integers(40, 900), level=st.integers(0, 9))
def test_damage_gives_what_pillow_gives_or_nothing(at: int, to: int, keep: int, level: int) -> None:
    lines = filtered(draw_digits(1, seed=5)[0].reshape(28, 28), [index % 5 for index in range(28)])
    data = bytearray(png(lines, level=level))
    data[at % len(data)] = to
    pixels, done = unpacked(bytes(data[:keep]), bytes(data))
    for image, shown, whole in zip((data[:keep], data), pixels, done, strict=True):
        assert not whole or np.array_equal(alone(bytes(image)), shown)


def test_no_flipped_bit_becomes_a_good_row() -> None:
    """Pillow alone does not look at the checksum of pixels, and zlib's may lie behind what it reads."""
    column = image_column(pa.field("image", pa.binary()), Layout.ENCODED)
    for image in draw_digits(3, seed=3)[0].reshape(-1, 28, 28):
        packed = io.BytesIO()
        Image.fromarray(image).save(packed, "PNG")
        data = np.frombuffer(packed.getvalue(), np.uint8)
        flipped = np.tile(data, (8 * (len(data) - 57), 1))  # all bits between the header and the end
        bits = np.arange(len(flipped))
        flipped[bits, 41 + bits // 8] ^= (1 << bits % 8).astype(np.uint8)
        found = decode(pa.array([row.tobytes() for row in flipped], pa.binary()), column)
        same = (found.pixels == image.reshape(-1)).all(axis=1)
        assert not np.any(~same & (found.bad == 0))


def test_pixels_that_are_missing_are_no_black_ones(digits: Any) -> None:
    """Checksums that fit say nothing of what was lost before they were made, and pillow fills up with black."""
    column = image_column(pa.field("image", pa.binary()), Layout.ENCODED)
    lines = filtered(digits[0][0].reshape(28, 28), [0] * 28)
    stream = zlib.compress(lines)
    step = len(stream) // 4 + 1
    quarters = [chunk(b"IDAT", stream[at : at + step]) for at in range(0, len(stream), step)]
    begins, ends = png(lines)[:33], png(lines)[-12:]
    whole = begins + b"".join(quarters) + ends
    broken = [begins + b"".join(quarters[:lost] + quarters[lost + 1 :]) + ends for lost in range(4)]
    broken += [begins + chunk(b"IDAT", data) + ends for data in (stream[:-4] + b"\0\0\0\0", b"garbage", b"")]
    broken += [begins + chunk(b"IDAT", zlib.compress(lines[: 29 * 14])) + ends]
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = chunk(b"eXIf", exif.tobytes()[6:])
    broken += [image[:33] + turned + image[33:] for image in broken]
    found = decode(pa.array([whole, *broken]), column)
    assert found.bad[0] == 0
    assert set(found.bad[1:].tolist()) == {BadReason.UNDECODABLE.code}
    # The seven passes of an interlaced image have lines of their own, some of them none.
    interlaced = png(bytes(837), head=struct.pack(">IIBBBBB", 28, 28, 8, 0, 0, 0, 1))
    cut = png(bytes(836), head=struct.pack(">IIBBBBB", 28, 28, 8, 0, 0, 0, 1))
    assert decode(pa.array([interlaced, cut]), column).bad.tolist() == [0, BadReason.UNDECODABLE.code]


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_a_grey_that_is_transparent_is_white(depth: int) -> None:
    levels = np.random.default_rng(depth).integers(0, 2**depth, (28, 28))
    clear = int(levels[3, 4])
    bits = np.unpackbits(levels.astype(">u2").view(np.uint8).reshape(28, 28, 2), axis=2)[:, :, 16 - depth :]
    packed = np.packbits(bits.reshape(28, -1), axis=1)
    lines = np.hstack([np.zeros((28, 1), np.uint8), packed]).tobytes()
    head = struct.pack(">IIBBBBB", 28, 28, depth, 0, 0, 0, 0)
    image = png(lines, head=head, between=chunk(b"tRNS", struct.pack(">H", clear)))
    found = decode(pa.array([image]), image_column(pa.field("image", pa.binary()), Layout.ENCODED))
    shown = np.where(levels == clear, 255, np.rint(levels * 255 / (2**depth - 1)))
    assert np.array_equal(found.pixels[0], shown.reshape(-1).astype(np.uint8))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_an_image_lies_as_its_exif_says(kind: str, digits: Any) -> None:
    image = digits[0][0].reshape(28, 28)
    column = image_column(pa.field("image", pa.binary()), Layout.ENCODED)
    for orientation, turned in ((1, image), (3, image[::-1, ::-1]), (6, np.rot90(image, 1)), (8, np.rot90(image, -1))):
        exif = Image.Exif()
        exif[0x0112] = orientation
        packed = io.BytesIO()
        Image.fromarray(turned).save(packed, kind, exif=exif, quality=100)
        found = decode(pa.array([packed.getvalue()], pa.binary()), column)
        assert found.bad[0] == 0
        assert np.abs(found.pixels[0].astype(int) - image.reshape(-1)).max() <= (0 if kind == "PNG" else 8)


def test_exif_that_is_none_is_no_fault(digits: Any) -> None:
    image = digits[0][0].reshape(28, 28)
    packed = io.BytesIO()
    Image.fromarray(image).save(packed, "PNG", exif=b"Exif\0\0nothing of the kind")
    found = decode(pa.array([packed.getvalue()], pa.binary()), image_column(pa.field("i", pa.binary()), Layout.ENCODED))
    assert found.bad[0] == 0
    assert np.array_equal(found.pixels[0], image.reshape(-1))


@pytest.mark.parametrize("type_", [pa.binary(), pa.large_binary()], ids=str)
@pytest.mark.parametrize("in_struct", [False, True])
def test_slices_and_nulls(type_: pa.DataType, in_struct: bool, digits: Any) -> None:
    images = digits[0][:6].reshape(-1, 784)
    packed: list[Any] = [image.tobytes() for image in encode_pngs(images)]
    packed[2], packed[4] = None, b"damaged"
    values = [{"bytes": data, "path": None} for data in packed] if in_struct else packed
    kind = pa.struct({"bytes": type_, "path": pa.string()}) if in_struct else type_
    column = image_column(pa.field("image", kind), Layout.ENCODED)
    array = pa.array(values, kind)
    for part, first in ((array, 0), (array.slice(1), 1), (array.slice(3, 2), 3), (array.slice(6), 6)):
        found = decode(part, column)
        good = found.bad == 0
        assert good.tolist() == [index not in (2, 4) for index in range(first, first + len(part))]
        assert np.array_equal(found.pixels[good], images[first : first + len(part)][good])


def test_many_blocks(digits: Any) -> None:
    images = np.resize(digits[0].reshape(-1, 784), (9000, 784))
    packed = encode_pngs(images)
    packed[4500, 60] ^= 1
    ends = np.arange(1, 9001) * packed.shape[1]
    pixels, done = decode_plain_pngs(packed.reshape(-1), ends - packed.shape[1], ends)
    assert np.flatnonzero(~done).tolist() == [4500]
    assert np.array_equal(pixels[done], images[done])


@pytest.mark.parametrize("type_", [pa.binary_view(), pa.dictionary(pa.int32(), pa.binary())], ids=str)
def test_views_and_dictionaries_are_not_written(type_: pa.DataType) -> None:
    with pytest.raises(ValueError, match="cannot be written as"):
        encode(np.zeros((1, 784), np.uint8), None, image_column(pa.field("image", type_), Layout.ENCODED))


def test_what_is_written_is_a_png_of_those_pixels(digits: Any) -> None:
    images = digits[0][:50].reshape(-1, 784)
    for packed, image in zip(encode_pngs(images), images, strict=True):
        with Image.open(io.BytesIO(packed.tobytes())) as opened:
            opened.verify()
        with Image.open(io.BytesIO(packed.tobytes())) as opened:
            assert (opened.format, opened.mode) == ("PNG", "L")
            assert np.array_equal(np.asarray(opened).reshape(-1), image)
    column = image_column(pa.field("image", pa.binary()), Layout.ENCODED)
    bad = np.arange(50) % 7 == 0
    array = encode(images, bad, column)
    array.validate(full=True)
    assert array.is_null().to_pylist() == bad.tolist()
    assert np.array_equal(decode(array, column).pixels[~bad], images[~bad])
