"""What a block is, which of its tokens is the class token, and how its tokens are pooled."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mimrefiner.device import frozen
from mimrefiner.errors import InputError

CONTAINERS = ("blocks", "stages", "layers", "levels")  # where timm's families keep theirs


def block_modules(encoder: nn.Module) -> Sequence[nn.Module]:
    """The blocks of a ViT, or the stages of another network.

    Raises:
        InputError: a model that keeps neither in one list, such as timm's ResNet.
    """
    for name in CONTAINERS:
        found = getattr(encoder, name, None)
        if isinstance(found, nn.Sequential | nn.ModuleList | list | tuple) and len(found):
            return found
    raise InputError(
        f"{type(encoder).__name__} has neither blocks nor stages: "
        "expected a timm ViT, Hiera, Swin or ConvNeXt"
    )


def depth_of(encoder: nn.Module) -> int:
    """Number of blocks."""
    return len(block_modules(encoder))


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
    channels, *size = _config_of(encoder).get("input_size") or (3, None, None)
    embed = getattr(encoder, "patch_embed", getattr(encoder, "stem", None))  # mixers have a stem
    channels = getattr(getattr(embed, "proj", None), "in_channels", channels)
    if (built := getattr(embed, "img_size", None)) is not None:
        size = (built, built) if isinstance(built, int) else built
    elif hasattr(encoder, "tokens_spatial_shape"):  # Hiera
        shape, stride = encoder.tokens_spatial_shape, encoder.patch_stride
        size = [n * pixels for n, pixels in zip(shape, stride, strict=True)]
    if None in size:
        raise InputError(
            f"{type(encoder).__name__} does not say which images it takes: set "
            "encoder.pretrained_cfg = dict(input_size=(3, 224, 224), mean=..., std=...)"
        )
    return (channels, *size)


def _config_of(encoder: nn.Module) -> dict:
    return getattr(encoder, "pretrained_cfg", None) or {}


def available_pools(encoder: nn.Module, blocks: str | Sequence[int] = "all") -> tuple[str, ...]:
    """The poolings that ``encoder`` has after each of ``blocks``: "mean" of its patches, and "cls".

    Some networks add their class token late: CaiT and XCiT behind all blocks, ConViT before its
    last two. They have "cls" where the output of every block in ``blocks`` has the token.

    >>> import timm
    >>> available_pools(timm.create_model("convit_tiny", img_size=32))
    ('mean',)
    >>> available_pools(timm.create_model("convit_tiny", img_size=32), blocks=(10, 11))
    ('cls', 'mean')
    """
    if not _adds_cls(encoder):
        return ("mean",)
    if _prefix_everywhere(encoder):
        return ("cls", "mean")
    numbers = range(depth_of(encoder)) if blocks == "all" else blocks
    with_cls = blocks_with_cls(encoder)
    return ("cls", "mean") if all(block in with_cls for block in numbers) else ("mean",)


def blocks_with_cls(encoder: nn.Module) -> tuple[int, ...]:
    """The 0-based blocks whose output has a class token, found by one pass of an empty image."""
    found: list[int] = []

    image = torch.empty(1, *input_size(encoder), device="meta")  # only its shape counts

    def look(block: int, module: nn.Module, inputs, output) -> None:
        if split_tokens(encoder, output, image)[0] is not None:
            found.append(block)

    with hooked(block_modules(encoder), look):
        blank_pass(encoder)
    return tuple(found)


@torch.no_grad()
def blank_pass(encoder: nn.Module) -> None:
    """One empty image of the encoder's own size passes it."""
    first = next(encoder.parameters())
    image = torch.zeros(1, *input_size(encoder), device=first.device, dtype=first.dtype)
    with frozen(encoder, first.device):
        encoder.forward_features(image)


def check_pools(
    encoder: nn.Module, pools: Sequence[str] | None, blocks: str | Sequence[int] = "all"
) -> tuple[str, ...]:
    """``pools``, or for None all that ``encoder`` has after ``blocks``.

    Raises:
        InputError: an unknown pooling, or one that the encoder lacks.
    """
    if pools is not None and not len(pools):
        available = ", ".join(available_pools(encoder, blocks))
        raise InputError(f"expected one or more poolings of {available}, got none")
    for pool in pools or ():
        if pool not in ("cls", "mean"):
            raise InputError(f"unknown pooling {pool!r}: choose from cls, mean")
    if pools is not None and "cls" not in pools:
        return tuple(pools)
    available = available_pools(encoder, blocks)
    if pools is not None and "cls" not in available:
        numbers = blocks_with_cls(encoder) if _adds_cls(encoder) else ()
        after = f"has only after blocks {', '.join(map(str, numbers))} (0-based)"
        raise InputError(
            "pooling 'cls' needs a cls token, which this model "
            f"{after if numbers else 'does not have'}: use pool 'mean'"
        )
    return available if pools is None else tuple(pools)


