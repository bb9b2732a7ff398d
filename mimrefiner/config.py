"""Settings as frozen dataclasses, and the presets: functions whose docstrings state cost and expected outcome.

Blocks are 0-based. Learning rates are base rates: the rate used is ``base_lr * batch_size / 256``.
"""

import functools
import math
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from numbers import Integral

from mimrefiner.augment import Views, digit_views, paper_views, small_views
from mimrefiner.errors import InputError

LOSS_SCHEDULES = ("constant", "uniform decay", "staggered decay", "staggered step", "one-hot")


@dataclass(frozen=True)
class ViTConfig:
    """A ViT trained from scratch; sizes in pixels and channels."""

    image_size: int = 32
    patch_size: int = 8
    dim: int = 64
    depth: int = 12
    num_heads: int = 4

    def __post_init__(self):
        _whole(1, **asdict(self))
        if self.image_size % self.patch_size:
            raise InputError(f"image size {self.image_size} is not divisible by the patch size {self.patch_size}")
        if self.dim % self.num_heads:
            raise InputError(f"dim {self.dim} is not divisible by {self.num_heads} attention heads")


@dataclass(frozen=True)
class PretrainConfig:
    """Masked-image pre-training (stage 1).

    ``method``: "simmim" (mask tokens go through the encoder, linear head; arXiv 2111.09886) or "mae" (the encoder sees visible
    patches, a decoder of ``decoder_depth`` blocks rebuilds the rest; arXiv 2111.06377). ``clip_norm``: limit of the norm of all
    gradients together; None: no limit.
    """

    method: str = "simmim"
    mask_ratio: float = 0.6
    decoder_depth: int = 1
    decoder_dim: int = 128
    decoder_heads: int = 4
    epochs: float = 200
    batch_size: int = 128
    base_lr: float = 4e-3
    min_lr: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    warmup_share: float = 0.05
    crop_scale: tuple[float, float] = (0.2, 1.0)
    flip: bool = True
    clip_norm: float | None = None
    seed: int = 0

    def __post_init__(self):
        _one_of("method", self.method, ("simmim", "mae"))
        _check(0 < self.mask_ratio < 1, f"mask_ratio must lie between 0 and 1, got {self.mask_ratio}")
        _check(self.epochs > 0 and self.batch_size > 1, f"need epochs > 0 and batch_size > 1, got {self.epochs}, {self.batch_size}")
        _whole(0, decoder_depth=self.decoder_depth, seed=self.seed)
        _whole(1, decoder_dim=self.decoder_dim, decoder_heads=self.decoder_heads, batch_size=self.batch_size)
        low, high = self.crop_scale
        _check(0 < low <= high <= 1, f"crop_scale must be two shares of the area, such as (0.2, 1), got {self.crop_scale}")
        _check(0 <= self.warmup_share <= 1, f"warmup_share must lie between 0 and 1, got {self.warmup_share}")
        _finite(epochs=self.epochs, base_lr=self.base_lr, min_lr=self.min_lr, weight_decay=self.weight_decay)
        _check_betas(self.betas)
        _check_limit(self.clip_norm)


