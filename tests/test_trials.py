import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import mimrefiner as mr
from experiments import cifar, collect, measure, trials
from mimrefiner.config import PretrainConfig, RefineConfig, ViTConfig
from mimrefiner.data.augment import small_views
from mimrefiner.models.weights import sha256_of
from mimrefiner.study.presets import Preset
from mimrefiner.training.checkpoints import Checkpoints, step_of

ENCODER = ViTConfig(dim=16, depth=4, num_heads=2)
REFINE = RefineConfig(
    small_views(32, 8, n_local=1),
    blocks=(1, 3),
    hidden_dim=16,
    out_dim=8,
    predictor_dim=16,
    queue_size=64,
    batch_size=8,
    heads_epochs=0.2,
    refine_epochs=1,
    warmup_epochs=0.2,
    frozen_blocks=1,
)
MASKED = PretrainConfig(method="simmim", mask_ratio=0.6, batch_size=32)
RATES = {"masked": (1e-4, 1e-3)}


@pytest.fixture
def small(monkeypatch):
    """Few images everywhere, and short probes."""
    monkeypatch.setattr(
        trials, "load_dataset", lambda name, split: mr.load_dataset(name, split=split).take(160)
    )
    monkeypatch.setattr(
        measure, "load_dataset", lambda name, split: mr.load_dataset(name, split=split).take(140)
    )
    for name, value in {
        "VAL": 60,
        "EPOCHS": 1,
        "STEPS": 4,
        "RATES": (0.1,),
        "TRANSFER": (),
    }.items():
        monkeypatch.setattr(measure, name, value)
    monkeypatch.setattr(trials, "MINUTES", 1000)
    monkeypatch.setattr(trials, "BANK", 80)
    monkeypatch.setattr(trials, "TRANSFER_BANK", 50)


@pytest.fixture
def study(small, tmp_path):
    preset = Preset("trials", "digits", None, None, ENCODER, MASKED, REFINE)
    encoder = mr.build_vit(ENCODER).half().float()
    return trials.Study(preset, encoder, tmp_path, trials.plainly, RATES)


def facts(out):
    """What the manifests of finished trainings say, by trial."""
    found = [json.loads(file.read_text()) for file in out.glob("runs/*/manifest.json")]
    return {x["settings"]["trial"]: x["facts"] for x in found}


def test_all_trials_take_refinements_computation_and_are_trained_once(study, monkeypatch):
    before = sha256_of(study.encoder)
    weights = {trial: sha256_of(study.train(trial)) for trial in trials.TRIALS}
    different = {sha for trial, sha in weights.items() if trial != "placed heads"}
    assert len({*different, before}) == len(trials.TRIALS)
    assert sha256_of(study.encoder) == before
    found = facts(study.out)
    assert found.keys() == set(trials.TRIALS)
    for trial, of_trial in found.items():
        assert of_trial["flops"] == pytest.approx(found["refined"]["flops"], rel=0.05), trial
        assert of_trial["weights_sha256"] == weights[trial]
    assert found["one head"]["trained_with"]["blocks"] == [3]
    assert found["placed heads"]["trained_with"]["blocks"] in ([2, 3], [3])  # from the peak on
    assert found["masked"]["trained_with"]["method"] == "simmim"
    assert not list((study.out / "runs" / "unfinished").glob("*"))

    monkeypatch.setattr(trials, "_train", None)  # all is kept
    assert {trial: sha256_of(study.train(trial)) for trial in trials.TRIALS} == weights
    with pytest.raises(TypeError):
        study.train("refined", seed=1)


def test_own_view_finds_itself_in_the_same_heads(study):
    dataset = mr.load_dataset("digits", split="train").take(40)
    config = replace(REFINE, heads_epochs=0.2, refine_epochs=0.2)
    results = [
        train(study.encoder, dataset, config, saving=None)
        for train in (trials.refine_on_own_views, mr.refine)
    ]
    own, neighbour = (result.history.query("step == 0 and stage == 2") for result in results)
    assert own["nn_similarity"].to_numpy() == pytest.approx(1)
    assert (neighbour["nn_similarity"] < 0.99).all()


def test_choices_are_made_once_on_validation_images(study, monkeypatch):
    study.choose_rate("masked")
    rows = pd.read_csv(study.out / "rows" / "choice.csv")
    assert len(rows) == 2 * 2 * 4  # rates, poolings, blocks
    assert rows["n_train"].unique() == [80] and set(rows["n_val"]) == {126}
    last = rows.query("pool == 'cls' and block == 3")
    best = json.loads(last.loc[last["value"].idxmax(), "settings"])
    assert study.chosen == {"masked": best}
    monkeypatch.setattr(trials.Study, "try_out", None)
    study.choose_rate("masked")
    with pytest.raises(TypeError):
        study.choose("refined", "frozen_blocks", (1, 2))


