"""Files that are whole or absent, and loading that runs no code."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import nn

from mimrefiner.config import ViTConfig
from mimrefiner.errors import InputError


@contextmanager
def atomic_file(path: Path | str) -> Iterator[Path]:
    """A temporary path beside ``path``, renamed to it when the block ends well and removed when it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)  # keeps the file type
    os.close(handle)
    try:
        yield Path(temporary)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def save_encoder(encoder: nn.Module, path: Path | str) -> None:
    """Write ``encoder`` as safetensors with what :func:`mimrefiner.load_encoder` needs to build it again."""
    cfg = encoder.pretrained_cfg
    metadata = {
        "format": "mimrefiner-encoder-1",
        "architecture": cfg["architecture"],
        "vit": json.dumps(cfg.get("vit") or asdict(vit_config(encoder))),
        "data": json.dumps({key: cfg[key] for key in ("mean", "std", "interpolation", "crop_pct")}),
    }
    tensors = {name: x.detach().cpu().contiguous() for name, x in encoder.state_dict().items()}
    with atomic_file(path) as temporary:
        try:
            safetensors.torch.save_file(tensors, temporary, metadata)
        except safetensors.SafetensorError as error:  # its word for a full disk
            raise OSError(f"could not write {path}: {error}") from error


def sha256_of(encoder: nn.Module) -> str:
    """Hash of an encoder's weights: names, shapes and bytes in order."""
    digest = hashlib.sha256()
    for name, x in sorted(encoder.state_dict().items()):
        digest.update(f"{name}{tuple(x.shape)}".encode())
        digest.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def is_own_file(path: Path) -> bool:
    """Whether this package wrote ``path``; a damaged .safetensors file counts as its own, so that it is called damaged."""
    if path.suffix != ".safetensors":
        return False
    try:
        with safetensors.safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("format") == "mimrefiner-encoder-1"
    except safetensors.SafetensorError:
        return True


def read_encoder_file(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a file written by :func:`save_encoder`."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != "mimrefiner-encoder-1":
                raise InputError(f"{path} is not an encoder that mimrefiner wrote (metadata {sorted(metadata)})")
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
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
