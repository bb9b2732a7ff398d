"""One style, one function per figure. Figures label blocks 1..depth; code and files count from 0."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from mimrefiner.checkpoint import atomic_file
from mimrefiner.results import write_csv

COLUMN = 3.4  # inches: one column of a two-column paper
PAGE = 7.0  # both columns
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito 2008
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def use_style() -> None:
    """Set fonts, sizes and colours for all figures that follow."""
    sns.set_theme(context="paper", style="ticks", palette=PALETTE)
    mpl.rcParams.update({
        "figure.dpi": 120, "savefig.dpi": 300, "savefig.bbox": "tight", "savefig.facecolor": "white", "pdf.fonttype": 42,
        "lines.linewidth": 1.4, "lines.markersize": 3.5,
        "font.size": 8, "axes.titlesize": 9, "axes.labelsize": 8, "legend.fontsize": 7, "xtick.labelsize": 7, "ytick.labelsize": 7,
        "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    })  # fmt: skip


def save_figure(figure: Figure, path: Path, data: pd.DataFrame) -> None:
    """Write ``path``.pdf and .png and, beside them, the data they were drawn from as .csv."""
    for suffix, metadata in ((".pdf", {"CreationDate": None}), (".png", {"Software": None})):  # same data, same bytes
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
) -> Figure:
    """Accuracy after every block, one line per ``label``; the band is ± one standard deviation over seeds.

    Args:
        rows: columns label, block (0-based), seed, value (a share, 0..1).
        title: over the axes.
        ylabel: of the y axis.
        baselines: horizontal lines by name, shares.
        mark_best: ring the best block of every line.
    """
    figure, axes = plt.subplots(figsize=(COLUMN, 2.6), layout="constrained")
    _draw_lines(axes, rows, mark_best)
    _draw_baselines(axes, baselines or {})
    _label_blocks(axes, rows["block"].max() + 1)
    axes.set(ylabel=ylabel, title=title)
    _legend_below(figure, axes)
    return figure


def plot_block_panels(panels: dict[str, pd.DataFrame], *, title: str, baselines: dict[str, dict[str, float]]) -> Figure:
    """:func:`plot_blocks` side by side on one y axis: a panel per entry, baselines per panel."""
    figure, all_axes = plt.subplots(1, len(panels), figsize=(PAGE, 2.9), sharey=True, layout="constrained")
    for axes, (name, rows) in zip(np.atleast_1d(all_axes), panels.items(), strict=True):
        _draw_lines(axes, rows, mark_best=True)
        _draw_baselines(axes, baselines.get(name, {}))
        _label_blocks(axes, rows["block"].max() + 1)
        axes.set_title(name)
    np.atleast_1d(all_axes)[0].set_ylabel("k-NN accuracy (%)")
    figure.suptitle(title, fontsize=9)
    _legend_below(figure, np.atleast_1d(all_axes)[0], columns=4)
    return figure


def plot_history(history: pd.DataFrame, metrics: dict[str, str], *, title: str) -> Figure:
    """Training curves per head: one small panel per metric, one line per block, stage 3 to the right of the dotted line.

    Args:
        history: of :func:`mimrefiner.refine`, columns stage, step, block and the metrics.
        metrics: column -> title of its panel.
        title: over the figure.
    """
    figure, all_axes = plt.subplots(1, len(metrics), figsize=(PAGE, 2.2), layout="constrained")
    second = history["stage"] == 2
    offset = history.loc[second, "step"].max() + 1 if second.any() else 0
    step = history["step"] + np.where(second, 0, offset)
    blocks = sorted(history["block"].unique())
    colours = sns.color_palette("viridis", len(blocks))
    for axes, (metric, label) in zip(np.atleast_1d(all_axes), metrics.items(), strict=True):
        for block, colour in zip(blocks, colours, strict=True):
            chosen = history["block"] == block
            axes.plot(step[chosen], history.loc[chosen, metric], color=colour, label=f"block {block + 1}", linewidth=1.1)
        if second.any():
            axes.axvline(offset, color="0.4", linestyle=":", linewidth=1)
        axes.set(xlabel="step")
        axes.set_title(label, fontsize=8)
    figure.suptitle(title, fontsize=9)
    _legend_below(figure, np.atleast_1d(all_axes)[0], columns=len(blocks))
    return figure


def plot_images(images: Sequence[np.ndarray], labels: Sequence[str], *, title: str) -> Figure:
    """A row of images, (height, width, 3) uint8 each, with a word under each."""
    figure, all_axes = plt.subplots(1, len(images), figsize=(PAGE, PAGE / len(images) + 0.5), layout="constrained")
    for axes, image, label in zip(np.atleast_1d(all_axes), images, labels, strict=True):
        axes.imshow(image, interpolation="nearest")
        axes.set_xlabel(label)
        axes.set(xticks=[], yticks=[])
        sns.despine(ax=axes, left=True, bottom=True)
    figure.suptitle(title, fontsize=9)
    return figure


def _draw_lines(axes, rows: pd.DataFrame, mark_best: bool) -> None:
    for i, (label, line) in enumerate(rows.groupby("label", sort=False)):
        stats = 100 * line.groupby("block")["value"].agg(["mean", "std"])
        x = stats.index.to_numpy() + 1
        colour = PALETTE[i % len(PALETTE)]
        axes.plot(x, stats["mean"], color=colour, marker=MARKERS[i % len(MARKERS)], label=label, zorder=3)
        if line["seed"].nunique() > 1:
            low, high = stats["mean"] - stats["std"], stats["mean"] + stats["std"]
            axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0, zorder=2)
        if mark_best:
            best = stats["mean"].idxmax()
            axes.plot(best + 1, stats.loc[best, "mean"], "o", markersize=8, markerfacecolor="none", color=colour, zorder=4)


def _draw_baselines(axes, baselines: dict[str, float]) -> None:
    for (name, value), dashes in zip(baselines.items(), ((4, 2), (1, 1.5), (6, 1.5, 1, 1.5)), strict=False):
        axes.axhline(100 * value, color="0.45", linewidth=1, linestyle=(0, dashes), label=name, zorder=1)


def _label_blocks(axes, depth: int) -> None:
    axes.set_xlabel("after block (1 = first)")
    axes.set_xticks(range(1, depth + 1), [str(b) if depth <= 12 or b % 4 == 0 or b == 1 else "" for b in range(1, depth + 1)])
    axes.grid(axis="y", color="0.92", linewidth=0.6)
    axes.set_axisbelow(True)


def _legend_below(figure: Figure, axes, columns: int = 2) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns)
