"""Pooled features of every block in one pass.

Tokens are pooled as each block ends, so that only (batch, dim) per block stays alive; ``timm``'s
``forward_intermediates``, which keeps every block's tokens, is the oracle in the tests.
"""

import logging
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from mimrefiner import distributed
from mimrefiner.config import check_blocks
from mimrefiner.data.labelled import Transformed
from mimrefiner.data.loaders import without_traces
from mimrefiner.data.rows import row_of, size_of
from mimrefiner.device import device_of, dtype_of, frozen, full_float32
from mimrefiner.distributed import gather_rows
from mimrefiner.errors import InputError
from mimrefiner.models.blocks import depth_of, pooled_blocks
from mimrefiner.models.encoders import eval_transform
from mimrefiner.models.pools import check_pools
from mimrefiner.models.wrappers import unwrapped
from mimrefiner.progress import progress
from mimrefiner.training.memory import advice_on_memory

logger = logging.getLogger(__name__)

LESS_AT_ONCE = "pass fewer images at a time (batch_size, --batch-size)"
LONG_SECONDS, LARGE_GIB = 120, 4  # from here on an estimate is announced


@dataclass
class Features:
    """Features of a data set, one row per image after every block.

    Attributes:
        x: for every pooling ("cls", "mean"), float32 (blocks, images, dim); a list of (images,
            dim_b) where widths differ or where they are mapped from a disk.
        y: labels, (images,), -1 where there are none.
        blocks: the 0-based block of every row of ``x``.
        depth: number of blocks of the encoder.

    >>> import mimrefiner as mr, torch
    >>> x = {"cls": torch.zeros(2, 5, 8), "mean": torch.ones(2, 5, 8)}
    >>> features = mr.Features(x, y=torch.arange(5), blocks=(3, 7), depth=8)
    >>> features.subset([4, 0]).y
    tensor([4, 0])
    >>> features.joined(("cls+mean",)).x["cls+mean"].shape
    torch.Size([2, 5, 16])
    """

    x: dict[str, Tensor | list[Tensor]]
    y: Tensor
    blocks: tuple[int, ...]
    depth: int

    def subset(self, rows) -> "Features":
        """The images at positions ``rows``, in that order."""
        rows = torch.as_tensor(rows)
        x = {pool: _stack([x[rows] for x in blocks]) for pool, blocks in self.x.items()}
        return replace(self, x=x, y=self.y[rows])

    def joined(self, pools: Sequence[str]) -> "Features":
        """Poolings joined to wider ones.

        Args:
            pools: of "cls", "mean" and "cls+mean" (both side by side), each also with "_lastN",
                which puts the blocks b - N + 1 to b side by side: "cls+mean_last4" is the widest
                of the paper's grid. The first N - 1 blocks take all blocks before them.

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
                    f"pooling {pool!r} of block {block} needs block {other}, "
                    "which was not extracted"
                )
        found = [self.x[part][self.blocks.index(other)] for other in wanted for part in parts]
        return found[0] if len(found) == 1 else torch.cat(found, -1)


def parse_pool(pool: str) -> tuple[tuple[str, ...], int]:
    """What a pooling joins, and of how many blocks; see :meth:`Features.joined`.

    >>> parse_pool("cls+mean_last4")
    (('cls', 'mean'), 4)
    """
    match = re.fullmatch(r"(cls|mean|cls\+mean)(?:_last([1-9]\d*))?", pool)
    if not match:
        raise InputError(
            f"unknown pooling {pool!r}: choose from cls, mean, cls+mean, "
            "each with _lastN for the last N blocks"
        )
    return tuple(match[1].split("+")), int(match[2] or 1)


def _stack(blocks: list[Tensor]) -> Tensor | list[Tensor]:
    return torch.stack(blocks) if len({x.shape[1] for x in blocks}) == 1 else blocks


def _room(images: int, like: list[Tensor]) -> Tensor | list[Tensor]:
    """Memory for ``images`` rows after every block, in the form of :attr:`Features.x`."""
    dims = [x.shape[1] for x in like]
    if len(set(dims)) == 1:
        return torch.empty(len(dims), images, dims[0])
    return [torch.empty(images, dim) for dim in dims]


def pixel_features(dataset: Dataset, size: int) -> Features:
    """The raw-pixel baseline: images as features of one "block" with the pooling "pixels".

    Args:
        dataset: map-style, (image, label).
        size: images are resized to this many pixels on each side and flattened.

    >>> import mimrefiner as mr
    >>> images = mr.load_dataset("digits", split="test").take(10)
    >>> mr.pixel_features(images, 8).x["pixels"].shape  # 8 x 8 pixels of 3 colours
    torch.Size([1, 10, 192])
    """
    rows = [row_of(dataset, i) for i in range(size_of(dataset))]
    pixels = [np.array(image.resize((size, size))) for image, _ in rows]
    x = torch.stack([torch.from_numpy(x).flatten() for x in pixels])
    y = torch.tensor([label for _, label in rows])
    return Features({"pixels": x.float()[None] / 255}, y, (0,), 1)


@dataclass(frozen=True)
class Selection:
    """What is kept of an encoder's outputs.

    Attributes:
        blocks: 0-based.
        pools: of "cls", "mean".
        final_norm: whether tokens pass the encoder's final LayerNorm first.
    """

    blocks: tuple[int, ...]
    pools: tuple[str, ...]
    final_norm: bool = False

    @classmethod
    def of(
        cls,
        encoder: nn.Module,
        blocks: str | Sequence[int],
        pools: Sequence[str] | None,
        final_norm: bool = False,
    ) -> "Selection":
        """What :func:`extract_features` is asked for, checked against the encoder."""
        depth = depth_of(encoder)
        blocks = tuple(range(depth)) if blocks == "all" else check_blocks(blocks, depth)
        return cls(blocks, check_pools(encoder, pools, blocks), final_norm)


@dataclass(frozen=True)
class Loading:
    """How images pass the encoder.

    Attributes:
        batch_size: images at a time.
        num_workers: processes that load them; 0 loads in this one.
        device: None takes a GPU where there is one.
        autocast: torch.bfloat16 or torch.float16 for lower precision, also by name.
    """

    batch_size: int = 256
    num_workers: int = 0
    device: torch.device | str | None = None
    autocast: torch.dtype | None = None

    def __post_init__(self):
        numbers = (self.batch_size, self.num_workers)
        if not all(isinstance(number, Integral) for number in numbers):
            raise InputError(f"batch_size and num_workers must be whole numbers, got {numbers}")
        if self.batch_size < 1 or self.num_workers < 0:
            raise InputError(
                "expected batch_size >= 1 and loader processes (workers) >= 0, "
                f"got {self.batch_size} and {self.num_workers}"
            )
        lower = dtype_of("autocast", self.autocast)
        object.__setattr__(self, "device", device_of(self.device))
        object.__setattr__(self, "autocast", None if lower == torch.float32 else lower)


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
            how images are prepared. It is returned to the device where it was, and sees images in
            the precision of its weights.
        dataset: map-style, with rows (image, label) or what else
            :func:`mimrefiner.data.rows.row_of` reads.
        blocks: "all" or 0-based blocks.
        pools: of "cls", "mean"; None takes those the model has.
        final_norm: apply the encoder's final LayerNorm to every block's tokens (as
            ``forward_intermediates(norm=True)``).
        batch_size, num_workers, device, autocast: see :class:`Loading`; features are float32 in
            any precision.

    Raises:
        InputError: a block out of range, cls pooling of a model without cls token, an empty data
            set.

    >>> import mimrefiner as mr
    >>> encoder = mr.build_vit(mr.ViTConfig(dim=32, depth=3, num_heads=2))
    >>> images = mr.load_dataset("digits", split="test").take(8)
    >>> features = mr.extract_features(encoder, images, pools=("cls",))
    >>> features.x["cls"].shape, features.blocks
    (torch.Size([3, 8, 32]), (0, 1, 2))
    """
    encoder = unwrapped(encoder)
    if any(x.is_meta for x in encoder.parameters()):
        raise InputError("the encoder lies on the meta device, without weights: load them first")
    selection = Selection.of(encoder, blocks, pools, final_norm)
    loading = Loading(batch_size, num_workers, device, autocast)
    shares = [process_share(range(size_of(dataset)), rank) for rank in range(distributed.world())]
    rows = padded(shares[distributed.rank()], max(map(len, shares)))
    x, y = _collected(feature_batches(encoder, dataset, rows, selection, loading), len(rows))
    if len(shares) > 1:
        counts = [len(part) for part in shares]
        x = {pool: _stack([gather_rows(part, counts) for part in x[pool]]) for pool in x}
        y = gather_rows(y, counts)
    return Features(x, y, selection.blocks, depth_of(encoder))


