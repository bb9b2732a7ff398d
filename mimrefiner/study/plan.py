"""The plan of a refinement as text: memory and GPU-hours, foreseen from formulas."""

import math

from mimrefiner.config import RefineConfig
from mimrefiner.data.augment import paper_views
from mimrefiner.data.datasets import load_dataset
from mimrefiner.errors import InputError
from mimrefiner.models.catalogue import BY_NAME
from mimrefiner.models.layouts import ViTShape
from mimrefiner.study.presets import load_preset
from mimrefiner.training.cost import USE, gpu_hours, make_plan, pretrain_bytes, pretrain_total
from mimrefiner.training.memory import PLENTY, Memory

TRAINING_IMAGES = {
    "imagenet": 1_281_167,
    "cifar10": 45_000,
    "cifar100": 45_000,
    "fashion_mnist": 54_000,
    "tiny-imagenet": 90_000,
}


def shape_of(model: str) -> ViTShape:
    """Sizes of a plain ViT of the table of models."""
    from mimrefiner.models.encoders import row_shape

    row = BY_NAME.get(model)
    if row is None or not row.dim:
        names = ", ".join(name for name, m in BY_NAME.items() if m.dim)
        raise InputError(f"no plan for {model!r}: choose one of {names}")
    return row_shape(row)


def paper_recipe(s: ViTShape) -> RefineConfig:
    """The paper's recipe by size: L/16, H/14 or 2B/14 (the released settings); other sizes take
    L/16's.
    """
    local = 98 if s.patch_size == 14 else 96
    views, epochs = paper_views(224, local), 20 if s.post_norm else 30
    if s.dim == 1280:
        return RefineConfig(
            views, tuple(range(20, 32)), temperature=0.3, batch_size=512, refine_epochs=epochs
        )
    if s.dim == 2560:
        return RefineConfig(
            views,
            tuple(range(16, 24)),
            temperature=0.35,
            batch_size=512,
            refine_epochs=20,
            frozen_blocks=6,
        )
    return RefineConfig(views, refine_epochs=epochs)


def count_images(data: str, split: str = "train") -> int:
    """Training images of a data set by name or path, or a number; ``split``: which of those at a
    path are trained on.
    """
    if data.isdigit() and int(data) > 0:
        return int(data)
    return (
        TRAINING_IMAGES[data] if data in TRAINING_IMAGES else len(load_dataset(data, split=split))
    )


def report(
    model: str,
    data: str,
    preset: str = "paper",
    gpus: int = 1,
    tflops: float = 312,
    memory: Memory = PLENTY,
) -> str:
    """The plan of ``model`` on ``data`` as text."""
    s = shape_of(model)
    config = paper_recipe(s) if preset == "paper" else load_preset(preset).refine
    for crop in config.views.crops:
        if crop.size % s.patch_size:
            raise InputError(
                f"preset {preset} has crops of {crop.size} px, which patch size {s.patch_size} does not divide"
            )
    if not 0 < tflops < math.inf:
        raise InputError(f"expected tflops > 0, got {tflops}")
    # As training takes them
    images = count_images(data, "trainval" if preset.startswith("paper") else "train")
    p = make_plan(s, config, images, gpus=gpus, memory=memory)
    gib = 2**30
    heads, refinement = (gpu_hours(flops, tflops) for flops in (p.heads_total, p.refine_total))
    hours, epochs = (
        f"heads {_short(heads)}, refinement {_short(refinement)}",
        f"{config.heads_epochs:g} + {config.refine_epochs:g} epochs",
    )
    first_memory = ""
    if not preset.startswith("paper"):  # published weights need no pre-training
        stage1 = load_preset(preset).pretrain
        first_memory = f"pre-training {pretrain_bytes(s, stage1, gpus=gpus, shard=memory.shard) / gib:,.1f} GiB, "
        first = gpu_hours(pretrain_total(s, stage1, images), tflops)
        hours, epochs = f"pre-training {_short(first)}, {hours}", f"{stage1.epochs:g} + {epochs}"
    rows = [
        (
            "encoder",
            f"{p.parameters / 1e6:,.1f} M parameters, {p.forward_flops / 1e9:,.1f} GFLOPs per {s.image_size} px image",
        ),
        (
            "heads",
            f"{p.head_parameters / 1e6:,.1f} M parameters on blocks {list(config.resolve_blocks(s.depth))} (0-based)",
        ),
        (
            "FLOPs/image",
            f"heads {_short(p.heads_flops / 1e12)} T, refinement {_short(p.refine_flops / 1e12)} T",
        ),
        (
            "memory/GPU",
            f"probing {p.probe_bytes / gib:,.1f} GiB (batch 64), {first_memory}heads {p.heads_bytes / gib:,.1f} GiB, "
            f"refinement {p.refine_bytes / gib:,.1f} GiB (batch {config.batch_size} on {gpus} GPU{'s' * (gpus > 1)}, "
            "bfloat16)",
        ),
        (
            "GPU-hours",
            f"{hours}: {images:,} images, {epochs}, assuming {100 * USE:g} % of {tflops:g} TFLOP/s",
        ),
    ]
    return "\n".join(f"{name:12s} {text}" for name, text in rows)


def _short(x: float) -> str:
    return f"{x:,.1f}" if x >= 10 else f"{x:.2g}" if x < 0.1 else f"{x:.2f}"
