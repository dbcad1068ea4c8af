"""Recipes, and what settings are refused before anything is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from denoise_batch.errors import FlagError
from denoise_batch.precision import Precision
from denoise_batch.training.recipes import RECIPES, Keep, Optimiser, Schedule, TrainSettings

SETTINGS = TrainSettings(output=Path("model"))


def test_the_seed_recipe_to_the_letter() -> None:
    seed = RECIPES["seed"]
    assert (seed.architecture, seed.optimiser, seed.learning_rate) == ("seed", Optimiser.ADADELTA, 1.0)
    assert (seed.batch, seed.epochs, seed.copies, seed.held_out, seed.drawn_every) == (256, 500, 4, 0, 0)
    assert (seed.sigma, seed.half_range, seed.clipped) == ((0.0, 2.0), (0.01, 1.5), 0.0)
    assert (seed.schedule, seed.warm_up, seed.average, seed.patience) == (Schedule.CONSTANT, 0, 0.0, None)
    assert (seed.keep, seed.precision, seed.balance) == (Keep.LAST, Precision.FLOAT32, 0.0)


def test_settings_replace_the_recipes() -> None:
    recipe = replace(SETTINGS, epochs=3, batch=100, learning_rate=0.5, sigma=(1.0, 1.0)).resolve()
    assert (recipe.epochs, recipe.batch, recipe.learning_rate, recipe.sigma) == (3, 100, 0.5, (1.0, 1.0))
    assert recipe.architecture == RECIPES["default"].architecture
    assert SETTINGS.resolve() == RECIPES["default"]


def test_networks_that_expect_nothing_of_their_images_weigh_none() -> None:
    other = replace(SETTINGS, architecture="seed").resolve()
    assert (other.balance, RECIPES["default"].balance) == (0.0, 0.75)
    assert (other.foreign_every, RECIPES["default"].foreign_every) == (0, 16)
    assert replace(SETTINGS, architecture="bounds-unet").resolve() == RECIPES["default"]


def test_from_a_models_weights_the_rate_is_a_tenth() -> None:
    assert replace(SETTINGS, init=Path("m")).resolve().learning_rate == pytest.approx(5e-4)
    assert replace(SETTINGS, init=Path("m"), learning_rate=0.5).resolve().learning_rate == 0.5


def test_recipes_are_json() -> None:
    for recipe in RECIPES.values():
        assert json.loads(json.dumps(recipe.to_json())) == recipe.to_json()


def test_the_users_own_noise_leaves_no_copies() -> None:
    assert replace(SETTINGS, recipe="seed", data="x", noisy_column="n").resolve().copies == 0


@pytest.mark.parametrize(
    ("fields", "flag"),
    [
        ({"recipe": "best"}, "--recipe"),
        ({"epochs": 0}, "--epochs"),
        ({"minutes": 0.0}, "--minutes"),
        ({"minutes": float("inf")}, "--minutes"),
        ({"minutes": 5.0, "epochs": 2}, "--epochs and --minutes"),
        ({"batch": -1}, "--batch"),
        ({"workers": 0}, "--workers"),
        ({"workers": (4, 2)}, "--workers 4:2"),
        ({"max_images": 1}, "--max-images"),
        ({"patience": 0}, "--patience"),
        ({"seed": -1}, "--seed"),
        ({"seed": 2**63}, "--seed"),
        ({"learning_rate": 0.0}, "--lr"),
        ({"learning_rate": float("nan")}, "--lr"),
        ({"polarity": "black"}, "--polarity"),
        ({"polarity": "each"}, "--polarity each, but no --data"),
        ({"column": "image"}, "--column"),
        ({"noisy_column": "noisy"}, "--noisy-column"),
        ({"data": "x", "mnist": Path("y")}, "MNIST and Parquet"),
        ({"data": "x", "column": "a", "noisy_column": "a"}, "--noisy-column"),
        ({"data": "x", "noisy_column": "a", "sigma": (0.0, 1.0)}, "--noisy-column"),
    ],
)
def test_impossible_settings_are_refused(fields: dict[str, object], flag: str) -> None:
    with pytest.raises(FlagError) as caught:
        replace(SETTINGS, **fields).resolve()  # type: ignore[arg-type]
    assert flag in caught.value.message


def test_no_torch_and_no_ray_before_the_request_is_checked() -> None:
    code = "import sys; from denoise_batch.training import recipes, train; print({'torch', 'ray'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "set()"
