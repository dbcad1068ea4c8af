"""One step of a training: noise, forward and backward pass, the optimiser, the average of the weights.

    step = TrainingStep(network, average, optimiser, recipe, seed=0, workers=1)
    losses = step(batch, rate, number)

A step of a small network is hundreds of operations of a few microseconds each, and a GPU is done with one before Python
has asked for the next. So on a GPU the whole step is recorded once as a CUDA graph, which a single call then replays
with the numbers of the next step. Several GPUs average their gradients in between; there each operation is asked for.
"""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from denoise_batch.models.cuda_pass import end_of_recording, undisturbed
from denoise_batch.noise import NoiseRecipe
from denoise_batch.training.batches import noise_generator, noisy_images, with_other_content
from denoise_batch.training.objective import AllOutputs, cross_entropy, heads_loss, weight_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from denoise_batch.models.network import DenoisingNetwork
    from denoise_batch.training.batches import Batch
    from denoise_batch.training.recipes import Recipe

_EAGER_STEPS = 3  # before the recording: cuDNN chooses its algorithms, the optimiser makes its state


class TrainingStep:
    """Takes steps, and counts nothing: what number a step has is said to it.

    Args:
        network: in training; on a GPU, or the CPU.
        average: its moving average, or None where the recipe has none.
        optimiser: of the network's weights, its state already loaded.
        recipe: which losses, which average, what precision.
        seed: of the training, for the noise.
        workers: that train together.
    """

    def __init__(
        self,
        network: DenoisingNetwork,
        average: nn.Module | None,
        optimiser: torch.optim.Optimizer,
        recipe: Recipe,
        *,
        seed: int,
        workers: int,
    ) -> None:
        self._network, self._average, self._optimiser, self._recipe = network, average, optimiser, recipe
        self._seed, self._workers = seed, workers
        self._device = next(network.parameters()).device
        self._bfloat16 = recipe.precision.bfloat16(self._device)
        self._noise = NoiseRecipe.from_json(recipe.noise_json())
        self._trained: nn.Module = AllOutputs(network)
        if workers > 1:
            # Buffers hold what is chosen after the training.
            self._trained = nn.parallel.DistributedDataParallel(
                self._trained, gradient_as_bucket_view=True, broadcast_buffers=False
            )
        self._records = self._device.type == "cuda" and workers == 1
        self._pool: Any = torch.cuda.graph_pool_handle() if self._records else None
        self._may_record = self._records
        self._recorded: dict[int, _Recorded] = {}  # by the batch's images: an epoch's last one has fewer
        self._taken: Counter[int] = Counter()
        # What a recording holds are places in memory, so these two numbers stand in some.
        self._rate = torch.zeros((), device=self._device)
        self._follow = torch.zeros((), device=self._device)
        if self._records:
            for group in optimiser.param_groups:
                group["lr"] = self._rate

    def __call__(self, batch: Batch, rate: float, number: int) -> Tensor:
        """One step of the optimiser.

        Args:
            batch: this worker's share.
            rate: the learning rate.
            number: of the step, from 0.

        Returns:
            The sum of the losses of this worker's images, (); overwritten by the next step.
        """
        # Early on the average follows closely, so that it does not carry the random start along.
        follow = 1.0 - min(self._recipe.average, (1 + number) / (10 + number))
        if not self._records:
            for group in self._optimiser.param_groups:
                group["lr"] = rate
            generator = noise_generator(self._seed, number, self._device)
            return self._step(*noised(batch, self._recipe, self._noise, generator), follow)
        self._rate.fill_(rate)
        self._follow.fill_(follow)
        if batch.total in self._recorded:
            return self._recorded[batch.total].replay(batch, self._seed, number)
        losses = self._recordable(batch, noise_generator(self._seed, number, self._device))
        self._taken[batch.total] += 1
        if self._may_record and self._taken[batch.total] == _EAGER_STEPS:
            self._record(batch)
        return losses

    def _record(self, batch: Batch) -> None:
        try:
            self._recorded[batch.total] = _Recorded(batch, self._recordable, self._pool)
        except RuntimeError as error:  # of memory, most likely: then it goes on as it did before
            self._may_record = False
            self._optimiser.zero_grad(set_to_none=True)  # what was recorded of them is no gradient
            end_of_recording(self._device, self._pool)
            warnings.warn(f"the step cannot be recorded as a CUDA graph: {error}", RuntimeWarning, stacklevel=2)

    def _recordable(self, batch: Batch, generator: torch.Generator) -> Tensor:
        return self._step(*noised(batch, self._recipe, self._noise, generator), self._follow)

    def _step(self, batch: Batch, noisy: Tensor, level: Tensor, follow: float | Tensor) -> Tensor:
        rows, clean, counts = batch.rows.stop - batch.rows.start, batch.clean, batch.counts
        if rows == 0:  # a last batch smaller than the number of workers: take part in the step, with weight 0
            clean = noisy = torch.zeros((1, *batch.clean.shape[1:]), device=self._device)
            level, counts = torch.zeros(1, device=self._device), None
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bfloat16, cache_enabled=False):
            outputs = self._trained(noisy[:, None])
        losses = cross_entropy(outputs.logits.float(), clean[:, None])
        if counts is not None:
            losses = losses * counts
        objective = (losses * weight_of(outputs.quality, self._recipe.balance)).mean()
        objective = objective + heads_loss(outputs, noisy[:, None], clean[:, None], level, counts)
        # DDP averages over workers: this weight makes that the mean over the global batch, whatever each one's share.
        (objective * (rows * self._workers / batch.total)).backward()
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        if self._average is not None:
            _move_average(list(self._average.parameters()), list(self._network.parameters()), follow)
        total: Tensor = losses.detach()[:rows].sum()
        return total


