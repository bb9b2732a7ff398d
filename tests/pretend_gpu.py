"""A pretend GPU on a CPU: what would lie where, what would wait, and how much the GPU is asked.

Within :func:`pretend_gpu` torch says that it has one GPU. A tensor sent there stays a CPU tensor
whose memory is marked: one mode answers ``x.device`` by the mark and carries marks along, another
sees every operation, those of backward passes too. Values, gradients and files are real.

It tells launches, copies to the GPU and waits for it, per step of an optimiser
(:class:`PretendGpu`), and where results lie (:func:`devices`). What CUDA refuses is an error here:
tensors on two devices, a generator of the other device, NumPy on a tensor of the GPU. It is blind
to kernels, CUDA's own lists of autocast, streams, memory and NCCL.

>>> with pretend_gpu() as gpu:
...     total = torch.ones(3).to("cuda").sum()
...     _ = total.item()
>>> [len(x) for x in (gpu.launches, gpu.copies, gpu.waits)]
[1, 1, 2]
>>> gpu.waits[1].split(" at ")[0], devices(total)
('_local_scalar_dense', {'cuda'})
"""

import sys
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, is_dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

SMALL = 2**16  # bytes: up to here a copy from pageable memory, asked not to wait, returns at once
READS = {  # operations whose result, or its size, the CPU has to know
    *("_local_scalar_dense", "equal", "nonzero", "masked_select", "is_nonzero", "bincount"),
    *("_unique2", "unique_dim", "unique_consecutive", "repeat_interleave", "_linalg_check_errors"),
}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
MEMORY = ("empty", "new_empty", "_unsafe_view", "set_")  # no kernel is launched for these
HOST = {"cpu", "pinned"}  # places
ROOTS = tuple(f"{Path(__file__).parents[1] / name}/" for name in ("mimrefiner", "tests"))

_PLACES: dict[int, str] = {}  # memory -> "cuda", "pinned", "any" (scratch that fits both) or "cpu"


def place(x: Tensor) -> str:
    """Where the memory of ``x`` counts as lying."""
    return _PLACES.get(x.untyped_storage()._cdata, "cpu")


def put(x: Tensor, where: str) -> Tensor:
    """``x``, its memory marked as lying ``where``."""
    storage = x.untyped_storage()
    if storage._cdata not in _PLACES:
        weakref.finalize(storage, _PLACES.pop, storage._cdata, None)
    _PLACES[storage._cdata] = where
    return x


def devices(x) -> set[str]:
    """Where the tensors of ``x`` lie: a tensor, module, dataclass, dictionary, list or tuple."""
    if isinstance(x, nn.Module):
        return devices([*x.parameters(), *x.buffers()])
    if is_dataclass(x):
        return devices(list(vars(x).values()))
    if isinstance(x, (dict, list, tuple)):
        return set().union(*map(devices, x.values() if isinstance(x, dict) else x))
    return {"cuda" if place(x) == "cuda" else "cpu"} if isinstance(x, Tensor) else set()


@dataclass
class Step:
    """What was asked of the GPU, each as "what at file:line": launches, copies to it, waits."""

    launches: list[str] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)


@dataclass
class PretendGpu:
    """What has been seen so far.

    Attributes:
        steps: one up to the end of every optimiser step, and one for what came behind the last.
        rng: state of the GPU's generator, as torch.cuda.get_rng_state gives it.
        peak: what torch.cuda.max_memory_allocated gives, until it is reset to 0.
    """

    steps: list[Step] = field(default_factory=lambda: [Step()])
    rng: Tensor = field(default_factory=lambda: torch.zeros(16, dtype=torch.uint8))
    peak: int = 0

    launches = property(lambda self: [x for step in self.steps for x in step.launches])
    copies = property(lambda self: [x for step in self.steps for x in step.copies])
    waits = property(lambda self: [x for step in self.steps for x in step.waits])

    def note(self, kind: str, what: str) -> None:
        """Add ``what`` to the ``kind`` ("launches", "copies", "waits") of the step at hand."""
        getattr(self.steps[-1], kind).append(f"{what} at {_site()}")

    def copied(self, x: Tensor, non_blocking: bool) -> None:
        """Note a copy of ``x`` to the GPU, and whether the CPU waits for it."""
        size = x.numel() * x.element_size()
        self.note("copies", f"{size} bytes")
        if not non_blocking:
            self.note("waits", "blocking copy to the GPU")
        elif place(x) != "pinned" and size > SMALL:
            self.note("waits", f"copy of {size} pageable bytes to the GPU")


