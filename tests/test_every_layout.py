"""Images of every Arrow type that is taken, through Parquet and back, against a slow reading of each value."""

from __future__ import annotations

import io
import math
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from arbitrary_columns import differs
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from denoise_batch.errors import FlagError
from denoise_batch.images import Layout, Polarity, find_image_column, image_column, output_column
from denoise_batch.inference.denoise_unit import OnBadRow

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import DenoiseFile

NUMBERS = {"uint8": pa.uint8(), "float16": pa.float16(), "float32": pa.float32(), "float64": pa.float64()}
LISTS: list[Callable[[pa.DataType, int], pa.DataType]] = [
    lambda inner, _: pa.list_(inner),
    lambda inner, _: pa.large_list(inner),
    lambda inner, size: pa.list_(inner, size),
    lambda inner, _: pa.list_view(inner),
    lambda inner, _: pa.large_list_view(inner),
]
SHAPES = [((28, 28), None), ((784,), None), ((1, 28, 28), None), ((28, 28, 1), None), ((28, 28), (1, 0))]
SHAPES += [((1, 28, 28), (0, 2, 1)), ((1, 28, 28), (1, 2, 0)), ((28, 28, 1), (2, 1, 0))]
HUGGING_FACE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def _field(type_: pa.DataType, extension: str = "", metadata: str = "") -> pa.Field:
    names = {"ARROW:extension:name": extension, "ARROW:extension:metadata": metadata} if extension else {}
    return pa.field("image", type_, metadata={**names, "who": "me"})


number = st.sampled_from(list(NUMBERS.values()))
wrap = st.sampled_from(LISTS)
shape = st.sampled_from([[28, 28], [784], [1, 28, 28], [28, 28, 1]])
FIELDS: dict[str, st.SearchStrategy[pa.Field]] = {
    "binary": st.sampled_from(
        [pa.binary(784), pa.binary(), pa.large_binary(), pa.binary_view(), pa.dictionary(pa.int32(), pa.binary())]
    ).map(_field),
    "flat list": st.builds(lambda n, outer: _field(outer(n, 784)), number, wrap),
    "nested list": st.builds(lambda n, inner, outer: _field(outer(inner(n, 28), 28)), number, wrap, wrap),
    "tensor": st.builds(
        lambda n, s: _field(pa.fixed_shape_tensor(n, s[0], permutation=s[1])), number, st.sampled_from(SHAPES)
    ),
    "Ray's tensor": st.builds(
        lambda n, s, outer, version: _field(outer(n), f"ray.data.arrow_tensor{version}", str(s)),
        number,
        shape,
        st.sampled_from([pa.list_, pa.large_list]),
        st.sampled_from(["", "_v2"]),
    ),
    "Ray's tensor of any shape": st.builds(
        lambda n: _field(
            pa.struct([("data", pa.large_list(n)), ("shape", pa.list_(pa.int64()))]),
            "ray.data.arrow_variable_shaped_tensor",
            "2",
        ),
        number,
    ),
    "encoded": st.sampled_from(
        [pa.binary(), pa.large_binary(), pa.binary_view(), HUGGING_FACE, pa.dictionary(pa.int32(), pa.binary())]
    ).map(_field),
}
FAULTS = ["null", "null pixel", "null row", "not finite", "far", "short", "long", "undecodable", "wrong size"]


def _storage(type_: pa.DataType) -> pa.DataType:
    return type_.storage_type if isinstance(type_, pa.BaseExtensionType) else type_


def _leaf(type_: pa.DataType) -> pa.DataType:
    type_ = _storage(type_)
    if pa.types.is_struct(type_):
        return type_.field("data").type.value_type if type_.get_field_index("data") >= 0 else pa.uint8()
    while pa.types.is_nested(type_):
        type_ = type_.value_type
    return type_ if type_ in NUMBERS.values() else pa.uint8()


def _value(type_: pa.DataType, kind: str, pixels: Any, fault: str) -> tuple[Any, str]:
    """A row as a Python value, with the fault where the type can have it; and the reason to be found."""
    if fault == "null":
        return None, "null"
    if kind in {"binary", "encoded"}:
        data, reason = pixels.tobytes(), ""
        if kind == "encoded":
            size = (28, 29) if fault == "wrong size" else (28, 28)
            out = io.BytesIO()
            Image.fromarray(np.resize(pixels, size)).save(out, "PNG")
            data, reason = out.getvalue(), "wrong_length" if fault == "wrong size" else ""
            if fault == "undecodable":
                data, reason = data[:50], "undecodable"
        elif fault in {"short", "long"} and type_ != pa.binary(784):
            data, reason = (data[1:] if fault == "short" else data + b"x"), "wrong_length"
        return ({"bytes": data, "path": "a.png"} if pa.types.is_struct(type_) else data), reason
    values, reason, storage = pixels.tolist(), "", _storage(type_)
    nested = pa.types.is_nested(getattr(storage, "value_type", pa.null()))
    if fault == "null pixel":
        values[300], reason = None, "null_pixels"
    if fault in {"not finite", "far"} and _leaf(type_) != pa.uint8():
        values[5], reason = (math.nan, "not_finite") if fault == "not finite" else (-17.0, "out_of_range")
    if nested:
        rows = [values[at : at + 28] for at in range(0, 784, 28)]
        if fault == "null row":
            rows[3], reason = None, "null_pixels"
        if fault == "short" and not pa.types.is_fixed_size_list(storage):
            return rows[1:], "wrong_length"
        return rows, reason
    if fault in {"short", "long"} and not pa.types.is_fixed_size_list(storage):
        values, reason = (values[1:] if fault == "short" else [*values, 0]), "wrong_length"
    return ({"data": values, "shape": [28, 28]} if pa.types.is_struct(storage) else values), reason


