"""The presets: functions whose docstrings state cost and expected outcome."""

import functools
import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mimrefiner.config import PretrainConfig, RefineConfig, Views, ViTConfig
from mimrefiner.data.augment import digit_views, paper_views, small_views
from mimrefiner.data.datasets import ImageDataset, load_dataset
from mimrefiner.errors import InputError, one_of
from mimrefiner.files import variable_folder

IMAGENET = "imagefolder:imagenet"  # as presets and result rows name it
# Name in presets -> variable that says where it lies, what it is, what the folder holds
FOLDERS = {
    IMAGENET: ("MIMREFINER_IMAGENET", "ImageNet-1K", "train/CLASS/IMAGE and val/CLASS/IMAGE"),
    "parquet:tiny-imagenet": (
        "MIMREFINER_TINY_IMAGENET",
        "Tiny-ImageNet",
        "its files train-*.parquet and val-*.parquet",
    ),
}
# Training images behind curves over all blocks, so that their features fit in memory
CURVE_IMAGES = 100_000


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
        """The preset whose trainings draw from ``seed``."""
        if seed < 0:
            raise InputError(f"seed must be >= 0, got {seed}")
        return replace(
            self, pretrain=replace(self.pretrain, seed=seed), refine=replace(self.refine, seed=seed)
        )


def smoke() -> Preset:
    """Seconds on 2 cores: 4 blocks, a few steps, to show that everything runs.

    Its numbers mean nothing.
    """
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
    """About 6 minutes of training on 2 cores: 12 blocks of width 64 on scikit-learn's digits.

    A toy, pre-trained like SimMIM: raw pixels classify digits better than these features. Expected:
    k-NN of the cls token peaks before the last block, and refinement lifts the last block by
    several points.
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
    """``tiny``'s model and recipe on 8,000 images of Fashion-MNIST, for the ablations.

    Pre-training takes five minutes of one CPU core, each refinement three: about as many steps as
    with ``tiny``. The data are downloaded when they are first loaded.
    """
    preset = tiny()
    pretrain = replace(preset.pretrain, epochs=30)
    refine = replace(preset.refine, heads_epochs=1, refine_epochs=3, warmup_epochs=0.25)
    return replace(
        preset,
        name="fashion",
        dataset="fashion_mnist",
        n_train=8000,
        n_test=2000,
        pretrain=pretrain,
        refine=refine,
    )


def gpu() -> Preset:
    """ViT-Tiny/4 on CIFAR-10: under half an hour a seed on one data-centre GPU, by estimate.

    It is pre-trained like MAE, with a light decoder, in batches that keep a GPU busy. The estimate
    is ``python -m tests.benchmarks.estimate``; nothing has been measured yet.
    """
    encoder = ViTConfig(image_size=32, patch_size=4, dim=192, depth=12, num_heads=3)
    pretrain = PretrainConfig(
        method="mae", mask_ratio=0.75, decoder_depth=2, epochs=200, batch_size=1024, base_lr=5e-4
    )
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
    """Natural images at 64 px on a CPU: MAE ViT-Tiny/8 with a light decoder, on Tiny-ImageNet.

    Give the folder of Tiny-ImageNet by ``--data``. An epoch of pre-training (90,000 images) takes
    about 8 minutes of one CPU core in bfloat16; both stages of refinement, which see less than half
    an epoch, take 20. The paper's 2 + 10 views are cut to 2 + 4, and the first half of the blocks
    is frozen. Few epochs make a weak model; ``natural-gpu`` has those that a GPU affords.
    """
    encoder = ViTConfig(image_size=64, patch_size=8, dim=192, depth=12, num_heads=3)
    pretrain = PretrainConfig(
        method="mae",
        mask_ratio=0.75,
        decoder_depth=1,
        decoder_dim=96,
        epochs=6,
        batch_size=128,
        base_lr=2e-3,
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
        # The best of three on validation images: python -m experiments.natural --choose
        refine_base_lr=8e-3,
        layer_decay=0.75,
        frozen_blocks=6,
    )
    return Preset("natural", "parquet:tiny-imagenet", None, None, encoder, pretrain, refine)


def natural_simmim() -> Preset:
    """``natural`` with SimMIM pre-training.

    Mask tokens pass the encoder, so that an epoch takes three times as long (25 minutes).
    """
    preset = natural()
    pretrain = replace(preset.pretrain, method="simmim", mask_ratio=0.6, epochs=2)
    # Set beforehand: the MAE's rate alone was chosen
    refine = replace(preset.refine, refine_base_lr=2e-3)
    return replace(preset, name="natural-simmim", pretrain=pretrain, refine=refine)


def natural_gpu() -> Preset:
    """``natural`` on one data-centre GPU (not yet run).

    300 epochs of MAE, then the paper's 2 + 10 views for 10 + 20 epochs: under an hour a seed by
    the estimate ``python -m tests.benchmarks.estimate``.
    """
    preset = natural()
    pretrain = replace(preset.pretrain, epochs=300, batch_size=2048, base_lr=2.5e-4)
    refine = replace(
        preset.refine,
        views=small_views(64, 8, n_local=10),
        hidden_dim=1024,
        out_dim=256,
        predictor_dim=2048,
        queue_size=32768,
        batch_size=512,
        heads_epochs=10,
        refine_epochs=20,
        warmup_epochs=2,
        heads_base_lr=1e-3,
        refine_base_lr=1e-3,
        frozen_blocks=2,
    )
    return replace(preset, name="natural-gpu", pretrain=pretrain, refine=refine)


@dataclass(frozen=True)
class PaperSize:
    """A size of the paper's models, and what the recipe takes from it."""

    name: str
    encoder: ViTConfig
    temperature: float
    first_head: int
    batch_size: int
    epochs: int = 30
    frozen_blocks: int = 0