def test_results_are_rows_and_right_images(study, monkeypatch):
    study.trial("labels", 1, ["fruit64"])
    study.trial("pixels")
    rows = pd.read_csv(study.out / "rows" / "labels-1.csv")
    assert set(rows["dataset"]) == {"digits", "fruit64"} and set(rows["model"]) == {"labels"}
    knn = rows[rows["protocol"].str.startswith("knn")]
    sizes = knn.groupby("dataset")[["n_train", "n_test"]].first()
    assert sizes.loc["digits"].tolist() == [140, 140] and sizes.loc["fruit64", "n_train"] == 50
    hits = np.load(study.out / "rows" / "labels-1.npz")
    for data in ("digits", "fruit64"):
        value = knn.query("dataset == @data and pool == 'cls' and block == 3")["value"].item()
        assert hits[f"{data} cls k-NN"][3].mean() == pytest.approx(value)
    assert hits["digits cls 1-shot"].max() <= measure.DRAWS
    assert 0 <= hits["best digits cls"] < 4
    pixels = pd.read_csv(study.out / "rows" / "raw_pixels-0.csv")
    assert set(pixels["pool"]) == {"pixels"}

    monkeypatch.setattr(measure, "measure", None)  # what was measured is kept
    study.trial("labels", 1)
    assert set(pd.read_csv(study.out / "rows" / "labels-1.csv")["dataset"]) == {"digits"}


def test_a_study_is_collected_with_claims_and_trainings(study, tmp_path, monkeypatch):
    for trial in ("before", "pixels", "refined", "labels"):
        study.trial(trial)
    study.trial("refined", 1)
    monkeypatch.setattr(collect, "HERE", tmp_path / "here")
    collect.collect(study.out, "toy", "ViT")
    names = ("", "_claims", "_training", "_history")
    rows, claims, done, history = (
        pd.read_csv(tmp_path / "here" / f"evidence_toy{name}.csv") for name in names
    )
    assert set(rows["model"]) == {"before", "raw pixels", "refined", "labels"}
    assert set(zip(done["training"], done["seed"], strict=True)) == {
        ("refined", 0),
        ("refined", 1),
        ("labels", 0),
    }
    assert set(history["weights_sha256"]) == set(done["weights_sha256"])
    lifted = claims.query(
        "claim == 'refinement lifts the last block' and dataset == 'digits' and pool == 'cls'"
    )
    last = rows.query(
        "dataset == 'digits' and pool == 'cls' and block == 3 and protocol.str.startswith('knn')"
    )
    value = last.groupby("model")["value"].mean()
    difference = 100 * (value["refined"] - value["before"])
    assert lifted["difference"].item() == pytest.approx(difference, abs=0.05)
    assert not claims["claim"].str.contains("masked").any()  # it was not measured
    with pytest.raises(mr.InputError, match="has no before-0"):
        collect.collect(tmp_path / "empty", "toy", "ViT")


def test_an_mae_is_kept_on_its_way_and_continued(small, tmp_path, monkeypatch):
    config = PretrainConfig(
        method="mae", decoder_dim=16, decoder_heads=2, epochs=6, batch_size=20, base_lr=1e-2
    )
    for name, value in {
        "ENCODER": ENCODER,
        "MAE": config,
        "REFINE": REFINE,
        "KEPT": (1, 3),
    }.items():
        monkeypatch.setattr(cifar, name, value)
    monkeypatch.setattr(cifar, "load_dataset", trials.load_dataset)
    cifar.mae("digits", tmp_path)
    kept = [step_of(file) for file in Checkpoints(tmp_path / "mae" / "checkpoints").files()]
    assert kept == [8, 24, 40, 48]  # steps: eight an epoch
    starts = ("epoch01", "epoch03", "end")
    studies = {start: cifar.study("digits", tmp_path, start) for start in starts}
    assert len({sha256_of(study.model) for study in studies.values()}) == 3
    with pytest.raises(mr.InputError, match="holds no state 'epoch02': the command mae makes"):
        cifar.study("digits", tmp_path, "epoch02")
    brief = cifar.study("digits", tmp_path, "epoch03", brief=True)
    assert brief.preset.refine.refine_epochs == 0.5 and brief.out.name == "epoch03-brief"
    for trial in ("refined", "masked"):
        brief.train(trial)
    found = facts(brief.out)
    assert found["masked"]["flops"] == pytest.approx(found["refined"]["flops"], rel=0.05)
    monkeypatch.setattr(cifar, "pretrain", None)  # it is finished
    cifar.mae("digits", tmp_path)
