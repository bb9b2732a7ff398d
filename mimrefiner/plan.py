"""What a model will cost before it is loaded: parameters, FLOPs, memory and GPU-hours, from formulas.

A multiplication and an addition count as two. Memory is an estimate: the tensors that must exist, plus a tenth for what the
formulas leave out (temporary buffers, fragmentation).
"""

import sys
from dataclasses import dataclass

import torch

from mimrefiner import distributed
from mimrefiner.augment import paper_views
from mimrefiner.catalogue import BY_NAME
from mimrefiner.config import RefineConfig, load_preset
from mimrefiner.data import load_dataset
from mimrefiner.errors import InputError
from mimrefiner.layouts import ViTShape
from mimrefiner.memory import ADVICE, PLENTY, Memory
from mimrefiner.nn_queue import LOOKUP_BYTES
from mimrefiner.refiner import MIMRefiner

SPARE = 1.1
TRAINING_IMAGES = {"imagenet": 1_281_167, "cifar10": 45_000, "cifar100": 45_000, "fashion_mnist": 54_000, "tiny-imagenet": 90_000}


@dataclass(frozen=True)
class Plan:
    """Cost of one model and recipe. FLOPs are per image, memory is in bytes per GPU, hours are those of one GPU."""

    parameters: int
    head_parameters: int
    forward_flops: float
    heads_flops: float
    refine_flops: float
    probe_bytes: float
    heads_bytes: float
    refine_bytes: float
    heads_hours: float
    refine_hours: float


def parameters(s: ViTShape) -> int:
    """Weights of a plain ViT, fixed positions included."""
    grid = s.image_size // s.patch_size
    embed = 3 * s.patch_size**2 * s.dim + s.dim + grid**2 * s.dim + s.cls_token * s.dim
    block = 4 * s.dim**2 + 2 * s.dim * s.mlp_dim + s.mlp_dim + 9 * s.dim
    return embed + s.depth * block + 2 * s.dim * (s.post_norm + s.final_norm)


