from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

import mimrefiner as mr
from experiments import ablations
from mimrefiner.study import claims, published

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", ["tiny", "natural", "gpu"])
def test_every_variant_is_a_valid_recipe_that_differs(name):
    preset = mr.load_preset(name)
    chosen = ablations.ablations(preset)
    assert len({a.name for a in chosen}) == len(chosen)
    recipes = [ablations.changed(preset, a).refine for a in chosen]
    assert recipes[0] == preset.refine
    for ablation, recipe in zip(chosen[1:], recipes[1:], strict=True):
        recipe.resolve_blocks(preset.encoder.depth)
        changed = {f for f in ablation.change if getattr(recipe, f) != getattr(preset.refine, f)}
        assert changed == set(ablation.change), ablation.name


def test_rows_of_variants_share_their_starting_point(tmp_path, monkeypatch):
    monkeypatch.setenv("MIMREFINER_CACHE", str(tmp_path / "cache"))
    smoke = mr.load_preset("smoke")
    preset = replace(smoke, n_train=128, n_test=64, pretrain=replace(smoke.pretrain, epochs=1))
    groups = ("recipe", "pairing of views", "frozen blocks")
    few = [a for a in ablations.ablations(preset) if a.group in groups]
    monkeypatch.setattr(ablations, "ablations", lambda preset: few[:3])
    run = claims.Record("08_ablations", preset, (0, 1), tmp_path)
    ablations.measure_variants(preset, (0, 1), run, exploratory=True)
    rows = run.table()
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
