"""The presets: functions whose docstrings state cost and expected outcome."""

import functools
import os
import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mimrefiner.config import PretrainConfig, RefineConfig, ViTConfig
from mimrefiner.data.augment import digit_views, paper_views, small_views
from mimrefiner.data.datasets import ImageDataset, load_dataset
from mimrefiner.errors import InputError, one_of

IMAGENET = "imagefolder:imagenet"  # as presets and result rows name it
FOLDERS = {  # name in presets -> variable that says where it lies, what it is, what the folder holds
    IMAGENET: ("MIMREFINER_IMAGENET", "ImageNet-1K", "train/CLASS/IMAGE and val/CLASS/IMAGE"),
    "parquet:tiny-imagenet": (
        "MIMREFINER_TINY_IMAGENET",
        "Tiny-ImageNet",
        "its files train-*.parquet and val-*.parquet",
    ),
}
CURVE_IMAGES = (
    100_000  # training images behind curves over all blocks, so that their features fit in memory
)


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
        if seed < 0:
            raise InputError(f"seed must be >= 0, got {seed}")
        return replace(
            self, pretrain=replace(self.pretrain, seed=seed), refine=replace(self.refine, seed=seed)
        )


def smoke() -> Preset:
    """Seconds on 2 cores: 4 blocks, a few steps. Shows that everything runs; its numbers mean
    nothing.
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
    """About 6 minutes of training on 2 cores: 12 blocks of width 64 on scikit-learn's digits,
    SimMIM-style.

    A toy: raw pixels classify digits better than these features. Expected: k-NN of the cls token
    peaks before the last block,
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
    """``tiny``'s model and recipe, about as many steps, on 8,000 images of Fashion-MNIST: the
    second data set of the ablations.

    Five minutes of one CPU core for pre-training and three for each refinement. The data are
    downloaded when asked for.
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
    """Under an hour on one data-centre GPU (not yet measured): ViT-Tiny/4 on CIFAR-10, MAE-style
    with a light decoder.
    """
    encoder = ViTConfig(image_size=32, patch_size=4, dim=192, depth=12, num_heads=3)
    pretrain = PretrainConfig(
        method="mae", mask_ratio=0.75, decoder_depth=2, epochs=200, batch_size=512, base_lr=1e-3
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
    """Natural images at 64 px on a CPU: MAE ViT-Tiny/8 with a light decoder, on Tiny-ImageNet (give
    its folder by ``--data``).

    About 8 minutes of one CPU core in bfloat16 per epoch of pre-training (90,000 images) and 20 for
    both stages of refinement, which see less than half an epoch. The paper's 2 + 10 views are cut
    to 2 + 4, and the first half of the blocks is frozen. A weak model, as few epochs make it;
    ``natural-gpu`` is the same with the epochs that a GPU affords.
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
        refine_base_lr=8e-3,  # the best of three on validation images: python -m experiments.natural --choose
        layer_decay=0.75,
        frozen_blocks=6,
    )
    return Preset("natural", "parquet:tiny-imagenet", None, None, encoder, pretrain, refine)


def natural_simmim() -> Preset:
    """``natural`` with SimMIM pre-training: mask tokens pass the encoder, which makes an epoch
    three times as long (25 minutes).
    """
    preset = natural()
    pretrain = replace(preset.pretrain, method="simmim", mask_ratio=0.6, epochs=2)
    # Set beforehand: the MAE's rate alone was chosen
    refine = replace(preset.refine, refine_base_lr=2e-3)
    return replace(preset, name="natural-simmim", pretrain=pretrain, refine=refine)


def natural_gpu() -> Preset:
    """``natural`` on one data-centre GPU (not yet run): 300 epochs of MAE, then the paper's 2 + 10
    views for 10 + 20 epochs.
    """
    preset = natural()
    pretrain = replace(preset.pretrain, epochs=300, batch_size=1024, base_lr=5e-4)
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


def paper(model: str) -> Preset:
    """The paper's refinement of a published model on ImageNet-1K: 1 to 64 data-centre GPUs, days
    for the largest (not measured).

    The settings are those of the released configurations (``src/yamls/stage2`` and ``stage3``), the
    pairing of views that of the released code. Give the published weights by ``--model`` and
    ImageNet, all of whose training images are used, by ``--data`` or ``$MIMREFINER_IMAGENET``; the
    pre-training part is MAE's own recipe (arXiv 2111.06377, Table 8). Expected k-NN accuracies of
    the last block, from the paper: MAE L/16 81.5, H/14 82.3, 2B/14 83.2, data2vec 2.0 L/16 81.0.
    """
    name, size = model.split("-")
    dim, depth, num_heads, patch, temperature, first_head, batch_size = {
        "l16": (1024, 24, 16, 16, 0.2, 16, 1024),
        "h14": (1280, 32, 16, 14, 0.3, 20, 512),
        "2b14": (2560, 24, 32, 14, 0.35, 16, 512),
    }[size]
    encoder = ViTConfig(image_size=224, patch_size=patch, dim=dim, depth=depth, num_heads=num_heads)
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


PAPER_MODELS = (
    "mae-l16",
    "d2v2-l16",
    "dbot-l16",
    "crossmae-l16",
    "mae-h14",
    "d2v2-h14",
    "dbot-h14",
    "mae-2b14",
)


def describe(preset: Preset) -> str:
    """The settings of a preset as a few lines of text."""
    blocks = ", ".join(str(b) for b in preset.refine.resolve_blocks(preset.encoder.depth))
    views = preset.refine.views
    crops = [
        f"{crop.size} px crops of {crop.scale[0]:g} to {crop.scale[1]:g} of the area"
        for crop in views.crops
    ]
    lines = [("heads on", f"blocks {blocks} (0-based)")]
    lines += [
        (
            "views",
            f"{len(views.global_crops)} global, {crops[0]}; {views.n_local} local, {crops[-1]}",
        )
    ]
    for part in ("encoder", "pretrain", "refine"):
        values = asdict(getattr(preset, part))
        text = ", ".join(
            f"{name} {value}" for name, value in values.items() if name not in ("views", "blocks")
        )
        lines += [(part, text)]
    return "\n".join(
        textwrap.fill(f"{name:9s} {text}", 120, subsequent_indent=" " * 10) for name, text in lines
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
    """The preset ``name`` with its seeds set; InputError lists the names there are."""
    one_of("preset", name, tuple(PRESETS))
    return PRESETS[name]().with_seed(seed)


def load_split(preset: Preset, split: str) -> ImageDataset:
    """A split of the preset's data set, cut to the preset's size.

    Raises:
        InputError: as :func:`mimrefiner.load_dataset`; with the variable to set where a data set is
            not found.
    """
    name = preset.dataset
    if name in FOLDERS:
        variable, what, holds = FOLDERS[name]
        kind, _, default = name.partition(":")
        folder = Path(os.environ.get(variable, default)).expanduser()
        if not folder.is_dir():
            raise InputError(
                f"preset {preset.name} needs {what}, and there is no folder {folder}: set {variable} to the folder that holds "
                f"{holds}"
            )
        name = f"{kind}:{folder}"
    return load_dataset(name, split=split).take(
        preset.n_test if split == "test" else preset.n_train
    )


PRESETS |= {f"paper-{model}": functools.partial(paper, model) for model in PAPER_MODELS}
