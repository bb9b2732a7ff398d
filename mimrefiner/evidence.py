"""Evidence on natural images: which models are trained, what is measured of them, and what that says about the paper's claims.

One command trains (going on where it was cut off), measures and writes ``assets/evidence_PRESET.csv`` and, for the claims,
``evidence_PRESET_claims.csv``, which notebook 04 and the page of results show::

    python -m mimrefiner.evidence --data parquet:TINY_IMAGENET                        # hours on 2 CPU cores
    python -m mimrefiner.evidence --data parquet:TINY_IMAGENET --preset natural-gpu   # the same with a GPU's epochs and more models
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from mimrefiner import store
from mimrefiner.checkpoint import atomic_file, sha256_of
from mimrefiner.config import Preset, load_preset
from mimrefiner.data import load_dataset, short_name
from mimrefiner.features import Features, extract_features, pixel_features
from mimrefiner.models import build_vit
from mimrefiner.probes.clustering import cluster
from mimrefiner.probes.knn import knn_hits
from mimrefiner.probes.linear import linear_probe
from mimrefiner.probes.logistic import low_shot
from mimrefiner.results import KNN_PROTOCOL, Run, paired_bootstrap, points, write_csv

ASSETS = Path(__file__).parent / "assets"
BANK, VAL = 20_000, 2_000  # training images that vote, and on which blocks are chosen
LINEAR = {"learning_rates": (1e-3, 5e-3, 0.02, 0.1, 0.5), "epochs": 10, "batch_size": 256}
TRANSFER = "fruit64"
PIXELS = 32  # side of the images of the raw-pixel baseline


@dataclass(frozen=True)
class Recipe:
    """One pre-trained model, and the seeds with which it is refined."""

    name: str
    preset: Preset
    seeds: tuple[int, ...] = (0,)


def recipes(preset_name: str, data: str, seeds: Sequence[int]) -> list[Recipe]:
    """What is trained; the first is the main one, which gets the controls. A GPU affords decoder depths and a deeper model too."""
    main = replace(load_preset(preset_name), dataset=data)
    if preset_name == "natural":
        simmim = replace(load_preset("natural-simmim"), dataset=data)
        return [Recipe("MAE", main, tuple(seeds)), Recipe("SimMIM", simmim, tuple(seeds))]

    def variant(name: str, **pretrain) -> Recipe:
        return Recipe(name, replace(main, pretrain=replace(main.pretrain, **pretrain)), tuple(seeds))

    deeper = replace(main, encoder=replace(main.encoder, depth=2 * main.encoder.depth))
    return [
        Recipe("MAE", main, tuple(seeds)),
        *(variant(f"MAE, decoder of {depth} blocks", decoder_depth=depth) for depth in (2, 4, 8)),
        variant("SimMIM", method="simmim", mask_ratio=0.6),
        Recipe(f"MAE, {deeper.encoder.depth} blocks", deeper, tuple(seeds)),
    ]


def models(recipes: Sequence[Recipe]) -> Iterator[tuple[str, int, nn.Module]]:
    """(name, seed of refinement, encoder) of every model; trained now unless the store has it."""
    for recipe in recipes:
        yield recipe.name, 0, store.pretrained(recipe.preset).encoder
        for seed in recipe.seeds:
            yield f"{recipe.name} refined", seed, store.refined(_refined_with(recipe.preset, seed)).ema_encoder
    main = recipes[0]
    yield f"{main.name} trained longer", 0, store.pretrained_longer(main.preset).encoder
    yield f"{main.name} fine-tuned with labels", 0, store.finetuned(main.preset).encoder
    yield "random weights", 0, build_vit(main.preset.encoder)


def committed(preset_name: str = "natural") -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows and claims that were measured beforehand; empty where there are none."""
    files = [ASSETS / f"evidence_{preset_name}{part}.csv" for part in ("", "_claims")]
    return tuple(pd.read_csv(file) if file.is_file() else pd.DataFrame() for file in files)