def _collected(
    batches: Iterator[tuple[dict[str, list[Tensor]], Tensor]], images: int
) -> tuple[dict[str, Tensor | list[Tensor]], Tensor]:
    """Batches of together ``images`` as :class:`Features` holds them: x and y."""
    x: dict[str, Tensor | list[Tensor]] = {}
    labels: list[Tensor] = []
    for pooled, label in batches:
        # Written in place: small tensors kept from every batch would break up the memory that
        # forward passes reuse
        if not x:
            x = {pool: _room(images, like) for pool, like in pooled.items()}
        begin = sum(map(len, labels))
        for pool, parts in pooled.items():
            for whole, part in zip(x[pool], parts, strict=True):
                whole[begin : begin + len(label)] = part
        labels.append(label)
    return x, torch.cat(labels)


def process_share(rows: range, rank: int) -> range:
    """The part of ``rows`` that process ``rank`` takes; all parts in order are the whole.

    >>> process_share(range(10, 17), 0)
    range(10, 17)
    """
    world = distributed.world()
    return rows[len(rows) * rank // world : len(rows) * (rank + 1) // world]


def padded(rows: range, number: int) -> list[int]:
    """``rows`` and as often the last of them (image 0 where there are none) as makes ``number``.

    All processes of a group pass equally many images, because sharded encoders wait for each other.

    >>> padded(range(3, 5), 4)
    [3, 4, 4, 4]
    """
    last = rows[-1] if rows else 0
    return [*rows, *[last] * (number - len(rows))]


@torch.no_grad()
def feature_batches(
    encoder: nn.Module,
    dataset: Dataset,
    rows: Sequence[int],
    selection: Selection,
    loading: Loading,
) -> Iterator[tuple[dict[str, list[Tensor]], Tensor]]:
    """Pooled features and labels of the images ``rows``, batch by batch, float32 on the CPU."""
    if size_of(dataset) == 0:
        raise InputError("the data set is empty")
    device, autocast = loading.device, loading.autocast
    loader = DataLoader(
        Subset(Transformed(dataset, eval_transform(encoder)), rows),
        loading.batch_size,
        num_workers=loading.num_workers,
        pin_memory=device.type == "cuda",
    )
    batches = without_traces(loader)
    blocks, pools = selection.blocks, selection.pools
    norm_blocks = blocks if selection.final_norm else ()
    kind = next(encoder.parameters()).dtype
    with frozen(encoder, device):
        began = time.monotonic()
        for i, (images, label) in enumerate(progress(batches, "features", len(loader), "batch")):
            precision = torch.autocast(device.type, autocast, enabled=autocast is not None)
            with precision, full_float32(), advice_on_memory(LESS_AT_ONCE):
                images = images.to(device, kind, non_blocking=True)
                pooled = pooled_blocks(encoder, images, blocks, pools, norm_blocks=norm_blocks)
            pooled = {pool: [x.float().cpu() for x in pooled[pool]] for pool in pools}
            if i == 0:
                _announce(pooled, len(rows), len(label), time.monotonic() - began)
            yield pooled, label


def _announce(pooled: dict[str, list[Tensor]], images: int, batch: int, seconds: float) -> None:
    """Say what a long extraction will take, judged by its first batch."""
    size = images / batch * sum(4 * x.numel() for blocks in pooled.values() for x in blocks) / 2**30
    if seconds * images / batch > LONG_SECONDS or size > LARGE_GIB:
        minutes = seconds * images / batch / 60
        room = f"{size:,.1f} GiB" if size >= 1 else f"{1024 * size:,.1f} MiB"
        logger.info(
            "features of %s images: %s as float32, about %.0f minutes", f"{images:,}", room, minutes
        )
