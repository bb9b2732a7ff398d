import sys
from dataclasses import replace

import pandas as pd
import pytest
import torch

import mimrefiner as mr
from experiments import measure, natural
from mimrefiner.data import datasets
from mimrefiner.study import claims, published


def test_one_command_trains_measures_and_claims(tmp_path, monkeypatch):
    monkeypatch.setenv("MIMREFINER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(natural, "HERE", tmp_path)
    monkeypatch.setattr(
        natural, "load_preset", lambda name: replace(mr.load_preset("smoke"), name=name)
    )
    monkeypatch.setattr(
        measure, "load_dataset", lambda name, split: mr.load_dataset(name, split=split).take(140)
    )
    for name, value in {"BANK": 120, "VAL": 60, "EPOCHS": 1, "STEPS": 4, "RATES": (0.1,)}.items():
        monkeypatch.setattr(measure, name, value)
    arguments = ["evidence", "--data", "digits", "--seeds", "0,1", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", arguments)
    natural.main()
    rows, claims = (
        pd.read_csv(tmp_path / f"evidence_natural{part}.csv") for part in ("", "_claims")
    )
    controls = {"MAE trained longer", "MAE fine-tuned with labels", "random weights", "raw pixels"}
    assert set(rows["model"]) == {"MAE", "MAE refined", "SimMIM", "SimMIM refined"} | controls
    assert rows[rows["model"] == "SimMIM"]["preset"].unique().tolist() == ["natural-simmim"]
    key = ["model", "dataset", "block", "pool", "protocol", "metric", "seed"]
    assert not rows.duplicated(key).any()
    # Both poolings
    assert (
        rows["protocol"].str.startswith("linear").sum()
        == rows["protocol"].str.startswith("knn").sum()
    )
    refined = rows[rows["model"] == "MAE refined"]
    assert (
        set(refined["seed"]) == {0, 1}
        and refined.groupby("seed")["weights_sha256"].nunique().eq(1).all()
    )
    assert refined["weights_sha256"].nunique() == 2
    assert set(rows["dataset"]) == {"digits", "fruit64"}
    lifts = claims[claims["claim"] == "refinement lifts the last block (MAE, digits, mean)"]
    assert lifts["n_seeds"].item() == 2 and lifts["n_test"].item() == 140
    within = rows[rows["protocol"] == measure.WITHIN_PROTOCOL]
    assert set(within["dataset"]) == {"fruit64"} and set(within["pool"]) == {
        "cls",
        "mean",
        "pixels",
    }
    assert "refinement tells classes of one kind apart better (MAE, fruit64, cls)" in set(
        claims["claim"]
    )
    trained, history, settings = (
        pd.read_csv(tmp_path / f"evidence_natural_{part}.csv")
        for part in ("training", "history", "settings")
    )
    key = ["model", "training", "seed"]
    assert (
        set(map(tuple, history[key].values))
        == set(map(tuple, trained[key].values))
        == set(map(tuple, settings[key].values))
    )
    assert set(history.dropna(subset="stage").groupby("model")["stage"].unique().map(tuple)) == {
        (1, 2, 3)
    }
    assert (
        history.query("model == 'SimMIM' and stage > 1")
        .groupby("seed")["block"]
        .unique()
        .map(list)
        .to_list()
        == [[2, 3]] * 2
    )
    assert (history["lr"] > 0).all()
    told = settings.set_index([*key, "setting"])["value"]
    assert told["SimMIM", "refinement", 1, "data"] == '"digits"'
    assert (
        told["SimMIM", "pre-training", 0, "method"] == '"simmim"'
        and told["MAE", "refinement", 1, "seed"] == "1"
    )
    pretrained, longer = (
        told["MAE", name, 0, "seed"] for name in ("pre-training", "longer pre-training")
    )
    assert (pretrained, longer) == ("0", "1000")
    assert set(trained["training"]) == {
        "pre-training",
        "refinement",
        "longer pre-training",
        "fine-tuning with labels",
    }
    assert set(trained["weights_sha256"]) <= set(rows["weights_sha256"])

    assert published.evidence()[0].equals(rows)
    monkeypatch.setattr(measure, "measure", None)  # all is kept: nothing is measured again
    before = rows.drop(columns="seconds")
    natural.main()
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "evidence_natural.csv").drop(columns="seconds"), before
    )
    monkeypatch.setattr(measure, "VAL", 50)  # another setting: nothing kept serves
    with pytest.raises(TypeError):
        natural.main()


