import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import mimrefiner as mr
from mimrefiner.probes.protocols import DECODER, KNN
from mimrefiner.study import claims, figures, intervals, paper, tables


@pytest.fixture
def run(tmp_path):
    return claims.Record("99_test", mr.load_preset("smoke"), (0, 1), tmp_path)


def test_rows_have_the_fixed_columns(run, vit):
    run.add_blocks({"before": (vit, torch.tensor([[True, False], [True, True]]))}, "cls", 0, 10, 2)
    table = run.table()
    assert tuple(table.columns) == claims.ROW_COLUMNS
    assert list(table["value"]) == [0.5, 1.0]
    assert list(table["block"]) == [0, 1]
    with pytest.raises(ValueError, match="expected the columns"):
        run.add(value=1)


def test_a_record_writes_rows_and_claims(run, vit, caplog):
    run.add_blocks({"before": (vit, torch.ones(1, 4, dtype=torch.bool))}, "cls", 0, 10, 4)
    assert run.claim("it works", seen=False, measured="x", n_test=4).startswith(
        "NOT SEEN: it works (x; 2 seeds, 4 test images)"
    )
    with caplog.at_level("INFO", logger="mimrefiner"):
        run.write()
    assert "1 rows, 1 claims and the figures are in" in caplog.text
    assert len(pd.read_csv(run.out / "results" / "99_test.csv")) == 1
    written = pd.read_csv(run.out / "claims" / "99_test.csv")
    assert tuple(written.columns) == claims.CLAIM_COLUMNS
    assert list(written["verdict"]) == ["not seen"]
    assert "| not seen |" in tables.markdown_table(claims.claims_table(written))


def test_rows_say_how_and_on_which_blocks_was_measured(run, vit):
    run.add_blocks({"model": (vit, {2: 0.5, 3: 0.25})}, "tokens", 0, 10, 4, protocol=DECODER)
    assert run.table()[["block", "value", "protocol", "metric", "unit"]].values.tolist() == [
        [2, 0.5, "decoder_per_block", "masked_mse", "mse"],
        [3, 0.25, "decoder_per_block", "masked_mse", "mse"],
    ]


def test_a_difference_decides_a_claim(run):
    difference = intervals.seed_difference([0.5, 0.6], [0.1, 0.2])
    assert run.judge("it helps", difference, n_test=4, text="last block ").startswith(
        "SEEN: it helps (last block +40.0 points"
    )
    assert run.claims[0]["n_seeds"] == 2


def test_a_claim_about_no_images(run):
    assert run.claim("it works", seen=None, measured="x", n_test=0) == "OPEN: it works (x)"


def test_a_claim_says_what_it_is_about(run):
    run.claim("it works", seen=True, measured="x", n_test=4)
    about = claims.About("MAE", "fruit64", "cls", KNN.label, "raw pixels")
    run.claim("it works", seen=True, measured="x", n_test=4, about=about)
    fields = ["model", "dataset", "pool", "probe", "against"]
    assert run.claims_table()[fields].values.tolist() == [
        ["", "digits", "", "", ""],
        ["MAE", "fruit64", "cls", "k-NN", "raw pixels"],
    ]


def test_claims_measured_elsewhere_keep_their_preset_and_say_what_they_are_about(run, tmp_path):
    preset = replace(mr.load_preset("natural"), dataset="photos")
    other = claims.Record("evidence", preset, (0, 1, 2), tmp_path)
    other.claim(
        "it works", seen=False, opposite=True, measured="x", n_test=9, about=claims.About("SimMIM")
    )
    other.write()
    (line,) = run.repeat(pd.read_csv(tmp_path / "claims" / "evidence.csv"))
    assert line == "OPPOSITE: it works (SimMIM, photos) (x; 3 seeds, 9 test images)"
    (claim,) = run.claims
    assert (claim["notebook"], claim["preset"], claim["model"]) == ("99_test", "natural", "SimMIM")


def test_a_long_table_is_printed_in_part_and_over_pages(tmp_path):
    tables.write_table(pd.DataFrame({"a": [1], "b": [2]}), tmp_path / "t", printed=["b"])
    assert list(pd.read_csv(tmp_path / "t.csv")) == ["a", "b"]
    latex = (tmp_path / "t.tex").read_text()
    assert "longtable" in latex
    assert "a &" not in latex


def test_counts_take_numpys_numbers():
    assert (
        tables.count(np.int64(1), "seed") == "1 seed"
        and tables.count(np.int64(3), "seed") == "3 seeds"
    )


def test_compare_never_copies_a_paper_value():
    values = paper.paper_values()
    assert len(values) == 402
    table = paper.compare(pd.DataFrame())
    assert len(table) == len(values)
    assert table["measured"].isna().all()
    assert (table["comparable"] == "").all()


def test_compare_joins_and_gives_reasons():
    values = paper.compare(pd.DataFrame())
    first, second = values["paper_id"].drop_duplicates()[:2]
    measured = pd.DataFrame({"paper_id": [first, first, second], "value": [10.0, 12.0, 5.0]})
    table = (
        paper.compare(measured, {second: "other data"})
        .drop_duplicates("paper_id")
        .set_index("paper_id")
    )
    assert table.loc[first, "measured"] == 11
    assert table.loc[first, "n_seeds"] == 2
    assert table.loc[first, "sd"] == pytest.approx(2**0.5)
    assert table.loc[first, "difference"] == pytest.approx(11 - table.loc[first, "value"])
    assert table.loc[first, "comparable"] == "yes"
    assert (table.loc[second, "comparable"], table.loc[second, "why_not"]) == ("no", "other data")


def test_environment_names_no_folder():
    text = json.dumps(tables.environment())
    assert "/" not in text.replace("CPU (", "")
    assert tables.environment()["versions"]["torch"]


def block_rows(seeds=(0, 1)):
    return pd.concat(
        [
            claims.block_rows({"a": torch.rand(4, 50) < 0.5, "b": torch.rand(4, 50) < 0.8}, seed)
            for seed in seeds
        ]
    )


def test_figures_are_saved_three_ways_and_the_same_twice(tmp_path):
    rows = block_rows()
    for name in ("one", "two"):
        figure = figures.plot_blocks(rows, title="t", baselines={"raw pixels": 0.5})
        figures.save_figure(figure, tmp_path / name, rows)
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "one.csv",
        "one.pdf",
        "one.png",
        "two.csv",
        "two.pdf",
        "two.png",
    ]
    for suffix in (".pdf", ".png", ".csv"):
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix}").read_bytes()
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "one.csv"), rows.reset_index(drop=True))


def test_figures_show_what_they_are_given():
    rows = block_rows()
    figure = figures.plot_block_panels(
        {"left": rows, "right": rows}, title="t", baselines={"left": {"raw pixels": 0.5}}
    )
    left, right = figure.axes
    means = rows[rows["label"] == "a"].groupby("block")["value"].mean() * 100
    assert np.allclose(left.lines[0].get_ydata(), means)
    assert list(left.lines[0].get_xdata()) == [1, 2, 3, 4]  # blocks are labelled from 1
    assert [text.get_text() for text in left.get_xticklabels()] == ["1", "2", "3", "4"]
    assert len(left.lines) == len(right.lines) + 1


def test_history_figure_has_a_panel_per_metric():
    history = pd.DataFrame(
        {"stage": [2, 2, 3, 3], "step": [0, 1, 0, 1], "block": [2, 2, 2, 2], "loss": [4.0, 3, 2, 1]}
    )
    figure = figures.plot_history(history, {"loss": "loss"}, title="t")
    assert list(figure.axes[0].lines[0].get_xdata()) == [0, 1, 2, 3]
