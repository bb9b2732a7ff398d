"""Weights in files: written whole or not at all, read without running any code."""

import hashlib
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from mimrefiner.config import ViTConfig
from mimrefiner.errors import InputError
from mimrefiner.files import atomic_file
from mimrefiner.models.layouts import ReleasedViT
from mimrefiner.models.pickles import allowed, is_pickle, readable, what_it_is


def save_encoder(encoder: nn.Module, path: Path | str) -> None:
    """Write ``encoder`` as safetensors, so that :func:`mimrefiner.load_encoder` can rebuild it."""
    cfg = encoder.pretrained_cfg
    metadata = {
        "format": "mimrefiner-encoder-1",
        "architecture": cfg["architecture"],
        "vit": json.dumps(asdict(vit_config(encoder))),
        "released": json.dumps(asdict(encoder.shape)) if isinstance(encoder, ReleasedViT) else "",
        "arguments": json.dumps(cfg.get("model_args", {})),
        "data": json.dumps({key: cfg[key] for key in ("mean", "std", "interpolation", "crop_pct")}),
    }
    tensors = {name: x.detach().cpu().contiguous() for name, x in encoder.state_dict().items()}
    write_safetensors(tensors, path, metadata)


def write_safetensors(
    tensors: dict[str, torch.Tensor], path: Path | str, metadata: dict[str, str]
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
    if path.suffix == ".safetensors":
        with _damage_named(path):
            return safetensors.torch.load_file(path)
    try:
        source = readable(path)
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


def sha256_of(encoder: nn.Module) -> str:
    """SHA-256 of an encoder's weights: names, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, x in sorted(encoder.state_dict().items()):
        digest.update(f"{name}{tuple(x.shape)}".encode())
        digest.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_metadata(path: Path) -> dict[str, str]:
    """Metadata of a safetensors file; none of any other file."""
    if path.suffix != ".safetensors":
        return {}
    with _damage_named(path), safetensors.safe_open(path, "pt") as file:
        return file.metadata() or {}


def is_own_file(path: Path) -> bool:
    """Whether this package wrote ``path`` in its own format."""
    return read_metadata(path).get("format") == "mimrefiner-encoder-1"


def read_encoder_file(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a file written by :func:`save_encoder`."""
    with _damage_named(path), safetensors.safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, file.metadata()


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except safetensors.SafetensorError as error:
        raise InputError(f"{path} is damaged or no safetensors file: {error}") from error


def vit_config(encoder: nn.Module) -> ViTConfig:
    """The sizes of a timm ViT."""
    return ViTConfig(
        image_size=encoder.patch_embed.img_size[0],
        patch_size=encoder.patch_embed.patch_size[0],
        dim=encoder.embed_dim,
        depth=len(encoder.blocks),
        num_heads=encoder.blocks[0].attn.num_heads,
    )
