"""MNIST from folders and from mirrors, both good and bad: small files in MNIST's format stand in for the real ones."""

from __future__ import annotations

import gzip
import hashlib
import os
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from denoise_batch.digits import mnist
from denoise_batch.digits.mnist import FOLDER_VARIABLE, Split, find_mnist, load_mnist
from denoise_batch.errors import DenoiseBatchError, MissingFileError, NetworkError, OutputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

REAL = os.environ.get(FOLDER_VARIABLE)
NAMES = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


def _idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def _arrays() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for part, count in (("train", 7), ("t10k", 3)):
        arrays[f"{part}-images"] = generator.integers(0, 256, (count, 28, 28), np.uint8)
        arrays[f"{part}-labels"] = generator.integers(0, 10, count, np.uint8)
    return arrays


ARRAYS = _arrays()
PACKED = {f"{stem}-idx{array.ndim}-ubyte.gz": gzip.compress(_idx(array)) for stem, array in ARRAYS.items()}


@pytest.fixture(autouse=True)
def _small_mnist(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published files are small ones, and nothing of the machine's own settings is left."""
    for name in (FOLDER_VARIABLE, "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    small = {
        split: tuple(
            mnist._IdxFile(
                stem,
                ARRAYS[stem].ndim,
                ARRAYS[stem].shape,
                hashlib.md5(_idx(ARRAYS[stem])).hexdigest(),
                len(PACKED[f"{stem}-idx{ARRAYS[stem].ndim}-ubyte.gz"]),
            )
            for stem in (f"{part}-images", f"{part}-labels")
        )
        for split, part in ((Split.TRAIN, "train"), (Split.TEST, "t10k"))
    }
    monkeypatch.setattr(mnist, "_FILES", small)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "idx"
    folder.mkdir()
    for name, packed in PACKED.items():
        (folder / name).write_bytes(packed)
    return folder


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", ["-", "."])
@pytest.mark.parametrize(("end", "zipped"), [(".gz", True), ("", False), (".gz", False), ("", True)])
def test_files_are_read_whatever_their_name_and_wrapper(tmp_path: Path, mark: str, end: str, zipped: bool) -> None:
    for stem, array in ARRAYS.items():
        content = _idx(array)
        name = f"{stem}{mark}idx{array.ndim}-ubyte{end}"
        (tmp_path / name).write_bytes(gzip.compress(content) if zipped else content)
    for split, part in ((Split.TRAIN, "train"), (Split.TEST, "t10k")):
        images, labels = load_mnist(tmp_path, split)
        np.testing.assert_array_equal(images, ARRAYS[f"{part}-images"])
        np.testing.assert_array_equal(labels, ARRAYS[f"{part}-labels"])
        assert images.flags.writeable
        assert labels.flags.writeable


CONTENT = _idx(ARRAYS["train-images"])
SPOILED = {
    "empty": b"",
    "cut": CONTENT[:-1],
    "cut gzip": gzip.compress(CONTENT)[:-9],
    "only gzip's mark": b"\x1f\x8b",
    "damaged gzip": gzip.compress(CONTENT)[:40] + b"\xff" * 40 + gzip.compress(CONTENT)[80:],
    "one bit": CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]),
    "header": b"\0\0\x08\x01" + CONTENT[4:],
    "too long": CONTENT + b"\0",
    "a bomb": gzip.compress(bytes(50_000_000)),
    "a page": b"<html>please log in</html>",
}


@pytest.mark.parametrize("content", SPOILED.values(), ids=SPOILED)
def test_a_spoiled_file_is_named(folder: Path, content: bytes) -> None:
    spoiled = folder / NAMES[0]
    spoiled.write_bytes(content)
    with pytest.raises(MissingFileError) as caught:
        load_mnist(folder, Split.TRAIN)
    assert caught.value.message.startswith(str(spoiled))
    _check_lines(caught.value)
    assert len(load_mnist(folder, Split.TEST)[0]) == 3


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / NAMES[3]).unlink()
    assert len(load_mnist(folder, Split.TRAIN)[0]) == 7
    with pytest.raises(MissingFileError, match=NAMES[3]) as caught:
        load_mnist(folder, Split.TEST)
    _check_lines(caught.value)


@pytest.mark.skipif(not REAL, reason=f"{FOLDER_VARIABLE} is not set")
def test_the_real_files_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for split, count in ((Split.TRAIN, 60_000), (Split.TEST, 10_000)):
        images, labels = load_mnist(Path(str(REAL)), split)
        assert images.shape == (count, 28, 28)
        assert np.bincount(labels, minlength=10).min() > 0.08 * count
        assert images[:, 0].max() < 255  # no ink at the edge: 0 is background


# --- finding ----------------------------------------------------------------------------------------------------------


def test_the_given_folder_goes_before_the_variable_and_that_before_the_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cache = tmp_path / "cache" / "denoise-batch" / "mnist"
    cache.mkdir(parents=True)
    for name, packed in PACKED.items():
        (cache / name).write_bytes(packed)
    assert find_mnist(mirrors=()) == cache
    monkeypatch.setenv(FOLDER_VARIABLE, "")
    assert find_mnist(mirrors=()) == cache
    monkeypatch.setenv(FOLDER_VARIABLE, str(other))
    assert find_mnist(mirrors=()) == other
    assert find_mnist(folder, mirrors=()) == folder


def test_a_folder_that_is_none_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingFileError, match="not a folder"):
        find_mnist(folder / NAMES[0])
    monkeypatch.setenv(FOLDER_VARIABLE, str(folder / "nowhere"))
    with pytest.raises(MissingFileError, match=f"{FOLDER_VARIABLE}=.*nowhere does not exist"):
        find_mnist()


