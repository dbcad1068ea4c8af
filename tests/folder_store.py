"""An object store in a folder, as pyarrow sees one: keys, no renames, objects that appear whole. No network.

    monkeypatch.setattr(storage, "locate", locator(FolderStore(tmp_path)))   # for URIs `gs://bucket/…`

What the project asks of a store goes through pyarrow's `FileSystem` alone, so this stands for any of them.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pyarrow import fs

from denoise_batch import storage
from denoise_batch.storage.object_store import patient

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_LOCAL = fs.LocalFileSystem()
_numbers = itertools.count()


class FolderStore(fs.FileSystemHandler):
    """Keeps `bucket/key` as a file below `root`. There is one bucket, `bucket`.

    Args:
        step: told ("before" or "after", what, key) of each change, and ("before", "look" or "read", key); what it
            raises is what the store answers.
    """

    def __init__(self, root: Path, step: Callable[[str, str, str], None] = lambda *_: None) -> None:
        self.root, self.step = root / "objects", step
        self.parts = root / "parts"
        for folder in (self.root / "bucket", self.parts):
            folder.mkdir(parents=True, exist_ok=True)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FolderStore) and self.root == other.root

    __hash__ = None  # type: ignore[assignment]

    def objects(self, below: str = "") -> list[str]:
        start = self.root / below
        return sorted(str(path.relative_to(self.root)) for path in start.rglob("*") if path.is_file())

    def get_type_name(self) -> str:
        return "folder-store"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        return [self._info(path) for path in paths]

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        self.step("before", "look", selector.base_dir)
        assert selector.recursive
        keys = self.objects(selector.base_dir)
        if not keys and not selector.allow_not_found:
            raise FileNotFoundError(selector.base_dir)
        return [self._info(key) for key in keys]

    def open_input_file(self, path: str) -> Any:
        self.step("before", "read", path)
        return _LOCAL.open_input_file(str(self.root / path))

    open_input_stream = open_input_file

    def open_output_stream(self, path: str, _metadata: dict[str, str]) -> pa.NativeFile:
        return pa.PythonFile(_Upload(self, path), mode="w")

    def copy_file(self, src: str, dest: str) -> None:
        with self._change("copy", dest):
            part = self.parts / f"{os.getpid()}-{next(_numbers)}"
            shutil.copyfile(self.root / src, part)
            self.appear(part, dest)

    def delete_file(self, path: str) -> None:
        with self._change("delete", path):
            (self.root / path).unlink()

    def delete_dir(self, path: str) -> None:
        keys = self.objects(path)
        if not keys:
            raise FileNotFoundError(path)
        for key in keys:
            self.delete_file(key)

    def appear(self, part: Path, key: str) -> None:
        (self.root / key).parent.mkdir(parents=True, exist_ok=True)
        part.replace(self.root / key)

    def _change(self, what: str, key: str) -> _Change:
        return _Change(self.step, what, key)

    def _info(self, path: str) -> fs.FileInfo:
        self.step("before", "look", path)
        file = self.root / path
        if file.is_file():
            status = file.stat()
            return fs.FileInfo(path, fs.FileType.File, size=status.st_size, mtime_ns=status.st_mtime_ns)
        # A bucket may be empty, a folder is there by its objects alone.
        folder = file.is_dir() and ("/" not in path or bool(self.objects(path)))
        return fs.FileInfo(path, fs.FileType.Directory if folder else fs.FileType.NotFound)

    def _never(self, *_: object, **__: object) -> Any:
        raise NotImplementedError("no object store does this")

    move = open_append_stream = create_dir = delete_dir_contents = delete_root_dir_contents = _never


class _Change:
    def __init__(self, step: Callable[[str, str, str], None], what: str, key: str) -> None:
        self._step, self._what, self._key = step, what, key

    def __enter__(self) -> None:
        self._step("before", self._what, self._key)

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._step("after", self._what, self._key)


class _Upload:
    """Appears when it is closed, as it is then: a store cannot tell a truncated upload from a whole one."""

    def __init__(self, store: FolderStore, key: str) -> None:
        self._store, self._key = store, key
        self._part = store.parts / f"{os.getpid()}-{next(_numbers)}"
        self._file = self._part.open("wb")
        self.closed = False

    def write(self, data: Any) -> int:
        self._store.step("before", "write", self._key)
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        self._file.flush()

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self._file.close()
        with self._store._change("put", self._key):
            self._store.appear(self._part, self._key)


def locator(store: FolderStore) -> Callable[[str], tuple[Any, str]]:
    """Stands in for `storage.locate`: remote URIs lead to the store, all else where it did."""
    before = storage.locate
    filesystem = patient(fs.PyFileSystem(store))

    def locate(path: str) -> tuple[Any, str]:
        return (filesystem, re.split(r"://|\?", path)[1]) if storage.is_remote(path) else before(path)

    return locate
