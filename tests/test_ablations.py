import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import mimrefiner as mr
from experiments import ablations
from mimrefiner.config import AUTO
from mimrefiner.files import cache_folder
from mimrefiner.study import claims, published, store

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", ["tiny", "natural", "gpu"])
def test_every_variant_is_a_valid_recipe_that_differs(name):
    preset = mr.load_preset(name)
    chosen = ablations.ablations(preset)
    assert len({a.name for a in chosen}) == len(chosen)
    recipes = [ablations.changed(preset, a).refine for a in chosen]
    assert recipes[0] == preset.refine
    for ablation, recipe in zip(chosen[1:], recipes[1:], strict=True):
        if recipe.blocks != AUTO:
            recipe.resolve_blocks(preset.encoder.depth)
        changed = {f for f in ablation.change if getattr(recipe, f) != getattr(preset.refine, f)}
        assert changed == set(ablation.change), ablation.name


@pytest.fixture
def short(tmp_path, monkeypatch):
    """A preset of a few steps, whose models lie in a cache of their own."""
    monkeypatch.setenv("MIMREFINER_CACHE", str(tmp_path / "cache"))
    smoke = mr.load_preset("smoke")
    return replace(smoke, n_train=128, n_test=64, pretrain=replace(smoke.pretrain, epochs=1))


def test_rows_and_hits_of_variants_share_their_starting_point(short, tmp_path, monkeypatch):
    groups = ("recipe", "pairing of views", "frozen blocks")
    few = [a for a in ablations.ablations(short) if a.group in groups][:3]
    monkeypatch.setattr(ablations, "ablations", lambda preset: few)
    run = claims.Record("08_ablations", short, (0, 1), tmp_path)
    to = ablations.Measurements(run, "ablations_smoke")
    ablations.measure_variants(short, (0, 1), to, exploratory=True)
    rows = pd.read_csv(tmp_path / "ablations_smoke.csv")
    models = rows.groupby("model")["seed"].unique().map(list).to_dict()
    core = {
        "before": [0, 1],
        "recipe: 2 heads, intended pairing, top-5": [0, 1],
        "pairing of views: published": [0, 1],
    }
    assert models == core | {few[2].name: [0]} and not few[2].core  # exploratory: one seed
    assert len(rows) == 7 * 2 * 4  # models, poolings, blocks
    assert rows.groupby(["model", "seed"])["weights_sha256"].nunique().eq(1).all()
    assert rows["weights_sha256"].nunique() == 7

    hits = pd.read_csv(tmp_path / "ablations_smoke_hits.csv", dtype={"hits": str})
    shares = hits.set_index(["model", "seed", "pool"])["hits"].map(lambda h: h.count("1") / len(h))
    last = rows[rows["block"] == 3].set_index(["model", "seed", "pool"])["value"]
    assert shares.to_dict() == pytest.approx(last.to_dict()) and len(shares) == 7 * 2


def test_gains_are_paired_by_image_where_hits_were_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(published, "experiments_folder", lambda: tmp_path)
    models = {"before": ["0011", "0111"], "recipe: r": ["0111", "1111"], "heads: 1": ["1110"]}
    of_model = [(m, s, text) for m, texts in models.items() for s, text in enumerate(texts)]
    hits = pd.DataFrame(of_model, columns=["model", "seed", "hits"]).assign(pool="cls")
    rows = hits.assign(value=hits["hits"].map(lambda h: h.count("1") / 4), n_test=4, block=3)
    first = rows.assign(value=0.0, block=0)
    pd.concat([first, rows]).to_csv(tmp_path / "ablations_a.csv", index=False)
    unpaired = published.ablation_gains("a")
    hits.to_csv(tmp_path / "ablations_a_hits.csv", index=False)
    paired = published.ablation_gains("a")
    assert list(paired) == list(unpaired) == ["before", "heads: 1"]
    assert paired["before"].by_seed == unpaired["before"].by_seed == pytest.approx((0.25, 0.25))
    assert paired["heads: 1"].by_seed == pytest.approx((0.0,)) and paired["heads: 1"].seen is None
    # Images 1 and 2 are gained by one seed of two each
    assert paired["before"].high - 0.25 == pytest.approx(
        1.96 * np.std([1, 1, 0, 0]) / 2 / 3**0.5, rel=1e-3
    )
    assert unpaired["before"].high > paired["before"].high


def test_controls_get_the_operations_of_what_they_replace(short):
    longer = replace(short.pretrain, epochs=4), replace(short.refine, heads_epochs=3)
    short = replace(short, n_train=256, pretrain=longer[0], refine=longer[1])
    first, recipe = store.pretrained(short), store.refined(short)
    ablations.without_stage_2(short)
    ablations.from_random_weights(short)
    ablations.on_own_views(short)
    kept = [json.loads(file.read_text()) for file in cache_folder().glob("trials/*/manifest.json")]
    spent = {entry["settings"]["trial"]: entry["facts"]["flops"] for entry in kept}
    assert spent["no stage 2"] == pytest.approx(recipe.flops, rel=0.1)  # 3 steps for 2.9
    assert spent["own view"] == pytest.approx(recipe.flops, rel=0.01)
    assert spent["refined"] == pytest.approx(first.flops + recipe.flops, rel=0.1)  # from random


def test_every_ingredient_of_the_lesson_is_an_ablation():
    names = {a.name for a in ablations.ablations(mr.load_preset("tiny"))}
    assert set(published.INGREDIENTS.values()) <= names


def test_random_blocks_follow_the_seed_and_hold_the_last():
    preset = mr.load_preset("tiny")
    drawn = [
        next(
            a.change["blocks"]
            for a in ablations.ablations(preset.with_seed(seed))
            if "random blocks" in a.variant
        )
        for seed in (0, 0, 1, 2)
    ]
    assert drawn[0] == drawn[1] and len(set(drawn)) == 3
    assert all(blocks[-1] == preset.encoder.depth - 1 and len(set(blocks)) == 4 for blocks in drawn)


def test_kept_rows_have_the_fixed_columns():
    rows = published.ablation_rows("tiny")
    if len(rows):
        assert tuple(rows.columns) == claims.ROW_COLUMNS
        names = {a.name for a in ablations.ablations(mr.load_preset("tiny"))} | {"before"}
        assert set(rows["model"]) <= names
    assert len(published.ablation_rows("no_such_preset")) == 0


def test_rows_of_the_ablations_and_the_figure_of_refinement_are_of_the_same_models():
    """Both are published for preset tiny: the recipe's last block must be the same in both, seed by
    seed.
    """
    rows = published.ablation_rows("tiny")
    rows = rows[(rows["block"] == rows["block"].max()) & (rows["pool"] == "cls")]
    figure = pd.read_csv(ROOT / "figures" / "03_before_after.csv")
    figure = figure[
        (figure["block"] == figure["block"].max()) & figure["pool"].str.startswith("cls")
    ]
    for name, label in (("before", "before"), ("recipe", "refined")):
        ours = rows[rows["model"].str.startswith(name)].set_index("seed")["value"]
        drawn = figure[figure["label"].isin([label, f"{label} (EMA)"])].set_index("seed")["value"]
        assert ours.sort_index().to_list() == pytest.approx(
            drawn.sort_index().to_list(), abs=1e-6
        ), name
