"""Arrow's views and dictionaries → the plain lists and binary that `buffers` reads.

    binary_view → binary          string_view → string
    list_view   → list            large_list_view → large_list
    dictionary  → its values' type

pyarrow 26 can cast these, but what it makes of a sliced list_view is not valid, so lists are put together here.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

_VIEWS = {pa.binary_view(): pa.binary(), pa.string_view(): pa.string()}


def plain_type(type_: pa.DataType) -> pa.DataType:
    """The type that `plain` turns an array of this one into; the same where it has neither views nor dictionaries."""
    if pa.types.is_dictionary(type_):
        return plain_type(type_.value_type)
    if type_ in _VIEWS:
        return _VIEWS[type_]
    if pa.types.is_struct(type_):
        return pa.struct([field.with_type(plain_type(field.type)) for field in type_])
    if not (is_list(type_) or _is_view(type_)):
        return type_
    child = type_.value_field.with_type(plain_type(type_.value_type))
    if pa.types.is_fixed_size_list(type_):
        return pa.list_(child, type_.list_size)
    wide = pa.types.is_large_list(type_) or pa.types.is_large_list_view(type_)
    return pa.large_list(child) if wide else pa.list_(child)


def plain(array: pa.Array) -> pa.Array:
    """The array without views and dictionaries; itself, uncopied, where it has none."""
    target = plain_type(array.type)
    if target == array.type:
        return array
    if pa.types.is_dictionary(array.type):
        return plain(array.dictionary_decode())
    if array.type in _VIEWS:
        return array.cast(target)
    if pa.types.is_struct(array.type):
        children = [plain(array.field(index)) for index in range(array.type.num_fields)]
        return pa.StructArray.from_arrays(children, fields=list(target), mask=array.is_null())
    if not _is_view(array.type):
        buffers = array.buffers()[: array.type.num_buffers]
        return pa.Array.from_buffers(target, len(array), buffers, offset=array.offset, children=[plain(array.values)])
    offsets = np.zeros(len(array) + 1, np.int64)
    np.cumsum(array.value_lengths().fill_null(0).to_numpy(), out=offsets[1:])
    wide = pa.types.is_large_list(target)
    kind = pa.LargeListArray if wide else pa.ListArray
    starts = pa.array(offsets, pa.int64() if wide else pa.int32())
    return kind.from_arrays(starts, plain(array.flatten()), type=target, mask=array.is_null())


def is_list(type_: pa.DataType) -> bool:
    """Whether the type is one of the three kinds of list that are no views."""
    return bool(pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_))


def _is_view(type_: pa.DataType) -> bool:
    return bool(pa.types.is_list_view(type_) or pa.types.is_large_list_view(type_))
