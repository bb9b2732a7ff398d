"""What every probe asks of its features before it begins."""

from numbers import Integral

import pandas as pd
import torch
from torch import Tensor

from mimrefiner.errors import InputError
from mimrefiner.probes.features import Features

COLUMNS = ("block", "pool", "protocol", "metric", "seed", "value", "n_train", "n_test", "setting")


def check_finite(*parts: Features) -> None:
    """InputError that names the first block and pooling with a NaN or an infinite feature."""
    for features in parts:
        for pool, block, x in each_block(features):
            if not torch.isfinite(x).all():
                raise InputError(
                    f"the {pool} features of block {block} (0-based) hold NaN or infinite values: "
                    "check the weights"
                )


def check_labels(y: Tensor, what: str, *, everywhere: bool = False) -> Tensor:
    """The sorted class labels in ``y``, (images,).

    Raises:
        InputError: no labels, or one class only; with ``everywhere`` also one image without label.
    """
    classes = y[y >= 0].unique()
    if len(classes) == 0:
        raise InputError(
            f"{what} needs labels, and this data set has none: clustering and CKA work without"
        )
    if len(classes) == 1:
        raise InputError(
            f"{what} needs at least two classes, and all labels are {classes.item()}: give images "
            "of more classes, one folder for each"
        )
    without = int((y < 0).sum())
    if everywhere and without:
        raise InputError(
            f"{what} needs labels, and {without} of {len(y)} training images have none: "
            "leave these out"
        )
    return classes


def check_test_labels(y: Tensor, what: str) -> None:
    """InputError without test images, or where one has no label: it would count as wrong."""
    if len(y) == 0:
        raise InputError(f"{what} needs test images, and there are none")
    if without := int((y < 0).sum()):
        raise InputError(
            f"{without} of {len(y)} test images have no label, and {what} counts right answers: "
            "leave them out"
        )


def check_alike(train: Features, *others: Features) -> None:
    """InputError that names a pooling and block which are not in all features, in one width."""
    first, *rest = (
        {(pool, block, x.shape[1]) for pool, block, x in each_block(part) if pool in train.x}
        for part in (train, *others)
    )
    for part in rest:
        for pool, block, width in sorted(first ^ part):
            raise InputError(
                f"the {pool} features of block {block} (0-based), {width} wide, are not in both "
                "training and test features: extract both with the same encoder, blocks and pools"
            )


def check_count(name: str, value, least: int = 1) -> None:
    """InputError unless ``value`` is a whole number of at least ``least``."""
    if not isinstance(value, Integral) or value < least:
        raise InputError(f"{name} must be a whole number >= {least}, got {value!r}")


def each_block(features: Features):
    """(pooling, 0-based block, (images, dim)) one after the other."""
    for pool, blocks in features.x.items():
        for block, x in zip(features.blocks, blocks, strict=True):
            yield pool, block, x


def tidy(rows: list[dict]) -> pd.DataFrame:
    """Rows of a probe with the columns COLUMNS.

    ``setting`` says what was selected on validation data, "" where nothing was. Rows may also hold
    ``hits``, which test images are right, (n_test,) bool.
    """
    hits = ("hits",) if rows and "hits" in rows[0] else ()
    return pd.DataFrame([{"setting": "", **row} for row in rows], columns=[*COLUMNS, *hits])
