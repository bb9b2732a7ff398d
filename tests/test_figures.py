import matplotlib.colors as mcolors
import matplotlib.pyplot as plt
import pandas as pd
import pytest

from mimrefiner.probes.protocols import LINEAR, SPECTRUM
from mimrefiner.study import figures, paper
from mimrefiner.study.intervals import seed_difference


@pytest.fixture(autouse=True)
def _style():
    figures.use_style()
    yield
    plt.close("all")


def block_lines(seeds):
    rows = [
        {"label": label, "block": block, "seed": seed, "value": 0.1 * block + 0.01 * seed}
        for label in ("a", "b")
        for block in range(4)
        for seed in seeds
    ]
    return pd.DataFrame(rows)


def texts(axes):
    return {text.get_text(): text for text in axes.texts}


def test_blocks_are_labelled_from_one_and_values_are_percent():
    rows = block_lines((0, 1))
    figure = figures.plot_blocks(rows, title="t", settings="s", baselines={"raw pixels": 0.25})
    axes = figure.axes[0]
    line = next(line for line in axes.lines if line.get_label() == "a")
    assert line.get_xdata().tolist() == [1, 2, 3, 4]
    assert line.get_ydata().tolist() == pytest.approx([0.5, 10.5, 20.5, 30.5])
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "2", "3", "4"]
    pixels = next(line for line in axes.lines if line.get_label() == "raw pixels")
    assert pixels.get_ydata()[0] == 25
    assert set(texts(axes)) == {"a", "b", "raw pixels"}  # names at the ends, and no legend
    assert (figure.get_suptitle(), figure.get_supxlabel()) == ("t", "s")
    assert figure.legends == []


def test_every_seed_is_a_thin_line_and_the_mean_a_thick_one():
    def thin(seeds):
        axes = figures.plot_blocks(block_lines(seeds), title="t", mark_best=False).axes[0]
        return [line for line in axes.lines if line.get_linewidth() < 1]

    assert len(thin((0, 1))) == 4
    assert thin((0, 1))[1].get_ydata().tolist() == pytest.approx([1, 11, 21, 31])
    assert thin((0,)) == []


def test_names_at_the_ends_keep_apart_and_keep_their_order():
    rows = block_lines((0,))
    near = rows[rows["label"] == "b"].assign(value=lambda part: part["value"] + 0.001)
    rows = pd.concat([rows[rows["label"] == "a"], near])
    axes = figures.plot_blocks(rows, title="t").axes[0]
    low, high = axes.get_ylim()
    lower, upper = (texts(axes)[name].xy[1] for name in "ab")
    assert upper - lower > 0.07 * (high - low)


def test_a_meaning_has_one_colour_and_an_axis_that_does_not_begin_at_zero_is_marked():
    rows = block_lines((0,)).assign(value=lambda part: part["value"] + 0.5)
    rows["label"] = rows["label"].map({"a": "refined", "b": "another"})
    figure = figures.plot_block_panels({"x": rows, "y": rows}, title="t", baselines={})
    for axes in figure.axes:
        colours = {line.get_label(): line.get_color() for line in axes.lines}
        assert colours["refined"] == figures.COLOURS["refined"]
        assert colours["another"] not in figures.COLOURS.values()
        assert "_truncated" in colours
    whole = figures.plot_blocks(rows.assign(value=rows["value"] - 0.5), title="t").axes[0]
    assert "_truncated" not in {line.get_label() for line in whole.lines}


def test_a_label_looks_the_same_in_every_panel():
    rows = block_lines((0,))
    panels = {
        "first": rows,
        "second": rows[rows["label"] == "b"].assign(label="c"),
        "third": rows[rows["label"] == "b"],
    }
    figure = figures.plot_block_panels(panels, title="t", baselines={})
    colours = [
        {line.get_label(): line.get_color() for line in axes.lines if line.get_label() in "abc"}
        for axes in figure.axes
    ]
    assert colours[0]["b"] == colours[2]["b"]
    assert len({colours[0]["a"], colours[0]["b"], colours[1]["c"]}) == 3


def test_figures_are_saved_three_times_and_repeat(tmp_path):
    for name in ("a", "b"):
        figures.save_figure(
            figures.plot_blocks(block_lines((0,)), title="t"), tmp_path / name, block_lines((0,))
        )
    assert {p.name for p in tmp_path.iterdir()} == {
        f"{n}.{kind}" for n in "ab" for kind in ("pdf", "png", "csv")
    }
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_history_sets_stage_three_behind_stage_two():
    rows = [
        {"stage": s, "step": t, "block": b, "loss": float(t)}
        for s in (2, 3)
        for t in range(3)
        for b in (0, 1)
    ]
    figure = figures.plot_history(pd.DataFrame(rows), {"loss": "loss"}, title="t")
    assert figure.axes[0].lines[0].get_xdata().tolist() == [0, 1, 2, 3, 4, 5]
    assert [line.get_label() for line in figure.axes[0].lines[:2]] == ["block 1", "block 2"]
    assert figure.legends[0].get_title().get_text() == "head on (block 1 = first)"


