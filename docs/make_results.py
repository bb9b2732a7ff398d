"""Write the page of results: ``python docs/make_results.py``.

No measured number is typed in here. Run ``python docs/make_forest.py`` first, which draws the
picture that it shows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import make_forest
import pandas as pd
from make_forest import DIGITS, LIFTS, MAE, QUESTIONS, REAL, SIMMIM, Row

from experiments import measure
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
from mimrefiner.study.published import ablation_gains, experiments_folder, last_block
from mimrefiner.study.tables import count, markdown_table, mean_sd

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "results.md"

HEAD = """# Results

{summary}

{answers}

![Forest plot: differences with their intervals, by five questions](forest.svg)

In the picture a diamond is the mean difference, circles are seeds, and the colour is the verdict.
The table below has the headline claims among its lines. Every model behind it is small: the paper
refines models of 303 M to 1.9 B parameters on ImageNet-1K, while ours have 0.6 M (digits,
Fashion-MNIST), 5 M (Tiny-ImageNet after six epochs) and 22 M (the real encoder: a ViT-S/14 trained
by others). The authors expect much of the drop after the peak, and the benefit of several heads,
only from about 300 M parameters on. Agreement at this scale does not prove their results, and
disagreement does not refute them.

## Headline claims

{headlines}
Where images decide, the interval reaches from the lowest to the highest end of the seeds' own 95 %
intervals; elsewhere it is Student's t over seeds. This page is written by
`python docs/make_results.py` from the committed tables.

## Before you read on

[The rule of verdicts](verdicts.md) says how *seen*, *opposite*, *not seen* and *open* come about.
{caution}
"""
LAST, BEST = "of the last block", "the refined last block beats the best block before"
PHOTOS = {"dataset": "fruit64"}


@dataclass(frozen=True)
class Question:
    """A question that the page answers from claims.

    Attributes:
        asked: the question.
        rows: the claims that answer it.
        why: what is known of the reason, said where the answer is no plain yes.
        note: what else has to be known. In both, ``{names}`` are those of :func:`facts`.
    """

    asked: str
    rows: tuple[Row, ...]
    why: str = ""
    note: str = ""


PEAK, LIFT, LONG, NONE, PARTS = QUESTIONS.values()
ANSWERS = (
    Question(
        "Does the representation peak inside the network?",
        PEAK,
        "On digits the seeds differ a lot. For the MAE of Tiny-ImageNet validation images chose "
        "the last block itself; six epochs of pre-training are a possible reason.",
    ),
    Question("Does refinement lift the last block?", LIFT),
    Question(
        "Does it lift it above the best block before?",
        (
            Row("CIFAR-10 (a real ViT-S/14)", BEST, REAL),
            Row("CIFAR-10 (patch mean)", BEST, REAL | {"pool": "mean"}),
            Row("digits", BEST, DIGITS),
            Row("Tiny-ImageNet (SimMIM)", BEST, SIMMIM),
        ),
        "Refinement of the real encoder was short, 14,000 images; a longer one is not measured.",
    ),
    Question(
        "Does it beat the same computation spent on more pre-training?",
        LONG,
        "After six epochs on Tiny-ImageNet, more masking helps the patch mean more than refinement "
        "does; by the cls token no difference is seen. It takes the ViT-S/14's last block down to "
        "{masked} %: painting is what its last blocks are spoiled by, as far as we know.",
    ),
    Question(
        "Does it beat the same objective from random weights, at the same total computation?",
        (Row("digits", "masked pre-training and refinement beat", DIGITS, pending=True),),
    ),
    Question(
        "Is the refined last block better than no training at all?",
        NONE,
        "Digits lie centred on a black background, where comparing pixels is hard to beat; kinds "
        "of fruit differ in colour, which random weights keep.",
    ),
    Question(
        "Does it help with one label per class?",
        (
            Row("CIFAR-10 (a real ViT-S/14)", f"refinement raises: 1-shot accuracy {LAST}", REAL),
            Row("digits", f"refinement raises 1-shot accuracy {LAST}", DIGITS),
            Row("Tiny-ImageNet (MAE)", f"refinement raises: 1-shot accuracy {LAST}", MAE),
        ),
        note="All are differences from the last block before. On CIFAR-10 block 11 had "
        "{shot_before} % before, against {shot_last} % of the refined last block; refined, block "
        "11 has {shot_refined} %, so not all of the gain has reached the end of the network.",
    ),
    Question(
        "Do clusters form (accuracy of k-means, no labels)?",
        (
            Row("CIFAR-10 (a real ViT-S/14)", f"refinement raises: cluster accuracy {LAST}", REAL),
            Row("digits", f"refinement raises ACC (x 100) {LAST}", DIGITS),
            Row("Tiny-ImageNet (MAE)", f"refinement raises: cluster accuracy {LAST}", MAE),
        ),
        note="On CIFAR-10 block 11 had {clusters_before} % before, against {clusters_last} % of "
        "the refined last block, and has {clusters_refined} % refined.",
    ),
    Question(
        "Which ingredients matter (digits)?",
        PARTS,
        "Lesson 08 computes how large a difference must be to be seen.",
    ),
    Question(
        "Does it transfer to photographs of fruit, which no model was refined on?",
        (
            Row("the real ViT-S/14", LIFTS, REAL | PHOTOS),
            Row("its patch mean", LIFTS, REAL | PHOTOS | {"pool": "mean"}),
            Row("the MAE of six epochs", LIFTS, MAE | PHOTOS),
            Row("the SimMIM of six epochs", LIFTS, SIMMIM | PHOTOS),
            Row("the real ViT-S/14 against its best block before", BEST, REAL | PHOTOS),
        ),
        "These kinds differ in colour more than in shape, and the views of refinement teach a "
        "model to overlook colour; that this is the reason is not shown.",
    ),
)
CAUTION = """Three things need care:

