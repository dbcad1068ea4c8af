"""Arrow arrays of images ⇄ NumPy arrays of pixels, by whole buffers: offsets, validity, slices and chunks minded.

Only JPEGs, and PNGs of rare kinds, go row by row. Which column it is, and what its values mean, is in `images`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from denoise_batch.images.encoded import UndecodableImage, WrongImageSize, decode_image
from denoise_batch.images.layouts import PIXELS, SHAPES, SIDE, ImageColumn, Layout, is_variable_binary
from denoise_batch.images.plain import plain, plain_type
from denoise_batch.images.png import decode_plain_pngs, encode_pngs

Bools = NDArray[np.bool_]
Codes = NDArray[np.uint8]
Pixels = NDArray[Any]

FAR_OUTSIDE = 16.0
"""A float row with a value beyond ±16 is bad. The seed's worst noise reaches -2..3, Gaussian noise of σ = 3 some ±14:
noise stays inside; 0..255 that slipped in does not."""

_BLOCK = 256  # images worked on at a time: 784 kB of float32 stay in a core's cache


class BadReason(StrEnum):
    """Why a row's image cannot be used. `Decoded.bad` and ledgers hold the `code`: never renumber; 0 means good."""

    NULL = "null"
    NULL_PIXELS = "null_pixels"
    WRONG_LENGTH = "wrong_length"
    NOT_FINITE = "not_finite"
    UNDECODABLE = "undecodable"
    OUT_OF_RANGE = "out_of_range"

    @property
    def code(self) -> int:
        """1 for NULL up to 6 for OUT_OF_RANGE."""
        return list(BadReason).index(self) + 1

    @classmethod
    def from_code(cls, code: int) -> BadReason:
        """The reason that a code other than 0 stands for."""
        if not 1 <= code <= len(cls):
            raise ValueError(f"{code} is no code of a BadReason")
        return list(cls)[code - 1]


@dataclass(frozen=True)
class Decoded:
    """Pixels of n rows.

    Attributes:
        pixels: (n, 784) C-contiguous, uint8 0..255 or float32 as they were; all zero where the row is bad. May be a
            read-only view of the Arrow buffer.
        bad: (n,) uint8, the code of the row's BadReason, 0 where it is good.
    """

    pixels: Pixels
    bad: Codes

    @property
    def good_pixels(self) -> Pixels:
        """(m, 784) the pixels of the good rows."""
        return self.pixels[self.bad == 0] if self.bad.any() else self.pixels

    def counts(self) -> dict[BadReason, int]:
        """How many rows are bad for each reason that occurs."""
        numbers = np.bincount(self.bad, minlength=len(BadReason) + 1)
        return {reason: int(numbers[reason.code]) for reason in BadReason if numbers[reason.code]}


def decode(array: pa.Array | pa.ChunkedArray, column: ImageColumn) -> Decoded:
    """Read a column's images.

    A row with several faults is counted under the first of: null, wrong length, null pixels, not finite, out of range.

    Args:
        array: the column or a part of it, n rows; where `column.type` is an extension type, its storage will do.
        column: what `find_image_column` found.

    Returns:
        uint8 stays uint8 (0..255), floats become float32. There is no copy where one chunk of them lies in one piece.
    """
    parts = [_decode_chunk(part, column) for part in chunks_of(array)]
    if len(parts) == 1:
        return parts[0]
    kind = np.uint8 if column.dtype == "uint8" else np.float32
    empty = Decoded(np.zeros((0, PIXELS), kind), np.zeros(0, np.uint8))
    parts.insert(0, empty)
    return Decoded(np.concatenate([part.pixels for part in parts]), np.concatenate([part.bad for part in parts]))


def _decode_chunk(array: pa.Array, column: ImageColumn) -> Decoded:
    pixels, bad = structure(array, column)
    if pixels.dtype != np.uint8:
        source = pixels
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, and is out of range then
            pixels = source.astype(np.float32, copy=False)
        suspects = np.flatnonzero(~(peaks_of(pixels) <= FAR_OUTSIDE))
        finite = np.isfinite(source[suspects]).all(axis=1)
        bad[suspects] = np.where(finite, BadReason.OUT_OF_RANGE.code, BadReason.NOT_FINITE.code)
        if len(suspects):
            pixels = pixels if pixels is not source else source.copy()
            pixels[suspects] = 0
    if column.transposed:
        pixels = np.ascontiguousarray(pixels.reshape(-1, SIDE, SIDE).transpose(0, 2, 1)).reshape(-1, PIXELS)
    return Decoded(pixels, bad)


