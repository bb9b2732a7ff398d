"""Which images the k-NN vote gets right after every block, for several models and seeds."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from mimrefiner.data.datasets import ImageDataset
from mimrefiner.probes.features import extract_features, pixel_features
from mimrefiner.probes.knn import knn_hits
from mimrefiner.study.claims import Record, block_rows
from mimrefiner.study.intervals import Difference, image_difference
from mimrefiner.study.tables import mean_sd

Models = Mapping[tuple[str, int], nn.Module]  # (name, seed) -> encoder


@dataclass(frozen=True)
class Looks:
    """What :func:`look` found. Blocks are counted from 1 wherever a reader sees them.

    Attributes:
        models: (name, seed) -> encoder.
        hits: (name, seed, "val" or "test") -> pooling -> which images are right, (blocks, images).
        pixels: which test images the same vote gets right on raw pixels, (images,).
        n_train: how many images vote.
    """

    models: Models
    hits: dict[tuple[str, int, str], dict[str, Tensor]]
    pixels: Tensor
    n_train: int

    @property
    def n_test(self) -> int:
        """How many images are asked."""
        return len(self.pixels)

    @property
    def raw_pixels(self) -> float:
        """The accuracy of raw pixels, a share."""
        return float(self.pixels.float().mean())

    def seeds(self, name: str) -> list[int]:
        """The seeds of the models called ``name``."""
        return [seed for label, seed in self.models if label == name]

    def accuracy(self, name: str, pool: str = "cls", split: str = "test") -> np.ndarray:
        """Accuracy after every block in percent, (seeds, blocks)."""
        hits = [self.hits[name, seed, split][pool] for seed in self.seeds(name)]
        return 100 * torch.stack(hits).float().mean(-1).numpy()

    def chosen(self, name: str, pool: str = "cls") -> list[int]:
        """The block that is best on validation images, for every seed, counted from 1."""
        return [int(block) + 1 for block in self.accuracy(name, pool, "val").argmax(1)]

    def last(self, name: str, pool: str = "cls") -> list[np.ndarray]:
        """Which test images are right after the last block, (images,) for every seed."""
        return [self.hits[name, seed, "test"][pool][-1].numpy() for seed in self.seeds(name)]

    def best(self, name: str, pool: str = "cls") -> list[np.ndarray]:
        """The same after the block that :meth:`chosen` names."""
        chosen = zip(self.seeds(name), self.chosen(name, pool), strict=True)
        return [self.hits[name, seed, "test"][pool][block - 1].numpy() for seed, block in chosen]

    def against_pixels(self, ours: Sequence[np.ndarray]) -> Difference:
        """How much more images ``ours`` gets right than raw pixels do."""
        return image_difference(ours, [self.pixels.numpy()] * len(ours))

    def rows(self, pool: str = "cls") -> pd.DataFrame:
        """The curves as figures take them: label, block (0-based), seed, value."""
        curves = [
            block_rows({name: self.hits[name, seed, "test"][pool]}, seed)
            for name, seed in self.models
        ]
        return pd.concat(curves).sort_values("label", kind="stable", ignore_index=True)

    def add_to(self, run: Record, dataset: str | None = None) -> None:
        """Add a row per model, pooling and block to the results of ``run``."""
        for name, seed in self.models:
            for pool, hits in self.hits[name, seed, "test"].items():
                models = {name: (self.models[name, seed], hits)}
                run.add_blocks(models, pool, seed, self.n_train, self.n_test, dataset=dataset)


def look(
    models: Models,
    train: ImageDataset,
    test: ImageDataset,
    val: ImageDataset | None = None,
    *,
    pools: Iterable[str] | None = None,
    pixel_size: int = 32,
) -> Looks:
    """Ask the k-NN vote after every block of every model.

    Args:
        models: (name, seed) -> encoder.
        train: the images that vote.
        test: the images that numbers are reported on.
        val: the images that blocks are chosen on; None where nothing is chosen.
        pools: poolings of the tokens; None takes all that every model has.
        pixel_size: side to which images are resized for the vote on raw pixels.

    >>> import mimrefiner as mr
    >>> digits = mr.load_dataset("digits", split="train").take(40)
    >>> encoder = mr.build_vit(mr.ViTConfig(dim=16, depth=3))
    >>> found = look({("random weights", 0): encoder}, digits, digits, digits)
    >>> found.accuracy("random weights").shape, len(found.chosen("random weights"))
    ((1, 3), 1)
    """
    hits, parts = {}, {"test": test} | ({} if val is None else {"val": val})
    for (name, seed), encoder in models.items():
        bank = extract_features(encoder, train, pools=pools)
        for split, part in parts.items():
            hits[name, seed, split] = knn_hits(bank, extract_features(encoder, part, pools=pools))
    pair = (pixel_features(part, pixel_size) for part in (train, test))
    return Looks(models, hits, knn_hits(*pair)["pixels"][0], len(train))


def percent(hits: Sequence[np.ndarray]) -> str:
    """The share that is right, in percent: the mean over seeds, with its spread where there is one.

    >>> percent([np.array([True, False]), np.array([True, True])])
    '75.0 ± 35.4 %'
    """
    return f"{mean_sd([float(np.mean(right)) for right in hits])} %"