- Older claims (Tiny-ImageNet) show the interval of the mean over seeds. Where it excludes zero but
  the interval of a single seed does not, the verdict says *not in every seed*.
- A seed gives the same numbers again only on the same machine with the same libraries. The toy is
  small and its seeds differ a lot: an earlier run of the same three seeds lifted the last block
  on digits by 20.8 points (+22.3, +31.7, +8.3 by seed).
- No interval is corrected for the number of claims: of a hundred claims about single models, all
  without any effect, about five would still show an interval that excludes zero. Where three seeds
  must agree, such accidents are rarer, but the seeds share one pre-trained model and one set of
  test images. Look at the sizes of the differences, and at whether related claims agree."""

NATURAL = """{models} ({blocks} blocks, width {dim}, patch {patch}) were pre-trained without
labels on {data}'s training images at {size} px: {epochs}. {weak}{chosen} There is one
pre-training per model; ± is the standard deviation over seeds of refinement. All models are probed
alike (same orders, same draws of labelled images, same starts of k-means), on features in bfloat16.
Device: {device}.

- *{data}*: {n_test} validation images, which served no training and no choice, classified with
  {n_train} training images. *fruit64*: photos of {kinds} kinds of fruit; no model was trained on
  them.
- Accuracies are in %. Linear, few-shot (mean of {draws} draws of the labelled images) and
  clusters use the last block's cls token. *Within a kind*: only photos of the same kind (pears,
  melons, apples, citrus fruit) vote, so that fine differences decide.
- The tables show the best block on these test images, for orientation. The claims use a block
  chosen on held-out training images of {data}. This holds for claims about fruit64 too, whose own
  validation photos show the same piles of fruit as its training photos.
- Refined models are weight averages (EMA), the others are not. Raw pixels are those of images
  shrunk to 32 px. Random weights are one draw: if a model is no better than they are, it has
  learnt too little to tell us anything.
- *Fine-tuned with labels* spends the computation of refinement on training with labels. This model
  has seen the labels of the images that vote, and longer training could get more out of them.
"""
ABLATIONS = """k-NN accuracy (%) of the last block's cls token. Intervals are over seeds and test
images; on digits both sides are compared image by image. `experiments/ablations.py` lists what each
variant changes.

"""
TOY = "A ViT of 0.6 M parameters, preset `tiny`, as drawn in `figures/`.\n\n"
PHOTOGRAPHS = """The packaged `mae_tiny_64` and `mae_tiny_64_refined` on fruit64, as the
notebooks show them: half precision, one seed, and the best block chosen on fruit64's own
validation photos, which show the same piles of fruit as its training photos.

"""
CHOSEN = """Validation images chose the learning rate of stage 3 for the MAE (below); everything
else was set beforehand, including the rates for SimMIM's refinement and for the controls."""
CHOICE = """The MAE with one seed; a tenth of the training images was held out for the choice. The
values are k-NN accuracies (shares) of the last block's cls token. The preset takes the rate
{rate:g}, and so do the measurements above.

"""
TRAINED = "Wall times include other work on the same processor; the computation was counted."
WEAK = """The epochs are what a few hours of two CPU cores allow, so the models are weak. For the
same reason there are 2 + 4 views instead of the paper's 2 + 10, and only the MAE has controls.
Decoders of other depths, a deeper model, other data sets (CIFAR) and training with labels until it
converges were left out; preset `natural-gpu` has all of these but the last. """


