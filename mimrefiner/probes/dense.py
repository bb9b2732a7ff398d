"""Semantic segmentation with a linear probe on frozen patch tokens: mean intersection over union.

The probe is a 1x1 convolution after batch norm without affine parameters, trained by SGD with
momentum 0.9, on every block (``ade20k_per_block`` of the released code) or on several blocks joined
(``probe_transfer/ade20k``). All probes are trained together; the encoder is frozen. The paper's
other numbers on ADE20K come from fine-tuning the whole encoder with UperNet, which this package
leaves out.
"""

from collections.abc import Iterable, Iterator, Sequence

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from mimrefiner.config import check_blocks
from mimrefiner.data.views import epoch_order
from mimrefiner.device import frozen, seeded
from mimrefiner.errors import InputError
from mimrefiner.models.blocks import check_pools, depth_of, hooked
from mimrefiner.probes.checks import tidy
from mimrefiner.probes.segmentation import IGNORE, DenseConfig, Prepared
from mimrefiner.progress import progress
from mimrefiner.training.optim import cosine_lr


def ade20k() -> DenseConfig:
    """ADE20K per block: 150 classes, 20,210 training images, 224 px, 50 epochs.

    Test images are resized to 224 px, so that the window of 224 px which the released settings
    slide by 170 is the whole image. Enlarging bilinearly is ours, the settings do not say.
    """
    return DenseConfig(150, ignore_zero=True)


