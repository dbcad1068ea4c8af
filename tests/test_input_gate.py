"""What is good about an image already is let through, and nothing else is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from denoise_batch.bundle import SHIPPED_FOLDER, read_bundle
from denoise_batch.denoiser import Denoiser
from denoise_batch.digits.drawn_digits import draw_digits
from denoise_batch.extra_columns import ExtraColumns
from denoise_batch.images import Polarity
from denoise_batch.models.input_gate import (
    NONE_BELOW,
    WHOLE,
    WHOLE_FROM,
    InputGate,
    decided,
    input_weight,
    joined,
    may_be_trusted,
    not_joined,
)
from denoise_batch.models.noise_signs import range_ends
from denoise_batch.noise import NoiseRecipe
from denoise_batch.precision import Precision

RECIPES = {
    "clean": NoiseRecipe(clean=1.0),
    "faint": NoiseRecipe((0.0, 0.2), (0.0, 0.05)),
    "heavy": NoiseRecipe((0.0, 2.0), (0.2, 1.5)),
    "heavy, 8 bits": NoiseRecipe((0.0, 2.0), (0.2, 1.5), clipped=1.0),
    "salt and pepper": NoiseRecipe((0.0, 0.2), (0.0, 1.0), impulse=1.0),
}


def digits(count: int) -> torch.Tensor:
    return torch.from_numpy(draw_digits(count, seed=4)[0]).float() / 255


def noised(kind: str, count: int = 100) -> torch.Tensor:
    return RECIPES[kind].apply(digits(count), torch.Generator().manual_seed(0))[0][:, None]


@pytest.fixture
def keen() -> InputGate:
    """A gate that trusts what it may."""
    torch.manual_seed(0)
    gate = InputGate().eval()
    torch.nn.init.constant_(gate.out.bias, 3.0)
    return gate


def test_what_is_not_joined_is_the_rest() -> None:
    made = torch.rand(200, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for trust in (0.0, 0.3, 50.0, WHOLE):
        left = not_joined(made, torch.tensor(trust))
        torch.testing.assert_close(left, made * (1.0 - made) * (1.0 - input_weight(made, torch.tensor(trust))))


def test_one_by_one_is_as_all_at_once(keen: InputGate) -> None:
    """A CPU looks at those alone that may be trusted, a GPU at all."""
    noisy = torch.cat([noised(kind, 20) for kind in RECIPES])
    noisy[3, 0, 5, 5], noisy[30, 0, 5, 5] = torch.nan, torch.inf
    apart = 0.1 * torch.rand(noisy.shape, generator=torch.Generator().manual_seed(1))
    made = (noisy.clamp(0.0, 1.0) - apart).abs()
    made[40:80] = digits(20)[:, None].repeat(2, 1, 1, 1)  # of heavy noise
    made[3] = made[30] = torch.nan
    made[5, 0, 10, 9] = 1.0 - noisy[5, 0, 10, 9].round()  # a single pixel that is changed a lot
    may = may_be_trusted(noisy, made)
    ends = range_ends(noisy)
    with torch.no_grad():
        few, few_trust = keen(noisy, made.clone(), ends)
        assert torch.equal(keen(noisy[:0], made[:0], ends[:0])[0], noisy[:0])
    every, trust = keen(noisy, made.clone(), ends)
    torch.testing.assert_close(few, every, equal_nan=True, rtol=0.0, atol=1e-6)
    torch.testing.assert_close(few_trust, trust)
    assert may[:20].sum() == 19
    assert not may[40:80].any()
    assert may[5]
    may[5] = False
    assert not trust[~may].any()
    assert torch.equal(every[~may].nan_to_num(), made[~may].nan_to_num())
    assert (trust[may] > 0).all()


def test_each_estimate_counts_by_the_inverse_of_its_variance() -> None:
    """As two measurements of one pixel are joined; all or nothing at both ends."""
    trust = decided(torch.tensor([0.0, NONE_BELOW / 2, 4.0, 2 * WHOLE_FROM]))
    assert trust.tolist() == [0.0, 0.0, 4.0, WHOLE]
    made = torch.tensor([0.0, 0.5, 0.9, 1.0]).expand(4, 1, 1, 4)
    given = torch.tensor([0.3, 0.7, 0.6, 0.2]).expand(4, 1, 1, 4)
    found = joined(made, given, trust)[:, 0, 0]
    assert torch.equal(found[:2], made[:2, 0, 0])
    assert torch.equal(found[3], given[3, 0, 0])
    variance = (made * (1 - made))[0, 0, 0], 1 / 4.0
    expected = (made[0, 0, 0] * variance[1] + given[0, 0, 0] * variance[0]) / (variance[0] + variance[1])
    torch.testing.assert_close(found[2], expected)


@pytest.mark.parametrize("precision", [Precision.AUTO, Precision.FLOAT32])
@pytest.mark.parametrize("polarity", [Polarity.LIGHT_ON_DARK, Polarity.DARK_ON_LIGHT])
def test_clean_digits_come_back_bit_by_bit(precision: Precision, polarity: Polarity) -> None:
    """From the shipped model, with what it expects of them."""
    denoiser = Denoiser(read_bundle(SHIPPED_FOLDER), device="cpu", precision=precision)
    pixels = draw_digits(200, seed=4)[0].reshape(-1, 784)
    if polarity is Polarity.DARK_ON_LIGHT:
        pixels = 255 - pixels
    made = denoiser.denoise(pixels, polarity, "uint8", ExtraColumns(quality=True))
    alike = (made.pixels == pixels).all(axis=1)
    assert alike.mean() > 0.9
    assert made.psnr is not None
    assert np.median(made.psnr[alike]) > 42


def test_faint_noise_is_taken_off_the_background_alone() -> None:
    """Strokes come back nearer to what they were than a network could make them, empty places empty."""
    denoiser = Denoiser(read_bundle(SHIPPED_FOLDER), device="cpu", precision=Precision.FLOAT32)
    clean = digits(300).numpy().reshape(300, 784)
    noisy = NoiseRecipe((0.0, 0.0), (0.03, 0.03)).apply(digits(300), torch.Generator().manual_seed(0))[0].numpy()
    made = denoiser(noisy.reshape(300, 784))
    ink = clean > 0
    # float32 in, so that noise below 0 is there
    assert np.square(made - clean)[ink].mean() < np.square(0.03) / 3 * 1.2
    assert np.square(made - clean)[~ink].mean() < np.square(0.03) / 3 / 10


def test_a_single_struck_pixel_is_seen() -> None:
    """In a digit that is clean but for it."""
    denoiser = Denoiser(read_bundle(SHIPPED_FOLDER), device="cpu")
    clean = draw_digits(200, seed=4)[0].reshape(-1, 784)
    struck, rows = clean.copy(), np.arange(200)
    corner = 29 + 23 * (rows % 2)  # near the left or the right edge of the second line, where no digit reaches
    assert not clean[rows, corner].any()
    struck[rows, corner] = 255
    made = denoiser.denoise(struck, Polarity.LIGHT_ON_DARK, "uint8").pixels
    assert (made[rows, corner] < 60).mean() > 0.95
