"""What a training worker does, without the Ray that would start it."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import distributed

from denoise_batch.bundle.history import read_history
from denoise_batch.training import loop
from denoise_batch.training.batches import ResidentBatches
from denoise_batch.training.checkpoint import read_finished
from denoise_batch.training.data import open_parquet
from denoise_batch.training.recipes import TrainSettings
from denoise_batch.training.streaming import StreamedBatches

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.usefixtures("footers_read_here")


@pytest.fixture
def worker(tmp_path: Path, digits: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a worker of so many, of a training of 300 digits in Parquet."""
    import ray.train.torch

    workers = 1
    context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: workers)
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: None)
    monkeypatch.setattr(ray.train, "report", lambda *_, **__: None)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
    images = pa.array([image.tobytes() for image in digits[0]], pa.binary(784))
    pq.write_table(pa.table({"image": images}), tmp_path / "clean.parquet", row_group_size=50)

    def make(of: int = 1, **options: Any) -> loop._Worker:
        nonlocal workers
        workers = of
        data = tmp_path / "clean.parquet"
        settings = TrainSettings(output=tmp_path / "model", data=data, architecture="seed", batch=64, **options)
        return loop._Worker(
            loop.LoopConfig(
                recipe=settings.resolve(),
                seed=0,
                folder=str(tmp_path),
                parquet=open_parquet(settings),
                max_images=None,
                initial=None,
                mnist=None,
                resident_limit=1 << 30,
                threads=1,
                workers_on_node=1,
            )
        )

    return make


def test_a_step_is_taken_however_few_minutes_there_are(worker: Any, tmp_path: Path) -> None:
    worker(minutes=1e-9).run()
    (row,) = read_history(tmp_path / "history.csv")
    assert (row.epoch, row.images) == (1, 64)
    assert (tmp_path / "finished" / "weights.safetensors").is_file()


def test_a_checkpoint_is_made_in_the_trainings_folder(
    worker: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk that an error names must be the one that is full."""
    made: list[Path] = []

    def report(_: Any, checkpoint: Any) -> None:
        made.append(Path(checkpoint.path))
        assert (made[-1] / "state.json").is_file()
        assert not (made[-1] / "left").exists()

    monkeypatch.setattr("ray.train.report", report)
    left = tmp_path / "checkpoint.writing"
    left.mkdir()
    (left / "left").write_bytes(b"by a dead attempt")
    worker(epochs=2).run()
    assert made == [left, left]
    assert not left.exists()


def test_a_checkpoint_that_cannot_be_written_leaves_its_room(
    worker: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path, *_: Any) -> None:
        (folder / "weights.safetensors").write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(loop, "save_checkpoint", full)
    with pytest.raises(OSError, match="No space"):
        worker(epochs=1).run()
    assert not (tmp_path / "checkpoint.writing").exists()


def test_workers_and_device_are_those_of_the_last_epoch(
    worker: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept"
    monkeypatch.setattr("ray.train.report", lambda _, checkpoint: shutil.copytree(checkpoint.path, kept))
    worker(epochs=1).run()
    state, _ = read_finished(tmp_path / "finished")
    assert (state.workers, state.device) == (1, "cpu")
    (kept / "state.json").write_text(json.dumps(asdict(replace(state, workers=4, device="H200"))))
    checkpoint = SimpleNamespace(as_directory=lambda: contextlib.nullcontext(str(kept)))
    monkeypatch.setattr("ray.train.get_checkpoint", lambda: checkpoint)
    worker(epochs=1).run()  # which finds all epochs done, and finishes the model
    state, _ = read_finished(tmp_path / "finished")
    assert (state.epoch, state.workers, state.device) == (1, 4, "H200")


def test_an_epochs_time_is_told_once_the_speed_is_known(
    worker: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told() -> Any:
        worker(epochs=1).run()
        return json.loads((tmp_path / "progress.json").read_text())["epoch_seconds"]

    assert told() is None
    monkeypatch.setattr(loop, "_SPEED_SECONDS", 0.0)
    assert 0.0 < told() < 60.0


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:`broadcast_buffers` is deprecated:FutureWarning")
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(("least", "kind"), [(0, StreamedBatches), (2 << 30, ResidentBatches)])
def test_all_workers_stream_where_one_has_no_room(
    worker: Any, monkeypatch: pytest.MonkeyPatch, least: int, kind: type
) -> None:
    """Of resident and streamed images they would take different shares: some rows twice, and others never."""

    def another_has(limit: torch.Tensor, operation: distributed.ReduceOp) -> None:
        assert operation == distributed.ReduceOp.MIN
        limit.clamp_(max=least)

    monkeypatch.setattr(loop.distributed, "all_reduce", another_has)
    assert isinstance(worker(2, epochs=1).batches, kind)
