"""Fine-tuning with labels: by the paper's recipes, and as a control at refinement's cost.

:func:`finetune_recipe` trains an encoder and a classifier by one of
:mod:`mimrefiner.training.recipes` and tests them; :func:`finetune` spends the computation of
refinement on labels, with the settings of refinement.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from mimrefiner import distributed
from mimrefiner.config import RefineConfig
from mimrefiner.data.augment import plain_views
from mimrefiner.data.datasets import data_hash
from mimrefiner.data.labelled import Augmentation, Mixing, batch_seed, labelled_batches
from mimrefiner.device import autocast, device_of, plain_attention, to_device
from mimrefiner.errors import InputError
from mimrefiner.files import write_csv
from mimrefiner.models.blocks import depth_of
from mimrefiner.models.classifier import Head, ImageClassifier, save_classifier
from mimrefiner.models.encoders import normalisation
from mimrefiner.models.tokens import input_size
from mimrefiner.models.weights import warn_or_refuse
from mimrefiner.models.wrappers import in_float32
from mimrefiner.training import engine
from mimrefiner.training.checkpoints import Saving
from mimrefiner.training.cost import operation_counter
from mimrefiner.training.finetune_cost import warn_of_finetuning
from mimrefiner.training.memory import PLENTY, Memory, advice_on_memory, recomputed
from mimrefiner.training.optim import (
    LabelledStage,
    Stage,
    freeze_first,
    layer_decay_groups,
    stage_steps,
)
from mimrefiner.training.recipes import FinetuneRecipe
from mimrefiner.training.run import (
    HISTORY_FILE,
    TrainingRun,
    run_into,
    run_settings,
    sigterm_stops,
)
from mimrefiner.training.testing import Testing, accuracy

ADVICE = "freeze the first blocks (frozen_blocks) or take a smaller batch (batch_size)"
RECIPE_ADVICE = (
    "pass fewer images at a time (--micro-batch), recompute activations (--recompute), or use more "
    "GPUs and share the model among them (--shard)"
)
PATHS, MIXES = 3, 4  # streams of a batch's draws, beside those of labelled images
ROWS_FILE, EPOCHS_FILE = "rows.csv", "epochs.csv"
LAST, ON_VAL, ON_TEST = "last epoch", "best on validation", "best on test, as in the paper"


@dataclass
class Finetuned:
    """What :func:`finetune_recipe` gives.

    Attributes:
        model: encoder and classifier after the last epoch, on the CPU in eval mode.
        rows: results, one row per choice of the epoch (``setting``), with the columns of probes and
            ``images``, which says where the training images come from.
        epochs: accuracies on validation and test images, and throughput, one row per epoch; what
            was not measured is missing.
        history: one row per logged step.
        flops: floating point operations of all steps, counted on the first.
        seconds: wall time.
    """

    model: ImageClassifier
    rows: pd.DataFrame
    epochs: pd.DataFrame
    history: pd.DataFrame
    flops: float
    seconds: float


def finetune_recipe(
    encoder: nn.Module,
    train: Dataset,
    test: Dataset,
    recipe: FinetuneRecipe,
    *,
    val: Dataset | None = None,
    best_on_test: bool = False,
    classes: int | None = None,
    device: torch.device | str | None = None,
    num_workers: int = 0,
    saving: Saving | None = None,
    memory: Memory = PLENTY,
) -> Finetuned:
    """Train a copy of ``encoder`` and a classifier by ``recipe``, and test them.

    The last epoch is always tested. With ``val`` the epoch that is best on it is tested too. In a
    group of processes each trains on its share of every batch; images mix, and paths drop, within a
    share, or within ``recipe.micro_batch`` images, as in the released code.

    Args:
        encoder: a timm VisionTransformer; its input size is that of training and test.
        train, test, val: map-style, (image, label), with ``labels``; ``val`` chooses the epoch.
        recipe: one of :mod:`mimrefiner.training.recipes`, or another.
        best_on_test: also the best epoch on test images, as the paper reports; it is chosen on what
            it is measured on, and its row says so.
        classes: how many there are; None counts them, see :func:`count_classes`.
        device: where to train; None takes a GPU where there is one.
        num_workers: processes that load images.
        saving: checkpoints and resuming; None for none.
        memory: what trades time for memory.

    Raises:
        InputError: labels missing or out of range, no test images, cls pooling of a model without
            cls token, a batch larger than the data set.
        FloatingPointError: the loss is not finite.
        mimrefiner.errors.Stopped: SIGTERM came.

    >>> import mimrefiner as mr
    >>> from mimrefiner.training.recipes import L16, replace
    >>> train, test = (mr.load_dataset("digits", split=s).take(16) for s in ("train", "test"))
    >>> encoder = mr.build_vit(mr.ViTConfig(dim=16, depth=2))
    >>> result = finetune_recipe(encoder, train, test, replace(L16, epochs=2, batch_size=8))
    >>> result.rows[["protocol", "setting"]].values.tolist(), len(result.epochs)
    ([['finetune_in1k_l16', 'last epoch']], 2)
    """
    sets = {"train": train, "test": test} | ({} if val is None else {"val": val})
    device, encoder = device_of(device), in_float32(encoder)
    warn_or_refuse(encoder, saving is not None)
    r, classes = recipe, count_classes(sets, classes)
    head = Head(classes, r.pool, r.head_norm, r.drop_path, r.learn_positions)
    model = ImageClassifier(encoder, head, seed=r.seed)
    freeze_first(model.encoder, _frozen(r, encoder))
    tester = _Tester(sets, r, best_on_test, num_workers)
    settings = partial(_settings, r, encoder, sets, best_on_test)
    run = TrainingRun(saving, settings, num_workers=num_workers, memory=memory, monitor=tester)
    model = _trained(model.to(device), train, r, run)
    epochs = pd.DataFrame(run.epochs).drop(columns="stage")
    rows = _rows(run.epochs, r, encoder, sets, best_on_test)
    return Finetuned(model, rows, epochs, run.history, run.flops, run.seconds)


def _trained(
    model: ImageClassifier, train: Dataset, recipe: FinetuneRecipe, run: TrainingRun
) -> ImageClassifier:
    """``model`` after all epochs, whole, on the CPU in eval mode."""
    if recipe.batch_size % distributed.world() == 0:  # else said when the images are shared
        warn_of_finetuning(model, recipe, run.memory, RECIPE_ADVICE)
    plain = copy.deepcopy(model).cpu() if run.memory.shard else None
    if run.memory.shard:
        engine.shard(model)
    with recomputed(model.encoder) if run.memory.recompute else nullcontext():
        _recipe_stage(model.train(), train, recipe, run)
    model.use_paths([None] * len(model.paths))  # those of the last step lie on the GPU
    model = engine.unsharded(model, plain) if run.memory.shard else model.cpu()
    return model.eval().requires_grad_(True)


def count_classes(sets: dict[str, Dataset], classes: int | None = None) -> int:
    """How many classes ``sets["train"]`` has, after a look at the labels of all sets.

    Args:
        sets: name -> data set with ``labels``.
        classes: how many there should be; None takes ``classes`` of the training set, or one more
            than its largest label.

    Raises:
        InputError: no images, images without label, or a label out of range.

    >>> import mimrefiner as mr
    >>> count_classes({"train": mr.load_dataset("digits", split="train")})
    10
    """
    for name, dataset in sets.items():
        labels = getattr(dataset, "labels", None)
        if not len(dataset):
            raise InputError(f"fine-tuning needs {name} images, and there are none")
        if labels is None or min(labels) < 0:
            raise InputError(
                f"fine-tuning needs a label for every image, and not every {name} image has one"
            )
    if classes is None:
        names = getattr(sets["train"], "classes", None)
        classes = len(names) if names else int(max(sets["train"].labels)) + 1
    if classes < 2:
        raise InputError(f"a classifier needs at least two classes, the data set has {classes}")
    for name, dataset in sets.items():
        if (largest := int(max(dataset.labels))) >= classes:
            raise InputError(
                f"the {name} images have label {largest}, and there are {classes} classes, 0 to "
                f"{classes - 1}: use labels of the same classes everywhere, or give classes="
            )
    return classes


def _frozen(recipe: FinetuneRecipe, encoder: nn.Module) -> int:
    if recipe.prompts:
        raise InputError(
            f"recipe {recipe.name} trains visual prompts, whose model class was not released: "
            "choose another recipe for this model"
        )
    return recipe.frozen_blocks(depth_of(encoder))


def _settings(
    recipe: FinetuneRecipe, encoder: nn.Module, sets: dict[str, Dataset], best_on_test: bool
) -> dict:
    others = {name: data_hash(dataset) for name, dataset in sets.items() if name != "train"}
    settings = run_settings(recipe, sets["train"], encoder)
    return {**settings, "tested on": others, "best on test": best_on_test}


def _recipe_stage(
    model: ImageClassifier, train: Dataset, recipe: FinetuneRecipe, run: TrainingRun
) -> None:
    per_epoch = max(1, len(train) // recipe.batch_size)
    stage = LabelledStage(
        number=1,
        steps=stage_steps(len(train), recipe.batch_size, recipe.epochs),
        images=per_epoch * recipe.batch_size,
        batch_size=recipe.batch_size,
        warmup=recipe.warmup_epochs * per_epoch,
        base_lr=recipe.base_lr,
        min_lr=recipe.min_lr,
        warmup_to_peak=recipe.warmup_to_peak,
    )
    groups = recipe_groups(model, recipe)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=recipe.betas, fused=True)
    run.begin(stage, model=model, optimizer=optimizer)
    device = next(model.parameters()).device
    mean, std = normalisation(model.encoder)
    batches = labelled_batches(
        train,
        augmentation_of(recipe, input_size(model.encoder)[-1]),
        run.order(recipe.seed),
        mean=mean,
        std=std,
        device=device,
        num_workers=run.num_workers,
    )
    step_of = _Step(model, recipe, run.memory, engine.averaged(model))
    with sigterm_stops(), advice_on_memory(RECIPE_ADVICE), plain_attention(model, device):
        for step, batch in run.through("fine-tune", batches):
            with run.counted(step):
                optimizer.zero_grad()
                loss = step_of.backward(*batch, step)
            run.descend()
            run.end_step(step, loss)


def recipe_groups(model: ImageClassifier, recipe: FinetuneRecipe) -> list[dict]:
    """Parameter groups of encoder and classifier; norm and classifier have the whole rate."""
    decayed = ("cls_token",) if recipe.decay_cls else ()
    groups = layer_decay_groups(
        model.encoder, recipe.weight_decay, recipe.layer_decay, decayed=decayed
    )
    new = [*model.linear.parameters(), *model.head_norm.parameters()]
    for ndim, decay in ((2, recipe.weight_decay), (1, 0.0)):
        params = [x for x in new if x.ndim == ndim]
        groups.append({"params": params, "lr_scale": 1.0, "weight_decay": decay})
    return groups


def augmentation_of(recipe: FinetuneRecipe, size: int) -> Augmentation:
    """What a recipe does to a training image of ``size`` pixels."""
    r = recipe
    return Augmentation(size, r.resize, r.crop_scale, r.flip, r.rand_augment, r.erasing)


@dataclass
class _Step:
    """One step's loss and gradients, in parts where that is asked for."""

    model: ImageClassifier
    recipe: FinetuneRecipe
    memory: Memory
    through: Callable
    generator: torch.Generator = field(default_factory=torch.Generator)

    def backward(self, images: Tensor, labels: Tensor, step: int) -> Tensor:
        """Add up gradients; the mean loss (), of this process's images."""
        total, parts = 0.0, list(self._parts(images, labels, step))
        for part in parts:
            last = part is parts[-1]
            with nullcontext() if last else engine.adding(self.through):
                with autocast(images.device, self.model.encoder):
                    loss = self.through(partial(self._loss, *part)) * (len(part[0]) / len(images))
                loss.backward()
            total = total + loss.detach()
        return total

    def _loss(self, images: Tensor, targets: Tensor, factors: Tensor) -> Tensor:
        self.model.use_paths(factors)
        smoothing = self.recipe.smoothing if targets.ndim == 1 else 0.0  # else in the targets
        return F.cross_entropy(self.model(images), targets, label_smoothing=smoothing)

    def _parts(self, images: Tensor, labels: Tensor, step: int) -> Iterator[tuple[Tensor, ...]]:
        """What passes at a time: images, targets and factors of drop path."""
        recipe, together = self.recipe, self.recipe.micro_batch or len(images)
        groups = list(zip(images.split(together), labels.split(together), strict=True))
        mix = Mixing(recipe.mixup, recipe.cutmix, recipe.smoothing, self.model.head.classes)
        for place, (x, y) in enumerate(groups, distributed.rank() * len(groups)):
            if recipe.mixes:
                x, y = mix(x, y, batch_seed(recipe.seed, MIXES, step, place))
            self.generator.manual_seed(batch_seed(recipe.seed, PATHS, step, place))
            factors = to_device(self.model.draw_paths(len(x), self.generator), x.device)
            at_once = self.memory.micro_batch or len(x)
            yield from zip(
                x.split(at_once), y.split(at_once), factors.split(at_once, 1), strict=True
            )


