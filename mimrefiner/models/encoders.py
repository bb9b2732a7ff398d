"""Encoders: by timm name, by name of the catalogue, or from a file in any published layout."""

import copy
import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path

import timm.data
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mimrefiner.config import ViTConfig
from mimrefiner.device import dtype_of, seeded
from mimrefiner.errors import InputError
from mimrefiner.files import ASSETS, atomic_file, cache_folder, expanded, first_line
from mimrefiner.models import from_timm
from mimrefiner.models.catalogue import BY_NAME, CatalogueRow
from mimrefiner.models.from_timm import HUB, INPUT, LOCAL
from mimrefiner.models.keys import by_timm_names, find_encoder, has_other_names
from mimrefiner.models.layouts import ReleasedViT, ViTShape, check_sizes, convert
from mimrefiner.models.pools import blank_pass
from mimrefiner.models.tensors import read_checkpoint, read_metadata
from mimrefiner.models.tokens import input_size, settings_of
from mimrefiner.models.weights import (
    OWN,
    is_own_file,
    plain_vit,
    read_encoder_file,
    rebuilt,
    vit_config,
)

logger = logging.getLogger(__name__)

SUFFIXES = (".safetensors", ".pth", ".pt", ".th", ".tar", ".ckpt", ".bin", ".npz", ".pkl")
LONGEST_NAME = 240  # bytes that file systems take, less a suffix
# transformers' kinds that are read, with the epsilon of their LayerNorms where no config says it
TRANSFORMERS = {
    "vit": 1e-12,
    "vit_mae": 1e-12,
    "ijepa": 1e-12,
    "dinov2": 1e-6,
    "dinov2_with_registers": 1e-6,
}


def build_vit(
    config: ViTConfig, *, seed: int = 0, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
) -> nn.Module:
    """A timm VisionTransformer (pre-norm, cls token, learned positions) with random weights.

    Args:
        config: the sizes.
        seed: draws the weights.
        mean, std: normalise the images that the encoder will see, one number per channel.

    >>> import mimrefiner as mr
    >>> encoder = mr.build_vit(mr.ViTConfig(dim=32, depth=2, num_heads=2), seed=1)
    >>> encoder.embed_dim, len(encoder.blocks)
    (32, 2)
    """
    encoder = plain_vit(config, seed)
    encoder.pretrained_cfg = {
        "architecture": OWN,
        "input_size": (3, config.image_size, config.image_size),
        "mean": tuple(mean),
        "std": tuple(std),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
    }
    return encoder.eval()


def random_twin(encoder: nn.Module, seed: int = 0) -> nn.Module:
    """An encoder like ``encoder`` that knows nothing: its weights are drawn from ``seed``.

    The model's own rule draws them: the twin of an encoder that :func:`build_vit` made is what
    ``build_vit`` makes of this seed. Sine-cosine positions are no weights and stay.

    >>> encoder = load_encoder("simmim_digits")
    >>> twin, start = random_twin(encoder, 3), build_vit(vit_config(encoder), seed=3)
    >>> torch.equal(twin.blocks[0].mlp.fc1.weight, start.blocks[0].mlp.fc1.weight)
    True
    """
    if encoder.pretrained_cfg.get("architecture") == OWN:
        twin = build_vit(vit_config(encoder), seed=seed)
        twin.pretrained_cfg = dict(encoder.pretrained_cfg)
        return twin
    twin = copy.deepcopy(encoder)
    with seeded(seed), torch.no_grad():
        if hasattr(twin, "init_weights"):
            twin.init_weights()
        else:
            for module in twin.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
                else:
                    for x in module.parameters(recurse=False):  # position embeddings, layer scales
                        nn.init.trunc_normal_(x, std=0.02)
        if isinstance(encoder, ReleasedViT) and encoder.shape.fixed_positions:
            twin.pos_embed.copy_(encoder.pos_embed)
    return twin


