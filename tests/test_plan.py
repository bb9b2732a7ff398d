import sys
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel  # the plain kernel: CPU's fused one is not counted
from torch.utils.flop_counter import FlopCounterMode

import mimrefiner as mr
from mimrefiner import plan
from mimrefiner.__main__ import main
from mimrefiner.catalogue import MODELS
from mimrefiner.layouts import ReleasedViT, ViTShape
from mimrefiner.memory import Memory
from mimrefiner.models import _as_encoder
from mimrefiner.refiner import MIMRefiner

SHAPES = [
    ViTShape(32, 8, 48, 3, 3, 192),
    ViTShape(32, 8, 48, 2, 3, 96, cls_token=False, fixed_positions=False),
    ViTShape(28, 14, 32, 2, 2, 128, post_norm=True, final_norm=False),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_and_flops_are_those_of_the_model(shape):
    encoder = ReleasedViT(shape)
    assert plan.parameters(shape) == sum(x.numel() for x in encoder.state_dict().values())
    for size in (shape.image_size, 2 * shape.patch_size):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            encoder(torch.randn(1, 3, size, size))
        assert counter.get_total_flops() == plan.forward_flops(shape, size)


def refiner_of(shape):
    encoder = _as_encoder(ReleasedViT(shape), None).train()
    config = replace(mr.load_preset("smoke").refine, batch_size=8, queue_size=64, refine_top_k=1, blocks=(1, 2))
    return MIMRefiner(encoder, config), config


@pytest.mark.parametrize("train", [False, True])
def test_a_step_costs_what_the_plan_says(train):
    refiner, config = refiner_of(SHAPES[0])
    refiner.encoder.requires_grad_(train)
    views = [torch.randn(8, 3, crop.size, crop.size) for crop in config.views.crops]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        refiner.step(views, torch.arange(8), top_k=1).loss.sum().backward()
    expected = 8 * plan.step_flops(SHAPES[0], config, train_encoder=train)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.05)
    assert plan.head_parameters(SHAPES[0], config) == sum(x.numel() for x in refiner.heads.parameters())


@pytest.mark.parametrize("autocast", [False, True])
def test_activations_are_those_that_autograd_keeps(autocast):
    shape = ViTShape(64, 8, 64, 4, 2, 256)
    encoder = ReleasedViT(shape)

    def kept(batch):
        storages = {}

        def keep(x):
            storage = x.untyped_storage()
            storages[storage.data_ptr()] = storage  # held, so that no address is used twice
            return x

        images = torch.randn(batch, 3, 64, 64)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            encoder(images)
        return sum(storage.nbytes() for storage in storages.values())

    per_image = (kept(6) - kept(2)) / 4  # weights cancel
    assert plan.activation_bytes(shape, 64, autocast=autocast) == pytest.approx(per_image, rel=0.15)


def test_every_plain_model_of_the_table_has_a_plan():
    for row in MODELS:
        if row.dim:
            shape = plan.shape_of(row.name)
            p = plan.make_plan(shape, plan.paper_recipe(shape), 1_281_167, gpus=8)
            assert p.refine_bytes > p.heads_bytes > p.probe_bytes > 4 * p.parameters
    assert plan.parameters(plan.shape_of("mae_l16")) == pytest.approx(303e6, rel=0.01)
    assert plan.parameters(plan.shape_of("mae_h14")) == pytest.approx(630e6, rel=0.01)
    assert plan.parameters(plan.shape_of("maws_6.5b14")) == pytest.approx(6440e6, rel=0.01)


def test_what_saves_memory_lowers_the_estimate():
    shape = plan.shape_of("mae_2b14")
    config = plan.paper_recipe(shape)

    def gib(gpus=8, train=True, config=config, **memory):
        return plan.training_bytes(shape, config, train_encoder=train, gpus=gpus, memory=Memory(**memory)) / 2**30

    assert gib() > gib(recompute=True) > gib(recompute=True, shard=True)
    assert gib() > gib(micro_batch=8) > gib(micro_batch=8, recompute=True)
    assert gib(config=replace(config, frozen_blocks=0)) > gib()
    assert gib(train=False) == gib(train=False, shard=True)
    states = 20 * plan.parameters(shape) / 2**30  # weight, gradient, two moments, moving average in float32
    unfrozen = replace(config, frozen_blocks=0)
    assert gib(config=unfrozen) - gib(config=unfrozen, shard=True) == pytest.approx(1.1 * (7 / 8 - 16 / 20 / 24) * states)


def test_training_that_will_not_fit_is_said_before_it_begins(digits, monkeypatch, capsys):
    """With a pretended card."""
    smoke, some = mr.load_preset("smoke"), digits["train"].take(64)
    refiner = MIMRefiner(mr.build_vit(smoke.encoder), smoke.refine)
    shape = ViTShape(32, 8, 32, 4, 2, 128)
    needed = plan.training_bytes(shape, smoke.refine, train_encoder=True)
    assert needed > plan.training_bytes(shape, smoke.refine, train_encoder=False)
    for card in (None, 1.01 * needed):
        monkeypatch.setattr(plan, "card_bytes", lambda device, card=card: card)
        plan.warn_if_too_large(refiner, Memory())
        assert capsys.readouterr().err == ""
    monkeypatch.setattr(plan, "card_bytes", lambda device: 0.99 * needed)
    monkeypatch.setattr("mimrefiner.train.train_heads", lambda *args, **options: print("training", file=sys.stderr))
    mr.refine(mr.build_vit(smoke.encoder), some, smoke.refine)
    first, second = capsys.readouterr().err.splitlines()[:2]
    assert first.startswith("stage 3 (refinement) needs about 0.0 GiB by estimate, this GPU has 0.0")
    assert "recompute activations (--recompute)" in first
    assert second == "training"


def test_command_line(capsys):
    assert main(["plan", "d2v2_refined_h14", "imagenet", "--gpus", "8"]) == 0
    out = capsys.readouterr().out
    assert "630.8 M parameters" in out
    assert "assuming 40 % of 312 TFLOP/s" in out
    assert main(["plan", "d2v2_refined_h14", "imagenet", "--gpus", "8", "--shard", "--recompute", "--micro-batch", "8"]) == 0
    less = capsys.readouterr().out
    assert float(less.split("refinement ")[2].split()[0]) < 0.5 * float(out.split("refinement ")[2].split()[0])
    for arguments, message in (
        (["nosuch", "imagenet"], "no plan for 'nosuch'"),
        (["mae_l16", "imagenet", "--gpus", "0"], "expected gpus >= 1"),
        (["mae_h14", "100", "--preset", "tiny"], "which patch size 14 does not divide"),
    ):
        assert main(["plan", *arguments]) == 2
        assert message in capsys.readouterr().err
