"""What every training worker does; `train` starts it on each through Ray Train.

Each worker holds the network, walks through its share of the same global batches, and gets the same averaged gradient
(DDP). Worker 0 writes the checkpoints, the progress and TensorBoard's curves.
"""

from __future__ import annotations

import copy
import json
import math
import time
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import distributed

from denoise_batch import models
from denoise_batch.bundle.history import HISTORY_FILE, EpochRow, history_csv
from denoise_batch.errors import DenoiseBatchError, JobFailed
from denoise_batch.noise import NoiseRecipe
from denoise_batch.process.cores import threads_here
from denoise_batch.process.environment import refuse_unsafe_switches
from denoise_batch.process.freed_memory import keep_freed_memory
from denoise_batch.storage import publishing
from denoise_batch.training.batches import ResidentBatches, epochs_of_pass, noised_copies, seed_of
from denoise_batch.training.checkpoint import (
    TrainingState,
    load_checkpoint,
    save_checkpoint,
    weights_of,
    write_finished,
)
from denoise_batch.training.data import ParquetImages, held_out_count, load_rows, split
from denoise_batch.training.failure import check_loss, final_failure, has_failed, leave_failure
from denoise_batch.training.optimisation import learning_rate, make_optimiser
from denoise_batch.training.place import quarter_of_memory
from denoise_batch.training.progress import TrainProgress
from denoise_batch.training.recipes import Keep, Recipe
from denoise_batch.training.request import CHECKPOINT_FOLDER
from denoise_batch.training.step import TrainingStep
from denoise_batch.training.streaming import StreamedBatches
from denoise_batch.training.validation import Validation

if TYPE_CHECKING:
    from torch import Tensor

    from denoise_batch.training.batches import Batches

PROGRESS_FILE = "progress.json"
FINISHED_FOLDER = "finished"
_PROGRESS_SECONDS = 0.5
_SPEED_SECONDS = 20.0  # until the speed says how long an epoch takes: first steps are slow
_GPU_CLOCK_STEPS = 10  # between two looks at the clock, which all workers wait for; a CPU's steps are long
_GPU_CHECKPOINT_SECONDS = 10.0  # between two: an epoch takes a GPU less time than its checkpoint


@dataclass(frozen=True)
class LoopConfig:
    """What a worker is told.

    Attributes:
        recipe: the recipe, resolved.
        seed: of the training.
        folder: the run's storage, an absolute path that worker 0 can write.
        parquet: the data, or None for MNIST.
        max_images: how many of the images to use, or None.
        initial: reference to the weights to start from, in Ray's object store; None starts afresh.
        mnist: references to MNIST in Ray's object store: (n, 28, 28) uint8 training and validation images; the latter
            None where they are held out from the former.
        resident_limit: bytes of images that this worker may hold; None takes a quarter of the memory.
        threads: of torch, on the CPU.
        workers_on_node: workers that share this machine's memory.
    """

    recipe: Recipe
    seed: int
    folder: str
    parquet: ParquetImages | None
    max_images: int | None
    initial: Any
    mnist: tuple[Any, Any] | None
    resident_limit: int | None
    threads: int
    workers_on_node: int


def train_worker(arguments: dict[str, LoopConfig]) -> None:
    """Trains on this worker, as `config` in the arguments says; what would only fail again is left (`failure`)."""
    import ray.train

    config = arguments["config"]
    torch.set_num_threads(threads_here(config.threads))
    folder = Path(config.folder)
    if has_failed(folder):
        return
    try:
        refuse_unsafe_switches()  # a node's environment may be another than the driver's
        _Worker(config).run()
    except (DenoiseBatchError, OSError, RuntimeError) as error:
        final = final_failure(error, folder)
        if final is None:
            raise
        leave_failure(folder, final)
        if ray.train.get_context().get_world_size() > 1:
            raise  # the other workers wait for this one: only Ray Train can end them


