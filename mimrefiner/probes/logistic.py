"""Low-shot classification by logistic regression.

All blocks, splits and strengths of regularisation are solved at once. The paper's protocol (record
of ``offline_logreg_callback.py``): every row is centred and normalised, no intercept, L2 penalty
0.00025 / N on mean loss, which is scikit-learn's C = 4000.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from mimrefiner.data.subsets import drawn_rows
from mimrefiner.errors import InputError
from mimrefiner.probes import protocols
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
from mimrefiner.probes.lbfgs import PAIRS, minimise

STRENGTHS = (4000.0,)
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
        train: the images that the splits are drawn from.
        test: what is reported.
        shots: images per class (integers), or shares of ``train`` (0.01, 0.1: the same share of
            every class).
        splits: how many draws; draw s uses seed ``seed + s``.
        strengths: scikit-learn's C; with several, ``val`` chooses per block and split.
        val: needed for that choice only.
        seed: draws the first split.
        device: where the problems are solved.
        hits: also a column that says which test images are right, (n_test,) bool in every row.

    Returns:
        One row per block, pooling, shots and split, columns as
        :data:`mimrefiner.probes.checks.COLUMNS`; ``seed`` is the draw's.

    Raises:
        InputError: labels missing or of one class, a class with fewer images than shots, several
            strengths without ``val``, features of different blocks or poolings.

    >>> y = torch.arange(60) % 3
    >>> features = Features({"cls": torch.eye(3)[y][None]}, y, blocks=(11,), depth=12)
    >>> rows = low_shot(features, features, shots=(1,), splits=2)
    >>> rows["protocol"].tolist(), rows["value"].tolist()
    (['logistic_1shot', 'logistic_1shot'], [1.0, 1.0])
    """
    settings = _Settings(splits, tuple(strengths), seed, torch.device(device))
    classes = _check(train, test, val, shots, settings)
    rows = [row for shot in shots for row in _rows(train, test, val, classes, shot, settings)]
    table = tidy(rows)
    return table if hits else table.drop(columns="hits")


@dataclass(frozen=True)
class _Settings:
    """See :func:`low_shot`."""

    splits: int
    strengths: tuple[float, ...]
    seed: int
    device: torch.device


def _check(
    train: Features, test: Features, val: Features | None, shots: Sequence, settings: _Settings
) -> Tensor:
    """The classes to tell apart; InputError for what is no use."""
    check_alike(train, test, *(() if val is None else (val,)))
    check_finite(train, test)
    classes = check_labels(train.y, "low-shot classification")
    check_test_labels(test.y, "low-shot classification")
    check_count("splits", settings.splits)
    strengths = settings.strengths
    # 0 or less has no minimum
    if not len(shots) or not len(strengths) or not all(0 < c < math.inf for c in strengths):
        raise InputError(
            "expected one or more shots, and strengths C > 0, "
            f"got shots {list(shots)}, strengths {list(strengths)}"
        )
    if len(strengths) > 1 and val is None:
        raise InputError(
            f"choosing among {len(strengths)} strengths needs validation features: pass val="
        )
    return classes


def _rows(
    train: Features,
    test: Features,
    val: Features | None,
    classes: Tensor,
    shot: int | float,
    settings: _Settings,
) -> Iterator[dict]:
    """Rows, with hits, of every block, pooling and split at one number of shots."""
    seeds = [settings.seed + split for split in range(settings.splits)]
    draws = torch.stack([draw_shots(train.y, classes, shot, seed) for seed in seeds])
    y = torch.searchsorted(classes, train.y[draws]).to(settings.device)  # (splits, images)
    problems = len(settings.strengths) * settings.splits  # per block
    common = {"protocol": protocols.low_shot(shot).name, "metric": "accuracy"}
    common |= {"n_train": draws.shape[1], "n_test": len(test.y)}
    for pool, blocks, x in _chunks(train, problems, draws.shape[1], len(classes)):
        every = _weights(x, y, draws, len(classes), settings)
        for block, weights in zip(blocks, every, strict=True):
            right = _right(weights, test, pool, block, classes)
            best = torch.zeros(settings.splits, dtype=torch.long)
            if len(settings.strengths) > 1:
                best = _right(weights, val, pool, block, classes).float().mean(-1).argmax(0)
            for split, (i, seed) in enumerate(zip(best.tolist(), seeds, strict=True)):
                yield {
                    **common,
                    "block": block,
                    "pool": pool,
                    "seed": seed,
                    "value": right[i, split].float().mean().item(),
                    "setting": f"C={settings.strengths[i]:g}",
                    "hits": right[i, split],
                }


