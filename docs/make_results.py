"""Write the page of results from the measured tables: ``python docs/make_results.py``. No measured
number is typed in here.
"""

from pathlib import Path

import pandas as pd

from experiments import measure
from experiments.measure import WITHIN_PROTOCOL
from mimrefiner.data.datasets import load_dataset
from mimrefiner.probes.knn import KNN_PROTOCOL
from mimrefiner.study.claims import claims_table
from mimrefiner.study.presets import load_preset
from mimrefiner.study.published import ablation_rows
from mimrefiner.study.tables import count, markdown_table, mean_sd

ROOT = Path(__file__).parent.parent
ASSETS = ROOT / "mimrefiner" / "assets"
PAGE = ROOT / "docs" / "results.md"

HEAD = """# Results

What was measured with this package, claim by claim. This page is written by `python docs/make_results.py` from the committed
tables.

**Verdicts.** Where it is known for every test image which model is right, a claim is *seen* when the 95 % interval of the
difference over images (paired bootstrap) lies above zero for every single seed, and *opposite* when it lies below zero for
every seed; of one model this speaks of that model. Where there is only a value per seed (clusters, ablations, probes in the
notebooks), it is the interval over seeds (Student's t) that must lie above or below zero, for accuracies of one data set
together with their binomial error: as if the two models had seen different images, so that it is wider than need be and small
effects are missed. *Not seen*: neither. *Open*: nothing to judge by, as of one seed without images.

**Many claims.** No interval is corrected for their number: of a hundred claims about single models without any effect, about
five are expected outside of theirs. Three seeds that must agree make chance rarer, but they share one pre-trained model and one
set of test images. Read the sizes of the differences, and whether related claims agree.

**How to read it.** The paper refines models of 303 M to 1.9 B parameters on ImageNet-1K; here a ViT of 5 M is refined on
64-pixel images and one of 0.6 M on digits. The authors expect the benefit of several heads, and much of the drop behind the
peak, only from about 300 M parameters on. Agreement at this scale does not prove theirs, and disagreement does not refute them.
"""

NATURAL = """
## Natural images, preset `{preset}`

{models} ({blocks} blocks, width {dim}, patch {patch}), pre-trained on {data}'s training images at {size} px without labels:
{epochs}. {weak}{chosen} Features are computed in bfloat16. One pre-training per model; ± is the standard deviation over seeds of
refinement, and all models meet the same probes (orders, draws of labelled images, starts of k-means). *{data}*: {n_test}
validation images, which no model and no choice has seen, classified with {n_train} training images; *fruit64*: photos of {kinds}
kinds of fruit, a data set the models were not trained on. Accuracies in %; linear, few-shot (mean of {draws} draws of the
labelled images) and clusters of the last block's cls token; *within a kind*: k-NN of that token where only photos of the same
kind (pears, melons, apples, citrus fruit) vote, so that fine differences decide. The best block is the best on these test
images, for orientation; the claims use a block chosen on held-out training images of {data}, also those about fruit64, whose own
validation photos show the heaps of its training photos (they choose the rate of its linear probes only). Refined models are
weight averages (EMA), the others are not. Raw pixels are those of images shrunk to 32 px. The labels' control spends what
refinement does on fine-tuning: it has seen the labels of the images that vote, and is no upper bound of what labels can do.
Random weights are one draw. Compare a model with them before reading its claims: where the two are alike, it has not learnt
enough to say anything. Device: {device}.
"""
ABLATIONS = """k-NN accuracy (%) of the last block's cls token. The variants of one seed are exploratory: they say which would be
worth more seeds, and nothing else. What they change is in `mimrefiner/ablations.py`.

"""
TOY = "A ViT of 0.6 M parameters, preset `tiny`, as drawn in `figures/`.\n\n"
PHOTOGRAPHS = """The packaged `mae_tiny_64` and `mae_tiny_64_refined` on fruit64, as notebooks show them: half precision, one seed,
and the best block chosen on fruit64's own validation photos, which show the heaps of its training photos.

"""
CHOSEN = """The learning rate of stage 3 was chosen for the MAE by validation images (below); everything else, the rates of SimMIM's
refinement and of the controls too, was set beforehand."""
CHOICE = """The MAE, one seed, a tenth of the training images held out for choices; k-NN of the last block's cls token, share of
images. The measurements above are those of the preset's rate, {rate:g}.

"""
TRAINED = "Wall time is that of a machine that did other work too; the computation is counted."
WEAK = """Epochs are what a few hours of two CPU cores allow: they are weak models. For the same reason views are 2 + 4 instead
of the paper's 2 + 10, only the MAE has controls, and decoders of other depths, a deeper model, other data sets (CIFAR) and
training with labels to its end were left out; preset `natural-gpu` has all but the last. """


def models_table(rows: pd.DataFrame, dataset: str) -> pd.DataFrame:
    """Per model: k-NN of the last and the best block for both poolings, linear probe, few-shot and
    clusters of the last block.
    """
    rows = rows[rows["dataset"] == dataset]
    table = []
    for model, part in rows.groupby("model", sort=False):
        last = part["block"].max()

        def value(protocol, pools=("cls", "pixels"), metric="accuracy", part=part, last=last):
            chosen = part[
                part["protocol"].str.startswith(protocol)
                & (part["metric"] == metric)
                & part["pool"].isin(pools)
            ]
            chosen = chosen[chosen["block"] == last]
            return mean_sd(chosen["value"]) if len(chosen) else ""

        def best(pool, part=part, last=last):
            knn = (
                part[(part["protocol"] == KNN_PROTOCOL) & (part["pool"] == pool)]
                .groupby("block")["value"]
                .mean()
            )
            return (
                f"{100 * knn.max():.1f} (block {knn.idxmax() + 1} of {last + 1})"
                if len(knn)
                else ""
            )

        table.append(
            {
                "model": model,
                "seeds": part["seed"].nunique(),
                "k-NN cls, last block": value(KNN_PROTOCOL),
                "best block": best("cls"),
                "k-NN patch mean, last block": value(KNN_PROTOCOL, ("mean",)),
                "its best block": best("mean"),
                "k-NN within a kind": value(WITHIN_PROTOCOL),
                "linear": value("linear"),
                "1-shot": value("logistic_1shot"),
                "5-shot": value("logistic_5shot"),
                "clusters ACC": value("kmeans", metric="ACC"),
            }
        )
    table = pd.DataFrame(table)
    return table.loc[:, (table != "").any()]  # a data set may lack a probe


