"""What a column's Arrow type says: which layout its images have, and what type a column of another layout takes.

    binary    fixed_size_binary(784), or binary with 784 bytes a row; uint8, row-major
    list      list, large_list or fixed_size_list of uint8 or floats; flat 784 or nested 28×28
    tensor    arrow.fixed_shape_tensor, and Ray's tensor types
    encoded   PNG or JPEG bytes, plain or in Hugging Face's struct<bytes, path>

Views (binary_view, list_view) and dictionaries of binary count as what they stand for.

Types and metadata only: the values are in `images`. Extension metadata come from the file, so they are read as JSON
under a size limit, and nothing is ever unpickled.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum

import pyarrow as pa

from denoise_batch.errors import ColumnError, FlagError
from denoise_batch.images.plain import is_list, plain_type

SIDE = 28
PIXELS = SIDE * SIDE

NUMBERS: dict[str, pa.DataType] = {
    "uint8": pa.uint8(),
    "float16": pa.float16(),
    "float32": pa.float32(),
    "float64": pa.float64(),
}
"""The number types a pixel can have, by the name that `--dtype` takes."""

TAKEN = (
    "taken are fixed_size_binary(784), binary with 784 bytes a row, lists and tensors of uint8 or float with 784 or "
    "28×28 numbers a row, and 28×28 PNG or JPEG bytes"
)

SHAPES = ((SIDE, SIDE), (PIXELS,), (1, SIDE, SIDE), (SIDE, SIDE, 1))
"""The shapes of a tensor that is one grey image."""

_ARROW_TENSOR = "arrow.fixed_shape_tensor"
_RAY_FIXED = ("ray.data.arrow_tensor", "ray.data.arrow_tensor_v2")
_RAY_VARIABLE = "ray.data.arrow_variable_shaped_tensor"
_MAX_METADATA = 4096  # bytes; the metadata of a 28×28 tensor take 8


class Layout(StrEnum):
    """How a column holds its images."""

    BINARY = "binary"
    LIST = "list"
    TENSOR = "tensor"
    ENCODED = "encoded"


@dataclass(frozen=True)
class ImageColumn:
    """A column of 28×28 grey images: all that `decode` and `encode` must know about it.

    Attributes:
        name: the column's name.
        layout: how it holds its images.
        dtype: its number type, one of NUMBERS; uint8 for `binary` and `encoded`.
        type: its Arrow type as the schema has it; Ray's tensor types show their storage unless Ray is imported.
        nested: whether it is a list of 28 lists of 28.
        transposed: whether a permutation of its tensor type exchanges rows and columns.
    """

    name: str
    layout: Layout
    dtype: str
    type: pa.DataType
    nested: bool = False
    transposed: bool = False

    @property
    def field(self) -> pa.Field:
        """The field that a schema takes: nullable, because a bad row's image is null."""
        return pa.field(self.name, self.type, nullable=True)


def image_column(field: pa.Field, layout: Layout | None = None) -> ImageColumn:
    """Read a field's type as an image column.

    Args:
        field: the column's field, with its metadata (which carry an extension type that nobody registered).
        layout: `encoded` where a variable `binary` column is known to hold PNG or JPEG; else raw pixels are assumed.

    Raises:
        ColumnError: the type cannot hold 28×28 grey images; says what was found and what is taken.
    """
    extension, metadata, stored = _extension(field)
    storage = plain_type(stored)
    if extension in (_ARROW_TENSOR, *_RAY_FIXED):
        return _fixed_tensor(field, extension, metadata, storage)
    if extension == _RAY_VARIABLE:
        return _variable_tensor(field, storage)
    if pa.types.is_fixed_size_binary(storage):
        if storage.byte_width != PIXELS:
            raise _refused(field, f"holds {storage.byte_width} bytes a row, not {PIXELS}")
        return ImageColumn(field.name, Layout.BINARY, "uint8", field.type)
    if is_variable_binary(storage):
        known = layout if layout is Layout.ENCODED else Layout.BINARY
        return ImageColumn(field.name, known, "uint8", field.type)
    if pa.types.is_struct(storage):
        names = {child.name: child.type for child in storage}
        if set(names) == {"bytes", "path"} and is_variable_binary(names["bytes"]):
            return ImageColumn(field.name, Layout.ENCODED, "uint8", field.type)
        raise _refused(field, "is a struct other than Hugging Face's struct<bytes, path>")
    if is_list(storage):
        return _list(field, storage)
    raise _refused(field, f"is of type {_short(stored)}")


