"""Weighted k-nearest-neighbour classification (the paper's protocol: ``src/metrics/knn.py`` of the released code)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mimrefiner.errors import InputError
from mimrefiner.features import Features

SEARCH_BYTES = 2**28  # at most this much similarity matrix at a time


def knn_predict(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    *,
    ks: Sequence[int] = (10,),
    temperatures: Sequence[float] = (0.07,),
    standardize: bool = True,
) -> Tensor:
    """Predicted labels for every k and temperature, from one search at the largest k.

    Features are standardised with the training mean and unbiased standard deviation (+ 1e-6), then L2-normalised; a neighbour
    of cosine similarity s votes with weight exp(s / temperature).

    Args:
        train_x, test_x: (images, dim), or (blocks, images, dim) for many blocks at once.
        train_y: labels, (images,), any integers.

    Returns:
        Labels, (len(ks), len(temperatures), [blocks,] test images).

    Raises:
        InputError: no neighbour left to find, a temperature that is not positive, no labels.
    """
    _check(train_x, train_y, test_x, ks, temperatures)
    if train_x.ndim == 2:
        options = {"ks": ks, "temperatures": temperatures, "standardize": standardize}
        return knn_predict(train_x[None], train_y, test_x[None], **options)[:, :, 0]
    classes, votes_for = train_y.unique(return_inverse=True)
    out = torch.empty(len(ks), len(temperatures), len(train_x), test_x.shape[1], dtype=train_y.dtype, device=train_y.device)
    rows = max(1, SEARCH_BYTES // (4 * train_x.shape[1]))
    for block, (bank, queries) in enumerate(zip(train_x.float(), test_x.float(), strict=True)):
        if standardize:
            mean, std = bank.mean(0), bank.std(0) + 1e-6
            bank, queries = (bank - mean) / std, (queries - mean) / std
        bank, queries = F.normalize(bank, dim=-1), F.normalize(queries, dim=-1)
        for start in range(0, len(queries), rows):
            similarity, neighbour = (queries[start : start + rows] @ bank.T).topk(max(ks), dim=-1)
            label = votes_for[neighbour]  # (rows, k)
            for i, temperature in enumerate(temperatures):
                weight = (similarity / temperature).exp()
                for j, k in enumerate(ks):
                    votes = weight.new_zeros(len(label), len(classes)).scatter_add_(1, label[:, :k], weight[:, :k])
                    out[j, i, block, start : start + rows] = classes[votes.argmax(1)]
    return out


def knn_hits(
    train: Features, test: Features, *, k: int = 10, temperature: float = 0.07, standardize: bool = True
) -> dict[str, Tensor]:
    """Which test images the k-NN vote gets right after every block: for every pooling, (blocks, test images) bool."""
    settings = {"ks": (k,), "temperatures": (temperature,), "standardize": standardize}
    return {
        pool: torch.stack(
            [
                knn_predict(bank, train.y, queries, **settings)[0, 0] == test.y
                for bank, queries in zip(train.x[pool], test.x[pool], strict=True)
            ]
        )
        for pool in train.x
    }


def knn_accuracy(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    k: int = 10,
    temperature: float = 0.07,
    standardize: bool = True,
) -> float:
    """Share of test images whose weighted k-NN vote is right, 0 to 1; arguments as in :func:`knn_predict`, one block."""
    predicted = knn_predict(train_x, train_y, test_x, ks=(k,), temperatures=(temperature,), standardize=standardize)
    return (predicted[0, 0] == test_y).float().mean().item()


def _check(train_x: Tensor, train_y: Tensor, test_x: Tensor, ks: Sequence[int], temperatures: Sequence[float]) -> None:
    if train_x.ndim not in (2, 3) or train_x.ndim != test_x.ndim or train_x.shape[-1] != test_x.shape[-1]:
        raise InputError(f"expected two times ([blocks,] images, dim), got {tuple(train_x.shape)} and {tuple(test_x.shape)}")
    images = train_x.shape[-2]
    if train_y.shape != (images,):
        raise InputError(f"expected one label per training image ({images},), got {tuple(train_y.shape)}")
    if (train_y < 0).all():
        raise InputError("k-NN needs labels, and this data set has none")
    if not all(1 <= k <= images for k in ks):
        raise InputError(f"k must be between 1 and the number of training images {images}, got {max(ks)}")
    if not all(t > 0 for t in temperatures):
        raise InputError(f"temperature must be > 0, got {min(temperatures)}")
