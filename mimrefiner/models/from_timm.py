"""Encoders that timm builds: by name, from a hub or a folder, with the weights of a file."""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path

import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import PretrainedCfg
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mimrefiner.errors import InputError
from mimrefiner.files import first_line
from mimrefiner.models.catalogue import BY_NAME
from mimrefiner.models.keys import (
    Found,
    by_timm_names,
    find_encoder,
    has_other_names,
    largest_holder,
)
from mimrefiner.models.tensors import check_numbers, read_checkpoint

logger = logging.getLogger(__name__)

INPUT = ("mean", "std", "interpolation", "crop_pct", "crop_mode")  # how an image is prepared
HUB = re.compile("hf[-_]hub:")
LOCAL = "local-dir:"
WEIGHTS = (  # names under which folders hold weights, the first that is there counts
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "open_clip_pytorch_model.bin",
    "model.pth",
)
HEADS = {384: 6, 768: 12, 1024: 16, 1536: 24}  # attention heads of DINOv2 by its width
# What building and timm's converters raise for weights that do not fit
UNFIT = (RuntimeError, KeyError, ValueError, TypeError, AttributeError, AssertionError, IndexError)


@dataclass(frozen=True)
class Plan:
    """How timm builds an encoder.

    Attributes:
        name: timm's name of the architecture.
        arguments: of ``timm.create_model``, where they are not the architecture's own.
        settings: parts of ``pretrained_cfg`` that replace timm's.
    """

    name: str
    arguments: Mapping = field(default_factory=dict)
    settings: Mapping = field(default_factory=dict)


def is_timm_name(name: str) -> bool:
    """Whether timm has this architecture, with or without the tag of its weights."""
    return re.fullmatch(r"[\w.\-]+", name) is not None and timm.is_model(name)


def unknown_name(name: str) -> InputError:
    """The error for what is neither a file, nor a name of the catalogue, nor one of timm's."""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        hint = f"; a repository of the hub in timm's format is hf-hub:{name}"
        hint += ", one of transformers is downloaded first (hf download), then give its folder"
    else:
        close = close_names(name)
        hint = f"; close names: {', '.join(close)}" if close else ""
    shown = name if len(name) <= 100 else f"{name[:100]}..."
    return InputError(
        f"unknown model {shown!r}: expected a timm model name, a name of mimrefiner models, or an "
        f"existing file or folder of weights{hint}"
    )


def close_names(name: str) -> list[str]:
    """At most five names of models that are spelt nearly like ``name``.

    >>> close_names("VIT_TINY_PATCH16_24")[0]
    'vit_tiny_patch16_224'
    """
    known = [*BY_NAME, *timm.list_models(), *timm.list_pretrained()]
    within = timm.list_models(f"*{name.lower().split('.')[0]}*")
    return list(dict.fromkeys([*get_close_matches(name.lower(), known, 5, 0.75), *within]))[:5]


def named(name: str, image_size: int | None, pretrained: bool) -> nn.Module:
    """The encoder that timm, or a repository of the hub (``hf-hub:OWNER/NAME``), has by ``name``.

    Raises:
        InputError: an unknown name, no network, or no weights.
    """
    plan = Plan(name)
    if HUB.match(name):
        plan = Plan(f"hf-hub:{name.split(':', 1)[1]}")
    elif not is_timm_name(name):
        raise unknown_name(name)
    try:
        return _sized(plan, image_size, pretrained)
    except RuntimeError as error:
        if "Invalid pretrained tag" in str(error):
            base, tags = name.split(".")[0], timm.list_pretrained(f"{name.split('.')[0]}.*")
            raise InputError(
                f"timm has no weights {name!r}; of {base} it has {', '.join(tags) or 'none'}"
            ) from error
        if HUB.match(name):
            raise InputError(f"could not load {name} ({first_line(error)})") from error
        if not timm.models.is_model_pretrained(name):
            raise InputError(
                f"{name} has no pre-trained weights in timm: pass pretrained=False for random ones"
            ) from error
        raise
    except (OSError, AssertionError) as error:
        raise InputError(
            f"could not load {name} ({first_line(error)}): without a network use pretrained=False "
            "(--no-pretrained) or a local file; the patch size must divide image sizes"
        ) from error


