"""Pooled features of every block in one pass.

Tokens are pooled as each block ends, so that only (batch, dim) per block stays alive; ``timm``'s
``forward_intermediates``, which keeps every block's tokens, is the oracle in the tests.
"""

import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from mimrefiner import distributed
from mimrefiner.config import check_blocks
from mimrefiner.data.datasets import to_pil
from mimrefiner.device import default_device
from mimrefiner.distributed import gather_rows
from mimrefiner.errors import InputError
from mimrefiner.models.blocks import check_pools, depth_of, pooled_blocks
from mimrefiner.models.encoders import eval_transform
from mimrefiner.progress import progress

LONG_SECONDS, LARGE_GIB = 120, 4  # from here on an estimate is printed


@dataclass
class Features:
    """Features of a data set.

    Attributes:
        x: for every pooling ("cls", "mean"), float32 (blocks, images, dim); a list of (images,
            dim_b) where widths differ or where they are mapped from a disk.
        y: labels, (images,), -1 where there are none.
        blocks: the 0-based block of every row of ``x``.
        depth: number of blocks of the encoder.
    """

    x: dict[str, Tensor | list[Tensor]]
    y: Tensor
    blocks: tuple[int, ...]
    depth: int

    def subset(self, rows) -> "Features":
        """The images at positions ``rows``, in that order."""
        rows = torch.as_tensor(rows)
        return replace(
            self,
            x={pool: _stack([x[rows] for x in blocks]) for pool, blocks in self.x.items()},
            y=self.y[rows],
        )

    def joined(self, pools: Sequence[str]) -> "Features":
        """Poolings joined to wider ones.

        Args:
            pools: of "cls", "mean" and "cls+mean" (one behind the other), each with "_lastN" for
                the blocks b - N + 1 to b behind each other: "cls+mean_last4" is the widest of the
                paper's grid. The first blocks take what is before them.

        Raises:
            InputError: another name, a pooling that is not there, a block that was not extracted.
        """
        return replace(self, x={pool: self._joined_blocks(pool) for pool in pools})

    def _joined_blocks(self, pool: str) -> Tensor | list[Tensor]:
        if pool in self.x and not isinstance(self.x[pool], Tensor):
            # A list stays one: stacking would read a disk's features into memory
            return self.x[pool]
        return _stack([self._joined(pool, block) for block in self.blocks])

    def _joined(self, pool: str, block: int) -> Tensor:
        parts, last = parse_pool(pool)
        wanted = range(max(0, block + 1 - last), block + 1)
        for part in parts:
            if part not in self.x:
                raise InputError(
                    f"pooling {pool!r} needs {part!r}, and there are {', '.join(self.x)}"
                )
        for other in wanted:
            if other not in self.blocks:
                raise InputError(
                    f"pooling {pool!r} of block {block} needs block {other}, which was not extracted"
                )
        found = [self.x[part][self.blocks.index(other)] for other in wanted for part in parts]
        return found[0] if len(found) == 1 else torch.cat(found, -1)


def parse_pool(pool: str) -> tuple[tuple[str, ...], int]:
    """("cls", "mean"), 4 for "cls+mean_last4": what is joined, and of how many blocks; see
    :meth:`Features.joined`.
    """
    match = re.fullmatch(r"(cls|mean|cls\+mean)(?:_last([1-9]\d*))?", pool)
    if not match:
        raise InputError(
            f"unknown pooling {pool!r}: choose from cls, mean, cls+mean, each with _lastN for the last N blocks"
        )
    return tuple(match[1].split("+")), int(match[2] or 1)


def _stack(blocks: list[Tensor]) -> Tensor | list[Tensor]:
    return torch.stack(blocks) if len({x.shape[1] for x in blocks}) == 1 else blocks


def _room(images: int, like: list[Tensor]) -> Tensor | list[Tensor]:
    """Memory for the features of ``images`` images after every block, as :attr:`Features.x` holds
    them.
    """
    dims = [x.shape[1] for x in like]
    return (
        torch.empty(len(dims), images, dims[0])
        if len(set(dims)) == 1
        else [torch.empty(images, dim) for dim in dims]
    )


def pixel_features(dataset: Dataset, size: int) -> Features:
    """The raw-pixel baseline: images resized to ``size`` and flattened, as one "block" with the
    pooling "pixels".
    """
    rows = [dataset[i] for i in range(len(dataset))]
    x = torch.stack(
        [
            torch.from_numpy(np.array(to_pil(image).resize((size, size)))).flatten()
            for image, _ in rows
        ]
    )
    return Features(
        {"pixels": x.float()[None] / 255}, torch.tensor([int(label) for _, label in rows]), (0,), 1
    )


class Transformed(Dataset):
    """(transformed image, label) of a map-style data set of (image, label)."""

    def __init__(self, dataset: Dataset, transform):
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int):
        image, label = self.dataset[i]
        return self.transform(to_pil(image)), int(label)


