"""What a training worker does, without the Ray that would start it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import distributed

from denoise_batch.bundle.history import read_history
from denoise_batch.training import loop
from denoise_batch.training.batches import ResidentBatches, StreamedBatches
from denoise_batch.training.data import open_parquet
from denoise_batch.training.recipes import TrainSettings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

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
