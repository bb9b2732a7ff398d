"""The recipes against the paper's configurations, typed here a second time."""

from dataclasses import fields, replace

import pytest

import mimrefiner as mr
from mimrefiner.training import recipes
from mimrefiner.training.optim import LabelledStage, stage_steps
from mimrefiner.training.recipes import RECIPES, FinetuneRecipe, recipe_named

MIN, RAND, FULL = "crop and flip", "and RandAugment", "and erasing, mixup, cutmix"
# name: base rate, weight decay, batch, drop path, augmentation, frozen share, layer decay,
# micro-batch (y/eval/finetune, finetune_transfer, extreme_lowshot, finetune_1p, finetune_10p)
TABLE = {
    "in1k_l16": (1e-3, 0.05, 1024, 0.2, FULL, 0, 0.75, None),
    "in1k_h14": (1e-3, 0.05, 1024, 0.3, FULL, 0, 0.75, None),
    "inat18_l16": (1e-3, 0.05, 1024, 0.2, FULL, 0, 0.75, None),
    "inat18_h14": (1e-3, 0.05, 1024, 0.3, FULL, 0, 0.75, None),
    "shots_d2v2_l16": (1e-4, 0.05, 250, 0, MIN, 0, 0.75, None),
    "shots_d2v2_h14": (1e-4, 0.05, 125, 0, MIN, 0, 0.75, None),
    "shots_mae_2b14": (1e-4, 0.05, 125, 0, MIN, 0.25, 0.75, 25),
    "shots_ibot22k_l16": (1e-3, 0.05, 250, 0, MIN, 0, 0.75, None),
    "1p_l16": (3e-5, 0.05, 512, 0, MIN, 0, 0.75, None),
    "1p_h": (3e-5, 0.4, 512, 0, MIN, 0, 0.75, None),
    "1p_2b14": (3e-5, 0.4, 512, 0, MIN, 0, 0.75, None),
    "1p_2b14_semivitmin_lr1e3": (1e-3, 0.05, 128, 0, MIN, 0, 0.75, None),
    "1p_2b14_semivitmin_lr1e2": (1e-2, 0.05, 128, 0, MIN, 0, 0.75, None),
    "1p_2b14_semivit_lr1e3": (1e-3, 0.05, 128, 0, FULL, 0, 0.75, None),
    "1p_2b14_vpt": (1e-3, 0, 128, 0, MIN, 1, 1.0, None),
    "1p_d2v2_l16_lr1e3": (1e-3, 0.05, 512, 0, MIN, 0, 0.75, None),
    "1p_d2v2_l16_lr1e4": (1e-4, 0.05, 512, 0, MIN, 0, 0.75, None),
    "1p_d2v2_h14_lr1e2": (1e-2, 0.05, 128, 0, MIN, 0, 0.75, None),
    "1p_d2v2_h14_lr1e3": (1e-3, 0.05, 128, 0, MIN, 0, 0.75, None),
    "1p_d2v2_h14_lr1e4": (1e-4, 0.05, 128, 0, MIN, 0, 0.75, None),
    "10p_l16": (3e-5, 0.05, 512, 0, RAND, 0, 0.75, None),
    "10p_h": (1e-3, 0.05, 256, 0.2, FULL, 0, 0.75, None),
    "10p_d2v2_l16_lr1e3": (1e-3, 0.05, 512, 0.1, FULL, 0, 0.75, None),
    "10p_d2v2_l16_lr5e4": (5e-4, 0.05, 512, 0.1, FULL, 0, 0.75, None),
    "10p_d2v2_l16_lr1e4": (1e-4, 0.05, 512, 0.1, FULL, 0, 0.75, None),
    "10p_d2v2_h14_lr1e3": (1e-3, 0.05, 256, 0.2, FULL, 0, 0.75, None),
    "10p_d2v2_h14_lr5e4": (5e-4, 0.05, 256, 0.2, FULL, 0, 0.75, None),
    "10p_d2v2_h14_lr1e4": (1e-4, 0.05, 256, 0.2, FULL, 0, 0.75, None),
    "10p_2b14": (1e-3, 0.05, 256, 0.3, FULL, 0.25, 0.75, 16),
    "10p_2b14_sd02": (1e-3, 0.05, 256, 0.2, FULL, 0.25, 0.75, 16),
    "10p_mae_2b14": (5e-4, 0.05, 256, 0.3, FULL, 0.25, 0.75, 16),
    "10p_mae_2b14_sd02": (5e-4, 0.05, 256, 0.2, FULL, 0.25, 0.75, 16),
    "10p_2b14_vpt": (1e-3, 0, 128, 0, MIN, 1, 1.0, None),
    "10p_dinov2_g14": (1e-3, 0.05, 256, 0, FULL, 0, 0.75, None),
    "10p_dinov2_g14_sd02": (1e-3, 0.05, 256, 0.2, FULL, 0, 0.75, None),
    "10p_dinov2_g14_sd03": (1e-3, 0.05, 256, 0.3, FULL, 0, 0.75, None),
    "inat18_shots": (1e-3, 0.05, 256, 0, MIN, 0, 0.75, None),
    "inat18_shots_dino_b8": (1e-3, 0.05, 256, 0, MIN, 0, 0.65, None),
    "inat18_shots_2b14": (1e-3, 0.05, 256, 0, MIN, 0.25, 0.75, 64),
}
AUGMENTATION = {  # RandAugment, erasing, mixup, cutmix
    MIN: ("", 0, 0, 0),
    RAND: ("rand-m9-mstd0.5-inc1", 0, 0, 0),
    FULL: ("rand-m9-mstd0.5-inc1", 0.25, 0.8, 1.0),
}
# What all of them share
COMMON = {
    "epochs": 50,
    "warmup_epochs": 5,
    "min_lr": 0,
    "warmup_to_peak": False,
    "betas": (0.9, 0.999),
    "decay_cls": False,
    "pool": "cls",
    "learn_positions": True,
    "head_norm": True,
    "crop_scale": (0.08, 1),
    "flip": True,
    "smoothing": 0.1,
    "test_float32": False,
    "prompt_dim": 192,
    "seed": 0,
}