def output_column(
    column: ImageColumn | None, name: str, layout: Layout | None = None, dtype: str | None = None
) -> ImageColumn:
    """The column that holds what was made of another column's images.

    Without `layout` and `dtype` it has the input's own type. Four kinds are not carried on, two of them because bad
    rows become null. A fixed_size_list comes back as list: from Parquet, pyarrow before 26 cannot read a null one
    (apache/arrow issue 35692; fixed_shape_tensor shares this, and has no substitute). Ray's tensor types come back as
    Arrow's fixed_shape_tensor, which Ray reads as well: its own it reads by their data buffer alone, where a null row
    shifts every image after it. A permuted tensor comes back in row-major order. Views and dictionaries come back as
    what they stand for.

    Args:
        column: the input's image column; None for a new column (`binary` unless told).
        name: the new column's name.
        layout: a `--layout` flag's value.
        dtype: a `--dtype` flag's value, one of NUMBERS.

    Raises:
        FlagError: dtype is no number type of pixels, or not one that the layout can hold.
    """
    if dtype is not None and dtype not in NUMBERS:
        raise FlagError(f"--dtype {dtype!r} is no number type of pixels", hint=f"give one of {', '.join(NUMBERS)}")
    chosen = layout or (column.layout if column else Layout.BINARY)
    if chosen in (Layout.BINARY, Layout.ENCODED):
        if dtype not in (None, "uint8"):
            raise FlagError(
                f"--dtype {dtype}: images in the layout {chosen} are uint8",
                hint="leave --dtype out, or add --layout list or --layout tensor",
            )
        same = column is not None and column.layout is chosen
        type_ = _storage(column.type) if column and same else pa.binary(PIXELS if chosen is Layout.BINARY else -1)
        if pa.types.is_struct(type_):  # a bad row's bytes are null, and so is every path
            type_ = pa.struct([field.with_nullable(True) for field in type_])
        return ImageColumn(name, chosen, "uint8", type_)
    number = dtype or (column.dtype if column else "uint8")
    if chosen is Layout.TENSOR:
        shape = [SIDE, SIDE]
        if column and isinstance(column.type, pa.FixedShapeTensorType) and not column.transposed:
            if column.dtype == number:
                return ImageColumn(name, chosen, number, column.type)
            shape = list(column.type.shape)
        return ImageColumn(name, chosen, number, pa.fixed_shape_tensor(NUMBERS[number], shape))
    if column and column.layout is Layout.LIST:
        type_ = _with_leaf(_storage(column.type), NUMBERS[number])
        if pa.types.is_fixed_size_list(type_):
            type_ = pa.list_(type_.value_field)
        return ImageColumn(name, chosen, number, type_, column.nested)
    return ImageColumn(name, chosen, number, pa.list_(NUMBERS[number]))


def is_variable_binary(type_: pa.DataType) -> bool:
    """Whether the type is binary of any length a row."""
    return bool(pa.types.is_binary(type_) or pa.types.is_large_binary(type_))


def _list(field: pa.Field, storage: pa.DataType) -> ImageColumn:
    nested = is_list(storage.value_type)
    leaf = storage.value_type.value_type if nested else storage.value_type
    dtype = _number(field, leaf)
    wanted = [(storage, SIDE), (storage.value_type, SIDE)] if nested else [(storage, PIXELS)]
    if any(pa.types.is_fixed_size_list(kind) and kind.list_size != size for kind, size in wanted):
        sizes = "×".join(str(kind.list_size) if pa.types.is_fixed_size_list(kind) else "?" for kind, _ in wanted)
        raise _refused(field, f"holds {sizes} numbers a row, not {PIXELS} or {SIDE}×{SIDE}")
    return ImageColumn(field.name, Layout.LIST, dtype, field.type, nested)


