"""Linear probes of all blocks, poolings and learning rates at once (the grid of DINOv2, arXiv 2304.07193, that the paper uses).

All probes share the batches. Probes of one width are one batched matrix product, so that a grid of hundreds costs little more
than one probe.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from mimrefiner.augment import Crop, Views
from mimrefiner.data import stratified_split, view_batches
from mimrefiner.errors import InputError
from mimrefiner.features import Features, check_pools, pooled_blocks
from mimrefiner.models import normalisation
from mimrefiner.probes.checks import check_finite, check_labels, each_block, tidy
from mimrefiner.progress import progress
from mimrefiner.train import cosine_lr

LEARNING_RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)  # times batch_size / 256


class JointProbes:
    """One linear classifier per (feature, learning rate), trained together by SGD with momentum 0.9 and no weight decay.

    Batch norm without affine parameters comes first (running statistics at test time); weights start at N(0, 0.01), biases at 0.

    Args:
        features: number of feature kinds, all ``dim`` wide.
        dim, classes: width and number of classes.
        learning_rates: the peak rates, already scaled by the batch size.
        seed: of the initial weights.
    """

    def __init__(self, features: int, dim: int, classes: int, learning_rates: Tensor, *, seed: int, device: torch.device):
        generator = torch.Generator().manual_seed(seed)
        start = nn.init.trunc_normal_(torch.empty(features, dim, 1, classes), std=0.01, generator=generator)
        rates = len(learning_rates)
        self.weight = start.expand(-1, -1, rates, -1).clone().to(device).requires_grad_()  # (features, dim, rates, classes)
        self.bias = torch.zeros(features, 1, rates, classes, device=device, requires_grad=True)
        self.norm = nn.BatchNorm1d(features * dim, affine=False).to(device)
        self.rates = learning_rates.to(device)
        self.momentum = [torch.zeros_like(x) for x in (self.weight, self.bias)]

    def logits(self, x: Tensor) -> Tensor:
        """(features, batch, dim) -> (features, batch, rates, classes)."""
        kinds, batch, dim = x.shape
        x = self.norm(x.transpose(0, 1).reshape(batch, kinds * dim)).view(batch, kinds, dim).transpose(0, 1)
        return torch.bmm(x, self.weight.flatten(2)).unflatten(-1, self.weight.shape[2:]) + self.bias

    def step(self, x: Tensor, y: Tensor, schedule: float) -> None:
        """One step of every probe; ``schedule``: the share of the peak rate."""
        self.norm.train()
        logits = self.logits(x)  # the sum over probes lets every probe see its own gradient only
        target = y[None, :, None].expand(logits.shape[:-1])
        loss = F.cross_entropy(logits.flatten(0, 2), target.flatten(), reduction="sum") / len(y)
        gradients = torch.autograd.grad(loss, (self.weight, self.bias))
        with torch.no_grad():
            for parameter, gradient, momentum in zip((self.weight, self.bias), gradients, self.momentum, strict=True):
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
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> pd.DataFrame:
    """Linear-probe accuracy of every block and pooling on cached features.

    The learning rate is chosen on ``val`` for every block and pooling; the chosen probe is tested once.

    Args:
        train, test: see :func:`mimrefiner.extract_features`; test labels of classes that are not in train count as wrong.
        val: for the choice; None holds out a tenth of ``train``, the same share of every class.
        learning_rates: peak rates of the grid, times batch_size / 256; warm-up over a tenth of the steps, then cosine.
        epochs, batch_size: of the training; a batch is at most the training set.
        seed: of initial weights, order and hold-out.

    Returns:
        One row per block and pooling, columns as :data:`mimrefiner.probes.checks.COLUMNS`.

    Raises:
        InputError: labels missing or of one class only; NaN features.
    """
    check_finite(train, test)
    classes = check_labels(train, "a linear probe")
    if val is None:
        val, train = hold_out(train, seed)
    batch_size = min(batch_size, len(train.y))
    steps = epochs * (len(train.y) // batch_size)
    order = np.random.default_rng(seed)
    rows = []
    for keys, x_train, x_val, x_test in _by_width(train, val, test):
        probes = _new_probes(len(keys), x_train[0].shape[1], len(classes), learning_rates, batch_size, seed, device)
        y = torch.searchsorted(classes, train.y)
        for step in progress(range(steps), "linear probes"):
            if step % (len(y) // batch_size) == 0:
                permutation = torch.from_numpy(order.permutation(len(y)))
            part = permutation[step % (len(y) // batch_size) * batch_size :][:batch_size]
            probes.step(_gather(x_train, part, device), y[part].to(device), schedule(step, steps))
        rows += _select(keys, probes, x_val, val.y, x_test, test.y, classes, learning_rates, seed, len(y), device)
    return tidy(rows)


def linear_probe_augmented(
    encoder: nn.Module,
    dataset: Dataset,
    val: Features,
    test: Features,
    *,
    learning_rates: Sequence[float] = LEARNING_RATES,
    epochs: int = 50,
    batch_size: int = 1024,
    seed: int = 0,
    device: torch.device | str = "cpu",
    num_workers: int = 0,
) -> pd.DataFrame:
    """As :func:`linear_probe`, with the paper's augmentation (random resized crop of 8 to 100 % of the area, flip) on the fly.

    Every batch passes the frozen encoder once, for all blocks of ``val``. Arguments and rows as there; ``dataset``: map-style,
    (image, label), the training images.
    """
    check_finite(val, test)
    pools = check_pools(encoder, [pool for pool in val.x if pool in ("cls", "mean")])
    size = encoder.pretrained_cfg["input_size"][-1]
    crop = Crop(size, (0.08, 1.0), flip_p=0.5, jitter_p=0.0, grey_p=0.0)
    classes = torch.unique(torch.as_tensor(dataset.labels))
    batch_size = min(batch_size, len(dataset))
    steps = epochs * (len(dataset) // batch_size)
    mean, std = normalisation(encoder)
    batches = view_batches(
        dataset, Views((crop,), crop, 0), batch_size=batch_size, steps=steps, seed=seed, mean=mean, std=std, device=device,
        num_workers=num_workers,
    )  # fmt: skip
    keys = [(pool, block) for pool in pools for block in val.blocks]
    probes = _new_probes(len(keys), encoder.embed_dim, len(classes), learning_rates, batch_size, seed, device)
    encoder = encoder.eval().to(device)
    for step, (views, _, label) in enumerate(progress(batches, "linear probes, augmented", steps)):
        with torch.no_grad():
            pooled = pooled_blocks(encoder, views[0], val.blocks, pools)
        x = torch.stack([x for pool in pools for x in pooled[pool]]).float()
        probes.step(x, torch.searchsorted(classes.to(device), label), schedule(step, steps))
    x_val, x_test = ([part.x[pool][part.blocks.index(block)] for pool, block in keys] for part in (val, test))
    return tidy(_select(keys, probes, x_val, val.y, x_test, test.y, classes, learning_rates, seed, len(dataset), device))


def hold_out(features: Features, seed: int, share: float = 0.1) -> tuple[Features, Features]:
    """(held out, rest): a share of the images, the same of every class."""
    n = max(1, round(share * len(features.y)))
    held, rest = stratified_split(features.y.numpy(), len(features.y), n, seed)
    return features.subset(held), features.subset(rest)


def schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate: a tenth of the steps up, then half a cosine down."""
    return cosine_lr(step, steps, 0.1 * steps, 1.0, 0.0)


