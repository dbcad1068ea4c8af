"""Layouts in and out, against a slow row-by-row reading; damaged rows, crafted metadata."""

from __future__ import annotations

import io
import json
import math
import pickle
import struct
import warnings
import zlib
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from denoise_batch.digits import draw_digits
from denoise_batch.errors import ColumnError, FlagError
from denoise_batch.evaluation.protocol import CONDITIONS, degrade_images
from denoise_batch.images import (
    BadReason,
    ImageColumn,
    Layout,
    Polarity,
    check_float_range,
    decode,
    encode,
    find_clean_columns,
    find_image_column,
    image_column,
    output_column,
    to_model_input,
)
from denoise_batch.images.buffers import _build

if TYPE_CHECKING:
    from pathlib import Path

    from denoise_batch.images import Decoded

NUMBERS = [pa.uint8(), pa.float16(), pa.float32(), pa.float64()]
HUGGING_FACE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def _list_types(number: pa.DataType) -> list[pa.DataType]:
    flat = [pa.list_(number), pa.large_list(number), pa.list_(number, 784)]
    rows = [pa.list_(number), pa.large_list(number), pa.list_(number, 28)]
    nested = [outer for row in rows for outer in (pa.list_(row), pa.large_list(row), pa.list_(row, 28))]
    return flat + nested


LISTS = [type_ for number in NUMBERS for type_ in _list_types(number)]
TENSORS = [pa.fixed_shape_tensor(n, s) for n in NUMBERS for s in ([28, 28], [784], [1, 28, 28], [28, 28, 1])]
TENSORS.append(pa.fixed_shape_tensor(pa.uint8(), [28, 28], permutation=[1, 0]))
BINARIES = [pa.binary(784), pa.binary(), pa.large_binary()]
ENCODED = [pa.binary(), pa.large_binary(), HUGGING_FACE]
COLUMNS = [image_column(pa.field("image", type_)) for type_ in BINARIES + LISTS + TENSORS]
COLUMNS += [image_column(pa.field("image", type_), Layout.ENCODED) for type_ in ENCODED]


def _name(column: ImageColumn) -> str:
    return f"{column.layout}-{column.type}".replace(" ", "")


def digits(count: int, seed: int = 0) -> np.ndarray:
    """(count, 784) uint8: dark, with something light in the middle."""
    images = np.zeros((count, 28, 28), np.uint8)
    images[:, 8:20, 8:20] = np.random.default_rng(seed).integers(0, 256, (count, 12, 12))
    return images.reshape(count, 784)


