"""Encoders: by timm name, by name of the table of models, or from a file in any published layout."""

import json
import sys
from numbers import Integral
from pathlib import Path

import timm.data
import torch
from torch import nn

from mimrefiner.config import ViTConfig
from mimrefiner.errors import InputError
from mimrefiner.files import ASSETS, atomic_file, cache_folder
from mimrefiner.models.catalogue import BY_NAME, Model
from mimrefiner.models.layouts import ReleasedViT, ViTShape, convert
from mimrefiner.models.weights import is_own_file, read_checkpoint, read_encoder_file, read_metadata

HALF = (0.5, 0.5, 0.5)


def build_vit(config: ViTConfig, *, seed: int = 0, mean=HALF, std=HALF) -> nn.Module:
    """A timm VisionTransformer (pre-norm, cls token, learned positions) with random weights drawn
    from ``seed``.

    ``mean`` and ``std`` are the normalisation it will be fed with.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = timm.models.VisionTransformer(
            img_size=config.image_size,
            patch_size=config.patch_size,
            embed_dim=config.dim,
            depth=config.depth,
            num_heads=config.num_heads,
            num_classes=0,
            global_pool="token",
            dynamic_img_size=True,
        )
    encoder.pretrained_cfg = {
        "architecture": "mimrefiner_vit",
        "input_size": (3, config.image_size, config.image_size),
        "mean": tuple(mean),
        "std": tuple(std),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
    }
    return encoder.eval()


def load_encoder(
    source: str | Path,
    *,
    image_size: int | None = None,
    num_heads: int | None = None,
    pretrained: bool = True,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Load an encoder in eval mode, without a classifier.

    Its ``pretrained_cfg`` carries mean, std, input size and interpolation, so that neither
    :func:`extract_features` nor the views need a transform. ViTs accept every image size that the
    patch size divides in the forward pass, ConvNeXt every size, Hiera its own size only.

    Args:
        source: a timm model name (``vit_base_patch16_224.mae``), a name of the table of models
            (``d2v2_refined_h14``; see ``mimrefiner models``), which is downloaded once into
            ``$MIMREFINER_CACHE``, the name of a checkpoint that comes with the package
            (``simmim_digits``), or the path of a file in any layout of
            :data:`mimrefiner.models.layouts.LAYOUTS`.
        image_size: input size in pixels, None for the model's own; position embeddings are resized.
        num_heads: attention heads, where a file does not tell (files of this package do).
        pretrained: False gives random weights of the same shape.
        dtype: of the weights, such as torch.bfloat16, converted tensor by tensor; None means
            float32.

    Raises:
        InputError: unknown name, missing or damaged file, a size the patch size does not divide, or
            no network.
    """
    if image_size is not None and not (isinstance(image_size, Integral) and image_size >= 1):
        raise InputError(f"image_size must be a whole number >= 1, got {image_size}")
    if num_heads is not None and num_heads < 1:
        raise InputError(f"num_heads must be >= 1, got {num_heads}")
    packaged = ASSETS / f"{source}.safetensors"
    path = packaged if packaged.is_file() else Path(source).expanduser()
    name = str(source)
    row = BY_NAME.get(name)
    named = row is not None or timm.models.is_model_pretrained(name)  # some timm names end in ".pt"
    if path.is_file() or (
        path.suffix in (".safetensors", ".pth", ".pt", ".th", ".tar") and not named
    ):
        return _load_file(path, image_size, num_heads, pretrained, dtype)
    if row and row.url:
        if pretrained:
            return _load_file(fetch(row), image_size, row.heads, True, dtype)
        return _with_size(_as_encoder(ReleasedViT(row_shape(row)), dtype), image_size)
    if row and pretrained:
        print(f"{name}: licence {row.licence}, {row.page}/{name}", file=sys.stderr)
    if not timm.is_model(name):
        close = timm.list_models(f"*{name.split('.')[0]}*")[:5]
        hint = f"; close names: {', '.join(close)}" if close else ""
        raise InputError(
            f"unknown model {name!r}: expected a timm model name or an existing .safetensors file{hint}"
        )
    try:
        encoder = _create(name, image_size, pretrained)
    except RuntimeError as error:
        if not timm.models.is_model_pretrained(name):
            raise InputError(
                f"{name} has no pre-trained weights in timm: pass pretrained=False for random ones"
            ) from error
        raise
    except (OSError, AssertionError) as error:
        raise InputError(
            f"could not load {name} ({_first_line(error)}): "
            "without a network use pretrained=False (--no-pretrained) or a local file; the patch size must divide image sizes"
        ) from error
    encoder.pretrained_cfg = {**encoder.pretrained_cfg, "architecture": name}
    return _with_size(encoder.to(dtype), image_size)


def row_shape(row: Model) -> ViTShape:
    """The sizes of a published file's model."""
    d2v2, crossmae = row.name.startswith("d2v2"), row.name == "crossmae_l16"
    fixed = row.family not in ("iBOT", "Mugs", "DINO", "MAWS") and row.name != "mae_2b14"
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
        fixed_positions=fixed,
    )