def _array(type_: pa.DataType, values: list[Any]) -> pa.Array:
    if pa.types.is_dictionary(type_):
        return pa.array(values, type_.value_type).dictionary_encode()
    array = pa.array(values, _storage(type_))
    return pa.ExtensionArray.from_storage(type_, array) if isinstance(type_, pa.BaseExtensionType) else array


def _pixels(scalar: pa.Scalar) -> Any:
    """(784,) float64 of one good row, through plain Python values."""
    if isinstance(scalar.type, pa.FixedShapeTensorType):
        physical = np.array(scalar.value.as_py(), np.float64).reshape(scalar.type.shape)
        order = scalar.type.permutation or range(physical.ndim)
        return physical.transpose(order).reshape(784)  # to_tensor fails on some permutations
    value = scalar.as_py()
    if isinstance(value, dict):
        value = value.get("bytes", value.get("data"))
    if isinstance(value, bytes):
        raw = len(value) == 784 and not value.startswith(b"\x89PNG")
        value = list(value) if raw else np.asarray(Image.open(io.BytesIO(value)), np.uint8).ravel().tolist()
    if value and isinstance(value[0], list):
        value = [pixel for row in value for pixel in row]
    return np.array([float(pixel) for pixel in value])


def _nearest(field: pa.Field) -> pa.DataType:
    """The type that the new column takes, by docs/output.md."""
    type_ = field.type
    if (field.metadata or {}).get(b"ARROW:extension:name", b"").startswith(b"ray."):
        return pa.fixed_shape_tensor(_leaf(type_), [28, 28])
    if isinstance(type_, pa.FixedShapeTensorType):
        moved = type_.permutation and [a for a in type_.permutation if type_.shape[a] == 28] != sorted(
            a for a in type_.permutation if type_.shape[a] == 28
        )
        return pa.fixed_shape_tensor(type_.value_type, [28, 28]) if moved else type_
    if pa.types.is_fixed_size_list(type_):
        return pa.list_(_plain(type_.value_type))
    return _plain(type_)


