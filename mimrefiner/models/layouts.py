"""Published checkpoint layouts: which keys they have, and the one plain ViT that all become.

Every layout is a row of :data:`LAYOUTS`. The facts come from the public repositories named there. A
checkpoint's sizes are read off its tensors; only the number of attention heads leaves no trace in
the shapes.
"""

import logging
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from mimrefiner.errors import InputError
from mimrefiner.models.catalogue import CATALOGUE, CatalogueRow
from mimrefiner.models.keys import (
    averaged,
    by_timm_names,
    find_encoder,
    has_other_names,
)
from mimrefiner.models.tensors import check_numbers

logger = logging.getLogger(__name__)

FAIRSEQ = "modality_encoders.IMAGE."
DECODER = ("decoder_", "mask_token")
MUGS_HEADS = ("relation_blocks.", "instance_head.", "group_head.", "relation_head.", "head.")


@dataclass(frozen=True)
class Layout:
    """One published layout.

    Attributes:
        name, source: what it is called, and the repository that shows it.
        containers: names under which the tensors lie, "" for the top of the file.
        mark: a part of a key that only this layout has.
        strip: prefixes that are taken off, in this order.
        rename: beginnings of keys, old and new.
        drop: beginnings of keys that are no part of the encoder.
        fixed_positions: positions are sine-cosine ones, which are not trained.
    """

    name: str
    source: str
    containers: tuple[str, ...]
    mark: str
    strip: tuple[str, ...] = ()
    rename: tuple[tuple[str, str], ...] = ()
    drop: tuple[str, ...] = ()
    fixed_positions: bool = True


LAYOUTS = (
    Layout(
        "data2vec 2.0 (fairseq)",
        "facebookresearch/fairseq, examples/data2vec",
        containers=("model", ""),
        mark=FAIRSEQ + "local_encoder.",
        strip=("model.",),
        rename=(
            (FAIRSEQ + "local_encoder.proj", "patch_embed.proj"),
            (FAIRSEQ + "extra_tokens", "cls_token"),
            (FAIRSEQ + "fixed_positional_encoder.positions", "pos_embed"),
            (FAIRSEQ + "context_encoder.norm", "norm_pre"),
        ),
        drop=(FAIRSEQ + "decoder.", "decoder", "_ema", "head.", "fc_norm.", "linear_norm."),
    ),
    Layout(
        "MIM-Refiner",
        "ml-jku/MIM-Refiner, hub/",
        containers=("state_dict", ""),
        mark="pos_embed.embed",
        rename=(
            ("pos_embed.embed", "pos_embed"),
            ("cls_tokens.tokens", "cls_token"),
            ("embed_norm", "norm_pre"),
        ),
    ),
    Layout(
        "I-JEPA",
        "facebookresearch/ijepa",
        containers=("target_encoder",),
        mark="pos_embed",
        strip=("module.",),
    ),
    Layout(
        "Mugs",
        "sail-sg/mugs",
        containers=("state_dict", "student", ""),
        mark="relation_blocks.",
        strip=("module.", "backbone."),
        drop=MUGS_HEADS,
        fixed_positions=False,
    ),
    Layout(
        "iBOT or DINO teacher",
        "bytedance/ibot",
        containers=("teacher",),
        mark="backbone.",
        strip=("module.", "backbone."),
        drop=("head.", "masked_embed"),
        fixed_positions=False,
    ),
    Layout(
        "Mugs without relation blocks",
        "sail-sg/mugs",
        containers=("state_dict", ""),
        mark="backbone.",
        strip=("module.", "backbone."),
        drop=MUGS_HEADS,
        fixed_positions=False,
    ),
    Layout(
        "CrossMAE",
        "TonyLianLong/CrossMAE",
        containers=("model", ""),
        mark="wfm.",
        drop=(*DECODER, "dec_norms.", "wfm."),
    ),
    Layout(
        "MAE or dBOT",
        "facebookresearch/mae, liuxingbin/dbot",
        containers=("model", ""),
        mark="decoder_",
        drop=DECODER,
    ),
    Layout(
        "MAE or dBOT without decoder",
        "facebookresearch/mae",
        containers=("model",),
        mark="patch_embed.proj",
        drop=DECODER,
    ),
    Layout("MAE-CT", "ml-jku/MAE-CT", containers=("state_dict",), mark="patch_embed.proj"),
    Layout(
        "plain ViT (DINO, MAWS, MAE-CT)",
        "facebookresearch/dino, facebookresearch/maws",
        containers=("",),
        mark="patch_embed.proj",
        drop=("head.", "relation_blocks."),
        fixed_positions=False,
    ),
)

