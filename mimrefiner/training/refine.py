"""Refinement as plain loops: stage 2 trains the heads, stage 3 encoder and heads."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import pandas as pd
import torch
from timm.layers import DropPath, PatchDropout
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.utils.data import Dataset

from mimrefiner.config import RefineConfig
from mimrefiner.device import autocast, default_device, device_of, plain_attention
from mimrefiner.errors import InputError
from mimrefiner.method.refiner import MIMRefiner, StepResult
from mimrefiner.models.weights import warn_or_refuse
from mimrefiner.models.wrappers import in_float32
from mimrefiner.training import engine, optim
from mimrefiner.training.checkpoints import Saving
from mimrefiner.training.cost import warn_of_refinement
from mimrefiner.training.memory import ADVICE, PLENTY, Memory, advice_on_memory, recomputed
from mimrefiner.training.optim import (
    Stage,
    ema_decay,
    freeze_behind,
    freeze_first,
    head_weights,
    layer_decay_groups,
    stage_steps,
    step_seed,
)
from mimrefiner.training.placement import placed
from mimrefiner.training.run import TrainingRun, Watch, run_settings, sigterm_stops

Batch = tuple[list[Tensor], Tensor, Tensor | None]  # views, index, label


def forward_backward(
    refiner: MIMRefiner,
    batch: Batch,
    *,
    top_k: int,
    generator: torch.Generator | None = None,
    micro_batch: int | None = None,
    weights: Tensor | None = None,
    through: tuple[Callable, Callable] = (engine.call, engine.call),
) -> StepResult:
    """Send one batch forward and its losses back, which adds their gradients to the parameters.

    With ``micro_batch`` the encoder first runs without a graph, that many images at a time; heads
    and loss see all of them; then the encoder runs again, part by part, and the features' gradients
    go back through it.

    Args:
        refiner: encoder, heads and queue.
        batch: the views as for :meth:`MIMRefiner.features`, which image each row is (batch,), and
            its class (batch,), -1 where it has none; None in place of classes measures less.
        top_k: how many neighbours to draw one from.
        generator: draws it.
        micro_batch: images that pass the encoder at a time; None lets all pass at once.
        weights: weigh the heads' losses, (heads,); None stands for ones.
        through: what calls the encoder and what calls the heads; with several processes
            :func:`mimrefiner.training.engine.averaged` of each.

    Raises:
        InputError: ``micro_batch`` with an encoder that leaves something out at random.
    """
    (views, index, label), encoder, (read, project) = batch, refiner.encoder, through
    device, micro_batch = views[0].device, micro_batch or len(index)
    parts = [[x[i : i + micro_batch] for x in views] for i in range(0, len(index), micro_batch)]
    trains = any(x.requires_grad for x in encoder.parameters())
    twice = len(parts) > 1
    if twice and trains and any(_drops(module) for module in encoder.modules()):
        raise InputError(
            "micro_batch runs the encoder twice, which needs one without dropout and drop path"
        )
    with autocast(device, encoder), torch.no_grad() if twice else nullcontext():
        call = engine.call if twice else read  # no gradients yet that could be averaged
        features = [call(partial(refiner.features, part)) for part in parts]
    # (views, batch, heads, dim)
    features = torch.cat(features, 1).requires_grad_(trains) if twice else features[0]
    with autocast(device, encoder):
        z, p = project(partial(refiner.project, features))
        result = refiner.step(z, p, index, label, top_k=top_k, generator=generator)
    result.loss.backward(torch.ones_like(result.loss) if weights is None else weights)
    if twice and trains:
        for part, grad in zip(parts, features.grad.split(micro_batch, 1), strict=True):
            with nullcontext() if part is parts[-1] else engine.adding(read):
                with autocast(device, encoder):
                    again = read(partial(refiner.features, part))
                again.backward(grad)
    return result


def _drops(module: nn.Module) -> bool:
    """Whether ``module`` leaves something out at random."""
    rates = {nn.Dropout: "p", DropPath: "drop_prob", PatchDropout: "prob"}
    return any(isinstance(module, kind) and getattr(module, rate) for kind, rate in rates.items())


@dataclass
class RefineResult:
    """What refinement gives.

    Attributes:
        encoder: the encoder's raw weights, on the CPU.
        ema_encoder: their moving average, which the paper evaluates, on the CPU.
        history: one row per logged step and head.
        flops: floating point operations of both stages together.
        seconds: their wall time.
        epochs: what a :class:`~mimrefiner.probes.monitor.Monitor` measured, one row per epoch.
    """

    encoder: nn.Module
    ema_encoder: nn.Module
    history: pd.DataFrame
    flops: float
    seconds: float
    epochs: pd.DataFrame | None = None


def refine(
    encoder: nn.Module,
    dataset: Dataset,
    config: RefineConfig,
    *,
    device: torch.device | str | None = None,
    num_workers: int = 0,
    saving: Saving | None = None,
    memory: Memory = PLENTY,
    monitor: Watch | None = None,
) -> RefineResult:
    """Stages 2 and 3 on a copy of ``encoder``: prepare the heads, then train encoder and heads.

    Args:
        encoder: a timm ViT; the copy is float32, and without what ``torch.compile`` or
            DataParallel put around it.
        dataset: map-style, (image, label); labels are used for metrics only.
        config: the recipe; its seed decides the heads' first weights, order, views and the
            neighbours drawn. Dropout and drop path, where the encoder has any, draw from torch's
            global generator.
        device: where to train; None takes a GPU where there is one.
        num_workers: processes that load images.
        saving: checkpoints and resuming; None for none.
        memory: what trades time for memory.
        monitor: called at the end of every epoch and stage with the refiner and the rows of the
            epochs so far, to whose last one it adds what it measures, as
            :class:`~mimrefiner.probes.monitor.Monitor` does; None measures nothing.

    Raises:
        InputError: see :class:`mimrefiner.method.refiner.MIMRefiner` and, for blocks ``"auto"``,
            :func:`mimrefiner.training.placement.placed`; with ``saving`` also an encoder that a
            file could not hold.
        FloatingPointError: the loss of a head is not finite.
        mimrefiner.errors.Stopped: SIGTERM came.

    >>> import mimrefiner as mr
    >>> from dataclasses import replace
    >>> digits = mr.load_dataset("digits", split="train").take(16)
    >>> config = replace(mr.load_preset("smoke").refine, batch_size=8, queue_size=32, out_dim=8)
    >>> result = mr.refine(mr.build_vit(mr.ViTConfig(dim=16, depth=3)), digits, config)
    >>> result.history.groupby("stage")["block"].unique().to_dict()
    {2: array([2]), 3: array([2])}
    """
    device, encoder = device_of(device), in_float32(encoder)
    warn_or_refuse(encoder, saving is not None)
    config = placed(config, encoder, dataset, saving and saving.folder, device)
    refiner = MIMRefiner(copy.deepcopy(encoder), config)
    settings = partial(run_settings, config, dataset, encoder)
    run = TrainingRun(saving, settings, num_workers=num_workers, memory=memory, monitor=monitor)
    refiner.to(device)
    warn_of_refinement(refiner, memory)
    with sigterm_stops():  # between the stages too
        train_heads(refiner, dataset, run)
        ema_encoder, _, _ = refine_encoder(refiner, dataset, run)
    raw = refiner.encoder.eval().requires_grad_(True).cpu()
    epochs = pd.DataFrame(run.epochs) if monitor is not None else None
    return RefineResult(raw, ema_encoder, run.history, run.flops, run.seconds, epochs)


@dataclass(frozen=True)
class StageRecipe:
    """What differs between stages 2 and 3.

    Attributes:
        stage: 2 or 3.
        epochs: how long it lasts.
        base_lr: the highest learning rate, for 256 images.
        top_k: how many neighbours to draw one from.
        loss_schedule: how the heads' losses are weighed, see
            :func:`mimrefiner.training.optim.head_weights`.
        ema_decay: the decay of the encoder's moving average; None without one.
    """

    stage: int
    epochs: float
    base_lr: float
    top_k: int
    loss_schedule: str = "constant"
    ema_decay: float | None = None


def train_heads(
    refiner: MIMRefiner, dataset: Dataset, run: TrainingRun | None = None
) -> tuple[pd.DataFrame, float]:
    """Stage 2: train the heads of ``refiner`` in place on a frozen encoder.

    Returns:
        History and floating point operations of ``run``, which is a new one if None.

    Raises:
        AssertionError: should the encoder have changed.
    """
    config, run = refiner.config, run or TrainingRun()
    before = [x.to("cpu", copy=True) for x in refiner.encoder.state_dict().values()]
    refiner.encoder.requires_grad_(False).eval()
    groups = param_groups_weight_decay(refiner.heads, config.head_weight_decay)
    recipe = StageRecipe(2, config.heads_epochs, config.heads_base_lr, config.heads_top_k)
    _contrastive_stage(refiner, dataset, groups, recipe, run)
    after = refiner.encoder.state_dict().values()
    assert all(torch.equal(a, b.cpu()) for a, b in zip(before, after, strict=True)), (
        "stage 2 changed the encoder"
    )
    return run.history, run.flops


def refine_encoder(
    refiner: MIMRefiner, dataset: Dataset, run: TrainingRun | None = None
) -> tuple[nn.Module, pd.DataFrame, float]:
    """Stage 3: train encoder and heads of ``refiner`` in place.

    The moving average starts with the weights that the stage starts with and takes its share of the
    new ones after every step, the first included, as in the official ``ema_callback.py``.

    Returns:
        The encoder's moving average on the CPU; history and floating point operations of ``run``,
        which is a new one if None.
    """
    config, run = refiner.config, run or TrainingRun()
    refiner.encoder.requires_grad_(True).train()
    freeze_first(refiner.encoder, config.frozen_blocks)
    freeze_behind(refiner.encoder, max(refiner.blocks))
    ema = copy.deepcopy(refiner.encoder)
    plain = copy.deepcopy(refiner.encoder).cpu() if run.memory.shard else None
    for model in (refiner.encoder, ema) if run.memory.shard else ():
        engine.shard(model)
    groups = layer_decay_groups(refiner.encoder, config.encoder_weight_decay, config.layer_decay)
    groups += param_groups_weight_decay(refiner.heads, config.head_weight_decay)
    recipe = StageRecipe(
        stage=3,
        epochs=config.refine_epochs,
        base_lr=config.refine_base_lr,
        top_k=config.refine_top_k,
        loss_schedule=config.loss_schedule,
        ema_decay=ema_decay(
            config, stage_steps(len(dataset), config.batch_size, config.refine_epochs)
        ),
    )
    with recomputed(refiner.encoder) if run.memory.recompute else nullcontext():
        _contrastive_stage(refiner, dataset, groups, recipe, run, ema)
    if run.memory.shard:
        ema = engine.unsharded(ema, copy.deepcopy(plain))
        refiner.encoder = engine.unsharded(refiner.encoder, plain)
    return ema.eval().requires_grad_(True).cpu(), run.history, run.flops


def _contrastive_stage(
    refiner: MIMRefiner,
    dataset: Dataset,
    groups: list[dict],
    recipe: StageRecipe,
    run: TrainingRun,
    ema: nn.Module | None = None,
) -> None:
    config, device = refiner.config, next(refiner.parameters()).device
    per_epoch = len(dataset) // config.batch_size
    stage = Stage(
        number=recipe.stage,
        steps=stage_steps(len(dataset), config.batch_size, recipe.epochs),
        images=per_epoch * config.batch_size,
        batch_size=config.batch_size,
        warmup=config.warmup_epochs * per_epoch,
        base_lr=recipe.base_lr,
        min_lr=config.min_lr,
        clip_norm=config.clip_norm,
        blocks=refiner.blocks,
    )
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=config.betas, fused=True)
    averages = {} if ema is None else {"ema": ema}
    run.begin(stage, refiner=refiner, optimizer=optimizer, **averages)
    seed = 8 * config.seed + stage.number
    batches = run.steps(f"stage {stage.number}", dataset, config.views, seed)
    # (steps, heads), on the device at once: a copy in every step would make the GPU wait
    weights = [
        head_weights(recipe.loss_schedule, len(refiner.blocks), step / stage.steps)
        for step in range(stage.steps)
    ]
    weights, generator = torch.tensor(weights, device=device), torch.Generator()
    how = {"top_k": recipe.top_k, "generator": generator, "micro_batch": run.memory.micro_batch}
    how["through"] = engine.averaged(refiner.encoder), engine.averaged(refiner.heads)
    refiner.heads.train()
    with sigterm_stops(), advice_on_memory(ADVICE), plain_attention(refiner.encoder, device):
        for step, batch in batches:
            generator.manual_seed(step_seed(config.seed, stage.number, step))
            with run.counted(step):
                optimizer.zero_grad()
                result = forward_backward(refiner, batch, weights=weights[step], **how)
            run.descend()
            if ema is not None:
                optim.update_average(ema, refiner.encoder, recipe.ema_decay)
            run.end_step(step, result.loss, result.measure)


def refinement_flops(encoder: nn.Module, dataset: Dataset, config: RefineConfig) -> float:
    """What ``refine(encoder, dataset, config).flops`` would be, by one step of either stage."""
    epoch = len(dataset) // config.batch_size
    one_step = replace(config, heads_epochs=1 / epoch, refine_epochs=1 / epoch, warmup_epochs=0)
    refiner = MIMRefiner(copy.deepcopy(encoder), one_step).to(default_device())
    _, stage2 = train_heads(refiner, dataset)
    _, _, stage3 = refine_encoder(refiner, dataset)
    steps = [
        stage_steps(len(dataset), config.batch_size, epochs)
        for epochs in (config.heads_epochs, config.refine_epochs)
    ]
    return stage2 * steps[0] + stage3 * steps[1]
