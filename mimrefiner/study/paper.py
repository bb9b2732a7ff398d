"""Which of our rows measure a published number, and what it would take to measure the others."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from mimrefiner.files import ASSETS
from mimrefiner.models.catalogue import BY_NAME
from mimrefiner.probes.protocols import KMEANS, KNN, LINEAR, SHOTS, low_shot
from mimrefiner.study.presets import (
    IMAGENET,
    PAPER_MODELS,
    PAPER_SIZES,
    load_preset,
)
from mimrefiner.training.recipes import IMAGENET_TRAIN

PAPER_VALUES = ASSETS / "paper_values.csv"
FAMILIES = {  # as the paper names a model -> as the table of models begins its name
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
STAGES = {"before": "", "pre-trained": "", "refined": "-Refined", "refined (EMA)": "-Refined"}
PAPER_NAMES = {"mae": "MAE", "d2v2": "D2V2", "dbot": "dBOT", "crossmae": "CrossMAE"}


class Published(NamedTuple):
    """How the paper names what a protocol and metric of ours measure.

    ``reason`` says why the two are not comparable; "" where they are.
    """

    dataset: str
    protocol: str
    metric: str
    reason: str


TUNED = "logistic regression on frozen features; the paper fine-tunes"
DRAWN = "labelled images drawn here, not the published splits"
CROPS = "features of centre crops; the paper augments"
UNSTATED = "the paper states neither split nor algorithm"
CLUSTERS = "clustering (split and algorithm not stated in image)"
PROTOCOLS = {  # name of our protocol, metric -> what the paper calls it
    (KNN.name, "accuracy"): Published("IN1K", "k-NN", "top1", ""),
    **{
        (low_shot(n).name, "accuracy"): Published(f"IN1K {n}-shot", "low-shot", "top1", DRAWN)
        for n in SHOTS
    },
    (low_shot(0.01).name, "accuracy"): Published("IN1K 1%", "fine-tune", "top1", TUNED),
    (low_shot(0.1).name, "accuracy"): Published("IN1K 10%", "fine-tune", "top1", TUNED),
    (LINEAR.name, "accuracy"): Published("IN1K", "linear probe", "top1", CROPS),
    **{
        (KMEANS.name, metric): Published("IN1K", CLUSTERS, metric, UNSTATED)
        for metric in ("ACC", "NMI", "AMI", "ARI")
    },
    (KMEANS.name, "silhouette"): Published(
        "IN1K", "class separation", "silhouette(x100)", UNSTATED
    ),
}
# They differ from seed to seed on the same weights and images
BEGIN_AT_RANDOM = (LINEAR.name, KMEANS.name)
SIX_NAMES = {  # as the paper names data sets of VTAB-6 -> as mimrefiner vtab does
    "OxfordPets": "pets",
    "CIFAR-100": "cifar100",
    "SUN397": "sun397",
    "Caltech-101": "caltech101",
}
NOT_BUILT_IN = ("fine-tune", "fine-tuned", "UperNet", "attentive", "header: fine-tuning")


def paper_values() -> pd.DataFrame:
    """The published numbers, with source and confidence, one per row."""
    return pd.read_csv(PAPER_VALUES)


def compare(measured: pd.DataFrame, pairs: dict[str, str] | None = None) -> pd.DataFrame:
    """Every published number beside what was measured; a missing measurement stays empty.

    Args:
        measured: result rows, one per seed, whose column ``paper_id`` says which row of the paper
            they measure ("model|backbone|dataset|protocol|metric"); rows without one are passed
            over.
        pairs: why a measurement is not comparable, by paper_id.

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


