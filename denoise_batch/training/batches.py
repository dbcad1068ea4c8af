"""Global batches, shared by any number of workers.

Every worker walks through the same sequence of global batches and takes its share of each, so that a step's gradient
is the same for any number of workers, dividing the batch or not. The noise of a whole global batch is drawn by every
worker from a generator that the step seeds; each worker applies its share. Images that come with noise of their own
keep it, but for some.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from denoise_batch.noise import SIDE, NoiseRecipe, noise_level
from denoise_batch.training.foreign_content import draw_foreign_content

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


MOST_EPOCH = 1 << 21
"""Images of an epoch at most. Going through a larger set once takes several epochs, so that it is validated, and kept,
within an hour of two cores rather than never."""

ORDER, NOISE, COPIES, BUFFER = range(4)  # what a seed is for, so that no two streams of numbers are the same


def seed_of(*numbers: int) -> int:
    """One seed of 63 bits from several numbers, each different choice giving an unrelated stream."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def share(total: int, rank: int, workers: int) -> slice:
    """The rows of a global batch of `total` that are worker `rank`'s: shares differ by one at most."""
    return slice(total * rank // workers, total * (rank + 1) // workers)


def epochs_of_pass(images: int) -> int:
    """How many epochs it takes to go through a set of so many images once."""
    return max(1, -(-images // MOST_EPOCH))


def place_of(epoch: int, epochs_of_pass: int) -> tuple[int, int]:
    """Which pass over the set an epoch belongs to, both from 1, and which of its epochs that is, from 0.

    All epochs have as many images, so that a pass may leave out one for each of its epochs less one, others each time.
    """
    done, part = divmod(epoch - 1, epochs_of_pass)
    return 1 + done, part


@dataclass(frozen=True)
class Batch:
    """One worker's share of a global batch.

    Attributes:
        clean: (n, 28, 28) float32 in 0..1, on the device.
        noisy: the same images noised, not clipped, or None where noise is to be drawn.
        rows: which rows of the global batch these are; n = rows.stop - rows.start, which may be 0.
        total: images in the global batch.
        counts: (n,) float32, what each image counts in what the network learns to make: 0 for foreign content, of which
            only its quality head learns, and more than 1 for the others, so that the global batch counts `total`. None
            counts 1 each.
        still: (n,) bool, which images get neither blur nor noise, whatever is drawn; None for none.
    """

    clean: Tensor
    noisy: Tensor | None
    rows: slice
    total: int
    counts: Tensor | None = None
    still: Tensor | None = None


class Batches(Protocol):
    """A training set.

    Attributes:
        images: in an epoch, over all workers.
        epochs_of_pass: how many epochs it takes to go through the set once.
        left_out: rows whose image could not be used, that this worker met in the last epoch that it read to its end.
    """

    images: int
    epochs_of_pass: int
    left_out: int

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """This worker's share of each global batch of an epoch, in the random order of its pass over the set."""
        ...


def noise_generator(
    seed: int, step: int, device: torch.device, generator: torch.Generator | None = None
) -> torch.Generator:
    """The generator of a step's noise: a new one, or `generator` set to its start."""
    return (generator or torch.Generator(device)).manual_seed(seed_of(seed, NOISE, step))


def draw_noise(recipe: NoiseRecipe, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noises a worker's share of a global batch.

    Image i of step t gets the same noise from any number of workers: drawing costs little, so every worker draws for
    the whole batch, and degrades its share alone.

    Args:
        generator: `noise_generator`'s.

    Returns:
        (n, 28, 28) float32, not clipped but for the recipe's share of clipped images; and each one's noise level, (n,).
    """
    draw = recipe.draw(batch.total, generator, batch.clean.device)[batch.rows]
    return (draw if batch.still is None else draw.without(batch.still)).degrade(batch.clean)


def noisy_images(batch: Batch, recipe: NoiseRecipe, every: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What a step trains on: the batch's own noisy images, each so many-th replaced by drawn noise; or drawn noise.

    Args:
        every: of the global batch, so that it does not depend on the workers; 0 for none.
        generator: `noise_generator`'s.

    Returns:
        As `draw_noise`.
    """
    if batch.noisy is None:
        return draw_noise(recipe, batch, generator)
    level = noise_level(batch.noisy, batch.clean)
    if not every or batch.rows.stop // every == batch.rows.start // every:
        return batch.noisy, level
    places = _places(batch, every)
    numbers = slice(batch.rows.start // every, batch.rows.stop // every)  # among all that are drawn
    still = None if batch.still is None else batch.still[places]
    part = Batch(batch.clean[places], None, numbers, batch.total // every, still=still)
    drawn = draw_noise(recipe, part, generator)
    noisy = batch.noisy.clone()
    noisy[places], level[places] = drawn
    return noisy, level


def with_other_content(
    batch: Batch,
    *,
    blank_every: int,
    foreign_every: int,
    foreign_still: float,
    drawn_every: int,
    generator: torch.Generator,
) -> Batch:
    """The batch with some images that are no digits.

    Each so many-th is empty, as cells of forms are, so that no strokes are made of the noise of such ones; and each so
    many-th is something else, for what the network says of its own images. Of images that come with noise of their
    own, those that get drawn noise instead can be empty, and each so many-th of them is something else.

    Args:
        blank_every, foreign_every: of the global batch, so that they do not depend on the workers; 0 for none, and not
            1. An image that would be both is empty. A batch of fewer has none.
        foreign_still: share of what is something else that is `Batch.still`, drawn for each.
        drawn_every: as `noisy_images` has it.
        generator: `noise_generator`'s.
    """
    if batch.noisy is not None:
        foreign_every *= drawn_every
        if not drawn_every or blank_every % drawn_every:
            blank_every = 0
    blank, foreign = (batch.total // every if every else 0 for every in (blank_every, foreign_every))
    if not blank and not foreign:
        return batch
    clean, counts, still = batch.clean.clone(), None, None
    if foreign:
        places = _places(batch, foreign_every)
        first = batch.rows.start // foreign_every
        clean[places] = draw_foreign_content(clean[places], generator, total=foreign, first=first)
        counts = torch.ones_like(clean[:, 0, 0])
        counts[places] = 0.0
        still = torch.zeros_like(counts, dtype=torch.bool)
        lots = torch.rand(foreign, generator=generator, device=clean.device)
        still[places] = lots[first : first + len(clean[places])] < foreign_still
    if blank:
        places = _places(batch, blank_every)
        clean[places] = 0.0
        if counts is not None and still is not None:
            counts[places], still[places] = 1.0, False
            foreign -= batch.total // math.lcm(blank_every, foreign_every)
    if counts is not None:
        counts *= batch.total / (batch.total - foreign)
    return replace(batch, clean=clean, counts=counts, still=still)


def _places(batch: Batch, every: int) -> slice:
    """Each so many-th image of the global batch, in this worker's share."""
    return slice((every - 1 - batch.rows.start) % every, None, every)


def to_unit(images: Tensor) -> Tensor:
    """uint8 0..255 → float32 0..1; float32 stays."""
    return images.to(torch.float32) / 255.0 if images.dtype == torch.uint8 else images


class ResidentBatches:
    """A training set that is wholly on the device.

    Args:
        clean: (n, 28, 28) uint8 or float32, on the device.
        noisy: (k n, 28, 28) uint8 or float32, k noisy copies of the clean images one after the other; or None.
        batch: images of a global batch.
        seed: of the order.
        rank, workers: which share is this worker's.
        epochs_of_pass: how many epochs it takes to go through the set once, `epochs_of_pass` of its rows.
    """

    def __init__(
        self,
        clean: Tensor,
        noisy: Tensor | None,
        *,
        batch: int,
        seed: int,
        rank: int,
        workers: int,
        epochs_of_pass: int = 1,
    ) -> None:
        self._clean, self._noisy, self._batch, self._seed = clean, noisy, batch, seed
        self._rank, self._workers = rank, workers
        self._all, self.epochs_of_pass = len(clean) if noisy is None else len(noisy), epochs_of_pass
        self.images = self._all // epochs_of_pass
        self.left_out = 0  # before they came here
        self._order: tuple[int, Tensor] | None = None  # of a pass

    def epoch(self, epoch: int) -> Iterator[Batch]:
        number, part = place_of(epoch, self.epochs_of_pass)
        if self._order is None or self._order[0] != number:
            generator = torch.Generator().manual_seed(seed_of(self._seed, ORDER, number))
            # The order is drawn on the CPU, where every worker and every device gets the same.
            self._order = number, torch.randperm(self._all, generator=generator)
        order = self._order[1][part * self.images : (part + 1) * self.images].to(self._clean.device)
        for start in range(0, self.images, self._batch):
            chosen = order[start : start + self._batch]
            rows = share(len(chosen), self._rank, self._workers)
            mine = chosen[rows]
            clean = to_unit(self._clean[mine % len(self._clean)])
            yield Batch(clean, None if self._noisy is None else to_unit(self._noisy[mine]), rows, len(chosen))


def noised_copies(recipe: NoiseRecipe, clean: Tensor, copies: int, seed: int) -> Tensor:
    """Noises copies of all images once, as the seed's recipe does before its training.

    Args:
        clean: (n, 28, 28) uint8 or float32.

    Returns:
        (copies × n, 28, 28) float32 on clean's device: 3,136 bytes an image.
    """
    generator = torch.Generator(clean.device).manual_seed(seed_of(seed, COPIES))
    noisy = torch.empty((copies * len(clean), SIDE, SIDE), device=clean.device)
    for start in range(0, len(noisy), 4096):
        stop = min(start + 4096, len(noisy))
        index = torch.arange(start, stop, device=clean.device) % len(clean)
        noisy[start:stop] = recipe.apply(to_unit(clean[index]), generator)[0]
    return noisy