@dataclass(frozen=True)
class RefineConfig:
    """Refinement: stage 2 (heads only) and stage 3 (encoder and heads). Defaults: the paper's ViT-L/16 recipe.

    ``blocks`` None takes the last third of the blocks. ``pairing``: see :func:`mimrefiner.losses.pair_weights`;
    ``loss_schedule``: of stage 3, see :func:`mimrefiner.losses.head_weights`.
    ``ema_decay`` None keeps the same averaging horizon as a share of training: 1 - 1 / (0.27 * steps). ``clip_norm``: limit of
    the norm of all gradients together; None, as in the paper: no limit.
    """

    views: Views
    blocks: tuple[int, ...] | None = None
    pool: str = "cls"
    hidden_dim: int = 2048
    out_dim: int = 256
    predictor_dim: int = 4096
    queue_size: int = 65536
    temperature: float = 0.2
    heads_top_k: int = 1
    refine_top_k: int = 20
    pairing: str = "intended"
    loss_schedule: str = "constant"
    swap_negatives: bool = False
    batch_size: int = 1024
    heads_epochs: float = 20
    heads_base_lr: float = 2e-4
    refine_epochs: float = 30
    refine_base_lr: float = 4e-4
    min_lr: float = 1e-6
    warmup_epochs: float = 4
    betas: tuple[float, float] = (0.9, 0.95)
    encoder_weight_decay: float = 0.05
    head_weight_decay: float = 1e-5
    layer_decay: float = 0.65
    frozen_blocks: int = 0
    ema_decay: float | None = None
    clip_norm: float | None = None
    seed: int = 0

    def __post_init__(self):
        _one_of("pool", self.pool, ("cls", "mean"))
        _one_of("pairing", self.pairing, ("intended", "published"))
        _one_of("loss_schedule", self.loss_schedule, LOSS_SCHEDULES)
        _check(0 < self.temperature < math.inf, f"temperature must be > 0 and finite, got {self.temperature}")
        for top_k in (self.heads_top_k, self.refine_top_k):
            _check(1 <= top_k <= self.queue_size, f"top_k must be between 1 and the queue size {self.queue_size}, got {top_k}")
        _check(self.batch_size <= self.queue_size, f"a batch of {self.batch_size} does not fit a queue of {self.queue_size}")
        _check(self.batch_size > 1, f"batch_size must be at least 2 (batch norm, negatives), got {self.batch_size}")
        _check(self.refine_epochs > 0, f"refine_epochs must be > 0, got {self.refine_epochs}")
        _whole(0, frozen_blocks=self.frozen_blocks, seed=self.seed)
        _whole(1, hidden_dim=self.hidden_dim, out_dim=self.out_dim, predictor_dim=self.predictor_dim)
        _whole(1, queue_size=self.queue_size, batch_size=self.batch_size)
        numbers = ("heads_epochs", "heads_base_lr", "refine_epochs", "refine_base_lr", "min_lr", "warmup_epochs")
        _finite(**{name: getattr(self, name) for name in (*numbers, "encoder_weight_decay", "head_weight_decay")})
        _check(0 < self.layer_decay <= 1, f"layer_decay must be > 0 and at most 1, got {self.layer_decay}")
        _check(self.ema_decay is None or 0 <= self.ema_decay < 1, f"ema_decay must be >= 0 and < 1, or None, got {self.ema_decay}")
        _check_betas(self.betas)
        _check_limit(self.clip_norm)

    def resolve_blocks(self, depth: int) -> tuple[int, ...]:
        """The blocks that get a head, 0-based and sorted, checked against the encoder's ``depth``."""
        blocks = range(depth - math.ceil(depth / 3), depth) if self.blocks is None else self.blocks
        return check_blocks(blocks, depth)


@dataclass(frozen=True)
class Preset:
    """Everything that a notebook needs to run at one scale."""

    name: str
    dataset: str
    n_train: int | None
    n_test: int | None
    encoder: ViTConfig
    pretrain: PretrainConfig
    refine: RefineConfig

    def with_seed(self, seed: int) -> "Preset":
        _check(seed >= 0, f"seed must be >= 0, got {seed}")
        return replace(self, pretrain=replace(self.pretrain, seed=seed), refine=replace(self.refine, seed=seed))


def smoke() -> Preset:
    """Seconds on 2 cores: 4 blocks, a few steps. Shows that everything runs; its numbers mean nothing."""
    encoder = ViTConfig(dim=32, depth=4, num_heads=2)
    pretrain = PretrainConfig(epochs=4, batch_size=64, flip=False)
    refine = RefineConfig(
        views=digit_views(32, 8, n_local=2),
        hidden_dim=32,
        out_dim=16,
        predictor_dim=32,
        queue_size=128,
        refine_top_k=5,
        batch_size=64,
        heads_epochs=1,
        refine_epochs=1,
        warmup_epochs=0.25,
        heads_base_lr=4e-3,
        refine_base_lr=2e-3,
    )
    return Preset("smoke", "digits", 256, 128, encoder, pretrain, refine)


def tiny() -> Preset:
    """About 6 minutes of training on 2 cores: 12 blocks of width 64 on scikit-learn's digits, SimMIM-style.

    A toy: raw pixels classify digits better than these features. Expected: k-NN of the cls token peaks before the last block,
    and refinement lifts the last block by several points.
    """
    encoder = ViTConfig()
    pretrain = PretrainConfig(epochs=250, flip=False)
    refine = RefineConfig(
        views=digit_views(32, 8, n_local=4),
        hidden_dim=256,
        out_dim=128,
        predictor_dim=512,
        queue_size=1024,
        batch_size=128,
        heads_epochs=15,
        refine_epochs=40,
        warmup_epochs=3,
        heads_base_lr=4e-3,
        refine_base_lr=2e-3,
        layer_decay=0.85,
        frozen_blocks=2,
    )
    return Preset("tiny", "digits", None, None, encoder, pretrain, refine)


