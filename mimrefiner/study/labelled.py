"""Training, validation and test images of a benchmark with labels, whole or in part."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from mimrefiner.data.datasets import ImageDataset, load_dataset
from mimrefiner.data.subsets import few_labels, inat18_shots
from mimrefiner.device import default_device, has_bfloat16
from mimrefiner.errors import InputError
from mimrefiner.models.blocks import depth_of
from mimrefiner.models.encoders import load_encoder
from mimrefiner.models.pools import available_pools
from mimrefiner.probes.features import extract_features
from mimrefiner.probes.shots import CONVERGED, PUBLISHED, logistic_shots

RULE = "inat18:"  # in place of a list: the published rule, with the number of a split


def labelled_sets(
    data: str,
    *,
    labels: int | float | None = None,
    listed: str = "",
    whole: bool = False,
    seed: int = 0,
) -> dict[str, ImageDataset]:
    """The images that a benchmark trains on, chooses on and tests on, by "train", "val", "test".

    Args:
        data: data set by name or path.
        labels: images per class (1, 2, 5), or a share (0.01, 0.1); None takes all.
        listed: a published list of images, or ``inat18:SPLIT`` for iNaturalist's rule; "" draws by
            ``seed``. Both choose from all training images.
        whole: train on training and validation images together, as the paper does; then there are
            none to choose on.
        seed: draws the few labels.

    Raises:
        InputError: a list without a number of labels, and what loading and drawing refuse.

    >>> sets = labelled_sets("digits", labels=0.1)
    >>> {name: len(part) for name, part in sets.items()}, sets["train"].drawn
    ({'train': 113, 'test': 539, 'val': 126}, '10 %, drawn with seed 0')
    """
    if listed and labels is None:
        raise InputError("a list of images goes with --labels, how many there are: 1, 2, 5 or 0.01")
    whole = whole or bool(listed)
    train = load_dataset(data, split="trainval" if whole else "train")
    sets = {"train": train, "test": load_dataset(data, split="test")}
    if not whole:
        sets["val"] = load_dataset(data, split="val")
    if listed.startswith(RULE):
        number = listed.removeprefix(RULE)
        if not number.isdecimal() or not isinstance(labels, int):
            raise InputError(
                f"expected {RULE}1, {RULE}2 or {RULE}3 with whole --labels, got {listed}, {labels}"
            )
        sets["train"] = inat18_shots(train, labels, int(number))
    elif labels is not None:
        sets["train"] = few_labels(train, labels, file=listed or None, seed=seed)
    return sets


def changed(recipe, options: dict, seed: int):
    """``recipe`` with the options that are not None, and a name that says that it is another.

    >>> from mimrefiner.training.recipes import L16
    >>> changed(L16, {"epochs": None}, seed=1).name, changed(L16, {"epochs": 3}, seed=1).name
    ('in1k_l16', 'in1k_l16_changed')
    """
    given = {name: value for name, value in options.items() if value is not None}
    different = {name: value for name, value in given.items() if value != getattr(recipe, name)}
    name = f"{recipe.name}_changed" if different else recipe.name
    return replace(recipe, **different, name=name, seed=seed)


def low_shot_rows(
    model: str,
    data: str,
    labels: int | float,
    *,
    lists: Sequence[str] = (),
    solver: str = "converged",
    pool: str | None = None,
    pretrained: bool = True,
    seed: int = 0,
    num_workers: int = 0,
) -> pd.DataFrame:
    """Logistic regression on few images of ``data``, one row per list or draw.

    Features are those of the last block before the final LayerNorm.

    Args:
        model: anything that load_encoder takes.
        data, labels: see :func:`labelled_sets`.
        lists: published lists, or ``inat18:SPLIT``; none draws three times.
        solver: "converged", or "cyanure", the paper's.
        pool: "cls" or "mean"; None takes cls where there is one.
        pretrained: False gives random weights.
        seed: of the first draw.
        num_workers: processes that load images.
    """
    encoder = load_encoder(model, pretrained=pretrained)
    pools = (pool or available_pools(encoder)[0],)
    precision = torch.bfloat16 if has_bfloat16(default_device()) else None
    draws = [(listed, seed) for listed in lists] or [("", seed + i) for i in range(3)]
    chosen = {}
    for listed, number in draws:
        sets = labelled_sets(data, labels=labels, listed=listed, whole=True, seed=number)
        name = (
            f"{Path(listed).parent.name}/{sets['train'].drawn}" if listed else sets["train"].drawn
        )
        chosen[name] = sets["train"]
    if len(chosen) < len(draws):
        raise InputError(f"{', '.join(lists)} are not different lists: give each of them once")

    def features(images: ImageDataset):
        how = {"pools": pools, "autocast": precision, "num_workers": num_workers}
        return extract_features(encoder, images, blocks=(depth_of(encoder) - 1,), **how)

    train = {name: features(part) for name, part in chosen.items()}
    recipe = PUBLISHED if solver == "cyanure" else CONVERGED
    return logistic_shots(train, features(sets["test"]), recipe)
