"""A training's checkpoint: a folder of safetensors and JSON, never pickle.

    weights.safetensors     the network's weights
    average.safetensors     their moving average, which is validated and kept
    best.safetensors        the average of the best epoch
    optimiser.safetensors   the optimiser's state, `INDEX.NAME` for each parameter
    state.json              step, epoch, history, best epoch

There are no states of random generators in it: every order and every noise is drawn from a seed made of the training's
seed and the epoch or step, so the step says it all.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from denoise_batch import models
from denoise_batch.bundle.history import EpochRow
from denoise_batch.errors import FlagError, JobFailed, first_line
from denoise_batch.storage import publishing

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor, nn

    from denoise_batch.bundle import Bundle
    from denoise_batch.training.recipes import Recipe

Weights = dict[str, "Tensor"]


@dataclass
class TrainingState:
    """Where a training stands after an epoch.

    Attributes:
        epoch: epochs done.
        step: steps done.
        history: a row for each epoch.
        best_epoch: the one with the best `EpochRow.val_mean_psnr`; 0 before the first.
        stopped_early: whether the recipe's patience has run out.
        workers, device: where the last epoch ran; the device is `cpu` or a GPU's name.
        rows_left_out: of the data, validation among them: those without an image that could be used. Where a pass over
            the set takes several epochs, those of the last whole pass, or of what has been read of the first.
        rows_left_out_now: the same, of the running pass.
    """

    epoch: int = 0
    step: int = 0
    history: list[EpochRow] = field(default_factory=list)
    best_epoch: int = 0
    stopped_early: bool = False
    workers: int = 0
    device: str = ""
    rows_left_out: int = 0
    rows_left_out_now: int = 0

    @property
    def best(self) -> EpochRow | None:
        """The best epoch's row."""
        return self.history[self.best_epoch - 1] if self.best_epoch else None

    def count_left_out(self, before: int, rows: int | None, epochs_of_pass: int) -> None:
        """Counts the rows that the running epoch left out, beside those left out before the first one.

        Args:
            rows: None where the clock ended it on its way.
        """
        part = self.epoch % epochs_of_pass
        self.rows_left_out_now = (rows or 0) + (self.rows_left_out_now if part else before)
        whole = part == epochs_of_pass - 1 and rows is not None
        if whole or self.epoch < epochs_of_pass:
            self.rows_left_out = self.rows_left_out_now


def weights_of(module: nn.Module) -> Weights:
    """A copy of a module's weights on the CPU, contiguous, as safetensors takes them."""
    return {name: value.detach().cpu().contiguous().clone() for name, value in module.state_dict().items()}


def initial_weights(bundle: Bundle, recipe: Recipe) -> Weights:
    """A model folder's weights, to begin a training of the recipe's network with.

    Raises:
        FlagError: they are another network's.
        ModelError: the folder is damaged.
    """
    hint = "name a model of the same network, or choose its --architecture"
    if bundle.architecture != recipe.architecture:
        raise FlagError(
            f"--init {bundle.folder}: its network is {bundle.architecture!r}, this training's {recipe.architecture!r}",
            hint=hint,
        )
    weights = weights_of(bundle.load())
    expected = models.build(recipe.architecture, recipe.parameters).state_dict()
    for name in sorted(weights.keys() | expected.keys()):
        its, ours = (tuple(held[name].shape) if name in held else "missing" for held in (weights, expected))
        if its != ours:
            raise FlagError(
                f"--init {bundle.folder}: its tensor {name!r} is {its}, this training's network's is {ours}", hint=hint
            )
    return weights


def save_checkpoint(
    folder: Path,
    state: TrainingState,
    network: nn.Module,
    average: nn.Module | None,
    best: Weights,
    optimiser: torch.optim.Optimizer,
) -> None:
    """Writes a checkpoint into an empty folder."""
    _save(weights_of(network), folder / "weights.safetensors")
    if average is not None:
        _save(weights_of(average), folder / "average.safetensors")
    _save(best, folder / "best.safetensors")
    tensors: Weights = {}
    for index, values in optimiser.state_dict()["state"].items():
        for name, value in values.items():
            tensors[f"{index}.{name}"] = torch.as_tensor(value).detach().cpu().contiguous().clone()
    _save(tensors, folder / "optimiser.safetensors")
    (folder / "state.json").write_text(json.dumps(asdict(state)), encoding="utf-8")


def _save(tensors: Weights, path: Path) -> None:
    """Safetensors' own writing says that a disk is full in an error of its own, which nobody would know it by."""
    path.write_bytes(save(tensors))


@contextlib.contextmanager
def _sound(folder: Path) -> Iterator[None]:
    """Says which folder it is that cannot be read: after a power cut, say."""
    try:
        yield
    except (SafetensorError, ValueError, KeyError, TypeError, FileNotFoundError) as error:
        raise JobFailed(
            f"{folder} is damaged: {first_line(error)}",
            hint="remove the folder around it whose name ends in .training, to begin again",
        ) from error


def _read_state(folder: Path) -> TrainingState:
    fields: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return TrainingState(**fields | {"history": [EpochRow(**row) for row in fields["history"]]})


def load_checkpoint(
    folder: Path, network: nn.Module, average: nn.Module | None, optimiser: torch.optim.Optimizer
) -> tuple[TrainingState, Weights]:
    """Puts a checkpoint into the network, its average and the optimiser, all as they were made.

    Returns:
        The state, and the best epoch's weights.

    Raises:
        JobFailed: it is damaged.
    """
    with _sound(folder):
        found, best = _read_state(folder), load_file(folder / "best.safetensors")
        weights, of_optimiser = (load_file(folder / f"{name}.safetensors") for name in ("weights", "optimiser"))
        averaged = None if average is None else load_file(folder / "average.safetensors")
    network.load_state_dict(weights)
    if average is not None and averaged is not None:
        average.load_state_dict(averaged)
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in of_optimiser.items():
        index, name = key.split(".", 1)
        if value.shape == parameters[int(index)].shape:
            # The optimiser's kernels walk through state and weights side by side: they must lie in memory alike.
            value = torch.empty_like(parameters[int(index)], dtype=value.dtype).copy_(value)
        state.setdefault(int(index), {})[name] = value
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    return found, best


def write_finished(folder: Path, state: TrainingState, weights: Weights) -> None:
    """Writes a finished training's state and the weights to keep: a folder that is whole or does not exist."""
    building = folder.with_name(f"{folder.name}.writing")
    publishing.remove(building)
    building.mkdir()
    publishing.write_file(building / "weights.safetensors", save(weights))
    publishing.write_file(building / "state.json", json.dumps(asdict(state)).encode())
    publishing.publish(building, folder, overwrite=True)


def read_finished(folder: Path) -> tuple[TrainingState, Weights]:
    """What `write_finished` wrote.

    Raises:
        JobFailed: it is damaged.
    """
    with _sound(folder):
        return _read_state(folder), load_file(folder / "weights.safetensors")