def test_history_of_several_seeds_is_their_mean_smoothed_within_a_stage():
    rows = [
        {"seed": seed, "stage": s, "step": t, "block": 0, "loss": 10.0 * s + t + seed}
        for seed in (0, 2)
        for s in (2, 3)
        for t in range(3)
    ]
    axes = figures.plot_history(pd.DataFrame(rows), {"loss": "loss"}, title="t", window=3).axes[0]
    assert axes.lines[0].get_ydata().tolist() == pytest.approx([21.5, 22, 22.5, 31.5, 32, 32.5])
    assert axes.lines[1].get_ydata().tolist() == [21, 22, 23, 31, 32, 33]  # faint, as measured
    assert len(axes.collections) == 1


def test_the_timeline_draws_other_models_in_grey():
    line = pd.DataFrame({"date": ["2020/01", "2021/01"], "name": ["a", "b"], "value": [80.0, 80.2]})
    figure = figures.plot_timeline(line, title="t", others=line.assign(value=[79.9, 80.1]))
    assert figure.axes[0].lines[1].get_ydata().tolist() == [79.9, 80.1]
    # The second would meet the first
    assert [text.get_ha() for text in figure.axes[0].texts] == ["right", "left"]


def test_stacked_panels_share_the_axis_of_blocks():
    loss = pd.DataFrame({"label": "decoder", "block": [0, 1], "seed": 0, "value": [2.0, 1.0]})
    panels = {"loss (nats)": loss, "k-NN (%)": loss.assign(label="cls token", value=[10.0, 20.0])}
    upper, lower = figures.plot_stacked(panels, title="t").axes
    assert (upper.get_ylabel(), lower.get_ylabel()) == ("loss (nats)", "k-NN (%)")
    assert upper.lines[0].get_ydata().tolist() == pytest.approx([2, 1])
    assert lower.lines[0].get_ydata().tolist() == pytest.approx([10, 20])
    assert (upper.get_xlabel(), lower.get_xlabel()) == ("", "after block (1 = first)")


def test_ablations_show_recipe_minus_variant_for_every_seed_on_one_axis():
    gains = {
        "heads: 1": seed_difference([0.5, 0.6], [0.4, 0.45]),
        "queue: none": seed_difference([0.5, 0.6], [0.5, 0.6]),
        "heads: 2": seed_difference([0.5], [0.45]),
        "before": seed_difference([0.5], [0.3]),
    }
    (axes,) = figures.plot_ablations(gains, title="t").axes
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert [name.strip() for name in names] == [
        "heads",
        "1 (2 seeds)",
        "2 (1 seed)",
        "queue",
        "none (2 seeds)",
        "before",
        "not refined (1 seed)",
    ]
    dots, mean, exploratory, none, _, before = axes.lines[1:]
    assert dots.get_xdata().tolist() == pytest.approx([10, 15])
    assert mean.get_xdata() == pytest.approx([12.5])
    assert exploratory.get_xdata().tolist() == pytest.approx([5])
    assert exploratory.get_markerfacecolor() == "white" != dots.get_markerfacecolor()
    assert none.get_xdata().tolist() == [0, 0]
    assert before.get_xdata().tolist() == pytest.approx([20])


def test_arrows_go_from_before_to_refined():
    rows = pd.DataFrame(
        {"task": ["1-shot"], "before": [14.0], "refined": [58.0], "raw pixels": [30.0]}
    )
    figure = figures.plot_arrows({"paper": rows}, title="t", settings="s")
    (axes,) = figure.axes
    arrow = next(text for text in axes.texts if text.arrow_patch is not None)
    assert (arrow.xyann[1], arrow.xy[1]) == (14, 58)
    assert {"14", "58"} <= set(texts(axes))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "before",
        "refined",
        "raw pixels",
    ]


def test_a_forest_draws_intervals_hollow_where_they_include_zero():
    rows = pd.DataFrame(
        {
            "group": "g",
            "label": ["one", "one", "two"],
            "source": ["digits", "paper", "digits"],
            "difference": [2.0, 43.5, 1.0],
            "low": [1.0, None, -1.0],
            "high": [3.0, None, 3.0],
        }
    )
    (axes,) = figures.plot_forest(rows, title="t").axes
    names = [text.get_text().strip() for text in axes.get_yticklabels()]
    assert names == ["g", "one", "two"]
    sure, paper, unsure = axes.lines[1:]
    assert [line.get_xdata().tolist() for line in (sure, paper, unsure)] == [[2], [43.5], [1]]
    assert unsure.get_markerfacecolor() == "white" != sure.get_markerfacecolor()


