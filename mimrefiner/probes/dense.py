"""Semantic segmentation with a linear probe on the patch tokens of every block: mean intersection over union.

A 1x1 convolution after batch norm without affine parameters, SGD with momentum 0.9 (``ade20k_per_block`` of the released code). All
blocks are trained together; the encoder is frozen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from mimrefiner.config import check_blocks
from mimrefiner.data import IMAGE_ENDINGS, epoch_order
from mimrefiner.errors import InputError
from mimrefiner.features import block_modules
from mimrefiner.models import normalisation
from mimrefiner.probes.checks import tidy
from mimrefiner.progress import progress
from mimrefiner.train import cosine_lr

IGNORE = 255  # the label of pixels that do not count


@dataclass(frozen=True)
class DenseConfig:
    """Settings of the probe; the defaults are the paper's for ADE20K per block (``lr`` times batch_size / 16).

    ``ignore_zero``: label 0 means "no class" and the classes begin at 1, as in ADE20K's annotation files.
    """

    epochs: float = 50
    batch_size: int = 16
    lr: float = 0.1
    flip: bool = True
    ignore_zero: bool = False
    seed: int = 0


def ade20k() -> DenseConfig:
    """ADE20K: 150 classes, 20,210 training images, 224 px; about one pass of 50 epochs over the frozen encoder."""
    return DenseConfig(ignore_zero=True)


class SegmentationFolder(Dataset):
    """(RGB image, mask) from ``PATH/images/SPLIT/NAME.jpg`` and ``PATH/masks/SPLIT/NAME.png``; masks hold a class per pixel.

    Raises:
        InputError: a missing or empty folder, an image without mask, files that can not be read, sizes that differ.
    """

    def __init__(self, path: Path | str, split: str):
        path = Path(path).expanduser()
        images, masks = path / "images" / split, path / "masks" / split
        for folder in (images, masks):
            if not folder.is_dir():
                raise InputError(f"{folder} does not exist: expected PATH/images/SPLIT and PATH/masks/SPLIT")
        self.files = [(f, masks / f"{f.stem}.png") for f in sorted(images.iterdir()) if f.suffix.lower() in IMAGE_ENDINGS]
        if not self.files:
            raise InputError(f"{images} holds no images")
        for image, mask in self.files:
            if not mask.is_file():
                raise InputError(f"{image.name} has no mask: expected {mask}")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Image.Image, Image.Image]:
        try:
            with Image.open(self.files[i][0]) as image, Image.open(self.files[i][1]) as mask:
                image, mask = image.convert("RGB"), Image.fromarray(np.asarray(mask, dtype=np.uint8))
        except (OSError, SyntaxError, ValueError, TypeError) as error:
            raise InputError(f"{self.files[i][0]} or its mask cannot be decoded: {error}") from error
        if image.size != mask.size:
            raise InputError(f"{self.files[i][0]} is {image.size} and its mask {mask.size} pixels wide and high")
        return image, mask


class DenseProbes(nn.Module):
    """A linear classifier on the patch tokens of every block of a frozen encoder."""

    def __init__(self, encoder: nn.Module, blocks: Sequence[int], classes: int, seed: int):
        super().__init__()
        self.encoder, self.blocks = encoder.eval().requires_grad_(False), tuple(blocks)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.norms = nn.ModuleList(nn.BatchNorm2d(encoder.embed_dim, affine=False) for _ in blocks)
            self.layers = nn.ModuleList(nn.Conv2d(encoder.embed_dim, classes, 1) for _ in blocks)

    def forward(self, images: Tensor) -> Tensor:
        """Logits per patch, (blocks, batch, classes, rows, columns)."""
        maps = patch_maps(self.encoder, images, self.blocks)
        return torch.stack([layer(norm(x)) for layer, norm, x in zip(self.layers, self.norms, maps, strict=True)])


def dense_probe(
    encoder: nn.Module,
    train: Dataset,
    test: Dataset,
    *,
    classes: int,
    config: DenseConfig | None = None,
    blocks: str | Sequence[int] = "all",
    device: torch.device | str = "cpu",
    num_workers: int = 0,
) -> pd.DataFrame:
    """Mean intersection over union of a linear probe on every block.

    Images and masks are resized to the encoder's input size; logits are enlarged bilinearly to the mask. (The paper's transfer
    protocol of a sliding window over full-size images is not built in.)

    Args:
        encoder: a timm ViT; frozen.
        train, test: data sets of (RGB image, mask), such as :class:`SegmentationFolder`; mask value 255 does not count.
        classes: number of classes.
        config: see :class:`DenseConfig`; None takes the paper's.
        blocks: "all" or 0-based.

    Returns:
        One row per block, metric "mIoU" over the classes that occur, columns as :data:`mimrefiner.probes.checks.COLUMNS`.

    Raises:
        InputError: a class in a mask that is not below ``classes``; a block out of range.
    """
    config, device = config or DenseConfig(), torch.device(device)
    depth = len(block_modules(encoder))
    blocks = tuple(range(depth)) if blocks == "all" else check_blocks(blocks, depth)
    home = next(encoder.parameters()).device
    model = DenseProbes(encoder, blocks, classes, config.seed).to(device)
    batch_size = min(config.batch_size, len(train))
    per_epoch = len(train) // batch_size
    steps = max(1, round(config.epochs * per_epoch))
    peak = config.lr * batch_size / 16
    parameters = [*model.layers.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9)
    prepared = {name: _Prepared(part, encoder, classes, config.ignore_zero) for name, part in (("train", train), ("test", test))}
    order = [
        [int(i) for i in epoch_order(len(train), step // per_epoch, config.seed)[step % per_epoch * batch_size :][:batch_size]]
        for step in range(steps)
    ]
    loader = DataLoader(prepared["train"], batch_sampler=order, num_workers=num_workers)
    generator = torch.Generator().manual_seed(config.seed)
    for step, (images, masks) in enumerate(progress(loader, "dense probe", steps)):
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr(step, steps, 0.1 * steps, peak, 1e-6)
        if config.flip:
            flipped = torch.rand(len(images), generator=generator) < 0.5
            images[flipped], masks[flipped] = images[flipped].flip(-1), masks[flipped].flip(-1)
        loss = _loss(model(images.to(device)), masks.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    values = mean_iou(model.eval(), DataLoader(prepared["test"], batch_size, num_workers=num_workers), classes, device)
    encoder.requires_grad_(True).to(home)
    rows = [
        {
            "block": block, "pool": "tokens", "protocol": "dense_linear", "metric": "mIoU", "seed": config.seed, "value": value,
            "n_train": len(train), "n_test": len(test),
        }
        for block, value in zip(blocks, values.tolist(), strict=True)
    ]  # fmt: skip
    return tidy(rows)


@torch.no_grad()
def mean_iou(model: DenseProbes, batches, classes: int, device: torch.device) -> Tensor:
    """Mean intersection over union per block, over the classes that occur in masks or predictions, (blocks,)."""
    table = torch.zeros(len(model.blocks), classes * classes, dtype=torch.long)
    for images, masks in batches:
        predicted = _enlarge(model(images.to(device)), masks.shape[-1]).argmax(2).cpu()  # (blocks, batch, size, size)
        counted = masks != IGNORE
        for block, guess in enumerate(predicted):
            table[block] += torch.bincount(masks[counted].long() * classes + guess[counted], minlength=classes * classes)
    table = table.view(-1, classes, classes).double()
    right = table.diagonal(dim1=1, dim2=2)
    union = table.sum(1) + table.sum(2) - right
    return torch.where(union > 0, right / union.clamp_min(1), 0.0).sum(1) / (union > 0).sum(1)


@torch.no_grad()
def patch_maps(encoder: nn.Module, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
    """Patch tokens after the given blocks as maps, (batch, dim, rows, columns) each."""
    patch = encoder.patch_embed.patch_size[0]
    rows, columns = images.shape[-2] // patch, images.shape[-1] // patch
    maps: dict[int, Tensor] = {}

    def keep(block: int):
        def hook(module, inputs, tokens):
            maps[block] = tokens[:, encoder.num_prefix_tokens :].mT.unflatten(2, (rows, columns)).float()

        return hook

    handles = [encoder.blocks[block].register_forward_hook(keep(block)) for block in blocks]
    try:
        encoder.forward_features(images)
    finally:
        for handle in handles:
            handle.remove()
    return [maps[block] for block in blocks]


class _Prepared(Dataset):
    """Images as normalised tensors and masks as class indices, both of the encoder's input size."""

    def __init__(self, dataset: Dataset, encoder: nn.Module, classes: int, ignore_zero: bool):
        self.dataset, self.classes, self.ignore_zero = dataset, classes, ignore_zero
        self.size = encoder.pretrained_cfg["input_size"][-1]
        self.mean, self.std = (torch.tensor(x).view(3, 1, 1) for x in normalisation(encoder))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        image, mask = self.dataset[i]
        shape = (self.size, self.size)
        pixels = torch.from_numpy(np.array(image.resize(shape, Image.Resampling.BICUBIC))).permute(2, 0, 1).float() / 255
        mask = torch.from_numpy(np.array(mask.resize(shape, Image.Resampling.NEAREST))).long()
        if self.ignore_zero:
            mask = torch.where((mask == 0) | (mask == IGNORE), IGNORE, mask - 1)
        worst = mask[mask != IGNORE].max().item() if (mask != IGNORE).any() else 0
        if worst >= self.classes:
            raise InputError(f"a mask holds class {worst}, expected classes 0 to {self.classes - 1} and {IGNORE} for none")
        return (pixels - self.mean) / self.std, mask


def _enlarge(logits: Tensor, size: int) -> Tensor:
    blocks, batch = logits.shape[:2]
    return F.interpolate(logits.flatten(0, 1), size=(size, size), mode="bilinear", align_corners=False).unflatten(
        0, (blocks, batch)
    )


def _loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Sum over blocks of the mean cross-entropy, so that every block's probe sees its own gradient only."""
    enlarged = _enlarge(logits, masks.shape[-1])
    return sum(F.cross_entropy(block, masks, ignore_index=IGNORE) for block in enlarged)
