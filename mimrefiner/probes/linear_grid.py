"""The paper's linear probe: many probes on a frozen encoder, trained together on augmented images.

Inputs are the last block after the final LayerNorm ("cls", "mean", "cls+mean") and the raw last
four blocks side by side ("cls_last4" and so on); each with every learning rate is one probe. Every
batch passes the encoder once. (``src/utils/processors/probe_processor.py`` of the released code.)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from mimrefiner import distributed
from mimrefiner.data.augment import plain_views
from mimrefiner.data.datasets import data_hash, stratified_split
from mimrefiner.data.labelled import Transformed
from mimrefiner.device import autocast, device_of, frozen, full_float32
from mimrefiner.errors import InputError
from mimrefiner.files import write_csv
from mimrefiner.models.blocks import block_modules, depth_of, hooked
from mimrefiner.models.pools import check_pools
from mimrefiner.models.tokens import input_size, split_tokens
from mimrefiner.probes.checks import tidy
from mimrefiner.probes.features import parse_pool
from mimrefiner.probes.linear import LEARNING_RATES, LESS, JointProbes
from mimrefiner.progress import progress
from mimrefiner.training.checkpoints import Saving
from mimrefiner.training.finetune import count_classes
from mimrefiner.training.memory import advice_on_memory
from mimrefiner.training.optim import LabelledStage, stage_steps
from mimrefiner.training.run import TrainingRun, run_into, run_settings, sigterm_stops
from mimrefiner.training.testing import preparation

ROWS_FILE, PROBES_FILE = "rows.csv", "probes.csv"
ON_VAL, ON_TEST = "best on validation", "best on test, as in the paper"


@dataclass(frozen=True)
class LinearRecipe:
    """A grid of linear probes.

    The defaults are the paper's on ImageNet-1K (``y/eval/probe/``): 52 probes.

    Attributes:
        name: what rows of results call it.
        source: where it is written.
        learning_rates: base rates; the rate used is times batch_size / 256.
        inputs: what probes read: "cls", "mean" or "cls+mean", of the last block after the final
            LayerNorm, or with "_lastN" of the last N blocks, raw.
        epochs, batch_size: as long as the training lasts; a batch is at most the training set.
        momentum: of SGD, which has no weight decay.
        warmup_share: share of the steps in which rates rise.
        min_lr: where the cosine ends, for every probe.
        crop_scale, flip: of the training images' random resized crops.
        weight_std: of the first weights (truncated normal).
        squeeze: test images are squeezed into a square, not cropped.
        seed: draws weights, order and crops, and what is held out.

    >>> len(IN1K.inputs) * len(IN1K.learning_rates), len(INAT18.inputs) * len(INAT18.learning_rates)
    (52, 8)
    """

    name: str = "linear_grid"
    source: str = "y/eval/probe/"
    learning_rates: tuple[float, ...] = LEARNING_RATES
    inputs: tuple[str, ...] = ("cls", "cls+mean", "cls_last4", "cls+mean_last4")
    epochs: float = 50
    batch_size: int = 1024
    momentum: float = 0.9
    warmup_share: float = 0.1
    min_lr: float = 1e-6
    crop_scale: tuple[float, float] = (0.08, 1.0)
    flip: bool = True
    weight_std: float = 0.01
    squeeze: bool = False
    seed: int = 0

    def __post_init__(self):
        if not self.learning_rates or not all(rate > 0 for rate in self.learning_rates):
            raise InputError(f"learning rates must be > 0, got {list(self.learning_rates)}")
        if not self.inputs:
            raise InputError("expected one or more inputs such as cls, got none")
        for kind in self.inputs:
            parse_pool(kind)
        if not 0 < self.epochs < math.inf or self.batch_size < 2:
            raise InputError(
                "expected finite epochs > 0 and batch_size >= 2, "
                f"got {self.epochs}, {self.batch_size}"
            )


IN1K = LinearRecipe()
PATCHES = replace(IN1K, name="linear_grid_patches", inputs=("mean", "mean_last4"))  # I-JEPA
INAT18 = LinearRecipe(
    "linear_grid_inat18",
    "y/eval/probe_transfer/inat18/",
    learning_rates=(1e-3, 2e-3, 5e-3, 1e-2),
    inputs=("cls_last4", "cls+mean_last4"),
    batch_size=256,
)
INAT18_1SHOT = replace(
    IN1K, name="linear_grid_inat18_1shot", source="y/eval/probe_transfer/inat_1shot/"
)
RECIPES = {"in1k": IN1K, "patches": PATCHES, "inat18": INAT18, "inat18_1shot": INAT18_1SHOT}


@dataclass
class LinearGrid:
    """What :func:`linear_grid` gives.

    Attributes:
        rows: results, one per input, "chosen" for the best of all, for every way to choose;
            columns as :data:`mimrefiner.probes.checks.COLUMNS` and ``images``.
        probes: one row per epoch and probe: input, learning_rate, val, test.
        seconds: wall time.
    """

    rows: pd.DataFrame
    probes: pd.DataFrame
    seconds: float


def linear_grid(
    encoder: nn.Module,
    train: Dataset,
    test: Dataset,
    recipe: LinearRecipe = IN1K,
    *,
    val: Dataset | None = None,
    best_on_test: bool = False,
    device: torch.device | str | None = None,
    num_workers: int = 0,
    saving: Saving | None = None,
) -> LinearGrid:
    """Train the probes of ``recipe`` on a frozen encoder and report the best.

    The probe and its epoch are chosen on ``val`` and tested; with ``best_on_test`` they are chosen
    on the test images themselves, as the paper does, in rows that say so.

    Args:
        encoder: a timm ViT.
        train, test: map-style, (image, label), with ``labels``.
        recipe: the grid.
        val: images to choose on. None holds out a tenth of ``train``, the same share of every
            class, or with ``best_on_test`` nothing.
        best_on_test: report the paper's maximum over probes and epochs on ``test``.
        device: where to train; None takes a GPU where there is one.
        num_workers: processes that load images.
        saving: checkpoints and resuming; None for none.

    Raises:
        InputError: labels missing or out of range, no test images, cls of a model without cls
            token, more blocks than the model has.
        mimrefiner.errors.Stopped: SIGTERM came.

    >>> import mimrefiner as mr
    >>> train, test = (mr.load_dataset("digits", split=s).take(32) for s in ("train", "test"))
    >>> recipe = replace(IN1K, epochs=1, batch_size=16, inputs=("cls",), learning_rates=(0.1, 0.2))
    >>> result = linear_grid(mr.build_vit(mr.ViTConfig(dim=16, depth=2)), train, test, recipe)
    >>> result.rows["pool"].tolist(), len(result.probes)
    (['cls', 'chosen'], 2)
    """
    if val is None and not best_on_test:
        train, val = _hold_out(train, recipe.seed)
    sets = {"train": train, "test": test} | ({} if val is None else {"val": val})
    classes = count_classes(sets)
    _check_inputs(encoder, recipe)
    device = device_of(device)
    settings = partial(grid_settings, encoder, recipe, sets, best_on_test)
    recipe = replace(recipe, batch_size=min(recipe.batch_size, len(train)))
    with frozen(encoder, device), advice_on_memory(LESS):
        probes = GridProbes(encoder, classes, recipe)
        tested = {name: data for name, data in sets.items() if name != "train"}
        monitor = _Accuracies(tested, recipe, num_workers)
        run = TrainingRun(saving, settings, num_workers=num_workers, monitor=monitor)
        _train(probes, train, recipe, run)
    table = _table(run.epochs, recipe)
    rows = _rows(table, depth_of(encoder) - 1, recipe, sets, best_on_test)
    return LinearGrid(rows, table, run.seconds)


def grid_settings(
    encoder: nn.Module, recipe: LinearRecipe, sets: dict[str, Dataset], best_on_test: bool
) -> dict:
    """What a resumed run must share with the interrupted one."""
    others = {name: data_hash(dataset) for name, dataset in sets.items() if name != "train"}
    settings = run_settings(recipe, sets["train"], encoder)
    return {**settings, "tested on": others, "best on test": best_on_test}


def linear_grid_into(
    out: Path, train: partial, *, save_every: int = 500, resume: bool = False
) -> None:
    """Probe and write ``rows.csv``, ``probes.csv`` and a manifest to ``out``, unless it is done.

    Args:
        out: the folder; until it is done checkpoints lie in ``out/checkpoints``.
        train: ``linear_grid`` of (encoder, train, test, recipe) and keywords, to be called with
            ``saving``.
        save_every, resume: see :func:`mimrefiner.training.run.train_into`.
    """
    encoder, images, test, recipe = train.args
    sets = {"train": images, "test": test, "val": train.keywords.get("val")}
    sets = {name: dataset for name, dataset in sets.items() if dataset is not None}
    settings = grid_settings(encoder, recipe, sets, train.keywords.get("best_on_test", False))

    def write(result: LinearGrid, folder: Path) -> tuple[list[Path], dict]:
        write_csv(result.rows, folder / ROWS_FILE)
        write_csv(result.probes, folder / PROBES_FILE)
        return [folder / ROWS_FILE, folder / PROBES_FILE], {"seconds": result.seconds}

    run_into(out, settings, train, write, save_every=save_every, resume=resume)


def _hold_out(train: Dataset, seed: int) -> tuple[Dataset, Dataset]:
    """(rest, held out): a tenth of the images is held out."""
    labels = getattr(train, "labels", None)
    if not hasattr(train, "subset") or labels is None:
        raise InputError("a linear probe chooses on validation images: give val=")
    held, rest = stratified_split(labels, len(train), max(1, round(0.1 * len(train))), seed)
    return train.subset(rest), train.subset(held)


def _check_inputs(encoder: nn.Module, recipe: LinearRecipe) -> None:
    check_pools(encoder, sorted({part for kind in recipe.inputs for part in parse_pool(kind)[0]}))
    deepest = max(parse_pool(kind)[1] for kind in recipe.inputs)
    if deepest > depth_of(encoder):
        raise InputError(
            f"the probe reads the last {deepest} blocks, and the model has {depth_of(encoder)}"
        )


def input_features(encoder: nn.Module, images: Tensor, inputs: Sequence[str]) -> dict[str, Tensor]:
    """What the probes read, name -> (batch, dim), float32.

    Args:
        encoder: a timm ViT.
        images: normalised, (batch, 3, height, width).
        inputs: see :class:`LinearRecipe`.
    """
    deepest = max(parse_pool(kind)[1] for kind in inputs)
    raw: list[dict[str, Tensor]] = []

    def pooled(output) -> dict[str, Tensor]:
        cls, patches = split_tokens(encoder, output, images)
        found = {"mean": patches.mean(1)}
        # A view of the cls token would keep all tokens alive
        return found if cls is None else found | {"cls": cls.clone()}

    def keep(i: int, module: nn.Module, given, output) -> None:
        raw.append(pooled(output))

    with hooked(list(block_modules(encoder))[-deepest:], keep):
        final = pooled(encoder.forward_features(images))
    found = {}
    for kind in inputs:
        parts, last = parse_pool(kind)
        blocks = [final] if last == 1 else raw[-last:]
        found[kind] = torch.cat([block[part] for block in blocks for part in parts], -1).float()
    return found


class GridProbes(nn.Module):
    """All probes of a grid, and the frozen encoder that they read.

    The probes of one input share a batch norm without affine parameters. Checkpoints hold the
    probes alone.

    Args:
        encoder: it is not trained.
        classes: how many there are.
        recipe: the grid; its batch size scales the rates.
    """

    def __init__(self, encoder: nn.Module, classes: int, recipe: LinearRecipe):
        super().__init__()
        self.encoder, self.recipe = encoder, recipe
        device = next(encoder.parameters()).device
        size = input_size(encoder)[-1]
        shown = torch.zeros(1, 3, size, size, device=device)
        rates = torch.tensor(recipe.learning_rates) * recipe.batch_size / 256
        how = {"seed": recipe.seed, "momentum": recipe.momentum, "std": recipe.weight_std}
        with torch.no_grad():
            widths = {
                kind: x.shape[1]
                for kind, x in input_features(encoder, shown, recipe.inputs).items()
            }
        self.probes = {
            kind: JointProbes(1, width, classes, rates, device=device, **how)
            for kind, width in widths.items()
        }

    def state_dict(self, *_, **__) -> dict[str, Tensor]:
        """The tensors of all probes, by name."""
        return {
            f"{kind}.{name}": x
            for kind, probes in self.probes.items()
            for name, x in probes.tensors().items()
        }

    def load_state_dict(self, state: dict[str, Tensor], *_, **__) -> None:
        """Take the tensors of :meth:`state_dict`."""
        with torch.no_grad():
            for name, x in self.state_dict().items():
                x.copy_(state[name])

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """What the probes read of normalised images."""
        device = images.device
        with torch.no_grad(), autocast(device, self.encoder), full_float32():
            return input_features(self.encoder, images, self.recipe.inputs)

    def step(self, x: dict[str, Tensor], y: Tensor, share: float, rising: bool) -> Tensor:
        """One step of every probe; their mean loss ().

        Args:
            x: input -> (batch, dim).
            y: class indices, (batch,).
            share: of the peak rates in warm-up, of what lies above ``min_lr`` afterwards.
            rising: whether it is warm-up.
        """
        losses = []
        for kind, probes in self.probes.items():
            low = 0.0 if rising else (1 - share) * self.recipe.min_lr / probes.rates
            losses.append(probes.step(x[kind][None], y, share + low) / len(probes.rates))
        return torch.stack(losses).mean()

    @torch.no_grad()
    def right(self, x: dict[str, Tensor], y: Tensor) -> Tensor:
        """How many images every probe gets right, (inputs, rates)."""
        return torch.stack(
            [probes.right(x[kind][None], y)[0].sum(-1) for kind, probes in self.probes.items()]
        )


def _train(probes: GridProbes, train: Dataset, recipe: LinearRecipe, run: TrainingRun) -> None:
    steps = stage_steps(len(train), recipe.batch_size, recipe.epochs)
    stage = LabelledStage(
        number=1,
        steps=steps,
        images=len(train) // recipe.batch_size * recipe.batch_size,
        batch_size=recipe.batch_size,
        warmup=recipe.warmup_share * steps,
        base_lr=256 / recipe.batch_size,  # shares of the probes' own rates
        min_lr=0.0,
    )
    run.begin(stage, probes=probes)
    size = input_size(probes.encoder)[-1]
    views = plain_views(size, recipe.crop_scale, recipe.flip)
    with sigterm_stops():
        for step, ((images,), _, label) in run.steps("linear probes", train, views, recipe.seed):
            x = {kind: distributed.gather(f) for kind, f in probes.features(images).items()}
            rising = step < int(stage.warmup)
            loss = probes.step(x, distributed.gather(label), run.lr, rising)
            run.end_step(step, loss.nan_to_num(posinf=1e9))  # a probe that diverges stops none


class _Accuracies:
    """Measures every probe at the end of every epoch, on features that are extracted once.

    Args:
        sets: name -> data set.
        recipe: the grid.
        num_workers: processes that load images.
    """

    def __init__(self, sets: dict[str, Dataset], recipe: LinearRecipe, num_workers: int):
        self.sets, self.recipe, self.num_workers = sets, recipe, num_workers
        self.found: dict[str, list[tuple[dict[str, Tensor], Tensor]]] = {}

    def __call__(self, probes: GridProbes, epochs: list[dict]) -> None:
        device = next(probes.encoder.parameters()).device
        for name, dataset in self.sets.items():
            if name not in self.found:
                self.found[name] = self._features(probes, dataset, name)
            hits = torch.zeros(len(probes.probes), len(self.recipe.learning_rates))
            for x, y in self.found[name]:
                x = {kind: part.to(device) for kind, part in x.items()}
                hits += probes.right(x, y.to(device)).cpu()
            hits = distributed.mean(hits.to(device)).cpu() * distributed.world()
            epochs[-1][name] = (hits / len(dataset)).flatten().tolist()

    def _features(self, probes: GridProbes, dataset: Dataset, name: str) -> list:
        device = next(probes.encoder.parameters()).device
        rows = range(distributed.rank(), len(dataset), distributed.world())
        images = Transformed(dataset, preparation(probes.encoder, self.recipe.squeeze))
        loader = DataLoader(
            Subset(images, rows), 256, num_workers=self.num_workers, generator=torch.Generator()
        )
        found = []
        for x, y in progress(loader, f"features of {name} images", unit="batch"):
            kept = probes.features(x.to(device))
            found.append(({kind: part.cpu() for kind, part in kept.items()}, y))
        return found


def _table(epochs: list[dict], recipe: LinearRecipe) -> pd.DataFrame:
    """One row per epoch and probe."""
    grid = [(kind, rate) for kind in recipe.inputs for rate in recipe.learning_rates]
    rows = [
        {
            "epoch": row["epoch"],
            "input": kind,
            "learning_rate": rate,
            "val": row["val"][i] if "val" in row else np.nan,
            "test": row["test"][i],
        }
        for row in epochs
        for i, (kind, rate) in enumerate(grid)
    ]
    return pd.DataFrame(rows)


def _rows(
    table: pd.DataFrame,
    block: int,
    recipe: LinearRecipe,
    sets: dict[str, Dataset],
    best_on_test: bool,
) -> pd.DataFrame:
    """The best probe of every input, and of all, for every way to choose."""
    common = {"block": block, "protocol": recipe.name, "metric": "accuracy", "seed": recipe.seed}
    common |= {"n_train": len(sets["train"]), "n_test": len(sets["test"])}
    ways = [("val", ON_VAL)] * ("val" in sets) + [("test", ON_TEST)] * best_on_test
    rows = []
    for column, words in ways:
        for pool in (*recipe.inputs, "chosen"):
            part = table if pool == "chosen" else table[table["input"] == pool]
            best = part.loc[part[column].idxmax()]
            which = f"{best['input']} " * (pool == "chosen") + f"lr={best['learning_rate']:g}"
            setting = f"{which}, epoch {best['epoch']:g}, {words}"
            rows.append({**common, "pool": pool, "value": best["test"], "setting": setting})
    return tidy(rows).assign(images=getattr(sets["train"], "drawn", "") or "all")
