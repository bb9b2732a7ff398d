"""What the processes of one training tell each other; one process alone tells nothing.

``torchrun`` or ``fabric run`` starts them, and :mod:`mimrefiner.training.engine` joins them. Each
computes the loss of its own share of the batch against the predictions of all, and gradients are
averaged, so that every process holds the same weights, optimiser and queue.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from mimrefiner.errors import InputError

# Renamed in torch 2.13
ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, 0-based."""
    return dist.get_rank() if dist.is_initialized() else 0


def any_process(flag: bool) -> bool:
    """Whether ``flag`` is set on any process."""
    if world() == 1:
        return flag
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    value = torch.tensor(int(flag), device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return bool(value.item())


def barrier() -> None:
    """Wait for all processes."""
    if world() > 1:
        dist.barrier()


def from_first(function: Callable):
    """What ``function()`` returns on the first process, which alone calls it, on all of them.

    Bad input and errors of the file system are raised on all, so that none waits in vain.
    """
    if world() == 1:
        return function()
    box = [None]
    if rank() == 0:
        try:
            box = [function()]
        except (InputError, OSError) as error:
            box = [error]
    dist.broadcast_object_list(box)
    if isinstance(box[0], (InputError, OSError)):
        raise box[0]
    return box[0]


def gather(x: Tensor) -> Tensor:
    """The rows of all processes in order: (rows, ...) -> (world * rows, ...).

    Gradients are summed over processes.
    """
    return x if world() == 1 else _Gather.apply(x.contiguous())


def mean(x: Tensor) -> Tensor:
    """The mean over processes, without gradient."""
    if world() == 1:
        return x
    x = x.detach().clone()
    dist.all_reduce(x)
    return x / world()


class _Gather(torch.autograd.Function):
    """All-gather forward, reduce-scatter backward.

    With gloo, ``torch.distributed.nn.functional.all_gather`` sends as many messages back as there
    are processes.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        out = x.new_empty(world() * len(x), *x.shape[1:])
        ALL_GATHER(out, x)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        out = grad.new_empty(len(grad) // world(), *grad.shape[1:])
        REDUCE_SCATTER(out, grad.contiguous())
        return out


def gather_rows(x: Tensor, counts: Sequence[int]) -> Tensor:
    """The first ``counts[i]`` rows of every process i, in order.

    Args:
        x: this process's rows, filled up to ``max(counts)`` rows on every process.
        counts: how many rows of each process count.
    """
    home = x.device
    if dist.get_backend() == "nccl":
        x = x.cuda()
    parts = [torch.empty_like(x) for _ in counts]
    dist.all_gather(parts, x)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]).to(home)