def extract_features(
    encoder: nn.Module,
    dataset: Dataset,
    *,
    blocks: str | Sequence[int] = "all",
    pools: Sequence[str] | None = None,
    final_norm: bool = False,
    batch_size: int = 256,
    num_workers: int = 0,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
) -> Features:
    """Features of every image of ``dataset`` after every block of ``encoder``, in memory.

    The paper's protocol is the default: raw block outputs, before any LayerNorm. In a process group
    every process takes its share of the images and all of them return the whole, in the data set's
    order.

    Args:
        encoder: from :func:`mimrefiner.load_encoder`, or any timm ViT; its ``pretrained_cfg`` says
            how images are prepared.
        dataset: map-style, (image, label).
        blocks: "all" or 0-based blocks.
        pools: of "cls", "mean"; None takes those the model has.
        final_norm: apply the encoder's final LayerNorm to every block's tokens (as
            ``forward_intermediates(norm=True)``).
        batch_size, num_workers: of the loader.
        device: None takes a GPU where there is one. The encoder is returned to where it was.
        autocast: torch.bfloat16 or torch.float16 to run in lower precision; features are stored as
            float32.

    Raises:
        InputError: a block out of range, cls pooling of a model without cls token, an empty data
            set.
    """
    blocks, pools = resolve(encoder, blocks, pools)
    rank, world = distributed.rank(), distributed.world()
    n = len(dataset)
    shares = [range(n * r // world, n * (r + 1) // world) for r in range(world)]
    # The same number everywhere: sharded encoders wait
    rows = [*shares[rank], *[0] * (-(-n // world) - len(shares[rank]))]
    share: dict[
        str, Tensor | list[Tensor]
    ] = {}  # of this process, per pooling and block (images, dim)
    labels = []
    options = {
        "final_norm": final_norm,
        "batch_size": batch_size,
        "num_workers": num_workers,
        "device": device,
        "autocast": autocast,
    }
    for pooled, label in feature_batches(encoder, dataset, rows, blocks, pools, **options):
        if not share:  # written in place: small tensors kept from every batch would break up the memory that forward passes reuse
            share = {pool: _room(len(rows), pooled[pool]) for pool in pools}
        begin = sum(map(len, labels))
        for pool in pools:
            for whole, x in zip(share[pool], pooled[pool], strict=True):
                whole[begin : begin + len(label)] = x
        labels.append(label)
    counts, y = [len(part) for part in shares], torch.cat(labels)
    if world > 1:
        share, y = (
            {pool: _stack([gather_rows(part, counts) for part in share[pool]]) for pool in pools},
            gather_rows(y, counts),
        )
    return Features(share, y, blocks, depth_of(encoder))


def resolve(
    encoder: nn.Module, blocks: str | Sequence[int], pools: Sequence[str] | None
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """0-based blocks and poolings as tuples, checked against the encoder."""
    depth = depth_of(encoder)
    return (tuple(range(depth)) if blocks == "all" else check_blocks(blocks, depth)), check_pools(
        encoder, pools
    )


@torch.no_grad()
def feature_batches(
    encoder: nn.Module,
    dataset: Dataset,
    rows: Sequence[int],
    blocks: Sequence[int],
    pools: Sequence[str],
    *,
    final_norm: bool = False,
    batch_size: int = 256,
    num_workers: int = 0,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
) -> Iterator[tuple[dict[str, list[Tensor]], Tensor]]:
    """Pooled features and labels of the images ``rows``, batch by batch, float32 on the CPU; see
    :func:`extract_features`.
    """
    if len(dataset) == 0:
        raise InputError("the data set is empty")
    if batch_size < 1 or num_workers < 0:
        raise InputError(
            f"expected batch_size >= 1 and loader processes (workers) >= 0, got {batch_size} and {num_workers}"
        )
    device = torch.device(device) if device is not None else default_device()
    home, was_training = next(encoder.parameters()).device, encoder.training
    loader = DataLoader(
        Subset(Transformed(dataset, eval_transform(encoder)), rows),
        batch_size,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
    )
    encoder.eval().to(device)
    began = time.monotonic()
    try:
        for i, (images, label) in enumerate(progress(loader, "features", unit="batch")):
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                images = images.to(device, non_blocking=True)
                pooled = pooled_blocks(
                    encoder, images, blocks, pools, norm_blocks=blocks if final_norm else ()
                )
            pooled = {pool: [x.float().cpu() for x in pooled[pool]] for pool in pools}
            if i == 0:
                _announce(pooled, len(rows), len(label), time.monotonic() - began)
            yield pooled, label
    finally:
        encoder.train(was_training).to(home)


def _announce(pooled: dict[str, list[Tensor]], images: int, batch: int, seconds: float) -> None:
    """Say what a long extraction will take, judged by its first batch."""
    size = images / batch * sum(4 * x.numel() for blocks in pooled.values() for x in blocks) / 2**30
    if seconds * images / batch > LONG_SECONDS or size > LARGE_GIB:
        minutes = seconds * images / batch / 60
        room = f"{size:,.1f} GiB" if size >= 1 else f"{1024 * size:,.1f} MiB"
        print(
            f"features of {images:,} images: {room} as float32, about {minutes:.0f} minutes",
            file=sys.stderr,
        )
