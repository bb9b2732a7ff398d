"""Linear probes of all blocks, poolings and learning rates at once (the grid of DINOv2, arXiv
2304.07193, that the paper uses).

All probes share the batches. Probes of one width are one batched matrix product, so that a grid of
hundreds costs little more than one probe.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from mimrefiner.config import Crop, Views
from mimrefiner.data.datasets import stratified_split
from mimrefiner.data.views import view_batches
from mimrefiner.errors import InputError
from mimrefiner.models.blocks import check_pools, pooled_blocks
from mimrefiner.models.encoders import normalisation
from mimrefiner.probes.checks import (
    check_alike,
    check_count,
    check_finite,
    check_labels,
    check_test_labels,
    tidy,
)
from mimrefiner.probes.features import Features, parse_pool
from mimrefiner.progress import progress
from mimrefiner.training.refine import cosine_lr

# Times batch_size / 256
LEARNING_RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)


class JointProbes:
    """One linear classifier per (feature, learning rate), trained together by SGD with momentum 0.9
    and no weight decay.

    Batch norm without affine parameters comes first (running statistics at test time); weights
    start at N(0, 0.01), biases at 0.

    Args:
        features: number of feature kinds, all ``dim`` wide.
        dim, classes: width and number of classes.
        learning_rates: the peak rates, already scaled by the batch size.
        seed: of the initial weights.
    """

    def __init__(
        self,
        features: int,
        dim: int,
        classes: int,
        learning_rates: Tensor,
        *,
        seed: int,
        device: torch.device,
    ):
        generator = torch.Generator().manual_seed(seed)
        start = nn.init.trunc_normal_(
            torch.empty(features, dim, 1, classes), std=0.01, generator=generator
        )
        rates = len(learning_rates)
        # (features, dim, rates, classes)
        self.weight = start.expand(-1, -1, rates, -1).clone().to(device).requires_grad_()
        self.bias = torch.zeros(features, 1, rates, classes, device=device, requires_grad=True)
        self.norm = nn.BatchNorm1d(features * dim, affine=False).to(device)
        self.rates = learning_rates.to(device)
        self.momentum = [torch.zeros_like(x) for x in (self.weight, self.bias)]

    def logits(self, x: Tensor) -> Tensor:
        """(features, batch, dim) -> (features, batch, rates, classes)."""
        kinds, batch, dim = x.shape
        x = (
            self.norm(x.transpose(0, 1).reshape(batch, kinds * dim))
            .view(batch, kinds, dim)
            .transpose(0, 1)
        )
        return torch.bmm(x, self.weight.flatten(2)).unflatten(-1, self.weight.shape[2:]) + self.bias

    def step(self, x: Tensor, y: Tensor, schedule: float) -> None:
        """One step of every probe; ``schedule``: the share of the peak rate."""
        self.norm.train()
        logits = self.logits(x)  # the sum over probes lets every probe see its own gradient only
        target = y[None, :, None].expand(logits.shape[:-1])
        loss = F.cross_entropy(logits.flatten(0, 2), target.flatten(), reduction="sum") / len(y)
        gradients = torch.autograd.grad(loss, (self.weight, self.bias))
        with torch.no_grad():
            for parameter, gradient, momentum in zip(
                (self.weight, self.bias), gradients, self.momentum, strict=True
            ):
                momentum.mul_(0.9).add_(gradient)
                parameter -= schedule * self.rates[:, None] * momentum

    @torch.no_grad()
    def right(self, x: Tensor, y: Tensor) -> Tensor:
        """Which images every probe gets right, (features, rates, batch)."""
        self.norm.eval()
        return (self.logits(x).argmax(-1) == y[None, :, None]).transpose(1, 2)


def linear_probe(
    train: Features,
    test: Features,
    *,
    val: Features | None = None,
    learning_rates: Sequence[float] = LEARNING_RATES,
    epochs: int = 50,
    batch_size: int = 1024,
    choose: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
    hits: bool = False,
) -> pd.DataFrame:
    """Linear-probe accuracy of every block and pooling on cached features.

    The learning rate is chosen on ``val`` for every block and pooling; the chosen probe is tested
    once. The paper's grid of poolings and blocks is ``train.joined(("cls", "cls+mean", "cls_last4",
    "cls+mean_last4"))`` with ``choose``.

    Args:
        train, test: see :func:`mimrefiner.extract_features`; test labels of classes that are not in
            train count as wrong.
        val: for the choice; None holds out a tenth of ``train``, the same share of every class.
        learning_rates: peak rates of the grid, times batch_size / 256; warm-up over a tenth of the
            steps, then cosine.
        epochs, batch_size: of the training; a batch is at most the training set.
        choose: also a row per block, with the pooling "chosen", for the pooling and learning rate
            that ``val`` prefers.
        seed: of initial weights, order and hold-out.
        hits: also a column of which test images are right, (n_test,) bool in every row.

    Returns:
        One row per block and pooling, columns as :data:`mimrefiner.probes.checks.COLUMNS`.

    Raises:
        InputError: labels missing or of one class only; NaN features; features of different blocks
            or poolings.
    """
    check_alike(train, test, *(() if val is None else (val,)))
    check_finite(train, test)
    classes = check_labels(train.y, "a linear probe", everywhere=True)
    _check_training(test, epochs, batch_size)
    if val is None:
        val, train = hold_out(train, seed)
    if len(train.y) < 2:
        raise InputError(
            f"a linear probe needs at least 2 training images beside those held out, got {len(train.y)}"
        )
    batch_size = min(batch_size, len(train.y))
    steps = epochs * (len(train.y) // batch_size)
    grid = _Grid(train, classes, learning_rates, batch_size, seed, device)
    y, order = torch.searchsorted(classes, train.y), np.random.default_rng(seed)
    for step in progress(range(steps), "linear probes"):
        if step % (len(y) // batch_size) == 0:
            permutation = torch.from_numpy(order.permutation(len(y)))
        part = permutation[step % (len(y) // batch_size) * batch_size :][:batch_size]
        grid.step(train, part, y[part], schedule(step, steps))
    return grid.rows(
        val, test, choose, {"seed": seed, "n_train": len(y), "n_test": len(test.y)}, hits
    )


def linear_probe_augmented(
    encoder: nn.Module,
    dataset: Dataset,
    val: Features,
    test: Features,
    *,
    learning_rates: Sequence[float] = LEARNING_RATES,
    epochs: int = 50,
    batch_size: int = 1024,
    choose: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
    num_workers: int = 0,
) -> pd.DataFrame:
    """As :func:`linear_probe`, with the paper's augmentation (random resized crop of 8 to 100 % of
    the area, flip) on the fly.

    Every batch passes the frozen encoder once, for all blocks and poolings of ``val`` (joined ones
    too). Arguments and rows as there; ``dataset``: map-style, (image, label), with its ``labels``,
    the training images.
    """
    check_alike(val, test)
    check_finite(val, test)
    _check_training(test, epochs, batch_size)
    labels = getattr(dataset, "labels", None)
    if labels is None:
        raise InputError("a linear probe needs labels, and this data set has no attribute labels")
    classes = check_labels(torch.as_tensor(labels), "a linear probe", everywhere=True)
    plain = check_pools(encoder, sorted({part for pool in val.x for part in parse_pool(pool)[0]}))
    size = encoder.pretrained_cfg["input_size"][-1]
    crop = Crop(size, (0.08, 1.0), flip_p=0.5, jitter_p=0.0, grey_p=0.0)
    batch_size = min(batch_size, len(dataset))
    steps = epochs * (len(dataset) // batch_size)
    mean, std = normalisation(encoder)
    batches = view_batches(
        dataset,
        Views((crop,), crop, 0),
        batch_size=batch_size,
        steps=steps,
        seed=seed,
        mean=mean,
        std=std,
        device=device,
        num_workers=num_workers,
    )
    grid = _Grid(val, classes, learning_rates, batch_size, seed, device)
    every = torch.arange(batch_size)
    home, was_training = next(encoder.parameters()).device, encoder.training
    encoder.eval().to(device)
    try:
        for step, (views, _, label) in enumerate(
            progress(batches, "linear probes, augmented", steps)
        ):
            with torch.no_grad():
                pooled = pooled_blocks(encoder, views[0], val.blocks, plain)
            batch = Features(pooled, label, val.blocks, val.depth).joined(list(val.x))
            grid.step(batch, every, torch.searchsorted(classes, label.cpu()), schedule(step, steps))
    finally:
        encoder.train(was_training).to(home)
    return grid.rows(
        val, test, choose, {"seed": seed, "n_train": len(dataset), "n_test": len(test.y)}
    )


class _Grid:
    """Joint probes on every block and pooling of ``like``, one :class:`JointProbes` per width, and
    the choice among them.
    """

    def __init__(
        self,
        like: Features,
        classes: Tensor,
        learning_rates: Sequence[float],
        batch_size: int,
        seed: int,
        device,
    ):
        if not len(learning_rates) or not all(rate > 0 for rate in learning_rates):
            raise InputError(f"learning rates must be > 0, got {list(learning_rates)}")
        self.classes, self.learning_rates, self.device = (
            classes,
            learning_rates,
            torch.device(device),
        )
        self.keys: dict[
            int, list[tuple[str, int]]
        ] = {}  # width -> (pooling, position of the block)
        for pool, blocks in like.x.items():
            for position, x in enumerate(blocks):
                self.keys.setdefault(x.shape[1], []).append((pool, position))
        rates = torch.tensor(learning_rates) * batch_size / 256
        self.probes = {
            width: JointProbes(len(keys), width, len(classes), rates, seed=seed, device=self.device)
            for width, keys in self.keys.items()
        }

    def _batch(self, features: Features, keys: list[tuple[str, int]], rows: Tensor) -> Tensor:
        """(kinds, rows, width)."""
        return (
            torch.stack([features.x[pool][position][rows] for pool, position in keys])
            .float()
            .to(self.device)
        )

    def step(self, features: Features, rows: Tensor, y: Tensor, share: float) -> None:
        """One step of every probe on ``rows`` of ``features``; ``y``: class indices."""
        for width, keys in self.keys.items():
            self.probes[width].step(self._batch(features, keys, rows), y.to(self.device), share)

    def right(self, features: Features, keys: list[tuple[str, int]], probes: JointProbes) -> Tensor:
        """(kinds, rates, images) bool."""
        y = torch.where(
            torch.isin(features.y, self.classes), torch.searchsorted(self.classes, features.y), -1
        )
        parts = torch.arange(len(y)).split(4096)
        return torch.cat(
            [
                probes.right(self._batch(features, keys, rows), y[rows].to(self.device)).cpu()
                for rows in parts
            ],
            -1,
        )

    def rows(
        self, val: Features, test: Features, choose: bool, common: dict, hits: bool = False
    ) -> pd.DataFrame:
        """The rate that does best on ``val`` for every block and pooling, and what it does on
        ``test``.
        """
        found, on_val = {}, {}
        for width, keys in self.keys.items():
            shares, right = (
                self.right(val, keys, self.probes[width]).float().mean(-1),
                self.right(test, keys, self.probes[width]),
            )
            for i, key in enumerate(keys):
                best = shares[i].argmax().item()
                on_val[key] = shares[i, best].item()
                found[key] = {
                    "value": right[i, best].float().mean().item(),
                    "setting": f"lr={self.learning_rates[best]:g}",
                }
                found[key] |= {"hits": right[i, best]} if hits else {}
        common = {"protocol": "linear", "metric": "accuracy", **common}
        rows = [
            {**common, "block": block, "pool": pool, **found[pool, position]}
            for pool in val.x
            for position, block in enumerate(val.blocks)
        ]
        for position, block in enumerate(val.blocks) if choose else ():
            pool = max(val.x, key=lambda pool: on_val[pool, position])
            chosen = found[pool, position]
            rows.append(
                {
                    **common,
                    "block": block,
                    "pool": "chosen",
                    **chosen,
                    "setting": f"{pool} {chosen['setting']}",
                }
            )
        return tidy(rows)


def _check_training(test: Features, epochs: int, batch_size: int) -> None:
    check_test_labels(test.y, "a linear probe")
    check_count("epochs", epochs)
    check_count("batch_size", batch_size, 2)  # batch norm


def hold_out(features: Features, seed: int, share: float = 0.1) -> tuple[Features, Features]:
    """(held out, rest): a share of the images, the same of every class."""
    n = max(1, round(share * len(features.y)))
    held, rest = stratified_split(features.y.numpy(), len(features.y), n, seed)
    return features.subset(held), features.subset(rest)


def schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate: a tenth of the steps up, then half a cosine down."""
    return cosine_lr(step, steps, 0.1 * steps, 1.0, 0.0)
