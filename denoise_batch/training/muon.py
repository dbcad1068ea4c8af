"""Muon: momentum for weight matrices, made orthogonal before each step; AdamW for all other weights.

    optimiser = Muon(network.parameters(), lr=2e-3, weight_decay=1e-2)

Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); the scale by which one learning rate
serves both kinds of weights is Liu et al.'s, "Muon is scalable for LLM training" (2025, arXiv 2502.16982), section 2.2.
torch.optim.Muon takes two-dimensional weights alone and leaves the rest to a second optimiser; here convolutions count
as matrices of (channels out, everything else), and one optimiser means one state to save. Matrices of the same height
are worked on together, and nothing is read back from the device: on a GPU it is the number of operations that costs,
and all of them can be recorded in a CUDA graph.

For the default network on one core, a step of training takes about half as long again as with AdamW, and is worth it
several times over (docs/experiments.md). Several workers on CPUs share the matrices out, as they do the images.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor, nn

_MOMENTUM = 0.95
_BETAS, _EPSILON = (0.9, 0.999), 1e-8  # AdamW's, torch's defaults
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Newton and Schulz' step, tuned by Jordan to converge fast, not exactly
_NEWTON_SCHULZ_STEPS = 5
_SCALE = 0.2  # the usual root mean square of AdamW's updates
_STEPS = "steps"
"""The state that counts AdamW's steps. One called `step` PyTorch would leave on the CPU when it loads a state."""
_SMALLEST = 8  # a matrix with fewer rows or columns is AdamW's


def orthogonal(matrices: Sequence[Tensor]) -> list[Tensor]:
    """About the nearest matrices whose singular values are all one, by Newton and Schulz' iteration.

    Each of its steps multiplies the matrix X from the left by a polynomial of its Gram matrix X Xᵀ. The product of the
    polynomials is gathered first and X is multiplied once: for wide matrices a third of the arithmetic, and all of one
    height go through the iteration at once, however wide they are.

    Args:
        matrices: (rows, columns) float32, each of its own shape.

    Returns:
        The same shapes, float32. Singular values lie between 0.7 and 1.2 or so, but for those below a hundredth of the
        largest, which do not get as far.
    """
    wide = [matrix.T if matrix.shape[0] > matrix.shape[1] else matrix for matrix in matrices]
    places: dict[int, list[int]] = defaultdict(list)
    for place, x in enumerate(wide):
        places[len(x)].append(place)
    made = list(wide)
    for alike in places.values():
        gathered = _gathered(torch.stack([wide[place] @ wide[place].T for place in alike]))
        for factor, place in zip(gathered, alike, strict=True):
            made[place] = factor @ wide[place]
    return [x.T if x.shape != matrix.shape else x for x, matrix in zip(made, matrices, strict=True)]


def orthogonal_by_all(matrices: Sequence[Tensor], workers: int) -> list[Tensor]:
    """`orthogonal` of matrices that so many workers of `torch.distributed` have alike: each makes some, all get all."""
    mine = _shares([matrix.shape for matrix in matrices], workers)[distributed.get_rank()]
    flat = torch.zeros(sum(matrix.numel() for matrix in matrices), device=matrices[0].device)
    parts = list(torch.split(flat, [matrix.numel() for matrix in matrices]))
    for place, made in zip(mine, orthogonal([matrices[place] for place in mine]), strict=True):
        parts[place].copy_(made.reshape(-1))
    distributed.all_reduce(flat)  # whoever has not made a matrix has zeros there, which change nothing
    return [part.view(matrix.shape) for part, matrix in zip(parts, matrices, strict=True)]


def _shares(shapes: Sequence[Sequence[int]], workers: int) -> list[list[int]]:
    """Which matrices each worker makes: the most arithmetic first, to whoever has the least by then."""
    shares: list[list[int]] = [[] for _ in range(workers)]
    loads = [0] * workers
    products = 3 * _NEWTON_SCHULZ_STEPS  # of Gram matrices; the matrix itself is multiplied twice
    costs = [min(shape) ** 2 * (2 * max(shape) + products * min(shape)) for shape in shapes]
    for place in sorted(range(len(shapes)), key=lambda place: -costs[place]):
        least = loads.index(min(loads))
        shares[least].append(place)
        loads[least] += costs[place]
    return shares


