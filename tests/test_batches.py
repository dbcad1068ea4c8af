"""Global batches: the same for any number of workers, every image once an epoch, noise that goes with the image."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_training_data import digits, numbers

from denoise_batch.models import build
from denoise_batch.noise import NoiseRecipe
from denoise_batch.training.batches import (
    Batch,
    ResidentBatches,
    draw_noise,
    noise_generator,
    noised_copies,
    noisy_images,
    seed_of,
    share,
    to_unit,
    with_other_content,
)
from denoise_batch.training.objective import cross_entropy
from denoise_batch.training.optimisation import make_optimiser
from denoise_batch.training.recipes import RECIPES
from denoise_batch.training.step import TrainingStep
from denoise_batch.training.validation import Validation

pytestmark = pytest.mark.usefixtures("footers_read_here", "ink_as_it_is")


@given(st.integers(0, 1000), st.integers(1, 20))
def test_shares_cover_the_batch(total: int, workers: int) -> None:
    shares = [share(total, rank, workers) for rank in range(workers)]
    assert shares[0].start == 0
    assert shares[-1].stop == total
    assert all(one.stop == other.start for one, other in pairwise(shares))
    sizes = [part.stop - part.start for part in shares]
    assert max(sizes) - min(sizes) <= 1


def test_seeds_differ() -> None:
    seeds = [seed_of(seed, use, step) for seed in range(3) for use in range(3) for step in range(100)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def _resident(rank: int, workers: int, copies: int = 0) -> ResidentBatches:
    clean = torch.from_numpy(digits(250).reshape(-1, 28, 28))
    noisy = torch.cat([to_unit(clean) + copy for copy in range(copies)]) if copies else None
    return ResidentBatches(clean, noisy, batch=32, seed=5, rank=rank, workers=workers)


def _numbers(batch: Batch) -> list[int]:
    return numbers((batch.clean * 255).round().numpy())


@pytest.mark.parametrize("workers", [1, 2, 3, 40])
def test_workers_share_the_same_global_batches(workers: int) -> None:
    alone = list(_resident(0, 1).epoch(3))
    together = list(zip(*(_resident(rank, workers).epoch(3) for rank in range(workers)), strict=True))
    assert len(alone) == len(together) == 8
    for whole, parts in zip(alone, together, strict=True):
        assert torch.equal(torch.cat([part.clean for part in parts]), whole.clean)
        assert {part.total for part in parts} == {whole.total}


def test_every_image_once_an_epoch_in_another_order() -> None:
    first, second, again = ([n for b in _resident(0, 1).epoch(e) for n in _numbers(b)] for e in (1, 2, 1))
    assert sorted(first) == list(range(250))
    assert first == again != second


def test_copies_keep_their_clean_image() -> None:
    batches = _resident(0, 1, copies=4)
    assert batches.images == 1000
    seen = np.zeros((250, 4), int)
    for batch in batches.epoch(1):
        assert batch.noisy is not None
        copy = (batch.noisy - batch.clean).mean(dim=(1, 2)).round().int()
        np.add.at(seen, (_numbers(batch), copy.numpy()), 1)
    assert (seen == 1).all()


def test_noise_of_an_image_is_the_same_for_any_workers() -> None:
    clean = to_unit(torch.from_numpy(digits(20).reshape(-1, 28, 28)))
    recipe = NoiseRecipe(clipped=0.5, noiseless=0.1, clean=0.1, gaussian=0.3, impulse=0.3)
    whole, levels = draw_noise(recipe, Batch(clean, None, slice(0, 20), 20), noise_generator(1, 9, clean.device))
    for rows in (slice(0, 7), slice(7, 7), slice(7, 20)):
        part, level = draw_noise(recipe, Batch(clean[rows], None, rows, 20), noise_generator(1, 9, clean.device))
        assert torch.allclose(part, whole[rows], atol=1e-6)
        assert torch.allclose(level, levels[rows], atol=1e-6)
    assert not torch.equal(
        draw_noise(recipe, Batch(clean, None, slice(0, 20), 20), noise_generator(1, 10, clean.device))[0], whole
    )


def test_a_share_of_the_pairs_gets_drawn_noise_the_same_for_any_workers() -> None:
    clean = to_unit(torch.from_numpy(digits(20).reshape(-1, 28, 28)))
    own, recipe = clean + 10.0, NoiseRecipe(half_range=(0.5, 1.0))
    for every, places in ((0, []), (4, [3, 7, 11, 15, 19]), (7, [6, 13]), (1, list(range(20))), (21, [])):
        whole, levels = noisy_images(
            Batch(clean, own, slice(0, 20), 20), recipe, every, noise_generator(1, 9, clean.device)
        )
        drawn = torch.zeros(20, dtype=torch.bool)
        drawn[places] = True
        assert torch.equal(whole[~drawn], own[~drawn])
        assert torch.equal(own, clean + 10.0)
        assert (whole[drawn] < 5.0).all()
        assert torch.allclose(levels[~drawn], torch.tensor(10.0))
        assert (levels[drawn] < 1.0).all()
        for rows in (slice(0, 3), slice(3, 3), slice(3, 4), slice(4, 9), slice(9, 20)):
            share_of = Batch(clean[rows], own[rows], rows, 20)
            part, level = noisy_images(share_of, recipe, every, noise_generator(1, 9, clean.device))
            assert torch.allclose(part, whole[rows], atol=1e-6)
            assert torch.allclose(level, levels[rows], atol=1e-6)


def test_a_step_trains_on_the_recipes_share_of_drawn_noise() -> None:
    clean = to_unit(torch.from_numpy(digits(20).reshape(-1, 28, 28)))
    seen: list[torch.Tensor] = []
    network = build("seed")
    for every in (0, 4):
        recipe = replace(RECIPES["default"], drawn_every=every)
        step = TrainingStep(network, None, make_optimiser(recipe, network), recipe, seed=0, workers=1)
        step._trained.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        step(Batch(clean, clean + 10.0, slice(0, 20), 20), 1e-3, 0)
    own, mixed = (bool_rows(images) for images in seen)
    assert own == [True] * 20
    assert mixed == [i % 4 != 3 for i in range(20)]


def bool_rows(images: torch.Tensor) -> list[bool]:
    """Which of them are ten brighter than any digit."""
    return [bool(image.min() > 5.0) for image in images]


def test_integers_are_chosen_on_all_that_was_trained_on() -> None:
    pixels = digits(20).reshape(-1, 28, 28)
    place: Any = {"noise": NoiseRecipe(), "device": torch.device("cpu"), "rank": 0, "workers": 1}
    own = pixels.astype(np.float32) / np.float32(255) + np.float32(10)
    assert len(Validation(pixels, None, **place).all_shown) == 40
    assert len(Validation(pixels, own, **place).all_shown) == 40
    beside = Validation(pixels, own, drawn_beside=True, **place)
    assert bool_rows(beside.all_shown) == [True] * 20 + [False] * 40
    assert bool_rows(beside.noisy) == [True] * 20
    blank = Validation(pixels.astype(np.float32), None, blank_every=8, **place)
    assert [not bool(image.any()) for image in blank.clean] == [i % 8 == 7 for i in range(20)]
    assert blank.noisy[7].any()
    assert Validation(pixels, own, blank_every=8, **place).clean.flatten(1).any(dim=1).all()


def mixed(batch: Batch, *, blank: int = 0, foreign: int = 0, drawn: int = 4, still: float = 0.5) -> Batch:
    return with_other_content(
        batch,
        blank_every=blank,
        foreign_every=foreign,
        foreign_still=still,
        drawn_every=drawn,
        generator=noise_generator(1, 9, batch.clean.device),
    )


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_some_images_are_empty_the_same_ones_for_any_workers(workers: int) -> None:
    clean = torch.ones((20, 28, 28))
    parts = [share(20, rank, workers) for rank in range(workers)]
    made = torch.cat([mixed(Batch(clean[rows], None, rows, 20), blank=8).clean for rows in parts])
    assert [not bool(image.any()) for image in made] == [i % 8 == 7 for i in range(20)]
    assert clean.all()
    # Of pairs those alone that get drawn noise in place of their own.
    own = torch.cat([mixed(Batch(clean[rows], clean[rows], rows, 20), blank=8).clean for rows in parts])
    assert torch.equal(own, made)
    for blank, drawn in ((8, 0), (8, 3), (0, 4), (24, 4)):
        batch = Batch(clean, clean, slice(0, 20), 20)
        assert mixed(batch, blank=blank, drawn=drawn) is batch


@pytest.mark.parametrize("workers", [1, 2, 3, 20])
def test_some_images_are_no_digits_the_same_ones_for_any_workers(workers: int) -> None:
    clean = to_unit(torch.from_numpy(digits(20).reshape(-1, 28, 28)))
    whole = mixed(Batch(clean, None, slice(0, 20), 20), foreign=4)
    parts = [share(20, rank, workers) for rank in range(workers)]
    batches = [mixed(Batch(clean[rows], None, rows, 20), foreign=4) for rows in parts]
    assert torch.allclose(torch.cat([batch.clean for batch in batches]), whole.clean, atol=1e-6)
    differs = (whole.clean != clean).flatten(1).any(dim=1)
    assert differs.tolist() == [i % 4 == 3 for i in range(20)]
    counts = torch.cat([batch.counts for batch in batches if batch.counts is not None])
    assert counts.tolist() == [0.0 if i % 4 == 3 else pytest.approx(20 / 15) for i in range(20)]
    # Of pairs each so many-th of those that get drawn noise in place of their own.
    pairs = Batch(clean, clean, slice(0, 20), 20)
    drawn = mixed(pairs, foreign=3, drawn=2)
    assert torch.equal(drawn.clean, mixed(Batch(clean, None, slice(0, 20), 20), foreign=6).clean)
    assert drawn.counts is not None
    assert [count == 0.0 for count in drawn.counts] == [i % 6 == 5 for i in range(20)]
    for foreign, every in ((4, 0), (0, 4), (6, 4)):
        assert mixed(pairs, foreign=foreign, drawn=every) is pairs


@pytest.mark.parametrize("paired", [False, True])
def test_some_of_what_is_no_digit_has_no_noise_the_same_for_any_workers(paired: bool) -> None:
    clean = to_unit(torch.from_numpy(digits(240).reshape(-1, 28, 28)))
    noise = NoiseRecipe((0.5, 2.0), (0.5, 1.0), clipped=0.3, gaussian=0.3, impulse=0.3)

    def shown(workers: int) -> tuple[torch.Tensor, ...]:
        """What is no digit, which of it is still, its noisy images less its clean ones, and their levels."""
        parts = []
        for rank in range(workers):
            rows = share(240, rank, workers)
            own = clean[rows] + 10.0 if paired else None
            batch = mixed(Batch(clean[rows], own, rows, 240), foreign=2 if paired else 4, drawn=2, still=0.3)
            noisy, levels = noisy_images(batch, noise, 2, noise_generator(2, 3, clean.device))
            assert batch.counts is not None
            assert batch.still is not None
            parts.append((batch.counts == 0.0, batch.still, noisy - batch.clean, levels))
        return tuple(torch.cat(values) for values in zip(*parts, strict=True))

    foreign, still, off, levels = shown(1)
    assert foreign.tolist() == [i % 4 == 3 for i in range(240)]
    assert 0.15 < still[foreign].float().mean() < 0.45
    assert not still[~foreign].any()
    # They may be in 8 bits, as they are in files.
    assert torch.equal(off.abs().flatten(1).amax(dim=1) <= 0.5 / 255 + 1e-6, still)
    assert torch.equal(levels == 0.0, still)
    for workers in (2, 3, 240):
        for part, whole in zip(shown(workers), (foreign, still, off, levels), strict=True):
            assert torch.allclose(part.float(), whole.float(), atol=1.1 / 255)  # 8 bits may round the other way


@settings(deadline=None)
@given(st.integers(0, 9), st.integers(0, 9), st.integers(1, 60))
def test_what_is_to_be_learnt_counts_as_much_as_a_whole_batch(blank: int, foreign: int, total: int) -> None:
    blank, foreign = (every + (every == 1) for every in (blank, foreign))
    clean = torch.rand((total, 28, 28), generator=torch.Generator().manual_seed(total))
    made = mixed(Batch(clean, None, slice(0, total), total), blank=blank, foreign=foreign, still=1.0)
    empty = [blank > 0 and i % blank == blank - 1 for i in range(total)]
    other = [foreign > 0 and i % foreign == foreign - 1 for i in range(total)]
    for image, digit, is_empty, is_other in zip(made.clean, clean, empty, other, strict=True):
        # What would be both is empty.
        expected = torch.zeros(28, 28) if is_empty else digit
        assert torch.equal(image, expected) == (is_empty or not is_other)
    still = torch.zeros(total) if made.still is None else made.still
    assert [bool(value) for value in still] == [o and not e for e, o in zip(empty, other, strict=True)]
    counts = torch.ones(total) if made.counts is None else made.counts
    assert [bool(count) for count in counts] == [e or not o for e, o in zip(empty, other, strict=True)]
    assert float(counts.sum()) == pytest.approx(total)
    assert len(set(counts[counts > 0].tolist())) == 1


def test_the_default_recipes_other_content_is_among_what_gets_drawn_noise() -> None:
    recipe = RECIPES["default"]
    assert recipe.blank_every > 1
    assert recipe.foreign_every > 1
    assert recipe.blank_every % recipe.drawn_every == 0
    assert RECIPES["seed"].blank_every == RECIPES["seed"].foreign_every == 0


@pytest.mark.parametrize("paired", [False, True])
def test_a_network_learns_of_foreign_content_how_good_its_images_are_and_nothing_else(
    paired: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = to_unit(torch.from_numpy(digits(32).reshape(-1, 28, 28)))
    recipe = replace(RECIPES["default"], foreign_every=8, parameters={"width": 8, "deep": 8, "bottleneck": 16})
    batch = Batch(clean, clean if paired else None, slice(0, 32), 32)
    trained = []
    for grey in (0.0, 0.9):
        monkeypatch.setattr(
            "denoise_batch.training.batches.draw_foreign_content",
            lambda images, _, grey=grey, **__: torch.full_like(images, grey),
        )
        torch.manual_seed(0)
        network = build(recipe.architecture, recipe.parameters)
        step = TrainingStep(network, None, make_optimiser(recipe, network), recipe, seed=0, workers=1)
        loss = float(step(batch, 1e-3, 0))
        trained.append((loss, dict(network.named_parameters())))
    (loss, weights), (other_loss, others) = trained
    assert loss == other_loss
    differ = {name for name in weights if not torch.equal(weights[name], others[name])}
    assert differ
    assert all(name.startswith("quality.") for name in differ)


def test_validation_sums_up_over_workers_what_a_network_makes() -> None:
    torch.manual_seed(0)
    network = build("bounds-unet", {"width": 8, "deep": 8, "bottleneck": 4}).eval()
    pixels = digits(20).reshape(-1, 28, 28)
    place: Any = {"noise": NoiseRecipe(), "device": torch.device("cpu"), "workers": 2}
    halves = [Validation(pixels, None, rank=rank, **place) for rank in (0, 1)]
    loss, noisy, clean, quality, psnr = sum(half.errors(network, bfloat16=False) for half in halves).tolist()  # type: ignore[union-attr]
    shown, truth = (torch.cat([getattr(half, name) for half in halves])[:, None] for name in ("noisy", "clean"))
    with torch.no_grad():
        made, kept = network.outputs(shown), network(truth)
        errors = (made.clean - truth).square().mean(dim=(1, 2, 3))
        assert made.quality is not None
        assert loss == pytest.approx(float(cross_entropy(made.logits, truth).sum()), rel=1e-5)
        assert noisy == pytest.approx(float(errors.sum()), rel=1e-5)
        assert clean == pytest.approx(20 * float((kept - truth).square().mean()), rel=1e-5)
        assert psnr == pytest.approx(float(-10 * errors.log10().sum()), rel=1e-5)
        assert quality == pytest.approx(float((made.quality[:, 0] + 10 * errors.log10()).square().sum()), rel=1e-4)


def test_noise_has_the_recipes_levels() -> None:
    flat = Batch(torch.zeros((2000, 28, 28)), None, slice(0, 2000), 2000)
    noise, _ = draw_noise(NoiseRecipe(half_range=(0.5, 1.5)), flat, noise_generator(0, 0, flat.clean.device))
    ranges = noise.amax(dim=(1, 2))
    assert 0.45 < ranges.min() < 0.55
    assert 1.45 < ranges.max() <= 1.5
    clipped, _ = draw_noise(
        NoiseRecipe(half_range=(0.5, 1.5), clipped=0.25), flat, noise_generator(0, 0, flat.clean.device)
    )
    assert (clipped.amin(dim=(1, 2)) >= 0).float().mean() == pytest.approx(0.25, abs=0.04)


def test_copies_are_noised_apart() -> None:
    clean = torch.from_numpy(digits(10).reshape(-1, 28, 28))
    noisy = noised_copies(NoiseRecipe(), clean, 4, seed=0)
    assert (noisy.shape, noisy.dtype) == ((40, 28, 28), torch.float32)
    assert torch.equal(noisy, noised_copies(NoiseRecipe(), clean, 4, seed=0))
    assert not torch.equal(noisy[:10], noisy[10:20])
