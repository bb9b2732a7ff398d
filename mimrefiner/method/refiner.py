"""MIMRefiner: an encoder with one contrastive head on every chosen block; one batch of views
forward and back.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimrefiner import distributed
from mimrefiner.config import RefineConfig
from mimrefiner.errors import InputError
from mimrefiner.method.heads import Heads
from mimrefiner.method.losses import average_pairs, nna_terms
from mimrefiner.method.nn_queue import NNQueue
from mimrefiner.models.blocks import check_pools, pooled_blocks


@dataclass
class StepResult:
    """One batch: the loss of every head (heads,), with gradient, and metrics of every head, each
    (heads,).

    ``nn_accuracy``: share of neighbours of the query's class, among neighbours and queries that
    have one; ``nn_similarity``:
    cosine of query and neighbour; ``nn_age``: images enqueued since the neighbour was;
    ``alignment``: softmax probability of the positive, over pairs of different global views.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


class MIMRefiner(nn.Module):
    """Encoder, heads and queue.

    An intermediate head reads its block's raw output, the head on the last block reads the
    encoder's output after the final LayerNorm (which post-norm models do not have).

    Args:
        encoder: a timm ViT; it is used, not copied.
        config: see :class:`mimrefiner.config.RefineConfig`; new weights are drawn from
            ``config.seed``.

    Raises:
        InputError: no plain ViT, a block out of range, cls pooling without cls token, a crop that
            the patch size does not divide.
    """

    def __init__(self, encoder: nn.Module, config: RefineConfig):
        super().__init__()
        self.encoder = encoder
        self.config = config
        if not hasattr(encoder, "blocks") or not hasattr(encoder.patch_embed, "patch_size"):
            raise InputError(
                f"{type(encoder).__name__} can be probed, not refined: expected a ViT, whose blocks see all patches"
            )
        self.depth = len(encoder.blocks)
        self.blocks = config.resolve_blocks(self.depth)
        check_pools(encoder, (config.pool,))
        patch = encoder.patch_embed.patch_size[0]
        for crop in config.views.crops:
            if crop.size % patch:
                raise InputError(
                    f"crop size {crop.size} is not divisible by the patch size {patch}"
                )
        if not 0 <= config.frozen_blocks < self.depth:
            raise InputError(
                f"frozen_blocks must be between 0 and {self.depth - 1}, got {config.frozen_blocks}"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.heads = Heads(
                len(self.blocks),
                encoder.embed_dim,
                config.hidden_dim,
                config.out_dim,
                config.predictor_dim,
            )
            self.queue = NNQueue(len(self.blocks), config.queue_size, config.out_dim)

    def forward(self, views: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Projections and predictions of all views, each (heads, batch, views, out_dim); ``views``
        as for :meth:`features`.
        """
        return self.project(self.features(views))

    def features(self, views: Sequence[Tensor]) -> Tensor:
        """What the heads read: pooled features of their blocks, (views, batch, heads, dim).

        ``views``: (batch, 3, size, size) each, crops of one size next to each other; they pass the
            encoder together.
        """
        pooled, start = [], 0
        while start < len(views):
            stop = start + 1
            while stop < len(views) and views[stop].shape == views[start].shape:
                stop += 1
            images = torch.cat(list(views[start:stop]))
            pools = pooled_blocks(
                self.encoder,
                images,
                self.blocks,
                (self.config.pool,),
                norm_blocks=(self.depth - 1,),
            )
            pooled.append(torch.stack(pools[self.config.pool], 1))  # (views * batch, heads, dim)
            start = stop
        return torch.cat(pooled).unflatten(0, (len(views), -1))

    def project(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Projections and predictions, each (heads, batch, views, out_dim), of :meth:`features`."""
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
        """Loss and metrics of one batch; look up neighbours first, then enqueue the first view's
        projections.

        With several processes each gives its share of the batch: the loss is that of its own images
            against the predictions
        of all, and the mean over processes is the loss of the batch.

        Args:
            z, p: projections and predictions (:meth:`forward`), those of global views first.
            index, label: which image each row is, and its class (-1: none), (batch,); labels serve
                metrics only.
            top_k, generator: see :meth:`NNQueue.lookup_slots`.
        """
        config, rank, world = self.config, distributed.rank(), distributed.world()
        z = z[:, :, : len(config.views.global_crops)].detach().float()
        slots = self.queue.lookup_slots(
            z, index, top_k=top_k, generator=generator, part=(rank, world)
        )
        neighbours = self.queue.gather(slots)
        # (heads, batch of all processes, views, dim)
        p = distributed.gather(p.transpose(0, 1)).transpose(0, 1)
        terms = nna_terms(
            z,
            neighbours,
            p,
            temperature=config.temperature,
            swap_negatives=config.swap_negatives,
            offset=rank * z.shape[1],
        )
        with torch.no_grad():
            metrics = self._metrics(z, neighbours, slots, terms, label)
            first = distributed.gather(z[:, :, 0].transpose(0, 1)).transpose(0, 1)
            self.queue.enqueue(
                first,
                distributed.gather(index),
                None if label is None else distributed.gather(label),
            )
        return StepResult(average_pairs(terms, config.pairing), metrics)

    def _metrics(
        self, z: Tensor, neighbours: Tensor, slots: Tensor, terms: Tensor, label: Tensor | None
    ) -> dict[str, Tensor]:
        global_views = z.shape[2]
        # (heads, global_views, global_views)
        alignment = terms[:, :, :global_views].neg().exp().mean(-1)
        different = ~torch.eye(global_views, dtype=torch.bool, device=z.device)
        metrics = {
            "nn_similarity": F.cosine_similarity(z, neighbours, dim=-1).mean((1, 2)),
            "nn_age": self.queue.age[slots].float().mean((1, 2)),
            "alignment": (alignment * different).sum((1, 2)) / (global_views * (global_views - 1)),
        }
        if label is not None:
            found = self.queue.label[slots]
            known = (found >= 0) & (label[:, None] >= 0)
            counts = torch.stack(
                [((found == label[:, None]) & known).sum((1, 2)), known.sum((1, 2))]
            )
            # Of all processes: one alone may know no label at all
            right, of = distributed.mean(counts.float())
            metrics["nn_accuracy"] = right / of
        return metrics
