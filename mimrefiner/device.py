"""Where to compute, and in which precision."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from mimrefiner.errors import InputError

PRECISIONS = ("float32", "bfloat16", "float16", "float64")


def default_device() -> torch.device:
    """The GPU where there is one; else, and in a group of processes on CPUs, the CPU."""
    on_cpus = dist.is_initialized() and dist.get_backend() == "gloo"
    return torch.device("cuda" if torch.cuda.is_available() and not on_cpus else "cpu")


def device_of(device: torch.device | str | None) -> torch.device:
    """``device``, or for None the one of :func:`default_device`.

    Raises:
        InputError: no device of that name, or none on this machine.

    >>> device_of("cpu")
    device(type='cpu')
    """
    if device is None:
        return default_device()
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device must be such as 'cpu' or 'cuda:0', got {device!r}") from error
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found.type == "cuda" and (found.index or 0) >= here:
        raise InputError(f"device {found} is not here: torch sees {here} GPUs; leave device out")
    return found


def dtype_of(name: str, dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A precision of :data:`PRECISIONS`, given as torch's type or by its name; None stays None.

    >>> dtype_of("autocast", "bfloat16")
    torch.bfloat16
    """
    kinds = {kind: getattr(torch, kind) for kind in PRECISIONS}
    found = kinds.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if found is not None and found not in kinds.values():
        raise InputError(f"{name} must be one of torch's {', '.join(PRECISIONS)}, got {dtype!r}")
    return found


def autocast(device: torch.device, encoder: nn.Module) -> torch.autocast:
    """bfloat16 where it helps, else float32.

    It helps on GPUs and, from width 192 up, on CPUs, where they have instructions for it.
    """
    helps = has_bfloat16(device) and (device.type == "cuda" or encoder.embed_dim >= 192)
    return torch.autocast(device.type, torch.bfloat16, enabled=helps)


def has_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` multiplies bfloat16 itself.

    A CPU that does not takes ten times as long as for float32; torch emulates it on older GPUs
    (T4, V100) without a word.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within this block torch's CPU generator draws from ``seed``; afterwards it goes on as before.

    The generators of GPUs are left alone (``torch.manual_seed`` would seed them too, for good).

    >>> before = torch.get_rng_state()
    >>> with seeded(7):
    ...     x = torch.rand(2)
    >>> with seeded(7):
    ...     torch.equal(x, torch.rand(2))
    True
    >>> torch.equal(before, torch.get_rng_state())
    True
    """
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Send ``x`` to ``device``; from the CPU a GPU reads page-locked memory, so nothing waits."""
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


@contextmanager
def full_float32() -> Iterator[None]:
    """Within this block convolutions in float32 are float32 on a GPU too.

    By default cuDNN rounds their inputs to 10 bits (TF32), which changes features by 2e-5 of their
    size; matrix products are not rounded by default.
    """
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@contextmanager
def frozen(encoder: nn.Module, device: torch.device | str) -> Iterator[None]:
    """Within this block ``encoder`` is on ``device``, in eval mode and needs no gradient.

    Afterwards it is as it was before.

    >>> encoder = torch.nn.Linear(2, 2)
    >>> with frozen(encoder, "cpu"):
    ...     encoder.training, encoder.weight.requires_grad
    (False, False)
    >>> encoder.training, encoder.weight.requires_grad
    (True, True)
    """
    home = next(encoder.parameters()).device
    needed = [x.requires_grad for x in encoder.parameters()]
    with evaluated(encoder):
        encoder.requires_grad_(False).to(device)
        try:
            yield
        finally:
            encoder.to(home)
            for x, flag in zip(encoder.parameters(), needed, strict=True):
                x.requires_grad_(flag)


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Within this block all of ``model`` is in eval mode.

    Afterwards each of its modules is in the mode that it was in before.

    >>> model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.BatchNorm1d(2).eval())
    >>> with evaluated(model):
    ...     [module.training for module in model]
    [False, False]
    >>> [module.training for module in model]
    [True, False]
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def plain_attention(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Within this block attention on a CPU is three plain operations.

    The fused kernel's backward pass is slower there, most of all for the short sequences of small
    images (docs/scaling.md has the ratios).
    """
    fused = [m for m in model.modules() if getattr(m, "fused_attn", False) and device.type == "cpu"]
    for module in fused:
        module.fused_attn = False
    try:
        yield
    finally:
        for module in fused:
            module.fused_attn = True


def loader_workers() -> int:
    """How many processes decode and crop: none on a CPU, whose cores are the training's own."""
    return min(8, (os.cpu_count() or 2) - 1) if default_device().type == "cuda" else 0