def natural_section(name: str) -> str:
    """What was measured with one preset of natural images; "" where nothing was."""
    if not (ASSETS / f"evidence_{name}.csv").is_file():
        return ""
    rows, claims, facts = (
        pd.read_csv(ASSETS / f"evidence_{name}{part}.csv") for part in ("", "_claims", "_training")
    )
    preset = load_preset(name)
    first, trained = (
        rows[rows["protocol"] == KNN_PROTOCOL].iloc[0],
        facts[facts["training"] == "pre-training"],
    )
    vit = preset.encoder
    chosen = (
        CHOSEN
        if (ASSETS / f"evidence_{name}_choice.csv").is_file()
        else "Recipes were set beforehand and not tuned."
    )
    text = NATURAL.format(
        preset=name,
        blocks=vit.depth,
        dim=vit.dim,
        patch=vit.patch_size,
        size=vit.image_size,
        models=" and ".join(trained["model"]),
        epochs=", ".join(
            f"{count(round(f.epochs), 'epoch')} of {f.model}" for f in trained.itertuples()
        ),
        weak=WEAK if name == "natural" else "",
        chosen=chosen,
        draws=measure.DRAWS,
        data=first.dataset,
        n_train=f"{first.n_train:,}",
        n_test=f"{first.n_test:,}",
        kinds=len(load_dataset("fruit64", split="test").classes),
        device=", ".join(rows["device"].unique()),
    )
    parts = [text]
    for dataset in rows["dataset"].unique():
        parts.append(f"\n### {dataset}\n\n{markdown_table(models_table(rows, dataset))}")
    if (ASSETS / f"evidence_{name}_choice.csv").is_file():
        table = pd.read_csv(ASSETS / f"evidence_{name}_choice.csv").drop(
            columns=["preset", "weights_sha256"]
        )
        parts.append(
            "\n### The learning rate of stage 3, on validation images\n\n"
            + CHOICE.format(rate=preset.refine.refine_base_lr)
            + markdown_table(table)
        )
    parts.append(
        f"\n### What was trained\n\n{TRAINED}\n\n"
        + markdown_table(facts.assign(weights_sha256=facts["weights_sha256"].str[:12]))
    )
    about = claims["claim"].str.extract(r"^(?P<text>.*) \((?P<about>[^()]*)\)$")
    for where, part in claims.assign(claim=about["text"]).groupby(about["about"], sort=False):
        parts.append(
            f"\n### Claims: {where}\n\n"
            + markdown_table(claims_table(part).drop(columns="notebook"))
        )
    return "".join(parts)


def ablations_table(preset: str) -> pd.DataFrame:
    """Every variant's last block, cls token, and what it has more than the recipe of the same seed,
    in points.
    """
    rows = ablation_rows(preset)
    rows = rows[(rows["pool"] == "cls") & (rows["block"] == rows["block"].max())]
    values = rows.pivot(index="seed", columns="model", values="value")[
        list(dict.fromkeys(rows["model"]))
    ]
    recipe = next(name for name in values if name.startswith("recipe"))
    gains = 100 * values.sub(values[recipe], axis=0)
    return pd.DataFrame(
        [
            {
                "variant": name,
                "seeds": values[name].count(),
                "last block": mean_sd(values[name].dropna()),
                "minus the recipe, by seed": ""
                if name == recipe
                else ", ".join(f"{x:+.1f}" for x in gains[name].dropna()),
            }
            for name in values
        ]
    )


def notebook_claims(about: str) -> str:
    """The published claims of the notebooks ``about`` "digits", "photographs" or "Fashion-MNIST",
    as a table.
    """
    head, rule, *rows = (ROOT / "figures" / "claims.md").read_text().splitlines()
    # Told above
    evidence = {
        claim
        for file in ASSETS.glob("evidence_*_claims.csv")
        for claim in pd.read_csv(file)["claim"]
    }

    def of(claim: str) -> str:
        if claim in evidence:
            return "evidence"
        return next((name for name in ("photographs", "Fashion-MNIST") if name in claim), "digits")

    return (
        "\n".join([head, rule, *(row for row in rows if of(row[2:].split(" | ")[0]) == about)])
        + "\n"
    )


def page() -> str:
    """The page as Markdown."""
    parts = [HEAD, *(natural_section(name) for name in ("natural", "natural-gpu"))]
    parts += ["\n## The toy: digits\n\n", TOY, notebook_claims("digits")]
    parts += ["\n## Photographs in the notebooks\n\n", PHOTOGRAPHS, notebook_claims("photographs")]
    parts += ["\n## Ablations: digits\n\n", ABLATIONS, markdown_table(ablations_table("tiny"))]
    parts += ["\n## Ablations: Fashion-MNIST\n\n", markdown_table(ablations_table("fashion")), "\n"]
    return "".join([*parts, notebook_claims("Fashion-MNIST")])


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"{PAGE.name} written")
