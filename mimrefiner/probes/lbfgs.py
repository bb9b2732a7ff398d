"""L-BFGS for many small problems at once.

Problems that have converged leave the batch. A preconditioner stands in for the curvature of which
nothing is remembered yet.
"""

from typing import Protocol, Self

import torch
from torch import Tensor

PAIRS = 7  # steps and changes of the gradient that are remembered
REFRESH = 5  # steps between two looks at convergence and curvature
TRIES = 30  # times that a step is halved


class Problems(Protocol):
    """What is minimised: values and gradients of weights, (problems, dim, classes)."""

    def start(self) -> Tensor:
        """The weights to begin with."""

    def objective(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Values, (problems,), and gradients, as ``w``."""

    def inverse_curvature(self, w: Tensor | None) -> Tensor:
        """The preconditioner at ``w``, (problems, dim, dim); None asks for a bound."""

    def subset(self, keep: Tensor) -> Self:
        """The problems where ``keep``, (problems,) bool."""


def minimise(problems: Problems, *, tolerance: float, iterations: int) -> Tensor:
    """Weights, (problems, dim, classes), by L-BFGS with backtracking.

    Args:
        problems: see :class:`Problems`.
        tolerance: a problem is solved when no component of its gradient is larger.
        iterations: at most.
    """
    w = solution = problems.start()
    value, gradient = problems.objective(w)
    history, rows = _History(w), torch.arange(len(w), device=w.device)
    for i in range(iterations):
        if i % REFRESH == 0:
            keep = gradient.abs().amax((1, 2)) > tolerance
            solution = solution.index_copy(0, rows, w)
            if not keep.any():
                return solution
            if not keep.all():
                rows, w, value, gradient = rows[keep], w[keep], value[keep], gradient[keep]
                problems, history = problems.subset(keep), history.subset(keep)
            inverse = problems.inverse_curvature(w if i else None)
        direction = history.direction(gradient, inverse)
        slope, length = (direction * gradient).sum((1, 2)), torch.ones_like(value)
        for _ in range(TRIES):
            trial = w - length[:, None, None] * direction
            trial_value, trial_gradient = problems.objective(trial)
            fine = trial_value <= value - 1e-4 * length * slope
            if fine.all():
                break
            length = torch.where(fine, length, 0.5 * length)
        better = (trial_value <= value)[:, None, None]
        trial = torch.where(better, trial, w)
        trial_gradient = torch.where(better, trial_gradient, gradient)
        history.add(trial - w, trial_gradient - gradient)
        w, value, gradient = trial, torch.minimum(trial_value, value), trial_gradient
    return solution.index_copy(0, rows, w)


class _History:
    """The last steps and changes of the gradient, and the direction they give.

    Algorithm 7.4 of Nocedal and Wright. The two loops run on coefficients of the remembered
    vectors, whose dot products are kept (Chen et al. 2014): long vectors are only touched by
    batched matrix products.
    """

    def __init__(self, w: Tensor):
        problems, size = len(w), w[0].numel()
        self.steps, self.changes = w.new_zeros(2, problems, PAIRS, size)
        self.dots = w.new_zeros(problems, PAIRS, PAIRS)  # steps times changes
        self.slots: list[int] = []  # oldest first

    def subset(self, keep: Tensor) -> "_History":
        self.steps, self.changes, self.dots = self.steps[keep], self.changes[keep], self.dots[keep]
        return self

    def add(self, step: Tensor, change: Tensor) -> None:
        slot = self.slots.pop(0) if len(self.slots) == PAIRS else len(self.slots)
        self.slots.append(slot)
        self.steps[:, slot], self.changes[:, slot] = step.flatten(1), change.flatten(1)
        self.dots[:, :, slot] = _times(self.steps, self.changes[:, slot])
        self.dots[:, slot] = _times(self.changes, self.steps[:, slot])

    def direction(self, gradient: Tensor, inverse: Tensor) -> Tensor:
        """(problems, dim, classes).

        ``inverse`` stands for the curvature that is not remembered, (problems, dim, dim).
        """
        if not self.slots:
            return inverse @ gradient
        curvature = self.dots.diagonal(dim1=1, dim2=2)
        scale = torch.where(curvature > 1e-25, 1 / curvature.clamp_min(1e-25), 0.0)
        along, alpha = _times(self.steps, gradient.flatten(1)), torch.zeros_like(curvature)
        for slot in reversed(self.slots):
            alpha[:, slot] = scale[:, slot] * (along[:, slot] - (self.dots[:, slot] * alpha).sum(1))
        rest = gradient.flatten(1) - (alpha[:, None] @ self.changes)[:, 0]
        direction = (inverse @ rest.view_as(gradient)).flatten(1)
        along, weight = _times(self.changes, direction), torch.zeros_like(curvature)
        for slot in self.slots:
            beta = scale[:, slot] * (along[:, slot] + (self.dots[:, :, slot] * weight).sum(1))
            weight[:, slot] = alpha[:, slot] - beta
        return (direction + (weight[:, None] @ self.steps)[:, 0]).view_as(gradient)


def _times(vectors: Tensor, vector: Tensor) -> Tensor:
    """Dot products, (problems, PAIRS), of (problems, PAIRS, size) with (problems, size)."""
    return (vectors @ vector[..., None])[..., 0]
