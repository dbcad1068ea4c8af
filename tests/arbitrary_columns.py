"""Arrays of any type that Parquet can hold, full of awkward values, and a comparison of columns by their bits."""

from __future__ import annotations

import decimal
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from hypothesis import strategies as st

if TYPE_CHECKING:
    from numpy.typing import NDArray

UNITS = ("s", "ms", "us", "ns")
ZONES = (None, "UTC", "Europe/Rome", "+02:00")
WORDS = ["", "a", "b", "déjà vu", "a\x00b", "🜁", "a longer word than a view holds in place"]
INTEGERS = [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()]
FLOATS = [pa.float16(), pa.float32(), pa.float64()]
DECIMALS = [pa.decimal32(9, 2), pa.decimal64(18, 0), pa.decimal128(38, 2), pa.decimal128(5, 5), pa.decimal256(76, 30)]
TIMES = [pa.date32(), pa.date64(), pa.time32("s"), pa.time32("ms"), pa.time64("us"), pa.time64("ns")]
TIMES += [pa.duration(unit) for unit in UNITS] + [pa.timestamp(unit, zone) for unit in UNITS for zone in ZONES]
TEXTS = [pa.string(), pa.large_string(), pa.string_view()]
BYTES = [pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(5)]
DICTIONARIES = [
    pa.dictionary(pa.int8(), pa.string()),
    pa.dictionary(pa.int32(), pa.large_string(), ordered=True),
    pa.dictionary(pa.int16(), pa.binary()),
    pa.dictionary(pa.uint32(), pa.int64()),  # pyarrow reads plain numbers
]
EXTENSIONS = [pa.uuid(), pa.json_(), pa.bool8(), pa.opaque(pa.int32(), "thing", "somebody")]
LEAVES = [pa.bool_(), pa.null(), *INTEGERS, *FLOATS, *DECIMALS, *TIMES, *TEXTS, *BYTES, *DICTIONARIES, *EXTENSIONS]


def _nested(inner: st.SearchStrategy[pa.DataType]) -> st.SearchStrategy[pa.DataType]:
    def struct(types: list[pa.DataType]) -> pa.DataType:
        return pa.struct([pa.field(f"f.{i}", type_, metadata={"place": str(i)}) for i, type_ in enumerate(types)])

    return st.one_of(
        inner.map(pa.list_),
        inner.map(pa.large_list),
        inner.map(pa.list_view),
        inner.map(lambda type_: pa.list_(pa.field("x", type_, nullable=pa.types.is_null(type_)), 2)),
        st.lists(inner, min_size=1, max_size=3).map(struct),
        inner.map(lambda type_: pa.map_(pa.string(), type_)),
    )


VIEWS = [pa.string_view(), pa.binary_view()]  # within structs pyarrow 26 cannot write them
TYPES = st.one_of(
    st.recursive(st.sampled_from([type_ for type_ in LEAVES if type_ not in VIEWS]), _nested, max_leaves=4),
    st.sampled_from([*VIEWS, *(pa.list_(type_) for type_ in VIEWS)]),
)


def arbitrary(type_: pa.DataType, rows: int, rng: np.random.Generator, nulls: float) -> pa.Array:
    """`rows` values of the type, each null with the probability `nulls`, at every depth."""
    null = rng.random(rows) < nulls
    mask = pa.array(null)
    if isinstance(type_, pa.BaseExtensionType):
        if type_ == pa.json_():
            words = [None if n else f'{{"a": {i}}}' for i, n in enumerate(null)]
            return pa.ExtensionArray.from_storage(type_, pa.array(words, type_.storage_type))
        storage = pa.binary(16) if type_ == pa.uuid() else type_.storage_type
        return pa.ExtensionArray.from_storage(type_, arbitrary(storage, rows, rng, nulls))
    if pa.types.is_null(type_):
        return pa.nulls(rows)
    if pa.types.is_dictionary(type_):
        values = WORDS if not pa.types.is_integer(type_.value_type) else [3, -1, 2**40]
        values = [v.encode() if pa.types.is_binary(type_.value_type) and isinstance(v, str) else v for v in values]
        indices = pa.array(rng.integers(0, len(values) - 1, rows), type_.index_type, mask=null)  # the last is not used
        return pa.DictionaryArray.from_arrays(indices, pa.array(values, type_.value_type), ordered=type_.ordered)
    if pa.types.is_struct(type_):
        children = [arbitrary(field.type, rows, rng, nulls) for field in type_]
        return pa.StructArray.from_arrays(children, fields=list(type_), mask=mask)
    if pa.types.is_fixed_size_list(type_):
        child = arbitrary(type_.value_type, rows * type_.list_size, rng, 0.0)
        return pa.FixedSizeListArray.from_arrays(child, type=type_, mask=mask)
    if pa.types.is_nested(type_):
        sizes = np.where(null, 0, rng.integers(0, 4, rows))
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        if pa.types.is_map(type_):
            keys = pa.array([f"k{i}" for i in range(offsets[-1])], pa.string())
            items = arbitrary(type_.item_type, int(offsets[-1]), rng, nulls)
            return pa.MapArray.from_arrays(pa.array(offsets, pa.int32()), keys, items, type=type_, mask=mask)
        child = arbitrary(type_.value_type, int(offsets[-1]), rng, nulls)
        if pa.types.is_list_view(type_):
            places = pa.array(offsets[:-1], pa.int32())
            return pa.ListViewArray.from_arrays(places, pa.array(sizes, pa.int32()), child, type=type_, mask=mask)
        kind = pa.LargeListArray if pa.types.is_large_list(type_) else pa.ListArray
        places = pa.array(offsets, pa.int64() if kind is pa.LargeListArray else pa.int32())
        return kind.from_arrays(places, child, type=type_, mask=mask)
    return _leaf(type_, rows, rng, null)


