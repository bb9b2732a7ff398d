"""Readers of what was measured beforehand and is committed in ``experiments/``."""

from pathlib import Path

import numpy as np
import pandas as pd

from mimrefiner.files import project_folder
from mimrefiner.study.intervals import Difference, paired_difference, seed_difference

INGREDIENTS = {  # claim about an ingredient of refinement -> the ablation without it
    "several heads beat one": "number of heads: 1 (last block)",
    "neighbours beat the image's own view": "neighbours: own view (no queue)",
    "drawing among 20 neighbours beats taking the nearest": "neighbours: top-1 in stage 3",
    "swapping the positive alone beats swapping negatives too": "negatives: swapped too (NNCLR)",
    "heads on the last blocks beat heads on the last and random blocks": (
        "place of heads: last and random blocks"
    ),
    "heads on the last blocks beat heads from the measured peak on": (
        "place of heads: from the measured peak on"
    ),
    "the intended pairing of views beats the published one": "pairing of views: published",
    "stage 2 is worth its computation": "stages: no stage 2, same compute",
    "masked pre-training and refinement beat refinement's objective alone, from random weights": (
        "start: random weights, same compute in all"
    ),
}


def experiments_folder() -> Path:
    """The folder of the committed rows, in the checkout."""
    return project_folder() / "experiments"


def study(name: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows and claims of the study ``name``, such as natural or real."""
    file = experiments_folder() / f"evidence_{name}.csv"
    return pd.read_csv(file), pd.read_csv(file.with_name(f"evidence_{name}_claims.csv"))


def evidence() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows and claims of the natural images: those of the GPU where there are any."""
    on_gpu = (experiments_folder() / "evidence_natural-gpu.csv").is_file()
    return study("natural-gpu" if on_gpu else "natural")


def real_maps() -> pd.DataFrame:
    """Where test images lie on maps of the real encoder: model, image, class, x, y."""
    return pd.read_csv(experiments_folder() / "evidence_real_maps.csv")


def real_cka() -> pd.DataFrame:
    """CKA between the blocks of the real encoder: a, b (models), block_a, block_b, value."""
    return pd.read_csv(experiments_folder() / "evidence_real_cka.csv")


def ablation_rows(preset_name: str) -> pd.DataFrame:
    """The rows of the ablations of a preset; none where the file is missing."""
    file = experiments_folder() / f"ablations_{preset_name}.csv"
    return pd.read_csv(file) if file.is_file() else pd.DataFrame()


def last_block(preset_name: str) -> pd.DataFrame:
    """Of the ablations of a preset, the accuracy of the last block's cls token.

    Returns:
        a row per seed, a column per model: the recipe first, then the model before refinement and
        the variants.
    """
    rows = ablation_rows(preset_name)
    rows = rows[(rows["pool"] == "cls") & (rows["block"] == rows["block"].max())]
    values = rows.pivot(index="seed", columns="model", values="value")
    names = list(dict.fromkeys(rows["model"]))
    return values[sorted(names, key=lambda name: not name.startswith("recipe"))]


def ablation_hits(preset_name: str) -> dict[str, np.ndarray]:
    """Which test images are right in the last block (cls token), by model.

    Returns:
        (seeds, images) bool; a model with fewer seeds has the first of them. {} where accuracies
        alone were kept.
    """
    file = experiments_folder() / f"ablations_{preset_name}_hits.csv"
    if not file.is_file():
        return {}
    kept = pd.read_csv(file, dtype={"hits": str})
    kept = kept[kept["pool"] == "cls"].sort_values("seed", kind="stable")
    return {
        model: np.array([list(text) for text in hits]) == "1"
        for model, hits in kept.groupby("model", sort=False)["hits"]
    }


def ablation_gains(preset_name: str) -> dict[str, Difference]:
    """What the recipe has more than each variant, and than the model before refinement.

    Seeds are paired, since both sides start from the same pre-trained model; images are paired
    too where it was kept which of them are right.
    """
    values, hits = last_block(preset_name), ablation_hits(preset_name)
    images = int(ablation_rows(preset_name)["n_test"].iloc[0])
    recipe, *others = values
    gains = {}
    for name in others:
        pairs = values[[recipe, name]].dropna()
        if hits:
            gains[name] = paired_difference(hits[recipe][: len(hits[name])], hits[name])
        else:
            gains[name] = seed_difference(pairs[recipe], pairs[name], images=images)
    return gains


def gains_table(gains: dict[str, Difference]) -> pd.DataFrame:
    """A row per variant: what :func:`ablation_gains` found, in points."""
    return pd.DataFrame([{"variant": name, **gain.columns()} for name, gain in gains.items()])
