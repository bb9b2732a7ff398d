"""Heads placed by measurement: from the block at which neighbours agree most to the last one."""

import copy
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from mimrefiner.config import AUTO, RefineConfig
from mimrefiner.data.datasets import data_hash
from mimrefiner.data.rows import row_of
from mimrefiner.device import autocast, default_device
from mimrefiner.errors import InputError
from mimrefiner.files import write_json
from mimrefiner.models.blocks import depth_of, pooled_blocks
from mimrefiner.models.encoders import eval_transform
from mimrefiner.models.weights import sha256_of

logger = logging.getLogger(__name__)

IMAGES = 2_000  # that a short probe looks at
NEIGHBOURS = 10  # of an image, which vote on its class
BATCH = 100
FILE = "placement.json"


@torch.no_grad()
def neighbour_accuracy(
    encoder: nn.Module, dataset: Dataset, pool: str, images: int = IMAGES, seed: int = 0
) -> Tensor:
    """How often an image's nearest others have its class, after every block.

    Each of ``images`` images drawn from ``dataset`` is classified by a vote of its 10 nearest among
    the others (cosine similarity of pooled tokens, plain majority), so that nothing is held out.

    Args:
        encoder: a timm ViT, in eval mode, on the device where it runs.
        dataset: map-style, (image, label), with PIL images.
        pool: ``"cls"`` or ``"mean"``.
        images: how many images to draw.
        seed: draws them.

    Returns:
        One accuracy for each block, between 0 and 1, (blocks,).

    Raises:
        InputError: an image without a label.
    """
    device, transform = next(encoder.parameters()).device, eval_transform(encoder)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    depth, parts, labels = depth_of(encoder), [], []
    for chosen in order[:images].split(BATCH):
        pairs = [row_of(dataset, i) for i in chosen.tolist()]
        labels += [label for _, label in pairs]
        batch = torch.stack([transform(image) for image, _ in pairs]).to(device)
        with autocast(device, encoder):
            pooled = pooled_blocks(encoder, batch, range(depth), (pool,))[pool]
        parts.append(torch.stack(pooled).float())
    if min(labels) < 0:
        raise InputError(
            "heads are placed by the classes of nearest neighbours, and this data set has images "
            "without a class: give blocks such as --blocks 8,9,10,11"
        )
    label = torch.tensor(labels, device=device)
    z = nn.functional.normalize(torch.cat(parts, 1), dim=-1)  # (blocks, images, dim)
    similar = z @ z.mT
    similar.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    nearest = similar.topk(min(NEIGHBOURS, len(labels) - 1)).indices
    votes = nn.functional.one_hot(label[nearest], int(label.max()) + 1).sum(2)
    return (votes.argmax(-1) == label).float().mean(1).cpu()


def blocks_from_peak(accuracy: Sequence[float]) -> tuple[int, ...]:
    """The block with the highest accuracy and all behind it, at most the last half; 0-based.

    >>> blocks_from_peak([10.0, 30.0, 50.0, 60.0, 70.0, 40.0])
    (4, 5)
    >>> blocks_from_peak([90.0, 30.0, 50.0, 60.0, 70.0, 40.0])
    (3, 4, 5)
    """
    depth = len(accuracy)
    peak = max(range(depth), key=accuracy.__getitem__)
    return tuple(range(max(peak, depth // 2), depth))


def placed(
    config: RefineConfig,
    encoder: nn.Module,
    dataset: Dataset,
    folder: Path | None = None,
    device: torch.device | None = None,
) -> RefineConfig:
    """``config`` with blocks in place of ``"auto"``; any other is returned as it is.

    Args:
        config: the recipe.
        encoder: a timm ViT, which stays as it is.
        dataset: the training images, with labels.
        folder: keeps the choice in ``placement.json``, where the next call for the same encoder,
            images and recipe finds it; None keeps it nowhere.
        device: where to run the encoder; None takes a GPU where there is one.

    Raises:
        InputError: see :func:`neighbour_accuracy`.
    """
    if config.blocks != AUTO:
        return config
    asked = {"first weights": sha256_of(encoder), "data": data_hash(dataset)}
    asked |= {"pool": config.pool, "seed": config.seed}
    file = None if folder is None else folder / FILE
    there = file is not None and file.is_file()
    kept = json.loads(file.read_text(encoding="utf-8")) if there else {}
    if asked.items() <= kept.items():
        percent = kept["percent"]
    else:
        copied = copy.deepcopy(encoder).eval().to(device or default_device())
        accuracy = neighbour_accuracy(copied, dataset, config.pool, seed=config.seed)
        percent = [round(100 * x, 1) for x in accuracy.tolist()]
    blocks = blocks_from_peak(percent)
    if file is not None:
        write_json({**asked, "blocks": blocks, "percent": percent}, file)
    found = ", ".join(f"{value:.1f}" for value in percent)
    logger.info("nearest neighbours have the image's class in %s %% after each block", found)
    logger.info("heads are placed on blocks %s (0-based)", ", ".join(map(str, blocks)))
    return replace(config, blocks=blocks)
