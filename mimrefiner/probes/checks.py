"""What every probe asks of its features before it begins."""

import pandas as pd
import torch
from torch import Tensor

from mimrefiner.errors import InputError
from mimrefiner.features import Features

COLUMNS = ("block", "pool", "protocol", "metric", "seed", "value", "n_train", "n_test", "setting")


def check_finite(*parts: Features) -> None:
    """InputError that names the first block and pooling with a NaN or an infinite feature."""
    for features in parts:
        for pool, block, x in each_block(features):
            if not torch.isfinite(x).all():
                raise InputError(f"the {pool} features of block {block} (0-based) hold NaN or infinite values: check the weights")


def check_labels(y: Tensor, what: str, *, everywhere: bool = False) -> Tensor:
    """The sorted class labels in ``y``; InputError without labels or with one class only, or, if they must be ``everywhere``, where
    some images have none."""
    classes = y[y >= 0].unique()
    if len(classes) == 0:
        raise InputError(f"{what} needs labels, and this data set has none: clustering and CKA work without")
    if len(classes) == 1:
        raise InputError(f"{what} needs at least two classes, and all labels are {classes.item()}")
    without = int((y < 0).sum())
    if everywhere and without:
        raise InputError(f"{what} needs labels, and {without} of {len(y)} training images have none: leave these out")
    return classes


def each_block(features: Features):
    """(pooling, 0-based block, (images, dim)) one after the other."""
    for pool, blocks in features.x.items():
        for block, x in zip(features.blocks, blocks, strict=True):
            yield pool, block, x


def tidy(rows: list[dict]) -> pd.DataFrame:
    """Rows of a probe in one form; ``setting`` says what was selected on validation data, "" where nothing was."""
    return pd.DataFrame([{"setting": "", **row} for row in rows], columns=COLUMNS)