def _leaf(type_: pa.DataType, rows: int, rng: np.random.Generator, null: NDArray[np.bool_]) -> pa.Array:
    def plain(values: Any) -> pa.Array:
        return pa.array([None if n else v for v, n in zip(values, null, strict=True)], type_)

    if pa.types.is_boolean(type_):
        return plain((rng.random(rows) < 0.5).tolist())
    if pa.types.is_decimal(type_):
        context = decimal.Context(prec=80)
        return plain(
            [decimal.Decimal(int(v)).scaleb(-type_.scale, context) for v in rng.integers(-(10**4), 10**4, rows)]
        )
    if type_ in TEXTS:
        return plain(rng.choice(WORDS, rows).tolist())
    if type_ == pa.binary(5) or type_ == pa.binary(16):
        return plain([rng.bytes(type_.byte_width) for _ in range(rows)])
    if type_ in BYTES:
        return plain([rng.bytes(int(size)) for size in rng.integers(0, 20, rows)])
    width = type_.bit_width
    bits = rng.integers(0, 2**width - 1, rows, np.uint64, endpoint=True).astype(f"uint{width}")
    if pa.types.is_temporal(type_):  # what is stored in another unit must fit that one too
        most = 86_000 if pa.types.is_time(type_) else 10_000 if pa.types.is_date(type_) else 10**9
        bits = (bits % most * (86_400_000 if pa.types.is_date64(type_) else 1)).astype(bits.dtype)
    signed = bits.astype(f"int{width}") if pa.types.is_temporal(type_) else bits  # floats: NaN of every kind
    array = pa.Array.from_buffers(type_, rows, [None, pa.py_buffer(signed)])
    return pa.array(array.to_pylist(), type_) if not rows else _with_nulls(array, null)


def _with_nulls(array: pa.Array, null: NDArray[np.bool_]) -> pa.Array:
    if not null.any():
        return array
    validity = pa.py_buffer(np.packbits(~null, bitorder="little"))
    return pa.Array.from_buffers(array.type, len(array), [validity, array.buffers()[1]])


def differs(first: pa.Array | pa.ChunkedArray, second: pa.Array | pa.ChunkedArray, path: str = "") -> str:
    """Where and how two columns differ: in type, length, nulls or any bit of a value; '' if they do not."""
    first, second = (a.combine_chunks() if isinstance(a, pa.ChunkedArray) else a for a in (first, second))
    type_ = first.type
    if not type_.equals(second.type, check_metadata=True):
        return f"{path}: {second.type}, not {type_}"
    if len(first) != len(second):
        return f"{path}: {len(second)} values, not {len(first)}"
    if not first.is_null().equals(second.is_null()):
        return f"{path}: other nulls"
    if isinstance(type_, pa.BaseExtensionType):
        return differs(first.storage, second.storage, f"{path}.storage")
    if pa.types.is_dictionary(type_):
        if pa.concat_arrays([first.dictionary, second.dictionary]).unique().equals(first.dictionary) is False:
            return f"{path}: other categories"
        return differs(first.dictionary_decode(), second.dictionary_decode(), f"{path}.values")
    if pa.types.is_struct(type_):
        pairs = zip(type_, first.flatten(), second.flatten(), strict=True)
        return next((text for field, a, b in pairs if (text := differs(a, b, f"{path}.{field.name}"))), "")
    if pa.types.is_nested(type_):
        rows = [[row.values for row in array if row.is_valid] for array in (first, second)]
        if [len(row) for row in rows[0]] != [len(row) for row in rows[1]]:
            return f"{path}: other lengths"
        return differs(pa.concat_arrays(rows[0]), pa.concat_arrays(rows[1]), f"{path}[]") if rows[0] else ""
    if pa.types.is_floating(type_):  # NaN ≠ NaN, and 0.0 = -0.0: compare the bits
        bits = {16: pa.int16(), 32: pa.int32(), 64: pa.int64()}[type_.bit_width]
        first, second = first.view(bits), second.view(bits)
    return "" if first.equals(second) else f"{path}: {second}, not {first}"
