import logging
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peak import PeakBytes

# The plain kernel: CPU's fused one is not counted
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel
from torch.utils.flop_counter import FlopCounterMode

import mimrefiner as mr
from mimrefiner.__main__ import main
from mimrefiner.config import Crop, Views
from mimrefiner.method.refiner import MIMRefiner
from mimrefiner.models.blocks import pooled_blocks
from mimrefiner.models.catalogue import CATALOGUE
from mimrefiner.models.encoders import released_encoder
from mimrefiner.models.layouts import ReleasedViT, ViTShape
from mimrefiner.models.masked import build_masked_model, random_mask
from mimrefiner.study import plan
from mimrefiner.training import cost
from mimrefiner.training.memory import Memory, recomputed
from mimrefiner.training.optim import freeze_first
from mimrefiner.training.refine import forward_backward

SHAPES = [
    ViTShape(32, 8, 48, 3, 3, 192),
    ViTShape(32, 8, 48, 2, 3, 96, cls_token=False, fixed_positions=False),
    ViTShape(28, 14, 32, 2, 2, 128, post_norm=True, final_norm=False),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_and_flops_are_those_of_the_model(shape):
    encoder = ReleasedViT(shape)
    assert cost.parameters(shape) == sum(x.numel() for x in encoder.state_dict().values())
    for size in (shape.image_size, 2 * shape.patch_size):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            encoder(torch.randn(1, 3, size, size))
        assert counter.get_total_flops() == cost.forward_flops(shape, size)


def trainer(shape, train, **changes):
    """A refiner as in stage 3 (``train``) or stage 2."""
    config = replace(
        mr.load_preset("smoke").refine,
        **{"batch_size": 8, "queue_size": 64, "refine_top_k": 1} | changes,
    )
    encoder = released_encoder(ReleasedViT(shape)).train().requires_grad_(train)
    if train:
        freeze_first(encoder, config.frozen_blocks)
    return MIMRefiner(encoder, config), config


def step(refiner, config, memory):
    views = [torch.randn(config.batch_size, 3, crop.size, crop.size) for crop in config.views.crops]
    with recomputed(refiner.encoder) if memory.recompute else nullcontext():
        batch = views, torch.arange(config.batch_size), None
        forward_backward(refiner, batch, top_k=1, micro_batch=memory.micro_batch)


@pytest.mark.parametrize(
    ("train", "frozen", "memory"),
    [
        (False, 0, Memory()),
        (True, 0, Memory()),
        (True, 2, Memory()),
        (True, 2, Memory(recompute=True)),
        (True, 0, Memory(micro_batch=4)),
        (True, 0, Memory(micro_batch=4, recompute=True)),
    ],
)
def test_a_step_costs_what_the_plan_says(train, frozen, memory):
    refiner, config = trainer(SHAPES[0], train, blocks=(1, 2), frozen_blocks=frozen)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step(refiner, config, memory)
    expected = 8 * cost.step_flops(SHAPES[0], config, train_encoder=train, memory=memory)
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-3)
    assert cost.head_parameters(SHAPES[0], config) == sum(
        x.numel() for x in refiner.heads.parameters()
    )


def test_all_steps_together_cost_what_the_plan_says(digits):
    """Heads and refinement of a two-block ViT, every step counted; 40 images make two batches of 16
    an epoch.
    """
    shape, images = ViTShape(32, 8, 48, 2, 3, 192), digits["train"].take(40)
    smoke = mr.load_preset("smoke").refine
    config = replace(
        smoke,
        batch_size=16,
        queue_size=64,
        heads_epochs=2,
        refine_epochs=1.5,
        blocks=(1,),
        warmup_epochs=0.5,
    )
    encoder = released_encoder(ReleasedViT(shape))
    with FlopCounterMode(display=False) as counter:
        result = mr.refine(encoder, images, config, device="cpu")
    p = cost.make_plan(shape, config, len(images))
    assert result.history.groupby("stage")["step"].max().tolist() == [3, 2]
    assert counter.get_total_flops() == pytest.approx(p.heads_total + p.refine_total, rel=0.005)
    assert cost.gpu_hours(p.refine_total, tflops=1) == pytest.approx(p.refine_total / 0.4e12 / 3600)


@pytest.mark.parametrize("method", ["simmim", "mae"])
def test_pretraining_costs_what_the_plan_says(method, digits):
    sizes = mr.ViTConfig(dim=48, depth=2, num_heads=3)
    config = mr.PretrainConfig(
        method, mask_ratio=0.7, decoder_dim=32, decoder_heads=2, epochs=1.5, batch_size=16
    )
    with FlopCounterMode(display=False) as counter:
        result = mr.pretrain(mr.build_vit(sizes), digits["train"].take(40), config, device="cpu")
    assert len(result.history) == 3
    assert counter.get_total_flops() == pytest.approx(
        cost.pretrain_total(ViTShape(32, 8, 48, 2, 3, 192), config, 40), rel=1e-9
    )


WIDE = ViTShape(64, 16, 192, 3, 3, 768)  # wide enough for half precision on a CPU