@contextmanager
def pretend_gpu(*, bfloat16: bool = True, memory: int = 24 * 2**30) -> Iterator[PretendGpu]:
    """Within it torch has a GPU with ``memory`` bytes, whose kernels know ``bfloat16`` or not."""
    gpu, autocast = PretendGpu(), torch.autocast
    kernels = _Kernels(gpu)
    hook = register_optimizer_step_post_hook(lambda *_: gpu.steps.append(Step()))
    with ExitStack() as stack:
        stack.callback(hook.remove)
        stack.enter_context(patch.multiple(torch.cuda, **_answers(gpu, bfloat16, memory)))
        if hasattr(torch, "accelerator"):  # since torch 2.6; loaders and optimisers ask it
            stack.enter_context(patch.multiple(torch.accelerator, **_ACCELERATOR))
        # Of the class: loaders pin in threads, which have no modes
        stack.enter_context(patch.object(Tensor, "pin_memory", _pinned))
        stack.enter_context(
            patch.object(torch, "autocast", lambda _, *how, **more: autocast("cpu", *how, **more))
        )
        stack.enter_context(kernels)
        stack.enter_context(_Calls(gpu, kernels))
        yield gpu


def _answers(gpu: PretendGpu, bfloat16: bool, memory: int) -> dict:
    """What the functions of torch.cuda do instead."""
    name = "pretend GPU"
    card = SimpleNamespace(name=name, total_memory=memory, major=9 if bfloat16 else 7, minor=0)
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda *_: name,
        "get_device_properties": lambda *_: card,
        "get_device_capability": lambda *_: (card.major, card.minor),
        "is_bf16_supported": lambda including_emulation=True: bfloat16 or including_emulation,
        "is_current_stream_capturing": lambda: False,
        "mem_get_info": lambda *_: (memory, memory),
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: gpu.peak,
        "reset_peak_memory_stats": lambda *_: setattr(gpu, "peak", 0),
        "empty_cache": lambda: None,
        "synchronize": lambda *_: gpu.note("waits", "synchronize"),
        "get_rng_state": lambda *_: gpu.rng.clone(),
        "set_rng_state": lambda state, *_: setattr(gpu, "rng", state.clone()),
        "manual_seed_all": lambda seed: setattr(gpu, "rng", _state(seed)),
        "manual_seed": lambda seed: setattr(gpu, "rng", _state(seed)),
    }


_ACCELERATOR = {
    "is_available": lambda: True,
    "current_accelerator": lambda check_available=False: torch.device("cuda"),
    "current_device_index": lambda: 0,
    "current_stream": lambda *_: SimpleNamespace(is_capturing=lambda: False),
    "set_device_index": lambda *_: None,
}


class _Kernels(TorchDispatchMode):
    """Every operation: notes it, refuses what CUDA refuses, marks what comes out."""

    def __init__(self, gpu: PretendGpu):
        super().__init__()
        self.gpu, self.new = gpu, None  # where operations without tensors make theirs

    def __torch_dispatch__(self, op, kinds, args=(), kwargs=None):
        kwargs, name = kwargs or {}, op.name().removeprefix("aten::").split(".")[0]
        with torch._C.DisableTorchFunction():
            ins = _tensors((args, kwargs))
            there = {place(x) for x in ins}
            if name == "copy_":
                self._copy(*args[:2], kwargs.get("non_blocking", args[2:3] == (True,)))
            elif "cuda" in there:
                self._check(name, args, ins)
                self._generators(kwargs)
            out = op(*args, **kwargs)
            if name == "copy_":
                return out
            new = self.new or ("any" if torch._C._current_graph_task_id() >= 0 else "cpu")
            where = "cuda" if "cuda" in there else "cpu" if there & HOST else "any" if ins else new
            if where != "cpu":
                for x in _tensors(out):
                    put(x, where)
            if where == "cuda" and name not in READS and _launches(op, name):
                self.gpu.note("launches", name)
        return out

    def _copy(self, to: Tensor, x: Tensor, non_blocking: bool) -> None:
        if place(to) == "any":
            put(to, place(x))
        elif place(to) == "cuda" and place(x) in HOST:
            self.gpu.copied(x, non_blocking)
        elif place(to) == "cuda":
            self.gpu.note("launches", "copy_")
        elif place(x) == "cuda":
            self.gpu.note("waits", "copy to the CPU")

    def _check(self, name: str, args: tuple, ins: list[Tensor]) -> None:
        if name in READS:
            self.gpu.note("waits", name)
        host = [x for x in ins if place(x) in HOST]
        if name in INDEXED:
            # A number is put behind a mask by masked_fill
            number = len(args) > 2 and args[2].numel() == 1 and place(args[2]) != "cuda"
            for x in _tensors(args[1]):
                if place(x) in HOST:
                    self.gpu.copied(x, non_blocking=False)
                elif x.dtype in (torch.bool, torch.uint8) and not number:
                    self.gpu.note("waits", "boolean mask")
            host = [x for x in host if not any(x is y for y in args[1])]
        written = name.endswith("_") and any(x is ins[0] for x in host)
        if written or any(x.ndim or name in ("cat", "stack") for x in host):  # else a number
            _refuse(f"{name}: tensors on cuda:0 and cpu")

    def _generators(self, kwargs: dict) -> None:
        if getattr(kwargs.get("generator"), "device", None) == torch.device("cpu"):
            _refuse("expected a generator of cuda, found one of cpu")


