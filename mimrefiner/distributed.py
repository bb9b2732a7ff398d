"""Training on several processes: Lightning Fabric starts them and averages gradients, the few collectives beside are torch's.

Processes are started by ``torchrun`` or ``fabric run``. Each computes the loss of its own share of the batch against the
predictions of all; gradients are averaged. Every process then holds the same weights, optimiser and queue. With one process every
function here does nothing, and Fabric is not imported.
"""

import inspect
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mimrefiner.errors import InputError

ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
DDP_PARAMETERS = inspect.signature(nn.parallel.DistributedDataParallel).parameters
SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in DDP_PARAMETERS else "broadcast_buffers"  # as well


@contextmanager
def processes() -> Iterator[None]:
    """Join the processes that were started (NCCL with GPUs, else gloo), leave them at the end; alone: nothing.

    A process that waits longer than ``$MIMREFINER_TIMEOUT`` seconds (1800) for another ends with an error, and ``torchrun``
    ends the others.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    from lightning_fabric.strategies import DDPStrategy

    _fabric(DDPStrategy(timeout=timedelta(seconds=float(os.environ.get("MIMREFINER_TIMEOUT", "1800")))))
    yield
    dist.destroy_process_group()  # not after an error: it would wait for processes that are gone


def _fabric(strategy):
    """The engine (:class:`lightning_fabric.Fabric`) with ``strategy``, launched: joins the group where that is not done yet."""
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments import TorchElasticEnvironment

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # not a banner from every run
    size = int(os.environ["WORLD_SIZE"])
    here = int(os.environ.get("LOCAL_WORLD_SIZE", size))  # processes on this machine
    try:
        fabric = Fabric(
            accelerator="auto" if torch.cuda.is_available() else "cpu",
            devices=here,
            num_nodes=size // here,
            strategy=strategy,
            plugins=[TorchElasticEnvironment()],  # the variables that every launcher sets, SLURM's own or not
        )
    except ValueError as error:  # an option of `fabric run` that training chooses itself
        raise InputError(str(error)) from error
    if os.environ.get("LT_CLI_USED", "0") == "0":  # where `fabric run` started the processes, it is launched already
        fabric.launch()
    return fabric


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


def averaged(call: Callable, part: nn.Module) -> Callable:
    """``call``, a function that uses the parameters of ``part``, such that backward passes average their gradients over the
    processes (DDP), while they go on.

    Returns ``call`` itself where there is nothing to do: alone, nothing to train, or sharded, whose gradients are means already.
    """
    trained = [x for x in part.parameters() if x.requires_grad]
    if world() == 1 or not trained or is_sharded(trained[0]):
        return call
    from lightning_fabric.strategies import DDPStrategy

    # Looking for parameters that the loss does not reach (those behind the last head) also keeps DDP from sorting its messages
    # anew after the first step, with which a resumed run would add in another order and differ in the last bits.
    strategy = DDPStrategy(find_unused_parameters=True, gradient_as_bucket_view=True, **{SYNC_BUFFERS: False})
    return _fabric(strategy).setup_module(_Call(call, part), move_to_device=False)


def adding(call: Callable) -> AbstractContextManager:
    """Within it, backward passes through :func:`averaged` add to the gradients of this process, to be averaged by a later one."""
    modules = call.modules() if isinstance(call, nn.Module) else ()
    wrapped = [x for x in modules if isinstance(x, nn.parallel.DistributedDataParallel)]
    return wrapped[0].no_sync() if wrapped else nullcontext()


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
    """Let every process keep its part of the parameters only (FSDP2: Fabric's model-parallel
    strategy with torch's ``fully_shard``).

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
    from lightning_fabric.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    def split(model: nn.Module, mesh) -> nn.Module:
        mesh = mesh["data_parallel"]
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh, reshard_after_forward=False)  # hooks may use the final norm, whose own output is not used
        for method in methods:
            register_fsdp_forward_method(model, method)
        return model

    strategy = ModelParallelStrategy(split, data_parallel_size=world(), tensor_parallel_size=1)
    _fabric(strategy).setup_module(model, move_to_device=False)


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


class _Call(nn.Module):
    """``call`` as the forward pass of a module with the parameters of ``part``, which is what DDP wraps."""

    def __init__(self, call: Callable, part: nn.Module):
        super().__init__()
        self.call, self.part = call, part
        self.unreached = nn.Parameter(torch.zeros(()))  # DDP warns where it looks for such a parameter and finds none

    def forward(self, *args):
        return self.call(*args)


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
