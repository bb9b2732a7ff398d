from dataclasses import replace

import pytest

import mimrefiner as mr
from mimrefiner.models.layouts import ViTShape
from mimrefiner.study.plan import finetune_plan, shape_of
from mimrefiner.training.finetune import finetune_recipe
from mimrefiner.training.finetune_cost import finetune_bytes, finetune_flops, finetune_total
from mimrefiner.training.memory import Memory
from mimrefiner.training.recipes import H14, L16, P10_2B14, RECIPES

GIB = 2**30


@pytest.mark.parametrize(
    ("change", "memory"),
    [
        ({}, Memory()),
        ({"frozen_share": 0.5}, Memory()),
        ({}, Memory(recompute=True)),
        ({"micro_batch": 4}, Memory(micro_batch=2)),
    ],
)
def test_operations_are_those_that_a_step_counts(digits, change, memory):
    encoder = mr.build_vit(mr.ViTConfig(dim=32, depth=4, num_heads=2))
    recipe = replace(L16, epochs=1, batch_size=8, drop_path=0.0, **change)
    images = digits["train"].take(16)
    counted = finetune_recipe(encoder, images, digits["test"].take(4), recipe, memory=memory).flops
    shape = ViTShape(32, 8, dim=32, depth=4, num_heads=2, mlp_dim=128)
    assert finetune_total(shape, recipe, 16, 10, memory) == pytest.approx(counted, rel=0.02)
    assert counted > 0


def test_memory_follows_what_saves_it():
    large = shape_of("mae_l16")
    whole = finetune_bytes(large, L16, 1000, gpus=8)
    assert 16 * 303e6 < whole < 80 * GIB
    less = [
        finetune_bytes(large, L16, 1000, gpus=16),
        finetune_bytes(large, L16, 1000, gpus=8, memory=Memory(micro_batch=32)),
        finetune_bytes(large, L16, 1000, gpus=8, memory=Memory(recompute=True)),
        finetune_bytes(large, L16, 1000, gpus=8, memory=Memory(shard=True)),
        finetune_bytes(large, replace(L16, frozen_share=0.25), 1000, gpus=8),
    ]
    assert all(bytes < whole for bytes in less)
    # 2B/14: weights 4 bytes each, gradients and moments of three quarters, and little else
    huge = finetune_bytes(shape_of("mae_2b14"), P10_2B14, 1000, gpus=1)
    assert huge > 1.89e9 * (4 + 12 * 0.75)
    with pytest.raises(mr.InputError, match="gpus >= 1 that divide the batch of 1024, got 3"):
        finetune_bytes(large, L16, 1000, gpus=3)


def test_hours_are_those_of_the_operations():
    """ViT-L: 3 x 123 GFLOPs for 64 million images are 2.4e19, 53 hours at 125 TFLOP/s."""
    shape = shape_of("mae_l16")
    assert finetune_flops(shape, L16, 1000) == pytest.approx(3 * 123.1e9, rel=0.01)
    total = finetune_total(shape, L16, 1_281_167, 1000)
    assert total == pytest.approx(3 * 123.1e9 * 1024 * 62_550, rel=0.01)
    assert f"{total / (0.4 * 312e12) / 3600:,.1f} h" in finetune_plan("mae_l16", "in1k", gpus=8)


def test_the_plan_has_every_recipe():
    lines = finetune_plan("mae_h14", gpus=8).splitlines()
    assert [line.split()[0] for line in lines[1:]] == [recipe.name for recipe in RECIPES]
    (one,) = (line for line in lines if line.startswith("shots_d2v2_l16 "))
    assert "5,000 images, 50 epochs, batch 250 on 2" in one  # 8 GPUs do not divide 250
    h14 = finetune_plan("mae_h14", "in1k", gpus=8)
    assert h14.splitlines()[1].startswith(H14.name)
    with pytest.raises(mr.InputError, match="unknown recipe 'x'"):
        finetune_plan("mae_l16", "x")
    with pytest.raises(mr.InputError, match="expected tflops > 0, got 0"):
        finetune_plan("mae_l16", tflops=0)
    with pytest.raises(mr.InputError, match="that divide the batch of 250, got 3"):
        finetune_plan("mae_l16", "shots_d2v2_l16", gpus=3)