@contextmanager
def hooked(modules: Iterable[nn.Module], hook: Callable[..., None]) -> Iterator[None]:
    """Within it, ``hook(i, module, inputs, output)`` follows every call of the i-th module.

    >>> layers, seen = nn.Sequential(nn.Identity(), nn.Identity()), []
    >>> with hooked(layers, lambda i, module, inputs, output: seen.append((i, output))):
    ...     _ = layers("tokens")
    >>> seen
    [(0, 'tokens'), (1, 'tokens')]
    """
    handles = [module.register_forward_hook(partial(hook, i)) for i, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def pooled_blocks(
    encoder: nn.Module,
    images: Tensor,
    blocks: Sequence[int],
    pools: Sequence[str],
    *,
    norm_blocks: Collection[int] = (),
) -> dict[str, list[Tensor]]:
    """Run ``encoder`` once and pool the raw output of every block in ``blocks``.

    Args:
        encoder: a timm ViT, or anything with blocks or stages and ``forward_features``.
        images: normalised images, (batch, 3, height, width).
        blocks: 0-based blocks.
        pools: one or both of "cls" and "mean".
        norm_blocks: blocks whose tokens pass the encoder's final LayerNorm first.

    Returns:
        For every pooling, one (batch, dim) for each block, in the order of ``blocks``.

    Raises:
        InputError: an output that is neither tokens nor a map, that lacks the class token asked
            for, or that the final LayerNorm does not fit.
    """
    pooled: dict[str, list] = {pool: [None] * len(blocks) for pool in pools}

    def pool(position: int, module: nn.Module, inputs, output) -> None:
        block = blocks[position]
        cls, patches = split_tokens(encoder, output, images)
        norm = _final_norm(encoder, block, patches) if block in norm_blocks else nn.Identity()
        if "cls" in pooled:
            if cls is None:
                raise InputError(f"block {block} (0-based) has no cls token: use pool 'mean'")
            # A view would keep all tokens alive
            pooled["cls"][position] = norm(cls.clone())
        if "mean" in pooled:
            pooled["mean"][position] = norm(patches).mean(1)

    modules = block_modules(encoder)
    with hooked([modules[block] for block in blocks], pool):
        encoder.forward_features(images)
    if any(x is None for per_block in pooled.values() for x in per_block):
        raise InputError(
            f"{type(encoder).__name__} cannot be probed: its blocks are not called one by one"
        )
    return pooled


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
    has_cls = prefix > 0 and _adds_cls(encoder)
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


def _adds_cls(encoder: nn.Module) -> bool:
    """Whether the network has a class token; NaFlexViT keeps it with its embeddings."""
    places = (encoder, getattr(encoder, "embeds", None))
    return any(getattr(place, "cls_token", None) is not None for place in places)


def _prefix_everywhere(encoder: nn.Module) -> bool:
    """Whether all blocks of this family see the same prefix tokens."""
    return isinstance(encoder, VisionTransformer | Eva)


def prefix_tokens(encoder: nn.Module) -> int:
    """How many class and register tokens come before the patches, where there are any."""
    cls = int(_adds_cls(encoder))
    more = getattr(encoder, "num_register_tokens", None) or 0  # DINOv2's own code
    return getattr(encoder, "num_prefix_tokens", cls + more)


def _prefix_of(encoder: nn.Module, tokens: int, images: Tensor) -> int:
    """How many of an output's tokens come before its patches.

    Where a family adds them late, the number of tokens tells: patches fill a grid.
    """
    prefix = prefix_tokens(encoder)
    if not prefix or _prefix_everywhere(encoder):
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


def _final_norm(encoder: nn.Module, block: int, patches: Tensor) -> nn.Module:
    """The encoder's final LayerNorm, if it fits the width of this block."""
    norm = getattr(encoder, "norm", None)
    weight = getattr(norm, "weight", None)
    if norm is None or (weight is not None and weight.shape != patches.shape[-1:]):
        raise InputError(
            f"{type(encoder).__name__} has no final LayerNorm that fits block {block} (0-based): "
            "leave final_norm out"
        )
    return norm
