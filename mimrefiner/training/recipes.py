"""The paper's recipes of fine-tuning, one frozen dataclass each, with its source beside it.

Sources are files of the released code (``y/`` stands for ``src/yamls/`` of ml-jku/MIM-Refiner at
cc57423). Blocks, pooling and heads are those of that code; learning rates are base rates, and the
rate used is ``base_lr * batch_size / 256``.
"""

import math
from dataclasses import dataclass, replace

from mimrefiner.errors import InputError, one_of

IMAGENET_TRAIN, INAT18_TRAIN = 1_281_167, 437_513
ONE_PERCENT, TEN_PERCENT = 12_811, 128_116  # images of the published lists
RAND_AUGMENT = "rand-m9-mstd0.5-inc1"  # two operations, magnitude 9 with spread 0.5, timm's name


@dataclass(frozen=True)
class FinetuneRecipe:
    """How an encoder and a linear classifier are trained together.

    The defaults are the paper's recipe for ViT-L/16 on ImageNet-1K.

    Attributes:
        name: what the command line and rows of results call it.
        models: the models that the paper trains so.
        source: where it is written.
        epochs, warmup_epochs: how long it lasts, and how long the learning rate rises.
        batch_size: images of a step, those of all processes together.
        micro_batch: images among which the published loader mixes and drops paths; None: all that a
            process has of a batch.
        base_lr: the highest learning rate, for 256 images; ``min_lr`` is where the cosine ends.
        warmup_to_peak: whether the last step of the rise has the highest rate already (VTAB-1K).
        betas, weight_decay: of AdamW; biases, norms, tokens and positions are not decayed.
        decay_cls: whether the cls token is decayed all the same (VTAB-1K).
        layer_decay: factor of the learning rate from block to block towards the input.
        drop_path: probability that the last block's branches are left out; linear from 0.
        frozen_share: this share of the blocks, counted from the first, and all before them keep
            their weights.
        prompts: learned tokens in front of a frozen encoder (visual prompts), each of
            ``prompt_dim`` numbers; 0 for none.
        pool: ``"cls"``, or ``"mean"`` of the patch tokens.
        learn_positions: whether positions are trained.
        head_norm: whether a new LayerNorm stands before the classifier where a post-norm encoder
            has no final one.
        resize: the short side is resized to this many pixels before the crop; None: no resizing.
        crop_scale: smallest and largest share of the area of a random resized crop; None: the whole
            image is squeezed into a square, in training and test.
        flip: whether half of the images are mirrored.
        rand_augment: timm's name of a RandAugment; "" for none.
        erasing: probability that a rectangle is replaced by noise.
        mixup, cutmix: parameters of their Beta distributions; 0 for none. A coin decides where both
            are on.
        smoothing: label smoothing.
        test_float32: whether test images pass in float32 where training is in bfloat16.
        images, classes: of the paper's training set, from which a plan foresees the cost.
        seed: draws weights, order, augmentation, mixing and dropped paths.

    >>> L16.base_lr * L16.batch_size / 256, L16.drop_path, L16.mixes
    (0.004, 0.2, True)
    """

    name: str
    models: str = ""
    source: str = ""
    epochs: float = 50
    warmup_epochs: float = 5
    batch_size: int = 1024
    micro_batch: int | None = None
    base_lr: float = 1e-3
    min_lr: float = 0.0
    warmup_to_peak: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.05
    decay_cls: bool = False
    layer_decay: float = 0.75
    drop_path: float = 0.2
    frozen_share: float = 0.0
    prompts: int = 0
    prompt_dim: int = 192
    pool: str = "cls"
    learn_positions: bool = True
    head_norm: bool = True
    resize: int | None = None
    crop_scale: tuple[float, float] | None = (0.08, 1.0)
    flip: bool = True
    rand_augment: str = RAND_AUGMENT
    erasing: float = 0.25
    mixup: float = 0.8
    cutmix: float = 1.0
    smoothing: float = 0.1
    test_float32: bool = False
    images: int = IMAGENET_TRAIN
    classes: int = 1000
    seed: int = 0

    def __post_init__(self):
        one_of("pool", self.pool, ("cls", "mean"))
        _at_least(1, batch_size=self.batch_size, micro_batch=self.micro_batch or 1)
        _at_least(0, warmup_epochs=self.warmup_epochs, base_lr=self.base_lr, min_lr=self.min_lr)
        _at_least(0, weight_decay=self.weight_decay, mixup=self.mixup, cutmix=self.cutmix)
        _at_least(0, prompts=self.prompts, seed=self.seed)
        if not 0 < self.epochs < math.inf:
            raise InputError(f"epochs must be > 0 and finite, got {self.epochs}")
        if self.seed >= 2**28:
            raise InputError(f"seed must be below 2^28, got {self.seed}")
        if not 0 < self.layer_decay <= 1:
            raise InputError(f"layer_decay must be > 0 and at most 1, got {self.layer_decay}")
        for name in ("drop_path", "frozen_share", "erasing", "smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed."""
        return self.mixup > 0 or self.cutmix > 0

    def frozen_blocks(self, depth: int) -> int:
        """How many of ``depth`` blocks keep their weights."""
        return int(self.frozen_share * depth)


def _at_least(least: float, **values: float) -> None:
    for name, value in values.items():
        if not least <= value < math.inf:
            raise InputError(f"{name} must be >= {least} and finite, got {value}")


MINIMAL = {"rand_augment": "", "erasing": 0.0, "mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0}
QUARTER = {"frozen_share": 0.25}  # 6 of 24 blocks, patch embedding, cls token and positions

# All labels of ImageNet-1K and of iNaturalist 2018. For 2B/14, data2vec 2.0, dBOT and CrossMAE no
# recipe is public; that of their size is the natural guess.
L16 = FinetuneRecipe(
    "in1k_l16",
    "MAE L/16, refined",
    "y/eval/finetune/c0be9je6.yaml, y/eval/finetune/run/mae_large16.yaml",
)
H14 = replace(
    L16,
    name="in1k_h14",
    models="MAE H/14, refined",
    source="y/eval/finetune/mvdt62zg.yaml, y/eval/finetune/run/mae_huge14.yaml",
    drop_path=0.3,
)
INAT18_L16, INAT18_H14 = (
    replace(
        base,
        name=f"inat18_{base.name[5:]}",
        source="y/eval/finetune_transfer/inat/",
        images=INAT18_TRAIN,
        classes=8142,
    )
    for base in (L16, H14)
)

# 1, 2 and 5 images per class, for models that probe badly (y/eval/extreme_lowshot/run)
SHOTS_D2V2_L16 = replace(
    L16,
    **MINIMAL,
    name="shots_d2v2_l16",
    models="data2vec 2.0 L/16",
    source="y/eval/extreme_lowshot/run/d2v2_finetune",
    base_lr=1e-4,
    batch_size=250,
    images=5_000,
)
SHOTS_D2V2_H14 = replace(
    SHOTS_D2V2_L16, name="shots_d2v2_h14", models="data2vec 2.0 H/14", batch_size=125
)
SHOTS_MAE_2B14 = replace(
    SHOTS_D2V2_L16,
    **QUARTER,
    name="shots_mae_2b14",
    models="MAE 2B/14",
    source="y/eval/extreme_lowshot/run/mae_finetune",
    batch_size=125,
    micro_batch=25,
)
SHOTS_IBOT22K_L16 = replace(
    SHOTS_D2V2_L16,
    name="shots_ibot22k_l16",
    models="iBOT-22K L/16",
    source="y/eval/extreme_lowshot/run/ibot22k_finetune",
    base_lr=1e-3,
)

# 1 % of the labels (y/eval/finetune_1p)
P1 = "y/eval/finetune_1p/"
P1_L16 = replace(
    L16,
    **MINIMAL,
    name="1p_l16",
    models="refined L/16, Mugs L/16, DINOv2 L/14 and g/14",
    source=P1 + "template_tracked_large16_ijepamin, run/mugs_large16, run/dinov2_{large,giga}14",
    base_lr=3e-5,
    batch_size=512,
    images=ONE_PERCENT,
)
P1_H = replace(
    P1_L16,
    name="1p_h",
    models="refined H/14, H/16",
    source=P1 + "template_tracked_huge{14,16}_ijepamin",
    weight_decay=0.4,
)
P1_2B14 = replace(P1_H, name="1p_2b14", models="MAE-Refined 2B/14", source=P1 + "7mzhpufg")
P1_2B14_LR1E3 = replace(
    P1_L16,
    name="1p_2b14_semivitmin_lr1e3",
    models="MAE 2B/14, refined",
    source=P1 + "7mzhpufg_semivitmin_lr1e3, run/mae_twob14_semivitmin_lr1e3",
    base_lr=1e-3,
    batch_size=128,
)
P1_2B14_LR1E2 = replace(
    P1_2B14_LR1E3,
    name="1p_2b14_semivitmin_lr1e2",
    models="MAE 2B/14",
    source=P1 + "run/mae_twob14_semivitmin",
    base_lr=1e-2,
)
P1_2B14_FULL = replace(
    L16,
    name="1p_2b14_semivit_lr1e3",
    models="MAE 2B/14, refined",
    source=P1 + "7mzhpufg_semivit_lr1e3, run/mae_twob14_semivit_lr1e3",
    batch_size=128,
    drop_path=0.0,
    images=ONE_PERCENT,
)
P1_2B14_VPT = replace(
    P1_2B14_LR1E3,
    name="1p_2b14_vpt",
    models="MAE 2B/14, refined",
    source=P1 + "7mzhpufg_vpt, run/mae_twob14_vpt; its model class is not public",
    weight_decay=0.0,
    layer_decay=1.0,
    frozen_share=1.0,
    prompts=8,
)
P1_D2V2_L16_LR1E3 = replace(
    P1_L16,
    name="1p_d2v2_l16_lr1e3",
    models="data2vec 2.0 L/16",
    source=P1 + "run/data2vec2_large16_semivitmin",
    base_lr=1e-3,
)
P1_D2V2_L16_LR1E4 = replace(
    P1_D2V2_L16_LR1E3,
    name="1p_d2v2_l16_lr1e4",
    source=P1 + "run/data2vec2_large16_semivitmin_lr1e4",
    base_lr=1e-4,
)
P1_D2V2_H14 = tuple(
    replace(
        P1_2B14_LR1E3,
        name=f"1p_d2v2_h14_{name}",
        models="data2vec 2.0 H/14",
        source=f"{P1}run/data2vec2_huge14_semivitmin{file}",
        base_lr=rate,
    )
    for name, file, rate in (
        ("lr1e2", "", 1e-2),
        ("lr1e3", "_lr1e3", 1e-3),
        ("lr1e4", "_lr1e4", 1e-4),
    )
)

# 10 % of the labels (y/eval/finetune_10p)
P10 = "y/eval/finetune_10p/"
P10_L16 = replace(
    P1_L16,
    name="10p_l16",
    models="refined L/16, Mugs B/16 and L/16, iBOT-22K L/16, DINOv2 L/14",
    source=P10 + "template_tracked_large16_ijepa, run/{mugs_large16,mugs_base16,"
    "ibot22k_large16,dinov2_large14}",
    rand_augment=RAND_AUGMENT,
    images=TEN_PERCENT,
)
P10_H = replace(
    L16,
    name="10p_h",
    models="refined H/14, H/16",
    source=P10 + "template_tracked_huge{14,16}_semivit",
    batch_size=256,
    images=TEN_PERCENT,
)
_D2V2_RATES = (("lr1e3", "", 1e-3), ("lr5e4", "_lr5e4", 5e-4), ("lr1e4", "_lr1e4", 1e-4))
P10_D2V2 = tuple(
    replace(
        P10_H,
        name=f"10p_d2v2_{size}_{name}",
        models=f"data2vec 2.0 {size[0].upper()}/{size[1:]}",
        source=f"{P10}run/data2vec2_{file}{ending}",
        batch_size=batch,
        drop_path=drop_path,
        base_lr=rate,
    )
    for size, file, batch, drop_path in (
        ("l16", "large16", 512, 0.1),
        ("h14", "huge14", 256, 0.2),
    )
    for name, ending, rate in _D2V2_RATES
)
P10_2B14 = replace(
    P10_H,
    **QUARTER,
    name="10p_2b14",
    models="MAE-Refined 2B/14",
    source=P10 + "7mzhpufg",
    micro_batch=16,
    drop_path=0.3,
)
P10_2B14_SD02 = replace(P10_2B14, name="10p_2b14_sd02", source=P10 + "7mzhpufg_sd02", drop_path=0.2)
P10_MAE_2B14 = replace(
    P10_2B14,
    name="10p_mae_2b14",
    models="MAE 2B/14",
    source=P10 + "run/mae_twob14_lr5e4",
    base_lr=5e-4,
)
P10_MAE_2B14_SD02 = replace(
    P10_MAE_2B14,
    name="10p_mae_2b14_sd02",
    source=P10 + "run/mae_twob14_lr1e3_sd02, whose rate is 5e-4",
    drop_path=0.2,
)
P10_2B14_VPT = replace(
    P1_2B14_VPT,
    name="10p_2b14_vpt",
    source=P10 + "*_vpt; its model class is not public",
    images=TEN_PERCENT,
)
P10_DINOV2_G14 = tuple(
    replace(
        P10_H,
        name=f"10p_dinov2_g14{name}",
        models="DINOv2 g/14",
        source=f"{P10}run/dinov2_giga14{name}",
        drop_path=drop_path,
    )
    for name, drop_path in (("", 0.0), ("_sd02", 0.2), ("_sd03", 0.3))
)

# 5 and 10 images per class of iNaturalist 2018
INAT18_SHOTS = replace(
    L16,
    **MINIMAL,
    name="inat18_shots",
    models="ViT-L and -H",
    source="y/eval/finetune_transfer/inat_{5,10}shot/",
    batch_size=256,
    resize=256,
    images=81_420,
    classes=8142,
)
INAT18_SHOTS_B8 = replace(
    INAT18_SHOTS, name="inat18_shots_dino_b8", models="DINO B/8", layer_decay=0.65
)
INAT18_SHOTS_2B14 = replace(
    INAT18_SHOTS, **QUARTER, name="inat18_shots_2b14", models="MAE 2B/14, refined", micro_batch=64
)

RECIPES = (
    *(L16, H14, INAT18_L16, INAT18_H14),
    *(SHOTS_D2V2_L16, SHOTS_D2V2_H14, SHOTS_MAE_2B14, SHOTS_IBOT22K_L16),
    *(P1_L16, P1_H, P1_2B14, P1_2B14_LR1E3, P1_2B14_LR1E2, P1_2B14_FULL, P1_2B14_VPT),
    *(P1_D2V2_L16_LR1E3, P1_D2V2_L16_LR1E4, *P1_D2V2_H14),
    *(P10_L16, P10_H, *P10_D2V2, P10_2B14, P10_2B14_SD02, P10_MAE_2B14, P10_MAE_2B14_SD02),
    *(P10_2B14_VPT, *P10_DINOV2_G14),
    *(INAT18_SHOTS, INAT18_SHOTS_B8, INAT18_SHOTS_2B14),
)
BY_SIZE = {"in1k": (L16, H14), "inat18": (INAT18_L16, INAT18_H14)}  # up to L, and larger


def recipe_named(name: str, dim: int | None = None) -> FinetuneRecipe:
    """The recipe called ``name``.

    Args:
        name: a recipe's own name, or ``in1k`` or ``inat18``, which choose by the encoder's width.
        dim: the width of the encoder.

    Raises:
        InputError: an unknown name; the message lists those that there are.

    >>> recipe_named("in1k", dim=1280).name, recipe_named("1p_h").weight_decay
    ('in1k_h14', 0.4)
    """
    if name in BY_SIZE:
        return BY_SIZE[name][dim is not None and dim > 1024]
    known = {recipe.name: recipe for recipe in RECIPES}
    one_of("recipe", name, (*BY_SIZE, *known))
    return known[name]
