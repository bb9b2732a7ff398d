"""The engine of several processes: Lightning Fabric joins them and runs DDP and FSDP.

DDP averages gradients; FSDP also shares the weights.
"""

import atexit
import inspect
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mimrefiner.distributed import world
from mimrefiner.errors import InputError

DDP_PARAMETERS = inspect.signature(nn.parallel.DistributedDataParallel).parameters
# Newer versions of torch have another name for it
SYNC_BUFFERS = (
    "forward_sync_buffers" if "forward_sync_buffers" in DDP_PARAMETERS else "broadcast_buffers"
)


@contextmanager
def processes() -> Iterator[None]:
    """Join the processes that were started (NCCL with GPUs, else gloo), and leave them at the end.

    A process that was started alone joins nothing. One that waits longer than
    ``$MIMREFINER_TIMEOUT`` seconds (1800) for another ends with an error, and ``torchrun`` ends the
    others.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    from lightning_fabric.strategies import DDPStrategy

    seconds = float(os.environ.get("MIMREFINER_TIMEOUT", "1800"))
    _fabric(DDPStrategy(timeout=timedelta(seconds=seconds)))
    yield
    _sharding.cache_clear()
    dist.destroy_process_group()  # not after an error: it would wait for processes that are gone


def _fabric(strategy):
    """A launched :class:`lightning_fabric.Fabric` with ``strategy``, which has joined the group.

    It sees every process as a machine of its own with one device, so that any number of them may
    run on any machine.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments import TorchElasticEnvironment
    from lightning_fabric.utilities import distributed as fabric_distributed
    from lightning_fabric.utilities.exceptions import MisconfigurationException

    class Environment(TorchElasticEnvironment):
        def local_rank(self) -> int:
            return 0

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # no banner from every run
    joined, local = dist.is_initialized(), int(os.environ.get("LOCAL_RANK", "0"))
    if joined:  # perhaps by the caller, without the variables of a launcher
        os.environ |= {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}
    # What `fabric run` was told about processes and devices is used here, once; its strategy and
    # precision contradict ours
    told = {
        name: os.environ.pop(f"LT_{name}", "") for name in ("ACCELERATOR", "DEVICES", "NUM_NODES")
    }
    cuda = (
        dist.get_backend() == "nccl"
        if joined
        else torch.cuda.is_available() and told["ACCELERATOR"] != "cpu"
    )
    listed = told["DEVICES"].split(",")  # GPUs by number, or how many
    index = int(listed[local]) if len(listed) > 1 else local
    if cuda and not joined and index >= torch.cuda.device_count():
        raise InputError(
            f"process {local} of this machine has no GPU of its own (there are "
            f"{torch.cuda.device_count()}), and processes cannot share one: start as many as there "
            "are GPUs, or hide the GPUs to run on the CPU (CUDA_VISIBLE_DEVICES=)"
        )
    try:
        fabric = Fabric(
            accelerator="cuda" if cuda else "cpu",
            devices=[torch.cuda.current_device() if joined else index] if cuda else 1,
            num_nodes=int(os.environ["WORLD_SIZE"]),
            strategy=strategy,
            precision="32-true",
            plugins=[Environment()],
        )
        # Where `fabric run` started the processes, it is launched already
        if os.environ.get("LT_CLI_USED", "0") == "0":
            fabric.launch()
    except (ValueError, MisconfigurationException) as error:
        raise InputError(str(error)) from error
    # With NCCL, Fabric would leave the group at exit, also after an error, and wait for processes
    # that wait for this one
    atexit.unregister(getattr(fabric_distributed, "_destroy_dist_connection", None))
    return fabric


def averaged(part: nn.Module) -> Callable:
    """A function that calls another one, which uses ``part``, and averages the gradients (DDP).

    ``averaged(encoder)(lambda: encoder(images))`` gives what the inner function gives; a backward
    pass through it averages the gradients of ``part`` over the processes while it goes on. Where
    there is nothing to average the function is only called: with one process, with nothing to
    train, or sharded, where gradients are means already.
    """
    trained = [x for x in part.parameters() if x.requires_grad]
    if world() == 1 or not trained or is_sharded(trained[0]):
        return call
    from lightning_fabric.strategies import DDPStrategy

    # Looking for parameters that no loss reaches also keeps DDP from sorting its messages anew
    # after the first step: a resumed run would add in another order and differ in the last bits
    strategy = DDPStrategy(
        find_unused_parameters=True, gradient_as_bucket_view=True, **{SYNC_BUFFERS: False}
    )
    return _fabric(strategy).setup_module(_Called(part), move_to_device=False)


def call(function: Callable):
    """Call ``function``."""
    return function()


