"""Muon: momentum for weight matrices, made orthogonal before each step; AdamW for all other weights.

    optimiser = Muon(network.parameters(), lr=2e-3, weight_decay=1e-2)

Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); the scale by which one learning rate
serves both kinds of weights is Liu et al.'s, "Muon is scalable for LLM training" (2025, arXiv 2502.16982), section 2.2.
torch.optim.Muon takes two-dimensional weights alone and leaves the rest to a second optimiser; here convolutions count
as matrices of (channels out, everything else), and one optimiser means one state to save.

For the default network on one core, a step of training takes about half as long again as with AdamW, and is worth it
several times over (docs/training.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn

_MOMENTUM = 0.95
_BETAS, _EPSILON = (0.9, 0.999), 1e-8  # AdamW's, torch's defaults
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Newton and Schulz' step, tuned by Jordan to converge fast, not exactly
_NEWTON_SCHULZ_STEPS = 5
_SCALE = 0.2  # the usual root mean square of AdamW's updates
_WIDE = 3  # columns by rows
_SMALLEST = 8  # a matrix with fewer rows or columns is AdamW's


def orthogonal(matrix: Tensor) -> Tensor:
    """About the nearest matrix whose singular values are all one, by Newton and Schulz' iteration.

    Each step multiplies the matrix X from the left by a polynomial of its Gram matrix X Xᵀ. Where X is much wider than
    high, the product of the polynomials is gathered first and X is multiplied once: a third of the arithmetic.

    Args:
        matrix: (rows, columns) float32.

    Returns:
        The same shape, float32. Singular values lie between 0.7 and 1.2 or so, but for those below a hundredth of the
        largest, which do not get as far.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix) / (matrix.norm() + 1e-7)
    a, b, c = _COEFFICIENTS
    wide = x.shape[1] >= _WIDE * x.shape[0]
    gram, gathered = x @ x.T, torch.eye(0)
    for step in range(_NEWTON_SCHULZ_STEPS):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal().add_(a)
        last = step == _NEWTON_SCHULZ_STEPS - 1
        if wide:
            gathered = factor @ gathered if step else factor
            gram = gram if last else factor @ gram @ factor
        else:
            x = factor @ x
            gram = gram if last else x @ x.T
    made: Tensor = gathered @ x if wide else x
    return made.T if tall else made


class Muon(torch.optim.Optimizer):
    """The optimiser.

    Args:
        parameters: the network's.
        lr: learning rate of both kinds of weights.
        weight_decay: decoupled, of whatever has more than one dimension; biases have none.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0) -> None:
        parameters = list(parameters)
        matrices = [parameter for parameter in parameters if _is_matrix(parameter)]
        others = [parameter for parameter in parameters if not _is_matrix(parameter)]
        groups: list[dict[str, Any]] = [
            {"params": matrices, "matrices": True},
            {"params": [parameter for parameter in others if parameter.ndim > 1]},
            {"params": [parameter for parameter in others if parameter.ndim <= 1], "weight_decay": 0.0},
        ]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "matrices": False})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step along the gradients that are there."""
        if closure is not None:
            raise ValueError("Muon calls no closure")
        for group in self.param_groups:
            change = self._orthogonal_step if group["matrices"] else self._adam_step
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                    change(parameter, parameter.grad, group["lr"])

    def _orthogonal_step(self, parameter: Tensor, gradient: Tensor, rate: float) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum: Tensor = state["momentum"].lerp_(gradient, 1.0 - _MOMENTUM)
        direction = gradient.lerp(momentum, _MOMENTUM).reshape(len(parameter), -1)  # Nesterov's
        scale = _SCALE * max(direction.shape) ** 0.5
        parameter.add_(orthogonal(direction).reshape(parameter.shape), alpha=-rate * scale)

    def _adam_step(self, parameter: Tensor, gradient: Tensor, rate: float) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1.0
        mean = state["mean"].lerp_(gradient, 1.0 - _BETAS[0])
        square = state["square"].lerp_(gradient.square(), 1.0 - _BETAS[1])
        steps = float(state["step"])
        root = (square / (1.0 - _BETAS[1] ** steps)).sqrt_().add_(_EPSILON)
        parameter.addcdiv_(mean, root, value=-rate / (1.0 - _BETAS[0] ** steps))


def _is_matrix(parameter: Tensor) -> bool:
    return parameter.ndim > 1 and min(len(parameter), parameter[0].numel()) >= _SMALLEST