def fashion() -> Preset:
    """``tiny``'s model and recipe, about as many steps, on 8,000 images of Fashion-MNIST: the second data set of the ablations.

    Five minutes of one CPU core for pre-training and three for each refinement. The data are downloaded when asked for.
    """
    preset = tiny()
    pretrain = replace(preset.pretrain, epochs=30)
    refine = replace(preset.refine, heads_epochs=1, refine_epochs=3, warmup_epochs=0.25)
    return replace(preset, name="fashion", dataset="fashion_mnist", n_train=8000, n_test=2000, pretrain=pretrain, refine=refine)


def gpu() -> Preset:
    """Under an hour on one data-centre GPU (not yet measured): ViT-Tiny/4 on CIFAR-10, MAE-style with a light decoder."""
    encoder = ViTConfig(image_size=32, patch_size=4, dim=192, depth=12, num_heads=3)
    pretrain = PretrainConfig(method="mae", mask_ratio=0.75, decoder_depth=2, epochs=200, batch_size=512, base_lr=1e-3)
    refine = RefineConfig(
        views=small_views(32, 4, n_local=10),
        hidden_dim=1024,
        out_dim=256,
        predictor_dim=2048,
        queue_size=16384,
        batch_size=512,
        heads_epochs=10,
        refine_epochs=30,
        heads_base_lr=1e-3,
        refine_base_lr=1e-3,
        layer_decay=0.75,
        frozen_blocks=2,
    )
    return Preset("gpu", "cifar10", None, None, encoder, pretrain, refine)


def natural() -> Preset:
    """Natural images at 64 px on a CPU: MAE ViT-Tiny/8 with a light decoder, on Tiny-ImageNet (give its folder by ``--data``).

    About 8 minutes of one CPU core in bfloat16 per epoch of pre-training (90,000 images) and 20 for both stages of refinement,
    which see less than half an epoch. The paper's 2 + 10 views are cut to 2 + 4, and the first half of the blocks is frozen. A weak
    model, as few epochs make it; ``natural-gpu`` is the same with the epochs that a GPU affords.
    """
    encoder = ViTConfig(image_size=64, patch_size=8, dim=192, depth=12, num_heads=3)
    pretrain = PretrainConfig(
        method="mae", mask_ratio=0.75, decoder_depth=1, decoder_dim=96, epochs=6, batch_size=128, base_lr=2e-3
    )
    refine = RefineConfig(
        views=small_views(64, 8, n_local=4),
        hidden_dim=512,
        out_dim=128,
        predictor_dim=1024,
        queue_size=8192,
        batch_size=128,
        heads_epochs=0.12,
        refine_epochs=0.36,
        warmup_epochs=0.03,
        heads_base_lr=4e-3,
        refine_base_lr=2e-3,
        layer_decay=0.75,
        frozen_blocks=6,
    )
    return Preset("natural", "parquet:tiny-imagenet", None, None, encoder, pretrain, refine)


def natural_simmim() -> Preset:
    """``natural`` with SimMIM pre-training: mask tokens pass the encoder, which makes an epoch three times as long (25 minutes)."""
    preset = natural()
    pretrain = replace(preset.pretrain, method="simmim", mask_ratio=0.6, epochs=2)
    return replace(preset, name="natural-simmim", pretrain=pretrain)


def natural_gpu() -> Preset:
    """``natural`` on one data-centre GPU (not yet run): 300 epochs of MAE, then the paper's 2 + 10 views for 10 + 20 epochs."""
    preset = natural()
    pretrain = replace(preset.pretrain, epochs=300, batch_size=1024, base_lr=5e-4)
    refine = replace(
        preset.refine, views=small_views(64, 8, n_local=10), hidden_dim=1024, out_dim=256, predictor_dim=2048, queue_size=32768,
        batch_size=512, heads_epochs=10, refine_epochs=20, warmup_epochs=2, heads_base_lr=1e-3, refine_base_lr=1e-3,
        frozen_blocks=2,
    )  # fmt: skip
    return replace(preset, name="natural-gpu", pretrain=pretrain, refine=refine)


