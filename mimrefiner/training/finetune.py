"""Fine-tuning with labels: what the computation of refinement buys where all images have one."""

import copy
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

from mimrefiner.config import RefineConfig
from mimrefiner.data.augment import plain_views
from mimrefiner.device import autocast, default_device, plain_attention
from mimrefiner.errors import InputError
from mimrefiner.training import engine
from mimrefiner.training.checkpoints import Saving
from mimrefiner.training.memory import advice_on_memory
from mimrefiner.training.optim import Stage, freeze_first, layer_decay_groups
from mimrefiner.training.run import TrainingRun, run_settings, sigterm_stops

ADVICE = "freeze the first blocks (frozen_blocks) or take a smaller batch (batch_size)"


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
    device = torch.device(device) if device is not None else default_device()
    classes = torch.from_numpy(np.unique(dataset.labels)).to(device)
    model = Classifier(copy.deepcopy(encoder), len(classes)).train().to(device)
    freeze_first(model.encoder, config.frozen_blocks)
    size = encoder.pretrained_cfg["input_size"][-1]
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
    views = plain_views(model.encoder.pretrained_cfg["input_size"][-1], (0.08, 1.0))
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
    counter = FlopCounterMode(display=False)
    with advice_on_memory(ADVICE), plain_attention(model, device), counter:
        model(torch.zeros(2, 3, size, size, device=device)).sum().backward()
    model.zero_grad()
    return counter.get_total_flops() * batch // 2