def test_claims_compare_with_controls_and_name_the_block(tmp_path):
    preset = replace(mr.load_preset("smoke"), dataset="parquet:some/photos")
    recipe = natural.Recipe("MAE", preset, (0, 1))
    images = 400

    def right(*shares):  # the first images of every block
        return torch.stack([torch.arange(images) < share * images for share in shares])

    def measured(cls, linear, best):
        hits = {
            f"{data} {pool}": right(*cls)
            for data in ("photos", "fruit64")
            for pool in ("cls", "mean")
        }
        probes = [f"{pool} linear_10epochs" for pool in ("cls", "mean")] + [
            f"cls logistic_{n}shot" for n in (1, 2, 5)
        ]
        hits |= {
            f"{data} {probe}": right(0.1, linear)
            for data in ("photos", "fruit64")
            for probe in probes
        }
        hits |= {f"fruit64 {pool} within kinds": right(*cls) for pool in ("cls", "mean")}
        rows = [
            {
                "dataset": data,
                "protocol": "kmeans",
                "metric": "ACC",
                "pool": "cls",
                "block": len(cls) - 1,
                "value": linear,
            }
            for data in ("photos", "fruit64")
        ]
        return measure.Measured(rows, hits, dict.fromkeys(hits, best))

    pixels = measure.Measured(
        [], {f"{data} pixels": right(0.3) for data in ("photos", "fruit64")}, {}
    )
    found = {
        ("raw pixels", 0): pixels,
        ("random weights", 0): measured((0.2, 0.1), 0.2, 0),
        ("MAE", 0): measured((0.6, 0.4), 0.5, 0),
        ("MAE refined", 0): measured((0.6, 0.7), 0.7, 1),
        ("MAE refined", 1): measured((0.6, 0.7), 0.7, 1),
        ("MAE trained longer", 0): measured((0.8, 0.9), 0.9, 1),
    }
    run = claims.Record("evidence", preset, (0,), tmp_path)
    natural.claims(found, [recipe], run)
    verdicts = {c["claim"]: c["verdict"] for c in run.claims}
    for pool in ("cls", "mean"):
        assert (
            verdicts[f"the best block for k-NN beats the last one (MAE, photos, {pool})"] == "seen"
        )
        assert (
            verdicts[f"the refined last block beats the best block before (MAE, photos, {pool})"]
            == "seen"
        )
        longer = f"refinement beats as much computation spent on masked pre-training (MAE, photos, {pool})"
        assert verdicts[longer] == "opposite"
        kinds = "refinement tells classes of one kind apart better"
        assert verdicts[f"{kinds} (MAE, fruit64, {pool})"] == "seen"
        assert (
            verdicts[f"{kinds} than as much masked pre-training (MAE, fruit64, {pool})"]
            == "opposite"
        )
    for what in (
        "linear accuracy",
        "1-shot accuracy",
        "2-shot accuracy",
        "5-shot accuracy",
        "cluster accuracy",
    ):
        assert verdicts[f"refinement raises: {what} of the last block (MAE, photos, cls)"] == "seen"
        more = f"refinement raises more than as much masked pre-training: {what} of the last block (MAE, photos, cls)"
        assert verdicts[more] == "opposite"
    assert "refinement raises: linear accuracy of the last block (MAE, photos, mean)" in verdicts

    depths = [
        natural.Recipe(
            f"MAE, decoder of {d} blocks",
            replace(preset, pretrain=replace(preset.pretrain, decoder_depth=d)),
        )
        for d in (2, 8)
    ]
    for depth, last in zip(depths, (0.5, 0.6), strict=True):
        found[depth.name, 0] = found[f"{depth.name} refined", 0] = measured((0.6, last), 0.5, 0)
    natural.claims(found, [recipe, *depths], run)
    sweep = next(
        c
        for c in run.claims
        if c["claim"] == "a lighter decoder makes the last blocks fall further (photos, cls)"
    )
    assert sweep["verdict"] == "seen"
    assert sweep["measured"].startswith(
        "best block minus last: 20.0 (1 block), 10.0 (2 blocks), 0.0 (8 blocks); +20.0 points"
    )


def test_a_gpu_affords_decoder_depths_and_a_deeper_model():
    recipes = {
        r.name: r.preset for r in natural.recipes("natural-gpu", "parquet:somewhere", (0, 1, 2))
    }
    assert [r.pretrain.decoder_depth for r in recipes.values() if r.pretrain.method == "mae"] == [
        1,
        2,
        4,
        8,
        1,
    ]
    assert recipes["MAE, 24 blocks"].encoder.depth == 24
    assert datasets.short_name("parquet:some/where/tiny-imagenet") == "tiny-imagenet"


def test_the_learning_rate_is_chosen_on_validation_images(tmp_path, monkeypatch):
    monkeypatch.setenv("MIMREFINER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(natural, "HERE", tmp_path)
    monkeypatch.setattr(
        natural, "load_preset", lambda name: replace(mr.load_preset("smoke"), name=name)
    )
    splits, load = [], natural.load_dataset
    monkeypatch.setattr(
        natural, "load_dataset", lambda name, split: splits.append(split) or load(name, split=split)
    )
    monkeypatch.setattr(
        sys, "argv", ["evidence", "--data", "digits", "--choose", "--out", str(tmp_path / "out")]
    )
    natural.main()
    rows = pd.read_csv(tmp_path / "evidence_natural_choice.csv")
    assert splits == ["train", "val"]
    assert (
        sorted(rows["refine_base_lr"]) == [0.001, 0.002, 0.004]
        and rows["weights_sha256"].nunique() == 3
    )
    assert rows["value"].is_monotonic_decreasing
    assert not (tmp_path / "evidence_natural.csv").exists()
