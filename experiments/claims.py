"""Claims: who is compared with whom, by which probe, and what the measurements say."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from experiments.measure import Measured
from mimrefiner.probes.protocols import KMEANS, KNN, Protocol
from mimrefiner.study.claims import About, Record
from mimrefiner.study.intervals import image_difference, seed_difference
from mimrefiner.study.presets import Preset
from mimrefiner.study.tables import mean_sd

Found = dict[tuple[str, int], Measured]  # (model, seed) -> what was measured of it
MORE_PRETRAINING = "refinement beats as much computation spent on masked pre-training"


@dataclass(frozen=True)
class Recipe:
    """One pre-trained model, and the seeds with which it is refined."""

    name: str
    preset: Preset
    seeds: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a model, and one of its blocks.

    Attributes:
        name: what claims call it.
        model: the model's name; {recipe} in it stands for the recipe's.
        best: whether the block is the one chosen on validation images, else it is the last one.
        pool: the pooling, where it is not that of the claim.
    """

    name: str
    model: str
    best: bool = False
    pool: str = ""

    def measured(self, found: Found, recipe: Recipe) -> list[Measured]:
        """What was measured of the model, one per seed; [] where there is no such model."""
        model = self.model.format(recipe=recipe.name)
        return [found[model, s] for s in dict.fromkeys((0, *recipe.seeds)) if (model, s) in found]

    def right(self, measured: Measured, claim: "Claim", data: str) -> torch.Tensor | None:
        """Which test images are right, (images,); None where that was not measured."""
        pool = self.pool or claim.pool
        blocks = measured.hits.get((data, pool, claim.protocol.label))
        if blocks is None:
            return None
        return blocks[measured.best[data, pool] if self.best else -1].float()


LAST = Side("the last block before", "{recipe}")
BEST = Side("the best block before", "{recipe}", best=True)
REFINED = Side("the refined last block", "{recipe} refined")
PIXELS = Side("raw pixels", "raw pixels", pool="pixels")


@dataclass(frozen=True)
class Claim:
    """One row of the table of claims: who is compared with whom, by which protocol."""

    text: str
    ours: Side
    theirs: Side
    pool: str
    protocol: Protocol = KNN


def judge(claim: Claim, found: Found, recipe: Recipe, data: str, record: Record) -> None:
    """Add one claim; nothing where one of its sides was not measured.

    Seeds are compared one by one; where the other side has fewer, its first one stands in.
    """
    ours, theirs = (side.measured(found, recipe) for side in (claim.ours, claim.theirs))
    if not ours or not theirs:
        return
    theirs = [*theirs, *theirs[:1] * len(ours)][: len(ours)]
    if claim.protocol == KMEANS:
        values, others = ([m.clusters(data) for m in side] for side in (ours, theirs))
        if None in (*values, *others):
            return
        n_test = ours[0].hits[data, claim.pool, KNN.label].shape[1]
        difference = seed_difference(values, others, images=n_test)
    else:
        right = [claim.ours.right(m, claim, data) for m in ours]
        against = [claim.theirs.right(m, claim, data) for m in theirs]
        if any(x is None for x in (*right, *against)):
            return
        values, others = ([x.mean().item() for x in side] for side in (right, against))
        n_test, difference = len(against[0]), image_difference(right, against)
    text = "" if claim.protocol == KNN else f"{_shown(others)} against {mean_sd(values)} %: "
    if BEST in (claim.ours, claim.theirs):
        (before,) = LAST.measured(found, recipe)
        best, depth = before.best[data, claim.pool], len(before.hits[data, claim.pool, KNN.label])
        inside = best < depth - 1
        if claim.theirs == BEST and not inside:  # else the comparison with the last block again
            return
        if claim.theirs == LAST:
            text = f"block {best + 1} of {depth}, chosen on validation: "
            if not inside:
                text = f"the block chosen on validation is the last one, {depth}: "
    about = About(recipe.name, data, claim.pool, claim.protocol.label, claim.theirs.name)
    record.judge(claim.text, difference, n_test=n_test, text=text, about=about)


def _shown(values: Sequence[float]) -> str:
    """One value that all share, else mean and standard deviation; in percent."""
    return mean_sd(values) if len(set(values)) > 1 else f"{100 * values[0]:.1f}"