# What is left of any other file once wrappers, heads and transformers' names are gone
BARE = Layout(
    "plain ViT in a wrapper, or transformers' or torchvision's ViT",
    "huggingface/transformers, pytorch/vision, Lightning-AI, lightly-ai/lightly, solo-learn",
    containers=("",),
    mark="patch_embed.proj",
    drop=("mask_token",),
    fixed_positions=False,
)

FOREIGN = {  # a part of a key -> what the file looks like
    "embeddings.patch_embeddings": "a Hugging Face transformers ViT",
    "vision_encoder.": "a MAWS model with its text encoder (maws_clip)",
    "visual.": "an OpenCLIP model",
    "relative_position_bias_table": "a BEiT or data2vec 1.0 model",
    "ls1.gamma": "a DINOv2 model",
}

HINT = "; where timm has the architecture, name it: load_encoder(NAME, file=FILE), NAME@FILE"

BLOCK_KEYS = tuple(
    f"{part}.{kind}"
    for part in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    for kind in ("weight", "bias")
)


@dataclass(frozen=True)
class ViTShape:
    """Sizes and form of a plain ViT.

    Attributes:
        image_size, patch_size: sides in pixels.
        dim, depth, num_heads, mlp_dim: width, blocks, attention heads, hidden width of the MLPs.
        cls_token: whether it has one.
        post_norm: data2vec 2.0's form, with LayerNorms after attention and MLP.
        final_norm: whether a LayerNorm follows the last block.
        fixed_positions: positions are sine-cosine ones, which are not trained.
        norm_eps: epsilon of all LayerNorms.
    """

    image_size: int
    patch_size: int
    dim: int
    depth: int
    num_heads: int
    mlp_dim: int
    cls_token: bool = True
    post_norm: bool = False
    final_norm: bool = True
    fixed_positions: bool = True
    norm_eps: float = 1e-6


class PostNormBlock(Block):
    """Attention and MLP, each followed by a LayerNorm of the sum.

    This is ``AltBlock`` of fairseq with ``layer_norm_first`` off.
    """

    def forward(self, x: Tensor, *args, **mask) -> Tensor:
        x = self.norm1(x + self.drop_path1(self.ls1(self.attn(x, *args, **mask))))
        return self.norm2(x + self.drop_path2(self.ls2(self.mlp(x))))


class ReleasedViT(VisionTransformer):
    """A plain ViT that resizes its positions as the official codes do: bicubic, not antialiased.

    The cls token carries its own position (the two are constants that are always added), so
    ``pos_embed`` is (1, height * width, dim) in every layout. Positions that are not trained are a
    buffer.
    """

    def __init__(self, shape: ViTShape):
        super().__init__(
            img_size=shape.image_size,
            patch_size=shape.patch_size,
            num_classes=0,
            embed_dim=shape.dim,
            depth=shape.depth,
            num_heads=shape.num_heads,
            mlp_ratio=shape.mlp_dim / shape.dim,
            class_token=shape.cls_token,
            no_embed_class=True,
            global_pool="token" if shape.cls_token else "avg",
            fc_norm=False,
            final_norm=shape.final_norm,
            dynamic_img_size=True,
            block_fn=PostNormBlock if shape.post_norm else Block,
            norm_layer=partial(nn.LayerNorm, eps=shape.norm_eps),
        )
        self.shape = shape
        if shape.post_norm:
            self.norm_pre = nn.LayerNorm(shape.dim, eps=shape.norm_eps)
        if shape.fixed_positions:
            self._set_positions(self.pos_embed.detach())

    def learn_positions(self) -> None:
        """Let positions be trained, also those that a published model keeps fixed."""
        self.shape = replace(self.shape, fixed_positions=False)
        self._set_positions(self.pos_embed.detach())

    def _set_positions(self, positions: Tensor) -> None:
        del self.pos_embed
        if self.shape.fixed_positions:
            self.register_buffer("pos_embed", positions)
        else:
            self.pos_embed = nn.Parameter(positions)

    def _resized(self, height: int, width: int) -> Tensor:
        old = self.patch_embed.grid_size
        return resample_abs_pos_embed(
            self.pos_embed, [height, width], list(old), num_prefix_tokens=0, antialias=False
        )

    def _pos_embed(self, x: Tensor) -> Tensor:
        b, h, w, _ = x.shape  # patches, channels last
        x = x.flatten(1, 2) + self._resized(h, w)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(b, -1, -1), x], dim=1)
        return self.pos_drop(x)

    def set_input_size(self, img_size=None, patch_size=None) -> None:
        """Change the input size (pixels, square) for good; positions are resized."""
        self.shape = replace(self.shape, image_size=img_size)
        side = img_size // self.shape.patch_size
        positions = self._resized(side, side).detach()
        self.patch_embed.set_input_size(img_size=img_size)
        self._set_positions(positions)


