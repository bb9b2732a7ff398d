"""The ablations of refinement: every variant is the preset's recipe with one thing changed.

The groups follow Table 1 and Table 8 of the paper, as far as the released configurations tell.
Others ask what the method needs at all: the queue, stage 2, and masked pre-training. One compares
the pairing of views that the method's description implies with that of the released code. Variants
are measured once (``python -m experiments.ablations --help``); ``ablations_PRESET.csv`` beside this
file holds an accuracy per block, and ``ablations_PRESET_hits.csv`` which test images are right in
the last block. Notebook 08 draws them.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
from torch import nn

from experiments.trials import Start, trained
from mimrefiner.config import AUTO, LOSS_SCHEDULES, RefineConfig, Views
from mimrefiner.data.datasets import short_name
from mimrefiner.files import cache_folder, write_csv
from mimrefiner.notices import show_notices
from mimrefiner.probes.features import extract_features
from mimrefiner.probes.knn import knn_hits
from mimrefiner.study import presets, store
from mimrefiner.study.claims import Record
from mimrefiner.study.presets import Preset, load_preset
from mimrefiner.training.refine import refinement_flops

HERE = Path(__file__).parent


# ---- how a variant is trained


def refined(preset: Preset) -> nn.Module:
    """Refinement with the preset's settings."""
    return store.refined(preset).ema_encoder


def on_own_views(preset: Preset) -> nn.Module:
    """Refinement without queue: the positive is another view of the image and no neighbour."""
    return _trained("own view", preset, store.pretrained(preset).encoder, preset.refine)


def without_stage_2(preset: Preset) -> nn.Module:
    """Refinement whose heads start untrained; stage 3 takes the operations of both stages.

    One step of stage 2 remains, since a stage has at least one.
    """
    return _trained("no stage 2", preset, store.pretrained(preset).encoder, preset.refine)


def from_random_weights(preset: Preset) -> nn.Module:
    """The same objective from random weights, for the operations of pre-training and refinement.

    All blocks are trained at the same rate from the first step on, since there is nothing to keep.
    """
    first, data = store.pretrained(preset), presets.load_split(preset, "train")
    flops = first.flops + refinement_flops(first.encoder, data, preset.refine)
    encoder = store.untrained(preset)
    config = replace(preset.refine, frozen_blocks=0, layer_decay=1.0, heads_epochs=0.0)
    longer = flops / refinement_flops(encoder, data, config)
    config = replace(config, refine_epochs=longer * config.refine_epochs)
    return _trained("refined", preset, encoder, config)


def _trained(trial: str, preset: Preset, encoder: nn.Module, config: RefineConfig) -> nn.Module:
    start = Start(encoder, presets.load_split(preset, "train"), config, preset.pretrain)
    return trained(trial, start, cache_folder() / "trials")


# ---- the variants


@dataclass(frozen=True)
class Ablation:
    """A variant of the recipe.

    Attributes:
        group, variant: what it varies, and how.
        change: the fields of RefineConfig that differ from the recipe's.
        core: whether it is measured with several seeds, else with one (exploratory).
        train: makes the encoder of a preset whose recipe has the change.
    """

    group: str
    variant: str
    change: dict = field(default_factory=dict)
    core: bool = True
    train: Callable[[Preset], nn.Module] = refined

    @property
    def name(self) -> str:
        """What rows call it."""
        return f"{self.group}: {self.variant}"


