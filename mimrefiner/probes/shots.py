"""1, 2 or 5 labelled images per class by logistic regression, as the paper does it and as we do.

The problem is one and the same: rows of features are centred and normalised, there is no intercept,
and lambda / 2 |w|^2 is added to the mean cross-entropy. The paper solves it with cyanure to a
tolerance of 1e-3 and leaves test rows as they are; we solve it to a gradient of 1e-7.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from mimrefiner.errors import InputError, one_of
from mimrefiner.probes.checks import (
    check_alike,
    check_finite,
    check_labels,
    check_test_labels,
    each_block,
    tidy,
)
from mimrefiner.probes.features import Features
from mimrefiner.probes.logistic import fit_logistic, rows_normalised

SOLVERS = ("converged", "cyanure")


@dataclass(frozen=True)
class LogisticRecipe:
    """A logistic regression on few images.

    The defaults are the paper's (``offline_logreg_callback.py``, ``y/eval/extreme_lowshot``), on
    the cls token of the last block before the final LayerNorm (mean of patch tokens for I-JEPA and
    Mugs B/16), in bfloat16, from centre crops, averaged over three published splits.

    Attributes:
        name: what rows of results call it.
        penalty: lambda times the number of training images.
        intercept: whether there is one; there is none in either.
        prepare_test: whether test rows are centred and normalised too. It changes no answer: the
            solution's columns sum to 0, and a factor for each row leaves the largest logit.
        solver: ``"cyanure"``, or ``"converged"`` for our own.
        interval: epochs between two of cyanure's looks at the duality gap.
        tolerance: relative duality gap at which cyanure stops, the gradient at which ours does.
        max_epochs: at which cyanure stops in any case, ours after so many iterations.
        seed: of cyanure.

    >>> PUBLISHED.penalty, PUBLISHED.tolerance, PUBLISHED.max_epochs
    (0.00025, 0.001, 300)
    """

    name: str = "logistic_published"
    penalty: float = 2.5e-4
    intercept: bool = False
    prepare_test: bool = False
    solver: str = "cyanure"
    interval: int = 10
    tolerance: float = 1e-3
    max_epochs: int = 300
    seed: int = 0

    def __post_init__(self):
        one_of("solver", self.solver, SOLVERS)
        if self.penalty <= 0 or self.tolerance <= 0 or self.max_epochs < 1:
            raise InputError(
                "expected penalty > 0, tolerance > 0 and max_epochs >= 1, got "
                f"{self.penalty}, {self.tolerance}, {self.max_epochs}"
            )
        if self.intercept:
            raise InputError("neither solver here fits an intercept: expected intercept False")


PUBLISHED = LogisticRecipe()
CONVERGED = LogisticRecipe(
    "logistic", prepare_test=True, solver="converged", tolerance=1e-7, max_epochs=2000
)


def logistic_shots(
    train: Mapping[str, Features], test: Features, recipe: LogisticRecipe = PUBLISHED
) -> pd.DataFrame:
    """Accuracy on ``test`` of a logistic regression on each of the splits, for every block.

    Args:
        train: name of a split, such as that of its list -> features of its images.
        test: what is reported.
        recipe: :data:`PUBLISHED` or :data:`CONVERGED`.

    Returns:
        One row per split, block and pooling, columns as :data:`mimrefiner.probes.checks.COLUMNS`;
        ``setting`` is the split, ``seed`` its number from 0. The paper reports the mean over
        splits.

    Raises:
        InputError: no splits, labels missing or of one class, or cyanure is not installed.

    >>> y = torch.arange(60) % 3
    >>> features = Features({"cls": torch.eye(3)[y][None]}, y, blocks=(11,), depth=12)
    >>> rows = logistic_shots({"first": features.subset([0, 1, 2])}, features, CONVERGED)
    >>> rows[["protocol", "setting", "value"]].values.tolist()
    [['logistic', 'first', 1.0]]
    """
    if not train:
        raise InputError("expected one or more splits, got none")
    rows = []
    for number, (name, features) in enumerate(train.items()):
        check_alike(features, test)
        check_finite(features, test)
        classes = check_labels(features.y, "low-shot classification", everywhere=True)
        check_test_labels(test.y, "low-shot classification")
        y = torch.searchsorted(classes, features.y)
        for pool, block, x in each_block(features):
            weights = fit_weights(rows_normalised(x.float()), y, len(classes), recipe)
            shown = test.x[pool][test.blocks.index(block)].float()
            shown = rows_normalised(shown) if recipe.prepare_test else shown
            right = classes[(shown @ weights).argmax(-1)] == test.y
            place = {"block": block, "pool": pool, "setting": name, "seed": number}
            counts = {"n_train": len(features.y), "n_test": len(test.y)}
            value = {"metric": "accuracy", "value": right.float().mean().item()}
            rows.append({"protocol": recipe.name, **place, **counts, **value})
    return tidy(rows)


def fit_weights(x: Tensor, y: Tensor, classes: int, recipe: LogisticRecipe) -> Tensor:
    """The solution, (dim, classes).

    Args:
        x: rows that are centred and normalised, (images, dim).
        y: class indices, (images,).
        classes: how many there are.
        recipe: the penalty and the solver.
    """
    if recipe.solver == "cyanure":
        return _cyanure(x, y, recipe)
    return fit_logistic(
        x[None],
        y[None],
        classes,
        1 / recipe.penalty,
        tolerance=recipe.tolerance,
        iterations=recipe.max_epochs,
    )[0]


def _cyanure(x: Tensor, y: Tensor, recipe: LogisticRecipe) -> Tensor:
    try:
        from cyanure.estimators import Classifier
    except ImportError as error:
        raise InputError(
            "the paper's solver is the package cyanure, which is not installed: "
            "pip install cyanure, or take the converged solution of the same problem"
        ) from error
    penalty = recipe.penalty / len(x)
    model = Classifier(
        loss="multiclass-logistic",
        penalty="l2",
        fit_intercept=recipe.intercept,
        lambda_1=penalty,
        lambda_2=penalty,
        tol=recipe.tolerance,
        solver="auto",
        duality_gap_interval=recipe.interval,
        max_iter=recipe.max_epochs,
        random_state=recipe.seed,
        verbose=False,
    )
    model.fit(np.ascontiguousarray(x.double().numpy()), y.numpy())
    weights = torch.from_numpy(np.asarray(model.coef_)).to(x)  # of one column for two classes
    weights = weights if weights.shape[0] == x.shape[1] else weights.T
    return weights if weights.shape[1] > 1 else torch.cat([-weights, weights], 1)
