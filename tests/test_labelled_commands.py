"""finetune, linear, low-shot and plan --recipe, end to end at smoke size on packaged images."""

import pandas as pd
import pytest

import mimrefiner as mr
from mimrefiner.__main__ import main
from mimrefiner.models.classifier import load_classifier
from mimrefiner.models.weights import save_encoder

FAST = ["--epochs", "1", "--batch-size", "16"]


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    monkeypatch.setenv("MIMREFINER_PROGRESS", "log")
    monkeypatch.chdir(tmp_path)
    save_encoder(mr.build_vit(mr.ViTConfig(dim=16, depth=4, num_heads=2)), "vit.safetensors")
    config = mr.ViTConfig(image_size=64, patch_size=16, dim=16, depth=4, num_heads=2)
    save_encoder(mr.build_vit(config), "vit64.safetensors")


def rows(folder):
    return pd.read_csv(f"{folder}/rows.csv")


@pytest.mark.parametrize(
    ("recipe", "labels", "drawn"),
    [
        ("in1k", ["--labels", "0.1"], "10 %, drawn with seed 0"),
        ("1p_h", ["--labels", "0.1"], "10 %, drawn with seed 0"),
        ("10p_2b14", ["--labels", "0.1"], "10 %, drawn with seed 0"),
        ("shots_d2v2_l16", ["--labels", "5"], "5 per class, drawn with seed 0"),
        ("inat18_shots", ["--labels", "2"], "2 per class, drawn with seed 0"),
    ],
)
def test_fine_tuning(recipe, labels, drawn, capsys):
    command = ["finetune", "vit64.safetensors", "fruit64", "--recipe", recipe, *labels, *FAST]
    assert main([*command, "--out", "run"]) == 0
    found = rows("run")
    assert found["setting"].tolist() == ["last epoch", "best on validation: epoch 1"]
    name = "in1k_l16" if recipe == "in1k" else recipe
    assert found["protocol"].unique().tolist() == [f"finetune_{name}_changed"]
    assert found["images"].unique().tolist() == [drawn]
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 and "last epoch" in printed[0] and f"({drawn})" in printed[0]
    assert load_classifier("run").head.classes == 14


def test_the_papers_number_is_asked_for_by_name():
    command = ["finetune", "vit.safetensors", "digits", "--labels", "2", *FAST]
    assert main([*command, "--best-on-test", "--pool", "mean", "--out", "run"]) == 0
    found = rows("run")
    assert found["setting"].tolist() == ["last epoch", "best on test, as in the paper: epoch 1"]
    assert found["pool"].unique().tolist() == ["mean"]
    assert main([*command, "--best-on-test", "--pool", "mean", "--out", "run", "--resume"]) == 0


def test_linear_probes(capsys):
    command = [
        "linear",
        "vit64.safetensors",
        "fruit64",
        "--recipe",
        "inat18",
        "--labels",
        "3",
        *FAST,
    ]
    assert main([*command, "--out", "run"]) == 0
    found = rows("run")
    assert found["pool"].tolist() == ["cls_last4", "cls+mean_last4", "chosen"]
    assert found["protocol"].unique().tolist() == ["linear_grid_inat18_changed"]
    assert len(pd.read_csv("run/probes.csv")) == 8
    assert "best on validation" in capsys.readouterr().out
    command = ["linear", "vit.safetensors", "digits", "--labels", "5", "--best-on-test", *FAST]
    assert main([*command, "--out", "paper"]) == 0
    assert rows("paper")["setting"].str.endswith("best on test, as in the paper").all()
    assert len(pd.read_csv("paper/probes.csv")) == 52


def test_low_shot(capsys):
    command = ["low-shot", "simmim_digits", "digits", "--labels", "1"]
    assert main([*command, "--out", "run"]) == 0
    found = rows("run")
    assert found["setting"].tolist() == [f"1 per class, drawn with seed {i}" for i in range(3)]
    assert found["protocol"].unique().tolist() == ["logistic"]
    assert found["n_train"].tolist() == [10] * 3 and found["value"].between(0.2, 1).all()
    mean = f"mean of 3 splits: {100 * found['value'].mean():.1f} %"
    assert capsys.readouterr().out.splitlines()[-1] == mean


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["finetune", "vit.safetensors", "digits", "--recipe", "x"], "unknown recipe 'x'"),
        (["finetune", "vit.safetensors", "digits", "--list", "a.txt"], "goes with --labels"),
        (
            ["finetune", "vit.safetensors", "digits", "--labels", "1", "--list", "a.txt"],
            "a.txt does not exist: expected a published list of image names",
        ),
        (
            ["finetune", "vit.safetensors", "digits", "--size", "30"],
            "image size 30 is not divisible by the patch size 8",
        ),
        (
            ["finetune", "vit.safetensors", "digits", "--labels", "1"],
            "a batch of 1024 needs at least that many images, the data set has 10",
        ),
        (["linear", "vit.safetensors", "digits", "--recipe", "x"], "unknown recipe 'x'"),
        (["low-shot", "vit.safetensors", "digits", "--labels", "900"], "fewer than 900 shots"),
        (["low-shot", "vit.safetensors", "digits", "--labels", "x"], "--labels must be numbers"),
        (
            ["low-shot", "vit.safetensors", "digits", "--labels", "1,2"],
            "--labels takes one number here, got '1,2'",
        ),
        (
            ["finetune", "vit.safetensors", "digits", "--labels", "1,2"],
            "--labels takes one number here, got '1,2'",
        ),
        (["finetune", "vit.safetensors", "digits", "--seed", "-1"], "--seed must be >= 0, got -1"),
        (["linear", "vit.safetensors", "digits", "--seed", "-1"], "--seed must be >= 0, got -1"),
        (
            ["low-shot", "vit.safetensors", "digits", "--labels", "1", "--seed", "-1"],
            "--seed must be >= 0, got -1",
        ),
        (
            ["linear", "vit.safetensors", "digits", "--epochs", "nan"],
            "expected finite epochs > 0 and batch_size >= 2, got nan",
        ),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(arguments, message, capsys, tmp_path):
    assert main([*arguments, "--out", "run"]) == 2
    error = capsys.readouterr().err.splitlines()
    assert message in error[-1] and error[-1].startswith("mimrefiner: error: ")
    left = [file.name for file in tmp_path.glob("run/**/*") if file.is_file()]
    assert left == []


def test_the_plan_foresees_fine_tuning(capsys):
    assert main(["plan", "mae_l16", "imagenet", "--recipe", "in1k", "--gpus", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("in1k_l16 ") and "1,281,167 images, 50 epochs" in lines[1]
