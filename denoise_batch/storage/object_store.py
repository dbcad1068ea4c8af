"""Patience with stores that answer over a network: what may pass is tried again, with back-off and a ceiling.

`storage.locate` wraps every remote file system in `patient`, so reading, listing, copying and deleting have it
whoever calls. Uploads go through `upload`, which makes the whole object again.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import IO, TYPE_CHECKING, Any, TypeVar

import pyarrow as pa
from pyarrow import fs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

ATTEMPTS = 8
"""Of one call, each with the attempts that the store's own client makes."""

FIRST_WAIT_S = 0.2
LONGEST_WAIT_S = 10.0
CEILING_S = 45.0
"""No new attempt is begun later than this; footers are given up after 60 s."""

THREADS = 16
"""Requests side by side: a store answers one in some 50 ms, but thousands at a time."""

_BLOCK = 8 << 20
_jitter = random.Random()  # its own: a seed for pixels must not make all workers come back at one moment
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_PERMANENT = re.compile(
    r"ACCESS_DENIED|AccessDenied|NO_SUCH_|NoSuch|^Bucket '.*' not found"
    r"|INVALID_|SIGNATURE_DOES_NOT_MATCH|UNRECOGNIZED_CLIENT|EXPIRED_TOKEN|ExpiredToken|MISSING_AUTHENTICATION_TOKEN|NOT_SIGNED_UP|RESOURCE_NOT_FOUND|VALIDATION"
    r"|PERMISSION_DENIED|UNAUTHENTICATED|NOT_FOUND|FAILED_PRECONDITION|UNIMPLEMENTED"  # Google's
    r"|HTTP status 4(?!08|25|29)\d\d"
)


def is_transient(error: OSError) -> bool:
    """Whether the same call may succeed a moment later: timeouts, 5xx, SlowDown, cut connections.

    Stores have many words for what passes, but few for what does not: no access, no bucket, no such object.
    """
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    # An error number is the local system's: a full disk, a missing file.
    return error.errno is None and _PERMANENT.search(str(error)) is None


def patiently(call: Callable[[], _Result]) -> _Result:
    """The call's result, tried again while its faults are transient.

    Raises:
        OSError: the last attempt's.
    """
    started = time.monotonic()
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except OSError as error:
            wait = _jitter.uniform(0.5, 1.0) * min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (attempt - 1))
            late = time.monotonic() - started + wait > CEILING_S
            if attempt == ATTEMPTS or late or not is_transient(error):
                raise
        time.sleep(wait)
    raise AssertionError("unreachable")


def patient(filesystem: fs.FileSystem) -> fs.PyFileSystem:
    """The same file system, whose calls are tried again while their faults are transient."""
    return fs.PyFileSystem(_Patient(filesystem))


def in_parallel(call: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
    """The results in order; requests side by side. The first error is raised once those under way have ended."""
    with ThreadPoolExecutor(THREADS) as pool:
        futures = [pool.submit(call, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def upload(filesystem: fs.FileSystem, source: Path | bytes, target: str) -> None:
    """Puts a whole object and looks at its size; tried again from its beginning while the fault is transient.

    A stream that fails leaves a shorter object behind, or none: pyarrow cannot abort it. So an object counts only once
    this has returned, and under a name that nobody reads before.

    Raises:
        OSError: the last attempt's; `source` may be in the store in part.
    """
    size = len(source) if isinstance(source, bytes) else source.stat().st_size

    def put() -> None:
        stream = filesystem.open_output_stream(target)
        try:
            with _opened(source) as file:
                while block := file.read(_BLOCK):
                    stream.write(block)
        except BaseException:
            # Closed here, before the next attempt: its destructor would, at a time of its own, over the whole object.
            with contextlib.suppress(OSError, pa.ArrowException):
                stream.close()
            raise
        stream.close()
        found = filesystem.get_file_info(target)
        if not found.is_file or found.size != size:
            raise OSError(f"an upload of {size} bytes came to {found.size if found.is_file else 'nothing'}")

    patiently(put)


def _opened(source: Path | bytes) -> IO[bytes]:
    return io.BytesIO(source) if isinstance(source, bytes) else source.open("rb", buffering=0)


def _delete(call: Callable[[], None]) -> None:
    """What is gone at the second attempt was deleted by the first, whose answer was lost."""
    attempts = itertools.count()

    def delete() -> None:
        first = next(attempts) == 0
        try:
            call()
        except FileNotFoundError:
            if first:
                raise

    patiently(delete)


class _Patient(fs.FileSystemHandler):  # type: ignore[misc] # (pyarrow has no types)
    def __init__(self, inner: fs.FileSystem) -> None:
        self.inner = inner

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Patient) and bool(self.inner.equals(other.inner))

    __hash__ = None  # type: ignore[assignment]

    def get_type_name(self) -> str:
        return str(self.inner.type_name)

    def normalize_path(self, path: str) -> str:
        return str(self.inner.normalize_path(path))

    def get_file_info(self, paths: list[str]) -> Any:
        return patiently(lambda: self.inner.get_file_info(paths))

    def get_file_info_selector(self, selector: fs.FileSelector) -> Any:
        return patiently(lambda: self.inner.get_file_info(selector))

    def create_dir(self, path: str, recursive: bool) -> None:
        patiently(lambda: self.inner.create_dir(path, recursive=recursive))

    def delete_dir(self, path: str) -> None:
        _delete(lambda: self.inner.delete_dir(path))

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        patiently(lambda: self.inner.delete_dir_contents(path, missing_dir_ok=missing_dir_ok))

    def delete_root_dir_contents(self) -> None:
        raise NotImplementedError("a whole store is never emptied")

    def delete_file(self, path: str) -> None:
        _delete(lambda: self.inner.delete_file(path))

    def move(self, src: str, dest: str) -> None:
        raise NotImplementedError("a store copies and deletes; a move is never whole")

    def copy_file(self, src: str, dest: str) -> None:
        patiently(lambda: self.inner.copy_file(src, dest))

    def open_input_stream(self, path: str) -> pa.NativeFile:
        return self.open_input_file(path)

    def open_input_file(self, path: str) -> pa.NativeFile:
        return pa.PythonFile(_PatientFile(self.inner, path), mode="r")

    def open_output_stream(self, path: str, metadata: dict[str, str]) -> pa.NativeFile:
        return patiently(lambda: self.inner.open_output_stream(path, metadata=metadata))

    def open_append_stream(self, path: str, metadata: dict[str, str]) -> pa.NativeFile:
        raise NotImplementedError("a store does not append")


class _PatientFile:
    """A remote file whose reads are tried again, each on a connection of its own."""

    def __init__(self, filesystem: fs.FileSystem, path: str) -> None:
        self._file = patiently(lambda: filesystem.open_input_file(path))
        self._size = patiently(self._file.size)
        self._position = 0
        self.closed = False

    def read(self, count: int = -1) -> bytes:
        count = max(0, self._size - self._position if count < 0 else min(count, self._size - self._position))
        at = self._position

        def read_at() -> bytes:
            data = bytes(self._file.read_at(count, at))
            if len(data) != count:
                raise OSError(f"{len(data)} bytes came of the {count} that were asked for")
            return data

        data = patiently(read_at) if count else b""
        self._position += len(data)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True
        self._file.close()
