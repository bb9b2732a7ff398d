"""Nearest-neighbour alignment (NNA), the loss of MIM-Refiner (arXiv 2402.10093, Eq. 1-2, Figure 4).

For a target view ``a`` (global), a predicted view ``b`` and image ``i``, all vectors
L2-normalised::

    pos(i)    = exp(nn_z[i, a] . p[i, b] / T)
    neg(i, j) = exp(z[i, a] . p[j, b] / T)
    l(a, b, i) = -log( pos(i) / (pos(i) + sum_{j != i} neg(i, j)) )

Only the positive is swapped with a neighbour from the queue; the negatives are the batch's own
projections. The gradient reaches ``p`` alone.
"""

from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor

from mimrefiner.config import PAIRINGS
from mimrefiner.errors import InputError, one_of


def nna_loss(
    z: Tensor, nn_z: Tensor, p: Tensor, *, temperature: float = 0.2, swap_negatives: bool = False
) -> Tensor:
    """NNA loss of one ordered pair of views.

    Args:
        z: projections of the target view, (batch, dim).
        nn_z: the queue neighbours of ``z``, (batch, dim).
        p: predictions of the other view, (batch, dim); the only argument that receives a gradient.
        temperature: softmax temperature T > 0.
        swap_negatives: also take the negatives' targets from ``nn_z`` (then this is NNCLR, arXiv
            2104.14548).

    Returns:
        The mean over the batch, a scalar.

    >>> import mimrefiner as mr
    >>> z = torch.eye(4)  # four images that have nothing in common
    >>> mr.nna_loss(z, z, p=z).item() < mr.nna_loss(z, z, p=z.roll(1, 0)).item()
    True
    """
    if not z.ndim == nn_z.ndim == p.ndim == 2:
        raise InputError(f"expected z, nn_z and p as (batch, dim), got {_shapes(z, nn_z, p)}")
    z, nn_z, p = (x[None, :, None] for x in (z, nn_z, p))
    return nna_terms(z, nn_z, p, temperature=temperature, swap_negatives=swap_negatives).mean()


def multi_view_nna_loss(
    z: Tensor,
    nn_z: Tensor,
    p: Tensor,
    *,
    temperature: float | Tensor = 0.2,
    pairing: str = "intended",
    swap_negatives: bool = False,
    offset: int = 0,
) -> Tensor:
    """NNA loss of every head over all pairs of views.

    Args:
        z: projections of the global views, (heads, batch, global_views, dim).
        nn_z: the queue neighbours of ``z``, same shape.
        p: predictions of all views, global views first, (heads, batch_all, views, dim);
            ``batch_all`` exceeds ``batch`` where predictions were gathered over processes.
        temperature: one value, or one per head as a tensor (heads,).
        pairing: which pairs of views are averaged, see :func:`pair_weights`.
        swap_negatives: see :func:`nna_loss`.
        offset: the row of ``p`` that belongs to the first row of ``z`` (this process's share begins
            there).

    Returns:
        One loss per head, (heads,), averaged over this process's batch and over the pairs of views.

    >>> import mimrefiner as mr
    >>> z, p = torch.rand(3, 8, 2, 16), torch.rand(3, 8, 12, 16)  # 3 heads, 2 of 12 views global
    >>> mr.multi_view_nna_loss(z, nn_z=z, p=p).shape
    torch.Size([3])
    """
    terms = nna_terms(
        z, nn_z, p, temperature=temperature, swap_negatives=swap_negatives, offset=offset
    )
    return average_pairs(terms, pairing)


