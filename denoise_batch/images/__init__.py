"""Arrow column ⇄ array of pixels: which column has the images, which of its rows are bad and why.

    column = find_image_column(schema, name, sample)     # ColumnError says what is wrong
    check_float_range(sample[column.name], column)
    polarity = find_polarity(decode(sample[column.name], column).good_pixels)

    decoded = decode(array, column)                      # (n, 784) pixels, (n,) codes of BadReason
    noisy = to_model_input(decoded.pixels, polarity)     # float32, 0 = background, 1 = ink
    shown = from_model_output(clean, polarity, "uint8")   # or "float32"
    encode(shown, decoded.bad, output_column(column, "denoised"))

How the arrays are read is in `buffers`, what the types say in `layouts`, PNG and JPEG in `encoded`, which end of the
grey scale is ink in `polarity`, how grey paper and ink are in `tone`, `background`, `ink` and `few_levels`, what a
sample says of data to learn from in `clean_columns`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from denoise_batch.errors import ColumnError, FlagError
from denoise_batch.images.buffers import (
    FAR_OUTSIDE,
    BadReason,
    Decoded,
    chunks_of,
    decode,
    encode,
    peaks_of,
    storage_of,
    structure,
)
from denoise_batch.images.clean_columns import PAIRED, look_at_sample, pairs_belong_together, unpaired
from denoise_batch.images.encoded import UndecodableImage, WrongImageSize, decode_image, looks_encoded
from denoise_batch.images.few_levels import levels_lines
from denoise_batch.images.layouts import (
    PIXELS,
    SIDE,
    TAKEN,
    ImageColumn,
    Layout,
    image_column,
    is_variable_binary,
    output_column,
)
from denoise_batch.images.polarity import (
    Polarity,
    dark_on_light,
    find_polarity,
    from_model_output,
    taken_the_other_way,
    to_model_input,
    turned,
    upright,
)
from denoise_batch.images.tone import WHITE_AND_BLACK, Tone, find_tone

__all__ = [
    "FAR_OUTSIDE",
    "PAIRED",
    "PIXELS",
    "SIDE",
    "WHITE_AND_BLACK",
    "BadReason",
    "Decoded",
    "ImageColumn",
    "Layout",
    "Polarity",
    "Tone",
    "check_float_range",
    "dark_on_light",
    "decode",
    "encode",
    "find_clean_columns",
    "find_image_column",
    "find_polarity",
    "find_tone",
    "from_model_output",
    "image_candidates",
    "image_column",
    "joined",
    "levels_lines",
    "look_at_sample",
    "output_column",
    "pairs_belong_together",
    "taken_the_other_way",
    "to_model_input",
    "turned",
    "unpaired",
    "upright",
]

if TYPE_CHECKING:
    from collections.abc import Sequence

_SAMPLE = 64  # values, or one of each chunk, that decide what a variable binary or list column holds


def image_candidates(schema: pa.Schema, name: str | None = None) -> list[str]:
    """The columns that `find_image_column` looks at the values of: those whose type could hold images."""

    def fits(field: pa.Field) -> bool:
        try:
            image_column(field)
        except ColumnError:
            return False
        return True

    return [field.name for field in schema if (name is None or field.name == name) and fits(field)]


def find_image_column(schema: pa.Schema, name: str | None = None, sample: pa.Table | None = None) -> ImageColumn:
    """Find the column that has the images: the one named, else `image`, else the only one that fits.

    An `image` of a type that holds no images gives way to another; one whose first values are all damaged or of another
    size does not, since the other may be what nobody meant: the clean ones, say.

    Args:
        schema: the dataset's schema.
        name: a `--column` flag's value.
        sample: some rows, from all over the data as far as may be. Lists and binary of variable length fit only if one
            of 64 values or so does; without a sample, or where it has nulls alone, the type decides, and variable
            `binary` is taken for raw pixels.

    Raises:
        ColumnError: the column named is missing or does not fit, none fits, two do, or one does beside such an `image`.
    """
    listed = ", ".join(repr(column) for column in schema.names[:12]) + (", ..." if len(schema.names) > 12 else "")
    if name is not None:
        if name not in schema.names:
            raise ColumnError(f"there is no column {name!r}", hint=f"the columns are: {listed or 'none at all'}")
        return _confirmed(schema, name, sample)
    refusal: ColumnError | None = None
    if "image" in schema.names:
        try:
            return _confirmed(schema, "image", sample)
        except ColumnError as error:
            refusal = error
    fits: list[ImageColumn] = []
    unfit: list[ColumnError] = []  # though of a type that holds images
    for other in image_candidates(schema):
        try:
            fits.append(_confirmed(schema, other, sample))
        except ColumnError as error:
            unfit.append(error)
    names = " and ".join(repr(column.name) for column in fits)
    if fits and refusal is not None and image_candidates(schema, "image"):
        raise ColumnError(f"{refusal.message}; {names} would fit", hint="name the one to use with --column")
    if len(fits) > 1:
        raise ColumnError(f"more than one column fits: {names}", hint="name the one to use with --column")
    if fits:
        return fits[0]
    if refusal is not None:
        raise refusal
    if len(unfit) == 1:
        raise unfit[0]
    raise ColumnError(f"no column holds {SIDE}×{SIDE} images; the columns are: {listed or 'none at all'}", hint=TAKEN)


def joined(samples: Sequence[pa.Table]) -> pa.Table | None:
    """Samples from all over the data as one, for the functions here; of those alone that are of the first one's types,
    since tables of others cannot be joined. None where there are none.
    """
    return pa.concat_tables([table for table in samples if table.schema.equals(samples[0].schema)]) if samples else None


def find_clean_columns(
    schema: pa.Schema, clean: str | None, noisy: str | None, sample: pa.Table | None = None
) -> list[ImageColumn]:
    """The column of clean images, and behind it that of noisy ones if one is named.

    Args:
        schema: the dataset's schema.
        clean: a `--column` flag's value. Without, it is `clean` where such a column has images, else what
            `find_image_column` finds, the noisy one left aside. A `clean` whose first values are all damaged or of
            another size is refused: what stands beside it may be noisy.
        noisy: a `--noisy-column` flag's value.
        sample: some first rows.

    Raises:
        ColumnError: as `find_image_column`.
        FlagError: both are the same column.
    """
    beside = [] if noisy is None else [find_image_column(schema, noisy, sample)]
    if noisy is not None and noisy == clean:
        raise FlagError(
            f"--noisy-column {noisy} is the column of clean images as well",
            hint="name that of the clean ones: --column",
        )
    if clean is None and "clean" in schema.names and noisy != "clean":
        try:
            return [find_image_column(schema, "clean", sample), *beside]
        except ColumnError as error:
            if image_candidates(schema, "clean"):
                hint = "name the column of clean images with --column"
                raise ColumnError(error.message, hint=hint) from error
            # A column that only happens to have the name.
    rest = schema if noisy is None or clean else schema.remove(schema.get_field_index(noisy))
    if len(rest) < len(schema) and not image_candidates(rest):
        raise FlagError(
            f"--noisy-column {noisy} leaves no column of clean images",
            hint="a pair has two: noisy and clean images, in one row",
        )
    return [find_image_column(rest, clean, sample), *beside]


_OFF = 0.2
"""How far an image's middle pixel may lie outside of 0..1: its background's, around which noise lies evenly."""


def check_float_range(sample: pa.Array | pa.ChunkedArray, column: ImageColumn, *, own_noise: bool = False) -> None:
    """Refuse a float column whose values as a whole are of another convention than 0..1, as 0..255 or around 0; and
    bytes that are all 0 or 1.

    A few rows beyond FAR_OUTSIDE are bad rows, which `decode` reports; most of them beyond it are another convention.
    So is a background far from 0 and 1, which noise leaves where it is, and ink that goes further beyond 1 than
    twice as far as the noise goes below 0 (and a quarter): both are what subtracting a mean and dividing by a deviation
    makes. The model would take the background for noise, and the digits away with it.

    Args:
        sample: some of the column's rows.
        column: the image column.
        own_noise: the images have noise of the user's own, which may move them anywhere: FAR_OUTSIDE alone counts.

    Raises:
        ColumnError: more than half of the sample's images are so.
    """
    if column.dtype == "uint8":
        if column.layout is not Layout.ENCODED:
            _check_no_mask(sample, column)
        return
    parts = [structure(part, column) for part in chunks_of(sample)]
    pixels = np.concatenate([np.zeros((0, PIXELS), np.float32), *(found[bad == 0] for found, bad in parts)])
    peaks = peaks_of(pixels)
    pixels, peaks = pixels[np.isfinite(peaks)], peaks[np.isfinite(peaks)]  # what is not finite is bad by itself
    if len(peaks) and np.median(peaks) > FAR_OUTSIDE:
        raise ColumnError(
            f"column {column.name!r}: values up to {peaks.max():.6g}, but {column.dtype} is taken as 0..1",
            hint="divide the values by 255, or write them as uint8",
        )
    if own_noise:
        return
    low, high, middle = pixels.min(axis=1), pixels.max(axis=1), np.median(pixels, axis=1)
    off = (np.abs(middle - 0.5) > 0.5 + _OFF) | (high - 1.0 > 2.0 * np.maximum(-low, 0.0) + 0.25)
    if np.count_nonzero(off) > len(off) / 2:
        raise ColumnError(
            f"column {column.name!r}: most images reach from {np.median(low):.3g} to {np.median(high):.3g}, half of "
            f"their pixels are below {np.median(middle):.3g}; {column.dtype} is taken as 0..1",
            hint="undo what scaled them (values × deviation + mean): 0 is black, 1 white, and noise may go beyond",
        )


def _check_no_mask(sample: pa.Array | pa.ChunkedArray, column: ImageColumn) -> None:
    """Refuses bytes that are all 0 or 1: to the last image next to black."""
    good = [found[bad == 0] for found, bad in (structure(part, column) for part in chunks_of(sample))]
    drawn = any((found.min(axis=1) != found.max(axis=1)).any() for found in good)  # not of one grey each
    if drawn and max(int(found.max(initial=0)) for found in good) == 1:
        raise ColumnError(
            f"column {column.name!r}: no value above 1, but uint8 is taken as 0..255",
            hint="multiply the values by 255, or write them as floats",
        )


def _confirmed(schema: pa.Schema, name: str, sample: pa.Table | None) -> ImageColumn:
    """The column's type, and its first values where the type leaves open what they are."""
    places = schema.get_all_field_indices(name)
    if len(places) > 1:
        raise ColumnError(f"{len(places)} columns are named {name!r}", hint="rename all but one of them")
    field = schema.field(places[0])
    column = image_column(field)
    place = -1 if sample is None else sample.schema.get_field_index(name)
    if sample is None or place < 0:
        return column
    values = _spread(sample.column(place))
    if column.layout is Layout.BINARY and is_variable_binary(values.type):
        encoded = sum(looks_encoded(value) for value in values.to_pylist())
        if 2 * encoded > len(values):
            column = image_column(field, Layout.ENCODED)
    bad = decode(values, column).bad
    if len(bad) and np.isin(bad, [BadReason.WRONG_LENGTH.code, BadReason.UNDECODABLE.code]).all():
        raise ColumnError(f"column {name!r} holds {_size_found(values, column)}, not {SIDE}×{SIDE} pixels", hint=TAKEN)
    return column


