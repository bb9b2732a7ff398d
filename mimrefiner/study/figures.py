"""One style, and figures of numbers: one function each. Figures label blocks 1..depth; code and
files count from 0.
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
    """Accuracy after every block, one line per ``label``; the band is ± one standard deviation over
    seeds.

    Args:
        rows: columns label, block (0-based), seed, value (a share, 0..1).
        title: over the axes.
        ylabel: of the y axis.
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
    """:func:`plot_blocks` side by side: a panel per entry, baselines per panel; two panels share
    one y axis.

    A label looks the same in all of them.
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
        history: of :func:`mimrefiner.refine`, columns stage, step, ``by`` and the metrics; where
            both stages are in it, stage 3 is to the right of the dotted line; with a column seed
            the line is the mean over seeds and the band ± one standard deviation.
        metrics: column -> title of its panel, with its unit.
        title: over the figure.
        by: the column that tells lines apart; blocks are 0-based in it and labelled from 1.
        window: steps of a running mean within a stage; the values themselves stay behind it, faint.
    """
    figure, all_axes = plt.subplots(1, len(metrics), figsize=(PAGE, 2.2), layout="constrained")
    both = history["stage"].nunique() > 1
    offset = history.loc[history["stage"] == 2, "step"].max() + 1 if both else 0
    values = sorted(history[by].unique())
    colours = sns.color_palette("viridis", len(values))
    for axes, (metric, label) in zip(np.atleast_1d(all_axes), metrics.items(), strict=True):
        for value, colour in zip(values, colours, strict=True):
            name = f"block {value + 1}" if by == "block" else f"{by} {value:g}"
            steps = (
                history[history[by] == value]
                .groupby(["stage", "step"])[metric]
                .agg(["mean", "std"])
            )
            x = steps.index.get_level_values("step") + offset * (
                steps.index.get_level_values("stage") == 3
            )
            mean, spread = (
                steps[c]
                .groupby("stage")
                .transform(lambda y: y.rolling(window, 1, center=True).mean())
                for c in steps
            )
            axes.plot(x, mean, color=colour, label=name, linewidth=1.1)
            if spread.notna().any():
                axes.fill_between(
                    x, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0
                )
            if window > 1:
                axes.plot(x, steps["mean"], color=colour, linewidth=0.5, alpha=0.3)
        if both:
            axes.axvline(offset, color="0.4", linestyle=":", linewidth=1)
        axes.set(xlabel="step")
        axes.set_title(label, fontsize=8)
    figure.suptitle(title, fontsize=9)
    legend = legend_below(figure, np.atleast_1d(all_axes)[0], columns=len(values))
    if by == "block":
        legend.set_title("head on (block 1 = first)", {"size": 7})
    return figure


