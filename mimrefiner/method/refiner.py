"""MIMRefiner: an encoder with a contrastive head on each of its last blocks, and a queue.

``refiner(views)`` gives projections and predictions, ``refiner.step(...)`` the loss of every head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimrefiner import distributed
from mimrefiner.config import RefineConfig
from mimrefiner.device import seeded
from mimrefiner.errors import InputError
from mimrefiner.method.heads import Heads
from mimrefiner.method.losses import average_pairs, nna_terms
from mimrefiner.method.nn_queue import NNQueue
from mimrefiner.models.blocks import pooled_blocks
from mimrefiner.models.pools import check_pools
from mimrefiner.models.wrappers import unwrapped


@dataclass
class StepResult:
    """What one batch gives.

    Attributes:
        loss: one for each head, (heads,), with gradient.
        measure: computes ``metrics``.
        metrics: of each head, (heads,), without gradient. ``nn_accuracy``: share of neighbours that
            have the query's class, among those where both are known. ``nn_similarity``: cosine of
            query and neighbour. ``nn_age``: images enqueued since the neighbour was. ``alignment``:
            softmax probability of the positive, over pairs of different global views.
    """

    loss: Tensor
    measure: Callable[[], dict[str, Tensor]]

    @cached_property
    def metrics(self) -> dict[str, Tensor]:
        """Computed when first asked for, by all processes together: few steps are logged."""
        return self.measure()


class MIMRefiner(nn.Module):
    """Encoder, heads and queue.

    An intermediate head reads the raw output of its block. The head on the last block reads the
    encoder's output after the final LayerNorm (which post-norm models do not have).

    Args:
        encoder: a timm ViT; it is used, not copied. What ``torch.compile`` or DataParallel put
            around it comes off.
        config: see :class:`mimrefiner.config.RefineConfig`; its seed draws the new weights.

    Raises:
        InputError: a model that is no plain ViT, a block out of range, cls pooling without a cls
            token, or a crop that the patch size does not divide.

    >>> import mimrefiner as mr
    >>> preset = mr.load_preset("smoke")
    >>> refiner = mr.MIMRefiner(mr.build_vit(preset.encoder), preset.refine)
    >>> views = [torch.rand(4, 3, crop.size, crop.size) for crop in preset.refine.views.crops]
    >>> z, p = refiner(views)
    >>> refiner.blocks, z.shape
    ((2, 3), torch.Size([2, 4, 4, 16]))
    >>> refiner.step(z, p, index=torch.arange(4), top_k=1).loss.shape
    torch.Size([2])
    """

    def __init__(self, encoder: nn.Module, config: RefineConfig):
        super().__init__()
        encoder = unwrapped(encoder)
        _check_encoder(encoder, config)
        self.encoder = encoder
        self.config = config
        self.depth = len(encoder.blocks)
        self.blocks = config.resolve_blocks(self.depth)
        heads, out_dim = len(self.blocks), config.out_dim
        with seeded(config.seed):
            self.heads = Heads(
                heads, encoder.embed_dim, config.hidden_dim, out_dim, config.predictor_dim
            )
            self.queue = NNQueue(heads, config.queue_size, out_dim)

    def forward(self, views: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Projections and predictions of all views, each (heads, batch, views, out_dim).

        Args:
            views: normalised images, global views first, (batch, 3, size, size) each; views of one
                size lie next to each other, because they pass the encoder together.
        """
        return self.project(self.features(views))

    def features(self, views: Sequence[Tensor]) -> Tensor:
        """What the heads read: pooled features of their blocks, (views, batch, heads, dim)."""
        pool, last, pooled = self.config.pool, self.depth - 1, []
        for _, alike in groupby(views, key=lambda view: view.shape):
            images = torch.cat(list(alike))
            blocks = pooled_blocks(self.encoder, images, self.blocks, (pool,), norm_blocks=(last,))
            pooled.append(torch.stack(blocks[pool], 1))  # (views * batch, heads, dim)
        return torch.cat(pooled).unflatten(0, (len(views), -1))

    def project(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Projections and predictions of :meth:`features`, each (heads, batch, views, out_dim)."""
        z, p = self.heads(features.flatten(0, 1))  # batch norm sees all views together
        return tuple(x.unflatten(0, features.shape[:2]).permute(2, 1, 0, 3) for x in (z, p))

    def step(
        self,
        z: Tensor,
        p: Tensor,
        index: Tensor,
        label: Tensor | None = None,
        *,
        top_k: int,
        generator: torch.Generator | None = None,
    ) -> StepResult:
        """Loss and metrics of one batch: look up neighbours, then enqueue the first view.

        With several processes each gives its share of the batch. The loss is that of its own images
        against the predictions of all; its mean over the processes is the loss of the batch.

        Args:
            z, p: projections and predictions, as :meth:`forward` gives them.
            index: which image each row is, (batch,).
            label: its class, (batch,), -1 where there is none; labels serve metrics only.
            top_k, generator: see :meth:`NNQueue.lookup_slots`.
        """
        config, rank, world = self.config, distributed.rank(), distributed.world()
        z = z[:, :, : len(config.views.global_crops)].detach().float()
        slots = self.queue.lookup_slots(
            z, index, top_k=top_k, generator=generator, part=(rank, world)
        )
        neighbours = self.queue.gather(slots)
        terms = nna_terms(
            z,
            neighbours,
            _of_all_processes(p),
            temperature=config.temperature,
            swap_negatives=config.swap_negatives,
            offset=rank * z.shape[1],
        )
        with torch.no_grad():
            # Read now: the queue goes on
            age, found = self.queue.age[slots], self.queue.label[slots]
            measure = partial(
                _metrics,
                z,
                neighbours,
                terms.detach(),
                age,
                None if label is None else (found, label),
            )
            labels = None if label is None else distributed.gather(label)
            first = _of_all_processes(z[:, :, 0])
            self.queue.enqueue(first, distributed.gather(index), labels)
        return StepResult(average_pairs(terms, config.pairing), measure)


@torch.no_grad()
def _metrics(
    z: Tensor,
    neighbours: Tensor,
    terms: Tensor,
    age: Tensor,
    labels: tuple[Tensor, Tensor] | None,
) -> dict[str, Tensor]:
    """See :class:`StepResult`; ``labels`` are those of the neighbours and of the batch."""
    views = z.shape[2]
    alignment = terms[:, :, :views].neg().exp().mean(-1)  # (heads, views, views)
    different = ~torch.eye(views, dtype=torch.bool, device=z.device)
    metrics = {
        "nn_similarity": F.cosine_similarity(z, neighbours, dim=-1).mean((1, 2)),
        "nn_age": age.float().mean((1, 2)),
        "alignment": (alignment * different).sum((1, 2)) / (views * (views - 1)),
    }
    if labels is not None:
        found, label = labels  # (heads, batch, views), (batch,)
        known = (found >= 0) & (label[:, None] >= 0)
        right = (found == label[:, None]) & known
        counts = torch.stack([right.sum((1, 2)), known.sum((1, 2))])
        # Over all processes, because one alone may know no label at all
        right, known = distributed.mean(counts.float())
        metrics["nn_accuracy"] = right / known
    return metrics


def _of_all_processes(x: Tensor) -> Tensor:
    """(heads, batch, ...) of one process to (heads, batch of all processes, ...)."""
    return distributed.gather(x.transpose(0, 1)).transpose(0, 1)


def _check_encoder(encoder: nn.Module, config: RefineConfig) -> None:
    if not hasattr(encoder, "blocks") or not hasattr(encoder.patch_embed, "patch_size"):
        raise InputError(
            f"{type(encoder).__name__} can be probed, not refined: "
            "expected a ViT, whose blocks see all patches"
        )
    depth, patch = len(encoder.blocks), encoder.patch_embed.patch_size[0]
    check_pools(encoder, (config.pool,), config.resolve_blocks(depth))
    for crop in config.views.crops:
        if crop.size % patch:
            raise InputError(f"crop size {crop.size} is not divisible by the patch size {patch}")
    if not 0 <= config.frozen_blocks < depth:
        raise InputError(
            f"frozen_blocks must be between 0 and {depth - 1}, got {config.frozen_blocks}"
        )
