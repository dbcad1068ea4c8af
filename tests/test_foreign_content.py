"""Foreign content that a training draws: images like any others, of all kinds, and none like the digits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_training_data import digits

from denoise_batch.training import foreign_content
from denoise_batch.training.batches import to_unit
from denoise_batch.training.foreign_content import draw_foreign_content


def clean_digits(count: int) -> torch.Tensor:
    return to_unit(torch.from_numpy(digits(count).reshape(-1, 28, 28)))


def drawn(images: torch.Tensor, seed: int, total: int, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The images, and the next number of the generator."""
    generator = torch.Generator().manual_seed(seed)
    return draw_foreign_content(images, generator, total=total, first=first), torch.rand(1, generator=generator)


def test_they_are_images_and_differ_from_the_digits_and_each_other() -> None:
    clean = clean_digits(400)
    made, _ = drawn(clean, 3, 400)
    assert made.shape == clean.shape
    assert made.dtype == torch.float32
    assert float(made.min()) >= 0.0
    assert float(made.max()) <= 1.0
    assert not (made == clean).flatten(1).all(dim=1).any()
    assert len({image.numpy().tobytes() for image in made}) == 400
    assert torch.equal(drawn(clean, 3, 400)[0], made)
    assert not torch.equal(drawn(clean, 4, 400)[0], made)


def test_each_is_made_of_its_own_image_and_numbers_alone() -> None:
    clean = clean_digits(30)
    whole, after = drawn(clean, 1, 30)
    for first, stop in ((0, 1), (7, 7), (7, 19), (29, 30), (30, 30)):
        part, next_number = drawn(clean[first:stop], 1, 30, first)
        assert torch.allclose(part, whole[first:stop], atol=1e-6)
        assert torch.equal(next_number, after)
    turned, _ = drawn(clean.flip(0), 1, 30)
    same = torch.isclose(turned, whole, atol=1e-6).flatten(1).all(dim=1)
    assert 15 <= int(same.sum()) < 30  # those that are made of numbers alone


