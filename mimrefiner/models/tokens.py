"""What a network takes and what its blocks give: class token, registers and patches."""

import math

from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mimrefiner.errors import InputError


def input_size(encoder: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width of the images that ``encoder`` is built for now, in pixels.

    ``timm.create_model("vit_tiny_patch16_224", img_size=96)`` is a model for 96 px whose
    ``pretrained_cfg`` still says 224: what the model was built with decides, where it knows.

    Raises:
        InputError: neither the model nor a ``pretrained_cfg`` says.

    >>> import timm
    >>> input_size(timm.create_model("test_vit", img_size=96))
    (3, 96, 96)
    """
    known = getattr(encoder, "pretrained_cfg", None) or {}
    channels, *size = known.get("input_size") or (3, None, None)
    embed = getattr(encoder, "patch_embed", getattr(encoder, "stem", None))  # mixers have a stem
    channels = getattr(getattr(embed, "proj", None), "in_channels", channels)
    if (built := getattr(embed, "img_size", None)) is not None:
        size = (built, built) if isinstance(built, int) else built
    elif hasattr(encoder, "tokens_spatial_shape"):  # Hiera
        shape, stride = encoder.tokens_spatial_shape, encoder.patch_stride
        size = [n * pixels for n, pixels in zip(shape, stride, strict=True)]
    if None in size:
        raise _says_nothing(encoder)
    return (channels, *size)


def settings_of(encoder: nn.Module) -> dict:
    """The encoder's ``pretrained_cfg``: mean and std of its images, and what else is known.

    Raises:
        InputError: it has none, or one without mean and std.

    >>> encoder = nn.Linear(2, 2)
    >>> encoder.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    >>> sorted(settings_of(encoder))
    ['mean', 'std']
    """
    settings = getattr(encoder, "pretrained_cfg", None) or {}
    if not {"mean", "std"} <= settings.keys():
        raise _says_nothing(encoder)
    return settings


def _says_nothing(encoder: nn.Module) -> InputError:
    return InputError(
        f"{type(encoder).__name__} does not say which images it takes: set "
        "encoder.pretrained_cfg = dict(input_size=(3, 224, 224), mean=..., std=...)"
    )


def split_tokens(encoder: nn.Module, output, images: Tensor) -> tuple[Tensor | None, Tensor]:
    """The class token and the patches of one block's output.

    Args:
        encoder: the network of the block.
        output: what the block returned: tokens (batch, tokens, dim), a map (batch, dim, rows,
            columns) or (batch, rows, columns, dim), or a tuple that holds one of these.
        images: what the network was given, (batch, channels, height, width).

    Returns:
        The class token, (batch, dim), None where the output has none, and the patches without
        register tokens, (batch, patches, dim).

    Raises:
        InputError: an output of another kind.
    """
    x = _tensor_of(output, len(images))
    if x is None or x.ndim not in (3, 4):
        what = tuple(x.shape) if x is not None else f"a {type(output).__name__}"
        raise InputError(
            f"{type(encoder).__name__} cannot be probed: a block gives {what}, expected tokens "
            "(batch, tokens, dim) or a map (batch, dim, rows, columns)"
        )
    if x.ndim == 4:
        return None, (x if _channels_last(encoder, x, images) else x.permute(0, 2, 3, 1)).flatten(
            1, 2
        )
    prefix = _prefix_of(encoder, x.shape[1], images)
    has_cls = prefix > 0 and adds_cls(encoder)
    return (x[:, 0] if has_cls else None), x[:, prefix:]


def _tensor_of(output, batch: int) -> Tensor | None:
    """The tensor that stands for an output: the first one with a row for every image."""
    if isinstance(output, Tensor):
        return output
    if not isinstance(output, tuple):  # a list holds branches that belong together (CrossViT)
        return None
    # TNT puts its pixels first, which are patches times as many
    rows = (x for x in output if isinstance(x, Tensor) and x.ndim and len(x) == batch)
    return next(rows, None)


def adds_cls(encoder: nn.Module) -> bool:
    """Whether the network has a class token; NaFlexViT keeps it with its embeddings."""
    places = (encoder, getattr(encoder, "embeds", None))
    return any(getattr(place, "cls_token", None) is not None for place in places)


def prefix_everywhere(encoder: nn.Module) -> bool:
    """Whether all blocks of this family see the same prefix tokens."""
    return isinstance(encoder, VisionTransformer | Eva)


def prefix_tokens(encoder: nn.Module) -> int:
    """How many class and register tokens come before the patches, where there are any."""
    cls = int(adds_cls(encoder))
    more = getattr(encoder, "num_register_tokens", None) or 0  # DINOv2's own code
    return getattr(encoder, "num_prefix_tokens", cls + more)


def _prefix_of(encoder: nn.Module, tokens: int, images: Tensor) -> int:
    """How many of an output's tokens come before its patches.

    Where a family adds them late, the number of tokens tells: patches fill a grid.
    """
    prefix = prefix_tokens(encoder)
    if not prefix or prefix_everywhere(encoder):
        return prefix
    height, width = images.shape[-2:]
    patch = getattr(getattr(encoder, "patch_embed", None), "patch_size", None)
    if patch is not None:
        side = (patch, patch) if isinstance(patch, int) else patch
        patches = (height // side[0]) * (width // side[1])
        if tokens - patches in (0, prefix):
            return tokens - patches
    without, with_prefix = (_is_grid(n, height, width) for n in (tokens, tokens - prefix))
    if without != with_prefix:
        return prefix if with_prefix else 0
    raise InputError(
        f"{type(encoder).__name__} cannot be probed: {tokens} tokens of an image of {height} x "
        f"{width} px do not tell whether {prefix} of them come before the patches"
    )


def _is_grid(n: int, height: int, width: int) -> bool:
    """Whether ``n`` patches fill a grid in the form of the image."""
    if n < 1:
        return False
    rows, columns = round(math.sqrt(n * height / width)), round(math.sqrt(n * width / height))
    return rows * columns == n


def _channels_last(encoder: nn.Module, x: Tensor, images: Tensor) -> bool:
    """Whether a map is (batch, rows, columns, dim); the form of the image tells, or the model."""
    height, width = images.shape[-2:]

    def like_image(rows: int, columns: int) -> bool:
        return abs(rows * width - columns * height) < max(height, width)

    last, first = like_image(*x.shape[1:3]), like_image(*x.shape[2:])
    if last != first:
        return last
    return getattr(encoder, "output_fmt", "NCHW") == "NHWC"