def adding(through: Callable) -> AbstractContextManager:
    """Within this block, backward passes add to this process's gradients, not yet averaged.

    ``through`` is the :func:`averaged` function; its next backward pass outside averages the sum.
    """
    modules = through.modules() if isinstance(through, nn.Module) else ()
    wrapped = [x for x in modules if isinstance(x, nn.parallel.DistributedDataParallel)]
    return wrapped[0].no_sync() if wrapped else nullcontext()


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> None:
    """Scale all gradients by one factor, so that their common norm is at most ``limit``.

    Parameters may be sharded. The GPU does not wait.
    """
    parameters = [x for x in parameters if x.grad is not None]
    # Sums of squares: of whole parameters, and of this process's shards
    squares = [torch.zeros((), device=parameters[0].device) for _ in range(2)]
    for x in parameters:
        squares[is_sharded(x)] += local(x.grad).float().square().sum()
    if any(is_sharded(x) for x in parameters):
        dist.all_reduce(squares[1])
    factor = (limit / (sum(squares).sqrt() + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([local(x.grad) for x in parameters], factor)


def shard(model: nn.Module) -> None:
    """Let every process keep only its part of the parameters (FSDP2).

    This is Fabric's model-parallel strategy with torch's ``fully_shard``. Each block is put
    together while it runs, forward and again backward; what lies outside the blocks stays together
    for the whole pass. Every backward pass averages and splits a block's gradients as soon as they
    are known.

    Args:
        model: an encoder, or a model with one, on its device, with ``requires_grad`` as it will be
            trained. Its parameters become new objects.

    Raises:
        InputError: one process alone, or torch before 2.7.
    """
    if world() == 1:
        raise InputError(
            "sharding shares the encoder among processes, here is one: "
            "start with torchrun, or leave out --shard"
        )
    if torch.__version__ < (2, 7):
        raise InputError(f"sharding needs torch 2.7 or newer, this is {torch.__version__}")
    _sharding().setup_module(model, move_to_device=False)


@cache
def _sharding():
    """The one engine of all sharded models, since every engine has messages of its own."""
    from lightning_fabric.strategies import ModelParallelStrategy

    return _fabric(
        ModelParallelStrategy(_split_blocks, data_parallel_size=world(), tensor_parallel_size=1)
    )


def _split_blocks(model: nn.Module, _) -> nn.Module:
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    encoder = getattr(model, "encoder", model)
    # Fabric's mesh has two dimensions and, with some versions of torch, a group and a time limit of
    # its own
    mesh = dist.init_device_mesh(next(model.parameters()).device.type, (world(),))
    for block in encoder.blocks:
        fully_shard(block, mesh=mesh)
    # Hooks may use the final norm, whose own output is not used
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    if encoder is model:
        register_fsdp_forward_method(model, "forward_features")
    return model


def is_sharded(x: Tensor) -> bool:
    """Whether ``x`` is spread over the processes (a DTensor, which takes long to import)."""
    return hasattr(x, "to_local")


def local(x: Tensor) -> Tensor:
    """This process's part of ``x``, sharing its memory; ``x`` itself where it is not sharded."""
    return x.to_local() if is_sharded(x) else x


def whole(state, keep: bool = True):
    """``state`` with its sharded tensors put together on the CPU; all processes must call it.

    Args:
        state: nested dictionaries and lists.
        keep: whether this process wants the whole tensors; it gets None for each if not.
    """
    if isinstance(state, Tensor) and is_sharded(state):
        full = state.detach().full_tensor()
        return full.cpu() if keep else None
    if isinstance(state, dict):
        return {name: whole(x, keep) for name, x in state.items()}
    return [whole(x, keep) for x in state] if isinstance(state, list) else state


def load_whole(part: nn.Module | torch.optim.Optimizer, state: dict) -> None:
    """``part.load_state_dict(state)`` with whole tensors (see :func:`whole`) for a sharded part."""
    if isinstance(part, nn.Module):
        own = part.state_dict()
        part.load_state_dict({name: _split(x, own.get(name)) for name, x in state.items()})
        return
    parameters = [x for group in part.param_groups for x in group["params"]]
    moments = {
        i: {name: _split(x, parameters[i]) for name, x in values.items()}
        for i, values in state["state"].items()
    }
    part.load_state_dict({**state, "state": moments})


class _Called(nn.Module):
    """What DDP wraps: its forward pass calls a function that uses ``part``.

    A function, because DDP would copy tensors that it is given to the GPU.
    """

    def __init__(self, part: nn.Module):
        super().__init__()
        self.part = part

    def forward(self, function: Callable):
        return function()


def _split(x, like: Tensor | None):
    """This process's part of ``x``, if ``like`` is a sharded tensor of its shape."""
    if like is None or not is_sharded(like) or x.shape != like.shape:
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        x.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


def unsharded(model: nn.Module, plain: nn.Module) -> nn.Module:
    """``plain``, a copy of ``model`` from before it was sharded, with its weights of now."""
    plain.load_state_dict(whole(model.state_dict()))
    return plain
