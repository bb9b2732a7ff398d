"""The few collectives of training on several processes; with one process every function here does nothing.

Processes are started by ``torchrun`` (or ``fabric run``, which sets the same variables). Each computes the loss of its own
share of the batch against the predictions of all; gradients are averaged. Every process then holds the same weights, optimiser
and queue.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
BUCKET_BYTES = 2**26  # gradients are averaged in pieces of about this size


@contextmanager
def processes() -> Iterator[None]:
    """Join the processes that ``torchrun`` started (NCCL with GPUs, else gloo), leave them at the end; alone: nothing.

    A process that waits longer than ``$MIMREFINER_TIMEOUT`` seconds (1800) for another ends with an error, and ``torchrun``
    ends the others.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    timeout = timedelta(seconds=float(os.environ.get("MIMREFINER_TIMEOUT", "1800")))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timeout)
    yield
    dist.destroy_process_group()  # not after an error: it would wait for processes that are gone


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process, 0-based."""
    return dist.get_rank() if dist.is_initialized() else 0


def any_process(flag: bool) -> bool:
    """Whether ``flag`` is set on any process."""
    if world() == 1:
        return flag
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    value = torch.tensor(int(flag), device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return bool(value.item())


def gather(x: Tensor) -> Tensor:
    """The rows of all processes in order: (rows, ...) -> (world * rows, ...). Gradients are summed over processes."""
    return x if world() == 1 else _Gather.apply(x.contiguous())


def mean(x: Tensor) -> Tensor:
    """The mean over processes, without gradient."""
    if world() == 1:
        return x
    x = x.detach().clone()
    dist.all_reduce(x)
    return x / world()


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace gradients by their mean over processes, many small ones in one message.

    Called once after the whole backward pass, so that micro-batches and activation checkpointing need no care.
    """
    if world() == 1:
        return
    bucket: list[Tensor] = []
    for x in parameters:
        if x.grad is not None:
            if bucket and (bucket[0].dtype != x.grad.dtype or sum(g.nbytes for g in bucket) + x.grad.nbytes > BUCKET_BYTES):
                _average(bucket)
                bucket = []
            bucket.append(x.grad)
    if bucket:
        _average(bucket)


def batch_norm(x: Tensor, norm: nn.BatchNorm1d) -> Tensor:
    """``norm`` in training mode with the statistics of all processes: (rows, channels), the same number of rows everywhere.

    One message forward and one back: the processes' means and variances are gathered and combined, in float32. Equals
    ``norm(gather(x))``'s own rows. (``nn.SyncBatchNorm`` refuses CPUs.)
    """
    variance, average = torch.var_mean(x.float(), 0, correction=0)
    variances, averages = gather(torch.stack([variance, average])[None]).unbind(1)  # (world, channels) each
    average = averages.mean(0)
    variance = variances.mean(0) + (averages - average).square().mean(0)
    with torch.no_grad():
        rows = len(x) * world()
        norm.num_batches_tracked += 1
        norm.running_mean.lerp_(average, norm.momentum)
        norm.running_var.lerp_(variance * rows / (rows - 1), norm.momentum)
    scale = norm.weight * (variance + norm.eps).rsqrt()
    return ((x.float() - average) * scale + norm.bias).to(x.dtype)


class _Gather(torch.autograd.Function):
    """All-gather forward, reduce-scatter backward."""

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


def _average(gradients: list[Tensor]) -> None:
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= world()
    for g, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        g.copy_(part.view_as(g))
