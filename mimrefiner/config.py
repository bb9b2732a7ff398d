"""Settings as frozen dataclasses, checked when they are made.

Blocks are 0-based. Learning rates are base rates: the rate used is ``base_lr * batch_size / 256``.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from numbers import Integral, Real

from mimrefiner.errors import InputError, one_of

LOSS_SCHEDULES = ("constant", "uniform decay", "staggered decay", "staggered step", "one-hot")
PAIRINGS = ("intended", "published")
AUTO = "auto"  # in place of blocks: a short probe places the heads


@dataclass(frozen=True)
class Crop:
    """How one view of an image is made, in the order of application.

    Attributes:
        size: side of the crop in pixels.
        scale: smallest and largest share of the image's area.
        flip_p: probability of a horizontal flip.
        jitter_p: probability of colour jitter, whose strengths are ``brightness``, ``contrast``,
            ``saturation`` and ``hue``.
        grey_p: probability of a grey view.
        blur_p: probability of a blur.
        blur_sigma: its smallest and largest width, in pixels of the crop.
        solarize_p: probability that values above 128 are inverted.
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
        _check(
            self.size >= 1 and 0 < low <= high <= 1,
            "a crop needs a size >= 1 and two shares of the area such as (0.2, 1), "
            f"got {self.size}, {self.scale}",
        )


@dataclass(frozen=True)
class Views:
    """The views of one image: the global crops first, then ``n_local`` copies of the local one."""

    global_crops: tuple[Crop, ...]
    local_crop: Crop
    n_local: int = 10

    @property
    def crops(self) -> tuple[Crop, ...]:
        """All crops in order."""
        return self.global_crops + (self.local_crop,) * self.n_local


@dataclass(frozen=True)
class ViTConfig:
    """A ViT that is trained from scratch.

    Attributes:
        image_size: side of the images in pixels.
        patch_size: side of a patch in pixels.
        dim: width of the tokens.
        depth: number of blocks.
        num_heads: attention heads of every block.

    >>> ViTConfig(image_size=32, patch_size=8, dim=64, depth=4)
    ViTConfig(image_size=32, patch_size=8, dim=64, depth=4, num_heads=4)
    """

    image_size: int = 32
    patch_size: int = 8
    dim: int = 64
    depth: int = 12
    num_heads: int = 4

    def __post_init__(self):
        _whole(1, **asdict(self))
        _check(
            self.image_size % self.patch_size == 0,
            f"image size {self.image_size} is not divisible by the patch size {self.patch_size}",
        )
        _check(
            self.dim % self.num_heads == 0,
            f"dim {self.dim} is not divisible by {self.num_heads} attention heads",
        )


