"""Figures made of images and maps: neighbours, clusters, forces, likeness.

They take their style from :mod:`mimrefiner.study.figures`.
"""

import functools
import itertools
from collections.abc import Callable, Sequence

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure

from mimrefiner.study.figures import COLOURS, COLUMN, MARKERS, PAGE, PALETTE, legend_below

# For more than seven classes: after Petroff 2021, arXiv 2107.02270; a dark grey and four more
# colours stand for its two greys
CLASS_PALETTE = (
    "#3f90da",
    "#ffa90e",
    "#bd1f01",
    "#009e73",
    "#832db6",
    "#a96b59",
    "#e76300",
    "#b9ac70",
    "#5b5b5b",
    "#92dadd",
    "#1f3a93",
    "#e58ac0",
    "#a6d854",
    "#8a8d96",
)
# The kinds of fruit64 in the colours of the fruit, families by marker
FRUIT = {
    "Golden-Delicious": ("#d8c23a", "o"),
    "Granny-Smith": ("#6fb52c", "o"),
    "Pink-Lady": ("#e0607e", "o"),
    "Red-Delicious": ("#9c1024", "o"),
    "Royal-Gala": ("#e2733c", "o"),
    "Anjou": ("#a8c256", "^"),
    "Conference": ("#8c7a3a", "^"),
    "Kaiser": ("#b0793f", "^"),
    "Orange": ("#f28c1e", "s"),
    "Satsumas": ("#f9b233", "s"),
    "Cantaloupe": ("#d9b98a", "D"),
    "Galia-Melon": ("#bfae5a", "D"),
    "Honeydew-Melon": ("#e3d77a", "D"),
    "Watermelon": ("#1f5a34", "D"),
}
CELLS = 14  # thumbnails on one side of a map


def as_image(pixels: np.ndarray) -> np.ndarray:
    """Pixels in 0..1 as uint8; what lies outside is clipped.

    >>> as_image(np.array([[-1.0, 0.5, 2.0]])).tolist()
    [[0, 127, 255]]
    """
    return np.uint8(255 * np.clip(pixels, 0, 1))


def heat(values: np.ndarray, top: float) -> list[np.ndarray]:
    """Maps (images, height, width) as colour images, black at 0 and bright at ``top``.

    >>> heat(np.zeros((1, 2, 2)), top=1.0)[0].shape
    (2, 2, 3)
    """
    return [np.uint8(255 * plt.get_cmap("magma")(image / top)[..., :3]) for image in values]


def plot_images(images: Sequence[np.ndarray], labels: Sequence[str], *, title: str) -> Figure:
    """A row of images, (height, width, 3) uint8 each, with a word under each."""
    figure, all_axes = plt.subplots(
        1, len(images), figsize=(PAGE, PAGE / len(images) + 0.5), layout="constrained"
    )
    for axes, image, label in zip(np.atleast_1d(all_axes), images, labels, strict=True):
        axes.imshow(image, interpolation="nearest")
        axes.set_xlabel(label)
        axes.set(xticks=[], yticks=[])
        sns.despine(ax=axes, left=True, bottom=True)
    figure.suptitle(title, fontsize=9)
    return figure


def plot_neighbours(rows: dict[str, list[tuple[np.ndarray, bool | None]]], *, title: str) -> Figure:
    """Rows of small pictures under each other, such as queries and what was found for them.

    Args:
        rows: row label -> (image (height, width, 3) uint8, right or wrong or None) for every
            column; right gets a blue frame, wrong an orange dashed one.
        title: over the figure, in one line or more.
    """
    columns = max(len(row) for row in rows.values())
    figure, all_axes = _picture_grid(len(rows), columns, list(rows), title)
    styles = {
        True: {"edgecolor": PALETTE[0]},
        False: {"edgecolor": PALETTE[1], "linestyle": (0, (2.2, 1))},
    }
    for row_axes, row in zip(all_axes, rows.values(), strict=True):
        for axes, (image, right) in zip(row_axes, row, strict=True):
            axes.imshow(image, interpolation="nearest")
            if right is not None:
                style = styles[bool(right)] | {"transform": axes.transAxes, "clip_on": False}
                _frame(axes, (0, 0), 1, linewidth=1.8, **style)
    return figure


