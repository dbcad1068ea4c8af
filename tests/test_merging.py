"""Joining parts into one file: none that was damaged, and in a process of its own, which must not outlive the run's."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from fault_steps import without_ray, write_source

from denoise_batch.errors import DenoiseBatchError
from denoise_batch.images import Polarity
from denoise_batch.inference import infer as module
from denoise_batch.inference import manifest, merging
from denoise_batch.inference.infer import InferSettings, OutputShape, infer
from denoise_batch.storage import publishing

_DRIVER = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from denoise_batch.inference import merging

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=merging.end_with_parent) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        time.sleep(60)
"""


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
        # Where nothing adopts orphans a dead one keeps its number.
        return not Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except (ProcessLookupError, FileNotFoundError):
        return False


@pytest.mark.slow
def test_the_joining_process_ends_with_a_driver_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "driver.py"
    script.write_text(_DRIVER)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as driver:
        assert driver.stdout is not None
        joining = int(driver.stdout.readline())
        driver.send_signal(signal.SIGKILL)
    until = time.monotonic() + 20
    while _alive(joining) and time.monotonic() < until:
        time.sleep(0.05)
    assert not _alive(joining)


@pytest.mark.slow
@pytest.mark.usefixtures("footers_read_here")
@pytest.mark.parametrize("copied", [True, False])
def test_a_part_that_is_damaged_before_it_is_joined(
    copied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the bit is, also where another row count would come of it, and nothing but a digest tells."""
    if copied:
        monkeypatch.setattr(merging, "_SMALL_ROWS", 0)
    source, out = write_source(tmp_path / "in", 3, 24, 0), tmp_path / "out.parquet"
    settings = InferSettings((str(source),), str(out), shape=OutputShape.SINGLE_FILE)
    merge, damaged = merging.merge, []

    def of_damaged(run: Any, *arguments: Any) -> Any:
        part = run.staging / run.ledger.receipts[1].file
        content = part.read_bytes()
        length = int.from_bytes(content[-8:-4], "little")
        at = content.rindex(b"\x16\x30", len(content) - 8 - length)  # 24 rows, of the last that says so
        part.write_bytes(content[: at + 1] + b"\x2e" + content[at + 2 :])  # 23
        assert pq.read_metadata(part).row_group(0).num_rows == 23
        damaged.append(part)
        return merge(run, *arguments)

    with without_ray(), monkeypatch.context() as patch:
        patch.setattr(module, "merge", of_damaged)
        with pytest.raises(DenoiseBatchError, match="no longer the one that a worker wrote") as caught:
            infer(settings)
    assert not out.exists()
    assert "delete that file and run the same command again" in caught.value.hint
    damaged[0].unlink()
    with without_ray():
        infer(settings)
    assert pq.read_table(out)["id"].to_pylist() == list(range(72))
    assert manifest.verify(out) == []


class _Here:
    """A pool of one process, which is this one."""

    _processes: ClassVar[dict[int, Any]] = {}

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> _Here:
        return self

    def __exit__(self, *_: object) -> None: ...

    def submit(self, call: Any, *arguments: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(call(*arguments))
        return done


@pytest.mark.usefixtures("footers_read_here")
@pytest.mark.parametrize(("text", "most"), [(1, 64), (1 << 20, 15)])
def test_few_large_rows_are_joined_at_a_time(
    text: int, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out, read = tmp_path / "in", tmp_path / "out.parquet", []
    source.mkdir()
    for number in range(2):
        images = pa.array([bytes([number]) * 784] * 64, pa.binary(784))
        pq.write_table(pa.table({"image": images, "text": ["x" * text] * 64}), source / f"{number}.parquet")
    batches = merging.read_batches

    def counted(file: Any, rows: int) -> Any:
        for batch in batches(file, rows):
            read.append(len(batch))
            yield batch

    monkeypatch.setattr(merging, "ProcessPoolExecutor", _Here)
    monkeypatch.setattr(merging, "read_batches", counted)
    with without_ray():
        settings = {"polarity": Polarity.LIGHT_ON_DARK, "shape": OutputShape.SINGLE_FILE}
        infer(InferSettings((str(source),), str(out), **settings))
    assert sum(read) == 128
    assert max(read) == most


@pytest.mark.usefixtures("footers_read_here")
def test_a_copy_of_a_single_file_is_verified_itself_not_the_file_that_it_was(tmp_path: Path) -> None:
    source, out, copy = write_source(tmp_path / "in", 1, 24, 0), tmp_path / "out.parquet", tmp_path / "copy.parquet"
    with without_ray():
        infer(InferSettings((str(source),), str(out), shape=OutputShape.SINGLE_FILE))
    shutil.copytree(publishing.file_sidecar(out), publishing.file_sidecar(copy))
    assert manifest.verify(copy) == [f"{copy} is missing"]
    content = bytearray(out.read_bytes())
    copy.write_bytes(content)
    assert manifest.verify(copy) == []
    content[len(content) // 2] ^= 1
    copy.write_bytes(content)
    (fault,) = manifest.verify(copy)
    assert fault.startswith(f"{copy} is damaged")
    assert manifest.verify(out) == []
    out.unlink()
    (fault,) = manifest.verify(copy)
    assert fault.startswith(f"{copy} is damaged")
