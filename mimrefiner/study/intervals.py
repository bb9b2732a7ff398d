"""Differences between two models with their intervals, and the one rule by which a claim is called
seen or opposite.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Difference:
    """A difference of accuracies (or other shares) with its 95 % interval, and what it decides.

    ``by_seed``: one per seed; ``over``: what the interval covers; ``seen`` and ``opposite``: see
    :func:`image_difference` and
    :func:`seed_difference`.
    """

    mean: float
    low: float
    high: float
    by_seed: tuple[float, ...]
    over: str
    seen: bool | None
    opposite: bool

    def __str__(self) -> str:
        """In percentage points."""
        several = (
            ", ".join(f"{100 * x:+.1f}" for x in self.by_seed) + " by seed, "
            if len(self.by_seed) > 1
            else ""
        )
        interval = f"95 % interval over {self.over} {100 * self.low:+.1f} to {100 * self.high:+.1f}"
        return f"{100 * self.mean:+.1f} points ({several}{interval if np.isfinite(self.low) else 'one seed: no interval'})"


def image_difference(ours: Sequence, theirs: Sequence) -> Difference:
    """Difference of two accuracies from which test images were classified right, with the interval
    over the choice of images.

    Seen: the interval of every single seed lies above zero; opposite: that of every seed lies
    below.

    Args:
        ours, theirs: one entry per seed, (images,) bool; both of a seed on the same images.
    """
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(ours, theirs, strict=True)]
    single = [paired_bootstrap(a, b) for a, b in pairs]
    together = paired_bootstrap(*(np.stack(side) for side in zip(*pairs, strict=True)))
    seen, opposite = all(low > 0 for _, low, _ in single), all(high < 0 for _, _, high in single)
    return Difference(*together, tuple(mean for mean, _, _ in single), "images", seen, opposite)


def seed_difference(ours, theirs, *, images: int | None = None) -> Difference:
    """Difference of values of which there is one per seed, with the interval over seeds (Student's
    t).

    Seen: the interval lies above zero; opposite: below. One seed has no interval and leaves both
    open.

    Args:
        ours, theirs: (seeds,) each.
        images: number of test images where the values are accuracies: their binomial errors are
            added in quadrature, as if the two were measured on different images, which makes the
            interval wider than it need be.
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
        half, over = (
            math.hypot(half, *(stats.norm.ppf(0.975) * error for error in errors)),
            "seeds and images",
        )
    mean = float(change.mean())
    return Difference(
        mean,
        mean - half,
        mean + half,
        tuple(change.tolist()),
        over,
        bool(mean > half),
        bool(mean < -half),
    )


def paired_bootstrap(
    right_a: np.ndarray, right_b: np.ndarray, *, draws: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Difference of two accuracies on the same images with its 95 % interval: (a - b, low, high).

    Args:
        right_a, right_b: which images each model got right, (images,) or (seeds, images), bool;
            images are drawn with replacement and both models see the same draw. The interval covers
            the choice of test images, not of seeds.
    """
    difference = np.atleast_2d(np.asarray(right_a, float) - np.asarray(right_b, float)).mean(0)
    rng = np.random.default_rng(seed)
    # A multinomial over the few values equals drawing images
    values, counts = np.unique(difference, return_counts=True)
    drawn = (
        rng.multinomial(len(difference), counts / len(difference), size=draws)
        @ values
        / len(difference)
    )
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(difference.mean()), float(low), float(high)


def standard_error(share: float, n: int) -> float:
    """Binomial standard error of an accuracy on ``n`` images."""
    return math.sqrt(share * (1 - share) / n)