@dataclass
class _Tester:
    """Tests the classifier at the end of every epoch where that is asked for, and after the last.

    Test images are passed for the last epoch, for an epoch that is better on validation images than
    all before, and for every epoch with ``best_on_test``.
    """

    sets: dict[str, Dataset]
    recipe: FinetuneRecipe
    best_on_test: bool
    num_workers: int

    def __call__(self, model: ImageClassifier, epochs: list[dict]) -> None:
        row, recipe = epochs[-1], self.recipe
        how = Testing(recipe.crop_scale is None, recipe.test_float32, 256, self.num_workers)
        row["val"] = row["test"] = None
        better = False
        if "val" in self.sets:
            row["val"] = accuracy(model, self.sets["val"], how)
            better = all(row["val"] > earlier["val"] for earlier in epochs[:-1])
        # The last one: stages end with a whole number of steps, perhaps within an epoch
        is_last = row["epoch"] >= self._end()
        if better or is_last or self.best_on_test:
            row["test"] = accuracy(model, self.sets["test"], how)

    def _end(self) -> float:
        images, batch = len(self.sets["train"]), self.recipe.batch_size
        return stage_steps(images, batch, self.recipe.epochs) / max(1, images // batch)


def _rows(
    epochs: list[dict],
    recipe: FinetuneRecipe,
    encoder: nn.Module,
    sets: dict[str, Dataset],
    best_on_test: bool,
) -> pd.DataFrame:
    """One row per choice of the epoch."""
    chosen = {LAST: epochs[-1]}
    if "val" in sets:
        best = max(epochs, key=lambda row: row["val"])
        chosen[f"{ON_VAL}: epoch {best['epoch']:g}"] = best
    if best_on_test:
        best = max(epochs, key=lambda row: row["test"])
        chosen[f"{ON_TEST}: epoch {best['epoch']:g}"] = best
    common = {
        "block": depth_of(encoder) - 1,
        "pool": recipe.pool,
        "protocol": f"finetune_{recipe.name}",
        "metric": "accuracy",
        "seed": recipe.seed,
        "n_train": len(sets["train"]),
        "n_test": len(sets["test"]),
        "images": getattr(sets["train"], "drawn", "") or "all",
    }
    rows = [{**common, "value": row["test"], "setting": name} for name, row in chosen.items()]
    order = ("block", "pool", "protocol", "metric", "seed", "value", "n_train", "n_test")
    return pd.DataFrame(rows, columns=[*order, "setting", "images"])


def finetune_into(
    out: Path, train: partial, *, save_every: int = 500, resume: bool = False
) -> None:
    """Fine-tune and write the result to the folder ``out``, unless it is there already.

    Args:
        out: gets encoder, classifier, rows, epochs, history and a manifest, which says that the run
            is finished; until then checkpoints lie in ``out/checkpoints``.
        train: ``finetune_recipe`` of (encoder, train, test, recipe) and keywords, to be called with
            ``saving``.
        save_every: steps between two checkpoints.
        resume: go on with an interrupted run, and leave a finished one as it is.

    Raises:
        InputError: ``out`` holds a finished run, and it has other settings, is damaged, or
            ``resume`` is off.
    """
    encoder, images, test, recipe = train.args
    val, best_on_test = train.keywords.get("val"), train.keywords.get("best_on_test", False)
    sets = {"train": images, "test": test} | ({} if val is None else {"val": val})
    settings = _settings(recipe, encoder, sets, best_on_test)
    run_into(out, settings, train, _write, save_every=save_every, resume=resume)


def _write(result: Finetuned, out: Path) -> tuple[list[Path], dict]:
    tables = {ROWS_FILE: result.rows, EPOCHS_FILE: result.epochs, HISTORY_FILE: result.history}
    for name, table in tables.items():
        write_csv(table, out / name)
    files = [*save_classifier(result.model, out), *(out / name for name in tables)]
    return files, {"flops": result.flops, "seconds": result.seconds}


class Classifier(nn.Module):
    """An encoder and a linear layer on its cls token after the final LayerNorm."""

    def __init__(self, encoder: nn.Module, classes: int):
        super().__init__()
        self.encoder = encoder
        self.linear = nn.Linear(encoder.embed_dim, classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, (batch, classes)."""
        return self.linear(self.encoder.forward_features(images)[:, 0])

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """The mean cross-entropy of ``labels`` (batch,), which count the classes from 0."""
        return F.cross_entropy(self(images), labels)


@dataclass
class FinetuneResult:
    """What fine-tuning gives.

    Attributes:
        encoder: on the CPU in eval mode.
        history: one row per logged step.
        epochs: how often the images were seen.
        flops: floating point operations of all steps.
        seconds: wall time.
    """

    encoder: nn.Module
    history: pd.DataFrame
    epochs: float
    flops: float
    seconds: float


def finetune(
    encoder: nn.Module,
    dataset: Dataset,
    config: RefineConfig,
    *,
    flops: float,
    device: torch.device | str | None = None,
    num_workers: int = 0,
    saving: Saving | None = None,
) -> FinetuneResult:
    """Train a copy of ``encoder`` and a linear classifier by cross-entropy.

    Args:
        encoder: a timm VisionTransformer with a cls token.
        dataset: map-style, (image, label), with ``labels`` (images,), every image labelled.
        config: a recipe of refinement; batch size, rates, decays and frozen blocks are those of its
            stage 3. The view is a random resized crop (8 to 100 % of the area) with a flip.
        flops: floating point operations to spend, which decide the number of steps.
        device: where to train; None takes a GPU where there is one.
        num_workers: processes that load images.
        saving: checkpoints and resuming; None for none.

    Raises:
        InputError: images without labels.
    """
    if dataset.labels is None or min(dataset.labels) < 0:
        raise InputError("fine-tuning needs a label for every image")
    device, encoder = device_of(device), in_float32(encoder)
    warn_or_refuse(encoder, saving is not None)
    classes = torch.from_numpy(np.unique(dataset.labels)).to(device)
    model = Classifier(copy.deepcopy(encoder), len(classes)).train().to(device)
    freeze_first(model.encoder, config.frozen_blocks)
    size = input_size(encoder)[-1]
    flops_per_step = _flops_per_step(model, config.batch_size, size, device)
    steps = max(1, round(flops / flops_per_step))

    def settings() -> dict:
        return {**run_settings(config, dataset, encoder), "flops": flops}

    run = TrainingRun(saving, settings, num_workers=num_workers)
    _labelled_stage(model, dataset, classes, config, steps, run)
    tuned = model.encoder.eval().requires_grad_(True).cpu()
    epochs = steps * config.batch_size / len(dataset)
    return FinetuneResult(tuned, run.history, epochs, flops_per_step * steps, run.seconds)


def _labelled_stage(
    model: Classifier,
    dataset: Dataset,
    classes: Tensor,
    config: RefineConfig,
    steps: int,
    run: TrainingRun,
) -> None:
    groups = layer_decay_groups(model.encoder, config.encoder_weight_decay, config.layer_decay)
    linear = {"params": list(model.linear.parameters()), "weight_decay": config.head_weight_decay}
    optimizer = torch.optim.AdamW([*groups, linear], lr=0.0, betas=config.betas, fused=True)
    stage = Stage(
        number=1,
        steps=steps,
        images=len(dataset),
        batch_size=config.batch_size,
        warmup=steps * config.warmup_epochs / config.refine_epochs,
        base_lr=config.refine_base_lr,
        min_lr=config.min_lr,
    )
    run.begin(stage, model=model, optimizer=optimizer)
    views = plain_views(input_size(model.encoder)[-1], (0.08, 1.0))
    through = engine.averaged(model)
    with sigterm_stops(), advice_on_memory(ADVICE), plain_attention(model, classes.device):
        for step, ((images,), _, label) in run.steps("fine-tune", dataset, views, config.seed):
            with autocast(classes.device, model.encoder):
                loss = through(
                    partial(model.loss, images, torch.searchsorted(classes, label.contiguous()))
                )
            optimizer.zero_grad()
            loss.backward()
            run.descend()
            run.end_step(step, loss)


def _flops_per_step(model: Classifier, batch: int, size: int, device: torch.device) -> int:
    """Floating point operations of one step, counted on two images."""
    with advice_on_memory(ADVICE), plain_attention(model, device), operation_counter() as counter:
        model(torch.zeros(2, 3, size, size, device=device)).sum().backward()
    model.zero_grad()
    return counter.get_total_flops() * batch // 2
