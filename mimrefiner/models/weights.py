"""Encoders in this package's own files: what is written loads again as the same function."""

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import safetensors.torch
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mimrefiner.config import ViTConfig
from mimrefiner.device import seeded
from mimrefiner.errors import InputError
from mimrefiner.models import from_timm
from mimrefiner.models.keys import HEADS, INSIDE
from mimrefiner.models.layouts import ReleasedViT, ViTShape
from mimrefiner.models.tensors import damage_named, read_metadata, write_safetensors
from mimrefiner.models.tokens import settings_of
from mimrefiner.models.wrappers import unwrapped

logger = logging.getLogger(__name__)

OWN = "mimrefiner_vit"  # the architecture that build_vit makes
ANY_SIZE = "vit_base_patch16_224"  # the name under which timm builds a ViT of any size
# Modules that do nothing to an image that is only looked at
IDLE = {"Identity", "Dropout", "DropPath", "PatchDropout"}
# What decides a module's output beside its type, its children and what it prints of itself
DECIDING = ("num_heads", "scale", "num_prefix_tokens", "no_embed_class", "global_pool", "grid_size")


def plain_vit(config: ViTConfig, seed: int = 0) -> VisionTransformer:
    """timm's ViT in these sizes: pre-norm, cls token, learned positions, weights of ``seed``."""
    with seeded(seed):
        return VisionTransformer(
            img_size=config.image_size,
            patch_size=config.patch_size,
            embed_dim=config.dim,
            depth=config.depth,
            num_heads=config.num_heads,
            num_classes=0,
            global_pool="token",
            dynamic_img_size=True,
        )


def save_encoder(encoder: nn.Module, path: Path | str) -> None:
    """Write ``encoder`` as safetensors, so that :func:`mimrefiner.load_encoder` can rebuild it.

    Classifiers on top stay behind, and so does what ``torch.compile`` or DataParallel put around.

    Raises:
        InputError: an encoder that could not be rebuilt, see :func:`check_savable`.
    """
    encoder = unwrapped(encoder)
    metadata, again = _described(encoder)
    tensors = {INSIDE.sub("", name): x for name, x in encoder.state_dict().items()}
    kept = {name: tensors[name].detach().cpu().contiguous() for name in again.state_dict()}
    write_safetensors(kept, path, metadata)


def check_savable(encoder: nn.Module) -> None:
    """Raise InputError where what :func:`save_encoder` writes would be another function.

    A file holds weights, sizes and timm's name; an activation of the caller's own, another epsilon
    or an adapter around a layer is in none of them.

    >>> encoder = plain_vit(ViTConfig(dim=32, depth=2, num_heads=2))
    >>> encoder.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    >>> check_savable(encoder)
    >>> encoder.blocks[1].mlp.act = nn.ReLU()
    >>> check_savable(encoder)
    Traceback (most recent call last):
    ...
    mimrefiner.errors.InputError: this encoder could not be loaded again from a file, since \
blocks.1.mlp.act is ReLU() and would be GELU(approximate='none'): keep it by torch.save of its \
state_dict(), and merge adapters into the layers before
    """
    _described(unwrapped(encoder))


def warn_or_refuse(encoder: nn.Module, saved: bool) -> None:
    """Before training: what :func:`check_savable` finds, an error if the result is to be saved."""
    try:
        check_savable(encoder)
    except InputError as error:
        if saved:
            raise
        logger.warning("%s", error)


def _described(encoder: nn.Module) -> tuple[dict[str, str], nn.Module]:
    """What a file says of ``encoder``, and what is built by that, without memory or weights."""
    try:
        sizes = json.dumps(asdict(vit_config(encoder)))
    except (AttributeError, TypeError, IndexError) as error:
        raise InputError(
            f"{type(encoder).__name__} can not be written to a file of this package, which holds "
            f"a ViT: keep it by torch.save of its state_dict() ({error})"
        ) from error
    data = timm.data.resolve_data_config(pretrained_cfg=settings_of(encoder))
    shape = asdict(encoder.shape) if isinstance(encoder, ReleasedViT) else None
    metadata = {
        "format": "mimrefiner-encoder-1",
        "vit": sizes,
        "released": json.dumps(shape) if shape else "",
        "data": json.dumps({key: data[key] for key in from_timm.INPUT}),
    }
    why = ""
    for architecture, arguments in _builds(encoder):
        metadata |= {"architecture": architecture, "arguments": json.dumps(arguments)}
        try:
            again = _skeleton(metadata)
        except AssertionError as error:  # timm refuses the arguments
            why = why or str(error)
            continue
        if (different := difference(again, encoder)) is None:
            return metadata, again
        why = why or different
    raise InputError(
        f"this encoder could not be loaded again from a file, since {why}: keep it by torch.save "
        "of its state_dict(), and merge adapters into the layers before"
    )


def _builds(encoder: nn.Module) -> Iterator[tuple[str, dict]]:
    """The architectures and arguments that may build ``encoder``, the simplest first."""
    cfg = settings_of(encoder)
    name = cfg.get("architecture") or ANY_SIZE
    if isinstance(encoder, ReleasedViT) or name == OWN:
        yield name, {}
        return
    if from_timm.is_timm_name(name):
        yield name, dict(cfg.get("model_args") or {})
    if type(encoder) is VisionTransformer:
        read = _arguments_of(encoder)
        if from_timm.is_timm_name(name):
            yield name, read
        yield ANY_SIZE, read
    elif not from_timm.is_timm_name(name):
        raise InputError(f"timm has no architecture {name!r} by which this encoder could be built")


