"""The three training stages as plain loops: pretrain (1), heads only (2), heads and encoder (3)."""

import copy
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial

import pandas as pd
import torch
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

from mimrefiner import distributed
from mimrefiner.augment import Crop, Views
from mimrefiner.checkpoint import sha256_of
from mimrefiner.config import PretrainConfig, RefineConfig
from mimrefiner.data import ImageDataset, data_hash
from mimrefiner.losses import head_weights
from mimrefiner.masked import MAE, SimMIM, build_masked_model, random_mask
from mimrefiner.memory import ADVICE, PLENTY, PRETRAIN_ADVICE, Memory, advice_on_memory, plain_attention, recomputed
from mimrefiner.models import autocast, default_device, normalisation
from mimrefiner.monitor import Meter, Monitor
from mimrefiner.optim import cosine_lr, ema_decay, freeze_behind, freeze_first, layer_decay_groups, set_lr, stage_steps, undecayed
from mimrefiner.plan import warn_of_pretraining, warn_of_refinement
from mimrefiner.progress import progress
from mimrefiner.refiner import MIMRefiner, forward_backward
from mimrefiner.resume import Run, Saving, sigterm_stops
from mimrefiner.views import view_batches

LOG_POINTS = 100  # history rows per stage, so that metrics do not stop the GPU at every step


@dataclass
class PretrainResult:
    """``model``: the pre-training model on the CPU, with ``encoder`` inside; ``history``: one row per logged step.

    ``flops``: floating point operations of all steps, counted on the first; ``seconds``: wall time.
    """

    model: SimMIM | MAE
    encoder: nn.Module
    history: pd.DataFrame
    flops: float
    seconds: float


@dataclass
class RefineResult:
    """``encoder`` (raw weights) and ``ema_encoder`` (their moving average, which the paper evaluates), on the CPU.

    ``history``: one row per logged step and head; ``flops`` and ``seconds`` of both stages together; ``epochs``: what a
    :class:`~mimrefiner.monitor.Monitor` measured, one row per epoch.
    """

    encoder: nn.Module
    ema_encoder: nn.Module
    history: pd.DataFrame
    flops: float
    seconds: float
    epochs: pd.DataFrame | None = None