def fetch(row: Model) -> Path:
    """The published file of ``row``, downloaded once; its licence is shown on standard error."""
    path = cache_folder() / "weights" / f"{row.name}{Path(row.url).suffix}"
    print(f"{row.name}: licence {row.licence}, {row.page}", file=sys.stderr)
    if not path.is_file():
        try:
            with atomic_file(path) as temporary:
                torch.hub.download_url_to_file(
                    row.url, str(temporary), row.sha256 or None, progress=sys.stderr.isatty()
                )
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"could not download {row.url} ({_first_line(error)}): fetch it elsewhere and give its path"
            ) from error
    return path


def _create(name: str, image_size: int | None, pretrained: bool) -> nn.Module:
    size = {} if image_size is None else {"img_size": image_size}
    for options in ({"dynamic_img_size": True, **size}, size):
        try:
            return timm.create_model(name, pretrained=pretrained, num_classes=0, **options).eval()
        except (
            TypeError
        ):  # families without dynamic_img_size (Hiera), or without a size of their own (ConvNeXt)
            continue
    return timm.create_model(name, pretrained=pretrained, num_classes=0).eval()


def _load_file(
    path: Path, image_size: int | None, num_heads: int | None, pretrained: bool, dtype
) -> nn.Module:
    if not path.is_file():
        raise InputError(
            f"{path} does not exist or is no file: expected a checkpoint or a timm model name"
        )
    if not is_own_file(path):
        encoder = _load_published(path, num_heads, pretrained, dtype)
        if data := read_metadata(path).get("mimrefiner"):  # exported for timm by this package
            encoder.pretrained_cfg = {**encoder.pretrained_cfg, **json.loads(data)}
        return _with_size(encoder, image_size)
    tensors, metadata = read_encoder_file(path)
    try:
        config, data = ViTConfig(**json.loads(metadata["vit"])), json.loads(metadata["data"])
        architecture = metadata["architecture"]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} is damaged: its metadata do not say what it holds ({_first_line(error)})"
        ) from error
    if num_heads not in (None, config.num_heads):
        raise InputError(
            f"{path} has {config.num_heads} attention heads, got num_heads={num_heads}"
        )
    if metadata.get("released"):
        encoder = _as_encoder(ReleasedViT(ViTShape(**json.loads(metadata["released"]))), None)
    elif architecture == "mimrefiner_vit":
        encoder = build_vit(config)
    else:
        encoder = _create(architecture, config.image_size, pretrained=False)
        encoder.pretrained_cfg = {**encoder.pretrained_cfg, "architecture": architecture}
    if pretrained:
        expected = {name: tuple(x.shape) for name, x in encoder.state_dict().items()}
        found = {name: tuple(x.shape) for name, x in tensors.items()}
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise InputError(
                    f"{path} is damaged: {name} should be {expected.get(name)}, got {found.get(name)}"
                )
        encoder.load_state_dict(tensors)
    encoder.pretrained_cfg = {
        **encoder.pretrained_cfg,
        **data,
        "input_size": (3, config.image_size, config.image_size),
    }
    return _with_size(encoder.to(dtype), image_size)


def _load_published(
    path: Path, num_heads: int | None, pretrained: bool, dtype: torch.dtype | None
) -> nn.Module:
    """A model from a published file: built without memory, then filled tensor by tensor, so that
    weights exist once.
    """
    shape, tensors, _ = convert(read_checkpoint(path), str(path), num_heads)
    if not pretrained:
        return _as_encoder(ReleasedViT(shape), dtype)
    with torch.device("meta"):
        encoder = ReleasedViT(shape)
    expected = {name: x.shape for name, x in encoder.state_dict().items()}
    wrong = {
        name: tuple(x.shape)
        for name, x in tensors.items()
        if x.shape != expected[name] and x.numel() != expected[name].numel()
    }
    if wrong:
        name, got = next(iter(wrong.items()))
        raise InputError(f"{path}: {name} should be {tuple(expected[name])}, got {got}")
    for name in list(tensors):
        x = tensors.pop(name).reshape(expected[name])
        x = x.to(dtype or torch.float32, copy=True)  # a copy, because the file stays mapped
        encoder.load_state_dict({name: x}, strict=False, assign=True)
    return _as_encoder(encoder, dtype)


def _as_encoder(encoder: ReleasedViT, dtype: torch.dtype | None) -> nn.Module:
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


def _with_size(encoder: nn.Module, image_size: int | None) -> nn.Module:
    if image_size is not None:
        what, patch = (
            "the patch size",
            getattr(getattr(encoder, "patch_embed", None), "patch_size", (1,))[0],
        )
        if type(encoder).__name__ == "Hiera":
            what, patch = "the last stage's stride", encoder.feature_info[-1]["reduction"]
        if image_size % patch:
            raise InputError(f"image size {image_size} is not divisible by {what} {patch}")
        if hasattr(encoder, "set_input_size"):
            encoder.set_input_size(img_size=image_size)
        encoder.pretrained_cfg = {
            **encoder.pretrained_cfg,
            "input_size": (3, image_size, image_size),
        }
    return encoder


def eval_transform(encoder: nn.Module):
    """Resize, centre crop, normalise: PIL image to (3, height, width), as ``pretrained_cfg`` says."""
    config = timm.data.resolve_data_config(pretrained_cfg=encoder.pretrained_cfg)
    return timm.data.create_transform(**config)


def normalisation(encoder: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the encoder's input."""
    return tuple(encoder.pretrained_cfg["mean"]), tuple(encoder.pretrained_cfg["std"])


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