def plot_ablations(
    rows: pd.DataFrame, *, title: str, metric: str = "k-NN accuracy of the last block"
) -> Figure:
    """One small panel per group of variants: what a variant has more than the recipe, a dot per
    seed; a bar with a tick is the mean with its 95 % interval over seeds and test images.

    Args:
        rows: columns group, variant, seed, value (a share), n_test; the group "recipe" is the
            reference.
        title, metric: of the figure and the measured quantity.
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
        names = []
        for y, (variant, seeds) in enumerate(part.groupby("variant", sort=False)):
            values = seeds.set_index("seed")["value"]
            change = seed_difference(
                values, recipe[values.index], images=int(seeds["n_test"].iloc[0])
            )
            many = len(values) > 1
            face = PALETTE[0] if many else "white"
            axes.plot(
                100 * np.array(change.by_seed),
                [y] * len(values),
                "o",
                color=PALETTE[0],
                markerfacecolor=face,
                zorder=3,
            )
            if many:
                axes.hlines(
                    y, 100 * change.low, 100 * change.high, color="0.7", linewidth=2.5, zorder=2
                )
                axes.plot(100 * change.mean, y, "|", color="black", markersize=9, zorder=4)
            names.append(f"{variant} ({len(values)} seed{'s' * many})")
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


def plot_timeline(rows: pd.DataFrame, *, title: str, others: pd.DataFrame | None = None) -> Figure:
    """Accuracy over time (the paper's Figure 1); ``rows``: columns date ("YYYY/MM"), name, value
    (percent).

    ``others``: rows like these that are drawn in grey, without their names.
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
    """Groups of models on many benchmarks (the paper's Figure 2); every axis is scaled on its own,
    lowest to highest value.

    ``rows``: columns axis, group, value (percent).
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
    """Two quantities per block on two axes, mean and ± one standard deviation over seeds; ``left``
    is a share, drawn in percent.

    ``curves``: columns block (0-based), seed, ``left`` and ``right``; ``unit``: of ``right``.
    """
    figure, axes = plt.subplots(figsize=(COLUMN * 1.3, 2.7), layout="constrained")
    _label_blocks(axes, curves["block"].max() + 1)
    for i, (name, scale, label, side) in enumerate(
        ((left, 100, "%", axes), (right, 1, unit, axes.twinx()))
    ):
        stats = scale * curves.groupby("block")[name].agg(["mean", "std"])
        x, spread = stats.index.to_numpy() + 1, stats["std"].fillna(0)
        side.plot(x, stats["mean"], color=PALETTE[i], marker=MARKERS[i], label=name)
        side.fill_between(
            x,
            stats["mean"] - spread,
            stats["mean"] + spread,
            color=PALETTE[i],
            alpha=0.18,
            linewidth=0,
        )
        side.set_ylabel(f"{name}\n({label})", color=PALETTE[i])
        side.tick_params(axis="y", colors=PALETTE[i])
    axes.set_title(title)
    return figure


def plot_report(stats: pd.DataFrame, *, title: str) -> Figure:
    """The block report: one panel per protocol, one line per pooling with its spread, the best
    block ringed (not for the effective rank, which is no score, and where the raw pixels' value
    stands in the title: it lies far outside).

    Random weights are the thin dashed line of the same colour, raw pixels the dotted grey one;
    crosses are the poolings that validation chose. ``stats``: of
    :func:`mimrefiner.study.report.summary`.
    """
    panels = list(stats.groupby(["protocol", "metric"], sort=False))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    width = PAGE if columns > 1 else COLUMN
    figure, all_axes = plt.subplots(
        rows, columns, figsize=(width, 2.3 * rows + 0.7), layout="constrained", squeeze=False
    )
    pools = [
        pool for pool in stats.loc[stats["model"] == "model", "pool"].unique() if pool != "chosen"
    ]
    styles = {
        pool: (PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]) for i, pool in enumerate(pools)
    }
    for axes in all_axes.flat[len(panels) :]:
        axes.remove()
    for axes, ((protocol, metric), part) in zip(all_axes.flat, panels, strict=False):
        scale, unit = (100, " (%)") if metric in ("accuracy", "ACC") else (1, "")
        for (model, pool), line in part.groupby(["model", "pool"], sort=False):
            _draw_report_line(
                axes, model, pool, line, scale, styles, score=metric != "effective_rank"
            )
        _label_blocks(axes, int(part["block"].max()) + 1)
        axes.set_ylabel(f"{metric.replace('_', ' ')}{unit}")
        pixels = part.loc[part["model"] == "raw pixels", "value"]
        outside = (
            f" (raw pixels: {pixels.max():.0f})"
            if metric == "effective_rank" and len(pixels)
            else ""
        )
        axes.set_title(_protocol_title(protocol) + outside, fontsize=8)
    figure.suptitle(f"{title}, {stats['n_test'].iloc[0]:,} test images", fontsize=9)
    entries = {}
    for axes in figure.axes:
        entries |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    legend = figure.legend(
        entries.values(), entries.keys(), loc="outside lower center", ncols=3 if columns > 1 else 2
    )
    legend.set_title("ring: best block; band: ± sd over draws, or standard error", {"size": 7})
    return figure


def _draw_report_line(
    axes,
    model: str,
    pool: str,
    line: pd.DataFrame,
    scale: float,
    styles: dict[str, tuple[str, str]],
    score: bool,
) -> None:
    x, y, spread = (
        line["block"].to_numpy() + 1,
        scale * line["value"].to_numpy(),
        scale * line["spread"].to_numpy(),
    )
    if model == "raw pixels":
        if score:
            axes.axhline(y.max(), color="0.45", linewidth=1, linestyle=":", label="raw pixels")
    elif pool == "chosen":
        if model == "model":
            axes.plot(
                x,
                y,
                "x",
                color="black",
                markersize=4,
                markeredgewidth=0.8,
                label="pooling chosen on validation",
                zorder=5,
            )
    elif model == "random weights":
        axes.plot(
            x,
            y,
            color=styles[pool][0],
            linewidth=0.9,
            linestyle="--",
            label=f"{pool}, random weights",
        )
    else:
        colour, marker = styles[pool]
        axes.plot(x, y, color=colour, marker=marker, label=pool, zorder=3)
        axes.fill_between(x, y - spread, y + spread, color=colour, alpha=0.18, linewidth=0)
        if score:
            axes.plot(
                x[y.argmax()],
                y.max(),
                "o",
                markersize=8,
                markerfacecolor="none",
                color=colour,
                zorder=4,
            )


def _protocol_title(protocol: str) -> str:
    """A probe's protocol in words."""
    if protocol.startswith("knn"):
        k, temperature = protocol.split("_")[1:3]
        return f"k-NN (k = {k[1:]}, temperature {temperature[1:]})"
    if protocol.startswith("logistic"):
        amount = protocol.removeprefix("logistic_")
        shots = amount.removesuffix("shot")
        words = f"{shots} image{'' if shots == '1' else 's'} per class"
        if shots == amount:
            words = f"{100 * float(amount):g} % of the images"
        return f"low-shot: {words}"
    return {"linear": "linear probe", "kmeans": "k-means", "spectrum": "effective rank"}.get(
        protocol, protocol.replace("_", " ")
    )


def plot_protocols(
    rows: pd.DataFrame, *, order: Sequence[str], models: Sequence[str], title: str
) -> Figure:
    """Accuracy by protocol, one marker per model; the bar is ± one standard deviation over seeds.

    ``rows``: columns protocol, model, value (a share), one row per seed; ``order`` and ``models``
    give the order of both.
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
    """A line per label; ``labels``: all that a figure of several axes has, so that each keeps its
    colour.
    """
    labels = list(rows["label"].unique() if labels is None else labels)
    for label, line in rows.groupby("label", sort=False):
        i = labels.index(label)
        stats = 100 * line.groupby("block")["value"].agg(["mean", "std"])
        stats.index = stats.index.to_numpy() + 1
        if relative:
            stats.index = 100 * stats.index / line["depth"].iloc[0]
        x = stats.index
        colour = PALETTE[i % len(PALETTE)]
        axes.plot(
            x, stats["mean"], color=colour, marker=MARKERS[i % len(MARKERS)], label=label, zorder=3
        )
        if line["seed"].nunique() > 1:
            low, high = stats["mean"] - stats["std"], stats["mean"] + stats["std"]
            axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0, zorder=2)
        if mark_best:
            best = stats["mean"].idxmax()
            axes.plot(
                best,
                stats.loc[best, "mean"],
                "o",
                markersize=8,
                markerfacecolor="none",
                color=colour,
                zorder=4,
            )


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
    """One legend under the whole figure, made of the lines and points of the axes, each label once."""
    entries = {}
    for axes in all_axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    return figure.legend(
        list(entries.values()), list(entries), loc="outside lower center", ncols=columns
    )
