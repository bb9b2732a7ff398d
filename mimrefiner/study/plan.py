"""The plan of a refinement or fine-tuning as text: memory and GPU-hours, foreseen from formulas."""

import math
import re
from dataclasses import dataclass, replace

from mimrefiner.config import RefineConfig
from mimrefiner.data.datasets import load_dataset
from mimrefiner.errors import InputError
from mimrefiner.models.catalogue import BY_NAME
from mimrefiner.models.layouts import ReleasedViT, ViTShape
from mimrefiner.study.presets import (
    PAPER_SIZES,
    load_preset,
    paper_crops,
    paper_refinement,
)
from mimrefiner.training.cost import (
    USE,
    Plan,
    gpu_hours,
    make_plan,
    pretrain_bytes,
    pretrain_total,
    vit_shape,
)
from mimrefiner.training.finetune_cost import finetune_bytes, finetune_total
from mimrefiner.training.memory import PLENTY, Memory
from mimrefiner.training.recipes import IMAGENET_TRAIN, RECIPES, recipe_named

GIB = 2**30
TRAINING_IMAGES = {
    "imagenet": IMAGENET_TRAIN,
    "cifar10": 45_000,
    "cifar100": 45_000,
    "fashion_mnist": 54_000,
    "tiny-imagenet": 90_000,
}


def shape_of(model: str, num_heads: int | None = None) -> ViTShape:
    """Sizes of a plain ViT: a row of the table of models, or what ``load_encoder`` takes."""
    from mimrefiner.models.encoders import load_encoder, row_shape

    row = BY_NAME.get(model)
    if row is not None and row.dim:
        return row_shape(row)
    try:
        encoder = load_encoder(model, num_heads=num_heads, pretrained=False)
    except InputError as error:
        raise InputError(f"no plan for {model!r}: {error}") from error
    if not all(hasattr(encoder, part) for part in ("blocks", "embed_dim", "patch_embed")):
        names = ", ".join(name for name, m in BY_NAME.items() if m.dim)
        raise InputError(f"no plan for {model!r}, which is no plain ViT: choose one of {names}")
    return encoder.shape if isinstance(encoder, ReleasedViT) else vit_shape(encoder)


def paper_recipe(s: ViTShape) -> RefineConfig:
    """The paper's recipe for a ViT of shape ``s``; sizes that it does not have take L/16's."""
    family = "d2v2" if s.post_norm else "mae"
    for size in ("h14", "2b14"):
        if PAPER_SIZES[size].encoder.dim == s.dim:
            return replace(paper_refinement(size, family), views=paper_crops(s.patch_size))
    return replace(paper_refinement("l16", family), views=paper_crops(s.patch_size), blocks=None)


def count_images(data: str, split: str = "train") -> int:
    """The number of training images.

    Args:
        data: a number such as 1281167, 1,281,167 or 1e6, or a data set by name or path.
        split: which images of a data set by path are trained on.

    >>> count_images("1,281,167"), count_images("1e6")
    (1281167, 1000000)
    """
    if re.fullmatch(r"[\d,_]{1,20}|\d+(\.\d+)?e\d{1,2}", data) and data[0].isdigit():
        number = float(re.sub("[,_]", "", data))
        if 1 <= number == int(number):
            return int(number)
    return (
        TRAINING_IMAGES[data] if data in TRAINING_IMAGES else len(load_dataset(data, split=split))
    )


@dataclass(frozen=True)
class Stage:
    """What one stage of training costs: operations in all, bytes on each GPU, epochs."""

    name: str
    flops: float
    bytes: float
    epochs: float