@torch.no_grad()
def _move_average(average: list[Any], weights: list[Any], share: float | Tensor) -> None:
    """Moves the average by a share of the way to the weights."""
    if isinstance(share, float):
        torch._foreach_lerp_(average, weights, share)
        return
    way = torch._foreach_sub(weights, average)
    torch._foreach_mul_(way, share)
    torch._foreach_add_(average, way)


def noised(
    batch: Batch, recipe: Recipe, noise: NoiseRecipe, generator: torch.Generator
) -> tuple[Batch, Tensor, Tensor]:
    """The batch with all that a recipe has in it, its noisy images, and their noise levels, (n,).

    Args:
        noise: the recipe's.
        generator: `noise_generator`'s.
    """
    batch = with_other_content(
        batch,
        blank_every=recipe.blank_every,
        foreign_every=recipe.foreign_every,
        foreign_still=recipe.foreign_still,
        drawn_every=recipe.drawn_every,
        generator=generator,
    )
    return batch, *noisy_images(batch, noise, recipe.drawn_every, generator)


class _Recorded:
    """A step as a CUDA graph.

    Args:
        batch: one like those to come. Nothing is trained on it here.
        step: takes the batch and a generator, and gives the sum of losses.
        pool: memory for it, shared with recordings that are never replayed at the same time.
    """

    def __init__(self, batch: Batch, step: Callable[[Batch, torch.Generator], Tensor], pool: Any) -> None:
        self._generator = torch.Generator(batch.clean.device)
        noisy = None if batch.noisy is None else batch.noisy.clone()
        self._batch = replace(batch, clean=batch.clean.clone(), noisy=noisy)
        self._graph = torch.cuda.CUDAGraph()
        self._graph.register_generator_state(self._generator)
        # On the stream of the steps before, as far as that is one that can be recorded.
        stream = torch.cuda.current_stream()
        with (
            undisturbed(),
            torch.cuda.graph(self._graph, pool, None if stream == torch.cuda.default_stream() else stream),
        ):
            self._losses = step(self._batch, self._generator)

    def replay(self, batch: Batch, seed: int, number: int) -> Tensor:
        self._batch.clean.copy_(batch.clean)
        if batch.noisy is not None and self._batch.noisy is not None:
            self._batch.noisy.copy_(batch.noisy)
        noise_generator(seed, number, self._generator.device, self._generator)
        self._graph.replay()
        return self._losses
