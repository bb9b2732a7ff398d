"""The queue of past projections in which NNA looks for neighbours (one per head, kept together).

Looking up never writes; :meth:`NNQueue.enqueue` is the only mutation.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimrefiner.device import to_device
from mimrefiner.errors import InputError

LOOKUP_BYTES = 2**28  # at most this much similarity matrix at a time


class NNQueue(nn.Module):
    """First-in-first-out queue of un-normalised projections; all heads share the slots.

    It does what ``src/modules/ssl/nnclr_queue.py`` of the released code does, except that
    similarities are always float32. Its persistent buffers are

    - ``z`` (heads, size, dim): projections, first filled with N(0, 1);
    - ``index`` and ``label`` (size,): image and class of each slot, -1 where nothing was enqueued;
    - ``age`` (size,): images enqueued since, those of its own batch included;
    - ``ptr`` (1,): the slot that is written next.

    Args:
        heads: number of heads.
        size: number of slots.
        dim: width of the projections.

    >>> import mimrefiner as mr
    >>> queue = mr.NNQueue(heads=1, size=8, dim=4)
    >>> z = torch.eye(4)[None]  # (heads, batch, dim)
    >>> queue.enqueue(z, index=torch.arange(4))
    >>> query = z[:, :2, None] + 0.1  # (heads, batch, views, dim)
    >>> queue.lookup_slots(query, index=None).flatten().tolist()
    [0, 1]
    >>> queue.lookup(query, index=torch.tensor([0, 1])).shape  # others than images 0 and 1
    torch.Size([1, 2, 1, 4])
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
        """Number of slots."""
        return self.z.shape[1]

    def lookup(self, z: Tensor, index: Tensor | None, **options) -> Tensor:
        """Neighbours of ``z`` in the queue, un-normalised and without gradient, shaped like ``z``.

        The arguments are those of :meth:`lookup_slots`.
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
        """Slots of the neighbours of ``z`` by cosine similarity, integers (heads, batch, views).

        Args:
            z: projections, (heads, batch, views, dim).
            index: which image each row is, (batch,); entries of the same image are passed over.
                None excludes nothing.
            top_k: draw uniformly among this many nearest entries; 1 takes the nearest.
            generator: source of the draw (a CPU generator serves any device).
            part: (i, n) when ``z`` is the i-th of n equal parts of the batch: draws are made for
                the whole of it, so that they do not depend on the number of processes.
        """
        self._check_query(z, index, top_k)
        heads, batch, views = z.shape[:3]
        picks = None if top_k == 1 else _picks((heads, batch, views), top_k, generator, part, z)
        rows = max(1, LOOKUP_BYTES // (4 * heads * views * self.size))
        slots = []
        with torch.autocast(z.device.type, enabled=False):
            for start in range(0, batch, rows):
                some = slice(start, start + rows)
                query = F.normalize(z[:, some].float(), dim=-1).flatten(1, 2)
                # (heads, rows, views, size)
                similarity = (query @ self.unit.mT).unflatten(1, (-1, views))
                if index is not None:
                    own = index[some, None] == self.index  # (rows, size)
                    similarity.masked_fill_(own[:, None], -1.0)
                nearest = similarity.topk(top_k, dim=-1).indices
                if picks is not None:
                    nearest = nearest.gather(-1, picks[:, some])
                slots.append(nearest[..., 0])
        return torch.cat(slots, dim=1)

    def gather(self, slots: Tensor) -> Tensor:
        """What lies in ``slots`` (heads, batch, views): (heads, batch, views, dim)."""
        heads = torch.arange(self.z.shape[0], device=slots.device)[:, None, None]
        return self.z[heads, slots]

    @torch.no_grad()
    def enqueue(self, z: Tensor, index: Tensor, label: Tensor | None = None) -> None:
        """Write the newest projections over the oldest.

        Args:
            z: projections of the first global view, gathered over processes, (heads, batch, dim).
            index: which image each row is, (batch,).
            label: its class, (batch,), or None; used for metrics only.
        """
        self._check_entries(z, index, label)
        batch = len(index)
        slots = (self.ptr + torch.arange(batch, device=self.ptr.device)) % self.size
        self.z[:, slots] = z.to(self.z.dtype)
        # From z as stored, so that a loaded queue equals this one
        self.unit[:, slots] = F.normalize(self.z[:, slots], dim=-1)
        self.index[slots] = index
        self.label[slots] = -1 if label is None else label
        self.age[slots] = 0
        self.age += batch
        self.ptr.copy_((self.ptr + batch) % self.size)

    def _check_query(self, z: Tensor, index: Tensor | None, top_k: int) -> None:
        heads, size, dim = self.z.shape
        if z.ndim != 4 or z.shape[0] != heads or z.shape[3] != dim:
            raise InputError(f"expected z as ({heads}, batch, views, {dim}), got {tuple(z.shape)}")
        if index is not None and index.shape != (z.shape[1],):
            raise InputError(
                f"expected index as ({z.shape[1]},) for z {tuple(z.shape)}, "
                f"got {tuple(index.shape)}"
            )
        if not 1 <= top_k <= size:
            raise InputError(f"top_k must be between 1 and the queue's size {size}, got {top_k}")

    def _check_entries(self, z: Tensor, index: Tensor, label: Tensor | None) -> None:
        heads, size, dim = self.z.shape
        shapes = [tuple(x.shape) for x in (z, index, label) if x is not None]
        batch = z.shape[1] if z.ndim == 3 else -1
        if z.shape != (heads, batch, dim) or set(shapes[1:]) != {(batch,)}:
            raise InputError(
                f"expected z as ({heads}, batch, {dim}), index and label as (batch,), "
                f"got {', '.join(map(str, shapes))}"
            )
        if batch > size:
            raise InputError(f"a batch of {batch} does not fit a queue of {size}")


def _picks(shape, top_k: int, generator, part: tuple[int, int], z: Tensor) -> Tensor:
    """Which of the ``top_k`` nearest every query takes, (heads, batch, views, 1), beside ``z``."""
    heads, batch, views = shape
    home = z.device if generator is None else generator.device
    of_all = (heads, batch * part[1], views, 1)
    picks = torch.randint(top_k, of_all, generator=generator, device=home)
    picks = picks[:, part[0] * batch : (part[0] + 1) * batch]
    return to_device(picks, z.device) if home.type == "cpu" else picks.to(z.device)