def nna_terms(
    z: Tensor,
    nn_z: Tensor,
    p: Tensor,
    *,
    temperature: float | Tensor = 0.2,
    swap_negatives: bool = False,
    offset: int = 0,
) -> Tensor:
    """The loss of every (head, global view a, view b, image), not averaged.

    ``exp(-terms)`` is the softmax probability of the positive ("alignment"). For the arguments see
    :func:`multi_view_nna_loss`.

    Returns:
        (heads, global_views, views, batch).
    """
    _check(z, nn_z, p, temperature, offset)
    # Normalised in float32; under autocast the products below run in its lower precision
    with torch.no_grad():
        z = F.normalize(z.float(), dim=-1)
        nn_z = F.normalize(nn_z.float(), dim=-1)
    p = F.normalize(p.float(), dim=-1)
    if not isinstance(temperature, Tensor):
        # Filled on the device: copying it there would wait for the GPU
        temperature = torch.full((1,), temperature, device=p.device)
    temperature = temperature.to(p).reshape(-1, 1, 1, 1)

    own = slice(offset, offset + z.shape[1])  # the rows of p that belong to z
    terms = []
    # One target view at a time bounds the logits to (heads, views, batch, batch_all)
    for a in range(z.shape[2]):
        targets = (nn_z if swap_negatives else z)[:, :, a]  # (heads, batch, dim)
        logits = torch.einsum("hid,hjbd->hbij", targets, p)  # (heads, views, batch, batch_all)
        if not swap_negatives:
            positive = torch.einsum("hid,hibd->hbi", nn_z[:, :, a], p[:, own])
            logits = torch.diagonal_scatter(logits, positive, offset=offset, dim1=-2, dim2=-1)
        logits = logits / temperature
        terms.append(logits.logsumexp(-1) - logits.diagonal(offset, -2, -1))
    return torch.stack(terms, dim=1)


def average_pairs(terms: Tensor, pairing: str) -> Tensor:
    """Average (heads, global_views, views, batch) terms to one loss for each head, (heads,).

    ``pairing`` says which pairs of views count, see :func:`pair_weights`.
    """
    weights = pair_weights(terms.shape[1], terms.shape[2], pairing, terms.device)
    # Autocast would round the losses to bfloat16
    with torch.autocast(terms.device.type, enabled=False):
        return torch.einsum("hab,ab->h", terms.float().mean(-1), weights / weights.sum())


def pair_weights(
    global_views: int, views: int, pairing: str, device: torch.device | None = None
) -> Tensor:
    """How often each ordered pair (target a, predicted b) counts, (global_views, views).

    ``"intended"``: every pair of different views whose target is global: 2 + 20 = 22 pairs for 2
    global and 10 local views. ``"published"``: the released code (``src/losses/ssl/nnclr_loss.py``
    at cc57423) takes its local terms from the predictions of views ``0 .. n_local - 1``. The global
    views are then counted again, pairs of a view with itself included, and the last
    ``global_views`` local crops carry no gradient.

    >>> pair_weights(2, 5, "intended").int().tolist()
    [[0, 1, 1, 1, 1], [1, 0, 1, 1, 1]]
    >>> pair_weights(2, 5, "published").int().tolist()
    [[1, 2, 1, 0, 0], [2, 1, 1, 0, 0]]
    """
    one_of("pairing", pairing, PAIRINGS)
    if views < 2:
        raise InputError(
            f"a loss needs pairs of different views, got {global_views} global of {views} in all"
        )
    different = ~torch.eye(global_views, views, dtype=torch.bool, device=device)
    view = torch.arange(views, device=device)
    if pairing == "intended":
        return different.float()
    return (different & (view < global_views)).float() + (view < views - global_views).float()


def _check(z: Tensor, nn_z: Tensor, p: Tensor, temperature: float | Tensor, offset: int) -> None:
    # A tensor of temperatures is trusted: looking at it would stop the GPU
    if not isinstance(temperature, Tensor):
        if not isinstance(temperature, Real):
            raise InputError(
                f"temperature must be a number, or one per head as a tensor, got {temperature!r}"
            )
        if not temperature > 0:
            raise InputError(f"temperature must be > 0, got {temperature}")
    if z.shape != nn_z.shape or z.ndim != 4 or p.ndim != 4:
        raise InputError(
            "expected z and nn_z of one shape (heads, batch, global_views, dim) and p like it, "
            f"got {_shapes(z, nn_z, p)}"
        )
    heads, batch, global_views, dim = z.shape
    rows, views = p.shape[1:3]
    if (p.shape[0], p.shape[3]) != (heads, dim) or rows < offset + batch or views < global_views:
        raise InputError(
            f"expected p as ({heads}, >= {offset + batch}, >= {global_views}, {dim}) "
            f"for z {tuple(z.shape)} at offset {offset}, got {tuple(p.shape)}"
        )


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(tuple(x.shape)) for x in tensors)