def plan_text(
    model: str,
    data: str,
    preset: str = "paper",
    gpus: int = 1,
    tflops: float = 312,
    memory: Memory = PLENTY,
    num_heads: int | None = None,
) -> str:
    """The plan of refining ``model`` on ``data`` as text.

    Args:
        model: a plain ViT of the table of models, or what ``load_encoder`` takes.
        data: see :func:`count_images`.
        preset: its recipe; "paper" takes the paper's by the model's size.
        gpus: how many share the batch.
        tflops: the peak of one GPU in bfloat16, TFLOP/s.
        memory: what trades time for memory.
        num_heads: attention heads, where a file does not tell.

    >>> print(plan_text("mae_l16", "imagenet").splitlines()[0])
    encoder      303.3 M parameters, 123.1 GFLOPs per 224 px image
    """
    s = shape_of(model, num_heads)
    config = paper_recipe(s) if preset == "paper" else load_preset(preset).refine
    for crop in config.views.crops:
        if crop.size % s.patch_size:
            raise InputError(
                f"preset {preset} has crops of {crop.size} px, which patch size {s.patch_size} "
                "does not divide"
            )
    if not 0 < tflops < math.inf:
        raise InputError(f"expected tflops > 0, got {tflops}")
    published = preset.startswith("paper")  # published weights need no pre-training
    images = count_images(data, "trainval" if published else "train")  # as training takes them
    p = make_plan(s, config, images, gpus=gpus, memory=memory)
    stages = [
        Stage("heads", p.heads_total, p.heads_bytes, config.heads_epochs),
        Stage("refinement", p.refine_total, p.refine_bytes, config.refine_epochs),
    ]
    if not published:
        first = load_preset(preset).pretrain
        needed = pretrain_bytes(s, first, gpus=gpus, shard=memory.shard)
        total = pretrain_total(s, first, images)
        stages.insert(0, Stage("pre-training", total, needed, first.epochs))
    batch = f"batch {config.batch_size} on {gpus} GPU{'s' * (gpus > 1)}, bfloat16"
    blocks = list(config.resolve_blocks(s.depth))
    rows = _model_rows(p, s.image_size, blocks) + _cost_rows(p, stages, batch, images, tflops)
    return "\n".join(f"{name:12s} {text}" for name, text in rows)


def _model_rows(p: Plan, image_size: int, blocks: list[int]) -> list[tuple[str, str]]:
    size, work = f"{p.parameters / 1e6:,.1f} M parameters", f"{p.forward_flops / 1e9:,.1f} GFLOPs"
    heads = f"{p.head_parameters / 1e6:,.1f} M parameters on blocks {blocks} (0-based)"
    each = [_short(flops / 1e12) for flops in (p.heads_flops, p.refine_flops)]
    return [
        ("encoder", f"{size}, {work} per {image_size} px image"),
        ("heads", heads),
        ("FLOPs/image", f"heads {each[0]} T, refinement {each[1]} T"),
    ]


def _cost_rows(
    p: Plan, stages: list[Stage], batch: str, images: int, tflops: float
) -> list[tuple[str, str]]:
    needs = ", ".join(f"{stage.name} {stage.bytes / GIB:,.1f} GiB" for stage in stages)
    hours = [f"{stage.name} {_short(gpu_hours(stage.flops, tflops))}" for stage in stages]
    epochs = " + ".join(f"{stage.epochs:g}" for stage in stages)
    assumed = f"assuming {100 * USE:g} % of {tflops:g} TFLOP/s"
    return [
        ("memory/GPU", f"probing {p.probe_bytes / GIB:,.1f} GiB (batch 64), {needs} ({batch})"),
        ("GPU-hours", f"{', '.join(hours)}: {images:,} images, {epochs} epochs, {assumed}"),
    ]


def _short(x: float) -> str:
    return f"{x:,.1f}" if x >= 10 else f"{x:.2g}" if x < 0.1 else f"{x:.2f}"


def finetune_plan(
    model: str,
    recipe: str = "all",
    gpus: int = 1,
    tflops: float = 312,
    memory: Memory = PLENTY,
) -> str:
    """What fine-tuning ``model`` costs, as text: one line per recipe, on the paper's images.

    Args:
        model: a plain ViT of the table of models.
        recipe: a recipe's name, or "all".
        gpus: how many share the batch.
        tflops: the peak of one GPU in bfloat16, TFLOP/s.
        memory: what trades time for memory.

    >>> print(finetune_plan("mae_l16", "in1k", gpus=8).splitlines()[0].split(":")[0])
    mae_l16, 8 GPUs, assuming 40 % of 312 TFLOP/s each
    """
    if not 0 < tflops < math.inf:
        raise InputError(f"expected tflops > 0, got {tflops}")
    s = shape_of(model)
    chosen = RECIPES if recipe == "all" else (recipe_named(recipe, s.dim),)
    lines = [
        f"{model}, {gpus} GPU{'s' * (gpus > 1)}, assuming {100 * USE:g} % of {tflops:g} TFLOP/s "
        "each: memory of a GPU, GPU-hours without tests"
    ]
    for r in chosen:
        # Small batches are not divided among more GPUs than divide them
        shared = math.gcd(gpus, r.batch_size) if recipe == "all" else gpus
        room = finetune_bytes(s, r, r.classes, gpus=shared, memory=memory) / GIB
        hours = gpu_hours(finetune_total(s, r, r.images, r.classes, memory), tflops)
        batch = f"{r.images:,} images, {r.epochs:g} epochs, batch {r.batch_size}"
        batch += f" on {shared}" * (shared != gpus)
        lines.append(f"{r.name:26s} {room:7,.1f} GiB  {_short(hours):>8s} h  {batch}")
    return "\n".join(lines)