def structure(array: pa.Array, column: ImageColumn) -> tuple[Pixels, Codes]:
    """(n, 784) pixels in the column's own number type, (n,) codes of the rows that are bad whatever their values."""
    array = storage_of(array)
    bad = np.where(_valid(array), 0, BadReason.NULL.code).astype(np.uint8)
    if column.layout is Layout.ENCODED:
        return _decode_images(array, bad), bad
    if pa.types.is_fixed_size_binary(array.type):
        data = array.buffers()[1]
        if data is None or not len(array):
            return np.zeros((len(array), PIXELS), np.uint8), bad
        flat = np.frombuffer(data, np.uint8, len(array) * PIXELS, array.offset * PIXELS)
        return _gather(flat, np.arange(len(array)) * PIXELS, bad), bad
    if is_variable_binary(array.type):
        offsets = _offsets(array)
        data = array.buffers()[2]
        _mark(bad, np.diff(offsets) != PIXELS, BadReason.WRONG_LENGTH)
        return _gather(np.frombuffer(data or b"", np.uint8), offsets[:-1], bad), bad
    if pa.types.is_struct(array.type):  # Ray's tensors of any shape
        _mark(bad, ~_has_image_shape(array.field("shape")), BadReason.WRONG_LENGTH)
        array = array.field("data")
        _mark(bad, ~_valid(array), BadReason.NULL)
    offsets = _offsets(array)
    null_rows: list[NDArray[np.int64]] = []
    if column.nested:
        rows = array.values
        inner, valid = _offsets(rows), _valid(rows)
        wrong = _owners(offsets, np.flatnonzero(valid & (np.diff(inner) != SIDE)))
        null_rows.append(_owners(offsets, np.flatnonzero(~valid)))
        lengths = np.diff(offsets) * SIDE
        lengths[wrong] = -1
        offsets, array = inner[offsets], rows
    else:
        lengths = np.diff(offsets)
    _mark(bad, lengths != PIXELS, BadReason.WRONG_LENGTH)
    values = array.values
    if values.null_count:
        null_rows.append(_owners(offsets, np.flatnonzero(~_valid(values))))
    for owners in null_rows:
        mask = np.zeros(len(bad), np.bool_)
        mask[owners] = True
        _mark(bad, mask, BadReason.NULL_PIXELS)
    return _gather(_numbers(values, column.dtype), offsets[:-1], bad), bad


def _gather(flat: Pixels, starts: NDArray[np.int64], bad: Codes) -> Pixels:
    """The 784 values from each start on; zeros in bad rows, whose start may point anywhere."""
    good = bad == 0
    starts = starts[good]
    if not len(starts):
        return np.zeros((len(bad), PIXELS), flat.dtype)
    if starts[-1] - starts[0] == (len(starts) - 1) * PIXELS:  # starts never go back, so the rows follow each other
        rows = flat[starts[0] : starts[-1] + PIXELS].reshape(-1, PIXELS)
        if len(rows) == len(bad):
            return rows
    else:
        rows = np.lib.stride_tricks.sliding_window_view(flat, PIXELS)[starts]
    pixels = np.zeros((len(bad), PIXELS), flat.dtype)
    pixels[good] = rows
    return pixels


def peaks_of(pixels: Pixels) -> NDArray[np.float32]:
    """(n,) the largest distance from 0 in each row; NaN where the row has one."""
    peaks = np.empty(len(pixels), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(pixels), _BLOCK):
            block = pixels[start : start + _BLOCK]
            peaks[start : start + _BLOCK] = np.maximum(block.max(axis=1), -block.min(axis=1))
    return peaks


def _mark(bad: Codes, rows: Bools, reason: BadReason) -> None:
    bad[rows & (bad == 0)] = reason.code


def _owners(offsets: NDArray[np.int64], places: NDArray[np.int64]) -> NDArray[np.int64]:
    """The rows whose extents have these places of the child array."""
    places = places[(places >= offsets[0]) & (places < offsets[-1])]
    owners: NDArray[np.int64] = np.searchsorted(offsets, places, side="right") - 1
    return owners


def _has_image_shape(shapes: pa.Array) -> Bools:
    offsets, sizes = _offsets(shapes), _numbers(shapes.values, "int64")
    known = _valid(shapes.values)
    result = np.zeros(len(shapes), np.bool_)
    for shape in SHAPES:
        rows = np.flatnonzero(np.diff(offsets) == len(shape))
        places = offsets[rows][:, None] + np.arange(len(shape))
        result[rows] |= ((sizes[places] == np.array(shape)) & known[places]).all(axis=1)
    return result