@pytest.mark.parametrize(
    ("train", "frozen", "memory"),
    [
        (False, 0, Memory()),
        (True, 0, Memory()),
        (True, 2, Memory()),
        (True, 0, Memory(recompute=True)),
        (True, 0, Memory(micro_batch=4)),
    ],
)
def test_training_takes_the_memory_that_the_plan_says(train, frozen, memory, monkeypatch):
    """The second step, when gradients and moments exist; the plan may be cautious, not too low."""
    monkeypatch.setattr("mimrefiner.device.has_bfloat16", lambda _: True)  # some CPUs emulate it
    views = Views((Crop(64, (0.3, 1)),) * 2, Crop(32, (0.1, 0.3)), 2)
    changes = {
        "views": views,
        "hidden_dim": 256,
        "out_dim": 64,
        "predictor_dim": 256,
        "batch_size": 16,
        "queue_size": 512,
    }
    refiner, config = trainer(WIDE, train, **changes, frozen_blocks=frozen)
    average = AveragedModel(refiner.encoder, use_buffers=True) if train else None
    optimizer = torch.optim.AdamW([x for x in refiner.parameters() if x.requires_grad])
    with PeakBytes() as measured:
        measured.add(
            [
                *refiner.parameters(),
                *refiner.buffers(),
                *(average.state_dict(keep_vars=True).values() if train else ()),
            ]
        )
        for _ in range(2):
            optimizer.zero_grad()
            step(refiner, config, memory)
            optimizer.step()
    estimate = cost.training_bytes(WIDE, config, train_encoder=train, memory=memory)
    assert 1 < estimate / measured.peak < 1.35


@pytest.mark.parametrize("method", ["simmim", "mae"])
def test_pretraining_takes_the_memory_that_the_plan_says(method):
    config = mr.PretrainConfig(
        method, mask_ratio=0.6, decoder_dim=192, decoder_depth=2, batch_size=64
    )
    encoder = mr.build_vit(
        mr.ViTConfig(
            image_size=WIDE.image_size, patch_size=WIDE.patch_size, dim=192, depth=3, num_heads=3
        )
    )
    model = build_masked_model(encoder, config).train()
    optimizer = torch.optim.AdamW(model.parameters())
    with PeakBytes() as measured:
        measured.add([*model.parameters(), *model.buffers()])
        for _ in range(2):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(torch.randn(64, 3, 64, 64), random_mask(64, 16, config.mask_ratio))
            loss.backward()
            optimizer.step()
    assert 1 < cost.pretrain_bytes(WIDE, config) / measured.peak < 1.35


def test_probing_takes_the_memory_that_the_plan_says():
    encoder = released_encoder(ReleasedViT(WIDE))
    with PeakBytes() as measured, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        measured.add(encoder.state_dict(keep_vars=True).values())
        pooled_blocks(encoder, torch.randn(64, 3, 64, 64), range(3), ("cls", "mean"))
    assert (
        1
        < cost.make_plan(WIDE, mr.load_preset("natural").refine, 1000).probe_bytes / measured.peak
        < 1.35
    )


def test_activations_are_those_that_autograd_keeps():
    shape = ViTShape(64, 8, 64, 4, 2, 256)
    encoder = ReleasedViT(shape)

    def kept(batch):
        storages = {}

        def keep(x):
            storage = x.untyped_storage()
            storages[storage.data_ptr()] = storage  # held, so that no address is used twice
            return x

        images = torch.randn(batch, 3, 64, 64)
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
            torch.autocast("cpu", torch.bfloat16),
        ):
            encoder(images)
        return sum(storage.nbytes() for storage in storages.values())

    per_image = (kept(6) - kept(2)) / 4  # weights cancel
    assert cost.activation_bytes(shape, 64) == pytest.approx(per_image, rel=0.15)


def test_every_plain_model_of_the_table_has_a_plan():
    for row in CATALOGUE:
        if row.dim:
            shape = plan.shape_of(row.name)
            p = cost.make_plan(shape, plan.paper_recipe(shape), 1_281_167, gpus=8)
            assert (
                p.refine_bytes
                > max(p.heads_bytes, p.probe_bytes)
                >= min(p.heads_bytes, p.probe_bytes)
                > 4 * p.parameters
            )
    assert cost.parameters(plan.shape_of("mae_l16")) == pytest.approx(303e6, rel=0.01)
    assert cost.parameters(plan.shape_of("mae_h14")) == pytest.approx(630e6, rel=0.01)
    assert cost.parameters(plan.shape_of("maws_6.5b14")) == pytest.approx(6440e6, rel=0.01)


def test_the_table_of_costs_is_that_of_the_plan():
    text = (Path(__file__).parent.parent / "REPRODUCING.md").read_text()
    rows = re.findall(r"^\| ([\w, ]+) \| paper-\S+ \| (\d+) \| (\d+) \| (\d+) GiB \|$", text, re.M)
    assert len(rows) == 5
    for names, *numbers in rows:
        for name in names.split(", "):
            shape = plan.shape_of(name)
            p = cost.make_plan(shape, plan.paper_recipe(shape), 1_281_167, gpus=8)
            found = (
                cost.gpu_hours(p.heads_total),
                cost.gpu_hours(p.refine_total),
                p.refine_bytes / 2**30,
            )
            assert [round(x) for x in found] == [int(x) for x in numbers], name


