"""What a recipe of fine-tuning costs in operations and memory, by formula."""

import torch

from mimrefiner import distributed
from mimrefiner.errors import InputError
from mimrefiner.models.classifier import ImageClassifier
from mimrefiner.models.layouts import ViTShape
from mimrefiner.training.cost import (
    SPARE,
    activation_bytes,
    block_flops,
    card_bytes,
    embed_flops,
    forward_flops,
    kept_bytes,
    parameters,
    vit_shape,
    warn_if_too_large,
)
from mimrefiner.training.memory import PLENTY, Memory
from mimrefiner.training.optim import stage_steps
from mimrefiner.training.recipes import FinetuneRecipe


def finetune_flops(
    s: ViTShape, recipe: FinetuneRecipe, classes: int, memory: Memory = PLENTY
) -> int:
    """Operations per image, forward and backward.

    >>> from dataclasses import replace
    >>> from mimrefiner.training.recipes import L16
    >>> shape = ViTShape(224, 16, dim=1024, depth=24, num_heads=16, mlp_dim=4096)
    >>> whole = finetune_flops(shape, L16, 1000)
    >>> 0.7 < finetune_flops(shape, replace(L16, frozen_share=0.25), 1000) / whole < 0.9
    True
    """
    patches, frozen = (s.image_size // s.patch_size) ** 2, recipe.frozen_blocks(s.depth)
    tokens, trained = patches + s.cls_token, s.depth - frozen
    block = block_flops(s.dim, s.mlp_dim, tokens)
    backward = 2 * trained * block + (0 if frozen else embed_flops(s, patches))
    if memory.recompute:  # a block is computed again up to its last product
        backward += trained * (block - 2 * tokens * s.dim * s.mlp_dim)
    return forward_flops(s, s.image_size) + backward + 3 * 2 * s.dim * classes


def finetune_total(
    s: ViTShape, recipe: FinetuneRecipe, images: int, classes: int, memory: Memory = PLENTY
) -> int:
    """Operations of the whole training on a data set of so many images, tests left out."""
    steps = stage_steps(images, recipe.batch_size, recipe.epochs)
    return finetune_flops(s, recipe, classes, memory) * recipe.batch_size * steps


def finetune_bytes(
    s: ViTShape,
    recipe: FinetuneRecipe,
    classes: int,
    *,
    gpus: int = 1,
    memory: Memory = PLENTY,
) -> float:
    """Bytes that a recipe needs on each of ``gpus``, which share a batch.

    Raises:
        InputError: GPUs that do not divide the batch.
    """
    if gpus < 1 or recipe.batch_size % gpus:
        raise InputError(
            f"expected gpus >= 1 that divide the batch of {recipe.batch_size}, got {gpus}"
        )
    weights = parameters(s) + (s.dim + 1) * classes
    trained = 1 - recipe.frozen_blocks(s.depth) / s.depth
    states = weights * (4 + 12 * trained)  # weight; gradient and two moments
    if memory.shard:  # two blocks are put together, with gradients
        states = states / gpus + 2 * 8 * weights / s.depth
    share = recipe.batch_size // gpus
    at_once = min(share, recipe.micro_batch or share, memory.micro_batch or share)
    kept = trained * kept_bytes(s, s.image_size, recompute=memory.recompute)
    kept += memory.recompute * activation_bytes(s, s.image_size) / s.depth
    pixels = 3 * s.image_size**2
    # A batch as it came, normalised and mixed, and its copies in bfloat16
    images = share * pixels * (1 + 4 + 4) + at_once * pixels * 2
    return SPARE * (states + 2 * trained * weights + at_once * kept + images)


def warn_of_finetuning(
    model: ImageClassifier, recipe: FinetuneRecipe, memory: Memory, advice: str
) -> None:
    """Warn, with advice, if fine-tuning will probably not fit the GPU that ``model`` is on."""
    device: torch.device = next(model.parameters()).device
    if card := card_bytes(device):
        shape, gpus = vit_shape(model.encoder), distributed.world()
        needed = finetune_bytes(shape, recipe, model.head.classes, gpus=gpus, memory=memory)
        warn_if_too_large({"fine-tuning": needed}, card, advice)