def forward_flops(s: ViTShape, size: int) -> int:
    """Operations of one image of ``size`` px: matrix products and attention, as ``torch.utils.flop_counter`` counts them."""
    patches = (size // s.patch_size) ** 2
    tokens = patches + s.cls_token
    block = tokens * (8 * s.dim**2 + 4 * s.dim * s.mlp_dim) + 4 * tokens**2 * s.dim
    return 2 * patches * 3 * s.patch_size**2 * s.dim + s.depth * block


def head_parameters(s: ViTShape, config: RefineConfig) -> int:
    """Weights of all heads."""
    c = config
    projector = s.dim * c.hidden_dim + c.hidden_dim**2 + c.hidden_dim * c.out_dim + 4 * c.hidden_dim + 2 * c.out_dim
    predictor = 2 * c.out_dim * c.predictor_dim + 2 * c.predictor_dim
    return len(config.resolve_blocks(s.depth)) * (projector + predictor)


def step_flops(s: ViTShape, config: RefineConfig, *, train_encoder: bool) -> float:
    """Operations per image of stage 2 or 3: encoder, heads, queue and loss; a backward pass costs two forward ones."""
    c, heads, views = config, len(config.resolve_blocks(s.depth)), len(config.views.crops)
    global_views = len(c.views.global_crops)
    encoder = sum(forward_flops(s, crop.size) for crop in c.views.crops)
    first = s.dim * c.hidden_dim
    rest = c.hidden_dim**2 + c.hidden_dim * c.out_dim + 2 * c.out_dim * c.predictor_dim
    backward = 2 * first if train_encoder else first  # stage 2 needs no gradient of the heads' input
    head = 2 * views * heads * (first + backward + 3 * rest)
    queue = 2 * heads * global_views * c.queue_size * c.out_dim
    loss = 2 * heads * global_views * views * c.batch_size * c.out_dim * 2  # gradient to the predictions only
    return encoder * (3 if train_encoder else 1) + head + queue + loss


def activation_bytes(s: ViTShape, size: int, *, autocast: bool = True) -> int:
    """Bytes that the blocks keep for the backward pass of one image: inputs of norms, products and attention."""
    tokens = (size // s.patch_size) ** 2 + s.cls_token
    if autocast:  # float32 residual stream, bfloat16 products
        return s.depth * tokens * (2 * 4 * s.dim + 2 * (6 * s.dim + 2 * s.mlp_dim))
    return s.depth * tokens * 4 * (8 * s.dim + 2 * s.mlp_dim)


def kept_bytes(s: ViTShape, size: int, *, recompute: bool) -> int:
    """:func:`activation_bytes` under autocast, or, if blocks are computed again, the inputs of the blocks only."""
    tokens = (size // s.patch_size) ** 2 + s.cls_token
    return s.depth * tokens * 4 * s.dim if recompute else activation_bytes(s, size)


def training_bytes(s: ViTShape, config: RefineConfig, *, train_encoder: bool, gpus: int = 1, memory: Memory = PLENTY) -> float:
    """Bytes that stage 2 or 3 needs on each of ``gpus`` that share the batch."""
    c, heads, views = config, len(config.resolve_blocks(s.depth)), len(config.views.crops)
    weights, share = parameters(s), config.batch_size / gpus
    at_once = min(share, memory.micro_batch or share)
    queue = 2 * 4 * heads * c.queue_size * c.out_dim + min(4 * heads * share * 2 * c.queue_size, LOOKUP_BYTES)
    widths = s.dim + 4 * c.hidden_dim + 2 * c.out_dim + 2 * c.predictor_dim
    head_bytes = 16 * head_parameters(s, c) + queue + 4 * share * views * heads * widths  # weight, gradient, two moments
    block = at_once * views * max(activation_bytes(s, crop.size) for crop in c.views.crops) / s.depth
    if not train_encoder:
        return SPARE * (4 * weights + head_bytes + block)
    trained = 1 - c.frozen_blocks / s.depth
    states = weights * (8 + 12 * trained)  # weight and moving average; gradient and two moments
    if memory.shard:
        states = states / gpus + 4 * 4 * weights / s.depth  # two blocks put together, with gradients
    kept = sum(kept_bytes(s, crop.size, recompute=memory.recompute) for crop in c.views.crops)
    return SPARE * (states + head_bytes + at_once * trained * kept + block * memory.recompute)


def make_plan(
    s: ViTShape,
    config: RefineConfig,
    images: int,
    *,
    gpus: int = 1,
    tflops: float = 312,
    use: float = 0.4,
    memory: Memory = PLENTY,
) -> Plan:
    """Cost of refining a ViT of shape ``s``.

    Args:
        config: the recipe.
        images: in the training set.
        gpus: the batch is shared by them; every one holds heads and queue, and the encoder unless it is sharded.
        tflops: the peak of one GPU in bfloat16 (312: A100).
        use: the share of it that training reaches; an assumption, not a measurement.
        memory: what trades time for memory; its time is not counted.
    """
    weights = parameters(s)
    flops2, flops3 = (step_flops(s, config, train_encoder=train) for train in (False, True))
    hours = images / (tflops * 1e12 * use) / 3600
    return Plan(
        weights, head_parameters(s, config), forward_flops(s, s.image_size), flops2, flops3,
        probe_bytes=SPARE * (4 * weights + 64 * activation_bytes(s, s.image_size) / s.depth),
        heads_bytes=training_bytes(s, config, train_encoder=False, gpus=gpus, memory=memory),
        refine_bytes=training_bytes(s, config, train_encoder=True, gpus=gpus, memory=memory),
        heads_hours=hours * flops2 * config.heads_epochs, refine_hours=hours * flops3 * config.refine_epochs,
    )  # fmt: skip


def warn_if_too_large(refiner: MIMRefiner, memory: Memory) -> None:
    """Say, with advice, that training will probably not fit the GPU that ``refiner`` is on."""
    encoder, device = refiner.encoder, next(refiner.parameters()).device
    card = card_bytes(device)
    if card is None or distributed.rank() != 0:
        return
    grid, block = encoder.patch_embed.grid_size, encoder.blocks[0]
    patch = encoder.patch_embed.patch_size[0]
    mlp_dim = sum(x.weight.shape[0] for x in block.mlp.modules() if isinstance(x, torch.nn.Linear)) - encoder.embed_dim
    s = ViTShape(grid[0] * patch, patch, encoder.embed_dim, refiner.depth, 1, mlp_dim)
    stages = {
        name: training_bytes(s, refiner.config, train_encoder=train, gpus=distributed.world(), memory=memory)
        for name, train in (("stage 2 (heads)", False), ("stage 3 (refinement)", True))
    }
    for name, needed in stages.items():
        if needed > card:
            print(
                f"{name} needs about {needed / 2**30:,.1f} GiB by estimate, this GPU has {card / 2**30:,.1f}: it may run out of "
                f"memory. To need less: {ADVICE}",
                file=sys.stderr,
            )


def card_bytes(device: torch.device) -> int | None:
    """Memory of a GPU; None for a CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def shape_of(model: str) -> ViTShape:
    """Sizes of a plain ViT of the table of models."""
    from mimrefiner.models import row_shape

    row = BY_NAME.get(model)
    if row is None or not row.dim:
        names = ", ".join(name for name, m in BY_NAME.items() if m.dim)
        raise InputError(f"no plan for {model!r}: choose one of {names}")
    return row_shape(row)


def paper_recipe(s: ViTShape) -> RefineConfig:
    """The paper's recipe by size: L/16, H/14 or 2B/14 (the released settings); other sizes take L/16's."""
    local = 98 if s.patch_size == 14 else 96
    views, epochs = paper_views(224, local), 20 if s.post_norm else 30
    if s.dim == 1280:
        return RefineConfig(views, tuple(range(20, 32)), temperature=0.3, batch_size=512, refine_epochs=epochs)
    if s.dim == 2560:
        return RefineConfig(views, tuple(range(16, 24)), temperature=0.35, batch_size=512, refine_epochs=20, frozen_blocks=6)
    return RefineConfig(views, refine_epochs=epochs)


def count_images(data: str) -> int:
    """Training images of a data set by name or path, or a number."""
    if data.isdigit() and int(data) > 0:
        return int(data)
    return TRAINING_IMAGES[data] if data in TRAINING_IMAGES else len(load_dataset(data, split="train"))


def report(model: str, data: str, preset: str = "paper", gpus: int = 1, tflops: float = 312, memory: Memory = PLENTY) -> str:
    """The plan of ``model`` on ``data`` as text."""
    s = shape_of(model)
    config = paper_recipe(s) if preset == "paper" else load_preset(preset).refine
    for crop in config.views.crops:
        if crop.size % s.patch_size:
            raise InputError(f"preset {preset} has crops of {crop.size} px, which patch size {s.patch_size} does not divide")
    if gpus < 1 or tflops <= 0:
        raise InputError(f"expected gpus >= 1 and tflops > 0, got {gpus} and {tflops}")
    images = count_images(data)
    p = make_plan(s, config, images, gpus=gpus, tflops=tflops, memory=memory)
    gib = 2**30
    rows = [
        ("encoder", f"{p.parameters / 1e6:,.1f} M parameters, {p.forward_flops / 1e9:,.1f} GFLOPs per {s.image_size} px image"),
        ("heads", f"{p.head_parameters / 1e6:,.1f} M parameters on blocks {list(config.resolve_blocks(s.depth))} (0-based)"),
        ("FLOPs/image", f"heads {p.heads_flops / 1e12:,.2f} T, refinement {p.refine_flops / 1e12:,.2f} T"),
        ("memory/GPU", f"probing {p.probe_bytes / gib:,.1f} GiB (batch 64), heads {p.heads_bytes / gib:,.1f} GiB, refinement "
                       f"{p.refine_bytes / gib:,.1f} GiB (batch {config.batch_size} on {gpus} GPUs, bfloat16)"),
        ("GPU-hours", f"heads {p.heads_hours:,.1f}, refinement {p.refine_hours:,.1f}: {images:,} images, "
                      f"{config.heads_epochs:g} + {config.refine_epochs:g} epochs, assuming 40 % of {tflops:g} TFLOP/s"),
    ]  # fmt: skip
    return "\n".join(f"{name:12s} {text}" for name, text in rows)
