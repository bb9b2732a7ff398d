"""Weighted k-nearest-neighbour classification (the paper's protocol: ``src/metrics/knn.py`` of the released code)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mimrefiner.errors import InputError
from mimrefiner.features import Features

SEARCH_BYTES = 2**28  # at most this much similarity matrix at a time
BANK_ROWS = 2**18  # at most this much of the bank at a time
SPARE = 16  # neighbours found beyond k in low precision, among which float32 decides


def knn_predict(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    *,
    ks: Sequence[int] = (10,),
    temperatures: Sequence[float] = (0.07,),
    standardize: bool = True,
    search_dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Predicted labels for every k and temperature, from one search at the largest k.

    Features are standardised with the training mean and unbiased standard deviation (+ 1e-6), then L2-normalised; a neighbour
    of cosine similarity s votes with weight exp(s / temperature).

    Args:
        train_x, test_x: (images, dim), or (blocks, images, dim) for many blocks at once.
        train_y: labels, (images,), any integers.
        ks, temperatures, standardize: of the vote.
        search_dtype: torch.bfloat16 or torch.float16 find k + 16 candidates faster, which are scored again in float32.
        device: where to search, one block at a time; None where the features are. A bank of 1.28 M x 1024 takes 5.2 GB there,
            7.9 GB with a search in 16 bits.

    Returns:
        Labels, (len(ks), len(temperatures), [blocks,] test images).

    Raises:
        InputError: no neighbour left to find, a temperature that is not positive, no labels.
    """
    _check(train_x, train_y, test_x, ks, temperatures)
    if train_x.ndim == 2:
        options = {"ks": ks, "temperatures": temperatures, "standardize": standardize}
        options |= {"search_dtype": search_dtype, "device": device}
        return knn_predict(train_x[None], train_y, test_x[None], **options)[:, :, 0]
    device = train_x.device if device is None else torch.device(device)
    classes, votes_for = train_y.to(device).unique(return_inverse=True)
    out = torch.empty(len(ks), len(temperatures), len(train_x), test_x.shape[1], dtype=train_y.dtype)
    rows = max(1, SEARCH_BYTES // (4 * min(BANK_ROWS, train_x.shape[1])))
    for block in range(len(train_x)):
        bank, queries = train_x[block].to(device).float(), test_x[block].to(device).float()
        if standardize:
            mean, std = bank.mean(0), bank.std(0) + 1e-6
            bank, queries = (bank - mean) / std, (queries - mean) / std
        bank, queries = F.normalize(bank, dim=-1), F.normalize(queries, dim=-1)
        coarse = bank if search_dtype == torch.float32 else bank.to(search_dtype)
        for start in range(0, len(queries), rows):
            similarity, neighbour = _nearest(queries[start : start + rows], bank, coarse, max(ks))
            label = votes_for[neighbour]  # (rows, k)
            for i, temperature in enumerate(temperatures):
                weight = (similarity / temperature).exp()
                for j, k in enumerate(ks):
                    votes = weight.new_zeros(len(label), len(classes)).scatter_add_(1, label[:, :k], weight[:, :k])
                    out[j, i, block, start : start + rows] = classes[votes.argmax(1)].cpu()
    return out.to(train_y.device)


def _nearest(queries: Tensor, bank: Tensor, coarse: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosines and rows of the ``k`` nearest, (queries, k), best first; ``coarse``: the bank in the precision of the search."""
    low = coarse.dtype != bank.dtype
    wanted = min(k + SPARE if low else k, len(bank))
    found: list[tuple[Tensor, Tensor]] = []
    for start in range(0, len(bank), BANK_ROWS):
        part = coarse[start : start + BANK_ROWS]
        similarity, row = (queries.to(part.dtype) @ part.T).topk(min(wanted, len(part)), dim=-1)
        found.append((similarity.float(), row + start))
    similarity, row = (torch.cat(x, -1) for x in zip(*found, strict=True))
    if low:
        similarity = torch.einsum("qd,qkd->qk", queries, bank[row])
    if low or len(found) > 1:
        similarity, order = similarity.topk(k, dim=-1)
        row = row.gather(-1, order)
    return similarity[:, :k], row[:, :k]


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
