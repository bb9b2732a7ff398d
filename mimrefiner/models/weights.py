"""Weights in files: written whole or not at all, read without running any code."""

import hashlib
import io
import json
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import product
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from mimrefiner.config import ViTConfig
from mimrefiner.errors import InputError
from mimrefiner.files import atomic_file
from mimrefiner.models.layouts import ReleasedViT


def save_encoder(encoder: nn.Module, path: Path | str) -> None:
    """Write ``encoder`` as safetensors, so that :func:`mimrefiner.load_encoder` can rebuild it."""
    cfg = encoder.pretrained_cfg
    metadata = {
        "format": "mimrefiner-encoder-1",
        "architecture": cfg["architecture"],
        "vit": json.dumps(asdict(vit_config(encoder))),
        "released": json.dumps(asdict(encoder.shape)) if isinstance(encoder, ReleasedViT) else "",
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
    refused. Tensors stay on disk until they are used, where the format allows it.

    Raises:
        InputError: a damaged file, or one that refers to code.
    """
    if path.suffix == ".safetensors":
        with _damage_named(path):
            return safetensors.torch.load_file(path)
    zipped = zipfile.is_zipfile(path)
    try:
        with (
            torch.serialization.safe_globals(_stand_ins(path)),
            warnings.catch_warnings(action="ignore"),
        ):
            file = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except UNREADABLE as error:
        why = "damaged or no checkpoint"
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            why = f"it refers to {found[1]}, which is refused because loading would run it"
        raise InputError(
            f"{path} was not loaded: {why}; expected a file of plain tensors"
        ) from error
    if not isinstance(file, dict):
        raise InputError(f"{path} holds a {type(file).__name__}; expected a dictionary of tensors")
    return file


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
SETTINGS = re.compile(r"(argparse|omegaconf|fairseq|typing|pathlib)(\.|$)")
PLAIN = {
    ("collections", "defaultdict"),
    *product(("builtins", "__builtin__"), ("dict", "list", "tuple", "int", "float", "str", "bool")),
}


class _Inert:
    """Takes the place of a class that a checkpoint names: whatever it is given, nothing happens."""

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setitem__(self, key, value):
        pass

    def __setstate__(self, state):
        pass


def _stand_ins(path: Path) -> list[type]:
    """Stand-ins for the settings classes that the pickle in ``path`` names; nothing is imported."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("data.pkl")]
            streams = [io.BytesIO(archive.read(name)) for name in names]
    else:
        # Older files: several pickles one after another, the fourth holds the checkpoint
        streams = [path.open("rb")]
    found = set()
    for stream in streams:
        with stream, suppress(ValueError):  # no pickle: torch.load says so
            for _ in range(4):
                found |= {
                    arg for opcode, arg, _ in pickletools.genops(stream) if opcode.name == "GLOBAL"
                }
    classes = [tuple(name.split(" ")) for name in sorted(found)]
    return [_stand_in(*name) for name in classes if SETTINGS.match(name[0]) or name in PLAIN]


def _stand_in(module: str, name: str) -> type:
    module = module.replace("__builtin__", "builtins")
    return type(name, (_Inert,), {"__module__": module, "__qualname__": name})


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
