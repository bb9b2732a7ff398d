"""What refinement and pre-training cost: parameters, operations and memory, by formula."""

import sys
from collections import Counter
from dataclasses import dataclass

import torch

from mimrefiner import distributed
from mimrefiner.config import PretrainConfig, RefineConfig
from mimrefiner.errors import InputError
from mimrefiner.method.nn_queue import LOOKUP_BYTES
from mimrefiner.method.refiner import MIMRefiner
from mimrefiner.models.layouts import ViTShape
from mimrefiner.models.masked import MAE, SimMIM, random_mask
from mimrefiner.training.memory import ADVICE, PLENTY, PRETRAIN_ADVICE, Memory
from mimrefiner.training.optim import stage_steps

SPARE = 1.1
USE = 0.4  # share of a GPU's peak that training reaches: an assumption, not a measurement


@dataclass(frozen=True)
class Plan:
    """Cost of one model and recipe.

    ``forward_flops``, ``heads_flops``, ``refine_flops`` are per image, ``heads_total`` and
    ``refine_total`` those of the whole stages; memory is in bytes per GPU.
    """

    parameters: int
    head_parameters: int
    forward_flops: int
    heads_flops: int
    refine_flops: int
    heads_total: int
    refine_total: int
    probe_bytes: float
    heads_bytes: float
    refine_bytes: float


def parameters(s: ViTShape) -> int:
    """Weights of a plain ViT, fixed positions included."""
    grid = s.image_size // s.patch_size
    embed = 3 * s.patch_size**2 * s.dim + s.dim + grid**2 * s.dim + s.cls_token * s.dim
    block = 4 * s.dim**2 + 2 * s.dim * s.mlp_dim + s.mlp_dim + 9 * s.dim
    return embed + s.depth * block + 2 * s.dim * (s.post_norm + s.final_norm)