def png(size: tuple[int, int] = (28, 28), mode: str = "L", kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    Image.new(mode, size).save(out, kind, **options)
    return out.getvalue()


# Round trips


@pytest.mark.parametrize("column", COLUMNS, ids=_name)
@settings(max_examples=12, deadline=None)
@given(
    bad=st.lists(st.booleans(), max_size=7),
    cuts=st.lists(st.integers(0, 7), max_size=3),
    window=st.tuples(st.integers(0, 7), st.integers(0, 7)),
    as_bytes=st.booleans(),
)
def test_decode_inverts_encode(
    column: ImageColumn, bad: list[bool], cuts: list[int], window: tuple[int, int], as_bytes: bool
) -> None:
    images = digits(len(bad), seed=len(cuts))
    marks = np.array(bad, np.bool_)
    array = encode(images if as_bytes else images.astype(np.float32) / np.float32(255), marks, column)
    array.validate(full=True)
    assert array.type == column.type
    assert array.is_null().to_pylist() == bad
    edges = sorted({0, len(bad), *(cut for cut in cuts if cut <= len(bad))})
    pieces = [array.slice(a, b - a) for a, b in pairwise(edges)]
    first, last = sorted(window)
    chunked = pa.chunked_array(pieces, type=array.type).slice(first, last - first)

    found = decode(chunked, column)

    expected = np.where(marks[:, None], 0, images)[first:last]
    assert found.pixels.flags.c_contiguous
    assert found.pixels.dtype == (np.uint8 if column.dtype == "uint8" else np.float32)
    assert found.bad.tolist() == [BadReason.NULL.code if mark else 0 for mark in bad[first:last]]
    if column.dtype == "uint8":
        assert np.array_equal(found.pixels, expected)
    else:
        exact = (expected.astype(np.float32) / np.float32(255)).astype(column.dtype).astype(np.float32)
        assert np.array_equal(found.pixels, exact)


@pytest.mark.parametrize("column", COLUMNS, ids=_name)
def test_parquet_round_trip(column: ImageColumn, tmp_path: Path) -> None:
    fixed = pa.types.is_fixed_size_list(getattr(column.type, "storage_type", column.type))
    if fixed and int(pa.__version__.partition(".")[0]) < 26:
        pytest.skip("pyarrow before 26 cannot read null fixed_size_lists from Parquet")
    images = digits(5)
    bad = np.array([0, 1, 0, 0, 1], np.uint8)
    field = column.field
    pq.write_table(
        pa.table([encode(images, bad, column), range(5)], schema=pa.schema([field, ("i", pa.int64())])),
        tmp_path / "images.parquet",
        row_group_size=2,
    )
    table = pq.read_table(tmp_path / "images.parquet")
    found = find_image_column(table.schema, sample=table)
    assert (found.layout, found.dtype, found.nested) == (column.layout, column.dtype, column.nested)
    decoded = decode(table["image"], found)
    assert reasons_of(decoded) == {1: BadReason.NULL, 4: BadReason.NULL}
    assert np.array_equal(
        encode(decoded.pixels, decoded.bad, output_column(None, "x", Layout.BINARY)).to_pylist(),
        [None if mark else image.tobytes() for image, mark in zip(images, bad, strict=True)],
    )


def test_binary_and_float32_are_not_copied() -> None:
    images = digits(4)
    for column in (output_column(None, "a"), output_column(None, "b", Layout.LIST, "float32")):
        array = encode(images, None, column)
        assert not decode(array, column).pixels.flags.owndata
        assert not decode(array.slice(1, 2), column).pixels.flags.owndata


def test_uint8_is_rounded_and_clipped() -> None:
    pixels = np.zeros((1, 784), np.float32)
    pixels[0, :5] = [-0.2, 0.4 / 255, 0.6 / 255, 1.2, 0.5]
    array = encode(pixels, None, output_column(None, "a"))
    assert list(array[0].as_py()[:5]) == [0, 0, 1, 255, 128]


def test_wrong_shapes_are_refused() -> None:
    column = output_column(None, "a")
    with pytest.raises(ValueError, match="pixels of shape"):
        encode(np.zeros((2, 783), np.uint8), None, column)
    with pytest.raises(ValueError, match="3 marks for 2 images"):
        encode(np.zeros((2, 784), np.uint8), np.ones(3, np.bool_), column)
    huge = np.broadcast_to(np.zeros((1, 784), np.uint8), (2_739_138, 784))
    with pytest.raises(ValueError, match="fewer at a time"):
        _build(huge, None, pa.list_(pa.uint8()))
    assert len(encode(np.zeros((0, 28, 28), np.float32), None, column)) == 0


# Damaged rows


def _slow(values: list[Any], column: ImageColumn) -> tuple[list[Any], list[int]]:
    """What `decode` must find, one Python number at a time."""
    images, codes = [], []
    for value in values:
        reason: BadReason | None = None
        flat: list[Any] = [0] * 784
        if value is None:
            reason = BadReason.NULL
        elif column.nested and (len(value) != 28 or any(row is not None and len(row) != 28 for row in value)):
            reason = BadReason.WRONG_LENGTH
        elif column.nested and any(row is None for row in value):
            reason = BadReason.NULL_PIXELS
        else:
            flat = [pixel for row in value for pixel in row] if column.nested else list(value)
            if len(flat) != 784:
                reason = BadReason.WRONG_LENGTH
            elif any(pixel is None for pixel in flat):
                reason = BadReason.NULL_PIXELS
            elif not all(math.isfinite(pixel) for pixel in flat):
                reason = BadReason.NOT_FINITE
            elif column.dtype != "uint8" and any(abs(pixel) > 16 for pixel in flat):
                reason = BadReason.OUT_OF_RANGE
        images.append([0] * 784 if reason else flat)
        codes.append(reason.code if reason else 0)
    return images, codes


FAULTS = [
    "none",
    "none",
    "none",
    "null",
    "short",
    "long",
    "empty",
    "null pixel",
    "null row",
    "nan",
    "inf",
    "far",
    "huge",
]


def _damaged(pixels: list[float], fault: str, column: ImageColumn) -> Any:
    """One row's Python value with a fault; the fault is left out where the type cannot have it."""
    fixed = pa.types.is_fixed_size_list(column.type)
    integer = column.dtype == "uint8"
    values: list[Any] = list(pixels)
    if fault == "null":
        return None
    if fault == "null pixel":
        values[300] = None
    if not integer and fault in ("nan", "inf", "far", "huge"):
        big = 1e300 if column.dtype == "float64" else -17.0
        values[5] = {"nan": math.nan, "inf": -math.inf, "far": 16.5, "huge": big}[fault]
    if not column.nested:
        if fault in ("short", "long", "empty") and not fixed:
            return {"short": values[:-1], "long": [*values, 0], "empty": []}[fault]
        return values
    rows: list[Any] = [values[at : at + 28] for at in range(0, 784, 28)]
    if fault == "null row":
        rows[3] = None
    if not fixed and fault in ("short", "empty"):
        return rows[:-1] if fault == "short" else []
    if fault == "long" and not pa.types.is_fixed_size_list(column.type.value_type):
        rows[27] = [*rows[27], 0]
        rows[4] = rows[4][:-1]  # 784 numbers all the same
    return rows


@pytest.mark.parametrize("column", [c for c in COLUMNS if c.layout is Layout.LIST], ids=_name)
@settings(max_examples=15, deadline=None)
@given(faults=st.lists(st.sampled_from(FAULTS), max_size=6), start=st.integers(0, 3), cut=st.integers(0, 6))
def test_damaged_lists_against_a_slow_reading(column: ImageColumn, faults: list[str], start: int, cut: int) -> None:
    images = digits(len(faults), seed=cut)
    if column.dtype != "uint8":
        images = images / 255 * 3 - 1
        images[:, 0] = 16  # the last value that is taken
    rows = [_damaged(image.tolist(), fault, column) for image, fault in zip(images, faults, strict=True)]
    array = pa.array(rows, column.type)
    chunked = pa.chunked_array([array.slice(0, cut), array.slice(cut)]).slice(start)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = decode(chunked, column)

    pixels, codes = _slow(chunked.to_pylist(), column)
    assert found.bad.tolist() == codes
    assert np.array_equal(found.pixels, np.array(pixels, found.pixels.dtype).reshape(-1, 784))
    assert sum(found.counts().values()) == len(reasons_of(found)) == sum(code > 0 for code in codes)
    assert len(found.good_pixels) == codes.count(0)


@pytest.mark.parametrize("type_", [pa.binary(), pa.large_binary()])
@given(lengths=st.lists(st.sampled_from([None, 0, 783, 784, 784, 785]), max_size=6), start=st.integers(0, 6))
@settings(max_examples=40, deadline=None)
def test_damaged_binary(type_: pa.DataType, lengths: list[int | None], start: int) -> None:
    rows = [None if length is None else bytes([row + 1]) * length for row, length in enumerate(lengths)]
    found = decode(pa.array(rows, type_).slice(start), image_column(pa.field("image", type_)))
    codes = {784: 0, None: BadReason.NULL.code}
    assert found.bad.tolist() == [codes.get(length, BadReason.WRONG_LENGTH.code) for length in lengths[start:]]
    for row, pixels in zip(rows[start:], found.pixels, strict=True):
        assert pixels.tobytes() == (row if row and len(row) == 784 else bytes(784))


def test_null_pixels_of_another_row_do_not_count() -> None:
    # The child array still has the values of rows that a slice leaves out and of rows that are null.
    good = list(range(256)) * 3 + [0] * 16
    child = pa.array([None] * 784 + good + [None] * 784, pa.uint8())
    offsets = pa.array([0, 784, 1568, 2352], pa.int32())
    array = pa.ListArray.from_arrays(offsets, child, mask=pa.array([False, False, True]))
    column = image_column(pa.field("image", array.type))
    assert reasons_of(decode(array, column)) == {0: BadReason.NULL_PIXELS, 2: BadReason.NULL}
    assert reasons_of(decode(array.slice(1), column)) == {1: BadReason.NULL}


def test_a_child_array_that_is_a_slice_itself() -> None:
    image = digits(1)[0].tolist()
    flat = pa.ListArray.from_arrays(pa.array([0, 784], pa.int32()), pa.array([7, *image], pa.uint8()).slice(1))
    rows = pa.ListArray.from_arrays(
        pa.array([0, 5, *range(33, 790, 28)], pa.int32()), pa.array([1] * 5 + image, pa.uint8())
    )
    nested = pa.ListArray.from_arrays(pa.array([0, 28], pa.int32()), rows.slice(1))
    for array in (flat, nested):
        decoded = decode(array, image_column(pa.field("image", array.type)))
        assert decoded.pixels.tolist() == [image]


def test_a_null_size_is_no_size() -> None:
    sizes = pa.array(np.array([28, 28]), mask=np.array([False, True]))  # the value under the null is 28 as well
    shape = pa.ListArray.from_arrays(pa.array([0, 2], pa.int32()), sizes)
    data = pa.array([digits(1)[0].tolist()], pa.large_list(pa.uint8()))
    array = pa.StructArray.from_arrays([data, shape], ["data", "shape"])
    column = image_column(_unregistered("ray.data.arrow_variable_shaped_tensor", b"2", array.type))
    assert reasons_of(decode(array, column)) == {0: BadReason.WRONG_LENGTH}


def test_nothing_of_a_bad_row_is_written() -> None:
    # Files must be equal byte for byte whatever the model made of a bad row.
    bad = np.array([False, True])
    for type_ in (pa.binary(784), pa.binary(), pa.list_(pa.uint8()), pa.list_(pa.uint8(), 784), TENSORS[0]):
        column = image_column(pa.field("image", type_))
        arrays = [encode(np.full((2, 784), [[1], [secret]], np.uint8), bad, column) for secret in (0, 99)]
        first, second = [[b and b.to_pybytes() for b in array.buffers()] for array in arrays]
        assert first == second


def test_infinite_pixels_are_bad_rows_and_no_other_convention() -> None:
    column = image_column(pa.field("image", pa.list_(pa.float32())))
    rows = pa.array([[np.inf] * 784, [np.nan] * 784, [0.5] * 784], pa.list_(pa.float32()))
    check_float_range(rows, column)
    assert decode(rows, column).bad.tolist() == [BadReason.NOT_FINITE.code] * 2 + [0]


def reasons_of(decoded: Decoded) -> dict[int, BadReason]:
    """The bad rows, by their number in the array."""
    return {int(row): BadReason.from_code(int(decoded.bad[row])) for row in np.flatnonzero(decoded.bad)}


def test_bad_reasons_have_stable_codes() -> None:
    assert {reason: reason.code for reason in BadReason} == {
        "null": 1,
        "null_pixels": 2,
        "wrong_length": 3,
        "not_finite": 4,
        "undecodable": 5,
        "out_of_range": 6,
    }
    assert [BadReason.from_code(code) for code in range(1, 7)] == list(BadReason)
    with pytest.raises(ValueError, match="no code"):
        BadReason.from_code(0)


# Encoded images


def _bomb() -> bytes:
    """A PNG of 28×28 whose compressed data unpack to far more than that."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 28, 28, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(64 << 20))) + chunk(b"IEND", b"")


def _large(width: int, height: int) -> bytes:
    data = bytearray(png())
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


@pytest.mark.parametrize("type_", ENCODED, ids=str)
def test_damaged_encoded_images(type_: pa.DataType) -> None:
    good = png()
    cases: list[tuple[bytes | None, BadReason | None]] = [
        (good, None),
        (png(kind="JPEG"), None),
        (png(mode="P"), None),
        (png(mode="1"), None),
        (png(mode="RGB", kind="JPEG", quality=90), None),
        (None, BadReason.NULL),
        (png((29, 28)), BadReason.WRONG_LENGTH),
        (_large(5000, 5000), BadReason.WRONG_LENGTH),
        (_large(60000, 60000), BadReason.UNDECODABLE),
        (b"", BadReason.UNDECODABLE),
        (bytes(784), BadReason.UNDECODABLE),
        (good[: len(good) // 2], BadReason.UNDECODABLE),
        (good[:40] + b"\xff" * 9 + good[49:], BadReason.UNDECODABLE),
        (png(kind="GIF"), BadReason.UNDECODABLE),
        (png(kind="TIFF"), BadReason.UNDECODABLE),
    ]
    values: list[Any] = [data for data, _ in cases]
    if pa.types.is_struct(type_):
        values = [{"bytes": data, "path": "a.png"} for data in values]
        values[5] = None
        values.append({"bytes": None, "path": "elsewhere.png"})
        cases.append((None, BadReason.NULL))
    column = image_column(pa.field("image", type_), Layout.ENCODED)
    reasons = {row: reason for row, (_, reason) in enumerate(cases) if reason}
    assert reasons_of(decode(pa.array(values, type_), column)) == reasons
    assert reasons_of(decode(pa.array(values, type_).slice(5), column)) == {row - 5: r for row, r in reasons.items()}


def test_bad_images_find_room_in_a_struct_that_has_none_for_nulls() -> None:
    fields = [pa.field("bytes", pa.binary(), nullable=False), pa.field("path", pa.string(), nullable=False)]
    column = image_column(pa.field("image", pa.struct(fields)))
    written = output_column(column, "denoised")
    assert written.type == HUGGING_FACE
    array = encode(digits(2), np.array([0, 1]), written)
    assert [value and value["path"] for value in array.to_pylist()] == [None, None]
    array.validate(full=True)


def test_a_bomb_unpacks_to_28_by_28() -> None:
    column = image_column(pa.field("image", pa.binary()), Layout.ENCODED)
    decoded = decode(pa.array([_bomb()]), column)
    assert decoded.pixels.shape == (1, 784)


@settings(max_examples=150, deadline=None)
@given(at=st.integers(0, 200), to=st.integers(0, 255), keep=st.integers(0, 400), jpeg=st.booleans())
def test_no_damage_to_an_encoded_image_raises(at: int, to: int, keep: int, jpeg: bool) -> None:
    data = bytearray(png(kind="JPEG" if jpeg else "PNG"))
    data[at % len(data)] = to
    column = image_column(pa.field("image", pa.binary()), Layout.ENCODED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert len(decode(pa.array([bytes(data[:keep])]), column).bad) == 1


def test_colour_depth_and_transparency() -> None:
    def grey(image: Image.Image) -> np.ndarray:
        out = io.BytesIO()
        image.save(out, "PNG")
        column = image_column(pa.field("image", pa.binary()), Layout.ENCODED)
        return decode(pa.array([out.getvalue()]), column).pixels.reshape(28, 28)

    deep = np.linspace(0, 65535, 784).reshape(28, 28).astype(np.uint16)
    assert np.array_equal(grey(Image.fromarray(deep)), np.rint(deep / 257).astype(np.uint8))

    strokes = np.zeros((28, 28, 4), np.uint8)  # black ink on nothing, as an HTML canvas saves it
    strokes[10:18, 10:18, 3] = 255
    shown = grey(Image.fromarray(strokes))
    assert shown[0, 0] == 255
    assert shown[12, 12] == 0


def test_pngs_are_ordinary_pngs() -> None:
    images = digits(3)
    array = encode(images, np.array([0, 0, 1]), output_column(None, "x", Layout.ENCODED))
    for image, data in zip(images[:2], array.to_pylist(), strict=False):
        opened = Image.open(io.BytesIO(data))
        opened.verify()
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))).reshape(-1), image)
    assert array[2].as_py() is None


# Finding the column


def table_of(**columns: Any) -> pa.Table:
    return pa.table({"id": ["a", "b", "c"], "label": [1, 2, 3], **columns})


def test_image_comes_first_then_the_only_one_that_fits() -> None:
    pixels = encode(digits(3), None, output_column(None, "x"))
    for table, name in (
        (table_of(image=pixels, clean=pixels), "image"),
        (table_of(pixels=pixels, score=[0.5, 0.5, 0.5]), "pixels"),
        (table_of(image=["a.png", "b.png", "c.png"], pixels=pixels), "pixels"),
        (table_of(embedding=[[0.1] * 64] * 3, pixels=pixels), "pixels"),
    ):
        assert find_image_column(table.schema, sample=table).name == name
    assert find_image_column(table_of(image=pixels, clean=pixels).schema, "clean").name == "clean"


@pytest.mark.parametrize(
    ("image", "found"),
    [
        ([bytes(784)[:100]] * 3, "holds 100 bytes a row, not 28×28 pixels"),
        ([b"\x89PNG\r\n\x1a\n cut off"] * 3, "holds bytes that are no PNG or JPEG image, not 28×28 pixels"),
        ([[0.1] * 64] * 3, "holds 64 numbers a row, not 28×28 pixels"),
    ],
)
def test_an_image_column_of_bad_images_does_not_give_way_to_another(image: list[Any], found: str) -> None:
    pixels = encode(digits(3), None, output_column(None, "x"))
    table = table_of(image=image, clean=pixels)
    with pytest.raises(ColumnError, match=f"column 'image' {found}; 'clean' would fit") as caught:
        find_image_column(table.schema, sample=table)
    assert caught.value.hint == "name the one to use with --column"
    more = table.append_column("noisy", pixels)
    with pytest.raises(ColumnError, match=f"column 'image' {found}; 'clean' and 'noisy' would fit"):
        find_image_column(more.schema, sample=more)
    assert find_image_column(table.schema, "clean", table).name == "clean"
    table = table_of(clean=image, image=pixels)
    with pytest.raises(ColumnError, match=f"column 'clean' {found}") as caught:
        find_clean_columns(table.schema, None, None, table)
    assert "--column" in caught.value.hint
    assert find_clean_columns(table.schema, "image", None, table)[0].name == "image"


def test_two_candidates_are_both_named() -> None:
    pixels = encode(digits(3), None, output_column(None, "x"))
    with pytest.raises(ColumnError, match="more than one column fits: 'noisy' and 'clean'") as caught:
        find_image_column(table_of(noisy=pixels, clean=pixels).schema)
    assert "--column" in caught.value.hint


def test_a_missing_column_names_those_there_are() -> None:
    with pytest.raises(ColumnError, match="no column 'pixel'") as caught:
        find_image_column(table_of().schema, "pixel")
    assert "'id', 'label'" in caught.value.hint
    with pytest.raises(ColumnError, match=r"no column holds 28×28 images; the columns are: 'id', 'label'"):
        find_image_column(table_of().schema)


@pytest.mark.parametrize(
    ("type_", "found"),
    [
        (pa.binary(1024), "holds 1024 bytes a row"),
        (pa.list_(pa.string()), "holds string, not uint8 or float"),
        (pa.list_(pa.int64()), "holds int64"),
        (pa.list_(pa.uint8(), 100), "holds 100 numbers a row"),
        (pa.list_(pa.list_(pa.uint8(), 32), 32), "holds 32×32 numbers"),
        (pa.list_(pa.list_(pa.list_(pa.uint8()))), "holds list<item: uint8>"),
        (pa.string(), "is of type string"),
        (pa.int32(), "is of type int32"),
        (pa.struct([("bytes", pa.binary())]), "is a struct other than"),
        (pa.fixed_shape_tensor(pa.uint8(), [32, 32]), r"shape \[32, 32\]"),
        (pa.fixed_shape_tensor(pa.uint8(), [28, 28, 3]), r"shape \[28, 28, 3\]"),
        (pa.fixed_shape_tensor(pa.int16(), [28, 28]), "holds int16"),
        (pa.dictionary(pa.int8(), pa.string()), "is of type dictionary"),
    ],
    ids=str,
)
def test_types_that_do_not_fit(type_: pa.DataType, found: str) -> None:
    with pytest.raises(ColumnError, match=f"column 'image' .*{found}") as caught:
        find_image_column(pa.schema([("image", type_)]))
    assert "\n" not in caught.value.message
    assert "fixed_size_binary(784)" in caught.value.hint


@pytest.mark.parametrize(
    ("values", "type_", "found"),
    [
        ([bytes(1024)] * 3, pa.binary(), "1024 bytes a row"),
        ([None, png((32, 32)), png((32, 32))], pa.binary(), "32×32 images"),
        ([None, {"bytes": png((64, 48)), "path": None}], HUGGING_FACE, "64×48 images"),
        ([{"bytes": b"GIF89a", "path": None}], HUGGING_FACE, "no PNG or JPEG"),
        ([[0.5] * 100], pa.list_(pa.float32()), "100 numbers a row"),
        ([[[0] * 32] * 32], pa.list_(pa.list_(pa.uint8())), "32×32 numbers a row"),
    ],
)
def test_a_sample_shows_another_size(values: list[Any], type_: pa.DataType, found: str) -> None:
    table = pa.table({"image": pa.array(values, type_)})
    with pytest.raises(ColumnError, match=f"column 'image' holds .*{found}"):
        find_image_column(table.schema, sample=table)


def test_a_sample_tells_pixels_from_encoded_images() -> None:
    for values, layout in (
        ([None, png(), b"damaged", png(kind="JPEG")], Layout.ENCODED),
        ([None, bytes(784), b"damaged"], Layout.BINARY),
        ([bytes(784), bytes(784), png()], Layout.BINARY),
        ([b"\xff\xd8\xff" + bytes(781)], Layout.BINARY),  # white pixels that begin as a JPEG does
        ([None, None], Layout.BINARY),
        ([], Layout.BINARY),
    ):
        table = pa.table({"image": pa.array(values, pa.binary())})
        assert find_image_column(table.schema, sample=table).layout is layout
    one_good = pa.table({"image": pa.array([bytes(5)] * 9 + [bytes(784)], pa.binary())})
    assert find_image_column(one_good.schema, sample=one_good).layout is Layout.BINARY


def test_a_sample_is_looked_at_all_over() -> None:
    values = pa.chunked_array(
        [pa.array([None] * 3, pa.binary()), pa.array([b""] * 500 + [png()] * 501, pa.binary()), pa.array([png()] * 70)]
    )
    for type_ in (pa.binary(), pa.large_binary()):
        table = pa.table({"image": values.cast(type_)})
        assert find_image_column(table.schema, sample=table).layout is Layout.ENCODED


def test_two_columns_of_one_name() -> None:
    schema = pa.schema([("image", pa.binary(784)), ("image", pa.binary(784))])
    with pytest.raises(ColumnError, match="2 columns are named 'image'"):
        find_image_column(schema)


# Extension types


RAY_V2 = pa.large_list(pa.uint8())


def _unregistered(name: str, metadata: bytes, storage: pa.DataType = RAY_V2) -> pa.Field:
    return pa.field("image", storage, metadata={"ARROW:extension:name": name, "ARROW:extension:metadata": metadata})


@pytest.mark.parametrize("name", ["ray.data.arrow_tensor", "ray.data.arrow_tensor_v2"])
@pytest.mark.parametrize("shape", [[28, 28], [784], [1, 28, 28], [28, 28, 1]])
def test_rays_tensors_without_ray(name: str, shape: list[int]) -> None:
    column = image_column(_unregistered(name, json.dumps(shape).encode()))
    assert (column.layout, column.dtype) == (Layout.TENSOR, "uint8")
    images = digits(3)
    array = pa.array([images[0].tolist(), None, images[2].tolist()], column.type)
    decoded = decode(array, column)
    assert reasons_of(decoded) == {1: BadReason.NULL}
    assert np.array_equal(decoded.pixels[[0, 2]], images[[0, 2]])
    assert output_column(column, "denoised").type == pa.fixed_shape_tensor(pa.uint8(), [28, 28])


class _Registered(pa.ExtensionType):  # as Ray's look in a process that has imported it
    def __init__(self, metadata: bytes, storage: pa.DataType, name: str) -> None:
        self._metadata = metadata
        super().__init__(storage, name)

    def __arrow_ext_serialize__(self) -> bytes:
        return self._metadata

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> _Registered:
        raise AssertionError("nothing is deserialised")


VARIABLE = pa.struct([("data", pa.large_list(pa.uint8())), ("shape", pa.list_(pa.int64()))])


def test_rays_tensors_with_ray() -> None:
    images = digits(3)
    storage = pa.array([image.tolist() for image in images], pa.list_(pa.uint8()))
    type_ = _Registered(b"[28, 28]", storage.type, "ray.data.arrow_tensor")
    column = image_column(pa.field("image", type_))
    array = pa.ExtensionArray.from_storage(type_, storage)
    assert column.layout is Layout.TENSOR
    assert np.array_equal(decode(array.slice(1), column).pixels, images[1:])
    assert find_image_column(pa.schema([("image", type_)]), sample=pa.table({"image": array})) == column


@pytest.mark.parametrize("registered", [False, True])
def test_rays_tensors_of_any_shape(registered: bool) -> None:
    name = "ray.data.arrow_variable_shaped_tensor"
    field = _unregistered(name, b"2", VARIABLE)
    if registered:
        field = pa.field("image", _Registered(b"2", VARIABLE, name))
    column = image_column(field)
    image = digits(1)[0].tolist()
    rows = [
        ({"data": image, "shape": [28, 28]}, None),
        ({"data": image, "shape": [28, 28, 1]}, None),
        ({"data": image, "shape": [14, 56]}, BadReason.WRONG_LENGTH),
        ({"data": image[:-1], "shape": [28, 28]}, BadReason.WRONG_LENGTH),
        (None, BadReason.NULL),
        ({"data": image, "shape": [28, None]}, BadReason.WRONG_LENGTH),
        ({"data": image, "shape": None}, BadReason.WRONG_LENGTH),
        ({"data": None, "shape": [28, 28]}, BadReason.NULL),
        ({"data": image, "shape": [784]}, None),
    ]
    array = pa.array([value for value, _ in rows], VARIABLE)
    if registered:
        array = pa.ExtensionArray.from_storage(field.type, array)
    for start in (0, 3):
        decoded = decode(array.slice(start), column)
        assert reasons_of(decoded) == {
            row - start: reason for row, (_, reason) in enumerate(rows) if reason and row >= start
        }
        assert np.array_equal(decoded.pixels[-1], image)
    assert output_column(column, "denoised").type == pa.fixed_shape_tensor(pa.uint8(), [28, 28])


class _Loud:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("metadata were unpickled",))


@pytest.mark.parametrize(
    "metadata",
    [
        pickle.dumps((28, 28)),
        pickle.dumps(_Loud()),
        pickle.dumps(_Loud(), protocol=0),
        b"",
        b"[28, 28",
        b"\xff\xfe",
        b"28",
        b'{"shape": [28, 28]}',
        b"[28.0, 28.0]",
        b"[true, 28, 28]",
        b"[1000000000000, 28]",
        b"[-28, -28]",
        b"[" + b"9" * 4090 + b"]",
        b"[" * 4000,
        b"[28, 28" + b" " * 100_000 + b"]",
        b"[\"__import__('os')\", 28]",
        b"[]",
    ],
    ids=lambda data: repr(data[:20]),
)
@pytest.mark.parametrize("registered", [False, True])
def test_crafted_metadata_are_refused(metadata: bytes, registered: bool) -> None:
    name = "ray.data.arrow_tensor_v2"
    field = _unregistered(name, metadata)
    if registered:
        field = pa.field("image", _Registered(metadata, pa.large_list(pa.uint8()), name))
    with pytest.raises(ColumnError) as caught:
        image_column(field)
    assert len(caught.value.message) < 200
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    "storage", [pa.int64(), pa.binary(), VARIABLE, pa.list_(pa.uint8(), 100), pa.list_(pa.list_(pa.uint8()))], ids=str
)
def test_tensors_with_another_storage_are_refused(storage: pa.DataType) -> None:
    with pytest.raises(ColumnError, match="is a tensor stored as"):
        image_column(_unregistered("ray.data.arrow_tensor", b"[28, 28]", storage))
    if storage != VARIABLE:
        with pytest.raises(ColumnError, match="is a tensor stored as"):
            image_column(_unregistered("ray.data.arrow_variable_shaped_tensor", b"2", storage))


def test_an_unknown_extension_is_read_by_its_storage() -> None:
    storage = pa.list_(pa.list_(pa.uint8()))
    column = image_column(_unregistered("datasets.features.features.Array2DExtensionType", b"[[28, 28], 1]", storage))
    assert (column.layout, column.nested) == (Layout.LIST, True)
    assert output_column(column, "denoised").field.metadata is None


def test_a_permuted_tensor_is_turned_upright() -> None:
    type_ = pa.fixed_shape_tensor(pa.uint8(), [28, 28], permutation=[1, 0])
    images = digits(2)
    storage = encode(images, None, output_column(None, "x", Layout.TENSOR)).storage
    array = pa.ExtensionArray.from_storage(type_, storage)
    column = image_column(pa.field("image", type_))
    assert np.array_equal(decode(array, column).pixels[1].reshape(28, 28), array[1].to_numpy())
    assert output_column(column, "denoised").type.permutation is None
    harmless = pa.fixed_shape_tensor(pa.uint8(), [1, 28, 28], permutation=[1, 2, 0])
    assert not image_column(pa.field("image", harmless)).transposed


# The column that comes out


@pytest.mark.parametrize("column", [c for c in COLUMNS if not c.transposed], ids=_name)
def test_output_has_the_input_type_and_is_nullable(column: ImageColumn) -> None:
    denoised = output_column(column, "denoised")
    kept = column.type
    if pa.types.is_fixed_size_list(kept):  # nulls of which pyarrow before 26 cannot read from Parquet
        kept = pa.list_(kept.value_field)
    assert (denoised.name, denoised.type, denoised.layout, denoised.dtype) == (
        "denoised",
        kept,
        column.layout,
        column.dtype,
    )
    assert denoised.field.nullable


@pytest.mark.parametrize("source", [None, *COLUMNS[::9]], ids=lambda c: "none" if c is None else _name(c))
@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("dtype", [None, "uint8", "float16", "float64"])
def test_output_in_another_layout(source: ImageColumn | None, layout: Layout, dtype: str | None) -> None:
    if layout in (Layout.BINARY, Layout.ENCODED) and dtype not in (None, "uint8"):
        with pytest.raises(FlagError, match=f"--dtype {dtype}: images in the layout {layout} are uint8"):
            output_column(source, "denoised", layout, dtype)
        return
    column = output_column(source, "denoised", layout, dtype)
    assert column.layout is layout
    if dtype:
        assert column.dtype == dtype
    images = digits(2)
    array = encode(images, np.array([False, True]), column)
    array.validate(full=True)
    back = image_column(column.field, layout)
    assert back == column
    decoded = decode(array, back)
    assert np.abs(to_model_input(decoded.pixels[:1], Polarity.LIGHT_ON_DARK) * 255 - images[:1]).max() < 0.2


def test_unknown_dtypes_are_refused() -> None:
    with pytest.raises(FlagError, match="--dtype 'int8'"):
        output_column(None, "denoised", None, "int8")


def test_a_list_of_another_number_keeps_its_structure() -> None:
    type_ = pa.large_list(pa.field("row", pa.list_(pa.field("pixel", pa.uint8(), nullable=False), 28)))
    column = output_column(image_column(pa.field("image", type_)), "denoised", dtype="float32")
    assert column.type == pa.large_list(pa.field("row", pa.list_(pa.field("pixel", pa.float32(), nullable=False), 28)))
    assert decode(encode(digits(2), None, column), column).pixels.dtype == np.float32


# What the values mean


def test_floats_from_0_to_255_are_refused_as_a_whole() -> None:
    for dtype in ("float16", "float32", "float64"):
        column = output_column(None, "image", Layout.LIST, dtype)
        array = encode(digits(9).astype(np.float32), None, column)
        with pytest.raises(ColumnError, match=f"values up to 255, but {dtype} is taken as 0..1") as caught:
            check_float_range(pa.chunked_array([array.slice(0, 4), array.slice(4)]), column)
        assert "255" in caught.value.hint


@pytest.mark.parametrize("scale", ["standardised", "-1..1", "0..4"])
def test_floats_of_another_scale_are_refused_as_a_whole(scale: str) -> None:
    ink = draw_digits(40, seed=1)[0].reshape(-1, 784).astype(np.float32) / 255
    scaled = {"standardised": (ink - 0.1307) / 0.3081, "-1..1": 2 * ink - 1, "0..4": 4 * ink}[scale]
    scaled += np.random.default_rng(0).normal(0, 0.05, scaled.shape).astype(np.float32)
    column = output_column(None, "image", Layout.LIST, "float32")
    with pytest.raises(
        ColumnError, match=r"most images reach from .* half of their pixels are below .* taken as 0\.\.1"
    ):
        check_float_range(encode(scaled, None, column), column)


@pytest.mark.parametrize("key", [condition.key for condition in CONDITIONS])
@pytest.mark.parametrize("dark", [False, True])
def test_no_noise_is_taken_for_another_scale(key: str, dark: bool) -> None:
    condition = next(condition for condition in CONDITIONS if condition.key == key)
    ink = draw_digits(200, seed=2)[0].reshape(-1, 28, 28).astype(np.float32) / np.float32(255)
    noisy = degrade_images(ink, condition, seed=3).reshape(-1, 784)
    column = output_column(None, "image", Layout.LIST, "float32")
    check_float_range(encode(1 - noisy if dark else noisy, None, column), column)


def test_noise_and_single_far_rows_pass() -> None:
    column = output_column(None, "image", Layout.LIST, "float32")
    noisy = to_model_input(digits(9), Polarity.LIGHT_ON_DARK)
    noisy = noisy + np.random.default_rng(0).uniform(-2, 2, noisy.shape).astype(np.float32)
    noisy[:3] *= 255
    noisy[3, 7] = np.nan
    array = encode(noisy, np.arange(9) == 4, column)
    check_float_range(array, column)
    reasons = reasons_of(decode(array, column))
    far = dict.fromkeys(range(3), BadReason.OUT_OF_RANGE)
    assert reasons == {**far, 3: BadReason.NOT_FINITE, 4: BadReason.NULL}
    noisy[:, 0] = np.nan
    noisy[:8] = 255
    with pytest.raises(ColumnError, match="values up to 255"):
        check_float_range(encode(noisy, None, column), column)
    check_float_range(array.slice(0, 0), column)
    check_float_range(pa.chunked_array([], column.type), column)
