"""Encoders: by timm name, by name of the catalogue, or from a file in any published layout."""

import copy
import json
import logging
import sys
from numbers import Integral
from pathlib import Path

import timm.data
import torch
from torch import Tensor, nn

from mimrefiner.config import ViTConfig
from mimrefiner.device import seeded
from mimrefiner.errors import InputError
from mimrefiner.files import ASSETS, atomic_file, cache_folder, first_line
from mimrefiner.models.catalogue import BY_NAME, CatalogueRow
from mimrefiner.models.layouts import ReleasedViT, ViTShape, convert
from mimrefiner.models.weights import (
    is_own_file,
    read_checkpoint,
    read_encoder_file,
    read_metadata,
    vit_config,
)

logger = logging.getLogger(__name__)

OWN = "mimrefiner_vit"  # the architecture that build_vit makes
SUFFIXES = (".safetensors", ".pth", ".pt", ".th", ".tar")


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
    with seeded(seed):
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
        source: a timm model name (``vit_base_patch16_224.mae``); a name of the catalogue
            (``d2v2_refined_h14``; see ``mimrefiner models``), downloaded once into
            ``$MIMREFINER_CACHE``; a checkpoint that comes with the package (``simmim_digits``); or
            the path of a file in any layout of :data:`mimrefiner.models.layouts.LAYOUTS`.
        image_size: side of the input in pixels; None keeps the model's own. Position embeddings
            are resized.
        num_heads: attention heads, where a file does not tell (files of this package do).
        pretrained: False gives random weights of the same shape.
        dtype: converts the weights tensor by tensor, such as to torch.bfloat16; None: float32.

    Raises:
        InputError: an unknown name, a missing or damaged file, a size that the patch size does not
            divide, or no network.

    >>> import mimrefiner as mr
    >>> encoder = mr.load_encoder("simmim_digits")
    >>> len(encoder.blocks), encoder.pretrained_cfg["input_size"]
    (12, (3, 32, 32))
    """
    if image_size is not None and not (isinstance(image_size, Integral) and image_size >= 1):
        raise InputError(f"image_size must be a whole number >= 1, got {image_size}")
    if num_heads is not None and num_heads < 1:
        raise InputError(f"num_heads must be >= 1, got {num_heads}")
    row, path = BY_NAME.get(str(source)), _file_of(source)
    if path is not None:
        encoder = _from_file(path, num_heads, pretrained, dtype)
    elif row and row.url:
        encoder = _published(row, pretrained, dtype)
    else:
        encoder = _from_timm(str(source), image_size, pretrained).to(dtype)
    return with_size(encoder, image_size)


def _file_of(source: str | Path) -> Path | None:
    """The file that ``source`` means, there or not; None where it is a name."""
    packaged = ASSETS / f"{source}.safetensors"
    path = packaged if packaged.is_file() else Path(source).expanduser()
    # Some timm names end in ".pt"
    named = str(source) in BY_NAME or timm.models.is_model_pretrained(str(source))
    return path if path.is_file() or (path.suffix in SUFFIXES and not named) else None


def _from_timm(name: str, image_size: int | None, pretrained: bool) -> nn.Module:
    if not timm.is_model(name):
        close = timm.list_models(f"*{name.split('.')[0]}*")[:5]
        hint = f"; close names: {', '.join(close)}" if close else ""
        raise InputError(
            f"unknown model {name!r}: expected a timm model name or an existing .safetensors file"
            f"{hint}"
        )
    if pretrained and name in BY_NAME:
        logger.info("%s: licence %s, %s/%s", name, BY_NAME[name].licence, BY_NAME[name].page, name)
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
            f"could not load {name} ({first_line(error)}): without a network use pretrained=False "
            "(--no-pretrained) or a local file; the patch size must divide image sizes"
        ) from error
    encoder.pretrained_cfg = {**encoder.pretrained_cfg, "architecture": name}
    return encoder


def _create(name: str, image_size: int | None, pretrained: bool) -> nn.Module:
    """A timm model with as many wishes about its size as its family takes."""
    size = {} if image_size is None else {"img_size": image_size}
    # Hiera has no dynamic size, ConvNeXt no size of its own
    for options in ({"dynamic_img_size": True, **size}, size):
        try:
            return timm.create_model(name, pretrained=pretrained, num_classes=0, **options).eval()
        except TypeError:
            continue
    return timm.create_model(name, pretrained=pretrained, num_classes=0).eval()


def _published(row: CatalogueRow, pretrained: bool, dtype: torch.dtype | None) -> nn.Module:
    if pretrained:
        return _from_file(fetch(row), row.heads, True, dtype)
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


def _from_file(
    path: Path, num_heads: int | None, pretrained: bool, dtype: torch.dtype | None
) -> nn.Module:
    if not path.is_file():
        raise InputError(
            f"{path} does not exist or is no file: expected a checkpoint or a timm model name"
        )
    if is_own_file(path):
        return _from_own_file(path, num_heads, pretrained).to(dtype)
    encoder = _from_published_file(path, num_heads, pretrained, dtype)
    if data := read_metadata(path).get("mimrefiner"):  # exported for timm by this package
        encoder.pretrained_cfg = {**encoder.pretrained_cfg, **json.loads(data)}
    return encoder


def _from_own_file(path: Path, num_heads: int | None, pretrained: bool) -> nn.Module:
    tensors, metadata = read_encoder_file(path)
    try:
        config, data = ViTConfig(**json.loads(metadata["vit"])), json.loads(metadata["data"])
        architecture = metadata["architecture"]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} is damaged: its metadata do not say what it holds ({first_line(error)})"
        ) from error
    if num_heads not in (None, config.num_heads):
        raise InputError(
            f"{path} has {config.num_heads} attention heads, got num_heads={num_heads}"
        )
    if metadata.get("released"):
        encoder = released_encoder(ReleasedViT(ViTShape(**json.loads(metadata["released"]))))
    elif architecture == OWN:
        encoder = build_vit(config)
    else:
        encoder = _create(architecture, config.image_size, pretrained=False)
        encoder.pretrained_cfg = {**encoder.pretrained_cfg, "architecture": architecture}
    if pretrained:
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


def _from_published_file(
    path: Path, num_heads: int | None, pretrained: bool, dtype: torch.dtype | None
) -> nn.Module:
    """Build without memory, then fill tensor by tensor, so that the weights exist once."""
    shape, tensors, _ = convert(read_checkpoint(path), str(path), num_heads)
    if not pretrained:
        return released_encoder(ReleasedViT(shape), dtype)
    with torch.device("meta"):
        encoder = ReleasedViT(shape)
    expected = {name: x.shape for name, x in encoder.state_dict().items()}
    for name, x in tensors.items():
        if x.numel() != expected[name].numel():
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
        embed = getattr(encoder, "patch_embed", None)
        what, patch = "the patch size", getattr(embed, "patch_size", (1,))[0]
    if image_size % patch:
        raise InputError(f"image size {image_size} is not divisible by {what} {patch}")
    if hasattr(encoder, "set_input_size"):
        encoder.set_input_size(img_size=image_size)
    size = (3, image_size, image_size)
    encoder.pretrained_cfg = {**encoder.pretrained_cfg, "input_size": size}
    return encoder


def eval_transform(encoder: nn.Module):
    """The encoder's own preparation of an image: resize, centre crop, normalise.

    Takes a PIL image and returns (3, height, width), as ``pretrained_cfg`` says.
    """
    config = timm.data.resolve_data_config(pretrained_cfg=encoder.pretrained_cfg)
    return timm.data.create_transform(**config)


def normalisation(encoder: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the encoder's input, one number per channel each."""
    return tuple(encoder.pretrained_cfg["mean"]), tuple(encoder.pretrained_cfg["std"])