def pretrain(
    encoder: nn.Module,
    dataset: Dataset,
    config: PretrainConfig,
    *,
    start_from: SimMIM | MAE | None = None,
    device: torch.device | str | None = None,
    num_workers: int = 0,
    saving: Saving | None = None,
    shard: bool = False,
) -> PretrainResult:
    """Stage 1: masked-image pre-training of a copy of ``encoder``.

    Args:
        encoder: a timm VisionTransformer.
        dataset: map-style, (image, label); labels are not used.
        config: recipe; ``config.seed`` decides order, crops and masks. Dropout and drop path, where ``encoder`` has any, draw from
            torch's global generator.
        start_from: go on from this pre-training model (its encoder replaces ``encoder``) with a new learning-rate cycle.
        device, num_workers: where to train (None: a GPU where there is one), and loader processes.
        saving: checkpoints and resuming; None for none.
        shard: let every process keep its part of the model only, see :class:`mimrefiner.memory.Memory`.

    Raises:
        FloatingPointError: the loss is not finite.
        mimrefiner.errors.Stopped: SIGTERM came.
    """
    device = torch.device(device) if device is not None else default_device()
    model = copy.deepcopy(start_from) if start_from is not None else build_masked_model(copy.deepcopy(encoder), config)
    run = Run(saving, {} if saving is None else run_settings(config, dataset, model))
    plain = copy.deepcopy(model) if shard else None
    warn_of_pretraining(model, config, device, shard)
    model.train().to(device)
    if shard:
        distributed.shard(model)
    through = distributed.averaged(model)
    size = model.encoder.patch_embed.img_size[0]
    crop = Crop(size, config.crop_scale, flip_p=0.5 * config.flip, jitter_p=0.0, grey_p=0.0)
    per_epoch = max(1, len(dataset) // config.batch_size)
    steps = max(1, round(config.epochs * per_epoch))
    groups = param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=undecayed(model))
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=config.betas, fused=True)
    peak = config.base_lr * config.batch_size / 256
    mean, std = normalisation(model.encoder)
    first = run.begin(1, steps, model=model, optimizer=optimizer)
    part = (distributed.rank(), distributed.world())
    batches = view_batches(
        dataset, Views((crop,), crop, 0), batch_size=config.batch_size, steps=steps, seed=config.seed, mean=mean, std=std,
        device=device, num_workers=num_workers, first_step=first, part=part,
    )  # fmt: skip
    generator = torch.Generator()
    with sigterm_stops(), advice_on_memory(PRETRAIN_ADVICE), plain_attention(model, device):
        for step, (views, _, _) in enumerate(progress(batches, f"pretrain ({config.method})", steps - first), first):
            lr = set_lr(optimizer, cosine_lr(step, steps, config.warmup_share * steps, peak, config.min_lr))
            images = views[0]
            generator.manual_seed(_step_seed(config.seed, 1, step))
            mask = random_mask(config.batch_size, (size // model.patch) ** 2, config.mask_ratio, generator)
            mask = mask.chunk(part[1])[part[0]]
            with FlopCounterMode(display=False) if step == 0 else torch.enable_grad() as counter:
                with autocast(device, model.encoder):
                    loss = through(partial(model, images, mask))
                optimizer.zero_grad()
                loss.backward()
            run.flops += counter.get_total_flops() * steps * part[1] if step == 0 else 0
            if config.clip_norm is not None:
                distributed.clip_gradients(model.parameters(), config.clip_norm)
            optimizer.step()
            loss = distributed.mean(loss)
            run.watch(step, loss[None])
            if is_logged(step, steps):
                run.check_finite([""])
                run.rows.append({"stage": 1, "step": step, "epoch": step / per_epoch, "lr": lr, "loss": loss.item()})
            run.end_step(step, [""])
    model = _unsharded(model, plain) if shard else model.cpu()
    model.eval()
    return PretrainResult(model, model.encoder, run.history, run.flops, run.seconds)


def refine(
    encoder: nn.Module,
    dataset: Dataset,
    config: RefineConfig,
    *,
    device: torch.device | str | None = None,
    num_workers: int = 0,
    saving: Saving | None = None,
    memory: Memory = PLENTY,
    monitor: Monitor | None = None,
) -> RefineResult:
    """Stages 2 and 3 on a copy of ``encoder``: prepare the heads, then train encoder and heads.

    Args:
        encoder: a timm ViT.
        dataset: map-style, (image, label); labels are used for metrics only.
        config: recipe; ``config.seed`` decides the heads' first weights, order, views and neighbours drawn. Dropout and drop path,
            where ``encoder`` has any, draw from torch's global generator.
        device, num_workers: where to train (None: a GPU where there is one), and loader processes.
        saving: checkpoints and resuming; None for none.
        memory: what trades time for memory.
        monitor: what to measure at the end of every epoch and stage; None for nothing.

    Raises:
        InputError: see :class:`mimrefiner.refiner.MIMRefiner`.
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
    monitor: Monitor | None = None,
) -> tuple[pd.DataFrame, float]:
    """Stage 2: train the heads of ``refiner`` in place on a frozen encoder; returns history and FLOPs of the run.

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
    assert all(torch.equal(a, b.cpu()) for a, b in zip(before, after, strict=True)), "stage 2 changed the encoder"
    return run.history, run.flops


def refinement_flops(encoder: nn.Module, dataset: Dataset, config: RefineConfig) -> float:
    """What ``refine(encoder, dataset, config).flops`` would be, counted on one step of either stage."""
    epoch = len(dataset) // config.batch_size
    one_step = replace(config, heads_epochs=1 / epoch, refine_epochs=1 / epoch, warmup_epochs=0)
    refiner = MIMRefiner(copy.deepcopy(encoder), one_step).to(default_device())
    _, stage2 = train_heads(refiner, dataset)
    _, _, stage3 = refine_encoder(refiner, dataset)
    steps = [stage_steps(len(dataset), config.batch_size, epochs) for epochs in (config.heads_epochs, config.refine_epochs)]
    return stage2 * steps[0] + stage3 * steps[1]


def refine_encoder(
    refiner: MIMRefiner,
    dataset: Dataset,
    *,
    num_workers: int = 0,
    run: Run | None = None,
    memory: Memory = PLENTY,
    monitor: Monitor | None = None,
) -> tuple[nn.Module, pd.DataFrame, float]:
    """Stage 3: train encoder and heads of ``refiner`` in place; returns the encoder's moving average, history and FLOPs."""
    config = refiner.config
    run = Run(None, {}) if run is None else run
    refiner.encoder.requires_grad_(True).train()
    freeze_first(refiner.encoder, config.frozen_blocks)
    freeze_behind(refiner.encoder, max(refiner.blocks))
    decay = ema_decay(config, stage_steps(len(dataset), config.batch_size, config.refine_epochs))
    ema = copy.deepcopy(refiner.encoder)
    plain = copy.deepcopy(refiner.encoder).cpu() if memory.shard else None
    for model in (refiner.encoder, ema) if memory.shard else ():
        distributed.shard(model)
    groups = layer_decay_groups(refiner.encoder, config.encoder_weight_decay, config.layer_decay)
    groups += param_groups_weight_decay(refiner.heads, config.head_weight_decay)
    recipe = Recipe(3, config.refine_epochs, config.refine_base_lr, config.refine_top_k, config.loss_schedule)
    with recomputed(refiner.encoder) if memory.recompute else nullcontext():
        _contrastive_stage(refiner, dataset, groups, recipe, run, num_workers, memory, monitor, ema, decay)
    if memory.shard:
        ema = _unsharded(ema, copy.deepcopy(plain))
        refiner.encoder = _unsharded(refiner.encoder, plain)
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
    monitor: Monitor | None,
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
        dataset, config.views, batch_size=config.batch_size, steps=steps, seed=8 * config.seed + stage, mean=mean, std=std,
        device=device, num_workers=num_workers, first_step=first, part=(distributed.rank(), distributed.world()),
    )  # fmt: skip
    generator = torch.Generator()
    refiner.heads.train()
    weights = [head_weights(recipe.loss_schedule, len(refiner.blocks), step / steps) for step in range(steps)]
    weights = torch.tensor(weights, device=device)  # (steps, heads), there at once: a copy in every step would stop the GPU
    names = [f" in the head on block {block} (0-based)" for block in refiner.blocks]
    meter = Meter(config.batch_size, device)
    through = distributed.averaged(refiner.encoder), distributed.averaged(refiner.heads)
    with sigterm_stops(), advice_on_memory(ADVICE), plain_attention(refiner.encoder, device):
        for step, batch in enumerate(progress(meter.waiting(batches), f"stage {stage}", steps - first), first):
            lr = set_lr(optimizer, cosine_lr(step, steps, config.warmup_epochs * per_epoch, peak, config.min_lr))
            generator.manual_seed(_step_seed(config.seed, stage, step))
            with FlopCounterMode(display=False) if step == 0 else torch.enable_grad() as counter:
                optimizer.zero_grad()
                how = {"top_k": recipe.top_k, "generator": generator, "micro_batch": memory.micro_batch}
                result = forward_backward(refiner, *batch, **how, weights=weights[step], through=through)
            run.flops += counter.get_total_flops() * steps * distributed.world() if step == 0 else 0
            if config.clip_norm is not None:
                distributed.clip_gradients(refiner.parameters(), config.clip_norm)
            optimizer.step()
            if ema is not None:
                distributed.update_average(ema, refiner.encoder, decay if step > 0 else 0.0)  # starts behind the first step
            loss = distributed.mean(result.loss.detach())
            run.watch(step, loss)
            if is_logged(step, steps):
                run.check_finite(names)
                columns = {"loss": loss, **{name: distributed.mean(x) for name, x in result.metrics.items()}}
                columns = {name: x.tolist() for name, x in columns.items()}
                for head, block in enumerate(refiner.blocks):
                    values = {name: x[head] for name, x in columns.items()}
                    run.rows.append({"stage": stage, "step": step, "epoch": step / per_epoch, "lr": lr, "block": block, **values})
            if monitor is not None and ((step + 1) % per_epoch == 0 or step + 1 == steps):
                run.epochs.append({"stage": stage, "epoch": (step + 1) / per_epoch, **meter.read()})
                monitor.measure(refiner, run.epochs)
                meter.start()
            run.end_step(step, names)


def _unsharded(model: nn.Module, plain: nn.Module) -> nn.Module:
    """``plain``, a copy of ``model`` from before it was sharded, with the weights that ``model`` has now."""
    plain.load_state_dict(distributed.whole(model.state_dict()))
    return plain


def run_settings(config: PretrainConfig | RefineConfig, dataset: Dataset, model: nn.Module) -> dict:
    """What a resumed run must share with the interrupted one. Data are told apart by content (they may have moved to another
    folder), those that are no :class:`mimrefiner.data.ImageDataset` by the number of images alone."""
    data = data_hash(dataset) if isinstance(dataset, ImageDataset) else ""
    return {**asdict(config), "data": data, "images": len(dataset), "first weights": sha256_of(model)}


def _step_seed(seed: int, stage: int, step: int) -> int:
    return (8 * seed + stage << 32) + step


def is_logged(step: int, steps: int) -> bool:
    return step % max(1, steps // LOG_POINTS) == 0 or step == steps - 1