def _weights(
    x: list[Tensor], y: Tensor, draws: Tensor, classes: int, settings: _Settings
) -> Tensor:
    """Solutions, (blocks, strengths, splits, dim, classes), from ``x``, (images, dim) per block."""
    device, strengths, splits = settings.device, settings.strengths, settings.splits
    # A few rows travel to the device, not whole blocks
    drawn = torch.stack([rows_normalised(part[draws].to(device).float()) for part in x])
    repeated = drawn[:, None].expand(-1, len(strengths), -1, -1, -1).flatten(0, 2)
    strength = torch.tensor(strengths).repeat_interleave(splits).repeat(len(x))
    weights = fit_logistic(repeated, y.repeat(len(x) * len(strengths), 1), classes, strength)
    return weights.unflatten(0, (len(x), len(strengths), splits))


def draw_shots(y: Tensor, classes: Tensor, shot: int | float, seed: int) -> Tensor:
    """Rows of one split, (images,): ``shot`` images per class, or below 1 that share of all."""
    return torch.from_numpy(drawn_rows(y.numpy(), shot, seed, classes.numpy()))


def _chunks(
    train: Features, problems: int, images: int, classes: int
) -> Iterator[tuple[str, list[int], list[Tensor]]]:
    """(pooling, blocks, their features), as many blocks of one width at a time as MEMORY allows.

    ``problems`` are solved for every block.
    """
    for (pool, dim), group in groupby(
        each_block(train), key=lambda entry: (entry[0], entry[2].shape[1])
    ):
        size = 8 * problems * (2 * (PAIRS + 1) * min(images, dim) * classes + 2 * images * dim)
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
    """Multinomial logistic regression without intercept, many problems at once.

    Minimises mean cross-entropy + |w|^2 / (2 C n), scikit-learn's objective divided by C n. Where
    there are fewer images than dimensions it is solved in the span of the images, in which the
    solution lies.

    Args:
        x: (problems, images, dim).
        y: class indices, (problems, images).
        classes: number of classes.
        strength: C, one or (problems,).
        tolerance, iterations: see :func:`mimrefiner.probes.lbfgs.minimise`; at a tolerance of 1e-5
            accuracies on digits are up to 0.3 points off, at 1e-7 0.06.

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
    strength = torch.as_tensor(strength, device=x.device, dtype=torch.double)
    penalty = (1 / (strength * n)).expand(problems)[:, None, None]
    regressions = _Problems(small, F.one_hot(y, classes).double(), penalty)
    w = minimise(regressions, tolerance=tolerance, iterations=iterations)
    if n < dim:
        w = x.double().mT @ torch.linalg.solve_triangular(small.mT, w, upper=True)
    return w.to(x.dtype)


@dataclass(frozen=True)
class _Problems:
    """Logistic regressions, many at once.

    Attributes:
        x: (problems, images, dim).
        target: one-hot classes, (problems, images, classes).
        penalty: (problems, 1, 1).
    """

    x: Tensor
    target: Tensor
    penalty: Tensor

    def start(self) -> Tensor:
        """Zeros, (problems, dim, classes)."""
        return self.x.new_zeros(*self.x.shape[::2], self.target.shape[-1])

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
        """One inverse matrix for all classes, (problems, dim, dim).

        It is that of the Hessian with one p (1 - p) per image, between its classes' mean and
        largest; for None with the bound 1/4. Features of one block are alike, so that the Hessian's
        eigenvalues differ by orders of magnitude; this evens them out.
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


def rows_normalised(x: Tensor) -> Tensor:
    """Every row of ``x``, (..., dim), without its mean and of length 1."""
    return F.normalize(x - x.mean(-1, keepdim=True), dim=-1)


def _right(weights: Tensor, features: Features, pool: str, block: int, classes: Tensor) -> Tensor:
    """Which images are right, (strengths, splits, images) bool.

    ``weights`` are (strengths, splits, dim, classes).
    """
    x = features.x[pool][features.blocks.index(block)].float().to(weights.device)
    x = rows_normalised(x)
    # One by one: less memory
    right = [classes[(x @ w).argmax(-1).cpu()] == features.y for w in weights.flatten(0, 1)]
    return torch.stack(right).unflatten(0, weights.shape[:2])
