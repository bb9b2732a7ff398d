"""Stage 1, masked-image pre-training, as a plain loop."""

import copy
from dataclasses import dataclass
from functools import partial

import pandas as pd
import torch
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

from mimrefiner import distributed
from mimrefiner.config import Crop, PretrainConfig, Views
from mimrefiner.data.views import view_batches
from mimrefiner.device import autocast, default_device, plain_attention
from mimrefiner.models.encoders import normalisation
from mimrefiner.models.masked import MAE, SimMIM, build_masked_model, random_mask
from mimrefiner.progress import progress
from mimrefiner.training import engine
from mimrefiner.training.checkpoints import Saving
from mimrefiner.training.cost import warn_of_pretraining
from mimrefiner.training.engine import unsharded
from mimrefiner.training.memory import PRETRAIN_ADVICE, advice_on_memory
from mimrefiner.training.optim import cosine_lr, set_lr, step_seed, undecayed
from mimrefiner.training.run import Run, is_logged, run_settings, sigterm_stops


@dataclass
class PretrainResult:
    """``model``: the pre-training model on the CPU, with ``encoder`` inside; ``history``: one row
    per logged step.

    ``flops``: floating point operations of all steps, counted on the first; ``seconds``: wall time.
    """

    model: SimMIM | MAE
    encoder: nn.Module
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
    saving: Saving | None = None,
    shard: bool = False,
) -> PretrainResult:
    """Stage 1: masked-image pre-training of a copy of ``encoder``.

    Args:
        encoder: a timm VisionTransformer.
        dataset: map-style, (image, label); labels are not used.
        config: recipe; ``config.seed`` decides order, crops and masks. Dropout and drop path, where
            ``encoder`` has any, draw from torch's global generator.
        start_from: go on from this pre-training model (its encoder replaces ``encoder``) with a new
            learning-rate cycle.
        device, num_workers: where to train (None: a GPU where there is one), and loader processes.
        saving: checkpoints and resuming; None for none.
        shard: let every process keep its part of the model only, see
            :class:`mimrefiner.training.memory.Memory`.

    Raises:
        FloatingPointError: the loss is not finite.
        mimrefiner.errors.Stopped: SIGTERM came.
    """
    device = torch.device(device) if device is not None else default_device()
    model = (
        copy.deepcopy(start_from)
        if start_from is not None
        else build_masked_model(copy.deepcopy(encoder), config)
    )
    run = Run(saving, {} if saving is None else run_settings(config, dataset, model))
    plain = copy.deepcopy(model) if shard else None
    warn_of_pretraining(model, config, device, shard)
    model.train().to(device)
    if shard:
        engine.shard(model)
    through = engine.averaged(model)
    size = model.encoder.patch_embed.img_size[0]
    crop = Crop(size, config.crop_scale, flip_p=0.5 * config.flip, jitter_p=0.0, grey_p=0.0)
    per_epoch = max(1, len(dataset) // config.batch_size)
    steps = max(1, round(config.epochs * per_epoch))
    groups = param_groups_weight_decay(
        model, config.weight_decay, no_weight_decay_list=undecayed(model)
    )
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=config.betas, fused=True)
    peak = config.base_lr * config.batch_size / 256
    mean, std = normalisation(model.encoder)
    first = run.begin(1, steps, model=model, optimizer=optimizer)
    part = (distributed.rank(), distributed.world())
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
        part=part,
    )
    generator = torch.Generator()
    with sigterm_stops(), advice_on_memory(PRETRAIN_ADVICE), plain_attention(model, device):
        for step, (views, _, _) in enumerate(
            progress(batches, f"pretrain ({config.method})", steps - first), first
        ):
            lr = set_lr(
                optimizer, cosine_lr(step, steps, config.warmup_share * steps, peak, config.min_lr)
            )
            images = views[0]
            generator.manual_seed(step_seed(config.seed, 1, step))
            mask = random_mask(
                config.batch_size, (size // model.patch) ** 2, config.mask_ratio, generator
            )
            mask = mask.chunk(part[1])[part[0]]
            with FlopCounterMode(display=False) if step == 0 else torch.enable_grad() as counter:
                with autocast(device, model.encoder):
                    loss = through(partial(model, images, mask))
                optimizer.zero_grad()
                loss.backward()
            run.flops += counter.get_total_flops() * steps * part[1] if step == 0 else 0
            if config.clip_norm is not None:
                engine.clip_gradients(model.parameters(), config.clip_norm)
            optimizer.step()
            loss = distributed.mean(loss)
            run.watch(step, loss[None])
            if is_logged(step, steps):
                run.check_finite([""])
                run.rows.append(
                    {
                        "stage": 1,
                        "step": step,
                        "epoch": step / per_epoch,
                        "lr": lr,
                        "loss": loss.item(),
                    }
                )
            run.end_step(step, [""])
    model = unsharded(model, plain) if shard else model.cpu()
    model.eval()
    return PretrainResult(model, model.encoder, run.history, run.flops, run.seconds)