def _vit(dim: int, depth: int, num_heads: int, patch_size: int) -> ViTConfig:
    return ViTConfig(224, patch_size, dim=dim, depth=depth, num_heads=num_heads)


PAPER_SIZES = {
    "l16": PaperSize("L/16", _vit(1024, 24, 16, 16), 0.2, 16, 1024),
    "h14": PaperSize("H/14", _vit(1280, 32, 16, 14), 0.3, 20, 512),
    "2b14": PaperSize("2B/14", _vit(2560, 24, 32, 14), 0.35, 16, 512, epochs=20, frozen_blocks=6),
}


def paper_crops(patch_size: int) -> Views:
    """The paper's views; patches of 14 px need local crops of 98 px in place of 96."""
    return paper_views(224, 98 if patch_size == 14 else 96)


def paper_refinement(size: str, family: str = "mae") -> RefineConfig:
    """The paper's refinement of a size of PAPER_SIZES, as the released configurations set it.

    data2vec 2.0 ("d2v2") takes 20 epochs; the heads of CrossMAE read the mean of patch tokens.
    """
    of = PAPER_SIZES[size]
    return RefineConfig(
        views=paper_crops(of.encoder.patch_size),
        blocks=tuple(range(of.first_head, of.encoder.depth)),
        pool="mean" if family == "crossmae" else "cls",
        temperature=of.temperature,
        pairing="published",
        batch_size=of.batch_size,
        refine_epochs=20 if family == "d2v2" else of.epochs,
        frozen_blocks=of.frozen_blocks,
        ema_decay=0.9999,
    )


