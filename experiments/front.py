"""The frozen first blocks of an encoder, which many models share: their tokens are computed once.

Measuring a model then takes the time of its other blocks only.
"""

import copy
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from experiments.measure import PIXELS
from mimrefiner.data.datasets import ImageDataset, data_hash, short_name
from mimrefiner.device import default_device, frozen, full_float32
from mimrefiner.errors import InputError
from mimrefiner.files import Entry
from mimrefiner.models.blocks import hooked, pooled_blocks
from mimrefiner.models.encoders import eval_transform
from mimrefiner.models.pools import available_pools
from mimrefiner.models.weights import sha256_of
from mimrefiner.probes.features import Features, Transformed, pixel_features
from mimrefiner.progress import progress

BATCH = 64  # images at a time


class Front:
    """The first blocks of an encoder, frozen in all trainings that start from it.

    Args:
        encoder: a timm ViT.
        blocks: how many blocks are frozen.
        folder: keeps the tokens that leave them, an entry for every data set.
    """

    def __init__(self, encoder: nn.Module, blocks: int, folder: Path):
        self.blocks, self.folder = blocks, folder
        self.encoder = first_blocks(encoder, blocks)
        self.sha = sha256_of(self.encoder)

    def features(self, encoder: nn.Module | None, dataset: ImageDataset) -> Features:
        """Features after every block of ``encoder``, in float32; None stands for raw pixels.

        Raises:
            InputError: the encoder has other first blocks.
        """
        if encoder is None:
            return pixel_features(dataset, PIXELS)
        # Averages turn -0.0 into 0.0, which a hash would tell apart
        states = [x.state_dict() for x in (self.encoder, first_blocks(encoder, self.blocks))]
        if not all(torch.equal(x, y) for x, y in zip(*map(dict.values, states), strict=True)):
            raise InputError("the first blocks of this encoder are not those whose tokens are kept")
        tokens, first = self._kept(dataset)
        depth, device = len(encoder.blocks), default_device()
        tail = nn.Sequential(*encoder.blocks[self.blocks :])
        x = {
            pool: torch.cat([part, part.new_empty(len(tail), *part.shape[1:])])
            for pool, part in first.items()
        }
        prefix = encoder.num_prefix_tokens
        with torch.no_grad(), frozen(tail, device), full_float32():
            for rows in _batches(len(tokens)):
                out = torch.from_numpy(tokens[rows].copy()).to(device)
                for number, block in enumerate(tail, self.blocks):
                    out = block(out)
                    pooled = {"cls": [out[:, 0]], "mean": [out[:, prefix:].mean(1)]}
                    _put({pool: pooled[pool] for pool in x}, x, rows, number)
        labels = np.full(len(dataset), -1) if dataset.labels is None else dataset.labels
        return Features(x, torch.from_numpy(labels), tuple(range(depth)), depth)

    def _kept(self, dataset: ImageDataset) -> tuple[np.memmap, dict[str, Tensor]]:
        """Tokens behind the front, (images, tokens, dim), and pooled features of its blocks."""
        settings = {"front": self.sha, "blocks": self.blocks, "data": data_hash(dataset)}
        name = f"{short_name(dataset.name)}-{dataset.split}-{len(dataset)}"
        entry = Entry.named(self.folder, name, settings)
        with entry.locked():
            if entry.facts() is None:
                with entry.filled_aside() as folder:
                    self._write(dataset, folder)
                    entry.finish(folder, {"images": len(dataset)})
        tokens = np.load(entry.folder / "tokens.npy", mmap_mode="r")
        return tokens, safetensors.torch.load_file(entry.folder / "pooled.safetensors")

    @torch.no_grad()
    def _write(self, dataset: ImageDataset, folder: Path) -> None:
        loader = DataLoader(Transformed(dataset, eval_transform(self.encoder)), BATCH)
        device, pools = default_device(), available_pools(self.encoder)
        tokens = x = None
        with frozen(self.encoder, device), full_float32():
            batches = progress(loader, "tokens", unit="batch")
            for rows, (images, _) in zip(_batches(len(dataset)), batches, strict=True):
                last, pooled = self._run(images.to(device), pools)
                if tokens is None:  # written in place, so that no small pieces fill the memory
                    shape, file = (len(dataset), *last.shape[1:]), folder / "tokens.npy"
                    tokens = np.lib.format.open_memmap(file, "w+", np.float32, shape)
                    room = (self.blocks, len(dataset), last.shape[-1])
                    x = {pool: torch.empty(room) for pool in pools}
                tokens[rows] = last.cpu().numpy()
                _put(pooled, x, rows)
        tokens.flush()
        safetensors.torch.save_file(x, folder / "pooled.safetensors")

    def _run(self, images: Tensor, pools: tuple[str, ...]) -> tuple[Tensor, dict]:
        """The tokens that leave the last frozen block, and what :func:`pooled_blocks` gives."""
        out = []
        with hooked([self.encoder.blocks[-1]], lambda i, module, given, tokens: out.append(tokens)):
            pooled = pooled_blocks(self.encoder, images, range(self.blocks), pools)
        return out[0], pooled


def first_blocks(encoder: nn.Module, blocks: int) -> nn.Module:
    """A copy of ``encoder`` that ends behind its first ``blocks`` blocks.

    >>> from mimrefiner import ViTConfig, build_vit
    >>> front = first_blocks(build_vit(ViTConfig(dim=16, depth=3)), 2)
    >>> len(front.blocks)
    2
    """
    front = copy.copy(encoder)
    front._modules = {**encoder._modules, "blocks": encoder.blocks[:blocks], "norm": nn.Identity()}
    return copy.deepcopy(front)


def _batches(images: int) -> list[slice]:
    return [slice(begin, min(begin + BATCH, images)) for begin in range(0, images, BATCH)]


def _put(pooled: dict, x: dict[str, Tensor], rows: slice, first: int = 0) -> None:
    """Write one batch into ``x``, from the block ``first`` on."""
    for pool, blocks in pooled.items():
        for block, part in enumerate(blocks, first):
            x[pool][block, rows] = part.float().cpu()
