"""Evidence on natural images: which models are trained, what is measured of them, and what that
says about the paper's claims.

One command trains (going on where it was cut off), measures and writes
``assets/evidence_PRESET.csv`` and, for the claims, ``evidence_PRESET_claims.csv``, which notebook
04 and the page of results show::

    python -m experiments.natural --data parquet:TINY_IMAGENET --choose               # the learning rate, on validation images
    python -m experiments.natural --data parquet:TINY_IMAGENET                        # hours on 2 CPU cores
    python -m experiments.natural --data parquet:TINY_IMAGENET --preset natural-gpu   # the same with a GPU's epochs and more models
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd
import torch

from experiments import measure
from experiments.measure import KINDS, TRANSFER, WITHIN, Measured, Model, kept
from mimrefiner import device
from mimrefiner.config import PretrainConfig, RefineConfig
from mimrefiner.data.datasets import data_hash, load_dataset, short_name
from mimrefiner.files import write_csv
from mimrefiner.models.encoders import build_vit
from mimrefiner.models.weights import sha256_of
from mimrefiner.probes.features import extract_features
from mimrefiner.probes.knn import knn_hits
from mimrefiner.study import presets, store
from mimrefiner.study.claims import Record
from mimrefiner.study.intervals import image_difference, seed_difference
from mimrefiner.study.presets import Preset, load_preset
from mimrefiner.study.tables import count, mean_sd
from mimrefiner.training.finetune import FinetuneResult
from mimrefiner.training.pretrain import PretrainResult
from mimrefiner.training.refine import RefineResult

HERE = Path(__file__).parent
LABELS_BASE_LR = 2e-3  # of the control with labels; set beforehand, as the rates of pre-training
FACTORS = (0.5, 1.0, 2.0)  # of stage 3's learning rate, among which --choose chooses


@dataclass(frozen=True)
class Recipe:
    """One pre-trained model, and the seeds with which it is refined."""

    name: str
    preset: Preset
    seeds: tuple[int, ...] = (0,)


def recipes(preset_name: str, data: str, seeds: Sequence[int]) -> list[Recipe]:
    """What is trained; the first is the main one, which gets the controls. A GPU affords decoder
    depths and a deeper model too.
    """
    main = replace(load_preset(preset_name), dataset=data)
    if preset_name == "natural":
        simmim = replace(load_preset("natural-simmim"), dataset=data)
        return [Recipe("MAE", main, tuple(seeds)), Recipe("SimMIM", simmim, tuple(seeds))]

    def variant(name: str, **pretrain) -> Recipe:
        return Recipe(
            name, replace(main, pretrain=replace(main.pretrain, **pretrain)), tuple(seeds)
        )

    deeper = replace(main, encoder=replace(main.encoder, depth=2 * main.encoder.depth))
    return [
        Recipe("MAE", main, tuple(seeds)),
        *(variant(f"MAE, decoder of {depth} blocks", decoder_depth=depth) for depth in (2, 4, 8)),
        variant("SimMIM", method="simmim", mask_ratio=0.6),
        Recipe(f"MAE, {deeper.encoder.depth} blocks", deeper, tuple(seeds)),
    ]


def choice(preset: Preset) -> pd.DataFrame:
    """How the recipe is chosen: validation images' k-NN by the refined last block, for several
    learning rates of stage 3.

    cls token, one seed, one row per candidate, the best first; no test image is looked at.
    """
    bank, val = (
        load_dataset(preset.dataset, split=part).take(n)
        for part, n in (("train", measure.BANK), ("val", measure.VAL))
    )
    rows = []
    for factor in FACTORS:
        refine = replace(preset.refine, refine_base_lr=factor * preset.refine.refine_base_lr)
        encoder = store.refined(replace(preset, refine=refine)).ema_encoder
        options = {
            "pools": ["cls"],
            "autocast": torch.bfloat16,
            "num_workers": device.loader_workers(),
        }
        train_x, val_x = (extract_features(encoder, part, **options) for part in (bank, val))
        accuracy = knn_hits(train_x, val_x)["cls"][-1].float().mean().item()
        found = {
            "refine_base_lr": refine.refine_base_lr,
            "n_train": len(bank),
            "n_val": len(val),
            "value": accuracy,
        }
        rows.append({"preset": preset.name, **found, "weights_sha256": sha256_of(encoder)})
    return pd.DataFrame(rows).sort_values("value", ascending=False, kind="stable")


def models(recipes: Sequence[Recipe]) -> Iterator[Model]:
    """Every model, trained now unless the store has it."""
    main = recipes[0]
    yield Model("raw pixels", 0, main.preset, None)
    for recipe in recipes:
        yield Model(recipe.name, 0, recipe.preset, store.pretrained(recipe.preset).encoder)
        for seed in recipe.seeds:
            preset = _refined_with(recipe.preset, seed)
            yield Model(f"{recipe.name} refined", seed, preset, store.refined(preset).ema_encoder)
    yield Model(
        f"{main.name} trained longer", 0, main.preset, store.pretrained_longer(main.preset).encoder
    )
    yield Model(
        f"{main.name} fine-tuned with labels",
        0,
        main.preset,
        store.finetuned(main.preset, LABELS_BASE_LR).encoder,
    )
    yield Model("random weights", 0, main.preset, build_vit(main.preset.encoder))


@dataclass(frozen=True)
class Training:
    """One training behind the models, with its settings and what came out."""

    model: str
    training: str
    seed: int
    epochs: float
    settings: PretrainConfig | RefineConfig
    result: PretrainResult | RefineResult | FinetuneResult


def trainings(recipes: Sequence[Recipe]) -> list[Training]:
    """All of them, the controls last; trained now unless the store has them."""
    found = []
    for recipe in recipes:
        preset, refine = recipe.preset, recipe.preset.refine
        first = store.pretrained(preset)
        found.append(
            Training(recipe.name, "pre-training", 0, preset.pretrain.epochs, preset.pretrain, first)
        )
        for seed in recipe.seeds:
            config, result = replace(refine, seed=seed), store.refined(_refined_with(preset, seed))
            found.append(
                Training(
                    recipe.name,
                    "refinement",
                    seed,
                    refine.heads_epochs + refine.refine_epochs,
                    config,
                    result,
                )
            )
    main = recipes[0]
    again, labels = (
        store.pretrained_longer(main.preset),
        store.finetuned(main.preset, LABELS_BASE_LR),
    )
    config = store.longer(main.preset.pretrain, again.flops / found[0].result.flops)
    found.append(Training(main.name, "longer pre-training", 0, config.epochs, config, again))
    config = replace(main.preset.refine, refine_base_lr=LABELS_BASE_LR)
    found.append(Training(main.name, "fine-tuning with labels", 0, labels.epochs, config, labels))
    return found


def training_facts(trainings: Sequence[Training]) -> pd.DataFrame:
    """What each training was: epochs of the training images, computation and wall time (of a
    machine that did other work too).
    """
    rows = []
    for t in trainings:
        numbers = {
            "epochs": round(t.epochs, 2),
            "TFLOP": round(t.result.flops / 1e12, 1),
            "minutes": round(t.result.seconds / 60),
            "weights_sha256": sha256_of(getattr(t.result, "ema_encoder", t.result.encoder)),
        }
        rows.append({"model": t.model, "training": t.training, "seed": t.seed, **numbers})
    return pd.DataFrame(rows)


def histories(trainings: Sequence[Training]) -> pd.DataFrame:
    """How every training went, one row per logged step (and head)."""
    history = pd.concat(
        [
            t.result.history.assign(model=t.model, training=t.training, seed=t.seed)
            for t in trainings
        ]
    )
    numbers = history.select_dtypes("float").columns
    # Five digits, also of a learning rate of 1e-6
    history[numbers] = history[numbers].map(lambda x: float(f"{x:.5g}"))
    first = ["model", "training", "seed"]
    return history[[*first, *(name for name in history if name not in first)]]


def settings(trainings: Sequence[Training], recipes: Sequence[Recipe]) -> pd.DataFrame:
    """With which settings each was trained, on what, one row each."""
    common = {}
    for recipe in recipes:
        encoder = {
            f"encoder {name}": value for name, value in asdict(recipe.preset.encoder).items()
        }
        data = {
            "data": short_name(recipe.preset.dataset),
            "data_sha256": data_hash(presets.load_split(recipe.preset, "train")),
        }
        common[recipe.name] = encoder | data
    return pd.DataFrame(
        [
            {
                "model": t.model,
                "training": t.training,
                "seed": t.seed,
                "setting": name,
                "value": json.dumps(value),
            }
            for t in trainings
            for name, value in (asdict(t.settings) | common[t.model]).items()
        ]
    )


def claims(
    found: dict[tuple[str, int], Measured],
    recipes: Sequence[Recipe],
    run: Record,
    transfer: Sequence[str] = TRANSFER,
) -> None:
    """Add to ``run`` what the measurements say about the paper's claims."""
    for data in (short_name(recipes[0].preset.dataset), *(short_name(name) for name in transfer)):
        for recipe in recipes:
            for pool in ("cls", "mean"):
                _claims_of_blocks(found, recipe, data, pool, run)
                if data in KINDS:
                    _claims_of_fine_classes(found, recipe, data, pool, run)
            _claims_of_probes(found, recipe, data, run)
    depths = {
        recipe.preset.pretrain.decoder_depth: found[recipe.name, 0]
        for recipe in recipes
        if "decoder" in recipe.name
    }
    if depths:
        _claim_of_decoders(
            {recipes[0].preset.pretrain.decoder_depth: found[recipes[0].name, 0], **depths},
            run,
            recipes[0],
        )


