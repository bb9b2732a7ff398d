"""Steps, learning rates, parameter groups and averages of training."""

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from mimrefiner.config import RefineConfig
from mimrefiner.training.engine import local

EMA_HORIZON = 0.27  # as a share of training
LOG_POINTS = 100  # rows of history per stage and head: each one makes the GPU wait


@dataclass(frozen=True)
class Stage:
    """The frame of one loop: its steps, epochs, learning rates and losses.

    Attributes:
        number: 1 trains a model without heads, 2 trains heads, 3 encoder and heads.
        steps: how many there are.
        images: images of an epoch.
        batch_size: images of a step, those of all processes together.
        warmup: steps in which the learning rate rises.
        base_lr: the highest learning rate, for 256 images.
        min_lr: the learning rate of the last step.
        clip_norm: limits the norm of all gradients together; None sets no limit.
        blocks: the blocks (0-based) whose heads have a loss each; () where there is one loss.
    """

    number: int
    steps: int
    images: int
    batch_size: int
    warmup: float
    base_lr: float
    min_lr: float
    clip_norm: float | None = None
    blocks: tuple[int, ...] = ()

    def lr(self, step: int) -> float:
        """The learning rate of a step (0-based)."""
        peak = self.base_lr * self.batch_size / 256
        return cosine_lr(step, self.steps, self.warmup, peak, self.min_lr)

    def epoch(self, step: int) -> float:
        """How many epochs are over when ``step`` begins."""
        return step * self.batch_size / self.images

    def is_logged(self, step: int) -> bool:
        """Whether the history has a row of this step."""
        return step % max(1, self.steps // LOG_POINTS) == 0 or step == self.steps - 1

    def ends_epoch(self, step: int) -> bool:
        """Whether an epoch, or the stage, ends with this step."""
        done = step + 1
        return done * self.batch_size % self.images == 0 or done == self.steps


@dataclass(frozen=True)
class LabelledStage(Stage):
    """The published schedule: the cosine would reach its end one step after the last.

    Attributes:
        warmup_to_peak: whether the last step of the rise has the highest rate already.
    """

    warmup_to_peak: bool = False

    def lr(self, step: int) -> float:
        """The learning rate of a step (0-based).

        >>> stage = LabelledStage(1, 6, 256, 256, warmup=2, base_lr=3.0, min_lr=0.0)
        >>> [round(stage.lr(step), 2) for step in range(6)]
        [1.0, 2.0, 3.0, 2.56, 1.5, 0.44]
        """
        peak, warmup = self.base_lr * self.batch_size / 256, int(min(self.warmup, self.steps / 2))
        if step < warmup:
            return peak * (step + 1) / (warmup + (not self.warmup_to_peak))
        over = (step - warmup) / (self.steps - warmup)
        return self.min_lr + (peak - self.min_lr) * (1 + math.cos(math.pi * over)) / 2


def stage_steps(images: int, batch_size: int, epochs: float) -> int:
    """Steps of a stage: whole batches only, and at least one."""
    return max(1, round(epochs * (images // batch_size)))


def step_seed(seed: int, stage: int, step: int) -> int:
    """The seed of what one step draws, different for every (seed, stage, step)."""
    return (8 * seed + stage << 32) + step


def cosine_lr(step: int, steps: int, warmup: float, peak: float, low: float) -> float:
    """Linear warm-up over ``warmup`` steps to ``peak``, then half a cosine to ``low``.

    >>> [round(cosine_lr(step, 5, warmup=1, peak=1.0, low=0.0), 2) for step in range(5)]
    [0.5, 1.0, 0.75, 0.25, 0.0]
    """
    warmup = min(warmup, steps / 2)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    over = (step - warmup) / max(1, steps - 1 - warmup)
    return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * over))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> float:
    """Set every group's rate to ``lr`` times its ``lr_scale`` (1 without one); returns ``lr``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr


def head_weights(schedule: str, heads: int, progress: float) -> list[float]:
    """The weight of every head's loss at a point of stage 3; the last head's is always 1.

    Args:
        schedule: one of the released ablations (``src/yamls/stage3/ablations``), whose times are
            shares of training here. ``"constant"``: 1, as in the paper. ``"uniform decay"``: 1 for
            a fifth of training, then a cosine to 0. ``"staggered decay"``: the same, but every
            later block begins to decay later. ``"staggered step"``: 0 at once where that begins to
            decay. ``"one-hot"``: 0.1 before, 1 until the next block's turn, then 0.
        heads: how many there are.
        progress: the share of the stage that is over, 0 to 1.

    >>> head_weights("staggered step", heads=3, progress=0.3)
    [0.0, 1.0, 1.0]
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


def ema_decay(config: RefineConfig, steps: int) -> float:
    """The configured decay, or the one that averages over 27 % of ``steps``."""
    if config.ema_decay is not None:
        return config.ema_decay
    return max(0.0, 1 - 1 / (EMA_HORIZON * steps))


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """``average`` = decay * ``average`` + (1 - decay) * ``model``, with buffers copied.

    Each process sees to its own part of sharded weights, and no GPU waits
    (:class:`torch.optim.swa_utils.AveragedModel` makes it wait at every update).
    """
    weights = [[local(x) for x in part.parameters()] for part in (average, model)]
    torch._foreach_lerp_(*weights, 1 - decay)
    for ours, theirs in zip(average.buffers(), model.buffers(), strict=True):
        ours.copy_(theirs)


def freeze_first(encoder: nn.Module, blocks: int) -> None:
    """Freeze the first ``blocks`` blocks and all before them, for which no graph is kept then.

    0 freezes nothing, not even the patch embedding.
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


def layer_decay_groups(
    encoder: nn.Module, weight_decay: float, layer_decay: float, *, decayed: Collection[str] = ()
) -> list[dict]:
    """Parameter groups whose rates shrink towards the input.

    ``lr_scale`` is 1 for the final norm, ``layer_decay ** (depth - i)`` for block i (0-based) and
    ``layer_decay ** (depth + 1)`` for everything before the blocks, as in the released code
    (``layerwise_lr_decay_modifier.py``). Tokens, positions and one-dimensional parameters have no
    weight decay, but those named in ``decayed``; frozen parameters are left out.

    ``timm.optim.param_groups_layer_decay`` counts the layers that an encoder has: without a final
    norm (data2vec 2.0) its exponents are smaller by one.
    """
    depth, plain = len(encoder.blocks), set(undecayed(encoder)) - set(decayed)
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, x in encoder.named_parameters():
        part = name.split(".")
        power = 0 if part[0] in ("norm", "fc_norm") else depth + 1
        if part[0] == "blocks":
            power = depth - int(part[1])
        if x.requires_grad:
            groups.setdefault((power, x.ndim > 1 and name not in plain), []).append(x)
    return [
        {"params": params, "lr_scale": layer_decay**power, "weight_decay": weight_decay * shrinks}
        for (power, shrinks), params in groups.items()
    ]


def undecayed(model: nn.Module) -> list[str]:
    """The names of tokens and positions, which have no weight decay, like norms and biases."""
    tokens = ("cls_token", "pos_embed", "reg_token", "mask_token")
    return [name for name, _ in model.named_parameters() if name.split(".")[-1] in tokens]
