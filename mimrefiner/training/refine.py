"""The three training stages as plain loops: pretrain (1), heads only (2), heads and encoder (3)."""

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import pandas as pd
import torch
from timm.layers import DropPath, PatchDropout
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

from mimrefiner import distributed
from mimrefiner.config import RefineConfig
from mimrefiner.data.views import view_batches
from mimrefiner.device import autocast, default_device, plain_attention
from mimrefiner.errors import InputError
from mimrefiner.method.refiner import MIMRefiner, StepResult
from mimrefiner.models.encoders import normalisation
from mimrefiner.progress import Meter, progress
from mimrefiner.training import engine, optim
from mimrefiner.training.checkpoints import Saving
from mimrefiner.training.cost import warn_of_refinement
from mimrefiner.training.engine import unsharded
from mimrefiner.training.memory import ADVICE, PLENTY, Memory, advice_on_memory, recomputed
from mimrefiner.training.optim import (
    cosine_lr,
    ema_decay,
    freeze_behind,
    freeze_first,
    head_weights,
    layer_decay_groups,
    set_lr,
    stage_steps,
    step_seed,
)
from mimrefiner.training.run import Run, is_logged, run_settings, sigterm_stops


def forward_backward(
    refiner: MIMRefiner,
    views: Sequence[Tensor],
    index: Tensor,
    label: Tensor | None = None,
    *,
    top_k: int,
    generator: torch.Generator | None = None,
    micro_batch: int | None = None,
    weights: Tensor | None = None,
    through: tuple[Callable, Callable] = (engine.call, engine.call),
) -> StepResult:
    """One batch forward and back: adds the gradients of the heads' losses, summed with ``weights``
    (heads,), to the parameters.

    With ``micro_batch`` the encoder first runs without a graph, that many images at a time; heads
    and loss see all of them; then the encoder runs again, part by part, and the features' gradients
    go back through it.

    Args:
        refiner, index, label, top_k, generator: see :meth:`MIMRefiner.step`.
        views: see :meth:`MIMRefiner.features`.
        through: what calls the encoder and what calls the heads: with several processes
            :func:`distributed.averaged` of each.

    Raises:
        InputError: ``micro_batch`` with an encoder that leaves something out at random.
    """
    encoder, device, (read, project) = refiner.encoder, views[0].device, through
    how = {"top_k": top_k, "generator": generator}
    if micro_batch is None or micro_batch >= len(index):
        with autocast(device, encoder):
            features = read(lambda: refiner.features(views))
            result = refiner.step(*project(lambda: refiner.project(features)), index, label, **how)
        result.loss.backward(torch.ones_like(result.loss) if weights is None else weights)
        return result
    trains = any(x.requires_grad for x in encoder.parameters())
    if trains and any(_drops(module) for module in encoder.modules()):
        raise InputError(
            "micro_batch runs the encoder twice, which needs one without dropout and drop path"
        )
    parts = [[x[i : i + micro_batch] for x in views] for i in range(0, len(index), micro_batch)]
    with torch.no_grad(), autocast(device, encoder):
        # (views, batch, heads, dim)
        features = torch.cat([refiner.features(part) for part in parts], 1).requires_grad_(trains)
    with autocast(device, encoder):
        result = refiner.step(*project(lambda: refiner.project(features)), index, label, **how)
    result.loss.backward(torch.ones_like(result.loss) if weights is None else weights)
    if trains:
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
    """``encoder`` (raw weights) and ``ema_encoder`` (their moving average, which the paper
    evaluates), on the CPU.

    ``history``: one row per logged step and head; ``flops`` and ``seconds`` of both stages
    together; ``epochs``: what a
    :class:`~mimrefiner.probes.monitor.Monitor` measured, one row per epoch.
    """

    encoder: nn.Module
    ema_encoder: nn.Module
    history: pd.DataFrame
    flops: float
    seconds: float
    epochs: pd.DataFrame | None = None


