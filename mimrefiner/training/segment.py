"""Fine-tuning of an encoder with UperNet for semantic segmentation, as the paper does on ADE20K."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

import pandas as pd
import torch
import torch.nn.functional as F
from timm.layers import RelPosBias
from torch import Tensor, nn
from torch.utils.data import Dataset

from mimrefiner import distributed
from mimrefiner.data.loaders import loaded
from mimrefiner.data.scenes import IGNORE, Labels, SceneBatches, SceneCrop, scenes_hash
from mimrefiner.device import autocast, device_of, plain_attention
from mimrefiner.errors import InputError
from mimrefiner.models.encoders import normalisation
from mimrefiner.models.layouts import ReleasedViT
from mimrefiner.models.upernet import UperNet, UperNetConfig
from mimrefiner.models.weights import sha256_of
from mimrefiner.training import engine
from mimrefiner.training.checkpoints import Saving
from mimrefiner.training.memory import advice_on_memory
from mimrefiner.training.optim import LabelledStage, layer_decay_groups
from mimrefiner.training.run import TrainingRun, sigterm_stops

ADVICE = "take a smaller batch (--batch-size), smaller images (--size) or more GPUs"

NETWORK = UperNetConfig()
SQUARES = SceneCrop(512, long=2048, short=512, jitter=(0.5, 0.5, 0.5, 0.25))


@dataclass(frozen=True)
class SegmentationRecipe:
    """How UperNet is fine-tuned; the defaults are the paper's for ADE20K.

    BenediktAlkin/KappaSegmentation at d1aec76, ``yamls/mimrefiner/*_l16_u160k_uper.yaml``; the
    learning rate is 2e-5 for 16 images and grows with the batch. Steps whose loss is not a number
    are skipped there; here a batch in which no pixel counts has the loss 0, and any other loss that
    is not finite ends the run.

    Attributes:
        model: the network.
        ignore_zero: label 0 means "no class", see :class:`~mimrefiner.data.scenes.Labels`.
        steps, batch_size: updates, and the images of each, those of all processes together.
        base_lr: of all parts, for 256 images: 2e-5 times 256 / 16.
        warmup: steps in which the learning rate rises.
        min_lr: the learning rate of the last step; like the whole schedule it is scaled in every
            layer of the encoder.
        layer_decay: factor of the rate from one encoder block to the one before it.
        weight_decay: none for biases, norms and other one-dimensional parameters, tokens and
            positions; none for tables of relative positions where the encoder is pre-norm.
        betas: of AdamW.
        auxiliary_weight: of the second head's loss.
        crop: how training squares are cut.
        evaluate_every: steps between two evaluations; one more follows the last step.
        seed: draws new weights, order, squares, drop path and dropout.

    >>> recipe = SegmentationRecipe()
    >>> recipe.steps, recipe.base_lr * recipe.batch_size / 256, recipe.model.size
    (160000, 2e-05, 512)
    """

    model: UperNetConfig = NETWORK
    ignore_zero: bool = True
    steps: int = 160_000
    batch_size: int = 16
    base_lr: float = 3.2e-4
    warmup: int = 1_500
    min_lr: float = 1e-6
    layer_decay: float = 0.95
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    auxiliary_weight: float = 0.4
    crop: SceneCrop = SQUARES
    evaluate_every: int = 10_000
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "batch_size", "evaluate_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be >= 1, got {getattr(self, name)}")

    @property
    def labels(self) -> Labels:
        """What the masks' numbers mean."""
        return Labels(self.model.classes, self.ignore_zero)

    def at(self, size: int) -> "SegmentationRecipe":
        """The same recipe for squares of ``size`` pixels: images shrink in proportion.

        >>> SegmentationRecipe().at(64).crop.long
        256
        """
        return replace(self, model=replace(self.model, size=size), crop=self.crop.at(size))


@dataclass
class SegmentationResult:
    """What fine-tuning gives.

    Attributes:
        model: the network with its last weights, on the CPU in eval mode.
        history: one row per logged step.
        scores: one row per evaluation: ``step`` and ``score``.
        flops: floating point operations of all steps.
        seconds: wall time.
    """

    model: UperNet
    history: pd.DataFrame
    scores: pd.DataFrame
    flops: int
    seconds: float


def segment(
    encoder: nn.Module,
    train: Dataset,
    recipe: SegmentationRecipe,
    evaluate: Callable[[UperNet], float],
    *,
    device: torch.device | str | None = None,
    num_workers: int = 0,
    saving: Saving | None = None,
) -> SegmentationResult:
    """Fine-tune a copy of ``encoder`` with UperNet.

    Under ``torchrun`` the processes share every batch, and on GPUs the batch norms too.

    Args:
        encoder: a plain timm ViT.
        train: map-style, (RGB image, mask), such as
            :class:`~mimrefiner.data.scenes.SegmentationFolder`.
        recipe: how.
        evaluate: gives the score of the network as it is now; called in eval mode.
        device: where to train; None takes a GPU where there is one.
        num_workers: processes that load images.
        saving: checkpoints and resuming; None for none.

    Raises:
        InputError: see :class:`~mimrefiner.models.upernet.UperNet`; masks with more classes; fewer
            images than a batch has.
        FloatingPointError: a loss is not finite.
        mimrefiner.errors.Stopped: SIGTERM came.
    """
    device = device_of(device)
    model = UperNet(encoder, recipe.model, seed=recipe.seed).train().to(device)
    recipe.labels.check(train)
    if device.type == "cuda" and distributed.world() > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)

    def settings() -> dict:
        data = {"data": scenes_hash(train), "images": len(train)}
        return {**asdict(recipe), **data, "first weights": sha256_of(encoder)}

    run = TrainingRun(saving, settings, num_workers=num_workers)
    decay_tables = isinstance(encoder, ReleasedViT) and encoder.shape.post_norm
    optimizer = torch.optim.AdamW(
        parameter_groups(model, recipe, decay_tables), lr=0.0, betas=recipe.betas, fused=True
    )
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(recipe.seed + distributed.rank())  # drop path and dropout
        run.begin(stage_of(recipe, len(train)), model=model, optimizer=optimizer)
        _loop(model, train, recipe, evaluate, run)
    scores = pd.DataFrame(run.epochs, columns=["step", "score"])
    return SegmentationResult(model.eval().cpu(), run.history, scores, run.flops, run.seconds)


def stage_of(recipe: SegmentationRecipe, images: int) -> LabelledStage:
    """The frame of the loop."""
    return LabelledStage(
        number=1,
        steps=recipe.steps,
        images=images,
        batch_size=recipe.batch_size,
        warmup=recipe.warmup,
        base_lr=recipe.base_lr,
        min_lr=recipe.min_lr,
    )


def parameter_groups(
    model: UperNet, recipe: SegmentationRecipe, decay_tables: bool = False
) -> list[dict]:
    """AdamW's groups: layer decay in the encoder, weight decay for matrices and kernels only.

    Args:
        model: the network.
        recipe: the two decays.
        decay_tables: whether tables of relative positions decay too.
    """
    modules = model.encoder.modules()
    tables = [m.relative_position_bias_table for m in modules if isinstance(m, RelPosBias)]
    plain = set() if decay_tables else {id(table) for table in tables}
    groups = []
    for group in layer_decay_groups(model.encoder, recipe.weight_decay, recipe.layer_decay):
        decayed = [x for x in group["params"] if id(x) not in plain]
        undecayed = [x for x in group["params"] if id(x) in plain]
        groups += [{**group, "params": decayed}]
        groups += [{**group, "params": undecayed, "weight_decay": 0.0}] if undecayed else []
    heads = [x for name, x in model.named_parameters() if not name.startswith("encoder.")]
    for decayed in (True, False):
        params = [x for x in heads if (x.ndim > 1) == decayed]
        groups.append({"params": params, "weight_decay": recipe.weight_decay * decayed})
    return groups


def pixel_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """The mean cross-entropy of the pixels that count; 0 where none does.

    Args:
        logits: (batch, classes, height, width).
        masks: (batch, height, width) int64.

    >>> masks = torch.tensor([[[0, IGNORE]]])
    >>> round(pixel_loss(torch.zeros(1, 2, 1, 2), masks).item(), 4)
    0.6931
    """
    total = F.cross_entropy(logits, masks, ignore_index=IGNORE, reduction="sum")
    return total / (masks != IGNORE).sum().clamp_min(1)


def _loop(
    model: UperNet,
    train: Dataset,
    recipe: SegmentationRecipe,
    evaluate: Callable[[UperNet], float],
    run: TrainingRun,
) -> None:
    device = next(model.parameters()).device
    how = recipe.labels, recipe.crop, normalisation(model.encoder), recipe.seed
    scenes = SceneBatches(train, *how)
    keys = run.order(recipe.seed).batches(len(train))
    batches = loaded(scenes, keys, scenes.collate, run.num_workers, pin=device.type == "cuda")
    through = engine.averaged(model)

    def loss(images: Tensor, masks: Tensor) -> Tensor:
        logits, auxiliary = model(images)
        return pixel_loss(logits, masks) + recipe.auxiliary_weight * pixel_loss(auxiliary, masks)

    with sigterm_stops(), advice_on_memory(ADVICE), plain_attention(model, device):
        for step, batch in run.through("segmentation", batches):
            images, masks = (x.to(device, non_blocking=True) for x in batch)
            model.draw_paths(len(images), torch.default_generator)
            with run.counted(step):
                with autocast(device, model.encoder):
                    value = through(partial(loss, images, masks))
                run.optimizer.zero_grad()
                value.backward()
            run.descend()
            done = step + 1
            if done % recipe.evaluate_every == 0 or done == recipe.steps:
                run.epochs.append({"step": done, "score": evaluate(model.eval())})
                model.train()
            run.end_step(step, value)