def convert(
    file: Mapping,
    path: str,
    num_heads: int | None = None,
    row: CatalogueRow | None = None,
) -> tuple[ViTShape, dict[str, Tensor], Layout]:
    """Read a published checkpoint: the sizes of its model, its tensors and its layout.

    Args:
        file: what the checkpoint file holds.
        path: its name, for messages.
        num_heads: attention heads; None looks the sizes up in the catalogue.
        row: of the catalogue, where its name was given together with the file.

    Returns:
        The sizes, the tensors under the names of :class:`ReleasedViT`, and the layout.

    Raises:
        InputError: no known layout, or keys or shapes that do not fit the layout the file looks
            like, or the row.
    """
    if (average := averaged(file)) is not None:
        logger.info("%s: its averaged weights (%s) are taken", path, average)
        file = {_beside(average, file): file[average]}
    try:
        layout, found = find_layout(file, path)
        return _fitted(layout, dict(_renamed(layout, found)), path, num_heads, row)
    except InputError as error:
        bare = find_encoder(file)
        if bare is None:
            raise
        foreign, tensors = has_other_names(bare.tensors), bare.tensors
        if foreign:
            tensors = by_timm_names(tensors)
        # ViTMAE's positions are fixed, which only its decoder shows
        bare_layout = replace(BARE, fixed_positions=foreign and "decoder" in bare.left_out)
        try:
            renamed = dict(_renamed(bare_layout, tensors))
            fitted = _fitted(bare_layout, renamed, path, num_heads, row)
        except InputError as second:
            raise (second if bare.where or foreign else error) from None
        bare.say(path)
        return fitted


def _beside(average: str, file: Mapping) -> str:
    """The name by which layouts know what an average is the average of."""
    if any(average in layout.containers for layout in LAYOUTS):
        return average
    plain = average.removesuffix("_ema")
    return next((name for name in (plain, "model", "state_dict") if name in file), plain)


def check_sizes(row: CatalogueRow | None, dim: int, depth: int, patch: int, path: str) -> None:
    """Raise InputError where a file's model is not as large as that of the catalogue's ``row``."""
    if row is not None and (dim, depth, patch) != (row.dim, row.depth, row.patch):
        raise InputError(
            f"{path} is no {row.name}: it has width {dim}, {depth} blocks and patches of {patch} "
            f"px, the model of that name {row.dim}, {row.depth} and {row.patch} px; give the file "
            "alone (and num_heads=, --num-heads)"
        )


def _fitted(
    layout: Layout,
    tensors: dict[str, Tensor],
    path: str,
    num_heads: int | None,
    row: CatalogueRow | None,
) -> tuple[ViTShape, dict[str, Tensor], Layout]:
    """What :func:`convert` returns, if these tensors are those of the layout."""
    try:
        weight, positions = tensors["patch_embed.proj.weight"], tensors["pos_embed"]
        mlp_dim = tensors["blocks.0.mlp.fc1.weight"].shape[0]
    except KeyError as error:
        foreign = _foreign(tensors)
        like = f" or {foreign}" if foreign else ""
        raise InputError(
            f"{path} looks like the {layout.name} layout{like}, but has no {error.args[0]}{HINT}"
        ) from None
    dim, patch = weight.shape[0], weight.shape[-1]
    depth = 1 + max(int(m[1]) for key in tensors if (m := re.match(r"blocks\.(\d+)\.", key)))
    check_sizes(row, dim, depth, patch, path)
    check_numbers(tensors, path)
    side = _square_positions(tensors, _position_rows(positions, dim, path), path)
    shape = ViTShape(
        side * patch,
        patch,
        dim,
        depth,
        1,
        mlp_dim,
        cls_token="cls_token" in tensors,
        post_norm="norm_pre.weight" in tensors,
        final_norm="norm.weight" in tensors,
        fixed_positions=layout.fixed_positions,
    )
    _check_keys(shape, tensors, layout, path)
    shape = replace(shape, num_heads=num_heads or _heads(dim, depth, path))
    if dim % shape.num_heads:
        raise InputError(f"{path}: width {dim} is not divisible by num_heads={shape.num_heads}")
    return shape, tensors, layout


