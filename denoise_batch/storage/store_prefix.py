"""All objects below one prefix of an object store: what an output is made of there.

    store = StorePrefix.at("s3://bucket/denoised")
    store.put("_SUCCESS", b"…")

Names are relative to the prefix. A store has neither folders nor renames: objects appear whole, one by one. What the
store answers is raised as `StoreError`, with no secret of the URI in it.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyarrow import fs

from denoise_batch import storage
from denoise_batch.errors import FlagError, StoreError
from denoise_batch.storage import object_store

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

_BLOCK = 8 << 20


@dataclass(frozen=True)
class StorePrefix:
    """A prefix; `str()` of it may be shown.

    Attributes:
        uri: as given; it may hold secrets.
        filesystem: tries again what may pass (`object_store.patient`).
        root: bucket and key of the prefix, without a slash at its end.
    """

    uri: str
    filesystem: Any
    root: str

    @classmethod
    def at(cls, uri: str) -> StorePrefix:
        """Nothing is asked of the store yet.

        Raises:
            FlagError: the URI cannot be opened, or names a whole bucket.
        """
        filesystem, root = storage.locate(uri)
        root = root.rstrip("/")
        if "/" not in root:
            raise FlagError(
                f"{storage.redact(uri)} is a whole bucket", hint="name a prefix in it: s3://bucket/denoised"
            )
        if any(part in {"", ".", ".."} for part in root.split("/")):
            raise FlagError(f"{storage.redact(uri)} has an empty part or dots", hint="name it without them")
        return cls(uri, filesystem, root)

    def __str__(self) -> str:
        return storage.redact(self.uri).rstrip("/")

    def uri_of(self, name: str) -> str:
        """The whole URI of a name, secrets included: for a process that opens it itself."""
        path, question, query = self.uri.partition("?")
        return f"{path.rstrip('/')}/{name}{question}{query}"

    @property
    def bucket(self) -> str:
        return self.root.partition("/")[0]

    def bucket_exists(self) -> bool:
        with self._named():
            return bool(self.filesystem.get_file_info(self.bucket).type != fs.FileType.NotFound)

    def is_object(self) -> bool:
        """Whether an object has the prefix itself as its key, which readers would find in place of what is below."""
        with self._named():
            return bool(self.filesystem.get_file_info(self.root).is_file)

    def read(self, name: str) -> bytes | None:
        """A small object, or None where there is none."""
        try:
            return b"".join(self.blocks(name))
        except FileNotFoundError:
            return None

    def blocks(self, name: str) -> Iterator[bytes]:
        """An object's bytes, a block at a time.

        Raises:
            FileNotFoundError: there is none.
        """
        with self._named(name), self.filesystem.open_input_file(f"{self.root}/{name}") as file:
            while block := file.read(_BLOCK):
                yield block

    def put(self, name: str, source: Path | bytes) -> None:
        """Makes an object, or replaces it whole. It counts once this has returned."""
        with self._named(name):
            object_store.upload(self.filesystem, source, f"{self.root}/{name}")

    def copy(self, name: str, target: str) -> None:
        """Copies within the store: nothing passes through this machine. A copy appears whole."""
        with self._named(name):
            self.filesystem.copy_file(f"{self.root}/{name}", f"{self.root}/{target}")

    def sizes(self, below: str = "") -> dict[str, int]:
        """Bytes of each object below a folder of the prefix, or of all, by its name."""
        start = f"{self.root}/{below}".rstrip("/")
        with self._named(below):
            found = self.filesystem.get_file_info(fs.FileSelector(start, recursive=True, allow_not_found=True))
        return {info.path[len(self.root) + 1 :]: info.size for info in found if info.is_file}

    def delete(self, names: Iterable[str]) -> None:
        """Deletes objects, side by side; those that are gone already are no fault."""
        object_store.in_parallel(self._delete, names)

    def delete_below(self, folder: str) -> None:
        """Deletes all objects below a folder of the prefix, many in one request where the store can."""
        if self.sizes(folder):
            with self._named(folder), contextlib.suppress(FileNotFoundError):
                self.filesystem.delete_dir(f"{self.root}/{folder}")

    def _delete(self, name: str) -> None:
        with self._named(name), contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_file(f"{self.root}/{name}")

    @contextlib.contextmanager
    def _named(self, name: str = "") -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno is not None:
                raise  # this machine's: no such object, a full disk
            text = " ".join(str(error).split()) or type(error).__name__
            raise StoreError(
                f"{self}/{name}: {storage.without_secrets(text, self.uri)}".replace("/: ", ": "),
                hint="check the store, the network and what the credentials allow, then run the same command again",
            ) from None  # the cause's text may repeat the URI, and -v would print it
