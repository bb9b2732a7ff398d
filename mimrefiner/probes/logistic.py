"""Low-shot classification by logistic regression, all blocks, splits and strengths of
regularisation at once.

The paper's protocol (record of ``offline_logreg_callback.py``): every row is centred and
normalised, no intercept, L2 penalty 0.00025 / N on mean loss, which is scikit-learn's C = 4000.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from numbers import Integral

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from mimrefiner.data.datasets import stratified_split
from mimrefiner.errors import InputError
from mimrefiner.probes.checks import (
    check_alike,
    check_count,
    check_finite,
    check_labels,
    check_test_labels,
    each_block,
    tidy,
)
from mimrefiner.probes.features import Features

STRENGTHS = (4000.0,)
HISTORY = 7  # steps that L-BFGS remembers
REFRESH = 5  # steps between two looks at convergence and curvature
MEMORY = 2**30  # bytes that the problems solved together may take


def low_shot(
    train: Features,
    test: Features,
    *,
    shots: Sequence[int | float] = (1, 2, 5),
    splits: int = 3,
    strengths: Sequence[float] = STRENGTHS,
    val: Features | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    hits: bool = False,
) -> pd.DataFrame:
    """Accuracy of logistic regression on a few labelled images, for every block, pooling and split.

    Args:
        train: the pool that the splits are drawn from.
        test: what is reported.
        shots: images per class (integers), or shares of ``train`` (0.01, 0.1: the same share of
            every class).
        splits: how many draws; draw s uses seed ``seed + s``.
        strengths: scikit-learn's C; with several, ``val`` chooses per block and split.
        val: needed for that choice only.
        seed: of the first draw.
        hits: also a column of which test images are right, (n_test,) bool in every row.

    Returns:
        One row per block, pooling, shots and split, columns as
        :data:`mimrefiner.probes.checks.COLUMNS`; ``seed`` is the draw's.

    Raises:
        InputError: labels missing or of one class, a class with fewer images than shots, several
            strengths without ``val``, features of different blocks or poolings.
    """
    check_alike(train, test, *(() if val is None else (val,)))
    check_finite(train, test)
    classes = check_labels(train.y, "low-shot classification")
    check_test_labels(test.y, "low-shot classification")
    check_count("splits", splits)
    # 0 or less has no minimum
    if not len(shots) or not len(strengths) or not all(0 < c < math.inf for c in strengths):
        raise InputError(
            f"expected one or more shots, and strengths C > 0, got shots {list(shots)}, strengths {list(strengths)}"
        )
    if len(strengths) > 1 and val is None:
        raise InputError(
            f"choosing among {len(strengths)} strengths needs validation features: pass val="
        )
    parts = {"test": test, **({"val": val} if val is not None else {})}
    # Of every block
    problems = [(strength, split) for strength in range(len(strengths)) for split in range(splits)]
    rows = []
    for shot in shots:
        # (splits, images)
        draws = torch.stack([draw_shots(train.y, classes, shot, seed + s) for s in range(splits)])
        y = torch.searchsorted(classes, train.y[draws]).to(device)
        for pool, blocks, x in _chunks(train, len(problems), draws.shape[1], len(classes)):
            base = torch.stack(
                [_rows_normalised(part.to(device)[draws.to(device)].float()) for part in x]
            )
            repeated = base[:, None].expand(-1, len(strengths), -1, -1, -1).flatten(0, 2)
            strength = torch.tensor([strengths[i] for i, _ in problems] * len(blocks))
            weights = fit_logistic(
                repeated, y.repeat(len(blocks) * len(strengths), 1), len(classes), strength
            )
            for block, per_problem in zip(
                blocks, weights.unflatten(0, (len(blocks), len(strengths), splits)), strict=True
            ):
                right = {}
                for name, part in parts.items():
                    queries = part.x[pool][part.blocks.index(block)].float().to(device)
                    right[name] = _right(per_problem, queries, part.y, classes)
                # (strengths, splits)
                shares = {name: x.float().mean(-1) for name, x in right.items()}
                best = (
                    shares["val"].argmax(0)
                    if len(strengths) > 1
                    else torch.zeros(splits, dtype=torch.long)
                )
                for s in range(splits):
                    rows.append(
                        {
                            "block": block,
                            "pool": pool,
                            "protocol": f"logistic_{shot}{'' if shot < 1 else 'shot'}",
                            "metric": "accuracy",
                            "seed": seed + s,
                            "value": shares["test"][best[s], s].item(),
                            "n_train": draws.shape[1],
                            "n_test": len(test.y),
                            "setting": f"C={strengths[best[s]]:g}",
                            **({"hits": right["test"][best[s], s]} if hits else {}),
                        }
                    )
    return tidy(rows)


def draw_shots(y: Tensor, classes: Tensor, shot: int | float, seed: int) -> Tensor:
    """Rows of one split, (images,): ``shot`` images of every class, or a share of all below 1."""
    if 0 < shot < 1:
        labelled = np.flatnonzero(np.isin(y.numpy(), classes.numpy()))
        n = max(len(classes), round(shot * len(labelled)))
        return torch.from_numpy(
            labelled[stratified_split(y.numpy()[labelled], len(labelled), n, seed)[0]]
        )
    if shot < 1 or not isinstance(shot, Integral):  # 1.0 might be meant as one image or as all
        raise InputError(
            f"shots must be whole numbers such as 1 or shares between 0 and 1, got {shot}"
        )
    rng = np.random.default_rng(seed)
    rows = []
    for label in classes.tolist():
        members = np.flatnonzero(y.numpy() == label)
        if len(members) < shot:
            raise InputError(
                f"class {label} has {len(members)} images, fewer than {shot} shots: use fewer shots or more images"
            )
        rows.append(rng.choice(members, shot, replace=False))
    return torch.from_numpy(np.concatenate(rows))


def _chunks(
    train: Features, problems: int, images: int, classes: int
) -> Iterator[tuple[str, list[int], list[Tensor]]]:
    """(pooling, blocks, their features), as many blocks of one width at a time as MEMORY allows at
    ``problems`` each.
    """
    for (pool, dim), group in groupby(
        each_block(train), key=lambda entry: (entry[0], entry[2].shape[1])
    ):
        size = 8 * problems * (2 * (HISTORY + 1) * min(images, dim) * classes + 2 * images * dim)
        while chunk := list(islice(group, max(1, MEMORY // size))):
            yield pool, [block for _, block, _ in chunk], [x for _, _, x in chunk]


def fit_logistic(
    x: Tensor,
    y: Tensor,
    classes: int,
    strength: float | Tensor,
    *,
    tolerance: float = 1e-7,
    iterations: int = 2000,
) -> Tensor:
    """Multinomial logistic regression without intercept, many problems at once, by preconditioned
    L-BFGS.

    Minimises mean cross-entropy + |w|^2 / (2 C n), scikit-learn's objective divided by C n. Where
    there are fewer images than dimensions it is solved in the span of the images, in which the
    solution lies.

    Args:
        x: (problems, images, dim).
        y: class indices, (problems, images).
        classes: number of classes.
        strength: C, one or (problems,).
        tolerance: of the largest component of the gradient; at 1e-5 accuracies on digits are up to
            0.3 points off, at 1e-7 0.06.
        iterations: at most.

    Returns:
        Weights, (problems, dim, classes), of ``x``'s type.
    """
    problems, n, dim = x.shape
    small = x.double()
    # X = small @ basis.T with orthonormal columns of basis; the Gram matrix is small, its Cholesky
    # factor cheap
    if n < dim:
        gram = small @ small.mT
        # Equal images make it singular
        jitter = 1e-10 * gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
        small = torch.linalg.cholesky(
            gram + jitter[:, None, None] * torch.eye(n, device=x.device, dtype=torch.double)
        )
    penalty = (1 / (torch.as_tensor(strength, device=x.device, dtype=torch.double) * n)).expand(
        problems
    )[:, None, None]
    w = minimise(
        _Problems(small, F.one_hot(y, classes).double(), penalty),
        tolerance=tolerance,
        iterations=iterations,
    )
    if n < dim:
        w = x.double().mT @ torch.linalg.solve_triangular(small.mT, w, upper=True)
    return w.to(x.dtype)


@dataclass
class _Problems:
    """``x``: (problems, images, dim), ``target``: one-hot classes, (problems, images, classes),
    ``penalty``: (problems, 1, 1).
    """

    x: Tensor
    target: Tensor
    penalty: Tensor

    def objective(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Values, (problems,), and gradients of weights ``w``, (problems, dim, classes)."""
        logits = self.x @ w
        level = logits.logsumexp(-1, keepdim=True)
        loss = (level[..., 0] - (logits * self.target).sum(-1)).mean(-1) + 0.5 * (
            self.penalty * w.square()
        ).sum((1, 2))
        error = (logits - level).exp_().sub_(self.target)
        return loss, (self.x.mT @ error).div_(self.x.shape[1]).add_(self.penalty * w)

    def inverse_curvature(self, w: Tensor | None) -> Tensor:
        """One matrix for all classes, (problems, dim, dim): the Hessian with one p (1 - p) per
        image, between its classes' mean and largest; None: with the bound 1/4.

        Features of one block are alike, so that the Hessian's eigenvalues differ by orders of
        magnitude; this evens them out.
        """
        weight = self.x.new_full((*self.x.shape[:2], 1), 0.25)
        if w is not None:
            p = (self.x @ w).softmax(-1)
            spread = p * (1 - p)
            weight = (
                (spread.mean(-1, keepdim=True) * spread.amax(-1, keepdim=True))
                .sqrt()
                .clamp_min(1e-5)
            )
        hessian = self.x.mT @ (weight * self.x) / self.x.shape[1]
        # For huge C
        shift = torch.maximum(
            self.penalty[:, 0, 0], 1e-12 * hessian.diagonal(dim1=1, dim2=2).mean(1)
        )
        hessian.diagonal(dim1=1, dim2=2).add_(shift[:, None])
        return torch.cholesky_inverse(torch.linalg.cholesky(hessian))

    def subset(self, keep: Tensor) -> "_Problems":
        return _Problems(self.x[keep], self.target[keep], self.penalty[keep])


