"""All probes of one model, on the data set it was trained on and on those it was not."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from mimrefiner import device
from mimrefiner.data.datasets import data_hash, load_dataset, short_name
from mimrefiner.device import default_device
from mimrefiner.files import atomic_file
from mimrefiner.models.weights import sha256_of
from mimrefiner.probes.clustering import cluster
from mimrefiner.probes.features import Features, extract_features, pixel_features
from mimrefiner.probes.knn import KNN_PROTOCOL, knn_hits, knn_hits_within
from mimrefiner.probes.linear import linear_probe
from mimrefiner.probes.logistic import low_shot
from mimrefiner.study.claims import Record
from mimrefiner.study.presets import Preset

# Training images that vote, and validation images on which blocks are chosen
BANK, VAL = (20_000, 5_000)
# Of linear probes; STEPS: at least, on small data sets
RATES, EPOCHS, STEPS, BATCH = ((1e-3, 5e-3, 0.02, 0.1, 0.5), 10, 500, 256)
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
WITHIN_PROTOCOL = f"within_kinds_{KNN_PROTOCOL}"
WITHIN = "within kinds"  # what is known of images whose kind is known: which class of that kind
PIXELS = 32  # side of the images of the raw-pixel baseline
NUMERICS = (
    1  # raised by hand when the same models and data give other rows: they are then measured anew
)


@dataclass(frozen=True)
class Model:
    """What is measured; ``preset``: with which it was trained; ``encoder`` None: raw pixels."""

    name: str
    seed: int
    preset: Preset
    encoder: nn.Module | None


@dataclass
class Measured:
    """What is known of one model: rows, and for every data set and pooling which test images are
    right after every block.

    ``hits``: "DATA POOL" by k-NN and "DATA POOL PROBE" by another probe -> (blocks, images); of few
    shots, shares of the draws.
    """

    rows: list[dict]
    hits: dict[str, torch.Tensor]
    # "DATA POOL" -> block of the highest k-NN accuracy on validation images of the data trained on
    best: dict[str, int]


def measure(model: Model, data: str, transfer: Sequence[str] = TRANSFER) -> Measured:
    """All probes of one model on the data set it was trained on, ``data``, and on those it was not,
    ``transfer``.

    All models meet the same draws, starts and orders: the probes' seed is 0 for all. Blocks are
    chosen on ``data`` alone:
    validation images of a transfer set may show what its training images show, as those of fruit64
    do.
    """
    run = Record("evidence", model.preset, (model.seed,), Path())  # for its rows; nothing is written
    sha = "" if model.encoder is None else sha256_of(model.encoder)
    measured = Measured([], {}, {})
    for name in (data, *transfer):
        sets = {split: load_dataset(name, split=split) for split in ("train", "val", "test")}
        sizes = {"train": BANK, "val": VAL, "test": None}
        train, val, test = (
            _features(model.encoder, part.take(sizes[split])) for split, part in sets.items()
        )
        short, hits = short_name(name), knn_hits(train, test)
        measured.hits |= {f"{short} {pool}": right for pool, right in hits.items()}
        if name == data:
            best = {
                pool: int(right.float().mean(1).argmax())
                for pool, right in knn_hits(train, val).items()
            }
        measured.best |= {f"{short} {pool}": block for pool, block in best.items()}
        knn = [_knn_rows(right, pool, len(train.y), len(test.y)) for pool, right in hits.items()]
        if name in KINDS:
            kind = {of: i for i, kinds in enumerate(KINDS[name]) for of in kinds}
            hits = knn_hits_within(
                train, test, torch.tensor([kind[of] for of in sets["train"].classes])
            )
            measured.hits |= {f"{short} {pool} {WITHIN}": right for pool, right in hits.items()}
            within = (
                _knn_rows(right, pool, len(train.y), len(test.y)) for pool, right in hits.items()
            )
            knn += [rows.assign(protocol=WITHIN_PROTOCOL) for rows in within]
        epochs = max(EPOCHS, math.ceil(STEPS * BATCH / len(train.y)))
        device = default_device()
        options = {
            "learning_rates": RATES,
            "epochs": epochs,
            "batch_size": BATCH,
            "device": device,
            "hits": True,
        }
        linear = linear_probe(train, test, val=val, **options).assign(
            protocol=f"linear_{epochs}epochs"
        )
        few_train, few_test = (_some(part, best) for part in (train, test))
        draws = low_shot(few_train, few_test, splits=DRAWS, device=device, hits=True)
        alike = [column for column in draws if column not in ("seed", "value", "hits")]
        few = draws.groupby(alike, as_index=False, sort=False)["value"].mean()
        tables = [*knn, linear.drop(columns="hits"), few]
        for (pool, protocol), rows in pd.concat([linear, draws]).groupby(["pool", "protocol"]):
            right = [
                torch.stack(list(draws)).float().mean(0)
                for _, draws in rows.groupby("block")["hits"]
            ]
            measured.hits[f"{short} {pool} {protocol}"] = torch.stack(right)
        shares = pd.concat(tables).assign(model=model.name, weights_sha256=sha, seed=model.seed)
        run.add_table(shares, dataset=short)
        clusters = cluster(few_test).assign(model=model.name, weights_sha256=sha, seed=model.seed)
        run.add_table(clusters, dataset=short, unit="index")
    measured.rows = run.rows
    return measured


def _features(encoder: nn.Module | None, data) -> Features:
    if encoder is None:
        return pixel_features(data, PIXELS)
    return extract_features(
        encoder, data, autocast=torch.bfloat16, num_workers=device.loader_workers()
    )


def _some(features: Features, best: dict[str, int]) -> Features:
    """The cls token (or the pixels) of the best block and the last one."""
    pool = next(iter(features.x))
    rows = sorted({best[pool], len(features.blocks) - 1})
    return replace(
        features, x={pool: features.x[pool][rows]}, blocks=tuple(features.blocks[i] for i in rows)
    )


def _knn_rows(hits: torch.Tensor, pool: str, n_train: int, n_test: int) -> pd.DataFrame:
    common = {
        "pool": pool,
        "protocol": KNN_PROTOCOL,
        "metric": "accuracy",
        "seed": 0,
        "n_train": n_train,
        "n_test": n_test,
    }
    return pd.DataFrame(
        [
            {**common, "block": block, "value": right.float().mean().item()}
            for block, right in enumerate(hits)
        ]
    )


def kept(folder: Path, model: Model, data: str, transfer: Sequence[str] = TRANSFER) -> Measured:
    """Measured now, or read from ``folder`` where that was done before: the same weights, data,
    settings and code.
    """
    settings = (BANK, VAL, RATES, EPOCHS, STEPS, BATCH, DRAWS, list(transfer), PIXELS)
    known = json.dumps(
        [
            model.name,
            model.seed,
            model.preset.name,
            "" if model.encoder is None else sha256_of(model.encoder),
            settings,
            data_hash(load_dataset(data, split="test")),
            NUMERICS,
        ]
    )
    key = hashlib.sha256(known.encode()).hexdigest()[:16]
    file = folder / f"{model.name.replace(' ', '_').replace(',', '')}-{model.seed}-{key}.pt"
    if not file.is_file():
        measured = measure(model, data, transfer)
        with atomic_file(file) as temporary:
            torch.save(vars(measured), temporary)
    print(f"{model.name}, seed {model.seed}: measured", flush=True)
    return Measured(**torch.load(file, weights_only=True))
