import itertools

import matplotlib.colors as mcolors
import matplotlib.pyplot as plt
import numpy as np
import pytest

import mimrefiner as mr
from mimrefiner.study import pictures


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def test_maps_tell_many_classes_apart():
    assert len({pictures._class_style(i) for i in range(98)}) == 98
    assert len({pictures._class_style(i)[0] for i in range(14)}) == 14
    xy, labels = np.random.default_rng(0).normal(size=(30, 2)), np.arange(30) % 10
    figure = pictures.plot_maps(
        {"one": xy}, labels, [str(i) for i in range(10)], title="t", columns=1
    )
    assert sum(len(points.get_offsets()) for points in figure.axes[0].collections) == 30
    images = [np.zeros((4, 4, 3), np.uint8)] * 30
    shown = pictures.plot_thumbnails(
        {"one": xy, "two": -xy}, images, labels, [str(i) for i in range(10)], title="t"
    )
    names = [text.get_text() for text in figure.axes[0].texts]
    assert names == [str(i) for i in range(10)]  # at the middle of their points
    assert [axes.get_title() for axes in shown.axes] == [
        f"{name}: 30 of 30 images" for name in ("one", "two")
    ]
    assert len(shown.legends[0].get_texts()) == 10


def test_names_of_classes_that_lie_on_one_another_can_be_read():
    rng = np.random.default_rng(0)
    names = ["automobile", "deer", "truck", "cat", "dog"]
    xy = rng.normal(size=(200, 2))
    figure = pictures.plot_maps({"a": xy, "b": xy}, np.arange(200) % 5, names, title="t")
    figure.canvas.draw()
    for axes in figure.axes:
        boxes = [text.get_window_extent() for text in axes.texts]
        assert len(boxes) == 5
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_thumbnails_of_one_place_spread_and_share_no_cell():
    cells = pictures._free_cells(np.full((300, 2), 7.0))
    assert 4 <= len(cells) == len(set(cells.values())) < 16
    assert all(abs(c + 0.5 - 7) < 2 for cell in cells.values() for c in cell)


def test_neighbours_are_framed_by_right_and_wrong():
    image = np.zeros((4, 4, 3), np.uint8)
    figure = pictures.plot_neighbours(
        {"query": [(image, None), (image, True), (image, False)]}, title="t"
    )
    frames = [list(axes.patches) for axes in figure.axes]
    assert [len(found) for found in frames] == [0, 1, 1]
    assert [frame.get_linestyle() == "solid" for (frame,) in frames[1:]] == [True, False]
    assert figure.axes[0].get_ylabel() == "query"


def test_attention_is_drawn_on_one_scale_with_the_uniform_value():
    images = [np.zeros((8, 8, 3), np.uint8)] * 2
    maps = {"block 1": np.full((2, 2, 2), 0.25), "block 2": np.array([np.eye(2) / 2] * 2)}
    for image in images:
        image[:, :4] = 255
    figure = pictures.plot_attention(images, maps, (4, 4, 4), title="t")
    drawn = [axes.images[0] for axes in figure.axes[2:6]]
    assert {image.get_clim() for image in drawn} == {(0, 0.5)}
    assert figure.axes[-1].get_ylabel() == "attention (line: uniform, 0.25)"
    assert len(figure.axes[2].patches) == 1


def test_likeness_counts_blocks_from_one():
    axes = pictures.plot_similarity(np.eye(3, 4), title="t", xlabel="x", ylabel="y").axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "2", "3", "4"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["1", "2", "3"]


def test_the_arrow_of_a_force_begins_at_its_point():
    points = np.array([[0.0, 1.0]])
    panel = (
        {"targets z": points, "neighbour": points, "predictions p": points},
        points,
        np.array([[0.5, 0.0]]),
    )
    axes = pictures.plot_circles({"one": panel}, title="t").axes[0]
    assert axes.get_title() == "one"
    assert axes.collections[0].get_offsets().tolist() == [[0, 1]]
    assert [text.get_text() for text in axes.figure.legends[0].get_texts()] == list(panel[0])


def test_the_slider_asks_for_a_map_when_it_is_shown_and_once(monkeypatch):
    widgets = pytest.importorskip("ipywidgets")
    asked, shown = [], {}
    monkeypatch.setattr(
        widgets, "interact", lambda show, **controls: shown.update(show=show, **controls)
    )

    def map_of(model, block):
        asked.append((model, block))
        return np.zeros((2, 2))

    pictures.block_slider(map_of, ["before", "refined"], 3, [0, 1], ["a", "b"], title="t")
    assert [value for _, value in shown["block"].options] == [0, 1, 2]
    assert asked == []
    for _ in range(2):
        shown["show"]("refined", 1)
    assert asked == [("refined", 1)]


def test_fruit_has_its_own_colours_and_a_family_its_marker():
    styles = pictures.FRUIT
    assert set(styles) == set(mr.load_dataset("fruit64", split="test").classes)
    assert styles["Anjou"][1] == styles["Kaiser"][1] != styles["Pink-Lady"][1]
    xy, labels = np.random.default_rng(0).normal(size=(28, 2)), np.arange(28) % 14
    figure = pictures.plot_maps({"one": xy}, labels, list(styles), title="t", styles=styles)
    (watermelon,) = [x for x in figure.axes[0].collections if x.get_label() == "Watermelon"]
    assert mcolors.to_hex(watermelon.get_facecolor()[0]) == styles["Watermelon"][0]
    assert len(figure.legends[0].get_texts()) == 14