class _Calls(TorchFunctionMode):
    """What the code says: ``x.device``, ``x.to(...)``, ``device=...``."""

    def __init__(self, gpu: PretendGpu, kernels: _Kernels):
        super().__init__()
        self.gpu, self.kernels = gpu, kernels

    def __torch_function__(self, f, kinds, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(f, "__name__", "")
        x = args[0] if args and isinstance(args[0], Tensor) else None
        if name == "__get__":
            return _PROPERTIES[f] if f in _PROPERTIES and place(x) == "cuda" else f(*args)
        if x is not None and name in ("to", "cuda", "cpu"):
            return self._to(x, *args[1:], **kwargs) if name == "to" else self._to(x, name, **kwargs)
        if x is not None and name == "is_pinned":
            return place(x) == "pinned"
        if x is not None and place(x) == "cuda":
            if name in ("numpy", "__array__"):
                raise TypeError(f"can't convert a tensor of cuda:0 to numpy, at {_site()}")
            if name == "tolist":
                self.gpu.note("waits", "tolist")
            if name == "__deepcopy__":  # torch's own copies memory, byte by byte
                new = x.detach().clone().requires_grad_(x.requires_grad)
                return args[1].setdefault(id(x), put(new, "cuda"))
        given = kwargs.get("device")
        kind = None if given is None else torch.device(given).type
        if kind == "cuda":
            self.kernels._generators(kwargs)
            kwargs["device"] = "cpu"
            if name in ("tensor", "as_tensor", "asarray"):
                return self._to(f(*args, **kwargs), "cuda")
        elif any(place(t) == "cuda" for t in _tensors((args, kwargs))):
            kind = kind or "any"
        before, self.kernels.new = self.kernels.new, kind
        try:
            out = f(*args, **kwargs)
        finally:
            self.kernels.new = before
        if given is not None and kind in ("cpu", "cuda"):
            for t in _tensors(out):
                put(t, kind)
        return out

    def _to(self, x: Tensor, *args, copy: bool = False, **kwargs) -> Tensor:
        if args and isinstance(args[0], Tensor):
            args = (torch.device(place(args[0]).replace("pinned", "cpu")), args[0].dtype, *args[1:])
        device, dtype, non_blocking, form = torch._C._nn._parse_to(*args, **kwargs)
        here = "cpu" if place(x) in HOST else place(x)
        to = here if device is None or here == "any" else device.type
        how = {} if form is None else {"memory_format": form}
        if to == "meta" or here == to:
            return Tensor.to(
                x, *([device] if to == "meta" else []), dtype or x.dtype, copy=copy, **how
            )
        if to == "cuda":
            self.gpu.copied(x, non_blocking)
        else:
            self.gpu.note("waits", "copy to the CPU")
        return put(Tensor.to(x, dtype or x.dtype, **how | {"copy": True}), to)


_PROPERTIES = {
    Tensor.device.__get__: torch.device("cuda", 0),
    Tensor.is_cuda.__get__: True,
    Tensor.is_cpu.__get__: False,
}


def _tensors(x) -> list[Tensor]:
    """The tensors in nested tuples, lists and dictionaries (pytrees know more, and are slow)."""
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, (tuple, list, dict)):
        return [t for part in (x.values() if isinstance(x, dict) else x) for t in _tensors(part)]
    return []


@cache
def _launches(op, name: str) -> bool:
    """Whether ``op`` starts a kernel: views and new memory do not."""
    alias = op._schema.returns[0].alias_info if op._schema.returns else None
    return not (alias is not None and not alias.is_write) and not name.startswith(MEMORY)


def _pinned(x: Tensor, *_) -> Tensor:
    if place(x) == "cuda":
        _refuse("only memory of the CPU can be pinned")
    return put(x.clone(), "pinned")


def _state(seed: int) -> Tensor:
    return torch.tensor([*int(seed % 2**64).to_bytes(8, "little"), *bytes(8)], dtype=torch.uint8)


def _site() -> str:
    """The innermost line of the package or of the tests that is at work."""
    frame = sys._getframe(1)
    while frame and not _short(frame.f_code.co_filename):
        frame = frame.f_back
    return f"{_short(frame.f_code.co_filename)}:{frame.f_lineno}" if frame else "?"


@cache
def _short(file: str) -> str:
    """``folder/file.py`` of the package and the tests, "" elsewhere and here."""
    return "/".join(Path(file).parts[-2:]) if file.startswith(ROOTS) and file != __file__ else ""


def _refuse(why: str) -> None:
    raise RuntimeError(f"{why}, at {_site()}")