def _offsets(array: pa.Array) -> NDArray[np.int64]:
    """(n + 1,) where each row begins in the child values; the child knows nothing of the array's own slice."""
    if pa.types.is_fixed_size_list(array.type):
        places: NDArray[np.int64] = (array.offset + np.arange(len(array) + 1)) * array.type.list_size
        return places
    wide = pa.types.is_large_list(array.type) or pa.types.is_large_binary(array.type)
    buffer, kind = array.buffers()[1], np.dtype(np.int64 if wide else np.int32)
    if buffer is None or not len(array):  # an empty array need not have an offsets buffer
        return np.zeros(1, np.int64)
    return np.frombuffer(buffer, kind, len(array) + 1, array.offset * kind.itemsize).astype(np.int64)


def _numbers(values: pa.Array, dtype: str) -> Pixels:
    buffer, kind = values.buffers()[1], np.dtype(dtype)
    if buffer is None or not len(values):
        return np.zeros(len(values), kind)
    return np.frombuffer(buffer, kind, len(values), values.offset * kind.itemsize)


def _valid(array: pa.Array) -> Bools:
    if not array.null_count:
        return np.ones(len(array), np.bool_)
    valid: Bools = array.is_valid().to_numpy(zero_copy_only=False)
    return valid


def storage_of(array: pa.Array) -> pa.Array:
    """The plain array that one of an extension type, of views or of a dictionary stands for, or the array itself."""
    return plain(array.storage if isinstance(array, pa.ExtensionArray) else array)


def chunks_of(array: pa.Array | pa.ChunkedArray) -> list[pa.Array]:
    """The array's chunks, of which there may be none."""
    chunks: list[pa.Array] = array.chunks if isinstance(array, pa.ChunkedArray) else [array]
    return chunks


def _decode_images(array: pa.Array, bad: Codes) -> Pixels:
    """(n, 784) uint8 grey; adds to `bad` what cannot be read."""
    if pa.types.is_struct(array.type):
        array = array.field("bytes")
        _mark(bad, ~_valid(array), BadReason.NULL)
    offsets = _offsets(array)
    starts, ends = offsets[:-1], np.where(bad == 0, offsets[1:], offsets[:-1])
    pixels, done = decode_plain_pngs(np.frombuffer(array.buffers()[2] or b"", np.uint8), starts, ends)
    for row in np.flatnonzero((bad == 0) & ~done):
        try:
            pixels[row] = decode_image(array[row].as_buffer()).reshape(-1)
        except WrongImageSize:
            bad[row] = BadReason.WRONG_LENGTH.code
        except UndecodableImage:
            bad[row] = BadReason.UNDECODABLE.code
    return pixels


def encode(pixels: Pixels, bad: Bools | Codes | None, column: ImageColumn) -> pa.Array:
    """Make a column of images: the inverse of `decode`.

    Args:
        pixels: (n, 784) or (n, 28, 28), finite; float32 with 0..1, or uint8 with 0..255. uint8 columns get rint(255 x),
            clipped; float columns get floats as they are, or uint8 / 255.
        bad: (n,) mask or codes; rows where it is not 0 become null. None: no row is.
        column: the column to make, from `output_column`, or from `image_column` where its type has neither views nor
            dictionaries.

    Returns:
        n rows of `column.type` (the storage, where it is an extension type of Ray's).

    Raises:
        ValueError: the pixels have another shape, or are too many for the type's offsets (2.7 million for `list`, 2.4
            for `encoded`), or the column's type has views or dictionaries.
    """
    if pixels.size != len(pixels) * PIXELS:
        raise ValueError(f"pixels of shape {pixels.shape}, not (n, {PIXELS})")
    pixels = pixels.reshape(-1, PIXELS)
    good = None if bad is None or not np.any(bad) else np.asarray(bad) == 0
    if good is not None and len(good) != len(pixels):
        raise ValueError(f"{len(good)} marks for {len(pixels)} images")
    numbers = as_numbers(pixels, column.dtype)
    if column.transposed:
        numbers = np.ascontiguousarray(numbers.reshape(-1, SIDE, SIDE).transpose(0, 2, 1)).reshape(-1, PIXELS)
    type_ = column.type
    storage = type_.storage_type if isinstance(type_, pa.BaseExtensionType) else type_
    if plain_type(storage) != storage:
        raise ValueError(f"images cannot be written as {type_}, but as {plain_type(storage)}")
    array = (
        _build_encoded(numbers, good, storage) if column.layout is Layout.ENCODED else _build(numbers, good, storage)
    )
    return pa.ExtensionArray.from_storage(type_, array) if isinstance(type_, pa.FixedShapeTensorType) else array