def paper(model: str) -> Preset:
    """The paper's refinement of a published model on ImageNet-1K: 1 to 64 data-centre GPUs, days for the largest (not measured).

    The settings are those of the released configurations (``src/yamls/stage2`` and ``stage3``), the pairing of views that of
    the released code. Give the published weights by ``--model`` and ImageNet, all of whose training images are used, by ``--data``
    or ``$MIMREFINER_IMAGENET``; the pre-training part is MAE's own recipe (arXiv 2111.06377, Table 8). Expected k-NN accuracies
    of the last block, from the paper: MAE L/16 81.5, H/14 82.3, 2B/14 83.2, data2vec 2.0 L/16 81.0.
    """
    name, size = model.split("-")
    dim, depth, num_heads, patch, temperature, first_head, batch_size = {
        "l16": (1024, 24, 16, 16, 0.2, 16, 1024),
        "h14": (1280, 32, 16, 14, 0.3, 20, 512),
        "2b14": (2560, 24, 32, 14, 0.35, 16, 512),
    }[size]
    encoder = ViTConfig(image_size=224, patch_size=patch, dim=dim, depth=depth, num_heads=num_heads)
    pretrain = PretrainConfig(
        method="mae", mask_ratio=0.75, decoder_depth=8, decoder_dim=512, decoder_heads=16, epochs=1600, batch_size=4096,
        base_lr=1.5e-4, min_lr=0.0, warmup_share=40 / 1600,
    )  # fmt: skip
    refine = RefineConfig(
        views=paper_views(224, 96 if patch == 16 else 98),
        blocks=tuple(range(first_head, depth)),
        pool="mean" if name == "crossmae" else "cls",
        temperature=temperature,
        pairing="published",
        batch_size=batch_size,
        refine_epochs=20 if name == "d2v2" or size == "2b14" else 30,
        frozen_blocks=6 if size == "2b14" else 0,
        ema_decay=0.9999,
    )
    return Preset(f"paper-{model}", "imagefolder:imagenet", None, None, encoder, pretrain, refine)


PAPER_MODELS = ("mae-l16", "d2v2-l16", "dbot-l16", "crossmae-l16", "mae-h14", "d2v2-h14", "dbot-h14", "mae-2b14")


def describe(preset: Preset) -> str:
    """The settings of a preset as a few lines of text."""
    blocks = ", ".join(str(b) for b in preset.refine.resolve_blocks(preset.encoder.depth))
    views = preset.refine.views
    crops = [f"{crop.size} px crops of {crop.scale[0]:g} to {crop.scale[1]:g} of the area" for crop in views.crops]
    lines = [("heads on", f"blocks {blocks} (0-based)")]
    lines += [("views", f"{len(views.global_crops)} global, {crops[0]}; {views.n_local} local, {crops[-1]}")]
    for part in ("encoder", "pretrain", "refine"):
        values = asdict(getattr(preset, part))
        text = ", ".join(f"{name} {value}" for name, value in values.items() if name not in ("views", "blocks"))
        lines += [(part, text)]
    return "\n".join(textwrap.fill(f"{name:9s} {text}", 120, subsequent_indent=" " * 10) for name, text in lines)


PRESETS: dict[str, Callable[[], Preset]] = {
    "smoke": smoke, "tiny": tiny, "fashion": fashion, "natural": natural, "natural-simmim": natural_simmim,
    "natural-gpu": natural_gpu, "gpu": gpu,
}  # fmt: skip
PRESETS |= {f"paper-{model}": functools.partial(paper, model) for model in PAPER_MODELS}


def load_preset(name: str, seed: int = 0) -> Preset:
    """The preset ``name`` with its seeds set; InputError lists the names there are."""
    _one_of("preset", name, tuple(PRESETS))
    return PRESETS[name]().with_seed(seed)


def check_blocks(blocks, depth: int) -> tuple[int, ...]:
    """Sorted 0-based blocks, or an InputError that names the one out of range."""
    fine = isinstance(blocks, Iterable) and not isinstance(blocks, str) and all(isinstance(b, Integral) for b in blocks)
    _check(fine, f"expected 0-based blocks such as (8, 9), got {blocks!r}")
    blocks = tuple(sorted(blocks))
    _check(len(blocks) > 0 and len(set(blocks)) == len(blocks), f"expected one or more different blocks, got {list(blocks)}")
    for block in blocks:
        _check(0 <= block < depth, f"block {block} is out of range: the model has blocks 0 to {depth - 1} (0-based)")
    return blocks


def _check_limit(clip_norm: float | None) -> None:
    _check(clip_norm is None or clip_norm > 0, f"clip_norm must be > 0 or None, got {clip_norm}")


def _check_betas(betas: tuple[float, float]) -> None:
    _check(len(betas) == 2 and all(0 <= beta < 1 for beta in betas), f"betas must be two numbers >= 0 and < 1, got {betas}")


def _whole(least: int, **values) -> None:
    for name, value in values.items():
        _check(isinstance(value, Integral) and value >= least, f"{name} must be a whole number >= {least}, got {value!r}")


def _finite(**values: float) -> None:
    for name, value in values.items():
        _check(0 <= value < math.inf, f"{name} must be >= 0 and finite, got {value}")


def _one_of(name: str, value: str, valid: tuple[str, ...]) -> None:
    _check(value in valid, f"unknown {name} {value!r}: choose one of {', '.join(valid)}")


def _check(fine: bool, message: str) -> None:
    if not fine:
        raise InputError(message)