def _position_rows(positions: Tensor, dim: int, path: str) -> Tensor:
    """Positions as (1, number, dim), where files hold them with the width last or first.

    >>> _position_rows(torch.zeros(1, 48, 4, 4), 48, "file.pth").shape
    torch.Size([1, 16, 48])
    """
    grid = positions.squeeze(0) if positions.ndim > 2 else positions
    if grid.ndim not in (2, 3) or dim not in (grid.shape[0], grid.shape[-1]):
        raise InputError(
            f"{path}: expected positions (1, number, {dim}) or (1, {dim}, rows, columns), "
            f"got {tuple(positions.shape)}"
        )
    if grid.shape[-1] != dim:
        grid = grid.movedim(0, -1)
    return grid.reshape(1, -1, dim)


def _square_positions(tensors: dict[str, Tensor], positions: Tensor, path: str) -> int:
    """Add the cls token's position to the token, and keep the others: the side of their grid."""
    side = math.isqrt(positions.shape[1])
    if "cls_token" in tensors and side**2 != positions.shape[1]:
        tensors["cls_token"] = tensors["cls_token"] + positions[:, :1]
        positions = positions[:, 1:]
        side = math.isqrt(positions.shape[1])
    if side**2 != positions.shape[1]:
        raise InputError(
            f"{path}: expected positions of a square grid, with or without cls token, "
            f"got {positions.shape[1]}"
        )
    tensors["pos_embed"] = positions
    return side


def find_layout(file: Mapping, path: str) -> tuple[Layout, Mapping]:
    """The first layout that fits, and the mapping of keys to tensors inside ``file``."""
    for layout in LAYOUTS:
        for container in layout.containers:
            found = file.get(container) if container else file
            if isinstance(found, Mapping) and any(layout.mark in key for key in _names(found)):
                return layout, found
    keys = [key for part in (file, *file.values()) for key in _names(part)]
    if {"state", "param_groups"} <= set(keys) and not any("patch_embed" in key for key in keys):
        raise InputError(
            f"{path} holds an optimiser's state and no model: give the file of the weights"
        )
    like = _foreign(keys) or "no layout that is known"
    names = ", ".join(layout.name for layout in LAYOUTS)
    raise InputError(
        f"{path} looks like {like}, with keys {_few(keys)}; expected one of: {names}{HINT}"
    )


def _names(part) -> list[str]:
    return [key for key in part if isinstance(key, str)] if isinstance(part, Mapping) else []


def _foreign(keys: Collection[str]) -> str | None:
    """What a file with these keys looks like, if it is of a kind that nothing here reads."""
    return next((what for mark, what in FOREIGN.items() if any(mark in key for key in keys)), None)


def _renamed(layout: Layout, tensors: Mapping) -> Iterator[tuple[str, Tensor]]:
    for key, x in tensors.items():
        for prefix in layout.strip:
            key = key.removeprefix(prefix)
        if not isinstance(x, Tensor) or key.startswith(layout.drop):
            continue
        for old, new in layout.rename:
            if key.startswith(old):
                key = new + key.removeprefix(old)
        yield key, x


def _check_keys(shape: ViTShape, tensors: dict[str, Tensor], layout: Layout, path: str) -> None:
    expected = {"patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed"}
    expected |= {f"blocks.{i}.{key}" for i in range(shape.depth) for key in BLOCK_KEYS}
    for name, there in (("norm", shape.final_norm), ("norm_pre", shape.post_norm)):
        expected |= {f"{name}.weight", f"{name}.bias"} if there else set()
    expected |= {"cls_token"} if shape.cls_token else set()
    missing, unexpected = sorted(expected - tensors.keys()), sorted(tensors.keys() - expected)
    if missing or unexpected:
        foreign = _foreign(tensors)
        like = f" or {foreign}" if foreign else ""
        raise InputError(
            f"{path} looks like the {layout.name} layout{like}, but its keys do not fit: "
            f"missing {_few(missing)}, unexpected {_few(unexpected)}{HINT}"
        )


def _heads(dim: int, depth: int, path: str) -> int:
    heads = {row.heads for row in CATALOGUE if row.heads and (row.dim, row.depth) == (dim, depth)}
    if len(heads) != 1:
        raise InputError(
            f"{path}: the table of models has no ViT of width {dim} and {depth} blocks; "
            "give num_heads= (--num-heads)"
        )
    return heads.pop()


def _few(keys: list[str]) -> str:
    more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
    return ", ".join(keys[:4]) + more if keys else "none"