def _build(numbers: Pixels, good: Bools | None, type_: pa.DataType) -> pa.Array:
    """An array whose rows are `numbers`' rows, null where not good, put together from buffers."""
    count, width = numbers.shape
    validity = None if good is None else pa.py_buffer(np.packbits(good, bitorder="little"))
    fixed = pa.types.is_fixed_size_list(type_)
    if fixed or pa.types.is_fixed_size_binary(type_):
        if good is not None:
            numbers = numbers.copy()
            numbers[~good] = 0
        if fixed:
            return pa.Array.from_buffers(type_, count, [validity], children=[_children(numbers, type_)])
        return pa.Array.from_buffers(type_, count, [validity, pa.py_buffer(numbers)])
    width = SIDE if _is_nested(type_) else width
    if good is not None:
        numbers = numbers[good]
    offsets = np.zeros(count + 1, np.int64)
    np.cumsum(np.ones(count, np.int64) if good is None else good, out=offsets[1:])
    places = _offset_buffer(offsets * width, type_)
    if is_variable_binary(type_):
        return pa.Array.from_buffers(type_, count, [validity, places, pa.py_buffer(numbers)])
    return pa.Array.from_buffers(type_, count, [validity, places], children=[_children(numbers, type_)])


def _children(numbers: Pixels, type_: pa.DataType) -> pa.Array:
    if _is_nested(type_):
        return _build_rows(numbers.reshape(-1, SIDE), type_.value_type)
    return pa.Array.from_buffers(type_.value_type, numbers.size, [None, pa.py_buffer(numbers)])


def _build_rows(rows: Pixels, type_: pa.DataType) -> pa.Array:
    child = pa.Array.from_buffers(type_.value_type, rows.size, [None, pa.py_buffer(rows)])
    if pa.types.is_fixed_size_list(type_):
        return pa.Array.from_buffers(type_, len(rows), [None], children=[child])
    places = _offset_buffer(np.arange(len(rows) + 1, dtype=np.int64) * SIDE, type_)
    return pa.Array.from_buffers(type_, len(rows), [None, places], children=[child])


def _is_nested(type_: pa.DataType) -> bool:
    return not is_variable_binary(type_) and pa.types.is_nested(type_.value_type)


def _offset_buffer(offsets: NDArray[np.int64], type_: pa.DataType) -> pa.Buffer:
    if pa.types.is_large_list(type_) or pa.types.is_large_binary(type_):
        return pa.py_buffer(offsets)
    if offsets[-1] > np.iinfo(np.int32).max:
        raise ValueError(f"too many images for one array of {type_}: encode fewer at a time")
    return pa.py_buffer(offsets.astype(np.int32))


def _build_encoded(numbers: NDArray[np.uint8], good: Bools | None, type_: pa.DataType) -> pa.Array:
    """An array of PNGs, plain or in a struct of which only `bytes` is filled."""
    struct = pa.types.is_struct(type_)
    images = _build(encode_pngs(numbers), good, type_.field("bytes").type if struct else type_)
    if not struct:
        return images
    children = [images if child.name == "bytes" else pa.nulls(len(images), child.type) for child in type_]
    return pa.StructArray.from_arrays(children, fields=list(type_), mask=None if good is None else pa.array(~good))


def as_float(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """uint8 0..255 as float32 0..1."""
    out: NDArray[np.float32] = np.divide(pixels, np.float32(255), dtype=np.float32)
    return out


def as_numbers(pixels: Pixels, dtype: str) -> Pixels:
    """Pixels as a column of this type has them (`encode`), C-contiguous; `pixels` itself where nothing is to do."""
    kind = np.dtype(dtype)
    if pixels.dtype == kind:
        return np.ascontiguousarray(pixels)
    if kind != np.uint8:
        if pixels.dtype == np.uint8:
            pixels = as_float(pixels)
        return np.ascontiguousarray(pixels, kind)
    out = np.empty(pixels.shape, np.uint8)
    work = np.empty((_BLOCK, PIXELS), np.float32)
    for start in range(0, len(pixels), _BLOCK):
        block = pixels[start : start + _BLOCK]
        scaled = np.multiply(block, np.float32(255), out=work[: len(block)])
        np.rint(scaled, out=scaled)
        np.clip(scaled, 0, 255, out=scaled)
        out[start : start + _BLOCK] = scaled
    return out
