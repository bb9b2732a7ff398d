"""The presets, and every column of the paper's recipe written out again (its ``src/yamls``)."""

from dataclasses import replace

import pytest

import mimrefiner as mr
from mimrefiner.__main__ import main
from mimrefiner.study import plan
from mimrefiner.study.presets import PAPER_MODELS, PRESETS

COLUMNS = {
    #                T     blocks              pool    batch stage-3 epochs  local px  frozen
    "mae-l16": (0.20, tuple(range(16, 24)), "cls", 1024, 30, 96, 0),
    "d2v2-l16": (0.20, tuple(range(16, 24)), "cls", 1024, 20, 96, 0),
    "dbot-l16": (0.20, tuple(range(16, 24)), "cls", 1024, 30, 96, 0),
    "crossmae-l16": (0.20, tuple(range(16, 24)), "mean", 1024, 30, 96, 0),
    "mae-h14": (0.30, tuple(range(20, 32)), "cls", 512, 30, 98, 0),
    "d2v2-h14": (0.30, tuple(range(20, 32)), "cls", 512, 20, 98, 0),
    "dbot-h14": (0.30, tuple(range(20, 32)), "cls", 512, 30, 98, 0),
    "mae-2b14": (0.35, tuple(range(16, 24)), "cls", 512, 20, 98, 6),
}
SIZES = {"l16": (1024, 24, 16, 16), "h14": (1280, 32, 16, 14), "2b14": (2560, 24, 32, 14)}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_fine(preset):
    assert mr.load_preset(preset, seed=3).refine.seed == 3


def test_there_is_a_preset_for_every_column():
    assert set(PAPER_MODELS) == set(COLUMNS)


@pytest.mark.parametrize("model", COLUMNS)
def test_what_differs_between_the_columns(model):
    preset = mr.load_preset(f"paper-{model}")
    c = preset.refine
    found = (
        c.temperature,
        c.blocks,
        c.pool,
        c.batch_size,
        c.refine_epochs,
        c.views.local_crop.size,
        c.frozen_blocks,
    )
    assert found == COLUMNS[model]
    e = preset.encoder
    assert (e.dim, e.depth, e.num_heads, e.patch_size) == SIZES[model.split("-")[1]]
    assert e.image_size == 224


@pytest.mark.parametrize("model", COLUMNS)
def test_what_the_columns_share(model):
    c = mr.load_preset(f"paper-{model}").refine
    assert (c.heads_epochs, c.heads_base_lr, c.refine_base_lr) == (20, 2e-4, 4e-4)
    assert (c.encoder_weight_decay, c.head_weight_decay, c.layer_decay, c.ema_decay) == (
        0.05,
        1e-5,
        0.65,
        0.9999,
    )
    assert (c.warmup_epochs, c.min_lr, c.betas) == (4, 1e-6, (0.9, 0.95))
    assert (c.heads_top_k, c.refine_top_k, c.queue_size) == (1, 20, 65536)
    assert (c.hidden_dim, c.out_dim, c.predictor_dim) == (2048, 256, 4096)
    assert (c.pairing, c.swap_negatives, c.clip_norm) == ("published", False, None)


@pytest.mark.parametrize("model", COLUMNS)
def test_the_views_are_those_of_the_released_code(model):
    views = mr.load_preset(f"paper-{model}").refine.views
    a, b = views.global_crops
    local = views.local_crop
    assert views.n_local == 10
    assert (a.size, a.scale, a.blur_p, a.solarize_p) == (224, (0.25, 1.0), 1.0, 0.0)
    assert (b.size, b.scale, b.blur_p, b.solarize_p) == (224, (0.25, 1.0), 0.1, 0.2)
    assert (local.scale, local.blur_p, local.solarize_p) == ((0.05, 0.25), 0.5, 0.0)
    for crop in (a, b, local):
        assert (crop.flip_p, crop.jitter_p, crop.grey_p, crop.blur_sigma) == (
            0.5,
            0.8,
            0.2,
            (0.1, 2.0),
        )
        assert (crop.brightness, crop.contrast, crop.saturation, crop.hue) == (0.4, 0.4, 0.2, 0.1)


@pytest.mark.parametrize("model", COLUMNS)
def test_rates_in_use(model):
    """Peak rates, scaled by batch / 256: 8e-4 and 1.6e-3 for L, 4e-4 and 8e-4 for H and 2B."""
    c = mr.load_preset(f"paper-{model}").refine
    rates = (8e-4, 1.6e-3) if model.endswith("l16") else (4e-4, 8e-4)
    assert [
        rate * c.batch_size / 256 for rate in (c.heads_base_lr, c.refine_base_lr)
    ] == pytest.approx(rates)


def test_published_weights_are_asked_for(image_folder, tmp_path, capsys):
    arguments = [
        "refine",
        "--preset",
        "paper-mae-l16",
        "--data",
        f"imagefolder:{image_folder}",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(arguments) == 2
    assert "give them by --model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "preset"),
    [("mae_l16", "mae-l16"), ("d2v2_h14", "d2v2-h14"), ("mae_2b14", "mae-2b14")],
)
def test_a_plan_takes_the_recipe_of_the_preset(model, preset):
    theirs = mr.load_preset(f"paper-{preset}").refine
    ours = plan.paper_recipe(plan.shape_of(model))
    assert ours.resolve_blocks(SIZES[preset.split("-")[1]][1]) == theirs.blocks
    assert replace(ours, blocks=theirs.blocks) == theirs
