"""What is tried again, how often, and that nothing half done counts."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pyarrow as pa
import pytest
from folder_store import FolderStore
from pyarrow import fs

from denoise_batch.storage import object_store
from denoise_batch.storage.object_store import ATTEMPTS, LONGEST_WAIT_S, is_transient, patient, patiently, upload

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SLOW_DOWN = "When putting key 'k' in bucket 'b': AWS Error SLOW_DOWN during PutObject operation: Slow down."


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr(object_store.time, "sleep", found.append)
    return found


def failing(times: int, error: OSError) -> Callable[[], int]:
    """A call that raises so many times, then gives the number of its calls."""
    calls = []

    def call() -> int:
        calls.append(1)
        if len(calls) <= times:
            raise error
        return len(calls)

    return call


@pytest.mark.parametrize(
    "text",
    [
        SLOW_DOWN,
        "AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 28, Timeout was reached",
        "AWS Error INTERNAL_FAILURE during PutObject operation: We encountered an internal error.",
        "AWS Error UNKNOWN (HTTP status 503) during ListObjectsV2 operation: No response body.",
        "AWS Error UNKNOWN (HTTP status 429) during ListObjectsV2 operation: No response body.",
        "google::cloud::Status(UNAVAILABLE: Retry policy exhausted)",
    ],
)
def test_what_may_pass_is_tried_again(text: str) -> None:
    assert is_transient(OSError(text))


@pytest.mark.parametrize(
    "error",
    [
        OSError("AWS Error ACCESS_DENIED during HeadObject operation: No response body."),
        OSError("AWS Error NO_SUCH_BUCKET during ListObjectsV2 operation: The specified bucket does not exist"),
        OSError("AWS Error UNKNOWN (HTTP status 403) during HeadObject operation: No response body."),
        OSError("AWS Error INVALID_ACCESS_KEY_ID during PutObject operation"),
        OSError("google::cloud::Status(PERMISSION_DENIED: Permanent error)"),
        FileNotFoundError(2, "Path does not exist"),
        OSError(28, "No space left on device"),
    ],
)
def test_what_stays_is_told_at_once(error: OSError, waits: list[float]) -> None:
    assert not is_transient(error)
    with pytest.raises(type(error)):
        patiently(failing(1, error))
    assert waits == []


def test_waits_grow_to_a_ceiling_and_attempts_end(waits: list[float]) -> None:
    assert patiently(failing(3, OSError(SLOW_DOWN))) == 4
    assert 0.1 <= waits[0] <= 0.2 < 0.4 <= waits[2] <= 0.8
    waits.clear()
    with pytest.raises(OSError, match="SLOW_DOWN"):
        patiently(failing(ATTEMPTS, OSError(SLOW_DOWN)))
    assert len(waits) == ATTEMPTS - 1
    assert max(waits) <= LONGEST_WAIT_S


def test_no_attempt_is_begun_after_the_ceiling(monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    now, begun = 0.0, []

    def call() -> None:
        nonlocal now
        begun.append(now)
        now += 4.9
        raise OSError(SLOW_DOWN)

    def sleep(seconds: float) -> None:
        nonlocal now
        waits.append(seconds)
        now += seconds

    monkeypatch.setattr(object_store.time, "monotonic", lambda: now)
    monkeypatch.setattr(object_store.time, "sleep", sleep)
    with pytest.raises(OSError, match="SLOW_DOWN"):
        patiently(call)
    assert 3 < len(begun) < ATTEMPTS
    assert begun[-1] <= object_store.CEILING_S


class Faults:
    """Raises on the calls numbered, of one kind of change, before or after it."""

    def __init__(self, when: str, what: str, *numbers: int) -> None:
        self.when, self.what, self.numbers, self.count = when, what, numbers, 0

    def __call__(self, when: str, what: str, key: str) -> None:
        if (when, what) == (self.when, self.what):
            self.count += 1
            if self.count in self.numbers:
                raise OSError(f"key '{key}': AWS Error NETWORK_CONNECTION: connection was cut")


def test_an_upload_that_is_cut_is_made_again_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "_BLOCK", 1000)
    seen: list[int] = []
    faults = Faults("before", "write", 3, 8)
    store = FolderStore(tmp_path, faults)

    def step(when: str, what: str, key: str) -> None:
        if (when, what) == ("after", "put"):
            seen.append((store.root / key).stat().st_size)
        faults(when, what, key)

    store.step = step
    content = os.urandom(5500)
    (tmp_path / "file").write_bytes(content)
    upload(patient(fs.PyFileSystem(store)), tmp_path / "file", "bucket/a/b")
    assert seen == [2000, 4000, 5500]  # what was cut did appear, as it does in a store: nobody may count it
    assert (store.root / "bucket/a/b").read_bytes() == content


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_answer_that_is_lost_does_no_harm(tmp_path: Path, when: str) -> None:
    for what, keys in (("put", ["bucket/new", "bucket/old"]), ("copy", ["bucket/new", "bucket/old"]), ("delete", [])):
        store = FolderStore(tmp_path / what)
        filesystem = patient(fs.PyFileSystem(store))
        upload(filesystem, b"x", "bucket/old")
        store.step = Faults(when, what, 1)
        if what == "put":
            upload(filesystem, b"x", "bucket/new")
        elif what == "copy":
            filesystem.copy_file("bucket/old", "bucket/new")
        else:
            filesystem.delete_file("bucket/old")
        assert store.objects() == keys


def test_an_upload_that_never_comes_through_raises(tmp_path: Path) -> None:
    store = FolderStore(tmp_path, Faults("before", "put", *range(1, 100)))
    with pytest.raises(OSError, match="connection was cut"):
        upload(patient(fs.PyFileSystem(store)), b"x", "bucket/a")
    assert store.objects() == []


def test_deleting_what_is_not_there_is_said_at_once(tmp_path: Path, waits: list[float]) -> None:
    with pytest.raises(FileNotFoundError):
        patient(fs.PyFileSystem(FolderStore(tmp_path))).delete_file("bucket/a")
    assert waits == []


def test_reads_go_on_where_they_were(tmp_path: Path) -> None:
    content = os.urandom(100_000)
    (tmp_path / "file").write_bytes(content)

    class Flaky:
        """Gives an error, or fewer bytes than asked for, at every second read."""

        def __init__(self) -> None:
            self.file, self.count = fs.LocalFileSystem().open_input_file(str(tmp_path / "file")), 0

        def size(self) -> int:
            return int(self.file.size())

        def read_at(self, count: int, at: int) -> bytes:
            self.count += 1
            if self.count % 4 == 1:
                raise OSError("curlCode: 56, Failure when receiving data from the peer")
            return bytes(self.file.read_at(count // 2 if self.count % 4 == 3 else count, at))

        def close(self) -> None:
            self.file.close()

    class Handler(FolderStore):
        def open_input_file(self, _path: str) -> pa.NativeFile:
            return flaky

    flaky = Flaky()
    file = object_store._PatientFile(Handler(tmp_path), "bucket/file")
    assert b"".join(iter(lambda: file.read(777), b"")) == content
    assert flaky.count > 200
    file.seek(-10, 2)
    assert (file.tell(), file.read()) == (99_990, content[-10:])