@dataclass(frozen=True)
class _Wishes:
    """What :func:`load_encoder` is asked for beside the source."""

    image_size: int | None = None
    num_heads: int | None = None
    pretrained: bool = True
    dtype: torch.dtype | None = None
    like: str | None = None
    row: CatalogueRow | None = None


def load_encoder(
    source: str | Path,
    *,
    file: str | Path | None = None,
    image_size: int | None = None,
    num_heads: int | None = None,
    pretrained: bool = True,
    dtype: torch.dtype | str | None = None,
    like: str | None = None,
) -> nn.Module:
    """Load an encoder in eval mode, without a classifier.

    Its ``pretrained_cfg`` carries mean, std, input size and interpolation, so that neither
    :func:`extract_features` nor the views need a transform. ViTs accept every image size that the
    patch size divides in the forward pass, ConvNeXt every size, Hiera its own size only.

    Args:
        source: a timm model name (``vit_base_patch16_224.mae``, also as ``timm/NAME``); a
            repository of the hub (``hf-hub:OWNER/NAME``); a name of the catalogue
            (``d2v2_refined_h14``; see ``mimrefiner models``), downloaded once into
            ``$MIMREFINER_CACHE``; a checkpoint that comes with the package (``simmim_digits``); the
            path of a file in any layout of :data:`mimrefiner.models.layouts.LAYOUTS`, of
            transformers' ViT, ViTMAE or DINOv2, in whatever wrapper; or a folder with
            ``config.json`` and weights, as timm or transformers write it.
        file: weights for the architecture that ``source`` names, in place of timm's own;
            ``"NAME@FILE"`` as the source is the same.
        image_size: side of the input in pixels; None keeps the model's own. Position embeddings
            are resized.
        num_heads: attention heads, where a file does not tell (files of this package do).
        pretrained: False gives random weights of the same shape.
        dtype: converts the weights tensor by tensor, such as to torch.bfloat16, or "bfloat16";
            None: float32.
        like: a timm name whose mean, std, interpolation and crop are taken; None takes those of the
            file or of the name, and ImageNet's, with a word, where neither says.

    Raises:
        InputError: an unknown name, a missing or damaged file, weights that do not fit, a size that
            the patch size does not divide, or no network.

    >>> import mimrefiner as mr
    >>> encoder = mr.load_encoder("simmim_digits")
    >>> len(encoder.blocks), encoder.pretrained_cfg["input_size"]
    (12, (3, 32, 32))
    """
    dtype, source = dtype_of("dtype", dtype), _checked(source)
    if image_size is not None and not (isinstance(image_size, Integral) and image_size >= 1):
        raise InputError(f"image_size must be a whole number >= 1, got {image_size}")
    if num_heads is not None and not (isinstance(num_heads, Integral) and num_heads >= 1):
        raise InputError(f"num_heads must be a whole number >= 1, got {num_heads!r}")
    settings = {} if like is None else _input_of(like)
    wishes = _Wishes(image_size, num_heads, pretrained, dtype, like)
    name, path = (str(source), file) if file is not None else _parted(source)
    encoder = _by_name(name, wishes) if path is None else _with_file(name, Path(path), wishes)
    encoder = with_size(encoder, image_size)
    encoder.pretrained_cfg = {**encoder.pretrained_cfg, **settings, "loaded_from": str(source)}
    return encoder


def _checked(source: str | Path) -> str | Path:
    """``source``, if it may name a model."""
    if isinstance(source, nn.Module):
        raise InputError(
            "load_encoder takes a name or a path, and this is a model already: give it to "
            "extract_features, probe or refine as it is"
        )
    if not isinstance(source, str | Path) or not str(source).strip():
        raise InputError(f"expected the name of a model, or the path of a file, got {source!r}")
    if any(len(part.encode()) > LONGEST_NAME for part in str(source).split("/")):
        raise from_timm.unknown_name(str(source))
    return source


