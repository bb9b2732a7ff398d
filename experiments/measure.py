"""All probes of one model, on the data set it was trained on and on those it was not."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from mimrefiner.data.datasets import ImageDataset, data_hash, load_dataset, short_name
from mimrefiner.device import default_device, has_bfloat16, loader_workers
from mimrefiner.files import Entry
from mimrefiner.models.weights import sha256_of
from mimrefiner.probes import protocols
from mimrefiner.probes.clustering import cluster
from mimrefiner.probes.features import Features, extract_features, pixel_features
from mimrefiner.probes.knn import hits_to_rows, knn_hits, knn_hits_within
from mimrefiner.probes.linear import linear_probe
from mimrefiner.probes.logistic import low_shot
from mimrefiner.probes.protocols import KMEANS, KNN, SHOTS, WITHIN_KINDS, Protocol
from mimrefiner.study.claims import Record
from mimrefiner.study.presets import Preset

BANK, VAL = 20_000, 5_000  # training images that vote, validation images that choose blocks
RATES, EPOCHS, BATCH = (1e-3, 5e-3, 0.02, 0.1, 0.5), 10, 256  # of the linear probes
STEPS = 500  # of the linear probes at least: more epochs on small data sets
DRAWS = 3  # of labelled images in low-shot classification
TRANSFER = ("fruit64",)  # data sets that no model was trained on
KINDS = {  # data set -> classes of one kind, which look alike
    "fruit64": (
        ("Anjou", "Conference", "Kaiser"),
        ("Cantaloupe", "Galia-Melon", "Honeydew-Melon", "Watermelon"),
        ("Golden-Delicious", "Granny-Smith", "Pink-Lady", "Red-Delicious", "Royal-Gala"),
        ("Orange", "Satsumas"),
    )
}
PIXELS = 32  # side of the images of the raw-pixel baseline
# The features of a data set after every block of an encoder; None stands for raw pixels
Extract = Callable[[nn.Module | None, ImageDataset], Features]
# Raised by hand when the same models and data give other rows: they are then measured anew
NUMERICS = 1


@dataclass(frozen=True)
class Model:
    """What is measured.

    Attributes:
        name: what rows call it.
        seed: the seed that it was refined with.
        preset: the preset that it was trained with.
        encoder: its weights; None stands for raw pixels.
    """

    name: str
    seed: int
    preset: Preset
    encoder: nn.Module | None

    @property
    def sha(self) -> str:
        """The hash of the weights; "" for raw pixels."""
        return "" if self.encoder is None else sha256_of(self.encoder)


@dataclass
class Measured:
    """What is known of one model.

    Attributes:
        rows: result rows.
        hits: (data set, pooling, label of the protocol) -> which test images are right after every
            block, (blocks, images); of a few labelled images, the share of draws in which.
        best: (data set, pooling) -> the block with the highest k-NN accuracy on validation images
            of the data set that the model was trained on.
    """

    rows: list[dict] = field(default_factory=list)
    hits: dict[tuple[str, str, str], Tensor] = field(default_factory=dict)
    best: dict[tuple[str, str], int] = field(default_factory=dict)

    def clusters(self, data: str) -> float | None:
        """The accuracy of k-means on the last block's cls token; None where it was not measured."""
        asked = (data, KMEANS.name, KMEANS.metrics[0], "cls")
        names = ("dataset", "protocol", "metric", "pool")
        rows = [row for row in self.rows if tuple(row[name] for name in names) == asked]
        return max(rows, key=lambda row: row["block"])["value"] if rows else None


@dataclass(frozen=True)
class Parts:
    """The features of the three splits of a data set."""

    train: Features
    val: Features
    test: Features

    @property
    def sizes(self) -> dict[str, int]:
        """The columns n_train and n_test."""
        return {"n_train": len(self.train.y), "n_test": len(self.test.y)}


def linear_protocol(images: int) -> Protocol:
    """The linear probe on so many training images, which are seen more often where they are few."""
    return protocols.linear(max(EPOCHS, math.ceil(STEPS * BATCH / images)))


def probe_protocols(images: int) -> list[Protocol]:
    """All protocols on a data set with so many training images."""
    shots = [protocols.low_shot(shot) for shot in SHOTS]
    return [KNN, WITHIN_KINDS, linear_protocol(images), *shots, KMEANS]


def measure(
    model: Model,
    data: str,
    transfer: Sequence[str] = TRANSFER,
    *,
    bank: int | None = None,
    features: Extract | None = None,
) -> Measured:
    """All probes of one model, on the data set it was trained on and on others.

    All models meet the same draws, starts and orders: the probes' seed is 0 for all. Blocks are
    chosen on ``data`` alone: validation images of a transfer set may show what its training images
    show, as those of fruit64 do.

    Args:
        model: what is measured.
        data: the data set that it was trained on.
        transfer: data sets that it was not trained on.
        bank: how many training images vote; None takes BANK.
        features: extracts features; None stands for :func:`extracted`.
    """
    # It makes the rows; nothing is written
    record, measured = Record("evidence", model.preset, (model.seed,), Path()), Measured()
    for name in (data, *transfer):
        sets = {split: load_dataset(name, split=split) for split in ("train", "val", "test")}
        sizes = {"train": bank or BANK, "val": VAL, "test": None}
        few = {split: part.take(sizes[split]) for split, part in sets.items()}
        extract = features or extracted
        parts = Parts(**{split: extract(model.encoder, part) for split, part in few.items()})
        if name == data:
            on_val = knn_hits(parts.train, parts.val)
            best = {pool: int(right.float().mean(1).argmax()) for pool, right in on_val.items()}
        short, known = short_name(name), {"model": model.name, "weights_sha256": model.sha}
        measured.best |= {(short, pool): block for pool, block in best.items()}
        shares, hits, clusters = _probe(parts, best, _kinds(name, sets["train"]))
        measured.hits |= {(short, *key): right for key, right in hits.items()}
        record.add_table(shares.assign(**known, seed=model.seed), dataset=short)
        clusters = clusters.assign(**known, seed=model.seed)
        record.add_table(clusters, dataset=short, unit=KMEANS.unit)
    measured.rows = record.rows
    return measured


