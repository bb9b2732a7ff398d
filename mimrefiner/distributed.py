"""The few collectives of training on several processes; with one process every function here does nothing.

Processes are started by ``torchrun``. Each computes the loss of its own share of the batch against the predictions of all;
gradients are averaged. Every process then holds the same weights, optimiser and queue.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mimrefiner.errors import InputError

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


def barrier() -> None:
    """Wait for all processes."""
    if world() > 1:
        dist.barrier()


def from_first(function: Callable):
    """What ``function()`` returns on the first process (the others do not call it), on all of them; bad input and errors of
    the file system there are raised on all, so that none waits in vain."""
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

    Called once after the whole backward pass, so that micro-batches and activation checkpointing need no care. Gradients of
    sharded parameters are means already.
    """
    if world() == 1:
        return
    bucket: list[Tensor] = []
    for x in parameters:
        if x.grad is not None and not is_sharded(x):
            if bucket and (bucket[0].dtype != x.grad.dtype or sum(g.nbytes for g in bucket) + x.grad.nbytes > BUCKET_BYTES):
                _average(bucket)
                bucket = []
            bucket.append(x.grad)
    if bucket:
        _average(bucket)


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> None:
    """Scale all gradients by one factor so that their common norm is at most ``limit``, sharded or not; the GPU does not wait."""
    parameters = [x for x in parameters if x.grad is not None]
    squares = [torch.zeros((), device=parameters[0].device) for _ in range(2)]  # of whole parameters, of this process's shards
    for x in parameters:
        squares[is_sharded(x)] += local(x.grad).float().square().sum()
    if any(is_sharded(x) for x in parameters):
        dist.all_reduce(squares[1])
    factor = (limit / (sum(squares).sqrt() + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([local(x.grad) for x in parameters], factor)


def shard(model: nn.Module, blocks: Iterable[nn.Module], *methods: str) -> None:
    """Let every process keep its part of the parameters only (FSDP2: torch's ``fully_shard``).

    Each of ``blocks`` is put together while it runs, forward and again backward; what lies outside of them for the whole pass.
    Gradients are averaged and split as soon as a block's are known, in every one of several backward passes.

    Args:
        model: on its device, with ``requires_grad`` as it will be trained. Its parameters become new objects.
        methods: other names under which the forward pass is called, such as "forward_features".

    Raises:
        InputError: one process alone, or torch before 2.7.
    """
    if world() == 1:
        raise InputError("sharding shares the encoder among processes, here is one: start with torchrun, or leave out --shard")
    if torch.__version__ < (2, 7):
        raise InputError(f"sharding needs torch 2.7 or newer, this is {torch.__version__}")
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = dist.init_device_mesh(next(model.parameters()).device.type, (world(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)  # hooks may use the final norm, whose own output is not used
    for method in methods:
        register_fsdp_forward_method(model, method)


def is_sharded(x: Tensor) -> bool:
    """Whether ``x`` is spread over the processes (a DTensor; asked for like this, its import takes time)."""
    return hasattr(x, "to_local")


def local(x: Tensor) -> Tensor:
    """This process's part of ``x``, sharing its memory; ``x`` itself where it is not sharded."""
    return x.to_local() if is_sharded(x) else x


def whole(state, keep: bool = True):
    """``state`` (nested dictionaries and lists) with sharded tensors put together on the CPU; all processes must call it.

    ``keep``: whether this process wants them; it gets None instead if not.
    """
    if isinstance(state, Tensor) and is_sharded(state):
        full = state.detach().full_tensor()
        return full.cpu() if keep else None
    if isinstance(state, dict):
        return {name: whole(x, keep) for name, x in state.items()}
    return [whole(x, keep) for x in state] if isinstance(state, list) else state


def load_whole(part: nn.Module | torch.optim.Optimizer, state: dict) -> None:
    """``part.load_state_dict(state)``, where ``state`` holds whole tensors (see :func:`whole`) and ``part`` may be sharded."""
    if isinstance(part, nn.Module):
        own = part.state_dict()
        part.load_state_dict({name: _split(x, own.get(name)) for name, x in state.items()})
        return
    parameters = [x for group in part.param_groups for x in group["params"]]
    moments = {i: {name: _split(x, parameters[i]) for name, x in values.items()} for i, values in state["state"].items()}
    part.load_state_dict({**state, "state": moments})


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """``average`` = decay * ``average`` + (1 - decay) * ``model``, buffers copied; each process sees to its own part.

    (:class:`torch.optim.swa_utils.AveragedModel` waits for the GPU at every update.)
    """
    weights = [[local(x) for x in part.parameters()] for part in (average, model)]
    torch._foreach_lerp_(*weights, 1 - decay)
    for ours, theirs in zip(average.buffers(), model.buffers(), strict=True):
        ours.copy_(theirs)


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


def _split(x, like: Tensor | None):
    """This process's part of ``x``, if ``like`` is a sharded tensor of its shape."""
    if like is None or not is_sharded(like) or x.shape != like.shape:
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _average(gradients: list[Tensor]) -> None:
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= world()
    for g, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        g.copy_(part.view_as(g))
