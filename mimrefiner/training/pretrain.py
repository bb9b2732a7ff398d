"""Stage 1, masked-image pre-training, as a plain loop."""

import copy
from dataclasses import dataclass
from functools import partial

import pandas as pd
import torch
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.utils.data import Dataset

from mimrefiner import distributed
from mimrefiner.config import PretrainConfig
from mimrefiner.data.augment import plain_views
from mimrefiner.data.loaders import ahead
from mimrefiner.device import autocast, device_of, plain_attention
from mimrefiner.models.masked import MAE, SimMIM, build_masked_model, random_mask
from mimrefiner.training import engine
from mimrefiner.training.checkpoints import Saving
from mimrefiner.training.cost import warn_of_pretraining
from mimrefiner.training.memory import PRETRAIN_ADVICE, advice_on_memory
from mimrefiner.training.optim import Stage, step_seed, undecayed
from mimrefiner.training.run import TrainingRun, run_settings, sigterm_stops


@dataclass
class PretrainResult:
    """What pre-training gives.

    Attributes:
        model: the pre-training model, on the CPU in eval mode.
        encoder: the encoder inside ``model``.
        history: one row per logged step.
        flops: floating point operations of all steps, counted on the first.
        seconds: wall time.
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
        config: the recipe; its seed decides order, crops and masks. Dropout and drop path, where
            the encoder has any, draw from torch's global generator.
        start_from: a pre-training model to go on from, in a new learning-rate cycle; its encoder
            replaces ``encoder``.
        device: where to train; None takes a GPU where there is one.
        num_workers: processes that load images.
        saving: checkpoints and resuming; None for none.
        shard: let every process keep only its part of the model, see
            :class:`mimrefiner.training.memory.Memory`.

    Raises:
        FloatingPointError: the loss is not finite.
        mimrefiner.errors.Stopped: SIGTERM came.

    >>> import mimrefiner as mr
    >>> digits = mr.load_dataset("digits", split="train").take(16)
    >>> config = mr.PretrainConfig(epochs=2, batch_size=8)
    >>> result = mr.pretrain(mr.build_vit(mr.ViTConfig(dim=16, depth=2)), digits, config)
    >>> list(result.history)
    ['stage', 'step', 'epoch', 'lr', 'loss']
    >>> result.history["epoch"].tolist()
    [0.0, 0.5, 1.0, 1.5]
    """
    device = device_of(device)
    model = copy.deepcopy(start_from)
    if model is None:
        model = build_masked_model(copy.deepcopy(encoder), config)
    settings = partial(run_settings, config, dataset, model)
    run = TrainingRun(saving, settings, num_workers=num_workers)
    plain = copy.deepcopy(model) if shard else None
    warn_of_pretraining(model, config, device, shard)
    model.train().to(device)
    if shard:
        engine.shard(model)
    _masked_stage(model, dataset, config, run)
    model = engine.unsharded(model, plain) if shard else model.cpu()
    model.eval()
    return PretrainResult(model, model.encoder, run.history, run.flops, run.seconds)


def _masked_stage(
    model: SimMIM | MAE, dataset: Dataset, config: PretrainConfig, run: TrainingRun
) -> None:
    through, device = engine.averaged(model), next(model.parameters()).device
    groups = param_groups_weight_decay(
        model, config.weight_decay, no_weight_decay_list=undecayed(model)
    )
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=config.betas, fused=True)
    per_epoch = max(1, len(dataset) // config.batch_size)
    steps = max(1, round(config.epochs * per_epoch))
    stage = Stage(
        number=1,
        steps=steps,
        images=per_epoch * config.batch_size,
        batch_size=config.batch_size,
        warmup=config.warmup_share * steps,
        base_lr=config.base_lr,
        min_lr=config.min_lr,
        clip_norm=config.clip_norm,
    )
    run.begin(stage, model=model, optimizer=optimizer)
    size = model.encoder.patch_embed.img_size[0]
    patches = (size // model.patch) ** 2
    views = plain_views(size, config.crop_scale, config.flip)
    batches = run.steps(f"pretrain ({config.method})", dataset, views, config.seed)

    def drawn(step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(step_seed(config.seed, 1, step))
        mask = random_mask(config.batch_size, patches, config.mask_ratio, generator)
        return mask.chunk(distributed.world())[distributed.rank()]

    masks = map(drawn, range(run.first, steps))
    masks = ahead(masks) if device.type == "cuda" else masks
    with sigterm_stops(), advice_on_memory(PRETRAIN_ADVICE), plain_attention(model, device):
        for (step, ((images,), _, _)), mask in zip(batches, masks, strict=False):
            with run.counted(step):
                with autocast(device, model.encoder):
                    loss = through(partial(model, images, mask))
                optimizer.zero_grad()
                loss.backward()
            run.descend()
            run.end_step(step, loss)
