"""Weighted k-nearest-neighbour classification.

The protocol is the paper's (``src/metrics/knn.py`` of the released code).
"""

from collections.abc import Sequence
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

from mimrefiner.errors import InputError
from mimrefiner.probes.checks import check_alike, check_finite, check_labels, check_test_labels
from mimrefiner.probes.features import Features

SEARCH_BYTES = 2**28  # at most this much similarity matrix, or votes, at a time
CACHE_BYTES = 2**25  # on a CPU: what it has just computed is read again, from near memory
GROUP = 32  # columns of a similarity matrix whose largest value is looked at first
BANK_BYTES = 2**30  # at most this much of the bank, in float32, at a time
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

    Features are standardised with the training mean and unbiased standard deviation (+ 1e-6), then
    L2-normalised; a neighbour of cosine similarity s votes with weight exp(s / temperature).

    Args:
        train_x, test_x: (images, dim), or (blocks, images, dim) for many blocks at once.
        train_y: labels, (images,), any integers >= 0.
        ks: how many neighbours vote.
        temperatures: divide the cosines.
        standardize: whether features are standardised.
        search_dtype: torch.bfloat16 or torch.float16 find k + 16 candidates faster, which are
            scored again in float32.
        device: where to search; None where the features are. One block at a time passes in pieces
            of BANK_BYTES, so that the memory there is one to two such pieces, whatever the number
            of training images.

    Returns:
        Labels, (len(ks), len(temperatures), [blocks,] test images).

    Raises:
        InputError: no neighbour left to find, a temperature that is not positive, no labels or
            labels of one class only, NaN or infinite features.

    >>> bank, queries = torch.tensor([[0.0, 1], [1, 0], [2, 1]]), torch.tensor([[0.2, 2]])
    >>> knn_predict(bank, torch.tensor([7, 3, 3]), queries, ks=(1, 3), temperatures=(0.07, 10))
    tensor([[[7],
             [7]],
    <BLANKLINE>
            [[7],
             [3]]])
    """
    _check(train_x, train_y, test_x, ks, temperatures)
    if train_x.ndim == 2:
        options = {"ks": ks, "temperatures": temperatures, "standardize": standardize}
        options |= {"search_dtype": search_dtype, "device": device}
        return knn_predict(train_x[None], train_y, test_x[None], **options)[:, :, 0]
    device = train_x.device if device is None else torch.device(device)
    classes, y = train_y.to(device).unique(return_inverse=True)
    shape = len(ks), len(temperatures), len(train_x), test_x.shape[1]
    out = torch.empty(*shape, dtype=train_y.dtype)
    for block, (bank, queries) in enumerate(zip(train_x, test_x, strict=True)):
        found = _search(bank, queries, max(ks), standardize, search_dtype, device)
        out[:, :, block] = classes[_votes(*found, y, ks, temperatures)].cpu()
    return out.to(train_y.device)


def _votes(
    similarity: Tensor,
    neighbour: Tensor,
    y: Tensor,
    ks: Sequence[int],
    temperatures: Sequence[float],
) -> Tensor:
    """The class with the most votes for every k and temperature, (ks, temperatures, queries).

    Args:
        similarity, neighbour: cosine and row of the nearest training images, (queries, k), the
            nearest first.
        y: class indices of the training images.
    """
    if not similarity.isfinite().all():
        raise InputError("training or test features hold NaN or infinite values: check the weights")
    # Of the nearest: no weight overflows, however small the temperature
    similarity -= similarity[:, :1].clone()
    classes = int(y.max()) + 1
    best = y.new_empty(len(ks), len(temperatures), len(similarity))
    step = max(1, SEARCH_BYTES // (4 * classes))
    for start in range(0, len(similarity), step):
        part = slice(start, start + step)
        label = y[neighbour[part]]  # (rows, k)
        for i, temperature in enumerate(temperatures):
            weight = (similarity[part] / temperature).exp()
            votes, counted = weight.new_zeros(len(label), classes), 0
            for j, k in sorted(enumerate(ks), key=lambda entry: entry[1]):
                votes.scatter_add_(1, label[:, counted:k], weight[:, counted:k])
                best[j, i, part] = votes.argmax(1)
                counted = k
    return best


def _search(
    bank: Tensor, queries: Tensor, k: int, standardize: bool, search_dtype, device
) -> tuple[Tensor, Tensor]:
    """Cosines and rows of every query's ``k`` nearest training images, (queries, k), best first."""
    pieces = torch.arange(len(bank)).split(max(1, BANK_BYTES // (4 * bank.shape[1])))
    pieces = [slice(int(rows[0]), int(rows[-1]) + 1) for rows in pieces]
    at_once = SEARCH_BYTES if device.type == "cuda" else min(SEARCH_BYTES, CACHE_BYTES)
    moments = _mean_and_std(bank, pieces, device) if standardize else None
    queries = _directions(queries, moments, device)
    best: tuple[Tensor, Tensor] | None = None
    for piece in pieces:
        part = _directions(bank[piece], moments, device)
        coarse = part.to(search_dtype)
        rows = max(1, at_once // (4 * len(part)))
        # The same memory for every product: fresh pages cost a tenth of the time on a CPU
        room = coarse.new_empty(min(rows, len(queries)), len(part))
        found = [_nearest(few, part, coarse, k, room) for few in queries.split(rows)]
        similarity, row = (torch.cat(x) for x in zip(*found, strict=True))
        row += piece.start
        if best is not None:
            similarity, order = torch.cat([best[0], similarity], 1).topk(min(k, piece.stop), dim=1)
            row = torch.cat([best[1], row], 1).gather(1, order)
        best = similarity, row
        del part, coarse, found, room  # before the next piece is made
    return best


def _nearest(
    queries: Tensor, bank: Tensor, coarse: Tensor, k: int, room: Tensor
) -> tuple[Tensor, Tensor]:
    """The ``k`` nearest rows of one piece of the bank.

    ``coarse`` is the piece in the precision of the search, ``room`` takes the similarities.
    """
    similarity = torch.mm(queries.to(coarse.dtype), coarse.T, out=room[: len(queries)])
    if coarse.dtype == bank.dtype:
        return _largest(similarity, min(k, len(bank)))
    _, row = _largest(similarity, min(k + SPARE, len(bank)))
    similarity = torch.cat(
        [  # in pieces: (queries, k, dim) is larger than the bank
            torch.einsum("qd,qkd->qk", few, bank[chosen])
            for few, chosen in zip(queries.split(1024), row.split(1024), strict=True)
        ]
    )
    similarity, order = similarity.topk(min(k, len(bank)), dim=1)
    return similarity, row.gather(1, order)


def _largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest values of every row of ``x`` and their columns, as ``x.topk(k, dim=1)``.

    The k groups of columns with the largest maxima hold them, and only these are searched: finding
    maxima of groups is much faster than :func:`torch.topk` on a whole row.
    """
    groups = x.shape[1] // GROUP
    if groups < 2 * k:
        return x.topk(k, dim=1)
    maxima = x[:, : groups * GROUP].unflatten(1, (groups, GROUP)).amax(2)
    chosen = maxima.topk(k, dim=1, sorted=False).indices
    member = torch.arange(GROUP, device=x.device)
    column = (GROUP * chosen[:, :, None] + member).flatten(1)
    rest = torch.arange(groups * GROUP, x.shape[1], device=x.device)
    column = torch.cat([column, rest.expand(len(x), -1)], 1)
    value, place = x.gather(1, column).topk(k, dim=1)
    return value, column.gather(1, place)


def _mean_and_std(bank: Tensor, pieces: list[slice], device) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation + 1e-6 of every feature.

    They are merged over the pieces (Chan et al. 1979).
    """
    images = 0
    mean = squares = torch.zeros((), dtype=torch.double, device=device)
    for piece in pieces:
        variance, centre = (
            x.double() for x in torch.var_mean(bank[piece].to(device).float(), 0, correction=0)
        )
        n = piece.stop - piece.start
        shift = centre - mean
        squares = squares + variance * n + shift.square() * (images * n / (images + n))
        mean = mean + shift * (n / (images + n))
        images += n
    return mean.float(), (squares / max(1, images - 1)).sqrt().float() + 1e-6


def _directions(x: Tensor, moments: tuple[Tensor, Tensor] | None, device) -> Tensor:
    """Features on ``device``, standardised where ``moments`` are given, of length one."""
    # One copy, changed in place
    x = torch.empty(x.shape, dtype=torch.float32, device=device).copy_(x)
    if moments is not None:
        x.sub_(moments[0]).div_(moments[1])
    return x.div_(x.norm(dim=-1, keepdim=True).clamp_min(1e-12))


def knn_hits(
    train: Features,
    test: Features,
    *,
    k: int = 10,
    temperature: float = 0.07,
    standardize: bool = True,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """Which test images the k-NN vote gets right after every block.

    Args:
        train, test: whose images vote, and whose are classified.
        k, temperature, standardize, device: see :func:`knn_predict`.

    Returns:
        For every pooling, (blocks, test images) bool.

    Raises:
        InputError: as :func:`knn_predict`; test images without labels, features of different blocks
            or poolings.

    >>> import mimrefiner as mr
    >>> images = mr.load_dataset("digits", split="test").take(60)
    >>> pixels = mr.pixel_features(images, 8)
    >>> hits = mr.knn_hits(pixels.subset(range(50)), pixels.subset(range(50, 60)), k=3)
    >>> hits["pixels"].shape
    torch.Size([1, 10])
    """
    check_alike(train, test)
    check_finite(train, test)
    check_labels(train.y, "k-NN", everywhere=True)
    check_test_labels(test.y, "k-NN")
    settings = {"ks": (k,), "temperatures": (temperature,)}
    settings |= {"standardize": standardize, "device": device}

    def right(bank: Tensor, queries: Tensor) -> Tensor:
        return knn_predict(bank, train.y, queries, **settings)[0, 0] == test.y

    return {
        pool: torch.stack([right(*x) for x in zip(train.x[pool], test.x[pool], strict=True)])
        for pool in train.x
    }


def knn_hits_within(train: Features, test: Features, groups: Tensor) -> dict[str, Tensor]:
    """:func:`knn_hits` where only training images from the test image's own group vote.

    It measures how well classes that look alike are told apart.

    Args:
        train, test: whose images vote, and whose are classified.
        groups: the group of every class, (classes,); a group must hold two or more classes.

    >>> y = torch.arange(48) % 4
    >>> features = Features({"cls": torch.eye(4)[y][None]}, y, blocks=(11,), depth=12)
    >>> groups = torch.tensor([0, 0, 1, 1])  # classes 0 and 1 look alike, and so do 2 and 3
    >>> knn_hits_within(features, features.subset(range(5)), groups)
    {'cls': tensor([[True, True, True, True, True]])}
    """
    hits = {pool: torch.zeros(len(x), len(test.y), dtype=torch.bool) for pool, x in test.x.items()}
    for group in groups.unique():
        few, asked = (
            features.subset((groups[features.y] == group).nonzero()[:, 0])
            for features in (train, test)
        )
        for pool, right in knn_hits(few, asked).items():
            hits[pool][:, groups[test.y] == group] = right
    return hits


def hits_to_rows(hits, *, blocks: Sequence[int] | None = None, **columns) -> list[dict]:
    """One row per block: ``columns``, the 0-based block, and the share of right test images.

    Args:
        hits: (blocks, test images) bool, as :func:`knn_hits` gives them for one pooling; a row may
            also be one value.
        blocks: the 0-based block of every row of ``hits``; None counts from 0.
        columns: what every row holds beside block and value.

    >>> hits_to_rows([[True, False], [True, True]], blocks=(3, 11), pool="cls")
    [{'pool': 'cls', 'block': 3, 'value': 0.5}, {'pool': 'cls', 'block': 11, 'value': 1.0}]
    """
    blocks = range(len(hits)) if blocks is None else blocks
    return [
        {**columns, "block": block, "value": float(np.mean(np.asarray(right)))}
        for block, right in zip(blocks, hits, strict=True)
    ]


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
    """Share of test images whose weighted k-NN vote is right, 0 to 1.

    Args:
        train_x, test_x: (images, dim), of one block.
        train_y, test_y: labels, (images,).
        k, temperature, standardize: see :func:`knn_predict`.

    >>> x, y = torch.tensor([[0.0, 1], [0.1, 1], [1, 0], [1, 0.1]]), torch.tensor([0, 0, 1, 1])
    >>> knn_accuracy(x, y, x, torch.tensor([0, 0, 1, 0]), k=1)
    0.75
    """
    if not isinstance(test_y, Tensor) or test_y.shape != test_x.shape[:1]:
        raise InputError(
            f"expected one label per test image as a tensor ({len(test_x)},), got {_form(test_y)}"
        )
    _check(train_x, train_y, test_x, (k,), (temperature,))
    check_test_labels(test_y, "k-NN")
    predicted = knn_predict(
        train_x, train_y, test_x, ks=(k,), temperatures=(temperature,), standardize=standardize
    )
    return (predicted[0, 0] == test_y).float().mean().item()


def _check(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    ks: Sequence[int],
    temperatures: Sequence[float],
) -> None:
    if not all(isinstance(x, Tensor) for x in (train_x, train_y, test_x)):
        found = ", ".join(map(_form, (train_x, train_y, test_x)))
        raise InputError(
            f"expected features and labels as tensors, got {found}: "
            "torch.from_numpy makes one of an array"
        )
    if (
        train_x.ndim not in (2, 3)
        or train_x.ndim != test_x.ndim
        or train_x.shape[-1] != test_x.shape[-1]
    ):
        raise InputError(
            "expected two times ([blocks,] images, dim), "
            f"got {tuple(train_x.shape)} and {tuple(test_x.shape)}"
        )
    images = train_x.shape[-2]
    if train_y.shape != (images,):
        raise InputError(
            f"expected one label per training image ({images},), got {tuple(train_y.shape)}"
        )
    check_labels(train_y, "k-NN", everywhere=True)
    for k in ks:
        if not isinstance(k, Integral) or not 1 <= k <= images:
            raise InputError(
                "k must be a whole number between 1 and the number of training images "
                f"{images}, got {k}"
            )
    for temperature in temperatures:
        if not temperature > 0:
            raise InputError(f"temperature must be > 0, got {temperature}")
    if not len(ks) or not len(temperatures):
        raise InputError("expected one or more ks and temperatures, got none")


def _form(x) -> str:
    return f"{tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
