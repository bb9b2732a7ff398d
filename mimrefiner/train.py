"""The three training stages as plain loops: pretrain (1), heads only (2), heads and encoder (3)."""

import copy
import math
import time
from dataclasses import dataclass

import pandas as pd
import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

from mimrefiner.augment import Crop, Views
from mimrefiner.config import PretrainConfig, RefineConfig
from mimrefiner.data import view_batches
from mimrefiner.masked import MAE, SimMIM, build_masked_model, random_mask
from mimrefiner.models import default_device, normalisation
from mimrefiner.progress import progress
from mimrefiner.refiner import MIMRefiner

LOG_POINTS = 100  # history rows per stage, so that metrics do not stop the GPU at every step
EMA_HORIZON = 0.27  # as a share of training


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

    ``history``: one row per logged step and head; ``flops`` and ``seconds`` of both stages together.
    """

    encoder: nn.Module
    ema_encoder: nn.Module
    history: pd.DataFrame
    flops: float
    seconds: float


def pretrain(
    encoder: nn.Module,
    dataset: Dataset,
    config: PretrainConfig,
    *,
    start_from: SimMIM | MAE | None = None,
    device: torch.device | str | None = None,
    num_workers: int = 0,
) -> PretrainResult:
    """Stage 1: masked-image pre-training of a copy of ``encoder``.

    Args:
        encoder: a timm VisionTransformer.
        dataset: map-style, (image, label); labels are not used.
        config: recipe; everything random follows from ``config.seed``.
        start_from: go on from this pre-training model (its encoder replaces ``encoder``) with a new learning-rate cycle.
        device, num_workers: where to train (None: a GPU where there is one), and loader processes.
    """
    device = torch.device(device) if device is not None else default_device()
    model = copy.deepcopy(start_from) if start_from is not None else build_masked_model(copy.deepcopy(encoder), config)
    model.train().to(device)
    size = model.encoder.patch_embed.img_size[0]
    crop = Crop(size, config.crop_scale, flip_p=0.5 * config.flip, jitter_p=0.0, grey_p=0.0)
    per_epoch = max(1, len(dataset) // config.batch_size)
    steps = max(1, round(config.epochs * per_epoch))
    groups = param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=_undecayed(model))
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=config.betas, fused=device.type == "cuda")
    peak = config.base_lr * config.batch_size / 256
    mean, std = normalisation(model.encoder)
    batches = view_batches(
        dataset, Views((crop,), crop, 0), batch_size=config.batch_size, steps=steps, seed=config.seed, mean=mean, std=std,
        device=device, num_workers=num_workers,
    )  # fmt: skip
    generator = torch.Generator()
    rows, flops, began = [], 0, time.perf_counter()
    for step, (views, _, _) in enumerate(progress(batches, f"pretrain ({config.method})", steps)):
        lr = set_lr(optimizer, cosine_lr(step, steps, config.warmup_share * steps, peak, config.min_lr))
        images = views[0]
        generator.manual_seed(_step_seed(config.seed, 1, step))
        mask = random_mask(len(images), (size // model.patch) ** 2, config.mask_ratio, generator).to(device)
        with FlopCounterMode(display=False) if step == 0 else torch.enable_grad() as counter:
            with _autocast(device, model.encoder):
                loss = model(images, mask)
            optimizer.zero_grad()
            loss.backward()
        flops += counter.get_total_flops() * steps if step == 0 else 0
        optimizer.step()
        if _is_logged(step, steps):
            rows.append({"stage": 1, "step": step, "epoch": step / per_epoch, "lr": lr, "loss": _finite(loss, step)})
    model.eval().cpu()
    return PretrainResult(model, model.encoder, pd.DataFrame(rows), flops, time.perf_counter() - began)


def refine(
    encoder: nn.Module,
    dataset: Dataset,
    config: RefineConfig,
    *,
    device: torch.device | str | None = None,
    num_workers: int = 0,
) -> RefineResult:
    """Stages 2 and 3 on a copy of ``encoder``: prepare the heads, then train encoder and heads.

    Args:
        encoder: a timm ViT.
        dataset: map-style, (image, label); labels are used for metrics only.
        config: recipe; everything random follows from ``config.seed``.
        device, num_workers: where to train (None: a GPU where there is one), and loader processes.

    Raises:
        InputError: see :class:`mimrefiner.refiner.MIMRefiner`.
    """
    device = torch.device(device) if device is not None else default_device()
    began = time.perf_counter()
    refiner = MIMRefiner(copy.deepcopy(encoder), config).to(device)
    history, flops = train_heads(refiner, dataset, num_workers=num_workers)
    ema_encoder, more_history, more_flops = refine_encoder(refiner, dataset, num_workers=num_workers)
    history = pd.concat([history, more_history], ignore_index=True)
    raw = refiner.encoder.eval().requires_grad_(True).cpu()
    return RefineResult(raw, ema_encoder, history, flops + more_flops, time.perf_counter() - began)


def train_heads(refiner: MIMRefiner, dataset: Dataset, *, num_workers: int = 0) -> tuple[pd.DataFrame, float]:
    """Stage 2: train the heads of ``refiner`` in place on a frozen encoder; returns history and FLOPs.

    Raises:
        AssertionError: should the encoder have changed.
    """
    config = refiner.config
    before = [x.clone() for x in refiner.encoder.state_dict().values()]
    refiner.encoder.requires_grad_(False).eval()
    groups = param_groups_weight_decay(refiner.heads, config.head_weight_decay)
    result = _contrastive_stage(
        refiner, dataset, groups, 2, config.heads_epochs, config.heads_base_lr, config.heads_top_k, num_workers
    )
    after = refiner.encoder.state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "stage 2 changed the encoder"
    return result


def refine_encoder(refiner: MIMRefiner, dataset: Dataset, *, num_workers: int = 0) -> tuple[nn.Module, pd.DataFrame, float]:
    """Stage 3: train encoder and heads of ``refiner`` in place; returns the encoder's moving average, history and FLOPs."""
    config = refiner.config
    refiner.encoder.requires_grad_(True).train()
    freeze_first(refiner.encoder, config.frozen_blocks)
    groups = layer_decay_groups(refiner.encoder, config.encoder_weight_decay, config.layer_decay)
    groups += param_groups_weight_decay(refiner.heads, config.head_weight_decay)
    steps = stage_steps(len(dataset), config.batch_size, config.refine_epochs)
    decay = ema_decay(config, steps)
    ema = AveragedModel(refiner.encoder, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    history, flops = _contrastive_stage(
        refiner, dataset, groups, 3, config.refine_epochs, config.refine_base_lr, config.refine_top_k, num_workers, ema
    )
    return ema.module.eval().requires_grad_(True).cpu(), history, flops


def _contrastive_stage(
    refiner: MIMRefiner,
    dataset: Dataset,
    groups: list[dict],
    stage: int,
    epochs: float,
    base_lr: float,
    top_k: int,
    num_workers: int,
    ema: AveragedModel | None = None,
) -> tuple[pd.DataFrame, float]:
    config = refiner.config
    device = next(refiner.parameters()).device
    steps = stage_steps(len(dataset), config.batch_size, epochs)
    per_epoch = len(dataset) // config.batch_size
    peak = base_lr * config.batch_size / 256
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=config.betas, fused=device.type == "cuda")
    mean, std = normalisation(refiner.encoder)
    batches = view_batches(
        dataset, config.views, batch_size=config.batch_size, steps=steps, seed=8 * config.seed + stage, mean=mean, std=std,
        device=device, num_workers=num_workers,
    )  # fmt: skip
    generator = torch.Generator()
    refiner.heads.train()
    rows, flops = [], 0
    for step, (views, index, label) in enumerate(progress(batches, f"stage {stage}", steps)):
        lr = set_lr(optimizer, cosine_lr(step, steps, config.warmup_epochs * per_epoch, peak, config.min_lr))
        generator.manual_seed(_step_seed(config.seed, stage, step))
        with FlopCounterMode(display=False) if step == 0 else torch.enable_grad() as counter:
            with _autocast(device, refiner.encoder):
                result = refiner.step(views, index, label, top_k=top_k, generator=generator)
            optimizer.zero_grad()
            result.loss.sum().backward()
        flops += counter.get_total_flops() * steps if step == 0 else 0
        optimizer.step()
        if ema is not None:
            ema.update_parameters(refiner.encoder)
        if _is_logged(step, steps):
            _finite(result.loss.sum(), step)
            columns = {"loss": result.loss.detach(), **result.metrics}
            columns = {name: x.tolist() for name, x in columns.items()}
            for head, block in enumerate(refiner.blocks):
                values = {name: x[head] for name, x in columns.items()}
                rows.append({"stage": stage, "step": step, "epoch": step / per_epoch, "lr": lr, "block": block, **values})
    return pd.DataFrame(rows), flops