# --- downloading ------------------------------------------------------------------------------------------------------


class _Mirrors:
    """Mirrors on the loopback: each folder of one small server answers in its own way, and requests are counted."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.released = threading.Event()
        mirrors = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                mirrors.requests.append(self.path)
                *_, kind, name = self.path.split("/")
                getattr(mirrors, kind)(self, PACKED[name])

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.root = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    def url(self, kind: str) -> str:
        return f"{self.root}/{kind}/"

    def good(self, handler: BaseHTTPRequestHandler, packed: bytes, length: int | None = None) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(length or len(packed)))
        handler.end_headers()
        handler.wfile.write(packed)

    def missing(self, handler: BaseHTTPRequestHandler, _: bytes) -> None:
        handler.send_error(404)

    def corrupted(self, handler: BaseHTTPRequestHandler, packed: bytes) -> None:
        self.good(handler, gzip.compress(gzip.decompress(packed)[:-1] + b"?"))

    def cut(self, handler: BaseHTTPRequestHandler, packed: bytes) -> None:
        self.good(handler, packed[:-20], length=len(packed))

    def page(self, handler: BaseHTTPRequestHandler, _: bytes) -> None:
        self.good(handler, b"<html>please log in</html>")

    def endless(self, handler: BaseHTTPRequestHandler, _: bytes) -> None:
        handler.send_response(200)
        handler.end_headers()
        try:
            while not self.released.is_set():
                handler.wfile.write(bytes(1 << 16))
        except OSError:
            pass

    def silent(self, _: BaseHTTPRequestHandler, __: bytes) -> None:
        self.released.wait(60)


@pytest.fixture
def mirrors() -> Iterator[_Mirrors]:
    mirrors = _Mirrors()
    yield mirrors
    mirrors.close()


def test_a_download_is_kept_in_the_cache(mirrors: _Mirrors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    seen: list[tuple[int, int]] = []
    cache = find_mnist(mirrors=[mirrors.url("good")], progress=lambda done, total: seen.append((done, total)))
    assert cache == tmp_path / "denoise-batch" / "mnist"
    assert sorted(path.name for path in cache.iterdir()) == sorted(NAMES)
    assert len(load_mnist(cache, Split.TRAIN)[0]) == 7
    total = sum(len(packed) for packed in PACKED.values())
    assert seen == sorted(seen)
    assert seen[-1] == (total, total)

    (cache / NAMES[1]).unlink()
    find_mnist(mirrors=[mirrors.url("good")])
    assert mirrors.requests == [f"/good/{name}" for name in (*NAMES, NAMES[1])]


@pytest.mark.parametrize("bad", ["corrupted", "missing", "cut", "page", "endless", "silent"])
def test_a_bad_mirror_is_passed_over_once_and_for_all(
    bad: str, mirrors: _Mirrors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mnist, "_STALL_SECONDS", 0.3)
    cache = find_mnist(cache=tmp_path, mirrors=[mirrors.url(bad), mirrors.url("good")])
    assert sorted(path.name for path in cache.iterdir()) == sorted(NAMES)
    assert len(load_mnist(cache, Split.TEST)[0]) == 3
    assert [path for path in mirrors.requests if bad in path] == [f"/{bad}/{NAMES[0]}"]


def test_mirrors_that_all_fail_are_named_with_the_reason(mirrors: _Mirrors, tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match=r"HTTP 404.*MD5.*cut or damaged|HTTP 404.*MD5.*bytes") as caught:
        find_mnist(cache=tmp_path, mirrors=[mirrors.url(kind) for kind in ("missing", "corrupted", "cut")])
    _check_lines(caught.value)
    assert list(tmp_path.iterdir()) == []


def _refused() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/"


def _unknown_name(*_: object, **__: object) -> None:
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def _hangs(*_: object, **__: object) -> None:
    time.sleep(5)
    raise OSError("too late")


@pytest.mark.parametrize(
    ("where", "instead", "reason"),
    [
        (None, None, "refused"),
        ("getaddrinfo", _unknown_name, "not known"),
        ("getaddrinfo", _hangs, "not resolved"),
        ("create_connection", _hangs, "did not answer"),
    ],
)
def test_no_network_is_known_at_once(
    where: str | None,
    instead: Callable[..., None] | None,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    addresses = [_refused(), _refused()]
    monkeypatch.setattr(mnist, "_RESOLVE_SECONDS", 0.3)
    monkeypatch.setattr(mnist, "_CONNECT_SECONDS", 0.4)
    if where:
        monkeypatch.setattr(socket, where, instead)
    begun = time.monotonic()
    with pytest.raises(NetworkError, match=reason) as caught:
        find_mnist(cache=tmp_path, mirrors=addresses)
    assert time.monotonic() - begun < 2  # the limits above, and what a busy machine adds
    _check_lines(caught.value)


def test_behind_a_proxy_names_are_left_to_the_proxy(
    mirrors: _Mirrors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", mirrors.root)
    assert find_mnist(cache=tmp_path, mirrors=["http://mirror.invalid/good/"]) == tmp_path
    assert mirrors.requests[0] == f"http://mirror.invalid/good/{NAMES[0]}"


def test_a_cache_that_cannot_be_written_is_named(mirrors: _Mirrors, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file") as caught:
        find_mnist(cache=tmp_path / "file" / "cache", mirrors=[mirrors.url("good")])
    _check_lines(caught.value)


def _check_lines(error: DenoiseBatchError) -> None:
    """One line each, and the hint names both ways that need no network."""
    assert error.exit_code == 2
    assert "\n" not in error.message + error.hint
    assert "folder of MNIST's IDX files" in error.hint
    assert "--source synthetic" in error.hint
