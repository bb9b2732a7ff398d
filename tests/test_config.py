from dataclasses import replace

import pytest

import mimrefiner as mr
from mimrefiner.config import Crop

SMOKE = mr.load_preset("smoke")


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        (SMOKE.encoder, {"depth": 0}, "depth must be a whole number >= 1, got 0"),
        (SMOKE.encoder, {"patch_size": 0}, "patch_size must be a whole number >= 1, got 0"),
        (SMOKE.pretrain, {"base_lr": -1.0}, "base_lr must be >= 0 and finite, got -1.0"),
        (SMOKE.pretrain, {"epochs": float("inf")}, "epochs must be >= 0 and finite, got inf"),
        (
            SMOKE.pretrain,
            {"crop_scale": (2, 3)},
            r"crop_scale must be two shares of the area, such as \(0.2, 1\), got \(2, 3\)",
        ),
        (SMOKE.pretrain, {"betas": (0.9, 1.0)}, "betas must be two numbers >= 0 and < 1"),
        (SMOKE.refine, {"heads_epochs": -5}, "heads_epochs must be >= 0 and finite, got -5"),
        (SMOKE.refine, {"ema_decay": 1.5}, "ema_decay must be >= 0 and < 1, or None, got 1.5"),
        (SMOKE.refine, {"layer_decay": -1}, "layer_decay must be > 0 and at most 1, got -1"),
        (SMOKE.refine, {"refine_base_lr": -1}, "refine_base_lr must be >= 0 and finite, got -1"),
        (
            SMOKE.refine,
            {"temperature": float("inf")},
            "temperature must be > 0 and finite, got inf",
        ),
        (SMOKE.refine, {"seed": 2**28}, "seed must be below 2\\^28"),
        (SMOKE.refine, {"frozen_blocks": -1}, "frozen_blocks must be a whole number >= 0, got -1"),
        (
            Crop(8, (0.2, 1)),
            {"scale": (2, 3)},
            r"two shares of the area such as \(0.2, 1\), got 8, \(2, 3\)",
        ),
    ],
)
def test_values_that_mean_nothing_are_named(settings, change, message):
    with pytest.raises(mr.InputError, match=message):
        replace(settings, **change)
