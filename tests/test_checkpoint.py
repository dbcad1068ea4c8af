"""Checkpoints: going on from one is the same as never having stopped."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from denoise_batch.bundle import read_bundle
from denoise_batch.bundle.history import EpochRow
from denoise_batch.bundle.saving import BundleCard, save_bundle
from denoise_batch.errors import FlagError, JobFailed
from denoise_batch.models import build
from denoise_batch.training.checkpoint import (
    TrainingState,
    initial_weights,
    load_checkpoint,
    read_finished,
    save_checkpoint,
    weights_of,
    write_finished,
)
from denoise_batch.training.optimisation import learning_rate, make_optimiser
from denoise_batch.training.recipes import RECIPES

ROW = EpochRow(1, 100, 0.5, 0.4, 11.0, 12.0, 1e-3, 900.0, 3.25, None, 13.0)


def _steps(network: nn.Module, optimiser: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        images = torch.rand((4, 1, 28, 28), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.binary_cross_entropy_with_logits(network.logits(images), images)  # type: ignore[operator]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


@pytest.mark.slow
@pytest.mark.parametrize("name", list(RECIPES))
def test_going_on_equals_never_stopping(tmp_path: Path, name: str) -> None:
    recipe = RECIPES[name]
    torch.manual_seed(0)
    network = build(recipe.architecture).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = copy.deepcopy(network)
    optimiser = make_optimiser(recipe, network)
    _steps(network, optimiser, 0, 3)
    state = TrainingState(epoch=1, step=3, history=[ROW], best_epoch=1)
    best = weights_of(average)
    save_checkpoint(tmp_path, state, network, average, best, optimiser)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}

    resumed = build(recipe.architecture).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    resumed_average = copy.deepcopy(resumed)
    resumed_optimiser = make_optimiser(recipe, resumed)
    found, found_best = load_checkpoint(tmp_path, resumed, resumed_average, resumed_optimiser)
    assert found == state
    assert found.best == ROW
    assert TrainingState().best is None
    assert all(torch.equal(found_best[key], value) for key, value in best.items())
    _steps(network, optimiser, 3, 6)
    _steps(resumed, resumed_optimiser, 3, 6)
    for key, value in network.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[key], value, rtol=0, atol=0)
    for key, value in average.state_dict().items():
        assert torch.equal(resumed_average.state_dict()[key], value)
    for parameter, values in resumed_optimiser.state.items():
        assert all(value.stride() == parameter.stride() for value in values.values() if value.shape == parameter.shape)


@pytest.mark.parametrize("name", ["weights", "average", "best", "optimiser", "state"])
@pytest.mark.parametrize("left", [0, 100])
def test_a_checkpoint_that_was_cut_off_is_named_and_nothing_of_it_is_taken(
    tmp_path: Path, name: str, left: int
) -> None:
    """What a power cut leaves."""
    recipe, parameters = RECIPES["default"], {"width": 8, "deep": 8, "bottleneck": 16}
    network, other = (build(recipe.architecture, parameters) for _ in range(2))
    _steps(network, optimiser := make_optimiser(recipe, network), 0, 1)
    save_checkpoint(tmp_path, TrainingState(history=[ROW]), network, network, weights_of(network), optimiser)
    path = tmp_path / f"{name}.{'json' if name == 'state' else 'safetensors'}"
    path.write_bytes(path.read_bytes()[:left])
    before = weights_of(other)
    with pytest.raises(JobFailed, match=f"{tmp_path} is damaged: "):
        load_checkpoint(tmp_path, other, other, make_optimiser(recipe, other))
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


def test_a_finished_training_that_was_cut_off_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "finished"
    for name in ("weights.safetensors", "state.json"):
        write_finished(folder, TrainingState(history=[ROW]), weights_of(build("seed")))
        assert read_finished(folder)[0].history == [ROW]
        (folder / name).write_bytes(b"")
        with pytest.raises(JobFailed, match=f"{folder} is damaged: "):
            read_finished(folder)


def test_the_learning_rate_warms_up_and_falls() -> None:
    recipe = RECIPES["default"]
    rates = [learning_rate(recipe, step, 10_000) for step in range(10_000)]
    assert rates[0] == pytest.approx(recipe.learning_rate / recipe.warm_up)
    assert max(rates) == pytest.approx(recipe.learning_rate)
    assert rates.index(max(rates)) in (recipe.warm_up - 1, recipe.warm_up)
    assert 0 < rates[-1] < 1e-3 * recipe.learning_rate
    assert {learning_rate(RECIPES["seed"], step, 100) for step in range(100)} == {1.0}


def test_a_short_training_warms_up_for_a_tenth() -> None:
    rates = [learning_rate(RECIPES["default"], step, 50) for step in range(50)]
    assert rates.index(max(rates)) in (4, 5)
    assert learning_rate(RECIPES["default"], 0, 1) > 0


def test_a_training_starts_from_a_models_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    before = build("bounds-unet")
    save_bundle(tmp_path / "model", before, BundleCard("bounds-unet", before.parameters_json))
    weights = initial_weights(read_bundle(tmp_path / "model"), RECIPES["default"])
    network = build("bounds-unet")
    network.load_state_dict(weights)
    noisy = torch.rand((2, 1, 28, 28))
    assert torch.equal(network.logits(noisy), before.logits(noisy))


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    save_bundle(tmp_path / "seed", build("seed"), BundleCard("seed"))
    narrow = build("bounds-unet", {"width": 8})
    save_bundle(tmp_path / "narrow", narrow, BundleCard("bounds-unet", narrow.parameters_json))
    with pytest.raises(FlagError, match=r"--init .*seed: its network is 'seed'"):
        initial_weights(read_bundle(tmp_path / "seed"), RECIPES["default"])
    with pytest.raises(FlagError, match=r"narrow: its tensor '.*' is"):
        initial_weights(read_bundle(tmp_path / "narrow"), RECIPES["default"])


def test_rows_left_out_are_those_of_a_whole_pass() -> None:
    state = TrainingState()
    found = []
    for rows in (3, 0, 2, 1, 1, 7):  # two passes of three epochs, and 10 rows left out before
        state.count_left_out(10, rows, 3)
        found.append(state.rows_left_out)
        state.epoch += 1
    assert found == [13, 13, 15, 15, 15, 19]
    state = TrainingState(epoch=4, rows_left_out=9)
    state.count_left_out(2, 5, 1)
    assert state.rows_left_out == 7
    state.count_left_out(2, None, 1)  # cut short: what the last whole pass found stands
    assert state.rows_left_out == 7
    state = TrainingState()
    state.count_left_out(2, None, 1)
    assert state.rows_left_out == 2


def test_a_full_disk_is_an_error_of_the_system(tmp_path: Path) -> None:
    """Not one of safetensors' own, after which the training would be tried five times more."""
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no such device")
    (tmp_path / "weights.safetensors").symlink_to(full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, TrainingState(), build("seed"), None, {}, torch.optim.SGD(build("seed").parameters()))