def _claims_of_blocks(
    found: dict[tuple[str, int], Measured], recipe: Recipe, data: str, pool: str, run: Record
) -> None:
    """What k-NN says of the blocks of a recipe's models, with one pooling."""
    name, key, before = recipe.name, f"{data} {pool}", found[recipe.name, 0]
    refined = [found[f"{name} refined", seed].hits[key][-1] for seed in recipe.seeds]
    longer, random = found.get((f"{name} trained longer", 0)), found["random weights", 0]
    pixels = found["raw pixels", 0].hits[f"{data} pixels"][0]
    depth, n = before.hits[key].shape
    last, best = before.hits[key][-1], before.hits[key][before.best[key]]

    def compare(claim: str, ours: list, theirs: torch.Tensor, text: str = "") -> None:
        run.judge(
            f"{claim} ({name}, {key.replace(' ', ', ')})",
            image_difference(ours, [theirs] * len(ours)),
            n_test=n,
            text=text,
        )

    inside = before.best[key] < depth - 1
    where = f"block {before.best[key] + 1} of {depth}, chosen on validation: "
    if not inside:
        where = f"the block chosen on validation is the last one, {depth}: "
    compare("the best block for k-NN beats the last one", [best], last, where)
    compare("the best pre-trained block beats raw pixels", [best], pixels)
    compare(
        "the best pre-trained block beats the best of random weights",
        [best],
        random.hits[key][random.best[key]],
    )
    if refined:
        compare("refinement lifts the last block", refined, last)
        if inside:  # else the same again
            compare("the refined last block beats the best block before", refined, best)
        compare("the refined last block beats raw pixels", refined, pixels)
        compare(
            "the refined last block beats the best of random weights",
            refined,
            random.hits[key][random.best[key]],
        )
    if refined and longer:
        claim = "refinement beats as much computation spent on masked pre-training"
        compare(claim, refined, longer.hits[key][-1])


