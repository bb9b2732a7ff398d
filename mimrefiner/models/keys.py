"""Names of tensors in files: wrappers come off, heads and decoders stay behind, and the names of
transformers and torchvision become timm's.

Training code wraps its encoder (``module.``, ``_orig_mod.``, ``model.``, ``backbone.``,
``student.``, ``teacher.`` ...) and keeps it beside optimisers, averages and heads. Which prefix is
the wrapper is found from the names behind it, so that no list of projects has to be complete.
"""

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# Where a ViT's names begin, in timm's and the official codes', transformers' and torchvision's
ANCHORS = (
    "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.weight",
    "conv_proj.weight",
)
INSIDE = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
HEADS = re.compile(
    r"(heads?|head_dist|head_drop|fc|fc_norm|classifier|classification_head|pooler|pre_logits|"
    r"projectors?|projection_heads?|projections?|predictors?|prototypes|online_classifier|"
    r"decoders?|decoder_\w+|masked_embed|queue\w*)(\.|$)"
)
NESTED = 3  # how deep files hide their tensors
# Of several encoders in a file these come first, and those last
AVERAGED = re.compile(r"(?<![a-z])(ema|teacher|target)(?![a-z])")
OTHERS = re.compile(r"(?<![a-z])(momentum|student|online)(?![a-z])")


@dataclass(frozen=True)
class Found:
    """The encoder's tensors in a file.

    Attributes:
        tensors: by their names without wrapper.
        where: the wrapper, "" for none.
        left_out: how many tensors of each kind stayed behind.
    """

    tensors: dict[str, Tensor]
    where: str
    left_out: dict[str, int]

    def say(self, path: str) -> None:
        """Tell what was taken and what stayed behind, where something did."""
        parts = [f"{n} of {kind}" for kind, n in self.left_out.items()]
        wrapped = f" under {self.where!r}" if self.where else ""
        if parts or wrapped:
            logger.info(
                "%s: %d tensors%s are the encoder's; left out: %s",
                path,
                len(self.tensors),
                wrapped,
                ", ".join(parts) or "none",
            )


def find_encoder(file: Mapping, expected: Collection[str] = ()) -> Found | None:
    """The tensors of the encoder in a checkpoint; None where nothing looks like one.

    Args:
        file: what the checkpoint file holds.
        expected: the names of the encoder's tensors, where the model is known; without them a ViT
            is looked for.

    >>> head, proj = torch.zeros(10, 8), torch.zeros(8, 3, 4, 4)
    >>> file = {"state_dict": {"model.patch_embed.proj.weight": proj, "model.head.weight": head}}
    >>> found = find_encoder(file)
    >>> list(found.tensors), found.where, found.left_out
    (['patch_embed.proj.weight'], 'model.', {'head': 1})
    """
    wanted = frozenset(expected or ANCHORS)
    candidates = [
        (count, _rank(f"{place}.{prefix}"), -order, prefix, held)
        for order, (place, held) in enumerate(_holders(file))
        for prefix, count in _prefixes(held, wanted).items()
    ]
    if not candidates:
        return None
    *_, prefix, held = max(candidates, key=lambda candidate: candidate[:3])
    return _without_heads(held, prefix, wanted if expected else frozenset())


def averaged(file: Mapping) -> str | None:
    """The name under which ``file`` keeps the average of an encoder's weights; None without one.

    >>> proj = {"patch_embed.proj.weight": torch.zeros(8, 3, 4, 4)}
    >>> averaged({"model": proj, "optimizer": {}, "ema": proj})
    'ema'
    """
    names = (name for name, part in file.items() if isinstance(part, Mapping))
    found = (name for name in names if isinstance(name, str) and _rank(name) > 0)
    return next((name for name in found if find_encoder(file[name]) is not None), None)


def _rank(place: str) -> int:
    """Which of several encoders is meant: an average before its student."""
    return bool(AVERAGED.search(place.lower())) - bool(OTHERS.search(place.lower()))


def _holders(file: Mapping, place: str = "", depth: int = 0) -> Iterator[tuple[str, dict]]:
    """Every mapping in ``file`` that holds tensors, with its place; names lose inner wrappers."""
    held = {INSIDE.sub("", k): as_tensor(x) for k, x in file.items() if isinstance(k, str)}
    held = {key: x for key, x in held.items() if x is not None}
    if held:
        yield place, held
    if depth < NESTED:
        for key, part in file.items():
            if isinstance(part, Mapping):
                yield from _holders(part, f"{place}.{key}", depth + 1)


