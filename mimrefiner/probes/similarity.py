"""How alike representations are, and what shape they have.

CKA between blocks, the effective rank of features, the mean distance of attention.
"""

from collections.abc import Sequence

import pandas as pd
import torch
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from mimrefiner.errors import InputError
from mimrefiner.models.blocks import hooked
from mimrefiner.probes.checks import check_finite, each_block, tidy
from mimrefiner.probes.features import Features
from mimrefiner.probes.protocols import SPECTRUM


def cka(
    a: Features,
    b: Features,
    *,
    pool_a: str = "cls",
    pool_b: str | None = None,
    batch_size: int = 256,
) -> Tensor:
    """Linear CKA between every block of ``a`` and every block of ``b``, 1 for equal up to rotation.

    The unbiased estimator of HSIC (Song et al. 2012) is averaged over batches before the ratio is
    taken (Nguyen et al. 2021, arXiv 2010.15327), so that the value does not depend on the batch
    size and the cost is linear in the images. Values of unrelated features scatter around 0 and may
    be negative.

    Args:
        a, b: features of the same images in the same order.
        pool_a, pool_b: which pooling of each; None takes ``pool_a``.
        batch_size: images per batch, at least 4; an incomplete last batch is left out.

    Returns:
        (blocks of a, blocks of b).

    Raises:
        InputError: different images, a pooling that is not there, fewer than four images, NaN
            features.
    """
    pool_b = pool_b or pool_a
    for features, pool in ((a, pool_a), (b, pool_b)):
        if pool not in features.x:
            raise InputError(
                f"no features with pooling {pool!r}: there are {', '.join(features.x)}"
            )
    if len(a.y) != len(b.y) or not torch.equal(a.y, b.y):
        raise InputError(
            "CKA compares features of the same images, "
            f"got {len(a.y)} and {len(b.y)} with other labels or order"
        )
    batch_size = min(batch_size, len(a.y))
    if batch_size < 4:
        raise InputError(f"CKA needs at least 4 images in a batch, got {batch_size}")
    check_finite(a, b)
    cross = torch.zeros(len(a.blocks), len(b.blocks), dtype=torch.double)
    own_a, own_b = (torch.zeros(len(x.blocks), dtype=torch.double) for x in (a, b))
    for start in range(0, len(a.y) - batch_size + 1, batch_size):
        part = slice(start, start + batch_size)
        grams_a, grams_b = (
            _grams([x[part] for x in f.x[pool]]) for f, pool in ((a, pool_a), (b, pool_b))
        )
        cross += _hsic(grams_a[:, None], grams_b[None])
        own_a += _hsic(grams_a, grams_a)
        own_b += _hsic(grams_b, grams_b)
    return (cross / (own_a.clamp_min(1e-30)[:, None] * own_b.clamp_min(1e-30)[None]).sqrt()).float()


def effective_rank(features: Features) -> pd.DataFrame:
    """How many directions the features of every block fill (Roy and Vetterli 2007).

    It lies between 1 (one direction) and the width (all directions alike): the exponential of the
    normalised singular values' entropy, after features are centred. Rows have the columns
    :data:`mimrefiner.probes.checks.COLUMNS`.

    >>> x = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    >>> rows = effective_rank(Features({"cls": x[None]}, torch.arange(4), blocks=(0,), depth=1))
    >>> rows["value"].round(3).tolist()
    [2.0]
    """
    check_finite(features)
    rows = []
    for pool, block, x in each_block(features):
        values = torch.linalg.svdvals((x - x.mean(0)).double())
        share = values / values.sum().clamp_min(1e-30)
        rank = torch.special.entr(share).sum().exp().item()
        rows.append(
            {
                "block": block,
                "pool": pool,
                "protocol": SPECTRUM.name,
                "metric": "effective_rank",
                "seed": 0,
                "value": rank,
                "n_train": 0,
                "n_test": len(x),
            }
        )
    return tidy(rows)


@torch.no_grad()
def attention_distance(encoder: nn.Module, images: Tensor) -> Tensor:
    """Mean distance in pixels between a patch and what it attends to, (blocks, heads).

    Distances are weighted by attention among patches (Dosovitskiy et al. 2021, figure 7); prefix
    tokens are left out.

    Args:
        encoder: a timm VisionTransformer.
        images: normalised images, (batch, 3, size, size).
    """
    patch = encoder.patch_embed.patch_size[0]
    side = images.shape[-1] // patch
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    places = patch * torch.stack([y.flatten(), x.flatten()], 1).float().to(images.device)
    distance = torch.cdist(places, places)  # (patches, patches)
    out = [
        (attention * distance).sum(-1).mean((0, 2)) for attention in attention_maps(encoder, images)
    ]
    return torch.stack(out).cpu()


@torch.no_grad()
def attention_maps(encoder: nn.Module, images: Tensor) -> list[Tensor]:
    """Attention between patches, normalised over them.

    Args:
        encoder: a timm VisionTransformer.
        images: normalised images, (batch, 3, size, size).

    Returns:
        One (batch, heads, patches, patches) per block.

    Raises:
        InputError: attention of another kind.
    """
    if not all(isinstance(getattr(block, "attn", None), Attention) for block in encoder.blocks):
        raise InputError(
            "attention maps need the attention of timm's VisionTransformer in every block"
        )
    maps: list[Tensor] = []

    def record(_block: int, attention: nn.Module, inputs: Sequence[Tensor], _output) -> None:
        tokens = inputs[0]
        batch, n, _ = tokens.shape
        qkv = attention.qkv(tokens).view(batch, n, 3, attention.num_heads, -1)
        query, key, _ = qkv.permute(2, 0, 3, 1, 4)  # (batch, heads, tokens, dim)
        query, key = attention.q_norm(query), attention.k_norm(key)
        patches = slice(encoder.num_prefix_tokens, None)
        maps.append((query[:, :, patches] @ key[:, :, patches].mT * attention.scale).softmax(-1))

    with hooked([block.attn for block in encoder.blocks], record):
        encoder.forward_features(images)
    return maps


def _grams(xs: list[Tensor]) -> Tensor:
    """Gram matrices with an empty diagonal, (blocks, n, n), double."""
    grams = torch.stack([x.double() @ x.double().T for x in xs])
    return grams - torch.diag_embed(grams.diagonal(dim1=-2, dim2=-1))


def _hsic(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741  the literature's names
    """Unbiased HSIC over the last two dimensions (equation 5 of Song et al. 2012).

    The Gram matrices have an empty diagonal.
    """
    n = k.shape[-1]
    rows_k, rows_l = k.sum(-1), l.sum(-1)
    trace = (k * l).sum((-2, -1))
    totals = rows_k.sum(-1) * rows_l.sum(-1) / ((n - 1) * (n - 2))
    return (trace + totals - 2 / (n - 2) * (rows_k * rows_l).sum(-1)) / (n * (n - 3))