def extracted(encoder: nn.Module | None, dataset: ImageDataset) -> Features:
    """Features after every block, in bfloat16 where the device has it; None: raw pixels."""
    if encoder is None:
        return pixel_features(dataset, PIXELS)
    return extract_features(encoder, dataset, **loading())


def loading() -> dict:
    """How images pass an encoder: precision and loader processes that suit the device."""
    precision = torch.bfloat16 if has_bfloat16(default_device()) else None
    return {"autocast": precision, "num_workers": loader_workers()}


def _kinds(name: str, data: ImageDataset) -> Tensor | None:
    """The kind of every class, (classes,); None where a data set has no kinds."""
    if name not in KINDS:
        return None
    kind = {of: i for i, kinds in enumerate(KINDS[name]) for of in kinds}
    return torch.tensor([kind[of] for of in data.classes])


def _probe(
    parts: Parts, best: dict[str, int], kinds: Tensor | None
) -> tuple[pd.DataFrame, dict[tuple[str, str], Tensor], pd.DataFrame]:
    """Accuracies, the hits behind them by pooling and label, and the clusters."""
    train, test, device = parts.train, parts.test, default_device()
    votes = {KNN: knn_hits(train, test)}
    if kinds is not None:
        votes[WITHIN_KINDS] = knn_hits_within(train, test, kinds)
    few_train, few_test = (_two_blocks(part, best) for part in (train, test))
    draws = low_shot(few_train, few_test, shots=SHOTS, splits=DRAWS, device=device, hits=True)
    alike = [column for column in draws if column not in ("seed", "value", "hits")]
    few = draws.groupby(alike, as_index=False, sort=False)["value"].mean()
    linear = _linear(parts, device)
    shares = pd.concat([_vote_rows(votes, parts.sizes), linear.drop(columns="hits"), few])
    labels = protocols.labels(probe_protocols(len(train.y)))
    hits = {
        (pool, protocol.label): right
        for protocol, found in votes.items()
        for pool, right in found.items()
    }
    for (pool, name), rows in pd.concat([linear, draws]).groupby(["pool", "protocol"]):
        blocks = [torch.stack(list(right)) for _, right in rows.groupby("block")["hits"]]
        hits[pool, labels[name]] = torch.stack([right.float().mean(0) for right in blocks])
    return shares, hits, cluster(few_test)


def _vote_rows(votes: dict[Protocol, dict[str, Tensor]], sizes: dict[str, int]) -> pd.DataFrame:
    rows = [
        hits_to_rows(right, pool=pool, protocol=protocol.name, metric="accuracy", seed=0, **sizes)
        for protocol, found in votes.items()
        for pool, right in found.items()
    ]
    return pd.DataFrame([row for of_pool in rows for row in of_pool])


def _linear(parts: Parts, device: torch.device) -> pd.DataFrame:
    """The rows of the linear probes, with the hits behind them."""
    protocol = linear_protocol(len(parts.train.y))
    options = {"learning_rates": RATES, "batch_size": BATCH, "device": device, "hits": True}
    rows = linear_probe(parts.train, parts.test, val=parts.val, **protocol.settings, **options)
    return rows.assign(protocol=protocol.name)


def _two_blocks(features: Features, best: dict[str, int]) -> Features:
    """The cls token (or the pixels) of the best block and the last one."""
    pool = next(iter(features.x))
    rows = sorted({best[pool], len(features.blocks) - 1})
    return replace(
        features, x={pool: features.x[pool][rows]}, blocks=tuple(features.blocks[i] for i in rows)
    )


def kept(
    folder: Path,
    model: Model,
    data: str,
    transfer: Sequence[str] = TRANSFER,
    *,
    bank: int | None = None,
    features: Extract | None = None,
) -> Measured:
    """What ``folder`` knows of the same weights, data, settings and code, else measured now.

    The arguments behind ``folder`` are those of :func:`measure`.
    """
    settings = {
        "model": model.name,
        "seed": model.seed,
        "preset": model.preset.name,
        "weights_sha256": model.sha,
        "sizes": (bank or BANK, VAL, PIXELS),
        "precision": str(loading()["autocast"]) if features is None else "given features",
        "linear": (RATES, EPOCHS, STEPS, BATCH),
        "low_shot": (SHOTS, DRAWS),
        "transfer": list(transfer),
        "data_sha256": data_hash(load_dataset(data, split="test")),
        "numerics": NUMERICS,
    }
    name = f"{model.name.replace(' ', '_').replace(',', '')}-{model.seed}"
    entry = Entry.named(folder, name, settings)
    was_there = entry.facts() is not None
    if not was_there:
        measured = measure(model, data, transfer, bank=bank, features=features)
        with entry.filled_aside() as part:
            torch.save(vars(measured), part / "measured.pt")
            entry.finish(part, {})
    how = "measured before, read from disk" if was_there else "measured"
    print(f"{model.name}, seed {model.seed}: {how}", flush=True)
    return Measured(**torch.load(entry.folder / "measured.pt", weights_only=True))