def _spread(column: pa.ChunkedArray) -> pa.Array:
    """Some values, as they are stored, from all over a sample; no nulls."""
    chunks = [storage_of(chunk).drop_null() for chunk in column.chunks]
    chunks = [chunk for chunk in chunks if len(chunk)]
    each = -(-_SAMPLE // max(1, len(chunks)))
    parts = []
    for chunk in chunks:
        places = {round(index * (len(chunk) - 1) / max(1, each - 1)) for index in range(each)}
        whole = len(places) == len(chunk)
        parts += [chunk] if whole else [chunk.slice(place, 1) for place in sorted(places)]
    if not parts:
        return storage_of(column.slice(0, 0).combine_chunks())
    return pa.concat_arrays(parts) if len(parts) > 1 else parts[0]


def _size_found(values: pa.Array, column: ImageColumn) -> str:
    first = values[0].as_py()
    if column.layout is Layout.ENCODED:
        data = first["bytes"] if isinstance(first, dict) else first
        try:
            decode_image(data)
        except WrongImageSize as error:
            return f"{error} images"
        except UndecodableImage:
            pass
        return "bytes that are no PNG or JPEG image"
    if isinstance(first, dict):
        return f"tensors of shape {str(first['shape'])[:40]}"
    if isinstance(first, list) and first and isinstance(first[0], list):
        return f"{len(first)}×{len(first[0])} numbers a row"
    return f"{len(first)} {'bytes' if isinstance(first, bytes) else 'numbers'} a row"
