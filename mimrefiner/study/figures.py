"""One style, and figures of numbers: one function each.

Figures label blocks 1..depth; code and files count from 0.
"""

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
from mimrefiner.study.intervals import seed_difference
from mimrefiner.study.tables import count

COLUMN = 3.4  # inches: one column of a two-column paper
PAGE = 7.0  # both columns
# Okabe and Ito 2008
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
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
    ylabel: str = "k-NN accuracy (%)",
    baselines: dict[str, float] | None = None,
    mark_best: bool = True,
    relative: bool = False,
) -> Figure:
    """Accuracy after every block, one line per label; bands are ± one standard deviation.

    Args:
        rows: columns label, block (0-based), seed, value (a share, 0..1).
        title: over the axes.
        ylabel: names the y axis.
        baselines: horizontal lines by name, shares.
        mark_best: ring the best block of every line.
        relative: the x axis is block / depth in percent, so that models of several depths meet;
            ``depth`` is a column of rows then.
    """
    figure, axes = plt.subplots(
        figsize=(COLUMN * 1.3 if relative else COLUMN, 2.6), layout="constrained"
    )
    _draw_lines(axes, rows, mark_best, relative)
    _draw_baselines(axes, baselines or {})
    if relative:
        axes.set(xlabel="relative depth (block / depth, %; 100 = last block)", xlim=(0, 104))
        axes.grid(axis="y", color="0.92", linewidth=0.6)
    else:
        _label_blocks(axes, rows["block"].max() + 1)
    axes.set(ylabel=ylabel, title=title)
    legend_below(figure, axes)
    return figure


def plot_block_panels(
    panels: dict[str, pd.DataFrame],
    *,
    title: str,
    baselines: dict[str, dict[str, float]],
    ylabel: str = "k-NN accuracy (%)",
) -> Figure:
    """:func:`plot_blocks` side by side: a panel per entry, with its own baselines.

    Two panels share one y axis. A label looks the same in all panels.
    """
    figure, all_axes = plt.subplots(
        1, len(panels), figsize=(PAGE, 2.9), sharey=len(panels) == 2, layout="constrained"
    )
    labels = list(pd.concat(panels.values())["label"].unique())
    for axes, (name, rows) in zip(np.atleast_1d(all_axes), panels.items(), strict=True):
        _draw_lines(axes, rows, mark_best=True, labels=labels)
        _draw_baselines(axes, baselines.get(name, {}))
        _label_blocks(axes, rows["block"].max() + 1)
        axes.set_title(name)
    np.atleast_1d(all_axes)[0].set_ylabel(ylabel)
    figure.suptitle(title, fontsize=9)
    legend_below(figure, *np.atleast_1d(all_axes), columns=4)
    return figure


def plot_history(
    history: pd.DataFrame,
    metrics: dict[str, str],
    *,
    title: str,
    by: str = "block",
    window: int = 1,
) -> Figure:
    """Training curves: one small panel per metric, one line per head (or per value of ``by``).

    Args:
        history: what :func:`mimrefiner.refine` returns, columns stage, step, ``by`` and the
            metrics; where it holds both stages, stage 3 is to the right of the dotted line; where
            it holds several seeds, a line is their mean and the band ± one standard deviation.
        metrics: column -> title of its panel, with its unit.
        title: over the figure.
        by: the column that tells lines apart; blocks are 0-based in it and labelled from 1.
        window: steps of a running mean within a stage; the values themselves are drawn faint.
    """
    figure, all_axes = plt.subplots(1, len(metrics), figsize=(PAGE, 2.2), layout="constrained")
    both = history["stage"].nunique() > 1
    offset = history.loc[history["stage"] == 2, "step"].max() + 1 if both else 0
    values = sorted(history[by].unique())
    colours = sns.color_palette("viridis", len(values))
    for axes, (metric, label) in zip(np.atleast_1d(all_axes), metrics.items(), strict=True):
        for value, colour in zip(values, colours, strict=True):
            name = f"block {value + 1}" if by == "block" else f"{by} {value:g}"
            steps = history[history[by] == value].groupby(["stage", "step"])[metric]
            _draw_steps(axes, steps.agg(["mean", "std"]), offset, window, (colour, name))
        if both:
            axes.axvline(offset, color="0.4", linestyle=":", linewidth=1)
        axes.set(xlabel="step")
        axes.set_title(label, fontsize=8)
    figure.suptitle(title, fontsize=9)
    legend = legend_below(figure, np.atleast_1d(all_axes)[0], columns=len(values))
    if by == "block":
        legend.set_title("head on (block 1 = first)", {"size": 7})
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


def plot_ablations(
    rows: pd.DataFrame, *, title: str, metric: str = "k-NN accuracy of the last block"
) -> Figure:
    """How much better or worse than the recipe every variant is, one small panel per group.

    A dot is a seed; a bar with a tick is the mean with its 95 % interval over seeds and images.

    Args:
        rows: columns group, variant, seed, value (a share), n_test; the group "recipe" is the
            reference.
        title: over the figure.
        metric: names the measured quantity.
    """
    recipe = rows[rows["group"] == "recipe"].set_index("seed")["value"]
    groups = [(name, part) for name, part in rows.groupby("group", sort=False) if name != "recipe"]
    heights = [part["variant"].nunique() + 0.7 for _, part in groups]
    figure, all_axes = plt.subplots(
        len(groups),
        1,
        figsize=(PAGE, 0.24 * sum(heights) + 0.9),
        sharex=True,
        layout="constrained",
        gridspec_kw={"height_ratios": heights},
        squeeze=False,
    )
    for axes, (group, part) in zip(all_axes[:, 0], groups, strict=True):
        axes.axvline(0, color="0.3", linestyle="--", linewidth=1, zorder=1)
        variants = part.groupby("variant", sort=False)
        names = [_draw_variant(axes, y, *variant, recipe) for y, variant in enumerate(variants)]
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_title(group, fontsize=8, loc="left", pad=2)
    all_axes[-1, 0].set_xlabel(
        f"{metric}, variant minus recipe (points); grey: 95 % interval over seeds and images"
    )
    spread = f" ± {100 * recipe.std():.1f}" if len(recipe) > 1 else ""
    figure.suptitle(
        f"{title}\nrecipe: {100 * recipe.mean():.1f}{spread} % ({count(len(recipe), 'seed')})",
        fontsize=9,
    )
    return figure


