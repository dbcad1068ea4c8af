"""MNIST from its IDX files: in a folder, or downloaded once from the public mirrors into the user's cache folder.

    images, labels = load_mnist(find_mnist(), Split.TRAIN)      # uint8 (60000, 28, 28), uint8 (60000,)

What is read is checked against the MD5 of the published files' uncompressed bytes, so a cut, damaged or foreign file is
found out whatever its name and wrapper.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.client
import io
import os
import socket
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import platformdirs

from denoise_batch.errors import MissingFileError, NetworkError, OutputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
"""Folders that hold the four gzipped IDX files, the most reliable first; https alone."""

FOLDER_VARIABLE = "DENOISE_BATCH_MNIST"
"""The environment variable that names a folder of IDX files."""

_OTHER_WAYS = (
    f"give a folder of MNIST's IDX files (--mnist FOLDER or {FOLDER_VARIABLE}), or draw digits: --source synthetic"
)
_RESOLVE_SECONDS = 1.5  # a resolver that is cut off keeps its caller waiting for many seconds
_CONNECT_SECONDS = 4.0
_STALL_SECONDS = 10.0
_CHUNK = 1 << 16


class Split(StrEnum):
    """The two parts of MNIST, by different writers."""

    TRAIN = "train"
    TEST = "test"


@dataclass(frozen=True)
class _IdxFile:
    """A published file: its name without endings, and what is in it once uncompressed."""

    stem: str
    dimensions: int
    shape: tuple[int, ...]
    md5: str
    packed_bytes: int  # as published, gzipped; for the progress of the download

    @property
    def published_name(self) -> str:
        return f"{self.stem}-idx{self.dimensions}-ubyte.gz"

    @property
    def names(self) -> tuple[str, ...]:
        """All names it goes by: some unpackers make a dot of the dash."""
        return tuple(f"{self.stem}{mark}idx{self.dimensions}-ubyte{end}" for end in ("", ".gz") for mark in "-.")

    @property
    def header_bytes(self) -> int:
        return 4 + 4 * self.dimensions

    @property
    def bytes(self) -> int:
        return self.header_bytes + int(np.prod(self.shape))

    def find(self, folder: Path) -> Path | None:
        return next((path for name in self.names if (path := folder / name).is_file()), None)


_FILES = {
    Split.TRAIN: (
        _IdxFile("train-images", 3, (60_000, 28, 28), "6bbc9ace898e44ae57da46a324031adb", 9_912_422),
        _IdxFile("train-labels", 1, (60_000,), "a25bea736e30d166cdddb491f175f624", 28_881),
    ),
    Split.TEST: (
        _IdxFile("t10k-images", 3, (10_000, 28, 28), "2646ac647ad5339dbf082846283269ea", 1_648_877),
        _IdxFile("t10k-labels", 1, (10_000,), "27ae3e4e09519cfbb04c329615203637", 4_542),
    ),
}


def load_mnist(folder: Path, split: Split) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Read one part of MNIST.

    Args:
        folder: holds the IDX files, gzipped or not, as `train-images-idx3-ubyte` or `train-images.idx3-ubyte`.
        split: train (60,000 digits) or test (10,000).

    Returns:
        images uint8 (n, 28, 28), 0 = background, 255 = ink, and labels uint8 (n,), in the published order; writable.

    Raises:
        MissingFileError: a file is missing, cannot be read, is cut or is not the published one; it is named.
    """
    images, labels = (_read(folder, file) for file in _FILES[split])
    return images, labels