def training_facts(recipes: Sequence[Recipe]) -> pd.DataFrame:
    """What each training was: epochs of the training images, computation and wall time (of a machine that did other work too)."""
    facts = []

    def add(model: str, stage: str, seed: int, epochs: float, result) -> None:
        numbers = {"epochs": round(epochs, 2), "TFLOP": round(result.flops / 1e12, 1), "minutes": round(result.seconds / 60)}
        facts.append({"model": model, "stage": stage, "seed": seed, **numbers})

    for recipe in recipes:
        preset, refine = recipe.preset, recipe.preset.refine
        add(recipe.name, "pre-training", 0, preset.pretrain.epochs, store.pretrained(preset))
        for seed in recipe.seeds:
            epochs = refine.heads_epochs + refine.refine_epochs
            add(recipe.name, "refinement", seed, epochs, store.refined(_refined_with(preset, seed)))
    main = recipes[0]
    longer = store.pretrained_longer(main.preset)
    epochs = main.preset.pretrain.epochs * longer.flops / store.pretrained(main.preset).flops
    add(main.name, "longer pre-training", 0, epochs, longer)
    labels = store.finetuned(main.preset)
    add(main.name, "fine-tuning with labels", 0, labels.epochs, labels)
    return pd.DataFrame(facts)


@dataclass
class Measured:
    """What is known of one model: rows, and for every data set and pooling which test images are right after every block."""

    rows: list[dict]
    hits: dict[str, torch.Tensor]  # "DATA POOL" -> (blocks, images) bool
    best: int  # block of the highest cls k-NN accuracy on validation images


def measure(encoder: nn.Module | None, name: str, seed: int, preset: Preset) -> Measured:
    """All probes of one model on the preset's data set and on the transfer set; ``encoder`` None: raw pixels."""
    run = Run("evidence", preset, (seed,), ASSETS)
    train, test = load_dataset(preset.dataset, split="train").take(BANK), load_dataset(preset.dataset, split="test")
    sha = "" if encoder is None else sha256_of(encoder)
    measured = Measured([], {}, 0)
    for data, (bank, queries) in {
        preset.dataset: (train, test),
        TRANSFER: (load_dataset(TRANSFER, split="trainval"), load_dataset(TRANSFER, split="test")),
    }.items():
        bank, queries = (_features(encoder, part) for part in (bank, queries))
        short = short_name(data)
        if data == preset.dataset and encoder is not None:
            val = _features(encoder, load_dataset(data, split="val").take(VAL))
            measured.best = int(knn_hits(bank, val)["cls"].float().mean(1).argmax())
        tables = [_knn_rows(bank, queries, short, measured.hits), linear_probe(_cls(bank), _cls(queries), seed=seed, **LINEAR)]
        few = _some(bank, measured.best), _some(queries, measured.best)
        tables += [low_shot(*few, seed=seed), cluster(few[1], seed=seed)]
        run.add_table(pd.concat(tables).assign(model=name, weights_sha256=sha, seed=seed), dataset=short)
    measured.rows = run.rows
    return measured


def claims(found: dict[tuple[str, int], Measured], recipes: Sequence[Recipe], run: Run) -> None:
    """Add to ``run`` what the measurements say about the paper's claims."""
    for data in (short_name(recipes[0].preset.dataset), TRANSFER):
        for recipe in recipes:
            _claims_of(found, recipe, data, run)


def _claims_of(found: dict[tuple[str, int], Measured], recipe: Recipe, data: str, run: Run) -> None:
    name, before, cls, on = recipe.name, found[recipe.name, 0], f"{data} cls", f"{recipe.name}, {data}"
    refined = [found[f"{name} refined", seed] for seed in recipe.seeds]
    n = before.hits[cls].shape[1]
    depth = before.hits[cls].shape[0]

    def compare(claim: str, ours: list, theirs: list, text: str = "") -> None:
        gain = paired_bootstrap([x.numpy() for x in ours], [x.numpy() for x in theirs])
        run.claim(
            f"{claim} ({on})", seen=gain[1] > 0, opposite=gain[2] < 0, measured=text + points(*gain), n_test=n, n_seeds=len(ours)
        )

    last, best = before.hits[cls][-1], before.hits[cls][before.best]
    after = [m.hits[cls][-1] for m in refined]
    pixels = found["raw pixels", 0].hits[f"{data} pixels"][0]
    where = f"block {before.best + 1} of {depth}, chosen on validation: "
    compare("the best block for k-NN (cls) beats the last one", [best], [last], where)
    compare("the best pre-trained block (cls) beats raw pixels", [best], [pixels])
    if not refined:
        return
    compare("refinement lifts the last block", after, [last] * len(after))
    compare("the refined last block beats the best block before", after, [best] * len(after))
    compare("the refined last block beats raw pixels", after, [pixels] * len(after))
    longer = found.get((f"{name} trained longer", 0))
    if longer:
        there = longer.hits[cls][-1]
        compare("refinement beats as much computation spent on masked pre-training", after, [there] * len(after))
    for protocol, metric in (
        ("logistic_1shot", "accuracy"),
        ("logistic_5shot", "accuracy"),
        ("linear", "accuracy"),
        ("kmeans", "ACC"),
    ):
        values = [_value(m, data, protocol, metric, depth - 1) for m in refined]
        first = [_value(before, data, protocol, metric, block) for block in (depth - 1, before.best)]
        text = f"last block {100 * first[0]:.1f} to {100 * np.mean(values):.1f} %, best block before {100 * first[1]:.1f} %"
        decided = len(values) > 1
        run.claim(
            f"refinement raises {protocol} {metric} of the last block above the best block before ({on})",
            seen=bool(min(values) > max(first)) if decided else None, opposite=decided and bool(max(values) < max(first)),
            measured=text, n_test=n, n_seeds=len(refined),
        )  # fmt: skip