def _claims_of_fine_classes(
    found: dict[tuple[str, int], Measured], recipe: Recipe, data: str, pool: str, run: Record
) -> None:
    """Whether refinement tells classes of one kind apart, by k-NN of the last block among images of
    that kind.
    """
    name, key = recipe.name, f"{data} {pool} {WITHIN}"
    refined = [found[f"{name} refined", seed].hits[key][-1] for seed in recipe.seeds]
    others = {
        "refinement tells classes of one kind apart better": found[name, 0],
        "refinement tells classes of one kind apart better than as much masked pre-training": found.get(
            (f"{name} trained longer", 0)
        ),
        "the refined model tells classes of one kind apart better than random weights": found[
            "random weights", 0
        ],
    }
    for claim, other in others.items():
        if refined and other:
            theirs = other.hits[key][-1]
            text = f"{100 * theirs.float().mean():.1f} against {mean_sd([x.float().mean().item() for x in refined])} %: "
            difference = image_difference(refined, [theirs] * len(refined))
            run.judge(
                f"{claim} ({name}, {data}, {pool})", difference, n_test=len(theirs), text=text
            )


def _claims_of_probes(
    found: dict[tuple[str, int], Measured], recipe: Recipe, data: str, run: Record
) -> None:
    """What linear probes, few-shot and clusters say of the last block: before, after, and of the
    control.
    """
    refined = [found[f"{recipe.name} refined", seed] for seed in recipe.seeds]
    others = {
        "refinement raises": found[recipe.name, 0],
        "refinement raises more than as much masked pre-training": found.get(
            (f"{recipe.name} trained longer", 0)
        ),
    }
    others = {claim: other for claim, other in others.items() if refined and other}
    probes = [("linear", "linear accuracy", pool) for pool in ("cls", "mean")]
    probes += [(f"logistic_{n}shot", f"{n}-shot accuracy", "cls") for n in (1, 2, 5)]
    for protocol, what, pool in probes:
        ours = [_last_block(m, f"{data} {pool} {protocol}") for m in refined]
        for claim, other in others.items():
            theirs = _last_block(other, f"{data} {pool} {protocol}")
            text = (
                f"{100 * theirs.mean():.1f} against {mean_sd([x.mean().item() for x in ours])} %: "
            )
            run.judge(
                f"{claim}: {what} of the last block ({recipe.name}, {data}, {pool})",
                image_difference(ours, [theirs] * len(ours)),
                n_test=len(theirs),
                text=text,
            )
    values = [_cluster_accuracy(m, data) for m in refined]
    for claim, other in others.items():
        theirs = _cluster_accuracy(other, data)
        text = f"{100 * theirs:.1f} against {mean_sd(values)} %: "
        n = found[recipe.name, 0].hits[f"{data} cls"].shape[1]
        difference = seed_difference(values, [theirs] * len(values), images=n)
        run.judge(
            f"{claim}: cluster accuracy of the last block ({recipe.name}, {data}, cls)",
            difference,
            n_test=n,
            text=text,
        )


