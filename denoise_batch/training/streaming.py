"""Training sets that do not fit into memory: read from Parquet at every epoch, mixed, ahead of the steps."""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from denoise_batch.errors import ParquetError
from denoise_batch.noise import SIDE
from denoise_batch.training.batches import BUFFER, ORDER, Batch, place_of, seed_of, share, to_unit
from denoise_batch.training.data import Piece, cut, read_rows, rows_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from denoise_batch.training.data import ParquetImages


class StreamedBatches:
    """A training set that is read from Parquet at every epoch, because it does not fit into memory.

    The row groups are put into a random order, the same on all workers, and laid end to end. An epoch is a stretch of
    them, mostly all; each worker reads one part of it, so that no two read the same rows, and mixes them in a buffer.
    Where a pass takes several epochs, the first begins anywhere, since a row group may be larger than an epoch.
    Where a part holds no usable image, its worker reads on after it: all take the same steps.

    Args:
        images: the dataset.
        pieces: its training rows.
        device: where batches go.
        batch, seed, rank, workers, epochs_of_pass: as in `ResidentBatches`.
        buffer_bytes: of the buffer in which rows are mixed.
    """

    def __init__(
        self,
        images: ParquetImages,
        pieces: Sequence[Piece],
        device: torch.device,
        *,
        batch: int,
        seed: int,
        rank: int,
        workers: int,
        buffer_bytes: int,
        epochs_of_pass: int = 1,
    ) -> None:
        self._parquet, self._pieces, self._device = images, tuple(pieces), device
        self._batch, self._seed, self._rank, self._workers = batch, seed, rank, workers
        self._buffer_rows = max(1024, buffer_bytes // images.bytes_per_row)
        self._all, self.epochs_of_pass = rows_of(pieces), epochs_of_pass
        self.images = self._all // epochs_of_pass
        self.left_out = 0

    def epoch(self, epoch: int) -> Iterator[Batch]:
        number, part = place_of(epoch, self.epochs_of_pass)
        shares = [self._rows_of_rank(rank) for rank in range(self._workers)]
        start, mine = part * self.images + sum(shares[: self._rank]), shares[self._rank]
        generator = np.random.default_rng(seed_of(self._seed, ORDER, number))
        pieces, buffer = [self._pieces[index] for index in generator.permutation(len(self._pieces))], self._buffer_rows
        if self.epochs_of_pass > 1:
            begin = int(generator.integers(self._all))
            pieces = cut(pieces, begin, self._all) + cut(pieces, 0, begin)
            buffer = min(buffer, max(1024, mine // 4))  # or no step is made before the share is read
        generator = np.random.default_rng(seed_of(self._seed, BUFFER, epoch, self._rank))
        rows = _Rows(ahead(mix(self._read(pieces, start, mine), buffer, mine, generator)))
        for position in range(0, self.images, self._batch):
            total = min(self._batch, self.images - position)
            taken = share(total, self._rank, self._workers)
            clean, noisy = rows.take(taken.stop - taken.start)
            yield Batch(self._place(clean), None if noisy is None else self._place(noisy), taken, total)

    def _read(self, pieces: Sequence[Piece], start: int, rows: int) -> Iterator[Chunk]:
        """The part of `rows` at `start`; if it holds no usable image, as many after it, round to `start`."""
        used = 0
        for chunk in read_rows(self._parquet, cut(pieces, start, start + rows)):
            used += len(chunk[0])
            yield chunk
        self.left_out = rows - used
        if used:
            return
        others = cut(pieces, start + rows, self._all) + cut(pieces, 0, start)
        for clean, noisy in read_rows(self._parquet, others):
            chunk = clean[: rows - used], None if noisy is None else noisy[: rows - used]
            used += len(chunk[0])
            yield chunk
            if used == rows:
                return

    def _rows_of_rank(self, rank: int) -> int:
        full, rest = divmod(self.images, self._batch)
        whole, last = share(self._batch, rank, self._workers), share(rest, rank, self._workers)
        rows: int = full * (whole.stop - whole.start) + last.stop - last.start
        return rows

    def _place(self, rows: NDArray[Any]) -> Tensor:
        return to_unit(torch.from_numpy(rows).to(self._device))


Chunk = tuple["NDArray[Any]", "NDArray[Any] | None"]


def mix(chunks: Iterator[Chunk], capacity: int, rows: int, generator: np.random.Generator) -> Iterator[Chunk]:
    """Mixes rows in a buffer of `capacity`: each chunk that comes in puts as many random rows of the buffer out.

    Args:
        chunks: what is read.
        rows: how many rows to give. Where bad rows were left out, others of the buffer take their place.

    Raises:
        ParquetError: no row came in, but `rows` is not 0.
    """
    buffer: list[NDArray[Any]] = []
    held = given = 0
    for clean, noisy in chunks:
        parts = [clean] if noisy is None else [clean, noisy]
        if not buffer:
            buffer = [np.empty((capacity, *part.shape[1:]), part.dtype) for part in parts]
        filling = min(capacity - held, len(clean))
        for store, part in zip(buffer, parts, strict=True):
            store[held : held + filling] = part[:filling]
        held += filling
        for begin in range(filling, len(clean), capacity):
            entering = [part[begin : begin + capacity] for part in parts]
            slots = generator.choice(capacity, len(entering[0]), replace=False)
            leaving = [store[slots] for store in buffer]
            for store, part in zip(buffer, entering, strict=True):
                store[slots] = part
            given += len(slots)
            yield _chunk(leaving)
    missing = rows - given
    if missing > 0 and not held:
        raise ParquetError(
            "none of the rows to train on holds a usable image",
            hint="`denoise-batch inspect` shows what the column holds",
        )
    order = generator.permutation(held)
    if missing > held:
        order = np.concatenate([order, generator.choice(held, missing - held)])
    for begin in range(0, missing, 4096):
        chosen = order[begin : min(begin + 4096, missing)]
        yield _chunk([store[chosen] for store in buffer])


def ahead(chunks: Iterator[Chunk], depth: int = 4) -> Iterator[Chunk]:
    """The same chunks, `depth` of them made beforehand by a thread, so that training does not wait for reading."""
    with ThreadPoolExecutor(1, thread_name_prefix="read-digits") as reader:
        pending = deque(reader.submit(next, chunks, None) for _ in range(depth))
        while (chunk := pending.popleft().result()) is not None:
            pending.append(reader.submit(next, chunks, None))
            yield chunk


def _chunk(parts: list[NDArray[Any]]) -> Chunk:
    return parts[0], parts[1] if len(parts) > 1 else None


class _Rows:
    """Chunks of any size, taken as so many rows at a time."""

    def __init__(self, chunks: Iterator[Chunk]) -> None:
        self._chunks = chunks
        self._clean = np.empty((0, SIDE, SIDE), np.uint8)
        self._noisy: NDArray[Any] | None = None

    def take(self, count: int) -> Chunk:
        while len(self._clean) < count:
            clean, noisy = next(self._chunks)
            empty = not len(self._clean)
            self._clean = clean if empty else np.concatenate([self._clean, clean])
            if noisy is not None:
                self._noisy = noisy if empty or self._noisy is None else np.concatenate([self._noisy, noisy])
        clean, self._clean = self._clean[:count], self._clean[count:]
        if self._noisy is None:
            return clean, None
        noisy, self._noisy = self._noisy[:count], self._noisy[count:]
        return clean, noisy