class _Worker:
    """One training worker: what it holds, and the epochs."""

    def __init__(self, config: LoopConfig) -> None:
        import ray
        import ray.train.torch

        self.config, self.recipe = config, config.recipe
        context = ray.train.get_context()
        self.rank, self.workers = context.get_world_rank(), context.get_world_size()
        self.device: torch.device = ray.train.torch.get_device()
        self.bfloat16 = self.recipe.precision.bfloat16(self.device)
        if self.device.type == "cuda":
            stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            torch.cuda.set_stream(stream)  # the default one cannot be recorded (`step`)
            torch.backends.cudnn.benchmark = True
            torch.backends.cudnn.allow_tf32 = self.bfloat16  # or convolutions would have 10 bits of float32's 23
        else:
            keep_freed_memory()
        self.folder = Path(config.folder)
        self.noise = NoiseRecipe.from_json(self.recipe.noise_json())
        torch.manual_seed(seed_of(config.seed))
        network = models.build(self.recipe.architecture, self.recipe.parameters)
        if config.initial is not None:
            network.load_state_dict(ray.get(config.initial))
        self.network = network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = copy.deepcopy(self.network) if self.recipe.average else None
        self.optimiser = make_optimiser(self.recipe, self.network, workers=self.workers)
        self.state, self.best = TrainingState(), weights_of(self.network)
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is not None:
            with checkpoint.as_directory() as folder:
                self.state, self.best = load_checkpoint(Path(folder), self.network, self.average, self.optimiser)
        self.device_name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        self.step = TrainingStep(
            self.network, self.average, self.optimiser, self.recipe, seed=config.seed, workers=self.workers
        )
        self.left_out = 0  # of the rows that every worker has read by now
        self.batches, self.validation = self._load()
        self.seconds_before = self.state.history[-1].seconds if self.state.history else 0.0
        self.images_here = 0  # trained on since this start, over all workers
        self.started = self.progress_at = self.saved_at = time.monotonic()
        self.time_share = self._look_at_clock()
        self.writer: Any = None

    def run(self) -> None:
        """Trains from the state to the last epoch."""
        while not (self.state.history and self._over()):  # a step at least, however few minutes there are
            self._epoch()
        if self.writer is not None:
            self.writer.close()
        if self.rank == 0:
            last = self.average or self.network
            self.network.load_state_dict(self.best if self.recipe.keep is Keep.BEST else last.state_dict())
            torch.backends.cudnn.allow_tf32 = False  # this wants float32
            self._show_progress(self.state.epoch, None, 0, trained=True)
            torch.set_num_threads(threads_here(self.config.threads * self.config.workers_on_node))  # others are done
            try:
                self.network.prepare_int8(self.validation.all_shown[:, None].to(self.device))
            except RuntimeError as error:  # for want of memory, most likely: the model is whole without
                warnings.warn(f"the model will not compute in integers: {error}", RuntimeWarning, stacklevel=1)
            write_finished(self.folder / FINISHED_FOLDER, self.state, weights_of(self.network))

    def _over(self) -> bool:
        if self.state.stopped_early:
            return True
        return self.state.epoch >= self.recipe.epochs if self.recipe.minutes is None else self.time_share >= 1.0

    def _seconds(self) -> float:
        """Since the start, of all attempts together."""
        return self.seconds_before + time.monotonic() - self.started

    def _look_at_clock(self) -> float:
        """How much of the recipe's minutes is over; 0 where it has none.

        One worker's clock counts for all, or their learning rates and their ends would differ.
        """
        return 0.0 if self.recipe.minutes is None else self._agreed(self._seconds() / (60.0 * self.recipe.minutes))

    def _agreed(self, number: float) -> float:
        """Worker 0's number, on all workers. Waits for the GPU, so that a clock is not ahead of what it times."""
        if self.workers == 1:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            return number
        shared = torch.tensor(number, device=self.device)
        distributed.broadcast(shared, 0)
        return float(shared)

    def _expected_steps(self) -> int:
        """Steps of the whole training, as far as is known: where the recipe has minutes, the clock tells."""
        if self.recipe.minutes is None:
            return self.recipe.epochs * -(-self.batches.images // self.recipe.batch)
        return max(self.state.step + 1, round((self.state.step + 1) / max(self.time_share, 1e-6)))

    def _epoch(self) -> None:
        epoch, started = self.state.epoch + 1, time.monotonic()
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        seen = total = 0
        rate = self.recipe.learning_rate
        if self.workers > 1:
            # Muon's products round differently on unlike processors, and DDP compares gradients, not weights.
            for parameter in self.network.parameters():
                distributed.broadcast(parameter.data, 0)
        for batch in self.batches.epoch(epoch):
            rate = learning_rate(self.recipe, self.state.step, self._expected_steps())
            loss_sum += self.step(batch, rate, self.state.step)
            self.state.step += 1
            self.images_here += batch.total
            total += batch.total
            seen += batch.rows.stop - batch.rows.start
            if self.device.type == "cpu" or self.state.step % _GPU_CLOCK_STEPS == 0:
                self.time_share = self._look_at_clock()
            self._show_progress(epoch, loss_sum, seen)
            if self._over():
                break
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        training_seconds = time.monotonic() - started
        found = torch.stack([loss_sum, torch.full_like(loss_sum, self.batches.left_out)])
        sums = torch.cat([found, self.validation.errors(self.average or self.network, self.bfloat16)])
        if self.workers > 1:
            distributed.all_reduce(sums)
        loss, left_out, val_loss, noisy_error, clean_error, quality_error, psnr = sums.tolist()
        read = int(left_out) if total == self.batches.images else None
        self.state.count_left_out(self.left_out, read, self.batches.epochs_of_pass)
        count = self.validation.total
        row = EpochRow(
            epoch=epoch,
            images=(epoch - 1) * self.batches.images + total,
            loss=loss / total,
            val_loss=val_loss / count,
            val_psnr_noisy=_psnr(noisy_error / count),
            val_psnr_clean=_psnr(clean_error / count),
            learning_rate=rate,
            images_per_second=total / training_seconds,
            seconds=self._seconds(),
            val_quality_error=math.sqrt(quality_error / count) if self.network.has_quality else None,
            val_mean_psnr=psnr / count,
        )
        check_loss(row)
        self._finish_epoch(row)

    def _finish_epoch(self, row: EpochRow) -> None:
        state = self.state
        best = state.best
        state.history.append(row)
        state.epoch, state.workers, state.device = row.epoch, self.workers, self.device_name
        if best is None or row.val_mean_psnr > best.val_mean_psnr:
            state.best_epoch = row.epoch
            self.best = weights_of(self.average or self.network)
        patience = self.recipe.patience
        state.stopped_early = patience is not None and row.epoch - state.best_epoch >= patience
        self._report(row)
        self._show_progress(row.epoch, None, 0)

    def _report(self, row: EpochRow) -> None:
        """Hands the epoch to Ray Train, with a checkpoint from worker 0."""
        import ray.train

        if self.rank == 0:
            self._tensorboard(row)
        if self.device.type == "cuda" and not self._over():
            if self._agreed(time.monotonic() - self.saved_at) < _GPU_CHECKPOINT_SECONDS:
                return
            self.saved_at = time.monotonic()
        metrics = row.to_json()
        if self.rank != 0:
            ray.train.report(metrics)
            return
        self.writer.flush()
        building = self.folder / CHECKPOINT_FOLDER  # not in TMPDIR: if a disk is full, it is the one that is named
        publishing.remove(building)  # what a dead attempt has left
        building.mkdir()
        try:
            save_checkpoint(building, self.state, self.network, self.average, self.best, self.optimiser)
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(str(building)))
        finally:
            publishing.remove(building)
        # Last: it says that an epoch is kept, to which the settings are held.
        (self.folder / HISTORY_FILE).write_text(history_csv(self.state.history), encoding="utf-8")

    def _tensorboard(self, row: EpochRow) -> None:
        from tensorboardX import SummaryWriter

        rows = [row]
        if self.writer is None:
            # All anew: a dead attempt has drawn epochs that are done again, and has not written all that it drew.
            self.writer, rows = SummaryWriter(str(self.folder / "tensorboard"), purge_step=1), self.state.history
        for drawn in rows:
            for tag, value in drawn.to_json().items():
                if tag not in ("epoch", "images") and value is not None:
                    self.writer.add_scalar(tag, value, drawn.epoch)

    def _show_progress(self, epoch: int, loss_sum: Tensor | None, seen: int, *, trained: bool = False) -> None:
        now = time.monotonic()
        if self.rank != 0 or (loss_sum is not None and now - self.progress_at < _PROGRESS_SECONDS):
            return
        self.progress_at = now
        if loss_sum is None:
            images = self.state.history[-1].images
        else:
            images = self.state.epoch * self.batches.images + min(seen * self.workers, self.batches.images)
        elapsed, minutes = now - self.started, self.recipe.minutes
        total: int | None
        if minutes is None:
            total = self.recipe.epochs * self.batches.images
            left = (total - images) * elapsed / self.images_here if self.images_here else None
        else:
            # At first the clock tells nothing.
            total = round(images / min(self.time_share, 1.0)) if self.time_share > 0.002 else None
            left = 60.0 * minutes * max(0.0, 1.0 - self.time_share)
        known = self.images_here > 0 and elapsed >= _SPEED_SECONDS
        last = self.state.history[-1] if self.state.history else None
        shown = TrainProgress(
            epoch=epoch,
            epochs=None if total is None else -(-total // self.batches.images),
            images=images,
            total_images=total,
            loss=float(loss_sum) / seen if loss_sum is not None and seen else (last.loss if last else None),
            psnr=last.val_psnr_noisy if last else None,
            images_per_second=self.images_here / elapsed if elapsed > 0 else 0.0,
            seconds_left=left,
            workers=self.workers,
            device=self.device_name,
            epoch_seconds=elapsed * self.batches.images / self.images_here if known else None,
            trained=trained,
        )
        temporary = self.folder / f".{PROGRESS_FILE}"
        temporary.write_text(json.dumps(shown.to_json()), encoding="utf-8")
        temporary.replace(self.folder / PROGRESS_FILE)

    def _load(self) -> tuple[Batches, Validation]:
        """Reads the data, and noises what is noised once."""
        import ray

        config, rank, workers = self.config, self.rank, self.workers
        options = {"batch": self.recipe.batch, "seed": config.seed, "rank": rank, "workers": workers}
        held = partial(Validation, noise=self.noise, device=self.device, rank=rank, workers=workers)
        held = partial(held, drawn_beside=self.recipe.drawn_every > 0, blank_every=self.recipe.blank_every)
        if config.parquet is not None:
            parquet = config.parquet
            count = min(parquet.rows, config.max_images or parquet.rows)
            held_out = held_out_count(count, self.recipe.held_out)
            train, kept_rows = split(parquet.pieces, count, held_out)
            rows = count - held_out
            kept_images = load_rows(parquet, kept_rows)
            self.left_out = held_out - len(kept_images[0])
            validation = held(*kept_images)
            limit = config.resident_limit
            limit = quarter_of_memory(self.device) // config.workers_on_node if limit is None else limit
            if self.workers > 1:
                # All stream or none does, or they would share the rows out in two ways: machines may differ.
                least = torch.tensor(limit, device=self.device)
                distributed.all_reduce(least, distributed.ReduceOp.MIN)
                limit = int(least)
            copies = self.recipe.copies * 4 * 784 if parquet.noisy is None else 0
            if rows * (parquet.bytes_per_row + copies) > limit:
                if copies:
                    raise JobFailed(
                        f"{rows} images, noised {self.recipe.copies} times, do not fit in {limit} bytes",
                        hint="use a recipe that draws noise afresh, or --max-images",
                    )
                buffer = min(limit // 2, 256 << 20)
                options |= {"buffer_bytes": buffer, "epochs_of_pass": epochs_of_pass(rows)}
                return StreamedBatches(parquet, train, self.device, **options), validation
            clean_rows, noisy_rows = load_rows(parquet, train)
            self.left_out += rows - len(clean_rows)
        else:
            assert config.mnist is not None
            clean_rows, kept = ray.get(list(config.mnist))
            rows, noisy_rows = len(clean_rows), None
            validation = held(kept, None)
        clean = torch.from_numpy(np.require(clean_rows, requirements="W")).to(self.device)
        noisy = None if noisy_rows is None else torch.from_numpy(noisy_rows).to(self.device)
        if noisy is None and self.recipe.copies:
            noisy = noised_copies(self.noise, clean, self.recipe.copies, config.seed)
        options["epochs_of_pass"] = epochs_of_pass(rows * max(1, self.recipe.copies))
        return ResidentBatches(clean, noisy, **options), validation


def _psnr(error: float) -> float:
    return 10.0 * math.log10(1.0 / max(error, 1e-12))
