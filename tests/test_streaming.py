"""Sets that do not fit into memory: every row comes once, mixed, to one worker, and an epoch ends in good time."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from test_training_data import binary, digits, numbers, opened, write

from denoise_batch.errors import ParquetError
from denoise_batch.storage.listing import stat_input
from denoise_batch.training import streaming
from denoise_batch.training.batches import MOST_EPOCH, Batch, ResidentBatches, epochs_of_pass, share
from denoise_batch.training.data import load_rows
from denoise_batch.training.streaming import StreamedBatches, ahead, mix

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("footers_read_here", "ink_as_it_is")


def _numbers(batch: Batch) -> list[int]:
    """Which images of `digits` these are."""
    return numbers((batch.clean * 255).round().numpy())


def _streamed(images: Any, rank: int, workers: int, batch: int = 64, **options: int) -> StreamedBatches:
    device, options = torch.device("cpu"), {"batch": batch, "rank": rank, "workers": workers} | options
    return StreamedBatches(images, images.pieces, device, seed=2, buffer_bytes=0, **options)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_streamed_rows_come_once_and_batches_are_whole(tmp_path: Path, workers: int) -> None:
    images = opened(write(tmp_path, count=5000, groups=333))
    seen: list[int] = []
    for parts in zip(*(_streamed(images, rank, workers).epoch(1) for rank in range(workers)), strict=True):
        assert sum(len(part.clean) for part in parts) == parts[0].total
        assert [part.rows for part in parts] == [share(parts[0].total, rank, workers) for rank in range(workers)]
        seen += [number for part in parts for number in _numbers(part)]
    assert sorted(seen) == list(range(5000))


def test_an_epoch_has_two_million_images_at_most() -> None:
    assert [epochs_of_pass(images) for images in (0, 1, MOST_EPOCH, MOST_EPOCH + 1, 10**9)] == [1, 1, 1, 2, 477]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kind", ["resident", "streamed", "one row group"])
def test_a_large_set_takes_several_epochs_to_go_through(kind: str, workers: int, tmp_path: Path) -> None:
    images = opened(write(tmp_path, count=1000, groups=1000 if kind == "one row group" else 50))
    clean = torch.from_numpy(load_rows(images, images.pieces)[0])

    def seen_in(epoch: int) -> list[int]:
        seen: list[int] = []
        for rank in range(workers):
            shared = {"batch": 64, "rank": rank, "workers": workers, "epochs_of_pass": 3}
            resident = ResidentBatches(clean, None, seed=2, **shared)
            data = resident if kind == "resident" else _streamed(images, **shared)
            assert (data.images, data.epochs_of_pass) == (333, 3)
            seen += [number for batch in data.epoch(epoch) for number in _numbers(batch)]
        assert len(seen) == 333
        return seen

    left_out = []
    for begin in (1, 4):  # 999 of the 1,000, each once, in an order of their own
        found = set(seen_in(begin) + seen_in(begin + 1) + seen_in(begin + 2))
        left_out.append(set(range(1000)) - found)
        assert len(found) == 999
    assert left_out[0] != left_out[1]
    assert seen_in(2) == seen_in(2)  # as a resumed training finds it
    assert seen_in(1) != seen_in(4)


def test_steps_begin_before_a_share_of_a_large_set_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, read = opened(write(tmp_path, count=30_000, groups=500)), 0
    real = streaming.read_rows

    def counted(parquet: Any, pieces: Any) -> Any:
        nonlocal read
        for chunk in real(parquet, pieces):
            read += len(chunk[0])
            yield chunk

    monkeypatch.setattr(streaming, "read_rows", counted)
    data = _streamed(images, 0, 1, epochs_of_pass=3)
    data._buffer_rows = 10_000  # a whole epoch
    next(data.epoch(1))
    assert 0 < read < 8000


def test_streamed_rows_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    images = opened(write(tmp_path, count=1000, groups=333, bad=(3, 500, 501, 999)))
    for workers in (1, 3):
        parts = [_streamed(images, rank, workers) for rank in range(workers)]
        for part in parts:
            assert part.left_out == 0
            assert sum(len(batch.clean) for batch in part.epoch(1)) > 0
        assert sum(part.left_out for part in parts) == 4


def test_streamed_rows_are_shuffled(tmp_path: Path) -> None:
    images = opened(write(tmp_path, count=5000, groups=333))
    epochs = [[n for batch in _streamed(images, 0, 1).epoch(epoch) for n in _numbers(batch)] for epoch in (1, 1, 2)]
    assert epochs[0] == epochs[1] != epochs[2]
    # Neighbours in the files are far apart: the buffer holds 1,024 of the 5,000 rows.
    assert np.mean(np.abs(np.diff(epochs[0])) < 10) < 0.1
    batches = np.array(epochs[0][:4992]).reshape(-1, 64)
    assert np.median([len(set(batch // 333)) for batch in batches]) >= 3


def test_bad_rows_are_replaced_by_good_ones(tmp_path: Path) -> None:
    bad = tuple(range(100, 400))
    images = opened(write(tmp_path, count=2000, groups=150, bad=bad))
    seen = [n for batch in _streamed(images, 0, 2).epoch(1) for n in _numbers(batch)]
    assert len(seen) == 1000
    assert not set(seen) & set(bad)


def test_a_worker_whose_stretch_holds_no_image_takes_others_rows(tmp_path: Path) -> None:
    images = opened(write(tmp_path, count=2000, groups=500, bad=tuple(range(1000, 2000)), files=2))
    starved = 0
    for epoch in range(1, 9):
        parts = [_streamed(images, rank, 8) for rank in range(8)]
        seen = [[n for batch in part.epoch(epoch) for n in _numbers(batch)] for part in parts]
        assert all(
            len(set(numbers)) == len(numbers) == part._rows_of_rank(rank)
            for rank, (part, numbers) in enumerate(zip(parts, seen, strict=True))
        )
        assert {n for numbers in seen for n in numbers} == set(range(1000))
        assert sum(part.left_out for part in parts) == 1000
        starved += sum(part.left_out == len(numbers) for part, numbers in zip(parts, seen, strict=True))
        assert seen[3] == [n for batch in _streamed(images, 3, 8).epoch(epoch) for n in _numbers(batch)]
    assert starved > 8


def test_a_stretch_with_images_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = opened(write(tmp_path, count=1000, groups=100, bad=(1, 2, 3)))
    read: list[int] = []
    real = streaming.read_rows

    def counted(parquet: Any, pieces: Any) -> Any:
        read.append(sum(piece.rows for piece in pieces))
        return real(parquet, pieces)

    monkeypatch.setattr(streaming, "read_rows", counted)
    for rank in (0, 1):
        list(_streamed(images, rank, 2).epoch(1))
    assert read == [500, 500]


def test_no_image_in_any_stretch_ends_the_training(tmp_path: Path) -> None:
    images = opened(write(tmp_path, count=100, groups=50))
    for file in tmp_path.iterdir():  # the sample of a training has images; what it goes on with may have none
        pq.write_table(pa.table({"image": binary(digits(50), tuple(range(50)))}), file)
    files = tuple((path, *stat_input(path)) for path, *_ in images.files)
    with pytest.raises(ParquetError, match="none of the rows"):
        list(_streamed(replace(images, files=files), 1, 2).epoch(1))


def test_streamed_pairs_stay_paired(tmp_path: Path) -> None:
    clean = digits(600)
    noisy = pa.array(list(clean.astype(np.float32) / 510), pa.list_(pa.float32()))
    column = pa.array([image.tobytes() for image in clean], pa.binary(784))
    pq.write_table(pa.table({"clean": column, "noisy": noisy}), tmp_path / "a.parquet", row_group_size=100)
    images = opened(tmp_path, column="clean", noisy_column="noisy")
    for batch in _streamed(images, 1, 2).epoch(1):
        assert batch.noisy is not None
        assert torch.allclose(batch.noisy, batch.clean / 2, atol=1e-6)


def test_no_good_row_at_all() -> None:
    with pytest.raises(ParquetError, match="none of the rows to train on"):
        list(mix(iter([]), 10, 7, np.random.default_rng(0)))
    assert list(mix(iter([]), 10, 0, np.random.default_rng(0))) == []


def test_reading_ahead_keeps_order_and_errors() -> None:
    def chunks() -> Any:
        for number in range(10):
            yield np.full(1, number), None
        raise ParquetError("damaged", hint="-")

    reading = ahead(chunks())
    assert [int(next(reading)[0][0]) for _ in range(10)] == list(range(10))
    with pytest.raises(ParquetError):
        next(reading)