def _sized(plan: Plan, image_size: int | None, pretrained: bool) -> nn.Module:
    """Weights are read at their own size; positions that are added are then resized."""
    if pretrained and image_size is not None:
        encoder = create(plan, pretrained=True)
        if has_added_positions(encoder):
            return encoder
    return create(plan, image_size, pretrained=pretrained)


def create(plan: Plan, image_size: int | None = None, *, pretrained: bool = False) -> nn.Module:
    """A timm model in eval mode, with as many wishes about its size as its family takes."""
    how = {"pretrained": pretrained, "num_classes": 0, **plan.arguments}
    settings = {"num_classes": 0} if plan.settings else {}
    known = {part.name for part in fields(PretrainedCfg)}
    settings |= {key: value for key, value in plan.settings.items() if key in known}
    if settings:
        how["pretrained_cfg_overlay"] = settings
    size = {} if image_size is None else {"img_size": image_size}
    # Hiera has no dynamic size, ConvNeXt no size of its own
    for options in ({"dynamic_img_size": True, **size}, size):
        try:
            encoder = timm.create_model(plan.name, **(how | options)).eval()
            break
        except TypeError:
            continue
    else:
        encoder = timm.create_model(plan.name, **how).eval()
    cfg = {key: x for key, x in encoder.pretrained_cfg.items() if key != "state_dict"}
    name = plan.name if not HUB.match(plan.name) else cfg["architecture"]
    encoder.pretrained_cfg = {**cfg, "architecture": name}
    if plan.arguments:
        encoder.pretrained_cfg["model_args"] = dict(plan.arguments)
    return encoder


def has_added_positions(encoder: nn.Module) -> bool:
    """Whether it is a ViT with learned positions that are added to its patches."""
    return isinstance(encoder, VisionTransformer) and encoder.pos_embed is not None


def resize_positions(encoder: VisionTransformer, image_size: int) -> None:
    """Change the input size (pixels, square) for good.

    Positions are resized bicubically, as the official codes do: without antialiasing, but for
    models with register tokens.
    """
    old = encoder.patch_embed.grid_size
    prefix = 0 if encoder.no_embed_class else encoder.num_prefix_tokens
    encoder.patch_embed.set_input_size(img_size=image_size)
    positions = resample_abs_pos_embed(
        encoder.pos_embed.detach(),
        list(encoder.patch_embed.grid_size),
        list(old),
        num_prefix_tokens=prefix,
        antialias=encoder.reg_token is not None,
    )
    encoder.pos_embed = nn.Parameter(positions, encoder.pos_embed.requires_grad)


# ---- weights of a file


def with_file(plan: Plan, path: Path, image_size: int | None, pretrained: bool) -> nn.Module:
    """The encoder of ``plan`` with the weights in ``path``.

    Wrappers, heads and foreign names are dealt with as :mod:`mimrefiner.models.keys` says, then by
    timm's own converter of the family.

    Raises:
        InputError: a file that cannot be read, or whose tensors do not fit.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist or is no file: expected weights of {plan.name}")
    if not pretrained:
        return create(plan, image_size)
    skeleton = _skeleton(plan)
    if path.suffix == ".npz" and hasattr(skeleton, "load_pretrained"):
        encoder = create(plan)
        with _fitting(path, plan.name):
            encoder.load_pretrained(str(path))
        return encoder
    expected = {name: x.shape for name, x in skeleton.state_dict().items()}
    file = read_checkpoint(path)
    found = find_encoder(file, expected)
    if found is None or 2 * len(found.tensors.keys() & expected) < len(expected):
        other = find_encoder(file)
        if other is not None and has_other_names(other.tensors):
            found = Found(by_timm_names(other.tensors), other.where, other.left_out)
        else:  # timm's converters know OpenCLIP's names and more
            found = Found(largest_holder(file), "", {})
    found.say(str(path))
    return with_tensors(plan, found.tensors, path, image_size, skeleton)


def with_tensors(
    plan: Plan,
    tensors: dict[str, Tensor],
    path: Path,
    image_size: int | None,
    skeleton: nn.Module | None = None,
) -> nn.Module:
    """The encoder of ``plan`` with the weights ``tensors``, read from ``path``."""
    skeleton = skeleton or _skeleton(plan)
    expected = skeleton.state_dict()
    floats = {name for name, x in expected.items() if x.is_floating_point()}
    check_numbers({name: x for name, x in tensors.items() if name in floats}, path)
    _check_patch(skeleton, tensors, path, plan.name)
    size = _own_size(skeleton, tensors)
    if any(".mlp.w12." in key or key == "register_tokens" for key in tensors):
        tensors = {"mask_token": torch.zeros(1), **tensors}  # by which timm knows DINOv2's names
    weights = {"state_dict": tensors, "label_offset": 0, "custom_load": False, "num_classes": 0}
    full = Plan(plan.name, plan.arguments, {**plan.settings, **weights})
    with _fitting(path, plan.name):
        encoder = create(full, size or image_size, pretrained=True)
    if size:
        encoder.pretrained_cfg["input_size"] = (3, size, size)
    return encoder


@contextmanager
def _fitting(path: Path, name: str) -> Iterator[None]:
    """Within it, an error of timm's becomes one line that names the file."""
    try:
        yield
    except InputError:
        raise
    except UNFIT as error:
        why = " ".join(str(error).split()) or type(error).__name__
        why = why[:300] + " ..." * (len(why) > 300)
        raise InputError(f"{path} does not fit timm's {name}: {why}") from error


