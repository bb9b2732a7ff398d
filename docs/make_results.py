"""Write the page of results from the measured tables: ``python docs/make_results.py``. No number is typed in here."""

from pathlib import Path

import pandas as pd

from mimrefiner.results import KNN_PROTOCOL, claims_table, count, markdown_table, mean_sd

ROOT = Path(__file__).parent.parent
ASSETS = ROOT / "mimrefiner" / "assets"
PAGE = ROOT / "docs" / "results.md"

HEAD = """# Results

What was measured with this package, claim by claim. *Seen*: the 95 % interval of the difference lies above zero, or every seed
agrees; *opposite*: it lies below zero, or every seed disagrees; *not seen*: neither; *open*: one seed can not decide. This page is
written by `python docs/make_results.py` from the committed tables.

**How to read it.** The paper refines models of 303 M to 1.9 B parameters on ImageNet-1K; here a ViT of 5 M is refined on 64-pixel
images and one of 0.6 M on digits. The authors expect the benefit of several heads, and much of the drop behind the peak, only
from about 300 M parameters on. Agreement at this scale shows that the mechanism works, disagreement says nothing about theirs.
"""

NATURAL = """
## Natural images

MAE and SimMIM ViTs of 5 M parameters (12 blocks, width 192, patch 8), pre-trained on Tiny-ImageNet's training images at 64 px,
without labels, for as long as two CPU cores allow: {epochs}. They are weak models. Recipes were set beforehand and not tuned.
One pre-training per model; ± is the standard deviation over seeds of refinement. *tiny-imagenet*: {n_test} validation images,
which no model and no choice has seen, classified with {n_train} training images; *fruit64*: photos of 14 kinds of fruit, a data
set the models were not trained on. Accuracies of the cls token in %. The best block is the best on these test images, for
orientation; the claims use a block chosen on validation images. Compare a model with random weights before reading its claims:
where the two are alike, it has not learnt enough to say anything. Device: {device}.
"""


def models_table(rows: pd.DataFrame, dataset: str) -> pd.DataFrame:
    """Per model: k-NN of the last and the best block (cls), linear probe, few-shot and clusters of the last block."""
    rows = rows[(rows["dataset"] == dataset) & rows["pool"].isin(("cls", "pixels"))]
    table = []
    for model, part in rows.groupby("model", sort=False):
        knn = part[part["protocol"] == KNN_PROTOCOL]
        means, last = knn.groupby("block")["value"].mean(), knn["block"].max()

        def value(protocol, metric="accuracy", part=part, last=last):
            chosen = part[(part["protocol"] == protocol) & (part["metric"] == metric) & (part["block"] == last)]
            return mean_sd(chosen.groupby("seed")["value"].mean()) if len(chosen) else ""

        best = "" if model == "raw pixels" else f"{100 * means.max():.1f} (block {means.idxmax() + 1} of {last + 1})"
        table.append({
            "model": model, "seeds": part["seed"].nunique(), "k-NN, last block": value(KNN_PROTOCOL), "k-NN, best block": best,
            "linear, last": value("linear"), "1-shot, last": value("logistic_1shot"), "5-shot, last": value("logistic_5shot"),
            "clusters ACC, last": value("kmeans", "ACC"),
        })  # fmt: skip
    return pd.DataFrame(table)


def page() -> str:
    """The page as Markdown."""
    text = [HEAD]
    rows, claims = (pd.read_csv(ASSETS / f"evidence_natural{part}.csv") for part in ("", "_claims"))
    facts = pd.read_csv(ASSETS / "evidence_natural_training.csv")
    main = rows[rows["protocol"] == KNN_PROTOCOL].iloc[0]
    epochs = ", ".join(
        f"{count(round(f.epochs), 'epoch')} of {f.model}" for f in facts[facts["stage"] == "pre-training"].itertuples()
    )
    text.append(NATURAL.format(epochs=epochs, n_train=f"{main.n_train:,}", n_test=f"{main.n_test:,}", device=main.device))
    for dataset in rows["dataset"].unique():
        text.append(f"\n### {dataset}\n\n{markdown_table(models_table(rows, dataset))}")
    text.append("\n### What was trained\n\n" + markdown_table(facts))
    text.append("\n### Claims on natural images\n\n" + markdown_table(claims_table(claims).drop(columns="notebook")))
    toy = "\n## The toy: digits\n\nA ViT of 0.6 M parameters, preset `tiny`, three seeds; as drawn in `figures/`.\n\n"
    text.append(toy + (ROOT / "figures" / "claims.md").read_text())
    return "".join(text)


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"{PAGE.name} written")
