"""Evidence on natural images: what is trained and measured, and what that says about the claims.

One command trains (going on where it was cut off), measures and writes ``evidence_PRESET.csv`` and,
for the claims, ``evidence_PRESET_claims.csv`` beside this file; notebook 04 and the page of results
show them. It takes hours on two CPU cores. ``--choose`` compares learning rates on validation
images, and ``--preset natural-gpu`` has a GPU's epochs and more models::

    python -m experiments.natural --data parquet:TINY_IMAGENET --choose
    python -m experiments.natural --data parquet:TINY_IMAGENET
    python -m experiments.natural --data parquet:TINY_IMAGENET --preset natural-gpu
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd

from experiments import measure
from experiments.claims import (
    BEST,
    LAST,
    MORE_PRETRAINING,
    PIXELS,
    REFINED,
    Claim,
    Found,
    Recipe,
    Side,
    judge,
)
from experiments.measure import TRANSFER, Model, kept
from mimrefiner.config import PretrainConfig, RefineConfig
from mimrefiner.data.datasets import data_hash, load_dataset, short_name
from mimrefiner.files import write_csv
from mimrefiner.models.encoders import build_vit
from mimrefiner.models.weights import sha256_of
from mimrefiner.notices import show_notices
from mimrefiner.probes.features import extract_features
from mimrefiner.probes.knn import knn_hits
from mimrefiner.probes.protocols import (
    KMEANS,
    KNN,
    LINEAR,
    SHOTS,
    WITHIN_KINDS,
    low_shot,
)
from mimrefiner.study import presets, store
from mimrefiner.study.claims import About, Record
from mimrefiner.study.intervals import image_difference
from mimrefiner.study.presets import Preset, load_preset
from mimrefiner.study.tables import count
from mimrefiner.training.finetune import FinetuneResult
from mimrefiner.training.pretrain import PretrainResult
from mimrefiner.training.refine import RefineResult

HERE = Path(__file__).parent
LABELS_BASE_LR = 2e-3  # of the control with labels; set beforehand, as the rates of pre-training
FACTORS = (0.5, 1.0, 2.0)  # --choose tries the learning rate of stage 3 times these


def recipes(preset_name: str, data: str, seeds: Sequence[int]) -> list[Recipe]:
    """What is trained; the first is the main one, which gets the controls.

    A GPU affords decoders of several depths and a deeper model too.
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
    """What k-NN of validation images says of several learning rates of stage 3, the best first.

    It reads the refined last block's cls token, for one seed; no test image is looked at.
    """
    bank, val = (
        load_dataset(preset.dataset, split=part).take(n)
        for part, n in (("train", measure.BANK), ("val", measure.VAL))
    )
    rows = []
    for factor in FACTORS:
        refine = replace(preset.refine, refine_base_lr=factor * preset.refine.refine_base_lr)
        encoder = store.refined(replace(preset, refine=refine)).ema_encoder
        options = {"pools": ["cls"], **measure.loading()}
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
    """Every model, one after the other; what the store lacks is trained now."""
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
    """One training behind the models, its settings and its result."""

    model: str
    training: str
    seed: int
    epochs: float
    settings: PretrainConfig | RefineConfig
    result: PretrainResult | RefineResult | FinetuneResult

    @property
    def key(self) -> dict[str, str | int]:
        """The columns that tell trainings apart."""
        return {"model": self.model, "training": self.training, "seed": self.seed}


def trainings(recipes: Sequence[Recipe]) -> list[Training]:
    """All trainings, the controls last; what the store lacks is trained now."""
    found = []
    for recipe in recipes:
        name, preset, refine = recipe.name, recipe.preset, recipe.preset.refine
        first, epochs = store.pretrained(preset), refine.heads_epochs + refine.refine_epochs
        pretrain = preset.pretrain
        found.append(Training(name, "pre-training", 0, pretrain.epochs, pretrain, first))
        for seed in recipe.seeds:
            config, result = replace(refine, seed=seed), store.refined(_refined_with(preset, seed))
            found.append(Training(name, "refinement", seed, epochs, config, result))
    name, preset = recipes[0].name, recipes[0].preset
    again = store.pretrained_longer(preset)
    config = store.longer(preset.pretrain, again.flops / found[0].result.flops)
    found.append(Training(name, "longer pre-training", 0, config.epochs, config, again))
    labels = store.finetuned(preset, LABELS_BASE_LR)
    config = replace(preset.refine, refine_base_lr=LABELS_BASE_LR)
    found.append(Training(name, "fine-tuning with labels", 0, labels.epochs, config, labels))
    return found


def training_facts(trainings: Sequence[Training]) -> pd.DataFrame:
    """Epochs, computation and wall time of every training, and the hash of its weights.

    The wall time is that of a machine that did other work too.
    """
    rows = []
    for t in trainings:
        numbers = {
            "epochs": round(t.epochs, 2),
            "TFLOP": round(t.result.flops / 1e12, 1),
            "minutes": round(t.result.seconds / 60),
            "weights_sha256": sha256_of(getattr(t.result, "ema_encoder", t.result.encoder)),
        }
        rows.append({**t.key, **numbers})
    return pd.DataFrame(rows)