def _skeleton(plan: Plan) -> nn.Module:
    """The model without memory, for its names and shapes."""
    try:
        with torch.device("meta"):
            return create(plan)
    except (RuntimeError, NotImplementedError):  # a family that computes while it is built
        return create(plan)


def _check_patch(skeleton: nn.Module, tensors: Mapping[str, Tensor], path: Path, name: str) -> None:
    """timm would resize the patches of another patch size without a word."""
    ours, theirs = (
        part.get("patch_embed.proj.weight") for part in (skeleton.state_dict(), tensors)
    )
    if ours is None or theirs is None or theirs.ndim != 4 or ours.ndim != 4:
        return
    if ours.shape != theirs.shape:
        raise InputError(
            f"{path} does not fit timm's {name}: its patches are {tuple(theirs.shape)} (width, "
            f"channels, height, width in pixels), the model's {tuple(ours.shape)}"
        )


def _own_size(skeleton: nn.Module, tensors: Mapping[str, Tensor]) -> int | None:
    """The image size at which a file's added positions were trained, pixels; None without any."""
    positions = tensors.get("pos_embed")
    if not has_added_positions(skeleton) or positions is None or positions.ndim != 3:
        return None
    patch = skeleton.patch_embed.patch_size[0]
    for prefix in (0, 1, skeleton.num_prefix_tokens):
        side = round((positions.shape[1] - prefix) ** 0.5)
        if side**2 + prefix == positions.shape[1]:
            return side * patch
    return None


# ---- folders, and DINOv2's files


def weights_in(folder: Path) -> Path:
    """The file of weights in a folder.

    Raises:
        InputError: none, several, or weights in several parts.
    """
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    if parts := sorted(folder.glob("*.index.json")):
        raise InputError(
            f"{folder} holds weights in several parts ({parts[0].name}): join them, such as by "
            "from_pretrained(FOLDER).save_pretrained(NEW, max_shard_size='100GB') of transformers"
        )
    files = [f for f in sorted(folder.iterdir()) if f.suffix in (".safetensors", ".bin", ".pth")]
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise InputError(
            f"{folder}: expected one file of weights such as {WEIGHTS[0]}, got {found}"
        )
    return files[0]


def read_config(folder: Path, name: str = "config.json") -> dict:
    """The JSON file ``name`` in ``folder``; InputError where it is none."""
    try:
        config = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if (folder / ".metadata").is_file():
            raise InputError(
                f"{folder} is a distributed checkpoint of torch: join it by python -m "
                f"torch.distributed.checkpoint.format_utils dcp_to_torch {folder} FILE.pth"
            ) from None
        raise InputError(
            f"{folder} has no {name}: expected a folder as timm or transformers write it "
            "(give a file of weights, or TIMM_NAME@FILE)"
        ) from None
    except ValueError as error:
        raise InputError(f"{folder / name} is no JSON: {first_line(error)}") from error
    if not isinstance(config, dict):
        raise InputError(f"{folder / name}: expected a dictionary, got {type(config).__name__}")
    return config