def _parted(source: str | Path) -> tuple[str, str | None]:
    """NAME@FILE as (NAME, FILE); anything else as (source, None)."""
    name, at, path = str(source).partition("@")
    if not at or not path or HUB.match(name) or expanded(source).exists():
        return str(source), None
    plain = name.removeprefix("timm/")
    if name in BY_NAME or from_timm.is_timm_name(plain):
        return name, path
    if "/" in plain or Path(plain).suffix in SUFFIXES:
        return str(source), None
    raise from_timm.unknown_name(plain)


def _input_of(like: str) -> dict:
    """How the timm model ``like`` prepares an image."""
    name = str(like).removeprefix("timm/")
    try:
        cfg = timm.get_pretrained_cfg(name) if from_timm.is_timm_name(name) else None
    except RuntimeError as error:
        raise InputError(f"like: timm has no weights {name!r}") from error
    if cfg is None:
        raise InputError(f"like (--like) must be a timm model name, got {like!r}")
    return {key: getattr(cfg, key) for key in INPUT if getattr(cfg, key, None) is not None}


def _by_name(source: str, wishes: _Wishes) -> nn.Module:
    """The encoder that ``source`` names: a row of the catalogue, a file, a folder, timm's."""
    if "://" in source:
        raise InputError(f"{source} is an address: download the file and give its path")
    row, path = BY_NAME.get(source), _file_of(source)
    if path is not None:
        config = path.parent / "config.json"
        if path.name in from_timm.WEIGHTS and config.is_file():
            return _from_folder(path.parent, wishes)
        return _from_file(path, wishes)
    if row and row.url:
        return _published(row, wishes.pretrained, wishes.dtype)
    folder = expanded(source.removeprefix(LOCAL))
    # Results often lie in a folder that bears the name of a model
    is_model = (folder / "config.json").is_file() or not from_timm.is_timm_name(source)
    if source.startswith(LOCAL) or (folder.is_dir() and is_model):
        return _from_folder(folder, wishes)
    name = source.removeprefix("timm/")
    if name != source and not from_timm.is_timm_name(name):
        name = f"hf-hub:{source}"
    if wishes.pretrained and name in BY_NAME:
        logger.info("%s: licence %s, %s/%s", name, BY_NAME[name].licence, BY_NAME[name].page, name)
    encoder = from_timm.named(name, wishes.image_size, wishes.pretrained)
    return _same_heads(encoder, wishes, name).to(wishes.dtype)


def _with_file(name: str, path: Path, wishes: _Wishes) -> nn.Module:
    """The architecture ``name`` of timm's or of the catalogue with the weights in ``path``."""
    path, row = expanded(path), BY_NAME.get(name)
    if row and (row.url or not from_timm.is_timm_name(name)):
        given = replace(wishes, image_size=None, num_heads=wishes.num_heads or row.heads, row=row)
        return _from_file(path, given, known=True)
    plain = name.removeprefix("timm/")
    if not from_timm.is_timm_name(plain):
        raise from_timm.unknown_name(plain)
    if path.is_dir():
        path = from_timm.weights_in(path)
    plan = from_timm.Plan(plain)
    encoder = from_timm.with_file(plan, path, wishes.image_size, wishes.pretrained)
    return _same_heads(encoder, wishes, name).to(wishes.dtype)


def _same_heads(encoder: nn.Module, wishes: _Wishes, name: str) -> nn.Module:
    """``encoder``, unless another number of attention heads was asked for than it has."""
    attention = getattr(next(iter(getattr(encoder, "blocks", None) or [None])), "attn", None)
    heads = getattr(attention, "num_heads", None)
    if wishes.num_heads not in (None, heads):
        raise InputError(f"{name} has {heads} attention heads, got num_heads={wishes.num_heads}")
    return encoder