def minimise(problems: _Problems, *, tolerance: float, iterations: int) -> Tensor:
    """Weights, (problems, dim, classes), by L-BFGS with backtracking; problems that have converged
    leave the batch.
    """
    w = solution = problems.x.new_zeros(*problems.x.shape[::2], problems.target.shape[-1])
    value, gradient = problems.objective(w)
    history, rows = _History(w), torch.arange(len(w), device=w.device)
    for i in range(iterations):
        if i % REFRESH == 0:
            keep = gradient.abs().amax((1, 2)) > tolerance
            solution = solution.index_copy(0, rows, w)
            if not keep.all():
                if not keep.any():
                    return solution
                rows, w, value, gradient = rows[keep], w[keep], value[keep], gradient[keep]
                problems, history = problems.subset(keep), history.subset(keep)
            inverse = problems.inverse_curvature(w if i else None)
        direction = history.direction(gradient, inverse)
        slope, length = (direction * gradient).sum((1, 2)), torch.ones_like(value)
        for _ in range(30):
            trial = w - length[:, None, None] * direction
            trial_value, trial_gradient = problems.objective(trial)
            fine = trial_value <= value - 1e-4 * length * slope
            if fine.all():
                break
            length = torch.where(fine, length, 0.5 * length)
        better = (trial_value <= value)[:, None, None]
        trial, trial_gradient = (
            torch.where(better, trial, w),
            torch.where(better, trial_gradient, gradient),
        )
        history.add(trial - w, trial_gradient - gradient)
        w, value, gradient = trial, torch.minimum(trial_value, value), trial_gradient
    return solution.index_copy(0, rows, w)


