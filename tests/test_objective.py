"""What a training looks at."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from denoise_batch.training.objective import cross_entropy, psnr_of, quality_loss, weight_of


def test_cross_entropy_is_each_images_own() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, clean = torch.randn((3, 1, 28, 28), generator=generator), torch.rand((3, 1, 28, 28), generator=generator)
    alone = [functional.binary_cross_entropy_with_logits(logits[i], clean[i]) for i in range(3)]
    torch.testing.assert_close(cross_entropy(logits, clean), torch.stack(alone))


def test_faint_noise_counts_more_and_the_same_alone_as_in_company() -> None:
    level = torch.tensor([0.0, 0.05, 0.5, 1.0])
    weight = weight_of(level, 0.5)
    assert weight.tolist() == pytest.approx([6**0.5, 2.0, 1.0, (0.6 / 1.1) ** 0.5])
    assert torch.equal(weight_of(level[2:], 0.5), weight[2:])  # whatever share of a batch a worker has
    assert weight_of(level, 0.0).tolist() == [1.0] * 4


def test_the_best_answer_about_quality_is_the_truth_and_moves_no_pixel() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn((4, 1, 28, 28), generator=generator).requires_grad_()
    clean, level = torch.rand((4, 1, 28, 28), generator=generator), torch.rand(4, generator=generator)
    truth = torch.stack([psnr_of(logits.detach(), clean), level], dim=1)
    assert float(quality_loss(truth, logits, clean, level)) == 0.0
    wrong = (truth + torch.tensor([5.0, 0.2])).requires_grad_()
    loss = quality_loss(wrong, logits, clean, level)
    assert float(loss.detach()) == pytest.approx(0.25 + 0.2, rel=1e-5)
    loss.backward()
    assert logits.grad is None
    assert wrong.grad is not None
