"""The queue of past projections in which NNA looks for neighbours (one per head, kept together).

Looking up never writes; :meth:`NNQueue.enqueue` is the only mutation.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimrefiner.errors import InputError

LOOKUP_BYTES = 2**28  # at most this much similarity matrix at a time


class NNQueue(nn.Module):
    """First-in-first-out queue of un-normalised projections, one row of slots shared by all heads.

    Persistent buffers: ``z`` (heads, size, dim), first filled with N(0, 1); ``index``, ``label``,
    ``age`` (size,) and ``ptr``
    (1,), the slot that is written next. ``index`` and ``label`` are -1 where nothing was enqueued
    yet; ``age`` counts the images enqueued since, its own batch included. Semantics:
    ``src/modules/ssl/nnclr_queue.py`` of the released code, except that similarities are always
    float32.
    """

    def __init__(self, heads: int, size: int, dim: int):
        super().__init__()
        if min(heads, size, dim) < 1:
            raise InputError(f"expected heads, size and dim >= 1, got {heads}, {size} and {dim}")
        self.register_buffer("z", torch.randn(heads, size, dim))
        self.register_buffer("index", torch.full((size,), -1))
        self.register_buffer("label", torch.full((size,), -1))
        self.register_buffer("age", torch.zeros(size, dtype=torch.long))
        self.register_buffer("ptr", torch.zeros(1, dtype=torch.long))
        # So that no lookup normalises the queue
        self.register_buffer("unit", F.normalize(self.z, dim=-1), persistent=False)
        self.register_load_state_dict_post_hook(NNQueue._refresh_unit)

    def _refresh_unit(self, _) -> None:
        self.unit.copy_(F.normalize(self.z, dim=-1))

    @property
    def size(self) -> int:
        return self.z.shape[1]

    def lookup(self, z: Tensor, index: Tensor | None, **options) -> Tensor:
        """Neighbours of ``z`` (heads, batch, views, dim) in the queue, un-normalised and without
        gradient: the shape of ``z``.

        See :meth:`lookup_slots` for the arguments.
        """
        return self.gather(self.lookup_slots(z, index, **options))

    @torch.no_grad()
    def lookup_slots(
        self,
        z: Tensor,
        index: Tensor | None,
        *,
        top_k: int = 1,
        generator: torch.Generator | None = None,
        part: tuple[int, int] = (0, 1),
    ) -> Tensor:
        """Slots of the neighbours of ``z`` by cosine similarity: (heads, batch, views), integers.

        Args:
            z: projections, (heads, batch, views, dim).
            index: which image each row is, (batch,); entries of the same image are passed over.
                None excludes nothing.
            top_k: draw uniformly among this many nearest entries; 1 takes the nearest.
            generator: source of the draw (a CPU generator serves any device).
            part: (i, n) when ``z`` is the i-th of n equal parts of the batch: draws are made for
                the whole of it, so that they do not depend on the number of processes.
        """
        if z.ndim != 4 or z.shape[0] != self.z.shape[0] or z.shape[3] != self.z.shape[2]:
            raise InputError(
                f"expected z as ({self.z.shape[0]}, batch, views, {self.z.shape[2]}), got {tuple(z.shape)}"
            )
        heads, batch, views = z.shape[:3]
        if index is not None and index.shape != (batch,):
            raise InputError(
                f"expected index as ({batch},) for z {tuple(z.shape)}, got {tuple(index.shape)}"
            )
        if not 1 <= top_k <= self.size:
            raise InputError(
                f"top_k must be between 1 and the queue's size {self.size}, got {top_k}"
            )
        if top_k > 1:
            device = z.device if generator is None else generator.device
            pick = torch.randint(
                top_k, (heads, batch * part[1], views, 1), generator=generator, device=device
            )
            pick = pick[:, part[0] * batch : (part[0] + 1) * batch]
            if z.device.type == "cuda" and device.type == "cpu":
                pick = pick.pin_memory()  # else the copy would wait for the GPU
            pick = pick.to(z.device, non_blocking=True)
        rows = max(1, LOOKUP_BYTES // (4 * heads * views * self.size))
        slots = []
        with torch.autocast(z.device.type, enabled=False):
            for start in range(0, batch, rows):
                some = slice(start, start + rows)
                # (heads, rows * views, dim)
                query = F.normalize(z[:, some].float(), dim=-1).flatten(1, 2)
                # (heads, rows, views, size)
                similarity = (query @ self.unit.mT).unflatten(1, (-1, views))
                if index is not None:
                    own = index[some, None] == self.index  # (rows, size)
                    similarity.masked_fill_(own[:, None], -1.0)
                nearest = similarity.topk(top_k, dim=-1).indices
                slots.append(
                    nearest[..., 0] if top_k == 1 else nearest.gather(-1, pick[:, some])[..., 0]
                )
        return torch.cat(slots, dim=1)

    def gather(self, slots: Tensor) -> Tensor:
        """Entries at ``slots`` (heads, batch, views): (heads, batch, views, dim)."""
        heads = torch.arange(self.z.shape[0], device=slots.device)[:, None, None]
        return self.z[heads, slots]

    @torch.no_grad()
    def enqueue(self, z: Tensor, index: Tensor, label: Tensor | None = None) -> None:
        """Write the newest projections over the oldest.

        Args:
            z: projections of the first global view, already gathered over processes, (heads, batch,
                dim).
            index: which image each row is, (batch,).
            label: its class, (batch,), or None; used for metrics only.
        """
        shapes = [tuple(x.shape) for x in (z, index, label) if x is not None]
        batch = z.shape[1] if z.ndim == 3 else -1
        # Before anything is written
        if z.shape != (self.z.shape[0], batch, self.z.shape[2]) or set(shapes[1:]) != {(batch,)}:
            raise InputError(
                f"expected z as ({self.z.shape[0]}, batch, {self.z.shape[2]}), index and label as (batch,), "
                f"got {', '.join(map(str, shapes))}"
            )
        if batch > self.size:
            raise InputError(f"a batch of {batch} does not fit a queue of {self.size}")
        slots = (self.ptr + torch.arange(batch, device=self.ptr.device)) % self.size
        self.z[:, slots] = z.to(self.z.dtype)
        # From z as stored, so that a loaded queue equals this one
        self.unit[:, slots] = F.normalize(self.z[:, slots], dim=-1)
        self.index[slots] = index
        self.label[slots] = -1 if label is None else label
        self.age[slots] = 0
        self.age += batch
        self.ptr.copy_((self.ptr + batch) % self.size)
