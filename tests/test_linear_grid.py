from dataclasses import fields, replace
from functools import partial

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mimrefiner as mr
from mimrefiner.data.augment import plain_views
from mimrefiner.data.views import Order, view_batches
from mimrefiner.probes import linear_grid as module
from mimrefiner.probes.checks import COLUMNS
from mimrefiner.probes.linear_grid import (
    IN1K,
    INAT18,
    INAT18_1SHOT,
    PATCHES,
    GridProbes,
    LinearRecipe,
    input_features,
    linear_grid,
    linear_grid_into,
)
from mimrefiner.training.checkpoints import Saving
from mimrefiner.training.run import TrainingRun

SMALL = replace(
    IN1K, epochs=3, batch_size=16, learning_rates=(0.02, 1.0), inputs=("cls", "cls+mean_last2")
)


@pytest.fixture
def sets(digits):
    return digits["train"].take(48), digits["val"].take(30), digits["test"].take(40)


def test_every_field_is_that_of_the_configuration():
    """52 probes on ImageNet-1K, 8 on iNaturalist; 13 rates from 1e-4 to 0.5."""
    rates = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
    expected = {
        "learning_rates": rates,
        "inputs": ("cls", "cls+mean", "cls_last4", "cls+mean_last4"),
        "epochs": 50,
        "batch_size": 1024,
        "momentum": 0.9,
        "warmup_share": 0.1,
        "min_lr": 1e-6,
        "crop_scale": (0.08, 1),
        "flip": True,
        "weight_std": 0.01,
        "squeeze": False,
        "seed": 0,
    }
    names = {field.name for field in fields(LinearRecipe)} - {"name", "source"}
    assert names == set(expected)
    small = {"learning_rates": (1e-3, 2e-3, 5e-3, 1e-2), "batch_size": 256}
    small["inputs"] = ("cls_last4", "cls+mean_last4")
    for recipe, change in (
        (IN1K, {}),
        (INAT18_1SHOT, {}),
        (PATCHES, {"inputs": ("mean", "mean_last4")}),
        (INAT18, small),
    ):
        assert {name: getattr(recipe, name) for name in names} == {**expected, **change}
    assert len({recipe.name for recipe in (IN1K, INAT18_1SHOT, PATCHES, INAT18)}) == 4


def test_the_last_block_is_normed_and_more_blocks_are_raw(vit):
    nn.init.normal_(vit.norm.weight)
    images = torch.randn(5, 3, 32, 32)
    inputs = ("cls", "mean", "cls+mean", "cls+mean_last2")
    found = input_features(vit, images, inputs)
    raw = vit.forward_intermediates(
        images, indices=[1, 2], norm=False, output_fmt="NLC", return_prefix_tokens=True
    )[1]
    final = vit.norm(torch.cat([raw[1][1], raw[1][0]], 1))
    cls, mean = final[:, 0], final[:, 1:].mean(1)
    both = [part for patches, prefix in raw for part in (prefix[:, 0], patches.mean(1))]
    expected = {
        "cls": cls,
        "mean": mean,
        "cls+mean": torch.cat([cls, mean], 1),
        "cls+mean_last2": torch.cat(both, 1),
    }
    for kind in inputs:
        assert torch.allclose(found[kind], expected[kind], atol=1e-5), kind
    assert not torch.allclose(found["cls"], both[2], atol=1e-2)


def test_a_probe_of_the_grid_is_trained_as_it_would_be_alone(vit, sets):
    """SGD of torch with batch norm, crops and the published schedule, one probe at a time."""
    train, val, test = sets
    result = linear_grid(vit, train, test, SMALL, val=val)
    classes, steps, warmup, low = 10, 9, 0, 1e-6  # 0.9 of a step is no warm-up
    for kind, width in (("cls", 32), ("cls+mean_last2", 128)):
        for rate in SMALL.learning_rates:
            norm, linear = nn.BatchNorm1d(width, affine=False), nn.Linear(width, classes)
            generator = torch.Generator().manual_seed(0)
            start = nn.init.trunc_normal_(
                torch.empty(1, width, 1, classes), std=0.01, generator=generator
            )
            linear.weight.data, linear.bias.data = start[0, :, 0].T.clone(), torch.zeros(classes)
            sgd = torch.optim.SGD(linear.parameters(), lr=1, momentum=0.9)
            peak = rate * 16 / 256
            images = view_batches(
                train,
                plain_views(32, (0.08, 1.0)),
                Order(16, steps, 0),
                mean=(0.5,) * 3,
                std=(0.5,) * 3,
            )
            for step, ((x,), _, y) in enumerate(images):
                cosine = (1 + torch.cos(torch.tensor(torch.pi * (step - warmup) / steps))) / 2
                sgd.param_groups[0]["lr"] = low + (peak - low) * cosine.item()
                with torch.no_grad():
                    features = input_features(vit, x, (kind,))[kind]
                sgd.zero_grad()
                F.cross_entropy(linear(norm(features)), y).backward()
                sgd.step()
            norm.eval()
            shown = torch.stack([module.preparation(vit, False)(image) for image, _ in test])
            with torch.no_grad():
                answers = linear(norm(input_features(vit, shown, (kind,))[kind])).argmax(1)
            right = (answers.numpy() == test.labels).mean()
            probes = result.probes.set_index(["epoch", "input", "learning_rate"])
            assert probes.loc[(3, kind, rate), "test"] == pytest.approx(right, abs=1e-6)
    assert result.probes["test"].nunique() > 2


