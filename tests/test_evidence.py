import sys
from dataclasses import replace

import pandas as pd

import mimrefiner as mr
from mimrefiner import data, evidence


def test_one_command_trains_measures_and_claims(tmp_path, monkeypatch):
    monkeypatch.setenv("MIMREFINER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(evidence, "ASSETS", tmp_path)
    monkeypatch.setattr(evidence, "load_preset", lambda name: replace(mr.load_preset("smoke"), name=name))
    monkeypatch.setattr(evidence, "load_dataset", lambda name, split: mr.load_dataset(name, split=split).take(140))
    monkeypatch.setattr(evidence, "LINEAR", {"learning_rates": (0.1,), "epochs": 1})
    arguments = ["evidence", "--data", "digits", "--seeds", "0,1", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", arguments)
    evidence.main()
    rows, claims = (pd.read_csv(tmp_path / f"evidence_natural{part}.csv") for part in ("", "_claims"))
    trained = {"MAE", "MAE refined", "SimMIM", "SimMIM refined"}
    controls = {"MAE trained longer", "MAE fine-tuned with labels", "random weights", "raw pixels"}
    assert set(rows["model"]) == trained | controls
    assert set(pd.read_csv(tmp_path / "evidence_natural_training.csv")["stage"]) >= {"refinement", "fine-tuning with labels"}
    refined = rows[rows["model"] == "MAE refined"]
    assert set(refined["seed"]) == {0, 1} and refined.groupby("seed")["weights_sha256"].nunique().eq(1).all()
    assert refined["weights_sha256"].nunique() == 2
    assert set(rows["dataset"]) == {"digits", "fruit64"}
    lifts = claims[claims["claim"] == "refinement lifts the last block (MAE, digits)"]
    assert lifts["n_seeds"].item() == 2 and lifts["n_test"].item() == 140

    monkeypatch.setattr(evidence, "measure", None)  # all is kept: nothing is measured again
    before = rows.drop(columns="seconds")
    evidence.main()
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "evidence_natural.csv").drop(columns="seconds"), before)


def test_a_gpu_affords_decoder_depths_and_a_deeper_model():
    recipes = {r.name: r.preset for r in evidence.recipes("natural-gpu", "parquet:somewhere", (0, 1, 2))}
    assert [r.pretrain.decoder_depth for r in recipes.values() if r.pretrain.method == "mae"] == [1, 2, 4, 8, 1]
    assert recipes["MAE, 24 blocks"].encoder.depth == 24
    assert data.short_name("parquet:some/where/tiny-imagenet") == "tiny-imagenet"