def _gathered(gram: Tensor) -> Tensor:
    """(k, rows, rows) Gram matrices → what their matrices are to be multiplied by."""
    a, b, c = _COEFFICIENTS
    square = gram.diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None] + 1e-14  # of the matrix's norm
    gram, gathered = gram / square, gram
    for step in range(_NEWTON_SCHULZ_STEPS):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        gathered = factor @ gathered if step else factor
        if step < _NEWTON_SCHULZ_STEPS - 1:
            gram = factor @ gram @ factor
    return gathered / square.sqrt()


class Muon(torch.optim.Optimizer):
    """The optimiser.

    Args:
        parameters: the network's.
        lr: learning rate of both kinds of weights; a number, or in `param_groups` a tensor on the weights' device.
        weight_decay: decoupled, of whatever has more than one dimension; biases have none.
        workers: of `torch.distributed` that take every step together, with the same gradients.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0, *, workers: int = 1
    ) -> None:
        parameters = list(parameters)
        matrices = [parameter for parameter in parameters if _is_matrix(parameter)]
        others = [parameter for parameter in parameters if not _is_matrix(parameter)]
        groups: list[dict[str, Any]] = [
            {"params": matrices, "matrices": True},
            {"params": [parameter for parameter in others if parameter.ndim > 1]},
            {"params": [parameter for parameter in others if parameter.ndim <= 1], "weight_decay": 0.0},
        ]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "matrices": False})
        self._workers = workers

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step along the gradients that are there."""
        if closure is not None:
            raise ValueError("Muon calls no closure")
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            if group["weight_decay"]:
                torch._foreach_mul_(parameters, 1.0 - group["lr"] * group["weight_decay"])
            change = self._orthogonal_step if group["matrices"] else self._adam_step
            change(parameters, [parameter.grad for parameter in parameters], group["lr"])

    def _orthogonal_step(self, parameters: list[Tensor], gradients: list[Tensor], rate: float | Tensor) -> None:
        momenta = self._states(parameters, "momentum")
        torch._foreach_lerp_(momenta, gradients, 1.0 - _MOMENTUM)
        directions = torch._foreach_lerp(gradients, momenta, _MOMENTUM)  # Nesterov's
        matrices = [direction.reshape(len(direction), -1) for direction in directions]
        made = orthogonal(matrices) if self._workers == 1 else orthogonal_by_all(matrices, self._workers)
        for parameter, matrix in zip(parameters, made, strict=True):
            scale = _SCALE * max(matrix.shape) ** 0.5
            parameter.sub_((matrix * (rate * scale)).reshape(parameter.shape))

    def _adam_step(self, parameters: list[Tensor], gradients: list[Tensor], rate: float | Tensor) -> None:
        means, squares = self._states(parameters, "mean"), self._states(parameters, "square")
        for parameter in parameters:
            self.state[parameter].setdefault(_STEPS, torch.zeros((), device=parameter.device)).add_(1.0)
        steps = self.state[parameters[0]][_STEPS]  # all have a gradient in every step
        torch._foreach_lerp_(means, gradients, 1.0 - _BETAS[0])
        torch._foreach_lerp_(squares, torch._foreach_mul(gradients, gradients), 1.0 - _BETAS[1])
        roots = torch._foreach_mul(squares, 1.0 / (1.0 - _BETAS[1] ** steps))
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, _EPSILON)
        changes = torch._foreach_div(means, roots)
        torch._foreach_mul_(changes, rate / (1.0 - _BETAS[0] ** steps))
        torch._foreach_sub_(parameters, changes)

    def _states(self, parameters: list[Tensor], name: str) -> list[Tensor]:
        """A state of each parameter, zeros at first."""
        for parameter in parameters:
            if name not in self.state[parameter]:
                self.state[parameter][name] = torch.zeros_like(parameter)
        return [self.state[parameter][name] for parameter in parameters]


def _is_matrix(parameter: Tensor) -> bool:
    return parameter.ndim > 1 and min(len(parameter), parameter[0].numel()) >= _SMALLEST
