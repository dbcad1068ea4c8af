"""The optimiser: orthogonal steps for matrices, AdamW's for the rest."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from denoise_batch import models
from denoise_batch.training import muon
from denoise_batch.training.muon import Muon, orthogonal, orthogonal_by_all


@pytest.mark.parametrize("shape", [(64, 100), (16, 144), (2352, 32), (40, 16)])
def test_singular_values_become_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    [made] = orthogonal([matrix])
    assert (made.shape, made.dtype) == (shape, torch.float32)
    values = torch.linalg.svdvals(made)
    assert values.min() > 0.5
    assert values.max() < 1.3
    # The same directions: what is left of the product with the nearest orthogonal matrix is symmetric and positive.
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    assert float((made * (u @ v)).sum() / min(shape)) > 0.8


@pytest.mark.parametrize("workers", [2, 3, 7])
def test_workers_that_share_them_out_all_get_all(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    """Threads stand in for processes; with seven of them one has no matrix to make."""
    random = torch.Generator().manual_seed(0)
    matrices = [
        torch.randn(shape, generator=random) for shape in ((64, 100), (16, 144), (235, 32), (16, 40), (8, 8), (8, 9))
    ]
    rank, meeting, given = threading.local(), threading.Barrier(workers), {}

    def all_reduce(values: torch.Tensor) -> None:
        given[rank.number] = values.clone()
        meeting.wait()
        values.copy_(sum(given.values()))

    monkeypatch.setattr(muon.distributed, "get_rank", lambda: rank.number)
    monkeypatch.setattr(muon.distributed, "all_reduce", all_reduce)
    made: dict[int, list[torch.Tensor]] = {}

    def work(number: int) -> None:
        rank.number = number
        made[number] = orthogonal_by_all(matrices, workers)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(workers):
        for matrix, expected in zip(made[number], orthogonal(matrices), strict=True):
            torch.testing.assert_close(matrix, expected)
    assert sum((values != 0).sum() for values in given.values()) == sum(matrix.numel() for matrix in matrices)


def test_the_default_networks_matrices_are_shared_out_evenly() -> None:
    shapes = [
        (len(parameter), parameter[0].numel())
        for parameter in models.build("bounds-unet").parameters()
        if muon._is_matrix(parameter)
    ]
    heights = [sorted(min(shapes[place]) for place in share) for share in muon._shares(shapes, 2)]
    assert [share.count(256) for share in heights] == [2, 2]
    assert sorted(place for share in muon._shares(shapes, 5) for place in share) == list(range(len(shapes)))


def test_what_is_no_matrix_goes_as_adamw_has_it() -> None:
    torch.manual_seed(0)
    start = [torch.randn(5), torch.randn(4, 30)]
    gradients = [[torch.randn(5), torch.randn(4, 30)] for _ in range(5)]
    ours = [nn.Parameter(value.clone()) for value in start]
    theirs = [nn.Parameter(value.clone()) for value in start]
    muon = Muon(ours, 1e-2, 0.1)
    adamw = torch.optim.AdamW(
        [{"params": theirs[:1], "weight_decay": 0.0}, {"params": theirs[1:]}], 1e-2, weight_decay=0.1
    )
    for step in gradients:
        for optimiser, parameters in ((muon, ours), (adamw, theirs)):
            for parameter, gradient in zip(parameters, step, strict=True):
                parameter.grad = gradient.clone()
            optimiser.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_a_step_changes_matrices_by_the_learning_rate_whatever_the_gradient() -> None:
    """Root mean square of 0.2 × the rate, as AdamW's usually is: scaling the loss changes nothing."""
    for scale in (1e-6, 1.0, 1e6):
        weight = nn.Parameter(torch.zeros(32, 8, 3, 3))
        weight.grad = scale * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
        Muon([weight], 0.01).step()
        assert float(weight.detach().square().mean().sqrt()) == pytest.approx(0.002, rel=0.2)


def test_matrices_follow_momentum_and_decay() -> None:
    """Three steps by hand: Nesterov's momentum of 0.95, made orthogonal, and decay by rate × weight decay."""
    torch.manual_seed(0)
    start = torch.randn(16, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    weight, expected, momentum = nn.Parameter(start.clone()), start.clone(), torch.zeros_like(start)
    optimiser = Muon([weight], 0.01, 0.1)
    for gradient in torch.randn(3, 16, 8, 3, 3):
        weight.grad = gradient.contiguous(memory_format=torch.channels_last)
        optimiser.step()
        momentum = 0.95 * momentum + 0.05 * gradient
        [direction] = orthogonal([(0.05 * gradient + 0.95 * momentum).reshape(16, 72)])
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * 0.2 * 72**0.5 * direction.reshape(start.shape)
    torch.testing.assert_close(weight.detach(), expected)
    assert weight.is_contiguous(memory_format=torch.channels_last)
