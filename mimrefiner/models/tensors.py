"""Tensors in files: written whole or not at all, read without running any code."""

import io
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from mimrefiner.errors import InputError
from mimrefiner.files import atomic_file
from mimrefiner.models.pickles import allowed, is_pickle, readable, what_it_is

LONGEST_HEADER = 100_000_000  # bytes, by the definition of safetensors


def write_safetensors(
    tensors: dict[str, Tensor], path: Path | str, metadata: dict[str, str]
) -> None:
    """Write a safetensors file whole or not at all; a full disk is an OSError."""
    with atomic_file(path) as temporary:
        try:
            safetensors.torch.save_file(tensors, temporary, metadata)
        except safetensors.SafetensorError as error:
            raise OSError(f"{path} could not be written: {error}") from error


def read_checkpoint(path: Path) -> dict:
    """What a published checkpoint holds, without running any of its code.

    safetensors, or PyTorch's format under ``weights_only=True``. Settings that authors stored
    beside the weights (argparse, omegaconf, fairseq) become inert stand-ins; any other class is
    refused. Pickles of every protocol are read. Tensors stay on disk until they are used,
    where the format allows it.

    Raises:
        InputError: a damaged file, or one that refers to code.
    """
    if is_safetensors(path):
        with damage_named(path):
            return safetensors.torch.load_file(path)
    try:
        source = readable(path)
        if source is path and path.suffix == ".safetensors":  # torch.load goes by such a name
            source = io.BytesIO(path.read_bytes())
        mapped = source is path and zipfile.is_zipfile(path)
        with (
            torch.serialization.safe_globals(allowed(source)),
            warnings.catch_warnings(action="ignore"),
        ):
            file = torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    except UNREADABLE as error:
        raise InputError(
            f"{path} was not loaded: {_why(path, error)}; expected a file of plain tensors"
        ) from error
    if not isinstance(file, dict):
        raise InputError(f"{path} holds a {type(file).__name__}; expected a dictionary of tensors")
    return file


def _why(path: Path, error: Exception) -> str:
    """Why a checkpoint was not read: code that it refers to, or what the file is."""
    if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
        refused = f"it refers to {found[1]}, which is refused because loading would run it"
        whole = " (a whole model? save its state_dict())" if "GLOBAL timm." in str(error) else ""
        return refused + whole
    if what := what_it_is(path):
        return what
    if is_pickle(path) and ("Unsupported operand" in str(error) or "persistent" in str(error)):
        return (
            "its pickle has what weights_only does not read: where you trust it, write it anew by "
            "torch.save(torch.load(FILE, weights_only=False), NEW)"
        )
    return "damaged or no checkpoint"


# What torch.load raises for a file that it refuses, or that is no checkpoint
UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    KeyError,
    AttributeError,
    TypeError,
)


def read_metadata(path: Path) -> dict[str, str]:
    """Metadata of a safetensors file; none of any other file."""
    if not is_safetensors(path):
        return {}
    with damage_named(path), safetensors.safe_open(path, "pt") as file:
        return file.metadata() or {}


def check_numbers(tensors: Mapping[str, Tensor], path: Path | str) -> None:
    """Raise InputError where weights are no real numbers, such as int8 without its scales."""
    for name, x in tensors.items():
        if not x.is_floating_point() or x.layout != torch.strided:
            kind = "sparse" if x.layout != torch.strided else str(x.dtype).removeprefix("torch.")
            raise InputError(
                f"{path}: {name} is {kind}, expected plain floating point numbers: write the "
                "weights anew as float32 or bfloat16 (quantised ones multiplied by their scales)"
            )


def is_safetensors(path: Path) -> bool:
    """Whether a file is of this format, whatever its name ends in.

    >>> from tempfile import mkdtemp
    >>> file = Path(mkdtemp()) / "model.pth"
    >>> write_safetensors({"x": torch.zeros(2)}, file, {})
    >>> is_safetensors(file)
    True
    """
    with path.open("rb") as stream:
        head = stream.read(9)
    if head[8:] == b"{" and int.from_bytes(head[:8], "little") <= LONGEST_HEADER:
        return True
    # A damaged one is still told from what torch.save writes
    return path.suffix.lower() == ".safetensors" and head[:1] != b"\x80" and head[:2] != b"PK"


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Within it, an error of safetensors becomes one line that names the file."""
    try:
        yield
    except safetensors.SafetensorError as error:
        raise InputError(f"{path} is damaged or no safetensors file: {error}") from error
