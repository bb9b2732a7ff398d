"""Published checkpoints: one filter per key layout, and the ViT that the tensors' shapes describe.

A filter takes a file's tensors by name and returns them under timm's names. Nothing is guessed: a key that no filter knows, or one
that is missing, is an error that names it. Files are read without running code from them.
"""

import argparse
import pickle
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import safetensors
import safetensors.torch
import timm
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mimrefiner.errors import InputError

# Attention heads can not be read off the shapes; these are the published sizes, by (width, depth).
HEADS = {(192, 12): 3, (384, 12): 6, (768, 12): 12, (1024, 24): 16, (1280, 32): 16, (2560, 24): 32}


class PostNormBlock(Block):
    """A block that normalises after each residual sum (data2vec 2.0): x = norm1(x + attn(x)); x = norm2(x + mlp(x))."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        x = self.norm1(x + self.drop_path1(self.ls1(self.attn(x, attn_mask=attn_mask))))
        return self.norm2(x + self.drop_path2(self.ls2(self.mlp(x))))


@dataclass(frozen=True)
class PlainViT:
    """A ViT as published checkpoints have it; ``cls_position``: the cls token has a position embedding."""

    image_size: int
    patch_size: int
    dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    cls_token: bool = True
    cls_position: bool = True
    post_norm: bool = False

    def build(self) -> nn.Module:
        """A timm VisionTransformer; post-norm ones have a norm before the first block and none behind the last."""
        norm = partial(nn.LayerNorm, eps=1e-6)
        encoder = timm.models.VisionTransformer(
            img_size=self.image_size, patch_size=self.patch_size, embed_dim=self.dim, depth=self.depth, num_heads=self.num_heads,
            mlp_ratio=self.mlp_ratio, num_classes=0, global_pool="token" if self.cls_token else "avg", class_token=self.cls_token,
            no_embed_class=self.cls_token and not self.cls_position, dynamic_img_size=True, norm_layer=norm, fc_norm=False,
            final_norm=not self.post_norm, block_fn=PostNormBlock if self.post_norm else Block,
        )  # fmt: skip
        if self.post_norm:
            encoder.norm_pre = norm(self.dim)
        encoder.pretrained_cfg = {
            "architecture": "plain_vit", "vit": asdict(self), "input_size": (3, self.image_size, self.image_size),
            "mean": timm.data.IMAGENET_DEFAULT_MEAN, "std": timm.data.IMAGENET_DEFAULT_STD, "interpolation": "bicubic",
            "crop_pct": 224 / 256, "crop_mode": "center",
        }  # fmt: skip
        return encoder.eval()


@dataclass(frozen=True)
class Layout:
    """``mark``: a key that only this layout has; ``to_timm``: its filter; ``name`` is what errors call it."""

    name: str
    mark: str
    to_timm: Callable[[dict[str, Tensor]], dict[str, Tensor]]


def load_published(path: Path, *, num_heads: int | None = None) -> nn.Module:
    """The encoder in a published checkpoint.

    Args:
        path: MIM-Refiner's hub files, fairseq's data2vec 2.0, or a ViT under MAE's names (MAE, CrossMAE, DINO, iBOT, Mugs, I-JEPA:
            with or without decoder, heads and the usual prefixes).
        num_heads: attention heads; None takes that of the published size with this width and depth.

    Raises:
        InputError: a file that is no checkpoint, would run code, or has keys that fit no layout.
    """
    tensors = read_tensors(path)
    layout = find_layout(tensors, path)
    state = layout.to_timm(tensors)
    spec = describe(state, path, num_heads)
    encoder = spec.build()
    missing, unexpected = encoder.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise InputError(
            f"{path} looks like {layout.name}, but {_list('is missing', missing)}{_list('has in addition', unexpected)}"
        )
    return encoder


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The named tensors of a .safetensors file or of the model inside a torch file, on the CPU."""
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals(_stand_ins()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except safetensors.SafetensorError as error:
        raise InputError(f"{path} is damaged or no safetensors file: {error}") from error
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path} holds more than tensors and is not loaded, as it might run code: {reason}") from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise InputError(f"{path} is damaged or no checkpoint: {str(error).splitlines()[0]}") from error
    while isinstance(content, dict) and not any(isinstance(value, Tensor) for value in content.values()):
        inner = [content[key] for key in ("state_dict", "model", "teacher", "target_encoder", "encoder") if key in content]
        if not inner:
            raise InputError(f"{path} holds no model: it has {', '.join(map(str, list(content)[:8]))}")
        content = inner[0]
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, expected named tensors")
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def find_layout(tensors: dict[str, Tensor], path: Path) -> Layout:
    """The layout whose mark is among the keys."""
    for layout in LAYOUTS:
        if any(name.endswith(layout.mark) for name in tensors):
            return layout
    names = ", ".join(list(tensors)[:6])
    raise InputError(f"{path} is of no known layout ({', '.join(x.name for x in LAYOUTS)}): its keys begin with {names}")