def _from_folder(folder: Path, wishes: _Wishes) -> nn.Module:
    """A folder with ``config.json`` and weights, as timm or transformers write it."""
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: expected one with config.json and weights")
    config = from_timm.read_config(folder)
    if isinstance(config.get("model_type"), str) and "architecture" not in config:
        return _from_transformers_folder(folder, config, wishes)
    plan = from_timm.plan_of_config(config, folder)
    if wishes.pretrained:
        path = from_timm.weights_in(folder)
        encoder = from_timm.with_file(plan, path, wishes.image_size, True)
    else:
        encoder = from_timm.create(plan, wishes.image_size)
    return _same_heads(encoder, wishes, str(folder)).to(wishes.dtype)


def _from_transformers_folder(folder: Path, config: Mapping, wishes: _Wishes) -> nn.Module:
    kind = config["model_type"]
    if kind not in TRANSFORMERS:
        raise InputError(
            f"{folder} holds transformers' {kind!r}: of transformers' models "
            f"{', '.join(TRANSFORMERS)} can be loaded"
        )
    activation = config.get("hidden_act", "gelu")
    if activation not in ("gelu", "gelu_python"):  # both are the exact one, as timm's is
        raise InputError(
            f"{folder} holds a {kind!r} with hidden_act {activation!r}: only gelu can be loaded"
        )
    heads = wishes.num_heads or config.get("num_attention_heads")
    settings = from_timm.input_of_processor(folder)
    like = wishes.like or ("its preprocessor_config.json" if "mean" in settings else None)
    more = _Wishes(wishes.image_size, heads, wishes.pretrained, wishes.dtype, like)
    encoder = _from_published_file(from_timm.weights_in(folder), more)
    _set_eps(encoder, config.get("layer_norm_eps", TRANSFORMERS[kind]))
    encoder.pretrained_cfg = {**encoder.pretrained_cfg, **settings}
    return encoder


def _set_eps(encoder: nn.Module, eps: float) -> None:
    """Let all LayerNorms of ``encoder`` add ``eps`` to the variance."""
    for module in encoder.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps
    if isinstance(encoder, ReleasedViT):
        encoder.shape = replace(encoder.shape, norm_eps=eps)


def _file_of(source: str | Path) -> Path | None:
    """The file that ``source`` means, there or not; None where it is a name."""
    packaged = ASSETS / f"{source}.safetensors"
    path = packaged if packaged.is_file() else expanded(source)
    # Some timm names end in ".pt"
    named = str(source) in BY_NAME or timm.models.is_model_pretrained(str(source))
    return path if path.is_file() or (path.suffix in SUFFIXES and not named) else None


def _published(row: CatalogueRow, pretrained: bool, dtype: torch.dtype | None) -> nn.Module:
    if pretrained:
        return _from_file(fetch(row), _Wishes(num_heads=row.heads, dtype=dtype), known=True)
    return released_encoder(ReleasedViT(row_shape(row)), dtype)


def row_shape(row: CatalogueRow) -> ViTShape:
    """The sizes of a published file's model."""
    d2v2, crossmae = row.name.startswith("d2v2"), row.name == "crossmae_l16"
    trained_positions = row.family in ("iBOT", "Mugs", "DINO", "MAWS") or row.name == "mae_2b14"
    return ViTShape(
        row.image_size,
        row.patch,
        row.dim,
        row.depth,
        row.heads,
        4 * row.dim,
        row.cls is not None,
        d2v2,
        final_norm=not (d2v2 or crossmae),
        fixed_positions=not trained_positions,
    )


def fetch(row: CatalogueRow) -> Path:
    """The published file of ``row``, downloaded once; its licence is announced."""
    path = cache_folder() / "weights" / f"{row.name}{Path(row.url).suffix}"
    logger.info("%s: licence %s, %s", row.name, row.licence, row.page)
    if not path.is_file():
        try:
            with atomic_file(path) as temporary:
                torch.hub.download_url_to_file(
                    row.url, str(temporary), row.sha256 or None, progress=sys.stderr.isatty()
                )
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"could not download {row.url} ({first_line(error)}): "
                "fetch it elsewhere and give its path"
            ) from error
    return path