class _History:
    """The last steps and changes of the gradient, and the direction they give (Nocedal and Wright,
    algorithm 7.4).

    The two loops run on coefficients of the remembered vectors, whose dot products are kept (Chen
    et al. 2014): long vectors are only touched by batched matrix products.
    """

    def __init__(self, w: Tensor):
        problems, size = len(w), w[0].numel()
        self.steps, self.changes = (
            w.new_zeros(problems, HISTORY, size),
            w.new_zeros(problems, HISTORY, size),
        )
        self.dots = w.new_zeros(problems, HISTORY, HISTORY)  # steps times changes
        self.slots: list[int] = []  # oldest first

    def subset(self, keep: Tensor) -> "_History":
        self.steps, self.changes, self.dots = self.steps[keep], self.changes[keep], self.dots[keep]
        return self

    def add(self, step: Tensor, change: Tensor) -> None:
        slot = self.slots.pop(0) if len(self.slots) == HISTORY else len(self.slots)
        self.slots.append(slot)
        self.steps[:, slot], self.changes[:, slot] = step.flatten(1), change.flatten(1)
        self.dots[:, :, slot] = _times(self.steps, self.changes[:, slot])
        self.dots[:, slot] = _times(self.changes, self.steps[:, slot])

    def direction(self, gradient: Tensor, inverse: Tensor) -> Tensor:
        """(problems, dim, classes); ``inverse``: of the curvature where nothing is remembered,
        (problems, dim, dim).
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
    """Dot products, (problems, HISTORY), of (problems, HISTORY, size) with (problems, size)."""
    return (vectors @ vector[..., None])[..., 0]


def _rows_normalised(x: Tensor) -> Tensor:
    return F.normalize(x - x.mean(-1, keepdim=True), dim=-1)


def _right(weights: Tensor, x: Tensor, y: Tensor, classes: Tensor) -> Tensor:
    """(strengths, splits, images) bool; ``weights``: (strengths, splits, dim, classes)."""
    x = _rows_normalised(x)
    # One by one: less memory
    right = [classes[(x @ w).argmax(-1).cpu()] == y for w in weights.flatten(0, 1)]
    return torch.stack(right).unflatten(0, weights.shape[:2])