def _plain(type_: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(type_) or type_ == pa.binary_view():
        return pa.binary()
    if not pa.types.is_nested(type_) or pa.types.is_struct(type_):
        return type_
    if pa.types.is_fixed_size_list(type_):
        return pa.list_(_plain(type_.value_type), type_.list_size)
    wide = pa.types.is_large_list(type_) or pa.types.is_large_list_view(type_)
    return (pa.large_list if wide else pa.list_)(_plain(type_.value_type))


def _assert_close(found: Any, expected: Any, number: pa.DataType) -> None:
    if number == pa.uint8():
        assert np.abs(found - np.clip(expected, 0, 1) * 255).max() <= 0.5 + 1e-4
    else:
        rounding = 2.0**-10 if number == pa.float16() else 1e-6
        assert np.abs(found - expected).max() <= rounding * max(1.0, np.abs(expected).max())


FORWARDS = {"same": lambda x: x, "inverse": lambda x: 1 - x, "flatter": lambda x: x * 0.5 + 0.25}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FIELDS)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_images_of_any_type(kind: str, data: st.DataObject, denoise_file: DenoiseFile) -> None:
    field = data.draw(FIELDS[kind], "field")
    most = data.draw(st.sampled_from([0, 4, 30]), "rows")
    faults = data.draw(st.lists(st.sampled_from(["", "", "", *FAULTS]), min_size=min(most, 1), max_size=most), "faults")
    if faults and data.draw(st.booleans(), "nulls alone"):
        faults = ["null"] * len(faults)
    elif faults:
        faults[0] = ""  # what the first rows hold decides whether the column is one of images
        # and if most of them lie far outside, the column is refused
        faults = ["" if fault == "far" and "far" in faults[:row] else fault for row, fault in enumerate(faults)]
    rng = np.random.default_rng(data.draw(st.integers(0, 1000), "seed"))
    leaf = _leaf(field.type)
    values, reasons = [], []
    for fault in faults:
        pixels = rng.integers(0, 256, 784, np.uint8)
        if leaf != pa.uint8():
            pixels = (rng.random(784) * 3 - 1).astype(leaf.to_pandas_dtype())
        value, reason = _value(field.type, kind, pixels, fault)
        values.append(value)
        reasons.append(reason)
    table = pa.table([_array(field.type, values), range(len(values))], schema=pa.schema([field, ("id", pa.int64())]))
    name = data.draw(st.sampled_from(list(FORWARDS)), "forward")
    polarity = data.draw(st.sampled_from([Polarity.LIGHT_ON_DARK, Polarity.DARK_ON_LIGHT]), "polarity")
    on_bad_row = data.draw(st.sampled_from([OnBadRow.NULL, OnBadRow.QUARANTINE]), "on_bad_row")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.parquet")
        pq.write_table(
            table,
            path,
            row_group_size=data.draw(st.sampled_from([1, 5, 100]), "group"),
            data_page_size=data.draw(st.sampled_from([4000, 1 << 20]), "page"),
            use_dictionary=data.draw(st.booleans(), "dictionary"),
        )
        source = pq.read_table(path)
        done = denoise_file(
            path,
            Path(folder),
            FORWARDS[name],
            column="image",
            polarity=polarity,
            unit_rows=data.draw(st.sampled_from([None, 3, 10]), "unit"),
            chunk_rows=data.draw(st.sampled_from([None, 2, 7]), "chunk"),
            on_bad_row=on_bad_row,
        )
        out = pa.concat_tables([pq.read_table(file) for file in done.files]) if done.files else None
    assert sum((Counter(r.bad) for r in done.receipts), Counter()) == Counter(reason for reason in reasons if reason)
    assert done.options.output.type == _nearest(source.schema.field("image"))
    if out is None:
        assert not faults
        return
    assert out.schema.remove(2).equals(source.schema, check_metadata=True)
    assert out.schema.field("denoised").type == _nearest(source.schema.field("image"))
    kept = [row for row, reason in enumerate(reasons) if not reason or on_bad_row is OnBadRow.NULL]
    assert out["id"].to_pylist() == kept
    if len(kept) == len(faults):
        assert not differs(source["image"], out["image"])
    for row, noisy, clean in zip(kept, out["image"], out["denoised"], strict=True):
        if reasons[row]:
            assert not clean.is_valid
            continue
        pixels = _pixels(noisy) / (255 if leaf == pa.uint8() else 1)
        dark = polarity is Polarity.DARK_ON_LIGHT
        expected = FORWARDS[name](1 - pixels if dark else pixels)
        _assert_close(_pixels(clean), 1 - expected if dark else expected, leaf)


@pytest.mark.parametrize("layout", [None, *Layout])
@pytest.mark.parametrize("dtype", [None, *NUMBERS])
def test_every_layout_and_number_type_that_may_be_asked_for(
    layout: Layout | None, dtype: str | None, tmp_path: Path, denoise_file: DenoiseFile
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 784), np.uint8)
    sources = {
        "binary": pa.array([image.tobytes() for image in images], pa.binary(784)),
        "uint8": pa.array(images.tolist(), pa.large_list(pa.uint8())),
        "float64": pa.array((images / 255).reshape(4, 28, 28).tolist(), pa.list_(pa.list_(pa.float64(), 28), 28)),
        "tensor": _array(pa.fixed_shape_tensor(pa.float32(), [1, 28, 28]), (images / 255).tolist()),
        "encoded": pa.array([_value(HUGGING_FACE, "encoded", image, "")[0] for image in images], HUGGING_FACE),
    }
    for name, array in sources.items():
        same = Layout.LIST if name in {"uint8", "float64"} else Layout(name)
        wanted = layout or same
        if wanted in {Layout.BINARY, Layout.ENCODED} and dtype not in {None, "uint8"}:
            with pytest.raises(FlagError, match=f"--dtype {dtype}: images in the layout {wanted}"):
                output_column(image_column(pa.field("image", array.type)), "denoised", layout, dtype)
            continue
        array = pa.concat_arrays([array, pa.nulls(1, array.type)])
        pq.write_table(pa.table({"image": array}), tmp_path / "a.parquet")
        work = tmp_path / name
        work.mkdir()
        done = denoise_file(tmp_path / "a.parquet", work, FORWARDS["same"], layout=layout, dtype=dtype)
        out = pq.read_table(done.files[0])
        found = find_image_column(out.schema, "denoised", out)
        number = "uint8" if wanted in {Layout.BINARY, Layout.ENCODED} else dtype
        number = number or {"float64": "float64", "tensor": "float32"}.get(name, "uint8")
        assert (found.layout, found.dtype) == (wanted, number)
        assert out["denoised"].is_null().to_pylist() == [False] * 4 + [True]
        for image, clean in zip(images, out["denoised"], strict=False):
            _assert_close(_pixels(clean), image / 255, NUMBERS[number])
