"""What lessons say: sentences by verdict, looks after every block, forces and their animation."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import mimrefiner as mr
from mimrefiner.batch import parameters
from mimrefiner.probes.knn import knn_hits
from mimrefiner.study import claims, forces, lessons, looks, paper, store, tables
from mimrefiner.study.intervals import Difference, image_difference
from mimrefiner.study.presets import load_preset

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def found():
    """Two seeds of one small encoder."""
    train, val, test = (
        mr.load_dataset("digits", split=part).take(60) for part in ("train", "val", "test")
    )
    shape = mr.ViTConfig(dim=16, depth=3, num_heads=2)
    models = {("before", seed): mr.build_vit(shape, seed=seed) for seed in (0, 1)}
    return looks.look(models, train, test, val), train, test, models


def test_looks_are_the_hits_of_the_vote(found):
    look, train, test, models = found
    features = [mr.extract_features(models["before", 1], part) for part in (train, test)]
    hits = knn_hits(*features)
    assert look.accuracy("before", "mean")[1] == pytest.approx(100 * hits["mean"].float().mean(1))
    assert (look.last("before")[1] == hits["cls"][-1].numpy()).all()
    assert look.n_test == len(test) and 0 < look.raw_pixels < 1


def test_the_chosen_block_is_the_best_on_validation_images_counted_from_one(found):
    look, *_ = found
    for seed, block, right in zip((0, 1), look.chosen("before"), look.best("before"), strict=True):
        on_val = look.hits["before", seed, "val"]["cls"].float().mean(1)
        assert on_val[block - 1] == on_val.max()
        assert (right == look.hits["before", seed, "test"]["cls"][block - 1].numpy()).all()


def test_rows_of_looks_are_shares_by_block_and_go_into_the_results(found, tmp_path):
    look, *_ = found
    rows = look.rows("cls")
    assert rows.groupby("seed")["block"].max().tolist() == [2, 2]
    assert 100 * rows["value"].mean() == pytest.approx(look.accuracy("before").mean())
    run = claims.Record("00_a", load_preset("smoke"), (0, 1), tmp_path)
    look.add_to(run, dataset="digits")
    assert len(run.table()) == 2 * 2 * 3  # seeds, poolings, blocks


@pytest.mark.parametrize(
    ("seen", "opposite", "says"),
    [(True, False, "up"), (False, True, "down"), (False, False, "?"), (None, False, "?")],
)
def test_the_sentence_follows_the_verdict(seen, opposite, says):
    difference = Difference(0.1, 0.0, 0.2, (0.1,), "images", seen, opposite)
    assert lessons.by_verdict(difference, seen="up", not_seen="?", opposite="down") == says


def test_points_have_the_interval_that_decides():
    difference = image_difference([np.ones(50), np.zeros(50)], [np.zeros(50), np.zeros(50)])
    assert lessons.points(difference) == "+50.0 points (95 % interval +0.0 to +100.0)"


def test_a_table_is_html_that_wraps_and_text_of_a_page():
    frame = pd.DataFrame({"a long name of a column " * 3: [1.234, 2.0]}, index=["x<", "y"])
    shown = lessons.table(frame, "what & why")
    assert "x&lt;" in shown._repr_html_() and "what &amp; why" in shown._repr_html_()
    assert "1.2" in repr(shown)
    wide = lessons.table(pd.DataFrame(np.ones((2, 40))))
    assert max(map(len, repr(wide).splitlines())) <= 100


def test_finish_saves_figures_under_the_lessons_number_and_shows_the_claims(tmp_path, capsys):
    import matplotlib.pyplot as plt

    run = claims.Record("07_x", load_preset("smoke"), (0,), tmp_path)
    run.judge("it helps", image_difference([np.ones(9)], [np.zeros(9)]), n_test=9)
    data = pd.DataFrame({"a": [1]})
    run.finish({"umap": (plt.figure(), data)})
    plt.close("all")
    names = sorted(file.name for file in (tmp_path / "figures").iterdir())
    assert names == ["07_umap.csv", "07_umap.pdf", "07_umap.png"]
    assert "SEEN: it helps" in capsys.readouterr().out
    assert len(pd.read_csv(tmp_path / "claims" / "07_x.csv")) == 1
    read = tables.collected(tmp_path / "claims", claims.CLAIM_COLUMNS)
    assert read["verdict"].tolist() == ["seen"]


def test_a_notebook_folds_its_settings_and_a_script_does_not_show_them(tmp_path, capsys):
    names = {"preset": "smoke", "seeds": "0", "out": str(tmp_path)}
    parameters.start_run("00_x", names)
    assert len(capsys.readouterr().out.splitlines()) == 1
    parameters.start_run("00_x", names | {"In": []})
    assert "heads on  blocks 3, 4 (1 = first)" in capsys.readouterr().out


def test_encoders_have_the_names_of_figures_and_released_ones_no_control(monkeypatch):
    trained = {
        "before": "encoder",
        "same compute": "encoder",
        "refined": "ema_encoder",
    }

    class Result:
        encoder, ema_encoder = "encoder", "ema_encoder"

    monkeypatch.setattr(store, "TRAINED", dict.fromkeys(store.TRAINED, lambda preset: Result))
    found = store.encoders([(5, load_preset("smoke", 5))], list(trained))
    assert found == {(name, 5): encoder for name, encoder in trained.items()}
    released = store.encoders([(0, load_preset("paper-mae-l16"))], list(trained))
    assert list(released) == [("before", 0), ("refined", 0)]


def test_the_papers_gains_are_differences_of_its_table():
    gains = paper.gains(["k-NN", "1-shot"])
    values = paper.paper_values()
    of = values[(values["backbone"] == "L/16") & (values["protocol"] == "k-NN")]
    of = of[of["table_or_figure"].str.startswith("lowshot")].set_index("model")["value"]
    assert gains["difference"].iloc[0] == pytest.approx(of["MAE-Refined"] - of["MAE"])
    assert gains["source"].tolist() == ["paper: MAE L/16", "paper: D2V2 L/16"] * 2


def test_the_swap_turns_the_force_and_the_path_ends_nearer_to_the_neighbour():
    z, neighbour, p = forces.example()
    (own, loss), (swapped, _) = (forces.force(z, x, p) for x in (z, neighbour))
    assert loss == pytest.approx(mr.nna_loss(z, z, p, temperature=forces.TEMPERATURE).item())

    def turn(f):
        return float(p[0, 0] * f[0, 1] - p[0, 1] * f[0, 0])

    assert turn(own) > 0 > turn(swapped)
    way = forces.paths(z, neighbour, p, steps=40, rate=2.0)
    assert torch.allclose(way.norm(dim=-1), torch.ones(41, 6))
    assert way[-1, 0] @ neighbour[0] > way[-1, 0] @ z[0]


def test_the_animation_of_the_docs_is_what_its_script_draws():
    spec = importlib.util.spec_from_file_location("make_forces", ROOT / "docs" / "make_forces.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    with Image.open(ROOT / "docs" / "forces.gif") as picture:
        durations = 0
        for frame in range(picture.n_frames):
            picture.seek(frame)
            durations += picture.info["duration"]
    frames = script.STEPS + script.HOLD
    assert durations == pytest.approx(frames * 1000 / script.RATE, rel=0.05)
    assert (ROOT / "docs" / "forces.gif").stat().st_size < 2**20


def test_every_lesson_links_the_rule_of_verdicts():
    for file in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        text = "".join("".join(c["source"]) for c in json.loads(file.read_text())["cells"])
        assert "](../docs/verdicts.md)" in text, file.name