def test_each_kind_is_as_likely(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = ("_patches", "_lines", "_shapes", "_ruled", "_out_of_place")
    for index, name in enumerate(kinds):
        monkeypatch.setattr(foreign_content, name, lambda given, _, grey=index / 8: torch.full_like(given, grey))
    made, _ = drawn(clean_digits(400), 5, 400)
    greys, counts = made.flatten(1).unique(return_counts=True)
    assert greys.tolist() == [0.0, 0.125, 0.25, 0.375, 0.5]
    assert all(50 < count / 784 < 115 for count in counts.tolist())


def test_clouds_lines_and_shapes_are_of_all_sorts() -> None:
    random = torch.Generator().manual_seed(0)
    numbers = torch.rand((20, 300, 1, 1), generator=random)
    smooth = foreign_content._smoothed(torch.randn((300, 28, 28), generator=random), numbers[0], numbers[1])
    assert float(smooth.std()) == pytest.approx(1.0, abs=0.15)
    for kind, (least, most), (sharp, soft) in (
        (foreign_content._patches, (0.2, 0.8), (0.03, 0.5)),
        (foreign_content._lines, (0.15, 0.35), (0.12, 0.4)),
        (foreign_content._shapes, (0.12, 0.3), (0.1, 0.6)),
    ):
        made = kind(smooth, numbers[2:])
        ink = made.mean(dim=(1, 2)).numpy()
        grey = ((made > 0.1) & (made < 0.9)).float().mean(dim=(1, 2)).numpy()
        assert np.quantile(ink, 0.1) < least, kind
        assert np.quantile(ink, 0.9) > most, kind
        assert grey.min() < sharp, kind
        assert grey.max() > soft, kind


def test_what_is_printed_or_struck_across_a_cell() -> None:
    images = clean_digits(6)

    def made(frame: bool, digit: bool, **numbers: float) -> torch.Tensor:
        """In the middle and straight, 1.5 pixels wide, of full ink, unless told."""
        of = {
            "turn": 0.5,
            "second": 0.5,
            "x": 0.5,
            "y": 0.5,
            "width": 0.5,
            "height": 0.5,
            "line": 0.5,
            "ink": 1.0,
            "grey": 1.0,
        }
        of |= numbers
        rest = [of[name] for name in ("turn", "second", "x", "y", "width", "height", "line", "ink", "grey")]
        drawn = torch.tensor([0.0 if frame else 1.0, 0.0 if digit else 1.0, *rest]).view(-1, 1, 1, 1)
        return foreign_content._ruled(images, drawn.expand(-1, 6, 1, 1))

    empty = made(frame=True, digit=False)[0]  # 0.85 of half a side, so its lines are between pixels 1 and 2
    assert torch.allclose(empty, empty.T, atol=1e-4)
    assert torch.allclose(empty, empty.flip(0), atol=1e-4)
    assert float(empty[1:3].amax(dim=0)[4:24].min()) > 0.5
    assert float(empty[5:23, 5:23].max()) < 0.01
    assert torch.equal(made(frame=True, digit=True), torch.maximum(images, empty))
    sides = made(frame=True, digit=False, width=1.0)[0]  # left and right lie outside
    assert float(sides[6:22].max()) < 0.01
    assert float(sides[1:3].amax(dim=0).min()) > 0.5
    moved = made(frame=True, digit=False, x=0.5 - 4 / 8.4, y=0.5 + 2 / 8.4)[0]  # 8.4 pixels for 1
    assert torch.allclose(moved[4:26, :20], empty[2:24, 4:24], atol=1e-4)
    faint = made(frame=True, digit=False, ink=0.0)
    assert torch.allclose(faint[0], 0.25 * empty, atol=1e-6)

    one, two = (made(frame=False, digit=False, turn=0.25, width=width)[0] for width in (0.7, 0.3))
    assert torch.allclose(one, one.T, atol=1e-4)  # from corner to corner
    assert float(one.diagonal().min()) > 0.9 or float(one.flip(0).diagonal().min()) > 0.9
    assert (two >= one - 1e-6).all()
    assert float(two.sum()) > 1.8 * float(one.sum())
    struck = made(frame=False, digit=True, turn=0.25, width=0.7)
    assert torch.equal(struck, torch.maximum(images, one))
    sharp = made(frame=True, digit=True, ink=0.0, grey=0.0)
    assert set(sharp.flatten().tolist()) == {0.0, 1.0}
    assert torch.equal(sharp, torch.maximum(images, empty).round())
    upright, askew = (made(frame=True, digit=False, turn=turn)[0] for turn in (0.64, 0.7))
    assert torch.equal(upright, empty)
    assert float((askew - empty).abs().max()) > 0.1
    across, down = (made(frame=False, digit=False, turn=turn, width=0.7)[0] for turn in (0.45, 0.95))
    assert float(across.std(dim=1).max()) < 1e-5 < float(across.std(dim=0).min())
    assert torch.allclose(across, down.T, atol=1e-4)
    thin, thick = (made(frame=False, digit=False, line=line).sum() for line in (0.0, 1.0))
    assert float(thick) > 3.0 * float(thin)


def test_a_third_becomes_whole_and_the_rest_stays_even() -> None:
    numbers = torch.linspace(0.0, 2.0, 30_001)
    made = foreign_content._third_whole(numbers)
    assert float((made == made.round()).float().mean()) == pytest.approx(1 / 3, abs=1e-3)
    assert torch.equal(made.sort().values, made)
    others = made[made != made.round()]
    assert torch.histc(others, 8, 0.0, 2.0) / len(others) == pytest.approx([1 / 8] * 8, abs=1e-3)


def test_images_out_of_place() -> None:
    images = clean_digits(8)
    images[:, :4] = images[:, 24:] = images[:, :, :4] = images[:, :, 24:] = 0.0
    images[:, 10:18, 12:16] = 1.0

    def made(kind: int) -> torch.Tensor:
        numbers = torch.full((4, 8, 1, 1), 0.75)  # 17 pixels to the right, 4 down
        numbers[3] = (kind + 0.5) / 6
        return foreign_content._out_of_place(images, numbers)

    beside, over, exchanged, swollen, four, twice = map(made, range(6))
    assert torch.equal(beside[:, 4:, 17:], images[:, :24, :11])
    assert beside[:, :, :13].any()  # the neighbour's right end, of the digit turned
    assert not beside[:, :, 13:17].any()
    assert torch.equal(over, torch.maximum(images, images.flip(1).transpose(1, 2)))
    assert torch.equal(exchanged, 1.0 - images)
    assert (swollen >= images).all()
    assert (swollen[:, 8:20, 10:18] == 1.0).all()
    assert torch.allclose(four.sum(dim=(1, 2)), images.sum(dim=(1, 2)), rtol=1e-5)
    assert torch.allclose(four[:, 5:9, 6:8], torch.ones(()))
    assert torch.allclose(twice[:, 7:21, 11:17], torch.ones(()))
    assert float(twice.sum()) > 2.0 * float(images[:, 7:21, 7:21].sum())