def find_mnist(
    folder: Path | None = None,
    *,
    cache: Path | None = None,
    mirrors: Sequence[str] = MIRRORS,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """The folder of MNIST's files: the given one, else DENOISE_BATCH_MNIST's, else the cache, downloaded if need be.

    Args:
        folder: used as it is, if given.
        cache: where downloads are kept; the user's cache folder unless told.
        mirrors: addresses of folders to download from, tried in turn.
        progress: told (bytes done, bytes in all) while downloading.

    Raises:
        MissingFileError: the given folder, or the one the variable names, is none.
        NetworkError: no mirror gave one of the files; says why and names the two ways that need no network.
        OutputError: the cache folder cannot be written.
    """
    if folder is not None:
        return _checked_folder(folder, str(folder))
    if named := os.environ.get(FOLDER_VARIABLE):
        return _checked_folder(Path(named), f"{FOLDER_VARIABLE}={named}")
    cache = cache or Path(platformdirs.user_cache_dir("denoise-batch")) / "mnist"
    missing = [file for files in _FILES.values() for file in files if file.find(cache) is None]
    if missing:
        _download(missing, cache, mirrors, progress)
    return cache


def _checked_folder(folder: Path, shown: str) -> Path:
    if folder.is_dir():
        return folder
    state = "is not a folder" if folder.exists() else "does not exist"
    raise MissingFileError(f"{shown} {state}", hint="name the folder that holds MNIST's four IDX files")


# --- reading ----------------------------------------------------------------------------------------------------------


class _NotMnist(Exception):
    """These bytes are not the published file; the text says why."""


def _read(folder: Path, file: _IdxFile) -> NDArray[np.uint8]:
    path = file.find(folder)
    if path is None:
        raise MissingFileError(f"{folder} has no {file.published_name}, nor the same unzipped", hint=_OTHER_WAYS)
    try:
        with path.open("rb") as source:  # gzipped or not, no good file is larger
            content = _unpack(source.read(file.bytes + _CHUNK), file)
    except OSError as error:
        raise MissingFileError(f"{path} cannot be read: {error.strerror or error}", hint=_OTHER_WAYS) from error
    except _NotMnist as error:
        raise MissingFileError(f"{path} {error}", hint="delete it and get it again, or " + _OTHER_WAYS) from error
    # A copy, because a view of bytes is read-only, and torch warns of those.
    return np.frombuffer(content, np.uint8, offset=file.header_bytes).reshape(file.shape).copy()


def _unpack(packed: bytes, file: _IdxFile) -> bytes:
    """The file's uncompressed bytes, checked. Its first bytes tell gzip: some programs unpack and keep the name."""
    content = packed
    if packed[:2] == b"\x1f\x8b":
        try:
            # One byte more than is right is enough to see that it is too long, however much a hostile file would give.
            content = gzip.GzipFile(fileobj=io.BytesIO(packed)).read(file.bytes + 1)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise _NotMnist("is cut or damaged (its gzip stream does not end well)") from error
    if len(content) != file.bytes:
        size = f"{len(content):,} bytes" if len(content) < file.bytes else "more"
        raise _NotMnist(f"is not MNIST's {file.stem}: it holds {size} where those have {file.bytes:,}")
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if md5 != file.md5:
        raise _NotMnist(f"is not MNIST's {file.stem}, or damaged: MD5 {md5}, not {file.md5}")
    return content


# --- downloading ------------------------------------------------------------------------------------------------------


def _download(
    files: Sequence[_IdxFile], cache: Path, mirrors: Sequence[str], progress: Callable[[int, int], None] | None
) -> None:
    """Put the files into the cache, each at once and only when it is right."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cache_error(cache, error) from error
    probes = {mirror: _Probe(mirror) for mirror in mirrors}
    done, total = 0, sum(file.packed_bytes for file in files)
    order = list(mirrors)
    for file in files:
        reasons = []
        for mirror in tuple(order):
            try:
                probes[mirror].check()
                packed = bytearray()
                for chunk in _fetch(mirror + file.published_name, 2 * file.packed_bytes):
                    packed += chunk
                    if progress is not None:
                        progress(min(done + len(packed), total), total)
                _unpack(bytes(packed), file)
            except (OSError, http.client.HTTPException, _NotMnist) as error:
                reasons.append(f"{urllib.parse.urlsplit(mirror).netloc}: {_reason(error)}")
                order.append(order.pop(0))  # the next file starts with a mirror that has not failed
                continue
            _store(cache, file, packed)
            done += file.packed_bytes
            break
        else:
            raise NetworkError(f"no mirror gave MNIST's {file.published_name} ({'; '.join(reasons)})", hint=_OTHER_WAYS)


def _store(cache: Path, file: _IdxFile, content: bytes | bytearray) -> None:
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{file.published_name}.", dir=cache)
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as sink:
                sink.write(content)
            temporary.replace(cache / file.published_name)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise _cache_error(cache, error) from error


def _cache_error(cache: Path, error: OSError) -> OutputError:
    return OutputError(
        f"the cache folder {cache} cannot be written: {error.strerror or error}",
        hint="set XDG_CACHE_HOME to a folder that can, or " + _OTHER_WAYS,
    )


def _fetch(url: str, limit: int) -> Iterator[bytes]:
    """A file's bytes, no more than `limit` and a chunk: what lies behind a strange network's login page has no size."""
    request = urllib.request.Request(url, headers={"User-Agent": "denoise-batch"})
    # urlopen would keep the proxies that it found at its first call.
    opener = urllib.request.build_opener(_SameScheme)
    with contextlib.closing(opener.open(request, timeout=_STALL_SECONDS)) as response:
        got = 0
        while got <= limit and (chunk := response.read(_CHUNK)):
            got += len(chunk)
            yield chunk


class _SameScheme(urllib.request.HTTPRedirectHandler):
    """Follows no redirection that leaves https."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if req.type == "https" and urllib.parse.urlsplit(newurl).scheme != "https":
            raise urllib.error.URLError("it redirects to an address without https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code}"
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, OSError):
        error = error.reason
    if isinstance(error, OSError):
        return error.strerror or str(error) or type(error).__name__
    return " ".join(str(error).split()) or type(error).__name__


class _Probe:
    """Finds out in the background whether a mirror's machine answers, so that no network is known at once.

    urllib alone would wait for the resolver as long as that likes, and then for each of the host's addresses in turn.
    """

    def __init__(self, mirror: str) -> None:
        url = urllib.parse.urlsplit(mirror)
        self._address = (url.hostname or "", url.port or {"https": 443}.get(url.scheme, 80))
        self._begun = time.monotonic()
        self._resolved, self._answered = threading.Event(), threading.Event()
        self._error: OSError | None = None
        # Behind a proxy it is the proxy that resolves and connects.
        self._proxied = url.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(self._address[0])
        if not self._proxied:
            threading.Thread(target=self._run, daemon=True).start()

    def check(self) -> None:
        """Raises OSError if the machine cannot be found or does not answer in time."""
        if self._proxied:
            return
        for event, seconds, failure in (
            (self._resolved, _RESOLVE_SECONDS, "its name was not resolved"),
            (self._answered, _CONNECT_SECONDS, "it did not answer"),
        ):
            if not event.wait(max(0.0, self._begun + seconds - time.monotonic())):
                raise TimeoutError(f"{failure} within {seconds:g} s")
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            socket.getaddrinfo(*self._address, type=socket.SOCK_STREAM)
            self._resolved.set()
            socket.create_connection(self._address, timeout=_CONNECT_SECONDS).close()
        except OSError as error:
            self._error = error
        finally:
            self._resolved.set()
            self._answered.set()
