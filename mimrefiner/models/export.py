"""Encoders as files in any precision: for timm, for the official hub code, for this package."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from mimrefiner.errors import InputError, one_of
from mimrefiner.files import atomic_file, write_json
from mimrefiner.models.from_timm import INPUT
from mimrefiner.models.keys import HEADS
from mimrefiner.models.layouts import BLOCK_KEYS, ReleasedViT
from mimrefiner.models.tensors import write_safetensors
from mimrefiner.models.tokens import input_size, settings_of
from mimrefiner.models.weights import ANY_SIZE, parts_difference, save_encoder
from mimrefiner.models.wrappers import unwrapped

FORMATS = {  # name -> suffixes
    "timm": (".safetensors",),
    "hub": (".th", ".pth", ".pt"),
    "mimrefiner": (".safetensors",),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export(
    encoder: nn.Module, path: Path | str, format: str = "timm", dtype: str | None = None
) -> str:
    """Write ``encoder`` to a file, and say how to load it.

    Args:
        encoder: a plain ViT.
        path: the file.
        format: "timm" writes a safetensors file, and beside it a ``.json`` with the model's
            arguments and ``pretrained_cfg``, for ``timm.create_model("vit_base_patch16_224",
            pretrained=True, pretrained_cfg_overlay=dict(file=...), **model_args)``. "hub" writes a
            ``.th`` file with the names of the official ``hub/`` files under ``state_dict``.
            "mimrefiner" writes a safetensors file for :func:`mimrefiner.load_encoder`.
        dtype: converts the weights, a name in DTYPES; None keeps them as they are.

    Raises:
        InputError: an unknown format or dtype, a suffix of another format, or a model that the
            format cannot express.
    """
    path, encoder = Path(path), unwrapped(encoder)
    one_of("format", format, tuple(FORMATS))
    # load_encoder goes by the suffix, and timm's .json lies beside
    if path.suffix not in FORMATS[format] or path.is_dir():
        raise InputError(
            f"format {format} is a file that ends in {' or '.join(FORMATS[format])}, got {path}"
        )
    if dtype is not None:
        one_of("dtype", dtype, tuple(DTYPES))
        encoder = copy.deepcopy(encoder).to(DTYPES[dtype])
    if format == "mimrefiner":
        save_encoder(encoder, path)
        return f"mimrefiner.load_encoder({path.name!r})"
    if format == "hub":
        tensors = plain_tensors(encoder)
        _check_same(_official(encoder, tensors), encoder)
        tensors = hub_tensors(encoder, tensors)
        with atomic_file(path) as temporary:
            torch.save({"state_dict": tensors}, temporary)
        return (
            f"torch.load({path.name!r}, weights_only=True)['state_dict'] fits "
            "the models of ml-jku/MIM-Refiner's hub"
        )
    _write_for_timm(encoder, path)
    return (
        f"timm.create_model({ANY_SIZE!r}, pretrained=True, ...) "
        f"with the arguments in {path.stem}.json"
    )


def _write_for_timm(encoder: nn.Module, path: Path) -> None:
    tensors = plain_tensors(encoder)
    if isinstance(encoder.norm_pre, nn.LayerNorm):
        raise InputError(
            "timm has no post-norm ViT with a norm before the blocks: "
            "load this model with mimrefiner.load_encoder"
        )
    arguments = timm_arguments(encoder, tensors)
    with torch.device("meta"):
        _check_same(timm.create_model(ANY_SIZE, **arguments), encoder)
    if "cls_token" in tensors and tensors["pos_embed"].shape[1] == encoder.patch_embed.num_patches:
        zero = torch.zeros_like(tensors["pos_embed"][:, :1])  # timm wants a row for the cls token
        tensors["pos_embed"] = torch.cat([zero, tensors["pos_embed"]], 1)
    data = timm.data.resolve_data_config(pretrained_cfg=settings_of(encoder))
    cfg = {key: data[key] for key in INPUT}
    # load_encoder reads the metadata, timm the file beside
    metadata = {"format": "pt", "mimrefiner": json.dumps(cfg)}
    write_safetensors({name: x.contiguous() for name, x in tensors.items()}, path, metadata)
    size = input_size(encoder)
    description = {
        "architecture": ANY_SIZE,
        "model_args": arguments,
        "pretrained_cfg": {**cfg, "input_size": size, "num_classes": 0, "file": path.name},
    }
    write_json(description, path.with_suffix(".json"))


def _official(encoder: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """What the official code builds in these sizes, without memory."""
    with torch.device("meta"):
        if isinstance(encoder, ReleasedViT):
            return ReleasedViT(replace(encoder.shape, norm_eps=1e-6))
        return timm.create_model(ANY_SIZE, **timm_arguments(encoder, tensors))


def _check_same(again: nn.Module, encoder: nn.Module) -> None:
    """InputError where what others build would compute something else, such as with another eps."""
    if different := parts_difference(again, encoder, below=True):
        raise InputError(
            f"this format cannot express the model, since {different}: format mimrefiner keeps "
            "what load_encoder read"
        )


def plain_tensors(encoder: nn.Module) -> dict[str, Tensor]:
    """Weights of a plain ViT by their timm names; InputError names what it has beyond one."""
    tensors = {
        name: x.detach().cpu()
        for name, x in encoder.state_dict().items()
        if not HEADS.match(name) or name.startswith("fc_norm")
    }
    own = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    own |= {f"blocks.{i}.{key}" for i in range(len(encoder.blocks)) for key in BLOCK_KEYS}
    own |= {f"{norm}.{kind}" for norm in ("norm", "norm_pre") for kind in ("weight", "bias")}
    more = sorted(tensors.keys() - own)
    if more or not {"pos_embed", "patch_embed.proj.weight"} <= tensors.keys():
        raise InputError(
            "only plain ViTs can be exported; "
            f"this model has {', '.join(more[:4]) or 'no pos_embed'}"
        )
    return tensors


def timm_arguments(encoder: nn.Module, tensors: dict[str, Tensor]) -> dict:
    """Arguments with which timm builds this ViT."""
    cls = "cls_token" in tensors
    return {
        "img_size": encoder.patch_embed.img_size[0],
        "patch_size": encoder.patch_embed.patch_size[0],
        "embed_dim": encoder.embed_dim,
        "depth": len(encoder.blocks),
        "num_heads": encoder.blocks[0].attn.num_heads,
        "mlp_ratio": tensors["blocks.0.mlp.fc1.weight"].shape[0] / encoder.embed_dim,
        "class_token": cls,
        "no_embed_class": False,
        "final_norm": "norm.weight" in tensors,
        "fc_norm": False,
        "global_pool": "token" if cls else "avg",
        "num_classes": 0,
        "dynamic_img_size": True,
    }


def hub_tensors(encoder: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights by the names of the official hub files.

    A position of the cls token is added to the token.
    """
    grid = encoder.patch_embed.grid_size
    if "cls_token" not in tensors or not ({"norm.weight", "norm_pre.weight"} & tensors.keys()):
        raise InputError("the hub layout needs a cls token and a final or an embedding norm")
    positions, cls = tensors.pop("pos_embed"), tensors.pop("cls_token")
    if positions.shape[1] == 1 + grid[0] * grid[1]:
        cls, positions = cls + positions[:, :1], positions[:, 1:]
    tensors = {name.replace("norm_pre", "embed_norm"): x for name, x in tensors.items()}
    return {**tensors, "pos_embed.embed": positions.unflatten(1, grid), "cls_tokens.tokens": cls}
