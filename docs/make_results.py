"""Write the page of results from the measured tables: ``python docs/make_results.py``. No measured number is typed in here."""

from pathlib import Path

import pandas as pd

from mimrefiner.ablations import committed_rows
from mimrefiner.data import load_dataset
from mimrefiner.measure import WITHIN_PROTOCOL
from mimrefiner.presets import load_preset
from mimrefiner.results import KNN_PROTOCOL, claims_table, count, markdown_table, mean_sd

ROOT = Path(__file__).parent.parent
ASSETS = ROOT / "mimrefiner" / "assets"
PAGE = ROOT / "docs" / "results.md"

HEAD = """# Results

What was measured with this package, claim by claim. This page is written by `python docs/make_results.py` from the committed
tables.

**Verdicts.** Where it is known for every test image which model is right, a claim is *seen* when the 95 % interval of the
difference over images (paired bootstrap) lies above zero for every single seed, and *opposite* when it lies below zero for
every seed; of one model this speaks of that model. Where there is only a value per seed (linear probes, few-shot, clusters,
ablations), it is the interval over seeds (Student's t, for accuracies of one data set together with their binomial error) that
must lie above or below zero. *Not seen*: neither. *Open*: nothing to judge by, as of one seed without images.

**How to read it.** The paper refines models of 303 M to 1.9 B parameters on ImageNet-1K; here a ViT of 5 M is refined on
64-pixel images and one of 0.6 M on digits. The authors expect the benefit of several heads, and much of the drop behind the
peak, only from about 300 M parameters on. Agreement at this scale does not prove theirs, and disagreement does not refute them.
"""

NATURAL = """
## Natural images, preset `{preset}`

{models} ({blocks} blocks, width {dim}, patch {patch}), pre-trained on {data}'s training images at {size} px without labels:
{epochs}. {weak}Recipes were set beforehand and not tuned; features are computed in bfloat16. One pre-training per model; ± is
the standard deviation over seeds of refinement, and all models meet the same probes (orders, draws of labelled images, starts
of k-means). *{data}*: {n_test} validation images, which no model and no choice has seen, classified with {n_train} training
images; *fruit64*: photos of {kinds} kinds of fruit, a data set the models were not trained on. Accuracies in %; linear,
few-shot and clusters of the last block's cls token; *within a kind*: k-NN of that token where only photos of the same kind
(pears, melons, apples, citrus fruit) vote, so that fine differences decide. The best block is the best on these test images,
for orientation; the claims use a block chosen on validation images of the same data set. Refined models are weight averages
(EMA), the others are not. Raw pixels are those of images shrunk to 32 px. The labels' control has seen the labels of the images
that vote. Compare a model with random weights before reading its claims: where the two are alike, it has not learnt enough to
say anything. Device:
{device}.
"""
ABLATIONS = """k-NN accuracy (%) of the last block's cls token. The variants of one seed are exploratory: they say which would be
worth more seeds, and nothing else. What they change is in `mimrefiner/ablations.py`.

"""
CHOICE = """One seed; k-NN of the last block's cls token, share of images. The measurements above are those of the preset's rate,
{rate:g}.

"""
WEAK = "Epochs are what a few hours of two CPU cores allow: they are weak models. "


def models_table(rows: pd.DataFrame, dataset: str) -> pd.DataFrame:
    """Per model: k-NN of the last and the best block for both poolings, linear probe, few-shot and clusters of the last block."""
    rows = rows[rows["dataset"] == dataset]
    table = []
    for model, part in rows.groupby("model", sort=False):
        last = part["block"].max()

        def value(protocol, pools=("cls", "pixels"), metric="accuracy", part=part, last=last):
            chosen = part[part["protocol"].str.startswith(protocol) & (part["metric"] == metric) & part["pool"].isin(pools)]
            chosen = chosen[chosen["block"] == last]
            return mean_sd(chosen["value"]) if len(chosen) else ""

        def best(pool, part=part, last=last):
            knn = part[(part["protocol"] == KNN_PROTOCOL) & (part["pool"] == pool)].groupby("block")["value"].mean()
            return f"{100 * knn.max():.1f} (block {knn.idxmax() + 1} of {last + 1})" if len(knn) else ""

        table.append({
            "model": model, "seeds": part["seed"].nunique(), "k-NN cls, last block": value(KNN_PROTOCOL), "best block": best("cls"),
            "k-NN patch mean, last block": value(KNN_PROTOCOL, ("mean",)), "its best block": best("mean"),
            "k-NN within a kind": value(WITHIN_PROTOCOL),
            "linear": value("linear"), "1-shot": value("logistic_1shot"), "5-shot": value("logistic_5shot"),
            "clusters ACC": value("kmeans", metric="ACC"),
        })  # fmt: skip
    table = pd.DataFrame(table)
    return table.loc[:, (table != "").any()]  # a data set may lack a probe