def _arguments_of(encoder: VisionTransformer) -> dict:
    """With what timm builds a ViT like this one, as far as its parts tell."""
    first = encoder.blocks[0]
    idle = {
        name: isinstance(getattr(encoder, name, None), nn.Identity | None)
        for name in ("norm", "fc_norm", "norm_pre")
    }
    attention, mlp = first.attn, first.mlp
    hidden = getattr(getattr(mlp, "fc1", None), "out_features", 4 * encoder.embed_dim)
    gamma = getattr(getattr(first, "ls1", None), "gamma", None)
    return {
        "embed_dim": encoder.embed_dim,
        "depth": len(encoder.blocks),
        "num_heads": attention.num_heads,
        "patch_size": encoder.patch_embed.patch_size[0],
        "mlp_ratio": (hidden + 0.5) / encoder.embed_dim,  # timm rounds down
        "qkv_bias": getattr(getattr(attention, "qkv", None), "bias", None) is not None,
        "qk_norm": not isinstance(getattr(attention, "q_norm", None), nn.Identity | None),
        "init_values": None if gamma is None else 1e-5,
        "class_token": encoder.cls_token is not None,
        "reg_tokens": encoder.num_reg_tokens,
        "no_embed_class": encoder.no_embed_class,
        "pre_norm": not idle["norm_pre"],
        "final_norm": not (idle["norm"] and idle["fc_norm"]),
        "fc_norm": not idle["fc_norm"],
        "global_pool": encoder.global_pool,
    }


def rebuilt(metadata: dict[str, str]) -> nn.Module:
    """The encoder that a file's metadata describe, with random weights.

    Raises:
        KeyError, TypeError, ValueError: metadata that :func:`save_encoder` did not write.
    """
    config, architecture = ViTConfig(**json.loads(metadata["vit"])), metadata["architecture"]
    own = {"architecture": architecture, "crop_mode": "center"}
    if metadata.get("released"):
        encoder = ReleasedViT(ViTShape(**json.loads(metadata["released"])))
        encoder.pretrained_cfg = own
    elif architecture == OWN:
        encoder = plain_vit(config)
        encoder.pretrained_cfg = own
    else:
        arguments = json.loads(metadata.get("arguments", "{}"))
        encoder = from_timm.create(from_timm.Plan(architecture, arguments), config.image_size)
        if vit_config(encoder) != config:  # timm.create_model(NAME, depth=6) tells nobody its depth
            arguments |= {"embed_dim": config.dim, "patch_size": config.patch_size}
            arguments |= {"depth": config.depth, "num_heads": config.num_heads}
            plan = from_timm.Plan(architecture, arguments)
            encoder = from_timm.create(plan, config.image_size)
    return encoder.eval()


def _skeleton(metadata: dict[str, str]) -> nn.Module:
    with seeded(0):  # whoever draws afterwards draws as if nothing had been built
        try:
            with torch.device("meta"):
                return rebuilt(metadata)
        except (RuntimeError, NotImplementedError):  # a family that computes while it is built
            return rebuilt(metadata)


def difference(again: nn.Module, encoder: nn.Module) -> str | None:
    """Why two encoders with the same weights would be different functions, None where they are one.

    Heads and dropout are left aside.
    """
    shapes = _first_different(_shapes(again), _shapes(encoder))
    return parts_difference(again, encoder) or shapes


def parts_difference(again: nn.Module, encoder: nn.Module, *, below: bool = False) -> str | None:
    """As :func:`difference`, by the modules alone: activations, epsilons, layers.

    ``below`` leaves the encoders themselves aside and looks at what they are made of.
    """
    there, here = _parts(again), _parts(encoder)
    if below:
        del there[""], here[""]
    return _first_different(there, here)


def _first_different(there: dict[str, str], here: dict[str, str]) -> str | None:
    for name in [*here, *(name for name in there if name not in here)]:
        same = name in there and there[name] == here.get(name)
        if not same and (not HEADS.match(name) or name.startswith("fc_norm")):
            parts = [found.get(name, "absent") for found in (here, there)]
            return f"{name or 'the model'} is {parts[0]} and would be {parts[1]}"
    return None


def _shapes(model: nn.Module) -> dict[str, str]:
    """The names of all tensors with their shapes."""
    return {
        INSIDE.sub("", name): str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__
        for name, x in model.state_dict().items()
    }


def _parts(model: nn.Module) -> dict[str, str]:
    """The names of all modules that do something with what decides what they do."""
    found = {}
    for name, module in model.named_modules():
        if type(module).__name__ in IDLE or hasattr(module, "_orig_mod"):
            continue
        facts = [f"{key}={getattr(module, key)}" for key in DECIDING if hasattr(module, key)]
        facts = [*filter(None, [module.extra_repr()]), *facts]
        name = INSIDE.sub("", f"{name}.").removesuffix(".")
        found[name] = f"{type(module).__name__}({', '.join(facts)})"
    return found


def sha256_of(encoder: nn.Module) -> str:
    """SHA-256 of an encoder's weights: names, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, x in sorted(encoder.state_dict().items()):
        digest.update(f"{name}{tuple(x.shape)}".encode())
        digest.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def is_own_file(path: Path) -> bool:
    """Whether this package wrote ``path`` in its own format."""
    return read_metadata(path).get("format") == "mimrefiner-encoder-1"


def read_encoder_file(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a file written by :func:`save_encoder`."""
    with damage_named(path), safetensors.safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, file.metadata()


def vit_config(encoder: nn.Module) -> ViTConfig:
    """The sizes of a timm ViT."""
    return ViTConfig(
        image_size=encoder.patch_embed.img_size[0],
        patch_size=encoder.patch_embed.patch_size[0],
        dim=encoder.embed_dim,
        depth=len(encoder.blocks),
        num_heads=encoder.blocks[0].attn.num_heads,
    )
