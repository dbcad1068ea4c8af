"""What the sweeps of kills share: dying at a chosen step, `infer` without Ray, inputs, and what stands at an output.

`commit_steps.py` kills at every step, without Ray; `kill_sweep.py` kills real runs and all that takes part in them.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import traceback
from concurrent.futures import Future
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import xxhash

from denoise_batch.cluster.capacity import Node
from denoise_batch.digits import draw_digits
from denoise_batch.errors import DenoiseBatchError
from denoise_batch.forward import in_float32
from denoise_batch.images import encode
from denoise_batch.images.layouts import Layout, output_column
from denoise_batch.inference import infer as module
from denoise_batch.inference import merging
from denoise_batch.inference.denoise_unit import denoise_unit
from denoise_batch.storage import publishing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

IMAGE = output_column(None, "image", Layout.BINARY, "uint8")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
TIMEOUT_S = 60


# --- the steps of a process -------------------------------------------------------------------------------------------


class Steps:
    """Counts this process's steps under `root`, and kills it at step number `kill_at`, counted from 1."""

    def __init__(self, root: Path, kill_at: int | None) -> None:
        self.root, self.kill_at = f"{root}{os.sep}", kill_at
        self.names: list[str] = []

    def watch(self) -> None:
        """From now on, for good: an audit hook cannot be taken away."""
        sys.addaudithook(self._audit)
        os.fsync = self._around(os.fsync)
        os.fdatasync = self._around(os.fdatasync)
        os.write = self._torn(os.write)  # type: ignore[assignment]
        rename = publishing._rename_with  # by ctypes, of which no audit event tells the paths

        def rename_with(flags: int, source: Path, target: Path) -> None:
            self._step(str(target), "before showing")
            rename(flags, source, target)
            self._step(str(target), "after showing")

        publishing._rename_with = rename_with

    def _step(self, path: str, what: str) -> None:
        if path.startswith(self.root):
            self.names.append(f"{what} {path[len(self.root) :]}".rstrip())
            if len(self.names) == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, str | bytes) and isinstance(flags, int) and flags & WRITING:
                self._step(os.path.abspath(os.fsdecode(path)), event)  # noqa: PTH100
        elif event in _EVENTS:
            path, folder = arguments[0], arguments[-1]
            name = os.fsdecode(path)
            if isinstance(folder, int) and folder >= 0 and not name.startswith(os.sep):
                name = f"{_path_of(folder)}{os.sep}{name}"  # shutil.rmtree works relative to open folders
            self._step(os.path.abspath(name), event)  # noqa: PTH100

    def _around(self, call: Callable[[int], None]) -> Callable[[int], None]:
        def wrapped(descriptor: int) -> None:
            path = _path_of(descriptor)
            path = self.root if f"{path}{os.sep}" == self.root else path
            self._step(path, "before sync of")
            call(descriptor)
            self._step(path, "after sync of")

        return wrapped

    def _torn(self, call: Callable[[int, Any], int]) -> Callable[[int, Any], int]:
        def wrapped(descriptor: int, data: Any) -> int:
            path = _path_of(descriptor)
            if not path.startswith(self.root):
                return call(descriptor, data)
            self._step(path, "before write to")
            half = call(descriptor, memoryview(data)[: max(1, len(data) // 2)])
            self._step(path, "half way in write to")
            return half  # the caller writes the rest: a short write is allowed

        return wrapped


def _path_of(descriptor: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: PTH115
    except OSError:
        return ""


# --- infer without Ray ------------------------------------------------------------------------------------------------


class _InThisProcess:
    """Stands in for the process pool that joins units into one file, so that its steps are seen too."""

    _processes: dict[int, Any] = {}  # noqa: RUF012

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> _InThisProcess:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, call: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(call(*arguments))
        return future


@contextlib.contextmanager
def without_ray(order: int = 0) -> Iterator[None]:
    """`infer` makes its units here, in an order that `order` seeds, by a model that gives back what it is given."""

    def process_units(assignments: Any, options: Any, *_: Any, **__: Any) -> Iterator[Any]:
        shuffled = list(assignments)
        random.Random(order).shuffle(shuffled)
        for assignment in shuffled:
            yield denoise_unit(assignment, options, in_float32(lambda pixels: np.clip(pixels, 0, 1)))

    @contextlib.contextmanager
    def connect(**_: Any) -> Iterator[None]:
        yield

    capacity = SimpleNamespace(living_nodes=lambda: [Node(1, 0)], nodes_to_come=list, lost_nodes=set)
    with (
        patch.multiple(
            module,
            process_units=process_units,
            connect=connect,
            check_seen_by_nodes=lambda *_: None,
            capacity=capacity,
        ),
        patch.object(merging, "ProcessPoolExecutor", _InThisProcess),
    ):
        yield


# --- inputs and outputs -----------------------------------------------------------------------------------------------


def write_source(folder: Path, files: int, rows: int, first_id: int, *, bad: bool = False) -> Path:
    """A folder of drawn digits, `files` Parquet files with ids that count on; each third row may be bad."""
    folder.mkdir(parents=True)
    for number in range(files):
        start = first_id + number * rows
        pixels = draw_digits(rows, seed=1, start=start)[0].reshape(rows, 784)
        marks = (np.arange(rows) % 3 == 1).astype(np.uint8) if bad else None
        table = pa.table({"id": pa.array(range(start, start + rows)), "image": encode(pixels, marks, IMAGE)})
        pq.write_table(table, folder / f"{number:03d}.parquet", write_page_checksum=True)
    return folder


def source_of(folder: Path) -> str:
    """As a request names it: one file by itself, several by their folder."""
    files = sorted(folder.iterdir())
    return str(files[0] if len(files) == 1 else folder)


def digests(path: Path, *, data: bool) -> dict[str, str]:
    """The digest of each file at `path`, by its relative name; with `data` only of what readers of Parquet see."""
    if path.is_file():
        return {".": xxhash.xxh3_128_hexdigest(path.read_bytes())}
    found = {}
    for file in sorted(path.rglob("*")):
        parts = file.relative_to(path).parts
        if file.is_file() and not (data and any(part.startswith(("_", ".")) for part in parts)):
            found["/".join(parts)] = xxhash.xxh3_128_hexdigest(file.read_bytes())
    return found


def forked(work: Callable[[], Any]) -> dict[str, Any]:
    """What `work` gives, run in a child; {"killed": True} where SIGKILL ended it, {"error": …} where anything else."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            answer = work() or {}
        except DenoiseBatchError as error:
            answer = {"error": f"{type(error).__name__}: {error.message}"}
        except BaseException:
            answer = {"error": traceback.format_exc()}
        with os.fdopen(writing, "w") as pipe:
            json.dump(answer, pipe)
        os._exit(0)
    os.close(writing)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGTERM))
    signal.alarm(TIMEOUT_S)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    status = os.waitpid(child, 0)[1]
    signal.alarm(0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return {"killed": True} if number == signal.SIGKILL else {"error": f"ended by signal {number} (hung?)"}
    found: dict[str, Any] = json.loads(text)
    return found