def largest_holder(file: Mapping) -> dict[str, Tensor]:
    """The mapping in ``file`` that holds the most tensors; an empty one where nothing does."""
    return max((held for _, held in _holders(file)), key=len, default={})


def as_tensor(x) -> Tensor | None:
    """``x`` where it is a tensor, its numbers as one where it is a NumPy array, else None."""
    if isinstance(x, np.ndarray) and x.dtype.kind in "fiub":
        return torch.from_numpy(np.ascontiguousarray(x))
    return x if isinstance(x, Tensor) else None


def _prefixes(held: Mapping[str, Tensor], wanted: Collection[str]) -> Counter:
    """How many of the ``wanted`` names every prefix has behind it."""
    found: Counter = Counter()
    for key in held:
        parts = key.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in wanted:
                found["".join(f"{part}." for part in parts[:i])] += 1
    return found


def _without_heads(held: Mapping[str, Tensor], prefix: str, expected: Collection[str]) -> Found:
    tensors, left_out = {}, Counter()
    for key, x in held.items():
        name = key.removeprefix(prefix)
        if not key.startswith(prefix):
            left_out[key.split(".")[0]] += 1
        elif name not in expected and (match := HEADS.match(name)):
            left_out[match[1]] += 1
        else:
            tensors[name] = x
    return Found(tensors, prefix, dict(left_out))


# ---- names of transformers and torchvision

LAYER = r"^(?:encoder\.)?layers?\.(\d+)\."
RENAMED = tuple(
    (re.compile(old), new)
    for old, new in (
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.", ""),  # cls_token, mask_token, register_tokens
        (r"^layernorm\.", "norm."),
        (LAYER, r"blocks.\1."),
        (r"\.(?:layernorm|norm)_before\.", ".norm1."),
        (r"\.(?:layernorm|norm)_after\.", ".norm2."),
        (r"\.attention\.(?:attention\.)?(query|key|value)\.", r".attn.\1."),
        (r"\.attention\.q_proj\.", ".attn.query."),
        (r"\.attention\.k_proj\.", ".attn.key."),
        (r"\.attention\.v_proj\.", ".attn.value."),
        (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
        (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
        (r"\.mlp\.weights_in\.", ".mlp.w12."),
        (r"\.mlp\.(?:weights_out|down_proj)\.", ".mlp.w3."),
        # torchvision's
        (r"^conv_proj\.", "patch_embed.proj."),
        (r"^class_token$", "cls_token"),
        (r"^encoder\.pos_embedding$", "pos_embed"),
        (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
        (r"^encoder\.ln\.", "norm."),
        (r"\.ln_(\d)\.", r".norm\1."),
        (r"\.self_attention\.in_proj_", ".attn.qkv."),
        (r"\.self_attention\.out_proj\.", ".attn.proj."),
        (r"\.mlp\.(?:linear_1|0)\.", ".mlp.fc1."),
        (r"\.mlp\.(?:linear_2|3)\.", ".mlp.fc2."),
    )
)
# What one tensor of timm's has in one piece
JOINED = {
    "attn.qkv": ("attn.query", "attn.key", "attn.value"),
    "mlp.w12": ("mlp.gate_proj", "mlp.up_proj"),
}


def has_other_names(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are names of a ViT of Hugging Face's transformers or of torchvision."""
    return any(anchor in tensors for anchor in ANCHORS[1:])


def by_timm_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' ViT, ViTMAE, DINOv2 (versions 4 and 5) and torchvision's ViT by timm's names.

    >>> parts = {f"encoder.layer.0.attention.attention.{p}.bias": torch.ones(4)
    ...          for p in ("query", "key", "value")}
    >>> {name: tuple(x.shape) for name, x in by_timm_names(parts).items()}
    {'blocks.0.attn.qkv.bias': (12,)}
    """
    renamed = {}
    for key, x in tensors.items():
        for old, new in RENAMED:
            key = old.sub(new, key)
        renamed[key] = x
    for whole, parts in JOINED.items():
        first = [key for key in renamed if f".{parts[0]}." in key]
        for key in first:
            names = [key.replace(parts[0], part) for part in parts]
            if all(name in renamed for name in names):
                pieces = [renamed.pop(name) for name in names]
                renamed[key.replace(parts[0], whole)] = torch.cat(pieces)
    return renamed