def _from_file(path: Path, wishes: _Wishes, *, known: bool = False) -> nn.Module:
    """The encoder in a file that tells its sizes.

    Args:
        known: whether its images are prepared as those of all published models.
    """
    if not path.is_file():
        raise InputError(
            f"{path} does not exist or is no file: expected a checkpoint or a timm model name"
        )
    if is_own_file(path):
        return _from_own_file(path, wishes).to(wishes.dtype)
    data = read_metadata(path).get("mimrefiner")  # exported for timm by this package
    encoder = _from_published_file(path, wishes, known=known or data is not None)
    if data:
        encoder.pretrained_cfg = {**encoder.pretrained_cfg, **json.loads(data)}
    return encoder


def _from_own_file(path: Path, wishes: _Wishes) -> nn.Module:
    tensors, metadata = read_encoder_file(path)
    try:
        config, data = ViTConfig(**json.loads(metadata["vit"])), json.loads(metadata["data"])
        encoder = rebuilt(metadata)
    except InputError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} is damaged: its metadata do not say what it holds ({first_line(error)})"
        ) from error
    check_sizes(wishes.row, config.dim, config.depth, config.patch_size, str(path))
    if wishes.num_heads not in (None, config.num_heads):
        raise InputError(
            f"{path} has {config.num_heads} attention heads, got num_heads={wishes.num_heads}"
        )
    if wishes.pretrained:
        _check_shapes(path, encoder, tensors)
        encoder.load_state_dict(tensors)
    size = (3, config.image_size, config.image_size)
    encoder.pretrained_cfg = {**encoder.pretrained_cfg, **data, "input_size": size}
    return encoder


