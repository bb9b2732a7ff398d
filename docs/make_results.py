"""Write the page of results from the measured tables: ``python docs/make_results.py``.

No measured number is typed in here.
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from experiments import measure
from experiments.ablations import ablations
from mimrefiner.data.datasets import load_dataset
from mimrefiner.probes.protocols import (
    KMEANS,
    KNN,
    LINEAR,
    WITHIN_KINDS,
    Protocol,
    labels,
    low_shot,
)
from mimrefiner.study.claims import claims_table
from mimrefiner.study.presets import load_preset
from mimrefiner.study.published import ablation_rows, experiments_folder
from mimrefiner.study.tables import count, markdown_table, mean_sd

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "results.md"

HEAD = """# Results

What was measured with this package, claim by claim. This page is written by
`python docs/make_results.py` from the committed tables.

**Verdicts.** Where it is known for every test image which model is right, a claim is *seen* when
the 95 % interval of the difference over images (paired bootstrap) lies above zero for every
single seed, and *opposite* when it lies below zero for every seed; of one model this speaks of
that model. Where there is only a value per seed (clusters, ablations, probes in the notebooks),
it is the interval over seeds (Student's t) that must lie above or below zero, for accuracies of
one data set together with their binomial error: as if the two models had seen different images,
so that it is wider than need be and small effects are missed. *Not seen*: neither. *Open*:
nothing to judge by, as of one seed without images.

**Many claims.** No interval is corrected for their number: of a hundred claims about single
models without any effect, about five are expected outside of theirs. Three seeds that must agree
make chance rarer, but they share one pre-trained model and one set of test images. Read the sizes
of the differences, and whether related claims agree.

**How to read it.** The paper refines models of 303 M to 1.9 B parameters on ImageNet-1K; here a
ViT of 5 M is refined on 64-pixel images and one of 0.6 M on digits. The authors expect the
benefit of several heads, and much of the drop behind the peak, only from about 300 M parameters
on. Agreement at this scale does not prove theirs, and disagreement does not refute them.
"""

NATURAL = """
## Natural images, preset `{preset}`

{models} ({blocks} blocks, width {dim}, patch {patch}), pre-trained on {data}'s training images at
{size} px without labels: {epochs}. {weak}{chosen} Features are computed in bfloat16. One
pre-training per model; ± is the standard deviation over seeds of refinement, and all models meet
the same probes (orders, draws of labelled images, starts of k-means). *{data}*: {n_test}
validation images, which no model and no choice has seen, classified with {n_train} training
images; *fruit64*: photos of {kinds} kinds of fruit, a data set the models were not trained on.
Accuracies in %; linear, few-shot (mean of {draws} draws of the labelled images) and clusters of
the last block's cls token; *within a kind*: k-NN of that token where only photos of the same kind
(pears, melons, apples, citrus fruit) vote, so that fine differences decide. The best block is the
best on these test images, for orientation; the claims use a block chosen on held-out training
images of {data}, also those about fruit64, whose own validation photos show the heaps of its
training photos (they choose the rate of its linear probes only). Refined models are weight
averages (EMA), the others are not. Raw pixels are those of images shrunk to 32 px. The labels'
control spends what refinement does on fine-tuning: it has seen the labels of the images that
vote, and is no upper bound of what labels can do. Random weights are one draw. Compare a model
with them before reading its claims: where the two are alike, it has not learnt enough to say
anything. Device: {device}.
"""
ABLATIONS = """k-NN accuracy (%) of the last block's cls token. The variants of one seed are
exploratory: they say which would be worth more seeds, and nothing else. What they change is in
`experiments/ablations.py`.

"""
TOY = "A ViT of 0.6 M parameters, preset `tiny`, as drawn in `figures/`.\n\n"
PHOTOGRAPHS = """The packaged `mae_tiny_64` and `mae_tiny_64_refined` on fruit64, as notebooks
show them: half precision, one seed, and the best block chosen on fruit64's own validation photos,
which show the heaps of its training photos.

"""
CHOSEN = """The learning rate of stage 3 was chosen for the MAE by validation images (below);
everything else, the rates of SimMIM's refinement and of the controls too, was set beforehand."""
CHOICE = """The MAE, one seed, a tenth of the training images held out for choices; k-NN of the
last block's cls token, share of images. The measurements above are those of the preset's rate,
{rate:g}.

"""
TRAINED = "Wall time is that of a machine that did other work too; the computation is counted."
WEAK = """Epochs are what a few hours of two CPU cores allow: they are weak models. For the same
reason views are 2 + 4 instead of the paper's 2 + 10, only the MAE has controls, and decoders of
other depths, a deeper model, other data sets (CIFAR) and training with labels to its end were
left out; preset `natural-gpu` has all but the last. """


def models_table(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per model on one data set: k-NN of last and best block, probes of the last one."""
    images = int(rows.loc[rows["protocol"] == KNN.name, "n_train"].iloc[0])
    rows = rows.assign(probe=rows["protocol"].map(labels(measure.probe_protocols(images))))
    table = []
    for model, part in rows.groupby("model", sort=False):
        last = part[part["block"] == part["block"].max()]
        table.append(
            {
                "model": model,
                "seeds": part["seed"].nunique(),
                "k-NN cls, last block": _cell(last, KNN),
                "best block": _best_cell(part, "cls"),
                "k-NN patch mean, last block": _cell(last, KNN, ("mean",)),
                "its best block": _best_cell(part, "mean"),
                WITHIN_KINDS.label: _cell(last, WITHIN_KINDS),
                "linear": _cell(last, LINEAR),
                **{low_shot(n).label: _cell(last, low_shot(n)) for n in (1, 5)},
                "clusters ACC": _cell(last, KMEANS),
            }
        )
    table = pd.DataFrame(table)
    return table.loc[:, (table != "").any()]  # a data set may lack a probe


def _cell(last: pd.DataFrame, protocol: Protocol, pools: Sequence[str] = ("cls", "pixels")) -> str:
    """Mean and deviation over seeds of the last block; "" where it was not measured."""
    is_asked = (last["probe"] == protocol.label) & (last["metric"] == protocol.metrics[0])
    values = last.loc[is_asked & last["pool"].isin(pools), "value"]
    return mean_sd(values) if len(values) else ""


def _best_cell(part: pd.DataFrame, pool: str) -> str:
    votes = part[(part["probe"] == KNN.label) & (part["pool"] == pool)]
    if votes.empty:
        return ""
    means = votes.groupby("block")["value"].mean()
    return f"{100 * means.max():.1f} (block {means.idxmax() + 1} of {part['block'].max() + 1})"


def read(name: str, what: str = "") -> pd.DataFrame | None:
    """A committed table of the natural images; None where there is none."""
    file = experiments_folder() / f"evidence_{name}{what}.csv"
    return pd.read_csv(file) if file.is_file() else None


def natural_section(name: str) -> str:
    """What was measured with one preset of natural images; "" where nothing was."""
    rows, choice = read(name), read(name, "_choice")
    if rows is None:
        return ""
    parts = [natural_text(name, rows, is_chosen=choice is not None)]
    for dataset, part in rows.groupby("dataset", sort=False):
        parts.append(f"\n### {dataset}\n\n{markdown_table(models_table(part))}")
    if choice is not None:
        rate = load_preset(name).refine.refine_base_lr
        parts.append(
            "\n### The learning rate of stage 3, on validation images\n\n"
            + CHOICE.format(rate=rate)
            + markdown_table(choice.drop(columns=["preset", "weights_sha256"]))
        )
    facts = read(name, "_training")
    parts.append(
        f"\n### What was trained\n\n{TRAINED}\n\n"
        + markdown_table(facts.assign(weights_sha256=facts["weights_sha256"].str[:12]))
    )
    claims = read(name, "_claims").fillna("")
    for where, part in claims.groupby(["model", "dataset", "pool"], sort=False):
        table = claims_table(part).drop(columns="notebook")
        parts.append(f"\n### Claims: {', '.join(filter(None, where))}\n\n{markdown_table(table)}")
    return "".join(parts)


def natural_text(name: str, rows: pd.DataFrame, *, is_chosen: bool) -> str:
    """The words before the tables; ``is_chosen``: whether validation images chose a rate."""
    preset, facts = load_preset(name), read(name, "_training")
    first = rows[rows["protocol"] == KNN.name].iloc[0]
    trained = facts[facts["training"] == "pre-training"]
    return NATURAL.format(
        preset=name,
        blocks=preset.encoder.depth,
        dim=preset.encoder.dim,
        patch=preset.encoder.patch_size,
        size=preset.encoder.image_size,
        models=" and ".join(trained["model"]),
        epochs=", ".join(
            f"{count(round(f.epochs), 'epoch')} of {f.model}" for f in trained.itertuples()
        ),
        weak=WEAK if name == "natural" else "",
        chosen=CHOSEN if is_chosen else "Recipes were set beforehand and not tuned.",
        draws=measure.DRAWS,
        data=first.dataset,
        n_train=f"{first.n_train:,}",
        n_test=f"{first.n_test:,}",
        kinds=len(load_dataset("fruit64", split="test").classes),
        device=", ".join(rows["device"].unique()),
    )


def ablations_table(preset: str) -> pd.DataFrame:
    """Every variant's last block, cls token, and its difference from the recipe, by seed."""
    rows = ablation_rows(preset)
    rows = rows[(rows["pool"] == "cls") & (rows["block"] == rows["block"].max())]
    values = rows.pivot(index="seed", columns="model", values="value")
    values, recipe = values[list(dict.fromkeys(rows["model"]))], ablations(load_preset(preset))[0]
    gains = 100 * values.sub(values[recipe.name], axis=0)
    return pd.DataFrame(
        [
            {
                "variant": name,
                "seeds": values[name].count(),
                "last block": mean_sd(values[name].dropna()),
                "minus the recipe, by seed": ""
                if name == recipe.name
                else ", ".join(f"{x:+.1f}" for x in gains[name].dropna()),
            }
            for name in values
        ]
    )


def notebook_claims(dataset: str) -> str:
    """The published claims of the notebooks about one data set, as a table."""
    claims = pd.read_csv(ROOT / "figures" / "claims.csv")
    return markdown_table(claims_table(claims[claims["dataset"] == dataset]))


def page() -> str:
    """The page as Markdown."""
    parts = [HEAD, *(natural_section(name) for name in ("natural", "natural-gpu"))]
    parts += ["\n## The toy: digits\n\n", TOY, notebook_claims("digits")]
    parts += ["\n## Photographs in the notebooks\n\n", PHOTOGRAPHS, notebook_claims("fruit64")]
    parts += ["\n## Ablations: digits\n\n", ABLATIONS, markdown_table(ablations_table("tiny"))]
    parts += ["\n## Ablations: Fashion-MNIST\n\n", markdown_table(ablations_table("fashion")), "\n"]
    return "".join([*parts, notebook_claims("fashion_mnist")])


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"{PAGE.name} written")
