"""Low-shot classification by logistic regression, all blocks, splits and strengths of regularisation at once.

The paper's protocol (record of ``offline_logreg_callback.py``): every row is centred and normalised, no intercept, L2 penalty
0.00025 / N on mean loss, which is scikit-learn's C = 4000.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, islice

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from mimrefiner.data import stratified_split
from mimrefiner.errors import InputError
from mimrefiner.features import Features
from mimrefiner.probes.checks import check_finite, check_labels, each_block, tidy

STRENGTHS = (4000.0,)
HISTORY = 10  # steps that L-BFGS remembers
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
) -> pd.DataFrame:
    """Accuracy of logistic regression on a few labelled images, for every block, pooling and split.

    Args:
        train: the pool that the splits are drawn from.
        test: what is reported.
        shots: images per class (integers), or shares of ``train`` (0.01, 0.1: the same share of every class).
        splits: how many draws; draw s uses seed ``seed + s``.
        strengths: scikit-learn's C; with several, ``val`` chooses per block and split.
        val: needed for that choice only.
        seed: of the first draw.

    Returns:
        One row per block, pooling, shots and split, columns as :data:`mimrefiner.probes.checks.COLUMNS`; ``seed`` is the draw's.

    Raises:
        InputError: labels missing or of one class, a class with fewer images than shots, several strengths without ``val``.
    """
    check_finite(train, test)
    classes = check_labels(train.y, "low-shot classification")
    if len(strengths) > 1 and val is None:
        raise InputError(f"choosing among {len(strengths)} strengths needs validation features: pass val=")
    parts = {"test": test, **({"val": val} if val is not None else {})}
    problems = [(strength, split) for strength in range(len(strengths)) for split in range(splits)]  # of every block
    rows = []
    for shot in shots:
        draws = torch.stack([draw_shots(train.y, classes, shot, seed + s) for s in range(splits)])  # (splits, images)
        y = torch.searchsorted(classes, train.y[draws]).to(device)
        for pool, blocks, x in _chunks(train, len(problems), draws.shape[1], len(classes)):
            base = torch.stack([_rows_normalised(part.to(device)[draws.to(device)].float()) for part in x])
            repeated = base[:, None].expand(-1, len(strengths), -1, -1, -1).flatten(0, 2)
            strength = torch.tensor([strengths[i] for i, _ in problems] * len(blocks))
            weights = fit_logistic(repeated, y.repeat(len(blocks) * len(strengths), 1), len(classes), strength)
            for block, per_problem in zip(blocks, weights.unflatten(0, (len(blocks), len(strengths), splits)), strict=True):
                right = {}
                for name, part in parts.items():
                    queries = part.x[pool][part.blocks.index(block)].float().to(device)
                    right[name] = _accuracy(per_problem, queries, part.y, classes)
                best = right["val"].argmax(0) if len(strengths) > 1 else torch.zeros(splits, dtype=torch.long)
                for s in range(splits):
                    rows.append({
                        "block": block, "pool": pool, "protocol": f"logistic_{shot}{'' if shot < 1 else 'shot'}",
                        "metric": "accuracy", "seed": seed + s, "value": right["test"][best[s], s].item(),
                        "n_train": draws.shape[1], "n_test": len(test.y), "setting": f"C={strengths[best[s]]:g}",
                    })  # fmt: skip
    return tidy(rows)


def draw_shots(y: Tensor, classes: Tensor, shot: int | float, seed: int) -> Tensor:
    """Rows of one split, (images,): ``shot`` images of every class, or a share of all below 1."""
    if 0 < shot < 1:
        labelled = np.flatnonzero(np.isin(y.numpy(), classes.numpy()))
        n = max(len(classes), round(shot * len(labelled)))
        return torch.from_numpy(labelled[stratified_split(y.numpy()[labelled], len(labelled), n, seed)[0]])
    if shot < 1 or shot != int(shot):
        raise InputError(f"shots must be whole numbers >= 1 or shares between 0 and 1, got {shot}")
    rng = np.random.default_rng(seed)
    rows = []
    for label in classes.tolist():
        members = np.flatnonzero(y.numpy() == label)
        if len(members) < shot:
            raise InputError(f"class {label} has {len(members)} images, fewer than {shot} shots: use fewer shots or more images")
        rows.append(rng.choice(members, int(shot), replace=False))
    return torch.from_numpy(np.concatenate(rows))


def _chunks(train: Features, problems: int, images: int, classes: int) -> Iterator[tuple[str, list[int], list[Tensor]]]:
    """(pooling, blocks, their features), as many blocks of one width at a time as MEMORY allows at ``problems`` each."""
    for (pool, dim), group in groupby(each_block(train), key=lambda entry: (entry[0], entry[2].shape[1])):
        size = 8 * problems * (2 * (HISTORY + 1) * min(images, dim) * classes + 2 * images * dim)
        while chunk := list(islice(group, max(1, MEMORY // size))):
            yield pool, [block for _, block, _ in chunk], [x for _, _, x in chunk]


def fit_logistic(
    x: Tensor, y: Tensor, classes: int, strength: float | Tensor, *, tolerance: float = 1e-5, iterations: int = 1000
) -> Tensor:
    """Multinomial logistic regression without intercept, many problems at once, by L-BFGS.

    Minimises mean cross-entropy + |w|^2 / (2 C n), scikit-learn's objective divided by C n. Where there are fewer images than
    dimensions it is solved in the span of the images, in which the solution lies.

    Args:
        x: (problems, images, dim).
        y: class indices, (problems, images).
        classes: number of classes.
        strength: C, one or (problems,).
        tolerance: of the largest component of the gradient.
        iterations: at most.

    Returns:
        Weights, (problems, dim, classes), of ``x``'s type.
    """
    problems, n, dim = x.shape
    small = x.double()
    if n < dim:  # x = small @ basis.T with orthonormal columns of basis; the Gram matrix is small, its Cholesky factor cheap
        gram = small @ small.mT
        jitter = 1e-10 * gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)  # equal images make it singular
        small = torch.linalg.cholesky(gram + jitter[:, None, None] * torch.eye(n, device=x.device, dtype=torch.double))
    target = F.one_hot(y, classes).double()
    penalty = (1 / (torch.as_tensor(strength, device=x.device, dtype=torch.double) * n)).expand(problems)[:, None, None]

    def objective(w: Tensor) -> tuple[Tensor, Tensor]:
        w = w.view(problems, -1, classes)
        logits = small @ w
        loss = (logits.logsumexp(-1) - (logits * target).sum(-1)).mean(-1) + 0.5 * (penalty * w.square()).sum((1, 2))
        gradient = small.mT @ (logits.softmax(-1) - target) / n + penalty * w
        return loss, gradient.flatten(1)

    start = x.new_zeros(problems, small.shape[-1] * classes, dtype=torch.double)
    w = minimise(objective, start, tolerance=tolerance, iterations=iterations).view(problems, -1, classes)
    if n < dim:
        w = x.double().mT @ torch.linalg.solve_triangular(small.mT, w, upper=True)
    return w.to(x.dtype)


def minimise(objective: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor, *, tolerance: float, iterations: int) -> Tensor:
    """L-BFGS with backtracking on many convex problems at once.

    ``objective``: (problems, size) -> values (problems,) and gradients (problems, size). A problem that has converged stays put
    while others go on.
    """
    value, gradient = objective(x)
    history = _History(x)
    for _ in range(iterations):
        open_ = gradient.abs().amax(1) > tolerance
        if not open_.any():
            break
        direction = history.direction(gradient)
        slope = (direction * gradient).sum(1)
        length = torch.where(open_, 1.0, 0.0).to(x) if history.slots else open_ / gradient.norm(dim=1).clamp_min(1.0)
        for _ in range(30):
            trial = x - length[:, None] * direction
            trial_value, trial_gradient = objective(trial)
            fine = trial_value <= value - 1e-4 * length * slope
            if fine.all():
                break
            length = torch.where(fine, length, 0.5 * length)
        better = trial_value <= value
        trial, trial_value = torch.where(better[:, None], trial, x), torch.where(better, trial_value, value)
        trial_gradient = torch.where(better[:, None], trial_gradient, gradient)
        step = trial - x
        if not (step != 0).any():  # rounding stops every problem
            break
        history.add(step, trial_gradient - gradient)
        x, value, gradient = trial, trial_value, trial_gradient
    return x


class _History:
    """The last steps and changes of the gradient, and the direction they give (Nocedal and Wright, algorithm 7.4).

    The two loops run on coefficients of the remembered vectors, whose dot products are kept (Chen et al. 2014): long vectors are
    only touched by batched matrix products.
    """

    def __init__(self, x: Tensor):
        problems, size = x.shape
        self.vectors = x.new_zeros(problems, 2 * HISTORY, size)  # steps, then changes
        self.dots = x.new_zeros(problems, 2 * HISTORY, 2 * HISTORY)
        self.slots: list[int] = []  # oldest first

    def add(self, step: Tensor, change: Tensor) -> None:
        slot = self.slots.pop(0) if len(self.slots) == HISTORY else len(self.slots)
        self.slots.append(slot)
        for row, vector in ((slot, step), (HISTORY + slot, change)):
            self.vectors[:, row] = vector
        for row in (slot, HISTORY + slot):
            self.dots[:, row] = self.dots[:, :, row] = (self.vectors @ self.vectors[:, row, :, None])[..., 0]

    def direction(self, gradient: Tensor) -> Tensor:
        """(problems, size); the gradient itself where nothing is remembered."""
        if not self.slots:
            return gradient
        dots, along = self.dots, (self.vectors @ gradient[..., None])[..., 0]  # (problems, 2 * HISTORY)
        weight, alphas = torch.zeros_like(along), {}
        curvature = dots[:, :HISTORY, HISTORY:].diagonal(dim1=1, dim2=2)
        inverse = torch.where(curvature > 1e-20, 1 / curvature.clamp_min(1e-20), 0.0)
        for slot in reversed(self.slots):
            alphas[slot] = inverse[:, slot] * (along[:, slot] + (dots[:, slot] * weight).sum(1))
            weight[:, HISTORY + slot] -= alphas[slot]
        newest = self.slots[-1]
        gamma = curvature[:, newest] / dots[:, HISTORY + newest, HISTORY + newest].clamp_min(1e-30)
        gamma = torch.where(gamma > 0, gamma, 1.0)
        weight *= gamma[:, None]
        for slot in self.slots:
            beta = inverse[:, slot] * (gamma * along[:, HISTORY + slot] + (dots[:, HISTORY + slot] * weight).sum(1))
            weight[:, slot] += alphas[slot] - beta
        return gamma[:, None] * gradient + (weight[:, None] @ self.vectors)[:, 0]


def _rows_normalised(x: Tensor) -> Tensor:
    return F.normalize(x - x.mean(-1, keepdim=True), dim=-1)


def _accuracy(weights: Tensor, x: Tensor, y: Tensor, classes: Tensor) -> Tensor:
    """(strengths, splits); ``weights``: (strengths, splits, dim, classes)."""
    x = _rows_normalised(x)
    right = [(classes[(x @ w).argmax(-1).cpu()] == y).float().mean() for w in weights.flatten(0, 1)]  # one by one: less memory
    return torch.stack(right).unflatten(0, weights.shape[:2])