def plan_of_config(config: Mapping, folder: Path) -> Plan:
    """What timm's ``config.json`` says.

    Raises:
        InputError: no architecture, or one that timm does not have.
    """
    settings = config.get("pretrained_cfg") or config
    name = config.get("architecture") or settings.get("architecture")
    if not isinstance(name, str) or not timm.is_model(name):
        raise InputError(
            f"{folder / 'config.json'}: expected an architecture of timm's, got {name!r}"
        )
    kept = {key: settings[key] for key in (*INPUT, "input_size") if key in settings}
    arguments = dict(config.get("model_args") or {})
    arguments.pop("num_classes", None)
    return Plan(name, arguments, kept)


def input_of_processor(folder: Path) -> dict:
    """How transformers' ``preprocessor_config.json`` prepares an image; empty without the file."""
    if not (folder / "preprocessor_config.json").is_file():
        return {}
    config = read_config(folder, "preprocessor_config.json")
    found = {}
    if config.get("do_normalize", True) and {"image_mean", "image_std"} <= config.keys():
        found |= {key: _colours(config[f"image_{key}"], folder) for key in ("mean", "std")}
    if (filter_ := {2: "bilinear", 3: "bicubic"}.get(config.get("resample"))) is not None:
        found["interpolation"] = filter_
    sides = [_side(config.get(key)) for key in ("crop_size", "size")]
    if config.get("do_center_crop") and all(sides):
        found |= {"crop_pct": sides[0] / sides[1], "crop_mode": "center"}
    elif sides[1]:
        found |= {"crop_pct": 1.0, "crop_mode": "squash"}  # transformers' ViT takes no crop
    return found


def _colours(value, folder: Path) -> tuple[float, ...]:
    """One number for each colour; transformers writes a single one where they are equal."""
    numbers = value if isinstance(value, list) else [value] * 3
    if len(numbers) != 3 or not all(isinstance(x, int | float) for x in numbers):
        raise InputError(
            f"{folder / 'preprocessor_config.json'}: expected image_mean and image_std of three "
            f"colours, got {value!r}"
        )
    return tuple(numbers)


def _side(size) -> int | None:
    """One side in pixels from what transformers calls a size."""
    if isinstance(size, Mapping):
        size = size.get("shortest_edge") or size.get("height")
    return size if isinstance(size, int) else None


def is_dinov2(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are DINOv2's tensors, by the original names or by timm's."""
    weight = tensors.get("patch_embed.proj.weight")
    own = {"mask_token", "register_tokens", "reg_token"} & tensors.keys()
    return "blocks.0.ls1.gamma" in tensors and (
        own or (weight is not None and weight.shape[-1] == 14)
    )


def dinov2_plan(tensors: Mapping[str, Tensor], path: Path, num_heads: int | None) -> Plan:
    """How timm builds DINOv2 in the size of these tensors."""
    dim, _, _, patch = tensors["patch_embed.proj.weight"].shape
    heads = num_heads or HEADS.get(dim)
    if heads is None:
        raise InputError(
            f"{path}: DINOv2 has no model of width {dim}; give num_heads= (--num-heads)"
        )
    depth = 1 + max(int(m[1]) for key in tensors if (m := re.match(r"blocks\.(\d+)\.", key)))
    gated = "blocks.0.mlp.w12.weight" in tensors
    hidden = next(
        (
            tensors[name].shape[0]
            for name in ("blocks.0.mlp.w12.weight", "blocks.0.mlp.fc1.weight")
            if name in tensors
        ),
        4 * dim,
    )
    gated |= "blocks.0.mlp.fc2.weight" in tensors and (
        tensors["blocks.0.mlp.fc2.weight"].shape[1] != hidden
    )
    registers = tensors.get("register_tokens", tensors.get("reg_token"))
    name = f"vit_{'giant' if gated else 'base'}_patch14"
    name += "_dinov2" if registers is None else "_reg4_dinov2"
    arguments = {"embed_dim": dim, "depth": depth, "num_heads": heads, "patch_size": patch}
    arguments["mlp_ratio"] = (hidden + 0.5) / dim  # timm rounds down
    if registers is not None:
        arguments["reg_tokens"] = registers.shape[1]
    return Plan(name, arguments)
