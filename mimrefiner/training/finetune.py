"""Fine-tuning with labels: the control that says what the computation of refinement would buy where
every image has a label.
"""

import copy
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

from mimrefiner.config import Crop, RefineConfig, Views
from mimrefiner.data.views import view_batches
from mimrefiner.device import autocast, default_device, plain_attention
from mimrefiner.errors import InputError
from mimrefiner.models.encoders import normalisation
from mimrefiner.models.weights import sha256_of
from mimrefiner.progress import progress
from mimrefiner.training.checkpoints import Saving
from mimrefiner.training.optim import cosine_lr, freeze_first, layer_decay_groups, set_lr
from mimrefiner.training.run import Run, is_logged, sigterm_stops


class Classifier(nn.Module):
    """An encoder and a linear layer on its cls token after the final LayerNorm."""

    def __init__(self, encoder: nn.Module, classes: int):
        super().__init__()
        self.encoder = encoder
        self.linear = nn.Linear(encoder.embed_dim, classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits, (batch, classes)."""
        return self.linear(self.encoder.forward_features(images)[:, 0])


@dataclass
class FinetuneResult:
    """``encoder``: in eval mode on the CPU; ``history``: one row per logged step; ``epochs``: of
    the images; ``flops`` and wall ``seconds`` of all steps.
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
        config: of refinement: batch size, rates, decays and frozen blocks are those of its stage 3;
            the view is a random resized crop (8 to 100 % of the area) with a flip.
        flops: floating point operations to spend, which decide the number of steps.
        device, num_workers, saving: see :func:`mimrefiner.training.pretrain.pretrain`.

    Raises:
        InputError: images without labels.
    """
    if dataset.labels is None or min(dataset.labels) < 0:
        raise InputError("fine-tuning needs a label for every image")
    device = torch.device(device) if device is not None else default_device()
    classes = np.unique(dataset.labels)
    model = Classifier(copy.deepcopy(encoder), len(classes)).train().to(device)
    freeze_first(model.encoder, config.frozen_blocks)
    groups = layer_decay_groups(model.encoder, config.encoder_weight_decay, config.layer_decay)
    groups.append(
        {"params": list(model.linear.parameters()), "weight_decay": config.head_weight_decay}
    )
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=config.betas, fused=True)
    size = encoder.pretrained_cfg["input_size"][-1]
    flops_per_step = _flops_per_step(model, config.batch_size, size, device)
    steps = max(1, round(flops / flops_per_step))
    warmup = steps * config.warmup_epochs / config.refine_epochs
    peak = config.refine_base_lr * config.batch_size / 256
    run = Run(
        saving,
        {
            **asdict(config),
            "images": len(dataset),
            "flops": flops,
            "first weights": sha256_of(encoder),
        },
    )
    first = run.begin(1, steps, model=model, optimizer=optimizer)
    crop = Crop(size, (0.08, 1.0), flip_p=0.5, jitter_p=0.0, grey_p=0.0)
    mean, std = normalisation(encoder)
    batches = view_batches(
        dataset,
        Views((crop,), crop, 0),
        batch_size=config.batch_size,
        steps=steps,
        seed=config.seed,
        mean=mean,
        std=std,
        device=device,
        num_workers=num_workers,
        first_step=first,
    )
    known = torch.from_numpy(classes).to(device)
    with sigterm_stops(), plain_attention(model, device):
        for step, (views, _, label) in enumerate(
            progress(batches, "fine-tune", steps - first), first
        ):
            lr = set_lr(optimizer, cosine_lr(step, steps, warmup, peak, config.min_lr))
            with autocast(device, model.encoder):
                loss = F.cross_entropy(model(views[0]), torch.searchsorted(known, label))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.watch(step, loss[None])
            if is_logged(step, steps):
                run.check_finite([""])
                epoch = step * config.batch_size / len(dataset)
                run.rows.append({"step": step, "epoch": epoch, "lr": lr, "loss": loss.item()})
            run.end_step(step, [""])
    tuned, epochs = (
        model.encoder.eval().requires_grad_(True).cpu(),
        steps * config.batch_size / len(dataset),
    )
    return FinetuneResult(tuned, run.history, epochs, flops_per_step * steps, run.seconds)


def _flops_per_step(model: Classifier, batch: int, size: int, device: torch.device) -> int:
    """Floating point operations of one step, counted on two images."""
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, 3, size, size, device=device)).sum().backward()
    model.zero_grad()
    return counter.get_total_flops() * batch // 2