@dataclass(frozen=True)
class PretrainConfig:
    """Masked-image pre-training (stage 1).

    Attributes:
        method: ``"simmim"`` sends mask tokens through the encoder and has a linear head (arXiv
            2111.09886); ``"mae"`` shows the encoder visible patches, and a decoder rebuilds the
            rest (arXiv 2111.06377).
        mask_ratio: share of the patches that is masked.
        decoder_depth: blocks of MAE's decoder, whose width is ``decoder_dim`` and which has
            ``decoder_heads`` attention heads.
        warmup_share: share of the steps in which the learning rate rises.
        crop_scale: smallest and largest share of the image's area that a view shows.
        flip: whether half of the views are mirrored.
        clip_norm: limits the norm of all gradients together; None sets no limit.
        seed: draws weights, order, views and masks.

    >>> config = PretrainConfig("mae", mask_ratio=0.75, epochs=20)
    >>> config.batch_size, config.base_lr
    (128, 0.004)
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
        c, (low, high) = self, self.crop_scale
        one_of("method", c.method, ("simmim", "mae"))
        _check(0 < c.mask_ratio < 1, f"mask_ratio must lie between 0 and 1, got {c.mask_ratio}")
        _check(
            c.epochs > 0 and c.batch_size > 1,
            f"need epochs > 0 and batch_size > 1, got {c.epochs}, {c.batch_size}",
        )
        _whole(0, decoder_depth=c.decoder_depth)
        _whole(1, decoder_dim=c.decoder_dim, decoder_heads=c.decoder_heads)
        _check(
            0 < low <= high <= 1,
            f"crop_scale must be two shares of the area, such as (0.2, 1), got {c.crop_scale}",
        )
        _check(
            0 <= c.warmup_share <= 1, f"warmup_share must lie between 0 and 1, got {c.warmup_share}"
        )
        _finite(epochs=c.epochs, base_lr=c.base_lr, weight_decay=c.weight_decay)
        _check_training(c)


@dataclass(frozen=True)
class RefineConfig:
    """Refinement: stage 2 (heads only) and stage 3 (encoder and heads).

    The defaults are the paper's recipe for ViT-L/16.

    Attributes:
        views: the crops of every image.
        blocks: blocks with a head; None takes the last third, and ``"auto"`` lets
            :func:`mimrefiner.refine` place them, see :mod:`mimrefiner.training.placement`.
        pool: what a head reads of its block: ``"cls"`` or ``"mean"``.
        hidden_dim: width of a projector's hidden layers; ``out_dim`` is that of its output, and
            ``predictor_dim`` that of the predictor's hidden layer.
        queue_size: projections that the queue holds.
        temperature: of the softmax in the loss.
        heads_top_k: neighbours to draw one from in stage 2; ``refine_top_k`` those in stage 3.
        pairing: which pairs of views count, see :func:`mimrefiner.method.losses.pair_weights`.
        loss_schedule: how the heads are weighed in stage 3, see
            :func:`mimrefiner.training.optim.head_weights`.
        swap_negatives: whether negatives are neighbours too (NNCLR, arXiv 2104.14548).
        warmup_epochs: epochs of either stage in which the learning rate rises.
        layer_decay: factor of the learning rate from block to block towards the input.
        frozen_blocks: how many first blocks stage 3 leaves as they are.
        ema_decay: decay of the encoder's moving average; None averages over the same share of
            training at any length: 1 - 1 / (0.27 * steps).
        clip_norm: limits the norm of all gradients together; None sets no limit, as in the paper.
        seed: draws the heads' weights, order, views and neighbours.

    >>> from mimrefiner.data.augment import paper_views
    >>> RefineConfig(paper_views()).resolve_blocks(24)
    (16, 17, 18, 19, 20, 21, 22, 23)
    """

    views: Views
    blocks: tuple[int, ...] | str | None = None
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
        c = self
        one_of("pool", c.pool, ("cls", "mean"))
        one_of("pairing", c.pairing, PAIRINGS)
        one_of("loss_schedule", c.loss_schedule, LOSS_SCHEDULES)
        _above_0(temperature=c.temperature, refine_epochs=c.refine_epochs)
        _whole(1, queue_size=c.queue_size, batch_size=c.batch_size)
        for top_k in (c.heads_top_k, c.refine_top_k):
            _check(isinstance(top_k, Integral), f"top_k must be a whole number, got {top_k!r}")
            _check(
                1 <= top_k <= c.queue_size,
                f"top_k must be between 1 and the queue size {c.queue_size}, got {top_k}",
            )
        _check(
            c.batch_size <= c.queue_size,
            f"a batch of {c.batch_size} does not fit a queue of {c.queue_size}",
        )
        _check(
            c.batch_size > 1,
            f"batch_size must be at least 2 (batch norm, negatives), got {c.batch_size}",
        )
        _whole(0, frozen_blocks=c.frozen_blocks)
        _whole(1, hidden_dim=c.hidden_dim, out_dim=c.out_dim, predictor_dim=c.predictor_dim)
        _finite(heads_epochs=c.heads_epochs, refine_epochs=c.refine_epochs)
        _finite(warmup_epochs=c.warmup_epochs)
        _finite(heads_base_lr=c.heads_base_lr, refine_base_lr=c.refine_base_lr)
        _finite(encoder_weight_decay=c.encoder_weight_decay, head_weight_decay=c.head_weight_decay)
        _check(
            isinstance(c.layer_decay, Real) and 0 < c.layer_decay <= 1,
            f"layer_decay must be > 0 and at most 1, got {c.layer_decay!r}",
        )
        _check(
            c.ema_decay is None or (isinstance(c.ema_decay, Real) and 0 <= c.ema_decay < 1),
            f"ema_decay must be >= 0 and < 1, or None, got {c.ema_decay}",
        )
        _check_training(c)

    def resolve_blocks(self, depth: int) -> tuple[int, ...]:
        """The blocks with a head, 0-based and sorted, checked against the encoder's ``depth``.

        Raises:
            InputError: a block that the encoder lacks, or heads that are still to be placed.
        """
        if self.blocks == AUTO:
            raise InputError(
                'blocks "auto" needs images, which refine has: '
                "here give blocks such as (8, 9), or None for the last third"
            )
        blocks = range(depth - math.ceil(depth / 3), depth) if self.blocks is None else self.blocks
        return check_blocks(blocks, depth)


def check_blocks(blocks: Iterable[int], depth: int) -> tuple[int, ...]:
    """Sorted 0-based blocks, or an InputError that names the one out of range.

    >>> check_blocks([3, 1], depth=4)
    (1, 3)
    """
    fine = isinstance(blocks, Iterable) and not isinstance(blocks, str)
    fine = fine and all(isinstance(b, Integral) for b in blocks)
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


def _check_training(c: PretrainConfig | RefineConfig) -> None:
    """Check what both kinds of training have."""
    _whole(0, seed=c.seed)
    _whole(1, batch_size=c.batch_size)
    _check(
        c.seed < 2**28,
        f"seed must be below 2^28, since steps draw from seeds made of it, got {c.seed}",
    )
    _finite(min_lr=c.min_lr)
    _check(
        isinstance(c.betas, Sequence)
        and len(c.betas) == 2
        and all(isinstance(beta, Real) and 0 <= beta < 1 for beta in c.betas),
        f"betas must be two numbers >= 0 and < 1, got {c.betas}",
    )
    _check(
        c.clip_norm is None or (isinstance(c.clip_norm, Real) and c.clip_norm > 0),
        f"clip_norm must be > 0 or None, got {c.clip_norm!r}",
    )


def _whole(least: int, **values: int) -> None:
    for name, value in values.items():
        _check(
            isinstance(value, Integral) and value >= least,
            f"{name} must be a whole number >= {least}, got {value!r}",
        )


def _finite(**values: float) -> None:
    for name, value in values.items():
        _check(
            isinstance(value, Real) and 0 <= value < math.inf,
            f"{name} must be >= 0 and finite, got {value!r}",
        )


def _above_0(**values: float) -> None:
    for name, value in values.items():
        _check(
            isinstance(value, Real) and 0 < value < math.inf,
            f"{name} must be > 0 and finite, got {value!r}",
        )


def _check(fine: bool, message: str) -> None:
    if not fine:
        raise InputError(message)