STUDIES = {"real": "A real encoder on CIFAR-10", "cifar": "An MAE pre-trained on CIFAR-10"}
ABOUT = {
    "real": """A ViT-S/14 of the DINOv2 family that somebody trained further, with a decoder, to
find what is salient in a photograph. `experiments/real_encoder.py` says what is known of the file,
which is not part of this project. Refinement saw about 14,000 training images of CIFAR-10 at 98 px,
each at most once in a stage. The first six of
twelve blocks are frozen, and the last four have heads. All encoders are measured in half-precision
weights; raw pixels are those of images shrunk to 32 px.

![Test images laid out by the last block's cls token, before and after refinement](real_maps.png)

*UMAP of 2,000 test images (seed 0), of which as many are drawn as fit without overlap, so the two
panels show different ones. Neither refinement nor UMAP used a label; the colours of the frames are
the classes.*

The rate and the number of frozen blocks come from an earlier trial of 17 minutes, which was judged
on 1,500 of the 10,000 test images: until the grid on validation images (below) is finished, the
results may be slightly optimistic. The model *masked* is the control of equal computation: masked
pre-training (SimMIM) of the same blocks on the same images, with one seed, at a rate that is not
chosen on validation images yet. Rows are added as they are measured.

""",
    "cifar": "",
}


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


def folded(title: str, *parts: str) -> str:
    """A section that opens by a click, on the site and on GitHub."""
    inside = "".join(parts).strip()
    return f'\n<details markdown="1">\n<summary>{title}</summary>\n\n{inside}\n\n</details>\n'


def study_section(name: str) -> str:
    """Models, trainings and claims that ``experiments/collect.py`` wrote; "" where nothing is."""
    rows, claims = read(name), read(name, "_claims")
    if rows is None or claims is None:
        return ""
    parts = [f"\n## {STUDIES[name]}\n\n", ABOUT[name]]
    for dataset, part in rows.groupby("dataset", sort=False):
        n_train, n_test = (f"{part[column].max():,}" for column in ("n_train", "n_test"))
        title = f"All models on {dataset}: {n_test} test images, {n_train} that vote (%)"
        parts.append(folded(title, markdown_table(models_table(part))))
    facts = read(name, "_training")
    if facts is not None:
        shown = facts.assign(weights_sha256=facts["weights_sha256"].str[:12])
        parts.append(folded("What was trained", markdown_table(shown.drop(columns="settings"))))
    choice = read(name, "_choice")
    if choice is not None:
        last = choice[(choice["block"] == choice["block"].max()) & (choice["pool"] == "cls")]
        table = markdown_table(last.drop(columns=["weights_sha256", "git_sha"]))
        parts.append(folded("Validation images, on which settings are chosen", table))
    for where, part in (
        claims.astype(object).fillna("").groupby(["model", "dataset", "pool"], sort=False)
    ):
        title = f"Claims: {', '.join(filter(None, where))}"
        parts.append(folded(title, markdown_table(claims_table(part).drop(columns="notebook"))))
    return "".join(parts)


def natural_section(name: str) -> str:
    """What was measured with one preset of natural images; "" where nothing was."""
    rows, choice = read(name), read(name, "_choice")
    if rows is None:
        return ""
    text = natural_text(name, rows, is_chosen=choice is not None)
    parts = [f"\n## Natural images, preset `{name}`\n\n", text]
    for dataset, part in rows.groupby("dataset", sort=False):
        parts.append(folded(f"All models on {dataset}", markdown_table(models_table(part))))
    if choice is not None:
        rate = load_preset(name).refine.refine_base_lr
        table = markdown_table(choice.drop(columns=["preset", "weights_sha256"]))
        title = "The learning rate of stage 3, on validation images"
        parts.append(folded(title, CHOICE.format(rate=rate), table))
    facts = read(name, "_training")
    table = markdown_table(facts.assign(weights_sha256=facts["weights_sha256"].str[:12]))
    parts.append(folded("What was trained", f"{TRAINED}\n\n", table))
    claims = read(name, "_claims").fillna("")
    for where, part in claims.groupby(["model", "dataset", "pool"], sort=False):
        table = claims_table(part).drop(columns="notebook")
        parts.append(folded(f"Claims: {', '.join(filter(None, where))}", markdown_table(table)))
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
    """Every variant's last block, cls token, and what the recipe has more than it."""
    values, gains = last_block(preset), ablation_gains(preset)
    rows = []
    for name in values:
        row = {
            "variant": name,
            "seeds": values[name].count(),
            "last block": mean_sd(values[name].dropna()),
        }
        points = {"recipe minus variant": "", "95 % interval": "", "by seed": ""}
        if name in gains:
            found = gains[name].columns()
            points["recipe minus variant"] = f"{found['difference']:+.1f}"
            if found["low"] is not None:
                points["95 % interval"] = f"{found['low']:+.1f} to {found['high']:+.1f}"
            points["by seed"] = ", ".join(f"{100 * x:+.1f}" for x in gains[name].by_seed)
        rows.append({**row, **points})
    return pd.DataFrame(rows)