def test_warm_up_ignores_the_floor_and_the_cosine_ends_at_it(vit):
    probes = GridProbes(vit.requires_grad_(False), 3, replace(SMALL, min_lr=0.5))
    x = {kind: torch.randn(8, width) for kind, width in (("cls", 32), ("cls+mean_last2", 128))}
    y, rates = torch.arange(8) % 3, torch.tensor([0.02, 1.0]) * 16 / 256
    moved = {}
    for rising in (True, False):
        before = probes.probes["cls"].weight.detach().clone()
        probes.step(x, y, 0.25, rising)
        step = (probes.probes["cls"].weight - before).detach()[0]  # (dim, rates, classes)
        moved[rising] = step / probes.probes["cls"].momentum[0][0]
    assert torch.allclose(-moved[True].nanmedian(0)[0].nanmedian(-1)[0], 0.25 * rates, rtol=1e-3)
    expected = 0.25 * rates + 0.75 * 0.5
    assert torch.allclose(-moved[False].nanmedian(0)[0].nanmedian(-1)[0], expected, rtol=1e-3)


def test_the_choice_is_made_on_validation_and_the_papers_says_what_it_is(vit, sets):
    train, val, test = sets
    result = linear_grid(vit, train, test, SMALL, val=val)
    assert list(result.rows) == [*COLUMNS, "images"]
    assert result.rows["pool"].tolist() == ["cls", "cls+mean_last2", "chosen"]
    assert result.rows["setting"].str.endswith("best on validation").all()
    best = result.probes.loc[result.probes["val"].idxmax()]
    chosen = result.rows.iloc[2]
    assert chosen["value"] == best["test"]
    assert chosen["setting"] == (
        f"{best['input']} lr={best['learning_rate']:g}, epoch {best['epoch']:g}, best on validation"
    )
    assert (chosen["protocol"], chosen["n_train"], chosen["n_test"]) == ("linear_grid", 48, 40)
    paper = linear_grid(vit, train, test, SMALL, best_on_test=True)
    assert paper.rows["setting"].str.endswith("best on test, as in the paper").all()
    assert paper.rows["value"].iloc[2] == paper.probes["test"].max()
    assert paper.probes["val"].isna().all()
    held = linear_grid(vit, train, test, SMALL)
    assert held.rows["n_train"].unique().tolist() == [43]  # a tenth is held out


class Killed(Exception):
    pass


def test_an_interrupted_search_goes_on_bit_for_bit(vit, sets, tmp_path, monkeypatch):
    train, val, test = sets
    whole = linear_grid(vit, train, test, SMALL, val=val)
    end_step = TrainingRun.end_step

    def killed(run, step, *given):
        end_step(run, step, *given)
        if step == 4:
            raise Killed

    monkeypatch.setattr(TrainingRun, "end_step", killed)
    with pytest.raises(Killed):
        linear_grid(vit, train, test, SMALL, val=val, saving=Saving(tmp_path, every=4))
    monkeypatch.undo()
    saving = Saving(tmp_path, every=4, resume=True)
    again = linear_grid(vit, train, test, SMALL, val=val, saving=saving)
    pd.testing.assert_frame_equal(again.probes, whole.probes)
    pd.testing.assert_frame_equal(again.rows, whole.rows)
    assert all(x.requires_grad for x in vit.parameters())
    size = max(file.stat().st_size for file in tmp_path.glob("*.pt"))
    assert size < 300_000  # probes, not the encoder


def test_a_folder_holds_the_rows_and_is_not_filled_twice(vit, sets, tmp_path):
    train, val, test = sets
    job = partial(linear_grid, vit, train, test, SMALL, val=val)
    linear_grid_into(tmp_path / "run", job)
    names = {file.name for file in (tmp_path / "run").iterdir()}
    assert names == {"rows.csv", "probes.csv", "settings.json"}
    assert len(pd.read_csv(tmp_path / "run" / "probes.csv")) == 3 * 4
    with pytest.raises(mr.InputError, match="holds a finished run"):
        linear_grid_into(tmp_path / "run", job)
    linear_grid_into(tmp_path / "run", job, resume=True)


def test_bad_input_is_one_clear_line(vit, sets):
    train, val, test = sets
    with pytest.raises(mr.InputError, match="reads the last 4 blocks, and the model has 3"):
        linear_grid(vit, train, test, IN1K)
    with pytest.raises(mr.InputError, match="needs test images, and there are none"):
        linear_grid(vit, train, test.subset([]), SMALL)
    with pytest.raises(mr.InputError, match="chooses on validation images: give val="):
        linear_grid(vit, [train[0]], test, SMALL)
    with pytest.raises(mr.InputError, match="unknown pooling 'max'"):
        replace(SMALL, inputs=("max",))
    with pytest.raises(mr.InputError, match="learning rates must be > 0, got"):
        replace(SMALL, learning_rates=())
    vit.cls_token = None
    with pytest.raises(mr.InputError, match="needs a cls token, which this model does not have"):
        linear_grid(vit, train, test, SMALL, val=val)