def forward_flops(s: ViTShape, size: int) -> int:
    """Operations of one image of ``size`` px: matrix products and attention, as
    ``torch.utils.flop_counter`` counts them.
    """
    patches = (size // s.patch_size) ** 2
    return embed_flops(s, patches) + s.depth * block_flops(s.dim, s.mlp_dim, patches + s.cls_token)


def embed_flops(s: ViTShape, patches: int) -> int:
    """Operations of the patch embedding; its backward pass costs as much, since images need no
    gradient.
    """
    return 2 * patches * 3 * s.patch_size**2 * s.dim


def block_flops(dim: int, mlp_dim: int, tokens: int) -> int:
    """Operations of one block forward; its backward pass costs twice as much."""
    return tokens * (8 * dim**2 + 4 * dim * mlp_dim) + 4 * tokens**2 * dim


def pretrain_flops(s: ViTShape, config: PretrainConfig) -> int:
    """Operations per image of masked pre-training, forward and backward."""
    patches = (s.image_size // s.patch_size) ** 2
    pixels = 3 * s.patch_size**2
    if config.method == "simmim":
        blocks, head = (
            s.depth * block_flops(s.dim, s.mlp_dim, patches + s.cls_token),
            2 * patches * s.dim * pixels,
        )
        return 2 * embed_flops(s, patches) + 3 * (blocks + head)
    visible = int((~random_mask(1, patches, config.mask_ratio)).sum()) + s.cls_token
    d = config.decoder_dim
    decoder = (
        2 * visible * s.dim * d
        + config.decoder_depth * block_flops(d, 4 * d, patches + s.cls_token)
        + 2 * patches * d * pixels
    )
    return 2 * embed_flops(s, patches) + 3 * (
        s.depth * block_flops(s.dim, s.mlp_dim, visible) + decoder
    )


def pretrain_total(s: ViTShape, config: PretrainConfig, images: int) -> int:
    """Operations of pre-training on so many images."""
    return (
        pretrain_flops(s, config)
        * config.batch_size
        * stage_steps(images, config.batch_size, config.epochs)
    )


def head_parameters(s: ViTShape, config: RefineConfig) -> int:
    """Weights of all heads."""
    c = config
    projector = (
        s.dim * c.hidden_dim
        + c.hidden_dim**2
        + c.hidden_dim * c.out_dim
        + 4 * c.hidden_dim
        + 2 * c.out_dim
    )
    predictor = 2 * c.out_dim * c.predictor_dim + 2 * c.predictor_dim
    return len(config.resolve_blocks(s.depth)) * (projector + predictor)


def step_flops(
    s: ViTShape, config: RefineConfig, *, train_encoder: bool, memory: Memory = PLENTY
) -> int:
    """Operations per image of stage 2 or 3, forward and backward: encoder, heads, queue and loss."""
    c, heads, views = config, len(config.resolve_blocks(s.depth)), len(config.views.crops)
    global_views = len(c.views.global_crops)
    encoder = sum(
        _encoder_flops(s, crop.size, c.frozen_blocks, memory, train_encoder)
        for crop in c.views.crops
    )
    first = s.dim * c.hidden_dim
    rest = c.hidden_dim**2 + c.hidden_dim * c.out_dim + 2 * c.out_dim * c.predictor_dim
    # Stage 2 needs no gradient of the heads' input
    backward = 2 * first if train_encoder else first
    head = 2 * views * heads * (first + backward + 3 * rest)
    queue = 2 * heads * global_views * c.queue_size * c.out_dim
    # Gradient to the predictions only
    loss = 2 * heads * global_views * views * c.batch_size * c.out_dim * 2
    return encoder + head + queue + loss


def _encoder_flops(s: ViTShape, size: int, frozen: int, memory: Memory, trained: bool) -> int:
    forward = forward_flops(s, size)
    if not trained:
        return forward
    patches, trained_blocks = (size // s.patch_size) ** 2, s.depth - frozen
    block = block_flops(s.dim, s.mlp_dim, patches + s.cls_token)
    backward = 2 * trained_blocks * block + (0 if frozen else embed_flops(s, patches))
    if memory.recompute:  # a block is computed again up to its last product
        backward += trained_blocks * (block - 2 * (patches + s.cls_token) * s.dim * s.mlp_dim)
    return forward * (2 if memory.micro_batch else 1) + backward


def activation_bytes(s: ViTShape, size: int) -> int:
    """Bytes that the blocks keep for the backward pass of one image under autocast."""
    return s.depth * block_bytes(s.dim, s.mlp_dim, (size // s.patch_size) ** 2 + s.cls_token)


def block_bytes(dim: int, mlp_dim: int, tokens: int) -> int:
    """What one block keeps of one image: inputs of norms (float32), of products and of attention
    (bfloat16).
    """
    return tokens * (2 * 4 * dim + 2 * (6 * dim + 2 * mlp_dim))


def passing_bytes(s: ViTShape, size: int) -> int:
    """Bytes that exist at once while one image passes without a graph, under autocast: a block's
    input, sum, norm, MLP, output.
    """
    tokens = (size // s.patch_size) ** 2 + s.cls_token
    return tokens * (14 * s.dim + 4 * s.mlp_dim)


def kept_bytes(s: ViTShape, size: int, *, recompute: bool) -> int:
    """:func:`activation_bytes` under autocast, or, if blocks are computed again, the inputs of the
    blocks only.
    """
    tokens = (size // s.patch_size) ** 2 + s.cls_token
    return s.depth * tokens * 4 * s.dim if recompute else activation_bytes(s, size)


def training_bytes(
    s: ViTShape,
    config: RefineConfig,
    *,
    train_encoder: bool,
    gpus: int = 1,
    memory: Memory = PLENTY,
) -> float:
    """Bytes that stage 2 or 3 needs on each of ``gpus`` that share the batch."""
    c, heads, views = config, len(config.resolve_blocks(s.depth)), len(config.views.crops)
    weights, share = parameters(s), config.batch_size / gpus
    at_once = min(share, memory.micro_batch or share)
    # Crops of one size pass the encoder together
    sizes = Counter(crop.size for crop in c.views.crops)
    widths = s.dim + 4 * c.hidden_dim + 2 * c.out_dim + 2 * c.predictor_dim
    lookup = min(4 * heads * share * 2 * c.queue_size, LOOKUP_BYTES)
    in_heads = 4 * share * views * heads * widths + lookup
    # Weight, gradient and two moments in float32, the weight in bfloat16
    always = 18 * head_parameters(s, c)
    always += 2 * 4 * heads * c.queue_size * c.out_dim + 4 * 3 * (share + at_once) * sum(
        n * size**2 for size, n in sizes.items()
    )
    if not train_encoder:
        passing = at_once * max(n * passing_bytes(s, size) for size, n in sizes.items())
        return SPARE * (4 * weights + always + max(passing, in_heads))
    trained = 1 - c.frozen_blocks / s.depth
    states = weights * (8 + 12 * trained)  # weight and moving average; gradient and two moments
    if memory.micro_batch and gpus > 1 and not memory.shard:
        # Gradients are added up beside the messages in which they are averaged
        states += 4 * trained * weights
    if memory.shard:
        # Two blocks put together, with gradients
        states = states / gpus + 4 * 4 * weights / s.depth
    states += 2 * trained * weights  # in bfloat16
    kept = (
        at_once
        * trained
        * sum(n * kept_bytes(s, size, recompute=memory.recompute) for size, n in sizes.items())
    )
    again = (
        at_once
        * memory.recompute
        * max(n * activation_bytes(s, size) / s.depth for size, n in sizes.items())
    )
    if memory.micro_batch:  # heads and encoder go back one after the other
        return SPARE * (states + always + max(in_heads, kept + again))
    return SPARE * (states + always + kept + max(in_heads, again))


def pretrain_bytes(
    s: ViTShape, config: PretrainConfig, *, gpus: int = 1, shard: bool = False
) -> float:
    """Bytes that masked pre-training needs on each of ``gpus`` that share the batch, and with
    ``shard`` the model.
    """
    c, patches, pixels = config, (s.image_size // s.patch_size) ** 2, 3 * s.patch_size**2
    tokens, weights, d = patches + s.cls_token, parameters(s), c.decoder_dim
    if c.method == "simmim":
        weights += s.dim * (pixels + 1) + pixels
        kept = s.depth * block_bytes(s.dim, s.mlp_dim, tokens)
    else:
        weights += s.dim * d + c.decoder_depth * (12 * d**2 + 13 * d) + d * (pixels + 4) + pixels
        visible = int((~random_mask(1, patches, c.mask_ratio)).sum()) + s.cls_token
        kept = s.depth * block_bytes(s.dim, s.mlp_dim, visible) + c.decoder_depth * block_bytes(
            d, 4 * d, tokens
        )
    states = 16 * weights  # weight, gradient and two moments
    if shard:
        # Two blocks put together, with gradients
        states = states / gpus + 2 * 8 * weights / s.depth
    # Prediction in both precisions, target, its patches' norm, difference
    loss = patches * pixels * (2 + 4 * 4)
    return SPARE * (
        states + 2 * weights + c.batch_size / gpus * (kept + loss + 2 * 4 * patches * pixels)
    )


def make_plan(
    s: ViTShape, config: RefineConfig, images: int, *, gpus: int = 1, memory: Memory = PLENTY
) -> Plan:
    """Cost of refining a ViT of shape ``s``.

    Args:
        config: the recipe.
        images: in the training set.
        gpus: the batch is shared by them; every one holds heads and queue, and the encoder unless
            it is sharded.
        memory: what trades time for memory.
    """
    if gpus < 1 or config.batch_size % gpus:
        raise InputError(
            f"expected gpus >= 1 that divide the batch of {config.batch_size}, got {gpus}"
        )
    if config.batch_size > images:
        raise InputError(
            f"a batch of {config.batch_size} needs at least that many images, the data set has {images}"
        )
    weights, c = parameters(s), config
    flops2, flops3 = (
        step_flops(s, c, train_encoder=train, memory=memory) for train in (False, True)
    )
    return Plan(
        weights,
        head_parameters(s, c),
        forward_flops(s, s.image_size),
        flops2,
        flops3,
        heads_total=flops2 * c.batch_size * stage_steps(images, c.batch_size, c.heads_epochs),
        refine_total=flops3 * c.batch_size * stage_steps(images, c.batch_size, c.refine_epochs),
        probe_bytes=SPARE
        * (6 * weights + 64 * (4 * 3 * s.image_size**2 + passing_bytes(s, s.image_size))),
        heads_bytes=training_bytes(s, c, train_encoder=False, gpus=gpus, memory=memory),
        refine_bytes=training_bytes(s, c, train_encoder=True, gpus=gpus, memory=memory),
    )


def gpu_hours(flops: float, tflops: float = 312) -> float:
    """Hours of one GPU with a peak of ``tflops`` TFLOP/s in bfloat16 (312: A100), of which training
    is assumed to reach ``USE``.
    """
    return flops / (tflops * 1e12 * USE) / 3600


def warn_of_pretraining(
    model: SimMIM | MAE, config: PretrainConfig, device: torch.device, shard: bool
) -> None:
    """Say, with advice, that pre-training ``model`` will probably not fit the GPU ``device``."""
    if card := card_bytes(device):
        needed = pretrain_bytes(
            _shape(model.encoder), config, gpus=distributed.world(), shard=shard
        )
        _warn_if_too_large({"stage 1 (pre-training)": needed}, card, PRETRAIN_ADVICE)


def warn_of_refinement(refiner: MIMRefiner, memory: Memory) -> None:
    """Say, with advice, that training will probably not fit the GPU that ``refiner`` is on."""
    if card := card_bytes(next(refiner.parameters()).device):
        s, how = _shape(refiner.encoder), {"gpus": distributed.world(), "memory": memory}
        needed = {
            name: training_bytes(s, refiner.config, train_encoder=train, **how)
            for name, train in (("stage 2 (heads)", False), ("stage 3 (refinement)", True))
        }
        _warn_if_too_large(needed, card, ADVICE)


def _shape(encoder: torch.nn.Module) -> ViTShape:
    grid, block, patch = (
        encoder.patch_embed.grid_size,
        encoder.blocks[0],
        encoder.patch_embed.patch_size[0],
    )
    mlp_dim = (
        sum(x.weight.shape[0] for x in block.mlp.modules() if isinstance(x, torch.nn.Linear))
        - encoder.embed_dim
    )
    return ViTShape(grid[0] * patch, patch, encoder.embed_dim, len(encoder.blocks), 1, mlp_dim)


def _warn_if_too_large(stages: dict[str, float], card: float, advice: str) -> None:
    for name, needed in stages.items():
        if needed > card and distributed.rank() == 0:
            print(
                f"{name} needs about {needed / 2**30:,.1f} GiB by estimate, this GPU has {card / 2**30:,.1f}: it may run out of "
                f"memory. To need less: {advice}",
                file=sys.stderr,
            )


def card_bytes(device: torch.device) -> int | None:
    """Memory of a GPU; None for a CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
