"""What trades time for memory while training, and the advice for where memory runs out."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mimrefiner.errors import InputError

ADVICE = (
    "freeze the first blocks (--freeze-first), use fewer heads (--heads) or local crops "
    "(--local-crops), recompute activations (--recompute), pass fewer images through the encoder "
    "at a time (--micro-batch), use more GPUs and share the encoder among them (--shard); "
    "batches below about 256 may cost quality"
)
PRETRAIN_ADVICE = (
    "use more GPUs and share the model among them (--shard), "
    "or a preset or config with a smaller batch"
)


@dataclass(frozen=True)
class Memory:
    """What trades time for memory; none of it changes what is computed.

    Attributes:
        micro_batch: images of each process that pass the encoder at a time; batch norm and
            negatives still see the whole batch (gradient caching, arXiv 2101.06983: the encoder
            runs twice). None: all.
        recompute: keep only the input of every block and compute the rest again in the backward
            pass (activation checkpointing).
        shard: while the encoder is trained, every process keeps only its part of the encoder's
            weights, gradients, moments and moving average; a block is put together while it is
            needed (FSDP).
    """

    micro_batch: int | None = None
    recompute: bool = False
    shard: bool = False

    def __post_init__(self):
        if self.micro_batch is not None and self.micro_batch < 1:
            raise InputError(f"micro_batch must be at least 1, got {self.micro_batch}")


PLENTY = Memory()  # there is enough: nothing is traded


@contextmanager
def recomputed(encoder: nn.Module) -> Iterator[None]:
    """Within this block, encoder blocks keep only their input and are computed again going back.

    Hooks on the blocks, which pool features, run once (timm's own ``set_grad_checkpointing`` would
    run them again).
    """
    for block in encoder.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in encoder.blocks:
            del block.forward


@contextmanager
def advice_on_memory(advice: str) -> Iterator[None]:
    """Within this block, a GPU that runs out of memory raises InputError with ``advice``."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise InputError(
            f"the GPU's memory does not suffice ({str(error).splitlines()[0]}): {advice}"
        ) from error
