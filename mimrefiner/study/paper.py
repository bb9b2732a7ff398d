"""Which of our rows measure a published number, and what it would take to measure the others."""

import numpy as np
import pandas as pd

from mimrefiner.files import ASSETS
from mimrefiner.models.catalogue import BY_NAME
from mimrefiner.probes import protocols
from mimrefiner.study.presets import IMAGENET, PAPER_MODELS, load_preset

PAPER_VALUES = ASSETS / "paper_values.csv"


def paper_values() -> pd.DataFrame:
    """The published numbers, with source and confidence, one per row."""
    return pd.read_csv(PAPER_VALUES)


def compare(measured: pd.DataFrame, pairs: dict[str, str] | None = None) -> pd.DataFrame:
    """Every published number beside what was measured; a missing measurement stays empty, nothing
    is copied across.

    Args:
        measured: result rows with a column ``paper_id`` that says which paper row they measure
            ("model|backbone|dataset|protocol|metric") and one row per seed; rows without one are
            passed over.
        pairs: reasons why a measurement is not comparable, by paper_id.

    Returns:
        The paper's rows with measured mean, sd, n_seeds, difference, comparable ("yes", "no" or
        empty) and why_not.
    """
    paper = paper_values()
    keys = ["model", "backbone", "dataset", "protocol", "metric"]
    paper["paper_id"] = paper[keys].fillna("").agg("|".join, axis=1)
    if "paper_id" in measured and len(measured):
        summary = (
            measured.groupby("paper_id")["value"]
            .agg(measured="mean", sd="std", n_seeds="size")
            .reset_index()
        )
    else:
        summary = pd.DataFrame(columns=["paper_id", "measured", "sd", "n_seeds"])
    table = paper.merge(summary, on="paper_id", how="left")
    table["difference"] = table["measured"].astype(float) - table["value"]
    reasons = pairs or {}
    table["why_not"] = (
        table["paper_id"].map(reasons).where(table["measured"].notna(), "").fillna("")
    )
    table["comparable"] = np.where(
        table["measured"].isna(), "", np.where(table["why_not"] == "", "yes", "no")
    )
    return table


IMAGENET_TRAIN = 1_281_167


FAMILIES = {
    "MAE": "mae",
    "MAE (original)": "mae",
    "MAE-Refined": "mae_refined",
    "D2V2": "d2v2",
    "D2V2-Refined": "d2v2_refined",
    "dBOT": "dbot",
    "dBOT-Refined": "dbot_refined",
    "CrossMAE": "crossmae",
    "iBOT": "ibot",
    "Mugs": "mugs",
    "MAE-CT": "maect",
    "MAE-CT_aug": "maectaug",
    "DINO": "dino",
    "MIM-Refiner (D2V2-Refined)": "d2v2_refined",
}


# As notebooks name models -> as the paper does
STAGES = {"before": "", "refined": "-Refined", "refined (EMA)": "-Refined"}


PAPER_NAMES = {"mae": "MAE", "d2v2": "D2V2", "dbot": "dBOT", "crossmae": "CrossMAE"}


KNN = ("IN1K", "k-NN", "top1", "")


TUNED = "logistic regression on frozen features; the paper fine-tunes"


DRAWN = "labelled images drawn here, not the published splits"


UNSTATED = "the paper states neither split nor algorithm"


CLUSTERS = "clustering (split and algorithm not stated in image)"


# Protocols that differ from seed to seed on the same weights and images
BEGIN_AT_RANDOM = ("linear", "kmeans")


# (protocol, metric) of our rows -> dataset, protocol, metric of paper_values.csv, and why the two
# are not comparable ("": they are)
PROTOCOLS = {
    (protocols.KNN.name, "accuracy"): KNN,
    ("knn", "accuracy"): KNN,
    **{
        (f"logistic_{n}shot", "accuracy"): (f"IN1K {n}-shot", "low-shot", "top1", DRAWN)
        for n in (1, 2, 5)
    },
    ("logistic_0.01", "accuracy"): ("IN1K 1%", "fine-tune", "top1", TUNED),
    ("logistic_0.1", "accuracy"): ("IN1K 10%", "fine-tune", "top1", TUNED),
    ("linear", "accuracy"): (
        "IN1K",
        "linear probe",
        "top1",
        "features of centre crops; the paper augments",
    ),
    **{
        ("kmeans", metric): ("IN1K", CLUSTERS, metric, UNSTATED)
        for metric in ("ACC", "NMI", "AMI", "ARI")
    },
    ("kmeans", "silhouette"): ("IN1K", "class separation", "silhouette(x100)", UNSTATED),
}


