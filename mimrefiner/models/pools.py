"""Which poolings a network has, after which of its blocks."""

from collections.abc import Sequence

import torch
from torch import nn

from mimrefiner.device import frozen
from mimrefiner.errors import InputError
from mimrefiner.models.blocks import block_modules, depth_of, features_of, hooked
from mimrefiner.models.tokens import adds_cls, input_size, prefix_everywhere, split_tokens


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
    if not adds_cls(encoder):
        return ("mean",)
    if prefix_everywhere(encoder):
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
        features_of(encoder, image)


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
        numbers = blocks_with_cls(encoder) if adds_cls(encoder) else ()
        after = f"has only after blocks {', '.join(map(str, numbers))} (0-based)"
        raise InputError(
            "pooling 'cls' needs a cls token, which this model "
            f"{after if numbers else 'does not have'}: use pool 'mean'"
        )
    return available if pools is None else tuple(pools)