def _check_shapes(path: Path, encoder: nn.Module, tensors: dict[str, Tensor]) -> None:
    expected = {name: tuple(x.shape) for name, x in encoder.state_dict().items()}
    found = {name: tuple(x.shape) for name, x in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise InputError(
                f"{path} is damaged: {name} should be {expected.get(name)}, got {found.get(name)}"
            )


def _from_published_file(path: Path, wishes: _Wishes, *, known: bool = False) -> nn.Module:
    """A plain ViT, or DINOv2, from a file without a name for its architecture."""
    file = read_checkpoint(path)
    if wishes.row is None and (encoder := _dinov2(file, path, wishes)) is not None:
        return encoder
    shape, tensors, _ = convert(file, str(path), wishes.num_heads, wishes.row)
    del file  # so that each tensor can go when it has been copied
    if not known and wishes.like is None:
        logger.warning(
            "%s does not say how its images are prepared: assumed are ImageNet's mean and std and "
            "a crop of 0.875; like= (--like) takes those of a timm model",
            path,
        )
    if not wishes.pretrained:
        return released_encoder(ReleasedViT(shape), wishes.dtype)
    return _filled(shape, tensors, path, wishes.dtype)


def _dinov2(file: Mapping, path: Path, wishes: _Wishes) -> nn.Module | None:
    """DINOv2 in the size of the file's tensors, which tell all but the attention heads."""
    found = find_encoder(file)
    if found is None:
        return None
    tensors = found.tensors
    tensors = by_timm_names(tensors) if has_other_names(tensors) else tensors
    if not from_timm.is_dinov2(tensors):
        return None
    found.say(str(path))
    plan = from_timm.dinov2_plan(tensors, path, wishes.num_heads)
    logger.info("%s holds a DINOv2 model of width %d", path, plan.arguments["embed_dim"])
    if not wishes.pretrained:
        return from_timm.create(plan, wishes.image_size).to(wishes.dtype)
    return from_timm.with_tensors(plan, tensors, path, None).to(wishes.dtype)


def _filled(
    shape: ViTShape, tensors: dict[str, Tensor], path: Path, dtype: torch.dtype | None
) -> nn.Module:
    """Build without memory, then fill tensor by tensor, so that the weights exist once."""
    with torch.device("meta"):
        encoder = ReleasedViT(shape)
    expected = {name: x.shape for name, x in encoder.state_dict().items()}
    for name, x in tensors.items():
        # A matrix that is stored transposed has as many numbers: only a token may be reshaped
        same = x.numel() == expected[name].numel() and name == "cls_token"
        if x.shape != expected[name] and not same:
            raise InputError(
                f"{path}: {name} should be {tuple(expected[name])}, got {tuple(x.shape)}"
            )
    for name in list(tensors):
        x = tensors.pop(name).reshape(expected[name])
        x = x.to(dtype or torch.float32, copy=True)  # a copy, because the file stays mapped
        encoder.load_state_dict({name: x}, strict=False, assign=True)
    return released_encoder(encoder, dtype)


def released_encoder(encoder: ReleasedViT, dtype: torch.dtype | None = None) -> nn.Module:
    """``encoder`` in eval mode, with the input settings that all published models share."""
    shape = encoder.shape
    encoder.pretrained_cfg = {
        "architecture": "released_vit",
        "input_size": (3, shape.image_size, shape.image_size),
        "mean": timm.data.IMAGENET_DEFAULT_MEAN,
        "std": timm.data.IMAGENET_DEFAULT_STD,
        "interpolation": "bicubic",
        "crop_pct": 0.875,  # 224 of 256, 448 of 512
        "crop_mode": "center",
    }
    return encoder.to(dtype).eval()


def with_size(encoder: nn.Module, image_size: int | None) -> nn.Module:
    """``encoder``, changed to images of ``image_size`` pixels a side; None leaves it as it is.

    Raises:
        InputError: a size that the patch size does not divide.
    """
    if image_size is None:
        return encoder
    if type(encoder).__name__ == "Hiera":
        what, patch = "the last stage's stride", encoder.feature_info[-1]["reduction"]
    else:
        sides = getattr(getattr(encoder, "patch_embed", None), "patch_size", 1)
        what, patch = "the patch size", sides if isinstance(sides, int) else sides[0]
    if image_size % patch:
        raise InputError(f"image size {image_size} is not divisible by {what} {patch}")
    if from_timm.has_added_positions(encoder) and not isinstance(encoder, ReleasedViT):
        from_timm.resize_positions(encoder, image_size)
    elif hasattr(encoder, "set_input_size"):
        encoder.set_input_size(img_size=image_size)
    size = (3, image_size, image_size)
    encoder.pretrained_cfg = {**encoder.pretrained_cfg, "input_size": size}
    if not isinstance(encoder, VisionTransformer):
        _try_size(encoder)
    return encoder


def _try_size(encoder: nn.Module) -> None:
    """InputError where images of the size that was set do not pass."""
    size = input_size(encoder)
    try:
        if size != encoder.pretrained_cfg["input_size"]:
            raise ValueError(f"it stays at {size[-1]} px")
        blank_pass(encoder)
    except (RuntimeError, ValueError, AssertionError, TypeError, IndexError) as error:
        raise InputError(
            f"{type(encoder).__name__} does not take images of "
            f"{encoder.pretrained_cfg['input_size'][-1]} px ({first_line(error)[:200]})"
        ) from error


def eval_transform(encoder: nn.Module):
    """The encoder's own preparation of an image: resize, centre crop, normalise.

    Takes a PIL image and returns (3, height, width), as ``pretrained_cfg`` says and in the size
    that the encoder has now (:func:`mimrefiner.models.tokens.input_size`).
    """
    size = input_size(encoder)
    if size[0] != 3:
        raise InputError(f"images have 3 channels here, and this encoder takes {size[0]}")
    cfg = {**settings_of(encoder), "input_size": size}
    return timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=cfg))


def normalisation(encoder: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the encoder's input, one number per channel each."""
    settings = settings_of(encoder)
    return tuple(settings["mean"]), tuple(settings["std"])
