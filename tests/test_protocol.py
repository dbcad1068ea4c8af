"""The noise is published: it must not depend on how it is asked for. The filters' settings must be what they claim."""

from __future__ import annotations

import os

import numpy as np
import pytest

from denoise_batch.evaluation import protocol
from denoise_batch.evaluation.baselines import GRIDS, Filter

LEVELS = {condition.key: condition for condition in protocol.CONDITIONS}

OTHER = ["kinds", "gaussian", "gaussian8", "impulse", "blur", "faint", "levels", "grain"]

PUBLISHED = [-1.1518, -1.0728, 1.21013, 1.22768]  # noisy pixels of the mixture's first image, row 10, columns 10..13


@pytest.fixture(scope="module")
def clean() -> np.ndarray:
    images = np.zeros((20, 28, 28), np.float32)
    images[:, 6:22, 12:16] = 1.0
    return images


def test_the_conditions_are_the_mixture_its_clipped_twin_six_levels_and_other_kinds() -> None:
    assert list(LEVELS) == ["mixture", "uint8", "i=0", "i=1", "i=2", "i=3", "i=4", "i=5", *OTHER]
    assert [condition.key for condition in protocol.CONDITIONS if condition.other] == OTHER
    assert [condition.key for condition in protocol.CONDITIONS if condition.beyond_training] == ["i=4", "i=5"]


@pytest.mark.parametrize("key", list(LEVELS))
def test_an_images_noise_does_not_depend_on_how_many_follow(clean: np.ndarray, key: str) -> None:
    few = protocol.degrade_images(clean[:3], LEVELS[key])
    np.testing.assert_array_equal(few, protocol.degrade_images(clean, LEVELS[key])[:3])


def test_blocks_and_seeds_have_noise_of_their_own(clean: np.ndarray) -> None:
    base = protocol.degrade_images(clean, LEVELS["i=1"])
    assert not np.array_equal(base, protocol.degrade_images(clean, LEVELS["i=1"], block=1))
    assert not np.array_equal(base, protocol.degrade_images(clean, LEVELS["i=1"], seed=1))


def test_the_clipped_condition_is_the_mixture_clipped_and_rounded(clean: np.ndarray) -> None:
    mixture = protocol.degrade_images(clean, LEVELS["mixture"])
    rounded = np.rint(mixture.clip(0, 1) * 255) / 255
    np.testing.assert_allclose(protocol.degrade_images(clean, LEVELS["uint8"]), rounded, atol=1e-6)


def test_level_zero_leaves_images_alone_and_level_five_is_loud(clean: np.ndarray) -> None:
    np.testing.assert_array_equal(protocol.degrade_images(clean, LEVELS["i=0"]), clean)
    loud = protocol.degrade_images(clean, LEVELS["i=5"])
    assert loud.min() == pytest.approx(-2.0, abs=0.01)


def test_published_noise_stays_what_it_is(clean: np.ndarray) -> None:
    # A change here changes every published table: then publish them all again.
    noisy = protocol.degrade_images(clean, LEVELS["mixture"])
    np.testing.assert_allclose(noisy[0, 10, 10:14], PUBLISHED, atol=1e-5)


def test_every_condition_has_a_setting_from_the_grid() -> None:
    assert list(protocol.FILTER_SETTINGS) == list(LEVELS)
    for settings in protocol.FILTER_SETTINGS.values():
        assert all(settings[kind] in GRIDS[kind] for kind in Filter)


def test_settings_are_chosen_by_squared_error(clean: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "CONDITIONS", (LEVELS["i=0"],))
    images = np.rint(clean * 255).astype(np.uint8)
    # Without any noise the filter that does least is best.
    assert protocol.choose_filter_settings(images)["i=0"] == {kind: grid[0] for kind, grid in GRIDS.items()}


@pytest.mark.skipif(not os.environ.get("DENOISE_BATCH_MNIST"), reason="DENOISE_BATCH_MNIST is not set")
def test_the_settings_are_those_chosen_on_mnist(monkeypatch: pytest.MonkeyPatch) -> None:
    from denoise_batch.digits.mnist import Split, find_mnist, load_mnist

    images, _ = load_mnist(find_mnist(), Split.TRAIN)
    # One condition: all eight take half a minute on a busy machine.
    monkeypatch.setattr(protocol, "CONDITIONS", (LEVELS["mixture"],))
    chosen = protocol.choose_filter_settings(images[: protocol.SETTINGS_IMAGES])
    assert chosen["mixture"] == protocol.FILTER_SETTINGS["mixture"]
