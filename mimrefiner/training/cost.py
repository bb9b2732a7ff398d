"""What refinement and pre-training cost: parameters, operations and memory, by formula.

Formulas answer at once and are tested against counted steps; torch's counter takes ten seconds for
a step of a ViT-L/16 on meta tensors.
"""

import logging
from collections import Counter
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from mimrefiner import distributed
from mimrefiner.config import PretrainConfig, RefineConfig
from mimrefiner.errors import InputError
from mimrefiner.method.nn_queue import LOOKUP_BYTES
from mimrefiner.method.refiner import MIMRefiner
from mimrefiner.models.layouts import ViTShape
from mimrefiner.models.masked import MAE, SimMIM, random_mask
from mimrefiner.training.memory import ADVICE, PLENTY, PRETRAIN_ADVICE, Memory
from mimrefiner.training.optim import stage_steps

logger = logging.getLogger(__name__)

_ATEN = torch.ops.aten
_FUSED = [  # attention kernels of GPUs and CPUs, forward and backward
    ("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward"),
    ("_scaled_dot_product_efficient_attention", "_scaled_dot_product_efficient_attention_backward"),
    ("_scaled_dot_product_cudnn_attention", "_scaled_dot_product_cudnn_attention_backward"),
    (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
]
SPARE = 1.1
USE = 0.4  # share of a GPU's peak that training reaches: an assumption, not a measurement


@dataclass(frozen=True)
class Plan:
    """What one model and recipe cost.

    Attributes:
        parameters: weights of the encoder.
        head_parameters: weights of all heads.
        forward_flops: operations per image of the encoder's forward pass.
        heads_flops: operations per image of stage 2.
        refine_flops: operations per image of stage 3.
        heads_total: operations of stage 2.
        refine_total: operations of stage 3.
        probe_bytes: memory for probing on one GPU.
        heads_bytes: memory for stage 2 on each GPU.
        refine_bytes: memory for stage 3 on each GPU.
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


def operation_counter() -> FlopCounterMode:
    """Counts the operations of what runs inside it, attention alike on every device.

    Going back, attention counts twice what it counts forward, as with plain operations; torch's own
    counter adds what GPUs' fused kernels compute again and overlooks those of CPUs.

    >>> with operation_counter() as counter:
    ...     _ = torch.ones(2, 3) @ torch.ones(3, 5)
    >>> counter.get_total_flops()
    60
    """
    formulas = {
        getattr(_ATEN, name): partial(_attention_flops, times=times, skipped=times - 1)
        for names in _FUSED
        for times, name in enumerate(names, 1)
        if hasattr(_ATEN, name)
    }
    return FlopCounterMode(display=False, custom_mapping=formulas)


def _attention_flops(*shapes, times: int, skipped: int, **_) -> int:
    """Two products for queries, keys and values, which follow ``skipped`` other arguments."""
    (batch, heads, queries, dim), (_, _, keys, _) = shapes[skipped : skipped + 2]
    return times * 2 * 2 * batch * heads * queries * keys * dim


def parameters(s: ViTShape) -> int:
    """Weights of a plain ViT, fixed positions included."""
    grid = s.image_size // s.patch_size
    embed = 3 * s.patch_size**2 * s.dim + s.dim + grid**2 * s.dim + s.cls_token * s.dim
    block = 4 * s.dim**2 + 2 * s.dim * s.mlp_dim + s.mlp_dim + 9 * s.dim
    return embed + s.depth * block + 2 * s.dim * (s.post_norm + s.final_norm)


def forward_flops(s: ViTShape, size: int) -> int:
    """Operations of one image of ``size`` px, as ``torch.utils.flop_counter`` counts them.

    These are matrix products and attention.
    """
    patches = (size // s.patch_size) ** 2
    return embed_flops(s, patches) + s.depth * block_flops(s.dim, s.mlp_dim, patches + s.cls_token)


def embed_flops(s: ViTShape, patches: int) -> int:
    """Operations of the patch embedding; as many go back, since images need no gradient."""
    return 2 * patches * 3 * s.patch_size**2 * s.dim


def block_flops(dim: int, mlp_dim: int, tokens: int) -> int:
    """Operations of one block forward; twice as many go back."""
    return tokens * (8 * dim**2 + 4 * dim * mlp_dim) + 4 * tokens**2 * dim


def pretrain_flops(s: ViTShape, config: PretrainConfig) -> int:
    """Operations per image of masked pre-training, forward and backward."""
    patches = (s.image_size // s.patch_size) ** 2
    pixels = 3 * s.patch_size**2
    seen, d = patches + s.cls_token, config.decoder_dim
    head = 2 * patches * s.dim * pixels
    if config.method == "mae":
        seen = _visible(s, config)
        decoder = config.decoder_depth * block_flops(d, 4 * d, patches + s.cls_token)
        head = 2 * seen * s.dim * d + decoder + 2 * patches * d * pixels
    blocks = s.depth * block_flops(s.dim, s.mlp_dim, seen)
    return 2 * embed_flops(s, patches) + 3 * (blocks + head)


def _visible(s: ViTShape, config: PretrainConfig) -> int:
    """Tokens that MAE's encoder sees."""
    mask = random_mask(1, (s.image_size // s.patch_size) ** 2, config.mask_ratio)
    return int((~mask).sum()) + s.cls_token


def pretrain_total(s: ViTShape, config: PretrainConfig, images: int) -> int:
    """Operations of the whole pre-training on a data set of so many images."""
    steps = stage_steps(images, config.batch_size, config.epochs)
    return pretrain_flops(s, config) * config.batch_size * steps


def head_parameters(s: ViTShape, config: RefineConfig) -> int:
    """Weights of all heads."""
    c = config
    products = s.dim * c.hidden_dim + c.hidden_dim**2 + c.hidden_dim * c.out_dim
    norms = 4 * c.hidden_dim + 2 * c.out_dim + 2 * c.predictor_dim
    predictor = 2 * c.out_dim * c.predictor_dim
    return len(config.resolve_blocks(s.depth)) * (products + norms + predictor)


def step_flops(
    s: ViTShape, config: RefineConfig, *, train_encoder: bool, memory: Memory = PLENTY
) -> int:
    """Operations per image of stage 2 or 3 (``train_encoder``), forward and backward."""
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
    # Gradients go to the predictions only
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
    """Bytes that the blocks keep for one image's backward pass under autocast."""
    return s.depth * block_bytes(s.dim, s.mlp_dim, (size // s.patch_size) ** 2 + s.cls_token)


def block_bytes(dim: int, mlp_dim: int, tokens: int) -> int:
    """Bytes that one block keeps of one image.

    They are the inputs of norms (float32), products and attention (bfloat16).
    """
    return tokens * (2 * 4 * dim + 2 * (6 * dim + 2 * mlp_dim))


def passing_bytes(s: ViTShape, size: int) -> int:
    """Bytes that exist at once while one image passes without a graph, under autocast.

    They are a block's input, sum, norm, MLP and output.
    """
    tokens = (size // s.patch_size) ** 2 + s.cls_token
    return tokens * (14 * s.dim + 4 * s.mlp_dim)


def kept_bytes(s: ViTShape, size: int, *, recompute: bool) -> int:
    """:func:`activation_bytes`, or the blocks' inputs alone if they are computed again."""
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
    """Bytes that stage 2 or 3 (``train_encoder``) needs on each of ``gpus`` that share a batch."""
    c, heads, views = config, len(config.resolve_blocks(s.depth)), len(config.views.crops)
    share = config.batch_size / gpus
    at_once = min(share, memory.micro_batch or share)
    # Crops of one size pass the encoder together
    sizes = Counter(crop.size for crop in c.views.crops)
    pixels = 3 * sum(n * size**2 for size, n in sizes.items())
    widths = s.dim + 4 * c.hidden_dim + 2 * c.out_dim + 2 * c.predictor_dim
    lookup = min(4 * heads * share * 2 * c.queue_size, LOOKUP_BYTES)
    in_heads = 4 * share * views * heads * widths + lookup
    # Of a head's weight: itself, gradient and two moments in float32, itself in bfloat16
    always = 18 * head_parameters(s, c) + 2 * 4 * heads * c.queue_size * c.out_dim
    always += 4 * (share + at_once) * pixels
    if not train_encoder:
        passing = at_once * max(n * passing_bytes(s, size) for size, n in sizes.items())
        return SPARE * (4 * parameters(s) + always + max(passing, in_heads))
    trained = 1 - c.frozen_blocks / s.depth
    kept = {size: n * kept_bytes(s, size, recompute=memory.recompute) for size, n in sizes.items()}
    kept = at_once * trained * sum(kept.values())
    again = max(n * activation_bytes(s, size) for size, n in sizes.items()) / s.depth
    again *= at_once * memory.recompute
    always += _encoder_state_bytes(s, trained, gpus, memory)
    if memory.micro_batch:  # heads and encoder go back one after the other
        return SPARE * (always + max(in_heads, kept + again))
    return SPARE * (always + kept + max(in_heads, again))


def _encoder_state_bytes(s: ViTShape, trained: float, gpus: int, memory: Memory) -> float:
    """Bytes of an encoder's weights and of what training keeps for the share that is trained."""
    weights = parameters(s)
    states = weights * (8 + 12 * trained)  # weight and moving average; gradient and two moments
    if memory.micro_batch and gpus > 1 and not memory.shard:
        # Gradients are added up beside the messages in which they are averaged
        states += 4 * trained * weights
    if memory.shard:
        # Two blocks are put together, with gradients
        states = states / gpus + 4 * 4 * weights / s.depth
    return states + 2 * trained * weights  # in bfloat16


def pretrain_bytes(
    s: ViTShape, config: PretrainConfig, *, gpus: int = 1, shard: bool = False
) -> float:
    """Bytes that masked pre-training needs on each of ``gpus``, which share a batch.

    With ``shard`` they share the model too.
    """
    c, patches, pixels = config, (s.image_size // s.patch_size) ** 2, 3 * s.patch_size**2
    tokens, weights, d = patches + s.cls_token, parameters(s), c.decoder_dim
    if c.method == "simmim":
        weights += s.dim * (pixels + 1) + pixels
        kept = s.depth * block_bytes(s.dim, s.mlp_dim, tokens)
    else:
        weights += s.dim * d + c.decoder_depth * (12 * d**2 + 13 * d) + d * (pixels + 4) + pixels
        kept = s.depth * block_bytes(s.dim, s.mlp_dim, _visible(s, c))
        kept += c.decoder_depth * block_bytes(d, 4 * d, tokens)
    states = 16 * weights  # weight, gradient and two moments
    if shard:
        # Two blocks are put together, with gradients
        states = states / gpus + 2 * 8 * weights / s.depth
    # Prediction in both precisions, target, its patches' norm, difference
    loss = patches * pixels * (2 + 4 * 4)
    per_image = kept + loss + 2 * 4 * patches * pixels
    return SPARE * (states + 2 * weights + c.batch_size / gpus * per_image)


def make_plan(
    s: ViTShape, config: RefineConfig, images: int, *, gpus: int = 1, memory: Memory = PLENTY
) -> Plan:
    """What it costs to refine a ViT.

    Args:
        s: its shape.
        config: the recipe.
        images: how many the training set has.
        gpus: how many share a batch; every one holds heads and queue, and the encoder unless it is
            sharded.
        memory: what trades time for memory.
    """
    if gpus < 1 or config.batch_size % gpus:
        raise InputError(
            f"expected gpus >= 1 that divide the batch of {config.batch_size}, got {gpus}"
        )
    if config.batch_size > images:
        raise InputError(
            f"a batch of {config.batch_size} needs at least that many images, "
            f"the data set has {images}: take a smaller batch_size (of commands: another "
            "--preset), or more images"
        )
    weights, c = parameters(s), config
    heads, both = (step_flops(s, c, train_encoder=train, memory=memory) for train in (False, True))
    image = 4 * 3 * s.image_size**2 + passing_bytes(s, s.image_size)
    return Plan(
        parameters=weights,
        head_parameters=head_parameters(s, c),
        forward_flops=forward_flops(s, s.image_size),
        heads_flops=heads,
        refine_flops=both,
        heads_total=heads * c.batch_size * stage_steps(images, c.batch_size, c.heads_epochs),
        refine_total=both * c.batch_size * stage_steps(images, c.batch_size, c.refine_epochs),
        probe_bytes=SPARE * (6 * weights + 64 * image),
        heads_bytes=training_bytes(s, c, train_encoder=False, gpus=gpus, memory=memory),
        refine_bytes=training_bytes(s, c, train_encoder=True, gpus=gpus, memory=memory),
    )


def gpu_hours(flops: float, tflops: float = 312) -> float:
    """Hours on one GPU, of whose peak training is assumed to reach the share :data:`USE`.

    Args:
        flops: operations.
        tflops: the peak in bfloat16, in TFLOP/s (312: A100).

    >>> gpu_hours(4.4928e17)
    1.0
    """
    return flops / (tflops * 1e12 * USE) / 3600


def warn_of_pretraining(
    model: SimMIM | MAE, config: PretrainConfig, device: torch.device, shard: bool
) -> None:
    """Warn, with advice, if pre-training ``model`` will probably not fit the GPU ``device``."""
    if card := card_bytes(device):
        needed = pretrain_bytes(
            vit_shape(model.encoder), config, gpus=distributed.world(), shard=shard
        )
        warn_if_too_large({"stage 1 (pre-training)": needed}, card, PRETRAIN_ADVICE)


def warn_of_refinement(refiner: MIMRefiner, memory: Memory) -> None:
    """Warn, with advice, if refinement will probably not fit the GPU that ``refiner`` is on."""
    if card := card_bytes(next(refiner.parameters()).device):
        s, how = vit_shape(refiner.encoder), {"gpus": distributed.world(), "memory": memory}
        needed = {
            name: training_bytes(s, refiner.config, train_encoder=train, **how)
            for name, train in (("stage 2 (heads)", False), ("stage 3 (refinement)", True))
        }
        warn_if_too_large(needed, card, ADVICE)


def vit_shape(encoder: torch.nn.Module) -> ViTShape:
    """The sizes of a plain ViT as far as costs depend on them (attention heads do not count)."""
    grid, patch = encoder.patch_embed.grid_size, encoder.patch_embed.patch_size[0]
    dim, linear = encoder.embed_dim, torch.nn.Linear
    widths = [x.out_features for x in encoder.blocks[0].mlp.modules() if isinstance(x, linear)]
    return ViTShape(grid[0] * patch, patch, dim, len(encoder.blocks), 1, sum(widths) - dim)


def warn_if_too_large(stages: dict[str, float], card: float, advice: str) -> None:
    """Warn of every stage, name -> bytes, that needs more than a GPU of ``card`` bytes has."""
    for name, needed in stages.items():
        if needed > card and distributed.rank() == 0:
            logger.warning(
                "%s needs about %s GiB by estimate, this GPU has %s: it may run out of memory. "
                "To need less: %s",
                name,
                f"{needed / 2**30:,.1f}",
                f"{card / 2**30:,.1f}",
                advice,
            )


def card_bytes(device: torch.device) -> int | None:
    """Memory of a GPU; None for a CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