# Adds what it measures to the last row of the epochs so far
Watch = Callable[[MIMRefiner, list[dict]], None]


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
        encoder: a timm ViT.
        dataset: map-style, (image, label); labels are used for metrics only.
        config: recipe; ``config.seed`` decides the heads' first weights, order, views and
            neighbours drawn. Dropout and drop path, where ``encoder`` has any, draw from torch's
            global generator.
        device, num_workers: where to train (None: a GPU where there is one), and loader processes.
        saving: checkpoints and resuming; None for none.
        memory: what trades time for memory.
        monitor: called at the end of every epoch and stage with the refiner and the rows of the
            epochs so far, to whose last one it adds what it measures, such as
            :class:`~mimrefiner.probes.monitor.Monitor`; None measures nothing.

    Raises:
        InputError: see :class:`mimrefiner.method.refiner.MIMRefiner`.
        FloatingPointError: the loss of a head is not finite.
        mimrefiner.errors.Stopped: SIGTERM came.
    """
    device = torch.device(device) if device is not None else default_device()
    refiner = MIMRefiner(copy.deepcopy(encoder), config)
    run = Run(saving, {} if saving is None else run_settings(config, dataset, encoder))
    refiner.to(device)
    warn_of_refinement(refiner, memory)
    how = {"num_workers": num_workers, "run": run, "memory": memory, "monitor": monitor}
    with sigterm_stops():  # between the stages too
        train_heads(refiner, dataset, **how)
        ema_encoder, _, _ = refine_encoder(refiner, dataset, **how)
    raw = refiner.encoder.eval().requires_grad_(True).cpu()
    epochs = pd.DataFrame(run.epochs) if monitor is not None else None
    return RefineResult(raw, ema_encoder, run.history, run.flops, run.seconds, epochs)


def train_heads(
    refiner: MIMRefiner,
    dataset: Dataset,
    *,
    num_workers: int = 0,
    run: Run | None = None,
    memory: Memory = PLENTY,
    monitor: Watch | None = None,
) -> tuple[pd.DataFrame, float]:
    """Stage 2: train the heads of ``refiner`` in place on a frozen encoder; returns history and
    FLOPs of the run.

    Raises:
        AssertionError: should the encoder have changed.
    """
    config = refiner.config
    run = Run(None, {}) if run is None else run
    before = [x.to("cpu", copy=True) for x in refiner.encoder.state_dict().values()]
    refiner.encoder.requires_grad_(False).eval()
    groups = param_groups_weight_decay(refiner.heads, config.head_weight_decay)
    recipe = Recipe(2, config.heads_epochs, config.heads_base_lr, config.heads_top_k, "constant")
    _contrastive_stage(refiner, dataset, groups, recipe, run, num_workers, memory, monitor)
    after = refiner.encoder.state_dict().values()
    assert all(torch.equal(a, b.cpu()) for a, b in zip(before, after, strict=True)), (
        "stage 2 changed the encoder"
    )
    return run.history, run.flops


def refinement_flops(encoder: nn.Module, dataset: Dataset, config: RefineConfig) -> float:
    """What ``refine(encoder, dataset, config).flops`` would be, counted on one step of either
    stage.
    """
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


def refine_encoder(
    refiner: MIMRefiner,
    dataset: Dataset,
    *,
    num_workers: int = 0,
    run: Run | None = None,
    memory: Memory = PLENTY,
    monitor: Watch | None = None,
) -> tuple[nn.Module, pd.DataFrame, float]:
    """Stage 3: train encoder and heads of ``refiner`` in place; returns the encoder's moving
    average, history and FLOPs.
    """
    config = refiner.config
    run = Run(None, {}) if run is None else run
    refiner.encoder.requires_grad_(True).train()
    freeze_first(refiner.encoder, config.frozen_blocks)
    freeze_behind(refiner.encoder, max(refiner.blocks))
    decay = ema_decay(config, stage_steps(len(dataset), config.batch_size, config.refine_epochs))
    ema = copy.deepcopy(refiner.encoder)
    plain = copy.deepcopy(refiner.encoder).cpu() if memory.shard else None
    for model in (refiner.encoder, ema) if memory.shard else ():
        engine.shard(model)
    groups = layer_decay_groups(refiner.encoder, config.encoder_weight_decay, config.layer_decay)
    groups += param_groups_weight_decay(refiner.heads, config.head_weight_decay)
    recipe = Recipe(
        3, config.refine_epochs, config.refine_base_lr, config.refine_top_k, config.loss_schedule
    )
    with recomputed(refiner.encoder) if memory.recompute else nullcontext():
        _contrastive_stage(
            refiner, dataset, groups, recipe, run, num_workers, memory, monitor, ema, decay
        )
    if memory.shard:
        ema = unsharded(ema, copy.deepcopy(plain))
        refiner.encoder = unsharded(refiner.encoder, plain)
    return ema.eval().requires_grad_(True).cpu(), run.history, run.flops


@dataclass(frozen=True)
class Recipe:
    """What differs between stages 2 and 3."""

    stage: int
    epochs: float
    base_lr: float
    top_k: int
    loss_schedule: str


def _contrastive_stage(
    refiner: MIMRefiner,
    dataset: Dataset,
    groups: list[dict],
    recipe: Recipe,
    run: Run,
    num_workers: int,
    memory: Memory,
    monitor: Watch | None,
    ema: nn.Module | None = None,
    decay: float = 0.0,
) -> None:
    config, stage = refiner.config, recipe.stage
    device = next(refiner.parameters()).device
    steps = stage_steps(len(dataset), config.batch_size, recipe.epochs)
    per_epoch = len(dataset) // config.batch_size
    peak = recipe.base_lr * config.batch_size / 256
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=config.betas, fused=True)
    mean, std = normalisation(refiner.encoder)
    parts = {"refiner": refiner, "optimizer": optimizer} | ({"ema": ema} if ema is not None else {})
    first = run.begin(stage, steps, **parts)
    batches = view_batches(
        dataset,
        config.views,
        batch_size=config.batch_size,
        steps=steps,
        seed=8 * config.seed + stage,
        mean=mean,
        std=std,
        device=device,
        num_workers=num_workers,
        first_step=first,
        part=(distributed.rank(), distributed.world()),
    )
    generator = torch.Generator()
    refiner.heads.train()
    weights = [
        head_weights(recipe.loss_schedule, len(refiner.blocks), step / steps)
        for step in range(steps)
    ]
    # (steps, heads), there at once: a copy in every step would stop the GPU
    weights = torch.tensor(weights, device=device)
    names = [f" in the head on block {block} (0-based)" for block in refiner.blocks]
    meter = Meter(config.batch_size, device)
    through = engine.averaged(refiner.encoder), engine.averaged(refiner.heads)
    with sigterm_stops(), advice_on_memory(ADVICE), plain_attention(refiner.encoder, device):
        for step, batch in enumerate(
            progress(meter.waiting(batches), f"stage {stage}", steps - first), first
        ):
            lr = set_lr(
                optimizer,
                cosine_lr(step, steps, config.warmup_epochs * per_epoch, peak, config.min_lr),
            )
            generator.manual_seed(step_seed(config.seed, stage, step))
            with FlopCounterMode(display=False) if step == 0 else torch.enable_grad() as counter:
                optimizer.zero_grad()
                how = {
                    "top_k": recipe.top_k,
                    "generator": generator,
                    "micro_batch": memory.micro_batch,
                }
                result = forward_backward(
                    refiner, *batch, **how, weights=weights[step], through=through
                )
            run.flops += counter.get_total_flops() * steps * distributed.world() if step == 0 else 0
            if config.clip_norm is not None:
                engine.clip_gradients(refiner.parameters(), config.clip_norm)
            optimizer.step()
            if ema is not None:
                # Starts behind the first step
                optim.update_average(ema, refiner.encoder, decay if step > 0 else 0.0)
            loss = distributed.mean(result.loss.detach())
            run.watch(step, loss)
            if is_logged(step, steps):
                run.check_finite(names)
                columns = {
                    "loss": loss,
                    **{name: distributed.mean(x) for name, x in result.metrics.items()},
                }
                columns = {name: x.tolist() for name, x in columns.items()}
                for head, block in enumerate(refiner.blocks):
                    values = {name: x[head] for name, x in columns.items()}
                    run.rows.append(
                        {
                            "stage": stage,
                            "step": step,
                            "epoch": step / per_epoch,
                            "lr": lr,
                            "block": block,
                            **values,
                        }
                    )
            if monitor is not None and ((step + 1) % per_epoch == 0 or step + 1 == steps):
                run.epochs.append({"stage": stage, "epoch": (step + 1) / per_epoch, **meter.read()})
                monitor(refiner, run.epochs)
                meter.start()
            run.end_step(step, names)
