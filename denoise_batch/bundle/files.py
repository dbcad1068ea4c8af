"""A model folder's files, read with suspicion: bytes of bounded size, strict JSON, a safetensors header that holds."""

from __future__ import annotations

import json
import math
import stat
from typing import TYPE_CHECKING, Any, TypeVar

from denoise_batch.errors import ModelError, first_line

if TYPE_CHECKING:
    from pathlib import Path

T = TypeVar("T")

MAX_JSON = 16 << 20
MAX_WEIGHTS = 4 << 30
"""Bytes of JSON, be it a file or a header, and of a file of weights."""

RETRAIN = "train it again, copy it again, or name another model with --model"
"""The hint where a model folder is unfit."""

_MAX_DIMENSIONS = 8
"""A header of 16 MB has room for millions of them, whose product takes minutes."""

_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}

_FLOATS = ("F64", "F32", "F16", "BF16")


def read_file(path: Path, limit: int) -> bytes:
    """A regular file's bytes; a link is followed, since caches of models are made of links.

    Raises:
        ModelError: it is missing, no regular file, too large, or cannot be read.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would block, a device never end
            raise ModelError(f"{path} is not a regular file", hint=RETRAIN)
        if status.st_size > limit:
            raise ModelError(f"{path} is too large: {status.st_size} bytes, at most {limit}", hint=RETRAIN)
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except FileNotFoundError as error:
        reason = "is a link to nothing" if path.is_symlink() else "is missing"
        raise ModelError(f"{path} {reason}", hint=RETRAIN) from error
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}", hint="check its permissions and links") from error
    if len(content) > limit:
        raise ModelError(f"{path} is too large", hint=RETRAIN)
    return content


def parse_json(content: bytes, path: Path) -> dict[str, Any]:
    """The object that JSON holds; `path` is named in errors.

    Raises:
        ModelError: it is no JSON as the standard has it, no object, or an object has a key twice.
    """
    try:
        parsed = json.loads(content.decode(), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is damaged: {first_line(error)}", hint=RETRAIN) from error
    if not isinstance(parsed, dict):
        raise ModelError(f"{path} is damaged: it holds no JSON object", hint=RETRAIN)
    return parsed


def member(model: dict[str, Any], name: str, kind: type[T], path: Path) -> T:
    """A member of an object that must be there and of that type; `path` is named in errors.

    Raises:
        ModelError: it is not.
    """
    value = model.get(name)
    if not isinstance(value, kind):
        found = "missing" if name not in model else f"a {type(value).__name__}, not a {kind.__name__}"
        raise ModelError(f"{path} is damaged: {name!r} is {found}", hint=RETRAIN)
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in an object")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def read_tensors(content: bytes, path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors that a safetensors file's header describes, once everything that it says is found to hold.

    The format: 8 bytes, the header's length, little-endian; a JSON object, name → dtype, shape, data_offsets; data.

    Returns:
        Name → (number type as safetensors spells it, shape).

    Raises:
        ModelError: something does not hold; `path` is named.
    """

    def damaged(reason: str) -> ModelError:
        return ModelError(f"{path} is damaged: {reason}", hint=RETRAIN)

    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > len(content) - 8 or length > MAX_JSON:
        raise damaged(f"its header is {length} bytes, the file {len(content)}")
    size = len(content) - 8 - length
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in parse_json(content[8 : 8 + length], path).items():
        if name == "__metadata__":
            continue
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise damaged(f"tensor {name!r} is not described")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
            raise damaged(f"tensor {name!r} has an unknown number type")
        if not _whole_numbers(shape, _MAX_DIMENSIONS) or not _whole_numbers(offsets, 2) or len(offsets) != 2:
            raise damaged(f"tensor {name!r} has an impossible shape or place")
        start, stop = offsets
        if not start <= stop <= size:
            raise damaged(f"tensor {name!r} lies outside the file")
        if stop - start != math.prod(shape) * _ITEM_BYTES[dtype]:
            raise damaged(f"tensor {name!r} takes {stop - start} bytes, which its shape {shape} does not")
        tensors[name] = (dtype, tuple(shape))
        spans.append((start, stop))
    position = 0
    for start, stop in sorted(spans):
        if start != position:
            raise damaged("its tensors overlap or leave gaps")
        position = stop
    if position != size or not tensors:
        raise damaged(f"{size - position} bytes belong to no tensor" if tensors else "it holds no tensors")
    return tensors


def _whole_numbers(values: object, most: int) -> bool:
    if not isinstance(values, list) or len(values) > most:
        return False
    return all(type(value) is int and 0 <= value < 2**40 for value in values)


def described(shape: tuple[int, ...], dtype: str) -> str:
    """A tensor as errors name it, its type as safetensors do. Float types are turned into each other, no others are."""
    return f"{shape}" if dtype in _FLOATS else f"{shape} of {'int8' if dtype == 'I8' else dtype}"