def measurements(rows: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, str]]:
    """What of the result rows measures a published number, for
    :func:`mimrefiner.study.paper.compare`.

    These are rows of the last block of released weights on ImageNet-1K, made with a ``paper-*``
    preset; of several banks of training images the largest one counts. Released weights are one
    model, whatever the seed: k-NN, and the mean over draws of labelled images, are one value for
    each of them; linear probes and k-means, which begin at random, one for each seed.

    Args:
        rows: columns ROW_COLUMNS.

    Returns:
        One row per published number, weights and seed, with a column ``paper_id`` and ``value`` in
        the paper's unit (percent); why some are not comparable, by paper_id.
    """
    found, reasons = [], {}
    for row in rows.to_dict("records"):
        key = (row["protocol"], row["metric"])
        if row["dataset"] != IMAGENET or row["model"] not in STAGES or key not in PROTOCOLS:
            continue
        preset = load_preset(row["preset"])
        family, size = row["preset"].removeprefix("paper-").split("-")
        if row["block"] != preset.encoder.depth - 1 or row["pool"] != preset.refine.pool:
            continue
        dataset, protocol, metric, reason = PROTOCOLS[key]
        patch = preset.encoder.patch_size
        paper_id = "|".join(
            (
                PAPER_NAMES[family] + STAGES[row["model"]],
                f"{size[:-2].upper()}/{patch}",
                dataset,
                protocol,
                metric,
            )
        )
        if reason:
            reasons[paper_id] = reason
        repeat = row["seed"] if row["protocol"] in BEGIN_AT_RANDOM else 0
        found.append({**row, "seed": repeat, "value": 100 * row["value"], "paper_id": paper_id})
    found = pd.DataFrame(found, columns=[*rows.columns, "paper_id"])
    found = found[found["n_train"] == found.groupby("paper_id")["n_train"].transform("max")]
    for paper_id, n in found.groupby("paper_id")["n_train"].max().items():
        if n < IMAGENET_TRAIN:
            reasons.setdefault(
                paper_id, f"drawn from {n:,} of the {IMAGENET_TRAIN:,} training images"
            )
    once = ["paper_id", "weights_sha256", "seed"]
    mean = found.groupby(once)["value"].mean().reset_index()
    return found.drop(columns="value").drop_duplicates(once).merge(mean, on=once), reasons


def comparison(rows: pd.DataFrame) -> pd.DataFrame:
    """:func:`mimrefiner.study.paper.compare` of the result rows; a number that was not measured
    says what that would need.
    """
    table = compare(*measurements(rows))
    missing = table["measured"].isna()
    table.loc[missing, "comparable"] = "not measured"
    table.loc[missing, "why_not"] = [needs(number) for number in table[missing].to_dict("records")]
    return table


def needs(number: dict) -> str:
    """What it takes to measure a published number with this package; ``number``: a row of
    ``paper_values.csv``.
    """
    model, dataset, protocol = number["model"], number["dataset"], number["protocol"]
    name = f"{FAMILIES.get(model, model)}_{str(number['backbone']).split()[0].lower().replace('/', '')}"
    if "(group)" in model:
        return "the best of a group of models, which are measured one by one"
    if number["metric"] == "params(M)":
        return f"no measurement: mimrefiner plan {name} imagenet counts them"
    if any(
        word in protocol
        for word in ("fine-tune", "fine-tuned", "UperNet", "attentive", "header: fine-tuning")
    ):
        return "not possible: this package neither fine-tunes nor trains attentive probes"
    if name not in BY_NAME:
        return "not possible: no weights of it in the table of models"
    if dataset == "ADE20K":
        return f"possible with {name} and ADE20K: mimrefiner.probes.dense"
    if dataset.split()[0] != "IN1K":
        return f"possible with {name} and this data set: mimrefiner probe {name} imagefolder:PATH --probes linear"
    preset = next(
        (
            f"paper-{p}"
            for p in PAPER_MODELS
            if name in (p.replace("-", "_"), p.replace("-", "_refined_"))
        ),
        None,
    )
    notebook = "07" if "clustering" in protocol or protocol == "class separation" else "06"
    if preset:
        return f"possible with released weights and ImageNet-1K: mimrefiner run {notebook} --preset {preset}"
    return f"possible with {name} and ImageNet-1K: mimrefiner probe {name} imagefolder:PATH"
