"""What a block is, and how its tokens are pooled."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn

from mimrefiner.errors import InputError


def block_modules(encoder: nn.Module) -> Sequence[nn.Module]:
    """The blocks of a ViT (Hiera too), or the stages of a convolutional network."""
    for name in ("blocks", "stages"):
        if hasattr(encoder, name):
            return getattr(encoder, name)
    raise InputError(
        f"{type(encoder).__name__} has neither blocks nor stages: "
        "expected a timm ViT, Hiera or ConvNeXt"
    )


def depth_of(encoder: nn.Module) -> int:
    """Number of blocks."""
    return len(block_modules(encoder))


def available_pools(encoder: nn.Module) -> tuple[str, ...]:
    """The poolings that ``encoder`` has: "cls" if it has a cls token, "mean" of patch tokens."""
    return ("cls", "mean") if getattr(encoder, "cls_token", None) is not None else ("mean",)


def check_pools(encoder: nn.Module, pools: Sequence[str] | None) -> tuple[str, ...]:
    """``pools``, or all that ``encoder`` has for None; InputError if it lacks one."""
    available = available_pools(encoder)
    if pools is not None and not len(pools):
        raise InputError(f"expected one or more poolings of {', '.join(available)}, got none")
    for pool in pools or ():
        if pool not in ("cls", "mean"):
            raise InputError(f"unknown pooling {pool!r}: choose from cls, mean")
        if pool not in available:
            raise InputError(
                "pooling 'cls' needs a cls token, which this model does not have: use pool 'mean'"
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
        encoder: a timm ViT, or anything with blocks and ``forward_features``.
        images: normalised images, (batch, 3, height, width).
        blocks: 0-based blocks.
        pools: one or both of "cls" and "mean".
        norm_blocks: blocks whose tokens pass the encoder's final LayerNorm first.

    Returns:
        For every pooling, one (batch, dim) for each block, in the order of ``blocks``.
    """
    pooled: dict[str, list] = {pool: [None] * len(blocks) for pool in pools}

    def pool(position: int, module: nn.Module, inputs, output) -> None:
        tokens = output[0] if isinstance(output, tuple) else output  # (batch, tokens, dim)
        if type(encoder).__name__ == "ConvNeXt":
            tokens = tokens.flatten(2).mT  # from (batch, dim, rows, columns)
        norm = encoder.norm if blocks[position] in norm_blocks else nn.Identity()
        if "cls" in pooled:
            # A view would keep all tokens alive
            pooled["cls"][position] = norm(tokens[:, 0].clone())
        if "mean" in pooled:
            patches = tokens[:, getattr(encoder, "num_prefix_tokens", 0) :]
            pooled["mean"][position] = norm(patches).mean(1)

    modules = block_modules(encoder)
    with hooked([modules[block] for block in blocks], pool):
        encoder.forward_features(images)
    return pooled