def test_what_saves_memory_lowers_the_estimate():
    shape = plan.shape_of("mae_2b14")
    config = plan.paper_recipe(shape)

    def gib(gpus=8, train=True, config=config, **memory):
        return (
            cost.training_bytes(
                shape, config, train_encoder=train, gpus=gpus, memory=Memory(**memory)
            )
            / 2**30
        )

    assert gib() > gib(recompute=True) > gib(recompute=True, shard=True)
    assert gib() > gib(micro_batch=8) > gib(micro_batch=8, recompute=True)
    assert gib(config=replace(config, frozen_blocks=0)) > gib()
    assert gib(train=False) == gib(train=False, shard=True)
    # Weight, gradient, two moments, moving average in float32
    states = 20 * cost.parameters(shape) / 2**30
    unfrozen = replace(config, frozen_blocks=0)
    assert gib(config=unfrozen) - gib(config=unfrozen, shard=True) == pytest.approx(
        1.1 * (7 / 8 - 16 / 20 / 24) * states
    )


def test_training_that_will_not_fit_is_said_before_it_begins(digits, monkeypatch, caplog):
    """With a pretended card."""
    smoke, some = mr.load_preset("smoke"), digits["train"].take(64)
    refiner = MIMRefiner(mr.build_vit(smoke.encoder), smoke.refine)
    shape = ViTShape(32, 8, 32, 4, 2, 128)
    needed = cost.training_bytes(shape, smoke.refine, train_encoder=True)
    assert needed > cost.training_bytes(shape, smoke.refine, train_encoder=False)
    for card in (None, 1.01 * needed):
        monkeypatch.setattr(cost, "card_bytes", lambda device, card=card: card)
        cost.warn_of_refinement(refiner, Memory())
        assert caplog.text == ""
    monkeypatch.setattr(cost, "card_bytes", lambda device: 0.99 * needed)
    monkeypatch.setattr("mimrefiner.training.refine.train_heads", say_training)
    mr.refine(mr.build_vit(smoke.encoder), some, smoke.refine)
    first, second = caplog.messages[:2]
    assert first.startswith(
        "stage 3 (refinement) needs about 0.0 GiB by estimate, this GPU has 0.0"
    )
    assert "recompute activations (--recompute)" in first
    assert second == "training"
    caplog.clear()
    monkeypatch.setattr("mimrefiner.training.run.view_batches", say_training)
    monkeypatch.setattr(
        cost, "card_bytes", lambda device: 0.99 * cost.pretrain_bytes(shape, smoke.pretrain)
    )
    mr.pretrain(mr.build_vit(smoke.encoder), some, smoke.pretrain)
    first, second = caplog.messages[:2]
    assert first.startswith(
        "stage 1 (pre-training) needs about 0.0 GiB by estimate, this GPU has 0.0"
    )
    assert "share the model among them (--shard)" in first
    assert second == "training"


def say_training(*_, **__):
    logging.getLogger("mimrefiner").warning("training")
    return []


def test_command_line(capsys):
    assert main(["plan", "d2v2_refined_h14", "imagenet", "--gpus", "8"]) == 0
    out = capsys.readouterr().out
    assert "630.8 M parameters" in out
    assert "assuming 40 % of 312 TFLOP/s" in out
    assert (
        main(
            [
                "plan",
                "d2v2_refined_h14",
                "imagenet",
                "--gpus",
                "8",
                "--shard",
                "--recompute",
                "--micro-batch",
                "8",
            ]
        )
        == 0
    )
    less = capsys.readouterr().out
    assert "heads 74.8, refinement" in out
    assert main(["plan", "mae_tiny_64", "90000", "--preset", "natural"]) == 0
    hours = "pre-training 0.00074, heads 4.8e-05, refinement 0.00028: "
    assert f"{hours}90,000 images, 6 + 0.12 + 0.36 epochs" in capsys.readouterr().out
    assert float(less.split("refinement ")[2].split()[0]) < 0.5 * float(
        out.split("refinement ")[2].split()[0]
    )
    for arguments, message in (
        (["nosuch", "imagenet"], "no plan for 'nosuch'"),
        (["mae_l16", "imagenet", "--gpus", "0"], "expected gpus >= 1"),
        (
            ["mae_l16", "imagenet", "--gpus", "3"],
            "expected gpus >= 1 that divide the batch of 1024, got 3",
        ),
        (
            ["mae_l16", "1000"],
            "a batch of 1024 needs at least that many images, the data set has 1000",
        ),
        (["mae_l16", "imagenet", "--tflops", "nan"], "expected tflops > 0, got nan"),
        (["mae_h14", "100", "--preset", "tiny"], "which patch size 14 does not divide"),
    ):
        assert main(["plan", *arguments]) == 2
        assert message in capsys.readouterr().err
