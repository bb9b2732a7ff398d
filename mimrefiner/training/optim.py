"""Steps, learning rates and parameter groups of training."""

import math

import torch
from torch import nn

from mimrefiner.config import RefineConfig
from mimrefiner.training.engine import local


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """``average`` = decay * ``average`` + (1 - decay) * ``model``, buffers copied; each process
    sees to its own part.

    (:class:`torch.optim.swa_utils.AveragedModel` waits for the GPU at every update.)
    """
    weights = [[local(x) for x in part.parameters()] for part in (average, model)]
    torch._foreach_lerp_(*weights, 1 - decay)
    for ours, theirs in zip(average.buffers(), model.buffers(), strict=True):
        ours.copy_(theirs)


def head_weights(schedule: str, heads: int, progress: float) -> list[float]:
    """The weight of every head's loss when ``progress`` (0..1) of stage 3 is over; the last head's
    is always 1.

    The schedules of the released ablations (``src/yamls/stage3/ablations``), whose times are here
    shares of training: ``"uniform decay"``: 1 for a fifth of it, then a cosine to 0. ``"staggered
    decay"``: the same, but every later block begins to decay later. ``"staggered step"``: 0 at once
    where that begins to decay. ``"one-hot"``: 0.1 before, 1 until the next block's turn, then 0.
    ``"constant"``: 1, as in the paper.
    """
    weights = []
    for head in range(heads - 1):
        begin, end = (0.2 + 0.7 * turn / (heads - 1) for turn in (head, head + 1))
        begin = 0.2 if schedule == "uniform decay" else begin
        decayed = 0.5 + 0.5 * math.cos(math.pi * max(0.0, progress - begin) / (1 - begin))
        if schedule == "constant":
            weights.append(1.0)
        elif schedule == "one-hot":
            weights.append(0.1 if progress < begin else float(progress < end))
        else:
            weights.append(float(progress < begin) if schedule == "staggered step" else decayed)
    return [*weights, 1.0]


def step_seed(seed: int, stage: int, step: int) -> int:
    return (8 * seed + stage << 32) + step


EMA_HORIZON = 0.27  # as a share of training


def stage_steps(images: int, batch_size: int, epochs: float) -> int:
    """Steps of a stage: whole batches only, at least one step."""
    return max(1, round(epochs * (images // batch_size)))


def cosine_lr(step: int, steps: int, warmup: float, peak: float, low: float) -> float:
    """Linear warm-up over ``warmup`` steps to ``peak``, then half a cosine to ``low``."""
    warmup = min(warmup, steps / 2)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return low + (peak - low) * 0.5 * (
        1 + math.cos(math.pi * (step - warmup) / max(1, steps - 1 - warmup))
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> float:
    """Set every group's rate to ``lr`` times its layer's scale (timm's ``lr_scale``); returns
    ``lr``.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr


def ema_decay(config: RefineConfig, steps: int) -> float:
    """The configured decay, or the one that averages over 27 % of training."""
    return (
        config.ema_decay
        if config.ema_decay is not None
        else max(0.0, 1 - 1 / (EMA_HORIZON * steps))
    )


def freeze_first(encoder: nn.Module, blocks: int) -> None:
    """Freeze patch embedding, cls token, positions and the first ``blocks`` blocks (0: nothing); no
    graph is kept for them.
    """
    if blocks:
        for name, x in encoder.named_parameters():
            part = name.split(".")
            if part[0] in ("norm", "fc_norm") or (part[0] == "blocks" and int(part[1]) >= blocks):
                continue
            x.requires_grad_(False)


def freeze_behind(encoder: nn.Module, block: int) -> None:
    """Freeze what lies behind ``block`` (0-based), the last one with a head: no loss reaches it."""
    if block < len(encoder.blocks) - 1:
        for part in (*encoder.blocks[block + 1 :], encoder.norm):
            part.requires_grad_(False)


def layer_decay_groups(encoder: nn.Module, weight_decay: float, layer_decay: float) -> list[dict]:
    """Parameter groups whose rates shrink towards the input (``layerwise_lr_decay_modifier.py`` of
    the released code).

    ``lr_scale`` is 1 for the final norm, ``layer_decay ** (depth - i)`` for block i (0-based) and
    ``layer_decay ** (depth + 1)`` for everything before the blocks. Tokens, positions and
    one-dimensional parameters are not decayed; frozen ones are left out.
    """
    depth, plain = len(encoder.blocks), undecayed(encoder)
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, x in encoder.named_parameters():
        part = name.split(".")
        power = (
            depth - int(part[1])
            if part[0] == "blocks"
            else 0
            if part[0] in ("norm", "fc_norm")
            else depth + 1
        )
        if x.requires_grad:
            groups.setdefault((power, x.ndim > 1 and name not in plain), []).append(x)
    return [
        {"params": params, "lr_scale": layer_decay**power, "weight_decay": weight_decay * decayed}
        for (power, decayed), params in groups.items()
    ]


def undecayed(model: nn.Module) -> list[str]:
    """Tokens and positions are not decayed; one-dimensional parameters are not either, which timm
    sees to.
    """
    tokens = ("cls_token", "pos_embed", "reg_token", "mask_token")
    return [name for name, _ in model.named_parameters() if name.split(".")[-1] in tokens]
