import matplotlib.pyplot as plt
import numpy as np
import pytest

from mimrefiner import pictures


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def test_maps_tell_many_classes_apart():
    assert len({pictures._class_style(i) for i in range(49)}) == 49
    xy, labels = np.random.default_rng(0).normal(size=(30, 2)), np.arange(30) % 10
    figure = pictures.plot_maps({"one": xy}, labels, [str(i) for i in range(10)], title="t", columns=1)
    assert sum(len(points.get_offsets()) for points in figure.axes[0].collections) == 30
    images = [np.zeros((4, 4, 3), np.uint8)] * 30
    shown = pictures.plot_thumbnails(xy, images, labels, title="t")
    assert "of 30 images" in shown.axes[0].get_title()


def test_neighbours_are_framed_by_right_and_wrong():
    image = np.zeros((4, 4, 3), np.uint8)
    figure = pictures.plot_neighbours({"query": [(image, None), (image, True), (image, False)]}, title="t")
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
    panel = {"targets z": points, "neighbour": points, "predictions p": points}, points, np.array([[0.5, 0.0]])
    axes = pictures.plot_circles({"one": panel}, title="t").axes[0]
    assert axes.get_title() == "one"
    assert [text.get_text() for text in axes.figure.legends[0].get_texts()] == list(panel[0])