def measurements(rows: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, str]]:
    """What of the result rows measures a published number, for :func:`compare`.

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
        paper_id, reason = _published(row)
        if paper_id:
            if reason:
                reasons[paper_id] = reason
            seed = row["seed"] if row["protocol"] in BEGIN_AT_RANDOM else 0
            found.append({**row, "seed": seed, "value": 100 * row["value"], "paper_id": paper_id})
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


def _published(row: dict) -> tuple[str, str]:
    """The paper_id that a result row measures and why it is not comparable; "" for none."""
    key, nothing = (row["protocol"], row["metric"]), ("", "")
    if row["dataset"] != IMAGENET or row["model"] not in STAGES or key not in PROTOCOLS:
        return nothing
    preset = load_preset(row["preset"])
    if row["block"] != preset.encoder.depth - 1 or row["pool"] != preset.refine.pool:
        return nothing
    family, size = PAPER_MODELS[row["preset"].removeprefix("paper-")]
    model, backbone = PAPER_NAMES[family] + STAGES[row["model"]], PAPER_SIZES[size].name
    dataset, protocol, metric, reason = PROTOCOLS[key]
    return "|".join((model, backbone, dataset, protocol, metric)), reason


def comparison(rows: pd.DataFrame) -> pd.DataFrame:
    """:func:`compare` of the result rows; a number that was not measured says what that needs."""
    table = compare(*measurements(rows))
    missing = table["measured"].isna()
    table.loc[missing, "comparable"] = "not measured"
    table.loc[missing, "why_not"] = [needs(number) for number in table[missing].to_dict("records")]
    return table


def needs(number: dict) -> str:
    """What it takes to measure a published number, a row of ``paper_values.csv``, with us."""
    model, dataset, protocol = number["model"], number["dataset"], number["protocol"]
    backbone = str(number["backbone"]).split()[0].lower().replace("/", "")
    name = f"{FAMILIES.get(model, model)}_{backbone}"
    probe = f"mimrefiner probe {name} imagefolder:PATH"
    if "(group)" in model:
        return "the best of a group of models, which are measured one by one"
    if number["metric"] == "params(M)":
        return f"no measurement: mimrefiner plan {name} imagenet counts them"
    if name in BY_NAME and (command := _transfer_command(dataset, protocol, name)):
        return f"possible (tried at small size) with {name} and this data set: {command}"
    if any(word in protocol for word in NOT_BUILT_IN):
        return (
            "not possible: the paper's fine-tuning, UperNet and attentive probes are not built in"
        )
    if name not in BY_NAME:
        return "not possible: no weights of it in the table of models"
    if dataset.split()[0] != "IN1K":
        return f"possible with {name} and this data set: {probe} --probes linear"
    notebook = "07" if "clustering" in protocol or protocol == "class separation" else "06"
    for preset, (family, size) in PAPER_MODELS.items():
        if name in (f"{family}_{size}", f"{family}_refined_{size}"):
            run = f"mimrefiner run {notebook} --preset paper-{preset}"
            return f"possible with released weights and ImageNet-1K: {run}"
    return f"possible with {name} and ImageNet-1K: {probe}"


def _transfer_command(dataset: str, protocol: str, name: str) -> str:
    """The command that measures a number on one of the transfer benchmarks; "" for no such one."""
    if dataset == "ADE20K" and protocol != "k-NN segmentation":
        return f"mimrefiner segment {name} ADE20K" + " --probe linear" * ("frozen" in protocol)
    if dataset == "VTAB-1K mean":
        return f"mimrefiner vtab {name} --data vtab-1k"
    if dataset == "VTAB-6 mean":
        return f"mimrefiner vtab {name} --six --best-on-test"
    if dataset in SIX_NAMES and protocol == "linear probe":
        return f"mimrefiner vtab {name} --six --best-on-test --datasets {SIX_NAMES[dataset]}"
    if "robustness" in protocol or "robustness" in dataset:
        then = "and, on the folder that it writes, mimrefiner robustness"
        return f"mimrefiner finetune {name} {then}"
    return ""


def gains(tasks: Sequence[str], models: Sequence[str] = ("MAE", "D2V2")) -> pd.DataFrame:
    """The paper's refined minus before, in points: label, source, difference.

    Args:
        tasks: "1-shot", "2-shot", "5-shot", "linear probe" and "k-NN", of ViT-L/16 on ImageNet.
        models: the models before refinement.

    >>> gains(["1-shot"]).round(1)["difference"].tolist()
    [43.5, 37.6]
    """
    values = paper_values()
    values = values[values["table_or_figure"].str.startswith("lowshot")]
    values = values[values["backbone"] == "L/16"]
    wide = values.pivot_table("value", ["dataset", "protocol"], "model")
    rows = []
    for task in tasks:
        key = (f"IN1K {task}", "low-shot") if task.endswith("shot") else ("IN1K", task)
        for model in models:
            gain = wide.loc[key, f"{model}-Refined"] - wide.loc[key, model]
            rows.append({"label": task, "source": f"paper: {model} L/16", "difference": gain})
    return pd.DataFrame(rows)
