"""The ablations of refinement: every variant is the preset's recipe with a few settings changed.

The groups follow Table 1 and Table 8 of the paper (as far as the released configurations tell). One
more compares the pairing of views that the method's description implies with that of the released
code. Rows of many seeds are measured once (``python -m experiments.ablations --help``), kept beside
this file in ``ablations_PRESET.csv`` and drawn by notebook 08.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from mimrefiner.config import LOSS_SCHEDULES, Views
from mimrefiner.data.datasets import short_name
from mimrefiner.files import write_csv
from mimrefiner.notices import show_notices
from mimrefiner.probes.features import extract_features
from mimrefiner.probes.knn import knn_hits
from mimrefiner.study import presets, store
from mimrefiner.study.claims import Record
from mimrefiner.study.presets import Preset, load_preset

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Ablation:
    """A variant of the recipe.

    Attributes:
        group, variant: what it varies, and how.
        change: the fields of RefineConfig that differ from the recipe's.
        core: whether it is measured with several seeds, else with one (exploratory).
    """

    group: str
    variant: str
    change: dict = field(default_factory=dict)
    core: bool = True

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
        Ablation("pairing of views", other, {"pairing": other}),
        Ablation("number of heads", "1 (last block)", {"blocks": (last,)}),
        Ablation("neighbours", "top-1 in stage 3", {"refine_top_k": 1}),
        Ablation("negatives", "swapped too (NNCLR)", {"swap_negatives": True}),
        Ablation("place of heads", "last and random blocks", {"blocks": anywhere}),
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
    return [a for a in variants if not a.change or asdict(changed(preset, a).refine) != recipe]


def measure_variants(
    preset: Preset, seeds: Sequence[int], record: Record, *, exploratory: bool
) -> None:
    """Refine once per variant and seed and add k-NN rows of every block to ``record``.

    Trained models come from the store.

    Args:
        preset: the recipe.
        seeds: of pre-training and refinement.
        record: collects the rows.
        exploratory: whether the exploratory variants are measured too, with the first seed.
    """
    train, test = presets.load_split(preset, "train"), presets.load_split(preset, "test")
    for seed in seeds:
        seeded = preset.with_seed(seed)
        models = {"before": store.pretrained(seeded).encoder}
        for ablation in ablations(seeded):
            if ablation.core or (exploratory and seed == seeds[0]):
                models[ablation.name] = store.refined(changed(seeded, ablation)).ema_encoder
        for name, encoder in models.items():
            hits = knn_hits(extract_features(encoder, train), extract_features(encoder, test))
            for pool, right in hits.items():
                record.add_blocks({name: (encoder, right)}, pool, seed, len(train), len(test))


def changed(preset: Preset, ablation: Ablation) -> Preset:
    """The preset with the variant's settings."""
    return replace(preset, refine=replace(preset.refine, **ablation.change))


def _crops_only(views: Views) -> Views:
    def plain(crop):
        return replace(crop, jitter_p=0.0, grey_p=0.0, blur_p=0.0, solarize_p=0.0)

    return Views(
        tuple(plain(crop) for crop in views.global_crops), plain(views.local_crop), views.n_local
    )


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
    args = parser.parse_args()
    preset, seeds = load_preset(args.preset), tuple(int(seed) for seed in args.seeds.split(","))
    preset = replace(preset, dataset=args.data or preset.dataset)
    named = replace(preset, dataset=short_name(preset.dataset))
    record = Record("08_ablations", named, seeds, HERE)
    measure_variants(preset, seeds, record, exploratory=not args.core)
    write_csv(record.table(), HERE / f"ablations_{args.preset}.csv")


if __name__ == "__main__":
    main()