def describe(state: dict[str, Tensor], path: Path, num_heads: int | None) -> PlainViT:
    """What the shapes of timm-named tensors say."""
    try:
        dim, _, patch, _ = state["patch_embed.proj.weight"].shape
        depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
        hidden, positions = state["blocks.0.mlp.fc1.weight"].shape[0], state["pos_embed"].shape[1]
    except (KeyError, ValueError) as error:
        raise InputError(f"{path} holds no ViT: {error} is missing") from error
    cls_token = "cls_token" in state
    side = int(positions**0.5)
    heads = num_heads or HEADS.get((dim, depth))
    if heads is None:
        raise InputError(f"{path}: a ViT of width {dim} and depth {depth} is no published size: give num_heads")
    if dim % heads:
        raise InputError(f"{path}: width {dim} is not divisible by {heads} attention heads")
    return PlainViT(
        side * patch, patch, dim, depth, heads, hidden / dim, cls_token,
        cls_position=cls_token and side * side != positions, post_norm="norm_pre.weight" in state,
    )  # fmt: skip


def from_hub(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """MIM-Refiner's released files: positions (1, rows, columns, dim) without one for cls; post-norm ones have ``embed_norm``."""
    names = {"cls_tokens.tokens": "cls_token", "pos_embed.embed": "pos_embed"}
    state = {names.get(name, name.replace("embed_norm.", "norm_pre.")): value for name, value in tensors.items()}
    state["pos_embed"] = state["pos_embed"].flatten(1, 2)
    return state


def from_fairseq(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """data2vec 2.0 (fairseq): post-norm blocks; the decoder and the moving average are left out."""
    image = "modality_encoders.IMAGE."
    names = {
        f"{image}local_encoder.proj.": "patch_embed.proj.", f"{image}extra_tokens": "cls_token",
        f"{image}fixed_positional_encoder.positions": "pos_embed", f"{image}context_encoder.norm.": "norm_pre.",
    }  # fmt: skip
    state = {}
    for name, value in tensors.items():
        name = name.removeprefix("model.")
        if name.startswith(("_ema", f"{image}decoder")):
            continue
        for old, new in names.items():
            if name.startswith(old):
                name = new + name[len(old) :]
        state[name] = value
    return state


def from_mae(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """MAE's names, which DINO, iBOT, Mugs, I-JEPA and CrossMAE share; decoders, masks and heads are left out."""
    state = {re.sub(r"^(module\.|backbone\.|encoder\.)+", "", name): value for name, value in tensors.items()}
    dropped = ("decoder", "mask_token", "masked_embed", "head", "fc_norm", "predictor", "relation", "group")
    return {name: value for name, value in state.items() if not name.startswith(dropped)}


LAYOUTS = (
    Layout("MIM-Refiner's hub", "cls_tokens.tokens", from_hub),
    Layout("fairseq data2vec 2.0", "modality_encoders.IMAGE.local_encoder.proj.weight", from_fairseq),
    Layout("MAE and its relatives", "patch_embed.proj.weight", from_mae),
)


class _Inert:
    """Stands in for a settings object inside a checkpoint: it takes any state and does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def _stand_ins() -> list:
    """Settings classes that published files carry, none of which is imported or run."""
    settings = (
        "omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig", "omegaconf.base.ContainerMetadata",
        "omegaconf.base.Metadata", "omegaconf.nodes.AnyNode", "omegaconf.nodes.IntegerNode", "omegaconf.nodes.FloatNode",
        "omegaconf.nodes.StringNode", "omegaconf.nodes.BooleanNode", "typing.Any",
    )  # fmt: skip
    return [argparse.Namespace, *((_Inert, name) for name in settings)]


def _list(what: str, names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f" it {what} {', '.join(names[:5])}{more};" if names else ""