def _new_probes(kinds, dim, classes, learning_rates, batch_size, seed, device) -> JointProbes:
    if not learning_rates or min(learning_rates) <= 0:
        raise InputError(f"learning rates must be > 0, got {list(learning_rates)}")
    rates = torch.tensor(learning_rates) * batch_size / 256
    return JointProbes(kinds, dim, classes, rates, seed=seed, device=torch.device(device))


def _by_width(*parts: Features):
    """Groups of equally wide features: keys (pool, block) and, for every part, the list of (images, dim)."""
    widths: dict[int, list] = {}
    for (pool, block, x), *others in zip(*(each_block(part) for part in parts), strict=True):
        widths.setdefault(x.shape[1], []).append(((pool, block), x, *(other for _, _, other in others)))
    for group in widths.values():
        yield tuple(list(column) for column in zip(*group, strict=True))


def _gather(xs: list[Tensor], rows: Tensor, device) -> Tensor:
    return torch.stack([x[rows].float() for x in xs]).to(device)


def _select(keys, probes, x_val, y_val, x_test, y_test, classes, learning_rates, seed, n_train, device) -> list[dict]:
    def accuracy(xs, y):
        encoded = torch.where(torch.isin(y, classes), torch.searchsorted(classes, y), -1)
        parts = torch.arange(len(y)).split(4096)
        right = [probes.right(_gather(xs, part, device), encoded[part].to(device)).cpu() for part in parts]
        return torch.cat(right, -1).float().mean(-1)  # (features, rates)

    chosen = accuracy(x_val, y_val).argmax(1)
    tested = accuracy(x_test, y_test)
    return [
        {
            "block": block, "pool": pool, "protocol": "linear", "metric": "accuracy", "seed": seed,
            "value": tested[i, chosen[i]].item(), "n_train": n_train, "n_test": len(y_test),
            "setting": f"lr={learning_rates[chosen[i]]:g}",
        }
        for i, (pool, block) in enumerate(keys)
    ]  # fmt: skip
