"""Semantic segmentation with linear probes on frozen patch tokens.

A probe is a 1x1 convolution after batch norm without affine parameters, trained by SGD with
momentum 0.9, on every block (``ade20k_per_block`` of the released code) or on several blocks joined
(``probe_transfer/ade20k``). All probes are trained together; the encoder is frozen. The paper's
other numbers on ADE20K come from fine-tuning: :mod:`mimrefiner.training.segment`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from mimrefiner.config import check_blocks
from mimrefiner.data.loaders import loaded
from mimrefiner.data.scenes import IGNORE, Labels, SceneBatches, SceneCrop
from mimrefiner.data.views import Order
from mimrefiner.device import autocast, frozen, seeded
from mimrefiner.errors import InputError
from mimrefiner.models.blocks import depth_of, hooked
from mimrefiner.models.encoders import normalisation
from mimrefiner.models.pools import check_pools
from mimrefiner.models.tokens import input_size, split_tokens
from mimrefiner.probes.checks import tidy
from mimrefiner.probes.segmentation import Window, mean_iou, to_size
from mimrefiner.progress import progress
from mimrefiner.training.optim import LabelledStage

ADE20K = Labels(150, ignore_zero=True)
WHOLE_SCENE = SceneCrop(224)
RESIZED = Window("resized", 224, "scene", 224)


@dataclass(frozen=True)
class DenseConfig:
    """Settings of the probes; the defaults are the paper's for ADE20K per block.

    Attributes:
        labels: the classes, and what the masks' numbers mean.
        blocks: "all" or 0-based blocks.
        epochs, batch_size: how long the probes are trained, and on how many images at a time.
        learning_rates: peak rates for 256 images, warm-up over a tenth of the steps, then cosine to
            1e-6; several are trained together.
        crop: how training squares are cut.
        window: how test images are shown.
        join: one probe on the tokens of all blocks side by side, instead of one per block.
        cls: for every probe another one that also sees the block's cls token beside every patch.
        evaluate_every: epochs between two evaluations where the best one is asked for.
        seed: draws weights, order, flips and squares.
    """

    labels: Labels = ADE20K
    blocks: str | tuple[int, ...] = "all"
    epochs: float = 50
    batch_size: int = 16
    learning_rates: tuple[float, ...] = (0.1,)
    crop: SceneCrop = WHOLE_SCENE
    window: Window = RESIZED
    join: bool = False
    cls: bool = False
    evaluate_every: int = 10
    seed: int = 0

    def at(self, size: int) -> "DenseConfig":
        """The same for an encoder whose input is ``size`` pixels wide.

        >>> DenseConfig().at(64).window.size
        64
        """
        return replace(self, crop=self.crop.at(size), window=self.window.at(size))


def ade20k() -> DenseConfig:
    """ADE20K per block: 150 classes, 20,210 training images, 224 px, 50 epochs.

    ``y/analysis/ade20k_per_block`` of the released code. Test images are resized to 224 px, so that
    the window of 224 px which its settings slide by 170 is the whole image. Enlarging logits
    bilinearly is ours, the settings do not say.

    >>> ade20k().learning_rates
    (0.1,)
    """
    return DenseConfig()


def ade20k_transfer(depth: int) -> DenseConfig:
    """ADE20K as the paper's linear-probe transfer, for an encoder of ``depth`` blocks.

    ``y/eval/probe_transfer/ade20k`` of the released code: every fourth block counted from the end,
    four of them, with and without cls token, nine learning rates, random squares of images of half
    to double size, full-size test images under a window of 224 px that slides by 170 px. Fewer
    blocks are joined where there are fewer than 13.

    >>> ade20k_transfer(24).blocks
    (11, 15, 19, 23)
    """
    return DenseConfig(
        blocks=tuple(block for block in range(depth - 13, depth, 4) if block >= 0),
        learning_rates=(1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
        crop=SceneCrop(224, long=448, short=224),
        window=Window("sliding", 224, "keep", 170, "nearest"),
        join=True,
        cls=True,
    )


class DenseProbes(nn.Module):
    """Linear classifiers, in float32, on patch tokens of a frozen encoder.

    The encoder runs in bfloat16 where that helps, as in the released code.

    Attributes:
        kinds: (blocks, with cls token) of every batch norm; behind each is one layer per learning
            rate, rates innermost.
    """

    def __init__(self, encoder: nn.Module, config: DenseConfig):
        super().__init__()
        depth, blocks = depth_of(encoder), config.blocks
        self.blocks = tuple(range(depth)) if blocks == "all" else check_blocks(blocks, depth)
        self.encoder, self.rates = encoder, len(config.learning_rates)
        groups = [self.blocks] if config.join else [(block,) for block in self.blocks]
        self.kinds = [
            (group, cls) for cls in ((False, True) if config.cls else (False,)) for group in groups
        ]
        with seeded(config.seed):
            dims = [encoder.embed_dim * len(group) * (1 + cls) for group, cls in self.kinds]
            self.norms = nn.ModuleList(nn.BatchNorm2d(dim, affine=False) for dim in dims)
            # Each is drawn in turn, so that further rates change none before them
            self.layers = nn.ModuleList(
                _classifier(dim, config.labels.classes)
                for dim in dims
                for _ in config.learning_rates
            )

    def forward(self, images: Tensor) -> Tensor:
        """Logits per patch, (probes, batch, classes, rows, columns)."""
        with autocast(images.device, self.encoder):
            maps, cls_maps = token_maps(self.encoder, images, self.blocks)
        logits = []
        for i, (norm, (group, cls)) in enumerate(zip(self.norms, self.kinds, strict=True)):
            parts = [maps[block] for block in group]
            parts += [cls_maps[block] for block in group if cls]
            x = norm(torch.cat(parts, 1))
            logits += [layer(x) for layer in self.layers[i * self.rates : (i + 1) * self.rates]]
        return torch.stack(logits)


def _classifier(dim: int, classes: int) -> nn.Conv2d:
    layer = nn.Conv2d(dim, classes, 1)
    nn.init.trunc_normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return layer


def dense_probe(
    encoder: nn.Module,
    train: Dataset,
    test: Dataset,
    config: DenseConfig,
    *,
    val: Dataset | None = None,
    best_on_test: bool = False,
    device: torch.device | str = "cpu",
    num_workers: int = 0,
) -> pd.DataFrame:
    """Mean intersection over union of linear probes on the blocks of a frozen encoder.

    Args:
        encoder: a timm ViT; frozen.
        train, test: data sets of (RGB image, mask), such as
            :class:`~mimrefiner.data.scenes.SegmentationFolder`; pixels with the mask value 255 do
            not count.
        config: the classes, the blocks and how the probes are trained, for the encoder's input size
            (:meth:`DenseConfig.at`).
        val: chooses among several learning rates; needed for that only.
        best_on_test: report the best rate and evaluation on the test images instead, as the paper
            does: an optimistic number, which says so in its row.
        device: where encoder and probes run.
        num_workers: processes that load images.

    Returns:
        One row per block (per cls or not), metric "mIoU" over the classes that occur, columns as
        :data:`mimrefiner.probes.checks.COLUMNS`; ``block`` is the last of joined ones, ``setting``
        the learning rate, the blocks that were joined, and how they were chosen.

    Raises:
        InputError: a class in a mask that is not below ``config.labels.classes``; a block out of
            range; several learning rates without ``val``; cls tokens of a model that has none; a
            window that the patch size does not divide.
    """
    _check(config, encoder, val, best_on_test)
    for part in (train, test, *([] if val is None else [val])):
        config.labels.check(part)
    device = torch.device(device)
    with frozen(encoder, device):
        model = DenseProbes(encoder, config).to(device)
        measure = partial(_measured, model, config=config, num_workers=num_workers)
        seen = []  # evaluations on test images, where the best one is reported
        during = (lambda: seen.append(measure(test))) if best_on_test else None
        _train(model, train, config, num_workers, during)
        if best_on_test:
            on_test = torch.stack(seen).amax(0)
            best = on_test.argmax(1)
        else:
            several = len(config.learning_rates) > 1
            best = measure(val).argmax(1) if several else torch.zeros(len(model.kinds)).long()
            on_test = measure(test)
    values = on_test.gather(1, best[:, None])[:, 0]
    rows = _rows(model.kinds, values, best, config, best_on_test)
    return tidy([{**row, "n_train": len(train), "n_test": len(test)} for row in rows])


def _measured(model: DenseProbes, part: Dataset, config: DenseConfig, num_workers: int) -> Tensor:
    """Mean intersection over union, (kinds, learning rates)."""
    model.eval()
    how = {"device": model.layers[0].weight.device, "num_workers": num_workers}
    normalise = normalisation(model.encoder)
    found = mean_iou(model, part, config.labels, config.window, normalise, **how)
    return found.unflatten(0, (len(model.kinds), -1))


def _rows(kinds, values: Tensor, best: Tensor, config: DenseConfig, best_on_test: bool):
    common = {"protocol": "dense_linear", "metric": "mIoU", "seed": config.seed}
    how = " best rate and evaluation on test" if best_on_test else ""
    for (group, cls), value, rate in zip(kinds, values.tolist(), best.tolist(), strict=True):
        joined = f" blocks={'+'.join(map(str, group))}" if config.join else ""
        where = {"block": group[-1], "pool": "tokens+cls" if cls else "tokens"}
        setting = f"lr={config.learning_rates[rate]:g}{joined}{how}"
        yield {**common, **where, "value": value, "setting": setting}


def _check(config: DenseConfig, encoder: nn.Module, val, best_on_test: bool) -> None:
    if len(config.learning_rates) > 1 and val is None and not best_on_test:
        raise InputError(
            f"choosing among {len(config.learning_rates)} learning rates needs validation images: "
            "pass val="
        )
    if config.cls:
        check_pools(encoder, ("cls",), config.blocks)
    size, patch = config.window.size, encoder.patch_embed.patch_size[0]
    expected = input_size(encoder)[-1]
    if config.crop.size != size or size != expected:
        raise InputError(
            f"squares of {config.crop.size} px for training and of {size} px for tests do not fit "
            f"the encoder's input of {expected} px: use config.at({expected})"
        )
    if size % patch:
        raise InputError(f"squares of {size} px are not divisible by the patch size {patch}")


def _train(
    model: DenseProbes,
    train: Dataset,
    config: DenseConfig,
    num_workers: int,
    evaluate: Callable[[], None] | None = None,
) -> None:
    """Train all probes; ``evaluate`` is called every so many epochs and at the end."""
    batch_size, device = min(config.batch_size, len(train)), model.layers[0].weight.device
    per_epoch = len(train) // batch_size
    steps = max(1, round(config.epochs * per_epoch))
    rates = [config.learning_rates[i % model.rates] for i in range(len(model.layers))]
    groups = [
        {"params": layer.parameters(), "peak": rate * batch_size / 256}
        for layer, rate in zip(model.layers, rates, strict=True)
    ]
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    stages = [_schedule(group["peak"], steps) for group in groups]
    how = config.labels, config.crop, normalisation(model.encoder), config.seed
    scenes = SceneBatches(train, *how)
    keys = Order(batch_size, steps, config.seed).batches(len(train))
    batches = loaded(scenes, keys, scenes.collate, num_workers, pin=device.type == "cuda")
    for step, batch in enumerate(progress(batches, "dense probe", steps), 1):
        model.norms.train()
        for group, stage in zip(optimizer.param_groups, stages, strict=True):
            group["lr"] = stage.lr(step - 1)
        optimizer.zero_grad()
        images, masks = (x.to(device, non_blocking=True) for x in batch)
        _backward(model, images, masks, config.window.enlarge)
        optimizer.step()
        due = step % (config.evaluate_every * per_epoch) == 0 or step == steps
        if evaluate is not None and due:
            evaluate()


def _schedule(peak: float, steps: int) -> LabelledStage:
    """The rate of every step, up to ``peak``; batches are counted as of 256 images."""
    return LabelledStage(1, steps, 256, 256, warmup=0.1 * steps, base_lr=peak, min_lr=1e-6)


def _backward(model: DenseProbes, images: Tensor, masks: Tensor, enlarge: str) -> None:
    """Every probe's gradient, one after another: logits per pixel of all would be gigabytes."""
    logits = model(images)
    leaf = logits.detach().requires_grad_()
    for probe in leaf:
        per_pixel = to_size(probe, masks.shape[-2:], enlarge)
        loss = F.cross_entropy(per_pixel, masks, ignore_index=IGNORE, reduction="sum")
        (loss / (masks != IGNORE).sum().clamp_min(1)).backward()
    logits.backward(leaf.grad)


@torch.no_grad()
def token_maps(
    encoder: nn.Module, images: Tensor, blocks: Sequence[int]
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Patch tokens after the given blocks as maps, (batch, dim, rows, columns) each.

    The second dictionary holds each block's cls token spread over such a map, where it has one.
    """
    patch = encoder.patch_embed.patch_size[0]
    rows, columns = images.shape[-2] // patch, images.shape[-1] // patch
    maps: dict[int, Tensor] = {}
    first: dict[int, Tensor] = {}

    def keep(position: int, module: nn.Module, inputs, output) -> None:
        block, (cls, patches) = blocks[position], split_tokens(encoder, output, images)
        maps[block] = patches.mT.unflatten(2, (rows, columns)).float()
        if cls is not None:
            first[block] = cls[:, :, None, None].float().expand_as(maps[block])

    with hooked([encoder.blocks[block] for block in blocks], keep):
        encoder.forward_features(images)
    return maps, first
