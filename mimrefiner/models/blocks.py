"""What a block is, and how its tokens are pooled."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn

from mimrefiner.errors import InputError
from mimrefiner.models.tokens import split_tokens

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
    whose = "torchvision's " if type(encoder).__module__.startswith("torchvision.") else ""
    raise InputError(
        f"{whose}{type(encoder).__name__} has neither blocks nor stages: "
        "expected a timm ViT, Hiera, Swin or ConvNeXt"
    )


def depth_of(encoder: nn.Module) -> int:
    """Number of blocks."""
    return len(block_modules(encoder))


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


def features_of(encoder: nn.Module, images: Tensor):
    """What the encoder gives without its classifier; models that are not timm's give all.

    >>> import torch
    >>> features_of(nn.Flatten(), torch.zeros(2, 3, 4)).shape
    torch.Size([2, 12])
    """
    return getattr(encoder, "forward_features", encoder)(images)


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
        encoder: a timm ViT, or anything with blocks or stages.
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
        features_of(encoder, images)
    if any(x is None for per_block in pooled.values() for x in per_block):
        raise InputError(
            f"{type(encoder).__name__} cannot be probed: its blocks are not called one by one"
        )
    return pooled


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
