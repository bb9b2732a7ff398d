"""Does refinement hurt or help fine-tuning? 1, 10 and 100 % of the labels, before and after it.

Every model is fine-tuned with crops, flips and label smoothing, as the paper does with few labels,
at several learning rates; the rate is chosen on validation images with the first seed, for every
model and share alike, and the last epoch is tested. Runs that are done are not done again
(``python -m experiments.finetuning --help``); rows lie beside this file in ``finetuning.csv``.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from torch import nn

from mimrefiner.data.datasets import ImageDataset, load_dataset
from mimrefiner.data.subsets import amount_text, few_labels
from mimrefiner.errors import InputError
from mimrefiner.files import write_csv
from mimrefiner.models.encoders import load_encoder, random_twin
from mimrefiner.notices import show_notices
from mimrefiner.study.figures import PALETTE, save_figure, use_style
from mimrefiner.training.finetune import finetune_into, finetune_recipe
from mimrefiner.training.recipes import P1_L16, FinetuneRecipe

HERE = Path(__file__).parent
BEFORE, AFTER, RANDOM = "before refinement", "after refinement", "random weights"


@dataclass(frozen=True)
class Study:
    """What is compared.

    Attributes:
        before, after: anything that load_encoder takes.
        data: data set by name or path.
        shares: of the training images that have a label.
        seeds: draw the labelled images, and everything in training.
        rates: base learning rates, of which validation images choose one.
        steps: of every training, at least, whatever the share: few labels need more epochs.
        epochs: at least so many.
        batch_size: at most; half of the images where there are fewer.
        out: a folder for every run.
    """

    before: str = "mae_tiny_64"
    after: str = "mae_tiny_64_refined"
    data: str = "fruit64"
    shares: tuple[float, ...] = (0.01, 0.1, 1.0)
    seeds: tuple[int, ...] = (0, 1, 2)
    rates: tuple[float, ...] = (1e-3, 4e-3, 1.6e-2)
    steps: int = 400
    epochs: int = 30
    batch_size: int = 64
    out: Path = Path("runs/finetuning")


def measure(study: Study) -> pd.DataFrame:
    """One row per model, share and seed: accuracy on test images at the rate that was chosen.

    Columns are model, share, seed, base_lr, val (of that rate, with the first seed), test (both are
    shares of right answers), n_train, n_test and images.
    """
    encoder = load_encoder(study.before)
    models = {BEFORE: encoder, AFTER: load_encoder(study.after), RANDOM: random_twin(encoder)}
    sets = {split: load_dataset(study.data, split=split) for split in ("train", "val", "test")}
    rows = []
    for model in models.items():
        for share in study.shares:
            val = {
                rate: tuned(study, model, sets, "val", share, rate, study.seeds[0])["value"]
                for rate in study.rates
            }
            best = max(val, key=val.get)
            for seed in study.seeds:
                result = tuned(study, model, sets, "test", share, best, seed)
                known = {"model": model[0], "share": share, "seed": seed, "base_lr": best}
                known |= {"val": val[best], "test": result["value"]}
                rows.append(known | result[["n_train", "n_test", "images"]].to_dict())
    return pd.DataFrame(rows)


def tuned(
    study: Study,
    model: tuple[str, nn.Module],
    sets: dict[str, ImageDataset],
    split: str,
    share: float,
    rate: float,
    seed: int,
) -> pd.Series:
    """What one training, which is done or read, gives on ``split`` after its last epoch.

    Trainings that choose the rate and those that count are apart, so that nothing has to be tested
    after every epoch, of which there are many where images are few.
    """
    (name, encoder), images = model, sets["train"]
    if share < 1:
        images = few_labels(images, share, seed=seed)
    recipe = replace(recipe_of(study, len(images)), base_lr=rate, seed=seed)
    out = study.out / f"{name.replace(' ', '_')}-{share:g}-lr{rate:g}-seed{seed}-{split}"
    finetune_into(out, partial(finetune_recipe, encoder, images, sets[split], recipe), resume=True)
    return pd.read_csv(out / "rows.csv").iloc[0]


def recipe_of(study: Study, images: int) -> FinetuneRecipe:
    """The paper's recipe for few labels, as long and with such batches as the images allow."""
    batch = max(2, min(study.batch_size, images // 2))
    per_epoch = images // batch
    epochs = max(study.epochs, -(-study.steps // per_epoch))
    return replace(
        P1_L16, name="study", batch_size=batch, epochs=epochs, warmup_epochs=max(1, epochs // 10)
    )


def draw(rows: pd.DataFrame) -> Figure:
    """Accuracy over the share of labels: the mean of all seeds, and each seed as a dot."""
    use_style()
    figure, axes = plt.subplots(figsize=(4, 2.8), layout="constrained")
    shares = sorted(rows["share"].unique())
    models = [name for name in (AFTER, BEFORE, RANDOM) if name in set(rows["model"])]
    for name, colour in zip(models, sns.color_palette(PALETTE, len(models)), strict=True):
        part = rows[rows["model"] == name]
        mean = 100 * part.groupby("share")["test"].mean()
        axes.plot(range(len(shares)), mean[shares], color=colour, label=name)
        places = [shares.index(share) for share in part["share"]]
        axes.plot(places, 100 * part["test"], "o", color=colour, alpha=0.5, markersize=3)
    counts = rows.groupby("share")["n_train"].first()
    labels = [
        f"{amount_text(share) if share < 1 else '100 %'}\n{counts[share]} images"
        for share in shares
    ]
    axes.set_xticks(range(len(shares)), labels)
    axes.set(xlabel="training images with a label", ylabel="accuracy after fine-tuning, %")
    axes.set_title("Fine-tuning before and after refinement", loc="left")
    axes.legend()
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    show_notices()
    parser = argparse.ArgumentParser(
        "python -m experiments.finetuning", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--before", default=Study.before)
    parser.add_argument("--after", default=Study.after)
    parser.add_argument("--data", default=Study.data)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--shares", default="0.01,0.1,1")
    parser.add_argument("--rates", default="1e-3,4e-3,1.6e-2", help="base learning rates")
    parser.add_argument("--steps", type=int, default=Study.steps, help="at least, of each training")
    parser.add_argument("--epochs", type=int, default=Study.epochs, help="at least")
    parser.add_argument("--out", type=Path, default=Study.out, help="a folder for every run")
    parser.add_argument("--rows", type=Path, default=HERE / "finetuning.csv")
    parser.add_argument("--figure", type=Path, help="without ending (default: none)")
    args = parser.parse_args(arguments)
    try:
        study = Study(
            before=args.before,
            after=args.after,
            data=args.data,
            shares=tuple(float(x) for x in args.shares.split(",")),
            seeds=tuple(int(x) for x in args.seeds.split(",")),
            rates=tuple(float(x) for x in args.rates.split(",")),
            steps=args.steps,
            epochs=args.epochs,
            out=args.out,
        )
    except ValueError as error:
        raise InputError(f"expected numbers with commas between: {error}") from error
    rows = measure(study)
    write_csv(rows, args.rows)
    summary = rows.groupby(["model", "share"])["test"].agg(["mean", "std"])
    print((100 * summary).round(1).to_string())
    if args.figure:
        save_figure(draw(rows), args.figure, rows)


if __name__ == "__main__":
    main()