def answers(claims: Sequence[dict[str, str]]) -> list[str]:
    """The questions in bold, each with its answer, its reason and its note."""
    said, known = [], facts()
    for question in ANSWERS:
        text = f"**{question.asked}** {make_forest.full_answer(claims, question.rows)}"
        found = make_forest.find(claims, {"": question.rows})
        if question.why and not all(row.verdict == "seen" for row in found):
            text += f" {question.why.format(**known)}"
        said.append(f"{text} {question.note.format(**known)}".strip())
    return said


def facts() -> dict[str, str]:
    """Percentages of the real encoder's block 11, its best one before, and of its last block."""
    rows = read("real")
    rows = rows[(rows["dataset"] == "cifar10") & (rows["pool"] == "cls")]
    known = {}
    for name, protocol in (("shot", low_shot(1)), ("clusters", KMEANS)):
        asked = (rows["protocol"] == protocol.name) & (rows["metric"] == protocol.metrics[0])
        means = 100 * rows[asked].pivot_table("value", "block", "model")
        values = {"before": means.loc[10, "before"], "refined": means.loc[10, "refined"]}
        values["last"] = means.loc[11, "refined"]
        known |= {f"{name}_{what}": f"{value:.1f}" for what, value in values.items()}
    votes = rows[(rows["protocol"] == KNN.name) & (rows["block"] == rows["block"].max())]
    masked = votes.loc[votes["model"] == "masked", "value"].mean()
    return known | {"masked": f"{100 * masked:.1f}"}


def notebook_claims(dataset: str) -> str:
    """The published claims of the notebooks about one data set, as a table."""
    claims = pd.read_csv(ROOT / "figures" / "claims.csv")
    return markdown_table(claims_table(claims[claims["dataset"] == dataset]))


def headlines(claims: Sequence[dict[str, str]]) -> str:
    """The headline claims of the picture as a table; a question stands at its first one."""
    rows, asked = [], set()
    for found in make_forest.find(claims):
        if found.row.headline:
            question = "" if found.question in asked else found.question
            asked.add(found.question)
            mean, low, high = map(
                make_forest.points, map(found.number, ("difference", "low", "high"))
            )
            of_row = {"question": question, "on": found.row.label, "points": mean}
            of_row |= {"95 % interval": f"{low} to {high}", "verdict": found.full_verdict}
            images = f"{int(found.claim['n_test']):,}"
            rows.append({**of_row, "seeds": found.claim["n_seeds"], "test images": images})
    return markdown_table(pd.DataFrame(rows))


def page() -> str:
    """The page as Markdown."""
    claims = make_forest.read_claims()
    head = HEAD.format(
        summary=make_forest.summary(claims),
        answers="\n\n".join(answers(claims)),
        headlines=headlines(claims),
        caution=CAUTION,
    )
    parts = [head, *(study_section(name) for name in STUDIES)]
    parts += [natural_section(name) for name in ("natural", "natural-gpu")]
    parts += ["\n## The toys, and photographs in the notebooks\n"]
    parts += [folded("Claims: digits", TOY, notebook_claims("digits"))]
    parts += [folded("Claims: photographs", PHOTOGRAPHS, notebook_claims("fruit64"))]
    parts += ["\n## Ablations\n\n", ABLATIONS.strip(), "\n"]
    parts += [folded("Digits", markdown_table(ablations_table("tiny")))]
    fashion = markdown_table(ablations_table("fashion"))
    parts += [folded("Fashion-MNIST", fashion, "\n", notebook_claims("fashion_mnist"))]
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE.name} is written")
