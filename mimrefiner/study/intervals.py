"""Differences between two models with their intervals, and the rule that calls a claim seen."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Difference:
    """A difference of accuracies (or other shares) with its 95 % interval, and what it decides.

    Attributes:
        mean: the difference, averaged over seeds.
        low, high: the interval that decides: above zero the claim is seen, below zero its opposite.
        by_seed: the difference of every seed.
        over: what the interval covers.
        seen, opposite: see the functions that make a difference.
    """

    mean: float
    low: float
    high: float
    by_seed: tuple[float, ...]
    over: str
    seen: bool | None
    opposite: bool

    def __str__(self) -> str:
        """The difference in percentage points."""
        mean, low, high = (f"{100 * x:+.1f}" for x in (self.mean, self.low, self.high))
        if not np.isfinite(self.low):
            return f"{mean} points (one seed: no interval)"
        single = ", ".join(f"{100 * x:+.1f}" for x in self.by_seed)
        several = f"{single} by seed, " if len(self.by_seed) > 1 else ""
        return f"{mean} points ({several}95 % interval over {self.over} {low} to {high})"

    def columns(self) -> dict[str, float | str | None]:
        """The numbers as columns of a table of claims, in points with two digits.

        >>> image_difference([np.ones(9)], [np.zeros(9)]).columns()
        {'difference': 100.0, 'low': 100.0, 'high': 100.0, 'by_seed': '100.0'}
        """
        mean, low, high = (round(100 * x, 2) for x in (self.mean, self.low, self.high))
        if not np.isfinite(low):
            low = high = None
        by_seed = " ".join(str(round(100 * x, 2)) for x in self.by_seed)
        return {"difference": mean, "low": low, "high": high, "by_seed": by_seed}


def image_difference(ours: Sequence, theirs: Sequence) -> Difference:
    """The difference of two accuracies, with the interval over the choice of test images.

    Every seed must agree: the interval reaches from the lowest end of any seed's own 95 % interval
    to the highest, so that it lies above zero exactly where every seed's interval does.

    Args:
        ours, theirs: which images were classified right, (images,) bool, one entry per seed; both
            sides of a seed are measured on the same images.

    >>> str(image_difference([np.ones(100)], [np.zeros(100)]))
    '+100.0 points (95 % interval over images +100.0 to +100.0)'
    """
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(ours, theirs, strict=True)]
    single = [paired_bootstrap(a, b) for a, b in pairs]
    by_seed, lows, highs = zip(*single, strict=True)
    low, high = min(lows), max(highs)
    over = "images" if len(single) == 1 else "images, of all seeds"
    mean = float(np.mean(by_seed))
    return Difference(mean, low, high, by_seed, over, seen=low > 0, opposite=high < 0)


def seed_difference(ours, theirs, *, images: int | None = None) -> Difference:
    """The difference of two values, with the interval over seeds (Student's t).

    It is seen where the interval lies above zero, and the opposite is seen where it lies below. One
    seed has no interval and leaves both open.

    Args:
        ours, theirs: (seeds,) each.
        images: the number of test images where the values are accuracies. Their binomial errors are
            added in quadrature, as if the two were measured on different images, which makes the
            interval wider than it need be.

    >>> str(seed_difference([0.7], [0.5]))
    '+20.0 points (one seed: no interval)'
    """
    ours, theirs = np.asarray(ours, float), np.asarray(theirs, float)
    change, n = ours - theirs, len(ours)
    if n == 1:
        return Difference(
            float(change[0]), -math.inf, math.inf, tuple(change.tolist()), "seeds", None, False
        )
    half = stats.t.ppf(0.975, n - 1) * change.std(ddof=1) / math.sqrt(n)
    over = "seeds"
    if images is not None:
        errors = [standard_error(float(np.clip(x.mean(), 0, 1)), images) for x in (ours, theirs)]
        half = math.hypot(half, *(stats.norm.ppf(0.975) * error for error in errors))
        over = "seeds and images"
    return _around(float(change.mean()), half, tuple(change.tolist()), over)


def _around(mean: float, half: float, by_seed: tuple[float, ...], over: str) -> Difference:
    seen, opposite = bool(mean > half), bool(mean < -half)
    return Difference(mean, mean - half, mean + half, by_seed, over, seen, opposite)


def paired_difference(ours: Sequence, theirs: Sequence) -> Difference:
    """The difference of two accuracies, with the interval over seeds and images together.

    The error over seeds (Student's t) and that over test images, which both models share, are added
    in quadrature. One seed has no interval.

    Args:
        ours, theirs: which images were classified right, (seeds, images) bool.

    >>> found = paired_difference(np.ones((3, 100)), np.zeros((3, 100)))
    >>> found.seen, found.over
    (True, 'seeds and images')
    """
    change = np.asarray(ours, float) - np.asarray(theirs, float)
    by_seed = seed_difference(np.mean(ours, 1), np.mean(theirs, 1))
    if len(change) == 1:
        return by_seed
    images = stats.norm.ppf(0.975) * paired_error(ours, theirs)
    half = math.hypot(by_seed.high - by_seed.mean, images)
    return _around(by_seed.mean, half, by_seed.by_seed, "seeds and images")


def paired_error(ours: Sequence, theirs: Sequence) -> float:
    """Standard error, over test images, of the difference of two models' mean accuracies.

    Args:
        ours, theirs: as :func:`paired_difference` takes them.

    >>> rng = np.random.default_rng(0)
    >>> one, other = rng.random((2, 1, 400)) < 0.8
    >>> round(paired_error(one, one), 3), round(paired_error(one, other), 3)
    (0.0, 0.029)
    """
    change = (np.asarray(ours, float) - np.asarray(theirs, float)).mean(0)
    return float(change.std(ddof=1) / math.sqrt(len(change)))


def paired_bootstrap(
    right_a: np.ndarray, right_b: np.ndarray, *, draws: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """The difference of two accuracies with its 95 % interval: (a - b, low, high).

    Images are drawn with replacement, and both models see the same draw. The interval covers the
    choice of test images; that of seeds stays outside.

    Args:
        right_a, right_b: which images each model got right, (images,) or (seeds, images), bool.
        draws: how often images are drawn.
        seed: draws them.
    """
    difference = np.atleast_2d(np.asarray(right_a, float) - np.asarray(right_b, float)).mean(0)
    rng = np.random.default_rng(seed)
    # A multinomial over the few values equals drawing images
    values, counts = np.unique(difference, return_counts=True)
    n = len(difference)
    drawn = rng.multinomial(n, counts / n, size=draws) @ values / n
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(difference.mean()), float(low), float(high)


def standard_error(share: float, n: int) -> float:
    """Binomial standard error of an accuracy on ``n`` images."""
    return math.sqrt(share * (1 - share) / n)