def _draw_variant(axes, y: int, variant: str, seeds: pd.DataFrame, recipe: pd.Series) -> str:
    """A variant's dots in row ``y``, and its mean and interval; returns the label of the row."""
    values, n_test = seeds.set_index("seed")["value"], int(seeds["n_test"].iloc[0])
    change, many = seed_difference(values, recipe[values.index], images=n_test), len(values) > 1
    face = PALETTE[0] if many else "white"
    dots = 100 * np.array(change.by_seed), [y] * len(values)
    axes.plot(*dots, "o", color=PALETTE[0], markerfacecolor=face, zorder=3)
    if many:
        axes.hlines(y, 100 * change.low, 100 * change.high, color="0.7", linewidth=2.5, zorder=2)
        axes.plot(100 * change.mean, y, "|", color="black", markersize=9, zorder=4)
    return f"{variant} ({count(len(values), 'seed')})"


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
        axes.plot(
            np.append(angles, angles[0]), closed, color=PALETTE[i], marker=MARKERS[i], label=group
        )
        axes.fill(angles, radius[group], color=PALETTE[i], alpha=0.08)
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


def plot_two_curves(
    curves: pd.DataFrame, left: str, right: str, *, unit: str, title: str
) -> Figure:
    """Two quantities per block on two axes, mean and ± one standard deviation over seeds.

    Args:
        curves: columns block (0-based), seed, ``left`` and ``right``.
        left: a share, which is drawn in percent.
        right: the other quantity.
        unit: the unit of ``right``.
        title: over the axes.
    """
    figure, axes = plt.subplots(figsize=(COLUMN * 1.3, 2.7), layout="constrained")
    _label_blocks(axes, curves["block"].max() + 1)
    for i, (name, scale, label, side) in enumerate(
        ((left, 100, "%", axes), (right, 1, unit, axes.twinx()))
    ):
        stats = scale * curves.groupby("block")[name].agg(["mean", "std"])
        x, spread = stats.index.to_numpy() + 1, stats["std"].fillna(0)
        _draw_line(side, x, stats["mean"], spread, _look(i), name)
        side.set_ylabel(f"{name}\n({label})", color=PALETTE[i])
        side.tick_params(axis="y", colors=PALETTE[i])
    axes.set_title(title)
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


def plot_protocols(
    rows: pd.DataFrame, *, order: Sequence[str], models: Sequence[str], title: str
) -> Figure:
    """Accuracy by protocol, one marker per model; the bar is ± one standard deviation over seeds.

    Args:
        rows: columns protocol, model, value (a share), one row per seed.
        order: the protocols from left to right.
        models: the models in the order of the legend.
        title: over the axes.
    """
    figure, axes = plt.subplots(figsize=(PAGE, 2.8), layout="constrained")
    for i, model in enumerate(models):
        stats = (
            100
            * rows[rows["model"] == model]
            .groupby("protocol")["value"]
            .agg(["mean", "std"])
            .loc[list(order)]
        )
        x = np.arange(len(order)) + 0.14 * (i - (len(models) - 1) / 2)
        grey = model == "raw pixels"
        colour = "0.45" if grey else PALETTE[i]
        axes.errorbar(
            x,
            stats["mean"],
            stats["std"].fillna(0),
            fmt=MARKERS[i],
            color=colour,
            label=model,
            elinewidth=1,
            markersize=4.5,
        )
    axes.set_xticks(range(len(order)), order)
    axes.grid(axis="y", color="0.92", linewidth=0.6)
    axes.set(xlabel="protocol", ylabel="accuracy (%)", title=title)
    legend_below(figure, axes, columns=len(models))
    return figure


def _draw_lines(
    axes,
    rows: pd.DataFrame,
    mark_best: bool,
    relative: bool = False,
    labels: Sequence[str] | None = None,
) -> None:
    """A line per label; ``labels`` are those of all axes, so that each keeps its look."""
    labels = list(rows["label"].unique() if labels is None else labels)
    for label, line in rows.groupby("label", sort=False):
        stats = 100 * line.groupby("block")["value"].agg(["mean", "std"])
        x = stats.index.to_numpy() + 1
        if relative:
            x = 100 * x / line["depth"].iloc[0]
        look, mean = _look(labels.index(label)), stats["mean"].to_numpy()
        spread = stats["std"].to_numpy() if line["seed"].nunique() > 1 else None
        _draw_line(axes, x, mean, spread, look, label)
        if mark_best:
            _ring_best(axes, x, mean, look[0])


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


def _draw_baselines(axes, baselines: dict[str, float]) -> None:
    for (name, value), dashes in zip(
        baselines.items(), ((4, 2), (1, 1.5), (6, 1.5, 1, 1.5)), strict=False
    ):
        axes.axhline(
            100 * value, color="0.45", linewidth=1, linestyle=(0, dashes), label=name, zorder=1
        )


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