def plot_attention(
    images: Sequence[np.ndarray],
    maps: dict[str, np.ndarray],
    place: tuple[float, float, float],
    *,
    title: str,
) -> Figure:
    """Images, and under each what one of its patches attends to, as colours on one scale.

    The image's outlines are drawn on top.

    Args:
        images: (height, width, 3) uint8 each.
        maps: row label -> attention (images, rows of patches, columns of patches), which sums to 1
            over the patches.
        place: left, top and side in pixels; the patch there attends and gets a frame.
        title: over the figure.
    """
    figure, all_axes = _picture_grid(
        1 + len(maps), len(images), ["image", *maps], title, right=0.91
    )
    top, (height, width, _) = max(weights.max() for weights in maps.values()), images[0].shape
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    style = {"cmap": "magma", "vmin": 0, "vmax": top, "interpolation": "nearest"}
    left, upper, side = place
    for column, image in enumerate(images):
        all_axes[0, column].imshow(image, interpolation="nearest")
        for axes, weights in zip(all_axes[1:, column], maps.values(), strict=True):
            drawn = axes.imshow(weights[column], extent=extent, **style)
            axes.contour(image.mean(-1), levels=[127.5], colors="white", linewidths=0.7)
        for axes in all_axes[:, column]:
            corner = (left - 0.5, upper - 0.5)
            _frame(axes, corner, side, edgecolor=PALETTE[5], linewidth=1.4)
    bottom = all_axes[-1, 0].get_position().y0
    height = all_axes[1, 0].get_position().y1 - bottom
    bar = figure.colorbar(drawn, cax=figure.add_axes((0.925, bottom, 0.014, height)))
    uniform = 1 / next(iter(maps.values()))[0].size
    bar.ax.axhline(uniform, color=PALETTE[5], linewidth=1.5)
    bar.set_label(f"attention (line: uniform, {uniform:.3g})", fontsize=7)
    return figure


def _frame(axes, corner: tuple[float, float], side: float, **style) -> None:
    """A square without filling; ``corner`` is its left, lower one on axes that grow upwards."""
    axes.add_patch(plt.Rectangle(corner, side, side, fill=False, **style))


def _picture_grid(
    rows: int, columns: int, labels: Sequence[str], title: str, right: float = 0.995
) -> tuple[Figure, np.ndarray]:
    """Figure and (rows, columns) square axes without ticks, with a label left of every row."""
    left, gap = 0.14, 0.075  # share of the width, inches
    side = (PAGE * (right - left) - gap * (columns - 1)) / columns
    above = 0.14 + 0.16 * (1 + title.count("\n"))
    height = rows * side + (rows - 1) * gap + above + 0.05
    figure, all_axes = plt.subplots(rows, columns, figsize=(PAGE, height), squeeze=False)
    figure.subplots_adjust(left, 0.05 / height, right, 1 - above / height, gap / side, gap / side)
    for axes in all_axes.flat:
        axes.set(xticks=[], yticks=[])
        sns.despine(ax=axes, left=True, bottom=True)
    for axes, label in zip(all_axes[:, 0], labels, strict=True):
        axes.set_ylabel(label, rotation=0, ha="right", va="center", labelpad=6, fontsize=7)
    figure.suptitle(title, fontsize=9, x=(left + right) / 2, y=1 - 0.04 / height, va="top")
    return figure, all_axes


def circle_points(z, neighbour, p) -> dict[str, np.ndarray]:
    """What :func:`plot_circles` draws of targets, neighbours and predictions, (n, 2) each."""
    return {
        "targets z (other view)": np.asarray(z),
        "neighbour of the first": np.asarray(neighbour)[:1],
        "predictions p": np.asarray(p),
    }


def plot_circles(
    panels: dict[str, tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]], *, title: str
) -> Figure:
    """Unit vectors in the plane and the forces on some of them.

    Args:
        panels: panel title -> (label -> points (n, 2), starts of arrows (m, 2), arrows (m, 2)).
        title: over the figure.
    """
    figure, all_axes = plt.subplots(1, len(panels), figsize=(PAGE * 0.8, 3.0), layout="constrained")
    looks = [(COLOURS["before"], "o", 6), (COLOURS["refined"], "s", 9), ("0.15", "^", 5)]
    style = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.007, "headwidth": 4}
    style |= {"headlength": 4, "headaxislength": 3.5, "color": "0.15", "zorder": 4}
    angle = np.linspace(0, 2 * np.pi, 200)
    for axes, (name, (points, starts, arrows)) in zip(
        np.atleast_1d(all_axes), panels.items(), strict=True
    ):
        axes.plot(np.cos(angle), np.sin(angle), color="0.85", zorder=0)
        for (label, x), (colour, marker, size) in zip(points.items(), looks, strict=False):
            face = colour if marker != "s" else "none"
            axes.plot(*x.T, marker, color=colour, mfc=face, mew=1.6, label=label, markersize=size)
        axes.quiver(*starts.T, *arrows.T, **style)
        axes.set(xticks=[], yticks=[], aspect="equal", xlim=(-1.16, 1.16), ylim=(-1.16, 1.16))
        sns.despine(ax=axes, left=True, bottom=True)
        axes.set_title(name, fontsize=8)
    figure.suptitle(title, fontsize=9)
    legend_below(figure, np.atleast_1d(all_axes)[0], columns=len(points))
    return figure


