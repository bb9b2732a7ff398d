"""Settings as frozen dataclasses, checked when they are made.

Blocks are 0-based. Learning rates are base rates: the rate used is ``base_lr * batch_size / 256``.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from numbers import Integral

from mimrefiner.errors import InputError, one_of

LOSS_SCHEDULES = ("constant", "uniform decay", "staggered decay", "staggered step", "one-hot")


@dataclass(frozen=True)
class Crop:
    """How one view is made; probabilities ``*_p``, in the order of application.

    ``scale`` is the share of the image's area, ``blur_sigma`` is in pixels of the crop,
    ``solarize_p`` inverts above 128.
    """

    size: int
    scale: tuple[float, float]
    flip_p: float = 0.5
    jitter_p: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grey_p: float = 0.2
    blur_p: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_p: float = 0.0

    def __post_init__(self):
        low, high = self.scale
        if self.size < 1 or not 0 < low <= high <= 1:
            raise InputError(
                f"a crop needs a size >= 1 and two shares of the area such as (0.2, 1), got {self.size}, {self.scale}"
            )


@dataclass(frozen=True)
class Views:
    """The views of one image: the global crops come first, then ``n_local`` copies of the local
    one.
    """

    global_crops: tuple[Crop, ...]
    local_crop: Crop
    n_local: int = 10

    @property
    def crops(self) -> tuple[Crop, ...]:
        return self.global_crops + (self.local_crop,) * self.n_local


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
            raise InputError(
                f"image size {self.image_size} is not divisible by the patch size {self.patch_size}"
            )
        if self.dim % self.num_heads:
            raise InputError(f"dim {self.dim} is not divisible by {self.num_heads} attention heads")


@dataclass(frozen=True)
class PretrainConfig:
    """Masked-image pre-training (stage 1).

    ``method``: "simmim" (mask tokens go through the encoder, linear head; arXiv 2111.09886) or
    "mae" (the encoder sees visible
    patches, a decoder of ``decoder_depth`` blocks rebuilds the rest; arXiv 2111.06377).
    ``clip_norm``: limit of the norm of all gradients together; None: no limit.
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
        one_of("method", self.method, ("simmim", "mae"))
        _check(
            0 < self.mask_ratio < 1, f"mask_ratio must lie between 0 and 1, got {self.mask_ratio}"
        )
        _check(
            self.epochs > 0 and self.batch_size > 1,
            f"need epochs > 0 and batch_size > 1, got {self.epochs}, {self.batch_size}",
        )
        _whole(0, decoder_depth=self.decoder_depth, seed=self.seed)
        _check_seed(self.seed)
        _whole(
            1,
            decoder_dim=self.decoder_dim,
            decoder_heads=self.decoder_heads,
            batch_size=self.batch_size,
        )
        low, high = self.crop_scale
        _check(
            0 < low <= high <= 1,
            f"crop_scale must be two shares of the area, such as (0.2, 1), got {self.crop_scale}",
        )
        _check(
            0 <= self.warmup_share <= 1,
            f"warmup_share must lie between 0 and 1, got {self.warmup_share}",
        )
        _finite(
            epochs=self.epochs,
            base_lr=self.base_lr,
            min_lr=self.min_lr,
            weight_decay=self.weight_decay,
        )
        _check_betas(self.betas)
        _check_limit(self.clip_norm)


