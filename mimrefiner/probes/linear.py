"""Linear probes on all blocks, poolings and learning rates at once.

The grid is DINOv2's (arXiv 2304.07193), which the paper uses. All probes share the batches. Probes
of one width are one batched matrix product, so that a grid of hundreds costs little more than one
probe.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from mimrefiner.data.augment import plain_views
from mimrefiner.data.datasets import stratified_split
from mimrefiner.data.views import Order, view_batches
from mimrefiner.device import frozen
from mimrefiner.errors import InputError
from mimrefiner.models.blocks import pooled_blocks
from mimrefiner.models.encoders import normalisation
from mimrefiner.models.pools import check_pools
from mimrefiner.models.tokens import input_size
from mimrefiner.probes.checks import (
    check_alike,
    check_count,
    check_finite,
    check_labels,
    check_test_labels,
    tidy,
)
from mimrefiner.probes.features import Features, parse_pool
from mimrefiner.probes.protocols import LINEAR
from mimrefiner.progress import progress
from mimrefiner.training.memory import advice_on_memory
from mimrefiner.training.optim import cosine_lr

# Times batch_size / 256
LESS = "probe fewer learning rates, poolings or blocks at once"
LOGIT_BYTES = 2**30  # at most this much for the logits of test images at a time
LEARNING_RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)


@dataclass(frozen=True)
class Training:
    """How the probes are trained; see :func:`linear_probe`.

    Attributes:
        learning_rates: peak rates of the grid, times batch_size / 256; a tenth of the steps warms
            up, then the rate falls by half a cosine.
        epochs, batch_size: a batch is at most the training set.
        seed: draws initial weights and order.
        device: where the probes are.
    """

    learning_rates: Sequence[float] = LEARNING_RATES
    epochs: int = 50
    batch_size: int = 1024
    seed: int = 0
    device: torch.device | str = "cpu"

    def __post_init__(self):
        check_count("epochs", self.epochs)
        check_count("batch_size", self.batch_size, 2)  # batch norm
        rates = self.learning_rates
        if not len(rates) or not all(rate > 0 for rate in rates):
            raise InputError(f"learning rates must be > 0, got {list(rates)}")


class JointProbes:
    """One linear classifier per (feature, learning rate), trained together.

    SGD has momentum and no weight decay. Batch norm without affine parameters comes first (running
    statistics at test time); weights start at N(0, ``std``), biases at 0.

    Args:
        features: how many kinds of features there are.
        dim: their width.
        classes: how many classes there are.
        learning_rates: the peak rates, already scaled by the batch size.
        seed: draws the initial weights.
        momentum: of SGD.
        std: of the initial weights, whose distribution is cut at 2.
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
        momentum: float = 0.9,
        std: float = 0.01,
    ):
        generator = torch.Generator().manual_seed(seed)
        start = nn.init.trunc_normal_(
            torch.empty(features, dim, 1, classes), std=std, generator=generator
        )
        rates = len(learning_rates)
        # (features, dim, rates, classes)
        self.weight = start.expand(-1, -1, rates, -1).clone().to(device).requires_grad_()
        self.bias = torch.zeros(features, 1, rates, classes, device=device, requires_grad=True)
        self.norm = nn.BatchNorm1d(features * dim, affine=False).to(device)
        self.rates, self.keeps = learning_rates.to(device), momentum
        self.momentum = [torch.zeros_like(x) for x in (self.weight, self.bias)]

    def tensors(self) -> dict[str, Tensor]:
        """All that training changes, by name: weights, biases, momentum, batch norm."""
        own = {"weight": self.weight, "bias": self.bias}
        own |= {f"momentum{i}": x for i, x in enumerate(self.momentum)}
        return own | {f"norm.{name}": x for name, x in self.norm.state_dict().items()}

    def logits(self, x: Tensor) -> Tensor:
        """(features, batch, dim) -> (features, batch, rates, classes)."""
        kinds, batch, dim = x.shape
        x = (
            self.norm(x.transpose(0, 1).reshape(batch, kinds * dim))
            .view(batch, kinds, dim)
            .transpose(0, 1)
        )
        return torch.bmm(x, self.weight.flatten(2)).unflatten(-1, self.weight.shape[2:]) + self.bias

    def step(self, x: Tensor, y: Tensor, schedule: float | Tensor) -> Tensor:
        """One step of every probe at ``schedule`` times its peak rate; the sum of all losses, ().

        ``schedule`` is one number, or one for each rate, (rates,).
        """
        self.norm.train()
        logits = self.logits(x)  # the sum over probes lets every probe see its own gradient only
        target = y[None, :, None].expand(logits.shape[:-1])
        loss = F.cross_entropy(logits.flatten(0, 2), target.flatten(), reduction="sum") / len(y)
        gradients = torch.autograd.grad(loss, (self.weight, self.bias))
        with torch.no_grad():
            for parameter, gradient, momentum in zip(
                (self.weight, self.bias), gradients, self.momentum, strict=True
            ):
                momentum.mul_(self.keeps).add_(gradient)
                parameter -= (schedule * self.rates)[:, None] * momentum
        return loss.detach()

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
        learning_rates, epochs, batch_size, device: see :class:`Training`.
        choose: also a row per block, with the pooling "chosen", for the pooling and learning rate
            that ``val`` prefers.
        seed: draws initial weights, order and what is held out.
        hits: also a column that says which test images are right, (n_test,) bool in every row.

    Returns:
        One row per block and pooling, columns as :data:`mimrefiner.probes.checks.COLUMNS`.

    Raises:
        InputError: labels missing or of one class only; NaN features; features of different blocks
            or poolings.

    >>> y = torch.arange(60) % 3
    >>> features = Features({"cls": torch.eye(3)[y][None]}, y, blocks=(11,), depth=12)
    >>> rows = linear_probe(features, features, epochs=5, learning_rates=(0.5,))
    >>> rows[["block", "pool", "value", "setting"]].to_dict("records")
    [{'block': 11, 'pool': 'cls', 'value': 1.0, 'setting': 'lr=0.5'}]
    """
    training = Training(learning_rates, epochs, batch_size, seed, device)
    check_alike(train, test, *(() if val is None else (val,)))
    classes = _check(train, test, train.y)
    if val is None:
        val, train = hold_out(train, seed)
    with advice_on_memory(LESS):
        grid = _Grid(train, classes, training, len(train.y))
        grid.fit(train)
        return grid.rows(val, test, choose, hits)


def linear_probe_augmented(
    encoder: nn.Module,
    dataset: Dataset,
    val: Features,
    test: Features,
    training: Training | None = None,
    *,
    choose: bool = False,
    num_workers: int = 0,
) -> pd.DataFrame:
    """As :func:`linear_probe`, with the paper's augmentation on the fly.

    Every training image is a random resized crop of 8 to 100 % of its area, mirrored in half of the
    cases. Every batch passes the frozen encoder once, for all blocks and poolings of ``val``.

    Args:
        encoder: a timm ViT.
        dataset: the training images, map-style, (image, label), with the attribute ``labels``.
        val, test, choose: as there.
        training: None takes the defaults.
        num_workers: processes that load and crop images.
    """
    training = training or Training()
    labels = getattr(dataset, "labels", None)
    if labels is None:
        raise InputError("a linear probe needs labels, and this data set has no attribute labels")
    check_alike(val, test)
    classes = _check(val, test, torch.as_tensor(labels))
    parts = sorted({part for pool in val.x for part in parse_pool(pool)[0]})
    pools = check_pools(encoder, parts, val.blocks)
    grid = _Grid(val, classes, training, len(dataset))
    mean, std = normalisation(encoder)
    batches = view_batches(
        dataset,
        plain_views(input_size(encoder)[-1], (0.08, 1.0)),
        Order(grid.batch_size, grid.steps, training.seed),
        mean=mean,
        std=std,
        device=training.device,
        num_workers=num_workers,
    )
    every = torch.arange(grid.batch_size)
    with frozen(encoder, training.device), advice_on_memory(LESS):
        for views, _, label in progress(batches, "linear probes, augmented", grid.steps):
            with torch.no_grad():
                pooled = pooled_blocks(encoder, views[0], val.blocks, pools)
            batch = Features(pooled, label, val.blocks, val.depth).joined(list(val.x))
            grid.step(batch, every, torch.searchsorted(classes, label.cpu()))
    return grid.rows(val, test, choose)


class _Grid:
    """Joint probes on every block and pooling, one :class:`JointProbes` per width.

    Args:
        like: has their blocks, poolings and widths.
        classes: the sorted labels.
        training: how they are trained.
        images: how many training images there are.
    """

    def __init__(self, like: Features, classes: Tensor, training: Training, images: int):
        if images < 2:
            raise InputError(
                "a linear probe needs at least 2 training images beside those held out, "
                f"got {images}"
            )
        self.classes, self.training, self.images = classes, training, images
        self.batch_size = min(training.batch_size, images)
        self.steps, self.done = training.epochs * (images // self.batch_size), 0
        # width -> (pooling, position of the block)
        self.keys: dict[int, list[tuple[str, int]]] = {}
        for pool, blocks in like.x.items():
            for position, x in enumerate(blocks):
                self.keys.setdefault(x.shape[1], []).append((pool, position))
        rates = torch.tensor(training.learning_rates) * self.batch_size / 256
        settings = {"seed": training.seed, "device": torch.device(training.device)}
        self.probes = {
            width: JointProbes(len(keys), width, len(classes), rates, **settings)
            for width, keys in self.keys.items()
        }

    def _batch(self, features: Features, keys: list[tuple[str, int]], rows: Tensor) -> Tensor:
        """(kinds, rows, width)."""
        x = torch.stack([features.x[pool][position][rows] for pool, position in keys])
        return x.float().to(self.training.device)

    def step(self, features: Features, rows: Tensor, y: Tensor) -> None:
        """One step of every probe on ``rows`` of ``features``; ``y`` are class indices."""
        share = schedule(self.done, self.steps)
        for width, keys in self.keys.items():
            x = self._batch(features, keys, rows)
            self.probes[width].step(x, y.to(self.training.device), share)
        self.done += 1

    def fit(self, train: Features) -> None:
        """All epochs on features, in an order that is drawn anew for every epoch."""
        y = torch.searchsorted(self.classes, train.y)
        order = np.random.default_rng(self.training.seed)
        per_epoch = len(y) // self.batch_size
        for step in progress(range(self.steps), "linear probes"):
            if step % per_epoch == 0:
                permutation = torch.from_numpy(order.permutation(len(y)))
            part = permutation[step % per_epoch * self.batch_size :][: self.batch_size]
            self.step(train, part, y[part])

    def right(self, features: Features, keys: list[tuple[str, int]], probes: JointProbes) -> Tensor:
        """Which images every probe gets right, (kinds, rates, images) bool."""
        known = torch.isin(features.y, self.classes)
        y = torch.where(known, torch.searchsorted(self.classes, features.y), -1)
        per_image = 2 * 4 * len(keys) * len(self.training.learning_rates) * len(self.classes)
        found = [
            probes.right(self._batch(features, keys, rows), y[rows].to(self.training.device)).cpu()
            for rows in torch.arange(len(y)).split(max(1, LOGIT_BYTES // per_image))
        ]
        return torch.cat(found, -1)

    def rows(self, val: Features, test: Features, choose: bool, hits: bool = False) -> pd.DataFrame:
        """What the rate that does best on ``val`` does on ``test``, per block and pooling."""
        found, on_val = {}, {}
        for width, keys in self.keys.items():
            shares = self.right(val, keys, self.probes[width]).float().mean(-1)
            right = self.right(test, keys, self.probes[width])
            for i, key in enumerate(keys):
                best = shares[i].argmax().item()
                on_val[key] = shares[i, best].item()
                found[key] = {
                    "value": right[i, best].float().mean().item(),
                    "setting": f"lr={self.training.learning_rates[best]:g}",
                    "hits": right[i, best],
                }
        common = {"protocol": LINEAR.name, "metric": "accuracy", "seed": self.training.seed}
        common |= {"n_train": self.images, "n_test": len(test.y)}
        places = list(enumerate(val.blocks))
        rows = [
            {**common, "block": block, "pool": pool, **found[pool, position]}
            for pool in val.x
            for position, block in places
        ]
        for position, block in places if choose else ():
            pool = max(val.x, key=lambda pool: on_val[pool, position])
            row = {**common, "block": block, "pool": "chosen", **found[pool, position]}
            rows.append({**row, "setting": f"{pool} {row['setting']}"})
        table = tidy(rows)
        return table if hits else table.drop(columns="hits")


def _check(train: Features, test: Features, labels: Tensor) -> Tensor:
    """The classes in ``labels``, those of the training images; InputError for what is no use."""
    check_finite(train, test)
    classes = check_labels(labels, "a linear probe", everywhere=True)
    check_test_labels(test.y, "a linear probe")
    return classes


def hold_out(features: Features, seed: int, share: float = 0.1) -> tuple[Features, Features]:
    """(held out, rest): a share of the images, the same of every class, drawn by ``seed``."""
    n = max(1, round(share * len(features.y)))
    held, rest = stratified_split(features.y.numpy(), len(features.y), n, seed)
    return features.subset(held), features.subset(rest)


def schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate: a tenth of the steps up, then half a cosine down."""
    return cosine_lr(step, steps, 0.1 * steps, 1.0, 0.0)