def _value(measured: Measured, data: str, protocol: str, metric: str, block: int) -> float:
    """Mean over draws of one probe of the cls token."""
    rows = pd.DataFrame(measured.rows)
    chosen = rows[(rows["dataset"] == data) & (rows["protocol"] == protocol) & (rows["metric"] == metric)]
    return float(chosen[(chosen["block"] == block) & chosen["pool"].isin(("cls", "pixels"))]["value"].mean())


def _refined_with(preset: Preset, seed: int) -> Preset:
    return replace(preset, refine=replace(preset.refine, seed=seed))


def _features(encoder: nn.Module | None, data) -> Features:
    return pixel_features(data, PIXELS) if encoder is None else extract_features(encoder, data, autocast=torch.bfloat16)


def _cls(features: Features) -> Features:
    """The cls token alone (or the pixels)."""
    pool, x = next(iter(features.x.items()))
    return replace(features, x={pool: x})


def _some(features: Features, best: int) -> Features:
    """The cls token (or the pixels) of the block ``best`` and the last one."""
    ((pool, x),) = _cls(features).x.items()
    rows = sorted({min(best, len(features.blocks) - 1), len(features.blocks) - 1})
    return replace(features, x={pool: x[rows]}, blocks=tuple(features.blocks[i] for i in rows))


def _knn_rows(bank: Features, queries: Features, data: str, hits: dict) -> pd.DataFrame:
    rows = []
    for pool, right in knn_hits(bank, queries).items():
        hits[f"{data} {pool}"] = right
        rows += [
            {"block": block, "pool": pool, "protocol": KNN_PROTOCOL, "metric": "accuracy", "seed": 0,
             "value": x.float().mean().item(), "n_train": len(bank.y), "n_test": len(queries.y)}
            for block, x in zip(queries.blocks, right, strict=True)
        ]  # fmt: skip
    return pd.DataFrame(rows)


def _kept(folder: Path, name: str, seed: int, encoder: nn.Module | None, preset: Preset) -> Measured:
    """Measured now, or read from ``folder`` where that was done before for these weights."""
    sha = "pixels" if encoder is None else sha256_of(encoder)[:16]
    file = folder / f"{name.replace(' ', '_').replace(',', '')}-{seed}-{sha}.pt"
    if not file.is_file():
        measured = measure(encoder, name, seed, preset)
        with atomic_file(file) as temporary:
            torch.save(vars(measured), temporary)
    print(f"{name}, seed {seed}: measured", flush=True)
    return Measured(**torch.load(file, weights_only=True))


def main() -> None:
    parser = argparse.ArgumentParser("python -m mimrefiner.evidence", description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="Tiny-ImageNet as parquet:PATH (or another set of natural images at 64 px)")
    parser.add_argument("--preset", default="natural", choices=("natural", "natural-gpu"))
    parser.add_argument("--seeds", default="0,1,2", help="of refinement (default: 0,1,2)")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"), help="what has been measured is kept here")
    args = parser.parse_args()
    chosen = recipes(args.preset, args.data, tuple(int(seed) for seed in args.seeds.split(",")))
    main_preset = chosen[0].preset
    found = {("raw pixels", 0): _kept(args.out, "raw pixels", 0, None, main_preset)}
    for name, seed, encoder in models(chosen):
        found[name, seed] = _kept(args.out, name, seed, encoder, main_preset)
    run = Run("evidence", main_preset, (0,), args.out)
    claims(found, chosen, run)
    write_csv(pd.DataFrame([row for m in found.values() for row in m.rows]), ASSETS / f"evidence_{args.preset}.csv")
    write_csv(pd.DataFrame(run.claims), ASSETS / f"evidence_{args.preset}_claims.csv")
    write_csv(training_facts(chosen), ASSETS / f"evidence_{args.preset}_training.csv")


if __name__ == "__main__":
    main()
