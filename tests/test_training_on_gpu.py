"""On a GPU, a step that is replayed as a CUDA graph is the step that Python would have asked for, one by one.

Skipped where there is none.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from denoise_batch import models
from denoise_batch.digits import draw_digits
from denoise_batch.training import step as training_step
from denoise_batch.training.batches import ResidentBatches
from denoise_batch.training.optimisation import learning_rate, make_optimiser
from denoise_batch.training.recipes import RECIPES, Optimiser, Recipe, Schedule

if TYPE_CHECKING:
    from torch import nn

pytestmark = pytest.mark.gpu

RECIPE = replace(RECIPES["default"], warm_up=5)


def train(recipe: Recipe, *, noisy: bool = False) -> tuple[list[float], nn.Module]:
    """The losses of 40 steps in epochs of three and a half batches, and the network."""
    torch.manual_seed(0)
    device = torch.device("cuda")
    network = models.build(recipe.architecture).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = copy.deepcopy(network) if recipe.average else None
    optimiser = make_optimiser(recipe, network)
    take = training_step.TrainingStep(network, average, optimiser, recipe, seed=1, workers=1)
    clean = torch.from_numpy(draw_digits(7 * recipe.batch // 2, seed=0)[0]).to(device)
    copies = (clean.float() / 255 + 0.3).repeat(2, 1, 1) if noisy else None
    data = ResidentBatches(clean, copies, batch=recipe.batch, seed=2, rank=0, workers=1)
    losses: list[float] = []
    epoch = 0
    while len(losses) < 40:
        epoch += 1
        for batch in data.epoch(epoch):
            losses.append(float(take(batch, learning_rate(recipe, len(losses), 40), len(losses))))
    return losses, average or network


@pytest.mark.parametrize(
    ("recipe", "noisy"),
    [
        (RECIPE, False),
        (RECIPE, True),
        (replace(RECIPES["few-levels"], parameters={}), False),
        (replace(RECIPE, optimiser=Optimiser.ADAMW, learning_rate=2e-3, average=0.0), False),
        (replace(RECIPES["seed"], schedule=Schedule.COSINE), False),
    ],
    ids=["default", "noise from the data", "few levels", "AdamW", "Adadelta"],
)
def test_recorded_steps_are_the_same_steps(recipe: Recipe, noisy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded, network = train(recipe, noisy=noisy)
    monkeypatch.setattr(training_step, "_EAGER_STEPS", 10**9)
    asked_for, other = train(recipe, noisy=noisy)
    assert recorded[-1] < 0.9 * recorded[0]
    assert recorded == pytest.approx(asked_for, rel=0.02)
    assert recorded[:8] == pytest.approx(asked_for[:8], rel=1e-4)
    for one, two in zip(network.parameters(), other.parameters(), strict=True):
        one, two = one.detach(), two.detach()
        assert float((one - two).norm()) <= 0.05 * float(two.norm()) + 1e-3