@dataclass(frozen=True)
class RefineConfig:
    """Refinement: stage 2 (heads only) and stage 3 (encoder and heads). Defaults: the paper's
    ViT-L/16 recipe.

    ``blocks`` None takes the last third of the blocks. ``pairing``: see
    :func:`mimrefiner.method.losses.pair_weights`;
    ``loss_schedule``: of stage 3, see :func:`mimrefiner.training.optim.head_weights`.
    ``ema_decay`` None keeps the same averaging horizon as a share of training: 1 - 1 / (0.27 *
    steps). ``clip_norm``: limit of
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
        one_of("pool", self.pool, ("cls", "mean"))
        one_of("pairing", self.pairing, ("intended", "published"))
        one_of("loss_schedule", self.loss_schedule, LOSS_SCHEDULES)
        _check(
            0 < self.temperature < math.inf,
            f"temperature must be > 0 and finite, got {self.temperature}",
        )
        for top_k in (self.heads_top_k, self.refine_top_k):
            _check(
                1 <= top_k <= self.queue_size,
                f"top_k must be between 1 and the queue size {self.queue_size}, got {top_k}",
            )
        _check(
            self.batch_size <= self.queue_size,
            f"a batch of {self.batch_size} does not fit a queue of {self.queue_size}",
        )
        _check(
            self.batch_size > 1,
            f"batch_size must be at least 2 (batch norm, negatives), got {self.batch_size}",
        )
        _check(self.refine_epochs > 0, f"refine_epochs must be > 0, got {self.refine_epochs}")
        _whole(0, frozen_blocks=self.frozen_blocks, seed=self.seed)
        _check_seed(self.seed)
        _whole(
            1, hidden_dim=self.hidden_dim, out_dim=self.out_dim, predictor_dim=self.predictor_dim
        )
        _whole(1, queue_size=self.queue_size, batch_size=self.batch_size)
        numbers = (
            "heads_epochs",
            "heads_base_lr",
            "refine_epochs",
            "refine_base_lr",
            "min_lr",
            "warmup_epochs",
        )
        _finite(
            **{
                name: getattr(self, name)
                for name in (*numbers, "encoder_weight_decay", "head_weight_decay")
            }
        )
        _check(
            0 < self.layer_decay <= 1,
            f"layer_decay must be > 0 and at most 1, got {self.layer_decay}",
        )
        _check(
            self.ema_decay is None or 0 <= self.ema_decay < 1,
            f"ema_decay must be >= 0 and < 1, or None, got {self.ema_decay}",
        )
        _check_betas(self.betas)
        _check_limit(self.clip_norm)

    def resolve_blocks(self, depth: int) -> tuple[int, ...]:
        """The blocks that get a head, 0-based and sorted, checked against the encoder's ``depth``."""
        blocks = range(depth - math.ceil(depth / 3), depth) if self.blocks is None else self.blocks
        return check_blocks(blocks, depth)


def check_blocks(blocks, depth: int) -> tuple[int, ...]:
    """Sorted 0-based blocks, or an InputError that names the one out of range."""
    fine = (
        isinstance(blocks, Iterable)
        and not isinstance(blocks, str)
        and all(isinstance(b, Integral) for b in blocks)
    )
    _check(fine, f"expected 0-based blocks such as (8, 9), got {blocks!r}")
    blocks = tuple(sorted(blocks))
    _check(
        len(blocks) > 0 and len(set(blocks)) == len(blocks),
        f"expected one or more different blocks, got {list(blocks)}",
    )
    for block in blocks:
        _check(
            0 <= block < depth,
            f"block {block} is out of range: the model has blocks 0 to {depth - 1} (0-based)",
        )
    return blocks


def _check_seed(seed: int) -> None:
    _check(
        seed < 2**28, f"seed must be below 2^28, since steps draw from seeds made of it, got {seed}"
    )


def _check_limit(clip_norm: float | None) -> None:
    _check(clip_norm is None or clip_norm > 0, f"clip_norm must be > 0 or None, got {clip_norm}")


def _check_betas(betas: tuple[float, float]) -> None:
    _check(
        len(betas) == 2 and all(0 <= beta < 1 for beta in betas),
        f"betas must be two numbers >= 0 and < 1, got {betas}",
    )


def _whole(least: int, **values) -> None:
    for name, value in values.items():
        _check(
            isinstance(value, Integral) and value >= least,
            f"{name} must be a whole number >= {least}, got {value!r}",
        )


def _finite(**values: float) -> None:
    for name, value in values.items():
        _check(0 <= value < math.inf, f"{name} must be >= 0 and finite, got {value}")


def _check(fine: bool, message: str) -> None:
    if not fine:
        raise InputError(message)
