"""What a training looks at."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from denoise_batch.training.objective import cross_entropy, gate_loss, psnr_of, quality_loss, weight_of


def test_cross_entropy_is_each_images_own() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, clean = torch.randn((3, 1, 28, 28), generator=generator), torch.rand((3, 1, 28, 28), generator=generator)
    alone = [functional.binary_cross_entropy_with_logits(logits[i], clean[i]) for i in range(3)]
    torch.testing.assert_close(cross_entropy(logits, clean), torch.stack(alone))


def test_images_count_by_the_psnr_that_is_expected_of_them() -> None:
    quality = torch.tensor([[20.0, 0.3], [15.0, 0.9], [26.0, 0.0], [45.0, 0.0], [3.0, 1.0]]).requires_grad_()
    weight = weight_of(quality, 0.5)
    assert isinstance(weight, torch.Tensor)
    assert weight.tolist() == pytest.approx([1.0, 10**-0.25, 10**0.3, 10**0.5, 10**-0.5])
    assert not weight.requires_grad
    assert torch.equal(weight_of(quality[2:], 0.5), weight[2:])  # type: ignore[arg-type]  # whatever share of a batch
    assert weight_of(quality, 0.0) == weight_of(None, 0.5) == 1.0


def test_the_best_answer_about_quality_is_the_truth_and_moves_no_pixel() -> None:
    generator = torch.Generator().manual_seed(1)
    clean = torch.rand((4, 1, 28, 28), generator=generator).requires_grad_()
    digits, level = torch.rand((4, 1, 28, 28), generator=generator), torch.rand(4, generator=generator)
    truth = torch.stack([psnr_of(clean.detach(), digits), level], dim=1)
    assert float(quality_loss(truth, clean, digits, level)) == 0.0
    wrong = (truth + torch.tensor([5.0, 0.2])).requires_grad_()
    loss = quality_loss(wrong, clean, digits, level)
    assert float(loss.detach()) == pytest.approx(0.25 + 0.2, rel=1e-5)
    loss.backward()
    assert clean.grad is None
    assert wrong.grad is not None


def test_what_is_trusted_is_to_be_what_was_clean() -> None:
    """A clean image is best kept, a noisy one is not, and faint noise counts as much as heavy noise."""
    generator = torch.Generator().manual_seed(2)
    digits = torch.rand((2, 1, 28, 28), generator=generator)
    made = (digits + 0.02 * torch.randn(digits.shape, generator=generator)).clamp(0.01, 0.99)
    noisy = torch.stack([digits[0], digits[1] + 0.5])  # pixels beyond 1 are cut off there
    none, first, second = (
        float(gate_loss(torch.tensor(trust), noisy, made, digits)) for trust in ((0.0, 0.0), (1e4, 0.0), (0.0, 1e4))
    )
    assert first < none / 2
    assert second > 10 * none
    worse = (digits + 10 * (made - digits)).clamp(0.01, 0.99)
    assert float(gate_loss(torch.zeros(2), noisy, worse, digits)) == pytest.approx(none, abs=0.05)
    trust, counts = torch.tensor((1e4, 1e4)), torch.tensor((2.0, 0.0))
    alone = float(gate_loss(trust[:1], noisy[:1], made[:1], digits[:1]))
    assert float(gate_loss(trust, noisy, made, digits, counts)) == pytest.approx(alone)