def _last_block(measured: Measured, probe: str) -> torch.Tensor:
    """Which test images are right, (images,); ``probe``: the key of the hits, or its beginning."""
    (key,) = (key for key in measured.hits if key == probe or key.startswith(f"{probe}_"))
    return measured.hits[key][-1].float()


def _cluster_accuracy(measured: Measured, data: str) -> float:
    """Of k-means on the last block's cls token."""
    rows = pd.DataFrame(measured.rows).query(
        "dataset == @data and metric == 'ACC' and pool == 'cls'"
    )
    return float(rows.loc[rows["block"] == rows["block"].max(), "value"].item())


def _claim_of_decoders(by_depth: dict[int, Measured], run: Record, main: Recipe) -> None:
    """Whether the last blocks fall further behind the best one where the decoder is light."""
    for pool in ("cls", "mean"):
        key = f"{short_name(main.preset.dataset)} {pool}"
        drops = {
            depth: m.hits[key][m.best[key]].float() - m.hits[key][-1].float()
            for depth, m in sorted(by_depth.items())
        }
        text = ", ".join(
            f"{100 * drop.mean().item():.1f} ({count(depth, 'block')})"
            for depth, drop in drops.items()
        )
        lightest, heaviest = drops[min(drops)], drops[max(drops)]
        run.judge(
            f"a lighter decoder makes the last blocks fall further ({key.replace(' ', ', ')})",
            image_difference([lightest], [heaviest]),
            n_test=len(lightest),
            text=f"best block minus last: {text}; ",
        )


def _refined_with(preset: Preset, seed: int) -> Preset:
    return replace(preset, refine=replace(preset.refine, seed=seed))


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m experiments.natural", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--data",
        required=True,
        help="Tiny-ImageNet as parquet:PATH (or another set of natural images at 64 px)",
    )
    parser.add_argument("--preset", default="natural", choices=("natural", "natural-gpu"))
    parser.add_argument(
        "--choose",
        action="store_true",
        help="compare learning rates on validation images, and nothing else",
    )
    parser.add_argument("--seeds", default="0,1,2", help="of refinement (default: 0,1,2)")
    parser.add_argument(
        "--transfer",
        default=",".join(TRANSFER),
        help="data sets no model was trained on (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/evidence"),
        help="what has been measured is kept here",
    )
    args = parser.parse_args()
    if args.choose:
        main_preset = replace(load_preset(args.preset), dataset=args.data)
        write_csv(choice(main_preset), HERE / f"evidence_{args.preset}_choice.csv")
        return
    chosen = recipes(args.preset, args.data, tuple(int(seed) for seed in args.seeds.split(",")))
    transfer = args.transfer.split(",")
    found = {
        (model.name, model.seed): kept(args.out, model, args.data, transfer)
        for model in models(chosen)
    }
    run = Record("evidence", chosen[0].preset, (0,), args.out)
    claims(found, chosen, run, transfer)
    write_csv(
        pd.DataFrame([row for m in found.values() for row in m.rows]),
        HERE / f"evidence_{args.preset}.csv",
    )
    write_csv(pd.DataFrame(run.claims), HERE / f"evidence_{args.preset}_claims.csv")
    done = trainings(chosen)
    for part, table in (
        ("training", training_facts(done)),
        ("history", histories(done)),
        ("settings", settings(done, chosen)),
    ):
        write_csv(table, HERE / f"evidence_{args.preset}_{part}.csv")


if __name__ == "__main__":
    main()