def plot_maps(
    maps: dict[str, np.ndarray],
    labels,
    classes: Sequence[str],
    *,
    title: str,
    columns: int = 2,
    styles: dict[str, tuple[str, str]] | None = None,
) -> Figure:
    """Points in the plane, one panel per entry, one colour and marker per class.

    The name of a class stands at the middle of its points where there are at most ten classes, else
    in a legend.

    Args:
        maps: panel title -> (images, 2).
        labels: (images,) indices into ``classes``.
        classes: the names of the classes.
        title: over the figure.
        columns: panels per row.
        styles: class -> (colour, marker); what is missing is taken from CLASS_PALETTE.
    """
    rows = -(-len(maps) // columns)
    side, looks = PAGE / columns, _class_styles(classes, styles)
    named = len(classes) <= 10
    figure, all_axes = plt.subplots(
        rows,
        columns,
        figsize=(PAGE, rows * side * 0.9 + (0.3 if named else 0.8)),
        layout="constrained",
        squeeze=False,
    )
    for axes in all_axes.flat[len(maps) :]:
        axes.remove()
    for axes, (name, xy) in zip(all_axes.flat, maps.items(), strict=False):
        _draw_map(axes, xy, labels, classes, looks)
        if named:
            _name_classes(axes, xy, labels, classes)
        axes.set_title(name, fontsize=8)
    figure.suptitle(title, fontsize=9)
    if not named:
        legend_below(figure, all_axes[0, 0], columns=_legend_columns(classes))
    return figure


def _name_classes(axes, xy: np.ndarray, labels, classes: Sequence[str]) -> None:
    box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
    names = [name for i, name in enumerate(classes) if np.any(np.asarray(labels) == i)]
    middles = [np.median(xy[np.asarray(labels) == classes.index(name)], 0) for name in names]
    # Of letters of 8 points, on a panel of about 260 x 230 points
    sizes = np.array([(5.2 * len(name) / 260, 12 / 230) for name in names]) * np.ptp(xy, axis=0)
    for name, place in zip(names, _apart(np.array(middles), sizes), strict=True):
        axes.text(*place, name, ha="center", va="center", fontsize=8, weight="bold", bbox=box)


def _apart(places: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Places, (boxes, 2), moved up or down until no two boxes of ``sizes`` overlap."""
    places = places.copy()
    for _ in range(200):
        moved = False
        for i, j in itertools.combinations(range(len(places)), 2):
            wide, high = (sizes[i] + sizes[j]) / 2 - np.abs(places[i] - places[j])
            if wide > 0 and high > 1e-9 * sizes[i, 1]:
                up = 1 if places[i, 1] >= places[j, 1] else -1
                places[i, 1] += up * high / 2
                places[j, 1] -= up * high / 2
                moved = True
        if not moved:
            break
    return places


def plot_thumbnails(
    maps: dict[str, np.ndarray],
    images: Sequence[np.ndarray],
    labels,
    classes: Sequence[str],
    *,
    title: str,
    styles: dict[str, tuple[str, str]] | None = None,
) -> Figure:
    """Maps drawn with the images themselves, framed in their class's colour, one panel per map.

    An image stands in the cell of a grid nearest to its place, or in the nearest free one a few
    cells away, so that several of one island are seen; it is left out where there is none.

    Args:
        maps, labels, classes, title, styles: as for :func:`plot_maps`.
        images: (height, width, 3) uint8 each.
    """
    looks = _class_styles(classes, styles)
    figure, all_axes = plt.subplots(
        1, len(maps), figsize=(PAGE, PAGE / len(maps) + 0.6), layout="constrained", squeeze=False
    )
    for axes, (name, xy) in zip(all_axes.flat, maps.items(), strict=True):
        # UMAP's axes have no unit
        cells = _free_cells(CELLS * (xy - xy.min(0)) / np.ptp(xy, axis=0))
        for i, (column, row) in cells.items():
            extent = (column, column + 0.92, row, row + 0.92)
            axes.imshow(images[i], extent=extent, interpolation="nearest", zorder=2)
            style = {"edgecolor": looks[int(labels[i])][0], "linewidth": 1.2, "zorder": 3}
            _frame(axes, (column, row), 0.92, **style)
        ends = -0.1, CELLS + 0.1
        axes.set(xlim=ends, ylim=ends, xticks=[], yticks=[], aspect="equal")
        sns.despine(ax=axes, left=True, bottom=True)
        axes.set_title(f"{name}: {len(cells)} of {len(images)} images", fontsize=8)
    figure.suptitle(title, fontsize=9)
    style = {"markerfacecolor": "none", "markeredgewidth": 1.2}
    for look, name in zip(looks, classes, strict=True):
        all_axes[0, 0].plot([], [], "s", color=look[0], label=name, **style)
    legend_below(figure, all_axes[0, 0], columns=_legend_columns(classes))
    return figure


def _free_cells(places: np.ndarray, reach: float = 1.6) -> dict[int, tuple[int, int]]:
    """Point -> the nearest free cell of the grid within ``reach``; no cell is given twice.

    ``places`` are (images, 2), from 0 to CELLS.
    """
    grid = np.stack(np.meshgrid(*[np.arange(CELLS)] * 2, indexing="ij"), -1).reshape(-1, 2)
    free, cells = np.ones(len(grid), bool), {}
    # Else the first classes would take all cells
    for i in np.random.default_rng(0).permutation(len(places)):
        distance = np.where(free, np.linalg.norm(grid + 0.5 - places[i], axis=1), np.inf)
        nearest = int(distance.argmin())
        if distance[nearest] <= reach:
            free[nearest] = False
            cells[int(i)] = (int(grid[nearest, 0]), int(grid[nearest, 1]))
    return cells


def block_slider(
    map_of: Callable[[str, int], np.ndarray],
    models: Sequence[str],
    depth: int,
    labels,
    classes: Sequence[str],
    *,
    title: str,
) -> None:
    """Show a slider over blocks and a choice of models in the notebook.

    It needs ipywidgets and a live kernel.

    Args:
        map_of: (model, 0-based block) -> points in the plane, (images, 2); it is called when a map
            is first shown.
        models: the names to choose from.
        depth: the number of blocks.
        labels, classes, title: as for :func:`plot_maps`.
    """
    import ipywidgets

    map_of = functools.cache(map_of)

    def show(model: str, block: int) -> None:
        axes = plt.figure(figsize=(COLUMN, COLUMN), layout="constrained").add_subplot()
        _draw_map(axes, map_of(model, block), labels, classes, _class_styles(classes))
        axes.set_title(f"{title}: {model}, block {block + 1}")
        plt.show()

    slider = ipywidgets.SelectionSlider(
        options=[(f"block {b + 1}", b) for b in range(depth)],
        description="after",
        continuous_update=False,
    )
    ipywidgets.interact(
        show,
        model=ipywidgets.ToggleButtons(options=list(models), description="model"),
        block=slider,
    )


def plot_similarity(
    table: np.ndarray, *, title: str, xlabel: str, ylabel: str, top: float | None = 1
) -> Figure:
    """Heat map of CKA between the blocks of two models.

    Args:
        table: (blocks of the model on y, blocks of the model on x).
        title, xlabel, ylabel: over and beside the axes.
        top: where the colour scale, which begins at 0, ends; None takes the highest value.
    """
    figure, axes = plt.subplots(figsize=(COLUMN, 2.9), layout="constrained")
    image = axes.imshow(
        table,
        origin="lower",
        aspect="auto",
        cmap="viridis",
        vmin=0,
        vmax=top,
        interpolation="nearest",
    )
    for axis, blocks in ((axes.xaxis, table.shape[1]), (axes.yaxis, table.shape[0])):
        shown = [b for b in range(blocks) if blocks <= 12 or b == 0 or (b + 1) % 4 == 0]
        axis.set_ticks(shown, [str(b + 1) for b in shown])
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    figure.colorbar(image, ax=axes, label="linear CKA")
    return figure


def _draw_map(
    axes, xy: np.ndarray, labels, classes: Sequence[str], looks: list[tuple[str, str]]
) -> None:
    for i, (name, (colour, marker)) in enumerate(zip(classes, looks, strict=True)):
        points = xy[np.asarray(labels) == i].T
        axes.scatter(*points, s=12, color=colour, marker=marker, linewidths=0, label=name)
    axes.set(xticks=[], yticks=[])
    sns.despine(ax=axes, left=True, bottom=True)


def _class_styles(
    classes: Sequence[str], styles: dict[str, tuple[str, str]] | None = None
) -> list[tuple[str, str]]:
    """Colour and marker of every class."""
    return [(styles or {}).get(name, _class_style(i)) for i, name in enumerate(classes)]


def _legend_columns(classes: Sequence[str]) -> int:
    """About 110 letters and marks fit in a line of the page's width."""
    return min(len(classes), 10, max(1, 110 // (max(map(len, classes)) + 5)))


def _class_style(i: int) -> tuple[str, str]:
    """Colour and marker of class ``i``; colours repeat after fourteen, pairs of both after 98."""
    n = len(CLASS_PALETTE)
    return CLASS_PALETTE[i % n], MARKERS[(i + i // n) % len(MARKERS)]
