import sys
from dataclasses import replace

import pandas as pd
import pytest
import torch

import mimrefiner as mr
from experiments import measure, natural
from mimrefiner.data import datasets
from mimrefiner.probes.protocols import KNN, LINEAR, WITHIN_KINDS, low_shot
from mimrefiner.study import published
from mimrefiner.study.claims import Record


def test_one_command_trains_measures_and_claims(tmp_path, monkeypatch):
    monkeypatch.setenv("MIMREFINER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(natural, "HERE", tmp_path)
    monkeypatch.setattr(published, "experiments_folder", lambda: tmp_path)
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
    of_mae = claims[claims["model"] == "MAE"].set_index(["claim", "dataset", "pool"])
    lifts = of_mae.loc[[("refinement lifts the last block", "digits", "mean")]]
    assert lifts["n_seeds"].item() == 2 and lifts["n_test"].item() == 140
    within = rows[rows["protocol"] == WITHIN_KINDS.name]
    assert set(within["dataset"]) == {"fruit64"} and set(within["pool"]) == {
        "cls",
        "mean",
        "pixels",
    }
    told_apart = ("refinement tells classes of one kind apart better", "fruit64", "cls")
    assert told_apart in of_mae.index and (told_apart[0], "digits", "cls") not in of_mae.index
    assert of_mae.loc[told_apart, "probe"] == WITHIN_KINDS.label
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
        hits = {}
        for data in ("photos", "fruit64"):
            hits |= {(data, pool, KNN.label): right(*cls) for pool in ("cls", "mean")}
            probes = [("cls", LINEAR), ("mean", LINEAR), *(("cls", low_shot(n)) for n in (1, 2, 5))]
            hits |= {(data, pool, probe.label): right(0.1, linear) for pool, probe in probes}
        hits |= {("fruit64", pool, WITHIN_KINDS.label): right(*cls) for pool in ("cls", "mean")}
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
        return measure.Measured(rows, hits, {key[:2]: best for key in hits})

    pixels = {(data, "pixels", KNN.label): right(0.3) for data in ("photos", "fruit64")}
    found = {
        ("raw pixels", 0): measure.Measured([], pixels, {}),
        ("random weights", 0): measured((0.2, 0.1), 0.2, 0),
        ("MAE", 0): measured((0.6, 0.4), 0.5, 0),
        ("MAE refined", 0): measured((0.6, 0.7), 0.7, 1),
        ("MAE refined", 1): measured((0.6, 0.7), 0.7, 1),
        ("MAE trained longer", 0): measured((0.8, 0.9), 0.9, 1),
    }
    record = Record("evidence", preset, (0,), tmp_path)
    natural.judge_claims(found, [recipe], record)
    assert len(record.claims) == 2 * (2 * 8 + 12) + 2 * 3  # blocks and probes; kinds of fruit
    made = {(c["claim"], c["model"], c["dataset"], c["pool"]): c for c in record.claims}
    verdicts = {key: claim["verdict"] for key, claim in made.items()}
    for pool in ("cls", "mean"):
        at = ("MAE", "photos", pool)
        assert verdicts["the best block for k-NN beats the last one", *at] == "seen"
        best = made["the refined last block beats the best block before", *at]
        assert (best["verdict"], best["against"]) == ("seen", "the best block before")
        longer = "refinement beats as much computation spent on masked pre-training"
        assert verdicts[longer, *at] == "opposite"
        kinds, at = "refinement tells classes of one kind apart better", ("MAE", "fruit64", pool)
        assert verdicts[kinds, *at] == "seen"
        assert verdicts[f"{kinds} than as much masked pre-training", *at] == "opposite"
        assert (kinds, "MAE", "photos", pool) not in verdicts
    for what in (
        "linear probe accuracy",
        "1-shot accuracy",
        "2-shot accuracy",
        "5-shot accuracy",
        "cluster accuracy",
    ):
        at = ("MAE", "photos", "cls")
        assert verdicts[f"refinement raises: {what} of the last block", *at] == "seen"
        more = f"refinement raises more than as much masked pre-training: {what} of the last block"
        assert verdicts[more, *at] == "opposite"
    of_mean = (
        "refinement raises: linear probe accuracy of the last block",
        "MAE",
        "photos",
        "mean",
    )
    assert of_mean in verdicts
    first = made["the best block for k-NN beats the last one", "MAE", "photos", "cls"]
    assert first["measured"].startswith("block 1 of 2, chosen on validation: +20.0 points")
    assert made[of_mean]["measured"].startswith("50.0 against 70.0 ± 0.0 %: +20.0 points")

    depths = [
        natural.Recipe(
            f"MAE, decoder of {d} blocks",
            replace(preset, pretrain=replace(preset.pretrain, decoder_depth=d)),
        )
        for d in (2, 8)
    ]
    for depth, last in zip(depths, (0.5, 0.6), strict=True):
        found[depth.name, 0] = found[f"{depth.name} refined", 0] = measured((0.6, last), 0.5, 0)
    natural.judge_claims(found, [recipe, *depths], record)
    lighter = "a lighter decoder makes the last blocks fall further"
    sweep = next(c for c in record.claims if (c["claim"], c["pool"]) == (lighter, "cls"))
    assert (sweep["verdict"], sweep["dataset"]) == ("seen", "photos")
    assert sweep["measured"].startswith(
        "best block minus last: 20.0 (1 block), 10.0 (2 blocks), 0.0 (8 blocks); +20.0 points"
    )


def test_a_best_block_that_is_the_last_one_is_said_and_not_compared_twice(tmp_path):
    recipe = natural.Recipe("MAE", replace(mr.load_preset("smoke"), dataset="parquet:photos"))
    blocks = torch.stack([torch.arange(100) < 10, torch.arange(100) < 50])
    of_model = measure.Measured([], {("photos", "cls", KNN.label): blocks}, {("photos", "cls"): 1})
    record = Record("evidence", recipe.preset, (0,), tmp_path)
    natural.judge_claims({("MAE", 0): of_model, ("MAE refined", 0): of_model}, [recipe], record, ())
    first, lifts = record.claims
    assert first["measured"].startswith("the block chosen on validation is the last one, 2: +0.0")
    assert lifts["claim"] == "refinement lifts the last block"


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