def stage_steps(images: int, batch_size: int, epochs: float) -> int:
    """Steps of a stage: whole batches only, at least one step."""
    return max(1, round(epochs * (images // batch_size)))


def cosine_lr(step: int, steps: int, warmup: float, peak: float, low: float) -> float:
    """Linear warm-up over ``warmup`` steps to ``peak``, then half a cosine to ``low``."""
    warmup = min(warmup, steps / 2)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - 1 - warmup)))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> float:
    """Set every group's rate to ``lr`` times its layer's scale (timm's ``lr_scale``); returns ``lr``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr


def ema_decay(config: RefineConfig, steps: int) -> float:
    """The configured decay, or the one that averages over 27 % of training."""
    return config.ema_decay if config.ema_decay is not None else max(0.0, 1 - 1 / (EMA_HORIZON * steps))


def freeze_first(encoder: nn.Module, blocks: int) -> None:
    """Freeze patch embedding, cls token, positions and the first ``blocks`` blocks (0: nothing); no graph is kept for them."""
    if blocks:
        for name, x in encoder.named_parameters():
            part = name.split(".")
            if part[0] in ("norm", "fc_norm") or (part[0] == "blocks" and int(part[1]) >= blocks):
                continue
            x.requires_grad_(False)


def layer_decay_groups(encoder: nn.Module, weight_decay: float, layer_decay: float) -> list[dict]:
    """Parameter groups whose rates shrink towards the input (``layerwise_lr_decay_modifier.py`` of the released code).

    ``lr_scale`` is 1 for the final norm, ``layer_decay ** (depth - i)`` for block i (0-based) and ``layer_decay ** (depth + 1)``
    for everything before the blocks. Tokens, positions and one-dimensional parameters are not decayed; frozen ones are left out.
    """
    depth, undecayed = len(encoder.blocks), _undecayed(encoder)
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, x in encoder.named_parameters():
        part = name.split(".")
        power = depth - int(part[1]) if part[0] == "blocks" else 0 if part[0] in ("norm", "fc_norm") else depth + 1
        if x.requires_grad:
            groups.setdefault((power, x.ndim > 1 and name not in undecayed), []).append(x)
    return [
        {"params": params, "lr_scale": layer_decay**power, "weight_decay": weight_decay * decayed}
        for (power, decayed), params in groups.items()
    ]


def _undecayed(model: nn.Module) -> list[str]:
    """Tokens and positions are not decayed; one-dimensional parameters are not either, which timm sees to."""
    tokens = ("cls_token", "pos_embed", "reg_token", "mask_token")
    return [name for name, _ in model.named_parameters() if name.split(".")[-1] in tokens]


def _autocast(device: torch.device, encoder: nn.Module) -> torch.autocast:
    """bfloat16 where it helps: on GPUs, and on CPUs from width 192 up."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" or encoder.embed_dim >= 192)


def _step_seed(seed: int, stage: int, step: int) -> int:
    return (8 * seed + stage << 32) + step


def _is_logged(step: int, steps: int) -> bool:
    return step % max(1, steps // LOG_POINTS) == 0 or step == steps - 1


def _finite(loss: Tensor, step: int) -> float:
    value = loss.item()
    if not math.isfinite(value):
        raise FloatingPointError(f"the loss became {value} at step {step}: lower the learning rate or raise the temperature")
    return value