def images_and_classes(name):
    if name.startswith("inat18"):
        return (81_420 if "shots" in name else 437_513), 8142
    parts = {"in1k": 1_281_167, "shots": 5_000, "1p": 12_811, "10p": 128_116}
    return parts[name.split("_")[0]], 1000


@pytest.mark.parametrize("name", TABLE)
def test_every_field_is_that_of_the_configuration(name):
    rate, decay, batch, drop_path, augmentation, frozen, layers, micro = TABLE[name]
    rand, erasing, mixup, cutmix = AUGMENTATION[augmentation]
    images, classes = images_and_classes(name)
    expected = {
        **COMMON,
        "name": name,
        "base_lr": rate,
        "weight_decay": decay,
        "batch_size": batch,
        "micro_batch": micro,
        "drop_path": drop_path,
        "rand_augment": rand,
        "erasing": erasing,
        "mixup": mixup,
        "cutmix": cutmix,
        "frozen_share": frozen,
        "layer_decay": layers,
        "resize": 256 if name.startswith("inat18_shots") else None,
        "prompts": 8 if "vpt" in name else 0,
        "images": images,
        "classes": classes,
    }
    recipe = recipe_named(name)
    assert {field: getattr(recipe, field) for field in expected} == expected
    assert {f.name for f in fields(FinetuneRecipe)} - set(expected) == {"models", "source"}
    assert recipe.source.startswith("y/eval/") and recipe.models


def test_no_recipe_is_left_out():
    assert [recipe.name for recipe in RECIPES] == sorted(TABLE, key=list(TABLE).index)


def test_numbers_of_updates_and_rates_are_the_papers():
    """62,550 updates, 6,255 of them warm-up, up to 4e-3; a quarter of 24 blocks is 6."""
    recipe = recipe_named("in1k", dim=1024)
    assert recipe.name == "in1k_l16" and recipe_named("in1k", dim=1280).name == "in1k_h14"
    assert recipe_named("inat18", 768).name == "inat18_l16"
    per_epoch = 1_281_167 // recipe.batch_size
    steps = stage_steps(1_281_167, recipe.batch_size, recipe.epochs)
    assert (steps, recipe.warmup_epochs * per_epoch) == (62_550, 6_255)
    assert recipe.base_lr * recipe.batch_size / 256 == pytest.approx(4e-3)
    assert recipe_named("10p_2b14").frozen_blocks(24) == 6
    small = recipe_named("shots_d2v2_l16").batch_size
    assert [images // small for images in (1000, 2000, 5000)] == [4, 8, 20]


def test_the_schedule_is_the_published_one():
    """Warm-up reaches neither 0 nor the peak, the cosine stops one step short of its end."""
    stage = LabelledStage(1, 100, 256, 256, warmup=10, base_lr=1.0, min_lr=0.5)
    assert [stage.lr(s) for s in (0, 9)] == pytest.approx([1 / 11, 10 / 11])
    assert stage.lr(10) == 1.0
    assert stage.lr(55) == pytest.approx(0.75)  # half of 90 steps
    assert 0.5 < stage.lr(99) < 0.501
    vtab = replace(stage, warmup_to_peak=True)
    assert [vtab.lr(s) for s in (0, 9)] == pytest.approx([0.1, 1.0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs must be > 0 and finite, got 0"),
        ({"batch_size": 0}, "batch_size must be >= 1 and finite, got 0"),
        ({"base_lr": -1.0}, "base_lr must be >= 0"),
        ({"layer_decay": 0}, "layer_decay must be > 0 and at most 1, got 0"),
        ({"drop_path": 2}, "drop_path must lie between 0 and 1, got 2"),
        ({"pool": "max"}, "unknown pool 'max': choose one of cls, mean"),
        ({"seed": 2**28}, "seed must be below 2\\^28"),
    ],
)
def test_bad_fields_are_named(change, message):
    with pytest.raises(mr.InputError, match=message):
        replace(recipes.L16, **change)


def test_an_unknown_recipe_lists_the_known_ones():
    with pytest.raises(mr.InputError, match="unknown recipe 'vtab': choose one of in1k, inat18, "):
        recipe_named("vtab")