def paper(model: str) -> Preset:
    """The paper's refinement of a published model on ImageNet-1K.

    1 to 64 data-centre GPUs, days for the largest (not measured). The settings are those of the
    released configurations (``src/yamls/stage2`` and ``stage3``), the pairing of views that of the
    released code. Give the published weights by ``--model`` and ImageNet, all of whose training
    images are used, by ``--data`` or ``$MIMREFINER_IMAGENET``; the pre-training part is MAE's own
    recipe (arXiv 2111.06377, Table 8). Expected k-NN accuracies of the last block, from the paper:
    MAE L/16 81.5, H/14 82.3, 2B/14 83.2, data2vec 2.0 L/16 81.0.
    """
    family, size = PAPER_MODELS[model]
    pretrain = PretrainConfig(
        method="mae",
        mask_ratio=0.75,
        decoder_depth=8,
        decoder_dim=512,
        decoder_heads=16,
        epochs=1600,
        batch_size=4096,
        base_lr=1.5e-4,
        min_lr=0.0,
        warmup_share=40 / 1600,
    )
    encoder, refine = PAPER_SIZES[size].encoder, paper_refinement(size, family)
    return Preset(f"paper-{model}", IMAGENET, None, None, encoder, pretrain, refine)


PAPER_FAMILIES = {
    "l16": ("mae", "d2v2", "dbot", "crossmae"),
    "h14": ("mae", "d2v2", "dbot"),
    "2b14": ("mae",),
}
PAPER_MODELS = {  # name -> family and size
    f"{family}-{size}": (family, size)
    for size, families in PAPER_FAMILIES.items()
    for family in families
}


def describe(preset: Preset) -> str:
    """The settings of a preset as a few lines of text."""
    blocks = ", ".join(str(b + 1) for b in preset.refine.resolve_blocks(preset.encoder.depth))
    views = preset.refine.views
    crops = [
        f"{crop.size} px crops of {crop.scale[0]:g} to {crop.scale[1]:g} of the area"
        for crop in views.crops
    ]
    shown = f"{len(views.global_crops)} global, {crops[0]}; {views.n_local} local, {crops[-1]}"
    lines = [("heads on", f"blocks {blocks} (1 = first)"), ("views", shown)]
    for part in ("encoder", "pretrain", "refine"):
        values = asdict(getattr(preset, part))
        text = ", ".join(
            f"{name} {value}" for name, value in values.items() if name not in ("views", "blocks")
        )
        lines += [(part, text)]
    return "\n".join(
        textwrap.fill(f"{name:9s} {text}", 100, subsequent_indent=" " * 10) for name, text in lines
    )


PRESETS: dict[str, Callable[[], Preset]] = {
    "smoke": smoke,
    "tiny": tiny,
    "fashion": fashion,
    "natural": natural,
    "natural-simmim": natural_simmim,
    "natural-gpu": natural_gpu,
    "gpu": gpu,
}


def load_preset(name: str, seed: int = 0) -> Preset:
    """The preset ``name`` whose trainings draw from ``seed``.

    Raises:
        InputError: an unknown name; the message lists those there are.

    >>> import mimrefiner as mr
    >>> preset = mr.load_preset("tiny", seed=1)
    >>> preset.dataset, preset.encoder.depth, preset.refine.seed
    ('digits', 12, 1)
    """
    one_of("preset", name, tuple(PRESETS))
    return PRESETS[name]().with_seed(seed)


def load_split(preset: Preset, split: str) -> ImageDataset:
    """A split of the preset's data set, cut to the preset's size.

    Raises:
        InputError: as :func:`mimrefiner.load_dataset`; where a data set is not found, it names the
            variable to set.
    """
    name = preset.dataset
    if name in FOLDERS:
        variable, what, holds = FOLDERS[name]
        kind, _, default = name.partition(":")
        folder = variable_folder(variable) or Path(default)
        if not folder.is_dir():
            raise InputError(
                f"preset {preset.name} needs {what}, and there is no folder {folder}: set "
                f"{variable} to the folder that holds {holds}"
            )
        name = f"{kind}:{folder}"
    return load_dataset(name, split=split).take(
        preset.n_test if split == "test" else preset.n_train
    )


PRESETS |= {f"paper-{model}": functools.partial(paper, model) for model in PAPER_MODELS}
