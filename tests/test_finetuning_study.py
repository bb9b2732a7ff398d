import pandas as pd
import pytest

import mimrefiner as mr
from experiments.finetuning import AFTER, BEFORE, RANDOM, Study, main, recipe_of
from mimrefiner.models.weights import save_encoder


def test_the_recipe_fits_few_images_and_many():
    """At least 400 steps and 30 epochs; batches of half of the images where there are few."""
    few, many = recipe_of(Study(), 14), recipe_of(Study(), 1000)
    assert (few.batch_size, few.epochs, few.warmup_epochs) == (7, 200, 20)
    assert (many.batch_size, many.epochs, many.warmup_epochs) == (64, 30, 3)
    assert not few.mixes and few.smoothing == 0.1 and few.layer_decay == 0.75


def test_the_study_runs_once_and_is_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = mr.ViTConfig(dim=16, depth=2, num_heads=2)
    for seed, name in enumerate(("before", "after")):
        save_encoder(mr.build_vit(config, seed=seed), f"{name}.safetensors")
    command = ["--before", "before.safetensors", "--after", "after.safetensors", "--out", "runs"]
    command += ["--data", "digits", "--shares", "0.02", "--rates", "1e-3,1e-2", "--seeds", "0,1"]
    command += ["--steps", "2", "--epochs", "1", "--rows", "rows.csv", "--figure", "figure"]
    main(command)
    rows = pd.read_csv("rows.csv")
    assert len(rows) == 3 * 2 and set(rows["model"]) == {BEFORE, AFTER, RANDOM}
    # Two rates choose with the first seed, and the better one is tested with both
    folders = [folder.name.rsplit("-", 1)[1] for folder in (tmp_path / "runs").iterdir()]
    assert sorted(folders) == ["test"] * 3 * 2 + ["val"] * 3 * 2
    for _, part in rows.groupby(["model", "share"]):
        assert part["base_lr"].nunique() == 1 and part["seed"].tolist() == [0, 1]
    assert rows["images"].str.fullmatch("2 %, drawn with seed [01]").all()
    assert rows["test"].between(0, 1).all() and BEFORE in capsys.readouterr().out
    assert pd.read_csv("figure.csv").equals(rows) and (tmp_path / "figure.pdf").is_file()
    monkeypatch.setattr("mimrefiner.training.finetune.TrainingRun", None)  # nothing is trained
    main(command)
    assert pd.read_csv("rows.csv").equals(rows)


def test_numbers_that_are_none_are_named():
    with pytest.raises(mr.InputError, match="expected numbers with commas between"):
        main(["--shares", "some"])