def natural_section(name: str) -> str:
    """What was measured with one preset of natural images; "" where nothing was."""
    if not (ASSETS / f"evidence_{name}.csv").is_file():
        return ""
    rows, claims, facts = (pd.read_csv(ASSETS / f"evidence_{name}{part}.csv") for part in ("", "_claims", "_training"))
    preset = load_preset(name)
    first, trained = rows[rows["protocol"] == KNN_PROTOCOL].iloc[0], facts[facts["training"] == "pre-training"]
    vit = preset.encoder
    text = NATURAL.format(
        preset=name, blocks=vit.depth, dim=vit.dim, patch=vit.patch_size, size=vit.image_size,
        models=" and ".join(trained["model"]),
        epochs=", ".join(f"{count(round(f.epochs), 'epoch')} of {f.model}" for f in trained.itertuples()),
        weak=WEAK if name == "natural" else "", data=first.dataset, n_train=f"{first.n_train:,}", n_test=f"{first.n_test:,}",
        kinds=len(load_dataset("fruit64", split="test").classes), device=", ".join(rows["device"].unique()),
    )  # fmt: skip
    parts = [text]
    for dataset in rows["dataset"].unique():
        parts.append(f"\n### {dataset}\n\n{markdown_table(models_table(rows, dataset))}")
    note = "Wall time is that of a machine that did other work too; the computation is counted.\n\n"
    if (ASSETS / f"evidence_{name}_choice.csv").is_file():
        table = pd.read_csv(ASSETS / f"evidence_{name}_choice.csv").drop(columns=["preset", "weights_sha256"])
        parts.append(
            "\n### The learning rate of stage 3, on validation images\n\n"
            + CHOICE.format(rate=preset.refine.refine_base_lr)
            + markdown_table(table)
        )
    parts.append(
        "\n### What was trained\n\n" + note + markdown_table(facts.assign(weights_sha256=facts["weights_sha256"].str[:12]))
    )
    about = claims["claim"].str.extract(r"^(?P<text>.*) \((?P<about>[^()]*)\)$")
    for where, part in claims.assign(claim=about["text"]).groupby(about["about"], sort=False):
        parts.append(f"\n### Claims: {where}\n\n" + markdown_table(claims_table(part).drop(columns="notebook")))
    return "".join(parts)


def ablations_table(preset: str) -> pd.DataFrame:
    """Every variant's last block, cls token, and what it has more than the recipe of the same seed, in points."""
    rows = committed_rows(preset)
    rows = rows[(rows["pool"] == "cls") & (rows["block"] == rows["block"].max())]
    values = rows.pivot(index="seed", columns="model", values="value")[list(dict.fromkeys(rows["model"]))]
    recipe = next(name for name in values if name.startswith("recipe"))
    gains = 100 * values.sub(values[recipe], axis=0)
    return pd.DataFrame([
        {
            "variant": name, "seeds": values[name].count(), "last block": mean_sd(values[name].dropna()),
            "minus the recipe, by seed": "" if name == recipe else ", ".join(f"{x:+.1f}" for x in gains[name].dropna()),
        }
        for name in values
    ])  # fmt: skip


def page() -> str:
    """The page as Markdown."""
    toy = "\n## The toy: digits\n\nA ViT of 0.6 M parameters, preset `tiny`, as drawn in `figures/`.\n\n"
    claims = (ROOT / "figures" / "claims.md").read_text()
    parts = [HEAD, *(natural_section(name) for name in ("natural", "natural-gpu")), toy, claims]
    for preset, data in (("tiny", "digits"), ("fashion", "Fashion-MNIST")):
        parts += [f"\n## Ablations: {data}\n\n", ABLATIONS if preset == "tiny" else "", markdown_table(ablations_table(preset))]
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"{PAGE.name} written")
