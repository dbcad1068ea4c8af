"""How a recipe trains a network: the optimiser, and its learning rate over the steps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from denoise_batch.training.muon import Muon
from denoise_batch.training.recipes import Optimiser, Recipe, Schedule

if TYPE_CHECKING:
    from torch import nn


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """The learning rate of step `step` (from 0) of `steps`: a linear warm-up, then constant or a half cosine to 0."""
    warm_up = min(recipe.warm_up, steps // 10)
    if step < warm_up:
        return recipe.learning_rate * (step + 1) / warm_up
    if recipe.schedule is Schedule.CONSTANT:
        return recipe.learning_rate
    return recipe.learning_rate * 0.5 * (1.0 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def make_optimiser(recipe: Recipe, network: nn.Module, *, workers: int = 1) -> torch.optim.Optimizer:
    """The recipe's optimiser of a network that is on its device; on a GPU one that a CUDA graph can hold.

    Args:
        workers: that train together.
    """
    on_gpu = next(network.parameters()).is_cuda
    if recipe.optimiser is Optimiser.ADADELTA:
        return torch.optim.Adadelta(
            network.parameters(), lr=recipe.learning_rate, rho=0.95, eps=1e-7, capturable=on_gpu
        )
    if recipe.optimiser is Optimiser.MUON:
        # On a GPU the matrices take a sixth of a step; sharing them out was not tried there.
        sharing = 1 if on_gpu else workers
        return Muon(network.parameters(), recipe.learning_rate, recipe.weight_decay, workers=sharing)
    matrices = [parameter for parameter in network.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in network.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, fused=True, capturable=on_gpu)
