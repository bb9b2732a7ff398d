"""One style, and figures of numbers: one function each.

Figures label blocks 1..depth; code and files count from 0.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.legend import Legend

from mimrefiner.files import atomic_file, write_csv
from mimrefiner.probes.protocols import PERCENT, SPECTRUM, Protocol
from mimrefiner.study.intervals import Difference
from mimrefiner.study.tables import count

COLUMN = 3.4  # inches: one column of a two-column paper
PAGE = 7.0  # both columns
# Okabe and Ito 2008
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# One colour per meaning, in every figure
COLOURS = {
    "before": "#4C72A0",
    "pre-trained": "#4C72A0",
    "refined": "#D55E00",
    "same compute": "#7B4EA3",
    "labels": "#009E73",
    "random weights": "#B4B4B4",
}
BASELINES = {  # lines that cost no training
    "raw pixels": {"color": "0.25", "linestyle": (0, (4, 2)), "linewidth": 1},
    "random weights": {"color": COLOURS["random weights"], "linestyle": "-", "linewidth": 1.4},
    "chance": {"color": "0.6", "linestyle": (0, (1, 2)), "linewidth": 1},
}
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def use_style() -> None:
    """Set fonts, sizes and colours for all figures that follow."""
    sns.set_theme(context="paper", style="ticks", palette=PALETTE)
    mpl.rcParams.update(
        {
            "figure.dpi": 120,
            "savefig.dpi": 300,
            "savefig.bbox": "tight",
            "savefig.facecolor": "white",
            "pdf.fonttype": 42,
            "lines.linewidth": 1.4,
            "lines.markersize": 3.5,
            "font.size": 8,
            "axes.titlesize": 9,
            "axes.labelsize": 8,
            "legend.fontsize": 7,
            "xtick.labelsize": 7,
            "ytick.labelsize": 7,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
        }
    )


def save_figure(figure: Figure, path: Path, data: pd.DataFrame) -> None:
    """Write ``path``.pdf and .png and, beside them, the data they were drawn from as .csv."""
    # Same data, same bytes
    for suffix, metadata in ((".pdf", {"CreationDate": None}), (".png", {"Software": None})):
        with atomic_file(path.with_suffix(suffix)) as temporary:
            figure.savefig(temporary, metadata=metadata)
    write_csv(data, path.with_suffix(".csv"))


def plot_blocks(
    rows: pd.DataFrame,
    *,
    title: str,
    settings: str = "",
    ylabel: str = "k-NN accuracy (%)",
    baselines: dict[str, float] | None = None,
    mark_best: bool = True,
) -> Figure:
    """Accuracy after every block, one line per label, whose name stands at its end.

    Where there are several seeds a line is their mean, and every seed a thin line behind it.

    Args:
        rows: columns label, block (0-based), seed, value (a share, 0..1). Labels of COLOURS have
            the colour of their meaning.
        title: over the axes: what was found.
        settings: below, small: data, number of images and the like.
        ylabel: names the y axis.
        baselines: horizontal lines by name, shares.
        mark_best: ring the best block of every line.
    """
    return plot_block_panels(
        {"": rows},
        title=title,
        settings=settings,
        ylabel=ylabel,
        baselines={"": baselines or {}},
        mark_best=mark_best,
    )


def plot_block_panels(
    panels: dict[str, pd.DataFrame],
    *,
    title: str,
    baselines: dict[str, dict[str, float]],
    settings: str = "",
    ylabel: str = "k-NN accuracy (%)",
    mark_best: bool = True,
) -> Figure:
    """:func:`plot_blocks` side by side: a panel per entry, with its own baselines.

    Two panels share one y axis. A label looks the same in all panels.
    """
    many = len(panels) > 1
    figure, all_axes = plt.subplots(
        1,
        len(panels),
        figsize=(PAGE if many else COLUMN * 1.45, 2.9),
        sharey=len(panels) == 2,
        layout="constrained",
        squeeze=False,
    )
    labels = list(pd.concat(panels.values())["label"].unique())
    ends = []
    for axes, (name, rows) in zip(all_axes[0], panels.items(), strict=True):
        ends.append(_draw_lines(axes, rows, mark_best, labels))
        ends[-1] |= _draw_baselines(axes, baselines.get(name, {}))
        _label_blocks(axes, rows["block"].max() + 1)
        axes.set_title(name)
    for axes, names in zip(all_axes[0], ends, strict=True):
        _name_ends(axes, names)
        _mark_truncated(axes)
    all_axes[0, 0].set_ylabel(ylabel)
    _headings(figure, title, settings)
    return figure


def plot_stacked(panels: dict[str, pd.DataFrame], *, title: str, settings: str = "") -> Figure:
    """Quantities per block under each other on one axis of blocks.

    Args:
        panels: label of the y axis -> columns label, block (0-based), seed, value as it is drawn.
        title, settings: see :func:`plot_blocks`.
    """
    figure, all_axes = plt.subplots(
        len(panels),
        1,
        figsize=(COLUMN * 1.45, 1.7 * len(panels) + 0.6),
        sharex=True,
        layout="constrained",
        squeeze=False,
    )
    labels = list(pd.concat(panels.values())["label"].unique())
    for axes, (name, rows) in zip(all_axes[:, 0], panels.items(), strict=True):
        ends = _draw_lines(axes, rows.assign(value=rows["value"] / 100), False, labels)
        _label_blocks(axes, rows["block"].max() + 1)
        axes.set(ylabel=name)
        _name_ends(axes, ends)
        _mark_truncated(axes)
    for axes in all_axes[:-1, 0]:
        axes.set_xlabel("")
    _headings(figure, title, settings)
    return figure


def plot_history(
    history: pd.DataFrame,
    metrics: dict[str, str],
    *,
    title: str,
    settings: str = "",
    by: str = "block",
    window: int = 1,
) -> Figure:
    """Training curves: one panel per metric, one line per head (or per value of ``by``).

    Args:
        history: what :func:`mimrefiner.refine` returns, columns stage, step, ``by`` and the
            metrics; where it holds both stages, stage 3 is to the right of the dotted line; where
            it holds several seeds, a line is their mean and the band ± one standard deviation.
        metrics: column -> label of its y axis, with its unit.
        title, settings: see :func:`plot_blocks`.
        by: the column that tells lines apart; blocks are 0-based in it and labelled from 1.
        window: steps of a running mean within a stage; the values themselves are drawn faint.
    """
    figure, all_axes = plt.subplots(1, len(metrics), figsize=(PAGE, 2.4), layout="constrained")
    both = history["stage"].nunique() > 1
    offset = history.loc[history["stage"] == 2, "step"].max() + 1 if both else 0
    named = not pd.api.types.is_numeric_dtype(history[by])
    values = list(history[by].unique()) if named else sorted(history[by].unique())
    colours = sns.color_palette(PALETTE if named else "viridis", len(values))
    for axes, (metric, label) in zip(np.atleast_1d(all_axes), metrics.items(), strict=True):
        for value, colour in zip(values, colours, strict=True):
            name = f"block {value + 1}" if by == "block" else f"{value}"
            steps = history[history[by] == value].groupby(["stage", "step"])[metric]
            _draw_steps(axes, steps.agg(["mean", "std"]), offset, window, (colour, name))
        if both:
            axes.axvline(offset, color="0.4", linestyle=":", linewidth=1)
        axes.set(xlabel="step", ylabel=textwrap.fill(label, 22))
    figure.suptitle(title, fontsize=9)
    legend = legend_below(figure, np.atleast_1d(all_axes)[0], columns=len(values))
    told = ["head on (block 1 = first)"] if by == "block" else []
    legend.set_title("; ".join([*told, settings] if settings else told), {"size": 7})
    return figure


def _draw_steps(
    axes, steps: pd.DataFrame, offset: float, window: int, look: tuple[tuple, str]
) -> None:
    """A training curve and its band.

    Args:
        steps: mean and std over seeds, indexed by stage and step.
        offset: where stage 3 begins.
        window: steps of the running mean.
        look: colour and label.
    """
    colour, name = look
    x = steps.index.get_level_values("step")
    x = x + offset * (steps.index.get_level_values("stage") == 3)
    smooth = steps.groupby("stage").transform(lambda y: y.rolling(window, 1, center=True).mean())
    mean, spread = smooth["mean"], smooth["std"]
    axes.plot(x, mean, color=colour, label=name, linewidth=1.1)
    if spread.notna().any():
        axes.fill_between(x, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
    if window > 1:
        axes.plot(x, steps["mean"], color=colour, linewidth=0.5, alpha=0.3)


def plot_ablations(gains: dict[str, Difference], *, title: str, settings: str = "") -> Figure:
    """What the recipe has more than every variant, on one axis with the groups as headings.

    A thin dot is a seed (hollow where there is one alone); a bar with a tick is the mean with its
    interval.

    Args:
        gains: by the variant's name, "group: variant", or "before" for the model before refinement.
        title, settings: see :func:`plot_blocks`.
    """
    groups = {}
    for name, gain in gains.items():
        group, _, variant = name.partition(": ")
        groups.setdefault(group, {})[variant or "not refined"] = gain
    figure, axes = plt.subplots(
        figsize=(PAGE, 0.19 * (len(gains) + len(groups)) + 1.1), layout="constrained"
    )
    axes.axvline(0, color="0.3", linestyle="--", linewidth=1, zorder=1)
    names, y = {}, 0.0
    for group, variants in groups.items():
        names[y] = group
        for variant, gain in variants.items():
            y += 1
            names[y] = f"    {variant} ({count(len(gain.by_seed), 'seed')})"
            _draw_gain(axes, y, gain)
        y += 1.3
    axes.set_yticks(list(names), list(names.values()))
    for tick, name in zip(axes.get_yticklabels(), names.values(), strict=True):
        tick.set(ha="left", fontweight="normal" if name.startswith(" ") else "bold")
    axes.tick_params(axis="y", pad=165, length=0)
    axes.set(
        ylim=(y - 0.6, -0.8), xlabel="recipe minus variant (points); right: the recipe is better"
    )
    axes.spines["left"].set_visible(False)
    _headings(figure, title, settings)
    return figure


def _draw_gain(axes, y: float, gain: Difference) -> None:
    """The dots of the seeds in row ``y``, and their mean and interval."""
    many, colour = len(gain.by_seed) > 1, COLOURS["refined"]
    dots = 100 * np.array(gain.by_seed), [y] * len(gain.by_seed)
    axes.plot(*dots, "o", color=colour, markerfacecolor=colour if many else "white", zorder=3)
    if many:
        axes.hlines(y, 100 * gain.low, 100 * gain.high, color="0.7", linewidth=2.5, zorder=2)
        axes.plot(100 * gain.mean, y, "|", color="black", markersize=9, zorder=4)


def plot_forest(
    rows: pd.DataFrame, *, title: str, settings: str = "", xlabel: str = "difference (points)"
) -> Figure:
    """Differences with their intervals under group headings, several sources a line.

    Args:
        rows: columns group, label, source, difference (points), low and high (missing where there
            is no interval). A line is a label within its group; sources have a colour each, and an
            interval that includes zero is drawn hollow.
        title, settings: see :func:`plot_blocks`.
        xlabel: names the axis.
    """
    lines = rows.drop_duplicates(["group", "label"])
    sources = list(rows["source"].unique())
    height = 0.2 * (len(lines) + 1.3 * lines["group"].nunique()) + 1.1
    figure, axes = plt.subplots(figsize=(PAGE, height), layout="constrained")
    axes.axvline(0, color="0.3", linestyle="--", linewidth=1, zorder=1)
    names, y = {}, 0.0
    for group, part in rows.groupby("group", sort=False):
        names[y] = group
        for label, points in part.groupby("label", sort=False):
            y += 1
            names[y] = f"    {label}"
            for i, row in enumerate(points.to_dict("records")):
                place = y + 0.18 * (i - (len(points) - 1) / 2)
                _draw_difference(axes, row, place, sources.index(row["source"]))
        y += 1.3
    axes.set_yticks(list(names), list(names.values()))
    for tick, name in zip(axes.get_yticklabels(), names.values(), strict=True):
        tick.set(fontweight="normal" if name.startswith(" ") else "bold")
    axes.set(ylim=(y - 0.6, -0.8), xlabel=xlabel)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    figure.suptitle(title, fontsize=9)
    legend_below(figure, axes, columns=len(sources)).set_title(settings, {"size": 7})
    return figure


def _draw_difference(axes, row: dict, y: float, i: int) -> None:
    """A difference and its interval in the colour of the ``i``-th source."""
    colour, marker = _look(i)
    sure = pd.notna(row["low"]) and (row["low"] > 0 or row["high"] < 0)
    if pd.notna(row["low"]):
        axes.hlines(y, row["low"], row["high"], color=colour, linewidth=1, alpha=0.6)
    face = colour if sure or pd.isna(row["low"]) else "white"
    style = {"markerfacecolor": face, "markersize": 4, "label": row["source"]}
    axes.plot(row["difference"], y, marker, color=colour, **style)


def plot_timeline(rows: pd.DataFrame, *, title: str, others: pd.DataFrame | None = None) -> Figure:
    """Accuracy over time (the paper's Figure 1).

    Args:
        rows: columns date ("YYYY/MM"), name, value (percent).
        title: over the axes.
        others: rows like these, drawn in grey and without names.
    """
    figure, axes = plt.subplots(figsize=(PAGE, 2.8), layout="constrained")
    rows = rows.sort_values("date")
    dates = pd.to_datetime(rows["date"], format="%Y/%m")
    axes.plot(
        dates, rows["value"], color=PALETTE[0], marker="o", drawstyle="steps-post", label="record"
    )
    before = -np.inf
    for date, name, value in zip(dates, rows["name"], rows["value"], strict=True):
        below = value - before < 0.5  # little above the last one: its name would meet that one's
        place = {"xytext": (4, -10), "ha": "left"} if below else {"xytext": (-3, 5), "ha": "right"}
        axes.annotate(
            f"{name} {value:.1f}", (date, value), **place, textcoords="offset points", fontsize=7
        )
        before = value
    if others is not None:
        axes.plot(
            pd.to_datetime(others["date"], format="%Y/%m"),
            others["value"],
            "o",
            color="0.6",
            label="other refined models",
        )
        legend_below(figure, axes)
    axes.set(xlabel="published", ylabel="ImageNet linear probe (%)", title=title)
    axes.set_ylim(rows["value"].min() - 0.6, rows["value"].max() + 0.7)
    axes.set_xlim(dates.min() - pd.Timedelta(days=360), dates.max() + pd.Timedelta(days=120))
    return figure


def plot_spider(rows: pd.DataFrame, *, title: str) -> Figure:
    """Groups of models on many benchmarks (the paper's Figure 2).

    Every axis is scaled on its own, from its lowest to its highest value.

    Args:
        rows: columns axis, group, value (percent).
        title: over the figure.
    """
    table = rows.pivot(index="axis", columns="group", values="value")
    low, high = table.min(axis=1), table.max(axis=1)
    radius = 0.25 + 0.75 * table.sub(low, axis=0).div(high - low, axis=0)
    angles = np.linspace(0, 2 * np.pi, len(table), endpoint=False)
    figure, axes = plt.subplots(
        figsize=(PAGE, PAGE * 0.7), subplot_kw={"projection": "polar"}, layout="constrained"
    )
    for i, group in enumerate(radius):
        closed = np.append(radius[group], radius[group].iloc[0])
        colour = {"MIM-Refiner": COLOURS["refined"], "MIM": COLOURS["before"]}.get(group, "0.45")
        closed = np.append(angles, angles[0]), closed
        axes.plot(*closed, color=colour, marker=MARKERS[i], label=group)
        axes.fill(angles, radius[group], color=colour, alpha=0.08)
    names = [f"{name}\n{low[name]:.1f} to {high[name]:.1f} %" for name in table.index]
    axes.set_xticks(angles, names, fontsize=6.5)
    # Labels grow away from the circle
    for tick, angle in zip(axes.get_xticklabels(), angles, strict=True):
        across = np.cos(angle)
        tick.set_horizontalalignment(
            "center" if abs(across) < 0.1 else "left" if across > 0 else "right"
        )
    axes.set(yticks=[], ylim=(0, 1.05))
    axes.tick_params(pad=4)
    axes.set_title(title, pad=18)
    legend_below(figure, axes, columns=radius.shape[1])
    return figure


def plot_report(stats: pd.DataFrame, protocols: Sequence[Protocol], *, title: str) -> Figure:
    """The block report: one panel per protocol and metric, one line per pooling with its spread.

    A ring marks the best block. The effective rank is no score: it has none, and the raw pixels'
    value, far outside, stands in its title. Random weights are the thin dashed line of the same
    colour, raw pixels the dotted grey one; crosses are the poolings that validation chose.

    Args:
        stats: the table of :func:`mimrefiner.study.report.summary`.
        protocols: those that ``stats`` names.
        title: over the figure.
    """
    titles = {protocol.name: protocol.title for protocol in protocols}
    panels = list(stats.groupby(["protocol", "metric"], sort=False))
    columns = min(3, len(panels))
    rows, width = -(-len(panels) // columns), PAGE if columns > 1 else COLUMN
    figure, all_axes = plt.subplots(
        rows, columns, figsize=(width, 2.3 * rows + 0.7), layout="constrained", squeeze=False
    )
    for axes in all_axes.flat[len(panels) :]:
        axes.remove()
    pools = stats.loc[stats["model"] == "model", "pool"].unique()
    looks = {pool: _look(i) for i, pool in enumerate(pool for pool in pools if pool != "chosen")}
    for axes, ((protocol, metric), part) in zip(all_axes.flat, panels, strict=False):
        score = metric not in SPECTRUM.metrics
        scale, unit = (100, " (%)") if metric in PERCENT else (1, "")
        part = part.assign(value=scale * part["value"], spread=scale * part["spread"])
        for _, line in part.groupby(["model", "pool"], sort=False):
            _draw_report_line(axes, line, looks, score)
        _label_blocks(axes, int(part["block"].max()) + 1)
        axes.set_ylabel(f"{metric.replace('_', ' ')}{unit}")
        pixels = part.loc[part["model"] == "raw pixels", "value"]
        outside = "" if score or pixels.empty else f" (raw pixels: {pixels.max():.0f})"
        axes.set_title(titles[protocol] + outside, fontsize=8)
    figure.suptitle(f"{title}, {stats['n_test'].iloc[0]:,} test images", fontsize=9)
    legend = legend_below(figure, *figure.axes, columns=3 if columns > 1 else 2)
    legend.set_title("ring: best block; band: ± sd over draws, or standard error", {"size": 7})
    return figure


def _draw_report_line(
    axes, line: pd.DataFrame, looks: dict[str, tuple[str, str]], score: bool
) -> None:
    """The line of one model and pooling, in the style that tells models apart."""
    model, pool = line["model"].iloc[0], line["pool"].iloc[0]
    x, y = line["block"].to_numpy() + 1, line["value"].to_numpy()
    if model == "raw pixels":
        if score:
            axes.axhline(y.max(), color="0.45", linewidth=1, linestyle=":", zorder=2.5, label=model)
    elif pool == "chosen":
        if model == "model":
            style = {"color": "black", "markersize": 4, "markeredgewidth": 0.8, "zorder": 5}
            axes.plot(x, y, "x", label="pooling chosen on validation", **style)
    elif model == "random weights":
        style = {"color": looks[pool][0], "linewidth": 0.9, "linestyle": "--", "zorder": 2.5}
        axes.plot(x, y, label=f"{pool}, {model}", **style)
    else:
        _draw_line(axes, x, y, line["spread"].to_numpy(), looks[pool], pool)
        if score:
            _ring_best(axes, x, y, looks[pool][0])


def plot_arrows(
    groups: dict[str, pd.DataFrame], *, title: str, settings: str = "", unit: str = "accuracy (%)"
) -> Figure:
    """From before to refined, an arrow per task; a panel per entry, on one axis.

    Args:
        groups: panel title -> columns task, before, refined (percent), and any of random weights
            and raw pixels, which are drawn as marks; a missing value is left out.
        title, settings: see :func:`plot_blocks`.
        unit: names the y axis.
    """
    figure, all_axes = plt.subplots(
        1,
        len(groups),
        figsize=(PAGE, 2.8),
        sharey=True,
        layout="constrained",
        squeeze=False,
        gridspec_kw={"width_ratios": [len(rows) for rows in groups.values()]},
    )
    for axes, (name, rows) in zip(all_axes[0], groups.items(), strict=True):
        for x, row in enumerate(rows.to_dict("records")):
            _draw_arrow(axes, x, row["before"], row["refined"])
            for label in ("random weights", "raw pixels"):
                if pd.notna(row.get(label)):
                    axes.hlines(row[label], x - 0.25, x + 0.25, **BASELINES[label], label=label)
        axes.set_xticks(range(len(rows)), rows["task"].str.replace(" ", "\n"))
        axes.set(xlim=(-0.6, len(rows) - 0.4), ylim=(0, 100))
        axes.grid(axis="y", color="0.92", linewidth=0.6)
        axes.set_title(name)
    all_axes[0, 0].set_ylabel(unit)
    figure.suptitle(title, fontsize=9)
    legend_below(figure, *all_axes[0], columns=4).set_title(settings, {"size": 7})
    return figure


def _draw_arrow(axes, x: float, before: float, refined: float) -> None:
    style = {"arrowstyle": "-|>", "color": COLOURS["refined"], "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (x, refined), (x, before), arrowprops=style)
    axes.plot(x, before, "o", color=COLOURS["before"], label="before", zorder=3)
    axes.plot(x, refined, "o", color=COLOURS["refined"], label="refined", zorder=3)
    up = refined >= before
    for value, above in ((before, not up), (refined, up)):
        axes.annotate(
            f"{value:.0f}",
            (x, value),
            xytext=(4, 2 if above else -2),  # beside the arrow: marks lie above and below
            textcoords="offset points",
            ha="left",
            va="center",
            fontsize=7,
        )


def plot_bars(groups: dict[str, pd.Series], *, title: str, ylabel: str, settings="") -> Figure:
    """Values by label, a panel per entry on one axis; labels of COLOURS have their colour.

    Args:
        groups: panel title -> label -> value, as it is drawn.
        title, settings: see :func:`plot_blocks`.
        ylabel: names the y axis.
    """
    figure, all_axes = plt.subplots(
        1,
        len(groups),
        figsize=(PAGE, 2.4),
        sharex=True,
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for axes, (name, values) in zip(all_axes[0], groups.items(), strict=True):
        colours = [COLOURS.get(label, "0.35") for label in values.index]
        bars = axes.barh(range(len(values)), values, color=colours, height=0.7)
        axes.bar_label(bars, fmt="%.1f", fontsize=7, padding=2)
        axes.set_yticks(range(len(values)), values.index)
        axes.margins(x=0.12)
        axes.set_title(name)
        axes.set_xlabel(ylabel)
    all_axes[0, 0].invert_yaxis()
    _headings(figure, title, settings)
    return figure


def plot_softmax(
    cosines: Sequence[float], temperatures: Sequence[float], *, title: str, settings: str = ""
) -> Figure:
    """What a softmax at several temperatures makes of the same cosines, a panel for each.

    Args:
        cosines: that of the positive first, then those of the negatives.
        temperatures: one panel each.
        title, settings: see :func:`plot_blocks`.
    """
    figure, all_axes = plt.subplots(
        1, len(temperatures), figsize=(PAGE, 2.2), sharey=True, layout="constrained"
    )
    colours = [COLOURS["refined"], *["0.7"] * (len(cosines) - 1)]
    for axes, temperature in zip(all_axes, temperatures, strict=True):
        weights = np.exp(np.array(cosines) / temperature)
        weights = weights / weights.sum()
        axes.bar(range(len(cosines)), weights, color=colours)
        axes.set_title(f"T = {temperature:g}: positive {weights[0]:.2f}")
        axes.set_xticks(range(len(cosines)), [f"{c:.2g}" for c in cosines], rotation=90)
        axes.set_xlabel("cosine (first: positive)")
    all_axes[0].set_ylabel("share of the softmax")
    _headings(figure, title, settings)
    return figure


def _draw_lines(
    axes, rows: pd.DataFrame, mark_best: bool, labels: Sequence[str]
) -> dict[str, tuple[float, str]]:
    """A line per label; ``labels`` are those of all axes, so that each keeps its look.

    Returns:
        label -> (where the line ends, its colour).
    """
    ends, others = {}, [label for label in labels if label not in COLOURS]
    for label, line in rows.groupby("label", sort=False):
        mean = 100 * line.groupby("block")["value"].mean()
        x = mean.index.to_numpy() + 1
        look = COLOURS.get(label), "o"
        if label in others:
            look = _look(others.index(label))
        axes.plot(x, mean, color=look[0], marker=look[1], label=label, zorder=3)
        if line["seed"].nunique() > 1:
            for _, one in line.groupby("seed"):
                y = 100 * one.groupby("block")["value"].mean()
                axes.plot(x, y, color=look[0], linewidth=0.6, alpha=0.55, zorder=2)
        if mark_best:
            _ring_best(axes, x, mean.to_numpy(), look[0])
        ends[label] = float(mean.iloc[-1]), look[0]
    return ends


def _name_ends(axes, ends: dict[str, tuple[float, str]]) -> None:
    """Write every label at the end of its line, as far apart as they need to be read."""
    low, high = axes.get_ylim()
    gap = 0.075 * (high - low)
    order = sorted(ends, key=lambda label: ends[label][0])
    places = np.array([ends[label][0] for label in order], float)
    for _ in range(200):  # push neighbours apart until none are too near
        near = np.flatnonzero(np.diff(places) < gap - 1e-6 * (high - low))
        for i in near:
            push = (gap - (places[i + 1] - places[i])) / 2
            places[i] -= push
            places[i + 1] += push
    for label, place in zip(order, places, strict=True):
        axes.annotate(
            label,
            (1, place),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            color=ends[label][1] if ends[label][1] != COLOURS["random weights"] else "0.5",
            fontsize=7,
            va="center",
            annotation_clip=False,
        )


def _mark_truncated(axes) -> None:
    """Two strokes through the foot of a y axis that does not begin at zero."""
    if axes.get_ylim()[0] > 0:
        style = {"marker": [(-1, -0.5), (1, 0.5)], "markersize": 6, "linestyle": "none"}
        style |= {"color": "k", "mec": "k", "mew": 0.8, "clip_on": False}
        axes.plot([0, 0], [0.02, 0.045], transform=axes.transAxes, label="_truncated", **style)


def _headings(figure: Figure, title: str, settings: str) -> None:
    """The finding above, the settings below."""
    figure.suptitle(title, fontsize=9)
    if settings:
        figure.supxlabel(settings, fontsize=6.5, color="0.4")


def _look(i: int) -> tuple[str, str]:
    """Colour and marker of the ``i``-th line of a figure."""
    return PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]


def _draw_line(axes, x, mean, spread, look: tuple[str, str], label: str) -> None:
    """A line with markers, and the band of its spread unless that is None."""
    colour, marker = look
    axes.plot(x, mean, color=colour, marker=marker, label=label, zorder=3)
    if spread is not None:
        low, high = mean - spread, mean + spread
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0, zorder=2)


def _ring_best(axes, x, mean, colour: str) -> None:
    best, style = mean.argmax(), {"markersize": 8, "markerfacecolor": "none", "zorder": 4}
    axes.plot(x[best], mean[best], "o", color=colour, **style)


def _draw_baselines(axes, baselines: dict[str, float]) -> dict[str, tuple[float, str]]:
    """Horizontal lines; label -> (where it lies, the colour of its name)."""
    for name, value in baselines.items():
        style = BASELINES.get(name, BASELINES["raw pixels"])
        axes.axhline(100 * value, label=name, zorder=1, **style)
    return {name: (100 * value, "0.3") for name, value in baselines.items()}


def _label_blocks(axes, depth: int) -> None:
    axes.set_xlabel("after block (1 = first)")
    narrow = axes.figure.get_figwidth() / len(axes.figure.axes) < 2
    every = 4 if depth > 12 or (narrow and depth > 6) else 1
    axes.set_xticks(
        range(1, depth + 1),
        [str(b) if b % every == 0 or b == 1 else "" for b in range(1, depth + 1)],
    )
    axes.grid(axis="y", color="0.92", linewidth=0.6)
    axes.set_axisbelow(True)


def legend_below(figure: Figure, *all_axes, columns: int = 2) -> Legend:
    """One legend under the whole figure, for all lines and points of the axes, each label once."""
    entries = {}
    for axes in all_axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    return figure.legend(
        list(entries.values()), list(entries), loc="outside lower center", ncols=columns
    )