def _fixed_tensor(field: pa.Field, extension: str, metadata: bytes, storage: pa.DataType) -> ImageColumn:
    transposed = False
    if isinstance(field.type, pa.FixedShapeTensorType):
        shape, order = tuple(field.type.shape), field.type.permutation
        # A permutation lists the stored axes in their logical order; only that of the two axes of 28 moves pixels.
        axes = [axis for axis in order or () if shape[axis] == SIDE]
        transposed = axes != sorted(axes)
    elif extension == _ARROW_TENSOR:
        # pyarrow registers this type itself, and checks it; unregistered it comes from a program that we do not know.
        raise _refused(field, "is an arrow.fixed_shape_tensor that this pyarrow does not read")
    else:
        shape = _ray_shape(field, metadata)
    if shape not in SHAPES:
        raise _refused(field, f"holds tensors of shape {_short(list(shape))}, not {SIDE}×{SIDE}")
    flat = is_list(storage) and not is_list(storage.value_type)
    if not flat or (pa.types.is_fixed_size_list(storage) and storage.list_size != PIXELS):
        raise _refused(field, f"is a tensor stored as {_short(storage)}")
    return ImageColumn(field.name, Layout.TENSOR, _number(field, storage.value_type), field.type, transposed=transposed)


def _variable_tensor(field: pa.Field, storage: pa.DataType) -> ImageColumn:
    names = {child.name: child.type for child in storage} if pa.types.is_struct(storage) else {}
    if set(names) != {"data", "shape"} or not all(is_list(kind) for kind in names.values()):
        raise _refused(field, f"is a tensor stored as {_short(storage)}")
    if not pa.types.is_int64(names["shape"].value_type):
        raise _refused(field, f"is a tensor whose shapes are {_short(names['shape'])}")
    return ImageColumn(field.name, Layout.TENSOR, _number(field, names["data"].value_type), field.type)


def _ray_shape(field: pa.Field, metadata: bytes) -> tuple[int, ...]:
    if metadata[:1] == b"\x80":  # Ray 2.49 to 2.54 pickled it; a pickle can run any code, so it is not opened
        raise ColumnError(
            f"column {field.name!r} has pickled tensor metadata, which are not read",
            hint="write the file again with Ray 2.55 or later, or give the images as fixed_size_binary(784)",
        )
    try:
        shape = json.loads(metadata) if len(metadata) <= _MAX_METADATA else None
    except (ValueError, RecursionError):
        shape = None
    if not isinstance(shape, list) or not all(type(size) is int for size in shape):
        raise _refused(field, f"has tensor metadata that are no JSON list of sizes: {_short(metadata[:64])}")
    return tuple(shape)


def _extension(field: pa.Field) -> tuple[str, bytes, pa.DataType]:
    """The extension's name ('' for none), metadata and storage type, whether or not this process has registered it."""
    if isinstance(field.type, pa.FixedShapeTensorType):
        return _ARROW_TENSOR, b"", field.type.storage_type
    if isinstance(field.type, pa.ExtensionType):
        return field.type.extension_name, field.type.__arrow_ext_serialize__(), field.type.storage_type
    if isinstance(field.type, pa.BaseExtensionType):
        return field.type.extension_name, b"", field.type.storage_type
    metadata = field.metadata or {}
    name = metadata.get(b"ARROW:extension:name", b"").decode(errors="replace")
    return name, metadata.get(b"ARROW:extension:metadata", b""), field.type


def _storage(type_: pa.DataType) -> pa.DataType:
    return plain_type(type_.storage_type if isinstance(type_, pa.BaseExtensionType) else type_)


def _number(field: pa.Field, leaf: pa.DataType) -> str:
    for name, number in NUMBERS.items():
        if leaf == number:
            return name
    raise _refused(field, f"holds {_short(leaf)}, not uint8 or float")


def _with_leaf(type_: pa.DataType, number: pa.DataType) -> pa.DataType:
    if not is_list(type_):
        return number
    child = type_.value_field.with_type(_with_leaf(type_.value_type, number))
    if pa.types.is_fixed_size_list(type_):
        return pa.list_(child, type_.list_size)
    return pa.large_list(child) if pa.types.is_large_list(type_) else pa.list_(child)


def _refused(field: pa.Field, found: str) -> ColumnError:
    return ColumnError(f"column {field.name!r} {found}", hint=TAKEN)


def _short(thing: object) -> str:
    text = " ".join(str(thing).split())  # a type's text can have many lines, and comes from the file
    return text if len(text) <= 80 else text[:77] + "..."