def test_the_softmax_sums_to_one_and_names_the_positive():
    figure = figures.plot_softmax([0.6, 0.5, 0.0], [0.05, 1.0], title="t")
    for axes in figure.axes:
        assert sum(bar.get_height() for bar in axes.patches) == pytest.approx(1)
    first, second = (axes.patches[0].get_height() for axes in figure.axes)
    assert first == pytest.approx(0.881, abs=1e-3) and second < 0.5
    assert figure.axes[0].get_title() == "T = 0.05: positive 0.88"


def test_bars_have_the_colour_of_their_meaning():
    values = pd.Series({"before": 30.0, "64 colours": 43.7})
    (axes,) = figures.plot_bars({"colour": values}, title="t", ylabel="%").axes
    assert [bar.get_width() for bar in axes.patches] == [30, 43.7]
    assert mcolors.same_color(axes.patches[0].get_facecolor(), figures.COLOURS["before"])


def test_spider_scales_every_axis_on_its_own():
    rows = pd.DataFrame(
        {"axis": ["x", "x", "y", "y"], "group": ["a", "b"] * 2, "value": [1.0, 3.0, 90.0, 80.0]}
    )
    figure = figures.plot_spider(rows, title="t")
    assert figure.axes[0].lines[0].get_ydata().tolist() == [0.25, 1.0, 0.25]
    assert figure.axes[0].get_xticklabels()[0].get_text() == "x\n1.0 to 3.0 %"


def test_paper_figures_use_the_published_numbers():
    values = paper.paper_values()
    line = values[values["table_or_figure"] == "Figure 1 (timeline)"].assign(
        date="2024/02", name="m"
    )
    drawn = figures.plot_timeline(line, title="t").axes[0].lines[0].get_ydata()
    assert sorted(drawn) == sorted(line["value"])


def test_a_running_mean_is_drawn_over_the_values_and_does_not_cross_stages():
    rows = [
        {"stage": s, "step": t, "block": 0, "loss": float(10 * s + t % 2)}
        for s in (2, 3)
        for t in range(4)
    ]
    history = pd.concat([pd.DataFrame(rows[:4]), pd.DataFrame(rows[4:])])
    figure = figures.plot_history(history, {"loss": "loss"}, title="t", window=3)
    smooth, raw = figure.axes[0].lines[:2]
    assert raw.get_ydata().tolist() == [20, 21, 20, 21, 30, 31, 30, 31]
    assert smooth.get_ydata().tolist() == pytest.approx(
        [20.5, 61 / 3, 62 / 3, 20.5, 30.5, 91 / 3, 92 / 3, 30.5]
    )
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["block 1"]


def report_stats():
    lines = [
        (model, "linear", "accuracy", pool, block, 0.1 * block, 0.01)
        for model, pools in (("model", ("cls", "chosen")), ("random weights", ("cls",)))
        for pool in pools
        for block in range(3)
    ]
    lines += [("raw pixels", "linear", "accuracy", "pixels", 0, 0.5, 0.01)]
    lines += [("model", "spectrum", "effective_rank", "cls", block, 7.0, None) for block in (0, 1)]
    lines += [("raw pixels", "spectrum", "effective_rank", "pixels", 0, 90.4, None)]
    columns = ["model", "protocol", "metric", "pool", "block", "value", "spread"]
    return pd.DataFrame(lines, columns=columns).assign(n_test=60)


def test_the_report_titles_panels_by_protocol_and_rings_scores_only():
    shown = figures.plot_report(report_stats(), [LINEAR, SPECTRUM], title="t")
    linear, rank = shown.axes
    assert linear.get_title() == "linear probe"
    assert rank.get_title() == "effective rank (raw pixels: 90)"
    assert (linear.get_ylabel(), rank.get_ylabel()) == ("accuracy (%)", "effective rank")
    lines = {line.get_label(): line for line in linear.lines}
    assert lines["cls"].get_ydata().tolist() == pytest.approx([0, 10, 20])
    assert set(lines["raw pixels"].get_ydata()) == {50}
    rings = [line for line in linear.lines if line.get_markersize() == 8]
    assert [ring.get_xdata().tolist() for ring in rings] == [[3]]
    assert not [line for line in rank.lines if line.get_markersize() == 8]
    assert [text.get_text() for text in shown.legends[0].get_texts()] == [
        "cls",
        "pooling chosen on validation",
        "cls, random weights",
        "raw pixels",
    ]