def ade20k_transfer(depth: int) -> DenseConfig:
    """ADE20K as the paper's linear-probe transfer, for an encoder of ``depth`` blocks.

    Every fourth block counted from the end, four of them, with and without cls token, nine learning
    rates, random squares of images of half to double size, full-size test images under a window of
    224 px that slides by 170 px. Our reading: validation images choose the rate, fewer blocks are
    joined where there are fewer than 13, and logits are enlarged by their nearest neighbours in
    training too.
    """
    return DenseConfig(
        150,
        blocks=tuple(block for block in range(depth - 13, depth, 4) if block >= 0),
        learning_rates=(1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
        ignore_zero=True,
        scale=(0.5, 2.0),
        max_share=0.75,
        stride=170,
        enlarge="nearest",
        join=True,
        cls=True,
    )


class DenseProbes(nn.Module):
    """Linear classifiers on patch tokens of a frozen encoder.

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
            self.layers = nn.ModuleList(
                nn.Conv2d(dim, config.classes, 1) for dim in dims for _ in config.learning_rates
            )

    def forward(self, images: Tensor) -> Tensor:
        """Logits per patch, (probes, batch, classes, rows, columns)."""
        maps, cls_maps = token_maps(self.encoder, images, self.blocks)
        logits = []
        for i, (norm, (group, cls)) in enumerate(zip(self.norms, self.kinds, strict=True)):
            parts = [maps[block] for block in group]
            parts += [cls_maps[block] for block in group if cls]
            x = norm(torch.cat(parts, 1))
            logits += [layer(x) for layer in self.layers[i * self.rates : (i + 1) * self.rates]]
        return torch.stack(logits)


def dense_probe(
    encoder: nn.Module,
    train: Dataset,
    test: Dataset,
    config: DenseConfig,
    *,
    val: Dataset | None = None,
    device: torch.device | str = "cpu",
    num_workers: int = 0,
) -> pd.DataFrame:
    """Mean intersection over union of linear probes on the blocks of a frozen encoder.

    Args:
        encoder: a timm ViT; frozen.
        train, test: data sets of (RGB image, mask), such as
            :class:`~mimrefiner.probes.segmentation.SegmentationFolder`; pixels with the mask value
            255 do not count.
        config: the classes, the blocks and how the probes are trained.
        val: chooses among several learning rates; needed for that only.
        device: where encoder and probes run.
        num_workers: processes that load images.

    Returns:
        One row per block (per cls or not), metric "mIoU" over the classes that occur, columns as
        :data:`mimrefiner.probes.checks.COLUMNS`; ``block`` is the last of joined ones, ``setting``
        the learning rate and the blocks that were joined.

    Raises:
        InputError: a class in a mask that is not below ``config.classes``; a block out of range;
            several learning rates without ``val``; cls tokens of a model that has none.
    """
    _check(config, encoder, val)
    device, several = torch.device(device), len(config.learning_rates) > 1
    with frozen(encoder, device):
        model = DenseProbes(encoder, config).to(device)
        _train(model, train, config, device, num_workers)
        model.eval()
        best = torch.zeros(len(model.kinds), dtype=torch.long)
        if several:
            best = _measured(model, val, config, device, num_workers).argmax(1)
        values = _measured(model, test, config, device, num_workers).gather(1, best[:, None])[:, 0]
    common = {"protocol": "dense_linear", "metric": "mIoU", "seed": config.seed}
    common |= {"n_train": len(train), "n_test": len(test)}
    rows = []
    for (group, cls), value, rate in zip(model.kinds, values.tolist(), best.tolist(), strict=True):
        joined = f" blocks={'+'.join(map(str, group))}" if config.join else ""
        where = {"block": group[-1], "pool": "tokens+cls" if cls else "tokens"}
        setting = f"lr={config.learning_rates[rate]:g}{joined}"
        rows.append({**common, **where, "value": value, "setting": setting})
    return tidy(rows)


def _measured(
    model: DenseProbes, part: Dataset, config: DenseConfig, device: torch.device, num_workers: int
) -> Tensor:
    """Mean intersection over union, (kinds, learning rates)."""
    # Full-size images differ in size
    batch_size = 1 if config.stride else config.batch_size
    prepared = Prepared(part, model.encoder, config)
    batches = DataLoader(prepared, batch_size, num_workers=num_workers)
    found = mean_iou(model, batches, config, window=prepared.size, device=device)
    return found.unflatten(0, (len(model.kinds), -1))


def _check(config: DenseConfig, encoder: nn.Module, val: Dataset | None) -> None:
    if len(config.learning_rates) > 1 and val is None:
        raise InputError(
            f"choosing among {len(config.learning_rates)} learning rates needs validation images: "
            "pass val="
        )
    if config.cls:
        check_pools(encoder, ("cls",))
    if config.enlarge not in ("bilinear", "nearest"):
        raise InputError(f"enlarge must be bilinear or nearest, got {config.enlarge!r}")
    size = encoder.pretrained_cfg["input_size"][-1]
    if config.stride is not None and not 1 <= config.stride <= size:
        raise InputError(
            f"stride must be between 1 and the window of {size} pixels, got {config.stride}"
        )


def _train(
    model: DenseProbes, train: Dataset, config: DenseConfig, device: torch.device, num_workers: int
) -> None:
    batch_size = min(config.batch_size, len(train))
    per_epoch = len(train) // batch_size
    steps = max(1, round(config.epochs * per_epoch))
    peaks = [
        config.learning_rates[i % model.rates] * batch_size / 16 for i in range(len(model.layers))
    ]
    groups = [
        {"params": layer.parameters(), "peak": peak}
        for layer, peak in zip(model.layers, peaks, strict=True)
    ]
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    order = []
    for step in range(steps):
        epoch, batch = divmod(step, per_epoch)
        rows = epoch_order(len(train), epoch, config.seed)[batch * batch_size :][:batch_size]
        order.append([(epoch, int(i)) for i in rows])
    prepared = Prepared(train, model.encoder, config, random=True)
    loader = DataLoader(prepared, batch_sampler=order, num_workers=num_workers)
    generator = torch.Generator().manual_seed(config.seed)
    for step, (images, masks) in enumerate(progress(loader, "dense probe", steps)):
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr(step, steps, 0.1 * steps, group["peak"], 1e-6)
        if config.flip:
            flipped = torch.rand(len(images), generator=generator) < 0.5
            images[flipped], masks[flipped] = images[flipped].flip(-1), masks[flipped].flip(-1)
        optimizer.zero_grad()
        _backward(model, images.to(device), masks.to(device), config.enlarge)
        optimizer.step()


def _backward(model: DenseProbes, images: Tensor, masks: Tensor, enlarge: str) -> None:
    """Every probe's gradient, one after another: logits per pixel of all would be gigabytes."""
    logits = model(images)
    leaf = logits.detach().requires_grad_()
    for probe in leaf:
        per_pixel = _enlarge(probe, masks.shape[-1], enlarge)
        loss = F.cross_entropy(per_pixel, masks, ignore_index=IGNORE, reduction="sum")
        (loss / (masks != IGNORE).sum().clamp_min(1)).backward()
    logits.backward(leaf.grad)


@torch.no_grad()
def mean_iou(
    model: nn.Module,
    batches: Iterable,
    config: DenseConfig,
    *,
    window: int,
    device: torch.device | str,
) -> Tensor:
    """Mean intersection over union of every probe, (probes,).

    Args:
        model: images (batch, 3, window, window) -> logits per patch, (probes, batch, classes, rows,
            columns).
        batches: (images, masks) of any size; classes count that occur in masks or predictions.
    """
    table, classes = 0, config.classes
    stride = config.stride or window
    for images, masks in batches:
        counted = masks != IGNORE
        found = []
        for logits in slide(model, images.to(device), window, stride, config.enlarge):
            pairs = masks[counted] * classes + logits.argmax(1).cpu()[counted]
            found.append(torch.bincount(pairs, minlength=classes * classes))
        table += torch.stack(found)
    table = table.view(-1, classes, classes).double()
    right = table.diagonal(dim1=1, dim2=2)
    union = table.sum(1) + table.sum(2) - right
    return torch.where(union > 0, right / union.clamp_min(1), 0.0).sum(1) / (union > 0).sum(1)


def slide(
    model: nn.Module, images: Tensor, window: int, stride: int, enlarge: str
) -> Iterator[Tensor]:
    """Logits per pixel, (batch, classes, height, width), of one probe after the other.

    A window of ``window`` pixels slides over the images by ``stride``; the last one of a row or
    column is moved back to end with the image. Logits are averaged where windows overlap. Images
    smaller than the window are padded with the mean colour.

    Args:
        model: images (batch, 3, window, window) -> logits per patch (probes, batch, classes, rows,
            columns).
        images: normalised, (batch, 3, height, width).
        enlarge: "bilinear" or "nearest".
    """
    height, width = images.shape[-2:]
    images = F.pad(images, (0, max(0, window - width), 0, max(0, window - height)))
    tops, lefts = (
        [min(start, side - window) for start in range(0, side - window + stride, stride)]
        for side in images.shape[-2:]
    )
    places = [
        (..., slice(top, top + window), slice(left, left + window))
        for top in tops
        for left in lefts
    ]
    patches = [model(images[place]) for place in places]  # small: per patch
    for probe in range(len(patches[0])):
        total = patches[0].new_zeros(len(images), patches[0].shape[2], *images.shape[-2:])
        times = total.new_zeros(images.shape[-2:])
        for place, logits in zip(places, patches, strict=True):
            total[place] += _enlarge(logits[probe], window, enlarge)
            times[place] += 1
        yield (total / times)[..., :height, :width]


@torch.no_grad()
def token_maps(
    encoder: nn.Module, images: Tensor, blocks: Sequence[int]
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Patch tokens after the given blocks as maps, (batch, dim, rows, columns) each.

    The second dictionary holds each block's first token spread over such a map, the cls token where
    there is one.
    """
    patch = encoder.patch_embed.patch_size[0]
    rows, columns = images.shape[-2] // patch, images.shape[-1] // patch
    maps: dict[int, Tensor] = {}
    first: dict[int, Tensor] = {}

    def keep(position: int, module: nn.Module, inputs, tokens: Tensor) -> None:
        block, patches = blocks[position], tokens[:, encoder.num_prefix_tokens :]
        maps[block] = patches.mT.unflatten(2, (rows, columns)).float()
        first[block] = tokens[:, 0, :, None, None].float().expand_as(maps[block])

    with hooked([encoder.blocks[block] for block in blocks], keep):
        encoder.forward_features(images)
    return maps, first


def _enlarge(logits: Tensor, size: int, mode: str) -> Tensor:
    """(batch, classes, rows, columns) -> (batch, classes, size, size)."""
    return F.interpolate(
        logits, size=(size, size), mode=mode, align_corners=False if mode == "bilinear" else None
    )