def ablations(preset: Preset) -> list[Ablation]:
    """All variants of a preset, the recipe itself first; the preset's seed draws random blocks."""
    depth, views = preset.encoder.depth, preset.refine.views
    heads = preset.refine.resolve_blocks(depth)
    last = depth - 1
    other = "published" if preset.refine.pairing == "intended" else "intended"
    spaced, wider = (tuple(range(last, max(-1, heads[0] - less), -2))[::-1] for less in (1, 2))
    rng = np.random.default_rng(preset.refine.seed)
    anywhere = (*(int(b) for b in np.sort(rng.choice(last, len(heads) - 1, replace=False))), last)
    top = f"top-{preset.refine.refine_top_k}"
    variants = [
        Ablation("recipe", f"{len(heads)} heads, {preset.refine.pairing} pairing, {top}"),
        Ablation("number of heads", "1 (last block)", {"blocks": (last,)}),
        Ablation("neighbours", "own view (no queue)", train=on_own_views),
        Ablation("pairing of views", other, {"pairing": other}),
        Ablation("place of heads", "last and random blocks", {"blocks": anywhere}),
        Ablation("negatives", "swapped too (NNCLR)", {"swap_negatives": True}),
        Ablation("neighbours", "top-1 in stage 3", {"refine_top_k": 1}),
        Ablation("stages", "no stage 2, same compute", train=without_stage_2),
        Ablation("start", "random weights, same compute in all", train=from_random_weights),
        Ablation("place of heads", "from the measured peak on", {"blocks": AUTO}),
        Ablation("number of heads", "2", {"blocks": (last - 1, last)}, core=False),
        Ablation(
            "number of heads",
            f"{depth // 2}",
            {"blocks": tuple(range(depth - depth // 2, depth))},
            core=False,
        ),
        Ablation("place of heads", "every other block", {"blocks": spaced}, core=False),
        Ablation("place of heads", "every other block, one more", {"blocks": wider}, core=False),
        Ablation("frozen blocks", "none", {"frozen_blocks": 0}, core=False),
        Ablation("frozen blocks", f"first {depth // 2}", {"frozen_blocks": depth // 2}, core=False),
        Ablation(
            "augmentation", "2 global views only", {"views": replace(views, n_local=0)}, core=False
        ),
        Ablation("augmentation", "crops only", {"views": _crops_only(views)}, core=False),
        *(
            Ablation("loss of heads", how, {"loss_schedule": how}, core=False)
            for how in LOSS_SCHEDULES[1:]
        ),
    ]
    recipe = asdict(preset.refine)
    return [
        a
        for a in variants
        if a.train is not refined or not a.change or asdict(changed(preset, a).refine) != recipe
    ]


def changed(preset: Preset, ablation: Ablation) -> Preset:
    """The preset with the variant's settings."""
    return replace(preset, refine=replace(preset.refine, **ablation.change))


def _crops_only(views: Views) -> Views:
    def plain(crop):
        return replace(crop, jitter_p=0.0, grey_p=0.0, blur_p=0.0, solarize_p=0.0)

    return Views(
        tuple(plain(crop) for crop in views.global_crops), plain(views.local_crop), views.n_local
    )


# ---- measuring


@dataclass
class Measurements:
    """Rows and hits of the variants measured so far, written after each of them.

    Attributes:
        record: collects an accuracy per block and pooling.
        name: of the files, in the folder ``record.out``.
        hits: columns model, seed, pool, hits: for every test image 1 where the last block is right.
    """

    record: Record
    name: str
    hits: list[dict] = field(default_factory=list)

    def add(self, model: str, seed: int, preset: Preset, encoder: nn.Module) -> None:
        """Measure k-NN after every block and write the files anew."""
        train, test = presets.load_split(preset, "train"), presets.load_split(preset, "test")
        hits = knn_hits(extract_features(encoder, train), extract_features(encoder, test))
        for pool, right in hits.items():
            models = {model: (encoder, right)}
            self.record.add_blocks(models, pool, seed, len(train), len(test))
            text = "".join(str(int(hit)) for hit in right[-1])
            self.hits.append({"model": model, "seed": seed, "pool": pool, "hits": text})
        write_csv(self.record.table(), self.record.out / f"{self.name}.csv")
        write_csv(pd.DataFrame(self.hits), self.record.out / f"{self.name}_hits.csv")


def measure_variants(
    preset: Preset, seeds: Sequence[int], to: Measurements, *, exploratory: bool
) -> None:
    """Train and measure every variant with every seed, and the models before refinement.

    Trained models are kept in the cache, and what is there is not trained again.

    Args:
        preset: the recipe.
        seeds: of pre-training and refinement.
        to: collects what was measured.
        exploratory: whether the exploratory variants are measured too, with the first seed.
    """
    for seed in seeds:
        seeded = preset.with_seed(seed)
        to.add("before", seed, seeded, store.pretrained(seeded).encoder)
    variants = [{a.name: a for a in ablations(preset.with_seed(seed))} for seed in seeds]
    # The core first, so that a run that is cut off leaves whole comparisons
    for name, first in sorted(variants[0].items(), key=lambda item: not item[1].core):
        if first.core or exploratory:
            for seed, of_seed in zip(seeds if first.core else seeds[:1], variants, strict=False):
                seeded = changed(preset.with_seed(seed), of_seed[name])
                to.add(name, seed, seeded, of_seed[name].train(seeded))


def main() -> None:
    show_notices()
    parser = argparse.ArgumentParser(
        "python -m experiments.ablations", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--preset", default="tiny")
    parser.add_argument(
        "--data",
        help="other than the preset's, such as parquet:PATH; rows carry the name of the folder",
    )
    parser.add_argument(
        "--seeds",
        default="0,1,2",
        help="of the core ablations; the exploratory ones take the first",
    )
    parser.add_argument("--core", action="store_true", help="leave out the exploratory ones")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the two files")
    args = parser.parse_args()
    preset, seeds = load_preset(args.preset), tuple(int(seed) for seed in args.seeds.split(","))
    preset = replace(preset, dataset=args.data or preset.dataset)
    named = replace(preset, dataset=short_name(preset.dataset))
    record = Record("08_ablations", named, seeds, args.out)
    to = Measurements(record, f"ablations_{args.preset}")
    measure_variants(preset, seeds, to, exploratory=not args.core)


if __name__ == "__main__":
    main()