def histories(trainings: Sequence[Training]) -> pd.DataFrame:
    """How every training went, one row per logged step (and head)."""
    history = pd.concat([t.result.history.assign(**t.key) for t in trainings])
    numbers = history.select_dtypes("float").columns
    # Five digits, also of a learning rate of 1e-6
    history[numbers] = history[numbers].map(lambda x: float(f"{x:.5g}"))
    first = ["model", "training", "seed"]
    return history[[*first, *(name for name in history if name not in first)]]


def settings(trainings: Sequence[Training], recipes: Sequence[Recipe]) -> pd.DataFrame:
    """The settings and the data of every training, one row each."""
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
            {**t.key, "setting": name, "value": json.dumps(value)}
            for t in trainings
            for name, value in (asdict(t.settings) | common[t.model]).items()
        ]
    )


LONGER = Side("longer pre-training", "{recipe} trained longer")
RANDOM = Side("random weights", "random weights", best=True)
RANDOM_LAST = Side("random weights", "random weights")


def _table_of_claims() -> list[Claim]:
    rows = []
    for pool in ("cls", "mean"):
        rows += [
            Claim("the best block for k-NN beats the last one", BEST, LAST, pool),
            Claim("the best pre-trained block beats raw pixels", BEST, PIXELS, pool),
            Claim(
                "the best pre-trained block beats the best of random weights", BEST, RANDOM, pool
            ),
            Claim("refinement lifts the last block", REFINED, LAST, pool),
            Claim("the refined last block beats the best block before", REFINED, BEST, pool),
            Claim("the refined last block beats raw pixels", REFINED, PIXELS, pool),
            Claim("the refined last block beats the best of random weights", REFINED, RANDOM, pool),
            Claim(MORE_PRETRAINING, REFINED, LONGER, pool),
        ]
        apart = "tells classes of one kind apart better"
        rows += [
            Claim(text, REFINED, theirs, pool, WITHIN_KINDS)
            for text, theirs in (
                (f"refinement {apart}", LAST),
                (f"refinement {apart} than as much masked pre-training", LONGER),
                (f"the refined model {apart} than random weights", RANDOM_LAST),
            )
        ]
    probes = [(LINEAR, "linear probe accuracy", pool) for pool in ("cls", "mean")]
    few = [low_shot(shot) for shot in SHOTS]
    probes += [(protocol, f"{protocol.label} accuracy", "cls") for protocol in few]
    probes += [(KMEANS, "cluster accuracy", "cls")]
    more = "refinement raises more than as much masked pre-training"
    return rows + [
        Claim(f"{text}: {what} of the last block", REFINED, theirs, pool, protocol)
        for protocol, what, pool in probes
        for text, theirs in (("refinement raises", LAST), (more, LONGER))
    ]


CLAIMS = _table_of_claims()


def judge_claims(
    found: Found, recipes: Sequence[Recipe], record: Record, transfer: Sequence[str] = TRANSFER
) -> None:
    """Add to ``record`` what the measurements say about the paper's claims.

    Args:
        found: (model, seed) -> what was measured of it.
        recipes: what was trained; the first one has the controls.
        record: collects the claims.
        transfer: the data sets that no model was trained on.
    """
    for data in (short_name(recipes[0].preset.dataset), *map(short_name, transfer)):
        for recipe in recipes:
            for claim in CLAIMS:
                judge(claim, found, recipe, data, record)
    _claim_of_decoders(found, recipes, record)


def _claim_of_decoders(found: Found, recipes: Sequence[Recipe], record: Record) -> None:
    """Whether the last blocks fall further behind the best one where the decoder is light."""
    main = recipes[0].preset
    alike = {  # depth of the decoder -> the model that differs from the main one in nothing else
        recipe.preset.pretrain.decoder_depth: found[recipe.name, 0]
        for recipe in recipes
        if recipe.preset.encoder == main.encoder
        and asdict(recipe.preset.pretrain) | {"decoder_depth": main.pretrain.decoder_depth}
        == asdict(main.pretrain)
    }
    data = short_name(main.dataset)
    for pool in ("cls", "mean") if len(alike) > 1 else ():
        drops = {}
        for depth, measured in sorted(alike.items()):
            blocks = measured.hits[data, pool, KNN.label].float()
            drops[depth] = blocks[measured.best[data, pool]] - blocks[-1]
        text = ", ".join(
            f"{100 * drop.mean().item():.1f} ({count(depth, 'block')})"
            for depth, drop in drops.items()
        )
        lightest, heaviest = drops[min(drops)], drops[max(drops)]
        record.judge(
            "a lighter decoder makes the last blocks fall further",
            image_difference([lightest], [heaviest]),
            n_test=len(lightest),
            text=f"best block minus last: {text}; ",
            about=About("", data, pool, KNN.label, "the heaviest decoder"),
        )


def _refined_with(preset: Preset, seed: int) -> Preset:
    return replace(preset, refine=replace(preset.refine, seed=seed))


def _parser() -> argparse.ArgumentParser:
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
    return parser


def main() -> None:
    args = _parser().parse_args()
    show_notices()
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
    record = Record("evidence", chosen[0].preset, (0,), args.out)
    judge_claims(found, chosen, record, transfer)
    done = trainings(chosen)
    for part, table in (
        ("", pd.DataFrame([row for m in found.values() for row in m.rows])),
        ("_claims", record.claims_table()),
        ("_training", training_facts(done)),
        ("_history", histories(done)),
        ("_settings", settings(done, chosen)),
    ):
        write_csv(table, HERE / f"evidence_{args.preset}{part}.csv")


if __name__ == "__main__":
    main()
